"""Kills, a full disk, a second run in the same folder, numbers that are not finite: nothing is lost and
nothing bad is kept. (A longer version by hand: kill_twenty_times.py.)"""
import random
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_cifar
import train_imagenet
from helpers import compare, kill_once, log_rows, start

# 16 steps, with an epoch's end after step 13, and evaluations after steps 8 and 16.
FLAGS = {train_cifar: ["--batch-size", "16", "--attack-steps", "1", "--eval-every", "8/13"],
         train_imagenet: ["--image-size", "32", "--batch-size", "32", "--attack-steps", "1",
                          "--eval-every", "8/13", "--workers", "0"]}
BOTH = pytest.mark.parametrize("script", FLAGS, ids=lambda script: script.__name__)
# Before a run, here and in processes: quick evaluations, and for train_cifar.py 200 images.
LIGHTER = """
script.SELECTION_STEPS = 2
if script.__name__ == "train_cifar":
    draw = script.draw_smoke_images
    script.draw_smoke_images = lambda count, seed: draw(200, seed)
"""


@pytest.fixture(autouse=True, scope="module")
def lighter():
    """Both scripts with LIGHTER."""
    with pytest.MonkeyPatch.context() as patched:
        for script in FLAGS:
            for name in ("SELECTION_STEPS", "draw_smoke_images")[:1 + (script is train_cifar)]:
                patched.setattr(script, name, getattr(script, name))  # to have it back
            exec(LIGHTER, {"script": script})
        yield


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A function: script -> a file that does what `python script` does, with LIGHTER."""
    def write(script):
        path, root = tmp_path_factory.mktemp("process") / "run.py", Path(script.__file__).parent
        path.write_text(f"import sys\nsys.path.insert(0, {str(root)!r})\nimport {script.__name__} as script\n"
                        f"{LIGHTER}script.main()\n")
        return str(path)
    return write


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """train_imagenet.py's flags for the images that a smoke run would draw in its own folder."""
    folder = tmp_path_factory.mktemp("images")
    train_imagenet.draw_smoke_folders(folder, 0)
    return ["--data", str(folder), "--synthetic", str(folder / "synthetic")]


@pytest.fixture(scope="module")
def flags(images):
    """A function: script, folder of the run, further flags -> all flags."""
    def all_flags(script, out, *more, steps=16):
        data = [] if script is train_cifar else images
        return ["--smoke", *FLAGS[script], *data, "--max-steps", str(steps), "--out", str(out), *more]
    return all_flags


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """A function: script -> the folder of a run that nobody disturbed. It saved when it began and ended."""
    folders = {}

    def folder(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp(script.__name__)
            script.main(flags(script, folders[script]))
        return folders[script]
    return folder


def with_worker(script):
    """One for train_imagenet.py; the other script has none."""
    return ["--workers", "1"] if script is train_imagenet else []


def saved_step(out):
    return torch.load(out / "last.pt", weights_only=True)["step"]


# ----------------------------------------------------------------------------------------------------- kills

@BOTH
def test_a_killed_run_continues_to_the_same_bits_and_the_same_log(
        script, flags, process, undisturbed, tmp_path):
    """SIGKILL at a random moment and while a checkpoint is being written. A worker process, as
    train_imagenet.py has it here, outlives the kill by a few seconds and holds the folder's lock for so
    long."""
    rng, command = random.Random(0), flags(script, tmp_path)
    killed = command + with_worker(script)
    kill_once(process(script), killed, tmp_path, False, rng)
    step, writing = kill_once(process(script), killed, tmp_path, True, rng)
    assert writing and step < 16, "last.pt is whole, although its successor was in the making"
    script.main(command)
    assert compare(undisturbed(script), tmp_path) == [] and not (tmp_path / "last.pt.tmp").exists()
    assert len(log_rows(tmp_path)) == 3


@BOTH
def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_locks_nothing(
        script, flags, process, tmp_path, monkeypatch):
    command, path = flags(script, tmp_path, "--save-minutes", "0"), tmp_path / "last.pt"
    first = start(process(script), command + with_worker(script))
    try:
        while not (path.exists() and saved_step(tmp_path) > 0):
            assert first.poll() is None
        first.send_signal(signal.SIGSTOP)  # so that it is still there after the second has waited
        before = path.read_bytes()
        with pytest.raises(train_cifar.InputError if script is train_cifar else train_imagenet.InputError,
                           match=f"^{tmp_path}: another run is at work there$"):
            script.main(command)
        assert path.read_bytes() == before and first.poll() is None
    finally:
        first.kill()
        first.wait()

    class GotIn(Exception):
        """Raised in place of the third run's first step."""

    def get_in(*_):
        raise GotIn
    monkeypatch.setattr(script, "train_step", get_in)
    with pytest.raises(GotIn):
        script.main(command)


def test_a_full_disk_leaves_the_last_checkpoint_whole(flags, tmp_path, monkeypatch):
    """From the fourth step on files may only grow to 100 kB, and the write fails in the middle."""
    script, limits = train_cifar, resource.getrlimit(resource.RLIMIT_FSIZE)
    train_step, calls = script.train_step, []

    def filling(*arguments):
        calls.append(1)
        if len(calls) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return train_step(*arguments)
    monkeypatch.setattr(script, "train_step", filling)
    try:
        with pytest.raises((OSError, RuntimeError)):
            script.main(flags(script, tmp_path, "--save-minutes", "0"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(calls) == 4 and saved_step(tmp_path) == 3
    assert 0 < (tmp_path / "last.pt.tmp").stat().st_size <= 100_000


@BOTH
def test_checkpoints_are_written_by_the_clock(script, flags, tmp_path, monkeypatch):
    """By a clock on which a step takes 25 s: every third is a minute after the last checkpoint."""
    now, saves, save, train_step = [0.0], [], script.save, script.train_step

    def slow(*arguments):
        now[0] += 25
        return train_step(*arguments)

    def noted(out, about, run):
        saves.append(run.step)
        save(out, about, run)
    monkeypatch.setattr(script, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(script, "train_step", slow)
    monkeypatch.setattr(script, "save", noted)
    script.main(flags(script, tmp_path, "--save-minutes", "1", steps=8))
    assert saves == [0, 3, 6, 8]


# ------------------------------------------------------------------------------- numbers that are not finite

def spoil(model):
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)


@BOTH
@pytest.mark.parametrize("what", ["a loss", "a weight"])
def test_what_is_not_finite_stops_the_run_with_its_step_and_nothing_of_it_is_saved(
        script, what, flags, tmp_path, monkeypatch):
    """A weight is NaN before the fourth step, and so the loss; or only after it. Every step is saved and
    evaluated. Without the NaN the same command goes on behind the third step."""
    train_step, calls = script.train_step, []
    whole, command = tmp_path / "whole", flags(script, tmp_path / "run", steps=5)
    more = ["--batch-size", "16", "--save-minutes", "0", "--eval-every", "1/100"]

    def breaking(model, *rest):
        calls.append(1)
        if len(calls) == 4 and what == "a loss":
            spoil(model)
        numbers = train_step(model, *rest)
        if len(calls) == 4 and what == "a weight":
            spoil(model)
        return numbers
    monkeypatch.setattr(script, "train_step", breaking)
    expected = {"a loss": r"^step 4: not finite: \{'loss': nan, 'trades': nan, ",
                "a weight": "^step 4: a weight is not finite$"}
    with pytest.raises(FloatingPointError, match=expected[what]):
        script.main(command + more)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert saved["step"] == 3 and best["step"] <= 3 and len(log_rows(tmp_path / "run")) == 3
    for state in (saved["model_state_dict"], saved["unaveraged_model_state_dict"], best["model_state_dict"]):
        assert all(value.isfinite().all() for value in state.values())

    monkeypatch.setattr(script, "train_step", train_step)
    script.main(command + more)
    script.main(flags(script, whole, steps=5) + more)
    assert compare(whole, tmp_path / "run") == []
