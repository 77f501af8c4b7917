"""Shows what each row of the paper's Tables 1 and 2 costs, as a Markdown table. Two minutes.

    python tests/by_hand/cost_of_rows.py

The rows are README.md's own commands. Nothing is trained: a step of the full-size networks runs on tensors of
torch's meta device, which have a shape and no content.

FLOP: torch's FlopCounterMode (a multiplication and an addition are two) counts one `train_step`, attack,
backward passes and teacher included, times the number of steps. GPU hours assume an H100 that reaches 40 % of
its 989 TFLOP/s in bfloat16; that was not measured. Memory is counted for bfloat16 without compilation: what
autograd saves for the backward passes of the two forwards that live at once, clean and attacked (the teacher
and the attack itself need less), weights, gradients, the optimizer's state and the average in float32, the
teacher's weights, and the batch. --accumulate is the least power of two with which a step stays below 90 % of
80 or 24 GB.
"""
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import benchmark
import train_cifar
import train_imagenet
from test_readme import commands

PEAK, REACHED = 989e12, 0.4  # an H100's FLOP/s in bfloat16, and the share that is assumed
REAL = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}  # training images
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


@contextlib.contextmanager
def without_content():
    """New tensors are torch's fake ones: on the meta device, but they say that they are on the CPU, so that
    autocast takes them. What reads their values is left out: another memory format, a cut normal, and timm's
    shares of blocks to drop, which are 0. The counter is not told which module is at work: that fails where
    torch.autograd.grad asks for the gradient to an image."""
    untold = {"__enter__": lambda self: self, "__exit__": lambda self, *_: None}
    with FakeTensorMode(), mock.patch.multiple(ModuleTracker, **untold), \
            mock.patch.object(nn.Module, "to", lambda self, *_, **__: self), \
            mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor), \
            mock.patch.object(torch.Tensor, "item", lambda self: 0.0):
        yield


def build(script, args, dataset):
    """The row's networks: model, average, projectors, teacher, optimizer."""
    imagenet, classes = script is train_imagenet, CLASSES[dataset]
    data = SimpleNamespace(device=torch.device("cpu"), classes=range(classes))
    teacher = None
    if args.dra_weight > 0:
        teacher = benchmark.random_dit(args, data) if imagenet else benchmark.random_edm(args, classes)
    models = [script.build_model(args.arch, classes, *([False, args.image_size] if imagenet else [dataset]))
              for _ in range(2)]
    model, averaged = [model.requires_grad_(i == 0) for i, model in enumerate(models)]
    model.amp = True
    width = model.features(torch.zeros(2, 3, *2 * [224 if imagenet else 32])).shape[1]
    n_projectors = 1 + getattr(args, "extra_sigma", False) if teacher else 0
    projectors = nn.ModuleList(script.build_projector(width, teacher.width) for _ in range(n_projectors))
    return model, averaged, projectors, teacher, script.build_optimizer(args, model, projectors)


def make_batch(script, teacher, n_projectors, size):
    """A batch of `size` images without content."""
    images = torch.zeros(size, 3, *2 * [224 if script is train_imagenet else 32])
    noise = [(torch.zeros(size), images) for _ in range(n_projectors)]
    if script is train_imagenet:
        noise = torch.zeros(size, *teacher.latent_shape) if teacher else None
    labels = torch.zeros(size, dtype=torch.long)
    return SimpleNamespace(images=images, labels=labels, start=images, target=None, teacher_noise=noise)


def saved_bytes(model, images):
    """What autograd keeps of one forward, without the parameters themselves."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}  # storages by identity: some are saved more than once; the tensors are held, so that ids stay

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)  # held, or the graph would be gone
    del logits
    return sum(size for size, _ in kept.values())


def size_in_bytes(*modules):
    """Parameters of modules, in float32."""
    return sum(4 * p.numel() for module in modules if module for p in module.parameters())


def row(script, flags):
    """One line of the table."""
    imagenet = script is train_imagenet
    teacher = ["--teacher", "x", "x", "x"] if imagenet and "--teacher" not in flags else []
    args = script.parse_args([*flags, *teacher, "--device", "cpu", "--amp"])
    dataset = getattr(args, "dataset", "imagenet")
    steps = args.epochs * -(-REAL[dataset] // args.batch_size)
    with without_content():
        model, averaged, projectors, teacher, optimizer = build(script, args, dataset)
        # The plain kernel of attention: the counter does not know the CPU's fused one, which saves less.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            args.accumulate, args.teacher_unconditional = 1, True  # labels without content cannot be checked
            script.train_step(model, averaged, projectors, teacher, optimizer,
                              make_batch(script, teacher, len(projectors), 2), 0.9, args)
        flop = counter.get_total_flops() / 2 * args.batch_size * steps
        one, two = [saved_bytes(model, make_batch(script, teacher, 0, n).images) for n in (1, 2)]
    per_image, constant = 2 * (two - one), 2 * one - two  # two graphs; bfloat16 copies of the weights
    pixels = 3 * (224 if imagenet else 32)**2
    fixed = constant + 4 * size_in_bytes(model, projectors) + size_in_bytes(teacher)
    fixed += args.batch_size * 4 * pixels * (3 + 2 * len(projectors))  # images, starts, noise and draws

    def memory(pieces):
        return fixed + per_image * args.batch_size / pieces
    pieces = [next(k for k in (2**i for i in range(20)) if memory(k) < 0.9 * room) for room in (80e9, 24e9)]
    name = args.arch.split(".")[0].replace("vit_base_patch16_dinov3", "ViT-B/16").replace(
        "convnext_base", "ConvNeXt-B")
    method = ("DM-AT" if args.synthetic else "AT") + (" + DRA" if teacher else "")
    synthetic = Path(args.synthetic[0]).name[:3].replace("m", "M").strip("_.") if args.synthetic else ""
    hours = flop / PEAK / REACHED / 3600
    return (f"| {dataset} | {name} | {method} | {'4M' if imagenet else synthetic} | {args.batch_size:,} | "
            f"{steps:,} | {flop:.1e} | {hours:.{int(hours < 10)}f} | {memory(1) / 1e9:.0f} | {pieces[0]} | "
            f"{pieces[1]} |")


def main():
    """The command line."""
    print("| images | network | method | synthetic | batch | steps | FLOP | H100 hours | GB | "
          "`--accumulate` for 80 GB | for 24 GB |\n|" + 11 * "---|")
    done = set()
    for name, flags in commands():
        script = {"train_cifar.py": train_cifar, "train_imagenet.py": train_imagenet}.get(name)
        if script and "--out" in flags and not {"--smoke", "--data-dir", "--attack-steps"} & set(flags):
            line = row(script, flags)
            if line not in done:
                print(line, flush=True)
            done.add(line)


if __name__ == "__main__":
    main()
