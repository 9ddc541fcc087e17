"""Errors of depth predictions, after a least-squares fit of scale and shift (Table 2).

    python -m tools.measure_depth depth/ --truth nyu/ --dataset nyu --list filename_list_test.txt

`depth/` is the --out of depth.py. A prediction p gives log depth up to a scale and a shift, which are fitted to the
true depth d* over a picture's valid pixels, in the space that --align names:
    log        scale, shift = argmin sum (scale p + shift - log d*)^2     d = exp(scale p + shift)
    depth      scale, shift = argmin sum (scale p + shift - d*)^2         d = scale p + shift
    disparity  scale, shift = argmin sum (scale p + shift - 1/d*)^2       d = 1 / (scale p + shift)
then d is clipped to the data set's range:
    AbsRel = mean |d - d*| / d*        delta1 = share of pixels with max(d / d*, d* / d) < 1.25
Both are means over the pixels of a picture, then over pictures.

The paper trains on log depth and aligns "with least squares fitting" in Marigold's evaluation suite; it gives no more
detail. `log`, the default, is the space of the training target. `depth` is what Marigold fits for its own models
(--alignment least_square). Which of the two is behind the paper's Table 2 is unknown.
"""
import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from support.depth_files import find_depth, read_depth
from support.files import check_range, cli, parse, read_text


class Protocol(NamedTuple):
    """The unit and valid range of a data set's depth, in metres, and the part of a picture that is evaluated."""
    unit: float                     # metres per number in a depth file
    near: float                     # valid depth is above near and below far
    far: float
    rows: slice = slice(None)
    columns: slice = slice(None)
    shape: tuple = ()               # height and width of all its depth files; (): they differ


KITTI_CROP = (352, 1216)            # height and width of the benchmark's crop, which contains Eigen's crop below
ETH3D_SHAPE = (4032, 6048)          # height and width: its files have no header
PROTOCOLS = {
    "nyu": Protocol(1e-3, 1e-3, 10.0, slice(45, 471), slice(41, 601), (480, 640)),      # Eigen's crop
    "scannet": Protocol(1e-3, 1e-3, 10.0),
    "kitti": Protocol(1 / 256, 1e-5, 80.0, slice(117, 321), slice(43, 1172)),
    "eth3d": Protocol(1.0, 1e-5, math.inf),
    "diode": Protocol(1.0, 0.6, 350.0, shape=(768, 1024)),
    "plain": Protocol(1.0, 1e-5, math.inf),
}
SPACES = {                          # of the fit: (depth -> space, space -> depth)
    "log": (np.log, np.exp),
    "depth": (np.asarray, np.asarray),
    "disparity": (np.reciprocal, lambda disparity: 1 / disparity.clip(min=1e-3)),
}


def kitti_crop(depth):
    """The benchmark's crop: the lowest rows, the middle columns."""
    height, width = KITTI_CROP
    top, left = depth.shape[0] - height, (depth.shape[1] - width) // 2
    if min(top, left) < 0:
        raise ValueError(f"{depth.shape[0]}x{depth.shape[1]} pixels are fewer than KITTI's {height}x{width}: this "
                         "program crops, so predict on the full pictures")
    return depth[top:, left:left + width]


def read_mask(path, shape):
    """DIODE's mask of valid pixels -> bool (H, W) of that shape."""
    try:
        mask = np.load(path, allow_pickle=False).squeeze()
    except Exception as error:      # damaged bytes can raise anything in a parser
        raise ValueError(f"{path} cannot be read as a mask: {error}") from error
    if mask.shape != shape:
        raise ValueError(f"{path}: a mask of the shape {mask.shape} for a depth of {shape}")
    return mask.astype(bool)


def read_truth(folder, dataset, name, mask=None, unit=None):
    """The depth file `name` in `folder` -> depth (H, W) in metres, valid (H, W).

    mask: the file of DIODE's mask; unit: metres per number, instead of the data set's own.
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
                         f"{protocol.shape[0]}x{protocol.shape[1]}: pass the right --dataset, or plain for your own")
    if dataset == "kitti":
        depth = kitti_crop(depth)
    counts = np.zeros(depth.shape, bool)
    counts[protocol.rows, protocol.columns] = True
    if dataset == "diode" and mask is not None:
        counts &= read_mask(Path(folder) / mask, depth.shape)
    valid = counts & np.isfinite(depth) & (depth > protocol.near) & (depth < protocol.far)
    return np.where(valid, depth, 1).astype(np.float64), valid


def align(prediction, truth, valid, space):
    """Fit scale and shift of the prediction to the truth in `space` by least squares -> depth (H, W) in metres."""
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
    """Marigold's list of files -> [(picture, depth file, mask file or None)], without pictures whose depth is
    "None"."""
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    if short := [line for line in lines if len(line) < 2]:
        raise ValueError(f"{path}: a line has a picture and its depth file, not {short[0][0]!r:.80} alone")
    return [(line[0], line[1], line[2] if len(line) > 2 else None) for line in lines if line[1] != "None"]


def measure(args):
    """Print the mean errors of the predictions in args.predictions."""
    predictions, root, protocol, errors = Path(args.predictions), Path(args.truth), PROTOCOLS[args.dataset], []
    if args.list is None:
        entries = [(picture.relative_to(root), path.relative_to(root), None) for picture, path, _ in find_depth(root)]
    else:
        entries = read_list(args.list)
    for picture, name, mask in tqdm(entries, "depth", dynamic_ncols=True):
        truth, valid = read_truth(root, args.dataset, name, mask, args.scale)
        path = (predictions / picture).with_suffix(".npy")
        prediction = read_depth(path).astype(np.float64)
        if not np.isfinite(prediction).all():
            raise ValueError(f"{path} has NaN or infinity, so it is not a prediction of depth.py: make it again")
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
    parser = argparse.ArgumentParser(prog="python -m tools.measure_depth", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("predictions", help="folder of predictions that depth.py wrote")
    add("--truth", required=True, help="folder of the data set as Marigold distributes it, or of pictures with depth "
        "files")
    add("--dataset", choices=list(PROTOCOLS), default="plain", help="data set whose units, valid range and crop are "
        "used; plain: metres, no crop (default: plain)")
    add("--list", help="Marigold's list of files, each line a picture, its depth file and perhaps a mask (default: all "
        "pictures with depth files in the folder)")
    add("--align", choices=list(SPACES), default="log", help="space of the least-squares fit (default: log)")
    add("--scale", type=float, help="metres per number in a depth file (default: the data set's)")
    return parse(parser)


def main():
    args = arguments()
    check_range(args, 1e-12, 1e12, "scale")
    measure(args)


if __name__ == "__main__":
    cli(main)
