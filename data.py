"""Pictures with captions: procedural scenes with exact depth, folders of photographs, Reflow's pairs, PNG grids.

A scene is one or two flat shapes in front of a plane, in units of half the picture's shorter side: x right, y down,
(0, 0) the centre, so any height x width shows the same central square. All depths in metres:
    plane    depth = 20 / (3 + y)         10 at the top edge (far), 5 at the bottom edge (near)
    object   depth = 1.15 / radius        all objects are one physical size, so large means near; 2.7 to 4.8
Colours are shaded by 1.08 - 0.03 * depth, so depth can be read from the picture twice: by size and by shade.
"""
import bisect
import json
import math
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open

SHAPES = {"circle": None, "square": (4, math.cos(math.pi / 4), math.pi / 4),    # tips, notch radius / tip radius, turn
          "triangle": (3, math.cos(math.pi / 3), 0.0), "star": (5, 0.5, 0.0)}
COLOURS = {"red": (225, 40, 45), "orange": (250, 135, 20), "yellow": (250, 225, 45), "green": (40, 165, 70),
           "blue": (45, 100, 235), "purple": (145, 60, 195)}
BACKGROUNDS = {"grey": (160, 160, 160), "beige": (220, 200, 165), "teal": (90, 185, 180), "pink": (240, 175, 195)}
PLAIN = {"solid": BACKGROUNDS | COLOURS, "outline": {"black": (0, 0, 0), "white": (255, 255, 255)}}
PLAIN_FRACTION = {"solid": 0.04, "outline": 0.10}
SIZES = {"small": (0.24, 0.29), "large": (0.38, 0.42)}  # radius, of the circle around the shape
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
RELATIONS = {"left of": "right of", "above": "below", "in front of": "behind"}      # canonical: its converse
LINE, MARGIN = 0.12, 0.02                               # outline width, and what stays free at the picture's edge
EDGE = {"solid": 0.0, "outline": LINE / 2}              # how far paint reaches beyond a shape's edge
LABELS = {"count": ["plain", "one", "two"],
          "shape1": list(SHAPES), "colour1": list(COLOURS), "size1": list(SIZES), "place": list(PLACES),
          "relation": list(RELATIONS), "shape2": list(SHAPES), "colour2": list(COLOURS), "size2": list(SIZES),
          "background": [*BACKGROUNDS, *COLOURS, "dark gradient", "black", "white"]}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    radius: float
    x: float
    y: float

    @property
    def depth(self):
        return 1.15 / self.radius

    def __str__(self):
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things stand in the picture's order: the left, upper or front one first; `swapped` changes the words only."""
    style: str
    background: str
    things: tuple = ()
    place: str | None = None
    relation: str | None = None
    swapped: bool = False

    @property
    def caption(self):
        if not self.things:
            return f"{'an' if self.background[0] in 'aeiou' else 'a'} {self.background} image"
        if self.relation is None:
            words = f"{self.things[0]} {'in' if self.place == 'centre' else 'at'} the {self.place}"
        elif self.swapped:
            words = f"{self.things[1]} {RELATIONS[self.relation]} {self.things[0]}"
        else:
            words = f"{self.things[0]} {self.relation} {self.things[1]}"
        if self.style == "outline":
            return f"an outline of {words} on a {self.background}"
        return f"{words} on a {self.background} background"

    def labels(self):
        """-> {head: class index in LABELS[head]}, a function of the picture alone; -100 where a head does not apply."""
        found = {"count": LABELS["count"][len(self.things)], "place": self.place, "relation": self.relation,
                 "background": self.background}
        for number, thing in enumerate(self.things, start=1):
            found |= {f"shape{number}": thing.shape, f"colour{number}": thing.colour, f"size{number}": thing.size}
        return {head: classes.index(found[head]) if found.get(head) else -100 for head, classes in LABELS.items()}


def signed_distance(thing, x, y):
    """x (1, W), y (H, 1) -> (H, W), exact distance to the shape's edge, negative inside."""
    x, y = x - thing.x, y - thing.y
    rho = np.hypot(x, y)
    if thing.shape == "circle":
        return rho - 0.88 * thing.radius                # 0.88: about the area of the square
    tips, notch, rotation = SHAPES[thing.shape]
    half = math.pi / tips                               # fold all wedges onto one half-wedge with one straight edge
    angle = np.abs((np.arctan2(x, -y) + rotation + half) % (2 * half) - half)
    px, py = rho * np.cos(angle) - thing.radius, rho * np.sin(angle)    # from the tip, and the edge from tip to notch:
    ex, ey = thing.radius * (notch * math.cos(half) - 1), thing.radius * notch * math.sin(half)
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    return np.copysign(np.hypot(px - along * ex, py - along * ey), px * ey - py * ex)


def visible_fraction(front, behind, edge):
    """How much of `behind` is not covered by `front`, 0 to 1; both reach `edge` beyond their shape."""
    axis = np.linspace(-1, 1, 49, dtype=np.float32)
    x, y = axis[None], axis[:, None]
    inside = signed_distance(behind, x, y) < edge
    return float((signed_distance(front, x, y)[inside] > edge).mean())


def random_scene(rng, style):
    """rng: numpy Generator; style: 'solid' (filled, on a coloured plane) or 'outline' (lines on a dark gradient)."""
    def pick(options):
        return options[int(rng.integers(len(options)))]

    if rng.random() < PLAIN_FRACTION[style]:
        return Scene(style, pick(list(PLAIN[style])))
    background = pick(list(BACKGROUNDS)) if style == "solid" else "dark gradient"
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    relation = pick(list(RELATIONS)) if rng.random() < 0.6 else None
    sizes = ("large", "small") if relation == "in front of" else (pick(list(SIZES)), pick(list(SIZES)))
    radii = [rng.uniform(*SIZES[size]) for size in sizes]
    room = [1 - MARGIN - radius - LINE / 2 for radius in radii]     # how far from 0 each centre may lie
    shapes = (pick(list(SHAPES)), pick(list(SHAPES)))
    jitter = rng.uniform(-0.12, 0.12, 2)

    def thing(i, x, y):
        return Thing(shapes[i], colours[i], sizes[i], float(radii[i]), float(x), float(y))

    if relation is None:
        place = pick(list(PLACES))
        away = rng.uniform(0.42, room[0])
        x, y = (away * side if side else j for side, j in zip(PLACES[place], jitter))
        return Scene(style, background, (thing(0, x, y),), place=place)
    if relation == "in front of":
        while True:                                     # until enough of the hidden one shows, but not all of it
            angle, apart = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 0.65)
            x, y = apart * math.cos(angle), apart * math.sin(angle)
            things = (thing(0, jitter[0] - 0.4 * x, jitter[1] - 0.4 * y),
                      thing(1, jitter[0] + 0.6 * x, jitter[1] + 0.6 * y))
            if 0.65 < visible_fraction(*things, EDGE[style]) < 0.85:
                break
    else:
        spare = room[0] + room[1] - sum(radii) - LINE   # what is left of the axis: shared among edge, gap, edge
        gap = spare * rng.uniform(0.4, 1)
        first = -room[0] + (spare - gap) * rng.random()
        second = first + sum(radii) + LINE + gap
        things = thing(0, first, jitter[0]), thing(1, second, jitter[1])
        if relation == "above":
            things = thing(0, jitter[0], first), thing(1, jitter[1], second)
    return Scene(style, background, things, relation=relation, swapped=bool(rng.random() < 0.5))


def render(scene, height, width):
    """-> image uint8 (H, W, 3), depth float32 (H, W) in metres."""
    if not scene.things:
        colour = np.array(PLAIN[scene.style][scene.background], np.uint8)
        return np.tile(colour, (height, width, 1)), np.full((height, width), 10.0, np.float32)
    unit = min(height, width) / 2
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / unit)[None]
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / unit)[:, None]
    depth = np.repeat(20 / (3 + np.clip(y, -1, 1)), width, axis=1)      # (H, W)
    if scene.style == "solid":
        ground = np.float32(BACKGROUNDS[scene.background]) * (1.08 - 0.03 * depth[..., None])
    else:
        ground = np.float32((62, 66, 84)) * (1.8 - 0.16 * depth[..., None])
    image, edge = ground, EDGE[scene.style]
    for thing in reversed(scene.things):                # the nearer one comes first, so it is drawn last
        distance = signed_distance(thing, x, y)
        cover = np.clip(0.5 + (edge - distance) * unit, 0, 1)[..., None]        # (H, W, 1), one pixel of ramp
        paint = np.float32(COLOURS[thing.colour]) * np.float32(1.08 - 0.03 * thing.depth)
        if scene.style == "outline":                    # the inside shows the gradient, whatever lies behind
            inner = np.clip(0.5 - (edge + distance) * unit, 0, 1)[..., None]
            paint = paint + inner * (ground - paint)
        image = image + cover * (paint - image)
        depth = np.where(distance < edge, np.float32(thing.depth), depth)
    return (image + 0.5).astype(np.uint8), depth.astype(np.float32)


class Scenes(torch.utils.data.Dataset):
    """n random scenes, item i from (seed, i) alone: image (3, H, W) in [-1, 1], caption, depth (1, H, W) in metres.

    Keys go on after the end: key = epoch * n + i.
    """

    def __init__(self, n, height, width, style, seed):
        if style not in PLAIN:
            raise ValueError(f"style is {style!r}: choose one of {', '.join(PLAIN)}")
        self.n, self.height, self.width, self.style, self.seed = n, height, width, style, seed

    def __len__(self):
        return self.n

    def scene(self, i):
        return random_scene(np.random.default_rng((self.seed, i)), self.style)

    def __getitem__(self, key):
        scene = self.scene(key % self.n)
        image, depth = render(scene, self.height, self.width)
        return {"image": to_tensor(image), "caption": scene.caption, "depth": torch.from_numpy(depth)[None]}


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def open_rgb(path):
    """-> PIL image in RGB, upright, alpha on white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):                      # 16-bit grey: convert() would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pictures_in(folder):
    """-> the paths of the pictures under `folder`, sorted."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def crop_box(image, height, width, right, down):
    """The largest part of `image` with the shape height x width, `right` and `down` (0 to 1) of the spare way along
    -> (left, top, right, bottom) in pixels."""
    scale = min(image.width / width, image.height / height)
    width, height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = right * (image.width - width), down * (image.height - height)
    return left, top, left + width, top + height


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it again as UTF-8") from None


def read_metadata(path):
    """Lines {"file_name": path from the jsonl's own folder, "text": caption} -> {image path: caption}"""
    captions, wanted = {}, '{"file_name": "...", "text": "..."}'
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
                captions[Path(os.path.normpath(path.parent / entry["file_name"]))] = entry["text"].strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}, line {number}: {line[:80]!r} is not {wanted}") from None
    return captions


class ImageFolder(torch.utils.data.Dataset):
    """Photographs under `folder`, scaled to cover height x width, cropped and flipped at random by (seed, key), where
    key = epoch * n + i: image (3, H, W) in [-1, 1], and a caption from NAME.txt beside the image, else from
    metadata.jsonl, else ""."""

    def __init__(self, folder, height, width, seed=0):
        folder = Path(os.path.normpath(folder))
        if not folder.is_dir():
            raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}: give a folder of images")
        self.height, self.width, self.seed = height, width, seed
        self.items, self.undecodable, unreadable, metadata = [], set(), [], {}
        for path in sorted(folder.rglob("metadata.jsonl")):
            metadata |= read_metadata(path)
        for path in pictures_in(folder):
            try:
                with Image.open(path) as image:
                    image.verify()
            except Exception:                           # Pillow's readers raise nearly everything on broken files
                unreadable.append(path)
                continue
            text = path.with_suffix(".txt")
            self.items.append((path, read_text(text).strip() if text.is_file() else metadata.get(path, "")))
        if not self.items:
            raise ValueError(f"{folder} has no readable image ({len(unreadable)} unreadable): "
                             f"give a folder with {' '.join(SUFFIXES)} files")
        uncaptioned = [path for path, caption in self.items if not caption]
        for paths, what in (unreadable, "unreadable and skipped"), (uncaptioned, "without a caption"):
            if paths:
                print(f"warning: {len(paths)} of {len(self.items) + len(unreadable)} images {what}, first {paths[0]}",
                      file=sys.stderr)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        i, rng = key % len(self.items), np.random.default_rng((self.seed, key))
        right, down, flip = rng.random(), rng.random(), rng.random() < 0.5
        while i in self.undecodable or (image := self.decode(i)) is None:
            if len(self.undecodable) == len(self.items):
                raise ValueError(f"none of the {len(self.items)} images can be decoded, last {self.items[i][0]}")
            i = (i + 1) % len(self.items)
        box = crop_box(image, self.height, self.width, right, down)
        image = image.resize((self.width, self.height), Image.LANCZOS, box=box)
        return {"image": to_tensor(ImageOps.mirror(image) if flip else image), "caption": self.items[i][1]}

    def decode(self, i):
        """-> RGB image, or None with a warning, once, where the file is damaged behind its header."""
        try:
            return open_rgb(self.items[i][0])
        except Exception as error:
            self.undecodable.add(i)
            print(f"warning: cannot decode {self.items[i][0]} ({error}), taking the next image; "
                  f"{len(self.undecodable)} of {len(self.items)} so far", file=sys.stderr)


# ------------------------------------------------------------------ depth

HYPERSIM_WIDTH, HYPERSIM_HEIGHT, HYPERSIM_FOCAL = 1024, 768, 886.81     # pixels
LAYOUTS = [  # depth file, its picture (by substitutions in the path), metres a unit, nearest and farthest valid depth
    (r"_geometry_hdf5/frame\.\d+\.depth_meters\.hdf5$",                              # Hypersim as it is published
     (("_geometry_hdf5/", "_final_preview/"), (".depth_meters.hdf5", ".tonemap.jpg")), 1.0, (1e-5, 65.0)),
    (r"/depth_plane_cam_\d+_fr\d+\.png$", (("/depth_plane_", "/rgb_"),), 1e-3, (1e-5, 65.0)),    # as Marigold's PNGs
    (r"/frames/depth/Camera_\d/depth_\d+\.png$",                                      # Virtual KITTI 2, sky at 655 m
     (("/frames/depth/", "/frames/rgb/"), ("/depth_", "/rgb_"), (".png", ".jpg")), 1e-2, (1e-5, 80.0)),
]


def planar_depth(distance):
    """Hypersim's distance from the camera's centre (768, 1024) -> depth along the viewing axis."""
    x = np.arange(HYPERSIM_WIDTH) - (HYPERSIM_WIDTH - 1) / 2
    y = np.arange(HYPERSIM_HEIGHT) - (HYPERSIM_HEIGHT - 1) / 2
    return distance * (HYPERSIM_FOCAL / np.sqrt(x[None] ** 2 + y[:, None] ** 2 + HYPERSIM_FOCAL**2))


def read_depth(path, scale=1.0):
    """.npy, 16-bit .png or Hypersim's .hdf5, `scale` metres a unit -> float32 (H, W), holes as they are."""
    path = Path(path)
    try:
        if path.suffix == ".hdf5":
            import h5py
            with h5py.File(path) as file:
                depth = planar_depth(np.asarray(file["dataset"]))
        elif path.suffix == ".npy":
            depth = np.load(path, allow_pickle=False).squeeze()
        else:
            with Image.open(path) as image:
                depth = np.asarray(image)
    except ImportError:
        raise ValueError(f"{path}: reading Hypersim's .hdf5 files takes h5py: pip install h5py") from None
    except Exception as error:                          # damaged bytes can raise anything in a parser
        raise ValueError(f"{path} cannot be read as depth: {error}") from error
    if depth.ndim != 2:
        raise ValueError(f"{path} has the shape {depth.shape}: depth is one number a pixel, (height, width)")
    return depth.astype(np.float32) * np.float32(scale)


def find_depth(folder):
    """`folder` in one of LAYOUTS, or with NAME.npy or 16-bit NAME.png beside the picture NAME.jpg (or .png, for .npy)
    -> list of (picture, depth, metres a unit, (nearest, farthest))."""
    folder, found = Path(folder), []
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}: give a folder of depth data")
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".npy", ".png", ".hdf5")):
        for pattern, replacements, scale, limits in LAYOUTS:
            if re.search(pattern, path.as_posix()):
                picture = path.as_posix()
                for old, new in replacements:
                    picture = new.join(picture.rsplit(old, 1))
                found.append((Path(picture), path, scale, limits))
                break
        else:
            beside = [path.with_suffix(s) for s in SUFFIXES if s != path.suffix and path.with_suffix(s).is_file()]
            if beside and path.suffix != ".hdf5":
                found.append((beside[0], path, 1.0, (0.0, math.inf)))
    found = [entry for entry in found if entry[0].is_file()]
    if not found:
        raise ValueError(f"{folder} has no picture with a depth file: Hypersim, Virtual KITTI 2, or NAME.jpg with "
                         "NAME.npy or a 16-bit NAME.png")
    return found


def normalise_depth(depth, valid):
    """depth, valid (1, H, W) -> log depth, in which this picture's 1 % and 99 % quantiles are -1 and 1; invalid: 1."""
    log = depth.clamp(min=1e-6).log()
    low, high = np.quantile(log[valid].numpy(), [0.01, 0.99]) if valid.any() else (0.0, 1.0)
    return torch.where(valid, (2 * (log - low) / max(high - low, 1e-3) - 1).clamp(-1, 1), 1.0)


class DepthFolders(torch.utils.data.Dataset):
    """Pictures with depth from `folders`, each drawn with its weight: image (3, H, W), depth (1, H, W) as
    normalise_depth makes it, valid (1, H, W), caption "". Scaled to cover, and cropped and flipped at random by
    (seed, key)."""

    def __init__(self, folders, weights, height, width, seed=0):
        if weights and (len(weights) != len(folders) or min(weights) <= 0):
            raise ValueError(f"{len(weights)} weights for {len(folders)} folders: one above 0 for each")
        self.height, self.width, self.seed = height, width, seed
        self.found = [find_depth(folder) for folder in folders]
        weights = np.array(weights or [len(found) for found in self.found], np.float64)
        self.weights = weights / weights.sum()

    def __len__(self):
        return sum(map(len, self.found))

    def __getitem__(self, key):
        rng = np.random.default_rng((self.seed, key))
        found = self.found[rng.choice(len(self.found), p=self.weights)]
        picture, path, scale, (near, far) = found[int(rng.integers(len(found)))]
        image, depth = open_rgb(picture), read_depth(path, scale)
        if image.size != depth.shape[::-1]:
            raise ValueError(f"{picture} is {image.width}x{image.height}, its depth {path} "
                             f"{depth.shape[1]}x{depth.shape[0]}")
        box = left, top, right, bottom = crop_box(image, self.height, self.width, rng.random(), rng.random())
        columns = left + (np.arange(self.width) + 0.5) * (right - left) / self.width
        rows = top + (np.arange(self.height) + 0.5) * (bottom - top) / self.height
        depth = torch.from_numpy(depth[rows.astype(int)[:, None], columns.astype(int)])[None]   # nearest: it has edges
        image = to_tensor(image.resize((self.width, self.height), Image.LANCZOS, box=box))
        valid = torch.isfinite(depth) & (depth > near) & (depth < far)
        depth = normalise_depth(torch.where(valid, depth, 1.0), valid)
        if rng.random() < 0.5:
            image, depth, valid = image.flip(-1), depth.flip(-1), valid.flip(-1)
        return {"image": image, "depth": depth, "valid": valid, "caption": ""}


class DepthScenes(Scenes):
    """The procedural scenes with their depth, as DepthFolders gives it."""

    def __getitem__(self, key):
        item = super().__getitem__(key)
        valid = torch.ones_like(item["depth"], dtype=torch.bool)
        return {"image": item["image"], "depth": normalise_depth(item["depth"], valid), "valid": valid, "caption": ""}


def colour_depth(depth):
    """depth (H, W) from -1 near to 1 far -> uint8 (H, W, 3): yellow near, through red and violet, to black far."""
    anchors = np.array([(252, 253, 191), (254, 159, 109), (222, 73, 104), (140, 41, 129), (59, 15, 112), (0, 0, 4)])
    at = np.linspace(-1, 1, len(anchors))
    return np.stack([np.interp(depth, at, channel) for channel in anchors.T], -1).round().astype(np.uint8)


def save_depth(stem, depth):
    """depth (H, W) in [-1, 1] -> stem.npy (float32), stem_16bit.png (0 to 65535), stem_colour.png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    partial = stem.with_name(stem.name + ".partial.npy")
    np.save(partial, depth.astype(np.float32))
    os.replace(partial, stem.with_name(stem.name + ".npy"))
    levels = ((depth + 1) * 32767.5).round().astype(np.uint16)
    write_picture(stem.with_name(stem.name + "_16bit.png"), Image.fromarray(levels))
    write_picture(stem.with_name(stem.name + "_colour.png"), Image.fromarray(colour_depth(depth)))


# ------------------------------------------------------------------ Reflow's pairs, and files

def read_pairs(path, tensors=("noise", "latent")):
    """-> {"prompts": n strings, "about": the settings that made them, "noise" and "latent": (n, z, h, w) in float16}"""
    try:
        with safe_open(path, "pt") as file:
            pairs = {name: json.loads(file.metadata()[name]) for name in ("prompts", "about")}
            return pairs | {name: file.get_tensor(name) for name in tensors}
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or no pairs of sample.py: delete it, and they are made again "
                         f"({error})") from error


class Pairs(torch.utils.data.Dataset):
    """What `sample.py --pairs` wrote into `folder`: latent and noise (z, h, w), caption. The last `validation` pairs
    are behind the end, for `pair` alone."""

    def __init__(self, folder, validation):
        self.files, self.starts, n = sorted(Path(folder).glob("pairs-*.safetensors")), [], 0
        if not self.files:
            raise ValueError(f"{folder} has no pairs-*.safetensors: sample.py --pairs N --out {folder} makes them")
        for path in self.files:
            pairs = read_pairs(path, ())
            if n and pairs["about"] != self.about:
                raise ValueError(f"{path}: its pairs were made with other settings than those of {self.files[0]}")
            self.about = pairs["about"]
            self.starts.append(n)
            n += len(pairs["prompts"])
        if n <= validation:
            raise ValueError(f"{folder} has {n} pairs, of which {validation} are held out (--validation): make more")
        self.n = n - validation

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        return self.pair(key % self.n)

    def pair(self, i):
        file = bisect.bisect_right(self.starts, i) - 1
        with safe_open(self.files[file], "pt") as opened:
            j, prompts = i - self.starts[file], json.loads(opened.metadata()["prompts"])
            return {"noise": opened.get_slice("noise")[j].float(), "latent": opened.get_slice("latent")[j].float(),
                    "caption": prompts[j]}


def to_tensor(image):
    """PIL image or uint8 (H, W, 3) -> (3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def to_pil(image):
    """(3, H, W) in [-1, 1] -> PIL image"""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def write_picture(path, picture):
    """The whole file or none of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    picture.save(partial)
    os.replace(partial, path)


def save_image(path, image):
    """image (3, H, W) in [-1, 1]"""
    write_picture(path, to_pil(image))


def save_grid(path, images, columns, row_labels=None, captions=None):
    """images (N, 3, H, W) in [-1, 1], row by row; row_labels: one text a row; captions: one text an image."""
    font, line, gap = ImageFont.load_default(size=11), 14, 4
    zoom = max(1, round(128 / max(images.shape[2:])))
    height, width = images.shape[2] * zoom, images.shape[3] * zoom
    captions = [textwrap.wrap(text, width // 6, max_lines=5, placeholder=" ...") for text in captions or []]
    row_labels = [textwrap.wrap(text, 16) for text in row_labels or []]
    rows, below = -(-len(images) // columns), line * max(map(len, captions), default=0)
    margin = max((int(font.getlength(text)) + 3 * gap for label in row_labels for text in label), default=gap)
    grid = Image.new("RGB", (margin + columns * (width + gap), gap + rows * (height + below + gap)), (238, 238, 238))
    draw = ImageDraw.Draw(grid)

    def write(x, y, texts):
        for number, text in enumerate(texts):
            draw.text((x, y + number * line), text, "black", font)

    for i, image in enumerate(images):
        x, y = margin + i % columns * (width + gap), gap + i // columns * (height + below + gap)
        grid.paste(to_pil(image).resize((width, height), Image.BICUBIC), (x, y))
        write(x, y + height, captions[i] if captions else [])
    for row, label in enumerate(row_labels):
        write(2 * gap, gap + row * (height + below + gap) + (height - line * len(label)) // 2, label)
    write_picture(path, grid)


def cli(main):
    """Run main(); what the user can mend is one line and exit code 2, an interrupt one line and 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
