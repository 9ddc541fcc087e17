"""Measure models on procedural scenes: do their pictures show what the caption says, is their depth right?

    python -m toy.judge captions --steps 25 --cfg 4                                              the bundled v-prior
    python -m toy.judge captions toy/tiny-v.safetensors runs/NAME/lora.safetensors --steps 25 4 2 1
    python -m toy.judge velocity runs/NAME/lora.safetensors --style outline
    python -m toy.judge plain runs/NAME/lora.safetensors --steps 25
    python -m toy.judge depth runs/NAME/model.safetensors --steps 2 10 --ensemble 1 4

Each model (a checkpoint, or a LoRA file of train.py) is sampled by the objective that it was trained with, since the
paper compares objectives. Results are written to --out, one JSON line per model and number of steps. Their "scenes" has
a value per scene, so that two models can be compared scene by scene.

captions: a small classifier predicts every attribute of the caption from the sampled picture.
    all            the share of pictures in which every attribute is right (0 to 1)
    frechet        the Frechet distance between the classifier's features of samples and of other real scenes
    straightness   the mean of |u - (x1 - x0)|^2 along the sampling paths; 0 if all paths are straight lines
The classifier is trained at its first use and kept in runs/. It is refused if it gets every attribute right in less
than 98 % of held-out real scenes.
velocity: the mean of |u - (x1 - x0)|^2 over held-out scenes, each with its own noise and time.
plain: the brightness of samples of "a black image" (0 is right) and "a white image" (1 is right).
depth: the depth of scenes of the style "room", after a least-squares fit of scale and shift in log depth.
    absrel         the mean relative error; "decoded" is that of the true depth, encoded and decoded
"""
import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from depth import DepthScenes
from diff2flow import OBJECTIVES, Diffusion, alpha_sigma, interpolate
from schedule import sd_schedule
from support.files import SOFTWARE, check_range, check_replaceable, cli, open_tensors, parse, replacing, save_tensors
from support.load import (
    BUNDLED_PRIOR,
    guidance,
    load_flow,
    objective_of,
    pick_device,
    pick_precision,
    picture_size,
    read_result,
    unconditional,
)
from support.lora_file import is_lora_file, read_metadata
from support.pictures import save_grid
from support.validation import spread_times
from tools.measure_depth import align, depth_errors
from toy.scenes import LABELS, PLAIN, Scenes, render

SIZE = 64                                           # pixels per side of the classifier's input
CLASSES = [len(classes) for classes in LABELS.values()]     # the number of classes of each attribute
TRAIN_SEED, HELD_OUT_SEED = 10_000_000, 20_000_000  # plus the step, plus --seed: not those that train.py uses
TRAIN_STEPS, TRAIN_BATCH = 1200, 128                # of the classifier
REAL_SCENES = 2048                                  # that samples are compared with, beside the n scenes
REQUIRED = 0.98                                     # share of real scenes in which the classifier must be right


# ------------------------------------------------------------------ the classifier

def build_classifier():
    """A network: images (B, 3, 64, 64) in [-1, 1] -> logits (B, sum(CLASSES)), grouped by attribute."""
    layers, widths = [], (3, 32, 64, 96, 128)       # at 64, 32, 16, 8, 4 pixels per side
    for width, wider in itertools.pairwise(widths):
        layers += [nn.Conv2d(width, wider, 4, 2, 1), nn.BatchNorm2d(wider), nn.ReLU(),
                   nn.Conv2d(wider, wider, 3, 1, 1), nn.BatchNorm2d(wider), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(4 * 4 * wider, 256), nn.ReLU(), nn.Linear(256, sum(CLASSES))]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def pictures_and_labels(scenes):
    """-> images (N, 3, 64, 64) in [-1, 1], labels (N, 10), -100 where an attribute does not apply."""
    images = torch.stack([torch.from_numpy(render(scene, SIZE, SIZE)[0]).permute(2, 0, 1) for scene in scenes])
    return images / 127.5 - 1, torch.tensor([list(scene.labels().values()) for scene in scenes])


def soften(images):
    """Augment as a decoder may distort pictures, at random strengths: blur, contrast, colour cast, stains, noise."""
    blur, contrast, cast, stain, noise = torch.rand(5, len(images), 3, 1, 1, device=images.device)
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)
    stains = F.interpolate(torch.randn_like(images[..., ::4, ::4]), images.shape[2:], mode="bilinear")
    images = torch.lerp(images, blurred, blur[:, :1]) * (0.9 + 0.2 * contrast[:, :1]) + 0.2 * (cast - 0.5)
    return images + 0.1 * stain[:, :1] * stains + 0.1 * noise[:, :1] * torch.randn_like(images)


def train_classifier(net, style, device):
    """Train by cross entropy on new augmented scenes; those with a partly hidden shape are twice as frequent."""
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, TRAIN_STEPS, pct_start=0.1)
    for step in tqdm(range(TRAIN_STEPS), "classifier", dynamic_ncols=True):
        world = Scenes(2 * TRAIN_BATCH, SIZE, SIZE, style, TRAIN_SEED + step)
        scenes = sorted(map(world.scene, range(len(world))), key=lambda scene: scene.relation != "in front of")
        images, labels = (tensor.to(device) for tensor in pictures_and_labels(scenes[:TRAIN_BATCH]))
        logits = net(soften(images)).float().split(CLASSES, 1)
        loss = sum(F.cross_entropy(of_attribute, classes, ignore_index=-100, reduction="sum")
                   for of_attribute, classes in zip(logits, labels.unbind(1))) / TRAIN_BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def load_classifier(style, device):
    """-> the classifier of that style's scenes, from runs/; trained and saved there if missing."""
    torch.manual_seed(0)
    path, net = Path(f"runs/classifier-{style}.safetensors"), build_classifier().to(device)
    if not path.exists():
        print(f"{path} is missing: training the classifier of {style} scenes, once; some minutes on two CPU cores")
        train_classifier(net, style, device)
        save_tensors(path, net.state_dict(), {"style": style})
    with open_tensors(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
    expected = {name: tensor.shape for name, tensor in net.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        raise ValueError(f"{path} was written by another version: delete it, and it is trained again")
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def predict(classifier, images):
    """images (N, 3, 64, 64) -> classes (N, 10)."""
    logits = torch.cat([classifier(batch) for batch in images.split(256)])
    return torch.stack([of_attribute.argmax(1) for of_attribute in logits.split(CLASSES, 1)], 1).cpu()


def features(classifier, images):
    """images (N, 3, 64, 64) -> the inputs of the classifier's last layer (N, 256)."""
    return torch.cat([classifier[:-1](batch) for batch in images.split(256)])


# ------------------------------------------------------------------ measures

def right_in_all(predicted, labels):
    """Classes (N, 10), labels (N, 10) -> whether every attribute that applies is right (N,)."""
    return ((predicted == labels) | (labels == -100)).all(1)


def score(predicted, labels):
    """Classes (N, 10), labels (N, 10) -> {name: share of rows that are right, None if there is no row}:

    "all"             right in every attribute that applies
    an attribute      right in this attribute, among the rows to which it applies
    "all <relation>"  right in every attribute, among the scenes with that relation
    """
    def share(rows):
        return rows.float().mean().item() if len(rows) else None

    right, applies, relation = predicted == labels, labels != -100, labels[:, list(LABELS).index("relation")]
    all_right = right_in_all(predicted, labels)
    shares = {"all": share(all_right)}
    for i, attribute in enumerate(LABELS):
        shares[attribute] = share(right[applies[:, i], i])
    for i, name in enumerate(LABELS["relation"]):
        shares[f"all {name}"] = share(all_right[relation == i])
    return shares


def frechet_distance(a, b):
    """Features (N, D), (M, D) -> |mean difference|^2 + tr(A + B - 2 sqrt(A B)), A and B their covariances."""
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root).item()


def straightness(points, grid):
    """x_fm (B, C, H, W) at each of the N + 1 times of `grid` -> mean of |u - (x1 - x0)|^2 over path and batch."""
    chord = (points[-1] - points[0]) / (grid[-1] - grid[0])
    errors = [((after - before) / dt - chord).square().mean()
              for before, after, dt in zip(points, points[1:], grid.diff())]
    return (torch.stack(errors) * grid.diff()).sum().item() / (grid[-1] - grid[0]).item()


# ------------------------------------------------------------------ models

class ShiftedDiffusion(Diffusion):
    """DDIM with the network evaluated `shift` below its integer timesteps: fractional, never trained on (Figure 2)."""

    def __init__(self, flow, shift):
        super().__init__(flow.net, *sd_schedule(device=flow.f_table.device), flow.prediction)
        self.shift = shift

    def grid(self, steps):
        t_fm = super().grid(steps)
        return torch.cat([self.f_t(self.f_t_inv(t_fm[:-1]) - self.shift), t_fm[-1:]])


def load_model(path, device, dtype, task, objective=None):
    """A checkpoint, or a LoRA file of train.py -> the model, its velocity field, and the description of it in results.

    objective: how to sample; None for the one in the file's metadata, which the model was trained with.
    """
    path = Path(path)
    has_metadata = path.suffix == ".safetensors"
    trained_by = read_metadata(path).get("objective") if has_metadata else None
    objective = objective or trained_by
    if objective not in (None, *OBJECTIVES):
        raise ValueError(f"{path}: its objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    is_lora = has_metadata and is_lora_file(path)
    files = {"loras": path} if is_lora else {"ckpt": path}
    sd, flow = load_flow(**files, device=device, dtype=dtype, task=task, objective=objective)
    run, number = read_result(path), path.stem.rpartition("-")[2]
    return sd, flow, {"model": str(path), "objective": objective_of(flow), "prediction": flow.prediction, "run": run,
                      "own_sampler": trained_by in (None, objective_of(flow)),
                      "step": int(number) if number.isdecimal() else run.get("steps")}   # --keep: NAME-STEP.safetensors


def begin(args, *outputs):
    """Check the arguments that all commands share, before the slow part -> the device, and the dtype of weights."""
    check_range(args, 1, 1e9, *(name for name in ("n", "batch", "steps", "ensemble") if name in args))
    check_range(args, 0, 2**32 - 1, "seed")
    check_range(args, -1e6, 1e6, *(["cfg"] if "cfg" in args else []))
    device = pick_device(args.device)
    for name in outputs:
        check_replaceable(Path(args.out) / name)
    args.precision, dtype = pick_precision(args.precision, device)
    args.device = str(device)
    print(json.dumps(vars(args)))
    return device, dtype


def seeded_noise(args, shape):
    """-> the noise of all n scenes, (n, *shape): the same for every model."""
    return torch.randn((args.n, *shape), generator=torch.Generator().manual_seed(args.seed))


def write_results(path, rows):
    """Write the rows as JSON lines, and print them."""
    lines = "".join(json.dumps({"software": SOFTWARE, **row}) + "\n" for row in rows)
    with replacing(path) as temporary:
        temporary.write_text(lines)
    print(path, lines, sep="\n", end="")


# ------------------------------------------------------------------ captions

@dataclass
class RealScenes:
    """What samples are compared with: the n scenes that give the captions, and REAL_SCENES others."""
    captions: list                                  # n strings
    labels: torch.Tensor                            # (n, 10)
    shares: dict                                    # score() of all real scenes, and of the n after the autoencoder
    features: torch.Tensor                          # of the others, (REAL_SCENES, 256)


def real_scenes(args, classifier, sd, device):
    """-> RealScenes. ValueError if the classifier is right about too few of them."""
    world = Scenes(args.n + REAL_SCENES, SIZE, SIZE, args.style, HELD_OUT_SEED + args.seed)
    scenes = [world.scene(i) for i in range(len(world))]
    images, labels = pictures_and_labels(scenes)
    shares = {"real": score(predict(classifier, images.to(device)), labels)}
    if shares["real"]["all"] < REQUIRED:
        raise ValueError(f"the classifier is right about only {shares['real']['all']:.1%} of real scenes, not "
                         f"{REQUIRED:.0%}: delete runs/classifier-{args.style}.safetensors, and it is trained again")
    decoded = [sd.decode(sd.encode(batch.to(device))).float().clamp(-1, 1)
               for batch in images[:args.n].split(args.batch)]
    shares["decoded"] = score(predict(classifier, torch.cat(decoded)), labels[:args.n])
    return RealScenes([scene.caption for scene in scenes[:args.n]], labels[:args.n], shares,
                      features(classifier, images[args.n:].to(device)))


def sample_pictures(sd, flow, captions, noise, steps, cfg, batch):
    """-> pictures (N, 3, 64, 64) in [-1, 1], scaled to that size, and the straightness of their paths."""
    pictures, straight, grid = [], 0.0, flow.grid(steps)
    alpha, sigma = alpha_sigma(grid[0])
    for start in tqdm(range(0, len(captions), batch), f"{steps} steps", dynamic_ncols=True):
        x0 = noise[start:start + batch].to(grid.device)
        points = [x0 / (alpha + sigma)]             # the path's first x_fm, where x_dm = x0 (Eq. 13)
        context = sd.encode_text(captions[start:start + batch])
        uncond = unconditional(sd, cfg)
        x1 = flow.sample(x0, context, steps, uncond, cfg, points.append)
        pictures.append(sd.decode(x1).float().clamp(-1, 1))
        straight += straightness(points, grid) * len(x0) / len(captions)
    pictures = torch.cat(pictures)
    if pictures.shape[2:] != (SIZE, SIZE):
        pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
    return pictures, straight


def judge_pictures(pictures, real, classifier):
    """pictures (n, 3, 64, 64) sampled for the captions of `real` -> their entries in a result."""
    predicted = predict(classifier, pictures)
    shares, right = score(predicted, real.labels), right_in_all(predicted, real.labels)
    return {"all": shares["all"], "frechet": frechet_distance(features(classifier, pictures), real.features),
            "shares": {**real.shares, "samples": shares}, "scenes": {"all": right.int().tolist()}}


def summary(row):
    """-> a result as one line of text."""
    return (f"{row['model']}, {row['steps']} steps, cfg {row['cfg']:g}: every attribute right in {row['all']:.1%}, "
            f"Frechet distance to {REAL_SCENES} other real scenes {row['frechet']:.1f}, straightness "
            f"{row['straightness']:.4f}")


def print_shares(rows, real, n):
    """Print a table: a line per attribute; columns for real scenes, decoded ones, and the samples of each row."""
    names = [f"{row['model']} {row['steps']} steps" for row in rows]
    print(f"right in: {n + REAL_SCENES} real scenes | {n} encoded and decoded | {n} samples of " + " | ".join(names))
    columns = [*real.shares.values(), *(row["shares"]["samples"] for row in rows)]
    for name in columns[0]:
        print(f"{name:15}", *("   none" if column[name] is None else f"{column[name]:7.1%}" for column in columns))


def save_samples(path, pictures, rows, captions, making):
    """Write a grid. pictures: the first ones of each row; captions: of these; making: text that says how they were
    made."""
    labels = [f"{'/ '.join(Path(row['model']).with_suffix('').parts[-2:])}, {row['steps']} steps" for row in rows]
    save_grid(path, torch.cat(pictures), min(8, len(captions)), making, labels if len(rows) > 1 else None,
              captions * len(rows))
    print(path)


def captions(args):
    check_range(args, 2, 1e9, "n")                     # one picture has no covariance
    check_range(args, 0, 1, "t_shift")
    if args.t_shift and args.objective != "dm":
        raise ValueError(f"--t-shift {args.t_shift:g}: only DDIM has timesteps to shift; add --objective dm")
    out, (device, dtype) = Path(args.out), begin(args, "samples.png", "captions.jsonl")
    models = [load_model(path, device, dtype, "text-to-image", args.objective) for path in args.models]
    sizes = [tuple(picture_size(sd, args.size)) for sd, _, _ in models]
    settings = {name: vars(args)[name] for name in ("n", "seed", "style", "t_shift", "precision", "device")}
    classifier = load_classifier(args.style, device)
    real = real_scenes(args, classifier, models[0][0], device)
    rows, pictures = [], []
    for (sd, flow, origin), size in zip(models, sizes):
        if args.t_shift:
            flow = ShiftedDiffusion(flow, args.t_shift)
        cfg, noise = guidance(sd, args.cfg), seeded_noise(args, sd.latent_shape(size))
        for steps in args.steps:
            samples, straight = sample_pictures(sd, flow, real.captions, noise, steps, cfg, args.batch)
            row = {**settings, **origin, "steps": steps, "cfg": cfg, "size": size, "real_scenes": REAL_SCENES,
                   "straightness": straight, **judge_pictures(samples, real, classifier)}
            rows.append(row)
            pictures.append(samples)
            print(summary(row))
    n = min(args.n, 8 if len(rows) > 1 else 32)
    save_samples(out / "samples.png", [samples[:n] for samples in pictures], rows, real.captions[:n],
                 "\n".join(map(summary, rows)))
    print_shares(rows, real, args.n)
    write_results(out / "captions.jsonl", rows)


# ------------------------------------------------------------------ velocity

def velocity_errors(sd, flow, world, noise, batch):
    """-> mean |u - (x1 - x0)|^2 of each scene, each at its own time; the times are spread evenly over [0, 1]."""
    errors, spread = [], spread_times(len(world), sd.device)
    for start in tqdm(range(0, len(world), batch), "velocity error", dynamic_ncols=True):
        items = [world[i] for i in range(len(world))[start:start + batch]]
        x1 = sd.encode(torch.stack([item["image"] for item in items]).to(sd.device)).float()
        x0, t_fm = noise[start:start + batch].to(sd.device), spread[start:start + batch]
        u = flow(interpolate(x1, x0, t_fm), t_fm, sd.encode_text([item["caption"] for item in items]))
        errors += (u - (x1 - x0)).square().mean((1, 2, 3)).tolist()
    return errors


@torch.no_grad()
def velocity(args):
    """Write the velocity error of text-to-image models on held-out scenes."""
    (device, dtype), rows = begin(args, "velocity.jsonl"), []
    for sd, flow, origin in [load_model(path, device, dtype, "text-to-image", args.objective) for path in args.models]:
        size = picture_size(sd, args.size)
        world = Scenes(args.n, *size, args.style, HELD_OUT_SEED + args.seed)
        noise = seeded_noise(args, sd.latent_shape(size))
        errors = velocity_errors(sd, flow, world, noise, args.batch)
        rows.append({**origin, "n": args.n, "seed": args.seed, "style": args.style, "size": size,
                     "precision": args.precision, "velocity_error": sum(errors) / args.n,
                     "scenes": {"velocity_error": [float(f"{error:.4g}") for error in errors]}})
    write_results(Path(args.out) / "velocity.jsonl", rows)


# ------------------------------------------------------------------ plain

def brightness(pictures):
    """Pictures (N, 3, H, W) in [-1, 1] -> the brightness of each, 0 for black and 1 for white, float64 (N,)."""
    return (pictures.clamp(-1, 1).double().mean((1, 2, 3)) + 1) / 2


def mean_and_tenths(values):
    """-> {mean, darkest_tenth, lightest_tenth} of brightnesses (N,)."""
    darkest, lightest = values.quantile(torch.tensor([0.1, 0.9], dtype=values.dtype, device=values.device)).tolist()
    return {"mean": values.mean().item(), "darkest_tenth": darkest, "lightest_tenth": lightest}


def plain(args):
    """Write the brightness of text-to-image models' samples: n of "a black image", and n of "a white image"."""
    (device, dtype), rows, pictures = begin(args, "samples.png", "plain.jsonl"), [], []
    prompts, shown = {"black": "a black image", "white": "a white image"}, min(args.n, 4)
    for sd, flow, origin in [load_model(path, device, dtype, "text-to-image", args.objective) for path in args.models]:
        cfg, noise = guidance(sd, args.cfg), seeded_noise(args, sd.latent_shape(picture_size(sd)))
        for steps in args.steps:
            row = {**origin, "n": args.n, "seed": args.seed, "precision": args.precision, "steps": steps, "cfg": cfg,
                   "scenes": {}}
            for colour, prompt in prompts.items():
                samples, _ = sample_pictures(sd, flow, [prompt] * args.n, noise, steps, cfg, args.batch)
                values = brightness(samples)
                row[colour] = mean_and_tenths(values)
                row["scenes"][colour] = {"mean": [float(f"{value:.4g}") for value in values]}
                pictures.append(samples[:shown])
            rows.append(row)
    save_samples(Path(args.out) / "samples.png", pictures, rows,
                 [prompt for prompt in prompts.values() for _ in range(shown)],
                 "\n".join(f"{row['model']}, {row['steps']} steps, cfg {row['cfg']:g}" for row in rows))
    write_results(Path(args.out) / "plain.jsonl", rows)


# ------------------------------------------------------------------ depth

def scene_errors(predictions, truths):
    """Predictions (n, 64, 64) of log depth up to scale and shift, n truths (64, 64) in metres -> {error: n values}."""
    valid, errors = np.ones((SIZE, SIZE), bool), []
    for prediction, truth in zip(predictions, truths):
        errors.append(depth_errors(align(prediction, truth, valid, "log"), truth, valid, 1e-5, math.inf))
    return {name: [float(error[name]) for error in errors] for name in errors[0]}


def depth(args):
    """Write the error of depth that models of train.py --task depth predict for held-out scenes, as mean of an
    ensemble, aligned in log depth."""
    (device, dtype), rows = begin(args, "depth.jsonl"), []
    models = [load_model(path, device, dtype, "depth", args.objective) for path in args.models]
    world = Scenes(args.n, SIZE, SIZE, "room", HELD_OUT_SEED + args.seed)
    items = [world[i] for i in range(args.n)]
    images = torch.stack([item["image"] for item in items]).to(device)
    truths = [item["depth"][0].double().numpy() for item in items]
    learned = DepthScenes(args.n, SIZE, SIZE, "room", HELD_OUT_SEED + args.seed)
    learned = torch.stack([learned[i]["depth"] for i in range(args.n)]).expand(-1, 3, -1, -1).to(device)
    for sd, flow, origin in models:
        picture = sd.encode(images)
        decoded = sd.decode(sd.encode(learned)).float().mean(1).clamp(-1, 1).double().cpu().numpy()
        decoded_errors = scene_errors(decoded, truths)["absrel"]
        noise = torch.randn((max(args.ensemble), *picture.shape), generator=torch.Generator().manual_seed(args.seed))
        for steps in args.steps:
            members = [sd.decode(flow.sample(x0.to(device), picture, steps)).float().mean(1)
                       for x0 in tqdm(noise, f"{steps} steps", dynamic_ncols=True)]
            for ensemble in args.ensemble:
                prediction = torch.stack(members[:ensemble]).mean(0).clamp(-1, 1).double().cpu().numpy()
                scenes = scene_errors(prediction, truths)
                errors = {name: sum(values) / args.n for name, values in scenes.items()}
                rows.append({**origin, "steps": steps, "ensemble": ensemble, "images": args.n, "seed": args.seed,
                             "align": "log", "precision": args.precision, "decoded": sum(decoded_errors) / args.n,
                             **errors, "scenes": {"absrel": [float(f"{error:.4g}") for error in scenes["absrel"]]}})
                print(f"{origin['model']}, {steps} steps, ensemble {ensemble}: AbsRel {errors['absrel']:.4f}, delta1 "
                      f"{errors['delta1']:.4f}, RMSE {errors['rmse']:.3f} m on {args.n} scenes")
    write_results(Path(args.out) / "depth.jsonl", rows)


# ------------------------------------------------------------------ the command line

def add_common_arguments(parser, n, steps, out):
    """steps: the default, or None for a command that does not sample."""
    add = parser.add_argument
    if steps:
        add("--steps", type=int, nargs="+", default=steps,
            help=f"Euler steps from noise to sample; give several to compare (default: {steps[0]})")
    add("--n", type=int, default=n, help=f"number of held-out scenes, or of samples per colour (default: {n})")
    add("--seed", type=int, default=0, help="seed of the scenes and of the noise (default: 0)")
    add("--precision", choices=["bf16", "fp32"],
        help="of forward passes (default: bf16 where the device has it, else fp32)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", default=out, help=f"folder for the results (default: {out})")


def add_model_arguments(parser):
    """Arguments of the commands for text-to-image models."""
    parser.add_argument("models", nargs="*", default=[str(BUNDLED_PRIOR)],
                        help="checkpoints, and LoRA files of train.py (default: the bundled v-prior)")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time (default: 64)")
    add_objective(parser)


def add_objective(parser):
    parser.add_argument("--objective", choices=list(OBJECTIVES),
                        help="whose velocity field (default: the one that the model was trained by, else diff2flow)")


def add_sampling_arguments(parser):
    parser.add_argument("--cfg", type=float,
                        help="guidance scale, 1 for none (default: from the model's metadata, 1 after Reflow; else 4)")


def add_scene_arguments(parser):
    parser.add_argument("--style", choices=list(PLAIN), default="solid", help="style of the scenes (default: solid)")
    parser.add_argument("--size", type=int, nargs="+",
                        help="pixels: one number, or height width (default: the size in the model's metadata); for "
                             "the classifier, samples are scaled to 64x64")


def arguments():
    parser = argparse.ArgumentParser(prog="python -m toy.judge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    of_captions = commands.add_parser("captions", help="do sampled pictures show what their captions say?")
    add_model_arguments(of_captions)
    add_common_arguments(of_captions, 512, [25], "runs/captions")
    add_sampling_arguments(of_captions)
    add_scene_arguments(of_captions)
    of_captions.add_argument("--t-shift", type=float, default=0.0,
                             help="with --objective dm: evaluate the network at timesteps lower by this number, 0 to 1 "
                                  "(default: 0)")

    of_velocity = commands.add_parser("velocity", help="how wrong is the velocity on held-out scenes?")
    add_model_arguments(of_velocity)
    add_common_arguments(of_velocity, 512, None, "runs/velocity")
    add_scene_arguments(of_velocity)

    of_plain = commands.add_parser("plain", help="is black black, and white white?")
    add_model_arguments(of_plain)
    add_common_arguments(of_plain, 64, [25], "runs/plain")
    add_sampling_arguments(of_plain)

    of_depth = commands.add_parser("depth", help="is the depth of scenes right?")
    of_depth.add_argument("models", nargs="+", help="checkpoints or LoRA files of train.py --task depth")
    add_objective(of_depth)
    add_common_arguments(of_depth, 48, [10], "runs/depth-scenes")
    of_depth.add_argument("--ensemble", type=int, nargs="+", default=[1],
                          help="number of samples, whose mean is the prediction; give several to compare (default: 1)")
    return parse(parser)


COMMANDS = {"captions": captions, "velocity": velocity, "plain": plain, "depth": depth}


def main():
    args = arguments()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    cli(main)
