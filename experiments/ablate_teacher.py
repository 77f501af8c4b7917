"""Does it have to be a diffusion model, and does it have to be a teacher? Two ablations of arXiv 2602.19931.

    python experiments/ablate_teacher.py noisy-classifier [flags of train_cifar.py]
    python experiments/ablate_teacher.py finetune-encoder [flags of train_cifar.py]

The paper aligns a classifier with features of a diffusion model's encoder. Two simpler ideas have to be ruled
out (section 5.6 and appendix E).

noisy-classifier: perhaps any network that has learned to see through noise would do as a teacher. So the
diffusion model's encoder is trained from random weights, to classify the noisy images x_t that the teacher is
shown (cross-entropy, no attack). Then it is the teacher in place of the diffusion model:

    python experiments/ablate_teacher.py noisy-classifier --out runs/noisy
    python train_cifar.py --teacher runs/noisy/teacher.pt --out runs/aligned-with-noisy
    python eval_autoattack.py runs/aligned-with-noisy/best.pt

    WRN-28-10 with a million synthetic images, AutoAttack (the paper's numbers)
      DM-AT+DRA, aligned with the diffusion model       64.12 %
      DM-AT, not aligned                                63.35 %
      DM-AT+DRA, aligned with the noisy classifier      62.62 %

Appendix E adds that the noisy classifier is about as accurate as a linear probe on the diffusion model's
features; the command prints both accuracies. So the noise is not what helps: the diffusion model has learned
to generate images, and that makes the difference.

finetune-encoder: why train another network to resemble the diffusion model's encoder, and not make the
encoder itself robust? So it gets a linear layer, and both are trained adversarially as any other classifier,
from the diffusion model's weights (TRADES, no alignment):

    python experiments/ablate_teacher.py finetune-encoder --out runs/finetuned
    python eval_autoattack.py runs/finetuned/best.pt --script experiments/ablate_teacher.py

The paper: 87.77 % clean and 55.76 % AutoAttack. That is better than its WRN-34-10 with AT (84.33 / 55.25) and
worse than the one with AT+DRA (88.54 / 57.29), at 1.35 times the training time per epoch. Counted in FLOP, as
README.md's rows are, a forward of the encoder is 1.06 times one of WRN-34-10 (14.1 and 13.3 GFLOP). Besides,
DRA tells the diffusion model the label of each training image. A classifier can be told none.

The paper states no recipe for either, so both have train_cifar.py's (chosen). finetune-encoder is a run of
train_cifar.py with another network. noisy-classifier has a short loop of its own, on one GPU or CPU; it saves
after each epoch, and the same command continues it.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
import train_cifar
from edm_encoder import EDMEncoder
from train_cifar import (WARMUP, Classifier, Data, InputError, averaging_decay, build_run, compile_parts,
                         generator, load_real, load_teacher, lock, parse_args, print_plan, recipe,
                         reduce_recent, resume, save, update_average, write_atomically, write_log)

# ------------------------------------------------------------------------------------------------------------
# Settings.

PROBE_DECAY = 1e-3  # weight of the linear probe's squared weights, on standardised features (chosen)
# Flags of train_cifar.py that an ablation sets itself or has no use for. They are refused.
ALWAYS = ["--arch", "--dra-weight", "--extra-sigma", "--teacher-unconditional"]
UNUSED = "--beta --eps --step-size --attack-steps --accumulate --max-norm --eval-every --save-minutes".split()
REFUSED = {"finetune-encoder": ALWAYS, "noisy-classifier": ALWAYS + UNUSED}
# Other defaults for --smoke: the encoder is larger than the network that train_cifar.py's are made for.
SMOKE = {"finetune-encoder": ["--lr", "0.02", "--epochs", "3", "--attack-steps", "2"],
         "noisy-classifier": ["--lr", "0.02"]}


# ------------------------------------------------------------------------------------------------------------
# Model: the diffusion model's encoder as a classifier.


class EncoderClassifier(Classifier):
    """EDM's encoder, trainable, with a linear layer on its pooled features: images in [0, 1] -> logits.

    The encoder has to be told a noise level. It is told `sigma`, the teacher's, at all times. But as a
    classifier it adds no noise: that would make it random, and a random network looks more robust than it is
    (Athalye et al. 2018), since an attack follows the gradient for one noise and is judged with another. A
    clean image at this noise level is new to the diffusion model's weights. Training gets them used to it.

    It is given no label, so that part of its embedding is zero. **arguments: EDMEncoder's.
    """

    def __init__(self, num_classes, sigma, **arguments):
        super().__init__()
        self.sigma = sigma
        self.encoder = EDMEncoder(**arguments).requires_grad_(True)
        self.head = nn.Linear(self.encoder.width, num_classes)

    def features(self, images, noise=None):
        """images [B, 3, 32, 32] in [0, 1] -> penultimate features [B, width], float32. noise: N(0, 1) like
        images, none for a classifier in use. The encoder normalises as EDM does."""
        noise = torch.zeros_like(images) if noise is None else noise
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return self.encoder(images, None, self.sigma, noise)


def build_model(arch, num_classes, dataset="cifar10"):
    """The classifier with random weights (torch's default), for training and for eval_autoattack.py.

    arch: the arguments of EncoderClassifier but for num_classes, as JSON. A checkpoint holds this text, so
    that the network can be built again without the teacher's file. dataset is of no matter here: the
    encoder has its own normalisation. Raises InputError for another arch.
    """
    try:
        return EncoderClassifier(num_classes, **json.loads(arch))
    except Exception:  # a checkpoint may hold anything
        raise InputError(f"--arch {ascii(arch)[:60]}: expected the arch in a checkpoint of "
                         "experiments/ablate_teacher.py") from None


# ------------------------------------------------------------------------------------------------------------
# noisy-classifier: a step of its training, and the comparison with the diffusion model.


def noisy_step(run, batch, ema_decay, args):
    """One step on the noisy images that the teacher would be shown for this batch. run: of `build_run`;
    batch: of `Data.batch`. Returns loss and percent of right answers, [2], on the device."""
    [(_, noise)] = batch.teacher_noise  # fresh in every step; its level is the model's own sigma
    logits = run.model.head(run.model.features(batch.images, noise))
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=args.label_smoothing)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.optimizer.step()
    update_average(run.averaged, run.model, ema_decay)
    return torch.stack([loss.detach(), 100 * (logits.argmax(1) == batch.labels).float().mean()])


@torch.no_grad()
def noisy_features(encoder, images, args):
    """Features [N, width] of images uint8 [N, 32, 32, 3] with noise, without labels. The noise is the same at
    each call: networks should not differ by their luck."""
    device, features = next(encoder.parameters()).device, []
    for number, piece in enumerate(torch.from_numpy(images).split(256)):
        piece = piece.to(device).permute(0, 3, 1, 2).float() / 255  # [256, 3, 32, 32] in [0, 1]
        random = generator(args.seed, number, "noise", device)
        noise = torch.randn(piece.shape, generator=random, device=device)
        features.append(encoder(piece, None, args.teacher_sigma, noise))
    return torch.cat(features)


def linear_probe(features, labels, classes):
    """What can be read off frozen features linearly: features [N, D], labels [N] -> a function from features
    to logits. It minimises CE + PROBE_DECAY / 2 |W|^2 by L-BFGS, on standardised features: otherwise the
    penalty would depend on their scale."""
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)  # one may be constant
    probe = nn.Linear(features.shape[1], classes).to(features.device)
    nn.init.zeros_(probe.weight)
    logits = lambda x: probe((x - mean) / deviation)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(features), labels) + PROBE_DECAY / 2 * probe.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(objective)
    return logits


@torch.no_grad()
def accuracy(head, features, labels):
    """Percent of features [N, D] that `head` puts into the class in labels [N], a numpy array."""
    return 100 * (head(features).argmax(1).cpu() == torch.from_numpy(labels)).float().mean().item()


def compare(args, data, classifier, teacher):
    """Print the accuracies of the noisy classifier, and of a linear probe on the diffusion model's features,
    on the same noisy test images. The probe is fitted to the real training images, and the diffusion model is
    frozen, so its network has never learned to classify."""
    (images, labels), (test_images, test_labels) = data.parts[0], load_real(args, "test")
    classes, labels = data.classes, torch.from_numpy(labels).to(data.device)
    probe = linear_probe(noisy_features(teacher, images, args), labels, classes)
    print(f"accuracy on {len(test_labels)} test images with noise of sigma {args.teacher_sigma:g}:")
    for name, encoder, head in (("noisy classifier", classifier.encoder, classifier.head),
                                ("linear probe on the diffusion model", teacher, probe)):
        right = accuracy(head, noisy_features(encoder, test_images, args), test_labels)
        print(f"  {name:36} {right:6.2f} %", flush=True)


# ------------------------------------------------------------------------------------------------------------
# The two runs.


def finetune_encoder(flags, teacher):
    """train_cifar.py's run with the encoder and a linear layer, from the teacher's weights, unaligned."""
    def build(arch, num_classes, dataset):
        model = build_model(arch, num_classes, dataset)
        model.encoder.load_state_dict(teacher.state_dict())
        return model
    train_cifar.main([*flags, "--dra-weight", "0"], build_model=build)


def train_noisy_classifier(args, data, run, out, total_steps):
    """Train `run` up to `total_steps`, from last.pt in `out` or from scratch. It is saved after each epoch.
    Raises InputError and FloatingPointError as in train_cifar.py."""
    about = {"args": vars(args), "recipe": recipe(args, data), "arch": args.arch, "dataset": args.dataset,
             "num_classes": data.classes}
    resume(out, about, run)
    save(out, about, run)
    compile_parts(args, run.model)
    first_step, started = run.step, time.time()
    for step in range(first_step, total_steps):
        ema_decay = averaging_decay(step, int(WARMUP * total_steps), args.ema_decay)
        run.recent.append(noisy_step(run, data.batch(step), ema_decay, args))
        run.step = step + 1
        if run.step < total_steps and run.step % data.steps_per_epoch:
            continue
        reduce_recent(run, ["loss", "train_noisy"], data.world)  # stops where one of them is not finite
        loss, train_noisy = torch.stack(run.recent).mean(dim=0).tolist()
        run.log.append({"step": run.step, "epoch": run.step / data.steps_per_epoch, "loss": loss,
                        "train_noisy": train_noisy, "lr": run.optimizer.param_groups[0]["lr"]})
        run.recent = []
        if run.step < total_steps:
            run.scheduler.step()
        minutes_left = (total_steps - run.step) * (time.time() - started) / (run.step - first_step) / 60
        write_log(out / "log.csv", run.log, minutes_left)
        save(out, about, run)


def noisy_classifier(args, teacher):
    """Train the teacher's architecture on noisy images, compare the two, and write teacher.pt."""
    data = Data(args, torch.device(args.device))
    total_steps = args.max_steps or args.epochs * data.steps_per_epoch
    run = build_run(args, data, None, total_steps, build_model)
    print_plan(args, data, None, total_steps)
    if args.dry_run:
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        train_noisy_classifier(args, data, run, out, total_steps)
        compare(args, data, run.averaged, teacher.to(data.device))
        network = run.averaged.encoder.cpu()
        content = {"edm_arguments": network.arguments, "model_state_dict": network.model.state_dict()}
        write_atomically(out / "teacher.pt", lambda file: torch.save(content, file))
    print(f"the teacher: python train_cifar.py --dataset {args.dataset} --teacher {out / 'teacher.pt'}",
          f"--teacher-layer {args.teacher_layer} --teacher-sigma {args.teacher_sigma:g}")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(usage="%(prog)s ABLATION [flags of train_cifar.py] (--help lists them)",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("ablation", choices=list(REFUSED), help="see the top of this file")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of train_cifar.py")
    own = parser.parse_args(argv)
    for flag in own.flags:
        if flag.split("=")[0] in REFUSED[own.ablation]:
            parser.error(f"{flag}: not with {own.ablation}")
    smoke = "--smoke" in own.flags
    flags = [*(SMOKE[own.ablation] if smoke else []), "--out", f"runs/{'smoke-' * smoke}{own.ablation}",
             *own.flags, "--teacher-unconditional"]  # the label is what both have to find out
    args = parse_args(flags)
    teacher = load_teacher(args)
    network = {"layer": teacher.layer, "sigma": args.teacher_sigma, **teacher.arguments}
    if own.ablation == "finetune-encoder":
        finetune_encoder([*flags, "--arch", json.dumps(network)], teacher)
    else:  # also as a teacher it will take no label, as it was never given one
        noisy_classifier(parse_args([*flags, "--arch", json.dumps(network | {"label_dim": 0})]), teacher)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
