"""What edm_encoder.py promises, in the order of the tests below: activations of each block are NVIDIA's,
numbers from its own code; the network has the released file's names and shapes; a file that does not fit, or
was damaged, is named in one line; no code in a file is ever run; a URL is downloaded once."""
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import (DIT, EDM as TINY, FIXTURES, HTML, POINTER, Call, assert_never_run, assert_one_line, dump,
                     edm_file, randomise, run)
import edm_encoder
from edm_encoder import EDMEncoder, InputError, SongUNet, UNetBlock, load_edm, load_edm_encoder

DDPMPP = {"img_resolution": 32, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
          "attn_resolutions": [16]}
NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "decoder_type": "standard",
          "channel_mult_noise": 2,
          "resample_filter": [1, 3, 3, 1]}


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES / "edm_tiny_cond_vp_reference.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def inputs(reference, labelled):
    labels = reference["label"] if labelled else None
    return reference["image_uint8"] / 255, labels, reference["sigma"], reference["noise"]


# ---------------------------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("labelled", ["labelled", "unlabelled"])
@pytest.mark.parametrize("layer", ["enc.16x16_block0", "enc.8x8_block0", "dec.8x8_in0", "dec.8x8_in1"])
def test_activations_are_nvidias(reference, labelled, layer):
    encoder, expected = load_edm_encoder(TINY, layer), reference[f"{labelled}/{layer}"]
    arguments = inputs(reference, labelled == "labelled")
    activations = encoder.activations(*arguments)
    assert (activations - expected).norm() < 1e-4 * expected.norm()
    pooled = encoder(*arguments)
    assert pooled.shape == (3, encoder.width) and pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_sigma_is_a_number_or_one_per_image(reference):
    encoder, (images, labels, _, noise) = load_edm_encoder(TINY), inputs(reference, True)
    one_each = encoder(images, labels, torch.full((3,), 0.06), noise)
    torch.testing.assert_close(encoder(images, labels, 0.06, noise), one_each, rtol=0, atol=0)
    assert not torch.allclose(encoder(images, labels, 0.06, noise), encoder(images, labels, 0.6, noise))


def test_noise_is_drawn_where_none_is_given(reference):
    encoder, (images, labels, sigma, _) = load_edm_encoder(TINY), inputs(reference, True)
    assert not torch.equal(encoder(images, labels, sigma), encoder(images, labels, sigma))


def test_encoder_is_frozen_but_differentiable_in_the_images(reference):
    encoder, (images, *rest) = load_edm_encoder(TINY), inputs(reference, True)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    images.requires_grad_()
    encoder(images, *rest).sum().backward()
    assert images.grad.abs().sum() > 0


class Whole(torch.nn.Module):
    """What `load_edm` needs around a SongUNet."""

    def __init__(self, sigma_data, **network):
        super().__init__()
        self.model = SongUNet(**network)


def test_activations_of_every_block_are_what_a_hook_in_the_whole_unet_sees(reference):
    images, labels, sigma, noise = inputs(reference, True)
    whole, seen = load_edm(TINY, Whole).model.eval(), {}
    layers = [f"{part}.{name}" for part in ("enc", "dec") for name in getattr(whole, part)]
    assert len(layers) == 18 and {"dec.8x8_block1", "dec.16x16_up", "dec.16x16_block1",
                                  "dec.32x32_aux_conv"} <= set(layers)
    for layer in layers:
        whole.get_submodule(layer).register_forward_hook(lambda module, _, output,
                                                         layer=layer: seen.update({layer: output}))
    c_in = 1 / (sigma**2 + 0.5**2).sqrt()
    x = c_in[:, None, None, None] * (2 * images - 1 + sigma[:, None, None, None] * noise)
    output = whole(x, sigma.log() / 4, torch.nn.functional.one_hot(labels, 10).float())
    assert torch.equal(output, seen["dec.32x32_aux_conv"]) and output.shape == images.shape
    sizes = []
    for layer in layers:
        encoder = load_edm_encoder(TINY, layer)
        torch.testing.assert_close(encoder.activations(images, labels, sigma, noise), seen[layer], rtol=0,
                                   atol=0)
        assert encoder(images, labels, sigma, noise).shape == (3, encoder.width)
        sizes.append(sum(parameter.numel() for parameter in encoder.parameters()))
    assert sizes == sorted(set(sizes)), "each holds its own blocks and those before, no more"


def test_full_size_network_has_the_files_names_and_shapes():
    manifest = json.loads((FIXTURES / "edm_cifar10_cond_vp_manifest.json").read_text())
    network = {"img_resolution": 32, "label_dim": 10, "model_channels": 128, "channel_mult": [2, 2, 2],
               "num_blocks": 4,
               "attn_resolutions": [16]}
    with torch.device("meta"):
        whole, encoder = SongUNet(**network), EDMEncoder(**network)
    ours = {f"model.{name}": list(value.shape) for name, value in whole.state_dict().items()}
    assert ours.items() <= manifest.items()
    # Augmentation labels are for NVIDIA's training only, and all filters are means of 2 x 2 pixels.
    assert all(name == "model.map_augment.weight" or name.endswith("resample_filter")
               for name in set(manifest) - set(ours))
    upto = {name for name in ours if name.startswith(("model.enc", "model.map", "model.dec.8x8_in"))}
    assert set(encoder.state_dict()) == upto and encoder.width == 256


@pytest.mark.parametrize("layer", ["dec.16x16_in1", "dec.32x32_aux_conv"])
@pytest.mark.parametrize("network", [DDPMPP, DDPMPP | {"label_dim": 10}],
                         ids=["unconditional", "conditional"])
def test_networks_survive_the_file_format(tmp_path, network, layer):
    written = randomise(EDMEncoder(layer, **network))
    stated = {"dropout": 0.13, "augment_dim": 9, "label_dropout": 0.1, "encoder_type": "standard",
              "resample_filter": [1, 1]}
    dump(edm_file(written, network | stated), tmp_path / "net.pkl")
    read = load_edm_encoder(tmp_path / "net.pkl", layer).train()
    images, noise, labels = torch.rand(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([1, 9])
    features = read(images, labels, 0.06, noise)
    assert torch.equal(features,
                       written(images, labels, 0.06,
                               noise)), "and there is no dropout, in training mode either"
    unlabelled = read(images, None, 0.06, noise)
    assert torch.equal(features, unlabelled) == (read.label_dim == 0), "labels matter where they are known"
    again = EDMEncoder(layer, **read.arguments)
    again.load_state_dict(read.state_dict())
    assert torch.equal(features, again(images, labels, 0.06, noise))


def test_blocks_halve_by_the_mean_of_2_x_2_pixels_and_double_by_repeating():
    x = torch.rand(2, 8, 6, 6)
    for kind, shape in (("down", (2, 8, 3, 3)), ("up", (2, 8, 12, 12))):
        block = UNetBlock(8, 8, emb_channels=4, **{kind: True})
        block.conv1.weight.data.zero_(), block.conv1.bias.data.zero_()  # what is left is the other branch
        block.skip.weight.data, block.skip.bias.data = torch.eye(8)[:, :, None, None], torch.zeros(8)
        expected = torch.stack([x[..., i::2, j::2] for i in (0, 1)
                                for j in (0, 1)]).mean(dim=0) if kind == "down" else (
            x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        output = block(x, torch.rand(2, 4))
        assert output.shape == shape
        torch.testing.assert_close(output, expected * 0.5**0.5)


# ---------------------------------------------------------------------------------------------- bad arguments

def test_wrong_image_size_labels_and_layer_are_named():
    encoder = load_edm_encoder(TINY)
    with pytest.raises(ValueError, match=r"images \[B, 3, 32, 32\], not \[2, 3, 64, 64\]"):
        encoder(torch.rand(2, 3, 64, 64), None, 0.06)
    for wrong in (10, -1):
        with pytest.raises(ValueError, match="labels 0 to 9"):
            encoder(torch.rand(2, 3, 32, 32), torch.tensor([0, wrong]), 0.06)
    with pytest.raises(InputError,
                       match="no layer 'dec.9x9' in this network; it has enc.32x32_conv, .*aux_conv"):
        load_edm_encoder(TINY, "dec.9x9")


def damaged_files(folder):
    """(what is wrong, content of the file, what the message says), one after the other."""
    whole = TINY.read_bytes()
    yield "cut off", whole[:len(whole) // 2], "damaged"
    yield "empty", b"", "damaged"
    yield "a web page", HTML, r"is a web page \(HTML\), not the file itself: download it again"
    yield "another web page", b"<HTML lang=en>", "is a web page"
    yield "a Git LFS pointer", POINTER, "is a Git LFS pointer, not the file itself: run git lfs pull"
    yield "no pickle", b"\x89PNG\r\n\x1a\n" + bytes(100), "refused"
    yield "no dict", pickle.dumps([1, 2, 3]), "no EDM network"
    yield "no ema", pickle.dumps({"model": 1}), "no EDM network"

    def written(layer="dec.16x16_in1", arguments={}, classes=(), state={}):
        content = edm_file(EDMEncoder(layer, **DDPMPP), DDPMPP | arguments, *classes)
        content["ema"].meta["state"].update(state)
        dump(content, folder / "other.pkl")
        return (folder / "other.pkl").read_bytes()
    yield "another network", written(classes=("DhariwalUNet", "EDMPrecond")), "DhariwalUNet"
    yield "another preconditioning", written(classes=("SongUNet", "VPPrecond")), "VPPrecond"
    yield "tensors missing", written("enc.32x32_block0"), "enc.16x16_down.norm0.weight is missing"
    yield "other shapes", written(arguments={"model_channels": 16}), r" is \[.*\], expected \["
    yield "unknown argument", written(arguments={"colour": "red"}), "colour"
    yield "NCSN++", written(arguments=NCSNPP), r"is NCSN\+\+ .*embedding_type fourier.*; only DDPM\+\+ is "
    for name, value in NCSNPP.items():
        if value != "standard":
            yield f"NCSN++'s {name}", written(arguments={name: value}), rf"is NCSN\+\+ .*\({name} "
    for wrong in ({"encoder_type": "skip"}, {"embedding_type": "zero"}, {"decoder_type": "skip"}):
        yield "an architecture of no such network", written(arguments=wrong), r"only DDPM\+\+ is read"
    for wrong in ({"channel_mult": []}, {"num_blocks": 10**9}, {"model_channels": 2**14},
                  {"channel_mult": None}):
        message = r"expected 1 to 8 resolutions|is missing| is \[.*\], expected \[|has no len"
        yield "arguments of no such network", written(arguments=wrong), message
    for wrong in ({"sigma_data": "abc"}, {"sigma_data": 10**400}, {"_modules": 3}):
        yield "strange state", written(state=wrong), "no EDM network"


def test_damaged_files_give_one_clear_line(tmp_path):
    for kind, content, message in damaged_files(tmp_path):
        path = tmp_path / "teacher.pkl"
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            load_edm_encoder(path, "dec.16x16_in1")
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value), kind
    with pytest.raises(FileNotFoundError):
        load_edm_encoder(tmp_path / "nothing.pkl")


# ---------------------------------------------------------------------------------------------- hostile files

def test_hostile_pickles_are_refused_and_never_run(tmp_path):
    assert_never_run(load_edm_encoder, tmp_path)
    load_edm_encoder(TINY)  # none of them changed the loader


def test_a_refusal_says_what_the_file_asked_for(tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps(Call(__import__("os").system, "true")))
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system"):
        load_edm_encoder(path)


def test_embedded_source_is_never_run(monkeypatch):
    """The fixture's embedded source raises where it runs; loading needs no exec, eval or compile."""
    assert b"raise RuntimeError" in TINY.read_bytes()
    for name in ("exec", "eval", "compile"):
        monkeypatch.setattr(edm_encoder, name, None, raising=False)
    load_edm_encoder(TINY)


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path):
    content = edm_file(EDMEncoder("dec.16x16_in1", **DDPMPP), DDPMPP)

    class Overlong:
        def __reduce__(self):
            storage, size, stride, hooks = torch.zeros(4).storage(), (8, 3, 3, 3), (27, 9, 3, 1), {}
            return torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, hooks)
    module = content["ema"]
    for name in ("model", "enc", "32x32_conv"):
        module = module.meta["state"]["_modules"][name]
    module.meta["state"]["_parameters"]["weight"] = Overlong()
    dump(content, tmp_path / "net.pkl")
    with pytest.raises(ValueError, match="out of bounds"):
        load_edm_encoder(tmp_path / "net.pkl", "dec.16x16_in1")


def test_url_is_downloaded_once_and_a_failure_is_named(tmp_path, monkeypatch):
    downloads, urls = [], ["https://example.org/a/tiny.pkl", "https://example.org/b/tiny.pkl"]

    def download(url, destination, **_):
        downloads.append(url)
        if "broken" in url:
            raise OSError("no route")
        Path(destination).write_bytes(b"<html>not found" if "page" in url else TINY.read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for url in 2 * urls:
        assert load_edm_encoder(url).width == 16
    assert downloads == urls, "each once, though their file names are the same"
    with pytest.raises(InputError, match="https://example.org/broken.pkl: cannot be downloaded .no route"):
        load_edm_encoder("https://example.org/broken.pkl")
    for _ in range(2):
        with pytest.raises(InputError,
                           match="https://example.org/page.pkl: cannot be downloaded .*is a web page"):
            load_edm_encoder("https://example.org/page.pkl")
    assert downloads[2:] == ["https://example.org/broken.pkl",
                             *2 * ["https://example.org/page.pkl"]], "a page is not kept"


def test_as_a_script_it_says_what_a_file_holds_or_what_is_wrong_with_it(tmp_path):
    done = run("edm_encoder.py", TINY)
    assert done.code == 0 and all(part in done.out for part in ("label_dim 10", "enc.32x32_conv",
                                                                "dec.32x32_aux_conv"))
    count = sum(parameter.numel() for parameter in load_edm_encoder(TINY, "dec.32x32_aux_conv").parameters())
    assert f"{count + 9 * 8:,} parameters" in done.out, "with map_augment, which only NVIDIA's training needs"
    assert_one_line("edm_encoder.py", [tmp_path / "none.pkl"], "none.pkl")
    assert_one_line("edm_encoder.py", [DIT], f"{DIT.name}: damaged, refused or no EDM network")
