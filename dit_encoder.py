"""Features of a frozen LightningDiT: what arXiv 2602.19931 aligns a robust ImageNet classifier with.

    DIT=lightningdit-xl-imagenet256-800ep.pt VAE=vavae-imagenet256-f16d32-dinov2.pt STATS=latents_stats.pt
    python dit_encoder.py $DIT $VAE $STATS           # what the files hold; nothing inside them is run
    python dit_encoder.py $DIT $VAE $STATS --images DIR      # which channels are too large on these images

    encoder = load_dit_encoder(dit_path, vae_path, stats_path)
    target = encoder(images, labels, t=0.9)          # images [B, 3, 256, 256] in [0, 1] -> [B, 1152]

The target is g(x_t, t, y) of the paper's eq. (3): what a diffusion model makes of a clean image x with some
noise, and of its label y. LightningDiT (Yao et al. 2025, arXiv 2501.01423) denoises no pixels. It works on
the latents of VA-VAE, an autoencoder by the same authors that was trained to make them agree with DINOv2's
features. So an image goes through three stages, each with a file of its own:

    VA-VAE's encoder     [B, 3, 256, 256] -> the latent's mean, [B, 32, 16, 16]
    latent statistics    zero mean and unit variance in each channel: z. Then noise: z_t = t z + (1 - t) noise
    LightningDiT-XL/1    the first 14 of its 28 blocks -> [B, 256, 1152], one token for each of 16 x 16 places

Why noise, and why the middle? The network is there to take noise away and has hardly ever seen an image
without. A little of it hides what recognition does not need, so features are best at a low noise level.
Early blocks are close to the input and late ones to the output; what the picture shows is clearest half way
(section 3 of the paper; layer 14 in appendix D). Mind the direction of time: at t = 1 the image is clean and
at t = 0 it is pure noise, the reverse of most diffusion papers. t = 0.9 is our choice, since our copy of the
paper has lost its number.

Both networks are our own code with the released files' parameter names. Reading a file runs nothing in it.
"""
import argparse
import contextlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

EPS = 1e-6  # in all norms, of both networks

# ------------------------------------------------------------------------------------------------------------
# VA-VAE's encoder: the convolutional one of latent diffusion (Rombach et al. 2022), with its parameter names.


class ResnetBlock(nn.Module):
    """Two convolutions and a shortcut, [B, in_channels, H, W] -> [B, out_channels, H, W]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention over all H*W positions, a single head of width C, [B, C, H, W] -> same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # [B, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class VAEEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> the latent's mean [B, latent_channels, H / f, W / f].

    channels: of the first convolution. levels: for each resolution (channels, number of blocks, attention or
    not). Each level but the last halves the image: f = 2^(levels - 1), 16 in the released file. The empty
    nn.Module()s compute nothing; they give the tensors the file's names, such as encoder.mid.block_1.
    """

    def __init__(self, channels, levels, latent_channels):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder.down = nn.ModuleList()
        for i, (width, blocks, attention) in enumerate(levels):
            level = nn.Module()
            level.block = nn.ModuleList(ResnetBlock(width if j else channels, width) for j in range(blocks))
            level.attn = nn.ModuleList(AttnBlock(width) for _ in range(blocks if attention else 0))
            if i + 1 < len(levels):
                level.downsample = nn.Module()
                level.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
            self.encoder.down.append(level)
            channels = width
        self.encoder.mid = nn.Module()
        self.encoder.mid.block_1 = ResnetBlock(channels, channels)
        self.encoder.mid.block_2 = ResnetBlock(channels, channels)
        self.encoder.mid.attn_1 = AttnBlock(channels)
        self.encoder.norm_out = nn.GroupNorm(32, channels, eps=EPS)
        self.encoder.conv_out = nn.Conv2d(channels, 2 * latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)

    def forward(self, x):
        x = self.encoder.conv_in(x)
        for level in self.encoder.down:
            for j, block in enumerate(level.block):
                x = block(x)
                x = level.attn[j](x) if len(level.attn) else x
            if hasattr(level, "downsample"):
                # Zeros at the right and bottom only, as in latent diffusion. With one pixel on all sides the
                # shapes are the same and every latent looks at the wrong pixels.
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        x = self.encoder.mid.block_2(self.encoder.mid.attn_1(self.encoder.mid.block_1(x)))
        x = self.encoder.conv_out(F.silu(self.encoder.norm_out(x)))
        # Each latent comes as a Gaussian. We take its mean, so that the only noise in the features is the
        # one that is added on purpose.
        mean, _log_variance = self.quant_conv(x).chunk(2, dim=1)
        return mean


# ------------------------------------------------------------------------------------------------------------
# LightningDiT: a diffusion transformer (Peebles and Xie 2023) with RMSNorm, SwiGLU and rotary positions.


def modulate(x, shift, scale):
    """Scale and shift the tokens x [B, T, D] of each image by its own shift and scale [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def rotate(x, cos, sin):
    """Rotary position embedding: x [B, heads, T, d] turned by each position's angles, cos and sin [T, d].

    The product of a turned query and a turned key depends on how far apart their tokens are. NEIGHBOURING
    entries form a pair, (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin). Much other code pairs the first half
    with the second; with these weights that runs and is wrong.
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
    """Feed-forward layer [B, T, D] -> same. One half of the hidden units gates the other."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DiTBlock(nn.Module):
    """Transformer block with adaptive layer norm (AdaLN).

    Time and label arrive as one vector per image, c [B, D]. Each block makes six vectors of it: shift and
    scale of the normalised tokens and a gate on what comes back, for the attention and for the feed-forward
    layer. norm_only: nothing behind the attention's input, for the block whose input is the target.
    """

    def __init__(self, width, num_heads, mlp_hidden, norm_only=False):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=EPS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if not norm_only:
            self.attn = Attention(width, num_heads)
            self.norm2 = nn.RMSNorm(width, eps=EPS)
            self.mlp = SwiGLU(width, mlp_hidden)

    def attention_input(self, x, c):
        """x [B, T, D], c [B, D] -> [B, T, D]: what the attention would see, norm and AdaLN applied."""
        shift, scale = self.adaLN_modulation(c).chunk(6, dim=1)[:2]
        return modulate(self.norm1(x), shift, scale)

    def forward(self, x, c, cos, sin):
        """x [B, T, D], c [B, D], angles cos and sin [T, d] -> [B, T, D]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale), cos, sin)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class LightningDiT(nn.Module):
    """The first `layer` blocks, and the norm and AdaLN of block `layer`.

    latent_channels, patch: of the convolution that makes tokens. tokens: how many there are. label_rows:
    classes + 1, as the last row of the table means "no label". Positions enter twice, as in the released
    network: an embedding is added to the tokens, and the attention rotates. Both are read from the file;
    until then they do nothing.
    """

    def __init__(self, width, num_heads, mlp_hidden, latent_channels, patch, tokens, label_rows, layer):
        super().__init__()
        # Empty modules for the file's names, as in VAEEncoder.
        self.x_embedder, self.t_embedder, self.y_embedder, self.feat_rope = (nn.Module() for _ in range(4))
        self.x_embedder.proj = nn.Conv2d(latent_channels, width, patch, stride=patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(label_rows, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        # One half of each head's angles tells the token's row, the other its column.
        self.feat_rope.register_buffer("freqs_cos", torch.ones(tokens, width // num_heads))
        self.feat_rope.register_buffer("freqs_sin", torch.zeros(tokens, width // num_heads))
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_hidden, norm_only=i == layer)
                                    for i in range(layer + 1))

    def embed(self, z_t, t, label_row):
        """z_t [B, C, H, W], t [B], label_row [B] int64 -> (tokens [B, T, D], c [B, D] of time and label)."""
        # Cosine first, unlike EDM, and t stays in [0, 1], where older models count to 1000.
        frequencies = torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))  # 1 to 1/10000
        angles = t[:, None] * frequencies  # [B, 128]
        time = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        tokens = self.x_embedder.proj(z_t).flatten(2).transpose(1, 2) + self.pos_embed  # row by row
        return tokens, time + self.y_embedder.embedding_table(label_row)

    def forward(self, z_t, t, label_row, kept):
        """As `embed`, and kept [D], 0 for a channel to silence and 1 for others.

        Returns (the hidden state that enters block `layer`, what enters that block's attention once the
        channels are silenced), both [B, T, D].
        """
        hidden, c = self.embed(z_t, t, label_row)
        for block in self.blocks[:-1]:
            hidden = block(hidden, c, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        # A few channels of a trained diffusion transformer are many times larger than all others, whatever
        # the image shows. In the cosine of eq. (3) little else would count. The paper zeroes them "before
        # applying AdaLN modulation" (appendix D). We do it before the norm as well, which divides a token by
        # its size: later, they would be gone themselves but have shrunk all the others.
        return hidden, self.blocks[-1].attention_input(hidden * kept, c)


# ------------------------------------------------------------------------------------------------------------
# From a clean image to its features: latents, noise, transformer, mean over tokens.


class DiTEncoder(nn.Module):
    """The teacher: encoder(images, labels, t, noise) -> pooled diffusion features [B, width].

    Frozen: no parameter requires a gradient. A gradient into the images flows where the caller asks for one.
    zero_channels: the channels to silence. Attributes: image_size, num_classes, layer, width (of the
    features), latent_shape (C, H, W), amp (bfloat16 on CUDA), checked (the first batch was, see `latents`).
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
        self.amp, self.checked = True, False
        self.requires_grad_(False).eval()

    def latents(self, images):
        """images [B, 3, H, W] in [0, 1] -> normalised latents z [B, *latent_shape] float32.

        Any input gives some features, so the classic mistakes are silent. Hence a look at the first batch:
        images outside [0, 1] and latents far from zero mean and unit variance are a ValueError. So are
        images of another shape, always.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"the teacher takes images [B, 3, H, W], not {list(images.shape)}")
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            # A classifier's 224 px crop would make 14 x 14 latents; the network knows only 16 x 16 positions.
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)  # it overshoots
        z = (self.vae(2 * images - 1).float() - self.mean) / self.std
        if not self.checked:  # once, as looking at values makes a GPU wait
            low, high, mean, std = *images.aminmax(), z.mean(), z.std()
            if not -1e-3 < low <= high < 1 + 1e-3:
                raise ValueError(f"the first images run from {low:g} to {high:g}, expected values in [0, 1]")
            if not (abs(mean) < 0.5 and 0.5 < std < 2):
                raise ValueError(f"the normalised latents of the first batch have mean {mean:.2f} and std "
                                 f"{std:.2f}, expected about 0 and 1: statistics of another autoencoder?")
            self.checked = True
        return z

    def activations(self, images, labels, t, noise=None):
        """Features before the mean over tokens. Arguments and errors as in `forward`.

        Returns (the state that enters block `layer`, what enters its attention), both [B, T, width] float32.
        """
        batch, device, classes = images.shape[0], images.device, self.num_classes
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp and device.type == "cuda"):
            z = self.latents(images)
            if labels is None:
                labels = torch.full((batch,), classes, device=device)  # the table's row for "no label"
            # Only on a CPU: a GPU would have to wait for the values, and the table stops at bad ones there.
            elif device.type == "cpu" and not (0 <= labels.min() and labels.max() < classes):
                raise ValueError(f"the teacher knows labels 0 to {classes - 1}, "
                                 f"not {labels.min()} to {labels.max()}")
            if not isinstance(t, torch.Tensor):
                t = torch.full((batch,), float(t), device=device)
            t = t.float().expand(batch)
            noise = torch.randn_like(z) if noise is None else noise
            if noise.shape != z.shape:
                raise ValueError(f"noise is {list(noise.shape)}, expected the latent's shape {list(z.shape)}")
            # Flow matching: a straight line from noise at t = 0 to the image at t = 1. t means the same share
            # of noise as in training only where z has unit variance; that is what the statistics are for.
            z_t = t[:, None, None, None] * z + (1 - t[:, None, None, None]) * noise
            hidden, modulated = self.dit(z_t, t, labels, self.kept)
        return hidden.float(), modulated.float()

    def forward(self, images, labels, t, noise=None):
        """g(x_t, t, y) of eq. (3), for clean images (sections 3 and 4.2 and appendix D of the paper).

        images [B, 3, H, W] float32 in [0, 1], resized to image_size where they differ. labels [B] int64, or
        None for no label. t in [0, 1], from pure noise to the clean image, a float or a tensor [B]. noise
        [B, *latent_shape] standard normal, drawn here if None. Returns float32 [B, width], the mean over
        tokens (our choice, as the paper does not say how it pools here). Raises ValueError as `latents`
        does, for noise of another shape, and, on a CPU, for labels that the network does not know.
        """
        return self.activations(images, labels, t, noise)[1].mean(dim=1)


# ------------------------------------------------------------------------------------------------------------
# Files: names and shapes tell the networks' sizes; networks of that size are built and filled.

_MARKS = {  # kind of file: the tensor that tells it
    "a LightningDiT checkpoint": "x_embedder.proj.weight",
    "a VA-VAE checkpoint": "encoder.conv_in.weight",
    "latent statistics": "mean",
}


@contextlib.contextmanager
def naming(path):
    """What goes wrong inside becomes one ValueError line that names the file, as an OSError does already."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # KeyError: of a tensor that was looked up by name
        text = f"lacks {error.args[0]}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ValueError(f"{path}: {text}") from None


def read_tensors(path, kind):
    """Tensors by name from a .pt file of that kind (a key of _MARKS). Raises ValueError for any other file.

    weights_only is torch's restricted reader: a file that asks for more than tensors and plain data is
    refused. The file is mapped, as most of a checkpoint (later blocks, decoder, optimiser) is never needed.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # it cannot be opened; nameless ones mean damage
            raise
        # Without torch's own text, which suggests weights_only=False.
        raise ValueError(f"damaged, or no file of tensors and plain data ({type(error).__name__})") from None
    for section in ("ema", "state_dict"):  # LightningDiT's averaged weights; VA-VAE's weights
        if isinstance(content, dict):
            content = content.get(section, content)
    items = content.items() if isinstance(content, dict) else ()
    # Training on several GPUs leaves "module." in front of names.
    tensors = {str(name).removeprefix("module."): value for name, value in items
               if isinstance(value, torch.Tensor)}
    found = next((other for other, mark in _MARKS.items() if mark in tensors), "something else")
    if found != kind:
        raise ValueError(f"expected {kind}, this is {found}: it lacks {_MARKS[kind]}")
    return tensors


def take(tensors, name, shape):
    """A float32 copy of the tensor of that name (the mapped memory itself would keep the file open).

    Raises KeyError where it is missing, ValueError for another shape or for numbers that are not finite.
    """
    tensor = tensors[name]
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} is not finite")
    return tensor.to(torch.float32, copy=True)


def fill(module, tensors, used):
    """Give `module`, built on the meta device, the tensors of its names. Raises what `take` raises.

    used: prefixes of the parts that it computes. A further tensor there, say of a norm that our network does
    not have, means another architecture and wrong features if we ignored it: ValueError.
    """
    empty = module.state_dict()
    unknown = [name for name in tensors if name not in empty and name.startswith(used)]
    if unknown:
        raise ValueError(f"is of another architecture, it has {unknown[0]}")
    filled = {name: take(tensors, name, tensor.shape) for name, tensor in empty.items()}
    module.load_state_dict(filled, assign=True)


def build_vae(tensors):
    """A VAEEncoder of the sizes that a file's tensors have (by name; only .shape is looked at)."""
    parts = [name.split(".") for name in tensors if name.startswith("encoder.down.")]
    levels = []
    for i in range(len({part[2] for part in parts})):  # encoder.down.<level>.block.<block>.conv1.weight
        width = tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0]
        blocks = len({part[4] for part in parts if part[2:4] == [str(i), "block"]})
        levels.append((width, blocks, f"encoder.down.{i}.attn.0.norm.weight" in tensors))
    outputs = tensors["encoder.conv_out.weight"].shape[0]  # mean and log-variance
    return VAEEncoder(tensors["encoder.conv_in.weight"].shape[0], levels, outputs // 2)


def build_dit(tensors, layer, num_heads):
    """A LightningDiT up to block `layer`, of the sizes that a file's tensors have."""
    width, latent_channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth = sum(name.startswith("blocks.") and name.endswith("norm1.weight") for name in tensors)
    if not 0 <= layer < depth:
        raise ValueError(f"has {depth} blocks, expected layer {layer} to be one of 0 to {depth - 1}")
    tokens, head_width = tensors["feat_rope.freqs_cos"].shape
    num_heads = num_heads or width // head_width
    if width != num_heads * head_width:
        raise ValueError(f"is {width} wide with {head_width} per head: it has {width // head_width} heads, "
                         f"not num_heads={num_heads}")
    hidden = tensors["blocks.0.mlp.w3.weight"].shape[1]
    label_rows = tensors["y_embedder.embedding_table.weight"].shape[0]
    return LightningDiT(width, num_heads, hidden, latent_channels, patch, tokens, label_rows, layer)


def load_dit_encoder(dit_path, vae_path, stats_path, layer=14, zero_channels=(1053, 259), num_heads=16,
                     image_size=256):
    """Load the teacher from its three files: a DiTEncoder, frozen, float32, on the CPU.

    dit_path: LightningDiT's .pt. vae_path: VA-VAE's .pt, of which decoder and losses are ignored.
    stats_path: a .pt with `mean` and `std` [1, C, 1, 1]. layer, zero_channels: the block whose input is the
    target and the channels to silence; the paper states both for the released XL/1 checkpoint (appendix D).
    num_heads, image_size: what the networks were trained with; None: what the files say. Raises ValueError,
    one line that names the file, where it is damaged, of another kind, lacks a tensor or does not fit the
    others. OSError where it cannot be opened.
    """
    with naming(dit_path):
        tensors = read_tensors(dit_path, "a LightningDiT checkpoint")
        with torch.device("meta"):  # names and shapes only: nothing is allocated before they are known to fit
            dit = build_dit(tensors, layer, num_heads)
        blocks = [f"blocks.{i}." for i in range(layer)]  # these as a whole, and two parts of the next
        blocks += [f"blocks.{layer}.norm1.", f"blocks.{layer}.adaLN_modulation."]
        fill(dit, tensors, ("x_embedder.", "t_embedder.", "y_embedder.", "feat_rope.", *blocks))
        tokens, width = dit.pos_embed.shape[1:]
        if not all(0 <= channel < width for channel in zero_channels):
            raise ValueError(f"is {width} wide, expected zero_channels {tuple(zero_channels)} below that")
    with naming(vae_path):
        tensors = read_tensors(vae_path, "a VA-VAE checkpoint")
        with torch.device("meta"):
            vae = build_vae(tensors)
        fill(vae, tensors, ("encoder.", "quant_conv."))
        patch, factor = dit.x_embedder.proj.kernel_size[0], 2 ** (len(vae.encoder.down) - 1)
        image_size = image_size or round(tokens**0.5) * patch * factor
        encoder = DiTEncoder(vae, dit, image_size, zero_channels)
        (channels, side, _), made = encoder.latent_shape, vae.quant_conv.out_channels // 2
        fits = (side // patch) ** 2 == tokens and made == channels
        if not fits or image_size % factor:
            raise ValueError(f"makes {side} x {side} latents of image_size={image_size}, {made} channels, "
                             f"{dit_path} takes {tokens} tokens from {channels} channels")
    with naming(stats_path):
        tensors = read_tensors(stats_path, "latent statistics")
        for name in ("mean", "std"):
            getattr(encoder, name).copy_(take(tensors, name, (1, channels, 1, 1)))
        if not (encoder.std > 0).all():
            raise ValueError("std is not above 0 everywhere")
    return encoder


@torch.no_grad()
def channel_norms(encoder, folder, t=0.9):
    """Size of each channel of the state that enters block `layer`: float32 [images, width], on the CPU.

    folder: with images anywhere below it; their shorter side is resized and their centre cropped. Size is the
    root mean square over an image's tokens. The network gets no labels, and the same noise every time. Raises
    ValueError for a folder without images or a file that is none.
    """
    from torchvision import datasets, transforms
    paths = [path for path in sorted(Path(folder).rglob("*"))
             if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
    if not paths:
        raise ValueError(f"{folder}: expected images in this folder or below")
    size, device = encoder.image_size, encoder.kept.device
    prepare, norms = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size),
                                         transforms.ToTensor()]), []
    for start in tqdm(range(0, len(paths), 16), desc="images", unit="batch", disable=None):
        images = []
        for path in paths[start:start + 16]:
            try:
                images.append(prepare(datasets.folder.default_loader(path)))
            except Exception as error:  # a damaged file can fail in any way
                raise ValueError(f"{path}: cannot be read as an image ({type(error).__name__})") from None
        random = torch.Generator().manual_seed(start)
        noise = torch.randn((len(images), *encoder.latent_shape), generator=random)
        hidden, _ = encoder.activations(torch.stack(images).to(device), None, t, noise.to(device))
        norms.append(hidden.square().mean(dim=1).sqrt().cpu())
    return torch.cat(norms)


def main():
    """Print what three files hold, and with --images the channels that are largest."""
    parser = argparse.ArgumentParser(description="Print what the files of a teacher hold, running nothing.")
    parser.add_argument("dit", help="LightningDiT's .pt")
    parser.add_argument("vae", help="VA-VAE's .pt")
    parser.add_argument("stats", help="latents_stats.pt")
    parser.add_argument("--layer", type=int, default=14, help="block to stop at (default: %(default)s)")
    parser.add_argument("--images", metavar="DIR", help="find the channels that are largest on these images")
    args = parser.parse_args()
    try:
        encoder = load_dit_encoder(args.dit, args.vae, args.stats, args.layer, (), None, None)
        count = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}M parameters"
        print(f"{args.dit}: {encoder.num_classes} classes, {encoder.width} wide, "
              f"{count(encoder.dit)} up to block {encoder.layer}")
        print(f"{args.vae}: {encoder.image_size} px -> latents {list(encoder.latent_shape)}, "
              f"{count(encoder.vae)} in the encoder")
        print(f"{args.stats}: std of the latents' channels "
              f"{encoder.std.min():.2f} to {encoder.std.max():.2f}")
        if args.images:
            norms = channel_norms(encoder.to("cuda" if torch.cuda.is_available() else "cpu"), args.images)
            mean, ten = norms.mean(dim=0), norms.topk(10).indices
            print(f"{args.images}: {len(norms)} images. Largest channels of what enters block {args.layer}:\n"
                  "norm, times the median channel's, and in how many images among the ten largest")
            for channel in mean.topk(10).indices:
                often = (ten == channel).any(dim=1).float().mean()
                print(f"{channel:6} {mean[channel]:9.3f} {mean[channel] / mean.median():9.1f} {often:9.0%}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
