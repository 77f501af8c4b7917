"""How did runs train, and what does lambda, the weight of the alignment, do? Fig. 8 of arXiv 2602.19931.

    for LAMBDA in 0 0.25 0.5 1 2 4; do
        python train_cifar.py --dataset cifar100 --arch wrn-28-10 --synthetic 1m.npz --batch-size 512 \
            --epochs 400 --dra-weight $LAMBDA --out runs/lambda-$LAMBDA
        python eval_autoattack.py runs/lambda-$LAMBDA/best.pt
    done
    python experiments/plot_runs.py runs/lambda-*

A run is the --out of train_cifar.py or train_imagenet.py. Its log.csv gives four curves over training:

    loss                eq. (4), L_TRADES + lambda * L_DRA, a mean over the steps since the row before
    cosine              cos(h(enc(x')), g(x_t, t, y)) of eq. (3): how well the features predict the teacher's
    accuracy (batches)  in percent of the training images, of the clean ones and of those attacked to train on
    accuracy (held-out) in percent of training images that are never trained on, clean and attacked (PGD on
                        the margin loss), of the averaged weights

Late in adversarial training, accuracy on attacked batches may still rise while that on held-out images falls
(robust overfitting). Synthetic images are there to prevent it. The loss contains lambda, so it cannot be
compared between values of lambda.

Fig. 8 is accuracy on clean and on attacked test images against lambda, for WRN-28-10 on CIFAR-100. The paper
found, in words: DRA improves both for every lambda; where lambda is too large, robust accuracy does not gain
any more, as the alignment outweighs the adversarial loss. lambda = 0 is training without alignment.

Accuracies here are those that eval_autoattack.py left in best.pt.autoattack/result.json, else in
last.pt.autoattack/result.json (Wu et al. evaluate the last average of a ViT). A run without either has those
of log.csv for which best.pt was selected. Such a selection flatters, and the images and the attack are other
ones, so each kind of evaluation has a line of its own. Intervals are Wilson's 95 % intervals for a share of n
images. --group NAME=run,run,run are seeds of one method with one lambda: they have one colour, and their mean
is drawn and printed with their standard deviation.

chosen (the paper does not say): the values of lambda above. Nothing is computed anew here, so the settings
are those of the runs.

OUT/plot_runs.csv has a row for each run, OUT/plot_runs.png shows curves and accuracies. Both are written
anew each time: a run that is still training can be looked at again and again.
"""
import argparse
import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from eval_autoattack import InputError, read_checkpoint
from train_cifar import HOLDOUT, SELECTION_STEPS, lock, write_atomically

CURVES = {  # of a panel: columns of log.csv; the second one is drawn dashed
    "loss (eq. 4)": ["loss"],
    "cosine with the teacher's features": ["cosine"],
    "accuracy on batches [%]": ["train_clean", "train_robust"],
    "accuracy on held-out images [%]": ["holdout_clean", "holdout_robust"],
}
COLUMNS = ["method", "run", "lambda", "file", "step", "holdout", "evaluation",
           "clean", "clean_low", "clean_high", "robust", "robust_low", "robust_high"]


def group(text):
    """A type for argparse: NAME=run,run -> [(NAME, run), (NAME, run)]."""
    name, runs = text.split("=", 1)  # a ValueError is an error of argparse
    return [(name, run) for run in runs.split(",")]


def parse_args(argv=None):
    """Command line -> Namespace, `runs` being pairs (method, folder). A flag that cannot be used ends the
    program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs, the --out of a training script")
    parser.add_argument("--group", type=group, action="extend", default=[], metavar="NAME=RUN,RUN",
                        help="runs of one method, such as its seeds; may be repeated")
    parser.add_argument("--out", default="analysis", help="folder for plot_runs.csv and plot_runs.png")
    args = parser.parse_args(argv)
    args.runs = [(run, run) for run in args.runs] + args.group
    if not args.runs:
        parser.error("expected the folder of a run or --group")
    return args


# ------------------------------------------------------------------------------------------------------------
# What a run has left.


def read_log(path):
    """log.csv -> its rows, {column: float} without what is empty. Raises InputError, OSError."""
    try:
        with open(path, newline="") as file:
            table = csv.DictReader(file)
            rows = [{name: float(value) for name, value in row.items() if value} for row in table]
        if rows and all({"step", "epoch", "loss"} <= row.keys() for row in rows):
            return rows
    except (AttributeError, TypeError, ValueError, csv.Error):  # no numbers, no text, no table
        pass
    raise InputError(f"{path}: no log of a training run, expected numbers under step, epoch, loss, ...")


def wilson(percent, n):
    """Wilson's 95 % interval for a share of n images: percent -> (low, high) in percent."""
    share, z = percent / 100, 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return 100 * (centre - half), 100 * (centre + half)


def judge(run, log):
    """A run's columns of the CSV, without accuracies where it has no evaluation yet. log: of `read_log`.
    Raises InputError for the folder of anything else and for the evaluation of another file, OSError.

    A run that goes on writes best.pt and last.pt again. Then an evaluation of an earlier one says nothing
    about the present file; the step tells.
    """
    files = [path for path in (run / "best.pt", run / "last.pt") if path.exists()]
    judged = [path for path in files if Path(f"{path}.autoattack", "result.json").exists()]
    path = [*judged, *files, run / "last.pt"][0]
    saved = read_checkpoint(path)
    try:
        # Real training images come first in the recipe; so many of them the training scripts hold out.
        n = min(HOLDOUT, int(saved["recipe"]["images"].split(",")[0]) // 10)
        row = {"file": path.name, "step": saved["step"], "holdout": n}
        row["lambda"] = float(saved["args"]["dra_weight"])
        if judged:
            result = json.loads(Path(f"{path}.autoattack", "result.json").read_text())
            settings, n = result["settings"], result["images"]
            if (settings["checkpoint"], settings["step"]) != (path.name, saved["step"]):
                raise InputError(f"{path}.autoattack: is of another {path.name}; evaluate this one")
            clean, robust = float(result["clean_acc"]), float(result["robust_accuracy"])
            attack = " ".join(settings["attacks"] or ["AutoAttack", settings["version"]])
            attack = f"{attack}, eps {result['eps']}, {n} test images"
        elif path.name == "best.pt":  # selected for these accuracies, in the row of its step
            [entry] = [entry for entry in log if entry["step"] == saved["step"]]
            clean, robust = entry["holdout_clean"], entry["holdout_robust"]
            attack = f"PGD-{SELECTION_STEPS}, {n} held-out images"
        else:  # a run before its first evaluation
            return row
        for name, percent in (("clean", clean), ("robust", robust)):
            row |= zip((name, f"{name}_low", f"{name}_high"), (percent, *wilson(percent, n)))
        return row | {"evaluation": f"{saved['arch']}, {saved['dataset']}: {attack}"}
    except InputError:
        raise
    except Exception as error:  # there are many ways not to be the folder of a run
        raise InputError(f"{path}: of no run of ours, or its result.json is damaged ({error!r})") from None


# ------------------------------------------------------------------------------------------------------------
# The table and its figure.


def write_rows(path, rows):
    """Write the table under another name first: a kill leaves the old file or the new one."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)  # what a row lacks stays empty
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def against_lambda(rows, evaluation, kind):
    """Points of one evaluation, [lambda, accuracy, low, high] each, as an array [4, points]. Runs of a method
    with the same lambda are one point, its bar one standard deviation; it is printed. kind: clean, robust."""
    cells, points = {}, []
    for row in rows:
        if row.get("evaluation") == evaluation:
            seeds = cells.setdefault((row["lambda"], row["method"]), [])
            seeds.append([row[kind], row[f"{kind}_low"], row[f"{kind}_high"]])
    for (weight, method), seeds in sorted(cells.items()):
        mean, low, high = np.mean(seeds, axis=0)
        if len(seeds) > 1:
            spread = np.std(seeds, axis=0, ddof=1)[0]
            low, high = mean - spread, mean + spread
            print(f"{method}, lambda {weight:g}: {kind} {mean:.2f} % +- {spread:.2f} over {len(seeds)} runs")
        points.append((weight, mean, low, high))
    return np.array(points).T


def draw_curve(axis, log, column, n_holdout, **style):
    """Draw a column of log.csv over the epochs; on held-out images with intervals. style: of `errorbar`."""
    points = [(entry["epoch"], entry[column]) for entry in log if column in entry]
    if not points:  # such as the cosine of a run without alignment
        return
    epoch, value = np.array(points).T
    # Numbers of training batches are means over steps, in which the network changes: no sample of images.
    bars = np.abs(np.array(wilson(value, n_holdout)) - value) if column.startswith("holdout") else None
    axis.errorbar(epoch, value, bars, marker=".", capsize=2, **style)


def draw_figure(path, rows, logs):
    """Curves, a colour for each method, and on the right accuracy against lambda, a line per evaluation.

    rows: of the CSV, logs: of `read_log`, of the same runs. Runs of a group share a colour: how far their
    curves are apart is the spread over seeds.
    """
    figure = Figure(figsize=(16, 8), layout="constrained")
    axes, methods = figure.subplots(2, 3), list(dict.fromkeys(row["method"] for row in rows))
    for axis, (label, columns) in zip(axes[:, :2].flat, CURVES.items()):
        for row, log in zip(rows, logs):
            for column, line in zip(columns, ("-", "--")):
                draw_curve(axis, log, column, row["holdout"], linestyle=line,
                           color=f"C{methods.index(row['method']) % 10}")
        axis.set(xlabel="epoch", ylabel=label, title="solid: clean, dashed: attacked" * len(columns[1:]))
    for i, method in enumerate(methods):  # a legend with each method once, whatever its number of runs
        axes[0, 0].plot([], color=f"C{i % 10}", label=method)
    axes[0, 0].legend(fontsize=8)
    for axis, kind in zip(axes[:, 2], ("clean", "robust")):
        for evaluation in dict.fromkeys(row["evaluation"] for row in rows if "evaluation" in row):
            weight, mean, low, high = against_lambda(rows, evaluation, kind)
            axis.errorbar(weight, mean, (mean - low, high - mean), fmt="o-", capsize=3, label=evaluation)
            axis.legend(fontsize=7)
        axis.set(xlabel="lambda (--dra-weight)", ylabel=f"{kind} accuracy [%]")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def main(argv=None):
    """The command line. Raises InputError and OSError."""
    args = parse_args(argv)
    logs = [read_log(Path(run, "log.csv")) for _, run in args.runs]
    rows = [{"method": method, "run": run, **judge(Path(run), log)}
            for (method, run), log in zip(args.runs, logs)]
    line = ("{method}, {run}, lambda {lambda}, {evaluation}: clean {clean:.2f} % ({clean_low:.2f} to "
            "{clean_high:.2f}), robust {robust:.2f} % ({robust_low:.2f} to {robust_high:.2f})")
    for row in rows:
        print(line.format(**row) if "evaluation" in row else f"{row['run']}: not evaluated yet")
    path = Path(args.out, "plot_runs.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        write_rows(path, rows)
        draw_figure(path.with_suffix(".png"), rows, logs)
    print(f"{path} and {path.with_suffix('.png')} hold {len(rows)} rows")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
