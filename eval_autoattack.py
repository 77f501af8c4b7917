"""AutoAttack on any checkpoint: the number that this field trusts, made exact, resumable and hard to fool.

    python eval_autoattack.py runs/cifar/best.pt --data-dir data              # CIFAR's test set, four attacks
    python eval_autoattack.py weights.pt --arch wrn-28-10 --dataset cifar10   # DM-AT's or RobustBench's file
    python eval_autoattack.py runs/imagenet/best.pt --data-dir imagenet --image-list robustbench_5000.txt
    python eval_autoattack.py best.pt --script my_copy.py                     # a network of your own
    torchrun --nproc-per-node 8 -- eval_autoattack.py runs/cifar/best.pt      # eight GPUs, the same result

An image x is robust if the classifier is right about it and about every x' with max |x' - x| <= eps. Nobody
can try every x', so an attack searches for one that is misclassified. An attack that fails proves nothing:
the accuracy that it leaves is an upper bound on the robust accuracy, and a weak attack leaves a flattering
one. AutoAttack (Croce & Hein 2020, arXiv 2003.01690; the package pyautoattack is by its authors) therefore
takes, image by image, the worst case over four attacks that fail for different reasons and have no settings
to tune:

    apgd-ce  100 steps of PGD on the cross-entropy, with momentum. The step size halves where progress stalls.
    apgd-t   The same on the DLR loss, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), where y is the label and
             z_(k) the k-th largest logit; once for each of the nine likeliest wrong classes t. A common
             factor of all logits cancels, so a network cannot hide behind large logits, which leave the
             cross-entropy without a gradient.
    fab-t    Looks for the nearest point beyond the decision boundary to each of those nine classes, on a
             linearised boundary. It minimises |x' - x| instead of maximising a loss, and succeeds where it
             ends within eps.
    square   5,000 random squares, each kept if it helps. It needs no gradient, so it still works where a
             network's gradients lead nowhere.

Each attack gets only the images that survived the attacks before it. What is broken stays broken: another
try would cost time and change no verdict.

This script runs the library's own attacks in the library's own order, batch by batch, and keeps each
finished batch on disk. A kill loses at most the batch at work, and the same command continues. The result is
that of `AutoAttack.run_standard_evaluation` on the same model, images, seed and batch size: bit for bit,
every x'.

Why the unit is a batch: the images of a batch share random numbers (Square even puts its square at the same
place in all of them), so what happens to an image depends on its companions and on its place among them. But
the library seeds torch's generators anew before every batch of every attack. So batches are independent, and
each can be done on another day or by another process. Another --batch-size is another random draw, as good
as the first. There are two exceptions. On CUDA, some kernels (attention's backward pass, for example) do not
add up in the same order twice. And the verdicts on a model that is random itself (--version rand) cannot be
repeated.

--tf32 lets attacks multiply in TF32, as torch's defaults do in convolutions: faster on CUDA, but a success
may depend on the rounding. So float32 judges whatever TF32 has broken. What it does not confirm does not
count, and the image meets this attack again, and all later ones, in float32. Either way the result is that
of float32.
"""
import argparse
import contextlib
import json
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyautoattack
import pyautoattack.checks
import torch
from torchvision import datasets, transforms
from tqdm import tqdm

from train_cifar import (DEVICE, InputError, barrier, check_file, count, flag_type, last_part, load_real,
                         lock, start_processes, whole, write_atomically)

# -----------------------------------------------------------------------------------------------------------
# Settings: what RobustBench fixes for each data set, and the command line.

# RobustBench's number of classes, eps (pixels lie in [0, 1]) and number of test images, and the training
# script whose build_model makes the network. ImageNet's 5,000 are a fixed list out of the 50,000 validation
# images.
BENCHMARKS = {
    "cifar10": SimpleNamespace(classes=10, eps=8 / 255, images=10_000, script="train_cifar.py"),
    "cifar100": SimpleNamespace(classes=100, eps=8 / 255, images=10_000, script="train_cifar.py"),
    "imagenet": SimpleNamespace(classes=1000, eps=4 / 255, images=5_000, script="train_imagenet.py"),
    # Images of your own: the checkpoint says how many classes, and all of test.npz is judged.
    "npz": SimpleNamespace(classes=None, eps=8 / 255, images=None, script="train_cifar.py"),
}
# The attacks of each --version, in the library's order.
ATTACKS = {"standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
           "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
           "rand": ("apgd-ce", "apgd-dlr")}
# The DLR loss is made of the three largest logits, its targeted form of four. With fewer classes there is no
# such attack.
CLASSES_NEEDED = {"apgd-dlr": 3, "apgd-t": 4}
TOLERANCE = 1e-6  # by which |x' - x| may exceed eps: float32 rounds x + eps near 1 by up to 6e-8


class VerificationError(RuntimeError):
    """The stored result does not hold what it claims. The exit code is 1."""


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(usage="%(prog)s checkpoint [flags] (--help lists them)",
                                     description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what is judged").add_argument
    add("checkpoint", help="of these scripts, of DM-AT, or of RobustBench")
    add("--arch", help="as in the training script; taken from the checkpoint if it says so")
    add("--dataset", choices=list(BENCHMARKS), help="taken from the checkpoint if it says so")
    add("--script", help="whose build_model makes the network; by default the training script of its data")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which of a checkpoint's two sets")
    add = parser.add_argument_group("on which images").add_argument
    add("--data-dir", default="data", help="CIFAR: as in train_cifar.py; ImageNet: a folder with val/ in it")
    add("--image-list", help="ImageNet: a file with one path per line, such as RobustBench's list of 5,000")
    add("--n", type=count, help="only the first N images")
    add = parser.add_argument_group("by which attacks").add_argument
    radius = flag_type("a number above 0 and below 1, such as 8/255", float, lambda x: 0 < x < 1)
    add("--eps", type=radius, help="largest change of a pixel in [0, 1]; if not given, RobustBench's")
    add("--version", choices=list(ATTACKS), default="standard", help="set of attacks")
    add("--attacks", nargs="+", choices=ATTACKS["plus"], help="only these, with the settings of --version")
    add("--batch-size", type=count, default=250, help="images attacked together")
    add("--seed", type=whole, default=0, help="of the attacks")
    add = parser.add_argument_group("where").add_argument
    add("--device", choices=["cuda", "cpu"], default=DEVICE, help="where to run")
    add("--tf32", action="store_true", help="attack in TF32, judge in float32: faster on CUDA")
    add("--out", help="folder of results and finished batches; if not given, CHECKPOINT.autoattack")
    args = parser.parse_args(argv)
    if args.attacks and len(set(args.attacks)) < len(args.attacks):
        parser.error(f"--attacks {' '.join(args.attacks)}: expected each attack once")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    return args


# -----------------------------------------------------------------------------------------------------------
# From a checkpoint to a classifier: the network that the training script builds, with the file's weights.


def load_classifier(path, arch=None, dataset=None, script=None, weights="averaged"):
    """A frozen classifier in evaluation mode, on the CPU: images [B, 3, H, W] in [0, 1] -> logits [B, K].

    path: a checkpoint of these scripts, DM-AT's, or RobustBench's for CIFAR. arch and dataset: in place of
    what the file says; necessary where it says nothing. script: a training script whose `build_model` makes
    the network, by default ours for the data set. weights: "averaged" (over training's steps; these are the
    ones to report) or "raw". The module has `info`: arch, dataset, weights, num_classes, script, step (None
    in files of others) and args, the settings of the training run. Raises InputError, one line that names
    the file, and OSError where it cannot be opened.

    The network stays in float32 and uncompiled. Attacks end close to ties between two logits. With
    bfloat16's 8 bits such logits become equal and small gradients zero, and an attack that stumbles looks
    like robustness. A compiled forward pass makes AutoAttack believe that the model computes gradients at
    test time.
    """
    saved = read_checkpoint(path)
    arch, dataset = arch or saved.get("arch"), dataset or saved.get("dataset")
    if dataset not in list(BENCHMARKS) or not isinstance(arch, str):
        raise InputError(f"{path}: does not say its arch or dataset; give --arch and --dataset")
    benchmark = BENCHMARKS[dataset]
    classes = saved.get("num_classes", benchmark.classes)
    if not isinstance(classes, int) or not 0 < classes <= 100_000:  # a damaged file may hold anything
        raise InputError(f"{path}: does not say its number of classes, as --dataset {dataset} needs")
    # On ImageNet, one may train on a part of the classes.
    if classes != benchmark.classes and dataset in ("cifar10", "cifar100"):
        raise InputError(f"{path}: classifies into {classes} classes, {dataset} has {benchmark.classes}")
    script = Path(script or Path(__file__).with_name(benchmark.script))
    last = {"pretrained": False} if dataset == "imagenet" else {"dataset": dataset}
    # This runs the script as `import` would. It is code that the user chose; a checkpoint cannot name any.
    build_model = runpy.run_path(str(script))["build_model"]
    try:
        model = build_model(arch, classes, **last)
    except ValueError as error:  # an architecture that the script does not know
        raise InputError(f"{path}: {script.name} cannot build it ({error})") from None
    if not isinstance(saved.get("args") or {}, dict):
        raise InputError(f"{path}: its args are no dict of settings")
    state, expected = choose_weights(path, saved, weights), model.state_dict()
    for prefix in ("module.", "model.", "0."):  # of DataParallel, a wrapper, and DM-AT's Sequential
        if state.keys() != expected.keys() and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    # The normalisation is the file's: among its settings, or among its weights, as in some files of others.
    for source, *names in ((saved, "mean", "std"), (state, "mean", "std"), (state, "mu", "sigma")):
        if set(names) <= source.keys() - expected.keys() and hasattr(model, "set_normalisation"):
            try:
                mean, std = [torch.as_tensor(source[name]).flatten() for name in names]
                fit = len(mean) == len(std) == 3 and (mean.isfinite() & std.isfinite() & (std > 0)).all()
            except Exception:  # these can be anything
                fit = False
            if not fit:
                raise InputError(f"{path}: expected three numbers each as {names[0]} and {names[1]}")
            model.set_normalisation(mean.tolist(), std.tolist())
            state = {name: value for name, value in state.items() if name not in names}
    check_fit(path, state, expected, f"{arch} for {dataset}")
    model.load_state_dict(state)
    # ImageNet's class names go with args, where earlier checkpoints of these scripts have them.
    model.info = SimpleNamespace(arch=arch, dataset=dataset, weights=weights, num_classes=classes,
                                 script=script, step=saved.get("step"),
                                 args={"classes": saved.get("classes")} | (saved.get("args") or {}))
    # Evaluation mode is part of the number: a BatchNorm in training mode would mix the images of a batch,
    # and one x' could break its neighbours.
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def read_checkpoint(path):
    """A checkpoint's dict. Raises InputError where the file holds none, OSError where it cannot be opened.

    A checkpoint is a pickle, and a pickle is a small program: to load it the plain way is to run what its
    author put in. The files that one evaluates come from strangers, so they go through torch's restricted
    reader (`weights_only`), which takes tensors and plain data and refuses the rest.
    """
    check_file(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not in torch's words: they suggest weights_only=False, which is how a hostile file gets to run.
        raise InputError(f"{path}: damaged, or no checkpoint of tensors ({type(error).__name__})") from None
    if not isinstance(saved, dict):
        raise InputError(f"{path}: holds a {type(saved).__name__}, expected a dict of weights")
    return saved


def choose_weights(path, saved, weights):
    """The averaged or raw weights of a checkpoint: {parameter name: tensor}, named as in the file."""
    # Averaged: ours and DM-AT's, or RobustBench's, or RobustBench's without any wrapping.
    averaged = saved.get("model_state_dict", saved.get("state_dict", saved))
    state = saved.get("unaveraged_model_state_dict") if weights == "raw" else averaged
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                              for name, value in state.items()):
        hint = "; a run keeps its raw weights in last.pt" if weights == "raw" else ""
        raise InputError(f"{path}: holds no {weights} weights as a dict of tensors{hint}")
    return state


def check_fit(path, state, expected, what):
    """Raise InputError unless `state` has the names and shapes of `expected`, and finite values.

    A network with one layer left at its random start still classifies, only worse: nobody would notice.
    """
    shape = lambda tensors, name: list(tensors[name].shape) if name in tensors else "absent"
    for name in expected | state:
        found, wanted = shape(state, name), shape(expected, name)
        if found != wanted:
            raise InputError(f"{path}: is no {what}: {name} is {found}, expected {wanted}")
        if not state[name].isfinite().all():
            raise InputError(f"{path}: {name} is not finite")


# -----------------------------------------------------------------------------------------------------------
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
    """The library's checks of the model on the first batch. It warns through its logger and goes on. Returns
    the number of classes.

    Each warning says that the true robustness may be lower than the number, for a reason of its own:

    - "randomized defense": two forward passes differ, so a gradient belongs to another random draw than the
      verdict. --version rand averages gradients over 20 passes, and skips this check.
    - "probability distribution": there is a softmax inside the model. In float32 it reaches 0 and 1, where it
      has no gradient, and the cross-entropy applies another softmax on top.
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
    return classes


def possible(attacks, classes):
    """Those of `attacks` that there are for so many classes. Raises InputError where none is."""
    left = [name for name in attacks if classes >= CLASSES_NEEDED.get(name, 2)]
    if not left:
        raise InputError(f"there is no {' or '.join(attacks)} on {classes} classes")
    return left


def set_tf32(allowed):
    """TF32 multiplies with 10 bits of mantissa instead of 23. torch allows it in convolutions unless told."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def run_attack(stage, attacker, images, labels, entered, folder, batch_size, flags, rank=0, world=1):
    """Attack images in batches, and keep every finished batch in `folder`. Returns one dict per batch.

    stage: "clean" for no attack, or the name of one, with "-tf32" behind it to run in TF32. entered:
    indices int64 [M] into images [N, 3, H, W] and labels [N]. flags: a list of warnings so far, which are
    stored with the next batch.

    A batch of n images has index, predicted, broken and changed [n], adversarial [number of broken, 3, H, W],
    seconds and flags. Broken is float32's verdict. Changed are those that TF32 had broken, but float32 has
    not. Raises VerificationError where a file in the folder is damaged or of other images.
    """
    attack, fast = stage.removesuffix("-tf32"), stage.endswith("-tf32")
    batches = [(folder / f"{stage}_{number:05d}.npz", index)
               for number, index in enumerate(entered.split(batch_size)) if len(index)]
    missing = [(path, index) for path, index in batches if not path.exists()]
    barrier()  # all processes have to see the same ones missing before the first of them adds one
    for path, index in tqdm(missing[rank::world], desc=f"{stage:8}", unit="batch", disable=rank > 0):
        since = time.time()
        x, y = images[index].to(attacker.device), labels[index].to(attacker.device)
        torch.manual_seed(attacker.seed)  # as attacks do; here for models that are random themselves
        set_tf32(fast)
        adversarial = x if attack == "clean" else perturb(attacker, attack, x, y)
        # An attack moves what it breaks, or believes to break. What it finds misclassified it leaves alone.
        moved = (adversarial != x).flatten(1).any(dim=1)
        believed = fast and moved | (predict(attacker.model, adversarial) != y)
        set_tf32(False)
        # The verdict is a forward pass of the whole batch, as in the library. What the attack itself took
        # for a success was seen in smaller batches, whose sums may be rounded otherwise.
        predicted = predict(attacker.model, adversarial)
        broken = predicted != y
        batch = {"index": index, "predicted": predicted, "broken": broken, "changed": believed & ~broken,
                 "adversarial": x[:0] if attack == "clean" else adversarial[broken]}
        batch = {name: tensor.cpu().numpy() for name, tensor in batch.items()}
        batch |= {"seconds": time.time() - since, "flags": np.array(flags, str)}
        write_atomically(path, lambda file: np.savez(file, **batch))
        flags.clear()
    # Each process reads the batches of all, as all have to know who survived. Waiting for the files
    # themselves has no time limit, unlike a barrier: one batch may take hours on a CPU.
    while not all(path.exists() for path, _ in batches):
        time.sleep(1)
    return [read_batch(path, index, images.shape[1:]) for path, index in batches]


def read_batch(path, index, size):
    """A stored batch: dict of arrays, see `run_attack`. size: C, H, W of an image. Raises VerificationError
    if damaged or of other images than `index`."""
    try:
        batch = dict(np.load(path))
        n, moved = len(batch["index"]), 0 if path.name.startswith("clean_") else batch["broken"].sum()
        expected = {"index": (np.int64, (n,)), "predicted": (np.int64, (n,)), "broken": (bool, (n,)),
                    "changed": (bool, (n,)), "adversarial": (np.float32, (moved, *size)),
                    "seconds": (np.float64, ()), "flags": (batch["flags"].dtype, (batch["flags"].size,))}
        if {name: (array.dtype, array.shape) for name, array in batch.items()} != expected:
            raise ValueError("it has other arrays")
    except Exception as error:  # a damaged zip file can fail in any way
        raise VerificationError(f"{path}: damaged ({type(error).__name__}); delete it to repeat it") from None
    if not np.array_equal(batch["index"], index):
        raise VerificationError(f"{path}: is of other images than this run's; did another run write there?")
    return batch


# -----------------------------------------------------------------------------------------------------------
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
    low, high = images.min(), images.max()
    if images.dtype != torch.float32 or not 0 <= low <= high <= 1:  # NaN is not
        raise InputError(f"images are {images.dtype}, {low:g} to {high:g}; expected float32 in [0, 1]")
    set_tf32(False)
    attacker = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, version=version, seed=seed,
                                       device=next(model.parameters()).device)
    flags = []  # the library's warnings; on the terminal nobody would see them next week
    attacker.logger.warning = flags.append
    classes = check_model(model, images, labels, batch_size, attacker)
    # With fewer than ten classes there are fewer than nine wrong ones. The library would fail.
    attacker.apgd_targeted.n_target_classes = attacker.fab.n_target_classes = min(9, classes - 1)
    names = possible(attacks or ATTACKS[version], classes)
    result = SimpleNamespace(accuracy={}, seconds={}, entered=[], changed=0, flags=[],
                             attacks=[stage for name in names for stage in [f"{name}-tf32"] * tf32 + [name]],
                             broken_by=torch.full_like(labels, -1), predicted=labels.clone(),
                             adversarial=images.clone())
    exact = torch.full_like(labels, not tf32, dtype=torch.bool)  # the images to be attacked in float32
    for k, stage in enumerate(["clean", *result.attacks]):
        due = (stage == "clean") | (exact != stage.endswith("-tf32"))
        entered = (due & (result.broken_by == -1)).nonzero().squeeze(1)
        batches = run_attack(stage, attacker, images, labels, entered, folder, batch_size, flags, rank, world)
        for batch in batches:
            index = batch["index"][batch["broken"]]
            result.broken_by[index] = k
            result.predicted[index] = torch.from_numpy(batch["predicted"][batch["broken"]])
            if stage != "clean":
                result.adversarial[index] = torch.from_numpy(batch["adversarial"])
            exact[batch["index"][batch["changed"]]] = True
            result.changed += int(batch["changed"].sum())
            result.flags += batch["flags"].tolist()
        result.entered.append(entered)
        result.accuracy[stage] = left = 100 * (result.broken_by == -1).sum().item() / len(labels)
        result.seconds[stage] = seconds = float(sum(batch["seconds"] for batch in batches))
        if rank == 0:
            print(f"{stage:13} {left:6.2f} % left   {seconds:8.1f} s", flush=True)
    shares = {name: result.accuracy[name] / 100 for name in ["clean", *names]}
    pyautoattack.checks.check_square_sr(shares, logger=attacker.logger)
    result.flags = list(dict.fromkeys(result.flags + flags))  # each once
    return result


def verify(model, images, labels, result, eps, batch_size, random=False):
    """Check the result against the stored images: every x' within eps and in [0, 1], and every verdict again.

    The recount, in float32, trusts neither attacks nor files. An x' outside the ball is no adversarial
    example, and a file may come from another model. Raises VerificationError. A model that is `random`
    itself may change its verdicts. Returns how many it changed.
    """
    adversarial, distance = result.adversarial, (result.adversarial - images).abs()
    allowed = (distance <= eps + TOLERANCE) & (adversarial >= 0) & (adversarial <= 1)  # NaN is not
    if not allowed.all():
        outside = int((~allowed).flatten(1).any(dim=1).sum())
        raise VerificationError(f"{outside} adversarial images are further than eps {eps:g} from their "
                                f"images ({distance.max():g}) or leave [0, 1]")
    # Stage by stage (0 is the clean pass), in the batches of the attack, with x' in place of x where one was
    # found. Rounding can depend on a batch's size, and in other batches a near tie could fall the other way.
    device, different = next(model.parameters()).device, 0
    for k, entered in enumerate(result.entered):
        for index in entered.split(batch_size):
            broken_here = result.broken_by[index] == k
            attacked = (broken_here & (k > 0))[:, None, None, None]
            x = torch.where(attacked, result.adversarial[index], images[index])
            wrong = (predict(model, x.to(device)).cpu() != labels[index]) != broken_here
            different += int(wrong.sum())
            if wrong.any() and not random:
                raise VerificationError(f"{int(wrong.sum())} verdicts do not repeat, the first on image "
                                        f"{int(index[wrong][0])}: stored images and results disagree")
    return different


# -----------------------------------------------------------------------------------------------------------
# Images: each benchmark's test set, with pixels in [0, 1]. Normalisation is part of the model, since eps is
# not measured in normalised units.


def load_images(args, info, split="test"):
    """The first args.n images of a split, float32 [N, 3, H, W] in [0, 1], and labels int64 [N], on the CPU.

    info: as `load_classifier` leaves it. split: "test" or, for CIFAR, "train". Raises InputError.
    """
    if info.dataset == "imagenet":
        assert split == "test", "ImageNet: only the test images are read here"
        return load_imagenet(Path(args.data_dir), args.image_list, args.n, info.num_classes,
                             info.args.get("image_size", 224), info.args.get("classes"))
    source = SimpleNamespace(dataset=info.dataset, data_dir=args.data_dir,
                             smoke=info.args.get("smoke") is True, seed=info.args.get("seed", 0))
    images, labels = [torch.as_tensor(array[:args.n]) for array in load_real(source, split)]
    if info.num_classes and labels.max() >= info.num_classes:
        raise InputError(f"{args.data_dir}: has label {labels.max()} in the {split} images, expected "
                         f"0 to {info.num_classes - 1} as in training")
    return images.permute(0, 3, 1, 2).contiguous().float() / 255, labels.long()


def load_imagenet(folder, image_list, n, num_classes=1000, image_size=224, class_names=None):
    """RobustBench's protocol: shorter side to 256, centre crop of 224 (in proportion for another image_size).

    folder: has val/, and in it a folder for each class. image_list: a file with a path per line, relative to
    `folder` or to val/; None for all of val/ in order. n: only the first n; None for all. The number of a
    class is the place of its folder in sorted order, so other folders would shift all labels: there have to
    be num_classes, with class_names, if the checkpoint knows their names. Returns images float32 [N, 3, H,
    W] in [0, 1] and labels int64 [N]. Raises InputError, and OSError where val/ or the list is not there.
    """
    val = datasets.ImageFolder(folder / "val", allow_empty=True)
    if len(val.classes) != num_classes or class_names not in (None, val.classes):
        raise InputError(f"{val.root}: has {len(val.classes)} class folders, not those of the {num_classes} "
                         "classes in the checkpoint's training")
    paths = [Path(path) for path, _ in val.samples]
    if image_list:
        lines = Path(image_list).read_text(errors="replace").splitlines()  # "PATH", or "PATH LABEL"
        paths = [folder / "val" / line.split()[0].removeprefix("val/") for line in lines if line.strip()]
    elif n is None and len(paths) > 10_000:  # all are held in memory, and 50,000 would take 30 GB
        raise InputError(f"{val.root}: has {len(paths):,} images, expected --image-list or --n")
    if not paths or len(set(paths)) < len(paths):
        raise InputError(f"{image_list or val.root}: names no image, or one twice")
    labels = [val.class_to_idx.get(path.parent.name) for path in paths[:n]]
    if None in labels:
        raise InputError(f"{image_list}: {paths[labels.index(None)]} is in no class folder of {val.root}")
    images = [read_imagenet(path, image_size) for path in tqdm(paths[:n], "reading images", disable=None)]
    return torch.stack(images), torch.tensor(labels)


def read_imagenet(path, size=224):
    """An image file -> float32 [3, size, size] in [0, 1], resized and cropped as above. Raises InputError."""
    prepare = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size),
                                  transforms.ToTensor()])
    try:
        return prepare(datasets.folder.default_loader(path))
    except Exception as error:  # a damaged image can fail in any way
        raise InputError(f"{path}: cannot be read as an image ({type(error).__name__})") from None


# -----------------------------------------------------------------------------------------------------------
# The run: say what is judged, judge it, verify, write it down.


def prepare_folder(folder, settings):
    """Make the folder of results, or check that it has these settings. Raises InputError otherwise."""
    path = folder / "settings.json"
    if path.exists():
        try:
            there = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise InputError(f"{path}: damaged, expected JSON; choose another --out") from None
        for name, value in settings.items():
            if there.get(name) != value:
                raise InputError(f"{path}: {name} {there.get(name)} there, {value} now; choose another --out")
    elif folder.exists() and any(entry.suffix != ".tmp" for entry in folder.iterdir()):
        raise InputError(f"{folder}: is neither empty nor a folder of results; choose another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))


def reservations(args, info, settings):
    """Why this is not RobustBench's number: remarks, none if it is (as far as a script can tell)."""
    benchmark, size, classes = BENCHMARKS[info.dataset], info.args.get("image_size", 224), info.num_classes
    full = settings["n"] == benchmark.images and (info.dataset != "imagenet" or args.image_list)
    attacks = args.attacks or ATTACKS[args.version]
    left_out = [name for name in attacks if name not in possible(attacks, classes)]
    checks = [
        (full or info.dataset == "npz" and args.n is None, "NOT THE FULL TEST SET"),
        (args.attacks is None, f"ONLY {' '.join(args.attacks or [])}: not AutoAttack"),
        (benchmark.classes in (None, classes), f"{classes} classes, not {benchmark.classes}"),
        (classes >= 10 or not {"apgd-t", "fab-t"} & set(attacks),
         f"{classes - 1} of 9 targets in targeted attacks: there are no more"),
        (not left_out, f"without {' and '.join(left_out)}, whose loss needs more than {classes} classes"),
        (size == 224, f"{size} px, not 224"),
        (args.version == "standard", f"version {args.version}, not standard"),
        (settings["eps"] == benchmark.eps, f"eps is not {benchmark.eps * 255:g}/255"),
    ]
    return [remark for passed, remark in checks if not passed]


def report(folder, args, info, settings, result, labels, remarks, different):
    """Write result.json, with RobustBench's fields, and images.npz with the verdicts; print the result."""
    clean, robust = result.accuracy["clean"], result.accuracy[result.attacks[-1]]
    content = {
        # RobustBench's fields. What a script cannot know is left to whoever submits the result, and
        # autoattack_acc is filled in only where nothing speaks against quoting it.
        "link": None, "name": None, "authors": None, "venue": None, "number_forward_passes": 1,
        "additional_data": bool(info.args["synthetic"]) if "synthetic" in info.args else None,
        "dataset": info.dataset, "architecture": info.arch, "eps": f"{settings['eps'] * 255:g}/255",
        "clean_acc": f"{clean:.2f}", "reported": None, "autoattack_acc": None if remarks else f"{robust:.2f}",
        # Ours.
        "robust_accuracy": robust, "robust_accuracy_after": result.accuracy, "seconds": result.seconds,
        "images": len(labels), "reservations": remarks, "flags": result.flags,
        "verdicts_changed_by_float32": result.changed if args.tf32 else None,
        "verdicts_not_repeated": different, "settings": settings,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }
    arrays = {"label": labels, "predicted": result.predicted, "broken_by": result.broken_by,
              "adversarial": result.adversarial, "stages": ["clean", *result.attacks]}
    write_atomically(folder / "images.npz", lambda file: np.savez(file, **arrays))
    write_atomically(folder / "result.json", lambda file: file.write(json.dumps(content, indent=2).encode()))
    for flag in result.flags:
        print(f"*** remark: {flag}")
    print(f"clean {clean:.2f} %, robust {robust:.2f} %; verified, {folder / 'result.json'}")


def main(argv=None):
    """The command line. Raises InputError, OSError and VerificationError."""
    args = parse_args(argv)
    device, rank, world, local = start_processes(SimpleNamespace(device=args.device, amp=False))
    # cuDNN may not choose its algorithms by speed, so that a continued evaluation equals an undisturbed one.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    model = load_classifier(args.checkpoint, args.arch, args.dataset, args.script, args.weights).to(device)
    info, eps = model.info, args.eps or BENCHMARKS[model.info.dataset].eps
    if local > 0:  # the first process of each machine goes first, as it may have to download
        barrier()
    images, labels = load_images(args, info)
    if local == 0:
        barrier()
    # What the result depends on, so that two evaluations do not mix in one folder. Files count by their
    # names. If training has gone on and written another best.pt, its step tells. A corrected --script does
    # not show here. `verify` fails where a verdict no longer holds, but images that survived are not
    # attacked again: so whoever corrects a network chooses another --out.
    settings = {name: last_part(value) for name, value in vars(args).items() if name != "out"}
    settings |= {"arch": info.arch, "dataset": info.dataset, "script": info.script.name, "step": info.step,
                 "n": len(labels), "norm": "Linf", "eps": eps, "attacks": args.attacks,
                 "torch": torch.__version__, "pyautoattack": pyautoattack.__version__}
    remarks = reservations(args, info, settings)
    folder = Path(args.out or f"{args.checkpoint}.autoattack")
    if rank == 0:
        prepare_folder(folder, settings)
        print(f"{args.checkpoint}: {info.arch}, {args.weights} weights, {info.dataset}, Linf eps "
              f"{eps * 255:g}/255, {len(labels)} images, AutoAttack {args.version} "
              f"(pyautoattack {pyautoattack.__version__})", flush=True)
        for remark in remarks:
            print(f"*** {remark}: not a number to quote ***", flush=True)
    barrier()  # no other process writes before the folder is there and known to be of this evaluation
    with lock(folder) if rank == 0 else contextlib.nullcontext():
        result = evaluate(model, images, labels, folder, eps, args.attacks, args.version, args.batch_size,
                          args.seed, rank, world, args.tf32)
        if rank == 0:
            different = verify(model, images, labels, result, eps, args.batch_size, args.version == "rand")
            if different:
                result.flags.append(f"{different} verdicts do not repeat: the model is random")
            report(folder, args, info, settings, result, labels, remarks, different)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError, VerificationError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1 if isinstance(problem, VerificationError) else 2)
