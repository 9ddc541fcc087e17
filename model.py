"""Stable Diffusion 1.x and 2.x from a checkpoint: UNet, KL autoencoder, text encoder, and the loader.

    images (B, 3, H, W) in [-1, 1]  --encode-->  latents (B, 4, H/f, W/f) * 0.18215  --decode-->  images
    prompts  --encode_text-->  context (B, 77, D)
    unet(x_dm (B, 4, h, w), t_dm (B,), context (B, 77, D))  ->  v or eps (B, 4, h, w)

Module names are the single file's own: loading is strict. Architecture: Rombach et al. (arXiv 2112.10752); every
width and depth is read from the tensors' shapes, so the bundled small models are files like any other. The text tower
and its tokenizer are open_clip's. First come the blocks, then the networks, then the names that files use, then the
checkpoint: a single file, or a folder of diffusers'; to follow a call, start with load_checkpoint, at the end.
"""
import functools
import hashlib
import itertools
import math
import platform
import re
import zipfile
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from files import from_json, open_tensors, read_text, save_tensors

LATENT_SCALE = 0.18215  # latents have unit variance after this factor
LARGEST = 100_000       # pixels a side of a picture
UNET, VAE = "model.diffusion_model.", "first_stage_model."
OPEN_CLIP, HF_CLIP = "cond_stage_model.model.", "cond_stage_model.transformer.text_model."   # SD 2.x, SD 1.x


@dataclass(frozen=True)
class Config:
    """An architecture. Widths have one entry a resolution, from the full one down."""
    unet_widths: tuple = (320, 640, 1280, 1280)
    unet_res_blocks: int = 2
    attention: tuple = (True, True, True, False)
    context_width: int = 1024
    linear_projection: bool = True     # of the transformers; with it 64 channels a head (SD 2.x), else 8 heads (SD 1.x)
    in_channels: int = 4
    out_channels: int = 4
    vae_widths: tuple = (128, 256, 512, 512)
    vae_res_blocks: int = 2
    latent_channels: int = 4
    open_clip: bool = True             # OpenCLIP's penultimate layer (SD 2.x), else CLIP's last (SD 1.x)
    text_width: int = 1024
    text_layers: int = 24
    text_projection: bool = True       # a matrix that no one uses; SD 2.x files have it, unless diffusers wrote them
    vocabulary: int = 49408

    @property
    def version(self):
        return 2 if self.open_clip else 1

    @property
    def text_layers_used(self):
        """Of OpenCLIP's 24 layers SD 2.x leaves out the last. A tower of 23, as diffusers has it, lost it already."""
        return self.text_layers - (self.open_clip and self.text_layers != 23)

    def heads(self, channels):
        return max(1, channels // 64) if self.linear_projection else 8


SD21 = Config()
SD15 = Config(context_width=768, linear_projection=False, open_clip=False, text_width=768, text_layers=12,
              text_projection=False)
TINY = Config(unet_widths=(96, 64), unet_res_blocks=1, attention=(False, True), context_width=32,
              linear_projection=False, vae_widths=(64, 64, 64), vae_res_blocks=1, text_width=32, text_layers=4)


# ------------------------------------------------------------------ blocks

def full_precision(x):
    """Norms are taken in float32 at least, whatever autocast says."""
    return x if x.dtype == torch.float64 else x.float()


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels, eps=1e-5):
        super().__init__(32, channels, eps=eps)

    def forward(self, x):
        weight, bias = full_precision(self.weight), full_precision(self.bias)
        return F.group_norm(full_precision(x), self.num_groups, weight, bias, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        weight, bias = full_precision(self.weight), full_precision(self.bias)
        return F.layer_norm(full_precision(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def zero_(module):
    """The last layer of a residual branch starts at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t_dm, channels):
    """t_dm (B,), fractional or not -> (B, channels) in float32: cat[cos, sin] of t_dm * exp(-ln 1e4 * i / half)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t_dm.device) / half)
    angles = t_dm.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PackedConv2d(nn.Module):
    """A conv for sampling on a CPU: its weight is kept in the order of numbers that oneDNN computes with, into which it
    would bring it in every call. It can be neither trained nor saved."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight.data.to_mkldnn(), conv.bias.data
        self.settings, self.packed = (conv.padding, conv.stride, conv.dilation, conv.groups), False

    def forward(self, x):
        if not self.packed:         # for pictures of this size; others are computed too
            self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(self.weight, *self.settings, x.shape)
            self.packed = True
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.settings, "none", [], "")      # nothing comes after it


class ResBlock(nn.Module):
    """x (B, C, h, w), embedded time (B, E) -> (B, C_out, h, w)."""

    def __init__(self, channels, out_channels, embedding):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels), nn.SiLU(), nn.Identity(),
            zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, embedding, context):
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


def attend(q, k, v):
    """q (B, heads, N, D), k, v (B, heads, L, D) -> softmax(q k^T / sqrt(D)) v, (B, heads, N, D)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 256:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v  # 3 to 5 times faster than the fused one
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """x (B, N, C), context (B, L, D) -> (B, N, C)."""

    def __init__(self, channels, context_width, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Identity())

    def forward(self, x, context):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)              # (B, heads, N or L, C / heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(-2))


class GEGLU(nn.Module):
    """x (B, N, C) -> (B, N, hidden): a value times the gelu of its gate."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """x (B, N, C) -> (B, N, C), with 4 C hidden channels."""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """x (B, N, C), context (B, L, D) -> (B, N, C): attention among pixels, attention to the context, feed-forward."""

    def __init__(self, channels, context_width, heads):
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, context_width, heads)
        self.norm1, self.norm2, self.norm3 = LayerNorm(channels), LayerNorm(channels), LayerNorm(channels)

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x (B, C, h, w), context (B, L, D) -> (B, C, h, w)."""

    def __init__(self, channels, config):
        super().__init__()
        self.linear = config.linear_projection
        def projection():
            return nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(channels, config.context_width, config.heads(channels))])
        self.proj_out = zero_(projection())

    def forward(self, x, embedding, context):
        y = self.norm(x)
        if not self.linear:
            y = self.proj_in(y)
        y = y.permute(0, 2, 3, 1)                                                 # (B, h, w, C)
        shape = y.shape
        y = y.flatten(1, 2)                                                       # (B, h w, C)
        if self.linear:
            y = self.proj_in(y)
        for block in self.transformer_blocks:
            y = block(y, context)
        if self.linear:
            y = self.proj_out(y)
        y = y.reshape(shape).permute(0, 3, 1, 2)                                  # (B, C, h, w)
        if not self.linear:
            y = self.proj_out(y)
        return x + y


class Downsample(nn.Module):
    """x (B, C, h, w) -> (B, C, h/2, w/2)."""

    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, embedding, context):
        return self.op(x)


class Upsample(nn.Module):
    """x (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, embedding=None, context=None):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# ------------------------------------------------------------------ the UNet

class UNet(nn.Module):
    """x (B, C, h, w), t_dm (B,), context (B, L, D) -> (B, C_out, h, w). h and w divide by 2^(levels - 1).

    Set .checkpointing to recompute activations in the backward pass instead of keeping them.
    """

    def __init__(self, config):
        super().__init__()
        widths, width = config.unet_widths, config.unet_widths[0]
        embedding = 4 * width
        self.config, self.checkpointing = config, False
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def block(channels, out_channels, level, *more):
            transformer = [SpatialTransformer(out_channels, config)] if config.attention[level] else []
            return nn.ModuleList([ResBlock(channels, out_channels, embedding), *transformer, *more])

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, width, 3, padding=1)])])
        skips, channels = [width], width
        for level, width in enumerate(widths):
            for _ in range(config.unet_res_blocks):
                self.input_blocks.append(block(channels, width, level))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
        self.middle_block = nn.ModuleList([
            ResBlock(channels, channels, embedding), SpatialTransformer(channels, config),
            ResBlock(channels, channels, embedding)])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.unet_res_blocks + 1):
                up = [Upsample(width)] if level > 0 and i == config.unet_res_blocks else []
                self.output_blocks.append(block(channels + skips.pop(), width, level, *up))
                channels = width
        self.out = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), zero_(nn.Conv2d(channels, config.out_channels, 3, padding=1)))

    def run(self, layers, x, embedding, context):
        for layer in layers:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, embedding, context, use_reentrant=False)
            else:
                x = layer(x, embedding, context)
        return x

    def forward(self, x, t_dm, context):
        factor = 2 ** (len(self.config.unet_widths) - 1)
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(f"latents of {x.shape[-2]}x{x.shape[-1]}: both sides must divide by {factor}")
        dtype = self.out[2].weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            embedding = timestep_embedding(t_dm, self.config.unet_widths[0]).to(self.time_embed[0].weight.dtype)
            embedding = self.time_embed(embedding).to(dtype)
        h, context = self.input_blocks[0][0](x.to(dtype)), context.to(dtype)
        skips = [h]
        for layers in self.input_blocks[1:]:
            h = self.run(layers, h, embedding, context)
            skips.append(h)
        h = self.run(self.middle_block, h, embedding, context)
        for layers in self.output_blocks:
            h = self.run(layers, torch.cat([h, skips.pop()], dim=1), embedding, context)
        return self.out(h)

    def diffusers_path(self, path):
        """A layer's path here -> in diffusers' UNet: what LoRA files call it."""
        return unet_path(path, self.config)


class DepthUNet(nn.Module):
    """x_dm (B, z, h, w), t_dm (B,), the picture's latents (B, z, h, w) -> (B, z, h, w): image to depth (Sec. 4.3).

    unet takes 2 z channels; text (1, L, D) is the empty prompt, the same for every picture.
    """

    def __init__(self, unet, text):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x_dm, t_dm, picture):
        return self.unet(torch.cat([x_dm, picture], dim=1), t_dm, self.text.expand(len(x_dm), -1, -1))


# ------------------------------------------------------------------ the autoencoder

class VAEResBlock(nn.Module):
    """x (B, C, h, w) -> (B, C_out, h, w)."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(channels, eps=1e-6), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(out_channels, eps=1e-6), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class VAEAttention(nn.Module):
    """x (B, C, h, w) -> (B, C, h, w): attention among all pixels, with one head of all channels."""

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, h w, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(y)


def vae_middle(channels):
    return nn.ModuleDict({
        "block_1": VAEResBlock(channels, channels), "attn_1": VAEAttention(channels),
        "block_2": VAEResBlock(channels, channels)})


class VAEDownsample(nn.Module):
    """x (B, C, h, w) -> (B, C, h/2, w/2), padded at the right and at the bottom only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Encoder(nn.Module):
    """images (B, 3, H, W) -> (B, 2 * latent channels, H/f, W/f)."""

    def __init__(self, config):
        super().__init__()
        widths, channels = config.vae_widths, config.vae_widths[0]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            stage = nn.ModuleDict({"block": nn.ModuleList()})
            for _ in range(config.vae_res_blocks):
                stage["block"].append(VAEResBlock(channels, width))
                channels = width
            if level < len(widths) - 1:
                stage["downsample"] = VAEDownsample(channels)
            self.down.append(stage)
        self.mid = vae_middle(channels)
        self.norm_out = GroupNorm(channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down:
            for block in stage["block"]:
                x = block(x)
            if "downsample" in stage:
                x = stage["downsample"](x)
        for layer in self.mid.values():
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, latent channels, H/f, W/f) -> images (B, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths, channels = config.vae_widths, config.vae_widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = vae_middle(channels)
        stages = []
        for level, width in reversed(list(enumerate(widths))):
            stage = nn.ModuleDict({"block": nn.ModuleList()})
            for _ in range(config.vae_res_blocks + 1):
                stage["block"].append(VAEResBlock(channels, width))
                channels = width
            if level > 0:
                stage["upsample"] = Upsample(channels)
            stages.insert(0, stage)
        self.up = nn.ModuleList(stages)
        self.norm_out = GroupNorm(channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for layer in self.mid.values():
            x = layer(x)
        for stage in reversed(self.up):
            for block in stage["block"]:
                x = block(x)
            if "upsample" in stage:
                x = stage["upsample"](x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """Images and latents at the network's own scale; StableDiffusion multiplies by LATENT_SCALE."""

    def __init__(self, config):
        super().__init__()
        z = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def moments(self, images):
        """images (B, 3, H, W) -> the posterior's mean and standard deviation, both (B, z, H/f, W/f)."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents))


# ------------------------------------------------------------------ the text encoder

def text_tower(config):
    """open_clip's text transformer, built from its configuration, nothing downloaded."""
    from open_clip.transformer import QuickGELU, TextTransformer
    tower = TextTransformer(
        width=config.text_width, layers=config.text_layers, heads=max(1, config.text_width // 64),
        vocab_size=config.vocabulary, output_dim=config.text_width if config.text_projection else None,
        act_layer=nn.GELU if config.open_clip else QuickGELU)
    if config.text_width < 64:  # initialised for widths of hundreds: at 32 the words would all but vanish
        nn.init.normal_(tower.token_embedding.weight, std=0.5)
        nn.init.normal_(tower.positional_embedding, std=0.1)
    return tower


@functools.cache
def tokenizer():
    from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer()


def first_tokens(prompt):
    """-> the first 75 of open_clip's encode(prompt). A word is one token or more, so later words cannot matter. A token
    is at most 32 bytes long, so 75 end before letter 2400 of a word; the letters behind that change them only through
    a chain of merges that reaches back over 600 more. Pairs are merged in a time that is quadratic in the word."""
    clip, tokens = tokenizer(), []
    for word in itertools.islice(clip.pat.finditer(clip.clean_fn(prompt)), 75):
        letters = "".join(clip.byte_encoder[byte] for byte in word[0][:3000].encode())
        tokens += [clip.encoder[token] for token in clip.bpe(letters).split(" ")]
    return tokens[:75]


def tokenize(prompts, pad_token):
    """prompts (B strings) -> token ids (B, 77): 49406, at most 75 tokens of content, 49407, pad_token."""
    ids = torch.full((len(prompts), 77), pad_token)
    for row, prompt in zip(ids, prompts):
        tokens = [tokenizer().sot_token_id, *first_tokens(prompt), tokenizer().eot_token_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids


# ------------------------------------------------------------------ what files and diffusers call these modules

HF_NAMES = [  # open_clip's name, the Hugging Face name, as in SD 1.x; q, k and v are one matrix in the former
    (r"^token_embedding\.weight$", "embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"encoder.layers.\1.self_attn.{}_proj."),
]
UNET_OUTER = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
              "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
UNET_INNER = {"in_layers.0": "resnets.{}.norm1", "in_layers.2": "resnets.{}.conv1",
              "emb_layers.1": "resnets.{}.time_emb_proj", "out_layers.0": "resnets.{}.norm2",
              "out_layers.3": "resnets.{}.conv2", "skip_connection": "resnets.{}.conv_shortcut",
              "op": "downsamplers.0.conv", "conv": "upsamplers.0.conv"}
VAE_NAMES = {  # replaced in this order
    "down.": "down_blocks.", "up.": "up_blocks.", ".block.": ".resnets.", ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.", "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0", "attentions.0.norm": "attentions.0.group_norm", ".q.": ".to_q.",
    ".k.": ".to_k.", ".v.": ".to_v.", "proj_out": "to_out.0", "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out"}


def hf_names(name):
    """A parameter of open_clip's text tower -> its Hugging Face names: one, or three to stack (q, k, v)."""
    for pattern, replacement in HF_NAMES:
        if re.match(pattern, name):
            name = re.sub(pattern, replacement, name)
            return [name.format(x) for x in "qkv"] if "{}" in name else [name]
    raise AssertionError(name)


def unet_path(path, config):
    """A layer's path in our UNet -> in diffusers': input_blocks.4.1.proj_in -> down_blocks.1.attentions.0.proj_in.

    Ours numbers its blocks in one row, as many at each resolution. Input block 0 is the first conv, so the input levels
    start at 1; the output levels start at 0.
    """
    blocks_per_level = config.unet_res_blocks + 1
    if path in UNET_OUTER:
        return UNET_OUTER[path]
    stage, number, inner = re.fullmatch(r"(\w+)\.(\d+)\.(?:\d+\.)?(.+)", path).groups()
    number = int(number)
    if stage == "middle_block":                         # ResBlock 0, transformer 1, ResBlock 2
        level, position = "mid_block", number // 2
    elif stage == "input_blocks":
        level, position = f"down_blocks.{(number - 1) // blocks_per_level}", (number - 1) % blocks_per_level
    else:
        level, position = f"up_blocks.{number // blocks_per_level}", number % blocks_per_level
    return f"{level}.{UNET_INNER.get(inner, 'attentions.{}.' + inner).format(position)}"


def vae_name(name, levels):
    """A parameter of our autoencoder -> in diffusers', whose decoder counts its levels from the other end."""
    name = re.sub(r"(?<=decoder\.up\.)\d+", lambda match: str(levels - 1 - int(match[0])), name)
    for ours, theirs in VAE_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def file_names(parameter, text_prefix):
    """A parameter of StableDiffusion -> the tensors of a single file that make it up."""
    if parameter.startswith(OPEN_CLIP):
        return [text_prefix + parameter.removeprefix(OPEN_CLIP)]
    if parameter.startswith(HF_CLIP):
        return [text_prefix + name for name in hf_names(parameter.removeprefix(HF_CLIP))]
    return [parameter]


def folder_names(parameter, config):
    """A parameter of StableDiffusion -> the tensors of a diffusers folder that make it up, as unet/conv_in.weight."""
    if parameter.startswith(UNET):
        path, _, kind = parameter.removeprefix(UNET).rpartition(".")
        return [f"unet/{unet_path(path, config)}.{kind}"]
    if parameter.startswith(VAE):
        return ["vae/" + vae_name(parameter.removeprefix(VAE), len(config.vae_widths))]
    prefix = OPEN_CLIP if config.open_clip else HF_CLIP
    return ["text_encoder/" + name for name in hf_names(parameter.removeprefix(prefix))]


# ------------------------------------------------------------------ the whole

class StableDiffusion(nn.Module):
    """A checkpoint in memory, its modules under the file's own names. prediction is "v" or "eps"."""

    def __init__(self, config, prediction):
        super().__init__()
        self.config, self.prediction, self.zero_snr = config, prediction, False
        self.text_prefix = OPEN_CLIP if config.open_clip else HF_CLIP
        self.path, self.metadata, self.extra, self.dtypes, self.unet_hash = None, {}, {}, {}, None  # of the file
        self.model = nn.ModuleDict({"diffusion_model": UNet(config)})
        self.first_stage_model = AutoencoderKL(config)
        tower = text_tower(config)
        self.cond_stage_model = nn.ModuleDict(
            {"model": tower} if config.open_clip else {"transformer": nn.ModuleDict({"text_model": tower})})

    @property
    def unet(self):
        return self.model["diffusion_model"]

    @property
    def text_encoder(self):
        stage = self.cond_stage_model
        return stage["model"] if self.config.open_clip else stage["transformer"]["text_model"]

    @property
    def device(self):
        return self.unet.out[2].weight.device

    @property
    def is_depth_model(self):
        """Whether the UNet takes a picture's latents beside the noisy ones."""
        return self.config.in_channels == 2 * self.config.latent_channels

    @property
    def factor(self):
        """Pixels a side of one latent."""
        return 2 ** (len(self.config.vae_widths) - 1)

    @property
    def multiple(self):
        """Both sides of a picture must divide by this many pixels: autoencoder and UNet halve them again and again."""
        return self.factor * 2 ** (len(self.config.unet_widths) - 1)

    def picture_size(self, size=None):
        """[side] or [height, width] in pixels (None: the file's own, or 512) -> height, width, or a ValueError."""
        if size is None:
            told = self.metadata.get("resolution", "512")
            size = [int(side) for side in told.split() if side.isdecimal()]
            if not 1 <= len(size) <= 2 or " ".join(map(str, size)) != told:
                raise ValueError(f"{self.path}: its metadata says resolution {told!r}, which is no size: give --size")
        if len(size) > 2:
            raise ValueError(f"--size takes one number, or height and width, not {len(size)} numbers")
        height, width = size[0], size[-1]
        if height % self.multiple or width % self.multiple or not self.multiple <= min(height, width) <= LARGEST:
            raise ValueError(f"size {height}x{width}: both sides must be multiples of {self.multiple} for this "
                             f"checkpoint, at most {LARGEST}")
        return height, width

    def latent_shape(self, size):
        """[height, width] of a picture in pixels -> (z, h, w) of its latents."""
        return self.config.latent_channels, size[0] // self.factor, size[1] // self.factor

    @torch.no_grad()
    def add_picture_input(self):
        """Let the UNet take a picture's latents beside the noisy ones: its first conv gets its weights twice, halved,
        so that nothing changes where both inputs agree (Marigold). Does nothing to a depth model."""
        if self.is_depth_model:
            return
        conv, z = self.unet.input_blocks[0][0], self.config.latent_channels
        doubled = nn.Conv2d(2 * z, conv.out_channels, 3, padding=1).to(conv.weight).requires_grad_(False)
        doubled.weight.copy_(torch.cat([conv.weight, conv.weight], dim=1) / 2)
        doubled.bias.copy_(conv.bias)
        self.unet.input_blocks[0][0] = doubled
        self.config = self.unet.config = replace(self.config, in_channels=2 * z)

    def pack(self):
        """Make a model faster that is only to be sampled: in channels_last on CUDA, by PackedConv2d on an x86 CPU."""
        if self.device.type == "cuda":
            self.to(memory_format=torch.channels_last)
        if self.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
            return
        if self.unet.out[2].weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return
        for path, layer in list(self.named_modules()):
            if isinstance(layer, nn.Conv2d):
                self.set_submodule(path, PackedConv2d(layer))

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> scaled latents (B, z, H/f, W/f): the posterior's mean."""
        mean, _ = self.first_stage_model.moments(images.to(self.first_stage_model.quant_conv.weight))
        return mean * LATENT_SCALE

    def decode(self, latents):
        """scaled latents (B, z, h, w) -> images (B, 3, f h, f w), near [-1, 1], not clamped."""
        return self.first_stage_model.decode(latents.to(self.first_stage_model.quant_conv.weight) / LATENT_SCALE)

    def encode_text(self, prompts):
        """prompts (B strings) -> context (B, 77, D)."""
        tower = self.text_encoder
        ids = tokenize(prompts, pad_token=0 if self.config.open_clip else 49407).to(self.device)
        x = tower.token_embedding(ids) + tower.positional_embedding
        for block in tower.transformer.resblocks[:self.config.text_layers_used]:
            x = block(x, attn_mask=tower.attn_mask)
        return tower.ln_final(x)

    def modelspec(self, title, size, kind=""):
        """What tools look for in a file's metadata (the ModelSpec standard). size: [height, width] in pixels; kind:
        "/lora" for a LoRA file. The license is the user's to add."""
        depth = "-depth" if self.is_depth_model else ""
        name = {1: "v1", 2: "v2-768-v" if self.prediction == "v" else "v2-512"}[self.config.version]
        return {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"stable-diffusion-{name}{depth}{kind}",
                "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
                "modelspec.title": title, "modelspec.date": f"{datetime.now():%Y-%m-%dT%H:%M:%S}",
                "modelspec.resolution": f"{size[1]}x{size[0]}",
                "modelspec.prediction_type": "v" if self.prediction == "v" else "epsilon"}

    def save(self, path, dtype=None, **metadata):
        """Write one .safetensors file in the layout that was read, its networks as dtype (None: as in that file)."""
        tensors = dict(self.extra)
        for key, value in self.state_dict().items():
            names = file_names(key, self.text_prefix)
            value = value.to(dtype or self.dtypes.get(key, value.dtype))
            tensors.update(zip(names, value.chunk(len(names))))
        about = {"prediction": self.prediction} | ({"zero_snr": "true"} if self.zero_snr else {})
        save_tensors(path, tensors, {**self.metadata, **about, **metadata})


# ------------------------------------------------------------------ the file

TEXT_PREFIXES = {  # where single files keep the text encoder -> the first tensor of it
    OPEN_CLIP: "token_embedding.weight",
    "conditioner.embedders.0.model.": "token_embedding.weight",                     # SD 2.x in Stability's newer code
    HF_CLIP: "embeddings.token_embedding.weight",
    "cond_stage_model.transformer.": "embeddings.token_embedding.weight",           # SD 1.x, older merges
}
PARTS = {"UNet": UNET, "autoencoder": VAE, "text encoder": ("cond_stage_model.", "conditioner.")}
NETWORK = re.compile(  # a tensor here must be one that we load; all others are kept as they are
    r"model\.diffusion_model\.|first_stage_model\.(encoder|decoder|(post_)?quant_conv)\."
    r"|(cond_stage_model|conditioner\.embedders\.0)\.(model|transformer(\.text_model)?)\."
    r"(token_embedding|positional_embedding|transformer\.resblocks|ln_final|embeddings|encoder|final_layer_norm)\b"
    r"|unet/|vae/|text_encoder/(embeddings|encoder|final_layer_norm)")
USUAL_EXTRA = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|logvar|lvlb_weights"
    r"|.*(logit_scale|position_ids|attn_mask)|model_ema\.(decay|num_updates)")
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def in_batches(names):
    """Yield lists of a few names. A file is mapped anew for each, so that pages that were read are let go."""
    names = iter(names)
    while batch := list(itertools.islice(names, 64)):
        yield batch


def read_safetensors(path, names):
    """Yield (name, tensor)."""
    for batch in in_batches(names):
        with open_tensors(path) as file:
            yield from ((name, file.get_tensor(name)) for name in batch)


def is_plain(tensor):
    """Whether a tensor of a pickle holds its numbers, one by one: it may be sparse, or without memory."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


class CheckpointFile:
    """A single file's tensors: .shapes by name, .metadata, .names(parameter), and .tensors(names) one by one."""

    def __init__(self, path):
        self.path, self.metadata, self.pickled = Path(path), {}, None
        if self.path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth"):
            raise ValueError(f"{path}: expected a .safetensors or .ckpt file, or a diffusers folder")
        if self.path.suffix == ".safetensors":
            with open_tensors(self.path) as file:
                self.metadata = file.metadata() or {}
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        else:
            self.shapes = self.read_pickle()
        try:
            self.text_prefix, self.config = find_text(self.shapes), read_config(self.shapes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def read_pickle(self):
        try:
            content = self.unpickle()
        except Exception as error:  # damaged bytes can raise anything in a parser
            if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise ValueError(f"{self.path}: refused, since it holds {foreign[1]}, which could run code; "
                                 "look for a .safetensors version") from error
            raise ValueError(f"{self.path}: cannot be read; truncated or not a checkpoint? "
                             f"({type(error).__name__})") from error
        self.pickled = None if zipfile.is_zipfile(self.path) else content  # older pickles cannot be mapped
        return {name: tuple(tensor.shape) for name, tensor in content.items()}

    def unpickle(self):
        """weights_only=True, with Lightning's callback class, which old files name, as an inert stub."""
        stub = type("ModelCheckpoint", (), {})
        with torch.serialization.safe_globals(
                [(stub, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]):
            content = torch.load(self.path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path) or None)
        content = content.get("state_dict", content) if isinstance(content, dict) else {}
        return {name: tensor.detach() for name, tensor in content.items()
                if isinstance(name, str) and isinstance(tensor, torch.Tensor) and is_plain(tensor)}

    def tensors(self, names):
        if self.path.suffix == ".safetensors":
            yield from read_safetensors(self.path, names)
            return
        for batch in in_batches(names):
            content = self.pickled or self.unpickle()
            yield from ((name, content[name]) for name in batch)

    def names(self, parameter):
        return file_names(parameter, self.text_prefix)


class DiffusersFolder:
    """The same of a folder that diffusers wrote: model_index.json, unet/, vae/, text_encoder/, scheduler/."""

    def __init__(self, path):
        self.path, self.shapes, self.places = Path(path), {}, {}
        pipeline = self.json("model_index.json").get("_class_name")
        if not re.fullmatch(r"StableDiffusion(Img2Img|Inpaint)?Pipeline", str(pipeline)):
            raise ValueError(f"{path}: a folder of {pipeline}; Stable Diffusion 1.x or 2.x is needed")
        for part in ("unet", "vae", "text_encoder"):
            for file in self.weight_files(part):
                self.read_names(part, file)
        try:
            self.config, scheduler = self.read_config(), self.json("scheduler/scheduler_config.json")
            self.metadata = {"prediction_type": str(scheduler["prediction_type"]),
                             "zero_snr": str(scheduler.get("rescale_betas_zero_snr", False)).lower()}
            betas = scheduler["beta_schedule"], scheduler["beta_start"], scheduler["beta_end"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: a config.json or scheduler_config.json in it lacks {error}") from error
        if betas != ("scaled_linear", 0.00085, 0.012):
            raise ValueError(f"{path}: the noise schedule of its scheduler is {betas}, not Stable Diffusion's")

    def json(self, name):
        try:
            return dict(from_json(read_text(self.path / name)))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self.path / name}: missing or damaged ({type(error).__name__})") from error

    def weight_files(self, part):
        """-> the files of one variant, in one piece or many: of the plain one if there is one, else of fp16."""
        variants = {}
        for file in sorted((self.path / part).glob("*.safetensors")):
            stem = re.sub(r"-\d+-of-\d+", "", file.stem)
            variants.setdefault(stem.partition(".")[2], []).append(file)
        if not variants:
            raise ValueError(f"{self.path}: {part}/ is missing or has no .safetensors file (.bin files are not read)")
        return variants[min(variants)]

    def read_names(self, part, path):
        with open_tensors(path) as file:
            for stored in file.keys():
                name = f"{part}/{stored.removeprefix('text_model.')}"
                for old, new in OLD_VAE_NAMES.items():
                    name = name.replace(old, new)
                self.places[name], self.shapes[name] = (path, stored), tuple(file.get_slice(stored).get_shape())

    def read_config(self):
        """-> Config, by the folder's own config.json files."""
        unet, vae, text = (self.json(f"{part}/config.json") for part in ("unet", "vae", "text_encoder"))
        config = Config(
            unet_widths=tuple(unet["block_out_channels"]), unet_res_blocks=unet["layers_per_block"],
            attention=tuple("CrossAttn" in block for block in unet["down_block_types"]),
            context_width=unet["cross_attention_dim"], linear_projection=unet.get("use_linear_projection", False),
            in_channels=unet["in_channels"], out_channels=unet["out_channels"],
            vae_widths=tuple(vae["block_out_channels"]), vae_res_blocks=vae["layers_per_block"],
            latent_channels=vae["latent_channels"], open_clip=text["hidden_act"] == "gelu",
            text_width=text["hidden_size"], text_layers=text["num_hidden_layers"], text_projection=False,
            vocabulary=text["vocab_size"])
        heads = unet["attention_head_dim"]
        heads = heads if isinstance(heads, list) else [heads] * len(config.unet_widths)
        if heads != [config.heads(width) for width in config.unet_widths]:
            raise ValueError(f"{self.path}: {heads} attention heads are not those of Stable Diffusion 1.x or 2.x")
        if config.text_layers_used < config.text_layers:
            raise ValueError(f"{self.path}: a text encoder of {config.text_layers} layers, where SD 2.x has 23")
        return config

    def tensors(self, names):
        names = sorted(names, key=self.places.get)
        for path, group in itertools.groupby(names, lambda name: self.places[name][0]):
            name_of = {self.places[name][1]: name for name in group}
            yield from ((name_of[stored], tensor) for stored, tensor in read_safetensors(path, name_of))

    def names(self, parameter):
        return folder_names(parameter, self.config)


def open_checkpoint(path):
    """-> CheckpointFile or DiffusersFolder, or a ValueError that says what to give instead."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        return DiffusersFolder(path)
    if path.is_dir():
        above = "; give the folder above it" if (path.parent / "model_index.json").is_file() else ""
        raise ValueError(f"{path}: a folder without model_index.json, so none of diffusers' pipelines{above}")
    if path.is_file():
        return CheckpointFile(path)
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and path.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"{path}: no such checkpoint file or folder. If it is a model's name on the Hugging Face hub, "
                         f"download it first: hf download {path} --local-dir {path.name}; then --ckpt {path.name}")
    raise ValueError(f"{path}: no such checkpoint file")


def looks_like(shapes):
    """What a file without the parts of Stable Diffusion seems to be."""
    hints = {
        "lora_": "a LoRA file: give it to --lora, with the checkpoint it was made for",
        "down_blocks.": "one part of a diffusers folder: give the whole folder",
        "double_blocks": "Flux", "control_model.": "a ControlNet", "encoder.down": "an autoencoder alone",
        "input_blocks.": "a UNet alone, without autoencoder and text encoder", "text_model.": "a text encoder alone",
        "resblocks.": "a text encoder alone",
    }
    found = (what for hint, what in hints.items() if any(hint in name for name in shapes))
    return next(found, f"an unknown file of {len(shapes)} tensors")


def check_parts(shapes):
    """ValueError that says what a single file is, or which part of Stable Diffusion 1.x or 2.x it lacks."""
    needed = "Stable Diffusion 1.x or 2.x is needed"
    if any(re.search(r"label_emb|conditioner\.embedders\.(1|0\.transformer)\.", name) for name in shapes):
        raise ValueError(f"this looks like an SDXL or unCLIP checkpoint; {needed}")
    if any(UNET + "joint_blocks" in name for name in shapes):
        raise ValueError(f"this looks like Stable Diffusion 3; {needed}")
    missing = [part for part, prefix in PARTS.items() if not any(name.startswith(prefix) for name in shapes)]
    if len(missing) == len(PARTS):
        raise ValueError(f"this looks like {looks_like(shapes)}; {needed}")
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}; a whole checkpoint of {needed}")


def find_text(shapes):
    """-> the prefix of the text encoder's tensors in a single file."""
    return next((prefix for prefix, first in TEXT_PREFIXES.items() if prefix + first in shapes), HF_CLIP)


def read_config(shapes):
    """{key: shape} of a single file -> Config. ValueError that says what the file looks like if it is none of ours."""
    def count(pattern):
        return len({match[0] for key in shapes if (match := re.match(pattern, key))})

    check_parts(shapes)
    try:
        widths, attention, downsamplers = [], [], []
        blocks = count(re.escape(UNET) + r"input_blocks\.\d+\.")
        for i in range(1, blocks):
            block = f"{UNET}input_blocks.{i}."
            if block + "0.op.weight" in shapes:
                downsamplers.append(i)
            elif len(widths) == len(downsamplers):  # the first block of a level
                widths.append(shapes[block + "0.in_layers.2.weight"][0])
                attention.append(block + "1.norm.weight" in shapes)
        prefix = find_text(shapes)
        open_clip, embedding = prefix.endswith(".model."), shapes[prefix + TEXT_PREFIXES[prefix]]
        projection = shapes[UNET + "middle_block.1.proj_in.weight"]
        levels = count(re.escape(VAE) + r"encoder\.down\.\d+\.")
        return Config(
            unet_widths=tuple(widths), unet_res_blocks=(downsamplers or [blocks])[0] - 1, attention=tuple(attention),
            context_width=shapes[UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
            linear_projection=len(projection) == 2,
            in_channels=shapes[UNET + "input_blocks.0.0.weight"][1], out_channels=shapes[UNET + "out.2.weight"][0],
            vae_widths=tuple(shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
            vae_res_blocks=count(re.escape(VAE) + r"encoder\.down\.0\.block\.\d+\."),
            latent_channels=shapes[VAE + "quant_conv.weight"][0] // 2,
            open_clip=open_clip, text_width=embedding[1], vocabulary=embedding[0],
            text_projection=open_clip and prefix + "text_projection" in shapes,
            text_layers=count(re.escape(prefix) + (r"transformer\.resblocks\.\d+\." if open_clip
                                                   else r"encoder\.layers\.\d+\.")))
    except (KeyError, IndexError) as error:
        raise ValueError("this looks like an incomplete checkpoint; Stable Diffusion 1.x or 2.x is needed "
                         f"(no tensor {error})") from error


def prediction_of(metadata):
    """-> a prediction by a file's metadata, "v" or "eps" or another word, and which entry says so; or None, None."""
    words = {"v_prediction": "v", "epsilon": "eps"}
    names = "prediction", "modelspec.prediction_type", "modelspec.predict_key", "prediction_type"
    return next(((words.get(metadata[name], metadata[name]), name) for name in names if name in metadata), (None, None))


def guess_prediction(file, prediction):
    """-> ("v" or "eps", why): the caller's word, then the file's, then what the weights give away."""
    asked, why = prediction, "as asked"
    if asked is None:
        asked, name = prediction_of(file.metadata)
        why = f"from the file's {name}"
    if asked is None and "v_pred" in file.shapes:       # an empty tensor, in the v-models that ComfyUI saves
        asked, why = "v", "from the file's tensor v_pred"
    if asked not in (None, "v", "eps"):
        raise ValueError(f"{file.path}: prediction {asked!r} ({why}) is neither 'v' nor 'eps'")
    if asked is not None:
        return asked, why
    config = file.config
    if not config.open_clip:
        return "eps", "SD 1.x is"
    # a norm whose statistics tell SD 2.1 (768) from the eps-models of the same shapes
    last = len(config.unet_widths) * (config.unet_res_blocks + 1) - 1
    name = f"{UNET}output_blocks.{last}.1.transformer_blocks.0.norm1.bias"
    if name not in file.shapes:
        return "v", "the default of SD 2.x; --prediction eps says otherwise"
    (_, bias), = file.tensors([name])
    std = bias.float().std().item()
    why = f"guessed from a norm's std of {std:.3f} (v is above 0.09); --prediction overrides"
    return "v" if std > 0.09 else "eps", why


def check_architecture(file):
    """ValueError that says why a file makes no model of ours."""
    config = file.config
    numbers = [number for entry in vars(config).values() for number in (entry if isinstance(entry, tuple) else [entry])]
    if not all(isinstance(number, int) and 0 <= number < 10**6 for number in numbers):
        raise ValueError(f"{file.path}: sizes that no network has, in a config.json or in the shapes: {numbers}")
    if config.in_channels not in (config.latent_channels, 2 * config.latent_channels):
        raise ValueError(f"{file.path}: the UNet takes {config.in_channels} channels: an inpainting, depth or "
                         "upscaling variant, which is not supported")
    if config.vocabulary < 49408 or config.text_width != config.context_width:
        raise ValueError(f"{file.path}: a text encoder of {config.vocabulary} words and width {config.text_width} does "
                         f"not fit the tokenizer's 49408 and the UNet's context width {config.context_width}")
    if config.linear_projection and not config.open_clip:
        raise ValueError(f"{file.path}: the UNet is an SD 2.x, the text encoder has the names of an SD 1.x")


def build_empty(file, prediction):
    """-> StableDiffusion whose tensors have shapes and names, but no memory yet."""
    import open_clip  # noqa: F401  before the meta device: some versions compute with numbers while they are imported
    try:
        with torch.device("meta"):
            return StableDiffusion(file.config, prediction)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{file.path}: the widths of its tensors make no model: {error}") from error


def averaged_name(name):
    """The name under which a non-pruned file keeps the average (EMA) of a UNet's tensor."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def find_tensors(file, sd, use_ema):
    """-> {parameter of `sd`: the file's tensors that make it up}, and the names of what else is in the file.
    ValueError if a tensor is missing, misshapen, or unknown in one of the networks that we load."""
    averaged = {averaged_name(name) for name in sd.state_dict() if name.startswith(UNET)}
    if use_ema and not averaged & file.shapes.keys():
        raise ValueError(f"{file.path}: holds no EMA weights; leave --use-ema out")
    plain = {parameter: file.names(parameter) for parameter in sd.state_dict()}
    stored = {parameter: [averaged_name(name) if use_ema and name.startswith(UNET) else name for name in names]
              for parameter, names in plain.items()}
    wanted = {name for names in stored.values() for name in names}
    known = wanted | averaged | {name for names in plain.values() for name in names}
    missing, others = sorted(wanted - file.shapes.keys()), sorted(file.shapes.keys() - known)
    unknown = [name for name in others if NETWORK.match(name) and not USUAL_EXTRA.fullmatch(name)]
    if missing or unknown:
        raise ValueError(f"{file.path}: not quite a Stable Diffusion {sd.config.version}.x checkpoint: "
                         f"{len(missing)} tensors missing{', first ' + missing[0] if missing else ''}; "
                         f"{len(unknown)} unknown{', first ' + unknown[0] if unknown else ''}")
    for parameter, tensor in sd.state_dict().items():
        expected = (len(tensor) // len(stored[parameter]), *tensor.shape[1:])
        for name in stored[parameter]:
            if file.shapes[name] != expected and file.shapes[name] + (1, 1) != expected:   # diffusers: no 1x1 convs
                raise ValueError(f"{file.path}: {name} is {file.shapes[name]}, "
                                 f"expected {expected} from the other tensors")
    return stored, others


def is_finite(tensor):
    """Whether a tensor has neither NaN nor infinity: in one pass, without a second tensor of its size."""
    low, high = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()        # both are NaN, if one is
    return math.isfinite(low) and math.isfinite(high)


def hash_of(network):
    """A hash of the first 1024 numbers of each of its tensors."""
    words = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        words.update(name.encode() + tensor.flatten()[:1024].float().cpu().numpy().tobytes())
    return words.hexdigest()


def read_weights(file, sd, stored, device, dtype):
    """Fill `sd` with the file's tensors, read one by one. The hash of the UNet is of the first 1024 numbers of each of
    its tensors, as float16, so that a float32 and a float16 file of one model have the same."""
    parameter_of = {name: parameter for parameter, names in stored.items() for name in names}
    read, state, hashes = {}, {}, {}
    for name, tensor in file.tensors(parameter_of):
        parameter = parameter_of[name]
        if not tensor.is_floating_point() or not is_finite(tensor):
            raise ValueError(f"{file.path}: {name} holds NaN, infinity or no real numbers: take another copy of it")
        sd.dtypes[parameter] = tensor.dtype
        if parameter.startswith(UNET):
            hashes[parameter] = hashlib.sha256(tensor.flatten()[:1024].half().numpy()).hexdigest()
        read[name] = tensor.to(device=device, dtype=dtype)
    for parameter, empty in sd.state_dict().items():
        tensors = [read.pop(name) for name in stored[parameter]]    # q, k and v of SD 1.x become one matrix
        state[parameter] = (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).view(empty.shape)
    sd.load_state_dict(state, assign=True)
    sd.unet_hash = hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()
    sd.unet.time_embed.to(torch.promote_types(dtype, torch.float32))  # small, and times bear no rounding
    sd.text_encoder.attn_mask = torch.full((77, 77), float("-inf"), device=device).triu(1)


def load_checkpoint(path, device="cpu", dtype=torch.float32, prediction=None, use_ema=False, zero_snr=False):
    """Read Stable Diffusion 1.x or 2.x, a single file (.safetensors or .ckpt) or a diffusers folder -> StableDiffusion.

    prediction: "v" or "eps" where the file's own word or the guess is wrong; use_ema: take the UNet's EMA weights,
    which non-pruned files carry; zero_snr: take the schedule of zero terminal SNR, though the file does not ask for it.
    Prints what was assumed. ValueError for a file that is missing, damaged or of another kind.
    """
    file = open_checkpoint(path)
    check_architecture(file)
    prediction, why = guess_prediction(file, prediction)
    sd = build_empty(file, prediction)
    stored, others = find_tensors(file, sd, use_ema)
    read_weights(file, sd, stored, device, dtype)
    sd.path, sd.zero_snr = path, zero_snr or "ztsnr" in file.shapes or file.metadata.get("zero_snr") == "true"
    if isinstance(file, CheckpointFile):        # what it is saved with again; of a folder a plain single file is made
        sd.text_prefix, sd.extra = file.text_prefix, dict(file.tensors(others))
        sd.metadata = {name: value for name, value in file.metadata.items() if name != "format"}
    weights = ""
    if any(name.startswith("model_ema.diffusion_model") for name in file.shapes):
        weights = ", EMA weights" if use_ema else ", non-EMA weights (--use-ema takes the others)"
    print(f"{path}: Stable Diffusion {sd.config.version}.x layout, {len(file.shapes)} tensors, "
          f"{sum(p.numel() for p in sd.parameters()) / 1e6:.1f}M parameters as {str(dtype).removeprefix('torch.')}"
          f"{weights}; {prediction}-prediction ({why}){', zero terminal SNR' if sd.zero_snr else ''}")
    unusual = [name for name in others if not USUAL_EXTRA.fullmatch(name)]
    if unusual:
        print(f"{path}: {len(unusual)} tensors belong to none of the networks and are only kept: "
              f"{', '.join(unusual[:3])}{' ...' if len(unusual) > 3 else ''}")
    return sd.requires_grad_(False).eval()
