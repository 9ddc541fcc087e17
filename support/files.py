"""Atomic writes, and user errors as one line instead of a traceback.

    with replacing("grid.png") as temporary:            written to a temporary name, then os.replace
        picture.save(temporary)
    with open_tensors("lora.safetensors") as file:      ValueError for a damaged file
        tensor = file.get_tensor(name)
    check_replaceable("grid.png")                       ValueError for a file that another program wrote
    with reading("a.jpg", "a picture"):                 any error inside becomes a ValueError that names the file
        ...
"""
import contextlib
import json
import os
import re
import secrets
import sys
from pathlib import Path

from PIL import ExifTags, Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SOFTWARE = "Diff2Flow"      # the maker that our pictures and results name in their metadata
NO_MEMORY = re.compile("out of memory|allocate memory|not enough memory|Unable to allocate|_ALLOC_FAILED")


class Stream:
    """A text stream that ignores that its reader has gone: a closed terminal, or a pipe into a program that ended."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def cli(main):
    """Run main(). A user's error becomes one line and exit code 2, Ctrl-C one line and 130. Bugs keep their
    traceback."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = re.split(r"\n[\w.]+Error: ", str(error))[-1]     # a DataLoader worker's error contains its traceback
        if isinstance(error, MemoryError) or NO_MEMORY.search(message):     # torch has no error of its own on a CPU
            message = f"out of memory: lower --batch or --size; train.py takes --checkpointing too ({message})"
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


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path to write to, which replaces `path` at the end, after fsync. On an error it is deleted.
    The name is random, since several processes may write the same file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.partial.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        with Image.open(path) as picture:
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
        temporary.chmod(0o644)  # safetensors makes it readable by its owner alone


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
