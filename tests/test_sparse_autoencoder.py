"""experiments/sparse_autoencoder.py: a sum of 5 directions is rebuilt by k = 5 and not by k = 4, dead latents
are revived and told, PCA stands beside each loss, and a stopped run continues."""
import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from helpers import DMAT
import sparse_autoencoder as script
import train_cifar
from eval_autoattack import InputError, load_classifier, read_imagenet
from sparse_autoencoder import extract, fit, judge, keep_largest, main, parse_args, rebuild


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_sums(count, directions, k):
    """Sums of k of the directions [N, D], each with a weight from 1 to 2: [count, D]."""
    random = torch.Generator().manual_seed(0)
    active = torch.rand(count, len(directions), generator=random).topk(k, dim=1).indices
    weights = 1 + torch.rand(count, k, generator=random)
    return torch.zeros(count, len(directions)).scatter(1, active, weights) @ directions


def settings(*flags, **constants):
    args = parse_args(["some.pt", "--device", "cpu", *flags])
    vars(args).update(constants)
    return args


def test_a_sum_of_5_directions_is_rebuilt_with_k_5_and_not_with_k_4():
    """By an autoencoder that knows the directions: with equal weights, one of 5 missing is a fifth of the
    square."""
    sae = torch.eye(32), torch.eye(32), torch.zeros(32), torch.zeros(32)
    x = draw_sums(200, torch.eye(32), 5).sign()
    for k, loss in ((5, 0), (4, 0.2)):
        rebuilt, z, latents = rebuild(x, k, *sae)
        assert (rebuilt - x).square().sum() / x.square().sum() == pytest.approx(loss)
        assert torch.equal(latents, x)
        assert ((z > 0).sum(dim=1) == k).all(), "k of them, even where five are equal"
    kept = keep_largest(torch.tensor([[3.0, -1, 2, 1], [-2, -1, -3, -4]]), 2)
    assert kept.tolist() == [[3, 0, 2, 0], [0, 0, 0, 0]]


@pytest.mark.slow
def test_an_autoencoder_finds_more_directions_than_there_are_dimensions():
    """40 directions in 32 dimensions, two at a time, of which the fit knows nothing. Components cannot tell
    them apart."""
    directions = F.normalize(normal(40, 32, seed=1), dim=1)
    x = draw_sums(3000, directions, 2)
    train, test = x[:2500] - x[:2500].mean(dim=0), x[2500:] - x[:2500].mean(dim=0)
    args = settings("--steps", "400", "--expansion", "2", batch=128, rate=0.01)
    sae = fit(train, 2, args)
    row = judge(sae, 2, train, test)
    assert row["loss_low"] < row["loss"] < row["loss_high"] < 0.05
    assert 0.7 < row["pca_low"] < row["pca"] < row["pca_high"]
    assert (directions @ sae[0].T).amax(dim=1).min() > 0.9, "cosine of each with the nearest column of W_dec"
    torch.testing.assert_close(sae[0].norm(dim=1), torch.ones(64))
    assert judge(fit(train, 1, args), 1, train, test)["loss"] > 0.3, "one at a time is too few"


@pytest.mark.slow
def test_the_second_term_revives_dead_latents():
    x, dead = normal(1000, 16) * 0.8 ** torch.arange(16), []
    x = (x - x.mean(dim=0)) / x.var(dim=0).mean().sqrt()
    for weight in (0, 1 / 32):
        sae = fit(x, 2, settings("--steps", "500", batch=64, rate=0.02, auxiliary=weight))
        dead.append(judge(sae, 2, x, x)["dead"])
    assert dead[0] > 0.3 > 2 * dead[1], dead


def test_more_than_10_percent_of_dead_latents_are_marked():
    """40 latents that are active at times, and some that are not, as their bias is far below."""
    x = draw_sums(500, torch.eye(40), 3)
    for silent, share, remark in ((4, 4 / 44, ""), (5, 5 / 45, "NOT COMPARABLE")):
        both, bias = torch.eye(40)[[*range(40), *range(silent)]], torch.tensor([0.0] * 40 + [-10.0] * silent)
        row = judge((both, both, bias, torch.zeros(40)), 3, x, x)
        assert row["dead"] == pytest.approx(share, abs=1e-4) and row["remark"] == remark and row["loss"] == 0


def test_losses_are_those_of_the_definition_with_95_percent_intervals():
    train, test, last = normal(300, 8) * torch.arange(1, 9), normal(400, 8, seed=1), torch.eye(8)[7:]
    train -= train.mean(dim=0)
    # it knows one half of the last axis
    row = judge((last, last, torch.zeros(1), torch.zeros(8)), 1, train, test)
    errors, spread = (test - F.pad(test[:, 7:].relu(), (7, 0))).square().sum(dim=1), test.square().sum(dim=1)
    pca = 1 - (test @ torch.linalg.svd(train)[2][0]).square().sum() / spread.sum()
    assert [row["loss"], row["pca"]] == pytest.approx([(errors.sum() / spread.sum()).item(), pca.item()],
                                                      abs=1e-5)
    # to first order
    half = 1.96 * (errors - row["loss"] * spread).std().item() / math.sqrt(400) / spread.mean().item()
    halves = [row["loss_high"] - row["loss"], row["loss"] - row["loss_low"]]
    assert halves == pytest.approx([half, half], rel=0.15)


def test_a_fit_starts_with_the_decoders_transpose_and_depends_on_seed_and_k():
    x, args = normal(50, 8), settings("--steps", "3")
    first, again, other = fit(x, 2, args), fit(x, 2, args), fit(x, 3, args)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    assert not torch.equal(fit(x, 2, settings("--steps", "3", "--seed", "1"))[0], first[0])
    decoder, encoder, *biases = fit(x, 2, settings("--steps", "3", rate=0))
    torch.testing.assert_close(decoder, encoder)
    torch.testing.assert_close(decoder.norm(dim=1), torch.ones(32))
    assert not torch.cat(biases).any()


def test_features_are_centred_and_scaled_and_n_limits_what_is_read_of_imagenet(tmp_path, monkeypatch):
    """Of 20 images in four classes, 8 of train/ and 8 of val/. They are drawn, as files are sorted by
    class."""
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 40, 40, 3), np.uint8)):
        path = tmp_path / ("train", "val")[i // 20] / str(i % 20 // 5) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    seen, features = [], lambda x: x.flatten(2).std(dim=2)
    noted = lambda path, size: seen.append(Path(path)) or read_imagenet(path, size)
    monkeypatch.setattr(script, "read_imagenet", noted)
    model = SimpleNamespace(info=SimpleNamespace(dataset="imagenet", args={"image_size": 32}),
                            features=features)
    train, test = extract(model, settings("--data-dir", str(tmp_path), "--n", "8"))
    assert len(set(seen)) == 16 and [path.parent.parent.name for path in seen] == 8 * ["train"] + 8 * ["val"]
    assert len({path.parent for path in seen[:8]}) > 2
    raw = [features(torch.stack([read_imagenet(path, 32) for path in part])) for part in (seen[:8], seen[8:])]
    for found, expected in zip((train, test), raw):
        torch.testing.assert_close(found, (expected - raw[0].mean(dim=0)) / raw[0].var(dim=0).mean().sqrt())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags, and three networks: DM-AT's, the same a little changed, and one of three classes of npz
    images."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, split, count in ((0, "train", 90), (1, "test", 50)):
        images, labels = train_cifar.draw_smoke_images(count, seed)
        np.savez(folder / f"{split}.npz", image=images, label=labels % 3)
    state = torch.load(DMAT, weights_only=True)["model_state_dict"]
    about = {"arch": "wrn-10-1", "dataset": "cifar10", "step": 7}
    for name, change in (("at", 0), ("dra", 0.05)):
        changed = {key: value + change * value.abs() if value.is_floating_point() else value
                   for key, value in state.items()}
        torch.save(about | {"model_state_dict": changed}, folder / f"{name}.pt")
    about |= {"dataset": "npz", "num_classes": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    torch.save(about | {"model_state_dict": train_cifar.build_model("wrn-10-1", 3, "npz").state_dict()},
               folder / "three.pt")
    flags = ["--k", "4", "8", "--data-dir", str(folder), "--n", "80", "--steps", "3", "--device", "cpu"]
    return flags, *[str(folder / f"{name}.pt") for name in ("at", "dra", "three")]


def read(folder):
    return list(csv.DictReader((folder / "sparse_autoencoder.csv").read_text().splitlines()))


def test_rows_are_what_the_functions_give_and_a_group_has_mean_and_spread(inputs, tmp_path, capsys):
    flags, at, dra, _ = inputs
    main([*flags, "--group", f"AT={at},{dra}", "--seed", "3", "--out", str(tmp_path)])
    lines, rows = capsys.readouterr().out.splitlines(), read(tmp_path)
    args = parse_args([*flags, dra, "--seed", "3"])
    train, test = extract(load_classifier(dra), args)
    assert train.shape == (80, 64) and test.shape == (50, 64), "all test images, as there are fewer than --n"
    expected = judge(fit(train, 8, args), 8, train, test) | {
        "method": "AT", "checkpoint": dra, "seed": 3, "k": 8, "arch": "wrn-10-1", "step": 7,
        "weights": "averaged", "n": 80,
        "expansion": 4, "steps": 3, "dataset": "cifar10", "batch": 512, "rate": 0.001, "auxiliary": 0.03125}
    assert rows[3].items() >= {name: str(value) for name, value in expected.items()}.items()
    line = "k  8: loss {loss} ({loss_low} to {loss_high}), PCA {pca}, dead {dead} {remark}".format(**rows[1])
    assert line in lines[1]
    for name, line in zip(("loss", "pca"), lines[4:]):
        one, two = [float(row[name]) for row in rows if row["k"] == "4"]
        assert line.startswith(f"AT, seed 3, {name} of 2: ")
        found = [float(x) for x in line[line.index("[") + 1:line.index("]")].split(",")]
        assert found == pytest.approx([4, (one + two) / 2, abs(one - two) / math.sqrt(2)], abs=1e-5)


def test_a_stopped_run_continues_and_a_file_trained_further_replaces_its_rows(inputs, tmp_path, monkeypatch):
    flags, at, dra, _ = inputs
    main([*flags, at, dra, "--out", str(tmp_path / "whole")])
    calls, cut = [], [*flags, at, dra, "--out", str(tmp_path / "cut")]
    monkeypatch.setattr(script, "fit", lambda *given: calls.append(given) or fit(*given) if len(calls) < 3
                        else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(cut)
    assert len(read(tmp_path / "cut")) == 3 and not (tmp_path / "cut" / "sparse_autoencoder.png").exists()
    calls.clear()
    main(cut)
    files = [tmp_path / name / "sparse_autoencoder.csv" for name in ("cut", "whole")]
    assert len(calls) == 1 and files[0].read_bytes() == files[1].read_bytes()
    files[0].with_suffix(".png").unlink()
    monkeypatch.setattr(script, "extract", lambda *_: pytest.fail("all rows are there"))
    main(cut)
    assert Image.open(files[0].with_suffix(".png")).width > 1000
    monkeypatch.undo()
    for step in (7, 9):
        torch.save(torch.load(dra, weights_only=True) | {"step": step}, later := str(tmp_path / "later.pt"))
        main([*flags, later, "--out", str(tmp_path / "cut")])
    assert [(row["checkpoint"], row["step"]) for row in read(tmp_path / "cut")[4:]] == 2 * [(later, "9")]


def test_npz_images_have_any_number_of_classes_and_what_cannot_be_used_is_named(inputs, tmp_path, capsys,
                                                                                monkeypatch):
    flags, at, dra, three = inputs
    monkeypatch.chdir(tmp_path)
    for file, folder in ((three, "three"), (at, ".")):
        main([*flags, file, "--out", str(tmp_path / folder)])
    assert read(tmp_path / "three")[0]["dataset"] == "npz"
    for more, message in (
            (["--n", "81"], "sparse_autoencoder.csv: has n 80, not 81; use a new --out"),
            (["--steps", "4"], "has steps 3, not 4"),
            (["--group", f"three={three}"], r"expected checkpoints of the same data.*\('npz', 3, None\)"),
            (["--n", "91", "--out", "b"], ": has 90 training images, fewer than --n 91"),
            (["--k", "64"], "--k 64: expected less than 64")):
        with pytest.raises(InputError, match=message):
            main([*flags, at, "--out", str(tmp_path), *more])
    assert len(read(tmp_path)) == 2
    for more in (["--n", "0"], ["--group", "at.pt"], ["--k", "0"], ["--nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            parse_args([at, *more])
        assert more[0] in capsys.readouterr().err.splitlines()[-1]
