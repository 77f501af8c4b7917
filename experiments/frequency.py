"""Which spatial frequencies fool a network? Fig. 3a and 10 of arXiv 2602.19931.

    python experiments/frequency.py at/best.pt dra/best.pt noisy/best.pt

An image is a sum of waves: few waves per image are coarse shapes, many are fine texture. Standard training
gives networks that react to fine patterns, which nobody sees; adversarial training makes them rely on coarse
ones. So we look at the frequencies of two signals d [3, H, W] that belong to an image x:

    perturbation   d = x' - x, with x' from PGD (eq. 2) on the cross-entropy        (section 4.1, Fig. 3a)
    gradient       d = gradient of the cross-entropy with respect to the clean x    (appendix E, Fig. 10)

    A_r(d)     = mean of |DFT(d_c)(u, v)| over the channels c and over the frequencies (u, v) in ring r, those
                 with round(sqrt(u^2 + v^2)) = r. u and v are waves per image, downwards and to the right
    amplitude  = mean over images of A_r(d)
    difference = mean over images of A_r(d) - A_r(d of the first network), on the same images
    relative   = 100 times difference / amplitude of the first network       (in the figure, in percent)

Ring 0 is the mean colour. The last ring, half the image's side, has the finest waves that the pixels can show
along a row. The DFT is scaled to keep lengths (norm="ortho"). So A_r has the unit of d, and the mean of
|DFT(d)|^2 over all frequencies is the mean of d^2 over pixels (Parseval). PGD moves most pixels by eps, so
the perturbations of all networks are about equally long, and where one has more, it has less elsewhere: they
show which frequencies count. As steps of PGD are signs, they also hold odd multiples of these frequencies.
Gradients may have any length: they show how much each frequency counts.

What the paper found, in words and without numbers: the perturbations of a linear probe on a diffusion model
have less of the high frequencies than a standard network's, and resemble a robust network's (Fig. 3a).
Alignment with the diffusion model makes DM-AT less sensitive to low frequencies. Alignment with a classifier
of noisy images (ablate_teacher.py) makes it more sensitive to middle and high ones (Fig. 10). This script
compares classifiers; the probe is none of them.

chosen (the paper does not say): amplitudes and not powers; the mean over a ring and not the sum; no corners
of the spectrum, beyond the last ring; the orthonormal DFT; all images, whether classified rightly or not,
drawn with --seed from the test images; RobustBench's eps, 20 steps of eps / 4, a random start; softmax in
float64, as in float32 the gradient is rounded to 0 where the network is sure of the right class.

Intervals are 95 % bootstrap intervals over images, from 1,000 draws. Those of the difference are paired, as
both networks see the same images; for `relative`, the first network's amplitude is taken as exact. Of 17
rings about one misses its interval by chance: look for several neighbours. Several seeds of a method,
--group AT=a.pt,b.pt,c.pt, are drawn as their mean, with their standard deviation as error bar. Differences
are to the first network also then. Two methods differ by what is between their lines, the first method's own
line included.

Each network, signal and ring is a row of OUT/frequency.csv, and OUT/frequency.png shows them all. The same
command again continues. OUT/frequency.npy keeps A_r(d) of the first network, image by image, for that.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
import dimensions
from eval_autoattack import BENCHMARKS, InputError, load_classifier, load_images
from train_cifar import DEVICE, count, fraction, generator, last_part, lock, pgd, whole, write_atomically

SIGNALS = {"perturbation": "pixels in [0, 1]", "gradient": "nats per pixel in [0, 1]"}  # and their units
BATCH = 50  # images computed together; the result does not depend on it


def group(text):
    """A type for argparse: NAME=a.pt,b.pt -> [(NAME, a.pt), (NAME, b.pt)]."""
    name, paths = text.split("=", 1)  # a ValueError is an error of argparse
    return [(name, path) for path in paths.split(",")]


def parse_args(argv=None):
    """Command line -> Namespace, `files` being pairs (method, path). A flag that cannot be used ends the
    program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", help="any that eval_autoattack.py takes; differences are to the first")
    add("--group", type=group, action="extend", default=[], metavar="NAME=A,B", help="a method's seeds")
    add("--arch", help="of all checkpoints; taken from the file if it says so")
    add("--dataset", choices=list(BENCHMARKS), help="taken from the file if it says so")
    add("--script", help="whose build_model makes the networks; by default the training script of the data")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which of a checkpoint's two sets")
    add("--data-dir", default="data", help="as in eval_autoattack.py")
    add("--image-list", help="ImageNet: as in eval_autoattack.py")
    add("--n", type=count, default=1000, help="test images (chosen)")
    add("--eps", type=fraction, help="of the attack, for pixels in [0, 1]; if not given, RobustBench's")
    add("--steps", type=count, default=20, help="of the attack (chosen)")
    add("--seed", type=whole, default=0, help="of the choice of images and of the attack's start")
    add("--device", choices=sorted({"cpu", DEVICE}), default=DEVICE, help="where to compute")
    add("--out", default="analysis", help="folder for frequency.csv and frequency.png")
    args = parser.parse_args(argv)
    args.files = [(path, path) for path in args.checkpoints] + args.group
    if not args.files:
        parser.error("expected a checkpoint or --group")
    return args


# ------------------------------------------------------------------------------------------------------------
# What is compared, and on which images.


def load_networks(args):
    """{name: (method, frozen classifier on the CPU)}, in the order of the command line. The name says from
    which training step the file is, as a run may write best.pt again. Raises InputError, OSError."""
    networks, data = {}, set()
    for method, path in args.files:
        model = load_classifier(path, args.arch, args.dataset, args.script, args.weights)
        networks[f"{path}, step {model.info.step}"] = method, model
        data.add((model.info.dataset, model.info.num_classes, model.info.args.get("smoke") is True,
                  model.info.args.get("image_size", 224)))
        if len(data) > 1:
            raise InputError(f"{path}: was trained on other data or classes than {args.files[0][1]}")
    return networks


def choose_images(args, info):
    """--n test images, drawn without replacement: [n, 3, H, W] in [0, 1], labels [n], and uniform
    noise [n, 3, H, W] in [0, 1) for the attack's start, on args.device. Raises InputError, OSError."""
    images, labels = load_images(argparse.Namespace(**vars(args) | {"n": None}), info)
    if len(labels) < args.n:
        raise InputError(f"{args.data_dir}: has {len(labels)} test images, fewer than --n {args.n}")
    drawn = torch.randperm(len(labels), generator=generator(args.seed, 0, "test images"))[:args.n]
    noise = [torch.rand(images[0].shape, generator=generator(args.seed, i, "attack")) for i in range(args.n)]
    return [part.to(args.device) for part in (images[drawn], labels[drawn], torch.stack(noise))]


# ------------------------------------------------------------------------------------------------------------
# Measurement.


def ring_amplitudes(signals):
    """A_r(d) of the top: signals d [B, C, H, W] -> float64 [B, R], R = min(H, W) // 2 + 1.

    A wave of amplitude a has sqrt(H W) a / 2 at each of its two frequencies. White noise of standard
    deviation s has 0.89 s at all of them.
    """
    moduli = torch.fft.fft2(signals.double(), norm="ortho").abs().mean(dim=1)  # [B, H, W]
    v, u = [torch.fft.fftfreq(side, 1 / side, device=signals.device) for side in signals.shape[2:]]
    radius = (v[:, None] ** 2 + u**2).sqrt().round()  # [H, W], waves per image in any direction
    return torch.stack([moduli[:, radius == r].mean(dim=1) for r in range(min(radius.shape) // 2 + 1)], dim=1)


def measure(model, data, eps, steps, name):
    """A_r(d) of both signals for each image: float64 [n, 2, R], a numpy array. data: of
    `choose_images`, for all networks the same: they are attacked from the same points."""
    found = []
    for x, y, noise in tqdm(list(zip(*[part.split(BATCH) for part in data])), desc=name, unit="batch"):
        # A sum over images: its gradient is, image by image, that of each one's own loss.
        loss = lambda pixels: F.cross_entropy(model(pixels).double(), y, reduction="sum")
        start = (x + eps * (2 * noise - 1)).clamp(0, 1)
        perturbation = pgd(loss, x, start, eps, eps / 4, steps) - x
        signals = perturbation, torch.autograd.functional.jacobian(loss, x)
        found.append(torch.stack([ring_amplitudes(d) for d in signals], dim=1).cpu())
    return torch.cat(found).numpy()


def summarise(found, first):
    """A_r(d) of a network and of the first one, [n, 2, R] each -> rows of the CSV, a dict of strings for each
    signal and ring, with the three statistics of the top and their 95 % intervals."""
    n, columns = len(found), {}
    # A bootstrap draw takes n images with replacement. For means it only matters how often each is taken.
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)  # [draws, n]
    for name, values in (("amplitude", found), ("difference", found - first),
                         ("relative", 100 * (found - first) / (first.mean(axis=0) + 1e-99))):  # not by 0
        low, high = np.percentile(np.tensordot(draws / n, values, 1), (2.5, 97.5), axis=0)  # [2, R] each
        columns |= {name: values.mean(axis=0), f"{name}_low": low, f"{name}_high": high}
    return [{"signal": signal, "ring": r, **{name: f"{x[i, r]:.6g}" for name, x in columns.items()}}
            for i, signal in enumerate(SIGNALS) for r in range(found.shape[2])]


# ------------------------------------------------------------------------------------------------------------
# The table and its figure.


def read_rows(path, settings):
    """Rows of the CSV so far, as dicts of strings. Raises InputError where they have other settings: a figure
    of both would compare what cannot be compared."""
    rows = dimensions.read_rows(path, "method", "network", "signal", "ring")
    for name, value in settings.items():
        for row in rows:
            if row.get(name) != value:
                raise InputError(f"{path}: has {name} {row.get(name)}, not {value}; choose another --out")
    return rows


def curve(rows, method, signal, kind):
    """Mean over a method's networks, and where its error bars begin and end, [R] each: for one network the
    interval over images, for several one standard deviation over them. kind: a statistic of the top."""
    mine = [row for row in rows if (row["method"], row["signal"]) == (method, signal)]
    seeds = len({row["network"] for row in mine})
    value, low, high = [np.array([float(row[kind + end]) for row in mine]).reshape(seeds, -1)
                        for end in ("", "_low", "_high")]  # [seeds, R]
    if seeds == 1:
        return value[0], low[0], high[0]
    mean, spread = value.mean(axis=0), value.std(axis=0, ddof=1)
    return mean, mean - spread, mean + spread


def draw_figure(path, rows):
    """Amplitudes on the left, relative differences on the right. The lines are printed as mean +- half a bar:
    low and high frequencies differ so much in amplitude that one cannot see differences of both."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = [(signal, *panel) for signal, unit in SIGNALS.items() for panel in (
        ("amplitude", f"amplitude [{unit}]", "log"),
        ("relative", "difference [% of the first network's amplitude]", "linear"))]
    for axis, (signal, kind, label, scale) in zip(figure.subplots(2, 2).flat, panels):
        for method in dict.fromkeys(row["method"] for row in rows):
            mean, low, high = curve(rows, method, signal, kind)
            axis.errorbar(range(len(mean)), mean, (mean - low, high - mean), capsize=2, label=method)
            if high.any():  # not the difference of the first network to itself
                print(f"{signal} of {method}, {kind}:", *map("{:.3g}+-{:.1g}".format, mean, (high - low) / 2))
        axis.set(xlabel="waves per image", ylabel=label, title=signal, yscale=scale)
        axis.legend(fontsize=8)
    figure.suptitle("{n} images, PGD-{steps}, eps {eps}; differences to {first}".format(**rows[0]))
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def main(argv=None):
    """The command line. Raises InputError and OSError."""
    args = parse_args(argv)
    # Full float32, and algorithms that give the same result twice: differences between networks are small.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    networks = load_networks(args)
    first, (_, example) = next(iter(networks.items()))
    args.eps = BENCHMARKS[example.info.dataset].eps if args.eps is None else args.eps
    flags = ["n", "steps", "seed", "weights", "data_dir", "image_list"]
    settings = {name: last_part(getattr(args, name)) for name in flags}
    settings |= {"eps": f"{args.eps * 255:g}/255", "step_size": "eps / 4", "first": first}
    settings |= {"dataset": example.info.dataset, "script": example.info.script.name}
    path = Path(args.out, "frequency.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        rows = read_rows(path, settings)
        for row in rows:  # this command may group the networks in another way
            row["method"] = networks.get(row["network"], [row["method"]])[0]
        missing = [name for name in networks if name not in [row["network"] for row in rows]]
        data = choose_images(args, example.info) if missing else None
        for name in missing:
            found = measure(networks[name][1].to(args.device), data, args.eps, args.steps, name)
            if name == first:
                write_atomically(path.with_suffix(".npy"), lambda file: np.save(file, found))
            with dimensions.reading(path.with_suffix(".npy")):
                summary = summarise(found, np.load(path.with_suffix(".npy")))
            rows += [settings | {"method": networks[name][0], "network": name} | row for row in summary]
            dimensions.write_rows(path, rows)
        dimensions.write_rows(path, rows)
        with dimensions.reading(path):
            draw_figure(path.with_suffix(".png"), rows)
    print(f"{path} and {path.with_suffix('.png')} hold {len(rows)} rows")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
