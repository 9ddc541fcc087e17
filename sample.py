"""Sample by Algorithm 2, Euler steps on u from noise to data: prompts to pictures, pairs for Reflow, pictures to depth.

    python sample.py --steps 4                                                      the newest run of train.py
    python sample.py --steps 25 --cfg 4 --ckpt sd21.safetensors --lora runs/mine/lora.safetensors --prompt "a red boat"
    python sample.py --pairs 1800000 --out pairs/ --ckpt sd15.safetensors --prompts captions.txt       Reflow, Sec. 4.2
    python sample.py --task depth --image a.jpg photos/ --steps 10 --ensemble 4 --lora runs/depth/lora.safetensors

What a file was trained for (objective, prediction) is read from its metadata. A model trained with diff2flow (or dm)
stays an ordinary Stable Diffusion checkpoint: --print-sigmas gives the grid for other tools, sigma = (1 - t_fm) / t_fm.
"""
import argparse
import json
import math
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import lora
from data import (SUFFIXES, ImageFolder, Scenes, cli, open_rgb, pictures_in, read_pairs, read_text, save_depth,
                  save_grid, save_image, to_tensor)
from diff2flow import OBJECTIVES
from model import TINY_PRIOR, Conditioned, load_checkpoint, pick_device, pick_precision, save_tensors
from schedule import sd_schedule

SHARD = 256  # pairs in a file
GRID = 64    # pictures in a grid, where each has a file of its own too


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=["text-to-image", "depth"], default="text-to-image", help="what the model was trained for")
    add("--ckpt", help="Stable Diffusion 1.x or 2.x file (default: the newest run's model, else the bundled small one; "
                       "with --lora the one that it was trained from)")
    add("--use-ema", action="store_true", help="take the EMA weights of a non-pruned file")
    add("--lora", help="LoRA file of train.py (default: the newest run's, if --ckpt is not given)")
    add("--prompt", action="append", help="what to draw; repeat it for more (default: captions of scenes)")
    add("--prompts", help="text file, one prompt a line")
    add("--negative", default="", help="what guidance leads away from (default: the empty prompt)")
    add("--data", help="folder of images with captions: their captions are the prompts")
    add("--n", type=int, help="number of pictures (default: one a prompt, 8 without prompts)")
    add("--image", nargs="+", help="pictures, or folders of them, whose depth is wanted")
    add("--ensemble", type=int, default=1, help="depth is the mean of so many samples (default: 1)")
    add("--pairs", type=int, help="write so many (noise, latent, prompt), for train.py --task reflow, into --out")
    add("--shards", type=int, nargs=2, metavar=("FIRST", "LAST"),
        help=f"of the pairs, make these files of {SHARD} only, to share the work among processes (default: all)")
    add("--steps", type=int, help="Euler steps (default: 25; 40 for pairs, 10 for depth)")
    add("--cfg", type=float, help="guidance scale, 1 for none (default: 4.0, 7.5 for pairs, 1 after Reflow)")
    add("--size", type=int, nargs="+", help="pixels: one number, or height width (default: the checkpoint's)")
    add("--objective", choices=list(OBJECTIVES), help="how to sample (default: from the file, else diff2flow)")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: from the file)")
    add("--batch", type=int, default=8, help="pictures at a time (default: 8)")
    add("--precision", choices=["bf16", "fp32"], help="of the forward pass (default: bf16 on CUDA, fp32 on CPU)")
    add("--seed", type=int, default=0, help="of the noise; picture i is the same in every batch size (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", help="the PNG grid (default: samples.png), or the folder of pairs or depth (default: pairs, depth)")
    add("--singles", action="store_true",
        help=f"write each picture into a folder named like the grid; the grid has the first {GRID}")
    add("--print-sigmas", action="store_true", help="print the sampling grid for other tools and stop")
    args = parser.parse_args()
    defaults = (dict(steps=40, cfg=7.5, out="pairs") if args.pairs is not None else
                dict(steps=10, out="depth") if args.task == "depth" else dict(steps=25, out="samples.png"))
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def newest_run(task):
    """-> checkpoint, EMA weights or not, LoRA file or None: of the newest run for that task, else the bundled prior."""
    found = [p for name in ("model", "lora") for p in Path("runs").glob(f"*/{name}.safetensors")
             if (result := lora.result_of(p)) and (result["task"] == "depth") == (task == "depth")]
    if not found:
        return TINY_PRIOR, False, None
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return (newest, False, None) if newest.name == "model.safetensors" else (*lora.base_of(newest), newest)


def sigma_grid(flow, steps):
    """The same Euler steps for k-diffusion tools, from the first trained level, where sigma is finite, to 0."""
    t_fm = torch.linspace(flow.f_table[-1].item(), 1, steps + 1, dtype=torch.float64)
    return ((1 - t_fm) / t_fm).tolist()


def read_prompts(args):
    prompts = list(args.prompt or [])
    if args.prompts:
        prompts += [line.strip() for line in read_text(Path(args.prompts)).splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts {args.prompts}: no prompt in it")
    if args.data:
        prompts += [caption for _, caption in ImageFolder(args.data, 1, 1).items]
    return prompts


def check(args):
    """ValueError for a setting that cannot work."""
    for name, low, high in (("steps", 1, math.inf), ("batch", 1, math.inf), ("n", 1, math.inf), ("seed", 0, 2**32),
                            ("cfg", -1e6, 1e6), ("pairs", 1, math.inf), ("ensemble", 1, math.inf)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} {value:g}: it must be between {low:g} and {high:g}")
    if args.shards and not (args.pairs and 0 <= args.shards[0] < args.shards[1] <= -(-args.pairs // SHARD)):
        raise ValueError(f"--shards {args.shards[0]} {args.shards[1]}: two of 0 to the number of files, which is "
                         f"--pairs over {SHARD}, rounded up")
    text = args.prompt or args.prompts or args.data or args.pairs
    if (args.task == "depth") != bool(args.image) or args.image and text:
        raise ValueError("--task depth and --image PICTURES go together, without prompts and pairs")
    grid = not args.pairs and args.task != "depth"
    if grid and (Path(args.out).suffix.lower() not in SUFFIXES or Path(args.out).is_dir()):
        raise ValueError(f"--out {args.out}: it must be the name of a picture, such as samples.png")


def noises(numbers, shape, seed):
    """The noise of pictures `numbers` -> (len(numbers), *shape): picture i from (seed, i) alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
                        for i in numbers])


def make_pairs(args, about, prompts, noise_of, sample):
    """Write pairs (noise, latent, prompt) in float16, pair i from (seed, i), in files of SHARD.

    Each file is written anew after each batch, whole, so that an interrupted run goes on with the pair it was at.
    """
    out, first, last = Path(args.out), *(args.shards or (0, -(-args.pairs // SHARD)))
    numbers = range(first * SHARD, min(last * SHARD, args.pairs))
    size = 2 * 2 * noise_of([0])[0].numel()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(numbers):,} pairs of {size:,} bytes, {args.steps} steps, cfg {args.cfg:g}, into {out}/")
    with tqdm(total=len(numbers), unit="pair", dynamic_ncols=True) as bar:
        for shard in range(first, last):
            path, wanted = out / f"pairs-{shard:06d}.safetensors", range(args.pairs)[shard * SHARD:(shard + 1) * SHARD]
            made = read_pairs(path) if path.exists() else None
            if made and made["about"] != about:
                raise ValueError(f"{path}: its pairs were made with other settings; choose another --out")
            noise, latent, prompt = (made["noise"], made["latent"], made["prompts"]) if made else ([], [], [])
            bar.update(min(len(noise), len(wanted)))
            for start in range(len(noise), len(wanted), args.batch):
                some = wanted[start:start + args.batch]
                texts, x0 = [prompts[i % len(prompts)] for i in some], noise_of(some).half()
                x1 = sample(x0, texts).half().cpu()
                noise, latent, prompt = [*noise, *x0], [*latent, *x1], [*prompt, *texts]
                save_tensors(path, {"noise": torch.stack(noise), "latent": torch.stack(latent)},
                             {"prompts": json.dumps(prompt), "about": json.dumps(about)})
                bar.update(len(some))
    base = ["--ckpt", str(args.ckpt)] if args.ckpt else []
    print(f"next: {shlex.join(['python', 'train.py', '--task', 'reflow', '--data', str(out), *base])}")


def pictures_of(paths):
    """Files, and folders of files -> {where below --out the depth goes: picture}."""
    found = {}
    for path in map(Path, paths):
        inside = pictures_in(path)
        for picture in inside if path.is_dir() else [path]:
            name = (picture.relative_to(path) if path.is_dir() else Path(picture.name)).with_suffix("")
            if name in found:
                raise ValueError(f"{found[name]} and {picture} would be written to the same {name}.npy: "
                                 "give each an --out of its own")
            found[name] = picture
        if not path.exists():
            raise ValueError(f"--image {path}: no such file")
        if path.is_dir() and not inside:
            raise ValueError(f"{path} has no picture: give a folder with {' '.join(SUFFIXES)} files")
    return found


def make_depth(args, sd, pictures, depth_of):
    """For each picture, at its own size, log depth in which -1 is its near and 1 its far quantile (1 % and 99 %), as
    NAME.npy; as NAME_16bit.png, 0 near and 65535 far; and as a coloured NAME_colour.png."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, path in tqdm(pictures.items(), "depth", unit="picture", dynamic_ncols=True):
        try:
            image = open_rgb(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read as a picture ({error})") from error
        height, width = sd.picture_size(args.size)
        if not args.size:  # as many pixels as in training, in the picture's own shape
            factor = math.sqrt(height * width / (image.height * image.width))
            height, width = (max(1, round(side * factor / sd.multiple)) * sd.multiple for side in image.size[::-1])
        depth = depth_of(to_tensor(image.resize((width, height), Image.LANCZOS))[None])
        depth = F.interpolate(depth[None, None], image.size[::-1], mode="bilinear", antialias=True)[0, 0].clamp(-1, 1)
        save_depth(out / name, depth.numpy())
    print(f"{out}/{name}.npy ... depth of {len(pictures)} pictures")


@torch.no_grad()
def main():
    args = arguments()
    check(args)
    prompts, pictures, device = read_prompts(args), pictures_of(args.image or []), pick_device(args.device)
    if args.ckpt or args.pairs and not args.lora:  # pairs come from a model that is not tuned yet
        ckpt, use_ema, adapter = args.ckpt or TINY_PRIOR, args.use_ema, args.lora
    else:
        ckpt, use_ema, adapter = (*lora.base_of(args.lora), args.lora) if args.lora else newest_run(args.task)
    precision, amp = pick_precision(args.precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sd = load_checkpoint(ckpt, device, dtype, args.prediction, use_ema)
    wide = sd.config.in_channels > sd.config.latent_channels
    if args.task == "depth":
        sd.widen()
    if adapter:
        sd.metadata |= lora.load(adapter, sd.unet)
        lora.merge(sd.unet)
    objective = args.objective or sd.metadata.get("objective", "diff2flow")
    if objective not in OBJECTIVES:
        raise ValueError(f"{adapter or ckpt}: its objective {objective!r} is unknown; give one by --objective")
    prediction = args.prediction or sd.metadata.get("prediction", sd.prediction)
    args.cfg = float(sd.metadata.get("cfg", 4.0)) if args.cfg is None else args.cfg
    if (wide or sd.metadata.get("task") == "depth") != (args.task == "depth"):
        raise ValueError(f"{adapter or ckpt}: not trained for --task {args.task}")
    net = Conditioned(sd.unet) if args.task == "depth" else sd.unet
    flow = OBJECTIVES[objective](net, *sd_schedule(), prediction).to(device)
    if args.print_sigmas:
        print(" ".join(f"{sigma:.4f}" for sigma in sigma_grid(flow, args.steps)))
        return
    if args.task == "depth":
        empty = sd.encode_text([""])

        def depth_of(image):
            """image (1, 3, H, W) -> (H, W), the mean of the ensemble."""
            with amp:
                picture = sd.encode(image.to(device)).float()
                samples = [flow.sample(x0[None].to(device), (empty, picture), args.steps)
                           for x0 in noises(range(args.ensemble), picture.shape[1:], args.seed)]
                return torch.stack([sd.decode(x1).float().cpu().mean((0, 1)) for x1 in samples]).mean(0)

        make_depth(args, sd, pictures, depth_of)
        return
    height, width = sd.picture_size(args.size)
    n = args.pairs or args.n or len(prompts) or 8
    if not prompts:
        scenes = Scenes(n, 8, 8, sd.metadata.get("style", "solid"), 1)
        prompts = [scenes.scene(i).caption for i in range(n)]
    shape = (sd.config.latent_channels, height // sd.factor, width // sd.factor)
    with amp:
        uncond = sd.encode_text([args.negative])

    def sample(noise, texts, **more):
        with amp:
            context = sd.encode_text(texts)
            return flow.sample(noise.to(device), context, args.steps, uncond.expand_as(context), args.cfg, **more)

    if args.pairs:
        about = {"ckpt": Path(ckpt).name, "lora": adapter and str(adapter), "objective": objective, "seed": args.seed,
                 "steps": args.steps, "cfg": args.cfg, "negative": args.negative, "size": [height, width]}
        make_pairs(args, about, prompts, lambda numbers: noises(numbers, shape, args.seed), sample)
        return
    prompts = [prompts[i % len(prompts)] for i in range(n)]
    out = Path(args.out)
    folder = out.with_suffix("")
    (folder if args.singles else out.parent).mkdir(parents=True, exist_ok=True)
    print(f"{n} pictures of {height}x{width}, {args.steps} steps, cfg {args.cfg:g}, objective {objective}, "
          f"seed {args.seed}" + (f", LoRA {adapter}" if adapter else ""))
    images, shown, digits = [], min(n, GRID) if args.singles else n, max(4, len(str(n - 1)))
    for start in range(0, n, args.batch):
        some = range(n)[start:start + args.batch]
        with tqdm(desc=f"pictures {some[0] + 1} to {some[-1] + 1}", total=args.steps, unit="step", leave=False) as bar:
            latents = sample(noises(some, shape, args.seed), prompts[some[0]:some[-1] + 1],
                             callback=lambda x_fm: bar.update())
        with amp:
            decoded = sd.decode(latents).float().cpu()
        if args.singles:
            for i, image in zip(some, decoded):
                save_image(folder / f"{i:0{digits}d}.png", image)
        images += decoded[:max(0, shown - len(images))]
    save_grid(out, torch.stack(images), min(shown, 8), captions=prompts[:len(images)])
    print(out)
    if args.singles:
        print(f"{folder}/{0:0{digits}d}.png ... {n} pictures")


if __name__ == "__main__":
    cli(main)
