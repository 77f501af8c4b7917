"""AutoAttack on any checkpoint: the number that this field trusts, made exact, resumable and hard to fool.

    python eval_autoattack.py runs/cifar/best.pt --data-dir data            # CIFAR test set, four attacks
    python eval_autoattack.py weights-best.pt --arch wrn-28-10 --dataset cifar10         # DM-AT's or RobustBench's file
    python eval_autoattack.py runs/imagenet/best.pt --data-dir imagenet --image-list imagenet_test_image_ids.txt  # RobustBench's 5,000
    torchrun --nproc-per-node 8 -- eval_autoattack.py runs/cifar/best.pt    # the same result on eight GPUs

AutoAttack (Croce & Hein 2020, arXiv 2003.01690; package pyautoattack, by its authors) runs APGD-CE, targeted APGD-DLR, targeted
FAB and Square, each on the images that survived the ones before. An image counts as robust if it is classified correctly and
none of the four finds an image within eps that is not.

This script runs the library's own attacks in the library's own order, batch by batch, and keeps each finished batch on disk:
adversarial images and results. A kill loses at most the batch at work; the same command continues.

How far this equals `AutoAttack.run_standard_evaluation` on the same model, images, seed and batch size: image by image, bit for
bit, as far as the model itself computes the same twice (a CPU with the same number of threads does; on CUDA some kernels, such as attention's
backward pass, may not). The library seeds its generators anew before every batch of every attack and draws from nothing else, so
what an attack does to a batch depends on that batch alone; and the batches are the same ones, consecutive survivors. That holds
after a kill, and for several processes, which share out whole batches. It does not hold for another batch size, nor for a model
that is random itself (--version rand), whose verdicts cannot be repeated.
"""
import argparse
import hashlib
import importlib.util
import json
import logging
import os
import signal
import sys
import time
from datetime import timedelta
from fractions import Fraction
from importlib.metadata import version as package_version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyautoattack
import pyautoattack.checks
import torch
import torch.distributed as dist
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Settings

BENCHMARKS = {  # RobustBench's: number of classes, eps, and the training script whose build_model makes the network
    "cifar10": SimpleNamespace(classes=10, eps="8/255", script="train_cifar.py"),
    "cifar100": SimpleNamespace(classes=100, eps="8/255", script="train_cifar.py"),
    "imagenet": SimpleNamespace(classes=1000, eps="4/255", script="train_imagenet.py"),
}
FULL_TEST_SET = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}  # images; ImageNet: RobustBench's list
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
TOLERANCE = 1e-6  # by which |x' - x| may exceed eps: float32 rounding of x + eps near 1 is 6e-8


class InputError(ValueError):
    """Something that the user gave cannot be used. One line; the command line prints it and exits with code 2."""


class VerificationError(RuntimeError):
    """The stored result does not hold what it claims."""


def fraction(text):
    """A pixel distance on the [0, 1] scale as a float: "8/255" and "0.031" both work."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text}: expected a number such as 8/255") from None


def parse_args(argv=None):
    """Command line -> Namespace. Raises InputError for a flag that is unknown or out of range."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.error = _raise_input_error  # one line and exit code 2, without the usage text
    add = parser.add_argument
    add("checkpoint", help="of these scripts, of DM-AT, or of RobustBench")
    add("--arch", help="as in the training script; taken from the checkpoint if it says so")
    add("--dataset", choices=list(BENCHMARKS), help="taken from the checkpoint if it says so")
    add("--script", help="a modified copy of a training script, whose build_model makes the network")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which of the two that a checkpoint holds")
    add("--data-dir", default="data", help="CIFAR: as in train_cifar.py; ImageNet: folder with val/ and a folder per class in it")
    add("--image-list", help="ImageNet: file with one relative path per line, such as RobustBench's list of 5,000")
    add("--n", type=int, help="only the first N images")
    add("--eps", type=fraction, help="largest change of a pixel in [0,1] (default: RobustBench's, 8/255 and for ImageNet 4/255)")
    add("--version", choices=["standard", "plus", "rand"], default="standard", help="AutoAttack's sets of attacks")
    add("--attacks", nargs="+", choices=ATTACKS, help="only these, with the settings of --version")
    add("--batch-size", type=int, default=250, help="images attacked together")
    add("--seed", type=int, default=0, help="of the attacks")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--tf32", action="store_true", help="allow TF32 on CUDA: faster, and no longer float32")
    add("--out", help="folder for result.json, images.npz and the finished batches (default: CHECKPOINT.autoattack)")
    args = parser.parse_args(argv)
    for name in ("n", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if args.eps is not None and not 0 < args.eps < 1:
        raise InputError(f"--eps {args.eps}: expected more than 0 and less than 1, such as 8/255")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: expected at least 0 and less than 2^63")
    if args.attacks and len(set(args.attacks)) < len(args.attacks):
        raise InputError(f"--attacks {' '.join(args.attacks)}: expected each attack once")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu")
    return args


def _raise_input_error(message):
    raise InputError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint -> classifier


def load_classifier(path, arch=None, dataset=None, script=None, weights="averaged"):
    """A classifier in evaluation mode, frozen, float32, channels-last, on the CPU: images [B, 3, H, W] in [0, 1] -> logits [B, classes].

    path: a checkpoint of these scripts, DM-AT's (`model_state_dict`, keys may begin with "module.0.") or RobustBench's for CIFAR (weights
    bare or under `state_dict`). arch and dataset: in place of what the checkpoint says, necessary where it says nothing. script: a
    training script whose `build_model` makes the network, by default the one for the dataset. weights: "averaged" or "raw".
    Loading is strict and runs nothing that is in the file. The returned module has `info`: arch, dataset, weights, num_classes,
    script, and args, the settings of the training run ({} in foreign files). Raises InputError, one line that names the file.
    """
    saved = read_checkpoint(path)
    arch, dataset, settings = arch or saved.get("arch"), dataset or saved.get("dataset"), saved.get("args")
    known = isinstance(dataset, str) and dataset in BENCHMARKS
    if not known or not isinstance(arch, str):
        raise InputError(f"{path}: does not say its {'arch' if known else 'dataset'}; give --arch (such as wrn-28-10) and --dataset")
    state, classes = choose_weights(path, saved, weights), BENCHMARKS[dataset].classes
    if dataset == "imagenet" and isinstance(saved.get("num_classes"), int):  # or a part of its classes
        classes = saved["num_classes"]
    elif script is None and isinstance(saved.get("num_classes"), int) and saved["num_classes"] != classes:
        raise InputError(f"{path}: classifies into {saved['num_classes']} classes, {dataset} has {classes}")
    script = Path(script or Path(__file__).with_name(BENCHMARKS[dataset].script))
    last = {"pretrained": False} if dataset == "imagenet" else {"dataset": dataset}
    try:
        model = import_script(script).build_model(arch, classes, **last)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {script.name} cannot build it ({error})") from None
    expected = model.state_dict()
    for prefix in ("module.", "model.", "0."):  # DataParallel, a wrapper, and DM-AT's Sequential, in this order
        if state.keys() != expected.keys() and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    check_fit(path, state, expected, f"{arch} for {dataset}")
    model.load_state_dict(state, strict=True)
    model.info = SimpleNamespace(arch=arch, dataset=dataset, weights=weights, num_classes=classes, script=script,
                                 args=settings if isinstance(settings, dict) else {})
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def read_checkpoint(path):
    """A checkpoint's dict. Data only: torch's restricted reader runs nothing that is in the file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # cannot be opened
            raise
        # Without torch's own text: it suggests to load with weights_only=False, which is how a hostile file gets to run.
        raise InputError(f"{path}: damaged, or no checkpoint of tensors and plain data ({type(error).__name__})") from None
    if not isinstance(saved, dict):
        raise InputError(f"{path}: holds a {type(saved).__name__}, expected a dict of weights")
    return saved


def choose_weights(path, saved, weights):
    """The averaged or raw weights of a checkpoint: {parameter name: tensor}, names as they are in the file."""
    key = {"averaged": "model_state_dict", "raw": "unaveraged_model_state_dict"}[weights]
    if key in saved:
        state = saved[key]
    elif weights == "raw" or "model_state_dict" in saved:
        raise InputError(f"{path}: holds no {weights} weights ({key})")
    else:  # RobustBench
        state = saved.get("state_dict", saved)
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise InputError(f"{path}: holds no dict of tensors under model_state_dict, state_dict or by itself")
    return state


def check_fit(path, state, expected, what):
    """Raise InputError, one line, unless names and shapes in `state` are those in `expected`."""
    problems = [f"lacks {name}" for name in expected if name not in state] + [f"has an unknown {name}" for name in state if name not in expected]
    problems += [f"{name} is {list(state[name].shape)}, expected {list(expected[name].shape)}"
                 for name in expected if name in state and state[name].shape != expected[name].shape]
    problems += [f"{name} is not finite" for name, value in state.items() if not value.isfinite().all()]
    if problems:
        raise InputError(f"{path}: is no {what}: {problems[0]}" + (f", and {len(problems) - 1} more differences" if len(problems) > 1 else ""))


def import_script(path):
    """A training script as a module. It is the user's own code, named on the command line; a checkpoint cannot name one."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; --script names the training script that defines the network")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "build_model"):
        raise InputError(f"--script {path}: defines no build_model")
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Images


def load_images(args, info, split="test"):
    """The first args.n images of a split, float32 [N, 3, H, W] in [0, 1], and labels int64 [N], on the CPU. info: as `load_classifier` leaves
    it; split: "test" or, for CIFAR, "train"."""
    if info.dataset == "imagenet":
        if split != "test":
            raise InputError(f"ImageNet: only the test images are read, not {split}")
        return load_imagenet(Path(args.data_dir), args.image_list, args.n, info.num_classes, info.args.get("image_size", 224), info.args.get("classes"))
    import train_cifar
    source = SimpleNamespace(dataset=info.dataset, data_dir=args.data_dir, smoke=info.args.get("smoke") is True, seed=info.args.get("seed", 0))
    try:
        part = train_cifar.load_real(source, split).to("cpu", end=args.n)
    except train_cifar.InputError as error:
        raise InputError(str(error)) from None
    return part.images.permute(0, 3, 1, 2).contiguous().float() / 255, part.labels.long()


def load_imagenet(folder, image_list, n, num_classes=1000, image_size=224, class_names=None):
    """RobustBench's protocol: shorter side to 256, centre crop 224 (in proportion for another image_size); the listed images, else
    all of val/ in order.

    Class numbers are the positions of the class folders in sorted order, and class_names, if the checkpoint has them, the names that
    these have to have. A listed path is relative to `folder` or to its val/.
    """
    from torchvision import datasets, transforms
    if not isinstance(image_size, int) or not 32 <= image_size < 4096:
        raise InputError(f"the checkpoint's image_size is {image_size}, expected 32 to 4095")
    if not (folder / "val").is_dir():
        raise InputError(f"--data-dir {folder}: has no folder val/")
    names = sorted(entry.name for entry in (folder / "val").iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes = {name: i for i, name in enumerate(names)}
    if len(classes) != num_classes:
        raise InputError(f"--data-dir {folder}: val/ has {len(classes)} class folders, expected {num_classes}")
    if class_names is not None and class_names != names:
        raise InputError(f"--data-dir {folder}: the class folders in val/ have other names than those that the checkpoint was trained on")
    if image_list is None:
        paths = [path for name in names for path in sorted((folder / "val" / name).iterdir()) if path.name.lower().endswith(datasets.folder.IMG_EXTENSIONS)]
        if n is None and len(paths) > 10_000:
            raise InputError(f"--data-dir {folder}: val/ has {len(paths):,} images, expected --image-list (RobustBench's 5,000) or --n, since all are held in memory")
    else:
        lines = [line.split()[0] for line in Path(image_list).read_text(errors="replace").splitlines() if line.strip()]
        paths = [folder / line if line.startswith("val/") else folder / "val" / line for line in lines]
        if len(set(paths)) < len(paths):
            raise InputError(f"--image-list {image_list}: names an image twice")
    prepare = transforms.Compose([transforms.Resize(round(image_size * 256 / 224)), transforms.CenterCrop(image_size), transforms.ToTensor()])
    images, labels = [], []
    for path in tqdm(paths[:n], desc="reading images", disable=None):
        if path.parent.name not in classes:
            raise InputError(f"--image-list {image_list}: {path} is in no class folder of {folder / 'val'}")
        try:
            images.append(prepare(datasets.folder.pil_loader(path)))
        except Exception as error:  # a damaged file can fail in any way
            raise InputError(f"{path}: cannot be read as an image ({type(error).__name__})") from None
        labels.append(classes[path.parent.name])
    if not images:
        raise InputError(f"--image-list {image_list}: names no image")
    return torch.stack(images), torch.tensor(labels)


# ---------------------------------------------------------------------------------------------------------------------
# AutoAttack, batch by batch


class Flags(logging.Handler):
    """Collects AutoAttack's warnings (zero gradients, randomness and so on), which it sends to a logger."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.seen = []
        self.logger = logging.getLogger("auto-attack")
        self.logger.addHandler(self)
        self.logger.propagate = False

    def emit(self, record):
        """Keep a message, once."""
        if record.getMessage() not in self.seen:
            self.seen.append(record.getMessage())

    def take(self):
        """What was collected since the last call."""
        seen, self.seen = self.seen, []
        return seen


def perturb(attacker, attack, x, y):
    """One attack of the library on one batch, set up as its own `run_standard_evaluation` does. Returns x' like x."""
    if attack in ("apgd-ce", "apgd-dlr"):
        method = attacker.apgd
        method.loss = attack.removeprefix("apgd-")
    elif attack == "apgd-t":
        method = attacker.apgd_targeted
    elif attack in ("fab", "fab-t"):
        method = attacker.fab
        method.targeted = attack == "fab-t"
        method.n_restarts = 5 if attacker.version == "plus" and not method.targeted else 1
    else:
        method = attacker.square
    method.seed = attacker.get_seed()
    with torch.no_grad():
        return method.perturb(x, y)


def predict(model, x):
    """Predicted classes [B] of images x [B, 3, H, W]. Raises VerificationError where a logit is not finite: no attack can work there."""
    with torch.no_grad():
        logits = model(x)
    if not logits.isfinite().all():
        raise VerificationError("the model's logits are not finite: attacks find nothing on such a model, and their result would mean nothing")
    return logits.argmax(dim=1)


def wait_for_all():
    """Wait for the other processes, if there are any. Raises ConnectionError where one has died."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError:
            raise ConnectionError("another process has stopped; finished batches are kept, and the same command continues") from None


def run_attack(attack, model, attacker, images, labels, survivors, folder, batch_size, flags, rank=0, world=1):
    """Attack the surviving images in batches, and keep every finished batch in `folder`. Returns one dict per batch.

    attack: a name in ATTACKS, or "clean" for no attack. survivors: indices int64 [M] into images [N, 3, H, W] and labels [N]. A
    batch's dict has index [n], predicted [n], broken [n] bool, adversarial [number broken, 3, H, W], seconds, flags.
    Processes share out the batches by number and then read each other's from the folder.
    """
    device = next(model.parameters()).device
    batches = list(survivors.split(batch_size)) if len(survivors) else []
    files = [folder / f"{attack}_{number:05d}.npz" for number in range(len(batches))]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    wait_for_all()  # all processes have to see the same ones missing before the first of them adds one
    for number in tqdm(missing[rank::world], desc=f"{attack:8}", unit="batch", disable=rank > 0):
        index, since = batches[number], time.time()
        x, y = images[index].to(device), labels[index].to(device)
        torch.manual_seed(attacker.seed)  # the library does so too; this is for models that are random themselves
        adversarial = x if attack == "clean" else perturb(attacker, attack, x.clone(), y.clone())
        predicted = predict(model, adversarial)
        broken = predicted != y
        kept = adversarial[broken] if attack != "clean" else x[:0]
        save_atomically(files[number], index=index.numpy(), predicted=predicted.cpu().numpy(), broken=broken.cpu().numpy(),
                        adversarial=kept.cpu().numpy(), seconds=time.time() - since, flags=json.dumps(flags.take()))
    wait_for_all()
    results = [read_batch(file) for file in files]
    for file, result, index in zip(files, results, batches):
        if not np.array_equal(result["index"], index.numpy()):
            raise VerificationError(f"{file}: is of other images than this run's; the folder was changed by hand or by another run")
    return results


def save_atomically(path, **arrays):
    """numpy.savez under a temporary name, flushed to the disk, then renamed: `path` is whole or does not exist."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_batch(path):
    """A stored batch as a dict of arrays. Raises VerificationError where it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:
        raise VerificationError(f"{path}: damaged ({type(error).__name__}); delete it to attack its images again") from None


def check_model(model, images, labels, batch_size, attacks, attacker, version):
    """AutoAttack's own checks of the model on the first batch; what they find goes to its logger."""
    device, logger = next(model.parameters()).device, attacker.logger
    x, y = images[:batch_size].to(device), labels[:batch_size].to(device)
    if version != "rand":
        pyautoattack.checks.check_randomized(model, x, y, bs=batch_size, logger=logger)
    classes = pyautoattack.checks.check_range_output(model, x, logger=logger)
    pyautoattack.checks.check_dynamic(model, x, False, logger=logger)
    pyautoattack.checks.check_n_classes(classes, attacks, attacker.apgd_targeted.n_target_classes, attacker.fab.n_target_classes, logger=logger)


def evaluate(model, images, labels, folder, eps, attacks=None, version="standard", batch_size=250, seed=0, rank=0, world=1):
    """Clean accuracy, then each attack on the survivors of those before. Continues from the batches that `folder` holds.

    model: see `load_classifier`; images float32 [N, 3, H, W] in [0, 1], labels int64 [N], on the CPU; attacks: None for all of
    `version`. Returns SimpleNamespace: attacks, accuracy {"clean" and each attack: percent left}, seconds {attack},
    broken_by [N] int (0: misclassified, k: by the k-th attack, -1: robust), predicted [N], adversarial [N, 3, H, W] (the clean
    image where none was found), flags [text]. Raises InputError for images outside [0, 1].
    """
    if images.dtype != torch.float32 or not (images.min() >= 0 and images.max() <= 1):
        raise InputError(f"images have to be float32 in [0, 1], not {images.dtype} in [{images.min():g}, {images.max():g}]")
    flags, count = Flags(), len(labels)
    attacker = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, version=version, device=next(model.parameters()).device, seed=seed)
    attacks = list(attacks or attacker.attacks_to_run)
    check_model(model, images, labels, batch_size, attacks, attacker, version)
    result = SimpleNamespace(attacks=attacks, accuracy={}, seconds={}, flags=flags.take(), broken_by=torch.full((count,), -1),
                             predicted=torch.empty(count, dtype=torch.int64), adversarial=images.clone())
    for number, attack in enumerate(["clean", *attacks]):
        survivors = (result.broken_by == -1).nonzero().squeeze(1)
        batches = run_attack(attack, model, attacker, images, labels, survivors, folder, batch_size, flags, rank, world)
        for batch in batches:
            index, broken = torch.from_numpy(batch["index"]), torch.from_numpy(batch["broken"])
            predicted = torch.from_numpy(batch["predicted"])
            result.broken_by[index[broken]] = number
            result.predicted[index if attack == "clean" else index[broken]] = predicted if attack == "clean" else predicted[broken]
            if attack != "clean":
                result.adversarial[index[broken]] = torch.from_numpy(batch["adversarial"])
            result.flags += [flag for flag in json.loads(str(batch["flags"])) if flag not in result.flags]
        result.accuracy[attack] = 100 * (result.broken_by == -1).sum().item() / count
        result.seconds[attack] = float(sum(batch["seconds"] for batch in batches))
        if rank == 0:
            print(f"{attack:9} {result.accuracy[attack]:6.2f} % left   {result.seconds[attack]:8.1f} s", flush=True)
    pyautoattack.checks.check_square_sr({name: accuracy / 100 for name, accuracy in result.accuracy.items()}, logger=attacker.logger)
    result.flags += flags.take()
    flags.logger.removeHandler(flags)
    return result


def verify(model, images, labels, result, eps, batch_size, random=False):
    """Check the result against the stored images: every x' within eps and in [0, 1], and every verdict by a fresh forward pass.

    The forward passes are over batches of the same images as in the attack, x' in place of x where one was found, so that
    float32 rounding, which can depend on a batch's size, is the same. Raises VerificationError; of a model that is `random`
    itself verdicts may differ. Returns how many do.
    """
    distance = (result.adversarial - images).abs().amax(dim=(1, 2, 3))
    if not (distance <= eps + TOLERANCE).all():
        raise VerificationError(f"{int((distance > eps + TOLERANCE).sum())} adversarial images are further than eps {eps:g} away, the furthest {distance.max():g}")
    if not (result.adversarial.min() >= 0 and result.adversarial.max() <= 1):
        raise VerificationError(f"adversarial images leave [0, 1]: {result.adversarial.min():g} to {result.adversarial.max():g}")
    device, different = next(model.parameters()).device, 0
    for number in range(len(result.attacks) + 1):  # the images that entered stage `number`: 0 is the clean pass
        entered = (result.broken_by >= number) | (result.broken_by == -1)
        for index in entered.nonzero().squeeze(1).split(batch_size):
            broken_here = result.broken_by[index] == number
            x = images[index].clone()
            if number:
                x[broken_here] = result.adversarial[index][broken_here]
            wrong = (predict(model, x.to(device)).cpu() != labels[index]) != broken_here
            different += int(wrong.sum())
            if wrong.any() and not random:
                raise VerificationError(f"{int(wrong.sum())} verdicts do not repeat, the first on image {int(index[wrong][0])}: stored images and results disagree")
    return different


# ---------------------------------------------------------------------------------------------------------------------
# The run


def prepare_folder(folder, settings, rank):
    """Make the result folder, or check that it belongs to a run with the same settings. Raises InputError otherwise."""
    path = folder / "settings.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file, expected a folder")
    if path.exists():
        try:
            there = json.loads(path.read_text())
        except ValueError:
            raise InputError(f"{path}: damaged; choose another --out") from None
        difference = [f"{name} {there.get(name)} there, {value} now" for name, value in settings.items() if there.get(name) != value]
        if difference:
            raise InputError(f"--out {folder}: holds the results of another evaluation ({'; '.join(difference)}); choose another --out")
    elif folder.exists() and any(entry.suffix != ".tmp" for entry in folder.iterdir()) and rank == 0:
        raise InputError(f"--out {folder}: is neither empty nor a folder of results; choose another --out")
    elif rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    if rank == 0:
        for left_over in folder.glob("*.tmp"):  # of a process that was killed while writing
            left_over.unlink()
    return folder


def write_json(path, content):
    """Under a temporary name first, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def reservations(args, info, settings):
    """Why this is not RobustBench's number: a list of remarks, empty if it is (as far as a script can tell)."""
    benchmark, full = BENCHMARKS[info.dataset], FULL_TEST_SET[info.dataset]
    checks = [(settings["n"] == full and (info.dataset != "imagenet" or args.image_list), f"NOT THE FULL TEST SET of {full:,} images"
               + (" (--image-list)" if info.dataset == "imagenet" else "")),
              (args.attacks is None, f"ONLY {' '.join(args.attacks or [])}: not AutoAttack"),
              (info.num_classes == benchmark.classes, f"{info.num_classes} classes, not {benchmark.classes:,}"),
              (info.args.get("image_size", 224) == 224, f"{info.args.get('image_size')} px, not 224"),
              (args.version == "standard", f"version {args.version}, not standard"),
              (settings["eps"] == fraction(benchmark.eps), f"eps is not {benchmark.eps}"),
              (not args.tf32, "TF32, not float32")]
    return [remark for passed, remark in checks if not passed]


def write_results(folder, args, info, settings, result, labels, different):
    """result.json with RobustBench's fields and ours, and images.npz with the verdict on each image. Returns the former."""
    clean, robust = result.accuracy["clean"], result.accuracy[result.attacks[-1]]
    remarks, eps = reservations(args, info, settings), Fraction(settings["eps"]).limit_denominator(1000)
    content = {
        # RobustBench's fields; what a script cannot know is left to whoever submits the result
        "link": None, "name": None, "authors": None, "venue": None, "number_forward_passes": 1,
        "additional_data": bool(info.args["synthetic"]) if "synthetic" in info.args else None,
        "dataset": info.dataset, "architecture": info.arch, "eps": str(eps) if float(eps) == settings["eps"] else repr(settings["eps"]),
        "clean_acc": f"{clean:.2f}", "reported": None, "autoattack_acc": None if remarks else f"{robust:.2f}",
        # ours
        "robust_accuracy": robust, "robust_accuracy_after": result.accuracy, "seconds": result.seconds, "images": len(labels),
        "reservations": remarks, "flags": result.flags, "verdicts_not_repeated": different, "settings": settings,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }
    save_atomically(folder / "images.npz", label=labels.numpy(), predicted=result.predicted.numpy(), broken_by=result.broken_by.numpy(),
                    adversarial=result.adversarial.numpy(), stages=np.array(["clean", *result.attacks]))
    write_json(folder / "result.json", content)
    return content


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    rank, world, local = [int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    device = torch.device("cuda", local) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"--device cuda: {torch.cuda.device_count()} GPUs here, too few for process {local}")
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True  # a continued evaluation has to equal an undisturbed one
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    if world > 1:  # only ever waits for the others, however long that takes: results are exchanged through the folder
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    model = load_classifier(args.checkpoint, args.arch, args.dataset, args.script, args.weights).to(device)
    info = model.info
    if info.num_classes < 10:
        raise InputError(f"{args.checkpoint}: classifies into {info.num_classes} classes, expected at least 10: AutoAttack's targeted attacks try nine others")
    if local > 0:
        wait_for_all()  # the first process of each machine goes first: it may have to download
    images, labels = load_images(args, info)
    if local == 0:
        wait_for_all()
    eps = fraction(BENCHMARKS[info.dataset].eps) if args.eps is None else args.eps
    digest = lambda data: hashlib.sha256(data).hexdigest()[:16]
    settings = {"checkpoint": digest(Path(args.checkpoint).read_bytes()), "weights": args.weights, "arch": info.arch, "dataset": info.dataset,
                "script": digest(info.script.read_bytes()), "images": digest(images.numpy()) + digest(labels.numpy()), "n": len(labels),
                "norm": "Linf", "eps": eps, "version": args.version, "attacks": args.attacks, "batch_size": args.batch_size, "seed": args.seed,
                "tf32": args.tf32, "device": args.device, "torch": torch.__version__, "pyautoattack": package_version("pyautoattack")}
    folder = prepare_folder(Path(args.out or f"{args.checkpoint}.autoattack"), settings, rank)
    if rank == 0:
        print(f"{args.checkpoint}: {info.arch}, {args.weights} weights, {info.dataset}, Linf eps {eps * 255:g}/255, {len(labels)} images, "
              f"AutoAttack {args.version} (pyautoattack {settings['pyautoattack']})", flush=True)
        for remark in reservations(args, info, settings):
            print(f"*** {remark}: not a number to quote ***", flush=True)
    wait_for_all()
    result = evaluate(model, images, labels, folder, eps, args.attacks, args.version, args.batch_size, args.seed, rank, world)
    if rank == 0:
        different = verify(model, images, labels, result, eps, args.batch_size, random=args.version == "rand")
        content = write_results(folder, args, info, settings, result, labels, different)
        for flag in result.flags + [f"{different} verdicts do not repeat: the model is random"] * (different > 0):
            print(f"*** remark: {flag}", flush=True)
        print(f"clean {content['clean_acc']} %, robust {content['robust_accuracy']:.2f} %; verified, {folder / 'result.json'}")
    if world > 1:
        wait_for_all()
        dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; finished batches are kept, and the same command continues", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except ConnectionError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except VerificationError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
