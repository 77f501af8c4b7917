"""Is it the diffusion model that helps, and would its encoder not do alone? Ablations of arXiv 2602.19931.

    python experiments/ablate_teacher.py noisy-classifier [flags of train_cifar.py]
    python experiments/ablate_teacher.py finetune-encoder [flags of train_cifar.py]

The paper aligns a classifier with the features of a diffusion model's encoder. Two simpler explanations of
why that helps, or simpler ways to the same end, have to be ruled out (section 5.6, appendix E).

noisy-classifier: perhaps any network that has learned to see through noise would do as a teacher. So take the
diffusion encoder's architecture with random weights, and train it to classify images with the same noise that
the teacher is shown. Then let it be the teacher in place of the diffusion model:

    python experiments/ablate_teacher.py noisy-classifier --out runs/noisy
    python train_cifar.py --teacher runs/noisy/teacher.pt ...      # the same --teacher-sigma, --teacher-layer

    WRN-28-10 with a million synthetic images, AutoAttack (the paper's numbers)
      DM-AT+DRA, aligned with the diffusion model       64.12 %
      DM-AT, not aligned                                63.35 %
      DM-AT+DRA, aligned with the noisy classifier      62.62 %

The two teachers know classes equally well (the command prints both accuracies), so it is having learned to
generate images that makes the difference, not the noise.

finetune-encoder: why train another network to resemble the diffusion encoder, and not make that one robust?
So put a linear layer on it and train both adversarially, from the diffusion model's weights, like any other
classifier (TRADES, nothing to align with). AutoAttack then judges the checkpoint through this script:

    python experiments/ablate_teacher.py finetune-encoder --out runs/finetuned
    python eval_autoattack.py runs/finetuned/best.pt --script experiments/ablate_teacher.py

The paper: 87.77 % clean and 55.76 % AutoAttack, above its WRN-34-10 with AT and below AT+DRA (88.54 / 57.29),
at 1.35 times the training time per epoch. And a class-conditional encoder, which DRA tells the true label of
each training image, can be told none here, since at test time there is none to tell.

How it is done: train_cifar.py runs as it is, with a few of its functions replaced by those below. So all of
its flags but a few work here, and so do --smoke, continuing after a kill, and torchrun. The paper states no
recipe for either; both get train_cifar.py's (chosen), with a learning rate for training from scratch.
"""
import argparse
import functools
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
import train_cifar
from edm_encoder import EDMEncoder
from train_cifar import (Classifier, InputError, build_run, generator, load_teacher, parse_args,
                         save_atomically, train_step)

# ------------------------------------------------------------------------------------------------------------
# What each ablation decides by itself. These flags of train_cifar.py are refused.

ALWAYS = {
    "arch": "read off the teacher's file",
    "teacher_unconditional": True,  # the label is what they have to find out
    "extra_sigma": False,
    "dra_weight": 1.0,  # until `take_encoder` has loaded what this would be the weight of
}
DECIDED = {  # cross-entropy and no adversary for the noisy classifier
    "noisy-classifier": ALWAYS | {"eps": 0.0, "attack_steps": 0, "step_size": 0.0, "beta": 0.0},
    "finetune-encoder": ALWAYS,
}
# Other defaults for --smoke: here it is the larger network that gets attacked.
SMOKE = {"noisy-classifier": {}, "finetune-encoder": {"epochs": 4, "attack_steps": 4, "eval_every": 4}}


# ------------------------------------------------------------------------------------------------------------
# Model: the diffusion model's encoder as a classifier.


class EncoderClassifier(Classifier):
    """EDM's encoder, trainable, with a linear layer on its pooled features: images in [0, 1] -> logits.

    The encoder has to be told a noise level, and it is always `sigma`. But no noise is added in here. Noise
    would make the classifier random: an attacker's gradient would belong to other noise than the one that
    judges, and the network would look more robust than it is (Athalye et al. 2018). Without it the classifier
    is a plain function of the image, in training, under attack and in use. That a clean image comes with the
    announcement of noise is new to the encoder, but it is trained on nothing else.

    It takes no label (that part of its embedding is zero). **arguments: EDMEncoder's.
    """

    def __init__(self, num_classes, sigma, **arguments):
        super().__init__()
        self.sigma = sigma
        self.encoder = EDMEncoder(**arguments).requires_grad_(True)
        self.head = nn.Linear(self.encoder.width, num_classes)

    def features(self, images):
        """images [B, 3, 32, 32] in [0, 1] -> penultimate features [B, width], float32. In place of a data
        set's mean and deviation, the encoder normalises as EDM does."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return self.encoder(images, None, self.sigma, torch.zeros_like(images))


def build_model(arch, num_classes, dataset="cifar10"):
    """The classifier of a checkpoint, for eval_autoattack.py, with random weights (torch's default).

    arch: JSON, as `take_encoder` writes it, so that a checkpoint needs no other file to be read. dataset is
    of no matter here. Raises InputError for any other arch.
    """
    try:
        return EncoderClassifier(num_classes, **json.loads(arch))
    except Exception:  # a checkpoint may hold anything
        raise InputError(f"--arch {ascii(arch)[:60]}: expected the arch in a checkpoint of "
                         "experiments/ablate_teacher.py") from None


def take_encoder(ablation, args, device):
    """In place of train_cifar.py's `load_teacher`: the teacher becomes the classifier.

    Sets args.arch, and how train_cifar.py builds its model. Returns None, as there is nothing to align with.
    Raises InputError where `load_teacher` does.
    """
    teacher = load_teacher(args, torch.device("cpu"))
    arguments = {"layer": teacher.layer, "sigma": args.teacher_sigma, **teacher.arguments}
    if ablation == "noisy-classifier":
        arguments["label_dim"] = 0  # also for its later life as a teacher: it has never seen a label
    else:
        args.dra_weight = 0.0  # not so for the noisy classifier: with a weight, batches bring the noise
    args.arch = json.dumps(arguments)

    def build(arch, num_classes, dataset):
        model = build_model(arch, num_classes, dataset)
        if ablation == "finetune-encoder":
            model.encoder.load_state_dict(teacher.state_dict())
        return model
    train_cifar.build_model = build


# ------------------------------------------------------------------------------------------------------------
# noisy-classifier: what it sees in training and in evaluation, and how it compares.


def noisy_step(model, averaged, projectors, teacher, optimizer, batch, ema_decay, args):
    """In place of `train_step`: the same step, on images with the noise that the teacher would have got for
    this batch, fresh in every step. sigma is for images in [-1, 1], so for [0, 1] it is half."""
    [(sigma, noise)] = batch.teacher_noise
    batch.images = batch.images + sigma / 2 * noise  # 2 * this - 1 is EDM's x_t
    return train_step(model, averaged, projectors, teacher, optimizer, batch, ema_decay, args)


@torch.no_grad()
def noisy_features(encoder, source, args):
    """Features [N, width] of source = (images uint8 [N, 32, 32, 3], labels) with noise, without labels. The
    noise is the same at each call, or one would compare networks by their luck."""
    device, features = next(encoder.parameters()).device, []
    for number, images in enumerate(torch.from_numpy(source[0]).split(256)):
        images = images.to(device).permute(0, 3, 1, 2).float() / 255  # [256, 3, 32, 32] in [0, 1]
        noise = torch.randn(images.shape, generator=generator(args.seed, number, "noise", device),
                            device=device)
        features.append(encoder(images, None, args.teacher_sigma, noise))
    return torch.cat(features)


def noisy_accuracy(encoder, head, source, args):
    """Percent of noisy images, see `noisy_features`, that the linear layer `head` puts into their class."""
    with torch.no_grad():
        predicted = head(noisy_features(encoder, source, args)).argmax(dim=1).cpu()
    return 100 * (predicted == torch.from_numpy(source[1])).float().mean().item()


def evaluate_noisy(model, source, loss, steps, args):
    """In place of `evaluate`. Nothing attacks, so clean and robust accuracy are the same."""
    return (noisy_accuracy(model.encoder, model.head, source, args),) * 2


def compare_and_save(args, data, out):
    """In place of `print_table`: accuracies of the noisy classifier and of the diffusion model's features,
    on the same noisy test images, and the file for train_cifar.py's --teacher.

    The diffusion model has no head, so it gets a linear one, fitted to the training images. It is frozen, and
    the noisy classifier is not, so the comparison is of what a linear layer finds in their features.
    """
    from analyze_representations import linear_probe  # only here: it needs matplotlib
    classifier = build_run(args, data.device, None)[1]
    saved = torch.load(out / "best.pt", map_location="cpu", weights_only=True)
    classifier.load_state_dict(saved["model_state_dict"])
    teacher = load_teacher(args, data.device)
    train_labels = torch.from_numpy(data.parts[0][1]).long().to(data.device)
    probe = linear_probe(noisy_features(teacher, data.parts[0], args), train_labels, saved["num_classes"])
    print(f"\n{len(data.test[1])} test images with noise of sigma {args.teacher_sigma:g}{'accuracy':>26}")
    for name, encoder, head in (("noisy classifier, best.pt", classifier.encoder, classifier.head),
                                ("linear probe on the diffusion model's features", teacher, probe)):
        print(f"  {name:55} {noisy_accuracy(encoder, head, data.test, args):6.2f} %", flush=True)
    network = classifier.encoder.cpu()
    save_atomically({"edm_arguments": network.arguments, "model_state_dict": network.model.state_dict()},
                    out / "teacher.pt")
    print(f"To align with it: python train_cifar.py --dataset {args.dataset} --teacher {out / 'teacher.pt'} "
          f"--teacher-layer {args.teacher_layer} --teacher-sigma {args.teacher_sigma:g}")


# ------------------------------------------------------------------------------------------------------------
# The run: train_cifar.py's.


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("ablation", choices=list(DECIDED), help="see above")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of train_cifar.py; --help lists them")
    own = parser.parse_args(argv)
    decided = DECIDED[own.ablation]
    for name in decided:
        flag = f"--{name.replace('_', '-')}"
        if flag in [text.split("=")[0] for text in own.flags]:
            parser.error(f"{flag}: expected none, {own.ablation} decides it")

    def parse(argv):
        args = parse_args(argv)
        vars(args).update(decided)
        return args
    smoke = "--smoke" in own.flags
    replaced = {"parse_args": parse, "load_teacher": functools.partial(take_encoder, own.ablation),
                "build_model": None,  # by `take_encoder`
                "SMOKE": train_cifar.SMOKE | SMOKE[own.ablation]}
    if own.ablation == "noisy-classifier":
        replaced |= {"train_step": noisy_step, "evaluate": evaluate_noisy, "print_table": compare_and_save}
    # train_cifar.py looks its functions up by name when it runs. Afterwards it has its own again.
    with mock.patch.multiple(train_cifar, **replaced):
        train_cifar.main(["--out", f"runs/{'smoke-' * smoke}{own.ablation}", *own.flags])


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
