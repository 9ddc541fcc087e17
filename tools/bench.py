"""Speed and memory of our code and of a peer's, with the same weights and shapes, measured in turns.

    python -m tools.bench unet --arch sd15 sd21 --size 256 512 --dtype fp32 autocast bf16 --where
    python -m tools.bench train --arch sd21 --weights base none --json rows.jsonl
    python -m tools.bench sample load data
    python -m tools.bench open --batch 1000 10000 100000

what      ours                                         the peer
unet      a forward pass of model.UNet                 diffusers' UNet2DConditionModel, on CUDA with fused q, k and v
train     a step of train.py's loop, latents cached    diffusers' UNet in the loop of its text-to-image example; peft
sample    Algorithm 2 with guidance 4, decoded         diffusers' StableDiffusionPipeline, as many Euler steps
load      load_checkpoint, in the file's dtype         reading the file's bytes
data      data.ImageFolder in a DataLoader             torchvision's transforms in a DataLoader of as many workers
open      data.ImageFolder of --batch pictures         torchvision's ImageFolder, which opens no file

A ratio is our time over the peer's: below 1, we are faster. Since a machine's speed drifts, the two sides take turns,
each time in a new process, --rounds times. The table has medians, and the smallest and the largest ratio of all rounds.
Memory is the peak of a process during the steps. On CUDA, "of peak" is the network's operations per second as a share
of those of a large bf16 matrix product. --where adds a table of the time by kind of operation. The weights are random,
in the layout of the real files, 2 GB each in runs/bench/. Needs the packages of requirements-test.txt.
"""
import argparse
import ctypes
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import lora
from data import ImageFolder, progress
from model import SD15, SD21, SDXL, StableDiffusion
from sample import sigma_grid
from support.checkpoint import load_checkpoint, save_checkpoint
from support.files import check_range, cli, parse, replacing
from support.load import compile_unet, make_flow, pick_device
from support.names import unet_path
from support.packed import pack
from tests.checkpoints import NARROW, diffusers_condition
from train import EMA

ARCHITECTURES = {"sd15": (SD15, "eps"), "sd21": (SD21, "v"), "sdxl": (SDXL, "eps"),
                 "narrow": (NARROW["sd21"], "v")}           # for trials: a tenth of sd21's width
FOLDER, PROMPT = Path("runs/bench"), "a red boat on a lake"


class Case(NamedTuple):
    """A row of the table. size is in pixels; weights: the LoRA preset to train, or none for all weights."""
    what: str
    arch: str = "-"
    size: int = 0
    batch: int = 1
    dtype: str = "fp32"
    weights: str = "-"
    steps: int = 1
    device: str = "cpu"
    compile: bool = False
    repeat: int = 3
    where: bool = False


KINDS = {  # of operations: patterns of their names, of which the first match counts
    "convolutions": "conv", "attention": "scaled_dot|softmax|bmm", "matrix products": "mm|linear|matmul",
    "norms": "norm", "SiLU and GELU": "silu|gelu", "copies": "copy|cat|clone|index", "sums, products, optimizer": "::",
}


# ------------------------------------------------------------------ inputs of both sides

def weights_file(arch):
    """-> the file of a random checkpoint in the real layout, in float16, which is written at the first call."""
    path, (config, prediction) = FOLDER / f"{arch}.safetensors", ARCHITECTURES[arch]
    if not path.exists():
        print(f"writing {path}: 2 GB of random weights, for this and later runs", file=sys.stderr)
        torch.manual_seed(0)
        sd = StableDiffusion(config, prediction)
        for parameter in sd.parameters():
            if not parameter.any():                         # the last layers of residual branches start at zero
                torch.nn.init.normal_(parameter, std=0.02)
        save_checkpoint(sd, path, torch.float16)
    return path


def photographs():
    """-> a folder of 64 photographs of 1536x1024, written at the first call: copies of scikit-learn's two."""
    from PIL import Image
    from sklearn.datasets import load_sample_images
    for i, pixels in enumerate(load_sample_images().images * 32):
        path = FOLDER / f"photographs/all/{i:02d}.jpg"      # torchvision needs a subfolder
        if not path.exists():
            with replacing(path) as temporary:
                Image.fromarray(pixels).resize((1536, 1024), Image.LANCZOS).save(temporary, quality=92)
    return FOLDER / "photographs"


def prepare(case):
    """-> sd, noise or latents x (B, z, h, w), t (B,), context (B, 77, D), and the autocast of --dtype."""
    sd = load_checkpoint(weights_file(case.arch), case.device)
    torch.manual_seed(0)
    x = torch.randn(case.batch, *sd.latent_shape([case.size, case.size])).to(sd.device)
    t, context = torch.linspace(10, 990, case.batch, device=sd.device), sd.encode_text([PROMPT] * case.batch)
    if case.dtype == "bf16":
        sd.to(torch.bfloat16)
        sd.unet.embeddings_to(torch.float32)
    if case.what != "sample":
        remove_all_but_unet(sd)
    return sd, x, t, context, torch.autocast(sd.device.type, torch.bfloat16, enabled=case.dtype == "autocast")


def remove_all_but_unet(sd):
    sd.first_stage_model = sd.cond_stage_model = sd.conditioner = None


def to_faster_format(network, case):
    """-> the peer's network in channels_last, except for float32 on a CPU, where that is 5 to 8 % slower."""
    return network if case.device == "cpu" and case.dtype == "fp32" else network.to(memory_format=torch.channels_last)


def peer_unet(case, sd):
    """-> diffusers' UNet with our weights. Removes ours from `sd`, so that only one is in memory."""
    from tests.checkpoints import diffusers_copy
    unet = diffusers_copy(sd.unet.float(), sd.config)
    sd.model = None
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    return to_faster_format(unet.to(case.device, dtype), case)


# ------------------------------------------------------------------ the two sides: each function returns a step

def unet_ours(case):
    sd, x, t, context, amp = prepare(case)
    pack(sd, case.compile)

    @torch.no_grad()
    def step():
        with amp:
            return sd.unet(x, t, context)
    return step


def unet_peer(case):
    sd, x, t, context, amp = prepare(case)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    x, condition = x.to(dtype), diffusers_condition(sd.config, context.to(dtype), x)
    net = peer_unet(case, sd)
    if case.device != "cpu":            # on a CPU it is not faster
        net.fuse_qkv_projections()
    net = torch.compile(net, mode="reduce-overhead") if case.compile else net

    @torch.no_grad()
    def step():
        with amp:
            return net(x, t, **condition).sample
    return step


def train_ours(case):
    sd, x1, _, context, amp = prepare(case)
    if case.weights == "none":
        sd.unet.requires_grad_()
    else:
        lora.inject(sd.unet, case.weights)
    sd.unet.to(memory_format=torch.channels_last).train()
    if case.compile:
        compile_unet(sd)
    flow = make_flow(sd, "diff2flow")
    trained = {name: parameter for name, parameter in sd.unet.named_parameters() if parameter.requires_grad}
    optimizer, ema = torch.optim.Adam(trained.values(), lr=1e-5, fused=True), EMA(trained)

    def step():
        with amp:
            loss = flow.loss(x1, context)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(1000, 0.999)
    return step


def train_peer(case):
    """As in diffusers' examples/text_to_image: training all weights keeps an EMA, training a LoRA does not."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel
    sd, x1, _, context, amp = prepare(case)
    condition = diffusers_condition(sd.config, context, x1)
    if case.dtype == "bf16":                        # its adapters are float32
        amp = torch.autocast(sd.device.type, torch.bfloat16)
    ranks = {} if case.weights == "none" else peer_ranks(sd.unet, case.weights)
    net = peer_unet(case, sd).train()
    if ranks:
        add_adapters(net, ranks)
    else:
        net.requires_grad_()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    ema = EMAModel(trained) if case.weights == "none" else None
    net = torch.compile(net) if case.compile else net
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def step():
        noise, t = torch.randn_like(x1), torch.randint(1000, (case.batch,), device=x1.device)
        noisy = scheduler.add_noise(x1, noise, t)
        target = noise if sd.prediction == "eps" else scheduler.get_velocity(x1, noise, t)
        with amp:
            output = net(noisy, t, **condition).sample
        F.mse_loss(output.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(trained)
    return step


def peer_ranks(unet, preset):
    """-> {a layer's path in diffusers' UNet: the rank that a preset gives it}. Our UNet stays without adapters."""
    lora.inject(unet, preset)
    adapters = lora.adapters(unet)
    for path, adapter in adapters.items():
        unet.set_submodule(path, adapter.base)
    return {unet_path(path, unet.config): len(adapter.down) for path, adapter in adapters.items()}


def add_adapters(net, ranks):
    """Freeze diffusers' UNet, and add float32 adapters of peft with these ranks."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    net.requires_grad_(False)
    net.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=list(ranks), rank_pattern=ranks,
                               alpha_pattern=ranks))
    cast_training_params(net)


def sample_ours(case):
    sd, x0, _, _, amp = prepare(case)
    pack(sd, case.compile)
    flow = make_flow(sd, "diff2flow")

    def step():
        with amp:
            context, uncond = sd.encode_text([PROMPT] * case.batch), sd.encode_text([""])
            return sd.decode(flow.sample(x0.to(sd.device), context, case.steps, uncond, 4.0)).float().clamp(-1, 1)
    return step


def sample_peer(case):
    from tests.checkpoints import full_pipeline
    sd, x0, _, _, amp = prepare(case)
    sigmas = sigma_grid(make_flow(sd, "diff2flow"), case.steps)
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    tensors = {name: tensor.float() for name, tensor in load_file(weights_file(case.arch)).items()}
    pipe = full_pipeline(sd.config, tensors, sd.prediction)
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    pipe.to(case.device, dtype)
    sd.model = None
    remove_all_but_unet(sd)
    for network in pipe.unet, pipe.vae:
        to_faster_format(network, case)
        if case.device != "cpu":
            network.fuse_qkv_projections()
    pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead") if case.compile else pipe.unet
    pipe.set_progress_bar_config(disable=True)

    def step():
        with amp:
            pictures = pipe([PROMPT] * case.batch, height=case.size, width=case.size, sigmas=sigmas, guidance_scale=4.0,
                            negative_prompt=[""] * case.batch, latents=x0.to(dtype), output_type="pt").images
        return 2 * pictures - 1
    return step


def load_ours(case):
    path = weights_file(case.arch)
    return lambda: load_checkpoint(path, case.device, torch.float16) and None


def load_peer(case):
    path = weights_file(case.arch)
    return lambda: len(path.read_bytes()) and None


def data_ours(case):
    dataset = ImageFolder(photographs(), case.size, case.size)
    return lambda: sum(len(batch["image"]) for batch in DataLoader(dataset, case.batch, num_workers=2)) and None


def data_peer(case):
    from torchvision import datasets, transforms
    dataset = datasets.ImageFolder(photographs(), transforms.Compose([
        transforms.Resize(case.size, transforms.InterpolationMode.LANCZOS), transforms.RandomCrop(case.size),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]))
    return lambda: sum(len(images) for images, _ in DataLoader(dataset, case.batch, num_workers=2)) and None


def many_pictures(count):
    """-> a folder of `count` links to one picture, each with a caption."""
    folder = FOLDER / f"links-{count}/all"
    if not folder.exists():
        making, picture = folder.with_name("making"), next(photographs().rglob("*.jpg"))
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for i in range(count):
            (making / f"{i:06d}.jpg").symlink_to(picture.resolve())
            (making / f"{i:06d}.txt").write_text(PROMPT)
        making.rename(folder)
    return folder.parent


def open_ours(case):
    folder = many_pictures(case.batch)
    return lambda: len(ImageFolder(folder, 512, 512)) and None


def open_peer(case):
    from torchvision import datasets
    folder = many_pictures(case.batch)
    return lambda: len(datasets.ImageFolder(folder)) and None


SIDES = {"unet": (unet_ours, unet_peer), "train": (train_ours, train_peer), "sample": (sample_ours, sample_peer),
         "load": (load_ours, load_peer), "data": (data_ours, data_peer), "open": (open_ours, open_peer)}


# ------------------------------------------------------------------ measurement

def timed(step, device):
    """Run a step -> its seconds and its result."""
    begin = time.perf_counter()
    result = step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def peak_memory(device):
    """-> the peak of this process's memory since the last call, in bytes."""
    gc.collect()
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    ctypes.CDLL(None).malloc_trim(0)                    # return freed memory to the system,
    Path("/proc/self/clear_refs").write_text("5")       # and reset the peak to the current memory
    return peak


def arithmetic(step, device):
    """-> on CUDA, the operations of a step, and the operations per second of a large bf16 product; else None, None."""
    if not device.startswith("cuda"):
        return None, None
    from torch.utils.flop_counter import FlopCounterMode
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    seconds = median(timed(lambda: a @ a, device)[0] for _ in range(20))
    return counter.get_total_flops(), 2 * 8192**3 / seconds


def seconds_by_kind(step):
    """-> {kind of operation: seconds} of a step, on CUDA on the GPU."""
    with torch.profiler.profile() as profile:
        step()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), None)
        if "::" in event.key:                           # an operation, not a kernel or a node of autograd
            seconds[kind] += (event.self_device_time_total or event.self_cpu_time_total) / 1e6
    return seconds


def work(case, side, pipe):
    """Measure one side of a case in this process, and send the results. The first step is a warm-up."""
    sys.stdout = open(os.devnull, "w")
    try:
        step = SIDES[case.what][side](case)
        warm_up, result = timed(step, case.device)
        result = result.float().cpu().numpy() if case.what == "unet" else None      # before CUDA graphs overwrite it
        peak_memory(case.device)
        seconds = median(timed(step, case.device)[0] for _ in range(case.repeat))
        memory, (operations, rate) = peak_memory(case.device), arithmetic(step, case.device)
        pipe.send({"seconds": seconds, "warm_up": warm_up, "memory": memory, "operations": operations, "rate": rate,
                   "where": seconds_by_kind(step) if case.where else None,
                   "result": result})
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})


def in_a_process(case, side):
    """Run `work` in a new process -> what it sends. ValueError if it fails."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(False)
    process = context.Process(target=work, args=(case, side, there))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = {"error": "its process ended; out of memory?"}
    process.join()
    if "error" in found:
        raise ValueError(f"{' '.join(map(str, case))}, {('ours', 'the peer')[side]}: {found['error']}")
    return found


def measure(case, rounds):
    """-> a row: medians, and the range of the ratio over the rounds."""
    turns = [[in_a_process(case, side) for side in (0, 1)] for _ in progress(range(rounds), " ".join(map(str, case)))]
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in turns]
    ours, theirs = ({name: median(turn[side][name] for turn in turns) for name in ("seconds", "memory", "warm_up")}
                    for side in (0, 1))
    images = 64 if case.what == "data" else case.batch
    row = {**case._asdict(), "rounds": rounds, "ours_ms": 1000 * ours["seconds"], "peer_ms": 1000 * theirs["seconds"],
           "ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
           "images_s": images / ours["seconds"], "ours_gib": ours["memory"] / 2**30,
           "peer_gib": theirs["memory"] / 2**30, "warm_up_s": [ours["warm_up"], theirs["warm_up"]]}
    last, other = (torch.from_numpy(side["result"]) if side["result"] is not None else None for side in turns[-1])
    if last is not None:
        row["difference"] = ((last - other).norm() / other.norm()).item()
    if case.where:
        row["where_ms"] = {kind: [1000 * median(turn[side]["where"][kind] for turn in turns) for side in (0, 1)]
                           for kind in KINDS}
    if turns[-1][0]["rate"]:
        row["of_peak"] = turns[-1][0]["operations"] / ours["seconds"] / turns[-1][0]["rate"]
    return row


def table_row(row):
    """-> a row of the Markdown table."""
    what = " ".join(str(row[name]) for name in ("what", "arch", "weights", "dtype") if row[name] != "-")
    shape = f"{row['batch']} x {row['size']} px" if row["size"] else ""
    difference = f"{row['difference']:.0e}" if "difference" in row else ""
    of_peak = f"{row['of_peak']:.0%}" if "of_peak" in row else ""
    what += " compiled" if row["compile"] else ""
    return (f"| {what} | {shape} | {row['ours_ms']:.0f} | {row['peer_ms']:.0f} | "
            f"**{row['ratio']:.2f}** ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) | {row['images_s']:.2f} | "
            f"{row['ours_gib']:.2f} | {row['peer_gib']:.2f} | {difference} | {of_peak} |")


def where_table(row):
    """-> a Markdown table of a row's time by kind of operation."""
    heading = f"| {row['what']} {row['arch']} {row['dtype']} {row['size']} px | ours (ms) | peer (ms) |"
    lines = [f"| {kind} | {ours:.0f} | {theirs:.0f} |" for kind, (ours, theirs) in row["where_ms"].items()]
    return "\n".join(["", heading, "|---|---|---|", *lines, ""])


HEADING = ("| what | batch and size | ours (ms) | peer (ms) | ratio (range over rounds) | our images per second | "
           "our peak memory (GiB) | peer's | difference of the results | of peak |\n" + "|---" * 10 + "|")


# ------------------------------------------------------------------ the command line

def arguments():
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="+", choices=list(SIDES), help="what to measure")
    add("--arch", nargs="+", choices=list(ARCHITECTURES), default=["sd21"], help="networks (default: sd21)")
    add("--size", type=int, nargs="+", default=[256], help="height and width in pixels (default: 256)")
    add("--batch", type=int, nargs="+", default=[1], help="pictures per batch; for open, in the folder (default: 1)")
    add("--dtype", nargs="+", choices=["fp32", "autocast", "bf16"], default=["fp32"],
        help="float32, bf16 autocast of float32 weights, or bf16 weights, in training with float32 adapters (default: "
        "fp32)")
    add("--weights", nargs="+", choices=["none", *lora.PRESETS], default=["base"],
        help="for train: a LoRA preset, or none for all weights (default: base)")
    add("--steps", type=int, default=4, help="for sample: Euler steps (default: 4)")
    add("--rounds", type=int, default=3, help="turns per side (default: 3)")
    add("--repeat", type=int, default=3, help="steps per turn after the warm-up; their median counts (default: 3)")
    add("--compile", action="store_true", help="torch.compile both sides")
    add("--where", action="store_true", help="also print the time by kind of operation, for unet and train")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--json", help="append the rows to this file, as JSON lines")
    return parse(parser)


def cases(args, device):
    """Yield the cases to measure, one per row of the table."""
    for what in args.what:
        shared = {"what": what, "device": device, "repeat": args.repeat}
        if what == "load":
            yield from (Case(arch=arch, dtype="fp16", **shared) for arch in args.arch)
        elif what == "open":
            yield from (Case(batch=batch, **shared) for batch in args.batch)
        elif what == "data":
            yield from (Case(size=size, batch=batch, **shared) for size in args.size for batch in args.batch)
        else:
            weights = args.weights if what == "train" else ["-"]
            for choice in itertools.product(args.arch, args.size, args.batch, args.dtype, weights):
                yield Case(what, *choice, args.steps if what == "sample" else 1, device, args.compile, args.repeat,
                           args.where and what in ("unet", "train"))


def main():
    args = arguments()
    check_range(args, 1, math.inf, "size", "batch", "steps", "rounds", "repeat")
    device = str(pick_device(args.device))
    import diffusers
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {chip}, {os.cpu_count()} cores, "
          f"{args.rounds} rounds\n\n{HEADING}", flush=True)
    for case in cases(args, device):
        row = measure(case, args.rounds)
        print(table_row(row) + (where_table(row) if row["where"] else ""), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cli(main)
