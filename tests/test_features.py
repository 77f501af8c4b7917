"""experiments/features.py: measures have their known values, intervals cover, all networks are attacked
alike, a stopped run continues."""
import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import EDM, FIXTURES, ROOT
import features
from edm_encoder import load_edm_encoder
from eval_autoattack import InputError, load_classifier
from features import main, statistics, summarise
from train_cifar import generator

EDM = str(EDM)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found(clean, attacked, other):
    """What `statistics` takes: features [N, D], all images classified rightly."""
    return {"clean": clean, "attacked": attacked, "right": torch.ones(len(clean), 2), "cknna_teacher": other}


def measure(name, clean, second, k=5):  # second: attacked features, or for CKNNA those of another network
    return float(statistics(found(clean, clean, second) if "cknna" in name else found(clean, second, clean),
                            k)[name])


def test_identical_features_have_cknna_1_at_every_n_and_unrelated_ones_about_0():
    rotation = torch.linalg.qr(normal(16, 16, seed=1))[0]
    for n in (8, 30, 100, 300):
        a = normal(n, 16) + 0.5
        for name, other in (("", a), ("", 3 * a @ rotation), ("_centred", 3 * a @ rotation + 7)):
            assert measure("cknna_teacher" + name, a, other) == pytest.approx(1, abs=1e-2)
    related = torch.cat([a[:, :8], normal(300, 8, seed=2)], dim=1)
    assert abs(measure("cknna_teacher", a, normal(300, 24, seed=3))) < 0.06
    assert 0.12 < measure("cknna_teacher", a, related) < 0.9
    authors = np.load(FIXTURES / "cknna_reference.npz")  # values of the authors' code
    for one, other in ("ab", "ac", "aa"):
        value = measure("cknna_teacher", torch.from_numpy(authors[one]).double(),
                        torch.from_numpy(authors[other]).double(), k=int(authors["k"]))
        assert value == pytest.approx(float(authors[f"cknna_{one}{other}"]), abs=1e-5)


def test_alignment_is_the_squared_distance_on_the_sphere_and_uniformity_has_known_values():
    clean, cos, sin = normal(50, 2), math.cos(0.3), math.sin(0.3)
    turned = clean @ torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    for attacked, distance in ((5 * clean, 0), (turned, 2 - 2 * cos), (-clean, 4)):
        assert measure("alignment", clean, attacked) == pytest.approx(distance, abs=1e-9)
    # In 3-D the cosine of random directions is uniform in [-1, 1]: E exp(4 cos - 4) = (1 - e^-8) / 8.
    expected = math.log((1 - math.exp(-8)) / 8)
    assert measure("uniformity", normal(1500, 3), normal(1500, 3)) == pytest.approx(expected, abs=0.03)
    assert measure("uniformity", normal(1, 3).expand(10, 3), normal(10, 3)) == pytest.approx(0, abs=1e-9)
    square = torch.tensor([[3.0, 0], [-1, 0], [0, 2], [0, -1]] * 2, dtype=torch.float64)  # each corner twice
    # ordered pairs at squared distances 0, 2 and 4
    expected = (8 * 1 + 32 * math.exp(-4) + 16 * math.exp(-8)) / 56
    assert measure("uniformity", square, square) == pytest.approx(math.log(expected))


def test_centring_takes_away_what_all_features_share_and_keeps_how_far_the_attack_moves_them():
    parts = normal(100, 8), normal(100, 8) + 0.5, normal(100, 8, seed=1)
    plain, shared = [statistics(found(*[x + shift for x in parts]), 5) for shift in (0, 20)]
    assert shared["alignment"] < 0.01 * plain["alignment"]
    assert shared["uniformity"] > -0.05 > -1 > plain["uniformity"]
    for name in ("alignment_centred", "uniformity_centred", "cknna_teacher_centred"):
        assert float(shared[name]) == pytest.approx(float(plain[name]))
    assert plain["alignment_centred"] > 0.1, (
        "all attacked features have moved by 0.5, which their own mean would hide")


def sample(n, seed):
    """Features of n images in five clusters, an attack on them and a related network."""
    centres, random = 1.5 * normal(5, 6, seed=99), torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, 6, generator=random, dtype=torch.float64)
    clean = centres[torch.randint(5, (n,), generator=random)] + draw() + 2
    parts = found(clean, clean + 0.3 * draw(), clean @ normal(6, 6, seed=98) + draw())
    return parts | {"right": (torch.rand(n, 2, generator=random) < torch.tensor([0.8, 0.4])).double()}


@pytest.mark.slow
def test_intervals_cover_where_a_bootstrap_that_draws_images_twice_does_not(monkeypatch):
    monkeypatch.setattr(features, "tqdm", lambda steps, **_: steps)
    values = [statistics(sample(80, seed), 8) for seed in range(1000, 1400)]
    truth = {name: torch.stack([value[name] for value in values]) for name in values[0]}
    rows = [summarise(sample(80, seed), 8, 60, seed) for seed in range(50)]
    for name, drawn in truth.items():
        low, high = np.array([[float(row[name + end]) for row in rows] for end in ("_low", "_high")])
        assert np.mean((low <= float(drawn.mean())) & (float(drawn.mean()) <= high)) >= 0.88, name
        width = (high - low).mean() / (2 * 1.96 * float(drawn.std()))
        assert 0.85 < width < (1.7 if "cknna" in name else 1.25), name
    missed = 0
    for seed in range(20):
        twice = torch.randint(80, (60, 80), generator=torch.Generator().manual_seed(seed))
        draws = statistics({name: x[twice] for name, x in sample(80, seed).items()}, 8)["uniformity_centred"]
        low, high = draws.quantile(0.025), draws.quantile(0.975)
        missed += not low <= truth["uniformity_centred"].mean() <= high
    assert missed >= 5, "nominally one"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints a, b, c of slightly different networks, 40 test images that a classifies rightly, and 60
    training images."""
    folder = tmp_path_factory.mktemp("inputs")
    state = load_classifier(FIXTURES / "dmat_wrn_10_1_cifar10.pt", "wrn-10-1", "cifar10").state_dict()
    for i, name in enumerate("abc"):
        moved = {key: x * (1 + 0.1 * i * normal(*x.shape, seed=i).float()) if x.ndim == 4 else x
                 for key, x in state.items()}
        torch.save({"arch": "wrn-10-1", "dataset": "cifar10", "step": 7, "state_dict": moved},
                   folder / f"{name}.pt")
    for i, (split, n) in enumerate((("test", 40), ("train", 60))):
        images = np.random.default_rng(i).integers(0, 256, (n, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        labels = load_classifier(folder / "a.pt")(pixels).argmax(dim=1)
        np.savez(folder / f"{split}.npz", image=images, label=labels.numpy())
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """run(names of checkpoints and flags, ..., out=folder) -> rows of the CSV. Few splits, as intervals are
    tested above."""
    monkeypatch.setattr(features, "summarise", lambda found, k, splits, seed: summarise(found, k, 20, seed))

    def run(*flags, out="out"):
        named = [str(folder / f"{flag}.pt") if flag in "abc" else flag for flag in flags]
        main([*f"--data-dir {folder} --device cpu --k 4 --steps 2 --out {tmp_path / out}".split(), *named])
        return list(csv.DictReader((tmp_path / out / "features.csv").read_text().splitlines()))
    return run


def test_rows_are_those_of_the_measures_on_drawn_images_and_their_pgd(run, folder, tmp_path):
    rows = run("a", "--teacher", EDM, "--teacher-sigma", "0.2", "--reference", str(folder / "c.pt"), "--n",
               "16", "30", "--seed", "3")
    expected = [(x, n) for x in ("c.pt", "a.pt", Path(EDM).name) for n in ("16", "30")]
    assert [(Path(row["checkpoint"]).name, row["n"]) for row in rows] == expected
    drawn, file = torch.randperm(40,
                                 generator=generator(3, 0, "test images"))[:30], np.load(folder / "test.npz")
    images = torch.from_numpy(file["image"]).permute(0, 3, 1, 2)[drawn] / 255
    labels = torch.from_numpy(file["label"])[drawn]
    model, standard = [load_classifier(folder / f"{name}.pt") for name in "ac"]
    uniform = torch.rand(images.shape, generator=generator(3, 0, "attack"))
    adv = (images + 8 / 255 * (2 * uniform - 1)).clamp(0, 1)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(adv.requires_grad_()), labels), [adv])
        adv = torch.minimum(torch.maximum(adv.detach() + 2 / 255 * gradient.sign(), images - 8 / 255),
                            images + 8 / 255).clamp(0, 1)
    still = torch.randn((1, 3, 32, 32), generator=generator(3, 0, "teacher noise")).expand(30, -1, -1, -1)
    parts = found(model.features(images), model.features(adv),
                  load_edm_encoder(EDM)(images, None, 0.2, still))
    parts |= {"cknna_reference": standard.features(images),
              "right": torch.stack([model(x).argmax(dim=1) == labels for x in (images, adv)], dim=1)}
    for row, n in zip(rows[2:4], (16, 30)):
        for name, value in statistics({name: x[:n].double() for name, x in parts.items()}, 4).items():
            assert float(row[name]) == pytest.approx(float(value), rel=0.02, abs=2e-4), name
            assert float(row[name + "_low"]) <= float(row[name]) <= float(row[name + "_high"])
        settings = {"k": "4", "seed": "3", "steps": "2", "teacher_sigma": "0.2", "dataset": "cifar10",
                    "probe_images": "5000", "step": "7"}
        assert row.items() >= settings.items()
    assert rows[0]["cknna_reference_centred"] == rows[4]["cknna_teacher"] == "nan", "with itself"
    assert float(rows[4]["alignment"]) > 0 and (tmp_path / "out" / "features.png").stat().st_size > 30_000


@pytest.mark.slow
def test_a_stronger_attack_moves_features_further_and_another_seed_draws_other_images(run):
    one, eight = [run("a", "--n", "16", "--eps", eps, out=eps[0])[0] for eps in ("1/255", "8/255")]
    assert float(one["alignment_high"]) < float(eight["alignment_low"])
    assert one["uniformity"] == eight["uniformity"]
    assert float(one["robust_accuracy"]) > float(eight["robust_accuracy"])
    assert one["clean_accuracy"] == eight["clean_accuracy"] == "100"
    rows = run("a", "--n", "16", "--seed", "1", out="8")
    assert [row["seed"] for row in rows] == ["0", "1"] and rows[0] == eight
    assert rows[1]["uniformity"] != eight["uniformity"]


def test_a_stopped_run_continues_and_what_is_there_stays(run, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "draw_figure", lambda path, rows: path.write_text(f"{len(rows)} rows"))
    flags, calls = ("a", "b", "--teacher", EDM, "--n", "12", "20"), []
    measured, extract = features.summarise, features.extract
    whole = run(*flags, out="whole")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(features, "summarise",
                      lambda *x: calls.append(x) or (measured(*x) if len(calls) < 4 else 1 / 0))
        run(*flags, out="cut")
    assert len((tmp_path / "cut" / "features.csv").read_text().splitlines()) == 1 + 3
    assert run(*flags, out="cut") == whole
    monkeypatch.setattr(features, "extract", lambda *_: pytest.fail("all rows are there"))
    (tmp_path / "cut" / "features.png").unlink()
    assert run(*flags, out="cut") == whole
    assert (tmp_path / "cut" / "features.png").read_text() == "6 rows", "without work it only draws"
    monkeypatch.setattr(features, "extract", lambda *given: calls.append(given) or extract(*given))
    calls.clear()
    assert len(run(*flags, "8", out="cut")) == 9
    assert len(calls) == 3, "another n is added, with each network attacked once"


def test_a_group_gives_mean_and_spread_and_a_file_that_was_trained_on_is_measured_again(run, folder, capsys):
    group = ["--group", f"AT={folder / 'a.pt'},{folder / 'b.pt'}",
             f"{folder / 'c.pt'}@wrn-10-1@{ROOT / 'train_cifar.py'}", "--n", "12"]
    single, *rows = run(*group)
    assert single["method"] == single["checkpoint"] and {row["method"] for row in rows} == {"AT"}
    x, y = np.array([[float(row[name]) for row in rows] for name in ("alignment", "uniformity")])
    line = ("AT, n = 12, seed 0, mean of 2 +- deviation: "
            f"alignment {x.mean():.4g} +- {x.std(ddof=1):.2g}, "
            f"uniformity {y.mean():.4g} +- {y.std(ddof=1):.2g}")
    assert line in capsys.readouterr().out.splitlines()
    torch.save(torch.load(folder / "b.pt", weights_only=True) | {"step": 8}, folder / "b.pt")
    assert [row["step"] for row in run(*group)] == ["7", "7", "7", "8"]
    assert "mean of 2" in capsys.readouterr().out, "the row of step 7 is not drawn"


def test_what_cannot_be_used_is_named(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "draw_figure", lambda *_: None)
    before = run("a", "--n", "12")
    torch.save(torch.load(folder / "a.pt", weights_only=True)
               | {"dataset": "npz", "num_classes": 10, "mean": [0.0] * 3, "std": [1.0] * 3},
               folder / "npz.pt")
    for flags, message in ((["--n", "41"], "expected 8 to 40, all test images"),
                           (["--n", "7"], "expected 8 to 40"), (["--n", "12", "--k", "12"], "more than --k"),
                           (["--teacher", EDM, "--teacher-layer", "dec.9"],
                            "no layer 'dec.9'.* it has enc.32x32_conv, "),
                           (["--group", "AT"], "No such file"),
                           ([str(folder / "npz.pt")], "expected checkpoints of the same data.*npz")):
        with pytest.raises((InputError, OSError), match=message):
            run("a", *flags, out="other")
    for flags, message in ((["--steps", "3"], "has steps 2, not 3; change --out"),
                           (["--teacher", EDM], "has teacher None, not edm_tiny"), (["--k", "5"], "has k 4")):
        with pytest.raises(InputError, match=message):
            run("a", "--n", "20", *flags)
    assert run("a", "--n", "12") == before
