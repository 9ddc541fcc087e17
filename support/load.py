"""How a trained model is put together from its files: device, precision, base checkpoint, LoRA, velocity field.

    sd, flow = load_flow(loras=["runs/NAME/lora.safetensors", "other.safetensors:0.8"], device="cuda")

What is not given is found: the base by the LoRA's metadata, the newest run in runs/, else the bundled prior.
"""
import os
import sys
from pathlib import Path

import torch

from diff2flow import NAIVE, OBJECTIVES
from model import DepthUNet
from schedule import sd_schedule
from support.checkpoint import load_checkpoint, prediction_of
from support.files import from_json, read_text
from support.lora_file import load_lora, merge_lora, read_metadata

BUNDLED_PRIOR = Path(__file__).parent.parent / "toy" / "tiny-v.safetensors"
LARGEST = 100_000       # pixels per side of a picture
MODEL_METADATA = "objective", "cfg", "resolution", "zero_snr"   # of a LoRA, which decide how its model is used


# ------------------------------------------------------------------ device and precision

def pick_device(name=None):
    """The device of that name, else CUDA if there is one, else the CPU with a printed note."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))       # set by torchrun
        print("no CUDA device: running on the CPU, which is slower")
        return torch.device("cpu")
    numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in ["cpu", *numbered] and not (name == "cuda" and numbered):
        raise ValueError(f"--device {name}: there is no such device here; leave --device out to choose one")
    return torch.device(name)


def has_bf16(device):
    """Whether the device multiplies bf16 numbers in hardware. Elsewhere they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)           # Ampere and later
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)


def pick_precision(name, device):
    """"bf16", "fp32" or None (bf16 where the device has it) -> the name, and the dtype of frozen weights."""
    if name is None:
        name = "bf16" if has_bf16(device) else "fp32"
        if name == "fp32" and device.type == "cuda":
            print(f"{torch.cuda.get_device_name(device)} has no bf16: float32 (--precision bf16 overrides it)")
    return name, torch.bfloat16 if name == "bf16" else torch.float32


def compute_in_bf16(sd):
    """Let float32 weights compute in bf16, by autocast: for training all of them, which needs float32."""
    autocast = torch.autocast(sd.device.type, torch.bfloat16)
    for owner, name in (sd.unet, "forward"), (sd, "encode"), (sd, "decode"), (sd, "encode_text"):
        setattr(owner, name, autocast(getattr(owner, name)))


def compile_unet(sd, mode=None):
    """torch.compile the UNet in place, at its first call. mode: "reduce-overhead" for CUDA graphs. Only `forward`: a
    hook of ours appends to a list, and would be compiled again for each length of it."""
    print("--compile: the first step, and the first with another batch or size, takes up to minutes")
    sd.unet.forward = torch.compile(sd.unet.forward, mode=mode)


# ------------------------------------------------------------------ files

def read_result(weights):
    """result.json, which train.py writes beside its weights at the end of a run, or {}. Ignores a damaged one."""
    path = Path(weights).with_name("result.json")
    try:
        result = from_json(read_text(path)) if path.exists() else {}
        if result and not (isinstance(result["task"], str) and isinstance(result.get("ckpt") or "", str)
                           and isinstance(result.get("use_ema", False), bool)):
            raise ValueError("task, ckpt or use_ema has the wrong type")
        captions = result.get("captions", []) if result else []
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError("captions is not a list of strings")
        return dict(result or {})
    except (ValueError, TypeError, KeyError, OSError) as error:
        print(f"warning: {path} is ignored, it is not as train.py wrote it ({error})", file=sys.stderr)
        return {}


def newest_weights(task):
    """-> the model or LoRA file of the newest finished run in runs/ for that task, or None."""
    files = [path for name in ("model", "lora") for path in Path("runs").glob(f"*/{name}.safetensors")]
    results = [(path, read_result(path)) for path in files]
    wanted = [path for path, result in results if result and (result["task"] == "depth") == (task == "depth")]
    return max(wanted, key=lambda path: path.stat().st_mtime, default=None)


def as_list(loras):
    """None, one LoRA or a list of them -> list."""
    return [loras] if isinstance(loras, (str, Path)) else list(loras or [])


def split_strength(lora):
    """"FILE:0.8" -> FILE, 0.8; "FILE" -> FILE, 1.0. The name of a file that exists may itself have a colon."""
    file, _, number = str(lora).rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        strength = None
    if not file or strength is None or os.path.exists(lora):
        return str(lora), 1.0
    if not abs(strength) <= 1000:                                   # True for NaN
        raise ValueError(f"--lora {lora}: the strength of a LoRA is a number between -1000 and 1000")
    return file, strength


def find_base(lora_file):
    """-> the checkpoint that a LoRA was trained on, and whether on its EMA weights: from result.json or the LoRA's own
    metadata. ValueError if neither names a file that exists."""
    result = read_result(lora_file)
    if result:
        base = result.get("ckpt") or BUNDLED_PRIOR
        if not os.path.exists(base):
            raise ValueError(f"{lora_file}: result.json names its base {base}, which does not exist: pass --ckpt")
        return base, result.get("use_ema", False)
    name = read_metadata(lora_file).get("base")
    bundled = BUNDLED_PRIOR.parent / Path(name or "no name").name
    if not bundled.is_file():
        raise ValueError(f"{lora_file}: trained on {name or 'a checkpoint that it does not name'}: pass it as --ckpt")
    return bundled, False


def find_files(ckpt, loras, use_ema, task):
    """-> checkpoint, list of LoRAs as "FILE" or "FILE:STRENGTH", use EMA weights or not. Without a checkpoint, the one
    that the first LoRA was trained on; without both, those of the newest run, else the bundled prior."""
    loras = as_list(loras)
    if ckpt is None and not loras:
        newest = newest_weights(task)
        if newest is None and task == "depth":
            raise ValueError("there is no depth model in runs/: train one by python train.py --task depth, or name one "
                             "by --lora or --ckpt")
        if newest is None or newest.name == "model.safetensors":
            ckpt = newest or BUNDLED_PRIOR
        else:
            loras = [newest]
    if ckpt is None:
        ckpt, of_ema = find_base(split_strength(loras[0])[0])
        use_ema = use_ema or of_ema
    return Path(ckpt), loras, use_ema


# ------------------------------------------------------------------ a model

def check_base(path, made_with, sd, prediction=None):
    """Compare the base that a LoRA or a folder of pairs was made with (its metadata) to the loaded checkpoint. A
    warning for another UNet. ValueError for a network of another prediction, unless `prediction` is given."""
    theirs, name = made_with.get("base_hash"), made_with.get("base", "another checkpoint")
    kind, _ = prediction_of(made_with)
    if prediction is None and kind not in (None, sd.prediction):
        raise ValueError(f"{path}: made with {name}, whose UNet predicts {kind}; {sd.source.path} predicts "
                         f"{sd.prediction}: pass the right --ckpt (or --prediction, if that is wrong)")
    if theirs == sd.unet_hash:
        return
    if theirs is not None:
        print(f"warning: {path} was made with {name} (UNet {theirs[:10]}); {sd.source.path} has another UNet "
              f"({sd.unet_hash[:10]})")


def take_metadata(files, sd, prediction):
    """Let the metadata of LoRA files decide how `sd` is used: prediction, guidance, size, task. Where two files differ
    the first one counts, with a warning. ValueError for a LoRA of a network of another prediction."""
    taken = {}
    for file in files:
        metadata = read_metadata(file)
        if taken or metadata.get("base_hash") != sd.unet_hash:      # else sd takes the LoRA's prediction
            check_base(file, metadata, sd, prediction)
        sd.prediction = prediction or prediction_of(metadata)[0] or sd.prediction
        if sd.prediction not in ("v", "eps"):
            raise ValueError(f"{file}: prediction {sd.prediction!r} is neither 'v' nor 'eps': pass --prediction")
        for name in MODEL_METADATA:
            if name in taken and metadata.get(name, taken[name]) != taken[name]:
                print(f"warning: {file}: its {name} {metadata[name]!r} does not count, since a LoRA before it has "
                      f"{taken[name]!r}", file=sys.stderr)
        if metadata.get("task") == "depth":
            sd.add_image_input()
        taken = metadata | taken
    sd.zero_snr = sd.zero_snr or taken.get("zero_snr") == "true"
    sd.metadata |= {name: value for name, value in taken.items()
                    if not name.startswith(("ss_", "modelspec.", "lora_adapter_metadata"))}


def load_model(ckpt, loras=None, device="cpu", dtype=torch.float32, prediction=None, use_ema=False, zero_snr=False,
               trainable=False):
    """Checkpoint, and LoRAs ("FILE" or "FILE:STRENGTH") if there are any -> StableDiffusion with the LoRAs merged into
    its weights, and their metadata in sd.metadata. trainable: the one LoRA stays adapters beside the weights."""
    sd, loras = load_checkpoint(ckpt, device, dtype, prediction, use_ema, zero_snr), as_list(loras)
    files, strengths = zip(*map(split_strength, loras)) if loras else ((), ())
    take_metadata(files, sd, prediction)
    for file, strength in zip(files, strengths):
        print(f"LoRA {file}" + (f", strength {strength:g}" if strength != 1 else ""))
        if trainable:
            load_lora(file, sd.unet)
        else:
            merge_lora(file, sd, strength)
    if files:
        sd.source.path = ", ".join(files)
    return sd


@torch.no_grad()
def make_flow(sd, objective):
    """-> the velocity field of `sd`; objective is one of OBJECTIVES."""
    net = sd.unet
    if sd.is_depth_model:
        unpadded = sd.metadata.get("empty_prompt") == "unpadded"        # Marigold: its start and end token alone
        net = DepthUNet(sd.unet, sd.encode_text([""])[:, :2 if unpadded else None])
    return OBJECTIVES[objective](net, *sd_schedule(zero_snr=sd.zero_snr, device=sd.device), sd.prediction)


def load_flow(ckpt=None, loras=None, *, device="cpu", dtype=torch.float32, task="text-to-image", objective=None,
              prediction=None, use_ema=False, zero_snr=False):
    """Checkpoint, and LoRAs if there are any -> sd (StableDiffusion), flow (its velocity field). Files that are not
    given are found by find_files.

    objective: one of OBJECTIVES (None: diff2flow, or fm, fm-flip and rf for models trained so). task: ValueError if the
    model was trained for another one ("depth" or not); None accepts both.
    """
    ckpt, loras, use_ema = find_files(ckpt, loras, use_ema, task)
    sd = load_model(ckpt, loras, device, dtype, prediction, use_ema, zero_snr)
    if task is not None and sd.is_depth_model != (task == "depth"):
        raise ValueError(f"{sd.source.path}: {'' if sd.is_depth_model else 'not '}trained for depth; use "
                         f"{'depth.py' if sd.is_depth_model else 'sample.py'} for it")
    if objective is None:
        trained_by = sd.metadata.get("objective")
        objective = trained_by if trained_by in NAIVE else "diff2flow"
    return sd, make_flow(sd, objective)


def objective_of(flow):
    """-> its name among OBJECTIVES."""
    return next(name for name, kind in OBJECTIVES.items() if type(flow) is kind)


def guidance(sd, cfg=None, for_pairs=False):
    """Guidance scale: the given one > 1 if the file says 1 (after Reflow) > 7.5 for pairs (Sec. 4.2) > the file's >
    4."""
    value = sd.metadata.get("cfg", 4.0) if cfg is None else cfg
    try:
        if abs(float(value)) <= 1e6:                            # False for NaN
            return 7.5 if for_pairs and cfg is None and float(value) != 1 else float(value)
    except ValueError:
        pass
    raise ValueError(f"{sd.source.path}: its metadata has cfg {value!r}, which is not a guidance scale: pass --cfg")


def unconditional(sd, cfg, negative=""):
    """-> the text embedding (1, L, D) that guidance leads away from; None without guidance (cfg 1)."""
    return sd.encode_text([negative]) if cfg != 1 else None


def check_drawn(sd, *tensors):
    """ValueError if latents or pictures that a model drew have NaN, infinity, or numbers that float16 does not have."""
    if not all(tensor.abs().max() < 65504 for tensor in tensors):                       # False for NaN
        raise ValueError(f"{sd.source.path}: it draws NaN, infinity or numbers above 65504, which are not written: its "
                         "weights are damaged, too large or made for another base, or --cfg is too large")


def picture_size(sd, size=None):
    """[side] or [height, width] in pixels (None: from the metadata, else 512, for SDXL 1024) -> height, width.
    ValueError if it does not fit the networks."""
    given = size is not None
    if not given:
        text = sd.metadata.get("resolution", "1024" if sd.config.is_xl else "512")
        size = [int(side) for side in text.split() if side.isdecimal()]
        if not 1 <= len(size) <= 2 or " ".join(map(str, size)) != text:
            raise ValueError(f"{sd.source.path}: resolution {text!r} in its metadata is not a size: pass --size")
    if len(size) > 2:
        raise ValueError(f"--size takes one number, or height and width, not {len(size)} numbers")
    height, width = size[0], size[-1]
    if height % sd.multiple or width % sd.multiple or not sd.multiple <= min(height, width) <= LARGEST:
        where = "" if given else f"{sd.source.path}, in its metadata: "
        raise ValueError(f"{where}size {height}x{width}: both sides must be multiples of {sd.multiple} for this "
                         f"checkpoint, at most {LARGEST}")
    return height, width
