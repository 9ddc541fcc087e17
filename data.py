"""Pictures with captions, and the order in which a run uses them.

An item is a dict: image, uint8 (3, H, W), caption, and for SDXL the sizes of its crop. A key is epoch * n + i: `Keys`
makes a new permutation for every epoch, and a picture's random crop depends on its key.
"""
import copy
import hashlib
import math
import os
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

from support.decode import open_rgb, upright_size
from support.folders import captioned_pictures, progress, read_caption

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


class BucketKeys(Keys):
    """Keys in batches of one shape, as ((height, width), key). shapes: that of each item.

    An epoch permutes the items, groups them by shape into batches, and permutes those. The last batch of a shape is
    filled up with its first items again, in other crops. So the number of batches in an epoch is always the same.
    """

    def __init__(self, shapes, seed, start, stop, batch=1, rank=0, ranks=1):
        super().__init__(len(shapes), seed, start, stop, batch, rank, ranks)
        self.shapes = shapes

    def batches(self, epoch):
        """-> the batches of an epoch, in their order."""
        rng, items, batches = np.random.default_rng((self.seed, epoch)), {}, []
        for i in rng.permutation(self.n).tolist():
            items.setdefault(self.shapes[i], []).append(i)
        for shape, group in items.items():
            for start in range(0, len(group), self.batch):
                turns = [divmod(number, len(group)) for number in range(start, start + self.batch)]
                batches.append([(shape, (epoch + (turn << 32)) * self.n + group[i]) for turn, i in turns])
        return [batches[i] for i in rng.permutation(len(batches))]

    def __iter__(self):
        batches, batches_epoch, count = None, None, sum(-(-n // self.batch) for n in Counter(self.shapes).values())
        for start in self.starts:
            epoch, number = divmod(start // self.batch, count)
            if epoch != batches_epoch:
                batches, batches_epoch = self.batches(epoch), epoch
            yield from batches[number]


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


# ------------------------------------------------------------------ pictures

def hash_of_name(name):
    """-> hash (str) of a file's name, by which held-out pictures are chosen: it depends on no other file."""
    return hashlib.sha256(name.replace(os.sep, "/").encode(errors="surrogateescape")).hexdigest()


class Size(NamedTuple):
    """Of a picture, in pixels."""
    width: int
    height: int


def crop_box(image, height, width, right, down):
    """The largest crop of `image` (or of its Size) with the aspect ratio of height x width -> (left, top, right,
    bottom) in pixels.

    right, down: the crop's position, from 0 (left, top) to 1 (right, bottom).
    """
    scale = min(image.width / width, image.height / height)
    width, height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = right * (image.width - width), down * (image.height - height)
    return left, top, left + width, top + height


def shapes_around(height, width, multiple):
    """-> (height, width) in multiples of `multiple` pixels, with at most that area and sides of at most 2 : 1."""
    heights, area = range(multiple, math.isqrt(2 * height * width) + 1, multiple), height * width
    shapes = {(side, area // side // multiple * multiple) for side in heights} | {(height, width)}
    return sorted(shape for shape in shapes if max(shape) <= 2 * min(shape) or shape == (height, width))


def to_pixels(image):
    """PIL image or uint8 (H, W, 3) -> uint8 (3, H, W)"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_floats(pixels):
    """uint8 pixels -> [-1, 1]; the floats of scenes stay as they are."""
    return pixels / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels


def to_tensor(image):
    """PIL image or uint8 (H, W, 3) -> (3, H, W) in [-1, 1]"""
    return to_floats(to_pixels(image))


def centre_crop(image, height, width):
    """PIL image -> its centre crop, scaled to height x width: uint8 (3, H, W)."""
    return to_pixels(image.resize((width, height), Image.LANCZOS, box=crop_box(image, height, width, 0.5, 0.5)))


def crop_sizes(image, box, height, width, is_mirrored=False):
    """-> the six sizes that condition SDXL: height and width of the picture; top and left of its crop, in pixels after
    scaling; height and width of the crop. A mirrored picture is mirrored before its crop."""
    scale, (left, top, right, _) = width / (box[2] - box[0]), box
    left = image.width - right if is_mirrored else left
    return torch.tensor([image.height, image.width, round(top * scale), round(left * scale), height, width])


def random_crop(image, height, width, rng):
    """PIL image -> a random crop, scaled to height x width and flipped half of the time: uint8 (3, H, W), and its
    crop_sizes."""
    box = crop_box(image, height, width, rng.random(), rng.random())
    crop, is_mirrored = image.resize((width, height), Image.LANCZOS, box=box), rng.random() < 0.5
    return (to_pixels(ImageOps.mirror(crop) if is_mirrored else crop),
            crop_sizes(image, box, height, width, is_mirrored))


# ------------------------------------------------------------------ folders of pictures with captions

class ImageFolder(Dataset):
    """Pictures under `folder` with their captions: image, uint8 (3, H, W); caption; sizes (6,), as crop_sizes.
    support/folders.py says where captions are found, and which files are left out; `default` is the caption of pictures
    without one.

    Pictures are cropped and flipped at random by (seed, key). A key of BucketKeys has the height and width with it.
    """

    def __init__(self, folder, height, width, seed=0, default=""):
        folder = Path(os.path.normpath(folder))
        if not folder.is_dir():
            raise ValueError(f"{folder} is {'a file' if folder.exists() else 'missing'}: pass a folder of images")
        self.folder, self.height, self.width, self.seed, self.default = folder, height, width, seed, default
        self.items, self.undecodable, self.illegible = captioned_pictures(folder, default), set(), set()   # paths

    @property
    def words(self):
        return f"{len(self):,} pictures in {self.folder}"

    def hold_out(self, n):
        """Take min(n, a tenth) of the pictures out, chosen by a hash of their names -> n items of them, and words for
        what they are. With fewer than ten pictures nothing is held out: the items are of training pictures."""
        held_out, words = copy.copy(self), "training pictures, too few to hold any out"
        held_out.seed = 0                               # the same crops in every run
        by_hash = sorted(range(len(self)), key=lambda i: hash_of_name(os.path.relpath(self.items[i][0], self.folder)))
        chosen = list(islice((i for i in by_hash if self.decode(i) is not None), min(n, len(self) // 10)))
        if chosen:
            held_out.items, words = [self.items[i] for i in chosen], f"{len(chosen)} held-out pictures"
            self.items = [item for i, item in enumerate(self.items) if i not in chosen]
        return [held_out[i] for i in range(n)], words

    def shapes(self, multiple):
        """-> (height, width) for each picture, of those in shapes_around that with the nearest aspect ratio."""
        shapes, found = shapes_around(self.height, self.width, multiple), []
        for path, *_ in progress(self.items, "reading the sizes of images", unit="image"):
            try:
                width, height = upright_size(path)
            except ValueError:                          # it is left out with a warning when it is decoded
                width, height = self.width, self.height
            found.append(min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] * height / width))))
        return found

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        (height, width), key = key if isinstance(key, tuple) else ((self.height, self.width), key)
        i, rng = key % len(self.items), np.random.default_rng((self.seed, key))
        while self.items[i][0] in self.undecodable or (image := self.decode(i)) is None:
            if len(self.undecodable) == len(self.items):
                raise ValueError(f"none of the {len(self.items)} images can be decoded, last {self.items[i][0]}")
            i = (i + 1) % len(self.items)
        image, sizes = random_crop(image, height, width, rng)
        return {"image": image, "caption": self.caption(i), "sizes": sizes}

    def caption(self, i):
        """The caption of item i. For a text file that cannot be read: the default, with one warning."""
        _, text, caption = self.items[i]
        try:
            return (text and read_caption(text)) or caption or self.default
        except ValueError as error:
            if text not in self.illegible:
                print(f"warning: {error}; until then its caption is {self.default!r}", file=sys.stderr)
            self.illegible.add(text)
            return self.default

    def decode(self, i):
        """-> RGB image. For a file that is damaged behind its header: None, with one warning."""
        path = self.items[i][0]
        try:
            return open_rgb(path)
        except ValueError as error:
            if path not in self.undecodable:
                self.undecodable.add(path)
                print(f"warning: {error}, skipped; {len(self.undecodable)} of {len(self.items)} so far",
                      file=sys.stderr)
