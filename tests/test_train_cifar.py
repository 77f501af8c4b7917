"""The whole script: a run is exact, continues exactly, loses nothing, and says in one line what is wrong with its input."""
import csv
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_cifar
from kill_twenty_times import leaves
from train_cifar import InputError, build_model, main, parse_args, save_atomically

ROOT, FIXTURES = Path(__file__).parent.parent, Path(__file__).parent / "fixtures"
# 68 steps an epoch. A run within one epoch has only the last value of its schedule, peak / 250,000: here that is 0.1.
SMALL = ["--smoke", "--device", "cpu", "--batch-size", "16", "--attack-steps", "2", "--extra-sigma", "--lr", "25000"]
EIGHT_STEPS = [*SMALL, "--max-steps", "8", "--save-every", "0.03", "--eval-every", "0.06"]  # saves every 2 steps, evaluates every 4


def command(*flags, **kwargs):
    """Run the script as a user does. Returns the finished process."""
    return subprocess.run([sys.executable, "train_cifar.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, **kwargs)


def assert_same(path, other):
    """Two checkpoints hold the same numbers, bit for bit (apart from the output folder's name and the speed)."""
    a, b = [dict(leaves(torch.load(p, weights_only=True))) for p in (path, other)]
    assert a.keys() == b.keys() and any("optimizer" in name for name in a) and any("projector" in name for name in a)
    for name in a:
        if not name.endswith(("/out", "/images_per_s")):
            assert torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name], name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed small run."""
    out = tmp_path_factory.mktemp("finished")
    main([*EIGHT_STEPS, "--out", str(out)])
    return out


# ------------------------------------------------------------------------------------------------------ exact continuation

def test_a_killed_run_continues_to_the_same_bits(finished, tmp_path):
    """SIGKILL after the first checkpoint, then the same command again."""
    flags = [sys.executable, "train_cifar.py", *EIGHT_STEPS, "--out", str(tmp_path)]
    # The number of threads decides in which order sums are taken: the same as in this process, see conftest.py.
    process = subprocess.Popen(flags, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "2"})
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] < 8
    main([*EIGHT_STEPS, "--out", str(tmp_path)])
    assert_same(tmp_path / "last.pt", finished / "last.pt")
    assert_same(tmp_path / "best.pt", finished / "best.pt")
    columns = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(open(out / "log.csv"))] for out in (tmp_path, finished)]
    assert columns[0] == columns[1] and [row["step"] for row in columns[0]] == ["2", "4", "6", "8"]


def test_a_finished_run_changes_nothing_when_started_again(finished):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    main([*EIGHT_STEPS, "--out", str(finished)])
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_without_last_pt_a_run_continues_from_best_pt(finished, tmp_path):
    (tmp_path / "best.pt").write_bytes((finished / "best.pt").read_bytes())
    main([*EIGHT_STEPS, "--out", str(tmp_path)])
    assert_same(tmp_path / "last.pt", finished / "last.pt")


def test_a_final_best_pt_alone_becomes_last_pt(finished, tmp_path):
    """As after a kill between the two writes of the last step: nothing is left to train, and the table still comes."""
    torch.save(torch.load(finished / "last.pt", weights_only=True), tmp_path / "best.pt")
    main([*EIGHT_STEPS, "--out", str(tmp_path)])
    assert_same(tmp_path / "last.pt", finished / "last.pt")


def test_without_an_attack_the_clean_accuracy_selects(tmp_path, monkeypatch):
    """Plain training makes nothing robust: the first evaluation, of a network that knows nothing yet, would win."""
    scores = iter([(60.0, 10.0), (90.0, 0.0), (90.0, 0.0)])
    monkeypatch.setattr(train_cifar, "evaluate", lambda *_, **__: next(scores, (0.0, 0.0)))
    main([*EIGHT_STEPS, "--attack-steps", "0", "--out", str(tmp_path)])
    assert torch.load(tmp_path / "best.pt", weights_only=True)["log"][-1]["holdout_clean"] == 90


def test_torchvisions_own_arrays_are_taken(monkeypatch, tmp_path):
    """CIFAR as torchvision gives it: a transposed view, and labels in a list."""
    class Downloaded:
        def __init__(self, root, train, download):
            images, labels = train_cifar.draw_smoke_images(60, seed=int(train))
            self.data, self.targets = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1), labels.tolist()
    monkeypatch.setattr(train_cifar.torchvision.datasets, "CIFAR10", Downloaded)
    data = train_cifar.Data(parse_args(["--device", "cpu", "--batch-size", "20", "--data-dir", str(tmp_path)]), torch.device("cpu"))
    assert np.array_equal(data.test[0], train_cifar.draw_smoke_images(60, seed=0)[0]) and data.batch(0).images.shape == (20, 3, 32, 32)


def test_other_images_under_the_same_name_are_refused_and_a_moved_file_is_not(tmp_path):
    """The images themselves are compared, by a checksum, and not where they lie."""
    def write(folder, seed):
        folder.mkdir(exist_ok=True)
        for split in ("train", "test"):
            images, labels = train_cifar.draw_smoke_images(80, seed)
            np.savez(folder / f"{split}.npz", image=images, label=labels)
    write(tmp_path / "here", seed=0)
    write(tmp_path / "there", seed=0)
    flags = ["--device", "cpu", "--arch", "wrn-10-1", "--batch-size", "36", "--attack-steps", "0", "--dra-weight", "0", "--max-steps", "2", "--out", str(tmp_path / "out")]
    main([*flags, "--data-dir", str(tmp_path / "here")])
    main([*flags, "--data-dir", str(tmp_path / "there")])
    write(tmp_path / "here", seed=1)
    with pytest.raises(InputError, match="images .* there, .* now"):
        main([*flags, "--data-dir", str(tmp_path / "here")])


def test_of_equally_good_evaluations_the_later_one_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(train_cifar, "evaluate", lambda *_, **__: (60.0, 30.0))
    main([*EIGHT_STEPS, "--out", str(tmp_path)])
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 8, "and not 4"


def test_other_settings_on_the_same_folder_are_refused_with_the_difference(finished):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(InputError, match="beta 5.0 there, 6.0 now"):
        main([*EIGHT_STEPS, "--beta", "6", "--out", str(finished)])
    with pytest.raises(InputError, match="settings .teacher_checksum [0-9]+ there, [0-9]+ now"):  # the network counts, not its name
        main([*EIGHT_STEPS, "--teacher", str(Path(__file__).parent / "fixtures" / "edm_tiny_cond_vp.pkl"), "--out", str(finished)])
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_a_damaged_or_hostile_checkpoint_is_named_and_left_alone(finished, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)
    hostile = tmp_path / "hostile.pt"
    torch.save({"args": Hostile()}, hostile)
    whole = (finished / "last.pt").read_bytes()
    for content in (whole[:len(whole) // 2], b"", hostile.read_bytes(), pickle.dumps(Hostile()), (FIXTURES / "dmat_wrn_10_1_cifar10.pt").read_bytes()):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"last\.pt: damaged, or no checkpoint") as caught:
            main([*EIGHT_STEPS, "--out", str(tmp_path)])
        assert "\n" not in str(caught.value) and (tmp_path / "last.pt").read_bytes() == content and not (tmp_path / "was_run").exists()


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_atomically({"step": 1}, path)

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        save_atomically({"weights": torch.zeros(1000), "then": Unwritable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, capsys):
    with pytest.raises(FloatingPointError, match=r"not finite.* step \d.*last good checkpoint: none"):
        main([*SMALL, "--max-steps", "8", "--lr", "1e12", "--out", str(tmp_path)])
    assert not (tmp_path / "last.pt").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """A loss can still be finite in the step whose gradient is not; the checkpoint before it has to survive."""
    def step(model, *rest):
        numbers = train_step(model, *rest)
        steps.append(model)
        if len(steps) == 4:
            model.logits.bias.data[0] = torch.nan
        return numbers
    train_step, steps = train_cifar.train_step, []
    monkeypatch.setattr(train_cifar, "train_step", step)
    with pytest.raises(FloatingPointError, match="a weight is not finite after step 4; last good checkpoint: .*last.pt"):
        main([*EIGHT_STEPS, "--out", str(tmp_path)])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2


# --------------------------------------------------------------------------------------------------------- what it leaves

def test_checkpoint_is_plain_data_with_dmats_and_robustbenchs_names(finished):
    saved = torch.load(finished / "best.pt", weights_only=True)
    assert saved["arch"] == "wrn-10-1" and saved["num_classes"] == 10 and len(saved["mean"]) == len(saved["std"]) == 3
    for key in ("model_state_dict", "state_dict", "unaveraged_model_state_dict"):
        build_model(saved["arch"], saved["num_classes"]).load_state_dict(saved[key], strict=True)
    averaged, live = saved["model_state_dict"], saved["unaveraged_model_state_dict"]
    assert all(torch.equal(averaged[name], saved["state_dict"][name]) for name in averaged)
    assert not torch.equal(averaged["init_conv.weight"], live["init_conv.weight"]), "averaged and live weights differ"
    assert torch.equal(averaged["batchnorm.running_mean"], live["batchnorm.running_mean"]), "running statistics are the live model's"


def test_log_has_one_row_per_interval_in_percent(finished):
    rows = list(csv.DictReader(open(finished / "log.csv")))
    assert [row["holdout_robust"] != "" for row in rows] == [False, True, False, True]
    last = {name: float(value) for name, value in rows[-1].items()}
    assert last["step"] == 8 and 0 <= last["holdout_robust"] <= last["holdout_clean"] <= 100 and -1 <= last["cosine"] <= 1
    assert abs(last["loss"] - (last["trades"] - last["cosine"])) < 1e-4, "eq. (4) with lambda 1"


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    main(["--smoke", "--dry-run", "--device", "cpu", "--arch", "wrn-28-10", "--max-steps", "100", "--out", str(tmp_path / "never")])
    plan = capsys.readouterr().out
    for part in ("wrn-28-10", "36.48M parameters", "100 = ", "980 real images", "in each 64 real + 0 synthetic", "dec.8x8_in1, 32 wide", "eps 8/255"):
        assert part in plan
    assert not (tmp_path / "never").exists()


def test_eps_is_a_fraction_or_a_number():
    assert parse_args(["--eps", "8/255"]).eps == parse_args(["--eps", str(8 / 255)]).eps == parse_args([]).eps == 8 / 255


def test_defaults_are_the_papers_wrn_34_10_row():
    args = parse_args(["--device", "cpu"])
    assert (args.arch, args.batch_size, args.epochs, args.synthetic) == ("wrn-34-10", 128, 200, [])
    assert (args.attack_steps, args.step_size, args.beta, args.lr, args.weight_decay, args.eval_every) == (10, 2 / 255, 5, 0.2, 5e-4, 1)
    assert args.dra_weight == 1 and args.teacher_sigma == 0.06 and args.teacher.endswith("edm-cifar10-32x32-cond-vp.pkl")
    lion = parse_args(["--optimizer", "lion", "--dataset", "cifar100", "--dra-weight", "0"])
    assert (lion.lr, lion.weight_decay, lion.teacher) == (1e-4, 0.5, None)


# -------------------------------------------------------------------------------------------------------------- bad input

def bad_flags(folder):
    """(flags, what the message has to name)"""
    (folder / "file").write_text("not a folder")
    (folder / "page.pkl").write_text("<html>404</html>")
    (folder / "half").mkdir()
    np.savez(folder / "half" / "train.npz", image=np.zeros((50, 32, 32, 3), np.uint8), label=np.zeros(50, np.int64))
    tiny = str(FIXTURES / "edm_tiny_cond_vp.pkl")
    return [
        (["--arch", "resnet-18"], "--arch resnet-18"),
        (["--eps", "255"], "--eps 255.0: expected at least 0 and below 1"), (["--eps", "-1/255"], "--eps"), (["--eps", "8/0"], "--eps"), (["--eps", "nan"], "--eps"), (["--eps", "x"], "--eps"),
        (["--step-size", "0"], "--step-size"), (["--attack-steps", "-1"], "--attack-steps -1"), (["--attack-steps", "2.5"], "invalid int value: '2.5'"),
        (["--epochs", "0"], "--epochs"), (["--max-steps", "-5"], "--max-steps"), (["--max-steps", "ten"], "--max-steps"),
        (["--batch-size", "5000"], "--batch-size 5000"), (["--batch-size", "1"], "--batch-size"),
        (["--lr", "0"], "--lr"), (["--lr", "inf"], "--lr"), (["--weight-decay", "-1"], "--weight-decay"), (["--beta", "-1"], "--beta"),
        (["--label-smoothing", "1"], "--label-smoothing"), (["--ema-decay", "1.5"], "--ema-decay"), (["--seed", "-1"], "--seed"),
        (["--dra-weight", "-1"], "--dra-weight"), (["--teacher-sigma", "0"], "--teacher-sigma"), (["--save-every", "0"], "--save-every"),
        (["--synthetic-fraction", "1.5", "--synthetic", tiny], "--synthetic-fraction 1.5"), (["--synthetic-fraction", "0.5"], "--synthetic FILE"),
        (["--synthetic", str(folder / "none.npz")], "none.npz"), (["--synthetic", tiny], "edm_tiny_cond_vp.pkl"),
        (["--optimizer", "adam"], "--optimizer"), (["--dataset", "mnist"], "--dataset"), (["--nonsense"], "--nonsense"),
        (["--teacher", str(folder / "none.pkl")], "none.pkl"), (["--teacher", str(folder / "page.pkl")], "page.pkl"),
        (["--teacher", tiny, "--teacher-layer", "dec.4x4_in1"], "dec.4x4_in1"), (["--teacher", tiny, "--dataset", "cifar100"], "10 classes"),
        (["--out", str(folder / "file")], "file"), (["--teacher-layer", "dec.9x9"], "dec.9x9"), (["--epoch", "3"], "--epoch"),
    ], [(["--data-dir", str(folder / "half"), "--dra-weight", "0"], "test.npz")]


def test_bad_flags_and_files_are_named_and_write_nothing(tmp_path, capsys):
    """In-process: for flags argparse's own message and exit code 2, for files an error that the command line turns into the same."""
    with_smoke, without = bad_flags(tmp_path)
    for flags, named in [(["--smoke", *flags], named) for flags, named in with_smoke] + without:
        out = [] if "--out" in flags else ["--out", str(tmp_path / "never")]
        with pytest.raises((InputError, OSError, SystemExit)) as caught:
            main([*flags, "--device", "cpu", *out])
        message = capsys.readouterr().err.splitlines()[-1] if isinstance(caught.value, SystemExit) else str(caught.value)
        assert named in message and "\n" not in message, (flags, message)
        assert not isinstance(caught.value, SystemExit) or caught.value.code == 2
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_is_refused_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--device", "cuda"])
    assert "--device cuda: there is no CUDA device" in capsys.readouterr().err


def test_the_command_line_exits_with_2_and_one_line(tmp_path):
    """As a process of its own; many more cases are in test_bad_input.py."""
    done = command("--smoke", "--teacher", tmp_path / "none.pkl", "--out", tmp_path / "never")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "never").exists()


def test_the_script_needs_neither_timm_nor_matplotlib():
    code = "import sys; sys.modules.update(timm=None, matplotlib=None); import train_cifar"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
