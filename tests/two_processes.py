"""Started by test_many_processes.py under torchrun, or called there as one process; results go into a folder.

    torchrun --nproc-per-node 2 tests/two_processes.py compute FOLDER  # draws, gradients, evaluations
    torchrun --nproc-per-node 2 tests/two_processes.py clocks FOLDER   # a run; each process has its own clock
    torchrun --nproc-per-node 2 tests/two_processes.py die FOLDER      # the second ends in its third step
"""
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_cifar
import train_imagenet

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
# Without BatchNorm, so that two processes compute what one computes; a WRN, which has it; and one whose batch
# is in four pieces in any case, each normalised by itself.
CIFAR = ["--smoke", "--batch-size", "16", "--extra-sigma", "--attack-steps", "3"]
SETTINGS = {
    "ViT": (train_cifar, [*CIFAR, "--arch", "vit-tiny-2", "--lr", "1e-3"]),
    "WRN": (train_cifar, CIFAR),
    "WRN in pieces": (train_cifar, [*CIFAR, "--accumulate", str(4 // WORLD)]),
    "ImageNet": (train_imagenet, ["--smoke", "--image-size", "32", "--batch-size", "16", "--workers", "0"]),
}


def prepare(name, folder):
    """A setting's script, arguments, this process's share of the data, and teacher."""
    script, flags = SETTINGS[name]
    if script is train_cifar:
        args = script.parse_args(flags)
        return script, args, script.Data(args, torch.device("cpu"), RANK, WORLD), script.load_teacher(args)
    images = str(folder / "images")
    args = script.parse_args([*flags, "--data", images, "--synthetic", f"{images}/synthetic"])
    data = script.Data(args, torch.device("cpu"), RANK, WORLD)
    teacher = script.load_teacher(args, data)
    data.latent_shape = teacher.latent_shape
    return script, args, data, teacher


def flat(run, gradients=False):
    """All weights of model, averaged model and projectors in one vector, or the gradients."""
    modules = (run.model, run.projectors) if gradients else (run.model, run.averaged, run.projectors)
    return torch.cat([(p.grad if gradients else p).detach().flatten() for module in modules
                      for p in module.parameters()])


def from_all(tensor):
    """That tensor of every process."""
    if WORLD == 1:
        return [tensor.clone()]
    everyone = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(everyone, tensor)
    return everyone


def steps(script, args, data, teacher):
    """Batches; loss and gradient of the first step WITHOUT attack steps (signs would amplify rounding); then
    three whole steps: the weights of every process after each of them, and the run."""
    build = lambda: script.build_run(args, data, teacher, 1000)  # steps, so that the rate is not the last one
    batches, run = [data.batch(step) for step in range(3)], build()
    take_step = lambda batch, decay: script.train_step(run.model, run.averaged, run.projectors, teacher,
                                                       run.optimizer, batch, decay, args)
    with mock.patch.object(script, "trades_attack", lambda model, images, start, *settings: start):
        numbers = take_step(batches[0], 0.0)
    found = {"batches": [vars(batch) for batch in batches], "gradient": flat(run, gradients=True),
             "loss": script.all_reduce(numbers["loss"].clone()) / WORLD, "weights": []}
    run = build()
    for batch in batches:
        take_step(batch, 0.5)
        found["weights"].append(from_all(flat(run)))
    return found, run


def compute(folder):
    """What each process has, into FOLDER/WORLD_RANK.pt. FOLDER holds wrn.pt, the averaged weights of a WRN
    that tells some images from others, and images/ as from `draw_smoke_folders`."""
    results = {}
    for name in SETTINGS:
        script, args, data, teacher = prepare(name, folder)
        found, run = steps(script, args, data, teacher)
        found["holdout"] = list(data.holdout_batches())
        if name == "WRN":
            statistics = lambda: from_all(run.averaged.batchnorm.running_mean)
            with mock.patch.object(script, "SELECTION_STEPS", 1):
                found["statistics"] = [statistics(), script.evaluate(run.averaged, data, args), statistics()]
            run.averaged.load_state_dict(torch.load(folder / "wrn.pt", weights_only=True))
            with mock.patch.object(script, "SELECTION_STEPS", 10):
                found["accuracy"] = script.evaluate(run.averaged, data, args)
        if name == "ImageNet":
            args.cache_targets = str(folder / f"cache of {WORLD}")
            script.cache_targets(args, data, teacher)
        results[name] = found
    torch.save(results, folder / f"{WORLD}_{RANK}.pt")


def clocks(folder):
    """A whole run, in which a step takes 25 s by the clock of process 0 and 70 s by that of process 1. The
    steps that were saved go into FOLDER/saves.json."""
    now, saves, script = [0.0], [], train_cifar
    train_step, save = script.train_step, script.save

    def slow(*arguments):
        now[0] += 70 if RANK else 25
        return train_step(*arguments)

    def noted(out, about, run):
        saves.append(run.step)
        save(out, about, run)
    script.time, script.train_step, script.SELECTION_STEPS = SimpleNamespace(time=lambda: now[0]), slow, 1
    script.save = noted
    script.main(["--smoke", "--batch-size", "16", "--attack-steps", "1", "--max-steps", "8", "--eval-every",
                 "4/68", "--save-minutes", "1", "--out", str(folder)])
    if RANK == 0:
        (folder / "saves.json").write_text(json.dumps(saves))


def die(folder):
    """A run whose second process is gone in the third step. FOLDER/flags.json: the command."""
    train_step, count = train_cifar.train_step, []

    def fragile(*arguments):
        count.append(1)
        if RANK == 1 and len(count) == 3:
            os._exit(7)
        return train_step(*arguments)
    train_cifar.train_step = fragile
    train_cifar.main(json.loads((folder / "flags.json").read_text()))


def main(job, folder):
    """The command line."""
    torch.set_num_threads(1)
    if job == "compute" and WORLD > 1:
        dist.init_process_group("gloo")
    {"compute": compute, "clocks": clocks, "die": die}[job](Path(folder))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
