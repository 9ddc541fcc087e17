"""Image to depth (Sec. 4.3): data sets with depth for train.py --task depth, and the depth of your pictures.

    python depth.py a.jpg photos/ --steps 10 --ensemble 4 --lora runs/NAME/lora.safetensors --out depth/

A model learns log depth, normalised per picture so that the 1 % and the 99 % quantile of its valid pixels, q1 and q99,
are -1 (near) and 1 (far):
    x = 2 (log d - q1) / (q99 - q1) - 1, clamped to [-1, 1]; invalid pixels are 1
So a prediction gives log depth up to a scale and a shift. tools/measure_depth.py compares it with the true depth.
"""
import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import crop_box, hash_of_name, noises, to_pixels, to_tensor
from diff2flow import OBJECTIVES
from support.decode import SUFFIXES, open_rgb
from support.depth_files import find_depth, read_depth
from support.files import check_range, check_replaceable, cli, parse, remove_partial, replacing, try_writing
from support.folders import pictures_in
from support.load import check_drawn, find_files, load_flow, pick_device, pick_precision, picture_size
from support.packed import pack
from support.pictures import save_picture, settings_text
from toy.scenes import Scenes


def normalise_depth(depth, valid):
    """depth, valid (1, H, W) -> log depth (1, H, W), 1 % and 99 % quantiles at -1 and 1; invalid pixels are 1."""
    log_depth = depth.clamp(min=1e-6).log()
    low, high = np.quantile(log_depth[valid].numpy(), [0.01, 0.99]) if valid.any() else (0.0, 1.0)
    return torch.where(valid, (2 * (log_depth - low) / max(high - low, 1e-3) - 1).clamp(-1, 1), 1.0)


class DepthFolders(torch.utils.data.Dataset):
    """Pictures with depth: image, uint8 (3, H, W); depth (1, H, W) by normalise_depth; valid (1, H, W); caption "".

    Item `key` is random by (seed, key): a folder by its weight (default: its number of pictures), a picture in it, a
    crop and a flip. A picture that cannot be used is replaced by the next one in its folder.
    """

    def __init__(self, folders, weights, height, width, seed=0):
        if weights and (len(weights) != len(folders) or not all(0 < weight <= 1e9 for weight in weights)):
            raise ValueError(f"--weights {' '.join(map(str, weights))} for {len(folders)} folders: one per folder, "
                             "above 0 and at most 1e9")
        self.height, self.width, self.seed = height, width, seed
        self.folders, self.unusable = [find_depth(folder) for folder in folders], {}     # {depth file: why}
        self.roots, self.source = folders, " ".join(map(str, folders))
        weights = np.array(weights or [len(found) for found in self.folders], np.float64)
        self.weights = weights / weights.sum()

    @property
    def words(self):
        return f"{len(self):,} pictures with depth in {self.source}"

    def hold_out(self, n):
        """Take min(n, a tenth) of each folder's pictures out, by a hash of their names -> n items of those with valid
        depth, and words for what they are. If there are none, the items are training pictures."""
        held_out = []
        for i, found in enumerate(self.folders):
            by_hash = sorted(found, key=lambda entry: hash_of_name(os.path.relpath(entry[0], self.roots[i])))
            count = min(n, len(found) // 10)
            held_out += [entry for entry in by_hash[:count] if self.read(entry) is not None]
            self.folders[i] = sorted(by_hash[count:])
        if not held_out:
            return [self[i] for i in range(n)], "training pictures, too few to hold any out"
        entries = [held_out[i % len(held_out)] for i in range(n)]
        items = [self.crop(*self.read(entry), np.random.default_rng((0, i)))        # the same in every run
                 for i, entry in enumerate(entries)]
        return items, f"{len(held_out)} held-out pictures"

    def __len__(self):
        return sum(len(found) for found in self.folders)

    def __getitem__(self, key):
        rng = np.random.default_rng((self.seed, key))
        found = self.folders[rng.choice(len(self.folders), p=self.weights)]
        start = int(rng.integers(len(found)))
        for step in range(len(found)):
            entry = found[(start + step) % len(found)]
            if entry[1] not in self.unusable and (read := self.read(entry)) is not None:
                return self.crop(*read, rng)
        raise ValueError(f"none of the {len(found)} pictures with depth can be used, last: {self.unusable[entry[1]]}")

    def read(self, entry):
        """-> image, depth (H, W), valid (H, W) of (picture, depth file, layout); None, with one warning, if a file is
        damaged, if their sizes differ, or if no depth is valid."""
        picture, path, layout = entry
        try:
            depth, image = read_depth(path, layout.unit), open_rgb(picture)
            valid = np.isfinite(depth) & (depth > layout.near) & (depth < layout.far)
            if image.size != depth.shape[::-1]:
                raise ValueError(f"{picture} is {image.width}x{image.height}, its depth {path} "
                                 f"{depth.shape[1]}x{depth.shape[0]}")
            if not valid.any():
                raise ValueError(f"{path}: no pixel has a valid depth ({layout.near:g} to {layout.far:g} m)")
            return image, depth, valid
        except ValueError as error:
            if path not in self.unusable:
                print(f"warning: {error}; using another picture", file=sys.stderr)
            self.unusable[path] = str(error)

    def crop(self, image, depth, valid, rng):
        """-> an item, cropped and flipped at random."""
        box = left, top, right, bottom = crop_box(image, self.height, self.width, rng.random(), rng.random())
        columns = left + (np.arange(self.width) + 0.5) * (right - left) / self.width
        rows = top + (np.arange(self.height) + 0.5) * (bottom - top) / self.height
        pixels = rows.astype(int)[:, None], columns.astype(int)             # the nearest: a mean would blur edges
        depth, valid = torch.from_numpy(depth[pixels])[None], torch.from_numpy(valid[pixels])[None]     # (1, H, W)
        image = to_pixels(image.resize((self.width, self.height), Image.LANCZOS, box=box))
        depth = normalise_depth(torch.where(valid, depth, 1.0), valid)
        if rng.random() < 0.5:
            image, depth, valid = image.flip(-1), depth.flip(-1), valid.flip(-1)
        return {"image": image, "depth": depth, "valid": valid, "caption": ""}


class DepthScenes(Scenes):
    """The procedural scenes of toy/scenes.py, as items of DepthFolders."""

    def __getitem__(self, key):
        item = super().__getitem__(key)
        valid = torch.ones_like(item["depth"], dtype=torch.bool)
        return {"image": item["image"], "depth": normalise_depth(item["depth"], valid), "valid": valid, "caption": ""}


@torch.no_grad()
def predict(sd, flow, image, steps, ensemble=1, seed=0, size=None):
    """PIL image -> its log depth (H, W) in [-1, 1], near to far: the mean of `ensemble` samples.

    The image is scaled to `size` ([side] or [height, width] in pixels). None keeps its shape, and takes as many pixels
    as in training.
    """
    height, width = picture_size(sd, size)
    if size is None:
        zoom = math.sqrt(height * width / (image.height * image.width))
        height, width = (max(1, round(side * zoom / sd.multiple)) * sd.multiple for side in (image.height, image.width))
    latents = sd.encode(to_tensor(image.resize((width, height), Image.LANCZOS))[None]).float()
    samples = []
    for x0 in noises(range(ensemble), latents.shape[1:], seed):
        x1 = flow.sample(x0[None].to(sd.device), latents, steps)            # (1, z, h, w)
        drawn = sd.decode(x1).float().cpu()
        check_drawn(sd, x1, drawn)
        samples.append(drawn.mean((0, 1)))                                  # (height, width)
    depth = torch.stack(samples).mean(0)[None, None]
    depth = F.interpolate(depth, (image.height, image.width), mode="bilinear", antialias=True)
    return depth[0, 0].clamp(-1, 1)


def colour_depth(depth):
    """depth (H, W), -1 near to 1 far -> uint8 (H, W, 3), from yellow (near) through red and violet to black (far)."""
    colours = np.array([(252, 253, 191), (254, 159, 109), (222, 73, 104), (140, 41, 129), (59, 15, 112), (0, 0, 4)])
    positions = np.linspace(-1, 1, len(colours))
    return np.stack([np.interp(depth, positions, channel) for channel in colours.T], -1).round().astype(np.uint8)


def check_depth_files(stem):
    """ValueError if save_depth would replace another program's file. A .npy has no metadata, but the picture beside it.
    """
    picture, array = Path(f"{stem}_16bit.png"), Path(f"{stem}.npy")
    check_replaceable(picture)
    check_replaceable(f"{stem}_colour.png")
    if array.exists() and not picture.exists():
        raise ValueError(f"{array} exists already, perhaps the true depth of a picture: choose another --out")


def save_depth(stem, depth, making):
    """Write depth (H, W) in [-1, 1] as stem.npy (float32), stem_16bit.png (0 near to 65535 far), stem_colour.png."""
    levels = ((depth + 1) * 32767.5).round().astype(np.uint16)
    save_picture(f"{stem}_16bit.png", Image.fromarray(levels), making)
    save_picture(f"{stem}_colour.png", Image.fromarray(colour_depth(depth)), making)
    with replacing(f"{stem}.npy") as temporary:
        np.save(temporary, depth.astype(np.float32))


def find_pictures(paths):
    """Pictures, and folders of pictures -> {output path below --out, without suffix: picture}."""
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file")
        pictures, folder = (pictures_in(path), path) if path.is_dir() else ([path], path.parent)
        if not pictures:
            raise ValueError(f"{path} has no picture: pass a folder with {' '.join(SUFFIXES)} files")
        for picture in pictures:
            name = picture.relative_to(folder).with_suffix("")
            if name in found:
                raise ValueError(f"{found[name]} and {picture} would be written to the same {name}.npy: "
                                 "run them separately, each with its own --out")
            found[name] = picture
    return found


def predict_pictures(args):
    """Write the depth of all pictures in args.inputs to the folder args.out."""
    pictures, out, device = find_pictures(args.inputs), Path(args.out), pick_device(args.device)
    _, dtype = pick_precision(args.precision, device)
    for name in pictures:
        check_depth_files(out / name)
    args.ckpt, args.lora, args.use_ema = find_files(args.ckpt, args.lora, args.use_ema, task="depth")
    sd, flow = load_flow(args.ckpt, args.lora, device=device, dtype=dtype, task="depth", objective=args.objective,
                         prediction=args.prediction, use_ema=args.use_ema)
    pack(sd)
    picture_size(sd, args.size)     # a wrong size is an error before anything is written
    making = settings_text(args, sd, flow, "depth", Ensemble=args.ensemble)
    for name in {name.parent: name for name in pictures}.values():
        remove_partial((out / name).parent, "*.npy", "*_16bit.png", "*_colour.png")
        try_writing(f"{out / name}.npy", 10**6)         # an error now, not after the work
    print(f"depth of {len(pictures)} pictures, {args.steps} steps, mean of {args.ensemble} samples, seed {args.seed}")
    for name, path in tqdm(pictures.items(), "depth", unit="picture", dynamic_ncols=True):
        depth = predict(sd, flow, open_rgb(path), args.steps, args.ensemble, args.seed, args.size)
        save_depth(out / name, depth.numpy(), making)
    print(f"{out / name}.npy ... depth of {len(pictures)} pictures")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="pictures, or folders of pictures")
    add("--ckpt", help="Stable Diffusion checkpoint (default: that of the newest depth run, or of --lora)")
    add("--lora", action="append", metavar="FILE[:STRENGTH]", help="LoRA of train.py --task depth, with a strength "
        "(default: 1); repeat it for several (default: the newest depth run's, if --ckpt is not given)")
    add("--use-ema", action="store_true", help="load the EMA weights of a checkpoint that has both")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: from the file)")
    add("--objective", choices=list(OBJECTIVES), help="how to sample (default: diff2flow, which is Algorithm 2; for "
        "models of fm, fm-flip and rf as they were trained)")
    add("--steps", type=int, default=10, help="Euler steps from noise to depth (default: 10)")
    add("--ensemble", type=int, default=1, help="number of samples, whose mean is the prediction (default: 1)")
    add("--size", type=int, nargs="+", help="pixels to which a picture is scaled for the network: one number, or "
        "height width (default: as many as in training, in the picture's own shape)")
    add("--precision", choices=["bf16", "fp32"],
        help="of forward passes (default: bf16 where the device has it, else fp32)")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", default="depth", help="folder for NAME.npy (log depth, -1 near to 1 far), NAME_16bit.png (0 near to "
        "65535 far) and NAME_colour.png, each of its picture's size (default: depth)")
    return parse(parser)


def main():
    args = arguments()
    check_range(args, 1, 1e9, "steps", "ensemble")
    check_range(args, 0, 2**32 - 1, "seed")
    predict_pictures(args)


if __name__ == "__main__":
    cli(main)
