"""Features of a frozen LightningDiT: what arXiv 2602.19931 aligns a robust ImageNet classifier with.

    DIT=lightningdit-xl-imagenet256-800ep.pt VAE=vavae-imagenet256-f16d32-dinov2.pt STATS=latents_stats.pt
    python dit_encoder.py $DIT $VAE $STATS           # what the files hold

    encoder = load_dit_encoder(dit_path, vae_path, stats_path)
    target = encoder(images, labels, t=0.9)          # images [B, 3, 256, 256] in [0, 1] -> [B, 1152]

The target is g(x_t, t, y) of the paper's eq. (3): the features that a diffusion model computes from a clean
image x with some noise added, and from its label y. LightningDiT (Yao et al. 2025, arXiv 2501.01423) does not
denoise pixels. It denoises the latents of VA-VAE, an autoencoder that was trained to make its latents agree
with DINOv2's features. So an image passes through three stages, and each has a file of its own:

    VA-VAE's encoder     [B, 3, 256, 256] -> the latent's mean, [B, 32, 16, 16]
    latent statistics    each channel to zero mean and unit variance: z. Then noise: z_t = t z + (1 - t) noise
    LightningDiT-XL/1    the first 14 of its 28 blocks -> [B, 256, 1152], one token for each of 16 x 16 places

Why noise, and why a middle block? The network was trained on noisy images and has hardly seen a clean one. A
little noise also hides details that recognition does not need, so features are best at a low noise level.
Early blocks stay close to the input and late ones to the output; the middle ones say most about what the
image shows (section 3 of the paper; block 14 in appendix D). Mind the direction of time: t = 1 is the clean
image and t = 0 is pure noise, the reverse of most diffusion papers. t = 0.9 is our choice, because our copy
of the paper has lost its number.

Both networks are our own code and use the parameter names of the released files. Loading a file reads tensors
and never runs anything in it.
"""
import argparse
import contextlib
import math
import sys
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6  # in all norms, of both networks

# ------------------------------------------------------------------------------------------------------------
# VA-VAE's encoder: the convolutional one of latent diffusion (Rombach et al. 2022). Some modules below hold
# others only to give the tensors the file's names, such as encoder.down.0.block.1.conv1.weight.


class ResnetBlock(nn.Module):
    """Two convolutions and a shortcut, [B, in_channels, H, W] -> [B, out_channels, H, W]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Self-attention over all H*W positions, a single head of width C, [B, C, H, W] -> same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # [B, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


def middle_blocks(channels):
    """The blocks at the coarsest resolution, of VA-VAE's encoder as of its decoder, [B, C, h, w] -> same."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(channels, channels), attn_1=AttnBlock(channels),
                                     block_2=ResnetBlock(channels, channels)))


class VAEEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> the latent's mean [B, latent_channels, H / f, W / f].

    channels: of the first convolution. levels: for each resolution, finest first, a triple (width, number
    of blocks, attention or not). Each level but the last halves the image: f = 2^(levels - 1), 16 in the
    released file.
    """

    def __init__(self, channels, levels, latent_channels):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder.down = nn.ModuleList()
        for i, (width, blocks, attention) in enumerate(levels):
            level = nn.Module()
            level.block = nn.ModuleList(ResnetBlock(width if j else channels, width) for j in range(blocks))
            level.attn = nn.ModuleList(AttnBlock(width) if attention else nn.Identity()
                                       for _ in range(blocks))
            if i + 1 < len(levels):
                level.downsample = nn.Module()
                level.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
            self.encoder.down.append(level)
            channels = width
        self.encoder.mid = middle_blocks(channels)
        self.encoder.norm_out = nn.GroupNorm(32, channels, eps=EPS)
        self.encoder.conv_out = nn.Conv2d(channels, 2 * latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)

    def forward(self, x):
        x = self.encoder.conv_in(x)
        for level in self.encoder.down:
            for block, attention in zip(level.block, level.attn):
                x = attention(block(x))
            if hasattr(level, "downsample"):
                # Zeros at the right and bottom only, as in latent diffusion. With one pixel on all sides the
                # shapes would be the same, but every latent would look at shifted pixels.
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        x = self.encoder.conv_out(F.silu(self.encoder.norm_out(self.encoder.mid(x))))
        # The encoder gives mean and log-variance of a Gaussian for each latent. We take the mean, so that the
        # only noise in the features is the noise that is added on purpose.
        return self.quant_conv(x).chunk(2, dim=1)[0]


# ------------------------------------------------------------------------------------------------------------
# LightningDiT: a diffusion transformer (Peebles and Xie 2023) with RMSNorm, SwiGLU and rotary positions.


def modulate(x, shift, scale):
    """Scale and shift the tokens x [B, T, D] of each image by its own shift and scale [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def rotate(x, cos, sin):
    """Rotary position embedding: x [B, heads, T, d] turned by each position's angles, cos and sin [T, d].

    The product of a turned query and a turned key depends on how far apart their tokens are. NEIGHBOURING
    entries form a pair, (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin). Much other code pairs the first half
    with the second; with these weights that would run and give wrong features.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-second, first], dim=-1).flatten(-2) * sin


class Attention(nn.Module):
    """Self-attention with rotary positions, [B, T, D] -> same. cos, sin [T, D / num_heads]."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, cos, sin):
        # The 3D outputs are three blocks of D, each cut into heads (in EDM they are groups of three).
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)  # the angles are float32
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Feed-forward layer, [B, T, D] -> same. One half of the hidden units gates the other."""

    def __init__(self, width, mlp_hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * mlp_hidden), nn.Linear(mlp_hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DiTBlock(nn.Module):
    """Transformer block with adaptive layer norm (AdaLN), x [B, T, D] -> same.

    Time and label arrive as one vector per image, c [B, D]. Each block computes six vectors from it: shift
    and scale of the normalised tokens, and a gate on what comes back, for the attention and for the
    feed-forward layer.
    """

    def __init__(self, width, num_heads, mlp_hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=EPS), nn.RMSNorm(width, eps=EPS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attn = Attention(width, num_heads)
        self.mlp = SwiGLU(width, mlp_hidden)

    def forward(self, x, c, cos, sin):
        """x [B, T, D], c [B, D], the positions' angles cos and sin [T, d] -> [B, T, D]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale), cos, sin)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class LightningDiT(nn.Module):
    """The first `layer` blocks, and the first norm and AdaLN of block `layer`.

    latent_channels, patch: of the convolution that makes tokens. tokens: how many there are. label_rows:
    classes + 1, as the last row of the label table means "no label". Positions enter twice, as in the
    released network: an embedding is added to the tokens, and the attention rotates. Both are read from the
    file; until then they do nothing.
    """

    def __init__(self, width, num_heads, mlp_hidden, latent_channels, patch, tokens, label_rows, layer):
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder, self.feat_rope = (nn.Module() for _ in range(4))
        self.x_embedder.proj = nn.Conv2d(latent_channels, width, patch, stride=patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(label_rows, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        # One half of each head's angles encodes the token's row, the other half its column.
        self.feat_rope.register_buffer("freqs_cos", torch.ones(tokens, width // num_heads))
        self.feat_rope.register_buffer("freqs_sin", torch.zeros(tokens, width // num_heads))
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_hidden) for _ in range(layer + 1))
        del self.blocks[layer].attn, self.blocks[layer].norm2, self.blocks[layer].mlp  # never computed

    def embed(self, z_t, t, label_row):
        """z_t [B, C, H, W], t [B], label_row [B] int64 -> (tokens [B, T, D], c [B, D] of time and label)."""
        # Cosine first, unlike EDM, and t stays in [0, 1], where older models count to 1000.
        frequencies = torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))  # 1 to 1/10000
        angles = t[:, None] * frequencies  # [B, 128]
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        x = self.x_embedder.proj(z_t).flatten(2).transpose(1, 2) + self.pos_embed  # row by row
        return x, c + self.y_embedder.embedding_table(label_row)

    def forward(self, z_t, t, label_row, kept):
        """As `embed`, and kept [D], 0 for a channel to silence and 1 for the others.

        Returns (the hidden state that enters block `layer`, what enters that block's attention once the
        channels are silenced), both [B, T, D].
        """
        hidden, c = self.embed(z_t, t, label_row)
        for block in self.blocks[:-1]:
            hidden = block(hidden, c, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        # A few channels of a trained diffusion transformer are many times larger than all others, whatever
        # the image shows, and would decide the cosine of eq. (3) almost alone. The paper zeroes them "before
        # applying AdaLN modulation" (appendix D). We zero them before the norm as well. The norm divides each
        # token by its size, so zeroing only after it would leave all other channels shrunk.
        shift, scale = self.blocks[-1].adaLN_modulation(c).chunk(6, dim=1)[:2]
        return hidden, modulate(self.blocks[-1].norm1(hidden * kept), shift, scale)


# ------------------------------------------------------------------------------------------------------------
# From a clean image to its features: latents, noise, transformer, mean over tokens.


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line that names it; the exit code is 2."""


class DiTEncoder(nn.Module):
    """The teacher: encoder(images, labels, t, noise) -> pooled diffusion features [B, width].

    Frozen: no parameter requires a gradient. A gradient into the images flows where the caller asks for one.
    zero_channels: the channels to silence. Attributes: image_size, num_classes, layer, width (of the
    features), latent_shape (C, H, W), mean and std (of the latents), checked (whether `latents` has looked at
    a first batch), amp (whether both networks compute in bfloat16, on any device; float32 until it is set).
    """

    def __init__(self, vae, dit, image_size, zero_channels=()):
        super().__init__()
        self.vae, self.dit, self.image_size = vae, dit, image_size
        self.layer, self.width = len(dit.blocks) - 1, dit.pos_embed.shape[2]
        self.num_classes = dit.y_embedder.embedding_table.num_embeddings - 1
        channels, side = dit.x_embedder.proj.in_channels, image_size >> (len(vae.encoder.down) - 1)
        self.latent_shape = (channels, side, side)
        silenced = torch.tensor(zero_channels, dtype=torch.int64)
        self.register_buffer("kept", torch.ones(self.width).index_fill(0, silenced, 0.0))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.amp, self.checked = False, False
        self.requires_grad_(False).eval()

    def latents(self, images):
        """images [B, 3, H, W] in [0, 1] -> normalised latents z [B, *latent_shape] float32.

        Any input gives features of some kind, so mistakes are easily overlooked. Hence the first batch is
        checked: images outside [0, 1] are a ValueError, latents far from zero mean and unit variance an
        InputError.
        """
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            # A classifier's 224 px crop would make 14 x 14 latents; the network knows only 16 x 16 positions.
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)  # it overshoots
        z = (self.vae(2 * images - 1).float() - self.mean) / self.std
        if not self.checked:  # only once, because a GPU has to wait when values are looked at
            low, high = images.aminmax()
            if not -1e-3 < low <= high < 1 + 1e-3:
                raise ValueError(f"the first images run from {low:g} to {high:g}, expected values in [0, 1]")
            if not (abs(z.mean()) < 0.5 and 0.5 < z.std() < 2):
                raise InputError(f"normalised latents of the first batch have mean {z.mean():.2f} and std "
                                 f"{z.std():.2f}, expected about 0 and 1: statistics of another autoencoder?")
            self.checked = True
        return z

    def activations(self, images, labels, t, noise=None):
        """Features before the mean over tokens. Arguments and errors as in `forward`.

        Returns (the state that enters block `layer`, what enters its attention), both [B, T, width] float32.
        """
        batch, device = images.shape[0], images.device
        if labels is None:
            labels = torch.full((batch,), self.num_classes, device=device)  # the table's row for "no label"
        t = t if isinstance(t, torch.Tensor) else torch.full((batch,), float(t), device=device)
        t = t.float().expand(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
            z = self.latents(images)
            noise = torch.randn_like(z) if noise is None else noise
            # Flow matching: a straight line from noise at t = 0 to the image at t = 1. t means the same share
            # of noise as in training only where z has unit variance, hence the latent statistics.
            z_t = t[:, None, None, None] * z + (1 - t[:, None, None, None]) * noise
            hidden, modulated = self.dit(z_t, t, labels, self.kept)
        return hidden.float(), modulated.float()

    def forward(self, images, labels, t, noise=None):
        """g(x_t, t, y) of eq. (3), for clean images (sections 3 and 4.2 and appendix D of the paper).

        images [B, 3, H, W] float32 in [0, 1], resized to image_size where they differ. labels [B] int64, or
        None for no label. t in [0, 1], from pure noise to the clean image, a float or a tensor [B]. noise
        [B, *latent_shape] standard normal, drawn here if None. Returns float32 [B, width], the mean over
        tokens (our choice, as the paper does not say how it pools here). Raises ValueError as `latents` does.
        """
        return self.activations(images, labels, t, noise)[1].mean(dim=1)


# ------------------------------------------------------------------------------------------------------------
# Files: the networks' sizes are read from names and shapes; networks of these sizes are built and filled.

_MARKS = {"a LightningDiT checkpoint": "x_embedder.proj.weight",  # kinds of files, and a tensor of each
          "a VA-VAE checkpoint": "encoder.conv_in.weight",
          "latent statistics": "mean"}


def check_file(path):
    """Raise InputError for what downloads often leave in place of a file, OSError if it cannot be opened."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the file itself: run git lfs pull")
    if start.startswith((b"<!doctype html", b"<html")):
        raise InputError(f"{path}: is a web page (HTML), not the file itself: download it again")


@contextlib.contextmanager
def reading(path):
    """Check the file, and turn any error of the body into an InputError that names the file in one line."""
    check_file(path)
    try:
        yield
    except Exception as error:  # KeyError: of a tensor that was looked up by name
        text = f"lacks {error.args[0]}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise InputError(f"{path}: {text}") from error


def read_tensors(path, kind):
    """Tensors by name from a .pt file of that kind (a key of _MARKS). Raises InputError for any other file.

    weights_only is torch's restricted reader: it refuses a file that asks for more than tensors and plain
    data. The file is mapped, as most of a checkpoint (later blocks, decoder, optimizer) is never needed.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # without torch's own text, which suggests weights_only=False
        raise InputError(f"damaged, or no file of tensors and plain data ({type(error).__name__})") from None
    if isinstance(content, dict):  # LightningDiT's averaged weights, VA-VAE's weights, or tensors at once
        content = content.get("ema", content.get("state_dict", content))
    items = content.items() if isinstance(content, dict) else ()
    # Training on several GPUs leaves "module." in front of names.
    tensors = {str(name).removeprefix("module."): value for name, value in items
               if isinstance(value, torch.Tensor)}
    found = next((other for other, mark in _MARKS.items() if mark in tensors), "something else")
    if found != kind:
        raise InputError(f"expected {kind}, this is {found}: it lacks {_MARKS[kind]}")
    return tensors


def take(tensors, name, shape):
    """A float32 copy of the tensor of that name (the mapped memory itself would keep the file open).

    Raises KeyError where it is missing, InputError for another shape or for numbers that are not finite.
    """
    tensor = tensors[name]
    if tensor.shape != shape:
        raise InputError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.isfinite().all():
        raise InputError(f"{name} is not finite")
    return tensor.to(torch.float32, copy=True)


def fill(module, tensors, used):
    """Give `module`, built on the meta device, the tensors of its names. Raises what `take` raises.

    used: prefixes of the parts that it computes. A further tensor there, say of a norm that our network does
    not have, means another architecture, and ignoring it would give wrong features: InputError.
    """
    empty = module.state_dict()
    unknown = [name for name in tensors if name not in empty and name.startswith(used)]
    if unknown:
        raise InputError(f"is of another architecture, it has {unknown[0]}")
    filled = {name: take(tensors, name, tensor.shape) for name, tensor in empty.items()}
    module.load_state_dict(filled, assign=True)


def build_vae(tensors):
    """A VAEEncoder of the sizes that a file's tensors have (by name; only .shape is looked at)."""
    parts = [name.split(".") for name in tensors if name.startswith("encoder.down.")]
    levels = []
    for i in range(len({part[2] for part in parts})):  # encoder.down.<level>.block.<block>.conv1.weight
        channels = tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0]
        blocks = len({part[4] for part in parts if part[2:4] == [str(i), "block"]})
        levels.append((channels, blocks, f"encoder.down.{i}.attn.0.norm.weight" in tensors))
    latent_channels = tensors["encoder.conv_out.weight"].shape[0] // 2  # mean and log-variance
    return VAEEncoder(tensors["encoder.conv_in.weight"].shape[0], levels, latent_channels)


def build_dit(tensors, layer, num_heads):
    """A LightningDiT up to block `layer`, of the sizes that a file's tensors have. num_heads: may be None."""
    width, latent_channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth = sum(name.startswith("blocks.") and name.endswith("norm1.weight") for name in tensors)
    if not 0 <= layer < depth:
        raise InputError(f"has {depth} blocks, expected layer {layer} to be one of 0 to {depth - 1}")
    tokens, head_width = tensors["feat_rope.freqs_cos"].shape
    heads = width // head_width
    if num_heads not in (None, heads):
        raise InputError(f"is {width} wide with {head_width} per head: it has {heads} heads, "
                         f"not num_heads={num_heads}")
    mlp_hidden = tensors["blocks.0.mlp.w3.weight"].shape[1]
    label_rows = tensors["y_embedder.embedding_table.weight"].shape[0]
    return LightningDiT(width, heads, mlp_hidden, latent_channels, patch, tokens, label_rows, layer)


def load_dit_encoder(dit_path, vae_path, stats_path, layer=14, zero_channels=(1053, 259), num_heads=16,
                     image_size=256):
    """Load the teacher from its three files: a DiTEncoder, frozen, float32, on the CPU.

    dit_path: LightningDiT's .pt. vae_path: VA-VAE's .pt; its decoder and losses are ignored. stats_path: a
    .pt with `mean` and `std` [1, C, 1, 1]. layer, zero_channels: the block whose input is the target and the
    channels to silence; the paper states both for the released XL/1 checkpoint (appendix D). num_heads,
    image_size: what the networks were trained with; None: what the files say. Raises InputError, one line
    that starts with the file's path, where it is damaged, of another kind, lacks a tensor or does not fit the
    others. OSError where it cannot be opened.
    """
    with reading(dit_path):
        tensors = read_tensors(dit_path, "a LightningDiT checkpoint")
        with torch.device("meta"):  # names and shapes only: nothing is allocated before they are known to fit
            dit = build_dit(tensors, layer, num_heads)
        blocks = [f"blocks.{i}." for i in range(layer)]  # these as a whole, and two parts of the next
        blocks += [f"blocks.{layer}.norm1.", f"blocks.{layer}.adaLN_modulation."]
        fill(dit, tensors, ("x_embedder.", "t_embedder.", "y_embedder.", "feat_rope.", *blocks))
        _, tokens, width = dit.pos_embed.shape
        if not all(0 <= channel < width for channel in zero_channels):
            raise InputError(f"is {width} wide, expected zero_channels {tuple(zero_channels)} below that")
    with reading(vae_path):
        tensors = read_tensors(vae_path, "a VA-VAE checkpoint")
        with torch.device("meta"):
            vae = build_vae(tensors)
        fill(vae, tensors, ("encoder.", "quant_conv."))
        channels, to_tokens = vae.quant_conv.out_channels // 2, dit.x_embedder.proj
        if channels != to_tokens.in_channels:
            raise InputError(f"makes {channels} latent channels, {dit_path} takes {to_tokens.in_channels}")
        expected = round(tokens ** 0.5) * to_tokens.kernel_size[0] * 2 ** (len(vae.encoder.down) - 1)
        if image_size not in (None, expected):
            raise InputError(f"makes the {tokens} tokens of {dit_path} from {expected} px, not {image_size=}")
    encoder = DiTEncoder(vae, dit, expected, zero_channels)
    load_statistics(stats_path, encoder)
    return encoder


def load_statistics(path, module):
    """Set `module.mean` and `module.std` [1, C, 1, 1] from latents_stats.pt. Raises as `load_dit_encoder`."""
    with reading(path):
        tensors = read_tensors(path, "latent statistics")
        for name in ("mean", "std"):
            getattr(module, name).copy_(take(tensors, name, module.mean.shape))


def main():
    """Print what the three files hold."""
    parser = argparse.ArgumentParser(description="What the files of a teacher hold.", allow_abbrev=False)
    parser.add_argument("dit", help="LightningDiT's .pt")
    parser.add_argument("vae", help="VA-VAE's .pt")
    parser.add_argument("stats", help="latents_stats.pt")
    parser.add_argument("--layer", type=int, default=14, help="block to stop at (default: %(default)s)")
    args = parser.parse_args()
    encoder = load_dit_encoder(args.dit, args.vae, args.stats, args.layer, (), None, None)
    size = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}M parameters are used"
    print(f"{args.dit}: {encoder.num_classes} classes, {encoder.width} wide, {size(encoder.dit)}")
    print(f"{args.vae}: {encoder.image_size} px -> latents {list(encoder.latent_shape)}, {size(encoder.vae)}")
    print(f"{args.stats}: std of the latents' channels {encoder.std.min():.2f} to {encoder.std.max():.2f}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
