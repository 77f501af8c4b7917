"""Shows that a run that is killed again and again ends like an undisturbed one, bit for bit. Ten minutes.

    python tests/by_hand/kill_many_times.py [--kills 20] [--folder FOLDER]
        [train_cifar.py | train_imagenet.py]

Half of the kills (SIGKILL) come at a random moment, the others while a checkpoint is being written. Then the
same command once more, to its end. Averaged and raw weights, projector, optimizer, scheduler, the best
average and the log have to be those of a run that nobody disturbed.
"""
import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import compare, kill_once, start

# Both evaluate every eight steps. The worker process of the second outlives each kill by a few seconds.
SETTINGS = {
    "train_cifar.py": ["--smoke", "--batch-size", "32", "--attack-steps", "2", "--extra-sigma",
                       "--eval-every", "0.2353"],
    "train_imagenet.py": ["--smoke", "--image-size", "32", "--batch-size", "16", "--attack-steps", "1",
                          "--eval-every", "0.32", "--workers", "1"],
}


def run(script, flags):
    """A run to its end."""
    assert start(script, flags).wait() == 0, f"{script} failed"


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
