"""Reflow's pairs (Sec. 4.2): noise, the latents that a model sampled from it, and the prompt. Made, and read for
training.

A folder holds shards pairs-NUMBER.safetensors: noise and latent (n, z, h, w) in float16; prompts and settings as
metadata.
"""
import bisect
import hashlib
import json
import math
import shlex
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data import noises, progress
from support.files import from_json, open_tensors, reading, remove_partial, save_tensors, try_writing
from support.load import (
    BUNDLED_PRIOR,
    check_base,
    check_drawn,
    objective_of,
    picture_size,
    split_strength,
    unconditional,
)
from support.lora_file import adapts_text

PAIRS_PER_FILE = 256


# ------------------------------------------------------------------ reading

def read_pairs(path, tensors=("noise", "latent")):
    """A file of `sample.py --pairs` -> {"prompts": n strings, "settings": dict, "shape": (z, h, w), and the named
    tensors (n, z, h, w) in float16}. ValueError for a damaged file."""
    with reading(path, "a complete file of pairs (sample.py --pairs makes it again once it is deleted)"), \
            open_tensors(path) as file:
        metadata = file.metadata()
        prompts, settings = from_json(metadata["prompts"]), from_json(metadata["about"])
        noise, latent = ((part.get_dtype(), part.get_shape()) for part in map(file.get_slice, ("noise", "latent")))
        if noise != latent or noise[0] != "F16" or len(noise[1]) != 4 or noise[1][0] != len(prompts):
            raise ValueError(f"{len(prompts)} prompts for noise {noise} and latents {latent}")
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("the prompts are not a list of strings")
        height, width = settings["size"]
        if not all(type(side) is int and side > 0 for side in (height, width, *noise[1])):
            raise ValueError(f"size {height}x{width}, latents {noise[1]}")
        if not math.isfinite(float(settings["cfg"])):
            raise ValueError(f"cfg {settings['cfg']}")
        if not all(isinstance(settings.get(name, ""), str) for name in ("ckpt", "unet_hash", "prediction")):
            raise ValueError("ckpt, unet_hash or prediction is not a string")
        return {"prompts": prompts, "settings": settings, "shape": tuple(noise[1][1:])} | {
            name: file.get_tensor(name) for name in tensors}


def check_shape(path, about, shape):
    """ValueError if the latents in a file, of which read_pairs returned `about`, are not (z, h, w)."""
    if about["shape"] != shape:
        raise ValueError(f"{path}: its latents are {list(about['shape'])}, not {list(shape)}: delete it and run "
                         "sample.py --pairs again")


def batch_file(shard, start):
    """The file of one batch of pairs, until its shard is complete -> pairs-NUMBER.from-START.safetensors."""
    return shard.with_name(f"{shard.stem}.from-{start:05d}.safetensors")


def files_of_shard(shard):
    """The files of a shard (pairs-NUMBER.safetensors), complete or in progress, in the order of their pairs
    -> [(path, the number of its first pair in the shard, read_pairs without tensors)].

    Batches that the complete file contains as well are left over from a killed process, and are not listed.
    """
    files, n, path = [], 0, shard if shard.exists() else batch_file(shard, 0)
    while path.exists():
        about = read_pairs(path, ())
        files.append((path, n, about))
        n += len(about["prompts"])
        path = batch_file(shard, n)
    return files


class Pairs(Dataset):
    """The pairs in a folder: latents x1 and noise x0 (z, h, w), caption. The last `validation` pairs are held out:
    `pair` reads them, indexing does not. `settings`: how the pairs were made."""

    def __init__(self, folder, validation):
        self.folder, self.files, self.starts, self.shapes, self.settings, n = folder, [], [], [], None, 0
        shards = {path.with_name(path.name.split(".")[0] + ".safetensors")
                  for path in Path(folder).glob("pairs-*.safetensors")}
        if not shards:
            raise ValueError(f"{folder} has no pairs-*.safetensors: make them with sample.py --pairs N --out {folder}")
        for shard in progress(sorted(shards), "opening pairs", unit="file"):
            for path, _, about in files_of_shard(shard):
                if self.settings not in (None, about["settings"]):
                    raise ValueError(f"{path}: its pairs were made with other settings than those of {self.files[0]}")
                self.settings = about["settings"]
                self.files.append(path)
                self.starts.append(n)
                self.shapes.append(about["shape"])
                n += len(about["prompts"])
        if n <= validation:
            raise ValueError(f"{folder} has {n} pairs, of which {validation} are held out (--validation): make more")
        self.n = n - validation
        self.made_with = {"base": self.settings.get("ckpt"), "base_hash": self.settings.get("unet_hash")}
        if self.settings.get("prediction"):
            self.made_with["prediction"] = self.settings["prediction"]

    def check_model(self, sd, ckpt, init_lora, prediction):
        """Compare the model that made the pairs to `sd`, read from ckpt (None: the bundled prior). ValueError if it was
        forgotten, predicts something else, or has latents of another shape; else a warning. prediction: the given one.
        """
        is_same = self.made_with["base_hash"] == sd.unet_hash
        if ckpt is None and not is_same:
            raise ValueError(f"{self.folder}: its pairs were made with {self.made_with['base']}: pass it as --ckpt")
        check_base(self.folder, self.made_with, sd, prediction)
        if is_same and self.settings.get("lora") and not init_lora:
            print(f"warning: {self.folder}: made with the LoRA {self.settings['lora']}: pass it as --init-lora")
        for path, shape in zip(self.files, self.shapes):
            with reading(path, "pairs for this checkpoint"):
                expected = sd.latent_shape(picture_size(sd, self.settings["size"]))
                if shape != expected:
                    raise ValueError(f"{path}: its latents are {list(shape)}, those of {sd.source.path} "
                                     f"{list(expected)}: pass the --ckpt that made them, or make them again")

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        return self.pair(key % self.n)

    def pair(self, i):
        """-> the item of pair i. ValueError if it has NaN or infinity."""
        number = bisect.bisect_right(self.starts, i) - 1
        with open_tensors(self.files[number]) as file:
            row, prompts = i - self.starts[number], json.loads(file.metadata()["prompts"])
            noise, latent = (file.get_slice(name)[row].float() for name in ("noise", "latent"))
            if not (noise.isfinite().all() and latent.isfinite().all()):
                raise ValueError(f"{self.files[number]}: pair {row} has NaN or infinity: delete the file and run "
                                 "sample.py --pairs again")
            return {"x1": latent, "x0": noise, "caption": prompts[row]}


# ------------------------------------------------------------------ making

def count_made_pairs(shard, settings, shape):
    """-> how many pairs of a shard exist already. ValueError if they were made with other settings, or have another
    shape than (z, h, w)."""
    n = 0
    for path, start, made in files_of_shard(shard):
        if made["settings"] != settings:
            others = [name for name, value in settings.items() if made["settings"].get(name) != value]
            raise ValueError(f"{path}: its pairs were made with other settings; choose another --out "
                             f"(different: {', '.join(others)})")
        check_shape(path, made, shape)
        n = start + len(made["prompts"])
    return n


def save_pairs(path, noise, latent, prompts, settings):
    """Write noise and latent (n, z, h, w) with n prompts to a file that read_pairs reads."""
    save_tensors(path, {"noise": noise, "latent": latent},
                 {"prompts": json.dumps(prompts), "about": json.dumps(settings)})


def join_batches(shard, settings):
    """Join the files of a shard into one, and delete those of its batches."""
    files = [path for path, _, _ in files_of_shard(shard)]
    if len(files) > 1 or files[0] != shard:
        pairs = [read_pairs(path) for path in files]
        noise, latent = (torch.cat([part[name] for part in pairs]) for name in ("noise", "latent"))
        save_pairs(shard, noise, latent, [prompt for part in pairs for prompt in part["prompts"]], settings)
    for path in shard.parent.glob(f"{shard.stem}.from-*.safetensors"):
        path.unlink()


def pair_settings(args, sd, flow, prompts, size):
    """-> the settings that all pairs of a folder share. prompts: a list, or captions of scenes, named by their
    style."""
    prompts = prompts if isinstance(prompts, list) else prompts.scenes.style
    hashes = [hashlib.sha256(Path(file).read_bytes()).hexdigest() + (f" x {strength:g}" if strength != 1 else "")
              for file, strength in map(split_strength, args.lora)]
    return {"ckpt": args.ckpt.name, "lora": ", ".join(args.lora) or None, "prediction": sd.prediction,
            "objective": objective_of(flow),
            "seed": args.seed, "steps": args.steps, "cfg": args.cfg, "negative": args.negative, "size": size,
            "zero_snr": sd.zero_snr, "unet_hash": sd.unet_hash,
            "lora_hash": ", ".join(hashes) or None,
            "prompts_hash": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}


def make_pairs(args, sd, flow, prompts, size, settings, ranks):
    """Write args.pairs pairs (noise, latent, prompt) in float16 to the folder args.out. Pair i's noise depends on
    (seed, i) alone.

    Each batch gets a file of its own, until its shard of PAIRS_PER_FILE pairs is complete: re-run an interrupted
    command to resume. Processes of torchrun take the shards in turn.
    """
    out, shape = Path(args.out), sd.latent_shape(size)
    if ranks.is_main:               # what cannot be written is an error now, not after the first batch
        remove_partial(out, "pairs.safetensors")
        try_writing(out / "pairs.safetensors", 4 * math.prod(shape) * min(args.pairs, PAIRS_PER_FILE))
    ranks.wait()
    shards = {number: range(args.pairs)[number * PAIRS_PER_FILE:(number + 1) * PAIRS_PER_FILE]
              for number in range(ranks.rank, math.ceil(args.pairs / PAIRS_PER_FILE), ranks.count)}
    total = sum(map(len, shards.values()))
    print(f"{total:,} pairs of {2 * 2 * math.prod(shape):,} bytes, {args.steps} steps, cfg {args.cfg:g}, into {out}/")
    uncond = unconditional(sd, args.cfg, args.negative)
    with tqdm(total=total, unit="pair", dynamic_ncols=True) as bar:
        for number, wanted in shards.items():
            shard = out / f"pairs-{number:06d}.safetensors"
            made = count_made_pairs(shard, settings, shape)
            bar.update(min(made, len(wanted)))
            for start in range(made, len(wanted), args.batch):
                batch = wanted[start:start + args.batch]
                texts = [prompts[i % len(prompts)] for i in batch]
                x0 = noises(batch, shape, args.seed).half()
                x1 = flow.sample(x0.to(sd.device), sd.encode_text(texts), args.steps, uncond, args.cfg)
                check_drawn(sd, x1)
                save_pairs(batch_file(shard, start), x0, x1.half().cpu(), texts, settings)
                bar.update(len(batch))
            join_batches(shard, settings)


def reflow_command(args):
    """-> the command that trains on these pairs, from the model that made them. It goes on with a single LoRA; several,
    or one with a strength or of the text encoder, are merged into one checkpoint first."""
    words = ["python", "train.py", "--task", "reflow", "--data", args.out]
    options = ["--use-ema"] * args.use_ema + ["--zero-snr"] * args.zero_snr
    if args.prediction:
        options = ["--prediction", args.prediction, *options]
    loras = [split_strength(lora) for lora in args.lora]
    if len(loras) > 1 or any(strength != 1 or adapts_text(file) for file, strength in loras):
        merge = ["python", "-m", "tools.merge", *args.lora, "--ckpt", str(args.ckpt), "--out", "merged.safetensors"]
        return shlex.join(merge + options) + " && " + shlex.join([*words, "--ckpt", "merged.safetensors"])
    if args.ckpt != BUNDLED_PRIOR:
        words += ["--ckpt", str(args.ckpt)]
    if args.lora:
        words += ["--init-lora", *args.lora]
    return shlex.join(words + options)
