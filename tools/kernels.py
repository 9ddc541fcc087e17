"""Count what a pass of the UNet asks a GPU to do, ours beside diffusers' and peft's, without weights and without a GPU.

    python -m tools.kernels                 SD 2.1, 4 pictures of 512 px, bf16: sampling, and training steps (a minute)
    python -m tools.kernels sdxl            the same for SDXL; sd15 for SD 1.5
    python -m tools.kernels --compiled      kernels of a sampling pass under torch.compile, by inductor's own count

It runs the networks on torch's fake tensors, as tools/costs.py does. An operation counts as one kernel, unless it only
makes a view or takes memory; its bytes are those of its inputs and results. At these sizes a GPU waits for kernels to
be started, so their number is the time. A training step is the forward and backward pass, without the optimizer.

            ours                                            the peer
sampling    bf16 weights, joined q, k, v                    bf16 weights, fuse_qkv_projections
LoRA        bf16 weights, adapters that cast themselves     bf16 weights, float32 peft adapters, autocast, as in
                                                            diffusers' examples
all weights float32 weights, autocast                       the same
"""
import argparse
import contextlib
import re
from collections import Counter
from dataclasses import replace
from unittest import mock

import open_clip  # noqa: F401  before fake tensors, as in tools/costs.py
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from model import UNet
from support.files import cli, parse
from support.packed import fuse
from tests.checkpoints import CONFIGS, diffusers_condition, diffusers_unet
from tools.bench import add_adapters, peer_ranks
from tools.costs import as_on_cuda, build, table

BATCH, SIZE = 4, 64         # latents of 512 px
NO_KERNEL = {"aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided",
             "aten::_unsafe_view", "aten::lift_fresh"}
WAYS = {"sampling": None, "LoRA base": "base", "LoRA small": "small", "all weights": "none"}


class Kernels(TorchDispatchMode):
    """Inside `with`, counts the operations that start a kernel: .count by name, and the .bytes they read and write."""

    def __init__(self):
        super().__init__()
        self.count, self.bytes = Counter(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name
        if not operation.is_view and not name.startswith("prim::") and name not in NO_KERNEL:
            self.count[name] += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves((args, kwargs, result))
                              if isinstance(tensor, torch.Tensor))
        return result

    @property
    def kernels(self):
        return self.count.total()

    @property
    def casts(self):
        return self.count["aten::_to_copy"]


# ------------------------------------------------------------------ the two sides: each function returns step(*tensors)

def tensors(config):
    """-> x (B, 4, h, w), t (B,), context (B, 77, D) in float32, for SDXL (B, 78, D)."""
    context = torch.zeros(BATCH, 77 + config.is_xl, config.context_width)
    return torch.zeros(BATCH, 4, SIZE, SIZE), torch.zeros(BATCH), context


def materialise(net, mode):
    """Replace parameters on the meta device by fake ones."""
    with mode:
        net.load_state_dict({name: torch.zeros(tensor.shape, dtype=tensor.dtype)
                             for name, tensor in net.state_dict().items()}, assign=True)


def ours(config, way, mode):
    if way == "sampling":
        with torch.device("meta"):
            net = UNet(config).to(torch.bfloat16).requires_grad_(False).eval()
        net.embeddings_to(torch.float32)
        materialise(net, mode)
        with mode:
            fuse(net)
        return net
    sd, flow, _ = build(config, WAYS[way], mode)
    return lambda x1, t, context: flow.loss(x1, context).backward()


def theirs(config, way, mode):
    from diffusers import DDPMScheduler
    with torch.device("meta"):
        net = diffusers_unet(config).to(torch.float32 if way == "all weights" else torch.bfloat16)
        if way == "sampling":
            net.requires_grad_(False).eval().fuse_qkv_projections()
        elif way != "all weights":
            add_peft(net, config, WAYS[way])
    materialise(net, mode)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def sample(x, t, context):
        return net(x.bfloat16(), t, **diffusers_condition(config, context.bfloat16(), x)).sample

    def train(x1, t, context):
        noise, timesteps = torch.randn_like(x1), torch.zeros(BATCH, dtype=torch.long)
        noisy, target = scheduler.add_noise(x1, noise, timesteps), scheduler.get_velocity(x1, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            output = net(noisy, timesteps, **diffusers_condition(config, context, x1)).sample
        F.mse_loss(output.float(), target).backward()
    return sample if way == "sampling" else train


def add_peft(net, config, preset):
    """Add the layers and ranks of our preset to diffusers' UNet, as float32 adapters of peft."""
    add_adapters(net, peer_ranks(UNet(config), preset))


def count(config, way, side):
    """-> Kernels of a step. side: ours or theirs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    step = side(config, way, mode)
    with as_on_cuda(mode), torch.set_grad_enabled(way != "sampling"), Kernels() as kernels:
        step(*tensors(config))
    return kernels


def count_compiled(config, side):
    """-> kernels that inductor generates for a sampling pass, and calls of its libraries' (convolutions, products). On
    a CPU and narrow networks, whose kernels are neither built nor run."""
    from torch._inductor import async_compile, metrics
    from torch._inductor.utils import fresh_cache, run_and_get_code
    config = replace(config, unet_widths=(64, 64, 128, 128), context_width=128)
    mode = contextlib.nullcontext()
    step = torch.compile(side(config, "sampling", mode))
    torch._dynamo.reset()
    metrics.reset()
    with (torch.no_grad(), mock.patch.object(model, "attend", F.scaled_dot_product_attention),
          fresh_cache(),
          mock.patch.object(async_compile.AsyncCompile, "cpp_pybinding", lambda *names, **more: lambda *tensors: None)):
        _, code = run_and_get_code(step, *tensors(config))
    calls = sum(len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.\S+\(", part)) for part in code)
    return metrics.generated_kernel_count, calls


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(CONFIGS), default="sd21", help="the model (default: sd21)")
    parser.add_argument("--compiled", action="store_true", help="count under torch.compile")
    args = parse(parser)
    if args.compiled:
        rows = [[side.__name__, *map(str, count_compiled(CONFIGS[args.name], side))] for side in (ours, theirs)]
        table(["", "generated kernels", "calls of libraries"], rows)
        return
    print(f"{args.name}, {BATCH} pictures of {8 * SIZE} px, bf16. Counted, not measured.")
    rows = []
    for way in WAYS:
        pair = [count(CONFIGS[args.name], way, side) for side in (ours, theirs)]
        rows.append([way, *(str(side.kernels) for side in pair), f"{pair[0].kernels / pair[1].kernels:.2f}",
                     *(str(side.casts) for side in pair), *(f"{side.bytes / 1e9:.1f}" for side in pair),
                     f"{pair[0].bytes / pair[1].bytes:.2f}"])
    table(["", "our kernels", "theirs", "ratio", "our casts", "theirs", "our GB", "theirs", "ratio"], rows)


if __name__ == "__main__":
    cli(main)
