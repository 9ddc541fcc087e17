"""The processes that torchrun starts, and the signals that end a run."""
import contextlib
import multiprocessing
import os
import re
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from support.files import reading

WORKER_LOST = re.compile(r"DataLoader worker \(pid|shared memory|unable to \w+ .*</torch_|Pin memory thread exited")


def rank_and_count():
    """-> this process's number among those of torchrun, and their count; 0 and 1 without torchrun."""
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ValueError(f"RANK={rank} and WORLD_SIZE={count} in the environment: torchrun sets them to numbers, RANK "
                         "from 0 to WORLD_SIZE - 1; unset both to run one process")
    return int(rank), int(count)


class Ranks:
    """The processes of torchrun: this one's .rank of .count. Only the one with .is_main writes files and prints."""

    def __init__(self, device):
        self.rank, self.count = rank_and_count()
        self.is_main = self.rank == 0
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        if self.count > 1:
            backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            with reading("RANK, WORLD_SIZE, MASTER_ADDR or MASTER_PORT in the environment", "as torchrun sets it"):
                dist.init_process_group(backends, timeout=timedelta(hours=2))   # the others wait while rank 0 saves
        if not self.is_main:
            sys.stdout = open(os.devnull, "w")

    def is_orphan(self):
        """Whether the torchrun that started this process has ended, as by SIGKILL or SIGUSR1."""
        return self.torchrun not in (None, os.getppid())

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
        again, self.received = self.received, True      # first, since Python drops what is raised in a hook of fork
        if not self.deferred or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        with contextlib.suppress(RuntimeError):         # the signal came while the loop was printing
            print(f"\n{signal.Signals(number).name}: the run saves after this step and stops", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def read_ahead(loader):
    """Yields a DataLoader's batches. A worker that was killed is an OSError here, where the next batch is due; torch's
    handler of SIGCHLD would raise anywhere, as in the middle of a step. At the end all workers are killed: they ignore
    SIGTERM, by which torch and multiprocessing end them, and would be waited for."""
    others = multiprocessing.active_children()
    batches = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        of_an_item = "in DataLoader worker process" in str(error)       # the data set raised it, torch passes it on
        if of_an_item or (isinstance(error, RuntimeError) and not WORKER_LOST.search(str(error))):
            raise
        reason = str(error).strip().split("\n")[-1]
        raise OSError("a process that reads pictures ahead was killed, or had too little shared memory: try fewer, as "
                      f"by --workers 0; in Docker also --shm-size 8g ({reason})") from error
    finally:
        del batches
        for process in workers:
            process.kill()


def ignore_interrupts(worker):
    """For DataLoader workers: signals to the whole process group reach them too, but they are needed until the step is
    done."""
    for number in StopSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
