"""Which of the claims of arXiv 2602.19931 hold in small? The same study for any size.

    python experiments/compare_methods.py --data-dir FOLDER --teacher edm.pt --synthetic syn.npz \\
        --methods at at+dra at+dra-centred dm-at dm-at+dra-centred --seeds 11 12 13 14 15 --out study \\
        -- --arch wrn-10-2 --batch-size 64 --lr 0.1 --epochs 60 --amp --teacher-unconditional

trains a network for each method and seed (train_cifar.py with the flags behind `--`), judges last.pt, and
adds a row to OUT/results.csv. The same command continues after a kill; rows that are there stay. In the end,
and with --report alone, it writes OUT/report.csv, report.md and report.png: claim by claim what the paper
says, what is seen here, and one of three words. With the flags of the paper's rows it does these.

A claim says that a number y is higher (or lower) with method A than with method B. For each seed s

    d_s = y(A, s) - y(B, s)      same images, batches and starts of the attack, and the same initial weights
    interval = mean d -+ t_{0.975, n - 1} std(d) / sqrt(n)        Student's t for the n paired differences

    "seen"  the interval lies on the paper's side of 0     "opposite"  on the other     "not seen"  it holds 0

What is measured, of the averaged weights in last.pt, in float32:

    clean, robust     accuracy [%] on the first --n test images; robust: under PGD-20 on the margin loss,
                      eps / 4 a step, from a random start
    autoattack        accuracy [%] under AutoAttack on the first --autoattack test images, of the first seed
                      alone, so it has no interval
    cls_95, cls_99, robust_dimension    dimensions.py, 1,000 test images
    uniformity, alignment, and centred  features.py, the same images
    cosine            eq. (3), of the last row of the log, on training images
    minutes           of training, without evaluations and breaks. With several --jobs the runs slow each
                      other down: then compare minutes only with each other

Centred: eq. (3) with the teacher minus its mean feature over (up to 1,024) training images. In a small EDM
the features of all images nearly share one direction: the mean cosine between two images is 0.93 for the
teacher below ("shared direction" of probe_teacher.py, 1,000 images). So the cosine to raw features is 0.97
after two epochs and ends at 0.99: there was little to learn. The centred one goes from 0.38 to 0.89. The
paper says nothing of centring. This is ours.

THE SETTING of our study (assets/study) was written down here before its first run. Images: CIFAR-10, stored
as JPEG. Training: the first 1,000 training images with their labels. Few on purpose: there a student has
something to learn from a weak teacher; in trials with 5,000 and more, AT and AT+DRA did not differ. The
command is the one above with --n 5000 --autoattack 500; all else is train_cifar.py's default. Seeds 11 to 15.
Seeds 0 and 1 were used up in trials. --eval-every 60 is added, which saves time and does not touch last.pt;
and --no-compile, as compilation takes longer than such a run. It ran on 2026-11-27 on one H100, 15 runs at a
time (`--jobs 15`): 30 runs with all that is measured in 6 minutes. Nothing was changed afterwards. The
standard network, for pictures, came from a CPU.

The teacher is a small EDM (1.75M parameters) that saw 219,000 images, all of the 50,000 training images and
none of their labels; its linear probe is right on 49 % of the test images:

    python experiments/train_edm.py --data-dir FOLDER --model-channels 32 --channel-mult 1 2 2 \\
        --num-blocks 2 --batch-size 32 --dropout 0 --amp --label-dropout 1 --images 219e3

So it knows more images than the student, but no label. The paper's teacher knows the student's images and
their labels. The 5,000 synthetic images are drawn from a network of the same size that was trained on all
50,000 images with labels, so claim 3 is about synthetic images that come from more labels. at+noisy takes its
teacher from ablate_teacher.py noisy-classifier on the same 50,000 images with labels (--epochs 5 --batch-size
64 --lr 0.1). That one is right on 65.0 % of the noisy test images, and the linear probe of the EDM on 50.0 %.

What came out (assets/study/report.md). Aligned with raw features, a network is more uniform (claim 6), and
nothing else is seen. Centred targets raise clean accuracy, by 2.3 and 1.7 points, and CLS-95 by 7. They do
not raise robust accuracy, and with synthetic images they lower it by 2.1 points. Synthetic images from so
weak a model lower clean accuracy. The noisy classifier is the best teacher here, against the paper. But it
had 50,000 labels for a student of 1,000, and in the paper it is no better than the probe. So claims 2, 3 and
7 wait for a better diffusion model. Of 19 intervals about one misses its number by chance, and that for
centred uniformity hardly excludes 0. Centring has no flag in train_cifar.py, since claim 1 is only half seen:
hand the teacher to `train_cifar.main`, as this script does.
"""
import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
import eval_autoattack
import train_cifar
from eval_autoattack import BENCHMARKS, InputError, load_classifier, load_images
from experiments import dimensions, features
from train_cifar import (DEVICE, count, generator, last_part, load_real, load_teacher, lock, margin_loss, pgd,
                         whole)

# Name: flags of train_cifar.py. A word in capitals stands for the file of that flag of this script. A name
# that ends in -centred has a centred teacher.
METHODS = {
    "at": "--dra-weight 0",
    "at+dra": "--teacher TEACHER",
    "at+dra-centred": "--teacher TEACHER",
    "dm-at": "--dra-weight 0 --synthetic SYNTHETIC",
    "dm-at+dra": "--teacher TEACHER --synthetic SYNTHETIC",
    "dm-at+dra-centred": "--teacher TEACHER --synthetic SYNTHETIC",
    "at+noisy": "--teacher NOISY_TEACHER",
    "standard": "--attack-steps 0 --beta 0 --dra-weight 0",
}
# Claim, methods A and B, {number: A - B as the paper has it}. "+" and "-": it says more or less, and gives no
# number. "": it says nothing of it.
CLAIMS = [
    ("1 DRA (Table 2)", "at+dra", "at", {"clean": "+4.21", "robust": "+2.04"}),
    ("1 DRA, centred", "at+dra-centred", "at", {"clean": "+4.21", "robust": "+2.04"}),
    ("2 DRA with synthetic images (Table 2)", "dm-at+dra", "dm-at", {"clean": "+1.24", "robust": "+0.77"}),
    ("2 the same, centred", "dm-at+dra-centred", "dm-at", {"clean": "+1.24", "robust": "+0.77"}),
    # Table 2 has other networks with synthetic images than without: WRN-28-10 and WRN-34-10.
    ("3 synthetic images", "dm-at", "at", {"clean": "+6.79", "robust": "+8.10"}),
    ("4 DRA (Table 3)", "at+dra", "at", {"cls_95": "+6", "cls_99": "+28", "robust_dimension": "+13"}),
    ("4 DRA, centred", "at+dra-centred", "at", {"cls_95": "+6", "cls_99": "+28", "robust_dimension": "+13"}),
    ("5 synthetic images (Table 3)", "dm-at", "at", {"cls_99": "-3"}),
    ("6 DRA (Fig. 5)", "at+dra", "at", {"uniformity": "-", "alignment": ""}),
    ("6 DRA, centred", "at+dra-centred", "at", {"uniformity": "-", "alignment": ""}),
    ("7 noisy classifier as teacher (5.6)", "at+noisy", "at+dra", {"robust": "-1.50"}),
    ("7 noisy classifier as teacher (5.6)", "at+noisy", "at", {"robust": "-0.73"}),
    ("8 cost of DRA", "at+dra", "at", {"minutes": ""}),
]
UNITS = {"clean": "accuracy [%]", "robust": "accuracy [%]", "cls_95": "dimensions", "cls_99": "dimensions",
         "robust_dimension": "dimensions", "minutes": "minutes"}
SETTINGS = ["flags", "files", "n", "autoattack_n"]  # columns that say how a row came about
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t_{0.975}, 1 to 9 degrees
STEPS = 20  # of PGD
MEASURED = 1000  # test images for dimensions and features


def parse_args(argv=None):
    """Command line -> Namespace; `flags`: those behind `--`, of train_cifar.py. A flag that cannot be used
    ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     usage="%(prog)s [flags] [-- flags of train_cifar.py]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", choices=list(METHODS), default=["at", "at+dra"], help="see METHODS")
    add("--seeds", nargs="+", type=whole, default=[0], help="a network for each method and seed")
    add("--teacher", help="the diffusion model")
    add("--noisy-teacher", help="teacher.pt of ablate_teacher.py noisy-classifier")
    add("--synthetic", help="synthetic images, one .npz")
    add("--data-dir", default="data", help="as in train_cifar.py")
    add("--n", type=count, default=10_000, help="test images for clean and robust accuracy, at most all")
    add("--autoattack", type=whole, default=0, metavar="N", help="AutoAttack on N images, first seed only")
    add("--jobs", type=count, default=1, help="runs at a time; each has one thread if there are several")
    add("--device", choices=sorted({"cpu", DEVICE}), default=DEVICE, help="where to compute")
    add("--out", default="study", help="folder for results.csv, the report, and a folder per run")
    add("--report", action="store_true", help="only write the report from OUT/results.csv")
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1:]
    for flag in {"--seed", "--out", "--device", "--data-dir", "--teacher", "--synthetic"} & set(args.flags):
        parser.error(f"{flag} behind --: this script sets it")
    args.files = {"TEACHER": args.teacher, "NOISY_TEACHER": args.noisy_teacher, "SYNTHETIC": args.synthetic}
    for name in () if args.report else args.methods:
        for word in METHODS[name].split():
            if args.files.get(word, word) is None:
                parser.error(f"--methods {name}: expected --{word.lower().replace('_', '-')} FILE")
    return args


# ------------------------------------------------------------------------------------------------------------
# A run: train and judge.


class Centred(nn.Module):
    """A teacher, called as in train_cifar.py, minus its mean feature over up to 1,024 training images with
    noise. args: train_cifar.py's. Raises InputError and OSError."""

    def __init__(self, teacher, args):
        super().__init__()
        self.teacher, self.width = teacher, teacher.width
        images, labels = [torch.as_tensor(x[:1024]) for x in load_real(args, "train")]
        images = images.permute(0, 3, 1, 2).float() / 255  # [N, 3, 32, 32] in [0, 1]
        noise = torch.randn(images.shape, generator=generator(args.seed, 0, "mean feature"))
        given = None if args.teacher_unconditional else labels
        with torch.no_grad():
            # [width], on the CPU; `train_cifar.main` moves it to the device with the module.
            self.register_buffer("mean", teacher(images, given, args.teacher_sigma, noise).mean(dim=0))

    def forward(self, images, labels, sigma, noise):
        """images [B, 3, 32, 32] in [0, 1] -> [B, width]"""
        return self.teacher(images, labels, sigma, noise) - self.mean


def run_flags(method, args):
    """A method's own flags of train_cifar.py, with its files."""
    return [args.files.get(word, word) for word in METHODS[method].split()]


def train_and_judge(method, seed, args):
    """Train or continue a run -> the measured columns of its row. What it prints goes to OUT/RUN/run.txt."""
    folder = Path(args.out, f"{method}-{seed}")
    flags = [*args.flags, *run_flags(method, args), "--seed", str(seed), "--data-dir", args.data_dir,
             "--device", args.device, "--out", str(folder)]
    training, teacher = train_cifar.parse_args(flags), None
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "run.txt", "a") as text, contextlib.redirect_stdout(text),
          contextlib.redirect_stderr(text)):
        if method.endswith("-centred"):
            teacher = Centred(load_teacher(training), training)
        train_cifar.main(flags, teacher=teacher)
        return judge(folder, seed == args.seeds[0], args)


def judge(folder, first, args):
    """The averaged weights in folder/last.pt -> measured columns; with AutoAttack for the `first` seed."""
    # Full float32, and algorithms that give the same result twice.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    model = load_classifier(folder / "last.pt").to(args.device)
    eps = BENCHMARKS[model.info.dataset].eps
    test = load_images(argparse.Namespace(data_dir=args.data_dir, n=args.n), model.info)
    images, labels = [x.to(args.device) for x in test]
    right = []
    for i, (x, y) in enumerate(zip(images.split(500), labels.split(500))):
        noise = torch.rand(x.shape, generator=generator(0, i, "attack")).to(x)  # the same for all networks
        start = (x + eps * (2 * noise - 1)).clamp(0, 1)
        adv = pgd(lambda adv: margin_loss(model(adv), y), x, start, eps, eps / 4, STEPS)
        right.append(torch.stack([model(z).argmax(dim=1) == y for z in (x, adv)], dim=1))
    row = dict(zip(("clean", "robust"), (100 * torch.cat(right).double().mean(dim=0)).tolist()))
    row["autoattack"] = ""
    if first and args.autoattack:
        eval_autoattack.main([str(folder / "last.pt"), "--data-dir", args.data_dir, "--n",
                              str(args.autoattack), "--device", args.device])
        result = json.loads((folder / "last.pt.autoattack" / "result.json").read_text())
        row["autoattack"] = result["robust_accuracy"]

    settings = argparse.Namespace(device=args.device, eps=eps, steps=STEPS, seed=0)
    images, labels = images[:MEASURED], labels[:MEASURED]
    clean, attacked = found = dimensions.extract(model, images, labels, settings)  # [2, n, D]
    by_rank = dimensions.right_by_rank(model.head, found, labels).sum(axis=1)  # [2, D + 1]
    row |= dict(zip(("cls_95", "cls_99", "robust_dimension"), dimensions.dimensions(by_rank)))
    shape = features.statistics({"clean": clean.double(), "attacked": attacked.double(),
                                 "right": torch.zeros(len(clean), 2)}, k=10)
    row |= {name: shape[name].item() for name in shape if name.startswith(("uniformity", "alignment"))}
    log = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    steps, speed = [np.array([line[name] for line in log], float) for name in ("step", "images_per_s")]
    seconds = (np.diff(steps, prepend=0) * model.info.args["batch_size"] / speed).sum()
    return row | {"cosine": log[-1].get("cosine", ""), "minutes": seconds / 60}


# ------------------------------------------------------------------------------------------------------------
# The report.


def interval(d, paper):
    """Paired differences d -> their mean, both ends of the 95 % t-interval, and the word: see the top. paper:
    as in CLAIMS. An interval takes two to ten differences."""
    d = np.array(d, float)
    if not 2 <= len(d) <= 10:
        return d.mean(), np.nan, np.nan, "no interval"
    margin = T[len(d) - 2] * d.std(ddof=1) / np.sqrt(len(d))
    low, high = d.mean() - margin, d.mean() + margin
    word = "not seen" if low <= 0 <= high else "seen" if (low > 0) == (paper[:1] == "+") else "opposite"
    return d.mean(), low, high, word if paper else ""


def claim_lines(rows):
    """Rows of results.csv -> rows of report.csv: a dict for each number of a claim that has both methods."""
    lines = []
    for claim, one, other, numbers in CLAIMS:
        for name, paper in numbers.items():
            y = {(row["method"], row["seed"]): float(row[name]) for row in rows}
            d = {seed: y[one, seed] - y[other, seed] for method, seed in y
                 if method == one and (other, seed) in y}
            if d:
                mean, low, high, word = interval(list(d.values()), paper)
                lines.append({"claim": claim, "number": name, "methods": f"{one} - {other}", "paper": paper,
                              "mean": mean, "low": low, "high": high, "n": len(d), "word": word,
                              "by_seed": " ".join(f"{seed}:{value:.4g}" for seed, value in d.items())})
    return lines


def write_report(out, rows):
    """report.csv, report.md and report.png in the folder `out`. The Markdown is printed, too."""
    lines = claim_lines(rows)
    text = ["| claim | number | difference | paper | here, 95 % interval | n | |", "|---|" + 6 * "---|"]
    text += ["| {claim} | {number} | {methods} | {paper} | {mean:+.3g} ({low:+.3g} to {high:+.3g}) | {n} | "
             "{word} |".format(**line) for line in lines]
    names = [name for name in rows[0] if name not in ["method", "seed", *SETTINGS]]
    text += ["", "Means over seeds ± standard deviation:", "", f"| method | n | {' | '.join(names)} |",
             "|---|---|" + len(names) * "---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        group, cells = [row for row in rows if row["method"] == method], []
        for name in names:
            x = np.array([row[name] for row in group if row[name] != ""], float)
            spread = f" ± {x.std(ddof=1):.2g}" if len(x) > 1 else ""
            cells.append(f"{x.mean():.4g}{spread}" if len(x) else "")
        text.append(f"| {method} | {len(group)} | {' | '.join(cells)} |")
    print(*text, sep="\n")
    (out / "report.md").write_text("\n".join(text) + "\n")
    if lines:
        dimensions.write_rows(out / "report.csv", lines)
        draw_figure(out / "report.png", lines)


def draw_figure(path, lines):
    """A line for each claim: a point for each seed, the mean with its interval, a cross for the paper."""
    units = [UNITS.get(line["number"], "uniformity, alignment") for line in lines]
    kinds = list(dict.fromkeys(units))
    figure = Figure(figsize=(9, 1 + 0.5 * (len(lines) + len(kinds))), layout="constrained")
    heights = [units.count(kind) + 0.5 for kind in kinds]
    axes = figure.subplots(len(kinds), squeeze=False, height_ratios=heights)
    for axis, kind in zip(axes.flat, kinds):
        group = [line for line, unit in zip(lines, units) if unit == kind]
        for y, line in enumerate(group):
            bar = np.nan_to_num([[line["mean"] - line["low"]], [line["high"] - line["mean"]]])
            for pair in line["by_seed"].split():
                axis.plot(float(pair.partition(":")[2]), y - 0.2, "k.")
            axis.errorbar(line["mean"], y, xerr=bar, fmt="C0o", capsize=4)
            if len(line["paper"]) > 1:
                axis.plot(float(line["paper"]), y + 0.2, "C3x")
        axis.axvline(0, color="grey", linewidth=1)
        axis.set(yticks=range(len(group)), ylim=(len(group) - 0.5, -0.5), xlabel=f"difference: {kind}",
                 yticklabels=["{claim}\n{number}, {methods}".format(**line) for line in group])
        axis.tick_params("y", labelsize=7)
    figure.suptitle("points: seeds; bars: mean, 95 % interval; crosses: paper", fontsize=8)
    figure.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------------------------
# The study.


def settings_of(method, args):
    """How a row comes about: flags of all runs, the method's own with its files, numbers of test images."""
    own = " ".join(map(last_part, run_flags(method, args)))  # files may be moved
    return dict(zip(SETTINGS, [" ".join(args.flags), own, str(args.n), str(args.autoattack)]))


def start_worker(threads):
    """In each new process: its threads, and its end if the study's own process is killed."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def add_rows(path, rows, args):
    """Train and judge what `rows`, those of results.csv, do not have, --jobs runs at a time, each in a new
    process. Raises InputError where a row is of other settings."""
    keys = [(method, seed) for seed in args.seeds for method in args.methods]  # all methods of a seed first
    for row in [row for row in rows if row["method"] in args.methods]:
        for name, value in settings_of(row["method"], args).items():
            if row[name] != value:
                raise InputError(f"{path}: {row['method']} has {name} {row[name]!r}, not {value!r}")
    there = [(row["method"], row["seed"]) for row in rows]
    keys = [(method, seed) for method, seed in keys if (method, str(seed)) not in there]
    threads = 1 if args.jobs > 1 else torch.get_num_threads()
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), start_worker, (threads,),
                             max_tasks_per_child=1) as pool:
        runs = {pool.submit(train_and_judge, *key, args): key for key in keys}
        try:
            for run in tqdm(as_completed(runs), total=len(keys), desc="runs", unit="run"):
                method, seed = runs[run]
                measured = {name: str(value) for name, value in run.result().items()}
                rows.append({"method": method, "seed": str(seed)} | measured | settings_of(method, args))
                dimensions.write_rows(path, rows)
        finally:
            pool.shutdown(cancel_futures=True)


def main(argv=None):
    """The command line. Raises InputError, OSError, and FloatingPointError where a run ends so."""
    args = parse_args(argv)
    path = Path(args.out, "results.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        rows = dimensions.read_rows(path, "method", "seed", *SETTINGS)
        if not args.report:
            add_rows(path, rows, args)
        if not rows:
            raise InputError(f"{path}: has no rows yet")
        with dimensions.reading(path):
            write_report(path.parent, rows)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
