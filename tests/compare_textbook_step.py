"""Run by hand: time our training step beside a plain textbook TRADES step, on the CPU, in turns.

    python tests/compare_textbook_step.py [--arch wrn-16-2] [--batch-size 64] [--rounds 8]

The textbook step is TRADES as anyone would write it down (arXiv 1901.08573, with DM-AT's settings): no alignment, no weight averaging,
no care for memory layout or for gradients that nobody needs. Ours has the averaging in it.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
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


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default="wrn-16-2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    flags = parser.parse_args()
    torch.set_num_threads(2)
    args = train_cifar.parse_args(["--smoke", "--arch", flags.arch, "--batch-size", str(flags.batch_size), "--dra-weight", "0"])
    data = train_cifar.Data(args, torch.device("cpu"))
    run = train_cifar.build_run(args, torch.device("cpu"), None)
    textbook = train_cifar.build_model(flags.arch, 10)
    optimizer = torch.optim.SGD(textbook.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    seconds = {"ours": [], "textbook": []}
    for step in range(flags.rounds + 1):
        batch = data.batch(step)
        started = time.perf_counter()
        train_cifar.train_step(*run[:3], None, run[3], batch, 0.9, args)
        between = time.perf_counter()
        textbook_step(textbook, optimizer, batch.images, batch.labels)
        seconds["ours"].append(between - started)
        seconds["textbook"].append(time.perf_counter() - between)
    median = {name: sorted(values[1:])[flags.rounds // 2] for name, values in seconds.items()}  # the first round warms up
    print(f"{flags.arch}, batch {flags.batch_size}, median of {flags.rounds} steps in turns: ours {median['ours']:.3f} s, textbook {median['textbook']:.3f} s, "
          f"ratio {median['ours'] / median['textbook']:.3f}")


if __name__ == "__main__":
    main()
