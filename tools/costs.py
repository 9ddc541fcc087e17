"""Compute the memory and the GPU hours of finetuning, without weights and without a GPU.

    python -m tools.costs                   SD 2.1 at 512 and 768 px, LoRA and all weights (two to five minutes)
    python -m tools.costs sd15              the same for SD 1.5
    python -m tools.costs sdxl              SDXL at 1024 px, batches of 1 and 4 (ten minutes)
    python -m tools.costs --tflops 30       hours at your GPU's rate, in 10^12 floating-point operations per second

It runs train.py's own code for one batch on torch's fake tensors, which have a shape, a dtype and a lifetime but no
numbers. LiveBytes adds up the memory that they would take, FlopCounterMode counts multiplications and additions. The
fake tensors are on the CPU, so that tests/test_costs.py can compare them with real ones. What differs on CUDA is set as
it is there: float32 norms under autocast, fused attention in the UNet (which keeps q, k, v, the result and one number
per row, no N x N matrix), and no fast path in the text encoder.

Not counted: the CUDA context, cuDNN's workspaces, and memory lost between blocks. The hours assume the rate that a step
of tools.bench reached on an H100, and leave out the reading of pictures and the previews.
"""
import argparse
import contextlib
import weakref
from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

import open_clip  # noqa: F401  before fake tensors: some versions compute while they are imported
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import model
import train
from model import StableDiffusion
from support.files import cli, parse
from tests.checkpoints import CONFIGS

GIB = 2**30
PRESETS = {"16": "LoRA 16", "small": "LoRA small", "base": "LoRA base", "none": "all weights"}
MEASURED = 70.0         # 10^12 operations per second: LoRA base, 4 x 512 px, bf16 autocast, on an H100 (docs/speed.md)
PAIRS, PAIR_STEPS, PAIR_CFG = 1_800_000, 40, 7.5
ATTENTION = {  # FlopCounterMode counts fused attention on CUDA only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *more, **options: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, q, k, v, *more, **options: sdpa_backward_flop_count(gradient, q, k, v)}


# ------------------------------------------------------------------ counters

class LiveBytes(TorchDispatchMode):
    """Inside `with`, counts the memory of new tensors: .now, the bytes that are still referenced, and .peak. A storage
    that several tensors share counts once. The storages of the tensors `before` do not count."""

    def __init__(self, before):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.subtract, storage.nbytes())

    def subtract(self, size):
        self.now -= size


def count_flops():
    return FlopCounterMode(display=False, custom_mapping=ATTENTION)


def size_of(tensors):
    """-> the tensors' size in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------ the model and a step, as in train.py

def norm_on_cuda(norm):
    """-> F.group_norm or F.layer_norm as CUDA's autocast computes it, in float32; the CPU's keeps bf16."""
    return lambda x, *options: norm(x.float() if torch.is_autocast_enabled("cpu") else x, *options)


@contextlib.contextmanager
def as_on_cuda(mode):
    """Inside `with`, code on the CPU takes the same branches as on CUDA, and new tensors are of `mode`. No caption is
    dropped, since fake tensors have no random numbers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)              # CUDA's autocast disables it
    try:
        with (mode, mock.patch.object(model, "attend", F.scaled_dot_product_attention),
              mock.patch.object(F, "group_norm", norm_on_cuda(F.group_norm)),
              mock.patch.object(F, "layer_norm", norm_on_cuda(F.layer_norm)),
              mock.patch.object(train, "drop_captions", lambda captions, share: captions)):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def without_file(config):
    """-> a replacement for load_model that reads no file: it builds a model of `config` on the meta device."""
    def load_model(path, loras, device, dtype, *options, **more):
        with torch.device("meta"):
            sd = StableDiffusion(config, "v")
        sd.to(dtype).requires_grad_(False).eval()
        sd.unet.embeddings_to(torch.float32)
        return sd
    return load_model


def build(config, preset, mode, checkpointing=False, precision="bf16"):
    """-> sd, flow, {name: parameter} to train, as train.load_trainable returns them. Their tensors are of `mode`:
    FakeTensorMode(), or contextlib.nullcontext() for real ones."""
    args = Namespace(lora=preset, precision=precision, checkpointing=checkpointing, task="text-to-image",
                     objective="diff2flow", ckpt=None, init_lora=None, prediction=None, use_ema=False, zero_snr=False,
                     compile=False)
    with (mock.patch.object(train, "load_model", without_file(config)),
          mock.patch.object(train, "compute_in_bf16", lambda sd: None)):
        sd, _, _ = train.load_trainable(args, "meta")
    shapes = sd.state_dict()
    with mode:
        sd.load_state_dict({name: torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype).fill_(0.01)
                            for name, meta in shapes.items()}, assign=True)
        for tower in sd.text_encoders:
            tower.attn_mask = torch.full((77, 77), float("-inf")).triu(1)
        if precision == "bf16" and preset == "none":
            train.compute_in_bf16(sd)
        trained = {name: parameter for name, parameter in sd.unet.named_parameters() if parameter.requires_grad}
        return sd, train.make_flow(sd, args.objective), trained


def fill_memory(sd, flow, trained):
    """Make what stays in memory besides the weights: gradients, Adam's averages, EMA -> {part: bytes}, weights
    included, and a list of all these tensors."""
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer, ema = torch.optim.Adam(trained.values(), fused=True), train.EMA(trained)
    optimizer.step()
    parts = {
        "weights": list(sd.parameters()),
        "gradients": [parameter.grad for parameter in trained.values()],
        "Adam": [tensor for state in optimizer.state.values() for tensor in state.values()],
        "EMA": list(ema.average.values())}
    others = [flow.f_table, *sd.buffers(), *(tower.attn_mask for tower in sd.text_encoders)]
    return {name: size_of(part) for name, part in parts.items()}, others + sum(parts.values(), [])


def one_pass(sd, flow, images, read):
    """One batch of the loop in train.train -> the results of read() after encoding, forward and backward pass."""
    x1, x0, context, mask = train.text_to_image(sd, train.encode_batch(sd, images))
    marks = [read()]
    loss = flow.loss(x1, context, x0, mask=mask)
    marks.append(read())
    loss.backward()
    return [*marks, read()]


def one_batch(config, preset, size, checkpointing=False, batch=4, precision="bf16", mode=None):
    """-> .stays, {part: bytes} of what stays in memory; .kept, the bytes that the forward pass keeps for the backward
    pass; .peak, the most bytes that encoding, forward and backward pass need in addition to .stays; .flops, {part:
    operations}."""
    mode = mode or FakeTensorMode()
    sd, flow, trained = build(config, preset, mode, checkpointing, precision)
    with as_on_cuda(mode):
        stays, tensors = fill_memory(sd, flow, trained)
        images = {"image": torch.zeros(batch, 3, size, size), "caption": ["a red boat"] * batch}
        with LiveBytes([*tensors, images["image"]]) as live:
            before, after, _ = one_pass(sd, flow, images, lambda: live.now)
        with count_flops() as counter:                      # in a second pass: it keeps tensors alive
            encoding, forward, total = one_pass(sd, flow, images, counter.get_total_flops)
    flops = {"encoding": encoding, "forward": forward - encoding, "backward": total - forward}
    return SimpleNamespace(stays=stays, kept=after - before, peak=live.peak, flops=flops)


def pair_flops(config, size):
    """-> operations for one of Reflow's pairs: PAIR_STEPS steps with guidance, which are two forward passes each."""
    mode = FakeTensorMode()
    sd, flow, _ = build(config, "none", mode)
    side = size // sd.factor
    with as_on_cuda(mode), count_flops() as counter:
        context, uncond = sd.encode_text(["a red boat"]), sd.encode_text([""])
        text = counter.get_total_flops()
        flow.sample(torch.zeros(1, config.latent_channels, side, side), context, 1, uncond, PAIR_CFG)
    return text + PAIR_STEPS * (counter.get_total_flops() - text)


# ------------------------------------------------------------------ tables

def table(heading, rows):
    """Print rows of strings as a Markdown table."""
    print("\n| " + " | ".join(heading) + " |\n|" + "---|" * len(heading))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def memory_row(name, plain, checkpointed):
    stays = plain.stays
    others = sum(stays.values()) - stays["weights"]
    numbers = [stays["weights"], others, plain.peak, sum(stays.values()) + plain.peak, checkpointed.peak,
               sum(stays.values()) + checkpointed.peak]
    return [name, *(f"{number / GIB:.1f}" for number in numbers)]


def hours(operations, rate):
    """-> GPU hours (str). rate: 10^12 operations per second."""
    return f"{operations / (rate * 1e12) / 3600:,.0f}"


def flops_row(name, cost, passes, rate):
    """passes: batches of 4 in the whole run."""
    tera = [f"{cost.flops[part] / 1e12:.1f}" for part in ("encoding", "forward", "backward")]
    total = passes * sum(cost.flops.values())
    return [name, *tera, f"{total / 1e18:,.0f}", hours(total, rate)]


def print_memory(costs, names):
    table(["GiB", "weights of all networks", "gradients, Adam, EMA", "batch", "**total**",
           "batch with `--checkpointing`", "**total**"],
          [memory_row(names[key], *pair) for key, pair in costs.items()])


def print_hours(costs, names, pairs, size, rate):
    """costs: of batches of 4. pairs: operations of one pair."""
    recipe = train.PAPER["text-to-image"]
    rows = [flops_row(f"{names[key]}{with_flag}", cost, recipe["steps"] * recipe["grad_accum"], rate)
            for with_flag, which in (("", 0), (", `--checkpointing`", 1))
            for key, cost in ((key, pair[which]) for key, pair in costs.items())]
    total = PAIRS * pairs
    rows.append([f"{PAIRS:,} pairs, {size} px, {PAIR_STEPS} steps with guidance", "", "", "",
                 f"{total / 1e18:,.0f}", hours(total, rate)])
    table(["10^12 operations for 4 images", "encoding pictures and text", "forward", "backward",
           f"10^18 operations for {recipe['steps']:,} steps of 64 images, or for the pairs",
           f"hours at {rate:g} TFLOP/s"], rows)


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.costs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(CONFIGS), default="sd21", help="the model (default: sd21)")
    parser.add_argument("--tflops", type=float, default=MEASURED,
                        help=f"10^12 operations per second that your GPU reaches (default: {MEASURED:g})")
    args = parse(parser)
    config = CONFIGS[args.name]
    print(f"{args.name}, bf16. Computed, not measured.")
    sizes, batches = ((1024,), (1, 4)) if config.is_xl else ((512, 768), (4,))
    names = {(preset, size, batch): f"{words}, {batch} x {size} px"
             for batch in batches for size in sizes for preset, words in PRESETS.items()}
    costs = {(preset, size, batch): [one_batch(config, preset, size, checkpointing, batch)
                                     for checkpointing in (False, True)] for preset, size, batch in names}
    print_memory(costs, names)
    of_four = {key: pair for key, pair in costs.items() if key[-1] == 4}
    print_hours(of_four, names, pair_flops(config, sizes[0]), sizes[0], args.tflops)


if __name__ == "__main__":
    cli(main)
