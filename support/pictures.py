"""Pictures as files: single ones and grids, with a text inside that says how they were made."""
import json
import math
import textwrap
from pathlib import Path

from PIL import ExifTags, Image, ImageDraw, ImageFont, TiffTags
from PIL.PngImagePlugin import PngInfo

from support.files import SOFTWARE, check_replaceable, partial_name, remove_partial, replacing, try_writing
from support.folders import pictures_in
from support.load import objective_of, split_strength

LARGEST_SIDE = {".png": 2**31 - 1, ".jpg": 65500, ".jpeg": 65500, ".webp": 16383}   # pixels, by format
NARROWEST = 40              # pixels of a grid's column with captions: six letters
COMMENT = ExifTags.Base.UserComment
TiffTags.TAGS_V2_GROUPS[ExifTags.IFD.Exif][COMMENT] = TiffTags.TagInfo(     # as Exif demands; Pillow's own is BYTE
    COMMENT, "UserComment", TiffTags.UNDEFINED, 1)


def to_pil(image):
    """(3, H, W) in [-1, 1] -> PIL image"""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def exif_of(making):
    """-> the Exif data of a picture that says how it was made."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = SOFTWARE
    exif.get_ifd(ExifTags.IFD.Exif)[COMMENT] = b"UNICODE\0" + making.encode("utf-16-be", errors="replace")
    return exif


def check_picture_file(path, size):
    """ValueError if a picture of `size` (width, height) cannot be written to `path`, or would replace a foreign
    file."""
    path = Path(path)
    largest = LARGEST_SIDE.get(path.suffix.lower())
    if largest is None or path.is_dir():
        raise ValueError(f"--out {path}: it must be the name of a picture, which ends in {' '.join(LARGEST_SIDE)}")
    if max(size) > largest:
        raise ValueError(f"{path}: it would have {size[0]}x{size[1]} pixels, a {path.suffix} at most {largest} "
                         "a side: write a .png, or fewer pictures")
    check_replaceable(path)


def single_files(folder, numbers):
    """-> the paths of single pictures, named by their numbers. ValueError if one exists that is not ours, or if the
    folder has other pictures."""
    digits = max(4, len(str(numbers[-1])))
    files = [folder / f"{i:0{digits}d}.png" for i in numbers]
    others = sorted(set(pictures_in(folder)) - set(files))
    if others:
        raise ValueError(f"--singles: {folder} has {len(others)} pictures that this command does not write, first "
                         f"{others[0].name}: empty it, or choose another --out")
    for path in files:
        check_replaceable(path)
    return files


def save_picture(path, picture, making):
    """Write a PIL image atomically. `making` says how it was made, stored where other tools look for it: the text chunk
    "parameters" of a .png, the Exif data of other formats."""
    making = making.encode(errors="replace").decode()       # JSON can hold lone surrogates, which UTF-8 cannot encode
    text = PngInfo()
    text.add_itxt("parameters", making)
    with replacing(path) as temporary:
        picture.save(temporary, pnginfo=text, exif=exif_of(making))


def try_picture(path, size, making):
    """An error if a picture of `size` (width, height) with this text cannot be written to `path`: a folder that is
    read-only, a full disk, a text that is too long for the format's metadata. Writes one and deletes it."""
    trial = partial_name(path)
    try:
        save_picture(trial, Image.new("RGB", size), making)
    except (ValueError, OSError) as error:
        raise OSError(f"{path}: such a picture cannot be written ({error}): choose another folder, or a .png, which "
                      "may have a longer text") from error
    finally:
        trial.unlink(missing_ok=True)
    try_writing(path, math.prod(size))          # about as many bytes as a picture of so many pixels has


def prepare_files(path, grid_size, about, files, size, making):
    """An error before any picture is drawn, if the grid `path` or the single pictures `files` cannot be written. about,
    making: their texts; size: [height, width] of a picture. Removes half-written files of killed processes."""
    check_picture_file(path, grid_size)
    try_picture(path, grid_size, about)
    for single in files[:1]:
        remove_partial(single.parent, *(file.name for file in files))
        try_picture(single, size[::-1], making)


class GridPlan:
    """The layout of a grid of n pictures of height x width, row by row: a text to the left of each row (row_labels), a
    text below each picture (captions). .size is the grid's (width, height) in pixels."""

    font, line, gap = ImageFont.load_default(size=11), 14, 4

    def __init__(self, n, height, width, columns, row_labels=None, captions=None):
        zoom = max(1, round(128 / max(height, width)))
        self.columns, self.height, self.width = columns, height * zoom, width * zoom
        self.column = max(self.width, NARROWEST) if captions else self.width
        self.captions = [textwrap.wrap(text, self.column // 6, max_lines=5, placeholder=" ...")
                         for text in captions or []]
        self.row_labels = [textwrap.wrap(text, 16) for text in row_labels or []]
        self.row = self.height + self.line * max(map(len, self.captions), default=0) + self.gap
        self.margin = max((int(self.font.getlength(text)) + 3 * self.gap for label in self.row_labels
                           for text in label), default=self.gap)
        self.size = self.margin + columns * (self.column + self.gap), self.gap + math.ceil(n / columns) * self.row

    def place(self, i):
        """-> the upper left corner of picture i, (x, y) in pixels."""
        return self.margin + i % self.columns * (self.column + self.gap), self.gap + i // self.columns * self.row

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
    """Write images (N, 3, H, W) in [-1, 1] as a grid, row by row. row_labels: a text per row; captions: one per
    image."""
    plan = GridPlan(len(images), *images.shape[2:], columns, row_labels, captions)
    save_picture(path, plan.draw(images), making)


def quoted(value):
    """A value of a picture's settings -> the same, as JSON if it has a character that separates settings."""
    return json.dumps(value, ensure_ascii=False) if set(',:"\n') & set(value) else value


def settings_text(args, sd, flow, prompt, negative="", **more):
    """How a picture was made, in the format of other tools: the prompt, the negative prompt, a line of settings. Some
    tools read nothing without the negative prompt's line, so it is there when it is empty too."""
    model = Path(args.ckpt).stem
    for file, strength in map(split_strength, args.lora):
        model += f" + {Path(file).stem}" + (f" x {strength:g}" if strength != 1 else "")
    settings = {"Steps": args.steps, "Sampler": "Euler", "Seed": args.seed, "Model hash": sd.unet_hash[:10],
                "Model": model, "Objective": objective_of(flow), **more}
    settings = ", ".join(f"{name}: {quoted(str(value))}" for name, value in settings.items())
    return f"{prompt}\nNegative prompt: {negative}\n{settings}"
