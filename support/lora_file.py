"""LoRA files. Ours have kohya's names, which ComfyUI, diffusers, A1111 and OneTrainer read.

A key is `lora_unet_`, the layer's path with `_` for `.`, then `.lora_down.weight` or `.lora_up.weight`. The path is
that in diffusers; for SDXL that in the checkpoint, the only one that all these tools read. Both are read.
Files are written without `.alpha`, so every reader's scale is 1. The names that PEFT and diffusers write are read too,
and adapters of the text encoder, which are merged but not trained.
"""
import json
import math
import re
import sys
from pathlib import Path

import torch

import lora
from support.checkpoint import is_finite
from support.files import from_json, open_tensors, read_text, reading, save_tensors
from support.names import hf_names, unet_path

BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of the text embedding
COMFYUI = "ComfyUI merges it: its nodes Load LoRA and Save Checkpoint; then pass the saved file as --ckpt"
FOREIGN = [  # (pattern of a key, kind of adapter)
    (r"dora_scale|lora_magnitude_vector", "a DoRA"),
    (r"\.hada_", "a LoHa"),
    (r"\.lokr_", "a LoKr"),
    (r"\.lora_mid\.", "a LoRA with a third matrix, lora_mid"),
    (r"\.diff(_b)?$", "a file with whole differences of weights (.diff)"),
    (r"^lycoris_", "a LyCORIS network"),
]
KEY = re.compile(  # kohya's, PEFT's and diffusers' names of a layer's matrices, and of its alpha
    r"(base_model\.model\.)?(lora_unet_|unet\.|diffusion_model\.|lora_te1?_|text_encoder\.|"
    r"(?P<second>lora_te2_|text_encoder_2\.))?(text_model[._])?(?P<layer>.+?)"
    r"([._]lora(_linear_layer)?[._](?P<side>down|up|A|B)(\.default)?\.weight|([._]lora)?\.(?P<alpha>alpha))")
OLD_NAMES = [  # of diffusers until 0.21: attn1.processor.to_out_lora.down.weight, self_attn.to_q_lora.down.weight
    (r"\.processor\.", "."), (r"attn\.to_([qkv])$", r"attn.\1_proj"), (r"attn\.to_out$", "attn.out_proj"),
    (r"to_out$", "to_out.0")]


# ------------------------------------------------------------------ names

def kohya_names(unet, paths):
    """{path: its name in a file}, such as input_blocks.4.1.proj_in: lora_unet_down_blocks_1_attentions_0_proj_in, for
    SDXL lora_unet_input_blocks_4_1_proj_in."""
    names = {path: path if unet.config.is_xl else unet_path(path, unet.config) for path in paths}
    return {path: "lora_unet_" + name.replace(".", "_") for path, name in names.items()}


def unet_names(unet, paths):
    """-> {a layer's name in files, with _ for each dot: its path}. Names are diffusers' or, in some files, CompVis'."""
    return {name.replace(".", "_"): path for path in paths for name in (unet_path(path, unet.config), path)}


def text_weights(sd):
    """-> {a layer's name in files, with _ for each dot: its weight}. That of q, k and v is a third of one matrix. Names
    in SDXL's second text encoder begin with second_."""
    weights = {}
    for prefix, tower in zip(("", "second_"), sd.text_encoders):
        for parameter, value in tower.named_parameters():
            if value.ndim == 2 and ".resblocks." in parameter:
                names = [prefix + name.removesuffix(".weight").replace(".", "_") for name in hf_names(parameter)]
                weights |= zip(names, value.chunk(len(names)))
    return weights


def split_key(key):
    """unet.conv_in.lora_A.weight, lora_unet_conv_in.lora_down.weight -> ("conv_in", "down"); also "up" and "alpha". ""
    for the layer if the key is not of an adapter."""
    if (match := KEY.fullmatch(key)) is None:
        return "", ""
    layer = match["layer"]
    for old, new in OLD_NAMES:
        layer = re.sub(old, new, layer)
    layer = ("second_" if match["second"] else "") + layer
    return layer.replace(".", "_"), match["alpha"] or {"A": "down", "B": "up"}.get(match["side"], match["side"])


# ------------------------------------------------------------------ files

def save_lora(unet, path, metadata):
    """Write the adapters and `metadata` (str -> str) to the file `path`, atomically."""
    loras = lora.adapters(unet)
    assert loras, "nothing to save"
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", **metadata}  # ranks differ by layer
    save_tensors(path, {f"{name}.lora_{side}.weight": getattr(loras[layer], side).data.cpu()
                        for layer, name in kohya_names(unet, loras).items() for side in ("down", "up")}, metadata)


def is_lora_file(path):
    """Whether a .safetensors file has kohya's keys."""
    with open_tensors(path) as file:
        return any(key.startswith("lora_") for key in file.keys())


def read_metadata(path):
    """-> the metadata of a .safetensors file (str -> str)."""
    with open_tensors(path) as file:
        return {name: value for name, value in (file.metadata() or {}).items() if name != "format"}


def read_tensors(path):
    """-> the tensors of a LoRA file. ValueError for another kind of file, with a way to convert it."""
    if Path(path).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path}: a pickle; convert it to .safetensors: python -c 'import torch, "
                         f"safetensors.torch; safetensors.torch.save_file(torch.load(\"{path}\", weights_only=True), "
                         f"\"{path}.safetensors\")'")
    with open_tensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    for pattern, kind in FOREIGN:
        if any(re.search(pattern, key) for key in tensors):
            raise ValueError(f"{path}: {kind}, which is not supported; {COMFYUI}")
    for key, tensor in tensors.items():
        layer, side = split_key(key)
        is_matrix = tensor.ndim >= 2 and tensor.numel() and tensor.is_floating_point()
        if side in ("down", "up") and not is_matrix:
            raise ValueError(f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, not a floating-point matrix: a "
                             "damaged file")
        if side == "alpha" and (tensor.numel() != 1 or tensor.is_complex()):
            raise ValueError(f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, not a number: a damaged file")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{path}: {key} has NaN or infinity: its training failed")
    return tensors


def adapts_text(path):
    """Whether a LoRA file has adapters of the text encoder."""
    return any(network_of(split_key(key)[0]) != "unet." for key in read_tensors(path))


def network_of(layer):
    """-> the prefix of a layer's network in PEFT's and diffusers' settings."""
    return {"encoder": "text_encoder.", "second": "text_encoder_2."}.get(layer.split("_")[0], "unet.")


class Scale:
    """The factor of a layer's up @ down: alpha / rank. Alpha is a tensor in kohya's files. PEFT's have it in
    adapter_config.json beside the file, those of diffusers in their metadata; without any, the factor is 1."""

    def __init__(self, path, tensors):
        self.settings, of_peft = {}, any(key.startswith("base_model.model.") for key in tensors)
        config, written = Path(path).with_name("adapter_config.json"), read_metadata(path).get("lora_adapter_metadata")
        if of_peft and config.is_file():
            with reading(config, "the settings of a LoRA as PEFT writes them"):
                self.settings = dict(from_json(read_text(config)))
        elif of_peft:
            print(f"warning: {path}: {config.name} is not beside it, so its alpha is taken to be its rank",
                  file=sys.stderr)
        elif written:
            self.settings = dict(json.loads(written))

    def of(self, layer, network, rank, alpha):
        """The factor of a layer. network: as network_of; alpha: of kohya's files, or None."""
        def setting(name, default=None):
            return self.settings.get(name, self.settings.get(network + name, default))

        if alpha is None:
            alpha = setting("lora_alpha", rank)
            for name, value in (setting("alpha_pattern") or {}).items():
                if f"_{layer}".endswith("_" + name.lstrip("^").replace(".", "_")):
                    alpha = value
        factor = float(alpha) / (math.sqrt(rank) if setting("use_rslora") else rank)
        if not math.isfinite(factor):
            raise ValueError(f"the alpha of {layer} is not a finite number")
        return factor


def as_matrix(tensor, linear):
    """Linears are stored as 1x1 convs in kohya's LoRAs of SD 2.x: (r, in, 1, 1) -> (r, in) if `linear`, else the other
    way."""
    if linear and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor if linear or tensor.ndim == 4 else tensor[:, :, None, None]


def read_adapters(path, weights):
    """-> {layer: (down, up)} of a LoRA file, in float32, with the layer's factor in `up`. weights: {layer: its weight}.

    ValueError: not a LoRA, of another kind, incomplete, or for another base.
    """
    with reading(path, "a LoRA"):
        tensors, metadata, adapters = read_tensors(path), read_metadata(path), {}
        scale, parts = Scale(path, tensors), {}
        for key, tensor in tensors.items():
            layer, side = split_key(key)
            parts.setdefault(layer, {})[side] = tensor
        contexts = [part["down"].shape[1] for layer, part in parts.items()
                    if layer.endswith("attn2_to_k") and "down" in part]
        base = "SDXL" if any(layer.startswith("second_") for layer in parts) else "unknown"
        base = BASES.get(max(contexts, default=0), base)
        is_old = metadata.get("task") == "depth" and metadata.get("image_input") != "first"
        for layer, weight in weights.items():
            part = parts.get(layer, {})
            if not part.keys() >= {"down", "up"}:
                continue
            down, up = (as_matrix(part[side].float(), weight.ndim == 2) for side in ("down", "up"))
            if (len(up), *down.shape[1:]) != weight.shape or up.shape[1:] != (len(down), *[1] * (weight.ndim - 2)):
                raise ValueError(f"{path}: made for another base ({base}): {layer} adapts "
                                 f"{[len(up), *down.shape[1:]]}, this model's layer is {list(weight.shape)}")
            if is_old and layer == "conv_in":       # the noisy latents came first
                down = down.roll(down.shape[1] // 2, 1)
            adapters[layer] = down, up * scale.of(layer, network_of(layer), len(down), part.get("alpha"))
        unknown = [key for key in tensors if split_key(key)[0] not in adapters]
        if unknown or not adapters:
            raise ValueError(f"{path}: made for another base ({base}), incomplete, or not a LoRA: {len(unknown)} "
                             f"unknown keys, first {min(unknown, default='')!r}")
        return adapters


# ------------------------------------------------------------------ into a model

@torch.no_grad()
def load_lora(path, unet):
    """Add the adapters of the LoRA file at `path` to `unet`, to train them further -> the file's metadata.

    ValueError: not a LoRA that fits, or with adapters of the text encoder; or `unet` has adapters already.
    """
    layers = lora.plain_layers(unet)
    names, loras = unet_names(unet, layers), {}
    if adapts_text(path):
        raise ValueError(f"{path}: it adapts the text encoder too, which is not trained here. Merge it first: python "
                         f"-m tools.merge {path} --ckpt BASE --out merged.safetensors; then --ckpt merged.safetensors")
    for name, (down, up) in read_adapters(path, {name: layers[names[name]].weight for name in names}).items():
        layer = layers[names[name]]
        loras[names[name]] = adapter = lora.LoRA(layer, len(down))
        adapter.down.copy_(down)
        adapter.up.copy_(up)
    lora.attach(unet, loras)
    return read_metadata(path)


def merge_lora(path, sd, strength=1.0):
    """Add the LoRA file at `path`, times `strength`, to the weights of a StableDiffusion: its UNet, and its text
    encoder if the file adapts that. ValueError: not a LoRA that fits, or its numbers are too large."""
    layers = {path: layer.weight for path, layer in lora.plain_layers(sd.unet).items()}
    weights = {name: layers[path] for name, path in unet_names(sd.unet, layers).items()} | text_weights(sd)
    for name, (down, up) in read_adapters(path, weights).items():
        lora.merge(weights[name], down, up, strength)
        if not is_finite(weights[name]):
            raise ValueError(f"{path}: its numbers are too large: {name} becomes infinite")
