"""Several processes compute what one computes."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_cifar
import train_imagenet
import two_processes

ROOT = Path(__file__).parent.parent
NAMES = pytest.mark.parametrize("name", two_processes.SETTINGS)


def torchrun(job, folder, processes=2):
    """A job of two_processes.py on several processes of this machine. Returns the finished launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
               "tests/two_processes.py", job, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def train_a_little(path):
    """A WRN that tells some of the held-out images from others, and not all of them under attack."""
    script = train_cifar
    args = script.parse_args(["--smoke", "--attack-steps", "0", "--dra-weight", "0", "--lr", "0.1"])
    data = script.Data(args, torch.device("cpu"))
    run = script.build_run(args, data)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.1
    for step in range(15):
        script.set_batchnorm(run.model, momentum=0.3)
        script.train_step(run.model, run.averaged, run.projectors, None, run.optimizer, data.batch(step), 0.0,
                          args)
    torch.save(run.averaged.state_dict(), path)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """{number of processes: what each of them has computed, by setting}, and the folder."""
    folder = tmp_path_factory.mktemp("computed")
    train_a_little(folder / "wrn.pt")
    train_imagenet.draw_smoke_folders(folder / "images", 0)
    two_processes.compute(folder)
    done = torchrun("compute", folder)
    assert done.returncode == 0, done.stderr
    return {world: [torch.load(folder / f"{world}_{rank}.pt", weights_only=False) for rank in range(world)]
            for world in (1, 2)}, folder


def tensors(value):
    """All tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for inner in values for tensor in tensors(inner)]


@NAMES
def test_two_processes_draw_the_batches_and_held_out_images_of_one_bit_for_bit(name, computed):
    """Images, labels, starts of the attack, noise: what process r has are places r, r + 2, ..."""
    (one,), two = [[found[name] for found in computed[0][world]] for world in (1, 2)]
    n_drawn = 4 if name == "ImageNet" else 6  # per batch; --extra-sigma has a level and two noises
    assert len(tensors(one["batches"])) == 3 * n_drawn
    for whole, *shares in zip(*[tensors(found["batches"]) for found in (one, *two)]):
        assert len(whole) == 16 and all(len(share) == 8 for share in shares)
        assert all(torch.equal(share, whole[rank::2]) for rank, share in enumerate(shares))
    for i in range(3):  # images, labels, start
        whole, *shares = [torch.cat([batch[i] for batch in found["holdout"]]) for found in (one, *two)]
        assert len(whole) == (40 if name == "ImageNet" else 108)
        assert all(torch.equal(share, whole[rank::2]) for rank, share in enumerate(shares))


@pytest.mark.parametrize("name", ["ViT", "WRN in pieces", "ImageNet"])
def test_loss_and_gradient_of_two_processes_are_those_of_one(name, computed):
    """Where the pieces that BatchNorm normalises are the same. Without attack steps: signs amplify rounding."""
    (one,), two = [[found[name] for found in computed[0][world]] for world in (1, 2)]
    assert one["gradient"].abs().max() > 0
    for found in two:
        for what in ("loss", "gradient"):
            error = (one[what] - found[what]).norm() / one[what].norm()
            assert error < 1e-5, (what, error)


@NAMES
def test_all_processes_hold_identical_weights_after_each_step(name, computed):
    """Classifier, average and projectors, with the attack; a WRN's processes have their own statistics."""
    for found in computed[0][2]:
        for step, (first, second) in enumerate(found[name]["weights"]):
            assert torch.equal(first, second), f"after step {step}"
    (start, _), *_, (end, _) = computed[0][2][0][name]["weights"]
    assert not torch.equal(start, end)


def test_one_process_in_four_pieces_has_the_weights_of_two_with_two_pieces_each(computed):
    """After three steps, with the attack: piece j is places j, j + 4, ... of the batch in both."""
    one, two = [[found["WRN in pieces"]["weights"] for found in computed[0][world]][0] for world in (1, 2)]
    for (mine,), (theirs, _) in zip(one, two):
        assert (mine - theirs).norm() < 1e-5 * mine.norm()


def test_evaluations_use_the_running_statistics_of_process_0_in_all_processes(computed):
    for found in computed[0][2]:
        before, _, after = found["WRN"]["statistics"]
        assert not torch.equal(*before), "each has seen other images"
        assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[0])
    first, second = [found["WRN"]["statistics"][1] for found in computed[0][2]]
    assert first == second, "all processes get the same numbers"


def test_accuracy_on_the_held_out_images_does_not_depend_on_the_number_of_processes(computed):
    (one,), two = [[found["WRN"]["accuracy"] for found in computed[0][world]] for world in (1, 2)]
    clean, robust = one
    assert 0 < robust < clean < 100, "an accuracy that could be another one"
    assert two == [one, one]
    assert clean * 108 / 100 == pytest.approx(round(clean * 108 / 100), abs=1e-3)


def test_two_processes_fill_one_cache_of_targets_as_one_does(computed):
    one, two = [np.load(computed[1] / f"cache of {world}" / "targets.npy") for world in (1, 2)]
    assert one.shape == two.shape == (600, 2, 64) and (one != 0).any(axis=2).all()
    np.testing.assert_allclose(two.astype(float), one.astype(float), rtol=2e-3, atol=2e-3)


def test_process_0_logs_and_saves_once_and_its_clock_decides(tmp_path):
    """By its clock each third step is a minute after the last checkpoint; by the other's each step is. If the
    two disagreed, one would wait for the other in a reduction of another shape."""
    done = torchrun("clocks", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "saves.json").read_text()) == [0, 3, 6, 8]
    assert done.stdout.count("from step 0 to 8") == done.stdout.count("AutoAttack judges") == 1
    with open(tmp_path / "log.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4", "8"]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 8


def test_one_process_that_dies_takes_the_other_down_and_a_single_one_continues(
        tmp_path, capsys, monkeypatch):
    flags = ["--smoke", "--batch-size", "16", "--attack-steps", "1", "--dra-weight", "0", "--max-steps", "4",
             "--save-minutes", "0", "--out", str(tmp_path)]
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    done = torchrun("die", tmp_path)
    assert done.returncode != 0 and "exitcode  : 7" in done.stderr, done.stderr
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2, "what was saved before is whole"
    monkeypatch.setattr(train_cifar, "SELECTION_STEPS", 1)
    train_cifar.main(flags)
    assert "from step 2 to 4" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 4
