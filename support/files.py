"""Atomic writes, and user errors as one line instead of a traceback.

    with replacing("grid.png") as temporary:            written to a temporary name, then os.replace
        picture.save(temporary)
    with open_tensors("lora.safetensors") as file:      ValueError for a damaged file
        tensor = file.get_tensor(name)
    check_replaceable("grid.png")                       ValueError for a file that another program wrote
    with reading("a.jpg", "a picture"):                 any error inside becomes a ValueError that names the file
        ...
    args = parse(parser)                                parser.parse_args(), which refuses empty values
    try_writing("pairs.safetensors", 10**9)             an error now, not later, where so much cannot be written
"""
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import sys
from pathlib import Path

from PIL import ExifTags, Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SOFTWARE = "Diff2Flow"      # the maker that our pictures and results name in their metadata
PARTIAL = re.compile(r"\.partial\.[0-9a-f]{8}(?=\.|$)")        # in the names of half-written files of ours
UNSUPPORTED = {getattr(errno, name) for name in ("EPERM", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL", "ENOLCK")}
MAY_BE_EMPTY = "prompt", "negative", "caption"                  # flags whose value may be ""
IN_METADATA = "out", "resume", "ckpt", "lora", "init_lora"      # flags whose value gets into files, which are UTF-8
WRITTEN = ("PNG", "JPEG", "WEBP")   # formats of our pictures; no other program's is opened: some run other programs
NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory|Unable to allocate|_ALLOC_FAILED")


class Stream:
    """A text stream that ignores that its reader has gone: a closed terminal, or a pipe into a program that ended. What
    its encoding lacks is written as \\xNN or \\uNNNN: names that are no UTF-8, or any but ASCII where the output is."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                self.stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def cli(main):
    """Run main(). A user's error becomes one line and exit code 2, Ctrl-C one line and 130. Bugs keep their
    traceback."""
    for number in range(3):         # a closed stream's number would go to the next file, and its messages into that
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (Stream(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = re.split(r"\n[\w.]+Error: ", str(error))[-1]     # a DataLoader worker's error contains its traceback
        if isinstance(error, MemoryError) or NO_MEMORY.search(message):     # torch has no error of its own on a CPU
            message = f"out of memory: lower --batch or --size; train.py takes --checkpointing too ({message})"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = f"torch.compile failed, perhaps for want of a compiler: leave --compile out ({message[:200]})"
        elif isinstance(error, RuntimeError):
            raise                                                   # a bug
        message = " ".join(message.split())
        print("error:", message if len(message) < 1500 else f"{message[:1000]} ... {message[-400:]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def check_range(args, low, high, *names):
    """ValueError if a number in args.NAME (a number, a list, or None) is NaN or outside low .. high."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number <= high:
                given = str(number).removesuffix(".0")
                raise ValueError(f"--{name.replace('_', '-')} {given}: it must be between {low:g} and {high:g}")


def parse(parser):
    """parser.parse_args(). ValueError for a flag whose value is empty, as of an unset variable of a shell, or no UTF-8
    where it gets into a file's metadata."""
    for word in sys.argv[1:]:
        if re.fullmatch("--[a-z][a-z-]*=--", word):         # argparse takes the value away
            raise ValueError(f"{word}: -- is not a value")
    args = parser.parse_args()
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if not any(word.startswith(flag) for word in sys.argv[1:]):
            flag = name                                     # of arguments without a flag
        for text in value if isinstance(value, list) else [value]:
            if text == "" and name not in MAY_BE_EMPTY:
                raise ValueError(f"{flag} '': the value is empty: give one, or leave it out")
            if name in IN_METADATA and isinstance(text, str) and text != text.encode(errors="replace").decode():
                raise ValueError(f"{flag} {ascii(text)}: the name is not UTF-8, and so cannot be written to metadata: "
                                 "rename it")
    return args


def partial_name(path):
    """-> a random name for a file that is being written. Several processes may write the same file."""
    path = Path(path)
    return path.with_name(f"{path.stem}.partial.{secrets.token_hex(4)}{path.suffix}")


def remove_partial(folder, *patterns):
    """Delete the half-written files of killed processes in a folder: those of names that match one of the patterns."""
    for path in sorted(Path(folder).glob("*.partial.*")):
        whole = PARTIAL.sub("", path.name)
        if whole != path.name and any(Path(whole).match(pattern) for pattern in patterns):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def where_supported(path, what):
    """Inside `with`, an operation that the file system of `path` does not have is a warning, once."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"the file system of {Path(path).parent} does not support {what} ({error.strerror}): it is left out")


WARNED = set()


def warn_once(text):
    if text not in WARNED:
        print(f"warning: {text}", file=sys.stderr)
    WARNED.add(text)


def replace(temporary, path):
    """os.replace, also where a file system cannot rename over an existing file."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in {*UNSUPPORTED, errno.EEXIST} or not os.path.lexists(path):
            raise
        old = partial_name(path)
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
        old.unlink()
        warn_once(f"the file system of {path.parent} cannot replace a file in one step ({error.strerror}): a process "
                  "that is killed at that moment loses the file")


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path to write to, which replaces `path` at the end, after fsync. On an error it is deleted.
    A link at `path` is replaced, not followed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_name(path)
    try:
        yield temporary
        with where_supported(path, "fsync"), open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def try_writing(path, size, copies=1):
    """OSError if `copies` files of `size` bytes cannot be written beside `path`: writes one of zeros and deletes it."""
    path = Path(path)
    trial = partial_name(path)
    try:
        with replacing(trial) as temporary, open(temporary, "wb") as file:
            for start in range(0, size, 2**24):
                file.write(bytes(min(2**24, size - start)))
        disk = shutil.disk_usage(path.parent)
        if disk.total > 0 and disk.free < size * (copies - 1):          # some file systems report 0 of 0
            raise OSError(errno.ENOSPC, f"{disk.free / 1e9:.1f} GB are left on the disk")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error}); it takes {copies * size / 1e6:,.1f} MB: free some space, "
                      "or choose another folder") from error
    finally:
        trial.unlink(missing_ok=True)


def maker_of(path):
    """-> the program that a picture, .safetensors or .json file names as its maker, or None."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with open_tensors(path) as file:
                return file.metadata()["software"]
        if path.suffix in (".json", ".jsonl"):
            with open(path) as file:
                return json.loads(file.readline())["software"]
        with Image.open(path, formats=WRITTEN) as picture:
            return picture.getexif().get(ExifTags.Base.Software, picture.info.get("Software"))
    except Exception:       # an unreadable file is not ours
        return None


def check_replaceable(path):
    """ValueError if something exists at `path` that we did not write: only our own files are replaced."""
    if os.path.lexists(path) and maker_of(path) != SOFTWARE:
        raise ValueError(f"{path} exists already, and was not written by {SOFTWARE}: move it away, or choose another "
                         "--out")


def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} and metadata {str: str} as a .safetensors file, atomically."""
    with replacing(path) as temporary:
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {}), "software": SOFTWARE})
        except SafetensorError as error:        # a full disk, above all
            raise OSError(f"{path}: could not be written, and is unchanged ({error})") from error
        with where_supported(path, "chmod"):
            temporary.chmod(0o644)      # safetensors makes it readable by its owner alone


@contextlib.contextmanager
def open_tensors(path):
    """An open .safetensors file: .keys(), .get_tensor(name), .get_slice(name), .metadata(). ValueError if damaged."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file" + (" (it is a folder)" if Path(path).is_dir() else ""))
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read; truncated, or not a .safetensors file? ({reason})") from error


@contextlib.contextmanager
def reading(name, kind):
    """Inside `with`, any error becomes a ValueError that names the file or flag and the kind of thing expected: on
    broken bytes, parsers raise nearly everything. A ValueError that names it already passes."""
    try:
        yield
    except Exception as error:
        is_ours = isinstance(error, ValueError) and str(error).startswith(str(name))
        if is_ours or isinstance(error, MemoryError) or "out of memory" in str(error):
            raise
        reason = error if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: not {kind}, or damaged ({reason})") from error


def from_json(text):
    """json.loads, whose RecursionError for deep nesting becomes a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested thousands deep") from None


def read_text(path):
    """-> the text of a UTF-8 file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it again as UTF-8") from None
