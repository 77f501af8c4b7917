"""experiments/large_channels.py: channels that were made large are found, with intervals, and a stopped run
continues."""
import csv

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import DIT, FIXTURES, STATS, VAE
import large_channels
from dit_encoder import InputError, load_dit_encoder
from large_channels import choose_images, compare_channels, main, measure, parse_args
from train_imagenet import generator



@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags: a network two of whose channels were made large, and seven images of several sizes in class
    folders."""
    folder = tmp_path_factory.mktemp("inputs")
    content = torch.load(DIT, weights_only=True)
    content["ema"]["pos_embed"][..., [7, 21]] += torch.tensor([100.0, 50.0])
    torch.save(content, folder / "dit.pt")
    with np.load(FIXTURES / "dit_tiny_reference.npz") as file:
        images = file["image_uint8"]
    for i in range(7):
        path = folder / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(images[i % 3], i).transpose(1, 2, 0)).resize((80 + i, 70)).save(path)
    (folder / "images" / "notes.txt").write_text("no image")
    return [str(folder / "dit.pt"), str(VAE), str(STATS), "--data-dir", str(folder / "images"), "--device",
            "cpu", "--n", "6"]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_channels_that_were_made_large_are_found(inputs, tmp_path, capsys):
    main([*inputs, "--teacher-layer", "2", "--out", str(tmp_path)])
    rows = read(tmp_path / "large_channels.csv")
    assert [row["channel"] for row in rows[:2]] == ["7", "21"] and len(rows) == 10
    assert float(rows[0]["ratio"]) > 80 > float(rows[1]["ratio"]) > 40 > 5 > float(rows[2]["ratio"])
    assert float(rows[0]["share"]) == float(rows[1]["share"]) == 1
    for row in rows:
        for name in ("rms", "ratio", "share"):
            assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
        settings = {"dit": "dit.pt", "data_dir": "images", "n": "6", "layer": "2", "t": "0.9", "seed": "0"}
        assert row.items() >= settings.items() and row["labels"] == "none"
    assert "channel    7: " in capsys.readouterr().out
    with Image.open(tmp_path / "large_channels.png") as image:
        assert image.width > 500


def test_sizes_are_root_mean_squares_over_tokens(inputs):
    """And an image's do not depend on the batch that it is in."""
    encoder = load_dit_encoder(*inputs[:3], 2, (), None, None)
    paths = choose_images(inputs[4], 6, seed=0)
    sizes = measure(encoder, paths, 0.9, 0, "cpu")
    assert sizes.shape == (6, 32) and sizes.dtype == np.float32
    width = 64 * (80 + int(paths[4].stem)) // 70
    pixels = np.array(Image.open(paths[4]).resize((width, 64), Image.BILINEAR))
    left = round((width - 64) / 2)
    image = torch.from_numpy(pixels[:, left:left + 64]).permute(2, 0, 1)[None] / 255
    noise = torch.randn((1, *encoder.latent_shape), generator=generator(0, 4, "noise"))
    hidden, _ = encoder.activations(image, None, 0.9, noise)
    np.testing.assert_allclose(sizes[4], (hidden[0] ** 2).mean(dim=0).sqrt(), rtol=1e-3)


def test_statistics_have_known_values():
    """Channel c has size c + 1 in every image, but for one channel that is large in every second image
    only."""
    sizes = np.tile(np.arange(1.0, 22.0), (100, 1))  # the median channel has size 11
    sizes[::2, 3] = 404
    rows = compare_channels(sizes)
    assert [row["channel"] for row in rows] == ["3", *map(str, range(20, 11, -1))]
    first, second = rows[:2]
    assert float(first["rms"]) == 204 and float(first["share"]) == 0.5
    assert 0.35 < float(first["share_low"]) < 0.45
    assert 0.55 < float(first["share_high"]) < 0.65, "0.5 +- 1.96 sqrt(0.25 / 100)"
    assert second["rms"] == second["rms_low"] == second["rms_high"] == "21" and float(second["share"]) == 1
    assert float(second["ratio"]) == pytest.approx(21 / 12), "with channel 3 far up, the median is 12"
    assert all(float(row["share"]) == 1 for row in rows[1:]), (
        "channel 11, which makes room for channel 3, is not listed")


def test_a_stopped_run_continues_and_what_is_there_stays(inputs, tmp_path, monkeypatch):
    flags = [*inputs, "--teacher-layer", "0", "1", "--teacher-t", "1"]
    main([*flags, "--out", str(tmp_path / "whole")])
    calls = []

    def measure_once(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments)
        return measure(*arguments)
    monkeypatch.setattr(large_channels, "measure", measure_once)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, "--out", str(tmp_path / "cut")])
    assert len(read(tmp_path / "cut" / "large_channels.csv")) == 10
    calls.clear()
    main([*flags, "--out", str(tmp_path / "cut")])
    assert len(calls) == 1
    cut, whole = [(tmp_path / name / "large_channels.csv").read_bytes() for name in ("cut", "whole")]
    assert cut == whole
    monkeypatch.setattr(large_channels, "measure", lambda *_: pytest.fail("all settings are there"))
    (tmp_path / "cut" / "large_channels.png").unlink()
    main([*flags, "--out", str(tmp_path / "cut")])
    assert (tmp_path / "cut" / "large_channels.png").exists()


def test_what_cannot_be_used_is_named(inputs, tmp_path, capsys):
    main([*inputs, "--teacher-layer", "0", "--out", str(tmp_path)])
    before = (tmp_path / "large_channels.csv").read_bytes()
    flags = [*inputs, "--out", str(tmp_path)]
    for more, message in ((["--n", "5"], "has n 6, not 5; choose another --out"),
                          (["--data-dir", str(FIXTURES)], "has data_dir images, not fixtures"),
                          (["--teacher-layer", "3"], "has 3 blocks, expected layer 3 to be one of 0 to 2")):
        with pytest.raises(InputError, match=message):
            main([*flags, *more])
    with pytest.raises(InputError, match="has dit dit.pt, not dit_tiny_dit.pt"):
        main([str(DIT), *flags[1:]])
    assert (tmp_path / "large_channels.csv").read_bytes() == before
    with pytest.raises(InputError, match="images: has 7 images, fewer than --n 8"):
        main([*inputs, "--n", "8", "--out", str(tmp_path / "other")])
    with pytest.raises(OSError, match="nowhere"):
        main([*inputs, "--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")])
    for more in (["--teacher-t", "1.5"], ["--teacher-layer", "-1"], ["--n", "0"], ["--nonsense", "1"]):
        with pytest.raises(SystemExit, match="2"):
            parse_args([*flags, *more])
        assert more[0] in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        parse_args([str(DIT), "--data-dir", str(tmp_path)])
    assert "required: vae, stats" in capsys.readouterr().err


def test_help_is_shown(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_args(["--help"])
    assert "--teacher-layer" in capsys.readouterr().out
