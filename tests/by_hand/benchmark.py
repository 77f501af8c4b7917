"""Shows how long a training step and its parts take, and its FLOPs, in one line of JSON. A minute on a GPU.

    python tests/by_hand/benchmark.py train_cifar.py --arch wrn-28-10 --batch-size 512
    python tests/by_hand/benchmark.py train_imagenet.py --steps 10 --peak-tflops 989

--steps and --peak-tflops (the device's peak rate, to compare with) are this script's own flags, all others
are the training script's. Images and a teacher of full size, with random weights, are made up where none are
given.

Seconds are means over the steps after a warm-up: of whole steps with new batches, and of the parts alone
(data, attack, teacher; "update" is the rest of a step on a fixed batch). They need not add up, as data are
read while others compute. FLOPs (a multiplication and an addition are two) are torch's count for one forward
and for the teacher, times the number of passes, where a backward pass to image or weights costs as much as a
forward pass; for this process's share of the batch.
"""
import argparse
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from dit_encoder import DiTEncoder, LightningDiT, VAEEncoder
from edm_encoder import EDMEncoder

WARMUP = 5  # steps before the clock starts: compilation, and cuDNN's choice of algorithms


def random_edm(args, classes=None):
    """An encoder of the size of NVIDIA's CIFAR model, with random weights."""
    torch.manual_seed(0)
    size = {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4}
    classes = classes or {"cifar10": 10, "cifar100": 100}[args.dataset]
    teacher = EDMEncoder(args.teacher_layer, img_resolution=32, label_dim=classes, **size)
    return teacher.to(memory_format=torch.channels_last)


def random_dit(args, data):
    """LightningDiT-XL/1 and VA-VAE in the released sizes, with random weights and statistics that fit."""
    torch.manual_seed(0)
    levels = [(128, 2, False), (128, 2, False), (256, 2, False), (256, 2, False), (512, 2, True)]
    vae = VAEEncoder(128, levels, latent_channels=32)
    dit = LightningDiT(1152, 16, 3072, 32, 1, 256, len(data.classes) + 1, args.teacher_layer)
    teacher = DiTEncoder(vae, dit, image_size=256)
    teacher.checked, teacher.amp = True, args.amp
    return teacher.to(data.device, memory_format=torch.channels_last)


def prepare(script, flags):
    """What a step of that script needs -> (args, data, teacher, run, batches: count -> iterator)."""
    imagenet = script.__name__ == "train_imagenet"
    made_up = imagenet and not {"--teacher", "--smoke"} & set(flags)
    args = script.parse_args([*flags, *(["--teacher", "random", "random", "random"] if made_up else [])])
    device, *_ = script.start_processes(args)
    if imagenet:
        if not Path(args.data).exists():
            args.data = os.path.join(tempfile.gettempdir(), f"benchmark-images-{os.getuid()}")
            args.synthetic = args.synthetic and os.path.join(args.data, "synthetic")
            if not Path(args.data, "synthetic", "class9", "019.jpg").exists():  # the last one to be drawn
                script.draw_smoke_folders(Path(args.data), 0)
        data = script.Data(args, device)
        load = random_dit if made_up else script.load_teacher
        teacher = load(args, data) if args.dra_weight else None
        if teacher and args.cache_targets:
            script.cache_targets(args, data, teacher)
        elif teacher:
            data.latent_shape = teacher.latent_shape
    else:
        if not args.smoke and not Path(args.data_dir).exists():
            images, labels = script.draw_smoke_images(2000, seed=0)
            made = np.concatenate([images] * 25), np.concatenate([labels] * 25)
            script.load_real = lambda *_: made
        data = script.Data(args, device)
        made_up = args.teacher == script.DATASETS[args.dataset].teacher  # the default, a download
        load = random_edm if made_up else script.load_teacher
        teacher = load(args, data.classes).to(device) if args.dra_weight else None

    def batches(count):
        data.coming = None if imagenet else {}  # forget what was read ahead: from the first step again
        return (data.batch(step) for step in range(count))
    return args, data, teacher, script.build_run(args, data, teacher), batches


def ask_teacher(script, teacher, part, args):
    """The targets of a batch, as in `train_step`."""
    labels = None if args.teacher_unconditional else part.labels
    with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
        if script.__name__ == "train_cifar":
            return [teacher(part.images, labels, sigma, noise) for sigma, noise in part.teacher_noise]
        return [teacher(part.images, labels, args.teacher_t, part.teacher_noise)
                for _ in [teacher] if part.teacher_noise is not None]


def measure(script, flags, steps, peak_tflops=None):
    """A dict of what was measured."""
    args, data, teacher, run, batches = prepare(script, flags)
    model, cuda = run.model, args.device == "cuda"

    def seconds(function):
        inputs = batches(WARMUP + steps)
        for i in range(WARMUP + steps):
            if i == WARMUP:
                torch.cuda.synchronize() if cuda else None
                started = time.perf_counter()
            function(inputs)
        torch.cuda.synchronize() if cuda else None
        return (time.perf_counter() - started) / steps

    def step(batch):
        script.train_step(model, run.averaged, run.projectors, teacher, run.optimizer, batch, 0.5, args)

    def attack(_):
        for part, logits in zip(parts, clean_logits):
            script.trades_attack(model, part.images, part.start, args.eps, args.step_size, args.attack_steps,
                                 logits)

    def teach(_):
        for part in parts:
            ask_teacher(script, teacher, part, args)
    batch = next(batches(1))
    parts = script.split_batch(batch, args.accumulate) if hasattr(args, "accumulate") else [batch]
    step(batch)  # before compiling: train_cifar.py's first step is another graph
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        clean_logits = [model(part.images) for part in parts]
    with FlopCounterMode(display=False) as teaching:
        teach(None)
    # Attack steps of a forward and a backward pass to the image; two forwards with backward passes to image
    # and weights.
    flops = forward.get_total_flops() * (2 * args.attack_steps + 2 * 3) + teaching.get_total_flops()
    torch.cuda.reset_peak_memory_stats() if cuda else None
    script.compile_parts(args, model, teacher)
    times = {"step": seconds(lambda inputs: step(next(inputs))), "data": seconds(next),
             "attack": seconds(attack), "teacher": seconds(teach)}
    times["update"] = seconds(lambda _: step(batch)) - times["attack"] - times["teacher"]
    rate = flops / times["step"] / 1e12
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"arch": args.arch, "batch_size": args.batch_size,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__, "threads": torch.get_num_threads(), "bfloat16": args.amp,
            "compiled": cuda and not args.no_compile, "images_per_s": args.batch_size / times["step"],
            "seconds": times, "gflop_per_image": flops / len(batch.labels) / 1e9, "tflops": rate,
            "share_of_peak": rate / peak_tflops if peak_tflops else None,
            "peak_memory_gib": (torch.cuda.max_memory_allocated() if cuda else resident) / 2**30}


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("script", choices=["train_cifar.py", "train_imagenet.py"])
    parser.add_argument("--steps", type=int, default=20, help="to time, after a warm-up")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak rate")
    own, flags = parser.parse_known_args(argv)
    script = importlib.import_module(own.script.removesuffix(".py"))
    result = json.dumps(measure(script, flags, own.steps, own.peak_tflops))
    print(json.dumps(json.loads(result, parse_float=lambda text: float(f"{float(text):.4g}"))))


if __name__ == "__main__":
    main()
