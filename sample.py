"""Prompts to pictures by Algorithm 2: Euler steps on the velocity u, from noise (t_fm = 0) to data (t_fm = 1).

    python sample.py --steps 4                                                      the newest run of train.py
    python sample.py --steps 25 --cfg 4 --ckpt sd21.safetensors --lora runs/mine/lora.safetensors --prompt "a red boat"
    python sample.py --pairs 1800000 --out pairs/ --ckpt sd15.safetensors --prompts captions.txt       Reflow, Sec. 4.2

A diffusion model is sampled as it is, before any training: Diff2Flow makes it a velocity field. `--objective dm` asks
for DDIM instead. What a file was trained for is read from its metadata. --print-sigmas gives the steps to other tools.
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from data import (
    GridPlan,
    ImageFolder,
    batch_file,
    check_picture_file,
    files_of_shard,
    pictures_in,
    progress,
    read_pairs,
    save_grid,
    save_picture,
    seed_of,
    to_pil,
)
from diff2flow import OBJECTIVES
from files import check_range, check_replaceable, cli, from_json, read_text, save_tensors
from model import DepthUNet, load_checkpoint, prediction_of
from run import Ranks
from schedule import sd_schedule
from toy.scenes import PLAIN, Scenes

BUNDLED_PRIOR = Path(__file__).parent / "toy" / "tiny-v.safetensors"
PAIRS_A_FILE = 256
PICTURES_IN_GRID = 64    # at most, where --singles gives each picture a file of its own


# ------------------------------------------------------------------ what every script needs

def pick_device(name=None):
    """The device that was asked for, else CUDA if there is one, else the CPU, which is said."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))       # torchrun's number of a process
        print("no CUDA device: running on the CPU, which is slower")
        return torch.device("cpu")
    numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in ["cpu", *numbered] and not (name == "cuda" and numbered):
        raise ValueError(f"--device {name}: there is no such device here; leave --device out to choose one")
    return torch.device(name)


def computes_bf16():
    """Whether the processor itself multiplies bf16 numbers; others take longer for them than for float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)


def pick_precision(name, device):
    """-> "bf16" or "fp32" (None: bf16 on CUDA, and on processors that compute it), and the autocast of the forward pass
    that goes with it."""
    if name is None:
        name = "bf16" if device.type == "cuda" or computes_bf16() else "fp32"
    return name, torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16")


def read_result(weights):
    """What train.py wrote beside its weights when it had finished (result.json), or {}. A damaged one is left out."""
    path = Path(weights).with_name("result.json")
    try:
        result = from_json(read_text(path)) if path.exists() else {}
        if result and not (isinstance(result["task"], str) and isinstance(result.get("ckpt") or "", str)
                           and isinstance(result.get("use_ema", False), bool)):
            raise ValueError("its task, ckpt or use_ema is no such thing")
        return dict(result)
    except (ValueError, TypeError, KeyError, OSError) as error:
        print(f"warning: {path} is not as train.py wrote it ({error}): it is left out", file=sys.stderr)
        return {}


def newest_weights(task):
    """-> the model or LoRA file of the newest finished run in runs/ for that task, or None."""
    files = [path for name in ("model", "lora") for path in Path("runs").glob(f"*/{name}.safetensors")]
    results = [(path, read_result(path)) for path in files]
    wanted = [path for path, result in results if result and (result["task"] == "depth") == (task == "depth")]
    return max(wanted, key=lambda path: path.stat().st_mtime, default=None)


def find_base(lora_file):
    """-> the checkpoint that a LoRA was trained from, by result.json beside it or by its own metadata, and whether it
    was that one's EMA weights. ValueError if neither tells."""
    result = read_result(lora_file)
    if result:
        base = result.get("ckpt") or BUNDLED_PRIOR
        if not os.path.exists(base):
            raise ValueError(f"{lora_file}: result.json says it was trained on {base}, which is not there: give --ckpt")
        return base, result.get("use_ema", False)
    name = lora.read_metadata(lora_file).get("base")
    bundled = BUNDLED_PRIOR.parent / Path(name or "no name").name
    if not bundled.is_file():
        raise ValueError(f"{lora_file}: trained on {name or 'a checkpoint that it does not name'}: give it by --ckpt")
    return bundled, False


def find_files(ckpt, lora_file, use_ema, task):
    """-> checkpoint, LoRA file or None, EMA weights or not: those that are given; without a checkpoint the one that the
    LoRA was trained from; without both the newest run's, else the bundled prior."""
    if ckpt is None and lora_file is None:
        newest = newest_weights(task)
        if newest is None and task == "depth":
            raise ValueError("there is no depth model in runs/: train one by python train.py --task depth, or name one "
                             "by --lora or --ckpt")
        if newest is None or newest.name == "model.safetensors":
            ckpt = newest or BUNDLED_PRIOR
        else:
            lora_file = newest
    if ckpt is None:
        ckpt, of_ema = find_base(lora_file)
        use_ema = use_ema or of_ema
    return Path(ckpt), lora_file, use_ema


def check_base(lora_file, told, ckpt, sd, prediction):
    """Compare what a LoRA's metadata tells of its base with the checkpoint it is put on: another UNet is a warning,
    another kind of network, unless the caller names its prediction, a ValueError."""
    theirs = told.get("base_hash")
    if theirs == sd.unet_hash:
        return
    kind, _ = prediction_of(told)
    if prediction is None and kind not in (None, sd.prediction):
        raise ValueError(f"{lora_file}: trained on {told.get('base', 'a base')}, whose UNet predicts {kind}; {ckpt} "
                         f"predicts {sd.prediction}: give the right --ckpt (or --prediction, if that is wrong)")
    if theirs is not None:
        print(f"warning: {lora_file} was trained on {told.get('base', 'a base')} (UNet {theirs[:10]}); {ckpt} has "
              f"another UNet ({sd.unet_hash[:10]})")


def load_flow(ckpt=None, lora_file=None, *, device="cpu", dtype=torch.float32, task="text-to-image", objective=None,
              prediction=None, use_ema=False, zero_snr=False):
    """Checkpoint, and LoRA if there is one -> sd (StableDiffusion), flow (its velocity field). What is not given is
    found (find_files), or read from the files' metadata, which is in sd.metadata afterwards.

    objective: one of OBJECTIVES; None is diff2flow, but for models of fm and fm-flip their own. task: ValueError if the
    model was trained for another one ("depth" or not); None accepts both. The LoRA is merged into the weights.
    """
    ckpt, lora_file, use_ema = find_files(ckpt, lora_file, use_ema, task)
    sd = load_checkpoint(ckpt, device, dtype, prediction, use_ema, zero_snr)
    if lora_file:
        print(f"LoRA {lora_file}")
        told = lora.read_metadata(lora_file)
        check_base(lora_file, told, ckpt, sd, prediction)
        sd.metadata |= {name: value for name, value in told.items() if not name.startswith(("ss_", "modelspec."))}
        sd.path, sd.prediction = lora_file, prediction or prediction_of(told)[0] or sd.prediction
        if sd.prediction not in ("v", "eps"):
            raise ValueError(f"{lora_file}: prediction {sd.prediction!r} is neither 'v' nor 'eps': give --prediction")
        sd.zero_snr = sd.zero_snr or told.get("zero_snr") == "true"
        if told.get("task") == "depth":
            sd.add_picture_input()
        lora.load(lora_file, sd.unet)
        lora.merge(sd.unet)
    if task is not None and sd.is_depth_model != (task == "depth"):
        raise ValueError(f"{lora_file or ckpt}: {'' if sd.is_depth_model else 'not '}trained for depth; "
                         f"{'depth.py' if sd.is_depth_model else 'sample.py'} samples it")
    if objective is None:
        trained_by = sd.metadata.get("objective")
        objective = trained_by if trained_by in ("fm", "fm-flip") else "diff2flow"
    return sd, make_flow(sd, objective)


@torch.no_grad()
def make_flow(sd, objective):
    """-> the velocity field of `sd` by one of OBJECTIVES."""
    net = DepthUNet(sd.unet, sd.encode_text([""])) if sd.is_depth_model else sd.unet
    return OBJECTIVES[objective](net, *sd_schedule(zero_snr=sd.zero_snr, device=sd.device), sd.prediction)


def objective_of(flow):
    """-> its name among OBJECTIVES."""
    return next(name for name, kind in OBJECTIVES.items() if type(flow) is kind)


def guidance(sd, cfg=None, for_pairs=False):
    """-> cfg, or where that is None the scale that the model's file asks for, or 4. For pairs it is 7.5 (Sec. 4.2), but
    1 where the file asks for 1: after Reflow the model holds the guidance of its own pairs."""
    told = sd.metadata.get("cfg", 4.0) if cfg is None else cfg
    try:
        if abs(float(told)) <= 1e6:                             # which NaN is not
            return 7.5 if for_pairs and cfg is None and float(told) != 1 else float(told)
    except ValueError:
        pass
    raise ValueError(f"{sd.path}: its metadata says cfg {told!r}, which is no scale of guidance: give --cfg")


def noises(numbers, shape, seed):
    """The noise of pictures `numbers` -> (len(numbers), *shape): picture i from (seed, i) alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(seed, i))) for i in numbers])


@torch.no_grad()
def draw_latents(sd, flow, x0, context, steps, cfg=1.0, negative="", callback=lambda x_fm: None):
    """Algorithm 2 from noise x0 (B, z, h, w) -> latents of the same shape. context: sd.encode_text(prompts), or, of a
    depth model, the picture's latents. Guidance (cfg != 1) leads away from the prompt `negative`."""
    uncond = sd.encode_text([negative]).expand_as(context) if cfg != 1 else None
    return flow.sample(x0.to(sd.device), context, steps, uncond, cfg, callback)


@torch.no_grad()
def draw(sd, flow, x0, context, steps, **options):
    """As draw_latents, decoded -> pictures (B, 3, H, W), near [-1, 1], float32."""
    return sd.decode(draw_latents(sd, flow, x0, context, steps, **options)).float()


# ------------------------------------------------------------------ pairs for Reflow

def count_made_pairs(shard, settings):
    """-> how many pairs of a shard an earlier run has left."""
    n = 0
    for path, start, made in files_of_shard(shard):
        if made["settings"] != settings:
            others = [name for name, value in settings.items() if made["settings"].get(name) != value]
            raise ValueError(f"{path}: its pairs were made with other settings; choose another --out "
                             f"(what differs: {', '.join(others)})")
        n = start + len(made["prompts"])
    return n


def save_pairs(path, noise, latent, prompts, settings):
    """noise and latent (n, z, h, w), n prompts -> a file that read_pairs reads."""
    save_tensors(path, {"noise": noise, "latent": latent},
                 {"prompts": json.dumps(prompts), "about": json.dumps(settings)})


def join_batches(shard, settings):
    """Make one file of the batches of a shard, and of what it held before, and delete them."""
    files = [path for path, _, _ in files_of_shard(shard)]
    if len(files) > 1 or files[0] != shard:
        pairs = [read_pairs(path) for path in files]
        noise, latent = (torch.cat([part[name] for part in pairs]) for name in ("noise", "latent"))
        save_pairs(shard, noise, latent, [prompt for part in pairs for prompt in part["prompts"]], settings)
    for path in shard.parent.glob(f"{shard.stem}.from-*.safetensors"):
        path.unlink()


def pair_settings(args, sd, flow, prompts, size):
    """-> what the pairs of one folder must have in common. prompts: a list, or what they are in a word."""
    return {"ckpt": args.ckpt.name, "lora": args.lora, "objective": objective_of(flow), "seed": args.seed,
            "steps": args.steps, "cfg": args.cfg, "negative": args.negative, "size": size, "unet_hash": sd.unet_hash,
            "lora_hash": args.lora and hashlib.sha256(Path(args.lora).read_bytes()).hexdigest(),
            "prompts_hash": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}


def make_pairs(args, sd, flow, prompts, size, settings, ranks, amp):
    """Write pairs (noise, latent, prompt) in float16, pair i from (seed, i), in files of PAIRS_A_FILE.

    Each batch is kept in a file of its own until all of its shard are made and joined, so that an interrupted run goes
    on with the pair it was at, and a pair is written twice, however many make a file. Processes of torchrun take the
    files in turn.
    """
    out, (first, last) = Path(args.out), args.shards or (0, math.ceil(args.pairs / PAIRS_A_FILE))
    shape = sd.latent_shape(size)
    out.mkdir(parents=True, exist_ok=True)          # what cannot be written is an error before the work
    files = {number: range(args.pairs)[number * PAIRS_A_FILE:(number + 1) * PAIRS_A_FILE]
             for number in range(first + ranks.rank, last, ranks.count)}
    total = sum(map(len, files.values()))
    print(f"{total:,} pairs of {2 * 2 * math.prod(shape):,} bytes, {args.steps} steps, cfg {args.cfg:g}, into {out}/")
    with tqdm(total=total, unit="pair", dynamic_ncols=True) as bar:
        for number, wanted in files.items():
            shard = out / f"pairs-{number:06d}.safetensors"
            made = count_made_pairs(shard, settings)
            bar.update(min(made, len(wanted)))
            for start in range(made, len(wanted), args.batch):
                batch = wanted[start:start + args.batch]
                texts = [prompts[i % len(prompts)] for i in batch]
                x0 = noises(batch, shape, args.seed).half()
                with amp:
                    x1 = draw_latents(sd, flow, x0, sd.encode_text(texts), args.steps, cfg=args.cfg,
                                      negative=args.negative)
                save_pairs(batch_file(shard, start), x0, x1.half().cpu(), texts, settings)
                bar.update(len(batch))
            join_batches(shard, settings)
    base = ["--ckpt", str(args.ckpt)] if args.ckpt != BUNDLED_PRIOR else []
    print(f"next: {shlex.join(['python', 'train.py', '--task', 'reflow', '--data', str(out), *base])}")


# ------------------------------------------------------------------ pictures

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", help="Stable Diffusion 1.x or 2.x, a file or a diffusers folder (default: the one that --lora was "
                       "trained from; without --lora the newest run's model, else the bundled prior)")
    add("--use-ema", action="store_true", help="take the EMA weights of a non-pruned file")
    add("--lora", help="LoRA file of train.py (default: the newest run's, if --ckpt is not given)")
    add("--prompt", action="append", help="what to draw; repeat it for more pictures (default: captions of scenes)")
    add("--prompts", help="text file with one prompt a line")
    add("--negative", default="", help="prompt that guidance leads away from (default: the empty prompt)")
    add("--data", help="folder of images with captions: their captions are the prompts")
    add("--n", type=int, help="number of pictures (default: one a prompt, 8 without prompts)")
    add("--pairs", type=int, help="instead of pictures, write this many (noise, latent, prompt) for Reflow into --out")
    add("--shards", type=int, nargs=2, metavar=("FIRST", "LAST"),
        help=f"make only these files of {PAIRS_A_FILE} pairs, LAST not included, to share the work (default: all)")
    add("--steps", type=int, help="Euler steps (default: 25; 40 for pairs)")
    add("--cfg", type=float, help="guidance scale, 1 for none (default: 4; 7.5 for pairs; 1 after Reflow)")
    add("--size", type=int, nargs="+", help="pixels: one number, or height width (default: the checkpoint's)")
    add("--objective", choices=list(OBJECTIVES),
        help="how to sample (default: diff2flow, which is Algorithm 2; models of fm and fm-flip as they were trained)")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: from the file)")
    add("--zero-snr", action="store_true",
        help="the network's noise schedule ends at zero terminal SNR (default: as the file says)")
    add("--batch", type=int, default=8, help="pictures at a time (default: 8)")
    add("--precision", choices=["bf16", "fp32"],
        help="of the forward pass (default: bf16 where the device computes it, else fp32)")
    add("--seed", type=int, default=0, help="seed of the noise; a picture does not depend on --batch (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", help="the PNG grid (default: samples.png), or the folder of the pairs (default: pairs)")
    add("--singles", action="store_true", help="write each picture into a folder named like the grid as well; the grid "
                                               f"has the first {PICTURES_IN_GRID}")
    add("--print-sigmas", action="store_true", help="print the steps as sigmas for other tools, and stop")
    args = parser.parse_args()
    pictures, pairs = {"steps": 25, "out": "samples.png"}, {"steps": 40, "out": "pairs"}
    for name, value in (pictures if args.pairs is None else pairs).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.pairs and not args.ckpt and not args.lora:
        args.ckpt = str(BUNDLED_PRIOR)              # pairs are of a model that is not tuned yet, not of the newest run
    check(args)
    return args


def check(args):
    """ValueError for a setting that cannot work."""
    check_range(args, 1, 1e9, "steps", "batch", "n", "pairs")
    check_range(args, 0, 2**32, "seed")
    check_range(args, -1e6, 1e6, "cfg")
    if args.shards:
        first, last = args.shards
        files = math.ceil(args.pairs / PAIRS_A_FILE) if args.pairs else 0
        if not 0 <= first < last <= files:
            raise ValueError(f"--shards {first} {last}: two of 0 to {files}, the number of files, which is --pairs "
                             f"over {PAIRS_A_FILE}, rounded up")
    if args.pairs is None:
        check_picture_file(args.out, (0, 0))


def read_prompts(args):
    """-> the prompts of --prompt, --prompts and --data, in this order; none if none is given."""
    prompts = list(args.prompt or [])
    if args.prompts:
        prompts += [line.strip() for line in read_text(args.prompts).splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts {args.prompts}: no prompt in it")
    if args.data:
        images = ImageFolder(args.data, 1, 1)
        prompts += [images.caption(i) for i in progress(range(len(images)), "reading captions", unit="caption")]
    return prompts


class SceneCaptions:
    """Captions of n procedural scenes, the world of the bundled prior, each made when it is asked for."""

    def __init__(self, n, style):
        self.scenes = Scenes(n, 8, 8, style, 1)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        return self.scenes.scene(i).caption


def sigma_grid(flow, steps):
    """The same Euler steps for k-diffusion tools, sigma = (1 - t_fm) / t_fm, from the first trained level to 0. Where
    that level is pure noise (zero terminal SNR), its sigma is 4096, as in diffusers."""
    t_fm = torch.linspace(max(flow.f_table[-1].item(), 1 / 4097), 1, steps + 1, dtype=torch.float64)
    return ((1 - t_fm) / t_fm).tolist()


def single_files(args, n):
    """-> the paths of n pictures of --singles. ValueError if one is taken, or if others would lie among them."""
    folder, digits = Path(args.out).with_suffix(""), max(4, len(str(n - 1)))
    files = [folder / f"{i:0{digits}d}.png" for i in range(n)]
    others = sorted(set(pictures_in(folder)) - set(files))
    if others:
        raise ValueError(f"--singles: {folder} holds {len(others)} pictures that this command does not write, first "
                         f"{others[0].name}: empty it, or choose another --out")
    for path in files:
        check_replaceable(path)
    return files


def in_words(args, sd, flow, prompt, negative="", **more):
    """How a picture was made, as other tools write it: the prompt, the negative prompt, and a line of settings."""
    model = Path(args.ckpt).stem + (f" + {Path(args.lora).stem}" if args.lora else "")
    settings = {"Steps": args.steps, "Sampler": "Euler", "Seed": args.seed, "Model hash": sd.unet_hash[:10],
                "Model": model, "Objective": objective_of(flow), **more}
    lines = [prompt, f"Negative prompt: {negative}"] if negative else [prompt]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items())])


def make_pictures(args, sd, flow, prompts, size, files, making, ranks, amp):
    """Draw a picture for each prompt -> the pictures of the grid. `files` are their own, with --singles; `making` is
    in_words, but for the prompt. Processes of torchrun take the batches in turn; the first gets the grid's pictures."""
    shape, pictures = sd.latent_shape(size), {}
    for start in range(ranks.rank * args.batch, len(prompts), ranks.count * args.batch):
        batch = range(len(prompts))[start:start + args.batch]
        title = f"pictures {batch[0] + 1} to {batch[-1] + 1}"
        with tqdm(desc=title, total=args.steps, unit="step", leave=False, disable=not ranks.leads) as bar, amp:
            context = sd.encode_text([prompts[i] for i in batch])
            drawn = draw(sd, flow, noises(batch, shape, args.seed), context, args.steps, cfg=args.cfg,
                         negative=args.negative, callback=lambda x_fm: bar.update()).cpu()
        for i, picture in zip(batch, drawn):
            if files:
                save_picture(files[i], to_pil(picture), making(prompts[i], Picture=i))
            if not files or i < PICTURES_IN_GRID:
                pictures[i] = picture
    pictures = ranks.gather(pictures)
    return [pictures[i] for i in sorted(pictures)]


@torch.no_grad()
def main():
    args = arguments()
    prompts, device = read_prompts(args), pick_device(args.device)
    precision, amp = pick_precision(args.precision, device)
    dtype, ranks = torch.bfloat16 if precision == "bf16" else torch.float32, Ranks(device)
    args.ckpt, args.lora, args.use_ema = find_files(args.ckpt, args.lora, args.use_ema, task="text-to-image")
    sd, flow = load_flow(args.ckpt, args.lora, device=device, dtype=dtype, objective=args.objective,
                         prediction=args.prediction, use_ema=args.use_ema, zero_snr=args.zero_snr)
    if args.print_sigmas:
        sigmas = ", ".join(f"{sigma:.4f}" for sigma in sigma_grid(flow, args.steps))
        print(f"ComfyUI, ManualSigmas: {sigmas}\ndiffusers: sigmas=[{sigmas}]")
        return
    sd.pack()
    args.cfg, size = guidance(sd, args.cfg, bool(args.pairs)), list(sd.picture_size(args.size))
    n = args.pairs or args.n or len(prompts) or 8
    style = sd.metadata.get("style") if sd.metadata.get("style") in PLAIN else "solid"
    if args.pairs:
        settings = pair_settings(args, sd, flow, prompts or style, size)
        make_pairs(args, sd, flow, prompts or SceneCaptions(n, style), size, settings, ranks, amp)
        return
    prompts = prompts or SceneCaptions(n, style)
    prompts = [prompts[i % len(prompts)] for i in range(n)]
    files = single_files(args, n) if args.singles else []
    in_grid = prompts[:PICTURES_IN_GRID] if files else prompts
    columns = min(len(in_grid), 8)
    check_picture_file(args.out, GridPlan(len(in_grid), *size, columns, captions=in_grid).size)
    for path in [Path(args.out), *files[:1]]:
        path.parent.mkdir(parents=True, exist_ok=True)      # what cannot be written is an error before the work
    print(f"{n} pictures of {size[0]}x{size[1]}, {args.steps} steps, cfg {args.cfg:g}, objective {objective_of(flow)}, "
          f"seed {args.seed}, {precision} on {device}")
    making = partial(in_words, args, sd, flow, negative=args.negative,
                     **{"CFG scale": f"{args.cfg:g}", "Size": f"{size[1]}x{size[0]}"})
    pictures = make_pictures(args, sd, flow, prompts, size, files, making, ranks, amp)
    ranks.leave()
    if ranks.leads:
        save_grid(args.out, torch.stack(pictures), columns, making("\n".join(in_grid)), captions=in_grid)
        print(args.out + (f"\n{files[0].parent}/: {n} pictures" if files else ""))


if __name__ == "__main__":
    cli(main)
