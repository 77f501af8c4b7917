"""Adversarial training with diffusion representation alignment (DRA) on CIFAR-10 and CIFAR-100, in one file.

Paper: "Expanding the Role of Diffusion Models for Robust Classifier Training", arXiv 2602.19931. A diffusion model helps
twice: its synthetic images are training data (DM-AT, arXiv 2302.04638), and its features are what the classifier's own
features of the attacked image have to resemble. At test time the classifier stands alone and costs nothing extra.

    L        = L_TRADES + lambda * L_DRA                              (eq. 4)
    L_TRADES = CE(f(x), y) + beta * KL(p(x) || p(x'))                 x' = the attacked image, |x' - x| <= eps
    L_DRA    = -cos(h(enc(x')), g(x_t, t, y))                         (eq. 3)
               enc: the classifier's penultimate features; h: a small MLP, trained along and then thrown away;
               g: features of a frozen diffusion model for the CLEAN image x with noise of level t added (edm_encoder.py)

Try it in about a minute on a CPU, without data or downloads:

    python train_cifar.py --smoke

The paper's CIFAR-10 row "AT+DRA, WRN-34-10" is the default (paper: 88.54 % clean, 57.29 % AutoAttack), and with a million
synthetic images its WRN-28-10 row (paper: 92.36 / 64.12):

    python train_cifar.py --out runs/wrn-34-10
    python train_cifar.py --arch wrn-28-10 --synthetic 1m.npz --batch-size 512 --epochs 400 --out runs/wrn-28-10-1m
    torchrun --nproc-per-node 8 train_cifar.py ...                     # the same run on eight GPUs

A run writes last.pt, best.pt (best robust accuracy on held-out training images) and log.csv to --out. The same command
again continues it: every random draw is a function of (seed, step), so no generator's state has to be saved.
"""
import argparse
import contextlib
import copy
import csv
import fcntl
import json
import math
import mmap
import os
import re
import resource
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edm_encoder import EDMEncoder, load_edm_encoder

# ---------------------------------------------------------------------------------------------------------------------
# Settings. "stated": in the paper. "inherited": from DM-AT, whose setup the paper says it follows exactly. "chosen": by us.
# The flags in `parse_args` are what one changes to reproduce the paper; the constants here are the rest of the recipe.

DATASETS = {  # classes; mean and standard deviation per RGB channel (inherited); the diffusion model that drew DM-AT's images (stated)
    "cifar10": SimpleNamespace(classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616),
                               teacher="https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl"),
    "cifar100": SimpleNamespace(classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
                                teacher="https://huggingface.co/wzekai99/DM-Improves-AT/resolve/main/others/edm-cifar100-32x32-cond-vp.pkl"),
}
OPTIMIZERS = {  # learning rate and weight decay. SGD: inherited; Lion: decay stated, rate chosen
    "sgd": SimpleNamespace(lr=0.2, weight_decay=5e-4),
    "lion": SimpleNamespace(lr=1e-4, weight_decay=0.5),
}
SGD_MOMENTUM = 0.9  # Nesterov, until the schedule sets it, see `one_cycle` (inherited)
LION_BETAS = (0.9, 0.99)  # Lion's own paper, arXiv 2302.06675
WARMUP = 0.025  # share of all epochs with a rising learning rate, and of all steps before weight averaging starts (inherited)
BATCHNORM_MOMENTUM = 0.01  # share of the new batch in the running statistics; 1.0 in the very first step (inherited)
CROP_PADDING = 4  # pixels of black border for the random crop (inherited)
HOLDOUT = 1024  # the first training images, kept out of training to pick best.pt (inherited); at most a tenth of the data
SELECTION_STEPS = 40  # steps of the margin-loss attack on them (inherited)
PROJECTOR_WIDTH = 2048  # hidden width of h; REPA's, arXiv 2410.06940 (the paper states three layers)
EXTRA_LOG_SIGMA = (-1.2, 1.2)  # mean and standard deviation of ln(sigma), EDM's training distribution (stated by reference)
BENCHMARK_WARMUP = 5  # steps before the clock starts: compilation, and cuDNN's choice of algorithms
TABLE_STEPS, TABLE_IMAGES = 10, 1024  # PGD for the closing table, a quick look and no result: AutoAttack is the judge
LOG_EVERY = 50  # steps


def one_line(error):
    """The first line of an error's message, printable: it may quote a file."""
    return ascii((str(error).splitlines() or [""])[0])[1:-1][:200] or type(error).__name__


class InputError(ValueError):
    """Something that the user gave cannot be used. One line; the command line prints it and exits with code 2."""


def number(kind=float, at_least=-math.inf, above=-math.inf, below=math.inf):
    """An argparse type: a number in that range, also written as a fraction, such as 8/255."""
    def parse(text):
        try:
            value = kind(Fraction(text))
        except (ValueError, ZeroDivisionError, OverflowError):
            value = math.nan
        if not at_least <= value < below or value <= above or (kind is int and value != Fraction(text)):
            bounds = [f"{word} {bound:g}" for word, bound in (("at least", at_least), ("above", above), ("below", below)) if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(f"{text}: expected {'a whole number' if kind is int else 'a number such as 8/255'}, {' and '.join(bounds)}")
        return value
    return parse


def parse_args(argv=None):
    """Command line -> Namespace. Raises InputError for a flag that is unknown or out of range."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.error = _raise_input_error  # one line and exit code 2, without the usage text
    add, share, positive, count = parser.add_argument, number(at_least=0, below=1), number(above=0, below=1e6), number(int, at_least=1, below=1e9)
    add("--smoke", action="store_true", help="a tiny run on drawn images with a random teacher: about a minute on a CPU, needs no files")
    # Data
    add("--dataset", choices=list(DATASETS), default="cifar10", help="number of classes and normalisation")
    add("--data-dir", default="data", help="folder with train.npz and test.npz (image uint8 [N,32,32,3], label int [N]), else torchvision's CIFAR, downloaded there")
    add("--synthetic", nargs="+", default=[], metavar="FILE", help="synthetic images: DM-AT's .npz files as released, any number of parts")
    add("--synthetic-fraction", type=share, help="their share of each batch (inherited: 0.7 up to 1M images, 0.8 above)")
    # Model and optimisation
    add("--arch", default="wrn-34-10", help="wrn-DEPTH-WIDTH with DEPTH = 6n + 4, or vit-b-2")
    add("--epochs", type=count, default=200, help="of ceil(training images / batch size) steps, whatever the synthetic data (stated per row)")
    add("--max-steps", type=count, help="total number of steps, in place of --epochs")
    add("--batch-size", type=number(int, at_least=2, below=1e9), default=128, help="over all processes (stated per row)")
    add("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="sgd for WRN (inherited), lion for ViT (stated)")
    add("--lr", type=positive, help="peak learning rate (sgd 0.2: inherited; lion 1e-4: chosen)")
    add("--weight-decay", type=number(at_least=0, below=1e6), help="none on normalisation layers (sgd 5e-4: inherited; lion 0.5: stated)")
    add("--ema-decay", type=share, default=0.995, help="weight averaging tau (inherited)")
    add("--label-smoothing", type=share, default=0.1, help="in the cross-entropy (inherited)")
    # Attack
    add("--beta", type=number(at_least=0, below=1e6), default=5.0, help="weight of TRADES' KL term (inherited)")
    add("--eps", type=share, default="8/255", help="largest change of a pixel in [0,1] (inherited)")
    add("--step-size", type=positive, default="2/255", help="of the attack (inherited)")
    add("--attack-steps", type=number(int, at_least=0, below=1e9), default=10, help="PGD steps in training (stated); 0 trains on clean images, with --beta 0 by cross-entropy alone")
    # Diffusion representation alignment
    add("--dra-weight", type=number(at_least=0, below=1e6), default=1.0, help="lambda in eq. (4); 0 is plain adversarial training and needs no teacher (chosen)")
    add("--teacher", help="EDM .pkl, path or URL (stated: the EDM model that drew the synthetic images, downloaded if not given)")
    add("--teacher-sigma", type=positive, default=0.06, help="noise level for the teacher, images in [-1,1] (chosen: best linear probe in DDAE, arXiv 2303.09769)")
    add("--teacher-layer", default="dec.8x8_in1", help="block whose output is the target (stated: the bottleneck before upsampling)")
    add("--teacher-unconditional", action="store_true", help="do not tell the teacher the label")
    add("--extra-sigma", action="store_true", help="a second target per image at a random noise level (stated for more than 1M synthetic images)")
    # Running
    add("--out", default="runs/cifar", help="folder for last.pt, best.pt and log.csv")
    add("--seed", type=number(int, at_least=0, below=2**63), default=0, help="of every random draw")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--no-amp", action="store_true", help="float32 throughout, without TF32 (default on CUDA: backbone and teacher in bfloat16)")
    add("--no-compile", action="store_true", help="no torch.compile (default on CUDA: compiled)")
    add("--eval-every", type=positive, default=1, help="epochs between evaluations of the averaged model on the held-out images (inherited)")
    add("--save-every", type=positive, default=1, help="epochs between checkpoints")
    add("--benchmark", type=count, nargs="?", const=20, metavar="STEPS", help="time that many steps (20 if not given), print one line of JSON and stop; draws images and a teacher of full size where none are given")
    add("--peak-tflops", type=positive, help="the device's peak rate, for --benchmark to compare with")
    add("--dry-run", action="store_true", help="print the plan and stop")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):  # small enough for two CPU cores; any flag still beats these
        parser.set_defaults(arch="wrn-10-1", epochs=6, batch_size=64, lr=0.1, eval_every=3, out="runs/smoke", device="cpu")
    args = parser.parse_args(argv)

    # What depends on other flags.
    args.lr = OPTIMIZERS[args.optimizer].lr if args.lr is None else args.lr
    args.weight_decay = OPTIMIZERS[args.optimizer].weight_decay if args.weight_decay is None else args.weight_decay
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu")
    if args.synthetic_fraction and not args.synthetic:
        raise InputError("--synthetic-fraction: expected --synthetic FILE with it")
    if args.dra_weight == 0:  # plain adversarial training: what is said of the teacher does not matter
        args.teacher, args.extra_sigma = None, False
    elif args.teacher is None and not args.smoke and not args.benchmark:
        args.teacher = DATASETS[args.dataset].teacher
    args.amp = args.device == "cuda" and not args.no_amp
    return args


def _raise_input_error(message):
    raise InputError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Model. `model(images)` gives logits, `model.features(images)` penultimate features [B, D], and `model.head` leads from one
# to the other. Images are in [0, 1]: the normalisation is inside, as AutoAttack needs it.


class Block(nn.Module):
    """Pre-activation residual block. Parameter names as in DM-AT and in RobustBench's DMWideResNet."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels, momentum=BATCHNORM_MOMENTUM)
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1 if stride == 1 else 0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels, momentum=BATCHNORM_MOMENTUM)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if in_channels != out_channels else None

    def forward(self, x):
        """[B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride]"""
        activated = F.silu(self.batchnorm_0(x))
        # TensorFlow's SAME padding: a strided 3x3 convolution pads right and bottom only.
        h = self.conv_0(activated if self.conv_0.stride == (1, 1) else F.pad(activated, (0, 1, 0, 1)))
        h = self.conv_1(F.silu(self.batchnorm_1(h)))
        return h + (x if self.shortcut is None else self.shortcut(activated))


class Classifier(nn.Module):
    """What both architectures share. A subclass has `penultimate`, normalised images -> features [B, D], and `head`, features
    -> logits [B, num_classes]."""

    def set_normalisation(self, mean, std):
        """Mean and standard deviation per RGB channel. Not persistent: the state dict keeps DM-AT's and RobustBench's keys."""
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.amp = False  # bfloat16 in the backbone

    def features(self, images):
        """images [B, 3, 32, 32] in [0, 1] -> penultimate features [B, D] float32: autocast ends here, logits stay float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return self.penultimate((images - self.mean) / self.std).float()

    def forward(self, images):
        """images [B, 3, 32, 32] in [0, 1] -> logits [B, num_classes]."""
        return self.head(self.features(images))


class WideResNet(Classifier):
    """WRN-depth-width with SiLU (swish), as in DM-AT, and with its initialisation: convolutions N(0, 2 / (k^2 out_channels)), which is 2.4
    times wider than torch's default for 3x3 layers of equal width, and no bias in front of the softmax at first."""

    def __init__(self, depth, width, num_classes):
        super().__init__()
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential()
        for group in range(3):
            blocks = [Block(channels[group + (i > 0)], channels[group + 1], stride=2 if group and i == 0 else 1) for i in range((depth - 4) // 6)]
            self.layer.append(nn.Module())  # only there for the name: layer.0.block.0 and so on
            self.layer[group].block = nn.Sequential(*blocks)
        self.batchnorm = nn.BatchNorm2d(channels[3], momentum=BATCHNORM_MOMENTUM)
        self.logits = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.logits.bias)

    def penultimate(self, x):
        """[B, 3, 32, 32] normalised -> [B, 64 * width], the mean over the last 8 x 8 positions."""
        x = self.init_conv(x)  # [B, 16, 32, 32]
        for group in self.layer:
            x = group.block(x)  # 32 x 32, then 16 x 16, then 8 x 8
        return F.silu(self.batchnorm(x)).mean(dim=(2, 3), dtype=torch.float32)

    def head(self, features):
        return self.logits(features)


class ViT(Classifier, torchvision.models.VisionTransformer):
    """torchvision's Vision Transformer at ViT-B's size for 32 px images in patches of 2 (stated): 257 tokens of width 768."""

    def __init__(self, num_classes):
        super().__init__(image_size=32, patch_size=2, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072, num_classes=num_classes)

    def penultimate(self, x):
        """[B, 3, 32, 32] normalised -> [B, 768], the class token after the last layer norm."""
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)  # [B, 256, 768]
        class_token = self.class_token.expand(len(x), -1, -1).to(patches.dtype)
        return self.encoder(torch.cat([class_token, patches], dim=1))[:, 0]

    def head(self, features):
        return self.heads(features)


def build_model(arch, num_classes, dataset="cifar10"):
    """A classifier for images [B, 3, 32, 32] in [0, 1], randomly initialised from torch's global generator.

    arch: "wrn-DEPTH-WIDTH" with DEPTH = 6n + 4, or "vit-b-2"; dataset: whose mean and standard deviation normalise the input.
    Raises InputError for an unknown arch or dataset.
    """
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset}: expected one of {', '.join(DATASETS)}")
    wrn = re.fullmatch(r"wrn-(\d{2,3})-(\d{1,2})", arch)
    if wrn and int(wrn[1]) >= 10 and int(wrn[1]) % 6 == 4 and int(wrn[2]) >= 1:
        model = WideResNet(int(wrn[1]), int(wrn[2]), num_classes)
    elif arch == "vit-b-2":
        model = ViT(num_classes)
    else:
        raise InputError(f"--arch {arch}: expected wrn-DEPTH-WIDTH with DEPTH = 6n + 4 (such as wrn-28-10), or vit-b-2")
    model.set_normalisation(DATASETS[dataset].mean, DATASETS[dataset].std)
    return model


def build_projector(in_width, out_width):
    """h in eq. (3): classifier features [B, in_width] -> teacher's space [B, out_width]. Three layers (stated), SiLU as in REPA."""
    return nn.Sequential(nn.Linear(in_width, PROJECTOR_WIDTH), nn.SiLU(), nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH), nn.SiLU(),
                         nn.Linear(PROJECTOR_WIDTH, out_width))


# ---------------------------------------------------------------------------------------------------------------------
# Attack and losses


def pgd(loss, images, start, eps, step_size, steps):
    """Projected gradient ascent on loss(x') over the l-infinity ball around `images` and the pixel range (eq. 2).

    images, start [B, 3, H, W] in [0, 1], start within eps of images; loss: images -> scalar. Returns x', same shape, detached.
    """
    adv = start
    for _ in range(steps):
        with torch.enable_grad():
            adv = adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(adv), [adv])
        adv = adv.detach() + step_size * gradient.sign()
        adv = adv.clamp(images - eps, images + eps).clamp(0, 1)
    return adv.detach()


@contextlib.contextmanager
def attack_mode(model):
    """While attacking: batch norm leaves its running statistics alone, and no weight gradient is computed (or compiled)."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    weights = [p for p in model.parameters() if p.requires_grad]
    for norm in norms:
        norm.track_running_stats = False
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for weight in weights:
            weight.requires_grad_(True)


def kl_divergence(clean_logits, adv_logits, reduction):
    """KL(p(x) || p(x')) from logits [B, classes]. Log-probabilities on both sides: with plain ones the gradient into the
    clean logits is NaN as soon as one of them underflows."""
    clean_log_p, adv_log_p = clean_logits.float().log_softmax(dim=1), adv_logits.float().log_softmax(dim=1)
    return F.kl_div(adv_log_p, clean_log_p, reduction=reduction, log_target=True)


def trades_attack(model, images, start, eps, step_size, steps, clean_logits=None):
    """The adversary of TRADES as in DM-AT: x' within eps of x that maximises KL(p(x) || p(x')), p(x) held fixed.

    images [B, 3, H, W] in [0, 1]; start: the first x', same shape, U(-eps, eps) around images and clamped to [0, 1]. A model
    in training mode is attacked with BATCH statistics, not the running ones, which stay as they are (DM-AT; TRADES' own
    code differs in both, and in its start). clean_logits [B, classes]: the model's on `images`, where a training forward has just
    computed them with the same weights and batch statistics; else they are computed here. Returns x' [B, 3, H, W] in [0, 1], detached.
    """
    with attack_mode(model):
        if clean_logits is None:
            with torch.no_grad():
                clean_logits = model(images)
        clean_logits = clean_logits.detach()
        return pgd(lambda adv: kl_divergence(clean_logits, model(adv), "sum"), images, start, eps, step_size, steps)


def trades_loss(clean_logits, adv_logits, labels, beta, label_smoothing):
    """L_TRADES = CE(f(x), y) + beta * KL(p(x) || p(x')), mean over the batch; gradients flow into both (arXiv 1901.08573).

    clean_logits, adv_logits [B, classes], labels [B] int64. Returns a float32 scalar.
    """
    cross_entropy = F.cross_entropy(clean_logits.float(), labels, label_smoothing=label_smoothing)
    return cross_entropy + beta * kl_divergence(clean_logits, adv_logits, "batchmean")


def dra_loss(projected, target):
    """L_DRA = -cos(h(enc(x')), g(x_t, t, y)), mean over the batch (eq. 3): -1 where the directions agree.

    projected, target [B, width]; no gradient flows into target. Returns a float32 scalar in [-1, 1].
    """
    return -F.cosine_similarity(projected.float(), target.detach().float(), dim=1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675): the sign of an interpolated momentum, with decoupled weight decay."""

    def __init__(self, params, lr, weight_decay=0.0, betas=LION_BETAS):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            if not params:
                continue
            gradients, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)  # a few launches for all parameters together
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)


def build_optimizer(args, *modules):
    """SGD or Lion over all parameters of `modules`. Without weight decay: for SGD batch norm alone (inherited; biases of linear layers
    decay), for Lion all vectors, so biases and layer norms (chosen)."""
    parameters = [p for module in modules for p in module.parameters()]
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    undecayed = {id(p) for p in parameters if p.ndim <= 1} if args.optimizer == "lion" else {id(p) for norm in norms for p in norm.parameters()}
    groups = [{"params": [p for p in parameters if id(p) not in undecayed]},
              {"params": [p for p in parameters if id(p) in undecayed], "weight_decay": 0.0}]
    if args.optimizer == "lion":
        return Lion(groups, lr=args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(groups, lr=args.lr, momentum=SGD_MOMENTUM, nesterov=True, weight_decay=args.weight_decay)


def one_cycle(position, total, peak):
    """(learning rate, momentum) at position 0 ... total - 1: torch's OneCycleLR(max_lr=peak, pct_start=0.025, total_steps=total).

    Two halves of a cosine: the rate rises from peak / 25 to the peak and falls to peak / 250,000, while the momentum goes from 0.95 to
    0.85 and back. The rise ends at WARMUP * total - 1. Where that is not above 0 (up to 40 positions) there is none, and the run begins
    in the fall, as with torch (which divides by zero where it is exactly 0).
    """
    rise_end = WARMUP * total - 1
    cosine = lambda start, end, share: end + (start - end) / 2 * (1 + math.cos(math.pi * share))
    if rise_end > 0 and position <= rise_end:
        share = position / rise_end
        return cosine(peak / 25, peak, share), cosine(0.95, 0.85, share)
    share = (position - rise_end) / (total - 1 - rise_end)
    return cosine(peak, peak / 25 / 1e4, share), cosine(0.85, 0.95, share)


def averaging_decay(step, warmup_steps, tau):
    """Share of the old average that stays after step `step` (from 0): none during the warm-up, then rising to tau (DM-AT)."""
    since = step + 1 - warmup_steps
    return 0.0 if since < 0 else min(tau, (1 + since) / (10 + since))


@torch.no_grad()
def update_average(averaged, model, decay):
    """averaged <- decay * averaged + (1 - decay) * model; batch norm's running statistics are copied, never shared."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
    for mine, live in zip(averaged.buffers(), model.buffers()):
        mine.copy_(live)


def set_batchnorm_momentum(model, momentum):
    """Share of the new batch in the running statistics of every batch norm layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


class ProcessLost(Exception):
    """Another process of this run has ended."""


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Combine the processes' tensors in place; nothing to do in a single process. Raises ProcessLost where one has died."""
    if dist.is_initialized():
        try:
            dist.all_reduce(tensor, operation)
        except RuntimeError as error:
            if "CUDA" in str(error):  # not the others' fault
                raise
            raise ProcessLost(f"another process has stopped ({one_line(error)}); the same command continues from the last checkpoint") from None
    return tensor


def average_gradients(parameters):
    """Mean gradient over all processes. By hand rather than by DistributedDataParallel: a step costs 26 forward passes, so there is
    little to gain from overlapping, and the two training-mode forwards of one step would trip over its buffer broadcasts."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def ask_teacher(teacher, batch, args):
    """g(x_t, t, y) for each noise level in batch.teacher_noise (none without alignment), from the clean images: a list of [B, width] float32."""
    labels = None if args.teacher_unconditional else batch.labels
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=args.amp):
        return [teacher(batch.images, labels, sigma, noise) for sigma, noise in batch.teacher_noise]


def train_step(model, averaged, projectors, teacher, optimizer, batch, decay, args):
    """One optimisation step, in the paper's order. Deterministic: all randomness is in `batch` (see `Data.batch`).

    batch.images [B, 3, 32, 32] in [0, 1], batch.labels [B], batch.start like images, and batch.teacher_noise, a list of
    (sigma, noise), one for each projector; decay: see `averaging_decay`; args: eps, step_size, attack_steps, beta,
    label_smoothing, dra_weight, teacher_unconditional, amp. Returns detached scalars by name, left on the device.
    """
    images, labels = batch.images, batch.labels
    model.train()  # batch statistics in the attack and in both forwards below

    # The clean forward comes first and serves twice: its logits are p(x) in the attack, held fixed there, and p(x) in L_TRADES.
    clean_logits = model(images)

    # The attack, by the PGD of eq. (2), on TRADES' KL where eq. (1) has the cross-entropy: x' starts at U(-eps, eps) around x.
    attacking = args.eps > 0 and args.attack_steps > 0  # else x' = x, plain training
    adv = trades_attack(model, images, batch.start, args.eps, args.step_size, args.attack_steps, clean_logits) if attacking else images

    # L_TRADES. Clean and adversarial forward have each its own batch statistics; both update the running ones.
    adv_features = model.features(adv)  # enc(x'), [B, D]
    adv_logits = model.head(adv_features)
    trades = trades_loss(clean_logits, adv_logits, labels, args.beta, args.label_smoothing)

    # L_DRA, eq. (3): the projected features of x' against the teacher's of the clean x. The mean over projectors (chosen).
    alignment = trades.new_zeros(())
    for projector, target in zip(projectors, ask_teacher(teacher, batch, args)):
        alignment = alignment + dra_loss(projector(adv_features), target) / len(projectors)

    loss = trades + args.dra_weight * alignment  # eq. (4)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    update_average(averaged, model, decay)

    with torch.no_grad():
        clean, robust = [(logits.argmax(dim=1) == labels).float().mean() for logits in (clean_logits, adv_logits)]
    cosine = {"cosine": -alignment.detach()} if len(projectors) else {}
    return {"loss": loss.detach(), "trades": trades.detach(), "train_clean": clean, "train_robust": robust} | cosine


# ---------------------------------------------------------------------------------------------------------------------
# Data: disk -> one augmented batch on the device. Every draw is a function of (seed, step). It is made for the whole batch, and
# each process takes its share.


def generator(seed, position, purpose, device="cpu"):
    """A random generator that depends on (seed, position, purpose) alone. position: a step or pass number; purpose: a short text."""
    mixed = np.random.SeedSequence([seed, position, *purpose.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


def map_npz_member(path, name):
    """Map one array of an .npz file into memory where it lies, without reading it: (read-only array, its mmap).

    numpy ignores mmap_mode for .npz, but an uncompressed member is a plain .npy at some offset in the zip (zip64 included).
    Raises InputError for a file that is no .npz, lacks `name`, or holds it compressed, cut off or as pickled objects.
    """
    with open(path, "rb") as file:
        try:
            info = zipfile.ZipFile(file).getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"{path}: {name!r} is compressed and cannot be mapped; write the file again with numpy.savez")
            file.seek(info.header_offset)
            local = file.read(30)  # the local header, with name and extra field behind it, of lengths that only it knows
            begin = file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), os.SEEK_CUR)
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read_header(file)
            if dtype.hasobject or fortran_order:
                raise InputError(f"{path}: {name!r} is {dtype}{' in Fortran order' * fortran_order}, expected a C-ordered array of integers")
            if file.tell() - begin + math.prod(shape) * dtype.itemsize != info.file_size:
                raise ValueError(f"{name!r} has another length than its header says")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.ndarray(shape, dtype, buffer=mapping, offset=file.tell()), mapping
        except InputError:
            raise
        except KeyError:
            raise InputError(f"{path}: has no array {name!r}; expected 'image' and 'label'") from None
        except Exception as error:  # a damaged file can fail in any way
            raise InputError(f"{path}: not a readable .npz file, perhaps cut off ({one_line(error)})") from None


class Images:
    """Images uint8 [N, 32, 32, 3] with labels [N] uint8, in memory or, with `mapping`, left on disk and fetched by index."""

    def __init__(self, images, labels, mapping=None):
        self.images, self.mapping, self.pin = images, mapping, False
        self.labels = torch.from_numpy(np.asarray(labels).astype(np.uint8))

    def __len__(self):
        return len(self.labels)

    def to(self, device, first=0, end=None):
        """A copy of images [first:end] in the device's memory."""
        moved = Images(None, self.labels[first:end])
        moved.labels = moved.labels.to(device)
        moved.images = torch.empty(self.images[first:end].shape, dtype=torch.uint8, device=device)
        for i in range(0, len(moved), 100_000):  # in pieces: these may be a mapped file's
            moved.images[i:i + 100_000] = torch.from_numpy(self.images[first:end][i:i + 100_000].copy())
            if self.mapping:
                self.mapping.madvise(mmap.MADV_DONTNEED)
        return moved

    def fetch(self, index):
        """index [n] int64 -> images [n, 32, 32, 3] uint8 and labels [n] int64, where they are stored."""
        if self.mapping is None:
            index = index.to(self.images.device)
            return self.images[index], self.labels[index].long()
        images = torch.from_numpy(self.images[index.numpy()])  # a copy
        images = images.pin_memory() if self.pin else images  # from where it moves to a GPU without being waited for
        self.mapping.madvise(mmap.MADV_DONTNEED)  # or the resident memory would grow towards the size of the file
        return images, self.labels[index].long()


def open_npz(path, classes):
    """An .npz with `image` uint8 [N, 32, 32, 3] and integer `label` [N] in 0 ... classes - 1 -> Images, left on disk.

    Raises InputError, one line that names the file, where that is not what it holds.
    """
    (images, mapping), (labels, _) = map_npz_member(path, "image"), map_npz_member(path, "label")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise InputError(f"{path}: 'image' is {images.dtype} {list(images.shape)}, expected uint8 [N, 32, 32, 3]")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        raise InputError(f"{path}: 'label' is {labels.dtype} {list(labels.shape)}, expected integers [{len(images)}], at least one")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{path}: labels run from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    if classes == 100 and labels.max() < 10:  # DM-AT's files for both data sets have the same name
        raise InputError(f"{path}: labels run from {labels.min()} to {labels.max()}, expected up to 99: these are CIFAR-10's")
    return Images(images, labels, mapping)


def load_real(args, split):
    """The real images of "train" or "test": --data-dir's npz files, or torchvision's CIFAR, or the smoke run's drawings."""
    folder = Path(args.data_dir)
    if args.smoke:
        return Images(*draw_smoke_images(1088 if split == "train" else 128, seed=args.seed + (split == "test")))
    if getattr(args, "benchmark", None) and not folder.exists():
        return Images(np.random.default_rng(args.seed).integers(0, 256, (50_000, 32, 32, 3), np.uint8), np.zeros(50_000))
    if (folder / "train.npz").exists() or (folder / "test.npz").exists():
        return open_npz(folder / f"{split}.npz", DATASETS[args.dataset].classes)
    cifar = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[args.dataset]
    try:
        data = cifar(folder, train=split == "train", download=True)
    except (RuntimeError, OSError) as error:
        raise InputError(f"--data-dir {folder}: has no train.npz, and torchvision could not get {args.dataset} ({error})") from None
    return Images(data.data, data.targets)


def draw_smoke_images(count, seed):
    """Ten classes that a tiny network learns in a minute: waves in two directions and five frequencies, with random phase,
    contrast, colour and noise. Returns images uint8 [count, 32, 32, 3] and labels int64 [count]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    frequency = 1 + labels % 5  # waves per 32 pixels
    phase, contrast = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.25, 0.45, count)
    position = np.arange(32) / 32
    wave = contrast[:, None] * np.sin(2 * np.pi * frequency[:, None] * position + phase[:, None])  # [count, 32]
    images = np.where((labels < 5)[:, None, None], wave[:, None, :], wave[:, :, None])[..., None]  # [count, 32, 32, 1]
    images = 0.5 + images * rng.uniform(0.6, 1, (count, 1, 1, 3)) + rng.normal(0, 0.05, (count, 32, 32, 3))
    return (images.clip(0, 1) * 255).astype(np.uint8), labels


class Data:
    """Real and synthetic training images, held-out and test images, and the batches drawn from them."""

    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        real = load_real(args, "train")
        held = min(HOLDOUT, len(real) // 10)
        if not held:
            raise InputError(f"--data-dir {args.data_dir}: has {len(real)} training images, expected at least 10")
        self.holdout, self.test = real.to(device, end=held), load_real(args, "test").to(device)
        self.steps_per_epoch = math.ceil(len(real) / args.batch_size)  # DM-AT: whatever the synthetic data
        synthetic = [open_npz(path, DATASETS[args.dataset].classes) for path in args.synthetic]
        self.synthetic_bytes = sum(part.images.nbytes for part in synthetic)
        self.resident = device.type == "cuda" and self.synthetic_bytes < torch.cuda.mem_get_info()[0] / 2
        if self.resident and not args.dry_run:
            synthetic = [part.to(device) for part in synthetic]
        for part in synthetic:
            if part.mapping:
                part.mapping.madvise(mmap.MADV_RANDOM)  # no read-ahead: single images are fetched from all over the file
                part.pin = device.type == "cuda"
        self.parts = [real.to(device, first=held), *synthetic]  # numbered through: part i ends before image ends[i]
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)
        self.n_real_images, self.n_synthetic_images = len(self.parts[0]), sum(len(part) for part in synthetic)

        if synthetic and args.synthetic_fraction is None:
            args.synthetic_fraction = 0.7 if self.n_synthetic_images <= 1_000_000 else 0.8
        self.n_real = args.batch_size - int(args.batch_size * (args.synthetic_fraction or 0))  # per batch; the others are synthetic
        if not 1 <= self.n_real <= self.n_real_images:
            raise InputError(f"--batch-size {args.batch_size}: has {self.n_real} real images, expected 1 to {self.n_real_images}, all there are")
        if args.batch_size % world:
            raise InputError(f"--batch-size {args.batch_size}: expected a multiple of the {world} processes")
        on_disk = any(part.mapping for part in self.parts)
        self.reader, self.coming = ThreadPoolExecutor(1) if on_disk else None, {}  # by step: what it is reading ahead
        self.side_stream = torch.cuda.Stream(device) if on_disk and device.type == "cuda" else None
        self.permutation = (None, None)  # number of the current pass over the real images, and its order

    def draw_indices(self, step):
        """Which images the step's global batch holds: int64 [batch_size], numbered through `parts`.

        Real ones are consecutive pieces of reshuffled passes over all of them; synthetic ones are drawn with replacement.
        """
        seed, index = self.args.seed, []
        position, end = step * self.n_real, (step + 1) * self.n_real
        while position < end:  # a batch may end one pass and begin the next
            number, offset = divmod(position, self.n_real_images)
            known, order = self.permutation
            if known != number:
                order = torch.randperm(self.n_real_images, generator=generator(seed, number, "pass"))
                self.permutation = number, order
            index.append(order[offset:offset + end - position])
            position += len(index[-1])
        if self.n_synthetic_images:
            shape = (self.args.batch_size - self.n_real,)
            index.append(self.n_real_images + torch.randint(self.n_synthetic_images, shape, generator=generator(seed, step, "synthetic")))
        return torch.cat(index)

    def fetch(self, index):
        """index [n] as from `draw_indices` -> images uint8 [n, 32, 32, 3] and labels [n] int64, on the device, in that order."""
        images = torch.empty(len(index), 32, 32, 3, dtype=torch.uint8, device=self.device)
        labels = torch.empty(len(index), dtype=torch.int64, device=self.device)
        part_of = torch.bucketize(index, self.ends, right=True)
        for i, part in enumerate(self.parts):
            here = (part_of == i).nonzero().squeeze(1)
            some_images, some_labels = part.fetch(index[here] - (self.ends[i] - len(part)))
            here = here.to(self.device)
            images[here], labels[here] = some_images.to(self.device, non_blocking=True), some_labels.to(self.device)
        return images, labels

    def fetch_step(self, step):
        """`fetch` for this process's share of a step. With files left on disk, a thread reads the next step's meanwhile."""
        def fetch(step):
            with torch.cuda.stream(self.side_stream):  # does nothing where that is None
                return self.fetch(self.draw_indices(step)[self.rank::self.world].contiguous())
        if not self.reader:
            return fetch(step)
        images, labels = (self.coming.pop(step, None) or self.reader.submit(fetch, step)).result()
        if self.side_stream:
            torch.cuda.current_stream().wait_stream(self.side_stream)
            images.record_stream(torch.cuda.current_stream())
            labels.record_stream(torch.cuda.current_stream())
        self.coming = {step + 1: self.reader.submit(fetch, step + 1)}
        return images, labels

    def batch(self, step):
        """All that `train_step` needs for one step. B: this process's share of the batch, every `world`-th image of it.

        Returns images [B, 3, 32, 32] in [0, 1], randomly cropped and flipped, labels [B], start: the attack's first point, and
        teacher_noise: [(sigma, noise)] for the teacher, one or two.
        """
        args, device, size, mine = self.args, self.device, self.args.batch_size, slice(self.rank, None, self.world)
        images, labels = self.fetch_step(step)
        images = images.permute(0, 3, 1, 2)  # [B, 3, 32, 32] in 0 ... 255

        random = generator(args.seed, step, "batch", device)  # one stream, read in this order and for the whole batch
        corner = torch.randint(2 * CROP_PADDING + 1, (2, size), generator=random, device=device)[:, mine]
        flip = (torch.rand(size, generator=random, device=device) < 0.5)[mine]
        images = crop_and_flip(images, corner, flip).float() / 255  # in [0, 1]

        shape = (size, 3, 32, 32)
        start = images + args.eps * (2 * torch.rand(shape, generator=random, device=device)[mine] - 1)
        teacher_noise = []
        if args.dra_weight:
            teacher_noise.append((args.teacher_sigma, torch.randn(shape, generator=random, device=device)[mine]))
        if args.extra_sigma:
            mean, deviation = EXTRA_LOG_SIGMA
            sigma = (mean + deviation * torch.randn(size, generator=random, device=device)[mine]).exp()
            teacher_noise.append((sigma, torch.randn(shape, generator=random, device=device)[mine]))
        return SimpleNamespace(images=images, labels=labels, start=start.clamp(0, 1), teacher_noise=teacher_noise)


def crop_and_flip(images, corner, flip):
    """Crop images [B, C, H, W] at corner [2, B] (row, column) out of themselves with a black border, and mirror where flip [B]."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (CROP_PADDING,) * 4)
    rows = corner[0, :, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    columns = corner[1, :, None] + torch.where(flip[:, None], columns.flip(1), columns)  # [B, W]
    which = torch.arange(batch, device=images.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # gathered as [B, H, W, C]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, checkpoints and log


def margin_loss(logits, labels):
    """Best wrong logit minus the right one (Carlini & Wagner 2017), at most 0, summed over the batch: logits [B, classes], labels [B].
    Hinged as in DM-AT: an image that is already misclassified adds no gradient and stays where it is."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return (wrong - right).clamp(max=0).sum()


def evaluate(model, source, loss, steps, args, limit=None):
    """Clean and robust accuracy in percent, the latter under `steps` PGD steps on `loss`, from one random start (by seed).

    model: in evaluation mode, frozen. source: Images on the device, of which the first `limit` count.
    """
    clean, robust, count = 0, 0, min(len(source), limit or len(source))
    for index in torch.arange(count).split(256):
        images, labels = source.fetch(index)
        images = images.permute(0, 3, 1, 2).float() / 255  # [256, 3, 32, 32] in [0, 1]
        random = generator(args.seed, int(index[0]), "evaluate", images.device)
        start = images + args.eps * (2 * torch.rand(images.shape, generator=random, device=images.device) - 1)
        adv = pgd(lambda x: loss(model(x), labels), images, start.clamp(0, 1), args.eps, args.step_size, steps)
        with torch.no_grad():
            clean += (model(images).argmax(dim=1) == labels).sum().item()
            robust += (model(adv).argmax(dim=1) == labels).sum().item()
    return 100 * clean / count, 100 * robust / count


def save_atomically(content, path):
    """torch.save under a temporary name, flushed to the disk, then renamed: `path` is always whole, the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter where the disk is full
        raise OSError(f"{path}: cannot be written ({one_line(error)}); what was there before is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def checkpoint(args, run, step, best):
    """All that a run needs to continue after `step` steps, and all that a reader of the weights needs: tensors and plain types.

    model_state_dict (averaged) and unaveraged_model_state_dict are DM-AT's keys, state_dict (averaged) is RobustBench's.
    """
    model, averaged, projectors, optimizer = run
    data, weights = DATASETS[args.dataset], averaged.state_dict()
    return {"model_state_dict": weights, "state_dict": weights, "unaveraged_model_state_dict": model.state_dict(),
            "projector": projectors.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": best,
            "args": vars(args), "arch": args.arch, "dataset": args.dataset, "num_classes": data.classes, "mean": data.mean, "std": data.std}


# Settings that may differ when a run continues: they say where it runs, not what it computes.
MAY_DIFFER = {"data_dir", "out", "device", "amp", "no_amp", "no_compile", "save_every", "dry_run", "benchmark", "peak_tflops"}


def restore(path, args, run):
    """Load a checkpoint of a run with the same settings into `run`; returns (step, best). Raises InputError where it is
    damaged or of another run."""
    model, averaged, projectors, optimizer = run
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # data only: nothing in the file can run
        difference = [f"{name} {saved['args'].get(name)} there, {value} now" for name, value in vars(args).items()
                      if name not in MAY_DIFFER and saved["args"].get(name) != value]
        if not difference:
            model.load_state_dict(saved["unaveraged_model_state_dict"])
            averaged.load_state_dict(saved["model_state_dict"])
            projectors.load_state_dict(saved["projector"])
            optimizer.load_state_dict(saved["optimizer"])
            return int(saved["step"]), float(saved["best"])
    except Exception as error:
        raise InputError(f"{path}: damaged, or no checkpoint of this script ({type(error).__name__}); move it away to continue from "
                         "the folder's other checkpoint, or to start anew where there is none") from None
    raise InputError(f"{path}: belongs to a run with other settings ({'; '.join(difference)}); choose another --out")


LOG_COLUMNS = ("step", "epoch", "lr", "loss", "trades", "cosine", "train_clean", "train_robust", "images_per_s", "holdout_clean", "holdout_robust")


def start_log(path, step):
    """log.csv with its header and the rows up to `step`; later ones, of a run that went on after its last checkpoint, will be made
    again. Without a checkpoint a log that is there already is set aside."""
    rows = []
    if path.exists() and step:
        rows = [line for line in path.read_text().splitlines() if line.split(",")[0].isdigit() and int(line.split(",")[0]) <= step and line.count(",") == len(LOG_COLUMNS) - 1]
    elif path.exists():
        os.replace(path, path.with_name(f"log-{time.time_ns()}.csv"))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("\n".join([",".join(LOG_COLUMNS), *rows]) + "\n")
    os.replace(temporary, path)


def write_log(path, row):
    """Append row {column: number} to log.csv. Accuracies in percent; images_per_s over all processes."""
    try:
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n").writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({one_line(error)}); the last checkpoint is untouched") from None


def show(row, minutes_left):
    """Print a row of the log. A reader who went away (Ctrl-C also ends the `tee` behind a pipe) is no reason to stop."""
    text = "step {step:>6}  epoch {epoch:7.2f}  loss {loss:.3f}" + "  cosine {cosine:.3f}" * ("cosine" in row)
    text += "  batch clean {train_clean:.1f} % robust {train_robust:.1f} %  {images_per_s:.0f} images/s"
    text += "  | held-out clean {holdout_clean:.2f} % robust {holdout_robust:.2f} %" * ("holdout_clean" in row)
    try:
        print(text.format(**row) + f"  {minutes_left:.1f} min left", flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


@contextlib.contextmanager
def locked(folder, name="lock"):
    """Keep a second run out of the folder. The lock is the process's own: a killed one leaves none behind."""
    with open(folder / name, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{folder}: another run is at work there") from None
        yield


class Stopped(Exception):
    """A signal asked the run to stop, and its state is saved. The exit code is 128 + the signal's number, as is usual."""


@contextlib.contextmanager
def noted_signals():
    """While this lasts, SIGTERM and Ctrl-C are only noted, in the list that it gives; a second one of a kind ends the process."""
    noted = []

    def note(number, _frame):
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def load_teacher(args, device):
    """The frozen diffusion encoder, or None without alignment. Raises InputError where it does not fit the data."""
    if args.dra_weight == 0:
        return None
    try:
        if args.teacher is None:  # smoke, benchmark: a random network's features are a poor target, but they exercise the same path
            torch.manual_seed(args.seed)
            size = {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4} if args.benchmark else {"model_channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 1}
            return EDMEncoder(args.teacher_layer, img_resolution=32, label_dim=DATASETS[args.dataset].classes, **size).to(device, memory_format=torch.channels_last)
        teacher = load_edm_encoder(args.teacher, args.teacher_layer)
    except (ValueError, OSError) as error:
        raise InputError(f"--teacher {error}") from None
    classes = DATASETS[args.dataset].classes
    if teacher.img_resolution != 32:
        raise InputError(f"--teacher {args.teacher}: made for {teacher.img_resolution} px images, expected 32")
    if teacher.label_dim not in (0, classes) and not args.teacher_unconditional:
        raise InputError(f"--teacher {args.teacher}: knows {teacher.label_dim} classes, expected {classes} ({args.dataset}); "
                         "--teacher-unconditional drops the labels")
    return teacher.to(device, memory_format=torch.channels_last)


def print_plan(args, data, model, projectors, teacher, total_steps):
    """What is about to run, in a few lines."""
    count = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters"
    memory = sum(part.images.nbytes for part in (data.parts[0], data.holdout, data.test)) / 2**20
    epochs = math.ceil(total_steps / data.steps_per_epoch)
    rates = [one_cycle(epoch, epochs, args.lr)[0] for epoch in range(epochs)]
    plan = [("model", f"{args.arch}, {DATASETS[args.dataset].classes} classes, {count(model)}; bfloat16 {'on' if args.amp else 'off'}"),
            ("data", f"{args.dataset}: {data.n_real_images:,} real images to train on, {len(data.holdout):,} held out, "
                     f"{len(data.test):,} for tests; {memory:.0f} MiB on {data.device}")]
    if args.synthetic:
        where = f"in memory of {data.device}" if data.resident else "left on disk, memory-mapped"
        plan += [("synthetic", f"{data.n_synthetic_images:,} images in {len(args.synthetic)} file(s), {data.synthetic_bytes / 2**30:.1f} GiB, {where}")]
    plan += [("batch", f"{args.batch_size} = {data.n_real} real + {args.batch_size - data.n_real} synthetic, on {data.world} process(es)"),
             ("steps", f"{total_steps:,} = {total_steps / data.steps_per_epoch:g} epochs of {data.steps_per_epoch:,} steps "
                       f"({data.steps_per_epoch * args.batch_size:,} images)"),
             ("attack", f"TRADES, beta {args.beta:g}, eps {args.eps * 255:g}/255, {args.attack_steps} steps of {args.step_size * 255:g}/255"),
             ("optimizer", f"{args.optimizer}, learning rate {rates[0]:g} in the first epoch, {max(rates):g} at most, weight decay {args.weight_decay:g}, averaging {args.ema_decay:g}")]
    if teacher is None:
        plan += [("alignment", "none: plain adversarial training")]
    else:
        sigma = f"sigma {args.teacher_sigma:g}" + " and one drawn per image" * args.extra_sigma
        labels = "without labels" if args.teacher_unconditional or not teacher.label_dim else "with labels"
        plan += [("alignment", f"lambda {args.dra_weight:g}; projector {count(projectors)}"),
                 ("teacher", f"{args.teacher or 'random'}: {teacher.layer}, {teacher.width} wide, {count(teacher)}, {sigma}, {labels}")]
    for name, text in plan:
        print(f"{name:10} {text}", flush=True)


def build_run(args, device, teacher):
    """Freshly initialised model, its average, projectors and optimizer: a function of the settings and the seed alone."""
    torch.manual_seed(args.seed)
    model = build_model(args.arch, DATASETS[args.dataset].classes, args.dataset)
    with torch.no_grad():
        feature_width = model.eval().features(torch.zeros(1, 3, 32, 32)).shape[1]
    projectors = nn.ModuleList(build_projector(feature_width, teacher.width) for _ in range(1 + args.extra_sigma) if teacher)
    model.to(device, memory_format=torch.channels_last)  # the faster layout for convolutions, on GPUs and CPUs
    projectors.to(device)
    model.amp = args.amp
    averaged = copy.deepcopy(model).requires_grad_(False).eval()  # a copy: it shares no storage with the live model
    return model, averaged, projectors, build_optimizer(args, model, projectors)


def train(args, data, teacher, run, out, total_steps, signals=()):
    """Train to `total_steps`, from the last checkpoint in `out` or else from scratch. run: as from `build_run`, changed in place.

    signals: as from `noted_signals`; when one has come, the step at work is finished and saved, and Stopped is raised.
    """
    model, averaged, projectors, optimizer = run
    main_process, first_step, best = data.rank == 0, 0, -1.0
    last_checkpoint = next((out / name for name in ("last.pt", "best.pt") if (out / name).exists()), None)
    if last_checkpoint:
        if (out / "best.pt").exists():  # first for its score: it may be newer than last.pt, and a repetition on CUDA need not reach it
            best = restore(out / "best.pt", args, run)[1]
        first_step, saved_best = restore(last_checkpoint, args, run)
        best = max(best, saved_best)
        if main_process and last_checkpoint.name == "best.pt":  # there may be no step left that would write last.pt
            save_atomically(checkpoint(args, run, first_step, best), out / "last.pt")
    same = all_reduce(torch.tensor([first_step, -first_step]), dist.ReduceOp.MAX)
    if same.sum():
        raise InputError(f"--out {out}: the processes see different checkpoints there (steps {-int(same[1])} to {int(same[0])}), expected a folder that all share")
    if main_process:
        print(f"continuing {last_checkpoint} after step {first_step} of {total_steps}" if last_checkpoint else "starting", flush=True)
        start_log(out / "log.csv", first_step)

    warmup = int(WARMUP * total_steps)
    eval_every, save_every = [max(1, round(epochs * data.steps_per_epoch)) for epochs in (args.eval_every, args.save_every)]
    log_every, recent, since, started = min(LOG_EVERY, data.steps_per_epoch), [], time.time(), time.time()
    for step in range(first_step, total_steps):
        set_batchnorm_momentum(model, 1.0 if step == 0 else BATCHNORM_MOMENTUM)
        if step == max(1, first_step):  # step 0 has a momentum of its own
            compile_parts(args, model, teacher)
            compile_parts(args, averaged, None)
        lr, momentum = one_cycle(step // data.steps_per_epoch, math.ceil(total_steps / data.steps_per_epoch), args.lr)
        for group in optimizer.param_groups:
            group.update({"lr": lr} | ({"momentum": momentum} if args.optimizer == "sgd" else {}))
        decay = averaging_decay(step, warmup, args.ema_decay)
        recent.append(train_step(model, averaged, projectors, teacher, optimizer, data.batch(step), decay, args))

        # Bookkeeping. The numbers in `recent` stay on the device until a line is due: reading them would wait for the GPU.
        done, last = step + 1, step + 1 == total_steps
        stopping = int(all_reduce(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX))  # one process that has to stop stops all
        evaluating, saving = done % eval_every == 0 or last, done % save_every == 0 or last or stopping
        if not (done % log_every == 0 or evaluating or saving):
            continue
        row = {"step": done, "epoch": done / data.steps_per_epoch, "lr": lr} | summarise(recent, done, model)
        row["images_per_s"] = args.batch_size * len(recent) / (time.time() - since)
        if main_process and evaluating:
            row["holdout_clean"], row["holdout_robust"] = evaluate(averaged, data.holdout, margin_loss, SELECTION_STEPS, args)
            if row["holdout_robust"] >= best:  # ties go to the later one (DM-AT)
                best = row["holdout_robust"]
                save_atomically(checkpoint(args, run, done, best), out / "best.pt")
        if main_process:
            write_log(out / "log.csv", row)
        if main_process and saving:
            save_atomically(checkpoint(args, run, done, best), out / "last.pt")
        if main_process:
            show(row, (total_steps - done) * (time.time() - started) / (done - first_step) / 60)
        if stopping and not last:
            all_reduce(torch.zeros(()))  # all wait until process 0 has saved
            raise Stopped(stopping, f"stopped by {signal.Signals(stopping).name} after step {done} of {total_steps}; the same command continues from there")
        recent, since = [], time.time()


def time_step(args, data, batches, teacher, run):
    """Time training steps and their parts, and print one line of JSON. batches: count -> an iterator over that many new batches.

    Seconds are means over `args.benchmark` steps after a warm-up: of whole steps with new batches, and of the parts alone (data, attack,
    teacher; "update" is the rest of a step on a fixed batch). They need not add up, as data are read while others compute.
    FLOPs (a multiplication and an addition are two) are torch's count for one forward pass and for the teacher, times the number of
    passes, a backward pass to image or weights costing as much as a forward pass; for this process's share of the batch.
    """
    model, averaged, projectors, optimizer = run
    cuda = args.device == "cuda"

    def seconds(function, count=args.benchmark):
        inputs = batches(BENCHMARK_WARMUP + count)
        for i in range(BENCHMARK_WARMUP + count):
            if i == BENCHMARK_WARMUP:
                torch.cuda.synchronize() if cuda else None
                started = time.perf_counter()
            function(inputs)
        torch.cuda.synchronize() if cuda else None
        return (time.perf_counter() - started) / count
    batch = next(batches(1))
    clean_logits = model(batch.images).detach()
    attack = lambda _: trades_attack(model, batch.images, batch.start, args.eps, args.step_size, args.attack_steps, clean_logits)
    teach = lambda _: ask_teacher(teacher, batch, args)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(batch.images)
    with torch.no_grad(), FlopCounterMode(display=False) as teaching:
        teach(None)
    # Attack steps of a forward and a backward pass to the image, two forwards with backward passes to image and weights.
    flops = forward.get_total_flops() * (2 * args.attack_steps + 2 * 3) + teaching.get_total_flops()
    train_step(model, averaged, projectors, teacher, optimizer, batch, 0.5, args)  # before compiling: the first step is another graph
    compile_parts(args, model, teacher)
    parts = {"step": seconds(lambda inputs: train_step(model, averaged, projectors, teacher, optimizer, next(inputs), 0.5, args)),
             "data": seconds(next), "attack": seconds(attack), "teacher": seconds(teach)}
    computed = seconds(lambda _: train_step(model, averaged, projectors, teacher, optimizer, batch, 0.5, args))
    parts["update"] = computed - parts["attack"] - parts["teacher"]
    rate = flops / parts["step"] / 1e12
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"arch": args.arch, "batch_size": args.batch_size, "processes": data.world, "device": torch.cuda.get_device_name() if cuda else "cpu",
              "torch": torch.__version__, "threads": torch.get_num_threads(), "bfloat16": args.amp, "compiled": cuda and not args.no_compile,
              "images_per_s": args.batch_size / parts["step"], "seconds": parts, "gflop_per_image": flops / len(batch.labels) / 1e9,
              "tflops": rate, "share_of_peak": rate / args.peak_tflops if args.peak_tflops else None, "peak_memory_gib": memory / 2**30}
    if data.rank == 0:
        print(json.dumps(json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))))


def compile_parts(args, model, teacher):
    """On CUDA, compile what takes the time: the backbone and the teacher. Names of parameters stay as they are."""
    if args.device == "cuda" and not args.no_compile:
        model.features = torch.compile(model.features, dynamic=False)
        for network in teacher.children() if teacher else ():
            network.compile(dynamic=False)


def summarise(recent, done, model):
    """Means of the last steps' numbers over all processes. Raises FloatingPointError where one of them or a weight is not finite:
    nothing is saved then."""
    table = torch.stack([torch.stack(list(numbers.values())) for numbers in recent])  # [steps, numbers]
    table = all_reduce(table).cpu() / (dist.get_world_size() if dist.is_initialized() else 1)
    bad = (~table.isfinite().all(dim=1)).nonzero()
    if len(bad):
        values = ", ".join(f"{name} {value:g}" for name, value in zip(recent[0], table[bad[0, 0]].tolist()))
        raise FloatingPointError(f"the loss is not finite in step {done - len(recent) + int(bad[0]) + 1} ({values})")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError(f"a weight is not finite after step {done}")
    means = dict(zip(recent[0], table.mean(dim=0).tolist()))
    return means | {name: 100 * means[name] for name in ("train_clean", "train_robust")}


def print_table(args, data, out):
    """Clean and PGD accuracy on test images in float32, before and after: a quick look."""
    print(f"\nfirst {min(TABLE_IMAGES, len(data.test))} test images, averaged model       clean    PGD-{TABLE_STEPS} at {args.eps * 255:g}/255")
    cross_entropy = lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum")
    model = build_run(args, data.device, None)[1]
    model.amp = False
    for name in ("before training", "best.pt", "last.pt"):
        if name != "before training":
            model.load_state_dict(torch.load(out / name, weights_only=True)["model_state_dict"])
        clean, robust = evaluate(model, data.test, cross_entropy, TABLE_STEPS, args, limit=TABLE_IMAGES)
        print(f"  {name:42} {clean:6.2f} %  {robust:6.2f} %", flush=True)
    print("Judge the checkpoint with AutoAttack before quoting a number.")


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    rank, world, local = [int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    device = torch.device("cuda", local) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"--device cuda: {torch.cuda.device_count()} GPUs here, too few for process {local}")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = args.amp  # for convolutions torch allows it by default; for matrices it does not
    if world > 1:  # two hours, since process 0 may evaluate or download while the others wait
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo", timeout=timedelta(hours=2),
                                device_id=device if args.device == "cuda" else None)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, expected a folder")
    if local > 0:
        all_reduce(torch.zeros(()))  # the first process of each machine goes first: it may have to download
    teacher = load_teacher(args, device)
    data = Data(args, device, rank, world)
    if local == 0:
        all_reduce(torch.zeros(()))
    total_steps = args.max_steps or args.epochs * data.steps_per_epoch
    run = build_run(args, device, teacher)
    if rank == 0:
        print_plan(args, data, run[0], run[2], teacher, total_steps)
    if args.benchmark:
        time_step(args, data, lambda count: (data.batch(step) for step in range(count)), teacher, run)
    elif not args.dry_run:
        out.mkdir(parents=True, exist_ok=True)
        try:
            with locked(out) if rank == 0 else contextlib.nullcontext(), noted_signals() as signals:
                train(args, data, teacher, run, out, total_steps, signals)
        except FloatingPointError as error:
            good = [str(out / name) for name in ("last.pt", "best.pt") if (out / name).exists()]
            raise FloatingPointError(f"{error}; last good checkpoint: {good[0] if good else 'none was due yet'}") from None
        if rank == 0:
            print_table(args, data, out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ProcessLost as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as problem:
        print(f"error: {one_line(problem)} Use a smaller --batch-size, or more GPUs.", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        print(stopped.args[1], file=sys.stderr)
        sys.exit(128 + stopped.args[0])
    except KeyboardInterrupt:  # not while training: nothing that was not saved yet
        sys.exit(128 + signal.SIGINT)
