"""experiments/dimensions.py: features of rank 3 have dimension 3, the raw feature is projected unless the
mean is kept, each dimension has an interval, and a stopped run continues."""
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from helpers import DMAT
import dimensions as script
import train_cifar
from dimensions import choose_images, dimensions, extract, main, parse_args, right_by_rank, summarise
from eval_autoattack import InputError, load_classifier


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(weight, bias):
    """A head with known weights."""
    return lambda features: F.linear(features, torch.tensor(weight).float(), torch.tensor(bias).float())


@pytest.mark.parametrize("keep_mean", [False, True])
def test_features_of_rank_3_have_dimension_3(keep_mean):
    basis = torch.linalg.qr(normal(20, 20))[0][:3]  # three directions of twenty
    features = (normal(500, 3, seed=1) * torch.tensor([2.0, 1.7, 1.4]) + 0.3) @ basis
    head = linear(normal(10, 20, seed=2).tolist(), [0] * 10)
    right = right_by_rank(head, torch.stack([features, features]), head(features).argmax(dim=1), keep_mean)
    assert right.shape == (2, 500, 21) and right[:, :, 3:].all() and right[:, :, 2].mean() < 0.95
    assert dimensions(right.sum(axis=1)).tolist() == [3, 3, 3]


def test_the_raw_feature_is_projected_and_keeping_the_mean_gives_another_dimension():
    """The images differ along the first axis, and what makes their class is the second coordinate of their
    mean."""
    features = torch.stack([normal(50), torch.full((50,), 5.0)], dim=1).expand(2, -1, -1)
    # class 1: second coordinate above 1
    head, labels = linear([[0, 0], [0, 1]], [0, -1]), torch.ones(50, dtype=torch.long)
    raw = right_by_rank(head, features, labels).sum(axis=1)
    kept = right_by_rank(head, features, labels, keep_mean=True).sum(axis=1)
    assert raw[0].tolist() == [0, 0, 50] and dimensions(raw)[0] == 2
    assert kept[0].tolist() == [50, 50, 50] and dimensions(kept)[0] == 0


def test_an_adversary_in_a_minor_component_is_undone_by_leaving_it_out():
    """As in Fig. 7. Components come from the clean features: those of the attacked ones would be in another
    order."""
    labels = torch.arange(400) % 2
    clean = torch.stack([8.0 * labels - 4, 0.1 * normal(400)], dim=1)
    attacked = clean + torch.stack([torch.zeros(400), 100.0 * (2 * labels - 1)], dim=1)
    right = right_by_rank(linear([[0, 0], [1, -1]], [0, 0]), torch.stack([clean, attacked]), labels)
    assert right.sum(axis=1).tolist() == [[200, 400, 400], [200, 400, 0]]
    assert dimensions(right.sum(axis=1)).tolist() == [1, 1, 1]


def test_dimensions_are_read_off_the_numbers_of_right_images():
    read = lambda clean, robust: dimensions(np.array([clean, robust])).tolist()
    assert read([10, 40, 76, 75, 79, 80], [10, 30, 42, 41, 42, 38]) == [2, 5, 2], (
        "76 is 0.95 * 80; 42 comes first at 2")
    assert read([2, 19, 20], [3, 3, 3]) == [1, 2, 0], "19 is 95 % of 20, whatever binary fractions say"


def test_intervals_tell_a_certain_dimension_from_one_that_hangs_on_few_images():
    """From one component on, 95 of 100 images are right, and from four on all: whether 95 % are reached is a
    coin flip."""
    clean = np.arange(6) >= np.where(np.arange(100) < 95, 1, 4)[:, None]
    robust = np.arange(100)[:, None] < [50, 52, 60, 58, 56, 54]
    row = summarise(np.stack([clean, robust]))
    assert (row["cls_95"], row["cls_95_low"], row["cls_95_high"]) == (1, 1, 4)
    assert (row["cls_99"], row["cls_99_low"], row["cls_99_high"]) == (4, 1, 4), (
        "1 if a draw takes one of the five, which is rare")
    assert (row["robust"], row["robust_low"], row["robust_high"]) == (2, 2, 2), (
        "the same images are right and a few more")
    assert (row["robust_from"], row["robust_to"]) == (2, 4), "60 - 100 sqrt(0.6 * 0.4 / 100) = 55.1"
    assert row["clean_right"] == "0 95 95 95 100 100" and row["attacked_right"] == "50 52 60 58 56 54"
    assert summarise(np.stack([clean, robust])) == row


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags, and three networks: DM-AT's, the same a little changed, and one of three classes of npz
    images."""
    folder = tmp_path_factory.mktemp("inputs")
    images, labels = train_cifar.draw_smoke_images(90, 0)
    np.savez(folder / "test.npz", image=images, label=labels % 3)
    state = torch.load(DMAT, weights_only=True)["model_state_dict"]
    about = {"arch": "wrn-10-1", "dataset": "cifar10", "step": 7}
    for name, change in (("at", 0), ("dra", 0.05)):
        changed = {key: value + change * value.abs() if value.is_floating_point() else value
                   for key, value in state.items()}
        torch.save(about | {"model_state_dict": changed}, folder / f"{name}.pt")
    about |= {"dataset": "npz", "num_classes": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    torch.save(about | {"model_state_dict": train_cifar.build_model("wrn-10-1", 3, "npz").state_dict()},
               folder / "three.pt")
    flags = ["--data-dir", str(folder), "--n", "70", "--steps", "1", "--device", "cpu"]
    return flags, *[str(folder / f"{name}.pt") for name in ("at", "dra", "three")]


def read(folder):
    return list(csv.DictReader((folder / "dimensions.csv").read_text().splitlines()))


def test_a_row_is_what_the_functions_give_for_drawn_images(inputs, tmp_path):
    flags, at, dra, _ = inputs
    main([*flags, at, dra, "--keep-mean", "--seed", "3", "--out", str(tmp_path)])
    args = parse_args([*flags, at, "--eps", "8/255", "--seed", "3"])
    model = load_classifier(dra)
    images, labels = choose_images(args, model.info)
    right = right_by_rank(model.head, extract(model, images, labels, args), labels, keep_mean=True)
    expected, row = summarise(right), read(tmp_path)[1]
    assert all(row[name] == str(value) for name, value in expected.items())
    assert len(row["clean_right"].split()) == 65
    settings = {"method": dra, "checkpoint": dra, "seed": "3", "arch": "wrn-10-1", "step": "7",
                "weights": "averaged", "n": "70", "eps": str(8 / 255), "steps": "1", "keep_mean": "True",
                "dataset": "cifar10", "attack": "PGD, eps / 4 a step"}
    assert row.items() >= settings.items()
    assert read(tmp_path)[0]["clean_right"] != row["clean_right"]


def test_images_are_drawn_and_attacked_within_eps_as_the_seed_says(inputs):
    flags, at, *_ = inputs
    model, args = load_classifier(at), parse_args([*flags, at, "--eps", "8/255", "--steps", "3"])
    with np.load(Path(args.data_dir) / "test.npz") as file:
        whole, names = torch.from_numpy(file["image"]).permute(0, 3, 1, 2) / 255, file["label"]
    images, labels = choose_images(args, model.info)
    index = [(whole == image).flatten(1).all(dim=1).nonzero().item() for image in images]
    assert len(set(index)) == 70 and sorted(index) != index and labels.tolist() == names[index].tolist()
    seen = []
    spy = type("Spy", (), {"features": lambda self, x: seen.append(x) or model.features(x),
                           "__call__": lambda self, x: model(x)})()
    clean, attacked = features = extract(spy, images, labels, args)
    torch.testing.assert_close(clean, model.features(images))
    assert (seen[1] - images).abs().max() <= 8 / 255 + 1e-6 and 0 <= seen[1].min() and seen[1].max() <= 1
    assert F.cross_entropy(model.head(attacked), labels) > F.cross_entropy(model.head(clean), labels) + 0.02
    assert torch.equal(extract(model, images, labels, args), features)
    args.seed = 1
    assert not torch.equal(extract(model, images, labels, args)[1], attacked)
    assert not torch.equal(choose_images(args, model.info)[0], images)


def test_a_stopped_run_continues_and_a_file_trained_further_replaces_its_row(inputs, tmp_path, monkeypatch):
    flags, at, dra, _ = inputs
    main([*flags, at, dra, "--out", str(tmp_path / "whole")])
    calls = []

    def extract_once(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments)
        return extract(*arguments)
    monkeypatch.setattr(script, "extract", extract_once)
    cut = [*flags, at, dra, "--out", str(tmp_path / "cut")]
    with pytest.raises(KeyboardInterrupt):
        main(cut)
    assert len(read(tmp_path / "cut")) == 1 and not (tmp_path / "cut" / "dimensions.png").exists()
    calls.clear()
    main(cut)
    assert len(calls) == 1
    one, other = [(tmp_path / name / "dimensions.csv").read_bytes() for name in ("cut", "whole")]
    assert one == other
    monkeypatch.setattr(script, "choose_images", lambda *_: pytest.fail("all rows are there"))
    (tmp_path / "cut" / "dimensions.png").unlink()
    main(cut)
    assert Image.open(tmp_path / "cut" / "dimensions.png").width > 1000
    monkeypatch.undo()
    later, content = str(tmp_path / "best.pt"), torch.load(dra, weights_only=True)
    for step in (7, 9):
        torch.save(content | {"step": step}, later)
        main([*flags, at, later, "--out", str(tmp_path / "cut")])
    rows = [(row["checkpoint"], row["step"]) for row in read(tmp_path / "cut")]
    assert rows == [(at, "7"), (dra, "7"), (later, "9")]


def test_a_group_has_mean_and_spread_and_the_papers_row_beside_its_own(inputs, tmp_path, capsys):
    flags, at, dra, _ = inputs
    main([*flags, "--group", f"AT={at}", "--group", f"DM-AT+DRA={at},{dra}", "--out", str(tmp_path)])
    first, second, third, last = capsys.readouterr().out.splitlines()
    rows = read(tmp_path)
    assert [row["method"] for row in rows] == ["AT", "DM-AT+DRA", "DM-AT+DRA"]
    assert rows[2]["checkpoint"] == dra
    assert first.startswith("AT ") and first.endswith("paper: (9, 14, 9)")
    assert third.endswith("paper: (12, 15, 23)")
    assert "CLS-95 {cls_95:>3} ({cls_95_low} to {cls_95_high})".format(**rows[2]) in third
    values = np.array([[float(row[name]) for name in ("cls_95", "cls_99", "robust")] for row in rows[1:]])
    assert f"mean of 2 {values.mean(axis=0).round(1)}" in last
    assert last.endswith(f"standard deviation {(abs(values[0] - values[1]) / np.sqrt(2)).round(1)}")


def test_npz_images_have_any_number_of_classes_and_what_cannot_be_used_is_named(inputs, tmp_path, capsys):
    flags, at, dra, three = inputs
    main([*flags, three, "--out", str(tmp_path / "three")])
    assert read(tmp_path / "three")[0]["dataset"] == "npz"
    main([*flags, at, "--out", str(tmp_path)])
    before = (tmp_path / "dimensions.csv").read_bytes()
    for more, message in (
            (["--n", "71"], "dimensions.csv: has n 70, not 71; choose another --out"),
            (["--eps", "4/255"], "has eps 0.03"),
            (["--keep-mean"], "has keep_mean False, not True"),
            (["--group", f"three={three}"], r"expected checkpoints of the same data.*\('npz', 3, None\)"),
            (["--n", "91", "--out", str(tmp_path / "b")], ": has 90 test images, fewer than --n 91"),
            (["--n", "64", "--out", str(tmp_path / "b")],
             "--n 64: expected more than 64, the features' dimensions")):
        with pytest.raises(InputError, match=message):
            main([*flags, at, "--out", str(tmp_path), *more])
    assert (tmp_path / "dimensions.csv").read_bytes() == before
    with pytest.raises(InputError, match="expected checkpoints"):
        main([*flags, "--out", str(tmp_path / "b")])
    with pytest.raises(OSError, match="nowhere.pt"):
        main([*flags, str(tmp_path / "nowhere.pt"), "--out", str(tmp_path / "b")])
    for more in (["--n", "0"], ["--group", "at.pt"], ["--eps", "2"], ["--nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            parse_args([at, *more])
        assert more[0] in capsys.readouterr().err.splitlines()[-1]
