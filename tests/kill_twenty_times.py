"""Run by hand (ten minutes or so on two cores): kill training again and again, then compare with an undisturbed run, bit for bit.

    python tests/kill_twenty_times.py [--kills 20] [--folder FOLDER] [train_cifar.py | train_imagenet.py]

Half of the kills (SIGKILL) come at a random moment, the others while a checkpoint is being written. Then the same command once
more, to its end. Averaged and raw weights, projector, optimizer, and the log have to be those of a run that nobody disturbed.
"""
import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SETTINGS = {  # saves every two steps, evaluates every eight
    "train_cifar.py": ["--smoke", "--batch-size", "32", "--attack-steps", "2", "--extra-sigma", "--save-every", "0.0589", "--eval-every", "0.2353"],
    "train_imagenet.py": ["--smoke", "--arch", "test_vit", "--image-size", "32", "--batch-size", "16", "--attack-steps", "1", "--save-every", "0.08", "--eval-every", "0.32"],
}


def leaves(value, name=""):
    """Every number and tensor in nested dicts and lists, by path."""
    if isinstance(value, (dict, list, tuple)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(child, f"{name}/{key}")
    else:
        yield name, value


def differences(path, other):
    """Names of what differs between two checkpoints, apart from the names of folders and the log."""
    a, b = [dict(leaves(torch.load(p, weights_only=True))) for p in (path, other)]
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return [name for name in a.keys() | b.keys() if not name.startswith(("/args/out", "/args/data", "/args/synthetic", "/log")) and not same(a.get(name), b.get(name))]


def log_rows(out):
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "waiting")} for row in csv.DictReader(open(out / "log.csv"))]


def command(script, out, steps):
    return [sys.executable, script, *SETTINGS[script], "--max-steps", str(steps), "--seed", "7", "--out", str(out)]


def run(script, out, steps):
    """One undisturbed run to its end. The number of threads decides in which order sums are taken: the same in all runs."""
    subprocess.run(command(script, out, steps), cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_once(script, out, steps, while_writing, rng):
    """Start the command and kill it: once it has got further, at a random moment or while last.pt is being written. Returns where it was."""
    changed = lambda name: (out / name).stat().st_mtime_ns if (out / name).exists() else 0  # (a kill may leave a last.pt.tmp behind)
    process = subprocess.Popen(command(script, out, steps), cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    before = changed("last.pt")
    while process.poll() is None and changed("last.pt") == before and not (rng.random() < 0.002 and not while_writing):
        time.sleep(0.005)
    last_write = changed("last.pt.tmp")
    if while_writing:
        while process.poll() is None and changed("last.pt.tmp") in (0, last_write):
            pass
    else:
        time.sleep(rng.uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(out / "last.pt", weights_only=True)["step"] if (out / "last.pt").exists() else 0
    return step, changed("last.pt.tmp") not in (0, last_write)


def trial(script, folder, kills, steps, seed=0):
    """Kill `kills` times, finish, compare. Returns (kills while writing, what differs from the undisturbed run)."""
    rng, whole, killed, during_writes = random.Random(seed), folder / "undisturbed", folder / "killed", 0
    run(script, whole, steps)
    for i in range(kills):
        step, writing = kill_once(script, killed, steps, i % 2 == 1, rng)
        during_writes += writing
        print(f"{script}: kill {i + 1} of {kills}, last checkpoint of step {step} of {steps}{', while writing' * writing}", flush=True)
        assert step < steps, "the run was over before the last kill: give it more steps"
    run(script, killed, steps)
    different = [f"{name}: {what}" for name in ("last.pt", "best.pt") for what in differences(whole / name, killed / name)]
    return during_writes, different + ["log.csv"] * (log_rows(whole) != log_rows(killed))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("script", nargs="*", choices=[*SETTINGS, []], help="which of them (default: both)")
    parser.add_argument("--kills", type=int, default=20, help="for each script (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary folder)")
    args = parser.parse_args()
    for script in args.script or SETTINGS:
        folder = Path(args.folder or tempfile.mkdtemp()) / Path(script).stem
        during_writes, different = trial(script, folder, args.kills, steps=6 * args.kills + 20)
        print(f"{script}: {args.kills} kills, {during_writes} of them while a checkpoint was being written; "
              + ("DIFFERS: " + ", ".join(different[:5]) if different else "all weights, the optimizer, the projector and the log are those of the undisturbed run"))
        if different:
            sys.exit(1)


if __name__ == "__main__":
    main()
