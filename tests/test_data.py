"""From files to batches: npz files are mapped where they lie, each draw is a function of (seed, step)."""
import json
import mmap
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train_cifar
from train_cifar import (Data, InputError, draw_smoke_images, generator, load_real, map_npz_member, open_npz,
                         parse_args)

CPU = torch.device("cpu")


def write_npz(path, count, seed=0, **replaced):
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


@pytest.fixture
def folder(tmp_path):
    """200 real images, of which 20 are held out, and no test images."""
    write_npz(tmp_path / "train.npz", 200, seed=1)
    return tmp_path


def make_data(folder, *flags, rank=0, world=1):
    args = parse_args(["--data-dir", str(folder), "--device", "cpu", "--batch-size", "20", *map(str, flags)])
    return Data(args, CPU, rank, world)


# ----------------------------------------------------------------------------------------------- npz in place

@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_npz_is_read_as_numpy_reads_it(tmp_path, dtype):
    path = write_npz(tmp_path / "x.npz", 50, label=(np.arange(50) % 10).astype(dtype))
    images, labels = open_npz(path, 10)
    with np.load(path) as file:
        assert np.array_equal(images, file["image"]) and np.array_equal(labels, file["label"])
    assert labels.dtype == np.int64
    assert not images.flags.writeable and isinstance(images.base, mmap.mmap), "mapped, not read"


def test_images_in_fortran_order_are_the_same_images(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
    images, _ = open_npz(write_npz(tmp_path / "x.npz", 50, image=np.asfortranarray(image)), 10)
    assert np.array_equal(images, image)


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux's /proc about memory")


@LINUX
def test_single_images_are_read_without_reading_ahead(tmp_path):
    """MADV_RANDOM, which the kernel shows as the flag rr of the mapping."""
    path = write_npz(tmp_path / "x.npz", 50)
    images, _ = open_npz(path, 10)
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    flags = [after.splitlines()[0].split() for before, after in zip(mappings, mappings[1:])
             if str(path) in before]
    assert len(flags) == 1 and "rr" in flags[0] and len(images) == 50


@LINUX
def test_twenty_million_images_cost_less_than_two_gb_of_anonymous_memory(tmp_path):
    """61 GB, as DM-AT would ship them, of which batches of 1,000 are read. The limit on the process's memory
    is there for a script that does read the file: it should not take the machine's."""
    path = write_sparse_npz(tmp_path / "big.npz", 20_000_000)
    assert path.stat().st_size > 61e9
    code = """if True:
        import json, resource, sys, torch
        from train_cifar import Data, parse_args
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        def anonymous():  # MiB
            lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
            return int(lines["RssAnon"].split()[0]) / 1024
        flags = ["--smoke", "--batch-size", "1000", "--synthetic-fraction", "0.9", "--dra-weight", "0"]
        args, before = parse_args([*flags, "--synthetic", sys.argv[1]]), anonymous()
        data = Data(args, torch.device("cpu"))
        after = anonymous()
        for step in range(20):
            images, labels = data.read(data.draw(step))
        memory = before, after, anonymous()
        print(json.dumps([data.n_synthetic, images.shape, int(images[100:].sum()), *memory]))
        """
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    assert done.returncode == 0, done.stderr
    count, shape, total, before, after, at_the_end = json.loads(done.stdout)
    assert count == 20_000_000 and shape == [1000, 32, 32, 3] and total == 0
    assert 140 < after - before < 400, "labels as int64 are 160 MB, and the real images 3 MB"
    assert at_the_end - after < 100, "what is read of the images is let go"
    assert at_the_end < 2000


def bad_npz_files(folder):
    """(what is wrong, how to write it, what the message says), one after the other."""
    image, label = np.zeros((5, 32, 32, 3), np.uint8), np.zeros(5, np.int64)
    path = folder / "bad.npz"
    mapped = "'image' cannot be mapped: "
    yield "images missing", lambda: np.savez(path, label=label), mapped
    yield "labels missing", lambda: np.savez(path, image=image), "'label' cannot be mapped: "
    yield "float images", lambda: np.savez(path, image=image / 255, label=label), "image is float64"
    yield ("channels first", lambda: np.savez(path, image=image.transpose(0, 3, 1, 2).copy(), label=label),
           r"image is uint8 \(5, 3, 32, 32\), .* expected uint8 \(N, 32, 32, 3\)")
    yield "one image", lambda: np.savez(path, image=image[0], label=label), r"image is uint8 \(32, 32, 3\)"
    yield "fewer labels", lambda: np.savez(path, image=image, label=label[:4]), r"label int64 \(4,\)"
    one_hot = np.eye(5, dtype=np.int64)
    yield "one-hot labels", lambda: np.savez(path, image=image, label=one_hot), r"label int64 \(5, 5\)"
    yield ("float labels", lambda: np.savez(path, image=image, label=label / 1),
           r"label float64 \(5,\); .*integers")
    yield ("label too large", lambda: np.savez(path, image=image, label=label + 10),
           "labels run from 10 to 10, expected 0 to 9")
    yield ("negative label", lambda: np.savez(path, image=image, label=label - 1),
           "labels run from -1 to -1, expected 0 to 9")
    yield ("compressed", lambda: np.savez_compressed(path, image=image, label=label),
           mapped + ".*it is compressed")
    yield ("pickled images", lambda: np.savez(path, image=np.array([{}, []], object), label=label),
           "object")
    yield "pickled labels", lambda: np.savez(path, image=image, label=np.array(5 * [{}])), "object"
    whole = write_npz(folder / "whole.npz", 5).read_bytes()
    yield "cut off", lambda: path.write_bytes(whole[:9000]), mapped
    yield "no zip", lambda: path.write_bytes(b"nothing"), mapped
    yield "empty file", lambda: path.write_bytes(b""), mapped
    yield "another zip", lambda: zipfile.ZipFile(path, "w").writestr("image.npy", b"not an array"), mapped
    page, pointer = b"\n<!DOCTYPE html><html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid 0"
    yield "a web page", lambda: path.write_bytes(page), r"is a web page \(HTML\), not the file itself"
    yield "an LFS pointer", lambda: path.write_bytes(pointer), "is a Git LFS pointer, .*: run git lfs pull"


def test_bad_npz_files_give_one_clear_line(tmp_path):
    for kind, write, message in bad_npz_files(tmp_path):
        write()
        with pytest.raises(InputError, match=message) as caught:
            open_npz(tmp_path / "bad.npz", 10)
        assert str(caught.value).startswith(f"{tmp_path / 'bad.npz'}: "), kind
        assert "\n" not in str(caught.value), kind


def test_an_array_of_objects_is_never_mapped(tmp_path):
    """Its elements would be addresses out of the file, and numpy follows them when it copies the array."""
    path = write_npz(tmp_path / "x.npz", 5, image=np.array([{}, []], object))
    with pytest.raises(InputError, match="x.npz: .*'image' cannot be mapped"):
        map_npz_member(path, "image")


def test_cifar10s_file_is_refused_for_cifar100(tmp_path):
    """DM-AT calls both files 1m.npz. One label above 9 is enough to tell them apart."""
    with pytest.raises(InputError, match="labels run from 0 to 9, expected 0 to 99"):
        open_npz(write_npz(tmp_path / "1m.npz", 50, label=np.arange(50) % 10), 100)
    assert len(open_npz(write_npz(tmp_path / "1m.npz", 50, label=np.arange(50)), 100)[1]) == 50


def test_a_header_that_promises_more_than_the_file_holds_is_named(tmp_path):
    path = write_npz(tmp_path / "x.npz", 5)
    path.write_bytes(path.read_bytes().replace(b"'shape': (5, 32,", b"'shape': (9, 32,"))
    with pytest.raises(InputError, match="x.npz: .*'image' cannot be mapped"):
        open_npz(path, 10)


# ------------------------------------------------------------------------------------------------ real images

def test_both_splits_of_a_folder_are_read_and_training_needs_only_one(folder):
    args = parse_args(["--device", "cpu", "--data-dir", str(folder)])
    Data(args, CPU)
    with pytest.raises(FileNotFoundError, match="test.npz"):
        load_real(args, "test")
    write_npz(folder / "test.npz", 30, seed=2)
    for split in ("train", "test"):
        images, labels = load_real(args, split)
        with np.load(folder / f"{split}.npz") as file:
            assert np.array_equal(images, file["image"]) and np.array_equal(labels, file["label"])
        assert images.flags.writeable and images.base is None, "real images are in memory"


@pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100"])
def test_torchvisions_own_arrays_are_taken(monkeypatch, tmp_path, dataset):
    """CIFAR as torchvision gives it: a transposed view, and labels in a list."""
    class Downloaded:
        def __init__(self, root, train, download):
            assert Path(root) == tmp_path and download
            images, labels = draw_smoke_images(60, seed=int(train))
            self.data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
            self.targets = labels.tolist()
    monkeypatch.setattr(train_cifar.torchvision.datasets, dataset, Downloaded)
    data = make_data(tmp_path, "--dataset", dataset.lower())
    assert data.batch(0).images.shape == (20, 3, 32, 32)
    for split, seed in (("test", 0), ("train", 1)):
        images, labels = load_real(data.args, split)
        expected = draw_smoke_images(60, seed)
        assert np.array_equal(images, expected[0]) and images.flags.c_contiguous
        assert np.array_equal(labels, expected[1]) and labels.dtype == np.int64


def test_a_download_that_fails_is_one_line_that_names_the_folder(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise RuntimeError("no route to host")
    monkeypatch.setattr(train_cifar.torchvision.datasets, "CIFAR10", fails)
    with pytest.raises(InputError, match=f"^--data-dir {tmp_path}: .*no route to host"):
        make_data(tmp_path)


# ---------------------------------------------------------------------------------------------------- batches

def test_draws_depend_on_seed_position_and_purpose_only():
    draw = lambda *key: torch.rand(3, generator=generator(*key)).tolist()
    assert draw(0, 5, "batch") == draw(0, 5, "batch")
    keys = [(0, 5, "batch"), (1, 5, "batch"), (0, 6, "batch"), (0, 5, "pass"), (5, 0, "batch")]
    assert len({tuple(draw(*key)) for key in keys}) == 5


def assert_same_batch(a, b, share=slice(None)):
    """Batch a is b's share, bit for bit."""
    for name in ("images", "labels", "start"):
        assert torch.equal(getattr(a, name), getattr(b, name)[share]), name
    assert len(a.teacher_noise) == len(b.teacher_noise) == 2
    for (sigma, noise), (other_sigma, other_noise) in zip(a.teacher_noise, b.teacher_noise):
        assert torch.equal(noise, other_noise[share])
        assert sigma == other_sigma if isinstance(sigma, float) else torch.equal(sigma, other_sigma[share])


@pytest.mark.parametrize("synthetic", [False, True])
def test_batches_do_not_depend_on_the_steps_before(folder, synthetic):
    """Nor on what was read ahead: a thread prepares the next step's images."""
    more = ["--synthetic", write_npz(folder / "a.npz", 300, seed=3)] if synthetic else []
    one, other = [make_data(folder, "--extra-sigma", *more) for _ in range(2)]
    for step in range(12):
        one.batch(step)
    for step in (12, 3):
        assert_same_batch(one.batch(step), other.batch(step))


def test_one_thread_reads_the_next_batch_while_this_step_computes(folder, monkeypatch):
    data, readers = make_data(folder), {}
    prepare = data.prepare

    def noted(step):
        readers[step] = threading.current_thread()
        return prepare(step)
    monkeypatch.setattr(data, "prepare", noted)
    data.batch(0)
    data.coming[1].result(timeout=60)  # it is on its way, although nobody has asked for it
    data.batch(1)
    data.coming[2].result(timeout=60)
    assert set(readers) == {0, 1, 2}, "none is read twice"
    assert len(set(readers.values())) == 1 and threading.current_thread() not in readers.values()


def test_an_error_of_the_reading_thread_reaches_the_run(folder, monkeypatch):
    data = make_data(folder)
    monkeypatch.setattr(data, "read", lambda index: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        data.batch(0)


def test_ranges_and_shapes_of_a_batch(folder):
    batch = make_data(folder, "--extra-sigma", "--eps", "4/255").batch(0)
    assert batch.images.shape == batch.start.shape == (20, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.images.min() == 0 and batch.images.max() == 1
    assert batch.start.min() >= 0 and batch.start.max() <= 1
    assert batch.labels.shape == (20,) and batch.labels.dtype == torch.int64
    distance = (batch.start - batch.images).abs()
    assert 3.9 / 255 < distance.max() <= 4 / 255 + 1e-6
    (sigma, noise), (drawn_sigma, drawn_noise) = batch.teacher_noise
    assert sigma == 0.06 and noise.shape == drawn_noise.shape == batch.images.shape
    assert not torch.equal(noise, drawn_noise)
    assert drawn_sigma.shape == (20,) and drawn_sigma.min() > 0


@pytest.mark.parametrize("flags, levels", [([], 1), (["--extra-sigma"], 2), (["--dra-weight", "0"], 0),
                                           (["--dra-weight", "0", "--extra-sigma"], 0)])
def test_teacher_gets_a_noise_for_each_of_its_targets(folder, flags, levels):
    assert len(make_data(folder, *flags).batch(0).teacher_noise) == levels


def test_extra_sigma_has_edms_training_distribution(folder):
    data = make_data(folder, "--extra-sigma", "--batch-size", 180)
    logs = torch.cat([data.batch(step).teacher_noise[1][0] for step in range(20)]).log()
    assert abs(logs.mean() + 1.2) < 0.1 and abs(logs.std() - 1.2) < 0.1


def test_crops_and_flips_are_all_equally_frequent(tmp_path):
    """Of images with one bright pixel: where it lands shows the crop and the flip."""
    image = np.zeros((40, 32, 32, 3), np.uint8)
    image[:, 15, 10] = 255
    write_npz(tmp_path / "train.npz", 40, image=image)
    data = make_data(tmp_path, "--batch-size", 500)
    places = torch.cat([data.batch(step).images[:, 0].flatten(1).argmax(1) for step in range(20)])
    rows, columns = places // 32, places % 32
    unflipped = columns <= 14
    assert rows.min() == 11 and rows.max() == 19 and abs(unflipped.float().mean() - 0.5) < 0.02
    shift = torch.where(unflipped, columns - 10, 21 - columns)  # mirrored, the pixel is in column 21
    counts = torch.stack([torch.bincount(offset, minlength=9) for offset in (rows - 11, shift + 4)])
    assert counts.shape == (2, 9) and (counts / 10_000 - 1 / 9).abs().max() < 0.015


def test_held_out_images_are_the_first_and_never_appear_in_batches(tmp_path):
    """A tenth of a small set, 1,024 of CIFAR. Here they are red, and no other image has any red."""
    image = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)
    image[20:, :, :, 0] = 0
    image[:20] = (255, 0, 0)
    write_npz(tmp_path / "train.npz", 200, image=image)
    np.savez(tmp_path / "a.npz", image=image[20:60], label=np.zeros(40, int))
    for more in ([], ["--synthetic", tmp_path / "a.npz"]):
        data = make_data(tmp_path, *more)
        assert (data.n_holdout, data.n_real) == (20, 180)
        batches = [data.batch(step).images for step in range(20)]  # without synthetic images: two passes
        assert all(images[:, 0].max() == 0 and images[:, 1].max() > 0.9 for images in batches)
        held_out = torch.cat([images for images, _, _ in data.holdout_batches()])
        assert len(held_out) == 20 and held_out[:, 0].min() == 1 and held_out[:, 1:].max() == 0


def test_a_large_set_holds_out_1024():
    args = parse_args(["--smoke"])
    images = np.zeros((50_000, 1, 1, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cifar, "load_real", lambda args, split: (images, np.zeros(50_000, np.int64)))
        data = Data(args, CPU)
    assert (data.n_holdout, data.n_real) == (1024, 48_976) and data.steps_per_epoch == 782, "50,000 / 64"


def test_held_out_images_and_their_starts_do_not_depend_on_the_processes(folder):
    """Each process takes its share, and the attack on an image begins where it would in a single process."""
    (images, labels, start), = make_data(folder).holdout_batches()
    with np.load(folder / "train.npz") as file:
        expected = torch.from_numpy(file["image"][:20]).permute(0, 3, 1, 2) / 255
        assert torch.equal(images, expected) and torch.equal(labels, torch.from_numpy(file["label"][:20]))
    distance = (start - images).abs()
    assert 7.9 / 255 < distance.max() <= 8 / 255 + 1e-6 and start.min() >= 0 and start.max() <= 1
    for rank in range(3):
        data = make_data(folder, "--batch-size", 21, rank=rank, world=3)
        share, = data.holdout_batches()
        for ours, whole in zip(share, (images, labels, start)):
            assert torch.equal(ours, whole[rank::3])


def test_real_images_come_in_reshuffled_whole_passes(folder):
    data = make_data(folder, "--batch-size", 50)  # 180 real images: passes end inside batches
    stream = np.concatenate([data.draw(step) for step in range(18)])
    passes = stream.reshape(5, 180)
    assert all(np.array_equal(np.sort(p), np.arange(20, 200)) for p in passes)
    assert not any(np.array_equal(passes[0], p) for p in passes[1:])


def test_a_batch_may_be_larger_than_all_real_images(folder):
    drawn = make_data(folder, "--batch-size", 450).draw(1)  # images 450 to 899 of the stream, of 180 a pass
    counts = np.bincount(drawn, minlength=200)
    assert len(drawn) == 450 and not counts[:20].any() and set(counts[20:]) == {2, 3}


def test_synthetic_share_and_the_epochs_length(folder):
    write_npz(folder / "a.npz", 30, seed=3)
    write_npz(folder / "b.npz", 50, seed=4)
    data = make_data(folder, "--synthetic", folder / "a.npz", folder / "b.npz")
    assert (data.batch_real, data.batch_synthetic) == (6, 14) and data.args.synthetic_fraction is None
    assert data.steps_per_epoch == 10, "200 training images / 20"
    drawn = np.stack([data.draw(step) for step in range(200)])
    assert (drawn[:, :6] < 200).all() and (drawn[:, 6:] >= 200).all() and drawn.max() == 279
    assert abs((drawn[:, 6:] < 230).mean() - 30 / 80) < 0.05, "both files by their size"


def test_images_and_labels_come_from_the_right_place_in_the_right_file(folder):
    """Real images and two synthetic files, numbered through; also the first and the last of each."""
    write_npz(folder / "a.npz", 30, seed=3)
    write_npz(folder / "b.npz", 50, seed=4)
    data = make_data(folder, "--synthetic", folder / "a.npz", folder / "b.npz")
    files = [np.load(folder / f"{name}.npz") for name in ("train", "a", "b")]
    image, label = [np.concatenate([file[name] for file in files]) for name in ("image", "label")]
    edges = np.array([279, 20, 199, 200, 229, 230, 0, 230])
    for index in (edges, data.draw(7), np.arange(280)):
        images, labels = data.read(index)
        assert np.array_equal(images, image[index]) and np.array_equal(labels, label[index]), "in that order"
        assert images.dtype == np.uint8 and labels.dtype == np.int64


def test_a_batch_holds_the_images_and_labels_that_were_drawn(tmp_path):
    """Image k of 250 in three files is grey of brightness k + 1: cropped and flipped, it is still known."""
    grey, label = np.arange(1, 251, dtype=np.uint8), np.arange(250) * 7 % 10
    image = np.broadcast_to(grey[:, None, None, None], (250, 32, 32, 3))
    for name, part in (("train", slice(0, 200)), ("a", slice(200, 230)), ("b", slice(230, 250))):
        np.savez(tmp_path / f"{name}.npz", image=image[part], label=label[part])
    data = make_data(tmp_path, "--synthetic", tmp_path / "a.npz", tmp_path / "b.npz", rank=1, world=2)
    for step in (0, 1, 7):
        batch, index = data.batch(step), data.draw(step)
        assert len(index) == 10 and (index >= 200).sum() == 7
        brightest = batch.images.amax(dim=(1, 2, 3)) * 255
        assert torch.equal(brightest.round(), torch.from_numpy(grey[index]).float())
        assert torch.equal(batch.labels, torch.from_numpy(label[index]))


@pytest.mark.parametrize("fraction, synthetic", [([], 358), (["0.8"], 409)])
def test_a_batch_of_512_is_split_as_in_dmat(folder, fraction, synthetic):
    """int(512 x 0.7) = 358 synthetic images, and the other 154 are real."""
    write_npz(folder / "a.npz", 30, seed=3)
    flags = ["--synthetic-fraction", *fraction] if fraction else []
    data = make_data(folder, "--batch-size", 512, "--synthetic", folder / "a.npz", *flags)
    assert data.batch_real == 512 - synthetic and (data.draw(0) >= 200).sum() == synthetic


def test_more_than_a_million_synthetic_images_are_80_percent_of_a_batch(folder, monkeypatch):
    files = {"1m.npz": 1_000_000, "more.npz": 1}
    monkeypatch.setattr(train_cifar, "open_npz", lambda path, classes: (None, np.zeros(files[path])))
    monkeypatch.setattr(train_cifar, "load_real", lambda args, split: draw_smoke_images(20, seed=0))
    batches = [make_data(folder, "--synthetic", *names).batch_synthetic for names in (["1m.npz"], files)]
    assert batches == [14, 16]


@pytest.mark.parametrize("synthetic", [False, True])
def test_processes_share_the_batch_of_one(folder, synthetic):
    more = ["--synthetic", write_npz(folder / "a.npz", 30, seed=3)] if synthetic else []
    whole = make_data(folder, "--extra-sigma", *more).batch(3)
    for rank in range(4):
        share = make_data(folder, "--extra-sigma", *more, rank=rank, world=4).batch(3)
        assert len(share.images) == 5
        assert_same_batch(share, whole, slice(rank, None, 4))


def test_a_batch_that_the_processes_cannot_share_equally_is_refused(folder):
    with pytest.raises(InputError, match=r"--batch-size 20: expected a multiple of 3 process\(es\) x"):
        make_data(folder, world=3)


def test_smoke_images_are_ten_balanced_classes():
    images, labels = draw_smoke_images(2000, seed=0)
    assert images.shape == (2000, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.bincount(labels, minlength=10).min() > 150
