"""The analyses on inputs whose answers are known, and each command from checkpoint to figure."""
import csv
import itertools
import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyautoattack
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import analyze_representations as analyze
import train_cifar
import train_imagenet
from analyze_representations import (InputError, ProbedTeacher, TopKSAE, accuracy_by_rank, alignment, cknna,
                                     classification_dimension, frequency_map, linear_probe, normalised_loss,
                                     pooled_activations, principal_components, radial_profile,
                                     robust_dimension, train_sae, unbiased_hsic, uniformity)
from edm_encoder import load_edm_encoder
from eval_autoattack import load_classifier, load_imagenet

FIXTURES = Path(__file__).parent / "fixtures"
EDM = str(FIXTURES / "edm_tiny_cond_vp.pkl")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------- alignment and uniformity

def test_alignment_is_the_squared_distance_on_the_sphere():
    features, angle = normal(50, 2), 0.3
    cos, sin = math.cos(angle), math.sin(angle)
    turned = features @ torch.tensor([[cos, sin], [-sin, cos]])
    assert alignment(features, 5 * features) == pytest.approx(0, abs=1e-12), "lengths do not matter"
    assert alignment(features, turned) == pytest.approx(2 - 2 * cos, rel=1e-5)
    assert alignment(features, -features) == pytest.approx(4)


def test_uniformity_of_uniform_points_on_a_sphere():
    """In 3-D the cosine of random directions is uniform in [-1, 1]: E exp(4 cos - 4) = (1 - e^-8) / 8."""
    points = normal(3000, 3)
    assert uniformity(points) == pytest.approx(math.log((1 - math.exp(-8)) / 8), abs=0.02)
    assert uniformity(torch.ones(10, 3)) == pytest.approx(0, abs=1e-12), "all the same: the worst"
    assert uniformity(torch.tensor([[2.0, 0], [-1, 0]])) == pytest.approx(-8), "two opposite points"
    assert uniformity(points[:500]) < uniformity(points[:500] + 2), "less even where all lean to one side"


# ------------------------------------------------------------------------------------------------------ CKNNA

def test_cknna_agrees_with_its_authors_code():
    reference = np.load(FIXTURES / "cknna_reference.npz")
    a, b, c = [torch.from_numpy(reference[name]) for name in "abc"]
    for first, second, name in ((a, b, "ab"), (a, c, "ac"), (a, a, "aa")):
        expected = float(reference[f"cknna_{name}"])
        assert cknna(first, second, int(reference["k"])) == pytest.approx(expected, abs=1e-5)


def cknna_by_definition(a, b, k):
    """With loops, straight from the definition: neighbours by rank, HSIC from sums over pairs and triples."""
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
        expected = cknna_by_definition(a[:16], related[:16], k)
        assert cknna(a[:16], related[:16], k) == pytest.approx(expected, abs=1e-10)
    assert cknna(a, a) == pytest.approx(1, abs=1e-3)
    assert cknna(a, 3 * a @ rotation) == pytest.approx(1, abs=1e-3), "rotated and scaled is the same"
    assert abs(cknna(a, unrelated)) < 0.1 < 0.2 < cknna(a, related) < 0.9


def test_unbiased_hsic_is_the_mean_over_four_different_images():
    """What it abbreviates: the mean of K_ij L_ij + K_ij L_qr - 2 K_ij L_iq over different i, j, q, r."""
    K, L = [(matrix + matrix.T).double() for matrix in (normal(6, 6), normal(6, 6, seed=1))]
    terms = [K[i, j] * L[i, j] + K[i, j] * L[q, r] - 2 * K[i, j] * L[i, q]
             for i, j, q, r in itertools.permutations(range(6), 4)]
    torch.testing.assert_close(unbiased_hsic(K, L), torch.stack(terms).mean())


# --------------------------------------------------------------------------------------------------- spectrum

@pytest.mark.parametrize("vertical, horizontal", [(0, 5), (7, 0), (3, -4)])
def test_a_pure_wave_has_one_frequency(vertical, horizontal):
    """0.3 on 32 x 32 pixels: half at the frequency, half at its mirror image, times 32 (orthonormal FFT)."""
    y, x = torch.meshgrid(torch.arange(32).double(), torch.arange(32).double(), indexing="ij")
    wave = 0.3 * torch.sin(2 * torch.pi * (vertical * y + horizontal * x) / 32 + 0.4)
    frequencies = frequency_map(wave.expand(2, 3, 32, 32))
    expected = torch.zeros(32, 32).double()
    expected[16 + vertical, 16 + horizontal] = expected[16 - vertical, 16 - horizontal] = 0.3 * 32 / 2
    torch.testing.assert_close(frequencies, expected)
    profile = radial_profile(frequencies)
    assert profile.argmax() == round(math.hypot(vertical, horizontal))
    assert (profile > 1e-9).sum() == 1 and len(profile) == 17


def test_white_noise_is_flat_a_constant_is_frequency_0_and_maps_are_means_over_images():
    noise, flat = 0.1 * normal(300, 3, 16, 16), torch.ones(300, 3, 16, 16)
    profile = radial_profile(frequency_map(noise))
    torch.testing.assert_close(profile[1:], torch.full((8,), 0.0886).double(), atol=0.003, rtol=0)
    assert profile[0] == pytest.approx(0.0798, abs=0.006)  # a real coefficient
    assert radial_profile(frequency_map(flat)).tolist() == pytest.approx([16] + 8 * [0])
    mean = (frequency_map(noise) + frequency_map(flat)) / 2
    torch.testing.assert_close(frequency_map(torch.cat([noise, flat])), mean)
    torch.testing.assert_close(frequency_map(3 * noise), 3 * frequency_map(noise))  # size counts
    torch.testing.assert_close(radial_profile(torch.full((32, 24), 3.0)), torch.full((13,), 3.0))


# ----------------------------------------------------------------------------------------------- linear probe

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
    x = features * scale + shift
    weight, bias = (probe.weight * x.std(dim=0)).requires_grad_(), torch.zeros(3, requires_grad=True)
    standard = (x - x.mean(dim=0)) / x.std(dim=0)
    logits = standard @ weight.T + probe.bias + probe.weight @ x.mean(dim=0) + bias
    (F.cross_entropy(logits, labels) + analyze.PROBE_DECAY / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3, "the minimum of the objective that the docstring states"
    assert bias.grad.abs().max() < 1e-3
    noise = linear_probe(normal(300, 5, seed=1), labels, 3)
    assert (noise(normal(300, 5, seed=2)).argmax(dim=1) == labels).float().mean() < 0.5, "chance is a third"


# ----------------------------------------------------------------------------------------- sparse autoencoder

def test_sparse_autoencoder_recovers_a_dictionary():
    """Two of 40 directions at a time, in 32 dimensions: more directions than dimensions, all found."""
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
    assert torch.equal(again[0].decoder, again[1].decoder)
    assert not torch.equal(again[0].decoder, again[2].decoder)


def test_more_active_latents_explain_more_and_the_scale_is_that_of_the_mean():
    features = normal(500, 12)
    autoencoders = [train_sae(features, 48, k, 300, seed=0) for k in (1, 4, 12)]
    losses = [normalised_loss(sae(features), features) for sae in autoencoders]
    assert 1 > losses[0] > losses[1] > losses[2] > 0
    assert normalised_loss(features.mean(dim=0).expand(500, -1), features) == pytest.approx(1)
    assert normalised_loss(features, features) == 0
    untrained = TopKSAE(12, 48, 3, torch.Generator().manual_seed(0))
    assert (untrained.encode(features) >= 0).all() and untrained(features).shape == features.shape


# ------------------------------------------------------------------------------------------------- dimensions

def test_features_of_rank_r_need_r_components():
    basis = torch.linalg.qr(normal(20, 20))[0][:4]  # four directions of twenty
    features = normal(500, 4, seed=1) * torch.tensor([2.0, 1.7, 1.4, 1.1]) @ basis + 0.3
    mean, components = principal_components(features)
    in_order = (basis.double() @ components[:, :4]).abs()  # of variance
    torch.testing.assert_close(in_order, torch.eye(4).double(), atol=0.2, rtol=0)
    torch.testing.assert_close(components.T @ components, torch.eye(20).double())
    head = torch.nn.Linear(20, 10).requires_grad_(False)
    labels = head(features).argmax(dim=1)
    accuracy = accuracy_by_rank(head, features, labels, mean, components)
    assert accuracy.shape == (21,) and (accuracy[4:] == 100).all()
    assert accuracy[0] < accuracy[1] < accuracy[2] < accuracy[3] < 99
    constant = 100 * (labels == head(mean.float()).argmax()).double().mean()
    assert accuracy[0] == constant, "without components all images are the mean"
    assert classification_dimension(accuracy, 1) == 4


def test_dimensions_are_read_off_the_accuracy():
    clean = torch.tensor([10.0, 40, 76, 75, 79, 80])
    assert classification_dimension(clean, 0.95) == 2, "reaches 76 % = 0.95 x 80 %; the next falls below"
    rounded = torch.tensor([10.0, 28.5, 30]).double()
    assert classification_dimension(rounded, 0.95) == 1, "28.5 is 95 % of 30, whatever binary fractions say"
    assert classification_dimension(clean, 0.99) == 5 and classification_dimension(clean, 0) == 0
    assert robust_dimension(torch.tensor([10.0, 30, 42, 41, 42, 38])) == 2


def test_noise_in_minor_components_costs_accuracy_only_once_they_are_let_in():
    """As in Fig. 7: an adversary that acts outside the leading components is undone by the projection."""
    labels = torch.arange(400) % 2
    clean = torch.stack([8.0 * labels - 4, 0.1 * normal(400)], dim=1)
    attacked = clean + torch.stack([torch.zeros(400), 100.0 * (2 * labels - 1)], dim=1)
    minor = lambda x: torch.stack([torch.zeros(len(x)), x[:, 0] - x[:, 1]], dim=1)  # leans on the second
    mean, components = principal_components(clean)
    robust = accuracy_by_rank(minor, attacked, labels, mean, components)
    assert robust.tolist() == [50, 100, 0] and robust_dimension(robust) == 1


# --------------------------------------------------------------------------------------- teacher and commands

def test_probed_teacher_is_a_fixed_function_of_the_image():
    encoder, images = load_edm_encoder(EDM), torch.rand(4, 3, 32, 32)
    teacher = ProbedTeacher(encoder, 0.2, seed=3)
    expected = encoder(images, None, 0.2, teacher.noise.expand_as(images))
    torch.testing.assert_close(teacher.features(images), expected)
    assert torch.equal(teacher.features(images), teacher.features(images))
    assert torch.equal(teacher.noise, ProbedTeacher(encoder, 0.5, seed=3).noise)
    torch.testing.assert_close(teacher.features(images)[2:], teacher.features(images[2:]))
    teacher.head = linear_probe(teacher.features(images).detach(), torch.arange(4), 4)
    images.requires_grad_()
    teacher(images).sum().backward()
    assert images.grad.abs().max() > 0, "an attack sees through noise and network"


def test_blocks_probed_together_are_those_probed_alone():
    command = ["probe", "--teacher", EDM, "--batch-size", "2", "--device", "cpu", "--seed", "1"]
    args = analyze.parse_args(command)
    layers, images = ["enc.16x16_block0", "dec.8x8_in1"], torch.rand(5, 3, 32, 32)
    together = pooled_activations(load_edm_encoder(EDM), layers, images, 0.3, args)
    for layer in layers:
        randoms = {i: train_cifar.generator(1, i, "grid noise") for i in (0, 2, 4)}  # one for each batch
        noise = torch.cat([torch.randn((min(2, 5 - i), 3, 32, 32), generator=randoms[i]) for i in randoms])
        torch.testing.assert_close(together[layer], load_edm_encoder(EDM, layer)(images, None, 0.3, noise))
    chosen = ["enc.32x32_block0", "enc.16x16_block0", "enc.8x8_block0", "dec.8x8_in0", "dec.8x8_in1"]
    assert analyze.choose_layers(load_edm_encoder(EDM), None) == chosen


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What two training runs leave, one with alignment; their weights are random."""
    folder = tmp_path_factory.mktemp("runs")
    rows = ({"step": 17, "epoch": 1.0, "lr": 0.1, "loss": 0.9, "trades": 1.8, "train_clean": 40.0,
             "train_robust": 30.0, "images_per_s": 9.0},
            {"step": 34, "epoch": 2.0, "lr": 0.0, "loss": 0.5, "trades": 1.4, "train_clean": 50.0,
             "train_robust": 35.0, "images_per_s": 9.0, "holdout_clean": 51.0, "holdout_robust": 33.0})
    for name, weight in (("at", "0"), ("dra", "1"), ("strong", "4")):
        args = train_cifar.parse_args(["--smoke", "--dra-weight", weight])
        (folder / name).mkdir()
        data = train_cifar.Data(args, torch.device("cpu"))
        run = train_cifar.build_run(args, data, train_cifar.load_teacher(args))
        for parameter in run.averaged.parameters():
            parameter.data += 0.05 * normal(*parameter.shape, seed=len(name))
        run.step, run.log = 34, list(rows)
        train_cifar.keep_best(args, run, rows[-1])
        about = {"args": vars(args), "arch": args.arch, "dataset": args.dataset, "num_classes": 10}
        train_cifar.save(folder / name, about, run)
        aligned = {"cosine": 0.9} if name != "at" else {}
        train_cifar.write_log(folder / name / "log.csv", [row | aligned for row in rows], 0)
    return folder


THREE = ("cknna", "spectrum", "sweep")  # commands that get three networks or runs
SMALL = ["--n", "24", "--batch-size", "16", "--device", "cpu"]
PROBED = ["--teacher", EDM, "--n-train", "40", "--steps", "1"]
FLAGS = {"uniformity": PROBED, "cknna": ["--teacher", EDM, "--steps", "1", "--k", "5"], "spectrum": PROBED,
         "probe": [*PROBED, "--sigmas", "0.5", "0.1"],
         "sae": ["--n-train", "40", "--ks", "4", "2", "--sae-steps", "5"],
         "dims": ["--n-train", "40", "--steps", "1"], "curves": [], "sweep": []}


def given(command, runs):
    """The command line, less --out."""
    names = ["at", "dra", "strong"][:3 if command in THREE else 2]
    if command in ("curves", "sweep"):
        return [command, *(str(runs / name) for name in names)]
    return [command, *(str(runs / name / "best.pt") for name in names), *SMALL, *FLAGS[command]]


def read_table(path):
    with open(path, newline="") as file:
        return [{key: value if key in ("name", "of", "layer", "judged_by") else float(value or "nan")
                 for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def results(runs, tmp_path_factory):
    """Every command, run once: a function command -> (its tables by name, its figure's axes, its folder)."""
    out, known, figures = tmp_path_factory.mktemp("analysis"), {}, {}

    def result(command):
        if command not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(analyze, "EPS_POINTS", 2)
                patch.setattr(analyze.plt, "close", lambda figure: figures.update({command: figure}))
                analyze.main([*given(command, runs), "--out", str(out)])
            tables = {path.stem: read_table(path) for path in out.glob(f"{command}*.csv")}
            known[command] = tables, figures[command].axes, out
        return known[command]
    return result


@pytest.fixture(scope="module")
def parts(runs):
    """What commands load, to redo their rows: (args, classifiers, test pair, pair to fit on, teacher)."""
    args = analyze.parse_args(given("uniformity", runs))
    models, encoder, test, fit = analyze.load(args)
    assert [model.name for model in models] == ["at/best", "dra/best"] and args.eps == 8 / 255
    assert len(test[0]) == 24 and len(fit[0]) == 40 and not torch.equal(test[0], fit[0][:24])
    return args, models, test, fit, analyze.probed_teacher(args, encoder, fit)[0]


@pytest.mark.parametrize("command", FLAGS)
def test_every_command_writes_finite_tables_a_labelled_figure_and_overwrites_nothing(command, results, runs):
    tables, axes, out = results(command)
    assert len(tables) == 2 if command in ("spectrum", "probe", "dims") else 1
    for row in itertools.chain(*tables.values()):
        assert command == "curves" or all(isinstance(x, str) or math.isfinite(x) for x in row.values())
    for ax in axes:
        assert ax.get_ylabel() and (ax.get_xlabel() or ax.get_label() == "<colorbar>")
        assert ax.lines or ax.collections or ax.patches or ax.images
    picture = analyze.plt.imread(out / f"{command}.png")
    assert min(picture.shape[:2]) > 300 and not list(out.glob("*.tmp"))
    before = {path: path.read_bytes() for path in out.iterdir()}
    for more in ([], ["--names", *"ABC"[:3 if command in THREE else 2]]):
        with pytest.raises(InputError, match="is there already"):
            analyze.main([*given(command, runs), *more, "--out", str(out)])
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def percent(logits, labels):
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def test_rows_of_uniformity_and_cknna_are_those_of_their_functions(results, parts):
    args, models, (images, labels), _, teacher = parts
    rows = {row["name"]: row for row in results("uniformity")[0]["uniformity"]}
    likeness = {row["name"]: row for row in results("cknna")[0]["cknna"]}
    assert list(rows) == ["at/best", "dra/best", "teacher, sigma 0.06"]
    assert list(likeness) == ["at/best", "dra/best", "strong/best"]
    for model in [*models, teacher]:
        row, adversarial = rows[model.name], analyze.attack(model, images, labels, args)
        clean, attacked = [model.features(x).detach() for x in (images, adversarial)]
        mean = clean.mean(dim=0)
        assert row["alignment"] == pytest.approx(alignment(clean, attacked), rel=1e-4)
        assert row["uniformity"] == pytest.approx(uniformity(clean), rel=1e-4)
        assert row["alignment_centred"] == pytest.approx(alignment(clean - mean, attacked - mean), rel=1e-4)
        assert row["uniformity_centred"] == pytest.approx(uniformity(clean - mean), rel=1e-4)
        assert row["uniformity_centred"] < row["uniformity"]
        for kind, x in (("clean", images), ("robust", adversarial)):
            assert row[f"{kind}_accuracy"] == pytest.approx(percent(model(x), labels))
        if model is not teacher:
            target = teacher.features(images)
            centred = cknna(clean - mean, target - target.mean(dim=0), 5)
            row = likeness[model.name]
            assert row["cknna"] == pytest.approx(cknna(clean, target, 5), rel=1e-3, abs=1e-5) != 1
            assert row["cknna_centred"] == pytest.approx(centred, rel=1e-3, abs=1e-5)
            first = models[0].features(images).detach()
            assert row["cknna_first"] == pytest.approx(cknna(clean, first, 5), rel=1e-3, abs=1e-5)
    x, y = [[row[column] for row in likeness.values()] for column in ("clean_accuracy", "cknna")]
    title = results("cknna")[1][1].get_title()
    assert f"\ncorrelation {np.corrcoef(x, y)[0, 1]:.2f}\n" in title, "of the points in the same panel"


def test_spectrum_is_that_of_perturbation_and_gradient_and_differences_are_to_first(results, parts):
    args, models, (images, labels), _, teacher = parts
    rows = results("spectrum")[0]["spectrum"]
    profile = {}
    for row in rows:
        profile.setdefault((row["name"], row["of"]), []).append(row["amplitude"])
    assert len(profile) == 12 and len(results("spectrum")[0]["spectrum_map"]) == 12 * 32 * 32
    for model in [*models, teacher]:
        signals = {"perturbation": analyze.attack(model, images, labels, args) - images,
                   "gradient": analyze.input_gradients(model, images, labels, args)}
        for kind, signal in signals.items():
            expected = radial_profile(frequency_map(signal)).tolist()
            assert profile[model.name, kind] == pytest.approx(expected, rel=0.02)  # tiny gradients vary
    for kind, name in itertools.product(("perturbation", "gradient"), ("dra/best", "strong/best")):
        change = [b - a for a, b in zip(profile["at/best", kind], profile[name, kind])]
        assert profile[f"{name} - at/best", kind] == pytest.approx(change, abs=1e-6)


def test_probe_is_scored_on_training_images_that_it_was_not_fitted_to(results, parts):
    args, models, (images, labels), (fit_images, fit_labels), teacher = parts
    tables = results("probe")[0]
    assert [row["sigma"] for row in tables["probe"]] == 5 * [0.1] + 5 * [0.5]
    assert {(row["n"], row["n_train"]) for row in tables["probe"]} == {(8, 32)}
    layer = "dec.8x8_in1"
    features = pooled_activations(teacher.encoder, [layer], fit_images, 0.5, args)[layer]
    expected = percent(linear_probe(features[8:], fit_labels[8:], 10)(features[:8]), fit_labels[:8])
    rows = [row for row in tables["probe"] if row["sigma"] == 0.5 and row["layer"] == layer]
    assert [row["accuracy"] for row in rows] == [expected]
    for model in [*models, teacher]:
        curve = {row["eps_255"]: row["accuracy"] for row in tables["probe_eps"] if row["name"] == model.name}
        attacked = analyze.attack(model, images, labels, args)
        assert list(curve) == [0, 4, 8]
        assert curve[0] == pytest.approx(percent(model(images), labels))
        assert curve[8] == pytest.approx(percent(model(attacked), labels))


def test_autoencoder_and_components_are_fitted_to_training_and_judged_on_test_images(results, parts):
    args, models, (images, labels), (fit_images, _), _ = parts
    for model in models:
        train, test = [model.features(x).detach() for x in (fit_images, images)]
        mean, components = principal_components(train)
        attacked = model.features(analyze.attack(model, images, labels, args))
        clean, robust = [accuracy_by_rank(model.head, x, labels, mean, components) for x in (test, attacked)]
        (row,) = [row for row in results("dims")[0]["dims"] if row["name"] == model.name]
        assert row["cls_95"] == classification_dimension(clean, 0.95)
        assert row["cls_99"] == classification_dimension(clean, 0.99)
        assert row["robust"] == robust_dimension(robust)
        curve = [row for row in results("dims")[0]["dims_accuracy"] if row["name"] == model.name]
        assert [row["clean_accuracy"] for row in curve] == pytest.approx(clean.tolist())
        assert [row["robust_accuracy"] for row in curve] == pytest.approx(robust.tolist())
        scale = (train - train.mean(dim=0)).square().mean().sqrt()
        standard, test = (train - train.mean(dim=0)) / scale, (test - train.mean(dim=0)) / scale
        # It is fitted in float16. A few steps of Adam would make much of the difference to float32.
        sae = train_sae(standard.half(), 8 * train.shape[1], 2, 5, seed=0)
        row = [row for row in results("sae")[0]["sae"] if row["name"] == model.name][0]
        assert row["k"] == 2 and 0 <= row["dead_latents"] < 1
        for column, x in (("normalised_loss", test), ("normalised_loss_train", standard)):
            assert row[column] == pytest.approx(normalised_loss(sae(x), x), rel=1e-3)


def test_curves_repeat_the_logs_and_leave_out_what_a_run_without_alignment_has_not(results):
    rows = results("curves")[0]["curves"]
    expected = [("at", 17, 0.9), ("at", 34, 0.5), ("dra", 17, 0.9), ("dra", 34, 0.5)]
    assert [(row["name"], row["step"], row["loss"]) for row in rows] == expected
    assert [row["cosine"] for row in rows[2:]] == [0.9, 0.9]
    assert all(math.isnan(row["cosine"]) for row in rows[:2])


def test_a_sweep_takes_autoattacks_verdict_where_there_is_one_and_says_so(results, runs, tmp_path):
    held_out = results("sweep")[0]["sweep"]
    assert [(row["name"], row["dra_weight"]) for row in held_out] == [("at", 0), ("dra", 1), ("strong", 4)]
    for row in held_out:
        assert (row["clean_accuracy"], row["robust_accuracy"]) == (51, 33)
        assert row["judged_by"] == "PGD-40, held-out training images"
    for name in ("dra", "at"):
        shutil.copytree(runs / name, tmp_path / name)
    folder = tmp_path / "dra" / "best.pt.autoattack"
    folder.mkdir()
    command = ["sweep", str(tmp_path / "dra"), str(tmp_path / "at"), "--out", str(tmp_path / "out")]
    for settings in ({"step": 17}, {"checkpoint": "last.pt"}, {}):
        (folder / "result.json").write_text(json.dumps({
            "clean_acc": "60.50", "robust_accuracy": 40.25, "eps": "8/255", "images": 400,
            "settings": {"checkpoint": "best.pt", "step": 34, "attacks": None} | settings}))
        if settings:
            with pytest.raises(InputError, match="earlier best.pt"):
                analyze.main(command)
    analyze.main(command)
    at, dra = read_table(tmp_path / "out" / "sweep.csv")
    assert dra["judged_by"] == "AutoAttack, eps 8/255, 400 test images" != at["judged_by"]
    assert (dra["clean_accuracy"], dra["robust_accuracy"], at["robust_accuracy"]) == (60.5, 40.25, 33)
    (tmp_path / "at" / "log.csv").write_text("step,epoch,loss\n1,1,1\n")
    with pytest.raises(InputError, match="no run of ours"):
        analyze.main([*command[:-1], str(tmp_path / "other")])


def test_an_interrupted_command_starts_again_and_ends_like_another(runs, tmp_path, monkeypatch, results):
    """Not with other settings, though. And the tables are a function of the seed."""
    command = [*given("dims", runs), "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(analyze, "save_figure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        analyze.main(command)
    assert (tmp_path / "dims.csv").exists() and not (tmp_path / "dims.png").exists()
    with pytest.raises(InputError, match="is there already"):
        analyze.main([*command, "--seed", "1"])
    analyze.main(command)
    for name in ("dims.csv", "dims_accuracy.csv"):
        assert (tmp_path / name).read_text() == (results("dims")[2] / name).read_text()


def test_checkpoints_that_are_judged_on_other_images_are_not_compared(runs, tmp_path):
    saved = torch.load(runs / "dra" / "best.pt", weights_only=True)
    for change in ({"seed": 1}, {"smoke": False}):
        torch.save(saved | {"args": saved["args"] | change}, tmp_path / "other.pt")
        with pytest.raises(InputError, match="other.pt: was trained on another"):
            command = ["dims", str(runs / "at" / "best.pt"), str(tmp_path / "other.pt"), *SMALL]
            analyze.load(analyze.parse_args(command))


def test_imagenets_test_images_are_drawn_from_the_list_and_those_to_fit_on_from_train(tmp_path, monkeypatch):
    """The latter are read again and again: of 30 files, 12, as eval_autoattack.py reads test images."""
    train_imagenet.draw_smoke_folders(tmp_path, 0)
    for path in (tmp_path / "train").glob("*/*.jpg"):
        if int(path.stem) >= 3:
            path.unlink()  # three of each class are enough
    args = analyze.parse_args(["sae", "some.pt", "--n", "10", "--n-train", "12", "--data-dir", str(tmp_path)])
    args.info = SimpleNamespace(dataset="imagenet", args={"image_size": 32})

    def listed(request, info, split):
        assert request.n is None and split == "test", "all that are listed"
        return torch.arange(40.0), torch.arange(40)
    monkeypatch.setattr(analyze, "load_images", listed)
    (images, labels), (fit, fit_labels) = analyze.load_data(args)
    assert len(set(labels.tolist())) == 10 and labels.tolist() != list(range(10))
    assert torch.equal(images, labels.float()) and torch.equal(labels, analyze.load_data(args)[0][1])
    assert len(fit) == len(fit_labels) == len(set(fit.paths)) == 12 and len(set(fit_labels.tolist())) > 3
    shutil.copytree(tmp_path / "train", tmp_path / "again" / "val")  # the same files, for the other reader
    whole, whole_labels = load_imagenet(tmp_path / "again", None, None, 10, image_size=32)
    order = [str(path) for path in sorted((tmp_path / "train").rglob("*.jpg"))]
    index = [order.index(path) for path in fit.paths]
    assert torch.equal(fit[3:7], whole[index][3:7]) and torch.equal(fit_labels, whole_labels[index])
    model = SimpleNamespace(features=lambda x: x.mean(dim=(2, 3)))
    torch.testing.assert_close(analyze.features_of(model, fit, args), whole[index].mean(dim=(2, 3)))


def test_attack_stays_within_eps_and_a_larger_eps_costs_accuracy(parts):
    args, (model, _), (images, labels), _, _ = parts
    losses = []
    for eps in (2 / 255, 32 / 255):
        adversarial = analyze.attack(model, images, labels, args, eps)
        assert (adversarial - images).abs().max() <= eps + 1e-6
        assert 0 <= adversarial.min() and adversarial.max() <= 1
        losses.append(F.cross_entropy(model(adversarial), labels).item())
    assert F.cross_entropy(model(images), labels) < losses[0] < losses[1]


def test_input_gradients_are_those_of_each_image_alone(parts):
    args, (model, _), (images, labels), _, _ = parts
    x = images[3:4].clone().requires_grad_()
    F.cross_entropy(model(x), labels[3:4]).backward()
    gradients = analyze.input_gradients(model, images, labels, args)
    torch.testing.assert_close(gradients[3:4], x.grad, rtol=1e-3, atol=1e-7)


# --------------------------------------------------------------------------------- networks that are not ours

MODELS = Path(analyze.__file__).with_name("robustbench_models.py")


def test_a_network_that_is_not_ours_gives_its_authors_logits_and_is_compared_with_ours(runs):
    """The ResNet-18 that comes with pyautoattack, through --script; train_cifar.py is that of the others."""
    examples = Path(pyautoattack.__path__[0], "examples")
    path, images = examples / "model_test.pt", torch.rand(3, 3, 32, 32)
    theirs = runpy.run_path(str(examples / "resnet.py"))["ResNet18"]().eval()
    theirs.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model = load_classifier(path, "resnet-18", "cifar10", MODELS)
    torch.testing.assert_close(model(images), theirs(images))
    torch.testing.assert_close(model.head(model.features(images)), model(images))
    command = ["dims", str(path), str(runs / "at" / "best.pt"), "--arch", "resnet-18", "wrn-10-1", "--script"]
    both = analyze.parse_args([*command, str(MODELS), "train_cifar.py"])
    assert both.script == [str(MODELS), "train_cifar.py"] and both.arch == ["resnet-18", "wrn-10-1"]
    with pytest.raises(SystemExit):
        analyze.parse_args([*command, "a.py", "b.py", "c.py"])


def test_the_original_wide_resnet_by_its_definition(tmp_path):
    """Names and network of its first PyTorch version, from a state dict alone; a second, unused group."""
    build_model, x = runpy.run_path(str(MODELS))["build_model"], torch.rand(2, 3, 32, 32)
    model = build_model("wrn-16-2", 10).eval()
    state = {name: value + 0.1 * torch.rand(value.shape) for name, value in model.state_dict().items()
             if value.is_floating_point()}
    model.load_state_dict(state, strict=False)

    def act(h, name):
        statistics = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(h, *statistics))
    h = F.conv2d(x, state["conv1.weight"], padding=1)
    for block, i in itertools.product((1, 2, 3), (0, 1)):
        name, stride = f"block{block}.layer.{i}", 2 if block > 1 and i == 0 else 1
        activated = act(h, f"{name}.bn1")
        inner = act(F.conv2d(activated, state[f"{name}.conv1.weight"], None, stride, 1), f"{name}.bn2")
        h = F.conv2d(activated, state[f"{name}.convShortcut.weight"], None, stride) if i == 0 else h
        h = h + F.conv2d(inner, state[f"{name}.conv2.weight"], padding=1)
    pooled = act(h, "bn1").mean(dim=(2, 3))
    torch.testing.assert_close(model(x), F.linear(pooled, state["fc.weight"], state["fc.bias"]))
    names = set(build_model("wrn-16-2-sub", 10).state_dict()) - set(model.state_dict())
    assert names == {f"sub_{name}" for name in model.state_dict() if name.startswith("block1.")}
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model("wrn-28-10", 10).parameters()) == 36_479_194
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "a.pt")
    torch.testing.assert_close(load_classifier(tmp_path / "a.pt", "wrn-16-2", "cifar10", MODELS)(x), model(x))
    with pytest.raises(InputError, match="robustbench_models.py cannot build it"):
        load_classifier(tmp_path / "a.pt", "wrn-17-2", "cifar10", MODELS)
