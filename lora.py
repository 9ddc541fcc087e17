"""LoRA by hand for nn.Linear and nn.Conv2d: y = base(x) + up(down(x)), in files that other tools read.

The paper's presets (Appendix A), with the number of parameters they train on the SD 2.1 shapes:
    base   207,458,688   every Conv2d (shortcuts and resampling too), attention q, k, v; rank ceil(0.2 max(in, out))
    small   64,707,072   every Conv2d, attention q, k, v, out, feed-forward, proj_in and proj_out; rank 64
An int is `small` with that rank. The first and the last conv are trained in full, as a LoRA of their own full rank
whose smaller side is a fixed identity. Unlike in the paper their biases stay frozen: a LoRA file has no place for one.

A file has kohya's keys: `lora_unet_`, the layer's path in diffusers with `_` for `.`, then `.lora_down.weight` or
`.lora_up.weight`. It has no `.alpha`, so every reader's scale is 1. For tools that read no such file, one whole
checkpoint, in the layout of the one that the LoRA was trained on:

    python lora.py --merge runs/NAME/lora.safetensors --ckpt sd21.safetensors --out merged.safetensors --dtype fp16
"""
import argparse
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files import check_replaceable, cli, open_tensors, save_tensors

PRESETS = {  # name -> how the paths of the adapted Linears end
    "base": ("to_q", "to_k", "to_v"),
    "small": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
}
BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of the context
DIFFUSERS = ("diffusers merges it: pipe.load_lora_weights(FILE), pipe.fuse_lora(), pipe.unload_lora_weights(), "
             "pipe.save_pretrained(FOLDER); then give FOLDER as --ckpt")
COMFYUI = "ComfyUI merges it: its nodes Load LoRA and Save Checkpoint; then give the saved file as --ckpt"
FOREIGN = [  # what keys of other kinds of adapters look like, the kind, and what reads it
    (r"^lora_te|^text_encoder", "a LoRA of the text encoder too", COMFYUI),
    (r"dora_scale|lora_magnitude_vector", "a DoRA", COMFYUI),
    (r"\.hada_", "a LoHa", COMFYUI),
    (r"\.lokr_", "a LoKr", COMFYUI),
    (r"\.lora_mid\.", "a LoRA with a third matrix, lora_mid", COMFYUI),
    (r"^lora_unet_(input_blocks|middle_block|output_blocks)_", "a LoRA with CompVis' names of the layers", COMFYUI),
    (r"\.lora_[AB]\.", "a LoRA with PEFT's names", DIFFUSERS),
    (r"[._]lora\.(down|up)\.|\.processor\.", "a LoRA with the names of older diffusers", DIFFUSERS),
]


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


def rank_of(layer, preset):
    """The rank that `preset` gives to a layer, at most the layer's full rank."""
    if preset == "base":
        rank = math.ceil(0.2 * max(layer.weight.shape[:2]))
    else:
        rank = 64 if preset == "small" else preset
    return min(rank, full_rank(layer))


def inject(unet, preset):
    """Adapt `unet` by `preset` ("base", "small" or a rank) and freeze the rest -> list of the trainable parameters.

    ValueError: no such preset, or `unet` is adapted already.
    """
    if preset not in PRESETS and not (isinstance(preset, int) and preset > 0):
        raise ValueError(f"a LoRA is {', '.join(PRESETS)} or a rank of at least 1, not {preset!r}")
    linear_ends = PRESETS.get(preset, PRESETS["small"])
    loras = {}
    for path, layer in plain_layers(unet).items():
        if path in ("input_blocks.0.0", "out.2"):
            loras[path] = LoRA(layer, full_rank(layer))
        elif isinstance(layer, nn.Conv2d) or path.endswith(linear_ends):
            loras[path] = LoRA(layer, rank_of(layer, preset))
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
    """{path: its name in a file}, as input_blocks.4.1.proj_in: lora_unet_down_blocks_1_attentions_0_proj_in."""
    return {path: "lora_unet_" + unet.diffusers_path(path).replace(".", "_") for path in paths}


def save(unet, path, metadata):
    """Write the adapters and `metadata` (str -> str) to the file `path`, whole or not at all."""
    loras = adapters(unet)
    assert loras, "nothing to save"
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", **metadata}  # ranks differ
    save_tensors(path, {f"{name}.lora_{side}.weight": getattr(loras[layer], side).data.cpu()
                        for layer, name in kohya_names(unet, loras).items() for side in ("down", "up")}, metadata)


def is_lora_file(path):
    """Whether a .safetensors file holds kohya's keys."""
    with open_tensors(path) as file:
        return any(key.startswith("lora_") for key in file.keys())


def read_metadata(path):
    """-> what a LoRA file says of itself (str -> str)."""
    with open_tensors(path) as file:
        return {name: value for name, value in (file.metadata() or {}).items() if name != "format"}


def read_tensors(path):
    """-> the tensors of a LoRA file with kohya's keys. ValueError that names another kind of file, and a way out."""
    if Path(path).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path}: a pickle; make a .safetensors file of it: python -c 'import torch, "
                         f"safetensors.torch; safetensors.torch.save_file(torch.load(\"{path}\", weights_only=True), "
                         f"\"{path}.safetensors\")'")
    with open_tensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    for key, tensor in tensors.items():
        is_matrix = tensor.ndim >= 2 and tensor.numel() and tensor.is_floating_point()
        if key.endswith((".lora_down.weight", ".lora_up.weight")) and not is_matrix:
            raise ValueError(f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, no matrix of real numbers: a "
                             "damaged file")
        if key.endswith(".alpha") and (tensor.numel() != 1 or tensor.is_complex()):
            raise ValueError(f"{path}: {key} is {tensor.dtype} {list(tensor.shape)}, no number: a damaged file")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or infinity: its training failed")
        if key.endswith("attn2_to_k.lora_down.weight") and BASES.get(tensor.shape[1]) == "SDXL":
            raise ValueError(f"{path}: made for another base (SDXL)")
    for pattern, kind, way_out in FOREIGN:
        if any(re.search(pattern, key) for key in tensors):
            raise ValueError(f"{path}: {kind}, which is not read here; {way_out}")
    return tensors


@torch.no_grad()
def load(path, unet):
    """Adapt `unet` with the LoRA file at `path` -> its metadata. Another tool's `.alpha` / rank is folded into up.

    ValueError, in one line: no LoRA, of another kind, incomplete, for another base; or `unet` is adapted already.
    """
    layers, loras, tensors = plain_layers(unet), {}, read_tensors(path)
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
    return read_metadata(path)


# ------------------------------------------------------------------ one whole checkpoint

def main():
    from sample import load_flow  # it knows how a model is put together, and stands on this file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--merge", required=True, metavar="LORA", help="LoRA file to fold into the weights")
    add("--ckpt", required=True, help="Stable Diffusion checkpoint that the LoRA was trained on")
    add("--out", required=True, help="the .safetensors file to write")
    add("--dtype", choices=["fp16", "bf16", "fp32"], help="of the networks' tensors (default: the checkpoint's own)")
    args = parser.parse_args()
    if not args.out.endswith(".safetensors"):
        raise ValueError(f"--out {args.out}: it must end in .safetensors")
    for flag, path in ("--ckpt", args.ckpt), ("--merge", args.merge):
        if os.path.realpath(args.out) == os.path.realpath(path):
            raise ValueError(f"--out {args.out}: that is {flag}, which is kept: choose another name")
    check_replaceable(args.out)
    sd, _ = load_flow(args.ckpt, args.merge, task=None)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(args.dtype)
    sd.save(args.out, dtype, **sd.modelspec(Path(args.out).stem, sd.picture_size()))
    print(f"{args.out}: {args.merge} merged into {args.ckpt}")


if __name__ == "__main__":
    cli(main)
