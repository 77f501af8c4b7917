"""What do the features of robust classifiers look like? The analyses of arXiv 2602.19931, a command each.

    python experiments/analyze_representations.py COMMAND at/best.pt dra/best.pt --teacher EDM.pkl

    uniformity  Fig. 4, 5      are features both stable under attack and different from image to image?
    cknna       Fig. 1, 9      do classifier and diffusion model find the same images alike?
    spectrum    Fig. 3a, 10    which spatial frequencies fool the network?
    probe       Fig. 3b        which noise level and block of the diffusion model know the class?
    sae         Fig. 6         do features split into a few readable ones? (without --teacher)
    dims        Fig. 7, Tab. 3 how many directions of feature space are used? (without --teacher)
    curves      -              how did training go? (takes run folders instead of checkpoints)
    sweep       Fig. 8         what does lambda, the weight of the alignment, do? (takes run folders)

The paper's story in one paragraph: adversarial training makes features stable but poor, while the features of
a diffusion model are diverse and, without ever having seen an attack, mildly robust. Pulling the classifier's
features towards them (DRA) should therefore give back some of the lost diversity. These commands put numbers
on each step. "Features" are always the penultimate ones, which the last linear layer turns into logits.

A checkpoint is anything that eval_autoattack.py takes: ours, DM-AT's or RobustBench's, and others through
--script (robustbench_models.py is an example). EDM.pkl is the teacher of train_cifar.py. Each command writes
its settings, tables and a figure to --out (COMMAND.json, .csv, .png). Robust accuracy here comes from a
plain PGD, which is good enough to compare networks side by side and too weak to quote: for that there is
AutoAttack.

Fig. 3 and 4 also have a standard classifier, and an EDM that was trained without labels:

    python train_cifar.py --attack-steps 0 --beta 0 --dra-weight 0 --out runs/standard
    UNCOND=https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl
    for COMMAND in uniformity spectrum probe; do
        python experiments/analyze_representations.py $COMMAND runs/standard/best.pt at/best.pt \
            --teacher $UNCOND --out analysis/standard
    done

Fig. 8 is a sweep on CIFAR-100 (section 5.6). These values of lambda are our choice:

    for LAMBDA in 0 0.25 0.5 1 2 4; do
        python train_cifar.py --dataset cifar100 --arch wrn-28-10 --synthetic 1m.npz --batch-size 512 \
            --epochs 400 --dra-weight $LAMBDA --out runs/lambda-$LAMBDA
        python eval_autoattack.py runs/lambda-$LAMBDA/best.pt
    done
    python experiments/analyze_representations.py sweep runs/lambda-*
"""
import argparse
import csv
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import ImageFolder
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from edm_encoder import load_edm_encoder
from eval_autoattack import (BENCHMARKS, InputError, load_classifier, load_images, read_checkpoint,
                             read_imagenet)
from train_cifar import HOLDOUT, SELECTION_STEPS, fraction, generator, pgd

plt.switch_backend("agg")  # draws into files, so no display is needed

# ------------------------------------------------------------------------------------------------------------
# Settings. "chosen" marks numbers that are ours, because the paper's text leaves them open.

ATTACKING = ("uniformity", "cknna", "spectrum", "probe", "dims")  # commands that attack the networks
ASKING = ("uniformity", "cknna", "spectrum", "probe")  # commands that look at the diffusion teacher, too
READING = ("curves", "sweep")  # commands that read what training runs left, and compute nothing
# Some commands fit something (a linear probe, an autoencoder, principal components): on this many images.
FITTING = {"uniformity": 5000, "spectrum": 5000, "probe": 5000, "sae": 50_000, "dims": 5000}
PROBE_DECAY = 1e-3  # weight of the linear probe's squared weights, on standardised features (chosen)
PROBE_ITERATIONS = 300  # of L-BFGS, at most; the problem is convex, so more would change nothing
EPS_POINTS = 8  # `probe` attacks with this many values of eps, evenly spaced up to --eps
SAE_BATCH, SAE_RATE = 512, 1e-3  # features per step, and Adam's learning rate (chosen)
LOWEST = {  # what a number on the command line has to be at least
    "n": 10, "n_train": 10, "batch_size": 1, "seed": 0, "eps": 1e-6, "steps": 1, "teacher_sigma": 1e-6,
    "k": 1, "sigmas": 1e-6, "ks": 1, "expansion": 1, "sae_steps": 1,
}


def add_flags(add, command):
    """Declare the flags of one command. add: its parser's `add_argument`."""
    add("--out", default="analysis", help="folder for settings, tables and figure")
    add("--names", nargs="+", help="of checkpoints or runs, in place of their folders and files")
    if command in READING:
        add("runs", nargs="+", help="folders of training runs (curves: or their log.csv files)")
        return
    alone = command in ("uniformity", "spectrum", "probe")  # these make sense for the teacher alone, too
    add("checkpoints", nargs="*" if alone else "+", help="of our scripts, DM-AT or RobustBench")
    add("--arch", nargs="+", help="one for all or one each; taken from the checkpoint if it says so")
    add("--dataset", choices=list(BENCHMARKS), help="taken from the checkpoint if it says so (else cifar10)")
    add("--script", nargs="+", help="whose build_model makes the networks; one for all or one each")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which of a checkpoint's two")
    add("--data-dir", default="data", help="as in eval_autoattack.py")
    add("--image-list", help="ImageNet: as in eval_autoattack.py")
    add("--n", type=int, default=1000, help="test images: the first ones (ImageNet: drawn from those listed)")
    add("--batch-size", type=int, default=250, help="images computed together")
    add("--seed", type=int, default=0, help="of every random draw")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cuda", "cpu"], default=device, help="where to compute")
    if command in ATTACKING:
        add("--eps", type=fraction, help="largest change of a pixel in [0, 1]; left out: RobustBench's")
        add("--steps", type=int, default=20, help="of the PGD attack, each of size eps / 4")
    if command in ASKING:
        add("--teacher", required=command in ("cknna", "probe"), help="EDM .pkl, path or URL")
        add("--teacher-sigma", type=float, default=0.06, help="its noise level, for images in [-1, 1]")
        add("--teacher-layer", default="dec.8x8_in1", help="the block whose output is the feature")
    if command in FITTING:
        add("--n-train", type=int, default=FITTING[command], help="training images, for what is fitted")
    if command == "cknna":
        add("--k", type=int, default=10, help="nearest neighbours (10: Huh et al.)")
    if command == "probe":
        add("--sigmas", type=float, nargs="+", default=[0.02, 0.06, 0.2, 0.5], help="of the grid")
        add("--layers", nargs="+", help="of the grid; left out: the last at each resolution")
    if command == "sae":
        add("--ks", type=int, nargs="+", default=[4, 8, 16, 32], help="active latents per image")
        add("--expansion", type=int, default=8, help="latents per feature dimension")
        add("--sae-steps", type=int, default=2000, help="training steps of each autoencoder")


def parse_args(argv=None):
    """Command line -> Namespace. A bad flag is argparse's error: usage text, one line, exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, run in COMMANDS.items():
        own = commands.add_parser(command, help=run.__doc__.splitlines()[0], allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_flags(own.add_argument, command)
    args = parser.parse_args(argv)

    for name, lowest in LOWEST.items():
        value = getattr(args, name, None)  # not every command has every flag
        if value is not None and not np.min(value) >= lowest:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {lowest:g}")

    reading = args.command in READING
    paths = args.runs if reading else args.checkpoints
    folders = [Path(path.removesuffix("log.csv")).resolve() for path in paths]
    args.names = args.names or [path.name if reading else f"{path.parent.name}/{path.stem}"
                                for path in folders]
    if not len(set(args.names)) == len(args.names) == len(paths):
        parser.error(f"--names: expected {len(paths)}, all different, got {' '.join(args.names)}")
    if reading:
        return args
    if not paths and not args.teacher:
        parser.error(f"{args.command}: expected a checkpoint, --teacher FILE, or both")
    if args.command in ("uniformity", "spectrum") and not args.teacher:
        args.n_train = 0  # they fit nothing but the teacher's probe
    for flag in ("arch", "script"):
        given = getattr(args, flag) or [None]
        if len(given) not in (1, len(paths)):
            parser.error(f"--{flag}: gives {len(given)}, expected 1 or {len(paths)}, one for each checkpoint")
        setattr(args, flag, given * len(paths) if len(given) == 1 else given)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available here; use --device cpu")
    return args


# ------------------------------------------------------------------------------------------------------------
# What every analysis starts from: networks to compare, test images to judge them on, other images to fit on.


def load(args):
    """The material of a command: (classifiers, teacher's encoder, test pair, pair to fit on).

    Classifiers are frozen, in evaluation mode, on args.device, each with `name` and `info`; the encoder is
    None where no teacher is named. A pair is (images, labels), see `load_data`. What the command line left
    open is filled in: args.info (data set and classes), args.eps, and in args.n and args.n_train how many
    images there really are. Raises InputError for a wrong file and for checkpoints that cannot be compared.
    """
    models = [load_classifier(path, arch, args.dataset, script, args.weights).to(args.device)
              for path, arch, script in zip(args.checkpoints, args.arch, args.script)]
    for path, model, name in zip(args.checkpoints, models, args.names):
        model.name = name
        if judged_on(model.info) != judged_on(models[0].info):
            raise InputError(f"{path}: was trained on another data set, other classes or another image size "
                             f"than {args.checkpoints[0]}, expected the same")
    dataset = args.dataset or "cifar10"
    alone = SimpleNamespace(dataset=dataset, num_classes=BENCHMARKS[dataset].classes, args={})
    args.info = models[0].info if models else alone
    if args.command in ATTACKING and args.eps is None:
        args.eps = BENCHMARKS[args.info.dataset].eps
    test, fit = load_data(args)
    args.n = len(test[1])
    if fit:
        args.n_train = len(fit[1])
    return models, load_teacher(args, test[0]) if args.command in ASKING else None, test, fit


def judged_on(info):
    """Everything that decides which test images a checkpoint is judged on, and what its outputs mean."""
    settings = info.args
    seed = settings.get("seed") if settings.get("smoke") is True else None  # a smoke run draws its images
    return info.dataset, info.num_classes, seed, settings.get("image_size"), settings.get("classes")


def load_data(args):
    """((test images, labels), (images to fit on, labels)), the second None where nothing is fitted.

    Images float32 [N, 3, H, W] in [0, 1], labels int64 [N], on the CPU. What is fitted must not have seen the
    images it is judged on, so --n test images are for the one and --n-train training images for the other.
    CIFAR's are the first ones. ImageNet's files are sorted by class, and so its images are drawn; those to
    fit on stay on the disk.
    """
    def read(n, split):
        source = SimpleNamespace(data_dir=args.data_dir, image_list=args.image_list, n=n)
        return load_images(source, args.info, split)
    n_train = getattr(args, "n_train", 0)
    if args.info.dataset != "imagenet":
        return read(args.n, "test"), read(n_train, "train") if n_train else None
    images, labels = read(None, "test")
    drawn = torch.randperm(len(images), generator=generator(args.seed, 0, "test images"))[:args.n]
    fit = ImagesOnDisk(args) if n_train else None
    return (images[drawn], labels[drawn]), (fit, fit.labels) if n_train else None


class ImagesOnDisk:
    """--n-train of ImageNet's training images, read whenever a batch is asked for: images[10:20] is float32
    [10, 3, H, W] in [0, 1]. So the features of each network take a pass over the files. 100,000 images in
    memory would be 60 GB."""

    def __init__(self, args):
        self.size = args.info.args.get("image_size", 224)
        files = ImageFolder(Path(args.data_dir, "train")).samples
        drawn = torch.randperm(len(files), generator=generator(args.seed, 0, "training images"))
        self.paths, labels = zip(*[files[i] for i in drawn[:args.n_train]])
        self.labels = torch.tensor(labels)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, batch):
        with ThreadPoolExecutor() as pool:  # decoding does not hold Python's lock
            images = pool.map(lambda path: read_imagenet(path, self.size), self.paths[batch])
            return torch.stack(list(images))


def load_teacher(args, images):
    """The frozen EDM encoder on args.device, or None where --teacher is not given. Raises InputError."""
    if args.teacher is None:
        return None
    try:
        encoder = load_edm_encoder(args.teacher, args.teacher_layer).to(args.device)
    except ValueError as error:
        raise InputError(f"--teacher {error}") from None
    if images.shape[2] != encoder.img_resolution:
        raise InputError(f"--teacher {args.teacher}: made for {encoder.img_resolution} px images, "
                         f"expected {images.shape[2]}")
    if encoder.label_dim:
        print(f"{args.teacher}: a class-conditional model, asked without a label; it may not know that case")
    return encoder


def batches(args, count, what):
    """Slices of --batch-size that cover `count` images, with a progress bar."""
    slices = [slice(start, start + args.batch_size) for start in range(0, count, args.batch_size)]
    return tqdm(slices, desc=what, disable=None, leave=False)


@torch.no_grad()
def features_of(model, images, args):
    """images [N, 3, H, W] in [0, 1] -> penultimate features [N, D] float32, on args.device."""
    return torch.cat([model.features(images[batch].to(args.device))
                      for batch in batches(args, len(images), "features")])


@torch.no_grad()
def accuracy(head, features, labels):
    """Percent of features [N, D] that the linear layer `head` puts into the class in labels [N]."""
    return 100 * (head(features).argmax(dim=1).cpu() == labels).double().mean().item()


def attack(model, images, labels, args, eps=None):
    """The paper's PGD (eq. 2) on the cross-entropy: --steps steps of eps / 4 from a random start (chosen).

    images [N, 3, H, W] in [0, 1], labels [N] -> x', same shape and range, max |x' - x| <= eps, on the CPU.
    The start depends on --seed and --batch-size alone, so all networks are attacked from the same points. The
    loss is a sum over images, so that the size of a batch does not scale the gradients.
    """
    eps, adversarial = args.eps if eps is None else eps, []
    for batch in batches(args, len(images), f"PGD-{args.steps}"):
        x, y = images[batch].to(args.device), labels[batch].to(args.device)
        uniform = torch.rand(x.shape, generator=generator(args.seed, batch.start, "attack")).to(args.device)
        start = (x + eps * (2 * uniform - 1)).clamp(0, 1)
        loss = lambda adv: F.cross_entropy(model(adv), y, reduction="sum")
        adversarial.append(pgd(loss, x, start, eps, eps / 4, args.steps).cpu())
    return torch.cat(adversarial)


def compare(args, model, images, labels):
    """Features of clean and attacked images, [N, D] each, and both accuracies in percent, by column name."""
    clean = features_of(model, images, args)
    attacked = features_of(model, attack(model, images, labels, args), args)
    return clean, attacked, {"clean_accuracy": accuracy(model.head, clean, labels),
                             "robust_accuracy": accuracy(model.head, attacked, labels)}


# ------------------------------------------------------------------------------------------------------------
# The diffusion teacher as one more classifier, so that it can be attacked and compared like the others.


class ProbedTeacher(nn.Module):
    """Diffusion encoder plus linear probe: `features`, `head`, and images -> logits, as our classifiers have.

    The encoder sees images through noise, and an attack on a network that is random looks weaker than it is
    (Athalye et al. 2018). So the noise is ONE fixed image, which makes the network a plain function of its
    input (section 4.1), and the attack goes through encoder and probe alike. No class label is given, since a
    label would be the answer.
    """

    def __init__(self, encoder, sigma, seed):
        super().__init__()
        self.encoder, self.sigma, self.head = encoder, sigma, None
        noise = torch.randn((1, 3, encoder.img_resolution, encoder.img_resolution),
                            generator=generator(seed, 0, "teacher noise"))
        self.register_buffer("noise", noise)  # a buffer, so that .to(device) takes it along

    def features(self, images):
        """images [B, 3, H, W] in [0, 1] -> diffusion features [B, D]."""
        return self.encoder(images, None, self.sigma, self.noise.expand_as(images))

    def forward(self, images):
        """images [B, 3, H, W] in [0, 1] -> logits [B, classes]."""
        return self.head(self.features(images))


def linear_probe(features, labels, classes):
    """How much of the class can be read off linearly? Features [N, D], labels [N] -> nn.Linear(D, classes).

    Multinomial logistic regression: minimises CE + PROBE_DECAY / 2 ||W||^2 by L-BFGS from zero. The features
    are standardised first, or a dimension with a small scale would be punished for the large weight that it
    needs. Afterwards the scaling is folded into weight and bias, so the probe takes features as they are. It
    is returned frozen.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)  # a dimension may be constant
    standard = (features - mean) / deviation  # [N, D]
    probe = nn.Linear(features.shape[1], classes).to(features.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=PROBE_ITERATIONS,
                                  line_search_fn="strong_wolfe")

    def closure():  # L-BFGS evaluates the objective several times per step
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(standard), labels) + PROBE_DECAY / 2 * probe.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    with torch.no_grad():  # W (f - mean) / deviation + b = (W / deviation) f + (b - (W / deviation) mean)
        probe.weight /= deviation
        probe.bias -= probe.weight @ mean
    return probe.requires_grad_(False)


def probed_teacher(args, encoder, fit):
    """[a ProbedTeacher with its head trained on `fit`], or [] without an encoder: to be added to a list."""
    if encoder is None:
        return []
    images, labels = fit
    teacher = ProbedTeacher(encoder, args.teacher_sigma, args.seed).to(args.device)
    features = features_of(teacher, images, args)
    teacher.head = linear_probe(features, labels.to(args.device), args.info.num_classes)
    teacher.name = f"teacher, sigma {args.teacher_sigma:g}"
    return [teacher]


# ------------------------------------------------------------------------------------------------------------
# Settings, tables and figures on disk.


def claim(args):
    """Write the settings to --out/COMMAND.json before anything is computed, and print a line of them.

    Results that are finished, or have other settings, are not overwritten: raises InputError. A command that
    was interrupted has left no figure yet and may be given again.
    """
    path = Path(args.out, f"{args.command}.json")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "device", "info")}
    text = json.dumps(settings, indent=2) + "\n"
    if path.with_suffix(".png").exists() or path.exists() and path.read_text() != text:
        raise InputError(f"{path}: is there already, finished or with other settings; choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if args.command not in READING:
        attacked = f", {attack_name(args)}" if args.command in ATTACKING else ""
        print(f"{args.command}: {args.info.dataset}, {args.weights} weights, {args.n} test images{attacked}")


def attack_name(args):
    """For titles: which attack."""
    return f"PGD-{args.steps}, eps {args.eps * 255:g}/255"


def record(rows, **row):
    """Add a row to a table and print it: some commands take long, and one can watch the numbers come in."""
    rows.append(row)
    print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in row.items()), flush=True)


def write_csv(args, name, rows):
    """A list of {column: value} -> --out/name. Floats get eight digits; what a row lacks stays empty."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with open(Path(args.out, name), "w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({key: f"{value:.8g}" if isinstance(value, float) else value
                            for key, value in row.items()})


def new_figure(rows, columns):
    """Figure and array of axes [rows, columns]."""
    size = (4.6 * columns, 3.6 * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def plot(ax, rows, x, y, style="o-", note="", by="name"):
    """Draw column y of a table over column x: a line (or point) of its own for each value of column `by`."""
    names = list(dict.fromkeys(row[by] for row in rows))
    for i, name in enumerate(names):
        points = [(row[x], row[y]) for row in rows if row[by] == name and y in row]
        if points:
            ax.plot(*zip(*points), style, color=f"C{i % 10}", label=f"{name}{note}")
            if len(names) <= 12:  # more would cover the points; they are in the table
                ax.legend(fontsize=8)


def log_axis(ax, values):
    """Make the horizontal axis logarithmic, with a tick in plain digits at each of these values."""
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(values, [f"{value:g}" for value in values])


def save_figure(args, figure):
    """Figure -> --out/COMMAND.png, the last thing that a command writes."""
    path = Path(args.out, f"{args.command}.png")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}, its tables and its settings")


# ------------------------------------------------------------------------------------------------------------
# uniformity: a good feature does not move when the image is attacked, and yet differs from image to image.


def unit(features):
    """Rows of [N, D] scaled to length 1, in float64: what counts are differences of nearly equal rows."""
    return F.normalize(features.double(), dim=1)


def alignment(features, positives):
    """How far the adversary moves a feature: mean ||f(x) - f(x')||^2 (Wang & Isola 2020, arXiv 2005.10242).

    features, positives [N, D], scaled to unit length here; row i of both belongs to image i. Returns a float,
    from 0 (nothing moves) to 4 (every feature is turned round). In the original, positives are two crops of
    an image; the paper takes image and adversarial image (section 4.1).
    """
    return (unit(features) - unit(positives)).square().sum(dim=1).mean().item()


def uniformity(features):
    """How evenly features fill the sphere: log mean_{i<j} exp(-2 ||f_i - f_j||^2) (Wang & Isola 2020).

    features [N, D], N at least 2, scaled to unit length here. Returns a float; lower is more even: 0 where
    all are the same, about -4 for random points in many dimensions, whose squared distance is 2.
    """
    return torch.pdist(unit(features)).square().mul(-2).exp().mean().log().item()


def run_uniformity(args):
    """Fig. 4 and 5: alignment and uniformity of features, next to clean and robust accuracy.

    The paper finds a trade-off (Fig. 4): adversarial training makes features stable and pays for it with
    diversity. Diffusion features are more stable than those of standard training and more diverse as well, so
    they are a direction to pull in, and DRA's classifiers do move that way (Fig. 5).

    Both metrics are given twice. A part that all features share makes unit vectors look alike and stable,
    whatever the rest does; "centred" subtracts the mean clean feature first. The paper leaves this open.
    """
    models, encoder, (images, labels), fit = load(args)
    claim(args)
    rows = []
    for model in models + probed_teacher(args, encoder, fit):
        clean, attacked, accuracies = compare(args, model, images, labels)
        mean = clean.mean(dim=0)
        record(rows, name=model.name, n=args.n,
               alignment=alignment(clean, attacked), uniformity=uniformity(clean),
               alignment_centred=alignment(clean - mean, attacked - mean),
               uniformity_centred=uniformity(clean - mean), **accuracies)
    write_csv(args, "uniformity.csv", rows)

    figure, (axes,) = new_figure(1, 3)
    for ax, suffix, title in ((axes[0], "", "features"), (axes[1], "_centred", "features, centred")):
        plot(ax, rows, "alignment" + suffix, "uniformity" + suffix, "o")
        ax.set(xlabel="alignment (right: more stable)", ylabel="uniformity (up: more diverse)", title=title)
        ax.invert_xaxis()  # as in the paper: better is up and to the right
        ax.invert_yaxis()
    plot(axes[2], rows, "clean_accuracy", "robust_accuracy", "o")
    axes[2].set(xlabel="clean accuracy [%]", ylabel="robust accuracy [%]", title=attack_name(args))
    save_figure(args, figure)


# ------------------------------------------------------------------------------------------------------------
# cknna: two networks with other widths and axes can still agree on which images are alike.


def unbiased_hsic(K, L):
    """Do two similarity matrices agree? Unbiased Hilbert-Schmidt criterion, HSIC (Song et al. 2012, eq. 5).

    (tr(K L) + 1'K1 1'L1 / ((m - 1)(m - 2)) - 2 / (m - 2) 1'K L 1) / (m (m - 3)), both diagonals set to zero.
    K, L [m, m], m at least 4. The plain estimate, which keeps the diagonals, is above zero even for unrelated
    features, since every image resembles itself.
    """
    m, K, L = len(K), K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)
    both = (K * L.T).sum() + K.sum() * L.sum() / ((m - 1) * (m - 2))
    return (both - 2 / (m - 2) * (K.sum(dim=0) @ L.sum(dim=1))) / (m * (m - 3))


def cknna(a, b, k=10):
    """CKNNA (Huh et al. 2024, arXiv 2405.07987): kernel alignment, restricted to common nearest neighbours.

    With the Gram matrices K and L of the unit-length features, and M[i, j] = 1 where j is among the k nearest
    neighbours of i in both K and L,

        A(K, L) = HSIC(M * K, M * L),        CKNNA = A(K, L) / (sqrt(A(K, K) A(L, L)) + 1e-6)

    a [N, D1], b [N, D2]: features of the same images, k < N. Returns a float: 1 where both networks agree,
    about 0 for unrelated features; rotating or scaling the features changes nothing. Only neighbours count,
    because how far apart a network puts two unrelated images means little.
    """
    def nearest(gram):  # [N, N], 1 where column j is one of the k images nearest to i, not counting i itself
        others = gram.clone().fill_diagonal_(-math.inf)
        return torch.zeros_like(gram).scatter_(1, others.topk(k, dim=1).indices, 1.0)

    def agreement(first, second):
        mask = nearest(first) * nearest(second)
        return unbiased_hsic(mask * first, mask * second)
    K, L = [unit(features) @ unit(features).T for features in (a, b)]
    return (agreement(K, L) / ((agreement(K, K) * agreement(L, L)).sqrt() + 1e-6)).item()


def run_cknna(args):
    """Fig. 1 and 9: likeness of a classifier's features to the diffusion model's, against its accuracy.

    The observation that started the paper: among RobustBench's models, those that are more robust resemble
    the diffusion model more (Fig. 1), although nothing in their training asked for it. Could that just be
    their better clean accuracy? Then they should also come to resemble a network of standard training. Fig. 9
    is that control: as all are compared with the first, too, give RobustBench's Standard as the FIRST
    checkpoint (and leave it out for Fig. 1, which has robust models only). Correlations are Pearson's.

    Raw and centred, as in `run_uniformity`. The diffusion model is asked without labels: given the label, its
    nearest neighbours would be images of the same class, and every good classifier would resemble it.
    """
    models, encoder, (images, labels), _ = load(args)
    if args.n <= args.k:
        raise InputError(f"--k {args.k}: there are {args.n} images, expected more than k")
    claim(args)
    target = features_of(ProbedTeacher(encoder, args.teacher_sigma, args.seed).to(args.device), images, args)
    rows, first = [], None
    for model in models:
        clean, _, accuracies = compare(args, model, images, labels)
        first = clean if first is None else first
        likeness = {}
        for column, other in (("cknna", target), ("cknna_first", first)):
            likeness[column] = cknna(clean, other, args.k)
            a, b = clean - clean.mean(dim=0), other - other.mean(dim=0)
            likeness[f"{column}_centred"] = cknna(a, b, args.k)
        record(rows, name=model.name, n=args.n, k=args.k, **likeness, **accuracies)
    write_csv(args, "cknna.csv", rows)

    figure, (axes,) = new_figure(1, 3)
    others = [{"name": models[0].name}, *rows[1:]]  # the first is not drawn; the others keep their colours
    panels = (("robust", "cknna", "the teacher", rows), ("clean", "cknna", "the teacher", rows),
              ("robust", "cknna_first", models[0].name, others))
    for ax, (kind, column, other, table) in zip(axes, panels):
        title = attack_name(args) if kind == "robust" else "clean images"
        for y, style, note in ((column, "o", ""), (f"{column}_centred", "x", ", centred")):
            plot(ax, table, f"{kind}_accuracy", y, style, note)
            points = [(row[f"{kind}_accuracy"], row[y]) for row in table if y in row]
            if len(points) > 2:  # two always lie on a line
                title += f"\ncorrelation{note} {torch.corrcoef(torch.tensor(points).T)[0, 1]:.2f}"
        ax.set(xlabel=f"{kind} accuracy [%]", ylabel=f"CKNNA with {other}, k = {args.k}", title=title)
    save_figure(args, figure)


# ------------------------------------------------------------------------------------------------------------
# spectrum: the perturbation that fools a network shows which spatial frequencies it listens to.


def frequency_map(signals):
    """Mean amplitude of each spatial frequency: [N, C, H, W] -> float64 [H, W], 0 waves at (H // 2, W // 2).

    |FFT| of every channel, averaged over channels and images (section 4.1). The transform is scaled to keep
    lengths ("ortho", chosen), so amplitudes keep the signal's unit, and a network with larger gradients has a
    brighter map. White noise of standard deviation s is flat at 0.89 s. Images go in pieces, to save memory.
    """
    total = sum(torch.fft.fft2(piece.double(), norm="ortho").abs().mean(dim=1).sum(dim=0)
                for piece in signals.split(100))
    return torch.fft.fftshift(total / len(signals))


def radial_profile(frequencies):
    """A map [H, W] from `frequency_map` -> its means over rings, [min(H, W) // 2 + 1].

    Ring r holds the frequencies of about r waves per image in any direction: from 0, the mean colour, to the
    finest that the pixels can show.
    """
    height, width = frequencies.shape
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    ring = (rows[:, None] ** 2 + columns ** 2).double().sqrt().round().long()  # [H, W]
    radii = range(min(height, width) // 2 + 1)
    return torch.stack([frequencies[ring == radius].mean() for radius in radii])


def input_gradients(model, images, labels, args):
    """Gradient of each image's cross-entropy by its pixels, [N, 3, H, W] on the CPU: where attacks begin."""
    gradients = []
    for batch in batches(args, len(images), "gradients"):
        x = images[batch].to(args.device).requires_grad_()
        loss = F.cross_entropy(model(x), labels[batch].to(args.device), reduction="sum")
        gradients.append(torch.autograd.grad(loss, [x])[0].cpu())
    return torch.cat(gradients)


def run_spectrum(args):
    """Fig. 3a and 10: spatial frequencies of PGD perturbations and of input gradients.

    Standard networks are sensitive to fine patterns, high frequencies; adversarial training shifts them to
    coarse ones. Pre-training that reconstructs pixels (MAE) is known to favour the fine ones, which would
    speak against diffusion features. Fig. 3a says that it does not apply: their spectrum resembles that of a
    robust network. Later checkpoints are compared with the first: "dra - at" is blue where alignment made the
    network less sensitive. Fig. 10 is DM-AT and, against it, alignment with either of two teachers: the
    diffusion model, and a classifier of noisy images (ablate_teacher.py), which raises the sensitivity to
    middle and high frequencies. Give the three checkpoints in this order.
    """
    models, encoder, (images, labels), fit = load(args)
    claim(args)
    maps = {}  # (network, kind of signal): [H, W]
    for model in models + probed_teacher(args, encoder, fit):
        maps[model.name, "perturbation"] = frequency_map(attack(model, images, labels, args) - images)
        maps[model.name, "gradient"] = frequency_map(input_gradients(model, images, labels, args))
    names = [model.name for model in models]
    differences = {(f"{name} - {names[0]}", kind): maps[name, kind] - maps[names[0], kind]
                   for name in names[1:] for kind in ("perturbation", "gradient")}
    profiles, pixels = [], []
    for (name, kind), map_ in (maps | differences).items():
        profiles += [{"name": name, "of": kind, "waves_per_image": radius, "amplitude": value}
                     for radius, value in enumerate(radial_profile(map_).tolist())]
        height, width = map_.shape
        pixels += [{"name": name, "of": kind, "vertical": i - height // 2, "horizontal": j - width // 2,
                    "amplitude": map_[i, j].item()} for i in range(height) for j in range(width)]
    write_csv(args, "spectrum.csv", profiles)
    write_csv(args, "spectrum_map.csv", pixels)
    draw_spectrum(args, maps, differences, profiles)


def draw_spectrum(args, maps, differences, profiles):
    """A row for perturbations, one for gradients: the networks' maps, their differences, means over rings."""
    figure, axes = new_figure(2, len(maps | differences) // 2 + 1)
    for row, kind in zip(axes, ("perturbation", "gradient")):
        # Amplitudes span orders of magnitude, so colours are logarithmic, and the same for all networks.
        logs = {name: map_.clamp(min=1e-12).log10() for (name, of), map_ in maps.items() if of == kind}
        changes = {name: map_ for (name, of), map_ in differences.items() if of == kind}
        top = max(map_.max() for map_ in logs.values())
        most = max([1e-12, *(map_.abs().max() for map_ in changes.values())])
        for ax, (name, map_) in zip(row, (logs | changes).items()):
            half, size = len(map_) // 2 + 0.5, len(map_)  # frequency 0 is the middle of a pixel
            colours = {"vmin": top - 3, "vmax": top}
            if name in changes:
                colours = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
            picture = ax.imshow(map_.numpy(), extent=(-half, size - half, size - half, -half), **colours)
            figure.colorbar(picture, ax=ax, label="difference" if name in changes else "log10 amplitude")
            ax.set(title=f"{name}\n{kind}", xlabel="horizontal [waves per image]", ylabel="vertical")
        plot(row[-1], [line for line in profiles if line["of"] == kind and line["name"] in logs],
             "waves_per_image", "amplitude", "-")
        row[-1].set(title=f"mean over directions\n{kind}", yscale="log", xlabel="waves per image",
                    ylabel="amplitude")
    save_figure(args, figure)


# ------------------------------------------------------------------------------------------------------------
# probe: which noise level and block of the diffusion model to align with, and how robust its features are.


def choose_layers(encoder, asked):
    """The blocks to probe: those asked for, else the encoder's last at each resolution, and the bottleneck.

    Names are those of --teacher-layer. Raises InputError for one that the network does not have.
    """
    names = [f"{part}.{name}" for part in ("enc", "dec") for name in getattr(encoder.model, part)]
    for name in asked or ():
        if name not in names:
            raise InputError(f"--layers {name}: the teacher has {', '.join(names)} (up to --teacher-layer)")
    last = {name.split("_")[0]: name for name in names if name.startswith("enc.")}  # one for each resolution
    bottleneck = [name for name in names if name.startswith("dec.")]
    return list(dict.fromkeys(asked or [*last.values(), *bottleneck]))


@torch.no_grad()
def pooled_activations(encoder, layers, images, sigma, args):
    """Outputs of several blocks in one pass, averaged over positions: {layer: [N, C]}, without labels.

    Nothing is attacked here, so each image gets noise of its own, as in the training of the diffusion model.
    """
    found, hooks = {layer: [] for layer in layers}, []
    for layer in layers:
        part, name = layer.split(".")
        keep = lambda _module, _inputs, output, layer=layer: found[layer].append(output.mean(dim=(2, 3)))
        hooks.append(getattr(encoder.model, part)[name].register_forward_hook(keep))
    for batch in batches(args, len(images), f"teacher at sigma {sigma:g}"):
        x = images[batch].to(args.device)
        noise = torch.randn(x.shape, generator=generator(args.seed, batch.start, "grid noise"))
        encoder(x, None, sigma, noise.to(args.device))
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(outputs) for layer, outputs in found.items()}


def run_probe(args):
    """Fig. 3b: linear probes of the diffusion model, over noise levels and blocks, and under attack.

    First a grid: what does a linear probe make of each block at each noise level? A little noise helps and
    much destroys, so there is a best level (section 3, after Xiang et al. 2023), and this is how to choose
    --teacher-sigma and --teacher-layer. It is scored on training images that the probe was not fitted to (the
    first 1,024, as in train_cifar.py, but at most a fifth): test images must not take part in a choice.

    Then accuracy against eps for the teacher and the classifiers: diffusion features withstand small
    perturbations better than a standard network's, but not large ones; to be robust they still need
    adversarial training.
    """
    models, encoder, (images, labels), (fit_images, fit_labels) = load(args)
    layers, held = choose_layers(encoder, args.layers), min(HOLDOUT, len(fit_labels) // 5)
    claim(args)
    grid, curves = [], []
    for sigma in sorted(args.sigmas):
        features = pooled_activations(encoder, layers, fit_images, sigma, args)
        for layer in layers:
            fitted, kept = features[layer][held:], features[layer][:held]
            probe = linear_probe(fitted, fit_labels[held:].to(args.device), args.info.num_classes)
            record(grid, sigma=sigma, layer=layer, width=probe.in_features, n_train=len(fitted), n=held,
                   accuracy=accuracy(probe, kept, fit_labels[:held]))
    write_csv(args, "probe.csv", grid)

    for model in models + probed_teacher(args, encoder, (fit_images, fit_labels)):
        for eps in np.linspace(0, args.eps, EPS_POINTS + 1):
            adversarial = attack(model, images, labels, args, float(eps)) if eps else images
            correct = accuracy(model.head, features_of(model, adversarial, args), labels)
            record(curves, name=model.name, n=args.n, eps_255=float(255 * eps), accuracy=correct)
    write_csv(args, "probe_eps.csv", curves)

    figure, (axes,) = new_figure(1, 2)
    plot(axes[0], grid, "sigma", "accuracy", by="layer")
    axes[0].set(xlabel="noise level sigma, for images in [-1, 1]", ylabel="accuracy [%]",
                title=f"probes of the teacher, {held} held-out images")
    log_axis(axes[0], args.sigmas)
    plot(axes[1], curves, "eps_255", "accuracy")
    axes[1].set(xlabel="eps [1/255]", ylabel="accuracy [%]", ylim=(0, None), title=f"PGD-{args.steps}")
    save_figure(args, figure)


# ------------------------------------------------------------------------------------------------------------
# sae: can a feature be written as a sum of a few directions out of many?


class TopKSAE(nn.Module):
    """Sparse autoencoder that keeps the k largest latents (Gao et al. 2025, arXiv 2406.04093, section 2.3).

        z = ReLU(TopK(W_enc (x - b_pre) + b_enc)),        x^ = W_dec z + b_pre,        loss ||x - x^||^2

    There are many more latents than feature dimensions, but each image may use k of them only. Columns of
    W_dec have length 1, else latents could shrink and their columns grow; W_enc starts as the transpose of
    W_dec. The original also revives latents that never fire, with a second loss; here they are only counted.
    (b_enc and ReLU stand in their code.)
    """

    def __init__(self, width, latents, k, random):
        super().__init__()
        self.k = k
        directions = F.normalize(torch.randn(latents, width, generator=random), dim=1)
        self.decoder = nn.Parameter(directions)  # W_dec transposed, [latents, width]
        self.encoder = nn.Parameter(directions.clone())  # W_enc, [latents, width]
        self.latent_bias, self.bias = nn.Parameter(torch.zeros(latents)), nn.Parameter(torch.zeros(width))

    def encode(self, x):
        """x [B, width] -> z [B, latents], of which at most k in a row are not 0."""
        largest = ((x - self.bias) @ self.encoder.T + self.latent_bias).topk(self.k, dim=1)
        silent = torch.zeros(len(x), len(self.encoder), device=x.device)
        return silent.scatter(1, largest.indices, largest.values.relu())

    def forward(self, x):
        """x [B, width] -> x^ [B, width]."""
        return self.encode(x) @ self.decoder + self.bias


def train_sae(features, latents, k, steps, seed):
    """Fit a TopKSAE to features [N, D] and return it, frozen. Adam, rate falling to 0 over the last fifth."""
    random = generator(seed, k, "sae")
    sae = TopKSAE(features.shape[1], latents, k, random).to(features.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=SAE_RATE)
    for step in tqdm(range(steps), desc=f"sparse autoencoder, k = {k}", disable=None, leave=False):
        x = features[torch.randint(len(features), (SAE_BATCH,), generator=random).to(features.device)].float()
        optimizer.param_groups[0]["lr"] = SAE_RATE * min(1, 5 * (1 - step / steps))
        optimizer.zero_grad()
        (sae(x) - x).square().sum(dim=1).mean().backward()
        optimizer.step()
        with torch.no_grad():
            sae.decoder.copy_(F.normalize(sae.decoder, dim=1))
    return sae.requires_grad_(False).eval()


def normalised_loss(reconstruction, features):
    """Squared error, relative to that of the mean feature (Gao et al. 2025). [N, D] twice -> float.

    0 is perfect and 1 is useless, whatever the scale of the features, so networks can be compared.
    """
    spread = (features.mean(dim=0) - features).square().sum()
    return ((reconstruction - features).square().sum() / spread).item()


def run_sae(args):
    """Fig. 6: how well k active latents of a sparse autoencoder explain a feature.

    Superposition is the idea that a network packs more concepts into a feature than it has dimensions, along
    directions that are not orthogonal; adversaries may exploit the interference between them (section 5.4).
    Where a few directions at a time suffice, the features are easier to disentangle, and the loss is lower.
    The paper finds it lower with synthetic images and lower again with DRA. It is measured on test images;
    the loss on the images fitted to and the share of dead latents, which never fire, tell whether an
    autoencoder is well trained.
    """
    models, _, (images, _), (fit_images, _) = load(args)
    for model in models:
        latents = args.expansion * features_of(model, images[:1], args).shape[1]
        if max(args.ks) > latents:
            raise InputError(f"--ks {max(args.ks)}: {model.name} would have {latents} latents, not so many")
    claim(args)
    rows = []
    for model in models:
        train, test = features_of(model, fit_images, args), features_of(model, images, args)
        # The loss does not depend on the features' scale, but Adam's steps do. One number for all dimensions:
        # their relative sizes are a part of what is to be explained. Then float16 is precise enough to keep.
        mean, scale = train.mean(dim=0), (train - train.mean(dim=0)).square().mean().sqrt()
        train, test = ((train - mean) / scale).half(), (test - mean) / scale
        for k in sorted(args.ks):
            sae = train_sae(train, args.expansion * train.shape[1], k, args.sae_steps, args.seed)
            # In pieces: the codes of all training images at once would fill the memory.
            fired = torch.stack([(sae.encode(part.float()) > 0).any(dim=0)
                                 for part in train.split(SAE_BATCH)]).any(dim=0)
            rebuilt = torch.cat([sae(part.float()) for part in train.split(SAE_BATCH)])
            record(rows, name=model.name, k=k, latents=len(fired), n_train=args.n_train, n=args.n,
                   normalised_loss=normalised_loss(sae(test), test),
                   normalised_loss_train=normalised_loss(rebuilt, train.float()),
                   dead_latents=(~fired).double().mean().item())
    write_csv(args, "sae.csv", rows)

    figure, ((ax,),) = new_figure(1, 1)
    plot(ax, rows, "k", "normalised_loss", note=", test images")
    plot(ax, rows, "k", "normalised_loss_train", ":", note=", images fitted to")
    ax.set(xlabel="active latents k", ylabel="normalised reconstruction loss", ylim=(0, None))
    log_axis(ax, args.ks)
    save_figure(args, figure)


# ------------------------------------------------------------------------------------------------------------
# dims: how many directions of feature space does the classifier need, and which ones does the adversary use?


def principal_components(features):
    """PCA of features [N, D] (section 5.5, after Feng et al. 2022): mean [D] and components [D, D], float64.

    The components are the columns, in the order of falling variance: eigenvectors of the sum over images of
    (f - mean) (f - mean)'. eigh returns them in the order of rising eigenvalues, hence the flip.
    """
    mean = features.double().mean(dim=0)
    centred = features.double() - mean
    return mean, torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)


@torch.no_grad()
def accuracy_by_rank(head, features, labels, mean, components):
    """Accuracy in percent with only k principal components left, for k = 0, ..., D: float64 [D + 1].

    Before the head, f becomes mean + V_k V_k' (f - mean), with V_k the first k components. features [N, D],
    labels [N]; mean and components come from clean features even where `features` are adversarial (section
    5.5). The last entry is the accuracy of the features as they are, without the rounding of a projection.
    """
    coefficients = (features.double() - mean) @ components  # [N, D]
    projected, accuracies = mean.expand(features.shape).clone(), []
    for k in range(components.shape[1]):
        accuracies.append(100 * (head(projected.float()).argmax(dim=1) == labels).double().mean())
        projected += coefficients[:, k, None] * components[:, k]
    accuracies.append(100 * (head(features).argmax(dim=1) == labels).double().mean())
    return torch.stack(accuracies)


def classification_dimension(accuracy, share):
    """CLS-q dimension (Feng et al. 2022, arXiv 2206.06072): the least k that keeps `share` of full accuracy.

    accuracy [D + 1] from `accuracy_by_rank`; share is 0.95 or 0.99 in Table 3. Returns an int.
    """
    enough = accuracy >= share * accuracy[-1] - 1e-9  # without 1e-9, 28.5 would be less than 0.95 * 30.0
    return int(enough.nonzero()[0])


def robust_dimension(accuracy):
    """The (least) k with the highest accuracy on adversarial images (section 5.5, Table 3). [D + 1] -> int.

    The top of a flat curve is hard to place: with 1,000 images, 1.5 points of accuracy are within chance.
    """
    return int(accuracy.argmax())


def run_dims(args):
    """Fig. 7 and Table 3: accuracy on the first k principal components, and how many of them are needed.

    Clean accuracy rises with k and then stays. Robust accuracy rises and falls again: the adversary pushes
    features along minor components, and leaving those out undoes a part of its work (Fig. 7). Table 3 gives,
    for AT, 9 (CLS-95), 14 (CLS-99) and 9 (robust) dimensions, and with DRA 15, 42 and 22: aligned features
    use more of their space. The adversary attacks the whole network and knows nothing of the projection. So
    this tells where it acts; it is no defence. Components come from training images.
    """
    models, _, (images, labels), (fit_images, _) = load(args)
    claim(args)
    rows, curves, truth = [], [], labels.to(args.device)
    for model in models:
        mean, components = principal_components(features_of(model, fit_images, args))
        features, attacked, _ = compare(args, model, images, labels)
        clean = accuracy_by_rank(model.head, features, truth, mean, components)
        robust = accuracy_by_rank(model.head, attacked, truth, mean, components)
        record(rows, name=model.name, n_train=args.n_train, n=args.n, features=len(mean),
               cls_95=classification_dimension(clean, 0.95), cls_99=classification_dimension(clean, 0.99),
               robust=robust_dimension(robust), clean_accuracy=clean[-1].item(),
               robust_accuracy=robust[-1].item(), best_robust_accuracy=robust.max().item())
        curves += [{"name": model.name, "components": k, "clean_accuracy": clean[k].item(),
                    "robust_accuracy": robust[k].item()} for k in range(len(clean))]
    write_csv(args, "dims.csv", rows)
    write_csv(args, "dims_accuracy.csv", curves)

    figure, (axes,) = new_figure(1, 2)
    plot(axes[0], curves, "components", "clean_accuracy", "-")
    plot(axes[1], curves, "components", "robust_accuracy", "-")
    for i, row in enumerate(rows):
        axes[0].axvline(row["cls_95"], color=f"C{i % 10}", linestyle=":")
        axes[0].axvline(row["cls_99"], color=f"C{i % 10}", linestyle="--")
        axes[1].plot(row["robust"], row["best_robust_accuracy"], "o", color=f"C{i % 10}")
    axes[0].set_title("clean; CLS-95 dotted, CLS-99 dashed")
    axes[1].set_title(f"{attack_name(args)}; point: the best")
    for ax in axes:
        ax.set_xscale("symlog", linthresh=1)  # logarithmic from 1 on, and with a place for 0
        ax.set(xlim=(0, None), ylim=(0, None), xlabel="principal components", ylabel="accuracy [%]")
    save_figure(args, figure)


# ------------------------------------------------------------------------------------------------------------
# curves: training runs side by side.


def read_log(path, name):
    """A run's folder, or its log.csv -> [{"name": name, column: float}], less what a row leaves empty."""
    path = Path(path, "log.csv") if Path(path).is_dir() else Path(path)
    try:
        with open(path, newline="") as file:
            rows = [{"name": name} | {column: float(value) for column, value in row.items() if value}
                    for row in csv.DictReader(file)]
    except (TypeError, ValueError, csv.Error):  # no numbers, no text, no table
        rows = []
    if not rows or not all({"step", "epoch", "loss"} <= row.keys() for row in rows):
        raise InputError(f"{path}: no log of a training run, expected numbers under step, epoch, loss, ...")
    return rows


def run_curves(args):
    """Training curves of one or more runs, from the log.csv in their folders.

    A gap between attacked accuracy on training batches and on held-out images is robust overfitting: late in
    training the latter falls while the former still rises. Synthetic images are there to close it. The cosine
    says how far a run with DRA has come in imitating its teacher.
    """
    rows = [row for path, name in zip(args.runs, args.names) for row in read_log(path, name)]
    claim(args)
    write_csv(args, "curves.csv", rows)

    figure, ((loss, cosine), (train, holdout)) = new_figure(2, 2)
    plot(loss, rows, "epoch", "loss", "-")
    plot(cosine, rows, "epoch", "cosine", "-")
    for ax, part in ((train, "train"), (holdout, "holdout")):
        plot(ax, rows, "epoch", f"{part}_clean", "o-")
        plot(ax, rows, "epoch", f"{part}_robust", "o--", note=", attacked")
    loss.set(xlabel="epoch", ylabel="loss (eq. 4)")
    cosine.set(xlabel="epoch", ylabel="cosine with the teacher's features")
    train.set(xlabel="epoch", ylabel="accuracy on batches [%]")
    holdout.set(xlabel="epoch", ylabel="accuracy on held-out images [%]")
    save_figure(args, figure)


def judge(run, name):
    """A training run's lambda, and the accuracies that its best.pt has: a row of the table.

    AutoAttack's, if eval_autoattack.py has left them beside best.pt, else those by which best.pt was selected
    (in log.csv). Raises KeyError and other errors where there are none, InputError for those of another file.
    """
    best, judged = Path(run, "best.pt"), Path(run, "best.pt.autoattack", "result.json")
    saved = read_checkpoint(best)
    row = {"name": name, "dra_weight": saved["args"]["dra_weight"]}
    if judged.exists():
        result = json.loads(judged.read_text())
        settings = result["settings"]  # of eval_autoattack.py
        if (settings["checkpoint"], settings["step"]) != (best.name, saved["step"]):
            raise InputError(f"{judged}: is of an earlier best.pt, expected AutoAttack's result on this one")
        attacks = " ".join(settings["attacks"] or ["AutoAttack"])
        return row | {"judged_by": f"{attacks}, eps {result['eps']}, {result['images']} test images",
                      "clean_accuracy": float(result["clean_acc"]),
                      "robust_accuracy": result["robust_accuracy"]}
    selected = max((entry for entry in read_log(run, name) if "holdout_robust" in entry),
                   key=lambda entry: (entry["holdout_robust"], entry["step"]))
    return row | {"judged_by": f"PGD-{SELECTION_STEPS}, held-out training images",
                  "clean_accuracy": selected["holdout_clean"], "robust_accuracy": selected["holdout_robust"]}


def run_sweep(args):
    """Fig. 8: clean and robust accuracy against lambda, the weight of the alignment in eq. (4).

    Lambda = 0 is training without alignment. The paper finds gains over it for every lambda, which saturate
    where the alignment begins to outweigh the adversarial loss. Runs that AutoAttack has judged and others
    have a line each, since accuracies under two attacks on two sets of images cannot be compared.
    """
    rows = []
    for run, name in zip(args.runs, args.names):
        try:
            record(rows, **judge(run, name))
        except (InputError, OSError):
            raise
        except Exception as error:  # there are many ways not to be the folder of a run
            raise InputError(f"{run}: no run of ours with a selected best.pt ({error!r})") from None
    claim(args)
    rows.sort(key=lambda row: row["dra_weight"])
    write_csv(args, "sweep.csv", rows)

    figure, (axes,) = new_figure(1, 2)
    for ax, kind in zip(axes, ("clean", "robust")):
        plot(ax, rows, "dra_weight", f"{kind}_accuracy", by="judged_by")
        ax.set(xlabel="lambda (--dra-weight)", ylabel=f"{kind} accuracy [%]")
    save_figure(args, figure)


# ------------------------------------------------------------------------------------------------------------
# The command line.

COMMANDS = {"uniformity": run_uniformity, "cknna": run_cknna, "spectrum": run_spectrum, "probe": run_probe,
            "sae": run_sae, "dims": run_dims, "curves": run_curves, "sweep": run_sweep}


def main(argv=None):
    """Run one command. Raises InputError or OSError for a file that cannot be used."""
    args = parse_args(argv)
    # Full float32, and algorithms that give the same result twice: differences between networks are small.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    COMMANDS[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
