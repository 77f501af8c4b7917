"""From files to batches: npz files are mapped where they lie, and every draw is a function of (seed, step)."""
import json
import mmap
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from train_cifar import Data, InputError, draw_smoke_images, generator, map_npz_member, open_npz, parse_args

CPU = torch.device("cpu")


def write_npz(path, count, seed=0, **replaced):
    rng = np.random.default_rng(seed)
    np.savez(path, **({"image": rng.integers(0, 256, (count, 32, 32, 3), np.uint8), "label": rng.integers(0, 10, count)} | replaced))
    return path


def write_sparse_npz(path, count):
    """An npz of `count` black images that takes hardly any space on disk: a real zip with holes where the pixels are.

    Over 4 GiB it is a zip64 with 64-bit sizes and offsets, as numpy writes them.
    """
    headers = {}
    for name, shape in (("image", (count, 32, 32, 3)), ("label", (count,))):
        with open(path.with_suffix(".header"), "wb+") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.seek(0)
            headers[name] = file.read(), int(np.prod(shape))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (header, size) in headers.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(header)
                archive.fp.seek(size, os.SEEK_CUR)  # a hole
                member._file_size, member._compress_size = len(header) + size, len(header) + size
    return path


@pytest.fixture
def folder(tmp_path):
    write_npz(tmp_path / "train.npz", 200, seed=1)
    write_npz(tmp_path / "test.npz", 30, seed=2)
    return tmp_path


def make_data(folder, *flags, rank=0, world=1):
    args = parse_args(["--data-dir", str(folder), "--device", "cpu", "--batch-size", "20", *flags])
    return Data(args, CPU, rank, world)


# -------------------------------------------------------------------------------------------------------- npz in place

@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_npz_is_read_as_numpy_reads_it(tmp_path, dtype):
    labels = np.arange(50) % 10
    path = write_npz(tmp_path / "x.npz", 50, label=labels.astype(dtype))
    images, labels = open_npz(path, 10)
    with np.load(path) as file:
        assert np.array_equal(images, file["image"]) and np.array_equal(labels, file["label"])
    assert not images.flags.writeable and isinstance(images.base, mmap.mmap), "mapped, not read"


def test_large_sparse_zip64_costs_no_memory(tmp_path):
    """Two million images, 6 GB as DM-AT would ship them: 20,000 random ones come out, and resident memory does not follow."""
    path = write_sparse_npz(tmp_path / "big.npz", 2_000_000)
    assert path.stat().st_size > 6e9
    code = ("import sys, torch, json; from train_cifar import Data, parse_args\n"
            "def resident(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]) / 1024\n"
            "data = Data(parse_args(['--smoke', '--synthetic', sys.argv[1]]), torch.device('cpu')); before = resident()\n"
            "for i in range(20): pixels, labels = data.fetch(980 + torch.randint(data.n_synthetic_images, (1000,)))\n"
            "print(json.dumps([data.n_synthetic_images, resident() - before, int(pixels.sum()), list(pixels.shape)]))")
    if not Path("/proc/self/status").exists():
        pytest.skip("reads resident memory from /proc")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    count, grown_mib, total, shape = json.loads(done.stdout)
    assert count == 2_000_000 and total == 0 and shape == [1000, 32, 32, 3]
    assert grown_mib < 50, "20,000 images on pages of 4 KiB are 80 MB and more; they are let go after each fetch"


def bad_npz_files(folder):
    image, label = np.zeros((5, 32, 32, 3), np.uint8), np.zeros(5, np.int64)
    path = folder / "bad.npz"
    yield "images missing", lambda: np.savez(path, label=label), "no array 'image'"
    yield "labels missing", lambda: np.savez(path, image=image), "no array 'label'"
    yield "float images", lambda: np.savez(path, image=image / 255, label=label), "float64"
    yield "channels first", lambda: np.savez(path, image=image.transpose(0, 3, 1, 2).copy(), label=label), r"\[5, 3, 32, 32\], expected uint8 \[N, 32, 32, 3\]"
    yield "fewer labels", lambda: np.savez(path, image=image, label=label[:4]), r"expected integers \[5\]"
    yield "float labels", lambda: np.savez(path, image=image, label=label / 1), "expected integers"
    yield "label too large", lambda: np.savez(path, image=image, label=label + 10), "labels run from 10 to 10, expected 0 to 9"
    yield "negative label", lambda: np.savez(path, image=image, label=label - 1), "labels run from -1"
    yield "empty", lambda: np.savez(path, image=image[:0], label=label[:0]), "at least one"
    yield "compressed", lambda: np.savez_compressed(path, image=image, label=label), "compressed"
    yield "Fortran order", lambda: np.savez(path, image=np.asfortranarray(image), label=label), "Fortran"
    yield "pickled objects", lambda: np.savez(path, image=np.array([{}, []], object), label=label), "object"
    yield "cut off", lambda: path.write_bytes(write_npz(folder / "whole.npz", 5).read_bytes()[:9000]), "expected an .npz"
    yield "no zip", lambda: path.write_bytes(b"<html>"), "expected an .npz"
    yield "another zip", lambda: zipfile.ZipFile(path, "w").writestr("image.npy", b"not an array"), "holds no array 'image'"


def test_bad_npz_files_give_one_clear_line(tmp_path):
    for kind, write, message in bad_npz_files(tmp_path):
        write()
        with pytest.raises(InputError, match=message) as caught:
            open_npz(tmp_path / "bad.npz", 10)
        assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value), kind


def test_cifar10s_file_is_refused_for_cifar100(tmp_path):
    """DM-AT calls both files 1m.npz. One label above 9 is enough to tell them apart."""
    with pytest.raises(InputError, match="labels run from 0 to 9, expected 0 to 99"):
        open_npz(write_npz(tmp_path / "1m.npz", 50, label=np.arange(50) % 10), 100)
    assert len(open_npz(write_npz(tmp_path / "1m.npz", 50, label=np.arange(50)), 100)[1]) == 50


def test_a_header_that_promises_more_than_the_file_holds_is_cut_off(tmp_path):
    path = write_npz(tmp_path / "x.npz", 5)
    path.write_bytes(path.read_bytes().replace(b"'shape': (5, 32,", b"'shape': (9, 32,"))
    with pytest.raises(InputError, match="cut off"):
        map_npz_member(path, "image")


# ------------------------------------------------------------------------------------------------------------ batches

def test_draws_depend_on_seed_position_and_purpose_only():
    draw = lambda *key: torch.rand(3, generator=generator(*key)).tolist()
    assert draw(0, 5, "batch") == draw(0, 5, "batch")
    different = [draw(0, 5, "batch"), draw(1, 5, "batch"), draw(0, 6, "batch"), draw(0, 5, "pass"), draw(5, 0, "batch")]
    assert len({tuple(x) for x in different}) == 5


@pytest.mark.parametrize("synthetic", [False, True])
def test_batches_do_not_depend_on_the_steps_before(folder, synthetic):
    """Nor on what was read ahead: a thread fetches the next step's images."""
    flags = ["--extra-sigma", *(["--synthetic", str(write_npz(folder / "a.npz", 300, seed=3))] if synthetic else [])]
    one, other = make_data(folder, *flags), make_data(folder, *flags)
    [one.batch(step) for step in range(12)]
    for step in (12, 3):
        a, b = one.batch(step), other.batch(step)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.start, b.start)
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for p, q in zip(a.teacher_noise, b.teacher_noise) for x, y in zip(p, q))


def test_ranges_and_shapes_of_a_batch(folder):
    data = make_data(folder, "--extra-sigma", "--eps", "4/255")
    batch = data.batch(0)
    assert batch.images.shape == batch.start.shape == (20, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.images.min() == 0 and batch.images.max() == 1 and batch.start.min() >= 0 and batch.start.max() <= 1
    distance = (batch.start - batch.images).abs()
    assert 3.9 / 255 < distance.max() <= 4 / 255 + 1e-6
    (sigma, noise), (drawn_sigma, drawn_noise) = batch.teacher_noise
    assert sigma == 0.06 and noise.shape == drawn_noise.shape == batch.images.shape and not torch.equal(noise, drawn_noise)
    assert drawn_sigma.shape == (20,) and drawn_sigma.min() > 0


def test_extra_sigma_has_edms_training_distribution(folder):
    data = make_data(folder, "--extra-sigma", "--batch-size", "180")
    logs = torch.cat([data.batch(step).teacher_noise[1][0] for step in range(20)]).log()
    assert abs(logs.mean() + 1.2) < 0.1 and abs(logs.std() - 1.2) < 0.1


def test_held_out_images_are_the_first_and_are_never_trained_on(folder):
    data = make_data(folder)
    with np.load(folder / "train.npz") as file:
        assert np.array_equal(data.holdout[0], file["image"][:20]), "a tenth of a small set, 1,024 of CIFAR"
        assert np.array_equal(data.parts[0][0], file["image"][20:])


def test_real_images_come_in_reshuffled_whole_passes(folder):
    data = make_data(folder, "--batch-size", "50")  # 180 real images: passes end inside batches
    stream = torch.cat([data.draw_indices(step) for step in range(18)])
    passes = stream.split(180)
    assert len(passes) == 5 and all(torch.equal(p.sort().values, torch.arange(180)) for p in passes)
    assert not any(torch.equal(passes[0], p) for p in passes[1:])


def test_synthetic_share_and_the_epochs_length(folder):
    write_npz(folder / "a.npz", 30, seed=3)
    write_npz(folder / "b.npz", 50, seed=4)
    data = make_data(folder, "--synthetic", str(folder / "a.npz"), str(folder / "b.npz"))
    assert data.args.synthetic_fraction == 0.7 and data.n_real == 6 and data.steps_per_epoch == 10, "200 training images / 20"
    drawn = torch.cat([data.draw_indices(step) for step in range(200)])
    assert (drawn < 180).float().mean() == 0.3
    from_a = ((drawn >= 180) & (drawn < 210)).sum() / (drawn >= 180).sum()
    assert abs(from_a - 30 / 80) < 0.05, "both files by their size"
    everything = np.concatenate([data.parts[0][0], *[np.load(folder / f"{name}.npz")["image"] for name in "ab"]])
    index = data.draw_indices(7)
    assert np.array_equal(data.fetch(index)[0], everything[index.numpy()]), "in the order asked for"


@pytest.mark.parametrize("fraction, synthetic", [("0.7", 358), ("0.8", 409)])
def test_a_batch_of_512_is_split_as_in_dmat(folder, fraction, synthetic):
    """int(512 x 0.7) = 358 synthetic images, and the other 154 are real."""
    write_npz(folder / "train.npz", 600)
    write_npz(folder / "a.npz", 30, seed=3)
    data = make_data(folder, "--batch-size", "512", "--synthetic", str(folder / "a.npz"), "--synthetic-fraction", fraction)
    assert data.n_real == 512 - synthetic and (data.draw_indices(0) >= data.n_real_images).sum() == synthetic


@pytest.mark.parametrize("synthetic", [False, True])
def test_processes_share_the_batch_of_one(folder, synthetic):
    flags = ["--synthetic", str(write_npz(folder / "a.npz", 30, seed=3))] if synthetic else []
    whole = make_data(folder, "--extra-sigma", *flags).batch(3)
    shares = [make_data(folder, "--extra-sigma", *flags, rank=rank, world=4).batch(3) for rank in range(4)]
    for rank, share in enumerate(shares):
        assert torch.equal(share.images, whole.images[rank::4]) and torch.equal(share.labels, whole.labels[rank::4])
        assert torch.equal(share.start, whole.start[rank::4])
        assert torch.equal(share.teacher_noise[0][1], whole.teacher_noise[0][1][rank::4])
        assert torch.equal(share.teacher_noise[1][0], whole.teacher_noise[1][0][rank::4])


def test_smoke_images_are_ten_balanced_classes():
    images, labels = draw_smoke_images(2000, seed=0)
    assert images.shape == (2000, 32, 32, 3) and images.dtype == np.uint8
    assert np.bincount(labels, minlength=10).min() > 150
