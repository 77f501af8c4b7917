"""Features of a frozen LightningDiT diffusion model, as a target for a classifier: g(x_t, t, y) in eq. (3) of arXiv 2602.19931.

    python dit_encoder.py lightningdit-xl-imagenet256-800ep.pt vavae-imagenet256-f16d32-dinov2.pt latents_stats.pt   # what they hold

    encoder = load_dit_encoder("lightningdit-xl-imagenet256-800ep.pt", "vavae-imagenet256-f16d32-dinov2.pt", "latents_stats.pt")
    target = encoder(images, labels, t=0.9)                     # images [B, 3, 256, 256] in [0, 1] -> [B, 1152]

LightningDiT (Yao et al. 2025, arXiv 2501.01423) generates ImageNet images in the latent space of VA-VAE, an autoencoder of
the same authors. An image goes through three stages here, each from a file of its own:

    VA-VAE's encoder      [B, 3, 256, 256] -> the latent's mean [B, 32, 16, 16]
    latent statistics     per channel to zero mean and unit variance: z; then noise, z_t = t z + (1 - t) noise, t = 1 is clean
    LightningDiT-XL/1     the first 14 of its 28 transformer blocks -> [B, 256, 1152], then the input of block 14's attention

The paper takes the hidden state that enters block 14, sets two channels with abnormally large activations to zero, and
applies that block's adaptive layer norm (appendix D); the mean over tokens is our choice, as its text names none.

Both networks are our own code with the released files' parameter names. A file is read as data: nothing in it can run.
"""
import argparse
import math
import re
import sys

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6  # in all norms

# ---------------------------------------------------------------------------------------------------------------------
# VA-VAE's encoder: the convolutional encoder of latent diffusion (Rombach et al. 2022), with its parameter names.


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut, [B, in_channels, H, W] -> [B, out_channels, H, W]."""

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
    """Attention with one head over all positions, [B, C, H, W] -> same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # each [B, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class VAEEncoder(nn.Module):
    """Images in [-1, 1] [B, 3, H, W] -> mean of the latent [B, latent_channels, H / f, W / f], f = 2^(levels - 1).

    channels: the first convolution's; levels: for each resolution its (channels, number of blocks, with attention or not).
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
        self.encoder.mid.block_1, self.encoder.mid.block_2 = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
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
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and bottom only
        x = self.encoder.mid.block_2(self.encoder.mid.attn_1(self.encoder.mid.block_1(x)))
        mean, _log_variance = self.quant_conv(self.encoder.conv_out(F.silu(self.encoder.norm_out(x)))).chunk(2, dim=1)
        return mean


# ---------------------------------------------------------------------------------------------------------------------
# LightningDiT, as far as the block whose input is the target


def modulate(x, shift, scale):
    """Adaptive layer norm's second half: x [B, T, D] scaled and shifted per image, shift and scale [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def rotate(x, cos, sin):
    """Rotary position embedding of x [B, heads, T, d] by angles cos, sin [T, d]: neighbouring entries are a pair."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-second, first], dim=-1).flatten(-2) * sin


class Attention(nn.Module):
    """Self-attention with rotary positions, [B, T, D] -> same; cos, sin [T, D / num_heads]."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, d]
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer, [B, T, D] -> same."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DiTBlock(nn.Module):
    """Transformer block, modulated by the embedding c of time and label. norm_only: what leads to the attention's input."""

    def __init__(self, width, num_heads, mlp_hidden, norm_only=False):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=EPS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if not norm_only:
            self.attn = Attention(width, num_heads)
            self.norm2 = nn.RMSNorm(width, eps=EPS)
            self.mlp = SwiGLU(width, mlp_hidden)

    def attention_input(self, x, c):
        """x [B, T, D], c [B, D] -> [B, T, D]: the norm and AdaLN in front of the attention."""
        shift, scale = self.adaLN_modulation(c).chunk(6, dim=1)[:2]
        return modulate(self.norm1(x), shift, scale)

    def forward(self, x, c, cos, sin):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)  # each [B, D]
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale), cos, sin)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class LightningDiT(nn.Module):
    """The first `layer` blocks, and the norm and modulation of block `layer`.

    latent_channels, patch: of the patch convolution; tokens: positions; label_rows: classes + 1, the last one is "no label".
    """

    def __init__(self, width, num_heads, mlp_hidden, latent_channels, patch, tokens, label_rows, layer):
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder, self.feat_rope = (nn.Module() for _ in range(4))
        self.x_embedder.proj = nn.Conv2d(latent_channels, width, patch, stride=patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(label_rows, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))  # this and the angles are a file's; without one: no position
        self.feat_rope.register_buffer("freqs_cos", torch.ones(tokens, width // num_heads))
        self.feat_rope.register_buffer("freqs_sin", torch.zeros(tokens, width // num_heads))
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_hidden, norm_only=i == layer) for i in range(layer + 1))

    def forward(self, z_t, t, label_row, kept):
        """z_t [B, C, H, W], t [B], label_row [B], kept [D]: 0 for a channel to silence, else 1 -> (the hidden state that enters
        block `layer`, that block's attention input made from hidden * kept), both [B, T, D]."""
        angles = t[:, None] * torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))  # [B, 128]
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.y_embedder.embedding_table(label_row)
        hidden = self.x_embedder.proj(z_t).flatten(2).transpose(1, 2) + self.pos_embed  # [B, T, D], row by row
        for block in self.blocks[:-1]:
            hidden = block(hidden, c, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        return hidden, self.blocks[-1].attention_input(hidden * kept, c)


# ---------------------------------------------------------------------------------------------------------------------
# The three stages together


class DiTEncoder(nn.Module):
    """`encoder(images, labels, t, noise)` gives pooled features [B, width]. Frozen: no parameter requires a gradient; a
    gradient with respect to the images flows where the caller asks for one.

    Attributes: image_size, num_classes, layer, width (of the features), latent_shape (C, H, W), and amp: bfloat16 on CUDA.
    """

    def __init__(self, vae, dit, image_size, zero_channels=()):
        super().__init__()
        self.vae, self.dit, self.image_size = vae, dit, image_size
        self.layer, self.width = len(dit.blocks) - 1, dit.pos_embed.shape[2]
        self.num_classes = dit.y_embedder.embedding_table.num_embeddings - 1
        channels, side = dit.x_embedder.proj.in_channels, image_size >> (len(vae.encoder.down) - 1)
        self.latent_shape = (channels, side, side)
        self.register_buffer("kept", torch.ones(self.width).index_fill(0, torch.tensor(zero_channels, dtype=torch.int64), 0.0))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.amp, self.checked = True, False
        self.requires_grad_(False).eval()

    def latents(self, images):
        """images [B, 3, H, W] in [0, 1] -> normalised latents z [B, *latent_shape], float32. Raises ValueError where the first batch is not
        in [0, 1], or its z far from zero mean and unit variance: then the autoencoder and the statistics do not belong together."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"the teacher takes images [B, 3, H, W], not {list(images.shape)}")
        if images.shape[2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic", antialias=True).clamp(0, 1)
        z = (self.vae(2 * images - 1).float() - self.mean) / self.std
        if not self.checked:  # once: looking at values makes a GPU wait
            low, high, mean, std = [value.item() for value in (*images.detach().aminmax(), z.detach().mean(), z.detach().std())]
            if not -1e-3 < low <= high < 1 + 1e-3:
                raise ValueError(f"the first images run from {low:g} to {high:g}, expected values in [0, 1]")
            if not (abs(mean) < 0.5 and 0.5 < std < 2):
                raise ValueError(f"the normalised latents of the first batch have mean {mean:.2f} and standard deviation {std:.2f}, expected "
                                 "about 0 and 1: the latent statistics do not belong to this autoencoder")
            self.checked = True
        return z

    def activations(self, images, labels, t, noise=None):
        """Features before pooling, (hidden, modulated), both [B, tokens, width] float32: the state that enters block `layer`, and
        the one that enters its attention. Arguments and errors as in `forward`."""
        batch, device = images.shape[0], images.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp and device.type == "cuda"):
            z = self.latents(images)
            if labels is None:
                labels = torch.full((batch,), self.num_classes, device=device)
            # On a GPU this look at the values would stall the queue; there an index out of range trips a device assertion.
            elif device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(f"the teacher knows labels 0 to {self.num_classes - 1}, not {int(labels.min())} to {int(labels.max())}")
            t = t.float().expand(batch) if isinstance(t, torch.Tensor) else torch.full((batch,), float(t), device=device)
            noise = torch.randn_like(z) if noise is None else noise
            if noise.shape != z.shape:
                raise ValueError(f"noise is {list(noise.shape)}, expected the latent's shape {list(z.shape)}")
            z_t = t[:, None, None, None] * z + (1 - t[:, None, None, None]) * noise
            hidden, modulated = self.dit(z_t, t, labels, self.kept)
        return hidden.float(), modulated.float()

    def forward(self, images, labels, t, noise=None):
        """Diffusion features g(x_t, t, y) of clean images (section 3 and appendix D of the paper).

        images [B, 3, H, W] float32 in [0, 1], resized to image_size where they differ; labels [B] int64 or None (no label); t in
        [0, 1], 1 = clean image, 0 = pure noise, a float or a tensor [B]; noise [B, *latent_shape] standard normal, drawn here
        if None. Returns float32 [B, width], the mean over tokens. Raises ValueError for images or noise of another shape, for
        latents that are not normalised (first batch), and (on the CPU) for labels out of range.
        """
        return self.activations(images, labels, t, noise)[1].mean(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Files: names and shapes -> networks of that size -> tensors

_KINDS = {"x_embedder.proj.weight": "a LightningDiT checkpoint", "encoder.conv_in.weight": "a VA-VAE checkpoint", "mean": "latent statistics"}


def _read(path, section, signature):
    """Tensors by name from a .pt file, from its dict `section` if it has one, without the prefix "module.". Data only. Raises
    ValueError unless `signature`, a name that marks the kind of file that is expected, is among them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped: most of a file is not needed
    except Exception as error:  # without torch's own text: it suggests to load with weights_only=False
        if isinstance(error, OSError) and error.filename:  # cannot be opened
            raise
        raise ValueError(f"{path}: damaged, or no file of tensors and plain data ({type(error).__name__})") from None
    names = lambda part: {str(name).removeprefix("module."): value for name, value in part.items()} if isinstance(part, dict) else {}
    content = content if isinstance(content, dict) else {}
    tensors = {name: value for name, value in names(content.get(section, content)).items() if isinstance(value, torch.Tensor)}
    if signature not in tensors:
        everything = [name for part in (content, *content.values()) for name in names(part)]
        kind = next((kind for name, kind in _KINDS.items() if name in everything), "something else")
        raise ValueError(f"{path}: expected {_KINDS[signature]}, this is {kind}: it lacks {signature}")
    return tensors


def build_vae(tensors):
    """A VAEEncoder of the sizes that a VA-VAE file's tensors (or anything with .shape, by name) have."""
    blocks = {match.groups() for name in tensors if (match := re.match(r"encoder\.down\.(\d)\.block\.(\d)\.", name))}  # (level, block)
    levels = []
    for i in range(1 + max((int(level) for level, _ in blocks), default=0)):
        width = _shape(tensors, f"encoder.down.{i}.block.0.conv1.weight")[0]
        levels.append((width, sum(level == str(i) for level, _ in blocks), f"encoder.down.{i}.attn.0.norm.weight" in tensors))
    return VAEEncoder(tensors["encoder.conv_in.weight"].shape[0], levels, _shape(tensors, "encoder.conv_out.weight")[0] // 2)


def build_dit(tensors, layer, num_heads):
    """A LightningDiT up to block `layer`, of the sizes that its file's tensors (or anything with .shape, by name) have."""
    width, latent_channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth = sum(name.endswith("norm1.weight") and name.startswith("blocks.") for name in tensors)
    if not 0 <= layer < depth:
        raise ValueError(f"has {depth} blocks, expected layer {layer} to be one of 0 to {depth - 1}")
    head_width = _shape(tensors, "feat_rope.freqs_cos")[1]
    if width != num_heads * head_width:
        raise ValueError(f"is {width} wide with {head_width} per head, so it has {width // head_width} heads, not num_heads={num_heads}")
    hidden = _shape(tensors, "blocks.0.mlp.w3.weight")[1]
    rows = _shape(tensors, "y_embedder.embedding_table.weight")[0]
    return LightningDiT(width, num_heads, hidden, latent_channels, patch, _shape(tensors, "pos_embed")[1], rows, layer)


def _shape(tensors, name):
    if name not in tensors:
        raise ValueError(f"lacks {name}")
    return tensors[name].shape


def _fill(module, tensors, used):
    """Give `module`, built on the meta device, the tensors of its names, in float32 and in memory of their own. used: prefixes of the
    parts that it computes; a further tensor there, say of a norm that our network has no place for, would change the result."""
    needed = module.state_dict()
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"lacks {len(missing)} of {len(needed)} tensors: {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}")
    unknown = [name for name in tensors if name not in needed and name.startswith(used)]
    if unknown:
        raise ValueError(f"is of another architecture, it has {unknown[0]}")
    for name, expected in needed.items():
        tensor = tensors[name]
        if tensor.shape != expected.shape or tensor.is_meta or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(expected.shape)}, each value stored")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    module.load_state_dict({name: tensors[name].to(torch.float32, copy=True) for name in needed}, assign=True)


def load_dit_encoder(dit_path, vae_path, stats_path, layer=14, zero_channels=(1053, 259), num_heads=16, image_size=256):
    """Load LightningDiT, VA-VAE's encoder and the latent statistics, frozen, float32, on the CPU.

    dit_path: LightningDiT's .pt (weights under "ema", keys may begin with "module."); vae_path: VA-VAE's .pt (under "state_dict";
    decoder and losses are ignored); stats_path: .pt with `mean` and `std` [1, C, 1, 1]. layer, zero_channels: the block whose
    input is the target and the channels to silence (stated in the paper for the released XL/1 checkpoint). num_heads,
    image_size: the two sizes that no tensor tells. Returns a DiTEncoder. Raises ValueError (one line naming the file) for a file
    that is damaged, of another kind, lacks a tensor or does not fit the others; OSError where it cannot be opened.
    """
    path = dit_path
    try:
        tensors = _read(path, "ema", "x_embedder.proj.weight")
        with torch.device("meta"):  # only names and shapes so far: nothing is allocated before they are known to fit
            dit = build_dit(tensors, layer, num_heads)
        blocks = [f"blocks.{i}." for i in range(layer)] + [f"blocks.{layer}.norm1.", f"blocks.{layer}.adaLN_modulation."]
        _fill(dit, tensors, ("x_embedder.", "t_embedder.", "y_embedder.", "feat_rope.", *blocks))
        if not all(0 <= channel < dit.pos_embed.shape[2] for channel in zero_channels):
            raise ValueError(f"is {dit.pos_embed.shape[2]} wide, expected zero_channels {tuple(zero_channels)} to be below that")
        path = vae_path
        tensors = _read(path, "state_dict", "encoder.conv_in.weight")
        with torch.device("meta"):
            vae = build_vae(tensors)
        _fill(vae, tensors, ("encoder.", "quant_conv."))
        encoder = DiTEncoder(vae, dit, image_size, zero_channels)
        channels, side, _ = encoder.latent_shape
        if vae.quant_conv.out_channels != 2 * channels:
            raise ValueError(f"has latents of {vae.quant_conv.out_channels // 2} channels, {dit_path} takes {channels}")
        patch = dit.x_embedder.proj.kernel_size[0]
        if image_size % (1 << (len(vae.encoder.down) - 1)) or (side // patch) ** 2 != dit.pos_embed.shape[1]:
            raise ValueError(f"makes {side} x {side} latents of image_size={image_size}, {dit_path} takes {dit.pos_embed.shape[1]} tokens")
        path = stats_path
        stats = _read(path, "latents_stats", "mean")
        for name in ("mean", "std"):
            if _shape(stats, name) != (1, channels, 1, 1) or not stats[name].isfinite().all() or (name == "std" and not (stats[name] > 0).all()):
                raise ValueError(f"{name} is {list(stats[name].shape)}, expected finite [1, {channels}, 1, 1], a std above 0")
            getattr(encoder, name).copy_(stats[name])
    except OSError:
        raise
    except Exception as error:  # whatever else is wrong in a file
        text = str(error) if isinstance(error, ValueError) else f"not usable ({type(error).__name__})"
        raise ValueError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None
    return encoder


def main():
    """Print what three files hold."""
    parser = argparse.ArgumentParser(description="Print what LightningDiT's and VA-VAE's files hold, without running anything in them.")
    for name, text in (("dit", "LightningDiT's .pt"), ("vae", "VA-VAE's .pt"), ("stats", "latents_stats.pt")):
        parser.add_argument(name, help=text)
    parser.add_argument("--layer", type=int, default=14, help="block whose input is the target (default: %(default)s)")
    args = parser.parse_args()
    try:
        encoder = load_dit_encoder(args.dit, args.vae, args.stats, args.layer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (encoder.dit, encoder.vae)]
    print(f"{args.dit}: {encoder.num_classes} classes, {encoder.width} wide, {millions[0]:.1f}M parameters up to block {encoder.layer}")
    print(f"{args.vae}: {encoder.image_size} px -> latents {list(encoder.latent_shape)}, {millions[1]:.1f}M parameters in the encoder")
    print(f"{args.stats}: std of the latents' channels {encoder.std.min():.2f} to {encoder.std.max():.2f}")


if __name__ == "__main__":
    main()
