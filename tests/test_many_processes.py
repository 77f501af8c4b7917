"""Several processes compute what one computes. (That they draw the same batches, bit for bit, is tested beside each script's data.)"""
import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

import train_cifar

ROOT = Path(__file__).parent.parent


def torchrun(*arguments, processes=2):
    """Run a script on several processes of this machine, one thread each. Returns the finished launcher."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)


def test_loss_and_gradient_of_two_processes_are_those_of_one(tmp_path):
    """Without batch norm (ViTs of both scripts), and below the attack: its signs amplify rounding. With the attack, all processes hold
    identical weights after every step (asserted inside)."""
    done = torchrun("tests/two_processes.py", "steps", tmp_path)
    assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, "tests/two_processes.py", "steps", tmp_path], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = [torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2)]
    assert one.keys() == {"train_cifar", "train_imagenet"}
    for script in one:
        for name in ("loss", "gradient"):
            error = (one[script][name] - two[script][name]).norm() / one[script][name].norm()
            assert error < 1e-5, (script, name, error)
        assert one[script]["gradient"].abs().max() > 0


def test_two_processes_log_and_save_once_and_one_continues(tmp_path, capsys):
    """A WRN on two processes (each with its own batch statistics), continued by a single process."""
    flags = ["train_cifar.py", "--smoke", "--batch-size", "16", "--attack-steps", "1", "--dra-weight", "0", "--save-every", "0.03", "--eval-every", "0.09", "--out", tmp_path, "--max-steps", "12"]
    done = torchrun(*flags)
    assert done.returncode == 0, done.stderr
    assert "on 2 process(es)" in done.stdout and done.stdout.count("starting") == 1 and done.stdout.count("best.pt ") == 1
    assert [row["step"] for row in csv.DictReader(open(tmp_path / "log.csv"))] == ["2", "4", "6", "8", "10", "12"]
    # As after a kill that took last.pt: best.pt is there, of step 6 or 12.
    (tmp_path / "last.pt").unlink()
    step = torch.load(tmp_path / "best.pt", weights_only=True)["step"]
    train_cifar.main([*map(str, flags[1:])])
    assert f"after step {step} of 12" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 12
    assert [row["step"] for row in csv.DictReader(open(tmp_path / "log.csv"))] == ["2", "4", "6", "8", "10", "12"]


def test_one_process_that_dies_takes_the_others_down(tmp_path):
    done = torchrun("tests/two_processes.py", "die", tmp_path)
    assert done.returncode != 0, done.stderr
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2, "what was saved before is whole"
