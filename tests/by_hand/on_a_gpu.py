"""Shows whether all of it works on CUDA, and how fast. Ten minutes on a GPU; on a CPU, in small, three.

    python tests/by_hand/on_a_gpu.py [--minutes 9] [--parts a b c d e f g] [--report on_a_gpu.md]

    (a) agreement: float32 on the GPU with the CPU; bfloat16 and compiled with plain float32: loss, gradient,
        teacher, attack; graph breaks, recompilations, and calls for which the host waits, of which there
        should be none
    (b) speed of training steps, by benchmark.py, and of ours in turns with a textbook step, by
        compare_textbook_step.py
    (c) time spent waiting for data, with 20 million mapped images
    (d) the share of an epoch that the selection of the best checkpoint takes
    (e) a run that was killed and continued, beside two that nobody disturbed
    (f) AutoAttack in float32, with --tf32, and called directly
    (g) one process under torchrun, with NCCL

Each job is a process of its own, so that none takes the next one down, and writes its rows into the report
(Markdown) as it goes. A job that fails or takes too long leaves a row that says so, and its output in the
.log beside the report. What the minutes were not enough for, a second command with fewer --parts can do.
Without a GPU all jobs run in small, so that this file is known to work before there is one; what is compiled
runs on eager kernels then, and the times mean nothing.
"""
import argparse
import contextlib
import copy
import functools
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import benchmark
import compare_textbook_step
import train_cifar
import train_imagenet
from helpers import kill_once, start, write_sparse_npz

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OUT = SimpleNamespace(report=None, job=None)  # where rows go, and whose they are
TINY = {train_cifar: "--smoke --batch-size 8 --attack-steps 1 --max-steps 3",
        train_imagenet: "--smoke --image-size 32 --batch-size 8 --attack-steps 1 --workers 0"}


def row(what, measured, expected="", good=None):
    """One line of the report."""
    with open(OUT.report, "a") as file:
        verdict = "" if good is None else "yes" if good else "**NO**"
        file.write(f"| {OUT.job} | {what} | {measured} | {expected} | {verdict} |\n")


def seconds(function):
    """How long a call takes, the GPU's work included."""
    wait = torch.cuda.synchronize if CUDA else lambda: None
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


# ---------------------------------------------------------------------------------------------- (a) agreement

def take(value, count, device):
    """A batch's first images, on a device."""
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{name: take(inner, count, device) for name, inner in vars(value).items()})
    if isinstance(value, (list, tuple)):  # of (noise level, noise), as teacher_noise is
        return [take(inner, count, device) for inner in value]
    return value[:count].to(device) if isinstance(value, torch.Tensor) else value


def step(script, args, run, teacher, batch, attack=True, lr=0.0):
    """One step; a rate of 0 leaves the weights as they are. Returns its numbers, and the gradient.

    Below the attack (attack=False: x' is where the attack would start): signs would amplify rounding.
    """
    args.amp = teacher.amp = run.model.amp
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    attacked = script.trades_attack if attack else lambda model, images, start, *settings: start
    with mock.patch.object(script, "trades_attack", attacked):
        numbers = script.train_step(run.model, run.averaged, run.projectors, teacher, run.optimizer, batch,
                                    0.5, args)
    weights = [*run.model.parameters(), *run.projectors.parameters()]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return numbers, torch.cat([gradient.flatten() for gradient in gradients])


def where_it_waits(function):
    """The line of code below which the host waits for the GPU, if there is one."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
        return "none"
    except RuntimeError as error:
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def agreement(script, flags):
    """Copies of one run: plain ones on both devices, with eight images; a plain one and one as in training,
    with a batch."""
    args, _, teacher, run, batches = benchmark.prepare(script, flags)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    inputs, take_step = batches(24 if CUDA else 4), functools.partial(step, script, args)
    batch = next(inputs)
    cosine = lambda a, b: F.cosine_similarity(a.flatten().double().cpu(), b.flatten().double().cpu(),
                                              dim=0).item()

    def variant(device, amp):
        made = {name: copy.deepcopy(getattr(run, name)).to(device)
                for name in ("model", "averaged", "projectors")}
        made["model"].amp = args.amp = teacher.to(device).amp = amp
        return SimpleNamespace(**made,
                               optimizer=script.build_optimizer(args, made["model"], made["projectors"]))

    few = [take_step(variant(device, False), teacher, take(batch, 8, device), attack=False)
           for device in ("cpu", DEVICE)]
    (cpu, cpu_gradient), (gpu, gradient) = few
    error, angle = abs(gpu["loss"].item() / cpu["loss"].item() - 1), cosine(cpu_gradient, gradient)
    row("GPU and CPU in float32: difference of the loss, cosine of the gradients",
        f"{error:.1e}, {angle:.6f}", "< 1e-3, > 0.999",
        error < 1e-3 and angle > 0.999)

    runs, found = {}, {}
    for name in ("plain", "fast"):
        runs[name] = variant(DEVICE, name == "fast")
        if name == "fast":  # also without a GPU, through a backend that needs no C++ compiler
            eager = torch.compile if CUDA else functools.partial(torch.compile, backend="aot_eager")
            with mock.patch.object(torch, "compile", eager):
                settings = argparse.Namespace(**vars(args) | {"device": "cuda"})
                script.compile_parts(settings, runs[name].model, teacher)
        target = benchmark.ask_teacher(script, teacher, batch, args)[0]
        below = take_step(runs[name], teacher, batch, attack=False)[1]
        found[name] = SimpleNamespace(target=target, gradient=below,
                                      loss=take_step(runs[name], teacher, batch)[0]["loss"].item())
    plain, fast = found["plain"], found["fast"]
    error = abs(fast.loss / plain.loss - 1)
    row("bfloat16 + compiled and plain: difference of the first loss", f"{error:.2%}", "< 1 %", error < 0.01)
    for what, angle in (("gradients", cosine(plain.gradient, fast.gradient)),
                        ("teacher's features", cosine(plain.target, fast.target))):
        row(f"... cosine of the {what}", f"{angle:.5f}", "> 0.99", angle > 0.99)

    counted = torch._dynamo.utils.counters
    first, ahead = counted["stats"]["unique_graphs"], lambda: take_step(runs["fast"], teacher, next(inputs),
                                                                        lr=args.lr)
    for _ in range(20 if CUDA else 2):
        ahead()
    where = where_it_waits(ahead) if CUDA else "no GPU"
    row("... calls for which the host waits", where, "none", where == "none" if CUDA else None)
    later, breaks = counted["stats"]["unique_graphs"] - first, sum(counted["graph_break"].values())
    row("... graphs compiled in the first steps and later, graph breaks", f"{first}, {later}, {breaks}",
        "some, 0, 0", first > 0 and later == breaks == 0)

    runs["plain"].model.load_state_dict(runs["fast"].model.state_dict())
    right = {}
    for name in runs:  # a little trained by now
        model = runs[name].model
        adv = script.trades_attack(model, batch.images, batch.start, args.eps, args.step_size,
                                   args.attack_steps)
        right[name] = (model(adv).argmax(1) == batch.labels).float().mean().item()
    noise = 2 * (0.25 / len(batch.labels)) ** 0.5
    row("... right under attack after a few steps, plain and fast",
        f"{right['plain']:.1%}, {right['fast']:.1%}", f"within {noise:.1%}",
        abs(right["plain"] - right["fast"]) <= noise)


# --------------------------------------------------------------------------------------- (b), (c), (d): speed

def peak_tflops():
    """The rate of a product of two 8192 x 8192 matrices in bfloat16."""
    size, count = (8192, 20) if CUDA else (256, 2)
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16)
    [a @ b for _ in range(3)]
    return 2 * size**3 * count / seconds(lambda: [a @ b for _ in range(count)]) / 1e12


def measure(script, flags):
    """benchmark.py's numbers with the largest of these batch sizes that fits, halved until it does; and the
    peak rate."""
    benchmark.WARMUP, peak = 5 if CUDA else 1, peak_tflops()
    while True:
        try:
            return benchmark.measure(script, flags, 10 if CUDA else 1, peak), peak
        except torch.OutOfMemoryError:
            place = flags.index("--batch-size") + 1
            row(f"batch of {flags[place]}", "does not fit")
            flags[place] = str(int(flags[place]) // 2)
        gc.collect(), torch.cuda.empty_cache()


def speed(script, flags):
    found, peak = measure(script, flags)
    parts = ", ".join(f"{name} {1000 * value:.4g}" for name, value in found["seconds"].items())
    row(f"batch of {found['batch_size']}: images/s; TFLOP/s; share of {peak:.0f}; memory; ms of a step "
        "and its parts", f"{found['images_per_s']:.4g}; {found['tflops']:.4g}; {found['share_of_peak']:.1%}; "
        f"{found['peak_memory_gib']:.1f} GiB; {parts}")


def online_and_cached(script, flags):
    speed(script, flags)
    speed(script, [*flags, "--cache-targets", tempfile.mkdtemp()])


def textbook(script, flags):
    """Ours without alignment, so that both compute the same; the textbook's as DM-AT ran on an A100 (TF32),
    and as it is written."""
    found = compare_textbook_step.compare(script.parse_args([*flags, "--smoke", "--device", DEVICE,
                                                             "--dra-weight", "0"]), 5 if CUDA else 1)
    row("no alignment, ms of a step in turns (and over ours)",
        ", ".join(f"{name} {1000 * value:.4g} ({value / found['ours']:.2f})"
                  for name, value in found.items()))


def waiting(script, flags):
    """The file's pixels are holes, so this is the way from the page cache to the GPU, without a disk."""
    path = write_sparse_npz(Path(tempfile.mkdtemp(), "sparse.npz"), 20_000_000 if CUDA else 20_000)
    took = measure(script, [*flags, "--synthetic", str(path)])[0]["seconds"]
    # these are of a batch that is there already
    share = 1 - (took["attack"] + took["teacher"] + took["update"]) / took["step"]
    row("share of a step that is gone with new batches; ms to read and augment one",
        f"{share:.1%}; {1000 * took['data']:.4g}",
        "< 2 %", share < 0.02 if CUDA else None)


def selection(script, flags):
    args, data, _, run, _ = benchmark.prepare(script, flags)
    script.compile_parts(args, run.averaged)
    with mock.patch.object(script, "SELECTION_STEPS", script.SELECTION_STEPS if CUDA else 1):
        script.evaluate(run.averaged, data, args)
        once = seconds(lambda: script.evaluate(run.averaged, data, args))
    epoch = measure(script, flags)[0]["seconds"]["step"] * data.steps_per_epoch
    row("seconds of a selection, of an epoch's steps; share of both",
        f"{once:.3g}, {epoch:.4g}; {once / (once + epoch):.1%}")


# ------------------------------------------------------------------- (e), (f), (g): whole runs of the scripts

def weights(path):
    state = torch.load(path, map_location="cpu", weights_only=True)["unaveraged_model_state_dict"]
    return torch.cat([value.flatten().double() for value in state.values()])


def killed(script, flags):
    """Two undisturbed runs tell by how much runs differ anyway: on a GPU, sums are not always taken in the
    same order. The third was killed while a checkpoint was being written."""
    folder, runs = Path(tempfile.mkdtemp()), {}
    command = lambda name: [*flags, "--device", DEVICE, "--max-steps", "20", "--out", str(folder / name)]
    for name in ("whole", "again"):
        runs[name] = start("train_cifar.py", command(name))
    assert [process.wait() for process in runs.values()] == [0, 0], "a run failed"
    at, _ = kill_once("train_cifar.py", command("killed"), folder / "killed", True, random.Random(0))
    assert 0 < at < 20, "too early or too late"
    assert start("train_cifar.py", command("killed")).wait() == 0, "the run failed"
    whole, again, continued = [weights(folder / name / "last.pt") for name in ("whole", "again", "killed")]
    anyway, after = [((other - whole).norm() / whole.norm()).item() for other in (again, continued)]
    row(f"difference of the weights after 20 steps: of two undisturbed runs; of one killed and "
        f"continued after step {at}",
        f"{anyway:.1e}; {after:.1e}", "about the same", after <= 10 * anyway + (1e-6 if CUDA else 0))


def judge(script, flags):
    """On what a short run has trained. The images' labels are the model's own, so that all images count."""
    from eval_autoattack import evaluate, load_classifier, set_tf32, verify
    from pyautoattack import AutoAttack
    folder, eps, size, attacks = Path(tempfile.mkdtemp()), 8 / 255, 256, None if CUDA else ["apgd-ce"]
    subprocess.run([sys.executable, "train_cifar.py", *flags, "--device", DEVICE, "--out", folder], cwd=ROOT,
                   check=True)
    model, torch.backends.cudnn.deterministic = load_classifier(folder / "last.pt").to(DEVICE), True
    images = torch.from_numpy(script.draw_smoke_images(size if CUDA else 4, seed=1)[0])
    images = images.permute(0, 3, 1, 2).contiguous() / 255
    labels, found = model(images.to(DEVICE)).argmax(1).cpu(), {}
    for name, tf32 in (("float32", False), ("TF32", True)):
        (folder / name).mkdir()
        run = lambda: found.update({name: evaluate(model, images, labels, folder / name, eps, attacks,
                                                   batch_size=size, tf32=tf32)})
        took = seconds(run)
        again = verify(model, images, labels, found[name], eps, size)
        robust = (found[name].broken_by == -1).float().mean()
        row(f"AutoAttack, {name}: robust; seconds; verdicts that float32 changed",
            f"{robust:.2%}; {took:.1f}; {found[name].changed}", "verified", again == 0)
    exact, fast = found["float32"], found["TF32"]
    row("... images with another verdict", int(((exact.broken_by == -1) != (fast.broken_by == -1)).sum()),
        "few")
    library = AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=0, device=DEVICE)
    library.attacks_to_run = exact.attacks
    adversarial = library.run_standard_evaluation(images, labels, batch_size=size)[0]
    other = int((adversarial != exact.adversarial).flatten(1).any(1).sum())
    row("... called directly: images with another x'", other, "0", other == 0)
    big = script.build_model("wrn-28-10" if CUDA else "wrn-10-1", 10).requires_grad_(False).eval()
    big.to(DEVICE, memory_format=torch.channels_last)
    x, took = torch.rand(250 if CUDA else 2, 3, 32, 32, device=DEVICE, requires_grad=True), []
    for tf32 in (False, True):
        set_tf32(tf32)
        took.append(1000 * min(seconds(lambda: torch.autograd.grad(big(x).sum(), [x])) for _ in range(4)))
    row("... ms of a gradient of WRN-28-10, 250 images: float32, TF32", f"{took[0]:.4g}, {took[1]:.4g}")


def under_torchrun(script, flags):
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", __file__,
                    "--job", "inside torchrun", "--report", OUT.report], check=True)


def in_a_group(script, flags):
    """A run without a process group, and one with a group of one: gradients through NCCL, counts and barriers
    through gloo."""
    folder = Path(tempfile.mkdtemp())
    for name in ("alone", "group"):
        if name == "group":
            dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
        script.main([*flags, "--device", DEVICE, "--max-steps", "4", "--out", str(folder / name)])
    dist.destroy_process_group()
    alone, group = [weights(folder / name / "last.pt") for name in ("alone", "group")]
    error = ((group - alone).norm() / alone.norm()).item()
    row("one process in a group: difference of the weights after 4 steps", f"{error:.1e}", "about 0",
        error < (1e-2 if CUDA else 1e-6))


# --------------------------------------------------------------------------------------------------- all jobs

# name, which begins with the part's letter: minutes at most, what it does, with which script and flags
JOBS = {
    "a WRN-28-10, EDM": (2, agreement, train_cifar, "--arch wrn-28-10 --batch-size 512 --lr 0.05"),
    "a ViT-B/16, LightningDiT-XL/1": (2.5, agreement, train_imagenet, "--batch-size 64 --lr 1e-4"),
    "b WRN-28-10": (1.5, speed, train_cifar, "--arch wrn-28-10 --batch-size 512"),
    "b WRN-28-10, textbook": (1.5, textbook, train_cifar, "--arch wrn-28-10 --batch-size 512"),
    "b WRN-34-10": (1.5, speed, train_cifar, "--arch wrn-34-10 --batch-size 128"),
    "b ViT-B/2": (2, speed, train_cifar, "--arch vit-b-2 --batch-size 1024 --accumulate 4"),
    "b ViT-B/16, online and cached": (2.5, online_and_cached, train_imagenet, "--batch-size 128"),
    "b ConvNeXt-B, online and cached": (2.5, online_and_cached, train_imagenet,
                                        "--arch convnext_base.dinov3_lvd1689m --batch-size 128"),
    "c WRN-28-10": (1.5, waiting, train_cifar, "--arch wrn-28-10 --batch-size 512"),
    "d WRN-34-10": (1.5, selection, train_cifar, "--arch wrn-34-10 --batch-size 128"),
    "e WRN-16-4": (2, killed, train_cifar, "--smoke --arch wrn-16-4 --batch-size 128"),
    "f WRN-10-1": (3, judge, train_cifar, "--smoke"),
    "g WRN-10-1": (1, under_torchrun, train_cifar, ""),
    "inside torchrun": (0, in_a_group, train_cifar, "--smoke --no-compile"),
}


def run_job(name, limit):
    """One job in a process of its own, within that many seconds. If it does not end well, a row says so."""
    log = OUT.report.with_suffix(".log")
    with open(log, "a") as file:
        begin = file.seek(0, os.SEEK_END)
        process = subprocess.Popen([sys.executable, __file__, "--job", name, "--report", OUT.report],
                                   cwd=ROOT,
                                   stdout=file, stderr=file, start_new_session=True)
    failed = None
    try:
        if process.wait(limit):
            said = log.read_bytes()[begin:].decode(errors="replace").strip()
            failed = "FAILED: " + said.rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        failed = f"not done after {limit:.0f} s"
    finally:  # also what it has started, and also on Ctrl-C
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
                time.sleep(2)
    if failed:
        row("", failed.replace("|", "/"), "", False)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=9, help="for all (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=list("abcdefg"), default=list("abcdefg"),
                        help="only these")
    parser.add_argument("--report", type=Path, default=Path("on_a_gpu.md"),
                        help="rows are added to this file (default: %(default)s)")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    OUT.report, OUT.job, end = args.report.resolve(), args.job, time.time() + 60 * args.minutes
    if args.job:
        _, job, script, flags = JOBS[args.job]
        return job(script, (flags if CUDA else TINY[script]).split())
    with open(OUT.report, "a") as file:
        device = torch.cuda.get_device_name() if CUDA else "CPU, tiny networks in place of those named"
        file.write(f"\n{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d %H:%M')}\n\n"
                   "| job | what | measured | expected | as expected |\n|---|---|---|---|---|\n")
    for OUT.job, (minutes, *_) in JOBS.items():
        if OUT.job[0] in args.parts:
            limit = min(60 * minutes if CUDA else 600, end - time.time())
            run_job(OUT.job, limit) if limit > 10 else row("", "no time left")
    print(OUT.report.read_text())


if __name__ == "__main__":
    main()
