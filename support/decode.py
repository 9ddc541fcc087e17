"""A picture's file to an upright RGB image: which formats are read, and which pictures this project wrote itself."""
import functools
import io
import os
import stat
import warnings

import numpy as np
from PIL import ExifTags, Image

from support.files import SOFTWARE, maker_of, reading

FORMATS = {  # Pillow's name: suffixes. No other format is opened under any suffix: for EPS, Pillow runs Ghostscript
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",),
    "GIF": (".gif",), "TIFF": (".tif", ".tiff"), "AVIF": (".avif",), "JPEG2000": (".jp2",), "PPM": (".ppm", ".pgm")}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MILLION = 10**6
LARGE, LARGEST = 100 * MILLION, 200 * MILLION       # pixels: a JPEG above is scaled while it is decoded; others refused
Image.MAX_IMAGE_PIXELS = 250 * MILLION              # Pillow refuses twice as many
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}              # by Exif's orientation; from 5 on, width and height are swapped


@functools.cache
def formats():
    """-> the names of FORMATS that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def orientation(file):
    """-> Exif's orientation of an open picture, 1 to 8; 1 (upright) if the Exif data are missing or broken."""
    try:
        found = file.getexif().get(ExifTags.Base.Orientation)
    except Exception:                                   # Pillow's parsers raise nearly everything on broken bytes
        found = None
    return found if found in TURNS else 1


def open_upright(path, content=None):
    """-> PIL image in the file's own mode, upright. content: the file's bytes, if it is in a tar."""
    if content is None and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("a pipe or a device")          # opening one could wait for ever
    with Image.open(path if content is None else io.BytesIO(content), formats=formats()) as file:
        width, height = file.size
        for divisor in 2, 4, 8:
            if file.width * file.height > LARGE:        # draft does nothing unless the file is a JPEG
                file.draft(None, (width // divisor, height // divisor))
        if file.width * file.height > LARGEST:
            raise ValueError(f"{path}: {width}x{height} pixels, of at most {LARGEST // MILLION} million, which only a "
                             "JPEG may exceed: scale it down")
        file.load()                                     # before the orientation, by which Pillow turns a TIFF itself
        turn = orientation(file)
        return file.transpose(TURNS[turn]) if turn > 1 else file.copy()


def open_rgb(path, content=None):
    """-> PIL image in RGB, upright, transparency on white. content: the file's bytes, if it is in a tar. ValueError for
    a damaged file. A JPEG of more than 100 million pixels is read at a half, a quarter or an eighth of its size."""
    with reading(path, "a picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = open_upright(path, content)
        except MemoryError:
            raise ValueError(f"{path}: it does not fit into memory") from None
        if image.mode.startswith("I"):                  # 16-bit grey: convert() would clip at 255
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.mode == "F":
            raise ValueError(f"{path}: a picture of floating-point numbers, of no known range: save it with 8 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def upright_size(path):
    """-> (width, height) of a picture in pixels, upright, from its header. ValueError for a damaged one."""
    with reading(path, "a picture"), Image.open(path, formats=formats()) as file:
        is_turned = orientation(file) >= 5 and file.format != "TIFF"        # Pillow swaps a TIFF's sides itself
        return file.size[::-1] if is_turned else file.size


def kind_of(path):
    """-> "picture", "ours" (a picture that this project wrote) or "unreadable", by a file's first bytes. Asks Pillow,
    which takes ten times as long, only if they are unusual."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(4096)
            if head[8:16] == b"WEBPVP8X" and head[20] & 8:          # its Exif data are at the end
                file.seek(max(0, os.path.getsize(path) - 2**18))
                head += file.read()
        if (b"Diff2Flow" in head or b"iTXtparameters" in head) and maker_of(path) == SOFTWARE:
            return "ours"
        is_usual = head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"BM", b"GIF8", b"II*\0", b"MM\0*"))
        if not is_usual and head[8:12] != b"WEBP":
            with Image.open(path, formats=formats()) as image:
                image.verify()
        return "picture"
    except Exception:                                   # Pillow's parsers raise nearly everything on broken bytes
        return "unreadable"
