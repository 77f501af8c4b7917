"""experiments/compare_methods.py: differences are paired by seed and have Student's interval, the three words
mean what the top of the script says, a centred teacher's features have no shared direction, and a study that
was stopped continues without computing anything twice."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_cifar
from experiments import compare_methods as script
from eval_autoattack import InputError

FLAGS = "--arch wrn-10-1 --smoke --batch-size 64 --max-steps 2 --attack-steps 1 --eval-every 60".split()


def rows_of(**values):
    """{method: {seed: clean accuracy}} -> rows as in results.csv, all other numbers 0."""
    numbers = dict.fromkeys(["robust", "autoattack", "cls_95", "cls_99", "robust_dimension", "uniformity",
                             "alignment", "cosine", "minutes"], "0")
    return [{"method": method.replace("_", "+"), "seed": str(seed), "clean": str(value)} | numbers
            | dict.fromkeys(script.SETTINGS, "")
            for method, seeds in values.items() for seed, value in seeds.items()]


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# ------------------------------------------------------------------------------------------------------------
# The report.


def test_the_interval_is_students_for_paired_differences():
    """Of 1, 2, 3, 4, 5: mean 3, standard deviation sqrt(2.5), t = 2.776, so 3 -+ 1.963."""
    mean, low, high, word = script.interval([1, 2, 3, 4, 5], "+4.21")
    assert mean == 3 and (low, high) == pytest.approx((1.0369, 4.9631), abs=1e-3) and word == "seen"


@pytest.mark.parametrize("d, paper, word", [
    ([1, 2, 3], "-3", "not seen"), ([2, 2.1, 2.2], "-3", "opposite"), ([-2, -2.1, -2.2], "-3", "seen"),
    ([2, 2.1, 2.2], "+", "seen"), ([-2, -2.1, -2.2], "+", "opposite"), ([2, 2.1, 2.2], "", ""),
    ([0, 0, 0], "+1", "not seen"), ([5], "+1", "no interval"),
])
def test_a_word_says_on_which_side_of_0_the_interval_lies(d, paper, word):
    assert script.interval(d, paper)[3] == word


def test_seeds_that_only_one_method_has_are_no_pairs():
    lines = script.claim_lines(rows_of(at={1: 40, 2: 50, 3: 60}, at_dra={2: 51, 3: 63, 4: 99}))
    clean = next(line for line in lines if line["number"] == "clean")
    assert clean["n"] == 2 and clean["mean"] == 2 and clean["by_seed"] == "2:1 3:3"
    assert {line["methods"] for line in lines} == {"at+dra - at"}, "claims without both methods are left out"


def test_each_claim_compares_methods_that_exist_and_numbers_that_are_measured():
    for _, one, other, numbers in script.CLAIMS:
        assert {one, other} <= set(script.METHODS) and numbers.keys() <= rows_of(at={1: 0})[0].keys()
        assert all(paper in ("+", "-", "") or paper[0] in "+-" and float(paper) for paper in numbers.values())


def test_the_report_is_a_table_a_csv_and_a_figure(tmp_path, capsys):
    script.write_report(tmp_path, rows_of(at={1: 40, 2: 41}, at_dra={1: 44, 2: 45.1}))
    text = (tmp_path / "report.md").read_text()
    assert "| 1 DRA (Table 2) | clean | at+dra - at | +4.21 | +4.05 (+3.41 to +4.69) | 2 | seen |" in text
    assert "| at+dra | 2 | 44.55 ± 0.78 |" in text and text in capsys.readouterr().out
    assert read(tmp_path / "report.csv")[0]["by_seed"] == "1:4 2:4.1"
    assert Image.open(tmp_path / "report.png").size[0] == 900


# ------------------------------------------------------------------------------------------------------------
# Methods and their runs.


def test_a_centred_teacher_has_features_of_mean_0_and_else_the_same_ones():
    args = train_cifar.parse_args(FLAGS)
    teacher = train_cifar.load_teacher(args)
    centred = script.Centred(teacher, args)
    images, labels = [torch.as_tensor(x[:256]) for x in train_cifar.load_real(args, "train")]
    images, noise = images.permute(0, 3, 1, 2).float() / 255, torch.randn(len(images), 3, 32, 32)
    with torch.no_grad():
        raw, found = [g(images, labels, 0.06, noise) for g in (teacher, centred)]
    assert found.mean(dim=0).norm() < 0.05 * raw.mean(dim=0).norm()
    assert (raw - found - centred.mean).abs().max() < 1e-5 and centred.width == found.shape[1]


def test_a_method_is_its_flags_with_the_files_of_this_command():
    args = script.parse_args("--methods dm-at+dra-centred --teacher t.pt --synthetic s.npz".split())
    assert script.run_flags("dm-at+dra-centred", args) == ["--teacher", "t.pt", "--synthetic", "s.npz"]
    for method in ["at", "at+dra", "dm-at", "standard"]:  # all are flags that train_cifar.py knows
        train_cifar.parse_args(script.run_flags(method, args))


def test_runs_of_another_eps_have_other_settings_and_moved_files_the_same():
    def settings(flags):
        return script.settings_of("at+dra", script.parse_args(f"--methods at+dra {flags}".split()))
    assert settings("--teacher a/t.pt -- --eps 8/255") != settings("--teacher a/t.pt -- --eps 4/255")
    assert settings("--teacher a/t.pt -- --lr 0.1") == settings("--teacher b/t.pt -- --lr 0.1")


@pytest.mark.parametrize("flags, message", [
    ("--methods at+dra", "--methods at+dra: expected --teacher FILE"),
    ("--methods dm-at", "--methods dm-at: expected --synthetic FILE"),
    ("--methods at+noisy", "--methods at+noisy: expected --noisy-teacher FILE"),
    ("--methods att", "'at+dra-centred'"),
    ("--methods at -- --seed 3", "--seed behind --: this script sets it"),
])
def test_a_wrong_flag_gives_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(flags.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_rows_of_other_settings_are_refused_and_an_empty_study_has_no_report(tmp_path):
    old = rows_of(at={0: 1})
    old[0] |= {"flags": "--epochs 2", "files": "--dra-weight 0", "n": "5", "autoattack_n": "0"}
    script.dimensions.write_rows(tmp_path / "results.csv", old)
    with pytest.raises(InputError, match="results.csv: at has flags '--epochs 2', not '--epochs 3'"):
        script.main(f"--methods at --n 5 --out {tmp_path} -- --epochs 3".split())
    with pytest.raises(InputError, match="results.csv: has no rows yet"):
        script.main(["--report", "--out", str(tmp_path / "new")])


@pytest.mark.slow
def test_a_killed_study_continues_and_computes_no_row_twice(tmp_path):
    """Two methods, killed while the second one trains; then the same command."""
    flags = ["--methods", "at", "standard", "--seeds", "1", "--n", "100", "--device", "cpu", "--out", "study"]
    command = [sys.executable, ROOT / "experiments/compare_methods.py", *flags, "--", *FLAGS]
    start = lambda: subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    killed = start()
    while not (tmp_path / "study/standard-1/last.pt").exists():
        time.sleep(0.1)
        assert killed.poll() is None, killed.stdout.read()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    first = read(tmp_path / "study/results.csv")
    assert [row["method"] for row in first] == ["at"], "the first run's row is there"
    continued = start()
    assert b"Means over seeds" in continued.communicate()[0] and continued.returncode == 0
    rows = read(tmp_path / "study/results.csv")
    assert rows[:1] == first and [row["method"] for row in rows] == ["at", "standard"]
