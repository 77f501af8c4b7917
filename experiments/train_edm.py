"""Train an EDM diffusion model on one's own 32 x 32 images: the teacher, and the source of synthetic images.

    python experiments/train_edm.py --smoke          # training, sampling, using both: two minutes on a CPU

    python experiments/train_edm.py --data-dir FOLDER --out runs/edm
    python experiments/train_edm.py --data-dir FOLDER --model runs/edm/edm.pt --probe
    python experiments/train_edm.py --model runs/edm/edm.pt --sample 1000000 --out 1m.npz
    python train_cifar.py --data-dir FOLDER --teacher runs/edm/edm.pt --synthetic 1m.npz --out runs/mine

What arXiv 2602.19931 needs of a diffusion model is public for CIFAR-10 and CIFAR-100 only. For any other data
set in the format of train_cifar.py (train.npz and test.npz in FOLDER) this script makes it, with the network
and the settings of EDM (Karras et al. 2022, arXiv 2206.00364). Where there are not 10 or 100 classes, it
needs an entry in train_cifar.py's DATASETS.

A diffusion model learns to remove noise. A training image y gets noise n of level sigma, and the denoiser D
has to tell y from the sum. Noise levels vary over orders of magnitude:

    L = E lambda(sigma) ||D(y + n; sigma, label) - y||^2,   n ~ N(0, sigma^2),   ln(sigma) ~ N(-1.2, 1.2^2)

The best possible answer is the mean of all images that could lie behind the noisy one, so from there it
points towards more likely images. That is enough to draw new ones: begin with nothing but noise, sigma = 80,
and follow the answers while sigma falls to 0. It is a differential equation, solved here in 18 steps:

    dx / dsigma = (x - D(x; sigma, label)) / sigma

And to tell the image from the noise, the network has to know what images show. That is why its features are
worth imitating. A run writes edm.pt, log.csv and, every --save-every images, a picture of samples to --out.
The same command again continues it. Every random draw is a function of (seed, step), or of (seed, number of
the image). `torchrun --nproc-per-node N` in front trains or draws on N GPUs.
"""
import argparse
import copy
import csv
import math
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
import train_cifar
from edm_encoder import Conv2d, SongUNetEncoder, UNetBlock, group_norm, load_edm, load_edm_encoder
from eval_autoattack import save_atomically as save_npz
from train_cifar import (DATASETS, InputError, all_reduce, average_gradients, barrier, checksum, fraction,
                         generator, load_real, lock, note_signal, save_atomically, signalled, stop, write_log)

# ------------------------------------------------------------------------------------------------------------
# Settings: EDM's own for CIFAR-10, here and in the defaults of the flags, where nothing else is said.

LOG_SIGMA = (-1.2, 1.2)  # mean and deviation of ln(sigma) in training
SIGMA_MAX, SIGMA_MIN, RHO = 80, 0.002, 7  # the sampler's noise levels, see `sample`
WARMUP = 0.05  # share of --images with a rising learning rate: 10M of EDM's 200M
HALF_LIFE, HALF_LIFE_SHARE = 0.5e6, 0.05  # of the averaging: images, but at most this share of those so far
LOG_EVERY = 50  # steps between rows of log.csv
GRID = 8  # samples per class in the picture, for the first ten classes
PROBE_SIGMAS = (0.02, 0.06, 0.2, 0.5)  # around the best one, 0.06 (arXiv 2303.09769)
ASSUMED_RATE = 150e12  # FLOP/s, for the hours in the plan: 15 % of an H100's peak in bfloat16
SMOKE = {"model_channels": 16, "channel_mult": [1, 1, 2], "num_blocks": 1, "dropout": 0, "batch_size": 16,
         "images": 2400, "out": "runs/smoke-edm", "device": "cpu", "amp": False}  # defaults for --smoke
SMOKE_SAMPLES, SMOKE_CIFAR = 256, ["--batch-size", "32", "--epochs", "2", "--eval-every", "2"]

# ------------------------------------------------------------------------------------------------------------
# The network: SongUNet as a whole, the denoiser around it, and its loss.


class SongUNet(SongUNetEncoder):
    """The whole network F. Arguments as SongUNetEncoder's, whose names and meaning are NVIDIA's.

    The second half mirrors the first, from 8 x 8 back to 32 x 32. Each of its blocks is also shown, along the
    channels, what one of the first half's layers made at this resolution, the last one first. On these skip
    connections the detail travels that the narrow middle cannot hold. It has one block more per resolution,
    as the first half's layers include the first convolution or the way down.
    """

    def __init__(self, img_resolution, model_channels=128, channel_mult=(1, 2, 2, 2), channel_mult_emb=4,
                 num_blocks=4, attn_resolutions=(16,), resample_filter=(1, 1), **others):
        bottom = img_resolution >> (len(channel_mult) - 1)
        super().__init__(f"dec.{bottom}x{bottom}_in1", img_resolution, model_channels=model_channels,
                         channel_mult=channel_mult, channel_mult_emb=channel_mult_emb, num_blocks=num_blocks,
                         attn_resolutions=attn_resolutions, resample_filter=resample_filter, **others)
        block = {"emb_channels": model_channels * channel_mult_emb, "resample_filter": resample_filter}
        skips = [(module.conv1 if isinstance(module, UNetBlock) else module).weight.shape[0]
                 for name, module in self.enc.items() if not name.endswith("_aux_residual")]
        channels = skips[-1]
        for level in reversed(range(len(channel_mult))):
            resolution, width = img_resolution >> level, model_channels * channel_mult[level]
            name = f"{resolution}x{resolution}"
            if level < len(channel_mult) - 1:
                self.dec[f"{name}_up"] = UNetBlock(channels, channels, up=True, **block)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and resolution in attn_resolutions
                self.dec[f"{name}_block{i}"] = UNetBlock(channels + skips.pop(), width, attention=attention,
                                                         **block)
                channels = width
        self.dec[f"{name}_aux_norm"] = group_norm(channels)
        self.dec[f"{name}_aux_conv"] = Conv2d(channels, 3, kernel=3)

    def forward(self, x, c_noise, class_labels):
        """x [B, 3, H, W] scaled by c_in, the rest as in `embed` -> [B, 3, H, W]."""
        emb = self.embed(c_noise, class_labels)
        image, skips = x, []
        for name, module in self.enc.items():  # down, from 32 x 32 to 8 x 8
            if name.endswith("_aux_residual"):  # NCSN++: see SongUNetEncoder
                x = image = (x + module(image)) * 0.5**0.5
                skips.pop()  # the sum takes the place of what it was added to
            else:
                x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for name, module in self.dec.items():  # two blocks in the middle, then up again
            if "_block" in name:  # "_in0", "_in1" and "_up" see no skip connection
                x = torch.cat([x, skips.pop()], dim=1)
            if isinstance(module, UNetBlock):
                x = module(x, emb)
            else:
                x = F.silu(module(x)) if name.endswith("_aux_norm") else module(x)
        return x


class Denoiser(nn.Module):
    """D: denoiser(noisy, sigma, labels) -> the mean of the clean images that could lie behind.

    F, the network, should neither get nor have to give numbers of unusual size, whatever the noise level:

        D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4, label)
        c_in   = 1 / sqrt(sigma^2 + sigma_data^2)                    F's input has variance 1
        c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)             the best answer, were images noise, too
        c_out  = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)     and the size of the error of that answer

    With little noise D is x plus a small correction, with a lot of it F has to say everything.
    **network: SongUNet's arguments. Attributes: img_resolution, label_dim (0: it takes no labels).
    """

    amp = False  # whether F computes in bfloat16

    def __init__(self, sigma_data=0.5, **network):
        super().__init__()
        self.model, self.sigma_data = SongUNet(**network), sigma_data
        self.img_resolution, self.label_dim = network["img_resolution"], self.model.label_dim

    def forward(self, noisy, sigma, labels=None):
        """noisy [B, 3, H, W] float32 = image in [-1, 1] + sigma * noise; sigma > 0, a number or [B]; labels
        [B] int64, where -1 is no label, or None. Returns the denoised images, float32 [B, 3, H, W]."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=noisy.device).expand(len(noisy))
        sigma = sigma[:, None, None, None]  # [B, 1, 1, 1]
        total = sigma**2 + self.sigma_data**2  # the noisy image's variance
        class_labels = noisy.new_zeros(len(noisy), self.label_dim)
        if labels is not None and self.label_dim:
            class_labels = F.one_hot(labels + 1, self.label_dim + 1)[:, 1:].to(noisy)  # -1 gives zeros
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.amp):
            output = self.model(noisy / total.sqrt(), sigma.flatten().log() / 4, class_labels).float()
        c_out = sigma * self.sigma_data / total.sqrt()
        return self.sigma_data**2 / total * noisy + c_out * output


def load_denoiser(path):
    """A Denoiser from NVIDIA's .pkl or from edm.pt, path or URL: frozen, evaluation mode, on the CPU.

    Raises ValueError, one line that names the file, where it is damaged or something else, and OSError where
    it cannot be opened, as `edm_encoder.load_edm_encoder` does. Nothing in the file is run.
    """
    return load_edm(path, Denoiser).eval()


def denoising_loss(denoiser, images, labels, sigma, noise):
    """lambda(sigma) ||D(y + sigma * noise; sigma, label) - y||^2 for each image, summed over pixels.

    images y [B, 3, H, W] in [-1, 1]; labels as in Denoiser; sigma [B]; noise like images, standard normal.
    lambda = 1 / c_out^2, so F's error counts the same at each noise level, and an untrained network, whose F
    is 0, has about 1 per pixel. Returns float32 [B].
    """
    weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
    denoised = denoiser(images + sigma[:, None, None, None] * noise, sigma, labels)
    return weight * (denoised - images).square().sum(dim=(1, 2, 3))


@torch.no_grad()
def sample(denoiser, latents, labels, steps=18):
    """Draw images: latents [B, 3, H, W] standard normal, labels as in Denoiser -> [B, 3, H, W] in [-1, 1].

    EDM's algorithm 2 without its random part. Heun's method: an Euler step to the next noise level, then the
    same step again with the mean of the slopes at its two ends; 2 * steps - 1 evaluations of D. The levels
    fall from 80 to 0.002 evenly in sigma^(1/7), so most of them are low, where the details are decided. The
    last step, to 0, is Euler's alone. x is float64 since small differences of large numbers add up, while D
    gets and gives float32. Nothing cuts the result off at -1 and 1. steps: at least 2.
    """
    share = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    levels = [*((high + share * (low - high)) ** RHO).tolist(), 0.0]
    slope = lambda x, sigma: (x - denoiser(x.float(), sigma, labels).double()) / sigma
    x = SIGMA_MAX * latents.double()  # at sigma = 80 an image of size 1 can be neglected beside the noise
    for sigma, following in zip(levels, levels[1:]):
        first = slope(x, sigma)
        euler = x + (following - sigma) * first
        x = euler if following == 0 else x + (following - sigma) * (first + slope(euler, following)) / 2
    return x.float()


def to_pixels(images):
    """Images in about [-1, 1] -> uint8, same shape, rounded as EDM does."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------
# Training.


def initialise(denoiser, seed):
    """EDM's initialisation: Xavier's uniform one for all weights, smaller for attention's queries, keys and
    values, and nearly 0 for the last layer of each branch. So F begins as nearly 0, and a residual block as
    the identity (up to its scale)."""
    torch.manual_seed(seed)
    for name, parameter in denoiser.named_parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
            last = name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight"))
            with torch.no_grad():
                parameter *= 1e-5 if last else 0.2**0.5 if "qkv" in name else 1
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def draw_batch(images, labels, step, args, rank=0, world=1):
    """All that is random in a step, but for dropout: a function of (--seed, step).

    images uint8 [N, 32, 32, 3], labels int64 [N]: all of them, on the device. Returns images y [B, 3, 32, 32]
    in [-1, 1], half of them mirrored (EDM's other augmentations are left out), labels [B], -1 where dropped,
    sigma [B] and noise like y. B is this process's share of the batch, so several see what one would see.
    """
    # Each pass over the images has an order of its own; what does not fill a batch at its end is left out.
    number, position = divmod(step, len(labels) // args.batch_size)
    order = torch.randperm(len(labels), generator=generator(args.seed, number, "pass"))
    index = order[position * args.batch_size:][:args.batch_size].to(images.device)

    draw = {"generator": generator(args.seed, step, "diffusion", images.device), "device": images.device}
    flip, dropped = torch.rand(2, len(index), **draw)
    # Two thirds of the levels lie between 0.09 and 1. With far less noise there is hardly anything to remove,
    # with far more there is hardly anything left to see, and in between images take shape.
    sigma = (LOG_SIGMA[0] + LOG_SIGMA[1] * torch.randn(len(index), **draw)).exp()
    noise = torch.randn(len(index), 3, 32, 32, **draw)

    y = images[index].permute(0, 3, 1, 2).float() / 127.5 - 1
    y = torch.where(flip[:, None, None, None] < 0.5, y.flip(3), y)
    given = torch.where(dropped < args.label_dropout, -1, labels[index])
    return [tensor[rank::world] for tensor in (y, given, sigma, noise)]


def train_step(model, averaged, optimizer, batch, step, args):
    """One step of Adam and of the average. batch: from `draw_batch`. Returns the loss, on the device."""
    seen = step * args.batch_size  # images so far
    loss = denoising_loss(model, *batch).mean()  # over images; summed over pixels (EDM)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = list(model.parameters())
    average_gradients(parameters)  # over the processes of torchrun
    for parameter in parameters:  # an overflow on the way back should not end a run of days (EDM)
        torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
    optimizer.param_groups[0]["lr"] = args.lr * min(1, (seen + args.batch_size) / (WARMUP * args.images))
    optimizer.step()

    # The average of the weights over many steps draws far better images than the last weights, which the
    # last few batches have pushed about. All that is older than half_life makes up half of it. Early in
    # training it has to forget faster, as everything is still changing.
    half_life = min(HALF_LIFE, HALF_LIFE_SHARE * seen)
    kept = 0.5 ** (args.batch_size / half_life) if seen else 0.0
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged.parameters()), parameters, 1 - kept)
    return loss.detach()


def build_run(args, device):
    """(model, its average, optimizer): a function of the settings and the seed alone."""
    try:
        model = Denoiser(**args.network)
    except ValueError as error:  # group norm could not divide the channels
        raise InputError(f"--model-channels, --num-blocks: {error}; multiples of 32, up to 32 blocks fit") \
            from None
    initialise(model, args.seed)
    model.to(device).amp = args.amp
    # A copy that shares no storage with the model, or the average would be the model; and without dropout.
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    for module in model.train().modules():
        if isinstance(module, UNetBlock):
            module.dropout = args.dropout
    return model, averaged, torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8)


def checkpoint(args, run, step, log):
    """The content of edm.pt, tensors and plain data. The first two entries are the diffusion model, averaged
    weights under NVIDIA's names, and all that a reader needs. The others continue the run."""
    model, averaged, optimizer = run
    return {"edm_arguments": args.network, "model_state_dict": averaged.model.state_dict(),
            "unaveraged_model_state_dict": model.model.state_dict(), "optimizer": optimizer.state_dict(),
            "step": step, "log": log, "args": {name: getattr(args, name) for name in MUST_MATCH}}


# Settings that have to be the same when a run continues. --images may grow: nothing but the rise of the
# learning rate depends on it.
MUST_MATCH = ("network", "dropout", "label_dropout", "batch_size", "lr", "seed", "data")


def restore(path, args, run):
    """Load edm.pt into `run`; returns (steps done, log). Raises InputError where it is damaged or of a run
    with other settings. With weights_only a file is data: nothing in it gets to run."""
    model, averaged, optimizer = run
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        difference = [f"{name} {saved['args'][name]} there, {getattr(args, name)} now" for name in MUST_MATCH
                      if saved["args"][name] != getattr(args, name)]
        if not difference:
            model.model.load_state_dict(saved["unaveraged_model_state_dict"])
            averaged.model.load_state_dict(saved["model_state_dict"])
            optimizer.load_state_dict(saved["optimizer"])
            return saved["step"], saved["log"]
    except Exception as error:
        raise InputError(f"{path}: damaged, or no checkpoint of this script ({type(error).__name__}); "
                         "move it away to start without it") from None
    raise InputError(f"{path}: belongs to a run with other settings ({'; '.join(difference)}); "
                     "choose another --out")


def train(args, run, images, labels, out, rank, world):
    """Train `run`, as from `build_run`, on --images images: from edm.pt in `out`, or from scratch.

    images, labels: as in `draw_batch`. Raises FloatingPointError where the loss is not finite; then nothing
    more is saved. Raises SystemExit, after saving, on a signal.
    """
    model, averaged, optimizer = run
    path, total = out / "edm.pt", math.ceil(args.images / args.batch_size)
    first, log = restore(path, args, run) if path.exists() else (0, [])
    if all_reduce(torch.tensor([first, -first]), dist.ReduceOp.MAX).sum():
        raise InputError(f"--out {out}: the processes see different checkpoints; expected one folder for all")
    if rank == 0:
        print(f"continuing {path} after step {first} of {total}" if first else "starting", flush=True)
    if args.device == "cuda" and not args.no_compile:
        model.model.compile(dynamic=False)  # in place: torch.compile(module) would put a prefix to the names
    recent, since, started = [], time.time(), time.time()
    for step in range(first, total):
        batch = draw_batch(images, labels, step, args, rank, world)
        # Dropout draws from torch's own generator, and each process needs draws of its own.
        torch.manual_seed(generator(args.seed, step * world + rank, "dropout").initial_seed())
        recent.append(train_step(model, averaged, optimizer, batch, step, args))

        # Bookkeeping. The losses in `recent` stay on the device until a row of the log is due.
        done, stopping = step + 1, signalled()
        saving = stopping or done == total or done % max(1, round(args.save_every / args.batch_size)) == 0
        if not saving and done % LOG_EVERY:
            continue
        losses = all_reduce(torch.stack(recent)).cpu() / world / images[0].numel()  # per pixel
        if not losses.isfinite().all():
            bad = done - len(recent) + 1 + int((~losses.isfinite()).nonzero()[0])
            raise FloatingPointError(f"the loss is not finite in step {bad}; last good checkpoint: "
                                     f"{path if path.exists() else 'none was due yet'}")
        log.append({"step": done, "images": done * args.batch_size, "loss": losses.mean().item(),
                    "lr": optimizer.param_groups[0]["lr"],
                    "images_per_s": args.batch_size * len(recent) / (time.time() - since)})
        if rank == 0:
            write_log(out / "log.csv", log, (total - done) * (time.time() - started) / (done - first) / 60)
        if rank == 0 and saving:
            save_atomically(checkpoint(args, run, done, log), path)
        if stopping and done < total:
            barrier()  # all wait until process 0 has saved
            stop(stopping, f"after step {done} of {total}")
        if rank == 0 and saving:
            save_grid(averaged, out / f"samples-{done * args.batch_size:09d}.png", args.seed, images.device)
        recent, since = [], time.time()


def save_grid(denoiser, path, seed, device):
    """A picture of samples, a row per class, a column from the same noise. The noise is the same in every
    picture, so that one can watch an image take shape."""
    rows = min(10, denoiser.label_dim)
    latents = torch.randn(GRID, 3, 32, 32, generator=generator(seed, 0, "grid")).to(device)
    labels = torch.arange(rows, device=device).repeat_interleave(GRID)
    pixels = to_pixels(sample(denoiser, latents.repeat(rows, 1, 1, 1), labels))
    save_image(pixels.float() / 255, path, nrow=GRID)


# ------------------------------------------------------------------------------------------------------------
# What a trained model is for: synthetic images, and features.


def load(args, loader):
    """loader(--model), on the device. Raises InputError where the file cannot be used or does not fit."""
    try:
        model = loader(args.model).to(args.device)
    except ValueError as error:
        raise InputError(f"--model {error}") from None
    classes = DATASETS[args.dataset].classes
    if (model.img_resolution, model.label_dim) != (32, classes):
        raise InputError(f"--model {args.model}: made for {model.img_resolution} px and {model.label_dim} "
                         f"classes, expected 32 and {classes} ({args.dataset})")
    return model


def draw_images(args, rank=0, world=1):
    """--sample: draw that many images, of the classes in turn, into --out, as train_cifar.py reads them.

    Image number i is a function of --seed and i. Batches are drawn whole and kept as files in a folder beside
    --out until all are there. So a command that was stopped goes on where it was, and several processes share
    out the batches. The folder's name has a checksum of all that the images depend on, so nothing of another
    model or seed gets mixed in. With another --seed there are a million others, for a second file.
    """
    out, denoiser = Path(args.out), load(args, load_denoiser)
    if out.exists():
        raise InputError(f"--out {out}: is there already; move it away or choose another name")
    key = zlib.crc32(repr((checksum(denoiser), args.seed, args.batch_size, args.amp)).encode())
    folder = out.with_name(f"{out.name}.parts-{key:08x}")
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder) if rank == 0 else None  # until this function returns
    denoiser.amp = args.amp
    if args.device == "cuda" and not args.no_compile:
        denoiser.model.compile(dynamic=False)

    # A part is named by the number of its first image. Only whole batches: a network's output may differ in
    # the last digits where the batch has another size, so the last one is cut in the end.
    parts = [folder / f"{start:09d}.npz" for start in range(0, args.sample, args.batch_size)]
    missing, started = [part for part in parts[rank::world] if not part.exists()], time.time()
    for done, part in enumerate(missing, 1):
        numbers = torch.arange(args.batch_size) + int(part.stem)
        latents = torch.stack([torch.randn(3, 32, 32, generator=generator(args.seed, number, "latent"))
                               for number in numbers.tolist()])
        labels = numbers % denoiser.label_dim  # every class equally often
        pixels = to_pixels(sample(denoiser, latents.to(args.device), labels.to(args.device)))
        save_npz(part, image=pixels.permute(0, 2, 3, 1).cpu().numpy(), label=labels.numpy())
        if rank == 0:
            rate = done * args.batch_size / (time.time() - started)
            print(f"batch {done} of {len(missing)}  images_per_s {rate * world:.4g}  "
                  f"{(len(missing) - done) * args.batch_size / rate / 60:.1f} min left", flush=True)
    barrier()
    if rank == 0:
        loaded = [read_part(part) for part in parts]
        save_npz(out, **{name: np.concatenate([part[name] for part in loaded])[:args.sample]
                         for name in ("image", "label")})
        shutil.rmtree(folder)
        print(f"{args.sample:,} images in {out}")


def read_part(path):
    """A batch of synthetic images: {"image": ..., "label": ...}."""
    try:
        with np.load(path) as file:
            return dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path}: damaged; delete it and give the same command to draw it again") from None


def probe(args):
    """--probe: is the teacher good enough? How much of the class can be read off its features linearly.

    A teacher whose features do not know the class has little to teach. Asked without labels, which would be
    the answer. The probe is fitted to the first --probe training images and judged on the test images.
    `analyze_representations.py probe --teacher edm.pt` looks at other blocks as well.
    """
    from analyze_representations import accuracy, linear_probe, pooled_activations  # only here: matplotlib
    encoder, data = load(args, load_edm_encoder), []
    for split, count in (("train", args.probe), ("test", None)):
        images, labels = [torch.from_numpy(array[:count]) for array in load_real(args, split)]
        data.append((images.permute(0, 3, 1, 2).float() / 255, labels.long()))  # [N, 3, 32, 32] in [0, 1]
    print(f"{args.model}: linear probe of {encoder.layer}, {encoder.width} wide, without labels;",
          f"{len(data[0][1]):,} training and {len(data[1][1]):,} test images")
    for sigma in PROBE_SIGMAS:
        # A probe for each level, as the same layer may say the same thing differently at another one.
        fitted, judged = [pooled_activations(encoder, [encoder.layer], images, sigma, args)[encoder.layer]
                          for images, _ in data]
        head = linear_probe(fitted, data[0][1].to(args.device), encoder.label_dim)
        print(f"  sigma {sigma:<5g} {accuracy(head, judged, data[1][1]):6.2f} %", flush=True)


def smoke(args):
    """--smoke, once the model is trained: train_cifar.py's smoke run without it, with it as the teacher, and
    with its images as well. On waves that are learned in seconds the three hardly differ: it is a test."""
    out, rows = Path(args.out), []
    model, synthetic = str(out / "edm.pt"), out / "synthetic.npz"
    if not synthetic.exists():
        wanted = {"model": model, "out": synthetic, "sample": SMOKE_SAMPLES}
        draw_images(argparse.Namespace(**vars(args) | wanted))
    teacher = ["--teacher", model]
    for name, folder, flags in (
            ("AT", "at", ["--dra-weight", "0"]), ("AT+DRA", "at-dra", teacher),
            ("AT+DRA, synthetic", "synthetic", [*teacher, "--synthetic", str(synthetic)])):
        flags = ["--smoke", "--seed", str(args.seed), "--out", str(out / folder), *SMOKE_CIFAR, *flags]
        print(f"\n{name}: train_cifar.py", *flags)
        train_cifar.main(flags)
        with open(out / folder / "log.csv", newline="") as file:
            rows.append((name, list(csv.DictReader(file))[-1]))
    print("\nheld-out images      clean    40-step PGD at 8/255")
    for name, row in rows:
        print(f"  {name:17} {float(row['holdout_clean']):6.2f} %  {float(row['holdout_robust']):6.2f} %")


# ------------------------------------------------------------------------------------------------------------
# The command line.


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="cifar10", help="sets the number of classes")
    add("--data-dir", default="data", help="train.npz and test.npz as in train_cifar.py, else downloaded")
    add("--out", default="runs/edm", help="folder of the run; with --sample an .npz file")
    add("--model-channels", type=int, default=128, help="width of the network at 32 x 32")
    add("--channel-mult", type=int, nargs=3, default=[2, 2, 2], help="times that, at 32, 16 and 8 pixels")
    add("--num-blocks", type=int, default=4, help="residual blocks per resolution")
    add("--images", type=fraction, default="200e6", help="to train on, counting repetitions")
    add("--batch-size", type=int, default=512, help="over all processes")
    add("--lr", type=fraction, default=1e-3, help="Adam's learning rate after the rise")
    add("--dropout", type=fraction, default=0.13, help="share of activations set to 0 within each block")
    add("--label-dropout", type=fraction, default=0.1,
        help="share of images shown without a label, so that the teacher can be asked without one")
    add("--save-every", type=fraction, default="1e6", help="images between checkpoints")
    add("--seed", type=int, default=0, help="of every random draw")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cuda", "cpu"], default=device, help="where to run")
    add("--model", default="runs/edm/edm.pt", help="for --sample and --probe; NVIDIA's .pkl as well")
    add("--sample", type=int, metavar="N", help="draw N images into --out instead of training")
    add("--probe", type=int, metavar="N", nargs="?", const=5000,
        help="linear probe of the features, fitted to N training images (without N: 5000)")
    add("--amp", action=argparse.BooleanOptionalAction, default=None,
        help="the network computes in bfloat16 (without this flag: on CUDA)")
    add("--no-compile", action="store_true", help="no torch.compile (CUDA's default: compiled)")
    add("--smoke", action="store_true", help="the whole method in two minutes on a CPU")
    add("--dry-run", action="store_true", help="print the plan and stop")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)  # any other flag still beats these
    args = parser.parse_args(argv)
    for expected, fits, names in (
            ("above 0", lambda x: x > 0, "images num_blocks lr save_every sample"),
            ("at least 0 and below 1", lambda x: 0 <= x < 1, "dropout label_dropout"),
            ("at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed"),
            ("at least 1", lambda x: x >= 1, "batch_size"),
            ("at least 8", lambda x: x >= 8, "model_channels"),
            ("at least 10", lambda x: x >= 10, "probe"),
            ("numbers above 0", lambda x: min(x) > 0, "channel_mult")):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not fits(value):
                parser.error(f"--{name.replace('_', '-')} {value}: expected {expected}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    if args.sample and not args.out.endswith(".npz"):
        parser.error(f"--out {args.out}: expected a name ending in .npz for the images of --sample")
    if sum(map(bool, (args.sample, args.probe, args.smoke or args.dry_run))) > 1:
        parser.error("--sample, --probe, --smoke or --dry-run: expected one of these")
    if args.smoke and (args.dataset != "cifar10" or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        parser.error("--smoke: expected no other --dataset and no torchrun")
    if args.amp is None:
        args.amp = args.device == "cuda"
    args.network = {"img_resolution": 32, "label_dim": DATASETS[args.dataset].classes,
                    "model_channels": args.model_channels, "channel_mult": args.channel_mult,
                    "num_blocks": args.num_blocks, "attn_resolutions": [16]}
    return args


def print_plan(args, model, count, world):
    """What follows from the flags. FLOPs are counted; the rate of the GPU is assumed."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, device=device), 1.0)
    forward = counter.get_total_flops()
    hours = lambda flops: f"{flops:.3g} FLOP, {flops / ASSUMED_RATE / 3600:.3g} GPU hours"
    print(f"model     {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
          f"{forward / 1e9:.3g} GFLOP per image and forward, in {'bfloat16' if args.amp else 'float32'}")
    print(f"training  {args.images:,.0f} images in batches of {args.batch_size}, {args.images / count:.4g} "
          f"passes over {count:,}, on {world} process(es):",
          hours(3 * forward * args.images))  # a backward pass costs two forwards
    print(f"sampling  a million images, 35 forwards each: {hours(35e6 * forward)}")
    print(f"          hours at an assumed {ASSUMED_RATE / 1e12:g} TFLOP/s (15 % of an H100's)", flush=True)


def start_training(args, device, rank, world, local):
    """Data, plan, and `train`."""
    if local > 0:  # the first process of each machine goes first, as it may have to download
        barrier()
    images, labels = load_real(args, "train")
    if local == 0:  # and lets the others go on, who wait at the barrier above
        barrier()
    if args.batch_size > len(labels) or args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size}: expected at most the {len(labels)} images of "
                         f"--data-dir {args.data_dir}, and a multiple of the {world} processes")
    if len(np.unique(labels)) != DATASETS[args.dataset].classes:
        raise InputError(f"--data-dir {args.data_dir}: has images of {len(np.unique(labels))} classes, "
                         f"expected {DATASETS[args.dataset].classes} ({args.dataset}); see DATASETS in "
                         "train_cifar.py")
    args.data = [zlib.crc32(images), zlib.crc32(labels)]  # a run should not go on with others by mistake
    run = build_run(args, device)
    if rank == 0:
        print_plan(args, run[0], len(labels), world)
    if args.dry_run:
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out) if rank == 0 else None  # until this function returns
    handlers = {number: signal.signal(number, note_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        images, labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).long().to(device)
        train(args, run, images, labels, out, rank, world)
    finally:  # outside of training a signal ends the process at once
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    if args.probe:
        probe(args)
    elif args.sample:
        draw_images(args, rank, world)
    else:
        start_training(args, device, rank, world, local)
        if args.smoke and not args.dry_run:
            smoke(args)
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
    except KeyboardInterrupt:  # while drawing or probing: what is finished is on the disk
        sys.exit(130)
