"""What the tests of the scripts share: a small random model, calls of main() in this process, and photographs."""
import contextlib
import io
import json
import re
import shlex
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from model import TINY, StableDiffusion
from support import load, pairs, run
from support.checkpoint import save_checkpoint
from support.files import cli, open_tensors

SHORT = "--steps 4 --batch 2 --grad-accum 1 --lr 1e-3 --validation 2 --previews 2 --scenes 8 --size 32 "
SHORT += "--device cpu --precision fp32 "                # the same on every machine
FEW = "--steps 2 --size 32 --device cpu --precision fp32 "


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The file of a random model, narrower than the bundled priors. No layer is zero, so its output depends on the
    prompt."""
    torch.manual_seed(0)
    sd = StableDiffusion(replace(TINY, unet_widths=(32, 64), vae_widths=(32, 32, 32)), "v")
    for parameter in sd.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_checkpoint(sd, path, torch.float16, resolution="64")
    return path


@contextlib.contextmanager
def working_in(folder, tiny):
    """Inside `with`, commands run in `folder`, and `tiny` is the bundled prior."""
    with pytest.MonkeyPatch.context() as patch:
        for module in load, pairs, run, sample, train:          # each has imported the name
            patch.setattr(module, "BUNDLED_PRIOR", tiny)
        patch.chdir(folder)
        yield


@pytest.fixture
def at_work(tiny, tmp_path):
    """The test runs in an empty folder of its own."""
    with working_in(tmp_path, tiny):
        yield


def call(module, words, stderr=io.StringIO):
    """Run a script's main() with these command-line arguments -> exit code, stdout, stderr. stderr(): the stream."""
    out, err, code = io.StringIO(), stderr(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *shlex.split(words)])
        try:
            cli(module.main)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue() if err else "")


def works(module, words):
    """-> stdout of a command that must succeed."""
    result = call(module, words)
    assert result.code == 0, result.err
    return result.out


def refusal(module, words):
    """-> the error line of a command that must fail."""
    result = call(module, words)
    line = result.err.splitlines()[-1]                  # progress bars and warnings may come before it
    assert result.code == 2 and line.startswith("error: ") and "Traceback" not in result.err, result.err
    return line


def trained_captions(words):
    """Train for text-to-image -> stdout, and the captions of all training batches before any is dropped."""
    seen, plain = [], train.text_to_image

    def spied(sd, batch, caption_dropout=None):         # None: validation
        seen.extend(batch["caption"] if caption_dropout is not None else [])
        return plain(sd, batch, caption_dropout or 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.EXAMPLES, "text-to-image", spied)
        return works(train, words), seen


def python_blocks(page):
    """-> the pieces of Python on a page such as docs/method.md, in their order."""
    text = (Path(train.__file__).parent / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def metadata(path):
    with open_tensors(path) as file:
        return file.metadata()


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def same(a, b):
    """Whether two .safetensors files have the same tensors, bit for bit."""
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_photo(path, height=48, width=64, seed=0):
    """Write a smooth random picture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.BICUBIC).save(path)


def save_photos(folder):
    """Write three photographs, two with .txt captions, one with a caption in metadata.jsonl."""
    for i, (name, caption) in enumerate({"boat": "a red boat", "tree": "a tall tree", "roof": None}.items()):
        save_photo(f"{folder}/{name}.jpg", 90, 120, seed=i)
        if caption:
            Path(f"{folder}/{name}.txt").write_text(caption)
    Path(f"{folder}/metadata.jsonl").write_text('{"file_name": "roof.jpg", "text": "a roof"}\n')


def save_tar(path, contents):
    """Write a tar of {name: bytes}."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def picture_bytes(number, kind="PNG"):
    """-> the bytes of a grey picture whose pixels are 2 times its number."""
    content = io.BytesIO()
    Image.new("RGB", (12, 8), (2 * number,) * 3).save(content, kind)
    return content.getvalue()


def save_shards(folder, tars=5, pictures=4):
    """Write 00000.tar, ... like img2dataset: each has some pictures, with a caption in .txt and metadata in .json."""
    for i in range(tars):
        contents = {}
        for number in range(pictures * i, pictures * (i + 1)):
            caption = f"picture {number}"
            contents |= {f"{number:09d}.png": picture_bytes(number), f"{number:09d}.txt": caption.encode(),
                         f"{number:09d}.json": json.dumps({"caption": "not this", "key": number}).encode()}
        save_tar(f"{folder}/{i:05d}.tar", contents)
