"""What does an attack do to one image, and what does adversarial training change? A figure for a colleague.

    python experiments/show_attack.py standard=runs/standard/best.pt AT+DRA=runs/dra/best.pt --data-dir data
    python experiments/show_attack.py runs/dra/best.pt --images my_photos --out mine.png

For each network f and image x, the figure has x, an attacked image x', and the difference of the two:

    x' is found by PGD (eq. 2 of arXiv 2602.19931): it starts at x + U(-eps, eps), and in each step
    x' <- x' + (eps / 4) sign(gradient of CE(f(x'), y)), brought back to |x' - x| <= eps and to [0, 1]

    shown as the difference: 1/2 + a (x' - x). Grey is no change. a is said above each column: 10 for
    eps = 8/255, and always such that a change by eps is about a third of the way from black to white

Below x and x' stands the class that f finds likeliest, and its probability (softmax). A green tick says that
it is the true class y, a red cross that it is not. To us both images show the same thing. After standard
training, a network takes nearly every x' for something else and may be sure of it; the difference is fine
stripes and specks. With adversarial training fewer images are lost, the network is less sure of anything, and
the difference follows the shapes in the image. Each network is attacked by its own gradient (white box), so
each has its own x'; all start from the same noise.

assets/attack.png is the first command for two small networks of ours, with the default seed (10 s on a CPU).
Both are WRN-10-2, trained on 10,000 images of CIFAR-10 (--batch-size 64 --lr 0.1): 8 epochs without attack,
and 12 epochs of AT+DRA with --attack-steps 5. Of 500 test images the first gets 62.2 % right and 0.0 % when
attacked, with a mean probability of 91 % for the wrong class; AT+DRA 52.6 % and 25.8 %, with 31 % (one seed).

A few images prove nothing, and a tick only says that this attack failed. How robust a network is, AutoAttack
says (eval_autoattack.py, on the whole test set).

--images takes a folder of PNG or JPEG files in the networks' size: 32 x 32 for CIFAR and npz data. There is
no true class then. The attack goes against the class that the network predicts for x, and the signs say
whether x' keeps it. The first --n files are shown, sorted by name.

chosen (the paper shows no such figure): the cross-entropy. Unlike the margin loss of train_cifar.py it goes
on once the class has changed, so one sees how sure of a wrong class a network can be made. RobustBench's eps;
20 steps; the images, drawn with --seed from all test images, whether classified rightly or not. ImageNet's
are the first of --image-list, as not all would fit into memory.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, for the imports below
from eval_autoattack import BENCHMARKS, InputError, load_classifier, load_images
from train_cifar import DEVICE, count, flag_type, generator, pgd, whole, write_atomically

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIGNS = {True: ("\u2713", "#1a7f37"), False: ("\u2717", "#cf222e")}  # a tick in green, a cross in red
FEW = 5  # images, if --n is not given


def checkpoint(text):
    """A type for argparse: NAME=a.pt -> (NAME, a.pt). Without a name, the end of the path is the name."""
    name, _, path = text.partition("=")
    named = path and not Path(text).exists()  # a folder's name may have a "=" too
    return (name, path) if named else ("/".join(Path(text).parts[-2:]), text)


def parse_args(argv=None):
    """Command line -> Namespace. A flag that cannot be used ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=checkpoint, metavar="[NAME=]FILE",
        help="a checkpoint, any that eval_autoattack.py takes; NAME is its title")
    for flag in ("--arch", "--dataset", "--script"):
        add(flag, help="of all checkpoints, as in eval_autoattack.py; if not given, what the files say")
    add("--weights", choices=["averaged", "raw"], default="averaged", help="which of a checkpoint's two sets")
    add("--data-dir", default="data", help="test images, as in eval_autoattack.py")
    add("--image-list", help="ImageNet: a file with paths, the first are shown; if not given, of one class")
    add("--images", metavar="FOLDER", help="PNG or JPEG files of your own instead, in the networks' size")
    add("--n", type=count, help=f"how many images; if not given, {FEW}, or as many as there are")
    radius = flag_type("a number above 0 and below 1, such as 8/255", float, lambda x: 0 < x < 1)
    add("--eps", type=radius, help="largest change of a pixel in [0, 1]; if not given, RobustBench's")
    add("--steps", type=count, default=20, help="of the attack (chosen)")
    add("--seed", type=whole, default=0, help="of the choice of images and of the attack's start")
    add("--device", choices=sorted({"cpu", DEVICE}), default=DEVICE, help="where to compute")
    add("--out", default="attack.png", help="the figure, a PNG file")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# Which networks, and which images.


def load_networks(args):
    """[(name, frozen classifier)] of all checkpoints, on the device. Raises InputError where they have been
    trained on different data, as all are shown the same images, and OSError."""
    networks, data = [], {}
    for name, path in args.checkpoints:
        model = load_classifier(path, args.arch, args.dataset, args.script, args.weights)
        about = model.info.args
        data[path] = model.info.dataset, model.info.num_classes, about.get("image_size"), about.get("smoke")
        networks.append((name, model.to(args.device)))
    if len(set(data.values())) > 1:
        raise InputError(f"expected checkpoints of the same data, classes and image size, got {data}")
    return networks


def read_files(args, info):
    """The first files in --images: float32 [n, 3, size, size] in [0, 1], no labels (None), and a name for
    each. info: of a classifier. Raises InputError, and OSError where something cannot be read."""
    size = info.args.get("image_size", 224) if info.dataset == "imagenet" else 32
    paths = sorted(path for path in Path(args.images).iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
    if len(paths) < (args.n or 1):
        raise InputError(f"{args.images}: has {len(paths)} PNG or JPEG files, expected {args.n or 'some'}")
    images = [to_tensor(default_loader(path)) for path in paths[:args.n or FEW]]
    for path, image in zip(paths, images):
        if image.shape[1:] != (size, size):  # resized, it would be another kind of image to the network
            raise InputError(f"{path}: is {image.shape[2]} x {image.shape[1]} px, expected {size} x {size}")
    return torch.stack(images), None, [path.stem[-16:] for path in paths[:len(images)]]


def draw_images(args, info):
    """Test images float32 [n, 3, H, W] in [0, 1], labels int64 [n], and their names. info: of a classifier.
    Raises InputError and OSError."""
    n = args.n or FEW
    source = argparse.Namespace(data_dir=args.data_dir, image_list=args.image_list,
                                n=n if info.dataset == "imagenet" else None)  # None: all, to draw from
    images, labels = load_images(source, info)
    if len(images) < (args.n or 1):
        raise InputError(f"{args.data_dir}: has {len(images)} test images, fewer than --n {args.n}")
    drawn = torch.randperm(len(images), generator=generator(args.seed, 0, "test images"))[:n]
    return images[drawn], labels[drawn], [class_name(info, label) for label in labels[drawn]]


def class_name(info, number):
    """What to call a class of a classifier with this info."""
    named = info.dataset == "cifar10" and not info.args.get("smoke")  # the classes of a smoke run are waves
    return CIFAR10[number] if named else f"class {number}"


# ------------------------------------------------------------------------------------------------------------
# The attack, and the figure of it.


def attack(model, images, labels, args):
    """Attack images [n, 3, H, W] in [0, 1] of classes labels [n]; if None, of the classes predicted for them.

    Returns x' like images, and three tensors [2, n], first for the images, then for x': the class predicted,
    its probability, and whether it is the class that is attacked. All are on the CPU.
    """
    x = images.to(args.device)
    y = model(x).argmax(dim=1) if labels is None else labels.to(args.device)
    uniform = [torch.rand(x[0].shape, generator=generator(args.seed, i, "attack")) for i in range(len(x))]
    start = (x + args.eps * (2 * torch.stack(uniform).to(args.device) - 1)).clamp(0, 1)
    # Where the network is sure, p(y) rounds to 1 in float32, and the logit of y drops out of the gradient.
    loss = lambda adv: F.cross_entropy(model(adv).double(), y, reduction="sum")
    adv = pgd(loss, x, start, args.eps, args.eps / 4, args.steps)
    probability, predicted = torch.stack([model(x), model(adv)]).softmax(dim=2).max(dim=2)
    return [part.cpu() for part in (adv, predicted, probability, predicted == y)]


def draw_network(figure, title, images, result, rows, info, args):
    """A network's part of the figure: a row for each image, with its text from `rows`; x, x' and difference.

    images [n, 3, H, W] in [0, 1]; result: what `attack` gives for them; info: of the classifier."""
    adv, predicted, probability, right = result
    factor = max(1, round(0.32 / args.eps))  # so that eps is about a third of the way from black to white
    pictures = [images, adv, (0.5 + factor * (adv - images)).clamp(0, 1)]
    figure.suptitle(title, fontsize=10, weight="bold")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for j, head in enumerate(("clean", "attacked", f"difference \u00d7 {factor}")):
        axes[0, j].set_title(head, fontsize=9)
        for i, axis in enumerate(axes[:, j]):
            axis.imshow(pictures[j][i].permute(1, 2, 0).numpy(), interpolation="nearest")  # pixels as squares
            axis.set(xticks=[], yticks=[], ylabel="" if j else rows[i])
            if j < 2:
                # Of one's own image, the class predicted for x is the one attacked, whether right or wrong.
                sign, color = SIGNS[bool(right[j, i])] if j or not args.images else ("", "black")
                text = f"{sign} {class_name(info, predicted[j, i])} {100 * probability[j, i]:.0f} %"
                axis.set_xlabel(text, color=color, fontsize=9)


def main(argv=None):
    """The command line. Raises InputError and OSError."""
    args = parse_args(argv)
    networks = load_networks(args)
    info = networks[0][1].info
    args.eps = args.eps or BENCHMARKS[info.dataset].eps
    images, labels, rows = read_files(args, info) if args.images else draw_images(args, info)
    # An image is about 1.3 inches wide. Where it has many pixels, each still needs one of the figure.
    n, dpi = len(images), max(100, 0.8 * images.shape[3])
    figure = Figure(figsize=(4.5 * len(networks), 1 + 1.55 * n), dpi=dpi, layout="constrained")
    tick, cross = ("kept", "changed") if args.images else ("right", "wrong")
    figure.suptitle(f"PGD-{args.steps} within eps = {255 * args.eps:g}/255\n"
                    f"below: predicted class (\u2713 {tick}, \u2717 {cross}) and its probability", fontsize=9)
    parts = figure.subfigures(1, len(networks), wspace=0.04, squeeze=False)[0]
    for part, (name, model) in zip(parts, networks):
        result = attack(model, images, labels, args)
        clean, attacked = result[-1].sum(dim=1).tolist()
        verdict = f"{tick}: " + f"{clean} of {n} clean, " * (not args.images) + f"{attacked} of {n} attacked"
        draw_network(part, f"{name}\n{verdict}", images, result, rows, info, args)
        print(f"{name} ({model.info.arch}, step {model.info.step}): {verdict}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(args.out), lambda file: figure.savefig(file, format="png"))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
