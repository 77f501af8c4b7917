"""Draw synthetic ImageNet images with LightningDiT: the 4 million of arXiv 2602.19931, section 5.1.

    FILES="lightningdit-xl-imagenet256-800ep.pt vavae-imagenet256-f16d32-dinov2.pt latents_stats.pt"
    python experiments/generate_imagenet.py --smoke                 # a tiny random network, seconds on a CPU
    python experiments/generate_imagenet.py --generator $FILES --dry-run             # what it would cost
    python experiments/generate_imagenet.py --generator $FILES --preview grid.png    # 25 classes to see
    torchrun --nproc-per-node 8 experiments/generate_imagenet.py --generator $FILES \\
        --classes-from imagenet/train --out lightningdit-4m        # what train_imagenet.py --synthetic reads

The paper's images are not public, so everybody has to draw their own. The same network serves twice in the
paper: its samples are training data, and the classifier is aligned with its features (dit_encoder.py).

LightningDiT (Yao et al. 2025, arXiv 2501.01423) has learned a velocity. Training took a clean latent z_1 and
noise z_0, put z_t = t z_1 + (1 - t) z_0 on the straight line between the two, and asked for the direction
z_1 - z_0 of that line, given only z_t, t and the label y. The answer v(z, t, y) is an average over all lines
that pass there. Following it from pure noise at t = 0 to t = 1 gives a new image of class y:

    z_0 ~ N(0, 1),   dz/dt = v(z, t, y),   image = decoder(z_1 std + mean)
    z <- z + (t' - t) v(z, t, y)           Euler's steps from t to t', 249 of them (250 grid points)
    t = s u / (1 + (s - 1) u)              u evenly from 0 to 1; s = 0.3: short steps at the noisy end
    v <- v(z, t, none) + w (v(z, t, y) - v(z, t, none))    guidance (arXiv 2207.12598): t >= 0.125, w = 6.7

Guidance goes further in the direction in which the label makes a difference: images become clearer and less
diverse, at twice the cost. Near pure noise it mostly costs diversity (arXiv 2404.07724), so upstream leaves
it out there. We then skip the evaluation without label: 417 forwards an image instead of 498.

Fewer steps cost less. Measured on a tiny network with random weights (tests/fixtures), as a trained one's
paths may be less even: mean distance of the latents, in percent of their length, from those of a far finer
path (Heun, 2,000 steps). GPU hours are counted for 4 million images at 40 % of an H100's peak (assumed).

    forwards an image (GPU hours)       Euler                 --heun
     52 or  53  (35)                     31 steps: 0.66        16 steps: 0.22
    104 or 105  (69)                     62 steps: 0.33        31 steps: 0.16
    208 or 209 (138)                    124 steps: 0.17        62 steps: 0.08
    417 or 419 (275)                    249 steps: 0.09       125 steps: 0.01

Every image is a function of (seed, class, number). So a stopped run continues with the same command, and
several processes share the work without communication.
"""
import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import find_classes
from torchvision.utils import make_grid
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from dit_encoder import (EPS, AttnBlock, DiTBlock, InputError, LightningDiT, ResnetBlock, build_dit,
                         build_vae, fill, load_statistics, middle_blocks, modulate, read_tensors, reading)
from train_imagenet import DEVICE, count, last_part, lock, number, positive, whole, write_atomically
from train_imagenet import generator as random_generator

# ------------------------------------------------------------------------------------------------------------
# Settings. "upstream": of LightningDiT's configuration for the 800-epoch weights. "chosen": ours.

GUIDED_CHANNELS = 3  # upstream, see `Generator.sample`
JPEG_QUALITY = 95  # chosen: compression should leave no trace that a classifier could learn
DECODE_BATCH = 16  # images decoded together; at 256 px each keeps 34 MB per layer at full resolution
ASSUMED_RATE = 400e12  # FLOP/s for --dry-run: 40 % of an H100's bfloat16 peak, assumed and not measured
SMOKE = {"per_class": 4, "steps": 12, "batch_size": 8, "num_heads": 2, "image_size": 32, "device": "cpu",
         "out": "runs/generated-smoke"}  # other defaults for --smoke
# Flags that may differ from one run to the next in the same folder: images stay the same, up to rounding.
FREE = ("out", "per_class", "batch_size", "device", "amp", "no_compile", "preview", "dry_run")


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(usage="%(prog)s [flags] (--help lists them)", allow_abbrev=False,
                                     description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("images").add_argument
    add("--generator", nargs=3, metavar=("DIT", "VAE", "STATS"), help="the teacher's files, see README.md")
    add("--out", default="lightningdit-4m", help="folder for a folder of images per class")
    add("--classes-from", metavar="DIR", help="name classes as the folders there (else by number)")
    add("--per-class", type=count, default=4000, help="images of each class (stated: 4 million in all)")
    add("--format", choices=["jpg", "png"], default="jpg", help="png: without loss, four times the space")
    # Upstream's settings aim at the best pictures, whatever they cost. Fewer steps are the first
    # thing to try for less. Look at a --preview before drawing millions.
    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=count, default=249, help="of Euler (upstream); fewer: see the top")
    add("--heun", action="store_true", help="Heun's steps: closer to the true path, two evaluations each")
    add("--guidance", type=number, default=6.7, help="w (upstream); 1: none, at half the cost")
    add("--guidance-from", type=number, default=0.125, help="no guidance at times before (upstream)")
    add("--all-channels", action="store_true", help="guide all latent channels (upstream: the first three)")
    add("--shift", type=positive, default=0.3, help="s of the time grid (upstream)")
    # The first two have to be what the network was trained with, and are checked.
    add = parser.add_argument_group("running").add_argument
    add("--num-heads", type=count, default=16, help="attention heads of the network (upstream)")
    add("--image-size", type=count, default=256, help="pixels that the network was trained for (upstream)")
    add("--batch-size", type=count, default=64, help="images drawn together")
    add("--seed", type=whole, default=0, help="of every image's noise")
    add("--device", choices=["cuda", "cpu"], default=DEVICE, help="where to run")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, else float32 (default: on a GPU)")
    add("--no-compile", action="store_true", help="no torch.compile (default: compiled on a GPU)")
    add("--preview", metavar="FILE", help="only draw one image of each of 25 classes, into one .png or .jpg")
    add("--dry-run", action="store_true", help="print counts and cost, and stop")
    add("--smoke", action="store_true", help="seconds on a CPU: a tiny random network, four classes")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)  # any other flag still beats these
    args = parser.parse_args(argv)
    if not args.generator and not args.smoke:
        parser.error("--generator: expected the files of LightningDiT, VA-VAE and the latents' statistics")
    if args.preview and Path(args.preview).suffix not in (".png", ".jpg"):
        parser.error(f"--preview {args.preview}: expected a name that ends in .png or .jpg")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    args.amp = args.device == "cuda" if args.amp is None else args.amp
    return args


# ------------------------------------------------------------------------------------------------------------
# The second half of each network: the blocks after the teacher's, and VA-VAE's decoder. The building blocks
# and the reading of files are dit_encoder.py's. Parameter names are those of the released files.


class FinalLayer(nn.Module):
    """Tokens [B, T, D] and c [B, D] -> [B, T, outputs]: a last AdaLN, without a gate, and a linear layer."""

    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=EPS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, outputs)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def complete(dit, num_heads, mlp_hidden):
    """Make a teacher whose `layer` is the last block a whole network: all of that block, and a last layer.

    Returns the same LightningDiT. Its own `forward` gives features; the velocity is `Generator.velocity`'s.
    """
    width, embedder = dit.pos_embed.shape[2], dit.x_embedder.proj
    dit.blocks[-1] = DiTBlock(width, num_heads, mlp_hidden)
    dit.final_layer = FinalLayer(width, embedder.kernel_size[0] ** 2 * embedder.in_channels)
    return dit


class VAEDecoder(nn.Module):
    """Latents [B, latent_channels, h, w] -> images [B, 3, f h, f w], about in [-1, 1]. Mirrors VAEEncoder.

    levels: the encoder's, finest first, each (width, number of blocks, attention or not). The decoder has one
    block more on each level, and begins with the coarsest.
    """

    def __init__(self, levels, latent_channels):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = nn.Module()
        channels = levels[-1][0]
        self.decoder.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.decoder.mid = middle_blocks(channels)
        self.decoder.up = nn.ModuleList(nn.Module() for _ in levels)  # level 0 is the finest
        for i, (width, blocks, attention) in reversed(list(enumerate(levels))):
            level = self.decoder.up[i]
            level.block = nn.ModuleList(ResnetBlock(width if j else channels, width)
                                        for j in range(blocks + 1))
            level.attn = nn.ModuleList(AttnBlock(width) if attention else nn.Identity()
                                       for _ in range(blocks + 1))
            if i > 0:
                level.upsample = nn.Module()
                level.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            channels = width
        self.decoder.norm_out = nn.GroupNorm(32, channels, eps=EPS)
        self.decoder.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z):
        x = self.decoder.mid(self.decoder.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.decoder.up):
            for block, attention in zip(level.block, level.attn):
                x = attention(block(x))
            if hasattr(level, "upsample"):
                # Each pixel becomes 2 x 2 equal ones, and the convolution smooths them.
                x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(x)))


# ------------------------------------------------------------------------------------------------------------
# From noise to pixels.


def time_grid(steps, shift):
    """The times t of `steps` steps, steps + 1 floats from 0 (noise) to 1 (image).

    With shift below 1 the steps near the noise are short. That is where the layout of the image is decided;
    steps of equal length would spend most of the work on what comes later.
    """
    u = torch.linspace(0, 1, steps + 1)
    return (shift * u / (1 + (shift - 1) * u)).tolist()


def forwards_per_image(args):
    """How often the network is evaluated for one image: with guidance, each slope takes two forwards."""
    times = time_grid(args.steps, args.shift)
    # Heun's method needs the slope at both ends of each step, Euler's at its beginning.
    slopes_at = times[:-1] + (times[1:] if args.heun else [])
    return sum(2 if args.guidance != 1 and t >= args.guidance_from else 1 for t in slopes_at)


class Generator(nn.Module):
    """generator.decode(generator.sample(noise, labels)): images of given classes. Frozen, evaluation mode.

    Attributes: image_size, num_classes, latent_shape (C, H, W), mean and std of the latents [1, C, 1, 1], amp
    (whether the transformer computes in bfloat16, on any device; float32 until it is set).
    """

    def __init__(self, dit, vae, image_size):
        super().__init__()
        self.dit, self.vae, self.image_size, self.amp = dit, vae, image_size, False
        self.num_classes = dit.y_embedder.embedding_table.num_embeddings - 1
        channels, side = dit.x_embedder.proj.in_channels, image_size >> (len(vae.decoder.up) - 1)
        self.latent_shape = (channels, side, side)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.requires_grad_(False).eval()

    def velocity(self, z, t, label_rows):
        """v(z, t, y). z [B, *latent_shape], t [B], label_rows [B] int64 (num_classes: no label) -> like z."""
        # Only products of matrices are computed in bfloat16. z stays float32: bfloat16 has three digits, and
        # 249 small steps would lose most of what each of them adds.
        with torch.autocast("cuda" if z.is_cuda else "cpu", torch.bfloat16, enabled=self.amp):
            x, c = self.dit.embed(z, t, label_rows)  # [B, T, D], [B, D]
            for block in self.dit.blocks:
                x = block(x, c, self.dit.feat_rope.freqs_cos, self.dit.feat_rope.freqs_sin)
            x = self.dit.final_layer(x, c)  # [B, T, p * p * C]
        # Undo the cutting into patches: tokens go row by row, and each is a square of p x p latents.
        channels, height, width = self.latent_shape
        patch = self.dit.x_embedder.proj.kernel_size[0]
        x = x.float().unflatten(2, (patch, patch, channels))
        x = x.unflatten(1, (height // patch, width // patch))  # [B, H/p, W/p, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(z.shape)

    def sample(self, noise, labels, steps=249, guidance=6.7, guidance_from=0.125, shift=0.3, heun=False,
               all_channels=False):
        """Noise [B, *latent_shape], standard normal, and labels [B] int64 -> latents z, normalised, float32.

        Euler's method with `steps` steps, or Heun's (`heun`): the slope at the end of each step counts as
        much as that at its beginning, so a step costs two slopes. The error falls with the square of the
        steps' length, except in the one step in which guidance sets in.

        guidance: w; 1 is the plain model, at half the cost. It acts at times t >= guidance_from, and on the
        first three latent channels alone. That is what the released code does: the line is DiT's, whose
        latents had four channels, and w = 6.7 was chosen with it. all_channels guides them all; a smaller w
        should then be enough.
        """
        unlabelled = torch.full_like(labels, self.num_classes)  # the table's row for "no label"
        guided = slice(None if all_channels else GUIDED_CHANNELS)

        def slope(z, t):
            # Without guidance v(z, t, none) has no weight, so it need not be computed. This gives the same
            # numbers as computing both, at half the cost.
            if guidance == 1 or t < guidance_from:
                return self.velocity(z, torch.full((len(z),), t, device=z.device), labels)
            t = torch.full((2 * len(z),), t, device=z.device)  # both halves in one batch
            v = self.velocity(torch.cat([z, z]), t, torch.cat([unlabelled, labels]))
            without, v = v.chunk(2)
            # v(none) + w (v(y) - v(none)), on the guided channels alone.
            without, v = without[:, guided], v.clone()
            v[:, guided] = without + guidance * (v[:, guided] - without)
            return v

        # dz/dt = v(z, t, y), from t = 0, where z is the noise, to t = 1. Euler's method takes v as constant
        # in each step.
        z, times = noise.float(), time_grid(steps, shift)
        for t, t_next in zip(times, times[1:]):
            v = slope(z, t)
            if heun:
                v = (v + slope(z + (t_next - t) * v, t_next)) / 2
            z = z + (t_next - t) * v
        return z

    def decode(self, z):
        """Normalised latents [B, *latent_shape] -> images [B, 3, H, W] float32, about in [-1, 1].

        In float32 everywhere: next to the sampling it costs nothing, and bfloat16 is coarser than a pixel.
        """
        return self.vae(z * self.std + self.mean)  # back to VA-VAE's own scale, from the diffusion model's


def to_pixels(images):
    """Images [B, 3, H, W] in [-1, 1] -> uint8 [0, 255], cut off and not rounded, as upstream does it."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------
# Loading: the networks' sizes are read from names and shapes, as for the teacher.


def read_levels(encoder):
    """The sizes of a VAEEncoder, level by level, as VAEDecoder takes them."""
    return [(level.block[0].conv1.out_channels, len(level.block), isinstance(level.attn[0], AttnBlock))
            for level in encoder.encoder.down]


def load_generator(dit_path, vae_path, stats_path, num_heads=16, image_size=256):
    """Load LightningDiT and VA-VAE's decoder: a Generator, frozen, float32, on the CPU.

    The files are those of `load_dit_encoder`, and nothing in them is run. num_heads, image_size: what the
    networks were trained with. Raises InputError, one line that starts with the file's path, where it is
    damaged, of another kind, lacks a tensor or does not fit the others. OSError where it cannot be opened.
    """
    with reading(dit_path):
        tensors = read_tensors(dit_path, "a LightningDiT checkpoint")
        depth = sum(name.startswith("blocks.") and name.endswith("norm1.weight") for name in tensors)
        with torch.device("meta"):  # names and shapes only: nothing is allocated before they are known to fit
            # A teacher that ends at the last block; `complete` adds what a teacher lacks.
            dit = build_dit(tensors, depth - 1, num_heads)
            complete(dit, num_heads, tensors["blocks.0.mlp.w3.weight"].shape[1])
        fill(dit, tensors, ("",))  # all that is in the file
    with reading(vae_path):
        tensors = read_tensors(vae_path, "a VA-VAE checkpoint")
        with torch.device("meta"):
            vae = VAEDecoder(read_levels(build_vae(tensors)), tensors["decoder.conv_in.weight"].shape[1])
        fill(vae, tensors, ("decoder.", "post_quant_conv."))
        channels, to_tokens = vae.post_quant_conv.in_channels, dit.x_embedder.proj
        if channels != to_tokens.in_channels:
            raise InputError(f"takes {channels} latent channels, {dit_path} makes {to_tokens.in_channels}")
        tokens, factor = dit.pos_embed.shape[1], 2 ** (len(vae.decoder.up) - 1)
        expected = round(tokens ** 0.5) * to_tokens.kernel_size[0] * factor
        if image_size != expected:
            raise InputError(f"makes {expected} px of the {tokens} tokens of {dit_path}, not {image_size=}")
    generator = Generator(dit, vae, image_size)
    load_statistics(stats_path, generator)
    return generator


def open_generator(args):
    """The Generator and the names of its classes, in the order of the labels. Raises InputError."""
    classes = find_classes(args.classes_from)[0] if args.classes_from else None
    if not args.generator:  # the smoke run: a random network, whose images are coloured fog
        torch.manual_seed(args.seed)
        dit = LightningDiT(64, 2, 128, 4, 2, 64, (len(classes) if classes else 4) + 1, layer=1)
        vae = VAEDecoder([(32, 1, False), (32, 1, True)], latent_channels=4)
        generator = Generator(complete(dit, 2, 128), vae, image_size=32)
    else:
        generator = load_generator(*args.generator, args.num_heads, args.image_size)
    generator.amp = args.amp
    classes = classes or [f"{label:04}" for label in range(generator.num_classes)]
    if len(classes) != generator.num_classes:
        raise InputError(f"--classes-from {args.classes_from}: has {len(classes)} class folders, expected "
                         f"the {generator.num_classes} classes of the network")
    return generator, classes


# ------------------------------------------------------------------------------------------------------------
# Drawing and writing. With K classes, image i has label i % K and number i // K: first image 0 of every
# class, then image 1 of every class. So a stopped run leaves equally many of each class, to within one.


def draw(generator, batch, args):
    """batch: numbers i, int64 [B] -> images uint8 [B, 3, H, W] on the CPU. Raises FloatingPointError.

    The noise of each image is drawn by itself and on the CPU, from (seed, i), so that it does not depend on
    the batch or the device.
    """
    device, shape = generator.mean.device, generator.latent_shape
    noise = torch.stack([torch.randn(shape, generator=random_generator(args.seed, i, "noise"))
                         for i in batch.tolist()]).to(device)
    labels = (batch % generator.num_classes).to(device)
    z = generator.sample(noise, labels, args.steps, args.guidance, args.guidance_from, args.shift, args.heun,
                         args.all_channels)
    if not z.isfinite().all():
        raise FloatingPointError(f"latents are not finite in the batch of images {batch.tolist()}")
    # An image takes far more memory in the decoder than in the transformer, hence in smaller batches.
    return torch.cat([to_pixels(generator.decode(part)).cpu() for part in z.split(DECODE_BATCH)])


def write_image(pixels, path):
    """Write uint8 [3, H, W] as .jpg or .png. A kill or a full disk leaves no half image under that name: a
    continued run would take it as done, and training would stop at it."""
    image, kind = Image.fromarray(pixels.permute(1, 2, 0).numpy()), "png" if path.suffix == ".png" else "jpeg"
    write_atomically(path, lambda file: image.save(file, kind, quality=JPEG_QUALITY))


def check_settings(out, args, rank):
    """Write the settings of this run to settings.json in `out`, or compare them with those that are there.
    Raises InputError where they differ: images of other settings would not be noticed among these."""
    path = out / "settings.json"
    settings = {name: last_part(value) for name, value in vars(args).items() if name not in FREE}
    if rank == 0 and not path.exists():
        write_atomically(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))
    while not path.exists():  # the other processes wait for the first one
        time.sleep(0.1)
    try:
        there = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise InputError(f"{path}: damaged, expected JSON; choose another --out") from None
    for name, value in settings.items():
        if there.get(name) != value:
            raise InputError(f"{out}: holds images drawn with {name} {there.get(name)}, not {value}; choose "
                             "another --out")


def generate(generator, classes, args, out, rank, world):
    """Write the images that are missing of OUT/<class>/<number>.jpg. Process r of n takes the batches r,
    r + n, ..., so that no process has to ask another one what to do.

    Which images share a batch depends on --batch-size alone, not on what is there already: a batch that was
    interrupted is drawn again as a whole. On a CPU the last bits of a matrix product can depend on its
    number of rows, so only this makes a continued run, or one with more processes, the same to the bit. With
    another --batch-size or number of threads latents were the same within 3e-7 (relative), and one pixel
    value in 19,000 or fewer differed, by one grey level (measured).
    """
    name = lambda number: f"{number:05}.{args.format}"
    done = torch.zeros(args.per_class, len(classes), dtype=torch.bool)
    for label, folder in enumerate(classes):  # each folder is listed once, as single questions take hours
        (out / folder).mkdir(exist_ok=True)
        there = set(os.listdir(out / folder))
        done[:, label] = torch.tensor([name(number) in there for number in range(args.per_class)])
    done = done.flatten()
    batches = torch.arange(len(done)).split(args.batch_size)[rank::world]
    todo = [batch for batch in batches if not done[batch].all()]
    for batch in tqdm(todo, unit="batch", disable=rank > 0):
        for i, pixels in zip(batch.tolist(), draw(generator, batch, args)):
            if not done[i]:
                write_image(pixels, out / classes[i % len(classes)] / name(i // len(classes)))


def print_plan(generator, classes, args, world):
    """Counts and cost. The networks go to the meta device, where only shapes are computed, so that counting
    takes no time; afterwards they are of no other use."""
    size = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters"
    images, forwards, flops = len(classes) * args.per_class, forwards_per_image(args), []
    generator, channels = generator.to("meta"), generator.latent_shape[0]
    with torch.device("meta"):
        z, t, label = torch.zeros(1, *generator.latent_shape), torch.zeros(1), torch.zeros(1).long()
    for compute in (lambda: generator.velocity(z, t, label), lambda: generator.decode(z)):
        with FlopCounterMode(display=False) as counter:
            compute()
        flops.append(counter.get_total_flops())
    each = forwards * flops[0] + flops[1]
    days = images * each / ASSUMED_RATE / 86400
    guided = channels if args.all_channels else min(channels, GUIDED_CHANNELS)
    print(f"images     {images:,} = {len(classes):,} classes x {args.per_class:,},",
          f"{generator.image_size} px, {args.format}, into {args.out}")
    print(f"network    {args.generator[0] if args.generator else 'random'}: {size(generator.dit)},",
          f"decoder {size(generator.vae)}, in {'bfloat16' if args.amp else 'float32'}")
    print(f"sampling   {args.steps} steps of {'Heun' if args.heun else 'Euler'}, guidance {args.guidance:g}",
          f"on {guided} of {channels} channels from t = {args.guidance_from:g}: {forwards} forwards an image")
    print(f"cost       {flops[0] / 1e9:.4g} GFLOP a forward, {flops[1] / 1e9:.4g} the decoder:",
          f"{each / 1e12:.4g} TFLOP an image, {images * each:.3g} FLOP in all")
    print(f"time       {days:.3g} GPU days at {ASSUMED_RATE / 1e12:g} TFLOP/s (assumed: 40 % of an H100's",
          f"bfloat16 peak), {days / world:.3g} days on {world} process(es)")


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    rank, world, local = [int(os.environ.get(name, default))  # as torchrun sets them
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    device = torch.device("cuda", local) if args.device == "cuda" else torch.device("cpu")
    generator, classes = open_generator(args)
    if args.dry_run:
        if rank == 0:
            print_plan(generator, classes, args, world)
        return
    generator.to(device, memory_format=torch.channels_last)  # the faster layout for convolutions
    if args.device == "cuda" and not args.no_compile:
        generator.velocity = torch.compile(generator.velocity, dynamic=False)
        generator.vae.compile()
    if args.preview:
        if rank == 0:
            if Path(args.preview).exists():
                raise InputError(f"{args.preview}: exists, choose another name for --preview")
            shown = torch.arange(min(25, len(classes)))  # image 0 of each class
            write_image(make_grid(draw(generator, shown, args), nrow=5), Path(args.preview))
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    # An image that is there counts as drawn. So it has to be one of ours, and not, say, a real one.
    there = set(os.listdir(out)) - {"lock", "settings.json.tmp"}
    if there and "settings.json" not in there:
        raise InputError(f"{out}: holds something else, expected a new or empty folder")
    # The processes need no process group: each knows its share. Only the first one locks the folder.
    with lock(out) if rank == 0 else contextlib.nullcontext():
        check_settings(out, args, rank)
        generate(generator, classes, args, out, rank, world)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
