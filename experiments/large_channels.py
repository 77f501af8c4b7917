"""Which channels of LightningDiT are abnormally large? Appendix D of arXiv 2602.19931.

    FILES="lightningdit-xl-imagenet256-800ep.pt vavae-imagenet256-f16d32-dinov2.pt latents_stats.pt"
    python experiments/large_channels.py $FILES --data-dir imagenet/val

A classifier is aligned with the hidden state that enters a middle block of LightningDiT (dit_encoder.py). In
diffusion transformers a few channels are many times larger than all others, whatever the image shows
("massive activations": Fang et al. 2025 and Gan et al. 2025, cited in appendix D). The loss of eq. (3) is a
cosine, in which a channel counts with the square of its size. So these few channels would decide it almost
alone, and what they teach about the image is little.

The paper looked for channels that "consistently exhibit abnormally large activation norms". It found two of
1152 in the released LightningDiT-XL/1, at block 14: channels 1053 and 259. It gives no sizes. It zeroes both
before AdaLN, as `load_dit_encoder` does by default. In another LightningDiT, or at another block, other
channels may stand out: measure them here, and give them to `load_dit_encoder` as zero_channels.

Let h(x) [T, D] be the hidden state for a noised image x, with T tokens and D channels. We measure

    r_c(x) = sqrt( mean over tokens k of h_kc(x)^2 )         size of channel c for one image
    rms    = R_c = mean over images x of r_c(x)
    ratio  = R_c / median over all channels of R             "abnormally large": far above the next channels'
    share  = share of the images for which r_c(x) is among the ten largest of r(x)     "consistently": near 1

chosen (the paper does not say): the root mean square as the norm; ten; t = 0.9, as in training; no label, so
that any folder of images will do; 256 images, drawn with --seed from all below --data-dir; shorter side
resized to the network's size, then a centre crop; noise drawn for each image by itself; float32. Intervals
are 95 % bootstrap intervals over images, from 1,000 draws.

Each pair of a block and a time is a setting. Its ten largest channels are rows of OUT/large_channels.csv, and
OUT/large_channels.png shows all settings. The same command again continues: what is in the CSV stays.
"""
import argparse
import csv
import io
import itertools
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from tqdm import tqdm

matplotlib.use("Agg")  # figures go to files; no screen is needed
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from dit_encoder import InputError, load_dit_encoder, reading
from train_imagenet import DEVICE, count, generator, last_part, lock, number, whole, write_atomically

LARGEST = 10  # so many channels are listed, and count for `share` (chosen)
BATCH = 16  # images computed together; the result does not depend on it


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(usage="%(prog)s DIT VAE STATS [flags] (--help lists them)",
                                     allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("dit", help="LightningDiT's .pt")
    add("vae", help="VA-VAE's .pt")
    add("stats", help="latents_stats.pt")
    add("--data-dir", required=True, metavar="DIR", help="images anywhere in this folder")
    add("--teacher-layer", type=whole, nargs="+", default=[14], help="blocks to look at (14: stated)")
    add("--teacher-t", type=number, nargs="+", default=[0.9], help="times (1: clean image, 0: pure noise)")
    add("--n", type=count, default=256, help="images")
    add("--seed", type=whole, default=0, help="of the choice of images and of their noise")
    add("--device", choices=["cuda", "cpu"], default=DEVICE, help="where to compute")
    add("--out", default="analysis", help="folder for large_channels.csv and large_channels.png")
    args = parser.parse_args(argv)
    if max(args.teacher_t) > 1:
        parser.error(f"argument --teacher-t: {max(args.teacher_t):g}: expected a number from 0 to 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    return args


# ------------------------------------------------------------------------------------------------------------
# Measurement.


def choose_images(folder, n, seed):
    """Paths of n images anywhere below a folder, drawn without replacement. Raises InputError, OSError."""
    root = Path(folder).resolve(strict=True)  # FileNotFoundError (an OSError) where there is no such folder
    paths = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in IMG_EXTENSIONS]
    if len(paths) < n:
        raise InputError(f"{folder}: has {len(paths)} images, fewer than --n {n}")
    # Sorted paths go class by class, so the first n would show few classes.
    order = torch.randperm(len(paths), generator=generator(seed, 0, "images"))
    return [paths[i] for i in order[:n]]


@torch.no_grad()
def measure(encoder, paths, t, seed, device):
    """r_c(x) for each image: float32 [n, D], a numpy array.

    The hidden state is taken before channels are silenced and before the norm, which would make all tokens
    equally large.
    """
    side, sizes = encoder.image_size, []
    prepare = transforms.Compose(
        [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()])
    for start in tqdm(range(0, len(paths), BATCH), desc=f"block {encoder.layer}, t = {t:g}", unit="batch"):
        images = torch.stack([prepare(default_loader(path)) for path in paths[start:start + BATCH]])
        noise = torch.stack([torch.randn(encoder.latent_shape, generator=generator(seed, i, "noise"))
                             for i in range(start, start + len(images))])
        # images [B, 3, H, W] in [0, 1], noise [B, C, h, w], hidden [B, T, D]
        hidden, _ = encoder.activations(images.to(device), None, t, noise.to(device))
        sizes.append(hidden.square().mean(dim=1).sqrt().cpu())
    return torch.cat(sizes).numpy()


def compare_channels(sizes):
    """sizes r_c(x) [n, D] -> the ten largest channels, the largest first, a dict of strings for each.

    rms, ratio and share of the docstring at the top, each with its 95 % interval.
    """
    n = len(sizes)
    among = np.zeros(sizes.shape)  # 1 where a channel is among the ten largest of an image
    np.put_along_axis(among, np.argsort(-sizes, axis=1)[:, :LARGEST], 1, axis=1)

    def statistics(weights):
        """weights [draws, n] of the images, which sum to 1 -> rms, ratio and share, [3, draws, D]."""
        rms = weights @ sizes  # [draws, D]
        return np.stack([rms, rms / np.median(rms, axis=1, keepdims=True), weights @ among])

    values = statistics(np.full((1, n), 1 / n))[:, 0]  # [3, D]
    # A bootstrap draw takes n images with replacement. For means it only matters how often each is taken.
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    low, high = np.percentile(statistics(draws / n), (2.5, 97.5), axis=1)  # [3, D] each
    rows = []
    for channel in np.argsort(-values[0])[:LARGEST]:
        row = {"channel": str(channel)}
        for i, name in enumerate(("rms", "ratio", "share")):
            row[name] = f"{values[i, channel]:.6g}"
            row[f"{name}_low"], row[f"{name}_high"] = f"{low[i, channel]:.6g}", f"{high[i, channel]:.6g}"
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------
# The table and its figure.


def read_rows(path, settings):
    """Rows of the CSV so far, as dicts of strings. Raises InputError where they were measured with other
    files, images or n: a figure of both would compare what cannot be compared."""
    if not path.exists():
        return []
    with reading(path):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        columns = {"layer", "t", "seed", "channel"}
        columns |= {name + end for name in ("rms", "ratio", "share") for end in ("", "_low", "_high")}
        if any(None in row or None in row.values() or not columns <= row.keys() for row in rows):
            raise InputError("a row is longer or shorter than the first line, or a column is missing")
    for name, value in settings.items():
        for row in rows:  # an older CSV may lack a column
            if row.get(name) != value:
                raise InputError(f"{path}: has {name} {row.get(name)}, not {value}; choose another --out")
    return rows


def write_rows(path, rows):
    """Write all rows anew, under another name first: a kill leaves all rows of a setting, or none."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def draw_figure(path, rows):
    """A panel for each setting: its ten largest channels as multiples of the median channel, with intervals.
    A channel to silence stands out to the right, and 100 % is beside its number."""
    panels = {}  # title: rows, the largest channel first
    for row in rows:
        panels.setdefault(f"block {row['layer']}, t = {row['t']}, seed {row['seed']}", []).append(row)
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 3.5 * len(panels), 3.6), squeeze=False)
    for axis, (title, panel) in zip(axes[0], panels.items()):
        names = [f"{row['channel']} ({float(row['share']):.0%})" for row in panel]
        ratio, low, high = np.array([[float(row[name]) for row in panel]
                                     for name in ("ratio", "ratio_low", "ratio_high")])
        axis.barh(names, ratio, xerr=[ratio - low, high - ratio], ecolor="black", capsize=2)
        axis.axvline(1, color="grey", linestyle="--", linewidth=1)  # the median channel
        axis.set(title=title, xscale="log", xlabel="size / median channel's")
        axis.invert_yaxis()  # the largest on top
    axes[0, 0].set_ylabel("channel (share of images in which\nit is among the ten largest)")
    figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    path = Path(args.out) / "large_channels.csv"
    settings = {name: last_part(getattr(args, name)) for name in ("dit", "vae", "stats", "data_dir", "n")}
    settings |= {"norm": "rms over tokens", "labels": "none"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        rows = read_rows(path, settings)
        paths = choose_images(args.data_dir, args.n, args.seed)
        for layer, t in itertools.product(args.teacher_layer, args.teacher_t):
            setting = {"layer": str(layer), "t": f"{t:g}", "seed": str(args.seed)}
            if any(row.items() >= setting.items() for row in rows):
                continue
            # No channel is silenced, and the sizes of the networks are taken from the files.
            encoder = load_dit_encoder(args.dit, args.vae, args.stats, layer, (), None, None)
            encoder.to(args.device)
            found = compare_channels(measure(encoder, paths, t, args.seed, args.device))
            rows += [settings | setting | row for row in found]
            write_rows(path, rows)
            for row in found:
                print("channel {channel:>4}: {ratio} times the median channel ({ratio_low} to {ratio_high}), "
                      "share {share}".format(**row))
        # From the CSV's rows, those of earlier runs with other layers, times or seeds as well.
        with reading(path):
            draw_figure(path.with_suffix(".png"), rows)
    print(f"{path} and {path.with_suffix('.png')} hold {len(rows)} rows")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
