"""experiments/train_edm.py: EDM's numbers, a run that continues exactly, and files that train_cifar.py
takes."""
import csv
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from helpers import (EDM as TINY, FIXTURES, HTML, LFS, PAGE, POINTER, assert_one_line, contents, differences,
                     load, randomise, start, write_npz, write_program)
import train_cifar
import train_edm
from edm_encoder import load_edm_encoder
from train_edm import (Denoiser, InputError, build_run, denoising_loss, draw_batch, initialise, load_denoiser,
                       main, parse_args, sample, to_pixels, train_step)

NETWORK = {"img_resolution": 32, "label_dim": 10, "model_channels": 8, "channel_mult": [1, 1, 1],
           "num_blocks": 1, "attn_resolutions": [16]}
FLAGS = ["--model-channels", "8", "--channel-mult", "1", "1", "1", "--num-blocks", "1", "--batch-size", "8",
         "--device", "cpu"]
TWELVE_STEPS = [*FLAGS, "--images", "96", "--save-minutes", "0"]  # saves in every step


@pytest.fixture(scope="module")
def reference():
    """What NVIDIA's code gives for the tiny network."""
    with np.load(FIXTURES / "edm_tiny_denoiser_reference.npz") as file:
        numbers = {name: torch.from_numpy(file[name]) for name in file.files}
    return numbers | {"y": numbers["image_uint8"].float() / 127.5 - 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of one's own, as a user would lay it down: 64 training and 20 test images."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 64), ("test", 20)):
        images, labels = train_cifar.draw_smoke_images(count, seed=0)
        np.savez(folder / f"{split}.npz", image=images, label=labels)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_pictures_and_many_rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_edm, "GRID", 1)
        patch.setattr(train_edm, "LOG_EVERY", 5)
        yield


@pytest.fixture
def impatient(monkeypatch):
    """A lock that is held is noticed at once, not after some seconds."""
    acquire = train_cifar.FileLock.acquire
    monkeypatch.setattr(train_cifar.FileLock, "acquire", lambda self, timeout=None: acquire(self, timeout=0))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """An undisturbed run of twelve steps, with a picture after every fourth."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_edm, "PICTURE_EVERY", 32)
        main([*TWELVE_STEPS, "--data-dir", str(folder), "--out", str(out)])
    return out


def close(ours, theirs):
    return (ours - theirs).norm() < 1e-4 * theirs.norm()


# ---------------------------------------------------------------------------------------------------- numbers

def test_denoised_images_loss_and_gradients_are_nvidias(reference):
    y, sigma, noise, label = [reference[name] for name in ("y", "sigma", "noise", "label")]
    denoiser = load_denoiser(TINY)
    noisy = y + sigma[:, None, None, None] * noise
    assert close(denoiser(noisy, sigma, label), reference["denoised_labelled"])
    assert close(denoiser(noisy, sigma, None), reference["denoised_unlabelled"])
    assert not close(reference["denoised_labelled"], reference["denoised_unlabelled"]), "the label matters"
    denoiser.requires_grad_(True)
    loss = denoising_loss(denoiser, y, label, sigma, noise)
    assert loss.shape == (4,) and close(loss, reference["loss_per_pixel_sum"])
    loss.mean().backward()
    assert close(denoiser.model.enc["32x32_conv"].weight.grad, reference["grad_enc_conv"])
    assert close(denoiser.model.dec["32x32_aux_conv"].weight.grad, reference["grad_dec_aux_conv"])


def test_samples_are_nvidias(reference):
    denoiser, latents, label = load_denoiser(TINY), reference["latents"], reference["label"]
    samples = sample(denoiser, latents, label)
    assert close(samples, reference["sampled"])
    assert close(sample(denoiser, latents, label, steps=8), reference["sampled_8_steps"])
    pixels = to_pixels(samples)  # rounding may tip over where the last digits differ
    assert pixels.dtype == torch.uint8 and (pixels != reference["sampled_uint8"]).float().mean() < 1e-3


def test_the_sampler_solves_the_equation_and_twice_the_steps_leave_a_quarter_of_the_error():
    """If images were N(0, s^2) noise, the best denoiser would be a factor, and the equation has a solution on
    paper."""
    s, z = 0.5, torch.randn(2, 3, 8, 8)
    denoiser = lambda x, sigma, labels: x * s**2 / (s**2 + sigma**2)
    exact = 80 * z * s / (s**2 + 80**2) ** 0.5
    errors = [((sample(denoiser, z, None, steps) - exact).norm() / exact.norm()).item()
              for steps in (18, 36, 72)]
    assert errors[0] < 0.08 and 3.5 < errors[0] / errors[1] < 5 and 3.5 < errors[1] / errors[2] < 5


def test_an_untrained_network_says_nothing_and_its_loss_is_one_per_pixel():
    """For images with EDM's assumed deviation of 0.5, at every noise level."""
    denoiser = Denoiser(**NETWORK)
    initialise(denoiser, seed=0)
    y, noise = 0.5 * torch.randn(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
    for sigma in (0.01, 0.5, 50.0):
        loss = denoising_loss(denoiser, y, None, torch.full((64,), sigma), noise) / y[0].numel()
        assert abs(loss.mean() - 1) < 0.02, sigma
    other = Denoiser(**NETWORK)
    initialise(other, seed=1)
    assert not torch.equal(denoiser.model.map_label.weight, other.model.map_label.weight)


def test_a_dropped_label_is_no_label():
    denoiser, noisy = load_denoiser(TINY), torch.randn(3, 3, 32, 32)
    mixed = denoiser(noisy, 1.0, torch.tensor([-1, 3, -1]))
    without, three = denoiser(noisy, 1.0, None), denoiser(noisy, 1.0, torch.full((3,), 3))
    torch.testing.assert_close(mixed, torch.stack([without[0], three[1], without[2]]))


# --------------------------------------------------------------------------------------------------- training

def small_run(*flags):
    args = parse_args([*FLAGS, *flags])
    images, labels = train_cifar.draw_smoke_images(20, seed=0)
    run = build_run(args, torch.device("cpu"), 10)
    return args, run, torch.from_numpy(images), torch.from_numpy(labels).long()


def step_of(run, images, labels, step, args):
    return train_step(run.model, run.averaged, run.optimizer, draw_batch(images, labels, step, args), step,
                      args)


def test_a_batch_depends_on_seed_and_step_alone_and_processes_share_it_out():
    args, _, images, labels = small_run()
    whole = draw_batch(images, labels, 5, args)
    shares = [draw_batch(images, labels, 5, args, rank, 2) for rank in (0, 1)]
    for tensor, *parts in zip(whole, *shares):
        assert torch.equal(tensor[0::2], parts[0]) and torch.equal(tensor[1::2], parts[1])
    assert not torch.equal(whole[3], draw_batch(images, labels, 6, args)[3])
    y, given, sigma, noise = whole
    assert y.shape == noise.shape == (8, 3, 32, 32) and given.shape == sigma.shape == (8,)
    assert -1 <= y.min() and y.max() <= 1


def test_a_pass_shows_every_image_once_half_of_them_mirrored_and_some_without_a_label():
    args, _, _, _ = small_run("--batch-size", "500", "--label-dropout", "0.1")
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None], (1000, 32, 32, 3)).copy()
    images, labels = torch.from_numpy(ramp), torch.arange(1000)
    batches = [draw_batch(images, labels, step, args) for step in (0, 1)]
    y, given, sigma, noise = [torch.cat(tensors) for tensors in zip(*batches)]
    shown = given[given >= 0]
    assert len(shown.unique()) == len(shown) and 0.05 < (given < 0).float().mean() < 0.15
    assert 0.4 < (y[:, 0, 0, 0] > y[:, 0, 0, -1]).float().mean() < 0.6
    assert abs(sigma.log().mean() + 1.2) < 0.15 and abs(sigma.log().std() - 1.2) < 0.15
    assert abs(noise.std() - 1) < 0.01


def test_the_average_follows_with_its_half_life_and_shares_nothing():
    args, run, images, labels = small_run("--lr", "0.1", "--images", "1")
    weights = lambda module: torch.cat([p.detach().flatten() for p in module.parameters()])
    storages = [{p.data_ptr() for p in module.parameters()} for module in (run.model, run.averaged)]
    assert not storages[0] & storages[1]
    step_of(run, images, labels, 0, args)
    assert torch.equal(weights(run.model), weights(run.averaged)), (
        "nothing of the first, random weights is kept")
    # 480 images so far, 5 % of them are 24, and a batch is 8: a third of the half-life
    before, step = weights(run.averaged), 60
    step_of(run, images, labels, step, args)
    torch.testing.assert_close(weights(run.averaged),
                               0.5 ** (1 / 3) * before + (1 - 0.5 ** (1 / 3)) * weights(run.model))
    # 30 million images so far: now it is half a million
    before, args.batch_size = weights(run.averaged), 500_000
    train_step(run.model, run.averaged, run.optimizer, draw_batch(images, labels, 0, small_run()[0]), step,
               args)
    torch.testing.assert_close(weights(run.averaged), (before + weights(run.model)) / 2)


def test_an_overflow_in_one_gradient_leaves_the_weights_finite():
    args, run, images, labels = small_run()
    run.model.model.map_label.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    assert step_of(run, images, labels, 0, args).isfinite()
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_learning_rate_rises_over_a_twentieth_of_the_images():
    args, run, images, labels = small_run("--lr", "1e-3", "--images", "1600")
    rates = []
    for step in (0, 4, 9, 10, 100):
        step_of(run, images, labels, step, args)
        rates.append(run.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [1e-4, 5e-4, 1e-3, 1e-3, 1e-3])


def test_dropout_acts_in_training_and_not_in_the_average():
    _, run, _, _ = small_run("--dropout", "0.5")
    randomise(run.model), randomise(run.averaged)
    noisy = torch.randn(2, 3, 32, 32)
    changes = lambda module: not torch.equal(module(noisy, 1.0), module(noisy, 1.0))
    assert changes(run.model) and not changes(run.averaged)


@pytest.mark.slow
def test_it_learns(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(train_edm, "LOG_EVERY", 25)
    main([*FLAGS, "--data-dir", str(folder), "--out", str(tmp_path), "--images", "400", "--dropout", "0",
          "--lr", "1e-2"])
    losses = [float(row["loss"]) for row in csv.DictReader(open(tmp_path / "log.csv"))]
    assert len(losses) == 2 and losses[1] < 0.9 * losses[0] < 0.9


# ------------------------------------------------------------------------------------------- a run, continued

def continue_and_compare(out, finished, folder):
    main([*TWELVE_STEPS, "--data-dir", str(folder), "--out", str(out)])
    assert differences(out / "edm.pt", finished / "edm.pt") == []
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(finished, folder, tmp_path):
    program = write_program(tmp_path / "run.py", "train_edm", GRID=1, LOG_EVERY=5)
    step = lambda: load(tmp_path / "edm.pt")["step"] if (tmp_path / "edm.pt").exists() else 0
    process = start(program, [*TWELVE_STEPS, "--data-dir", str(folder), "--out", str(tmp_path)])
    while step() < 3 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and 3 <= step() < 12
    continue_and_compare(tmp_path, finished, folder)


@pytest.mark.slow
@pytest.mark.parametrize("at, after", [(7, 7), (0, 0)])
def test_whatever_ends_a_run_it_continues_bit_for_bit(finished, folder, tmp_path, monkeypatch, at, after):
    def interrupted(*inputs):
        if inputs[-2] == at:
            raise KeyboardInterrupt
        return train_step(*inputs)
    monkeypatch.setattr(train_edm, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*TWELVE_STEPS, "--data-dir", str(folder), "--out", str(tmp_path)])
    monkeypatch.undo()
    monkeypatch.setattr(train_edm, "GRID", 1), monkeypatch.setattr(train_edm, "LOG_EVERY", 5)
    saved = load(tmp_path / "edm.pt")
    assert saved["step"] == after
    assert len(saved["recent"]) == after % 5, "losses that no row of the log has are kept"
    continue_and_compare(tmp_path, finished, folder)
    rows = [[row[name] for row in csv.DictReader(open(out / "log.csv")) for name in ("step", "loss")]
            for out in (tmp_path, finished)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_the_clock_decides_when_to_save(folder, tmp_path, monkeypatch):
    saved, save = [], train_edm.save
    noted = lambda path, recipe, run: saved.append(run.step) or save(path, recipe, run)
    monkeypatch.setattr(train_edm, "save", noted)
    main([*TWELVE_STEPS, "--save-minutes", "60", "--images", "24", "--data-dir", str(folder), "--out",
          str(tmp_path / "rarely")])
    assert saved == [0, 3], "before the first step and in the end"
    main([*TWELVE_STEPS, "--images", "24", "--data-dir", str(folder), "--out", str(tmp_path / "always")])
    assert saved[2:] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is_and_can_be_made_longer(finished, folder, tmp_path):
    before = (finished / "edm.pt").read_bytes()
    main([*TWELVE_STEPS, "--data-dir", str(folder), "--out", str(finished)])
    assert (finished / "edm.pt").read_bytes() == before
    (tmp_path / "edm.pt").write_bytes(before)
    main([*FLAGS, "--images", "104", "--data-dir", str(folder), "--out", str(tmp_path)])
    log = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert [int(row["step"]) for row in log] == [5, 10, 12, 13]
    assert sorted(path.name for path in finished.glob("*.png")) == [f"samples-{n:09d}.png"
                                                                    for n in (32, 64, 96)]


def test_nothing_is_overwritten_by_starting_anew(folder, tmp_path):
    (tmp_path / "log.csv").write_text("mine")
    with pytest.raises(InputError, match="has log.csv but no edm.pt to continue"):
        main([*TWELVE_STEPS, "--data-dir", str(folder), "--out", str(tmp_path)])
    assert (tmp_path / "log.csv").read_text() == "mine" and not (tmp_path / "edm.pt").exists()


def test_a_second_run_in_the_same_folder_is_refused(folder, tmp_path, impatient):
    with train_cifar.FileLock(tmp_path / "lock"), pytest.raises(InputError,
                                                                match="another run is at work there"):
        main([*TWELVE_STEPS, "--data-dir", str(folder), "--out", str(tmp_path)])
    assert not (tmp_path / "edm.pt").exists()


def test_a_checkpoint_that_would_run_code_is_refused(finished, folder, tmp_path):
    torch.save(load(finished / "edm.pt") | {"extra": os.getcwd}, tmp_path / "edm.pt")
    with pytest.raises(InputError, match="edm.pt: damaged"):
        main([*TWELVE_STEPS, "--data-dir", str(folder), "--out", str(tmp_path)])


def test_a_loss_that_is_not_finite_ends_the_run_and_nothing_of_it_is_saved(folder, tmp_path):
    with pytest.raises(FloatingPointError, match=r"(?=.*step [0-9]+)(?=.*not finite)(?=.*loss)"):
        main([*FLAGS, "--images", "96", "--lr", "1e30", "--data-dir", str(folder), "--out", str(tmp_path)])
    saved = load(tmp_path / "edm.pt")
    assert saved["step"] == 0
    assert all(tensor.isfinite().all() for tensor in saved["model_state_dict"].values())


# -------------------------------------------------------------------------------------- what the model is for

def test_the_file_is_a_teacher_with_labels_and_without(finished):
    saved = load(finished / "edm.pt")
    encoder, denoiser = load_edm_encoder(finished / "edm.pt"), load_denoiser(finished / "edm.pt")
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, saved["model_state_dict"][name])
        assert torch.equal(tensor, denoiser.model.state_dict()[name])
    assert encoder.label_dim == 10
    assert not any(p.requires_grad for p in [*encoder.parameters(), *denoiser.parameters()])
    for flags in ([], ["--teacher-unconditional"]):
        teacher = train_cifar.load_teacher(train_cifar.parse_args(["--smoke", "--teacher",
                                                                   str(finished / "edm.pt"), *flags]))
        labels = None if flags else torch.tensor([0, 9])
        assert teacher(torch.rand(2, 3, 32, 32), labels, 0.06).shape == (2, 8)


def test_a_model_without_labels(folder, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.copy(folder / "test.npz", tmp_path / "data")
    with np.load(folder / "train.npz") as file:
        np.savez(tmp_path / "data" / "train.npz", image=file["image"])
    flags = [*FLAGS, "--images", "16", "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    with pytest.raises(InputError, match="train.npz: .*label"):
        main(flags)
    shapes, save_image = [], train_edm.save_image
    monkeypatch.setattr(train_edm, "GRID", 3)
    monkeypatch.setattr(train_edm, "save_image", lambda images, *rest, **named: shapes.append(images.shape)
                        or save_image(images, *rest, **named))
    main([*flags, "--label-dropout", "1"])
    assert shapes == [(9, 3, 32, 32)], "no rows of classes"
    saved = load(tmp_path / "run" / "edm.pt")
    assert saved["edm_arguments"]["label_dim"] == 0
    assert not [name for name in saved["model_state_dict"] if "map_label" in name]

    # It is a teacher as any other, and has no images with labels to give.
    encoder, (images, noise) = load_edm_encoder(tmp_path / "run" / "edm.pt"), torch.randn(2, 2, 3, 32, 32)
    assert torch.equal(encoder(images, torch.tensor([0, 9]), 0.06, noise), encoder(images, None, 0.06, noise))
    teacher = train_cifar.load_teacher(train_cifar.parse_args(["--smoke", "--teacher",
                                                               str(tmp_path / "run" / "edm.pt")]))
    assert teacher.label_dim == 0 and teacher.width == 8
    with pytest.raises(InputError,
                       match="edm.pt: is a model without labels, and synthetic images need labels"):
        draw(tmp_path / "synthetic.npz", 4, tmp_path / "run" / "edm.pt")
    assert not list(tmp_path.glob("synthetic*"))

    np.savez(tmp_path / "data" / "train.npz", image=np.zeros((64, 16, 16, 3), np.uint8))
    with pytest.raises(InputError, match="train.npz: .* expected uint8"):
        main([*flags, "--label-dropout", "1"])


def draw(out, count, model, *flags, **processes):
    args = parse_args(["--sample", str(count), "--model", str(model), "--out", str(out), "--batch-size", "4",
                       "--device", "cpu", *flags])
    train_edm.draw_images(args, **processes)


@pytest.mark.slow
def test_synthetic_images_are_balanced_and_functions_of_seed_and_number(finished, tmp_path, monkeypatch,
                                                                        impatient):
    draw(tmp_path / "ten.npz", 10, TINY)
    images, labels = train_cifar.open_npz(tmp_path / "ten.npz", 10)
    assert images.shape == (10, 32, 32, 3) and labels.tolist() == list(range(10))
    latent = torch.randn(3, 32, 32, generator=train_cifar.generator(0, 9, "latent"))
    latents = latent[None].expand(4, -1, -1, -1)
    alone = to_pixels(sample(load_denoiser(TINY), latents, torch.full((4,), 9)))
    assert np.abs(alone[0].permute(1, 2, 0).numpy().astype(int) - images[9]).max() <= 1

    sampled, count = train_edm.sample, []
    monkeypatch.setattr(train_edm, "sample", lambda *inputs: count.append(1) or sampled(*inputs))
    draw(tmp_path / "other.npz", 4, TINY, "--seed", "1")
    with pytest.raises(FileNotFoundError):  # one of two processes alone: the other's parts are missing
        draw(tmp_path / "two.npz", 10, TINY, rank=0, world=2)
    parts = tmp_path / "two.npz.parts"
    assert sorted(part.name for part in parts.glob("*.npy")) == ["000000000.npy", "000000008.npy"]
    count.clear()
    for model, flags, named in ((finished / "edm.pt", (), "model edm_tiny_cond_vp.pkl, not edm.pt"),
                                (TINY, ("--seed", "1"), "seed 0, not 1"),
                                (TINY, ("--batch-size", "5"), "batch_size 4, not 5")):
        with pytest.raises(InputError, match=f"two.npz.parts: is of a run with {named}"):
            draw(tmp_path / "two.npz", 10, model, *flags)
    same_name = tmp_path / TINY.name
    shutil.copyfile(TINY, same_name)
    with pytest.raises(InputError, match="two.npz.parts: is of a run with time of the model"):
        draw(tmp_path / "two.npz", 10, same_name)
    (parts / "000000004.npy").write_bytes(b"half")
    with pytest.raises(InputError, match="000000004.npy: damaged; delete it"):
        draw(tmp_path / "two.npz", 10, TINY)
    (parts / "000000004.npy").unlink()
    with train_cifar.FileLock(parts / "lock"), pytest.raises(InputError,
                                                             match="another run is at work there"):
        draw(tmp_path / "two.npz", 10, TINY)
    assert not count
    draw(tmp_path / "two.npz", 10, TINY)
    assert len(count) == 1 and not parts.exists(), "only what was missing is drawn"
    assert np.array_equal(np.load(tmp_path / "two.npz")["image"], images)
    assert not np.array_equal(np.load(tmp_path / "other.npz")["image"], images[:4]), (
        "another seed, other images")


def test_the_plan_counts_edms_own_training(folder, tmp_path, capsys):
    main(["--dry-run", "--data-dir", str(folder), "--batch-size", "32", "--device", "cpu", "--out",
          str(tmp_path / "never")])
    plan = capsys.readouterr().out
    assert "55.73M parameters" in plan and "42.4 GFLOP" in plan and "2.54e+19 FLOP" in plan
    assert not (tmp_path / "never").exists()


# -------------------------------------------------------------------------------------------------- bad input

OUT, DRAW = "--out {}/never", "--sample 8 --out {}/never.npz --model"
MISTAKES = [  # flags, and what their line has to say
    (f"{OUT} --images 0", "--images"), (f"{OUT} --lr -1", "--lr"),
    (f"{OUT} --label-dropout 1.5", "--label-dropout"),
    (f"{OUT} --label-dropout=-0.1", "--label-dropout"), (f"{OUT} --dropout 1", "--dropout"),
    (f"{OUT} --save-minutes -1", "--save-minutes"), (f"{OUT} --channel-mult 0 1 1", "--channel-mult"),
    (f"{OUT} --model-channels 4", "--model-channels: '4'"), (f"{OUT} --batch-size 65", "--batch-size 65"),
    (f"{OUT} --model-channels 130 --batch-size 8", "--model-channels"),
    (f"{OUT} --channel-mult 1 1", "--channel-mult"),
    (f"{OUT} --sample 8", ".npz"), (f"{OUT} --sample 0", "--sample: '0'"),
    (f"{DRAW} {TINY} --dry-run", "--dry-run"),
    (f"{OUT} {' '.join(FLAGS)} --num-blocks 33", "--num-blocks"), (f"{OUT} --nonsense 1", "--nonsense"),
    (f"{OUT} --smoke --dataset cifar100", "--smoke"), (f"{OUT} --data-dir {{}}/none", "none"),
    (f"{OUT} {' '.join(FLAGS)} --data-dir {{}}/seven",
     "seven: no training image has label 9, expected 0 to 9"),
    (f"{DRAW} {{}}/none.pt", "none.pt"), (f"{DRAW} {{}}/page.pt", f"page.pt: {PAGE}"),
    (f"{DRAW} {{}}/pointer.pt", f"pointer.pt: {LFS}"), (f"{DRAW} {TINY} --dataset cifar100", "10 classes"),
    (f"{DRAW} {{}}/other.pt", "other.pt: damaged, refused or no EDM network"),
    (f"{DRAW} {TINY} --out {{}}/there.npz", "there.npz: is there already"),
    (f"--out {{}}/run {' '.join(TWELVE_STEPS)} --data-dir {{}}/NAME",
     "edm.pt: is of a run with number of images 64, not 10"),
    (f"--out {{}}/run {' '.join(FLAGS)} --lr 0.5", "edm.pt: is of a run with lr 0.001, not 0.5"),
]


def test_a_mistake_on_the_command_line_gives_one_line_and_writes_nothing(finished, folder, tmp_path,
                                                                         monkeypatch):
    def no_network(*_, **__):
        raise RuntimeError("no network")
    monkeypatch.setattr(train_cifar.torchvision.datasets, "CIFAR10", no_network)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "page.pt").write_bytes(HTML)
    (tmp_path / "pointer.pt").write_bytes(POINTER)
    torch.save({"step": 3}, tmp_path / "other.pt")
    (tmp_path / "there.npz").write_text("mine")
    for name, labels in ((folder.name, np.arange(10)), ("seven", np.arange(8) % 7)):
        (tmp_path / name).mkdir()
        write_npz(tmp_path / name / "train.npz", len(labels), label=labels)
    before = contents(tmp_path)
    for flags, named in MISTAKES:
        command = f"--device cpu --data-dir {folder} {flags}".replace("NAME", folder.name)
        command = command.replace("{}", str(tmp_path))
        assert_one_line("experiments/train_edm.py", command.split(), named)
    assert contents(tmp_path) == before


def test_damaged_files_give_one_clear_line(finished, tmp_path):
    """The same reader is behind train_cifar.py's --teacher."""
    whole, path = (finished / "edm.pt").read_bytes(), tmp_path / "edm.pt"
    saved = load(finished / "edm.pt")
    damaged = [(whole[:len(whole) // 2], "damaged"), (whole[:100] + bytes(1000) + whole[1100:], "damaged"),
                ({"model_state_dict": saved["model_state_dict"]}, "damaged"),
                (saved | {"edm_arguments": 3}, "damaged"),
                (saved | {"edm_arguments": saved["edm_arguments"] | {"num_blocks": 2}}, "is missing"),
                (saved | {"edm_arguments": saved["edm_arguments"] | {"model_channels": 16}},
                 r" is \[.*\], expected \["),
                (saved | {"edm_arguments": saved["edm_arguments"] | {"colour": "red"}}, "colour"),
                (saved | {"model_state_dict": dict.fromkeys(saved["model_state_dict"], 3)}, "is missing"),
                # a function is not data
                (saved | {"model_state_dict": {"os": os.getcwd}}, "damaged, refused")]
    for content, message in damaged:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        for read in (load_edm_encoder, load_denoiser):
            with pytest.raises(ValueError, match=message) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
