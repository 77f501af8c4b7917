"""What do a diffusion model's features know, and how robust is a linear probe of them?

Fig. 3b and appendix C of arXiv 2602.19931.

    python experiments/probe_teacher.py standard/best.pt at/best.pt --teacher UNCOND.pkl

The teacher's feature g(x, n) is that of train_cifar.py: sigma times the noise n is added to image x, and the
output of one block of the diffusion model's UNet is averaged over its positions. No label is given: it would
be the answer. (A class-conditional model may not know that case; Fig. 3b is of an unconditional one.) The
network stays as it is, and all that is learned is a linear probe of the features:

    logits = W z + b,  z = (g - mean) / deviation, dimension by dimension
    W, b   = argmin  mean of CE(W z + b, y) + decay / 2 |W|^2         multinomial logistic regression

Which block and which sigma? A little noise hides texture and keeps the object, much noise hides both, so one
sigma is best (section 3, after Xiang et al. 2023, arXiv 2303.09769). For each block and sigma:

    accuracy           of the probe on held-out training images
    shared (direction) = mean over pairs i, j of different held-out images of cos(g(x_i, n_i), g(x_j, n_j))

Where the shared direction is near 1, all images have nearly the same feature. Then a constant almost solves
the cosine loss of eq. (3), and raw features have little to teach.

The probe with the best accuracy in the table is then attacked on test images, by PGD (eq. 2) on the
cross-entropy, through probe and network. A network that adds noise is random, and looks more robust than it
is: an attack follows the gradient for one noise and is judged with another (Athalye et al. 2018, arXiv
1802.00420). So there are three attacks, which differ in the noise of their gradients alone. All are judged
with the same noise n_i:

    fixed         that of CE at n_i: the attack knows the noise, and the network is a plain function
    fresh, plain  that of CE at one new noise in each step
    fresh, mean   that of the mean of CE over --eot new noises in each step ("expectation over
                  transformations"). It points where x' is wrong for most noises.

The gap between the last two is false security. What the paper found (appendix C): an attention head on
diffusion features, published with 46.0 % under AutoAttack, keeps 17.3 % under the expectation. Fig. 3b, with
fixed noise, no numbers in the text: such features withstand small eps better than a standard network does,
but they need adversarial training to compete with robust ones.

chosen (the paper does not say): decay 0.001; the first 5,000 training images, of which the first fifth is
held out; one noise for each image in all blocks; the blocks at 8 x 8 and 16 x 16; four values of sigma; the
first --n test images; 20 steps of size eps / 4 from a uniform random start, for classifiers as well; float32.
PGD is weaker than AutoAttack: good for comparing these curves, too weak to quote.

Accuracies are in percent and have Wilson's 95 % interval; the shared direction has a 95 % bootstrap interval
over images, from 1,000 draws. Seeds of one method (of --group, or of --seed in several commands) are drawn
as their mean, with one standard deviation in place of the interval. Each row of OUT/probe_teacher.csv is
written when it is known. The same command again continues. OUT/probe_teacher.png shows all rows. A file
counts by its path as given: if training has gone on and written another best.pt, choose another --out.
"""
import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from dimensions import read_rows, reading, write_rows
from edm_encoder import load_edm_encoder
from eval_autoattack import InputError, load_classifier, load_images
from train_cifar import DATASETS, DEVICE, count, fraction, generator, last_part, lock, pgd, positive, whole

N_TRAIN, DECAY = 5000, 1e-3  # of the probe: training images, weight of its squared weights (chosen)
BATCH = 50  # images computed together
KEY = ("file", "seed", "judged_on", "method", "layer", "eps_255")  # columns that tell rows from each other
NAMES = ("accuracy", "accuracy_low", "accuracy_high", "shared", "shared_low", "shared_high")


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    cli = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = cli.add_argument
    add("checkpoints", nargs="*", help="classifiers to attack as well; any that eval_autoattack.py takes")
    add("--group", action="append", default=[], metavar="NAME=A.pt,B.pt", help="classifiers of one method")
    add("--teacher", required=True, help="EDM: NVIDIA's .pkl or train_edm.py's .pt, path or URL")
    add("--teacher-sigma", type=positive, nargs="+", default=[0.02, 0.06, 0.2, 0.5], help="noise levels")
    add("--teacher-layer", nargs="+", help="blocks; if not given, all at 8 x 8 and 16 x 16")
    add("--arch", help="of all classifiers; taken from a file if it says so")
    add("--dataset", choices=list(DATASETS), help="taken from the classifier if it says so, else cifar10")
    add("--script", help="whose build_model makes the classifiers; by default train_cifar.py")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which of a checkpoint's two sets")
    add("--data-dir", default="data", help="as in train_cifar.py")
    add("--n", type=count, default=1000, help="test images, the first ones")
    add("--eps", type=fraction, nargs="+", default=[k / 255 for k in (0, 1, 2, 3, 4, 6, 8)], help="as 8/255")
    add("--steps", type=count, default=20, help="of the attacks")
    add("--eot", type=count, default=8, help="noises for each gradient of the third attack")
    add("--seed", type=whole, default=0, help="of all noise and of the attacks' start")
    add("--device", choices=sorted({"cpu", DEVICE}), default=DEVICE, help="where to compute")
    add("--out", default="analysis", help="folder for probe_teacher.csv and probe_teacher.png")
    return cli.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# The probe, the attack, and the shared direction.


def fit_probe(layer, sigma, images, labels, args):
    """Fit the probe of a block to noisy training images [N, 3, 32, 32] in [0, 1] with labels [N], but for the
    first fifth, which is held out. Raises InputError, OSError for the teacher's file.

    Returns the probed teacher, a function from images and noise to logits; the features of the held-out
    images [H, D]; and which of these images the probe classifies rightly, bool [H].
    """
    encoder = load_edm_encoder(args.teacher, layer).to(args.device)
    noise = torch.randn(images.shape, generator=generator(args.seed, 0, "training noise")).to(images)
    pieces = [encoder(x, None, sigma, n) for x, n in zip(images.split(BATCH), noise.split(BATCH))]
    kept, features = torch.cat(pieces).tensor_split([len(images) // 5])
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)  # one may be constant
    weight = torch.zeros(encoder.width + 1, int(labels.max()) + 1).to(images).requires_grad_()
    probe = lambda x: F.pad((x - mean) / deviation, (0, 1), value=1) @ weight  # the last row is b

    def objective():  # it is convex, so the start does not matter
        weight.grad = None
        loss = F.cross_entropy(probe(features), labels[len(kept):]) + DECAY / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss
    torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe").step(objective)
    network = lambda images, noise: probe(encoder(images, None, sigma, noise))
    return network, kept, probe(kept).argmax(dim=1) == labels[:len(kept)]


def attack(network, x, y, eps, steps, noises, random):
    """Which images of a batch does a network still classify rightly under attack? bool [B].

    network(images, noise) -> logits. Images x [B, 3, H, W] in [0, 1], labels y [B]. noises: how many new ones
    are in each gradient; 0: the gradient is that at the noise with which x' is judged. random: a generator.
    """
    judged = torch.randn(x.shape, generator=random).to(x)  # the first draw, so the same in all attacks
    start = (x + eps * (2 * torch.rand(x.shape, generator=random).to(x) - 1)).clamp(0, 1)

    def loss(adv):
        drawn = [torch.randn(x.shape, generator=random).to(x) for _ in range(noises)] or [judged]
        # In float64: in float32 a very confident network has no gradient. A sum over images: the gradient
        # of one does not depend on the others.
        return sum(F.cross_entropy(network(adv, noise).double(), y, reduction="sum") for noise in drawn)
    adv = pgd(loss, x, start, eps, eps / 4, steps if eps else 0)
    return network(adv, judged).argmax(dim=1) == y


def shared_direction(features):
    """features [N, D] -> mean cosine of two images' features, and its 95 % bootstrap interval: [3]."""
    unit, n = F.normalize(features.double(), dim=1).cpu().numpy(), len(features)
    # How often a draw takes each image. Before the draws, each is taken once.
    taken = np.vstack([np.ones(n), np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)])
    # Over i != j, sum of w_i w_j cos_ij = |sum of w_i u_i|^2 - sum of w_i^2: an image and itself are no pair.
    cosines = (((taken @ unit) ** 2).sum(1) - (taken**2).sum(1)) / (n**2 - (taken**2).sum(1))
    return [cosines[0], *np.percentile(cosines[1:], (2.5, 97.5))]


# ------------------------------------------------------------------------------------------------------------
# The table and its figure.


def add_row(path, rows, key, settings, right, shared=()):
    """Add a row to the dict `rows`, and write them all to the CSV: the accuracy that `right`, bool [N], gives
    with Wilson's interval, and the shared direction with its own."""
    n, p, z = len(right), right.double().mean().item(), 1.96
    half = z * (p * (1 - p) / n + (z / n / 2) ** 2) ** 0.5
    found = [100 * p, *(100 * (p + z**2 / n / 2 + side) / (1 + z**2 / n) for side in (-half, half)), *shared]
    rows[key] = dict(zip(KEY, key)) | settings | dict(zip(NAMES, [f"{x:g}" for x in found] + 3 * [""]))
    write_rows(path, list(rows.values()))


def summarise(seeds):
    """[[value, low, high]] of several seeds -> their mean, and one standard deviation below and above it. Of
    a single one: as it is."""
    values = np.array(seeds)[:, 0]
    return seeds[0] if len(seeds) == 1 else values.mean() + values.std(ddof=1) * np.array([0, -1, 1])


def draw_figure(path, rows):
    """Block by block the accuracy of the probes and the shared direction; accuracy under attack. All values
    are printed as well: [value, low, high]."""
    figure = Figure(figsize=(18, 6), layout="constrained")
    panels = ("held-out", "accuracy"), ("held-out", "shared"), ("test", "accuracy")
    for axis, (images, y) in zip(figure.subplots(1, 3), panels):
        lines = {}
        for (*_, judged, method, layer, eps), row in sorted(rows.items(), key=lambda kv: float(kv[0][-1])):
            if judged == images:
                seeds = lines.setdefault(method, {}).setdefault(layer or float(eps), [])
                seeds.append([float(row[y + end]) for end in ("", "_low", "_high")])
        for method, line in lines.items():
            table = np.array([summarise(seeds) for seeds in line.values()])  # [places, 3]
            axis.errorbar(list(line), table[:, 0], abs(table[:, 1:] - table[:, :1]).T, fmt="o-", label=method)
            print(f"{y} ({images} images), {method}:", dict(zip(line, table.round(3).tolist())))
        axis.set(title=f"{images} images", xlabel="block" if images == "held-out" else "eps [1/255]",
                 ylabel="accuracy [%]" if y == "accuracy" else "shared direction (cosine)", ymargin=0.2)
        axis.tick_params("x", rotation=90 * (images == "held-out"))
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    # Full float32, and algorithms that give the same result twice.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    jobs = [(path, path, 0) for path in args.checkpoints]  # method, file, noises of a gradient
    jobs += [(arg.split("=")[0], path, 0) for arg in args.group for path in arg.split("=", 1)[-1].split(",")]
    networks, info = {}, argparse.Namespace(dataset=args.dataset or "cifar10", num_classes=np.inf, args={})
    for _, path, _ in jobs:
        model = load_classifier(path, args.arch, args.dataset, args.script, args.weights).to(args.device)
        data = model.info.dataset, model.info.num_classes
        if data[0] not in DATASETS or networks and data != (info.dataset, info.num_classes):
            raise InputError(f"{path}: was trained on {data}, expected 32 px, and the same for all files")
        networks[path], info = lambda images, noise, model=model: model(images), model.info
    source = argparse.Namespace(data_dir=args.data_dir, n=N_TRAIN)
    train = [part.to(args.device) for part in load_images(source, info, "train")]
    test = list(zip(*[part.to(args.device).split(BATCH) for part in load_images(args, info)]))
    if sum(len(y) for _, y in test) < args.n:
        raise InputError(f"--n {args.n}: {args.data_dir} has {sum(len(y) for _, y in test)} test images")
    unet = load_edm_encoder(args.teacher, "dec.32x32_aux_conv").model  # the last layer of an EDM for 32 px
    layers = [f"{p}.{n}" for p in ("enc", "dec") for n in getattr(unet, p) if n.startswith(("8x8", "16x16"))]
    path, seed = Path(args.out, "probe_teacher.csv"), str(args.seed)
    settings = {key: last_part(vars(args)[key]) for key in ("teacher", "weights", "data_dir", "n", "steps")}
    settings |= {"dataset": info.dataset, "n_fit": str(N_TRAIN), "decay": str(DECAY), "pgd": "uniform, eps/4"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        rows = read_rows(path, *KEY, "accuracy")
        for name, row in itertools.product(settings, rows):
            if row.get(name) != settings[name]:
                raise InputError(f"{path}: has {name} {row.get(name)}, not {settings[name]}; change --out")
        rows = {tuple(row[name] for name in KEY): row for row in rows}
        for layer, sigma in tqdm(list(itertools.product(args.teacher_layer or layers, args.teacher_sigma))):
            key = (args.teacher, seed, "held-out", f"sigma {sigma:g}", layer, "0")
            if key not in rows:
                _, features, right = fit_probe(layer, sigma, *train, args)
                add_row(path, rows, key, settings, right, shared_direction(features))
        cells = [row for key, row in rows.items() if key[:3] == (args.teacher, seed, "held-out")]
        with reading(path):
            best = max(cells, key=lambda row: float(row["accuracy"]))
            best_sigma = float(best["method"].removeprefix("sigma "))
        for noise, noises in (("fixed", 0), ("fresh, plain", 1), (f"fresh, mean of {args.eot}", args.eot)):
            jobs.append((f"{best['layer']}, {best['method']}, {noise}", args.teacher, noises))
        for (method, file, noises), eps in tqdm(list(itertools.product(jobs, args.eps))):
            key = (file, seed, "test", method, "", f"{255 * eps:g}")
            if key in rows:
                continue
            if file not in networks:
                networks[file] = fit_probe(best["layer"], best_sigma, *train, args)[0]
            right = [attack(networks[file], x, y, eps, args.steps, noises, generator(args.seed, i, "attack"))
                     for i, (x, y) in enumerate(test)]
            add_row(path, rows, key, settings, torch.cat(right))
        with reading(path):
            draw_figure(path.with_suffix(".png"), rows)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
