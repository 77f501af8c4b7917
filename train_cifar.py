"""Adversarial training with diffusion representation alignment (DRA) on CIFAR-10 and CIFAR-100, in one file.

Paper: "Expanding the Role of Diffusion Models for Robust Classifier Training", arXiv 2602.19931.

An adversary may change every pixel of an image by at most eps, and a robust classifier should still be right.
Adversarial training attacks each training image first and then learns from the attacked one. Here a diffusion
model helps twice: the images that it generates are more training data (the recipe DM-AT, arXiv 2302.04638),
and what it has learned about images, its internal features, is what the classifier's own features of the
attacked image have to resemble. At test time the classifier stands alone and costs nothing extra.

    min E[ max CE(f(x'), y) ]   over max |x' - x| <= eps        (eq. 1) adversarial training
    x' <- P(x' + step * sign(gradient of the loss at x'))       (eq. 2) PGD, the attack; P: into the eps-ball

    L        = L_TRADES + lambda * L_DRA                        (eq. 4)
    L_TRADES = CE(f(x), y) + beta * KL(p(x) || p(x'))           TRADES, arXiv 1901.08573, in place of eq. 1
    L_DRA    = -cos(h(enc(x')), g(x_t, t, y))                   (eq. 3)
               f:   the classifier's logits, head(enc(x)); enc: its penultimate features; p = softmax(f)
               h:   a small MLP, the projector; trained along and then thrown away
               g:   features of a frozen diffusion model (EDM, arXiv 2206.00364, see edm_encoder.py) for x_t,
                    the CLEAN image x with noise of level t added. EDM and the code call that level sigma

To see it run, in about a minute on a CPU, without data or downloads:

    python train_cifar.py --smoke

The defaults aim at the paper's CIFAR-10 row "AT+DRA, WRN-34-10" (paper: 88.54 % clean, 57.29 % AutoAttack).
The second command is its row with a million synthetic images (paper: 92.36 / 64.12), the third runs on
eight GPUs:

    python train_cifar.py --out runs/wrn-34-10
    python train_cifar.py --arch wrn-28-10 --synthetic 1m.npz --batch-size 512 --epochs 400 --out runs/1m
    torchrun --nproc-per-node 8 train_cifar.py ...

To follow one batch from disk to loss, read `Data.draw_indices`, `Data.fetch`, `Data.batch`, then
`train_step`.

A run writes last.pt, best.pt (the best on held-out training images) and log.csv to --out, and the same
command again continues it. Every random draw is a function of (seed, step), so a checkpoint holds no
generator's state, a continued run sees the same batches and noise as an undisturbed one, and several
processes can draw the same batch and take their shares.
"""
import argparse
import contextlib
import copy
import fcntl
import math
import mmap
import os
import re
import signal
import struct
import sys
import time
import zipfile
import zlib
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

from edm_encoder import EDMEncoder, load_edm_encoder

# -----------------------------------------------------------------------------------------------------------
# Settings. Each number says where it comes from. "stated": in the paper, or in what it refers to.
# "inherited": from DM-AT, whose setup the paper says it follows (strictly, chosen in the row without
# synthetic images, which DM-AT does not have). "chosen": by us, where the paper leaves it open. What one
# changes to reproduce a row of the paper is a flag in `parse_args`; the rest of the recipe is here.

# Mean and deviation per RGB channel (inherited); the teacher is the EDM that drew DM-AT's images (stated).
DATASETS = {
    "cifar10": SimpleNamespace(
        classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616),
        teacher="https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl"),
    "cifar100": SimpleNamespace(
        classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
        teacher="https://huggingface.co/wzekai99/DM-Improves-AT/resolve/main/others/"
                "edm-cifar100-32x32-cond-vp.pkl"),
}
OPTIMIZERS = {  # peak learning rate and weight decay
    "sgd": SimpleNamespace(lr=0.2, weight_decay=5e-4),  # inherited, for batches of 512; for others chosen
    "lion": SimpleNamespace(lr=1e-4, weight_decay=0.5),  # decay stated, rate chosen
}
WARMUP = 0.025  # share of the epochs with a rising rate, and of the steps before averaging (inherited)
# Share of a new batch in batch norm's running statistics, which evaluation uses in place of a batch's own. A
# tenth of torch's default, so these are averages over many clean and attacked batches (inherited).
BATCHNORM_MOMENTUM = 0.01
CROP_PADDING = 4  # pixels of black border, out of which the random crop is taken (inherited)
HOLDOUT = 1024  # first training images, never trained on, to select best.pt (inherited); at most a tenth
SELECTION_STEPS = 40  # PGD steps on the margin loss for that selection (inherited)
PROJECTOR_WIDTH = 2048  # hidden width of h: REPA's, arXiv 2410.06940; the paper states its three layers
EXTRA_LOG_SIGMA = (-1.2, 1.2)  # mean and deviation of ln(sigma): EDM's own in training (stated)
TABLE_STEPS, TABLE_IMAGES = 10, 1024  # PGD for the closing table (chosen): a quick look, no result
LOG_EVERY = 50  # steps between rows of log.csv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOKE = {"arch": "wrn-10-1", "epochs": 6, "batch_size": 64, "lr": 0.1, "eval_every": 3, "out": "runs/smoke",
         "device": "cpu"}  # other defaults for --smoke: a minute on two cores


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line that names it; the exit code is 2."""


def fraction(text):
    """A number on the command line, also written as a fraction: pixel distances come in 255ths, as 8/255."""
    try:
        return float(Fraction(text))
    except (ZeroDivisionError, OverflowError):
        raise ValueError from None  # what argparse expects


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # Data. Robustness keeps improving with far more images than the real ones.
    add("--dataset", choices=list(DATASETS), default="cifar10", help="sets classes, normalisation, teacher")
    add("--data-dir", default="data", help="train.npz and test.npz (see `open_npz`), else downloaded")
    add("--synthetic", nargs="+", default=[], metavar="FILE", help="DM-AT's .npz files, any number of parts")
    add("--synthetic-fraction", type=fraction,
        help="synthetic share of each batch (0.7: inherited; above a million images 0.8: arXiv 2404.09349)")
    # Model and optimisation. The average of the weights over the last steps is usually more robust than any
    # of them; it is what gets evaluated and used.
    add("--arch", default="wrn-34-10", help="wrn-DEPTH-WIDTH with DEPTH = 6n + 4, or vit-b-2")
    add("--epochs", type=int, default=200, help="of ceil(real images / batch size) steps (stated per row)")
    add("--max-steps", type=int, help="number of steps, in place of --epochs")
    add("--batch-size", type=int, default=128, help="over all processes (stated per row)")
    add("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="for a ViT give lion (stated)")
    add("--lr", type=fraction, help="peak learning rate (sgd 0.2: see OPTIMIZERS; lion 1e-4: chosen)")
    add("--weight-decay", type=fraction, help="(sgd 5e-4: inherited; lion 0.5: stated)")
    add("--ema-decay", type=fraction, default=0.995, help="tau of the weight averaging (inherited)")
    add("--label-smoothing", type=fraction, default=0.1, help="in the cross-entropy (inherited)")
    # Attack. A larger beta buys robust accuracy with clean accuracy. The steps together reach further than
    # eps, so that the attack can cross its ball and still correct itself.
    add("--beta", type=fraction, default=5.0, help="weight of TRADES' KL term (inherited)")
    add("--eps", type=fraction, default="8/255", help="largest change of a pixel in [0,1] (inherited)")
    add("--step-size", type=fraction, default="2/255", help="of the attack (inherited)")
    add("--attack-steps", type=int, default=10,
        help="PGD steps (stated); 0: x' = x, no attack (with --beta and --dra-weight 0: cross-entropy alone)")
    # Diffusion representation alignment. A diffusion model's features say most about what is in an image
    # when a little noise was added (arXiv 2303.09769): enough to hide fine texture, not enough to hide the
    # object.
    add("--dra-weight", type=fraction, default=1.0, help="lambda, eq. (4) (chosen); 0: no alignment")
    add("--teacher", help="EDM's .pkl, path or URL (stated: the model that drew the synthetic images)")
    add("--teacher-sigma", type=fraction, default=0.06,
        help="noise level for the teacher, images in [-1,1] (chosen: best linear probe in arXiv 2303.09769)")
    add("--teacher-layer", default="dec.8x8_in1", help="UNet block to align with (stated: the bottleneck)")
    add("--teacher-unconditional", action="store_true", help="do not tell the teacher the label")
    add("--extra-sigma", action="store_true", help="a second target, at a random noise level (see README.md)")
    # Running. Only backbone and teacher compute in bfloat16; logits, projector and losses stay in float32.
    add("--out", default="runs/cifar", help="folder for last.pt, best.pt and log.csv")
    add("--seed", type=int, default=0, help="of every random draw")
    add("--device", choices=["cuda", "cpu"], default=DEVICE, help="where to run")
    add("--no-amp", action="store_true",
        help="float32 throughout, without TF32 (CUDA's default: classifier and teacher compute in bfloat16)")
    add("--no-compile", action="store_true", help="no torch.compile (CUDA's default: compiled)")
    add("--eval-every", type=fraction, default=1, help="epochs between evaluations (inherited)")
    add("--save-every", type=fraction, default=1, help="epochs between checkpoints")
    add("--smoke", action="store_true", help="a minute on a CPU: tiny network, drawn images, random teacher")
    add("--dry-run", action="store_true", help="print the plan and stop")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)  # any other flag still beats these
    args = parser.parse_args(argv)
    finish_args(args, parser)
    return args


def finish_args(args, parser):
    """Fill in what depends on other flags, and refuse values out of range."""
    defaults = OPTIMIZERS[args.optimizer]
    args.lr = defaults.lr if args.lr is None else args.lr
    args.weight_decay = defaults.weight_decay if args.weight_decay is None else args.weight_decay
    if args.dra_weight == 0:  # then nothing about the teacher matters
        args.teacher, args.extra_sigma = None, False
    elif args.teacher is None and not args.smoke:
        args.teacher = DATASETS[args.dataset].teacher
    args.amp = args.device == "cuda" and not args.no_amp  # autocast to bfloat16
    for expected, fits, names in (
            ("above 0", lambda x: x > 0, "epochs max_steps lr step_size teacher_sigma eval_every save_every"),
            ("at least 0", lambda x: x >= 0, "attack_steps beta dra_weight weight_decay"),
            ("at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed"),
            ("at least 2", lambda x: x >= 2, "batch_size"),
            ("at least 0 and below 1", lambda x: 0 <= x < 1,
             "eps ema_decay label_smoothing synthetic_fraction")):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not fits(value):
                parser.error(f"--{name.replace('_', '-')} {value}: expected {expected}")
    if args.synthetic_fraction and not args.synthetic:
        parser.error("--synthetic-fraction: expected --synthetic FILE with it")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")


# -----------------------------------------------------------------------------------------------------------
# Model. `model(images)` gives logits. It is `model.head(model.features(images))`, and the features in between
# are what the alignment works on. Images come in [0, 1] and are normalised inside, so that an attack on the
# model is an attack in pixels, as AutoAttack and RobustBench expect.


class Classifier(nn.Module):
    """What both architectures share. A subclass has `penultimate`: normalised images -> features [B, D], and
    `head`: features -> logits [B, num_classes]."""

    amp = False  # whether the backbone computes in bfloat16

    def set_normalisation(self, mean, std):
        """Mean and deviation per RGB channel. Buffers move to the GPU with the model; not persistent ones
        leave the state dict as it is in DM-AT's and RobustBench's checkpoints."""
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def features(self, images):
        """images [B, 3, 32, 32] in [0, 1] -> penultimate features enc(x) [B, D], float32.

        Autocast ends here: bfloat16 has three digits, too few for logits, softmax, KL and cosine.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return self.penultimate((images - self.mean) / self.std).float()

    def forward(self, images):
        """images [B, 3, 32, 32] in [0, 1] -> logits f(x) [B, num_classes]."""
        return self.head(self.features(images))


class Block(nn.Module):
    """Pre-activation residual block: shortcut + conv(act(norm(conv(act(norm(x)))))). The shortcut is x, or
    a 1x1 convolution of act(norm(x)) where the number of channels changes. Names as in DM-AT's
    checkpoints."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels, momentum=BATCHNORM_MOMENTUM)
        padding = 1 if stride == 1 else 0  # a strided one is padded in `forward`
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, stride, padding, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels, momentum=BATCHNORM_MOMENTUM)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        """[B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride]"""
        activated = F.silu(self.batchnorm_0(x))
        # DM-AT's code comes from TensorFlow, whose "SAME" padding of a strided 3x3 convolution is on the
        # right and at the bottom only. With the usual padding on all sides its checkpoints would load and
        # then be wrong.
        h = self.conv_0(activated if self.conv_0.stride == (1, 1) else F.pad(activated, (0, 1, 0, 1)))
        h = self.conv_1(F.silu(self.batchnorm_1(h)))
        return h + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(Classifier):
    """WRN-depth-width with SiLU, as DM-AT builds and initialises it (RobustBench's `DMWideResNet`)."""

    def __init__(self, depth, width, num_classes):
        super().__init__()
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential()  # three groups, at 32 x 32, 16 x 16 and 8 x 8 pixels
        for i in range(3):
            blocks = [Block(channels[i], channels[i + 1], stride=1 if i == 0 else 2)]
            blocks += [Block(channels[i + 1], channels[i + 1], stride=1) for _ in range((depth - 4) // 6 - 1)]
            self.layer.append(nn.Module())  # an empty shell that makes the names layer.0.block.0 and so on
            self.layer[i].block = nn.Sequential(*blocks)
        self.batchnorm = nn.BatchNorm2d(channels[3], momentum=BATCHNORM_MOMENTUM)
        self.logits = nn.Linear(channels[3], num_classes)
        # DM-AT's initialisation: weights of a convolution ~ N(0, 2 / (k^2 out_channels)). torch's own default
        # is 2.4 times narrower for a 3x3 layer of equal width, and trained from scratch that is another
        # network.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.logits.bias)

    def penultimate(self, x):
        """[B, 3, 32, 32] normalised -> [B, 64 * width], the mean over the last 8 x 8 positions."""
        x = self.init_conv(x)  # [B, 16, 32, 32]
        for group in self.layer:
            x = group.block(x)  # [B, 16w, 32, 32], then [B, 32w, 16, 16], then [B, 64w, 8, 8]
        return F.silu(self.batchnorm(x)).mean(dim=(2, 3), dtype=torch.float32)

    def head(self, features):
        """[B, 64 * width] -> logits [B, num_classes]"""
        return self.logits(features)


class ViT(Classifier, torchvision.models.VisionTransformer):
    """torchvision's Vision Transformer with ViT-B's size, for 32 px in patches of 2 (stated): 257 tokens of
    width 768. It is a subclass, and not wrapped in a module, so that no prefix stands in its parameters'
    names."""

    def __init__(self, num_classes):
        super().__init__(image_size=32, patch_size=2, num_layers=12, num_heads=12, hidden_dim=768,
                         mlp_dim=3072, num_classes=num_classes)

    def penultimate(self, x):
        """[B, 3, 32, 32] normalised -> [B, 768], the class token after the last layer norm."""
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)  # [B, 256, 768]
        class_token = self.class_token.expand(len(x), -1, -1).to(patches.dtype)
        return self.encoder(torch.cat([class_token, patches], dim=1))[:, 0]

    def head(self, features):
        """[B, 768] -> logits [B, num_classes]"""
        return self.heads(features)


def build_model(arch, num_classes, dataset="cifar10"):
    """A classifier for images [B, 3, 32, 32] in [0, 1], initialised from torch's global generator.

    arch: "wrn-DEPTH-WIDTH" with DEPTH = 6n + 4, or "vit-b-2"; dataset: whose mean and deviation normalise the
    input. eval_autoattack.py imports this function, from this file or from your copy (`--script`). Raises
    InputError for an unknown arch or dataset.
    """
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset}: expected one of {', '.join(DATASETS)}")
    wrn = re.fullmatch(r"wrn-(\d{2,3})-(\d{1,2})", arch)
    if arch == "vit-b-2":
        model = ViT(num_classes)
    elif wrn and int(wrn[1]) >= 10 and int(wrn[1]) % 6 == 4 and int(wrn[2]) > 0:
        model = WideResNet(int(wrn[1]), int(wrn[2]), num_classes)
    else:
        raise InputError(f"--arch {arch}: expected vit-b-2, or wrn-DEPTH-WIDTH with DEPTH = 6n + 4")
    model.set_normalisation(DATASETS[dataset].mean, DATASETS[dataset].std)
    return model


def build_projector(in_width, out_width):
    """h in eq. (3): classifier features [B, in_width] -> the teacher's space [B, out_width]. Three layers
    (stated), SiLU in between as in REPA. It absorbs what is particular to the teacher's space: the
    classifier's features need not equal the teacher's, they only have to predict them."""
    return nn.Sequential(nn.Linear(in_width, PROJECTOR_WIDTH), nn.SiLU(),
                         nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH), nn.SiLU(),
                         nn.Linear(PROJECTOR_WIDTH, out_width))


# -----------------------------------------------------------------------------------------------------------
# Attack and losses. The norm of the attack is l-infinity throughout: max |x' - x| <= eps over all pixels.


def pgd(loss, images, start, eps, step_size, steps):
    """Projected gradient ascent (eq. 2): climb `loss` by its gradient's sign, and go back into what is
    allowed.

    loss: images -> scalar; images, start [B, 3, H, W] in [0, 1], start within eps of images. The sign is the
    steepest direction in l-infinity: every pixel moves by the whole step. Returns x', same shape, detached.
    """
    adv = start
    for _ in range(steps):
        with torch.enable_grad():
            adv = adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(adv), [adv])  # to the image alone
        adv = adv.detach() + step_size * gradient.sign()
        adv = adv.clamp(images - eps, images + eps).clamp(0, 1)  # back into the eps-ball and the pixel range
    return adv.detach()


def set_batchnorm(model, **attributes):
    """Set attributes of all batch norm layers (a ViT has none): `track_running_stats`, whether a forward in
    training mode updates the running statistics (it normalises with its own batch either way), and
    `momentum`, how much."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, value in attributes.items():
                setattr(module, name, value)


def kl_divergence(clean_logits, adv_logits, reduction):
    """KL(p(x) || p(x')) from logits [B, classes], in float32. Log-probabilities on both sides: with plain
    ones the gradient into the clean logits is NaN as soon as a probability underflows."""
    clean_log_p = clean_logits.float().log_softmax(dim=1)
    adv_log_p = adv_logits.float().log_softmax(dim=1)
    return F.kl_div(adv_log_p, clean_log_p, reduction=reduction, log_target=True)


def trades_attack(model, images, start, eps, step_size, steps, clean_logits=None):
    """The adversary of TRADES as DM-AT runs it: x' within eps of x that maximises KL(p(x) || p(x')).

    images [B, 3, H, W] in [0, 1]; start: the first x', drawn from U(-eps, eps) around images and clamped to
    [0, 1]. clean_logits [B, classes]: the model's logits of `images`. The training step has them from its own
    forward, with the same weights and batch statistics; if None, they are computed here. Returns x'
    [B, 3, H, W] in [0, 1], detached.

    With a model in training mode (as in `train_step`) batch norm uses the attacked batch's own statistics, so
    the attack sees the function that is then trained. TRADES' original code attacks in evaluation mode
    instead, from a start of 0.001 * N(0, 1); the two give different classifiers.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    # Only the clean and the finished adversarial batch should count in the running statistics (DM-AT).
    set_batchnorm(model, track_running_stats=False)
    # Only the image's gradient is needed. A compiled backward pass would compute the weights' as well, for
    # nothing.
    for weight in weights:
        weight.requires_grad_(False)
    try:
        if clean_logits is None:
            with torch.no_grad():
                clean_logits = model(images)
        clean_logits = clean_logits.detach()  # p(x) is held fixed
        # The sum, so that each image's gradient is independent of the others; its sign ignores the scale
        # anyway.
        loss = lambda adv: kl_divergence(clean_logits, model(adv), "sum")
        return pgd(loss, images, start, eps, step_size, steps)
    finally:
        set_batchnorm(model, track_running_stats=True)
        for weight in weights:
            weight.requires_grad_(True)


def trades_loss(clean_logits, adv_logits, labels, beta, label_smoothing):
    """L_TRADES = CE(f(x), y) + beta * KL(p(x) || p(x')) (arXiv 1901.08573), the mean over the batch.

    The first term rewards classifying the clean image correctly, the second giving the attacked one the
    same prediction; beta trades the one for the other. clean_logits, adv_logits [B, classes]; gradients
    flow into both. labels [B] int64. Returns a float32 scalar.
    """
    cross_entropy = F.cross_entropy(clean_logits.float(), labels, label_smoothing=label_smoothing)
    return cross_entropy + beta * kl_divergence(clean_logits, adv_logits, "batchmean")


def dra_loss(projected, target):
    """L_DRA = -cos(h(enc(x')), g(x_t, t, y)), the mean over the batch (eq. 3): -1 where all directions agree.

    The cosine leaves out the length of both, which says nothing about what is in the image. projected, target
    [B, width]; no gradient flows into target. Returns a float32 scalar in [-1, 1].
    """
    return -F.cosine_similarity(projected.float(), target.detach().float(), dim=1).mean()


# -----------------------------------------------------------------------------------------------------------
# The training step: the paper on one screen.


def train_step(model, averaged, projectors, teacher, optimizer, batch, ema_decay, args):
    """One optimisation step. It draws no random numbers: they are all in `batch`, see `Data.batch`.

    batch.images x [B, 3, 32, 32] in [0, 1], batch.labels y [B], batch.start like images,
    batch.teacher_noise: a list of (sigma: float or [B], noise: N(0, 1) like images), one per projector,
    empty without alignment. ema_decay: see `averaging_decay`. args: eps, step_size, attack_steps, beta,
    label_smoothing, dra_weight, teacher_unconditional, amp. Returns detached scalars by name, left on the
    device: reading one would make the host wait for the GPU.
    """
    images, labels = batch.images, batch.labels
    model.train()  # batch norm: each forward below normalises with the statistics of its own batch

    # The clean forward comes first and serves twice: the attack moves away from its p(x), and L contains it.
    clean_logits = model(images)

    # The attack is PGD, eq. (2). Eq. (1) would have it maximise the cross-entropy; TRADES maximises KL.
    adv = images  # x' = x: plain training, if there is nothing to attack with
    if args.eps > 0 and args.attack_steps > 0:
        adv = trades_attack(model, images, batch.start, args.eps, args.step_size, args.attack_steps,
                            clean_logits)

    # L_TRADES. The clean and the adversarial forward are two, not one of both halves together: each half is
    # normalised by its own statistics (DM-AT). Both update the running ones.
    adv_features = model.features(adv)  # enc(x'), [B, D]
    adv_logits = model.head(adv_features)
    trades = trades_loss(clean_logits, adv_logits, labels, args.beta, args.label_smoothing)

    # L_DRA, eq. (3). The teacher gets the CLEAN image and makes x_t = (2x - 1) + sigma * noise itself. The
    # gradient trains h and, through enc(x'), the backbone, but not `head`, which the features never pass
    # here. It stops at the attacked image, which is data by now, and at the teacher, which is frozen.
    alignment = trades.new_zeros(())
    given_labels = None if args.teacher_unconditional else labels
    for projector, (sigma, noise) in zip(projectors, batch.teacher_noise):
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            target = teacher(images, given_labels, sigma, noise)  # g: [B, width], mean over 8 x 8 positions
        alignment = alignment + dra_loss(projector(adv_features), target) / len(projectors)  # mean: chosen

    # Eq. (4). Weights of the classifier and of h learn together: same optimizer, same rate and decay
    # (chosen).
    loss = trades + args.dra_weight * alignment
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients([*model.parameters(), *projectors.parameters()])  # over the processes of torchrun
    optimizer.step()
    update_average(averaged, model, ema_decay)

    clean, robust = [(logits.argmax(1) == labels).float().mean() for logits in (clean_logits, adv_logits)]
    cosine = {"cosine": -alignment.detach()} if len(projectors) else {}
    return {"loss": loss.detach(), "trades": trades.detach(), **cosine,
            "train_clean": clean, "train_robust": robust}


# -----------------------------------------------------------------------------------------------------------
# Schedule, optimiser, weight averaging, and gradients over several processes.


def one_cycle(position, total, peak):
    """(learning rate, momentum) at position 0 ... total - 1, as torch's OneCycleLR(max_lr=peak,
    pct_start=0.025, total_steps=total) gives them; DM-AT steps it once per epoch.

    The rate rises from peak / 25 to the peak and falls to peak / 250,000, on two halves of a cosine, while
    the momentum goes from 0.95 to 0.85 and back: long memory for small steps, short memory for large ones.
    The rise ends at WARMUP * total - 1. For up to 40 positions that is not above 0, so there is no rise,
    and the first value is already on the way down (torch fails for exactly 40, where it would divide by
    zero). With a single position only the last value is left, peak / 250,000: a run of one epoch hardly
    trains.
    """
    def cosine(start, end, share):
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
    rise_end = WARMUP * total - 1
    if rise_end > 0 and position <= rise_end:
        share = position / rise_end
        return cosine(peak / 25, peak, share), cosine(0.95, 0.85, share)
    share = (position - rise_end) / (total - 1 - rise_end)
    return cosine(peak, peak / 25 / 1e4, share), cosine(0.85, 0.95, share)


def build_optimizer(args, *modules):
    """SGD (Nesterov, inherited) or Lion (arXiv 2302.06675, from timm) over all parameters of `modules`.

    Weight decay leaves out the scales and shifts of batch norm for SGD (inherited: biases of linear layers
    decay), and for Lion all vectors, that is biases and layer norms (chosen).
    """
    parameters = [p for module in modules for p in module.parameters()]
    if args.optimizer == "lion":
        undecayed = {id(p) for p in parameters if p.ndim <= 1}
    else:
        norms = [m for module in modules for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        undecayed = {id(p) for norm in norms for p in norm.parameters()}
    groups = [{"params": [p for p in parameters if id(p) not in undecayed]},
              {"params": [p for p in parameters if id(p) in undecayed], "weight_decay": 0.0}]
    if args.optimizer == "lion":
        from timm.optim import Lion  # only here: nothing else in this file needs timm
        return Lion(groups, lr=args.lr, weight_decay=args.weight_decay, foreach=True)
    # Momentum 0.9 is what DM-AT passes, too; `one_cycle` then sets it anew in every epoch.
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)


def averaging_decay(step, warmup_steps, tau):
    """Share of the old average that stays after step `step` (from 0), as in DM-AT. During the warm-up none:
    the average is the model. Then it rises to tau, and so forgets the weak first weights quickly."""
    since = step + 1 - warmup_steps
    return 0.0 if since < 0 else min(tau, (1 + since) / (10 + since))


@torch.no_grad()
def update_average(averaged, model, ema_decay):
    """averaged <- ema_decay * averaged + (1 - ema_decay) * model. Buffers, such as batch norm's running
    statistics, are the live model's as in DM-AT: copied, not averaged, and never shared."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - ema_decay)
    for average, live in zip(averaged.buffers(), model.buffers()):
        average.copy_(live)


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Combine a tensor over all processes, in place. In a single process there is nothing to do."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def barrier():
    """Wait until all processes are here."""
    all_reduce(torch.zeros(()))


def average_gradients(parameters):
    """Mean gradient over all processes. By hand: DistributedDataParallel broadcasts buffers before each
    forward, and two forwards before one backward then fail. In a step that costs as much as 26 forwards
    there is little to gain from its overlapping anyway. Each process normalises its own share in batch
    norm, as in DM-AT's DataParallel."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is not None:
                all_reduce(parameter.grad).div_(dist.get_world_size())


# -----------------------------------------------------------------------------------------------------------
# Data, from disk to one augmented batch on the device. Every draw is a function of (seed, step), made for the
# whole batch; each process takes its share of it.


def generator(seed, position, purpose, device="cpu"):
    """A random generator that depends on (seed, position, purpose) alone. position: a step or pass number;
    purpose: a short text, so that draws for different purposes at the same step are independent."""
    mixed = np.random.SeedSequence([seed, position, *purpose.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


def map_npz_member(path, name):
    """One array of an .npz file, mapped into memory where it lies: nothing is read until it is indexed.

    An .npz is a zip of .npy files. numpy's mmap_mode ignores it, but a member that is not compressed is a
    plain .npy at some offset, and 61 GB of images need not pass through memory. Returns a read-only array
    whose `base` is the mmap. Raises InputError for a file that is no .npz, lacks `name`, or holds it
    compressed, cut off or as objects.
    """
    try:
        info = zipfile.ZipFile(path).getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)  # in the member's own header: lengths of two fields at its end
            begin = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            file.seek(begin)  # from here on it is an .npy file
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if fortran_order or dtype.hasobject:  # objects would be unpickled, and a pickle can run code
                raise ValueError("it is in Fortran order, or holds objects")
            if file.tell() - begin + math.prod(shape) * dtype.itemsize != info.file_size:
                raise ValueError("it has another length than its header says, perhaps cut off")
            return np.memmap(path, dtype, "r", file.tell(), shape)
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path}: holds no array {name!r} that can be mapped, expected an .npz as from "
                         f"numpy.savez with 'image' and 'label' ({ascii(str(error))[1:-1]})") from None


def open_npz(path, classes):
    """An .npz with `image` uint8 [N, 32, 32, 3] and integer `label` [N] in 0 ... classes - 1 -> (images, left
    on disk, labels uint8 [N]). Raises InputError, one line that names the file, where it holds other data."""
    images, labels = map_npz_member(path, "image"), map_npz_member(path, "label")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise InputError(f"{path}: 'image' is {images.dtype} {list(images.shape)}, "
                         "expected uint8 [N, 32, 32, 3]")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        raise InputError(f"{path}: 'label' is {labels.dtype} {list(labels.shape)}, "
                         f"expected integers [{len(images)}], at least one")
    low, high = labels.min(), labels.max()
    # DM-AT's files for CIFAR-10 and CIFAR-100 share their names: labels that never pass 9 give the wrong
    # one away.
    if low < 0 or high >= classes or (classes == 100 and high < 10):
        raise InputError(f"{path}: labels run from {low} to {high}, expected 0 to {classes - 1}")
    return images, labels.astype(np.uint8)


def load_real(args, split):
    """The real images of "train" or "test", as (images uint8 [N, 32, 32, 3], labels uint8 [N]): --data-dir's
    npz files, else torchvision's CIFAR, downloaded if need be; with --smoke drawn ones. Raises InputError."""
    folder = Path(args.data_dir)
    if args.smoke:
        return draw_smoke_images(1088 if split == "train" else 128, seed=args.seed + (split == "test"))
    if (folder / "train.npz").exists() or (folder / "test.npz").exists():
        images, labels = open_npz(folder / f"{split}.npz", DATASETS[args.dataset].classes)
        return np.array(images), labels  # real images fit into memory
    cifar = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[args.dataset]
    try:
        data = cifar(folder, train=split == "train", download=True)
    except (RuntimeError, OSError) as error:
        raise InputError(f"--data-dir {folder}: has no train.npz, and torchvision could not get "
                         f"{args.dataset} ({error})") from None
    return np.ascontiguousarray(data.data), np.array(data.targets, np.uint8)


def draw_smoke_images(count, seed):
    """Ten classes that a tiny network learns in a minute: waves in two directions and five frequencies, with
    random phase, contrast, colour and noise. Returns images uint8 [N, 32, 32, 3] and labels uint8 [N]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    frequency = 1 + labels % 5  # waves per 32 pixels
    phase, contrast = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.25, 0.45, count)
    position = np.arange(32) / 32
    wave = contrast[:, None] * np.sin(2 * np.pi * frequency[:, None] * position + phase[:, None])
    waves = np.where((labels < 5)[:, None, None], wave[:, None, :], wave[:, :, None])[..., None]
    images = 0.5 + waves * rng.uniform(0.6, 1, (count, 1, 1, 3)) + rng.normal(0, 0.05, (count, 32, 32, 3))
    return (images.clip(0, 1) * 255).astype(np.uint8), labels.astype(np.uint8)


class Data:
    """Real and synthetic training images, held-out and test images, and the batches drawn from them."""

    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        images, labels = load_real(args, "train")
        held = min(HOLDOUT, len(labels) // 10)
        if not held:
            raise InputError(f"--data-dir {args.data_dir}: has {len(labels)} images, expected at least 10")
        self.holdout, self.test = (images[:held], labels[:held]), load_real(args, "test")
        synthetic = [open_npz(path, DATASETS[args.dataset].classes) for path in args.synthetic]
        for synthetic_images, _ in synthetic:
            synthetic_images.base.madvise(mmap.MADV_RANDOM)  # single images, from all over: no read-ahead
        # Images are numbered through all parts: the real ones first, then those of each synthetic file.
        self.parts = [(images[held:], labels[held:]), *synthetic]
        self.ends = np.cumsum([len(labels) for _, labels in self.parts])  # part i ends before image ends[i]
        self.n_real_images = len(labels) - held
        self.n_synthetic_images = int(self.ends[-1]) - self.n_real_images
        # Checksums of the real images and of all labels (reading all synthetic images would take too long).
        # In `args`, where `restore` compares them: a run should not go on with other images by mistake.
        args.images = [zlib.crc32(images), *(zlib.crc32(labels) for _, labels in self.parts)]

        # An epoch has as many steps as all real images, held-out ones included, would fill (DM-AT).
        self.steps_per_epoch = math.ceil(len(labels) / args.batch_size)
        if synthetic and args.synthetic_fraction is None:
            args.synthetic_fraction = 0.7 if self.n_synthetic_images <= 1_000_000 else 0.8
        # Synthetic images in a batch are rounded down (DM-AT): 512 at 0.7 are 154 real + 358 synthetic ones.
        self.n_real = args.batch_size - int(args.batch_size * (args.synthetic_fraction or 0))
        if self.n_real > self.n_real_images:
            raise InputError(f"--batch-size {args.batch_size}: has {self.n_real} real images, "
                             f"expected at most the {self.n_real_images} that there are")
        if args.batch_size % world:
            raise InputError(f"--batch-size {args.batch_size}: expected a multiple of the {world} processes")
        self.order_of_pass = (None, None)  # number of the current pass over the real images, and its order
        self.reader, self.coming = ThreadPoolExecutor(1), {}  # a reading thread; step -> future of its images

    def draw_indices(self, step):
        """Which images the global batch of a step holds: int64 [batch_size], numbered through `parts`.

        Real ones are consecutive pieces of passes over all of them, each pass in an order of its own; a
        batch may end one pass and begin the next. (DM-AT begins anew in each epoch, and fills up a pass's
        last batch with synthetic images.) Synthetic ones are drawn with replacement, anew in each step.
        """
        seed, pieces = self.args.seed, []
        position, end = step * self.n_real, (step + 1) * self.n_real
        while position < end:
            number, offset = divmod(position, self.n_real_images)
            if self.order_of_pass[0] != number:
                order = torch.randperm(self.n_real_images, generator=generator(seed, number, "pass"))
                self.order_of_pass = number, order
            pieces.append(self.order_of_pass[1][offset:offset + end - position])
            position += len(pieces[-1])
        if self.n_synthetic_images:
            drawn = torch.randint(self.n_synthetic_images, (self.args.batch_size - self.n_real,),
                                  generator=generator(seed, step, "synthetic"))
            pieces.append(self.n_real_images + drawn)
        return torch.cat(pieces)

    def fetch(self, index):
        """index int64 [n], as from `draw_indices` -> images uint8 [n, 32, 32, 3] and labels int64 [n] in that
        order, in the host's memory; pinned for a GPU, which then takes them without anyone waiting."""
        index = index.numpy()
        images, labels = np.empty((len(index), 32, 32, 3), np.uint8), np.empty(len(index), np.int64)
        part_of = np.searchsorted(self.ends, index, side="right")
        for i, (some_images, some_labels) in enumerate(self.parts):
            here = np.flatnonzero(part_of == i)
            number = index[here] - (self.ends[i] - len(some_labels))
            images[here], labels[here] = some_images[number], some_labels[number]
            if isinstance(some_images.base, mmap.mmap):
                # Let go of the pages just read, or the process would seem to grow to the size of the file.
                some_images.base.madvise(mmap.MADV_DONTNEED)
        images, labels = torch.from_numpy(images), torch.from_numpy(labels)
        return (images.pin_memory(), labels.pin_memory()) if self.device.type == "cuda" else (images, labels)

    def fetch_step(self, step):
        """`fetch` for this process's share of a step's batch: every `world`-th image of it."""
        return self.fetch(self.draw_indices(step)[self.rank::self.world])

    def batch(self, step):
        """All that `train_step` needs for one step. B: this process's share of the batch.

        Returns images [B, 3, 32, 32] in [0, 1], randomly cropped and flipped, labels [B], start: the attack's
        first point, and teacher_noise: [(sigma, noise)] for the teacher, none, one or two.
        """
        args, device, size = self.args, self.device, self.args.batch_size
        mine = slice(self.rank, None, self.world)
        here = self.coming.pop(step, None) or self.reader.submit(self.fetch_step, step)
        self.coming = {step + 1: self.reader.submit(self.fetch_step, step + 1)}  # while this step computes
        images, labels = [tensor.to(device, non_blocking=True) for tensor in here.result()]
        images = images.permute(0, 3, 1, 2)  # [B, 3, 32, 32] in 0 ... 255

        # One stream of random numbers, read in this order. Always for the whole batch, of which this
        # process then takes its share: so two processes see the crops, starts and noise that one would see.
        random = generator(args.seed, step, "batch", device)
        corner = torch.randint(2 * CROP_PADDING + 1, (2, size), generator=random, device=device)[:, mine]
        flip = (torch.rand(size, generator=random, device=device) < 0.5)[mine]
        images = crop_and_flip(images, corner, flip).float() / 255  # in [0, 1]

        shape = (size, 3, 32, 32)
        start = images + args.eps * (2 * torch.rand(shape, generator=random, device=device)[mine] - 1)
        teacher_noise = []
        if args.dra_weight:
            noise = torch.randn(shape, generator=random, device=device)[mine]
            teacher_noise.append((args.teacher_sigma, noise))
        if args.extra_sigma:
            # A noise level per image, drawn as in EDM's own training: over a long run on many images the
            # teacher then also shows what it knows at other levels.
            mean, deviation = EXTRA_LOG_SIGMA
            sigma = (mean + deviation * torch.randn(size, generator=random, device=device)[mine]).exp()
            teacher_noise.append((sigma, torch.randn(shape, generator=random, device=device)[mine]))
        return SimpleNamespace(images=images, labels=labels, start=start.clamp(0, 1),
                               teacher_noise=teacher_noise)


def crop_and_flip(images, corner, flip):
    """Random crop with a black border, and mirroring, all images at once by one gather.

    images [B, C, H, W]; corner [2, B]: row and column of each crop in the padded image; flip bool [B].
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (CROP_PADDING,) * 4)
    rows = corner[0, :, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    columns = corner[1, :, None] + torch.where(flip[:, None], columns.flip(1), columns)  # [B, W]
    which = torch.arange(batch, device=images.device)[:, None, None]
    cropped = padded[which, :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return cropped.permute(0, 3, 1, 2)


# -----------------------------------------------------------------------------------------------------------
# Evaluation and checkpoints. Robust accuracy falls again late in adversarial training (robust overfitting),
# so the run keeps the checkpoint that was best on held-out images.


def margin_loss(logits, labels):
    """Best wrong logit minus the right one (Carlini & Wagner 2017), at most 0, summed over the batch.

    Cross-entropy's gradient dies where the network is sure of itself; a difference of logits has no such
    limit, so this attack is usually the stronger one. Hinged at 0 as in DM-AT: an image that is already
    misclassified adds no gradient and stays where it is. logits [B, classes], labels [B].
    """
    right = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return (wrong - right).clamp(max=0).sum()


def evaluate(model, source, loss, steps, args, limit=None):
    """Clean and robust accuracy in percent, the latter under PGD on `loss` from one random start per image.

    model: frozen and in evaluation mode, so batch norm uses its running statistics. source: (images uint8
    [N, 32, 32, 3], labels [N]), of which the first `limit` count.
    """
    device = next(model.parameters()).device
    all_images, all_labels = [torch.from_numpy(array[:limit]) for array in source]
    clean, robust = 0, 0
    for number, (images, labels) in enumerate(zip(all_images.split(256), all_labels.split(256))):
        images = images.to(device).permute(0, 3, 1, 2).float() / 255  # [256, 3, 32, 32] in [0, 1]
        labels = labels.to(device).long()
        random = generator(args.seed, number, "evaluate", device)
        start = images + args.eps * (2 * torch.rand(images.shape, generator=random, device=device) - 1)
        start = start.clamp(0, 1)
        adv = pgd(lambda x: loss(model(x), labels), images, start, args.eps, args.step_size, steps)
        with torch.no_grad():
            clean += (model(images).argmax(dim=1) == labels).sum().item()
            robust += (model(adv).argmax(dim=1) == labels).sum().item()
    return 100 * clean / len(all_labels), 100 * robust / len(all_labels)


def save_atomically(content, path):
    """Write a text, or anything else with torch.save, under a temporary name, flush it to the disk, then
    rename it. So `path` is whole at every moment, the old or the new one, whatever kills the process or fills
    the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter where the disk is full
        reason = str(error).splitlines()[0]
        raise OSError(f"{path}: cannot be written ({reason}); what was there before is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def checkpoint(args, run, step, log):
    """All that a run needs to continue after `step` steps, and all that a user of the weights needs, as
    tensors and plain types. model_state_dict (averaged, the weights to use) and unaveraged_model_state_dict
    are DM-AT's keys, state_dict (averaged) is RobustBench's; saved twice by reference, a tensor takes its
    space once."""
    model, averaged, projectors, optimizer = run
    data, weights = DATASETS[args.dataset], averaged.state_dict()
    return {"model_state_dict": weights, "state_dict": weights,
            "unaveraged_model_state_dict": model.state_dict(), "projector": projectors.state_dict(),
            "optimizer": optimizer.state_dict(), "step": step, "log": log, "args": vars(args),
            "arch": args.arch, "dataset": args.dataset, "num_classes": data.classes,
            "mean": data.mean, "std": data.std}


# Settings that may differ when a run continues: where files lie (`images` and `teacher_checksum` tell whether
# they are the same ones), where it runs, in which precision, and how often it saves.
MAY_DIFFER = {"data_dir", "synthetic", "teacher", "out", "device", "amp", "no_amp", "no_compile",
              "save_every", "dry_run"}


def restore(path, args, run):
    """Load a checkpoint of the same settings into `run`; returns (steps done, log). Raises InputError
    where it is damaged or of another run. With weights_only a file is data: nothing in it gets to run."""
    model, averaged, projectors, optimizer = run
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        there = saved["args"]
        difference = [f"{name} {there.get(name)} there, {value} now" for name, value in vars(args).items()
                      if name not in MAY_DIFFER and there.get(name) != value]
        if not difference:
            model.load_state_dict(saved["unaveraged_model_state_dict"])
            averaged.load_state_dict(saved["model_state_dict"])
            projectors.load_state_dict(saved["projector"])
            optimizer.load_state_dict(saved["optimizer"])
            return saved["step"], saved["log"]
    except Exception as error:
        raise InputError(f"{path}: damaged, or no checkpoint of this script ({type(error).__name__}); "
                         "move it away to start without it") from None
    raise InputError(f"{path}: belongs to a run with other settings ({'; '.join(difference)}); "
                     "choose another --out")


def write_log(path, log, minutes_left):
    """All rows so far -> log.csv, and the last one to the terminal."""
    columns = list(dict.fromkeys(name for row in log for name in row))
    lines = [",".join(columns)]
    lines += [",".join(f"{row[name]:.6g}" if name in row else "" for name in columns) for row in log]
    save_atomically("\n".join(lines) + "\n", path)
    numbers = [f"{name} {value:.5g} " for name, value in log[-1].items()]
    try:
        print(*numbers, f"{minutes_left:.1f} min left", flush=True)
    except BrokenPipeError:  # Ctrl-C also ends the `tee` behind a pipe, which is no reason not to save
        sys.stdout = open(os.devnull, "w")


def is_best(args, log):
    """Whether the last row of the log is an evaluation that none before it beats; ties go to the later one
    (DM-AT). Without an attack in training no robustness grows that one could select by."""
    name = "holdout_robust" if args.eps and args.attack_steps else "holdout_clean"
    return name in log[-1] and log[-1][name] >= max(row.get(name, 0) for row in log)


def summarise(recent, done, model, last):
    """Means of the last steps' numbers over all processes, accuracies in percent.

    Raises FloatingPointError where one of them or a weight is not finite: the run ends there, and nothing of
    it is saved. last: the last good checkpoint, or None.
    """
    table = torch.stack([torch.stack(list(numbers.values())) for numbers in recent])  # [steps, numbers]
    table = all_reduce(table).cpu() / (dist.get_world_size() if dist.is_initialized() else 1)
    good = f"last good checkpoint: {last or 'none was due yet'}"
    bad = (~table.isfinite().all(dim=1)).nonzero()
    if len(bad):
        values = ", ".join(f"{name} {value:g}" for name, value in zip(recent[0], table[bad[0, 0]].tolist()))
        step = done - len(recent) + int(bad[0]) + 1
        raise FloatingPointError(f"the loss is not finite in step {step} ({values}); {good}")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError(f"a weight is not finite after step {done}; {good}")
    means = dict(zip(recent[0], table.mean(dim=0).tolist()))
    return means | {name: 100 * means[name] for name in ("train_clean", "train_robust")}


# -----------------------------------------------------------------------------------------------------------
# The run. From here on it is bookkeeping.

SIGNALS = []  # received: SIGTERM, or Ctrl-C


def note_signal(number, _frame):
    """Only note it: `train` finishes its step and saves. A second one ends the process at once."""
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)


def signalled():
    """The number of the signal that any process has received, or 0: all stop together."""
    return int(all_reduce(torch.tensor(max(SIGNALS, default=0)), dist.ReduceOp.MAX))


def stop(number, when):
    """End with the exit code that is usual for a signal, 128 + its number."""
    with contextlib.suppress(BrokenPipeError):  # as in `write_log`
        print(f"stopped by {signal.Signals(number).name} {when}; the same command continues from there",
              file=sys.stderr)
    raise SystemExit(128 + number)


def lock(folder):
    """Keep a second run out of a folder until the returned file is closed, or the process ends in any way."""
    file = open(folder / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"{folder}: another run is at work there") from None
    return file


def checksum(module):
    """A number that tells one network's weights from another's, whatever their file is called."""
    crc = 0
    for tensor in module.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().numpy(), crc)
    return crc


def load_teacher(args, device):
    """The frozen diffusion encoder g, or None without alignment. Raises InputError where it does not fit.

    To align with another teacher, return it here: a frozen module in evaluation mode, on `device`, with
    `width`, `label_dim` (0: it knows no labels) and a name in `layer`, called as teacher(images in [0, 1],
    labels or None, sigma, noise) and giving features [B, width]. A run of its own needs an --out of its
    own.
    """
    if args.dra_weight == 0:
        return None
    # A class-conditional teacher is told the true label, so its features can describe the image within its
    # class. Only training images meet the teacher, so no test label can leak.
    classes = DATASETS[args.dataset].classes
    try:
        if args.teacher:
            teacher = load_edm_encoder(args.teacher, args.teacher_layer)
        else:  # the smoke run: a random network's features are a poor target, but they take the same path
            torch.manual_seed(args.seed)
            teacher = EDMEncoder(args.teacher_layer, img_resolution=32, label_dim=classes, model_channels=16,
                                 channel_mult=[1, 2, 2], num_blocks=1)
    except (ValueError, OSError) as error:
        raise InputError(f"--teacher {error}") from None
    if teacher.img_resolution != 32:
        raise InputError(f"--teacher {args.teacher}: made for {teacher.img_resolution} px images, not for 32")
    if teacher.label_dim not in (0, classes) and not args.teacher_unconditional:
        raise InputError(f"--teacher {args.teacher}: knows {teacher.label_dim} classes, expected {classes} "
                         f"({args.dataset}); --teacher-unconditional drops the labels")
    args.teacher_checksum = checksum(teacher)  # train_edm.py's file changes while that run goes on
    return teacher.to(device, memory_format=torch.channels_last)


def build_run(args, device, teacher):
    """Model, its average, projectors and optimizer: a function of the settings and the seed alone."""
    torch.manual_seed(args.seed)
    model = build_model(args.arch, DATASETS[args.dataset].classes, args.dataset)
    with torch.no_grad():
        # In evaluation mode, or the zeros would enter batch norm's running statistics.
        width = model.eval().features(torch.zeros(1, 3, 32, 32)).shape[1]
    # One projector per noise level (chosen): what can be read off at two levels differs.
    targets = 1 + args.extra_sigma if teacher else 0
    projectors = nn.ModuleList(build_projector(width, teacher.width) for _ in range(targets)).to(device)
    model.to(device, memory_format=torch.channels_last)  # the faster layout for convolutions
    model.amp = args.amp
    # A copy that shares no storage with the model, or the average would be the model. It is evaluated in the
    # model's precision, which is good enough to select; AutoAttack judges in float32.
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    return model, averaged, projectors, build_optimizer(args, model, projectors)


def compile_parts(args, model, teacher):
    """On CUDA, compile what takes the time: the backbone, and the networks inside the teacher, whose own
    code around them may look at values. In place: torch.compile(module) would put a prefix in front of
    parameters' names."""
    if args.device == "cuda" and not args.no_compile:
        model.features = torch.compile(model.features, dynamic=False)
        for network in teacher.children() if teacher else ():
            network.compile(dynamic=False)


def print_plan(args, data, run, teacher, total_steps):
    """What follows from the flags."""
    size = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters"
    print(f"model    {args.arch}, {size(run[0])}, in {'bfloat16' if args.amp else 'float32'}")
    print(f"data     {data.n_real_images:,} real images and {data.n_synthetic_images:,} synthetic ones,",
          f"{len(data.holdout[1]):,} held out, {len(data.test[1]):,} for tests")
    print(f"steps    {total_steps:,} = {total_steps / data.steps_per_epoch:g} epochs; in each {data.n_real}",
          f"real + {args.batch_size - data.n_real} synthetic images, on {data.world} process(es)")
    print(f"attack   eps {args.eps * 255:g}/255, {args.attack_steps} steps of {args.step_size * 255:g}/255")
    about = "none: no alignment"
    if teacher:
        about = f"{args.teacher or 'random'}: {teacher.layer}, {teacher.width} wide, {size(teacher)}; "
        about += f"projector {size(run[2])}"
    print(f"teacher  {about}", flush=True)


def resume(args, data, run, out):
    """Load the last checkpoint in `out`, if there is one, into `run`. Returns (steps done, log)."""
    first_step, log = 0, []
    last = next((out / name for name in ("last.pt", "best.pt") if (out / name).exists()), None)
    if last:
        first_step, log = restore(last, args, run)
        if data.rank == 0 and last.name == "best.pt":  # there may be no step left that would write the other
            save_atomically(checkpoint(args, run, first_step, log), out / "last.pt")
    if all_reduce(torch.tensor([first_step, -first_step]), dist.ReduceOp.MAX).sum():
        raise InputError(f"--out {out}: the processes see different checkpoints; expected one folder for all")
    return first_step, log


def train(args, data, teacher, run, out, total_steps):
    """Train `run`, as from `build_run`, to `total_steps`: from the last checkpoint in `out`, or from scratch.

    Raises FloatingPointError where the loss is not finite, and SystemExit, after saving, on a signal.
    """
    model, averaged, projectors, optimizer = run
    first_step, log = resume(args, data, run, out)
    last = out / "last.pt" if first_step else None  # the last good checkpoint
    if data.rank == 0:
        begin = f"continuing {last} after step {first_step} of {total_steps}" if last else "starting"
        print(begin, flush=True)

    epochs = math.ceil(total_steps / data.steps_per_epoch)
    eval_every, save_every = [max(1, round(every * data.steps_per_epoch))
                              for every in (args.eval_every, args.save_every)]
    recent, since, started = [], time.time(), time.time()
    for step in range(first_step, total_steps):
        # In the first step each forward replaces the running statistics, so they begin as the attacked
        # batch's; from then on they are a slow average over both kinds (DM-AT).
        set_batchnorm(model, momentum=1.0 if step == 0 else BATCHNORM_MOMENTUM)
        if step == max(1, first_step):  # after step 0: its momentum of 1 would be compiled in as a constant
            compile_parts(args, model, teacher)
            compile_parts(args, averaged, None)
        lr, momentum = one_cycle(step // data.steps_per_epoch, epochs, args.lr)
        for group in optimizer.param_groups:
            group.update({"lr": lr} | ({"momentum": momentum} if args.optimizer == "sgd" else {}))
        ema_decay = averaging_decay(step, int(WARMUP * total_steps), args.ema_decay)
        batch = data.batch(step)
        recent.append(train_step(model, averaged, projectors, teacher, optimizer, batch, ema_decay, args))

        # Bookkeeping. The numbers in `recent` stay on the device until a row of the log is due.
        done, final = step + 1, step + 1 == total_steps
        stopping = signalled()
        evaluating = final or done % eval_every == 0
        saving = evaluating or stopping or done % save_every == 0
        if not saving and done % min(LOG_EVERY, data.steps_per_epoch):
            continue
        row = {"step": done, "epoch": done / data.steps_per_epoch, "lr": lr}
        row |= summarise(recent, done, model, last)
        row["images_per_s"] = args.batch_size * len(recent) / (time.time() - since)
        if data.rank == 0:
            if evaluating:
                row["holdout_clean"], row["holdout_robust"] = evaluate(
                    averaged, data.holdout, margin_loss, SELECTION_STEPS, args)
            log.append(row)
            minutes = (total_steps - done) * (time.time() - started) / (done - first_step) / 60
            write_log(out / "log.csv", log, minutes)
            # In this order a kill in between loses nothing: a continued run repeats the steps after last.pt.
            if is_best(args, log):
                save_atomically(checkpoint(args, run, done, log), out / "best.pt")
            if saving:
                save_atomically(checkpoint(args, run, done, log), out / "last.pt")
        last = out / "last.pt" if saving else last
        if stopping and not final:
            barrier()  # all wait until process 0 has saved
            stop(stopping, f"after step {done} of {total_steps}")
        recent, since = [], time.time()


def print_table(args, data, out):
    """Clean and PGD accuracy on test images in float32, before and after: a quick look, no result."""
    print(f"\nfirst {min(TABLE_IMAGES, len(data.test[1]))} test images, averaged model       "
          f"clean    PGD-{TABLE_STEPS} at {args.eps * 255:g}/255")
    model = build_run(args, data.device, None)[1]
    model.amp = torch.backends.cudnn.allow_tf32 = False
    for name in ("before training", "best.pt", "last.pt"):
        if name != "before training":
            saved = torch.load(out / name, map_location="cpu", weights_only=True)
            model.load_state_dict(saved["model_state_dict"])
        loss = lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum")
        clean, robust = evaluate(model, data.test, loss, TABLE_STEPS, args, limit=TABLE_IMAGES)
        print(f"  {name:42} {clean:6.2f} %  {robust:6.2f} %", flush=True)
    print("Before quoting a number, let AutoAttack judge: python eval_autoattack.py", out / "best.pt")


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    rank, world, local = [int(os.environ.get(name, default))  # as torchrun sets them
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    device = torch.device("cuda", local) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = args.amp  # torch's default allows it, for convolutions
    if world > 1:  # the others wait while process 0 evaluates or downloads: at most two hours
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    out = Path(args.out)
    if local > 0:  # the first process of each machine goes first, as it may have to download
        barrier()
    teacher = load_teacher(args, device)
    data = Data(args, device, rank, world)
    if local == 0:  # and lets the others go on, who wait at the barrier above
        barrier()
    total_steps = args.max_steps or args.epochs * data.steps_per_epoch
    run = build_run(args, device, teacher)
    if rank == 0:
        print_plan(args, data, run, teacher, total_steps)
    if args.dry_run:
        return
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out) if rank == 0 else None  # until this function returns
    handlers = {number: signal.signal(number, note_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        train(args, data, teacher, run, out, total_steps)
    finally:  # outside of training a signal ends the process at once
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if rank == 0:
        print_table(args, data, out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
