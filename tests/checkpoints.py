"""Shared by the tests of networks and files: random checkpoints in the real layouts, and independent implementations.

sd15.json.gz, sd21.json.gz and sdxl.json.gz hold every tensor's name, shape and dtype in v1-5-pruned-emaonly,
v2-1_768-ema-pruned and sd_xl_base_1.0.
"""
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from model import SD15, SD21, SDXL

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
XL_CLIP = "conditioner.embedders.0.", "conditioner.embedders.1."
CONFIGS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
NARROW = {name: replace(CONFIGS[name], unet_widths=(32, 64, 128, 128), vae_widths=(32, 64, 128, 128), context_width=128,
                        text_width=128) for name in ("sd15", "sd21")}
NARROW["sdxl"] = replace(SDXL, unet_widths=(32, 64, 128), vae_widths=(32, 64, 128, 128), context_width=256,
                         text_width=128, pooled_width=128)
PROMPTS = [
    "", "a cat", "stop! now!!", "a red ball above a black box, " * 20, "x" * 200, "1234567890" * 9,  # over 75 tokens
    "naïve café — 東京 in 日本, Ünïcödé e\u0301 Ζεύς Пушкин 한국어 שלום مرحبا STRASSE ß İstanbul ½ ²", "a 🦊 and a 🐻",
    "It's 3 o'clock (isn't it?) #1; a.b,c: 'x' [y] {z}/w\\ $5 100% ~ a_b-c--d... \"q\" we'll I'd they've DON'T",
    "  two   spaces\tand\na line\u00a0break  ", " \n"]


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(ours, theirs):
    """|ours - theirs| / |theirs|."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def same(ours, theirs):
    """Whether two {name: tensor} are equal, bit for bit."""
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)


# ------------------------------------------------------------------ checkpoints

def manifest(name):
    """"sd15", "sd21" or "sdxl" -> {key: (shape, dtype)} of the real file."""
    with gzip.open(Path(__file__).parent / f"{name}.json.gz") as file:
        return {key: (tuple(shape), getattr(torch, dtype)) for key, (shape, dtype) in json.load(file).items()}


def narrow(key, shape):
    """A real tensor's shape -> in the narrow model: the UNet has a tenth of the width, the autoencoder a quarter;
    context and text encoders have a width of 128, SDXL's context 256."""
    if key.startswith(UNET):
        widths = {768: 128, 1024: 128, 2048: 256, 2816: 128 + 6 * 256}
        return tuple(widths.get(n, n // 10 if n % 320 == 0 else n) for n in shape)
    if key.startswith(VAE):
        return tuple(n // 4 if n >= 128 else n for n in shape)
    if key.startswith(TEXT):
        ratio = 8 if key.startswith(TEXT + "model.") else 6
        return tuple(n // ratio if n >= 768 and n != 49408 else n for n in shape)
    if key.startswith(XL_CLIP):
        ratio = 6 if key.startswith(XL_CLIP[0]) else 10
        return tuple(n // ratio if n >= 768 and n != 49408 else n for n in shape)
    return shape


def random_tensor(key, shape, dtype):
    """A random tensor without zeros, scaled so that activations stay near 1."""
    if key.endswith("position_ids"):
        return torch.arange(77)[None]
    if not dtype.is_floating_point:
        return torch.full(shape, 875000, dtype=dtype)
    noise = torch.randn(shape)
    noise += noise == 0
    if len(shape) > 1:
        return noise * (0.5 if "embedding" in key else math.prod(shape[1:]) ** -0.5)
    return 0.2 * noise + (1 if key.endswith("weight") else 0)


def random_checkpoint(name):
    """-> {key: tensor} of a narrow model with all the names of the real file."""
    torch.manual_seed(0)
    return {key: random_tensor(key, narrow(key, shape), dtype) for key, (shape, dtype) in manifest(name).items()}


def hollow_checkpoint(name):
    """-> {key: tensor} in the real, full-size shapes, each expanded from one number: a .ckpt of a few hundred
    kilobytes."""
    return {key: torch.ones((), dtype=dtype).expand(shape) for key, (shape, dtype) in manifest(name).items()}


# ------------------------------------------------------------------ independent implementations

def diffusers_unet(config):
    """-> diffusers' UNet of the same architecture. Its `attention_head_dim` is the number of heads."""
    from diffusers import UNet2DConditionModel
    blocks = ["CrossAttn" * (depth > 0) for depth in config.transformer_depth]
    xl = dict(addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=(
        config.pooled_width + 6 * 256)) if config.is_xl else {}
    heads = [max(1, width // 64) if config.linear_projection else 8 for width in config.unet_widths]
    return UNet2DConditionModel(
        down_block_types=[f"{block}DownBlock2D" for block in blocks], block_out_channels=config.unet_widths,
        up_block_types=[f"{block}UpBlock2D" for block in blocks[::-1]], layers_per_block=config.unet_res_blocks,
        cross_attention_dim=config.context_width, use_linear_projection=config.linear_projection,
        attention_head_dim=heads, transformer_layers_per_block=[max(1, depth) for depth in config.transformer_depth],
        **xl)


def diffusers_condition(config, context, latents):
    """context of encode_text -> the same as keyword arguments of diffusers' UNet, for latents (B, z, h, w)."""
    if not config.is_xl:
        return {"encoder_hidden_states": context}
    height, width = (side * config.factor for side in latents.shape[-2:])
    return {"encoder_hidden_states": context[:, :77], "added_cond_kwargs": {
        "text_embeds": context[:, 77, :config.pooled_width],
        "time_ids": torch.tensor([[height, width, 0, 0, height, width]] * len(latents), device=latents.device)}}


def diffusers_copy(unet, config):
    """-> diffusers' UNet with our weights, converted by diffusers' own code for single files."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    copy = diffusers_unet(config)
    state = {UNET + name: value for name, value in unet.state_dict().items()}
    copy.load_state_dict(convert_ldm_unet_checkpoint(state, dict(copy.config)))
    return copy.requires_grad_(False).eval()


def diffusers_pipeline(unet):
    """-> the pipeline that users call load_lora_weights on, with this UNet alone."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
    return StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=EulerDiscreteScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def references(config, tensors):
    """-> diffusers' UNet and autoencoder and transformers' text model (SDXL: .text and .text_2), with weights converted
    by diffusers' own code."""
    from diffusers import AutoencoderKL
    from diffusers.loaders import single_file_utils as convert
    from transformers import CLIPTextConfig, CLIPTextModel
    unet = diffusers_unet(config)
    unet.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config)))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        latent_channels=4, block_out_channels=config.vae_widths)
    vae.load_state_dict(convert.convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config)))
    if config.is_xl:
        return xl_references(config, tensors, unet, vae)
    v2 = config.open_clip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=config.text_width, intermediate_size=4 * config.text_width,
        max_position_embeddings=77, num_hidden_layers=23 if v2 else 12, num_attention_heads=config.text_width // 64,
        hidden_act="gelu" if v2 else "quick_gelu"))
    converted = (convert.convert_open_clip_checkpoint(text, tensors) if v2 else
                 convert.convert_ldm_clip_checkpoint(tensors))
    converted = {key.removeprefix("text_model."): value for key, value in converted.items()}
    if v2:  # diffusers skips the unused last layer only in full-size models
        converted = {key: value for key, value in converted.items()
                     if ".23." not in key and "text_projection" not in key}
    converted.pop("embeddings.position_ids", None)
    text.load_state_dict(converted)
    for module in (unet, vae, text):
        module.requires_grad_(False).eval()
    return SimpleNamespace(unet=unet, vae=vae, text=text)


def xl_references(config, tensors, unet, vae):
    from diffusers.loaders import single_file_utils as convert
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def settings(width, layers, activation):
        return CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, max_position_embeddings=77,
            num_hidden_layers=layers, num_attention_heads=width // 64, hidden_act=activation, projection_dim=width,
            eos_token_id=2)                                     # as in SDXL's folders, which means the largest id
    text = CLIPTextModel(settings(config.text_width, config.text_layers, "quick_gelu"))
    text_2 = CLIPTextModelWithProjection(settings(config.pooled_width, config.pooled_layers, "gelu"))
    first = {key.removeprefix(XL_CLIP[0] + "transformer.text_model."): value for key, value in tensors.items()
             if key.startswith(XL_CLIP[0]) and "position_ids" not in key}
    text.load_state_dict(first)
    text_2.load_state_dict(convert.convert_open_clip_checkpoint(text_2, tensors, prefix=XL_CLIP[1] + "model."))
    for module in (unet, vae, text, text_2):
        module.requires_grad_(False).eval()
    return SimpleNamespace(unet=unet, vae=vae, text=text, text_2=text_2)


def clip_ids(prompts, pad_token):
    """prompts (B strings) -> token ids (B, 77), by transformers' CLIP tokenizer."""
    ids = clip_tokenizer()(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    ended = (ids == 49407).cumsum(1) - (ids == 49407).int() > 0  # positions after the first end token
    return ids.masked_fill(ended, pad_token)


def clip_tokenizer(pad_token=49407):
    """-> transformers' CLIP tokenizer, built from the vocabulary that open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer
    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in own.encoder.items()}
    pad = next(token for token, i in vocabulary.items() if i == pad_token)
    return CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks), pad_token=pad, model_max_length=77)


def full_pipeline(config, tensors, prediction="eps"):
    """-> diffusers' StableDiffusion(XL)Pipeline of a checkpoint's tensors, with the scheduler settings of the real
    ones."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    theirs = references(config, tensors)
    theirs.unet.register_to_config(sample_size=8)
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       steps_offset=1, prediction_type=kind)
    if config.is_xl:
        theirs.vae.register_to_config(scaling_factor=0.13025, force_upcast=False)
        return StableDiffusionXLPipeline(
            vae=theirs.vae, text_encoder=theirs.text, text_encoder_2=theirs.text_2, unet=theirs.unet,
            tokenizer=clip_tokenizer(49407), tokenizer_2=clip_tokenizer(0), scheduler=scheduler,
            add_watermarker=False)
    return StableDiffusionPipeline(
        vae=theirs.vae, text_encoder=theirs.text, unet=theirs.unet,
        tokenizer=clip_tokenizer(0 if config.open_clip else 49407), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
