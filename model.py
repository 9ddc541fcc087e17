"""The networks of Stable Diffusion 1.x, 2.x and XL: UNet, autoencoder (VAE) and text encoders.

    images (B, 3, H, W) in [-1, 1]  --encode-->  scaled latents (B, 4, H/f, W/f)  --decode-->  images
    prompts  --encode_text-->  context (B, 77, D); for SDXL (B, 78, D), whose last row has the pooled text
    unet(x_dm (B, 4, h, w), t_dm (B,), context (B, 77, D))  ->  v or eps (B, 4, h, w)

Architecture: Rombach et al. (arXiv 2112.10752). Module names are those of the original checkpoint files, so loading is
strict and renames nothing. The text encoder and its tokenizer come from open_clip. support/checkpoint.py reads the
files: its load_checkpoint returns a StableDiffusion, the last class here.
"""
import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

TOKENS = 77


@dataclass(frozen=True)
class Config:
    """An architecture. Widths have one entry per resolution, starting at the full one."""
    unet_widths: tuple = (320, 640, 1280, 1280)
    unet_res_blocks: int = 2
    transformer_depth: tuple = (1, 1, 1, 0)     # blocks in each transformer of a level; the middle has the most
    context_width: int = 1024
    linear_projection: bool = True     # in the transformers: SD 2.x, 64 channels per head; SD 1.x: 1x1 convs, 8 heads
    in_channels: int = 4
    out_channels: int = 4
    vae_widths: tuple = (128, 256, 512, 512)
    vae_res_blocks: int = 2
    latent_channels: int = 4
    open_clip: bool = True             # OpenCLIP's penultimate layer (SD 2.x), else CLIP's last (SD 1.x)
    text_width: int = 1024
    text_layers: int = 24
    text_projection: bool = True       # an unused matrix in SD 2.x files, except those converted from diffusers
    vocabulary: int = 49408
    pooled_width: int = 0              # of SDXL's second text encoder, and of its pooled text
    pooled_layers: int = 0

    @property
    def is_xl(self):
        return self.pooled_width > 0

    @property
    def version(self):
        """In words, such as "2.x"."""
        return "XL" if self.is_xl else "2.x" if self.open_clip else "1.x"

    @property
    def latent_scale(self):
        """Latents have unit variance after this factor."""
        return 0.13025 if self.is_xl else 0.18215

    @property
    def factor(self):
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae_widths) - 1)

    @property
    def text_layers_used(self):
        """SD 2.x skips the last of OpenCLIP's 24 layers. Files converted from diffusers have dropped it already: 23."""
        return self.text_layers - (self.open_clip and self.text_layers != 23)

    def heads(self, channels):
        return max(1, channels // 64) if self.linear_projection else 8


SD21 = Config()
SD15 = Config(context_width=768, linear_projection=False, open_clip=False, text_width=768, text_layers=12,
              text_projection=False)
SDXL = Config(unet_widths=(320, 640, 1280), transformer_depth=(0, 2, 10), context_width=2048, open_clip=False,
              text_width=768, text_layers=12, text_projection=False, pooled_width=1280, pooled_layers=32)
TINY = Config(unet_widths=(96, 64), unet_res_blocks=1, transformer_depth=(0, 1), context_width=32,
              linear_projection=False, vae_widths=(64, 64, 64), vae_res_blocks=1, text_width=32, text_layers=4)


# ------------------------------------------------------------------ blocks

def zero_(module):
    """Zero the parameters: the last layer of a residual branch starts at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t_dm, channels):
    """t_dm (B,), fractional or not -> (B, channels) in float32: cat[cos, sin] of t_dm * exp(-ln 1e4 * i / half)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t_dm.device) / half)
    angles = t_dm.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """x (B, C, h, w), embedded time (B, E) -> (B, C_out, h, w)."""

    def __init__(self, channels, out_channels, embedding):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels), nn.SiLU(), nn.Identity(),
            zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, embedding, context):
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


def attend(q, k, v):
    """q (B, heads, N, D), k, v (B, heads, L, D) -> softmax(q k^T / sqrt(D)) v, (B, heads, N, D)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 256:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v   # 3 to 5 times faster there
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

    def project(self, x, context):
        return self.to_q(x), self.to_k(context), self.to_v(context)

    def forward(self, x, context):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)              # (B, heads, N or L, C / heads)
                   for y in self.project(x, context))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(-2))


class GEGLU(nn.Module):
    """x (B, N, C) -> (B, N, hidden): value * gelu(gate)."""

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
    """x (B, N, C), context (B, L, D) -> (B, N, C): self-attention, cross-attention, feed-forward."""

    def __init__(self, channels, context_width, heads):
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, context_width, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(channels), nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x (B, C, h, w), context (B, L, D) -> (B, C, h, w)."""

    def __init__(self, channels, config, blocks):
        super().__init__()
        self.linear = config.linear_projection
        projection = nn.Linear if self.linear else functools.partial(nn.Conv2d, kernel_size=1)
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(channels, config.context_width, config.heads(channels)) for _ in range(blocks)])
        self.proj_out = zero_(projection(channels, channels))

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
    """x (B, C, h, w), t_dm (B,), context (B, L, D) -> (B, C_out, h, w). h and w divide by 2^(levels - 1). For SDXL the
    last row of context has the pooled text and the sizes of StableDiffusion.with_sizes.

    Set .checkpointing to recompute activations in the backward pass instead of keeping them.
    """

    def __init__(self, config):
        super().__init__()
        widths, width = config.unet_widths, config.unet_widths[0]
        embedding = 4 * width
        self.config, self.checkpointing = config, False
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if config.is_xl:
            self.label_emb = nn.Sequential(nn.Sequential(
                nn.Linear(config.pooled_width + 6 * 256, embedding), nn.SiLU(), nn.Linear(embedding, embedding)))

        def block(channels, out_channels, level, *more):
            blocks = config.transformer_depth[level]
            transformer = [SpatialTransformer(out_channels, config, blocks)] if blocks else []
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
            ResBlock(channels, channels, embedding),
            SpatialTransformer(channels, config, max(1, *config.transformer_depth)),
            ResBlock(channels, channels, embedding)])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.unet_res_blocks + 1):
                up = [Upsample(width)] if level > 0 and i == config.unet_res_blocks else []
                self.output_blocks.append(block(channels + skips.pop(), width, level, *up))
                channels = width
        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), zero_(nn.Conv2d(channels, config.out_channels, 3, padding=1)))

    def run(self, layers, x, embedding, context):
        """x through `layers` one after another; with .checkpointing, activations are recomputed in the backward
        pass."""
        for layer in layers:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, embedding, context, use_reentrant=False)
            else:
                x = layer(x, embedding, context)
        return x

    def embeddings_to(self, dtype):
        """Give the embeddings of time and sizes another dtype than the rest: small, and times must not be rounded."""
        for name, layer in self.named_children():
            if name in ("time_embed", "label_emb"):
                layer.to(dtype)

    def vector(self, x, row):
        """The row behind the text embedding (B, D) -> (B, pooled + 6 * 256): pooled text, and sinusoids of six sizes in
        pixels, which are (H, W, 0, 0, H, W) of the picture x where the row has none."""
        pooled, sizes = row[:, :self.config.pooled_width], row[:, self.config.pooled_width:][:, :12].float()
        height, width = (side * self.config.factor for side in x.shape[-2:])
        own = torch.zeros(6, device=x.device)
        own[0::4], own[1::4] = height, width
        sizes = 256 * sizes[:, :6] + sizes[:, 6:]
        sizes = torch.where(sizes[:, :1] > 0, sizes, own)
        return torch.cat([pooled, timestep_embedding(sizes.flatten(), 256).view(len(row), -1)], dim=-1)

    def forward(self, x, t_dm, context):
        factor = 2 ** (len(self.config.unet_widths) - 1)
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(f"latents of {x.shape[-2]}x{x.shape[-1]}: both sides must divide by {factor}")
        dtype = self.out[2].weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            embedding = timestep_embedding(t_dm, self.config.unet_widths[0]).to(self.time_embed[0].weight.dtype)
            embedding = self.time_embed(embedding)
            if self.config.is_xl:
                context, row = context[:, :TOKENS], context[:, TOKENS]
                embedding = embedding + self.label_emb(self.vector(x, row).to(embedding.dtype))
        h, embedding, context = self.input_blocks[0][0](x.to(dtype)), embedding.to(dtype), context.to(dtype)
        skips = [h]
        for layers in self.input_blocks[1:]:
            h = self.run(layers, h, embedding, context)
            skips.append(h)
        h = self.run(self.middle_block, h, embedding, context)
        for layers in self.output_blocks:
            h = self.run(layers, torch.cat([h, skips.pop()], dim=1), embedding, context)
        return self.out(h)


class DepthUNet(nn.Module):
    """Image to depth (Sec. 4.3): x_dm (B, z, h, w), t_dm (B,), the image's latents (B, z, h, w) -> (B, z, h, w).

    unet has 2 z input channels, the image's first, as in Marigold; text (1, L, D) is the embedding of the empty prompt.
    """

    def __init__(self, unet, text):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x_dm, t_dm, picture):
        return self.unet(torch.cat([picture, x_dm], dim=1), t_dm, self.text.expand(len(x_dm), -1, -1))


# ------------------------------------------------------------------ the autoencoder

class VAEResBlock(nn.Module):
    """x (B, C, h, w) -> (B, C_out, h, w)."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class VAEAttention(nn.Module):
    """x (B, C, h, w) -> (B, C, h, w): self-attention over all pixels, with one head."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
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
    """x (B, C, h, w) -> (B, C, h/2, w/2), padded on the right and at the bottom only."""

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
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
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
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
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
    """Images <-> latents, unscaled: StableDiffusion multiplies latents by config.latent_scale."""

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


# ------------------------------------------------------------------ the text encoders

def text_tower(width, layers, vocabulary, open_clip, projection):
    """open_clip's text transformer; downloads nothing."""
    from open_clip.transformer import QuickGELU, TextTransformer
    tower = TextTransformer(
        width=width, layers=layers, heads=max(1, width // 64), vocab_size=vocabulary,
        output_dim=width if projection else None, act_layer=nn.GELU if open_clip else QuickGELU)
    if width < 64:  # open_clip's initialisation is for wide towers; at 32 the words would hardly differ
        nn.init.normal_(tower.token_embedding.weight, std=0.5)
        nn.init.normal_(tower.positional_embedding, std=0.1)
    return tower


@functools.cache
def tokenizer():
    from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer()


def tokenize(prompts, pad_token):
    """prompts (B strings) -> token ids (B, 77): 49406, at most 75 tokens of content, 49407, pad_token."""
    ids = torch.full((len(prompts), TOKENS), pad_token)
    for row, prompt in zip(ids, prompts):
        content = tokenizer().encode(prompt[:5000])[:75]        # 75 tokens are shorter; long words take quadratic time
        tokens = [tokenizer().sot_token_id, *content, tokenizer().eot_token_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids


def run_tower(tower, ids, layers):
    """Token ids (B, 77) through the first layers of a text encoder -> (B, 77, width), before the final norm."""
    x = tower.token_embedding(ids) + tower.positional_embedding
    for block in tower.transformer.resblocks[:layers]:
        x = block(x, attn_mask=tower.attn_mask)
    return x


# ------------------------------------------------------------------ the whole model

class StableDiffusion(nn.Module):
    """UNet, autoencoder and text encoders, under the checkpoint's module names. prediction is "v" or "eps".

    metadata (str -> str) and source come from the file that support/checkpoint.py read it from.
    """

    def __init__(self, config, prediction):
        super().__init__()
        self.config, self.prediction, self.zero_snr = config, prediction, False
        self.metadata, self.source = {}, None
        self.model = nn.ModuleDict({"diffusion_model": UNet(config)})
        self.first_stage_model = AutoencoderKL(config)
        tower = text_tower(config.text_width, config.text_layers, config.vocabulary, config.open_clip,
                           config.text_projection)
        stage = nn.ModuleDict(
            {"model": tower} if config.open_clip else {"transformer": nn.ModuleDict({"text_model": tower})})
        if config.is_xl:
            tower = text_tower(config.pooled_width, config.pooled_layers, config.vocabulary, open_clip=True,
                               projection=True)
            self.conditioner = nn.ModuleDict({"embedders": nn.ModuleList([stage, nn.ModuleDict({"model": tower})])})
        else:
            self.cond_stage_model = stage

    @property
    def unet(self):
        return self.model["diffusion_model"]

    @property
    def text_encoders(self):
        """[the text encoder], or SDXL's two."""
        stages = self.conditioner["embedders"] if self.config.is_xl else [self.cond_stage_model]
        return [stage["model"] if "model" in stage else stage["transformer"]["text_model"] for stage in stages]

    @property
    def device(self):
        return self.unet.out[2].weight.device

    @property
    def is_depth_model(self):
        """Whether the UNet takes an image's latents beside the noisy ones."""
        return self.config.in_channels == 2 * self.config.latent_channels

    @property
    def factor(self):
        return self.config.factor

    @property
    def multiple(self):
        """Image height and width must be multiples of this many pixels: autoencoder and UNet halve them repeatedly."""
        return self.factor * 2 ** (len(self.config.unet_widths) - 1)

    def latent_shape(self, size):
        """[height, width] of an image in pixels -> (z, h, w) of its latents."""
        return self.config.latent_channels, size[0] // self.factor, size[1] // self.factor

    @torch.no_grad()
    def add_image_input(self):
        """Let the UNet take an image's latents beside the noisy ones (Sec. 4.3). The first conv's weights are
        duplicated and halved, so that nothing changes where both inputs agree. Does nothing to a depth model."""
        if self.is_depth_model:
            return
        conv, z = self.unet.input_blocks[0][0], self.config.latent_channels
        doubled = nn.Conv2d(2 * z, conv.out_channels, 3, padding=1).to(conv.weight).requires_grad_(False)
        doubled.weight.copy_(torch.cat([conv.weight, conv.weight], dim=1) / 2)
        doubled.bias.copy_(conv.bias)
        self.unet.input_blocks[0][0] = doubled
        self.config = self.unet.config = replace(self.config, in_channels=2 * z)

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> scaled latents (B, z, H/f, W/f): the posterior's mean."""
        mean, _ = self.first_stage_model.moments(images.to(self.first_stage_model.quant_conv.weight))
        return mean * self.config.latent_scale

    def decode(self, latents):
        """scaled latents (B, z, h, w) -> images (B, 3, f h, f w), near [-1, 1], not clamped."""
        latents = latents.to(self.first_stage_model.quant_conv.weight)
        return self.first_stage_model.decode(latents / self.config.latent_scale)

    def encode_text(self, prompts):
        """prompts (B strings) -> context (B, 77, D): the text embedding. SDXL: (B, 78, D), the states of both text
        encoders before their last layer side by side, and a row that begins with the pooled text, then is zero."""
        tower, *second = self.text_encoders
        ids = tokenize(prompts, pad_token=0 if self.config.open_clip else 49407).to(self.device, non_blocking=True)
        if not second:
            return tower.ln_final(run_tower(tower, ids, self.config.text_layers_used))
        states = run_tower(tower, ids, self.config.text_layers - 1)
        tower, = second
        ids = tokenize(prompts, pad_token=0).to(self.device, non_blocking=True)
        before = run_tower(tower, ids, self.config.pooled_layers - 1)
        last = tower.ln_final(tower.transformer.resblocks[-1](before, attn_mask=tower.attn_mask))
        end = ids.argmax(-1)                                                      # the end token is the largest
        pooled = last[torch.arange(len(ids), device=ids.device), end] @ tower.text_projection
        context = torch.cat([states, before], dim=-1)
        return torch.cat([context, F.pad(pooled, (0, context.shape[-1] - pooled.shape[-1]))[:, None]], dim=1)

    def with_sizes(self, context, sizes):
        """context of encode_text, sizes (B, 6) in pixels -> context that tells SDXL of them: height and width of the
        picture before its crop, the crop's top and left, height and width after it. Others do not take sizes.

        A size takes two places, its multiples of 256 and the rest, so that bf16 holds it exactly. Without sizes the
        UNet takes those of an uncropped picture.
        """
        if not self.config.is_xl:
            return context
        context, first = context.clone(), self.config.pooled_width
        context[:, TOKENS, first:first + 12] = torch.cat([sizes // 256, sizes % 256], dim=-1).to(context)
        return context
