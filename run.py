"""What a long run needs beside the method: an owner of its folder, its settings and state, its log, the signals that
end it, and the processes that share its work. The method needs none of this.

    python train.py ...                                a run is one process,
    torchrun --nproc-per-node=8 train.py ...           or several, each with a share of every step's forward passes

kill, Ctrl-C, a closed terminal and SIGUSR1 (which clusters send before they take a machine back) end a run after its
step: it saves, says how to go on, and exits with code 75.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from data import files_in
from files import check_replaceable, from_json, open_tensors, save_tensors

RESUMABLE = 75      # exit code of a run that was told to stop and saved: sysexits' EX_TEMPFAIL, try again
FILES = ("lora*.safetensors", "model*.safetensors", "metrics.jsonl", "validation.jsonl", "result.json", "step_*.png",
         "before_after.png", "*.partial.*", ".lock")      # of a run, beside its state
STEERABLE = ("steps", "lr", "save_every", "preview_every", "device")    # what --resume may change


# ------------------------------------------------------------------ processes

def rank_and_count():
    """-> this process's number among those that torchrun started, and how many they are; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Ranks:
    """The processes that torchrun started, this one's .rank among .count; or this process alone. The one that .leads
    writes and prints."""

    def __init__(self, device):
        self.rank, self.count = rank_and_count()
        self.leads = self.rank == 0
        if self.count > 1:
            backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backends, timeout=timedelta(hours=2))       # rank 0 saves and draws meanwhile
        if not self.leads:
            sys.stdout = open(os.devnull, "w")

    def wrap(self, net):
        """-> net, or where several processes train it, DistributedDataParallel of it: gradients become their mean."""
        if self.count == 1:
            return net
        from torch.nn.parallel import DistributedDataParallel
        return DistributedDataParallel(net, broadcast_buffers=False)

    def apart(self, net, last):
        """A context for forward and backward: gradients stay this process's own until the `last` batch of a step."""
        return contextlib.nullcontext() if last or self.count == 1 else net.no_sync()

    def mean(self, x):
        """A scalar on the device -> its mean over the processes."""
        if self.count > 1:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.count
        return x

    def any(self, flag):
        """Whether the flag of any process is set: all must end at the same step."""
        if self.count == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags)
        return flags.item() > 0

    def gather(self, items):
        """Each process's {key: tensor} -> all of them where this process leads, elsewhere {}."""
        if self.count == 1:
            return items
        parts = [None] * self.count if self.leads else None
        dist.gather_object(items, parts)
        return {key: tensor for part in parts or [] for key, tensor in part.items()}

    def wait(self):
        """Until the others have come as far."""
        if self.count > 1:
            dist.barrier()

    def leave(self):
        """Wait for the others, and end the common work."""
        self.wait()
        if self.count > 1:
            dist.destroy_process_group()


# ------------------------------------------------------------------ signals

class Stopped(Exception):
    """A run was told to stop, and has saved after `done` of its steps."""

    def __init__(self, done, steps):
        super().__init__(f"stopped and saved after step {done} of {steps}")


class StopSignal:
    """Inside `with`, the signals that ask a process to end do so at once, but while steps are taken, which .waits says,
    they set .came instead, and the loop ends after its step. A second SIGINT never waits."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __enter__(self):
        self.waits, self.came = False, False
        self.before = {number: signal.signal(number, self.receive) for number in self.SIGNALS}
        return self

    def receive(self, number, frame):
        if not self.waits or (self.came and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.came = True
        print(f"\n{signal.Signals(number).name}: the run saves after this step, and ends", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_interrupts(worker):
    """For a DataLoader's workers, which get the terminal's Ctrl-C too, but are needed until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ------------------------------------------------------------------ the folder

def check_new(folder):
    """ValueError if a new run cannot have `folder`: it holds a saved run, or files that are no run's, above all data. A
    run that was killed before its first save may have left some."""
    if (folder / "state.safetensors").exists():
        raise ValueError(f"{folder} holds a run already: go on with it by --resume {folder}, or choose another --out")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not any(map(path.match, FILES)):
            raise ValueError(f"--out {folder}: it holds {path.name}, which is no file of a run: choose another folder")
        if path.suffix in (".png", ".safetensors") and ".partial." not in path.name:
            check_replaceable(path)


@contextlib.contextmanager
def owned(folder):
    """Inside `with`, no other process runs in `folder`. What a killed writer left half-written there is removed.
    ValueError that names the process which runs there already."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(f"{folder}: process {lock.read()} runs there: wait, or choose another --out") from None
        if os.fstat(lock.fileno()).st_nlink == 0:               # its owner has just left, and removed it
            raise ValueError(f"{folder}: another process has just ended there: try again")
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        for path in folder.glob("*.partial.*"):
            path.unlink()
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


# ------------------------------------------------------------------ the log

def trim_log(path, last_step):
    """Cut from a .jsonl what comes after `last_step`: a resumed run writes it again. A torn last line goes too."""
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
    """metrics.jsonl and the numbers beside the bar: every ten steps the means since the last line, among them the share
    of time spent waiting for data. out is the run's folder, or None: then nothing is written. net is the network whose
    times t_dm are remembered for the message of a failed step."""

    def __init__(self, args, out, start, net=None):
        self.args, self.out, self.recent, self.asked_at, self.asked = args, out, [], [], []
        self.clock, self.waited = time.time(), 0.0
        if out:
            trim_log(out / "metrics.jsonl", start)
        if net is not None:
            net.register_forward_pre_hook(self.remember)

    def remember(self, net, inputs):
        if torch.is_grad_enabled():
            self.asked.append(inputs[1].detach())

    def timed(self, batches):
        """Yield the batches, and add up the seconds until each was there."""
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
        """loss, and norm of the gradient, are scalars on the device, which are read only where a line is written."""
        self.recent.append(torch.stack([loss, norm]))
        self.asked_at.append((lr, self.asked))
        self.asked = []
        if step % 10 and not now:
            return
        recent = torch.stack(self.recent)
        loss, norm = recent.mean(0).tolist()
        images, seconds = len(recent) * self.args.batch * self.args.grad_accum, time.time() - self.clock
        memory = torch.cuda.max_memory_allocated() / 2**30 if recent.is_cuda else 0.0
        row = {"step": step, "loss": loss, "grad": norm, "lr": lr, "img_s": round(images / seconds, 2),
               "waiting": round(self.waited / seconds, 3), "mem_gb": round(memory, 2)}
        if not math.isfinite(loss + norm):
            bad = (~recent.isfinite()).any(1).tolist().index(True)
            self.fail(step - len(recent) + bad, *recent[bad].tolist(), *self.asked_at[bad])
        if self.out:
            append_log(self.out / "metrics.jsonl", row)
        bar.set_postfix_str(f"loss {loss:.4f} grad {norm:.2f} lr {lr:.1e} {row['img_s']} img/s "
                            f"waiting {row['waiting']:.0%} mem {row['mem_gb']} GB")
        self.recent, self.asked_at, self.clock, self.waited = [], [], time.time(), 0.0

    def fail(self, step, loss, norm, lr, asked):
        """Stop at a step whose loss or gradient is not finite. Neither it nor what came after it was saved."""
        times = ""
        if asked:
            t = torch.cat(asked)
            times = f"the network was asked at t = {t.min():g} to {t.max():g}, "
        resumable = self.out and (self.out / "state.safetensors").exists()
        lower = f"--lr {self.args.lr / 3:.1g}"
        way_out = f"go on from the last save by python train.py --resume {self.out} {lower}" if resumable else (
            f"begin again with {lower}")
        raise ValueError(f"the loss is {loss:g} and the gradient's norm {norm:g} at step {step + 1} ({times}learning "
                         f"rate {lr:g}): stopped, and the step is not saved; {way_out}")


# ------------------------------------------------------------------ a run

class Job(NamedTuple):
    out: Path           # the run's folder
    ranks: Ranks
    stop: StopSignal


@contextlib.contextmanager
def job(out, ranks, command):
    """Inside `with`, a run owns its folder. A run that was told to stop ends here, and says that it goes on by
    `command`."""
    with owned(out) if ranks.leads else contextlib.nullcontext(), StopSignal() as stop:
        try:
            yield Job(out, ranks, stop)
        except Stopped as stopped:
            print(f"{stopped}; go on with: {command}")
            sys.exit(RESUMABLE)
        except KeyboardInterrupt:
            if (out / "state.safetensors").exists():
                print(f"interrupted; go on from the last save with: {command}")
            raise
        ranks.leave()


# ------------------------------------------------------------------ settings and state

def given_flags(parser, args):
    """-> {name: value} of those `args` that are on the command line, and no defaults."""
    unset = object()
    given = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    return {name: value for name, value in given.items() if value is not unset}


def state_file(folder):
    path = Path(folder) / "state.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --resume takes the folder of a run that was saved")
    return path


def saved_settings(folder):
    path = state_file(folder)
    with open_tensors(path) as file:
        told = file.metadata()
    try:
        settings = from_json(told["args"])
        if not isinstance(settings["task"], str) or int(told["step"]) < 0:
            raise ValueError(f"task {settings['task']}, step {told['step']}")
        return settings
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not written by train.py ({error})") from error


def parsed_again(parser, settings, path):
    """-> the settings that the state at `path` holds, as the parser makes them of a command line: ValueError for what
    it would refuse there."""
    def refuse(message):
        raise ValueError(f"{path}: not written by train.py ({message})")

    words = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    parser.error = refuse
    return parser.parse_args(words)


def resumed_settings(folder, given):
    """The settings of the run in `folder`, with those of STEERABLE that are `given` beside --resume. ValueError for
    another one."""
    settings = saved_settings(folder)
    for name, value in given.items():
        if name in ("resume", "task") and settings.get(name) in (None, value):
            continue
        flag = "--" + name.replace("_", "-")
        if name not in STEERABLE:
            raise ValueError(f"{flag}: a resumed run keeps its settings; beside --resume it takes "
                             f"{', '.join('--' + word.replace('_', '-') for word in STEERABLE)}")
        if settings.get(name) != value:
            print(f"{flag} {value} instead of {settings.get(name)}")
    return {**settings, **given}


def listing(folders):
    """-> a word that changes when a file comes into the folders, goes, or gets another name. Tars are no folders: a run
    names each of them by its settings."""
    names = hashlib.sha256()
    for folder in folders or []:
        names.update("\n".join(path.removeprefix(folder) for path in files_in(folder)).encode())
    return names.hexdigest()


def save_state(out, args, step, ema, optimizer, **about):
    """What a resumed run needs: parameters, their average, Adam's state, and about {str: str} base and data."""
    tensors = {}
    for name, parameter in ema.trained.items():
        tensors[f"parameter/{name}"], tensors[f"average/{name}"] = parameter, ema.average[name]
        for key, value in optimizer.state[parameter].items():
            tensors[f"adam/{key}/{name}"] = value
    metadata = {"args": json.dumps(vars(args)), "step": str(step), "version": "1", **about}
    save_tensors(out / "state.safetensors", tensors, metadata)


def fitting(path, file, key, parameter):
    """-> a tensor of the state at `path`, which is open as `file`. ValueError if it does not fit its parameter."""
    tensor = file.get_tensor(key)
    if (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype) or not tensor.isfinite().all():
        raise ValueError(f"{path}: {key} {list(tensor.shape)} does not fit the model's {list(parameter.shape)}, or is "
                         "not finite: a damaged file; begin the run again in another --out")
    return tensor


def restore(path, ema, optimizer, **about):
    """-> the step to go on from. Fused Adam wants its averages in the parameter's own memory format. ValueError for the
    state of another model, or on another base than in `about`; other data are said."""
    with open_tensors(path) as file, torch.no_grad():
        stored, told = set(file.keys()), file.metadata()
        if told.get("base_hash", about.get("base_hash")) != about.get("base_hash"):
            raise ValueError(f"{path}: the run's base was another checkpoint (UNet {told['base_hash'][:10]}, now "
                             f"{about['base_hash'][:10]}): was the file replaced?")
        if {key for key in stored if key.startswith("parameter/")} != {f"parameter/{name}" for name in ema.trained}:
            raise ValueError(f"{path}: the state of another model; was the checkpoint replaced?")
        of_adam = [{key.rpartition("/")[2] for key in stored if key.startswith(f"adam/{kind}/")}
                   for kind in ("step", "exp_avg", "exp_avg_sq")]
        if not of_adam[0] == of_adam[1] == of_adam[2] != set():
            raise ValueError(f"{path}: a part of Adam's state is missing: begin the run again in another --out")
        if told.get("data", about.get("data")) != about.get("data"):
            print("warning: the files of --data are not those that the run began with: they come in another order now")
        for name, parameter in ema.trained.items():
            parameter.copy_(fitting(path, file, f"parameter/{name}", parameter))
            ema.average[name].copy_(fitting(path, file, f"average/{name}", parameter))
            if f"adam/step/{name}" in stored:  # not where no gradient arrives: the last layer of an OpenCLIP tower
                state = {"step": fitting(path, file, f"adam/step/{name}", torch.tensor(0.0)).to(parameter.device)}
                for key in ("exp_avg", "exp_avg_sq"):
                    average = fitting(path, file, f"adam/{key}/{name}", parameter)
                    state[key] = torch.empty_like(parameter).copy_(average)
                optimizer.state[parameter] = state
        return int(told["step"])
