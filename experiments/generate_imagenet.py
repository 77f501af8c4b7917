"""Draw synthetic ImageNet images with LightningDiT: the 4 million of arXiv 2602.19931, section 5.1.

    FILES="lightningdit-xl-imagenet256-800ep.pt vavae-imagenet256-f16d32-dinov2.pt latents_stats.pt"
    python experiments/generate_imagenet.py --smoke                 # a tiny random network, seconds on a CPU
    python experiments/generate_imagenet.py --generator $FILES --dry-run             # what it would cost
    python experiments/generate_imagenet.py --generator $FILES --preview grid.png    # 25 classes to see
    torchrun --nproc-per-node 8 experiments/generate_imagenet.py --generator $FILES \\
        --classes-from imagenet/train --out lightningdit-4m        # what train_imagenet.py --synthetic reads

The images are not public, so everybody has to draw their own. The same network serves twice in the paper: its
samples are training data, and its features are what the classifier is aligned with (dit_encoder.py).

LightningDiT (Yao et al. 2025, arXiv 2501.01423) has learned a velocity. Training took a clean latent z_1 and
noise z_0, put z_t = t z_1 + (1 - t) z_0 on the straight line between the two, and asked for the direction
z_1 - z_0 of that line, given z_t, t and the label y alone. The answer v(z, t, y) is an average over all lines
that pass there. Following it from pure noise at t = 0 to t = 1 gives a new image of class y:

    z_0 ~ N(0, 1),   dz/dt = v(z, t, y),   image = decoder(z_1 std + mean)
    z <- z + (t' - t) v(z, t, y)           Euler's steps from t to t', 249 of them (250 grid points)
    t = s u / (1 + (s - 1) u)              u evenly from 0 to 1; s = 0.3: short steps at the noisy end
    v <- v(z, t, none) + w (v(z, t, y) - v(z, t, none))    guidance (arXiv 2207.12598): t >= 0.125, w = 6.7

Guidance goes further in the direction that the label makes a difference: images become clearer and less
diverse, at twice the cost. In the noisiest part of the way it mostly takes diversity (arXiv 2404.07724), so
there upstream leaves it out, and we then compute no second half: 417 forwards an image instead of 498.

Every image is a function of (seed, class, number). So a stopped run goes on where it was, and any number of
processes share the work without talking to each other.
"""
import argparse
import hashlib
import io
import json
import os
import sys
import time
from itertools import compress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import find_classes
from torchvision.utils import make_grid
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from dit_encoder import (EPS, AttnBlock, DiTBlock, LightningDiT, ResnetBlock, build_dit, build_vae, fill,
                         modulate, naming, read_tensors, take)
from train_imagenet import DEVICE, InputError, fraction, lock, save_atomically
from train_imagenet import generator as random_generator

# ------------------------------------------------------------------------------------------------------------
# Settings. "upstream": of LightningDiT's configuration for the 800-epoch weights. "chosen": ours.

GUIDED_CHANNELS = 3  # upstream, see `Generator.sample`
JPEG_QUALITY = 95  # chosen: compression should leave no trace that a classifier could learn
DECODE_BATCH = 16  # images decoded together; at 256 px each keeps 34 MB per layer at full resolution
ASSUMED_RATE = 400e12  # FLOP/s for --dry-run: 40 % of an H100's bfloat16 peak, assumed and not measured
SMOKE = {"per_class": 4, "steps": 12, "batch_size": 8, "num_heads": 2, "image_size": 32, "device": "cpu",
         "out": "runs/generated-smoke"}  # other defaults for --smoke
# What an image depends on. A folder holds images of one set of these.
FIXED = ("seed", "steps", "heun", "guidance", "guidance_from", "all_channels", "shift", "format",
         "image_size", "amp")


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--generator", nargs=3, metavar=("DIT", "VAE", "STATS"), help="the teacher's files, see README.md")
    add("--out", default="lightningdit-4m", help="folder for a folder of images per class")
    add("--classes-from", metavar="DIR", help="name classes as the folders there (else by number)")
    add("--per-class", type=int, default=4000, help="images of each class (stated: 4 million in all)")
    add("--format", choices=["jpg", "png"], default="jpg", help="png: without loss, four times the space")
    # Sampling.
    add("--steps", type=int, default=249, help="of Euler (upstream); fewer: see README.md")
    add("--heun", action="store_true", help="Heun's steps: closer to the true path, two evaluations each")
    add("--guidance", type=fraction, default=6.7, help="w (upstream); 1: none, at half the cost")
    add("--guidance-from", type=fraction, default=0.125, help="no guidance at times before (upstream)")
    add("--all-channels", action="store_true", help="guide all latent channels (upstream: the first three)")
    add("--shift", type=fraction, default=0.3, help="s of the time grid (upstream)")
    # Running.
    add("--batch-size", type=int, default=64, help="images drawn together")
    add("--num-heads", type=int, default=16, help="attention heads of the network (upstream)")
    add("--image-size", type=int, default=256, help="pixels that the network was trained for (upstream)")
    add("--seed", type=int, default=0, help="of every image's noise")
    add("--device", choices=["cuda", "cpu"], default=DEVICE, help="where to run")
    add("--no-amp", action="store_true", help="float32 throughout (CUDA's default: bfloat16)")
    add("--no-compile", action="store_true", help="no torch.compile (CUDA's default: compiled)")
    add("--preview", metavar="FILE", help="only draw one image of each of 25 classes, into one .png or .jpg")
    add("--dry-run", action="store_true", help="print counts and cost, and stop")
    add("--smoke", action="store_true", help="seconds on a CPU: a tiny random network, four classes")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)  # any other flag still beats these
    args = parser.parse_args(argv)
    if not args.generator and not args.smoke:
        parser.error("--generator: expected the files of LightningDiT, VA-VAE and the latents' statistics")
    for expected, fits, names in (
            ("at least 1", lambda x: x >= 1, "per_class steps batch_size num_heads image_size"),
            ("at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed"),
            ("at least 0", lambda x: x >= 0, "guidance guidance_from"),
            ("above 0", lambda x: x > 0, "shift")):
        for name in names.split():
            if not fits(getattr(args, name)):
                parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")
    if args.preview and Path(args.preview).suffix not in (".png", ".jpg"):
        parser.error(f"--preview {args.preview}: expected a name that ends in .png or .jpg")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    args.amp = args.device == "cuda" and not args.no_amp  # autocast to bfloat16
    return args


# ------------------------------------------------------------------------------------------------------------
# The second halves: what follows the teacher's middle block, and what turns latents into pixels. Blocks and
# reading of files are dit_encoder.py's, parameter names are the released files'.


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

    levels: the encoder's, finest first, (channels, number of blocks, attention or not). The decoder has one
    block more on each, and begins with the last. The empty modules are there for the file's names.
    """

    def __init__(self, levels, latent_channels):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = nn.Module()
        channels = levels[-1][0]
        self.decoder.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.decoder.mid = nn.Module()
        self.decoder.mid.block_1 = ResnetBlock(channels, channels)
        self.decoder.mid.attn_1 = AttnBlock(channels)
        self.decoder.mid.block_2 = ResnetBlock(channels, channels)
        up = []
        for i, (width, blocks, attention) in reversed(list(enumerate(levels))):
            level = nn.Module()
            level.block = nn.ModuleList(ResnetBlock(width if j else channels, width)
                                        for j in range(blocks + 1))
            level.attn = nn.ModuleList(AttnBlock(width) for _ in range(blocks + 1 if attention else 0))
            if i > 0:
                level.upsample = nn.Module()
                level.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            up.append(level)
            channels = width
        self.decoder.up = nn.ModuleList(reversed(up))  # in the file, too, level 0 is the finest
        self.decoder.norm_out = nn.GroupNorm(32, channels, eps=EPS)
        self.decoder.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z):
        x = self.decoder.conv_in(self.post_quant_conv(z))
        x = self.decoder.mid.block_2(self.decoder.mid.attn_1(self.decoder.mid.block_1(x)))
        for level in reversed(self.decoder.up):
            for j, block in enumerate(level.block):
                x = block(x)
                x = level.attn[j](x) if len(level.attn) else x
            if hasattr(level, "upsample"):
                # Each pixel becomes 2 x 2 equal ones, and the convolution smooths them.
                x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(x)))


# ------------------------------------------------------------------------------------------------------------
# From noise to pixels.


def time_grid(steps, shift):
    """The times t of `steps` steps, steps + 1 floats from 0 (noise) to 1 (image).

    Even steps u would take most of the way at a time when little is left to decide. With shift below 1 the
    steps near the noise are short: those where the image's layout is found.
    """
    u = torch.linspace(0, 1, steps + 1)
    return (shift * u / (1 + (shift - 1) * u)).tolist()


def forwards_per_image(args):
    """How often the network is evaluated for one image: where guidance acts, each slope counts twice."""
    times = time_grid(args.steps, args.shift)
    slopes_at = times[:-1] + (times[1:] if args.heun else [])
    return sum(2 if args.guidance != 1 and t >= args.guidance_from else 1 for t in slopes_at)


class Generator(nn.Module):
    """generator.decode(generator.sample(noise, labels)): images of given classes. Frozen, evaluation mode.

    Attributes: image_size, num_classes, latent_shape (C, H, W), amp (bfloat16 on CUDA), mean and std of the
    latents [1, C, 1, 1].
    """

    def __init__(self, dit, vae, image_size):
        super().__init__()
        self.dit, self.vae, self.image_size, self.amp = dit, vae, image_size, True
        self.num_classes = dit.y_embedder.embedding_table.num_embeddings - 1
        channels, side = dit.x_embedder.proj.in_channels, image_size >> (len(vae.decoder.up) - 1)
        self.latent_shape = (channels, side, side)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.requires_grad_(False).eval()

    def velocity(self, z, t, label_rows):
        """v(z, t, y). z [B, *latent_shape], t [B], label_rows [B] int64 (num_classes: no label) -> like z."""
        # Inside, tokens are added up in float32 and multiplied in bfloat16. z itself stays float32: 249 small
        # steps in three digits would lose most of what each of them adds.
        with torch.autocast("cuda", torch.bfloat16, enabled=self.amp and z.is_cuda):
            x, c = self.dit.embed(z, t, label_rows)  # [B, T, D], [B, D]
            for block in self.dit.blocks:
                x = block(x, c, self.dit.feat_rope.freqs_cos, self.dit.feat_rope.freqs_sin)
            x = self.dit.final_layer(x, c)  # [B, T, p * p * C]: each token's patch of p x p latents
        channels, height, width = self.latent_shape
        patch = self.dit.x_embedder.proj.kernel_size[0]
        x = x.float().unflatten(2, (patch, patch, channels))
        x = x.unflatten(1, (height // patch, width // patch))  # [B, h, w, p, p, C], tokens row by row
        return x.permute(0, 5, 1, 3, 2, 4).reshape(z.shape)

    def sample(self, noise, labels, steps=249, guidance=6.7, guidance_from=0.125, shift=0.3, heun=False,
               all_channels=False):
        """Noise [B, *latent_shape], standard normal, and labels [B] int64 -> latents z, normalised, float32.

        Euler's method with `steps` steps, or Heun's (`heun`): the slope at the end of each step counts as
        much as that at its beginning, so a step costs two slopes and its error falls with the square of its
        length, except in the one step in which guidance sets in.

        guidance: w; 1 is the plain model, at half the cost. It acts at times t >= guidance_from, and on the
        first three latent channels alone. That is what the released code does: the line is DiT's, whose
        latents had four channels, and w = 6.7 was chosen with it. all_channels guides them all, for which a
        smaller w is due. Raises ValueError for noise of another shape and, on a CPU, for labels that the
        network does not know.
        """
        if noise.shape[1:] != self.latent_shape:
            raise ValueError(f"noise is {list(noise.shape)}, expected [B, {str(self.latent_shape)[1:-1]}]")
        if labels.device.type == "cpu" and not (0 <= labels.min() and labels.max() < self.num_classes):
            raise ValueError(f"the network knows labels 0 to {self.num_classes - 1}, "
                             f"not {labels.min()} to {labels.max()}")
        unlabelled = torch.full_like(labels, self.num_classes)  # the table's row for "no label"
        guided = slice(None if all_channels else GUIDED_CHANNELS)

        def slope(z, t):
            # Where there is no guidance, v(z, t, none) would be multiplied by 0: not computing it is exact.
            if guidance == 1 or t < guidance_from:
                return self.velocity(z, torch.full((len(z),), t, device=z.device), labels)
            t = torch.full((2 * len(z),), t, device=z.device)  # both halves in one batch
            v = self.velocity(torch.cat([z, z]), t, torch.cat([unlabelled, labels]))
            without, v = v.chunk(2)
            without, v = without[:, guided], v.clone()
            v[:, guided] = without + guidance * (v[:, guided] - without)
            return v

        z, times = noise.float(), time_grid(steps, shift)  # at t = 0, z is the noise
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
# Files in: the networks' sizes are read off names and shapes, as for the teacher.


def load_generator(dit_path, vae_path, stats_path, num_heads=16, image_size=256):
    """Load LightningDiT and VA-VAE's decoder: a Generator, frozen, float32, on the CPU.

    The files are those of `load_dit_encoder`, and nothing in them is run. num_heads, image_size: what the
    networks were trained with. Raises ValueError, one line that names the file, where it is damaged, of
    another kind, lacks a tensor or does not fit the others. OSError where it cannot be opened.
    """
    with naming(dit_path):
        tensors = read_tensors(dit_path, "a LightningDiT checkpoint")
        depth = sum(name.startswith("blocks.") and name.endswith("norm1.weight") for name in tensors)
        with torch.device("meta"):  # names and shapes only: nothing is allocated before they are known to fit
            dit = build_dit(tensors, depth - 1, num_heads)
            complete(dit, num_heads, tensors["blocks.0.mlp.w3.weight"].shape[1])
        fill(dit, tensors, ("",))  # all that is in the file
    with naming(vae_path):
        tensors = read_tensors(vae_path, "a VA-VAE checkpoint")
        with torch.device("meta"):
            levels = [(level.block[0].conv1.out_channels, len(level.block), len(level.attn) > 0)
                      for level in build_vae(tensors).encoder.down]
            made = tensors["decoder.conv_in.weight"].shape[1]
            vae = VAEDecoder(levels, made)
        fill(vae, tensors, ("decoder.", "post_quant_conv."))
        generator = Generator(dit, vae, image_size)
        (channels, side, _), tokens = generator.latent_shape, dit.pos_embed.shape[1]
        patch = dit.x_embedder.proj.kernel_size[0]
        fits = (side / patch) ** 2 == tokens and made == channels
        if not fits or image_size % 2 ** (len(levels) - 1):
            raise ValueError(f"image_size={image_size} takes {side} x {side} latents, {made} channels, "
                             f"{dit_path} makes {tokens} tokens of {patch} x {patch}, {channels} channels")
    with naming(stats_path):
        tensors = read_tensors(stats_path, "latent statistics")
        for name in ("mean", "std"):
            getattr(generator, name).copy_(take(tensors, name, (1, channels, 1, 1)))
        if not (generator.std > 0).all():
            raise ValueError("std is not above 0 everywhere")
    return generator


def open_generator(args):
    """The Generator and the names of its classes, in the order of the labels. Raises InputError."""
    classes = find_classes(args.classes_from)[0] if args.classes_from else None
    if not args.generator:  # the smoke run: a random network takes the same path, to coloured fog
        torch.manual_seed(args.seed)
        dit = LightningDiT(64, 2, 128, 4, 2, 64, (len(classes) if classes else 4) + 1, layer=1)
        vae = VAEDecoder([(32, 1, False), (32, 1, True)], latent_channels=4)
        generator = Generator(complete(dit, 2, 128), vae, image_size=32)
    else:
        try:
            generator = load_generator(*args.generator, args.num_heads, args.image_size)
        except (ValueError, OSError) as error:
            raise InputError(f"--generator {error}") from None
    generator.amp = args.amp
    classes = classes or [f"{label:04}" for label in range(generator.num_classes)]
    if len(classes) != generator.num_classes:
        raise InputError(f"--classes-from {args.classes_from}: has {len(classes)} class folders, expected "
                         f"the {generator.num_classes} classes of the network")
    return generator, classes


# ------------------------------------------------------------------------------------------------------------
# Files out. Images are counted by number first and class second: 0 of every class, then 1 of every class. So
# a run that is stopped early leaves as many of each class, to within one.


def draw(generator, keys, args):
    """keys: [(label, number)] -> uint8 [len(keys), 3, H, W] on the CPU. Raises FloatingPointError.

    Noise is drawn on the CPU for each image by itself, from (seed, label, number), so that it does not
    depend on the batch or the device.
    """
    noise = torch.stack([torch.randn(generator.latent_shape, generator=random_generator(args.seed, key, "z"))
                         for key in keys]).to(generator.mean.device)
    labels = torch.tensor([label for label, _ in keys], device=noise.device)
    z = generator.sample(noise, labels, args.steps, args.guidance, args.guidance_from, args.shift, args.heun,
                         args.all_channels)
    if not z.isfinite().all():
        raise FloatingPointError(f"latents are not finite, first of class {keys[0][0]}, image {keys[0][1]}")
    return torch.cat([to_pixels(generator.decode(part)).cpu() for part in z.split(DECODE_BATCH)])


def write_image(pixels, path):
    """uint8 [3, H, W] -> a .jpg or .png: under a temporary name, flushed to the disk, then renamed, so that
    what has the name is whole. Raises OSError where it cannot be written."""
    encoded, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    kind = "png" if path.suffix == ".png" else "jpeg"
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(encoded, kind, quality=JPEG_QUALITY)
    try:
        with open(temporary, "wb") as file:
            file.write(encoded.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); what is done stays") from None
    finally:
        temporary.unlink(missing_ok=True)


def claim(out, args, generator, classes, rank):
    """See that the folder is new or holds images of this very command, and note in it which that is.

    Images of other weights or settings would look just as good beside these. Process 0 looks first and keeps
    a second run out; the others wait for its note, and compare for themselves. Returns the lock, to be kept.
    Raises InputError.
    """
    out.mkdir(parents=True, exist_ok=True)
    note = out / "settings.json"
    others = {item.name for item in out.iterdir()} - {"lock", "settings.json.tmp"}
    if rank == 0 and others and not note.exists():
        raise InputError(f"--out {out}: holds something else, expected a new or empty folder")
    held = lock(out) if rank == 0 else None
    weights = hashlib.sha256()  # 2.9 GB take a few seconds
    for tensor in generator.state_dict().values():
        weights.update(tensor.contiguous().numpy())
    settings = {name: getattr(args, name) for name in FIXED}
    settings |= {"weights": weights.hexdigest()[:16], "classes": classes}
    while rank > 0 and not note.exists():
        time.sleep(0.1)
    if note.exists():
        try:
            there = json.loads(note.read_text())
            different = [name for name in settings if there.get(name) != settings[name]]
        except (ValueError, AttributeError):
            raise InputError(f"{note}: is damaged") from None
        if different:
            name = different[0]
            values = "" if name == "classes" else f": {there.get(name)} there, {settings[name]} now"
            raise InputError(f"--out {out}: holds images of other {name}{values}; expected another folder")
    else:
        save_atomically(json.dumps(settings, indent=1), note)
    return held


def generate(generator, classes, args, out, rank, world):
    """Write what is missing of OUT/<class>/<number>.jpg; this process's share is every world-th batch.

    Which images share a batch depends on --batch-size alone, not on what is there already: a batch that was
    interrupted is drawn again as a whole. On a CPU the last bits of a matrix product can depend on its
    number of rows, so only this makes a continued run, or one with more processes, the same to the bit. With
    another --batch-size or number of threads latents were the same within 3e-7 (relative), and one pixel
    value in 19,000 or fewer differed, by one grey level (measured; see README.md).
    """
    # Each folder is listed once: 4 million questions to a network file system would take hours.
    done = np.zeros((args.per_class, len(classes)), bool)
    name = lambda number: f"{number:05}.{args.format}"
    for label, folder in enumerate(classes):
        (out / folder).mkdir(exist_ok=True)
        there = set(os.listdir(out / folder))
        done[:, label] = [name(number) in there for number in range(args.per_class)]
    done = done.reshape(-1)  # image i has number i // classes and label i % classes
    # Process r of n takes batches r, r + n, ...: fixed beforehand, so nobody has to ask who does what.
    batches = np.split(np.arange(len(done)), range(args.batch_size, len(done), args.batch_size))[rank::world]
    share = done[np.concatenate(batches)] if batches else done[:0]
    with tqdm(total=len(share), initial=int(share.sum()), unit=" images", file=sys.stdout,
              disable=rank > 0) as progress:
        for batch in batches:
            if done[batch].all():
                continue
            keys = [(int(i) % len(classes), int(i) // len(classes)) for i in batch]
            for (label, number), pixels in compress(zip(keys, draw(generator, keys, args)), ~done[batch]):
                write_image(pixels, out / classes[label] / name(number))
                progress.update()


def print_plan(generator, classes, args, world):
    """Counts and cost. The networks go to the meta device, where shapes are computed and no numbers, so that
    counting takes no time; afterwards they are of no other use."""
    size = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters"
    count, forwards, flops = len(classes) * args.per_class, forwards_per_image(args), []
    generator, channels = generator.to("meta"), generator.latent_shape[0]
    with torch.device("meta"):
        z, t, label = torch.zeros(1, *generator.latent_shape), torch.zeros(1), torch.zeros(1).long()
    for compute in (lambda: generator.velocity(z, t, label), lambda: generator.decode(z)):
        with FlopCounterMode(display=False) as counter:
            compute()
        flops.append(counter.get_total_flops())
    each = forwards * flops[0] + flops[1]
    days = count * each / ASSUMED_RATE / 86400
    guided = channels if args.all_channels else min(channels, GUIDED_CHANNELS)
    print(f"images     {count:,} = {len(classes):,} classes x {args.per_class:,},",
          f"{generator.image_size} px, {args.format}, into {args.out}")
    print(f"network    {args.generator[0] if args.generator else 'random'}: {size(generator.dit)},",
          f"decoder {size(generator.vae)}; bfloat16 {'on' if args.amp else 'off'}")
    print(f"sampling   {args.steps} steps of {'Heun' if args.heun else 'Euler'}, guidance {args.guidance:g}",
          f"on {guided} of {channels} channels from t = {args.guidance_from:g}: {forwards} forwards an image")
    print(f"cost       {flops[0] / 1e9:.4g} GFLOP a forward, {flops[1] / 1e9:.4g} the decoder:",
          f"{each / 1e12:.4g} TFLOP an image, {count * each:.3g} FLOP in all")
    print(f"time       {days:.3g} GPU days at {ASSUMED_RATE / 1e12:g} TFLOP/s (assumed: 40 % of an H100's",
          f"bfloat16 peak), {days / world:.3g} days on {world} process(es)")


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    rank, world, local = [int(os.environ.get(name, default))  # as torchrun sets them
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    if args.device == "cuda" and local >= torch.cuda.device_count():
        raise InputError(f"--device cuda: too few GPUs here for process {local}")
    generator, classes = open_generator(args)
    if args.dry_run:
        if rank == 0:
            print_plan(generator, classes, args, world)
        return
    out, preview = Path(args.out), Path(args.preview) if args.preview else None
    if preview and preview.exists():
        raise InputError(f"--preview {preview}: exists, expected a new name")
    held = None if preview else claim(out, args, generator, classes, rank)  # until this function returns
    device = torch.device("cuda", local) if args.device == "cuda" else torch.device("cpu")
    generator.to(device, memory_format=torch.channels_last)
    if args.device == "cuda" and not args.no_compile:
        generator.velocity = torch.compile(generator.velocity, dynamic=False)
        generator.vae.compile()
    if preview and rank == 0:
        keys = [(label, 0) for label in range(min(25, len(classes)))]
        write_image(make_grid(draw(generator, keys, args), nrow=5), preview)
        print(f"{preview}: image 0 of {', '.join(classes[:len(keys)])}")
    elif not preview:
        generate(generator, classes, args, out, rank, world)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {str(problem).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as usual for Ctrl-C; the same command continues
    except FloatingPointError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
