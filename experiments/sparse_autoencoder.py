"""Do features split into a few directions out of many? Fig. 6 of arXiv 2602.19931.

    python experiments/sparse_autoencoder.py --group AT=at.pt --group DM-AT=dmat.pt --group DM-AT+DRA=dra.pt \
        --data-dir imagenet

A network may pack more concepts into a feature than it has dimensions, along directions that are not
orthogonal (superposition; section 5.4). Adversaries may exploit that these interfere. A sparse autoencoder
looks for such directions: it rebuilds each feature x in R^D from k of L directions, with L > D (TopK, Gao et
al. 2025, arXiv 2406.04093).

    z  = ReLU(TopK(W_enc (x - b_pre) + b_enc))      all but the k largest of the L latents become 0
    x^ = W_dec z + b_pre                            e = x - x^
    |e|^2 + 1/32 |e - W_dec z_dead|^2               is minimised; z_dead: the D / 2 largest dead latents

W_enc starts as the transpose of W_dec, whose columns have length 1 at all times. A latent is dead when it has
not been active, i.e. not 0, for n features in a row. Nothing would bring it back but the second term, where e
counts as a constant: dead latents learn to explain what the others leave over.

    loss = sum |x - x^|^2 / sum |x - m|^2           over test images; 0 is perfect, 1 as good as the mean m

The paper finds that synthetic images and DRA lower the loss, on ImageNet at several k (Fig. 6; its text gives
no numbers). It concludes that the features are easier to disentangle.

Two things can make a loss low or high for another reason. Beside it stands the loss of the first k principal
components (PCA), which know no sparse directions: where the autoencoder is not clearly below, its loss speaks
of the features' rank. And directions whose latents are dead are lost. A fit in which more than 10 % of the
latents are active on none of the n fitted images is marked as NOT COMPARABLE. On a small CIFAR network k = 4
ended like that in our trials, with half of the latents dead, and k = 8 did not.

chosen (the paper does not say): k; L = 4 D; m and the components are those of the fitted images; x is divided
by its root mean square over images and dimensions; Adam, 5,000 steps of 512 features at a rate of 1e-3; which
n training images are fitted and which test images (n, or all if there are fewer) are judged. With the default
n, CIFAR's are all used. Intervals are 95 % bootstrap intervals over the test images, from 1,000 draws; the
autoencoder and the components stay as they are.

Each pair of a checkpoint and a k is a row of OUT/sparse_autoencoder.csv, written when it is known, and
OUT/sparse_autoencoder.png shows all rows. The same command again continues.
"""
import argparse
import functools
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from dimensions import read_rows, reading, write_rows
from eval_autoattack import InputError, load_classifier, load_images, read_imagenet
from train_cifar import DEVICE, count, generator, last_part, lock, whole, write_atomically

FREE = ("checkpoints", "group", "arch", "k", "seed", "device", "out")  # may differ between rows of a CSV
LINE = "{method:16} k {k:>2}: loss {loss} ({loss_low} to {loss_high}), PCA {pca}, dead {dead} {remark}"



def method(text):
    """A type for argparse: NAME=a.pt,b.pt -> (NAME, [a.pt, b.pt]). argparse reports its ValueError."""
    name, paths = text.split("=", 1)
    return name, paths.split(",")


def parse_args(argv=None):
    """Command line -> Namespace, chosen constants included. A flag that cannot be used ends the program with
    exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", type=lambda path: (path, [path]), help="any that eval_autoattack.py takes")
    add("--group", type=method, action="append", default=[], metavar="NAME=A.pt,B.pt", help="one method")
    for flag in ("--arch", "--dataset", "--script"):
        add(flag, help="of all checkpoints, as in eval_autoattack.py; if not given, what the files say")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which of a checkpoint's two sets")
    add("--data-dir", default="data", help="CIFAR: as in train_cifar.py; ImageNet: has train/ and val/ in it")
    add("--n", type=count, default=50_000, help="training images to fit, and at most so many test images")
    add("--k", type=count, nargs="+", default=[8, 16, 32, 64], help="latents that are active at a time")
    add("--expansion", type=count, default=4, help="latents for each dimension of the features, L / D")
    add("--steps", type=count, default=5000, help="of training, for each autoencoder")
    add("--seed", type=whole, default=0, help="of the autoencoders, and of which ImageNet images are used")
    add("--device", choices=sorted({"cpu", DEVICE}), default=DEVICE, help="where to compute")
    add("--out", default="analysis", help="folder for sparse_autoencoder.csv and .png")
    parser.set_defaults(batch=512, rate=1e-3, auxiliary=1 / 32)
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
# Features, the autoencoder, and how it is judged.


def extract(model, args):
    """Features of --n training images and of at most as many test images, minus the mean of the former and
    over their standard deviation, one for all dimensions: float32 [n, D], [m, D].

    These are CIFAR's first images. ImageNet's files, which are sorted by class, are drawn without replacement
    and read as they are needed. Raises InputError, OSError.
    """
    read = lambda path: read_imagenet(path, model.info.args.get("image_size", 224))
    found = []
    for split in ("train", "test"):
        data = TensorDataset(*load_images(args, model.info, split)) if model.info.dataset != "imagenet" else (
            ImageFolder(Path(args.data_dir, split.replace("test", "val")), loader=read))
        if len(data) < args.n and split == "train":
            raise InputError(f"{args.data_dir}: has {len(data)} training images, fewer than --n {args.n}")
        chosen = torch.randperm(len(data), generator=generator(args.seed, 0, f"{split} images"))[:args.n]
        batches = tqdm(DataLoader(Subset(data, chosen), args.batch), desc=f"{split} images", unit="batch")
        found.append(torch.cat([model.features(images.to(args.device)) for images, _ in batches]))
    return [(features - found[0].mean(dim=0)) / found[0].var(dim=0).mean().sqrt() for features in found]


def keep_largest(latents, k):
    """latents [B, L] -> ReLU(TopK(latents)): in each row, all but the k largest become 0."""
    values, index = latents.topk(k, dim=1)
    return torch.zeros_like(latents).scatter(1, index, values.relu())


def rebuild(x, k, decoder, encoder, latent_bias, bias):
    """x^, z and the latents before TopK, [B, D], [B, L] and [B, L], of features x [B, D].

    The parameters are W_dec' [L, D], W_enc [L, D], b_enc [L] and b_pre [D].
    """
    latents = (x - bias) @ encoder.T + latent_bias
    z = keep_largest(latents, k)
    return z @ decoder + bias, z, latents


def fit(features, k, args):
    """An autoencoder for features [n, D]: W_dec', W_enc, b_enc and b_pre for `rebuild`. It depends on --seed
    and k. Raises InputError for k that leaves nothing to learn."""
    n, width = features.shape
    if k >= min(n, width):
        raise InputError(f"--k {k}: expected less than {min(n, width)}, for {n} images with {width} features")
    random = generator(args.seed, k, "autoencoder")
    start = normalize(torch.randn(args.expansion * width, width, generator=random), dim=1)  # [L, D]
    sae = [part.to(features.device).requires_grad_()
           for part in (start, start.clone(), torch.zeros(len(start)), torch.zeros(width))]
    optimizer = torch.optim.Adam(sae, args.rate)
    silent = 0  # [L], for how many features each latent has not been active
    for _ in tqdm(range(args.steps), desc=f"k = {k}", unit="step"):
        x = features[torch.randint(n, (args.batch,), generator=random).to(features.device)]
        rebuilt, z, latents = rebuild(x, k, *sae)
        silent = (silent + args.batch) * (z == 0).all(dim=0)
        # TopK among the dead ones. Where there are too few, ReLU turns -inf into 0.
        z_dead = keep_largest(latents.masked_fill(silent < n, -torch.inf), width // 2)
        revival = ((x - rebuilt).detach() - z_dead @ sae[0]).square()
        optimizer.zero_grad()
        ((x - rebuilt).square() + args.auxiliary * revival).sum(dim=1).mean().backward()
        optimizer.step()
        sae[0].data = normalize(sae[0].data, dim=1)
    return [part.detach() for part in sae]


def judge(sae, k, train, test):
    """sae: fitted to train [n, D], whose mean is 0; test [m, D] -> columns of a row of the CSV."""
    components = torch.linalg.eigh((train.T @ train).double()).eigenvectors[:, -k:].float()  # [D, k]
    rebuilt = torch.cat([rebuild(x, k, *sae)[0] for x in test.split(500)])
    errors = [(test - x).square().sum(dim=1) for x in (rebuilt, test @ components @ components.T, 0)]
    errors = torch.stack(errors, dim=1).double().cpu().numpy()  # [m, 3]
    # A bootstrap draw takes m images with replacement. What counts is how often each is taken.
    taken = np.random.default_rng(0).multinomial(len(test), np.full(len(test), 1 / len(test)), size=1000)
    sums = np.vstack([np.ones(len(test)), taken]) @ errors  # over all images, then over each draw, [1001, 3]
    losses = sums[:, :2] / sums[:, 2:]
    row = {}
    for name, *values in zip(("loss", "pca"), losses[0], *np.percentile(losses[1:], (2.5, 97.5), axis=0)):
        row |= zip((name, f"{name}_low", f"{name}_high"), np.round(values, 5))
    active = torch.stack([(rebuild(x, k, *sae)[1] > 0).any(dim=0) for x in train.split(500)]).any(dim=0)
    row["dead"] = round(1 - active.double().mean().item(), 5)
    return row | {"remark": "NOT COMPARABLE" if row["dead"] > 0.1 else ""}


# ------------------------------------------------------------------------------------------------------------
# The table and its figure.


def show(path, rows):
    """Print the table and draw Fig. 6. A point is a network, or the mean over those of a method, with their
    standard deviation. Lines without caps are the networks' intervals."""
    axis = Figure(figsize=(8, 6), layout="constrained").subplots()
    for i, key in enumerate(dict.fromkeys("{method}, seed {seed}".format(**row) for row in rows)):
        group = [row for row in rows if "{method}, seed {seed}".format(**row) == key]
        print(*[LINE.format(**row) for row in group], sep="\n")
        for style, *names in (("o-", "loss", "loss_low", "loss_high"), ("x:", "pca", "pca_low", "pca_high")):
            points = []
            for k in dict.fromkeys(row["k"] for row in group):
                table = [[float(row[name]) for row in group if row["k"] == k] for name in names]
                axis.vlines(len(table[0]) * [int(k)], *table[1:], color=f"C{i}")
                points.append((int(k), np.mean(table[0]), np.std(table[0], ddof=len(table[0]) > 1)))
            axis.errorbar(*zip(*sorted(points)), fmt=f"C{i}{style}", capsize=4, label=f"{names[0]}, {key}")
            if len(table[0]) > 1:
                print(f"{key}, {names[0]} of {len(table[0])}: k, mean, s.d.", *np.round(points, 5).tolist())
        marked = [(int(row["k"]), float(row["loss"])) for row in group if row["remark"]]
        axis.plot(*zip(*marked, (np.nan, np.nan)), "ks", markersize=12, fillstyle="none")  # there may be none
    axis.set(ylim=(0, None), xlabel="latents or components, k", ylabel="loss (squares: over 10 % are dead)")
    axis.legend()
    write_atomically(path, lambda file: axis.figure.savefig(file, format="png", dpi=150))


def main(argv=None):
    """The command line. Raises InputError and OSError."""
    args = parse_args(argv)
    # Full float32, and algorithms that give the same result twice.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    nets = load_networks(args)
    args.dataset = nets[0][2].info.dataset
    settings = {name: last_part(value) for name, value in vars(args).items() if name not in FREE}
    features = functools.lru_cache(1)(lambda model: extract(model.to(args.device), args))
    path = Path(args.out, "sparse_autoencoder.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        rows = read_rows(path, "method", "checkpoint", "seed", "k", "step")
        # These are the same in all rows. The first that differs from now is named.
        for name in [name for name in settings if rows and rows[0].get(name) != settings[name]]:
            raise InputError(f"{path}: has {name} {rows[0].get(name)}, not {settings[name]}; use a new --out")
        for (name, file, model), k in itertools.product(nets, args.k):
            key = {"method": name, "checkpoint": file, "seed": str(args.seed), "k": str(k)}
            about = {"arch": model.info.arch, "step": str(model.info.step)}
            # A file that has been trained further replaces its rows.
            rows = [row for row in rows if row["checkpoint"] != file or row["step"] == about["step"]]
            if not any(row.items() >= key.items() for row in rows):
                sae = fit(features(model)[0], k, args)
                rows.append(key | about | settings | judge(sae, k, *features(model)))
                write_rows(path, rows)
        with reading(path):
            show(path.with_suffix(".png"), rows)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
