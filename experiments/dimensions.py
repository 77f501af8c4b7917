"""How many directions of feature space does a classifier use? Table 3 and Fig. 7 of arXiv 2602.19931.

    python experiments/dimensions.py --group AT=at.pt --group AT+DRA=dra.pt \
        --group DM-AT=dmat.pt --group DM-AT+DRA=dmat-dra.pt

Let f(x) in R^D be the penultimate feature of image x, which the head turns into logits, and V_k [D, k] the
first k principal components of n clean test images: the eigenvectors of sum (f - mean f)(f - mean f)', those
with the largest eigenvalues. Instead of f, the head gets its projection on these k directions:

    clean_k  = share of the images x with    argmax head(V_k V_k' f(x)) = label        k = 0, ..., D
    robust_k = share of the images x with    argmax head(V_k V_k' f(x')) = label       x': x attacked
    CLS-q            = the least k with clean_k >= q clean_D       (Feng et al. 2022, arXiv 2206.06072)
    robust dimension = the least k with the largest robust_k       (section 5.5)

The paper's Table 3 (CIFAR-10) is PAPER below. With DRA all three numbers rise (AT: 9, 14, 9; AT+DRA: 15, 42,
22). With synthetic images CLS-99 falls (DM-AT: 10, 11, 11). Fig. 7: clean_k rises and then stays; robust_k
rises and falls again, since the adversary pushes features along minor components, and leaving these out
undoes a part of its work. This is no defence. The adversary attacks the whole network and knows nothing of
the projection.

As in the code that Feng et al. released, the components are those of the images that are classified, and the
raw feature is projected. The mean feature, which is large behind a ReLU, thus loses what lies outside of the
k directions. --keep-mean projects f - mean f and adds the mean again. That gives other numbers: 8, 12 and 11
instead of 7, 13 and 4 for a small WRN-10-2 (two epochs of AT on 10,000 images, 1,000 test images, our run).

Where the curves are flat, few images decide the dimensions. So each has a 95 % interval: 1,000 bootstrap
draws of images, the components staying as they are. Beside the robust dimension stand, as "s.e.", the least
and the largest k whose robust_k is at most one standard error below the best one, that is sqrt(p (1 - p) / n)
with p = max robust_k. The bands around accuracies are the normal approximation of the binomial interval.

chosen (the paper does not say): which test images, --n of them drawn with --seed; the attack, 20 steps of PGD
of size eps / 4 on the cross-entropy from a random start, which is weaker than AutoAttack; k = 0, where all
features become 0 (or the mean), counts as a dimension.

Each checkpoint is a row of OUT/dimensions.csv, written when it is known, and OUT/dimensions.png shows all
rows. The same command again continues. clean_right and attacked_right are n clean_k and n robust_k for all k.
"""
import argparse
import codecs
import contextlib
import csv
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from eval_autoattack import BENCHMARKS, InputError, load_classifier, load_images
from train_cifar import DEVICE, count, fraction, generator, last_part, lock, pgd, whole, write_atomically

PAPER = {"AT": (9, 14, 9), "AT+DRA": (15, 42, 22), "DM-AT": (10, 11, 11), "DM-AT+DRA": (12, 15, 23)}
# Columns of the CSV: the three dimensions, the lower and the upper ends of their intervals.
NAMES = [name + end for end in ("", "_low", "_high") for name in ("cls_95", "cls_99", "robust")]
LINE = ("{method:16} CLS-95 {cls_95:>3} ({cls_95_low} to {cls_95_high})  CLS-99 {cls_99:>3} ({cls_99_low} to "
        "{cls_99_high})  robust {robust} ({robust_low} to {robust_high}; s.e. {robust_from} to {robust_to})")
BATCH = 250  # images attacked together


def method(text):
    """A type for argparse: NAME=a.pt,b.pt -> (NAME, [a.pt, b.pt]). argparse reports its ValueError."""
    name, paths = text.split("=", 1)
    return name, paths.split(",")


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", type=lambda path: (path, [path]), help="any that eval_autoattack.py takes")
    add("--group", type=method, action="append", default=[], metavar="NAME=A.pt,B.pt", help="one method")
    for flag in ("--arch", "--dataset", "--script"):
        add(flag, help="of all checkpoints, as in eval_autoattack.py; if not given, what the files say")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which of a checkpoint's two sets")
    add("--data-dir", default="data", help="as in eval_autoattack.py")
    add("--image-list", help="ImageNet: as in eval_autoattack.py")
    add("--n", type=count, default=1000, help="test images; more than the features have dimensions")
    add("--eps", type=fraction, help="of the attack, for pixels in [0, 1]; if not given, RobustBench's")
    add("--steps", type=count, default=20, help="of the attack")
    add("--seed", type=whole, default=0, help="of the choice of images and of the attack's start")
    add("--keep-mean", action="store_true", help="project f - mean f, and add the mean again")
    add("--device", choices=sorted({"cpu", DEVICE}), default=DEVICE, help="where to compute")
    add("--out", default="analysis", help="folder for dimensions.csv and dimensions.png")
    return parser.parse_args(argv)


def load_networks(args):
    """[(method, path, frozen classifier on the CPU)] of all checkpoints. One without a group is a method of
    its own. Raises InputError where they cannot be compared or there is none, and OSError."""
    nets = [(name, path, load_classifier(path, args.arch, args.dataset, args.script, args.weights))
            for name, paths in args.checkpoints + args.group for path in paths]
    data = {path: (m.info.dataset, m.info.num_classes, m.info.args.get("image_size")) for _, path, m in nets}
    if len(set(data.values())) != 1:
        raise InputError(f"expected checkpoints of the same data, classes and image size, got {data}")
    return nets


# ------------------------------------------------------------------------------------------------------------
# Measurement.


def choose_images(args, info):
    """--n test images, drawn without replacement: float32 [n, 3, H, W] in [0, 1], and labels int64 [n], on
    the CPU. info: a classifier's. Raises InputError and OSError."""
    source = argparse.Namespace(data_dir=args.data_dir, image_list=args.image_list, n=None)
    images, labels = load_images(source, info)
    if len(images) < args.n:
        raise InputError(f"{args.data_dir}: has {len(images)} test images, fewer than --n {args.n}")
    chosen = torch.randperm(len(images), generator=generator(args.seed, 0, "test images"))[:args.n]
    return images[chosen], labels[chosen]


def extract(model, images, labels, args):
    """images [n, 3, H, W] in [0, 1], labels [n] -> features, clean and attacked, float32 [2, n, D]."""
    features = []
    for i in tqdm(range(0, len(images), BATCH), desc=f"PGD-{args.steps}", unit="batch"):
        x, y = images[i:i + BATCH].to(args.device), labels[i:i + BATCH].to(args.device)
        uniform = torch.rand(x.shape, generator=generator(args.seed, i, "attack")).to(args.device)
        # A sum over the images, so that an image's gradient does not depend on the size of its batch.
        loss = lambda adv: F.cross_entropy(model(adv), y, reduction="sum")
        adv = pgd(loss, x, (x + args.eps * (2 * uniform - 1)).clamp(0, 1), args.eps, args.eps / 4, args.steps)
        features.append(torch.stack([model.features(x), model.features(adv)]))
    return torch.cat(features, dim=1)


def right_by_rank(head, features, labels, keep_mean=False):
    """Which images the head classifies rightly from k components, for k = 0, ..., D: bool [2, n, D + 1].

    features [2, n, D]: of clean and attacked images; head: features -> logits, frozen; labels [n]. f becomes
    o + V_k V_k' (f - o), where the origin o is 0, or the mean. Raises InputError where n images leave some of
    the D directions open.
    """
    clean = features[0].double()
    if len(clean) <= clean.shape[1]:
        raise InputError(f"--n {len(clean)}: expected more than {clean.shape[1]}, the features' dimensions")
    mean = clean.mean(dim=0)
    # eigh sorts by rising variance. [D, D], a component in each column
    components = torch.linalg.eigh((clean - mean).T @ (clean - mean)).eigenvectors.flip(1)
    origin = mean if keep_mean else torch.zeros_like(mean)
    coefficients = (features - origin) @ components  # [2, n, D], float64
    right = [head((origin + coefficients[..., :k] @ components[:, :k].T).float()).argmax(dim=2) == labels
             for k in range(len(mean) + 1)]
    return torch.stack(right, dim=2).cpu().numpy()


def dimensions(right):
    """Images classified rightly with k components, [2, ..., D + 1] -> CLS-95, CLS-99, robust, [..., 3]."""
    # argmax takes the first of equals. Without 1e-9, 19 right images could be less than 0.95 * 20.
    least = [(right[0] >= share * right[0][..., -1:] - 1e-9).argmax(axis=-1) for share in (0.95, 0.99)]
    return np.stack([*least, right[1].argmax(axis=-1)], axis=-1)


def summarise(right):
    """What `right_by_rank` gives, [2, n, D + 1] -> columns of a row of the CSV."""
    n, (clean, attacked) = right.shape[1], right.sum(axis=1)  # [D + 1] twice
    # A bootstrap draw takes n images with replacement. What counts is how often each is taken.
    taken = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)  # [draws, n]
    draws = dimensions(taken.astype(float) @ right)  # [draws, 3]
    ends = np.percentile(draws, (2.5, 97.5), axis=0, method="inverted_cdf").astype(int)  # two of the draws
    best = attacked.max()
    near = np.flatnonzero(attacked >= best - np.sqrt(best * (n - best) / n))
    row = dict(zip(NAMES, [*dimensions((clean, attacked)), *ends.ravel()]))
    row |= {"robust_from": near[0], "robust_to": near[-1]}
    return row | {"clean_right": " ".join(map(str, clean)), "attacked_right": " ".join(map(str, attacked))}


# ------------------------------------------------------------------------------------------------------------
# The table and its figure.


@contextlib.contextmanager
def reading(path):
    """Turn any error of the body, which works on what a table holds, into an InputError of one line."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # a damaged table can fail in any way
        raise InputError(f"{path}: damaged, or no table of this script: {ascii(error)[:200]}") from error


def read_rows(path, *columns):
    """Rows of a CSV so far, as dicts of strings; none without a file. Raises InputError where a row is longer
    or shorter than the first line, as after a kill, or where that lacks one of `columns`, and OSError."""
    with reading(path):
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values() or not set(columns) <= row.keys():
                raise ValueError(f"row {number} has other columns")
    return rows


def write_rows(path, rows):
    """Write all rows anew, under another name first: a kill leaves the old file or the new one."""
    table = [rows[0], *(row.values() for row in rows)]
    write_atomically(path, lambda file: csv.writer(codecs.getwriter("utf-8")(file)).writerows(table))


def show(path, rows):
    """Print the table, with the paper's rows beside ours, and draw Fig. 7 and Table 3.

    Third panel: a dot with its interval for each network; beside them a diamond for the mean over a method's
    networks, with their standard deviation; a cross for the paper.
    """
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    *axes, last = figure.subplots(1, 3)
    keys = list(dict.fromkeys((row["method"], row["seed"]) for row in rows))
    for i, (name, seed) in enumerate(keys):
        group = [row for row in rows if (row["method"], row["seed"]) == (name, seed)]
        table = np.array([[float(row[column]) for column in NAMES] for row in group])  # [networks, 9]
        places = np.arange(3) + 0.8 * i / len(keys) - 0.3
        for j, row in enumerate(group):
            print(LINE.format(**row), f"paper: {PAPER[name]}" if name in PAPER else "")
            for axis, kind in zip(axes, ("clean", "attacked")):
                percent = 100 * np.array(row[f"{kind}_right"].split(), float) / int(row["n"])
                half = 1.96 * np.sqrt(percent * (100 - percent) / int(row["n"]))
                axis.plot(percent, color=f"C{i}")
                axis.fill_between(range(len(half)), percent - half, percent + half, color=f"C{i}", alpha=0.2)
                axis.set(xscale="symlog", xlabel="principal components k", ylabel=f"{kind} accuracy [%]")
            last.vlines(places + 0.05 * j, table[j, 3:6], table[j, 6:], color=f"C{i}")
            last.plot(places + 0.05 * j, table[j, :3], f"C{i}o")
        mean, spread = table[:, :3].mean(axis=0), table[:, :3].std(axis=0, ddof=len(group) > 1)
        if len(group) > 1:
            print(f"{name}: mean of {len(group)} {mean.round(1)}, standard deviation {spread.round(1)}")
        last.errorbar(places - 0.05, mean, spread, fmt=f"C{i}D", capsize=4, label=f"{name}, seed {seed}")
        last.plot(places, PAPER.get(name, 3 * [np.nan]), "kx")
    figure.legend(loc="outside upper center", ncols=4)
    last.set(xticks=range(3), xticklabels=["CLS-95", "CLS-99", "robust"], yscale="symlog", ylim=(0, None),
             ylabel="dimension", xlabel="diamonds: mean, standard deviation; crosses: paper")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def main(argv=None):
    """The command line. Raises InputError and OSError."""
    args = parse_args(argv)
    # Full float32, and algorithms that give the same result twice.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    path = Path(args.out, "dimensions.csv")
    test = None
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        networks = load_networks(args)
        info = networks[0][2].info
        args.eps = BENCHMARKS[info.dataset].eps if args.eps is None else args.eps
        names = ("script", "weights", "data_dir", "image_list", "n", "eps", "steps", "keep_mean")
        settings = {name: last_part(getattr(args, name)) for name in names} | {"dataset": info.dataset}
        rows = read_rows(path, "method", "checkpoint", "seed", "step")
        for name, value in settings.items():  # these are the same in all rows
            if rows and rows[0].get(name) != value:
                raise InputError(f"{path}: has {name} {rows[0].get(name)}, not {value}; choose another --out")
        for name, file, model in networks:
            key = {"method": name, "checkpoint": file, "seed": str(args.seed)}
            about = {"arch": model.info.arch, "step": str(model.info.step), "attack": "PGD, eps / 4 a step"}
            # A file that has been trained further replaces its rows.
            rows = [row for row in rows if row["checkpoint"] != file or row["step"] == about["step"]]
            if not any(row.items() >= key.items() for row in rows):
                test = test or choose_images(args, info)
                features = extract(model.to(args.device), *test, args)
                right = right_by_rank(model.head, features, test[1].to(args.device), args.keep_mean)
                rows.append(key | about | settings | summarise(right))
                write_rows(path, rows)
        with reading(path):
            show(path.with_suffix(".png"), rows)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
