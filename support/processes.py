"""The processes that torchrun starts, and the signals that end a run."""
import contextlib
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def rank_and_count():
    """-> this process's number among those of torchrun, and their count; 0 and 1 without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Ranks:
    """The processes of torchrun: this one's .rank of .count. Only the one with .is_main writes files and prints."""

    def __init__(self, device):
        self.rank, self.count = rank_and_count()
        self.is_main = self.rank == 0
        if self.count > 1:
            backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backends, timeout=timedelta(hours=2))       # the others wait while rank 0 saves
        if not self.is_main:
            sys.stdout = open(os.devnull, "w")

    def wrap(self, net):
        """-> net, or with several processes DistributedDataParallel of it, which averages gradients."""
        if self.count == 1:
            return net
        from torch.nn.parallel import DistributedDataParallel
        return DistributedDataParallel(net, broadcast_buffers=False)

    def sync_gradients(self, net, last):
        """Skip the gradient all-reduce in the next backward pass, except on the last micro-batch of a step."""
        if self.count > 1:
            net.require_backward_grad_sync = last

    def mean(self, x):
        """A scalar on the device -> its mean over the processes."""
        if self.count > 1:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.count
        return x

    def any(self, flag):
        """Whether the flag of any process is set."""
        if self.count == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags)
        return flags.item() > 0

    def gather(self, items):
        """{key: tensor} of each process -> all of them in the main process, {} in the others."""
        if self.count == 1:
            return items
        parts = [None] * self.count if self.is_main else None
        dist.gather_object(items, parts)
        return {key: tensor for part in parts or [] for key, tensor in part.items()}

    def wait(self):
        """Block until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def leave(self):
        """Wait for the others and close the process group."""
        self.wait()
        if self.count > 1:
            dist.destroy_process_group()


class StopSignal:
    """Inside `with`, Ctrl-C, kill, a closed terminal and SIGUSR1 raise KeyboardInterrupt. With .deferred set they only
    set .received, so that the loop can finish its step and save; a second Ctrl-C still raises. Signals that are ignored
    at the start, as by nohup, stay ignored."""

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
                    if hasattr(signal, name))       # Windows lacks the last two

    def __enter__(self):
        self.deferred, self.received = False, False
        heeded = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.receive) for number in heeded}
        return self

    def receive(self, number, frame):
        if not self.deferred or (self.received and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.received = True
        with contextlib.suppress(RuntimeError):         # the signal came while the loop was printing
            print(f"\n{signal.Signals(number).name}: the run saves after this step and stops", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_interrupts(worker):
    """For DataLoader workers: signals to the whole process group reach them too, but they are needed until the step is
    done."""
    for number in StopSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
