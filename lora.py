"""LoRA by hand for nn.Linear and nn.Conv2d: y = base(x) + up(down(x)).

The paper's presets (Appendix A), with the number of parameters they train on SD 2.1's shapes:
    base   207,458,688   every Conv2d (shortcuts and resampling too), attention q, k, v; rank ceil(0.2 max(in, out))
    small   64,707,072   every Conv2d, attention q, k, v, out, feed-forward, proj_in and proj_out; rank 64
An int is `small` with that rank. The first and the last conv are trained in full, as a LoRA of their own full rank
whose smaller matrix is a fixed identity. Unlike in the paper their biases stay frozen: LoRA files have no entry for
them.

support/lora_file.py reads and writes the files that other tools share; tools/merge.py merges them into a checkpoint.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {  # name -> endings of the paths of adapted Linears
    "base": ("to_q", "to_k", "to_v"),
    "small": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
}


class LoRA(nn.Module):
    """A frozen layer plus its adapter, which is zero at the start: y = base(x) + up(down(x)).

    Linear: down (r, in), up (out, r). Conv2d: down (r, in, kh, kw), with the layer's stride and padding, and
    up (out, r, 1, 1). Float32, cast to the input's dtype when used. At full rank the smaller matrix is a fixed
    identity.
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

    weight = property(lambda self: self.base.weight)  # for callers that read a layer's dtype or device

    def forward(self, x):
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(self.base, nn.Linear):
            return self.base(x) + F.linear(F.linear(x, down), up)
        return self.base(x) + F.conv2d(F.conv2d(x, down, None, self.base.stride, self.base.padding), up)


def full_rank(layer):
    """The full rank of a layer's weight as a matrix (out, in*kh*kw)."""
    return min(len(layer.weight), layer.weight[0].numel())


def adapters(unet):
    """-> {path: LoRA} of the adapters in `unet`."""
    return {path: module for path, module in unet.named_modules() if isinstance(module, LoRA)}


def plain_layers(unet):
    """-> {path: layer}, every Linear and Conv2d. ValueError if `unet` has adapters."""
    if adapters(unet):
        raise ValueError("this UNet has a LoRA already; start from its plain checkpoint")
    return {path: module for path, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def attach(unet, loras):
    """Freeze `unet` and replace layers by {path: LoRA} -> list of the trainable parameters."""
    unet.requires_grad_(False)
    for path, lora in loras.items():
        unet.set_submodule(path, lora)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def rank_of(layer, preset):
    """The rank of a layer's adapter under `preset`: at most the layer's full rank."""
    if preset == "base":
        rank = math.ceil(0.2 * max(layer.weight.shape[:2]))
    else:
        rank = 64 if preset == "small" else preset
    return min(rank, full_rank(layer))


def inject(unet, preset):
    """Add adapters to `unet` by `preset` ("base", "small" or a rank), freeze the rest -> list of trainable parameters.

    ValueError: no such preset, or `unet` has adapters already.
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
def merge(weight, down, up, strength=1.0):
    """Add strength * up @ down to a layer's `weight`, in place: the layer alone then computes what both did."""
    weight += strength * (up.to(weight.device).flatten(1) @ down.to(weight.device).flatten(1)).view_as(weight)
