"""What the features of robust classifiers look like, and those of their diffusion teacher: the analyses of arXiv 2602.19931.

    python analyze_representations.py uniformity at/best.pt dra/best.pt --teacher EDM.pkl   # Fig. 4, 5: robust and diverse?
    python analyze_representations.py cknna at/best.pt dra/best.pt --teacher EDM.pkl        # Fig. 1, 9: how alike to the teacher's?
    python analyze_representations.py spectrum at/best.pt dra/best.pt --teacher EDM.pkl     # Fig. 3a, 10: which frequencies fool it?
    python analyze_representations.py probe at/best.pt dra/best.pt --teacher EDM.pkl        # Fig. 3b: which noise level and block?
    python analyze_representations.py sae at/best.pt dra/best.pt                            # Fig. 6: easy to disentangle?
    python analyze_representations.py dims at/best.pt dra/best.pt                           # Fig. 7, Table 3: how many dimensions?
    python analyze_representations.py curves runs/at runs/dra                               # from the log.csv of training runs

Each writes its settings, tables and a figure to --out (COMMAND.json, .csv, .png) and overwrites nothing; after an interruption the same
command starts again. Checkpoints are all that eval_autoattack.py takes: ours, DM-AT's, RobustBench's; EDM.pkl is the teacher of
train_cifar.py. Networks are in evaluation mode and float32, and every draw depends on --seed and --batch-size alone. "Robust" here is
accuracy under a plain PGD on the cross-entropy, made to compare networks: quote AutoAttack, not this.

Where the teacher stands beside classifiers it is made one: features under ONE fixed noise image and without labels, a linear probe on
top, attacked end to end (as in Fig. 3b; with noise drawn anew an attack would seem to fail, and a label would be the answer).
The first half of this file is the metrics, one function each, with formula and source; the second half is the commands.
"""
import argparse
import csv
import io
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from torch import nn
from tqdm import tqdm

from edm_encoder import load_edm_encoder
from eval_autoattack import BENCHMARKS, InputError, fraction, load_classifier, load_images
from train_cifar import HOLDOUT, generator, number, one_line, pgd

plt.switch_backend("agg")  # files only: works without a display

# ---------------------------------------------------------------------------------------------------------------------
# Settings. "chosen": by us; the paper's text leaves them open.

OUTPUTS = {  # command: what it writes, below --out; the figure comes last
    "uniformity": ["uniformity.json", "uniformity.csv", "uniformity.png"],
    "cknna": ["cknna.json", "cknna.csv", "cknna.png"],
    "spectrum": ["spectrum.json", "spectrum.csv", "spectrum_map.csv", "spectrum.png"],
    "probe": ["probe.json", "probe.csv", "probe_eps.csv", "probe.png"],
    "sae": ["sae.json", "sae.csv", "sae.png"],
    "dims": ["dims.json", "dims.csv", "dims_accuracy.csv", "dims.png"],
    "curves": ["curves.json", "curves.csv", "curves.png"],
}
ATTACKING = ("uniformity", "cknna", "spectrum", "probe", "dims")
ASKING = ("uniformity", "cknna", "spectrum", "probe")  # the teacher
FITTING = {"uniformity": 5000, "spectrum": 5000, "probe": 5000, "sae": 50_000, "dims": 5000}  # training images, for linear probe, autoencoder or PCA
PROBE_DECAY = 1e-3  # weight of the linear probe's squared weights, on standardised features (chosen)
PROBE_ITERATIONS = 300  # of L-BFGS, at most; the problem is convex
EPS_POINTS = 8  # attacks between 0 and --eps in `probe`
SAE_BATCH, SAE_RATE = 512, 1e-3  # images per step and Adam's learning rate (chosen)


class Parser(argparse.ArgumentParser):
    """One line and exit code 2 for a wrong flag, without the usage text."""

    def error(self, message):
        """Raise InputError."""
        raise InputError(message)


def parse_args(argv=None):
    """Command line -> Namespace. Raises InputError for a flag that is unknown or out of range."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    count, several, positive = number(int, at_least=1, below=1e9), number(int, at_least=10, below=1e9), number(above=0, below=1e6)
    for command, files in OUTPUTS.items():
        own = commands.add_parser(command, help=f"writes {', '.join(files)}", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
        add = own.add_argument
        add("--out", default="analysis", help="folder for the results; nothing in it is overwritten")
        add("--names", nargs="+", help="one for each checkpoint or run, for tables and legends (default: its folder and file)")
        if command == "curves":
            add("runs", nargs="+", help="folders of training runs, or their log.csv files")
            continue
        add("checkpoints", nargs="*" if command in ("uniformity", "spectrum", "probe") else "+", help="of train_cifar.py, train_imagenet.py, DM-AT or RobustBench")
        add("--arch", nargs="+", help="as in the training script, one for all or one each; taken from the checkpoint if it says so")
        add("--dataset", choices=list(BENCHMARKS), help="taken from the checkpoints if they say so (cifar10 where there is none)")
        add("--script", help="a modified copy of a training script, whose build_model makes the networks")
        add("--weights", choices=["averaged", "raw"], default="averaged", help="which of the two that a checkpoint holds")
        add("--data-dir", default="data", help="as in eval_autoattack.py")
        add("--image-list", help="ImageNet: as in eval_autoattack.py; images to fit on are taken from the same list")
        add("--n", type=several, default=1000, help="test images (the first ones; all if there are fewer)")
        add("--batch-size", type=count, default=250, help="images computed together")
        add("--seed", type=number(int, at_least=0, below=2**63), default=0, help="of every random draw")
        add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
        if command in ATTACKING:
            add("--eps", type=number(above=0, below=1), help="largest change of a pixel in [0,1] (default: RobustBench's, 8/255 and for ImageNet 4/255)")
            add("--steps", type=count, default=20, help="of the PGD attack, each of eps / 4")
        if command in ASKING:
            add("--teacher", required=command in ("cknna", "probe"), help="EDM .pkl, path or URL")
            add("--teacher-sigma", type=positive, default=0.06, help="its noise level, images in [-1,1] (in `probe`: for the accuracy against eps)")
            add("--teacher-layer", default="dec.8x8_in1", help="block whose output, averaged over positions, is the feature")
        if command in FITTING:
            add("--n-train", type=several, default=FITTING[command], help="training images for what is fitted: linear probe, autoencoder, principal components")
        if command == "cknna":
            add("--k", type=count, default=10, help="nearest neighbours (10: Huh et al.)")
        if command == "probe":
            add("--sigmas", type=positive, nargs="+", default=[0.02, 0.06, 0.2, 0.5], help="noise levels of the grid")
            add("--layers", nargs="+", help="blocks of the grid (default: the last at each resolution, and the bottleneck)")
        if command == "sae":
            add("--ks", type=count, nargs="+", default=[4, 8, 16, 32], help="active latents per image")
            add("--expansion", type=count, default=8, help="latents per feature dimension")
            add("--sae-steps", type=count, default=2000, help="training steps")
    args = parser.parse_args(argv)
    if args.command != "curves" and args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu")
    paths = args.runs if args.command == "curves" else args.checkpoints
    if not paths and not args.teacher:
        raise InputError(f"{args.command}: expected a checkpoint, --teacher FILE, or both")
    if args.command in ("uniformity", "spectrum") and not args.teacher:
        args.n_train = 0  # only its probe is fitted
    for name in {"ks", "sigmas"} & vars(args).keys():
        setattr(args, name, sorted(set(getattr(args, name))))
    args.names = choose_names(args, paths)
    return args


def choose_names(args, paths):
    """A different name for each path: --names, else folder/file of a checkpoint, or the folder of a run. Raises InputError where they do not fit."""
    if args.names and len(args.names) != len(paths):
        raise InputError(f"--names: gives {len(args.names)} names, expected {len(paths)}")
    resolved = [Path(path.removesuffix("log.csv")).resolve() for path in paths]
    names = args.names or [path.name if args.command == "curves" else f"{path.parent.name}/{path.stem}" for path in resolved]
    if len(set(names)) < len(names):
        raise InputError(f"--names {' '.join(names)}: expected a different name for each, to tell them apart")
    if any("$" in name for name in names):
        raise InputError(f"--names {' '.join(names)}: expected names without $, which begins a formula in figures")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def alignment(features, positives):
    """How far the adversary moves a feature: mean ||f(x) - f(x')||^2 (Wang & Isola 2020, arXiv 2005.10242; lower is better).

    features, positives [N, D], scaled to unit length here; row i of both belongs to image i. Returns a float, 0 to 4.
    """
    return (unit(features) - unit(positives)).square().sum(dim=1).mean().item()


def uniformity(features):
    """How evenly features fill the sphere: log mean over pairs i < j of exp(-2 ||f_i - f_j||^2) (Wang & Isola 2020; lower is better).

    features [N, D], N at least 2, scaled to unit length here. Returns a float: 0 where all are the same, about -4 for uniform points in many
    dimensions.
    """
    return torch.pdist(unit(features)).square().mul(-2).exp().mean().log().item()


def unit(features):
    """Rows of [N, D] scaled to length 1, in float64: differences of nearly equal rows are what counts."""
    return F.normalize(features.double(), dim=1)


def cknna(a, b, k=10):
    """CKNNA (Huh et al. 2024, arXiv 2405.07987): do two networks agree on which images are alike?

    K, L: Gram matrices of the unit-length features; M[i, j] = 1 where j is among the k nearest neighbours of i in both K and L;
    alignment(K, L) = HSIC(M * K, M * L), unbiased; CKNNA = alignment(K, L) / (sqrt(alignment(K, K) alignment(L, L)) + 1e-6).
    a [N, D1], b [N, D2]: features of the same images, k < N. Returns a float, 1 where both agree, about 0 for unrelated features.
    """
    def nearest(gram):
        masked = gram.clone().fill_diagonal_(-math.inf)
        return torch.zeros_like(gram).scatter_(1, masked.topk(k, dim=1).indices, 1.0)

    def agreement(first, second):
        mask = nearest(first) * nearest(second)
        return unbiased_hsic(mask * first, mask * second)
    K, L = [unit(features) @ unit(features).T for features in (a, b)]
    return (agreement(K, L) / ((agreement(K, K) * agreement(L, L)).sqrt() + 1e-6)).item()


def unbiased_hsic(K, L):
    """Unbiased Hilbert-Schmidt independence criterion (Song et al. 2012, eq. 5) of matrices [m, m], m at least 4; diagonals are left out.

    (tr(K L) + 1'K1 1'L1 / ((m - 1)(m - 2)) - 2 / (m - 2) 1'K L 1) / (m (m - 3))
    """
    m, K, L = len(K), K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)
    total = (K * L.T).sum() + K.sum() * L.sum() / ((m - 1) * (m - 2)) - 2 / (m - 2) * (K.sum(dim=0) @ L.sum(dim=1))
    return total / (m * (m - 3))


def frequency_map(signals):
    """Mean amplitude per spatial frequency: [N, C, H, W] -> float64 [H, W], frequency 0 in the middle (at H // 2, W // 2).

    |FFT| with the orthonormal scaling (chosen), in the signal's unit, averaged over images and channels (section 4.1, Fig. 3a and 10). White noise of standard deviation s is flat at 0.89 s
    (but for the few frequencies whose coefficient is real, 0.80 s).
    """
    total = sum(torch.fft.fft2(piece.double(), norm="ortho").abs().mean(dim=1).sum(dim=0) for piece in signals.split(100))
    return torch.fft.fftshift(total / len(signals))


def radial_profile(frequencies):
    """Means of a map [H, W] from `frequency_map` over rings of equal distance to frequency 0: [min(H, W) // 2 + 1], by waves per image."""
    height, width = frequencies.shape
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    ring = (rows[:, None] ** 2 + columns ** 2).double().sqrt().round().long()
    return torch.stack([frequencies[ring == radius].mean() for radius in range(min(height, width) // 2 + 1)])


def linear_probe(features, labels, classes):
    """Multinomial logistic regression, by L-BFGS from zero: features [N, D], labels [N] -> nn.Linear(D, classes), frozen.

    Minimises CE + PROBE_DECAY / 2 ||W||^2 on features standardised per dimension; the scaling is then folded into the weights.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    standard, probe = (features - mean) / deviation, nn.Linear(features.shape[1], classes).to(features.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=PROBE_ITERATIONS, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(standard), labels) + PROBE_DECAY / 2 * probe.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    with torch.no_grad():
        probe.weight /= deviation
        probe.bias -= probe.weight @ mean
    return probe.requires_grad_(False)


class TopKSAE(nn.Module):
    """Sparse autoencoder that keeps the k largest latents (Gao et al. 2025, arXiv 2406.04093, section 2.3):

    z = ReLU(TopK(W_enc (x - b_pre) + b_enc)),   x^ = W_dec z + b_pre,   loss ||x - x^||^2   (b_enc and ReLU as in their code)

    Columns of W_dec have length 1, W_enc starts as its transpose. Theirs also revives latents that never fire, by a second loss; here
    they are counted.
    """

    def __init__(self, width, latents, k, random):
        super().__init__()
        self.k = k
        self.decoder = nn.Parameter(F.normalize(torch.randn(latents, width, generator=random), dim=1))  # W_dec transposed
        self.encoder = nn.Parameter(self.decoder.detach().clone())  # [latents, width]
        self.latent_bias, self.bias = nn.Parameter(torch.zeros(latents)), nn.Parameter(torch.zeros(width))

    def encode(self, x):
        """x [B, width] -> z [B, latents], at most k of each row are not 0."""
        largest = ((x - self.bias) @ self.encoder.T + self.latent_bias).topk(self.k, dim=1)
        return torch.zeros(len(x), len(self.encoder), device=x.device).scatter(1, largest.indices, largest.values.relu())

    def forward(self, x):
        """x [B, width] -> x^ [B, width]."""
        return self.encode(x) @ self.decoder + self.bias


def train_sae(features, latents, k, steps, seed):
    """Fit a TopKSAE to features [N, D] by Adam; the learning rate falls linearly to 0 over the last fifth. Returns it, in evaluation mode."""
    random = generator(seed, k, "sae")
    sae = TopKSAE(features.shape[1], latents, k, random).to(features.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=SAE_RATE)
    for step in tqdm(range(steps), desc=f"sparse autoencoder, k = {k}", disable=None, leave=False):
        x = features[torch.randint(len(features), (SAE_BATCH,), generator=random).to(features.device)]
        optimizer.param_groups[0]["lr"] = SAE_RATE * min(1, 5 * (1 - step / steps))
        optimizer.zero_grad()
        (sae(x) - x).square().sum(dim=1).mean().backward()
        optimizer.step()
        with torch.no_grad():
            sae.decoder.copy_(F.normalize(sae.decoder, dim=1))
    return sae.requires_grad_(False).eval()


def normalised_loss(reconstruction, features):
    """Squared error divided by that of always answering with the mean feature (Gao et al. 2025): [N, D] twice -> float, 0 is perfect."""
    return ((reconstruction - features).square().sum() / (features.mean(dim=0) - features).square().sum()).item()


def principal_components(features):
    """PCA of features [N, D] (section 5.5, after Feng et al. 2022): their mean [D] and the components [D, D], in float64.

    Components are the columns, by falling variance: eigenvectors of the sum over images of (f - mean) (f - mean)'.
    """
    mean = features.double().mean(dim=0)
    centred = features.double() - mean
    return mean, torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)


@torch.no_grad()
def accuracy_by_rank(head, features, labels, mean, components):
    """Accuracy in percent when features are projected on the first k components before the head, for k = 0, ..., D: float64 [D + 1].

    features [N, D], labels [N]; mean, components as from `principal_components` (of clean features, also where `features` are adversarial:
    section 5.5). The mean stays: f -> mean + V_k V_k' (f - mean). The last entry is the accuracy without projection.
    """
    coefficients, projected = (features.double() - mean) @ components, mean.expand(features.shape).clone()
    accuracy = []
    for k in range(components.shape[1] + 1):
        logits = head(features if k == components.shape[1] else projected.float())
        accuracy.append(100 * (logits.argmax(dim=1) == labels).double().mean())
        if k < components.shape[1]:
            projected += coefficients[:, k, None] * components[:, k]
    return torch.stack(accuracy)


def classification_dimension(accuracy, share):
    """CLS-q dimension (Feng et al. 2022, arXiv 2206.06072): the least k that keeps `share` (0.95, 0.99) of the full accuracy.

    accuracy [D + 1] as from `accuracy_by_rank`. Returns an int.
    """
    return int((accuracy >= share * accuracy[-1] - 1e-9).nonzero()[0])  # rounding: 28.5 is less than 0.95 * 30.0


def robust_dimension(accuracy):
    """The (least) k with the highest accuracy on adversarial images (section 5.5, Table 3). accuracy [D + 1]. Returns an int.

    The maximum of a flat curve is ill-determined: with 1,000 images, accuracies that differ by 1.5 points may be the same.
    """
    return int(accuracy.argmax())


# ---------------------------------------------------------------------------------------------------------------------
# Networks, images, attack


class ProbedTeacher(nn.Module):
    """The diffusion encoder as a classifier, like those of the training scripts: `features`, `head`, and images -> logits.

    A deterministic function of the image: always the same noise [1, 3, H, W], no label. The head is a linear probe, see `fit_probe`.
    """

    def __init__(self, encoder, sigma, seed):
        super().__init__()
        self.encoder, self.sigma, self.head = encoder, sigma, None
        shape = (1, 3, encoder.img_resolution, encoder.img_resolution)
        self.register_buffer("noise", torch.randn(shape, generator=generator(seed, 0, "teacher noise")))

    def features(self, images):
        """images [B, 3, H, W] in [0, 1] -> diffusion features [B, D]."""
        return self.encoder(images, None, self.sigma, self.noise.expand_as(images))

    def forward(self, images):
        """images [B, 3, H, W] in [0, 1] -> logits [B, classes]."""
        return self.head(self.features(images))

    def fit_probe(self, images, labels, classes, args):
        """Train the head on the features of these images."""
        self.head = linear_probe(features_of(self, images, args), labels.to(args.device), classes)
        return self


def load(args):
    """Everything that a command starts from: (classifiers, each with `name` and `info`, and the teacher's encoder, on args.device; test
    images and labels; images and labels to fit on). Sets args.info, that of the classifiers, and args.eps, args.n, args.n_train to what is used.
    """
    archs = args.arch or [None]
    if len(archs) not in (1, len(args.checkpoints)):
        raise InputError(f"--arch: gives {len(archs)}, expected 1 or {len(args.checkpoints)}, one for each checkpoint")
    archs, models = archs * (len(args.checkpoints) if len(archs) == 1 else 1), []
    for path, arch, name in zip(args.checkpoints, archs, args.names):
        model = load_classifier(path, arch, args.dataset, args.script, args.weights).to(args.device)
        if not hasattr(model, "features") or not hasattr(model, "head"):
            raise InputError(f"{path}: the network that {model.info.script.name} builds has no `features` and `head`")
        if models and judged_on(model.info) != judged_on(models[0].info):
            raise InputError(f"{path}: was trained on another data set, other classes or another image size than {args.checkpoints[0]}, expected the same")
        model.name = name
        models.append(model)
    dataset = args.dataset or "cifar10"
    args.info = models[0].info if models else SimpleNamespace(dataset=dataset, num_classes=BENCHMARKS[dataset].classes, args={})
    if args.command in ATTACKING and args.eps is None:
        args.eps = fraction(BENCHMARKS[args.info.dataset].eps)
    test, fit = load_data(args)
    if args.command in FITTING and args.n_train:
        args.n_train = len(fit[1])
    args.n = len(test[1])
    return models, load_teacher(args, test[0]) if args.command in ASKING else None, test, fit


def judged_on(info):
    """All that decides which images a checkpoint is judged on, and what its outputs mean."""
    settings = info.args
    drawing = settings.get("seed") if settings.get("smoke") is True else None  # a smoke run draws its images
    return info.dataset, info.num_classes, drawing, settings.get("image_size"), settings.get("classes")


def load_data(args):
    """Test images float32 [N, 3, H, W] in [0, 1] with labels int64 [N], and the same to fit on, on the CPU: the first --n-train training images.

    ImageNet: a random split of the listed images, since its training set is too large to be read for this. The second pair is None where
    nothing is fitted.
    """
    def images_and_labels(n, split):
        return load_images(SimpleNamespace(data_dir=args.data_dir, image_list=args.image_list, n=n), args.info, split)
    fitting = args.command in FITTING and args.n_train
    if args.info.dataset != "imagenet":
        return images_and_labels(args.n, "test"), images_and_labels(args.n_train, "train") if fitting else None
    images, labels = images_and_labels(None, "test")
    order = torch.randperm(len(images), generator=generator(args.seed, 0, "split"))
    if fitting and len(order) < args.n + 10:
        raise InputError(f"--n {args.n}: {len(order)} images are listed, expected at least ten more than --n, to fit on")
    test, fit = order[:args.n], order[args.n:args.n + args.n_train] if fitting else None
    return (images[test], labels[test]), (images[fit], labels[fit]) if fitting else None


def load_teacher(args, images):
    """The frozen EDM encoder on args.device, or None where none is named."""
    if args.teacher is None:
        return None
    try:
        encoder = load_edm_encoder(args.teacher, args.teacher_layer).to(args.device)
    except (ValueError, OSError) as error:
        raise InputError(f"--teacher {error}") from None
    if images.shape[2:] != (encoder.img_resolution, encoder.img_resolution):
        raise InputError(f"--teacher {args.teacher}: made for {encoder.img_resolution} px images, expected {images.shape[2]}")
    if encoder.label_dim:
        print(f"{args.teacher}: class-conditional, asked without a label here, which it may not have been trained for", flush=True)
    return encoder


def probed_teacher(args, encoder, fit):
    """[ProbedTeacher] with its probe trained, or [] without an encoder: to be appended to a list of classifiers."""
    if encoder is None:
        return []
    teacher = ProbedTeacher(encoder, args.teacher_sigma, args.seed).to(args.device).fit_probe(*fit, args.info.num_classes, args)
    teacher.name = f"teacher, sigma {args.teacher_sigma:g}"
    return [teacher]


def pieces(args, count, what):
    """Consecutive slices of `count` images, of --batch-size each, with a progress bar."""
    return tqdm([slice(i, i + args.batch_size) for i in range(0, count, args.batch_size)], desc=what, disable=None, leave=False)


@torch.no_grad()
def features_of(model, images, args):
    """Penultimate features [N, D] float32 of images [N, 3, H, W], on args.device."""
    return torch.cat([model.features(images[piece].to(args.device)) for piece in pieces(args, len(images), "features")])


def attack(model, images, labels, args, eps=None):
    """PGD on the cross-entropy from a random start: images [N, 3, H, W] -> x', same shape, within eps (default args.eps), on the CPU."""
    eps, adversarial = args.eps if eps is None else eps, []
    for piece in pieces(args, len(images), f"PGD-{args.steps}"):
        x, y = images[piece].to(args.device), labels[piece].to(args.device)
        random = generator(args.seed, piece.start, "attack")
        start = x + eps * (2 * torch.rand(x.shape, generator=random).to(args.device) - 1)
        adversarial.append(pgd(lambda adv: F.cross_entropy(model(adv), y, reduction="sum"), x, start.clamp(0, 1), eps, eps / 4, args.steps).cpu())
    return torch.cat(adversarial)


def input_gradients(model, images, labels, args):
    """Gradient of each image's cross-entropy with respect to its pixels: [N, 3, H, W], on the CPU."""
    gradients = []
    for piece in pieces(args, len(images), "gradients"):
        x = images[piece].to(args.device).requires_grad_()
        loss = F.cross_entropy(model(x), labels[piece].to(args.device), reduction="sum")
        gradients.append(torch.autograd.grad(loss, [x])[0].cpu())
    return torch.cat(gradients)


@torch.no_grad()
def accuracy(head, features, labels):
    """Percent of features [N, D] that head classifies as labels [N] say."""
    return 100 * (head(features).argmax(dim=1).cpu() == labels).double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures


def claim(args):
    """Write the settings to --out/COMMAND.json, before anything is computed, and print a line of them.

    Where a result is there already only the same command may go on, and only if its figure is missing: after an interruption.
    """
    out, names = Path(args.out), OUTPUTS[args.command]
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "device", "info")}
    there = [name for name in names if (out / name).exists()]
    text = json.dumps(settings, indent=2) + "\n"
    interrupted = there and there[0] == names[0] and there[-1] != names[-1] and (out / names[0]).read_text(errors="replace") == text
    if there and not interrupted:
        raise InputError(f"--out {out}: {there[0]} is there already, of a finished run or one with other settings; nothing is overwritten, choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write(out / names[0], text.encode())
    if args.command != "curves":
        attacked = f", {attack_name(args)}" if args.command in ATTACKING else ""
        print(f"{args.command}: {args.info.dataset}, {args.weights} weights, {args.n} test images, seed {args.seed}{attacked}", flush=True)


def write(path, content):
    """Bytes to a file, under another name first, then renamed: never half a file. Raises OSError, one line that names it, where the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({one_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(args, name, rows):
    """A list of {column: value} with the same columns -> --out/name. Floats with eight digits."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.8g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    write(Path(args.out) / name, text.getvalue().encode())


def new_figure(rows, columns, width=4.6, height=3.6):
    """Figure and axes [rows, columns]; sizes of one panel in inches."""
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False)


def save_figure(args, figure):
    """Figure -> --out/COMMAND.png, the last of a command's outputs, and say what was written."""
    path, picture = Path(args.out) / OUTPUTS[args.command][-1], io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    plt.close(figure)
    write(path, picture.getvalue())
    print(f"wrote {', '.join(str(path.with_name(name)) for name in OUTPUTS[args.command])}")


def show(row):
    """Print a row of a table."""
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" if key == "name" else f"{key} {value}" for key, value in row.items()), flush=True)


def attack_name(args):
    """For axes: which attack."""
    return f"PGD-{args.steps}, eps {args.eps * 255:g}/255"


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def compare(args, model, images, labels):
    """Features of clean and of attacked images [N, D] of a classifier, and {clean, robust accuracy in percent}."""
    clean = features_of(model, images, args)
    adversarial = features_of(model, attack(model, images, labels, args), args)
    return clean, adversarial, {"clean_accuracy": accuracy(model.head, clean, labels), "robust_accuracy": accuracy(model.head, adversarial, labels)}


def run_uniformity(args):
    """Fig. 4 and 5: alignment (image and adversary) and uniformity of features, with clean and robust accuracy.

    Both as the features are, and centred (less the mean clean feature): a part that is common to all images makes unit-length
    features look alike, and the paper does not say whether it is subtracted.
    """
    models, encoder, (images, labels), fit = load(args)
    claim(args)
    rows = []
    for model in models + probed_teacher(args, encoder, fit):
        clean, adversarial, accuracies = compare(args, model, images, labels)
        mean = clean.mean(dim=0)
        rows.append({"name": model.name, "n": args.n, "alignment": alignment(clean, adversarial), "uniformity": uniformity(clean),
                     "alignment_centred": alignment(clean - mean, adversarial - mean), "uniformity_centred": uniformity(clean - mean)} | accuracies)
        write_csv(args, "uniformity.csv", rows)
        show(rows[-1])

    figure, (axes,) = new_figure(1, 3)
    for ax, suffix in ((axes[0], ""), (axes[1], "_centred")):
        for i, row in enumerate(rows):
            ax.scatter(-row["alignment" + suffix], -row["uniformity" + suffix], color=f"C{i}", label=row["name"], s=60)
        ax.set(xlabel="-alignment (higher: adversary moves features less)", ylabel="-uniformity (higher: more diverse)", title="features, centred" if suffix else "features")
        ax.margins(0.2)
        ax.legend()
    for i, row in enumerate(rows):
        for kind, shift, alpha in (("clean", -0.2, 1), ("robust", 0.2, 0.5)):
            axes[2].bar(i + shift, row[f"{kind}_accuracy"], 0.4, color=f"C{i}", alpha=alpha)
            axes[2].annotate(f"{row[f'{kind}_accuracy']:.1f}", (i + shift, row[f"{kind}_accuracy"]), ha="center", va="bottom", fontsize=8)
    axes[2].set(xticks=range(len(rows)), xlabel="network", ylabel="accuracy [%]", title=f"left: clean, right: {attack_name(args)}")
    axes[2].set_xticklabels([row["name"] for row in rows])
    save_figure(args, figure)


def run_cknna(args):
    """Fig. 1 and 9: likeness of each classifier's features to the teacher's, against robust and clean accuracy. Raw and centred, as in
    `run_uniformity`. The teacher gives no labels here: with them, likeness would be that to the labels.
    """
    models, encoder, (images, labels), _ = load(args)
    if args.n <= args.k:
        raise InputError(f"--k {args.k}: there are {args.n} images, expected more than k")
    claim(args)
    teacher = ProbedTeacher(encoder, args.teacher_sigma, args.seed).to(args.device)
    target, rows = features_of(teacher, images, args), []
    for model in models:
        clean, _, accuracies = compare(args, model, images, labels)
        centred = cknna(clean - clean.mean(dim=0), target - target.mean(dim=0), args.k)
        rows.append({"name": model.name, "n": args.n, "k": args.k, "cknna": cknna(clean, target, args.k), "cknna_centred": centred} | accuracies)
        write_csv(args, "cknna.csv", rows)
        show(rows[-1])

    figure, (axes,) = new_figure(1, 2)
    for ax, kind, what in ((axes[0], "robust", attack_name(args)), (axes[1], "clean", "clean images")):
        for i, row in enumerate(rows):
            ax.scatter(row[f"{kind}_accuracy"], row["cknna"], color=f"C{i}", label=row["name"], s=60)
            ax.scatter(row[f"{kind}_accuracy"], row["cknna_centred"], edgecolors=f"C{i}", facecolors="none", label=f"{row['name']}, centred", s=60)
        ax.set(xlabel=f"accuracy [%], {what}", ylabel=f"CKNNA with the teacher (k = {args.k})", title=f"teacher at sigma {args.teacher_sigma:g}, {args.n} images")
        ax.margins(0.2)
        ax.legend(fontsize=8)
    save_figure(args, figure)


def run_spectrum(args):
    """Fig. 3a and 10: spatial frequencies of PGD perturbations and of input gradients, and how later checkpoints differ from the first."""
    models, encoder, (images, labels), fit = load(args)
    claim(args)
    maps = {}  # (name, kind): [H, W]
    for model in models + probed_teacher(args, encoder, fit):
        maps[model.name, "perturbation"] = frequency_map(attack(model, images, labels, args) - images)
        maps[model.name, "gradient"] = frequency_map(input_gradients(model, images, labels, args))
    differences = {(f"{model.name} - {models[0].name}", kind): maps[model.name, kind] - maps[models[0].name, kind]
                   for model in models[1:] for kind in ("perturbation", "gradient")}
    profiles, table = [], []
    for (name, kind), map_ in (maps | differences).items():
        profiles += [{"name": name, "of": kind, "waves_per_image": i, "amplitude": value} for i, value in enumerate(radial_profile(map_).tolist())]
        height, width = map_.shape
        table += [{"name": name, "of": kind, "vertical": i - height // 2, "horizontal": j - width // 2, "amplitude": map_[i, j].item()}
                  for i in range(height) for j in range(width)]
    write_csv(args, "spectrum.csv", profiles)
    write_csv(args, "spectrum_map.csv", table)
    draw_spectrum(args, maps, differences)


def draw_spectrum(args, maps, differences):
    """A row of maps for perturbations and one for gradients: networks, differences, and the mean over directions. {(name, kind): [H, W]}."""
    names = list(dict.fromkeys(name for name, _ in maps | differences))
    figure, axes = new_figure(2, len(names) + 1, 3.6, 3.2)
    for row, kind, measure in zip(axes, ("perturbation", "gradient"), ("pixel value, 0 to 1", "loss per pixel value")):
        mine = {name: map_ for (name, of), map_ in maps.items() if of == kind}
        compared = {name: map_ for (name, of), map_ in differences.items() if of == kind}
        top = max(map_.max().item() for map_ in mine.values()) or 1e-30  # no gradient at all
        low = max(top / 1e3, min(map_.min().item() for map_ in mine.values()))
        bound = max((map_.abs().max().item() for map_ in compared.values()), default=1)
        for ax, (name, map_) in zip(row, (mine | compared).items()):
            colours = {"norm": LogNorm(low, top, clip=True)} if name in mine else {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
            vertical, horizontal = [size // 2 + 0.5 for size in map_.shape]  # frequency 0 is the middle of a pixel
            picture = ax.imshow(map_.numpy(), extent=(-horizontal, map_.shape[1] - horizontal, map_.shape[0] - vertical, -vertical), **colours)
            figure.colorbar(picture, ax=ax, label=f"{'amplitude' if name in mine else 'difference'} [{measure}]")
            ax.set(title=f"{name}\n{kind}", xlabel="horizontal [waves per image]", ylabel="vertical [waves per image]")
        for i, (name, map_) in enumerate(mine.items()):
            row[-1].plot(radial_profile(map_).numpy(), ("-", "--", ":", "-.")[i % 4], label=name)
        row[-1].set(title=f"mean over directions\n{kind}", yscale="log", xlabel="frequency [waves per image]", ylabel=f"amplitude [{measure}]")
        row[-1].legend(fontsize=7)
    save_figure(args, figure)


def run_probe(args):
    """Which noise level and block carry the class (how to choose --teacher-sigma and --teacher-layer), and, Fig. 3b, accuracy against eps.

    The grid is scored on training images that the probe was not fitted to (the first 1,024, as in train_cifar.py, but at most a fifth),
    since what is chosen by it will be judged on test images; each image has its own noise there. Against eps it is one fixed noise image, see `ProbedTeacher`.
    """
    models, encoder, (images, labels), (fit_images, fit_labels) = load(args)
    layers, held, rows = choose_layers(encoder, args.layers), min(HOLDOUT, len(fit_labels) // 5), []
    claim(args)
    for sigma in args.sigmas:
        features = pooled_activations(encoder, layers, fit_images, sigma, args)
        for layer in layers:
            probe = linear_probe(features[layer][held:], fit_labels[held:].to(args.device), args.info.num_classes)
            rows.append({"sigma": sigma, "layer": layer, "width": probe.in_features, "n_train": len(fit_labels) - held, "n": held,
                         "accuracy": accuracy(probe, features[layer][:held], fit_labels[:held])})
            write_csv(args, "probe.csv", rows)
            show(rows[-1])

    curves = []
    for model in models + probed_teacher(args, encoder, (fit_images, fit_labels)):
        for eps in np.linspace(0, args.eps, EPS_POINTS + 1):
            adversarial = attack(model, images, labels, args, float(eps)) if eps else images
            correct = accuracy(model.head, features_of(model, adversarial, args), labels)
            curves.append({"name": model.name, "n": args.n, "eps_255": float(255 * eps), "accuracy": correct})
            write_csv(args, "probe_eps.csv", curves)
            show(curves[-1])

    figure, (axes,) = new_figure(1, 2, 5)
    for layer in layers:
        axes[0].plot(args.sigmas, [row["accuracy"] for row in rows if row["layer"] == layer], "o-", label=layer)
    axes[0].set(xscale="log", xticks=args.sigmas, xlabel="noise level sigma (images in [-1, 1])", ylabel="accuracy of a linear probe [%]",
                title=f"teacher's features, {held} held-out images")
    axes[0].set_xticklabels([f"{sigma:g}" for sigma in args.sigmas])
    axes[0].minorticks_off()
    for name in dict.fromkeys(row["name"] for row in curves):
        points = [(row["eps_255"], row["accuracy"]) for row in curves if row["name"] == name]
        axes[1].plot(*zip(*points), "o-", label=name)
    axes[1].set(xlabel="eps [1/255]", ylabel="accuracy [%]", title=f"PGD-{args.steps}; teacher's probe under fixed noise", ylim=(0, None))
    for ax in axes:
        ax.legend(fontsize=8)
    save_figure(args, figure)


def choose_layers(encoder, asked):
    """The blocks to probe: those asked for, else the last at each resolution and the bottleneck. Raises InputError for an unknown one."""
    names = [f"{part}.{name}" for part in ("enc", "dec") for name in getattr(encoder.model, part) if not name.endswith("_aux_residual")]
    for name in asked or ():
        if name not in names:
            raise InputError(f"--layers {name}: the teacher has {', '.join(names)} (as far as --teacher-layer)")
    last = {name.split("_")[0]: name for name in names if name.startswith("enc.")}  # by resolution
    return list(dict.fromkeys(asked or [*last.values(), *(name for name in names if name.startswith("dec."))]))


@torch.no_grad()
def pooled_activations(encoder, layers, images, sigma, args):
    """Outputs of several blocks in one pass, averaged over positions: {layer: [N, C]}. Noise differs from image to image; no labels."""
    found, hooks = {layer: [] for layer in layers}, []
    for layer in layers:
        part, name = layer.split(".")
        keep = lambda _module, _inputs, output, layer=layer: found[layer].append(output.mean(dim=(2, 3)))
        hooks.append(getattr(encoder.model, part)[name].register_forward_hook(keep))
    try:
        for piece in pieces(args, len(images), f"teacher at sigma {sigma:g}"):
            x = images[piece].to(args.device)
            encoder(x, None, sigma, torch.randn(x.shape, generator=generator(args.seed, piece.start, "grid noise")).to(args.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(outputs) for layer, outputs in found.items()}


def run_sae(args):
    """Fig. 6: how well k of many latents explain a penultimate feature, on test images, that the autoencoder was not fitted to."""
    models, _, (images, _), (fit_images, _) = load(args)
    for model in models:
        latents = args.expansion * features_of(model, images[:1], args).shape[1]
        if max(args.ks) > latents:
            raise InputError(f"--ks {max(args.ks)}: {model.name} would have {latents} latents, expected no more")
    claim(args)
    rows = []
    for model in models:
        train, test = features_of(model, fit_images, args), features_of(model, images, args)
        mean, latents = train.mean(dim=0), args.expansion * train.shape[1]
        scale = (train - mean).square().mean().sqrt()  # one number for all: the loss is relative, but Adam's steps are not
        train, test = (train - mean) / scale, (test - mean) / scale
        for k in args.ks:
            sae = train_sae(train, latents, k, args.sae_steps, args.seed)
            dead = torch.stack([(sae.encode(part) == 0).all(dim=0) for part in train.split(SAE_BATCH)]).all(dim=0)
            fitted = normalised_loss(torch.cat([sae(part) for part in train.split(SAE_BATCH)]), train)
            rows.append({"name": model.name, "k": k, "latents": latents, "n_train": args.n_train, "n": args.n, "normalised_loss": normalised_loss(sae(test), test),
                         "normalised_loss_train": fitted, "dead_latents": dead.double().mean().item()})
            write_csv(args, "sae.csv", rows)
            show(rows[-1])

    figure, ((ax,),) = new_figure(1, 1, 5.5, 4)
    for i, name in enumerate(args.names):
        for column, style, what in (("normalised_loss", "o-", "test images"), ("normalised_loss_train", ":", "images fitted to")):
            points = [(row["k"], row[column]) for row in rows if row["name"] == name]
            ax.plot(*zip(*points), style, color=f"C{i}", label=f"{name}, {what}")
    ax.set(xscale="log", xticks=args.ks, ylim=(0, None), xlabel="active latents k", ylabel="normalised reconstruction loss",
           title=f"TopK sparse autoencoder, {args.expansion} latents per dimension")
    ax.set_xticklabels(args.ks)
    ax.minorticks_off()
    ax.legend()
    save_figure(args, figure)


def run_dims(args):
    """Fig. 7 and Table 3: accuracy on the first k principal components of clean features, and how many are needed.

    Components come from training images. The adversary attacks the whole network and does not know of the projection, so what is gained by
    leaving components out says where this adversary acts; it is no defence.
    """
    models, _, (images, labels), (fit_images, _) = load(args)
    claim(args)
    rows, curves, truth = [], [], labels.to(args.device)
    for model in models:
        mean, components = principal_components(features_of(model, fit_images, args))
        features, adversarial, _ = compare(args, model, images, labels)
        clean, robust = [accuracy_by_rank(model.head, x, truth, mean, components) for x in (features, adversarial)]
        rows.append({"name": model.name, "n_train": args.n_train, "n": args.n, "features": len(mean),
                     "cls_95": classification_dimension(clean, 0.95), "cls_99": classification_dimension(clean, 0.99), "robust": robust_dimension(robust),
                     "clean_accuracy": clean[-1].item(), "robust_accuracy": robust[-1].item(), "best_robust_accuracy": robust.max().item()})
        curves += [{"name": model.name, "components": k, "clean_accuracy": clean[k].item(), "robust_accuracy": robust[k].item()} for k in range(len(clean))]
        write_csv(args, "dims.csv", rows)
        write_csv(args, "dims_accuracy.csv", curves)
        show(rows[-1])

    figure, (axes,) = new_figure(1, 2, 5)
    for ax, kind, marks in ((axes[0], "clean", ("cls_95", "cls_99")), (axes[1], "robust", ("robust",))):
        for i, row in enumerate(rows):
            values = [curve[f"{kind}_accuracy"] for curve in curves if curve["name"] == row["name"]]
            ax.plot(values, color=f"C{i}", label=f"{row['name']}: {', '.join(str(row[mark]) for mark in marks)}")
            ax.plot([row[mark] for mark in marks], [values[row[mark]] for mark in marks], "o", color=f"C{i}")
        ax.set_xscale("symlog", linthresh=1)  # logarithmic from 1 on
        ax.set(xlim=(0, None), ylim=(0, None), xlabel="principal components of the clean features", ylabel="accuracy [%]",
               title="clean; points: 95 % and 99 % of the full accuracy" if kind == "clean" else f"{attack_name(args)}; point: the best")
        ax.legend()
    save_figure(args, figure)


def read_log(path, name):
    """The rows of a run's log.csv: a list of {column: float} without those that a row leaves empty. path: the file or its folder."""
    path = Path(path) / "log.csv" if Path(path).is_dir() else Path(path)
    try:
        with open(path, newline="", errors="replace") as file:
            rows = [{"name": name} | {column: float(value) for column, value in row.items() if value} for row in csv.DictReader(file)]
    except (TypeError, ValueError, csv.Error):
        rows = []
    if not rows or not all({"step", "epoch", "loss"} <= row.keys() for row in rows):
        raise InputError(f"{path}: no log of a training run, expected rows of numbers under step, epoch, loss, ...")
    if not any(row.get("cosine") for row in rows):  # a run without alignment: 0, or left empty
        rows = [{column: value for column, value in row.items() if column != "cosine"} for row in rows]
    return rows


def run_curves(args):
    """Training curves of one or more runs."""
    rows = [row for path, name in zip(args.runs, args.names) for row in read_log(path, name)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    claim(args)
    write_csv(args, "curves.csv", [{column: row.get(column, "") for column in columns} for row in rows])

    figure, axes = new_figure(2, 2)
    panels = (("loss", axes[0, 0], "-", "loss (eq. 4)"), ("cosine", axes[0, 1], "-", "cosine with the teacher's features"),
              ("train_clean", axes[1, 0], "-", "accuracy on batches [%]"), ("train_robust", axes[1, 0], "--", "accuracy on batches [%]"),
              ("holdout_clean", axes[1, 1], "o-", "accuracy on held-out images [%]"), ("holdout_robust", axes[1, 1], "o--", "accuracy on held-out images [%]"))
    for column, ax, style, label in panels:
        for i, name in enumerate(args.names):
            points = [(row["epoch"], row[column]) for row in rows if row["name"] == name and column in row]
            if points:
                ax.plot(*zip(*points), style, color=f"C{i}", markersize=4, label=name + ", attacked" * column.endswith("robust"))
        ax.set(xlabel="epoch", ylabel=label)
        if ax.lines:
            ax.legend(fontsize=8)
    save_figure(args, figure)


COMMANDS = {"uniformity": run_uniformity, "cknna": run_cknna, "spectrum": run_spectrum, "probe": run_probe, "sae": run_sae, "dims": run_dims, "curves": run_curves}


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    COMMANDS[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as problem:
        print(f"error: {one_line(problem)} Use a smaller --batch-size or --n.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
