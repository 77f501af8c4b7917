"""What eval_autoattack.py promises, in the order of the tests below:

    exactness      the result is that of the library's run_standard_evaluation, image by image, in each
                   version, with any number of classes, also after kills
    TF32           may attack; float32 judges
    verification   every adversarial image and every verdict is checked, and tampering is noticed
    checkpoints    ours, DM-AT's and RobustBench's load; others are named in one line, and none is run
    command line   says what it judges, leaves JSON and npz, overwrites nothing; two processes work as one
    ImageNet       RobustBench's protocol
"""
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pyautoattack
import pytest
import torch
from filelock import FileLock
from torch import nn

from helpers import (DMAT, FIXTURES, HTML, LFS, PAGE, POINTER, assert_never_run, assert_one_line, contents,
                     torchrun, write_npz)
import eval_autoattack
import train_cifar
from eval_autoattack import (InputError, VerificationError, evaluate, load_classifier, load_imagenet, main,
                             verify)
from train_cifar import build_model

EPS, BATCH = 8 / 255, 7
WRN = {"arch": "wrn-10-1", "dataset": "cifar10"}
THEIRS = pyautoattack.AutoAttack._set_version


def fewer_steps(attacker, version):
    """A version's settings with fewer steps, for eval_autoattack.py and for the library called directly."""
    THEIRS(attacker, version)
    attacker.apgd.n_iter = attacker.apgd_targeted.n_iter = 20
    attacker.fab.n_iter, attacker.square.n_queries = 5, 200


@pytest.fixture(scope="module", autouse=True)
def quicker():
    with mock.patch.object(pyautoattack.AutoAttack, "_set_version", fewer_steps):
        yield


# A "training script" whose model is tiny.
TINY_SCRIPT = """
import torch
from torch import nn

def build_model(arch, num_classes, dataset="cifar10"):
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 32), nn.Tanh(),
                         nn.Linear(32, num_classes))
"""


def tiny_model(seed=0, classes=10):
    namespace = {}
    exec(TINY_SCRIPT, namespace)
    torch.manual_seed(seed)
    return namespace["build_model"]("tiny", classes).eval().requires_grad_(False)


class Changed(nn.Module):
    """The tiny model, with something done to its logits."""

    def __init__(self, change):
        super().__init__()
        self.model, self.change = tiny_model(), change

    def forward(self, x):
        return self.change(self.model(x), x)


@pytest.fixture(scope="module")
def images():
    """Squares of 8 x 8 pixels, with values that an 8-bit image can hold."""
    coarse = (255 * torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))).round() / 255
    return coarse.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


@pytest.fixture(scope="module")
def labels(images):
    """What the tiny model says, but for every fifth image; so some are wrong, some fall, some survive."""
    labels = tiny_model()(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 10
    return labels


@pytest.fixture(scope="module")
def command(tmp_path_factory, images, labels):
    """Arguments for a tiny checkpoint and 20 images in a folder."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "tiny.py").write_text(TINY_SCRIPT)
    state = tiny_model().state_dict()
    torch.save({"model_state_dict": state, "arch": "tiny", "dataset": "cifar10"}, folder / "tiny.pt")
    pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    np.savez(folder / "test.npz", image=pixels, label=labels.numpy())
    return [str(folder / "tiny.pt"), "--script", str(folder / "tiny.py"), "--data-dir", str(folder),
            "--batch-size", str(BATCH), "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    main([*command, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def undisturbed(images, labels, finished):
    """The same evaluation, whose batches are read from the disk."""
    return evaluate(tiny_model(), images, labels, finished, EPS, batch_size=BATCH)


# ------------------------------------------------------------------------------------------------- exactness

def call_library(model, images, labels, batch_size, version="standard"):
    """(adversarial images, predictions) of the library."""
    library = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, version=version, seed=0)
    return library.run_standard_evaluation(images, labels, batch_size=batch_size)


def test_equals_the_library_image_by_image(images, labels, undisturbed):
    adversarial, predicted = call_library(tiny_model(), images, labels, BATCH)
    assert torch.equal(undisturbed.adversarial, adversarial) and torch.equal(undisturbed.predicted, predicted)
    robust = tiny_model()(adversarial).argmax(1) == labels
    assert torch.equal(undisturbed.broken_by == -1, robust)
    correct = tiny_model()(images).argmax(1) == labels
    assert 0 < robust.sum() < correct.sum() < len(labels), "the case is not trivial"
    assert undisturbed.accuracy["clean"] == 80
    assert undisturbed.attacks == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.slow
def test_at_full_length_too(images, labels, tmp_path, monkeypatch):
    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", THEIRS)
    some, few = images[:5], labels[:5]
    adversarial, predicted = call_library(tiny_model(), some, few, 3)
    result = evaluate(tiny_model(), some, few, tmp_path, EPS, batch_size=3)
    assert torch.equal(result.adversarial, adversarial) and torch.equal(result.predicted, predicted)


@pytest.mark.parametrize("version", ["plus", "rand"])
def test_other_versions_equal_the_librarys(images, labels, tmp_path, version):
    some, few = images[:4], labels[:4]
    adversarial, predicted = call_library(tiny_model(), some, few, 3, version)
    result = evaluate(tiny_model(), some, few, tmp_path, EPS, version=version, batch_size=3)
    assert torch.equal(result.adversarial, adversarial) and torch.equal(result.predicted, predicted)
    assert len(result.attacks) == {"plus": 6, "rand": 2}[version]


@pytest.mark.parametrize("classes, attacks", [
    (2, ["apgd-ce", "fab-t", "square"]), (3, ["apgd-ce", "fab-t", "square"]),
    (5, ["apgd-ce", "apgd-t", "fab-t", "square"])])
def test_with_few_classes_it_is_the_library_with_fewer_targets(images, tmp_path, classes, attacks):
    """All wrong classes are targets. The targeted DLR loss needs four logits."""
    model = tiny_model(classes=classes)
    some, labels = images[:6], model(images[:6]).argmax(1)
    labels[0] = (labels[0] + 1) % classes
    library = pyautoattack.AutoAttack(tiny_model(classes=classes), norm="Linf", eps=EPS, version="standard",
                                      seed=0)
    library.attacks_to_run = attacks
    library.apgd_targeted.n_target_classes = library.fab.n_target_classes = classes - 1
    adversarial, predicted = library.run_standard_evaluation(some, labels, batch_size=4)
    result = evaluate(model, some, labels, tmp_path, EPS, batch_size=4)
    assert result.attacks == attacks
    assert torch.equal(result.adversarial, adversarial) and torch.equal(result.predicted, predicted)


def test_the_attacks_of_each_version_are_the_librarys():
    for version, attacks in eval_autoattack.ATTACKS.items():
        library = pyautoattack.AutoAttack(tiny_model(), norm="Linf", eps=EPS, version=version)
        assert library.attacks_to_run == list(attacks)


@pytest.mark.parametrize("classes, remarks", [
    (3, ["2 of 9 targets in targeted attacks: there are no more",
         "without apgd-t, whose loss needs more than 3 classes"]), (43, [])])
def test_other_numbers_of_classes_go_from_train_npz_to_a_verdict(classes, remarks, tmp_path, capsys):
    """Nothing but --dataset npz tells that they are not CIFAR's: classes, mean and deviation come from the
    training images, and from the checkpoint."""
    image, _ = train_cifar.draw_smoke_images(4 * classes, seed=0)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", image=image, label=np.arange(len(image)) % classes)
    data = ["--device", "cpu", "--data-dir", str(tmp_path)]
    train_cifar.main([*data, "--dataset", "npz", "--arch", "wrn-10-1", "--dra-weight", "0", "--max-steps",
                      "2", "--batch-size", "8", "--attack-steps", "1", "--out", str(tmp_path / "run")])
    best = tmp_path / "run" / "best.pt"
    model = load_classifier(best)
    pixels = torch.from_numpy(image) / 255
    torch.testing.assert_close(model.mean.flatten(), pixels.mean(dim=(0, 1, 2)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.std.flatten(), pixels.std(dim=(0, 1, 2)), rtol=1e-4, atol=1e-4)
    assert model.info.num_classes == classes and model(torch.zeros(1, 3, 32, 32)).shape == (1, classes)
    main([str(best), *data, "--batch-size", "5"])
    result = json.loads((tmp_path / "run" / "best.pt.autoattack" / "result.json").read_text())
    assert result["reservations"] == remarks and result["eps"] == "8/255"
    assert result["images"] == 4 * classes and (result["autoattack_acc"] is None) == bool(remarks)


def test_a_random_model_is_remarked_upon_and_judged_by_rand(images, labels, tmp_path):
    model, few, their = Changed(lambda z, x: z + 0.3 * torch.randn(len(x), 10)), images[:8], labels[:8]
    for version in ("standard", "rand"):
        (tmp_path / version).mkdir()
        result = evaluate(model, few, their, tmp_path / version, EPS, ["apgd-ce"], version, batch_size=8)
        assert any("randomized" in flag for flag in result.flags) == (version == "standard")
    verify(model, few, their, result, EPS, 8, random=True)
    with pytest.raises(VerificationError, match="do not repeat"):
        for _ in range(50):  # it is random: some repetition will disagree
            verify(model, few, their, result, EPS, 8)


def test_a_killed_evaluation_continues_to_the_same_result(images, labels, undisturbed, tmp_path, monkeypatch):
    replace, count = eval_autoattack.write_atomically, 0

    def dies_now_and_then(path, write):
        nonlocal count
        count += 1
        if count % 4 == 0:
            path.with_name(path.name + ".tmp").write_bytes(b"half a fi")
            raise KeyboardInterrupt  # before the file has its name: this batch is lost
        replace(path, write)
    monkeypatch.setattr(eval_autoattack, "write_atomically", dies_now_and_then)
    for attempts in range(1, 20):
        try:
            result = evaluate(tiny_model(), images, labels, tmp_path, EPS, batch_size=BATCH)
            break
        except KeyboardInterrupt:
            continue
    assert attempts > 2 and result.accuracy == undisturbed.accuracy
    for name in ("broken_by", "predicted", "adversarial"):
        assert torch.equal(getattr(result, name), getattr(undisturbed, name))
    assert not list(tmp_path.glob("*.tmp"))


def test_single_attacks_and_seeds(images, labels, undisturbed, tmp_path):
    wavy, results = Changed(lambda z, x: z + torch.sin(300 * x.flatten(1)[:, :10])), []  # many local maxima
    for name, model, seed in (("tiny", tiny_model(), 0), ("wavy", wavy, 0), ("another seed", wavy, 1)):
        (tmp_path / name).mkdir()
        results.append(evaluate(model, images, labels, tmp_path / name, EPS, ["apgd-ce"], batch_size=BATCH,
                                seed=seed))
    assert results[0].attacks == ["apgd-ce"]
    assert results[0].accuracy["apgd-ce"] == undisturbed.accuracy["apgd-ce"]
    assert not torch.equal(results[1].adversarial, results[2].adversarial)


def test_fab_has_the_versions_restarts_whatever_ran_before(images):
    attacker = pyautoattack.AutoAttack(tiny_model(), eps=EPS, version="plus", seed=0)
    restarts = []
    attacker.fab.perturb = lambda x, y: restarts.append(attacker.fab.n_restarts)
    for attack in ("fab-t", "fab", "fab-t"):
        eval_autoattack.perturb(attacker, attack, images, None)
    assert restarts == [1, 5, 1]


# ----------------------------------------------------------------------------------------------------- TF32

ROUNDED_SCRIPT = TINY_SCRIPT + """
class Rounded(nn.Sequential):
    # TF32 needs a GPU; this stands for it: logits that are a little off wherever TF32 is allowed.
    def forward(self, x):
        z = super().forward(x)
        return z + 0.05 * torch.sin(1e4 * z) if torch.backends.cudnn.allow_tf32 else z

plain = build_model
build_model = lambda *args, **kwargs: Rounded(*plain(*args, **kwargs))
"""


def test_tf32_attacks_and_float32_judges(command, tmp_path, monkeypatch):
    """Also after kills: what the stages in TF32 broke and float32 does not is attacked again, in float32."""
    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", THEIRS)
    (tmp_path / "rounded.py").write_text(ROUNDED_SCRIPT)
    perturb, replace, precisions = eval_autoattack.perturb, eval_autoattack.write_atomically, []

    def noted(attacker, attack, x, y):
        precisions.append((attack, torch.backends.cudnn.allow_tf32))
        return perturb(attacker, attack, x, y)

    def killed(path, write):
        replace(path, write)
        if path.name.startswith("apgd"):  # after each batch
            raise KeyboardInterrupt
    monkeypatch.setattr(eval_autoattack, "perturb", noted)
    results = []
    for out, more in ((tmp_path / "float32", []), (tmp_path / "tf32", ["--tf32"])):
        flags = [*command, "--script", str(tmp_path / "rounded.py"), "--attacks", "apgd-ce", "apgd-dlr"]
        for _ in range(20):
            try:
                main([*flags, *more, "--out", str(out)])
                break
            except KeyboardInterrupt:
                continue
        results.append(json.loads((out / "result.json").read_text()))
        monkeypatch.setattr(eval_autoattack, "write_atomically", killed)
    exact, fast = results
    assert all(fast[name] == exact[name] for name in ("robust_accuracy", "reservations"))
    assert set(precisions) == {(attack, tf32) for attack in ("apgd-ce", "apgd-dlr") for tf32 in (False, True)}
    verdicts = np.load(out / "images.npz")
    assert verdicts["stages"].tolist() == ["clean", "apgd-ce-tf32", "apgd-ce", "apgd-dlr-tf32", "apgd-dlr"]
    predicted = tiny_model()(torch.from_numpy(verdicts["adversarial"])).argmax(1).numpy()  # in "float32"
    assert np.array_equal(predicted != verdicts["label"], verdicts["broken_by"] >= 0)
    batches = [(path.stem, np.load(path)) for path in out.glob("apgd*.npz")]
    fallen = {int(i) for name, batch in batches if "-tf32_" in name for i in batch["index"][batch["changed"]]}
    again = {int(i) for name, batch in batches if "-tf32_" not in name for i in batch["index"]}
    assert fallen == again and fast["verdicts_changed_by_float32"] == len(fallen) > 0
    assert 1 in verdicts["broken_by"] and 2 in verdicts["broken_by"], "the case is not trivial"


# ---------------------------------------------------------------------------------------------- verification

def test_verification_accepts_the_result_and_catches_every_tampering(images, labels, undisturbed):
    model = tiny_model()
    assert verify(model, images, labels, undisturbed, EPS, BATCH) == 0
    fallen = int((undisturbed.broken_by > 0).nonzero()[0])
    robust = int((undisturbed.broken_by == -1).nonzero()[0])

    def tampered(name, index, value):
        changed = getattr(undisturbed, name).clone()
        changed[index] = value
        return type(undisturbed)(**{**vars(undisturbed), name: changed})
    inwards = 1 - 2 * images[fallen].round()  # so that a little more than eps stays within [0, 1]
    too_far = images[fallen] + 1.01 * EPS * inwards
    for result, message in ((tampered("adversarial", fallen, too_far), "further than eps"),
                            (tampered("adversarial", fallen, torch.nan), "further than eps"),
                            (tampered("adversarial", fallen, images[fallen]), "do not repeat"),
                            (tampered("broken_by", robust, 1), "do not repeat"),
                            (tampered("broken_by", fallen, 0), "do not repeat")):
        with pytest.raises(VerificationError, match=message):
            verify(model, images, labels, result, EPS, BATCH)
    with pytest.raises(VerificationError, match=r"leave \[0, 1\]"):
        verify(model, 0 * images, labels, tampered("adversarial", slice(None), -EPS / 2), EPS, BATCH)


def test_results_of_other_images_or_damaged_ones_are_not_used(images, labels, tmp_path):
    def run(batch_size):
        evaluate(tiny_model(), images, labels, tmp_path, EPS, attacks=["apgd-ce"], batch_size=batch_size)
    run(BATCH)
    with pytest.raises(VerificationError, match="other images"):
        run(BATCH + 1)
    (tmp_path / "clean_00000.npz").write_bytes(b"half a fi")
    with pytest.raises(VerificationError, match="clean_00000.npz: damaged"):
        run(BATCH)


def test_what_cannot_be_judged_is_refused(images, labels, tmp_path):
    for wrong in (2 * images - 1, 255 * images, images.double(), images * torch.nan):
        with pytest.raises(InputError, match=r"float32 in \[0, 1\]"):
            evaluate(tiny_model(), wrong, labels, tmp_path, EPS)
    with pytest.raises(InputError, match="no apgd-t on 3 classes"):
        evaluate(tiny_model(classes=3), images, labels % 3, tmp_path, EPS, ["apgd-t"])
    with pytest.raises(VerificationError, match="not finite"):
        evaluate(Changed(lambda z, x: z.exp().exp() * 1e38), images, labels, tmp_path, EPS, batch_size=BATCH)


def test_autoattacks_own_warnings_are_reported(images, labels, tmp_path):
    """Rounded logits have no gradient: the classic false robustness."""
    saturated = Changed(lambda z, x: (10 * z).round().detach() + 0 * x.sum())
    result, again = [evaluate(saturated, images, labels, tmp_path, EPS, ["apgd-t"], batch_size=20)
                     for _ in range(2)]
    assert any("zero gradient" in flag for flag in result.flags)
    assert again.flags == result.flags, "also where the batches come from the disk"


# ----------------------------------------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint in train_cifar.py's format, with different averaged and raw weights."""
    path = tmp_path_factory.mktemp("ours") / "best.pt"
    averaged, raw = [build_model("wrn-10-1", 10).state_dict() for _ in range(2)]
    torch.save({"model_state_dict": averaged, "state_dict": averaged, "unaveraged_model_state_dict": raw,
                **WRN, "num_classes": 10, "args": {"smoke": False}}, path)
    return path, averaged, raw


def test_our_checkpoints_averaged_and_raw(ours):
    path, averaged, raw = ours
    for weights, expected in (("averaged", averaged), ("raw", raw)):
        model = load_classifier(path, weights=weights)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert (model.info.arch, model.info.dataset) == ("wrn-10-1", "cifar10")
        assert (model.info.weights, model.info.num_classes) == (weights, 10)


def test_a_best_pt_holds_averaged_weights_alone(ours, tmp_path):
    path, averaged, _ = ours
    saved = torch.load(path, weights_only=True)
    del saved["unaveraged_model_state_dict"]
    torch.save(saved | {"step": 7, "score": 50.0, "mean": [0.5] * 3, "std": [0.5] * 3}, tmp_path / "best.pt")
    model = load_classifier(tmp_path / "best.pt")
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())
    assert model.info.step == 7
    with pytest.raises(InputError, match="holds no raw weights .*; a run keeps its raw weights in last.pt$"):
        load_classifier(tmp_path / "best.pt", weights="raw")


def test_imagenets_class_names_also_where_earlier_checkpoints_have_them(tmp_path):
    (tmp_path / "my_copy.py").write_text(TINY_SCRIPT.replace('dataset="cifar10"', "pretrained"))
    names = [f"n{i}" for i in range(10)]
    saved = {"model_state_dict": tiny_model().state_dict(), "arch": "tiny", "dataset": "imagenet",
             "num_classes": 10}
    for more in ({"classes": names, "args": {"image_size": 32}},
                 {"args": {"classes": names, "image_size": 32}}):
        torch.save(saved | more, tmp_path / "tiny.pt")
        info = load_classifier(tmp_path / "tiny.pt", script=tmp_path / "my_copy.py").info
        assert info.args == {"classes": names, "image_size": 32} and info.num_classes == 10


def test_dmat_checkpoint_gives_its_reference_logits():
    reference = np.load(FIXTURES / "dmat_wrn_10_1_cifar10_reference.npz")
    image, logits = [torch.from_numpy(reference[name]) for name in ("image", "logits")]
    torch.testing.assert_close(load_classifier(DMAT, **WRN)(image), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s},
                                  lambda s: {f"module.{k}": v for k, v in s.items()},
                                  lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}}])
def test_robustbench_files(ours, wrap, tmp_path):
    torch.save(wrap(ours[1]), tmp_path / "rb.pt")
    model = load_classifier(tmp_path / "rb.pt", **WRN)
    assert all(torch.equal(value, ours[1][name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="no raw weights"):
        load_classifier(tmp_path / "rb.pt", **WRN, weights="raw")


WRAPPED_SCRIPT = TINY_SCRIPT + """
class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)

plain = build_model
build_model = lambda *args, **kwargs: Wrapped(plain(*args, **kwargs))
"""


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "std")])
def test_a_normalisation_among_the_weights_is_that_of_the_network(names, ours, tmp_path):
    """As RobustBench's and others' files have it: [3, 1, 1], or with one more dimension in front."""
    found = {f"module.{name}": torch.full((1, 3, 1, 1), value) for name, value in zip(names, (0.25, 0.75))}
    torch.save({f"module.{name}": value for name, value in ours[1].items()} | found, tmp_path / "theirs.pt")
    model = load_classifier(tmp_path / "theirs.pt", **WRN)
    assert model.mean.flatten().tolist() == 3 * [0.25] and model.std.flatten().tolist() == 3 * [0.75]
    assert torch.equal(model.logits.weight, ours[1]["logits.weight"])


@pytest.mark.parametrize("script, prefix", [(TINY_SCRIPT, ""), (WRAPPED_SCRIPT, "model.")])
def test_a_modified_script_makes_the_network(script, prefix, tmp_path):
    """A name that begins with "model." is stripped only where the network does not have it."""
    (tmp_path / "my_copy.py").write_text(script)
    state = {f"{prefix}{name}": value for name, value in tiny_model().state_dict().items()}
    torch.save({"model_state_dict": state, "arch": "tiny", "dataset": "cifar10"}, tmp_path / "tiny.pt")
    x = torch.rand(2, 3, 32, 32)
    model = load_classifier(tmp_path / "tiny.pt", script=tmp_path / "my_copy.py")
    assert torch.equal(model(x), tiny_model()(x))


def bad_checkpoints(averaged):
    """What is wrong, the file's content, more arguments, and what the error has to say."""
    good, nan = {"model_state_dict": averaged, **WRN}, torch.full((10,), torch.nan)

    def with_weights(**more):
        return {**good, "model_state_dict": averaged | more}
    return [
        ("no arch", {"model_state_dict": averaged, "dataset": "cifar10"}, {}, "arch or dataset; give --arch"),
        ("no dataset", {"model_state_dict": averaged, "arch": "wrn-10-1"}, {}, "arch or dataset; give"),
        ("strange dataset", {**good, "dataset": ["cifar10"]}, {}, "arch or dataset; give"),
        ("another width", {**good, "arch": "wrn-10-2"}, {}, "is no wrn-10-2 for cifar10"),
        ("other classes", {**good, "num_classes": 7}, {}, "classifies into 7 classes, cifar10 has 10"),
        ("a list", [1, 2], {}, "holds a list"),
        ("no weights", {"epoch": 3, **WRN}, {}, "no averaged weights"),
        ("strange names", {**good, "model_state_dict": {1: torch.zeros(1)}}, {}, "no averaged weights"),
        ("one more", with_weights(**{"extra.weight": torch.zeros(1)}), {}, "extra.weight .* expected absent"),
        ("not finite", with_weights(**{"logits.bias": nan}), {}, "logits.bias is not finite"),
    ]


def test_bad_checkpoints_give_one_clear_line(ours, tmp_path):
    path = tmp_path / "bad.pt"
    for kind, content, arguments, message in bad_checkpoints(ours[1]):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(InputError, match=message) as caught:
            load_classifier(path, **arguments)
        assert "\n" not in str(caught.value), kind


def test_no_checkpoint_gets_to_run_anything(tmp_path):
    assert_never_run(lambda path: load_classifier(path, **WRN), tmp_path)


# ------------------------------------------------------------------------------------------ the command line

def test_says_what_it_judges_before_anything_else_and_leaves_json_and_npz(command, finished, capsys):
    main([*command, "--out", str(finished)])
    first, second, *_, last = capsys.readouterr().out.splitlines()
    for part in ("tiny.pt", "averaged weights", "cifar10", "Linf eps 8/255", "20 images",
                 "AutoAttack standard (pyautoattack 0."):
        assert part in first
    assert "NOT THE FULL TEST SET" in second and "verified" in last
    result, verdicts = json.loads((finished / "result.json").read_text()), np.load(finished / "images.npz")
    robust = (verdicts["broken_by"] == -1).mean() * 100
    assert float(result["clean_acc"]) > result["robust_accuracy"] == robust
    assert result["eps"] == "8/255" and result["autoattack_acc"] is None
    assert set(result["seconds"]) == {"clean", "apgd-ce", "apgd-t", "fab-t", "square"}
    assert set(result) >= {"link", "name", "authors", "venue", "additional_data", "number_forward_passes",
                           "dataset", "architecture", "reported"}


def test_settings_are_compared_by_the_last_part_of_paths(command, finished, tmp_path, capsys):
    """Files may move. Another file, or the same one after more training, is another evaluation."""
    written = lambda: {path: path.stat().st_mtime_ns for path in finished.glob("*_*.npz")}
    batches = written()
    before = Path(command[0]).parent
    after = Path(shutil.copytree(before, tmp_path / before.name))
    moved = [part.replace(str(before), str(after)) for part in command] + ["--out", str(finished)]
    main(moved)
    assert "verified" in capsys.readouterr().out
    assert written() == batches, "no batch is attacked again"
    shutil.copy(after / "tiny.py", after / "other.py")
    shutil.copy(after / "tiny.pt", after / "other.pt")
    shutil.copytree(before, tmp_path / "other")
    torch.save(torch.load(after / "tiny.pt", weights_only=True) | {"step": 5}, after / "tiny.pt")
    cases = [
        (moved, "step None there, 5 now"),
        ([*moved, "--script", str(after / "other.py")], "script tiny.py there, other.py now"),
        ([*moved, "--data-dir", str(tmp_path / "other")], f"data_dir {before.name} there, other now"),
        ([str(after / "other.pt"), *moved[1:]], "checkpoint tiny.pt there, other.pt now"),
    ]
    for changed, message in cases:
        with pytest.raises(InputError, match=message):
            main(changed)


def test_a_second_evaluation_in_the_same_folder_is_refused(command, finished, monkeypatch):
    acquire = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", lambda self, timeout: acquire(self, timeout=0))  # do not wait
    with acquire(FileLock(finished / "lock")), pytest.raises(InputError, match="another run is at work"):
        main([*command, "--out", str(finished)])


@pytest.mark.slow
def test_two_processes_give_what_one_gives(command, finished, tmp_path):
    """torchrun starts this very file, see its end."""
    done = torchrun(__file__, *command, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = [np.load(out / "images.npz") for out in (finished, tmp_path / "two")]
    for name in ("broken_by", "predicted", "adversarial"):
        assert np.array_equal(one[name], two[name])
    assert done.stdout.count("verified") == 1


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, ours):
    """Checkpoints and folders that are wrong in one way each; a tiny ViT for three classes is right."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, content in (("page.pt", HTML), ("pointer.pt", POINTER), ("cut.pt", DMAT.read_bytes()[:5000])):
        (folder / name).write_bytes(content)
    torch.manual_seed(0)
    torch.save({"arch": "vit-tiny-2", "dataset": "npz", "num_classes": 3, "mean": [0.0] * 3, "std": [1.0] * 3,
                "model_state_dict": build_model("vit-tiny-2", 3, "npz").state_dict()}, folder / "vit.pt")
    torch.save({"model_state_dict": {"conv_proj.weight": torch.zeros(768, 3, 2, 2)}, "arch": "vit-b-2",
                "dataset": "cifar10", "num_classes": 10}, folder / "torchvision.pt")
    for name, split, classes in (("cifar", "test", 10), ("three", "test", 3), ("no_test", "train", 10)):
        (folder / name).mkdir()
        write_npz(folder / name / f"{split}.npz", 30, label=np.arange(30) % classes)
    for name in ("pointers", "full", "damaged"):
        (folder / name).mkdir()
    (folder / "pointers" / "test.npz").write_bytes(POINTER)
    (folder / "full" / "thesis.txt").write_text("mine")
    (folder / "damaged" / "settings.json").write_text("{")
    (folder / "file").write_text("mine")
    return folder


TENTH = f"{DMAT} --arch wrn-10-1 --dataset cifar10"  # a WRN-10-1 of DM-AT
MISTAKES = [  # a command, and what its line has to say
    ("{}/none.pt", "none.pt"), ("{}/cut.pt", "cut.pt: damaged"), ("{}/page.pt", f"page.pt: {PAGE}"),
    ("{}/pointer.pt", f"pointer.pt: {LFS}"),
    (f"{DMAT}", "dmat_wrn_10_1_cifar10.pt: does not say its arch or dataset"),
    (f"{DMAT} --arch wrn-28-10 --dataset cifar10", "dmat_wrn_10_1_cifar10.pt: is no wrn-28-10"),
    (f"{DMAT} --arch wrn-10-1 --dataset cifar100", "logits.weight is [10, 64], expected [100, 64]"),
    (f"{DMAT} --arch nonsense --dataset cifar10", "--arch nonsense"),
    (f"{DMAT} --arch vit-tiny-2 --dataset cifar10", "cifar10.pt: is no vit-tiny-2 for cifar10"),
    (f"{DMAT} --arch wrn-10-1 --dataset npz", "does not say its number of classes"),
    ("{}/vit.pt --arch wrn-10-1", "vit.pt: is no wrn-10-1 for npz"),
    ("{}/torchvision.pt", "torchvision.pt: is no vit-b-2 for cifar10"),
    ("{}/vit.pt", "cifar: has label 9 in the test images, expected 0 to 2 as in training"),
    ("{}/vit.pt --data-dir {}/three --attacks apgd-t", "there is no apgd-t on 3 classes"),
    (f"{TENTH} --script {{}}/none.py", "none.py"), (f"{TENTH} --data-dir {{}}/no_test", "no_test/test.npz"),
    (f"{TENTH} --data-dir {{}}/pointers", f"pointers/test.npz: {LFS}"),
    (f"{TENTH} --out {{}}/full", "neither empty nor"), (f"{TENTH} --out {{}}/file", "/file'"),
    (f"{TENTH} --out {{}}/damaged", "settings.json: damaged"),
    *[(f"{TENTH} {flag} {value}", f"{flag}: ") for flag, value in (
        ("--eps", "8"), ("--eps", "0"), ("--eps", "8/0"), ("--n", "0"), ("--batch-size", "0"),
        ("--attacks", "pgd"),
        ("--attacks", "square fgsm"), ("--version", "best"), ("--seed", "-1"), ("--seed", 2**70))],
    (f"{TENTH} --attacks fab fab", "--attacks"), (f"{TENTH} --nonsense", "--nonsense"),
]
if not torch.cuda.is_available():
    MISTAKES.append((f"{TENTH} --device cuda", "--device cuda: there is no CUDA device here"))


@pytest.mark.slow
def test_a_mistake_on_the_command_line_gives_one_line_and_writes_nothing(wrong, tmp_path):
    before, fixtures = contents(wrong), contents(FIXTURES)
    for command, named in MISTAKES:
        flags = ["--device", "cpu", "--data-dir", wrong / "cifar", "--out", tmp_path / "never"]
        assert_one_line("eval_autoattack.py", [*flags, *command.replace("{}", str(wrong)).split()], named)
    assert contents(wrong) == before and contents(FIXTURES) == fixtures and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [("--eps 4/255", "eps 0.03137254901960784 there"),
                                            ("--n 5", "n 20 there, 5 now")])
def test_a_folder_of_another_evaluation_is_refused_and_left_alone(command, finished, flags, message):
    before = contents(finished)
    with pytest.raises(InputError, match=message):
        main([*command, *flags.split(), "--out", str(finished)])
    assert contents(finished) == before


# -------------------------------------------------------------------------------------------------- ImageNet

def test_imagenet_protocol(tmp_path):
    """Shorter side to 256, centre crop of 224; classes by sorted folder names; images in the list's order."""
    from PIL import Image
    for name, colour in (("n02", (255, 0, 0)), ("n01", (0, 0, 255))):
        (tmp_path / "val" / name).mkdir(parents=True)
        picture = Image.new("RGB", (600, 300), (0, 255, 0))
        picture.paste(colour, (180, 0, 420, 300))  # the middle, which is what the crop leaves
        picture.save(tmp_path / "val" / name / "a.png")
    images, labels = load_imagenet(tmp_path, None, None, 2)
    assert images.shape == (2, 3, 224, 224) and labels.tolist() == [0, 1]
    assert 0 <= images.min() and images.max() <= 1
    assert images[0, :, 112, 112].tolist() == [0, 0, 1] and images[1, :, 112, 112].tolist() == [1, 0, 0]
    listed = tmp_path / "list.txt"
    listed.write_text("val/n02/a.png\nn01/a.png 0\n")
    assert load_imagenet(tmp_path, listed, None, 2)[1].tolist() == [1, 0]
    assert len(load_imagenet(tmp_path, listed, 1, 2, class_names=["n01", "n02"])[0]) == 1
    for lines, message in (("val/n03/a.png\n", "no class folder"), ("val/n01/a.png\nn01/a.png\n", "twice"),
                           ("\n", "no image"), ("n01/b.png\n", "b.png: cannot be read")):
        listed.write_text(lines)
        with pytest.raises(InputError, match=message):
            load_imagenet(tmp_path, listed, None, 2)
    with pytest.raises(InputError, match="2 class folders, not those of the 1000 classes"):
        load_imagenet(tmp_path, None, None)
    with pytest.raises(InputError, match="not those of the 2 classes"):
        load_imagenet(tmp_path, None, None, 2, class_names=["n01", "n03"])
    with pytest.raises(FileNotFoundError, match="val/val"):
        load_imagenet(tmp_path / "val", None, None)


if __name__ == "__main__":  # what torchrun starts: eval_autoattack.py's command line, with fewer steps
    pyautoattack.AutoAttack._set_version = fewer_steps
    main()
