"""Locks of folders: no two runs write into the same one, and no half-written file is deleted that is being written.

A lock ends with its process, however that ends. A file system without locks is a warning; Windows has none.
"""
import contextlib
import os
import socket

from support.files import UNSUPPORTED, remove_partial, warn_once

try:
    import fcntl
except ImportError:     # Windows: no lock, two runs in one folder are not noticed
    fcntl = None

NAME = ".diff2flow.lock"


@contextlib.contextmanager
def lock_file(folder):
    """Yields the open lock file of `folder`. ValueError for a link, which could lead to any other file."""
    path = folder / NAME
    if path.is_symlink() or (path.exists() and path.stat().st_nlink > 1):
        raise ValueError(f"{path} is a link, which is not followed: delete it")
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written to ({error}): choose another --out, with --resume too") from error
    with open(number, "r+") as file:
        os.register_at_fork(after_in_child=file.close)      # DataLoader workers may live longer than a killed run
        yield file


def take(file, folder, kind):
    """Lock an open file -> False if another process holds it. True on a file system without locks, with a warning."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"the file system of {folder} has no locks ({error.strerror}): start no second run there")
    return True


@contextlib.contextmanager
def owned(folder, *patterns):
    """Inside `with`, no other process runs in `folder`: ValueError that names the process which does. Removes the
    half-written files, named by the patterns, of killed processes."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        remove_partial(folder, *patterns)
        yield
        return
    with lock_file(folder) as lock:
        if not take(lock, folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise ValueError(f"{folder}: process {lock.read()} runs there: wait, or choose another --out")
        if os.fstat(lock.fileno()).st_nlink == 0:               # its owner has just removed it
            raise ValueError(f"{folder}: another process has just ended there: try again")
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        remove_partial(folder, *patterns)
        try:
            yield
        finally:
            (folder / NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def shared(folder, *patterns):
    """Inside `with`, several processes may write to `folder` and its subfolders. The first one removes the half-written
    files, named by the patterns, of killed processes."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or not os.access(folder, os.W_OK):
        yield
        return
    with lock_file(folder) as lock:
        if take(lock, folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for parent in (folder, *(path for path in folder.iterdir() if path.is_dir())):
                remove_partial(parent, *patterns)
        take(lock, folder, fcntl.LOCK_SH)
        yield
