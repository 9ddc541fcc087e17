"""LoRA files in kohya's naming, which ComfyUI, diffusers, A1111 and OneTrainer read.

A key is `lora_unet_`, the layer's path in diffusers with `_` for `.`, then `.lora_down.weight` or `.lora_up.weight`.
Files are written without `.alpha`, so every reader's scale is 1.
"""
import re
from pathlib import Path

import torch
from torch import nn

import lora
from support.files import open_tensors, save_tensors
from support.names import unet_path

BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of the text embedding
DIFFUSERS = ("diffusers merges it: pipe.load_lora_weights(FILE), pipe.fuse_lora(), pipe.unload_lora_weights(), "
             "pipe.save_pretrained(FOLDER); then pass FOLDER as --ckpt")
COMFYUI = "ComfyUI merges it: its nodes Load LoRA and Save Checkpoint; then pass the saved file as --ckpt"
FOREIGN = [  # (pattern of a key, kind of adapter, tool that merges it)
    (r"^lora_te|^text_encoder", "a LoRA that includes the text encoder", COMFYUI),
    (r"dora_scale|lora_magnitude_vector", "a DoRA", COMFYUI),
    (r"\.hada_", "a LoHa", COMFYUI),
    (r"\.lokr_", "a LoKr", COMFYUI),
    (r"\.lora_mid\.", "a LoRA with a third matrix, lora_mid", COMFYUI),
    (r"^lora_unet_(input_blocks|middle_block|output_blocks)_", "a LoRA with CompVis' names of the layers", COMFYUI),
    (r"\.lora_[AB]\.", "a LoRA with PEFT's names", DIFFUSERS),
    (r"[._]lora\.(down|up)\.|\.processor\.", "a LoRA with the names of older diffusers", DIFFUSERS),
]


def kohya_names(unet, paths):
    """{path: its name in a file}, such as input_blocks.4.1.proj_in: lora_unet_down_blocks_1_attentions_0_proj_in."""
    return {path: "lora_unet_" + unet_path(path, unet.config).replace(".", "_") for path in paths}


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
    """-> the tensors of a LoRA file with kohya's keys. ValueError for another kind of file, with a way to convert
    it."""
    if Path(path).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path}: a pickle; convert it to .safetensors: python -c 'import torch, "
                         f"safetensors.torch; safetensors.torch.save_file(torch.load(\"{path}\", weights_only=True), "
                         f"\"{path}.safetensors\")'")
    with open_tensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    for key, tensor in tensors.items():
        is_matrix = tensor.ndim >= 2 and tensor.numel() and tensor.is_floating_point()
        if key.endswith((".lora_down.weight", ".lora_up.weight")) and not is_matrix:
            raise ValueError(f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, not a floating-point matrix: a "
                             "damaged file")
        if key.endswith(".alpha") and (tensor.numel() != 1 or tensor.is_complex()):
            raise ValueError(f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, not a number: a damaged file")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{path}: {key} has NaN or infinity: its training failed")
        if key.endswith("attn2_to_k.lora_down.weight") and BASES.get(tensor.shape[1]) == "SDXL":
            raise ValueError(f"{path}: made for another base (SDXL)")
    for pattern, kind, way_out in FOREIGN:
        if any(re.search(pattern, key) for key in tensors):
            raise ValueError(f"{path}: {kind}, which is not supported; {way_out}")
    return tensors


def as_matrix(tensor, linear):
    """kohya's LoRAs of SD 2.x store Linears as 1x1 convs: (r, in, 1, 1) -> (r, in) if `linear`, else the other way."""
    if linear and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor if linear or tensor.ndim == 4 else tensor[:, :, None, None]


@torch.no_grad()
def load_lora(path, unet):
    """Add the adapters of the LoRA file at `path` to `unet` -> the file's metadata. `.alpha` / rank is folded into up.

    ValueError: not a LoRA, of another kind, incomplete, for another base; or `unet` has adapters already.
    """
    layers, loras, tensors = lora.plain_layers(unet), {}, read_tensors(path)
    contexts = [tensor.shape[-1] for key, tensor in tensors.items() if key.endswith("attn2_to_k.lora_down.weight")]
    base = BASES.get(max(contexts, default=0), "unknown")
    for layer, name in kohya_names(unet, layers).items():
        sides = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
        if not tensors.keys() >= set(sides):
            continue
        linear = isinstance(layers[layer], nn.Linear)
        down, up = (as_matrix(tensors.pop(side), linear) for side in sides)
        loras[layer] = adapter = lora.LoRA(layers[layer], rank := len(down))
        if (down.shape, up.shape) != (adapter.down.shape, adapter.up.shape):
            raise ValueError(f"{path}: made for another base ({base}): {name} adapts {[len(up), *down.shape[1:]]}, "
                             f"this model's layer is {list(adapter.weight.shape)}")
        adapter.down.copy_(down)
        adapter.up.copy_(up.float() * (float(tensors.pop(f"{name}.alpha", rank)) / rank))
    if tensors or not loras:
        raise ValueError(f"{path}: made for another base ({base}), incomplete, or not a LoRA with kohya's keys: "
                         f"{len(tensors)} unknown keys, first {min(tensors, default='')!r}")
    lora.attach(unet, loras)
    return read_metadata(path)
