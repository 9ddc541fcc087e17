"""Pictures with captions, and the order in which a run uses them.

An item is a dict: image (3, H, W) in [-1, 1] and caption. A key is epoch * n + i: `Keys` makes a new permutation for
every epoch, and a picture's random crop depends on its key.
"""
import copy
import hashlib
import io
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from support.files import from_json, read_text

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


# ------------------------------------------------------------------ the order of the items

def noises(numbers, shape, seed):
    """The noise of pictures `numbers` -> (len(numbers), *shape). Picture i's noise depends on (seed, i) alone."""
    return torch.stack([torch.from_numpy(np.random.default_rng((seed, i)).standard_normal(shape, dtype=np.float32))
                        for i in numbers])


class Keys(Sampler):
    """The keys at positions start to stop of an endless shuffled data set of n items, in whole batches. Process `rank`
    of `ranks` takes every ranks-th batch.

    A key depends on (seed, position) alone: a resumed run starts at a later position, and several processes together
    take the same keys as one.
    """

    def __init__(self, n, seed, start, stop, batch=1, rank=0, ranks=1):
        self.n, self.seed, self.batch = n, seed, batch
        self.starts = range(start + rank * batch, stop, ranks * batch)

    def __len__(self):
        return len(self.starts) * self.batch

    def __iter__(self):
        order, order_epoch = None, None
        for start in self.starts:
            for position in range(start, start + self.batch):
                epoch, i = divmod(position, self.n)
                if epoch != order_epoch:
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.n).tolist()
                    order_epoch = epoch
                yield epoch * self.n + order[i]


class Memoised(Dataset):
    """prepare(item) for each item of a data set, computed when it is first used and kept in memory.

    For procedural scenes, which are the same in every epoch: their latents are computed once.
    """

    def __init__(self, dataset, prepare):
        self.dataset, self.prepare, self.prepared = dataset, prepare, {}

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        i = key % len(self.dataset)
        if i not in self.prepared:
            self.prepared[i] = self.prepare(self.dataset[i])
        return self.prepared[i]


# ------------------------------------------------------------------ lists of files

def progress(items, title, **options):
    """tqdm for what may take more than a second; the bar disappears at the end."""
    return tqdm(items, title, leave=False, dynamic_ncols=True, delay=1, **options)


def files_in(folder):
    """-> the paths (str) of all files under `folder`, sorted as Paths are, without half-written *.partial.* files."""
    found = []
    with progress(None, f"listing {folder}", unit="file") as bar:
        for parent, _, names in os.walk(folder):        # no system call per file: half a second for 100,000 files
            found += [os.path.join(parent, name) for name in names if ".partial." not in name]
            bar.update(len(names))
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))       # \0 sorts before every other character


def hash_of_name(name):
    """-> hash (str) of a file's name, by which held-out pictures are chosen: it depends on no other file."""
    return hashlib.sha256(name.replace(os.sep, "/").encode(errors="surrogateescape")).hexdigest()


# ------------------------------------------------------------------ pictures

def open_rgb(path, content=None):
    """-> PIL image in RGB, upright, transparency on white. content: the file's bytes, if it is in a tar. ValueError for
    a damaged file."""
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):                  # 16-bit grey: convert() would clip at 255
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:                          # Pillow's readers raise nearly everything on broken files
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error


def is_picture(path):
    """Cheap check of the first bytes; asks Pillow, which takes ten times as long, only if they are unusual."""
    try:
        with open(path, "rb", buffering=0) as file:
            if file.read(4).startswith((b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM")):      # RIFF: .webp
                return True
        with Image.open(path) as image:
            image.verify()
        return True
    except Exception:                                   # Pillow's readers raise nearly everything on broken files
        return False


def pictures_in(folder):
    """-> the paths of the pictures under `folder`, sorted."""
    return [Path(path) for path in files_in(folder) if path.lower().endswith(SUFFIXES)]


def crop_box(image, height, width, right, down):
    """The largest crop of `image` with the aspect ratio of height x width -> (left, top, right, bottom) in pixels.

    right, down: the crop's position, from 0 (left, top) to 1 (right, bottom).
    """
    scale = min(image.width / width, image.height / height)
    width, height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = right * (image.width - width), down * (image.height - height)
    return left, top, left + width, top + height


def to_tensor(image):
    """PIL image or uint8 (H, W, 3) -> (3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def centre_crop(image, height, width):
    """PIL image -> its centre crop, scaled to height x width (3, H, W)."""
    return to_tensor(image.resize((width, height), Image.LANCZOS, box=crop_box(image, height, width, 0.5, 0.5)))


def random_crop(image, height, width, rng):
    """PIL image -> a random crop, scaled to height x width and flipped half of the time (3, H, W)."""
    box = crop_box(image, height, width, rng.random(), rng.random())
    image = image.resize((width, height), Image.LANCZOS, box=box)
    return to_tensor(ImageOps.mirror(image) if rng.random() < 0.5 else image)


# ------------------------------------------------------------------ folders of pictures with captions

def read_metadata(path):
    """metadata.jsonl: lines {"file_name": path relative to it, "text": caption} -> {image path: caption}, strings."""
    captions, wanted = {}, '{"file_name": "...", "text": "..."}'
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                entry = from_json(line)
                captions[os.path.normpath(path.parent / entry["file_name"])] = entry["text"].strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}, line {number}: {line[:80]!r} is not {wanted}") from None
    return captions


class ImageFolder(Dataset):
    """Pictures under `folder` with their captions: image (3, H, W) in [-1, 1], caption.

    A caption is NAME.txt beside NAME.jpg, else the picture's line in metadata.jsonl, else "". Pictures are cropped and
    flipped at random by (seed, key). Opening reads the first bytes of each picture and no NAME.txt.
    """

    def __init__(self, folder, height, width, seed=0):
        folder = Path(os.path.normpath(folder))
        if not folder.is_dir():
            raise ValueError(f"{folder} is {'a file' if folder.exists() else 'missing'}: pass a folder of images")
        self.folder, self.height, self.width, self.seed = folder, height, width, seed
        self.items, self.undecodable, self.illegible = [], set(), set()     # the last two: indices into items
        unreadable, metadata, files = [], {}, files_in(folder)
        texts = {path for path in files if path.endswith(".txt")}
        for path in files:
            if os.path.basename(path) == "metadata.jsonl":
                metadata |= read_metadata(Path(path))
        paths = [path for path in files if path.lower().endswith(SUFFIXES)]
        for path in progress(paths, "reading the first bytes of images", unit="image"):
            if not is_picture(path):
                unreadable.append(path)
                continue
            text = os.path.splitext(path)[0] + ".txt"
            self.items.append((path, text if text in texts else None, metadata.get(path, "")))
        if not self.items:
            tars = any(path.endswith(".tar") for path in files)
            raise ValueError(f"{folder} has no readable image ({len(unreadable)} unreadable): pass a folder with "
                             f"{' '.join(SUFFIXES)} files{', or its tars: ' + str(folder / '*.tar') if tars else ''}")
        uncaptioned = [path for path, text, caption in self.items if text is None and not caption]
        for paths, what in (unreadable, "unreadable and skipped"), (uncaptioned, "without a caption"):
            if paths:
                print(f"warning: {len(paths)} of {len(self.items) + len(unreadable)} images {what}, first {paths[0]}",
                      file=sys.stderr)

    @property
    def words(self):
        return f"{len(self):,} pictures in {self.folder}"

    def hold_out(self, n):
        """Take min(n, a tenth) of the pictures out, chosen by a hash of their names -> n items of them, and words for
        what they are. With fewer than ten pictures nothing is held out: the items are of training pictures."""
        held_out, words = copy.copy(self), "training pictures, too few to hold any out"
        held_out.seed = 0                               # the same crops in every run
        by_hash = sorted(self.items, key=lambda item: hash_of_name(os.path.relpath(item[0], self.folder)))
        count = min(n, len(self) // 10)
        if count:
            held_out.items, words = by_hash[:count], f"{count} held-out pictures"
            held_out.undecodable, held_out.illegible = set(), set()
            others = set(by_hash[count:])
            self.items = [item for item in self.items if item in others]
        return [held_out[i] for i in range(n)], words

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        i, rng = key % len(self.items), np.random.default_rng((self.seed, key))
        while i in self.undecodable or (image := self.decode(i)) is None:
            if len(self.undecodable) == len(self.items):
                raise ValueError(f"none of the {len(self.items)} images can be decoded, last {self.items[i][0]}")
            i = (i + 1) % len(self.items)
        return {"image": random_crop(image, self.height, self.width, rng), "caption": self.caption(i)}

    def caption(self, i):
        """The caption of item i. For an unreadable text file: "", with one warning."""
        _, text, caption = self.items[i]
        if text is None:
            return caption
        try:
            return read_text(text).strip()
        except ValueError as error:
            if i not in self.illegible:
                print(f"warning: {error}; until then its caption is empty", file=sys.stderr)
            self.illegible.add(i)
            return ""

    def decode(self, i):
        """-> RGB image. For a file that is damaged behind its header: None, with one warning."""
        try:
            return open_rgb(self.items[i][0])
        except ValueError as error:
            self.undecodable.add(i)
            print(f"warning: {error}, skipped; {len(self.undecodable)} of {len(self.items)} so far",
                  file=sys.stderr)
