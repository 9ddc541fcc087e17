"""Procedural scenes: pictures of coloured shapes, each with a caption and its exact depth.

A scene is one to three flat shapes in front of a wall, or a picture of one plain colour. Lengths are in units of half
the picture's shorter side: x points right, y points down, and (0, 0) is the centre. A picture of any height and width
therefore shows the same central square. All depths are in metres:
    wall     depth = 20 / (3 + y)         10 at the top edge (far), 5 at the bottom edge (near), a plane that leans back
    shape    depth = 1.15 / radius        all shapes have the same physical size, so a large one is near: 2.7 to 4.8
Every colour is multiplied by 1.08 - 0.03 * depth, so a picture shows depth in two ways: by size and by shade.

There are three styles. "solid" has filled shapes on a coloured wall; the bundled priors were trained on it. "outline"
has lines on a dark wall; `python train.py` trains on it. "room" is for depth models: three filled shapes, and instead
of the wall a floor whose slope differs from scene to scene,
    floor    1 / depth is linear in y, from 1/4.5 .. 1/6 at the bottom edge to 1/10 .. 1/20 at the top edge
"""
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from data import to_tensor

# A polygon has `tips` corners on its circle, and between two tips a notch that is nearer to the centre. For the square
# and the triangle the notch is the middle of a straight side. The turn is clockwise, from a tip at the top.
SHAPES = {  # (tips, distance of a notch / distance of a tip, turn in radians); a circle has none of these
    "circle": None, "square": (4, math.cos(math.pi / 4), math.pi / 4), "triangle": (3, math.cos(math.pi / 3), 0.0),
    "star": (5, 0.5, 0.0)}
CIRCLE = 0.88                                           # a smaller radius, so that its area is about a square's
COLOURS = {"red": (225, 40, 45), "orange": (250, 135, 20), "yellow": (250, 225, 45), "green": (40, 165, 70),
           "blue": (45, 100, 235), "purple": (145, 60, 195)}
BACKGROUNDS = {"grey": (160, 160, 160), "beige": (220, 200, 165), "teal": (90, 185, 180), "pink": (240, 175, 195)}
PLAIN = {"solid": BACKGROUNDS | COLOURS, "outline": {"black": (0, 0, 0), "white": (255, 255, 255)}}
PLAIN_FRACTION = {"solid": 0.04, "outline": 0.10}       # the share of scenes that are one plain colour
SIZES = {"small": (0.24, 0.29), "large": (0.38, 0.42)}  # smallest and largest radius of the circle around a shape
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
RELATIONS = {"left of": "right of", "above": "below", "in front of": "behind"}  # relation: its converse
LINE = 0.12                                             # width of an outline, half of it outside the shape
MARGIN = 0.02                                           # free space at the picture's edge
PAINT_OUTSIDE = {"solid": 0.0, "outline": LINE / 2, "room": 0.0}    # how far the paint reaches beyond the shape
LABELS = {"count": ["plain", "one", "two"],
          "shape1": list(SHAPES), "colour1": list(COLOURS), "size1": list(SIZES), "place": list(PLACES),
          "relation": list(RELATIONS), "shape2": list(SHAPES), "colour2": list(COLOURS), "size2": list(SIZES),
          "background": [*BACKGROUNDS, *COLOURS, "dark gradient", "black", "white"]}


@dataclass(frozen=True)
class Thing:
    """A shape in a scene: `size` is the caption's word for it, `radius` the number, (x, y) the centre."""
    shape: str
    colour: str
    size: str
    radius: float
    x: float = 0.0
    y: float = 0.0

    @property
    def depth(self):
        return 1.15 / self.radius

    def __str__(self):
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """No thing (a plain picture), one thing at a place, two things in a relation, or three in a room.

    The left, upper or front one of several things comes first. `swapped` changes the caption alone ("B behind A"
    instead of "A in front of B"). `wall` is the depth of the plane behind all things at the bottom and the top edge, in
    metres.
    """
    style: str
    background: str
    things: tuple = ()
    place: str | None = None
    relation: str | None = None
    swapped: bool = False
    wall: tuple = (5.0, 10.0)

    def wall_depth(self, y):
        """Depth of the plane behind all things at the height y, from 1 at the bottom to -1 at the top."""
        bottom, top = self.wall
        return 2 / ((1 + y) / bottom + (1 - y) / top)

    @property
    def caption(self):
        if self.style == "room":
            return f"{', '.join(map(str, self.things))} in a {self.background} room"
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
        """-> {attribute: class index in LABELS[attribute]}; -100 where an attribute does not apply.

        Labels describe the picture, so they do not depend on `swapped`.
        """
        words = {"count": LABELS["count"][len(self.things)], "place": self.place, "relation": self.relation,
                 "background": self.background}
        for number, thing in enumerate(self.things, start=1):
            words |= {f"shape{number}": thing.shape, f"colour{number}": thing.colour, f"size{number}": thing.size}
        return {attribute: classes.index(words[attribute]) if words.get(attribute) else -100
                for attribute, classes in LABELS.items()}


# ------------------------------------------------------------------ geometry

def signed_distance(thing, x, y):
    """x (1, W), y (H, 1) -> (H, W), the exact distance to the shape's edge, negative inside.

    A polygon of n tips is symmetric under rotation by 1/n of a turn and under reflection. So every point is rotated and
    reflected into the wedge between a tip and the notch beside it, where the shape's edge is one straight line.
    """
    x, y = x - thing.x, y - thing.y
    from_centre = np.hypot(x, y)
    if thing.shape == "circle":
        return from_centre - CIRCLE * thing.radius
    tips, notch, turn = SHAPES[thing.shape]
    half = math.pi / tips                               # the angle between a tip and the notch beside it
    angle = np.abs((np.arctan2(x, -y) + turn + half) % (2 * half) - half)       # from the nearest tip: 0 to half
    px, py = from_centre * np.cos(angle) - thing.radius, from_centre * np.sin(angle)            # tip -> point
    ex, ey = thing.radius * (notch * math.cos(half) - 1), thing.radius * notch * math.sin(half)     # tip -> notch
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)    # the edge's nearest point: 0 tip, 1 notch
    return np.copysign(np.hypot(px - along * ex, py - along * ey), px * ey - py * ex)


def visible_fraction(front, behind, outside):
    """The share of `behind` that `front` does not cover, 0 to 1. Their paint extends `outside` beyond their shapes."""
    axis = np.linspace(-1, 1, 49, dtype=np.float32)
    x, y = axis[None], axis[:, None]
    inside = signed_distance(behind, x, y) < outside
    return float((signed_distance(front, x, y)[inside] > outside).mean())


# ------------------------------------------------------------------ a random scene

def pick(rng, options):
    """One of the options (a list, or the keys of a dict), drawn uniformly."""
    return list(options)[int(rng.integers(len(options)))]


def reach(thing):
    """The largest |x| and |y| of the centre for which the whole thing is in the picture."""
    return 1 - MARGIN - thing.radius - LINE / 2


def put_alone(rng, thing, place, jitter):
    """-> the thing at the place; `jitter` (x, y) is its offset along an axis that the place leaves open."""
    away = rng.uniform(0.42, reach(thing))
    x, y = (away * side if side else offset for side, offset in zip(PLACES[place], jitter))
    return replace(thing, x=float(x), y=float(y))


def put_in_front(rng, front, behind, jitter, style):
    """-> both, the one behind partly hidden: positions are drawn until 65 to 85 % of it is visible."""
    while True:
        angle, apart = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 0.65)
        x, y = apart * math.cos(angle), apart * math.sin(angle)
        front = replace(front, x=float(jitter[0] - 0.4 * x), y=float(jitter[1] - 0.4 * y))
        behind = replace(behind, x=float(jitter[0] + 0.6 * x), y=float(jitter[1] + 0.6 * y))
        if 0.65 < visible_fraction(front, behind, PAINT_OUTSIDE[style]) < 0.85:
            return front, behind


def put_side_by_side(rng, first, second, relation, jitter):
    """-> both, with a gap between them along x ("left of") or y ("above"); `jitter` is their offset along the other
    axis."""
    touching = first.radius + second.radius + LINE      # the distance of the centres without a gap
    spare = reach(first) + reach(second) - touching     # split between the two edges and the gap
    gap = spare * rng.uniform(0.4, 1)
    start = -reach(first) + (spare - gap) * rng.random()
    end = start + touching + gap
    if relation == "above":
        return replace(first, x=float(jitter[0]), y=start), replace(second, x=float(jitter[1]), y=end)
    return replace(first, x=start, y=float(jitter[0])), replace(second, x=end, y=float(jitter[1]))


def random_room(rng):
    """-> Scene of three things, the nearest first: all above the floor, at least half of each visible."""
    scene = Scene("room", pick(rng, BACKGROUNDS), wall=(rng.uniform(4.5, 6), rng.uniform(10, 20)))
    while True:
        things = []
        for depth, colour in zip(sorted(rng.uniform(2.6, 6, 3)), rng.permutation(list(COLOURS))):
            radius = 1.15 / depth
            x, y = rng.uniform(-1, 1, 2) * (1 - MARGIN - radius)
            size = "large" if radius > 0.33 else "small"
            things.append(Thing(pick(rng, SHAPES), str(colour), size, float(radius), float(x), float(y)))
        first, second, third = things
        if (all(thing.depth < scene.wall_depth(thing.y + thing.radius) for thing in things)
                and visible_fraction(first, second, 0) > 0.5 and visible_fraction(first, third, 0) > 0.5
                and visible_fraction(second, third, 0) > 0.5):
            return replace(scene, things=(first, second, third))


def random_scene(rng, style):
    """rng: a numpy Generator; style: "solid", "outline" or "room" -> Scene, which depends on these two alone."""
    if style == "room":
        return random_room(rng)
    if rng.random() < PLAIN_FRACTION[style]:
        return Scene(style, pick(rng, PLAIN[style]))
    background = pick(rng, BACKGROUNDS) if style == "solid" else "dark gradient"
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    relation = pick(rng, RELATIONS) if rng.random() < 0.6 else None
    if relation == "in front of":
        sizes = ("large", "small")                      # the front one is nearer, so it is large
    else:
        sizes = (pick(rng, SIZES), pick(rng, SIZES))
    radii = [rng.uniform(*SIZES[size]) for size in sizes]
    shapes = (pick(rng, SHAPES), pick(rng, SHAPES))
    jitter = rng.uniform(-0.12, 0.12, 2)
    first, second = (Thing(shapes[i], colours[i], sizes[i], radii[i]) for i in range(2))
    if relation is None:
        place = pick(rng, PLACES)
        return Scene(style, background, (put_alone(rng, first, place, jitter),), place=place)
    if relation == "in front of":
        things = put_in_front(rng, first, second, jitter, style)
    else:
        things = put_side_by_side(rng, first, second, relation, jitter)
    return Scene(style, background, things, relation=relation, swapped=bool(rng.random() < 0.5))


# ------------------------------------------------------------------ pictures

def render(scene, height, width):
    """-> image uint8 (H, W, 3), depth float32 (H, W) in metres."""
    if not scene.things:
        colour = np.array(PLAIN[scene.style][scene.background], np.uint8)
        return np.tile(colour, (height, width, 1)), np.full((height, width), 10.0, np.float32)
    unit = min(height, width) / 2                       # pixels
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / unit)[None]
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / unit)[:, None]
    depth = np.repeat(scene.wall_depth(np.clip(y, -1, 1)), width, axis=1)               # (H, W)
    if scene.style != "outline":
        wall = np.float32(BACKGROUNDS[scene.background]) * (1.08 - 0.03 * depth[..., None])
    else:
        wall = np.float32((62, 66, 84)) * (1.8 - 0.16 * depth[..., None])
    image, outside = wall, PAINT_OUTSIDE[scene.style]
    for thing in reversed(scene.things):                # the nearer one comes first, so it is painted last
        distance = signed_distance(thing, x, y)
        cover = np.clip(0.5 + (outside - distance) * unit, 0, 1)[..., None]     # (H, W, 1), 0 to 1 within one pixel
        paint = np.float32(COLOURS[thing.colour]) * np.float32(1.08 - 0.03 * thing.depth)
        if scene.style == "outline":                    # inside its line: the wall, which hides other things
            inner = np.clip(0.5 - (outside + distance) * unit, 0, 1)[..., None]
            paint = paint + inner * (wall - paint)
        image = image + cover * (paint - image)
        depth = np.where(distance < outside, np.float32(thing.depth), depth)
    return (image + 0.5).astype(np.uint8), depth.astype(np.float32)


class Scenes(torch.utils.data.Dataset):
    """n random scenes, scene i from (seed, i) alone: image (3, H, W) in [-1, 1], caption, depth (1, H, W) in metres.

    Key epoch * n + i is scene i again.
    """

    def __init__(self, n, height, width, style, seed):
        if style not in PAINT_OUTSIDE:
            raise ValueError(f"style is {style!r}: choose one of {', '.join(PAINT_OUTSIDE)}")
        self.n, self.height, self.width, self.style, self.seed = n, height, width, style, seed

    def __len__(self):
        return self.n

    def scene(self, i):
        return random_scene(np.random.default_rng((self.seed, i)), self.style)

    def __getitem__(self, key):
        scene = self.scene(key % self.n)
        image, depth = render(scene, self.height, self.width)
        return {"image": to_tensor(image), "caption": scene.caption, "depth": torch.from_numpy(depth)[None]}
