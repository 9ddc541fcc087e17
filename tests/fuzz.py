"""Broken input of every kind must give a result or a one-line error that names the file: no traceback, no lost file.

    python -m tests.fuzz                1,100 cases, two to seven minutes on one core; exit code 1 if there is a fault
    python -m tests.fuzz --cases 50     the first fifty cases, which include all kinds
    python -m tests.fuzz 417            case 417 alone, with all of its output

A case depends on its number alone. It copies good files, breaks one of them, and runs a command on it in this process,
with a time limit. Its outcome is
    result      exit code 0, for input that may be good enough
    warned      exit code 0 and a warning that names the file, for input that may be skipped
    refused     exit code 2 and a one-line error that names the file or the flag
or a fault: traceback, silent (a result from input that is known to be bad), unnamed (the error does not name the file),
hang, executed (code in a file ran), half-written (a *.partial.* file remains), lost (a file was changed or deleted).
"""
import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import depth
import sample
import train
from model import TINY, StableDiffusion
from support.checkpoint import save_checkpoint
from support.names import UNET, VAE, folder_names
from tests.runs import call, metadata, picture_bytes, save_photo, save_photos, save_tar, working_in, works
from tools import evaluate, measure_depth, merge
from toy import make_prior

CASES = 1100
SECONDS = 60                    # time limit of a command
MORE_MEMORY = 6 * 2**30         # bytes of address space that a case may add to those of the process
DRAW = "--n 1 --steps 1 --cfg 1 --size 32 --device cpu "
LEARN = "--batch 1 --grad-accum 1 --validation 1 --previews 1 --scenes 2 --preview-every 0 --device cpu "
LORA = "--lora 2 "
DEEP = '{"a":' * 50_000
ODD = ["", " ", "nan", "inf", "-1", "0", "1e999", "9" * 30, "64 64 64", "[]", "{}", "null", "abc", "é\u200b🦊", "../x",
       "x" * 3000, "v", "fm", "\x00", DEEP]
ODD_JSON = [None, True, -1, 0, 1e300, float("nan"), 10**30, "", "abc", [], {}, [[]], {"a": []}, "x" * 3000]
PROMPTS = ["a" * 20_000, "東" * 5_000, "🦊" * 3_000, "&amp;" * 4_000, "a\tb\u00a0c", "\u202e\u0000\x07",
           "e" + "\u0301" * 2_000, "a " * 5_000, "<start_of_text>", "\ufeff", "%s {0} \\n", "'ll 't", "ÿ" * 500,
           "a\x85b\u2028c", "-n"]


@dataclass
class Case:
    """A command on broken input."""
    what: str                       # what is broken, and how
    module: object                  # the script
    words: str                      # its command line
    names: str = ""                 # text that the error must contain
    known_bad: bool = False         # the input must be refused
    may_be_skipped: bool = False    # or skipped with a warning
    environment: dict = field(default_factory=dict)     # variables of the process
    stderr: object = io.StringIO                        # -> the stream that it is started with


# ------------------------------------------------------------------ good files

def tiny_model(version):
    """version: "1.x", "2.x" or "XL"."""
    torch.manual_seed(0)
    is_open_clip = version == "2.x"
    config = replace(TINY, unet_widths=(32, 64), vae_widths=(32, 32, 32), text_layers=2, open_clip=is_open_clip,
                     text_projection=is_open_clip)
    if version == "XL":
        config = replace(config, linear_projection=True, context_width=96, pooled_width=64, pooled_layers=2)
    sd = StableDiffusion(config, "v")
    for parameter in sd.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return sd


def save_folder(sd, path):
    """Write `sd` as a diffusers folder."""
    parts, config = collections.defaultdict(dict), sd.config
    for parameter, value in sd.state_dict().items():
        names = folder_names(parameter, config)
        for name, tensor in zip(names, value.half().chunk(len(names))):
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor.clone()
    heads = [config.heads(width) for width in config.unet_widths]
    configs = {
        "model_index.json": {"_class_name": f"StableDiffusion{'XL' * config.is_xl}Pipeline"},
        "unet/config.json": {
            "block_out_channels": list(config.unet_widths), "layers_per_block": config.unet_res_blocks,
            "down_block_types": ["CrossAttn" * (depth > 0) + "DownBlock2D" for depth in config.transformer_depth],
            "cross_attention_dim": config.context_width, "in_channels": 4, "out_channels": 4,
            "attention_head_dim": heads},
        "vae/config.json": {"block_out_channels": list(config.vae_widths), "layers_per_block": config.vae_res_blocks,
                            "latent_channels": 4, "scaling_factor": config.latent_scale},
        "text_encoder/config.json": {"hidden_act": "quick_gelu", "hidden_size": config.text_width,
                                     "num_hidden_layers": config.text_layers, "vocab_size": config.vocabulary},
        "scheduler/scheduler_config.json": {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear",
                                            "beta_start": 0.00085, "beta_end": 0.012}}
    for name, content in configs.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(content))
    for part, tensors in parts.items():
        (path / part).mkdir(exist_ok=True)
        save_file(tensors, path / part / "model.safetensors")


def save_clip(good):
    """Write the weights of a random CLIP, named small-clip in open_clip, and of an aesthetics predictor."""
    (good / "configs").mkdir()
    (good / "configs/small-clip.json").write_text(json.dumps({
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}))
    open_clip.add_model_config(good / "configs")
    torch.save(open_clip.create_model("small-clip").half().state_dict(), good / "clip.pth")
    torch.save({"layers.0.weight": torch.randn(3, 16), "layers.0.bias": torch.randn(3),
                "layers.2.weight": torch.randn(1, 3), "layers.2.bias": torch.randn(1)}, good / "head.pth")


def save_depth_folder(folder):
    """Write two pictures with depth, one as .npy and one as a 16-bit .png, and predictions for them."""
    for name in "ab":
        save_photo(folder / f"depth/{name}.jpg", 32, 48)
        metres = np.random.default_rng(0).uniform(1, 9, (32, 48))
        for part in "depth", "predicted":
            (folder / part).mkdir(exist_ok=True)
        np.save(folder / f"predicted/{name}.npy", np.log(metres).astype(np.float32))
        if name == "a":
            np.save(folder / "depth/a.npy", metres.astype(np.float32))
        else:
            Image.fromarray((metres * 1000).astype(np.uint16)).save(folder / "depth/b.png")
    (folder / "list.txt").write_text("a.jpg a.npy\nb.jpg b.png\n")


def make_good(folder):
    """Write the good files -> their folder."""
    good = folder / "good"
    good.mkdir()
    sd = tiny_model("2.x")
    save_checkpoint(sd, good / "tiny.safetensors", torch.float16, resolution="64", style="solid", cfg="2")
    torch.save({"state_dict": load_file(good / "tiny.safetensors")}, good / "tiny.ckpt")
    save_folder(tiny_model("1.x"), good / "folder")
    save_checkpoint(tiny_model("XL"), good / "xl.safetensors", torch.float16, resolution="64")
    save_folder(tiny_model("XL"), good / "xl")
    save_photos(good / "photos")
    save_depth_folder(good)
    save_clip(good)
    (good / "prompts.txt").write_text("a red boat\na tree\n")
    save_tar(good / "a.tar", {f"{i}.{end}": content for i in range(3)
                              for end, content in (("png", picture_bytes(i)), ("txt", b"a boat"))})
    with working_in(good, good / "tiny.safetensors"):
        works(train, LEARN + LORA + f"--size 32 --steps 1 --data photos --ckpt {good}/tiny.safetensors --out runs/one")
        works(sample, DRAW + "--pairs 3 --prompt a --prompt b --out pairs")
        works(make_prior, "autoencoder --steps 1 --batch 1 --scenes 2 --validation 1 --device cpu --out prior")
        shutil.copy("runs/one/lora.safetensors", "lora.safetensors")
    return good


# ------------------------------------------------------------------ ways to break a file

def break_bytes(rng, path):
    """Break any file -> what was done, and whether the file cannot be readable now."""
    content = path.read_bytes()
    how = rng.choice(["cut", "empty", "bits", "zeros", "text", "noise", "folder", "gone", "doubled"])
    if how in ("folder", "gone"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        return how, True
    changed = bytearray(content)
    if how == "bits":
        for _ in range(rng.choice([1, 8, 64])):         # anywhere, or only in the header
            place = rng.randrange(min(len(content), rng.choice([64, 4096, len(content)])))
            changed[place] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        start = rng.randrange(len(content))
        changed[start:start + 256] = bytes(len(changed[start:start + 256]))
    else:
        cut = content[:rng.randrange(1, max(2, len(content) // 2))]
        changed = {"cut": cut, "empty": b"", "text": b"<html>no</html>", "noise": rng.randbytes(2000),
                   "doubled": content + content}[how]
    path.write_bytes(changed)
    return how, how in ("cut", "empty", "text", "noise")


def break_header(rng, path):
    """Break the JSON header of a .safetensors file."""
    content = path.read_bytes()
    size, = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8:8 + size]), content[8 + size:]
    name = rng.choice([name for name in header if name != "__metadata__"])
    how = rng.choice(["dtype", "shape", "offsets", "deep", "length", "no JSON", "list", "entry", "metadata"])
    if how == "dtype":
        header[name]["dtype"] = rng.choice(["F8_E8M0", "BOOL", "I8", "F64", "X", "F4", "C64", "U16", None])
    elif how == "shape":
        header[name]["shape"] = rng.choice([[], [-1], [2**62], [0], "x", header[name]["shape"][::-1] + [1]])
    elif how == "offsets":
        header[name]["data_offsets"] = rng.choice([[0, 2**60], [5, 3], [0], [-1, 2]])
    elif how == "entry":
        header[name] = rng.choice(ODD_JSON)
    elif how == "metadata":
        header["__metadata__"] = rng.choice([{"a": 1}, [], "x", {"args": {}}])
    text = json.dumps(header).encode()
    text = {"deep": DEEP.encode(), "no JSON": text[:-2], "list": b"[]"}.get(how, text)
    length = rng.choice([2**63, 2**40, 1, 0]) if how == "length" else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return f"header, {how}", how in ("deep", "length", "no JSON", "list", "offsets", "entry", "metadata")


PARTS = [UNET, f"{UNET}input_blocks", f"{UNET}middle_block", f"{UNET}time_embed", VAE, f"{VAE}encoder.down",
         f"{VAE}decoder.up", "cond_stage_model", "resblocks", "token_embedding", ""]


def break_parts(rng, path):
    """Remove a whole part of a checkpoint, or store the tensors of a part as 4-bit numbers, a quarter of their bytes.
    """
    content = path.read_bytes()
    size, = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8:8 + size]), content[8 + size:]
    part, how, kept, changed = rng.choice(PARTS), rng.choice(["without", "4-bit"]), [], {}
    for name, entry in header.items():
        if name == "__metadata__":
            changed[name] = entry
            continue
        piece = data[slice(*entry["data_offsets"])]
        if part in name:
            if how == "without":
                continue
            entry["dtype"], piece = "F4", piece[:len(piece) // 4]
        start = sum(map(len, kept))
        changed[name] = entry | {"data_offsets": [start, start + len(piece)]}
        kept.append(piece)
    text = json.dumps(changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(kept))
    return f"{how} {part or 'everything'}", True


def break_tensor(rng, path, key=""):
    """Break a tensor whose name contains `key`."""
    tensors, written = load_file(path), metadata(path)
    name = rng.choice(sorted(name for name in tensors if key in name))
    tensor = tensors[name]
    how = rng.choice(["NaN", "inf", "shape", "one number", "missing", "ints", "empty", "complex"])
    tensors[name] = {"NaN": lambda: tensor * float("nan"), "inf": lambda: tensor + float("inf"),
                     "shape": lambda: torch.cat([tensor.flatten(), torch.ones(1).to(tensor)]),
                     "one number": lambda: torch.ones((1,) * (tensor.ndim + 1)).to(tensor),
                     "ints": lambda: torch.ones(tensor.shape, dtype=torch.int32), "empty": lambda: tensor.flatten()[:0],
                     "complex": lambda: tensor.float() + 1j, "missing": lambda: None}[how]()
    if how == "missing":
        del tensors[name]
    save_file(tensors, path, written)
    return f"{how} in {name}", True


def break_metadata(rng, path, names):
    """Change an entry of a .safetensors file's metadata, which may still be good enough."""
    written = metadata(path) or {}
    name = rng.choice(names)
    written[name] = rng.choice(ODD)
    if rng.random() < 0.1:
        written.pop(name)
    save_file(load_file(path), path, written)
    return f"metadata {name} = {written.get(name)!r:.40}", False


def break_value(rng, value):
    """JSON -> the same with one value replaced or removed."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ODD_JSON)
    places = list(value) if isinstance(value, dict) else range(len(value))
    place = rng.choice(places)
    if rng.random() < 0.2:
        del value[place]
    else:
        value[place] = break_value(rng, value[place])
    return value


def break_json(rng, path):
    if rng.random() < 0.1:
        path.write_text(DEEP)
        return "deep", True
    value = break_value(rng, json.loads(path.read_text()))
    path.write_text(json.dumps(value))
    return f"JSON {value!r:.60}", False


def break_config(rng, path):
    """Give a list in a network's config.json another length, or a number another size; it may be unused."""
    config = json.loads(path.read_text())
    name = rng.choice([name for name, value in config.items() if isinstance(value, (list, int))])
    value = config[name]
    config[name] = rng.choice([[], value * 2, value * 50_000, value[:1], [0] * len(value), [10**9] * len(value)]
                              if isinstance(value, list) else [0, -1, 7, 100_000, 10**30, [], [value], [value] * 7])
    path.write_text(json.dumps(config))
    return f"{name} {config[name]!r:.50}", False


class Intruder:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


def hide_code(rng, path):
    """Replace a file by a pickle that contains code."""
    content = {"state_dict": {"x": Intruder(), "y": torch.ones(1)}, "z": Intruder()}
    if rng.random() < 0.5:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    else:
        path.write_bytes(pickle.dumps(content))
    return "code", True


def break_pickle(rng, path):
    """Replace a file by a pickle of something else than plain tensors, or one that contains code."""
    if rng.random() < 0.3:
        return hide_code(rng, path)
    content = rng.choice([[], {}, 5, None, {"state_dict": 3}, {"state_dict": {}}, {1: torch.ones(1)}, {"x": [1]},
                          {"x": torch.ones(1).to_sparse()}, {"x": torch.ones((), dtype=torch.int8)},
                          {"x": torch.nn.Parameter(torch.ones(2))}, torch.ones(3), {"x": torch.ones(0, device="meta")}])
    torch.save(content, path)
    return f"pickle of {content!r:.50}", True


def odd_text(rng):
    return rng.choice([rng.choice(PROMPTS), "".join(map(chr, rng.sample(range(32, 0xD7FF), 40))),
                       "\n".join(rng.choice(PROMPTS) for _ in range(3))])


# ------------------------------------------------------------------ the cases, by kind

def copied(good, name):
    """-> the path of a copy of a good file or folder, in the case's own folder."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if (good / name).is_dir() else shutil.copy)(good / name, path)
    return path


def of_safetensors(rng, path, names, key=""):
    """Break a .safetensors file in one of four ways. names: of metadata; key: part of a tensor's name."""
    return rng.choice([break_bytes, break_header, lambda r, p: break_tensor(r, p, key),
                       lambda r, p: break_metadata(r, p, names)])(rng, path)


METADATA = ["resolution", "prediction", "modelspec.prediction_type", "cfg", "style", "objective", "task", "zero_snr",
            "image_input", "lora_adapter_metadata"]


def checkpoint(rng, good):
    path = copied(good, rng.choice(["tiny.safetensors", "tiny.safetensors", "xl.safetensors"]))
    if rng.random() < 0.25:
        what, bad = break_parts(rng, path)
    else:
        what, bad = of_safetensors(rng, path, METADATA, rng.choice([UNET, VAE]))
    size = rng.choice(["", "--size 32 "])
    return Case(what, sample, f"--n 1 --steps 1 --device cpu {size}--ckpt {path}", path.name, bad)


def pickled_checkpoint(rng, good):
    path = copied(good, "tiny.ckpt")
    what, bad = rng.choice([break_bytes, break_pickle, hide_code])(rng, path)
    return Case(what, sample, DRAW + f"--ckpt {path}", path.name, bad)


def diffusers_folder(rng, good):
    path = copied(good, rng.choice(["folder", "xl"]))
    file = rng.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    if file.name == "config.json" and rng.random() < 0.5:
        what, bad = break_config(rng, file)
    elif file.suffix == ".json":
        what, bad = rng.choice([break_bytes, break_json, break_json])(rng, file)
    else:
        what, bad = of_safetensors(rng, file, ["format"])
    return Case(f"{file}: {what}", sample, DRAW + f"--ckpt {path}", path.name, bad)


def lora_file(rng, good):
    path = copied(good, "lora.safetensors")
    tensors, written = load_file(path), metadata(path)
    if rng.random() < 0.3:
        name = min(tensors).partition(".")[0]
        alpha = torch.tensor(rng.choice([float("nan"), float("inf"), [1.0, 1.0], [], 1j]))
        save_file(tensors | {f"{name}.alpha": alpha}, path, written)
        what, bad = f"alpha {alpha}", True
    else:
        what, bad = of_safetensors(rng, path, [*METADATA, "base", "base_hash"])
    use = rng.choice(["merge", "train", "sample", "sample", "sample"])
    if use == "merge":
        words = f"{path} --ckpt {good}/tiny.safetensors --out merged.safetensors"
        return Case(what, merge, words, path.name, bad)
    if use == "train":
        words = LEARN + f"--init-lora {path} --ckpt {good}/tiny.safetensors --size 32 --steps 1 --out run"
        return Case(what, train, words, path.name, bad)
    base = rng.choice(["", f"--ckpt {good}/tiny.safetensors "])
    return Case(what, sample, f"--n 1 --steps 1 --device cpu --lora {path} {base}", path.name, bad)


def run_state(rng, good):
    os.cpu_count = lambda: 0                                    # the DataLoader stays in this process
    path = copied(good, "runs/one") / "state.safetensors"
    if rng.random() < 0.4:
        written = metadata(path)
        before, settings = json.loads(written["args"]), break_value(rng, json.loads(written["args"]))
        written["args"] = json.dumps(settings)
        save_file(load_file(path), path, written)
        if isinstance(settings, dict):
            settings = {name: settings.get(name, "removed") for name in before if settings.get(name) != before[name]}
        return Case(f"args {settings!r:.60}", train, f"--resume {path.parent} --steps 2")
    what, bad = of_safetensors(rng, path, ["args", "step", "base_hash", "data", "version"])
    return Case(what, train, f"--resume {path.parent} --steps 2", "runs/one", bad)


def prior_state(rng, good):
    """Break the state of a run of toy.make_prior."""
    path = copied(good, "prior") / "state.safetensors"
    words = f"autoencoder --resume {path.parent} --steps 2"
    if rng.random() < 0.5:
        written = metadata(path)
        settings = break_value(rng, json.loads(written["args"]))
        save_file(load_file(path), path, written | {"args": json.dumps(settings)})
        return Case(f"args {settings!r:.60}", make_prior, words)
    what, bad = of_safetensors(rng, path, ["args", "step", "base_hash", "data", "version"])
    return Case(what, make_prior, words, "prior", bad)


def finished_run(rng, good):
    path = copied(good, "runs/one") / "result.json"
    what, bad = rng.choice([break_bytes, break_json])(rng, path)
    bad = bad and what != "gone"
    return Case(what, sample, DRAW, "result.json" if bad else "", bad, may_be_skipped=True)


def break_pairs(rng, path):
    """Give pairs another shape, other numbers in their settings, or prompts that are no list."""
    tensors, written = load_file(path), metadata(path)
    about = json.loads(written["about"])
    how = rng.choice(["shape", "shape", "size", "cfg", "prompts"])
    if how == "shape":
        shape = rng.choice([(3, 3, 8, 8), (3, 4, 0, 0), (3, 4, 7, 7), (3, 4, 8, 1000), (3, 9, 8, 8), (0, 4, 8, 8)])
        tensors = {name: torch.zeros(shape, dtype=torch.float16) for name in tensors}
    elif how == "size":
        about["size"] = rng.choice([[0, 0], [32, -32], [10**30, 32], [32], [32, 32, 32], [33, 32], [1e300, 32], "ab"])
    elif how == "cfg":
        about["cfg"] = rng.choice([10**400, float("nan"), "x", [], None, float("inf")])
    else:
        written["prompts"] = json.dumps(rng.choice([{"0": 1, "1": 2, "2": 3}, "abc", 3, None, [1, 2, 3], [[]] * 3]))
    save_file(tensors, path, written | {"about": json.dumps(about)})
    return f"{how} of pairs", True


def pairs(rng, good):
    path = copied(good, "pairs") / "pairs-000000.safetensors"
    if rng.random() < 0.3:
        what, bad = break_pairs(rng, path)
    elif rng.random() < 0.4:
        written = metadata(path)
        name = rng.choice(["prompts", "about"])
        written[name] = json.dumps(break_value(rng, json.loads(written[name])))
        save_file(load_file(path), path, written)
        what, bad = f"{name} {written[name]:.60}", False
    else:
        what, bad = of_safetensors(rng, path, ["prompts", "about"])
    if rng.random() < 0.5:
        bad = bad and not what.startswith(("NaN", "inf", "ints", "complex", "gone"))    # complete files are not reread
        return Case(what, sample, DRAW + "--pairs 3 --prompt a --prompt b --out pairs", "pairs", bad)
    words = LEARN + LORA + f"--task reflow --data {path.parent} --steps 2 --batch 2 --out run"
    return Case(what, train, words, "pairs", bad)


def picture(rng, good):
    """Validation reads all pictures: they are too few to hold any out."""
    os.cpu_count = lambda: 0
    path = rng.choice(sorted(copied(good, "photos").glob("*.jpg")))
    if rng.random() < 0.4:
        image, suffix = Image.open(path), rng.choice([".png", ".webp", ".bmp", ".jpg"])
        mode = rng.choice(["1", "L", "P", "LA", "RGBA", "I;16", "CMYK", "HSV", "F", "I"])
        kind = {"F": "TIFF", "I": "TIFF", "HSV": "TIFF", "CMYK": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
        path = path.with_name(f"new{suffix}")
        with contextlib.suppress(OSError, ValueError):          # a format without this mode
            image.convert("L").convert(mode).save(path, kind.get(mode, kind.get(suffix, "PNG")))
        what, bad = f"mode {mode} in {path.name}", False
    elif rng.random() < 0.2:
        size = rng.choice([(40_000, 40_000), (2**31 - 1, 1), (1, 2**31 - 1)])
        path.write_bytes(struct.pack("<2sIIIIiiHH6I", b"BM", 54, 0, 54, 40, *size, 1, 24, *[0] * 6))      # a .bmp
        what, bad = "a picture of a billion pixels", True
    else:
        what, bad = break_bytes(rng, path)
        bad = bad and what not in ("gone", "folder")
    words = LEARN + LORA + "--data photos --size 32 --steps 1 --validation 4 --out run"
    return Case(f"{path.name}: {what}", train, words, path.name, bad, may_be_skipped=True)


def caption(rng, good):
    path = copied(good, "photos") / rng.choice(["boat.txt", "metadata.jsonl"])
    if path.suffix == ".txt":
        content = rng.choice([odd_text(rng).encode(), odd_text(rng).encode("utf-16"), rng.randbytes(50) + b"\xff"])
        path.write_bytes(content)
        what, bad = f"caption {content!r:.40}", content.endswith(b"\xff")
    else:
        line = rng.choice([DEEP, "5", "[]", "null", "{", '{"file_name": 5, "text": "a"}', '{"file_name": "roof.jpg"}',
                           '{"file_name": "roof.jpg", "text": []}', '{"file_name": "roof.jpg", "text": "\\ud800"}',
                           '{"file_name": "\\u0000", "text": "a"}',
                           json.dumps({"file_name": "roof.jpg", "text": odd_text(rng)})])
        path.write_text(line)
        what, bad = f"jsonl {line!r:.60}", '"text": "' not in line or '": 5' in line
    return Case(what, sample, "--steps 1 --cfg 1 --size 32 --device cpu --data photos", path.name, bad,
                may_be_skipped=path.suffix == ".txt")


def prompt(rng, good):
    if rng.random() < 0.5:
        text = odd_text(rng).replace("\0", "")
        return Case(f"prompt {text!r:.40}", sample, DRAW + shlex.join([f"--prompt={text}", f"--negative={text}"]))
    path = copied(good, "prompts.txt")
    if rng.random() < 0.5:
        path.write_text(odd_text(rng))
        return Case("odd prompts", sample, DRAW + f"--prompts {path}", path.name)
    what, _ = break_bytes(rng, path)
    return Case(what, sample, DRAW + f"--prompts {path}", path.name, what in ("empty", "folder", "gone"))


def tar(rng, good):
    """Break a tar, or the pattern that names tars."""
    os.cpu_count = lambda: 0
    path, words = copied(good, "a.tar"), LEARN + LORA + "--size 32 --steps 1 --validation 4 --out run "
    how = rng.choice(["bytes", "pax", "pattern"])
    if how == "pattern":
        pattern = rng.choice(["{" * 1000, "{a," * 1000 + "}" * 1000, "{a,b" * 1000, "{0.." * 500, "{0..9999999999}",
                              "{0..1}" * 40, "{" * 50_000 + "}" * 50_000, "{1..0..0}", "{é..🦊}"]) + ".tar"
        return Case(f"pattern {pattern:.20}", train, words + shlex.join(["--data", pattern]), "{", True)
    if how == "bytes":
        how, bad = break_bytes(rng, path)
    else:
        content, bad = rng.choice([b"9" * 20, b"99999999", b"-5", b"0", b"x"]) + b" path=a\n", False
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, len(content)
        path.write_bytes(header.tobuf() + content.ljust(512, b"\0") + path.read_bytes())
        how = f"pax header {content!r}"
    return Case(how, train, words + f"--data {path}", path.name, bad, may_be_skipped=True)


def depth_data(rng, good):
    """Validation reads both pictures: they are too few to hold any out."""
    os.cpu_count = lambda: 0
    path = copied(good, "depth") / rng.choice(["a.npy", "b.png"])
    how, bad = rng.choice(["bytes", "numbers"]), True
    if how == "bytes":
        how, bad = break_bytes(rng, path)
        bad = bad and how not in ("gone", "folder")
    elif path.suffix == ".npy":
        metres, how = np.load(path), rng.choice(["NaN", "zeros", "far", "ints", "text", "objects", "shape", "complex"])
        content = {"NaN": metres * np.nan, "zeros": metres * 0, "far": metres * np.inf, "ints": metres.astype(int),
                   "text": metres.astype(str), "objects": metres.astype(object), "shape": metres[None, None, :5],
                   "complex": metres * 1j}[how]
        np.save(path, content)
        bad = how != "ints"
    else:
        how = rng.choice(["zeros", "colours", "8 bits"])
        pixels = {"zeros": np.zeros((32, 48), np.uint16), "colours": np.zeros((32, 48, 3), np.uint8),
                  "8 bits": np.ones((32, 48), np.uint8)}[how]
        Image.fromarray(pixels).save(path)
    words = LEARN + LORA + "--task depth --data depth --size 32 --steps 1 --validation 8 --out run"
    return Case(f"{path.name}: {how}", train, words, path.name, bad, may_be_skipped=True)


def depth_errors(rng, good):
    """Break a true depth, a prediction, the list of files or its mask."""
    for name in "depth", "predicted", "list.txt":
        copied(good, name)
    words = "predicted --truth depth --list list.txt "
    if rng.random() < 0.3:
        flags = [f"--scale {number}" for number in (0, -1, "nan", "1e300", "1e-30")]
        flags += [f"--dataset {name}" for name in ("nyu", "kitti", "diode", "eth3d")]
        flag = rng.choice(flags)
        return Case(flag, measure_depth, words + flag, known_bad=True)
    path = Path(rng.choice(["depth/a.npy", "predicted/a.npy", "list.txt"]))
    if path.suffix == ".txt" and rng.random() < 0.7:
        text = rng.choice([odd_text(rng), "a.jpg a.npy none\n", "a.jpg ../x\n", "a.jpg\n", "a.jpg a.npy a.npy\n", ""])
        path.write_text(text)
        return Case(f"list {text!r:.40}", measure_depth, words + rng.choice(["", "--dataset diode "]))
    if path.parent.name == "predicted" and rng.random() < 0.4:
        np.save(path, np.load(path) * rng.choice([np.nan, np.inf]))
        return Case("NaN or inf predicted", measure_depth, words, path.name, True)
    what, bad = break_bytes(rng, path)
    if path.suffix == ".txt":
        return Case(f"{path}: {what}", measure_depth, words)
    return Case(f"{path}: {what}", measure_depth, words, path.name, bad)


def weights(rng, good):
    """Break the weights of CLIP or of the aesthetics predictor."""
    copied(good, "photos")
    name, other = rng.choice([("clip.pth", "head.pth"), ("head.pth", "clip.pth")])
    path, bad = copied(good, name), True
    how = rng.choice(["bytes", "pickle", "code", "other", "tensor", "script"])
    if how == "bytes":
        how, bad = break_bytes(rng, path)
    elif how in ("pickle", "code"):
        how, bad = {"pickle": break_pickle, "code": hide_code}[how](rng, path)
    elif how == "other":
        shutil.copy(good / other, path)
    elif how == "script":
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    else:
        tensors = torch.load(path, weights_only=True)
        key = rng.choice(sorted(tensors))
        tensors[key] = rng.choice([tensors[key] * float("nan"), torch.ones(2, 3, 5), torch.ones(7)])
        torch.save(tensors, path)
    files = {name: good / name for name in ("clip.pth", "head.pth")} | {name: path}
    words = f"photos --device cpu --clip small-clip {files['clip.pth']} --aesthetics {files['head.pth']}"
    return Case(f"{name}: {how}", evaluate, words, name, bad)


WHOLE, REAL = ["-1", "x", "1.5", "9" * 20, "nan", ""], ["nan", "inf", "-inf", "x", "1e999", ""]
FLAGS = [  # (script, good command line without the flag, {flag: values that must be refused})
    (sample, DRAW, {
        **dict.fromkeys(["--n", "--steps", "--batch", "--seed", "--pairs", "--size"], WHOLE), "--cfg": REAL,
        "--objective": ["x"], "--device": ["cuda:77", "x"], "--out": ["x.txt", ".", "/dev/null/x.png"],
        "--prompts": ["none", "."], "--data": ["none"], "--ckpt": ["none", ".", "a/b"], "--lora": ["none", "."],
        "--size ": ["99968", "99968 99968", "0", "33", "64 64 64"]}),
    (train, LEARN + LORA + "--steps 1 --size 32 --out run ", {
        **dict.fromkeys(["--steps", "--batch", "--grad-accum", "--seed", "--scenes", "--validation", "--previews",
                         "--save-every", "--preview-every", "--warmup"], WHOLE),
        **dict.fromkeys(["--lr", "--caption-dropout", "--ema"], REAL), "--clip": ["nan", "-1", "0", "x"],
        "--lora": ["x", "0", "-3", "²"], "--resume": ["none", "."], "--data": ["none"], "--weights": REAL,
        "--task": ["reflow", "x"], "--init-lora": ["none", "."]}),
    (depth, "photo.jpg --device cpu ", {
        **dict.fromkeys(["--steps", "--ensemble", "--seed"], WHOLE), "--ckpt": ["none"]}),
    (measure_depth, "predicted --truth depth ", {
        "--truth": ["none", "/dev/null"], "--list": ["none"], "--scale": REAL}),
    (evaluate, "photos --device cpu ", {"--batch": WHOLE, "--clip": ["hf-hub:a/b x", "x y"], "--real": ["none"]}),
]


TEXT_FLAGS = {sample: ["--ckpt", "--lora", "--prompts", "--data", "--out"], evaluate: ["--real", "--prompts"],
              train: ["--ckpt", "--init-lora", "--data", "--cache", "--out", "--resume"], depth: ["--ckpt", "--out"],
              measure_depth: ["--truth", "--list"]}         # which an empty variable of a shell leaves empty


def flag(rng, good):
    shutil.copy(copied(good, "photos") / "boat.jpg", "photo.jpg")
    module, words, flags = rng.choice(FLAGS)
    if rng.random() < 0.2:
        name, value = rng.choice(TEXT_FLAGS[module]), rng.choice(["", "", "--"])
        if value == "--":
            name = rng.choice([name, *sorted(flags)]).strip()
        words += rng.choice([f"{name}={value}", f"{name} {shlex.quote(value)}"] if value == "" else [f"{name}={value}"])
        return Case(f"{module.__name__} {name} {value!r}", module, words, name.strip("-"), known_bad=True)
    name = rng.choice(sorted(flags))
    value = rng.choice(flags[name])
    names = name.strip(" -") if flags[name] in (WHOLE, REAL) else ""
    words += f"{name} {value}" if " " in name + value else shlex.join([f"{name}={value}"])
    return Case(f"{module.__name__} {name} {value!r:.30}", module, words, names, known_bad=True)


def narrow(rng, good):
    """Draw pictures that are narrower than the texts below them."""
    height, width = rng.choice([(8, 8), (16, 8), (128, 16), (512, 8), (8, 128), (64, 24)])
    size = f"--size {height} {width} "
    if rng.random() < 0.5:
        return Case(size, sample, f"--n 3 --steps 1 --cfg 1 --device cpu {size} --prompt 'a small red circle'")
    return Case(size, train, LEARN + LORA + f"{size} --steps 1 --out run")


def processes(rng, good):
    """Set what torchrun sets to what it never sets."""
    name = rng.choice(["RANK", "WORLD_SIZE"])
    value = rng.choice(["x", "-1", "1.5", "9" * 20, "nan"] + (["0"] if name == "WORLD_SIZE" else ["1", "7"]))
    others = rng.choice([{}, {"RANK": "0", "WORLD_SIZE": "1"}])
    words = rng.choice([(sample, DRAW), (train, LEARN + LORA + "--size 32 --steps 1 --out run"),
                        (sample, DRAW + "--pairs 2 --prompt a --out pairs")])
    return Case(f"{name}={value}", *words, names=name, known_bad=True, environment={**others, name: value})


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


class Closed(io.StringIO):
    """A stream that has been closed."""

    def write(self, text):
        raise ValueError("I/O operation on closed file")


def streams(rng, good):
    """Start a command without a usable stderr: it works all the same, and warnings and bars are lost."""
    stderr = rng.choice([Full, Closed, lambda: None])
    words = rng.choice([(sample, DRAW), (train, LEARN + LORA + "--size 32 --steps 1 --out run"),
                        (sample, DRAW + "--pairs 2 --prompt a --out pairs"), (sample, DRAW + "--data photos")])
    copied(good, "photos")
    return Case(f"stderr {getattr(stderr, '__name__', 'None')}", *words, stderr=stderr)


KINDS = [checkpoint, lora_file, prompt, diffusers_folder, flag, run_state, pickled_checkpoint, caption, pairs, picture,
         depth_errors, finished_run, weights, checkpoint, depth_data, flag, diffusers_folder, lora_file, run_state,
         prior_state, tar, narrow, pairs, processes, streams]


# ------------------------------------------------------------------ running a case

class Hang(BaseException):
    pass


def on_alarm(number, frame):
    raise Hang


def contents(folder):
    """-> {path: bytes} of the files that no command may change. Logs are not among them: they are trimmed on resume."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and path.suffix in
            (".safetensors", ".ckpt", ".json", ".npy", ".txt", ".jpg", ".pth")}


def outcome(case):
    """Run a case in its folder -> its outcome, and what it printed."""
    before = contents(".")
    signal.alarm(SECONDS)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in case.environment.items():
                patch.setenv(name, value)
            result = call(case.module, case.words, case.stderr)
    except Hang:
        return "hang", ""
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
    last, printed = (result.err.splitlines() or [""])[-1], result.out + result.err
    if Path("executed").exists():
        return "executed", printed
    if list(Path(".").rglob("*.partial.*")):
        return "half-written", printed
    if result.code == 2:
        if any(not path.exists() or path.read_bytes() != content for path, content in before.items()):
            return "lost", printed
        if "error: " not in last or len(last) > 2000 or "Traceback" in printed:
            return "no line", printed
        return "refused" if case.names in last else "unnamed", printed
    if result.code != 0:
        return f"exit code {result.code}", printed
    warned = any("warning: " in line and case.names in line for line in printed.splitlines())
    if case.known_bad and not (case.may_be_skipped and warned):
        return "silent", printed
    return "warned" if warned else "result", printed


def run_case(number, good):
    """Run case `number` in a new folder -> its .kind, .case, .outcome, and what it .printed."""
    kind, rng = KINDS[number % len(KINDS)], random.Random(number)
    cpu_count, before = os.cpu_count, signal.signal(signal.SIGALRM, on_alarm)
    try:
        with tempfile.TemporaryDirectory() as folder, working_in(folder, good / "tiny.safetensors"):
            case = kind(rng, good)
            return SimpleNamespace(kind=kind.__name__, case=case, **dict(zip(("outcome", "printed"), outcome(case))))
    finally:
        os.cpu_count = cpu_count
        signal.signal(signal.SIGALRM, before)


FINE = ("result", "warned", "refused")


@contextlib.contextmanager
def limited_memory():
    """Inside `with`, an allocation of many gigabytes fails, as on a machine with little memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run_cases(numbers, folder):
    """Run the cases in an empty folder -> {kind: Counter of outcomes}, and one line per fault."""
    counts, faults, good = collections.defaultdict(collections.Counter), [], make_good(folder)
    with limited_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            ran = run_case(number, good)
            counts[ran.kind][ran.outcome] += 1
            if ran.outcome not in FINE:
                last = (ran.printed.strip().splitlines() or [""])[-1]
                faults.append(f"{ran.outcome}: python -m tests.fuzz {number}    {ran.kind}, {ran.case.what}: "
                              f"{last:.300}")
    return counts, faults


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", nargs="?", type=int, help="run only this case")
    parser.add_argument("--cases", type=int, default=CASES, metavar="N",
                        help=f"run the first N cases (default: {CASES})")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.number is not None:
            ran = run_case(args.number, make_good(Path(folder)))
            command = f"{ran.case.module.__name__} {ran.case.words:.300}"
            print(f"{ran.kind}, {ran.case.what}", command, ran.printed[-6000:], ran.outcome, sep="\n")
            sys.exit(ran.outcome not in FINE)
        start = time.time()
        counts, faults = run_cases(range(args.cases), Path(folder))
    total = sum(counts.values(), collections.Counter())
    columns = [*FINE, *sorted(total.keys() - set(FINE))]
    print(f"{'':20}", *(f"{name:>12}" for name in columns))
    for kind, of_kind in [*sorted(counts.items()), ("all", total)]:
        print(f"{kind:20}", *(f"{of_kind[name]:12}" for name in columns))
    print(*faults, f"{args.cases} cases in {time.time() - start:.0f} s, {len(faults)} faults", sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
