"""Run by hand (ten minutes or so on two cores): kill training again and again, then compare with an
undisturbed run, bit for bit.

    python tests/kill_twenty_times.py [--kills 20] [--folder FOLDER] [train_cifar.py | train_imagenet.py]

Half of the kills (SIGKILL) come at a random moment, the others while a checkpoint is being written. Then the
same command once more, to its end. Averaged and raw weights, projector, optimizer, scheduler, the best
average and the log have to be those of a run that nobody disturbed.
"""
import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# Both evaluate every eight steps. The worker process of the second outlives each kill by a few seconds.
SETTINGS = {
    "train_cifar.py": ["--smoke", "--batch-size", "32", "--attack-steps", "2", "--extra-sigma",
                       "--eval-every", "0.2353"],
    "train_imagenet.py": ["--smoke", "--image-size", "32", "--batch-size", "16", "--attack-steps", "1",
                          "--eval-every", "0.32", "--workers", "1"],
}
# What one run may have in another way than the other: where it lies, who reads, and when it saves.
FREE = ("/args/out", "/args/data", "/args/synthetic", "/args/workers", "/args/save_minutes")


def leaves(value, name=""):
    """Every number and tensor in nested dicts and lists, by path."""
    if isinstance(value, (dict, list, tuple)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(child, f"{name}/{key}")
    else:
        yield name, value


def differences(path, other):
    """Names of what differs between two checkpoints, apart from what is free to and the log's speed."""
    a, b = [dict(leaves(torch.load(p, weights_only=True))) for p in (path, other)]
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return [name for name in sorted(a.keys() | b.keys())
            if not name.startswith(FREE) and not name.endswith("/images_per_s")
            and not (name in a and name in b and same(a[name], b[name]))]


def log_rows(out):
    """The rows of log.csv, without the speed."""
    with open(out / "log.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "images_per_s"}
                for row in csv.DictReader(file)]


def compare(whole, killed):
    """Names of what differs between the files in two folders of runs."""
    different = [f"{name}: {what}" for name in ("last.pt", "best.pt")
                 for what in differences(whole / name, killed / name)]
    return different + ["log.csv"] * (log_rows(whole) != log_rows(killed))


def start(script, flags):
    """A run as a process. The number of threads decides in which order sums are taken: one in all runs."""
    return subprocess.Popen([sys.executable, script, *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(script, flags):
    """A run to its end."""
    assert start(script, flags).wait() == 0, f"{script} failed"


def kill_once(script, flags, out, while_writing, rng):
    """Start the command and kill it: while last.pt is being written for the second to fifth time (the first
    is before any step), or at a random moment, which may be before it has begun. out: the run's folder.
    Returns the step of last.pt (0 without one), and whether it was being written."""
    path, temporary = out / "last.pt", out / "last.pt.tmp"
    changed = lambda: path.stat().st_mtime_ns if path.exists() else 0
    # Each step is saved, or one in every few: steps after the last checkpoint are done again.
    minutes = 0 if while_writing else rng.choice((0, 0.003, 0.01))
    process = start(script, [*flags, "--save-minutes", str(minutes)])
    if while_writing or rng.random() < 0.8:
        for _ in range(rng.randint(1, 4)):
            before = changed()
            while process.poll() is None and changed() == before:
                time.sleep(0.001)
        while while_writing and process.poll() is None and not temporary.exists():
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.003 if while_writing else 0.3))
    else:
        time.sleep(rng.uniform(0, 10))
    process.kill()
    process.wait()
    step = torch.load(path, weights_only=True)["step"] if path.exists() else 0
    return step, while_writing and temporary.exists()


def trial(script, folder, kills, steps, seed=0):
    """Kill `kills` times, finish, compare. Returns (kills while writing, what differs from the undisturbed
    run)."""
    rng, whole, killed, during_writes = random.Random(seed), folder / "undisturbed", folder / "killed", 0
    flags = [*SETTINGS[script], "--max-steps", str(steps), "--seed", "7", "--out"]
    run(script, [*flags, str(whole)])
    for i in range(kills):
        step, writing = kill_once(script, [*flags, str(killed)], killed, i % 2 == 1, rng)
        during_writes += writing
        print(f"{script}: kill {i + 1} of {kills}, last checkpoint of step {step} of {steps}"
              f"{', while writing' * writing}", flush=True)
        assert step < steps, "the run was over before the last kill: give it more steps"
    run(script, [*flags, str(killed)])
    return during_writes, compare(whole, killed)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("script", nargs="*", choices=[*SETTINGS, []], help="which of them (default: both)")
    parser.add_argument("--kills", type=int, default=20, help="for each script (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary folder)")
    args = parser.parse_args()
    for script in args.script or SETTINGS:
        folder = Path(args.folder or tempfile.mkdtemp()) / Path(script).stem
        during_writes, different = trial(script, folder, args.kills, steps=12 * args.kills + 40)
        outcome = "DIFFERS: " + ", ".join(different[:5]) if different else "all is as in the undisturbed run"
        print(f"{script}: {args.kills} kills, {during_writes} of them while a checkpoint was being written; "
              + outcome)
        if different:
            sys.exit(1)


if __name__ == "__main__":
    main()
