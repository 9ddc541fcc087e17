"""Image to depth (Sec. 4.3): data sets with depth, prediction for pictures, and the errors of predictions.

    python depth.py a.jpg photos/ --steps 10 --ensemble 4 --lora runs/NAME/lora.safetensors --out depth/
    python depth.py --truth nyu/ --dataset nyu --list filename_list_test.txt depth/

The first command predicts, the second measures predictions. A model learns log depth, in which the 1 % and the 99 %
quantile of a picture's valid pixels, q1 and q99, are -1 (near) and 1 (far):
    x = 2 (log d - q1) / (q99 - q1) - 1, clamped to [-1, 1]; invalid pixels are 1
So a prediction p gives log depth up to a scale and a shift. Marigold's protocol fits both to the true depth d* by least
squares over a picture's valid pixels, and clips the result to the data set's range:
    scale, shift = argmin sum (scale p + shift - log d*)^2        d = exp(scale p + shift)
    AbsRel = mean |d - d*| / d*        delta1 = share of pixels with max(d / d*, d* / d) < 1.25
Both are means over the pixels of a picture, then over pictures.
"""
import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import SUFFIXES, crop_box, files_in, open_rgb, pictures_in, progress, save_picture, to_tensor
from diff2flow import OBJECTIVES
from files import check_range, check_replaceable, cli, read_text, replacing
from sample import draw, find_files, in_words, load_flow, noises, pick_device, pick_precision
from toy.scenes import Scenes

HYPERSIM_WIDTH, HYPERSIM_HEIGHT, HYPERSIM_FOCAL = 1024, 768, 886.81     # pixels


class Layout(NamedTuple):
    """Where a data set has its depth files, and what they hold. All lengths are in metres."""
    depth: str                      # pattern that the end of a depth file's path matches
    to_picture: tuple               # (old, new) parts: new ones make it the picture's path; (): the suffix differs
    unit: float                     # what the number 1 in a depth file means
    near: float                     # valid depth is above near and below far
    far: float


LAYOUTS = [
    Layout(r"_geometry_hdf5/frame\.\d+\.depth_meters\.hdf5$",               # Hypersim, as it is published
           (("_geometry_hdf5/", "_final_preview/"), (".depth_meters.hdf5", ".tonemap.jpg")), 1.0, 1e-5, 65.0),
    Layout(r"/depth_plane_cam_\d+_fr\d+\.png$", (("/depth_plane_", "/rgb_"),), 1e-3, 1e-5, 65.0),   # as Marigold's PNGs
    Layout(r"/frames/depth/Camera_\d/depth_\d+\.png$",                      # Virtual KITTI 2, whose sky is at 655 m
           (("/frames/depth/", "/frames/rgb/"), ("/depth_", "/rgb_"), (".png", ".jpg")), 1e-2, 1e-5, 80.0),
    Layout(r"\.(npy|png)$", (), 1.0, 0.0, math.inf),                        # NAME.npy or NAME.png beside NAME.jpg
]


def picture_of(path, layout, files):
    """The picture of a depth file -> its path, or None if it is not among the files."""
    stem, end = os.path.splitext(path)
    pictures = [stem + suffix for suffix in SUFFIXES if suffix != end]
    if layout.to_picture:
        for old, new in layout.to_picture:
            path = new.join(path.rsplit(old, 1))
        pictures = [path]
    return next((picture for picture in pictures if picture in files), None)


def find_depth(folder):
    """A folder in one of LAYOUTS -> list of (picture, depth file, layout)."""
    folder, found = Path(folder), []
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}: give a folder of depth data")
    files = files_in(folder)
    there, ends = set(files), (".hdf5", ".npy", ".png")
    for path in progress([path for path in files if path.endswith(ends)], "matching depth files", unit="file"):
        layout = next((layout for layout in LAYOUTS if re.search(layout.depth, path)), None)
        if layout is not None and (picture := picture_of(path, layout, there)) is not None:
            found.append((Path(picture), Path(path), layout))
    if not found:
        raise ValueError(f"{folder} has no picture with a depth file: Hypersim, Virtual KITTI 2, or NAME.jpg with "
                         "NAME.npy or a 16-bit NAME.png")
    return found


def planar_depth(distance):
    """Hypersim's distance from the camera's centre (768, 1024) -> depth along the viewing axis."""
    x = np.arange(HYPERSIM_WIDTH) - (HYPERSIM_WIDTH - 1) / 2
    y = np.arange(HYPERSIM_HEIGHT) - (HYPERSIM_HEIGHT - 1) / 2
    return distance * (HYPERSIM_FOCAL / np.sqrt(x[None] ** 2 + y[:, None] ** 2 + HYPERSIM_FOCAL**2))


def read_hdf5(path):
    """-> Hypersim's distances (768, 1024). ValueError if they lie in other files, which an .hdf5 can name."""
    import h5py
    with h5py.File(path) as file:
        link = file.get("dataset", getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(file["dataset"], h5py.Dataset):
            raise ValueError("its 'dataset' is a link, to another file perhaps, or no array: Hypersim's hold the array")
        dataset = file["dataset"]
        if dataset.external or dataset.is_virtual:
            raise ValueError("its array is stored in other files, which are not read: Hypersim's hold the array")
        if dataset.shape != (HYPERSIM_HEIGHT, HYPERSIM_WIDTH) or dataset.dtype.kind != "f":
            raise ValueError(f"{dataset.dtype} {dataset.shape}: Hypersim's are floats ({HYPERSIM_HEIGHT}, "
                             f"{HYPERSIM_WIDTH})")
        return np.asarray(dataset)


def read_depth(path, unit=1.0):
    """A .npy, a 16-bit .png or Hypersim's .hdf5, whose numbers are `unit` metres each -> float32 (H, W), not masked."""
    path = Path(path)
    try:
        if path.suffix == ".hdf5":
            depth = planar_depth(read_hdf5(path))
        elif path.suffix == ".npy":
            depth = np.load(path, mmap_mode="r", allow_pickle=False).squeeze()
        else:
            with Image.open(path) as image:
                if not image.mode.startswith("I"):
                    raise ValueError(f"a picture of mode {image.mode}, where depth is a 16-bit grey PNG, or a .npy")
                depth = np.asarray(image)
    except ImportError:
        raise ValueError(f"{path}: reading Hypersim's .hdf5 files takes h5py: pip install h5py") from None
    except Exception as error:      # damaged bytes can raise anything in a parser
        raise ValueError(f"{path} cannot be read as depth: {error}") from error
    if depth.ndim != 2 or not depth.size:
        raise ValueError(f"{path} has the shape {depth.shape}: depth is one number a pixel, (height, width)")
    if depth.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {depth.dtype}: depth is a real number a pixel; save it as float32")
    with np.errstate(over="ignore"):    # what float32 cannot hold becomes infinite, which is no valid depth
        return depth.astype(np.float32) * np.float32(unit)


def normalise_depth(depth, valid):
    """depth, valid (1, H, W) -> log depth (1, H, W), 1 % and 99 % quantiles at -1 and 1; invalid pixels are 1."""
    log_depth = depth.clamp(min=1e-6).log()
    low, high = np.quantile(log_depth[valid].numpy(), [0.01, 0.99]) if valid.any() else (0.0, 1.0)
    return torch.where(valid, (2 * (log_depth - low) / max(high - low, 1e-3) - 1).clamp(-1, 1), 1.0)


class DepthFolders(torch.utils.data.Dataset):
    """Pictures with depth: image (3, H, W), depth (1, H, W) by normalise_depth, valid (1, H, W), caption "".

    Item `key` is drawn by (seed, key): first a folder by its weight (default: its number of pictures), then a picture
    of it, which is scaled to cover height x width, cropped and flipped. Where no pixel of a picture has a valid depth,
    the folder's next one takes its place.
    """

    def __init__(self, folders, weights, height, width, seed=0):
        if weights and (len(weights) != len(folders) or not all(0 < weight <= 1e9 for weight in weights)):
            raise ValueError(f"--weights {' '.join(map(str, weights))} for {len(folders)} folders: one for each, above "
                             "0 and at most 1e9")
        self.height, self.width, self.seed = height, width, seed
        self.folders, self.empty = [find_depth(folder) for folder in folders], set()    # depth files without a depth
        weights = np.array(weights or [len(found) for found in self.folders], np.float64)
        self.weights = weights / weights.sum()

    def __len__(self):
        return sum(len(found) for found in self.folders)

    def __getitem__(self, key):
        rng = np.random.default_rng((self.seed, key))
        found = self.folders[rng.choice(len(self.folders), p=self.weights)]
        picture, path, depth, valid = self.first_valid(found, int(rng.integers(len(found))))
        image = open_rgb(picture)
        if image.size != depth.shape[::-1]:
            raise ValueError(f"{picture} is {image.width}x{image.height}, its depth {path} "
                             f"{depth.shape[1]}x{depth.shape[0]}")
        box = left, top, right, bottom = crop_box(image, self.height, self.width, rng.random(), rng.random())
        columns = left + (np.arange(self.width) + 0.5) * (right - left) / self.width
        rows = top + (np.arange(self.height) + 0.5) * (bottom - top) / self.height
        pixels = rows.astype(int)[:, None], columns.astype(int)             # the nearest: a mean would blur edges
        depth, valid = torch.from_numpy(depth[pixels])[None], torch.from_numpy(valid[pixels])[None]     # (1, H, W)
        image = to_tensor(image.resize((self.width, self.height), Image.LANCZOS, box=box))
        depth = normalise_depth(torch.where(valid, depth, 1.0), valid)
        if rng.random() < 0.5:
            image, depth, valid = image.flip(-1), depth.flip(-1), valid.flip(-1)
        return {"image": image, "depth": depth, "valid": valid, "caption": ""}

    def first_valid(self, found, i):
        """The first from the i-th on that has a valid pixel -> its picture, its file, depth (H, W), valid (H, W)."""
        for step in range(len(found)):
            picture, path, layout = found[(i + step) % len(found)]
            if path in self.empty:
                continue
            depth = read_depth(path, layout.unit)
            valid = np.isfinite(depth) & (depth > layout.near) & (depth < layout.far)
            if valid.any():
                return picture, path, depth, valid
            self.empty.add(path)
            print(f"warning: {path}: no pixel has a valid depth ({layout.near:g} to {layout.far:g} m), taking the next "
                  "picture", file=sys.stderr)
        raise ValueError(f"none of the {len(found)} depth files has a valid pixel, last {path}: are they in another "
                         "unit?")


class DepthScenes(Scenes):
    """The procedural scenes of toy/scenes.py, with items like those of DepthFolders."""

    def __getitem__(self, key):
        item = super().__getitem__(key)
        valid = torch.ones_like(item["depth"], dtype=torch.bool)
        return {"image": item["image"], "depth": normalise_depth(item["depth"], valid), "valid": valid, "caption": ""}


@torch.no_grad()
def predict(sd, flow, image, steps, ensemble=1, seed=0, size=None):
    """PIL image -> its log depth (H, W) in [-1, 1], near to far: the mean of `ensemble` samples.

    The network sees the image at `size` ([side] or [height, width] in pixels), or if that is None with as many pixels
    as in training, in the image's own shape.
    """
    height, width = sd.picture_size(size)
    if size is None:
        zoom = math.sqrt(height * width / (image.height * image.width))
        height, width = (max(1, round(side * zoom / sd.multiple)) * sd.multiple for side in (image.height, image.width))
    latents = sd.encode(to_tensor(image.resize((width, height), Image.LANCZOS))[None]).float()
    samples = []
    for x0 in noises(range(ensemble), latents.shape[1:], seed):
        grey = draw(sd, flow, x0[None], latents, steps)                     # (1, 3, height, width)
        samples.append(grey.cpu().mean((0, 1)))                             # (height, width)
    depth = torch.stack(samples).mean(0)[None, None]
    depth = F.interpolate(depth, (image.height, image.width), mode="bilinear", antialias=True)
    return depth[0, 0].clamp(-1, 1)


def colour_depth(depth):
    """depth (H, W) from -1 near to 1 far -> uint8 (H, W, 3): yellow near, through red and violet, to black far."""
    colours = np.array([(252, 253, 191), (254, 159, 109), (222, 73, 104), (140, 41, 129), (59, 15, 112), (0, 0, 4)])
    positions = np.linspace(-1, 1, len(colours))
    return np.stack([np.interp(depth, positions, channel) for channel in colours.T], -1).round().astype(np.uint8)


def check_depth_files(stem):
    """ValueError if save_depth would replace another program's file. A .npy names no maker: the picture beside it does.
    """
    picture, array = Path(f"{stem}_16bit.png"), Path(f"{stem}.npy")
    check_replaceable(picture)
    check_replaceable(f"{stem}_colour.png")
    if array.exists() and not picture.exists():
        raise ValueError(f"{array} is there already, perhaps the true depth of a picture: choose another --out")


def save_depth(stem, depth, making):
    """depth (H, W) in [-1, 1] -> stem.npy (float32), stem_16bit.png (0 near to 65535 far), stem_colour.png."""
    levels = ((depth + 1) * 32767.5).round().astype(np.uint16)
    save_picture(f"{stem}_16bit.png", Image.fromarray(levels), making)
    save_picture(f"{stem}_colour.png", Image.fromarray(colour_depth(depth)), making)
    with replacing(f"{stem}.npy") as temporary:
        np.save(temporary, depth.astype(np.float32))


def find_pictures(paths):
    """Pictures, and folders of pictures -> {where the depth goes, below --out and without suffix: picture}."""
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file")
        pictures, folder = (pictures_in(path), path) if path.is_dir() else ([path], path.parent)
        if not pictures:
            raise ValueError(f"{path} has no picture: give a folder with {' '.join(SUFFIXES)} files")
        for picture in pictures:
            name = picture.relative_to(folder).with_suffix("")
            if name in found:
                raise ValueError(f"{found[name]} and {picture} would be written to the same {name}.npy: "
                                 "give each an --out of its own")
            found[name] = picture
    return found


def predict_pictures(args):
    """Write the depth of all pictures that args.inputs names into the folder args.out."""
    pictures, out, device = find_pictures(args.inputs), Path(args.out), pick_device(args.device)
    precision, autocast = pick_precision(args.precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for name in pictures:
        check_depth_files(out / name)
    args.ckpt, args.lora, args.use_ema = find_files(args.ckpt, args.lora, args.use_ema, task="depth")
    sd, flow = load_flow(args.ckpt, args.lora, device=device, dtype=dtype, task="depth", objective=args.objective,
                         prediction=args.prediction, use_ema=args.use_ema)
    sd.pack()
    sd.picture_size(args.size)      # a size that does not fit is an error here, before anything is written
    out.mkdir(parents=True, exist_ok=True)
    making = in_words(args, sd, flow, "depth", Ensemble=args.ensemble)
    print(f"depth of {len(pictures)} pictures, {args.steps} steps, mean of {args.ensemble} samples, seed {args.seed}")
    for name, path in tqdm(pictures.items(), "depth", unit="picture", dynamic_ncols=True):
        with autocast:
            depth = predict(sd, flow, open_rgb(path), args.steps, args.ensemble, args.seed, args.size)
        save_depth(out / name, depth.numpy(), making)
    print(f"{out / name}.npy ... depth of {len(pictures)} pictures")


class Protocol(NamedTuple):
    """What a data set's depth files hold, in metres, and the part of a picture that counts."""
    unit: float                     # what the number 1 in a depth file means
    near: float                     # valid depth is above near and below far
    far: float
    rows: slice = slice(None)
    columns: slice = slice(None)
    shape: tuple = ()               # height and width of all its depth files; (): they differ, or are the user's own


KITTI_CROP = (352, 1216)            # height and width of the benchmark's crop; Eigen's crop below lies in it
ETH3D_SHAPE = (4032, 6048)          # height and width: its files have no header
PROTOCOLS = {
    "nyu": Protocol(1e-3, 1e-3, 10.0, slice(45, 471), slice(41, 601), (480, 640)),      # Eigen's crop
    "scannet": Protocol(1e-3, 1e-3, 10.0),
    "kitti": Protocol(1 / 256, 1e-5, 80.0, slice(117, 321), slice(43, 1172)),
    "eth3d": Protocol(1.0, 1e-5, math.inf),
    "diode": Protocol(1.0, 0.6, 350.0, shape=(768, 1024)),
    "plain": Protocol(1.0, 1e-5, math.inf),
}
SPACES = {                          # of the fit: from depth to it, and back
    "log": (np.log, np.exp),
    "depth": (np.asarray, np.asarray),
    "disparity": (np.reciprocal, lambda disparity: 1 / disparity.clip(min=1e-3)),
}


def kitti_crop(depth):
    """The benchmark's crop: the lowest rows, the middle columns."""
    height, width = KITTI_CROP
    top, left = depth.shape[0] - height, (depth.shape[1] - width) // 2
    if min(top, left) < 0:
        raise ValueError(f"{depth.shape[0]}x{depth.shape[1]} pixels are fewer than KITTI's {height}x{width}: the crop "
                         "is made here, so predict on the full pictures")
    return depth[top:, left:left + width]


def read_mask(path, shape):
    """DIODE's file of which pixels count -> bool of that shape (H, W)."""
    try:
        mask = np.load(path, allow_pickle=False).squeeze()
    except Exception as error:      # damaged bytes can raise anything in a parser
        raise ValueError(f"{path} cannot be read as a mask: {error}") from error
    if mask.shape != shape:
        raise ValueError(f"{path}: a mask of the shape {mask.shape} for a depth of {shape}")
    return mask.astype(bool)


def read_truth(folder, dataset, name, mask=None, unit=None):
    """The depth file `name` in `folder` -> depth (H, W) in metres, valid (H, W).

    mask: the file of DIODE's mask; unit: metres, where it is not the data set's own.
    """
    path, protocol = Path(folder) / name, PROTOCOLS[dataset]
    if dataset == "eth3d":
        depth = np.fromfile(path, np.float32)
        if depth.size != math.prod(ETH3D_SHAPE):
            raise ValueError(f"{path} holds {depth.size} numbers, not ETH3D's {ETH3D_SHAPE[0]}x{ETH3D_SHAPE[1]}")
        depth = depth.reshape(ETH3D_SHAPE)
    else:
        depth = read_depth(path, protocol.unit if unit is None else unit)
    if protocol.shape and depth.shape != protocol.shape:
        raise ValueError(f"{path} is {depth.shape[0]}x{depth.shape[1]}, where the depth of {dataset} is "
                         f"{protocol.shape[0]}x{protocol.shape[1]}: give the right --dataset, or plain for your own")
    if dataset == "kitti":
        depth = kitti_crop(depth)
    counts = np.zeros(depth.shape, bool)
    counts[protocol.rows, protocol.columns] = True
    if dataset == "diode" and mask is not None:
        counts &= read_mask(Path(folder) / mask, depth.shape)
    valid = counts & np.isfinite(depth) & (depth > protocol.near) & (depth < protocol.far)
    return np.where(valid, depth, 1).astype(np.float64), valid


def align(prediction, truth, valid, space):
    """The least-squares scale and shift of the prediction to the truth in `space` -> depth (H, W) in metres."""
    forward, back = SPACES[space]
    system = np.stack([prediction[valid], np.ones(valid.sum())], 1)
    scale, shift = np.linalg.lstsq(system, forward(truth[valid]), rcond=None)[0]
    return back(scale * prediction + shift)


def depth_errors(prediction, truth, valid, near, far):
    """Aligned prediction, truth (H, W) in metres -> {"absrel", "delta1", "rmse"} over the valid pixels."""
    d, d_true = prediction.clip(near, far).clip(min=1e-6)[valid], truth[valid]
    return {"absrel": np.mean(np.abs(d - d_true) / d_true),
            "delta1": np.mean(np.maximum(d / d_true, d_true / d) < 1.25),
            "rmse": np.sqrt(np.mean((d - d_true) ** 2))}


def read_list(path):
    """Marigold's list of files -> list of (picture, depth file, mask file or None). Pictures without truth are left
    out: the list has "None" in place of their depth file."""
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    if short := [line for line in lines if len(line) < 2]:
        raise ValueError(f"{path}: a line has a picture and its depth file, not {short[0][0]!r:.80} alone")
    return [(line[0], line[1], line[2] if len(line) > 2 else None) for line in lines if line[1] != "None"]


def measure(args):
    """Print the mean errors of the predictions in the folder that args.inputs names."""
    if len(args.inputs) != 1:
        raise ValueError(f"--truth measures one folder of predictions, not {len(args.inputs)}")
    predictions, root, protocol, errors = Path(args.inputs[0]), Path(args.truth), PROTOCOLS[args.dataset], []
    if args.list is None:
        entries = [(picture.relative_to(root), path.relative_to(root), None) for picture, path, _ in find_depth(root)]
    else:
        entries = read_list(args.list)
    for picture, name, mask in tqdm(entries, "depth", dynamic_ncols=True):
        truth, valid = read_truth(root, args.dataset, name, mask, args.scale)
        path = (predictions / picture).with_suffix(".npy")
        prediction = read_depth(path).astype(np.float64)
        if not np.isfinite(prediction).all():
            raise ValueError(f"{path} holds NaN or infinity, which is no prediction of depth.py: make it again")
        if args.dataset == "kitti" and prediction.shape != truth.shape:
            prediction = kitti_crop(prediction)
        if prediction.shape != truth.shape:
            prediction = F.interpolate(torch.from_numpy(prediction)[None, None], truth.shape, mode="bilinear",
                                       antialias=True)[0, 0].numpy()
        if valid.any():
            aligned = align(prediction, truth, valid, args.align)
            errors.append(depth_errors(aligned, truth, valid, protocol.near, protocol.far))
    if not errors:
        raise ValueError(f"{root}: no picture with a valid depth")
    means = {name: float(np.mean([error[name] for error in errors])) for name in errors[0]}
    print(f"{len(errors)} of {len(entries)} pictures, aligned in {args.align}: AbsRel {means['absrel']:.4f}, "
          f"delta1 {means['delta1']:.4f}, RMSE {means['rmse']:.4f} m")
    settings = {name: vars(args)[name] for name in ("truth", "dataset", "list", "align", "scale")}
    print(json.dumps({"predictions": str(predictions), **settings, "images": len(errors), **means}))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="pictures, or folders of pictures, whose depth is "
                        "predicted; with --truth, the folder of predictions that is measured")
    add = parser.add_argument_group("prediction").add_argument
    add("--ckpt", help="Stable Diffusion checkpoint (default: that of the newest depth run, or of --lora)")
    add("--lora", help="LoRA file of train.py --task depth (default: the newest depth run's, if --ckpt is not given)")
    add("--use-ema", action="store_true", help="read the EMA weights of a checkpoint that has both")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: what the file says)")
    add("--objective", choices=list(OBJECTIVES), help="how to sample (default: diff2flow, which is Algorithm 2, but "
        "models of fm and fm-flip as they were trained)")
    add("--steps", type=int, default=10, help="Euler steps from noise to depth (default: 10)")
    add("--ensemble", type=int, default=1, help="number of samples whose mean is the prediction (default: 1)")
    add("--size", type=int, nargs="+", help="pixels at which the network sees a picture: one number, or height and "
        "width (default: as many as in training, in the picture's own shape)")
    add("--precision", choices=["bf16", "fp32"],
        help="number format (default: bf16 where the device computes it, else fp32)")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", default="depth", help="folder for NAME.npy (log depth, -1 near to 1 far), NAME_16bit.png (0 near to "
        "65535 far) and NAME_colour.png, each of its picture's size (default: depth)")
    add = parser.add_argument_group("measuring").add_argument
    add("--truth", help="folder of the data set as Marigold distributes it, or of pictures with depth files")
    add("--dataset", choices=list(PROTOCOLS), default="plain", help="data set whose units, valid range and crop are "
        "used; plain has metres and no crop (default: plain)")
    add("--list", help="Marigold's list of files, each line a picture, its depth file and perhaps a mask (default: all "
        "pictures with depth files in the folder)")
    add("--align", choices=list(SPACES), default="log", help="space of the least-squares fit (default: log, which our "
        "models predict)")
    add("--scale", type=float, help="metres that the number 1 in a depth file means (default: the data set's)")
    return parser.parse_args()


def main():
    args = arguments()
    check_range(args, 1, 1e9, "steps", "ensemble")
    check_range(args, 0, 2**32, "seed")
    check_range(args, 1e-12, 1e12, "scale")
    if args.truth is not None:
        measure(args)
    elif args.list is not None or args.dataset != "plain":
        raise ValueError("--list and --dataset are for measuring: give --truth FOLDER too")
    else:
        predict_pictures(args)


if __name__ == "__main__":
    cli(main)
