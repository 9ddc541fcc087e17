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
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from support import lock
from support.checkpoint import modelspec, save_checkpoint
from support.files import PARTIAL, SOFTWARE, check_replaceable, from_json, replacing, try_writing
from support.load import BUNDLED_PRIOR
from support.lora_file import save_lora
from support.processes import StopSignal, read_ahead
from support.prompts import CaptionWatch
from support.state import names_hash, restore, save_state, saved_step, state_file, state_size

RESUMABLE = 75      # exit code of a run that was stopped and has saved: sysexits' EX_TEMPFAIL, try again
LOGS = "metrics.jsonl", "validation.jsonl"
OF_SYSTEMS = ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints"      # left by programs that show a folder
FILES = ("state.safetensors", "lora*.safetensors", "model*.safetensors", *LOGS, "metrics.png", "result.json",
         "step_*.png", "before_after.png")


# ------------------------------------------------------------------ the folder

def check_new(folder):
    """ValueError if a new run cannot use `folder`: it has a saved run, or files that no run made. Files of a run that
    was killed before its first save are fine."""
    if (folder / "state.safetensors").exists():
        raise ValueError(f"{folder} has a run already: continue it with --resume {folder}, or choose another --out")
    files = [path for path in folder.iterdir() if path.name not in OF_SYSTEMS] if folder.is_dir() else []
    for path in sorted(files):
        name = PARTIAL.sub("", path.name)           # of a half-written file: its whole name
        if path.name != lock.NAME and not any(map(Path(name).match, FILES)):
            raise ValueError(f"--out {folder}: it contains {path.name}, which is not a file of a run: choose another")
        is_log = name in LOGS and path.is_file() and path.stat().st_size == 0       # created, and killed
        if name == path.name != lock.NAME and not is_log:
            check_replaceable(path)


def run_folder(args):
    """-> the folder of the run, checked if it is a new one."""
    out = Path(args.out or args.resume or f"runs/{args.task}-{datetime.now():%Y%m%d-%H%M%S}")
    if moves(args, out):
        check_new(out)
    return out


def moves(args, out):
    """Whether nothing of the run is in `out` yet: a new run, or one that resumes in another folder than its own."""
    return not args.resume or out.resolve() != Path(args.resume).resolve()


@contextlib.contextmanager
def owned(args, out):
    """Inside `with`, `out` belongs to this process, and has the logs of the run so far."""
    with lock.owned(out, *FILES):
        if moves(args, out):
            check_new(out)                  # again: another run may have been there until now
            for log in LOGS:
                if args.resume and Path(args.resume, log).is_file():
                    with replacing(out / log) as temporary:
                        shutil.copyfile(Path(args.resume, log), temporary)
        yield


# ------------------------------------------------------------------ the log

def trim_log(path, last_step):
    """Remove the rows of a .jsonl after `last_step`, which a resumed run writes again, and a half-written last row. The
    file is written again, so that a link at its place leads nowhere afterwards."""
    if not path.is_file():
        path.unlink(missing_ok=True)        # a link to nowhere
        return
    rows = []
    for row in path.read_bytes().splitlines(keepends=True):
        try:
            kept = row.endswith(b"\n") and from_json(row)["step"] <= last_step
        except (ValueError, KeyError, TypeError):
            kept = False
        if not kept:
            break
        rows.append(row)
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(rows))


def append_log(path, row):
    """The first row of a log names its maker."""
    if not path.exists() or path.stat().st_size == 0:
        row = {**row, "software": SOFTWARE}
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
        saved = self.out and (self.out if (self.out / "state.safetensors").exists() else self.args.resume)
        lower = f"--lr {self.args.lr / 3:.1g}"
        way_out = f"resume from the last save: python train.py --resume {saved} {lower}" if saved else (
            f"start again with {lower}")
        raise Diverged(f"the loss is {loss:g} and the gradient's norm {norm:g} at step {step + 1} ({times}learning "
                         f"rate {lr:g}): stopped, and the step is not saved; {way_out}")


# ------------------------------------------------------------------ a run

class Diverged(ValueError):
    """The loss or the gradient is not finite."""


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
        self.grad_accum = args.grad_accum // ranks.count
        self.done = self.saved = self.start         # steps
        self.optimizer = self.ema = self.batches = None
        self.captions = CaptionWatch()

    def steps(self, loader, optimizer, ema, flow=None):
        """Yield (step, batches) for every step that is left, `batches` being this process's micro-batches. After each
        step: log, save, preview, and Stopped if a signal came. The gradients of flow's network are averaged over the
        processes."""
        args, is_main, net = self.args, self.ranks.is_main, None
        if args.resume:
            restore(state_file(args.resume), ema, optimizer, getattr(args, "given", ()), **self.about)
        if is_main and moves(args, self.out):
            try_writing(self.out / "state.safetensors", state_size(ema), copies=2)      # a save keeps the one before
        self.optimizer, self.ema = optimizer, ema
        metrics = Metrics(args, self.out if is_main else None, self.start)
        if flow is not None:
            net = flow.net = self.ranks.wrap(flow.net)
            net.register_forward_pre_hook(metrics.remember_timesteps)
        self.batches = read_ahead(loader)
        batches = metrics.timed(self.batches)
        bar = tqdm(range(self.start, args.steps), initial=self.start, total=args.steps, unit="step", dynamic_ncols=True,
                   disable=not is_main)
        self.stop.deferred = True
        if self.stop.received:                      # Python has dropped its KeyboardInterrupt
            raise KeyboardInterrupt
        for step in bar:
            self.loss, self.norm = 0, None
            yield step, self.micro_batches(step, batches, net)

            done = self.done = step + 1
            stopping = self.ranks.any(self.stop.received or self.ranks.is_orphan())
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
                self.save_state()
            if stopping and done < args.steps:
                raise Stopped(done, args.steps)
        self.stop.deferred = False

    def save_state(self):
        save_state(self.out, self.args, self.done, self.ema, self.optimizer, **self.about)
        self.saved = self.done

    def save_after_error(self):
        """After an error of data or disk: save the steps that were finished before it. Weights that a step has changed
        in part, or that are not finite, are not saved."""
        if not self.ranks.is_main or self.done == self.saved:
            return
        try:
            changed = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
            tensors = [*self.ema.trained.values(), *self.ema.average.values()]
            if changed == self.done and all(tensor.isfinite().all() for tensor in tensors):
                self.save_state()
                with self.ema.in_place():
                    self.save_weights(self.done)
        except Exception as error:      # of the disk, of a broken GPU; the error that came first is raised
            print(f"step {self.done} could not be saved: {error}", file=sys.stderr)

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
    """Inside `with`, a Run in the folder `out`. When a signal or an error stops it, prints `command`, which resumes it.
    """
    about = {"base_hash": str(base_hash), "data": names_hash(args.data)}
    with owned(args, out) if ranks.is_main else contextlib.nullcontext(), StopSignal() as stop:
        run = Run(args, out, ranks, stop, about)
        try:
            yield run
        except Stopped as stopped:
            print(f"{stopped}; resume with: {command}")
            sys.exit(RESUMABLE)
        except KeyboardInterrupt:
            if (out / "state.safetensors").exists():
                print(f"interrupted; resume from the last save with: {command}")
            raise
        except Exception as error:
            if not isinstance(error, Diverged):
                run.save_after_error()
            if ranks.is_main and (out / "state.safetensors").exists():
                print(f"an error after step {run.done} of {args.steps}, see below; step {run.saved} is saved: resume "
                      f"with: {command}", file=sys.stderr)
            raise
        finally:
            if run.batches is not None:
                run.batches.close()         # its workers end
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
    if sd.is_depth_model:
        metadata["image_input"] = "first"
    if args.lora == "none":
        return metadata | modelspec(sd, title, size)
    version = "sdxl_base_v1-0" if sd.config.is_xl else f"sd_v{sd.config.version[0]}"
    if sd.prediction == "v" and not sd.config.is_xl:
        version += "_v"
    return metadata | modelspec(sd, title, size, "/lora") | {
        "ss_base_model_version": version, "ss_v2": str(sd.config.version == "2.x")}


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
