"""train_cifar.py takes DM-AT's steps: checked against numbers from DM-AT's own code (tests/fixtures/README.md)."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_cifar
from train_cifar import build_model, build_optimizer, averaging_decay, train_step, trades_attack, trades_loss

FIXTURES = Path(__file__).parent / "fixtures"
EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10


@pytest.fixture(scope="module")
def upstream():
    with np.load(FIXTURES / "dmat_trades_steps_wrn_10_1.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def part(upstream, prefix):
    return {name.removeprefix(prefix): value for name, value in upstream.items() if name.startswith(prefix)}


def relative_error(ours, theirs):
    names = list(theirs)
    ours, theirs = [torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (ours, theirs)]
    return ((ours - theirs).norm() / theirs.norm()).item()


def initial_model(upstream):
    model = build_model("wrn-10-1", 10)
    model.load_state_dict(part(upstream, "init/"), strict=True)
    return model


def start_of(step):
    return (step["image"] + step["init_noise"]).clamp(0, 1)


def test_attack_and_loss_are_dmats(upstream):
    step, model = part(upstream, "step0/"), initial_model(upstream)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adv = trades_attack(model, step["image"], start_of(step), EPS, STEP_SIZE, STEPS)
    assert (adv != step["adversarial"]).float().mean() < 0.01, "signs of gradients near zero may differ, others not"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the attack changes nothing in the model"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    clean_logits, adv_logits = model(step["image"]), model(step["adversarial"])
    torch.testing.assert_close(clean_logits, step["logits_clean"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adv_logits, step["logits_adv"], rtol=1e-4, atol=1e-5)
    loss = trades_loss(clean_logits, adv_logits, step["label"], beta=5, label_smoothing=0.1)
    assert abs(loss.item() - step["loss"].item()) < 1e-4
    loss.backward()
    assert relative_error({name: p.grad for name, p in model.named_parameters()}, part(upstream, "grad0/")) < 1e-3


def test_two_steps_end_at_dmats_weights(upstream):
    """The whole shipped step twice: attack, two forwards, Nesterov SGD without decay on batch norm, averaging from step 1."""
    model = initial_model(upstream)
    averaged = build_model("wrn-10-1", 10).requires_grad_(False)
    averaged.load_state_dict(model.state_dict())
    args = train_cifar.parse_args(["--dra-weight", "0", "--lr", "0.05", "--device", "cpu"])
    optimizer = build_optimizer(args, model)
    for i in range(2):
        step = part(upstream, f"step{i}/")
        batch = SimpleNamespace(images=step["image"], labels=step["label"], start=start_of(step), teacher_noise=[])
        numbers = train_step(model, averaged, nn.ModuleList(), None, optimizer, batch, averaging_decay(i, 1, 0.995), args)
        assert abs(numbers["loss"].item() - step["loss"].item()) < 1e-4
    final = part(upstream, "final/")
    assert final["batchnorm.num_batches_tracked"] == 4 == model.batchnorm.num_batches_tracked, "two updates a step, none in the attack"
    assert relative_error(model.state_dict(), final) < 1e-3
    assert relative_error(averaged.state_dict(), part(upstream, "final_ema/")) < 1e-3
    moved = part(upstream, "init/")
    assert relative_error(model.state_dict(), {name: moved[name] for name in final}) > 1e-2, "the bounds above could have failed"


def test_dmat_checkpoint_gives_its_logits():
    saved = torch.load(FIXTURES / "dmat_wrn_10_1_cifar10.pt", weights_only=True)["model_state_dict"]
    model = build_model("wrn-10-1", 10)
    model.load_state_dict({name.removeprefix("module.0."): value for name, value in saved.items()}, strict=True)
    reference = np.load(FIXTURES / "dmat_wrn_10_1_cifar10_reference.npz")
    logits = model.eval()(torch.from_numpy(reference["image"]))
    torch.testing.assert_close(logits, torch.from_numpy(reference["logits"]), rtol=1e-4, atol=1e-5)


def test_wrn_28_10_has_dmats_parameter_names():
    manifest = json.loads((FIXTURES / "dmat_wrn_28_10_manifest.json").read_text())
    with torch.device("meta"):
        model = build_model("wrn-28-10", 10)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == manifest
