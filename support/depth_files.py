"""Depth files: Hypersim, Virtual KITTI 2, or NAME.npy or a 16-bit NAME.png beside the picture NAME.jpg."""
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from support.decode import SUFFIXES
from support.files import reading
from support.folders import look_through, progress, suffix_of

HYPERSIM_WIDTH, HYPERSIM_HEIGHT, HYPERSIM_FOCAL = 1024, 768, 886.81     # pixels


class Layout(NamedTuple):
    """Where a data set keeps its depth files, and their unit. All lengths are in metres."""
    depth: str                      # pattern of the end of a depth file's path
    to_picture: tuple               # (old, new) parts that turn it into the picture's path, whose suffix may be any
    unit: float                     # metres per number in a depth file
    near: float                     # valid depth is above near and below far
    far: float


LAYOUTS = [
    Layout(r"_geometry_hdf5/frame\.\d+\.depth_meters\.hdf5$",               # Hypersim, as published
           (("_geometry_hdf5/", "_final_preview/"), (".depth_meters", ".tonemap")), 1.0, 1e-5, 65.0),
    Layout(r"/depth_plane_cam_\d+_fr\d+\.png$", (("/depth_plane_", "/rgb_"),), 1e-3, 1e-5, 65.0),   # as Marigold's PNGs
    Layout(r"/frames/depth/Camera_\d/depth_\d+\.png$",                      # Virtual KITTI 2, whose sky is at 655 m
           (("/frames/depth/", "/frames/rgb/"), ("/depth_", "/rgb_"), ("vkitti_2.0.3_depth/", "vkitti_2.0.3_rgb/")),
           1e-2, 1e-5, 80.0),
    Layout(r"_depth\.npy$", (("_depth", ""),), 1.0, 0.0, math.inf),          # NAME_depth.npy beside NAME.png, as DIODE
    Layout(r"/depth/[^/]+\.(npy|png)$", (("/depth/", "/rgb/"),), 1.0, 0.0, math.inf),
    Layout(r"\.(npy|png)$", (), 1.0, 0.0, math.inf),                        # NAME.npy or NAME.png beside NAME.jpg
]


def picture_of(path, layout, pictures):
    """-> the path of a depth file's picture, or None if it is not among `pictures`, {path without suffix: paths}."""
    stem = os.path.splitext(path)[0]
    for old, new in layout.to_picture:
        stem = new.join(stem.rsplit(old, 1))
    return next((picture for picture in pictures.get(stem, []) if picture != path), None)


def find_depth(folder):
    """-> [(picture, depth file, layout)] of a folder in one of LAYOUTS. Prints in one warning what is left out."""
    folder, found, alone, pictures = Path(folder), [], [], {}
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'missing'}: pass a folder of depth data")
    files, left_out = look_through(folder)
    left_out.add_other_kinds(files)
    files = [path.replace(os.sep, "/") for path in files]
    for path in files:
        if suffix_of(path) in SUFFIXES:
            pictures.setdefault(os.path.splitext(path)[0], []).append(path)
    depths = [path for path in files if path.endswith((".hdf5", ".npy", ".png"))]
    for path in progress(depths, "matching depth files", unit="file"):
        layouts = [layout for layout in LAYOUTS if re.search(layout.depth, path)]
        pairs = [(Path(picture), Path(path), layout) for layout in layouts
                 if (picture := picture_of(path, layout, pictures)) is not None]
        found += pairs[:1]
        if not pairs and layouts and (layouts[0] is not LAYOUTS[-1] or path.endswith(".npy")):
            alone.append(path)
    used = {os.fspath(path).replace(os.sep, "/") for pair in found for path in pair[:2]} | set(alone)
    left_out.add("pictures without depth", *(path for paths in pictures.values() for path in paths if path not in used))
    left_out.add("depth files without a picture", *alone)
    if not found:
        raise ValueError(f"{folder} has no picture with a depth file{f': {left_out}' if left_out else ''}: Hypersim, "
                         "Virtual KITTI 2, or NAME.jpg with NAME.npy or a 16-bit NAME.png")
    if any(path.suffix == ".hdf5" for _, path, _ in found):
        import_h5py()
    left_out.warn(f"{folder}: {len(found):,} pictures with depth")
    return found


def import_h5py():
    try:
        import h5py
        return h5py
    except ImportError:
        raise ValueError("reading Hypersim's .hdf5 files takes h5py: pip install h5py") from None


def planar_depth(distance):
    """Hypersim's distance from the camera's centre (768, 1024) -> depth along the viewing axis."""
    x = np.arange(HYPERSIM_WIDTH) - (HYPERSIM_WIDTH - 1) / 2
    y = np.arange(HYPERSIM_HEIGHT) - (HYPERSIM_HEIGHT - 1) / 2
    return distance * (HYPERSIM_FOCAL / np.sqrt(x[None] ** 2 + y[:, None] ** 2 + HYPERSIM_FOCAL**2))


def read_hdf5(path):
    """-> Hypersim's distances (768, 1024). ValueError if the array is stored in another file, which HDF5 allows."""
    h5py = import_h5py()
    with h5py.File(path) as file:
        link = file.get("dataset", getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(file["dataset"], h5py.Dataset):
            raise ValueError("its 'dataset' is a link or not an array: Hypersim's files contain the array")
        dataset = file["dataset"]
        if dataset.external or dataset.is_virtual:
            raise ValueError("its array is stored in other files: Hypersim's files contain the array")
        if dataset.shape != (HYPERSIM_HEIGHT, HYPERSIM_WIDTH) or dataset.dtype.kind != "f":
            raise ValueError(f"{dataset.dtype} {dataset.shape}: Hypersim's are floats ({HYPERSIM_HEIGHT}, "
                             f"{HYPERSIM_WIDTH})")
        return np.asarray(dataset)


def read_depth(path, unit=1.0):
    """A .npy, a 16-bit .png or Hypersim's .hdf5, in units of `unit` metres -> float32 (H, W) in metres, not masked."""
    path = Path(path)
    with reading(path, "depth"):
        if path.suffix == ".hdf5":
            depth = planar_depth(read_hdf5(path))
        elif path.suffix == ".npy":
            depth = np.load(path, mmap_mode="r", allow_pickle=False).squeeze()
        else:
            with Image.open(path, formats=["PNG"]) as image:
                if not image.mode.startswith("I"):
                    raise ValueError(f"a picture of mode {image.mode}, where depth is a 16-bit grey PNG, or a .npy")
                depth = np.asarray(image)
    if depth.ndim != 2 or not depth.size:
        raise ValueError(f"{path} has the shape {depth.shape}: depth is one number per pixel, (height, width)")
    if depth.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {depth.dtype}: depth is a real number per pixel; save it as float32")
    with np.errstate(over="ignore"):    # overflow becomes infinity, which is not valid depth
        return depth.astype(np.float32) * np.float32(unit)
