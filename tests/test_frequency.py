"""experiments/frequency.py: a wave lands in its ring, two networks are compared image by image, and a stopped
run continues."""
import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import FIXTURES, assert_one_line
import frequency
from eval_autoattack import InputError, load_classifier
from frequency import choose_images, curve, main, measure, parse_args, ring_amplitudes, summarise

LINEAR = """from torch.nn import *
build_model = lambda _, classes, dataset: Sequential(Flatten(), Linear(3072, classes, bias=False))
"""


def wave(vertical, horizontal, amplitude=0.3):
    """[32, 32] float64, nowhere 0."""
    y, x = torch.meshgrid(torch.arange(32).double(), torch.arange(32).double(), indexing="ij")
    return amplitude * torch.sin(2 * torch.pi * (vertical * y + horizontal * x) / 32 + 0.1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with linear networks, whose class 1 has a wave as its weight, and eight grey test images, two
    of class 1."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "linear.py").write_text(LINEAR)
    for name, weight in (("five", wave(3, 4)), ("eight", wave(0, 8)), ("more", wave(3, 4, 0.33)),
                         ("most", wave(3, 4, 0.42))):
        weights = torch.outer(torch.eye(10)[1], weight.float().expand(3, 32, 32).flatten())
        torch.save({"arch": "linear", "dataset": "cifar10", "step": 7, "state_dict": {"1.weight": weights}},
                   folder / f"{name}.pt")
    np.savez(folder / "test.npz", image=np.full((8, 32, 32, 3), 128, np.uint8),
             label=np.array([0, 1, 2, 3, 1, 5, 6, 9]))
    return folder


def flags(folder, *names):
    files = [str(folder / f"{name}.pt") for name in names]
    return [*files, *f"--script {folder / 'linear.py'} --data-dir {folder} --n 8 --device cpu".split()]


def table(folder):
    """The CSV as {(stem of the file, signal): {column: array over rings}}, and its rows."""
    with open(folder / "frequency.csv", newline="") as file:
        rows, columns = list(csv.DictReader(file)), {}
    for row in rows:
        lines = columns.setdefault((Path(row["network"].split(",")[0]).stem, row["signal"]), {})
        for name in list(row)[-9:]:
            lines[name] = np.append(lines.get(name, []), float(row[name]))
    return columns, rows


@pytest.mark.parametrize("vertical, horizontal", [(0, 5), (7, 0), (3, -4), (0, 0), (16, 0)])
def test_a_pure_wave_lands_in_its_ring(vertical, horizontal):
    rings = ring_amplitudes(wave(vertical, horizontal).expand(2, 3, 32, 32))[1]
    assert len(rings) == 17
    assert (rings > 1e-9).nonzero().flatten().tolist() == [round(math.hypot(vertical, horizontal))]


def test_rings_are_means_of_amplitudes_by_definition():
    signals = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    i, j, rings = np.arange(8)[:, None], np.arange(6), [[] for _ in range(10)]
    for v, u in itertools.product(range(-4, 4), range(-3, 3)):
        wave = np.exp(-2j * np.pi * (v * i / 8 + u * j / 6))
        amplitude = np.mean([abs((d * wave).sum()) for d in signals[1].numpy()]) / math.sqrt(48)
        rings[round(math.hypot(v, u))].append(amplitude)
    np.testing.assert_allclose(ring_amplitudes(signals)[1], [np.mean(ring) for ring in rings[:4]], rtol=1e-6)
    noise = ring_amplitudes(torch.randn(300, 3, 16, 16,
                                        generator=torch.Generator().manual_seed(1))).mean(dim=0)
    np.testing.assert_allclose(noise[1:], math.sqrt(math.pi) / 2, atol=0.03)


def test_what_fools_a_network_that_looks_for_a_wave_is_this_wave(inputs, tmp_path):
    """All logits of a grey image are 0, so the gradient is 0.1 times the wave, and -0.9 times for class 1."""
    main([*flags(inputs, "five", "eight"), "--out", str(tmp_path)])
    found, _ = table(tmp_path)
    for name, ring, weight in (("five", 5, wave(3, 4)), ("eight", 8, wave(0, 8))):
        row, expected = found[name, "gradient"], ring_amplitudes(weight.expand(1, 3, 32, 32))[0].numpy()
        np.testing.assert_allclose(row["amplitude"], (6 * 0.1 + 2 * 0.9) / 8 * expected, atol=1e-6)
        assert row["amplitude"].argmax() == ring == found[name, "perturbation"]["amplitude"].argmax()
        square = ring_amplitudes(8 / 255 * weight.sign().expand(1, 3, 32, 32))[0].numpy()  # each pixel by eps
        np.testing.assert_allclose(found[name, "perturbation"]["amplitude"], square, rtol=1e-4, atol=1e-7)
    for signal in ("gradient", "perturbation"):
        change = found["eight", signal]
        assert change["difference_high"][5] < 0 < change["difference_low"][8], (
            "less of ring 5 and more of ring 8")
        np.testing.assert_allclose(change["difference"],
                                   change["amplitude"] - found["five", signal]["amplitude"], atol=1e-6)
        assert not found["five", signal]["difference_high"].any()


def test_intervals_hold_95_percent_and_those_of_differences_are_paired(inputs, tmp_path):
    random, hits = np.random.default_rng(0), 0
    for _ in range(100):
        values = random.normal(3, 1, (60, 2, 1))
        row = summarise(values, np.zeros_like(values))[1]
        hits += float(row["amplitude_low"]) < 3 < float(row["amplitude_high"])
        assert float(row["amplitude"]) == pytest.approx(values[:, 1].mean(), rel=1e-5)
    assert 88 <= hits <= 99
    # its weights are 1.1 times those of the first
    main([*flags(inputs, "five", "more"), "--out", str(tmp_path)])
    first, more = [table(tmp_path)[0][name, "gradient"] for name in ("five", "more")]
    for end in ("", "_low", "_high"):
        assert more["difference" + end][5] == pytest.approx(0.1 * first["amplitude" + end][5], rel=1e-3)
        relative = 10 * first["amplitude" + end][5] / first["amplitude"][5]
        assert more["relative" + end][5] == pytest.approx(relative, rel=1e-3)
    assert first["amplitude_high"][5] > 1.5 * first["amplitude_low"][5], (
        "images differ a lot, and yet the network differs by 10 %")


def test_several_seeds_get_mean_and_spread_and_a_later_command_may_group_anew(inputs, tmp_path, capsys,
                                                                              monkeypatch):
    names = [str(inputs / f"{name}.pt") for name in ("five", "more", "most")]
    main([*flags(inputs, "five", "more", "most"), "--out", str(tmp_path)])
    monkeypatch.setattr(frequency, "measure", lambda *_: pytest.fail("all networks are there"))
    main([*flags(inputs), "--group", f"WAVE={','.join(names)}", "--out", str(tmp_path)])
    (found, rows), printed = table(tmp_path), capsys.readouterr().out
    assert {row["method"] for row in rows} == {"WAVE"} and len(rows) == 3 * 2 * 17
    for kind in ("amplitude", "relative"):
        seeds = [found[name, "gradient"][kind] for name in ("five", "more", "most")]
        mean, low, high = curve(rows, "WAVE", "gradient", kind)
        np.testing.assert_allclose(mean, np.mean(seeds, axis=0), rtol=1e-9)
        np.testing.assert_allclose([mean - low, high - mean], 2 * [np.std(seeds, axis=0, ddof=1)], rtol=1e-9)
        [line] = [line.split() for line in printed.splitlines()
                  if line.startswith(f"gradient of WAVE, {kind}: ")]
        assert line[4 + 5] == f"{mean[5]:.3g}+-{(mean - low)[5]:.1g}"


def test_signals_are_those_of_each_image_alone_from_a_start_of_its_own(tmp_path, monkeypatch):
    np.savez(tmp_path / "test.npz", image=np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8),
             label=np.arange(9))
    args = parse_args(["some.pt", "--data-dir", str(tmp_path), "--n", "5", "--device", "cpu"])
    model = load_classifier(FIXTURES / "dmat_wrn_10_1_cifar10.pt", "wrn-10-1", "cifar10")
    images, labels, noise = data = choose_images(args, model.info)
    assert len(set(images.sum((1, 2, 3)).tolist())) == 5 == len(set(noise.sum((1, 2, 3)).tolist())), (
        "drawn, each once")
    for seed, same in ((0, True), (1, False)):  # image number i and its start depend on the seed alone
        args.n, args.seed = 3, seed
        chosen = choose_images(args, model.info)
        assert [torch.equal(part, first[:3]) for part, first in zip(chosen, data)] == 3 * [same]
    found = measure(model, data, 8 / 255, 3, "")
    monkeypatch.setattr(frequency, "BATCH", 2)
    np.testing.assert_allclose(measure(model, data, 8 / 255, 3, ""), found, rtol=0.01)
    alone = torch.autograd.functional.jacobian(lambda x: F.cross_entropy(model(x), labels[3:4]), images[3:4])
    np.testing.assert_allclose(found[3, 1], ring_amplitudes(alone)[0], rtol=1e-3)
    assert measure(model, data, 8 / 255, 0, "")[:, 0, 0].mean() < 8 / 255, (
        "the start goes as often up as down")
    seen = []
    monkeypatch.setattr(frequency, "ring_amplitudes", lambda d: seen.append(d) or ring_amplitudes(d))
    measure(model, data, 8 / 255, 10, "")
    attacked = images + torch.cat(seen[::2])
    assert (attacked - images).abs().max() <= 8 / 255 + 1e-6 and 0 <= attacked.min() and attacked.max() <= 1
    assert F.cross_entropy(model(attacked), labels) > F.cross_entropy(model(images), labels) + 0.05
    grey = torch.full_like(images, 0.5)
    # logit 30 for class 0, in float32 p = 1
    sure = lambda pixels: F.pad(60 * pixels.mean(dim=(1, 2, 3))[:, None], (0, 9))
    slope = measure(sure, (grey, torch.zeros_like(labels), noise), 8 / 255, 1, "")[:, 1, 0] / 32
    assert slope == pytest.approx(9 * math.exp(-30) * 60 / 3072, rel=0.01, abs=0)


def test_a_stopped_run_continues_and_what_is_there_stays(inputs, tmp_path, monkeypatch):
    command = flags(inputs, "five", "eight", "more")
    main([*command, "--out", str(tmp_path / "whole")])
    calls = []

    def stop_at_third(*arguments):
        calls.append(Path(arguments[-1].split(",")[0]).stem)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)
    monkeypatch.setattr(frequency, "measure", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--out", str(tmp_path / "cut")])
    done = set(itertools.product(("five", "eight"), ("perturbation", "gradient")))
    assert set(table(tmp_path / "cut")[0]) == done
    main([*command, "--out", str(tmp_path / "cut")])
    assert calls == ["five", "eight", "more", "more"]
    (tmp_path / "cut" / "frequency.png").unlink()
    for name in ("measure", "load_images"):
        monkeypatch.setattr(frequency, name, lambda *_: pytest.fail("all networks are there"))
    main([*command, "--out", str(tmp_path / "cut")])
    assert (tmp_path / "cut" / "frequency.png").exists()
    cut, whole = [(tmp_path / name / "frequency.csv").read_bytes() for name in ("cut", "whole")]
    assert cut == whole


def test_what_cannot_be_used_is_named(inputs, tmp_path, capsys):
    command = [*flags(inputs, "five"), "--steps", "1", "--out", str(tmp_path)]
    main(command)
    for more, message in ((["--n", "7"], "has n 8, not 7; choose another --out"),
                          (["--eps", "4/255"], "has eps 8/255, not 4/255"),
                          (["--steps", "2"], "has steps 1, not 2"), (["--seed", "1"], "has seed 0, not 1")):
        with pytest.raises(InputError, match=message):
            main([*command, *more])
    with pytest.raises(InputError, match="has first .*five.pt, step 7, not .*eight.pt, step 7"):
        main([str(inputs / "eight.pt"), *command])
    with pytest.raises(InputError, match="has 8 test images, fewer than --n 9"):
        main([*flags(inputs, "five"), "--n", "9", "--out", str(tmp_path / "other")])
    saved = torch.load(inputs / "five.pt", weights_only=True)
    torch.save(saved | {"dataset": "cifar100", "state_dict": {"1.weight": torch.zeros(100, 3072)}},
               tmp_path / "hundred.pt")
    torch.save(saved | {"args": {"smoke": True}}, tmp_path / "smoke.pt")
    for name in ("hundred", "smoke"):
        with pytest.raises(InputError,
                           match=f"{name}.pt: was trained on other data or classes than .*five.pt"):
            main([str(inputs / "five.pt"), str(tmp_path / f"{name}.pt"), *command[1:]])
    for wrong, named in (("", "a checkpoint or --group"), ("a.pt --eps 8", "--eps"), ("a.pt --n 0", "--n"),
                         ("a.pt --group b.pt", "--group"), ("a.pt --nonsense", "--nonsense")):
        with pytest.raises(SystemExit, match="2"):
            parse_args(wrong.split())
        assert named in capsys.readouterr().err.splitlines()[-1]
    assert_one_line("experiments/frequency.py", [tmp_path / "nowhere.pt"], "nowhere.pt")
