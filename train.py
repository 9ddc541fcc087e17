"""Train: Diff2Flow finetuning (Algorithm 1) and its baselines, full or with LoRA; and the bundled prior itself.

    python train.py                                                   the bundled prior learns a new style, on CPU too
    python train.py --ckpt sd21.safetensors --data photos/ --lora base            the paper's recipe on your pictures

A run is a folder: lora.safetensors or model.safetensors (what other tools load), state.safetensors (what --resume
reads), metrics.jsonl, validation.jsonl (what --preview-every measured), and pictures. Step s draws its batch, noise and
times from (seed, s) alone, so a run that was killed and resumed ends like one that was not.
"""
import argparse
import copy
import json
import math
import os
import shlex
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import lora
from data import DepthFolders, DepthScenes, ImageFolder, Pairs, Scenes, cli, save_grid
from diff2flow import OBJECTIVES, Diff2Flow
from model import (SCALE, TINY, TINY_PRIOR, Conditioned, StableDiffusion, load_checkpoint, pick_device, pick_precision,
                   save_tensors)
from schedule import sd_schedule

PAPER = dict(steps=20000, batch=4, grad_accum=16, lr=1e-5, decay="constant", warmup=0, ema=0.999, caption_dropout=0.02,
             lora="none", scenes=4096, style="outline", objective="diff2flow", validation=16, previews=4)
RECIPES = {  # the defaults, by task; "demo" is the task on a bundled prior
    "text-to-image": PAPER,
    "text-to-image demo": dict(PAPER, steps=300, batch=32, grad_accum=1, lr=2e-3, decay="cosine", warmup=20,
                               lora="base", scenes=2048, validation=64, previews=8),
    "reflow": dict(PAPER, steps=60000, grad_accum=32, lr=2e-5, decay="cosine", lora="small", caption_dropout=0.0),
    "reflow demo": dict(PAPER, steps=400, batch=32, grad_accum=1, lr=1e-3, decay="cosine", warmup=20, lora="small",
                        caption_dropout=0.0, validation=64, previews=8),
    "depth": dict(PAPER, grad_accum=8, lr=3e-5, decay="cosine", style="solid", size=[384, 512]),
    "depth demo": dict(PAPER, steps=400, batch=32, grad_accum=1, lr=1e-3, decay="cosine", warmup=20, scenes=2048,
                       style="solid", validation=64, previews=8),
    "prior": dict(PAPER, steps=16000, batch=32, grad_accum=1, lr=1e-3, decay="cosine", warmup=200, caption_dropout=0.1,
                  scenes=20000, style="solid", objective="dm", validation=64, previews=16),
    "autoencoder": dict(PAPER, steps=1600, batch=16, grad_accum=1, lr=1.5e-3, decay="cosine", warmup=100, scenes=48000,
                        validation=512),
    "decoder": dict(PAPER, steps=1000, batch=16, grad_accum=1, lr=1e-3, decay="cosine", warmup=100, scenes=48000,
                    validation=512),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=[t for t in RECIPES if "demo" not in t], default="text-to-image",
        help="what to train; autoencoder, decoder and prior make the bundled checkpoint (default: text-to-image)")
    add("--ckpt", help="Stable Diffusion 1.x or 2.x file, .safetensors or .ckpt (default: the bundled small one)")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: from the file)")
    add("--use-ema", action="store_true", help="start from the EMA weights of a non-pruned file")
    add("--data", nargs="+", help="folder of images with captions, .txt or metadata.jsonl (default: procedural "
        "scenes); for the task reflow of pairs that sample.py made; for the task depth one or more with depth beside")
    add("--weights", type=float, nargs="+", help="how often each folder of depth is drawn from (default: by its size)")
    add("--style", choices=["solid", "outline"], help="style of the scenes (default: outline; prior: solid)")
    add("--scenes", type=int, help="number of different scenes (default: by task)")
    add("--size", type=int, nargs="+", help="pixels: one number, or height width (default: 512; bundled: 64)")
    add("--objective", choices=list(OBJECTIVES), help="diff2flow, or a baseline (default: diff2flow; prior: dm)")
    add("--t-sampling", choices=["uniform", "logit-normal"], default="uniform", help="of t_fm (default: uniform)")
    add("--lora", help="base, small, none, or a rank (default: none; base on the bundled prior)")
    add("--steps", type=int, help="optimizer steps (default: 20000; 300 on the bundled prior)")
    add("--batch", type=int, help="images a forward pass (default: 4; 32 on the bundled prior)")
    add("--grad-accum", type=int, help="forward passes an optimizer step (default: 16; 1 on the bundled prior)")
    add("--lr", type=float, help="learning rate of Adam (default: 1e-5; 2e-3 on the bundled prior)")
    add("--decay", choices=["constant", "cosine"], help="of the rate (default: constant; cosine on the bundled prior)")
    add("--warmup", type=int, help="steps of linear warm-up (default: 0; 20 on the bundled prior)")
    add("--validation", type=int, help="pictures for the velocity error (default: 16; 64 on the bundled prior)")
    add("--previews", type=int, help="pictures in a preview (default: 4; 8 on the bundled prior)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: 1.0)")
    add("--caption-dropout", type=float, help="share of captions replaced by the empty one (default: 0.02)")
    add("--ema", type=float, help="decay of the averaged weights, which are what is saved (default: 0.999)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, about a third slower")
    add("--precision", choices=["bf16", "fp32"], help="of the forward pass (default: bf16 on CUDA, fp32 on CPU)")
    add("--preview-every", type=int, default=1000, help="steps between picture grids, 0 for none (default: 1000)")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    add("--keep", action="store_true", help="keep the weights of every checkpoint, under its step (default: the last)")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", help="folder of the run (default: runs/ and the time)")
    add("--resume", help="folder of a run to go on with; its own settings apply")
    args = parser.parse_args()
    if args.resume:
        return argparse.Namespace(**{**saved_settings(args.resume), "resume": args.resume})
    bundled = not args.ckpt or Path(args.ckpt).resolve().parent == TINY_PRIOR.resolve().parent
    recipe = RECIPES.get(f"{args.task} demo" * bundled, RECIPES[args.task])
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    return args


def check(args):
    """ValueError for a setting that cannot work."""
    for name, low, high in (("steps", 1, math.inf), ("batch", 1, math.inf), ("grad_accum", 1, math.inf),
                            ("scenes", 1, math.inf), ("validation", 1, math.inf), ("previews", 1, math.inf),
                            ("save_every", 1, math.inf), ("preview_every", 0, math.inf), ("warmup", 0, math.inf),
                            ("seed", 0, 2**32),
                            ("lr", 1e-12, 1), ("clip", 1e-12, math.inf), ("caption_dropout", 0, 1), ("ema", 0, 1)):
        value = getattr(args, name)
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: it must be between {low:g} and {high:g}")
    if args.lora != "none" and args.task in ("prior", "autoencoder", "decoder"):
        raise ValueError(f"--lora {args.lora}: the task {args.task} trains all weights; leave --lora out")
    if args.lora not in ("base", "small", "none") and not (args.lora.isdecimal() and int(args.lora) > 0):
        raise ValueError(f"--lora {args.lora}: it is base, small, none, or a rank such as 16")
    if args.task != "depth" and args.data and len(args.data) > 1 or args.weights and args.task != "depth":
        raise ValueError(f"--data takes one folder, and --weights none, for the task {args.task}")
    if args.task != "depth" and args.data:
        args.data, = args.data
    if args.task == "reflow" and (not args.data or args.size or args.objective != "diff2flow"):
        raise ValueError("--task reflow trains a velocity field on the folder of pairs that --data names, at their "
                         "size: first python sample.py --pairs N --out pairs")
    if args.task in ("autoencoder", "decoder") and (args.data or args.size):
        raise ValueError(f"--data and --size: the task {args.task} learns the 64x64 scenes; leave them out")


def state_file(folder):
    path = Path(folder) / "state.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --resume takes the folder of a run that was saved")
    return path


def saved_settings(folder):
    path = state_file(folder)
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["args"])
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: truncated, or not written by train.py ({error})") from error


# ------------------------------------------------------------------ data

class Batches:
    """Batches of a data set's items, read ahead by threads; scenes are kept as latents once they were encoded.

    A key is epoch * n + index: each epoch is a new permutation, and a photograph's crop depends on the key.
    """

    def __init__(self, dataset, batch, seed, keep):
        self.dataset, self.batch, self.seed = dataset, batch, seed
        self.keep, self.kept, self.orders = keep, {}, {}

    def keys(self, number):
        """The keys of batch `number`."""
        n, keys = len(self.dataset), []
        for position in range(number * self.batch, (number + 1) * self.batch):
            epoch, i = divmod(position, n)
            if epoch not in self.orders:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self.orders = {epoch: torch.randperm(n, generator=generator).tolist()}
            keys.append(epoch * n + self.orders[epoch][i])
        return keys

    def item(self, key):
        return {"key": key, **(self.kept.get(key % len(self.dataset)) or self.dataset[key])}

    def read(self, start, stop):
        """Yield batches `start` to `stop`, each a list of items."""
        with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
            ahead = deque()
            for number in range(start, stop):
                ahead.append([pool.submit(self.item, key) for key in self.keys(number)])
                if len(ahead) > 2:
                    yield [future.result() for future in ahead.popleft()]
            while ahead:
                yield [future.result() for future in ahead.popleft()]

    def encoded(self, items, encode):
        """items -> {name: tensor (B, ...)} by encode(items), which is kept for scenes. They are encoded one by one,
        since the last bits depend on the batch, and a resumed run would meet a scene in another one."""
        if not self.keep:
            return encode(items)
        places = [item["key"] % len(self.dataset) for item in items]
        for place, item in zip(places, items):
            if place not in self.kept:
                self.kept[place] = {"encoded": encode([item]), "caption": item["caption"]}
        encoded = [self.kept[place]["encoded"] for place in places]
        return {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}


class AutoencoderPictures(torch.utils.data.Dataset):
    """What the bundled autoencoder learns: both styles of scenes, and every eighth picture a depth map in grey."""

    def __init__(self, n, height, width, seed):
        self.styles = [Scenes(n, height, width, style, seed) for style in ("solid", "outline")]

    def __len__(self):
        return len(self.styles[0])

    def __getitem__(self, key):
        item = self.styles[key % 2][key % len(self)]
        if key % 8 == 7:
            depth = item["depth"].log()
            low, high = depth.min(), depth.max()
            item["image"] = ((depth - low) / (high - low).clamp(min=1e-3) * 2 - 1).expand(3, -1, -1)
        return item


# ------------------------------------------------------------------ the loop

def learning_rate(step, args):
    """Linear warm-up, then constant or half a cosine down to a hundredth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.decay == "constant":
        return args.lr
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Averaged:
    """Inside `with`, the parameters hold their exponential moving average."""

    def __init__(self, named):
        self.named, self.average = named, {name: p.detach().clone() for name, p in named.items()}

    def update(self, decay):
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.named.values()], 1 - decay)

    def swap(self, *_):
        for name, parameter in self.named.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    __enter__ = __exit__ = swap


def fit(args, out, named, loss_of, batches, export, preview, start_tensors):
    """The training loop. named {name: parameter}, loss_of(items) -> scalar; export and preview see the EMA.

    export(suffix) writes the weights, under that suffix to the name; preview(step) a picture.
    """
    parameters = list(named.values())
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)
    average, start = Averaged(named), 0
    if start_tensors:
        start = restore(named, average, optimizer, start_tensors)
    accelerator = parameters[0].device.type == "cuda"
    reader = batches.read(start * args.grad_accum, args.steps * args.grad_accum)
    metrics = out / "metrics.jsonl"
    metrics.write_text(past_metrics(metrics, start))
    with (open(metrics, "a") as log, tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step",
                                          dynamic_ncols=True) as bar):
        recent, clock = [], time.time()
        for step in bar:
            torch.manual_seed(args.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            total = 0
            for _ in range(args.grad_accum):
                loss = loss_of(next(reader)) / args.grad_accum
                loss.backward()
                total = total + loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(min(args.ema, (1 + step) / (10 + step)))
            recent.append(torch.stack([total, norm]))

            done = step + 1
            saving = done % args.save_every == 0 or done == args.steps
            previewing = args.preview_every and done % args.preview_every == 0
            if done % 10 == 0 or saving:
                losses, norms = torch.stack(recent).unbind(1)
                row = {"step": done, "loss": losses.mean().item(), "grad": norms.mean().item(),
                       "lr": learning_rate(step, args),
                       "img_s": round(len(recent) * args.batch * args.grad_accum / (time.time() - clock), 1),
                       "mem_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2) if accelerator else 0.0}
                recent, clock = [], time.time()
                if not math.isfinite(row["loss"] + row["grad"]):
                    raise ValueError(f"the loss is {row['loss']:g}, its gradient {row['grad']:g} at step {done}: "
                                     f"stopped, the last checkpoint is kept; try a lower --lr than {args.lr:g}"
                                     + (", or --precision fp32" if args.precision == "bf16" else ""))
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix_str(f"loss {row['loss']:.4f} grad {row['grad']:.2f} lr {row['lr']:.1e} "
                                    f"{row['img_s']} img/s mem {row['mem_gb']} GB")
            if saving or previewing:
                with average:
                    if saving:
                        export()
                        if args.keep:
                            export(f"-{done:06d}")
                    if previewing:
                        preview(done)
                clock = time.time()
            if saving:  # the state comes last: a run killed before it is there makes the other files again
                save_state(out, args, done, named, average, optimizer)
    return average


def past_metrics(path, step):
    """The lines up to `step`; a killed run may have written more, which the resumed one writes again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return "".join(line for line in lines if json.loads(line)["step"] <= step)


def save_state(out, args, step, named, average, optimizer):
    tensors = {}
    for name, parameter in named.items():
        tensors |= {f"parameter/{name}": parameter, f"average/{name}": average.average[name],
                    **{f"adam/{k}/{name}": v for k, v in optimizer.state[parameter].items()}}
    about = {"args": json.dumps(vars(args)), "step": str(step), "version": "1"}
    save_tensors(out / "state.safetensors", tensors, about)


def restore(named, average, optimizer, path):
    """-> the step to go on from. Fused Adam wants its averages in the parameter's own memory format."""
    with safe_open(path, "pt") as file, torch.no_grad():
        stored = set(file.keys())
        if {key for key in stored if key.startswith("parameter/")} != {f"parameter/{name}" for name in named}:
            raise ValueError(f"{path}: the state of another model; was the checkpoint replaced?")
        for name, parameter in named.items():
            parameter.copy_(file.get_tensor(f"parameter/{name}"))
            average.average[name].copy_(file.get_tensor(f"average/{name}"))
            if f"adam/step/{name}" in stored:  # not where no gradient arrives: the last layer of an OpenCLIP tower
                optimizer.state[parameter] = {
                    "step": file.get_tensor(f"adam/step/{name}").to(parameter.device),
                    **{k: torch.empty_like(parameter).copy_(file.get_tensor(f"adam/{k}/{name}"))
                       for k in ("exp_avg", "exp_avg_sq")}}
        return int(file.metadata()["step"])


# ------------------------------------------------------------------ the tasks

def autoencoder_loss(vae, images):
    """Squared error of pixels and of their differences (edges), and a little KL."""
    mean, std = vae.moments(images)
    output = vae.decode(mean + std * torch.randn_like(std)).float()
    mean, std = mean.float(), std.float()
    edges = sum(F.mse_loss(output.diff(dim=d), images.diff(dim=d)) for d in (-2, -1))
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    return F.mse_loss(output, images) + edges + 1e-4 * kl


@torch.no_grad()
def standardise(vae, images):
    """Fold a shift and a scale into the two 1x1 convs: latents * SCALE get mean 0 and variance 1, decoding stays."""
    mean = torch.cat([vae.moments(x)[0] for x in images.split(64)])
    shift, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3)) * SCALE
    z, first, second = len(shift), vae.quant_conv, vae.post_quant_conv
    first.bias[:z] = (first.bias[:z] - shift) / scale
    first.bias[z:] -= 2 * scale.log()
    first.weight[:z] /= scale.view(-1, 1, 1, 1)
    second.bias += second.weight.flatten(1) @ shift
    second.weight *= scale.view(1, -1, 1, 1)


def train_autoencoder(args, device, amp, out):
    """The bundled autoencoder; or (task decoder) its decoder alone, which leaves latents, and so every prior, alone."""
    whole = args.task == "autoencoder"
    if whole and not args.ckpt:
        sd = StableDiffusion(TINY, "v").to(device)
        sd.first_stage_model.quant_conv.bias.data[sd.config.latent_channels:] -= 6  # almost no noise at first
    else:
        sd = load_checkpoint(args.ckpt or TINY_PRIOR, device)
    vae = sd.first_stage_model.to(memory_format=torch.channels_last)
    trained = {name: p.requires_grad_() for name, p in vae.named_parameters()
               if whole or name.startswith(("decoder", "post_quant_conv"))}
    batches = Batches(AutoencoderPictures(args.scenes, 64, 64, args.seed), args.batch, args.seed, keep=False)
    held_out = AutoencoderPictures(args.validation, 64, 64, args.seed + 1)
    pictures = torch.stack([held_out[i]["image"] for i in range(args.validation)]).to(device)
    out.mkdir(parents=True, exist_ok=True)

    def loss_of(items):
        images = torch.stack([item["image"] for item in items]).to(device, memory_format=torch.channels_last)
        with amp:
            return autoencoder_loss(vae, images)

    def preview(step):
        with torch.no_grad(), amp:
            shown = pictures[:16]
            output = vae.decode(vae.moments(shown)[0]).float()
        path, error = out / f"step_{step:06d}.png", F.mse_loss(output, shown).item()
        save_grid(path, torch.cat([shown, output]), 16, row_labels=["picture", "decoded"])
        tqdm.write(f"step {step}: squared error {error:.4f} on held-out pictures, {path}")

    def export(suffix=""):
        before = copy.deepcopy(vae.state_dict())
        if whole:
            standardise(vae, pictures[::2])
        sd.save(out / f"model{suffix}.safetensors", torch.float16, resolution="64")
        vae.load_state_dict(before)

    fit(args, out, trained, loss_of, batches, export, preview, state_file(args.resume) if args.resume else None)
    use = ["train.py", "--task", "prior"] if whole else ["sample.py"]
    weights = str(out / "model.safetensors")
    print(f"weights: {weights}\nnext: {shlex.join(['python', *use, '--ckpt', weights])}")


def load_trainable(args, device):
    """-> the checkpoint, and {name: parameter} of what is trained: the UNet or its LoRA; a prior's text encoder too."""
    frozen = torch.bfloat16 if args.precision == "bf16" and args.lora != "none" else torch.float32
    sd = load_checkpoint(args.ckpt or TINY_PRIOR, device, frozen, args.prediction, args.use_ema)
    if args.task == "depth":
        sd.widen()
    elif sd.config.in_channels > sd.config.latent_channels:
        raise ValueError(f"{args.ckpt}: a depth model, which only --task depth trains")
    sd.unet.to(memory_format=torch.channels_last).train().checkpointing = args.checkpointing
    if args.lora != "none":
        lora.inject(sd.unet, int(args.lora) if args.lora.isdigit() else args.lora)
        return sd, {name: p for name, p in sd.unet.named_parameters() if p.requires_grad}
    trained = dict(sd.unet.requires_grad_().named_parameters())
    if args.task == "prior":
        trained |= {f"text.{name}": p.requires_grad_() for name, p in sd.text_encoder.named_parameters()}
        trained.pop("text.text_projection", None)  # of the pooled output, which Stable Diffusion leaves aside
    return sd, trained


class HeldOut:
    """What training is measured by, before and after, on the same noise: items it does not see (of a folder of
    pictures: some that it does), and what it makes of their captions, or of the pictures whose depth it learns."""

    def __init__(self, items, sd, flow, encode, context_of, args):
        self.sd, self.flow, self.context_of, self.batch, self.n = sd, flow, context_of, args.batch, args.previews
        encoded = [encode([item]) for item in items]
        self.encoded = {name: torch.cat([e[name] for e in encoded]) for name in encoded[0]}
        self.captions, x1 = [item["caption"] for item in items], self.encoded["latent"]
        noise = torch.randn(max(len(x1), self.n), *x1.shape[1:], generator=torch.Generator().manual_seed(args.seed))
        self.noise = noise.to(x1.device)
        if "noise" in self.encoded:
            self.noise[:len(x1)] = self.encoded["noise"]

    def batches(self, n):
        """-> slice, captions, encoded, of n items, in batches; from the first on again if there are fewer."""
        for start in range(0, n, self.batch):
            rows = [i % len(self.captions) for i in range(start, min(start + self.batch, n))]
            some = {name: tensor[rows] for name, tensor in self.encoded.items()}
            yield slice(start, start + len(rows)), [self.captions[i] for i in rows], some

    @torch.no_grad()
    def velocity_error(self):
        """Mean squared error of u, t_fm evenly spread, noise fixed."""
        total, n = 0.0, len(self.captions)
        t_fm = (torch.arange(n, device=self.noise.device) * 0.618034 + 0.5) % 1
        for some, captions, encoded in self.batches(n):
            error = Diff2Flow.loss(self.flow, encoded["latent"], self.context_of(captions, encoded), self.noise[some],
                                   t_fm[some], encoded.get("mask"))
            total += error.item() * len(captions)
        return total / n

    @torch.no_grad()
    def pictures(self, steps, cfg):
        """-> images (previews, 3, H, W)."""
        images = []
        for some, captions, encoded in self.batches(self.n):
            context = self.context_of(captions, encoded)
            uncond = self.sd.encode_text([""]).expand_as(context) if cfg != 1 else None
            images.append(self.sd.decode(self.flow.sample(self.noise[some], context, steps, uncond, cfg)).float())
        return torch.cat(images)


def open_data(args, sd):
    """-> dataset, held-out items, (height, width), and where they come from, in words."""
    n = args.validation
    if args.task == "reflow":
        dataset = Pairs(args.data, n)
        held_out = [dataset.pair(len(dataset) + i) for i in range(n)]
        return dataset, held_out, dataset.about["size"], f"pairs in {args.data}"
    height, width = sd.picture_size(args.size)
    if args.data and args.task == "depth":
        dataset = held_out = DepthFolders(args.data, args.weights, height, width, args.seed)
        source = f"pictures with depth in {' '.join(args.data)}"
    elif args.data:
        dataset = held_out = ImageFolder(args.data, height, width, args.seed)
        source = f"pictures in {args.data}"
    else:
        kind = DepthScenes if args.task == "depth" else Scenes
        dataset = kind(args.scenes, height, width, args.style, args.seed)
        held_out = kind(n, height, width, args.style, args.seed + 1)
        source = f"procedural scenes, style {args.style} (--data FOLDER trains on your own)"
    return dataset, [held_out[i] for i in range(n)], (height, width), source


def train_unet(args, device, amp, out):
    """Finetune the UNet, in full or by LoRA: on pictures, on pairs of noise and latent (task reflow), on pictures with
    depth (task depth); or train UNet and text encoder from scratch (task prior)."""
    sd, trained = load_trainable(args, device)
    net = Conditioned(sd.unet) if args.task == "depth" else sd.unet
    flow = OBJECTIVES[args.objective](net, *sd_schedule(), sd.prediction).to(device)
    dataset, held_out, (height, width), source = open_data(args, sd)
    batches = Batches(dataset, args.batch, args.seed, keep=not args.data)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{args.task}: {sum(p.numel() for p in trained.values()):,} trainable parameters "
          f"({'all' if args.lora == 'none' else 'LoRA ' + args.lora}), objective {args.objective}, "
          f"{sd.prediction}-network\n"
          f"data: {len(dataset):,} {source}, {height}x{width}\n"
          f"{args.steps:,} steps of {args.batch * args.grad_accum} images, lr {args.lr:g} {args.decay}, "
          f"{args.precision} on {device}, into {out}/")
    if args.task == "depth":
        with torch.no_grad(), amp:
            empty = sd.encode_text([""])

    @torch.no_grad()
    def encode(items):
        """items -> latent x1, and by task noise x0, the picture's latents, the mask of latents with depth."""
        stacked = {name: torch.stack([item[name] for item in items]).to(device)
                   for name in ("image", "latent", "noise", "depth", "valid") if name in items[0]}
        with amp:
            if args.task == "reflow":
                return stacked
            latent = sd.encode(stacked["image"]).float()
            if args.task != "depth":
                return {"latent": latent}
            invalid = F.max_pool2d((~stacked["valid"]).float(), sd.factor)      # a latent counts if all its pixels do
            return {"latent": sd.encode(stacked["depth"].expand(-1, 3, -1, -1)).float(), "picture": latent,
                    "mask": 1 - invalid}

    def context_of(captions, encoded):
        if args.task == "depth":
            return empty.expand(len(captions), -1, -1), encoded["picture"]
        return sd.encode_text(captions)

    def loss_of(items):
        encoded = batches.encoded(items, encode)
        dropped = torch.rand(len(items)) < args.caption_dropout
        captions = ["" if drop else item["caption"] for drop, item in zip(dropped, items)]
        t_fm = torch.randn(len(items), device=device).sigmoid() if args.t_sampling == "logit-normal" else None
        with amp, torch.set_grad_enabled(args.task == "prior"):
            context = context_of(captions, encoded)
        with amp:
            return flow.loss(encoded["latent"], context, encoded.get("noise"), t_fm, encoded.get("mask"))

    exam, validation = HeldOut(held_out, sd, flow, encode, context_of, args), out / "validation.jsonl"
    captions = [held_out[i % len(held_out)]["caption"] for i in range(args.previews)]
    guided = args.task in ("text-to-image", "prior")  # depth has no caption to guide by; pairs hold their guidance
    cfg_few, cfg_many = (2.0, 4.0) if guided else (1.0, 1.0)                          # of 4 steps, of 25
    cfg_before = dataset.about["cfg"] if args.task == "reflow" else cfg_few

    def measured(step, error):
        row = json.dumps({"step": step, "velocity_error": error}) + "\n"
        validation.write_text(past_metrics(validation, step - 1) + row)

    def preview(step):
        with amp:
            error, pictures = exam.velocity_error(), exam.pictures(25, cfg_many)
        save_grid(out / f"step_{step:06d}.png", pictures, 4, captions=captions)
        measured(step, error)
        tqdm.write(f"step {step}: velocity error {error:.4f}, {out}/step_{step:06d}.png")

    def export(suffix=""):
        about = {"objective": args.objective, "style": args.style, "prediction": sd.prediction, "task": args.task,
                 "schedule": "scaled_linear", "preset": args.lora, "base": Path(args.ckpt or TINY_PRIOR).name,
                 "resolution": f"{height} {width}", **({} if guided else {"cfg": "1.0"})}
        if args.lora == "none":
            sd.save(out / f"model{suffix}.safetensors", torch.float16, **about)
        else:
            lora.save(sd.unet, out / f"lora{suffix}.safetensors", about)

    print("before training: velocity error and samples")
    with amp:
        error_before, before = exam.velocity_error(), exam.pictures(4, cfg_before)
    if not args.resume:
        measured(0, error_before)
    average = fit(args, out, trained, loss_of, batches, export, preview,
                  state_file(args.resume) if args.resume else None)
    with average, amp:
        error_after, after = exam.velocity_error(), exam.pictures(4, cfg_few)
    measured(args.steps, error_after)
    rows = {"before, 4 steps": before, f"after {args.steps} steps of training": after}
    if args.task == "depth":
        shown = [held_out[i % len(held_out)] for i in range(args.previews)]
        rows = {"picture": torch.stack([item["image"] for item in shown]).to(device),
                "log depth": torch.stack([item["depth"].expand(3, -1, -1) for item in shown]).to(device)} | rows
    save_grid(out / "before_after.png", torch.cat(list(rows.values())), args.previews, row_labels=list(rows),
              captions=captions * len(rows))
    (out / "result.json").write_text(json.dumps({
        **{name: vars(args)[name] for name in ("task", "ckpt", "use_ema", "objective", "lora", "seed", "steps")},
        "prediction": sd.prediction, "size": [height, width],
        "velocity_error_before": error_before, "velocity_error_after": error_after}) + "\n")
    weights = str(out / ("model.safetensors" if args.lora == "none" else "lora.safetensors"))
    base = (["--ckpt", args.ckpt] if args.ckpt else []) + (["--use-ema"] if args.use_ema else [])
    use = ["--ckpt", weights] if args.lora == "none" else ["--lora", weights, *base]
    task = ["--task", "depth", "--image", "photo.jpg"] if args.task == "depth" else []
    print(f"validation velocity error |u - (x1 - x0)|^2: {error_before:.4f} before, {error_after:.4f} after\n"
          f"same noise before and after, 4 steps: {out}/before_after.png\nweights: {weights}\n"
          f"next: {shlex.join(['python', 'sample.py', '--steps', '4', *task, *use])}")


def main():
    args = arguments()
    device = pick_device(args.device)
    args.precision, amp = pick_precision(args.precision, device)
    out = Path(args.resume or args.out or f"runs/{args.task}-{datetime.now():%Y%m%d-%H%M%S}")
    if not args.resume and (out / "state.safetensors").exists():
        raise ValueError(f"{out} holds a run already: go on with it by --resume {out}, or choose another --out")
    torch.manual_seed(args.seed)
    train = train_autoencoder if args.task in ("autoencoder", "decoder") else train_unet
    try:
        train(args, device, amp, out)
    except KeyboardInterrupt:
        if (out / "state.safetensors").exists():
            print(f"go on with: {shlex.join(['python', 'train.py', '--resume', str(out)])}")
        raise


if __name__ == "__main__":
    cli(main)
