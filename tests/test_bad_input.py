"""What users really get wrong: exit code 2, one line that names the file or flag (for flags behind a line of
usage), no traceback, nothing written, and nothing in a file run.

The scripts run here as the command line runs them (`__main__`), but in this process, which is faster than
starting one for each case.
"""
import pickle
import runpy
import shutil
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
from helpers import dump, edm_file
from eval_autoattack import load_classifier
from test_edm_encoder import hostile_pickles

ROOT, FIXTURES = Path(__file__).parent.parent, Path(__file__).parent / "fixtures"
EDM, DMAT = FIXTURES / "edm_tiny_cond_vp.pkl", FIXTURES / "dmat_wrn_10_1_cifar10.pt"
DIT, VAE, STATS = [FIXTURES / f"dit_tiny_{name}.pt" for name in ("dit", "vae", "latents_stats")]
HTML = b"<!DOCTYPE html><html>404 Not Found</html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def write_arrays(folder):
    """npz files that are wrong in one way each, and right ones."""
    image, label = np.zeros((60, 32, 32, 3), np.uint8), np.arange(60) % 10
    for name, arrays in {
            "good": {"image": image, "label": label},
            "no_image": {"label": label}, "no_label": {"image": image},
            "float": {"image": image / 255, "label": label}, "labels": {"image": image, "label": label + 1},
            "nchw": {"image": image.transpose(0, 3, 1, 2).copy(), "label": label},
            "fewer": {"image": image, "label": label[:-1]},
            "object": {"image": np.array([{}, []], object), "label": label}}.items():
        np.savez(folder / f"{name}.npz", **arrays)
    np.savez_compressed(folder / "compressed.npz", image=image, label=label)
    good = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(good[:9000])
    for name, train, test in (("cifar", good, good), ("no_train", None, good), ("no_test", good, None),
                              ("pages", HTML, HTML), ("pointers", POINTER, POINTER)):
        (folder / name).mkdir()
        for split, content in (("train", train), ("test", test)):
            if content:
                (folder / name / f"{split}.npz").write_bytes(content)


def write_classes(folder):
    """Folders of train.npz and test.npz with 3 and 43 classes, and one where class 2 of four has no image;
    checkpoints of a tiny ViT for three classes, and of a ViT with torchvision's names of weights."""
    for name, labels in (("three", np.arange(60) % 3), ("many", np.arange(430) % 43),
                         ("gap", np.array(20 * [0, 1, 3]))):
        (folder / name).mkdir()
        for split in ("train", "test"):
            np.savez(folder / name / f"{split}.npz", image=np.zeros((len(labels), 32, 32, 3), np.uint8),
                     label=labels)
    torch.manual_seed(0)
    weights = train_cifar.build_model("vit-tiny-2", 3, "npz").state_dict()
    about = {"arch": "vit-tiny-2", "dataset": "npz", "num_classes": 3, "mean": [0.0] * 3, "std": [1.0] * 3}
    torch.save(about | {"model_state_dict": weights}, folder / "vit.pt")
    torch.save({"model_state_dict": {"conv_proj.weight": torch.zeros(768, 3, 2, 2)}, "arch": "vit-b-2",
                "dataset": "cifar10", "num_classes": 10}, folder / "torchvision.pt")


def write_files(folder):
    """All that the cases below name with {}. Returns the folder."""
    folder.mkdir(parents=True)
    write_arrays(folder)
    write_classes(folder)
    for suffix in ("npz", "pkl", "pt"):
        (folder / f"page.{suffix}").write_bytes(HTML)
        (folder / f"pointer.{suffix}").write_bytes(POINTER)
    (folder / "cut.pkl").write_bytes(EDM.read_bytes()[:1000])
    (folder / "cut.pt").write_bytes(DMAT.read_bytes()[:5000])
    (folder / "file").write_text("x")
    small = {"img_resolution": 16, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2],
             "num_blocks": 1}
    dump(edm_file(EDMEncoder("dec.8x8_in1", **small), small), folder / "16px.pkl")
    weights = torch.load(DMAT, weights_only=True)["model_state_dict"]
    for name, content in {
            "incomplete": {"model_state_dict": {"logits.weight": torch.zeros(10, 640)}, "arch": "wrn-28-10",
                           "dataset": "cifar10"},
            "classes": {"model_state_dict": weights, "arch": "wrn-10-1", "dataset": "cifar100",
                        "num_classes": 10},
            "list": [1, 2, 3]}.items():
        torch.save(content, folder / f"{name}.pt")
    for name, file in (("other_kind", DMAT), ("cut", folder / "cut.pt")):
        (folder / "runs" / name).mkdir(parents=True)
        shutil.copy(file, folder / "runs" / name / "last.pt")
    (folder / "runs" / "only_best").mkdir()
    shutil.copy(DMAT, folder / "runs" / "only_best" / "best.pt")
    for name in ("images/train/n0", "images/train/n1", "others/n0", "no_classes/train", "empty/train/n0"):
        (folder / name).mkdir(parents=True)
        for i in range(8 if name.startswith(("images", "others")) else 0):
            Image.new("RGB", (40, 40)).save(folder / name / f"{i}.png")
    return folder


CIFAR = "train_cifar.py --smoke --max-steps 1"
REAL = ("train_cifar.py --device cpu --arch wrn-10-1 --dra-weight 0 --data-dir {}/cifar --batch-size 16 "
        "--max-steps 1")
IMAGENET = ("train_imagenet.py --smoke --arch test_vit --image-size 32 --workers 0 --batch-size 8 "
            "--max-steps 1 --data {}/images")
EVAL = "eval_autoattack.py --device cpu --data-dir {}/cifar"
TENTH = f"{DMAT} --arch wrn-10-1 --dataset cifar10"  # a WRN-10-1 of DM-AT
PAGE = "is a web page (HTML), not the file itself"
LFS = "is a Git LFS pointer, not the file itself: run git lfs pull"
CASES = [  # a command, and what its line has to say
    # train_cifar.py: teachers
    (f"{CIFAR} --teacher {{}}/none.pkl", "none.pkl"),
    (f"{CIFAR} --teacher {{}}/page.pkl", f"page.pkl: {PAGE}"),
    (f"{CIFAR} --teacher {{}}/pointer.pkl", f"pointer.pkl: {LFS}"),
    (f"{CIFAR} --teacher {{}}/pointer.pt", f"pointer.pt: {LFS}"),
    (f"{CIFAR} --teacher {{}}/cut.pkl", "cut.pkl: damaged, refused or no EDM network"),
    (f"{CIFAR} --teacher {{}}/cut.pt", "cut.pt: damaged, refused or no EDM network"),
    (f"{CIFAR} --teacher {DMAT}", "dmat_wrn_10_1_cifar10.pt: damaged, refused or no EDM network"),
    (f"{CIFAR} --teacher {{}}/16px.pkl", "16px.pkl: is for 16 px, 10 classes, not 32 and 10"),
    (f"{CIFAR} --teacher {EDM} --dataset cifar100", "cond_vp.pkl: is for 32 px, 10 classes, not 32 and 100"),
    (f"{CIFAR} --teacher {EDM} --teacher-layer dec.4x4_in1", "edm_tiny_cond_vp.pkl: no layer 'dec.4x4_in1'"),
    (f"{CIFAR} --teacher-layer dec.9x9", "no layer 'dec.9x9' in this network"),
    # train_cifar.py: data
    (f"{REAL} --synthetic {{}}/none.npz", "none.npz"),
    (f"{REAL} --synthetic {{}}/good.npz {{}}/page.npz", f"page.npz: {PAGE}"),
    (f"{REAL} --synthetic {{}}/pointer.npz", f"pointer.npz: {LFS}"),
    (f"{REAL} --synthetic {{}}/no_image.npz", "no_image.npz: expected 'image' and 'label'"),
    (f"{REAL} --synthetic {{}}/no_label.npz", "no_label.npz: expected 'image' and 'label'"),
    (f"{REAL} --synthetic {{}}/float.npz", "float.npz: image is float64"),
    (f"{REAL} --synthetic {{}}/nchw.npz", "nchw.npz: image is uint8 (60, 3, 32, 32)"),
    (f"{REAL} --synthetic {{}}/fewer.npz", "fewer.npz: image is uint8 (60, 32, 32, 3), label int64 (59,)"),
    (f"{REAL} --synthetic {{}}/labels.npz", "labels.npz: labels run from 1 to 10, expected 0 to 9"),
    (f"{REAL} --synthetic {{}}/object.npz", "object.npz: "),
    (f"{REAL} --synthetic {{}}/compressed.npz", "compressed.npz: expected 'image' and 'label' as from"),
    (f"{REAL} --synthetic {{}}/cut.npz", "cut.npz: expected 'image' and 'label'"),
    (f"{REAL} --dataset cifar100", "cifar/train.npz: labels run from 0 to 9, expected 0 to 99"),
    (f"{REAL} --data-dir {{}}/no_train", "no_train/train.npz"),
    (f"{REAL} --data-dir {{}}/pages", f"pages/train.npz: {PAGE}"),
    (f"{REAL} --data-dir {{}}/pointers", f"pointers/train.npz: {LFS}"),
    (f"{REAL} --data-dir {{}}/file", "--data-dir"),
    # train_cifar.py: other numbers of classes, and pieces of a batch
    (f"{REAL} --data-dir {{}}/three", "three: no training image has label 9, expected 0 to 9; --dataset npz"),
    (f"{REAL} --data-dir {{}}/many", "labels run from 0 to 42, expected 0 to 9; --dataset npz takes other"),
    (f"{REAL} --data-dir {{}}/many --dataset cifar100", "many: no training image has label 99, expected"),
    (f"{REAL} --data-dir {{}}/gap --dataset npz", "gap: no training image has label 2, expected 0 to 3"),
    (f"{REAL} --data-dir {{}}/three --dataset npz --synthetic {{}}/good.npz", "good.npz: labels run"),
    (f"{REAL} --data-dir {{}}/many --dataset npz --dra-weight 1", "--dataset npz: expected --teacher FILE"),
    (f"{REAL} --data-dir {{}}/many --dataset npz --dra-weight 1 --teacher {EDM}",
     "cond_vp.pkl: is for 32 px, 10 classes, not 32 and 43; --teacher-unconditional"),
    (f"{REAL} --batch-size 128 --accumulate 3", "--batch-size 128: expected a multiple of 1 process(es) x"),
    # train_cifar.py: flags, and a folder of something else
    (f"{CIFAR} --arch resnet-18", "--arch resnet-18: expected vit-b-2, or wrn-DEPTH-WIDTH"),
    (f"{CIFAR} --arch wrn-11-1", "--arch wrn-11-1"), (f"{CIFAR} --eps 255", "--eps: '255'"),
    (f"{CIFAR} --nonsense", "--nonsense"), (f"{CIFAR} extra", "extra"), (f"{CIFAR} --lr", "--lr"),
    (f"{REAL} --out {{}}/runs/other_kind", "runs/other_kind/last.pt: damaged, or no last.pt of this script"),
    (f"{REAL} --out {{}}/runs/cut", "runs/cut/last.pt: damaged"),
    (f"{REAL} --out {{}}/runs/only_best", "runs/only_best: has files of a run but no last.pt"),
    # train_imagenet.py: data
    (f"{IMAGENET} --data {{}}/nowhere", "nowhere/train"), (f"{IMAGENET} --data {{}}/file", "file/train"),
    (f"{IMAGENET} --data {{}}/no_classes", "no_classes/train"),
    (f"{IMAGENET} --data {{}}/empty", "empty/train"),
    (f"{IMAGENET} --synthetic {{}}/none", "none: expected a folder of images for each class"),
    (f"{IMAGENET} --synthetic {{}}/others", "others: expected the class folders of train/, but n1 is not in"),
    # train_imagenet.py: teachers
    (f"{IMAGENET} --teacher {VAE} {DIT} {STATS}", "dit_tiny_vae.pt: expected a LightningDiT checkpoint"),
    (f"{IMAGENET} --teacher {{}}/none.pt {VAE} {STATS}", "none.pt"),
    (f"{IMAGENET} --teacher {{}}/page.pt {VAE} {STATS}", f"page.pt: {PAGE}"),
    (f"{IMAGENET} --teacher {{}}/pointer.pt {VAE} {STATS}", f"pointer.pt: {LFS}"),
    (f"{IMAGENET} --teacher {{}}/cut.pt {VAE} {STATS}", "cut.pt: damaged"),
    (f"{IMAGENET} --teacher {DIT} {VAE} {STATS} --teacher-layer 99", "dit_tiny_dit.pt: has 3 blocks"),
    ("train_imagenet.py --device cpu --data {}/images", "--teacher: expected"),
    # train_imagenet.py: flags, and a folder of something else
    (f"{IMAGENET} --arch resnet18", "--arch resnet18: has BatchNorm"), (f"{IMAGENET} --eps 4", "--eps: '4'"),
    (f"{IMAGENET} --arch vit_huge_nonsense", "--arch vit_huge_nonsense: timm has no such model"),
    (f"{IMAGENET} --accumulate 3", "--accumulate 3"), (f"{IMAGENET} --teacher-t=-0.1", "--teacher-t: '-0.1'"),
    (f"{IMAGENET} --teacher {DIT} {VAE}", "--teacher: expected 3 arguments"),
    (f"{IMAGENET} --out {{}}/runs/other_kind", "runs/other_kind/last.pt: damaged, or no last.pt of this"),
    (f"{IMAGENET} --out {{}}/runs/only_best", "runs/only_best: has files of a run but no last.pt"),
    # eval_autoattack.py
    (f"{EVAL} {{}}/none.pt", "none.pt"), (f"{EVAL} {{}}/cut.pt", "cut.pt: damaged"),
    (f"{EVAL} {{}}/page.pt", f"page.pt: {PAGE}"), (f"{EVAL} {{}}/pointer.pt", f"pointer.pt: {LFS}"),
    (f"{EVAL} {{}}/list.pt", "list.pt: holds a list"),
    (f"{EVAL} {DMAT}", "dmat_wrn_10_1_cifar10.pt: does not say its arch or dataset"),
    (f"{EVAL} {DMAT} --arch wrn-28-10 --dataset cifar10", "dmat_wrn_10_1_cifar10.pt: is no wrn-28-10"),
    (f"{EVAL} {DMAT} --arch wrn-10-1 --dataset cifar100", "logits.weight is [10, 64], expected [100, 64]"),
    (f"{EVAL} {DMAT} --arch nonsense --dataset cifar10", "--arch nonsense"),
    (f"{EVAL} {{}}/incomplete.pt", "incomplete.pt: is no wrn-28-10"),
    (f"{EVAL} {{}}/classes.pt", "classes.pt: classifies into 10 classes, cifar100 has 100"),
    (f"{EVAL} {TENTH} --script {{}}/none.py", "none.py"),
    (f"{EVAL} {DMAT} --arch vit-tiny-2 --dataset cifar10", "cifar10.pt: is no vit-tiny-2 for cifar10"),
    (f"{EVAL} {{}}/vit.pt --arch wrn-10-1", "vit.pt: is no wrn-10-1 for npz"),
    (f"{EVAL} {{}}/torchvision.pt", "torchvision.pt: is no vit-b-2 for cifar10"),
    (f"{EVAL} {{}}/vit.pt", "cifar: has label 9 in the test images, expected 0 to 2 as in training"),
    (f"{EVAL} {{}}/vit.pt --data-dir {{}}/three --attacks apgd-t", "there is no apgd-t on 3 classes"),
    (f"{EVAL} {DMAT} --arch wrn-10-1 --dataset npz", "does not say its number of classes"),
    (f"{EVAL} {TENTH} --data-dir {{}}/no_test", "no_test/test.npz"),
    (f"{EVAL} {TENTH} --data-dir {{}}/pointers", f"pointers/test.npz: {LFS}"),
    (f"{EVAL} {TENTH} --eps 255", "--eps: '255'"), (f"{EVAL} {TENTH} --n 0", "--n: '0'"),
    (f"{EVAL} {TENTH} --attacks square fgsm", "--attacks: invalid choice: 'fgsm'"),
    # the teachers' own command lines
    ("edm_encoder.py {}/none.pkl", "none.pkl"), ("edm_encoder.py {}/page.pkl", f"page.pkl: {PAGE}"),
    ("edm_encoder.py {}/pointer.pkl", f"pointer.pkl: {LFS}"),
    ("edm_encoder.py {}/cut.pkl", "cut.pkl: damaged, refused or no EDM network"),
    (f"edm_encoder.py {DMAT}", "dmat_wrn_10_1_cifar10.pt: damaged, refused or no EDM network"),
    (f"dit_encoder.py {DIT} {VAE} {{}}/none.pt", "dit_tiny_dit.pt: has 3 blocks, expected layer 14"),
    (f"dit_encoder.py {DIT} {VAE} {{}}/none.pt --layer 2", "none.pt"),
    (f"dit_encoder.py {DIT} {{}}/page.pt {STATS} --layer 2", f"page.pt: {PAGE}"),
    (f"dit_encoder.py {DIT} {VAE} {{}}/pointer.pt --layer 2", f"pointer.pt: {LFS}"),
    (f"dit_encoder.py {STATS} {VAE} {STATS}", "latents_stats.pt: expected a LightningDiT checkpoint"),
]
if not torch.cuda.is_available():
    CASES += [(f"{command} --device cuda", "--device cuda: there is no CUDA device here")
              for command in (CIFAR, IMAGENET, f"{EVAL} {TENTH}")]
SCRIPTS = list(dict.fromkeys(command.split()[0] for command, _ in CASES))


def command_line(script, arguments, monkeypatch, capsys):
    """Run a script as `python SCRIPT ARGUMENTS` does. Returns (exit code, standard error)."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    capsys.readouterr()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def everything_in(folder):
    """Every folder, and every file with its content. A lock is empty, and may come and go."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
            if path.name != "lock"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_case_is_named_in_one_line_with_exit_code_2(script, tmp_path, monkeypatch, capsys):
    folder = write_files(tmp_path / "in")
    monkeypatch.chdir(tmp_path)  # where a default --out would show up
    before = everything_in(tmp_path)
    for command, named in CASES:
        if command.split()[0] != script:
            continue
        arguments = [argument.replace("{}", str(folder)) for argument in command.split()[1:]]
        code, errors = command_line(script, arguments, monkeypatch, capsys)
        lines = errors.splitlines()
        assert code == 2 and lines and named in lines[-1], (command, code, errors)
        if lines[0].startswith("usage: "):  # two lines; only subcommands have a longer usage
            assert len(lines) == 2, (command, errors)
            assert lines[-1].startswith(Path(script).name) and ": error: " in lines[-1], (command, errors)
        else:
            assert len(lines) == 1 and errors.startswith("error: "), (command, errors)
    assert everything_in(tmp_path) == before, "nothing is written, and nothing changed"


def test_the_cases_are_many():
    assert len(CASES) > 95 and len(SCRIPTS) == 5


# ---------------------------------------------------------------------------------------------- hostile files

@pytest.fixture
def readers(tmp_path):
    """Every way in which a script opens a file that may come from elsewhere: name -> function of a path."""
    run = tmp_path / "run"
    run.mkdir()
    sizes = {"layer": 2, "zero_channels": (5, 21), "num_heads": 2, "image_size": 64}

    def teacher(path):
        train_cifar.load_teacher(train_cifar.parse_args(["--smoke", "--teacher", str(path)]))

    def continued_by(script):
        def resume(path):
            shutil.copy(path, run / "last.pt")
            script.resume(run, {"recipe": {}}, None)
        return resume
    return {
        "teacher of train_cifar.py": teacher,
        "LightningDiT": lambda path: dit_encoder.load_dit_encoder(path, VAE, STATS, **sizes),
        "VA-VAE": lambda path: dit_encoder.load_dit_encoder(DIT, path, STATS, **sizes),
        "latent statistics": lambda path: dit_encoder.load_dit_encoder(DIT, VAE, path, **sizes),
        "last.pt of train_cifar.py": continued_by(train_cifar),
        "last.pt of train_imagenet.py": continued_by(train_imagenet),
        "checkpoint to evaluate": lambda path: load_classifier(path, "wrn-10-1", "cifar10"),
        "synthetic images": lambda path: train_cifar.open_npz(path, 10),
    }


def in_all_formats(content, folder):
    """A pickle by itself, inside torch's zip format, and as object arrays in an npz."""
    (folder / "bare.pkl").write_bytes(content)
    torch.save({"ema": 1}, folder / "template.pt")
    with zipfile.ZipFile(folder / "template.pt") as source, zipfile.ZipFile(folder / "zip.pt", "w") as target:
        for item in source.namelist():
            target.writestr(item, content if item.endswith("data.pkl") else source.read(item))
    with zipfile.ZipFile(folder / "object.npz", "w") as target:
        for array in ("image", "label"):
            header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117)
            target.writestr(f"{array}.npy", b"\x93NUMPY\x01\x00v\x00" + header + b"\n" + content)
    return [folder / name for name in ("bare.pkl", "zip.pt", "object.npz")]


def test_no_reader_runs_anything_in_a_hostile_file(readers, tmp_path):
    marker = tmp_path / "was_run"
    contents = hostile_pickles(marker)
    assert len(contents) >= 20
    for name, content in contents.items():
        for path in in_all_formats(content, tmp_path):
            for reader, read in readers.items():
                with pytest.raises((ValueError, OSError)) as caught:
                    read(path)
                named = "last.pt" if reader.startswith("last.pt") else path.name
                assert named in str(caught.value) and "\n" not in str(caught.value), (reader, name)
                assert not marker.exists(), (reader, name)
    pickle.loads(contents["open"])  # the test can fail: Python's own loader does run them
    assert marker.exists()
