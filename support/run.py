"""A training run that can be stopped, killed and resumed: its folder, log, state, and what surrounds its loop.

    with open_run(args, out, ranks, command, base_hash) as run:
        for step, batches in run.steps(...):        train.py's loop body: one optimizer step
            for batch in batches: ...

A run ends after its step on Ctrl-C, kill, a closed terminal or SIGUSR1 (which clusters send before they take a machine
back): it saves, prints the command that resumes it, and exits with code 75. Resuming gives the same result, because
step s draws its batch, noise and times from (seed, s) alone.
"""
import contextlib
import json
import math
import os
import socket
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from support.checkpoint import modelspec, save_checkpoint
from support.files import check_replaceable, from_json
from support.load import BUNDLED_PRIOR
from support.lora_file import save_lora
from support.processes import StopSignal
from support.prompts import CaptionWatch
from support.state import names_hash, restore, save_state, saved_step, state_file

try:
    import fcntl
except ImportError:     # Windows: no lock, two runs in one folder are not noticed
    fcntl = None

RESUMABLE = 75      # exit code of a run that was stopped and has saved: sysexits' EX_TEMPFAIL, try again
FILES = ("lora*.safetensors", "model*.safetensors", "metrics.jsonl", "validation.jsonl", "result.json", "step_*.png",
         "before_after.png", "*.partial.*", ".lock")      # of a run, beside its state


# ------------------------------------------------------------------ the folder

def check_new(folder):
    """ValueError if a new run cannot use `folder`: it has a saved run, or files that are not a run's. Files of a run
    that was killed before its first save are fine."""
    if (folder / "state.safetensors").exists():
        raise ValueError(f"{folder} has a run already: continue it with --resume {folder}, or choose another --out")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not any(map(path.match, FILES)):
            raise ValueError(f"--out {folder}: it contains {path.name}, which is not a file of a run: choose another")
        if path.suffix in (".png", ".safetensors") and ".partial." not in path.name:
            check_replaceable(path)


def run_folder(args):
    """-> the folder of the run, checked if it is a new one."""
    out = Path(args.resume or args.out or f"runs/{args.task}-{datetime.now():%Y%m%d-%H%M%S}")
    if not args.resume:
        check_new(out)
    return out


def remove_partial(folder):
    for path in folder.glob("*.partial.*"):
        path.unlink()


@contextlib.contextmanager
def owned(folder):
    """Inside `with`, no other process runs in `folder`: ValueError that names the process which does. Removes
    half-written files of killed processes."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        remove_partial(folder)
        yield
        return
    with open(folder / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(f"{folder}: process {lock.read()} runs there: wait, or choose another --out") from None
        if os.fstat(lock.fileno()).st_nlink == 0:               # its owner has just removed it
            raise ValueError(f"{folder}: another process has just ended there: try again")
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        remove_partial(folder)
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


# ------------------------------------------------------------------ the log

def trim_log(path, last_step):
    """Remove the rows of a .jsonl after `last_step`, which a resumed run writes again, and a half-written last row."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        while line := file.readline():
            try:
                kept = line.endswith(b"\n") and from_json(line)["step"] <= last_step
            except (ValueError, KeyError, TypeError):
                kept = False
            if not kept:
                file.truncate(file.tell() - len(line))
                return


def append_log(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


class Metrics:
    """metrics.jsonl, and the numbers beside the progress bar: every ten steps, means since the last row. `waiting` is
    the share of time spent waiting for data. out: the run's folder, or None to write nothing."""

    def __init__(self, args, out, start):
        self.args, self.out, self.rows, self.timesteps = args, out, [], []
        self.clock, self.waited = time.time(), 0.0
        if out:
            trim_log(out / "metrics.jsonl", start)

    def remember_timesteps(self, net, inputs):
        """A forward pre-hook: keeps the network's t_dm of this step, for the message of `fail`."""
        if torch.is_grad_enabled():
            self.timesteps.append(inputs[1].detach())

    def timed(self, batches):
        """Yield the batches, and measure how long each took to arrive."""
        begin = time.time()
        for batch in batches:
            self.waited += time.time() - begin
            yield batch
            begin = time.time()

    @contextlib.contextmanager
    def paused(self):
        """Inside `with`, time does not count."""
        begin = time.time()
        yield
        self.clock += time.time() - begin

    def add(self, step, loss, norm, lr, bar, now=False):
        """loss and the gradient's norm are scalars on the device, which are read only where a row is written."""
        self.rows.append((torch.stack([loss, norm]), lr, self.timesteps))
        self.timesteps = []
        if step % 10 and not now:
            return
        values = torch.stack([row[0] for row in self.rows])
        loss, norm = values.mean(0).tolist()
        if not math.isfinite(loss + norm):
            bad = (~values.isfinite()).any(1).tolist().index(True)
            self.fail(step - len(values) + bad, *values[bad].tolist(), *self.rows[bad][1:])
        images = len(values) * self.args.batch * self.args.grad_accum
        seconds = max(time.time() - self.clock, 1e-6)           # a clock may stand still, or be set back
        memory = torch.cuda.max_memory_allocated() / 2**30 if values.is_cuda else 0.0
        row = {"step": step, "loss": loss, "grad": norm, "lr": lr, "img_s": round(images / seconds, 2),
               "waiting": round(self.waited / seconds, 3), "mem_gb": round(memory, 2)}
        if self.out:
            append_log(self.out / "metrics.jsonl", row)
        bar.set_postfix_str(f"loss {loss:.4f} grad {norm:.2f} lr {lr:.1e} {row['img_s']} img/s "
                            f"waiting {row['waiting']:.0%} mem {row['mem_gb']} GB")
        self.rows, self.clock, self.waited = [], time.time(), 0.0

    def fail(self, step, loss, norm, lr, timesteps):
        """ValueError for a step whose loss or gradient is not finite. Neither that step nor later ones were saved."""
        times = ""
        if timesteps:
            t = torch.cat(timesteps)
            times = f"network timesteps {t.min():g} to {t.max():g}, "
        resumable = self.out and (self.out / "state.safetensors").exists()
        lower = f"--lr {self.args.lr / 3:.1g}"
        way_out = f"resume from the last save: python train.py --resume {self.out} {lower}" if resumable else (
            f"start again with {lower}")
        raise ValueError(f"the loss is {loss:g} and the gradient's norm {norm:g} at step {step + 1} ({times}learning "
                         f"rate {lr:g}): stopped, and the step is not saved; {way_out}")


# ------------------------------------------------------------------ a run

class Stopped(Exception):
    """A run got a stop signal and has saved after `done` of its steps."""

    def __init__(self, done, steps):
        super().__init__(f"stopped and saved after step {done} of {steps}")


def seed_of(seed, i):
    """The seed of torch's random stream i. torch's CPU generator uses the low 32 bits of a seed alone. Multiples of
    this number (2^32 times the golden ratio) are far apart modulo 2^32: the streams of seeds up to 1000 begin more than
    1.9 million numbers apart, and no run of the paper uses more."""
    return (seed * 2654435769 + i) % 2**32


class Run:
    """An open run: .start is the first step that is not done yet, .grad_accum the batches per step of this process.

    Set .save_weights(step) and .preview(step), which are called with the EMA in place of the weights.
    """

    def __init__(self, args, out, ranks, stop, about):
        self.args, self.out, self.ranks, self.stop, self.about = args, out, ranks, stop, about
        self.start = saved_step(args.resume) if args.resume else 0
        if self.start > args.steps:
            raise ValueError(f"--steps {args.steps}: {out} has done {self.start} steps already")
        self.grad_accum, self.captions = args.grad_accum // ranks.count, CaptionWatch()

    def steps(self, loader, optimizer, ema, flow=None):
        """Yield (step, batches) for every step that is left, `batches` being this process's micro-batches. After each
        step: log, save, preview, and Stopped if a signal came. The gradients of flow's network are averaged over the
        processes."""
        args, is_main, net = self.args, self.ranks.is_main, None
        if args.resume:
            restore(state_file(args.resume), ema, optimizer, **self.about)
        metrics = Metrics(args, self.out if is_main else None, self.start)
        if flow is not None:
            net = flow.net = self.ranks.wrap(flow.net)
            net.register_forward_pre_hook(metrics.remember_timesteps)
        batches = metrics.timed(iter(loader))
        bar = tqdm(range(self.start, args.steps), initial=self.start, total=args.steps, unit="step", dynamic_ncols=True,
                   disable=not is_main)
        self.stop.deferred = True
        for step in bar:
            self.loss, self.norm = 0, None
            yield step, self.micro_batches(step, batches, net)

            done, stopping = step + 1, self.ranks.any(self.stop.received)
            saving = done % args.save_every == 0 or done == args.steps or stopping
            previewing = args.preview_every > 0 and done % args.preview_every == 0
            metrics.add(done, self.ranks.mean(self.loss), self.norm, optimizer.param_groups[0]["lr"], bar, now=saving)
            if is_main:
                self.captions.report(now=saving)
            if is_main and (saving or previewing):
                with metrics.paused(), ema.in_place():
                    if saving:
                        self.save_weights(done)
                    if previewing:
                        self.preview(done)
            if is_main and saving:      # last: a run that is killed before it redoes the step and its files
                save_state(self.out, args, done, ema, optimizer, **self.about)
            if stopping and done < args.steps:
                raise Stopped(done, args.steps)
        self.stop.deferred = False

    def micro_batches(self, step, batches, net):
        """Yield this process's batches of a step, each with its own random stream."""
        mine = range(self.ranks.rank, self.args.grad_accum, self.ranks.count)
        for i in mine:
            batch = next(batches)
            self.captions.look(batch["caption"])
            torch.manual_seed(seed_of(self.args.seed, step * self.args.grad_accum + i))
            self.ranks.sync_gradients(net, last=i == mine[-1])
            yield batch

    def log(self, loss=None, norm=None):
        """Add the loss of a micro-batch, or note the norm of the step's gradient: scalars on the device."""
        if loss is not None:
            self.loss = self.loss + loss.detach()
        if norm is not None:
            self.norm = norm


@contextlib.contextmanager
def open_run(args, out, ranks, command, base_hash=None):
    """Inside `with`, a Run in the folder `out`. When a signal stops it, prints `command`, which resumes it."""
    about = {"base_hash": str(base_hash), "data": names_hash(args.data)}
    with owned(out) if ranks.is_main else contextlib.nullcontext(), StopSignal() as stop:
        try:
            yield Run(args, out, ranks, stop, about)
        except Stopped as stopped:
            print(f"{stopped}; resume with: {command}")
            sys.exit(RESUMABLE)
        except KeyboardInterrupt:
            if (out / "state.safetensors").exists():
                print(f"interrupted; resume from the last save with: {command}")
            raise
        ranks.leave()


# ------------------------------------------------------------------ weights

def guidance_after_training(args):
    """The guidance scale for a run's model: 4 as in the paper, 2 for the flat colours of procedural scenes; 1, which is
    none, for depth and after Reflow, whose pairs were guided already."""
    if args.task in ("reflow", "depth"):
        return 1.0
    return 4.0 if args.data else 2.0


def training_metadata(args, title, sd, size):
    """-> the metadata of a run's weights (str -> str): our own keys, those of ModelSpec, and for a LoRA kohya's.
    base_hash identifies the base's UNet."""
    metadata = {"objective": args.objective, "prediction": sd.prediction, "task": args.task,
                "schedule": "scaled_linear", "preset": args.lora, "base": Path(args.ckpt or BUNDLED_PRIOR).name,
                "base_hash": sd.unet_hash,
                "resolution": " ".join(map(str, size)), "cfg": str(guidance_after_training(args))}
    if not args.data:
        metadata["style"] = args.style          # of the procedural scenes
    if sd.zero_snr:
        metadata["zero_snr"] = "true"
    if args.lora == "none":
        return metadata | modelspec(sd, title, size)
    version = f"sd_v{sd.config.version}{'_v' if sd.prediction == 'v' else ''}"
    return metadata | modelspec(sd, title, size, "/lora") | {
        "ss_base_model_version": version, "ss_v2": str(sd.config.version == 2)}


def weights_name(args):
    return "model" if args.lora == "none" else "lora"


def save_weights(args, out, sd, metadata, step):
    """Write the file that other tools load: the LoRA, or the whole checkpoint. With --keep, also one named by step."""
    name = weights_name(args)
    paths = [out / f"{name}.safetensors"]
    if args.keep:
        paths.append(out / f"{name}-{step:06d}.safetensors")
    for path in paths:
        if args.lora == "none":
            save_checkpoint(sd, path, torch.float16, **metadata)
        else:
            save_lora(sd.unet, path, metadata)
