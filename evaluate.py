"""The paper's measures. Each command prints its settings, the count of pictures and the figures, last as a JSON line.

    python evaluate.py captions --steps 25 --cfg 4                      samples of the procedural scenes, no download
    python evaluate.py depth-scenes runs/depth/lora.safetensors --steps 2 10 --ensemble 1 4
    python evaluate.py depth depth/ nyu/ --dataset nyu --list filename_list_test.txt            Tables 2 and 4, Figure 8
    python evaluate.py images samples/ --real coco/val2017/ --inception weights.pth             Tables 1 and 3, Figure 5

captions: the share whose every attribute a classifier finds in the sampled picture, the Frechet distance of its
features to real scenes', the straightness of the paths, mean |u - (x1 - x0)|^2 along them, and the mean of what should
be plain black or white. The classifier is trained here at first use, kept in runs/, and refused if it is right about
every attribute in less than 98 % of real held-out scenes.
depth: affine-invariant depth as Marigold's protocol has it: least squares on an image's valid pixels, clipped to the
data set's range, a mean over pixels, then over images. AbsRel = mean |d - d*| / d*, delta1 = share of
max(d / d*, d* / d) < 1.25.
images: FID by torch-fidelity, CLIP score by open_clip, LAION's aesthetics, each with the weights that you name.
plot, table: velocity error over steps, and any results, of many runs.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

import lora
from data import (LABELS, PLAIN, SUFFIXES, Scenes, cli, find_depth, open_rgb, pictures_in, read_depth, read_text,
                  render, save_grid)
from diff2flow import OBJECTIVES, alpha_sigma
from model import TINY_PRIOR, CheckpointFile, Conditioned, load_checkpoint, pick_device, pick_precision, save_tensors
from schedule import sd_schedule

SIZE, CLASSES = 64, [len(classes) for classes in LABELS.values()]   # pixels a side; classes of each attribute
TRAIN_SEED, HELD_OUT_SEED = 10_000_000, 20_000_000  # plus the step, plus --seed: far from what train.py is given
TRAIN_STEPS, TRAIN_BATCH = 1200, 128
REAL_SCENES, REQUIRED = 2048, 0.98                  # besides those sampled; the share that the classifier must reach


def build_classifier():
    """A network: images (B, 3, 64, 64) in [-1, 1] -> logits (B, sum(CLASSES)), attribute after attribute."""
    layers, widths = [], (3, 32, 64, 96, 128)       # at 64, 32, 16, 8, 4 pixels a side
    for width, wider in zip(widths, widths[1:]):
        layers += [nn.Conv2d(width, wider, 4, 2, 1), nn.BatchNorm2d(wider), nn.ReLU(),
                   nn.Conv2d(wider, wider, 3, 1, 1), nn.BatchNorm2d(wider), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(4 * 4 * wider, 256), nn.ReLU(), nn.Linear(256, sum(CLASSES))]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def draw(scenes):
    """-> images (N, 3, 64, 64), labels (N, 10), -100 where an attribute does not apply."""
    images = torch.stack([torch.from_numpy(render(scene, SIZE, SIZE)[0]).permute(2, 0, 1) for scene in scenes])
    return images / 127.5 - 1, torch.tensor([list(scene.labels().values()) for scene in scenes])


def soften(images):
    """What a decoder does to pictures, at random strength: blur, contrast, a colour cast, stains, noise."""
    blur, contrast, cast, stain, noise = torch.rand(5, len(images), 3, 1, 1, device=images.device)
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)
    stains = F.interpolate(torch.randn_like(images[..., ::4, ::4]), images.shape[2:], mode="bilinear")
    images = torch.lerp(images, blurred, blur[:, :1]) * (0.9 + 0.2 * contrast[:, :1]) + 0.2 * (cast - 0.5)
    return images + 0.1 * stain[:, :1] * stains + 0.1 * noise[:, :1] * torch.randn_like(images)


def load_classifier(style, device):
    """-> the classifier in runs/. If there is none, it is trained: cross entropy on fresh, softened scenes."""
    torch.manual_seed(0)
    path, net = Path(f"runs/classifier-{style}.safetensors"), build_classifier().to(device)
    if not path.exists():
        print(f"{path} is not there: training the classifier of {style} scenes, once; some minutes on two CPU cores")
        optimizer = torch.optim.AdamW(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, TRAIN_STEPS, pct_start=0.1)
        for step in tqdm(range(TRAIN_STEPS), "classifier", dynamic_ncols=True):
            world = Scenes(2 * TRAIN_BATCH, SIZE, SIZE, style, TRAIN_SEED + step)
            scenes = sorted(map(world.scene, range(len(world))), key=lambda scene: scene.relation != "in front of")
            images, labels = (x.to(device) for x in draw(scenes[:TRAIN_BATCH]))     # half-hidden shapes twice as often
            outputs = zip(net(soften(images)).float().split(CLASSES, 1), labels.unbind(1))
            losses = (F.cross_entropy(o, y, ignore_index=-100, reduction="sum") for o, y in outputs)
            loss = sum(losses) / TRAIN_BATCH
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        save_tensors(path, net.state_dict(), {"style": style})
    file = CheckpointFile(path)
    if file.shapes != {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}:
        raise ValueError(f"{path} is of another version: delete it, and it is trained again")
    net.load_state_dict(dict(file.tensors(file.shapes)))
    return net.eval().requires_grad_(False)


def predict(classifier, images):
    """images (N, 3, 64, 64) -> classes (N, 10)."""
    logits = torch.cat([classifier(some) for some in images.split(256)])
    return torch.stack([part.argmax(1) for part in logits.split(CLASSES, 1)], 1).cpu()


def features(classifier, images):
    """images (N, 3, 64, 64) -> what its last layer sees (N, 256)."""
    return torch.cat([classifier[:-1](some) for some in images.split(256)])


def frechet_distance(a, b):
    """Features (N, D), (M, D) -> |mean difference|^2 + tr(A + B - 2 sqrt(A B)), A and B their covariances."""
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root).item()


def score(predicted, labels):
    """Two (N, 10) -> {"all": share of rows right in all attributes that apply, attribute: its own share, or None,
    "all" and a relation: share of the scenes with that relation that are right in all}."""
    right, applies, relation = predicted == labels, labels != -100, labels[:, list(LABELS).index("relation")]

    def share(values):
        return values.float().mean().item() if len(values) else None

    whole = (right | ~applies).all(1)
    return {"all": share(whole),
            **{name: share(row[on]) for name, row, on in zip(LABELS, right.T, applies.T)},
            **{f"all {name}": share(whole[relation == i]) for i, name in enumerate(LABELS["relation"])}}


def load_model(path, device, objective=None):
    """A checkpoint, or a LoRA of train.py on the base that result.json beside it names -> the model, its velocity field,
    and what a result says of it: its file, its objective, its cfg, and the run of train.py that it came from."""
    path, run = Path(path), lora.result_of(path)
    kept = path.stem.rpartition("-")[2]  # train.py --keep
    if any(key.startswith("lora_") for key in CheckpointFile(path).shapes):
        base, use_ema = lora.base_of(path)
        sd = load_checkpoint(base, device, ema=use_ema)
        if CheckpointFile(path).metadata.get("task") == "depth":
            sd.widen()
        sd.metadata |= lora.load(path, sd.unet)
        lora.merge(sd.unet)
    else:
        sd = load_checkpoint(path, device)
    objective = objective or sd.metadata.get("objective", "diff2flow")
    if objective not in OBJECTIVES:
        raise ValueError(f"{path}: its objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    wide = sd.config.in_channels > sd.config.latent_channels
    flow = OBJECTIVES[objective](Conditioned(sd.unet) if wide else sd.unet, *sd_schedule(), sd.prediction).to(device)
    return sd, flow, {"model": str(path), "objective": objective, "prediction": sd.prediction, "run": run,
                      "step": int(kept) if kept.isdecimal() else run.get("steps")}


def write_results(path, rows):
    """Rows as JSON lines, into a file and on the screen."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines)
    print(path, lines, sep="\n", end="")


def shift_grid(flow, shift):
    """Ask the network at timesteps lower by `shift` (Figure 2: fractional ones, which it never saw)."""
    grid = flow.grid

    def shifted(steps):
        t_fm = grid(steps)
        return torch.cat([flow.f_t(flow.f_t_inv(t_fm[:-1]) - shift), t_fm[-1:]])

    flow.grid = shifted


def straightness(points, grid):
    """x_fm (B, C, H, W) at the N + 1 times of `grid` -> mean of |u - (x1 - x0)|^2 over the path: 0 if it is a line."""
    chord = (points[-1] - points[0]) / (grid[-1] - grid[0])
    errors = [((b - a) / dt - chord).square().mean() for a, b, dt in zip(points, points[1:], grid.diff())]
    return (torch.stack(errors) * grid.diff()).sum().item() / (grid[-1] - grid[0]).item()


def sample_captions(sd, flow, texts, noise, steps, cfg, batch):
    """-> samples (N, 3, H, W), straightness of their paths."""
    samples, straight, grid = [], 0.0, flow.grid(steps)
    for i in tqdm(range(0, len(texts), batch), f"{steps} steps", dynamic_ncols=True):
        x0, context = noise[i:i + batch].to(grid.device), sd.encode_text(texts[i:i + batch])
        uncond, points = sd.encode_text([""]).expand_as(context), [x0 / sum(alpha_sigma(grid[0]))]
        x1 = flow.sample(x0, context, steps, uncond, cfg, points.append)
        samples.append(sd.decode(x1).float().clamp(-1, 1))
        straight += straightness(points, grid) * len(x0) / len(texts)
    return torch.cat(samples), straight


def real_scenes(args, classifier, sd, device):
    """-> args.n scenes, their labels, the classifier's score on all real scenes and on the n decoded by sd, and its
    features of REAL_SCENES others."""
    world = Scenes(args.n + REAL_SCENES, SIZE, SIZE, args.style, HELD_OUT_SEED + args.seed)
    scenes = [world.scene(i) for i in range(len(world))]
    images, labels = draw(scenes)
    shares = {"real": score(predict(classifier, images.to(device)), labels)}
    if shares["real"]["all"] < REQUIRED:
        raise ValueError(f"the classifier is right about only {shares['real']['all']:.1%} of real scenes, not "
                         f"{REQUIRED:.0%}: delete runs/classifier-{args.style}.safetensors, and it is trained again")
    decoded = [sd.decode(sd.encode(some.to(device))).clamp(-1, 1) for some in images[:args.n].split(args.batch)]
    shares["decoded"] = score(predict(classifier, torch.cat(decoded)), labels[:args.n])
    return scenes[:args.n], labels[:args.n], shares, features(classifier, images[args.n:].to(device))


def captions(args):
    if min(args.n, args.batch, *args.steps) < 1:
        raise ValueError("--n, --steps and --batch must be at least 1")
    device, out = pick_device(args.device), Path(args.out)
    models = [load_model(path, device, args.objective) for path in args.models]
    sizes = [sd.picture_size(args.size) for sd, *_ in models]
    precision, amp = pick_precision(args.precision, device)
    settings = {name: vars(args)[name] for name in ("n", "seed", "style", "t_shift")}
    settings |= {"precision": precision, "device": str(device)}
    print(json.dumps({**vars(args), **settings}))
    classifier = load_classifier(args.style, device)
    sd = models[0][0]
    scenes, labels, shares, real_features = real_scenes(args, classifier, sd, device)
    texts = [scene.caption for scene in scenes]
    plain = {name: [i for i, text in enumerate(texts) if text == f"a {name} image"] for name in ("black", "white")}
    several = len(models) * len(args.steps) > 1     # then 8 pictures of each are shown, plain ones first
    order = list(dict.fromkeys([*plain["black"][:2], *plain["white"][:2], *range(args.n)]))[:8 if several else 32]
    shown, rows = {}, []
    for (sd, flow, about), size in zip(models, sizes):
        cfg = float(sd.metadata.get("cfg", 4.0)) if args.cfg is None else args.cfg
        if args.t_shift:
            shift_grid(flow, args.t_shift)
        shape = (args.n, sd.config.latent_channels, *(side // sd.factor for side in size))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
        for steps in args.steps:
            with amp:
                samples, straight = sample_captions(sd, flow, texts, noise, steps, cfg, args.batch)
            if size != (SIZE, SIZE):
                samples = F.interpolate(samples, (SIZE, SIZE), mode="bilinear", antialias=True)
            sampled = score(predict(classifier, samples), labels)
            distance = frechet_distance(features(classifier, samples), real_features)
            means = {name: (samples[i].mean().item() + 1) / 2 for name, i in plain.items() if i}
            rows.append({**settings, **about, "steps": steps, "cfg": cfg, "size": size, "real_scenes": REAL_SCENES,
                         "all": sampled["all"], "frechet": distance, "straightness": straight, "plain": means,
                         "shares": {**shares, "samples": sampled}})
            shown[f"{about['model']} {steps} steps"] = samples[order]
            print(f"{about['model']}, {steps} steps, cfg {cfg:g}: every attribute right in {sampled['all']:.1%}, "
                  f"Frechet distance to {REAL_SCENES} other real scenes {distance:.1f}, straightness {straight:.4f}"
                  + "".join(f", mean of a {name} image {mean:.3f}" for name, mean in means.items()))
    save_grid(out / "samples.png", torch.cat(list(shown.values())), min(8, args.n),
              row_labels=[name.replace("/", "/ ") for name in shown] if several else None,
              captions=[texts[i] for i in order] * len(shown))
    print(f"right in: {args.n + REAL_SCENES} real scenes | {args.n} encoded and decoded | {args.n} samples of "
          + " | ".join(shown))
    columns = [*shares.values(), *(row["shares"]["samples"] for row in rows)]
    for head in columns[0]:
        print(f"{head:15}", *("   none" if of[head] is None else f"{of[head]:7.1%}" for of in columns))
    print(f"{out}/samples.png")
    write_results(out / "captions.jsonl", rows)


def depth_scenes(args):
    """Depth of held-out procedural scenes by models of train.py --task depth, aligned in log depth."""
    device, out, rows = pick_device(args.device), Path(args.out), []
    precision, amp = pick_precision(args.precision, device)
    if min(args.n, *args.steps, *args.ensemble) < 1:
        raise ValueError("--n, --steps and --ensemble must be at least 1")
    models = [load_model(path, device) for path in args.models]
    for sd, flow, about in models:
        if sd.config.in_channels == sd.config.latent_channels:
            raise ValueError(f"{about['model']}: not trained by train.py --task depth")
    world = Scenes(args.n, SIZE, SIZE, "solid", HELD_OUT_SEED + args.seed)
    items = [world[i] for i in range(args.n)]
    images = torch.stack([item["image"] for item in items]).to(device)
    truths = [item["depth"][0].double().numpy() for item in items]
    valid = np.ones((SIZE, SIZE), bool)
    for sd, flow, about in models:
        picture = sd.encode(images)
        empty = sd.encode_text([""]).expand(args.n, -1, -1)
        noise = torch.randn((max(args.ensemble), *picture.shape), generator=torch.Generator().manual_seed(args.seed))
        for steps in args.steps:
            with amp:
                decoded = [sd.decode(flow.sample(x0.to(device), (empty, picture), steps)).float().mean(1)
                           for x0 in tqdm(noise, f"{steps} steps", dynamic_ncols=True)]
            for ensemble in args.ensemble:
                predictions = torch.stack(decoded[:ensemble]).mean(0).clamp(-1, 1).double().cpu().numpy()
                errors = [depth_errors(align(prediction, truth, valid, "log"), truth, valid, 1e-5, math.inf)
                          for prediction, truth in zip(predictions, truths)]
                row = {**about, "steps": steps, "ensemble": ensemble, "images": args.n, "seed": args.seed, "align": "log",
                       "precision": precision,
                       **{name: float(np.mean([error[name] for error in errors])) for name in errors[0]}}
                rows.append(row)
                print(f"{about['model']}, {steps} steps, ensemble {ensemble}: AbsRel {row['absrel']:.4f}, delta1 "
                      f"{row['delta1']:.4f}, RMSE {row['rmse']:.3f} m on {args.n} scenes")
    write_results(out / "depth.jsonl", rows)


PROTOCOLS = {  # metres a unit of the depth files, nearest and farthest valid depth (Marigold's evaluation)
    "nyu": (1e-3, 1e-3, 10.0), "scannet": (1e-3, 1e-3, 10.0), "kitti": (1 / 256, 1e-5, 80.0),
    "eth3d": (1.0, 1e-5, math.inf), "diode": (1.0, 0.6, 350.0), "plain": (1.0, 1e-5, math.inf)}
ETH3D_SHAPE, KITTI_CROP = (4032, 6048), (352, 1216)


def read_truth(args, name, mask):
    """-> depth (H, W) in metres, valid (H, W)."""
    path, (scale, near, far) = Path(args.truth) / name, PROTOCOLS[args.dataset]
    if args.dataset == "eth3d":
        depth = np.fromfile(path, np.float32)
        if depth.size != math.prod(ETH3D_SHAPE):
            raise ValueError(f"{path} holds {depth.size} numbers, not ETH3D's {ETH3D_SHAPE[0]}x{ETH3D_SHAPE[1]}")
        depth = depth.reshape(ETH3D_SHAPE)
    else:
        depth = read_depth(path, args.scale or scale)
    if args.dataset == "kitti":
        depth = kitti_crop(depth)
    valid = np.isfinite(depth) & (depth > near) & (depth < far)
    height, width = depth.shape
    if args.dataset == "diode" and mask:
        valid &= np.load(Path(args.truth) / mask, allow_pickle=False).squeeze().astype(bool)
    elif args.dataset == "nyu":
        valid[:45], valid[471:], valid[:, :41], valid[:, 601:] = False, False, False, False         # Eigen's crop
    elif args.dataset == "kitti":
        valid[:int(0.3324324 * height)], valid[int(0.91351351 * height):] = False, False           # Eigen's, again
        valid[:, :int(0.0359477 * width)], valid[:, int(0.96405229 * width):] = False, False
    return np.where(valid, depth, 1).astype(np.float64), valid


def kitti_crop(depth):
    """The benchmark's: 352 rows at the bottom, 1216 columns in the middle."""
    top, left = depth.shape[0] - KITTI_CROP[0], (depth.shape[1] - KITTI_CROP[1]) // 2
    return depth[top:, left:left + KITTI_CROP[1]]


SPACES = {  # from depth, and back
    "log": (np.log, np.exp), "depth": (np.asarray, np.asarray),
    "disparity": (np.reciprocal, lambda disparity: 1 / disparity.clip(min=1e-3))}


def align(prediction, truth, valid, space):
    """Least-squares scale and shift of the prediction to the truth in `space` -> depth (H, W) in metres."""
    forward, back = SPACES[space]
    system = np.stack([prediction[valid], np.ones(valid.sum())], 1)
    scale, shift = np.linalg.lstsq(system, forward(truth[valid]), rcond=None)[0]
    return back(scale * prediction + shift)


def depth_errors(prediction, truth, valid, near, far):
    """Aligned prediction, truth (H, W) in metres -> {"absrel", "delta1", "rmse"} over the valid pixels."""
    p, d = prediction.clip(near, far).clip(min=1e-6)[valid], truth[valid]
    return {"absrel": np.mean(np.abs(p - d) / d), "delta1": np.mean(np.maximum(p / d, d / p) < 1.25),
            "rmse": np.sqrt(np.mean((p - d) ** 2))}


def depth(args):
    settings = {name: vars(args)[name] for name in ("predictions", "truth", "dataset", "list", "align", "scale")}
    if args.list:
        lines = [line.split() for line in Path(args.list).read_text().splitlines() if line.strip()]
        entries = [(line[0], line[1], line[2] if len(line) > 2 else None) for line in lines if line[1] != "None"]
    else:
        root = Path(args.truth)
        entries = [(picture.relative_to(root), path.relative_to(root), None) for picture, path, *_ in find_depth(root)]
    errors, (_, near, far) = [], PROTOCOLS[args.dataset]
    for picture, name, mask in tqdm(entries, "depth", dynamic_ncols=True):
        truth, valid = read_truth(args, name, mask)
        prediction = read_depth((Path(args.predictions) / picture).with_suffix(".npy")).astype(np.float64)
        if args.dataset == "kitti" and prediction.shape != truth.shape:
            prediction = kitti_crop(prediction)
        if prediction.shape != truth.shape:
            prediction = F.interpolate(torch.from_numpy(prediction)[None, None], truth.shape, mode="bilinear",
                                       antialias=True)[0, 0].numpy()
        if valid.any():
            errors.append(depth_errors(align(prediction, truth, valid, args.align), truth, valid, near, far))
    if not errors:
        raise ValueError(f"{args.truth}: no picture with a valid depth")
    result = {name: float(np.mean([error[name] for error in errors])) for name in errors[0]}
    print(f"{len(errors)} of {len(entries)} images, aligned in {args.align}: AbsRel {result['absrel']:.4f}, "
          f"delta1 {result['delta1']:.4f}, RMSE {result['rmse']:.4f} m")
    print(json.dumps({**settings, "images": len(errors), **result}))


FID_NETWORK = "inception-v3-compat"  # torch-fidelity's, which is the original TensorFlow network's equal


class Fitted(torch.utils.data.Dataset):
    """The pictures of a folder, scaled and cropped around their centre to height x width: uint8 (3, H, W)."""

    def __init__(self, folder, size=None):
        self.paths = pictures_in(folder)
        if len(self.paths) < 2:
            raise ValueError(f"{folder} has {len(self.paths)} pictures ({' '.join(SUFFIXES)}): at least 2 are needed")
        self.size = size or open_rgb(self.paths[0]).size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        picture = ImageOps.fit(open_rgb(self.paths[i]), self.size, Image.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def fid(samples, real, args, device):
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise ValueError("--real: FID takes torch-fidelity: pip install torch-fidelity") from None
    figures = calculate_metrics(
        input1=samples, input2=Fitted(real, samples.size), fid=True, cuda=device.type == "cuda", batch_size=args.batch,
        feature_extractor=FID_NETWORK, feature_extractor_weights_path=args.inception, cache=False, verbose=False)
    return figures["frechet_inception_distance"]


def aesthetics_head(path):
    """LAION's predictors are linear layers and nothing between them: {name: weight or bias} -> network."""
    weights = torch.load(path, "cpu", weights_only=True)
    layers = []
    for name in (name for name in weights if name.endswith("weight")):
        layers.append(nn.Linear(*weights[name].shape[::-1]))
        layers[-1].load_state_dict({"weight": weights[name], "bias": weights[name.removesuffix("weight") + "bias"]})
    return nn.Sequential(*layers)


@torch.no_grad()
def clip_figures(samples, args, device):
    """-> {"clip": mean cosine of picture and prompt, "aesthetics": mean score}, by the weights that are given."""
    import open_clip
    name, weights = args.clip
    if not Path(weights).is_file():
        raise ValueError(f"--clip {name} {weights}: no such file of weights")
    network, _, transform = open_clip.create_model_and_transforms(name, pretrained=weights, device=device)
    tokenizer, total, n = open_clip.get_tokenizer(name), {}, len(samples)
    prompts = read_text(Path(args.prompts)).splitlines() if args.prompts else []
    if args.prompts and len(prompts) != n:
        raise ValueError(f"--prompts {args.prompts}: {len(prompts)} lines for {n} pictures; line i is of picture i")
    head = aesthetics_head(args.aesthetics).to(device) if args.aesthetics else None
    for start in tqdm(range(0, n, args.batch), "CLIP", dynamic_ncols=True):
        paths = samples.paths[start:start + args.batch]
        pictures = torch.stack([transform(open_rgb(path)) for path in paths]).to(device)
        seen = F.normalize(network.encode_image(pictures).float(), dim=-1)
        if prompts:
            said = network.encode_text(tokenizer(prompts[start:start + len(paths)]).to(device)).float()
            total["clip"] = total.get("clip", 0) + (seen * F.normalize(said, dim=-1)).sum().item()
        if head:
            total["aesthetics"] = total.get("aesthetics", 0) + head(seen).sum().item()
    return {name: value / n for name, value in total.items()}


def images(args):
    if args.clip and not (args.prompts or args.aesthetics) or (args.prompts or args.aesthetics) and not args.clip:
        raise ValueError("--clip MODEL WEIGHTS goes with --prompts FILE, --aesthetics WEIGHTS, or both")
    if not args.real and not args.clip:
        raise ValueError("nothing to measure: give --real FOLDER for FID, --clip MODEL WEIGHTS for CLIP and aesthetics")
    device, samples = pick_device(args.device), Fitted(args.samples)
    figures = {"fid": fid(samples, args.real, args, device)} if args.real else {}
    figures |= clip_figures(samples, args, device) if args.clip else {}
    print(f"{len(samples)} pictures in {args.samples}: " + ", ".join(f"{name} {x:.4f}" for name, x in figures.items()))
    print(json.dumps({**{k: v for k, v in vars(args).items() if k != "command"}, "images": len(samples), **figures}))


def look_up(row, name):
    """"plain.black" -> row["plain"]["black"], or None."""
    for part in name.split("."):
        row = (row or {}).get(part)
    return row


def read_results(paths, where):
    """Files of JSON lines -> their rows where each name has the value in `where` ("steps=4"). Each row has "run": what
    result.json beside the file says, unless it has one."""
    rows, wanted = [], [condition.partition("=") for condition in where]
    for path in map(Path, paths):
        rows += [{"run": lora.result_of(path), **json.loads(line)} for line in read_text(path).splitlines()]
    rows = [row for row in rows if all(str(look_up(row, name)) == value for name, _, value in wanted)]
    if not rows:
        raise ValueError(f"no row{' where ' * bool(where)}{' '.join(where)} in {' '.join(map(str, paths))}")
    return rows


def plot(args):
    """A panel for each different `panel`, a line for each `by`: the mean of `y` over `x`, its span shaded."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("plot takes matplotlib: pip install matplotlib") from None
    panels = {}
    for row in read_results(args.results, args.where):
        names = (" ".join(f"{name.split('.')[-1]} {look_up(row, name)}" for name in args.panel), look_up(row, args.by))
        x, y = look_up(row, args.x), look_up(row, args.y)
        if None in (x, y, names[1]):
            raise ValueError(f"a row lacks {args.x}, {args.y} or {args.by}: {json.dumps(row)[:200]}")
        panels.setdefault(names[0], {}).setdefault(names[1], {}).setdefault(x, []).append(y)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), squeeze=False, sharey=True)
    for axis, (name, lines) in zip(axes.flat, sorted(panels.items())):
        for label, points in sorted(lines.items()):
            values = [points[x] for x in sorted(points)]
            line, = axis.plot(sorted(points), [np.mean(v) for v in values], marker=".", label=label)
            axis.fill_between(sorted(points), *zip(*((min(v), max(v)) for v in values)), color=line.get_color(), alpha=0.2)
        axis.set(title=name, xlabel=args.x, yscale="log")
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel(args.y)
    figure.tight_layout()
    partial = Path(args.out).with_suffix(".partial.png")
    figure.savefig(partial, dpi=100)
    partial.replace(args.out)
    print(args.out)


def numbers_first(group):
    """Sorts texts as a person would: numbers by value, then words."""
    return [(0, float(text), "") if text.replace(".", "", 1).isdecimal() else (1, 0.0, text) for text in group]


def table(args):
    """A Markdown table: a row for each different `by`, and of each figure the mean and, in brackets, its span."""
    groups = {}
    for row in read_results(args.results, args.where):
        group = tuple(str(look_up(row, name)) for name in args.by)
        groups.setdefault(group, []).append([look_up(row, name) for name in args.of])
    print(f"| {' | '.join(args.by)} | n | {' | '.join(args.of)} |\n|{'---|' * (len(args.by) + 1 + len(args.of))}")
    for group, rows in sorted(groups.items(), key=lambda item: numbers_first(item[0])):
        cells = []
        for values in zip(*rows):
            values = [value for value in values if value is not None]
            cells.append(f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})" if values else "")
        print(f"| {' | '.join(group)} | {len(rows)} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    def of_models(name, what, out, n, steps):
        parser = commands.add_parser(name, help=what)
        add = parser.add_argument
        add("models", nargs="*", default=[str(TINY_PRIOR)],
            help="checkpoints, and LoRA files of train.py (default: the bundled checkpoint)")
        add("--steps", type=int, nargs="+", default=steps, help=f"Euler steps, one or more (default: {steps})")
        add("--n", type=int, default=n, help=f"scenes (default: {n})")
        add("--seed", type=int, default=0, help="of the scenes and the noise (default: 0)")
        add("--precision", choices=["bf16", "fp32"], help="of the sampling (default: bf16 on CUDA, fp32 on CPU)")
        add("--device", help="cuda or cpu (default: cuda if there is one)")
        add("--out", default=out, help=f"folder of the results (default: {out})")
        return add

    add = of_models("captions", "caption accuracy of samples of the procedural scenes", "runs/captions", 512, [25])
    add("--cfg", type=float, help="guidance, 1 for none (default: 4.0, 1 after Reflow)")
    add("--batch", type=int, default=64, help="samples at a time (default: 64)")
    add("--style", choices=list(PLAIN), default="solid", help="of the scenes (default: solid)")
    add("--size", type=int, nargs="+", help="pixels to sample at: one number, or height width (default: the file's)")
    add("--objective", choices=list(OBJECTIVES), help="how to sample (default: from the file, else diff2flow)")
    add("--t-shift", type=float, default=0.0, help="ask the network at timesteps lower by this (default: 0)")
    add = of_models("depth-scenes", "depth of procedural scenes", "runs/depth-scenes", 48, [10])
    add("--ensemble", type=int, nargs="+", default=[1], help="depth is the mean of so many samples (default: [1])")
    add = commands.add_parser("depth", help="depth of sample.py --task depth against the truth").add_argument
    add("predictions", help="folder of .npy files, named like the pictures")
    add("truth", help="folder of the data set, as Marigold distributes it, or of pictures with depth")
    add("--dataset", choices=list(PROTOCOLS), default="plain", help="its units, range and crop (default: plain)")
    add("--list", help="Marigold's file list: picture, depth file and mask, a line an image (default: what is found)")
    add("--align", choices=list(SPACES), default="log",
        help="space of the least-squares fit (default: log, which our models predict)")
    add("--scale", type=float, help="metres a unit of the depth files (default: the data set's)")
    add = commands.add_parser("images", help="FID, CLIP score and aesthetics of a folder of samples").add_argument
    add("samples", help="folder of pictures, such as sample.py --singles writes")
    add("--real", help="folder of real pictures: FID; they are scaled and cropped to the samples' size")
    add("--inception", help="weights of torch-fidelity's Inception (default: it downloads them)")
    add("--clip", nargs=2, metavar=("MODEL", "WEIGHTS"), help="open_clip's name of a network, and its weights")
    add("--prompts", help="text file, one prompt a line, in the order of the pictures' names: CLIP score")
    add("--aesthetics", help="weights of LAION's predictor on that network's embeddings (ViT-L-14-quickgelu)")
    add("--batch", type=int, default=32, help="pictures at a time (default: 32)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add = commands.add_parser("plot", help="curves of many runs, and their span over seeds").add_argument
    add("results", nargs="+", help="files of JSON lines: validation.jsonl of train.py, captions.jsonl, depth.jsonl")
    add("--x", default="step", help="the figure below (default: step)")
    add("--y", default="velocity_error", help="the figure beside (default: velocity_error)")
    add("--by", default="run.objective", help="what tells lines apart (default: run.objective)")
    add("--panel", nargs="+", default=["run.lora"], help="what tells panels apart (default: run.lora)")
    add("--where", nargs="+", default=[], help="only rows in which these figures are so, such as ensemble=4")
    add("--out", default="plot.png", help="the picture (default: plot.png)")
    add = commands.add_parser("table", help="many results in one table: means and spans over seeds").add_argument
    add("results", nargs="+", help="files of JSON lines: result.json of train.py, captions.jsonl, depth.jsonl")
    add("--by", nargs="+", required=True, help="what tells rows apart, such as objective, run.lora")
    add("--of", nargs="+", required=True, help="the figures, such as all, plain.black")
    add("--where", nargs="+", default=[], help="only rows in which these figures are so, such as ensemble=4")
    args = parser.parse_args()
    {"captions": captions, "depth-scenes": depth_scenes, "depth": depth, "images": images, "plot": plot,
     "table": table}[args.command](args)


if __name__ == "__main__":
    cli(main)
