"""What the attack, the losses, the teacher, the averaging and the optimizers promise."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_cifar
from edm_encoder import EDMEncoder
from train_cifar import (averaging_decay, build_model, build_optimizer, build_projector, build_scheduler,
                         crop_and_flip, dra_loss, kl_divergence, margin_loss, pgd, set_batchnorm,
                         trades_attack, trades_loss, train_step, update_average)

EPS, STEP_SIZE = 8 / 255, 2 / 255


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


def step_arguments(*flags):
    """What `train_step` reads of the settings, without a teacher unless a flag says otherwise."""
    return train_cifar.parse_args(["--device", "cpu", "--dra-weight", "0", *flags])


def take_step(model, images, args, projectors=nn.ModuleList(), teacher=None, **batch):
    """One training step on eight images of classes 0 to 7. Returns its numbers."""
    given = {"labels": torch.arange(8), "start": start_near(images), "teacher_noise": []}
    batch = SimpleNamespace(images=images, **given | batch)
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = build_optimizer(args, model, projectors)
    return train_step(model, averaged, projectors, teacher, optimizer, batch, 0.0, args)


# ----------------------------------------------------------------------------------------------------- attack

def test_attack_stays_within_eps_and_the_pixel_range_and_raises_the_divergence(model, images):
    start = start_near(images)
    adv = trades_attack(model, images, start, EPS, STEP_SIZE, 10)
    assert (adv - images).abs().max() <= EPS + 1e-6
    assert adv.min() >= 0 and adv.max() <= 1 and not adv.requires_grad
    divergence = [kl_divergence(model(images), model(x), "sum").item() for x in (start, adv)]
    assert divergence[1] > 10 * divergence[0]


def test_attack_uses_batch_statistics_and_leaves_no_trace(model, images):
    set_batchnorm(model, momentum=1.0)
    before, start = copy.deepcopy(model.state_dict()), start_near(images)
    adv = trades_attack(model, images, start, EPS, STEP_SIZE, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.batchnorm.track_running_stats
    with_running = trades_attack(model.eval(), images, start, EPS, STEP_SIZE, 2)
    assert not torch.equal(adv, with_running), "running statistics give another attack"


def test_attack_needs_no_weight_gradients(model, images):
    """Seen from inside the attack, every weight is frozen, so that neither autograd nor a compiled graph
    computes its gradient."""
    seen = []
    look = lambda *_: seen.append(any(p.requires_grad for p in model.parameters()))
    model.logits.register_forward_hook(look)
    trades_attack(model, images, images, EPS, STEP_SIZE, 2)
    assert seen == [False] * 3, "one clean forward and one for each step"


def test_pgd_follows_the_sign_of_the_gradient_to_the_corner_of_the_ball():
    images = torch.tensor([[[[0.5, 0.99, 0.01]]]])
    direction = torch.tensor([[[[1.0, 2.0, -3.0]]]])
    adv = pgd(lambda x: (x * direction).sum(), images, images, 0.1, 0.03, 5)
    torch.testing.assert_close(adv, torch.tensor([[[[0.6, 1.0, 0.0]]]]))


# ----------------------------------------------------------------------------------------------------- losses

def test_trades_without_perturbation_is_cross_entropy(model, images):
    logits, labels = model(images), torch.arange(8)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(trades_loss(logits, logits, labels, beta=5, label_smoothing=0.1), expected)


def test_trades_divergence_is_kl_from_clean_to_adversarial():
    clean, adv, labels = torch.randn(4, 10).double(), torch.randn(4, 10).double(), torch.arange(4)
    p, q = clean.softmax(1), adv.softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    expected = nn.functional.cross_entropy(clean, labels) + 6 * kl
    loss = trades_loss(clean, adv, labels, 6, 0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_trades_gradient_is_finite_where_a_probability_underflows():
    clean = torch.tensor([[200.0, -200.0]], requires_grad=True)
    adv = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    trades_loss(clean, adv, torch.tensor([0]), 5, 0.0).backward()
    assert clean.grad.isfinite().all() and adv.grad.isfinite().all()
    naive = torch.tensor([[200.0, -200.0]], requires_grad=True)
    nn.functional.kl_div(adv.detach().log_softmax(1), naive.softmax(1), reduction="batchmean").backward()
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


def test_margin_pushes_only_images_that_are_still_classified_correctly():
    """Cut off at 0, as in DM-AT: where the attack has won, the gradient is zero and PGD stays where it is."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]], requires_grad=True)
    loss = margin_loss(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss == -2 and torch.equal(logits.grad, torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


# --------------------------------------------------------------------------------------------- the whole step

def test_step_with_alignment_trains_model_and_projectors_but_not_the_teacher(model, images):
    teacher = EDMEncoder("dec.16x16_in1", img_resolution=32, label_dim=10, model_channels=8,
                         channel_mult=[1, 2], num_blocks=1)
    projectors = nn.ModuleList(build_projector(64, teacher.width) for _ in range(2))
    averaged = copy.deepcopy(model).requires_grad_(False)
    args = train_cifar.parse_args(["--extra-sigma", "--device", "cpu", "--attack-steps", "2"])
    optimizer = build_optimizer(args, model, projectors)
    noise = [(0.06, torch.randn(images.shape)), (torch.rand(8) + 0.1, torch.randn(images.shape))]
    batch = SimpleNamespace(images=images, labels=torch.arange(8), start=start_near(images),
                            teacher_noise=noise)
    before = [copy.deepcopy(module.state_dict()) for module in (model, projectors, teacher)]
    settings = optimizer, batch, 0.5, args
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


def test_teacher_can_be_kept_from_the_labels(model, images):
    seen = []

    def teacher(images, labels, sigma, noise):
        seen.append(labels)
        return torch.ones(len(images), 4)
    for flags in ([], ["--teacher-unconditional"]):
        args = step_arguments("--attack-steps", "1", "--dra-weight", "1", *flags)
        projectors = nn.ModuleList([build_projector(64, 4)])
        take_step(model, images, args, projectors, teacher, teacher_noise=[(0.06, images)])
    assert torch.equal(seen[0], torch.arange(8)) and seen[1] is None


def test_accuracies_of_a_step_are_in_percent(model, images):
    """Clean accuracy is that of the clean forward, robust accuracy that on the attacked images."""
    before = copy.deepcopy(model)
    clean_logits = before(images)
    labels = clean_logits.argmax(dim=1)  # all right, until they are attacked
    adv = trades_attack(before, images, start_near(images), EPS, STEP_SIZE, 10, clean_logits)
    robust = 100 * (before(adv).argmax(dim=1) == labels).float().mean()
    assert 0 < robust < 100
    numbers = take_step(model, images, step_arguments(), labels=labels)
    assert numbers["train_clean"] == 100 and numbers["train_robust"] == robust


def test_compiled_features_take_the_same_step(model, images):
    """As on a GPU, but through a backend that needs no C++ compiler: same graph capture, eager kernels."""
    compiled = copy.deepcopy(model)
    compiled.features = torch.compile(compiled.features, backend="aot_eager")
    gradients, start = [], start_near(images)
    for network in (model, compiled):
        adv = trades_attack(network, images, start, EPS, STEP_SIZE, 2)
        trades_loss(network(images), network(adv), torch.arange(8), 5, 0.1).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(compiled.state_dict(), model.state_dict())


# ---------------------------------------------------------------------------- averaging, schedule, optimizers

def test_average_shares_no_storage_with_the_live_model(model):
    averaged = copy.deepcopy(model).requires_grad_(False)
    for _ in range(2):
        update_average(averaged, model, 0.9)
        storages = [{t.untyped_storage().data_ptr() for t in [*m.parameters(), *m.buffers()]}
                    for m in (averaged, model)]
        assert not storages[0] & storages[1]
    model.batchnorm.running_mean.add_(1)
    assert averaged.batchnorm.running_mean.abs().max() == 0
    update_average(averaged, model, 0.9)
    same = torch.equal(averaged.batchnorm.running_mean, model.batchnorm.running_mean)
    assert same, "running statistics are copied, not averaged"


def test_averaging_follows_the_model_through_the_warm_up_and_then_slows_down():
    assert [averaging_decay(step, 3, 0.995) for step in range(2)] == [0, 0]
    assert [averaging_decay(step, 3, 0.995) for step in range(2, 5)] == [1 / 10, 2 / 11, 3 / 12]
    assert averaging_decay(100_000, 3, 0.995) == 0.995


def one_cycle(epoch, epochs, peak):
    """Rate and momentum in an epoch (from 0) of a run, by hand: the rise ends at epoch 0.025 * epochs - 1."""
    top, last = 0.025 * epochs - 1, epochs - 1
    along = lambda start, end, share: end + (start - end) * (1 + math.cos(math.pi * share)) / 2
    if top >= epoch:  # only where there are 40 epochs or more
        share = epoch / top if top else 0
        return along(peak / 25, peak, share), along(0.95, 0.85, share)
    share = (epoch - top) / (last - top)
    return along(peak, peak / 250_000, share), along(0.85, 0.95, share)


@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 39, 40, 41, 80, 200, 400, 2400])
def test_rate_and_momentum_follow_one_cycle(epochs):
    """Also with 40 epochs, where torch's own class divides by zero for DM-AT's setting."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9, nesterov=True)
    scheduler, seen = build_scheduler(step_arguments(), optimizer, epochs), []
    for epoch in range(epochs):
        seen.append([optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]])
        optimizer.step()
        if epoch < epochs - 1:
            scheduler.step()
    expected = [one_cycle(epoch, epochs, 0.2) for epoch in range(epochs)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-5, atol=1e-8)
    assert seen[-1] == pytest.approx([0.2 / 250_000, 0.95])


@pytest.fixture
def observed(monkeypatch, tmp_path):
    """Run train_cifar.py on 20 drawn images with a training step that changes nothing. Returns a function of
    flags: a dict per step of what it was given, and the run's last.pt."""
    images, labels = train_cifar.draw_smoke_images(20, seed=0)
    np.savez(tmp_path / "train.npz", image=images, label=labels)

    def step(model, averaged, projectors, teacher, optimizer, batch, ema_decay, args):
        group = optimizer.param_groups[0]
        steps.append({"lr": group["lr"], "momentum": group.get("momentum"), "ema_decay": ema_decay,
                      "batchnorm": model.batchnorm.momentum if hasattr(model, "batchnorm") else None})
        optimizer.step()  # or the scheduler would complain
        return dict.fromkeys(("loss", "train_clean", "train_robust"), torch.zeros(()))
    monkeypatch.setattr(train_cifar, "train_step", step)
    monkeypatch.setattr(train_cifar, "evaluate", lambda *_: (0.0, 0.0))
    steps = []

    def run(*flags):
        steps.clear()
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        train_cifar.main(["--device", "cpu", "--arch", "wrn-10-1", "--dra-weight", "0", "--batch-size", "10",
                          "--data-dir", str(tmp_path), "--out", str(out), *flags])
        return list(steps), torch.load(out / "last.pt", weights_only=True)
    return run


def assert_cycle(steps, epochs, peak):
    """Two steps an epoch had the rate and the momentum of their epoch."""
    rates, momenta = zip(*[one_cycle(i // 2, epochs, peak) for i in range(len(steps))])
    assert [step["lr"] for step in steps] == pytest.approx(rates, rel=1e-5)
    assert [step["momentum"] for step in steps] == pytest.approx(momenta, rel=1e-5)


@pytest.mark.parametrize("epochs", [1, 3, 40, 41])
def test_a_run_sets_rate_and_momentum_by_epoch(observed, epochs, recwarn):
    """The log says which rate was used, not which one comes next."""
    steps, saved = observed("--epochs", str(epochs), "--lr", "0.1")
    log = saved["log"]
    assert_cycle(steps, epochs, 0.1)
    assert len({step["lr"] for step in steps}) == epochs
    assert [row["lr"] for row in log] == [step["lr"] for step in steps[1::2]]
    assert [row["epoch"] for row in log] == list(range(1, epochs + 1))
    assert saved["optimizer"]["param_groups"][0]["lr"] == steps[-1]["lr"], "no further step at the end"
    assert not [warning for warning in recwarn if "scheduler" in str(warning.message)]


@pytest.mark.parametrize("max_steps", [1, 2, 3, 5])
def test_runs_of_a_few_steps_count_a_begun_epoch_as_one(observed, max_steps):
    steps, saved = observed("--max-steps", str(max_steps))
    assert len(steps) == max_steps
    assert_cycle(steps, math.ceil(max_steps / 2), 0.2)
    rows = [step for step in range(1, max_steps + 1) if step % 2 == 0 or step == max_steps]
    assert [row["step"] for row in saved["log"]] == rows


@pytest.mark.parametrize("steps, rise", [(300, 10), (40, 4), (5, 1), (2, 1), (1, 1)])
def test_a_vits_rate_rises_in_five_epochs_and_falls_to_a_tenth(observed, steps, rise):
    """An epoch has two steps here. Rise and fall are of Wu et al.: from 1e-6 to 1e-4 to 1e-5, in every step.
    The average has its decay from the first step on."""
    seen, _ = observed("--arch", "vit-tiny-2", "--max-steps", str(steps))
    expected = [1e-6 + (1e-4 - 1e-6) * i / rise for i in range(rise)]
    fall = np.linspace(0, np.pi, steps - rise)
    expected += list(1e-5 + 0.5 * (1e-4 - 1e-5) * (1 + np.cos(fall)))
    assert [step["lr"] for step in seen] == pytest.approx(expected)
    assert {step["momentum"] for step in seen} == {None}, "Lion's betas stay"
    assert {step["ema_decay"] for step in seen} == {0.9999}


def test_first_step_replaces_the_running_statistics_and_averaging_waits_for_the_warm_up(observed):
    steps, _ = observed("--epochs", "60")
    assert [step["batchnorm"] for step in steps] == [1.0] + 119 * [0.01]
    assert [step["ema_decay"] for step in steps[:4]] == [0, 0, 1 / 10, 2 / 11], "2.5 % of 120 steps are 3"


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


@pytest.mark.parametrize("flags, passes", [([], 12), (["--attack-steps", "3"], 5),
                                           (["--attack-steps", "0"], 2), (["--eps", "0"], 2)])
def test_one_clean_forward_serves_attack_and_loss(model, images, flags, passes):
    """1 clean, 10 in the attack, 1 adversarial. In the arithmetic of the README, where a backward pass to the
    image or to the weights costs as much as a forward one, that is 2 x 10 + 2 x 3 = 26 passes."""
    count = []
    model.init_conv.register_forward_hook(lambda *_: count.append(1))
    take_step(model, images, step_arguments(*flags))
    assert len(count) == passes


def test_the_attack_finds_the_same_with_logits_handed_to_it(model, images):
    with torch.no_grad():
        clean_logits = copy.deepcopy(model)(images)
    settings = images, start_near(images), EPS, STEP_SIZE, 3
    assert torch.equal(trades_attack(model, *settings), trades_attack(model, *settings, clean_logits))


def test_without_attack_steps_and_beta_a_step_is_plain_training(model, images):
    """The "standard supervised" classifier of Fig. 3 and 4: x' = x, and cross-entropy alone."""
    logits = copy.deepcopy(model)(images)
    expected = nn.functional.cross_entropy(logits, torch.arange(8), label_smoothing=0.1)
    numbers = take_step(model, images, step_arguments("--attack-steps", "0", "--beta", "0"))
    torch.testing.assert_close(numbers["loss"], expected.detach())
    assert numbers["train_clean"] == numbers["train_robust"]




def test_batch_norm_alone_has_no_weight_decay_under_sgd(model):
    decayed, undecayed = build_optimizer(step_arguments(), model).param_groups
    assert decayed["weight_decay"] == 5e-4 and undecayed["weight_decay"] == 0
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert set(undecayed["params"]) == norms and set(decayed["params"]) == set(model.parameters()) - norms


def test_two_steps_of_a_vit_move_and_clip_and_decay_as_wu_et_al_say(images):
    """Read off the weights after two steps. Lion (arXiv 2302.06675, algorithm 2, betas 0.95 and 0.98) moves
    each weight by the rate, in the direction of a sign. The gradient, the projector's included, is scaled down
    to the norm of --max-norm. Matrices alone shrink by rate * 0.5: not the position embedding, LayerScale,
    norms and biases."""
    args = step_arguments("--arch", "vit-tiny-2", "--lr", "0.01", "--attack-steps", "1", "--max-norm", "0.1")
    torch.manual_seed(0)
    model = build_model("vit-tiny-2", 10)
    projectors = nn.ModuleList([train_cifar.build_projector(64, 5)])
    averaged, optimizer = copy.deepcopy(model), build_optimizer(args, model, projectors)
    named = [*model.named_parameters(), *((f"projector.{n}", p) for n, p in projectors.named_parameters())]
    weights = {name: p.detach().clone() for name, p in named}
    momentum = {name: torch.zeros_like(p) for name, p in named}
    matrices = {name for name, p in named if p.ndim > 1 and name != "pos_embed"}
    assert len(matrices) == 1 + 2 * 4 + 1 + 3, "patches; qkv, proj, fc1, fc2 of each block; head; projector"
    teacher, labels = lambda x, *_: x.mean(dim=(2, 3)) @ torch.ones(3, 5), torch.arange(8)
    batch = SimpleNamespace(images=images, labels=labels, start=images,
                            teacher_noise=[(0.1, torch.zeros_like(images))])
    for _ in range(2):
        train_cifar.train_step(model, averaged, projectors, teacher, optimizer, batch, 0.5, args)
        gradient = {name: p.grad for name, p in named}  # after clipping
        norm = torch.cat([g.flatten() for g in gradient.values()]).norm()
        assert norm.item() == pytest.approx(0.1, rel=1e-4)
        for name, p in named:
            weights[name] *= 1 - 0.01 * 0.5 * (name in matrices)
            weights[name] -= 0.01 * (0.95 * momentum[name] + 0.05 * gradient[name]).sign()
            momentum[name] = 0.98 * momentum[name] + 0.02 * gradient[name]
            torch.testing.assert_close(p.data, weights[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], momentum[name])


# -------------------------------------------------------------------------------------------- models and data

def test_evaluation_attacks_the_held_out_images_with_40_steps_on_the_margin_loss(model):
    """The number that selects best.pt, of a model that is right about 6 of 10 images until it is attacked.
    Nothing of the model changes."""
    args = step_arguments("--eps", "0.008", "--step-size", "0.0004")
    images = torch.from_numpy(train_cifar.draw_smoke_images(10, seed=0)[0]).permute(0, 3, 1, 2) / 255
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


def test_models_take_unit_range_images_and_agree_with_their_parts(model, images):
    for network in (model.eval(), build_model("vit-b-2", 100, "cifar100").eval()):
        features = network.features(images[:2])
        assert features.dtype == torch.float32 and torch.equal(network.head(features), network(images[:2]))
        assert not {"mean", "std"} & set(network.state_dict()), "keys are DM-AT's and RobustBench's, no more"
        assert not any("module." in name or "model." in name for name in network.state_dict())
    assert features.shape == (2, 768) and network(images[:2]).shape == (2, 100)


def vit_by_hand(w, x, depth, heads):
    """Features and logits of a ViT from its state dict `w`, in plain operations."""
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    patches = x.reshape(len(x), 3, 16, 2, 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(x), 256, 12)
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"] + w["pos_embed"]
    for block in (f"blocks.{i}" for i in range(depth)):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        q, k, v = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v)]  # [B, heads, 256, D]
        mixed = (q @ k.transpose(2, 3) / q.shape[-1]**0.5).softmax(dim=-1) @ v
        x = x + w[f"{block}.ls1.gamma"] * linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = nn.functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"), approximate="tanh")
        x = x + w[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    features = norm(x, "norm").mean(dim=1)
    return features, linear(features, "head")


@torch.no_grad()
def test_vit_b_2_is_that_of_wu_et_al():
    """No class token, LayerScale, GELU in its tanh form, and the mean of the normalised tokens of an image in
    [0, 1]. The weights are far from their start, or LayerScale's 1e-4 would hide the blocks."""
    torch.manual_seed(0)
    network, images = build_model("vit-b-2", 10).eval(), torch.rand(2, 3, 32, 32)
    assert sum(p.numel() for p in network.parameters()) == 85_288_714
    for name, p in network.named_parameters():
        nn.init.normal_(p, mean=1.0 if name.endswith(("norm1.weight", "gamma")) else 0.0, std=0.05)
    features, logits = vit_by_hand(network.state_dict(), images, depth=12, heads=12)
    torch.testing.assert_close(network.features(images), features, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network(images), logits, rtol=1e-3, atol=1e-3)


def test_a_vit_starts_from_a_normal_of_deviation_002_cut_at_two_deviations():
    """Cut, its deviation is 0.0176. Biases start at 0, LayerScale at 1e-4."""
    weights = dict(build_model("vit-b-2", 10).named_parameters())
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "head.weight"):
        assert weights[name].std().item() == pytest.approx(0.0176, rel=0.05), name
        assert weights[name].abs().max() <= 0.04
    assert weights["blocks.3.ls2.gamma"].eq(1e-4).all()
    assert all(p.eq(0).all() for name, p in weights.items() if name.endswith("bias"))


@pytest.mark.parametrize("arch", ["vit-tiny-2", "wrn-10-1"])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole_one(images, arch):
    """A ViT's up to rounding. A WideResNet normalises each piece by itself: its gradient is the mean of two
    steps, one for the images with even and one for those with odd numbers. Without attack steps, whose signs
    would amplify the rounding."""
    torch.manual_seed(0)
    network, noise = build_model(arch, 10), torch.randn(8, 3, 32, 32)
    projectors = nn.ModuleList([train_cifar.build_projector(64, 5)])
    teacher = lambda x, labels, sigma, noise: (x + sigma * noise).mean(dim=(2, 3)) @ torch.ones(3, 5)
    whole = {"images": images, "labels": torch.arange(8), "teacher_noise": [(0.1, noise)]}
    even, odd = [{"images": images[k::2], "labels": torch.arange(8)[k::2],
                  "teacher_noise": [(0.1, noise[k::2])]} for k in (0, 1)]

    def step(part, *flags):
        model = copy.deepcopy(network)
        args = step_arguments("--dra-weight", "1", "--teacher", "x", "--attack-steps", "0", "--arch", arch,
                              "--max-norm", "0", *flags)
        numbers = take_step(model, args=args, projectors=copy.deepcopy(projectors), teacher=teacher,
                            **{"start": part["images"]} | part)
        return model, numbers["loss"], torch.cat([p.grad.flatten() for p in model.parameters()])
    model, loss, gradient = step(whole, "--accumulate", "2")
    if arch == "wrn-10-1":
        (first, *a), (_, *b) = step(even), step(odd)
        expected = [(x + y) / 2 for x, y in zip(a, b)]
        for mine, theirs in zip(model.buffers(), first.buffers()):
            assert torch.equal(mine, theirs), "the first piece alone updates the running statistics"
    else:
        expected = step(whole)[1:]
        in_four = step(whole, "--accumulate", "4")[1:]
        torch.testing.assert_close((loss, gradient), in_four, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close([loss, gradient], [*expected], rtol=1e-4, atol=1e-6)


def test_vit_b_2_at_full_size_makes_a_step_in_four_pieces(images):
    network, sizes = build_model("vit-b-2", 10), []
    network.patch_embed.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    numbers = take_step(network, images, step_arguments("--arch", "vit-b-2", "--accumulate", "4",
                                                        "--attack-steps", "1"))
    assert numbers["loss"].isfinite() and sizes == 4 * 3 * [2], "clean, attack, adversarial; two images each"


def test_bfloat16_stays_inside_the_backbone(model, images):
    with torch.no_grad():
        exact = model(images)
        model.amp = True
        rough = model(images)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("flags, expected", [(["--amp"], torch.bfloat16), ([], torch.float32)])
def test_with_amp_a_cpu_computes_backbone_and_teacher_in_bfloat16_and_the_rest_in_float32(flags, expected):
    """By default a CPU computes in float32. Attack steps included, each forward is looked at."""
    args = train_cifar.parse_args(["--smoke", "--batch-size", "8", "--attack-steps", "1", "--extra-sigma",
                                   *flags])
    data, teacher = train_cifar.Data(args, torch.device("cpu")), train_cifar.load_teacher(args)
    run, dtypes = train_cifar.build_run(args, data, teacher), {}

    def note(name, output):
        dtypes.setdefault(name, set()).add(output.dtype)
    for name, layer in {"convolution": run.model.layer[2].block[0].conv_1, "logits": run.model.logits,
                        "projector": run.projectors[1][4], "teacher": teacher.model.enc["32x32_conv"],
                        "target": teacher}.items():
        layer.register_forward_hook(lambda module, inputs, output, name=name: note(name, output))
    run.model.logits.register_forward_hook(lambda module, inputs, output: note("features", inputs[0]))
    numbers = train_step(run.model, run.averaged, run.projectors, teacher, run.optimizer, data.batch(0), 0.5,
                         args)
    assert dtypes["convolution"] == dtypes["teacher"] == {expected}
    full = {torch.float32}
    assert dtypes["features"] == dtypes["logits"] == dtypes["projector"] == dtypes["target"] == full
    assert {value.dtype for value in numbers.values()} == {p.dtype for p in run.model.parameters()} == full


@pytest.mark.parametrize("arch", ["wrn-28", "wrn-29-10", "wrn-4-1", "resnet18", "wrn-10-0", ""])
def test_unknown_arch_is_named(arch):
    with pytest.raises(train_cifar.InputError, match="--arch"):
        build_model(arch, 10)


def test_crop_and_flip_move_pixels_and_invent_none():
    images = np.random.default_rng(0).integers(1, 256, (2, 32, 32, 3), np.uint8)
    centre, never = [(4, 4), (4, 4)], [False, False]
    assert np.array_equal(crop_and_flip(images, centre, never), images)
    flipped = crop_and_flip(images, centre, [False, True])
    assert np.array_equal(flipped[0], images[0]) and np.array_equal(flipped[1], images[1, :, ::-1])
    moved = crop_and_flip(images, [(0, 8), (6, 4)], never)
    assert np.array_equal(moved[0, 4:, :-4], images[0, :-4, 4:]), "row 0: down by 4; column 8: left by 4"
    assert not moved[0, :4].any() and not moved[0, :, -4:].any(), "the border is black"
    assert np.array_equal(moved[1, :-2], images[1, 2:]) and not moved[1, -2:].any()
    assert moved.dtype == np.uint8 and moved.shape == images.shape
