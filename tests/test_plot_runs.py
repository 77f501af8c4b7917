"""experiments/plot_runs.py: curves and accuracies are those that runs and AutoAttack left, with intervals and
seeds."""
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import assert_one_line
import eval_autoattack
import plot_runs
import train_cifar
from plot_runs import InputError, against_lambda, judge, main, parse_args, read_log, wilson

LOG = [{"step": 17, "epoch": 1.0, "lr": 0.1, "loss": 0.9, "trades": 1.8, "train_clean": 40.0,
        "train_robust": 30.0, "images_per_s": 9.0},
       {"step": 34, "epoch": 2.0, "lr": 0.0, "loss": 0.5, "trades": 1.4, "train_clean": 50.0,
        "train_robust": 35.0, "images_per_s": 9.0,
        "holdout_clean": 51.0, "holdout_robust": 33.0},
       {"step": 51, "epoch": 3.0, "lr": 0.0, "loss": 0.4, "trades": 1.2, "train_clean": 60.0,
        "train_robust": 45.0, "images_per_s": 9.0,
        "holdout_clean": 55.0, "holdout_robust": 31.0}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as a smoke run leaves it after 51 steps, the average of step 34 being the best; weights are
    random."""
    folder = tmp_path_factory.mktemp("trained")
    args = train_cifar.parse_args(["--smoke", "--dra-weight", "0.5"])
    data = train_cifar.Data(args, torch.device("cpu"))
    run = train_cifar.build_run(args, data)
    about = {"args": vars(args), "recipe": train_cifar.recipe(args, data), "arch": args.arch,
             "dataset": args.dataset, "num_classes": 10}
    for row in LOG[1:]:
        run.step = row["step"]
        run.log = [entry | {"cosine": 0.8} for entry in LOG if entry["step"] <= run.step]
        train_cifar.keep_best(args, run, row)
        train_cifar.save(folder, about, run)
    train_cifar.write_log(folder / "log.csv", run.log, 0)
    return folder


@pytest.fixture
def make_run(trained, tmp_path):
    """A function that makes another run: its folder, where evaluations of its files may be given."""
    def make(name, weight=0.5, **evaluations):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("best.pt", "last.pt"):
            saved = torch.load(trained / file, weights_only=True)
            saved["args"]["dra_weight"] = weight
            torch.save(saved, folder / file)
        (folder / "log.csv").write_bytes((trained / "log.csv").read_bytes())
        for file, (clean, robust) in evaluations.items():
            evaluate(folder / f"{file}.pt", clean, robust)
        return folder
    return make


def evaluate(path, clean, robust, n=400, **settings):
    """What eval_autoattack.py leaves beside a checkpoint, as far as it is read."""
    settings = {"checkpoint": path.name, "step": 34 if path.name == "best.pt" else 51, "attacks": None,
                "version": "standard"} | settings
    folder = path.with_name(f"{path.name}.autoattack")
    folder.mkdir(exist_ok=True)
    result = {"clean_acc": f"{clean:.2f}", "robust_accuracy": robust, "eps": "8/255", "images": n,
              "settings": settings}
    (folder / "result.json").write_text(json.dumps(result))


def table(folder):
    with open(folder / "plot_runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_wilsons_interval_is_the_textbook_one_and_stays_within_0_and_100():
    assert wilson(50, 100) == pytest.approx((40.38, 59.62), abs=0.01)
    assert wilson(0, 10) == pytest.approx((0, 27.75), abs=0.01) and wilson(100, 10)[1] == pytest.approx(100)
    low, high = wilson(np.array([10.0, 90.0]), 1000)
    np.testing.assert_allclose(low, 100 - high[::-1])


def test_a_run_without_evaluation_is_judged_by_the_images_that_selected_its_best_file(trained):
    row = judge(trained, read_log(trained / "log.csv"))
    assert (row["lambda"], row["file"], row["step"], row["holdout"]) == (0.5, "best.pt", 34, 108), (
        "a tenth of 1,088")
    assert (row["clean"], row["robust"]) == (51, 33)
    assert row["evaluation"] == "wrn-10-1, cifar10: PGD-40, 108 held-out images"
    assert (row["robust_low"], row["robust_high"]) == wilson(33, 108)


def test_a_real_evaluation_is_read(trained, tmp_path):
    """eval_autoattack.py writes result.json here, for four images and one attack."""
    for file in ("best.pt", "log.csv"):
        (tmp_path / file).write_bytes((trained / file).read_bytes())
    eval_autoattack.main([str(tmp_path / "best.pt"), "--n", "4", "--attacks", "apgd-ce", "--device", "cpu"])
    row = judge(tmp_path, read_log(tmp_path / "log.csv"))
    result = json.loads((tmp_path / "best.pt.autoattack" / "result.json").read_text())
    assert row["evaluation"] == "wrn-10-1, cifar10: apgd-ce, eps 8/255, 4 test images"
    assert row["robust"] == result["robust_accuracy"] and row["clean"] == float(result["clean_acc"])
    assert (row["clean_low"], row["clean_high"]) == wilson(row["clean"], 4)


def test_best_comes_before_last_and_autoattack_before_held_out_images(make_run):
    for evaluations, file, robust in (({"best": (60, 40), "last": (70, 35)}, "best.pt", 40),
                                      ({"last": (70, 35)}, "last.pt", 35),
                                      ({}, "best.pt", 33)):
        run = make_run("-".join(["run", *evaluations]), **evaluations)
        row = judge(run, read_log(run / "log.csv"))
        assert (row["file"], row["robust"]) == (file, robust)
        assert ("AutoAttack standard, eps 8/255, 400 test images" in row["evaluation"]) == bool(evaluations)


def test_table_and_figure_show_all_runs_and_seeds_of_a_group_have_mean_and_spread(make_run, tmp_path, capsys):
    zero, one = make_run("zero", 0.0, best=(50, 30)), make_run("one", 2.0)
    seeds = [make_run(f"seed{i}", 1.0, best=(60, robust)) for i, robust in enumerate((40, 41, 45))]
    main([str(zero), str(one), "--group", f"DRA={','.join(map(str, seeds))}", "--out", str(tmp_path)])
    rows = table(tmp_path)
    assert [(row["method"], row["lambda"], row["robust"]) for row in rows] == [
        (str(zero), "0", "30"), (str(one), "2", "33"), ("DRA", "1", "40"), ("DRA", "1", "41"),
        ("DRA", "1", "45")]
    ends = [float(rows[0][name]) for name in ("robust_low", "robust_high")]
    assert ends == pytest.approx(wilson(30, 400), rel=1e-5)
    printed = capsys.readouterr().out
    assert "DRA, lambda 1: robust 42.00 % +- 2.65 over 3 runs" in printed and f"{zero}, lambda 0.0" in printed
    numbers = [{name: float(x) if name[:5] in ("clean", "robus", "lambd") else x for name, x in row.items()}
               for row in rows]
    points = against_lambda(numbers, rows[0]["evaluation"], "robust")
    np.testing.assert_allclose(points[:, 1], [1, 42, 42 - 2.6458, 42 + 2.6458], atol=1e-3)
    np.testing.assert_allclose(points[:, 0], [0, 30, *wilson(30, 400)], atol=1e-3)
    assert points.shape == (4, 2), "the run that was judged otherwise has a line of its own"
    assert against_lambda(numbers, rows[1]["evaluation"], "clean")[:2].tolist() == [[2], [51]]
    with Image.open(tmp_path / "plot_runs.png") as image:
        assert image.width > 1000


def test_curves_are_the_logs_numbers(make_run, tmp_path, monkeypatch):
    drawn = []
    def noted(axis, log, column, n, **style):
        drawn.append((column, log, style))
    monkeypatch.setattr(plot_runs, "draw_curve", noted)
    at, dra = make_run("at"), make_run("dra")
    (at / "log.csv").write_text((at / "log.csv").read_text().replace("cosine", "ignored"))
    main([str(at), str(dra), "--out", str(tmp_path)])
    assert len(drawn) == 2 * 6 and {column for column, _, _ in drawn} == {
        "loss", "cosine", "train_clean", "train_robust", "holdout_clean", "holdout_robust"}
    assert [style["linestyle"] for column, _, style in drawn if column == "train_robust"] == ["--", "--"]
    for _, log, style in drawn:
        assert style["color"] == ("C1" if any("cosine" in row for row in log) else "C0")
    monkeypatch.undo()
    bars = []
    axis = type("Axis", (),
                {"errorbar": lambda self, x, y, bar, **style: bars.append((x.tolist(), y.tolist(), bar))})()
    log = read_log(dra / "log.csv")
    for column in ("loss", "holdout_robust", "no such column"):
        plot_runs.draw_curve(axis, log, column, 108)
    assert bars[0] == ([1, 2, 3], [0.9, 0.5, 0.4], None) and bars[1][:2] == ([2, 3], [33, 31])
    assert len(bars) == 2
    np.testing.assert_allclose(bars[1][2][:, 0], [33 - wilson(33, 108)[0], wilson(33, 108)[1] - 33])


def test_a_run_that_still_trains_is_drawn_and_again_later(make_run, tmp_path, capsys):
    run = make_run("young", best=(50, 30))
    for path in (run / "best.pt.autoattack").iterdir():
        path.unlink()
    best = (run / "best.pt").read_bytes()
    (run / "best.pt").unlink()
    main([str(run), "--out", str(tmp_path)])
    assert "young: not evaluated yet" in capsys.readouterr().out
    assert table(tmp_path)[0]["file"] == "last.pt"
    assert table(tmp_path)[0]["evaluation"] == table(tmp_path)[0]["clean"] == ""
    (run / "best.pt").write_bytes(best)
    main([str(run), "--out", str(tmp_path)])
    assert [row["robust"] for row in table(tmp_path)] == ["33"], "written anew"


def test_what_cannot_be_used_is_named(make_run, tmp_path, capsys):
    run, out = make_run("run"), ["--out", str(tmp_path)]
    for settings in ({"step": 17}, {"checkpoint": "last.pt"}):
        evaluate(run / "best.pt", 60, 40, **settings)
        with pytest.raises(InputError,
                           match="run/best.pt.autoattack: is of another best.pt; evaluate this one"):
            main([str(run), *out])
    (run / "best.pt.autoattack" / "result.json").write_text("{")
    with pytest.raises(InputError, match="run/best.pt: of no run of ours, or its result.json is damaged"):
        main([str(run), *out])
    other = make_run("other")
    torch.save({"state_dict": {}}, other / "best.pt")
    with pytest.raises(InputError, match="other/best.pt: of no run of ours"):
        main([str(other), *out])
    for text in ("", "a,b\n1,2\n", "step,epoch,loss\n1,1,x\n", "step,epoch,loss\n1,1,1,1\n"):
        (other / "log.csv").write_text(text)
        with pytest.raises(InputError, match="other/log.csv: no log of a training run"):
            main([str(other), *out])
    for wrong, named in (("", "folder of a run or --group"), ("a --group b", "--group"), ("a --n 3", "--n")):
        with pytest.raises(SystemExit, match="2"):
            parse_args(wrong.split())
        assert named in capsys.readouterr().err.splitlines()[-1]
    assert_one_line("experiments/plot_runs.py", [tmp_path / "nowhere", *out], "nowhere")
    assert not (tmp_path / "plot_runs.csv").exists()
