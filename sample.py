"""Prompts to pictures by Algorithm 2: Euler steps on the velocity u, from noise (t_fm = 0) to data (t_fm = 1).

    python sample.py --steps 4                                                      the newest run of train.py
    python sample.py --ckpt sd21.safetensors --lora runs/mine/lora.safetensors --prompt "a red boat"
    python sample.py --pairs 1800000 --out pairs/ --ckpt sd15.safetensors --prompts captions.txt       Reflow, Sec. 4.2

As in the paper, 25 steps by default; 2 to 4 are for models after Reflow. A diffusion model can be sampled before any
training: Diff2Flow makes it a velocity field. --objective dm samples it by DDIM instead. --print-sigmas prints the
steps for other tools.
"""
import argparse
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import noises
from diff2flow import NAIVE, OBJECTIVES
from support.files import check_range, cli, parse
from support.load import (
    BUNDLED_PRIOR,
    check_drawn,
    find_files,
    guidance,
    load_flow,
    objective_of,
    pick_device,
    pick_precision,
    picture_size,
    read_result,
    split_strength,
    unconditional,
)
from support.packed import pack
from support.pairs import make_pairs, pair_settings, reflow_command
from support.pictures import (
    GridPlan,
    check_picture_file,
    prepare_files,
    save_grid,
    save_picture,
    settings_text,
    single_files,
    to_pil,
)
from support.processes import Ranks
from support.prompts import check_length, read_prompts
from toy.scenes import PLAIN, Scenes

PICTURES_IN_GRID = 64    # at most, if --singles gives each picture a file of its own


# ------------------------------------------------------------------ settings

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", help="Stable Diffusion 1.x, 2.x or XL: file or diffusers folder (default: the one that --lora was "
        "trained on; without --lora the newest run's model, else the bundled prior)")
    add("--lora", action="append", metavar="FILE[:STRENGTH]", help="LoRA of train.py or other tools, with a strength "
        "(default: 1); repeat it for several (default: the newest run's, if --ckpt is not given)")
    add("--use-ema", action="store_true", help="load the EMA weights of a non-pruned file")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: from the file)")
    add("--zero-snr", action="store_true",
        help="the network was trained with zero terminal SNR (default: as the file says)")
    add("--objective", choices=list(OBJECTIVES), help="how to sample (default: diff2flow, which is Algorithm 2; for "
        "models of fm, fm-flip and rf as they were trained; rf for rectified-flow files of others)")
    add("--precision", choices=["bf16", "fp32"],
        help="of forward passes (default: bf16 where the device has it, else fp32)")
    add("--compile", action="store_true", help="torch.compile the UNet: minutes first, then faster steps on a GPU")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", help="what to draw; repeat it for more pictures (default: captions that the model "
        "was trained on)")
    add("--prompts", help="text file with one prompt per line")
    add("--data", help="folder of images with captions, which are the prompts")
    add("--negative", default="", help="prompt that guidance leads away from (default: the empty prompt)")
    add("--n", type=int, help="number of pictures (default: one per prompt; 8 without prompts)")
    add("--first", type=int, default=0, help="number of the first picture, to draw a few pictures of a series again: "
        "picture i takes noise i and the i-th prompt, and its metadata has its number (default: 0)")
    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=int, help="Euler steps (default: 25; for pairs 40)")
    add("--cfg", type=float, help="guidance scale, 1 for none (default: 4; for pairs 7.5; after Reflow 1)")
    add("--size", type=int, nargs="+", help="pixels: one number, or height width (default: 512, or the size that the "
        "model's metadata names; SD 2.1 was trained at 768; SDXL 1024)")
    add("--seed", type=int, default=0, help="seed of the noise; with another --batch a picture is the same but for "
        "rounding, by up to 1/255 in float32 and 8/255 in bf16 (default: 0)")
    add("--batch", type=int, default=8, help="pictures at a time (default: 8)")
    add("--print-sigmas", action="store_true", help="print the steps as sigmas for other tools, and stop")
    add = parser.add_argument_group("output").add_argument
    add("--out", help="the PNG grid (default: samples.png), or the folder of the pairs (default: pairs)")
    add("--singles", action="store_true", help="also write each picture to a folder named like the grid, which then "
        f"shows the first {PICTURES_IN_GRID}")
    add("--pairs", type=int, help="instead of pictures, write this many (noise, latent, prompt) for Reflow to --out")
    args = parse(parser)
    pictures, pairs = {"steps": 25, "out": "samples.png"}, {"steps": 40, "out": "pairs"}
    for name, value in (pictures if args.pairs is None else pairs).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.pairs and not args.ckpt and not args.lora:
        args.ckpt = str(BUNDLED_PRIOR)              # not the newest run: pairs come from a model before Reflow
    check_range(args, 1, 1e9, "steps", "batch", "n", "pairs")
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 0, 1e9, "first")
    check_range(args, -1e6, 1e6, "cfg")
    if args.pairs is None:
        check_picture_file(args.out, (0, 0))
    elif args.first:
        raise ValueError("--first is for pictures; --pairs resumes by itself")
    return args


# ------------------------------------------------------------------ prompts

class SceneCaptions:
    """Captions of n procedural scenes, which the bundled priors were trained on."""

    def __init__(self, n, style):
        self.scenes = Scenes(n, 8, 8, style, 1)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        return self.scenes.scene(i).caption


def captions_of(args, sd, n):
    """-> prompts where none is given: captions that the run was trained on, else captions of scenes."""
    captions = read_result(split_strength(args.lora[0])[0] if args.lora else args.ckpt).get("captions")
    if captions:
        return captions
    style = sd.metadata.get("style")
    return SceneCaptions(n, style if style in PLAIN else "solid")


# ------------------------------------------------------------------ pictures

def sigma_grid(flow, steps):
    """The Euler steps as sigmas for k-diffusion tools, sigma = (1 - t_fm) / t_fm, from the first trained level to 0. If
    that level is pure noise (zero terminal SNR), its sigma is 4096, as in diffusers."""
    t_fm = torch.linspace(max(flow.f_table[-1].item(), 1 / 4097), 1, steps + 1, dtype=torch.float64)
    return ((1 - t_fm) / t_fm).tolist()


def print_sigmas(flow, steps):
    if objective_of(flow) in NAIVE:
        raise ValueError(f"--print-sigmas: other tools cannot sample a model trained by {objective_of(flow)}")
    sigmas = ", ".join(f"{sigma:.4f}" for sigma in sigma_grid(flow, steps))
    print(f"ComfyUI, ManualSigmas: {sigmas}\ndiffusers: sigmas=[{sigmas}]")
    if flow.f_table[-1] == 0:
        print("zero terminal SNR: ModelSamplingDiscrete with zsnr in ComfyUI, rescale_betas_zero_snr=True in "
              "diffusers' scheduler")


def make_pictures(args, sd, flow, prompts, size, files, making, ranks):
    """Draw a picture for each prompt, numbered from args.first on -> the pictures of the grid, in the main process.
    files: paths of --singles, or []; making: settings_text of a prompt. Processes of torchrun take the batches in turn.
    """
    shape, pictures = sd.latent_shape(size), {}
    uncond = unconditional(sd, args.cfg, args.negative)
    for start in range(ranks.rank * args.batch, len(prompts), ranks.count * args.batch):
        batch = range(len(prompts))[start:start + args.batch]
        title = f"pictures {batch[0] + 1} to {batch[-1] + 1}"
        with tqdm(desc=title, total=args.steps, unit="step", leave=False, disable=not ranks.is_main) as bar:
            x0 = noises([args.first + i for i in batch], shape, args.seed).to(sd.device)
            context = sd.encode_text([prompts[i] for i in batch])
            x1 = flow.sample(x0, context, args.steps, uncond, args.cfg, callback=lambda x_fm: bar.update())
            drawn = sd.decode(x1).float().cpu()
        check_drawn(sd, x1, drawn)
        for i, picture in zip(batch, drawn):
            if files:
                save_picture(files[i], to_pil(picture), making(prompts[i], Picture=args.first + i))
            if not files or i < PICTURES_IN_GRID:
                pictures[i] = picture
    pictures = ranks.gather(pictures)
    return [pictures[i] for i in sorted(pictures)]


@torch.no_grad()
def main():
    args = arguments()
    prompts, device = read_prompts(args), pick_device(args.device)
    (precision, dtype), ranks = pick_precision(args.precision, device), Ranks(device)
    args.ckpt, args.lora, args.use_ema = find_files(args.ckpt, args.lora, args.use_ema, task="text-to-image")
    sd, flow = load_flow(args.ckpt, args.lora, device=device, dtype=dtype, objective=args.objective,
                         prediction=args.prediction, use_ema=args.use_ema, zero_snr=args.zero_snr)
    if args.print_sigmas:
        print_sigmas(flow, args.steps)
        return
    pack(sd, args.compile)
    args.cfg, size = guidance(sd, args.cfg, bool(args.pairs)), list(picture_size(sd, args.size))
    n = args.pairs or args.n or len(prompts) or 8
    prompts = prompts or captions_of(args, sd, args.first + n)
    if isinstance(prompts, list):
        check_length(prompts, args.negative)
    if args.pairs:
        settings = pair_settings(args, sd, flow, prompts, size)
        make_pairs(args, sd, flow, prompts, size, settings, ranks)
        print(f"next: {reflow_command(args)}")
        return
    numbers = range(args.first, args.first + n)
    prompts = [prompts[i % len(prompts)] for i in numbers]
    files = single_files(Path(args.out).with_suffix(""), numbers) if args.singles else []
    in_grid = prompts[:PICTURES_IN_GRID] if files else prompts
    columns = min(len(in_grid), 8)
    making = partial(settings_text, args, sd, flow, negative=args.negative,
                     **{"CFG scale": f"{args.cfg:g}", "Size": f"{size[1]}x{size[0]}"})
    shown = numbers[:len(in_grid)]
    about = making("\n".join(in_grid), Picture=shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}")
    if ranks.is_main:
        grid_size = GridPlan(len(in_grid), *size, columns, captions=in_grid).size
        prepare_files(args.out, grid_size, about, files, size, making(max(prompts, key=len)))
    ranks.wait()
    print(f"{n} pictures of {size[0]}x{size[1]}, {args.steps} steps, cfg {args.cfg:g}, objective {objective_of(flow)}, "
          f"seed {args.seed}, {precision} on {device}")
    pictures = make_pictures(args, sd, flow, prompts, size, files, making, ranks)
    ranks.leave()
    if ranks.is_main:
        save_grid(args.out, torch.stack(pictures), columns, about, captions=in_grid)
        print(args.out + (f"\n{files[0].parent}/: {n} pictures" if files else ""))


if __name__ == "__main__":
    cli(main)
