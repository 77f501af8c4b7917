"""experiments/show_attack.py: the figure says what the networks say, about images that stay within eps."""
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT, FIXTURES = Path(__file__).parent.parent, Path(__file__).parent / "fixtures"
sys.path.insert(0, str(ROOT / "experiments"))
import show_attack as script
import train_cifar
from eval_autoattack import load_classifier
from show_attack import attack, class_name, draw_images, main, parse_args, read_files

LINEAR = """from torch.nn import *
build_model = lambda _, classes, dataset: Sequential(Flatten(), Linear(3072, classes))"""
EPS, TICK, CROSS, COLORS = 8 / 255, "\u2713", "\u2717", {"\u2713": "#1a7f37", "\u2717": "#cf222e"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder: 12 test images, own images, DM-AT's network, the same a little changed, two of other data."""
    folder = tmp_path_factory.mktemp("inputs")
    images, labels = train_cifar.draw_smoke_images(12, 0)
    np.savez(folder / "test.npz", image=images, label=labels)
    state = torch.load(FIXTURES / "dmat_wrn_10_1_cifar10.pt", weights_only=True)["model_state_dict"]
    about = {"arch": "wrn-10-1", "dataset": "cifar10", "step": 7}
    for name, change in (("at", 0), ("dra", 0.05)):
        changed = {key: value + change * value.abs() if value.is_floating_point() else value
                   for key, value in state.items()}
        torch.save(about | {"model_state_dict": changed}, folder / f"{name}.pt")
    torch.save(about | {"model_state_dict": state, "args": {"smoke": True}}, folder / "smoke.pt")
    three = train_cifar.build_model("wrn-10-1", 3, "npz").state_dict()
    about |= {"dataset": "npz", "num_classes": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    torch.save(about | {"model_state_dict": three}, folder / "three.pt")
    for name, image in zip(("b.PNG", "a.png", "c_that_has_a_long_name_number_3.png"), images):
        (folder / "own").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / "own" / name)
    (folder / "own" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def draw(inputs, monkeypatch, tmp_path):
    """A function: names of checkpoints and flags -> the figure that `main` draws, a part for each network."""
    figures = []

    class Spy(script.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)
    monkeypatch.setattr(script, "Figure", Spy)

    def run(names, *flags):
        files = [str(inputs / f"{name}.pt") for name in names]
        where = ["--data-dir", str(inputs), "--device", "cpu", "--out", str(tmp_path / "a.png")]
        main([*files, *where, "--steps", "5", *flags])
        return figures[-1]
    return run


def read(part):
    """A network's part of the figure -> its title, the rows' texts, the columns' titles, pictures
    [n, 3, 3, H, W], and matplotlib's texts below the first two, [n][2]."""
    axes = np.array(part.axes).reshape(-1, 3)
    assert not any(axis.get_xlabel() for axis in axes[:, 2])
    pictures = [torch.from_numpy(np.asarray(axis.images[0].get_array())) for axis in axes.flat]
    pictures = torch.stack(pictures).permute(0, 3, 1, 2).unflatten(0, axes.shape)
    rows, heads = [axis.get_ylabel() for axis in axes[:, 0]], [axis.get_title() for axis in axes[0]]
    below = [[axis.xaxis.label for axis in row[:2]] for row in axes]
    return part._suptitle.get_text(), rows, heads, pictures, below


def raises_the_loss(model, x, adv, y):
    """Whether each of x' [n, 3, H, W] has a larger cross-entropy than its image x."""
    before, after = [F.cross_entropy(model(images), y, reduction="none") for images in (x, adv)]
    return (after > before).all()


def say(model, x, sign):
    """What should stand below image x [3, H, W]. sign: function of the class."""
    probability, number = model(x[None])[0].softmax(dim=0).max(dim=0)
    return f"{sign(number)} {class_name(model.info, number)} {100 * probability:.0f} %"


def test_what_is_shown_equals_what_the_network_says_and_the_attack_stays_within_eps(draw, inputs, capsys):
    """On all test images, so that ticks and crosses are both there."""
    with np.load(inputs / "test.npz") as file:
        test, labels = torch.from_numpy(file["image"]).permute(0, 3, 1, 2) / 255, file["label"]
    figure = draw(["at", "dra"], "--n", "12")
    assert "PGD-5 within eps = 8/255" in figure._suptitle.get_text() and len(figure.subfigs) == 2
    shown, printed = [], capsys.readouterr().out.splitlines()
    for name, part, line in zip(("at", "dra"), figure.subfigs, printed):
        model = load_classifier(inputs / f"{name}.pt")
        title, rows, heads, pictures, below = read(part)
        index = [(test == x).flatten(1).all(dim=1).nonzero().item() for x in pictures[:, 0]]
        assert len(set(index)) == 12 and rows == [script.CIFAR10[label] for label in labels[index]]
        x, adv, difference = pictures.unbind(dim=1)
        for label, images, texts in zip(labels[index], pictures, below):
            sign = lambda number: TICK if number == label else CROSS
            assert [text.get_text() for text in texts] == [say(model, image, sign) for image in images[:2]]
            assert all(text.get_color() == COLORS[text.get_text()[0]] for text in texts)
        ticks = [[text.get_text()[0] == TICK for text in texts] for texts in below]
        assert 0 < np.sum(ticks) < 24  # or the figure could have one sign for all
        clean, attacked = np.sum(ticks, axis=0)
        verdict = f"right: {clean} of 12 clean, {attacked} of 12 attacked"
        assert title.endswith(f"/{name}.pt\n{verdict}") and line.endswith(verdict)
        assert ((adv - x).abs() <= EPS + 1e-6).all() and (adv >= 0).all() and (adv <= 1).all()
        assert raises_the_loss(model, x, adv, torch.from_numpy(labels[index]))
        assert heads == ["clean", "attacked", "difference \u00d7 10"]
        torch.testing.assert_close(difference, 0.5 + 10 * (adv - x))
        shown.append((index, adv))
    assert shown[0][0] == shown[1][0]  # the same images, and each network's own x'
    assert not torch.equal(shown[0][1], shown[1][1])


@pytest.mark.parametrize("eps, factor", [("4/255", 20), ("16/255", 5), ("0.9", 1)])
def test_the_amplification_is_said_whatever_eps(draw, eps, factor):
    _, _, heads, pictures, _ = read(draw(["at"], "--eps", eps, "--n", "2").subfigs[0])
    x, adv, difference = pictures.unbind(dim=1)
    assert heads[2] == f"difference \u00d7 {factor}"
    assert (adv - x).abs().max() == pytest.approx(eval(eps), abs=1e-6)
    torch.testing.assert_close(difference, (0.5 + factor * (adv - x)).clamp(0, 1))


def test_ones_own_images_are_attacked_against_the_class_that_each_network_predicts(draw, inputs):
    figure = draw(["at", "dra"], "--images", str(inputs / "own"))
    assert "\u2713 kept, \u2717 changed" in figure._suptitle.get_text()
    for name, part in zip(("at", "dra"), figure.subfigs):
        model = load_classifier(inputs / f"{name}.pt")
        title, rows, _, pictures, below = read(part)
        assert rows == ["a", "b", "ong_name_number_3"[-16:]]
        for row, file in zip(pictures, ("a.png", "b.PNG", "c_that_has_a_long_name_number_3.png")):
            pixels = torch.from_numpy(np.array(Image.open(inputs / "own" / file))).permute(2, 0, 1) / 255
            torch.testing.assert_close(row[0], pixels)
        x, adv, _ = pictures.unbind(dim=1)
        y = model(x).argmax(dim=1)
        assert raises_the_loss(model, x, adv, y)
        for i, texts in enumerate(below):
            kept = lambda number: TICK if number == y[i] else CROSS
            expected = [say(model, x[i], lambda _: ""), say(model, adv[i], kept)]
            assert [text.get_text() for text in texts] == expected and texts[0].get_color() == "black"
        assert title.endswith(f"\nkept: {int((model(adv).argmax(dim=1) == y).sum())} of 3 attacked")


def test_the_seed_chooses_images_and_the_start_and_two_equal_networks_get_the_same(draw, inputs):
    first, second, other = [[read(part)[3] for part in draw(["at", "at"], "--n", "2", "--seed", seed).subfigs]
                            for seed in "001"]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], second[0]) and len(first[0]) == 2
    assert not torch.equal(first[0][:, 0], other[0][:, 0])
    model, images = load_classifier(inputs / "at.pt"), first[0][:, 0]
    flags = ["x", "--eps", "8/255", "--steps", "1", "--device", "cpu", "--seed"]
    assert not torch.equal(*[attack(model, images, None, parse_args([*flags, seed]))[0] for seed in "01"])


def test_a_network_that_is_sure_is_attacked_all_the_same(tmp_path):
    """A logit of 25 falls along a known direction, the others are 0: in float32 its softmax is 1."""
    (tmp_path / "linear.py").write_text(LINEAR)
    weight, bias = torch.zeros(10, 3072), 25 * torch.eye(10)[4]
    weight[4] = 0.01 * torch.randn(3072, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "sure.pt"
    about = {"arch": "linear", "dataset": "cifar10"}
    torch.save(about | {"state_dict": {"1.weight": weight, "1.bias": bias}}, file)
    model, x = load_classifier(file, script=tmp_path / "linear.py"), torch.full((2, 3, 32, 32), 0.5)
    args = parse_args(["x", "--eps", "8/255", "--device", "cpu"])
    adv, predicted, probability, right = attack(model, x, torch.tensor([4, 4]), args)
    assert (probability[0] == 1).all() and right.all() and (predicted == 4).all()
    torch.testing.assert_close(adv - x, (-EPS * weight[4].sign()).reshape(1, 3, 32, 32).expand(2, -1, -1, -1))


def test_classes_have_names_where_they_are_cifars(draw):
    assert read(draw(["smoke"], "--n", "1").subfigs[0])[1][0].startswith("class ")
    info = lambda dataset: SimpleNamespace(dataset=dataset, args={})
    assert [class_name(info("cifar10"), torch.tensor(number)) for number in (0, 3)] == ["airplane", "cat"]
    assert class_name(info("cifar100"), torch.tensor(3)) == "class 3"


def test_a_name_may_stand_before_a_file_and_without_one_the_end_of_the_path_does(tmp_path):
    (tmp_path / "lambda=1").mkdir()
    (tmp_path / "lambda=1" / "best.pt").touch()
    there = str(tmp_path / "lambda=1" / "best.pt")
    assert parse_args(["AT+DRA=a/b=c.pt", there, "runs/dra/last.pt"]).checkpoints == [
        ("AT+DRA", "a/b=c.pt"), ("lambda=1/best.pt", there), ("dra/last.pt", "runs/dra/last.pt")]


def test_two_networks_and_five_images_are_a_small_png_as_wide_as_a_readme(draw, inputs, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)  # the worst for a PNG
    np.savez(tmp_path / "test.npz", image=noise, label=np.arange(12) % 10)
    out = tmp_path / "new" / "figure.png"
    draw(["at", "dra"], "--data-dir", str(tmp_path), "--out", str(out))
    with Image.open(out) as image:
        assert image.format == "PNG" and image.size == (900, 875)
        pixels = np.array(image.convert("RGB"))
    assert out.stat().st_size < 200_000 and pixels.std() > 30
    assert [file.name for file in out.parent.iterdir()] == ["figure.png"]


def test_what_users_get_wrong_is_one_line_that_names_it(inputs, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "large").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "large" / "photo.jpg")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "z.png").write_bytes(b"no image")
    at, own = str(inputs / "at.pt"), str(inputs / "own")
    for flags, message in (
            ([at, str(inputs / "three.pt")], "expected checkpoints of the same data"),
            ([at, str(inputs / "smoke.pt")], "expected checkpoints of the same data"),
            ([at, "--images", str(tmp_path / "empty")], "empty: has 0 PNG or JPEG files"),
            ([at, "--images", str(tmp_path / "damaged")], "z.png"),
            ([at, "--images", str(tmp_path / "large")], "photo.jpg: is 64 x 48 px, expected 32 x 32"),
            ([at, "--images", str(tmp_path / "nowhere")], "nowhere"),
            ([at, "--images", own, "--n", "4"], "own: has 3 PNG or JPEG files, expected 4"),
            ([at, "--n", "13"], "has 12 test images, fewer than --n 13"),
            (["nowhere.pt"], "nowhere.pt"),
            ([at, "--eps", "8"], "--eps")):
        where = ["--data-dir", str(inputs), "--device", "cpu", "--out", str(tmp_path / "a.png")]
        monkeypatch.setattr(sys, "argv", ["x", *flags, *where])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(ROOT / "experiments" / "show_attack.py"), run_name="__main__")
        *usage, line = capsys.readouterr().err.splitlines()
        assert message in line and "error: " in line and (not usage or usage[0].startswith("usage"))
    assert not (tmp_path / "a.png").exists()


def test_imagenets_images_are_the_first_of_the_list_and_ones_own_have_the_networks_size(tmp_path):
    names = [f"n0{k}/{i}.png" for k in (1, 2) for i in (0, 1)]
    for grey, name in enumerate(names):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (60 * grey,) * 3).save(tmp_path / "val" / name)
    (tmp_path / "list.txt").write_text("n02/1.png\nn01/0.png\nn01/1.png\n")
    info = SimpleNamespace(dataset="imagenet", num_classes=2, args={"image_size": 64})
    flags = ["x", "--data-dir", str(tmp_path), "--image-list", str(tmp_path / "list.txt"), "--n", "2"]
    images, labels, rows = draw_images(parse_args(flags), info)
    assert images.shape == (2, 3, 64, 64)
    shown = {round(255 * image.mean().item()): (int(label), row)
             for image, label, row in zip(images, labels, rows)}
    assert shown == {180: (1, "class 1"), 0: (0, "class 0")}
    images, labels, rows = read_files(parse_args(["x", "--images", str(tmp_path / "val" / "n01")]), info)
    assert images.shape == (2, 3, 64, 64) and labels is None and rows == ["0", "1"]
