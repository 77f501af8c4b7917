"""Train an EDM diffusion model on one's own 32 x 32 images: the teacher, and the source of synthetic images.

    python experiments/train_edm.py --data-dir FOLDER --out runs/edm             # FOLDER as in train_cifar.py
    python experiments/train_edm.py --probe --model runs/edm/edm.pt              # is the teacher good enough?
    python experiments/train_edm.py --sample 1000000 --model runs/edm/edm.pt --out 1m.npz
    python train_cifar.py --data-dir FOLDER --teacher runs/edm/edm.pt --synthetic 1m.npz ...
    python experiments/train_edm.py --smoke                                      # all four, in two minutes

What arXiv 2602.19931 needs of a diffusion model exists for CIFAR-10 and CIFAR-100. For any other data set this
script makes it, with the network and the settings of EDM (Karras et al. 2022, arXiv 2206.00364).

A diffusion model is trained to remove noise. An image y from the training set gets noise n of level sigma,
and the denoiser D has to tell y from the sum (their eq. 2, with the weights of table 1):

    L = E[ lambda(sigma) || D(y + n; sigma, label) - y ||^2 ],   n ~ N(0, sigma^2),   ln(sigma) ~ N(-1.2, 1.2^2)
    D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4, label)                                     (eq. 7)

The best possible answer is the mean of all images that could lie behind x. It points from x towards more
likely images, so it draws new ones: begin with nothing but noise and follow the answers, while the noise
level falls from 80 to nearly 0. That is an ordinary differential equation (eq. 1), solved here in 18 steps:

    dx / d sigma = (x - D(x; sigma)) / sigma

A run writes edm.pt to --out, a picture of samples with each checkpoint, and log.csv; the same command again
continues it. Every random draw is a function of (seed, step), or for a synthetic image of (seed, its number).
"""
import argparse
import copy
import math
import os
import shutil
import signal
import sys
import time
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
from train_cifar import (DATASETS, InputError, all_reduce, average_gradients, barrier, fraction, generator,
                         load_real, note_signal, save_atomically, signalled, stop, write_log)

# ------------------------------------------------------------------------------------------------------------
# Settings: EDM's own for CIFAR-10, where nothing else is said.

LOG_SIGMA = (-1.2, 1.2)  # mean and deviation of ln(sigma) in training
SIGMA_MAX, SIGMA_MIN, RHO = 80, 0.002, 7  # of the sampler's noise levels; rho: most steps at low noise
WARMUP = 0.05  # share of --images with a rising rate: 10M of EDM's 200M
HALF_LIFE, RAMP = 0.5e6, 0.05  # of the averaging, in images, but at most this share of the images so far
LOG_EVERY = 50  # steps between rows of log.csv
GRID = 8  # samples per class in the picture, of the first ten classes

# ------------------------------------------------------------------------------------------------------------
# The network: SongUNet as a whole, the denoiser around it, and its loss.


class SongUNet(SongUNetEncoder):
    """F: noisy image -> (what the denoiser makes of it), same shape. Arguments as SongUNetEncoder's.

    The second half mirrors the first. It goes from 8 x 8 back to 32 x 32, and each block is also shown what a
    block of the first half made at this resolution (the skip connections), the last one first. Two more
    blocks than the first half has per resolution are needed for that: its blocks, and its way down.
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
        for name, module in self.enc.items():
            if name.endswith("_aux_residual"):  # NCSN++, as in the first half; here it replaces a skip
                x = image = skips[-1] = (x + module(image)) * 0.5**0.5
                continue
            x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for name, module in self.dec.items():
            if not isinstance(module, UNetBlock):
                x = F.silu(module(x)) if name.endswith("_aux_norm") else module(x)
                continue
            x = module(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return x


class Denoiser(nn.Module):
    """D: denoiser(noisy, sigma, labels) -> the mean of the clean images that could lie behind.

    noisy [B, 3, H, W] float32 = image in [-1, 1] + sigma * noise; sigma a number or [B]; labels [B] int64, -1
    for an image without one, or None. Returns float32 [B, 3, H, W].

    F, the network, should neither get nor have to give numbers of unusual size, whatever the noise level:
        c_in = 1 / sqrt(sigma^2 + sigma_data^2)                       its input has variance 1
        c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)              at low noise D is nearly x itself, and F
        c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)       adds little, so its errors count little
    """

    amp = False  # whether F computes in bfloat16

    def __init__(self, sigma_data=0.5, **network):
        super().__init__()
        self.model, self.sigma_data = SongUNet(**network), sigma_data
        self.img_resolution, self.label_dim = network["img_resolution"], self.model.label_dim

    def forward(self, noisy, sigma, labels=None):
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=noisy.device).expand(len(noisy))
        total = (sigma**2 + self.sigma_data**2)[:, None, None, None]  # variance of the noisy image, [B, 1, 1, 1]
        class_labels = noisy.new_zeros(len(noisy), self.label_dim)
        if labels is not None and self.label_dim:
            class_labels = F.one_hot(labels + 1, self.label_dim + 1)[:, 1:].to(noisy)  # -1 gives zeros
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.amp):
            output = self.model(noisy / total.sqrt(), sigma.log() / 4, class_labels).float()
        c_out = sigma[:, None, None, None] * self.sigma_data / total.sqrt()
        return self.sigma_data**2 / total * noisy + c_out * output


def load_denoiser(path):
    """A Denoiser from NVIDIA's .pkl or from edm.pt, frozen, in evaluation mode, float32, on the CPU.

    Raises as `edm_encoder.load_edm_encoder`: ValueError with one line, OSError.
    """
    return load_edm(path, Denoiser).eval()


def denoising_loss(denoiser, images, labels, sigma, noise):
    """lambda(sigma) || D(y + sigma * noise; sigma, label) - y ||^2, float32 [B]: summed over pixels.

    images y [B, 3, H, W] in [-1, 1]; labels as in Denoiser; sigma [B]; noise standard normal, like images.
    lambda = 1 / c_out^2, so that F's error counts the same at each noise level.
    """
    weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
    denoised = denoiser(images + sigma[:, None, None, None] * noise, sigma, labels)
    return weight * (denoised - images).square().sum(dim=(1, 2, 3))


@torch.no_grad()
def sample(denoiser, latents, labels, steps=18):
    """Draw images: latents [B, 3, H, W] standard normal, labels as in Denoiser -> [B, 3, H, W] in [-1, 1].

    EDM's algorithm 2 without its random part: each noise level follows from the one before by an Euler step,
    and the slope at its end corrects it (Heun's method), 2 * steps - 1 evaluations of D. The levels fall from
    80 to 0.002 and then to 0; evenly in sigma^(1/7), so that most of them are low, where details are decided.
    In float64, since small differences of large numbers add up here; D itself computes in float32. The range
    is that of the training images, which D's last answer may exceed a little.
    """
    share = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    levels = [*((high + share * (low - high)) ** RHO).tolist(), 0.0]
    slope = lambda x, sigma: (x - denoiser(x.float(), sigma, labels).double()) / sigma
    x = SIGMA_MAX * latents.double()
    for sigma, following in zip(levels, levels[1:]):
        first = slope(x, sigma)
        euler = x + (following - sigma) * first
        x = euler if following == 0 else x + (following - sigma) * (first + slope(euler, following)) / 2
    return x.float()


def to_pixels(images):
    """Images in [-1, 1] -> uint8, as EDM rounds."""
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


def draw_batch(images, labels, step, args, rank, world):
    """The random part of a step, a function of (seed, step): this process's share of the batch.

    images uint8 [N, 32, 32, 3], labels int64 [N], on the device. Returns y [B, 3, 32, 32] in [-1, 1],
    mirrored at random (EDM's other augmentations are left out), its labels, -1 where dropped, sigma [B] and
    noise like y. Each pass over the images has an order of its own; what does not fill a batch is left out.
    """
    number, position = divmod(step, len(labels) // args.batch_size)
    order = torch.randperm(len(labels), generator=generator(args.seed, number, "pass"))
    index = order[position * args.batch_size:][:args.batch_size].to(images.device)

    random = generator(args.seed, step, "diffusion", images.device)
    draw = {"generator": random, "device": images.device}
    flip, dropped = torch.rand(2, len(index), **draw)
    sigma = (LOG_SIGMA[0] + LOG_SIGMA[1] * torch.randn(len(index), **draw)).exp()
    noise = torch.randn(len(index), 3, 32, 32, **draw)

    y = images[index].permute(0, 3, 1, 2).float() / 127.5 - 1
    y = torch.where((flip < 0.5)[:, None, None, None], y.flip(3), y)
    labels = torch.where(dropped < args.label_dropout, -1, labels[index])
    return [tensor[rank::world] for tensor in (y, labels, sigma, noise)]


def train_step(model, averaged, optimizer, batch, step, args):
    """One step: loss, backward, Adam, average. batch: see `draw_batch`. Returns the loss, left on the device.
    """
    seen = step * args.batch_size  # images so far
    loss = denoising_loss(model, *batch).mean()  # over images; summed over their pixels
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = list(model.parameters())
    average_gradients(parameters)  # over the processes of torchrun
    for parameter in parameters:  # one that overflowed should not end a run of days (EDM)
        torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
    rise = min(1, (seen + args.batch_size) / (WARMUP * args.images))
    optimizer.param_groups[0]["lr"] = args.lr * rise
    optimizer.step()

    # Samples of the averaged weights are far better than those of the last ones, which a random batch has
    # just pushed somewhere. Half of the average is as old as half_life; early on it has to forget faster.
    half_life = min(HALF_LIFE, RAMP * seen)
    old_share = 0.5 ** (args.batch_size / half_life) if half_life else 0.0
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged.parameters()), parameters, 1 - old_share)
    return loss.detach()


def build_run(args, device):
    """(model, its average, optimizer), a function of the settings and the seed."""
    model = Denoiser(**args.network)
    initialise(model, args.seed)
    model.to(device).amp = args.amp
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    for module in model.train().modules():
        if isinstance(module, UNetBlock):
            module.dropout = args.dropout
    return model, averaged, torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8)


def checkpoint(args, run, step, log):
    """The content of edm.pt. The first two entries are the teacher, with NVIDIA's parameter names; the others
    continue the run."""
    model, averaged, optimizer = run
    return {"edm_arguments": args.network, "model_state_dict": averaged.model.state_dict(),
            "unaveraged_model_state_dict": model.model.state_dict(), "optimizer": optimizer.state_dict(),
            "step": step, "log": log, "args": {name: getattr(args, name) for name in MUST_MATCH}}


MUST_MATCH = ("network", "dropout", "label_dropout", "batch_size", "lr", "seed", "data")  # to continue a run


def restore(path, args, run):
    """Load edm.pt into `run`; returns (steps done, log). Raises InputError where it is damaged or of another
    run. A file is data: with weights_only nothing in it gets to run."""
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
    """Train `run` to --images images, from edm.pt in `out` or from scratch. images uint8, labels: all of them.

    Raises FloatingPointError where the loss is not finite, and SystemExit, after saving, on a signal.
    """
    model, averaged, optimizer = run
    device, total, path = images.device, math.ceil(args.images / args.batch_size), out / "edm.pt"
    first, log = restore(path, args, run) if path.exists() else (0, [])
    if rank == 0:
        print(f"continuing {path} after step {first} of {total}" if first else "starting", flush=True)
    if args.device == "cuda" and not args.no_compile:
        model.model.compile(dynamic=False)
    recent, since, started = [], time.time(), time.time()
    for step in range(first, total):
        batch = draw_batch(images, labels, step, args, rank, world)
        # Dropout draws from torch's own generator.
        torch.manual_seed(generator(args.seed, step * world + rank, "dropout").initial_seed())
        recent.append(train_step(model, averaged, optimizer, batch, step, args))

        # Bookkeeping.
        done, stopping = step + 1, signalled()
        saving = done == total or stopping or done % max(1, round(args.save_every / args.batch_size)) == 0
        if not saving and done % LOG_EVERY:
            continue
        losses = all_reduce(torch.stack(recent)).cpu() / world / images[0].numel()  # per pixel: starts near 1
        if not losses.isfinite().all():
            bad = done - len(recent) + 1 + int((~losses.isfinite()).nonzero()[0])
            raise FloatingPointError(f"the loss is not finite in step {bad}; the last good checkpoint is "
                                     f"{path if path.exists() else 'none'}")
        log.append({"step": done, "images": done * args.batch_size, "loss": losses.mean().item(),
                    "lr": optimizer.param_groups[0]["lr"],
                    "images_per_s": args.batch_size * len(recent) / (time.time() - since)})
        if rank == 0:
            write_log(out / "log.csv", log, (total - done) * (time.time() - started) / (done - first) / 60)
            if saving:
                save_atomically(checkpoint(args, run, done, log), path)
                if not stopping:
                    save_grid(averaged, out / f"samples-{done * args.batch_size:09d}.png", args.seed, device)
        if stopping and done < total:
            barrier()  # all wait until process 0 has saved
            stop(stopping, f"after step {done} of {total}")
        recent, since = [], time.time()


def save_grid(denoiser, path, seed, device):
    """A picture of samples: a row per class, each column from the same noise, in every picture of a run."""
    rows = min(10, denoiser.label_dim) or 1
    latents = torch.randn(GRID, 3, 32, 32, generator=generator(seed, 0, "grid")).to(device)
    labels = torch.arange(rows, device=device).repeat_interleave(GRID)
    pixels = to_pixels(sample(denoiser, latents.repeat(rows, 1, 1, 1), labels))
    save_image(pixels.float() / 255, path, nrow=GRID)


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
    add("--channel-mult", type=int, nargs="+", default=[2, 2, 2], help="times that, for each resolution")
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
    add("--amp", action=argparse.BooleanOptionalAction, default=device == "cuda",
        help="the network computes in bfloat16")
    add("--no-compile", action="store_true", help="no torch.compile (CUDA's default: compiled)")
    add("--smoke", action="store_true", help="the whole method in two minutes on a CPU")
    args = parser.parse_args(argv)
    args.images = int(args.images)
    args.network = {"img_resolution": 32, "label_dim": DATASETS[args.dataset].classes,
                    "model_channels": args.model_channels, "channel_mult": args.channel_mult,
                    "num_blocks": args.num_blocks, "attn_resolutions": [16]}
    return args


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    rank, world, local = [int(os.environ.get(name, default))  # as torchrun sets them
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    device = torch.device("cuda", local) if args.device == "cuda" else torch.device("cpu")
    out = Path(args.out)
    images, labels = load_real(args, "train")
    args.data = [zlib.crc32(images), zlib.crc32(labels)]
    run = build_run(args, device)
    out.mkdir(parents=True, exist_ok=True)
    handlers = {number: signal.signal(number, note_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        images, labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).long().to(device)
        train(args, run, images, labels, out, rank, world)
    finally:  # outside of training a signal ends the process at once
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
