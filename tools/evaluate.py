"""Measure sampled pictures as in the paper (Tables 1 and 3, Figure 5): FID, CLIP score, aesthetics score.

    python -m tools.evaluate samples/ --real val2017/ --inception weights.pth
    python -m tools.evaluate samples/ --clip ViT-L-14-quickgelu clip.pt --prompts captions.txt --aesthetics head.pth

FID         |m - m'|^2 + tr(C + C' - 2 sqrt(C C')), where m, C and m', C' are the means and covariances of Inception's
            features of the sampled and of the real pictures (torch-fidelity; lower is better)
CLIP score  mean cosine between CLIP's embeddings of each picture and of its prompt (open_clip; higher is better)
aesthetics  mean of LAION's predictor, a small network on CLIP's embedding of a picture (1 to 10; higher is better)

Only Inception's weights are downloaded, and only without --inception. The last line printed is JSON.
"""
import argparse
import json
import os
import re
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"      # before open_clip is imported, which may ask the Hugging Face hub for files

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from support.checkpoint import is_plain
from support.decode import SUFFIXES, open_rgb
from support.files import check_range, cli, open_tensors, parse, read_text
from support.folders import pictures_in
from support.load import pick_device

FID_NETWORK = "inception-v3-compat"     # torch-fidelity's copy of the original TensorFlow network


def natural_order(path):
    """-> key that sorts names as people count: 2.png before 10.png."""
    return [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)] for name in path.parts]


class CroppedPictures(torch.utils.data.Dataset):
    """The pictures of a folder in natural order: uint8 (3, H, W), centre-cropped and scaled to one size.

    size: (width, height) in pixels (None: the first picture's).
    """

    def __init__(self, folder, size=None):
        self.paths = sorted(pictures_in(folder), key=natural_order)
        if len(self.paths) < 2:
            raise ValueError(f"{folder} has {len(self.paths)} pictures ({' '.join(SUFFIXES)}): at least 2 are needed")
        self.size = open_rgb(self.paths[0]).size if size is None else size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        picture = ImageOps.fit(open_rgb(self.paths[i]), self.size, Image.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_weights(path):
    """A file of weights -> {name: tensor}, all finite. Never runs code from the file: ValueError if it contains any."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with open_tensors(path) as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}
        else:
            weights = torch.load(path, "cpu", weights_only=True)
    except Exception as error:                          # damaged bytes can raise anything in a parser
        if "TorchScript" in str(error):
            raise ValueError(f"{path}: a TorchScript archive, like OpenAI's CLIP files: it has code, which is not run; "
                             "use open_clip's .safetensors or .bin of the network from the Hugging Face hub") from error
        raise ValueError(f"{path}: not a file of plain tensors, damaged, or with code in it, which is not run "
                         f"({type(error).__name__}); get another copy, or save its state_dict again") from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not weights or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) and is_plain(tensor)
            for name, tensor in weights.items()):
        raise ValueError(f"{path}: it contains more than named tensors: save only the network's state_dict")
    for name, tensor in weights.items():
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path}: {name} has NaN or infinity: get another copy of the file")
    return weights


def fid(samples, real, inception, batch, device):
    """Two CroppedPictures -> their Frechet inception distance. inception: file of weights (None: download them)."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise ValueError("--real: FID takes torch-fidelity: pip install torch-fidelity") from None
    with tempfile.TemporaryDirectory() as folder:
        safe = None
        if inception is not None:       # torch-fidelity may run code in a file: give it a copy of the tensors alone
            safe = str(Path(folder) / "inception.pth")
            torch.save(read_weights(inception), safe)
        try:
            found = calculate_metrics(
                input1=samples, input2=real, fid=True, cuda=device.type == "cuda", batch_size=batch,
                feature_extractor=FID_NETWORK, feature_extractor_weights_path=safe, cache=False, verbose=False)
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            raise ValueError(f"--inception {inception}: not the weights of torch-fidelity's {FID_NETWORK}") from error
    return found["frechet_inception_distance"]


@torch.no_grad()
def embed_pictures(network, transform, paths, batch, device):
    """-> CLIP's embeddings of the pictures at `paths`, unit vectors (N, D)."""
    embeddings = []
    for start in tqdm(range(0, len(paths), batch), "CLIP", dynamic_ncols=True):
        pictures = torch.stack([transform(open_rgb(path)) for path in paths[start:start + batch]])
        embeddings.append(F.normalize(network.encode_image(pictures.to(device)).float(), dim=-1))
    return torch.cat(embeddings)


@torch.no_grad()
def embed_prompts(network, tokenizer, prompts, batch, device):
    """-> CLIP's embeddings of the prompts, unit vectors (N, D)."""
    embeddings = []
    for start in range(0, len(prompts), batch):
        tokens = tokenizer(prompts[start:start + batch]).to(device)
        embeddings.append(F.normalize(network.encode_text(tokens).float(), dim=-1))
    return torch.cat(embeddings)


def aesthetics_predictor(path, width):
    """LAION's predictor, linear layers without activations -> network: embeddings (N, width) -> scores (N, 1)."""
    weights, layers = read_weights(path), []
    try:
        for name in weights:
            if name.endswith("weight"):
                outputs, inputs = weights[name].shape
                layer = nn.Linear(inputs, outputs)
                layer.load_state_dict({"weight": weights[name], "bias": weights[name.removesuffix("weight") + "bias"]})
                layers.append(layer)
        network = nn.Sequential(*layers).requires_grad_(False)
        assert network(torch.zeros(1, width)).shape == (1, 1)
    except (ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path}: not linear layers from CLIP's {width} numbers to one score: use LAION's predictor "
                         "for the network that --clip names") from error
    return network


def load_clip(name, path, device):
    """open_clip's name of a network, and the file of its weights -> the network, and its picture transform."""
    with tempfile.TemporaryDirectory() as folder:
        safe = str(Path(folder) / "clip.pth")           # open_clip may run code in a file: give it the tensors
        torch.save(read_weights(path), safe)
        try:
            network, _, transform = open_clip.create_model_and_transforms(name, pretrained=safe, device=device)
        except Exception as error:                      # the error for wrong weights depends on the network
            raise ValueError(f"--clip {name} {path}: not the weights of that network, or open_clip has no network of "
                             f"that name ({str(error)[:200]})") from error
    return network.eval(), transform


def clip_results(samples, clip, prompts, aesthetics, batch, device):
    """-> {"clip_score"} if there are prompts, {"aesthetics_score"} if there is a predictor, or both.

    clip: open_clip's name of a network, and the file of its weights; prompts: one per picture, or []; aesthetics: the
    file of the predictor's weights, or None.
    """
    name, weights = clip
    network, transform = load_clip(name, weights, device)
    pictures, results = embed_pictures(network, transform, samples.paths, batch, device), {}
    if prompts:
        texts = embed_prompts(network, open_clip.get_tokenizer(name), prompts, batch, device)
        results["clip_score"] = (pictures * texts).sum(1).mean().item()
    if aesthetics is not None:
        predictor = aesthetics_predictor(aesthetics, pictures.shape[1]).to(device)
        results["aesthetics_score"] = predictor(pictures).mean().item()
    return results


def read_prompts(path, pictures):
    """A text file -> its lines, the prompts of the pictures at these paths. ValueError if their numbers differ, or if
    the order of the pictures is unclear."""
    prompts = read_text(path).splitlines()
    if len(prompts) != len(pictures):
        raise ValueError(f"--prompts {path}: {len(prompts)} lines for {len(pictures)} pictures: line i must be the "
                         "prompt of picture i")
    for one, next_one in zip(pictures, pictures[1:]):
        if natural_order(one.with_suffix("")) == natural_order(next_one.with_suffix("")):
            raise ValueError(f"--prompts {path}: does {one} or {next_one} come first? Give them different "
                             "numbers")
    print(f"prompts, by the numbers in file names: {prompts[0]!r:.60} for {pictures[0].name}, ..., "
          f"{prompts[-1]!r:.60} for {pictures[-1].name}")
    return prompts


def hub_files(name, for_prompts):
    """-> what open_clip's network of that name would fetch from the Hugging Face hub: a text network, a tokenizer."""
    config = open_clip.get_model_config(name.replace("/", "-")) or {}
    parts = ["hf_model_name", *(["hf_tokenizer_name"] if for_prompts else [])]
    return [config["text_cfg"][part] for part in parts if config.get("text_cfg", {}).get(part)]


def check(args):
    """ValueError for options that do not fit together, and for missing files of weights."""
    check_range(args, 1, 1e9, "batch")
    measures_clip = args.prompts is not None or args.aesthetics is not None
    if measures_clip != (args.clip is not None):
        raise ValueError("--clip MODEL WEIGHTS goes with --prompts FILE, --aesthetics WEIGHTS, or both")
    if args.real is None and args.clip is None:
        raise ValueError("nothing to measure: pass --real FOLDER for FID, --clip MODEL WEIGHTS for CLIP and aesthetics")
    if args.clip is not None and ":" in args.clip[0]:
        raise ValueError(f"--clip {args.clip[0]}: it would be downloaded; pass a name of open_clip's own, such as "
                         "ViT-L-14")
    if args.clip is not None and (wanted := hub_files(args.clip[0], args.prompts is not None)):
        raise ValueError(f"--clip {args.clip[0]}: open_clip would download {wanted[0]} for it; pass a network that "
                         "needs no download, such as ViT-L-14")
    clip_weights = None if args.clip is None else args.clip[1]
    for flag, path in ("--inception", args.inception), ("--clip", clip_weights), ("--aesthetics", args.aesthetics):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{flag}: {path}: no such file of weights")


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("samples", help="folder of pictures, for example from sample.py --singles")
    add("--real", help="folder of real pictures, which are cropped and scaled to the samples' size: measures FID")
    add("--inception", help="file of torch-fidelity's Inception weights (default: torch-fidelity downloads it)")
    add("--clip", nargs=2, metavar=("MODEL", "WEIGHTS"), help="open_clip's name of a network, and its file of weights")
    add("--prompts", help="text file, line i for the i-th picture in the order of the numbers in file names, 2 before "
        "10: measures the CLIP score")
    add("--aesthetics", help="file of the weights of LAION's predictor, which needs ViT-L-14-quickgelu: measures the "
        "aesthetics score")
    add("--batch", type=int, default=32, help="pictures per forward pass (default: 32)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    return parse(parser)


def main():
    args = arguments()
    check(args)
    samples, device, results = CroppedPictures(args.samples), pick_device(args.device), {}
    prompts = [] if args.prompts is None else read_prompts(args.prompts, samples.paths)
    if args.real is not None:
        results["fid"] = fid(samples, CroppedPictures(args.real, samples.size), args.inception, args.batch, device)
    if args.clip is not None:
        results |= clip_results(samples, args.clip, prompts, args.aesthetics, args.batch, device)
    print(f"{len(samples)} pictures in {args.samples}: "
          + ", ".join(f"{name} {result:.4f}" for name, result in results.items()))
    print(json.dumps({**vars(args), "images": len(samples), **results}))


if __name__ == "__main__":
    cli(main)
