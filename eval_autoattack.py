"""AutoAttack on any checkpoint: the number that this field trusts, made exact, resumable and hard to fool.

    python eval_autoattack.py runs/cifar/best.pt --data-dir data              # CIFAR's test set, four attacks
    python eval_autoattack.py weights.pt --arch wrn-28-10 --dataset cifar10   # DM-AT's or RobustBench's file
    python eval_autoattack.py runs/imagenet/best.pt --data-dir imagenet --image-list robustbench_5000.txt
    python eval_autoattack.py best.pt --script my_copy.py                     # a network of your own
    torchrun --nproc-per-node 8 -- eval_autoattack.py runs/cifar/best.pt      # eight GPUs, the same result

An image x is robust if the classifier is right about it and about every x' with max |x' - x| <= eps. Nobody
can try every x', so an attack searches for one that is misclassified. An attack that fails proves nothing:
what it leaves is an upper bound, and a weak attack leaves a flattering one. AutoAttack (Croce & Hein 2020,
arXiv 2003.01690; the package pyautoattack is by its authors) therefore takes, image by image, the worst case
over four attacks that fail for different reasons and have no settings that one could choose to one's
advantage:

    apgd-ce  100 steps of PGD on the cross-entropy, with momentum. The step size halves where progress stalls.
    apgd-t   The same on the DLR loss, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), where y is the label and
             z_(k) the k-th largest logit; once for each of the nine likeliest wrong classes t. A factor on
             all logits cancels. So a network cannot hide behind large logits, which leave the cross-entropy
             without a gradient.
    fab-t    Looks for the nearest point beyond the border to each of those nine classes, on a linearised
             border. It makes |x' - x| small instead of a loss large, and counts if it ends within eps.
    square   5,000 random squares, each kept if it helps. It needs no gradient, and so it still works where a
             network's gradients lead nowhere.

Each attack gets only the images that survived those before. What is broken stays broken, so another try would
cost time and change no verdict.

This script runs the library's own attacks in the library's own order, batch by batch, and keeps each finished
batch on disk. A kill loses at most the batch at work, and the same command continues. The result is that of
`AutoAttack.run_standard_evaluation` on the same model, images, seed and batch size: bit for bit, every x'.

Why the batch is the unit: inside it, images share random numbers (Square even puts its square at the same
place in all of them). What happens to an image depends on its companions and on its place among them. But the
library seeds torch's generators anew before every batch of every attack, so batches know nothing of each
other, and each can be done on another day or by another process. Another --batch-size is another draw, as
good as the first. Two exceptions: on CUDA some kernels, such as attention's backward pass, do not take their
sums in the same order twice; and the verdicts on a model that is random itself (--version rand) cannot be
repeated.

--tf32 lets attacks multiply in TF32, as torch's defaults do in convolutions: faster on CUDA, but a success
may hang on the rounding. So float32 judges whatever TF32 has broken. What it does not confirm does not count,
and the image meets this attack again, and all after it, in float32. Either way the result is float32's.
"""
import argparse
import hashlib
import json
import os
import runpy
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

import train_cifar
from train_cifar import InputError, barrier, fraction

# ------------------------------------------------------------------------------------------------------------
# Settings: what RobustBench fixes for each data set, and the command line.

# RobustBench's number of classes, eps (pixels lie in [0, 1]) and number of test images, and the training
# script whose build_model makes the network. ImageNet's 5,000 are a fixed list out of the 50,000 validation
# images.
BENCHMARKS = {
    "cifar10": SimpleNamespace(classes=10, eps="8/255", images=10_000, script="train_cifar.py"),
    "cifar100": SimpleNamespace(classes=100, eps="8/255", images=10_000, script="train_cifar.py"),
    "imagenet": SimpleNamespace(classes=1000, eps="4/255", images=5_000, script="train_imagenet.py"),
}
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
TOLERANCE = 1e-6  # by which |x' - x| may exceed eps: float32 rounds x + eps near 1 by up to 6e-8


class VerificationError(RuntimeError):
    """The stored result does not hold what it claims."""


def parse_args(argv=None):
    """Command line -> Namespace. A bad flag ends in argparse's usage text and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # What is judged.
    add("checkpoint", help="of these scripts, of DM-AT, or of RobustBench")
    add("--arch", help="as in the training script; taken from the checkpoint if it says so")
    add("--dataset", choices=list(BENCHMARKS), help="taken from the checkpoint if it says so")
    add("--script", help="whose build_model makes the network; by default the training script of its data")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which set of a checkpoint's two")
    # On which images.
    add("--data-dir", default="data", help="CIFAR: as in train_cifar.py; ImageNet: a folder with val/ in it")
    add("--image-list", help="ImageNet: a file with one path per line, such as RobustBench's list of 5,000")
    add("--n", type=int, help="only the first N images")
    # By which attacks.
    add("--eps", type=fraction, help="largest change of a pixel in [0, 1]; if not given, RobustBench's")
    add("--version", choices=["standard", "plus", "rand"], default="standard", help="set of attacks")
    add("--attacks", nargs="+", choices=ATTACKS, help="only these, with the settings of --version")
    add("--batch-size", type=int, default=250, help="images attacked together")
    add("--seed", type=int, default=0, help="of the attacks")
    # Where.
    cuda = torch.cuda.is_available()
    add("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu", help="where to run")
    add("--tf32", action="store_true", help="attack in TF32, judge in float32: faster on CUDA")
    add("--out", help="folder of results and finished batches; if not given, CHECKPOINT.autoattack")
    args = parser.parse_args(argv)
    attacks = args.attacks or []
    checks = [
        (args.n is None or args.n >= 1, f"--n {args.n}: expected at least 1"),
        (args.eps is None or 0 < args.eps < 1, f"--eps {args.eps}: expected between 0 and 1, such as 8/255"),
        (len(set(attacks)) == len(attacks), f"--attacks {' '.join(attacks)}: expected each attack once"),
        (args.batch_size >= 1, f"--batch-size {args.batch_size}: expected at least 1"),
        (0 <= args.seed < 2**63, f"--seed {args.seed}: expected at least 0 and less than 2^63"),
        (cuda or args.device == "cpu", "--device cuda: no CUDA device is available here; use --device cpu"),
    ]
    for passed, message in checks:
        if not passed:
            parser.error(message)
    return args


# ------------------------------------------------------------------------------------------------------------
# From a checkpoint to a classifier: the network that the training script builds, with the file's weights.


def load_classifier(path, arch=None, dataset=None, script=None, weights="averaged"):
    """A frozen classifier in evaluation mode, on the CPU: images [B, 3, H, W] in [0, 1] -> logits [B, K].

    path: a checkpoint of these scripts, DM-AT's, or RobustBench's for CIFAR. arch and
    dataset: in place of what the file says; necessary where it says nothing. script: a training script whose
    `build_model` makes the network, by default ours for the data set. weights: "averaged" (over training's
    steps; these are the ones to report) or "raw". The module has `info`: arch, dataset, weights, num_classes,
    script, and args, the settings of the training run ({} in files of others). Raises InputError, one line
    that names the file, and OSError where it cannot be opened.

    The network stays in float32 and uncompiled. Attacks end close to ties between two logits. With bfloat16's
    8 bits such logits become equal and small gradients zero, and an attack that stumbles looks like
    robustness. A compiled forward pass makes AutoAttack believe that the model computes gradients at test
    time.
    """
    saved = read_checkpoint(path)
    arch, dataset = arch or saved.get("arch"), dataset or saved.get("dataset")
    known = dataset in list(BENCHMARKS)
    if not known or not isinstance(arch, str):
        lacking = "arch" if known else "dataset"
        raise InputError(f"{path}: does not say its {lacking}; give --arch (such as wrn-28-10) and --dataset")
    benchmark = BENCHMARKS[dataset]
    classes = saved.get("num_classes", benchmark.classes)
    if classes != benchmark.classes and dataset != "imagenet":  # there, one may train on a part of them
        raise InputError(f"{path}: classifies into {classes} classes, {dataset} has {benchmark.classes}")
    script = Path(script or Path(__file__).with_name(benchmark.script))
    last = {"pretrained": False} if dataset == "imagenet" else {"dataset": dataset}
    # This runs the script as `import` would. It is code that the user chose; a checkpoint cannot name any.
    namespace = runpy.run_path(str(script))
    if "build_model" not in namespace:
        raise InputError(f"--script {script}: defines no build_model")
    try:
        model = namespace["build_model"](arch, classes, **last)
    except ValueError as error:  # such as an architecture that the script does not know
        raise InputError(f"{path}: {script.name} cannot build it ({error})") from None
    state, expected = choose_weights(path, saved, weights), model.state_dict()
    for prefix in ("module.", "model.", "0."):  # of DataParallel, a wrapper, and DM-AT's Sequential
        if state.keys() != expected.keys() and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    check_fit(path, state, expected, f"{arch} for {dataset}")
    model.load_state_dict(state)
    model.info = SimpleNamespace(arch=arch, dataset=dataset, weights=weights, num_classes=classes,
                                 script=script, args=saved.get("args") or {})
    # Evaluation mode is part of the number: a BatchNorm in training mode would mix the images of a batch, and
    # one x' could break its neighbours.
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def read_checkpoint(path):
    """A checkpoint's dict. Raises InputError where there is none in the file.

    A checkpoint is a pickle, and a pickle is a small program: to load it the plain way is to run what its
    author put in. The files that one evaluates come from strangers, so they go through torch's restricted
    reader (`weights_only`), which takes tensors and plain data and refuses the rest.
    """
    with open(path, "rb") as file:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # Not in torch's words: they suggest weights_only=False, which is how a hostile file gets to run.
            kind = type(error).__name__
            raise InputError(f"{path}: damaged, or no checkpoint of only tensors and data ({kind})") from None
    if not isinstance(saved, dict):
        raise InputError(f"{path}: holds a {type(saved).__name__}, expected a dict of weights")
    return saved


def choose_weights(path, saved, weights):
    """The averaged or raw weights of a checkpoint: {parameter name: tensor}, named as in the file."""
    if weights == "raw":
        state = saved.get("unaveraged_model_state_dict")
    else:  # ours and DM-AT's, or RobustBench's, or RobustBench's without any wrapping
        state = saved.get("model_state_dict", saved.get("state_dict", saved))
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                              for name, value in state.items()):
        raise InputError(f"{path}: holds no {weights} weights, no dict of tensors where they should be")
    return state


def check_fit(path, state, expected, what):
    """Raise InputError unless `state` has the names and shapes of `expected`, and finite values.

    A network with one layer left at its random start still classifies, only worse: nobody would notice.
    """
    problems = [f"lacks {name}" for name in expected if name not in state]
    problems += [f"has an unknown {name}" for name in state if name not in expected]
    problems += [f"{name} is {list(state[name].shape)}, expected {list(expected[name].shape)}"
                 for name in expected if name in state and state[name].shape != expected[name].shape]
    problems += [f"{name} is not finite" for name, value in state.items() if not value.isfinite().all()]
    if problems:
        raise InputError(f"{path}: is no {what}: {problems[0]} ({len(problems)} differences in all)")


# ------------------------------------------------------------------------------------------------------------
# AutoAttack, batch by batch: one attack on one batch, the library's checks, one attack on all survivors.


def predict(model, x):
    """Predicted classes [B] of images x [B, 3, H, W]. Raises VerificationError where a logit is not finite.

    From infinite logits come losses and gradients that are NaN. With these every attack ends where it began,
    and the network would be as robust as it is accurate.
    """
    with torch.no_grad():
        logits = model(x)
    if not logits.isfinite().all():
        raise VerificationError("the model's logits are not finite: attacks find nothing on such a model")
    return logits.argmax(dim=1)


def perturb(attacker, attack, x, y):
    """One attack of the library on one batch, set up as in its own `run_standard_evaluation`.

    attacker: pyautoattack.AutoAttack. x: images [B, 3, H, W] in [0, 1]; y: labels [B]. Returns x' like x,
    which is x itself where the attack fails.
    """
    kind, _, variant = attack.partition("-")
    method = attacker.apgd_targeted if attack == "apgd-t" else getattr(attacker, kind)
    if attack in ("apgd-ce", "apgd-dlr"):
        method.loss = variant
    elif kind == "fab":  # one object for both variants: set up each time, so that order does not matter
        method.targeted = variant == "t"
        method.n_restarts = 5 if attacker.version == "plus" and not method.targeted else 1
    method.seed = attacker.get_seed()  # with which it seeds torch's generators: batches become independent
    with torch.no_grad():
        return method.perturb(x, y)


def check_model(model, images, labels, batch_size, attacker):
    """The library's checks of the model on the first batch. It warns through its logger and goes on.

    Each warning says that the true robustness may be lower than the number, for a reason of its own:

    - "randomized defense": two forward passes differ, so a gradient belongs to another draw than the verdict.
      --version rand averages gradients over 20 passes. (It expects randomness, so there is no such check.)
    - "probability distribution": there is a softmax inside the model. In float32 it reaches 0 and 1, where it
      has no gradient, and the cross-entropy applies another one on top.
    - "dynamic defense": the forward pass computes gradients, as in a model that purifies its input. Attacks
      do not see through such a loop. Only an attack that was made for this model would tell.
    - "zero gradient" (from APGD): it does not know where to go on these images. Only Square has really tried
    them.
    - "Square Attack has decreased the robust accuracy" (at the end, from 0.2 points on): blind search has
      found what gradients had not. The gradients mislead, and a better attack will find more.
    """
    device, logger = next(model.parameters()).device, attacker.logger
    x, y = images[:batch_size].to(device), labels[:batch_size].to(device)
    if attacker.version != "rand":
        pyautoattack.checks.check_randomized(model, x, y, bs=batch_size, logger=logger)
    classes = pyautoattack.checks.check_range_output(model, x, logger=logger)
    pyautoattack.checks.check_dynamic(model, x, False, logger=logger)
    if classes < 10:  # the library would warn, and then fail
        raise InputError(f"the model has {classes} classes, expected at least 10: targeted attacks try nine")


def set_tf32(allowed):
    """TF32 multiplies with 10 bits of mantissa instead of 23. torch allows it in convolutions unless told."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def run_attack(attack, attacker, images, labels, entered, folder, batch_size, flags, rank=0, world=1):
    """Attack images in batches, and keep every finished batch in `folder`. Returns one dict per batch.

    attack: "clean" for no attack, or a name in ATTACKS, with "-tf32" behind it to run in TF32. entered:
    indices int64 [M] into images [N, 3, H, W] and labels [N]. flags: a list of warnings so far, which are
    stored with the next batch. A batch of n images has index [n], predicted [n], broken [n] bool, changed [n]
    bool (broken in TF32, but not in float32), adversarial [number broken, 3, H, W], seconds, flags. Raises
    VerificationError where a file in the folder is damaged or of other images.
    """
    name, fast = attack.removesuffix("-tf32"), attack.endswith("-tf32")
    batches = entered.split(batch_size) if len(entered) else []
    files = [folder / f"{attack}_{number:05d}.npz" for number in range(len(batches))]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    barrier()  # all processes have to see the same ones missing before the first of them adds one
    for number in tqdm(missing[rank::world], desc=f"{attack:8}", unit="batch", disable=rank > 0):
        index, since = batches[number], time.time()
        x, y = images[index].to(attacker.device), labels[index].to(attacker.device)
        torch.manual_seed(attacker.seed)  # as attacks do; here for models that are random themselves
        set_tf32(fast)
        adversarial = x if attack == "clean" else perturb(attacker, name, x, y)
        # An attack moves what it breaks, or believes to break. What it finds misclassified it leaves alone.
        moved = (adversarial != x).flatten(1).any(dim=1)
        believed = fast and moved | (predict(attacker.model, adversarial) != y)
        set_tf32(False)
        # The verdict is a forward pass of the whole batch, as in the library. What the attack itself took for
        # a success was seen in smaller batches, whose sums may be rounded otherwise.
        predicted = predict(attacker.model, adversarial)
        broken = predicted != y
        kept = x[:0] if attack == "clean" else adversarial[broken]
        save_atomically(files[number], index=index.numpy(), predicted=predicted.cpu().numpy(),
                        broken=broken.cpu().numpy(), adversarial=kept.cpu().numpy(),
                        changed=(believed & ~broken).cpu().numpy(), seconds=time.time() - since,
                        flags=json.dumps(list(dict.fromkeys(flags))))
        flags.clear()
    barrier()  # then each process reads the others' batches: all have to know who survived
    return [read_batch(file, index) for file, index in zip(files, batches)]


def save_atomically(path, **arrays):
    """numpy.savez under another name, flushed to the disk, then renamed: `path` is whole or does not exist.

    What a kill or a full disk leaves under the other name is overwritten when the same command runs again.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_batch(path, index):
    """A stored batch: dict of arrays. Raises VerificationError if damaged or of other images than `index`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            batch = {name: file[name] for name in ("index", "predicted", "broken", "changed", "adversarial",
                                                   "seconds", "flags")}
    except Exception as error:  # a damaged zip file can fail in any way
        raise VerificationError(f"{path}: damaged ({type(error).__name__}); delete it to repeat it") from None
    if not np.array_equal(batch["index"], index.numpy()):
        raise VerificationError(f"{path}: is of other images than this run's; did another run write there?")
    return batch


# ------------------------------------------------------------------------------------------------------------
# The evaluation: all attacks in turn, and a check of what they left.


def evaluate(model, images, labels, folder, eps, attacks=None, version="standard", batch_size=250, seed=0,
             rank=0, world=1, tf32=False):
    """Clean accuracy, then each attack on the survivors of those before. Continues from what `folder` has.

    model: see `load_classifier`. images float32 [N, 3, H, W] in [0, 1] and labels int64 [N], on the CPU.
    attacks: None for all of `version`. tf32: each attack runs twice, first in TF32, then in float32 on those
    images for which float32 has not confirmed a verdict of TF32, on this attack or one before. Raises
    InputError for images outside [0, 1]. Returns SimpleNamespace:

    attacks: their names, in order; those in TF32 end with "-tf32"
    accuracy, seconds: {"clean" and each attack: percent of images left; time that it took}
    broken_by [N] int: 0 misclassified without any attack, k broken by the k-th attack, -1 robust
    predicted [N]: the class of x' where one was found, of x elsewhere
    adversarial [N, 3, H, W]: x' where one was found, x elsewhere
    entered: for "clean" and each attack the indices of its images
    changed: number of TF32's verdicts that float32 did not confirm
    flags: the library's warnings, see `check_model`
    """
    # eps is a distance on the [0, 1] scale, and attacks clamp x' to that scale. With normalised images
    # everything would run smoothly and give a wrong number.
    if images.dtype != torch.float32 or not (images.min() >= 0 and images.max() <= 1):
        limits = f"[{images.min():g}, {images.max():g}]"
        raise InputError(f"images have to be float32 in [0, 1], not {images.dtype} in {limits}")
    set_tf32(False)
    attacker = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, version=version, seed=seed,
                                       device=next(model.parameters()).device)
    # The library warns through its logger, that is, on the terminal, where nobody looks next week. This keeps
    # its warnings with the result.
    flags = []
    attacker.logger.warning = flags.append
    check_model(model, images, labels, batch_size, attacker)
    names = list(attacks or attacker.attacks_to_run)
    result = SimpleNamespace(accuracy={}, seconds={}, entered=[], changed=0, flags=[],
                             attacks=[stage for name in names for stage in [f"{name}-tf32"] * tf32 + [name]],
                             broken_by=torch.full_like(labels, -1), predicted=labels.clone(),
                             adversarial=images.clone())
    exact = torch.full_like(labels, not tf32, dtype=torch.bool)  # the images to be attacked in float32
    for number, attack in enumerate(["clean", *result.attacks]):
        here = (attack == "clean") | (exact != attack.endswith("-tf32"))
        entered = (here & (result.broken_by == -1)).nonzero().squeeze(1)
        batches = run_attack(attack, attacker, images, labels, entered, folder, batch_size, flags, rank,
                             world)
        for batch in batches:
            index = batch["index"][batch["broken"]]
            result.broken_by[index] = number
            result.predicted[index] = torch.from_numpy(batch["predicted"][batch["broken"]])
            if attack != "clean":
                result.adversarial[index] = torch.from_numpy(batch["adversarial"])
            exact[batch["index"][batch["changed"]]] = True
            result.changed += int(batch["changed"].sum())
            result.flags += json.loads(str(batch["flags"]))
        result.entered.append(entered)
        result.accuracy[attack] = left = 100 * (result.broken_by == -1).sum().item() / len(labels)
        result.seconds[attack] = seconds = float(sum(batch["seconds"] for batch in batches))
        if rank == 0:
            print(f"{attack:13} {left:6.2f} % left   {seconds:8.1f} s", flush=True)
    shares = {attack: result.accuracy[attack] / 100 for attack in ["clean", *names]}
    pyautoattack.checks.check_square_sr(shares, logger=attacker.logger)
    result.flags = list(dict.fromkeys(result.flags + flags))  # each once
    return result


def verify(model, images, labels, result, eps, batch_size, random=False):
    """Check the result against the stored images: every x' within eps and in [0, 1], and every verdict again.

    The recount, in float32, trusts neither attacks nor files. An x' outside the ball is no adversarial
    example, and a file may come from another model. Raises VerificationError. A model that is `random` itself
    may change its verdicts. Returns how many it changed.
    """
    distance = (result.adversarial - images).abs().amax(dim=(1, 2, 3))  # [N]: max |x' - x|
    far = int((~(distance <= eps + TOLERANCE)).sum())  # written so that NaN counts
    if far:
        raise VerificationError(f"{far} adversarial images are further than eps {eps:g}: {distance.max():g}")
    low, high = result.adversarial.min(), result.adversarial.max()
    if not (low >= 0 and high <= 1):
        raise VerificationError(f"adversarial images leave [0, 1]: {low:g} to {high:g}")
    # Stage by stage (0 is the clean pass), in the batches of the attack, with x' in place of x where one was
    # found. Rounding can depend on a batch's size, and in other batches a near tie could fall the other way.
    device, different = next(model.parameters()).device, 0
    for number, entered in enumerate(result.entered):
        for index in entered.split(batch_size):
            broken_here = result.broken_by[index] == number
            attacked = (broken_here & (number > 0))[:, None, None, None]
            x = torch.where(attacked, result.adversarial[index], images[index])
            wrong = (predict(model, x.to(device)).cpu() != labels[index]) != broken_here
            different += int(wrong.sum())
            if wrong.any() and not random:
                raise VerificationError(f"{int(wrong.sum())} verdicts do not repeat, the first on image "
                                        f"{int(index[wrong][0])}: stored images and results disagree")
    return different


# ------------------------------------------------------------------------------------------------------------
# Images: each benchmark's test set, with pixels in [0, 1]. Normalisation is part of the model, since eps is
# not measured in normalised units.


def load_images(args, info, split="test"):
    """The first args.n images of a split, float32 [N, 3, H, W] in [0, 1], and labels int64 [N], on the CPU.

    info: as `load_classifier` leaves it. split: "test" or, for CIFAR, "train". Raises InputError.
    """
    if info.dataset == "imagenet":
        if split != "test":
            raise InputError(f"ImageNet: only the test images are read, not {split}")
        return load_imagenet(Path(args.data_dir), args.image_list, args.n, info.num_classes,
                             info.args.get("image_size", 224), info.args.get("classes"))
    source = SimpleNamespace(dataset=info.dataset, data_dir=args.data_dir,
                             smoke=info.args.get("smoke") is True, seed=info.args.get("seed", 0))
    images, labels = [torch.from_numpy(array[:args.n]) for array in train_cifar.load_real(source, split)]
    return images.permute(0, 3, 1, 2).contiguous().float() / 255, labels.long()


def load_imagenet(folder, image_list, n, num_classes=1000, image_size=224, class_names=None):
    """RobustBench's protocol: shorter side to 256, centre crop of 224 (in proportion for another image_size).

    folder: has val/, and in it a folder for each class. image_list: a file with a path per line, relative to
    `folder` or to val/; None for all of val/ in order. n: only the first n; None for all. The number of a
    class is the place of its folder in sorted order, so other folders would shift all labels: there have to
    be num_classes, with class_names, if the checkpoint knows their names. Returns images float32 [N, 3, H, W]
    in [0, 1] and labels int64 [N]. Raises InputError, and OSError where val/ or the list is not there.
    """
    from torchvision.datasets import ImageFolder
    val = ImageFolder(folder / "val", allow_empty=True)
    if len(val.classes) != num_classes:
        raise InputError(f"{val.root}: has {len(val.classes)} class folders, expected {num_classes}")
    if class_names not in (None, val.classes):
        raise InputError(f"{val.root}: the class folders have other names than in the checkpoint's training")
    if image_list is None:
        paths = [Path(path) for path, _ in val.samples]
        if n is None and len(paths) > 10_000:  # all are held in memory, and 50,000 would take 30 GB
            raise InputError(f"{val.root}: has {len(paths):,} images, expected --image-list or --n")
    else:
        lines = Path(image_list).read_text(errors="replace").splitlines()  # "PATH", or "PATH LABEL"
        paths = [folder / "val" / line.split()[0].removeprefix("val/") for line in lines if line.strip()]
    if not paths or len(set(paths)) < len(paths):
        raise InputError(f"{image_list or val.root}: names no image, or one twice")
    images, labels = [], []
    for path in tqdm(paths[:n], desc="reading images", disable=None):
        if path.parent.name not in val.class_to_idx:
            raise InputError(f"{image_list}: {path} is in no class folder of {val.root}")
        labels.append(val.class_to_idx[path.parent.name])
        images.append(read_imagenet(path, image_size))
    return torch.stack(images), torch.tensor(labels)


def read_imagenet(path, size=224):
    """An image file -> float32 [3, size, size] in [0, 1], resized and cropped as above. Raises InputError."""
    from torchvision import datasets, transforms
    prepare = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size),
                                  transforms.ToTensor()])
    try:
        return prepare(datasets.folder.default_loader(path))
    except Exception as error:  # a damaged image can fail in any way
        raise InputError(f"{path}: cannot be read as an image ({type(error).__name__})") from None


# ------------------------------------------------------------------------------------------------------------
# The run: say what is judged, judge it, verify, write it down.


def prepare_folder(folder, settings):
    """Make the result folder, or check that it is of the same settings. Raises InputError where it is not."""
    path = folder / "settings.json"
    if path.exists():
        try:
            there = json.loads(path.read_text())
        except ValueError:
            raise InputError(f"{path}: damaged, expected JSON; choose another --out") from None
        difference = [f"{name} {there.get(name)} there, {value} now" for name, value in settings.items()
                      if there.get(name) != value]
        if difference:
            raise InputError(f"{path}: is of another evaluation ({'; '.join(difference)}); change --out")
    elif folder.exists() and any(entry.suffix != ".tmp" for entry in folder.iterdir()):
        raise InputError(f"{folder}: is neither empty nor a folder of results; choose another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        train_cifar.save_atomically(json.dumps(settings, indent=2), path)


def reservations(args, info, settings):
    """Why this is not RobustBench's number: remarks, none if it is (as far as a script can tell)."""
    benchmark, size = BENCHMARKS[info.dataset], info.args.get("image_size", 224)
    full = settings["n"] == benchmark.images and (info.dataset != "imagenet" or args.image_list)
    checks = [
        (full, f"NOT THE FULL TEST SET of {benchmark.images:,} images"),
        (args.attacks is None, f"ONLY {' '.join(args.attacks or [])}: not AutoAttack"),
        (info.num_classes == benchmark.classes, f"{info.num_classes} classes, not {benchmark.classes:,}"),
        (size == 224, f"{size} px, not 224"),
        (args.version == "standard", f"version {args.version}, not standard"),
        (settings["eps"] == fraction(benchmark.eps), f"eps is not {benchmark.eps}"),
    ]
    return [remark for passed, remark in checks if not passed]


def write_results(folder, args, info, settings, result, labels, different):
    """result.json, with RobustBench's fields, and images.npz with the verdicts. Returns the first."""
    clean, robust = result.accuracy["clean"], result.accuracy[result.attacks[-1]]
    remarks, eps = reservations(args, info, settings), Fraction(settings["eps"]).limit_denominator(1000)
    content = {
        # RobustBench's fields. What a script cannot know is left to whoever submits the result, and
        # autoattack_acc is filled in only where nothing speaks against quoting it.
        "link": None, "name": None, "authors": None, "venue": None, "number_forward_passes": 1,
        "additional_data": bool(info.args["synthetic"]) if "synthetic" in info.args else None,
        "dataset": info.dataset, "architecture": info.arch,
        "eps": str(eps) if float(eps) == settings["eps"] else repr(settings["eps"]),
        "clean_acc": f"{clean:.2f}", "reported": None, "autoattack_acc": None if remarks else f"{robust:.2f}",
        # Ours.
        "robust_accuracy": robust, "robust_accuracy_after": result.accuracy, "seconds": result.seconds,
        "images": len(labels), "reservations": remarks, "flags": result.flags,
        "verdicts_changed_by_float32": result.changed if args.tf32 else None,
        "verdicts_not_repeated": different, "settings": settings,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }
    save_atomically(folder / "images.npz", label=labels.numpy(), predicted=result.predicted.numpy(),
                    broken_by=result.broken_by.numpy(), adversarial=result.adversarial.numpy(),
                    stages=np.array(["clean", *result.attacks]))
    train_cifar.save_atomically(json.dumps(content, indent=2), folder / "result.json")
    return content


def main(argv=None):
    """The command line. Raises InputError, OSError and VerificationError."""
    args = parse_args(argv)
    rank, world, local = [int(os.environ.get(name, default))  # as torchrun sets them
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    if args.device == "cuda":
        torch.cuda.set_device(local)  # this is "cuda" from here on, and attacks seed no other's generator
        torch.backends.cudnn.deterministic = True  # so that a continued evaluation equals an undisturbed one
    if world > 1:  # only to wait for each other, however long that takes: results go through the folder
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    model = load_classifier(args.checkpoint, args.arch, args.dataset, args.script, args.weights)
    info = model.to(args.device).info
    if local > 0:
        barrier()  # each machine's first process goes first, as it may have to download
    images, labels = load_images(args, info)
    if local == 0:
        barrier()
    eps = fraction(BENCHMARKS[info.dataset].eps) if args.eps is None else args.eps
    # All that the result depends on. A folder with other settings is refused, as two evaluations would mix.
    # The script is among them: verdicts on a network with a bug must not survive its correction.
    digest = lambda data: hashlib.sha256(data).hexdigest()[:16]
    settings = {
        "checkpoint": digest(Path(args.checkpoint).read_bytes()), "weights": args.weights, "arch": info.arch,
        "dataset": info.dataset, "script": digest(info.script.read_bytes()),
        "images": digest(images.numpy()) + digest(labels.numpy()), "n": len(labels), "norm": "Linf",
        "eps": eps, "version": args.version, "attacks": args.attacks, "batch_size": args.batch_size,
        "seed": args.seed, "tf32": args.tf32, "device": args.device, "torch": torch.__version__,
        "pyautoattack": package_version("pyautoattack"),
    }
    folder = Path(args.out or f"{args.checkpoint}.autoattack")
    if rank == 0:
        prepare_folder(folder, settings)
        print(f"{args.checkpoint}: {info.arch}, {args.weights} weights, {info.dataset}, Linf eps "
              f"{eps * 255:g}/255, {len(labels)} images, AutoAttack {args.version} "
              f"(pyautoattack {settings['pyautoattack']})", flush=True)
        for remark in reservations(args, info, settings):
            print(f"*** {remark}: not a number to quote ***", flush=True)
    barrier()
    result = evaluate(model, images, labels, folder, eps, args.attacks, args.version, args.batch_size,
                      args.seed, rank, world, args.tf32)
    if rank == 0:
        different = verify(model, images, labels, result, eps, args.batch_size, random=args.version == "rand")
        content = write_results(folder, args, info, settings, result, labels, different)
        for flag in result.flags:
            print(f"*** remark: {flag}")
        if different:
            print(f"*** remark: {different} verdicts do not repeat: the model is random")
        print(f"clean {content['clean_acc']} %, robust {content['robust_accuracy']:.2f} %; verified, "
              f"{folder / 'result.json'}")


if __name__ == "__main__":
    # Both stop at once, with the usual exit codes 143 and 130. What is finished is on the disk. (Not by
    # sys.exit: its exception would come up inside whatever is at work, which may turn it into another.)
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, frame: os._exit(128 + number))
    try:
        main()
    except (InputError, OSError, VerificationError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1 if isinstance(problem, VerificationError) else 2)
