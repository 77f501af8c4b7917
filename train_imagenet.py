"""Adversarial training with diffusion representation alignment (DRA) on ImageNet, in one file.

Paper: "Expanding the Role of Diffusion Models for Robust Classifier Training", arXiv 2602.19931. A diffusion model helps
twice: its synthetic images are training data (DM-AT, arXiv 2302.04638), and its features are what the classifier's own
features of the attacked image have to resemble. At test time the classifier stands alone and costs nothing extra.

    L        = L_TRADES + lambda * L_DRA                              (eq. 4)
    L_TRADES = CE(f(x), y) + beta * KL(p(x) || p(x'))                 x' = the attacked image, |x' - x| <= eps
    L_DRA    = -cos(h(enc(x')), g(x_t, t, y))                         (eq. 3)
               enc: the classifier's penultimate features; h: a small MLP, trained along and then thrown away;
               g: features of a frozen diffusion model for the CLEAN image x noised to time t (dit_encoder.py)

This is train_cifar.py for large images: the same sections and names, so `diff train_cifar.py train_imagenet.py` shows what
differs. A backbone from timm with DINOv3's pretrained weights is fine-tuned as a whole; the teacher is LightningDiT. These
backbones have no batch norm, so accumulating gradients over pieces of a batch is exact.

Try it in under two minutes on a CPU, without data or downloads (a ViT, then a ConvNeXt with cached targets):

    python train_imagenet.py --smoke

The paper's ImageNet row "DM-AT+DRA, ViT-B/16" (paper: 76.87 % clean, 55.16 % AutoAttack) is the default, and its ConvNeXt-B
row (paper: 76.03 / 56.07) differs by the name of the backbone:

    torchrun --nproc-per-node 8 train_imagenet.py --data imagenet --synthetic lightningdit-4m --teacher DIT.pt VAE.pt STATS.pt
    torchrun --nproc-per-node 8 train_imagenet.py --arch convnext_base.dinov3_lvd1689m --out runs/convnext ...

A run writes last.pt, best.pt (best robust accuracy on held-out training images) and log.csv to --out. The same command
again continues it: every random draw is a function of (seed, step), so no generator's state has to be saved.
"""
import argparse
import contextlib
import copy
import csv
import fcntl
import hashlib
import json
import math
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from dit_encoder import DiTEncoder, LightningDiT, VAEEncoder, load_dit_encoder

# ---------------------------------------------------------------------------------------------------------------------
# Settings. "stated": in the paper. "inherited": from DM-AT, whose recipe the paper builds on. "chosen": by us.
# The flags in `parse_args` are what one changes to reproduce the paper; the constants here are the rest of the recipe.

CROP_AREA = (0.08, 1.0)  # share of the image that a random resized crop covers (chosen: torchvision's default)
LION_BETAS = (0.9, 0.99)  # Lion's own paper, arXiv 2302.06675
WARMUP = 0.025  # share of all steps with a rising learning rate, and before weight averaging starts (inherited)
RESIZE = 256 / 224  # shorter side over centre crop in evaluations, RobustBench's protocol
HOLDOUT = 1024  # training images, evenly spaced, kept out of training to pick best.pt (inherited); at most a tenth of the data
SELECTION_STEPS = 40  # steps of the margin-loss attack on them (inherited)
PROJECTOR_WIDTH = 2048  # hidden width of h; REPA's, arXiv 2410.06940 (the paper states three layers)
ZERO_CHANNELS, TEACHER_HEADS, TEACHER_SIZE = (1053, 259), 16, 256  # LightningDiT-XL/1's (the channels: stated)
CACHE_CHUNK, CACHE_BATCH = 256, 64  # images whose cached targets are written, and computed, together
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
    add("--smoke", action="store_true", help="tiny runs on drawn images with a random teacher: under two minutes on a CPU, needs no files")
    # Data
    add("--data", default="imagenet", help="folder with train/ and val/, in each a folder of images per class")
    add("--synthetic", metavar="DIR", help="synthetic images: a folder with class folders of the same names")
    add("--synthetic-fraction", type=share, help="their share of each batch, 0.7 if not given (inherited: DM-AT's for its smaller sets)")
    add("--image-size", type=number(int, at_least=32, below=4096), default=224, help="of the random resized crop, in pixels (RobustBench's standard, stated by reference)")
    add("--workers", type=number(int, at_least=0, below=1024), default=min(16, os.cpu_count() or 1), help="processes that read images, for each training process")
    # Model and optimisation
    add("--arch", default="vit_base_patch16_dinov3.lvd1689m", help="name of a timm model without batch norm, such as convnext_base.dinov3_lvd1689m")
    add("--no-pretrained", action="store_true", help="start from random weights (default: timm's pretrained ones)")
    add("--epochs", type=count, default=100, help="of ceil(real training images / batch size) steps, whatever the synthetic data (stated)")
    add("--max-steps", type=count, help="total number of steps, in place of --epochs")
    add("--batch-size", type=number(int, at_least=2, below=1e9), default=1024, help="over all processes (chosen: the paper's for its ViT on CIFAR)")
    add("--accumulate", type=count, default=1, help="compute each batch in this many pieces, for less memory; the result is the same up to rounding")
    add("--lr", type=positive, default=1e-5, help="peak learning rate of Lion (chosen)")
    add("--weight-decay", type=number(at_least=0, below=1e6), default=0.5, help="none on biases and normalisation layers (chosen: the paper's for its ViT on CIFAR)")
    add("--ema-decay", type=share, default=0.995, help="weight averaging tau (inherited)")
    add("--label-smoothing", type=share, default=0.1, help="in the cross-entropy (inherited)")
    # Attack
    add("--beta", type=number(at_least=0, below=1e6), default=5.0, help="weight of TRADES' KL term (chosen: DM-AT's)")
    add("--eps", type=share, default="4/255", help="largest change of a pixel in [0,1] (RobustBench's standard, stated by reference)")
    add("--step-size", type=positive, default="2/255", help="of the attack (chosen)")
    add("--attack-steps", type=number(int, at_least=0, below=1e9), default=3, help="PGD steps in training (stated); 0 trains on clean images, with --beta 0 by cross-entropy alone")
    # Diffusion representation alignment
    add("--dra-weight", type=number(at_least=0, below=1e6), default=1.0, help="lambda in eq. (4); 0 is plain adversarial training and needs no teacher (chosen)")
    add("--teacher", nargs=3, metavar=("DIT", "VAE", "STATS"), help="LightningDiT-XL/1, VA-VAE and latents_stats.pt (stated: the model that drew the synthetic images)")
    add("--teacher-t", type=number(above=0, below=1.001), default=0.9, help="time for the teacher: 1 is the clean image, 0 pure noise (chosen)")
    add("--teacher-layer", type=number(int, at_least=0, below=1e9), default=14, help="block whose input is the target (stated)")
    add("--teacher-unconditional", action="store_true", help="do not tell the teacher the label")
    add("--cache-targets", metavar="DIR", help="compute the targets once, of each image's centre crop and its mirror image, and keep them there; "
                                               "the default computes them in every step, of the augmented image (as in the paper)")
    # Running
    add("--out", default="runs/imagenet", help="folder for last.pt, best.pt and log.csv")
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
        parser.set_defaults(data=None, arch=None, no_pretrained=True, image_size=96, epochs=6, batch_size=32, lr=2e-3, weight_decay=0.01,
                            teacher_layer=1, workers=2, out="runs/imagenet-smoke", device="cpu")
    args = parser.parse_args(argv)

    # What depends on other flags.
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu")
    if args.synthetic_fraction and not args.synthetic and not (args.smoke and args.data is None):
        raise InputError("--synthetic-fraction: expected --synthetic DIR with it")
    if args.dra_weight == 0:  # plain adversarial training: what is said of the teacher does not matter
        args.teacher, args.cache_targets = None, None
    elif args.teacher is None and not args.smoke and not args.benchmark:
        raise InputError("--teacher: expected LightningDiT's, VA-VAE's and the latent statistics' file (the README says where they are), "
                         "or --dra-weight 0 for plain adversarial training")
    args.amp = args.device == "cuda" and not args.no_amp
    args.cached = args.cache_targets is not None
    return args


def _raise_input_error(message):
    raise InputError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Model. `model(images)` gives logits, `model.features(images)` penultimate features [B, D], and `model.head` leads from one
# to the other. Images are in [0, 1]: the normalisation is inside, as AutoAttack needs it.


class Classifier(nn.Module):
    """A timm backbone with its normalisation inside."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(backbone.pretrained_cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.pretrained_cfg["std"]).view(3, 1, 1), persistent=False)
        self.amp = False  # bfloat16 in the backbone

    def features(self, images):
        """images [B, 3, H, W] in [0, 1] -> penultimate features [B, D] float32: autocast ends here, logits stay float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            tokens = self.backbone.forward_features((images - self.mean) / self.std)  # ViT [B, T, D], ConvNeXt [B, D, h, w]
            return self.backbone.forward_head(tokens, pre_logits=True).float()  # pooled

    def head(self, features):
        return self.backbone.get_classifier()(features)

    def forward(self, images):
        """images [B, 3, H, W] in [0, 1] -> logits [B, num_classes]."""
        return self.head(self.features(images))


def build_model(arch, num_classes, pretrained, image_size=None):
    """A classifier for images [B, 3, H, W] in [0, 1]; what is not pretrained is drawn from torch's global generator.

    arch: a timm model's name, such as "vit_base_patch16_dinov3.lvd1689m"; pretrained: with timm's weights, downloaded on first
    use; image_size: only images of that size will come, which makes DINOv3's ViTs faster and changes no result. Pooled by the mean
    over patches or positions (chosen; said explicitly, since timm's default differs between models).
    Raises InputError for an unknown name, weights that cannot be had, or a model with batch norm, dropout or stochastic depth.
    """
    if ":" in arch:  # "hf-hub:..." would have timm ask any repository, named by a checkpoint even
        raise InputError(f"--arch {arch}: expected the name of a model of timm's own")
    size = {}
    if image_size and image_size % 16 == 0 and arch.startswith("vit_") and "_patch16_dinov3" in arch:
        # Otherwise timm computes the rotary embedding's grid on the CPU in each forward, and a GPU waits for it. (A size that 16 does not
        # divide is left to the first forward, which refuses it.)
        size = {"img_size": image_size, "dynamic_img_size": False}
    try:
        backbone = timm.create_model(arch, pretrained=pretrained, num_classes=num_classes, global_pool="avg", **size)
    except Exception as error:  # timm and its hub raise errors of many kinds
        raise InputError(f"--arch {arch}: timm cannot build it{' with its pretrained weights' * pretrained} ({one_line(error)})") from None
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
        raise InputError(f"--arch {arch}: has batch norm, expected a model without, such as a ViT or ConvNeXt: here a batch may come in pieces, --accumulate")
    if any(getattr(module, name, 0) for module in backbone.modules() for name in ("drop_prob", "p") if isinstance(module, (nn.Dropout, timm.layers.DropPath))):
        raise InputError(f"--arch {arch}: has dropout or stochastic depth, expected a model without: here every draw depends on seed and step alone")
    return Classifier(backbone)


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
    """While attacking: no weight gradient is computed (or compiled)."""
    weights = [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def kl_divergence(clean_logits, adv_logits, reduction):
    """KL(p(x) || p(x')) from logits [B, classes]. Log-probabilities on both sides: with plain ones the gradient into the
    clean logits is NaN as soon as one of them underflows."""
    clean_log_p, adv_log_p = clean_logits.float().log_softmax(dim=1), adv_logits.float().log_softmax(dim=1)
    return F.kl_div(adv_log_p, clean_log_p, reduction=reduction, log_target=True)


def trades_attack(model, images, start, eps, step_size, steps, clean_logits=None):
    """The adversary of TRADES as in DM-AT: x' within eps of x that maximises KL(p(x) || p(x')), p(x) held fixed.

    images [B, 3, H, W] in [0, 1]; start: the first x', same shape, U(-eps, eps) around images and clamped to [0, 1].
    clean_logits [B, classes]: the model's on `images`, where the training forward has just computed them; else they are computed here.
    Returns x' [B, 3, H, W] in [0, 1], detached.
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
    """Lion over all parameters of `modules`, without weight decay on vectors: biases, normalisation layers, layer scales (chosen)."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return Lion(groups, lr=args.lr, weight_decay=args.weight_decay)


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
    """averaged <- decay * averaged + (1 - decay) * model; buffers are copied, never shared."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
    for mine, live in zip(averaged.buffers(), model.buffers()):
        mine.copy_(live)


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
    """Mean gradient over all processes. By hand rather than by DistributedDataParallel: a step costs 12 forward passes, so there is
    little to gain from overlapping, and the accumulated pieces of a batch need no special care."""
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
    """g(x_t, t, y) from the clean images: [B, width] float32."""
    return teacher(batch.images, None if args.teacher_unconditional else batch.labels, args.teacher_t, batch.teacher_noise)


def train_step(model, averaged, projectors, teacher, optimizer, batch, decay, args):
    """One optimisation step, in the paper's order. Deterministic: all randomness is in `batch` (see `Data.batch`).

    batch.images [B, 3, H, W] in [0, 1], batch.labels [B], batch.start like images, and for alignment either batch.target
    [B, width] from the cache or batch.teacher_noise [B, *latent_shape]; decay: see `averaging_decay`; args: eps, step_size,
    attack_steps, beta, label_smoothing, dra_weight, teacher_t, teacher_unconditional, accumulate. projectors: one, or none
    without alignment. Returns detached scalars by name, left on the device.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    numbers = []
    for part in split_batch(batch, args.accumulate):  # exact up to rounding: nothing in these models mixes images
        images, labels = part.images, part.labels

        # The clean forward comes first and serves twice: its logits are p(x) in the attack, held fixed there, and p(x) in L_TRADES.
        clean_logits = model(images)

        # The attack, by the PGD of eq. (2), on TRADES' KL where eq. (1) has the cross-entropy: x' starts at U(-eps, eps) around x.
        attacking = args.eps > 0 and args.attack_steps > 0  # else x' = x, plain training
        adv = trades_attack(model, images, part.start, args.eps, args.step_size, args.attack_steps, clean_logits) if attacking else images

        # L_TRADES.
        adv_features = model.features(adv)  # enc(x'), [B, D]
        adv_logits = model.head(adv_features)
        trades = trades_loss(clean_logits, adv_logits, labels, args.beta, args.label_smoothing)

        # L_DRA, eq. (3): the projected features of x' against the teacher's of the clean x.
        alignment = trades.new_zeros(())
        for projector in projectors:
            target = ask_teacher(teacher, part, args) if part.target is None else part.target  # [B, width]
            alignment = dra_loss(projector(adv_features), target)

        loss = trades + args.dra_weight * alignment  # eq. (4)
        (loss / args.accumulate).backward()
        with torch.no_grad():
            clean, robust = [(logits.argmax(dim=1) == labels).float().mean() for logits in (clean_logits, adv_logits)]
        numbers.append(torch.stack([loss.detach(), trades.detach(), -alignment.detach(), clean, robust]))
    average_gradients([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    update_average(averaged, model, decay)
    names = ("loss", "trades", "cosine", "train_clean", "train_robust")
    return {name: value for name, value in zip(names, torch.stack(numbers).mean(dim=0)) if name != "cosine" or len(projectors)}


def split_batch(batch, pieces):
    """A batch's tensors, cut into that many pieces of equal size; what is None stays so."""
    columns = {name: [None] * pieces if value is None else value.chunk(pieces) for name, value in vars(batch).items()}
    return [SimpleNamespace(**{name: column[i] for name, column in columns.items()}) for i in range(pieces)]


# ---------------------------------------------------------------------------------------------------------------------
# Data: disk -> one augmented batch on the device. Every draw is a function of (seed, step). What is drawn on the device is drawn
# for the whole batch, and each process takes its share.


def random_seed(seed, position, purpose):
    """A number that depends on (seed, position, purpose) alone. position: an int or several; purpose: a short text."""
    mixed = np.random.SeedSequence([seed, *np.atleast_1d(position).tolist(), *purpose.encode()]).generate_state(1, np.uint64)[0]
    return int(mixed >> np.uint64(1))


def generator(seed, position, purpose, device="cpu"):
    """A random generator that depends on (seed, position, purpose) alone. position: a step, pass or image number."""
    return torch.Generator(device).manual_seed(random_seed(seed, position, purpose))


class Folder:
    """The images under class folders, in sorted order. Names and labels are two compact arrays: Python objects, millions of them,
    would be copied bit by bit into each process that reads images."""

    def __init__(self, path):
        path = os.path.expanduser(path)
        try:
            found = ImageFolder(path)
        except OSError as error:
            raise InputError(f"{path}: expected a folder with a folder of images for each class ({one_line(error)})") from None
        self.path, self.classes = path, found.classes
        self.names = np.array([os.fsencode(name[len(os.path.join(path, "")):]) for name, _ in found.samples])  # relative
        self.labels = np.array(found.targets)

    def __len__(self):
        return len(self.labels)

    def read(self, index, transform):
        """transform(image number `index` as a PIL image in RGB). Raises InputError, naming the file, where it is no image."""
        path = os.path.join(self.path, os.fsdecode(self.names[index]))
        try:
            with Image.open(path) as image:
                return transform(image.convert("RGB"))
        except Exception as error:  # a damaged file can fail in any way
            raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from None

    def digest(self, sizes=False):
        """A fingerprint of the class and file names, with `sizes` also of the files' sizes."""
        digest = hashlib.sha256("/".join(self.classes).encode(errors="surrogateescape"))
        digest.update(b"/".join(self.names.tolist()))
        if sizes:
            digest.update(np.array([os.path.getsize(os.path.join(os.fsencode(self.path), name)) for name in self.names.tolist()]).tobytes())
        return digest.hexdigest()[:16]


def open_folder(path, classes):
    """A Folder with exactly these classes. Raises InputError where it has others."""
    folder = Folder(path)
    if folder.classes != classes:
        different = sorted(set(folder.classes) ^ set(classes))
        raise InputError(f"{path}: has {len(folder.classes)} class folders, expected the {len(classes)} of train/ (differs in {different[0]})")
    return folder


def locate(folders, index):
    """Image number `index`, counted through real and then synthetic images -> (its Folder, its number there)."""
    return (folders[0], index) if index < len(folders[0]) else (folders[1], index - len(folders[0]))


def to_pixels(image):
    """PIL image -> uint8 [3, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Augmented(torch.utils.data.Dataset):
    """Training images by (step, slot in the batch, number): a random resized crop and flip that depend on (seed, step, slot)."""

    def __init__(self, folders, args):
        self.folders, self.seed, self.cache, self.targets = folders, args.seed, args.cache_targets, None
        self.crop = transforms.RandomResizedCrop(args.image_size, scale=CROP_AREA)

    def __getitem__(self, key):
        """-> image uint8 [3, H, W], label, cached target float16 [width] (empty without a cache)."""
        step, slot, index = key
        folder, number = locate(self.folders, index)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            torch.manual_seed(random_seed(self.seed, (step, slot), "augment"))
            pixels, flip = to_pixels(folder.read(number, self.crop)), int(torch.rand(()) < 0.5)
        if self.cache and self.targets is None:  # opened here, in the process that reads
            self.targets = np.load(Path(self.cache, "targets.npy"), mmap_mode="r")
        target = torch.zeros(0) if self.targets is None else torch.from_numpy(self.targets[index, flip].copy())
        return pixels.flip(2) if flip else pixels, int(folder.labels[number]), target


def answer_signals(_worker):
    """In a process that reads images: Ctrl-C and SIGTERM, which often go to a whole group of processes (a terminal's, torchrun's,
    Slurm's), are the training process's to answer. Only its own SIGTERM ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)
    threading.Thread(target=wait, daemon=True).start()


class Centred(torch.utils.data.Dataset):
    """Images by number, resized and cropped at the centre: for evaluations and cached targets."""

    def __init__(self, folders, numbers, size, resize):
        self.folders, self.numbers = folders, numbers
        self.crop = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        """-> image uint8 [3, size, size], label, number."""
        index = int(self.numbers[i])
        folder, number = locate(self.folders, index)
        return to_pixels(folder.read(number, self.crop)), int(folder.labels[number]), index


def draw_smoke_folders(path, seed, train_count=40):
    """An ImageNet in small, train/, val/ and synthetic/ with JPEG files, that a tiny network learns in a minute: horizontal and
    vertical waves, each in five colours, with random phase, frequency and contrast, and noise."""
    for split, count in (("train", train_count), ("val", 6), ("synthetic", 20)):
        for label in range(10):
            folder = path / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([seed, label, *split.encode()])
            for i in range(count):
                wave = np.sin(2 * np.pi * (rng.uniform(3, 6) * np.arange(176) / 176 + rng.uniform()))
                wave = wave[:, None, None] if label < 5 else wave[None, :, None]
                colour = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1))[label % 5]
                image = 0.5 + rng.uniform(0.25, 0.45) * wave * colour + rng.normal(0, 0.05, (176, 176, 3))
                Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).save(folder / f"{i:03}.jpg")


class Data:
    """Real and synthetic training images, held-out and validation images, and the batches drawn from them."""

    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        real = Folder(os.path.join(args.data, "train"))
        self.classes = real.classes
        validation = open_folder(os.path.join(args.data, "val"), self.classes)
        self.folders = [real] + [open_folder(path, self.classes) for path in [args.synthetic] if path]  # images are numbered through both
        held = np.unique(np.linspace(0, len(real) - 1, min(HOLDOUT, len(real) // 10)).astype(int))
        if not len(held):
            raise InputError(f"--data {args.data}: has {len(real)} training images, expected at least 10")
        crop = args.image_size, round(args.image_size * RESIZE)
        self.holdout = Centred(self.folders, held, *crop)
        self.test = Centred([validation], np.unique(np.linspace(0, len(validation) - 1, TABLE_IMAGES).astype(int)), *crop)
        self.real = torch.from_numpy(np.setdiff1d(np.arange(len(real)), held))  # numbers of those to train on
        self.n_real_images, self.n_synthetic_images = len(self.real), sum(map(len, self.folders[1:]))
        self.steps_per_epoch = math.ceil(len(real) / args.batch_size)  # DM-AT: whatever the synthetic data
        args.classes = self.classes  # their names, in the order of the labels
        args.images = " ".join(folder.digest() for folder in self.folders)  # a continued run has to find the same

        if args.synthetic and args.synthetic_fraction is None:
            args.synthetic_fraction = 0.7
        self.n_real = args.batch_size - int(args.batch_size * (args.synthetic_fraction or 0))  # per batch; the others are synthetic
        if not 1 <= self.n_real <= self.n_real_images:
            raise InputError(f"--batch-size {args.batch_size}: has {self.n_real} real images, expected 1 to {self.n_real_images}, all there are")
        if args.batch_size % (world * args.accumulate):
            raise InputError(f"--batch-size {args.batch_size}: expected a multiple of {world * args.accumulate} ({world} processes, --accumulate {args.accumulate})")
        self.permutation = (None, None)  # number of the current pass over the real images, and its order

    def draw_indices(self, step):
        """Which images the step's global batch holds: int64 [batch_size], numbered through `folders`.

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
            index.append(self.real[order[offset:offset + end - position]])
            position += len(index[-1])
        if self.n_synthetic_images:
            shape = (self.args.batch_size - self.n_real,)
            index.append(len(self.folders[0]) + torch.randint(self.n_synthetic_images, shape, generator=generator(seed, step, "synthetic")))
        return torch.cat(index)

    def load(self, first_step, total_steps):
        """Iterate over what `Augmented` gives for this process's share of each step's batch, every `world`-th image of it."""
        shares = ([(step, slot, index) for slot, index in enumerate(self.draw_indices(step).tolist())][self.rank::self.world]
                  for step in range(first_step, total_steps))
        return iter(torch.utils.data.DataLoader(Augmented(self.folders, self.args), batch_sampler=shares, num_workers=self.args.workers,
                                                pin_memory=self.device.type == "cuda", worker_init_fn=answer_signals))

    def batch(self, step, loaded, latent_shape=None):
        """All that `train_step` needs for one step. loaded: its images, labels and cached targets as from `load`.

        Returns images [B, 3, H, W] in [0, 1], labels [B], start: the attack's first point, and target [B, width] or, where
        latent_shape says that there is a teacher to ask, teacher_noise [B, *latent_shape]; None for what is not needed.
        """
        args, device, mine = self.args, self.device, slice(self.rank, None, self.world)
        images, labels, target = [tensor.to(device, non_blocking=True) for tensor in loaded]
        images = images.float() / 255  # [B, 3, H, W] in [0, 1]
        random = generator(args.seed, step, "batch", device)  # one stream, read in this order and for the whole batch
        start = images + args.eps * (2 * torch.rand((args.batch_size, *images.shape[1:]), generator=random, device=device)[mine] - 1)
        noise = torch.randn((args.batch_size, *latent_shape), generator=random, device=device)[mine] if latent_shape else None
        return SimpleNamespace(images=images, labels=labels, start=start.clamp(0, 1), target=target.float() if args.cache_targets else None, teacher_noise=noise)


def cache_targets(args, data, teacher, signals=()):
    """Compute the teacher's features once: DIR/targets.npy, float16 [images, 2, width], of each centre crop and its mirror image.

    Noise is fixed per image and view. Chunks that are done are marked in done.npy, so a stopped run goes on where it was, with any number
    of processes. Raises InputError where DIR was made from other images (by name and size), or with another teacher or settings,
    or is damaged; Stopped when a signal has come.
    """
    path, count = Path(args.cache_targets), sum(map(len, data.folders))
    if data.rank == 0:
        weights = hashlib.sha256()
        for tensor in teacher.state_dict().values():
            weights.update(tensor.cpu().contiguous().numpy())
        prepare_cache(path, {"images": " ".join(folder.digest(sizes=True) for folder in data.folders), "count": count, "width": teacher.width,
                             "teacher": weights.hexdigest()[:16], "layer": args.teacher_layer, "t": args.teacher_t, "seed": args.seed,
                             "labels": not args.teacher_unconditional, "bfloat16": args.amp, "chunk": CACHE_CHUNK})
    all_reduce(torch.zeros(()))
    done = np.load(path / "done.npy")
    all_reduce(torch.zeros(()))  # all have seen the same state before anyone adds to it
    todo = np.flatnonzero(~done)[data.rank::data.world]
    chunks = [range(chunk * CACHE_CHUNK, min(count, (chunk + 1) * CACHE_CHUNK)) for chunk in todo]
    crops = Centred(data.folders, np.arange(count), teacher.image_size, teacher.image_size)
    loader = torch.utils.data.DataLoader(crops, batch_sampler=chunks, num_workers=args.workers, pin_memory=data.device.type == "cuda", worker_init_fn=answer_signals)
    for chunk, (images, labels, numbers) in zip(todo, tqdm(loader, desc="caching targets", unit=f" x {CACHE_CHUNK} images", disable=None if data.rank == 0 else True)):
        noise = torch.stack([torch.randn((2, *teacher.latent_shape), generator=generator(args.seed, int(i), "cache")) for i in numbers])
        targets = []
        for piece in zip(*(tensor.split(CACHE_BATCH) for tensor in (images, labels, noise))):
            some_images, some_labels, some_noise = [tensor.to(data.device) for tensor in piece]
            some_images, given = some_images.float() / 255, None if args.teacher_unconditional else some_labels
            with torch.no_grad():
                views = [teacher(view, given, args.teacher_t, some_noise[:, i]) for i, view in enumerate((some_images, some_images.flip(3)))]
            targets.append(torch.stack(views, dim=1).half().cpu())
        targets = torch.cat(targets)  # [chunk, 2, width]
        if not targets.isfinite().all():
            raise InputError(f"--cache-targets: the teacher's features of images {int(numbers[0])} to {int(numbers[-1])} are not finite in float16")
        write_rows(path / "targets.npy", int(numbers[0]), targets.numpy())
        write_rows(path / "done.npy", int(chunk), np.array([True]))
        if signals:
            break
    stopping = int(all_reduce(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX))
    if stopping:
        raise Stopped(stopping, f"stopped by {signal.Signals(stopping).name} while caching targets; the same command continues from there")


def prepare_cache(path, made_from):
    """Make an empty cache in the folder `path`, or see that the one there was made from the same."""
    description = path / "targets.json"
    if description.exists():
        try:
            there = json.loads(description.read_text())
            difference = [f"{name} {there.get(name)} there, {value} now" for name, value in made_from.items() if there.get(name) != value]
        except (ValueError, AttributeError):
            difference = ["its targets.json is damaged"]
        if difference:
            raise InputError(f"--cache-targets {path}: was made from something else ({'; '.join(difference)}); choose another folder")
    elif path.exists() and (not path.is_dir() or any(path.glob("*.npy"))):
        raise InputError(f"--cache-targets {path}: holds something else, expected a folder that is new, empty or a cache")
    path.mkdir(parents=True, exist_ok=True)
    if not description.exists():
        temporary = description.with_name("targets.json.tmp")
        temporary.write_text(json.dumps(made_from, indent=1))
        os.replace(temporary, description)
    if not (path / "done.npy").exists():  # made last: without it nothing has been computed yet
        np.lib.format.open_memmap(path / "targets.npy", "w+", np.float16, (made_from["count"], 2, made_from["width"]))
        np.save(path / "done.tmp.npy", np.zeros(math.ceil(made_from["count"] / CACHE_CHUNK), dtype=bool))
        os.replace(path / "done.tmp.npy", path / "done.npy")
    try:
        shapes = [np.load(path / name, mmap_mode="r").shape for name in ("targets.npy", "done.npy")]
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--cache-targets {path}: is damaged ({one_line(error)}); remove the folder to compute it again") from None
    if shapes != [(made_from["count"], 2, made_from["width"]), (math.ceil(made_from["count"] / CACHE_CHUNK),)]:
        raise InputError(f"--cache-targets {path}: is damaged (arrays of {shapes}); remove the folder to compute it again")


def write_rows(path, first, rows):
    """Write rows into an .npy file from row `first` on, through to the disk. Not through the memory map: with a full disk that
    would end the process without a word."""
    try:
        array = np.load(path, mmap_mode="r")
        with open(path, "r+b") as file:
            file.seek(array.offset + first * array[:1].nbytes)
            file.write(np.ascontiguousarray(rows, dtype=array.dtype))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({one_line(error)}); what is done stays, and the same command goes on from there") from None


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, checkpoints and log


def margin_loss(logits, labels):
    """Best wrong logit minus the right one (Carlini & Wagner 2017), at most 0, summed over the batch: logits [B, classes], labels [B].
    Hinged as in DM-AT: an image that is already misclassified adds no gradient and stays where it is."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return (wrong - right).clamp(max=0).sum()


def evaluate(model, source, loss, steps, args):
    """Clean and robust accuracy in percent, the latter under `steps` PGD steps on `loss`, from one random start (by seed).

    model: in evaluation mode, frozen. source: a `Centred`.
    """
    clean, robust, device = 0, 0, next(model.parameters()).device
    for number, loaded in enumerate(torch.utils.data.DataLoader(source, batch_size=64, num_workers=args.workers, worker_init_fn=answer_signals)):
        images, labels = loaded[0].to(device).float() / 255, loaded[1].to(device)  # [64, 3, H, W] in [0, 1]
        random = generator(args.seed, number, "evaluate", images.device)
        start = images + args.eps * (2 * torch.rand(images.shape, generator=random, device=images.device) - 1)
        adv = pgd(lambda x: loss(model(x), labels), images, start.clamp(0, 1), args.eps, args.step_size, steps)
        with torch.no_grad():
            clean += (model(images).argmax(dim=1) == labels).sum().item()
            robust += (model(adv).argmax(dim=1) == labels).sum().item()
    return 100 * clean / len(source), 100 * robust / len(source)


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
    weights = averaged.state_dict()
    return {"model_state_dict": weights, "state_dict": weights, "unaveraged_model_state_dict": model.state_dict(),
            "projector": projectors.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": best,
            "args": vars(args), "arch": args.arch, "dataset": "imagenet", "num_classes": averaged.backbone.num_classes, "classes": args.classes,
            "mean": averaged.mean.flatten().tolist(), "std": averaged.std.flatten().tolist()}


# Settings that may differ when a run continues: they say where it runs, not what it computes.
MAY_DIFFER = {"data", "classes", "synthetic", "cache_targets", "workers", "accumulate", "out", "device", "no_amp", "amp", "no_compile", "save_every", "dry_run", "benchmark", "peak_tflops"}


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


LOG_COLUMNS = ("step", "epoch", "lr", "loss", "trades", "cosine", "train_clean", "train_robust", "images_per_s", "waiting", "holdout_clean", "holdout_robust")


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
    """Append row {column: number} to log.csv. Accuracies in percent; images_per_s over all processes;
    waiting: percent of the time in which the device had, at most, nothing to do but wait for images."""
    try:
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n").writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({one_line(error)}); the last checkpoint is untouched") from None


def show(row, minutes_left):
    """Print a row of the log. A reader who went away (Ctrl-C also ends the `tee` behind a pipe) is no reason to stop."""
    text = "step {step:>6}  epoch {epoch:7.2f}  loss {loss:.3f}" + "  cosine {cosine:.3f}" * ("cosine" in row)
    text += "  batch clean {train_clean:.1f} % robust {train_robust:.1f} %  {images_per_s:.1f} images/s, {waiting:.0f} % waiting for data"
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


def load_teacher(args, data):
    """The frozen diffusion encoder, or None without alignment. Raises InputError where it does not fit the data."""
    if args.dra_weight == 0:
        return None
    images = torch.stack([data.holdout[i][0] for i in range(min(4, len(data.holdout)))]).float() / 255
    try:
        if args.teacher is None:  # smoke, benchmark: a random network's features are a poor target, but they exercise the same path
            torch.manual_seed(args.seed)
            if args.benchmark and not args.smoke:  # the released sizes
                vae = VAEEncoder(128, [(128, 2, False), (128, 2, False), (256, 2, False), (256, 2, False), (512, 2, True)], latent_channels=32)
                dit = LightningDiT(1152, TEACHER_HEADS, 3072, 32, 1, 256, len(data.classes) + 1, args.teacher_layer)
            else:
                vae, dit = VAEEncoder(32, [(32, 1, False), (32, 1, True)], latent_channels=4), LightningDiT(64, 2, 128, 4, 2, 64, len(data.classes) + 1, args.teacher_layer)
            teacher = DiTEncoder(vae, dit, image_size=TEACHER_SIZE if args.benchmark and not args.smoke else 32)
            teacher.checked = True
            latents = teacher.latents(images).detach()
            teacher.mean, teacher.std, teacher.checked = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True), False
        else:
            teacher = load_dit_encoder(*args.teacher, args.teacher_layer, ZERO_CHANNELS, TEACHER_HEADS, TEACHER_SIZE)
        teacher(images, None, args.teacher_t)  # looks whether images, autoencoder and statistics belong together
    except (ValueError, OSError) as error:
        raise InputError(f"--teacher {error}") from None
    if teacher.num_classes != len(data.classes) and not args.teacher_unconditional:
        raise InputError(f"--teacher {args.teacher[0]}: knows {teacher.num_classes} classes, expected {len(data.classes)} (--data {args.data}); "
                         "--teacher-unconditional drops the labels")
    teacher.amp = args.amp
    return teacher.to(data.device, memory_format=torch.channels_last)


def print_plan(args, data, model, projectors, teacher, total_steps):
    """What is about to run, in a few lines."""
    count = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters"
    start = "random weights" if args.no_pretrained or args.benchmark else "pretrained"
    plan = [("model", f"{args.arch}, {start}, {len(data.classes)} classes, {count(model)}; {args.image_size} px; bfloat16 {'on' if args.amp else 'off'}"),
            ("data", f"{args.data}: {data.n_real_images:,} real images to train on, {len(data.holdout):,} held out; {args.workers} workers per process")]
    if args.synthetic:
        plan += [("synthetic", f"{args.synthetic}: {data.n_synthetic_images:,} images")]
    plan += [("batch", f"{args.batch_size} = {data.n_real} real + {args.batch_size - data.n_real} synthetic, on {data.world} process(es)"
                       f" in {args.accumulate} piece(s)"),
             ("steps", f"{total_steps:,} = {total_steps / data.steps_per_epoch:g} epochs of {data.steps_per_epoch:,} steps "
                       f"({data.steps_per_epoch * args.batch_size:,} images)"),
             ("attack", f"TRADES, beta {args.beta:g}, eps {args.eps * 255:g}/255, {args.attack_steps} steps of {args.step_size * 255:g}/255"),
             ("optimizer", f"lion, learning rate {args.lr:g}, weight decay {args.weight_decay:g}, averaging {args.ema_decay:g}")]
    if teacher is None:
        plan += [("alignment", "none: plain adversarial training")]
    else:
        where = f"cached in {args.cache_targets}" if args.cache_targets else "computed in each step"
        plan += [("alignment", f"lambda {args.dra_weight:g}; projector {count(projectors)}"),
                 ("teacher", f"{args.teacher[0] if args.teacher else 'random'}: block {teacher.layer}, {teacher.width} wide, {count(teacher)}, "
                             f"t {args.teacher_t:g}, {'without' if args.teacher_unconditional else 'with'} labels, {where}")]
    for name, text in plan:
        print(f"{name:10} {text}", flush=True)


def build_run(args, data, teacher, pretrained=False):
    """Freshly initialised model, its average, projectors and optimizer: a function of the settings and the seed alone."""
    torch.manual_seed(args.seed)
    model = build_model(args.arch, len(data.classes), pretrained, args.image_size)
    try:
        with torch.no_grad():
            features = model.eval().features(torch.zeros(1, 3, args.image_size, args.image_size))
            model.head(features)
        _, feature_width = features.shape
    except Exception as error:  # timm's models fail in many ways
        raise InputError(f"--image-size {args.image_size}: {args.arch} does not take it ({one_line(error)})") from None
    projectors = nn.ModuleList([build_projector(feature_width, teacher.width)] if teacher else [])
    model.to(data.device, memory_format=torch.channels_last)  # the faster layout for convolutions, on GPUs and CPUs
    projectors.to(data.device)
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
    if args.cache_targets:
        with contextlib.ExitStack() as stack:
            if main_process:
                Path(args.cache_targets).mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(Path(args.cache_targets), "cache.lock"))
            cache_targets(args, data, teacher, signals)
        teacher.cpu()  # it has done its part
    if main_process:
        print(f"continuing {last_checkpoint} after step {first_step} of {total_steps}" if last_checkpoint else "starting", flush=True)
        start_log(out / "log.csv", first_step)

    warmup = int(WARMUP * total_steps)
    eval_every, save_every = [max(1, round(epochs * data.steps_per_epoch)) for epochs in (args.eval_every, args.save_every)]
    log_every, recent, since, started, waiting = min(LOG_EVERY, data.steps_per_epoch), [], time.time(), time.time(), 0.0
    loader = data.load(first_step, total_steps)
    compile_parts(args, model, None if args.cached else teacher)
    compile_parts(args, averaged, None)
    for step in range(first_step, total_steps):
        lr, _ = one_cycle(step, total_steps, args.lr)  # by step (chosen); Lion's betas stay fixed
        for group in optimizer.param_groups:
            group["lr"] = lr
        decay = averaging_decay(step, warmup, args.ema_decay)
        asked = time.time()
        loaded = next(loader)
        if args.device == "cpu" or torch.cuda.current_stream().query():  # else the GPU still has work from the last step
            waiting += time.time() - asked
        batch = data.batch(step, loaded, teacher.latent_shape if teacher and not args.cache_targets else None)
        recent.append(train_step(model, averaged, projectors, teacher, optimizer, batch, decay, args))

        # Bookkeeping. The numbers in `recent` stay on the device until a line is due: reading them would wait for the GPU.
        done, last = step + 1, step + 1 == total_steps
        stopping = int(all_reduce(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX))  # one process that has to stop stops all
        evaluating, saving = done % eval_every == 0 or last, done % save_every == 0 or last or stopping
        if not (done % log_every == 0 or evaluating or saving):
            continue
        row = {"step": done, "epoch": done / data.steps_per_epoch, "lr": lr} | summarise(recent, done, model)
        row["images_per_s"] = args.batch_size * len(recent) / (time.time() - since)
        row["waiting"] = 100 * waiting / (time.time() - since)
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
        recent, since, waiting = [], time.time(), 0.0


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
    pieces = split_batch(batch, args.accumulate)
    asking = batch.teacher_noise is not None  # a teacher at work, whose features are not cached
    clean_logits = [model(part.images).detach() for part in pieces]
    attack = lambda _: [trades_attack(model, part.images, part.start, args.eps, args.step_size, args.attack_steps, logits) for part, logits in zip(pieces, clean_logits)]
    teach = lambda _: [ask_teacher(teacher, part, args) for part in pieces if asking]
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        [model(part.images) for part in pieces]
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
    """Clean and PGD accuracy on validation images in float32, before and after: a quick look."""
    print(f"\n{len(data.test)} validation images, averaged model                clean    PGD-{TABLE_STEPS} at {args.eps * 255:g}/255")
    cross_entropy = lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum")
    model = build_run(args, data, None)[1]
    model.amp = False
    for name in ["before training"] * args.no_pretrained + ["best.pt", "last.pt"]:
        if name != "before training":
            model.load_state_dict(torch.load(out / name, weights_only=True)["model_state_dict"])
        clean, robust = evaluate(model, data.test, cross_entropy, TABLE_STEPS, args)
        print(f"  {name:42} {clean:6.2f} %  {robust:6.2f} %", flush=True)
    print("Judge the checkpoint with AutoAttack before quoting a number.")


def run_once(args, device, rank, world, local):
    """One training run: data, teacher, model, then training and the closing table."""
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, expected a folder")
    if local > 0:
        all_reduce(torch.zeros(()))  # the first process of each machine goes first: it may have to download
    data = Data(args, device, rank, world)
    teacher = load_teacher(args, data)
    begun = any((out / name).exists() for name in ("last.pt", "best.pt"))  # then the checkpoint has all weights
    run = build_run(args, data, teacher, pretrained=not (args.no_pretrained or args.dry_run or args.benchmark or begun))
    if local == 0:
        all_reduce(torch.zeros(()))
    total_steps = args.max_steps or args.epochs * data.steps_per_epoch
    if rank == 0:
        print_plan(args, data, run[0], run[2], teacher, total_steps)
    if args.benchmark:
        latent_shape = teacher.latent_shape if teacher and not args.cached else None
        if args.cached:
            cache_targets(args, data, teacher)
        batches = lambda count: (data.batch(step, loaded, latent_shape) for step, loaded in enumerate(data.load(0, count)))
        time_step(args, data, batches, teacher, run)
    if args.dry_run or args.benchmark:
        return
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out) if rank == 0 else contextlib.nullcontext(), noted_signals() as signals:
            train(args, data, teacher, run, out, total_steps, signals)
    except FloatingPointError as error:
        good = [str(out / name) for name in ("last.pt", "best.pt") if (out / name).exists()]
        raise FloatingPointError(f"{error}; last good checkpoint: {good[0] if good else 'none was due yet'}") from None
    if rank == 0:
        print_table(args, data, out)


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
    if args.smoke and args.data is None:
        args.data, args.synthetic = os.path.join(args.out, "data"), args.synthetic or os.path.join(args.out, "data", "synthetic")
        if local == 0:
            draw_smoke_folders(Path(args.data), args.seed)
    if args.benchmark and not Path(args.data).exists():  # drawn images, which are read from JPEG files like any others
        args.data, args.synthetic = os.path.join(tempfile.gettempdir(), f"{Path(__file__).stem}-{os.getuid()}"), None
        if local == 0:
            draw_smoke_folders(Path(args.data), args.seed, 120)
    if args.arch:
        run_once(args, device, rank, world, local)
    else:  # the smoke run: both kinds of backbone, and targets computed in each step as well as cached
        for arch, cache in (("test_vit", args.cache_targets), ("test_convnext", args.cache_targets or args.dra_weight and os.path.join(args.out, "targets") or None)):
            changes = {"arch": arch, "cache_targets": cache, "cached": cache is not None, "out": os.path.join(args.out, arch)}
            run_once(argparse.Namespace(**vars(args) | changes), device, rank, world, local)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ProcessLost as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
    except (InputError, OSError) as problem:
        # A process that reads images hands an error on with its own traceback in front; the line that says what is wrong is the last.
        print(f"error: {str(problem).strip().splitlines()[-1].split('InputError: ')[-1]}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as problem:
        print(f"error: {one_line(problem)} Use a larger --accumulate, or more GPUs.", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        print(stopped.args[1], file=sys.stderr)
        sys.exit(128 + stopped.args[0])
    except KeyboardInterrupt:  # not while training: nothing that was not saved yet
        sys.exit(128 + signal.SIGINT)
