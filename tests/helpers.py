"""What several test files and tools need: ways to run a script, to kill it and to compare what two runs left;
steps in one process or two, and at full size without the memory; small files in the real formats, and hostile
ones."""
import collections
import contextlib
import csv
import io
import os
import pickle
import runpy
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT, FIXTURES = Path(__file__).resolve().parent.parent, Path(__file__).parent / "fixtures"
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # outside pytest; there pytest.ini does it
EDM, DMAT = FIXTURES / "edm_tiny_cond_vp.pkl", FIXTURES / "dmat_wrn_10_1_cifar10.pt"
DIT, VAE, STATS = [FIXTURES / f"dit_tiny_{name}.pt" for name in ("dit", "vae", "latents_stats")]
CPU = torch.device("cpu")
# What a download may leave in place of a file, and what has to be said of it.
HTML = b"\n<!DOCTYPE html><html>404 Not Found</html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
PAGE = "is a web page (HTML), not the file itself"
LFS = "is a Git LFS pointer, not the file itself: run git lfs pull"


# ------------------------------------------------------------------------------------------------ running

def run(script, *flags):
    """Run a script of the project as `python SCRIPT FLAGS` does, but in this process, which is faster than
    starting one. Returns its exit code, and what it printed: code, out, err."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", [script, *map(str, flags)]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def assert_one_line(script, flags, named):
    """The script ends with exit code 2 and one line; for flags it is the second, after argparse's usage. It
    has `named` in it."""
    done = run(script, *flags)
    lines = done.err.splitlines()
    assert done.code == 2 and lines and named in lines[-1], (flags, done.code, done.err)
    if lines[0].startswith("usage: "):
        assert len(lines) == 2 or script.startswith("experiments/"), (flags, done.err)
        assert lines[-1].startswith(Path(script).name) and ": error: " in lines[-1], (flags, done.err)
    else:
        assert len(lines) == 1 and done.err.startswith("error: "), (flags, done.err)


def start(script, flags):
    """A script as a process. The number of threads decides in which order sums are taken: one in all runs."""
    return subprocess.Popen([sys.executable, script, *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def write_program(path, script, **constants):
    """A file that does what `python SCRIPT` does, with other constants. Returns its path as text."""
    changes = "".join(f"{script}.{name} = {value}\n" for name, value in constants.items())
    path.write_text(f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'experiments')]}\n"
                    f"import {script}\n{changes}{script}.main()\n")
    return str(path)


def torchrun(script, *arguments, processes=2):
    """A script on several processes of this machine. Returns the finished launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return subprocess.run([*map(str, launcher), script, *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"})


class Killed(BaseException):
    """A run ends here, without a chance to save anything."""


def die_in_step(monkeypatch, script, number):
    """Let the training step of that number, counted from 1 in this process, end the run."""
    step, calls = script.train_step, []

    def fatal(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return step(*arguments)
    monkeypatch.setattr(script, "train_step", fatal)


def kill_once(script, flags, out, while_writing, rng):
    """Start the command and kill it: while last.pt is being written for the second to fifth time (the first
    is before any step), or at a random moment, which may be before it has begun. out: the run's folder.
    Returns the step of last.pt (0 without one), and whether it was being written."""
    path, temporary = out / "last.pt", out / "last.pt.tmp"
    changed = lambda: path.stat().st_mtime_ns if path.exists() else 0
    # Each step is saved, or one in every few: steps after the last checkpoint are done again.
    minutes = 0 if while_writing else rng.choice((0, 0.003, 0.01))
    process = start(script, [*flags, "--save-minutes", str(minutes)])
    if while_writing or rng.random() < 0.8:
        for _ in range(rng.randint(1, 4)):
            before = changed()
            while process.poll() is None and changed() == before:
                time.sleep(0.001)
        while while_writing and process.poll() is None and not temporary.exists():
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.003 if while_writing else 0.3))
    else:
        time.sleep(rng.uniform(0, 10))
    process.kill()
    process.wait()
    return load(path)["step"] if path.exists() else 0, while_writing and temporary.exists()


# ---------------------------------------------------------------------------------------- what runs leave

# What one run may have in another way than the other: where it lies, who reads, and when it saves.
FREE = ("/args/out", "/args/data", "/args/synthetic", "/args/workers", "/args/save_minutes")


def load(path):
    """A checkpoint."""
    return torch.load(path, weights_only=True)


def leaves(value, name=""):
    """Every number and tensor in nested dicts, lists and tuples, as (path, value)."""
    if isinstance(value, (dict, list, tuple)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(child, f"{name}/{key}")
    else:
        yield name, value


def all_finite(value):
    """Whether there is no NaN and no infinity in the tensors of a checkpoint."""
    return all(leaf.isfinite().all() for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor))


def differences(path, other):
    """Names of what differs between two checkpoints, apart from what is free to and the log's speed."""
    a, b = [dict(leaves(load(p))) for p in (path, other)]
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return [name for name in sorted(a.keys() | b.keys())
            if not name.startswith(FREE) and not name.endswith("/images_per_s")
            and not (name in a and name in b and same(a[name], b[name]))]


def log_rows(out):
    """The rows of log.csv, without the speed."""
    with open(out / "log.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "images_per_s"}
                for row in csv.DictReader(file)]


def compare(whole, killed):
    """Names of what differs between the files that two runs left in their folders."""
    different = [f"{name}: {what}" for name in ("last.pt", "best.pt")
                 for what in differences(whole / name, killed / name)]
    return different + ["log.csv"] * (log_rows(whole) != log_rows(killed))


def contents(folder):
    """Every file's bytes by its path; a lock, which is empty, may come and go."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "lock"}


# ----------------------------------------------------------------------------- steps in one process or two

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


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


def take_step(script, run, teacher, batch, args, ema_decay=0.5):
    """One training step of a run. Returns its numbers."""
    return script.train_step(run.model, run.averaged, run.projectors, teacher, run.optimizer, batch,
                             ema_decay, args)


def three_steps(script, args, data, teacher):
    """This process's share of three batches; loss and gradient of the first step WITHOUT attack steps (signs
    would amplify rounding); then the weights of every process after each of three whole steps; the run."""
    build = lambda: script.build_run(args, data, teacher, 1000)  # steps, so that the rate is not the last one
    batches, run = [data.batch(step) for step in range(3)], build()
    with mock.patch.object(script, "trades_attack", lambda model, images, start, *settings: start):
        numbers = take_step(script, run, teacher, batches[0], args, 0.0)
    found = {"batches": [vars(batch) for batch in batches], "holdout": list(data.holdout_batches()),
             "gradient": flat(run, gradients=True),
             "loss": script.all_reduce(numbers["loss"].clone()) / WORLD}
    run, found["weights"] = build(), []
    for batch in batches:
        take_step(script, run, teacher, batch, args)
        found["weights"].append(from_all(flat(run)))
    return found, run


def tensors(value):
    """All tensors in nested dicts, lists and tuples, in order."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def assert_shares(one, two, n_holdout):
    """What each of two processes has drawn and held out are the even and the odd places of what one has."""
    for whole, *shares in zip(*[tensors(found["batches"]) for found in (one, *two)]):
        assert len(whole) == 16 and all(torch.equal(part, whole[rank::2]) for rank, part in enumerate(shares))
    for i in range(3):  # images, labels, start
        whole, *shares = [torch.cat([batch[i] for batch in found["holdout"]]) for found in (one, *two)]
        assert len(whole) == n_holdout
        assert all(torch.equal(part, whole[rank::2]) for rank, part in enumerate(shares))


def assert_same_gradient(one, two):
    """Loss and gradient of one process are those of both of two, up to rounding."""
    assert one["gradient"].abs().max() > 0
    for what in ("loss", "gradient"):
        assert all((one[what] - found[what]).norm() < 1e-5 * one[what].norm() for found in two), what


def assert_identical_weights(two):
    """Classifier, average and projectors are the same on both processes after each step, and do change."""
    for found in two:
        assert all(torch.equal(first, second) for first, second in found["weights"])
    (start, _), *_, (end, _) = two[0]["weights"]
    assert not torch.equal(start, end)


# --------------------------------------------------------------------------------- full size, without memory

class OnHost(TorchDispatchMode):
    """Notes each operation that has to do with a tensor on the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves):
            self.seen.append(operation)
        return result


def step_without_content(script, args, build, device):
    """One `train_step` on tensors that have a shape, a type and no content, so it needs no memory and takes
    seconds. Asking for a value fails. device: "meta", where what is made on the host is noticed, or "cpu",
    with torch's fake tensors, which autocast takes. build() -> model, averaged, projectors, teacher, batch.

    Returns the step's numbers; the inputs of trades_loss and dra_loss; how many bytes of each type autograd
    keeps of activations (tensors with the batch in front) for the backward passes; and what OnHost has seen.
    """
    mode, inputs, kept = OnHost() if device == "meta" else FakeTensorMode(), {}, collections.Counter()
    autocast = lambda kind, *rest, **more: torch.amp.autocast("cpu", *rest, **more)  # it knows no "meta"

    def noted(name):
        function = getattr(script, name)
        return lambda *given: inputs.setdefault(name, given) and function(*given)

    def keep(tensor):
        if tensor.is_floating_point() and tensor.shape[:1] == (len(batch.labels),):
            kept[tensor.dtype] += tensor.nbytes
        return tensor
    with mode:
        # What reads values when networks are made: a cut normal, timm's shares of blocks to drop.
        with torch.device(device), mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor), \
                mock.patch.object(torch.Tensor, "item", lambda self: 0.0):
            model, averaged, projectors, teacher, batch = build()
        model.amp = teacher.amp = args.amp
        run = SimpleNamespace(model=model, averaged=averaged.requires_grad_(False), projectors=projectors,
                              optimizer=script.build_optimizer(args, model, projectors))
        getattr(mode, "seen", []).clear()
        with mock.patch.multiple(script, **{name: noted(name) for name in ("trades_loss", "dra_loss")}), \
                mock.patch.object(torch, "autocast", autocast), \
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            numbers = take_step(script, run, teacher, batch, args)
    assert all(p.grad.shape == p.shape for p in [*model.parameters(), *projectors.parameters()]
               if p.requires_grad)
    return SimpleNamespace(numbers=numbers, inputs=inputs, kept=kept, on_host=getattr(mode, "seen", []))


def assert_full_size_step(script, args, build, classes):
    """Of both kinds of step_without_content: shapes and types are right, and nothing waits for the device."""
    for device in ("meta", "cpu"):
        # there labels are looked at, as no GPU has to wait for them
        args.teacher_unconditional = device == "cpu"
        found = step_without_content(script, args, build, device)
        clean, adv, labels, *_ = found.inputs["trades_loss"]
        assert clean.shape == adv.shape == (args.batch_size, classes) and labels.shape == (args.batch_size,)
        projected, target = found.inputs["dra_loss"]
        assert projected.shape == target.shape and len(target) == args.batch_size
        scalars = found.numbers.values()
        assert all(x.dtype == torch.float32 for x in (clean, adv, projected, target, *scalars))
        assert all(x.shape == () and x.device.type == device for x in scalars) and not found.on_host
    return found.kept


# -------------------------------------------------------------------------------------------------- images

def write_npz(path, count, seed=0, **replaced):
    """Random images and labels as DM-AT's files have them. Returns the path."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    np.savez(path, **{"image": image, "label": rng.integers(0, 10, count)} | replaced)
    return path


def write_sparse_npz(path, count):
    """An npz of `count` black images that takes hardly any space on disk: a real zip, with holes where the
    pixels are. Over 4 GiB it is a zip64 with 64-bit sizes and offsets, as numpy writes them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, kind, shape in (("image", "|u1", (count, 32, 32, 3)), ("label", "<i8", (count,))):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header = {"descr": kind, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                size = int(np.prod(shape)) * np.dtype(kind).itemsize
                archive.fp.seek(size, os.SEEK_CUR)  # a hole
                member._file_size += size
                member._compress_size += size
    return path


# ---------------------------------------------------------------- pickles as NVIDIA's EDM code writes them

class Persistent:
    """Pickles as a call of torch_utils.persistence._reconstruct_persistent_obj, which only `dump` defines: an
    object that carries its class's source and a dict of state."""

    def __init__(self, class_name, state):
        self.meta = {"type": "class", "version": 6, "class_name": class_name, "state": state,
                     "module_src": "raise RuntimeError('source in a checkpoint was run')\n"}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def as_persistent(module, class_name="Module", **state):
    """A torch module as NVIDIA's persistent object of that class."""
    children = {name: as_persistent(child) for name, child in module._modules.items()}
    return Persistent(class_name, {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers),
                                   "_modules": children, **state})


def edm_file(encoder, network_arguments, model_class="SongUNet", precond_class="EDMPrecond"):
    """The content of NVIDIA's file for an EDMEncoder: dict(ema=EDMPrecond object)."""
    network = as_persistent(encoder.model, model_class, _init_args=(), _init_kwargs=network_arguments)
    state = {"_parameters": {}, "_buffers": {}, "_modules": {"model": network}, "sigma_data": 0.5,
             "_init_args": (), "_init_kwargs": {}}
    return {"ema": Persistent(precond_class, state)}


def dump(content, path):
    """Pickle `content` to `path`; the names of NVIDIA's modules exist for the time of writing only."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("only its name is ever used")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    names = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module}
    with mock.patch.dict(sys.modules, names), open(path, "wb") as file:
        pickle.dump(content, file)


def randomise(module, seed=0):
    """Fill every parameter with numbers of a sensible size, so that no layer is a silent zero."""
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) / max(1, parameter[0].numel()) ** 0.5
    return module


# ------------------------------------------------------------------------------------------- hostile files

class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return (self.function, self.arguments, *([] if self.state is None else [self.state]))


def hostile_pickles(marker):
    """name -> pickle bytes that would create `marker` under pickle.load, or reach for what could."""
    touch = f"touch {marker}"
    inner = pickle.dumps(Call(os.system, touch))
    plain = {
        "os.system": Call(os.system, touch),
        "os.mkdir": Call(os.mkdir, str(marker)),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "open": Call(open, str(marker), "w"),
        "getattr": Call(getattr, "x", "upper"),
        "subprocess": Call(subprocess.getoutput, touch),
        "pickle in pickle": Call(pickle.loads, inner),
        "import": Call(__import__, "os"),
        "numpy.load": Call(np.load, str(marker), None, True),
        "torch.load": Call(torch.load, str(marker)),
        "functools.partial": Call(__import__("functools").partial, os.system, touch),
        "storage": Call(torch.storage._load_from_bytes, inner),
        "inside a normal dict": {"ema": {"deep": [1, {"down": Call(os.system, touch)}]}},
        "ordered dict with state": Call(collections.OrderedDict, (), state={"x": Call(os.system, touch)}),
    }
    files = {name: pickle.dumps(value) for name, value in plain.items()}
    files["dotted name"] = b"\x80\x04\x8c\x05torch\x8c\x14storage.os.system.x\x93."
    files["whitelisted module, other name"] = b"ctorch._utils\n_import_dotted_name\n(S'os.system'\ntR."
    files["numpy object scalar"] = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'x'\ntR."
    files["persistent id"] = b"\x80\x02Pos.system\n."
    files["extension registry"] = b"\x80\x02\x82\x01."
    # BUILD with a slot state sets attributes of whatever lies on the stack: here of what the loader gave out.
    for module, name in ((b"torch_utils.persistence", b"_reconstruct_persistent_obj"),
                         (b"torch._utils", b"_rebuild_tensor_v2")):
        build = b"(N}X\x08\x00\x00\x00__init__ctorch.storage\n_load_from_bytes\nst" + b"b."
        files[f"attributes of {name}"] = b"\x80\x02c" + module + b"\n" + name + b"\n" + build
    files["hostile then valid"] = files["os.system"][:-1] + EDM.read_bytes()[2:]
    return files


def in_all_formats(content, folder):
    """Files with that pickle: by itself, inside torch's zip format, and as object arrays in an npz."""
    (folder / "bare.pkl").write_bytes(content)
    torch.save({"ema": 1}, folder / "template.pt")
    with zipfile.ZipFile(folder / "template.pt") as source, zipfile.ZipFile(folder / "zip.pt", "w") as target:
        for item in source.namelist():
            target.writestr(item, content if item.endswith("data.pkl") else source.read(item))
    with zipfile.ZipFile(folder / "object.npz", "w") as target:
        for array in ("image", "label"):
            header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117)
            target.writestr(f"{array}.npy", b"\x93NUMPY\x01\x00v\x00" + header + b"\n" + content)
    return [folder / name for name in ("bare.pkl", "zip.pt", "object.npz")]


def assert_never_run(read, folder):
    """read(path) refuses each hostile file, in each format, with one line that names it, and runs nothing."""
    marker = folder / "was_run"
    for name, content in hostile_pickles(marker).items():
        for path in in_all_formats(content, folder):
            try:
                read(path)
            except (ValueError, OSError) as error:
                assert any(part in str(error) for part in (path.name, "last.pt")), (name, error)
                assert "\n" not in str(error), (name, error)
            else:
                raise AssertionError(f"{path.name} was taken: {name}")
            assert not marker.exists(), name
    pickle.loads(hostile_pickles(marker)["open"])  # this can fail: Python's own loader does run them
    assert marker.exists()
