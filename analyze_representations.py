"""What the features of robust classifiers look like, and those of their diffusion teacher: the analyses of arXiv 2602.19931.

    python analyze_representations.py uniformity at/best.pt dra/best.pt --teacher EDM.pkl   # Fig. 4, 5: robust and diverse?
    python analyze_representations.py cknna at/best.pt dra/best.pt --teacher EDM.pkl        # Fig. 1, 9: how alike to the teacher's?
    python analyze_representations.py spectrum at/best.pt dra/best.pt --teacher EDM.pkl     # Fig. 3a, 10: which frequencies fool it?
    python analyze_representations.py probe at/best.pt dra/best.pt --teacher EDM.pkl        # Fig. 3b: which noise level and block?
    python analyze_representations.py sae at/best.pt dra/best.pt                            # Fig. 6: easy to disentangle?
    python analyze_representations.py dims at/best.pt dra/best.pt                           # Fig. 7, Table 3: how many dimensions?
    python analyze_representations.py curves runs/at runs/dra                               # from the log.csv of training runs

Each writes COMMAND.csv and COMMAND.png (some a second table) to --out, and overwrites nothing. Checkpoints are all that eval_autoattack.py takes:
ours, DM-AT's, RobustBench's; EDM.pkl is the teacher of train_cifar.py. Everything is in evaluation mode and float32, and every draw
depends on --seed alone. "Robust" here is accuracy under a plain PGD on the cross-entropy, made to compare: quote AutoAttack, not this.

Where the teacher stands beside classifiers it is made one: features under ONE fixed noise image and without labels, a linear probe on
top, attacked end to end (as in Fig. 3b; with noise drawn anew an attack would seem to fail, and a label would be the answer).
The first half of this file is the metrics, one function each, with formula and source; the second half is the commands.
"""
import argparse
import csv
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
from train_cifar import generator, number, pgd

plt.switch_backend("agg")  # files only: works without a display

# ---------------------------------------------------------------------------------------------------------------------
# Settings. "chosen": by us; the paper's text leaves them open.

OUTPUTS = {  # command: what it writes, below --out
    "uniformity": ["uniformity.csv", "uniformity.png"],
    "cknna": ["cknna.csv", "cknna.png"],
    "spectrum": ["spectrum.csv", "spectrum_map.csv", "spectrum.png"],
    "probe": ["probe.csv", "probe_eps.csv", "probe.png"],
    "sae": ["sae.csv", "sae.png"],
    "dims": ["dims.csv", "dims_accuracy.csv", "dims.png"],
    "curves": ["curves.csv", "curves.png"],
}
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
    count, several, positive = number(int, at_least=1, below=1e9), number(int, at_least=2, below=1e9), number(above=0, below=1e6)
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
        add("--n", type=several, default=1000, help="test images (the first ones)")
        add("--batch-size", type=count, default=250, help="images computed together")
        add("--seed", type=number(int, at_least=0, below=2**63), default=0, help="of every random draw")
        add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
        if command != "sae":
            add("--eps", type=fraction, help="largest change of a pixel in [0,1] (default: RobustBench's, 8/255 and for ImageNet 4/255)")
            add("--steps", type=count, default=20, help="of the PGD attack, each of eps / 4")
        if command in ("uniformity", "cknna", "spectrum", "probe"):
            add("--teacher", required=command in ("cknna", "probe"), help="EDM .pkl, path or URL")
            add("--teacher-sigma", type=positive, default=0.06, help="its noise level, images in [-1,1] (in `probe`: for the accuracy against eps)")
            add("--teacher-layer", default="dec.8x8_in1", help="block whose output, averaged over positions, is the feature")
        if command in ("uniformity", "spectrum", "probe", "sae", "dims"):
            add("--n-train", type=several, default=5000, help="training images for what is fitted: linear probe, autoencoder, principal components")
        if command in ("uniformity", "cknna"):
            add("--centre", action="store_true", help="subtract the mean feature first (the paper does not say; features with a large common part depend on it)")
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
    if getattr(args, "eps", None) is not None and not 0 < args.eps < 1:
        raise InputError(f"--eps {args.eps}: expected more than 0 and less than 1, such as 8/255")
    paths = args.runs if args.command == "curves" else args.checkpoints
    if not paths and not args.teacher:
        raise InputError(f"{args.command}: expected a checkpoint, --teacher FILE, or both")
    if args.names and len(args.names) != len(paths):
        raise InputError(f"--names: gives {len(args.names)} names, expected {len(paths)}")
    args.names = args.names or [f"{Path(path).resolve().parent.name}/{Path(path).stem}" if args.command != "curves" else Path(path.removesuffix("log.csv")).resolve().name
                                for path in paths]
    if len(set(args.names)) < len(args.names):
        raise InputError(f"--names {' '.join(args.names)}: expected a different name for each, to tell them apart")
    return args


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
    """Rows scaled to length 1, in float64: differences of nearly equal rows are what counts."""
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
    """Mean amplitude per spatial frequency, 1 on average: [N, C, H, W] -> [H, W], frequency 0 in the middle (at H // 2, W // 2).

    |FFT| of each image and channel; each image's spectrum is scaled to mean 1 before the mean over images (chosen), so that the
    tiny gradients of images that the network is sure of count as much as others. White noise is flat. Images that are 0 are left out.
    """
    amplitude = torch.fft.fft2(signals.double()).abs().mean(dim=1)  # [N, H, W]
    scale = amplitude.mean(dim=(1, 2), keepdim=True)
    used = scale.flatten() > 0
    return torch.fft.fftshift((amplitude[used] / scale[used]).mean(dim=0))


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

    z = ReLU(TopK(W_enc (x - b_pre) + b_enc)),   x^ = W_dec z + b_pre,   loss ||x - x^||^2; columns of W_dec have length 1, W_enc starts
    as its transpose. Theirs also revives latents that never fire, by a second loss; this one counts them.
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
    """PCA of features [N, D]: their mean [D] and the components [D, D], as columns, by falling variance. In float64."""
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
    return int((accuracy >= share * accuracy[-1]).nonzero()[0])


def robust_dimension(accuracy):
    """The (least) k with the highest accuracy on adversarial images (section 5.5, Table 3). accuracy [D + 1]. Returns an int."""
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


def load_models(args):
    """The classifiers of args.checkpoints, each with a `name` and `info`, on args.device. Sets args.dataset and args.eps where not given."""
    archs = args.arch or [None]
    if len(archs) not in (1, len(args.checkpoints)):
        raise InputError(f"--arch: gives {len(archs)}, expected 1 or {len(args.checkpoints)}, one for each checkpoint")
    archs, models = archs * (len(args.checkpoints) if len(archs) == 1 else 1), []
    for path, arch, name in zip(args.checkpoints, archs, args.names):
        model = load_classifier(path, arch, args.dataset, args.script, args.weights).to(args.device)
        if not hasattr(model, "features") or not hasattr(model, "head"):
            raise InputError(f"{path}: the network that {model.info.script.name} builds has no `features` and `head`")
        if models and (model.info.dataset, model.info.num_classes) != (models[0].info.dataset, models[0].info.num_classes):
            raise InputError(f"{path}: classifies {model.info.dataset}, expected {models[0].info.dataset} like {args.checkpoints[0]}")
        model.name = name
        models.append(model)
    args.info = models[0].info if models else SimpleNamespace(dataset=args.dataset or "cifar10", num_classes=BENCHMARKS[args.dataset or "cifar10"].classes, args={})
    if getattr(args, "eps", 0) is None:
        args.eps = fraction(BENCHMARKS[args.info.dataset].eps)
    return models


def load_data(args):
    """Test images float32 [N, 3, H, W] in [0, 1] with labels int64 [N], and those to fit on, likewise (the first --n-train of the
    training images), all on the CPU. ImageNet: a random split of the listed images, since its training set is too large to be read for this.
    """
    n_train, take = getattr(args, "n_train", 0), lambda n: SimpleNamespace(data_dir=args.data_dir, image_list=args.image_list, n=n)
    if args.info.dataset == "imagenet":
        images, labels = load_images(take(None), args.info)
        order = torch.randperm(len(images), generator=generator(args.seed, 0, "split"))
        if len(order) < args.n + n_train:
            raise InputError(f"--n {args.n}{f' --n-train {n_train}' * bool(n_train)}: {len(order)} images are listed, expected at least {args.n + n_train}")
        test, fit = order[:args.n], order[args.n:args.n + n_train]
        return (images[test], labels[test]), (images[fit], labels[fit])
    return load_images(take(args.n), args.info), load_images(take(n_train), args.info, "train") if n_train else None


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
    return encoder


def probed_teacher(args, images, fit):
    """[ProbedTeacher] with its probe trained, or [] where no teacher is named: to be appended to a list of classifiers."""
    encoder = load_teacher(args, images)
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


def write_csv(args, name, rows):
    """A list of {column: value} with the same columns -> --out/name. Floats with six digits."""
    with open(Path(args.out) / (name + ".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    os.replace(file.name, Path(args.out) / name)


def new_figure(rows, columns, width=4.6, height=3.6):
    """Figure and axes [rows, columns]; sizes of one panel in inches."""
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False)


def save_figure(args, name, figure):
    """Figure -> --out/name, and say so."""
    temporary = Path(args.out) / (name + ".tmp")
    figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)
    os.replace(temporary, Path(args.out) / name)
    print(f"wrote {', '.join(str(Path(args.out) / file) for file in OUTPUTS[args.command])}")


def show(row):
    """Print a row of a table."""
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" if key == "name" else f"{key} {value}" for key, value in row.items()), flush=True)


def attack_name(args):
    """For axes: which attack."""
    return f"PGD-{args.steps}, eps {args.eps * 255:g}/255"


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def run_uniformity(args):
    """Fig. 4 and 5: alignment (image and adversary) and uniformity of features, with clean and robust accuracy."""
    models = load_models(args)
    (images, labels), fit = load_data(args)
    rows = []
    for model in models + probed_teacher(args, images, fit):
        clean = features_of(model, images, args)
        adversarial = features_of(model, attack(model, images, labels, args), args)
        centre = clean.mean(dim=0) if args.centre else 0
        rows.append({"name": model.name, "n": len(images), "alignment": alignment(clean - centre, adversarial - centre), "uniformity": uniformity(clean - centre),
                     "clean_accuracy": accuracy(model.head, clean, labels), "robust_accuracy": accuracy(model.head, adversarial, labels)})
        show(rows[-1])
    write_csv(args, "uniformity.csv", rows)

    figure, (axes,) = new_figure(1, 2)
    for i, row in enumerate(rows):
        axes[0].scatter(-row["alignment"], -row["uniformity"], color=f"C{i}", label=row["name"], s=60)
        for kind, shift, alpha in (("clean", -0.2, 1), ("robust", 0.2, 0.5)):
            axes[1].bar(i + shift, row[f"{kind}_accuracy"], 0.4, color=f"C{i}", alpha=alpha)
            axes[1].annotate(f"{row[f'{kind}_accuracy']:.1f}", (i + shift, row[f"{kind}_accuracy"]), ha="center", va="bottom", fontsize=8)
    axes[0].set(xlabel="-alignment (higher: the adversary moves features less)", ylabel="-uniformity (higher: more diverse)", title=f"Features on the unit sphere{', centred' * args.centre}")
    axes[0].margins(0.2)
    axes[0].legend()
    axes[1].set(xticks=range(len(rows)), ylabel="accuracy [%]", title=f"left: clean, right: {attack_name(args)}")
    axes[1].set_xticklabels([row["name"] for row in rows], rotation=15)
    save_figure(args, "uniformity.png", figure)


def run_cknna(args):
    """Fig. 1 and 9: likeness of each classifier's features to the teacher's, against robust and clean accuracy."""
    models = load_models(args)
    (images, labels), _ = load_data(args)
    if len(images) <= max(args.k, 3):
        raise InputError(f"--k {args.k}: there are {len(images)} images, expected more than k, and at least 4")
    teacher = ProbedTeacher(load_teacher(args, images), args.teacher_sigma, args.seed).to(args.device)
    target, rows = features_of(teacher, images, args), []
    centred = lambda features: features - features.mean(dim=0) if args.centre else features
    for model in models:
        clean = features_of(model, images, args)
        adversarial = features_of(model, attack(model, images, labels, args), args)
        rows.append({"name": model.name, "n": len(images), "k": args.k, "cknna": cknna(centred(clean), centred(target), args.k),
                     "clean_accuracy": accuracy(model.head, clean, labels), "robust_accuracy": accuracy(model.head, adversarial, labels)})
        show(rows[-1])
    write_csv(args, "cknna.csv", rows)

    figure, (axes,) = new_figure(1, 2)
    for ax, kind, what in ((axes[0], "robust", attack_name(args)), (axes[1], "clean", "clean images")):
        for i, row in enumerate(rows):
            ax.scatter(row[f"{kind}_accuracy"], row["cknna"], color=f"C{i}", label=row["name"], s=60)
        ax.set(xlabel=f"accuracy [%], {what}", ylabel=f"CKNNA with the teacher (k = {args.k}{', centred' * args.centre})", title=f"teacher at sigma {args.teacher_sigma:g}, {len(images)} images")
        ax.margins(0.2)
        ax.legend()
    save_figure(args, "cknna.png", figure)


def run_spectrum(args):
    """Fig. 3a and 10: spatial frequencies of PGD perturbations and of input gradients, and how later checkpoints differ from the first."""
    models = load_models(args)
    (images, labels), fit = load_data(args)
    maps = {}
    for model in models + probed_teacher(args, images, fit):
        maps[model.name, "perturbation"] = frequency_map(attack(model, images, labels, args) - images)
        maps[model.name, "gradient"] = frequency_map(input_gradients(model, images, labels, args))
    differences = {(f"{model.name} - {models[0].name}", kind): maps[model.name, kind] - maps[models[0].name, kind]
                   for model in models[1:] for kind in ("perturbation", "gradient")}
    profiles = {key: radial_profile(map_) for key, map_ in (maps | differences).items()}
    write_csv(args, "spectrum.csv", [{"name": name, "of": kind, "waves_per_image": i, "amplitude": value}
                                     for (name, kind), profile in profiles.items() for i, value in enumerate(profile.tolist())])
    write_csv(args, "spectrum_map.csv", [{"name": name, "of": kind, "vertical": i - len(map_) // 2, "horizontal": j - len(line) // 2, "amplitude": value}
                                         for (name, kind), map_ in (maps | differences).items() for i, line in enumerate(map_.tolist()) for j, value in enumerate(line)])

    names = list(dict.fromkeys(name for name, _ in maps | differences))
    figure, axes = new_figure(2, len(names) + 1, 3.6, 3.2)
    half = images.shape[2] // 2
    for row, kind in zip(axes, ("perturbation", "gradient")):
        top = max(map_.max().item() for (_, of), map_ in maps.items() if of == kind)
        low = max(top / 1e3, min(map_.min().item() for (_, of), map_ in maps.items() if of == kind))
        bound = max((map_.abs().max().item() for (_, of), map_ in differences.items() if of == kind), default=1)
        for i, (ax, name) in enumerate(zip(row, names)):
            difference = (name, kind) in differences
            colours = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound} if difference else {"norm": LogNorm(low, top, clip=True)}
            picture = ax.imshow((maps | differences)[name, kind].numpy(), extent=(-half - 0.5, images.shape[3] - half - 0.5, images.shape[2] - half - 0.5, -half - 0.5), **colours)
            figure.colorbar(picture, ax=ax, label="difference" if difference else "amplitude (white noise: 1)")
            ax.set(title=f"{name}\n{kind}", xlabel="horizontal [waves per image]", ylabel="vertical [waves per image]")
            if not difference:
                row[-1].plot(profiles[name, kind].numpy(), ("-", "--", ":", "-.")[i % 4], label=name)
        row[-1].axhline(1, color="grey", linewidth=0.8, linestyle=":")
        row[-1].set(title=f"over all directions\n{kind}", yscale="log", xlabel="frequency [waves per image]", ylabel="amplitude (white noise: 1)")
        row[-1].legend()
    save_figure(args, "spectrum.png", figure)


def run_probe(args):
    """Which noise level and block carry the class (how to choose --teacher-sigma and --teacher-layer), and, Fig. 3b, accuracy against eps.

    In the grid each image has its own noise; against eps it is one fixed noise image, see `ProbedTeacher`.
    """
    models = load_models(args)
    (images, labels), (fit_images, fit_labels) = load_data(args)
    encoder = load_teacher(args, images)
    layers, rows = choose_layers(encoder, args.layers), []
    for sigma in args.sigmas:
        train = pooled_activations(encoder, layers, fit_images, sigma, "train", args)
        test = pooled_activations(encoder, layers, images, sigma, "test", args)
        for layer in layers:
            probe = linear_probe(train[layer], fit_labels.to(args.device), args.info.num_classes)
            rows.append({"sigma": sigma, "layer": layer, "width": probe.in_features, "n_train": len(fit_images), "n": len(images), "accuracy": accuracy(probe, test[layer], labels)})
            show(rows[-1])
    write_csv(args, "probe.csv", rows)

    curves = []
    for model in models + probed_teacher(args, images, (fit_images, fit_labels)):
        for eps in np.linspace(0, args.eps, EPS_POINTS + 1):
            adversarial = attack(model, images, labels, args, float(eps)) if eps else images
            curves.append({"name": model.name, "eps_255": float(255 * eps), "accuracy": accuracy(model.head, features_of(model, adversarial, args), labels)})
        show({"name": model.name, "clean": curves[-1 - EPS_POINTS]["accuracy"], "robust": curves[-1]["accuracy"]})
    write_csv(args, "probe_eps.csv", curves)

    figure, (axes,) = new_figure(1, 2, 5)
    for layer in layers:
        axes[0].plot(args.sigmas, [row["accuracy"] for row in rows if row["layer"] == layer], "o-", label=layer)
    axes[0].set(xscale="log", xticks=args.sigmas, xlabel="noise level sigma (images in [-1, 1])", ylabel="accuracy of a linear probe [%]", title="teacher's features, clean images")
    axes[0].set_xticklabels([f"{sigma:g}" for sigma in args.sigmas])
    axes[0].minorticks_off()
    for name in dict.fromkeys(row["name"] for row in curves):
        axes[1].plot([row["eps_255"] for row in curves if row["name"] == name], [row["accuracy"] for row in curves if row["name"] == name], "o-", label=name)
    axes[1].set(xlabel="eps [1/255]", ylabel="accuracy [%]", title=f"PGD-{args.steps}; the teacher's probe under fixed noise", ylim=(0, None))
    for ax in axes:
        ax.legend(fontsize=8)
    save_figure(args, "probe.png", figure)


def choose_layers(encoder, asked):
    """The blocks to probe: those asked for, else the last at each resolution and the bottleneck. Raises InputError for an unknown one."""
    names = [f"{part}.{name}" for part in ("enc", "dec") for name in getattr(encoder.model, part) if not name.endswith("_aux_residual")]
    for name in asked or ():
        if name not in names:
            raise InputError(f"--layers {name}: the teacher has {', '.join(names)} (as far as --teacher-layer)")
    last = {name.split("_")[0]: name for name in names if name.startswith("enc.")}  # by resolution
    return list(dict.fromkeys(asked or [*last.values(), *(name for name in names if name.startswith("dec."))]))


@torch.no_grad()
def pooled_activations(encoder, layers, images, sigma, purpose, args):
    """Outputs of several blocks in one pass, averaged over positions: {layer: [N, C]}. Noise differs from image to image; no labels."""
    found, hooks = {layer: [] for layer in layers}, []
    for layer in layers:
        part, name = layer.split(".")
        hooks.append(getattr(encoder.model, part)[name].register_forward_hook(lambda module, inputs, output, layer=layer: found[layer].append(output.mean(dim=(2, 3)))))
    try:
        for piece in pieces(args, len(images), f"teacher at sigma {sigma:g}"):
            x = images[piece].to(args.device)
            encoder(x, None, sigma, torch.randn(x.shape, generator=generator(args.seed, piece.start, purpose)).to(args.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(outputs) for layer, outputs in found.items()}


def run_sae(args):
    """Fig. 6: how well k of many latents explain a penultimate feature, on images that the autoencoder was not fitted to."""
    models = load_models(args)
    (images, _), (fit_images, _) = load_data(args)
    rows = []
    for model in models:
        train, test = features_of(model, fit_images, args), features_of(model, images, args)
        mean, latents = train.mean(dim=0), args.expansion * train.shape[1]
        if max(args.ks) > latents:
            raise InputError(f"--ks {max(args.ks)}: {model.name} has {train.shape[1]} features, so there are {latents} latents, expected no more")
        scale = (train - mean).square().mean().sqrt()  # one number for all: the loss is relative, but Adam's steps are not
        train, test = (train - mean) / scale, (test - mean) / scale
        for k in args.ks:
            sae = train_sae(train, latents, k, args.sae_steps, args.seed)
            dead = (sae.encode(train) == 0).all(dim=0).double().mean().item()
            rows.append({"name": model.name, "k": k, "latents": latents, "n_train": len(train), "n": len(test), "normalised_loss": normalised_loss(sae(test), test),
                         "normalised_loss_train": normalised_loss(sae(train), train), "dead_latents": dead})
            show(rows[-1])
    write_csv(args, "sae.csv", rows)

    figure, ((ax,),) = new_figure(1, 1, 5.5, 4)
    for i, name in enumerate(args.names):
        mine = [row for row in rows if row["name"] == name]
        ax.plot([row["k"] for row in mine], [row["normalised_loss"] for row in mine], "o-", color=f"C{i}", label=f"{name}, held out")
        ax.plot([row["k"] for row in mine], [row["normalised_loss_train"] for row in mine], ":", color=f"C{i}", label=f"{name}, fitted")
    ax.set(xscale="log", xticks=args.ks, ylim=(0, None), xlabel="active latents k", ylabel="normalised reconstruction loss", title=f"TopK sparse autoencoder, {args.expansion} latents per dimension")
    ax.set_xticklabels(args.ks)
    ax.minorticks_off()
    ax.legend()
    save_figure(args, "sae.png", figure)


def run_dims(args):
    """Fig. 7 and Table 3: accuracy on the first k principal components of clean features, and how many are needed.

    Components come from training images. The adversary attacks the whole network and does not know of the projection, so what is gained by leaving
    components out says where this adversary acts; it is no defence.
    """
    models = load_models(args)
    (images, labels), (fit_images, _) = load_data(args)
    rows, curves = [], []
    for model in models:
        mean, components = principal_components(features_of(model, fit_images, args))
        project = lambda x: accuracy_by_rank(model.head, features_of(model, x, args), labels.to(args.device), mean, components)
        clean, robust = project(images), project(attack(model, images, labels, args))
        rows.append({"name": model.name, "n_train": len(fit_images), "n": len(images), "features": len(mean), "cls_95": classification_dimension(clean, 0.95),
                     "cls_99": classification_dimension(clean, 0.99), "robust": robust_dimension(robust), "clean_accuracy": clean[-1].item(), "robust_accuracy": robust[-1].item(),
                     "best_robust_accuracy": robust.max().item()})
        show(rows[-1])
        curves += [{"name": model.name, "components": k, "clean_accuracy": a, "robust_accuracy": b} for k, (a, b) in enumerate(zip(clean.tolist(), robust.tolist()))]
    write_csv(args, "dims.csv", rows)
    write_csv(args, "dims_accuracy.csv", curves)

    figure, (axes,) = new_figure(1, 2, 5)
    for i, row in enumerate(rows):
        mine = [curve for curve in curves if curve["name"] == row["name"] and curve["components"]]
        for ax, kind, marks in ((axes[0], "clean", ("cls_95", "cls_99")), (axes[1], "robust", ("robust",))):
            values = [curve[f"{kind}_accuracy"] for curve in mine]
            ax.plot([curve["components"] for curve in mine], values, color=f"C{i}", label=f"{row['name']}: {', '.join(str(row[mark]) for mark in marks)}")
            for mark in marks:
                ax.plot(max(1, row[mark]), values[max(1, row[mark]) - 1], "o", color=f"C{i}")
    axes[0].set(title="clean; points: 95 % and 99 % of the full accuracy")
    axes[1].set(title=f"{attack_name(args)}; point: the best")
    for ax in axes:
        ax.set(xscale="log", xlabel="principal components of the clean features", ylabel="accuracy [%]", ylim=(0, None))
        ax.legend()
    save_figure(args, "dims.png", figure)


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
    save_figure(args, "curves.png", figure)


COMMANDS = {"uniformity": run_uniformity, "cknna": run_cknna, "spectrum": run_spectrum, "probe": run_probe, "sae": run_sae, "dims": run_dims, "curves": run_curves}


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    for name in OUTPUTS[args.command]:
        if (Path(args.out) / name).exists():
            raise InputError(f"--out {args.out}: {name} is there already, expected a folder without it; nothing is overwritten")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    Path(args.out).mkdir(parents=True, exist_ok=True)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as problem:
        print(f"error: {str(problem).splitlines()[0]} Use a smaller --batch-size.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
