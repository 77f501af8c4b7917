"""experiments/ablate_teacher.py: an EDM encoder that learns to classify, noisy or attacked images."""
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

from helpers import ROOT, assert_one_line, differences, dump, edm_file, load, randomise
import ablate_teacher
import train_cifar
from ablate_teacher import InputError, accuracy, build_model, linear_probe, main, noisy_features, noisy_step
from edm_encoder import EDMEncoder, load_edm_encoder
from eval_autoattack import load_classifier

SCRIPT = ROOT / "experiments" / "ablate_teacher.py"
# A tiny network, with attention in the bottleneck alone.
NETWORK = {"img_resolution": 32, "label_dim": 10, "model_channels": 8, "channel_mult": [1, 1, 2],
           "num_blocks": 1, "attn_resolutions": []}
ATTACK = ["--attack-steps", "1", "--eval-every", "0.5"]  # noisy-classifier takes no such flag


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher's file."""
    path = tmp_path_factory.mktemp("teacher") / "edm.pkl"
    dump(edm_file(randomise(EDMEncoder(**NETWORK)), NETWORK), path)
    return path


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """40 drawn images of each split: 36 to train on, so three steps an epoch, and 4 held out."""
    draw = train_cifar.draw_smoke_images
    monkeypatch.setattr(train_cifar, "draw_smoke_images", lambda count, seed: draw(40, seed))
    monkeypatch.setattr(train_cifar, "SELECTION_STEPS", 1)


@pytest.fixture
def small(teacher):
    """Flags of a run of six steps, two epochs, in both ablations: drawn images and the tiny teacher."""
    return ["--smoke", "--device", "cpu", "--teacher", str(teacher), "--batch-size", "16", "--epochs", "2"]


def built(flags, teacher, build, **network):
    """(run before training, its first batch, args). network: changes to the teacher's."""
    encoder = load_edm_encoder(teacher)
    arch = json.dumps({"layer": encoder.layer, "sigma": 0.06, **encoder.arguments} | network)
    args = train_cifar.parse_args([*flags, "--arch", arch])
    data = train_cifar.Data(args, torch.device("cpu"))
    return train_cifar.build_run(args, data, None, 6, build), data.batch(0), args


def build_of(monkeypatch, flags):
    """The build_model and the flags that finetune-encoder hands to train_cifar.main."""
    handed = {}
    with monkeypatch.context() as patch:
        keep = lambda argv, build_model: handed.update(argv=argv, build=build_model)
        patch.setattr(train_cifar, "main", keep)
        main(["finetune-encoder", *flags])
    return handed["build"], train_cifar.parse_args(handed["argv"])


# ------------------------------------------------------------------------------------------ finetune-encoder

def test_the_classifier_is_the_diffusion_models_encoder_without_noise_and_label(small, teacher, monkeypatch):
    build, args = build_of(monkeypatch, small)
    model, encoder = build(args.arch, 10, "cifar10"), load_edm_encoder(teacher)
    images, labels = torch.rand(5, 3, 32, 32), torch.arange(5)
    expected = encoder(images, None, 0.06, torch.zeros_like(images))
    torch.testing.assert_close(model.features(images), expected, rtol=1e-4, atol=1e-4)
    assert args.dra_weight == 0 and args.attack_steps == 2, "attacked, and nothing to align with"
    assert torch.equal(model.features(images), model.train().features(images)), "nothing about it is random"
    told = encoder(images, labels, 0.06, torch.zeros_like(images))
    assert not torch.allclose(expected, told, atol=0.01)


def test_every_weight_that_matters_is_trained(small, teacher, monkeypatch):
    build, args = build_of(monkeypatch, small)
    model = build(args.arch, 10, "cifar10")
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    still = {name for name, weight in model.named_parameters() if not weight.grad.any()}
    assert still == {"encoder.model.map_label.weight"}, "what a label would be multiplied by"


def test_a_checkpoint_needs_no_other_file_to_be_judged(small, teacher, tmp_path):
    copy = shutil.copy(teacher, tmp_path / "copy.pkl")
    flags = [*small, *ATTACK, "--teacher", str(copy), "--epochs", "1"]
    main(["finetune-encoder", *flags, "--out", str(tmp_path / "run")])
    copy.unlink()
    model = load_classifier(tmp_path / "run/best.pt", script=SCRIPT)
    saved = torch.load(tmp_path / "run/best.pt", weights_only=True)["model_state_dict"]
    start = load_edm_encoder(teacher).state_dict()
    assert model.sigma == 0.06 and model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    name = "model.dec.8x8_in1.conv1.weight"
    change = (saved[f"encoder.{name}"] - start[name]).abs().max()
    assert 0 < change < 0.5 * start[name].abs().max(), "trained from the teacher's weights"


# ------------------------------------------------------------------------------------------ noisy-classifier

def test_it_learns_from_what_the_teacher_would_have_seen(small, teacher, monkeypatch):
    """Each step sees 2x - 1 + sigma * noise, with the noise of an alignment run's batch, and no label."""
    run, batch, args = built(small, teacher, build_model, label_dim=0)
    seen = []
    run.model.encoder.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    noisy_step(run, batch, 0.0, args)
    [(scaled, c_noise, class_labels)] = seen
    [(sigma, noise)] = batch.teacher_noise
    torch.testing.assert_close(scaled * (0.06**2 + 0.5**2) ** 0.5, 2 * batch.images - 1 + 0.06 * noise)
    assert sigma == 0.06 and c_noise[0] == pytest.approx(torch.tensor(0.06).log() / 4)
    assert class_labels.shape == (16, 0)
    aligned = train_cifar.Data(train_cifar.parse_args(small), torch.device("cpu"))
    assert torch.equal(noise, aligned.batch(0).teacher_noise[0][1])
    assert not torch.equal(noise, aligned.batch(1).teacher_noise[0][1]), "fresh noise in every step"


def test_a_step_is_cross_entropy_and_steps_lower_it(small, teacher):
    run, batch, args = built([*small, "--lr", "0.02"], teacher, build_model, label_dim=0)
    [(_, noise)] = batch.teacher_noise
    logits = run.model.head(run.model.features(batch.images, noise))
    loss, right = noisy_step(run, batch, 0.0, args)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.labels, label_smoothing=0.1).detach())
    assert right == 100 * (logits.argmax(1) == batch.labels).float().mean()
    for average, weight in zip(run.averaged.parameters(), run.model.parameters()):
        assert torch.equal(average, weight), "with a decay of 0 the average is the model"
    for _ in range(5):
        later = noisy_step(run, batch, 0.0, args)[0]
    assert later < loss - 0.05


def test_its_start_is_random(small, teacher):
    weights = [built([*small, "--seed", seed], teacher, build_model)[0].model.encoder.state_dict()
               for seed in ("0", "0", "1")]
    name = "model.dec.8x8_in1.conv1.weight"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])
    assert not torch.equal(weights[0][name], load_edm_encoder(teacher).state_dict()[name])


def test_its_file_is_a_teacher_for_both_scripts(small, teacher, tmp_path, capsys):
    out, flags = tmp_path / "noisy", list(small)
    main(["noisy-classifier", *flags, "--out", str(out)])
    printed = dict(re.findall(r"^  (\w.*?)  +([\d.]+) %$", capsys.readouterr().out, re.M))
    assert printed.keys() == {"noisy classifier", "linear probe on the diffusion model"}

    classifier = load_classifier(out / "last.pt", script=SCRIPT)
    new, old = load_edm_encoder(out / "teacher.pt"), load_edm_encoder(teacher)
    args = train_cifar.parse_args(small)
    (images, labels), (fit, fit_labels) = [train_cifar.load_real(args, split) for split in ("test", "train")]
    assert new.label_dim == 0 and new.layer == "dec.8x8_in1"
    state = classifier.encoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in new.state_dict().items())
    features = noisy_features(new, images, args)
    expected = accuracy(classifier.head, features, labels)
    assert float(printed["noisy classifier"]) == pytest.approx(expected, abs=0.01)
    probe = linear_probe(noisy_features(old, fit, args), torch.from_numpy(fit_labels), 10)
    expected = accuracy(probe, noisy_features(old, images, args), labels)
    assert float(printed["linear probe on the diffusion model"]) == pytest.approx(expected, abs=0.01)

    flags += [*ATTACK, "--teacher", str(out / "teacher.pt"), "--max-steps", "1"]
    train_cifar.main([*flags, "--out", str(tmp_path / "aligned")])
    assert "cosine" in torch.load(tmp_path / "aligned/last.pt", weights_only=True)["log"][-1]
    main(["finetune-encoder", *flags, "--out", str(tmp_path / "finetuned")])


def test_evaluation_repeats_its_noise(small, teacher):
    args, encoder = train_cifar.parse_args(small), load_edm_encoder(teacher)
    images, _ = train_cifar.draw_smoke_images(20, seed=0)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    first = noisy_features(encoder, images, args)
    clean = encoder(pixels, None, 0.06, torch.zeros_like(pixels))
    assert torch.equal(first, noisy_features(encoder, images, args)) and not torch.allclose(first, clean)


def test_linear_probe_separates_what_is_separable_in_any_scale_and_reaches_its_minimum():
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    features = 4 * F.one_hot(labels, 5).float() + noise
    scale = torch.tensor([1e-3, 1, 1e3, 1, 10])
    logits, scaled = [linear_probe(x, labels, 3)(x).detach() for x in (features, features * scale + 100)]
    assert accuracy(torch.nn.Identity(), logits, labels.numpy()) > 97
    torch.testing.assert_close(logits.softmax(1), scaled.softmax(1), atol=0.01, rtol=0)
    # The gradient of CE + decay / 2 |W|^2 vanishes. W is that of the line through the logits.
    standard = (features - features.mean(0)) / features.std(0)
    weight = torch.linalg.lstsq(standard, logits - logits.mean(0)).solution.T
    residual = (logits.softmax(1) - F.one_hot(labels, 3)) / 300
    gradient = residual.T @ standard
    assert gradient.abs().max() > 1e-3, "or the penalty would not be seen here"
    torch.testing.assert_close(gradient, -ablate_teacher.PROBE_DECAY * weight, atol=2e-4, rtol=0)
    torch.testing.assert_close(residual.sum(0), torch.zeros(3), atol=2e-4, rtol=0)


# --------------------------------------------------------------------------------------------- runs of both

@pytest.mark.parametrize("ablation, more", [("noisy-classifier", []),
                                            ("finetune-encoder", [*ATTACK, "--save-minutes", "0"])])
def test_a_run_that_ends_halfway_continues_to_the_same_bits(ablation, more, small, tmp_path, monkeypatch):
    """It ends after half of its six steps, at the next writing of a checkpoint."""
    flags, save = [ablation, *small, *more, "--out"], train_cifar.save

    def save_three_steps(out, about, run):
        if run.step > 3:
            raise KeyboardInterrupt
        save(out, about, run)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for script in (train_cifar, ablate_teacher):
            patch.setattr(script, "save", save_three_steps)
        main([*flags, str(tmp_path / "ended")])
    last = torch.load(tmp_path / "ended/last.pt", weights_only=True)
    assert last["step"] == 3 and not (tmp_path / "ended/teacher.pt").exists()
    for name in ("ended", "undisturbed"):
        main([*flags, str(tmp_path / name)])
    assert load(tmp_path / "ended" / "last.pt")["step"] == 6
    assert differences(tmp_path / "ended" / "last.pt", tmp_path / "undisturbed" / "last.pt") == []


def test_a_folder_with_another_recipe_is_refused(small, tmp_path):
    flags = ["noisy-classifier", *small, "--max-steps", "1", "--out", str(tmp_path)]
    main(flags)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(InputError, match="of a run with label_smoothing 0.1, not 0.2; change --out"):
        main([*flags, "--label-smoothing", "0.2"])
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_and_leaves_no_teacher(small, tmp_path):
    with pytest.raises(FloatingPointError, match="step [23]: "):
        main(["noisy-classifier", *small, "--lr", "1e30", "--out", str(tmp_path)])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 0
    assert not (tmp_path / "teacher.pt").exists()


@pytest.mark.parametrize("ablation", ["noisy-classifier", "finetune-encoder"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(ablation, small, tmp_path, capsys):
    main([ablation, *small, "--dry-run", "--out", str(tmp_path / "out")])
    assert "16 real + 0 synthetic" in capsys.readouterr().out and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("ablation, flags", [
    ("noisy-classifier", ["--beta", "5"]), ("noisy-classifier", ["--attack-steps=3"]),
    ("finetune-encoder", ["--arch", "wrn-10-1"]), ("finetune-encoder", ["--dra-weight", "1"])])
def test_a_flag_that_the_ablation_decides_is_refused(ablation, flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([ablation, "--smoke", *flags, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and flags[0].split("=")[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arch", ["wrn-10-1", "{}", "[]",
                                  '{"layer": "dec.8x8_in1", "sigma": 0.06, "img_resolution": "x"}'])
def test_an_arch_of_another_script_is_named(arch):
    with pytest.raises(InputError, match="ablate_teacher.py"):
        build_model(arch, 10)


def test_a_damaged_teacher_is_one_line(tmp_path):
    (tmp_path / "edm.pkl").write_bytes(b"no teacher")
    flags = ["finetune-encoder", "--smoke", "--teacher", tmp_path / "edm.pkl", "--out", tmp_path / "out"]
    assert_one_line("experiments/ablate_teacher.py", flags, f"error: {tmp_path / 'edm.pkl'}: ")
    assert not (tmp_path / "out").exists()
