"""experiments/ablate_teacher.py: an EDM encoder that learns to classify, noisy images without an attack or attacked ones
without noise."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import ablate_teacher
import train_cifar
from ablate_teacher import InputError, build_model, main, noisy_features, take_encoder
from edm_encoder import load_edm_encoder
from edm_pickles import dump, edm_file, randomise
from eval_autoattack import load_classifier
from kill_twenty_times import leaves

SCRIPT = ROOT / "experiments" / "ablate_teacher.py"
# A tiny network, with attention in the bottleneck alone.
NETWORK = {"img_resolution": 32, "label_dim": 10, "model_channels": 8, "channel_mult": [1, 1, 2], "num_blocks": 1,
           "attn_resolutions": []}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher's file."""
    path = tmp_path_factory.mktemp("teacher") / "edm.pkl"
    dump(edm_file(randomise(train_cifar.EDMEncoder(**NETWORK)), NETWORK), path)
    return path


@pytest.fixture(autouse=True)
def short_evaluation(monkeypatch):
    for name, value in (("SELECTION_STEPS", 1), ("TABLE_STEPS", 1), ("TABLE_IMAGES", 8)):
        monkeypatch.setattr(train_cifar, name, value)


@pytest.fixture
def small(teacher):
    """Flags of a run of four steps that saves after each: drawn images and the tiny teacher."""
    return ["--smoke", "--device", "cpu", "--teacher", str(teacher), "--batch-size", "16", "--attack-steps", "1", "--lr",
            "25000", "--max-steps", "4", "--save-every", "0.01", "--eval-every", "0.06"]


def without_attack(flags):
    where = flags.index("--attack-steps")
    return flags[:where] + flags[where + 2:]


def built(ablation, flags, monkeypatch):
    """(model before training, batch, args) as in a run."""
    monkeypatch.setattr(train_cifar, "build_model", build_model)  # put back what `take_encoder` replaces
    args = train_cifar.parse_args(flags)
    vars(args).update(ablate_teacher.DECIDED[ablation])
    assert take_encoder(ablation, args, torch.device("cpu")) is None, "nothing to align with"
    batch = train_cifar.Data(args, torch.device("cpu")).batch(0)
    return train_cifar.build_run(args, torch.device("cpu"), None)[0], batch, args


# --------------------------------------------------------------------------------------------------- finetune-encoder

def test_the_classifier_is_the_diffusion_models_encoder_without_noise_and_label(small, teacher, monkeypatch):
    model, batch, _ = built("finetune-encoder", small, monkeypatch)
    encoder = load_edm_encoder(teacher)
    expected = encoder(batch.images, None, 0.06, torch.zeros_like(batch.images))
    torch.testing.assert_close(model.features(batch.images), expected, rtol=1e-4, atol=1e-4)
    assert batch.teacher_noise == []
    assert torch.equal(model.features(batch.images), model.train().features(batch.images)), "nothing about it is random"
    assert not torch.allclose(expected, encoder(batch.images, batch.labels, 0.06, torch.zeros_like(batch.images)), atol=0.01)


def test_every_weight_that_matters_is_trained(small, monkeypatch):
    model, batch, _ = built("finetune-encoder", small, monkeypatch)
    model(batch.images).square().sum().backward()
    still = {name for name, weight in model.named_parameters() if not weight.grad.any()}
    assert still == {"encoder.model.map_label.weight"}, "what a label would be multiplied by"


def test_a_killed_run_continues_to_the_same_bits(small, tmp_path):
    """SIGKILL after the first checkpoint, then the same command again."""
    flags = ["finetune-encoder", *small, "--eval-every", "1", "--out"]
    process = subprocess.Popen([sys.executable, SCRIPT, *flags, tmp_path / "killed"], stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})  # sums take the same order
    while not (tmp_path / "killed/last.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / "killed/last.pt", weights_only=True)["step"] < 4
    for name in ("killed", "undisturbed"):
        main([*flags, str(tmp_path / name)])
    one, other = [dict(leaves(torch.load(tmp_path / name / "last.pt", weights_only=True))) for name in ("killed", "undisturbed")]
    assert one.keys() == other.keys()
    for name in one:
        if not name.endswith(("/out", "/images_per_s")):
            assert torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name], name


def test_a_checkpoint_needs_no_other_file_to_be_judged(small, teacher, tmp_path):
    main(["finetune-encoder", *small, "--out", str(tmp_path)])
    model = load_classifier(tmp_path / "best.pt", script=SCRIPT)
    images, saved = torch.rand(2, 3, 32, 32), torch.load(tmp_path / "best.pt", weights_only=True)["model_state_dict"]
    start = load_edm_encoder(teacher).state_dict()
    assert model.sigma == 0.06 and model(images).shape == (2, 10)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert not torch.equal(saved["encoder.model.dec.8x8_in1.conv1.weight"], start["model.dec.8x8_in1.conv1.weight"])


# --------------------------------------------------------------------------------------------------- noisy-classifier

def test_it_learns_from_what_the_teacher_would_have_seen(small, monkeypatch):
    """Each step sees 2x - 1 + sigma * noise, with the noise of an alignment run's batch, and no label."""
    model, batch, args = built("noisy-classifier", small, monkeypatch)
    images, [(sigma, noise)] = batch.images, batch.teacher_noise
    seen = []
    monkeypatch.setattr(ablate_teacher, "train_step", lambda model, averaged, projectors, teacher, optimizer, batch, *_: seen.append(batch.images))
    ablate_teacher.noisy_step(model, None, [], None, None, batch, 0.0, args)
    torch.testing.assert_close(2 * seen[0] - 1, 2 * images - 1 + 0.06 * noise)
    torch.testing.assert_close(model.features(seen[0]), model.encoder(images, None, sigma, noise), rtol=1e-3, atol=1e-5)
    assert model.encoder.label_dim == 0 and args.attack_steps == args.eps == args.beta == 0
    with_teacher = train_cifar.Data(train_cifar.parse_args(small), torch.device("cpu"))
    assert torch.equal(noise, with_teacher.batch(0).teacher_noise[0][1])
    assert not torch.equal(noise, with_teacher.batch(1).teacher_noise[0][1]), "fresh noise in every step"


def test_its_start_is_random(small, teacher, monkeypatch):
    weights = [built("noisy-classifier", [*small, "--seed", seed], monkeypatch)[0].encoder.model.dec["8x8_in1"].conv1.weight
               for seed in ("0", "0", "1")]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], load_edm_encoder(teacher).model.dec["8x8_in1"].conv1.weight)


def test_its_file_is_a_teacher_for_both_scripts(small, tmp_path, capsys):
    before = dict(vars(train_cifar))
    main(["noisy-classifier", *without_attack(small), "--out", str(tmp_path / "noisy")])
    assert vars(train_cifar) == before, "train_cifar.py has its own functions back"
    printed = capsys.readouterr().out
    assert "noisy classifier, best.pt" in printed and "linear probe on the diffusion model's features" in printed

    path, saved = tmp_path / "noisy/teacher.pt", torch.load(tmp_path / "noisy/best.pt", weights_only=True)
    teacher, source = load_edm_encoder(path), (np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8), None)
    classifier = load_classifier(tmp_path / "noisy/best.pt", script=SCRIPT)
    args = train_cifar.parse_args(small)
    assert teacher.label_dim == 0 and torch.equal(noisy_features(teacher, source, args), noisy_features(classifier.encoder, source, args))
    assert all(torch.equal(value, saved["model_state_dict"][f"encoder.{name}"]) for name, value in teacher.state_dict().items())

    flags = [*small, "--teacher", str(path), "--max-steps", "1"]
    train_cifar.main([*flags, "--out", str(tmp_path / "aligned")])
    assert "cosine" in torch.load(tmp_path / "aligned/last.pt", weights_only=True)["log"][-1]
    main(["finetune-encoder", *flags, "--out", str(tmp_path / "finetuned")])


def test_evaluation_repeats_its_noise(small, monkeypatch):
    model, _, args = built("noisy-classifier", small, monkeypatch)
    source = train_cifar.draw_smoke_images(20, seed=0)
    first, clean = noisy_features(model.encoder, source, args), model.features(torch.from_numpy(source[0]).permute(0, 3, 1, 2) / 255)
    assert torch.equal(first, noisy_features(model.encoder, source, args)) and not torch.allclose(first, clean)


# ------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("ablation, flags", [("noisy-classifier", ["--beta", "5"]), ("noisy-classifier", ["--attack-steps=3"]),
                                             ("finetune-encoder", ["--arch", "wrn-10-1"]), ("finetune-encoder", ["--dra-weight", "1"])])
def test_a_flag_that_the_ablation_decides_is_refused(ablation, flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([ablation, "--smoke", *flags, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and flags[0].split("=")[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arch", ["wrn-10-1", "{}", "[]", '{"layer": "dec.8x8_in1", "sigma": 0.06, "img_resolution": "x"}'])
def test_an_arch_of_another_script_is_named(arch):
    with pytest.raises(InputError, match="ablate_teacher.py"):
        build_model(arch, 10)


def test_a_damaged_teacher_is_one_line(tmp_path):
    (tmp_path / "edm.pkl").write_bytes(b"no teacher")
    done = subprocess.run([sys.executable, SCRIPT, "finetune-encoder", "--smoke", "--teacher", tmp_path / "edm.pkl", "--out", tmp_path / "out"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --teacher {tmp_path / 'edm.pkl'}: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
