"""Features of a frozen EDM diffusion model: what arXiv 2602.19931 aligns a robust CIFAR classifier with.

    python edm_encoder.py edm-cifar10-32x32-cond-vp.pkl      # what a file holds; nothing inside it is run

    encoder = load_edm_encoder("edm-cifar10-32x32-cond-vp.pkl")
    target = encoder(images, labels, sigma=0.06)             # images [B, 3, 32, 32] in [0, 1] -> [B, 256]

The target is g(x_t, t, y) of the paper's eq. (3). A diffusion model is a denoiser: it is shown a noisy image
x_t = x + sigma * noise and a label y, and has learned to tell the clean x. EDM's network (Karras et al. 2022,
arXiv 2206.00364) is a UNet. It shrinks the image from 32 x 32 to 8 x 8 positions and grows it again. Fine
detail takes the skip connections past the middle, so what the narrow middle has to hold is what the image
shows. The paper takes the output of the last block before upsampling begins, dec.8x8_in1, and averages it
over the 8 x 8 positions (appendix D).

Why add noise to a clean image first? The network has hardly ever seen one without, and sigma decides what
it looks for. With almost no noise the answer is the input itself, and nothing needs to be understood. With
a lot of it there is nothing left to see. A little noise drowns the detail that does not matter for
recognition and keeps the object, so features are best at one small sigma and get worse on both sides of it
(section 3). DDAE found that sigma to be 0.06 for EDM on CIFAR-10 (Xiang et al. 2023, arXiv 2303.09769). It
is measured on images in [-1, 1]; on the [0, 1] scale it would be 0.03.

This file holds the first half of EDM's SongUNet in both its forms, DDPM++ ("vp" files) and NCSN++ ("ve"
files), and a reader for NVIDIA's .pkl files and for the .pt files of experiments/train_edm.py, where the
second half is. NVIDIA's loader executes the Python source that is embedded in each .pkl. Ours takes tensors,
numbers and strings, and refuses a file that asks for anything else. The code is our own, the parameter names
are NVIDIA's. So are the weights in NVIDIA's files, under CC BY-NC-SA 4.0 (no commercial use), which may also
bind models that are trained with them.
"""
import argparse
import functools
import hashlib
import io
import pickle
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------------------------------------
# Building blocks of EDM's UNets. Nothing in them is particular to the first half.


class Conv2d(nn.Module):
    """Convolution with zero padding; `down` also halves height and width, `up` doubles them (EDM's Conv2d).

    Dropping every second pixel would turn fine stripes into false coarse ones (aliasing), so each channel is
    blurred first. resample_filter holds the blur's 1-D taps: [1, 1], the mean of 2 x 2 pixels, in DDPM++ and
    [1, 3, 3, 1] in NCSN++. fused: convolve first and blur afterwards, as NCSN++ does for its image pyramid.
    """

    def __init__(self, in_channels, out_channels, kernel, down=False, up=False, resample_filter=(1, 1),
                 fused=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # torch's default, until a file is loaded
        self.down, self.up, self.fused, self.padding = down, up, fused, kernel // 2
        if down or up:
            taps = torch.tensor(resample_filter, dtype=torch.float32)
            blur = taps.outer(taps) / taps.sum() ** 2  # sums to 1: a constant image stays what it is
            self.register_buffer("resample_filter", blur[None, None])  # [1, 1, L, L], in the file as well

    def forward(self, x):
        """x [B, in_channels, H, W] -> [B, out_channels, H, W], or half or twice the height and width."""
        if self.up:
            x = self.double_and_blur(x)
        if not self.down:
            return F.conv2d(x, self.weight, self.bias, padding=self.padding)
        blur_padding = (self.resample_filter.shape[-1] - 1) // 2
        if self.fused:  # all of the padding comes first; more between the two would change the border
            x = F.conv2d(x, self.weight, self.bias, padding=self.padding + blur_padding)
            return self.blur_and_halve(x, padding=0)
        return F.conv2d(self.blur_and_halve(x, blur_padding), self.weight, self.bias, padding=self.padding)

    def blur_and_halve(self, x, padding):
        """x [B, C, H, W] -> half the height and width, each channel blurred by itself."""
        blur = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)  # one blur for all channels
        return F.conv2d(x, blur, groups=x.shape[1], stride=2, padding=padding)

    def double_and_blur(self, x):
        """x [B, C, H, W] -> twice the height and width: zeros between the pixels, then the blur, times 4 as
        only a quarter of the pixels are not zero. With [1, 1] each pixel becomes 2 x 2 equal ones."""
        blur = 4 * self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        padding = (blur.shape[-1] - 1) // 2
        return F.conv_transpose2d(x, blur, groups=x.shape[1], stride=2, padding=padding)


def group_norm(channels):
    """EDM's group norm: 32 groups, or fewer where a group would have less than four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """Residual block that is told the noise level and the label, optionally followed by self-attention.

    emb [B, emb_channels] says how noisy the image is and what it shows. It enters as an offset per channel
    between the two convolutions, so that one set of weights can treat a little noise and a lot differently.
    """

    dropout = 0.0  # between the two convolutions; who trains a network sets it

    def __init__(self, in_channels, out_channels, emb_channels, down=False, up=False, attention=False,
                 resample_filter=(1, 1)):
        super().__init__()
        resample = {"down": down, "up": up, "resample_filter": resample_filter}
        self.norm0 = group_norm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3)
        self.skip = None  # where the shape stays, x is added as it is
        if down or up or in_channels != out_channels:
            self.skip = Conv2d(in_channels, out_channels, kernel=1, **resample)
        self.attention = attention
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, kernel=1)
            self.proj = Conv2d(out_channels, out_channels, kernel=1)

    def forward(self, x, emb):
        """x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H, W], H, W as in Conv2d."""
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        # Two independent branches of unit variance add up to variance 2. The factor sqrt(1/2) takes it back
        # to 1, or activations would grow from block to block. The weights were trained with it.
        x = (h + (x if self.skip is None else self.skip(x))) * 0.5**0.5
        if not self.attention:
            return x
        # One head, and each of the H*W positions looks at all others. Mind the layout of the 3C channels: C
        # groups of (q, k, v). Cut into three blocks of C, the same weights run and compute something else.
        q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3)).unbind(2)  # each [B, C, H*W]
        logits = torch.einsum("bcq,bck->bqk", q, k / q.shape[1] ** 0.5)
        weights = logits.float().softmax(dim=-1).to(v.dtype)  # float32 as in EDM, also under autocast
        attended = torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
        return (self.proj(attended) + x) * 0.5**0.5


# ------------------------------------------------------------------------------------------------------------
# The network: encoder and bottleneck of EDM's SongUNet, the UNet of Song et al. 2021 (arXiv 2011.13456).


class SongUNetEncoder(nn.Module):
    """The first half of SongUNet, as far as `layer`, "enc.<name>" or "dec.<name>".

    self.enc and self.dec hold the blocks in the order of computing, each under its name in the file. The
    bottleneck's two blocks count as the decoder's first ones there: dec.8x8_in0 and dec.8x8_in1. The other
    arguments are NVIDIA's constructor's, as a file states them; those that only concern training or the
    second half are left out (`_UNUSED_ARGUMENTS`). Raises ValueError for a layer or a kind of network it
    does not have.
    """

    def __init__(self, layer, img_resolution, in_channels=3, label_dim=0, model_channels=128,
                 channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,),
                 embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
                 resample_filter=(1, 1)):
        super().__init__()
        known = embedding_type in ("positional", "fourier") and encoder_type in ("standard", "residual")
        # The numbers may come from a damaged file, and a billion blocks would take a while to build.
        if not known or not 1 <= len(channel_mult) <= 8 or not 1 <= num_blocks <= 32:
            raise ValueError(f"no DDPM++ or NCSN++ network: {embedding_type=}, {encoder_type=}, "
                             f"{channel_mult=}, {num_blocks=}")
        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.label_dim, self.noise_channels = label_dim, noise_channels
        if embedding_type == "fourier":
            self.map_noise = nn.Module()  # computes nothing, but gives the buffer its name in the file
            self.map_noise.register_buffer("freqs", 16 * torch.randn(noise_channels // 2))
        if label_dim:
            self.map_label = nn.Linear(label_dim, noise_channels)
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        block = {"emb_channels": emb_channels, "resample_filter": resample_filter}
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels = model_channels
        for level, multiple in enumerate(channel_mult):  # from 32 x 32 down to 8 x 8
            name, width = f"{img_resolution >> level}x{img_resolution >> level}", model_channels * multiple
            if level == 0:
                self.enc[f"{name}_conv"] = Conv2d(in_channels, channels, kernel=3)
            else:
                self.enc[f"{name}_down"] = UNetBlock(channels, channels, down=True, **block)
            if level > 0 and encoder_type == "residual":  # NCSN++ shows the image again at each resolution
                self.enc[f"{name}_aux_residual"] = Conv2d(in_channels, channels, kernel=3, down=True,
                                                          fused=True, resample_filter=resample_filter)
                in_channels = channels  # the next one starts from this one's result, not from the image
            attention = img_resolution >> level in attn_resolutions
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = UNetBlock(channels, width, attention=attention, **block)
                channels = width
        self.dec[f"{name}_in0"] = UNetBlock(channels, channels, attention=True, **block)
        self.dec[f"{name}_in1"] = UNetBlock(channels, channels, **block)
        self._drop_what_follows(layer)

    def _drop_what_follows(self, layer):
        """Keep the blocks up to `layer`: later ones would cost time and memory and change nothing."""
        names = [f"enc.{name}" for name in self.enc] + [f"dec.{name}" for name in self.dec]
        if layer not in names:
            raise ValueError(f"no layer {layer!r} in this network; it has {', '.join(names)}")
        for name in names[names.index(layer) + 1:]:
            part, key = name.split(".")
            del getattr(self, part)[key]

    def embed(self, c_noise, class_labels):
        """c_noise [B], class_labels [B, label_dim], one-hot or zero -> emb [B, emb_channels]."""
        if hasattr(self, "map_noise"):  # NCSN++: random Fourier frequencies, drawn once before training
            phase = c_noise.outer(2 * torch.pi * self.map_noise.freqs)
        else:  # DDPM++: frequencies from 1 to 1/10000 in geometric steps, as for positions in a transformer
            half = self.noise_channels // 2
            exponent = torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - 1)
            phase = c_noise.outer((1 / 10000) ** exponent)
        # Sine first: EDM computes [cos | sin], and its SongUNet then swaps the halves. In the other order the
        # network runs just as well and is told nonsense about the noise.
        emb = torch.cat([phase.sin(), phase.cos()], dim=1)  # [B, noise_channels]
        if self.label_dim:
            # A one-hot vector has mean square 1 / label_dim, and sqrt(label_dim) makes it 1. No label is the
            # zero vector; map_label's bias is added all the same.
            emb = emb + self.map_label(class_labels * self.label_dim**0.5)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, c_noise, class_labels):
        """x [B, 3, H, W] scaled by c_in, the rest as in `embed` -> activations at `layer`, [B, C, h, w]."""
        emb = self.embed(c_noise, class_labels)
        image = x  # what NCSN++ shows again at each level: first the image, then the last such sum
        for name, module in self.enc.items():
            if name.endswith("_aux_residual"):
                x = image = (x + module(image)) * 0.5**0.5
            else:
                x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
        for module in self.dec.values():
            x = module(x, emb)
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
    c_out concern the output, which we never compute.

    Frozen: no parameter requires a gradient, and nothing depends on train or eval mode. A gradient into the
    images flows where the caller asks for one. Attributes: img_resolution, label_dim (0: the network takes
    no label), layer, width (channels at that layer), arguments (of the constructor, without `layer`).
    **network: SongUNetEncoder's other arguments.
    """

    def __init__(self, layer="dec.8x8_in1", sigma_data=0.5, **network):
        super().__init__()
        self.model = SongUNetEncoder(layer, **network)
        self.layer, self.sigma_data = layer, float(sigma_data)
        self.arguments = {"sigma_data": self.sigma_data, **network}  # to build another one like it
        self.img_resolution, self.label_dim = network["img_resolution"], self.model.label_dim
        last = list((self.model.dec or self.model.enc).values())[-1]
        self.width = (last.conv1 if isinstance(last, UNetBlock) else last).weight.shape[0]
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
# that we need into tensors.


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
_UNUSED_ARGUMENTS = ("out_channels", "augment_dim", "dropout", "label_dropout", "decoder_type")


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        # A new class each time: a pickle can change the attributes of what it is given, so never our own.
        return type(name, (_NAMES[module, name],), {})


def _state(module):
    """The attributes of an unpickled module: a plain torch module's or NVIDIA's persistent one's."""
    return vars(module) if "_modules" in vars(module) else module.args[0]["state"]


def _one_line(error):
    """An error's first line in ASCII, since it may quote the file."""
    return ascii((str(error).splitlines() or [""])[0])[1:-1][:200] or type(error).__name__


def read_edm_pickle(path):
    """Read an EDM .pkl without running anything in it.

    Returns (SongUNetEncoder's arguments, sigma_data, the file's EDMPrecond as an inert record). Raises
    ValueError for a file that is no such pickle, is damaged, or asks for more than tensors and plain data.
    """
    with open(path, "rb") as file:
        if file.read(64).lstrip()[:1] == b"<":
            raise ValueError("this is a web page (HTML), not a .pkl; download the file itself")
        file.seek(0)
        try:
            precond = _InertUnpickler(file).load()["ema"]  # the averaged weights, which NVIDIA samples with
            network = _state(precond)["_modules"]["model"]
            classes = [str(module.args[0]["class_name"]) for module in (precond, network)]
            arguments = dict(_state(network)["_init_kwargs"])
            sigma_data = float(_state(precond).get("sigma_data", 0.5))
        except Exception as error:  # a damaged or hostile pickle can fail in any way
            raise ValueError(f"cut off, refused or not an EDM network ({_one_line(error)}); expected tensors "
                             "and plain data, a dict with an EDMPrecond under 'ema'") from None
    if classes != ["EDMPrecond", "SongUNet"]:
        raise ValueError(f"holds {ascii(classes)}, expected EDMPrecond and SongUNet (edm-cifar10-*.pkl)")
    return {key: arguments[key] for key in arguments if key not in _UNUSED_ARGUMENTS}, sigma_data, precond


def _unpickled_tensor(precond, name):
    """The tensor of a state_dict name in read_edm_pickle's record, as float32. KeyError if there is none."""
    *path, last = name.split(".")
    state = _state(precond)
    for part in path:
        state = _state(state["_modules"][part])
    record = (state["_parameters"] | state["_buffers"])[last]
    if type(record).__name__ == "_rebuild_parameter":
        record = record.args[0]
    storage, offset, size, stride = record.args[:4]
    # The bytes are a pickle once more. weights_only lets torch build tensors from it and nothing else.
    storage = torch.load(io.BytesIO(storage.args[0]), map_location="cpu", weights_only=True)
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    return torch.as_strided(flat, size, stride, offset).float().clone()


def find_tensor(source, name, shape):
    """The tensor of that state_dict name, say "model.enc.32x32_conv.weight", in read_edm_pickle's record or
    in a state dict, as float32.

    Raises ValueError where there is none of that shape, RuntimeError where it would reach beyond its storage.
    """
    try:
        tensor = source[name].float() if isinstance(source, dict) else _unpickled_tensor(source, name)
    except KeyError:
        raise ValueError(f"{name} is missing") from None
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)} from its arguments")
    return tensor


def read_edm_checkpoint(path):
    """Read the file that experiments/train_edm.py writes. Returns what `read_edm_pickle` does, with a plain
    state dict in place of the record. Raises ValueError for any other file of torch.save's."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        arguments = dict(saved["edm_arguments"])
        sigma_data = float(arguments.pop("sigma_data", 0.5))
        tensors = {f"model.{name}": tensor for name, tensor in saved["model_state_dict"].items()}
    except Exception as error:
        raise ValueError(f"damaged, refused or no diffusion model ({_one_line(error)}); expected "
                         "'edm_arguments' and 'model_state_dict', tensors and plain data") from None
    return {key: arguments[key] for key in arguments if key not in _UNUSED_ARGUMENTS}, sigma_data, tensors


def load_edm(path_or_url, build):
    """Load a diffusion model, NVIDIA's .pkl or train_edm.py's .pt, into what `build` makes, on the CPU.

    build(sigma_data=..., **the network's arguments) returns a module with the network in `model`; parts of
    the file that it does not have are left out. Returned in float32, frozen. Raises as `load_edm_encoder`.
    """
    path, hint = path_or_url, ""
    if str(path_or_url).startswith(("http://", "https://")):
        path, hint = _download(str(path_or_url)), "; delete the file to download it again"
    try:
        ours = zipfile.is_zipfile(path)  # torch.save writes a zip file, NVIDIA a bare pickle
        arguments, sigma_data, source = (read_edm_checkpoint if ours else read_edm_pickle)(path)
        with torch.device("meta"):  # names and shapes only: nothing is allocated before they are known to fit
            module = build(sigma_data=sigma_data, **arguments)
        needed = module.state_dict()
        tensors = {name: find_tensor(source, name, tensor.shape) for name, tensor in needed.items()}
        module.load_state_dict(tensors, assign=True)
    except OSError:
        raise
    except Exception as error:  # whatever else is wrong in the file
        known = isinstance(error, ValueError)
        text = str(error) if known else f"not a usable EDM network ({_one_line(error)})"
        raise ValueError(f"{path}: {text}{hint}") from None
    return module.requires_grad_(False)


def load_edm_encoder(path_or_url, layer="dec.8x8_in1"):
    """Load the teacher, from NVIDIA's .pkl format or from experiments/train_edm.py's: an EDMEncoder, frozen.

    path_or_url: a file, or an http(s) URL that is downloaded once into torch.hub's cache. layer: the block
    whose output is the target; the default is the paper's, "the UNet bottleneck block before the upsampling
    layers" (appendix D). Returned in float32, on the CPU. Raises ValueError, one line that names the file,
    where it is damaged, of another kind, lacks a tensor or the layer, asks for anything but tensors and
    plain data, or cannot be downloaded. OSError where it cannot be opened.
    """
    return load_edm(path_or_url, functools.partial(EDMEncoder, layer))


def _download(url):
    """Download once. Different teachers share a file name, so the cached one has a hash of the URL."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(url).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))  # to a temporary name first
        except Exception as error:
            raise ValueError(f"{url}: cannot be downloaded ({_one_line(error)})") from None
    return path


def main():
    """Print what a diffusion model's file holds."""
    parser = argparse.ArgumentParser(description="Print what an EDM file holds, running nothing of it.")
    parser.add_argument("file", help="NVIDIA's .pkl or train_edm.py's .pt: a path or a URL")
    parser.add_argument("--layer", default="dec.8x8_in1", help="block to look at (default: %(default)s)")
    args = parser.parse_args()
    try:
        encoder = load_edm_encoder(args.file, args.layer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    count = lambda module: f"{sum(p.numel() for p in module.parameters()):,} parameters"
    kind = f"class-conditional, {encoder.label_dim} classes" if encoder.label_dim else "unconditional"
    print(f"{args.file}: EDM SongUNet, {encoder.img_resolution} px, {kind}")
    for part in ("enc", "dec"):
        for name, module in getattr(encoder.model, part).items():
            print(f"  {part}.{name:24} {count(module):>23}")
    print(f"features at {encoder.layer}: {encoder.width} wide; {count(encoder)} as far as there")


if __name__ == "__main__":
    main()
