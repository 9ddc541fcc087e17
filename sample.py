"""Sample: prompts to pictures by Algorithm 2, Euler steps on u from noise to data.

    python sample.py --steps 4                                                      the newest run of train.py
    python sample.py --steps 25 --cfg 4 --ckpt sd21.safetensors --lora runs/mine/lora.safetensors --prompt "a red boat"

What a file was trained for (objective, prediction) is read from its metadata. A model trained with diff2flow (or dm)
stays an ordinary Stable Diffusion checkpoint: --print-sigmas gives the grid for other tools, sigma = (1 - t_fm) / t_fm.
"""
import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from data import SUFFIXES, Scenes, cli, save_grid, save_image
from diff2flow import OBJECTIVES
from model import TINY_PRIOR, load_checkpoint, pick_device
from schedule import sd_schedule


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", help="Stable Diffusion 1.x or 2.x file (default: the newest run's model, else the bundled small one; "
                       "with --lora the one that it was trained from)")
    add("--use-ema", action="store_true", help="take the EMA weights of a non-pruned file")
    add("--lora", help="LoRA file of train.py (default: the newest run's, if --ckpt is not given)")
    add("--prompt", action="append", help="what to draw; repeat it for more (default: captions of scenes)")
    add("--prompts", help="text file, one prompt a line")
    add("--negative", default="", help="what guidance leads away from (default: the empty prompt)")
    add("--n", type=int, help="number of pictures (default: one a prompt, 8 without prompts)")
    add("--steps", type=int, default=25, help="Euler steps (default: 25)")
    add("--cfg", type=float, default=4.0, help="guidance scale, 1 for none (default: 4.0)")
    add("--size", type=int, nargs="+", help="pixels: one number, or height width (default: the checkpoint's)")
    add("--objective", choices=list(OBJECTIVES), help="how to sample (default: from the file, else diff2flow)")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: from the file)")
    add("--batch", type=int, default=8, help="pictures at a time (default: 8)")
    add("--precision", choices=["bf16", "fp32"], help="of the forward pass (default: bf16 on CUDA, fp32 on CPU)")
    add("--seed", type=int, default=0, help="of the noise; picture i is the same in every batch size (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", default="samples.png", help="the PNG grid (default: samples.png)")
    add("--singles", action="store_true", help="write each picture too, into a folder named like the grid")
    add("--print-sigmas", action="store_true", help="print the sampling grid for other tools and stop")
    return parser.parse_args()


def newest_run():
    """-> checkpoint, EMA weights or not, LoRA file or None: of the newest run that made one, else the bundled prior."""
    found = [p for name in ("model", "lora") for p in Path("runs").glob(f"*/{name}.safetensors")
             if (p.parent / "result.json").exists()]
    if not found:
        return TINY_PRIOR, False, None
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return (newest, False, None) if newest.name == "model.safetensors" else (*base_of(newest), newest)


def base_of(adapter):
    """-> the checkpoint that a LoRA was trained from, EMA weights or not: result.json beside it says, else ours."""
    result = Path(adapter).with_name("result.json")
    result = json.loads(result.read_text()) if result.exists() else {}
    return result.get("ckpt") or TINY_PRIOR, result.get("use_ema", False)


def sigma_grid(flow, steps):
    """The same Euler steps for k-diffusion tools, from the first trained level, where sigma is finite, to 0."""
    t_fm = torch.linspace(flow.f_table[-1].item(), 1, steps + 1, dtype=torch.float64)
    return ((1 - t_fm) / t_fm).tolist()


def read_prompts(args):
    prompts = list(args.prompt or [])
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {args.prompts}: not UTF-8 text") from error
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts {args.prompts}: no prompt in it")
    return prompts


def check(args):
    """ValueError for a setting that cannot work."""
    for name, low, high in (("steps", 1, math.inf), ("batch", 1, math.inf), ("n", 1, math.inf), ("seed", 0, 2**32),
                            ("cfg", -1e6, 1e6)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} {value:g}: it must be between {low:g} and {high:g}")
    if Path(args.out).suffix.lower() not in SUFFIXES or Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: it must be the name of a picture, such as samples.png")


@torch.no_grad()
def main():
    args = arguments()
    check(args)
    prompts, device = read_prompts(args), pick_device(args.device)
    if args.ckpt:
        ckpt, use_ema, adapter = args.ckpt, args.use_ema, args.lora
    else:
        ckpt, use_ema, adapter = (*base_of(args.lora), args.lora) if args.lora else newest_run()
    half = (args.precision or ("bf16" if device.type == "cuda" else "fp32")) == "bf16"
    amp = torch.autocast(device.type, torch.bfloat16, enabled=half)
    sd = load_checkpoint(ckpt, device, torch.bfloat16 if half else torch.float32, args.prediction, use_ema)
    if adapter:
        sd.metadata |= lora.load(adapter, sd.unet)
        lora.merge(sd.unet)
    objective = args.objective or sd.metadata.get("objective", "diff2flow")
    if objective not in OBJECTIVES:
        raise ValueError(f"{adapter or ckpt}: its objective {objective!r} is unknown; give one by --objective")
    prediction = args.prediction or sd.metadata.get("prediction", sd.prediction)
    flow = OBJECTIVES[objective](sd.unet, *sd_schedule(), prediction).to(device)
    if args.print_sigmas:
        print(" ".join(f"{sigma:.4f}" for sigma in sigma_grid(flow, args.steps)))
        return
    height, width = sd.picture_size(args.size)
    n = args.n or len(prompts) or 8
    if not prompts:
        style = sd.metadata.get("style", "solid")
        prompts = [Scenes(n, 8, 8, style, 1).scene(i).caption for i in range(n)]
    prompts = [prompts[i % len(prompts)] for i in range(n)]
    out = Path(args.out)
    folder = out.with_suffix("")
    (folder if args.singles else out.parent).mkdir(parents=True, exist_ok=True)
    print(f"{n} pictures of {height}x{width}, {args.steps} steps, cfg {args.cfg:g}, objective {objective}, "
          f"seed {args.seed}" + (f", LoRA {adapter}" if adapter else ""))

    shape = (sd.config.latent_channels, height // sd.factor, width // sd.factor)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(args.seed * 1_000_003 + i))
                         for i in range(n)]).to(device)
    with amp:
        uncond = sd.encode_text([args.negative])
    images = []
    for start in range(0, n, args.batch):
        some = prompts[start:start + args.batch]
        bar = partial(tqdm, desc=f"pictures {start + 1} to {start + len(some)}", unit="step", leave=False)
        with amp:
            context = sd.encode_text(some)
            latents = flow.sample(noise[start:start + len(some)], context, args.steps, uncond.expand_as(context),
                                  args.cfg, bar)
            images.append(sd.decode(latents).float().cpu())
    images = torch.cat(images)
    save_grid(out, images, min(n, 8), captions=prompts)
    print(out)
    if args.singles:
        for i, image in enumerate(images):
            save_image(folder / f"{i:04d}.png", image)
        print(f"{folder}/0000.png ... {n} pictures")


if __name__ == "__main__":
    cli(main)
