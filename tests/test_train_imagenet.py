"""train_imagenet.py: what differs from train_cifar.py. What the two share word for word is tested there."""
import copy
import csv
import inspect
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import train_cifar
import train_imagenet
from eval_autoattack import load_classifier, load_images
from train_imagenet import (Data, Folder, InputError, build_model, build_optimizer, build_projector, build_run, cache_targets, load_teacher,
                            main, parse_args, split_batch, to_pixels, train_step, trades_attack)

ROOT, FIXTURES = Path(__file__).parent.parent, Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ImageNet with ten classes: 80 images for training, 30 synthetic ones, 20 for validation."""
    path = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("synthetic", 3), ("val", 2)):
        for label in range(10):
            (path / split / f"n{label}").mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([label, i, *split.encode()])
                pixels = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((48, 40 + i), Image.BILINEAR).save(path / split / f"n{label}" / f"{i}.png")
    return path


def flags(folder, *more):
    """A run that takes seconds: the smoke run's teacher, 32 px, four steps an epoch."""
    return ["--smoke", "--arch", "test_convnext", "--image-size", "32", "--workers", "0", "--batch-size", "20", "--attack-steps", "1",
            "--data", str(folder), "--synthetic", str(folder / "synthetic"), *map(str, more)]


def setting(folder, *more):
    """Arguments, data and teacher of such a run."""
    args = parse_args(flags(folder, *more))
    data = Data(args, torch.device("cpu"))
    return args, data, load_teacher(args, data)


def one_batch(data, step, teacher=None):
    return data.batch(step, next(data.load(step, step + 1)), teacher and teacher.latent_shape)


# -------------------------------------------------------------------------------------------------- the two training scripts

def test_both_scripts_have_the_same_sections_in_the_same_order():
    sections = [re.findall(r"^# -{100,}\n# (\w[\w ,]*)", Path(ROOT, f"{name}.py").read_text(), re.M) for name in ("train_cifar", "train_imagenet")]
    assert sections[0] == sections[1] and len(sections[0]) == 8


def test_what_both_scripts_need_is_the_same_code():
    """Word for word, so that the tests of the one speak for the other."""
    names = re.search(r"Word for word (?s:.*?):\n(?s:(.*?))\.\n", train_imagenet.__doc__)[1].replace("\n", " ").split(", ")
    assert len(names) >= 20
    for name in names:
        assert inspect.getsource(getattr(train_imagenet, name)) == inspect.getsource(getattr(train_cifar, name)), name


def test_defaults_are_the_papers_vit_row():
    args = parse_args(["--teacher", "a", "b", "c"])
    assert (args.arch, args.epochs, args.attack_steps, args.image_size) == ("vit_base_patch16_dinov3.lvd1689m", 100, 3, 224)
    assert (args.eps, args.step_size, args.beta, args.lr, args.weight_decay) == (4 / 255, 2 / 255, 5, 1e-5, 0.5)
    assert (args.teacher_layer, args.teacher_t, args.dra_weight, args.cache_targets) == (14, 0.9, 1, None) and not args.no_pretrained
    assert train_imagenet.ZERO_CHANNELS == (1053, 259)


# ------------------------------------------------------------------------------------------------------------------- model

@pytest.mark.parametrize("arch, width", [("vit_base_patch16_dinov3.lvd1689m", 768), ("convnext_base.dinov3_lvd1689m", 1024)])
def test_the_papers_backbones_at_full_size(arch, width):
    """86M and 88M parameters, 224 px, random weights here; features are the mean over patches, normalisation is inside."""
    model = build_model(arch, 1000, pretrained=False).eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (1, width) and model(images).shape == (1, 1000)
        torch.testing.assert_close(model.head(features), model(images))
        torch.testing.assert_close(model(images), model.backbone((images - model.mean) / model.std))
    assert 85e6 < sum(p.numel() for p in model.parameters()) < 90e6
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))


def test_vit_features_leave_the_class_and_register_tokens_out():
    model = build_model("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", 10, pretrained=False).eval()
    with torch.no_grad():
        tokens = model.backbone.forward_features((torch.rand(2, 3, 64, 64) - model.mean) / model.std)
        assert tokens.shape[1] == 5 + 16, "one class token, four registers, 4 x 4 patches"
        torch.testing.assert_close(model.backbone.forward_head(tokens, pre_logits=True), tokens[:, 5:].mean(dim=1))


def test_a_fixed_image_size_spares_the_rotary_grid_and_changes_nothing():
    """timm computes DINOv3's grid of positions on the CPU; in each forward that would stall a GPU 12 times a step."""
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            seen.append(operation.__name__)
            return operation(*args, **(kwargs or {}))
    models, images, grids = [], torch.rand(2, 3, 64, 64), []
    for size in (None, 64):
        torch.manual_seed(0)
        models.append(build_model("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", 10, False, size).eval())
        seen = []
        with torch.no_grad(), Operations():
            models[-1](images)
        grids.append(sum(name.startswith("arange") for name in seen))
    assert grids[0] > 0 and grids[1] == 0
    assert torch.equal(models[0](images), models[1](images)) and models[0].state_dict().keys() == models[1].state_dict().keys()


@pytest.mark.parametrize("arch", ["test_vit", "test_convnext"])
def test_no_layer_mixes_images_so_batches_may_be_cut_into_pieces(arch):
    """In training mode either."""
    model, images = build_model(arch, 10, pretrained=False).train(), torch.rand(4, 3, 160, 160)
    torch.testing.assert_close(model(images), torch.cat([model(images[:1]), model(images[1:])]), rtol=1e-4, atol=1e-5)


def test_models_that_cannot_be_used_are_named():
    for arch, pretrained, message in (("resnet18", False, "has batch norm"), ("nonsense", False, "timm cannot build it"),
                                      ("vit_base_patch16_dinov3.nonsense", False, "timm cannot build it"), ("test_vit", True, "pretrained weights"),
                                      ("swin_tiny_patch4_window7_224", False, "stochastic depth"), ("hf-hub:some/where", False, "timm's own")):
        with pytest.raises(InputError) as caught:
            build_model(arch, 10, pretrained)
        assert arch in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- attack, step, optimizer

def test_attack_stays_within_eps_raises_the_divergence_and_leaves_no_gradient():
    model, images = build_model("test_convnext", 10, pretrained=False), torch.rand(4, 3, 32, 32)
    start = (images + 4 / 255 * (2 * torch.rand(images.shape) - 1)).clamp(0, 1)
    adv = trades_attack(model, images, start, 4 / 255, 2 / 255, 3)
    assert (adv - images).abs().max() <= 4 / 255 + 1e-6 and 0 <= adv.min() and adv.max() <= 1 and not adv.requires_grad
    divergence = [train_imagenet.kl_divergence(model(images), model(x), "sum").item() for x in (start, adv)]
    assert divergence[1] > 2 * divergence[0]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    seen = []
    model.register_forward_hook(lambda *_: seen.append(any(p.requires_grad for p in model.parameters())))
    trades_attack(model, images, start, 4 / 255, 2 / 255, 3)
    assert seen == [False] * 4, "inside the attack every weight is frozen: no gradient of one is computed, or compiled"


def test_a_step_in_pieces_is_the_step_as_a_whole(folder):
    """Gradients of the summed pieces are those of the batch; the teacher does not change and gets no gradient."""
    args, data, teacher = setting(folder)
    batch, gradients, before = one_batch(data, 3, teacher), [], copy.deepcopy(teacher.state_dict())
    for pieces in (1, 4):
        args.accumulate = pieces
        run = build_run(args, data, teacher)
        numbers = train_step(*run[:3], teacher, run[3], batch, 0.5, args)
        gradients.append(torch.cat([p.grad.flatten() for module in (run[0], run[2]) for p in module.parameters()]))
        assert numbers.keys() == {"loss", "trades", "cosine", "train_clean", "train_robust"}
        torch.testing.assert_close(numbers["loss"], numbers["trades"] - args.dra_weight * numbers["cosine"])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_step_costs_five_passes_with_three_attack_steps_and_two_without_attack(folder):
    """One clean forward for attack and loss together, one for each attack step, one adversarial forward."""
    for more, expected in (([], 3), (["--attack-steps", "3"], 5), (["--attack-steps", "0"], 2), (["--eps", "0"], 2)):
        args, data, _ = setting(folder, "--dra-weight", "0", *more)
        run, passes = build_run(args, data, None), []
        next(m for m in run[0].modules() if isinstance(m, torch.nn.Conv2d)).register_forward_hook(lambda *_: passes.append(1))
        train_step(*run[:3], None, run[3], one_batch(data, 0), 0.5, args)
        assert len(passes) == expected, more


def test_a_batch_in_pieces_keeps_every_image_and_its_companions():
    batch = SimpleNamespace(images=torch.arange(6.0), labels=torch.arange(6), target=None)
    parts = split_batch(batch, 3)
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images) and len(parts) == 3
    assert all(torch.equal(part.images.long(), part.labels) and part.target is None for part in parts)


def test_alignment_off_needs_no_teacher_and_reports_no_cosine(folder):
    args, data, teacher = setting(folder, "--dra-weight", "0")
    run = build_run(args, data, teacher)
    assert teacher is None and len(run[2]) == 0 and "cosine" not in train_step(*run[:3], teacher, run[3], one_batch(data, 0), 0.0, args)


def test_vectors_have_no_weight_decay():
    model = build_model("test_vit", 10, pretrained=False)
    decayed, undecayed = build_optimizer(parse_args(["--dra-weight", "0"]), model, build_projector(64, 8)).param_groups
    assert decayed["weight_decay"] == 0.5 and undecayed["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim <= 1 for p in undecayed["params"])


# -------------------------------------------------------------------------------------------------------------------- data

def test_batches_depend_on_seed_and_step_only(folder):
    """Not on the steps before, and not on how many processes read the images."""
    args, data, teacher = setting(folder)
    expected = [one_batch(data, step, teacher) for step in (0, 5)]
    args.workers = 2
    loader = data.load(4, 7)
    next(loader)
    again = data.batch(5, next(loader), teacher.latent_shape)
    for name in ("images", "labels", "start", "teacher_noise"):
        assert torch.equal(getattr(again, name), getattr(expected[1], name)), name
        assert not torch.equal(getattr(expected[0], name), getattr(expected[1], name)), name


def test_ranges_and_shapes_of_a_batch(folder):
    args, data, teacher = setting(folder)
    batch = one_batch(data, 0, teacher)
    assert batch.images.shape == batch.start.shape == (20, 3, 32, 32) and batch.labels.shape == (20,) and batch.labels.dtype == torch.int64
    assert 0 <= batch.images.min() and batch.images.max() <= 1 and 0 <= batch.start.min() and batch.start.max() <= 1
    assert 3 / 255 < (batch.start - batch.images).abs().max() <= 4 / 255 + 1e-6
    assert batch.teacher_noise.shape == (20, *teacher.latent_shape) and batch.target is None


def test_processes_share_the_batch_of_one(folder):
    args, data, teacher = setting(folder)
    whole, share = one_batch(data, 2, teacher), one_batch(Data(args, torch.device("cpu"), 1, 2), 2, teacher)
    for name in ("images", "labels", "start", "teacher_noise"):
        assert torch.equal(getattr(share, name), getattr(whole, name)[1::2]), name


def test_held_out_images_come_from_everywhere_and_are_never_trained_on(folder):
    args, data, _ = setting(folder, "--dra-weight", "0")
    held = {number for *_, number in data.holdout}
    assert len(held) == 8 and len({label for _, label, _ in data.holdout}) == 8, "a tenth, one of each class or nearly so"
    drawn = torch.cat([data.draw_indices(step) for step in range(30)])
    real = drawn[drawn < 80]
    assert set(real.tolist()) == set(range(80)) - held
    assert set(drawn[drawn >= 80].tolist()) == set(range(80, 110))
    assert torch.equal(real[:72].sort().values, data.real), "a whole pass before any image comes again"
    assert data.n_real == 6 and data.steps_per_epoch == 4 and len(data.test) == 20


def test_labels_follow_the_images(folder):
    """Through both folders: the k-th class folder holds label k."""
    args, data, _ = setting(folder, "--dra-weight", "0")
    crops = train_imagenet.Centred(data.folders, range(110), 32, 37)
    for number, label, name in ((0, 0, "train/n0/0.png"), (79, 9, "train/n9/7.png"), (80, 0, "synthetic/n0/0.png"), (109, 9, "synthetic/n9/2.png")):
        expected = crops.crop(Image.open(folder / name).convert("RGB"))
        assert torch.equal(crops[number][0], to_pixels(expected)) and crops[number][1] == label


def test_every_kind_of_image_file_becomes_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    for i, mode in enumerate(("L", "RGBA", "CMYK", "P", "1")):
        Image.new(mode, (9, 7)).save(tmp_path / "a" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    folder = Folder(str(tmp_path))
    assert [folder.read(i, to_pixels).shape for i in range(len(folder))] == [(3, 7, 9)] * 5


def test_a_damaged_image_is_named_in_one_line_from_a_worker_too(folder, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "n0").mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (40, 40)).save(tmp_path / "data" / split / "n0" / f"{i:02}.png")
    (tmp_path / "data" / "train" / "n0" / "05.png").write_bytes((tmp_path / "data" / "train" / "n0" / "04.png").read_bytes()[:60])
    for workers in (0, 1):
        done = subprocess.run([sys.executable, "train_imagenet.py", "--smoke", "--arch", "test_convnext", "--data", tmp_path / "data", "--batch-size", "8",
                               "--image-size", "32", "--dra-weight", "0", "--max-steps", "3", "--workers", str(workers), "--out", tmp_path / "out"],
                              cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"error: {tmp_path / 'data' / 'train' / 'n0' / '05.png'}: cannot be read as an image")


# ---------------------------------------------------------------------------------------------------------- cached targets

@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(train_imagenet, "CACHE_CHUNK", 16)


def hostile_pickle(path):
    """A pickle that makes a folder when it is loaded the plain way."""
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(path),)
    return pickle.dumps(Hostile())


def cached(folder):
    """All targets of a cache, float16 [images, 2, width]."""
    return torch.cat([torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))])


def test_cached_targets_are_the_teachers_features_of_the_crop_and_its_mirror_image(folder, tmp_path, small_chunks):
    args, data, teacher = setting(folder, "--cache-targets", tmp_path / "cache")
    cache_targets(args, data, teacher)
    targets = cached(tmp_path / "cache")
    assert targets.shape == (110, 2, teacher.width) and targets.dtype == torch.float16
    for number in (0, 57, 109):
        image, label, _ = train_imagenet.Centred(data.folders, range(110), 32, 32)[number]
        noise = torch.randn((2, *teacher.latent_shape), generator=train_imagenet.generator(args.seed, number, "cache"))
        views = torch.stack([image, image.flip(2)]) / 255
        expected = teacher(views, torch.tensor([label, label]), args.teacher_t, noise)
        torch.testing.assert_close(targets[number].float(), expected, rtol=2e-3, atol=2e-3)
    batch = one_batch(data, 0)
    index = data.draw_indices(0)
    flipped = [torch.equal(batch.target[i], targets[index[i], 1].float()) for i in range(20)]
    upright = [torch.equal(batch.target[i], targets[index[i], 0].float()) for i in range(20)]
    assert all(a != b for a, b in zip(flipped, upright)) and 2 < sum(flipped) < 18 and batch.teacher_noise is None


def test_a_mirrored_image_gets_the_mirrored_target(folder, tmp_path):
    """Augmented images that show the whole picture (no crop) are compared with the file, to see which of them are mirrored."""
    args, data, teacher = setting(folder, "--cache-targets", tmp_path / "cache")
    cache_targets(args, data, teacher)
    targets, reader = cached(tmp_path / "cache"), train_imagenet.Augmented(data.folders, args)
    reader.crop = lambda image: image
    seen = set()
    for slot in range(12):
        pixels, _, target = reader[(0, slot, 7)]
        flip = int(torch.equal(pixels, data.folders[0].read(7, to_pixels).flip(2)))
        assert flip or torch.equal(pixels, data.folders[0].read(7, to_pixels))
        assert torch.equal(target, targets[7, flip])
        seen.add(flip)
    assert seen == {0, 1}


def test_caching_goes_on_where_it_stopped(folder, tmp_path, small_chunks, monkeypatch):
    args, data, teacher = setting(folder, "--cache-targets", tmp_path / "whole")
    cache_targets(args, data, teacher)
    args.cache_targets, calls, forward = str(tmp_path / "cache"), [], teacher.forward

    def stop_after_three(*arguments):
        if len(calls) == 6:  # two views of each chunk
            raise KeyboardInterrupt
        calls.append(len(arguments[0]))
        return forward(*arguments)
    monkeypatch.setattr(teacher, "forward", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        cache_targets(args, data, teacher)
    assert len(cached(tmp_path / "cache")) == 3 * 16
    monkeypatch.setattr(teacher, "forward", lambda *arguments: calls.append(len(arguments[0])) or forward(*arguments))
    cache_targets(args, data, teacher)
    assert calls == [16] * 12 + [14] * 2, "seven chunks, each computed once"
    assert torch.equal(cached(tmp_path / "cache"), cached(tmp_path / "whole"))
    cache_targets(args, data, teacher)
    assert len(calls) == 14, "a finished cache asks the teacher nothing"


def test_a_cache_of_other_images_or_another_teacher_is_refused(folder, tmp_path):
    args, data, teacher = setting(folder, "--cache-targets", tmp_path / "cache")
    cache_targets(args, data, teacher)
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    retouched = copy.deepcopy(teacher)
    next(retouched.parameters()).mul_(1.001)
    # A file of another name, and one of another size under the same name.
    shrunk, renamed = copy.deepcopy(data), copy.deepcopy(data)
    renamed.folders[0].names[3] = b"n0/x.png"
    shrunk.folders[0].path = str(tmp_path / "copy")
    for name in data.folders[0].names.tolist():
        target = tmp_path / "copy" / os.fsdecode(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / "train" / os.fsdecode(name)).read_bytes() + b"x" * (name == b"n4/2.png"))
    (folder / "train" / "n0" / "x.png").write_bytes((folder / "train" / "n0" / "3.png").read_bytes())
    try:
        for changed_args, changed_data, changed_teacher, what in (
                (vars(args) | {"teacher_t": 0.5}, data, teacher, "t 0.9 there, 0.5 now"), (vars(args) | {"seed": 1}, data, teacher, "seed 0 there"),
                (vars(args) | {"teacher_unconditional": True}, data, teacher, "labels True there"), (vars(args), data, retouched, "teacher "),
                (vars(args), renamed, teacher, "images "), (vars(args), shrunk, teacher, "images ")):
            with pytest.raises(InputError, match="was made from something else") as caught:
                cache_targets(SimpleNamespace(**changed_args), changed_data, changed_teacher)
            assert what in str(caught.value) and "\n" not in str(caught.value)
            assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
    finally:
        (folder / "train" / "n0" / "x.png").unlink()
    (tmp_path / "cache" / "targets.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        cache_targets(args, data, teacher)
    (tmp_path / "cache" / "targets.json").unlink()
    with pytest.raises(InputError, match="holds something else"):
        cache_targets(args, data, teacher)


def test_a_damaged_file_of_the_cache_is_named(folder, tmp_path):
    args, data, teacher = setting(folder, "--cache-targets", tmp_path / "cache")
    cache_targets(args, data, teacher)
    path = tmp_path / "cache" / "000000.pt"
    for content in (path.read_bytes()[:1000], b"", hostile_pickle(tmp_path / "was_run")):
        path.write_bytes(content)
        with pytest.raises(InputError, match="000000.pt: damaged .* remove it to compute it again"):
            train_imagenet.Augmented(data.folders, args)[(0, 0, 7)]
    assert not (tmp_path / "was_run").exists()


# ------------------------------------------------------------------------------------------------------------ the whole run

def eight_steps(folder, out, *more):
    """Saves every 2 steps, evaluates every 4."""
    return flags(folder, "--max-steps", "8", "--save-every", "0.5", "--eval-every", "1", "--out", out, *more)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """An undisturbed small run with cached targets."""
    out = tmp_path_factory.mktemp("finished")
    main(eight_steps(folder, out, "--cache-targets", out / "cache"))
    return out


def assert_same(path, other):
    """Two checkpoints hold the same tensors, bit for bit."""
    def tensors(value, name=""):
        if isinstance(value, torch.Tensor):
            return {name: value}
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
        return {key: tensor for child, part in children for key, tensor in tensors(part, f"{name}/{child}").items()}
    a, b = [torch.load(p, weights_only=True) for p in (path, other)]
    assert a["step"] == b["step"] and len(a["log"]) == len(b["log"])
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and any("exp_avg" in name for name in a) and any("projector" in name for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_continues_to_the_same_bits(finished, folder, tmp_path, workers):
    """SIGKILL after the first checkpoint, then the same command again, with the cache of the undisturbed run."""
    command = eight_steps(folder, tmp_path, "--cache-targets", finished / "cache", "--workers", workers)
    process = subprocess.Popen([sys.executable, "train_imagenet.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "2"})
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] < 8
    main(command)
    assert_same(tmp_path / "last.pt", finished / "last.pt")
    assert_same(tmp_path / "best.pt", finished / "best.pt")
    rows = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(open(out / "log.csv"))] for out in (tmp_path, finished)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == ["2", "4", "6", "8"]


def test_a_finished_run_changes_nothing_when_started_again(finished, folder):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    main(eight_steps(folder, finished, "--cache-targets", finished / "cache"))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_other_settings_or_images_on_the_same_folder_are_refused(finished, folder):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="beta 5.0 there, 6.0 now"):
        main(eight_steps(folder, finished, "--cache-targets", finished / "cache", "--beta", "6"))
    with pytest.raises(InputError, match="cached True there, False now"):
        main(eight_steps(folder, finished))
    extra = folder / "train" / "n3" / "new.png"
    extra.write_bytes((folder / "train" / "n3" / "0.png").read_bytes())
    try:
        with pytest.raises(InputError, match="images .* there, .* now"):
            main(eight_steps(folder, finished, "--cache-targets", finished / "cache2"))
    finally:
        extra.unlink()
    assert not (finished / "cache2").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_log_says_what_a_reader_needs(finished):
    rows = list(csv.DictReader(open(finished / "log.csv")))
    assert {"step", "epoch", "lr", "loss", "trades", "cosine", "train_clean", "train_robust", "holdout_clean"} <= set(rows[0])
    assert all(float(row["images_per_s"]) > 0 and -1 <= float(row["cosine"]) <= 1 for row in rows)
    assert all(bool(row["holdout_robust"]) == (row["step"] in ("4", "8")) for row in rows)


def test_checkpoint_is_plain_data_that_autoattack_takes(finished, folder):
    saved = torch.load(finished / "best.pt", weights_only=True)
    assert saved["dataset"] == "imagenet" and saved["num_classes"] == 10 and saved["arch"] == "test_convnext"
    assert not any("module." in name or "model." in name for name in saved["model_state_dict"])
    for weights, key in (("averaged", "model_state_dict"), ("raw", "unaveraged_model_state_dict")):
        model = load_classifier(finished / "best.pt", weights=weights)
        assert all(torch.equal(value, saved[key][name]) for name, value in model.state_dict().items())
    assert model.info.num_classes == 10
    images, labels = load_images(SimpleNamespace(data_dir=str(folder), image_list=None, n=None), model.info)
    assert images.shape == (20, 3, 32, 32) and labels.tolist() == [i // 2 for i in range(20)]
    # The image that the training script evaluates on is the one that AutoAttack sees.
    data = Data(parse_args(flags(folder, "--dra-weight", "0")), torch.device("cpu"))
    assert torch.equal(images, torch.stack([data.test[i][0] for i in range(20)]).float() / 255)
    with torch.no_grad():
        assert model(images).shape == (20, 10)


def test_dry_run_prints_the_plan_and_writes_nothing(folder, tmp_path, capsys):
    main(flags(folder, "--dry-run", "--out", tmp_path / "out", "--cache-targets", tmp_path / "cache", "--accumulate", "2"))
    text = capsys.readouterr().out
    for part in ("test_convnext, random weights", "10 classes", "72 real images", "8 held out", "30 synthetic", "6 real + 14 synthetic images, on 1 process(es) in 2 piece(s)",
                 "eps 4/255, 1 steps of 2/255", "block "):
        assert part in text, part
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_named_and_writes_nothing(folder, tmp_path, capsys):
    """For flags argparse's own message and exit code 2, for files an error that the command line turns into the same."""
    for name, classes in (("other", ["n0", "n2"]), ("empty", [])):
        for split in ("train", "val"):
            (tmp_path / name / split).mkdir(parents=True)
            for label in classes:
                (tmp_path / name / split / label).mkdir()
                Image.new("RGB", (40, 40)).save(tmp_path / name / split / label / "a.png")
    (tmp_path / "file").write_text("x")
    fixtures = [str(FIXTURES / f"dit_tiny_{name}.pt") for name in ("dit", "vae", "latents_stats")]
    cases = [
        (["--data", "/nowhere"], "/nowhere/train: expected a folder"), (["--data", str(tmp_path / "empty")], "empty/train: expected a folder"),
        (["--data", str(tmp_path / "other"), "--synthetic", str(tmp_path / "other" / "train")], "has 2 training images, expected at least 10"),
        (["--synthetic", str(tmp_path / "other" / "train")], "has 2 class folders, expected the 10 of train/ (differs in n1)"),
        (["--synthetic", "/nowhere"], "/nowhere: expected"), (["--arch", "nonsense"], "--arch nonsense"), (["--arch", "resnet18"], "has batch norm"),
        (["--arch", "vit_tiny_patch16_224"], "--image-size 32: vit_tiny_patch16_224 does not take it"), (["--batch-size", "21", "--accumulate", "2"], "expected a multiple of 2"),
        (["--batch-size", "2000"], "has 600 real images, expected at most the 72"), (["--out", str(tmp_path / "file")], "file"),
        (["--out", str(tmp_path / "file" / "x")], "Not a directory"),
        (["--teacher", *fixtures], "--teacher "), (["--teacher", *fixtures[::-1]], "expected a LightningDiT checkpoint, this is latent statistics"),
        (["--teacher", "/nowhere.pt", *fixtures[1:]], "/nowhere.pt"), (["--teacher", fixtures[0]], "expected 3 arguments"),
        (["--teacher-t", "1.5"], "--teacher-t 1.5"), (["--teacher-t", "0"], "above 0"), (["--eps", "8/0"], "--eps"), (["--lr", "nan"], "--lr"),
        (["--workers", "-1"], "at least 0"), (["--image-size", "8"], "at least 32"), (["--accumulate", "0"], "above 0"), (["--epochs", "1.5"], "invalid int value"),
        (["--optimizer", "sgd"], "unrecognized arguments"), (["--device", "tpu"], "invalid choice"), (["--synthetic-fraction", "1"], "--synthetic-fraction 1.0: expected at least 0 and below 1"),
    ]
    for more, message in cases:
        with pytest.raises((InputError, OSError, SystemExit)) as caught:
            main(flags(folder, "--max-steps", "1", "--out", tmp_path / "out", *more))
        said = capsys.readouterr().err.splitlines()[-1] if isinstance(caught.value, SystemExit) else str(caught.value)
        assert message in said and "\n" not in said, (more, said)
        assert not isinstance(caught.value, SystemExit) or caught.value.code == 2
    for arguments, message in ((["--data", str(folder)], "--dra-weight 0 for plain adversarial training"),
                               (["--dra-weight", "0", "--synthetic-fraction", "0.5"], "expected --synthetic DIR with it")):
        with pytest.raises(SystemExit):
            parse_args(arguments)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_classes_is_refused_unless_it_is_not_told_the_label(folder, tmp_path, monkeypatch):
    """The tiny LightningDiT knows ten classes; the folder is cut down to nine."""
    for name, value in (("ZERO_CHANNELS", (5, 21)), ("TEACHER_HEADS", 2), ("TEACHER_SIZE", 64)):
        monkeypatch.setattr(train_imagenet, name, value)
    files = [str(FIXTURES / f"dit_tiny_{name}.pt") for name in ("dit", "vae", "latents_stats")]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for label in range(9):
            (tmp_path / split / f"n{label}").symlink_to(folder / split / f"n{label}")
    assert setting(folder, "--teacher", *files, "--teacher-layer", "2")[2].width == 32
    nine = ["--teacher", *files, "--teacher-layer", "2", "--data", tmp_path, "--synthetic", tmp_path / "train"]
    with pytest.raises(InputError, match="knows 10 classes, expected 9 .*--teacher-unconditional"):
        setting(folder, *nine)
    args, data, teacher = setting(folder, *nine, "--teacher-unconditional")
    run = build_run(args, data, teacher)
    assert train_step(*run[:3], teacher, run[3], one_batch(data, 0, teacher), 0.0, args)["loss"].isfinite()


def test_a_damaged_or_hostile_checkpoint_is_named_and_left_alone(folder, tmp_path):
    for content in (b"", hostile_pickle(tmp_path / "was_run"), json.dumps({}).encode()):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"last\.pt: damaged, or no checkpoint"):
            main(eight_steps(folder, tmp_path, "--dra-weight", "0"))
        assert (tmp_path / "last.pt").read_bytes() == content and not (tmp_path / "was_run").exists()
