"""Try full-size files: load a 4 GB checkpoint, measure the memory, compare with diffusers, train on it.

    python -m tools.full_size sd15 sd21            read: peak memory, seconds, float32 parity with diffusers, folders
    python -m tools.full_size sd15 sd21 --train    train two steps on photographs by each task, LoRA in diffusers
    python -m tools.full_size sd21 --cache         seconds of a training batch with --cache and without, in turns
    python -m tools.full_size sdxl                 read and compare, one side after the other (15 GB of memory)
    python -m tools.full_size sdxl --train         two steps of LoRA 16 in bf16, killed and resumed

The files are random, in the real layout, written to the temporary folder (7 GB) and deleted at the end. Peak memory is
VmHWM after loading minus VmHWM after the imports. float32 weights are views of the mapped file, so every weight is read
once before the measurement.
"""
import argparse
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

import lora
import train
from support.cache import fill_cache
from support.checkpoint import load_checkpoint
from support.files import cli, parse
from support.lora_file import load_lora, save_lora
from support.processes import Ranks
from tests import checkpoints
from tests.checkpoints import CONFIGS, PROMPTS, manifest, relative

ROOT = Path(__file__).parent.parent
FEW = "--steps 2 --batch 1 --grad-accum 1 --validation 2 --previews 2 --lr 1e-3 --ema 0"


def write_random_checkpoint(name, path):
    """Write a .safetensors file tensor by tensor, so that it is never in memory as a whole."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64"}
    header, offset = {}, 0
    for key, (shape, dtype) in manifest(name).items():
        size = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    torch.manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for key, (shape, dtype) in manifest(name).items():
            checkpoints.random_tensor(key, shape, dtype).to(dtype).numpy().tofile(file)


# ------------------------------------------------------------------ measurements, each in its own process

def peak():
    """-> the highest resident memory of this process so far, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def measure_reading(path, dtype):
    import open_clip  # noqa: F401  before the baseline, since load_checkpoint imports it
    before, start = peak(), time.time()
    sd = load_checkpoint(path, dtype=dtype)
    for parameter in sd.parameters():
        parameter.max()
    weights = sum(p.numel() * p.element_size() for p in sd.parameters()) / 2**20
    bound = 1.25 * weights + 512
    print(f"  {dtype}: weights {weights:.0f} MiB, peak {peak() - before:.0f} MiB, bound {bound:.0f} MiB: "
          f"{'ok' if peak() - before <= bound else 'EXCEEDED'}; {time.time() - start:.1f} s")


@torch.inference_mode()
def compare_networks(name, path):
    config = CONFIGS[name]
    torch.manual_seed(1)
    x, context, images, latents = (torch.randn(*shape) for shape in (
        (2, 4, 32, 32), (2, 77, config.context_width), (1, 3, 128, 128), (1, 4, 16, 16)))
    t_dm, pooled = torch.tensor([3.3, 900.0]), torch.randn(2, 1, config.context_width)
    pooled[:, :, config.pooled_width:] = 0
    sd = load_checkpoint(path)
    with_pooled = torch.cat([context, pooled], 1) if config.is_xl else context
    ours = {"UNet": sd.unet(x, t_dm, with_pooled), "decoder": sd.decode(latents), "text": sd.encode_text(PROMPTS)}
    ours["encoder mean"], ours["encoder std"] = sd.first_stage_model.moments(images)
    del sd                                              # two of SDXL are too much for one memory
    sd = checkpoints.references(config, load_file(path))
    posterior, more = sd.vae.encode(images).latent_dist, {}
    if config.is_xl:
        more = {"added_cond_kwargs": {"text_embeds": pooled[:, 0, :config.pooled_width],
                                      "time_ids": torch.tensor([[256, 256, 0, 0, 256, 256]] * 2)}}
    theirs = {"UNet": sd.unet(x, t_dm, context, **more).sample, "encoder mean": posterior.mean,
              "encoder std": posterior.std, "decoder": sd.vae.decode(latents / config.latent_scale).sample,
              "text": text_of_references(config, sd)}
    results = {what: relative(ours[what][:, :77] if what == "text" else ours[what], theirs[what]) for what in theirs}
    print("  relative difference in float32: " + ", ".join(f"{what} {value:.1e}" for what, value in results.items())
          + f"; bound 2e-05: {'ok' if max(results.values()) <= 2e-5 else 'EXCEEDED'}")


def text_of_references(config, theirs):
    """-> the text embedding (B, 77, D) of PROMPTS by transformers."""
    if not config.is_xl:
        return theirs.text(checkpoints.clip_ids(PROMPTS, 0 if config.open_clip else 49407)).last_hidden_state
    towers = (theirs.text, 49407), (theirs.text_2, 0)
    return torch.cat([tower(checkpoints.clip_ids(PROMPTS, pad_token), output_hidden_states=True).hidden_states[-2]
                      for tower, pad_token in towers], dim=-1)


@torch.no_grad()
def compare_lora(path, adapter):
    sd = load_checkpoint(path)
    torch.manual_seed(1)
    x, context, t_dm = torch.randn(1, 4, 32, 32), torch.randn(1, 77, sd.config.context_width), torch.tensor([500.0])
    plain, theirs = sd.unet(x, t_dm, context), checkpoints.diffusers_copy(sd.unet, sd.config)
    load_lora(adapter, sd.unet)
    ours = sd.unet(x, t_dm, context)
    checkpoints.diffusers_pipeline(theirs).load_lora_weights(adapter)
    print(f"  diffusers with the LoRA against ours: {relative(theirs(x, t_dm, context).sample, ours):.1e}; "
          f"with the LoRA against without: {relative(plain, ours):.2f}")


@torch.no_grad()
def compare_folder(name, path):
    """Compare a diffusers folder of the same weights with the single file, bit for bit. Then merge a LoRA into the
    single file, and compare diffusers' from_single_file of it with our base and LoRA."""
    from diffusers import StableDiffusionPipeline
    folder, merged, sd = Path(path).with_suffix(""), Path(path).with_name("merged.safetensors"), load_checkpoint(path)
    prediction = sd.prediction
    checkpoints.full_pipeline(CONFIGS[name], load_file(path), prediction).save_pretrained(folder)
    start = time.time()
    read = load_checkpoint(folder)
    seconds, theirs = time.time() - start, read.state_dict()
    ours = {key: value for key, value in sd.state_dict().items() if key in theirs}
    print(f"  diffusers folder: read in {seconds:.1f} s, {len(theirs)} parameters, "
          f"{'equal to those of the file' if checkpoints.same(ours, theirs) else 'DIFFERENT'}")
    del read, theirs, ours
    torch.manual_seed(1)
    for parameter in lora.inject(sd.unet, 16):
        parameter.data += 0.02 * torch.randn_like(parameter)
    adapter = Path(path).with_name("adapter.safetensors")
    save_lora(sd.unet, adapter, {"prediction": prediction, "base": Path(path).name, "base_hash": sd.unet_hash})
    run("-m", "tools.merge", adapter, "--ckpt", path, "--out", merged)
    x, context, t_dm = torch.randn(1, 4, 32, 32), torch.randn(1, 77, sd.config.context_width), torch.tensor([500.0])
    ours = sd.unet(x, t_dm, context)
    del sd
    pipeline = StableDiffusionPipeline.from_single_file(str(merged), config=str(folder), local_files_only=True)
    print("  merged file in diffusers against our base and LoRA: "
          f"{relative(pipeline.unet(x, t_dm, context).sample, ours):.1e}")
    merged.unlink()
    shutil.rmtree(folder)


def measure_cache(path, sizes=(64, 128, 256), turns=5):
    """Print the process time, which other jobs hardly change, of a batch of two photographs with --cache and without,
    in turns. The first turn is slower and does not count."""
    folder, cpu = Path(path).parent, torch.device("cpu")
    sys.argv = f"train.py --ckpt {path} --data {folder}/photos --cache {folder}/cache --lora 16".split()
    args = train.arguments()
    args.precision = "fp32"
    sd, flow, _ = train.load_trainable(args, cpu)
    for size in sizes:
        args.size = [size]
        live = train.open_data(args, sd)[0]
        datasets, seconds = {"without": live, "with": fill_cache(args, sd, live, Ranks(cpu))}, {}
        for turn in range(turns + 1):
            for what, dataset in datasets.items():
                begin = time.process_time()
                batch = train.encode_batch(sd, default_collate([dataset[2 * turn], dataset[2 * turn + 1]]))
                x1, x0, context, mask = train.text_to_image(sd, batch)
                flow.loss(x1, context, x0, None, mask).backward()
                seconds.setdefault(what, []).append(time.process_time() - begin)
        without, cached = (statistics.median(seconds[what][1:]) for what in ("without", "with"))
        print(f"  {size} px: a batch of 2 takes {without:.2f} s without --cache, {cached:.2f} s with it, "
              f"{without / cached:.2f} times as many images per second", flush=True)


def measure(what, name, path):
    if what == "folder":
        compare_folder(name, path)
    elif what == "pickle":
        torch.save({"state_dict": load_file(path)}, Path(path).with_suffix(".ckpt"))
    elif what == "lora":
        compare_lora(name, path)
    elif what == "cache":
        measure_cache(path)
    elif what == "compare":
        compare_networks(name, path)
    else:
        measure_reading(path, getattr(torch, what))


# ------------------------------------------------------------------ the runs

def run(*words):
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


def read(name, path):
    if name == "sdxl":
        for what in ("compare", "bfloat16"):
            run("-m", "tools.full_size", "--measure", what, name, path)
        return
    for what in ("compare", "folder", "float32", "bfloat16", "pickle"):
        run("-m", "tools.full_size", "--measure", what, name, path)
    path.unlink()
    for what in ("float32", "bfloat16"):
        run("-m", "tools.full_size", "--measure", what, name, path.with_suffix(".ckpt"))


def write_photographs(folder):
    """Write NAME.jpg, NAME.txt and NAME.npy (a smooth depth) of three photographs."""
    import matplotlib
    import sklearn.datasets
    photos = Path(sklearn.datasets.__file__).parent / "images"
    folder.mkdir()
    for source in (photos / "china.jpg", photos / "flower.jpg",
                   Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"):
        shutil.copy(source, folder)
        (folder / source.name).with_suffix(".txt").write_text(source.stem.replace("_", " "))
        with Image.open(source, formats=["JPEG"]) as image:
            np.save(folder / f"{source.stem}.npy", np.linspace(2, 9, image.height)[:, None] * np.ones(image.width))


def train_all(name, path):
    folder = path.parent
    photos = folder / "photos"
    write_photographs(photos)

    def script(what, words):
        start = time.time()
        run(*words.split(), "--ckpt", path)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"  {what}: {time.time() - start:.0f} s, peak memory so far {memory:.1f} GiB", flush=True)

    if name == "sdxl":
        words = (f"train.py {FEW} --data {photos} --size 128 --precision bf16 --lora 16 --validation 1 --previews 1 "
                 f"--preview-every 0 --steps 1 --out {folder}/run")
        script("LoRA 16, one step", words)
        run("train.py", "--resume", folder / "run", "--steps", 2)
        return
    for preset in ("base", "small"):
        script(f"LoRA {preset}", f"train.py {FEW} --data {photos} --size 256 --lora {preset} --out {folder}/{preset}")
        run("-m", "tools.full_size", "--measure", "lora", path, folder / preset / "lora.safetensors")
    script("Reflow's pairs", f"sample.py --pairs 4 --steps 2 --batch 1 --size 256 --data {photos} --out {folder}/pairs")
    script("Reflow", f"train.py {FEW} --task reflow --data {folder}/pairs --out {folder}/reflow")
    run("-m", "tools.full_size", "--measure", "lora", path, folder / "reflow" / "lora.safetensors")
    script("depth", f"train.py {FEW} --task depth --data {photos} --size 192 256 --lora small --out {folder}/depth")
    script("a photograph's depth", f"depth.py {photos}/china.jpg --lora {folder}/depth/lora.safetensors --steps 2 "
                                   f"--ensemble 2 --out {folder}/found")
    found = np.load(folder / "found" / "china.npy")
    print(f"  depth {found.shape}, from {found.min():.2f} to {found.max():.2f}", flush=True)


def cache(name, path):
    write_photographs(path.parent / "photos")
    run("-m", "tools.full_size", "--measure", "cache", name, path)


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.full_size", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="sd15, sd21 or sdxl")
    parser.add_argument("--train", action="store_true", help="train on the files instead")
    parser.add_argument("--cache", action="store_true", help="measure training with --cache instead")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.measure:
        measure(*args.measure)
    for name in args.names:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.safetensors"
            write_random_checkpoint(name, path)
            print(f"{name}: {path.stat().st_size / 2**20:.0f} MiB in {len(manifest(name))} tensors", flush=True)
            (train_all if args.train else cache if args.cache else read)(name, path)


if __name__ == "__main__":
    cli(main)
