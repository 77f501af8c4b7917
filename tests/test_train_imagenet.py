"""What train_imagenet.py promises beyond train_cifar.py, in the order of the tests below. What both scripts
share is the same code, which the first tests check, and is tested in test_train_cifar.py.

    model            timm's backbones; features leave class and register tokens out; no layer mixes images
    step             attack and losses of train_cifar.py, in pieces with the same result; Lion and its rate
    data             image files, cropped as a function of (seed, step, place); some are never trained on
    cached targets   the teacher's features of centre crop and mirror image, continued after a kill
    a run            killed at any moment, it continues to the same bits; its checkpoints are plain data that
                     eval_autoattack.py takes; nothing that is not finite is saved
    processes        torchrun on two gives what one gives
    full size        shapes, precisions and no waiting for the device, on the paper's backbones; compilation
    mistakes         one line that names the flag or file, exit code 2; no file gets to run code
"""
import ast
import copy
import csv
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import (CPU, DIT, DMAT, HTML, LFS, PAGE, POINTER, RANK, STATS, VAE, WORLD, Killed, all_finite,
                     assert_full_size_step, assert_identical_weights, assert_never_run, assert_one_line,
                     assert_same_gradient, assert_shares, compare, contents, die_in_step, hostile_pickles,
                     load, log_rows, run, start, take_step, three_steps, torchrun, write_program)
import train_cifar
import train_imagenet
from dit_encoder import DiTEncoder, LightningDiT, VAEEncoder
from eval_autoattack import load_classifier, load_images
from train_imagenet import (RESIZE, Augmented, Centred, Data, Folder, InputError, build_model,
                            build_optimizer, build_projector, build_run, build_scheduler, cache_targets,
                            draw_smoke_folders, load_teacher, main, parse_args, to_pixels, train_step,
                            trades_attack)

TINY_DIT = [str(path) for path in (DIT, VAE, STATS)]


def make_smaller():
    """Most of a short run would be the attack on the held-out images."""
    train_imagenet.PROJECTOR_WIDTH, train_imagenet.SELECTION_STEPS = 32, 4


@pytest.fixture(scope="module", autouse=True)
def smaller():
    with mock.patch.multiple(train_imagenet, PROJECTOR_WIDTH=0, SELECTION_STEPS=0):
        make_smaller()
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ImageNet with ten classes: 80 images for training, 30 synthetic ones, 20 for validation."""
    path = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("synthetic", 3), ("val", 2)):
        for label in range(10):
            (path / split / f"n{label}").mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([label, i, *split.encode()])
                image = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
                image.resize((48, 40 + i), Image.BILINEAR).save(path / split / f"n{label}" / f"{i}.png")
    return path


def flags(folder, *more):
    """A run that takes seconds: the smoke run's teacher, 32 px, four steps an epoch."""
    return ["--smoke", "--arch", "test_convnext", "--image-size", "32", "--batch-size", "20",
            "--workers", "0", "--attack-steps", "1", "--data", str(folder), "--synthetic",
            str(folder / "synthetic"), *map(str, more)]


def setting(folder, *more):
    """Arguments, data and teacher of such a run."""
    args = parse_args(flags(folder, *more))
    data = Data(args, CPU)
    return args, data, load_teacher(args, data) if args.dra_weight > 0 else None


def one_batch(args, step, teacher=None, rank=0, world=1):
    """The batch of a run that begins, or goes on, at this step."""
    data = Data(args, CPU, rank, world)
    data.latent_shape = teacher.latent_shape if teacher else None
    return data.batch(step)


# ---------------------------------------------------------------------------------- the two training scripts

def test_both_scripts_have_the_same_sections_in_the_same_order():
    scripts = [Path(module.__file__).read_text() for module in (train_cifar, train_imagenet)]
    sections = [re.findall(r"^# -{100,}\n# (\w[\w ,]*)", script, re.M) for script in scripts]
    assert sections[0] == sections[1] and len(sections[0]) == 8
    assert [len(re.findall("^# -{9,}", script, re.M)) for script in scripts] == [8, 8], "no other rule lines"


# What is in both scripts under the same name and yet not the same code, each with its reason.
MAY_DIFFER = {
    "SMOKE": "other networks, other rates",
    "parse_args": "other flags",
    "Classifier.features": "timm's backbone in place of `penultimate`",
    "build_model": "timm's models in place of a WRN and a ViT for 32 px",
    "split_batch": "on CIFAR a batch has a list of noise levels",
    "print_plan": "on CIFAR with warnings of runs that are too short",
    "trades_attack": "on CIFAR the attack must not update BatchNorm's running statistics",
    "train_step": "cached targets, one projector; on CIFAR BatchNorm, clipping, up to two noise levels",
    "build_optimizer": "Lion alone",
    "build_scheduler": "by step; on CIFAR DM-AT's, by epoch, and Wu et al.'s",
    "generator": "draws of a single image have two positions: its step and its place in the batch",
    "Data.__init__": "image folders; held-out images are spread over all classes",
    "Data.draw": "workers need each image's place in the whole batch, so the share is taken after",
    "Data.batch": "worker processes read ahead; the teacher's noise has the shape of its latents",
    "Data.holdout_batches": "as Data.batch",
    "load_teacher": "LightningDiT in place of EDM",
    "build_run": "pretrained weights, the image size, at most one projector",
    "train": "the scheduler's step is per step, and there is no BatchNorm whose momentum changes",
    "main": "the smoke run's images are files, and targets may be computed first",
}


def definitions(module):
    """Functions, methods and constants of a script by name, as text without docstrings and comments."""
    tree = ast.parse(Path(module.__file__).read_text())
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None
        node.body = node.body[1:] or [ast.Pass()] if documented else getattr(node, "body", None)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.dump(node)
        if isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.dump(node.value)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{part.name}": ast.dump(part) for part in methods}
    return found


def test_what_both_scripts_do_is_the_same_code():
    """So the tests of the one speak for the other. MAY_DIFFER stays true, too: what is in it does differ."""
    cifar, imagenet = definitions(train_cifar), definitions(train_imagenet)
    shared = [name for name in cifar if name in imagenet]
    assert {name for name in shared if cifar[name] != imagenet[name]} == MAY_DIFFER.keys()
    same = set(shared) - MAY_DIFFER.keys()
    assert len(same) >= 35 and {"pgd", "trades_loss", "evaluate", "save", "resume", "positive"} <= same


def test_random_draws_by_one_position_are_those_of_train_cifar():
    """`generator` takes several positions here; what both scripts draw for a step or a pass is the same."""
    scripts = (train_cifar, train_imagenet)
    draws = [torch.rand(5, generator=script.generator(3, 7, "pass")) for script in scripts]
    assert torch.equal(*draws)
    other = torch.rand(5, generator=train_imagenet.generator(3, (7, 0), "pass"))
    assert not torch.equal(draws[0], other)


def test_defaults_are_the_papers_vit_row():
    args = parse_args(["--teacher", "a", "b", "c"])
    assert (args.arch, args.no_pretrained) == ("vit_base_patch16_dinov3.lvd1689m", False)
    assert (args.epochs, args.attack_steps, args.image_size, args.batch_size) == (100, 3, 224, 1024)
    assert (args.eps, args.step_size, args.beta) == (4 / 255, 2 / 255, 5)
    assert (args.lr, args.weight_decay, args.save_minutes) == (1e-5, 0.5, 5)
    assert (args.teacher_layer, args.teacher_t, args.dra_weight, args.cache_targets) == (14, 0.9, 1, None)
    assert train_imagenet.ZERO_CHANNELS == (1053, 259)


# ----------------------------------------------------------------------------------------------------- model

def test_features_and_head_are_the_backbone_with_the_normalisation_inside():
    arch, images = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", torch.rand(2, 3, 64, 64)
    model = build_model(arch, 10, pretrained=False).eval()
    with torch.no_grad():
        assert model(images).shape == (2, 10)
        torch.testing.assert_close(model.head(model.features(images)), model(images))
        torch.testing.assert_close(model(images), model.backbone((images - model.mean) / model.std))
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))


def test_vit_features_leave_the_class_and_register_tokens_out():
    model = build_model("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", 10, pretrained=False).eval()
    with torch.no_grad():
        tokens = model.backbone.forward_features((torch.rand(2, 3, 64, 64) - model.mean) / model.std)
        assert tokens.shape[1] == 5 + 16, "one class token, four registers, 4 x 4 patches"
        features = model.backbone.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(features, tokens[:, 5:].mean(dim=1))


def test_a_fixed_image_size_spares_the_rotary_grid_and_changes_nothing():
    """timm computes DINOv3's grid of positions on the CPU; in each forward that would stall a GPU 12 times a
    step."""
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
    assert torch.equal(models[0](images), models[1](images))
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


@pytest.mark.parametrize("arch", ["test_vit", "test_convnext"])
def test_no_layer_mixes_images_so_batches_may_be_cut_into_pieces(arch):
    """In training mode either."""
    model, images = build_model(arch, 10, pretrained=False).train(), torch.rand(4, 3, 160, 160)
    pieces = torch.cat([model(images[:1]), model(images[1:])])
    torch.testing.assert_close(model(images), pieces, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch, message", [("resnet18", "has BatchNorm"), ("nonsense", "no such model"),
                                           ("hf-hub:some/where", "no such model")])
def test_models_that_cannot_be_used_are_named(arch, message):
    with pytest.raises(InputError) as caught:
        build_model(arch, 10, pretrained=False)
    assert arch in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------ attack, step, optimizer, schedule

def test_attack_stays_within_eps_raises_the_divergence_and_leaves_no_gradient():
    model, images = build_model("test_convnext", 10, pretrained=False), torch.rand(4, 3, 32, 32)
    start, trained = (images + 4 / 255 * (2 * torch.rand(images.shape) - 1)).clamp(0, 1), []
    look = lambda *_: trained.append(any(p.requires_grad for p in model.parameters()))
    hook = model.register_forward_hook(look)
    adv = trades_attack(model, images, start, 4 / 255, 2 / 255, 3)
    hook.remove()
    assert trained == [False] * 4, "every weight is frozen: no gradient of one is computed, or compiled"
    assert (adv - images).abs().max() <= 4 / 255 + 1e-6 and 0 <= adv.min() and adv.max() <= 1
    assert not adv.requires_grad and all(p.requires_grad and p.grad is None for p in model.parameters())
    divergence = [train_imagenet.kl_divergence(model(images), model(x), "sum").item() for x in (start, adv)]
    assert divergence[1] > 2 * divergence[0]


@pytest.mark.parametrize("cached", [False, True])
def test_a_step_in_pieces_is_the_step_as_a_whole(folder, cached):
    """Loss, accuracies and gradient of --accumulate 4 are those of the whole batch, with a teacher or with
    cached targets. The teacher does not change and gets no gradient."""
    args, data, teacher = setting(folder)
    before, width = copy.deepcopy(teacher.state_dict()), teacher.width
    batch, results, gradients = one_batch(args, 3, teacher), [], []
    if cached:
        batch.target, batch.teacher_noise = torch.randn(20, width), None
    for args.accumulate in (1, 4):
        run = build_run(args, data, teacher)
        results.append(take_step(train_imagenet, run, None if cached else teacher, batch, args))
        modules = (run.model, run.projectors)
        gradients.append(torch.cat([p.grad.flatten() for module in modules for p in module.parameters()]))
        numbers = results[-1]
        assert list(numbers) == ["loss", "trades", "cosine", "train_clean", "train_robust"]
        torch.testing.assert_close(numbers["loss"], numbers["trades"] - args.dra_weight * numbers["cosine"])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(results[0], results[1])
    assert gradients[0].abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("unconditional", [False, True])
def test_the_teacher_gets_the_clean_images_with_label_time_and_noise(folder, unconditional):
    """Piece by piece, what the batch holds; with --teacher-unconditional no label."""
    args, data, _ = setting(folder, *["--teacher-unconditional"][:unconditional], "--accumulate", "2")
    teacher, given = Teacher(), []
    batch = one_batch(args, 0, teacher)
    record = lambda *inputs: given.append(inputs) or teacher(*inputs)
    take_step(train_imagenet, build_run(args, data, teacher), record, batch, args)
    images, labels, times, noise = zip(*given)
    for k in range(2):
        assert torch.equal(images[k], batch.images[k::2]) and torch.equal(noise[k], batch.teacher_noise[k::2])
        assert times[k] == 0.9
        assert labels[k] is None if unconditional else torch.equal(labels[k], batch.labels[k::2])


@pytest.mark.parametrize("more, expected", [([], 3), (["--attack-steps", "3"], 5),
                                            (["--attack-steps", "0"], 2), (["--eps", "0"], 2)])
def test_a_step_costs_five_passes_with_three_attack_steps_and_two_without_attack(folder, more, expected):
    """One clean forward for attack and loss together, one for each attack step, one adversarial forward."""
    args, data, _ = setting(folder, "--dra-weight", "0", *more)
    run, passes = build_run(args, data), []
    first = next(module for module in run.model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda *_: passes.append(1))
    take_step(train_imagenet, run, None, one_batch(args, 0), args)
    assert len(passes) == expected


def test_alignment_off_needs_no_teacher_and_reports_no_cosine(folder):
    args, data, _ = setting(folder, "--dra-weight", "0", "--cache-targets", "/nowhere")
    assert args.cache_targets is None and args.teacher is None
    run = build_run(args, data)
    assert len(run.projectors) == 0 and "cosine" not in take_step(train_imagenet, run, None,
                                                                  one_batch(args, 0), args)


def test_vectors_have_no_weight_decay():
    model = build_model("test_vit", 10, pretrained=False)
    optimizer = build_optimizer(parse_args(["--dra-weight", "0"]), model, build_projector(64, 8))
    decayed, undecayed = optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and undecayed["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim <= 1 for p in undecayed["params"])


@pytest.mark.parametrize("total, per_epoch, rise, first", [
    (1, 4, 1, [2]), (2, 4, 1, [2, 1]), (3, 4, 1, [2, 1.5, 0.5]), (20, 4, 2, [1, 2]), (20, 1, 1, [2]),
    (100, 4, 4, [0.5, 1, 1.5, 2]), (100, 1000, 10, [0.2, 0.4])])
def test_the_rate_rises_over_an_epoch_or_a_tenth_and_falls_along_half_a_cosine(total, per_epoch, rise, first):
    """The peak is 2. It is reached after an epoch, or a tenth of the steps, at least in the first step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, rates = build_scheduler(optimizer, total, per_epoch), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:len(first)] == pytest.approx(first)
    assert rates[rise - 1] == 2 and optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    # From the peak to zero in equal angles: the middle of the fall is half of the peak.
    angles = [np.arccos(rate - 1) for rate in [*rates[rise - 1:], 0]]
    assert np.diff(angles) == pytest.approx(np.pi / (total - rise + 1))


def test_the_log_has_the_rate_just_used(folder, tmp_path, monkeypatch):
    used = []

    def recording(model, averaged, projectors, teacher, optimizer, *rest):
        used.append(optimizer.param_groups[0]["lr"])
        return train_step(model, averaged, projectors, teacher, optimizer, *rest)
    monkeypatch.setattr(train_imagenet, "train_step", recording)
    monkeypatch.setattr(train_imagenet, "LOG_EVERY", 1)
    main(flags(folder, "--dra-weight", "0", "--attack-steps", "0", "--max-steps", 20, "--eval-every", "9",
               "--out", tmp_path))
    rows = log_rows(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert [float(row["epoch"]) for row in rows] == [step / 4 for step in range(1, 21)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(used, rel=1e-5)
    assert max(used) == 4e-3 == used[1], "the smoke run's peak"


# ------------------------------------------------------------------------------------------------------ data

def test_batches_depend_on_seed_and_step_only(folder):
    """Not on the steps before, and not on how many processes read the images."""
    args, data, teacher = setting(folder)
    expected = [one_batch(args, step, teacher) for step in (0, 5)]
    args.workers = 2
    data.latent_shape = teacher.latent_shape
    data.batch(4)
    again = data.batch(5)
    args.workers, args.seed, data.coming = 0, 1, None  # ends the worker processes
    reseeded = one_batch(args, 5, teacher)
    for name in ("images", "labels", "start", "teacher_noise"):
        assert torch.equal(getattr(again, name), getattr(expected[1], name)), name
        assert not torch.equal(getattr(expected[0], name), getattr(expected[1], name)), name
        assert not torch.equal(getattr(reseeded, name), getattr(expected[1], name)), name


def test_the_same_image_is_cropped_anew_at_each_step_and_place(folder):
    """The crop depends on seed, step and place alone, whatever was read before, and it touches no global
    generator."""
    args, data, _ = setting(folder, "--dra-weight", "0")
    reader = Augmented(data.folders, args)
    first, other_step, other_place = [reader[key][0] for key in ((0, 3, 7), (1, 3, 7), (0, 4, 7))]
    assert not torch.equal(first, other_step) and not torch.equal(first, other_place)
    before = torch.get_rng_state()
    assert torch.equal(reader[(0, 3, 7)][0], first) and torch.equal(torch.get_rng_state(), before)
    args.seed = 1
    assert not torch.equal(Augmented(data.folders, args)[(0, 3, 7)][0], first)


def test_ranges_and_shapes_of_a_batch(folder):
    args, data, teacher = setting(folder)
    batch = one_batch(args, 0, teacher)
    assert batch.images.shape == batch.start.shape == (20, 3, 32, 32)
    assert batch.labels.shape == (20,) and batch.labels.dtype == torch.int64
    assert 0 <= batch.images.min() and batch.images.max() <= 1
    assert 0 <= batch.start.min() and batch.start.max() <= 1
    assert 3 / 255 < (batch.start - batch.images).abs().max() <= 4 / 255 + 1e-6
    assert batch.teacher_noise.shape == (20, *teacher.latent_shape) and batch.target is None


def test_processes_share_the_batch_of_one(folder):
    args, data, teacher = setting(folder)
    whole, share = one_batch(args, 2, teacher), one_batch(args, 2, teacher, rank=1, world=2)
    for name in ("images", "labels", "start", "teacher_noise"):
        assert torch.equal(getattr(share, name), getattr(whole, name)[1::2]), name


def test_held_out_images_come_from_everywhere_and_are_never_trained_on(folder, monkeypatch):
    args, data, _ = setting(folder, "--dra-weight", "0")
    held = set(data.holdout.tolist())
    assert len(held) == data.n_holdout == 8, "a tenth"
    assert len(set(data.folders[0].labels[data.holdout])) == 8, "no two of one class, as there are ten"
    drawn = torch.cat([data.draw(step) for step in range(30)])
    real = drawn[drawn < 80]
    assert set(real.tolist()) == set(range(80)) - held
    assert set(drawn[drawn >= 80].tolist()) == set(range(80, 110))
    assert torch.equal(real[:72].sort().values, data.real), "a whole pass before any image comes again"
    assert not torch.equal(real[:72], real[72:144]), "and each pass in an order of its own"
    assert (data.n_real, data.n_synthetic, data.batch_real, data.batch_synthetic) == (72, 30, 6, 14)
    args.batch_size = 8
    assert Data(args, CPU).steps_per_epoch == 10, "counted with the held-out images"
    monkeypatch.setattr(train_imagenet, "HOLDOUT", 3)
    assert Data(args, CPU).holdout.tolist() == [0, 39, 79]


def test_processes_share_the_held_out_images(folder):
    """Each image once, centred, and with the same start of the attack as in a single process."""
    args, data, _ = setting(folder, "--dra-weight", "0")
    (images, labels, start), = data.holdout_batches()
    assert labels.tolist() == data.folders[0].labels[data.holdout].tolist()
    assert 3 / 255 < (start - images).abs().max() <= 4 / 255 + 1e-6 and 0 <= start.min() and start.max() <= 1
    centred = Centred(data.folders, 32, round(32 * RESIZE))
    assert torch.equal(images, torch.stack([centred[number][0] for number in data.holdout]) / 255)
    for rank in range(3):
        args.batch_size = 21
        share, = Data(args, CPU, rank, 3).holdout_batches()
        for part, whole in zip(share, (images, labels, start)):
            assert torch.equal(part, whole[rank::3])


def test_labels_follow_the_images(folder):
    """Through both folders: the k-th class folder holds label k."""
    args, data, _ = setting(folder, "--dra-weight", "0")
    crops = Centred(data.folders, 32, 37)
    for number, label, name in ((0, 0, "train/n0/0.png"), (79, 9, "train/n9/7.png"),
                                (80, 0, "synthetic/n0/0.png"), (109, 9, "synthetic/n9/2.png")):
        expected = to_pixels(crops.crop(Image.open(folder / name).convert("RGB")))
        pixels, found, its_number = crops[number]
        assert torch.equal(pixels, expected) and (found, its_number) == (label, number)


def test_every_kind_of_image_file_becomes_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    for i, mode in enumerate(("L", "RGBA", "CMYK", "P", "1")):
        Image.new(mode, (9, 7)).save(tmp_path / "a" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    folder = Folder(str(tmp_path))
    assert [folder.read(i, to_pixels).shape for i in range(len(folder))] == [(3, 7, 9)] * 5


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("broken", [0, 5])
def test_a_damaged_image_is_named_in_one_line_from_a_worker_too(tmp_path, workers, broken):
    """Image 0 is held out, so the evaluation reads it; the others are for training."""
    (tmp_path / "data" / "train" / "n0").mkdir(parents=True)
    paths = [tmp_path / "data" / "train" / "n0" / f"{i:02}.png" for i in range(12)]
    for path in paths:
        Image.new("RGB", (40, 40)).save(path)
    paths[broken].write_bytes(paths[broken].read_bytes()[:60])
    command = ["--smoke", "--arch", "test_convnext", "--data", tmp_path / "data", "--batch-size", "8",
               "--image-size", "32", "--dra-weight", "0", "--attack-steps", "1", "--max-steps", "3",
               "--workers", workers, "--out", tmp_path / "out"]
    assert_one_line("train_imagenet.py", command, f"error: {paths[broken]}: cannot be read as an image")


# -------------------------------------------------------------------------------------------- cached targets

class Teacher:
    """A teacher by the contract in `load_teacher`, whose features can be told: brightness of the left and the
    right half of the image, label, t, mean and size of the noise. None of them is 0."""

    width, latent_shape, image_size, num_classes = 6, (1, 2, 2), 16, 10

    def __init__(self, fails_after=10**9):
        self.images, self.fails_after = 0, fails_after

    def __call__(self, images, labels, t, noise):
        if self.images >= self.fails_after:
            raise KeyboardInterrupt
        self.images += len(images)
        halves = [1 + half.double().mean(dim=(1, 2, 3)) for half in images.chunk(2, dim=3)]
        label = 1.0 + labels.double() if labels is not None else torch.full_like(halves[0], 0.5)
        noise = noise.double().flatten(1)
        time, mean, size = torch.full_like(label, t), 9 + noise.mean(dim=1), noise.norm(dim=1)
        return torch.stack([halves[0], label, time, mean, size, halves[1]], dim=1).float()


def cached(folder):
    """All targets of a cache, float16 [images, 2, width]."""
    return np.load(Path(folder) / "targets.npy")


def test_cached_targets_are_the_teachers_features_of_the_crop_and_its_mirror_image(folder, tmp_path):
    """One float16 array. Each step's batch holds the row of the image, and of its mirror image where it is
    flipped; no teacher is asked."""
    args, data, teacher = setting(folder, "--cache-targets", tmp_path / "cache")
    cache_targets(args, data, teacher)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["targets.json", "targets.npy"]
    targets = cached(tmp_path / "cache")
    assert targets.shape == (110, 2, teacher.width) and targets.dtype == np.float16
    for number in (0, 57, 109):
        image, label, _ = Centred(data.folders, 32, 32)[number]
        random = train_imagenet.generator(args.seed, number, "cache")
        noise = torch.randn((2, *teacher.latent_shape), generator=random)
        views = torch.stack([image, image.flip(2)]) / 255
        expected = teacher(views, torch.tensor([label, label]), args.teacher_t, noise)
        torch.testing.assert_close(torch.from_numpy(targets[number]).float(), expected, rtol=2e-3, atol=2e-3)
    batch, index = one_batch(args, 0), data.draw(0)
    assert batch.target.dtype == torch.float32 and batch.teacher_noise is None
    flipped = [np.array_equal(batch.target[i], targets[index[i], 1]) for i in range(20)]
    upright = [np.array_equal(batch.target[i], targets[index[i], 0]) for i in range(20)]
    assert all(a != b for a, b in zip(flipped, upright)) and 2 < sum(flipped) < 18


def test_cached_targets_tell_left_from_right_the_label_and_the_noise(folder, tmp_path):
    args, data, _ = setting(folder, "--cache-targets", tmp_path / "cache")
    cache_targets(args, data, Teacher())
    targets = cached(tmp_path / "cache").astype(float)
    assert targets[:, 0, [0, 5]] == pytest.approx(targets[:, 1, [5, 0]])
    assert abs(targets[:, 0, 0] - targets[:, 1, 0]).max() > 0.1
    labels = np.concatenate([part.labels for part in data.folders])
    assert (targets[:, :, 1] == 1 + labels[:, None]).all() and (targets[:, :, 2] == np.float16(0.9)).all()
    noise = targets[:, :, 3:5].reshape(220, 2)
    assert len(np.unique(noise, axis=0)) > 200, "each image and each view has noise of its own"
    args.teacher_unconditional, args.cache_targets = True, str(tmp_path / "unconditional")
    cache_targets(args, data, Teacher())
    assert (cached(tmp_path / "unconditional")[:, :, 1] == 0.5).all()


def test_a_mirrored_image_gets_the_mirrored_target(folder, tmp_path):
    """Images that show the whole picture (no crop) are compared with the file, to see which are mirrored."""
    args, data, _ = setting(folder, "--cache-targets", tmp_path / "cache")
    cache_targets(args, data, Teacher())
    targets, reader = cached(tmp_path / "cache"), Augmented(data.folders, args)
    reader.crop = lambda image: image
    upright, seen = data.folders[0].read(7, to_pixels), set()
    for place in range(12):
        pixels, _, target = reader[(0, place, 7)]
        flip = int(torch.equal(pixels, upright.flip(2)))
        assert flip or torch.equal(pixels, upright)
        assert np.array_equal(target, targets[7, flip])
        seen.add(flip)
    assert seen == {0, 1}


def test_caching_goes_on_where_it_stopped(folder, tmp_path):
    """64 images at a time, two views each; the kill comes after the first 64."""
    args, data, _ = setting(folder, "--cache-targets", tmp_path / "whole")
    cache_targets(args, data, Teacher())
    args.cache_targets = str(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        cache_targets(args, data, Teacher(fails_after=128))
    assert np.flatnonzero(cached(args.cache_targets).any(axis=(1, 2))).tolist() == list(range(64))
    teacher = Teacher()
    cache_targets(args, data, teacher)
    assert teacher.images == 2 * (110 - 64)
    assert np.array_equal(cached(args.cache_targets), cached(tmp_path / "whole"))
    cache_targets(args, data, teacher)
    assert teacher.images == 2 * (110 - 64), "a finished cache asks the teacher nothing"


def test_empty_and_torn_rows_are_computed_and_no_others(folder, tmp_path):
    """A kill can leave the end of a row unwritten, a lost page any end of either view. 65 rows, so that the
    second batch is a single image."""
    args, data, _ = setting(folder, "--cache-targets", tmp_path)
    cache_targets(args, data, Teacher())
    expected = cached(tmp_path)
    file = np.load(tmp_path / "targets.npy", mmap_mode="r+")
    file[:61] = 0
    for place in ((61, 0, slice(0, 2)), (62, 0, -1), (63, 1), (109, 1, slice(3, None))):
        file[place] = 0
    file[80] = expected[80] = 7  # to be seen again, so that this row was left alone
    file.flush()
    teacher = Teacher()
    cache_targets(args, data, teacher)
    assert teacher.images == 2 * 65
    assert np.array_equal(cached(tmp_path), expected)


def test_several_processes_write_disjoint_rows_of_the_same_file(folder, tmp_path, monkeypatch):
    """Threads stand in for processes. They take up a cache that a single process began."""
    args, data, _ = setting(folder, "--cache-targets", tmp_path / "one")
    cache_targets(args, data, Teacher())
    args.cache_targets = str(tmp_path / "two")
    with pytest.raises(KeyboardInterrupt):
        cache_targets(args, data, Teacher(fails_after=128))
    meeting, teachers, thread = threading.Barrier(2, timeout=60), [Teacher(), Teacher()], threading.local()

    def barrier():
        meeting.wait()
        time.sleep(0.3 * thread.rank)  # the second is late: what it finds must not depend on that

    def work(rank):
        thread.rank = rank
        cache_targets(args, Data(args, CPU, rank, 2), teachers[rank])
    monkeypatch.setattr(train_imagenet, "barrier", barrier)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert [teacher.images for teacher in teachers] == [46, 46], "half of the 46 rows each, with two views"
    for name in ("targets.npy", "targets.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_cache_of_other_settings_is_refused_naming_the_first(folder, tmp_path):
    args, data, _ = setting(folder, "--cache-targets", tmp_path)
    cache_targets(args, data, Teacher())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    train = Path(args.data).name
    more = SimpleNamespace(rank=0, ends=[81, 111])
    for changes, now, message in (
            ({"teacher": ["a/dit.pt", "b/vae.pt", "c/s.pt"]}, data, "teacher None, not dit.pt, vae.pt, s.pt"),
            ({"teacher_layer": 0, "seed": 4}, data, "teacher_layer 1, not 0"),
            ({"seed": 4, "teacher_t": 0.5}, data, "teacher_t 0.9, not 0.5"),
            ({"teacher_unconditional": True}, data, "teacher_unconditional False, not True"),
            ({"data": "other"}, data, f"data {train}, not other"),
            ({"synthetic": None}, data, "synthetic synthetic, not None"),
            ({"seed": 4}, data, "seed 0, not 4"),
            ({}, more, "images 110, not 111")):
        with pytest.raises(InputError) as caught:
            cache_targets(SimpleNamespace(**vars(args) | changes), now, Teacher())
        assert str(caught.value) == f"{tmp_path}: was made with {message}"
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    teacher, moved = Teacher(), {"data": f"/mnt/{train}", "synthetic": "/mnt/synthetic", "beta": 1.0}
    cache_targets(SimpleNamespace(**vars(args) | moved), data, teacher)
    assert teacher.images == 0, "folders may move, and settings of the training do not matter"
    (tmp_path / "targets.json").unlink()
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        cache_targets(args, data, Teacher())
    assert (tmp_path / "targets.npy").read_bytes() == before[tmp_path / "targets.npy"]


@pytest.mark.parametrize("kind", ["empty", "cut in its header", "a pickle", "a page", "an npz",
                                  "of another width", "of other images", "of another type"])
def test_a_torn_file_of_targets_or_one_of_another_kind_is_named(folder, tmp_path, kind):
    """In one line, before the teacher is asked; nothing in it is run, and it is left as it is."""
    args, data, _ = setting(folder, "--cache-targets", tmp_path / "cache")
    cache_targets(args, data, Teacher())
    path, scratch = tmp_path / "cache" / "targets.npy", tmp_path / "scratch"
    whole, hostile = path.read_bytes(), hostile_pickles(tmp_path / "was_run")["os.mkdir"]
    shape, dtype = {"of another width": ((110, 2, 7), "f2"), "of other images": ((109, 2, 6), "f2"),
                    "of another type": ((110, 2, 6), "f4")}.get(kind, ((1,), "f2"))
    with open(scratch, "wb") as file:
        np.savez(file, targets=np.load(path)) if kind == "an npz" else np.save(file, np.ones(shape, dtype))
    path.write_bytes({"empty": b"", "cut in its header": whole[:50], "a page": HTML,
                      "a pickle": hostile}.get(kind, scratch.read_bytes()))
    before, teacher = contents(tmp_path), Teacher()
    with pytest.raises(InputError, match=f"^{path}") as caught:
        cache_targets(args, data, teacher)
    assert "\n" not in str(caught.value) and contents(tmp_path) == before and teacher.images == 0


def test_a_file_of_targets_that_was_cut_short_is_completed(folder, tmp_path):
    """As an interrupted copy leaves it. What is missing is never taken for a target."""
    args, data, _ = setting(folder, "--cache-targets", tmp_path)
    cache_targets(args, data, Teacher())
    whole = (tmp_path / "targets.npy").read_bytes()
    (tmp_path / "targets.npy").write_bytes(whole[:1001])
    cache_targets(args, data, Teacher())
    assert (tmp_path / "targets.npy").read_bytes() == whole


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_settings_of_a_cache_are_named(folder, tmp_path, content):
    args, data, _ = setting(folder, "--cache-targets", tmp_path)
    cache_targets(args, data, Teacher())
    (tmp_path / "targets.json").write_text(content)
    with pytest.raises(InputError, match=f"^{tmp_path}") as caught:
        cache_targets(args, data, Teacher())
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- the whole run

def eight_steps(folder, out, *more):
    """Two epochs, each with an evaluation and a row of the log."""
    return flags(folder, "--max-steps", "8", "--eval-every", "1", "--out", out, *more)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """An undisturbed small run with cached targets. It is over before the clock makes it save."""
    out = tmp_path_factory.mktemp("finished")
    main(eight_steps(folder, out, "--cache-targets", out / "cache"))
    return out


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bits(finished, folder, tmp_path):
    """SIGKILL as soon as a step is saved, then the same command, with the cache of the undisturbed run. The
    worker processes outlive the kill by a few seconds, and hold the folder's lock for so long."""
    command = eight_steps(folder, tmp_path, "--cache-targets", finished / "cache", "--workers", 2,
                          "--save-minutes", "0")
    program = write_program(tmp_path / "run.py", "train_imagenet", PROJECTOR_WIDTH=32, SELECTION_STEPS=4)
    process = start(program, command)
    while not (tmp_path / "last.pt").exists() or load(tmp_path / "last.pt")["step"] == 0:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert 1 <= load(tmp_path / "last.pt")["step"] < 8
    main(command)
    assert compare(finished, tmp_path) == []


@pytest.mark.parametrize("stop", [0, 6])
def test_a_run_that_ends_at_any_step_continues_to_the_same_bits(finished, folder, tmp_path, monkeypatch,
                                                                stop):
    """Before the first step, and within the second epoch, between two rows of the log."""
    command = eight_steps(folder, tmp_path, "--cache-targets", finished / "cache", "--save-minutes", "0")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, train_imagenet, stop + 1)
        main(command)
    saved = load(tmp_path / "last.pt")
    assert saved["step"] == stop and len(saved["recent"]) == stop % 4
    main(command)
    assert compare(finished, tmp_path) == [] and [row["step"] for row in log_rows(tmp_path)] == ["4", "8"]


def test_the_clock_says_when_to_save(folder, tmp_path, monkeypatch):
    """Before the first step and after the last in any case; with --save-minutes 0 after every step."""
    saved, save = [], train_imagenet.save
    monkeypatch.setattr(train_imagenet, "save", lambda *what: saved.append(what[2].step) or save(*what))
    for minutes, expected in (("5", [0, 4]), ("0", [0, 1, 2, 3, 4])):
        saved.clear()
        main(flags(folder, "--dra-weight", "0", "--max-steps", "4", "--save-minutes", minutes, "--out",
                   tmp_path / minutes))
        assert saved == expected


@pytest.mark.parametrize("what, named", [("a loss", r"step 3: not finite: \{'loss': nan, 'trades': nan, "),
                                         ("a weight", "step 3: a weight is not finite")])
def test_what_is_not_finite_stops_the_run_with_its_step_and_is_never_saved(
        finished, folder, tmp_path, monkeypatch, what, named):
    """Without the NaN the same command goes on behind the second step."""
    command = eight_steps(folder, tmp_path, "--cache-targets", finished / "cache", "--save-minutes", "0")
    done = []

    def breaking(model, *rest):
        done.append(1)
        weight = next(model.parameters()).data
        weight[...] = torch.nan if len(done) == 3 and what == "a loss" else weight
        numbers = train_step(model, *rest)
        weight[...] = torch.nan if len(done) == 3 and what == "a weight" else weight
        return numbers
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match=f"^{named}"):
        patch.setattr(train_imagenet, "train_step", breaking)
        main(command)
    saved = load(tmp_path / "last.pt")
    assert saved["step"] == 2 and all_finite(saved) and not (tmp_path / "best.pt").exists()
    main(command)
    assert compare(finished, tmp_path) == []


@pytest.mark.slow
def test_a_finished_run_changes_nothing_when_started_again(finished, folder, tmp_path, monkeypatch):
    """Its checkpoints are written once more, with the same content."""
    shutil.copytree(finished, tmp_path / "again")
    monkeypatch.setattr(train_imagenet, "train_step", None)
    main(eight_steps(folder, tmp_path / "again", "--cache-targets", finished / "cache"))
    before, after = contents(finished), contents(tmp_path / "again")
    assert compare(finished, tmp_path / "again") == [] and before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if not name.endswith(".pt"))


def test_a_second_run_in_the_same_folder_is_refused(finished, folder, tmp_path, monkeypatch):
    acquire = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", lambda self, timeout: acquire(self, timeout=0))  # do not wait
    with acquire(FileLock(tmp_path / "lock")), pytest.raises(InputError,
                                                             match=f"^{tmp_path}: another run is at work"):
        main(eight_steps(folder, tmp_path, "--cache-targets", finished / "cache"))
    assert contents(tmp_path) == {}


def test_other_settings_or_images_on_the_same_folder_are_refused(finished, folder, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    said = f"^{re.escape(str(finished / 'last.pt'))}: is of a run with "
    with pytest.raises(InputError, match=f"{said}beta 5.0, not 6.0; change --out"):
        main(eight_steps(folder, finished, "--cache-targets", finished / "cache", "--beta", "6"))
    with pytest.raises(InputError, match=f"{said}cache_targets cache, not None"):
        main(eight_steps(folder, finished))
    extra = folder / "train" / "n3" / "new.png"
    extra.write_bytes((folder / "train" / "n3" / "0.png").read_bytes())
    try:
        with pytest.raises(InputError, match=f"{said}images 80, 30, not 81, 30"):
            main(eight_steps(folder, finished, "--cache-targets", tmp_path / "cache"))
    finally:
        extra.unlink()
    assert {path: path.read_bytes() for path in before} == before


def test_another_recipe_is_refused_before_any_target_is_computed_for_it(finished, folder, tmp_path):
    """Caching ImageNet takes hours: whoever has to change --out wants to know it first."""
    with pytest.raises(InputError, match="is of a run with beta 5.0, not 6.0"):
        main(eight_steps(folder, finished, "--cache-targets", tmp_path / "cache", "--beta", "6"))
    assert not (tmp_path / "cache").exists()


def test_log_says_what_a_reader_needs(finished, folder, tmp_path, monkeypatch):
    rows = list(csv.DictReader(open(finished / "log.csv")))
    assert list(rows[0]) == ["step", "epoch", "lr", "loss", "trades", "cosine", "train_clean", "train_robust",
                             "images_per_s", "holdout_clean", "holdout_robust"]
    assert all(float(row["images_per_s"]) > 0 and -1 <= float(row["cosine"]) <= 1 for row in rows)
    assert all(0 <= float(row["holdout_robust"]) <= float(row["holdout_clean"]) <= 100 for row in rows)
    # Rows between evaluations have no accuracy on held-out images.
    monkeypatch.setattr(train_imagenet, "LOG_EVERY", 3)
    monkeypatch.setattr(train_imagenet, "SELECTION_STEPS", 1)
    main(flags(folder, "--dra-weight", "0", "--max-steps", "7", "--eval-every", "1.5", "--out", tmp_path))
    rows = [(row["step"], bool(row["holdout_robust"])) for row in log_rows(tmp_path)]
    assert rows == [("3", False), ("4", False), ("6", True), ("7", True)]


def test_checkpoint_is_plain_data_that_autoattack_takes(finished, folder):
    last, best = [torch.load(finished / name, weights_only=True) for name in ("last.pt", "best.pt")]
    for saved in (last, best):
        assert (saved["dataset"], saved["num_classes"], saved["arch"]) == ("imagenet", 10, "test_convnext")
        assert saved["classes"] == [f"n{label}" for label in range(10)]
        assert not any("module." in name or "model." in name for name in saved["model_state_dict"])
    assert "optimizer" not in best and "unaveraged_model_state_dict" not in best
    scores = [float(row["holdout_robust"]) for row in log_rows(finished)]
    assert best["step"] == (8 if scores[1] >= scores[0] else 4)
    assert best["score"] == pytest.approx(max(scores))
    for path, saved, weights, key in ((finished / "best.pt", best, "averaged", "model_state_dict"),
                                      (finished / "last.pt", last, "averaged", "model_state_dict"),
                                      (finished / "last.pt", last, "raw", "unaveraged_model_state_dict")):
        model = load_classifier(path, weights=weights)
        assert all(torch.equal(value, saved[key][name]) for name, value in model.state_dict().items())
    assert model.info.num_classes == 10
    images, labels = load_images(SimpleNamespace(data_dir=str(folder), image_list=None, n=None), model.info)
    assert images.shape == (20, 3, 32, 32) and labels.tolist() == [i // 2 for i in range(20)]
    # The training script evaluates on images as AutoAttack sees them.
    centred = Centred([Folder(str(folder / "val"))], 32, round(32 * RESIZE))
    assert torch.equal(images, torch.stack([centred[i][0] for i in range(20)]).float() / 255)
    with torch.no_grad():
        assert model(images).shape == (20, 10)


def test_dry_run_prints_the_plan_and_writes_nothing(folder, tmp_path, capsys):
    main(flags(folder, "--dry-run", "--out", tmp_path / "out", "--cache-targets", tmp_path / "cache"))
    text = capsys.readouterr().out
    for part in ("test_convnext in float32", "features of DiTEncoder",
                 "72 real, 30 synthetic and 8 held-out images", "24 steps = 6 epochs",
                 "6 real + 14 synthetic images"):
        assert part in text, part
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- two processes

def compute(folder):
    """What each process has, into FOLDER/WORLD_RANK.pt, and a cache of targets that they fill together.
    FOLDER holds images/ as from `draw_smoke_folders`."""
    args = parse_args(["--smoke", "--image-size", "32", "--batch-size", "16", "--workers", "0", "--data",
                       str(folder / "images"), "--synthetic", str(folder / "images" / "synthetic")])
    data = Data(args, CPU, RANK, WORLD)
    teacher = load_teacher(args, data)
    data.latent_shape = teacher.latent_shape
    found, _ = three_steps(train_imagenet, args, data, teacher)
    args.cache_targets = str(folder / f"cache of {WORLD}")
    cache_targets(args, data, teacher)
    torch.save(found, folder / f"{WORLD}_{RANK}.pt")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """The same batches, held-out images, losses and gradients, identical weights, and one cache of targets.
    torchrun starts this very file, see its end."""
    draw_smoke_folders(tmp_path / "images", 0)
    compute(tmp_path)
    done = torchrun(__file__, tmp_path)
    assert done.returncode == 0, done.stderr
    one, *two = [torch.load(tmp_path / name, weights_only=False) for name in ("1_0.pt", "2_0.pt", "2_1.pt")]
    assert_shares(one, two, n_holdout=40)
    assert_same_gradient(one, two)
    assert_identical_weights(two)
    caches = [cached(tmp_path / f"cache of {world}") for world in (1, 2)]
    assert caches[0].shape == caches[1].shape == (600, 2, 64) and (caches[0] != 0).any(axis=2).all()
    np.testing.assert_allclose(*[cache.astype(float) for cache in caches], rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------------------- full size, and compilation

@pytest.mark.parametrize("arch, width, parameters, share", [
    ("vit_base_patch16_dinov3.lvd1689m", 768, 86.4e6, 0.65),
    pytest.param("convnext_base.dinov3_lvd1689m", 1024, 88.6e6, 0.65, marks=pytest.mark.slow)])
def test_a_step_at_full_size_has_the_right_shapes_and_types_and_never_waits(arch, width, parameters, share):
    """The paper's backbones with a teacher of LightningDiT-XL/1's and VA-VAE's sizes, without the memory.
    What autograd keeps of the activations is bfloat16, but for the inputs of layer norms; logits and losses
    are float32. No value is asked for, and nothing is made on the host."""
    args = parse_args(["--arch", arch, "--teacher", "x", "x", "x", "--amp", "--device", "cpu", "--batch-size",
                       "128", "--attack-steps", "1"])

    def build():
        levels = [(128, 2, False), (128, 2, False), (256, 2, False), (256, 2, False), (512, 2, True)]
        dit = LightningDiT(1152, 16, 3072, 32, 1, 256, 1001, args.teacher_layer)
        teacher = DiTEncoder(VAEEncoder(128, levels, latent_channels=32), dit, image_size=256)
        teacher.checked = True  # the first batch, as there is nothing to look at
        networks = [build_model(arch, 1000, False, args.image_size) for _ in range(2)]
        assert sum(p.numel() for p in networks[0].parameters()) == pytest.approx(parameters, rel=0.01)
        x, labels = torch.zeros(128, 3, 224, 224), torch.zeros(128, dtype=torch.long)
        batch = SimpleNamespace(images=x, labels=labels, start=x, target=None,
                                teacher_noise=torch.zeros(128, *teacher.latent_shape))
        return *networks, nn.ModuleList([build_projector(width, teacher.width)]), teacher, batch
    kept = assert_full_size_step(train_imagenet, args, build, classes=1000)
    assert kept[torch.bfloat16] > share * kept.total(), kept


@pytest.mark.slow
def test_steps_with_the_teacher_compile_once_and_agree_with_plain_ones(folder, monkeypatch):
    """As on CUDA, but through a backend that runs the captured graphs with plain kernels. (With Inductor:
    test_train_cifar.py.)"""
    args, data, teacher = setting(folder, "--batch-size", "10", "--attack-steps", "2", "--arch", "test_vit")
    data.latent_shape, compiler = teacher.latent_shape, torch.compile
    batches, losses, graphs = [data.batch(step) for step in range(3)], [], []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiler(function, dynamic=dynamic,
                                                                             backend="aot_eager"))
    for device in ("cpu", "cuda"):  # compile_parts looks at nothing else
        torch._dynamo.reset()
        trained, settings = build_run(args, data, teacher), SimpleNamespace(**vars(args) | {"device": device})
        train_imagenet.compile_parts(settings, trained.model, teacher)
        for batch in batches:
            losses.append(take_step(train_imagenet, trained, teacher, batch, args)["loss"])
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert trained.model.state_dict().keys() == trained.averaged.state_dict().keys()
    torch._dynamo.reset()
    torch.testing.assert_close(losses[3], losses[0], rtol=1e-3, atol=1e-4)
    assert graphs[2] < graphs[3] == graphs[4] == graphs[5], graphs


def test_bfloat16_moves_the_first_steps_loss_by_less_than_a_percent(folder):
    losses = []
    for more in ([], ["--amp"]):
        args, data, teacher = setting(folder, "--attack-steps", "2", *more)
        numbers = take_step(train_imagenet, build_run(args, data, teacher), teacher,
                            one_batch(args, 0, teacher), args)
        assert all(value.dtype == torch.float32 for value in numbers.values())
        losses.append(numbers["trades"].item())
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)


# ------------------------------------------------------------------------------------------------- mistakes

@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Folders and files that users have by mistake."""
    path = tmp_path_factory.mktemp("wrong")
    for name, classes in (("other", ["n0", "n2"]), ("empty", [])):
        (path / name / "train").mkdir(parents=True)
        for label in classes:
            (path / name / "train" / label).mkdir()
            Image.new("RGB", (40, 40)).save(path / name / "train" / label / "a.png")
    (path / "hollow" / "train" / "n0").mkdir(parents=True)
    (path / "file").write_text("x")
    (path / "pointer.pt").write_bytes(POINTER)
    (path / "page.pt").write_bytes(HTML)
    (path / "cut.pt").write_bytes(DIT.read_bytes()[:5000])
    for name, content in (("last.pt", DMAT.read_bytes()), ("best.pt", b"")):
        (path / "runs" / name).mkdir(parents=True)
        (path / "runs" / name / name).write_bytes(content)
    return path


AT_LEAST_0, COUNT = "expected a whole number of at least 0", "expected a whole number above 0"
T = "expected a number above 0, at most 1"
MISTAKES = [  # flags, and what their line has to say
    ("--data WRONG/nowhere", "WRONG/nowhere/train: expected a folder of images for each class"),
    ("--data WRONG/empty", "WRONG/empty/train: expected a folder of images for each class"),
    ("--data WRONG/hollow", "WRONG/hollow/train: expected a folder of images for each class"),
    ("--data WRONG/file", "WRONG/file/train"),
    ("--synthetic WRONG/other/train", "WRONG/other/train: expected the class folders of train/, but n1"),
    ("--synthetic WRONG/nowhere", "WRONG/nowhere: expected a folder of images for each class"),
    ("--arch nonsense", "--arch nonsense: timm has no such model"),
    ("--arch resnet18", "--arch resnet18: has BatchNorm"),
    ("--batch-size 21 --accumulate 2", "--batch-size 21: expected a multiple of"),
    ("--out WRONG/file", "WRONG/file"), ("--out WRONG/file/x", "WRONG/file"),
    ("--out WRONG/runs/last.pt", "runs/last.pt/last.pt: damaged, or no last.pt of this script"),
    ("--out WRONG/runs/best.pt", "runs/best.pt: has files of a run but no last.pt"),
    (f"--teacher {DIT} {VAE} {STATS}", f"{DIT}: is 32 wide"),
    (f"--teacher {DIT} {VAE} {STATS} --teacher-layer 7", f"{DIT}: has 3 blocks"),
    (f"--teacher {STATS} {VAE} {DIT}", f"{STATS}: expected a LightningDiT checkpoint, this is latent"),
    (f"--teacher WRONG/none.pt {VAE} {STATS}", "none.pt"),
    (f"--teacher WRONG/pointer.pt {VAE} {STATS}", f"WRONG/pointer.pt: {LFS}"),
    (f"--teacher WRONG/page.pt {VAE} {STATS}", f"WRONG/page.pt: {PAGE}"),
    (f"--teacher WRONG/cut.pt {VAE} {STATS}", "WRONG/cut.pt: damaged"),
    (f"--teacher {DIT}", "argument --teacher: expected 3 arguments"),
    ("--teacher-t 1.5", f"--teacher-t: '1.5': {T}"), ("--teacher-t 0", f"--teacher-t: '0': {T}"),
    ("--eps 8/0", "--eps: '8/0'"), ("--eps 4", "--eps: '4'"),
    ("--lr nan", "--lr: 'nan': expected a number above 0"),
    ("--workers -1", f"--workers: '-1': {AT_LEAST_0}"), ("--accumulate 0", f"--accumulate: '0': {COUNT}"),
    ("--epochs 1.5", f"--epochs: '1.5': {COUNT}"),
    ("--synthetic-fraction 1", "--synthetic-fraction: '1': expected"),
    ("--save-every 1", "unrecognized arguments: --save-every 1"),
    ("--device tpu", "--device: invalid choice: 'tpu'"),
]
if not torch.cuda.is_available():
    MISTAKES.append(("--device cuda", "--device cuda: there is no CUDA device here"))


def test_a_mistake_on_the_command_line_gives_one_line_and_writes_nothing(folder, wrong, tmp_path,
                                                                         monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the default --out would show up
    before = contents(wrong)
    for more, named in MISTAKES:
        command = flags(folder, "--max-steps", "1", *more.replace("WRONG", str(wrong)).split())
        assert_one_line("train_imagenet.py", command, named.replace("WRONG", str(wrong)))
    missing = "--teacher: expected three files (see README.md), or --dra-weight 0"
    assert_one_line("train_imagenet.py", ["--device", "cpu", "--data", folder], missing)
    assert contents(wrong) == before and not list(tmp_path.iterdir())


def test_no_reader_runs_anything_in_a_hostile_file(tmp_path):
    """last.pt; the teacher's files are in test_dit_encoder.py."""
    out = tmp_path / "out"
    out.mkdir()
    assert_never_run(lambda path: train_imagenet.resume(shutil.copy(path, out / "last.pt").parent,
                                                        {"recipe": {}}, None),
                     tmp_path)


def test_a_teacher_of_other_classes_is_refused_unless_it_is_not_told_the_label(folder, tmp_path, monkeypatch):
    """The tiny LightningDiT knows ten classes; the folder is cut down to nine."""
    given, load = [], train_imagenet.load_dit_encoder

    def load_tiny(dit, vae, stats, layer, zero_channels, **sizes):
        given.append((zero_channels, sizes))
        return load(dit, vae, stats, layer, (5, 21), num_heads=2, image_size=64)
    monkeypatch.setattr(train_imagenet, "load_dit_encoder", load_tiny)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for label in range(9):
            (tmp_path / split / f"n{label}").symlink_to(folder / split / f"n{label}")
    assert setting(folder, "--teacher", *TINY_DIT, "--teacher-layer", "2")[2].width == 32
    assert given == [((1053, 259), {})], "heads and size are load_dit_encoder's own"
    nine = ["--teacher", *TINY_DIT, "--teacher-layer", "2", "--data", tmp_path, "--synthetic",
            tmp_path / "train"]
    with pytest.raises(InputError, match=f"^{TINY_DIT[0]}: knows 10 classes, not 9; --teacher-unconditional"):
        setting(folder, *nine)
    args, data, teacher = setting(folder, *nine, "--teacher-unconditional")
    run = build_run(args, data, teacher)
    assert take_step(train_imagenet, run, teacher, one_batch(args, 0, teacher), args)["loss"].isfinite()


if __name__ == "__main__":  # what torchrun starts: tests/test_train_imagenet.py FOLDER
    torch.set_num_threads(1)
    make_smaller()
    dist.init_process_group("gloo")
    compute(Path(sys.argv[1]))
    dist.destroy_process_group()
