"""Adversarial training with diffusion representation alignment (DRA) on ImageNet, in one file.

Paper: "Expanding the Role of Diffusion Models for Robust Classifier Training", arXiv 2602.19931.

This is train_cifar.py for large images: the same sections and names, so `diff train_cifar.py
train_imagenet.py` shows what differs. Read that file first; it explains the method, and this one explains
what is new:

    * A backbone from timm with DINOv3's pretrained weights is fine-tuned as a whole, with Lion.
    * The teacher is LightningDiT, a diffusion transformer on the latents of an autoencoder (dit_encoder.py).
      It costs more than half as much as the step itself, so its features can also be computed once and kept.
    * Images are files, read and cropped by worker processes.
    * These backbones have no batch norm: a batch may be computed in pieces, on one GPU or on many, and is the
      same batch. So there are no switches around the attack, and no statistics to keep.

    L        = L_TRADES + lambda * L_DRA                        (eq. 4)
    L_TRADES = CE(f(x), y) + beta * KL(p(x) || p(x'))           x': the attacked image, max |x' - x| <= eps
    L_DRA    = -cos(h(enc(x')), g(x_t, t, y))                   (eq. 3)
               enc: the classifier's features, averaged over patches; h: a small MLP, the projector;
               g: features of a frozen LightningDiT for x_t, the CLEAN image's latent noised to time t

To see it run, in under two minutes on a CPU, without data or downloads (a ViT, then a ConvNeXt with targets
that are computed once):

    python train_imagenet.py --smoke

The defaults are the paper's row "DM-AT+DRA, ViT-B/16" (paper: 76.87 % clean, 55.16 % AutoAttack). Its
ConvNeXt-B row (paper: 76.03 / 56.07) differs by the name of the backbone:

    torchrun --nproc-per-node 8 train_imagenet.py --data imagenet --synthetic lightningdit-4m \
        --teacher DIT.pt VAE.pt STATS.pt [--arch convnext_base.dinov3_lvd1689m]

Word for word those of train_cifar.py (a test compares them), so that its tests speak for this file, too:
InputError, fraction, build_projector, pgd, kl_divergence, trades_loss, dra_loss, one_cycle,
averaging_decay, update_average, all_reduce, barrier, margin_loss, save_atomically, restore, write_log,
is_best, summarise, note_signal, signalled, stop, lock, compile_parts, resume.
"""
import argparse
import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
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
from timm.optim import Lion
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from dit_encoder import DiTEncoder, LightningDiT, VAEEncoder, load_dit_encoder

# -----------------------------------------------------------------------------------------------------------
# Settings. Each number says where it comes from. "stated": in the paper, or in what it refers to.
# "inherited": from DM-AT, whose recipe the paper builds on. "chosen": by us, where the paper leaves it
# open. What one changes to reproduce a row of the paper is a flag in `parse_args`; the rest of the recipe
# is here.

CROP_AREA = (0.08, 1.0)  # share of the image in a random resized crop (chosen: torchvision's default)
WARMUP = 0.025  # share of the steps with a rising learning rate, and before averaging (chosen: DM-AT's)
RESIZE = 256 / 224  # shorter side over centre crop in evaluations: RobustBench's protocol
HOLDOUT = 1024  # evenly spaced training images, never trained on, to select best.pt (chosen)
SELECTION_STEPS = 40  # PGD steps on the margin loss for that selection (chosen: DM-AT's)
PROJECTOR_WIDTH = 2048  # hidden width of h: REPA's, arXiv 2410.06940; the paper states its three layers
# Two channels of LightningDiT-XL/1 are far too large in every image. They say nothing about any one of
# them, but would decide every cosine, so they are set to zero (stated).
ZERO_CHANNELS = (1053, 259)
TEACHER_HEADS, TEACHER_SIZE = 16, 256  # attention heads and image size of LightningDiT-XL/1
CACHE_CHUNK, CACHE_BATCH = 256, 64  # images whose cached targets are written, and computed, together
TABLE_STEPS, TABLE_IMAGES = 10, 1024  # PGD for the closing table (chosen): a quick look, no result
LOG_EVERY = 50  # steps between rows of log.csv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOKE = {"data": None, "arch": None, "no_pretrained": True, "image_size": 96, "epochs": 6, "batch_size": 32,
         "lr": 4e-3, "weight_decay": 0.01, "eval_every": 3, "teacher_layer": 1, "workers": 2,
         "out": "runs/imagenet-smoke", "device": "cpu"}  # other defaults for --smoke: two minutes, two cores


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
    add("--data", default="imagenet", help="folder with train/ and val/, in each a folder per class")
    add("--synthetic", metavar="DIR", help="generated images: a folder with class folders of the same names")
    add("--synthetic-fraction", type=fraction,
        help="synthetic share of each batch, 0.7 if not given (chosen: DM-AT's for its smaller sets)")
    add("--image-size", type=int, default=224, help="pixels (stated: RobustBench's standard)")
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="image readers for each process")
    # Model and optimisation. Lion moves every weight by the learning rate, up or down, however small its
    # gradient: hence a rate far below SGD's, and a decay far above. The average of the weights over the
    # last steps is usually more robust than any one of them, and it is what gets evaluated and used.
    add("--arch", default="vit_base_patch16_dinov3.lvd1689m", help="a timm model without batch norm (stated)")
    add("--no-pretrained", action="store_true", help="start from random weights")
    add("--epochs", type=int, default=100, help="of ceil(real images / batch size) steps (stated)")
    add("--max-steps", type=int, help="number of steps, in place of --epochs")
    add("--batch-size", type=int, default=1024, help="over all processes (chosen: as for ViT-B/2)")
    add("--accumulate", type=int, default=1, help="compute each batch in so many pieces, for less memory")
    add("--lr", type=fraction, default=1e-5, help="peak learning rate of Lion (chosen)")
    add("--weight-decay", type=fraction, default=0.5, help="not of vectors (chosen: as for ViT-B/2)")
    add("--ema-decay", type=fraction, default=0.995, help="tau of the weight averaging (chosen: DM-AT's)")
    add("--label-smoothing", type=fraction, default=0.1, help="in the cross-entropy (chosen: DM-AT's)")
    # Attack. On ImageNet the standard radius is half of CIFAR's, and three steps reach a little further
    # than that. A larger beta buys robust accuracy with clean accuracy.
    add("--beta", type=fraction, default=5.0, help="weight of TRADES' KL term (chosen: DM-AT's)")
    add("--eps", type=fraction, default="4/255", help="largest change of a pixel in [0,1] (as --image-size)")
    add("--step-size", type=fraction, default="2/255", help="of the attack (chosen)")
    add("--attack-steps", type=int, default=3,
        help="PGD steps (stated); 0: x' = x, no attack (with --beta and --dra-weight 0: cross-entropy alone)")
    # Diffusion representation alignment. Middle layers of a diffusion transformer, at a time close to the
    # clean image, say most about what is in it: early layers still look at patches, late ones already
    # paint.
    add("--dra-weight", type=fraction, default=1.0, help="lambda, eq. (4) (chosen); 0: no alignment")
    add("--teacher", nargs=3, metavar=("DIT", "VAE", "STATS"),
        help="LightningDiT-XL/1, VA-VAE, latents_stats.pt (stated: the model that drew the synthetic images)")
    add("--teacher-t", type=fraction, default=0.9, help="1 is the clean image, 0 pure noise (chosen)")
    add("--teacher-layer", type=int, default=14, help="block whose input is the target (stated)")
    add("--teacher-unconditional", action="store_true", help="do not tell the teacher the label")
    add("--cache-targets", metavar="DIR",
        help="compute targets once (see `cache_targets`); default: in each step (as in the paper)")
    # Running. Only backbone and teacher compute in bfloat16; logits, projector and losses stay in float32.
    add("--out", default="runs/imagenet", help="folder for last.pt, best.pt and log.csv")
    add("--seed", type=int, default=0, help="of every random draw")
    add("--device", choices=["cuda", "cpu"], default=DEVICE, help="where to run")
    add("--no-amp", action="store_true",
        help="float32 throughout, without TF32 (CUDA's default: classifier and teacher compute in bfloat16)")
    add("--no-compile", action="store_true", help="no torch.compile (CUDA's default: compiled)")
    add("--eval-every", type=fraction, default=1, help="epochs between evaluations (chosen: DM-AT's)")
    add("--save-every", type=fraction, default=1, help="epochs between checkpoints")
    add("--smoke", action="store_true", help="two minutes on a CPU: tiny networks, random teacher")
    add("--dry-run", action="store_true", help="print the plan and stop")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)  # any other flag still beats these
    args = parser.parse_args(argv)
    finish_args(args, parser)
    return args


def finish_args(args, parser):
    """Fill in what depends on other flags, and refuse values out of range."""
    if args.dra_weight == 0:  # then nothing about the teacher matters
        args.teacher, args.cache_targets = None, None
    elif args.teacher is None and not args.smoke:
        parser.error("--teacher: expected the files of LightningDiT, VA-VAE and the latents' statistics (see "
                     "README.md), or --dra-weight 0 for plain adversarial training")
    args.amp = args.device == "cuda" and not args.no_amp  # autocast to bfloat16
    args.cached = args.cache_targets is not None
    for expected, fits, names in (
            ("above 0", lambda x: x > 0, "epochs max_steps accumulate lr step_size eval_every save_every"),
            ("at least 0", lambda x: x >= 0,
             "attack_steps beta dra_weight weight_decay teacher_layer workers"),
            ("at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed"),
            ("at least 2", lambda x: x >= 2, "batch_size"),
            ("at least 32", lambda x: x >= 32, "image_size"),
            ("above 0, up to 1", lambda x: 0 < x <= 1, "teacher_t"),
            ("at least 0 and below 1", lambda x: 0 <= x < 1,
             "eps ema_decay label_smoothing synthetic_fraction")):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not fits(value):
                parser.error(f"--{name.replace('_', '-')} {value}: expected {expected}")
    if args.synthetic_fraction and not args.synthetic and args.data is not None:
        parser.error("--synthetic-fraction: expected --synthetic DIR with it")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")


# -----------------------------------------------------------------------------------------------------------
# Model. `model(images)` gives logits. It is `model.head(model.features(images))`, and the features in
# between are what the alignment works on. Images come in [0, 1] and are normalised inside, so that an
# attack on the model is an attack in pixels, as AutoAttack and RobustBench expect.


class Classifier(nn.Module):
    """A timm backbone with its normalisation inside.

    A ViT gives tokens [B, T, D], of which the class token and the registers stay out of the mean; a
    ConvNeXt gives a map [B, D, h, w], of which the mean is taken over positions. Everything below works for
    both.
    """

    amp = False  # whether the backbone computes in bfloat16

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        mean, std = [torch.tensor(backbone.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std")]
        self.register_buffer("mean", mean, persistent=False)  # those that the weights were trained with
        self.register_buffer("std", std, persistent=False)

    def features(self, images):
        """images [B, 3, H, W] in [0, 1] -> features enc(x) [B, D], the mean over patches or positions,
        float32.

        Autocast ends here: bfloat16 has three digits, too few for logits, softmax, KL and cosine.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            tokens = self.backbone.forward_features((images - self.mean) / self.std)
            return self.backbone.forward_head(tokens, pre_logits=True).float()  # pooled and normalised

    def head(self, features):
        """[B, D] -> logits [B, num_classes]"""
        return self.backbone.get_classifier()(features)

    def forward(self, images):
        """images [B, 3, H, W] in [0, 1] -> logits f(x) [B, num_classes]."""
        return self.head(self.features(images))


def build_model(arch, num_classes, pretrained, image_size=None):
    """A classifier for images [B, 3, H, W] in [0, 1]; what is not pretrained is drawn from torch's global
    generator.

    arch: a timm model's name; pretrained: with timm's weights, downloaded on first use; image_size: if only
    images of that size will come, which spares DINOv3's ViTs some work in each forward and changes no
    result. Features are the mean over patches or positions (chosen, and said to timm, whose default differs
    by model). Raises InputError for an unknown name, weights that cannot be had, or a model that would
    break what this script promises: batch norm, whose statistics would depend on how a batch is cut into
    pieces, and dropout or stochastic depth, whose draws would not depend on seed and step alone.
    """
    if ":" in arch:  # "hf-hub:..." would fetch any repository, and a checkpoint could name one
        raise InputError(f"--arch {arch}: expected the name of a model of timm's own")
    size = {}
    if image_size and image_size % 16 == 0 and arch.startswith("vit_") and "_patch16_dinov3" in arch:
        # Otherwise timm makes the grid of positions on the CPU in each forward, and a GPU waits for it.
        size = {"img_size": image_size, "dynamic_img_size": False}
    try:
        backbone = timm.create_model(arch, pretrained, num_classes=num_classes, global_pool="avg", **size)
    except Exception as error:  # timm and its hub raise errors of many kinds
        what = "its pretrained weights" if pretrained else "it"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--arch {arch}: timm cannot build {what} ({reason})") from None
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(f"--arch {arch}: has batch norm, expected a model without, such as a ViT")
        if isinstance(module, (nn.Dropout, timm.layers.DropPath)):
            if getattr(module, "p", 0) or getattr(module, "drop_prob", 0):
                raise InputError(f"--arch {arch}: has dropout or stochastic depth, expected a model without")
    return Classifier(backbone)


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


def kl_divergence(clean_logits, adv_logits, reduction):
    """KL(p(x) || p(x')) from logits [B, classes], in float32. Log-probabilities on both sides: with plain
    ones the gradient into the clean logits is NaN as soon as a probability underflows."""
    clean_log_p = clean_logits.float().log_softmax(dim=1)
    adv_log_p = adv_logits.float().log_softmax(dim=1)
    return F.kl_div(adv_log_p, clean_log_p, reduction=reduction, log_target=True)


def trades_attack(model, images, start, eps, step_size, steps, clean_logits=None):
    """The adversary of TRADES as DM-AT runs it: x' within eps of x that maximises KL(p(x) || p(x')).

    images [B, 3, H, W] in [0, 1]; start: the first x', drawn from U(-eps, eps) around images and clamped to
    [0, 1]. clean_logits [B, classes]: the model's logits of `images`. The training step has them from its
    own forward; if None, they are computed here. Returns x' [B, 3, H, W] in [0, 1], detached.
    """
    # Only the image's gradient is needed. A compiled backward pass would compute the weights' as well, for
    # nothing.
    weights = [p for p in model.parameters() if p.requires_grad]
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

    batch.images x [B, 3, H, W] in [0, 1], batch.labels y [B], batch.start like images, and for the
    alignment either batch.target [B, width] from the cache or batch.teacher_noise [B, *latent_shape].
    projectors: one, or none without alignment. ema_decay: see `averaging_decay`. args: eps, step_size,
    attack_steps, beta, label_smoothing, dra_weight, teacher_t, teacher_unconditional, accumulate. Returns
    detached scalars by name, left on the device.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    numbers = []
    for part in split_batch(batch, args.accumulate):  # exact up to rounding: no layer mixes images
        images, labels = part.images, part.labels

        # The clean forward comes first and serves twice: the attack moves away from its p(x), and L
        # contains it.
        clean_logits = model(images)

        # The attack is PGD, eq. (2). Eq. (1) would have it maximise the cross-entropy; TRADES maximises KL.
        adv = images  # x' = x: plain training, if there is nothing to attack with
        if args.eps > 0 and args.attack_steps > 0:
            adv = trades_attack(model, images, part.start, args.eps, args.step_size, args.attack_steps,
                                clean_logits)

        # L_TRADES. Two forwards of B images, as on CIFAR. One of 2B would give the same, with more memory
        # and with the clean one too late for the attack.
        adv_features = model.features(adv)  # enc(x'), [B, D]
        adv_logits = model.head(adv_features)
        trades = trades_loss(clean_logits, adv_logits, labels, args.beta, args.label_smoothing)

        # L_DRA, eq. (3). The teacher gets the CLEAN image, encodes it to a latent z, and makes x_t = t z +
        # (1 - t) noise itself. The gradient trains h and, through enc(x'), the backbone, but not `head`,
        # which the features never pass here. It stops at the attacked image, which is data by now, and at
        # the teacher, which is frozen.
        alignment = trades.new_zeros(())
        for projector in projectors:
            target = part.target  # from the cache, [B, width]
            if target is None:  # g(x_t, t, y), now
                given_labels = None if args.teacher_unconditional else labels
                target = teacher(images, given_labels, args.teacher_t, part.teacher_noise)
            alignment = dra_loss(projector(adv_features), target)

        # Eq. (4). Every term is a mean over images, so the mean of the pieces' losses is that of the batch.
        loss = trades + args.dra_weight * alignment
        (loss / args.accumulate).backward()
        clean, robust = [(logits.argmax(1) == labels).float().mean() for logits in (clean_logits, adv_logits)]
        numbers.append(torch.stack([loss, trades, -alignment, clean, robust]).detach())
    average_gradients([*model.parameters(), *projectors.parameters()])  # over the processes of torchrun
    optimizer.step()
    update_average(averaged, model, ema_decay)

    names = ("loss", "trades", "cosine", "train_clean", "train_robust")
    means = dict(zip(names, torch.stack(numbers).mean(dim=0)))
    return {name: value for name, value in means.items() if name != "cosine" or len(projectors)}


def split_batch(batch, pieces):
    """A batch's tensors, cut into that many pieces of equal size; what is None stays so.

    A ViT-B/16 keeps the activations of all its layers for a backward pass, so memory grows with the images
    that are computed together. In pieces a batch of 1,024 fits any GPU, at the same speed as long as a
    piece fills it.
    """
    columns = {name: [None] * pieces if value is None else value.chunk(pieces)
               for name, value in vars(batch).items()}
    return [SimpleNamespace(**{name: column[i] for name, column in columns.items()}) for i in range(pieces)]


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
    """Lion (stated; arXiv 2302.06675, from timm) over all parameters of `modules`. Without weight decay on
    vectors: biases, layer norms, and the factors that scale a block's output (chosen). Decay pulls towards
    zero, which is a sensible place for a matrix, but not for the scale of a layer norm."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1]},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return Lion(groups, lr=args.lr, weight_decay=args.weight_decay, foreach=True)


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
    """Mean gradient over all processes. By hand rather than by DistributedDataParallel: in a step that
    costs as much as 12 forwards there is little to gain from its overlapping, and the accumulated pieces of
    a batch need no special care."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is not None:
                all_reduce(parameter.grad).div_(dist.get_world_size())


# -----------------------------------------------------------------------------------------------------------
# Data, from disk to one augmented batch on the device. Every draw is a function of (seed, step). What is
# drawn on the device is drawn for the whole batch, and each process takes its share of it.


def random_seed(seed, position, purpose):
    """A number that depends on (seed, position, purpose) alone. position: an int or several; purpose: a
    short text, so that draws for different purposes at the same step are independent."""
    mixed = np.random.SeedSequence([seed, *np.atleast_1d(position).tolist(), *purpose.encode()])
    return int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed, position, purpose, device="cpu"):
    """A random generator that depends on (seed, position, purpose) alone, see `random_seed`."""
    return torch.Generator(device).manual_seed(random_seed(seed, position, purpose))


class Folder:
    """The images under class folders, in sorted order: the k-th folder holds label k, so real, synthetic and
    validation images have to have the same folder names.

    Names and labels are two compact arrays. Millions of Python objects would be copied, bit by bit, into each
    process that reads images, as soon as their reference counts are touched.
    """

    def __init__(self, path):
        path = os.path.expanduser(path)
        try:
            found = ImageFolder(path)
        except OSError as error:
            raise InputError(f"{path}: expected a folder with a folder of images for each class "
                             f"({str(error).splitlines()[0]})") from None
        self.path, self.classes = path, found.classes
        self.names = np.array([os.fsencode(os.path.relpath(name, path)) for name, _ in found.samples])
        self.labels = np.array(found.targets)

    def __len__(self):
        return len(self.labels)

    def read(self, index, transform):
        """transform(image number `index`, a PIL image in RGB). Raises InputError, which names the file."""
        path = os.path.join(self.path, os.fsdecode(self.names[index]))
        try:
            with Image.open(path) as image:
                return transform(image.convert("RGB"))
        except Exception as error:  # a damaged file can fail in any way
            raise InputError(f"{path}: cannot be read as an image ({type(error).__name__})") from None

    def digest(self, sizes=False):
        """A fingerprint of the names of classes and files, with `sizes` also of the files' sizes."""
        digest = hashlib.sha256("/".join(self.classes).encode(errors="surrogateescape"))
        for name in self.names.tolist():
            size = os.path.getsize(os.path.join(os.fsencode(self.path), name)) if sizes else ""
            digest.update(b"%s %s/" % (name, str(size).encode()))
        return digest.hexdigest()[:16]


def open_folder(path, classes):
    """A Folder with exactly these classes. Raises InputError where it has others: labels are positions in
    the list of class folders, so one folder more or less would shift all labels after it."""
    folder = Folder(path)
    if folder.classes != classes:
        different = sorted(set(folder.classes) ^ set(classes))
        raise InputError(f"{path}: has {len(folder.classes)} class folders, expected the {len(classes)} "
                         f"of train/ (differs in {different[0]})")
    return folder


def locate(folders, index):
    """Image `index`, counted through real and then synthetic images -> (its Folder, its number there).

    One numbering for both, as in the batches, in the cache of targets, and in train_cifar.py's `parts`.
    """
    return (folders[0], index) if index < len(folders[0]) else (folders[1], index - len(folders[0]))


def to_pixels(image):
    """PIL image -> uint8 [3, H, W]. As bytes, images go from process to process, and to the GPU, at a
    quarter of the size that they have as float32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Augmented(Dataset):
    """Training images by (step, slot in the batch, number): a random resized crop and a flip.

    Both depend on (seed, step, slot) alone, and so not on which process reads the image, nor on what that
    has read before: a run that continues, or has more workers, sees the same pixels.
    """

    def __init__(self, folders, args):
        self.folders, self.seed, self.cache = folders, args.seed, args.cache_targets
        self.crop = transforms.RandomResizedCrop(args.image_size, scale=CROP_AREA)

    def __getitem__(self, key):
        """-> image uint8 [3, H, W], label, cached target float16 [width] (empty without a cache)."""
        step, slot, index = key
        folder, number = locate(self.folders, index)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            torch.manual_seed(random_seed(self.seed, (step, slot), "augment"))
            pixels, flip = to_pixels(folder.read(number, self.crop)), int(torch.rand(()) < 0.5)
        target = read_target(self.cache, index, flip) if self.cache else torch.zeros(0)
        return pixels.flip(2) if flip else pixels, int(folder.labels[number]), target


class Centred(Dataset):
    """Images by number, the shorter side resized and the centre cropped: for evaluations, where it is
    RobustBench's protocol, and for cached targets, where it is what LightningDiT was trained on."""

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


def answer_signals(_worker):
    """In a process that reads images: Ctrl-C and SIGTERM often go to a whole group of processes (a
    terminal's, Slurm's), and are the training process's to answer. Only its own SIGTERM ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)
    threading.Thread(target=wait, daemon=True).start()


def draw_smoke_folders(path, seed, train_count=40):
    """An ImageNet in small, train/, val/ and synthetic/ with JPEG files, that a tiny network learns in a
    minute: horizontal and vertical waves, each in five colours, with random phase, frequency and contrast,
    and noise."""
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
    """Real and synthetic training images, held-out and validation images, and the batches drawn from them.

    Held-out images are spread evenly over the sorted files, so that all classes are among them; on CIFAR,
    whose images come shuffled, the first ones do. The validation images are never looked at in training:
    `test` is a spread of them for the closing table.
    """

    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        real = Folder(os.path.join(args.data, "train"))
        self.classes = real.classes
        validation = open_folder(os.path.join(args.data, "val"), self.classes)
        # Images are numbered through both folders: the real ones first, then the synthetic ones.
        self.folders = [real] + [open_folder(path, self.classes) for path in [args.synthetic] if path]
        held = np.unique(np.linspace(0, len(real) - 1, min(HOLDOUT, len(real) // 10)).astype(int))
        if not len(held):
            raise InputError(f"--data {args.data}: has {len(real)} training images, expected at least 10")
        crop = args.image_size, round(args.image_size * RESIZE)
        self.holdout = Centred(self.folders, held, *crop)
        table = np.unique(np.linspace(0, len(validation) - 1, TABLE_IMAGES).astype(int))
        self.test = Centred([validation], table, *crop)
        self.real = torch.from_numpy(np.setdiff1d(np.arange(len(real)), held))  # numbers of those to train on
        self.n_real_images, self.n_synthetic_images = len(self.real), sum(map(len, self.folders[1:]))
        args.classes = self.classes  # their names, in the order of the labels
        # Checksums of all names, in `args`, where `restore` compares them: a run should not go on with
        # other images by mistake.
        args.images = [folder.digest() for folder in self.folders]

        # An epoch has as many steps as all real images, held-out ones included, would fill (DM-AT).
        self.steps_per_epoch = math.ceil(len(real) / args.batch_size)
        if args.synthetic and args.synthetic_fraction is None:
            args.synthetic_fraction = 0.7
        # Synthetic images in a batch are rounded down (DM-AT).
        self.n_real = args.batch_size - int(args.batch_size * (args.synthetic_fraction or 0))
        if self.n_real > self.n_real_images:
            raise InputError(f"--batch-size {args.batch_size}: has {self.n_real} real images, "
                             f"expected at most the {self.n_real_images} that there are")
        if args.batch_size % (world * args.accumulate):
            raise InputError(f"--batch-size {args.batch_size}: expected a multiple of "
                             f"{world * args.accumulate} ({world} processes, --accumulate {args.accumulate})")
        self.order_of_pass = (None, None)  # number of the current pass over the real images, and its order

    def draw_indices(self, step):
        """Which images the global batch of a step holds: int64 [batch_size], numbered through `folders`.

        Real ones are consecutive pieces of passes over all of them, each pass in an order of its own; a
        batch may end one pass and begin the next. Synthetic ones are drawn with replacement, anew in each
        step.
        """
        seed, pieces = self.args.seed, []
        position, end = step * self.n_real, (step + 1) * self.n_real
        while position < end:
            number, offset = divmod(position, self.n_real_images)
            if self.order_of_pass[0] != number:
                order = torch.randperm(self.n_real_images, generator=generator(seed, number, "pass"))
                self.order_of_pass = number, order
            pieces.append(self.real[self.order_of_pass[1][offset:offset + end - position]])
            position += len(pieces[-1])
        if self.n_synthetic_images:
            drawn = torch.randint(self.n_synthetic_images, (self.args.batch_size - self.n_real,),
                                  generator=generator(seed, step, "synthetic"))
            pieces.append(len(self.folders[0]) + drawn)
        return torch.cat(pieces)

    def load(self, first_step, total_steps):
        """Iterate over what `Augmented` gives for this process's share of each step's batch: every
        `world`-th image.

        Worker processes decode JPEGs and crop while the GPU computes; a step of 12 forwards gives them much
        time. The list of what to read is drawn here, in order, so a run that continues begins in the middle
        of it.
        """
        shares = ([(step, slot, index) for slot, index in enumerate(self.draw_indices(step).tolist())]
                  [self.rank::self.world] for step in range(first_step, total_steps))
        return iter(DataLoader(Augmented(self.folders, self.args), batch_sampler=shares,
                               num_workers=self.args.workers, pin_memory=self.device.type == "cuda",
                               worker_init_fn=answer_signals))

    def batch(self, step, loaded, latent_shape=None):
        """All that `train_step` needs for one step. loaded: its images, labels and cached targets as from
        `load`.

        The attack's start and the teacher's noise are drawn here, on the device: they are as large as the
        images, and a GPU draws them in no time.

        Returns images [B, 3, H, W] in [0, 1], labels [B], start: the attack's first point, and target [B,
        width] or, where latent_shape says that there is a teacher to ask, teacher_noise [B, *latent_shape];
        None for what is not needed.
        """
        args, device, mine = self.args, self.device, slice(self.rank, None, self.world)
        images, labels, target = [tensor.to(device, non_blocking=True) for tensor in loaded]
        images = images.float() / 255  # [B, 3, H, W] in [0, 1]
        # One stream of random numbers, read in this order. Always for the whole batch, of which this
        # process then takes its share: so two processes see the starts and noise that one would see.
        random, shape = generator(args.seed, step, "batch", device), (args.batch_size, *images.shape[1:])
        start = images + args.eps * (2 * torch.rand(shape, generator=random, device=device)[mine] - 1)
        noise = None
        if latent_shape:
            noise = torch.randn((args.batch_size, *latent_shape), generator=random, device=device)[mine]
        return SimpleNamespace(images=images, labels=labels, start=start.clamp(0, 1), teacher_noise=noise,
                               target=target.float() if args.cache_targets else None)


def cache_targets(args, data, teacher):
    """Compute the teacher's features once, of each image's centre crop and its mirror image, under noise that
    is fixed per image and view, and keep them as float16.

    A step with ViT-B/16 costs 431 GFLOP per image and the teacher 257 (138 the autoencoder, 119 the
    transformer), so this saves more than a third of the arithmetic of every epoch after the first. What
    changes against the paper's targets: the classifier sees a piece of the image while the target describes
    its middle, and the noise is the same in every epoch. DIR has a file for every CACHE_CHUNK images, so a
    stopped run goes on where it was, with any number of processes. Raises InputError where DIR was made from
    other images or settings, SystemExit on a signal.
    """
    path, count = Path(args.cache_targets), sum(map(len, data.folders))
    if data.rank == 0:
        weights = hashlib.sha256()
        for tensor in teacher.state_dict().values():
            weights.update(tensor.cpu().contiguous().numpy())
        path.mkdir(parents=True, exist_ok=True)
        held = lock(path)
        prepare_cache(path, {
            "images": [folder.digest(sizes=True) for folder in data.folders], "count": count,
            "width": teacher.width, "teacher": weights.hexdigest()[:16], "layer": args.teacher_layer,
            "t": args.teacher_t, "labels": not args.teacher_unconditional, "seed": args.seed,
            "bfloat16": args.amp, "chunk": CACHE_CHUNK})
    barrier()
    chunks = range(math.ceil(count / CACHE_CHUNK))
    todo = [chunk for chunk in chunks if not chunk_file(path, chunk).exists()][data.rank::data.world]
    barrier()  # all have seen the same state before anyone adds to it
    numbers = [range(count)[chunk * CACHE_CHUNK:(chunk + 1) * CACHE_CHUNK] for chunk in todo]
    crops = Centred(data.folders, np.arange(count), teacher.image_size, teacher.image_size)
    loader = DataLoader(crops, batch_sampler=numbers, num_workers=args.workers, worker_init_fn=answer_signals)
    progress = tqdm(loader, desc="caching targets", unit=" chunks", disable=None if data.rank == 0 else True)
    for chunk, loaded in zip(todo, progress):
        pieces = zip(*(tensor.split(CACHE_BATCH) for tensor in loaded))
        targets = torch.cat([both_views(args, teacher, *piece) for piece in pieces])  # [chunk, 2, width]
        if not targets.isfinite().all():
            raise InputError("--cache-targets: some of the teacher's features are too large for float16")
        save_atomically(targets, chunk_file(path, chunk))
        if SIGNALS:
            break
    stopping = signalled()
    if stopping:
        stop(stopping, "while caching targets")


@torch.no_grad()
def both_views(args, teacher, images, labels, numbers):
    """The teacher's features of images uint8 [n, 3, H, W] and their mirror images: float16 [n, 2, width].

    Both, since training flips half of its images, and a mirrored image should not have to predict features
    of the original. float16 is exact to three digits, which a cosine of 1152 numbers does not notice.
    """
    shape, device = (2, *teacher.latent_shape), teacher.mean.device
    noise = [torch.randn(shape, generator=generator(args.seed, int(number), "cache")) for number in numbers]
    noise = torch.stack(noise).to(device)  # [n, 2, *latent_shape], a function of the image's number
    images = images.to(device).float() / 255  # [n, 3, H, W] in [0, 1]
    given_labels = None if args.teacher_unconditional else labels.to(device)
    views = [teacher(view, given_labels, args.teacher_t, noise[:, i])
             for i, view in enumerate((images, images.flip(3)))]
    return torch.stack(views, dim=1).half().cpu()


def prepare_cache(path, made_from):
    """Begin a cache in the folder `path`, or see that the one there was made from the same.

    made_from: what the features depend on. It is kept beside them, since a cache of other images, of another
    block or of another teacher would look just as good, and train another classifier.
    """
    description = path / "targets.json"
    if description.exists():
        try:
            there = json.loads(description.read_text())
            difference = [f"{name} {there.get(name)} there, {value} now" for name, value in made_from.items()
                          if there.get(name) != value]
        except (ValueError, AttributeError):
            difference = ["its targets.json is damaged"]
        if difference:
            raise InputError(f"--cache-targets {path}: was made from something else "
                             f"({'; '.join(difference)}); choose another folder")
    elif {item.name for item in path.iterdir()} - {"lock", "targets.json.tmp"}:
        raise InputError(f"--cache-targets {path}: holds something else, expected a new or empty folder")
    else:
        save_atomically(json.dumps(made_from, indent=1), description)


def chunk_file(cache, chunk):
    """Where the targets of images chunk * CACHE_CHUNK and following are kept: float16 [images, 2, width]."""
    return Path(cache, f"{chunk:06}.pt")


def read_target(cache, index, flip):
    """The cached target of image `index`, mirrored if `flip`: float16 [width]. The file is mapped, so a row
    of 2.3 kB is all that is read."""
    path = chunk_file(cache, index // CACHE_CHUNK)
    try:
        return torch.load(path, mmap=True, weights_only=True)[index % CACHE_CHUNK, flip].clone()
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path}: damaged ({type(error).__name__}); remove it to compute it again") from None


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


def evaluate(model, source, loss, steps, args):
    """Clean and robust accuracy in percent, the latter under PGD on `loss` from one random start per image.

    model: frozen and in evaluation mode. source: a `Centred`, so images as in RobustBench's protocol. In
    the run this is process 0's work while the others wait.
    """
    clean, robust, device = 0, 0, next(model.parameters()).device
    loader = DataLoader(source, batch_size=64, num_workers=args.workers, worker_init_fn=answer_signals)
    for number, (images, labels, _) in enumerate(loader):
        images, labels = images.to(device).float() / 255, labels.to(device)  # [64, 3, H, W] in [0, 1]
        random = generator(args.seed, number, "evaluate", device)
        start = images + args.eps * (2 * torch.rand(images.shape, generator=random, device=device) - 1)
        start = start.clamp(0, 1)
        adv = pgd(lambda x: loss(model(x), labels), images, start, args.eps, args.step_size, steps)
        with torch.no_grad():
            clean += (model(images).argmax(dim=1) == labels).sum().item()
            robust += (model(adv).argmax(dim=1) == labels).sum().item()
    return 100 * clean / len(source), 100 * robust / len(source)


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
    are DM-AT's keys, state_dict (averaged) is RobustBench's."""
    model, averaged, projectors, optimizer = run
    weights = averaged.state_dict()
    return {"model_state_dict": weights, "state_dict": weights,
            "unaveraged_model_state_dict": model.state_dict(), "projector": projectors.state_dict(),
            "optimizer": optimizer.state_dict(), "step": step, "log": log, "args": vars(args),
            "arch": args.arch, "dataset": "imagenet", "num_classes": averaged.backbone.num_classes,
            "classes": args.classes, "mean": averaged.mean.flatten().tolist(),
            "std": averaged.std.flatten().tolist()}


# Settings that may differ when a run continues: where files lie (`images` tells whether they are the same
# ones), where it runs, in which precision and pieces, and how often it saves.
MAY_DIFFER = {"data", "synthetic", "cache_targets", "workers", "accumulate", "out", "device", "amp", "no_amp",
              "no_compile", "save_every", "dry_run"}


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


def load_teacher(args, data):
    """The frozen diffusion encoder g, or None without alignment. Raises InputError where it does not fit.

    To align with another teacher, return it here: a frozen module in evaluation mode, on the device, with
    `width`, `layer` (a name), `latent_shape` (of its noise), `image_size`, `num_classes` and `mean` (any
    tensor on its device), called as teacher(images in [0, 1], labels or None, t, noise) and giving features
    [B, width].
    """
    if args.dra_weight == 0:
        return None
    few = [data.holdout[i][0] for i in range(min(4, len(data.holdout)))]
    images = torch.stack(few).float() / 255  # [4, 3, H, W] in [0, 1]
    try:
        if args.teacher:
            teacher = load_dit_encoder(*args.teacher, args.teacher_layer, ZERO_CHANNELS, TEACHER_HEADS,
                                       TEACHER_SIZE)
        else:  # the smoke run: a random network's features are a poor target, but they take the same path
            torch.manual_seed(args.seed)
            vae = VAEEncoder(32, [(32, 1, False), (32, 1, True)], latent_channels=4)
            dit = LightningDiT(64, 2, 128, 4, 2, 64, len(data.classes) + 1, args.teacher_layer)
            teacher = DiTEncoder(vae, dit, image_size=32)
            teacher.checked = True  # there are no statistics that random latents would have to fit
        teacher(images, None, args.teacher_t)  # it looks whether autoencoder and statistics fit the images
    except (ValueError, OSError) as error:
        raise InputError(f"--teacher {error}") from None
    if teacher.num_classes != len(data.classes) and not args.teacher_unconditional:
        raise InputError(f"--teacher {args.teacher[0]}: knows {teacher.num_classes} classes, expected "
                         f"{len(data.classes)} ({args.data}); --teacher-unconditional drops the labels")
    teacher.amp = args.amp
    return teacher.to(data.device, memory_format=torch.channels_last)


def build_run(args, data, teacher, pretrained=False):
    """Model, its average, projectors and optimizer: a function of the settings and the seed alone."""
    torch.manual_seed(args.seed)
    model = build_model(args.arch, len(data.classes), pretrained, args.image_size)
    try:
        with torch.no_grad():
            features = model.eval().features(torch.zeros(1, 3, args.image_size, args.image_size))
            model.head(features)
        width = features.shape[1]
    except Exception as error:  # timm's models fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--image-size {args.image_size}: {args.arch} does not take it ({reason})") from None
    projectors = nn.ModuleList([build_projector(width, teacher.width)] if teacher else []).to(data.device)
    model.to(data.device, memory_format=torch.channels_last)  # the faster layout for convolutions
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
    weights = "random weights" if args.no_pretrained else "pretrained"
    print(f"model    {args.arch}, {weights}, {size(run[0])}, in {'bfloat16' if args.amp else 'float32'}")
    print(f"data     {data.n_real_images:,} real images and {data.n_synthetic_images:,} synthetic ones,",
          f"{len(data.holdout):,} held out, in {len(data.classes)} classes, at {args.image_size} px")
    print(f"steps    {total_steps:,} = {total_steps / data.steps_per_epoch:g} epochs; in each {data.n_real}",
          f"real + {args.batch_size - data.n_real} synthetic images, on {data.world} process(es) in",
          f"{args.accumulate} piece(s)")
    print(f"attack   eps {args.eps * 255:g}/255, {args.attack_steps} steps of {args.step_size * 255:g}/255")
    about = "none: no alignment"
    if teacher:
        about = f"{args.teacher[0] if args.teacher else 'random'}: block {teacher.layer}, {size(teacher)}; "
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
    if args.cache_targets:
        cache_targets(args, data, teacher)
        teacher.cpu()  # it has done its part, and its memory is needed
        teacher = None
    if data.rank == 0:
        begin = f"continuing {last} after step {first_step} of {total_steps}" if last else "starting"
        print(begin, flush=True)

    eval_every, save_every = [max(1, round(every * data.steps_per_epoch))
                              for every in (args.eval_every, args.save_every)]
    compile_parts(args, model, teacher)
    compile_parts(args, averaged, None)
    loader = data.load(first_step, total_steps)
    recent, since, started = [], time.time(), time.time()
    for step in range(first_step, total_steps):
        lr, _ = one_cycle(step, total_steps, args.lr)  # by step (chosen); Lion's betas stay as they are
        for group in optimizer.param_groups:
            group["lr"] = lr
        ema_decay = averaging_decay(step, int(WARMUP * total_steps), args.ema_decay)
        batch = data.batch(step, next(loader), teacher.latent_shape if teacher else None)
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
    """Clean and PGD accuracy on validation images in float32, before and after: a quick look, no result.

    Pretrained weights have a new, random last layer, so "before" would say nothing about them.
    """
    print(f"\n{len(data.test)} validation images, averaged model                "
          f"clean    PGD-{TABLE_STEPS} at {args.eps * 255:g}/255")
    model = build_run(args, data, None)[1]
    model.amp = torch.backends.cudnn.allow_tf32 = False
    for name in ["before training"] * args.no_pretrained + ["best.pt", "last.pt"]:
        if name != "before training":
            saved = torch.load(out / name, map_location="cpu", weights_only=True)
            model.load_state_dict(saved["model_state_dict"])
        loss = lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum")
        clean, robust = evaluate(model, data.test, loss, TABLE_STEPS, args)
        print(f"  {name:42} {clean:6.2f} %  {robust:6.2f} %", flush=True)
    print("Before quoting a number, let AutoAttack judge: python eval_autoattack.py", out / "best.pt")


def run_once(args, device, rank, world, local):
    """One training run: data, teacher, model, then training and the closing table.

    Pretrained weights are only fetched where a run begins; one that continues has all of its weights in its
    checkpoint.
    """
    out = Path(args.out)
    if local > 0:  # the first process of each machine goes first, as it may have to download
        barrier()
    data = Data(args, device, rank, world)
    teacher = load_teacher(args, data)
    begun = any((out / name).exists() for name in ("last.pt", "best.pt"))  # then weights come from there
    run = build_run(args, data, teacher, pretrained=not (args.no_pretrained or args.dry_run or begun))
    if local == 0:  # and lets the others go on, who wait at the barrier above
        barrier()
    total_steps = args.max_steps or args.epochs * data.steps_per_epoch
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
    if args.smoke and args.data is None:
        args.data = os.path.join(args.out, "data")
        args.synthetic = args.synthetic or os.path.join(args.data, "synthetic")
        if local == 0:
            draw_smoke_folders(Path(args.data), args.seed)
    if args.arch is not None:
        run_once(args, device, rank, world, local)
    else:  # the smoke run: both kinds of backbone, targets computed in each step and cached ones
        cache = args.cache_targets or (os.path.join(args.out, "targets") if args.dra_weight else None)
        for arch, cache in (("test_vit", args.cache_targets), ("test_convnext", cache)):
            changes = {"arch": arch, "cache_targets": cache, "cached": cache is not None,
                       "out": os.path.join(args.out, arch)}
            run_once(argparse.Namespace(**vars(args) | changes), device, rank, world, local)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        # An error in a worker process comes with its own traceback in front; the last line says what is
        # wrong.
        print(f"error: {str(problem).strip().splitlines()[-1].split('InputError: ')[-1]}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
