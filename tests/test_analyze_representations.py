"""The analyses on inputs whose answers are known, and each command from checkpoint to figure."""
import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analyze_representations as analyze
import train_cifar
from analyze_representations import (InputError, ProbedTeacher, TopKSAE, accuracy_by_rank, alignment, classification_dimension, cknna, frequency_map, linear_probe,
                                     normalised_loss, pooled_activations, principal_components, radial_profile, robust_dimension, train_sae, unbiased_hsic, uniformity)
from edm_encoder import load_edm_encoder

FIXTURES = Path(__file__).parent / "fixtures"
EDM = str(FIXTURES / "edm_tiny_cond_vp.pkl")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- alignment and uniformity

def test_alignment_is_the_squared_distance_on_the_sphere():
    features, angle = normal(50, 2), 0.3
    turned = features @ torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    assert alignment(features, 5 * features) == pytest.approx(0, abs=1e-12), "lengths do not matter"
    assert alignment(features, turned) == pytest.approx(2 - 2 * math.cos(angle), rel=1e-5)
    assert alignment(features, -features) == pytest.approx(4)


def test_uniformity_of_uniform_points_on_a_sphere():
    """In three dimensions the cosine of two random directions is uniform in [-1, 1], so the mean of exp(-4 + 4 cos) is (1 - e^-8) / 8."""
    points = normal(3000, 3)
    assert uniformity(points) == pytest.approx(math.log((1 - math.exp(-8)) / 8), abs=0.02)
    assert uniformity(torch.ones(10, 3)) == pytest.approx(0, abs=1e-12), "all the same: the worst"
    assert uniformity(torch.tensor([[2.0, 0], [-1, 0]])) == pytest.approx(-8), "two opposite points"
    assert uniformity(points[:500]) < uniformity(points[:500] + 2), "less even where all lean to one side"


# -------------------------------------------------------------------------------------------------------------------- CKNNA

def test_cknna_agrees_with_its_authors_code():
    reference = np.load(FIXTURES / "cknna_reference.npz")
    a, b, c = [torch.from_numpy(reference[name]) for name in "abc"]
    for first, second, name in ((a, b, "ab"), (a, c, "ac"), (a, a, "aa")):
        assert cknna(first, second, int(reference["k"])) == pytest.approx(float(reference[f"cknna_{name}"]), abs=1e-5)


def cknna_by_definition(a, b, k):
    """With loops, straight from the definition: neighbours by rank, HSIC from sums over pairs and triples of different images."""
    def gram(features):
        rows = [row / math.sqrt(sum(value**2 for value in row)) for row in features.double().numpy()]
        return [[float(x @ y) for y in rows] for x in rows]

    def is_near(matrix, i, j):
        return sum(matrix[i][other] > matrix[i][j] for other in range(len(matrix)) if other != i) < k

    def agreement(K, L):
        m, pairs = len(K), list(itertools.permutations(range(len(K)), 2))
        mask = {(i, j): is_near(K, i, j) and is_near(L, i, j) for i, j in pairs}
        K, L = [{(i, j): mask[i, j] * matrix[i][j] for i, j in pairs} for matrix in (K, L)]
        trace = sum(K[i, j] * L[j, i] for i, j in pairs)
        totals = sum(K.values()) * sum(L.values()) / ((m - 1) * (m - 2))
        chain = sum(K[i, j] * L[j, l] for i, j in pairs for l in range(m) if l != j)
        return (trace + totals - 2 * chain / (m - 2)) / (m * (m - 3))
    K, L = gram(a), gram(b)
    return agreement(K, L) / (math.sqrt(agreement(K, K) * agreement(L, L)) + 1e-6)


def test_cknna_agrees_with_its_definition_and_knows_what_is_alike():
    a, unrelated = normal(200, 16), normal(200, 24, seed=1)
    related = torch.cat([a[:, :8], normal(200, 8, seed=2)], dim=1)
    rotation = torch.linalg.qr(normal(16, 16, seed=3))[0]
    for k in (2, 5):
        assert cknna(a[:16], related[:16], k) == pytest.approx(cknna_by_definition(a[:16], related[:16], k), abs=1e-10)
    assert cknna(a, a) == pytest.approx(1, abs=1e-3) and cknna(a, 3 * a @ rotation) == pytest.approx(1, abs=1e-3), "rotated and scaled is the same"
    assert abs(cknna(a, unrelated)) < 0.1 < 0.2 < cknna(a, related) < 0.9


def test_unbiased_hsic_is_the_mean_over_four_different_images():
    """The statistic that it abbreviates: the mean of K_ij L_ij + K_ij L_qr - 2 K_ij L_iq over different i, j, q, r."""
    K, L = [(matrix + matrix.T).double() for matrix in (normal(6, 6), normal(6, 6, seed=1))]
    terms = [K[i, j] * L[i, j] + K[i, j] * L[q, r] - 2 * K[i, j] * L[i, q] for i, j, q, r in itertools.permutations(range(6), 4)]
    torch.testing.assert_close(unbiased_hsic(K, L), torch.stack(terms).mean())


# ----------------------------------------------------------------------------------------------------------------- spectrum

@pytest.mark.parametrize("vertical, horizontal", [(0, 5), (7, 0), (3, -4)])
def test_a_pure_wave_has_one_frequency(vertical, horizontal):
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    y, x = y.double(), x.double()
    wave = torch.sin(2 * torch.pi * (vertical * y + horizontal * x) / 32 + 0.4)
    frequencies = frequency_map(torch.stack([wave, 1e-6 * wave])[:, None].expand(-1, 3, -1, -1))
    peaks = {tuple(index) for index in (frequencies > 1).nonzero().tolist()}
    assert peaks == {(16 + vertical, 16 + horizontal), (16 - vertical, 16 - horizontal)}
    assert frequencies.mean() == pytest.approx(1) and frequencies.sum() - frequencies[frequencies > 1].sum() < 1e-3
    assert radial_profile(frequencies).argmax() == round(math.hypot(vertical, horizontal)) and len(radial_profile(frequencies)) == 17


def test_white_noise_is_flat_and_small_signals_count_as_much_as_large_ones():
    noise = normal(400, 3, 16, 16)
    torch.testing.assert_close(radial_profile(frequency_map(noise))[1:], torch.ones(8).double(), atol=0.05, rtol=0)
    flat = torch.ones(400, 3, 16, 16)
    mixed = frequency_map(torch.cat([noise, 1e-9 * flat]))
    torch.testing.assert_close(mixed, (frequency_map(noise) + frequency_map(flat)) / 2)
    torch.testing.assert_close(frequency_map(torch.cat([noise, 0 * flat])), frequency_map(noise))  # what is 0 has no spectrum
    torch.testing.assert_close(radial_profile(torch.full((32, 32), 3.0)), torch.full((17,), 3.0))


# -------------------------------------------------------------------------------------------------------------- linear probe

def test_linear_probe_separates_what_is_separable_in_any_scale():
    labels = torch.arange(300) % 3
    features = 4 * F.one_hot(labels, 5).float() + normal(300, 5)
    predictions = []
    for scale, shift in ((torch.ones(5), 0), (torch.tensor([1e-3, 1, 1e3, 1, 10]), 100)):
        probe = linear_probe(features * scale + shift, labels, 3)
        logits = probe(features * scale + shift)
        assert (logits.argmax(dim=1) == labels).float().mean() > 0.97 and not probe.weight.requires_grad
        predictions.append(logits.softmax(dim=1))
    torch.testing.assert_close(*predictions, atol=0.01, rtol=0)
    noise = linear_probe(normal(300, 5, seed=1), labels, 3)
    assert (noise(normal(300, 5, seed=2)).argmax(dim=1) == labels).float().mean() < 0.5, "chance is a third"


# ------------------------------------------------------------------------------------------------------- sparse autoencoder

def test_sparse_autoencoder_recovers_a_dictionary():
    """Two of 40 directions at a time, in 32 dimensions: more directions than dimensions, and each is found."""
    dictionary, random = F.normalize(normal(40, 32), dim=1), torch.Generator().manual_seed(1)
    active = torch.rand(4000, 40, generator=random).topk(2, dim=1).indices
    codes = torch.zeros(4000, 40).scatter(1, active, 1 + torch.rand(4000, 2, generator=random))
    features = codes @ dictionary
    sae = train_sae(features[:3000], 80, 2, 1500, seed=0)
    found = (dictionary @ sae.decoder.T).amax(dim=1)  # cosine with the nearest column of W_dec
    assert normalised_loss(sae(features[3000:]), features[3000:]) < 0.05, "on data that it was not fitted to"
    assert (found > 0.95).float().mean() > 0.9
    assert (sae.encode(features) != 0).sum(dim=1).max() <= 2 and not sae.decoder.requires_grad
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(80))
    again = [train_sae(features[:3000], 80, 2, 3, seed) for seed in (0, 0, 1)]
    assert torch.equal(again[0].decoder, again[1].decoder) and not torch.equal(again[0].decoder, again[2].decoder)


def test_more_active_latents_explain_more_and_the_scale_is_that_of_the_mean():
    features = normal(500, 12)
    losses = [normalised_loss((sae := train_sae(features, 48, k, 300, seed=0))(features), features) for k in (1, 4, 12)]
    assert 1 > losses[0] > losses[1] > losses[2] > 0
    assert normalised_loss(features.mean(dim=0).expand(500, -1), features) == pytest.approx(1) and normalised_loss(features, features) == 0
    untrained = TopKSAE(12, 48, 3, torch.Generator().manual_seed(0))
    assert (untrained.encode(features) >= 0).all() and untrained(features).shape == features.shape


# --------------------------------------------------------------------------------------------------------------- dimensions

def test_features_of_rank_r_need_r_components():
    basis = torch.linalg.qr(normal(20, 20))[0][:4]  # four directions of twenty
    features = normal(500, 4, seed=1) * torch.tensor([2.0, 1.7, 1.4, 1.1]) @ basis + 0.3
    mean, components = principal_components(features)
    torch.testing.assert_close((basis.double() @ components[:, :4]).abs(), torch.eye(4).double(), atol=0.2, rtol=0)  # in order of variance
    torch.testing.assert_close(components.T @ components, torch.eye(20).double())
    head = torch.nn.Linear(20, 10).requires_grad_(False)
    labels = head(features).argmax(dim=1)
    accuracy = accuracy_by_rank(head, features, labels, mean, components)
    assert accuracy.shape == (21,) and (accuracy[4:] == 100).all() and accuracy[0] < accuracy[1] < accuracy[2] < accuracy[3] < 99
    assert accuracy[0] == 100 * (labels == head(mean.float()).argmax()).double().mean(), "without components all images are the mean"
    assert classification_dimension(accuracy, 1) == 4


def test_dimensions_are_read_off_the_accuracy():
    clean = torch.tensor([10.0, 40, 76, 75, 79, 80])
    assert classification_dimension(clean, 0.95) == 2, "the least that reaches 76 % = 0.95 x 80 %, even if the next falls below"
    assert classification_dimension(clean, 0.99) == 5 and classification_dimension(clean, 0) == 0
    assert robust_dimension(torch.tensor([10.0, 30, 42, 41, 42, 38])) == 2


def test_noise_in_minor_components_costs_accuracy_only_once_they_are_let_in():
    """As in Fig. 7: an adversary that acts outside the leading components is undone by the projection."""
    labels = torch.arange(400) % 2
    clean = torch.stack([8.0 * labels - 4, 0.1 * normal(400)], dim=1)
    attacked = clean + torch.stack([torch.zeros(400), 100.0 * (2 * labels - 1)], dim=1)
    head = lambda features: torch.stack([torch.zeros(len(features)), features[:, 0] - features[:, 1]], dim=1)  # leans on the minor direction
    mean, components = principal_components(clean)
    robust = accuracy_by_rank(head, attacked, labels, mean, components)
    assert robust.tolist() == [50, 100, 0] and robust_dimension(robust) == 1


# --------------------------------------------------------------------------------------------------------- teacher and commands

def test_probed_teacher_is_a_fixed_function_of_the_image():
    encoder, images = load_edm_encoder(EDM), torch.rand(4, 3, 32, 32)
    teacher = ProbedTeacher(encoder, 0.2, seed=3)
    torch.testing.assert_close(teacher.features(images), encoder(images, None, 0.2, teacher.noise.expand_as(images)))
    assert torch.equal(teacher.features(images), teacher.features(images)) and torch.equal(teacher.noise, ProbedTeacher(encoder, 0.5, seed=3).noise)
    torch.testing.assert_close(teacher.features(images)[2:], teacher.features(images[2:]))
    teacher.head = linear_probe(teacher.features(images).detach(), torch.arange(4), 4)
    images.requires_grad_()
    teacher(images).sum().backward()
    assert images.grad.abs().max() > 0, "an attack sees through noise and network"


def test_blocks_probed_together_are_those_probed_alone():
    args = analyze.parse_args(["probe", "--teacher", EDM, "--batch-size", "2", "--device", "cpu", "--seed", "1"])
    layers, images = ["enc.16x16_block0", "dec.8x8_in1"], torch.rand(5, 3, 32, 32)
    together = pooled_activations(load_edm_encoder(EDM), layers, images, 0.3, "test", args)
    for layer in layers:
        noise = torch.cat([torch.randn((min(2, 5 - i), 3, 32, 32), generator=train_cifar.generator(1, i, "test")) for i in (0, 2, 4)])
        torch.testing.assert_close(together[layer], load_edm_encoder(EDM, layer)(images, None, 0.3, noise))
    assert analyze.choose_layers(load_edm_encoder(EDM), None) == ["enc.32x32_block0", "enc.16x16_block0", "enc.8x8_block0", "dec.8x8_in0", "dec.8x8_in1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two training runs leave, one with alignment; their weights are random."""
    folder, rows = tmp_path_factory.mktemp("runs"), ({"step": 17, "epoch": 1.0, "lr": 0.1, "loss": 0.9, "trades": 1.8, "train_clean": 40.0, "train_robust": 30.0, "images_per_s": 9.0},
                                                     {"step": 34, "epoch": 2.0, "lr": 0.0, "loss": 0.5, "trades": 1.4, "train_clean": 50.0, "train_robust": 35.0, "images_per_s": 9.0,
                                                      "holdout_clean": 51.0, "holdout_robust": 33.0})
    for name, weight, seed in (("at", "0", "0"), ("dra", "1", "1")):
        args = train_cifar.parse_args(["--smoke", "--dra-weight", weight, "--seed", seed])
        (folder / name).mkdir()
        run = train_cifar.build_run(args, torch.device("cpu"), train_cifar.load_teacher(args, torch.device("cpu")))
        train_cifar.save_atomically(train_cifar.checkpoint(args, run, 34, 33.0), folder / name / "best.pt")
        train_cifar.start_log(folder / name / "log.csv", 0)
        for row in rows:
            train_cifar.write_log(folder / name / "log.csv", row | {"cosine": 0.9} if name == "dra" else row)
    return folder


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


SMALL = ["--n", "24", "--batch-size", "16", "--device", "cpu"]
COMMANDS = {  # command: its flags, and the columns of its tables
    "uniformity": (["--teacher", EDM, "--n-train", "40", "--steps", "1"], ["name n alignment uniformity clean_accuracy robust_accuracy"]),
    "cknna": (["--teacher", EDM, "--steps", "1"], ["name n k cknna clean_accuracy robust_accuracy"]),
    "spectrum": (["--teacher", EDM, "--n-train", "40", "--steps", "1"], ["name of waves_per_image amplitude", "name of vertical horizontal amplitude"]),
    "probe": (["--teacher", EDM, "--n-train", "40", "--steps", "1", "--sigmas", "0.1", "0.5"], ["sigma layer width n_train n accuracy", "name eps_255 accuracy"]),
    "sae": (["--n-train", "40", "--ks", "2", "4", "--sae-steps", "5"], ["name k latents n_train n normalised_loss normalised_loss_train dead_latents"]),
    "dims": (["--n-train", "40", "--steps", "1"], ["name n_train n features cls_95 cls_99 robust clean_accuracy robust_accuracy best_robust_accuracy",
                                                  "name components clean_accuracy robust_accuracy"]),
    "curves": ([], ["name step epoch lr loss trades train_clean train_robust images_per_s holdout_clean holdout_robust cosine"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_writes_its_tables_and_figure_and_overwrites_nothing(command, runs, tmp_path, monkeypatch):
    flags, columns = COMMANDS[command]
    inputs = [str(runs / name) for name in ("at", "dra")] if command == "curves" else [*(str(runs / name / "best.pt") for name in ("at", "dra")), *SMALL]
    monkeypatch.setitem(analyze.__dict__, "EPS_POINTS", 2)
    analyze.main([command, *inputs, *flags, "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(analyze.OUTPUTS[command])
    *tables, figure = analyze.OUTPUTS[command]
    for table, names in zip(tables, columns, strict=True):
        rows = read(tmp_path / "out" / table)
        assert list(rows[0]) == names.split() and all(math.isfinite(float(row[name])) for row in rows for name in row if name not in ("name", "of", "layer") and row[name])
        known = {row["name"] for row in rows if "name" in row} or {"at/best"}
        assert {"at", "dra"} <= known or {"at/best", "dra/best"} <= known or table == "probe.csv"
    picture = plt_read(tmp_path / "out" / figure)
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.01
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="is there already"):
        analyze.main([command, *inputs, *flags, "--out", str(tmp_path / "out")])
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def plt_read(path):
    import matplotlib.pyplot as plt
    return plt.imread(path)


def test_tables_are_a_function_of_the_seed(runs, tmp_path):
    """Images, attack, noise and minibatches: the same command gives the same numbers, another seed others."""
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        analyze.main(["uniformity", str(runs / "dra" / "best.pt"), *SMALL, *COMMANDS["uniformity"][0], "--seed", str(seed), "--out", str(tmp_path / out)])
    first, again, other = [(tmp_path / out / "uniformity.csv").read_text() for out in "abc"]
    assert first == again != other


def test_attack_stays_within_eps_and_a_larger_eps_costs_accuracy(runs):
    args = analyze.parse_args(["dims", str(runs / "at" / "best.pt"), *SMALL, "--steps", "5"])
    (model,) = analyze.load_models(args)
    (images, labels), (fit, _) = analyze.load_data(args)
    assert len(images) == 24 and args.eps == 8 / 255 and not torch.equal(images, fit[:24])
    losses = []
    for eps in (2 / 255, 32 / 255):
        adversarial = analyze.attack(model, images, labels, args, eps)
        assert (adversarial - images).abs().max() <= eps + 1e-6 and 0 <= adversarial.min() and adversarial.max() <= 1
        losses.append(F.cross_entropy(model(adversarial), labels).item())
    assert F.cross_entropy(model(images), labels) < losses[0] < losses[1]


def test_input_gradients_are_those_of_each_image_alone(runs):
    args = analyze.parse_args(["spectrum", str(runs / "at" / "best.pt"), *SMALL])
    (model,) = analyze.load_models(args)
    (images, labels), _ = analyze.load_data(args)
    x = images[3:4].clone().requires_grad_()
    F.cross_entropy(model(x), labels[3:4]).backward()
    torch.testing.assert_close(analyze.input_gradients(model, images, labels, args)[3:4], x.grad, rtol=1e-3, atol=1e-7)
