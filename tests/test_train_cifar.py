"""The whole script: a run is exact, continues exactly, loses nothing, and names what it cannot use."""
import copy
import csv
import itertools
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_cifar
from kill_twenty_times import leaves
from train_cifar import (InputError, build_model, draw_smoke_images, load_real, main, parse_args,
                         write_atomically)

ROOT, FIXTURES = Path(__file__).parent.parent, Path(__file__).parent / "fixtures"
TEACHER = FIXTURES / "edm_tiny_cond_vp.pkl"


@pytest.fixture(scope="module", autouse=True)
def small_settings():
    """Nearly all of a tiny network's checkpoint would be its projectors, and nearly all of a short run would
    be the attack on the held-out images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cifar, "PROJECTOR_WIDTH", 32)
        patch.setattr(train_cifar, "SELECTION_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """64 real images, so that an epoch of 16 a step has four steps, and 30 synthetic ones."""
    folder = tmp_path_factory.mktemp("files")
    for name, count in (("train", 64), ("synthetic", 30)):
        images, labels = draw_smoke_images(count, seed=count)
        np.savez(folder / f"{name}.npz", image=images, label=labels)
    return folder


@pytest.fixture(scope="module")
def ten_steps(files):
    """Flags of a run of ten steps: two and a half epochs, with an evaluation after each and at the end. All
    that a run can have is in it. It saves when it starts and when it ends."""
    return ["--device", "cpu", "--arch", "wrn-10-1", "--batch-size", "16", "--attack-steps", "2",
            "--lr", "0.05", "--data-dir", str(files), "--synthetic", str(files / "synthetic.npz"),
            "--synthetic-fraction", "0.5", "--teacher", str(TEACHER), "--extra-sigma", "--max-steps", "10"]


@pytest.fixture(scope="module")
def finished(ten_steps, tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("finished")
    main([*ten_steps, "--out", str(out)])
    return out


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(path, other):
    """Two checkpoints hold the same, bit for bit, apart from the name of the folder, the minutes between
    checkpoints and the speed."""
    a, b = [dict(leaves(load(p))) for p in (path, other)]
    assert a.keys() == b.keys() and len(a) > 30
    for name in a:
        if not name.endswith(("/args/out", "/args/save_minutes", "/images_per_s")):
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, name


def log_rows(out):
    with open(out / "log.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "images_per_s"}
                for row in csv.DictReader(file)]


def assert_same_run(out, other):
    for name in ("last.pt", "best.pt"):
        assert_same(out / name, other / name)
    assert log_rows(out) == log_rows(other)


def contents(folder):
    """Every file's bytes; the lock, which is empty, may come and go."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def leave_out_training(monkeypatch, *scores, each_step=lambda: None):
    """Let runs train nothing, and call each_step instead. scores: what their evaluations find, clean and
    robust."""
    def step(model, averaged, projectors, teacher, optimizer, *rest):
        each_step()
        optimizer.step()  # there are no gradients; or the scheduler would complain
        return dict.fromkeys(("loss", "train_clean", "train_robust"), torch.zeros(()))
    found = itertools.chain(scores, itertools.repeat((0.0, 0.0)))
    monkeypatch.setattr(train_cifar, "train_step", step)
    monkeypatch.setattr(train_cifar, "evaluate", lambda *_: next(found))


class Killed(BaseException):
    """The run ends here, without a chance to save anything."""


def die_in_step(monkeypatch, number):
    """Let the training step of that number, counted from 1 in this process, end the run in its middle."""
    step, calls = train_cifar.train_step, []

    def fatal(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return step(*arguments)
    monkeypatch.setattr(train_cifar, "train_step", fatal)


# ----------------------------------------------------------------------------------------- exact continuation

@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_continues_to_the_same_bits(ten_steps, finished, tmp_path):
    """SIGKILL in the seventh step, then the same command again; last.pt is of the sixth."""
    code = """if True:
        import os, signal, sys, train_cifar
        train_cifar.PROJECTOR_WIDTH, train_cifar.SELECTION_STEPS = 32, 4
        step, calls = train_cifar.train_step, []
        def fatal(*arguments):
            calls.append(1)
            if len(calls) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments)
        train_cifar.train_step = fatal
        train_cifar.main(sys.argv[1:])
        """
    flags = [*ten_steps, "--save-minutes", "0", "--out", str(tmp_path)]
    # The number of threads decides in which order sums are taken: the same as in this process.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, env=os.environ | threads)
    assert done.returncode == -signal.SIGKILL and load(tmp_path / "last.pt")["step"] == 6
    main(flags)
    assert_same_run(tmp_path, finished)


def test_a_run_that_dies_again_and_again_has_the_log_of_one_that_does_not(ten_steps, finished, tmp_path,
                                                                          monkeypatch):
    """Killed in its first step, in the middle of an epoch, and at the end of one. Rows begin before a kill
    and end after it; the log does not show when the run was saved."""
    flags = [*ten_steps, "--save-minutes", "0", "--out", str(tmp_path)]
    for steps_done, dies_in in ((0, 1), (0, 4), (3, 3), (5, 4)):
        if (tmp_path / "last.pt").exists():
            assert load(tmp_path / "last.pt")["step"] == steps_done
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_in_step(patch, dies_in)
            main(flags)
    assert load(tmp_path / "last.pt")["step"] == 8
    main(flags)
    assert_same_run(tmp_path, finished)
    assert [row["step"] for row in log_rows(finished)] == ["4", "8", "10"]


def test_what_came_after_the_last_checkpoint_is_done_again(ten_steps, finished, tmp_path, monkeypatch):
    """With the default of five minutes only the untrained run was saved, before step 1. The log on disk is
    ahead of it."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 7)
        main([*ten_steps, "--out", str(tmp_path)])
    saved = load(tmp_path / "last.pt")
    assert saved["step"] == 0 and saved["log"] == [] and saved["best"] is None
    assert [row["step"] for row in log_rows(tmp_path)] == ["4"] and not (tmp_path / "best.pt").exists()
    main([*ten_steps, "--out", str(tmp_path)])
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("minutes, saved", [("0", list(range(11))), ("0.5", list(range(11))),
                                            ("2", [0, 2, 4, 6, 8, 10]), ("7/2", [0, 4, 8, 10])])
def test_checkpoints_come_by_the_clock(ten_steps, tmp_path, monkeypatch, minutes, saved):
    """On a clock on which each step takes a minute."""
    clock, save, steps = [0.0], train_cifar.save, []

    def a_minute():
        clock[0] += 60

    def noted(out, about, run):
        steps.append(run.step)
        save(out, about, run)
        assert load(out / "last.pt")["step"] == run.step
    leave_out_training(monkeypatch, each_step=a_minute)
    monkeypatch.setattr(train_cifar, "save", noted)
    monkeypatch.setattr(train_cifar, "time", SimpleNamespace(time=lambda: clock[0]))
    main([*ten_steps, "--save-minutes", minutes, "--out", str(tmp_path)])
    assert steps == saved


def test_a_finished_run_changes_nothing_when_started_again(ten_steps, finished, tmp_path):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    main([*ten_steps, "--out", str(tmp_path)])
    assert_same_run(tmp_path, finished)
    assert (tmp_path / "log.csv").read_bytes() == (finished / "log.csv").read_bytes()


@pytest.mark.parametrize("there", ["missing", "older"])
def test_best_pt_is_written_again_when_a_run_continues(ten_steps, finished, tmp_path, there):
    """A kill between the two writes leaves last.pt of a step and best.pt of an earlier one, or none."""
    (tmp_path / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    if there == "older":
        torch.save({"step": 4}, tmp_path / "best.pt")
    main([*ten_steps, "--out", str(tmp_path)])
    assert_same(tmp_path / "best.pt", finished / "best.pt")


# ------------------------------------------------------------------------ what is refused, and left as it was

@pytest.mark.parametrize("names", [["best.pt"], ["log.csv"], ["best.pt", "log.csv"]])
def test_a_folder_with_files_of_a_run_but_no_last_pt_is_refused(ten_steps, finished, tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    before = contents(tmp_path)
    with pytest.raises(InputError, match="has files of a run but no last.pt") as caught:
        main([*ten_steps, "--out", str(tmp_path)])
    assert str(caught.value).startswith(f"{tmp_path}: ") and contents(tmp_path) == before


def test_another_recipe_is_refused_and_the_first_difference_is_named(ten_steps, finished):
    before = contents(finished)
    for flags, difference in (
            ("--beta 6", "beta 5.0, not 6.0"), ("--seed 1", "seed 0, not 1"),
            ("--seed 1 --beta 6 --eps 0.1", f"eps {8 / 255}, not 0.1"),
            ("--eps 4/255", f"eps {8 / 255}, not {4 / 255}"), ("--max-steps 11", "max_steps 10, not 11"),
            ("--synthetic-fraction 0.6", "synthetic_fraction 0.5, not 0.6"),
            ("--teacher-unconditional", "teacher_unconditional False, not True")):
        with pytest.raises(InputError) as caught:
            main([*ten_steps, *flags.split(), "--out", str(finished)])
        message = f"{finished / 'last.pt'}: is of a run with {difference}; change --out"
        assert str(caught.value) == message
    assert contents(finished) == before


def test_a_default_that_is_given_on_the_command_line_is_the_same_recipe(ten_steps, finished, tmp_path):
    (tmp_path / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    main([*ten_steps, "--epochs", "200", "--eval-every", "1", "--beta", "5", "--ema-decay", "0.995",
          "--weight-decay", "0.0005", "--eps", "8/255", "--dra-weight", "1", "--teacher-sigma", "0.06",
          "--teacher-layer", "dec.8x8_in1", "--seed", "0", "--out", str(tmp_path)])


def test_what_does_not_change_the_method_may_differ(ten_steps, finished, tmp_path):
    (tmp_path / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    main([*ten_steps, "--save-minutes", "1", "--amp", "--no-compile", "--out", str(tmp_path)])
    main([*ten_steps, "--beta", "6", "--dry-run", "--out", str(tmp_path)])  # trains nothing, so it may


def test_moved_files_are_the_same_recipe_and_other_names_are_not(ten_steps, files, finished, tmp_path):
    """Files count by their names: the last part of a path."""
    there, out = tmp_path / "elsewhere" / files.name, tmp_path / "out"
    there.mkdir(parents=True)
    out.mkdir()
    for path in (*files.iterdir(), TEACHER):
        (there / path.name).write_bytes(path.read_bytes())
    (out / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    moved = [flag.replace(str(files), str(there)).replace(str(TEACHER), str(there / TEACHER.name))
             for flag in ten_steps]
    assert moved != ten_steps
    main([*moved, "--out", str(out)])
    (there / "synthetic.npz").rename(there / "others.npz")
    with pytest.raises(InputError, match=r"run with synthetic synthetic.npz, not others.npz; change --out$"):
        main([*moved, "--synthetic", str(there / "others.npz"), "--out", str(out)])
    with pytest.raises(InputError, match="run with synthetic synthetic.npz, not synthetic.npz, others.npz; "):
        main([*ten_steps, "--synthetic", str(files / "synthetic.npz"), str(there / "others.npz"),
              "--out", str(out)])


@pytest.mark.parametrize("name, count, numbers", [("train", 63, "63, 30"), ("synthetic", 29, "64, 29")])
def test_other_numbers_of_images_are_refused(ten_steps, files, finished, tmp_path, name, count, numbers):
    there = tmp_path / files.name
    there.mkdir()
    for path in files.iterdir():
        (there / path.name).write_bytes(path.read_bytes())
    images, labels = draw_smoke_images(count, seed=0)
    np.savez(there / f"{name}.npz", image=images, label=labels)
    before = contents(finished)
    with pytest.raises(InputError, match=f"is of a run with images 64, 30, not {numbers}; change --out"):
        main([*[flag.replace(str(files), str(there)) for flag in ten_steps], "--out", str(finished)])
    assert contents(finished) == before


def test_a_damaged_or_hostile_checkpoint_is_named_and_left_alone(ten_steps, finished, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)
    hostile, out = tmp_path / "hostile.pt", tmp_path / "out"
    out.mkdir()
    torch.save({"recipe": Hostile()}, hostile)
    whole = (finished / "last.pt").read_bytes()
    for content in (whole[:len(whole) // 2], b"", hostile.read_bytes(), pickle.dumps(Hostile()),
                    (FIXTURES / "dmat_wrn_10_1_cifar10.pt").read_bytes()):
        (out / "last.pt").write_bytes(content)
        with pytest.raises(InputError, match="damaged, or no last.pt of this script") as caught:
            main([*ten_steps, "--out", str(out)])
        assert str(caught.value).startswith(f"{out / 'last.pt'}: ") and "\n" not in str(caught.value)
        assert contents(out) == {"last.pt": content} and not (tmp_path / "was_run").exists()


# ------------------------------------------------------------------------------------- whole files, good ones

def test_a_file_is_written_under_another_name_synced_and_renamed(tmp_path, monkeypatch):
    path, happened = tmp_path / "last.pt", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def noted_fsync(number):
        happened.append("synced")
        assert path.read_bytes() == b"old" and [p.read_bytes() for p in tmp_path.glob("*.tmp")] == [b"new"]
        fsync(number)

    def noted_replace(source, destination):
        happened.append("renamed")
        replace(source, destination)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(path, lambda file: file.write(b"new"))
    assert happened == ["synced", "renamed"] and contents(tmp_path) == {"last.pt": b"new"}


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    write_atomically(path, lambda file: torch.save({"step": 1}, file))

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        content = {"weights": torch.zeros(1000), "then": Unwritable()}
        write_atomically(path, lambda file: torch.save(content, file))
    assert load(path) == {"step": 1}
    write_atomically(path, lambda file: torch.save({"step": 2}, file))
    assert load(path) == {"step": 2} and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_last_pt_is_there_before_the_first_step_and_best_pt_just_after_the_first_best(ten_steps, tmp_path,
                                                                                      monkeypatch):
    """best.pt follows last.pt, and only when it changed: nothing of it is lost, and nothing comes early."""
    written, seen, write = [], [], train_cifar.write_atomically

    def noted(path, content):
        written.append((path.name, len(seen)))
        write(path, content)
    monkeypatch.setattr(train_cifar, "write_atomically", noted)
    leave_out_training(monkeypatch, (90.0, 50.0), (90.0, 40.0), (90.0, 60.0),
                       each_step=lambda: seen.append(sorted(contents(tmp_path))))
    main([*ten_steps, "--save-minutes", "0", "--out", str(tmp_path)])
    assert seen[0] == ["last.pt"] and seen[3] == ["last.pt"] and seen[4] == ["best.pt", "last.pt", "log.csv"]
    last, best = [[steps for name, steps in written if name == wanted] for wanted in ("last.pt", "best.pt")]
    assert last == list(range(11)) and best == [4, 10]
    assert written[written.index(("best.pt", 4)) - 1] == ("last.pt", 4)


def test_a_loss_that_is_not_finite_stops_the_run_and_nothing_of_it_is_saved(ten_steps, tmp_path):
    with pytest.raises(FloatingPointError, match=r"^step \d: not finite: \{'loss': nan, 'trades': .*\}$"):
        main([*ten_steps, "--lr", "1e12", "--save-minutes", "0", "--out", str(tmp_path)])
    saved = load(tmp_path / "last.pt")
    assert saved["step"] < 4 and not (tmp_path / "log.csv").exists()
    assert all(value.isfinite().all() for _, value in leaves(saved) if isinstance(value, torch.Tensor))


def test_the_first_step_that_was_not_finite_is_named_when_it_is_noticed_later(ten_steps, tmp_path,
                                                                              monkeypatch):
    """Numbers stay on the device until a row of the log or a checkpoint is due: here after step 4."""
    step, calls = train_cifar.train_step, []

    def spoiled(*arguments):
        calls.append(1)
        numbers = step(*arguments)
        return numbers | {"trades": numbers["trades"] * (torch.inf if len(calls) == 3 else 1)}
    monkeypatch.setattr(train_cifar, "train_step", spoiled)
    with pytest.raises(FloatingPointError, match=r"^step 3: not finite: \{'loss': \d.*, 'trades': inf, "):
        main([*ten_steps, "--out", str(tmp_path)])
    assert len(calls) == 4 and load(tmp_path / "last.pt")["step"] == 0


@pytest.mark.parametrize("part", ["model", "projectors"])
def test_weights_that_are_not_finite_are_never_saved(ten_steps, tmp_path, monkeypatch, part):
    """The loss is still finite in the step whose gradient is not. The checkpoint before it has to survive."""
    step, calls = train_cifar.train_step, []

    def spoiling(model, averaged, projectors, *rest):
        numbers = step(model, averaged, projectors, *rest)
        calls.append(1)
        if len(calls) == 3:
            *_, bias = {"model": model, "projectors": projectors}[part].parameters()
            bias.data[0] = torch.nan
        return numbers
    monkeypatch.setattr(train_cifar, "train_step", spoiling)
    with pytest.raises(FloatingPointError, match="^step 3: a weight is not finite$"):
        main([*ten_steps, "--save-minutes", "0", "--out", str(tmp_path)])
    assert load(tmp_path / "last.pt")["step"] == 2


# --------------------------------------------------------------------------------------------- what it leaves

def test_last_pt_is_plain_data_with_dmats_and_robustbenchs_names(ten_steps, finished):
    saved = load(finished / "last.pt")
    assert saved.keys() == {"args", "recipe", "arch", "dataset", "num_classes", "mean", "std", "step", "log",
                            "recent", "best", "model_state_dict", "unaveraged_model_state_dict", "state_dict",
                            "projector", "optimizer", "scheduler"}
    assert (saved["arch"], saved["dataset"], saved["num_classes"]) == ("wrn-10-1", "cifar10", 10)
    assert len(saved["mean"]) == len(saved["std"]) == 3 and saved["step"] == 10 and saved["recent"] == []
    for key in ("model_state_dict", "state_dict", "unaveraged_model_state_dict"):
        build_model(saved["arch"], saved["num_classes"]).load_state_dict(saved[key], strict=True)
    averaged, live = saved["model_state_dict"], saved["unaveraged_model_state_dict"]
    assert all(torch.equal(averaged[name], saved["state_dict"][name]) for name in averaged)
    assert not torch.equal(averaged["init_conv.weight"], live["init_conv.weight"])
    same = torch.equal(averaged["batchnorm.running_mean"], live["batchnorm.running_mean"])
    assert same, "running statistics are the live model's"
    assert saved["args"] == vars(parse_args([*ten_steps, "--out", str(finished)])), "as parse_args left them"


def test_best_pt_holds_the_best_average_and_no_optimizer(finished):
    """What was best at its evaluation, although training went on."""
    last, best = load(finished / "last.pt"), load(finished / "best.pt")
    assert best.keys() == {"args", "recipe", "arch", "dataset", "num_classes", "mean", "std", "step", "score",
                           "model_state_dict", "state_dict"}
    for name in ("args", "recipe", "arch", "dataset", "num_classes", "mean", "std"):
        assert best[name] == last[name]
    scores = {row["step"]: row["holdout_robust"] for row in last["log"]}
    assert best["score"] == scores[best["step"]] == max(scores.values())
    for key in ("model_state_dict", "state_dict"):
        build_model("wrn-10-1", 10).load_state_dict(best[key], strict=True)
    averaged = best["model_state_dict"]
    assert all(torch.equal(best["state_dict"][name], value) for name, value in averaged.items())


def test_best_pt_is_the_average_as_it_was_when_it_was_judged(ten_steps, tmp_path, monkeypatch):
    judged, scores = [], iter([60.0, 50.0, 40.0])

    def evaluate(averaged, data, args):
        judged.append(copy.deepcopy(averaged.state_dict()))
        return 100.0, next(scores)
    monkeypatch.setattr(train_cifar, "evaluate", evaluate)
    main([*ten_steps, "--attack-steps", "1", "--out", str(tmp_path)])
    best = load(tmp_path / "best.pt")
    assert (best["step"], best["score"]) == (4, 60)
    assert all(torch.equal(best["model_state_dict"][name], value) for name, value in judged[0].items())
    assert not torch.equal(judged[0]["init_conv.weight"], judged[2]["init_conv.weight"])


@pytest.mark.parametrize("flags", [["--attack-steps", "0"], ["--eps", "0"]])
def test_without_an_attack_the_clean_accuracy_selects(ten_steps, tmp_path, monkeypatch, flags):
    """Plain training makes nothing robust: the first evaluation, of a network that knows nothing yet, would
    win."""
    leave_out_training(monkeypatch, (60.0, 10.0), (90.0, 0.0), (80.0, 0.0))
    main([*ten_steps, *flags, "--out", str(tmp_path)])
    best = load(tmp_path / "best.pt")
    assert (best["step"], best["score"]) == (8, 90)


def test_of_equally_good_evaluations_the_later_one_stays(ten_steps, tmp_path, monkeypatch):
    leave_out_training(monkeypatch, *3 * [(60.0, 30.0)])
    main([*ten_steps, "--out", str(tmp_path)])
    assert load(tmp_path / "best.pt")["step"] == 10, "and not 4 or 8"


def test_log_has_its_columns_in_percent_and_eq_4_holds_in_it(finished):
    rows = log_rows(finished)
    assert list(rows[0]) == ["step", "epoch", "lr", "loss", "trades", "cosine", "train_clean", "train_robust",
                             "holdout_clean", "holdout_robust"]
    assert [row["epoch"] for row in rows] == ["1", "2", "2.5"]
    for row in rows:
        row = {name: float(value) for name, value in row.items()}
        assert 0 <= row["holdout_robust"] <= row["holdout_clean"] <= 100 and -1 <= row["cosine"] <= 1
        assert abs(row["loss"] - (row["trades"] - row["cosine"])) < 1e-4, "lambda is 1"
        in_48 = row["train_clean"] * 16 * (2 if row["epoch"] == 2.5 else 4) / 100
        assert abs(in_48 - round(in_48)) < 1e-2, "a mean over the images of the steps since the last row"


def test_a_row_comes_with_each_epoch_each_evaluation_and_every_50_steps(files, tmp_path, monkeypatch):
    """Epochs of 64 steps, evaluations every 48 (0.75 epochs). Each row holds means over the steps since the
    row before it. Here the loss is the step's number, which the model's buffer counts."""
    def step(model, *rest):
        tracked = model.batchnorm.num_batches_tracked
        tracked += 1
        return {"loss": tracked.float(), "train_clean": torch.zeros(()), "train_robust": torch.zeros(())}
    monkeypatch.setattr(train_cifar, "train_step", step)
    monkeypatch.setattr(train_cifar, "evaluate", lambda *_: (2.0, 1.0))
    monkeypatch.setattr(torch.optim.lr_scheduler.OneCycleLR, "step", lambda self: None)
    flags = ["--device", "cpu", "--arch", "wrn-10-1", "--dra-weight", "0", "--batch-size", "1", "--data-dir",
             str(files), "--max-steps", "130", "--eval-every", "0.75"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main([*flags, "--out", str(whole)])
    for dies_in in (20, 33, 40):  # in steps 20, 52 and 91
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_in_step(patch, dies_in)
            main([*flags, "--save-minutes", "0", "--out", str(killed)])
    assert load(killed / "last.pt")["step"] == 90
    main([*flags, "--out", str(killed)])
    rows = log_rows(whole)
    assert log_rows(killed) == rows
    assert [int(row["step"]) for row in rows] == [48, 50, 64, 96, 100, 128, 130]
    assert [row["holdout_robust"] for row in rows] == ["1", "", "", "1", "", "", "1"]
    assert [float(row["loss"]) for row in rows] == [24.5, 49.5, 57.5, 80.5, 98.5, 114.5, 129.5]


def test_a_run_says_what_it_found_and_which_command_judges(ten_steps, finished, capsys):
    main([*ten_steps, "--out", str(finished)])
    lines, rows = capsys.readouterr().out.splitlines(), log_rows(finished)
    for line, name in zip(lines[-3:-1], ("holdout_clean", "holdout_robust")):
        first, last = [f"{float(row[name]):.2f}" for row in (rows[0], rows[-1])]
        assert line.split() == f"{name} {first} % in the first evaluation, {last} % in the last".split()
    assert lines[-1] == f"AutoAttack judges: python eval_autoattack.py {finished / 'best.pt'}"


def test_dry_run_prints_the_plan_and_writes_nothing(files, tmp_path, capsys):
    main(["--device", "cpu", "--dry-run", "--data-dir", str(files), "--teacher", str(TEACHER),
          "--synthetic", str(files / "synthetic.npz"), "--arch", "wrn-10-1", "--batch-size", "512",
          "--max-steps", "100", "--out", str(tmp_path / "never")])
    plan = capsys.readouterr().out
    for part in ("wrn-10-1 in float32, aligned with", "features of EDMEncoder", "58 real, 30 synthetic and 6 held-out",
                 "100 steps = 100 epochs", "154 real + 358 synthetic"):
        assert part in plan
    assert not (tmp_path / "never").exists()


def test_a_vit_keeps_its_last_average_and_a_run_too_short_for_it_says_so(tmp_path, capsys):
    """Images go in as they are, whatever the data set: the checkpoint says mean 0 and deviation 1."""
    main(["--smoke", "--arch", "vit-tiny-2", "--dataset", "npz", "--dra-weight", "0", "--max-steps", "2",
          "--batch-size", "8", "--attack-steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "WARNING: --ema-decay 0.9999: after 2 steps the average is still to 100 % the random" in printed
    assert f"python eval_autoattack.py {tmp_path / 'last.pt'}" in printed
    for name in ("last.pt", "best.pt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert (saved["mean"], saved["std"], saved["num_classes"]) == ([0, 0, 0], [1, 1, 1], 10)
    assert {row["lr"] for row in torch.load(tmp_path / "last.pt", weights_only=True)["log"]} == {1e-4}


@pytest.mark.parametrize("steps, warns", [(1, True), (2, False)])
def test_a_wide_resnets_run_of_one_epoch_is_warned_of(steps, warns, files, capsys, tmp_path):
    main(["--device", "cpu", "--dry-run", "--dra-weight", "0", "--arch", "wrn-10-1", "--max-steps", str(steps),
          "--batch-size", "64", "--data-dir", str(files), "--out", str(tmp_path)])
    assert ("WARNING: a run of one epoch hardly trains" in capsys.readouterr().out) == warns


def test_training_reads_no_test_image(ten_steps, tmp_path, monkeypatch):
    splits = []

    def noted(args, split):
        splits.append(split)
        return load_real(args, split)
    monkeypatch.setattr(train_cifar, "load_real", noted)
    main([*ten_steps, "--max-steps", "1", "--out", str(tmp_path)])
    assert splits == ["train"]


# ----------------------------------------------------------------------- a teacher and a network of one's own

class Network(nn.Module):
    """Features are the mean colour, three numbers, times a weight."""

    def __init__(self, num_classes):
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.ones(3)), nn.Linear(3, num_classes)

    def features(self, images):
        return images.mean(dim=(2, 3)) * self.scale

    def head(self, features):
        return self.linear(features)

    def forward(self, images):
        return self.head(self.features(images))


class Teacher(nn.Module):
    """Features of two numbers; it keeps what it was asked."""

    width = 2

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, images, labels, sigma, noise):
        self.asked.append((images, labels, sigma, noise))
        return images.mean(dim=(2, 3))[:, :2]


def test_a_program_may_hand_over_a_teacher(files, tmp_path, monkeypatch):
    """In place of the one that the settings name, which is not loaded. What it is asked is the contract."""
    monkeypatch.setattr(train_cifar, "load_teacher", None)
    teacher = Teacher()
    flags = ["--device", "cpu", "--arch", "wrn-10-1", "--attack-steps", "1", "--batch-size", "16",
             "--data-dir", str(files), "--extra-sigma", "--max-steps", "1", "--out", str(tmp_path)]
    main(flags, teacher=teacher)
    (fixed, drawn), args = teacher.asked, parse_args(flags)
    batch = train_cifar.Data(args, torch.device("cpu")).batch(0)
    for images, labels, _, noise in (fixed, drawn):
        assert torch.equal(images, batch.images) and torch.equal(labels, batch.labels), "the clean images"
        assert noise.shape == images.shape
    assert fixed[2] == 0.06 and torch.equal(drawn[2], batch.teacher_noise[1][0])
    projector = load(tmp_path / "last.pt")["projector"]
    assert projector["0.4.weight"].shape[0] == projector["1.4.weight"].shape[0] == 2
    assert "cosine" in log_rows(tmp_path)[0]


def test_a_program_may_hand_over_a_network(ten_steps, finished, tmp_path):
    asked = []

    def build(arch, num_classes, dataset):
        asked.append((arch, num_classes, dataset))
        return Network(num_classes)
    flags = [*ten_steps, "--arch", "mean-colour", "--out", str(tmp_path)]
    main(flags, build_model=build)
    assert asked == [("mean-colour", 10, "cifar10")]
    last, best = load(tmp_path / "last.pt"), load(tmp_path / "best.pt")
    assert last["arch"] == best["arch"] == "mean-colour" and last["projector"]["0.0.weight"].shape[1] == 3
    assert set(best["model_state_dict"]) == {"scale", "linear.weight", "linear.bias"}
    assert not torch.equal(last["unaveraged_model_state_dict"]["scale"], torch.ones(3))
    with pytest.raises(InputError, match="--arch mean-colour"):
        main(flags)


def test_without_alignment_no_teacher_is_asked_or_loaded(ten_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cifar, "load_teacher", None)
    teacher = Teacher()
    main([*ten_steps, "--dra-weight", "0", "--attack-steps", "0", "--max-steps", "1", "--out", str(tmp_path)],
         teacher=teacher)
    assert teacher.asked == [] and "cosine" not in log_rows(tmp_path)[0]
    assert load(tmp_path / "last.pt")["projector"] == {}


# ------------------------------------------------------------------------------------------------------ flags

def test_eps_is_a_fraction_or_a_number():
    assert parse_args(["--eps", "8/255"]).eps == parse_args(["--eps", str(8 / 255)]).eps == 8 / 255
    assert parse_args([]).eps == 8 / 255 and parse_args([]).step_size == 2 / 255


def test_defaults_are_the_papers_wrn_34_10_row():
    args = parse_args(["--device", "cpu"])
    assert (args.arch, args.batch_size, args.epochs, args.synthetic) == ("wrn-34-10", 128, 200, [])
    assert (args.attack_steps, args.step_size, args.beta, args.label_smoothing) == (10, 2 / 255, 5, 0.1)
    assert (args.lr, args.weight_decay, args.ema_decay, args.eval_every) == (0.2, 5e-4, 0.995, 1)
    assert args.dra_weight == 1 and args.teacher_sigma == 0.06 and args.save_minutes == 5
    assert args.teacher.endswith("edm-cifar10-32x32-cond-vp.pkl") and args.amp is False
    assert (args.max_norm, args.border, args.synthetic_fraction, args.accumulate) == (0, 0, None, 1)
    assert parse_args(["--dataset", "cifar100"]).teacher.endswith("edm-cifar100-32x32-cond-vp.pkl")


def test_a_vit_has_the_recipe_of_wu_et_al_and_every_flag_beats_it():
    args = parse_args(["--arch", "vit-b-2", "--dra-weight", "0"])
    assert (args.lr, args.weight_decay, args.max_norm, args.ema_decay) == (1e-4, 0.5, 1, 0.9999)
    assert (args.beta, args.label_smoothing, args.synthetic_fraction, args.border) == (3, 0.4, 0.8, 128)
    own = parse_args("--arch vit-b-2 --dra-weight 0 --lr 1e-3 --beta 6 --border 0 --max-norm 0 --ema-decay 0.9"
                     .split())
    assert (own.lr, own.beta, own.border, own.max_norm, own.ema_decay) == (1e-3, 6, 0, 0, 0.9)


def test_flags_beat_the_smoke_runs_settings():
    smoke = parse_args(["--smoke"])
    assert (smoke.arch, smoke.epochs, smoke.teacher, smoke.device) == ("wrn-10-1", 4, None, "cpu")
    own = parse_args(["--arch", "wrn-16-2", "--smoke", "--epochs", "7", "--teacher", "x.pkl"])
    assert (own.arch, own.epochs, own.teacher, own.batch_size) == ("wrn-16-2", 7, "x.pkl", 64)


BAD_FLAGS = {  # and what argparse says of them
    "--eps 1": "argument --eps: '1': expected a number of at least 0 and below 1",
    "--eps 255": "argument --eps: '255': expected a number of at least 0 and below 1",
    "--eps=-1/255": "argument --eps: '-1/255': expected a number of at least 0 and below 1",
    "--eps 8/0": "argument --eps: '8/0': expected a number",
    "--eps nan": "argument --eps: 'nan': expected a number",
    "--eps x": "argument --eps: 'x': expected a number",
    "--lr 0": "argument --lr: '0': expected a number above 0",
    "--lr inf": "argument --lr: 'inf': expected a number above 0",
    "--lr 1e999": "argument --lr: '1e999': expected a number above 0",
    "--lr": "argument --lr: expected one argument",
    "--step-size 0": "argument --step-size: '0': expected a number above 0",
    "--teacher-sigma 0": "argument --teacher-sigma: '0': expected a number above 0",
    "--eval-every 0": "argument --eval-every: '0': expected a number above 0",
    "--weight-decay -1": "argument --weight-decay: '-1': expected a number of at least 0",
    "--beta -1": "argument --beta: '-1': expected a number of at least 0",
    "--dra-weight -0.1": "argument --dra-weight: '-0.1': expected a number of at least 0",
    "--save-minutes -1": "argument --save-minutes: '-1': expected a number of at least 0",
    "--label-smoothing 1": "argument --label-smoothing: '1': expected a number of at least 0 and below 1",
    "--ema-decay 1.5": "argument --ema-decay: '1.5': expected a number of at least 0 and below 1",
    "--synthetic-fraction 1": "argument --synthetic-fraction: '1': expected a number of at least 0",
    "--attack-steps -1": "argument --attack-steps: '-1': expected a whole number of at least 0",
    "--attack-steps 2.5": "argument --attack-steps: '2.5': expected a whole number of at least 0",
    "--seed -1": "argument --seed: '-1': expected a whole number of at least 0",
    "--seed 1e30": "argument --seed: '1e30': expected a whole number of at least 0",
    "--epochs 0": "argument --epochs: '0': expected a whole number above 0",
    "--max-steps -5": "argument --max-steps: '-5': expected a whole number above 0",
    "--max-steps ten": "argument --max-steps: 'ten': expected a whole number above 0",
    "--batch-size 0": "argument --batch-size: '0': expected a whole number above 0",
    "--optimizer lion": "unrecognized arguments: --optimizer lion",  # --arch decides
    "--accumulate 0": "argument --accumulate: '0': expected a whole number above 0",
    "--border 256": "argument --border: '256': expected a whole number from 0 to 255",
    "--dataset mnist": "argument --dataset: invalid choice: 'mnist'",
    "--nonsense": "unrecognized arguments: --nonsense",
    "--epoch 3": "unrecognized arguments: --epoch 3",  # no abbreviations
    "--save-every 1": "unrecognized arguments: --save-every 1",
    "extra": "unrecognized arguments: extra",
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_a_flag_that_cannot_be_used_is_named_in_two_lines(capsys, flags, message):
    """A short usage line, then the flag; exit code 2."""
    with pytest.raises(SystemExit) as caught:
        parse_args(flags.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and usage.startswith("usage: ") and message in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_is_refused_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--device", "cuda"])
    assert "--device cuda: there is no CUDA device" in capsys.readouterr().err


def test_the_command_line_exits_with_2_and_one_line(tmp_path):
    """As a process of its own; many more cases are in test_bad_input.py."""
    done = subprocess.run([sys.executable, "train_cifar.py", "--smoke", "--teacher", tmp_path / "none.pkl",
                           "--out", tmp_path / "never"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "none.pkl" in done.stderr
    assert not (tmp_path / "never").exists()


def test_the_script_needs_neither_timm_nor_matplotlib():
    code = "import sys; sys.modules.update(timm=None, matplotlib=None); import train_cifar"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
