"""A model that is only going to be sampled, made faster without another result.

CUDA      channels_last; one matrix product for q, k and v of self-attention, and one for k and v of cross-attention
--compile torch.compile of the UNet; on CUDA with CUDA graphs
x86 CPU   convolutions whose weights are kept in oneDNN's own memory layout

The convolutions use private operations of torch, which may change or go. Where one is missing, nothing is packed and
nn.Conv2d runs as usual. ENABLED = False switches packing off.
"""
import platform

import torch
import torch.nn.functional as F
from torch import nn

from model import Attention, TransformerBlock
from support.load import compile_unet

ENABLED = True


def can_pack(dtype):
    """Whether this machine and this version of torch pack convolutions of `dtype`."""
    try:
        has_operations = bool(torch._C._nn.mkldnn_reorder_conv2d_weight and torch.ops.mkldnn._convolution_pointwise)
        has_dtype = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError:
        return False
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return ENABLED and is_x86 and torch.backends.mkldnn.is_available() and has_operations and has_dtype


def pack(sd, compiled=False):
    """Make a StableDiffusion faster, in place. It can be neither trained nor saved afterwards. compiled: torch.compile
    the UNet too, which packs convs on a CPU by itself."""
    if sd.device.type == "cuda":
        sd.to(memory_format=torch.channels_last)
        fuse(sd.unet)
    if compiled:
        compile_unet(sd, "reduce-overhead")
    elif sd.device.type == "cpu" and can_pack(sd.unet.out[2].weight.dtype):
        for path, layer in list(sd.named_modules()):
            if isinstance(layer, nn.Conv2d):
                sd.set_submodule(path, PackedConv2d(layer))


def fuse(unet):
    """Join the matrices that multiply the same input: q, k and v of self-attention, k and v of cross-attention."""
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            block.attn1, block.attn2 = FusedAttention(block.attn1, True), FusedAttention(block.attn2, False)


class FusedAttention(Attention):
    """A frozen model.Attention with one matrix for q, k and v (of self-attention), or for k and v."""

    def __init__(self, attention, is_self):
        nn.Module.__init__(self)
        self.heads, self.to_out, self.to_q = attention.heads, attention.to_out, None if is_self else attention.to_q
        joined = [attention.to_q] * is_self + [attention.to_k, attention.to_v]
        self.weight = torch.cat([layer.weight.data for layer in joined])

    def project(self, x, context):
        parts = F.linear(context, self.weight).split(self.to_out[0].in_features, dim=-1)
        return parts if self.to_q is None else (self.to_q(x), *parts)


class PackedConv2d(nn.Module):
    """A frozen nn.Conv2d whose weight is reordered once, instead of in every call."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight.data.to_mkldnn(), conv.bias.data
        self.settings, self.packed = (conv.padding, conv.stride, conv.dilation, conv.groups), False

    def forward(self, x):
        if not self.packed:         # the layout is chosen for the first input's shape, and works for others too
            self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(self.weight, *self.settings, x.shape)
            self.packed = True
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.settings, "none", [], "")      # no operation is fused behind it
