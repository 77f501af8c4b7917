"""Are features stable under attack, different from image to image, and like those of a diffusion model?
Fig. 1, 4, 5 and 9 of arXiv 2602.19931.

    python experiments/features.py --group AT=at0/best.pt,at1/best.pt --group DRA=dra0/best.pt,dra1/best.pt \\
        --teacher EDM.pkl --reference standard/best.pt --n 250 500 1000

A feature f(x) is the penultimate one, of which the last linear layer makes the logits. For the diffusion
model (edm_encoder.py) it is the mean over positions at one block. With u = f / ||f||, an image x and its
attacked x', the measures are

    alignment   = mean over images of ||u(x) - u(x')||^2                 0 (stable) to 4
    uniformity  = log mean over pairs of images of exp(-t ||u(x) - u(y)||^2), t = 2
                  0 (all the same) to about -4 (as random directions)
    CKNNA       = A(K, L) / (sqrt(A(K, K) A(L, L)) + 1e-6)               about 0 (unrelated) to 1 (alike)
                  with A(K, L) = HSIC(M * K, M * L)

Alignment and uniformity are Wang & Isola's (2020, arXiv 2005.10242). Both are losses: lower is better. In the
original, x' is another crop of the image; the paper takes the attacked image (section 4.1). CKNNA is Huh et
al.'s (2024, arXiv 2405.07987): do two networks find the same images alike? K and L hold the cosines of all
pairs of images in the two networks. M_ij = 1 where j is among the k nearest neighbours of i in both. HSIC is
the unbiased estimate of Song et al. (2012, eq. 5). For the same two networks, CKNNA falls as k / n falls:
compare values of equal n and k only.

What the paper found, in words and without numbers: diffusion features are more stable than those of standard
training and more diverse; adversarial training gives stability and takes diversity (Fig. 4), of which DRA
gives some back (Fig. 5). RobustBench's more robust networks are more like the diffusion model (Fig. 1). If
that came from their better clean accuracy alone, they should also be more like a standard network, but this
trend is weaker (Fig. 9, --reference).

Each measure is given raw, which is the paper's definition, and centred, u = (f - m) / ||f - m|| with the mean
clean feature m: a part that all features share makes them look alike and stable, whatever the rest does.

chosen (the paper does not say): n = 1,000 test images, drawn with --seed; k = 10; t = 2, Wang & Isola's; PGD
on the cross-entropy with RobustBench's eps, 20 steps of eps / 4, a random start. The diffusion model: sigma
0.06, dec.8x8_in1, no labels (they would give the class away), and one noise image for all images, so that it
is a plain function of x. It is attacked through a linear probe of 5,000 training images.

Intervals (95 %, chosen): a bootstrap draws images twice. Such an image has itself for a neighbour, and makes
a pair at distance 0, so both uniformity and CKNNA would be wrong. Instead the images are split into halves,
500 times at random. The halves are independent samples, and d = (value of one - value of the other) / 2
varies as much as a mean over all n images does. Where a value is made of pairs, d varies more, as the
variance of a U-statistic falls at least as 1 / n. In a half, k / 2 neighbours reach as far as k do in all.
The interval is the value -+ the 95th percentile of |d|. It errs on the wide side: in simulations, by up to
1.1 times for uniformity and 1.2 to 1.8 times for CKNNA. For an accuracy it is that of a binomial (normal
approximation).

Each network, seed and n is a row of OUT/features.csv; OUT/features.png shows all rows. The same command again
continues: what is in the CSV stays. Another command may add other networks to it. A network that is built in
another way than the rest is given as FILE@ARCH@SCRIPT, in place of --arch and --script:
Standard.pt@wrn-28-10@experiments/robustbench_models.py.
"""
import argparse
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from dimensions import read_rows, reading, write_rows
from edm_encoder import load_edm_encoder
from eval_autoattack import BENCHMARKS, InputError, load_classifier, load_images
from train_cifar import DEVICE, count, fraction, generator, last_part, lock, pgd, positive, whole

FREE = ("checkpoints", "group", "arch", "script", "n", "seed", "device", "out")  # may differ between rows
PANELS = [("alignment", "uniformity"), ("robust_accuracy", "cknna_teacher"),  # across, upwards
          ("robust_accuracy", "cknna_reference"), ("clean_accuracy", "robust_accuracy"),
          ("alignment_centred", "uniformity_centred"), ("robust_accuracy", "cknna_teacher_centred"),
          ("robust_accuracy", "cknna_reference_centred"), ("n", "cknna_teacher")]


def parse_args(argv=None):
    """Command line -> Namespace, the chosen constants included. A flag that cannot be used ends the program
    with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # Both become pairs of a method and its files, such as its seeds. A single file is a method of its own.
    add("checkpoints", nargs="*", type=lambda file: (file, file), help="FILE, or FILE@ARCH@SCRIPT")
    add("--group", action="append", default=[], type=lambda x: x.partition("=")[::2], help="METHOD=FILE,FILE")
    for flag in ("--arch", "--dataset", "--script", "--data-dir", "--image-list"):
        add(flag, help="as in eval_autoattack.py")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which of a checkpoint's two sets")
    add("--teacher", nargs=1, default=[], help="EDM to compare with, NVIDIA's .pkl or train_edm.py's .pt")
    add("--teacher-sigma", type=positive, default=0.06, help="its noise level, images in [-1, 1] (chosen)")
    add("--teacher-layer", default="dec.8x8_in1", help="block whose output is its feature (chosen)")
    add("--reference", nargs=1, default=[], help="checkpoint to compare with (Fig. 9: of standard training)")
    add("--n", type=count, nargs="+", default=[1000], help="test images; a row for each value (chosen)")
    add("--k", type=count, default=10, help="nearest neighbours in CKNNA (Huh et al.'s)")
    add("--eps", type=fraction, help="of the attack, for pixels in [0, 1]; if not given, RobustBench's")
    add("--steps", type=count, default=20, help="of the attack (chosen)")
    add("--seed", type=whole, default=0, help="of the choice of images, attack, noise and splits")
    add("--device", choices=sorted({"cpu", DEVICE}), default=DEVICE, help="where to compute")
    add("--out", default="analysis", help="folder for features.csv and features.png")
    parser.set_defaults(data_dir="data", step_size="0.25 eps", t=2, splits=500, probe_images=5000)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# Networks. Each has `features`, images [B, 3, H, W] in [0, 1] -> [B, D], and `head`, features -> logits.


def load_networks(args):
    """All classifiers, the reference first: {name: frozen network on args.device}, {name: columns of its
    rows}, and the `info` of one. Raises InputError for files that cannot be used or compared, and OSError."""
    nets, about, data = {}, {}, {}
    for method, files in [*zip(args.reference, args.reference), *args.checkpoints, *args.group]:
        for name in files.split(","):
            path, arch, script, *_ = name.split("@") + [args.arch, args.script]
            nets[name] = net = load_classifier(path, arch, args.dataset, script, args.weights).to(args.device)
            about[name] = {"checkpoint": name, "step": str(net.info.step), "method": method}
            data[name] = net.info.dataset, net.info.num_classes, net.info.args.get("image_size")
    if len(set(data.values())) != 1:
        raise InputError(f"expected checkpoints of the same data, classes and image size, got {data}")
    return nets, about, net.info


def load_teacher(args, info):
    """The diffusion model as a network; its head is the linear probe. Raises InputError where it does not fit
    or lacks the layer, and OSError."""
    encoder = load_edm_encoder(args.teacher[0], args.teacher_layer).to(args.device)
    if encoder.img_resolution != 32 or info.dataset == "imagenet":
        raise InputError(f"{args.teacher[0]}: is for {encoder.img_resolution} px, not for {info.dataset}")
    noise = torch.randn((1, 3, 32, 32), generator=generator(args.seed, 0, "teacher noise")).to(args.device)
    features = lambda x: encoder(x, None, args.teacher_sigma, noise.expand_as(x)).double()
    images, labels = load_images(argparse.Namespace(**vars(args) | {"n": args.probe_images}), info, "train")
    fit = torch.cat([features(x.to(args.device)) for x in images.split(100)])
    weights = torch.linalg.pinv(fit) @ F.one_hot(labels, info.num_classes).to(fit)  # [D, K]
    # Least squares aims at 0 and 1, and with such logits softmax is sure of nothing: ten times as much.
    return argparse.Namespace(features=features, head=lambda f: 10 * f @ weights)


def extract(network, args, info):
    """What is measured, float64 on args.device: {"clean" and "attacked": features [n, D]; "right": [n, 2], 1
    where a clean and where an attacked image is classified rightly}, for the largest n. A smaller n takes the
    first rows. All networks see the same images and starts. Raises InputError, OSError."""
    images, labels = load_images(argparse.Namespace(**vars(args) | {"n": None}), info)
    if not max(args.k, 7) < min(args.n) <= max(args.n) <= len(labels):  # each half needs four images
        raise InputError(f"--n {args.n}: expected 8 to {len(labels)}, all test images, and more than --k")
    drawn = torch.randperm(len(labels), generator=generator(args.seed, 0, "test images"))[:max(args.n)]
    found = []
    for i, index in enumerate(tqdm(drawn.split(100), desc=f"PGD-{args.steps}", unit="batch")):
        x, y = images[index].to(args.device), labels[index].to(args.device)
        noise = torch.rand(x.shape, generator=generator(args.seed, i, "attack")).to(args.device)
        # The softmax is in float64: in float32 the probability of a class rounds to 1 in a sure network,
        # and its logit would get no gradient. The loss is a sum over images: so the gradient is, image by
        # image, that of each one's own loss.
        loss = lambda adv: F.cross_entropy(network.head(network.features(adv)).double(), y, reduction="sum")
        adv = pgd(loss, x, (x + args.eps * (2 * noise - 1)).clamp(0, 1), args.eps, args.eps / 4, args.steps)
        features = network.features(x), network.features(adv)
        found.append((*features, torch.stack([network.head(f).argmax(dim=1) == y for f in features], dim=1)))
    return dict(zip(("clean", "attacked", "right"), [torch.cat(parts).double() for parts in zip(*found)]))


# ------------------------------------------------------------------------------------------------------------
# The measures, for any number of sets of images at once: [..., N, N] or [..., N, D] -> [...], in float64.


def hsic(K, L):
    """Unbiased Hilbert-Schmidt criterion (Song et al. 2012, eq. 5) of K, L [..., N, N] with zero diagonals:
    (tr KL + 1'K1 1'L1 / ((N - 1)(N - 2)) - 2 / (N - 2) 1'KL1) / (N (N - 3))."""
    n, total = K.shape[-1], lambda X: X.sum(dim=(-2, -1))
    both = total(K * L.mT) + total(K) * total(L) / ((n - 1) * (n - 2))
    return (both - 2 / (n - 2) * (K.sum(dim=-2) * L.sum(dim=-1)).sum(dim=-1)) / (n * (n - 3))


def cknna(K, L, k):
    """CKNNA of two networks, from the cosines K, L [..., N, N] of their features for the same images; k < N.
    The diagonals have to be below all cosines, as no image is its own neighbour."""
    near_K, near_L = [X >= X.topk(k, dim=-1).values[..., -1:] for X in (K, L)]
    K, L = near_K * K, near_L * L
    return hsic(near_L * K, near_K * L) / ((hsic(K, K) * hsic(L, L)).sqrt() + 1e-6)


def statistics(found, k):
    """All measures of a network, {column: [...]}. found: as `extract` returns it, and besides "cknna_teacher"
    and "cknna_reference", the clean features of these two, where there are any."""
    found, n = dict(found), found["right"].shape[-2]
    values = dict(zip(("clean_accuracy", "robust_accuracy"), found.pop("right").mean(-2).mul(100).unbind(-1)))
    for suffix in ("", "_centred"):
        u = {name: F.normalize(x, dim=-1) for name, x in found.items()}
        # Cosines [..., N, N]. An image with itself is no pair and no neighbour: far down, it counts nowhere.
        K = {name: x @ x.mT - 1000 * torch.eye(n, device=x.device) for name, x in u.items()}
        values["alignment" + suffix] = (u["clean"] - u["attacked"]).square().sum(dim=-1).mean(dim=-1)
        # t ||u(x) - u(y)||^2 = 2 (2 - 2 K_xy)
        values["uniformity" + suffix] = ((4 * K["clean"] - 4).exp().sum(dim=(-2, -1)) / (n * (n - 1))).log()
        values |= {name + suffix: cknna(K["clean"], K[name], k) for name in K if name.startswith("cknna")}
        # Now centred. The mean is that of clean images for attacked ones, too: it should not follow x'.
        found = {c: x - found[c.replace("attacked", "clean")].mean(-2, True) for c, x in found.items()}
    return values


def summarise(found, k, splits, seed):
    """Columns of a row of the CSV, as strings: each measure of `statistics`, with its interval."""
    values, gaps, n = statistics(found, k), [], len(found["right"])
    for i in tqdm(range(splits // 10), desc=f"intervals, n = {n}", leave=False):
        order = torch.rand(10, n, generator=generator(seed, i, "splits")).argsort(dim=1)
        one, other = [statistics({name: x[half] for name, x in found.items()}, max(1, k * (n // 2) // n))
                      for half in order.split(n // 2, dim=1)[:2]]
        gaps.append(torch.stack([(one[name] - other[name]).abs() / 2 for name in values]))
    margins = dict(zip(values, torch.cat(gaps, dim=1).quantile(0.95, dim=1)))
    return {name + end: f"{values[name] + sign * margins[name]:.6g}"
            for name in values for end, sign in (("", 0), ("_low", -1), ("_high", 1))}


# ------------------------------------------------------------------------------------------------------------
# The figure and the run.


def draw_figure(path, rows):
    """Fig. 4 and 5, 1 and 9, raw above and centred below; accuracies; CKNNA against n. A circle is a network.
    A diamond is the mean over a group, with the standard deviation over its networks; it is printed, too."""
    figure = Figure(figsize=(19, 9), layout="constrained")
    names = ["{method}, n = {n}, seed {seed}".format(**row) for row in rows]
    for axis, (x, y) in zip(figure.subplots(2, 4).flat, PANELS):
        table = torch.tensor([[float(r.get(c, "nan")) for c in (x, x + "_low", y, y + "_low")] for r in rows])
        for i, name in enumerate(dict.fromkeys(names)):
            left, left_low, up, up_low = table[[other == name for other in names]].T
            axis.errorbar(left, up, up - up_low, left - left_low, fmt=f"C{i}o", capsize=2, label=name)
            if len(up) > 1 and up.isfinite().all():
                axis.errorbar(left.mean(), up.mean(), up.std(), left.std(), fmt=f"C{i}D", capsize=4)
                print(f"{name}, mean of {len(up)} +- deviation: {x} {left.mean():.4g} +- {left.std():.2g},",
                      f"{y} {up.mean():.4g} +- {up.std():.2g}")
        axis.set(xlabel=x.replace("accuracy", "accuracy [%]"), ylabel=y.replace("accuracy", "accuracy [%]"))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, title="bars: 95 %")
    figure.savefig(path, dpi=110)


def main(argv=None):
    """The command line. Raises InputError and OSError."""
    args = parse_args(argv)
    # Full float32, and algorithms that give the same result twice: differences between networks are small.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    networks, about, info = load_networks(args)
    about |= {path: {"checkpoint": path, "step": "", "method": path} for path in args.teacher}
    args.dataset, args.eps = info.dataset, BENCHMARKS[info.dataset].eps if args.eps is None else args.eps
    settings = {name: last_part(value) or "None" for name, value in vars(args).items() if name not in FREE}
    keys = [row | {"seed": str(args.seed), "n": str(n)} for row in about.values() for n in args.n]
    # Each network is attacked once, if a row is missing that needs it.
    cached = functools.cache(lambda x: extract(networks.get(x) or load_teacher(args, info), args, info))
    path = Path(args.out, "features.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        rows = read_rows(path, "method", "checkpoint", "seed", "n")
        for name in [name for row in rows for name in settings if row.get(name) != settings[name]]:
            raise InputError(f"{path}: has {name} {rows[0].get(name)}, not {settings[name]}; change --out")
        for key in [key for key in keys if not any(row.items() >= key.items() for row in rows)]:
            # The likeness of a network with itself would say nothing: nan.
            found = {f"cknna_{name}": cached(file)["clean"] * (1 if file != key["checkpoint"] else torch.nan)
                     for name in ("teacher", "reference") for file in vars(args)[name]}
            found = {name: x[:int(key["n"])] for name, x in (cached(key["checkpoint"]) | found).items()}
            rows.append(settings | key | summarise(found, args.k, args.splits, args.seed))
            write_rows(path, rows)
            print(*(f"{name} {value}" for name, value in rows[-1].items() if name not in settings))
        with reading(path):  # of a file that has been trained further, only its last state
            rows = [row for row in rows if row.items() >= about.get(row["checkpoint"], {}).items()]
            draw_figure(path.with_suffix(".png"), rows)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
