"""How good a run is: the velocity error on held-out items, samples of them, and what is left when the run ends."""
import json
import shlex
import time

import torch
from torch.utils.data import default_collate
from tqdm import tqdm

from data import noises, progress, to_floats
from diff2flow import velocity_error
from support.files import SOFTWARE, replacing
from support.load import unconditional
from support.pictures import save_grid
from support.plot import save_plot
from support.prompts import check_length
from support.run import append_log, guidance_after_training, trim_log, weights_name

VALIDATION_SEED = 30_000_000  # of held-out scenes and their noise, the same for every run
STEPS = {  # of toy.make_prior too: Euler steps of samples before and after training
    "text-to-image": (25, 4), "prior": (25, 4), "reflow": (4,), "depth": (4,)}


def spread_times(n, device):
    """-> t_fm (n,), evenly spread over [0, 1] by the golden ratio, for any n."""
    return (torch.arange(n, device=device) * 0.618034 + 0.5) % 1


class Validation:
    """Held-out items, always with the same noise: their velocity error, and samples for their captions or their depth,
    and for the prompts of --prompt.

    items: latents as train.encode_item returns them; example: the task's function in train.py. `source` says what the
    items are; `shown` are the captions of a preview.
    """

    def __init__(self, args, out, sd, flow, example, items, source):
        self.args, self.sd, self.flow, self.example, self.out = args, sd, flow, example, out
        self.source, self.seconds_per_item = source, 0.0
        self.latents = default_collate(items)
        self.captions, self.prompts, x1 = self.latents["caption"], args.prompt or [], self.latents["x1"]
        self.shown = [self.captions[i % len(items)] for i in range(args.previews)] + self.prompts
        check_length(self.prompts)
        shape, generator = (max(len(x1), args.previews), *x1.shape[1:]), torch.Generator().manual_seed(VALIDATION_SEED)
        self.noise = torch.randn(shape, generator=generator).to(x1.device)
        if "x0" in self.latents:
            self.noise[:len(x1)] = self.latents["x0"]

    def batches(self, n, title):
        """Yield (indices, noise, batch) of n items, which repeat if there are fewer."""
        for start in progress(range(0, n, self.args.batch), title):
            indices = range(n)[start:start + self.args.batch]
            rows = [i % len(self.captions) for i in indices]
            batch = {name: [value[i] for i in rows] if name == "caption" else value[rows]
                     for name, value in self.latents.items()}
            yield indices, self.noise[indices.start:indices.stop], batch

    @torch.no_grad()
    def velocity_error(self):
        """Mean |u - (x1 - x0)|^2 over the items, at times spread evenly over [0, 1]."""
        total, n, begin = 0.0, len(self.captions), time.time()
        times = spread_times(n, self.noise.device)
        for indices, x0, batch in self.batches(n, "velocity error"):
            x1, _, context, mask = self.example(self.sd, batch)
            t_fm = times[indices.start:indices.stop]
            total += velocity_error(self.flow, x1, x0, t_fm, context, mask).item() * len(x1)
        self.seconds_per_item = (time.time() - begin) / n
        return total / n

    def to_draw(self, title):
        """Yield (noise, context) of batches of `shown`. The noise of --prompt is that of sample.py."""
        for _, x0, batch in self.batches(self.args.previews, title):
            batch.pop("sizes", None)                            # samples are of uncropped pictures
            _, _, context, _ = self.example(self.sd, batch)
            yield x0, context
        for start in range(0, len(self.prompts), self.args.batch):
            prompts = self.prompts[start:start + self.args.batch]
            x0 = noises(range(start, start + len(prompts)), self.noise.shape[1:], seed=0)
            yield x0.to(self.noise.device), self.sd.encode_text(prompts)

    @torch.no_grad()
    def draw(self, steps, cfg=None):
        """-> pictures (len(shown), 3, H, W) by that many Euler steps. cfg: None for guidance_after_training."""
        cfg, pictures = guidance_after_training(self.args) if cfg is None else cfg, []
        uncond = unconditional(self.sd, cfg)
        for x0, context in self.to_draw(f"samples of {steps} steps"):
            pictures.append(self.sd.decode(self.flow.sample(x0, context, steps, uncond, cfg)).float())
        return torch.cat(pictures)

    def preview(self, step):
        """Write a grid of samples of 25 steps, a row of validation.jsonl, and metrics.png."""
        error, path = self.velocity_error(), self.out / f"step_{step:06d}.png"
        save_grid(path, self.draw(25), 4, f"{self.out}, step {step}: 25 Euler steps", captions=self.shown)
        self.log(step, error)
        save_plot(self.out)
        tqdm.write(f"step {step}: velocity error {error:.4f}, {path}")

    def log(self, step, error):
        path = self.out / "validation.jsonl"
        trim_log(path, step - 1)
        append_log(path, {"step": step, "velocity_error": error})


# ------------------------------------------------------------------ the start and the end of a run

def measure(validation):
    """-> the model's velocity error, and {Euler steps: samples}."""
    error = validation.velocity_error()
    return error, {steps: validation.draw(steps) for steps in STEPS[validation.args.task]}


def measure_before(validation, cfg=None):
    """Before training -> the velocity error, and {most Euler steps: samples}. cfg: guidance, if it differs from that
    after training."""
    print(f"before training: velocity error of {validation.source}, and samples")
    args = validation.args
    error, most = validation.velocity_error(), STEPS[args.task][0]
    warn_if_slow(args, validation.seconds_per_item)
    if not args.resume:
        validation.log(0, error)
    return error, {most: validation.draw(most, cfg)}


def warn_if_slow(args, seconds_per_item):
    """Warn if a run would take days: a training step takes about three times as long as its forward passes."""
    step = 3 * seconds_per_item * args.batch * args.grad_accum
    if step > 600 or step * args.steps > 7 * 86400:
        print(f"warning: on this device a step takes about {step / 60:.0f} minutes and {args.steps:,} steps about "
              f"{step * args.steps / 86400:.0f} days: use a GPU, or lower --steps, --batch, --grad-accum or --size")


def grid_rows(args, before, after, items):
    """-> {label: pictures} of before_after.png: samples of most steps before and after training, then of fewer steps;
    of depth also the pictures and their true depth."""
    most, *fewer = after
    rows = {f"before, {most} steps": before[most], f"after {args.steps:,} steps of training, {most} steps": after[most]}
    rows |= {f"after, {steps} steps": after[steps] for steps in fewer}
    if args.task == "depth":
        shown = [items[i % len(items)] for i in range(args.previews)]
        rows = {"picture": torch.stack([to_floats(item["image"]) for item in shown]),
                "log depth": torch.stack([item["depth"].expand(3, -1, -1) for item in shown])} | rows
    return {label: pictures.cpu() for label, pictures in rows.items()}


def next_command(args, weights):
    """-> the command that uses the trained weights."""
    words = ["python", "depth.py", "photo.jpg"] if args.task == "depth" else ["python", "sample.py"]
    if args.task == "reflow":
        words += ["--steps", "4"]
    if args.lora == "none":
        words += ["--ckpt", str(weights)]
    else:
        words += ["--lora", str(weights)]
        words += ["--ckpt", args.ckpt] if args.ckpt else []
        words += ["--use-ema"] if args.use_ema else []
    return shlex.join(words)


def finish(validation, items, size, before, after):
    """Write before_after.png, metrics.png and result.json, and print the next command. before, after: results of
    `measure`; items: the held-out items, as pictures."""
    args, out, shown = validation.args, validation.out, validation.shown
    validation.log(args.steps, after[0])
    save_plot(out)
    rows = grid_rows(args, before[1], after[1], items)
    making = f"{out}, before training and after {args.steps} steps, from the same noise"
    save_grid(out / "before_after.png", torch.cat(list(rows.values())), len(shown), making, list(rows),
              shown * len(rows))
    names = "task", "ckpt", "use_ema", "objective", "lora", "lr", "seed", "steps"
    result = {"software": SOFTWARE} | {name: vars(args)[name] for name in names}
    result |= {"prediction": validation.sd.prediction, "size": size, "velocity_error_before": before[0],
               "velocity_error_after": after[0]}
    if args.data and args.task != "depth":      # sample.py draws these where it gets no prompt
        result["captions"] = list(dict.fromkeys(validation.captions))[:8]
    with replacing(out / "result.json") as temporary:
        temporary.write_text(json.dumps(result) + "\n")
    weights = out / f"{weights_name(args)}.safetensors"
    print(f"velocity error |u - (x1 - x0)|^2 of {validation.source}: {before[0]:.4f} before, {after[0]:.4f} after\n"
          f"same noise before and after: {out}/before_after.png\n"
          f"weights: {weights}\nnext: {next_command(args, weights)}")
