"""Features of a frozen EDM diffusion model, as a target for a classifier: g(x_t, t, y) in eq. (3) of arXiv 2602.19931.

    python edm_encoder.py edm-cifar10-32x32-cond-vp.pkl        # what the file holds; runs nothing that is in it

    encoder = load_edm_encoder("edm-cifar10-32x32-cond-vp.pkl")
    target = encoder(images, labels, sigma=0.06)                # images [B, 3, 32, 32] in [0, 1] -> [B, 256]

EDM (Karras et al. 2022, arXiv 2206.00364) denoises x + sigma * noise. The paper takes the activations at the UNet's
bottleneck, the last block before upsampling begins, averaged over the 8 x 8 positions. So this file holds the first half
of EDM's SongUNet, in both its forms, DDPM++ ("vp" files) and NCSN++ ("ve" files), and a reader for NVIDIA's .pkl files.

NVIDIA's loader executes the Python source that is embedded in each .pkl. Ours does not: it rebuilds tensors, numbers and
strings, and refuses a file that asks for anything else. The network below is our own code with NVIDIA's parameter names.
NVIDIA's weights are under CC BY-NC-SA 4.0 (no commercial use), and models that are trained with them may be affected.
"""
import argparse
import hashlib
import http.client
import io
import pickle
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# The network: encoder and bottleneck of EDM's SongUNet. Module names are the file's, so that its tensors load unchanged.


class Conv2d(nn.Module):
    """Convolution with zero padding; with `down`, after low-pass filtering and downsampling by 2.

    fused: convolve first and then filter and downsample, as in NCSN++'s input pyramid. resample_filter is a 1-D low-pass filter,
    [1, 1] in DDPM++ and [1, 3, 3, 1] in NCSN++; its outer product, normalised to sum 1, runs over each channel alone.
    """

    def __init__(self, in_channels, out_channels, kernel, down=False, resample_filter=(1, 1), fused=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # only matters where no file is loaded
        self.down, self.fused, self.padding = down, fused, kernel // 2
        if down:
            taps = torch.tensor(resample_filter, dtype=torch.float32)
            self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])  # [1, 1, L, L]

    def forward(self, x):
        """x [B, in_channels, H, W] -> [B, out_channels, H, W], or half the height and width where `down`."""
        if not self.down:
            return F.conv2d(x, self.weight, self.bias, padding=self.padding)
        low_pass_padding = (self.resample_filter.shape[-1] - 1) // 2
        if self.fused:  # all the padding up front, none between the two
            x = F.conv2d(x, self.weight, self.bias, padding=self.padding + low_pass_padding)
            return self._low_pass(x, padding=0)
        return F.conv2d(self._low_pass(x, low_pass_padding), self.weight, self.bias, padding=self.padding)

    def _low_pass(self, x, padding):
        per_channel = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, per_channel, groups=x.shape[1], stride=2, padding=padding)


class UNetBlock(nn.Module):
    """Residual block with the noise-level embedding added between its two convolutions, optionally with attention."""

    def __init__(self, in_channels, out_channels, emb_channels, down=False, attention=False, resample_filter=(1, 1)):
        super().__init__()
        self.norm0 = group_norm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, down=down, resample_filter=resample_filter)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3)
        self.skip = None
        if down or in_channels != out_channels:
            self.skip = Conv2d(in_channels, out_channels, kernel=1, down=down, resample_filter=resample_filter)
        self.attention = attention
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, kernel=1)
            self.proj = Conv2d(out_channels, out_channels, kernel=1)

    def forward(self, x, emb):
        """x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H, W] (halved where the block is `down`)."""
        h = self.conv0(F.silu(self.norm0(x)))
        h = self.conv1(F.silu(self.norm1(h + self.affine(emb)[:, :, None, None])))
        # Every sum of two branches is scaled back to unit variance by sqrt(1/2).
        x = (h + (x if self.skip is None else self.skip(x))) * 0.5**0.5
        if not self.attention:
            return x
        # One head over all H*W positions. The 3C channels are C groups of (q, k, v), not three blocks of C.
        q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3)).unbind(2)  # each [B, C, H*W]
        logits = torch.einsum("bcq,bck->bqk", q, k / q.shape[1] ** 0.5)
        weights = logits.float().softmax(dim=-1).to(v.dtype)  # softmax in float32, also under autocast
        attended = torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
        return (self.proj(attended) + x) * 0.5**0.5


def group_norm(channels):
    """EDM's group norm: at least four channels in a group, at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class SongUNetEncoder(nn.Module):
    """The first half of EDM's SongUNet, as far as `layer`. Arguments as in NVIDIA's constructor; those that only concern
    training or the second half (dropout, label_dropout, augment_dim, decoder_type, out_channels) are left out."""

    def __init__(self, layer, img_resolution, in_channels=3, label_dim=0, model_channels=128, channel_mult=(1, 2, 2, 2),
                 channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), embedding_type="positional",
                 channel_mult_noise=1, encoder_type="standard", resample_filter=(1, 1)):
        super().__init__()
        known = embedding_type in ("positional", "fourier") and encoder_type in ("standard", "residual")
        if not known or not 1 <= len(channel_mult) <= 8 or not 1 <= num_blocks <= 32:
            raise ValueError(f"no DDPM++ or NCSN++ network: {embedding_type=}, {encoder_type=}, {channel_mult=}, {num_blocks=}")
        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.layer, self.label_dim, self.noise_channels = layer, label_dim, noise_channels
        if embedding_type == "fourier":
            self.map_noise = nn.Module()  # NCSN++'s random frequencies, a buffer of the file, already scaled by 16
            self.map_noise.register_buffer("freqs", 16 * torch.randn(noise_channels // 2))
        if label_dim:
            self.map_label = nn.Linear(label_dim, noise_channels)
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        block = {"emb_channels": emb_channels, "resample_filter": resample_filter}
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels = model_channels
        for level, multiple in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, channels, kernel=3)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(channels, channels, down=True, **block)
                if encoder_type == "residual":  # NCSN++: the input image, convolved and halved, joins in at each level
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(in_channels, channels, kernel=3, down=True, fused=True,
                                                                   resample_filter=resample_filter)
                    in_channels = channels
            for i in range(num_blocks):
                width = model_channels * multiple
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(channels, width, attention=res in attn_resolutions, **block)
                channels = width
        self.dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, attention=True, **block)
        self.dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, **block)
        self._drop_what_follows(layer)

    def _drop_what_follows(self, layer):
        """Keep the blocks up to `layer` only: what follows would cost time and memory and change nothing."""
        names = [f"enc.{name}" for name in self.enc] + [f"dec.{name}" for name in self.dec]
        if layer not in names:
            raise ValueError(f"no layer {layer!r} in this network; it has {', '.join(names)}")
        for name in names[names.index(layer) + 1:]:
            part, key = name.split(".")
            del getattr(self, part)[key]

    def embed_noise(self, c_noise):
        """c_noise [B] -> [B, noise_channels]: positional (DDPM++) or random Fourier (NCSN++) features."""
        if hasattr(self, "map_noise"):
            phase = c_noise.outer(2 * torch.pi * self.map_noise.freqs)
        else:
            half = self.noise_channels // 2
            exponent = torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - 1)
            phase = c_noise.outer((1 / 10000) ** exponent)
        return torch.cat([phase.sin(), phase.cos()], dim=1)  # [sin | cos]: EDM swaps the two halves of [cos | sin]

    def forward(self, x, c_noise, class_labels):
        """x [B, C, H, W] preconditioned, c_noise [B], class_labels [B, label_dim] one-hot or zero -> activations at `layer`."""
        emb = self.embed_noise(c_noise)
        if self.label_dim:
            emb = emb + self.map_label(class_labels * self.label_dim**0.5)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))  # [B, emb_channels]
        aux = x
        for name, module in self.enc.items():
            if name.endswith("_aux_residual"):
                x = aux = (x + module(aux)) * 0.5**0.5
            else:
                x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
        for module in self.dec.values():
            x = module(x, emb)
        return x


class EDMEncoder(nn.Module):
    """EDM's preconditioning around the network: `encoder(images, labels, sigma, noise)` gives pooled features [B, width].

    Frozen: no parameter requires a gradient, and nothing inside depends on the mode. A gradient with respect to the images
    flows where the caller asks for one. Attributes: img_resolution, label_dim (0: unconditional),
    layer, width (channels at that layer).
    """

    def __init__(self, layer="dec.8x8_in1", sigma_data=0.5, **network):
        super().__init__()
        self.model = SongUNetEncoder(layer, **network)
        self.layer, self.sigma_data = layer, float(sigma_data)
        self.img_resolution, self.label_dim = network["img_resolution"], self.model.label_dim
        last = list((self.model.dec or self.model.enc).values())[-1]
        self.width = (last.conv1 if isinstance(last, UNetBlock) else last).weight.shape[0]
        self.requires_grad_(False).eval()

    def activations(self, images, labels, sigma, noise=None):
        """Features before pooling, [B, width, h, w] float32. Arguments and errors as in `forward`."""
        resolution = self.img_resolution
        if images.ndim != 4 or images.shape[1:] != (3, resolution, resolution):
            raise ValueError(f"the teacher takes images [B, 3, {resolution}, {resolution}], not {list(images.shape)}")
        batch = images.shape[0]
        class_labels = images.new_zeros(batch, self.label_dim)  # no label: a zero vector
        if labels is not None and self.label_dim:
            # On a GPU this look at the values would stall the queue; there an index out of range trips a device assertion.
            if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < self.label_dim:
                raise ValueError(f"the teacher knows labels 0 to {self.label_dim - 1}, not {int(labels.min())} to {int(labels.max())}")
            class_labels = class_labels.scatter(1, labels[:, None], 1.0)
        if not isinstance(sigma, torch.Tensor):
            sigma = torch.full((batch,), sigma, device=images.device)
        sigma = sigma.float().expand(batch)  # [B]
        noise = torch.randn_like(images) if noise is None else noise

        noisy = (2 * images - 1) + sigma[:, None, None, None] * noise  # x_t: the clean image in [-1, 1] plus noise
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
        return self.model(c_in[:, None, None, None] * noisy, sigma.log() / 4, class_labels).float()

    def forward(self, images, labels, sigma, noise=None):
        """Diffusion features g(x_t, t, y) of clean images (section 3 and appendix D of the paper).

        images [B, 3, H, W] float32 in [0, 1], H = W = img_resolution; labels [B] int64 or None (then, and in an
        unconditional network always, no label is given); sigma > 0, noise level on the scale of images in [-1, 1], a float
        or a tensor [B]; noise [B, 3, H, W] standard normal, drawn here if None. Returns float32 [B, width], the mean
        over positions. Raises ValueError for another image size and (on the CPU) for labels out of range.
        """
        return self.activations(images, labels, sigma, noise).mean(dim=(2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# The file format. A pickle is a program: it names functions and classes, calls them and changes what they return. So every
# name that an EDM file uses is answered with a fresh, inert record of how it was called, and any other name ends the
# reading. Only afterwards the records that we need are turned into tensors, by our code.


class _Inert:
    """Answers a call: keeps its arguments, and the attributes of an object that are set afterwards. No behaviour."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        vars(self).update(state if isinstance(state, dict) else {})  # numpy.dtype's is a tuple, and not needed


_NAMES = {  # (module, name): what its calls return
    ("collections", "OrderedDict"): dict,
    ("dnnlib.util", "EasyDict"): dict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Inert,  # (meta): class name, source, state
    ("torch.nn.modules.container", "ModuleDict"): _Inert,
    ("torch._utils", "_rebuild_parameter"): _Inert,  # (tensor, requires_grad, hooks)
    ("torch._utils", "_rebuild_tensor_v2"): _Inert,  # (storage, offset, size, stride, requires_grad, hooks)
    ("torch.storage", "_load_from_bytes"): _Inert,  # (bytes)
    ("numpy", "dtype"): _Inert,  # (code, ...)
    ("numpy.core.multiarray", "scalar"): _Inert,  # (dtype, bytes)
    ("numpy._core.multiarray", "scalar"): _Inert,
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        # A new class for each name: a pickle can set attributes of whatever it holds, but nothing of ours is within its reach.
        return type(name, (_NAMES[module, name],), {})


def _state(module):
    """The attributes of an unpickled module, of a class with embedded source or not."""
    return vars(module) if "_modules" in vars(module) else module.args[0]["state"]


def _class_name(module):
    return str(module.args[0]["class_name"])


def _tensor(record):
    """Record of a tensor or parameter -> float32 tensor. torch's own restricted reader takes the bytes of its storage."""
    if type(record).__name__ == "_rebuild_parameter":
        record = record.args[0]
    storage, offset, size, stride = record.args[:4]
    loaded = torch.load(io.BytesIO(storage.args[0]), map_location="cpu", weights_only=True)
    flat = torch.empty(0, dtype=loaded.dtype).set_(loaded)
    return torch.as_strided(flat, size, stride, offset).float().clone()  # raises where it would reach beyond the storage


def _find_tensor(precond, name):
    """The tensor of that state_dict name ("model.enc.32x32_conv.weight"), or None where there is none."""
    *path, last = name.split(".")
    state = _state(precond)
    for part in path:
        if part not in state["_modules"]:
            return None
        state = _state(state["_modules"][part])
    record = state["_parameters"].get(last, state["_buffers"].get(last))
    return None if record is None else _tensor(record)


def read_edm_pickle(path):
    """Read an EDM .pkl without running anything in it: (network arguments, sigma_data, EDMPrecond as an inert record).

    Raises ValueError, one line, where the file is no such pickle, is damaged, or asks for more than tensors and plain data.
    """
    with open(path, "rb") as file:
        if file.read(64).lstrip()[:1] == b"<":
            raise ValueError("this is a web page (HTML), not a .pkl; download the file itself")
        file.seek(0)
        try:
            content = _InertUnpickler(file).load()
        except Exception as error:  # a damaged or hostile pickle can fail in any way
            raise ValueError(f"cut off, damaged or refused ({_one_line(error)}); an EDM .pkl holds tensors and plain data only") from None
    try:
        precond = content["ema"]
        network = _state(precond)["_modules"]["model"]
        names = _class_name(precond), _class_name(network)
        arguments = dict(_state(network)["_init_kwargs"])
        sigma_data = float(_state(precond).get("sigma_data", 0.5))
        if _state(network).get("_init_args"):
            raise ValueError("positional constructor arguments")
    except Exception as error:
        raise ValueError(f"not an EDM network, expected a pickled dict with an EDMPrecond under 'ema' ({_one_line(error)})") from None
    if names != ("EDMPrecond", "SongUNet"):
        raise ValueError(f"holds {ascii(names)}, expected an EDMPrecond with a SongUNet (NVIDIA's edm-cifar10-*.pkl)")
    return {key: value for key, value in arguments.items() if key not in _UNUSED_ARGUMENTS}, sigma_data, precond


_UNUSED_ARGUMENTS = ("out_channels", "augment_dim", "dropout", "label_dropout", "decoder_type")  # not in our half of the network


def _one_line(error):
    """An error's first line, printable: it may quote the file."""
    return ascii((str(error).splitlines() or [""])[0])[1:-1][:200] or type(error).__name__


def load_edm_encoder(path_or_url, layer="dec.8x8_in1"):
    """Load the encoder of an EDM diffusion model from NVIDIA's .pkl format, frozen, float32, on the CPU.

    path_or_url: a file, or an http(s) URL, which is downloaded once into torch.hub's cache (to a temporary name first).
    layer: where features are taken, "enc.<name>" or "dec.<name>"; the default is the paper's, "the UNet bottleneck block
    before the upsampling layers". Returns an EDMEncoder. Raises ValueError (one line naming the file) for a file that is
    damaged, of another kind, lacks a tensor, has no such layer, asks for anything but tensors and plain data, or cannot
    be downloaded; OSError where it cannot be opened.
    """
    path, hint = path_or_url, ""
    if str(path_or_url).startswith(("http://", "https://")):
        path, hint = _download(str(path_or_url)), "; delete the file to download it again"
    try:
        arguments, sigma_data, precond = read_edm_pickle(path)
        with torch.device("meta"):  # only names and shapes so far: nothing is allocated before they are known to fit
            encoder = EDMEncoder(layer, sigma_data, **arguments)
        needed = encoder.state_dict()
        tensors = {name: _find_tensor(precond, name) for name in needed}
        wrong = [name for name, tensor in tensors.items() if tensor is None or tensor.shape != needed[name].shape]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are missing or of another shape than its arguments say, first {wrong[0]}")
        encoder.load_state_dict(tensors, assign=True)
    except OSError:
        raise
    except Exception as error:  # whatever else is wrong in the file
        message = str(error) if isinstance(error, ValueError) else f"not a usable EDM network ({_one_line(error)})"
        raise ValueError(f"{path}: {message}{hint}") from None
    return encoder.requires_grad_(False)


def _download(url):
    """Download once; the name in the cache begins with a hash of the URL, since different teachers share file names."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(url).name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"{url}: cannot be downloaded ({_one_line(error)})") from None
    return path


def main():
    """Print what an EDM .pkl holds."""
    parser = argparse.ArgumentParser(description="Print what an EDM .pkl holds, without running anything in it.")
    parser.add_argument("file", help="NVIDIA's .pkl: a path or a URL")
    parser.add_argument("--layer", default="dec.8x8_in1", help="where features are taken (default: %(default)s)")
    args = parser.parse_args()
    try:
        encoder = load_edm_encoder(args.file, args.layer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.file}: EDM SongUNet, {encoder.img_resolution} px, "
          + (f"class-conditional, {encoder.label_dim} classes" if encoder.label_dim else "unconditional"))
    for part in ("enc", "dec"):
        for name, module in getattr(encoder.model, part).items():
            print(f"  {part}.{name:24} {sum(p.numel() for p in module.parameters()):>12,} parameters")
    print(f"features at {encoder.layer}: {encoder.width} wide; {sum(p.numel() for p in encoder.parameters()):,} parameters as far as there")


if __name__ == "__main__":
    main()
