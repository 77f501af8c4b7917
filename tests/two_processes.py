"""Started by test_many_processes.py under torchrun (or alone, as one process): steps on small models, results into a folder.

    torchrun --nproc-per-node 2 tests/two_processes.py steps FOLDER      # gradients, and weights after every step
    torchrun --nproc-per-node 2 tests/two_processes.py die FOLDER        # the second process ends in its third step
"""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_cifar
import train_imagenet

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


class SmallViT(train_cifar.ViT):
    """train_cifar.py's ViT with two layers."""

    def __init__(self, num_classes):
        torchvision.models.VisionTransformer.__init__(self, 32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=num_classes)


def flat(modules, gradients=False):
    return torch.cat([(p.grad if gradients else p).detach().flatten() for module in modules for p in module.parameters()])


def steps(folder):
    """For each script: loss and gradient of the first step WITHOUT attack steps (signs would amplify rounding), then three whole steps, after
    each of which all processes have to hold the same weights."""
    train_cifar.ViT = SmallViT
    cifar_args = train_cifar.parse_args(["--smoke", "--arch", "vit-b-2", "--optimizer", "lion", "--lr", "1e-3", "--batch-size", "16"])
    cifar_data, cifar_teacher = train_cifar.Data(cifar_args, torch.device("cpu"), RANK, WORLD), train_cifar.load_teacher(cifar_args, torch.device("cpu"))
    args = train_imagenet.parse_args(["--smoke", "--arch", "test_vit", "--image-size", "32", "--batch-size", "16", "--data", str(folder / "data"), "--workers", "0"])
    if RANK == 0 and not (folder / "data").exists():
        train_imagenet.draw_smoke_folders(folder / "data", 0)
    if WORLD > 1:
        dist.barrier()
    data = train_imagenet.Data(args, torch.device("cpu"), RANK, WORLD)
    teacher, results = train_imagenet.load_teacher(args, data), {}
    for script, args, data, teacher in ((train_cifar, cifar_args, cifar_data, cifar_teacher), (train_imagenet, args, data, teacher)):
        batch = data.batch if script is train_cifar else lambda step: data.batch(step, next(data.load(step, step + 1)), teacher.latent_shape)
        build = lambda: script.build_run(args, torch.device("cpu") if script is train_cifar else data, teacher)
        attack, script.trades_attack = script.trades_attack, lambda model, images, start, *settings: start
        run = build()
        numbers = script.train_step(*run[:3], teacher, run[3], batch(0), 0.0, args)
        loss = script.all_reduce(numbers["loss"].clone()) / WORLD
        results[script.__name__] = {"loss": loss, "gradient": flat((run[0], run[2]), gradients=True)}
        script.trades_attack, run = attack, build()
        for step in range(3):
            script.train_step(*run[:3], teacher, run[3], batch(step), 0.5, args)
            weights = flat(run[:3])
            everyone = [torch.empty_like(weights) for _ in range(WORLD)]
            if WORLD > 1:
                dist.all_gather(everyone, weights)
                assert all(torch.equal(weights, others) for others in everyone), f"{script.__name__}: weights differ after step {step}"
        results[script.__name__]["weights"] = flat(run[:3])
    if RANK == 0:
        torch.save(results, folder / f"{WORLD}.pt")


def die(folder):
    """A run whose second process is gone in the third step."""
    train_step, count = train_cifar.train_step, []

    def fragile(*arguments):
        count.append(1)
        if RANK == 1 and len(count) == 3:
            os._exit(7)
        return train_step(*arguments)
    train_cifar.train_step = fragile
    train_cifar.main(["--smoke", "--batch-size", "16", "--attack-steps", "1", "--max-steps", "50", "--save-every", "0.001", "--out", str(folder)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if WORLD > 1 and sys.argv[1] == "steps":
        dist.init_process_group("gloo")
    {"steps": steps, "die": die}[sys.argv[1]](Path(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()
