"""experiments/generate_imagenet.py: the same numbers as LightningDiT's sampler, files that survive anything,
one clear line for bad input."""
import json
import re
import resource
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import FIXTURES, run, start
import generate_imagenet
import train_imagenet
from dit_encoder import build_dit, build_vae
from generate_imagenet import (Generator, InputError, VAEDecoder, complete, forwards_per_image,
                               load_generator, main, parse_args, read_levels, time_grid, to_pixels)

DIT, VAE, STATS = [FIXTURES / f"dit_sample_{name}.pt" for name in ("dit", "vae", "latents_stats")]
SMOKE = ["--smoke", "--format", "png", "--steps", "4"]  # lossless, so that pixels can be compared
TINY = ["--generator", *map(str, (DIT, VAE, STATS)), "--num-heads", "2", "--image-size", "32", "--device",
        "cpu"]


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "dit_sample_reference.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def tiny():
    return load_generator(DIT, VAE, STATS, num_heads=2, image_size=32)


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


def settings(reference):
    return {"steps": int(reference["num_steps"]) - 1, "guidance_from": float(reference["cfg_interval_start"]),
            "shift": float(reference["timestep_shift"])}


def files(folder):
    """Every file under a folder by its path, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


# ---------------------------------------------------------------------------------------------------- numbers

def test_velocities_are_lightningdits(tiny, reference):
    z, t, nobody = reference["z0"], torch.full((4,), 0.37), torch.full((4,), tiny.num_classes)
    assert relative_error(tiny.velocity(z, t, reference["label"]), reference["velocity_labelled"]) < 1e-4
    assert relative_error(tiny.velocity(z, t, nobody), reference["velocity_unlabelled"]) < 1e-4


def test_time_grids_are_upstreams():
    with np.load(FIXTURES / "dit_sample_reference.npz") as file:
        for points in (12, 250):
            np.testing.assert_allclose(time_grid(points - 1, 0.3), file[f"times_{points}"], atol=1e-6)


@pytest.mark.parametrize("kind", ["guided", "plain"])
def test_samples_are_upstreams(tiny, reference, kind):
    guidance = float(reference["cfg_scale"]) if kind == "guided" else 1
    z = tiny.sample(reference["z0"], reference["label"], guidance=guidance, **settings(reference))
    assert z.dtype == torch.float32 and relative_error(z, reference[f"latents_{kind}"]) < 1e-4
    images = tiny.decode(z)
    assert relative_error(images, reference[f"decoded_{kind}"].float()) < 1e-3, "the file has float16"
    pixels = to_pixels(images)
    assert pixels.dtype == torch.uint8 and (pixels.int() - reference[f"images_{kind}"].int()).abs().max() <= 1


def test_pixels_are_cut_off_like_upstreams():
    assert to_pixels(torch.tensor([-2.0, -1, 0, 0.999 / 127.5, 1, 2])).tolist() == [0, 0, 128, 128, 255, 255]


def velocity_is(change):
    """A generator with a velocity that can be calculated by hand; the labelled one is 1 in all channels, the
    other `change`."""
    generator = load_generator(DIT, VAE, STATS, num_heads=2, image_size=32)
    calls = []

    def velocity(z, t, rows):
        calls.append((t[0].item(), len(z)))
        return torch.where(rows == 10, change, 1.0)[:, None, None, None] * torch.ones_like(z)
    generator.velocity = velocity
    return generator, calls


def test_guidance_acts_on_three_channels_and_late_times_only():
    """From z = 0, one unit of time with velocity 1: channels end at 1, guided ones at 1 - (w - 1) times the
    guided share of the way."""
    generator, calls = velocity_is(2.0)
    noise, labels = torch.zeros(5, 8, 8, 8), torch.arange(5)
    times = time_grid(20, 0.3)
    first = next(i for i, t in enumerate(times) if t >= 0.4)
    z = generator.sample(noise, labels, steps=20, guidance=3, guidance_from=0.4)
    torch.testing.assert_close(z[:, 3:], torch.ones(5, 5, 8, 8))
    torch.testing.assert_close(z[:, :3],
                               torch.full((5, 3, 8, 8),
                                          times[first] + (1 - times[first]) * (2 + 3 * (1 - 2))))
    assert [size for _, size in calls] == [5] * first + [10] * (20 - first), (
        "two halves only where guidance acts")
    z = generator.sample(noise, labels, steps=20, guidance=3, guidance_from=0, all_channels=True)
    torch.testing.assert_close(z, torch.full_like(z, -1))


@pytest.mark.parametrize("flags, forwards",
                         [([], 417), (["--guidance-from", "0"], 498), (["--guidance", "1"], 249),
                          (["--steps", "31"], 52),
                                             (["--heun", "--steps", "31"], 105),
                                             (["--heun", "--steps", "16", "--guidance", "1"], 32)])
def test_forwards_are_counted_as_they_are_made(flags, forwards):
    args = parse_args([*TINY, *flags])
    generator, calls = velocity_is(0.0)
    generator.sample(torch.zeros(1, 8, 8, 8), torch.tensor([0]), args.steps, args.guidance,
                     args.guidance_from, args.shift, args.heun)
    assert forwards_per_image(args) == forwards == sum(size for _, size in calls)


def test_heuns_error_falls_with_the_square_of_the_step(tiny, reference):
    """And Euler's with its first power, as they should where nothing switches guidance on halfway."""
    sample = lambda steps, heun: tiny.sample(reference["z0"][:1], reference["label"][:1], steps, guidance=1,
                                             heun=heun)
    truth = sample(60, True)
    euler, heun = [[relative_error(sample(steps, heun), truth) for steps in (10, 20)]
                   for heun in (False, True)]
    assert 1.6 < euler[0] / euler[1] < 2.6 and heun[0] / heun[1] > 3, (euler, heun)
    assert relative_error(sample(10, True), truth) < euler[1], "at equal cost"


def test_full_size_networks_have_the_files_names_and_shapes():
    """675M parameters on the meta device: every tensor of LightningDiT's file is used, and of VA-VAE's all
    that the decoder needs."""
    def manifest(file):
        return {name: SimpleNamespace(shape=torch.Size(shape))
                for name, shape in json.loads((FIXTURES / file).read_text()).items()}
    dit_file, vae_file = manifest("lightningdit_xl_1_manifest.json"), manifest("vavae_f16d32_manifest.json")
    with torch.device("meta"):
        dit = complete(build_dit(dit_file, 27, 16), 16, 3072)
        vae = VAEDecoder(read_levels(build_vae(vae_file)), 32)
        generator = Generator(dit, vae, 256).to("meta")
    assert generator.latent_shape == (32, 16, 16) and generator.num_classes == 1000
    z = generator.sample(torch.zeros(1, 32, 16, 16, device="meta"),
                         torch.zeros(1, dtype=torch.int64, device="meta"), steps=1)
    assert z.shape == (1, 32, 16, 16) and generator.decode(z).shape == (1, 3, 256, 256)
    shapes = lambda module: {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert shapes(dit) == {name: tensor.shape for name, tensor in dit_file.items()}
    assert shapes(vae) == {name: tensor.shape for name, tensor in vae_file.items()
                           if name.startswith(("decoder.", "post_quant_conv."))}


# ------------------------------------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke run, undisturbed, with lossless images."""
    out = tmp_path_factory.mktemp("smoke") / "images"
    since = time.time()
    main([*SMOKE, "--per-class", "5", "--out", str(out)])
    assert time.time() - since < 30
    return out


def test_smoke_run_writes_as_many_images_of_each_class(smoke):
    names = {f"{label:04}/{number:05}.png" for label in range(4) for number in range(5)}
    written = files(smoke)
    assert names == set(written) - {"lock", "settings.json"}
    assert len({written[name] for name in names}) == 20, "all different"
    with Image.open(smoke / "0003/00004.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"


def test_an_image_depends_on_seed_class_and_number_alone(smoke, tmp_path):
    """Not on how many are asked for, in batches of which size, or on how the disk stores them, to a grey
    level."""
    def pixels(folder, name):
        return np.array(Image.open(folder / name)).astype(int)
    main([*SMOKE, "--per-class", "3", "--batch-size", "5", "--out", str(tmp_path / "other")])
    same = [pixels(tmp_path / "other", name) - pixels(smoke, name) for name in files(tmp_path / "other")
            if name.endswith(".png")]
    assert len(same) == 12 and np.abs(same).max() <= 1 and np.mean(np.abs(same) > 0) < 1e-3
    main([*SMOKE, "--per-class", "1", "--seed", "1", "--out", str(tmp_path / "seed")])
    assert np.abs(pixels(tmp_path / "seed", "0000/00000.png") - pixels(smoke, "0000/00000.png")).max() > 10


def test_processes_share_the_work_without_talking(smoke, tmp_path, monkeypatch):
    """One after the other here: nobody waits for anybody, except for the first one's look at the folder."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    counts = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        main([*SMOKE, "--per-class", "5", "--out", str(tmp_path)])
        counts.append(sum(name.endswith(".png") for name in files(tmp_path)))
    assert counts == [8, 16, 20] and files(tmp_path) == files(smoke)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(generate_imagenet, "draw",
                        lambda *_: pytest.fail("all of its images are there already"))
    main([*SMOKE, "--per-class", "5", "--out", str(tmp_path)])


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    many = ["--per-class", "20", "--batch-size", "6"]
    main([*SMOKE, "--out", str(tmp_path / "whole"), *many])
    out = tmp_path / "killed"
    process = start("experiments/generate_imagenet.py", [*SMOKE, "--out", str(out), *many])
    while len(list(out.glob("*/*.png"))) < 20 and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in out.glob("*/*.png")}
    assert 20 <= len(there) < 80, "it was killed in the middle"
    (out / "0003" / "00019.png.tmp").write_bytes(b"half")  # as a kill while it writes leaves it
    main([*SMOKE, "--out", str(out), *many])
    assert files(out) == files(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == when for path, when in there.items()), (
        "what was done is not done again")


def test_a_full_disk_ends_it_and_leaves_no_half_image(tmp_path):
    """No file may grow beyond 2,000 bytes, which settings.json and small JPEGs fit into, and PNGs of 32 px do
    not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        done = run("experiments/generate_imagenet.py", *SMOKE, "--out", tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 2 and done.err.splitlines()[-1].startswith("error: ")
    assert (tmp_path / "full" / "settings.json").exists()
    assert not [name for name in files(tmp_path / "full") if name.endswith(".png")]


def test_preview_shows_the_first_image_of_each_class(smoke, tmp_path):
    main([*SMOKE, "--preview", str(tmp_path / "grid.png"), "--out", str(tmp_path / "nothing")])
    grid = np.array(Image.open(tmp_path / "grid.png")).astype(int)
    assert grid.shape == (36, 138, 3)
    assert not (tmp_path / "nothing").exists(), "4 images of 32 px with borders of 2"
    for label in range(4):
        image = np.array(Image.open(smoke / f"{label:04}" / "00000.png"))
        assert np.abs(grid[2:34, 2 + 34 * label:34 + 34 * label] - image).max() <= 1
    with pytest.raises(InputError, match="grid.png: exists, choose another name"):
        main(["--smoke", "--preview", str(tmp_path / "grid.png")])


def test_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    main([*TINY, "--dry-run", "--per-class", "7", "--out", str(tmp_path / "nothing")])
    printed = capsys.readouterr().out
    assert "70 = 10 classes x 7, 32 px" in printed and "417 forwards an image" in printed
    assert "400 TFLOP/s (assumed" in printed
    forward, decoder, each, total = [float(number) for number in re.search(
        r"cost +(\S+) GFLOP a forward, (\S+) the decoder: (\S+) TFLOP an image, (\S+) FLOP",
        printed).groups()]
    assert 1000 * each == pytest.approx(417 * forward + decoder, rel=1e-2)
    assert total == pytest.approx(70e12 * each, rel=1e-2)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_training_takes_the_folder_as_it_is(tmp_path):
    """The seam: class folders of the real images give the names, and `train_imagenet.py --synthetic` reads
    the result."""
    data, out = tmp_path / "data", tmp_path / "drawn"
    train_imagenet.draw_smoke_folders(data, seed=0)
    for path in data.glob("train/*/*.jpg"):
        if int(path.stem) >= 4:  # few are enough here
            path.unlink()
    main(["--smoke", "--classes-from", str(data / "train"), "--per-class", "3", "--steps", "2", "--out",
          str(out)])
    train_imagenet.main(["--smoke", "--arch", "test_convnext", "--image-size", "32", "--workers", "0",
                         "--batch-size", "20", "--attack-steps", "1", "--dra-weight", "0",
                         "--data", str(data), "--synthetic", str(out), "--max-steps", "2", "--out",
                         str(tmp_path / "run")])
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 2 and saved["classes"] == [f"class{label}" for label in range(10)]
    assert train_imagenet.Folder(out).labels.tolist() == [label for label in range(10) for _ in range(3)]


# ----------------------------------------------------------------------------------------------------- errors

def save(path, value):
    torch.save(value, path)
    return path


def changed(path, section, change):
    content = torch.load(path, weights_only=True)
    change(content[section] if section else content)
    return content


def unfit_files():
    """(which of the three files, its content, other sizes, what the message says), ..."""
    dit = lambda change: changed(DIT, "ema", change)
    vae = lambda change: changed(VAE, "state_dict", change)
    read = lambda path: torch.load(path, weights_only=True)
    final, up = "module.final_layer.linear.weight", "decoder.up.1.upsample.conv.weight"
    return [
        ("dit", read(VAE), {}, "expected a LightningDiT checkpoint, this is a VA-VAE checkpoint"),
        ("vae", read(STATS), {}, "expected a VA-VAE checkpoint, this is latent statistics"),
        ("stats", read(DIT), {}, "expected latent statistics, this is a LightningDiT checkpoint"),
        ("dit", dit(lambda tensors: tensors.pop(final)), {}, "lacks final_layer.linear.weight"),
        ("dit", dit(lambda tensors: tensors.pop("module.blocks.2.mlp.w3.bias")), {},
         "lacks blocks.2.mlp.w3.bias"),
        ("dit", dit(lambda tensors: tensors.update({final: torch.zeros(16, 32)})), {},
         "final_layer.linear.weight is [16, 32], expected [8, 32]"),
        ("dit", dit(lambda tensors: tensors.update({final: torch.full((8, 32), torch.nan)})), {},
         "final_layer.linear.weight is not finite"),
        ("dit", dit(lambda tensors: tensors.update({"module.final_layer.norm_final.bias": torch.zeros(32)})),
         {}, "it has final_layer.norm_final.bias"),
        ("vae", vae(lambda tensors: tensors.pop(up)), {}, f"lacks {up}"),
        ("vae", vae(lambda tensors: tensors.pop("decoder.conv_in.weight")), {},
         "lacks decoder.conv_in.weight"),
        ("vae", vae(lambda tensors: tensors.pop("post_quant_conv.bias")), {}, "lacks post_quant_conv.bias"),
        ("vae", vae(lambda tensors: tensors.update({"decoder.up.0.block.2.conv1.bias": torch.zeros(32)})), {},
         "it has decoder.up.0.block.2.conv1.bias"),
        ("vae", read(VAE), {"image_size": 64}, f"makes 32 px of the 64 tokens of {DIT}, not image_size=64"),
        ("vae", read(VAE), {"image_size": 33}, "not image_size=33"),
        ("dit", read(DIT), {"num_heads": 16}, "it has 2 heads, not num_heads=16"),
        ("stats",
         changed(STATS, None, lambda tensors: tensors.update(std=torch.full((1, 8, 1, 1), torch.nan))), {},
         "std is not finite"),
        ("stats", changed(STATS, None, lambda tensors: tensors.update(mean=torch.zeros(1, 4, 1, 1))), {},
         "mean is [1, 4, 1, 1], expected [1, 8, 1, 1]"),
    ]


def test_files_that_do_not_fit_give_one_clear_line(tmp_path):
    for i, (which, content, sizes, message) in enumerate(unfit_files()):
        paths = {"dit": DIT, "vae": VAE, "stats": STATS} | {which: save(tmp_path / f"{i}.pt", content)}
        with pytest.raises(InputError) as caught:
            load_generator(*paths.values(), **{"num_heads": 2, "image_size": 32} | sizes)
        line = str(caught.value)
        assert line.startswith(f"{paths[which]}: ") and message in line and "\n" not in line, (i, line)
    with pytest.raises(InputError, match=f"^{re.escape(str(VAE))}: expected a LightningDiT checkpoint"):
        main(["--generator", str(VAE), str(DIT), str(STATS), *TINY[4:], "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_a_folder_of_something_else_is_left_alone(smoke, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else, expected a new or empty folder"):
        main(["--smoke", "--out", str(tmp_path)])
    assert set(files(tmp_path)) == {"precious.txt"}
    before = files(smoke)
    for change, message in ((["--steps", "3"], "steps 4, not 3"), (["--seed", "9"], "seed 0, not 9"),
                            (["--guidance", "2"], "guidance 6.7, not 2.0"),
                            (["--heun"], "heun False, not True"),
                            (["--format", "jpg"], "format png, not jpg"),
                            (TINY, rf"generator None, not \W*{DIT.name}\W+{VAE.name}\W+{STATS.name}\W*")):
        with pytest.raises(InputError, match=f"holds images drawn with {message}; choose another --out"):
            main([*SMOKE, "--out", str(smoke), *change])
    assert files(smoke) == before


def test_a_second_run_in_the_same_folder_is_kept_out(tmp_path, monkeypatch):
    """Through train_imagenet.py's lock, which has its own test. Nothing is written before it is held."""
    def held(folder):
        assert folder == tmp_path
        raise InputError(f"{folder}: another run is at work there")
    monkeypatch.setattr(generate_imagenet, "lock", held)
    with pytest.raises(InputError, match="another run"):
        main([*SMOKE, "--out", str(tmp_path)])
    assert not files(tmp_path)


def test_class_folders_have_to_be_the_networks(smoke, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="has 2 class folders, expected the 10 classes"):
        main([*TINY, "--classes-from", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(OSError, match="nowhere"):
        main(["--smoke", "--classes-from", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--steps", "2.5"], ["--per-class", "0"],
                                   ["--shift", "0"], ["--guidance", "-1"], ["--seed", "-1"],
                                   ["--format", "gif"],
                                   ["--preview", "grid.gif"]])
def test_flags_that_cannot_be_used(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args([*TINY, *flags])
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args([])  # without files


def test_latents_that_are_not_finite_are_never_written(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_imagenet.Generator, "sample", lambda self, noise, *_: noise * torch.nan)
    with pytest.raises(FloatingPointError, match="latents are not finite in the batch of images"):
        main(["--smoke", "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*/*"))
