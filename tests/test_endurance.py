"""Signals, kills, full disks and a second run in the same folder: nothing is lost. (A longer version by hand: kill_twenty_times.py.)"""
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_cifar
import train_imagenet
from kill_twenty_times import differences

ROOT = Path(__file__).parent.parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # the order of sums depends on the number of threads


def start(script, out, *more, **kwargs):
    """A run of 16 steps that saves every fourth, as a process of its own. (CIFAR: within its only epoch the rate is peak / 250,000 = 0.1.)"""
    flags = {"train_cifar.py": ["--batch-size", "16", "--attack-steps", "2", "--lr", "25000", "--save-every", "0.0589", "--eval-every", "5"],
             "train_imagenet.py": ["--arch", "test_vit", "--image-size", "32", "--batch-size", "16", "--attack-steps", "1", "--save-every", "0.16", "--eval-every", "5", "--workers", "0"]}[script]
    return subprocess.Popen([sys.executable, script, "--smoke", *flags, "--max-steps", "16", "--out", str(out), *more], cwd=ROOT, env=ONE_THREAD,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.fixture(scope="module", params=["train_cifar.py", "train_imagenet.py"])
def undisturbed(request, tmp_path_factory):
    """A script and the folder of its run that nobody disturbed."""
    out = tmp_path_factory.mktemp(Path(request.param).stem)
    _, errors = (process := start(request.param, out)).communicate(timeout=120)
    assert process.returncode == 0, errors
    return request.param, out


def test_a_signal_lets_the_step_finish_saves_and_the_same_command_continues_to_the_same_bits(undisturbed, tmp_path):
    script, whole = undisturbed
    number, code = {"train_cifar.py": (signal.SIGTERM, 143), "train_imagenet.py": (signal.SIGINT, 130)}[script]
    process = start(script, tmp_path)
    wait_for(tmp_path / "last.pt", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert process.returncode == code and errors.splitlines() == [f"stopped by {number.name} after step {step} of 16; the same command continues from there"]
    assert 4 <= step < 16
    _, errors = (process := start(script, tmp_path)).communicate(timeout=120)
    assert process.returncode == 0, errors
    assert differences(tmp_path / "last.pt", whole / "last.pt") == [] and differences(tmp_path / "best.pt", whole / "best.pt") == []


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_is_answered_by_the_process_that_trains(tmp_path, number, code):
    """As Ctrl-C in a terminal, torchrun and Slurm send it: the processes that read images go on until the step is saved."""
    process = start("train_imagenet.py", tmp_path, "--workers", "2", start_new_session=True)
    wait_for(tmp_path / "last.pt", process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code and len(errors.splitlines()) == 1 and f"stopped by {number.name}" in errors, errors


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_evaluation_stops_at_once_and_keeps_what_is_finished(tmp_path, number, code):
    np.savez(tmp_path / "test.npz", image=np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8), label=np.arange(32) % 10)
    process = subprocess.Popen([sys.executable, "eval_autoattack.py", "tests/fixtures/dmat_wrn_10_1_cifar10.pt", "--arch", "wrn-10-1", "--dataset", "cifar10", "--device", "cpu",
                                "--data-dir", tmp_path, "--batch-size", "4", "--out", tmp_path / "out"], cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "out" / "clean_00000.npz", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in errors and (tmp_path / "out" / "clean_00000.npz").exists()


@pytest.mark.parametrize("script", [train_cifar, train_imagenet], ids=lambda script: script.__name__)
def test_a_signal_is_only_noted_and_the_second_one_ends_the_process(script):
    before = signal.signal(signal.SIGTERM, script.note_signal)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert script.SIGNALS == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
        script.SIGNALS.clear()


@pytest.mark.parametrize("undisturbed", ["train_cifar.py"], indirect=True)
def test_killed_while_a_checkpoint_is_being_written(undisturbed, tmp_path):
    """SIGKILL; kill_twenty_times.py does more of it, for both scripts (which save with the same code) and at random moments too."""
    script, whole = undisturbed
    process = start(script, tmp_path)
    wait_for(tmp_path / "last.pt", process)
    while process.poll() is None and not (tmp_path / "last.pt.tmp").exists():
        pass
    process.kill()
    process.communicate(timeout=120)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] < 16, "whole, although its successor was in the making"
    _, errors = (process := start(script, tmp_path)).communicate(timeout=120)
    assert process.returncode == 0, errors
    assert differences(tmp_path / "last.pt", whole / "last.pt") == [] and not (tmp_path / "last.pt.tmp").exists()


def test_a_full_disk_is_one_clear_line_and_leaves_the_last_checkpoint(tmp_path):
    """Files may only grow to 100 kB in the second process, as on a disk that is full; the write fails in the middle of the checkpoint."""
    script = "train_cifar.py"
    process = start(script, tmp_path)
    wait_for(tmp_path / "last.pt", process)
    process.kill()
    process.communicate(timeout=120)
    before = (tmp_path / "last.pt").read_bytes()
    process = start(script, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and len(errors.splitlines()) == 1, errors
    assert "last.pt: cannot be written" in errors or "best.pt: cannot be written" in errors
    assert (tmp_path / "last.pt").read_bytes() == before and torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 4
    assert not (tmp_path / "last.pt.tmp").exists()


def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_locks_nothing(tmp_path):
    process = start("train_cifar.py", tmp_path)
    wait_for(tmp_path / "last.pt", process)
    _, errors = (second := start("train_cifar.py", tmp_path)).communicate(timeout=120)
    assert second.returncode == 2 and errors == f"error: {tmp_path}: another run is at work there\n"
    process.kill()
    process.communicate(timeout=120)
    third = start("train_cifar.py", tmp_path)
    assert any(line.startswith("continuing") for line in third.stdout), third.stderr.read()
    third.kill()
    third.communicate(timeout=120)


def test_a_loss_that_is_not_finite_names_step_terms_and_the_last_good_checkpoint(tmp_path):
    """The learning rate explodes after the first checkpoint (a rate that is fine in the warm-up's first steps)."""
    for script, flags in ((train_cifar, ["--batch-size", "16", "--attack-steps", "1"]),
                          (train_imagenet, ["--arch", "test_vit", "--image-size", "32", "--batch-size", "16", "--attack-steps", "1", "--workers", "0"])):
        out = tmp_path / script.__name__
        step, count = script.train_step, []

        def exploding(model, *rest):
            count.append(1)
            if len(count) == 4:
                with torch.no_grad():
                    next(model.parameters()).fill_(torch.nan)
            return step(model, *rest)
        script.train_step = exploding
        try:
            with pytest.raises(FloatingPointError) as caught:
                script.main(["--smoke", *flags, "--max-steps", "8", "--save-every", "0.0001", "--out", str(out)])
        finally:
            script.train_step = step
        message = str(caught.value)
        assert "not finite in step 4" in message and "loss nan" in message and "trades nan" in message and f"last good checkpoint: {out / 'last.pt'}" in message
        saved = torch.load(out / "last.pt", weights_only=True)
        assert saved["step"] == 3 and all(value.isfinite().all() for value in saved["model_state_dict"].values())
