"""LoRA by hand for nn.Linear and nn.Conv2d: y = base(x) + up(down(x)), in files that other tools read.

The paper's presets (Appendix A), with the number of parameters they train on the SD 2.1 shapes:
    base   207,458,688   every Conv2d (shortcuts and resampling too), attention q, k, v; rank ceil(0.2 max(in, out))
    small   64,707,072   every Conv2d, attention q, k, v, out, feed-forward, proj_in and proj_out; rank 64
An int is `small` with that rank. The first and the last conv are trained in full, as a LoRA of their own full rank
whose smaller side is a fixed identity. Unlike in the paper their biases stay frozen: a LoRA file has no place for one.

A file has kohya's keys: `lora_unet_`, the layer's path in diffusers with `_` for `.`, then `.lora_down.weight` or
`.lora_up.weight`. It has no `.alpha`, so every reader's scale is 1.
"""
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from model import TINY_PRIOR

PRESETS = {  # name -> (how the adapted Linears' paths end; the rank, or its ratio to max(in, out))
    "base": (("to_q", "to_k", "to_v"), 0.2),
    "small": (("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"), 64),
}
OUTER = {"input_blocks.0.0": "conv_in", "out.2": "conv_out",  # the checkpoint's path -> diffusers'
         "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
INNER = {"in_layers.2": "resnets.{}.conv1", "emb_layers.1": "resnets.{}.time_emb_proj", "op": "downsamplers.0.conv",
         "out_layers.3": "resnets.{}.conv2", "skip_connection": "resnets.{}.conv_shortcut", "conv": "upsamplers.0.conv"}
BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of the context


class LoRA(nn.Module):
    """A frozen layer and its adapter, which adds nothing at the start.

    Linear: down (r, in), up (out, r). Conv2d: down (r, in, kh, kw), with the layer's stride and padding, and
    up (out, r, 1, 1). Float32, cast to the input's dtype on use. At full rank the smaller side is a fixed identity.
    """

    def __init__(self, base, rank):
        super().__init__()
        self.base, weight = base, base.weight
        self.down = nn.Parameter(torch.zeros(rank, *weight.shape[1:], device=weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, *[1] * (weight.ndim - 2), device=weight.device))
        if rank == full_rank(base):
            smaller = self.up if rank == len(weight) else self.down
            smaller.requires_grad_(False).flatten(1).fill_diagonal_(1)
        else:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    weight = property(lambda self: self.base.weight)  # callers ask a layer for its dtype and device

    def forward(self, x):
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(self.base, nn.Linear):
            return self.base(x) + F.linear(F.linear(x, down), up)
        return self.base(x) + F.conv2d(F.conv2d(x, down, None, self.base.stride, self.base.padding), up)


def full_rank(layer):
    """Of its weight as a matrix, (out, in*kh*kw)."""
    return min(len(layer.weight), layer.weight[0].numel())


def adapters(unet):
    """{path: LoRA} of the adapters in `unet`; empty while they are merged."""
    return {path: module for path, module in unet.named_modules() if isinstance(module, LoRA)}


def plain_layers(unet):
    """{path: layer} of every Linear and Conv2d. ValueError if `unet` has adapters, merged or not."""
    if adapters(unet) or hasattr(unet, "merged"):
        raise ValueError("this UNet has a LoRA already; start from its plain checkpoint")
    return {path: module for path, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def attach(unet, loras):
    """Freeze `unet` and put each of {path: LoRA} in its layer's place -> list of the trainable parameters."""
    unet.requires_grad_(False)
    for path, lora in loras.items():
        unet.set_submodule(path, lora)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def inject(unet, preset):
    """Adapt `unet` by `preset` ("base", "small" or a rank) and freeze the rest -> list of the trainable parameters.

    A rank is capped at its layer's full rank. ValueError: no such preset, or `unet` is adapted already.
    """
    if preset not in PRESETS and not (isinstance(preset, int) and preset > 0):
        raise ValueError(f"a LoRA is {', '.join(PRESETS)} or a rank of at least 1, not {preset!r}")
    ends, size = PRESETS[preset] if preset in PRESETS else (PRESETS["small"][0], preset)
    loras = {}
    for path, layer in plain_layers(unet).items():
        rank = size if size >= 1 else math.ceil(size * max(layer.weight.shape[:2]))
        if path in ("input_blocks.0.0", "out.2"):
            loras[path] = LoRA(layer, full_rank(layer))
        elif isinstance(layer, nn.Conv2d) or path.endswith(ends):
            loras[path] = LoRA(layer, min(rank, full_rank(layer)))
    return attach(unet, loras)


@torch.no_grad()
def merge(unet):
    """Fold the adapters into the weights: until `unmerge`, modules and names are the plain UNet's."""
    assert adapters(unet), "nothing to merge"
    unet.merged = {path: (lora, lora.weight.data) for path, lora in adapters(unet).items()}
    for path, (lora, weight) in unet.merged.items():
        change = (lora.up.flatten(1) @ lora.down.flatten(1)).view_as(weight)
        lora.weight.data = (weight + change).to(weight.dtype)
        unet.set_submodule(path, lora.base)


def unmerge(unet):
    """Undo `merge`, bit for bit."""
    for path, (lora, weight) in unet.merged.items():
        lora.weight.data = weight
        unet.set_submodule(path, lora)
    del unet.merged


def kohya_names(unet, paths):
    """{path: its name in a file}, as input_blocks.4.1.proj_in: lora_unet_down_blocks_1_attentions_0_proj_in.

    A level's input blocks end with its downsampler, so the first downsampler's place is their number a level.
    """
    downsamplers = [int(path.split(".")[1]) for path, _ in unet.named_modules() if path.endswith(".op")]
    per_level, names = min(downsamplers, default=len(unet.input_blocks)), dict(OUTER)
    for path in set(paths) - set(OUTER):
        block, i, inner = re.fullmatch(r"(\w+)\.(\d+)\.(?:\d+\.)?(.+)", path).groups()
        level, j = divmod(int(i) - (block == "input_blocks"), per_level)
        where = f"{'down' if block == 'input_blocks' else 'up'}_blocks.{level}."
        if block == "middle_block":
            where, j = "mid_block.", int(i) // 2
        names[path] = where + INNER.get(inner, "attentions.{}." + inner).format(j)
    return {path: "lora_unet_" + names[path].replace(".", "_") for path in paths}


def save(unet, path, metadata):
    """Write the adapters and `metadata` (str -> str) to the file `path`, whole or not at all."""
    loras = adapters(unet)
    assert loras, "nothing to save"
    tensors = {f"{name}.lora_{side}.weight": getattr(loras[layer], side).data.cpu()
               for layer, name in kohya_names(unet, loras).items() for side in ("down", "up")}
    save_file(tensors, f"{path}.part", metadata)
    os.chmod(f"{path}.part", 0o644)  # safetensors leaves it readable to the owner alone
    os.replace(f"{path}.part", path)


@torch.no_grad()
def load(path, unet):
    """Adapt `unet` with the LoRA file at `path` -> its metadata. Another tool's `.alpha` / rank is folded into up.

    ValueError, in one line: not a LoRA file, incomplete, for another base; or `unet` is adapted already.
    """
    layers, loras = plain_layers(unet), {}
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
    if any(key.startswith("lora_te") for key in tensors):
        raise ValueError(f"{path}: carries text-encoder adapters, which are not supported; only the UNet is adapted")
    contexts = [tensor.shape[-1] for key, tensor in tensors.items() if key.endswith("attn2_to_k.lora_down.weight")]
    base = BASES.get(max(contexts, default=0), "unknown")
    for layer, name in kohya_names(unet, layers).items():
        sides = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
        if not tensors.keys() >= set(sides):
            continue
        down, up = map(tensors.pop, sides)
        loras[layer] = lora = LoRA(layers[layer], rank := len(down))
        if (down.shape, up.shape) != (lora.down.shape, lora.up.shape):
            raise ValueError(f"{path}: made for another base ({base}): {name} adapts {[len(up), *down.shape[1:]]}, "
                             f"this model's layer is {list(lora.weight.shape)}")
        lora.down.copy_(down)
        lora.up.copy_(up.float() * (float(tensors.pop(f"{name}.alpha", rank)) / rank))
    if tensors or not loras:
        raise ValueError(f"{path}: made for another base ({base}), incomplete, or not a LoRA with kohya's keys: "
                         f"{len(tensors)} keys do not fit, the first is {min(tensors, default='')!r}")
    attach(unet, loras)
    return metadata


def result_of(weights):
    """What train.py wrote beside its weights (result.json), or {}."""
    result = Path(weights).with_name("result.json")
    return json.loads(result.read_text()) if result.exists() else {}


def base_of(path):
    """-> the checkpoint that a LoRA was trained from, and whether on its EMA weights: the bundled one if nothing says."""
    result = result_of(path)
    return result.get("ckpt") or TINY_PRIOR, result.get("use_ema", False)
