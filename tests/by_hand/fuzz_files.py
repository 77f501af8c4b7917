"""Shows that a damaged file is read, or refused with one line, and never run. 15 minutes.

    python tests/by_hand/fuzz_files.py [--cases 10000] [--seed 0] [--only KIND [--case NUMBER]]

Of each kind of file that a script reads, a case changes bytes, cuts, doubles or zeroes a part, or puts in a
call that a pickle would make; in a zip file (.pt, .npz) often within a member, so that the checksums are
right. The script has to take the file, or to end with one line: InputError, or what else its `main` turns
into one. It may not do what a pickle says, nor take over 20 s or over 4 GB. The exit code is 1 where it does;
--only and --case repeat such a case. Small files are made on the spot. Needs neither network nor GPU.
"""
import argparse
import collections
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import CPU, DIT, DMAT, EDM, FIXTURES, ROOT, STATS, VAE, write_npz
import compare_methods
import dimensions
import dit_encoder
import edm_encoder
import eval_autoattack
import features
import frequency
import generate_imagenet
import large_channels
import plot_runs
import probe_teacher
import show_attack
import sparse_autoencoder
import train_cifar
import train_edm
import train_imagenet

SECONDS, MEMORY = 20, 4 << 30  # for each case
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect",
        "pickle.find_class")  # the last one: by Python's own loader, which none of the scripts uses
CALL = b"cos\nsystem\n(S'true'\ntR0"  # in a pickle: call os.system("true"), and forget the result
TOKENS = [b"", b"nan", b"-1", b"0", b"1e999", b",", b"\n", b'"', b"\0", b"\xff", b"9" * 30, b"x" * 20_000,
          b"[]"]  # no longer: over a name of 200,000 letters torch.load takes minutes to refuse


def mutate(content, rng):
    """Bytes, with one small or large part of them changed."""
    if content[:4] == b"PK\3\4" and rng.random() < 0.6:
        return mutate_member(content, rng)
    # Files say what they hold at their start or end.
    size = min(len(content), rng.choice((100, 2000, len(content))))
    begin = rng.randrange(size + 1) + rng.choice((0, len(content) - size))
    end = min(len(content), begin + int(2 ** rng.uniform(0, 16)))
    changed = bytearray(content)
    kind = rng.choice(("bytes", "bit", "cut", "cut off", "double", "zero", "call", "token"))
    if kind == "bytes":
        for at in rng.sample(range(begin, end), min(end - begin, rng.randint(1, 8))):
            changed[at] = rng.randrange(256)
    elif kind == "bit" and begin < len(content):
        changed[begin] ^= 1 << rng.randrange(8)
    elif kind == "cut off":
        del changed[begin:]
    else:
        put = {"cut": b"", "double": 2 * content[begin:end], "zero": bytes(end - begin), "call": CALL,
               "token": rng.choice(TOKENS), "bit": b""}  # the last: at the very end of a file
        changed[begin:begin if kind in ("call", "token") else end] = put[kind]
    return bytes(changed)


def mutate_member(content, rng):
    """The same inside of a zip file, whose checksums are then right."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        members = {name: source.read(name) for name in source.namelist()}
    # A member that says what the others hold, in half of the cases.
    some = [name for name in members if name.endswith("data.pkl")] if rng.random() < 0.5 else []
    name = rng.choice(some or list(members))
    members[name] = mutate(members[name], rng)
    with zipfile.ZipFile(target := io.BytesIO(), "w") as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    return target.getvalue()


# ------------------------------------------------------------------------------------------------------------
# The kinds of files: how to make small ones in a folder, and how a script reads them there.

CIFAR = SimpleNamespace(dataset="cifar10", args={})
SAMPLE = [FIXTURES / f"dit_sample_{name}.pt" for name in ("dit", "vae", "latents_stats")]


def copy(*files):
    """How to make copies of files."""
    return lambda folder: [shutil.copy(file, folder) for file in files]


def make_classifiers(folder):
    shutil.copy(DMAT, folder / "dmat.pt")
    for name, model in (("npz", train_cifar.build_model("wrn-10-1", 10)),
                        ("imagenet", train_imagenet.build_model("test_vit", 10, False))):
        about = {"arch": "wrn-10-1" if name == "npz" else "test_vit", "dataset": name, "num_classes": 10,
                 "mean": [0.5] * 3, "std": [0.2] * 3, "step": 1, "args": {"seed": 0}, "classes": ["a", "b"]}
        torch.save(about | {"model_state_dict": model.state_dict()}, folder / f"{name}.pt")


def read_classifiers(folder):
    eval_autoattack.load_classifier(folder / "dmat.pt", "wrn-10-1", "cifar10")
    for name in ("npz", "imagenet"):
        eval_autoattack.load_classifier(folder / f"{name}.pt")


@functools.cache
def run_of(script):
    """What `resume` of a training script takes: the settings, and a run of which one step is done."""
    if script is train_edm:
        args = script.parse_args(["--smoke"])
        return {"seed": "0", "lr": "0.001"}, script.build_run(args, CPU, 10)
    script.PROJECTOR_WIDTH, args = 4, script.parse_args(["--smoke"])
    classes = 10 if script is train_cifar else [str(i) for i in range(10)]
    data = SimpleNamespace(classes=classes, ends=[100], device=CPU, steps_per_epoch=9)
    run = script.build_run(args, data, SimpleNamespace(width=4))
    for parameter in [*run.model.parameters(), *run.projectors.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    run.step, run.log, run.recent = 1, [{"step": 1, "loss": 0.5}], [torch.ones(5)]
    run.best = {"step": 1, "score": 50.0, "model_state_dict": run.averaged.state_dict()}
    return {"recipe": script.recipe(args, data), "arch": args.arch}, run


def make_last(folder):
    for script in (train_cifar, train_imagenet):
        (folder / script.__name__).mkdir()
        script.save(folder / script.__name__, *run_of(script))
        (folder / script.__name__ / "best.pt").unlink()


def read_last(folder):
    for script in (train_cifar, train_imagenet):
        script.resume(folder / script.__name__, *run_of(script))


def make_edm(folder):
    train_edm.save(folder / "edm.pt", *run_of(train_edm))


def read_lightningdit(folder):
    dit_encoder.load_dit_encoder(*[folder / path.name for path in (DIT, VAE, STATS)], 2, (), None, None)


def read_generator(folder):
    generate_imagenet.load_generator(*[folder / path.name for path in SAMPLE], 2, 32)


def read_images(folder):
    images, labels = train_cifar.open_npz(folder / "train.npz")
    np.array(images)


def make_folders(folder):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i, name in enumerate(("a.jpg", "b.png", "c.jpg", "d.png")):
            path = folder / split / f"class{i // 2}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    (folder / "list.txt").write_text("val/class0/a.jpg 0\nclass1/c.jpg\n")


def read_folders(folder):
    images = train_imagenet.Folder(str(folder / "train"))
    for number in range(4):
        images.read(number, train_imagenet.to_pixels)
    eval_autoattack.load_imagenet(folder, folder / "list.txt", None, 2, 32)
    eval_autoattack.load_imagenet(folder, None, None, 2, 32)
    show_attack.read_files(SimpleNamespace(images=folder / "train" / "class0", n=2), CIFAR)
    encoder = SimpleNamespace(image_size=8, layer=0, latent_shape=(1,))
    encoder.activations = lambda images, *_: (images[:, 0], None)
    large_channels.measure(encoder, sorted((folder / "val" / "class0").iterdir()), 0.9, 0, CPU)


@functools.cache
def images_of(folder):
    make_folders(folder)
    args = train_imagenet.parse_args(["--smoke", "--data", str(folder), "--workers", "0", "--batch-size", "1",
                                      "--image-size", "8"])
    return args, train_imagenet.Data(args, CPU)


def read_targets(folder):
    args, data = images_of(folder.parent / "images")
    args.cache_targets = str(folder)
    teacher = lambda images, labels, t, noise: torch.ones(len(images), 8)
    vars(teacher).update(width=8, latent_shape=(3, 8, 8), image_size=8)
    train_imagenet.cache_targets(args, data, teacher)
    train_imagenet.Augmented(data.folders, args)[0, 0, 2]


def read_autoattack(folder):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    eval_autoattack.prepare_folder(folder, {"n": 8, "eps": 0.03, "attacks": None})
    found = eval_autoattack.evaluate(model, images, labels, folder, 0.03, ["apgd-ce"], batch_size=4)
    eval_autoattack.verify(model, images, labels, found, 0.03, 4)


def read_drawn(folder):
    args = generate_imagenet.parse_args(["--smoke", "--out", str(folder)])
    generate_imagenet.check_settings(folder, args, 0)
    denoiser = SimpleNamespace(to=lambda device: denoiser, label_dim=10, img_resolution=32)
    train_edm.load_denoiser, train_edm.shutil = lambda path: denoiser, SimpleNamespace(rmtree=lambda path: 0)
    train_edm.sample = lambda denoiser, latents, labels: latents
    flags = ["--sample", "6", "--batch-size", "3", "--device", "cpu", "--out", str(folder / "images.npz")]
    train_edm.draw_images(train_edm.parse_args(flags))
    (folder / "images.npz").unlink()


def make_run(folder):
    about, run = run_of(train_cifar)
    row = {"step": 1, "epoch": 0.5, "loss": 0.5, "holdout_clean": 50.0, "holdout_robust": 33.0}
    run.log, run.step = [row, row | {"step": 2}], 2
    about |= {"args": {"dra_weight": 1.0}, "dataset": "cifar10"}
    train_cifar.save(folder, about, run)
    train_cifar.write_log(folder / "log.csv", run.log, 0)
    (folder / "best.pt.autoattack").mkdir()
    result = {"settings": {"checkpoint": "best.pt", "step": 1, "attacks": None, "version": "standard"},
              "images": 100, "clean_acc": "50.00", "robust_accuracy": 25.0, "eps": "8/255"}
    (folder / "best.pt.autoattack" / "result.json").write_text(json.dumps(result))


def read_run(folder):
    plot_runs.main([str(folder), "--out", str(folder)])


NETWORK = [str(DMAT), "--arch", "wrn-10-1", "--dataset", "cifar10"]
TABLES = {  # script: its flags, and what takes the place of its measurements
    dimensions: ([*NETWORK, "--n", "8"], {
        "choose_images": lambda *_: torch.zeros(2, 8), "extract": lambda *_: None,
        "right_by_rank": lambda *_: np.random.default_rng(0).random((2, 8, 5)) < 0.5}),
    features: ([*NETWORK, "--n", "16", "--k", "2"], {
        "extract": lambda *_: {name: torch.rand(16, 4 if name != "right" else 2).double()
                               for name in ("clean", "attacked", "right")}}),
    frequency: ([*NETWORK, "--n", "8"], {
        "choose_images": lambda *_: None, "measure": lambda *_: np.random.default_rng(0).random((8, 2, 17))}),
    large_channels: ([*map(str, (DIT, VAE, STATS)), "--data-dir", ".", "--n", "8", "--teacher-layer", "2"], {
        "choose_images": lambda *_: None, "measure": lambda *_: np.random.default_rng(0).random((8, 12))}),
    probe_teacher: (["--teacher", str(EDM), "--teacher-layer", "dec.8x8_in1", "--teacher-sigma", "0.1",
                     "--n", "4", "--eps", "0", "8/255"], {
        "load_images": lambda *_: [torch.zeros(8, 3, 32, 32), torch.arange(8)],
        "fit_probe": lambda *_: (None, torch.rand(8, 4), torch.arange(8) > 2),
        "attack": lambda *_: torch.arange(8) > 4}),
    sparse_autoencoder: ([*NETWORK, "--n", "20", "--k", "2", "--steps", "2"], {
        "extract": lambda *_: [torch.rand(20, 8), torch.rand(20, 8)]}),
    compare_methods: (["--report"], {}),
}


def read_table(script, folder):
    flags, measurements = TABLES[script]
    vars(script).update(measurements)
    if script is frequency and folder.name != "source":  # of another network it measures the difference
        flags = [flags[0], str(shutil.copy(DMAT, folder.parent / "other.pt")), *flags[1:]]
    device = [] if script is compare_methods else ["--device", "cpu"]
    script.main([*flags, *device, "--out", str(folder)])


def make_table(script, folder):
    if script is compare_methods:
        names = ["clean", "robust", "autoattack", "cls_95", "cls_99", "robust_dimension", "uniformity",
                 "alignment", "minutes", *script.SETTINGS]
        dimensions.write_rows(folder / "results.csv", [
            {"method": method, "seed": str(i)} | dict.fromkeys(names, str(i))
            for method in ("at", "at+dra") for i in (1, 2)])
    read_table(script, folder)
    for path in folder.iterdir():
        if path.suffix not in (".csv", ".npy") or path.name == "report.csv":
            path.unlink()


KINDS = {  # how to make the files, how to read them
    "EDM's .pkl": (copy(EDM), lambda folder: edm_encoder.load_edm_encoder(folder / EDM.name)),
    "edm.pt": (make_edm, lambda folder: edm_encoder.load_edm_encoder(folder / "edm.pt")),
    "edm.pt, to continue": (make_edm, lambda folder: train_edm.resume(folder / "edm.pt", *run_of(train_edm))),
    "LightningDiT, VA-VAE": (copy(DIT, VAE, STATS), read_lightningdit),
    "the same, to draw": (copy(*SAMPLE), read_generator),
    "images in .npz": (lambda folder: write_npz(folder / "train.npz", 40), read_images),
    "image folders": (make_folders, read_folders),
    "cached targets": (read_targets, read_targets),
    "classifiers": (make_classifiers, read_classifiers),
    "last.pt": (make_last, read_last),
    "finished attacks": (read_autoattack, read_autoattack),
    "drawn images": (read_drawn, read_drawn),
    "a run's folder": (make_run, read_run),
}
KINDS |= {f"{script.__name__}'s table": (functools.partial(make_table, script),
                                         functools.partial(read_table, script)) for script in TABLES}


# ------------------------------------------------------------------------------------------------------------
# The cases.


def try_case(read, source, folder, rng):
    """Change one file of a copy of the folder `source`, and read it: "loaded", "refused" or what is wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"])
    path.write_bytes(mutate(path.read_bytes(), rng))
    where = f"{path.relative_to(folder)}: "
    try:
        read(folder)
        return "loaded"
    except BaseException as error:
        text = str(error)
        if isinstance(error, OSError) or type(error).__name__ in ("InputError", "VerificationError"):
            return "refused" if "\n" not in text else f"{where}not one line: {text!r}"
        ours = [x for x in traceback.extract_tb(error.__traceback__) if str(ROOT) in x.filename][-1]
        return f"{where}{type(error).__name__}: {text[:150]!r} at {Path(ours.filename).name}:{ours.lineno}"


def work(make, read, cases, seed, folder, tell):
    """In a process of its own: make the files, run the cases, tell(outcome) of each."""
    ran, active = [], False

    def watch(event, arguments):
        # Scripts and libraries are files; what comes out of a pickle is none. (Torch imports late, and to
        # make a named tuple Python runs a string.)
        unknown = active and event == "exec" and not (
            sys._getframe(1).f_code.co_filename.endswith(("collections/__init__.py", "dataclasses.py"))
            or arguments[0].co_filename.startswith("<frozen") or os.path.exists(arguments[0].co_filename))
        if active and (event in RUNS or unknown):
            ran.append(f"{event} {arguments}"[:200])
            raise RuntimeError("this may not run")
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.dup2(sys.stderr.fileno(), 2)  # of what is not Python
    matplotlib.figure.Figure.savefig = lambda *_, **__: None  # it takes a second
    Image.init()  # it imports all it can read
    source = folder / "source"
    source.mkdir(exist_ok=True)
    if not any(source.iterdir()):
        make(source)
    shutil.copytree(source, folder / "case", dirs_exist_ok=True)
    read(folder / "case")  # this must work, and imports what reading takes
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, wherever it hangs
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, 2 * (pages * resource.getpagesize() + MEMORY,))
    for case in cases:
        signal.alarm(SECONDS)
        active = True
        outcome = try_case(read, source, folder / "case", random.Random(f"{seed} {case}"))
        active = False
        signal.alarm(0)
        tell(f"RUNS {ran.pop()}" if ran else outcome)


def fuzz(kind, cases, seed=0):
    """Cases number `cases` of a kind -> {"loaded", "refused": how many}, [(case, what is wrong)]."""
    counts, faults, cases = collections.Counter(loaded=0, refused=0), [], list(cases)
    with tempfile.TemporaryDirectory() as folder:
        while cases:
            ours, its = os.pipe()
            process = os.fork()
            if not process:
                with open(its, "w") as pipe:
                    tell = lambda outcome: print(json.dumps(outcome), file=pipe, flush=True)
                    try:
                        work(*KINDS[kind], cases, f"{kind} {seed}", Path(folder), tell)
                    except BaseException:
                        tell(f"the tool itself failed: {traceback.format_exc()}")
                        os._exit(1)
                os._exit(0)
            os.close(its)
            with open(ours) as pipe:
                for line in pipe:
                    case, outcome = cases.pop(0), json.loads(line)
                    if outcome in counts:
                        counts[outcome] += 1
                    else:
                        faults.append((case, outcome))
            _, status = os.waitpid(process, 0)
            if os.WIFSIGNALED(status):
                faults.append((cases.pop(0), f"ended by {signal.Signals(os.WTERMSIG(status)).name}"))
            elif status:
                raise AssertionError(faults[-1])
    return counts, faults


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="over all kinds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: %(default)s)")
    parser.add_argument("--only", choices=list(KINDS), help="one kind of file")
    parser.add_argument("--case", type=int, help="with --only: this case alone")
    args = parser.parse_args()
    kinds, failed = [args.only] if args.only else list(KINDS), False
    print(f"{'kind of file':26}   cases  loaded refused  faults seconds")
    for i, kind in enumerate(kinds):
        cases = range(i, args.cases, len(kinds)) if args.case is None else [args.case]
        since = time.time()
        counts, faults = fuzz(kind, cases, args.seed)
        print(f"{kind:26} {len(cases):7} {counts['loaded']:7} {counts['refused']:7} {len(faults):7} "
              f"{time.time() - since:7.0f}", flush=True)
        for case, what in faults:
            print(f"  FAULT: --seed {args.seed} --only {kind!r} --case {case}: {what}", flush=True)
        failed |= bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    main()
