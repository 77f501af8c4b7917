"""Adversarial training with diffusion representation alignment (DRA) on ImageNet, in one file.

Paper: "Expanding the Role of Diffusion Models for Robust Classifier Training", arXiv 2602.19931.

This is train_cifar.py for large images, with the same sections and names: `diff train_cifar.py
train_imagenet.py` shows what differs. Read that file first. It explains the method; this one explains what is
new:

    * A backbone from timm with DINOv3's pretrained weights is fine-tuned as a whole, with Lion.
    * The teacher is LightningDiT, a diffusion transformer on the latents of an autoencoder (dit_encoder.py).
      It costs more than half as much as the step itself, so its features can also be computed once and kept.
    * Images are files, which worker processes read and crop.
    * These backbones have no BatchNorm. So a batch may be computed in pieces, on one GPU or on many, with the
      same result, and there are no statistics to care for.

    L        = L_TRADES + lambda * L_DRA                        (eq. 4)
    L_TRADES = CE(f(x), y) + beta * KL(p(x) || p(x'))           x': the attacked image, max |x' - x| <= eps
    L_DRA    = -cos(h(enc(x')), g(x_t, t, y))                   (eq. 3)
               enc: the classifier's features, averaged over patches; h: a small MLP, the projector;
               g: features of a frozen LightningDiT for x_t, the CLEAN image's latent noised to time t

To see it run, in about a minute on a CPU, without data or downloads:

    python train_imagenet.py --smoke

With images and teacher as below, the defaults aim at the paper's row "DM-AT+DRA, ViT-B/16" (paper: 76.87 %
clean, 55.16 % AutoAttack). Its ConvNeXt-B row (paper: 76.03 / 56.07) differs in the backbone:

    torchrun --nproc-per-node 8 train_imagenet.py --data imagenet --synthetic lightningdit-4m \
        --teacher DIT.pt VAE.pt STATS.pt [--arch convnext_base.dinov3_lvd1689m]

A run writes last.pt, best.pt and log.csv to --out. If it is killed, the same command continues it.
"""
import argparse
import contextlib
import copy
import csv
import itertools
import json
import math
import os
import sys
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
from filelock import FileLock, Timeout
from PIL import Image
from timm.optim import Lion
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from dit_encoder import DiTEncoder, InputError, LightningDiT, VAEEncoder, load_dit_encoder

# -----------------------------------------------------------------------------------------------------------
# Settings. Each number says where it comes from. "stated": in the paper, or in what it refers to.
# "chosen": by us, where the paper leaves it open, if possible as DM-AT has it.
# What one may want to vary is a flag, see `parse_args`; the rest is here.

CROP_AREA = (0.08, 1.0)  # share of the image in a random resized crop (chosen: torchvision's default)
WARMUP = 0.025  # share of the steps before averaging (chosen: DM-AT's)
RESIZE = 256 / 224  # shorter side over centre crop in evaluations: RobustBench's protocol
HOLDOUT = 1024  # evenly spaced training images, never trained on, to select best.pt (chosen); at most a tenth
SELECTION_STEPS = 40  # PGD steps on the margin loss for that selection (chosen: DM-AT's)
PROJECTOR_WIDTH = 2048  # hidden width of h: REPA's, arXiv 2410.06940; the three layers are stated
# Two channels of LightningDiT-XL/1 are far larger than the others, whatever the image shows. They would
# decide every cosine and tell no image from another, so they are set to zero (stated).
ZERO_CHANNELS = (1053, 259)
LOG_EVERY = 50  # steps between rows of log.csv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOKE = {"data": "", "arch": "test_vit", "no_pretrained": True, "image_size": 96, "epochs": 6, "lr": 4e-3,
         "batch_size": 32, "weight_decay": 0.01, "eval_every": 2.0, "teacher_layer": 1, "workers": 2,
         "out": "runs/imagenet-smoke", "device": "cpu"}  # other defaults for --smoke


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
time_of_noise = flag_type("a number above 0, at most 1", float, lambda x: 0 < x <= 1)
count = flag_type("a whole number above 0", int, lambda x: x.denominator == 1 and 0 < x < 2**63)


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(usage="%(prog)s [flags] (--help lists them)", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # Robustness needs far more images than the real ones.
    add = parser.add_argument_group("data").add_argument
    add("--data", default="imagenet", help="folder with train/ in it, and there a folder per class")
    add("--synthetic", metavar="DIR", help="generated images: a folder with class folders of the same names")
    add("--synthetic-fraction", type=fraction, default=0.7, help="of a batch (chosen: DM-AT's)")
    add("--image-size", type=count, default=224, help="pixels (stated: RobustBench's standard)")
    add("--workers", type=whole, default=min(16, os.cpu_count() or 1), help="image readers for each process")
    # Lion moves every weight by the rate, however small its gradient: so the rate is far below SGD's.
    add = parser.add_argument_group("model").add_argument
    add("--arch", default="vit_base_patch16_dinov3.lvd1689m", help="a timm model without BatchNorm (stated)")
    add("--no-pretrained", action="store_true", help="start from random weights")
    add("--epochs", type=count, default=100, help="of ceil(real images / batch size) steps (stated)")
    add("--max-steps", type=count, help="number of steps, in place of --epochs")
    add("--batch-size", type=count, default=1024, help="over all processes (chosen: as for ViT-B/2)")
    add("--accumulate", type=count, default=1, help="compute each batch in so many pieces, for less memory")
    add("--lr", type=positive, default=1e-5, help="peak learning rate of Lion (chosen)")
    add("--weight-decay", type=number, default=0.5, help="not of vectors (chosen: as for ViT-B/2)")
    add("--ema-decay", type=fraction, default=0.995, help="tau of the weight averaging (chosen: DM-AT's)")
    add("--label-smoothing", type=fraction, default=0.1, help="in the cross-entropy (chosen: DM-AT's)")
    # ImageNet's standard radius is half of CIFAR's; three steps reach a little further than that.
    add = parser.add_argument_group("attack").add_argument
    add("--beta", type=number, default=5.0, help="weight of TRADES' KL term (chosen: DM-AT's)")
    add("--eps", type=fraction, default="4/255", help="largest change of a pixel in [0,1] (stated)")
    add("--step-size", type=positive, default="2/255", help="of the attack (chosen)")
    add("--attack-steps", type=whole, default=3, help="PGD steps (stated); 0: no attack, x' = x")
    # Middle layers say most about what an image shows: early ones stay close to the input, late
    # ones to the output.
    add = parser.add_argument_group("alignment (DRA)").add_argument
    add("--dra-weight", type=number, default=1.0, help="lambda, eq. (4) (chosen); 0: no alignment")
    add("--teacher", nargs=3, metavar=("DIT", "VAE", "STATS"), help="LightningDiT-XL/1 and VA-VAE (stated)")
    add("--teacher-t", type=time_of_noise, default=0.9, help="1 is the clean image, 0 pure noise (chosen)")
    add("--teacher-layer", type=whole, default=14, help="block whose input is the target (stated)")
    add("--teacher-unconditional", action="store_true", help="do not tell the teacher the label")
    add("--cache-targets", metavar="DIR", help="compute targets only once, not in each step")
    # Only backbone and teacher compute in bfloat16; logits, projector and losses stay in float32.
    add = parser.add_argument_group("running").add_argument
    add("--out", default="runs/imagenet", help="folder for last.pt, best.pt, log.csv; all machines share it")
    add("--seed", type=whole, default=0, help="of every random draw")
    add("--device", choices=["cuda", "cpu"], default=DEVICE, help="where to run")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, else float32; if not given, on a GPU")
    add("--no-compile", action="store_true", help="no torch.compile, which only a GPU uses")
    add("--eval-every", type=positive, default=1.0, help="epochs between evaluations (chosen: DM-AT's)")
    add("--save-minutes", type=number, default=5, help="minutes between checkpoints: what a kill can lose")
    add("--smoke", action="store_true", help="a minute on a CPU: tiny network, drawn images, random teacher")
    add("--dry-run", action="store_true", help="print what would be trained, and stop")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)  # any other flag still beats these
    args = parser.parse_args(argv)
    if args.smoke and not args.data:
        args.data = str(Path(args.out) / "data")
        args.synthetic = args.synthetic or str(Path(args.data) / "synthetic")
    if args.dra_weight == 0:
        args.teacher = args.cache_targets = None
    elif args.teacher is None and not args.smoke:
        parser.error("--teacher: expected three files (see README.md), or --dra-weight 0 for no alignment")
    args.amp = args.device == "cuda" if args.amp is None else args.amp
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    return args


# -----------------------------------------------------------------------------------------------------------
# Model. `model(images)` gives logits: `model.head(model.features(images))`. The features in between are what
# is aligned. Images come in [0, 1] and are normalised inside the model, so an attack on the model is an
# attack in pixels, as AutoAttack and RobustBench expect.


class Classifier(nn.Module):
    """A timm backbone with its normalisation inside.

    A ViT gives tokens [B, T, D], a ConvNeXt a map [B, D, h, w]. timm's `forward_head` takes the mean, without
    the class token and the registers. The last norm comes before it in DINOv3's ViTs, after it in a ConvNeXt.
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

        Autocast ends here: bfloat16 has 8 significant bits, too few for logits, softmax, KL and cosine.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            tokens = self.backbone.forward_features((images - self.mean) / self.std)
            return self.backbone.forward_head(tokens, pre_logits=True).float()

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
    images of that size will come, which spares DINOv3's ViTs some work in each forward and changes no result.
    Features are the mean over patches or positions (chosen; timm's default differs by model). Raises
    InputError for an unknown name, and for a model with BatchNorm, whose statistics would depend on how a
    batch is cut into pieces.
    """
    if not timm.is_model(arch):
        raise InputError(f"--arch {arch}: timm has no such model")
    size = {}
    if image_size and image_size % 16 == 0 and "_patch16_dinov3" in arch:
        # Otherwise timm makes the grid of positions on the CPU in each forward, and a GPU waits for it.
        size = {"img_size": image_size, "dynamic_img_size": False}
    backbone = timm.create_model(arch, pretrained, num_classes=num_classes, global_pool="avg", **size)
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in backbone.modules()):
        raise InputError(f"--arch {arch}: has BatchNorm, expected a model without, such as a ViT")
    return Classifier(backbone)


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
    forward; if None, they are computed here. Returns x' [B, 3, H, W] in [0, 1], detached.
    """
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

    batch.images x [B, 3, H, W] in [0, 1], batch.labels y [B], batch.start like images, and for the alignment
    either batch.target [B, width] from the cache or batch.teacher_noise [B, *latent_shape]. projectors: one,
    or none without alignment. ema_decay: see `averaging_decay`. args: eps, step_size, attack_steps, beta,
    label_smoothing, dra_weight, teacher_t, teacher_unconditional, accumulate. Returns detached scalars by
    name, accuracies in percent. They stay on the device, because reading one would make the host wait for
    the GPU.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    numbers = []
    for piece in split_batch(batch, args.accumulate):  # exact up to rounding: no layer mixes images
        images, labels = piece.images, piece.labels

        # The clean forward comes first and serves twice: the attack moves away from its p(x), and L
        # contains it.
        clean_logits = model(images)

        # The attack is PGD, eq. (2). Eq. (1) would have it maximise the cross-entropy; TRADES maximises KL.
        adv = images  # without an attack x' = x
        if args.eps > 0 and args.attack_steps > 0:
            adv = trades_attack(model, images, piece.start, args.eps, args.step_size, args.attack_steps,
                                clean_logits)

        # L_TRADES. Two forwards of B images, as on CIFAR. With one of 2B, the attack would need a further
        # clean forward in front of it.
        adv_features = model.features(adv)  # enc(x'), [B, D]
        adv_logits = model.head(adv_features)
        trades = trades_loss(clean_logits, adv_logits, labels, args.beta, args.label_smoothing)

        # L_DRA, eq. (3). The teacher gets the CLEAN image, encodes it to a latent z, and makes x_t = t z +
        # (1 - t) noise itself. The gradient trains h and, through enc(x'), the backbone, but not `head`,
        # which comes after the features. It stops at x', which is data by now, and at the teacher, which is
        # frozen.
        alignment = trades.new_zeros(())
        for projector in projectors:
            target = piece.target  # from the cache, [B, width]
            if target is None:  # g(x_t, t, y), now
                given_labels = None if args.teacher_unconditional else labels
                target = teacher(images, given_labels, args.teacher_t, piece.teacher_noise)
            alignment = dra_loss(projector(adv_features), target)

        # Eq. (4). Every term is a mean over images, so the mean of the pieces' losses is that of the batch.
        loss = trades + args.dra_weight * alignment
        (loss / args.accumulate).backward()
        clean, robust = [(x.argmax(1) == labels).float().mean() * 100 for x in (clean_logits, adv_logits)]
        numbers.append(torch.stack([loss, trades, -alignment, clean, robust]).detach())
    average_gradients([*model.parameters(), *projectors.parameters()])  # over the processes of torchrun
    optimizer.step()
    update_average(averaged, model, ema_decay)
    names = ("loss", "trades", "cosine", "train_clean", "train_robust")
    means = dict(zip(names, torch.stack(numbers).mean(dim=0)))
    return {name: value for name, value in means.items() if name != "cosine" or len(projectors)}


def split_batch(batch, pieces):
    """A batch, cut into so many pieces of equal size: piece k has the images k, k + pieces, ...

    A ViT-B/16 keeps the activations of all its layers for the backward pass, so memory grows with the images
    that are computed together. In pieces a batch of 1,024 fits any GPU, at the same speed as long as a piece
    fills it.
    """
    return [SimpleNamespace(**{name: None if value is None else value[k::pieces]
                               for name, value in vars(batch).items()}) for k in range(pieces)]


# -----------------------------------------------------------------------------------------------------------
# Optimiser, schedule, weight averaging, and several processes.


def build_optimizer(args, *modules):
    """Lion (stated; arXiv 2302.06675, from timm) over all parameters of `modules`. Without weight decay on
    vectors: biases, layer norms, and the factors that scale a block's output (chosen). Decay pulls towards
    zero, which is a sensible place for a matrix, but not for the scale of a layer norm."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1]},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return Lion(groups, lr=args.lr, weight_decay=args.weight_decay, foreach=True)


def build_scheduler(optimizer, total_steps, steps_per_epoch):
    """The rate, per STEP (chosen): it rises linearly to --lr over the first epoch, or a tenth of the steps
    where that is less, then falls to zero along half a cosine."""
    rise = max(1, min(steps_per_epoch, total_steps // 10))

    def factor(step):
        fall = (step + 1 - rise) / (total_steps + 1 - rise)  # above 0 after the rise; 1 after the last step
        return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * fall)) / 2
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def averaging_decay(step, warmup_steps, tau):
    """Share of the old average that stays after step `step` (from 0), as in DM-AT. During the warm-up none:
    the average is the model. Then it rises to tau, so that the first, weak weights are soon forgotten."""
    since = step + 1 - warmup_steps
    return 0.0 if since < 0 else min(tau, (1 + since) / (10 + since))


@torch.no_grad()
def update_average(averaged, model, ema_decay):
    """averaged <- ema_decay * averaged + (1 - ema_decay) * model. Averaged weights are usually more robust
    than the last ones."""
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
    """Mean gradient over all processes. This is not left to DistributedDataParallel: in a step that costs as
    much as 12 forwards its overlapping gains little, and pieces of a batch need no special care."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is not None:
                all_reduce(parameter.grad).div_(dist.get_world_size())


# -----------------------------------------------------------------------------------------------------------
# Data, from disk to one augmented batch on the device. Every random draw is a function of the seed and of a
# number: of a step, a place in its batch, a pass or an image. So a run that continues after a kill sees the
# batches of an undisturbed one, and each of several processes can take its share of a batch.


def random_seed(seed, position, purpose):
    """A number that depends on (seed, position, purpose) alone. position: an int or several; purpose: a short
    text, so that draws for different purposes are independent."""
    mixed = np.random.SeedSequence([seed, *np.atleast_1d(position).tolist(), *purpose.encode()])
    return int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed, position, purpose, device="cpu"):
    """A random generator that depends on (seed, position, purpose) alone, see `random_seed`."""
    return torch.Generator(device).manual_seed(random_seed(seed, position, purpose))


class Folder:
    """The images under class folders, in sorted order: the k-th folder holds label k.

    Names and labels are two compact arrays. Millions of Python objects would be copied, bit by bit, into each
    process that reads images, as soon as their reference counts are touched. classes: names of the folders
    that have to be there; others would shift all labels after them. Raises InputError.
    """

    def __init__(self, path, classes=None):
        try:
            found = ImageFolder(path)
        except OSError as error:
            raise InputError(f"{path}: expected a folder of images for each class ({error})") from None
        if classes and found.classes != classes:
            different = min(set(found.classes) ^ set(classes))
            raise InputError(f"{path}: expected the class folders of train/, but {different} is not in both")
        self.path, self.classes = path, found.classes
        self.names = np.array([os.path.relpath(name, path) for name, _ in found.samples])
        self.labels = np.array(found.targets)

    def __len__(self):
        return len(self.labels)

    def read(self, number, transform):
        """transform(image `number`, a PIL image in RGB). Raises InputError, which names the file."""
        path = os.path.join(self.path, self.names[number])
        try:
            with Image.open(path) as image:
                return transform(image.convert("RGB"))
        except Exception as error:  # a damaged file can fail in any way
            raise InputError(f"{path}: cannot be read as an image ({type(error).__name__})") from None


def to_pixels(image):
    """PIL image -> uint8 [3, H, W]. As bytes, images go from process to process, and to the GPU, at a quarter
    of their size as float32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Images(Dataset):
    """Real and then synthetic images, numbered through. Each item is one of these, uint8 [3, H, W]."""

    def __init__(self, folders):
        self.folders = folders

    def read(self, number, transform):
        """Image `number` -> (transform of it, as pixels; its label)."""
        folder = self.folders[0] if number < len(self.folders[0]) else self.folders[1]
        number = number - (0 if folder is self.folders[0] else len(self.folders[0]))
        return to_pixels(folder.read(number, transform)), int(folder.labels[number])


class Augmented(Images):
    """Training images by (step, place in the batch, number): a random resized crop and a flip.

    Both depend on (seed, step, place) alone, and so not on which process reads the image, nor on what that
    has read before.
    """

    def __init__(self, folders, args):
        super().__init__(folders)
        self.seed, self.cache = args.seed, args.cache_targets
        self.crop = transforms.RandomResizedCrop(args.image_size, scale=CROP_AREA)

    def __getitem__(self, key):
        """-> image, label, cached target float16 [width] (empty without a cache)."""
        step, place, number = key
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            torch.manual_seed(random_seed(self.seed, (step, place), "augment"))
            pixels, label = self.read(number, self.crop)
            flip = int(torch.rand(()) < 0.5)
        target = torch.zeros(0)
        if self.cache:  # the file is mapped, so that no more than this row is read
            row = np.load(Path(self.cache) / "targets.npy", mmap_mode="r")[number, flip]
            target = torch.from_numpy(np.array(row))
        return pixels.flip(2) if flip else pixels, label, target


class Centred(Images):
    """Images by number, the shorter side resized and the centre cropped: for evaluations, where it is
    RobustBench's protocol, and for cached targets, where it is what LightningDiT was trained on."""

    def __init__(self, folders, size, resize):
        super().__init__(folders)
        self.crop = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])

    def __getitem__(self, number):
        """-> image, label, number."""
        return *self.read(number, self.crop), number


def draw_smoke_folders(path, seed):
    """An ImageNet in small, train/, val/ and synthetic/ with JPEG files, that a tiny network learns in a
    minute: horizontal and vertical waves, each in five colours, with random phase, frequency and contrast,
    and noise."""
    for split, images_per_class in (("train", 40), ("val", 6), ("synthetic", 20)):
        for label in range(10):
            folder = path / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([seed, label, *split.encode()])
            for i in range(images_per_class):
                wave = np.sin(2 * np.pi * (rng.uniform(3, 6) * np.arange(176) / 176 + rng.uniform()))
                wave = wave[:, None, None] if label < 5 else wave[None, :, None]
                colour = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1))[label % 5]
                image = 0.5 + rng.uniform(0.25, 0.45) * wave * colour + rng.normal(0, 0.05, (176, 176, 3))
                Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).save(folder / f"{i:03}.jpg")


class Data:
    """Training images, real and synthetic, the held-out images, and the batches drawn from them.

    Held-out images are spread evenly over the sorted files, so that almost all classes are among them. (On
    CIFAR, whose images come shuffled, they are the first ones.)
    """

    latent_shape = None  # of the teacher's noise, where a teacher is asked in each step

    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        self.share = slice(rank, None, world)  # of each batch, and of the held-out images, for this process
        if args.batch_size % (world * args.accumulate):
            raise InputError(f"--batch-size {args.batch_size}: expected a multiple of {world} process(es) x "
                             f"--accumulate {args.accumulate}")
        real = Folder(os.path.join(args.data, "train"))
        self.classes = real.classes
        # Images are numbered through both folders: the real ones first, then the synthetic ones.
        self.folders = [real] + [Folder(path, self.classes) for path in [args.synthetic] if path]
        self.ends = np.cumsum([len(folder) for folder in self.folders]).tolist()  # where each folder ends
        self.holdout = np.unique(np.linspace(0, len(real) - 1, min(HOLDOUT, len(real) // 10)).astype(int))
        self.real = torch.from_numpy(np.setdiff1d(np.arange(len(real)), self.holdout))  # the others
        self.n_holdout, self.n_real = len(self.holdout), len(self.real)
        self.n_synthetic = self.ends[-1] - self.ends[0]
        # An epoch has as many steps as all real images, held-out ones included, would fill (DM-AT). The
        # synthetic images of a batch are rounded down (DM-AT).
        self.steps_per_epoch = math.ceil(self.ends[0] / args.batch_size)
        self.batch_synthetic = int(args.batch_size * args.synthetic_fraction) if args.synthetic else 0
        self.batch_real = args.batch_size - self.batch_synthetic
        self.coming = None  # batches from the worker processes, in order

    def draw(self, step):
        """Numbers of the images in a step's batch, over all processes: int64 [batch_size].

        Real images come from passes over all of them, each in an order of its own; a batch may end one pass
        and begin the next. Synthetic ones are drawn with replacement, anew in each step.
        """
        seed, (number, offset) = self.args.seed, divmod(step * self.batch_real, self.n_real)
        passes = range(number, number + 2 + self.batch_real // self.n_real)  # the batch may reach into these
        order = torch.cat([torch.randperm(self.n_real, generator=generator(seed, i, "pass")) for i in passes])
        real = self.real[order[offset:offset + self.batch_real]]
        synthetic = self.ends[0] + torch.randint(max(1, self.n_synthetic), (self.batch_synthetic,),
                                                 generator=generator(seed, step, "synthetic"))
        return torch.cat([real, synthetic])

    def load(self, first_step):
        """Iterate over what `Augmented` gives for this process's share of the batches from a step on. Worker
        processes read and crop them while the GPU computes."""
        shares = ([(step, place, number) for place, number in enumerate(self.draw(step).tolist())][self.share]
                  for step in itertools.count(first_step))
        return iter(DataLoader(Augmented(self.folders, self.args), batch_sampler=shares,
                               num_workers=self.args.workers, pin_memory=self.device.type == "cuda"))

    def batch(self, step):
        """All that `train_step` needs for one step; steps have to be asked for in order. B: this process's
        share of the batch.

        Returns images [B, 3, H, W] in [0, 1], labels [B], start: the attack's first point, and target
        [B, width] or, where latent_shape says that there is a teacher to ask, teacher_noise
        [B, *latent_shape]; None for what is not needed.
        """
        args, device = self.args, self.device
        if self.coming is None:
            self.coming = self.load(step)
        images, labels, target = [tensor.to(device, non_blocking=True) for tensor in next(self.coming)]
        images = images.float() / 255  # [B, 3, H, W] in [0, 1]
        # One stream of random numbers, always for the whole batch, of which this process takes its share.
        # Drawn on the device: these are as large as the images.
        random = {"generator": generator(args.seed, step, "batch", device), "device": device}
        uniform = torch.rand((args.batch_size, *images.shape[1:]), **random)[self.share]
        start = (images + args.eps * (2 * uniform - 1)).clamp(0, 1)
        noise = None
        if self.latent_shape:
            noise = torch.randn((args.batch_size, *self.latent_shape), **random)[self.share]
        return SimpleNamespace(images=images, labels=labels, start=start, teacher_noise=noise,
                               target=target.float() if args.cache_targets else None)

    def centred(self, numbers, size, resize):
        """Iterate over images number `numbers`, as `Centred` gives them, 64 at a time."""
        return DataLoader(Centred(self.folders, size, resize), batch_size=64, sampler=numbers.tolist(),
                          num_workers=self.args.workers)

    def holdout_batches(self):
        """This process's share of the held-out images, up to 64 at a time: images [B, 3, H, W] in [0, 1],
        labels, and start, which depends on the image's number alone, not on the processes."""
        size = self.args.image_size
        for images, labels, numbers in self.centred(self.holdout[self.share], size, round(size * RESIZE)):
            images, labels = images.to(self.device).float() / 255, labels.to(self.device)
            uniform = [torch.rand(3, size, size, generator=generator(self.args.seed, number, "evaluate"))
                       for number in numbers.tolist()]
            start = images + self.args.eps * (2 * torch.stack(uniform).to(self.device) - 1)
            yield images, labels, start.clamp(0, 1)


@torch.no_grad()
def cache_targets(args, data, teacher):
    """Compute the teacher's features once, of each image's centre crop and its mirror image, with noise that
    is fixed per image and view, into DIR/targets.npy: float16 [images, 2, width].

    A step with ViT-B/16 costs 431 GFLOP per image and the teacher 257 (138 the autoencoder, 119 the
    transformer), so without it a step costs a third less. The cache costs two calls of the teacher for each
    image there is: with 4 million synthetic ones, as many as 8 epochs need. What changes against the paper's
    targets: the classifier sees a piece of the image while the target describes its middle, and the noise is
    the same in every epoch. Each image has two targets, its own and its mirror image's, as training flips
    half of the images. A row of zeros has not been computed yet, so any number of processes can go on after a
    kill. Raises InputError where DIR was made with other settings.
    """
    folder, n_images = Path(args.cache_targets), data.ends[-1]
    path, settings = folder / "targets.npy", folder / "targets.json"
    shape = (n_images, 2, teacher.width)
    names = ("teacher", "teacher_layer", "teacher_t", "teacher_unconditional", "data", "synthetic", "seed")
    here = {name: last_part(getattr(args, name)) for name in names} | {"images": str(n_images)}
    if data.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            there = dict(json.loads(settings.read_text())) if settings.exists() or path.exists() else here
        except (OSError, ValueError, TypeError):
            raise InputError(f"{settings}: missing or damaged; remove {path.name} to start anew") from None
        for name, value in here.items():
            if there.get(name) != value:
                raise InputError(f"{folder}: was made with {name} {there.get(name)}, not {value}")
        write_atomically(settings, lambda file: file.write(json.dumps(here).encode()))
        if not path.exists():
            np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
    barrier()
    try:
        targets = np.lib.format.open_memmap(path, "r+")
        if (targets.dtype, targets.shape) != (np.float16, shape):
            raise ValueError(f"this is {targets.dtype} {targets.shape}")
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path}: expected float16 {shape}: {error}; remove it to start anew") from None
    # A kill can leave a row half written, so both ends of both views are looked at.
    missing = np.flatnonzero((targets[:, :, [0, -1]] == 0).any(axis=(1, 2)))[data.share]
    barrier()  # all have looked before anyone writes
    loader = data.centred(missing, teacher.image_size, teacher.image_size)
    for images, labels, numbers in tqdm(loader, desc="caching targets", disable=data.rank > 0):
        noise = [torch.randn(2, *teacher.latent_shape, generator=generator(args.seed, number, "cache"))
                 for number in numbers.tolist()]
        noise = torch.stack(noise, dim=1).to(data.device)  # [2, B, *latent_shape]
        images, labels = images.to(data.device).float() / 255, labels.to(data.device)
        given_labels = None if args.teacher_unconditional else labels
        views = [teacher(view, given_labels, args.teacher_t, noise[i])
                 for i, view in enumerate((images, images.flip(3)))]
        targets[numbers] = torch.stack(views, dim=1).half().cpu().numpy()
    targets.flush()
    barrier()


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
    for buffer in averaged.buffers():  # all processes take those of process 0
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


def load_teacher(args, data):
    """The frozen diffusion encoder g. Raises InputError where it does not fit the data.

    To use another teacher, return it here: a frozen module in evaluation mode with `width`, `latent_shape`
    (of its noise), `image_size`, `num_classes` and `amp`. It is called as teacher(images [B, 3, H, W] in
    [0, 1], labels [B] or None, t, noise: N(0, 1) [B, *latent_shape]). The images are clean; it adds the noise
    itself. It returns features [B, width].
    """
    if args.teacher is None:  # the smoke run: features of a random network are a poor target, but they do
        torch.manual_seed(args.seed)
        vae = VAEEncoder(32, [(32, 1, False), (32, 1, True)], latent_channels=4)
        dit = LightningDiT(64, 2, 128, 4, 2, 64, len(data.classes) + 1, args.teacher_layer)
        teacher = DiTEncoder(vae, dit, image_size=32)
        teacher.checked = True  # there are no statistics that random latents would have to fit
    else:
        teacher = load_dit_encoder(*args.teacher, args.teacher_layer, ZERO_CHANNELS)
    if teacher.num_classes != len(data.classes) and not args.teacher_unconditional:
        raise InputError(f"{args.teacher[0]}: knows {teacher.num_classes} classes, not {len(data.classes)}; "
                         "--teacher-unconditional drops the labels")
    teacher.amp = args.amp
    return teacher.to(data.device, memory_format=torch.channels_last)


def build_run(args, data, teacher=None, total_steps=1, pretrained=False):
    """All that a run trains or keeps, on the device: a function of the settings and the seed alone.

    Returns SimpleNamespace: model, averaged, projectors, optimizer, scheduler; step: how many are done; log:
    a dict per row; recent: the numbers of the steps since the last row; best: step, score and weights of the
    best average so far, on the CPU; best_on_disk: the one in best.pt.
    """
    torch.manual_seed(args.seed)
    model = build_model(args.arch, len(data.classes), pretrained, args.image_size)
    width = model.eval().features(torch.zeros(1, 3, args.image_size, args.image_size)).shape[1]
    projectors = nn.ModuleList([build_projector(width, teacher.width)] if teacher else []).to(data.device)
    model.to(data.device, memory_format=torch.channels_last)  # the faster layout for convolutions
    model.amp = args.amp
    averaged = copy.deepcopy(model).requires_grad_(False).eval()  # it shares no storage with the model
    optimizer = build_optimizer(args, model, projectors)
    scheduler = build_scheduler(optimizer, total_steps, data.steps_per_epoch)
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


def train(args, data, teacher, run, out, total_steps):
    """Train `run` up to `total_steps`, from last.pt in `out` or from scratch. Raises FloatingPointError where
    the loss or a weight is not finite, and InputError as `resume`."""
    about = {"args": vars(args), "recipe": recipe(args, data), "arch": args.arch, "dataset": "imagenet",
             "num_classes": len(data.classes), "classes": data.classes,
             "mean": run.model.mean.flatten().tolist(), "std": run.model.std.flatten().tolist()}
    resume(out, about, run)
    if data.rank == 0:
        print(f"from step {run.step} to {total_steps}", flush=True)
        save(out, about, run)
    compile_parts(args, run.model, teacher)
    compile_parts(args, run.averaged)
    if args.cache_targets:
        cache_targets(args, data, teacher)
        teacher = None  # from here on the cache answers
    elif teacher:
        data.latent_shape = teacher.latent_shape

    eval_every = max(1, round(args.eval_every * data.steps_per_epoch))
    first_step, saved_at, row_step, row_at = run.step, time.time(), run.step, time.time()
    for step in range(first_step, total_steps):
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
        run.scheduler.step()
        if saving:
            saved_at = time.time()
            if data.rank == 0:
                save(out, about, run)


def keep_best(args, run, row):
    """Keep the average if none before it scored higher on the held-out images; ties go to the later one
    (chosen: DM-AT's). Without an attack in training there is no robustness to select by: clean accuracy
    counts."""
    score = row["holdout_robust" if args.eps > 0 and args.attack_steps > 0 else "holdout_clean"]
    if run.best is None or score >= run.best["score"]:
        weights = {name: tensor.cpu().clone() for name, tensor in run.averaged.state_dict().items()}
        run.best = {"step": run.step, "score": score, "model_state_dict": weights, "state_dict": weights}


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    device, rank, world, local = start_processes(args)
    out = Path(args.out)
    if local > 0:  # the first process of each machine goes first, as it may have to download
        barrier()
    elif args.smoke and args.data == str(out / "data"):
        draw_smoke_folders(Path(args.data), args.seed)
    data = Data(args, device, rank, world)
    teacher = load_teacher(args, data) if args.dra_weight > 0 else None
    total_steps = args.max_steps or args.epochs * data.steps_per_epoch
    # A run that continues has all of its weights in last.pt.
    pretrained = not (args.no_pretrained or args.dry_run or (out / "last.pt").exists())
    run = build_run(args, data, teacher, total_steps, pretrained)
    if local == 0:
        barrier()
    if rank == 0:
        print_plan(args, data, teacher, total_steps)
    if args.dry_run:
        return
    out.mkdir(parents=True, exist_ok=True)
    with lock(out) if rank == 0 else contextlib.nullcontext():
        train(args, data, teacher, run, out, total_steps)
    if rank == 0:
        for name in ("holdout_clean", "holdout_robust"):
            values = [row[name] for row in run.log if name in row]
            print(f"{name:14} {values[0]:.2f} % in the first evaluation, {values[-1]:.2f} % in the last")
        print("AutoAttack judges: python eval_autoattack.py", out / "best.pt")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        # An error in a worker process comes with its traceback in front; the last line says what is wrong.
        print(f"error: {str(problem).strip().splitlines()[-1].split('InputError: ')[-1]}", file=sys.stderr)
        sys.exit(2)
