"""What dit_encoder.py promises, in the order of the tests below: latents and features are VA-VAE's and
LightningDiT's, numbers from their own code; the networks have the released files' names and shapes, and only
what is needed stays in memory; files that do not fit are named in one line, and none is ever run; latents
that are not normalised, the classic silent mistake, are an error."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import (DIT, FIXTURES, HTML, LFS, PAGE, POINTER, STATS, VAE, assert_never_run, assert_one_line,
                     load, run)
from dit_encoder import InputError, build_dit, build_vae, check_file, load_dit_encoder, rotate

SIZES = {"layer": 2, "zero_channels": (5, 21), "num_heads": 2, "image_size": 64}


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "dit_tiny_reference.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def encoder():
    return load_dit_encoder(DIT, VAE, STATS, **SIZES)


def inputs(reference, labelled=True):
    labels = reference["label"] if labelled else None
    return reference["image_uint8"] / 255, labels, reference["t"], reference["noise"]


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------------------------------------------- numbers

def test_latents_are_va_vaes(encoder, reference):
    latents = encoder.latents(reference["image_uint8"] / 255)
    assert relative_error(latents, reference["latent_normalised"]) < 1e-4


@pytest.mark.parametrize("labelled", ["labelled", "unlabelled"])
def test_features_are_lightningdits(encoder, reference, labelled):
    assert tuple(reference["zero_channels"].tolist()) == SIZES["zero_channels"]
    assert int(reference["layer"]) == SIZES["layer"]
    arguments = inputs(reference, labelled == "labelled")
    hidden, modulated = encoder.activations(*arguments)
    assert relative_error(hidden, reference[f"{labelled}/hidden"]) < 1e-4
    assert relative_error(modulated, reference[f"{labelled}/modulated"]) < 1e-4
    pooled = encoder(*arguments)
    assert pooled.shape == (3, encoder.width) == (3, 32) and pooled.dtype == torch.float32
    assert relative_error(pooled, reference[f"{labelled}/pooled"]) < 1e-4


def test_silenced_channels_matter_and_only_after_the_blocks(encoder, reference):
    other = load_dit_encoder(DIT, VAE, STATS, **SIZES | {"zero_channels": ()})
    hidden, modulated = encoder.activations(*inputs(reference))
    same, different = other.activations(*inputs(reference))
    assert torch.equal(hidden, same) and not torch.allclose(modulated, different)


def test_time_is_a_number_or_one_per_image_and_one_means_clean(encoder, reference):
    images, labels, _, noise = inputs(reference)
    one_each = encoder(images, labels, torch.full((3,), 0.9), noise)
    assert torch.equal(encoder(images, labels, 0.9, noise), one_each)
    clean, nothing = encoder(images, labels, 1.0, noise), encoder(images, labels, 0.0, noise)
    assert torch.equal(clean, encoder(images, labels, 1.0, -noise)), "no noise at t = 1"
    assert torch.equal(nothing, encoder(images.flip(0), labels, 0.0, noise)), "no image at t = 0"


def test_noise_is_drawn_where_none_is_given(encoder, reference):
    images, labels, t, _ = inputs(reference)
    assert not torch.equal(encoder(images, labels, t), encoder(images, labels, t))


def test_images_of_another_size_are_resized(encoder, reference):
    images, labels, t, noise = inputs(reference)
    larger = F.interpolate(images, (96, 80), mode="bicubic").clamp(0, 1)
    back = F.interpolate(larger, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(encoder(larger, labels, t, noise), encoder(back, labels, t, noise))


def test_encoder_is_frozen_but_differentiable_in_the_images(encoder, reference):
    images, *rest = inputs(reference)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(images, *rest).requires_grad
    (gradient,) = torch.autograd.grad(encoder(images.requires_grad_(), *rest).sum(), [images])
    assert gradient.abs().max() > 0


def test_bfloat16_is_used_where_it_is_asked_for(encoder, reference):
    """float32 until `amp` is set; then bfloat16 inside, on a CPU as well, and float32 outside."""
    other = load_dit_encoder(DIT, VAE, STATS, **SIZES)
    assert other.amp is False
    other.amp = True
    exact, coarse = encoder(*inputs(reference)), other(*inputs(reference))
    assert coarse.dtype == torch.float32 and 1e-4 < relative_error(coarse, exact) < 0.02


def test_rotation_turns_neighbouring_pairs():
    x, angle = torch.tensor([[[[1.0, 0.0, 0.0, 2.0]]]]), torch.tensor([[0.3, 0.3, 0.5, 0.5]])
    turned = rotate(x, angle.cos(), angle.sin()).flatten()
    first, second = angle[0, 0], angle[0, 2]
    expected = torch.stack([first.cos(), first.sin(), -2 * second.sin(), 2 * second.cos()])
    torch.testing.assert_close(turned, expected)


# -------------------------------------------------------------------------------------- full size, and memory

def test_full_size_networks_have_the_files_names_and_shapes():
    """Built from shapes alone, on the meta device: each tensor is in the released files with its shape."""
    def manifest(file):
        shapes = json.loads((FIXTURES / file).read_text())
        return {name: SimpleNamespace(shape=torch.Size(shape)) for name, shape in shapes.items()}
    dit, vae = manifest("lightningdit_xl_1_manifest.json"), manifest("vavae_f16d32_manifest.json")
    with torch.device("meta"):
        networks = build_dit(dit, layer=14, num_heads=16), build_vae(vae)
    left_out = []
    for network, released in zip(networks, (dit, vae)):
        needed = network.state_dict()
        assert all(released[name].shape == tensor.shape for name, tensor in needed.items())
        left_out.append({name for name in released if name not in needed})
    behind_the_norm = {f"blocks.14.{name}" for name in (
        "norm2.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias")}
    later = ("final_layer.", *(f"blocks.{i}." for i in range(15, 28)))
    assert left_out[0] == behind_the_norm | {name for name in dit if name.startswith(later)}
    assert left_out[1] == {name for name in vae if name.startswith(("decoder.", "post_quant_conv."))}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_only_what_is_needed_stays_in_memory(reference, layer):
    """Weights own their memory, float32, so that nothing keeps the mapped file alive; no later blocks."""
    encoder = load_dit_encoder(DIT, VAE, STATS, **SIZES | {"layer": layer})
    assert len(encoder.dit.blocks) == layer + 1 and not hasattr(encoder.dit.blocks[layer], "attn")
    for tensor in encoder.state_dict().values():
        assert tensor.dtype == torch.float32 and tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    assert encoder(*inputs(reference)).isfinite().all()


# ----------------------------------------------------------------------------------------------------- errors

def save(path, value):
    torch.save(value, path)
    return path


def test_prefixed_and_bare_weights_load_as_well(encoder, reference, tmp_path):
    weights = {f"module.{name}": value for name, value in load(DIT)["ema"].items()}
    prefixed = save(tmp_path / "a.pt", {"ema": weights})
    bare = save(tmp_path / "b.pt", load(VAE)["state_dict"])
    other = load_dit_encoder(prefixed, bare, STATS, **SIZES)
    assert torch.equal(other(*inputs(reference)), encoder(*inputs(reference)))


def without(path, section, name):
    content = load(path)
    del content[section][name]
    return content


def changed(path, section, **values):
    content = load(path)
    content[section].update(values) if section else content.update(values)
    return content


def unfit_files():
    """(which of the three files, its content, other arguments, what the message says), ..."""
    def dit(name, value):
        return changed(DIT, "ema", **{name: value})
    no_block_0, no_key = "encoder.down.2.block.0.conv1.weight", "encoder.mid.attn_1.k.bias"
    only_first = {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}
    qkv, bias, stats = "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.bias", load(STATS)
    four_channels = load(VAE)["state_dict"]
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias", "quant_conv.weight", "quant_conv.bias"):
        four_channels[name] = four_channels[name][:8]
    four_channels["quant_conv.weight"] = four_channels["quant_conv.weight"][:, :8]
    return [
        ("dit", load(VAE), {}, "expected a LightningDiT checkpoint, this is a VA-VAE checkpoint"),
        ("dit", stats, {}, "expected a LightningDiT checkpoint, this is latent statistics"),
        ("vae", load(DIT), {}, "expected a VA-VAE checkpoint, this is a LightningDiT checkpoint"),
        ("stats", load(VAE), {}, "expected latent statistics, this is a VA-VAE checkpoint"),
        ("dit", {"ema": {}}, {}, "something else"),
        ("dit", [1, 2], {}, "something else"),
        ("vae", {"state_dict": 3}, {}, "something else"),
        ("dit", torch.zeros(3), {}, "something else"),
        ("vae", without(VAE, "state_dict", "quant_conv.weight"), {}, "lacks quant_conv.weight"),
        ("vae", without(VAE, "state_dict", no_key), {}, f"lacks {no_key}"),
        ("vae", without(VAE, "state_dict", "encoder.conv_out.weight"), {}, "lacks encoder.conv_out.weight"),
        ("vae", without(VAE, "state_dict", no_block_0), {}, f"lacks {no_block_0}"),
        ("dit", without(DIT, "ema", "blocks.1.mlp.w12.bias"), {}, "lacks blocks.1.mlp.w12.bias"),
        ("dit", without(DIT, "ema", "blocks.2.adaLN_modulation.1.weight"), {}, "lacks blocks.2.adaLN"),
        ("dit", without(DIT, "ema", "pos_embed"), {}, "lacks pos_embed"),
        ("dit", without(DIT, "ema", "feat_rope.freqs_cos"), {}, "lacks feat_rope.freqs_cos"),
        ("dit", dit(qkv, torch.zeros(96, 31)), {}, f"{qkv} is [96, 31], expected [96, 32]"),
        ("dit", dit("x_embedder.proj.weight", torch.zeros(())), {}, ""),
        ("dit", dit(bias, torch.zeros(32, device="meta")), {}, "meta"),
        ("dit", dit(bias, torch.full((32,), torch.nan)), {}, f"{bias} is not finite"),
        ("dit", dit("blocks.1.attn.q_norm.weight", torch.ones(16)), {}, "has blocks.1.attn.q_norm.weight"),
        ("dit", dit("blocks.2.norm1.bias", torch.ones(32)), {}, "architecture, it has blocks.2.norm1.bias"),
        ("vae", changed(VAE, "state_dict", **{"encoder.down.1.attn.0.q.weight": torch.ones(32, 32, 1, 1)}),
         {}, "another architecture, it has encoder.down.1.attn.0.q.weight"),
        ("vae", {"state_dict": only_first}, {}, "lacks encoder.conv_out.weight"),
        ("dit", load(DIT), {"layer": 3}, "has 3 blocks, expected layer 3 to be one of 0 to 2"),
        ("dit", load(DIT), {"num_heads": 16}, "it has 2 heads, not num_heads=16"),
        ("dit", load(DIT), {"zero_channels": (1053, 259)}, "is 32 wide, expected zero_channels (1053, 259)"),
        ("vae", load(VAE), {"image_size": 128}, "from 64 px, not image_size=128"),
        ("vae", load(VAE), {"image_size": 65}, "from 64 px, not image_size=65"),
        ("vae", {"state_dict": four_channels}, {}, f"makes 4 latent channels, {DIT} takes 8"),
        ("stats", changed(STATS, None, mean=torch.zeros(1, 4, 1, 1)), {},
         "mean is [1, 4, 1, 1], expected [1, 8, 1, 1]"),
        ("stats", changed(STATS, None, std=torch.zeros(8)), {}, "std is [8]"),
        ("stats", changed(STATS, None, mean=torch.full((1, 8, 1, 1), torch.nan)), {}, "mean is not finite"),
        ("stats", {"mean": stats["mean"]}, {}, "lacks std"),
    ]


def test_files_that_do_not_fit_give_one_clear_line(tmp_path):
    for i, (which, content, sizes, message) in enumerate(unfit_files()):
        files = {"dit": DIT, "vae": VAE, "stats": STATS} | {which: save(tmp_path / f"{i}.pt", content)}
        with pytest.raises(InputError) as caught:
            load_dit_encoder(*files.values(), **SIZES | sizes)
        line = str(caught.value)
        assert line.startswith(f"{files[which]}: ") and message in line and "\n" not in line, (i, line)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_no_file_of_tensors_is_named_in_each_of_the_three_places(tmp_path, position):
    """What downloads leave in place of a file, cut ones, and hostile ones, which are never run."""
    path, whole, files = tmp_path / "file.pt", DIT.read_bytes(), [DIT, VAE, STATS]
    beside = save(tmp_path / "a.pt", {"ema": load(DIT)["ema"]}).read_bytes()
    files[position] = path
    for content, message in (
            (HTML, f"{PAGE}: download it again"), (b"<HTML>", f"{PAGE}: download it again"), (POINTER, LFS),
            *[(cut, "damaged, or no file of tensors") for cut in (
                b"", whole[:100], whole[:len(whole) // 2], whole[:-1], beside[:-200])]):
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_dit_encoder(*files, **SIZES)
        assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)

    def read(hostile):
        files[position] = hostile
        load_dit_encoder(*files, **SIZES)
    assert_never_run(read, tmp_path)
    for file in (DIT, VAE, STATS, FIXTURES / "lightningdit_xl_1_manifest.json"):
        check_file(file)


@pytest.mark.parametrize("change", [{"std": 5.0}, {"std": 0.2}, {"mean": 1.0}, {"mean": -2.0}])
def test_latents_that_are_not_normalised_are_an_error_in_the_first_batch(reference, tmp_path, change):
    """The classic silent mistake: another autoencoder's statistics. Of mean, so many stds are added."""
    stats = load(STATS)
    mean = stats["mean"] + change.get("mean", 0) * stats["std"]
    stats = {"mean": mean, "std": stats["std"] * change.get("std", 1)}
    encoder = load_dit_encoder(DIT, VAE, save(tmp_path / "stats.pt", stats), **SIZES)
    with pytest.raises(InputError, match="normalised latents .* have mean .* expected about 0 and 1"):
        encoder(*inputs(reference))


def test_images_outside_the_unit_range_are_noticed(reference):
    images = reference["image_uint8"].float()
    for wrong in (images, images / 127.5 - 1, images / 0):
        with pytest.raises(ValueError, match=r"first images run from .* expected values in \[0, 1\]"):
            load_dit_encoder(DIT, VAE, STATS, **SIZES).latents(wrong)


def test_labels_that_the_network_does_not_know_are_an_error(encoder, reference):
    images, labels, t, noise = inputs(reference)
    for wrong in (labels + 8, labels - 20):
        with pytest.raises(IndexError):
            encoder(images, wrong, t, noise)


def test_as_a_script_it_shows_what_the_files_hold_or_what_is_wrong(tmp_path):
    lines = run("dit_encoder.py", DIT, VAE, STATS, "--layer", 2).out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(DIT), str(VAE), str(STATS)]
    assert "10 classes, 32 wide" in lines[0] and "64 px -> latents [8, 4, 4]" in lines[1]
    for flags, named in (([VAE, VAE, STATS], "expected a LightningDiT checkpoint, this is a VA-VAE"),
                         ([DIT, VAE, tmp_path / "none.pt"],
                          "dit_tiny_dit.pt: has 3 blocks, expected layer 14"),
                         ([DIT, VAE, tmp_path / "none.pt", "--layer", 2], "none.pt")):
        assert_one_line("dit_encoder.py", flags, named)
