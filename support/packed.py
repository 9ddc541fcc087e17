"""Faster convolutions for sampling on an x86 CPU: weights are kept in oneDNN's own memory layout.

This uses private operations of torch, which may change or go. Where one is missing, nothing is packed and nn.Conv2d
runs as usual. ENABLED = False switches packing off.
"""
import platform

import torch
from torch import nn

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


def pack(sd):
    """Make a StableDiffusion faster that is only going to be sampled: channels_last on CUDA, packed convs on an x86
    CPU. It can be neither trained nor saved afterwards."""
    if sd.device.type == "cuda":
        sd.to(memory_format=torch.channels_last)
    elif sd.device.type == "cpu" and can_pack(sd.unet.out[2].weight.dtype):
        for path, layer in list(sd.named_modules()):
            if isinstance(layer, nn.Conv2d):
                sd.set_submodule(path, PackedConv2d(layer))


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
