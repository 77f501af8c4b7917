"""experiments/probe_teacher.py: the expectation over noise breaks what only hides its gradient; definitions
hold; a stopped run continues."""
import csv
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import probe_teacher
import train_cifar
from edm_encoder import EDMEncoder, load_edm_encoder
from helpers import dump, edm_file, randomise
from eval_autoattack import load_classifier
from probe_teacher import (InputError, add_row, attack, fit_probe, main, parse_args, shared_direction,
                           summarise)

EDM, NET = [
    str(Path(__file__).parent / "fixtures" / name)
    for name in ("edm_tiny_cond_vp.pkl", "dmat_wrn_10_1_cifar10.pt")
]
BLOCKS = [
    "enc.16x16_down", "enc.16x16_block0", "enc.8x8_down", "enc.8x8_block0", "dec.8x8_in0", "dec.8x8_in1",
    "dec.8x8_block0", "dec.8x8_block1", "dec.16x16_up", "dec.16x16_block0", "dec.16x16_block1"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 training and 20 test images, and a second network like NET."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 60), ("test", 20)):
        np.savez(folder / f"{split}.npz",
                 **dict(zip(("image", "label"), train_cifar.draw_smoke_images(count, seed=len(split)))))
    state = torch.load(NET, weights_only=True)["model_state_dict"]
    torch.save({
        name: x + 0.05 * torch.randn(x.shape) if x.ndim == 4 else x
        for name, x in state.items()
    }, folder / "other.pt")
    return folder


@pytest.fixture(scope="module")
def flags(folder):
    """A command: the table of all blocks at one sigma, and a group of two classifiers."""
    return [
        "--teacher", EDM, "--data-dir",
        str(folder), "--device", "cpu", "--n", "15", "--steps", "2", "--eot", "3", "--arch", "wrn-10-1",
        "--dataset", "cifar10", "--group", f"AT={NET},{folder / 'other.pt'}", "--teacher-sigma", "0.2",
        "--eps", "8/255", "0"
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of that command, undisturbed."""
    main([*flags, "--out", str(out := tmp_path_factory.mktemp("whole"))])
    return out


def read(out):
    return list(csv.DictReader((out / "probe_teacher.csv").read_text().splitlines()))


def images_of(folder, split):
    image, label = [torch.from_numpy(np.load(folder / f"{split}.npz")[name]) for name in ("image", "label")]
    return image.permute(0, 3, 1, 2).float() / 255, label


def test_a_defence_that_only_hides_its_gradient_falls_under_the_expectation():
    """The margin of class 0 has slope 1 in all pixels, and the noise hides it behind 20 times as much."""
    x, y, eps = torch.full((20, 3, 64, 64), 0.5), torch.zeros(20, dtype=torch.long), 0.03
    margin = lambda adv, noise: 5 + ((1 + 20 * noise) * (adv - x)).sum(dim=(1, 2, 3)) / (1000 * eps)
    network = lambda adv, noise: torch.stack([margin(adv, noise), torch.zeros(len(adv))], dim=1)
    left = [
        attack(network, x, y, eps, 20, noises, train_cifar.generator(0, 0, "test")).sum()
        for noises in (0, 1, 64)
    ]
    assert left[0] == 0 and left[1] >= 15 and left[2] <= 5, left


def test_attacks_see_the_noise_that_they_should_and_all_are_judged_with_the_same():
    x, y, judged = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), {}
    for noises, eps in itertools.product((0, 1, 3), (0, 0.1)):
        calls = []
        network = lambda adv, noise: calls.append(
            (adv.detach().clone(), noise)) or (adv + noise).mean(dim=(2, 3))
        attack(network, x, y, eps, 5, noises, train_cifar.generator(0, 0, "test"))
        adv, judged[noises, eps] = calls[-1]
        seen = {noise.sum().item() for _, noise in calls}
        assert len(calls) == 1 + (5 * max(1, noises) if eps else 0) and len(seen) == (
            len(calls) if noises else 1), "the judge's, or all new"
        assert (adv - x).abs().max() <= eps + 1e-6 and 0 <= adv.min() and adv.max() <= 1 and (
            eps or torch.equal(adv, x))
    assert all(torch.equal(noise, judged[0, 0]) for noise in judged.values())


class Pixels(torch.nn.Module):
    """A teacher whose features are five noisy pixels, very different in scale."""
    width = 5

    def forward(self, images, labels, sigma, noise):
        assert labels is None, "a label would be the answer"
        return (images + sigma * noise).flatten(1)[:, :5] * torch.tensor([1e-2, 1, 50, 1, 1]) + 3


def test_the_probe_is_the_minimum_of_its_objective_on_all_but_the_held_out_images(monkeypatch):
    monkeypatch.setattr(probe_teacher, "load_edm_encoder", lambda path, layer: Pixels())
    labels, args = torch.arange(500) % 5 % 3, parse_args(["--teacher", "none", "--device", "cpu"])
    images = torch.rand(500, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    images.flatten(1)[torch.arange(500), labels] += 0.8
    network, kept, right = fit_probe("dec", 0.1, images, labels, args)
    noise = torch.randn(images.shape, generator=train_cifar.generator(0, 0, "training noise"))
    logits, features = network(images, noise), Pixels()(images, None, 0.1, noise)
    assert torch.equal(kept, features[:100]) and torch.equal(right, logits[:100].argmax(dim=1)
                                                             == labels[:100])
    assert right.float().mean() > 0.8 and not torch.equal(network(images, 0 * noise), logits)
    # W and b of the standardised features, read off the logits at 0 and at the five unit vectors.
    mean, deviation = features[100:].mean(dim=0), features[100:].std(dim=0)
    monkeypatch.setattr(Pixels, "forward", lambda self, x, *rest: x)
    at = network(torch.cat([torch.zeros(1, 5), torch.eye(5)]) * deviation + mean, None).detach()
    weight, bias = (at[1:] - at[0]).requires_grad_(), at[0].clone().requires_grad_()
    (F.cross_entropy((features[100:] - mean) / deviation @ weight + bias, labels[100:]) +
     1e-3 / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4


def test_shared_direction_is_the_mean_over_pairs_of_different_images():
    assert shared_direction(3 * torch.ones(9, 4)) == pytest.approx([1, 1, 1]) and shared_direction(
        torch.eye(9)) == pytest.approx([0] * 3, abs=1e-12)
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + torch.tensor(
        [2.0, 0, 0, 0, 0])
    cosines = F.cosine_similarity(features[:, None], features, dim=2).numpy()
    draws = [
        cosines[i][:, i][i[:, None] != i].mean()
        for i in [np.arange(60), *np.random.default_rng(1).integers(60, size=(1000, 60))]
    ]
    value, *interval = shared_direction(features)
    assert value == pytest.approx(draws[0]) and interval == pytest.approx(np.percentile(draws, (2.5, 97.5)),
                                                                          abs=0.02)


def test_accuracies_have_wilsons_interval_and_seeds_their_standard_deviation(tmp_path):
    rows = {}
    for i, (right, expected) in enumerate([(0, [0, 0, 27.75]), (5, [50, 23.66, 76.34]),
                                           (10, [100, 72.25, 100])]):
        add_row(tmp_path / "probe_teacher.csv", rows, ("a", str(i), "test", "m", "", "0"), {"n": "10"},
                torch.arange(10) < right)
        row = read(tmp_path)[i]
        assert [float(row[name]) for name in probe_teacher.NAMES[:3]] == pytest.approx(
            expected, abs=0.01) and row["shared"] == ""
    assert summarise([[1, 0, 9]]) == [1, 0, 9] and summarise([[1, 0, 9], [3, 0, 9]]) == pytest.approx(
        [2, 2 - 2**0.5, 2 + 2**0.5])


def test_the_table_has_all_blocks_at_8_and_16_pixels_and_the_best_is_attacked(whole, folder):
    table, (images, _) = [row for row in read(whole) if row["judged_on"] == "held-out"], images_of(
        folder, "train")
    assert [row["layer"] for row in table] == BLOCKS and {row["method"] for row in table} == {"sigma 0.2"}
    noise = torch.randn(images.shape, generator=train_cifar.generator(0, 0, "training noise"))
    for row in (table[1], table[-1]):
        features = load_edm_encoder(EDM, row["layer"])(images[:12], None, 0.2, noise[:12])
        assert float(row["shared"]) == pytest.approx(shared_direction(features)[0], rel=1e-4)
    best = max(table, key=lambda row: float(row["accuracy"]))
    attacked = [row for row in read(whole) if row["judged_on"] == "test" and row["file"] == EDM]
    assert [row["method"] for row in attacked[::2]] == [
        f"{best['layer']}, sigma 0.2, {x}" for x in ("fixed", "fresh, plain", "fresh, mean of 3")
    ]
    assert len({row["accuracy"]
                for row in attacked if row["eps_255"] == "0"}) == 1, "the same probe, images and noise"
    assert {(row["n"], row["steps"], row["decay"], row["pgd"])
            for row in read(whole)} == {("15", "2", "0.001", "uniform, eps/4")}


def test_classifiers_are_attacked_beside_it_and_a_group_has_mean_and_spread(whole, folder, flags, capsys):
    rows, (images, labels) = [row for row in read(whole) if row["method"] == "AT"], images_of(folder, "test")
    assert [(row["file"], row["eps_255"])
            for row in rows] == [(file, eps) for file in (NET, str(folder / "other.pt")) for eps in "80"]
    clean = [
        100 * (load_classifier(file, "wrn-10-1", "cifar10")(images[:15]).argmax(dim=1)
               == labels[:15]).float().mean().item() for file in (NET, folder / "other.pt")
    ]
    assert [float(row["accuracy"]) for row in rows[1::2]] == pytest.approx(clean, abs=1e-3)
    main([*flags, "--out", str(whole)])
    drawn = [round(float(np.mean(clean) + sign * np.std(clean, ddof=1)), 3) for sign in (0, -1, 1)]
    assert f"accuracy (test images), AT: {{0.0: {drawn}, 8.0: " in capsys.readouterr().out
    assert Image.open(whole / "probe_teacher.png").width > 1500


@pytest.mark.slow
def test_a_stopped_run_continues_and_a_finished_one_is_only_drawn(whole, flags, tmp_path, monkeypatch):
    flags = [*flags, "--out", str(tmp_path)]
    for name, allowed, rows in (("fit_probe", 5, 5), ("attack", 3, 14)):
        calls = iter([getattr(probe_teacher, name)] * allowed)
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(probe_teacher, name, lambda *inputs: next(calls)(*inputs))
            main(flags)
        assert len(read(tmp_path)) == rows and not (tmp_path / "probe_teacher.png").exists()
    main(flags)
    content = (tmp_path / "probe_teacher.csv").read_bytes()
    assert content == (whole / "probe_teacher.csv").read_bytes()
    (tmp_path / "probe_teacher.png").unlink()
    monkeypatch.setattr(probe_teacher, "fit_probe", None), monkeypatch.setattr(probe_teacher, "attack", None)
    main(flags)
    assert (tmp_path / "probe_teacher.png").exists() and (tmp_path /
                                                          "probe_teacher.csv").read_bytes() == content


def test_a_teacher_alone_and_any_number_of_classes(folder, tmp_path):
    for split in ("train", "test"):
        np.savez(
            tmp_path / f"{split}.npz",
            **dict(np.load(folder / f"{split}.npz"))
            | {"label": np.arange({
                "train": 60,
                "test": 20
            }[split]) % 3})
    main([
        "--teacher", EDM, "--dataset", "npz", "--data-dir",
        str(tmp_path), "--device", "cpu", "--n", "20", "--steps", "1", "--eps", "1/255", "--teacher-layer",
        "dec.8x8_in1", "--teacher-sigma", "0.5", "--eot", "1", "--out",
        str(tmp_path)
    ])
    assert len(read(tmp_path)) == 4


def test_what_cannot_be_used_is_named_and_changes_nothing(whole, folder, flags, tmp_path, capsys,
                                                          monkeypatch):
    before, small = (whole / "probe_teacher.csv").read_bytes(), {
        "img_resolution": 16,
        "model_channels": 8,
        "channel_mult": [1, 1],
        "num_blocks": 1
    }
    dump(edm_file(randomise(EDMEncoder(**small)), small), tmp_path / "16px.pkl")
    monkeypatch.setattr(train_cifar.torchvision.datasets, "CIFAR10", lambda *_, **__:
                        (_ for _ in ()).throw(RuntimeError("no network")))
    for more, message in ((["--steps", "3", "--out", str(whole)], "has steps 2, not 3"), ([
            "--n", "14", "--out", str(whole)
    ], "has n 15, not 14"), (["--n", "21"], "--n 21: .* has 20 test images"), ([
            "--teacher-layer", "dec.9x9"
    ], "no layer 'dec.9x9'.*dec.8x8_in1"), ([
            "--teacher", str(tmp_path / "16px.pkl")
    ], "16px.pkl: no layer 'dec.32x32_aux_conv'"), (["--group", "AT"], "No such file.*'AT'"), ([
            "--data-dir", str(tmp_path)
    ], "has no train.npz"), ([str(tmp_path / "none.pt")], "none.pt")):
        with pytest.raises((InputError, OSError), match=message) as caught:
            main([*flags, *(["--out", str(tmp_path / "out")] if "--out" not in more else []), *more])
        assert "\n" not in str(caught.value)
    for data in (["cifar10", "cifar100"], ["imagenet"]):
        models = [
            SimpleNamespace(info=SimpleNamespace(dataset=name, num_classes=10, args={}),
                            to=lambda device: models.pop(0)) for name in data
        ]
        monkeypatch.setattr(probe_teacher, "load_classifier", lambda *_: models[0])
        with pytest.raises(InputError, match=rf"^{data[-1]}.pt: was trained on \('{data[-1]}', 10\)"):
            main(["--teacher", EDM, *(f"{name}.pt" for name in data)])
    assert (whole / "probe_teacher.csv").read_bytes() == before and not (tmp_path / "out" /
                                                                         "probe_teacher.csv").exists()
    for more in (["--eps", "1"], ["--eot", "0"], ["--teacher-sigma", "0"], ["--nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            parse_args([*flags, *more])
        assert more[0] in capsys.readouterr().err.splitlines()[-1]
