"""Features of a frozen EDM diffusion model: what arXiv 2602.19931 aligns a robust CIFAR classifier with.

    python edm_encoder.py edm-cifar10-32x32-cond-vp.pkl      # what a file holds; nothing inside it is run

    encoder = load_edm_encoder("edm-cifar10-32x32-cond-vp.pkl")
    target = encoder(images, labels, sigma=0.06)             # images [B, 3, 32, 32] in [0, 1] -> [B, 256]

The target is g(x_t, t, y) of the paper's eq. (3). A diffusion model is a denoiser: it is shown a noisy image
x_t = x + sigma * noise and a label y, and has learned to predict the clean x. EDM's network (Karras et al.
2022, arXiv 2206.00364) is a UNet: an encoder shrinks the image from 32 x 32 to 8 x 8 positions, a decoder
grows it again, and skip connections carry detail past the middle.

Which block? The paper takes "the UNet bottleneck block before the upsampling layers" and averages it over
its positions (appendix D). In NVIDIA's names the bottleneck is dec.8x8_in0 and dec.8x8_in1: all that reaches
the decoder passes through these two blocks, except for the skip connections. The default is the second one,
dec.8x8_in1, as it fits the paper's words best. It is not the last block at 8 x 8: dec.8x8_block0 to block4
follow, each with a skip connection, and only then dec.16x16_up doubles the resolution. The words do not
exclude block4, so any block of the UNet can be chosen.

Why add noise to a clean image first? The network has hardly ever seen an image without noise, and sigma
decides what it looks for. With almost no noise the answer is the input itself, and nothing needs to be
understood. With a lot of noise nothing is left to see. A little noise hides fine texture and keeps the
object, so features are best at one small sigma and get worse on both sides of it (section 3). DDAE (Xiang et
al. 2023, arXiv 2303.09769) found 0.06 for an EDM of CIFAR-10, in a network without labels and at about
dec.16x16_block1. At other blocks another sigma may be better; linear probes tell. Sigma is on the scale of
images in [-1, 1]. On the scale [0, 1] this noise would have a deviation of 0.03.

This file holds EDM's SongUNet in its DDPM++ form (NVIDIA's "vp" files), and a reader for NVIDIA's .pkl files
and for the .pt files of experiments/train_edm.py. NVIDIA's loader executes the Python source that is embedded
in each .pkl. Ours takes tensors, numbers and strings, and refuses a file that asks for anything else. The
code is our own, the parameter names are NVIDIA's. So are the weights in NVIDIA's files, under CC BY-NC-SA 4.0
(no commercial use), which may also bind models that are trained with them.
"""
import argparse
import functools
import io
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line that names it; the exit code is 2."""


# ------------------------------------------------------------------------------------------------------------
# The network: SongUNet, the UNet of Song et al. 2021 (arXiv 2011.13456), with EDM's changes.


def convolution(in_channels, out_channels, kernel):
    """A convolution that keeps height and width (zero padding)."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


def group_norm(channels):
    """EDM's group norm: 32 groups, or fewer where a group would have less than four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """Residual block that is told the noise level and the label, optionally followed by self-attention.

    emb [B, emb_channels] says how noisy the image is and what it shows. It enters as an offset per channel
    between the two convolutions, so that one set of weights can treat a little noise and a lot differently.
    `down` halves height and width: each 2 x 2 pixels are averaged, as taking every second pixel would turn
    fine stripes into coarse ones that are not there (aliasing). `up` doubles them by repeating pixels. Both
    branches resample before their convolution.
    """

    def __init__(self, in_channels, out_channels, emb_channels, down=False, up=False, attention=False,
                 dropout=0.0):
        super().__init__()
        self.out_channels, self.attention, self.dropout = out_channels, attention, dropout
        self.resample = nn.Identity()
        if down:
            self.resample = nn.AvgPool2d(2)
        elif up:
            self.resample = nn.Upsample(scale_factor=2)
        self.norm0 = group_norm(in_channels)
        self.conv0 = convolution(in_channels, out_channels, 3)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = convolution(out_channels, out_channels, 3)
        self.skip = nn.Identity()
        if down or up or in_channels != out_channels:
            self.skip = convolution(in_channels, out_channels, 1)
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = convolution(out_channels, 3 * out_channels, 1)
            self.proj = convolution(out_channels, out_channels, 1)

    def forward(self, x, emb):
        """x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H, W] (or H / 2, or 2 H)."""
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        # Two independent branches of variance 1 add up to variance 2. The factor sqrt(1/2) takes it back to
        # 1, or activations would grow from block to block. The weights were trained with it.
        x = (h + self.skip(self.resample(x))) * 0.5**0.5
        if not self.attention:
            return x
        # One head, and each of the H*W positions looks at all others. Mind the layout of the 3C channels: C
        # groups of (q, k, v). Cut into three blocks of C, the same weights run and compute something else.
        q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3)).unbind(2)  # each [B, C, H*W]
        logits = torch.einsum("bcq,bck->bqk", q, k / q.shape[1] ** 0.5)
        weights = logits.float().softmax(dim=-1).to(v.dtype)  # float32 as in EDM, also under autocast
        attended = torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
        return (self.proj(attended) + x) * 0.5**0.5


class SongUNet(nn.Module):
    """F, EDM's UNet in its DDPM++ form. Arguments have NVIDIA's names and meaning; dropout acts in training.

    `enc` and `dec` hold the blocks in the order of computing, each under its name in NVIDIA's files. A layer
    is named "enc.<block>" or "dec.<block>". The decoder mirrors the encoder, from 8 x 8 back to 32 x 32. Its
    blocks "<resolution>_block<i>" also get, along the channels, an output of the encoder at that resolution
    (a skip connection), the last one first. There is one such block more than in the encoder, since "_conv"
    and "_down" have skip connections as well. Raises InputError for more than 8 resolutions or 32 blocks in
    each: a damaged file may state a billion, which would take a while to build.
    """

    def __init__(self, img_resolution, in_channels=3, out_channels=3, label_dim=0, model_channels=128,
                 channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,),
                 dropout=0.0):
        super().__init__()
        if not 1 <= len(channel_mult) <= 8 or not 1 <= num_blocks <= 32:
            raise InputError(f"{channel_mult=}, {num_blocks=}: expected 1 to 8 resolutions, 1 to 32 blocks")
        emb_channels = model_channels * channel_mult_emb
        self.label_dim, self.model_channels = label_dim, model_channels
        if label_dim:
            self.map_label = nn.Linear(label_dim, model_channels)
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        make = functools.partial(UNetBlock, emb_channels=emb_channels, dropout=dropout)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        channels = model_channels
        for resolution, width in levels:  # from 32 x 32 down to 8 x 8
            at = f"{resolution}x{resolution}"
            if resolution == img_resolution:
                self.enc[f"{at}_conv"] = convolution(in_channels, channels, 3)
            else:
                self.enc[f"{at}_down"] = make(channels, channels, down=True)
            for i in range(num_blocks):
                attention = resolution in attn_resolutions
                self.enc[f"{at}_block{i}"] = make(channels, width, attention=attention)
                channels = width
        skip_channels = [block.out_channels for block in self.enc.values()]
        self.dec[f"{at}_in0"] = make(channels, channels, attention=True)  # the bottleneck
        self.dec[f"{at}_in1"] = make(channels, channels)
        for resolution, width in reversed(levels):  # and up again
            at = f"{resolution}x{resolution}"
            if resolution != levels[-1][0]:
                self.dec[f"{at}_up"] = make(channels, channels, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and resolution in attn_resolutions
                self.dec[f"{at}_block{i}"] = make(channels + skip_channels.pop(), width, attention=attention)
                channels = width
        self.dec[f"{at}_aux_norm"] = group_norm(channels)
        self.dec[f"{at}_aux_conv"] = convolution(channels, out_channels, 3)

    def stop_after(self, layer):
        """Remove the blocks that follow `layer`, so that `forward` returns this block's output. Returns its
        number of channels. Raises InputError for an unknown layer."""
        names = [f"{part}.{name}" for part in ("enc", "dec") for name in getattr(self, part)]
        if layer not in names:
            raise InputError(f"no layer {layer!r} in this network; it has {', '.join(names)}")
        for name in names[names.index(layer) + 1:]:
            part, key = name.split(".")
            del getattr(self, part)[key]
        last = self.get_submodule(layer)
        return last.num_channels if isinstance(last, nn.GroupNorm) else last.out_channels

    def embed(self, c_noise, class_labels):
        """c_noise [B], class_labels [B, label_dim], one-hot or zero -> emb [B, emb_channels]."""
        # Frequencies from 1 to 1/10000 in geometric steps, as for positions in a transformer. Sine first: EDM
        # computes [cos | sin], and its SongUNet then swaps the halves. In the other order the network runs
        # just as well and is told nonsense about the noise.
        half = self.model_channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - 1)
        phase = c_noise.outer((1 / 10000) ** exponent)
        emb = torch.cat([phase.sin(), phase.cos()], dim=1)  # [B, model_channels]
        if self.label_dim:
            # A one-hot vector has mean square 1 / label_dim, and sqrt(label_dim) makes it 1. No label is the
            # zero vector; map_label's bias is added all the same.
            emb = emb + self.map_label(class_labels * self.label_dim**0.5)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, c_noise, class_labels):
        """x [B, 3, H, W] scaled by c_in, the rest as in `embed` -> F's output [B, 3, H, W], or, after
        `stop_after`, the activations at that layer [B, C, h, w]."""
        emb = self.embed(c_noise, class_labels)
        n_skips = sum("_block" in name for name in self.dec)  # the encoder's last outputs; others are let go
        skips = []
        for i, block in enumerate(self.enc.values(), 1):
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            if i > len(self.enc) - n_skips:
                skips.append(x)
        for name, block in self.dec.items():
            if "_block" in name:  # the bottleneck and "_up" have no skip connection
                x = torch.cat([x, skips.pop()], dim=1)
            if name.endswith("_aux_conv"):
                x = F.silu(x)
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
        return x


# ------------------------------------------------------------------------------------------------------------
# From a clean image to its features: noise, preconditioning, network, mean over positions.


class EDMEncoder(nn.Module):
    """The teacher: encoder(images, labels, sigma, noise) -> pooled diffusion features [B, width].

    It adds the noise, and it does the half of EDM's preconditioning that concerns the input. The denoiser is
        D(x_t; sigma) = c_skip x_t + c_out F(c_in x_t; c_noise, y)
        c_in = 1 / sqrt(sigma^2 + sigma_data^2),  c_noise = ln(sigma) / 4
    where F is the network. x_t has the images' variance, sigma_data^2 = 0.5^2 on [-1, 1], plus the noise's,
    sigma^2. c_in brings it to 1 at every noise level, so that F never meets an input of unusual size.
    c_noise tells F the level, which ranges over orders of magnitude, on a logarithmic scale. c_skip and
    c_out concern the output, which features do not need.

    Frozen: no parameter requires a gradient, and nothing depends on train or eval mode. A gradient into the
    images flows where the caller asks for one. Attributes: img_resolution, label_dim (0: the network takes
    no label), layer, width (channels at that layer), arguments (of the constructor, without `layer`), model
    (the SongUNet, as far as `layer`). **network: SongUNet's arguments. Raises InputError for a layer that it
    does not have.
    """

    def __init__(self, layer="dec.8x8_in1", sigma_data=0.5, **network):
        super().__init__()
        self.model = SongUNet(**network)
        self.layer, self.sigma_data = layer, float(sigma_data)
        self.arguments = {"sigma_data": self.sigma_data, **network}  # to build another one like it
        self.img_resolution, self.label_dim = network["img_resolution"], self.model.label_dim
        self.width = self.model.stop_after(layer)
        self.requires_grad_(False).eval()

    def activations(self, images, labels, sigma, noise=None):
        """Features before the mean over positions, [B, width, h, w] float32. Otherwise as `forward`."""
        batch, size = images.shape[0], self.img_resolution
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"the teacher takes images [B, 3, {size}, {size}], not {list(images.shape)}")
        class_labels = images.new_zeros(batch, self.label_dim)
        if labels is not None and self.label_dim:
            # Only on a CPU: a GPU would have to wait for the values, and scatter stops at bad ones there.
            if labels.device.type == "cpu" and not (0 <= labels.min() and labels.max() < self.label_dim):
                raise ValueError(f"the teacher knows labels 0 to {self.label_dim - 1}, "
                                 f"not {labels.min()} to {labels.max()}")
            class_labels = class_labels.scatter(1, labels[:, None], 1.0)
        if not isinstance(sigma, torch.Tensor):
            sigma = torch.full((batch,), sigma, device=images.device)
        sigma = sigma.float().expand(batch)
        noise = torch.randn_like(images) if noise is None else noise

        x_t = (2 * images - 1) + sigma[:, None, None, None] * noise  # [0, 1] -> [-1, 1], plus noise
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()  # [B]
        return self.model(c_in[:, None, None, None] * x_t, sigma.log() / 4, class_labels).float()

    def forward(self, images, labels, sigma, noise=None):
        """g(x_t, t, y) of eq. (3), for clean images (sections 3 and 4.2 and appendix D of the paper).

        images [B, 3, H, W] float32 in [0, 1], H = W = img_resolution. labels [B] int64, or None for no label,
        which a network that was always given one does not know. sigma > 0, the noise level on the scale of
        images in [-1, 1], a float or a tensor [B]. noise [B, 3, H, W] standard normal, drawn here if None.
        Returns float32 [B, width]. Raises ValueError for another image size and, on a CPU, for labels that
        the network does not know.
        """
        return self.activations(images, labels, sigma, noise).mean(dim=(2, 3))


# ------------------------------------------------------------------------------------------------------------
# Reading diffusion models, first NVIDIA's .pkl files. A pickle is a program: it names functions and classes,
# calls them and changes what they return. So each name that an EDM file uses is answered with an inert record
# of how it was called, and any other name ends the reading. Only afterwards our own code turns the records
# into tensors.


class _Inert:
    """Stands for a call's result: keeps its arguments and the attributes that are set later. Does nothing."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        vars(self).update(state if isinstance(state, dict) else {})  # numpy.dtype's is a tuple: not needed


_NAMES = {  # (module, name) that a file may ask for: what the call returns
    ("collections", "OrderedDict"): dict,
    ("dnnlib.util", "EasyDict"): dict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Inert,  # args: class name, source, state
    ("torch.nn.modules.container", "ModuleDict"): _Inert,
    ("torch._utils", "_rebuild_parameter"): _Inert,  # args: tensor, requires_grad, hooks
    ("torch._utils", "_rebuild_tensor_v2"): _Inert,  # args: storage, offset, size, stride, ...
    ("torch.storage", "_load_from_bytes"): _Inert,  # args: bytes
    ("numpy", "dtype"): _Inert,
    ("numpy.core.multiarray", "scalar"): _Inert,
    ("numpy._core.multiarray", "scalar"): _Inert,  # the same in newer files
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        # A new class each time: a pickle can change the attributes of what it is given, so never our own.
        return type(name, (_NAMES[module, name],), {})


def _state(module):
    """The attributes of an unpickled module: a plain torch module's or NVIDIA's persistent one's."""
    return vars(module) if "_modules" in vars(module) else module.args[0]["state"]


def _tensor(record):
    """The tensor that a record of its rebuilding stands for; it shares the storage's memory."""
    if type(record).__name__ == "_rebuild_parameter":
        record = record.args[0]
    storage, offset, size, stride = record.args[:4]
    # The bytes are a pickle once more. weights_only lets torch build tensors from it and nothing else.
    storage = torch.load(io.BytesIO(storage.args[0]), map_location="cpu", weights_only=True)
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    return torch.as_strided(flat, size, stride, offset)  # an error where it would reach beyond the storage


def _tensors(module, prefix=""):
    """All tensors of an unpickled module by their state_dict names."""
    state = _state(module)
    records = {**state["_parameters"], **state["_buffers"]}
    tensors = {prefix + name: _tensor(record) for name, record in records.items() if record is not None}
    for name, child in state["_modules"].items():
        tensors |= _tensors(child, f"{prefix}{name}.")
    return tensors


def _one_line(error):
    """An error's first line in ASCII, since it may quote the file."""
    return ascii(str(error).partition("\n")[0])[1:-1][:2000] or type(error).__name__


def read_edm_pickle(path):
    """Read NVIDIA's .pkl without running anything in it. Returns (SongUNet's arguments and sigma_data as a
    dict, SongUNet's tensors by name). Raises any exception for a file of another kind."""
    with open(path, "rb") as file:
        precond = _InertUnpickler(file).load()["ema"]  # the averaged weights, which NVIDIA samples with
    network = _state(precond)["_modules"]["model"]
    classes = [str(module.args[0]["class_name"]) for module in (precond, network)]
    if classes != ["EDMPrecond", "SongUNet"]:
        raise ValueError(f"it holds {classes}, not EDMPrecond and SongUNet")
    sigma_data = float(_state(precond).get("sigma_data", 0.5))
    return {**_state(network)["_init_kwargs"], "sigma_data": sigma_data}, _tensors(network)


def read_edm_checkpoint(path):
    """Read the file that experiments/train_edm.py writes. Returns and raises as `read_edm_pickle`."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {name: x for name, x in saved["model_state_dict"].items() if isinstance(x, torch.Tensor)}
    return dict(saved["edm_arguments"]), tensors


# ------------------------------------------------------------------------------------------------------------
# Files of both kinds.

_DDPMPP = {"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard",
           "channel_mult_noise": 1, "resample_filter": [1, 1]}  # NCSN++ has other values here
_TRAINING = ("augment_dim", "dropout", "label_dropout")  # arguments that concern NVIDIA's training alone


def check_file(path):
    """Raise InputError for what downloads often leave in place of a file, OSError if it cannot be opened."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the file itself: run git lfs pull")
    if start.startswith((b"<!doctype html", b"<html")):
        raise InputError(f"{path}: is a web page (HTML), not the file itself: download it again")


def local_file(path_or_url):
    """The path of a file. A URL is downloaded once into torch.hub's cache. There the whole URL is in the
    name, since different teachers share its last part. Raises InputError where it cannot be downloaded."""
    url = str(path_or_url)
    if not url.startswith(("http://", "https://")):
        return path_or_url
    path = Path(torch.hub.get_dir()) / "checkpoints" / re.sub(r"[^\w.-]+", "-", url)[-200:]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))  # to a temporary name first
            check_file(path)
        except Exception as error:
            path.unlink(missing_ok=True)  # a web page that says "not found" should not stay in the cache
            raise InputError(f"{url}: cannot be downloaded ({_one_line(error)})") from None
    return path


def read_edm(path):
    """What an EDM file holds: (SongUNet's arguments and sigma_data, SongUNet's tensors by name). Nothing in
    the file is run. Raises as `load_edm_encoder`."""
    check_file(path)
    try:
        ours = zipfile.is_zipfile(path)  # torch.save writes a zip file, NVIDIA a bare pickle
        arguments, tensors = (read_edm_checkpoint if ours else read_edm_pickle)(path)
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise InputError(f"{path}: damaged, refused or no EDM network ({_one_line(error)}); expected tensors "
                         "and plain data, as in NVIDIA's .pkl or train_edm.py's .pt") from None
    for name, value in _DDPMPP.items():
        found = arguments.pop(name, value)
        if found != value:
            raise InputError(f"{path}: is NCSN++ or another architecture ({name} {_one_line(found)}); only "
                             f"DDPM++ is read, as in NVIDIA's -vp.pkl files ({name} {value})")
    return {name: value for name, value in arguments.items() if name not in _TRAINING}, tensors


def load_edm(path_or_url, build):
    """Load a diffusion model, NVIDIA's .pkl or train_edm.py's .pt, into what `build` makes, on the CPU.

    build(sigma_data=..., **SongUNet's arguments) returns a module whose parameters are all in `model`, a
    SongUNet; it may have fewer blocks than the file. Returned in float32, frozen. Raises as
    `load_edm_encoder`.
    """
    path = local_file(path_or_url)
    arguments, tensors = read_edm(path)
    parameters = {}
    try:
        with torch.device("meta"):  # names and shapes only: nothing is allocated before they are known to fit
            module = build(**arguments)
        for name, expected in module.model.state_dict().items():
            if name not in tensors:
                raise InputError(f"{name} is missing")
            if tensors[name].shape != expected.shape:
                raise InputError(f"{name} is {list(tensors[name].shape)}, "
                                 f"expected {list(expected.shape)} from its arguments")
            parameters[name] = tensors[name].float().clone()
    except Exception as error:  # arguments in a damaged file can be anything
        raise InputError(f"{path}: {_one_line(error)}") from None
    module.model.load_state_dict(parameters, assign=True)
    return module.requires_grad_(False)


def load_edm_encoder(path_or_url, layer="dec.8x8_in1"):
    """Load the teacher, from NVIDIA's .pkl format or from experiments/train_edm.py's: an EDMEncoder, frozen.

    path_or_url: a file, or an http(s) URL that is downloaded once into torch.hub's cache. layer: the block
    whose output is the target, any one of the UNet's; for the default see the top of this file. Returned in
    float32, on the CPU. Raises InputError, one line that names the file, where it is damaged, of another
    kind, lacks a tensor or the layer, asks for anything but tensors and plain data, or cannot be downloaded.
    Raises OSError where it cannot be opened.
    """
    return load_edm(path_or_url, functools.partial(EDMEncoder, layer))


def main():
    """Print what a diffusion model's file holds."""
    parser = argparse.ArgumentParser(description="Print what an EDM file holds, running nothing of it.")
    parser.add_argument("file", help="NVIDIA's .pkl or train_edm.py's .pt: a path or a URL")
    path = local_file(parser.parse_args().file)
    arguments, tensors = read_edm(path)
    print(f"{path}: EDM's SongUNet (DDPM++),", *[f"{name} {value}," for name, value in arguments.items()])
    size = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(("weight", "bias")))
    print(f"  {size:,} parameters")
    layers = dict.fromkeys(".".join(name.split(".")[:2]) for name in tensors if name[:4] in ("enc.", "dec."))
    print("  layers:", *layers)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
