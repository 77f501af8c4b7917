"""experiments/robustbench_models.py: each layout gives the logits of its definition, and files load as their
authors write them."""
import itertools
import runpy
from pathlib import Path

import pyautoattack
import pytest
import torch
import torch.nn.functional as F

import train_cifar  # the script finds it, once somebody has imported it
from eval_autoattack import InputError, load_classifier

MODELS = Path(__file__).parent.parent / "experiments" / "robustbench_models.py"
build_model = runpy.run_path(str(MODELS))["build_model"]


def randomise(model):
    """No BatchNorm keeps its 1 and 0, which would hide mistakes. Returns the state dict."""
    random = torch.Generator().manual_seed(0)
    for name, value in model.eval().state_dict().items():
        if value.ndim == 1:
            middle = 0.5 * (not name.endswith("running_var"))
            value += 0.2 * (torch.rand(value.shape, generator=random) - middle)
    return model.state_dict()


def close(ours, theirs):
    return (ours - theirs).abs().max() < 1e-4 * theirs.std()


def batchnorm(state, h, name, activation):
    parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return activation(F.batch_norm(h, *parts))


def logits_of(path, arch, images, dataset="cifar10"):
    """Through the evaluation's loader; features and head have to agree with the whole."""
    model = load_classifier(path, arch, dataset, MODELS)
    assert close(model.head(model.features(images)), model(images))
    return model(images)


def test_a_network_that_is_not_ours_gives_its_authors_logits():
    """The ResNet-18 that comes with pyautoattack."""
    examples = Path(pyautoattack.__path__[0], "examples")
    path, images = examples / "model_test.pt", torch.rand(3, 3, 32, 32)
    theirs = runpy.run_path(str(examples / "resnet.py"))["ResNet18"]().eval()
    theirs.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    assert close(logits_of(path, "resnet-18", images), theirs(images))


def test_the_original_wide_resnet_by_its_definition(tmp_path):
    """Names and network of its first PyTorch version, from a state dict alone; a second, unused group."""
    model, x = build_model("wrn-16-2", 10), torch.rand(2, 3, 32, 32)
    state = randomise(model)
    h = F.conv2d(x, state["conv1.weight"], padding=1)
    for block, i in itertools.product((1, 2, 3), (0, 1)):
        name, stride = f"block{block}.layer.{i}", 2 if block > 1 and i == 0 else 1
        activated = batchnorm(state, h, f"{name}.bn1", F.relu)
        inner = batchnorm(state, F.conv2d(activated, state[f"{name}.conv1.weight"], None, stride, 1),
                          f"{name}.bn2", F.relu)
        h = F.conv2d(activated, state[f"{name}.convShortcut.weight"], None, stride) if i == 0 else h
        h = h + F.conv2d(inner, state[f"{name}.conv2.weight"], padding=1)
    pooled = batchnorm(state, h, "bn1", F.relu).mean(dim=(2, 3))
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "a.pt")
    assert close(logits_of(tmp_path / "a.pt", "wrn-16-2", x),
                 F.linear(pooled, state["fc.weight"], state["fc.bias"]))
    names = set(build_model("wrn-16-2-sub", 10).state_dict()) - set(state)
    assert names == {f"sub_{name}" for name in state if name.startswith("block1.")}
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model("wrn-28-10", 10).parameters()) == 36_479_194


@pytest.mark.parametrize("dataset, classes", [("cifar10", 10), ("cifar100", 100)])
def test_preact_resnet_18_by_its_definition_in_files_of_rebuffi_et_al_and_dm_at(dataset, classes, tmp_path):
    """Also checked by hand against RobustBench 1.1.1's DMPreActResNet, with its Swish and with SiLU: the same
    logits to 2e-7."""
    model, x = build_model("preact-resnet-18", classes, dataset), torch.rand(2, 3, 32, 32)
    swish = lambda h: h * h.sigmoid()
    assert sum(p.numel() for p in model.parameters()) == {10: 12_548_426, 100: 12_594_596}[classes], (
        "as in RobustBench")
    state, data = randomise(model), train_cifar.DATASETS[dataset]
    h = (x - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    h = F.conv2d(h, state["conv_2d.weight"], padding=1)
    for layer, i in itertools.product(range(4), (0, 1)):
        name, stride = f"layer_{layer}.{i}", 2 if layer > 0 and i == 0 else 1
        pad = lambda h: F.pad(h, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        inner = F.conv2d(pad(batchnorm(state, h, f"{name}.batchnorm_0", swish)),
                         state[f"{name}.conv_2d_1.weight"], None, stride)
        inner = F.conv2d(batchnorm(state, inner, f"{name}.batchnorm_1", swish),
                         state[f"{name}.conv_2d_2.weight"], padding=1)
        h = inner + (F.conv2d(pad(h), state[f"{name}.shortcut.weight"], None, stride) if stride == 2 else h)
    expected = F.linear(batchnorm(state, h, "batchnorm", swish).mean(dim=(2, 3)), state["logits.weight"],
                        state["logits.bias"])
    for prefix, key in (("", None), ("module.", "state_dict"), ("module.0.", "model_state_dict")):
        named = {prefix + name: value for name, value in state.items()}
        torch.save({key: named} if key else named, tmp_path / "a.pt")
        assert close(logits_of(tmp_path / "a.pt", "preact-resnet-18", x, dataset), expected)


@pytest.mark.parametrize("arch", ["resnet-18", "preact-resnet-18", "wrn-10-2"])
def test_a_files_own_normalisation_counts_more_than_the_scripts(arch, tmp_path):
    model, images = build_model(arch, 10), torch.rand(2, 3, 32, 32)
    state, mean, std = randomise(model), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = model.head(model.penultimate((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)))
    torch.save(state | {"mu": mean.view(3, 1, 1), "sigma": std.view(3, 1, 1)}, tmp_path / "a.pt")
    assert close(logits_of(tmp_path / "a.pt", arch, images), expected)


def test_other_names_and_other_networks_are_refused_by_one_line(tmp_path):
    torch.save(build_model("wrn-10-2", 10).state_dict(), tmp_path / "a.pt")
    for arch, message in (("wrn-17-2", "robustbench_models.py cannot build it"),
                          ("preact-resnet-34", "preact-resnet-18"),
                          ("preact-resnet-18",
                           "a.pt: is no preact-resnet-18 for cifar10: conv_2d.weight is absent")):
        with pytest.raises(InputError, match=message) as caught:
            load_classifier(tmp_path / "a.pt", arch, "cifar10", MODELS)
        assert "\n" not in str(caught.value)
