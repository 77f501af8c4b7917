"""Adversarial training with diffusion representation alignment (DRA) on CIFAR-sized images, in one file.

Paper: "Expanding the Role of Diffusion Models for Robust Classifier Training", arXiv 2602.19931.

A robust classifier stays right when an adversary changes every pixel of the image by at most eps. Adversarial
training attacks each training image first and then learns from the attacked one. A diffusion model helps in
two ways. The images that it generates are additional training data (DM-AT, arXiv 2302.04638). And its inner
features describe what an image shows, so the classifier learns features of the attacked image from which they
can be predicted. At test time the classifier stands alone and costs nothing extra.

    min E[ max_x' CE(f(x'), y) ]   where |x' - x| <= eps        (eq. 1) adversarial training
    x' <- P(x' + step * sign(gradient of the loss at x'))       (eq. 2) PGD, the attack; P: into the eps-ball

    L        = L_TRADES + lambda * L_DRA                        (eq. 4)
    L_TRADES = CE(f(x), y) + beta * KL(p(x) || p(x'))           TRADES, arXiv 1901.08573, in place of eq. 1
    L_DRA    = -cos(h(enc(x')), g(x_t, t, y))                   (eq. 3)
               f:   the classifier's logits, head(enc(x)); enc: its penultimate features; p = softmax(f)
               h:   a small MLP, the projector; it is trained along and then thrown away
               g:   features of a frozen diffusion model (EDM, arXiv 2206.00364, see edm_encoder.py) for x_t,
                    the CLEAN image x with noise of level t added. EDM and this code call the level sigma

To see it run, in about a minute on a CPU, without data or downloads:

    python train_cifar.py --smoke

The defaults aim at the paper's CIFAR-10 row "AT+DRA, WRN-34-10" (paper: 88.54 % clean, 57.29 % AutoAttack).
The second command is its row with a million synthetic images (paper: 92.36 / 64.12). The third runs on eight
GPUs:

    python train_cifar.py --out runs/wrn-34-10
    python train_cifar.py --arch wrn-28-10 --synthetic 1m.npz --batch-size 512 --epochs 400 --out runs/1m
    torchrun --nproc-per-node 8 train_cifar.py ...

To follow one batch from disk to loss, read `Data.draw`, `Data.read` and `Data.batch`, then `train_step`.

A run writes last.pt, best.pt and log.csv to --out. If it is killed, the same command continues it.
"""
import argparse
import contextlib
import copy
import csv
import math
import mmap
import os
import re
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
from filelock import FileLock, Timeout
from torch import nn

from edm_encoder import EDMEncoder, InputError, check_file, load_edm_encoder

# -----------------------------------------------------------------------------------------------------------
# Settings. Each number says where it comes from. "stated": in the paper, or in what it refers to.
# "inherited": from DM-AT's code, whose setup the paper says it follows. "chosen": by us, where the paper
# leaves it open. What one may want to vary is a flag, see `parse_args`; the rest is here.

# Mean and deviation per RGB channel, for WideResNets (inherited). The teacher is the EDM that drew DM-AT's
# images (stated). "npz": images of your own, in any number of classes, with their own mean and deviation.
DATASETS = {
    "cifar10": SimpleNamespace(
        classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616),
        teacher="https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl"),
    "cifar100": SimpleNamespace(
        classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
        teacher="https://huggingface.co/wzekai99/DM-Improves-AT/resolve/main/others/"
                "edm-cifar100-32x32-cond-vp.pkl"),
    "npz": SimpleNamespace(classes=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), teacher=None),
}
VITS = {"vit-b-2": (12, 768, 12), "vit-tiny-2": (2, 64, 2)}  # depth, width and heads; the tiny one for tests
WARMUP = 0.025  # share of the epochs with a rising rate, and of the steps before averaging (inherited)
# BatchNorm's running statistics move by this share towards those of each new batch (inherited). torch's
# default is ten times as fast. Slower is better here, as they have to average clean and attacked batches.
BATCHNORM_MOMENTUM = 0.01
CROP_PADDING = 4  # pixels of border around an image before the random crop (inherited)
HOLDOUT = 1024  # first training images, never trained on, to select best.pt (inherited); at most a tenth
SELECTION_STEPS = 40  # PGD steps on the margin loss for that selection (inherited)
PROJECTOR_WIDTH = 2048  # hidden width of h: REPA's, arXiv 2410.06940; the three layers are stated
EXTRA_LOG_SIGMA = (-1.2, 1.2)  # mean and deviation of ln(sigma) for --extra-sigma: those of EDM's training
LOG_EVERY = 50  # steps between rows of log.csv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Other defaults for --smoke.
SMOKE = {"arch": "wrn-10-1", "epochs": 4, "batch_size": 64, "out": "runs/smoke", "device": "cpu"}


def flag_type(description, convert, fits):
    """A type for argparse: convert(value) where fits(value), else one line that gives the description. A
    value may be written as a fraction: pixel distances come in 255ths, such as 8/255."""
    def parse(text):
        with contextlib.suppress(ValueError, ZeroDivisionError, OverflowError):
            if fits(Fraction(text)):
                return convert(Fraction(text))
        raise argparse.ArgumentTypeError(f"{text!r}: expected {description}")
    return parse


number = flag_type("a number of at least 0", float, lambda x: x >= 0)
positive = flag_type("a number above 0", float, lambda x: x > 0)
fraction = flag_type("a number of at least 0 and below 1", float, lambda x: 0 <= x < 1)
whole = flag_type("a whole number of at least 0", int, lambda x: x.denominator == 1 and 0 <= x < 2**63)
count = flag_type("a whole number above 0", int, lambda x: x.denominator == 1 and 0 < x < 2**63)
grey = flag_type("a whole number from 0 to 255", int, lambda x: x.denominator == 1 and 0 <= x < 256)


# The recipe belongs to the architecture. WideResNets follow DM-AT (inherited), ViTs follow Wu et al. (AAAI
# 2025; stated, numbers from their public code). Each row is a flag, so each number can be set by itself.
# A larger beta gives more robust and less clean accuracy. What is no single number:
#
#                          wrn-*                        vit-*
#   `build_optimizer`      SGD with Nesterov momentum   Lion, betas 0.95 and 0.98
#   `build_scheduler`      one cycle, by epoch          5 epochs up from 1e-6, half a cosine to 1e-5, by step
#   `averaging_decay`      rises to tau after 2.5 %     tau from the first step on
#   to be judged           best.pt                      last.pt, the last average
RECIPES = {
    # flag                 type      wrn-*  vit-*   meaning
    "lr":                 (positive, 0.2,   1e-4,   "peak learning rate"),  # 0.2 is for batches of 512
    "weight_decay":       (number,   5e-4,  0.5,    "pull of the weights towards 0"),
    "max_norm":           (number,   0.0,   1.0,    "largest norm of the whole gradient; 0: any"),
    "beta":               (number,   5.0,   3.0,    "weight of TRADES' KL term"),
    "label_smoothing":    (fraction, 0.1,   0.4,    "in the cross-entropy"),
    "ema_decay":          (fraction, 0.995, 0.9999, "tau of the weight averaging"),
    # 0.7: DM-AT's. 0.8: Wu et al.'s, and for a WRN with over 1M images arXiv 2404.09349's.
    "synthetic_fraction": (fraction, None,  0.8,    "of each batch; None: 0.7, over 1M images 0.8"),
    "border":             (grey,     0,     128,    "grey value around an image before the random crop"),
}


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(usage="%(prog)s [flags] (--help lists them)", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("recipe of the architecture").add_argument
    for name, (kind, wrn, vit, meaning) in RECIPES.items():
        add("--" + name.replace("_", "-"), type=kind, help=f"{meaning} (wrn-*: {wrn}, vit-*: {vit})",
            default=argparse.SUPPRESS)
    add = parser.add_argument_group("data and model").add_argument
    add("--dataset", choices=list(DATASETS), default="cifar10", help="npz: any classes, from train.npz")
    add("--data-dir", default="data", help="train.npz and test.npz (see `open_npz`), else downloaded")
    add("--synthetic", nargs="+", default=[], metavar="FILE", help="DM-AT's .npz files, any number of parts")
    add("--arch", default="wrn-34-10", help="wrn-DEPTH-WIDTH with DEPTH = 6n + 4, or vit-b-2")
    add("--epochs", type=count, default=200, help="of ceil(real images / batch size) steps (stated per row)")
    add("--max-steps", type=count, help="number of steps, in place of --epochs")
    add("--batch-size", type=count, default=128, help="over all processes (stated per row)")
    add("--accumulate", type=count, default=1, help="compute each batch in so many pieces, for less memory")
    # Ten steps reach further than eps, so that PGD can cross the ball and correct itself.
    add = parser.add_argument_group("attack").add_argument
    add("--eps", type=fraction, default="8/255", help="largest change of a pixel in [0,1] (inherited)")
    add("--step-size", type=positive, default="2/255", help="of the attack (inherited)")
    add("--attack-steps", type=whole, default=10, help="PGD steps (stated); 0: no attack, x' = x")
    # The features of a diffusion model say most about what an image
    # shows when a little noise was added: enough to hide fine texture, not enough to hide the object.
    add = parser.add_argument_group("alignment (DRA)").add_argument
    add("--dra-weight", type=number, default=1.0, help="lambda, eq. (4) (chosen); 0: no alignment")
    add("--teacher", help="EDM's .pkl or train_edm.py's .pt, path or URL (stated: EDM, see DATASETS)")
    # In arXiv 2303.09769 a linear probe of an EDM's features is best at sigma 0.06.
    add("--teacher-sigma", type=positive, default=0.06, help="noise level, images in [-1,1] (chosen)")
    add("--teacher-layer", default="dec.8x8_in1", help="UNet block to align with (stated: the bottleneck)")
    add("--teacher-unconditional", action="store_true", help="do not tell the teacher the label")
    add("--extra-sigma", action="store_true", help="one more target, at a random sigma (stated for over 1M)")
    # Only backbone and teacher compute in bfloat16; logits, projector and losses stay in float32.
    add = parser.add_argument_group("running").add_argument
    add("--out", default="runs/cifar", help="folder for last.pt, best.pt, log.csv; all machines share it")
    add("--seed", type=whole, default=0, help="of every random draw")
    add("--device", choices=["cuda", "cpu"], default=DEVICE, help="where to run")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, else float32; if not given, on a GPU")
    add("--no-compile", action="store_true", help="no torch.compile, which only a GPU uses")
    add("--eval-every", type=positive, default=1.0, help="epochs between evaluations (inherited)")
    add("--save-minutes", type=number, default=5, help="minutes between checkpoints: what a kill can lose")
    add("--smoke", action="store_true", help="a minute on a CPU: tiny network, drawn images, random teacher")
    add("--dry-run", action="store_true", help="print what would be trained, and stop")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)  # any other flag still beats these
    args = parser.parse_args(argv)

    # Defaults that depend on other flags.
    args.family = "vit" if args.arch.startswith("vit-") else "wrn"
    for name, (_, wrn, vit, _) in RECIPES.items():
        vars(args).setdefault(name, vit if args.family == "vit" else wrn)
    if args.teacher is None and args.dra_weight > 0 and not args.smoke:
        args.teacher = DATASETS[args.dataset].teacher
    args.amp = args.device == "cuda" if args.amp is None else args.amp
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    return args


# -----------------------------------------------------------------------------------------------------------
# Model. `model(images)` gives logits: `model.head(model.features(images))`. The features in between are what
# is aligned. Images come in [0, 1] and are normalised inside the model, so an attack on the model is an
# attack in pixels, as AutoAttack and RobustBench expect.


class Classifier(nn.Module):
    """What all architectures share. A subclass has `penultimate`: normalised images -> features [B, D], and
    `head`: features -> logits [B, num_classes]."""

    amp = False  # whether the backbone computes in bfloat16

    def set_normalisation(self, mean, std):
        """Mean and deviation per RGB channel. Buffers move to the GPU with the model. These are not
        persistent, as the state dict has to be that of DM-AT's and RobustBench's checkpoints."""
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def features(self, images):
        """images [B, 3, 32, 32] in [0, 1] -> penultimate features enc(x) [B, D], float32.

        Autocast ends here: bfloat16 has 8 significant bits, too few for logits, softmax, KL and cosine.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return self.penultimate((images - self.mean) / self.std).float()

    def forward(self, images):
        """images [B, 3, 32, 32] in [0, 1] -> logits f(x) [B, num_classes]."""
        return self.head(self.features(images))


class Block(nn.Module):
    """Pre-activation residual block: shortcut + conv(act(norm(conv(act(norm(x)))))). The shortcut is x, or
    a 1x1 convolution of act(norm(x)) where the number of channels changes. Parameter names are DM-AT's."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels, momentum=BATCHNORM_MOMENTUM)
        padding = 1 if stride == 1 else 0  # a strided convolution is padded in `forward`
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
        # right and at the bottom only. With padding on all sides its checkpoints would load and be wrong.
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
            self.layer.append(nn.Module())  # an empty module, for the names layer.0.block.0 and so on
            self.layer[i].block = nn.Sequential(*blocks)
        self.batchnorm = nn.BatchNorm2d(channels[3], momentum=BATCHNORM_MOMENTUM)
        self.logits = nn.Linear(channels[3], num_classes)
        # Convolutions start at N(0, 2 / (k^2 out_channels)) (inherited). torch's default is 2.4 times
        # narrower for a 3x3 layer of equal width, and trained from scratch that is another network.
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


def build_vit(depth, width, heads, num_classes):
    """A Vision Transformer for 32 px in patches of 2, that is 256 tokens, as Wu et al. build it: no class
    token, LayerScale, GELU in its tanh form. Its features are the mean of the normalised tokens, [B, width].
    Parameter names are timm's. timm is imported here, as nothing else in this file needs it but Lion."""
    from timm.models.vision_transformer import VisionTransformer

    class ViT(Classifier, VisionTransformer):
        def penultimate(self, x):
            """[B, 3, 32, 32] -> [B, width], the mean of the tokens after the last layer norm."""
            return self.forward_head(self.forward_features(x), pre_logits=True)

    model = ViT(img_size=32, patch_size=2, embed_dim=width, depth=depth, num_heads=heads,
                num_classes=num_classes, class_token=False, global_pool="avg", fc_norm=False,
                init_values=1e-4, act_layer="gelu_tanh")
    # All weights start at a normal of deviation 0.02 that is cut at two deviations. timm cuts elsewhere.
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for weight in [model.pos_embed, *(layer.weight for layer in layers)]:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)
    nn.init.zeros_(model.patch_embed.proj.bias)
    return model


def build_model(arch, num_classes, dataset="cifar10"):
    """A classifier for images [B, 3, 32, 32] in [0, 1], initialised from torch's global generator.

    arch: "wrn-DEPTH-WIDTH" with DEPTH = 6n + 4, or a name in VITS; dataset: whose mean and deviation
    normalise a WideResNet's input, while a ViT takes images as they are. eval_autoattack.py imports this
    function, from this file or from your copy (`--script`). Raises InputError for an unknown arch.
    """
    wrn, normalisation = re.fullmatch(r"wrn-([1-9]\d+)-([1-9]\d*)", arch), DATASETS[dataset]
    if arch in VITS:
        model, normalisation = build_vit(*VITS[arch], num_classes), DATASETS["npz"]
    elif wrn and int(wrn[1]) % 6 == 4:
        model = WideResNet(int(wrn[1]), int(wrn[2]), num_classes)
    else:
        raise InputError(f"--arch {arch}: expected vit-b-2, or wrn-DEPTH-WIDTH with DEPTH = 6n + 4")
    model.set_normalisation(normalisation.mean, normalisation.std)
    return model


def build_projector(in_width, out_width):
    """h in eq. (3): classifier features [B, in_width] -> the teacher's space [B, out_width]. Three layers
    (stated), SiLU in between as in REPA. With it the classifier's features need not equal the teacher's; it
    is enough that the teacher's can be predicted from them."""
    return nn.Sequential(nn.Linear(in_width, PROJECTOR_WIDTH), nn.SiLU(),
                         nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH), nn.SiLU(),
                         nn.Linear(PROJECTOR_WIDTH, out_width))


# -----------------------------------------------------------------------------------------------------------
# Attack and losses. The norm of the attack is l-infinity throughout: max |x' - x| <= eps over all pixels.


def pgd(loss, images, start, eps, step_size, steps):
    """Projected gradient ascent (eq. 2): follow the sign of the gradient of `loss`, and after each step go
    back into what is allowed.

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
    """Set attributes of all BatchNorm layers (a ViT has none): `track_running_stats`, whether a forward in
    training mode updates the running statistics (it normalises with those of its batch in any case), and
    `momentum`, by how much."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            vars(module).update(attributes)


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

    With a model in training mode (as in `train_step`) BatchNorm uses the attacked batch's own statistics, so
    the attack sees the function that is then trained. TRADES' original code attacks in evaluation mode
    instead, from a start of 0.001 * N(0, 1), and that gives another classifier.
    """
    # Only the clean and the finished adversarial batch should count in the running statistics (DM-AT).
    set_batchnorm(model, track_running_stats=False)
    # Only the image's gradient is needed. A compiled backward would compute the weights' as well.
    weights = [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    if clean_logits is None:
        with torch.no_grad():
            clean_logits = model(images)
    clean_logits = clean_logits.detach()  # p(x) is held fixed
    # The sum, as in DM-AT. The mean would give the same attack, since only the sign of the gradient counts.
    adv = pgd(lambda x: kl_divergence(clean_logits, model(x), "sum"), images, start, eps, step_size, steps)
    set_batchnorm(model, track_running_stats=True)
    for weight in weights:
        weight.requires_grad_(True)
    return adv


def trades_loss(clean_logits, adv_logits, labels, beta, label_smoothing):
    """L_TRADES = CE(f(x), y) + beta * KL(p(x) || p(x')) (arXiv 1901.08573), the mean over the batch.

    The first term asks for the right class on the clean image, the second for the same prediction on the
    attacked one; beta weighs them. clean_logits, adv_logits [B, classes]; gradients flow into both. labels
    [B] int64. Returns a float32 scalar.
    """
    cross_entropy = F.cross_entropy(clean_logits.float(), labels, label_smoothing=label_smoothing)
    return cross_entropy + beta * kl_divergence(clean_logits, adv_logits, "batchmean")


def dra_loss(projected, target):
    """L_DRA = -cos(h(enc(x')), g(x_t, t, y)), the mean over the batch (eq. 3): -1 where all directions agree.

    The cosine leaves out the length of both vectors, which says nothing about what an image shows. projected,
    target [B, width]; no gradient flows into target. Returns a float32 scalar in [-1, 1].
    """
    return -F.cosine_similarity(projected.float(), target.detach().float(), dim=1).mean()


# -----------------------------------------------------------------------------------------------------------
# The training step: the paper on one screen.


def train_step(model, averaged, projectors, teacher, optimizer, batch, ema_decay, args):
    """One optimisation step. It draws no random numbers: they are all in `batch`, see `Data.batch`.

    batch.images x [B, 3, 32, 32] in [0, 1], batch.labels y [B], batch.start like images,
    batch.teacher_noise: a list of (sigma: float or [B], noise: N(0, 1) like images), one per projector,
    empty without alignment. ema_decay: see `averaging_decay`. args: eps, step_size, attack_steps, beta,
    label_smoothing, dra_weight, teacher_unconditional, amp, accumulate, max_norm. Returns detached scalars
    by name, accuracies in percent. They stay on the device, because reading one would make the host wait for
    the GPU.
    """
    model.train()  # BatchNorm: each forward below normalises with the statistics of its own images
    optimizer.zero_grad(set_to_none=True)
    numbers = []
    for k, piece in enumerate(split_batch(batch, args.accumulate)):
        images, labels = piece.images, piece.labels

        # The clean forward serves twice: the attack moves away from its p(x), and L contains it. Of several
        # pieces, the first alone updates BatchNorm's running statistics.
        set_batchnorm(model, track_running_stats=k == 0)
        clean_logits = model(images)

        # The attack is PGD, eq. (2). Eq. (1) would have it maximise the cross-entropy; TRADES maximises KL.
        adv = images  # without an attack x' = x
        if args.eps > 0 and args.attack_steps > 0:
            adv = trades_attack(model, images, piece.start, args.eps, args.step_size, args.attack_steps,
                                clean_logits)

        # L_TRADES. Clean and adversarial images have a forward each, and so are normalised by their own
        # statistics (DM-AT).
        set_batchnorm(model, track_running_stats=k == 0)
        adv_features = model.features(adv)  # enc(x'), [B, D]
        adv_logits = model.head(adv_features)
        trades = trades_loss(clean_logits, adv_logits, labels, args.beta, args.label_smoothing)

        # L_DRA, eq. (3). The teacher gets the CLEAN image and makes x_t = (2x - 1) + sigma * noise itself.
        # The gradient trains h and, through enc(x'), the backbone, but not `head`, which comes after the
        # features. It stops at x', which is data by now, and at the teacher, which is frozen.
        alignment = trades.new_zeros(())
        given_labels = None if args.teacher_unconditional else labels
        for projector, (sigma, noise) in zip(projectors, piece.teacher_noise):
            with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
                target = teacher(images, given_labels, sigma, noise)  # g: [B, width], a mean over positions
            alignment = alignment + dra_loss(projector(adv_features), target) / len(projectors)  # (chosen)

        # Eq. (4). Every term is a mean over images, so the mean of the pieces' losses is that of the batch.
        loss = trades + args.dra_weight * alignment
        (loss / args.accumulate).backward()
        clean, robust = [(x.argmax(1) == labels).float().mean() * 100 for x in (clean_logits, adv_logits)]
        numbers.append(torch.stack([loss, trades, -alignment, clean, robust]).detach())
    set_batchnorm(model, track_running_stats=True)
    # Classifier and h learn together: same optimizer, same rate and weight decay (chosen).
    parameters = [*model.parameters(), *projectors.parameters()]
    average_gradients(parameters)  # over the processes of torchrun
    if args.max_norm > 0:
        nn.utils.clip_grad_norm_(parameters, args.max_norm)
    optimizer.step()
    update_average(averaged, model, ema_decay)
    names = ("loss", "trades", "cosine", "train_clean", "train_robust")
    means = dict(zip(names, torch.stack(numbers).mean(dim=0)))
    return {name: value for name, value in means.items() if name != "cosine" or len(projectors)}


def split_batch(batch, pieces):
    """A batch, cut into so many pieces of equal size: piece k has the images k, k + pieces, ... A ViT gives
    the same result whole and in pieces. A WideResNet normalises each piece by itself, as if each were the
    share of a process of torchrun."""
    def cut(value, k):
        if isinstance(value, (list, tuple)):
            return [cut(part, k) for part in value]
        return value[k::pieces] if isinstance(value, torch.Tensor) else value
    return [SimpleNamespace(**{name: cut(value, k) for name, value in vars(batch).items()})
            for k in range(pieces)]


# -----------------------------------------------------------------------------------------------------------
# Optimiser, schedule, weight averaging, and several processes.


def build_optimizer(args, *modules):
    """WideResNets: SGD with Nesterov momentum; weight decay on all but BatchNorm's scales and shifts
    (inherited). ViTs: Lion (arXiv 2302.06675); weight decay on the matrices of linear and convolutional
    layers alone, not on position embedding, LayerScale, norms and biases (Wu et al.)."""
    layers = [layer for module in modules for layer in module.modules()]
    parameters = [p for module in modules for p in module.parameters()]
    if args.family == "vit":
        decayed = {layer.weight for layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d))}
    else:
        batchnorms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        decayed = set(parameters) - {p for layer in batchnorms for p in layer.parameters()}
    groups = [{"params": [p for p in parameters if p in decayed]},
              {"params": [p for p in parameters if p not in decayed], "weight_decay": 0.0}]
    settings = {"lr": args.lr, "weight_decay": args.weight_decay, "foreach": True}
    if args.family == "vit":
        from timm.optim import Lion
        return Lion(groups, betas=(0.95, 0.98), **settings)
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **settings)


def build_scheduler(args, optimizer, total_steps, steps_per_epoch=1):
    """WideResNets: torch's OneCycleLR, to be stepped once per EPOCH (inherited). The rate rises from lr / 25
    to lr in the first 2.5 % of the epochs and then falls to lr / 250,000, both along half a cosine. SGD's
    momentum goes the other way, from 0.95 to 0.85 and back, whatever the optimizer was built with. A run of
    fewer than 40 epochs begins on the way down; a run of one epoch has only the last rate and hardly trains.

    ViTs: to be stepped once per STEP (Wu et al.). The rate rises linearly from lr / 100 to lr over five
    epochs, at most a tenth of the steps, and falls to lr / 10 along half a cosine.
    """
    if args.family == "wrn":
        # With exactly 40 epochs, where 0.025 * 40 = 1, torch would divide by zero: hence 1e-9.
        epochs = math.ceil(total_steps / steps_per_epoch)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, epochs, pct_start=WARMUP + 1e-9)
    rise = max(1, min(5 * steps_per_epoch, total_steps // 10))

    def factor(step):
        fall = (step - rise) / max(1, total_steps - 1 - rise)  # from 0 at the peak to 1 in the last step
        return 0.01 + 0.99 * step / rise if step < rise else 0.55 + 0.45 * math.cos(math.pi * fall)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def averaging_decay(step, warmup_steps, tau):
    """Share of the old average that stays after step `step` (from 0), as in DM-AT. During the warm-up none:
    the average is the model. Then it rises to tau, so that the first, weak weights are soon forgotten."""
    since = step + 1 - warmup_steps
    return 0.0 if since < 0 else min(tau, (1 + since) / (10 + since))


@torch.no_grad()
def update_average(averaged, model, ema_decay):
    """averaged <- ema_decay * averaged + (1 - ema_decay) * model. Averaged weights are usually more robust
    than the last ones. Buffers, such as BatchNorm's running statistics, are copied from the model (DM-AT)."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - ema_decay)
    for average, live in zip(averaged.buffers(), model.buffers()):
        average.copy_(live)


def start_processes(args):
    """Join the other processes of torchrun, if there are any. Returns the device, the number of this process
    among all (rank), how many there are (world), and its number on this machine (local)."""
    # torchrun sets these variables.
    rank, world, local = [int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = args.amp  # torch allows TF32 in convolutions; --no-amp does not
    if world > 1:  # two hours: as long as one may download while the others wait
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device, rank, max(1, world), local


def all_reduce(tensor):
    """Sum of a tensor over all processes, in place. In a single process there is nothing to do."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier():
    """Wait until all processes are here."""
    all_reduce(torch.zeros(()))


def average_gradients(parameters):
    """Mean gradient over all processes. This is not left to DistributedDataParallel, which broadcasts buffers
    before each forward: two forwards before one backward then fail. BatchNorm normalises the share of each
    process by itself, as in DM-AT's DataParallel."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is not None:
                all_reduce(parameter.grad).div_(dist.get_world_size())


# -----------------------------------------------------------------------------------------------------------
# Data, from disk to one augmented batch on the device. Every random draw is a function of (seed, step) and is
# made for the whole batch. So a run that continues after a kill sees the batches of an undisturbed one, and
# each of several processes can take its share of the batch that one process would see.


def generator(seed, position, purpose, device="cpu"):
    """A random generator that depends on (seed, position, purpose) alone. position: number of a step, pass or
    image; purpose: a short text, so that draws for different purposes are independent."""
    mixed = np.random.SeedSequence([seed, position, *purpose.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


def map_npz_member(path, name):
    """One array of an .npz file, mapped into memory: nothing is read until it is indexed.

    An .npz is a zip of .npy files. numpy's mmap_mode does nothing for it. But a member that is not compressed
    is a plain .npy at some offset in the file. Returns a read-only array whose `base` is the mmap. Raises
    InputError for a file that is no .npz, lacks `name`, or holds it compressed or as objects.
    """
    check_file(path)
    try:
        info = zipfile.ZipFile(path).getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")  # of two fields that end the member's own header
            file.seek(int(lengths.sum()), os.SEEK_CUR)
            np.lib.format.read_magic(file)  # from here on it is an .npy file
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject:  # their addresses would be whatever the file says
                raise ValueError("it holds objects")
            return np.memmap(path, dtype, "r", file.tell(), shape, order="F" if fortran_order else "C")
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path}: expected 'image' and 'label' as from numpy.savez, but {name!r} cannot be "
                         f"mapped: {ascii(str(error))}") from None


def open_npz(path, classes=None):
    """An .npz with `image` uint8 [N, 32, 32, 3] and integer `label` [N] in 0 ... classes - 1 (None: from 0
    on) -> (images, left on disk, labels int64 [N]). Raises InputError, one line that names the file, where it
    holds other data."""
    images, labels = map_npz_member(path, "image"), map_npz_member(path, "label")
    images_fit = images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
    labels_fit = labels.dtype.kind in "iu" and labels.shape == images.shape[:1] != (0,)
    if not images_fit or not labels_fit:
        raise InputError(f"{path}: image is {images.dtype} {images.shape}, label {labels.dtype} "
                         f"{labels.shape}; expected uint8 (N, 32, 32, 3) and integers (N,)")
    low, high = labels.min(), labels.max()
    # DM-AT's files for CIFAR-10 and CIFAR-100 have the same names. Labels up to 9 tell that it is the former.
    if low < 0 or classes and high >= classes or classes == 100 and high < 10:
        expected = f"0 to {classes - 1}; --dataset npz takes other classes" if classes else "0 or more"
        raise InputError(f"{path}: labels run from {low} to {high}, expected {expected}")
    if hasattr(mmap, "MADV_RANDOM"):  # single images will be read, from all over the file: no reading ahead
        images.base.madvise(mmap.MADV_RANDOM)
    return images, labels.astype(np.int64)


def load_real(args, split):
    """The real images of "train" or "test", as (images uint8 [N, 32, 32, 3], labels int64 [N]): --data-dir's
    npz files, else torchvision's CIFAR, downloaded if need be; with --smoke drawn ones. Training only reads
    "train". args: dataset, data_dir, smoke, seed. Raises InputError."""
    folder = Path(args.data_dir)
    if args.smoke:
        return draw_smoke_images(1088 if split == "train" else 128, seed=args.seed + (split == "test"))
    if args.dataset == "npz" or (folder / "train.npz").exists() or (folder / "test.npz").exists():
        images, labels = open_npz(folder / f"{split}.npz", DATASETS[args.dataset].classes)
        return np.array(images), labels  # real images fit into memory
    try:
        data = getattr(torchvision.datasets, args.dataset.upper())(folder, split == "train", download=True)
    except (RuntimeError, OSError) as error:
        raise InputError(f"--data-dir {folder}: has no train.npz, and torchvision could not get "
                         f"{args.dataset} ({error})") from None
    return np.ascontiguousarray(data.data), np.array(data.targets)


def count_classes(args, labels):
    """Number of classes of the training labels: the data set's, for npz the largest label + 1. Raises
    InputError where a train.npz lacks one (CIFAR's, which may be a part: the first or the last)."""
    classes, found = DATASETS[args.dataset].classes or int(labels.max()) + 1, set(labels.tolist())
    expected = range(max(2, classes)) if args.dataset == "npz" else (0, classes - 1)
    missing = next((label for label in expected if label not in found), None)
    if missing is not None and not args.smoke and (Path(args.data_dir) / "train.npz").exists():
        raise InputError(f"{args.data_dir}: no training image has label {missing}, expected 0 to "
                         f"{classes - 1}; --dataset npz takes any number of classes")
    return classes


def draw_smoke_images(count, seed):
    """Ten classes that a tiny network learns in a minute: waves in two directions and five frequencies, with
    random phase and colour, and noise. Returns images uint8 [N, 32, 32, 3] and labels int64 [N]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    rows, columns = np.indices((32, 32)) / 32
    along = np.where((labels < 5)[:, None, None], columns, rows)  # [N, 32, 32]
    turns = (1 + labels % 5)[:, None, None] * along + rng.uniform(size=(count, 1, 1))
    images = 0.5 + rng.uniform(0.2, 0.4, (count, 1, 1, 3)) * np.sin(2 * np.pi * turns)[..., None]
    images += rng.normal(0, 0.05, images.shape)
    return (images.clip(0, 1) * 255).astype(np.uint8), labels


class Data:
    """Training images, real and synthetic, the held-out images, and the batches drawn from them."""

    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        self.share = slice(rank, None, world)  # of each batch, and of the held-out images, for this process
        if args.batch_size % (world * args.accumulate):
            raise InputError(f"--batch-size {args.batch_size}: expected a multiple of {world} process(es) x "
                             f"--accumulate {args.accumulate}")
        real = load_real(args, "train")
        self.classes = count_classes(args, real[1])
        self.parts = [real] + [open_npz(path, self.classes) for path in args.synthetic]
        # Images are numbered through all parts: the held-out ones, the other real ones, each synthetic file.
        self.ends = np.cumsum([len(labels) for _, labels in self.parts]).tolist()  # where each part ends
        self.n_holdout = min(HOLDOUT, self.ends[0] // 10)
        self.n_real = self.ends[0] - self.n_holdout
        self.n_synthetic = self.ends[-1] - self.ends[0]
        # An epoch has as many steps as all real images, held-out ones included, would fill (DM-AT). The
        # synthetic images of a batch are rounded down (DM-AT): 512 at 0.7 are 154 real + 358 synthetic ones.
        self.steps_per_epoch = math.ceil(self.ends[0] / args.batch_size)
        synthetic_fraction = args.synthetic_fraction
        if synthetic_fraction is None:
            synthetic_fraction = 0.7 if self.n_synthetic <= 1_000_000 else 0.8
        self.batch_synthetic = int(args.batch_size * synthetic_fraction) if args.synthetic else 0
        self.batch_real = args.batch_size - self.batch_synthetic
        self.thread, self.coming = ThreadPoolExecutor(1), {}  # it reads ahead; step -> what it reads for it

    def draw(self, step):
        """Numbers of the images in this process's share of a step's batch: int64 [B].

        Real images come from passes over all of them, each in an order of its own; a batch may end one pass
        and begin the next. (DM-AT begins a pass in each epoch and fills its last batch with synthetic
        images.) Synthetic ones are drawn with replacement, anew in each step.
        """
        seed, (number, offset) = self.args.seed, divmod(step * self.batch_real, self.n_real)
        passes = range(number, number + 2 + self.batch_real // self.n_real)  # the batch may reach into these
        order = torch.cat([torch.randperm(self.n_real, generator=generator(seed, i, "pass")) for i in passes])
        real = self.n_holdout + order[offset:offset + self.batch_real]
        synthetic = self.ends[0] + torch.randint(max(1, self.n_synthetic), (self.batch_synthetic,),
                                                 generator=generator(seed, step, "synthetic"))
        return torch.cat([real, synthetic])[self.share].numpy()

    def read(self, index):
        """Images number `index`, uint8 [B, 32, 32, 3], and their labels int64 [B]."""
        part_of = np.searchsorted(self.ends, index, side="right")
        # self.ends[k] is where part k ends, so i - self.ends[k] is a negative index into part k.
        pairs = [[array[i - self.ends[k]] for array in self.parts[k]] for k, i in zip(part_of, index)]
        images, labels = map(np.stack, zip(*pairs))
        return images, labels

    def prepare(self, step):
        """The images of a step, cropped and flipped, and their labels, in the host's memory; for a GPU
        pinned, so that it fetches them while it computes."""
        images, labels = self.read(self.draw(step))
        random = generator(self.args.seed, step, "augment")
        corner = torch.randint(2 * CROP_PADDING + 1, (self.args.batch_size, 2), generator=random)
        flip = torch.rand(self.args.batch_size, generator=random) < 0.5
        images = crop_and_flip(images, corner[self.share].tolist(), flip[self.share].tolist(),
                               self.args.border)
        tensors = torch.from_numpy(images), torch.from_numpy(labels)
        return [tensor.pin_memory() if self.device.type == "cuda" else tensor for tensor in tensors]

    def batch(self, step):
        """All that `train_step` needs for one step. B: this process's share of the batch.

        Returns images [B, 3, 32, 32] in [0, 1], randomly cropped and flipped, labels [B], start: the attack's
        first point, and teacher_noise: [(sigma, noise)] for the teacher, none, one or two.
        """
        args, device, size = self.args, self.device, self.args.batch_size
        for wanted in (step, step + 1):  # the thread prepares the next batch while this step computes
            if wanted not in self.coming:
                self.coming[wanted] = self.thread.submit(self.prepare, wanted)
        images, labels = [tensor.to(device, non_blocking=True) for tensor in self.coming.pop(step).result()]
        images = images.permute(0, 3, 1, 2).float() / 255  # [B, 3, 32, 32] in [0, 1]

        # One stream of random numbers, always for the whole batch, of which this process takes its share.
        random = {"generator": generator(args.seed, step, "batch", device), "device": device}
        shape = (size, 3, 32, 32)
        start = images + args.eps * (2 * torch.rand(shape, **random)[self.share] - 1)
        sigmas = [args.teacher_sigma] if args.dra_weight > 0 else []
        if sigmas and args.extra_sigma:
            # A noise level per image, drawn as in EDM's own training. Over a long run on many images the
            # teacher then also shows what its features say at other levels.
            mean, deviation = EXTRA_LOG_SIGMA
            sigmas.append((mean + deviation * torch.randn(size, **random)[self.share]).exp())
        noise = [(sigma, torch.randn(shape, **random)[self.share]) for sigma in sigmas]
        return SimpleNamespace(images=images, labels=labels, start=start.clamp(0, 1), teacher_noise=noise)

    def holdout_batches(self):
        """This process's share of the held-out images, up to 256 at a time: images [B, 3, 32, 32] in [0, 1],
        labels, and start, which depends on the image's number alone, not on the processes."""
        for index in torch.arange(self.n_holdout)[self.share].split(256):
            images, labels = [torch.from_numpy(array).to(self.device) for array in self.read(index.numpy())]
            images = images.permute(0, 3, 1, 2).float() / 255
            random = generator(self.args.seed, 0, "evaluate")
            uniform = torch.rand(self.n_holdout, 3, 32, 32, generator=random)[index].to(self.device)
            yield images, labels, (images + self.args.eps * (2 * uniform - 1)).clamp(0, 1)


def crop_and_flip(images, corner, flip, border=0):
    """Random crop and mirroring. images uint8 [B, 32, 32, 3]; corner: row and column of each crop in the
    padded image; flip: whether to mirror it; border: the padding's grey value. Returns the same shape."""
    padding = [(0, 0), 2 * [CROP_PADDING], 2 * [CROP_PADDING], (0, 0)]
    padded = np.pad(images, padding, constant_values=border)
    crops = [image[row:row + 32, column:column + 32] for image, (row, column) in zip(padded, corner)]
    return np.stack([crop[:, ::-1] if mirrored else crop for crop, mirrored in zip(crops, flip)])


# -----------------------------------------------------------------------------------------------------------
# Evaluation and checkpoints. Late in adversarial training robust accuracy on new images falls again (robust
# overfitting). So the run keeps the average that was best on held-out images.


def margin_loss(logits, labels):
    """Best wrong logit minus the right one (Carlini & Wagner 2017), at most 0, summed over the batch.

    The cross-entropy has almost no gradient where the network is sure of itself. A difference of logits has
    one there, so this attack is usually the stronger one. Cut off at 0 as in DM-AT: an image that is already
    misclassified adds no gradient and stays where it is. logits [B, classes], labels [B].
    """
    right = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return (wrong - right).clamp(max=0).sum()


def evaluate(averaged, data, args):
    """Clean accuracy, and accuracy under PGD on the margin loss, in percent, of the averaged model on the
    held-out images. All processes take part, and all get the same numbers."""
    for buffer in averaged.buffers():  # give all processes the BatchNorm statistics of process 0
        all_reduce(buffer.mul_(data.rank == 0))
    right = torch.zeros(2)
    for images, labels, start in data.holdout_batches():
        loss = lambda adv: margin_loss(averaged(adv), labels)
        adv = pgd(loss, images, start, args.eps, args.step_size, SELECTION_STEPS)
        with torch.no_grad():
            right += torch.stack([(averaged(x).argmax(1) == labels).sum() for x in (images, adv)]).cpu()
    return (100 * all_reduce(right) / data.n_holdout).tolist()


def write_atomically(path, write):
    """Let write(file) write a file of another name, flush it to the disk, and rename it to `path`. So at
    every moment `path` is a whole file, the old one or the new one, even if the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# What last.pt calls the parts of a run. The first two names are DM-AT's. Use the averaged weights.
PARTS = {"model_state_dict": "averaged", "unaveraged_model_state_dict": "model", "projector": "projectors",
         "optimizer": "optimizer", "scheduler": "scheduler"}
VALUES = ("step", "log", "recent", "best")  # and its plain values, see `build_run`


def save(out, about, run):
    """Write last.pt: all that a run needs to continue, as tensors and plain types. Then best.pt, if it is
    new: the averaged weights that were best on the held-out images. about: what a user of either needs."""
    content = about | {name: getattr(run, part).state_dict() for name, part in PARTS.items()}
    content |= {name: getattr(run, name) for name in VALUES}
    content["state_dict"] = content["model_state_dict"]  # RobustBench's name
    write_atomically(out / "last.pt", lambda file: torch.save(content, file))
    if run.best is not run.best_on_disk:
        write_atomically(out / "best.pt", lambda file: torch.save(about | run.best, file))
        run.best_on_disk = run.best


def last_part(value):
    """A setting as text; a path, or each in a list, by its last part: files may be moved."""
    return ", ".join(Path(str(part)).name for part in np.ravel(value))


def recipe(args, data):
    """What has to be the same when a run continues, by name: flags as given, and numbers of images."""
    free = {"out", "device", "amp", "no_compile", "save_minutes", "workers", "dry_run"}
    flags = {name: last_part(value) for name, value in vars(args).items() if name not in free}
    return flags | {"images": last_part(np.diff(data.ends, prepend=0))}


def resume(out, about, run):
    """Load last.pt in `out`, if it is there, into `run`.

    Raises InputError where last.pt is damaged or of another recipe, and where `out` holds other files of a
    run, which a new one would overwrite. With weights_only nothing in the file gets to run.
    """
    path = out / "last.pt"
    if not path.exists():
        if (out / "best.pt").exists() or (out / "log.csv").exists():
            raise InputError(f"{out}: has files of a run but no last.pt to continue it; change --out")
        return
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        there = dict(saved["recipe"])
        for name, value in about["recipe"].items():
            if there.get(name) != value:
                raise InputError(f"{path}: is of a run with {name} {there.get(name)}, not {value}; change "
                                 "--out")
        for name, part in PARTS.items():
            getattr(run, part).load_state_dict(saved[name])
        vars(run).update({name: saved[name] for name in VALUES})
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: damaged, or no last.pt of this script ({type(error).__name__})") from None


def reduce_recent(run, names, world):
    """Numbers of the last steps, in run.recent, become means over all processes. Raises FloatingPointError
    where one of them or a weight is not finite. The run ends there; last.pt is from before."""
    run.recent = list(all_reduce(torch.stack([numbers.cpu() for numbers in run.recent])) / world)
    for step, numbers in enumerate(run.recent, run.step - len(run.recent) + 1):
        if not numbers.isfinite().all():
            raise FloatingPointError(f"step {step}: not finite: {dict(zip(names, numbers.tolist()))}")
    weights = [weight for group in run.optimizer.param_groups for weight in group["params"]]
    if not all(weight.isfinite().all() for weight in weights):
        raise FloatingPointError(f"step {run.step}: a weight is not finite")


def write_log(path, log, minutes_left):
    """All rows so far -> log.csv, and the last one to the terminal."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in log for name in row))
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in log)
    print(*(f"{name} {value:.5g} " for name, value in log[-1].items()), f"{minutes_left:.1f} min", flush=True)


# -----------------------------------------------------------------------------------------------------------
# The run. From here on it is bookkeeping.


def lock(folder):
    """Keep a second run out of a folder, as a context manager. Raises InputError where another one is at work
    there. It waits a few seconds, as processes of a run that was just killed may need to end."""
    try:
        return FileLock(folder / "lock").acquire(timeout=10)
    except Timeout:
        raise InputError(f"{folder}: another run is at work there") from None


def load_teacher(args, classes=None):
    """The frozen diffusion encoder g, for data in so many classes (if not given, the data set's). Raises
    InputError where it does not fit.

    To use another teacher, return it here or give it to `main`: a frozen module in evaluation mode with
    `width`. It is called as teacher(images [B, 3, 32, 32] in [0, 1], labels [B] or None, sigma: a float or
    [B], noise: N(0, 1) like images). The images are clean; it adds the noise itself. It returns features
    [B, width].
    """
    classes = classes or DATASETS[args.dataset].classes or 0
    if args.teacher is None and not args.smoke:
        raise InputError("--dataset npz: expected --teacher FILE, or --dra-weight 0 for no alignment")
    if args.teacher is None:  # the smoke run: features of a random network are a poor target, but they do
        torch.manual_seed(args.seed)
        network = {"label_dim": classes, "model_channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 1}
        return EDMEncoder(args.teacher_layer, img_resolution=32, **network)
    teacher = load_edm_encoder(args.teacher, args.teacher_layer)
    # A class-conditional teacher is told the true label, so that its features can describe the image within
    # its class. It only meets training images, so no test label can leak.
    labels_fit = args.teacher_unconditional or teacher.label_dim in (0, classes)
    if teacher.img_resolution != 32 or not labels_fit:
        raise InputError(f"{args.teacher}: is for {teacher.img_resolution} px, {teacher.label_dim} classes, "
                         f"not 32 and {classes}; --teacher-unconditional drops the labels")
    return teacher.to(memory_format=torch.channels_last)  # the faster layout for convolutions


def build_run(args, data, teacher=None, total_steps=1, build=None):
    """All that a run trains or keeps, on the device: a function of the settings and the seed alone.

    build: in place of `build_model`, a function of (arch, num_classes, dataset) that returns a module with
    `features` and `head`. Returns SimpleNamespace: model, averaged, projectors, optimizer, scheduler; step:
    how many are done; log: a dict per row; recent: the numbers of the steps since the last row; best: step,
    score and weights of the best average so far, on the CPU; best_on_disk: the one in best.pt.
    """
    torch.manual_seed(args.seed)
    model = (build or build_model)(args.arch, data.classes, args.dataset)
    if args.dataset == "npz" and args.family == "wrn" and build is None:  # normalise by the images' own
        some = torch.from_numpy(data.parts[0][0][::1 + data.n_real // 50_000]) / 255  # enough to tell
        std, mean = torch.std_mean(some, dim=(0, 1, 2))
        model.set_normalisation(mean.tolist(), std.clamp(min=1 / 255).tolist())
    # In evaluation mode, or the zeros would enter BatchNorm's running statistics.
    width = model.eval().features(torch.zeros(1, 3, 32, 32)).shape[1]
    # One projector per noise level (chosen): features at two levels say different things.
    n_targets = 1 + args.extra_sigma if teacher else 0
    projectors = nn.ModuleList(build_projector(width, teacher.width) for _ in range(n_targets))
    projectors.to(data.device)
    model.to(data.device, memory_format=torch.channels_last)
    model.amp = args.amp
    averaged = copy.deepcopy(model).requires_grad_(False).eval()  # it shares no storage with the model
    optimizer = build_optimizer(args, model, projectors)
    scheduler = build_scheduler(args, optimizer, total_steps, data.steps_per_epoch)
    return SimpleNamespace(model=model, averaged=averaged, projectors=projectors, optimizer=optimizer,
                           scheduler=scheduler, step=0, log=[], recent=[], best=None, best_on_disk=None)


def compile_parts(args, model, teacher=None):
    """On a GPU, compile what takes the time: the backbone, and the networks inside the teacher. The module
    itself is not: torch.compile(module) would put a prefix in front of the parameters' names."""
    if args.device == "cuda" and not args.no_compile:
        model.features = torch.compile(model.features, dynamic=False)
        for network in teacher.children() if teacher else ():
            network.compile(dynamic=False)


def print_plan(args, data, teacher, total_steps):
    """What will be trained."""
    print(f"{args.arch} in {'bfloat16' if args.amp else 'float32'}, aligned with",
          f"{teacher.width} features of {type(teacher).__name__}" if teacher else "nothing")
    print(f"{data.n_real:,} real, {data.n_synthetic:,} synthetic and {data.n_holdout:,} held-out images")
    print(f"{total_steps:,} steps = {total_steps / data.steps_per_epoch:g} epochs; in each step",
          f"{data.batch_real} real + {data.batch_synthetic} synthetic images", flush=True)
    if args.family == "wrn" and total_steps <= data.steps_per_epoch:
        print("WARNING: a run of one epoch hardly trains, see build_scheduler", flush=True)
    if args.family == "vit" and args.ema_decay**total_steps > 0.1:
        print(f"WARNING: --ema-decay {args.ema_decay:g}: after {total_steps} steps the average is still to",
              f"{100 * args.ema_decay**total_steps:.0f} % the random weights of the start", flush=True)


def train(args, data, teacher, run, out, total_steps):
    """Train `run` up to `total_steps`, from last.pt in `out` or from scratch. Raises FloatingPointError where
    the loss or a weight is not finite, and InputError as `resume`."""
    about = {"args": vars(args), "recipe": recipe(args, data), "arch": args.arch, "dataset": args.dataset,
             "num_classes": data.classes}
    about |= {name: getattr(run.model, name).flatten().tolist() for name in ("mean", "std")
              if isinstance(getattr(run.model, name, None), torch.Tensor)}
    resume(out, about, run)
    if data.rank == 0:
        print(f"from step {run.step} to {total_steps}", flush=True)
        save(out, about, run)

    eval_every = max(1, round(args.eval_every * data.steps_per_epoch))
    first_step, saved_at, row_step, row_at = run.step, time.time(), run.step, time.time()
    for step in range(first_step, total_steps):
        # In step 0 each forward replaces the running statistics, so that they begin as those of an attacked
        # batch. From then on they are a slow average over clean and attacked batches (DM-AT). The momentum is
        # compiled in as a constant, so compilation waits for step 1.
        set_batchnorm(run.model, momentum=1.0 if step == 0 else BATCHNORM_MOMENTUM)
        if step == max(1, first_step):
            compile_parts(args, run.model, teacher)
            compile_parts(args, run.averaged)
        ema_decay = args.ema_decay  # ViTs: from the first step on
        if args.family == "wrn":
            ema_decay = averaging_decay(step, int(WARMUP * total_steps), args.ema_decay)
        numbers = train_step(run.model, run.averaged, run.projectors, teacher, run.optimizer,
                             data.batch(step), ema_decay, args)
        run.recent.append(torch.stack(list(numbers.values())))  # on the device until a row of the log is due
        run.step = step + 1

        final, epoch_ends = run.step == total_steps, run.step % data.steps_per_epoch == 0
        evaluating = final or run.step % eval_every == 0
        logging = epoch_ends or evaluating or run.step % LOG_EVERY == 0
        overdue = data.rank == 0 and time.time() - saved_at >= 60 * args.save_minutes
        saving = final or all_reduce(torch.tensor(int(overdue))) > 0  # the clock of process 0 decides for all
        if logging or saving:  # before saving too: nothing that is not finite may get into last.pt
            reduce_recent(run, list(numbers), data.world)
        if logging:
            speed = (run.step - row_step) / (time.time() - row_at)  # steps per second
            row = {"step": run.step, "epoch": run.step / data.steps_per_epoch,
                   "lr": run.optimizer.param_groups[0]["lr"]}
            row |= dict(zip(numbers, torch.stack(run.recent).mean(dim=0).tolist()))
            row["images_per_s"] = speed * args.batch_size
            if evaluating:
                row["holdout_clean"], row["holdout_robust"] = evaluate(run.averaged, data, args)
                keep_best(args, run, row)
            run.log.append(row)
            if data.rank == 0:
                write_log(out / "log.csv", run.log, minutes_left=(total_steps - run.step) / speed / 60)
            run.recent, row_step, row_at = [], run.step, time.time()
        if not final and (epoch_ends or args.family == "vit"):
            run.scheduler.step()
        if saving:
            saved_at = time.time()
            if data.rank == 0:
                save(out, about, run)


def keep_best(args, run, row):
    """Keep the average if none before it scored higher on the held-out images; ties go to the later one
    (inherited). Without an attack in training there is no robustness to select by: clean accuracy counts."""
    score = row["holdout_robust" if args.eps > 0 and args.attack_steps > 0 else "holdout_clean"]
    if run.best is None or score >= run.best["score"]:
        weights = {name: tensor.cpu().clone() for name, tensor in run.averaged.state_dict().items()}
        run.best = {"step": run.step, "score": score, "model_state_dict": weights, "state_dict": weights}


def main(argv=None, teacher=None, build_model=None):
    """The command line. A program may hand over a teacher in place of `load_teacher`'s, and a function in
    place of `build_model`, see `build_run`. They are no part of the recipe that `resume` compares."""
    args = parse_args(argv)
    device, rank, world, local = start_processes(args)
    if local > 0:  # the first process of each machine goes first, as it may have to download
        barrier()
    data = Data(args, device, rank, world)
    teacher = (teacher or load_teacher(args, data.classes)).to(device) if args.dra_weight > 0 else None
    if local == 0:
        barrier()
    total_steps = args.max_steps or args.epochs * data.steps_per_epoch
    run = build_run(args, data, teacher, total_steps, build_model)
    if rank == 0:
        print_plan(args, data, teacher, total_steps)
    if args.dry_run:
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out) if rank == 0 else contextlib.nullcontext():
        train(args, data, teacher, run, out, total_steps)
    if rank == 0:
        for name in ("holdout_clean", "holdout_robust"):
            values = [row[name] for row in run.log if name in row]
            print(f"{name:14} {values[0]:.2f} % in the first evaluation, {values[-1]:.2f} % in the last")
        kept = "last.pt" if args.family == "vit" else "best.pt"  # Wu et al. keep the last average
        print("AutoAttack judges: python eval_autoattack.py", out / kept)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
