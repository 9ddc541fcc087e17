"""Train: Diff2Flow finetuning (Algorithm 1) and its baselines, with LoRA or all weights: text-to-image, Reflow, depth.

    python train.py                                            the bundled prior learns a new style, on a CPU too
    python train.py --ckpt sd21.safetensors --data photos/     the paper's recipe with LoRA on your pictures
    python train.py --resume runs/NAME                         resume a run that was stopped, to the same result

A run is a folder: lora.safetensors or model.safetensors (for other tools), state.safetensors (for --resume),
metrics.jsonl, validation.jsonl (measured every --preview-every steps), and pictures. Step s draws its batch, noise and
times from (seed, s) alone.
"""
import argparse
import contextlib
import math
import os
import shlex
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate

import lora
from data import BucketKeys, ImageFolder, Keys, Memoised, progress, to_floats
from depth import DepthFolders, DepthScenes
from diff2flow import NAIVE, OBJECTIVES
from support import state
from support.cache import fill_cache
from support.files import check_range, cli, parse
from support.load import (
    BUNDLED_PRIOR,
    compile_unet,
    compute_in_bf16,
    load_model,
    make_flow,
    pick_device,
    pick_precision,
    picture_size,
)
from support.pairs import Pairs
from support.processes import Ranks, ignore_interrupts
from support.run import open_run, run_folder, save_weights, training_metadata
from support.tars import Tars
from support.validation import VALIDATION_SEED, Validation, finish, measure, measure_before
from toy.scenes import Scenes

# The defaults of each task. Steps, batch, learning rate, decay and the LoRA presets are the paper's (Appendix A). Adam,
# EMA 0.999, caption dropout 0.02 and depth's learning rate are the official code's; warm-up, clipping, bf16 are ours.
PAPER = {
    "text-to-image": dict(steps=20_000, batch=4, grad_accum=16, lr=1e-5, decay="constant", warmup=0, lora="base",
                          caption_dropout=0.02, size=None, style="outline", scenes=4096, validation=16, previews=4),
    "reflow": dict(steps=60_000, batch=4, grad_accum=32, lr=2e-5, decay="cosine", warmup=0, lora="small",
                   caption_dropout=0.0, size=None, style=None, scenes=None, validation=16, previews=4),
    "depth": dict(steps=20_000, batch=4, grad_accum=8, lr=3e-5, decay="cosine", warmup=0, lora="base",
                  caption_dropout=0.0, size=[384, 512], style="room", scenes=4096, validation=16, previews=4),
}
BUNDLED = {     # on a bundled prior: minutes on a CPU
    "text-to-image": dict(steps=540, batch=16, grad_accum=1, lr=2e-3, decay="cosine", warmup=20, lora="small",
                          caption_dropout=0.02, size=None, style="outline", scenes=1024, validation=64, previews=8),
    "reflow": dict(steps=400, batch=32, grad_accum=1, lr=1e-3, decay="cosine", warmup=20, lora="small",
                   caption_dropout=0.0, size=None, style=None, scenes=None, validation=64, previews=8),
    "depth": dict(steps=400, batch=32, grad_accum=1, lr=1e-3, decay="cosine", warmup=20, lora="none",
                  caption_dropout=0.0, size=None, style="room", scenes=2048, validation=64, previews=8),
}


# ------------------------------------------------------------------ settings

def defaults(name):
    """A flag's defaults in words, for its help."""
    def in_words(recipes):
        return ", ".join(f"{task} {recipe[name]}" for task, recipe in recipes.items() if recipe[name] is not None)

    paper, bundled = in_words(PAPER), in_words(BUNDLED)
    return f"(default: {paper})" if bundled == paper else f"(default: {paper}; on a bundled prior: {bundled})"


def add_data_flags(add):
    add("--data", nargs="+", help="folder of images with captions (NAME.txt, metadata.jsonl or .csv), or tars of them: "
        "'shards/{00000..00099}.tar'; for --task reflow the folder of pairs that sample.py made; for --task depth one "
        "or more folders with depth (default: procedural scenes)")
    add("--size", type=int, nargs="+", help="pixels: one number, or height width (default: 512, as in the paper, or "
        "the size in the checkpoint's metadata; depth: 384 512)")
    add("--cache", help="folder for the latents of the pictures in --data and the embeddings of their captions, so "
        "that each is encoded once, for this run and others; pictures are then centre-cropped and never flipped")
    add("--workers", type=int, help="processes that read pictures ahead, 0 to read them in this one (default: one per "
        "core, at most 8)")
    add("--caption", default="", help="caption of the pictures in --data that have none (default: the empty caption)")
    add("--buckets", action="store_true", help="crop each picture in --data to the nearest of several shapes of about "
        "the area of --size, at most 2:1, instead of to one shape")
    add("--caption-dropout", type=float, help=f"share of captions that become empty {defaults('caption_dropout')}")
    add("--weights", type=float, nargs="+", help="how often each folder of depth is drawn from (default: by its size)")
    add("--style", choices=["solid", "outline", "room"], help=f"style of the scenes {defaults('style')}")
    add("--scenes", type=int, help=f"number of different scenes {defaults('scenes')}")


def add_model_flags(add):
    add("--ckpt", help="Stable Diffusion 1.x, 2.x or XL: a .safetensors or .ckpt file, or a diffusers folder "
        "(default: the bundled v-prior)")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: from the file)")
    add("--zero-snr", action="store_true",
        help="the network was trained with zero terminal SNR (default: as the file says)")
    add("--use-ema", action="store_true", help="start from the EMA weights of a non-pruned file")
    add("--objective", choices=list(OBJECTIVES), default="diff2flow",
        help="the method, or a baseline; rf for rectified-flow files of others (default: diff2flow)")
    add("--lora", help=f"base, small, a rank such as 16, or none to train all weights {defaults('lora')}")
    add("--init-lora", metavar="FILE", help="start from this LoRA and train its adapters further; with --lora none it "
        "is merged into the weights first")


def add_optimizer_flags(add):
    add("--steps", type=int, help=f"optimizer steps {defaults('steps')}")
    add("--batch", type=int, help=f"images per forward pass {defaults('batch')}")
    add("--grad-accum", type=int, help=f"forward passes per optimizer step {defaults('grad_accum')}")
    add("--lr", type=float, help=f"learning rate of Adam {defaults('lr')}")
    add("--warmup", type=int, help=f"steps of linear learning-rate warm-up {defaults('warmup')}")
    add("--decay", choices=["constant", "cosine"], help=f"learning-rate schedule after warm-up {defaults('decay')}")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: 1.0)")
    add("--ema", type=float, default=0.999, help="decay of the weights' EMA, which is what gets saved (default: 0.999)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, about a third slower")
    add("--precision", choices=["bf16", "fp32"],
        help="of forward passes (default: bf16 where the device has it, else fp32)")
    add("--compile", action="store_true", help="torch.compile the UNet: minutes first, then faster steps on a GPU")
    add("--seed", type=int, default=0, help="seed of the scenes, the order, the noise and the times (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")


def add_output_flags(add):
    add("--out", help="folder of the run (default: runs/, the task and the time)")
    add("--resume", help="folder of a run to resume with its own settings; --steps, --lr, --save-every, --workers, "
        "--preview-every and --device may change, and --out, --data, --ckpt, --init-lora and --cache may have moved")
    add("--save-every", type=int, default=1000, help="save every N steps, and on Ctrl-C or SIGTERM (default: 1000)")
    add("--keep", action="store_true", help="keep the weights of every save, named by step")
    add("--preview-every", type=int, default=1000, help="steps between previews, 0 for none (default: 1000)")
    add("--previews", type=int, help=f"pictures in a preview {defaults('previews')}")
    add("--prompt", action="append", help="also draw this in previews, from sample.py's noise; repeat it for more")
    add("--validation", type=int, help=f"held-out pictures for the velocity error {defaults('validation')}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(PAPER), default="text-to-image",
                        help="what to train (default: text-to-image)")
    for title, add_flags in (("data", add_data_flags), ("model", add_model_flags), ("optimizer", add_optimizer_flags),
                             ("output", add_output_flags)):
        add_flags(parser.add_argument_group(title).add_argument)
    args = parse(parser)
    if args.resume:
        args = state.resumed_arguments(parser, args, tasks=PAPER)
    if args.init_lora and args.lora is None:
        args.lora = "init"
    for name in ("ckpt", "init_lora", "cache"):             # absolute: a run may be resumed from another folder
        setattr(args, name, getattr(args, name) and os.path.abspath(getattr(args, name)))
    args.data = args.data and [os.path.abspath(folder) for folder in args.data]
    bundled = args.ckpt is None or Path(args.ckpt).resolve().parent == BUNDLED_PRIOR.parent
    for name, value in (BUNDLED if bundled else PAPER)[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    with state.named(args.resume):
        check(args)
    return args


def check(args):
    """ValueError for a setting that cannot work."""
    check_range(args, 1, 1e9, "steps", "batch", "grad_accum", "scenes", "validation", "previews", "save_every")
    check_range(args, 0, 1e9, "preview_every", "warmup")
    check_range(args, 0, 1000, "workers")
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, 1e-12, 1, "lr")
    check_range(args, 1e-12, math.inf, "clip")
    check_range(args, 0, 1, "caption_dropout", "ema")
    if args.init_lora and args.lora not in ("init", "none"):
        raise ValueError(f"--lora {args.lora}: --init-lora has its own layers and ranks: leave --lora out or pass none")
    is_rank = args.lora.isdecimal() and int(args.lora) > 0
    if not is_rank and args.lora not in ("none", *lora.PRESETS) and not args.init_lora:
        raise ValueError(f"--lora {args.lora}: it is base, small, none, or a rank such as 16")
    tars = [path for path in args.data or [] if path.endswith(".tar")]
    if tars and (args.task != "text-to-image" or len(tars) < len(args.data)):
        raise ValueError(f"--data {tars[0]}: only --task text-to-image reads tars, and no folders beside them")
    if args.task != "depth" and args.data and len(args.data) > 1 and not tars:
        raise ValueError(f"--data {' '.join(args.data)}: --task {args.task} takes one folder")
    if args.cache and (args.task != "text-to-image" or not args.data or tars):
        raise ValueError("--cache is for a --data folder of pictures with captions, not for scenes, tars, pairs or "
                         "depth: leave it out")
    if args.caption and (args.task != "text-to-image" or not args.data):
        raise ValueError("--caption is for pictures in --data without one: --task text-to-image")
    if args.buckets and (args.task != "text-to-image" or not args.data or tars or args.cache):
        raise ValueError("--buckets is for a --data folder of pictures with captions, without --cache: leave it out")
    if args.task != "depth" and args.weights:
        raise ValueError("--weights: only --task depth takes several folders")
    if args.task == "depth" and (args.caption_dropout or args.prompt):
        raise ValueError(f"{'--prompt' if args.prompt else '--caption-dropout'}: --task depth uses no captions; leave "
                         "it out")
    if args.task == "reflow" and (not args.data or args.size or args.objective != "diff2flow"):
        raise ValueError("--task reflow trains a velocity field on the folder of pairs in --data, at their size: first "
                         "make them with python sample.py --pairs N --out pairs")


# ------------------------------------------------------------------ model

def load_trainable(args, device):
    """-> sd, flow, {name: parameter} to train: the UNet's LoRA, or all of it."""
    is_bf16 = args.precision == "bf16"
    dtype = torch.bfloat16 if is_bf16 and args.lora != "none" else torch.float32
    sd = load_model(args.ckpt or BUNDLED_PRIOR, args.init_lora, device, dtype, args.prediction, args.use_ema,
                    args.zero_snr, trainable=args.lora == "init")
    if args.init_lora and sd.is_depth_model != (args.task == "depth"):
        raise ValueError(f"--init-lora {args.init_lora}: it was trained for another task than --task {args.task}")
    if args.task == "depth":
        sd.add_image_input()
    elif sd.is_depth_model:
        raise ValueError(f"{sd.source.path}: a depth model, which only --task depth trains")
    trained_by = sd.metadata.get("objective")
    if trained_by in NAIVE and trained_by != args.objective:
        print(f"warning: {sd.source.path} was trained by {trained_by}, which fits no other --objective")
    flow = make_flow(sd, args.objective)
    if args.lora == "none":
        sd.unet.requires_grad_()
        if is_bf16:
            compute_in_bf16(sd)
    elif not args.init_lora:
        lora.inject(sd.unet, int(args.lora) if args.lora.isdecimal() else args.lora)
    (sd if sd.device.type == "cuda" else sd.unet).to(memory_format=torch.channels_last)
    sd.unet.train().checkpointing = args.checkpointing
    if args.compile:
        compile_unet(sd)
    return sd, flow, {name: parameter for name, parameter in sd.unet.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------ data

def open_data(args, sd):
    """-> data set, held-out items, [height, width], and in words what is trained on and what is held out."""
    n = args.validation
    if args.task == "reflow":
        dataset = Pairs(args.data[0], n)
        dataset.check_model(sd, args.ckpt, args.init_lora, args.prediction)
        held_out = [dataset.pair(len(dataset) + i) for i in range(n)]
        words = f"{len(dataset):,} pairs in {args.data[0]}"
        return dataset, held_out, dataset.settings["size"], words, f"{n} other pairs"
    height, width = size = picture_size(sd, args.size)
    if not args.data:
        kind = DepthScenes if args.task == "depth" else Scenes
        dataset = kind(args.scenes, height, width, args.style, args.seed)
        held_out = kind(n, height, width, args.style, VALIDATION_SEED)
        words = f"{len(dataset):,} procedural scenes, style {args.style} (--data FOLDER trains on your own pictures)"
        return dataset, [held_out[i] for i in range(n)], list(size), words, f"{n} other scenes"
    if args.task == "depth":
        dataset = DepthFolders(args.data, args.weights, height, width, args.seed)
    elif args.data[0].endswith(".tar"):
        dataset = Tars(args.data, height, width, args.seed, args.caption)
    else:
        dataset = ImageFolder(args.data[0], height, width, args.seed, args.caption)
    items, words = dataset.hold_out(n)
    return dataset, items, list(size), dataset.words, words


def encode_batch(sd, batch):
    """A batch of images, perhaps with depth -> a batch of latents: x1 and caption; for depth also the image's latents
    and a mask. Pairs, and what Memoised or --cache encoded before, are latents already."""
    batch = {name: value if name == "caption" else value.to(sd.device, non_blocking=True)
             for name, value in batch.items()}
    if "image" not in batch:
        return batch
    latents = sd.encode(to_floats(batch.pop("image"))).float()
    if "valid" not in batch:
        return {"x1": latents, **batch}
    has_hole = F.max_pool2d((~batch["valid"]).float(), sd.factor)        # a latent is valid if all its pixels are
    return {"x1": sd.encode(batch["depth"].expand(-1, 3, -1, -1)).float(), "image_latents": latents,
            "mask": 1 - has_hole, "caption": batch["caption"]}


def encode_item(sd, item):
    """encode_batch one at a time: batched encoding differs in the last bits, which would break exact resume."""
    return {name: value[0] for name, value in encode_batch(sd, default_collate([item])).items()}


def load_batches(args, sd, dataset, run):
    """-> DataLoader of this process's batches from step run.start on. Pictures are read ahead by worker processes;
    scenes are encoded here, once."""
    images_per_step = args.batch * args.grad_accum
    places = (run.start * images_per_step, args.steps * images_per_step, args.batch, run.ranks.rank, run.ranks.count)
    if not args.data:
        prepared = Memoised(dataset, partial(encode_item, sd))
        return DataLoader(prepared, args.batch, sampler=Keys(len(dataset), args.seed, *places))
    workers = min(8, os.cpu_count()) if args.workers is None else args.workers
    if isinstance(dataset, Tars):
        dataset.start, keys = run.start, None
        workers = min(workers, len(dataset.tars) // run.ranks.count)
    elif args.buckets:
        keys = BucketKeys(dataset.shapes(sd.multiple), args.seed, *places)
    else:
        keys = Keys(len(dataset), args.seed, *places)
    return DataLoader(dataset, args.batch, sampler=keys, num_workers=workers, worker_init_fn=ignore_interrupts,
                      pin_memory=sd.device.type == "cuda")


# ------------------------------------------------------------------ by task: a batch -> x1, x0, context, mask

def drop_captions(captions, share):
    """A random share of captions becomes empty, so that the model can be guided."""
    return ["" if drop else caption for drop, caption in zip(torch.rand(len(captions)) < share, captions)]


def text_to_image(sd, batch, caption_dropout=0.0):
    """Latents and the text embedding of their caption, for SDXL with the sizes of their crop. With --cache the batch
    carries text embeddings: that of its caption, and that of the empty prompt, which dropped captions use."""
    captions = drop_captions(batch["caption"], caption_dropout)
    if "context" in batch:
        is_empty = torch.tensor([caption == "" for caption in captions]).view(-1, 1, 1)
        is_empty = is_empty.to(batch["x1"].device, non_blocking=True)
        context = torch.where(is_empty, batch["empty"], batch["context"])
    else:
        context = sd.encode_text(captions)
    if "sizes" in batch:
        context = sd.with_sizes(context, batch["sizes"])
    return batch["x1"], None, context, None


def reflow(sd, batch, caption_dropout=0.0):
    """Latents, and the noise that they were sampled from (Sec. 4.2)."""
    return batch["x1"], batch["x0"], sd.encode_text(drop_captions(batch["caption"], caption_dropout)), None


def depth(sd, batch, caption_dropout=0.0):
    """Latents of the depth map, the image's latents as context, and where depth is known (Sec. 4.3)."""
    return batch["x1"], None, batch["image_latents"], batch["mask"]


EXAMPLES = {"text-to-image": text_to_image, "reflow": reflow, "depth": depth}


# ------------------------------------------------------------------ the loop

def learning_rate(step, args):
    """Linear warm-up, then constant, or half a cosine down to a hundredth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.decay == "constant":
        return args.lr
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class EMA:
    """The exponential moving average of {name: parameter}, which is what gets saved and sampled."""

    def __init__(self, trained):
        self.trained, self.average = trained, {name: p.detach().clone() for name, p in trained.items()}

    def update(self, step, decay):
        """Early steps use a smaller decay, so that the initial weights are forgotten."""
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


def train(args, run, sd, flow, trained, loader, example):
    """Algorithm 1 with Adam -> the EMA of {name: parameter} `trained`. example: the task's function in EXAMPLES."""
    optimizer = torch.optim.Adam(trained.values(), lr=args.lr, fused=True)
    ema = EMA(trained)
    for step, batches in run.steps(loader, optimizer, ema, flow):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        for batch in batches:
            batch = encode_batch(sd, batch)
            x1, x0, context, mask = example(sd, batch, args.caption_dropout)
            loss = flow.loss(x1, context, x0, mask=mask) / run.grad_accum           # draws noise (if x0 is None), times
            loss.backward()
            run.log(loss=loss)
        run.log(norm=torch.nn.utils.clip_grad_norm_(trained.values(), args.clip))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step, args.ema)
    return ema


# ------------------------------------------------------------------ a run

def main():
    args = arguments()
    device = pick_device(args.device)
    args.precision, _ = pick_precision(args.precision, device)
    out = run_folder(args)
    ranks, example = Ranks(device), EXAMPLES[args.task]
    if args.grad_accum % ranks.count:
        raise ValueError(f"--grad-accum {args.grad_accum}: {ranks.count} processes share the batches of a step, so it "
                         "must be a multiple of their number")
    torch.manual_seed(args.seed)
    sd, flow, trained = load_trainable(args, device)
    dataset, items, size, trained_on, held_out = open_data(args, sd)
    print(f"{args.task}: {sum(p.numel() for p in trained.values()):,} trainable parameters "
          f"({'all weights' if args.lora == 'none' else f'LoRA {args.lora}'}), objective {args.objective}, "
          f"{sd.prediction}-prediction\n"
          f"data: {trained_on}, {size[0]}x{size[1]}; validation: {held_out}\n"
          f"{args.steps:,} steps of {args.batch * args.grad_accum} images, lr {args.lr:g} {args.decay}, "
          f"{args.precision} on {device}, into {out}/")
    command = shlex.join(["python", "train.py", "--resume", str(out)])
    with open_run(args, out, ranks, command, sd.unet_hash) as run:
        if args.cache:
            dataset = fill_cache(args, sd, dataset, ranks)
        run.save_weights = partial(save_weights, args, out, sd, training_metadata(args, out.name, sd, size))
        if ranks.is_main:
            latents = [encode_item(sd, item) for item in progress(items, "encoding held-out items")]
            validation = Validation(args, out, sd, flow, example, latents, held_out)
            before = measure_before(validation, dataset.settings["cfg"] if args.task == "reflow" else None)
            run.preview = validation.preview
        loader = load_batches(args, sd, dataset, run)
        ema = train(args, run, sd, flow, trained, loader, example)
        if ranks.is_main:
            with ema.in_place():
                after = measure(validation)
            finish(validation, items, size, before, after)


if __name__ == "__main__":
    cli(main)
