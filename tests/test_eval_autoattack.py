"""eval_autoattack.py: any checkpoint, exactly AutoAttack's result, continued after kills, verified afterwards."""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyautoattack
import pytest
import torch
from torch import nn

import eval_autoattack
from eval_autoattack import InputError, VerificationError, evaluate, load_classifier, load_imagenet, main, verify
from train_cifar import build_model

ROOT, FIXTURES = Path(__file__).parent.parent, Path(__file__).parent / "fixtures"
DMAT = FIXTURES / "dmat_wrn_10_1_cifar10.pt"
EPS, BATCH = 8 / 255, 7

# A "training script" whose model is tiny: AutoAttack's 5,000 queries of Square take a second instead of a minute.
TINY_SCRIPT = """
import torch
from torch import nn

def build_model(arch, num_classes, dataset="cifar10"):
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, num_classes))
"""


def tiny_model(seed=0):
    namespace = {}
    exec(TINY_SCRIPT, namespace)
    torch.manual_seed(seed)
    return namespace["build_model"]("tiny", 10).eval().requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The fastest for a model this small, and the same number as in the subprocesses below."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images():
    coarse = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))  # squares of 8 x 8 pixels, as the model sees
    return coarse.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


@pytest.fixture(scope="module")
def labels(images):
    """What the tiny model says, but for every fifth image; so some are misclassified, some fall and some survive."""
    labels = tiny_model()(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 10
    return labels


@pytest.fixture(scope="module")
def undisturbed(images, labels, tmp_path_factory):
    return evaluate(tiny_model(), images, labels, tmp_path_factory.mktemp("undisturbed"), EPS, batch_size=BATCH)


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("broken_by", "predicted", "adversarial")) and a.accuracy == b.accuracy


# --------------------------------------------------------------------------------------------------------------- exactness

def test_equals_the_library_image_by_image(images, labels, undisturbed):
    model = tiny_model()
    library = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, version="standard", seed=0)
    adversarial, predicted = library.run_standard_evaluation(images, labels, batch_size=BATCH)
    assert torch.equal(undisturbed.adversarial, adversarial) and torch.equal(undisturbed.predicted, predicted)
    robust = model(adversarial).argmax(1) == labels
    assert torch.equal(undisturbed.broken_by == -1, robust)
    assert 0 < robust.sum() < (labels == model(images).argmax(1)).sum() < len(labels), "the case is not trivial"
    assert undisturbed.accuracy["clean"] == 80 and undisturbed.attacks == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize("version", ["plus", "rand"])
def test_other_versions_equal_the_librarys(images, labels, tmp_path, version):
    some, few = images[:6], labels[:6]
    library = pyautoattack.AutoAttack(tiny_model(), norm="Linf", eps=EPS, version=version, seed=0)
    adversarial, predicted = library.run_standard_evaluation(some, few, batch_size=4)
    result = evaluate(tiny_model(), some, few, tmp_path, EPS, version=version, batch_size=4)
    assert torch.equal(result.adversarial, adversarial) and torch.equal(result.predicted, predicted)
    assert len(result.attacks) == {"plus": 6, "rand": 2}[version]


def test_a_random_model_is_remarked_upon_and_judged_by_rand(images, labels, tmp_path):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model()

        def forward(self, x):
            return self.model(x) + 0.3 * torch.randn(len(x), 10)
    for version in ("standard", "rand"):
        (tmp_path / version).mkdir()
        result = evaluate(Random(), images[:8], labels[:8], tmp_path / version, EPS, attacks=["apgd-ce"], version=version, batch_size=8)
        assert any("randomized" in flag for flag in result.flags) == (version == "standard")
    verify(Random(), images[:8], labels[:8], result, EPS, 8, random=True)
    with pytest.raises(VerificationError, match="do not repeat"):
        for _ in range(50):  # it is random: some repetition will disagree
            verify(Random(), images[:8], labels[:8], result, EPS, 8)


def test_a_killed_evaluation_continues_to_the_same_result(images, labels, undisturbed, tmp_path, monkeypatch):
    write, count = eval_autoattack.save_atomically, 0

    def dies_now_and_then(path, **arrays):
        nonlocal count
        count += 1
        if count % 4 == 0:
            raise KeyboardInterrupt  # before anything is on the disk: this batch is lost
        write(path, **arrays)
    monkeypatch.setattr(eval_autoattack, "save_atomically", dies_now_and_then)
    for attempts in range(1, 20):
        try:
            result = evaluate(tiny_model(), images, labels, tmp_path, EPS, batch_size=BATCH)
            break
        except KeyboardInterrupt:
            continue
    assert attempts > 2 and same(result, undisturbed)


def test_single_attacks_and_seeds(images, labels, undisturbed, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    result = evaluate(tiny_model(), images, labels, tmp_path / "a", EPS, attacks=["apgd-ce"], batch_size=BATCH)
    assert result.attacks == ["apgd-ce"] and result.accuracy["apgd-ce"] == undisturbed.accuracy["apgd-ce"]
    other = evaluate(tiny_model(), images, labels, tmp_path / "b", EPS, attacks=["apgd-ce"], batch_size=BATCH, seed=1)
    assert not torch.equal(other.adversarial, result.adversarial)


# ------------------------------------------------------------------------------------------------------------ verification

def test_verification_accepts_the_result_and_catches_every_tampering(images, labels, undisturbed):
    model = tiny_model()
    verify(model, images, labels, undisturbed, EPS, BATCH)
    fallen = int((undisturbed.broken_by > 0).nonzero()[0])
    robust = int((undisturbed.broken_by == -1).nonzero()[0])

    def tampered(**changes):
        copy = type(undisturbed)(**{**vars(undisturbed), "adversarial": undisturbed.adversarial.clone(), "broken_by": undisturbed.broken_by.clone()})
        for name, (index, value) in changes.items():
            getattr(copy, name)[index] = value
        return copy
    for changes, message in (({"adversarial": (fallen, images[fallen] + 2 * EPS)}, "further than eps"),
                             ({"adversarial": (fallen, images[fallen])}, "do not repeat"),
                             ({"broken_by": (robust, 1)}, "do not repeat"),
                             ({"broken_by": (fallen, 0)}, "do not repeat")):
        with pytest.raises(VerificationError, match=message):
            verify(model, images, labels, tampered(**changes), EPS, BATCH)
    with pytest.raises(VerificationError, match=r"leave \[0, 1\]"):
        verify(model, 0 * images, labels, type(undisturbed)(**{**vars(undisturbed), "adversarial": 0 * images - EPS / 2}), EPS, BATCH)


def test_results_of_other_images_or_damaged_ones_are_not_used(images, labels, undisturbed, tmp_path):
    evaluate(tiny_model(), images, labels, tmp_path, EPS, attacks=["apgd-ce"], batch_size=BATCH)
    with pytest.raises(VerificationError, match="other images"):
        evaluate(tiny_model(), images, labels, tmp_path, EPS, attacks=["apgd-ce"], batch_size=BATCH + 1)
    (tmp_path / "clean_00000.npz").write_bytes(b"half a fi")
    with pytest.raises(VerificationError, match="clean_00000.npz: damaged"):
        evaluate(tiny_model(), images, labels, tmp_path, EPS, attacks=["apgd-ce"], batch_size=BATCH)


def test_images_outside_the_unit_range_are_refused(images, labels, tmp_path):
    for wrong in (2 * images - 1, 255 * images, images.double(), images * torch.nan):
        with pytest.raises(InputError, match=r"float32 in \[0, 1\]"):
            evaluate(tiny_model(), wrong, labels, tmp_path, EPS)


def test_autoattacks_own_warnings_are_reported(images, labels, tmp_path):
    class Saturated(nn.Module):
        """Rounds its logits: no gradient, the classic false robustness."""
        def __init__(self):
            super().__init__()
            self.model = tiny_model()

        def forward(self, x):
            return (10 * self.model(x)).round().detach() + 0 * x.sum()
    result = evaluate(Saturated(), images, labels, tmp_path, EPS, attacks=["apgd-t"], batch_size=20)
    assert any("zero gradient" in flag for flag in result.flags)
    again = evaluate(Saturated(), images, labels, tmp_path, EPS, attacks=["apgd-t"], batch_size=20)
    assert again.flags == result.flags, "also where the batches come from the disk"


def test_logits_that_are_not_finite_are_no_robustness(images, labels, tmp_path):
    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model()

        def forward(self, x):
            return self.model(x).exp().exp() * 1e38
    with pytest.raises(VerificationError, match="not finite"):
        evaluate(Overflowing(), images, labels, tmp_path, EPS, batch_size=BATCH)


def test_fab_has_the_versions_restarts_whatever_ran_before(images):
    attacker = pyautoattack.AutoAttack(tiny_model(), eps=EPS, version="plus", seed=0)
    restarts = []
    attacker.fab.perturb = lambda x, y: restarts.append(attacker.fab.n_restarts)
    for attack in ("fab-t", "fab", "fab-t"):
        eval_autoattack.perturb(attacker, attack, images, None)
    assert restarts == [1, 5, 1]


# ------------------------------------------------------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint in train_cifar.py's format, with different averaged and raw weights."""
    path, models = tmp_path_factory.mktemp("ours") / "best.pt", [build_model("wrn-10-1", 10) for _ in range(2)]
    averaged, raw = [model.state_dict() for model in models]
    torch.save({"model_state_dict": averaged, "state_dict": averaged, "unaveraged_model_state_dict": raw, "arch": "wrn-10-1",
                "dataset": "cifar10", "num_classes": 10, "args": {"smoke": False}}, path)
    return path, averaged, raw


def test_our_checkpoints_averaged_and_raw(ours):
    path, averaged, raw = ours
    for weights, expected in (("averaged", averaged), ("raw", raw)):
        model = load_classifier(path, weights=weights)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert (model.info.arch, model.info.dataset, model.info.weights, model.info.num_classes) == ("wrn-10-1", "cifar10", weights, 10)


def test_dmat_checkpoint_gives_its_reference_logits():
    model, reference = load_classifier(DMAT, arch="wrn-10-1", dataset="cifar10"), np.load(FIXTURES / "dmat_wrn_10_1_cifar10_reference.npz")
    torch.testing.assert_close(model(torch.from_numpy(reference["image"])), torch.from_numpy(reference["logits"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": v for k, v in s.items()},
                                  lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}}])
def test_robustbench_files(ours, wrap, tmp_path):
    torch.save(wrap(ours[1]), tmp_path / "rb.pt")
    model = load_classifier(tmp_path / "rb.pt", "wrn-10-1", "cifar10")
    assert all(torch.equal(value, ours[1][name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="no raw weights"):
        load_classifier(tmp_path / "rb.pt", "wrn-10-1", "cifar10", weights="raw")


def test_a_modified_script_makes_the_network(tmp_path):
    (tmp_path / "my_copy.py").write_text(TINY_SCRIPT)
    torch.save({"model_state_dict": tiny_model().state_dict(), "arch": "tiny", "dataset": "cifar10"}, tmp_path / "tiny.pt")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_classifier(tmp_path / "tiny.pt", script=tmp_path / "my_copy.py")(x), tiny_model()(x))


def test_a_wrapped_network_of_a_modified_script_keeps_its_names(tmp_path):
    """A name that begins with "model." is stripped only where the network does not have it."""
    (tmp_path / "wrapped.py").write_text(TINY_SCRIPT + """
class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)

plain = build_model
build_model = lambda *args, **kwargs: Wrapped(plain(*args, **kwargs))
""")
    torch.save({"model_state_dict": {f"model.{k}": v for k, v in tiny_model().state_dict().items()}, "arch": "tiny", "dataset": "cifar10"}, tmp_path / "tiny.pt")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_classifier(tmp_path / "tiny.pt", script=tmp_path / "wrapped.py")(x), tiny_model()(x))


def bad_checkpoints(folder, averaged):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(folder / "was_run"),)
    whole = DMAT.read_bytes()
    path = folder / "bad.pt"
    wrn = {"arch": "wrn-10-1", "dataset": "cifar10"}
    save = lambda content: lambda: torch.save(content, path)
    return [
        ("hostile", save({"model_state_dict": Hostile()}), {}, "damaged, or no checkpoint"),
        ("hostile pickle", lambda: path.write_bytes(pickle.dumps(Hostile())), {}, "damaged, or no checkpoint"),
        ("cut off", lambda: path.write_bytes(whole[:1000]), {}, "damaged, or no checkpoint"),
        ("no arch", save({"model_state_dict": averaged, "dataset": "cifar10"}), {}, "give --arch"),
        ("no dataset", save({"model_state_dict": averaged, "arch": "wrn-10-1"}), {}, "dataset; give"),
        ("another arch", save({"model_state_dict": averaged, "arch": "wrn-16-1", "dataset": "cifar10"}), {}, "is no wrn-16-1 for cifar10: lacks"),
        ("another width", save({"model_state_dict": averaged, "arch": "wrn-10-2", "dataset": "cifar10"}), {}, "is no wrn-10-2 for cifar10"),
        ("unknown arch", save({"model_state_dict": averaged, "arch": "resnet", "dataset": "cifar10"}), {}, "resnet"),
        ("another dataset", save({"model_state_dict": averaged, **wrn}), {"dataset": "cifar100"}, r"logits.weight is \[10, 64\], expected \[100, 64\]"),
        ("other classes", save({"model_state_dict": averaged, **wrn, "num_classes": 7}), {}, "classifies into 7 classes, cifar10 has 10"),
        ("a list", save([1, 2]), {}, "holds a list"),
        ("no weights", save({"epoch": 3, **wrn}), {}, "no dict of tensors"),
        ("one more", save({"model_state_dict": averaged | {"extra.weight": torch.zeros(1)}, **wrn}), {}, "unknown extra.weight"),
        ("not finite", save({"model_state_dict": averaged | {"logits.bias": torch.full((10,), torch.nan)}, **wrn}), {}, "logits.bias is not finite"),
        ("strange names", save({"model_state_dict": {1: torch.zeros(1)}, **wrn}), {}, "no dict of tensors"),
        ("strange dataset", save({"model_state_dict": averaged, "arch": "wrn-10-1", "dataset": ["cifar10"]}), {}, "dataset; give"),
        ("no such script", save({"model_state_dict": averaged, **wrn}), {"script": folder / "none.py"}, "none.py: no such file"),
    ]


def test_bad_checkpoints_give_one_clear_line(ours, tmp_path):
    for kind, write, arguments, message in bad_checkpoints(tmp_path, ours[1]):
        write()
        with pytest.raises(InputError, match=message) as caught:
            load_classifier(tmp_path / "bad.pt", **arguments)
        assert "\n" not in str(caught.value) and not (tmp_path / "was_run").exists(), kind
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path / "none.pt")


# -------------------------------------------------------------------------------------------------------- the command line

@pytest.fixture(scope="module")
def command(tmp_path_factory, images, labels):
    """Arguments for a tiny checkpoint and 20 images in a folder."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "tiny.py").write_text(TINY_SCRIPT)
    torch.save({"model_state_dict": tiny_model().state_dict(), "arch": "tiny", "dataset": "cifar10"}, folder / "tiny.pt")
    pixels = (images.permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy()
    np.savez(folder / "test.npz", image=pixels, label=labels.numpy())
    return [str(folder / "tiny.pt"), "--script", str(folder / "tiny.py"), "--data-dir", str(folder), "--batch-size", str(BATCH), "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    main([*command, "--out", str(out)])
    return out


def test_says_what_it_judges_before_anything_else_and_leaves_json_and_npz(command, finished, capsys):
    main([*command, "--out", str(finished)])
    first, second, *_, last = capsys.readouterr().out.splitlines()
    for part in ("tiny.pt", "averaged weights", "cifar10", "Linf eps 8/255", "20 images", "AutoAttack standard (pyautoattack 0."):
        assert part in first
    assert "NOT THE FULL TEST SET" in second and "verified" in last
    result, per_image = json.loads((finished / "result.json").read_text()), np.load(finished / "images.npz")
    robust = (per_image["broken_by"] == -1).mean() * 100
    assert result["eps"] == "8/255" and float(result["clean_acc"]) > result["robust_accuracy"] == robust and result["autoattack_acc"] is None
    assert set(result["seconds"]) == {"clean", "apgd-ce", "apgd-t", "fab-t", "square"}
    for field in ("link", "name", "authors", "venue", "additional_data", "number_forward_passes", "dataset", "architecture", "reported"):
        assert field in result


def test_a_changed_script_does_not_inherit_the_results(command, tmp_path):
    """The verdicts of a network with masked gradients must not survive its correction."""
    script = tmp_path / "tiny.py"
    script.write_text(TINY_SCRIPT)
    quick = [command[0], "--script", str(script), *command[3:], "--attacks", "apgd-ce", "--out", str(tmp_path / "out")]
    main(quick)
    script.write_text(TINY_SCRIPT + "# another network, for all one knows")
    with pytest.raises(InputError, match="script .* there"):
        main(quick)


def test_two_processes_give_what_one_gives(command, finished, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "eval_autoattack.py", *command, "--out", str(tmp_path / "two")],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = [np.load(out / "images.npz") for out in (finished, tmp_path / "two")]
    for name in ("broken_by", "predicted"):
        assert np.array_equal(one[name], two[name])
    assert np.array_equal(one["adversarial"], two["adversarial"])
    assert done.stdout.count("verified") == 1


def test_bad_input_gives_one_line_and_overwrites_nothing(command, finished, tmp_path):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    np.savez(tmp_path / "test.npz", image=np.zeros((4, 32, 32, 3)), label=np.zeros(4, int))
    cases = [(["--eps", "8"], "--eps 8.0"), (["--eps", "0"], "--eps 0.0"), (["--eps", "8/0"], "--eps"), (["--n", "0"], "--n 0"), (["--batch-size", "0"], "--batch-size 0"),
             (["--attacks", "pgd"], "--attacks"), (["--version", "best"], "--version"), (["--nonsense"], "--nonsense"), (["--seed", "-1"], "--seed"),
             (["--out", str(finished), "--eps", "4/255"], "eps 0.03137254901960784 there"), (["--out", str(finished), "--n", "5"], "n 20 there, 5 now"),
             (["--out", str(tmp_path / "full")], "neither empty nor"), (["--out", str(tmp_path / "file")], "is a file"),
             (["--data-dir", str(tmp_path)], "float64"), (["--weights", "raw"], "no raw weights"),
             (["--attacks", "fab", "fab"], "each attack once"), (["--seed", str(2**70)], "--seed")]
    for flags, message in cases:
        with pytest.raises(InputError) as caught:
            main([*command, "--out", str(tmp_path / "never"), *flags])
        assert message in str(caught.value) and "\n" not in str(caught.value), flags
    assert not (tmp_path / "never").exists() and {path: path.read_bytes() for path in finished.iterdir()} == before
    done = subprocess.run([sys.executable, "eval_autoattack.py", "none.pt"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "none.pt" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- ImageNet

def test_imagenet_protocol(tmp_path):
    """Shorter side to 256, centre crop of 224; classes by sorted folder names; listed images in the list's order."""
    from PIL import Image
    for name, colour in (("n02", (255, 0, 0)), ("n01", (0, 0, 255))):
        (tmp_path / "val" / name).mkdir(parents=True)
        picture = Image.new("RGB", (600, 300), (0, 255, 0))
        picture.paste(colour, (180, 0, 420, 300))  # the middle, which is what the crop leaves
        picture.save(tmp_path / "val" / name / "a.png")
    images, labels = load_imagenet(tmp_path, None, None, 2)
    assert images.shape == (2, 3, 224, 224) and labels.tolist() == [0, 1] and 0 <= images.min() and images.max() <= 1
    assert images[0, :, 112, 112].tolist() == [0, 0, 1] and images[1, :, 112, 112].tolist() == [1, 0, 0]
    (tmp_path / "list.txt").write_text("val/n02/a.png\nn01/a.png\n")
    assert load_imagenet(tmp_path, tmp_path / "list.txt", None, 2)[1].tolist() == [1, 0]
    assert len(load_imagenet(tmp_path, tmp_path / "list.txt", 1, 2)[0]) == 1
    (tmp_path / "list.txt").write_text("val/n03/a.png\n")
    with pytest.raises(InputError, match="no class folder"):
        load_imagenet(tmp_path, tmp_path / "list.txt", None, 2)
    (tmp_path / "list.txt").write_text("val/n01/a.png\nn01/a.png\n")
    with pytest.raises(InputError, match="twice"):
        load_imagenet(tmp_path, tmp_path / "list.txt", None, 2)
    with pytest.raises(InputError, match="2 class folders, expected 1000"):
        load_imagenet(tmp_path, None, None)
    with pytest.raises(InputError, match="no folder val/"):
        load_imagenet(tmp_path / "val", None, None)
