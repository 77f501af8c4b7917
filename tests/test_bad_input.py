"""Whatever is wrong with the input: exit code 2, one line that names the file or flag (for flags behind argparse's usage text), no traceback,
nothing written, nothing in a file run.

The scripts run here as the command line runs them (`__main__`), but in this process, which is faster than starting one for each case.
"""
import pickle
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit_encoder
import train_cifar
import train_imagenet
from edm_encoder import EDMEncoder
from edm_pickles import dump, edm_file
from eval_autoattack import load_classifier
from test_edm_encoder import hostile_pickles

ROOT, FIXTURES = Path(__file__).parent.parent, Path(__file__).parent / "fixtures"
EDM, DMAT = FIXTURES / "edm_tiny_cond_vp.pkl", FIXTURES / "dmat_wrn_10_1_cifar10.pt"
DIT, VAE, STATS = [FIXTURES / f"dit_tiny_{name}.pt" for name in ("dit", "vae", "latents_stats")]
HTML = b"<!DOCTYPE html><html>404 Not Found</html>"


def write_folders(folder):
    """Files that are wrong in one way each, and right ones to be refused for other reasons. Returns the folder."""
    image, label = np.zeros((60, 32, 32, 3), np.uint8), np.arange(60) % 10

    def npz(name, **arrays):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(folder / name, **arrays)
    for name in ("cifar/train.npz", "cifar/test.npz", "notest/train.npz", "good.npz"):
        npz(name, image=image, label=label)
    npz("few/train.npz", image=image[:5], label=label[:5])
    npz("few/test.npz", image=image, label=label)
    npz("nokey.npz", label=label)
    npz("float.npz", image=image / 255, label=label)
    npz("nchw.npz", image=image.transpose(0, 3, 1, 2).copy(), label=label)
    npz("label.npz", image=image, label=label + 1)
    npz("empty.npz", image=image[:0], label=label[:0])
    npz("object.npz", image=np.array([{}, []], object), label=label)
    np.savez_compressed(folder / "compressed.npz", image=image, label=label)
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:9000])
    (folder / "page.npz").write_bytes(HTML)
    (folder / "page.pkl").write_bytes(HTML)
    (folder / "page.pt").write_bytes(HTML)
    (folder / "cut.pkl").write_bytes(EDM.read_bytes()[:1000])
    (folder / "cut.pt").write_bytes(DMAT.read_bytes()[:5000])
    (folder / "file").write_text("x")
    small = {"img_resolution": 16, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    dump(edm_file(EDMEncoder("dec.8x8_in1", **small), small), folder / "16px.pkl")
    torch.save({"model_state_dict": {"logits.weight": torch.zeros(10, 640)}, "arch": "wrn-28-10", "dataset": "cifar10"}, folder / "incomplete.pt")
    torch.save({"model_state_dict": torch.load(DMAT, weights_only=True)["model_state_dict"], "arch": "wrn-10-1", "dataset": "cifar100", "num_classes": 10}, folder / "classes.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    for split in ("train", "val"):
        for name, count in (("n0", 8), ("n1", 8)):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40)).save(folder / "images" / split / name / f"{i}.png")
    (folder / "noval" / "train").mkdir(parents=True)
    (folder / "noval" / "train" / "n0").symlink_to(folder / "images" / "train" / "n0")
    (folder / "noclass" / "train" / "n0").mkdir(parents=True)
    return folder


CIFAR = ["train_cifar.py", "--smoke"]
REAL = ["train_cifar.py", "--device", "cpu", "--arch", "wrn-10-1", "--dra-weight", "0", "--data-dir", "{}/cifar", "--batch-size", "16", "--max-steps", "1"]
IMAGENET = ["train_imagenet.py", "--smoke", "--arch", "test_vit", "--image-size", "32", "--workers", "0", "--batch-size", "8", "--max-steps", "1", "--data", "{}/images"]
ANALYZE = ["--device", "cpu", "--data-dir", "{}/cifar", "--dataset", "cifar10", "--arch", "wrn-10-1"]
EVAL = ["eval_autoattack.py", "--device", "cpu", "--data-dir", "{}/cifar"]
CASES = [  # command, and what its one line has to name
    # train_cifar.py: teachers
    ([*CIFAR, "--teacher", "{}/none.pkl"], "none.pkl"), ([*CIFAR, "--teacher", "{}/cut.pkl"], "cut.pkl"), ([*CIFAR, "--teacher", "{}/page.pkl"], "page.pkl: this is a web page"),
    ([*CIFAR, "--teacher", "{}/16px.pkl"], "16px.pkl: made for 16 px images"), ([*CIFAR, "--teacher", str(EDM), "--dataset", "cifar100"], "knows 10 classes, expected 100"),
    ([*CIFAR, "--teacher", str(DMAT)], "dmat_wrn_10_1_cifar10.pt"), ([*CIFAR, "--teacher-layer", "dec.9x9"], "dec.9x9"), ([*CIFAR, "--teacher", "{}"], "Is a directory"),
    # train_cifar.py: data
    *[([*REAL, "--synthetic", f"{{}}/{name}.npz"], named) for name, named in (
        ("none", "none.npz"), ("nokey", "nokey.npz: holds no array 'image'"), ("float", "float.npz: 'image' is float64"), ("nchw", "[60, 3, 32, 32], expected uint8 [N, 32, 32, 3]"),
        ("label", "labels run from 1 to 10, expected 0 to 9"), ("empty", "empty.npz"), ("object", "object"), ("compressed", "compressed.npz: holds no array 'image' that can be mapped"),
        ("cut", "cut.npz"), ("page", "page.npz"))],
    ([*REAL, "--data-dir", "{}/notest"], "test.npz"), ([*REAL, "--data-dir", "{}/few"], "expected at least 10"), ([*REAL, "--batch-size", "600"], "--batch-size 600"),
    ([*REAL, "--synthetic", "{}/good.npz", "--synthetic-fraction", "1.5"], "--synthetic-fraction 1.5: expected"), ([*REAL, "--data-dir", "{}/file"], "file"),
    # train_cifar.py: flags
    ([*CIFAR, "--arch", "resnet-18"], "--arch resnet-18"), ([*CIFAR, "--arch", "wrn-11-1"], "--arch wrn-11-1"), ([*CIFAR, "--eps", "255"], "--eps 255.0"),
    ([*CIFAR, "--attack-steps", "-1"], "--attack-steps -1"), ([*CIFAR, "--out", "{}/file"], "file"), ([*CIFAR, "--out", "{}/file/x"], "file"),
    ([*CIFAR, "--dataset", "mnist"], "--dataset"), ([*CIFAR, "--nonsense"], "--nonsense"), ([*CIFAR, "extra"], "extra"), ([*CIFAR, "--lr"], "--lr"), ([*CIFAR, "--seed", "1e30"], "--seed"),
    # train_imagenet.py
    ([*IMAGENET, "--data", "{}/nowhere"], "nowhere/train"), ([*IMAGENET, "--data", "{}/noval"], "noval/val"), ([*IMAGENET, "--data", "{}/noclass"], "noclass/train"),
    ([*IMAGENET, "--synthetic", "{}/noval"], "noval: has 1 class folders, expected the 2"), ([*IMAGENET, "--arch", "resnet18"], "has batch norm"),
    ([*IMAGENET, "--arch", "vit_huge_nonsense"], "--arch vit_huge_nonsense"), ([*IMAGENET, "--image-size", "20"], "--image-size"), ([*IMAGENET, "--batch-size", "90"], "--batch-size 90"),
    ([*IMAGENET, "--accumulate", "3"], "--accumulate 3"), ([*IMAGENET, "--eps", "4"], "--eps 4.0"), ([*IMAGENET, "--out", "{}/file"], "file"),
    ([*IMAGENET, "--teacher", str(DIT), str(VAE)], "--teacher: expected 3 arguments"), ([*IMAGENET, "--teacher", str(VAE), str(DIT), str(STATS)], "expected a LightningDiT checkpoint"),
    ([*IMAGENET, "--teacher", "{}/none.pt", str(VAE), str(STATS)], "none.pt"), ([*IMAGENET, "--teacher", "{}/page.pt", str(VAE), str(STATS)], "page.pt: damaged"),
    ([*IMAGENET, "--teacher", "{}/cut.pt", str(VAE), str(STATS)], "cut.pt: damaged"), ([*IMAGENET, "--teacher-t", "-0.1"], "--teacher-t"), ([*IMAGENET, "--cache-targets", "{}/file"], "file"),
    (["train_imagenet.py", "--data", "{}/images"], "--teacher: expected"),
    # eval_autoattack.py
    ([*EVAL, "{}/none.pt"], "none.pt"), ([*EVAL, "{}/cut.pt"], "cut.pt: damaged"), ([*EVAL, "{}/page.pt"], "page.pt: damaged"), ([*EVAL, "{}/list.pt"], "list.pt: holds a list"),
    ([*EVAL, str(DMAT)], "does not say its dataset; give --arch"), ([*EVAL, str(DMAT), "--arch", "wrn-28-10", "--dataset", "cifar10"], "is no wrn-28-10 for cifar10"),
    ([*EVAL, str(DMAT), "--arch", "wrn-10-1", "--dataset", "cifar100"], "logits.weight is [10, 64], expected [100, 64]"), ([*EVAL, "{}/incomplete.pt"], "incomplete.pt: is no wrn-28-10"),
    ([*EVAL, "{}/classes.pt"], "classifies into 10 classes, cifar100 has 100"), ([*EVAL, str(DMAT), "--arch", "nonsense", "--dataset", "cifar10"], "--arch nonsense"),
    ([*EVAL, str(DMAT), "--eps", "255"], "--eps"), ([*EVAL, str(DMAT), "--attacks", "square", "fgsm"], "--attacks"), ([*EVAL, str(DMAT), "--n", "0"], "--n 0"),
    ([*EVAL, str(DMAT), "--arch", "wrn-10-1", "--dataset", "cifar10", "--data-dir", "{}/few", "--script", "{}/none.py"], "none.py"),
    ([*EVAL, str(DMAT), "--arch", "wrn-10-1", "--dataset", "cifar10", "--out", "{}/file"], "file"),
    # experiments/analyze_representations.py
    *[(["experiments/analyze_representations.py", *arguments], named) for arguments, named in (
        ([], "command"), (["nonsense"], "nonsense"), (["uniformity"], "expected a checkpoint, --teacher FILE, or both"), (["cknna", str(DMAT), *ANALYZE], "--teacher"),
        (["cknna", str(DMAT), *ANALYZE, "--teacher", "{}/page.pkl"], "page.pkl: this is a web page"), (["cknna", str(DMAT), *ANALYZE, "--teacher", "{}/cut.pkl"], "cut.pkl"),
        (["probe", "--data-dir", "{}/cifar", "--teacher", "{}/16px.pkl"], "16px.pkl: made for 16 px images, expected 32"), (["cknna", str(DMAT), *ANALYZE, "--teacher", str(EDM), "--k", "60"], "--k 60"),
        (["probe", "--data-dir", "{}/cifar", "--teacher", str(EDM), "--layers", "enc.9x9"], "--layers enc.9x9: the teacher has enc.32x32_conv"),
        (["dims", str(DMAT)], "does not say its dataset"), (["dims", "{}/cut.pt"], "cut.pt: damaged"), (["dims", "{}/none.pt"], "none.pt"), (["dims", *ANALYZE], "checkpoints"),
        (["dims", str(DMAT), str(DMAT), *ANALYZE], "--names"), (["dims", str(DMAT), *ANALYZE, "--names", "a", "b"], "--names: expected 1"),
        (["dims", str(DMAT), *ANALYZE, "wrn-10-1"], "--arch: gives 2"), (["dims", str(DMAT), *ANALYZE, "--data-dir", "{}/notest"], "test.npz"), (["dims", str(DMAT), *ANALYZE, "--eps", "255"], "--eps"),
        (["dims", str(DMAT), *ANALYZE, "--n", "1"], "--n 1: expected at least 10"), (["sae", str(DMAT), *ANALYZE, "--ks", "4", "100000"], "--ks 100000"), (["sae", str(DMAT), *ANALYZE, "--out", "{}/file"], "file"),
        (["sae", str(DMAT), *ANALYZE, "--steps", "3"], "--steps"), (["curves", "{}/none"], "none"), (["curves", "{}/file"], "file: no log"), (["curves", "{}/cut.npz"], "cut.npz: no log"), (["curves", "{}"], "log.csv"))],
    # the teachers' own command lines
    (["edm_encoder.py", "{}/none.pkl"], "none.pkl"), (["edm_encoder.py", "{}/page.pkl"], "web page"), (["edm_encoder.py", str(EDM), "--layer", "nowhere"], "no layer 'nowhere'"),
    (["dit_encoder.py", str(DIT), str(VAE), "{}/none.pt"], "3 blocks, expected layer 14"), (["dit_encoder.py", str(STATS), str(VAE), str(STATS)], "this is latent statistics"),
] + [([script, *rest, "--device", "cuda"], "CUDA") for script, *rest in (CIFAR, IMAGENET, [*EVAL, str(DMAT)]) if not torch.cuda.is_available()]


def command_line(script, arguments, monkeypatch, capsys):
    """Run a script as `python SCRIPT ARGUMENTS` does. Returns (exit code, standard error)."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    capsys.readouterr()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def everything_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_every_case_is_named_and_exit_code_2(tmp_path, monkeypatch, capsys):
    folder = write_folders(tmp_path / "in")
    monkeypatch.chdir(tmp_path)  # where a default --out would show up
    before = everything_in(tmp_path)
    assert len(CASES) >= 70
    for (script, *arguments), named in CASES:
        arguments = [argument.replace("{}", str(folder)) for argument in arguments]
        code, errors = command_line(script, arguments, monkeypatch, capsys)
        lines = errors.splitlines()
        assert code == 2 and named in lines[-1] and "Traceback" not in errors, (script, arguments, code, errors)
        assert len(lines) == 1 and lines[0].startswith("error: ") or lines[0].startswith("usage: "), (script, arguments, errors)
        if script == "train_imagenet.py":  # the smoke run's folder and, before the path turns out to be wrong, nothing else
            assert not (tmp_path / "runs" / "imagenet-smoke" / "last.pt").exists()
    assert everything_in(folder) == {path: content for path, content in before.items() if folder in path.parents}


# ------------------------------------------------------------------------------------------------------------ hostile files

@pytest.fixture(scope="module")
def readers():
    """Every way in which a script of ours opens a file that may come from elsewhere: name -> function of a path."""
    args = train_cifar.parse_args(["--smoke"])
    run = train_cifar.build_run(args, torch.device("cpu"), None)
    return {
        "teacher of train_cifar.py": lambda path: train_cifar.load_teacher(train_cifar.parse_args(["--smoke", "--teacher", str(path)]), torch.device("cpu")),
        "LightningDiT": lambda path: dit_encoder.load_dit_encoder(path, VAE, STATS), "VA-VAE": lambda path: dit_encoder.load_dit_encoder(DIT, path, STATS, 2, (5, 21), 2, 64),
        "latent statistics": lambda path: dit_encoder.load_dit_encoder(DIT, VAE, path, 2, (5, 21), 2, 64),
        "checkpoint to continue (CIFAR)": lambda path: train_cifar.restore(path, args, run), "checkpoint to continue (ImageNet)": lambda path: train_imagenet.restore(path, args, run),
        "checkpoint to evaluate": lambda path: load_classifier(path, "wrn-10-1", "cifar10"), "synthetic images": lambda path: train_cifar.open_npz(path, 10),
    }


def test_no_reader_runs_anything_in_a_hostile_file(readers, tmp_path):
    """Each file, as a bare pickle, inside torch's zip format and as an object array of an npz, given to each reader."""
    marker = tmp_path / "was_run"
    contents = hostile_pickles(marker)
    assert len(contents) >= 20
    template = tmp_path / "template.pt"
    torch.save({"ema": 1}, template)
    for name, content in contents.items():
        files = {"bare.pkl": content}
        with zipfile.ZipFile(template) as source, zipfile.ZipFile(tmp_path / "zip.pt", "w") as target:  # torch's format, with another pickle
            for item in source.namelist():
                target.writestr(item, content if item.endswith("data.pkl") else source.read(item))
        files["zip.pt"] = (tmp_path / "zip.pt").read_bytes()
        with zipfile.ZipFile(tmp_path / "object.npz", "w") as target:
            for array in ("image", "label"):
                header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
                target.writestr(f"{array}.npy", header + content)
        files["object.npz"] = (tmp_path / "object.npz").read_bytes()
        for file_name, data in files.items():
            path = tmp_path / file_name
            path.write_bytes(data)
            for reader, read in readers.items():
                with pytest.raises((ValueError, OSError)) as caught:
                    read(path)
                assert file_name in str(caught.value) and "\n" not in str(caught.value), (reader, name, str(caught.value))
                assert not marker.exists(), (reader, name)
    pickle.loads(contents["open"])  # the test can fail: Python's own loader does run them
    assert marker.exists()
