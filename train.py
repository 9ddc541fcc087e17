"""Train: Diff2Flow finetuning (Algorithm 1) and its baselines, all weights or LoRA: text-to-image, Reflow, depth.

    python train.py                                            the bundled prior learns a new style, on a CPU too
    python train.py --ckpt sd21.safetensors --data photos/     the paper's recipe with LoRA on your pictures
    python train.py --resume runs/NAME                         go on with a run that was stopped, to the same result

A run is a folder: lora.safetensors or model.safetensors (what other tools load), state.safetensors (what --resume
reads), metrics.jsonl, validation.jsonl (what --preview-every measured), and pictures. Step s draws its batch, noise and
times from (seed, s) alone.
"""
import argparse
import contextlib
import json
import math
import os
import shlex
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import lora
import run
from data import ImageFolder, Kept, Keys, Pairs, progress, save_grid, seed_of
from depth import DepthFolders, DepthScenes
from diff2flow import OBJECTIVES, velocity_error
from files import SOFTWARE, check_range, cli, replacing
from model import load_checkpoint
from sample import BUNDLED_PRIOR, draw, make_flow, pick_device, pick_precision
from storage import Tars, fill_cache
from toy.scenes import Scenes

TASKS = ("text-to-image", "reflow", "depth")
HELD_OUT_SEED = 30_000_000  # of the scenes and the noise that every run is measured on
RECIPES = {  # each flag's default by task: the paper's (Appendix A), then the bundled prior's
    #                   text-to-image  reflow    depth         text-to-image  reflow    depth
    "steps":           (20_000,        60_000,   20_000,       240,           400,      400),
    "batch":           (4,             4,        4,            32,            32,       32),
    "grad_accum":      (16,            32,       8,            1,             1,        1),
    "lr":              (1e-5,          2e-5,     3e-5,         2e-3,          1e-3,     1e-3),
    "decay":           ("constant",    "cosine", "cosine",     "cosine",      "cosine", "cosine"),
    "warmup":          (0,             0,        0,            20,            20,       20),
    "lora":            ("base",        "small",  "base",       "small",       "small",  "none"),
    "caption_dropout": (0.02,          0.0,      0.02,         0.02,          0.0,      0.02),
    "size":            (None,          None,     [384, 512],   None,          None,     None),
    "style":           ("outline",     None,     "room",       "outline",     None,     "room"),
    "scenes":          (4096,          None,     4096,         1024,          None,     2048),
    "validation":      (16,            16,       16,           64,            64,       64),
    "previews":        (4,             4,        4,            8,             8,        8),
}


# ------------------------------------------------------------------ settings

def recipe(task, bundled):
    """-> {flag: default} of a task on a checkpoint of your own, or on a bundled prior."""
    column = TASKS.index(task) + (len(TASKS) if bundled else 0)
    return {name: row[column] for name, row in RECIPES.items()}


def defaults(name):
    """A flag's row of RECIPES in words, for its help."""
    row = ["-" if value is None else str(value) for value in RECIPES[name]]
    paper, bundled = row[:len(TASKS)], row[len(TASKS):]
    by_task = ", ".join(f"{task} {value}" for task, value in zip(TASKS, paper))
    on_bundled = "" if bundled == paper else f"; on a bundled prior {', '.join(bundled)}"
    return f"(default: {by_task}{on_bundled})"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, default="text-to-image", help="what to train (default: text-to-image)")
    add("--ckpt", help="Stable Diffusion 1.x or 2.x, a .safetensors or .ckpt file or a diffusers folder (default: the "
                       "bundled v-prior)")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: from the file)")
    add("--zero-snr", action="store_true",
        help="the network's noise schedule ends at zero terminal SNR (default: as the file says)")
    add("--use-ema", action="store_true", help="start from the EMA weights of a non-pruned file")
    add("--data", nargs="+", help="folder of images with captions, .txt or metadata.jsonl, or tars of them, as "
        "'shards/{00000..00099}.tar'; of the task reflow the folder of pairs that sample.py made; of the task depth "
        "one or more with depth (default: procedural scenes)")
    add("--cache", help="folder that keeps the latents of the pictures in --data, cropped in the centre and never "
        "flipped, and the text states of their captions, for this run and others: 64 KB a picture of 512 px, 315 KB a "
        "caption of SD 2.x, half of that in bf16 (default: both are computed in each step)")
    add("--weights", type=float, nargs="+", help="how often each folder of depth is drawn from (default: by its size)")
    add("--style", choices=["solid", "outline", "room"], help=f"style of the scenes {defaults('style')}")
    add("--scenes", type=int, help=f"number of different scenes {defaults('scenes')}")
    add("--size", type=int, nargs="+", help="pixels: one number, or height width (default: the checkpoint's own, which "
        "is 64 for the bundled priors, else 512; depth on your checkpoint: 384 512)")
    add("--objective", choices=list(OBJECTIVES), default="diff2flow",
        help="the method, or a baseline of the paper (default: diff2flow)")
    add("--t-sampling", choices=["uniform", "logit-normal"], default="uniform",
        help="distribution of the times t_fm (default: uniform)")
    add("--lora", help=f"base, small, a rank such as 16, or none for all weights {defaults('lora')}")
    add("--steps", type=int, help=f"optimizer steps {defaults('steps')}")
    add("--batch", type=int, help=f"images in a forward pass {defaults('batch')}")
    add("--grad-accum", type=int, help=f"forward passes in an optimizer step {defaults('grad_accum')}")
    add("--lr", type=float, help=f"learning rate of Adam {defaults('lr')}")
    add("--decay", choices=["constant", "cosine"], help=f"how the learning rate goes on {defaults('decay')}")
    add("--warmup", type=int, help=f"steps in which the learning rate rises {defaults('warmup')}")
    add("--caption-dropout", type=float, help=f"share of captions that become empty {defaults('caption_dropout')}")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: 1.0)")
    add("--ema", type=float, default=0.999, help="decay of the averaged weights, which are saved (default: 0.999)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, about a third slower")
    add("--precision", choices=["bf16", "fp32"],
        help="of the forward pass (default: bf16 where the device computes it, else fp32)")
    add("--validation", type=int, help=f"held-out pictures for the velocity error {defaults('validation')}")
    add("--previews", type=int, help=f"pictures in a preview {defaults('previews')}")
    add("--preview-every", type=int, default=1000, help="steps between previews, 0 for none (default: 1000)")
    add("--save-every", type=int, default=1000, help="steps between saves, beside those at a signal (default: 1000)")
    add("--keep", action="store_true", help="keep the weights of every save, with its step in the name")
    add("--seed", type=int, default=0, help="seed of the scenes, the order, the noise and the times (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", help="folder of the run (default: runs/, the task and the time)")
    add("--resume", help="folder of a run to go on with; its own settings apply, but --steps, --lr, --save-every, "
                         "--preview-every and --device may be others")
    args = parser.parse_args()
    if args.resume:
        settings = run.resumed_settings(args.resume, run.given_flags(parser, args))
        if settings["task"] not in TASKS:
            raise ValueError(f"--resume {args.resume}: a run of toy.make_prior, whose own --resume goes on with it")
        args = run.parsed_again(parser, settings, run.state_file(args.resume))
    args.ckpt = args.ckpt and os.path.abspath(args.ckpt)            # a run may be resumed from another folder
    args.cache = args.cache and os.path.abspath(args.cache)
    args.data = args.data and [os.path.abspath(folder) for folder in args.data]
    bundled = args.ckpt is None or Path(args.ckpt).resolve().parent == BUNDLED_PRIOR.parent
    for name, value in recipe(args.task, bundled).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        check(args)
    except ValueError as error:
        raise ValueError(f"{run.state_file(args.resume)}: {error}" if args.resume else str(error)) from None
    return args


def check(args):
    """ValueError for a setting that cannot work."""
    check_range(args, 1, 1e9, "steps", "batch", "grad_accum", "scenes", "validation", "previews", "save_every")
    check_range(args, 0, 1e9, "preview_every", "warmup")
    check_range(args, 0, 2**32, "seed")
    check_range(args, 1e-12, 1, "lr")
    check_range(args, 1e-12, math.inf, "clip")
    check_range(args, 0, 1, "caption_dropout", "ema")
    if args.lora not in ("none", *lora.PRESETS) and not (args.lora.isdecimal() and int(args.lora) > 0):
        raise ValueError(f"--lora {args.lora}: it is base, small, none, or a rank such as 16")
    tars = [path for path in args.data or [] if path.endswith(".tar")]
    if tars and (args.task != "text-to-image" or len(tars) < len(args.data)):
        raise ValueError(f"--data {tars[0]}: only the task text-to-image reads tars, and no folders beside them")
    if args.task != "depth" and args.data and len(args.data) > 1 and not tars:
        raise ValueError(f"--data {' '.join(args.data)}: the task {args.task} takes one folder")
    if args.cache and (args.task != "text-to-image" or not args.data or tars):
        raise ValueError("--cache: it keeps what a --data folder of pictures with captions becomes, and nothing of "
                         "scenes, tars, pairs or depth: leave it out")
    if args.task != "depth" and args.weights:
        raise ValueError("--weights: only the task depth has several folders to weigh")
    if args.task == "reflow" and (not args.data or args.size or args.objective != "diff2flow"):
        raise ValueError("--task reflow trains a velocity field on the folder of pairs that --data names, at their "
                         "size: first python sample.py --pairs N --out pairs")


# ------------------------------------------------------------------ model

def load_trainable(args, device):
    """-> sd, flow, {name: parameter} of what is trained: the UNet's LoRA, or all of it."""
    frozen = torch.bfloat16 if args.precision == "bf16" and args.lora != "none" else torch.float32
    sd = load_checkpoint(args.ckpt or BUNDLED_PRIOR, device, frozen, args.prediction, args.use_ema, args.zero_snr)
    if args.task == "depth":
        sd.add_picture_input()
    elif sd.is_depth_model:
        raise ValueError(f"{args.ckpt}: a depth model, which only --task depth trains")
    flow = make_flow(sd, args.objective)
    if args.lora == "none":
        sd.unet.requires_grad_()
    else:
        lora.inject(sd.unet, int(args.lora) if args.lora.isdecimal() else args.lora)
    sd.unet.to(memory_format=torch.channels_last).train().checkpointing = args.checkpointing
    return sd, flow, {name: parameter for name, parameter in sd.unet.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------ data

def open_data(args, sd):
    """-> dataset, held-out items, [height, width], and what they are, in words. Folders and tars of pictures hold none
    out: their first ones take that place."""
    n = args.validation
    if args.task == "reflow":
        dataset = Pairs(args.data[0], n)
        held_out = [dataset.pair(len(dataset) + i) for i in range(n)]
        return dataset, held_out, dataset.settings["size"], f"{len(dataset):,} pairs in {args.data[0]}"
    height, width = sd.picture_size(args.size)
    if not args.data:
        kind = DepthScenes if args.task == "depth" else Scenes
        dataset = kind(args.scenes, height, width, args.style, args.seed)
        held_out = kind(n, height, width, args.style, HELD_OUT_SEED)
        source = f"{len(dataset):,} procedural scenes, style {args.style} (--data FOLDER trains on your own)"
    elif args.task == "depth":
        dataset = held_out = DepthFolders(args.data, args.weights, height, width, args.seed)
        source = f"{len(dataset):,} pictures with depth in {' '.join(args.data)}"
    elif args.data[0].endswith(".tar"):
        dataset = Tars(args.data, height, width, args.seed, *run.rank_and_count())
        print("tars: with another number of processes, or after --resume, pictures come in another order, some of them "
              "again before others have come")
        return dataset, dataset.first(n), [height, width], f"{len(dataset.tars):,} tars, first {dataset.tars[0]}"
    else:
        dataset = held_out = ImageFolder(args.data[0], height, width, args.seed)
        source = f"{len(dataset):,} pictures in {args.data[0]}"
    return dataset, [held_out[i] for i in range(n)], [height, width], source


def to_latents(sd, batch):
    """A batch of pictures, of pictures with depth, or of pairs -> the latents x1, and by task x0, picture, mask. What
    was encoded before, scenes or by --cache, comes as latents already."""
    batch = {name: value if name == "caption" else value.to(sd.device, non_blocking=True)
             for name, value in batch.items()}
    if "latent" in batch:
        return {"x1": batch["latent"], "x0": batch["noise"], "caption": batch["caption"]}
    if "valid" in batch:
        has_hole = F.max_pool2d((~batch["valid"]).float(), sd.factor)        # a latent counts if all its pixels do
        return {"x1": sd.encode(batch["depth"].expand(-1, 3, -1, -1)).float(), "mask": 1 - has_hole,
                "picture": sd.encode(batch["image"]).float(), "caption": batch["caption"]}
    if "image" in batch:
        return {"x1": sd.encode(batch["image"]).float(), "caption": batch["caption"]}
    return batch


def encode_item(sd, item):
    """to_latents of one item: alone, since the last bits depend on the batch, and a resumed run has other batches."""
    return {name: value[0] for name, value in to_latents(sd, default_collate([item])).items()}


def load_batches(args, sd, dataset, start, ranks):
    """-> this process's batches from step `start` on. Photographs are read ahead by other processes; scenes are encoded
    once; a run that goes on with tars begins another pass, so that pictures may come again early."""
    options = {"num_workers": min(8, os.cpu_count()), "pin_memory": sd.device.type == "cuda",
               "worker_init_fn": run.ignore_interrupts}
    if isinstance(dataset, Tars):
        dataset.start, options["num_workers"] = start, min(options["num_workers"], len(dataset.tars) // ranks.count)
        return DataLoader(dataset, args.batch, **options)
    images_a_step = args.batch * args.grad_accum
    keys = Keys(len(dataset), args.seed, start * images_a_step, args.steps * images_a_step, args.batch, ranks.rank,
                ranks.count)
    if not args.data:
        return DataLoader(Kept(dataset, partial(encode_item, sd)), args.batch, sampler=keys)
    return DataLoader(dataset, args.batch, sampler=keys, **options)


# ------------------------------------------------------------------ by task: a batch -> x1, x0, context, mask

def text_to_image(sd, batch):
    """With --cache a batch has the text states of its captions as they were, and the one of the empty caption, which
    stands for those that were dropped."""
    if "context" not in batch:
        return batch["x1"], None, sd.encode_text(batch["caption"]), None
    is_empty = torch.tensor([caption == "" for caption in batch["caption"]], device=batch["x1"].device).view(-1, 1, 1)
    return batch["x1"], None, torch.where(is_empty, batch["empty"], batch["context"]), None


def reflow(sd, batch):
    """The noise is the one that the latents were sampled from (Sec. 4.2)."""
    return batch["x1"], batch["x0"], sd.encode_text(batch["caption"]), None


def depth(sd, batch):
    """The network is asked about a picture's depth, and only where depth is known (Sec. 4.3)."""
    return batch["x1"], None, batch["picture"], batch["mask"]


EXAMPLES = {"text-to-image": text_to_image, "reflow": reflow, "depth": depth}


# ------------------------------------------------------------------ validation

def spread_times(n, device):
    """-> t_fm (n,), spread evenly over [0, 1] by the golden ratio, whatever n is."""
    return (torch.arange(n, device=device) * 0.618034 + 0.5) % 1


class Validation:
    """Held-out pictures, always with the same noise: their velocity error, and what the model draws for their captions
    or as their depth. example is one of EXAMPLES; cfg_few and cfg_many guide samples of 4 and of 25 steps."""

    def __init__(self, args, out, sd, flow, example, items):
        self.sd, self.flow, self.example, self.out = sd, flow, example, out
        self.batch_size, self.previews = args.batch, args.previews
        self.cfg_few, self.cfg_many = (2.0, 4.0) if example is text_to_image else (1.0, 1.0)
        latents = [encode_item(sd, item) for item in progress(items, "encoding held-out pictures")]
        self.latents = default_collate(latents)
        self.captions, x1 = self.latents["caption"], self.latents["x1"]
        shape, generator = (max(len(x1), args.previews), *x1.shape[1:]), torch.Generator().manual_seed(HELD_OUT_SEED)
        self.noise = torch.randn(shape, generator=generator).to(x1.device)
        if "x0" in self.latents:
            self.noise[:len(x1)] = self.latents["x0"]
        self.seconds_a_picture = 0.0

    def batches(self, n, title):
        """-> noise and batch of n pictures; if there are fewer, they come again from the first on."""
        for start in progress(range(0, n, self.batch_size), title):
            numbers = range(n)[start:start + self.batch_size]
            rows = [i % len(self.captions) for i in numbers]
            batch = {name: [value[i] for i in rows] if name == "caption" else value[rows]
                     for name, value in self.latents.items()}
            yield numbers, self.noise[numbers.start:numbers.stop], batch

    @torch.no_grad()
    def velocity_error(self):
        """Mean |u - (x1 - x0)|^2 at times that are spread evenly over [0, 1]."""
        total, n, begin = 0.0, len(self.captions), time.time()
        spread = spread_times(n, self.noise.device)
        for numbers, noise, batch in self.batches(n, "velocity error"):
            x1, _, context, mask = self.example(self.sd, batch)
            t_fm = spread[numbers.start:numbers.stop]
            total += velocity_error(self.flow, x1, noise, t_fm, context, mask).item() * len(x1)
        self.seconds_a_picture = (time.time() - begin) / n
        return total / n

    @torch.no_grad()
    def draw(self, steps, cfg):
        """-> pictures (previews, 3, H, W)."""
        pictures = []
        for _, noise, batch in self.batches(self.previews, f"samples of {steps} steps"):
            _, _, context, _ = self.example(self.sd, batch)
            pictures.append(draw(self.sd, self.flow, noise, context, steps, cfg=cfg))
        return torch.cat(pictures)

    def preview(self, step):
        """Write a grid of samples and a line of validation.jsonl."""
        error, path = self.velocity_error(), self.out / f"step_{step:06d}.png"
        captions = [self.captions[i % len(self.captions)] for i in range(self.previews)]
        making = f"{self.out}, step {step}: 25 Euler steps, guidance {self.cfg_many:g}"
        save_grid(path, self.draw(25, self.cfg_many), 4, making, captions=captions)
        self.write(step, error)
        tqdm.write(f"step {step}: velocity error {error:.4f}, {path}")

    def write(self, step, error):
        path = self.out / "validation.jsonl"
        run.trim_log(path, step - 1)
        run.append_log(path, {"step": step, "velocity_error": error})


def say_if_hopeless(args, seconds_a_picture):
    """A forward and a backward pass take about three times a forward pass: say so if that means days."""
    step = 3 * seconds_a_picture * args.batch * args.grad_accum
    if step > 600 or step * args.steps > 7 * 86400:
        print(f"warning: on this device a step takes about {step / 60:.0f} minutes and {args.steps:,} steps about "
              f"{step * args.steps / 86400:.0f} days: take a GPU, or lower --steps, --batch, --grad-accum or --size")


# ------------------------------------------------------------------ what the loop is made of

def learning_rate(step, args):
    """Linear warm-up, then constant or half a cosine down to a hundredth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.decay == "constant":
        return args.lr
    share = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def drop_captions(captions, share):
    """Some captions become the empty one, so that the model can be guided away from it."""
    return ["" if drop else caption for drop, caption in zip(torch.rand(len(captions)) < share, captions)]


def draw_times(n, t_sampling, device):
    """-> t_fm (n,) of --t-sampling logit-normal, or None: the loss draws them uniformly."""
    return torch.randn(n, device=device).sigmoid() if t_sampling == "logit-normal" else None


class EMA:
    """The exponential moving average of {name: parameter}: what is saved and previewed."""

    def __init__(self, trained):
        self.trained, self.average = trained, {name: p.detach().clone() for name, p in trained.items()}

    def update(self, step, decay):
        """The first steps forget faster, else the start would stay in the average."""
        weight = 1 - min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.trained.values()], weight)

    def swap(self):
        for name, parameter in self.trained.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    @contextlib.contextmanager
    def in_place(self):
        """Inside `with`, the parameters hold their average."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


# ------------------------------------------------------------------ a run's files

def save_weights(args, out, sd, metadata, step):
    """Write the file that other tools load: the LoRA, or the whole checkpoint. --keep writes one with the step too."""
    name = "model" if args.lora == "none" else "lora"
    paths = [out / f"{name}.safetensors"]
    if args.keep:
        paths.append(out / f"{name}-{step:06d}.safetensors")
    for path in paths:
        if args.lora == "none":
            sd.save(path, torch.float16, **metadata)
        else:
            lora.save(sd.unet, path, metadata)


# ------------------------------------------------------------------ the loop

def train(args, job, amp, sd, flow, example, trained, dataset, validation, metadata):
    """Algorithm 1, step by step, with Adam -> the EMA of the weights. trained {name: parameter}; example is one of
    EXAMPLES; metadata {str: str} goes into the file of weights. Several processes share the batches of a step."""
    out, ranks, about = job.out, job.ranks, {"base_hash": str(sd.unet_hash), "data": run.listing(args.data)}
    optimizer, ema = torch.optim.Adam(trained.values(), lr=args.lr, fused=True), EMA(trained)
    start = run.restore(run.state_file(args.resume), ema, optimizer, **about) if args.resume else 0
    metrics = run.Metrics(args, out if ranks.leads else None, start, flow.net)
    batches = metrics.timed(iter(load_batches(args, sd, dataset, start, ranks)))
    plain, flow.net = flow.net, ranks.wrap(flow.net)
    mine = range(ranks.rank, args.grad_accum, ranks.count)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", dynamic_ncols=True,
               disable=not ranks.leads)
    job.stop.waits = True
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step, args)
        step_loss = 0
        for i in mine:
            torch.manual_seed(seed_of(args.seed, step * args.grad_accum + i))
            with ranks.apart(flow.net, last=i == mine[-1]):
                with amp:
                    batch = to_latents(sd, next(batches))
                    batch["caption"] = drop_captions(batch["caption"], args.caption_dropout)
                    x1, x0, context, mask = example(sd, batch)
                    t_fm = draw_times(len(x1), args.t_sampling, x1.device)
                    loss = flow.loss(x1, context, x0, t_fm, mask) / len(mine)
                loss.backward()
            step_loss = step_loss + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step, args.ema)

        done, stopping = step + 1, ranks.any(job.stop.came)
        saving = done % args.save_every == 0 or done == args.steps or stopping
        previewing = args.preview_every > 0 and done % args.preview_every == 0
        metrics.add(done, ranks.mean(step_loss), norm, lr, bar, now=saving)
        if ranks.leads and (saving or previewing):
            with metrics.paused(), ema.in_place(), amp:
                if saving:
                    save_weights(args, out, sd, metadata, done)
                if previewing:
                    validation.preview(done)
        if ranks.leads and saving:  # the state comes last: a run killed before it is there makes the other files again
            run.save_state(out, args, done, ema, optimizer, **about)
        if stopping and done < args.steps:
            raise run.Stopped(done, args.steps)
    job.stop.waits = False
    flow.net = plain
    return ema


# ------------------------------------------------------------------ a run

def run_folder(args):
    """-> the run's folder, which no other run may have used."""
    out = Path(args.resume or args.out or f"runs/{args.task}-{datetime.now():%Y%m%d-%H%M%S}")
    if not args.resume:
        run.check_new(out)
    return out


def metadata_of(args, out, sd, size):
    """-> what the file of weights says of itself: in our words, in ModelSpec's, and a LoRA in kohya's too. base_hash is
    of the base's UNet (model.read_weights); cfg is 1 where nothing is to be guided by, or the pairs hold it."""
    metadata = {"objective": args.objective, "style": args.style or "solid", "prediction": sd.prediction,
                "task": args.task, "schedule": "scaled_linear", "preset": args.lora,
                "base": Path(args.ckpt or BUNDLED_PRIOR).name, "base_hash": sd.unet_hash,
                "resolution": " ".join(map(str, size)), "cfg": "4.0" if args.task == "text-to-image" else "1.0"}
    if sd.zero_snr:
        metadata["zero_snr"] = "true"
    if args.lora == "none":
        return metadata | sd.modelspec(out.name, size)
    version = f"sd_v{sd.config.version}{'_v' if sd.prediction == 'v' else ''}"
    return metadata | sd.modelspec(out.name, size, "/lora") | {
        "ss_base_model_version": version, "ss_v2": str(sd.config.version == 2)}


def look_before(args, validation, dataset):
    """-> velocity error, and samples of 4 steps, of the model as it is before training."""
    print("before training: velocity error and samples")
    error = validation.velocity_error()
    say_if_hopeless(args, validation.seconds_a_picture)
    if not args.resume:
        validation.write(0, error)
    return error, validation.draw(4, dataset.settings["cfg"] if args.task == "reflow" else validation.cfg_few)


def finish(args, out, validation, items, size, before, after):
    """Write before_after.png and result.json, and say how to go on. before and after: velocity error and samples."""
    validation.write(args.steps, after[0])
    captions = [validation.captions[i % len(items)] for i in range(args.previews)]
    rows = {"before, 4 steps": before[1], f"after {args.steps} steps of training": after[1]}
    if args.task == "depth":
        shown = [items[i % len(items)] for i in range(args.previews)]
        known = {"picture": torch.stack([item["image"] for item in shown]),
                 "log depth": torch.stack([item["depth"].expand(3, -1, -1) for item in shown])}
        rows = {name: pictures.cpu() for name, pictures in (known | rows).items()}
    making = f"{out}, before training and after {args.steps} steps: 4 Euler steps from the same noise"
    save_grid(out / "before_after.png", torch.cat(list(rows.values())), args.previews, making, list(rows),
              captions * len(rows))
    result = {"software": SOFTWARE}
    shown = "task", "ckpt", "use_ema", "objective", "lora", "lr", "seed", "steps"
    result |= {name: vars(args)[name] for name in shown}
    result |= {"prediction": validation.sd.prediction, "size": size, "velocity_error_before": before[0],
               "velocity_error_after": after[0]}
    with replacing(out / "result.json") as temporary:
        temporary.write_text(json.dumps(result) + "\n")
    command = ["python", "depth.py", "photo.jpg"] if args.task == "depth" else ["python", "sample.py"]
    if args.lora == "none":
        weights = out / "model.safetensors"
        command += ["--steps", "4", "--ckpt", str(weights)]
    else:
        weights = out / "lora.safetensors"
        command += ["--steps", "4", "--lora", str(weights)]
        if args.ckpt:
            command += ["--ckpt", args.ckpt]
        if args.use_ema:
            command += ["--use-ema"]
    print(f"validation velocity error |u - (x1 - x0)|^2: {before[0]:.4f} before, {after[0]:.4f} after\n"
          f"same noise before and after, 4 steps: {out}/before_after.png\n"
          f"weights: {weights}\nnext: {shlex.join(command)}")


def main():
    args = arguments()
    device = pick_device(args.device)
    args.precision, amp = pick_precision(args.precision, device)
    out, ranks = run_folder(args), run.Ranks(device)
    if args.grad_accum % ranks.count:
        raise ValueError(f"--grad-accum {args.grad_accum}: {ranks.count} processes share the batches of a step, so it "
                         "must be a multiple of their number")
    torch.manual_seed(args.seed)
    sd, flow, trained = load_trainable(args, device)
    dataset, items, size, source = open_data(args, sd)
    weights = "all" if args.lora == "none" else f"LoRA {args.lora}"
    print(f"{args.task}: {sum(p.numel() for p in trained.values()):,} trainable parameters ({weights}), "
          f"objective {args.objective}, {sd.prediction}-network\n"
          f"data: {source}, {size[0]}x{size[1]}\n"
          f"{args.steps:,} steps of {args.batch * args.grad_accum} images, lr {args.lr:g} {args.decay}, "
          f"{args.precision} on {device}, into {out}/")
    with run.job(out, ranks, shlex.join(["python", "train.py", "--resume", str(out)])) as job:
        if args.cache:
            dataset = fill_cache(args.cache, sd, dataset, args.precision, amp, ranks)
            items = [dataset[i] for i in range(args.validation)]
        validation, before = None, None
        if ranks.leads:
            with amp:
                validation = Validation(args, out, sd, flow, EXAMPLES[args.task], items)
                before = look_before(args, validation, dataset)
        ema = train(args, job, amp, sd, flow, EXAMPLES[args.task], trained, dataset, validation,
                    metadata_of(args, out, sd, size))
        if ranks.leads:
            with ema.in_place(), amp:
                after = validation.velocity_error(), validation.draw(4, validation.cfg_few)
            finish(args, out, validation, items, size, before, after)


if __name__ == "__main__":
    cli(main)
