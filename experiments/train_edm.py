"""Train an EDM diffusion model on one's own 32 x 32 images: the teacher, and the source of synthetic images.

    python experiments/train_edm.py --smoke          # training, sampling, using both: two minutes on a CPU

    python experiments/train_edm.py --data-dir FOLDER --out runs/edm
    python experiments/probe_teacher.py --data-dir FOLDER --teacher runs/edm/edm.pt
    python experiments/train_edm.py --model runs/edm/edm.pt --sample 1000000 --out 1m.npz
    python train_cifar.py --data-dir FOLDER --teacher runs/edm/edm.pt --synthetic 1m.npz --out runs/mine

What arXiv 2602.19931 needs of a diffusion model is public for CIFAR-10 and CIFAR-100 only. For any other data
set in the format of train_cifar.py (train.npz and test.npz in FOLDER) this script makes it, with the network
and the settings of EDM (Karras et al. 2022, arXiv 2206.00364). --dataset npz takes any number of classes, as
in train_cifar.py. With --label-dropout 1 the images need no labels. That gives the teacher without labels of
the paper's Fig. 3 and 4, but no synthetic images, which need labels.

A diffusion model learns to remove noise. A training image y gets noise n of level sigma, and the denoiser D
has to tell y from the sum. Noise levels vary over orders of magnitude:

    L = E lambda(sigma) ||D(y + n; sigma, label) - y||^2,   n ~ N(0, sigma^2),   ln(sigma) ~ N(-1.2, 1.2^2)

The best possible answer is the mean of all images that could lie behind the noisy one, so from there it
points towards more likely images. That is enough to draw new ones: begin with nothing but noise, sigma = 80,
and follow the answers while sigma falls to 0. It is a differential equation, solved here in 18 steps:

    dx / dsigma = (x - D(x; sigma, label)) / sigma

And to tell the image from the noise, the network has to know what images show. That is why its features are
worth imitating. How much of the class they know, at which block and noise level, probe_teacher.py tells.

A run writes edm.pt, log.csv and, every million images and at its end, a picture of samples to --out. If it is
killed, the same command continues it. `torchrun --nproc-per-node N` in front trains or draws on N GPUs.
"""
import argparse
import contextlib
import copy
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
import train_cifar
from edm_encoder import InputError, SongUNet, load_edm
from train_cifar import (DATASETS, DEVICE, all_reduce, average_gradients, barrier, count, count_classes,
                         flag_type, fraction, generator, last_part, load_real, lock, map_npz_member, number,
                         positive, reduce_recent, start_processes, whole, write_atomically, write_log)

# ------------------------------------------------------------------------------------------------------------
# Settings: EDM's own for CIFAR-10, here and in the defaults of the flags, where nothing else is said.

LOG_SIGMA = (-1.2, 1.2)  # mean and deviation of ln(sigma) in training
SIGMA_MAX, SIGMA_MIN, RHO = 80, 0.002, 7  # the sampler's noise levels, see `sample`
WARMUP = 0.05  # share of --images with a rising learning rate: 10M of EDM's 200M
HALF_LIFE, HALF_LIFE_SHARE = 0.5e6, 0.05  # of the averaging: images, but at most this share of those so far
LOG_EVERY = 50  # steps between rows of log.csv (chosen)
PICTURE_EVERY = 1e6  # images between pictures of samples (chosen)
GRID = 8  # samples per class in the picture, for the first ten classes (chosen)
# Flags that may differ when a run continues; all others are its recipe. --images may grow, as only the rise
# of the learning rate depends on it.
MAY_DIFFER = ("out", "device", "amp", "no_compile", "save_minutes", "dry_run", "images", "model", "sample")
SMOKE = {"model_channels": 16, "channel_mult": [1, 1, 2], "num_blocks": 1, "dropout": 0, "batch_size": 16,
         "images": 2400, "out": "runs/smoke-edm", "device": "cpu"}  # other defaults for --smoke
SMOKE_CIFAR = ["--smoke", "--batch-size", "32", "--epochs", "2", "--eval-every", "2"]

share = flag_type("a number from 0 to 1", float, lambda x: 0 <= x <= 1)
several = flag_type("a whole number of at least 8", int, lambda x: x.denominator == 1 and 8 <= x < 2**20)


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=list(DATASETS), default="cifar10", help="sets the number of classes")
    add("--data-dir", default="data", help="train.npz and test.npz as in train_cifar.py, else downloaded")
    add("--out", default="runs/edm", help="folder of the run; with --sample an .npz file")
    add = parser.add_argument_group("network and training").add_argument
    add("--model-channels", type=several, default=128, help="width of the network at 32 x 32")
    add("--channel-mult", type=count, nargs=3, default=[2, 2, 2], help="times that, at 32, 16 and 8 pixels")
    add("--num-blocks", type=count, default=4, help="residual blocks per resolution")
    add("--images", type=positive, default="200e6", help="to train on, counting repetitions; may grow later")
    add("--batch-size", type=count, default=512, help="over all processes")
    add("--lr", type=positive, default=1e-3, help="Adam's learning rate after the rise")
    add("--dropout", type=fraction, default=0.13, help="share of activations set to 0 within each block")
    # A teacher can be asked without a label if it has met images without one. The share is chosen. 1 gives a
    # model without labels, and train.npz needs none.
    add("--label-dropout", type=share, default=0.1, help="share of images shown without a label; 1: all")
    add = parser.add_argument_group("drawing images").add_argument
    add("--model", default="runs/edm/edm.pt", help="for --sample; NVIDIA's .pkl as well")
    add("--sample", type=count, metavar="N", help="draw N images into --out instead of training")
    add = parser.add_argument_group("running").add_argument
    add("--save-minutes", type=number, default=5, help="minutes between checkpoints: what a kill can lose")
    add("--seed", type=whole, default=0, help="of every random draw")
    add("--device", choices=sorted({"cpu", DEVICE}), default=DEVICE, help="where to run")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, else float32 (default: on a GPU)")
    add("--no-compile", action="store_true", help="no torch.compile (default: compiled on a GPU)")
    add("--smoke", action="store_true", help="the whole method in two minutes on a CPU")
    add("--dry-run", action="store_true", help="print what would be trained and what it costs, and stop")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)  # any other flag still beats these
    args = parser.parse_args(argv)
    if args.sample and not args.out.endswith(".npz"):
        parser.error(f"--out {args.out}: expected a name ending in .npz for the images of --sample")
    if args.sample and (args.smoke or args.dry_run):
        parser.error("--sample, --smoke or --dry-run: expected one of these")
    if args.smoke and (args.dataset != "cifar10" or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        parser.error("--smoke: expected no other --dataset and no torchrun")
    args.amp = args.device == "cuda" if args.amp is None else args.amp
    return args


# ------------------------------------------------------------------------------------------------------------
# The denoiser around edm_encoder.py's network, its loss, and the sampler.


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
            # -1 gives zeros.
            class_labels = nn.functional.one_hot(labels + 1, self.label_dim + 1)[:, 1:].to(noisy)
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.amp):
            output = self.model(noisy / total.sqrt(), sigma.flatten().log() / 4, class_labels).float()
        c_out = sigma * self.sigma_data / total.sqrt()
        return self.sigma_data**2 / total * noisy + c_out * output


def load_denoiser(path):
    """A Denoiser from NVIDIA's .pkl or from edm.pt, path or URL: frozen, evaluation mode, on the CPU.

    Raises InputError, one line that names the file, where it is damaged or something else, and OSError where
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
    position = torch.arange(steps, dtype=torch.float64) / (steps - 1)  # from 0 to 1
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    levels = [*((high + position * (low - high)) ** RHO).tolist(), 0.0]
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
# One step of training.


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


def build_run(args, device, classes):
    """All that a run trains or keeps, on the device: a function of the settings and the seed alone.

    Returns SimpleNamespace: model, averaged, optimizer; network: SongUNet's arguments; step: how many are
    done; log: a dict per row; recent: the losses since the last row. classes: 0 for a model without labels.
    Raises InputError.
    """
    network = {"img_resolution": 32, "label_dim": classes, "model_channels": args.model_channels,
               "channel_mult": args.channel_mult, "num_blocks": args.num_blocks, "attn_resolutions": [16]}
    try:
        model = Denoiser(**network, dropout=args.dropout)
    except ValueError as error:  # group norm cannot divide the channels, for example
        raise InputError(f"--model-channels, --num-blocks: {error}; multiples of 32 fit") from None
    initialise(model, args.seed)
    model.to(device).amp = args.amp
    # A copy that shares no storage with the model; in evaluation mode, so without dropout.
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8)
    return SimpleNamespace(model=model, averaged=averaged, optimizer=optimizer, network=network,
                           step=0, log=[], recent=[])


def draw_batch(images, labels, step, args, rank=0, world=1):
    """All that is random in a step, but for dropout: a function of (--seed, step).

    images uint8 [N, 32, 32, 3], labels int64 [N]: all of them, on the device. Returns images y [B, 3, 32, 32]
    in [-1, 1], half of them mirrored (EDM's other augmentations are left out), labels [B], -1 where dropped,
    sigma [B] and noise like y. B is this process's share of the batch, so several see what one would see.
    """
    # Each pass over the images has an order of its own; what does not fill a batch at its end is left out.
    pass_number, position = divmod(step, len(labels) // args.batch_size)
    order = torch.randperm(len(labels), generator=generator(args.seed, pass_number, "pass"))
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
    for parameter in parameters:  # an overflow in a gradient should not end a run of days (EDM)
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


# ------------------------------------------------------------------------------------------------------------
# A run: data, checkpoints, pictures.


def load_images(args):
    """Training images uint8 [N, 32, 32, 3], labels int64 [N], and the number of classes: 0, and all labels 0,
    where --label-dropout 1 asks for none. Raises InputError."""
    path = Path(args.data_dir) / "train.npz"
    if args.label_dropout == 1 and not args.smoke and path.exists():
        images = np.array(map_npz_member(path, "image"))
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
            raise InputError(f"{path}: image is {images.dtype} {images.shape}, expected uint8 [N, 32, 32, 3]")
        return images, np.zeros(len(images), np.int64), 0
    images, labels = load_real(args, "train")
    return images, labels, 0 if args.label_dropout == 1 else count_classes(args, labels)


def print_plan(args, model, n_images, world):
    """What will be trained, and what it costs. FLOPs are counted; a backward pass is two forward passes."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device), 1.0)
    forward = counter.get_total_flops()
    print(f"model     {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
          f"{forward / 1e9:.3g} GFLOP per image and forward, in {'bfloat16' if args.amp else 'float32'}")
    print(f"training  {args.images:,.0f} images in batches of {args.batch_size} on {world} process(es), "
          f"{args.images / n_images:.4g} passes over {n_images:,}: {3 * forward * args.images:.3g} FLOP")


def save(path, recipe, run):
    """Write edm.pt, tensors and plain data. The first two entries are the diffusion model, averaged weights
    under NVIDIA's names, and all that a reader needs. The others continue the run. recipe: what has to be
    the same then, flags as given and the number of images."""
    content = {"edm_arguments": run.network, "model_state_dict": run.averaged.model.state_dict(),
               "unaveraged_model_state_dict": run.model.model.state_dict(),
               "optimizer": run.optimizer.state_dict(), "args": recipe,
               "step": run.step, "log": run.log, "recent": run.recent}
    write_atomically(path, lambda file: torch.save(content, file))


def compare(path, there, here):
    """Raise InputError where the settings of the run at `path`, there, are not ours, here. It names the first
    that differs."""
    for name, value in here.items():
        if there.get(name) != value:
            raise InputError(f"{path}: is of a run with {name} {there.get(name)}, not {value}; change --out")


def resume(path, recipe, run):
    """Load edm.pt, if it is there, into `run`.

    Raises InputError where it is damaged or of another recipe, and where it is missing beside a log that a
    new run would overwrite. With weights_only nothing in the file gets to run.
    """
    if not path.exists():
        if path.with_name("log.csv").exists():
            raise InputError(f"{path.parent}: has log.csv but no edm.pt to continue it; change --out")
        return
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        compare(path, dict(saved["args"]), recipe)
        run.model.model.load_state_dict(saved["unaveraged_model_state_dict"])
        run.averaged.model.load_state_dict(saved["model_state_dict"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.step, run.log, run.recent = saved["step"], saved["log"], saved["recent"]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: damaged, or no edm.pt of this script ({type(error).__name__})") from None


def save_picture(denoiser, path, seed, device):
    """A picture of samples: a row per class, the same noise down a column. A model without labels has no
    classes, so each sample has noise of its own. The noise is the same in every picture of a run, so that one
    can watch an image take shape."""
    rows = min(10, denoiser.label_dim) or GRID
    n_latents = GRID if denoiser.label_dim else GRID * rows
    latents = torch.randn(n_latents, 3, 32, 32, generator=generator(seed, 0, "grid")).to(device)
    labels = torch.arange(rows, device=device).repeat_interleave(GRID)  # ignored by a model without labels
    pixels = to_pixels(sample(denoiser, latents.repeat(GRID * rows // n_latents, 1, 1, 1), labels))
    save_image(pixels.float() / 255, path, nrow=GRID)


def train(args, run, images, labels, out, rank, world):
    """Train `run`, as from `build_run`, on --images images: from edm.pt in `out`, or from scratch.

    images, labels: as in `draw_batch`. Raises FloatingPointError where a loss or a weight is not finite, of
    which nothing is saved, and InputError as `resume`.
    """
    recipe = {name: last_part(value) for name, value in vars(args).items() if name not in MAY_DIFFER}
    recipe["number of images"] = len(labels)
    path, total = out / "edm.pt", int(np.ceil(args.images / args.batch_size))
    resume(path, recipe, run)
    if rank == 0:
        print(f"from step {run.step} to {total}", flush=True)
        if run.step == 0:
            save(path, recipe, run)
    if args.device == "cuda" and not args.no_compile:
        run.model.model.compile(dynamic=False)  # in place: torch.compile(module) would put a prefix to names
    saved_at, row_step, row_at = time.time(), run.step, time.time()
    for step in range(run.step, total):
        batch = draw_batch(images, labels, step, args, rank, world)
        # Dropout draws from torch's own generator, and each process needs draws of its own.
        torch.manual_seed(generator(args.seed, step * world + rank, "dropout").initial_seed())
        loss = train_step(run.model, run.averaged, run.optimizer, batch, step, args)
        run.recent.append(loss[None] / images[0].numel())  # per pixel; on the device until a row is due
        run.step = step + 1

        # Bookkeeping. The clock of process 0 decides for all when to save.
        final, seen = run.step == total, run.step * args.batch_size
        logging = final or run.step % LOG_EVERY == 0
        overdue = rank == 0 and time.time() - saved_at >= 60 * args.save_minutes
        saving = final or all_reduce(torch.tensor(int(overdue))) > 0
        if logging or saving:
            reduce_recent(run, ["loss"], world)
        if logging:
            speed = args.batch_size * (run.step - row_step) / (time.time() - row_at)  # images per second
            loss, lr = torch.cat(run.recent).mean().item(), run.optimizer.param_groups[0]["lr"]
            run.log.append({"step": run.step, "images": seen, "loss": loss, "lr": lr, "images_per_s": speed})
            if rank == 0:
                # The last argument is the minutes left.
                write_log(out / "log.csv", run.log, (total * args.batch_size - seen) / speed / 60)
            run.recent, row_step, row_at = [], run.step, time.time()
        if rank == 0 and (final or seen % PICTURE_EVERY < args.batch_size):
            save_picture(run.averaged, out / f"samples-{seen:09d}.png", args.seed, images.device)
        if saving:
            saved_at = time.time()
            if rank == 0:
                save(path, recipe, run)


# ------------------------------------------------------------------------------------------------------------
# What a trained model is for, apart from its features: synthetic images.


def draw_images(args, rank=0, world=1):
    """--sample: draw that many images, of the classes in turn, into --out, as train_cifar.py reads them.

    Image number i is a function of --seed and i. Batches are kept as files in a folder beside --out until all
    are there. So a command that was killed goes on where it was, and several processes share out the batches.
    With another --seed there are a million others, for a second file.
    """
    out, denoiser = Path(args.out), load_denoiser(args.model).to(args.device)
    if not denoiser.label_dim:
        raise InputError(f"{args.model}: is a model without labels, and synthetic images need labels")
    if denoiser.img_resolution != 32 or DATASETS[args.dataset].classes not in (None, denoiser.label_dim):
        raise InputError(f"{args.model}: is for images of {denoiser.img_resolution} px and "
                         f"{denoiser.label_dim} classes, expected 32 px and the classes of {args.dataset}")
    if out.exists():
        raise InputError(f"{out}: is there already; move it away or choose another --out")
    # What the images depend on. A model's file can change under the same name, so its time is noted as well.
    settings = {name: last_part(getattr(args, name)) for name in ("model", "seed", "batch_size", "amp")}
    settings["time of the model"] = os.path.getmtime(args.model) if os.path.exists(args.model) else None
    folder = out.with_name(out.name + ".parts")
    noted = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder) if rank == 0 else contextlib.nullcontext():
        if rank == 0 and not noted.exists():
            write_atomically(noted, lambda file: file.write(json.dumps(settings).encode()))
        barrier()
        try:
            there = dict(json.loads(noted.read_text()))
        except (ValueError, TypeError):
            raise InputError(f"{noted}: damaged; delete {folder} to start anew") from None
        compare(folder, there, settings)
        denoiser.amp = args.amp
        if args.device == "cuda" and not args.no_compile:
            denoiser.model.compile(dynamic=False)
        # A part is named by the number of its first image. Only whole batches: a network's output may differ
        # in the last digits where the batch has another size, so the last one is cut in the end.
        parts = [folder / f"{start:09d}.npy" for start in range(0, args.sample, args.batch_size)]
        missing = [part for part in parts[rank::world] if not part.exists()]
        for part in tqdm(missing, desc=f"batches of {args.batch_size} images", disable=rank > 0):
            numbers = torch.arange(args.batch_size) + int(part.stem)
            labels = numbers % denoiser.label_dim  # every class equally often
            randoms = [generator(args.seed, i, "latent") for i in numbers.tolist()]
            latents = torch.stack([torch.randn(3, 32, 32, generator=random) for random in randoms])
            pixels = to_pixels(sample(denoiser, latents.to(args.device), labels.to(args.device)))
            write_atomically(part, lambda file: np.save(file, pixels.permute(0, 2, 3, 1).cpu().numpy()))
        barrier()
        if rank == 0:
            images = np.concatenate([read_part(part) for part in parts])[:args.sample]
            labels = np.arange(args.sample) % denoiser.label_dim
            write_atomically(out, lambda file: np.savez(file, image=images, label=labels))
            print(f"{args.sample:,} images in {out}")
    if rank == 0:
        shutil.rmtree(folder)


def read_part(path):
    """A batch of synthetic images, uint8 [--batch-size, 32, 32, 3]. Raises InputError where it is damaged."""
    try:
        return np.load(path)
    except FileNotFoundError:
        raise
    except Exception:  # a damaged file can fail in any way
        raise InputError(f"{path}: damaged; delete it, and the same command draws it again") from None


def smoke(args):
    """--smoke, once the model is trained: images drawn from it, and train_cifar.py's smoke run with the model
    as the teacher and these images. It shows that the parts fit together, and no more: the model has hardly
    learned yet, so most of its images show no class."""
    model, synthetic = str(Path(args.out, "edm.pt")), Path(args.out, "synthetic.npz")
    if not synthetic.exists():
        draw_images(argparse.Namespace(**vars(args) | {"model": model, "out": synthetic, "sample": 256}))
    flags = [*SMOKE_CIFAR, "--teacher", model, "--synthetic", str(synthetic), "--seed", str(args.seed)]
    print("\ntrain_cifar.py", *flags)
    train_cifar.main([*flags, "--out", str(Path(args.out, "classifier"))])


def start_training(args, device, rank, world, local):
    """Data, plan, and `train`."""
    if local > 0:  # the first process of each machine goes first, as it may have to download
        barrier()
    images, labels, classes = load_images(args)
    if local == 0:
        barrier()
    if args.batch_size > len(labels) or args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size}: expected at most the {len(labels)} images of "
                         f"--data-dir {args.data_dir}, and a multiple of the {world} processes")
    run = build_run(args, device, classes)
    if rank == 0:
        print_plan(args, run.model, len(labels), world)
    if not args.dry_run:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        images, labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
        with lock(out) if rank == 0 else contextlib.nullcontext():
            train(args, run, images, labels, out, rank, world)


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    device, rank, world, local = start_processes(args)
    if args.sample:
        draw_images(args, rank, world)
    else:
        start_training(args, device, rank, world, local)
        if args.smoke and not args.dry_run:
            smoke(args)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
