"""Run on a GPU whatever was never run on one, in the order of worth, within a budget of minutes.

    python -m tools.gpu --minutes 25        append a row to runs/gpu/rows.jsonl as soon as a part is done
    python -m tools.gpu --rehearse          the parts on the CPU, narrow networks, into runs/gpu/rehearsal.jsonl

Run it again to resume: a part whose row has no error is skipped. A part starts if the time left covers its estimate.
It runs in a process of its own, which is killed after twice the estimate, so that one part's crash ends no other. A row
has the part's name, seconds, date, hardware, version of torch, and result, or the end of its output as its error.

A result is the rows that the part wrote, or else the end of what it printed. The networks are random, with
the shapes of SD 2.1 (tools.bench writes them, 2 GB, in runs/bench/); the photographs are scikit-learn's.
"""
import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from support.files import check_range, cli, from_json, parse
from tests.checkpoints import diffusers_copy, relative
from tools import bench
from tools.bench import Case
from tools.full_size import write_photographs
from tools.kernels import Kernels

FOLDER = Path("runs/gpu")


class Sizes(NamedTuple):
    """What stands in braces in the commands of PARTS."""
    arch: str = "sd21"
    size: int = 512
    few: int = 4            # pictures per batch
    many: int = 16
    steps: int = 60         # of the runs on photographs
    repeat: int = 10
    rounds: int = 2
    device: str = "cuda"
    clip: str = "ViT-L-14"


REHEARSAL = Sizes("narrow", 64, 1, 2, 20, 1, 1, "cpu", "ViT-B-32")


# ------------------------------------------------------------------ parts that are functions: each returns its result

def weights(sizes):
    """Write the networks and the photographs that other parts use, so that no time limit counts it."""
    if not (FOLDER / "depth").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_photographs(FOLDER / "depth")
    return [str(bench.weights_file(sizes.arch)), str(bench.photographs())]


@torch.no_grad()
def parity(sizes):
    """-> {dtype: relative difference of the UNet from diffusers' in that dtype, and of both from diffusers' float32}"""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    sd, x, t, context, _ = bench.prepare(Case("unet", sizes.arch, sizes.size, 2, device=sizes.device))
    theirs = diffusers_copy(sd.unet, sd.config).to(sizes.device)
    exact, found = theirs(x, t, context).sample, {}
    for dtype in torch.float32, torch.bfloat16:
        sd.unet.to(dtype).embeddings_to(torch.float32)
        inputs = x.to(dtype), t, context.to(dtype)
        ours, peer = sd.unet(*inputs), theirs.to(dtype)(*inputs).sample
        found[str(dtype)] = [relative(ours, peer), relative(ours, exact), relative(peer, exact)]
    return found


def training_step(sizes, preset):
    """-> a function that does one step of train.py's loop, encoding included, on pictures that are on the CPU."""
    import train
    with running("train.py", f"--ckpt {bench.weights_file(sizes.arch)} --lora {preset} --device {sizes.device} "
                             f"--precision bf16"):
        args = train.arguments()
    sd, flow, trained = train.load_trainable(args, torch.device(sizes.device))
    optimizer, ema = torch.optim.Adam(trained.values(), lr=1e-5, fused=True), train.EMA(trained)
    images = torch.zeros(sizes.few, 3, sizes.size, sizes.size, dtype=torch.uint8)
    images = images.pin_memory() if sizes.device == "cuda" else images

    def step():
        batch = train.encode_batch(sd, {"image": images, "caption": ["a red boat"] * sizes.few})
        x1, x0, context, mask = train.text_to_image(sd, batch, args.caption_dropout)
        flow.loss(x1, context, x0, mask=mask).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(1000, args.ema)
    return step


@contextlib.contextmanager
def running(program, words):
    """Inside `with`, the command line is that program's."""
    before, sys.argv = sys.argv, [program, *shlex.split(words)]
    try:
        yield
    finally:
        sys.argv = before


def host_waits(step):
    """-> {file:line: how often a step makes the host wait for the GPU there}. The goal is none."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))


def profiled(sizes):
    """-> {preset: host waits, operations, kernels and milliseconds by kind, of a training step}"""
    found = {}
    for preset in "base", "small", "none":
        step = training_step(sizes, preset)
        step(), step()
        with Kernels() as counted:
            step()
        on_gpu = sizes.device == "cuda"
        with torch.profiler.profile() as profile:
            step()
        events = [event for event in profile.events() if event.device_type.name == "CUDA"]
        longest = Counter()
        for event in events:
            longest[event.name[:80]] += event.time_range.elapsed_us() / 1000
        found[preset] = {
            "host_waits": host_waits(step) if on_gpu else {}, "operations": counted.kernels, "kernels": len(events),
            "where_ms": {kind: 1000 * seconds for kind, seconds in bench.seconds_by_kind(step).items()},
            "longest_ms": dict(longest.most_common(12))}
        del step
    return found


def photographs(sizes, *more):
    """-> the last row of metrics.jsonl of a run on photographs: img_s, waiting, mem_gb."""
    with tempfile.TemporaryDirectory() as folder:
        run(f"train.py --ckpt {bench.weights_file(sizes.arch)} --data {bench.photographs()} --lora small --steps "
            f"{sizes.steps} --batch {sizes.few} --grad-accum 1 --size {sizes.size} --validation 2 --previews 2 "
            f"--preview-every 0 --device {sizes.device} --out {folder}/run", *more)
        return from_json(Path(folder, "run/metrics.jsonl").read_text().splitlines()[-1])


def cached(sizes):
    """The first run fills the cache."""
    return [photographs(sizes, "--cache", str(FOLDER / "cache")) for _ in range(2)]


def resumed(sizes):
    """-> relative difference of the LoRAs of two equal runs, and of one that was killed and resumed. 0: bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        command = (f"train.py --ckpt {bench.weights_file(sizes.arch)} --data {bench.photographs()} --lora 16 "
                   f"--steps 12 --save-every 4 --batch {sizes.few} --grad-accum 1 --size {sizes.size} "
                   f"--validation 2 --previews 2 --preview-every 0 --device {sizes.device} --lr 1e-4 --out {folder}/")
        run(command + "whole"), run(command + "again")
        process = subprocess.Popen([sys.executable, *shlex.split(command + "killed")], stdout=subprocess.DEVNULL)
        while process.poll() is None and not Path(folder, "killed/state.safetensors").exists():
            time.sleep(0.02)
        process.kill()
        process.wait()
        run(f"train.py --resume {folder}/killed")
        whole, again, killed = (torch.cat([tensor.flatten().float() for _, tensor in sorted(load_file(
            f"{folder}/{name}/lora.safetensors").items())]) for name in ("whole", "again", "killed"))
        return {"again": relative(again, whole), "resumed": relative(killed, whole)}


def depth(sizes):
    """Train two steps for depth, and find the depth of a picture -> its shape."""
    import numpy as np
    with tempfile.TemporaryDirectory() as folder:
        run(f"train.py --task depth --ckpt {bench.weights_file(sizes.arch)} --data {FOLDER}/depth "
            f"--lora small --steps 2 --batch 1 --grad-accum 1 --size {sizes.size} --validation 1 --previews 1 "
            f"--device {sizes.device} --out {folder}/run")
        run(f"depth.py {FOLDER}/depth/china.jpg --lora {folder}/run/lora.safetensors --steps 2 --ensemble 2 "
            f"--device {sizes.device} --out {folder}/found")
        return np.load(f"{folder}/found/china.npy").shape


def reflow(sizes):
    """Make pairs, and train four steps on them -> the last row of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        ckpt = f"--ckpt {bench.weights_file(sizes.arch)} --device {sizes.device}"
        run(f"sample.py {ckpt} --pairs 8 --batch {sizes.few} --steps 4 --size {sizes.size} --prompt boat "
            f"--out {folder}/pairs")
        run(f"train.py {ckpt} --task reflow --data {folder}/pairs --lora small --steps 4 --batch {sizes.few} "
            f"--grad-accum 1 --validation 2 --previews 2 --out {folder}/run")
        return from_json(Path(folder, "run/metrics.jsonl").read_text().splitlines()[-1])


def evaluate(sizes):
    """CLIP's score by a random network -> the last line of tools.evaluate. FID's network would be downloaded."""
    import open_clip
    with tempfile.TemporaryDirectory() as folder:
        save_file(open_clip.create_model(sizes.clip).state_dict(), f"{folder}/clip.safetensors")
        Path(folder, "prompts.txt").write_text("a boat\n" * 64)
        run(f"-m tools.evaluate {bench.photographs()}/all --clip {sizes.clip} {folder}/clip.safetensors --prompts "
            f"{folder}/prompts.txt --device {sizes.device}")
        return "ran"


def run(command, *more):
    """Run one of our programs. CalledProcessError if it fails."""
    subprocess.run([sys.executable, *shlex.split(command), *more], check=True)


# ------------------------------------------------------------------ the parts

BENCH = "-m tools.bench {what} --arch {arch} --size {size} --device {device} --repeat {repeat} --json {json} --rounds "
EAGER, COMPILED = BENCH + "{rounds} ", BENCH + "1 --compile "


def benched(command, what, more):
    return command.replace("{what}", what) + more


PARTS = [  # (name, estimate in minutes on an H100, a function or a command), in the order of worth
    ("weights and photographs", 1.5, weights),
    ("pytest -m gpu", 3, "-m pytest -m gpu -q tests"),
    ("parity of the UNet", 1, parity),
    ("unet", 2.5, benched(EAGER, "unet", "--dtype bf16 --batch {few} {many}")),
    ("train by LoRA", 5, benched(EAGER, "train", "--dtype bf16 --weights base small --batch {few} {many}")),
    ("train all weights", 3, benched(EAGER, "train", "--dtype autocast --weights none --batch {few} {many}")),
    ("profile", 1.5, profiled),
    ("unet compiled", 3, benched(COMPILED, "unet", "--dtype bf16 --batch {few}")),
    ("train base compiled", 6, benched(COMPILED, "train", "--dtype bf16 --weights base --batch {many}")),
    ("sample", 2, benched(EAGER, "sample", "--dtype bf16 --batch {few}")),
    ("photographs", 2, photographs),
    ("photographs with --cache", 3, cached),
    ("killed and resumed", 3, resumed),
    ("pairs and Reflow", 2, reflow),
    ("depth", 2, depth),
    ("tools.evaluate", 1, evaluate),
    ("sample compiled", 4, benched(COMPILED, "sample", "--dtype bf16 --batch {few}")),
    ("train all weights compiled", 6, benched(COMPILED, "train", "--dtype autocast --weights none --batch {many}")),
    ("train small compiled", 6, benched(COMPILED, "train", "--dtype bf16 --weights small --batch {few}")),
    ("unet compiled, large batch", 3, benched(COMPILED, "unet", "--dtype bf16 --batch {many}")),
    ("unet of SDXL", 3, "-m tools.bench unet --arch sdxl --size 1024 --dtype bf16 --batch {few} --json {json}"),
    ("all tests", 10, "-m pytest -q -n auto"),
]
NOT_REHEARSED = {name for name, _, _ in PARTS if "compiled" in name} - {"unet compiled"} | {"unet of SDXL", "all tests"}


def hardware():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def attempt(name, what, sizes, seconds):
    """Run a part in a process of its own, for at most so many seconds -> {"result"} or {"error"}."""
    with tempfile.TemporaryDirectory() as folder:
        words = {**sizes._asdict(), "json": f"{folder}/rows.jsonl"}
        command = shlex.split(what.format(**words)) if isinstance(what, str) else [
            "-m", "tools.gpu", "--part", name, words["json"], *(["--rehearse"] if sizes is REHEARSAL else [])]
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, errors="replace", start_new_session=True)
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)          # and the processes that it started
            return {"error": f"stopped after {seconds:.0f} s: {process.communicate()[0][-2000:]}"}
        if process.returncode:
            return {"error": f"exit code {process.returncode}: {printed[-4000:]}"}
        rows = Path(words["json"])
        if rows.exists():
            return {"result": [from_json(line) for line in rows.read_text().splitlines()]}
        return {"result": printed.strip()[-200:]}


def done(out, machine):
    """-> names of the parts that the file has a row of without an error, on this hardware."""
    rows = [from_json(line) for line in out.read_text().splitlines() if line.endswith("}")] if out.exists() else []
    return {row["name"] for row in rows if row["hardware"] == machine and "error" not in row}


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25,
                        help="budget; a part starts if the time left covers its estimate (default: 25)")
    parser.add_argument("--out", help="file of the rows (default: runs/gpu/rows.jsonl)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with narrow networks")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args, begin = parse(parser), time.monotonic()
    check_range(args, 0, math.inf, "minutes")
    sizes = REHEARSAL if args.rehearse else Sizes()
    if not args.rehearse and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device: --rehearse runs the parts on the CPU")
    if args.part:
        part, file = args.part
        Path(file).write_text(json.dumps(next(what for name, _, what in PARTS if name == part)(sizes)) + "\n")
        return
    out, machine = Path(args.out or FOLDER / ("rehearsal.jsonl" if args.rehearse else "rows.jsonl")), hardware()
    out.parent.mkdir(parents=True, exist_ok=True)
    finished = done(out, machine) | (NOT_REHEARSED if args.rehearse else set())
    for name, minutes, what in PARTS:
        left = args.minutes - (time.monotonic() - begin) / 60
        if name in finished or left < minutes:
            print(f"{name}: {'left out' if name in finished else f'needs {minutes:g} minutes, {left:.1f} are left'}")
            continue
        start = time.monotonic()
        row = {"name": name, **attempt(name, what, sizes, 60 * min(2 * minutes, left))}
        row |= {"seconds": round(time.monotonic() - start, 1), "date": time.strftime("%Y-%m-%d %H:%M"),
                "hardware": machine, "torch": torch.__version__}
        with open(out, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}: {row['seconds']:.0f} s, {row.get('error', row.get('result'))}", flush=True)


if __name__ == "__main__":
    cli(main)
