"""Shows our training step beside a plain textbook TRADES step, in turns. A minute on two CPU cores.

    python tests/by_hand/compare_textbook_step.py [--arch wrn-16-2] [--batch-size 64]
        [--rounds 8] [--device cpu]

The textbook step is TRADES as anyone would write it down (arXiv 1901.08573, with DM-AT's settings): no
alignment, no weight averaging, no care for memory layout or for gradients that nobody needs, in float32, on a
GPU also with TF32 (where DM-AT's ran, that was the default). Ours has the averaging in it, and on a GPU
bfloat16 and compilation, as in a training run.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import train_cifar


def textbook_step(model, optimizer, images, labels, eps=8 / 255, step_size=2 / 255, steps=10, beta=5.0):
    model.train()
    kl = torch.nn.KLDivLoss(reduction="sum")
    adv = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
    clean = F.softmax(model(images), dim=1).detach()
    for _ in range(steps):
        adv.requires_grad_()
        gradient = torch.autograd.grad(kl(F.log_softmax(model(adv), dim=1), clean), [adv])[0]
        adv = adv.detach() + step_size * gradient.sign()
        adv = torch.min(torch.max(adv, images - eps), images + eps).clamp(0, 1)
    optimizer.zero_grad()
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    loss = loss + beta / len(images) * kl(F.log_softmax(model(adv.detach()), dim=1), F.softmax(logits, dim=1))
    loss.backward()
    optimizer.step()


def compare(args, rounds):
    """Median seconds of a step: {"ours": ..., "textbook": ..., on a GPU also "textbook, TF32": ...}. args:
    from train_cifar.parse_args."""
    device, cuda = torch.device(args.device), args.device == "cuda"
    torch.backends.cudnn.benchmark = True
    data = train_cifar.Data(args, device)
    run = train_cifar.build_run(args, data)
    model = train_cifar.build_model(args.arch, 10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = {"ours": lambda batch: train_cifar.train_step(run.model, run.averaged, run.projectors, None,
                                                          run.optimizer, batch, 0.9, args)}
    for name in ("textbook", "textbook, TF32")[:1 + cuda]:
        steps[name] = lambda batch: textbook_step(model, optimizer, batch.images, batch.labels)
    times = {name: [] for name in steps}
    for number in range(rounds + 2):  # the first two warm up, in the second ours is compiled, as in a run
        if number == 1:
            train_cifar.compile_parts(args, run.model)
        batch = data.batch(number)
        for name, step in steps.items():
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "textbook"
            torch.cuda.synchronize() if cuda else None
            started = time.perf_counter()
            step(batch)
            torch.cuda.synchronize() if cuda else None
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="wrn-16-2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    flags = parser.parse_args()
    torch.set_num_threads(2)
    median = compare(train_cifar.parse_args(["--smoke", "--arch", flags.arch, "--batch-size",
                                             str(flags.batch_size), "--dra-weight", "0",
                                             "--device", flags.device]), flags.rounds)
    print(f"{flags.arch}, batch {flags.batch_size}, median of {flags.rounds} steps in turns:",
          ", ".join(f"{name} {value:.3f} s ({median['ours'] / value:.3f})" for name, value in median.items()))


if __name__ == "__main__":
    main()
