"""Pictures with captions, Reflow's pairs, the order in which items come, and pictures in and out.

An item is a dict: image (3, H, W) in [-1, 1] and caption, or, of a pair, noise and latent (z, h, w) and caption.
A key is epoch * n + i. `Keys` makes every epoch a new permutation, and a photograph's crop depends on the key.
"""
import bisect
import io
import json
import math
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from files import SOFTWARE, check_replaceable, from_json, open_tensors, read_text, replacing

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LARGEST_SIDE = {".png": 2**31 - 1, ".jpg": 65500, ".jpeg": 65500, ".webp": 16383}   # in pixels, of what is written here


# ------------------------------------------------------------------ the order of the items

def seed_of(seed, i):
    """The seed of random stream number i: of picture i, of epoch i, of training step i."""
    return seed * 1_000_003 + i


class Keys(Sampler):
    """The keys at positions from start to stop, in a data set of n items, in whole batches, of which the process `rank`
    of `ranks` takes every ranks-th.

    A key is a function of (seed, position) alone, so a resumed run begins at another start, and several processes share
    what one would do.
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
                    generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                    order, order_epoch = torch.randperm(self.n, generator=generator).tolist(), epoch
                yield epoch * self.n + order[i]


class Kept(Dataset):
    """prepare(item) of each item of a data set, made when the item first comes and kept from then on.

    For scenes, which come again and again and are the same each time: their latents are computed once.
    """

    def __init__(self, dataset, prepare):
        self.dataset, self.prepare, self.kept = dataset, prepare, {}

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        i = key % len(self.dataset)
        if i not in self.kept:
            self.kept[i] = self.prepare(self.dataset[i])
        return self.kept[i]


# ------------------------------------------------------------------ lists of files

def progress(items, title, **options):
    """A bar of what takes more than a second, which vanishes when it is full."""
    return tqdm(items, title, leave=False, dynamic_ncols=True, delay=1, **options)


def files_in(folder):
    """-> the paths of all files under `folder` as strings, in the order of Paths: by the names of their parts. Without
    those that a killed writer left half-written."""
    found = []
    with progress(None, f"listing {folder}", unit="file") as bar:
        for parent, _, names in os.walk(folder):        # no call for each file: a hundred thousand take half a second
            found += [os.path.join(parent, name) for name in names if ".partial." not in name]
            bar.update(len(names))
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))       # which is before every other character


# ------------------------------------------------------------------ pictures, in

def open_rgb(path, content=None):
    """-> PIL image in RGB, upright, alpha on white. ValueError for a damaged file. content: its bytes, if it lies
    in a tar."""
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
    """Whether the file begins like one. Pillow, which takes ten times as long, is asked about unusual beginnings alone.
    """
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
    """The largest part of `image` with the shape height x width, `right` and `down` (0 to 1) of the spare way along
    -> (left, top, right, bottom) in pixels."""
    scale = min(image.width / width, image.height / height)
    width, height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = right * (image.width - width), down * (image.height - height)
    return left, top, left + width, top + height


def to_tensor(image):
    """PIL image or uint8 (H, W, 3) -> (3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def centre_crop(image, height, width):
    """PIL image -> the part in its centre, scaled to height x width (3, H, W)."""
    return to_tensor(image.resize((width, height), Image.LANCZOS, box=crop_box(image, height, width, 0.5, 0.5)))


def random_crop(image, height, width, rng):
    """PIL image -> a part of it, scaled to cover height x width, or the mirror image of that part (3, H, W)."""
    box = crop_box(image, height, width, rng.random(), rng.random())
    image = image.resize((width, height), Image.LANCZOS, box=box)
    return to_tensor(ImageOps.mirror(image) if rng.random() < 0.5 else image)


# ------------------------------------------------------------------ folders of pictures with captions

def read_metadata(path):
    """Lines {"file_name": path from the jsonl's own folder, "text": caption} -> {image path: caption}, all strings."""
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
    """Photographs under `folder`, scaled to cover height x width, cropped and flipped at random by (seed, key), where
    key = epoch * n + i: image (3, H, W) in [-1, 1], and a caption from NAME.txt beside the image, else from
    metadata.jsonl, else "". At the beginning only the first bytes of the images are read, and no NAME.txt."""

    def __init__(self, folder, height, width, seed=0):
        folder = Path(os.path.normpath(folder))
        if not folder.is_dir():
            raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}: give a folder of images")
        self.height, self.width, self.seed = height, width, seed
        self.items, self.undecodable, self.illegible = [], set(), set()     # items, and which of them have failed
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
            raise ValueError(f"{folder} has no readable image ({len(unreadable)} unreadable): give a folder with "
                             f"{' '.join(SUFFIXES)} files{', or its tars: ' + str(folder / '*.tar') if tars else ''}")
        uncaptioned = [path for path, text, caption in self.items if text is None and not caption]
        for paths, what in (unreadable, "unreadable and skipped"), (uncaptioned, "without a caption"):
            if paths:
                print(f"warning: {len(paths)} of {len(self.items) + len(unreadable)} images {what}, first {paths[0]}",
                      file=sys.stderr)

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
        """Of a text file that cannot be read, which is found here, hours after the start: empty, with a warning, once.
        """
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
        """-> RGB image, or None with a warning, once, where the file is damaged behind its header."""
        try:
            return open_rgb(self.items[i][0])
        except ValueError as error:
            self.undecodable.add(i)
            print(f"warning: {error}, left out; {len(self.undecodable)} of {len(self.items)} so far",
                  file=sys.stderr)


# ------------------------------------------------------------------ Reflow's pairs

def read_pairs(path, tensors=("noise", "latent")):
    """A file of `sample.py --pairs` -> {"prompts": n strings, "settings": those that made the pairs, and the wanted
    tensors (n, z, h, w) in float16}."""
    try:
        with open_tensors(path) as file:
            metadata = file.metadata()
            prompts, settings = from_json(metadata["prompts"]), from_json(metadata["about"])
            noise, latent = ((part.get_dtype(), part.get_shape()) for part in map(file.get_slice, ("noise", "latent")))
            if noise != latent or noise[0] != "F16" or len(noise[1]) != 4 or noise[1][0] != len(prompts):
                raise ValueError(f"{len(prompts)} prompts for noise {noise} and latents {latent}")
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("a prompt in it is no text")
            height, width = settings["size"]
            if not all(isinstance(number, (int, float)) for number in (height, width, settings["cfg"])):
                raise ValueError("its size or cfg is no number")
            return {"prompts": prompts, "settings": settings} | {name: file.get_tensor(name) for name in tensors}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: truncated, or no pairs of sample.py: delete it, and they are made again "
                         f"({error})") from error


def batch_file(shard, start):
    """Where a batch of pairs is kept until its shard is complete -> pairs-NUMBER.from-START.safetensors."""
    return shard.with_name(f"{shard.stem}.from-{start:05d}.safetensors")


def files_of_shard(shard):
    """The files of a shard (the path pairs-NUMBER.safetensors), whole or in progress, in the order of their pairs
    -> [(path, its first pair's number in the shard, what read_pairs tells without tensors)].

    A batch that the whole file holds too was left by a process that was killed while it joined them: it is not listed.
    """
    files, n, path = [], 0, shard if shard.exists() else batch_file(shard, 0)
    while path.exists():
        about = read_pairs(path, ())
        files.append((path, n, about))
        n += len(about["prompts"])
        path = batch_file(shard, n)
    return files


class Pairs(Dataset):
    """The pairs in a folder: latent and noise (z, h, w), caption. The last `validation` of them are held out: they lie
    behind the end of the data set, for `pair` alone. `settings` are those that made the pairs."""

    def __init__(self, folder, validation):
        self.files, self.starts, self.settings, n = [], [], None, 0
        shards = {path.with_name(path.name.split(".")[0] + ".safetensors")
                  for path in Path(folder).glob("pairs-*.safetensors")}
        if not shards:
            raise ValueError(f"{folder} has no pairs-*.safetensors: sample.py --pairs N --out {folder} makes them")
        for shard in progress(sorted(shards), "opening pairs", unit="file"):
            for path, _, about in files_of_shard(shard):
                if self.settings not in (None, about["settings"]):
                    raise ValueError(f"{path}: its pairs were made with other settings than those of {self.files[0]}")
                self.settings = about["settings"]
                self.files.append(path)
                self.starts.append(n)
                n += len(about["prompts"])
        if n <= validation:
            raise ValueError(f"{folder} has {n} pairs, of which {validation} are held out (--validation): make more")
        self.n = n - validation

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        return self.pair(key % self.n)

    def pair(self, i):
        number = bisect.bisect_right(self.starts, i) - 1
        with open_tensors(self.files[number]) as file:
            row, prompts = i - self.starts[number], json.loads(file.metadata()["prompts"])
            noise, latent = (file.get_slice(name)[row].float() for name in ("noise", "latent"))
            if not (noise.isfinite().all() and latent.isfinite().all()):
                raise ValueError(f"{self.files[number]}: pair {row} holds NaN or infinity: delete the file, and "
                                 "sample.py --pairs makes it again")
            return {"noise": noise, "latent": latent, "caption": prompts[row]}


# ------------------------------------------------------------------ pictures, out

def to_pil(image):
    """(3, H, W) in [-1, 1] -> PIL image"""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def check_picture_file(path, size):
    """ValueError if a picture of `size` (width, height) cannot be written to `path`, or must not be."""
    path = Path(path)
    largest = LARGEST_SIDE.get(path.suffix.lower())
    if largest is None or path.is_dir():
        raise ValueError(f"--out {path}: it must be the name of a picture, which ends in {' '.join(LARGEST_SIDE)}")
    if max(size) > largest:
        raise ValueError(f"{path}: it would have {size[0]}x{size[1]} pixels, a {path.suffix} at most {largest} "
                         "a side: write a .png, or fewer pictures")
    check_replaceable(path)


def save_picture(path, picture, making):
    """Write a PIL image, whole or not at all. `making` says how it was made, where other tools look for that: a .png's
    text "parameters", the Exif of others."""
    making = making.encode(errors="replace").decode()       # a .jsonl can smuggle in what UTF-8 does not know
    text, exif = PngInfo(), Image.Exif()
    text.add_itxt("parameters", making)
    exif[ExifTags.Base.Software] = SOFTWARE
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + making.encode("utf-16-be")
    with replacing(path) as temporary:
        picture.save(temporary, pnginfo=text, exif=exif)


class GridPlan:
    """Where n pictures of height x width lie in a grid, row by row, with one text a row on the left (row_labels), and
    one text a picture below it (captions). .size is the grid's (width, height) in pixels."""

    font, line, gap = ImageFont.load_default(size=11), 14, 4

    def __init__(self, n, height, width, columns, row_labels=None, captions=None):
        zoom = max(1, round(128 / max(height, width)))
        self.columns, self.height, self.width = columns, height * zoom, width * zoom
        self.captions = [textwrap.wrap(text, self.width // 6, max_lines=5, placeholder=" ...")
                         for text in captions or []]
        self.row_labels = [textwrap.wrap(text, 16) for text in row_labels or []]
        self.row = self.height + self.line * max(map(len, self.captions), default=0) + self.gap
        self.margin = max((int(self.font.getlength(text)) + 3 * self.gap for label in self.row_labels
                           for text in label), default=self.gap)
        self.size = self.margin + columns * (self.width + self.gap), self.gap + math.ceil(n / columns) * self.row

    def place(self, i):
        """-> the left upper corner of picture i."""
        return self.margin + i % self.columns * (self.width + self.gap), self.gap + i // self.columns * self.row

    def draw(self, images):
        """images (n, 3, height, width) in [-1, 1] -> PIL image"""
        grid = Image.new("RGB", self.size, (238, 238, 238))
        texts = []                                      # (x, y, lines)
        for i, image in enumerate(images):
            x, y = self.place(i)
            grid.paste(to_pil(image).resize((self.width, self.height), Image.BICUBIC), (x, y))
            texts.append((x, y + self.height, self.captions[i] if self.captions else []))
        for row, label in enumerate(self.row_labels):
            _, y = self.place(row * self.columns)
            texts.append((2 * self.gap, y + (self.height - self.line * len(label)) // 2, label))
        for x, y, lines in texts:
            for number, text in enumerate(lines):
                ImageDraw.Draw(grid).text((x, y + number * self.line), text, "black", self.font)
        return grid


def save_grid(path, images, columns, making, row_labels=None, captions=None):
    """images (N, 3, H, W) in [-1, 1], row by row; row_labels: one text a row; captions: one text an image."""
    plan = GridPlan(len(images), *images.shape[2:], columns, row_labels, captions)
    save_picture(path, plan.draw(images), making)
