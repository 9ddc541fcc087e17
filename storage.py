"""Data as it comes: pictures in tars, and a cache of what the networks make of pictures and captions.

A run on a few thousand pictures needs none of this. `python train.py --data "laion/{00000..00099}.tar"` reads tars, and
`--cache FOLDER` encodes each picture and caption once, for all steps, runs and processes.
"""
import hashlib
import itertools
import os
import random
import sys
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from data import SUFFIXES, Keys, centre_crop, open_rgb, progress, random_crop
from files import from_json, open_tensors, save_tensors
from model import hash_of

# ------------------------------------------------------------------ latents and text states (--cache)

def checksum(tensor):
    return str(zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy()))


class Store(NamedTuple):
    """Tensors of one shape, each in a file below a folder. The file's name is a hash of all that its tensor depends on:
    so what has changed is not found and made anew, and several runs share what is the same."""
    folder: Path
    network: str        # words that tell the network, its precision and its setting
    shape: tuple

    def path(self, source):
        """source: words that tell what the network was given."""
        name = hashlib.sha256(f"{self.network}\n{source}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"       # 256 folders: a million files are slow in one

    def write(self, source, tensor):
        save_tensors(self.path(source), {"tensor": tensor}, {"checksum": checksum(tensor)})

    def read(self, source):
        path = self.path(source)
        try:
            with open_tensors(path) as file:
                tensor, told = file.get_tensor("tensor"), (file.metadata() or {}).get("checksum")
            if tuple(tensor.shape) != self.shape or checksum(tensor) != told:
                raise ValueError(f"{path}: a tensor of {tuple(tensor.shape)}, where {self.shape} was written, or with "
                                 "other numbers")
            return tensor
        except ValueError as error:
            raise ValueError(f"{error}; every start of a run with this --cache makes anew what is damaged") from error

    def lacks(self, source):
        """Whether a tensor is not there, or is damaged, which is said."""
        if not self.path(source).exists():
            return True
        try:
            self.read(source)
            return False
        except ValueError as error:
            print(f"warning: {error}", file=sys.stderr)
            return True


class Cached(Dataset):
    """An ImageFolder whose pictures and captions went through the networks before, and lie in two Stores: x1, the
    latents of a picture's centre, never flipped; its caption; and context, the text state of it, and empty, that of the
    empty caption. `fill` comes first."""

    def __init__(self, images, latents, states):
        self.images, self.latents, self.states, self.items = images, latents, states, []
        for i in progress(range(len(images)), "reading pictures and captions", unit="image"):
            content = Path(images.items[i][0]).read_bytes()
            self.items.append((hashlib.sha256(content).hexdigest(), images.caption(i)))

    def fill(self, encode, encode_text, ranks):
        """Make what the Stores lack, of it this process's share, and wait for the others. encode: image (3, H, W) ->
        latents, encode_text: caption -> state."""
        pictures = range(ranks.rank, len(self.items), ranks.count)
        pictures = [i for i in progress(pictures, "looking for latents") if self.latents.lacks(self.items[i][0])]
        captions = sorted({"", *(caption for _, caption in self.items)})[ranks.rank::ranks.count]
        captions = [caption for caption in progress(captions, "looking for text states") if self.states.lacks(caption)]
        print(f"{self.latents.folder}: of {len(self.items):,} pictures, cropped in the centre and never flipped, "
              f"{len(pictures):,} are to be encoded, and {len(captions):,} captions"
              + (f", by the first of {ranks.count} processes" if ranks.count > 1 else ""))
        for i in progress(pictures, "encoding pictures", unit="image"):
            image = self.images.decode(i)
            if image is not None:
                self.latents.write(self.items[i][0], encode(centre_crop(image, self.images.height, self.images.width)))
        for caption in progress(captions, "encoding captions", unit="caption"):
            self.states.write(caption, encode_text(caption))
        ranks.wait()
        self.empty = self.states.read("")       # once, not for each item
        self.items = [item for item in self.items if self.latents.path(item[0]).exists()]      # the others are damaged
        if not self.items:
            raise ValueError(f"none of the {len(self.images)} images can be decoded")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        source, caption = self.items[key % len(self.items)]
        return {"x1": self.latents.read(source).float(), "caption": caption, "context": self.states.read(caption),
                "empty": self.empty}


@torch.no_grad()
def fill_cache(folder, sd, images, precision, amp, ranks):
    """-> an ImageFolder's pictures as latents and text states, after those that the cache lacks were computed."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32        # in which a step computes them
    size, made = (images.height, images.width), f"{precision}, version 1"   # to be raised when encoding changes
    latents = Store(Path(folder), f"latents {size} {hash_of(sd.first_stage_model)} {made}",
                    sd.latent_shape(size))
    states = Store(Path(folder), f"text {hash_of(sd.text_encoder)} {made}", (77, sd.config.context_width))

    def encode(image):
        return sd.encode(image[None].to(sd.device))[0].to(dtype)

    def encode_text(caption):
        return sd.encode_text([caption])[0].to(dtype)
    cached = Cached(images, latents, states)
    with amp:
        cached.fill(encode, encode_text, ranks)
    return cached


# ------------------------------------------------------------------ tars of pictures with captions (WebDataset)

def find_tars(patterns):
    """Paths of tars, in which {00000..00099} stands for a hundred -> the paths, each of a whole tar."""
    try:
        import webdataset  # noqa: F401  Tars needs it
        from braceexpand import braceexpand
        tars = [path for pattern in patterns for path in braceexpand(pattern)]
    except ImportError:
        raise ValueError(f"{patterns[0]}: reading tars takes webdataset: pip install webdataset") from None
    except ValueError as error:         # unbalanced braces
        raise ValueError(f"{error}; tars are given as 'FOLDER/{{00000..00099}}.tar'") from None
    for path in progress(tars, "looking at both ends of tars", unit="tar"):
        check_tar(path)
    return tars


def check_tar(path):
    """ValueError for a tar that is not there, is empty, or was cut off: a whole one ends with 1024 zeros."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; tars are given as 'FOLDER/{{00000..00099}}.tar'")
    with open(path, "rb") as file:
        has_content = any(file.read(512))
        file.seek(-min(1024, os.path.getsize(path)), os.SEEK_END)
        if not has_content or any(file.read()):
            raise ValueError(f"{path}: empty, truncated, or no tar: fetch it again, or leave it out")


def read_sample(sample):
    """{suffix: bytes} of what has one name in a tar -> RGB image, and the caption of .txt, else of .json, else ""."""
    suffix = next((suffix for suffix in SUFFIXES if suffix[1:] in sample), None)
    if suffix is None:
        raise ValueError("no picture")
    image = open_rgb(sample["__key__"] + suffix, sample[suffix[1:]])
    if "txt" in sample:
        return image, sample["txt"].decode().strip()
    return image, str(from_json(sample.get("json", "{}")).get("caption") or "").strip()


class Tars(IterableDataset):
    """Pictures in tars, KEY.jpg with KEY.txt or with a "caption" in KEY.json, as img2dataset writes them: items like
    those of ImageFolder. Nothing else in the tars is opened.

    A pass takes the tars in an order of its own. They are dealt out to the processes and their DataLoaders' workers,
    and each mixes the pictures of its tars. The order is a function of the seed, the step `start` at which the run
    begins, and the numbers of processes and workers.
    """
    MIXED = 500     # pictures, as they are in the tars, among which the next one is chosen

    def __init__(self, patterns, height, width, seed=0, rank=0, ranks=1):
        self.tars, self.height, self.width, self.seed = find_tars(patterns), height, width, seed
        self.start, self.rank, self.ranks, self.left_out = 0, rank, ranks, set()
        if len(self.tars) < ranks:
            raise ValueError(f"{patterns[0]}: {len(self.tars)} tars for {ranks} processes: each needs one of its own")

    def first(self, n):
        """-> the first n pictures that can be read, for validation. ValueError if there is none."""
        samples = (sample for tar in self.tars for sample in self.samples(tar))
        items = list(itertools.islice(self.items(samples, random.Random(self.seed)), n))
        if not items:
            raise ValueError(f"{self.tars[0]}: no picture in {len(self.tars)} tars: they hold KEY.jpg with KEY.txt, or "
                             "with KEY.json, in which there is a caption")
        uncaptioned = [item for item in items if not item["caption"]]
        if uncaptioned:
            print(f"warning: {len(uncaptioned)} of the first {len(items)} pictures in {self.tars[0]} are without a "
                  "caption", file=sys.stderr)
        return items

    def __iter__(self):
        from webdataset import shuffle
        worker, n = get_worker_info(), len(self.tars)
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.rank * workers + number, self.ranks * workers
        rng = random.Random(f"{self.seed} {self.start} {reader}")
        keys = Keys(n, self.seed, self.start * n, sys.maxsize, 1, reader, readers)
        for _, keys_of_pass in itertools.groupby(keys, lambda key: key // n):
            samples = (sample for key in keys_of_pass for sample in self.samples(self.tars[key % n]))
            yield from self.items(shuffle(self.MIXED, rng=rng)(samples), rng)

    def samples(self, tar):
        """Yield {suffix: bytes} of each name in a tar, and no bytes but those of pictures and captions."""
        from webdataset import tarfile_samples
        try:
            yield from tarfile_samples([{"url": tar}], select_files=lambda name: name.lower().endswith(
                (*SUFFIXES, ".txt", ".json")))
        except (tarfile.TarError, ValueError):
            self.leave_out(tar, "damaged, and the rest of it")

    def items(self, samples, rng):
        for sample in samples:
            try:
                image, caption = read_sample(sample)
            except (ValueError, AttributeError) as error:       # AttributeError: a .json that is no {"caption": ...}
                self.leave_out(f"{sample['__url__']}, {sample['__key__']}", f"{error},")
                continue
            yield {"image": random_crop(image, self.height, self.width, rng), "caption": caption}

    def leave_out(self, what, why):
        """Say once what is left out."""
        if what not in self.left_out:
            print(f"warning: {what}: {why} is left out", file=sys.stderr)
        self.left_out.add(what)
