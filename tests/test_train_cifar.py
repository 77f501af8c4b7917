"""What train_cifar.py promises, in the order of the numbered sections below.

 1. The step      The attack stays within eps and in [0, 1], and raises the KL divergence. The losses are
                  those of TRADES and of eq. (3) and (4). Without alignment a step is DM-AT's, number by
                  number. The teacher gets the clean image and no gradient, and does not change.
 2. Networks      WideResNets are DM-AT's and ViTs Wu et al.'s, by names, initial weights and logits.
 3. The recipe    Defaults are the paper's, and flags beat them. Optimizer, learning rate, momentum, weight
                  decay and averaging are those of a recipe written by hand, in each step of a run.
 4. Data          A batch depends on the seed and the number of the step alone. Held-out images are never
                  trained on, and no test image is read. Synthetic images stay on disk.
 5. What is kept  best.pt is the average that was best on held-out images. Checkpoints are plain data, under
                  the names that DM-AT's code and RobustBench look for. log.csv has a row for each epoch, each
                  evaluation and every 50 steps.
 6. A killed run  continues to the same bits and the same log. A checkpoint on disk is always whole.
 7. Refusals      Another recipe, a second run in the folder, a damaged checkpoint, and numbers that are not
                  finite are errors, and what was saved before stays as it was.
 8. Processes     Two share the batches of one, have identical weights, and evaluate as one. Where BatchNorm
                  does not tell them apart, their gradient is that of one.
 9. Full size     The paper's networks have the right shapes and precisions, and a step never waits for the
                  device. Compiled steps agree with plain ones.
10. Your own      `main` takes a teacher and a network of your own.
11. Mistakes      One line names the flag or file, the exit code is 2, and nothing is written. No file gets to
                  run code.

Words: the teacher is the frozen diffusion model (EDM); alignment, or DRA, is the loss that draws the
classifier's features to the teacher's. DM-AT (Wang et al. 2023b in the paper, arXiv 2302.04638) brought
synthetic images, and the recipe for WideResNets; fixtures/ has numbers from its own code. Wu et al. (2025)
brought the recipe for ViTs. The average is that of the weights over the steps of a run, and it is what is
judged.

All this runs on a CPU, on tiny networks (wrn-10-1, vit-tiny-2) except in section 9. It says nothing of how
accurate a long run gets, nor of a GPU. `-m "not slow"` leaves out what takes long.
"""
import copy
import itertools
import json
import math
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from torch import nn

from helpers import (CPU, DMAT, EDM, FIXTURES, HTML, LFS, PAGE, POINTER, RANK, ROOT, WORLD, Killed,
                     all_finite, assert_full_size_step, assert_identical_weights, assert_never_run,
                     assert_one_line, assert_same_gradient, assert_shares, compare, contents, die_in_step,
                     differences, dump, edm_file, from_all, hostile_pickles, kill_once, load, log_rows, run,
                     start, take_step, three_steps, torchrun, write_npz, write_program, write_sparse_npz)
import train_cifar
from edm_encoder import EDMEncoder
from train_cifar import (SELECTION_STEPS, Data, InputError, averaging_decay, build_model, build_optimizer,
                         build_projector, build_run, build_scheduler, crop_and_flip, dra_loss,
                         draw_smoke_images, generator, kl_divergence, load_real, load_teacher, main,
                         margin_loss, open_npz, parse_args, pgd, set_batchnorm, trades_attack, trades_loss,
                         train_step, update_average, write_atomically)

EPS, STEP_SIZE = 8 / 255, 2 / 255


def make_smaller():
    """Nearly all of a tiny network's checkpoint would be its projectors, and nearly all of a short run the
    attack on the held-out images."""
    train_cifar.PROJECTOR_WIDTH, train_cifar.SELECTION_STEPS = 32, 4


@pytest.fixture(scope="module", autouse=True)
def smaller():
    with mock.patch.multiple(train_cifar, PROJECTOR_WIDTH=0, SELECTION_STEPS=0):
        make_smaller()
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("wrn-10-1", 10)


@pytest.fixture
def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def start_near(images):
    uniform = torch.rand(images.shape, generator=torch.Generator().manual_seed(2))
    return (images + EPS * (2 * uniform - 1)).clamp(0, 1)


def arguments(*flags):
    """Settings of a run on a CPU, without a teacher unless a flag says otherwise."""
    return parse_args(["--device", "cpu", "--dra-weight", "0", *flags])


def one_step(model, images, args, projectors=nn.ModuleList(), teacher=None, **batch):
    """One training step on eight images of classes 0 to 7. Returns its numbers."""
    given = {"labels": torch.arange(8), "start": start_near(images), "teacher_noise": []}
    batch = SimpleNamespace(images=images, **given | batch)
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = build_optimizer(args, model, projectors)
    return train_step(model, averaged, projectors, teacher, optimizer, batch, 0.0, args)


# -----------------------------------------------------------------------------------------------------------
# 1. The step: attack (eq. 2), losses (eq. 3 and TRADES), and all of it together (eq. 4).


def test_attack_stays_within_eps_and_the_pixel_range_and_raises_the_divergence(model, images):
    start = start_near(images)
    adv = trades_attack(model, images, start, EPS, STEP_SIZE, 10)
    assert (adv - images).abs().max() <= EPS + 1e-6
    assert adv.min() >= 0 and adv.max() <= 1 and not adv.requires_grad
    divergence = [kl_divergence(model(images), model(x), "sum").item() for x in (start, adv)]
    assert divergence[1] > 10 * divergence[0]


def test_attack_follows_the_sign_of_the_gradient_to_the_corner_of_the_ball():
    images = torch.tensor([[[[0.5, 0.99, 0.01]]]])
    direction = torch.tensor([[[[1.0, 2.0, -3.0]]]])
    adv = pgd(lambda x: (x * direction).sum(), images, images, 0.1, 0.03, 5)
    torch.testing.assert_close(adv, torch.tensor([[[[0.6, 1.0, 0.0]]]]))


def test_attack_uses_batch_statistics_leaves_the_model_unchanged_and_computes_no_weights_gradient(model,
                                                                                                  images):
    """Seen from inside the attack, every weight is frozen, for autograd and for a compiled graph."""
    set_batchnorm(model, momentum=1.0)
    before, start, trained = copy.deepcopy(model.state_dict()), start_near(images), []
    look = lambda *_: trained.append(any(p.requires_grad for p in model.parameters()))
    hook = model.logits.register_forward_hook(look)
    adv = trades_attack(model, images, start, EPS, STEP_SIZE, 2)
    assert trained == [False] * 3, "one clean forward and one for each step"
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.batchnorm.track_running_stats
    with_running = trades_attack(model.eval(), images, start, EPS, STEP_SIZE, 2)
    assert not torch.equal(adv, with_running), "running statistics give another attack"


def test_trades_is_cross_entropy_on_clean_images_plus_beta_times_kl_from_clean_to_adversarial():
    clean, adv, labels = torch.randn(4, 10).double(), torch.randn(4, 10).double(), torch.arange(4)
    p, q = clean.softmax(1), adv.softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(clean, labels, label_smoothing=smoothing)
        for other, beta_kl in ((adv, 6 * kl), (clean, 0)):  # without a perturbation KL is 0
            loss = trades_loss(clean, other, labels, 6, smoothing)
            torch.testing.assert_close(loss.double(), expected + beta_kl, rtol=1e-5, atol=1e-5)


def test_trades_gradient_is_finite_where_a_probability_underflows():
    clean = torch.tensor([[200.0, -200.0]], requires_grad=True)
    adv = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    trades_loss(clean, adv, torch.tensor([0]), 5, 0.0).backward()
    assert clean.grad.isfinite().all() and adv.grad.isfinite().all()
    naive = torch.tensor([[200.0, -200.0]], requires_grad=True)
    F.kl_div(adv.detach().log_softmax(1), naive.softmax(1), reduction="batchmean").backward()
    assert naive.grad.isnan().any(), "the plain form is what this guards against"


def test_losses_are_float32_whatever_comes_in():
    half = torch.randn(4, 10, dtype=torch.bfloat16)
    losses = trades_loss(half, half + 1, torch.arange(4), 5, 0.1), dra_loss(half, half)
    assert all(loss.dtype == torch.float32 for loss in losses)


def test_alignment_is_minus_one_where_directions_agree_and_ignores_length():
    features = torch.randn(6, 32)
    torch.testing.assert_close(dra_loss(features, 7 * features), torch.tensor(-1.0))
    torch.testing.assert_close(dra_loss(features, -features), torch.tensor(1.0))
    torch.testing.assert_close(dra_loss(torch.eye(4), torch.eye(4).roll(1, 0)), torch.tensor(0.0))


def test_alignment_moves_the_prediction_and_never_the_target():
    projected, target = torch.randn(2, 6, 32).requires_grad_().unbind(0)
    for tensor in (projected, target):
        tensor.retain_grad()
    dra_loss(projected, target).backward()
    assert projected.grad.abs().sum() > 0 and target.grad is None


@pytest.fixture(scope="module")
def upstream():
    """Two optimizer steps of DM-AT's own code, see fixtures/README.md: name -> tensor."""
    with np.load(FIXTURES / "dmat_trades_steps_wrn_10_1.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def part(upstream, prefix):
    return {name.removeprefix(prefix): value for name, value in upstream.items() if name.startswith(prefix)}


def relative_error(ours, theirs):
    ours, theirs = [torch.cat([tensors[name].double().flatten() for name in theirs])
                    for tensors in (ours, theirs)]
    return ((ours - theirs).norm() / theirs.norm()).item()


def initial_model(upstream):
    model = build_model("wrn-10-1", 10)
    model.load_state_dict(part(upstream, "init/"), strict=True)
    return model


def start_of(step):
    return (step["image"] + step["init_noise"]).clamp(0, 1)


def test_attack_logits_loss_and_gradient_are_dmats(upstream):
    """Of the first step of DM-AT's own code, from the same weights, images and noise."""
    step, model = part(upstream, "step0/"), initial_model(upstream)
    adv = trades_attack(model, step["image"], start_of(step), EPS, STEP_SIZE, 10)
    assert (adv != step["adversarial"]).float().mean() < 0.01, "signs of gradients near zero may differ"
    clean_logits, adv_logits = model(step["image"]), model(step["adversarial"])
    torch.testing.assert_close(clean_logits, step["logits_clean"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adv_logits, step["logits_adv"], rtol=1e-4, atol=1e-5)
    loss = trades_loss(clean_logits, adv_logits, step["label"], beta=5, label_smoothing=0.1)
    assert abs(loss.item() - step["loss"].item()) < 1e-4
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    assert relative_error(gradient, part(upstream, "grad0/")) < 1e-3


def test_two_whole_steps_end_at_dmats_weights(upstream):
    """Attack, two forwards, Nesterov SGD without decay on BatchNorm, averaging from step 1."""
    model = initial_model(upstream)
    averaged, args = copy.deepcopy(model).requires_grad_(False), arguments("--lr", "0.05")
    optimizer = build_optimizer(args, model)
    for i in range(2):
        step = part(upstream, f"step{i}/")
        batch = SimpleNamespace(images=step["image"], labels=step["label"], start=start_of(step),
                                teacher_noise=[])
        decay = averaging_decay(i, 1, 0.995)
        numbers = train_step(model, averaged, nn.ModuleList(), None, optimizer, batch, decay, args)
        assert abs(numbers["loss"].item() - step["loss"].item()) < 1e-4
    final, initial = part(upstream, "final/"), part(upstream, "init/")
    updates = model.batchnorm.num_batches_tracked
    assert final["batchnorm.num_batches_tracked"] == 4 == updates, "two updates a step, none in the attack"
    assert relative_error(model.state_dict(), final) < 1e-3
    assert relative_error(averaged.state_dict(), part(upstream, "final_ema/")) < 1e-3
    assert relative_error(model.state_dict(), initial) > 1e-2, "the bounds above could have failed"


def test_step_with_alignment_trains_model_and_projectors_but_not_the_teacher(model, images):
    """Eight steps with two projectors, one for each noise level that the teacher sees. The cosine rises."""
    teacher = EDMEncoder("dec.16x16_in1", img_resolution=32, label_dim=10, model_channels=8,
                         channel_mult=[1, 2], num_blocks=1)
    projectors = nn.ModuleList(build_projector(64, teacher.width) for _ in range(2))
    averaged = copy.deepcopy(model).requires_grad_(False)
    args = arguments("--dra-weight", "1", "--extra-sigma", "--attack-steps", "2")
    noise = [(0.06, torch.randn(images.shape)), (torch.rand(8) + 0.1, torch.randn(images.shape))]
    batch = SimpleNamespace(images=images, labels=torch.arange(8), start=start_near(images),
                            teacher_noise=noise)
    before = [copy.deepcopy(module.state_dict()) for module in (model, projectors, teacher)]
    settings = build_optimizer(args, model, projectors), batch, 0.5, args
    numbers = [train_step(model, averaged, projectors, teacher, *settings) for _ in range(8)]

    changed = [any(not torch.equal(value, old[name]) for name, value in module.state_dict().items())
               for module, old in zip((model, projectors, teacher), before)]
    assert changed == [True, True, False]
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in projectors.parameters())
    first, last = numbers[0], numbers[-1]
    torch.testing.assert_close(first["loss"], first["trades"] - args.dra_weight * first["cosine"],
                               msg="eq. (4): L_DRA is minus the cosine")
    assert last["cosine"] > first["cosine"]


@pytest.mark.parametrize("told", [True, False])
def test_attacked_features_are_aligned_with_what_the_teacher_says_of_the_clean_image(model, images, told):
    """eq. (3). The teacher gets the clean image, label, noise level and noise; with --teacher-unconditional
    no label."""
    asked, target, noise = [], torch.randn(8, 4), torch.randn(images.shape)
    teacher = lambda *inputs: asked.append(inputs) or target
    projector, before = build_projector(64, 4), copy.deepcopy(model)
    args = arguments("--dra-weight", "1", *["--teacher-unconditional"][told:])
    adv = trades_attack(before, images, start_near(images), EPS, STEP_SIZE, 10)
    expected = F.cosine_similarity(projector(before.features(adv)), target).mean()
    numbers = one_step(model, images, args, nn.ModuleList([projector]), teacher,
                       teacher_noise=[(0.06, noise)])
    torch.testing.assert_close(numbers["cosine"], expected.detach())
    [(clean, labels, sigma, given)] = asked
    assert torch.equal(clean, images) and sigma == 0.06 and torch.equal(given, noise)
    assert torch.equal(labels, torch.arange(8)) if told else labels is None


@pytest.mark.parametrize("flags, passes", [([], 12), (["--attack-steps", "3"], 5),
                                           (["--attack-steps", "0"], 2), (["--eps", "0"], 2)])
def test_one_clean_forward_serves_attack_and_loss(model, images, flags, passes):
    """1 clean, 10 in the attack, 1 adversarial. In the arithmetic of the README, where a backward pass to the
    image or to the weights costs as much as a forward one, that is 2 x 10 + 2 x 3 = 26 passes."""
    count = []
    model.init_conv.register_forward_hook(lambda *_: count.append(1))
    one_step(model, images, arguments(*flags))
    assert len(count) == passes


def test_without_attack_steps_and_beta_a_step_is_plain_training(model, images):
    """The "standard supervised" classifier of Fig. 3 and 4: x' = x, and cross-entropy alone."""
    logits = copy.deepcopy(model)(images)
    expected = F.cross_entropy(logits, torch.arange(8), label_smoothing=0.1)
    numbers = one_step(model, images, arguments("--attack-steps", "0", "--beta", "0"))
    torch.testing.assert_close(numbers["loss"], expected.detach())
    assert numbers["train_clean"] == numbers["train_robust"]


def test_accuracies_of_a_step_are_in_percent(model, images):
    """Clean accuracy is that of the clean forward, robust accuracy that on the attacked images."""
    before = copy.deepcopy(model)
    clean_logits = before(images)
    labels = clean_logits.argmax(dim=1)  # all right, until they are attacked
    adv = trades_attack(before, images, start_near(images), EPS, STEP_SIZE, 10, clean_logits)
    robust = 100 * (before(adv).argmax(dim=1) == labels).float().mean()
    assert 0 < robust < 100
    numbers = one_step(model, images, arguments(), labels=labels)
    assert numbers["train_clean"] == 100 and numbers["train_robust"] == robust


@pytest.mark.parametrize("arch", ["vit-tiny-2", "wrn-10-1"])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole_one_but_for_batchnorm(images, arch):
    """A ViT's up to rounding. A WideResNet normalises each piece by itself: its gradient is the mean of two
    steps, one for the images with even and one for those with odd numbers. Without attack steps, whose signs
    would amplify the rounding."""
    torch.manual_seed(0)
    network, noise = build_model(arch, 10), torch.randn(8, 3, 32, 32)
    projectors = nn.ModuleList([build_projector(64, 5)])
    teacher = lambda x, labels, sigma, noise: (x + sigma * noise).mean(dim=(2, 3)) @ torch.ones(3, 5)
    whole, even, odd = [{"images": images[part], "labels": torch.arange(8)[part], "start": images[part],
                         "teacher_noise": [(0.1, noise[part])]}
                        for part in (slice(None), slice(0, None, 2), slice(1, None, 2))]

    def step(part, *flags):
        model = copy.deepcopy(network)
        args = arguments("--dra-weight", "1", "--attack-steps", "0", "--arch", arch, "--max-norm", "0",
                         *flags)
        numbers = one_step(model, args=args, projectors=copy.deepcopy(projectors), teacher=teacher, **part)
        return model, numbers["loss"], torch.cat([p.grad.flatten() for p in model.parameters()])
    model, *found = step(whole, "--accumulate", "2")
    if arch == "wrn-10-1":
        (first, *a), (_, *b) = step(even), step(odd)
        expected = [(x + y) / 2 for x, y in zip(a, b)]
        for mine, theirs in zip(model.buffers(), first.buffers()):
            assert torch.equal(mine, theirs), "the first piece alone updates the running statistics"
    else:
        _, *expected = step(whole)
        torch.testing.assert_close(found, step(whole, "--accumulate", "4")[1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# -----------------------------------------------------------------------------------------------------------
# 2. Networks: DM-AT's WideResNets and Wu et al.'s ViTs. Weights exchange with DM-AT and RobustBench.


def test_dmats_checkpoint_loads_and_gives_dmats_logits():
    """Both from DM-AT's own code, see fixtures/README.md."""
    model = build_model("wrn-10-1", 10)
    saved = load(DMAT)["model_state_dict"]
    model.load_state_dict({name.removeprefix("module.0."): value for name, value in saved.items()},
                          strict=True)
    reference = np.load(FIXTURES / "dmat_wrn_10_1_cifar10_reference.npz")
    logits = model.eval()(torch.from_numpy(reference["image"]))
    torch.testing.assert_close(logits, torch.from_numpy(reference["logits"]), rtol=1e-4, atol=1e-5)


def test_wrn_28_10_has_dmats_parameter_names():
    manifest = json.loads((FIXTURES / "dmat_wrn_28_10_manifest.json").read_text())
    with torch.device("meta"):
        model = build_model("wrn-28-10", 10)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == manifest


def test_wide_resnets_are_initialised_as_dmats():
    """Convolutions N(0, 2 / (k^2 out_channels)), last bias 0. torch's default for a 3x3 layer of equal width
    is 2.4 times narrower."""
    model = build_model("wrn-10-4", 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert abs(module.weight.mean()) < 0.05 * expected
    assert model.logits.bias.eq(0).all() and model.logits.weight.std() > 0


def vit_by_hand(w, x, depth, heads):
    """Features and logits of a ViT from its state dict `w`, in plain operations."""
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    patches = x.reshape(len(x), 3, 16, 2, 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(x), 256, 12)
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"] + w["pos_embed"]
    for block in (f"blocks.{i}" for i in range(depth)):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        q, k, v = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v)]  # [B, heads, 256, D]
        mixed = (q @ k.transpose(2, 3) / q.shape[-1]**0.5).softmax(dim=-1) @ v
        x = x + w[f"{block}.ls1.gamma"] * linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"), approximate="tanh")
        x = x + w[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    features = norm(x, "norm").mean(dim=1)
    return features, linear(features, "head")


@torch.no_grad()
def test_vits_are_those_of_wu_et_al():
    """No class token, LayerScale, GELU in its tanh form, and the mean of the normalised tokens of an image in
    [0, 1]. The weights start from a normal of deviation 0.02 that is cut at two deviations, which leaves
    0.0176; biases at 0, LayerScale at 1e-4. Away from that start, or LayerScale would hide the blocks,
    features and logits are those by hand."""
    with torch.device("meta"), mock.patch.object(nn.init, "trunc_normal_"):
        large = build_model("vit-b-2", 10)
    assert sum(p.numel() for p in large.parameters()) == 85_288_714 and large.blocks[11].attn.num_heads == 12
    torch.manual_seed(0)
    network, images = build_model("vit-tiny-2", 10).eval(), torch.rand(2, 3, 32, 32)
    weights = dict(network.named_parameters())
    for name in ("pos_embed", "blocks.1.attn.qkv.weight", "blocks.1.mlp.fc1.weight"):
        assert weights[name].std().item() == pytest.approx(0.0176, rel=0.05), name
    for name, p in weights.items():
        assert not name.endswith("bias") or p.eq(0).all()
        assert not name.endswith("gamma") or p.eq(1e-4).all()
        assert not name.endswith(("embed", "proj.weight", "qkv.weight",
                                  "head.weight")) or p.abs().max() <= 0.04
        nn.init.normal_(p, mean=1.0 if name.endswith(("norm1.weight", "gamma")) else 0.0, std=0.05)
    features, logits = vit_by_hand(network.state_dict(), images, depth=2, heads=2)
    torch.testing.assert_close(network.features(images), features, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network(images), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ["wrn-10-1", "vit-tiny-2"])
def test_logits_are_the_head_of_the_features_and_weights_have_names_that_robustbench_keeps(arch, images):
    """RobustBench cuts "module." and "model." out of keys, wherever they stand."""
    network = build_model(arch, 100, "cifar100").eval()
    features = network.features(images)
    assert features.dtype == torch.float32 and torch.equal(network.head(features), network(images))
    assert features.shape == (8, 64) and network(images).shape == (8, 100)
    assert not any(name in ("mean", "std") or "module." in name or "model." in name
                   for name in network.state_dict())


@pytest.mark.parametrize("arch", ["wrn-28", "wrn-29-10", "wrn-4-1", "resnet18", "wrn-10-0", ""])
def test_an_unknown_arch_is_named(arch):
    with pytest.raises(InputError, match="--arch"):
        build_model(arch, 10)


# -----------------------------------------------------------------------------------------------------------
# 3. The recipe: defaults, and what a run makes of them. DM-AT's for WideResNets, Wu et al.'s for ViTs.


def test_defaults_are_the_papers_wrn_34_10_row():
    args = parse_args(["--device", "cpu"])
    assert (args.arch, args.batch_size, args.epochs, args.synthetic) == ("wrn-34-10", 128, 200, [])
    assert (args.eps, args.attack_steps, args.step_size) == (8 / 255, 10, 2 / 255)
    assert (args.beta, args.label_smoothing) == (5, 0.1)
    assert (args.lr, args.weight_decay, args.ema_decay, args.eval_every) == (0.2, 5e-4, 0.995, 1)
    assert args.dra_weight == 1 and args.teacher_sigma == 0.06 and args.save_minutes == 5
    assert args.teacher.endswith("edm-cifar10-32x32-cond-vp.pkl") and args.amp is False
    assert (args.max_norm, args.border, args.synthetic_fraction, args.accumulate) == (0, 0, None, 1)
    assert parse_args(["--dataset", "cifar100"]).teacher.endswith("edm-cifar100-32x32-cond-vp.pkl")
    assert SELECTION_STEPS == 40


def test_a_vit_has_the_recipe_of_wu_et_al_and_every_flag_beats_it():
    args = arguments("--arch", "vit-b-2")
    assert (args.lr, args.weight_decay, args.max_norm, args.ema_decay) == (1e-4, 0.5, 1, 0.9999)
    assert (args.beta, args.label_smoothing, args.synthetic_fraction, args.border) == (3, 0.4, 0.8, 128)
    own = arguments(*"--arch vit-b-2 --lr 1e-3 --beta 6 --border 0 --max-norm 0 --ema-decay 0.9".split())
    assert (own.lr, own.beta, own.border, own.max_norm, own.ema_decay) == (1e-3, 6, 0, 0, 0.9)


def test_eps_is_a_fraction_or_a_number():
    assert parse_args(["--eps", "8/255"]).eps == parse_args(["--eps", str(8 / 255)]).eps == 8 / 255


def test_flags_beat_the_smoke_runs_settings():
    smoke = parse_args(["--smoke"])
    assert (smoke.arch, smoke.epochs, smoke.teacher, smoke.device) == ("wrn-10-1", 4, None, "cpu")
    own = parse_args(["--arch", "wrn-16-2", "--smoke", "--epochs", "7", "--teacher", "x.pkl"])
    assert (own.arch, own.epochs, own.teacher, own.batch_size) == ("wrn-16-2", 7, "x.pkl", 64)


def one_cycle(epoch, epochs, peak):
    """Rate and momentum in an epoch (from 0) of a run, by hand: the rise ends at epoch 0.025 * epochs - 1."""
    top, last = 0.025 * epochs - 1, epochs - 1
    along = lambda start, end, share: end + (start - end) * (1 + math.cos(math.pi * share)) / 2
    if top >= epoch:  # only where there are 40 epochs or more
        share = epoch / top if top else 0
        return along(peak / 25, peak, share), along(0.95, 0.85, share)
    share = (epoch - top) / (last - top)
    return along(peak, peak / 250_000, share), along(0.85, 0.95, share)


@pytest.mark.parametrize("epochs", [1, 2, 39, 40, 41, 400])
def test_rate_and_momentum_of_a_wide_resnet_follow_one_cycle(epochs):
    """Also with 40 epochs, where torch's own class divides by zero for DM-AT's setting."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9, nesterov=True)
    scheduler, seen = build_scheduler(arguments(), optimizer, epochs), []
    for epoch in range(epochs):
        seen.append([optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]])
        optimizer.step()
        if epoch < epochs - 1:
            scheduler.step()
    expected = [one_cycle(epoch, epochs, 0.2) for epoch in range(epochs)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-5, atol=1e-8)
    assert seen[-1] == pytest.approx([0.2 / 250_000, 0.95])


def rise_and_fall(steps, rise):
    """A ViT's rates by hand: from 1e-6 to 1e-4, and along half a cosine to 1e-5."""
    fall = np.linspace(0, np.pi, steps - rise)
    return [1e-6 + (1e-4 - 1e-6) * i / rise for i in range(rise)] + list(5.5e-5 + 4.5e-5 * np.cos(fall))


@pytest.mark.parametrize("steps, rise", [(300, 10), (40, 4), (5, 1), (2, 1), (1, 1)])
def test_a_vits_rate_rises_for_five_epochs_or_a_tenth_of_the_run_and_then_falls_to_a_tenth(steps, rise):
    """By step, not by epoch. An epoch has two steps here, so five have ten."""
    args = arguments("--arch", "vit-tiny-2")
    optimizer = build_optimizer(args, nn.Linear(1, 1))
    scheduler, seen = build_scheduler(args, optimizer, steps, 2), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(rise_and_fall(steps, rise))


def test_averaging_follows_the_model_through_the_warm_up_and_then_slows_down():
    assert [averaging_decay(step, 3, 0.995) for step in range(2)] == [0, 0]
    assert [averaging_decay(step, 3, 0.995) for step in range(2, 5)] == [1 / 10, 2 / 11, 3 / 12]
    assert averaging_decay(100_000, 3, 0.995) == 0.995


def test_average_shares_no_storage_with_the_live_model(model):
    """Or training the model would change its average."""
    averaged = copy.deepcopy(model).requires_grad_(False)
    for _ in range(2):
        update_average(averaged, model, 0.9)
        storages = [{t.untyped_storage().data_ptr() for t in [*m.parameters(), *m.buffers()]}
                    for m in (averaged, model)]
        assert not storages[0] & storages[1]


class Small(nn.Module):
    """A network of one's own with all that a recipe tells apart: matrices, biases, a position embedding, and
    a norm, which is BatchNorm for arch "wrn-..."."""

    def __init__(self, arch, num_classes, dataset):
        super().__init__()
        self.conv, self.pos_embed = nn.Conv2d(3, 8, 8, stride=8), nn.Parameter(torch.randn(1, 8, 4, 4) / 10)
        self.norm = nn.BatchNorm2d(8) if arch.startswith("wrn") else nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, num_classes)

    def features(self, images):
        return F.silu(self.norm(self.conv(images) + self.pos_embed)).mean(dim=(2, 3))

    def head(self, features):
        return self.linear(features)

    def forward(self, images):
        return self.head(self.features(images))


class MeanColour(nn.Module):
    """A teacher of one's own: the mean colour of the noised image. It keeps what it was asked."""

    width = 3

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, images, labels, sigma, noise):
        self.asked.append((images, labels, sigma, noise))
        return (images + torch.as_tensor(sigma).view(-1, 1, 1, 1) * noise).mean(dim=(2, 3))


# A recipe from the paper and what it refers to: TRADES' beta, label smoothing, tau.
BY_HAND = {"wrn-10-1": SimpleNamespace(beta=5, smoothing=0.1, tau=0.995),
           "vit-tiny-2": SimpleNamespace(beta=3, smoothing=0.4, tau=0.9999)}


def loss_by_hand(net, projector, batch, recipe):
    """L of eq. (4) with lambda 1, in training mode. The attack is on a copy: it changes no running
    statistics."""
    x, smooth = batch.images, F.one_hot(batch.labels, 10) * (1 - recipe.smoothing) + recipe.smoothing / 10
    attacked, adv, logits = copy.deepcopy(net), batch.start, net(x)
    log_p = logits.log_softmax(1)
    for _ in range(3):
        adv = adv.detach().requires_grad_()
        log_q = attacked(adv).log_softmax(1)
        (gradient,) = torch.autograd.grad((log_p.detach().exp() * (log_p.detach() - log_q)).sum(), [adv])
        adv = torch.minimum(torch.maximum(adv + 2 / 255 * gradient.sign(), x - 8 / 255), x + 8 / 255)
        adv = adv.clamp(0, 1)
    features = net.features(adv.detach())
    log_q = net.head(features).log_softmax(1)
    h, g = projector(features), (x + 0.06 * batch.teacher_noise[0][1]).mean(dim=(2, 3))
    cosine = ((h * g).sum(1) / (h.norm(dim=1) * g.norm(dim=1))).mean()
    kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    return -(smooth * log_p).sum(1).mean() + recipe.beta * kl - cosine


@torch.no_grad()
def update_by_hand(arch, step, weights, gradients, memory):
    """A weight update as the recipe has it, in a step of 120, two an epoch. The others: tensors by name."""
    if arch.startswith("wrn"):  # SGD with Nesterov momentum, both by epoch; no decay on BatchNorm
        rate, momentum = one_cycle(step // 2, 60, 0.2)
        for name, w in weights.items():
            direction = gradients[name] + 5e-4 * w * (not name.startswith("norm"))
            memory[name] = momentum * memory[name] + direction
            w -= rate * (direction + momentum * memory[name])
    else:  # Lion, by step; the whole gradient clipped; decay on matrices alone
        rate = rise_and_fall(120, 10)[step]
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        for name, w in weights.items():
            gradient = gradients[name] / max(1, norm)
            w *= 1 - rate * 0.5 * (w.ndim > 1 and name != "pos_embed")
            w -= rate * (0.95 * memory[name] + 0.05 * gradient).sign()
            memory[name] = 0.98 * memory[name] + 0.02 * gradient


@pytest.mark.parametrize("arch", BY_HAND)
def test_a_run_has_the_weights_of_the_recipe_written_by_hand_in_every_step(arch, tmp_path, monkeypatch):
    """60 epochs of two steps with `main`, and beside it the same in plain torch: attack, loss, optimizer,
    rate and momentum, decay, clipping, BatchNorm's momentum (1, then 0.01), and the average, a WRN's from
    step 3 on (2.5 %)."""
    write_npz(tmp_path / "train.npz", 32)
    recipe, apart = BY_HAND[arch], []
    mine = SimpleNamespace(step=0)

    def beside(model, averaged, projectors, teacher, optimizer, batch, ema_decay, args):
        if mine.step == 0:
            mine.net, mine.projector = copy.deepcopy(model).train(), copy.deepcopy(projectors[0])
            named = [*mine.net.named_parameters(), *mine.projector.named_parameters()]
            mine.weights, mine.memory = dict(named), {name: torch.zeros_like(w) for name, w in named}
            mine.averaged = copy.deepcopy(mine.net)
        set_batchnorm(mine.net, momentum=1.0 if mine.step == 0 else 0.01)
        loss = loss_by_hand(mine.net, mine.projector, batch, recipe)
        gradients = dict(zip(mine.weights, torch.autograd.grad(loss, list(mine.weights.values()))))
        update_by_hand(arch, mine.step, mine.weights, gradients, mine.memory)
        n = mine.step - 2  # steps since the warm-up
        decay = recipe.tau if arch == "vit-tiny-2" else 0 if n < 0 else min(recipe.tau, (1 + n) / (10 + n))
        for average, w in zip(mine.averaged.parameters(), mine.net.parameters()):
            average.data = decay * average.data + (1 - decay) * w.data
        mine.averaged.load_state_dict(mine.averaged.state_dict() | dict(mine.net.named_buffers()))
        numbers = train_step(model, averaged, projectors, teacher, optimizer, batch, ema_decay, args)
        mine.step += 1
        for ours, theirs in ((mine.net, model), (mine.averaged, averaged), (mine.projector, projectors[0])):
            ours = {name: value for name, value in ours.state_dict().items() if value.is_floating_point()}
            apart.append(relative_error(theirs.state_dict(), ours))
        return numbers
    monkeypatch.setattr(train_cifar, "train_step", beside)
    main(["--device", "cpu", "--arch", arch, "--batch-size", "16", "--epochs", "60", "--attack-steps", "3",
          "--data-dir", str(tmp_path), "--out", str(tmp_path / "run"), "--eval-every", "30"],
         teacher=MeanColour(), build_model=Small)
    assert mine.step == 120 and max(apart) < 2e-4, max(apart)


# -----------------------------------------------------------------------------------------------------------
# 4. Data: from files to batches. First the files, then what is drawn from them.


@pytest.fixture
def folder(tmp_path):
    """200 real images, of which 20 are held out, and no test images."""
    write_npz(tmp_path / "train.npz", 200, seed=1)
    return tmp_path


def make_data(folder, *flags, rank=0, world=1):
    args = parse_args(["--data-dir", str(folder), "--device", "cpu", "--batch-size", "20", *map(str, flags)])
    return Data(args, CPU, rank, world)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_npz_is_read_as_numpy_reads_it_and_mapped_where_it_lies(tmp_path, dtype, order):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
    path = write_npz(tmp_path / "x.npz", 50, image=np.asarray(pixels, order=order),
                     label=(np.arange(50) % 10).astype(dtype))
    images, labels = open_npz(path, 10)
    with np.load(path) as file:
        assert np.array_equal(images, file["image"]) and np.array_equal(labels, file["label"])
    assert labels.dtype == np.int64 and not images.flags.writeable and isinstance(images.base, mmap.mmap)


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux's /proc about memory")


@LINUX
def test_the_kernel_is_told_not_to_read_ahead_in_a_file(tmp_path):
    """Since batches pick single images: reading ahead takes 200 times longer. MADV_RANDOM, which the kernel
    shows as the flag rr of the mapping."""
    path = write_npz(tmp_path / "x.npz", 50)
    images, _ = open_npz(path, 10)
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    flags = [after.splitlines()[0].split() for before, after in zip(mappings, mappings[1:])
             if str(path) in before]
    assert len(flags) == 1 and "rr" in flags[0] and len(images) == 50


@LINUX
@pytest.mark.slow
def test_twenty_million_images_cost_less_than_two_gb_of_anonymous_memory(tmp_path):
    """61 GB, as DM-AT would ship them, of which batches of 1,000 are read. The limit on the process's memory
    is there for a script that does read the file: it should not take the machine's."""
    path = write_sparse_npz(tmp_path / "big.npz", 20_000_000)
    assert path.stat().st_size > 61e9
    code = """if True:
        import json, resource, sys, torch
        from train_cifar import Data, parse_args
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        def anonymous():  # MiB
            lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
            return int(lines["RssAnon"].split()[0]) / 1024
        flags = ["--smoke", "--batch-size", "1000", "--synthetic-fraction", "0.9", "--dra-weight", "0"]
        args, before = parse_args([*flags, "--synthetic", sys.argv[1]]), anonymous()
        data = Data(args, torch.device("cpu"))
        after = anonymous()
        for step in range(20):
            images, labels = data.read(data.draw(step))
        memory = before, after, anonymous()
        print(json.dumps([data.n_synthetic, images.shape, int(images[100:].sum()), *memory]))
        """
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, shape, total, before, after, at_the_end = json.loads(done.stdout)
    assert count == 20_000_000 and shape == [1000, 32, 32, 3] and total == 0
    assert 140 < after - before < 400, "labels as int64 are 160 MB, and the real images 3 MB"
    assert at_the_end - after < 100, "what is read of the images is let go"
    assert at_the_end < 2000


def test_both_splits_of_a_folder_are_read_and_training_needs_only_one(folder):
    args = parse_args(["--device", "cpu", "--data-dir", str(folder)])
    Data(args, CPU)
    with pytest.raises(FileNotFoundError, match="test.npz"):
        load_real(args, "test")
    write_npz(folder / "test.npz", 30, seed=2)
    for split in ("train", "test"):
        images, labels = load_real(args, split)
        with np.load(folder / f"{split}.npz") as file:
            assert np.array_equal(images, file["image"]) and np.array_equal(labels, file["label"])
        assert images.flags.writeable and images.base is None, "real images are in memory"


@pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100"])
def test_torchvisions_own_arrays_are_taken(monkeypatch, tmp_path, dataset):
    """CIFAR as torchvision gives it: a transposed view, and labels in a list."""
    class Downloaded:
        def __init__(self, root, train, download):
            assert Path(root) == tmp_path and download
            images, labels = draw_smoke_images(60, seed=int(train))
            self.data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
            self.targets = labels.tolist()
    monkeypatch.setattr(train_cifar.torchvision.datasets, dataset, Downloaded)
    data = make_data(tmp_path, "--dataset", dataset.lower())
    assert data.batch(0).images.shape == (20, 3, 32, 32)
    for split, seed in (("test", 0), ("train", 1)):
        images, labels = load_real(data.args, split)
        expected = draw_smoke_images(60, seed)
        assert np.array_equal(images, expected[0]) and images.flags.c_contiguous
        assert np.array_equal(labels, expected[1]) and labels.dtype == np.int64


def test_draws_depend_on_seed_position_and_purpose_only():
    draw = lambda *key: torch.rand(3, generator=generator(*key)).tolist()
    assert draw(0, 5, "batch") == draw(0, 5, "batch")
    keys = [(0, 5, "batch"), (1, 5, "batch"), (0, 6, "batch"), (0, 5, "pass"), (5, 0, "batch")]
    assert len({tuple(draw(*key)) for key in keys}) == 5


def assert_same_batch(a, b, share=slice(None)):
    """Batch a is b's share, bit for bit."""
    for name in ("images", "labels", "start"):
        assert torch.equal(getattr(a, name), getattr(b, name)[share]), name
    assert len(a.teacher_noise) == len(b.teacher_noise) == 2
    for (sigma, noise), (other_sigma, other_noise) in zip(a.teacher_noise, b.teacher_noise):
        assert torch.equal(noise, other_noise[share])
        assert sigma == other_sigma if isinstance(sigma, float) else torch.equal(sigma, other_sigma[share])


def test_batches_do_not_depend_on_the_steps_before_and_processes_share_them(folder):
    """Nor on what was read ahead: a thread prepares the next step's images."""
    flags = ["--extra-sigma", "--synthetic", write_npz(folder / "a.npz", 300, seed=3)]
    one, other = [make_data(folder, *flags) for _ in range(2)]
    for step in range(12):
        one.batch(step)
    for step in (12, 3):
        whole = other.batch(step)
        assert_same_batch(one.batch(step), whole)
        for rank in range(4):
            share = make_data(folder, *flags, rank=rank, world=4).batch(step)
            assert len(share.images) == 5
            assert_same_batch(share, whole, slice(rank, None, 4))


def test_one_thread_reads_the_next_batch_while_this_step_computes(folder, monkeypatch):
    data, readers = make_data(folder), {}
    prepare = data.prepare

    def noted(step):
        readers[step] = threading.current_thread()
        return prepare(step)
    monkeypatch.setattr(data, "prepare", noted)
    data.batch(0)
    data.coming[1].result(timeout=60)  # it is on its way, although nobody has asked for it
    data.batch(1)
    data.coming[2].result(timeout=60)
    assert set(readers) == {0, 1, 2}, "none is read twice"
    assert len(set(readers.values())) == 1 and threading.current_thread() not in readers.values()


def test_an_error_of_the_reading_thread_reaches_the_run(folder, monkeypatch):
    data = make_data(folder)
    monkeypatch.setattr(data, "read", lambda index: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        data.batch(0)


def test_a_batch_has_the_shapes_and_ranges_of_images_and_starts_within_eps(folder):
    batch = make_data(folder, "--extra-sigma", "--eps", "4/255").batch(0)
    assert batch.images.shape == batch.start.shape == (20, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.images.min() == 0 and batch.images.max() == 1
    assert batch.start.min() >= 0 and batch.start.max() <= 1
    assert batch.labels.shape == (20,) and batch.labels.dtype == torch.int64
    distance = (batch.start - batch.images).abs()
    assert 3.9 / 255 < distance.max() <= 4 / 255 + 1e-6
    (sigma, noise), (drawn_sigma, drawn_noise) = batch.teacher_noise
    assert sigma == 0.06 and noise.shape == drawn_noise.shape == batch.images.shape
    assert not torch.equal(noise, drawn_noise)
    assert drawn_sigma.shape == (20,) and drawn_sigma.min() > 0


@pytest.mark.parametrize("flags, levels", [([], 1), (["--extra-sigma"], 2), (["--dra-weight", "0"], 0),
                                           (["--dra-weight", "0", "--extra-sigma"], 0)])
def test_teacher_gets_a_noise_for_each_of_its_targets(folder, flags, levels):
    """One at the fixed noise level, one more at a drawn level with --extra-sigma, none without alignment."""
    assert len(make_data(folder, *flags).batch(0).teacher_noise) == levels


def test_extra_sigma_has_edms_training_distribution(folder):
    """ln(sigma) is normal with mean -1.2 and deviation 1.2 (arXiv 2206.00364)."""
    data = make_data(folder, "--extra-sigma", "--batch-size", 180)
    logs = torch.cat([data.batch(step).teacher_noise[1][0] for step in range(20)]).log()
    assert abs(logs.mean() + 1.2) < 0.1 and abs(logs.std() - 1.2) < 0.1


def test_crops_and_flips_are_all_equally_frequent(tmp_path):
    """Of images with one bright pixel: where it lands shows the crop and the flip."""
    image = np.zeros((40, 32, 32, 3), np.uint8)
    image[:, 15, 10] = 255
    write_npz(tmp_path / "train.npz", 40, image=image)
    data = make_data(tmp_path, "--batch-size", 500)
    places = torch.cat([data.batch(step).images[:, 0].flatten(1).argmax(1) for step in range(20)])
    rows, columns = places // 32, places % 32
    unflipped = columns <= 14
    assert rows.min() == 11 and rows.max() == 19 and abs(unflipped.float().mean() - 0.5) < 0.02
    shift = torch.where(unflipped, columns - 10, 21 - columns)  # mirrored, the pixel is in column 21
    counts = torch.stack([torch.bincount(offset, minlength=9) for offset in (rows - 11, shift + 4)])
    assert counts.shape == (2, 9) and (counts / 10_000 - 1 / 9).abs().max() < 0.015


@pytest.mark.parametrize("border", [0, 128])
def test_crop_and_flip_move_pixels_and_invent_none(border):
    images = np.random.default_rng(0).integers(1, 256, (2, 32, 32, 3), np.uint8)
    centre, never = [(4, 4), (4, 4)], [False, False]
    assert np.array_equal(crop_and_flip(images, centre, never), images)
    flipped = crop_and_flip(images, centre, [False, True])
    assert np.array_equal(flipped[0], images[0]) and np.array_equal(flipped[1], images[1, :, ::-1])
    moved = crop_and_flip(images, [(0, 8), (6, 4)], never, border)
    assert np.array_equal(moved[0, 4:, :-4], images[0, :-4, 4:]), "row 0: down by 4; column 8: left by 4"
    assert (moved[0, :4] == border).all() and (moved[0, :, -4:] == border).all()
    assert np.array_equal(moved[1, :-2], images[1, 2:]) and (moved[1, -2:] == border).all()
    assert moved.dtype == np.uint8 and moved.shape == images.shape


def test_held_out_images_are_the_first_and_never_appear_in_batches(tmp_path):
    """A tenth of a small set, 1,024 of CIFAR. Here they are red, and no other image has any red."""
    image = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)
    image[20:, :, :, 0] = 0
    image[:20] = (255, 0, 0)
    write_npz(tmp_path / "train.npz", 200, image=image)
    np.savez(tmp_path / "a.npz", image=image[20:60], label=np.zeros(40, int))
    for more in ([], ["--synthetic", tmp_path / "a.npz"]):
        data = make_data(tmp_path, *more)
        assert (data.n_holdout, data.n_real) == (20, 180)
        batches = [data.batch(step).images for step in range(20)]  # without synthetic images: two passes
        assert all(images[:, 0].max() == 0 and images[:, 1].max() > 0.9 for images in batches)
        held_out = torch.cat([images for images, _, _ in data.holdout_batches()])
        assert len(held_out) == 20 and held_out[:, 0].min() == 1 and held_out[:, 1:].max() == 0


def test_a_large_set_holds_out_1024_images_that_still_count_in_the_length_of_an_epoch(monkeypatch):
    images = np.zeros((50_000, 1, 1, 3), np.uint8)
    monkeypatch.setattr(train_cifar, "load_real", lambda args, split: (images, np.zeros(50_000, np.int64)))
    data = Data(parse_args(["--smoke"]), CPU)
    assert (data.n_holdout, data.n_real) == (1024, 48_976) and data.steps_per_epoch == 782, "50,000 / 64"


def test_held_out_images_and_their_starts_do_not_depend_on_the_processes(folder):
    """Each process takes its share, and the attack on an image begins where it would in a single process."""
    (images, labels, start), = make_data(folder).holdout_batches()
    with np.load(folder / "train.npz") as file:
        expected = torch.from_numpy(file["image"][:20]).permute(0, 3, 1, 2) / 255
        assert torch.equal(images, expected) and torch.equal(labels, torch.from_numpy(file["label"][:20]))
    distance = (start - images).abs()
    assert 7.9 / 255 < distance.max() <= 8 / 255 + 1e-6 and start.min() >= 0 and start.max() <= 1
    for rank in range(3):
        data = make_data(folder, "--batch-size", 21, rank=rank, world=3)
        share, = data.holdout_batches()
        for ours, whole in zip(share, (images, labels, start)):
            assert torch.equal(ours, whole[rank::3])


def test_training_reads_no_test_image(ten_steps, tmp_path, monkeypatch):
    splits = []
    monkeypatch.setattr(train_cifar, "load_real",
                        lambda args, split: splits.append(split) or load_real(args, split))
    main([*ten_steps, "--max-steps", "1", "--out", str(tmp_path)])
    assert splits == ["train"]


def test_real_images_come_in_reshuffled_whole_passes(folder):
    data = make_data(folder, "--batch-size", 50)  # 180 real images: passes end inside batches
    stream = np.concatenate([data.draw(step) for step in range(18)])
    passes = stream.reshape(5, 180)
    assert all(np.array_equal(np.sort(p), np.arange(20, 200)) for p in passes)
    assert not any(np.array_equal(passes[0], p) for p in passes[1:])


def test_a_batch_may_be_larger_than_all_real_images(folder):
    drawn = make_data(folder, "--batch-size", 450).draw(1)  # images 450 to 899 of the stream, of 180 a pass
    counts = np.bincount(drawn, minlength=200)
    assert len(drawn) == 450 and not counts[:20].any() and set(counts[20:]) == {2, 3}


def test_synthetic_images_are_drawn_from_all_files_by_their_size(folder):
    """They take 70 % of each batch, and an epoch has as many steps as without them."""
    write_npz(folder / "a.npz", 30, seed=3)
    write_npz(folder / "b.npz", 50, seed=4)
    data = make_data(folder, "--synthetic", folder / "a.npz", folder / "b.npz")
    assert (data.batch_real, data.batch_synthetic, data.steps_per_epoch) == (6, 14, 10)
    drawn = np.stack([data.draw(step) for step in range(200)])
    assert (drawn[:, :6] < 200).all() and (drawn[:, 6:] >= 200).all() and drawn.max() == 279
    assert abs((drawn[:, 6:] < 230).mean() - 30 / 80) < 0.05


@pytest.mark.parametrize("flags, count, share", [
    ([], 30, 358), (["--synthetic-fraction", "0.8"], 30, 409), (["--arch", "vit-b-2"], 30, 409),
    ([], 1_000_000, 358), ([], 1_000_001, 409)])
def test_a_batch_of_512_has_as_many_synthetic_images_as_its_recipe_says(folder, monkeypatch, flags, count,
                                                                        share):
    """DM-AT: int(512 x 0.7) = 358. int(512 x 0.8) = 409 for ViTs (Wu et al.), and for WideResNets with more
    than a million of them (arXiv 2404.09349)."""
    opened = np.zeros((count, 1)), np.zeros(count)
    monkeypatch.setattr(train_cifar, "open_npz", lambda path, classes: opened)
    monkeypatch.setattr(train_cifar, "load_real", lambda args, split: draw_smoke_images(20, seed=0))
    data = make_data(folder / "none", "--batch-size", 512, "--synthetic", "1m.npz", *flags)
    assert data.batch_real == 512 - share and (data.draw(0) >= 20).sum() == share


def test_an_index_reads_the_image_and_label_at_its_place_in_its_file(folder):
    """Real images and two synthetic files, numbered through; also the first and the last of each."""
    write_npz(folder / "a.npz", 30, seed=3)
    write_npz(folder / "b.npz", 50, seed=4)
    data = make_data(folder, "--synthetic", folder / "a.npz", folder / "b.npz")
    files = [np.load(folder / f"{name}.npz") for name in ("train", "a", "b")]
    image, label = [np.concatenate([file[name] for file in files]) for name in ("image", "label")]
    edges = np.array([279, 20, 199, 200, 229, 230, 0, 230])
    for index in (edges, data.draw(7), np.arange(280)):
        images, labels = data.read(index)
        assert np.array_equal(images, image[index]) and np.array_equal(labels, label[index]), "in that order"
        assert images.dtype == np.uint8 and labels.dtype == np.int64


def test_a_batch_holds_the_images_and_labels_that_were_drawn(tmp_path):
    """Image k of 250 in three files is grey of brightness k + 1: cropped and flipped, it is still known."""
    grey, label = np.arange(1, 251, dtype=np.uint8), np.arange(250) * 7 % 10
    image = np.broadcast_to(grey[:, None, None, None], (250, 32, 32, 3))
    for name, part in (("train", slice(0, 200)), ("a", slice(200, 230)), ("b", slice(230, 250))):
        np.savez(tmp_path / f"{name}.npz", image=image[part], label=label[part])
    data = make_data(tmp_path, "--synthetic", tmp_path / "a.npz", tmp_path / "b.npz", rank=1, world=2)
    for step in (0, 1, 7):
        batch, index = data.batch(step), data.draw(step)
        assert len(index) == 10 and (index >= 200).sum() == 7
        brightest = batch.images.amax(dim=(1, 2, 3)) * 255
        assert torch.equal(brightest.round(), torch.from_numpy(grey[index]).float())
        assert torch.equal(batch.labels, torch.from_numpy(label[index]))


def test_smoke_images_are_ten_balanced_classes():
    images, labels = draw_smoke_images(2000, seed=0)
    assert images.shape == (2000, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.bincount(labels, minlength=10).min() > 150


# -----------------------------------------------------------------------------------------------------------
# 5. What is kept: the average that was best on held-out images, in files of plain data; and what a run says.


def test_margin_loss_moves_only_images_that_are_still_classified_correctly():
    """Cut off at 0, as in DM-AT: where the attack has won, the gradient is zero and PGD stays where it is."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]], requires_grad=True)
    loss = margin_loss(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss == -2 and torch.equal(logits.grad, torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_evaluation_attacks_the_held_out_images_with_40_steps_on_the_margin_loss(model, monkeypatch):
    """The number that selects best.pt, of a model that is right about 6 of 10 images until it is attacked.
    Nothing of the model changes."""
    monkeypatch.setattr(train_cifar, "SELECTION_STEPS", SELECTION_STEPS)
    args = arguments("--eps", "0.008", "--step-size", "0.0004")
    images = torch.from_numpy(draw_smoke_images(10, seed=0)[0]).permute(0, 3, 1, 2) / 255
    uniform = torch.rand(images.shape, generator=torch.Generator().manual_seed(2))
    start, labels = (images + args.eps * (2 * uniform - 1)).clamp(0, 1), model.eval()(images).argmax(dim=1)
    labels[:4] = (labels[:4] + 1) % 10
    adv = pgd(lambda x: margin_loss(model(x), labels), images, start, args.eps, args.step_size, 40)
    robust = 100 * (model(adv).argmax(dim=1) == labels).float().mean().item()
    assert 0 < robust < 60

    batches = [(images[part], labels[part], start[part]) for part in (slice(0, 6), slice(6, 10))]
    data = SimpleNamespace(rank=0, n_holdout=10, holdout_batches=lambda: batches)
    before, passes = copy.deepcopy(model.state_dict()), []
    model.register_forward_hook(lambda *_: passes.append(1))
    assert train_cifar.evaluate(model, data, args) == pytest.approx([60, robust])
    assert len(passes) == 2 * (40 + 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """64 real images, so that an epoch of 16 a step has four steps, and 30 synthetic ones."""
    folder = tmp_path_factory.mktemp("files")
    for name, count in (("train", 64), ("synthetic", 30)):
        images, labels = draw_smoke_images(count, seed=count)
        np.savez(folder / f"{name}.npz", image=images, label=labels)
    return folder


@pytest.fixture(scope="module")
def ten_steps(files):
    """Flags of a run of ten steps: two and a half epochs, with an evaluation after each and at the end. All
    that a run can have is in it. It saves when it starts and when it ends."""
    return ["--device", "cpu", "--arch", "wrn-10-1", "--batch-size", "16", "--attack-steps", "2",
            "--lr", "0.05", "--data-dir", str(files), "--synthetic", str(files / "synthetic.npz"),
            "--synthetic-fraction", "0.5", "--teacher", str(EDM), "--extra-sigma", "--max-steps", "10"]


@pytest.fixture(scope="module")
def finished(ten_steps, tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("finished")
    main([*ten_steps, "--out", str(out)])
    return out


def leave_out_training(monkeypatch, *scores, each_step=lambda: None):
    """Let runs train nothing, and call each_step instead. scores: what their evaluations find, clean and
    robust."""
    def step(model, averaged, projectors, teacher, optimizer, *rest):
        each_step()
        optimizer.step()  # there are no gradients; or the scheduler would complain
        return dict.fromkeys(("loss", "train_clean", "train_robust"), torch.zeros(()))
    found = itertools.chain(scores, itertools.repeat((0.0, 0.0)))
    monkeypatch.setattr(train_cifar, "train_step", step)
    monkeypatch.setattr(train_cifar, "evaluate", lambda *_: next(found))


def test_last_pt_is_plain_data_with_dmats_and_robustbenchs_names(ten_steps, finished):
    saved = load(finished / "last.pt")
    assert saved.keys() == {"args", "recipe", "arch", "dataset", "num_classes", "mean", "std", "step", "log",
                            "recent", "best", "model_state_dict", "unaveraged_model_state_dict", "state_dict",
                            "projector", "optimizer", "scheduler"}
    assert (saved["arch"], saved["dataset"], saved["num_classes"]) == ("wrn-10-1", "cifar10", 10)
    assert len(saved["mean"]) == len(saved["std"]) == 3 and saved["step"] == 10 and saved["recent"] == []
    for key in ("model_state_dict", "state_dict", "unaveraged_model_state_dict"):
        build_model(saved["arch"], saved["num_classes"]).load_state_dict(saved[key], strict=True)
    averaged, live = saved["model_state_dict"], saved["unaveraged_model_state_dict"]
    assert all(torch.equal(averaged[name], saved["state_dict"][name]) for name in averaged)
    assert not torch.equal(averaged["init_conv.weight"], live["init_conv.weight"])
    same = torch.equal(averaged["batchnorm.running_mean"], live["batchnorm.running_mean"])
    assert same, "running statistics are the live model's"
    assert saved["args"] == vars(parse_args([*ten_steps, "--out", str(finished)])), "as parse_args left them"


def test_best_pt_holds_the_best_average_and_no_optimizer(finished):
    """What was best at its evaluation, although training went on."""
    last, best = load(finished / "last.pt"), load(finished / "best.pt")
    assert best.keys() == {"args", "recipe", "arch", "dataset", "num_classes", "mean", "std", "step", "score",
                           "model_state_dict", "state_dict"}
    for name in ("args", "recipe", "arch", "dataset", "num_classes", "mean", "std"):
        assert best[name] == last[name]
    scores = {row["step"]: row["holdout_robust"] for row in last["log"]}
    assert best["score"] == scores[best["step"]] == max(scores.values())
    for key in ("model_state_dict", "state_dict"):
        build_model("wrn-10-1", 10).load_state_dict(best[key], strict=True)
    averaged = best["model_state_dict"]
    assert all(torch.equal(best["state_dict"][name], value) for name, value in averaged.items())


def test_best_pt_is_the_average_as_it_was_when_it_was_judged(ten_steps, tmp_path, monkeypatch):
    """The first evaluation is the best here, and the average moves on after it."""
    judged, scores = [], iter([60.0, 50.0, 40.0])

    def evaluate(averaged, data, args):
        judged.append(copy.deepcopy(averaged.state_dict()))
        return 100.0, next(scores)
    monkeypatch.setattr(train_cifar, "evaluate", evaluate)
    main([*ten_steps, "--attack-steps", "1", "--out", str(tmp_path)])
    best = load(tmp_path / "best.pt")
    assert (best["step"], best["score"]) == (4, 60)
    assert all(torch.equal(best["model_state_dict"][name], value) for name, value in judged[0].items())
    assert not torch.equal(judged[0]["init_conv.weight"], judged[2]["init_conv.weight"])


@pytest.mark.parametrize("flags, scores, step", [
    ([], [(60, 30), (60, 30), (60, 30)], 10), (["--attack-steps", "0"], [(60, 10), (90, 0), (80, 0)], 8),
    (["--eps", "0"], [(60, 10), (90, 0), (80, 0)], 8)])
def test_ties_go_to_the_later_evaluation_and_without_an_attack_clean_accuracy_selects(
        ten_steps, tmp_path, monkeypatch, flags, scores, step):
    """Plain training makes nothing robust: the first evaluation, of a network that knows nothing yet, would
    win."""
    leave_out_training(monkeypatch, *scores)
    main([*ten_steps, *flags, "--out", str(tmp_path)])
    best = load(tmp_path / "best.pt")
    assert (best["step"], best["score"]) == (step, 90 if flags else 30)


def test_log_csv_has_its_columns_with_accuracies_in_percent_and_losses_that_obey_eq_4(finished):
    rows = log_rows(finished)
    assert list(rows[0]) == ["step", "epoch", "lr", "loss", "trades", "cosine", "train_clean", "train_robust",
                             "holdout_clean", "holdout_robust"]
    assert [row["epoch"] for row in rows] == ["1", "2", "2.5"]
    expected = [one_cycle(epoch, 3, 0.05)[0] for epoch in range(3)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected, rel=1e-4), "the rate just used"
    for row in rows:
        row = {name: float(value) for name, value in row.items()}
        assert 0 <= row["holdout_robust"] <= row["holdout_clean"] <= 100 and -1 <= row["cosine"] <= 1
        assert abs(row["loss"] - (row["trades"] - row["cosine"])) < 1e-4, "lambda is 1"
        in_48 = row["train_clean"] * 16 * (2 if row["epoch"] == 2.5 else 4) / 100
        assert abs(in_48 - round(in_48)) < 1e-2, "a mean over the images of the steps since the last row"


def test_a_row_comes_with_each_epoch_each_evaluation_and_every_50_steps(files, tmp_path, monkeypatch):
    """Epochs of 64 steps, evaluations every 48 (0.75 epochs). Each row holds means over the steps since the
    row before it, also where the run was killed in between. Here the loss is the step's number, which the
    model's buffer counts."""
    def step(model, *rest):
        tracked = model.batchnorm.num_batches_tracked
        tracked += 1
        return {"loss": tracked.float(), "train_clean": torch.zeros(()), "train_robust": torch.zeros(())}
    monkeypatch.setattr(train_cifar, "train_step", step)
    monkeypatch.setattr(train_cifar, "evaluate", lambda *_: (2.0, 1.0))
    monkeypatch.setattr(torch.optim.lr_scheduler.OneCycleLR, "step", lambda self: None)
    flags = ["--device", "cpu", "--arch", "wrn-10-1", "--dra-weight", "0", "--batch-size", "1", "--data-dir",
             str(files), "--max-steps", "130", "--eval-every", "0.75"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main([*flags, "--out", str(whole)])
    for dies_in in (20, 33, 40):  # in steps 20, 52 and 91
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_in_step(patch, train_cifar, dies_in)
            main([*flags, "--save-minutes", "0", "--out", str(killed)])
    assert load(killed / "last.pt")["step"] == 90
    main([*flags, "--out", str(killed)])
    rows = log_rows(whole)
    assert log_rows(killed) == rows
    assert [int(row["step"]) for row in rows] == [48, 50, 64, 96, 100, 128, 130]
    assert [row["holdout_robust"] for row in rows] == ["1", "", "", "1", "", "", "1"]
    assert [float(row["loss"]) for row in rows] == [24.5, 49.5, 57.5, 80.5, 98.5, 114.5, 129.5]


def test_a_run_says_what_it_found_and_which_command_judges(ten_steps, finished, capsys):
    main([*ten_steps, "--out", str(finished)])
    lines, rows = capsys.readouterr().out.splitlines(), log_rows(finished)
    for line, name in zip(lines[-3:-1], ("holdout_clean", "holdout_robust")):
        first, last = [f"{float(row[name]):.2f}" for row in (rows[0], rows[-1])]
        assert line.split() == f"{name} {first} % in the first evaluation, {last} % in the last".split()
    assert lines[-1] == f"AutoAttack judges: python eval_autoattack.py {finished / 'best.pt'}"


def test_a_vit_is_judged_by_its_last_average_and_a_run_too_short_for_it_warns(tmp_path, capsys, monkeypatch):
    """Images go in as they are, whatever the data set: the checkpoint says mean 0 and deviation 1."""
    leave_out_training(monkeypatch)
    main(["--smoke", "--arch", "vit-tiny-2", "--dataset", "npz", "--dra-weight", "0", "--max-steps", "2",
          "--batch-size", "8", "--attack-steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "WARNING: --ema-decay 0.9999: after 2 steps the average is still to 100 % the random" in printed
    assert f"python eval_autoattack.py {tmp_path / 'last.pt'}" in printed
    for name in ("last.pt", "best.pt"):
        saved = load(tmp_path / name)
        assert (saved["mean"], saved["std"], saved["num_classes"]) == ([0, 0, 0], [1, 1, 1], 10)


@pytest.mark.parametrize("steps, warns", [(1, True), (2, False)])
def test_dry_run_prints_the_plan_warns_of_a_single_epoch_and_writes_nothing(files, tmp_path, capsys,
                                                                            steps, warns):
    main(["--device", "cpu", "--dry-run", "--data-dir", str(files), "--teacher", str(EDM),
          "--synthetic", str(files / "synthetic.npz"), "--arch", "wrn-10-1", "--batch-size", "512",
          "--max-steps", str(steps), "--out", str(tmp_path / "never")])
    plan = capsys.readouterr().out
    for line in ("wrn-10-1 in float32, aligned with 16 features of EDMEncoder",
                 "58 real, 30 synthetic and 6 held-out images",
                 f"{steps} steps = {steps} epochs; in each step 154 real + 358 synthetic images"):
        assert line in plan
    assert ("WARNING: a run of one epoch hardly trains" in plan) == warns
    assert not (tmp_path / "never").exists()



# -----------------------------------------------------------------------------------------------------------
# 6. A run that was killed continues to the same bits.

KILLABLE = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL and no SIGSTOP")


@pytest.fixture
def program(tmp_path_factory):
    """A file that does what `python train_cifar.py` does, made smaller as here."""
    path = tmp_path_factory.mktemp("program") / "run.py"
    return write_program(path, "train_cifar", PROJECTOR_WIDTH=32, SELECTION_STEPS=4)


@KILLABLE
@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bits_and_the_same_log(ten_steps, finished, program, tmp_path):
    """SIGKILL while a checkpoint is being written, and at a random moment. (More:
    by_hand/kill_many_times.py.)"""
    flags, rng = [*ten_steps, "--out", str(tmp_path)], random.Random(0)
    step, writing = kill_once(program, flags, tmp_path, True, rng)
    assert writing and step < 10, "last.pt is whole, although its successor was in the making"
    kill_once(program, flags, tmp_path, False, rng)
    main(flags)
    assert compare(finished, tmp_path) == [] and not (tmp_path / "last.pt.tmp").exists()


def test_a_run_that_dies_again_and_again_has_the_log_of_one_that_does_not(ten_steps, finished, tmp_path,
                                                                          monkeypatch):
    """Killed in its first step, in the middle of an epoch, and at the end of one. Rows begin before a kill
    and end after it; the log does not show when the run was saved."""
    flags = [*ten_steps, "--save-minutes", "0", "--out", str(tmp_path)]
    for steps_done, dies_in in ((0, 1), (0, 4), (3, 3), (5, 4)):
        if (tmp_path / "last.pt").exists():
            assert load(tmp_path / "last.pt")["step"] == steps_done
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_in_step(patch, train_cifar, dies_in)
            main(flags)
    assert load(tmp_path / "last.pt")["step"] == 8
    main(flags)
    assert compare(finished, tmp_path) == []
    assert [row["step"] for row in log_rows(finished)] == ["4", "8", "10"]


def test_what_came_after_the_last_checkpoint_is_done_again(ten_steps, finished, tmp_path, monkeypatch):
    """With the default of five minutes only the untrained run was saved, before step 1. The log on disk is
    ahead of it."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, train_cifar, 7)
        main([*ten_steps, "--out", str(tmp_path)])
    saved = load(tmp_path / "last.pt")
    assert saved["step"] == 0 and saved["log"] == [] and saved["best"] is None
    assert [row["step"] for row in log_rows(tmp_path)] == ["4"] and not (tmp_path / "best.pt").exists()
    main([*ten_steps, "--out", str(tmp_path)])
    assert compare(finished, tmp_path) == []


@pytest.mark.parametrize("minutes, saved", [("0", list(range(11))), ("0.5", list(range(11))),
                                            ("2", [0, 2, 4, 6, 8, 10]), ("7/2", [0, 4, 8, 10])])
def test_checkpoints_come_by_the_clock(ten_steps, tmp_path, monkeypatch, minutes, saved):
    """On a clock on which each step takes a minute."""
    clock, save, steps = [0.0], train_cifar.save, []

    def a_minute():
        clock[0] += 60

    def noted(out, about, run):
        steps.append(run.step)
        save(out, about, run)
        assert load(out / "last.pt")["step"] == run.step
    leave_out_training(monkeypatch, each_step=a_minute)
    monkeypatch.setattr(train_cifar, "save", noted)
    monkeypatch.setattr(train_cifar, "time", SimpleNamespace(time=lambda: clock[0]))
    main([*ten_steps, "--save-minutes", minutes, "--out", str(tmp_path)])
    assert steps == saved


def test_a_finished_run_changes_nothing_when_started_again(ten_steps, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    main([*ten_steps, "--out", str(tmp_path)])
    assert compare(finished, tmp_path) == []
    assert (tmp_path / "log.csv").read_bytes() == (finished / "log.csv").read_bytes()


@pytest.mark.parametrize("there", ["missing", "older"])
def test_best_pt_is_written_again_when_a_run_continues(ten_steps, finished, tmp_path, there):
    """A kill between the two writes leaves last.pt of a step and best.pt of an earlier one, or none."""
    shutil.copy(finished / "last.pt", tmp_path)
    if there == "older":
        torch.save({"step": 4}, tmp_path / "best.pt")
    main([*ten_steps, "--out", str(tmp_path)])
    assert differences(tmp_path / "best.pt", finished / "best.pt") == []


def test_last_pt_is_there_before_the_first_step_and_best_pt_just_after_the_first_best(ten_steps, tmp_path,
                                                                                      monkeypatch):
    """best.pt follows last.pt, and only when it changed: nothing of it is lost, and nothing comes early."""
    written, seen, write = [], [], write_atomically

    def noted(path, content):
        written.append((path.name, len(seen)))
        write(path, content)
    monkeypatch.setattr(train_cifar, "write_atomically", noted)
    leave_out_training(monkeypatch, (90.0, 50.0), (90.0, 40.0), (90.0, 60.0),
                       each_step=lambda: seen.append(list(contents(tmp_path))))
    main([*ten_steps, "--save-minutes", "0", "--out", str(tmp_path)])
    assert seen[0] == ["last.pt"] and seen[3] == ["last.pt"] and seen[4] == ["best.pt", "last.pt", "log.csv"]
    last, best = [[steps for name, steps in written if name == wanted] for wanted in ("last.pt", "best.pt")]
    assert last == list(range(11)) and best == [4, 10]
    assert written[written.index(("best.pt", 4)) - 1] == ("last.pt", 4)


def test_a_file_is_written_under_another_name_synced_and_renamed(tmp_path, monkeypatch):
    path, happened = tmp_path / "last.pt", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def noted_fsync(number):
        happened.append("synced")
        assert path.read_bytes() == b"old" and [p.read_bytes() for p in tmp_path.glob("*.tmp")] == [b"new"]
        fsync(number)

    def noted_replace(source, destination):
        happened.append("renamed")
        replace(source, destination)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(path, lambda file: file.write(b"new"))
    assert happened == ["synced", "renamed"] and contents(tmp_path) == {"last.pt": b"new"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_full_disk_leaves_the_last_checkpoint_whole(ten_steps, finished, tmp_path, monkeypatch):
    """From the fourth step on files may only grow to 100 kB, so the write fails in the middle. With room
    again the same command goes on."""
    import resource
    limits, train_step, calls = resource.getrlimit(resource.RLIMIT_FSIZE), train_cifar.train_step, []
    flags = [*ten_steps, "--save-minutes", "0", "--out", str(tmp_path)]

    def filling(*arguments):
        calls.append(1)
        if len(calls) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return train_step(*arguments)
    with monkeypatch.context() as patch, pytest.raises((OSError, RuntimeError)):
        patch.setattr(train_cifar, "train_step", filling)
        try:
            main(flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(calls) == 4 and load(tmp_path / "last.pt")["step"] == 3
    assert 0 < (tmp_path / "last.pt.tmp").stat().st_size <= 100_000
    main(flags)
    assert compare(finished, tmp_path) == []


# -----------------------------------------------------------------------------------------------------------
# 7. Refusals that leave all as it was: another recipe, a second run, damage, what is not finite.


@pytest.mark.parametrize("names", [["best.pt"], ["log.csv"], ["best.pt", "log.csv"]])
def test_a_folder_with_files_of_a_run_but_no_last_pt_is_refused(ten_steps, finished, tmp_path, names):
    """A new run would overwrite them."""
    for name in names:
        shutil.copy(finished / name, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"^{tmp_path}: has files of a run but no last.pt"):
        main([*ten_steps, "--out", str(tmp_path)])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flags, difference", [
    ("--beta 6", "beta 5.0, not 6.0"), ("--seed 1", "seed 0, not 1"),
    ("--seed 1 --beta 6 --eps 0.1", f"eps {8 / 255}, not 0.1"),
    ("--eps 4/255", f"eps {8 / 255}, not {4 / 255}"),
    ("--max-steps 11", "max_steps 10, not 11"),
    ("--synthetic-fraction 0.6", "synthetic_fraction 0.5, not 0.6"),
    ("--teacher-unconditional", "teacher_unconditional False, not True")])
def test_another_recipe_is_refused_and_the_first_difference_is_named(ten_steps, finished, flags, difference):
    before = contents(finished)
    with pytest.raises(InputError) as caught:
        main([*ten_steps, *flags.split(), "--out", str(finished)])
    assert str(caught.value) == f"{finished / 'last.pt'}: is of a run with {difference}; change --out"
    assert contents(finished) == before


@pytest.mark.parametrize("flags", [
    "--epochs 200 --eval-every 1 --beta 5 --ema-decay 0.995 --weight-decay 0.0005 --eps 8/255 --dra-weight 1 "
    "--teacher-sigma 0.06 --teacher-layer dec.8x8_in1 --seed 0",  # defaults, given
    "--save-minutes 1 --amp --no-compile",  # what does not change the method
    "--beta 6 --dry-run"])  # it trains nothing, so it may
def test_a_run_continues_under_flags_that_leave_its_recipe_as_it_is(ten_steps, finished, tmp_path, flags):
    """Defaults that are spelled out, flags that do not change the method, and a dry run with any."""
    shutil.copy(finished / "last.pt", tmp_path)
    main([*ten_steps, *flags.split(), "--out", str(tmp_path)])


def test_moved_files_are_the_same_recipe_and_other_names_are_not(ten_steps, files, finished, tmp_path):
    """Files count by their names: the last part of a path."""
    there, out = shutil.copytree(files, tmp_path / "elsewhere" / files.name), tmp_path / "out"
    out.mkdir()
    shutil.copy(EDM, there)
    shutil.copy(finished / "last.pt", out)
    moved = [flag.replace(str(files), str(there)).replace(str(EDM), str(there / EDM.name))
             for flag in ten_steps]
    assert moved != ten_steps
    main([*moved, "--out", str(out)])
    (there / "synthetic.npz").rename(there / "others.npz")
    with pytest.raises(InputError, match=r"run with synthetic synthetic.npz, not others.npz; change --out$"):
        main([*moved, "--synthetic", str(there / "others.npz"), "--out", str(out)])
    with pytest.raises(InputError, match="run with synthetic synthetic.npz, not synthetic.npz, others.npz; "):
        main([*ten_steps, "--synthetic", str(files / "synthetic.npz"), str(there / "others.npz"),
              "--out", str(out)])


@pytest.mark.parametrize("name, count, numbers", [("train", 63, "63, 30"), ("synthetic", 29, "64, 29")])
def test_another_number_of_images_is_refused_as_another_recipe(ten_steps, files, finished, tmp_path,
                                                               name, count, numbers):
    """In files of the same names: one image fewer."""
    there, before = shutil.copytree(files, tmp_path / files.name), contents(finished)
    images, labels = draw_smoke_images(count, seed=0)
    np.savez(there / f"{name}.npz", image=images, label=labels)
    with pytest.raises(InputError, match=f"is of a run with images 64, 30, not {numbers}; change --out"):
        main([*[flag.replace(str(files), str(there)) for flag in ten_steps], "--out", str(finished)])
    assert contents(finished) == before


@pytest.mark.parametrize("damage", ["half of it", "empty", "another kind", "hostile"])
def test_a_damaged_checkpoint_is_named_and_left_alone(ten_steps, finished, tmp_path, damage):
    whole, hostile = (finished / "last.pt").read_bytes(), hostile_pickles(tmp_path / "was_run")["os.mkdir"]
    content = {"half of it": whole[:len(whole) // 2], "empty": b"", "another kind": DMAT.read_bytes(),
               "hostile": hostile}[damage]
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(InputError, match=f"^{tmp_path / 'last.pt'}: damaged, or no last.pt of this script"):
        main([*ten_steps, "--out", str(tmp_path)])
    assert contents(tmp_path) == {"last.pt": content}


@KILLABLE
@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_locks_nothing(ten_steps, finished,
                                                                                   program,
                                                                                   tmp_path, monkeypatch):
    flags, path = [*ten_steps, "--save-minutes", "0", "--out", str(tmp_path)], tmp_path / "last.pt"
    acquire = FileLock.acquire
    first = start(program, flags)
    try:
        while not (path.exists() and load(path)["step"] > 0):
            assert first.poll() is None
        first.send_signal(signal.SIGSTOP)  # so that it is still there when the second comes
        before = path.read_bytes()
        with monkeypatch.context() as patch, pytest.raises(InputError,
                                                           match=f"^{tmp_path}: another run is at work"):
            patch.setattr(FileLock, "acquire", lambda self, timeout: acquire(self, timeout=0))  # do not wait
            main(flags)
        assert path.read_bytes() == before and first.poll() is None
    finally:
        first.kill()
        first.wait()
    main(flags)
    assert compare(finished, tmp_path) == []


@pytest.mark.parametrize("what, named", [
    ("a loss", r"step 3: not finite: \{'loss': nan, 'trades': nan, "),
    ("model", "step 3: a weight is not finite"),
    ("projectors", "step 3: a weight is not finite")])
def test_what_is_not_finite_stops_the_run_with_its_step_and_is_never_saved(ten_steps, finished, tmp_path,
                                                                           monkeypatch,
                                                                           what, named):
    """A weight is NaN before the third step, and so is the loss; or after it, when the loss was still finite.
    Without the NaN the same command goes on behind the second step."""
    flags, calls = [*ten_steps, "--save-minutes", "0", "--out", str(tmp_path)], []

    def breaking(model, averaged, projectors, *rest):
        calls.append(1)
        *_, bias = (projectors if what == "projectors" else model).parameters()
        if len(calls) == 3 and what == "a loss":
            bias.data[0] = torch.nan
        numbers = train_step(model, averaged, projectors, *rest)
        if len(calls) == 3 and what != "a loss":
            bias.data[0] = torch.nan
        return numbers
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match=f"^{named}"):
        patch.setattr(train_cifar, "train_step", breaking)
        main(flags)
    saved = load(tmp_path / "last.pt")
    assert saved["step"] == 2 and all_finite(saved) and list(contents(tmp_path)) == ["last.pt"]
    main(flags)
    assert compare(finished, tmp_path) == []


def test_the_first_step_that_was_not_finite_is_named_when_it_is_noticed_later(ten_steps, tmp_path,
                                                                              monkeypatch):
    """Numbers stay on the device until a row of the log or a checkpoint is due: here after step 4."""
    calls = []

    def spoiled(*arguments):
        calls.append(1)
        numbers = train_step(*arguments)
        return numbers | {"trades": numbers["trades"] * (torch.inf if len(calls) == 3 else 1)}
    monkeypatch.setattr(train_cifar, "train_step", spoiled)
    with pytest.raises(FloatingPointError, match=r"^step 3: not finite: \{'loss': \d.*, 'trades': inf, "):
        main([*ten_steps, "--out", str(tmp_path)])
    assert len(calls) == 4 and load(tmp_path / "last.pt")["step"] == 0


# -----------------------------------------------------------------------------------------------------------
# 8. Processes: two give what one gives. torchrun starts this very file, see `in_each_process` at its end.

# Without BatchNorm, so that two processes compute what one computes; a WRN, which has it; and one whose batch
# is in four pieces in any case, each normalised by itself.
SHARED = ["--smoke", "--batch-size", "16", "--extra-sigma", "--attack-steps", "3"]
SETTINGS = {"ViT": [*SHARED, "--arch", "vit-tiny-2", "--lr", "1e-3"], "WRN": SHARED,
            "WRN in pieces": [*SHARED, "--accumulate", str(4 // WORLD)]}


def compute(folder):
    """What each process has, into FOLDER/WORLD_RANK.pt. FOLDER holds wrn.pt, the averaged weights of a WRN
    that tells some images from others."""
    results = {}
    for name, flags in SETTINGS.items():
        args = parse_args(flags)
        data, teacher = Data(args, CPU, RANK, WORLD), load_teacher(args)
        found, run = three_steps(train_cifar, args, data, teacher)
        if name == "WRN":
            statistics = lambda: from_all(run.averaged.batchnorm.running_mean)
            found["statistics"] = [statistics(), train_cifar.evaluate(run.averaged, data, args), statistics()]
            run.averaged.load_state_dict(load(folder / "wrn.pt"))
            found["accuracy"] = train_cifar.evaluate(run.averaged, data, args)
        results[name] = found
    torch.save(results, folder / f"{WORLD}_{RANK}.pt")


def train_and_die(folder):
    """A run of eight steps. A step takes 25 s by the clock of process 0, and 70 s by that of process 1, which
    is gone in the seventh. The steps that were saved go into FOLDER/saves.json."""
    now, saves, save = [0.0], [], train_cifar.save

    def slow(*arguments):
        now[0] += 70 if RANK else 25
        if RANK and now[0] > 6 * 70:
            os._exit(7)
        return train_step(*arguments)

    def noted(out, about, run):
        saves.append(run.step)
        save(out, about, run)
        (folder / "saves.json").write_text(json.dumps(saves))
    train_cifar.time, train_cifar.train_step = SimpleNamespace(time=lambda: now[0]), slow
    train_cifar.save = noted
    main([*EIGHT_STEPS, "--out", str(folder / "out")])


EIGHT_STEPS = ["--smoke", "--batch-size", "16", "--attack-steps", "1", "--max-steps", "8",
               "--eval-every", "4/68", "--save-minutes", "1"]


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """{name of the setting: what a single process has computed, what each of two has}"""
    folder = tmp_path_factory.mktemp("computed")
    args = parse_args(["--smoke", "--attack-steps", "0", "--dra-weight", "0", "--lr", "0.1"])
    data = Data(args, CPU)
    run = build_run(args, data, None, 1000)
    # some of the held-out images are told from others, and not all of them under attack
    for step in range(15):
        set_batchnorm(run.model, momentum=0.3)
        run.optimizer.param_groups[0]["lr"] = 0.1
        take_step(train_cifar, run, None, data.batch(step), args, 0.0)
    torch.save(run.averaged.state_dict(), folder / "wrn.pt")
    compute(folder)
    done = torchrun(__file__, "compute", folder)
    assert done.returncode == 0, done.stderr
    one, first, second = [torch.load(folder / name, weights_only=False)
                          for name in ("1_0.pt", "2_0.pt", "2_1.pt")]
    return {name: (one[name], [first[name], second[name]]) for name in SETTINGS}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_share_the_batches_of_one_and_hold_identical_weights(name, computed):
    """Bit for bit; a WRN's processes have their own running statistics. Where the pieces that BatchNorm
    normalises are the same, loss and gradient are those of one process."""
    one, two = computed[name]
    assert_shares(one, two, n_holdout=108)
    assert_identical_weights(two)
    if name != "WRN":
        assert_same_gradient(one, two)


@pytest.mark.slow
def test_one_process_in_four_pieces_has_the_weights_of_two_with_two_pieces_each(computed):
    """After three steps, with the attack: piece j is places j, j + 4, ... of the batch in both."""
    one, (two, _) = computed["WRN in pieces"]
    for (mine,), (theirs, _) in zip(one["weights"], two["weights"]):
        assert (mine - theirs).norm() < 1e-5 * mine.norm()


@pytest.mark.slow
def test_an_evaluation_in_two_processes_is_that_of_one_with_the_statistics_of_process_0(computed):
    one, two = computed["WRN"]
    for found in two:
        before, _, after = found["statistics"]
        assert not torch.equal(*before), "each has seen other images"
        assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[0])
    assert two[0]["statistics"][1] == two[1]["statistics"][1], "all processes get the same numbers"
    clean, robust = one["accuracy"]
    assert 0 < robust < clean < 100, "an accuracy that could be another one"
    assert [found["accuracy"] for found in two] == [one["accuracy"]] * 2
    assert clean * 108 / 100 == pytest.approx(round(clean * 108 / 100), abs=1e-3)


@pytest.mark.slow
def test_process_0_saves_by_its_clock_and_after_a_death_a_single_process_continues(tmp_path, capsys):
    """By process 0's clock each third step is a minute after the last checkpoint, by the other's each step
    is. If the two disagreed, one would wait for the other in a reduction of another shape."""
    done, out = torchrun(__file__, "train_and_die", tmp_path), tmp_path / "out"
    assert done.returncode != 0 and "exitcode  : 7" in done.stderr, done.stderr
    assert json.loads((tmp_path / "saves.json").read_text()) == [0, 3, 6]
    assert done.stdout.count("from step 0 to 8") == 1 and [row["step"] for row in log_rows(out)] == ["4"]
    assert load(out / "last.pt")["step"] == 6, "what was saved before is whole"
    main([*EIGHT_STEPS, "--out", str(out)])
    assert "from step 6 to 8" in capsys.readouterr().out
    assert [row["step"] for row in log_rows(out)] == ["4", "8"] and load(out / "last.pt")["step"] == 8


def test_a_batch_that_the_processes_cannot_share_equally_is_refused(folder):
    with pytest.raises(InputError, match=r"--batch-size 20: expected a multiple of 3 process\(es\) x"):
        make_data(folder, world=3)


# -----------------------------------------------------------------------------------------------------------
# 9. Full size: the paper's networks, bfloat16, and compilation.


@pytest.mark.parametrize("arch, size, width, share",
                         [("wrn-28-10", 512, 640, 0.99), ("vit-b-2", 1024, 768, 0.65)])
def test_a_step_at_full_size_has_the_right_shapes_and_types_and_never_waits_for_the_device(arch, size, width,
                                                                                           share):
    """The paper's networks with a teacher of NVIDIA's size, without the memory. What autograd keeps of the
    activations is bfloat16, but for the inputs of a ViT's layer norms; logits and losses are float32. No
    value is asked for, and nothing is made on the host."""
    args = arguments("--arch", arch, "--batch-size", str(size), "--amp", "--attack-steps", "2",
                     "--extra-sigma",
                     "--dra-weight", "1")

    def build():
        teacher = EDMEncoder(args.teacher_layer, img_resolution=32, label_dim=10, model_channels=128,
                             channel_mult=[2, 2, 2], num_blocks=4)
        projectors = nn.ModuleList(build_projector(width, teacher.width) for _ in range(2))
        x, labels = torch.zeros(size, 3, 32, 32), torch.zeros(size, dtype=torch.long)
        batch = SimpleNamespace(images=x, labels=labels, start=x,
                                teacher_noise=[(0.06, x), (torch.ones(size), x)])
        return build_model(arch, 10), build_model(arch, 10), projectors, teacher, batch
    kept = assert_full_size_step(train_cifar, args, build, classes=10)
    assert kept[torch.bfloat16] > share * kept.total(), kept


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("arch", ["wrn-10-1", "vit-tiny-2"])
def test_steps_compiled_by_inductor_agree_with_plain_ones_and_compile_once(arch):
    """From step 1 on, as on a GPU: step 0 has a BatchNorm momentum of its own. Steps 2 and 3 compile
    nothing."""
    args = parse_args(["--smoke", "--arch", arch, "--batch-size", "8", "--attack-steps", "1", "--dra-weight",
                       "0"])
    data, losses, graphs = Data(args, CPU), {}, []
    batches = [data.batch(step) for step in range(4)]
    for device in ("cpu", "cuda"):  # compile_parts looks at nothing else
        torch._dynamo.reset()
        run = build_run(args, data, None, 1000)
        keys = list(run.model.state_dict())
        for step, batch in enumerate(batches):
            set_batchnorm(run.model, momentum=0.01 if step else 1.0)
            if step == 1:
                settings = SimpleNamespace(**vars(args) | {"device": device})
                train_cifar.compile_parts(settings, run.model)
            losses[device, step] = take_step(train_cifar, run, None, batch, args)["loss"]
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert list(run.model.state_dict()) == keys, "names of parameters stay clean"
    torch._dynamo.reset()
    for step in (1, 2):
        torch.testing.assert_close(losses["cuda", step], losses["cpu", step], rtol=1e-3, atol=1e-4)
    assert graphs[3] == graphs[4] < graphs[5] == graphs[6] == graphs[7], graphs


@pytest.mark.parametrize("flags, expected", [(["--amp"], torch.bfloat16), ([], torch.float32)])
def test_with_amp_a_cpu_computes_backbone_and_teacher_in_bfloat16_and_the_rest_in_float32(flags, expected):
    """By default a CPU computes in float32. Attack steps included, each forward is looked at."""
    args = parse_args(["--smoke", "--batch-size", "8", "--attack-steps", "1", "--extra-sigma", *flags])
    data, teacher = Data(args, CPU), load_teacher(args)
    run, dtypes = build_run(args, data, teacher), {}

    def note(name, output):
        dtypes.setdefault(name, set()).add(output.dtype)
    for name, layer in {"convolution": run.model.layer[2].block[0].conv_1, "logits": run.model.logits,
                        "projector": run.projectors[1][4], "teacher": teacher.model.enc["32x32_conv"],
                        "target": teacher}.items():
        layer.register_forward_hook(lambda module, inputs, output, name=name: note(name, output))
    run.model.logits.register_forward_hook(lambda module, inputs, output: note("features", inputs[0]))
    numbers = take_step(train_cifar, run, teacher, data.batch(0), args)
    assert dtypes["convolution"] == dtypes["teacher"] == {expected}
    full = {torch.float32}
    assert dtypes["features"] == dtypes["logits"] == dtypes["projector"] == dtypes["target"] == full
    assert {value.dtype for value in numbers.values()} == {p.dtype for p in run.model.parameters()} == full


@pytest.mark.parametrize("arch", ["wrn-10-1", "vit-tiny-2"])
def test_bfloat16_moves_the_first_steps_loss_by_less_than_a_percent(arch):
    args = parse_args(["--smoke", "--batch-size", "8", "--attack-steps", "2", "--arch", arch, "--dra-weight",
                       "0"])
    data, losses = Data(args, CPU), []
    for args.amp in (False, True):
        losses.append(take_step(train_cifar, build_run(args, data), None, data.batch(0),
                                args)["trades"].item())
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)


# -----------------------------------------------------------------------------------------------------------
# 10. Your own: a teacher and a network that are handed to `main`.


def test_a_program_may_hand_over_a_teacher_and_a_network(files, tmp_path, monkeypatch):
    """In place of those that the settings name, which are not loaded. What they are asked is the contract."""
    monkeypatch.setattr(train_cifar, "load_teacher", None)
    teacher, asked = MeanColour(), []
    build = lambda *given: asked.append(given) or Small("wrn", 10, "")
    flags = ["--device", "cpu", "--arch", "wrn-my-own", "--attack-steps", "1", "--batch-size", "16",
             "--data-dir", str(files), "--extra-sigma", "--max-steps", "1", "--out", str(tmp_path)]
    main(flags, teacher=teacher, build_model=build)
    assert asked == [("wrn-my-own", 10, "cifar10")]
    (fixed, drawn), batch = teacher.asked, Data(parse_args(flags), CPU).batch(0)
    for images, labels, _, noise in (fixed, drawn):
        assert torch.equal(images, batch.images) and torch.equal(labels, batch.labels), "the clean images"
        assert noise.shape == images.shape
    assert fixed[2] == 0.06 and torch.equal(drawn[2], batch.teacher_noise[1][0])
    saved = load(tmp_path / "last.pt")
    assert saved["arch"] == "wrn-my-own" and set(saved["model_state_dict"]) == set(build().state_dict())
    for first, last in (("0.0.weight", "0.4.weight"), ("1.0.weight", "1.4.weight")):
        assert (saved["projector"][first].shape, saved["projector"][last].shape) == ((32, 8), (3, 32))
    assert "cosine" in log_rows(tmp_path)[0]
    with pytest.raises(InputError, match="--arch wrn-my-own"):
        main(flags, teacher=teacher)


def test_without_alignment_no_teacher_is_asked_or_loaded(ten_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cifar, "load_teacher", None)
    teacher = MeanColour()
    main([*ten_steps, "--dra-weight", "0", "--attack-steps", "0", "--max-steps", "1", "--out", str(tmp_path)],
         teacher=teacher)
    assert teacher.asked == [] and "cosine" not in log_rows(tmp_path)[0]
    assert load(tmp_path / "last.pt")["projector"] == {}


# -----------------------------------------------------------------------------------------------------------
# 11. Mistakes: one line that names the flag or the file, exit code 2, nothing written, and no file run.




NUMBER, ABOVE = "expected a number of at least 0", "expected a number above 0"
BELOW_1 = "expected a number of at least 0 and below 1"
WHOLE, COUNT = "expected a whole number of at least 0", "expected a whole number above 0"
BAD_FLAGS = {  # and what argparse says of them
    **dict.fromkeys(("--eps 1", "--eps 255", "--eps=-1/255", "--eps 8/0", "--eps nan", "--eps x",
                     "--ema-decay 1.5", "--label-smoothing 1", "--synthetic-fraction 1"), BELOW_1),
    **dict.fromkeys(("--lr 0", "--lr inf", "--lr 1e999", "--step-size 0", "--teacher-sigma 0",
                     "--eval-every 0"), ABOVE),
    **dict.fromkeys(("--weight-decay -1", "--beta -1", "--dra-weight -0.1", "--save-minutes -1",
                     "--max-norm -1"), NUMBER),
    **dict.fromkeys(("--attack-steps -1", "--attack-steps 2.5", "--seed -1", "--seed 1e30"), WHOLE),
    **dict.fromkeys(("--epochs 0", "--max-steps -5", "--max-steps ten", "--batch-size 0",
                     "--accumulate 0"), COUNT),
    "--border 256": "expected a whole number from 0 to 255", "--lr": "expected one argument",
    "--dataset mnist": "invalid choice: 'mnist'", "extra": "unrecognized arguments: extra",
    "--optimizer lion": "unrecognized arguments: --optimizer lion",  # --arch decides
    "--epoch 3": "unrecognized arguments: --epoch 3",  # no abbreviations
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_a_flag_that_cannot_be_used_is_named_in_two_lines(capsys, flags, message):
    """A short usage line, then the flag; exit code 2."""
    with pytest.raises(SystemExit) as caught:
        parse_args(flags.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and usage.startswith("usage: ")
    assert flags.replace("=", " ").split()[0] in error and message in error


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Files that are wrong in one way each, and good ones: images of ten classes in cifar/, of three, of many
    (43), and of four, of which one has no image (gap)."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, labels in (("cifar", np.arange(60) % 10), ("three", np.arange(60) % 3),
                         ("many", np.arange(430) % 43), ("gap", np.array(20 * [0, 1, 3]))):
        (folder / name).mkdir()
        write_npz(folder / name / "train.npz", len(labels), label=labels)
    for suffix in ("npz", "pkl"):
        (folder / f"page.{suffix}").write_bytes(HTML)
        (folder / f"pointer.{suffix}").write_bytes(POINTER)
    for name, content in (("pages", HTML), ("pointers", POINTER)):
        (folder / name).mkdir()
        (folder / name / "train.npz").write_bytes(content)
    (folder / "no_train").mkdir()
    write_npz(folder / "no_train" / "test.npz", 5)
    (folder / "cut.pkl").write_bytes(EDM.read_bytes()[:1000])
    (folder / "file").write_text("x")
    small = {"img_resolution": 16, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2],
             "num_blocks": 1}
    dump(edm_file(EDMEncoder("dec.8x8_in1", **small), small), folder / "16px.pkl")
    return folder


REAL = "--device cpu --arch wrn-10-1 --dra-weight 0 --data-dir {}/cifar --batch-size 16 --max-steps 1"
SMOKE = "--smoke --max-steps 1"
MISTAKES = [  # a command, and what its line has to say
    (f"{SMOKE} --teacher {{}}/none.pkl", "none.pkl"),
    (f"{SMOKE} --teacher {{}}/page.pkl", f"page.pkl: {PAGE}"),
    (f"{SMOKE} --teacher {{}}/pointer.pkl", f"pointer.pkl: {LFS}"),
    (f"{SMOKE} --teacher {{}}/cut.pkl", "cut.pkl: damaged, refused or no EDM network"),
    (f"{SMOKE} --teacher {DMAT}", "dmat_wrn_10_1_cifar10.pt: damaged, refused or no EDM network"),
    (f"{SMOKE} --teacher {{}}/16px.pkl", "16px.pkl: is for 16 px, 10 classes, not 32 and 10"),
    (f"{SMOKE} --teacher {EDM} --dataset cifar100", "cond_vp.pkl: is for 32 px, 10 classes, not 32 and 100"),
    (f"{SMOKE} --teacher {EDM} --teacher-layer dec.4x4_in1", "edm_tiny_cond_vp.pkl: no layer 'dec.4x4_in1'"),
    (f"{SMOKE} --teacher-layer dec.9x9", "no layer 'dec.9x9' in this network"),
    (f"{REAL} --synthetic {{}}/none.npz", "none.npz"),
    (f"{REAL} --synthetic {{}}/cifar/train.npz {{}}/page.npz", f"page.npz: {PAGE}"),
    (f"{REAL} --synthetic {{}}/pointer.npz", f"pointer.npz: {LFS}"),
    (f"{REAL} --dataset cifar100", "cifar/train.npz: labels run from 0 to 9, expected 0 to 99"),
    (f"{REAL} --data-dir {{}}/no_train", "no_train/train.npz"),
    (f"{REAL} --data-dir {{}}/pages", f"pages/train.npz: {PAGE}"),
    (f"{REAL} --data-dir {{}}/pointers", f"pointers/train.npz: {LFS}"),
    (f"{REAL} --data-dir {{}}/file", "--data-dir"),
    (f"{REAL} --data-dir {{}}/three", "three: no training image has label 9, expected 0 to 9; --dataset npz"),
    (f"{REAL} --data-dir {{}}/many", "labels run from 0 to 42, expected 0 to 9; --dataset npz takes other"),
    (f"{REAL} --data-dir {{}}/many --dataset cifar100", "many: no training image has label 99, expected"),
    (f"{REAL} --data-dir {{}}/gap --dataset npz", "gap: no training image has label 2, expected 0 to 3"),
    (f"{REAL} --data-dir {{}}/three --dataset npz --synthetic {{}}/cifar/train.npz", "train.npz: labels run"),
    (f"{REAL} --data-dir {{}}/many --dataset npz --dra-weight 1", "--dataset npz: expected --teacher FILE"),
    (f"{REAL} --data-dir {{}}/many --dataset npz --dra-weight 1 --teacher {EDM}",
     "cond_vp.pkl: is for 32 px, 10 classes, not 32 and 43; --teacher-unconditional"),
    (f"{REAL} --batch-size 128 --accumulate 3", "--batch-size 128: expected a multiple of 1 process(es) x"),
    (f"{REAL} --out {{}}/file/out", "file"), (f"{SMOKE} --eps 255", "--eps: '255'"),
    (f"{SMOKE} --arch resnet-18", "--arch resnet-18: expected vit-b-2, or wrn-DEPTH-WIDTH"),
]
if not torch.cuda.is_available():
    MISTAKES.append((f"{SMOKE} --device cuda", "--device cuda: there is no CUDA device here"))


def test_a_mistake_on_the_command_line_gives_one_line_and_writes_nothing(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the default --out would show up
    before = contents(wrong)
    for command, named in MISTAKES:
        assert_one_line("train_cifar.py", command.replace("{}", str(wrong)).split(), named)
    assert contents(wrong) == before and not list(tmp_path.iterdir())


def test_a_download_that_fails_is_one_line_that_names_the_folder(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise RuntimeError("no route to host")
    monkeypatch.setattr(train_cifar.torchvision.datasets, "CIFAR10", fails)
    with pytest.raises(InputError, match=f"^--data-dir {tmp_path}: .*no route to host"):
        make_data(tmp_path)


IMAGE, LABEL = np.zeros((5, 32, 32, 3), np.uint8), np.zeros(5, np.int64)
MAPPED = "'image' cannot be mapped: "
BAD_ARRAYS = {  # what is wrong: arrays of the file, and what the message says
    "images missing": ({"label": LABEL}, MAPPED),
    "labels missing": ({"image": IMAGE}, "'label' cannot be mapped: "),
    "float images": ({"image": IMAGE / 255, "label": LABEL}, "image is float64"),
    "channels first": ({"image": IMAGE.transpose(0, 3, 1, 2).copy(), "label": LABEL},
                       r"image is uint8 \(5, 3, 32, 32\), .* expected uint8 \(N, 32, 32, 3\)"),
    "one image": ({"image": IMAGE[0], "label": LABEL}, r"image is uint8 \(32, 32, 3\)"),
    "fewer labels": ({"image": IMAGE, "label": LABEL[:4]}, r"label int64 \(4,\)"),
    "one-hot labels": ({"image": IMAGE, "label": np.eye(5, dtype=np.int64)}, r"label int64 \(5, 5\)"),
    "float labels": ({"image": IMAGE, "label": LABEL / 1}, r"label float64 \(5,\); .*integers"),
    "label too large": ({"image": IMAGE, "label": LABEL + 10}, "labels run from 10 to 10, expected 0 to 9"),
    "negative label": ({"image": IMAGE, "label": LABEL - 1}, "labels run from -1 to -1, expected 0 to 9"),
    "images as objects": ({"image": np.array([{}, []], object), "label": LABEL}, MAPPED + ".*objects"),
    "labels as objects": ({"image": IMAGE, "label": np.array(5 * [{}])},
                          "'label' cannot be mapped: .*objects"),
}


@pytest.mark.parametrize("arrays, message", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_an_npz_with_other_arrays_is_named_in_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=f"^{tmp_path / 'bad.npz'}: .*{message}") as caught:
        open_npz(tmp_path / "bad.npz", 10)
    assert "\n" not in str(caught.value)


def test_a_damaged_or_compressed_npz_is_named_in_one_line(tmp_path):
    path = tmp_path / "bad.npz"
    whole = write_npz(tmp_path / "whole.npz", 5).read_bytes()
    np.savez_compressed(tmp_path / "small.npz", image=IMAGE, label=LABEL)
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as other:
        other.writestr("image.npy", b"not an array")
    for content, message in (
            (whole[:9000], MAPPED), (b"nothing", MAPPED), (b"", MAPPED), (HTML, r"is a web page \(HTML\)"),
            (POINTER, "is a Git LFS pointer"), ((tmp_path / "zip.npz").read_bytes(), MAPPED),
            ((tmp_path / "small.npz").read_bytes(), MAPPED + ".*it is compressed"),
            (whole.replace(b"'shape': (5, 32,", b"'shape': (9, 32,"), MAPPED)):  # more than the file holds
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"^{path}: .*{message}") as caught:
            open_npz(path, 10)
        assert "\n" not in str(caught.value)


def test_no_reader_runs_anything_in_a_hostile_file(tmp_path):
    """Teachers, synthetic images, and last.pt."""
    out = tmp_path / "out"
    out.mkdir()

    def read_all(path):
        for read in (lambda: load_teacher(parse_args(["--smoke", "--teacher", str(path)])),
                     lambda: open_npz(path, 10)):
            with pytest.raises((ValueError, OSError), match=path.name):
                read()
        shutil.copy(path, out / "last.pt")
        train_cifar.resume(out, {"recipe": {}}, None)
    assert_never_run(read_all, tmp_path)


@pytest.mark.slow
def test_the_script_ends_with_code_2_and_one_line_and_needs_neither_timm_nor_matplotlib(tmp_path):
    code = ("import runpy, sys; sys.modules.update(timm=None, matplotlib=None); "
            "runpy.run_path('train_cifar.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, "--smoke", "--teacher", tmp_path / "none.pkl", "--out",
                           tmp_path / "never"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "none.pkl" in done.stderr
    assert not (tmp_path / "never").exists()


def in_each_process(job, folder):
    """What torchrun starts: `torchrun --nproc-per-node 2 tests/test_train_cifar.py JOB FOLDER`."""
    torch.set_num_threads(1)
    make_smaller()
    if job == "compute":
        dist.init_process_group("gloo")
    {"compute": compute, "train_and_die": train_and_die}[job](Path(folder))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    in_each_process(*sys.argv[1:])
