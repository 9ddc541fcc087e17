"""Measure a checkpoint: the share of captions whose every attribute a classifier finds in the sampled picture.

    python evaluate.py captions --steps 25 --cfg 4

The scenes are data.py's, so their attributes are known. The classifier is trained here at first use and kept in runs/.
Each run measures it on real held-out scenes, as they are and through the checkpoint's autoencoder, and refuses to judge
by one that is right about every attribute in less than 98 % of the former.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import lora
from data import LABELS, PLAIN, Scenes, cli, render, save_grid
from diff2flow import OBJECTIVES
from model import TINY_PRIOR, CheckpointFile, load_checkpoint, pick_device, save_tensors
from schedule import sd_schedule

SIZE, CLASSES = 64, [len(classes) for classes in LABELS.values()]   # pixels a side; classes of each attribute
TRAIN_SEED, HELD_OUT_SEED = 10_000_000, 20_000_000  # plus the step, plus --seed: far from what train.py is given
TRAIN_STEPS, TRAIN_BATCH = 1200, 128
REAL_SCENES, REQUIRED = 2048, 0.98                  # the classifier is measured on so many, and must reach this


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


def score(predicted, labels):
    """Two (N, 10) -> {"all": share of rows right in all attributes that apply, attribute: its own share, or None}."""
    right, applies = predicted == labels, labels != -100
    own = [row[on].float().mean().item() if on.any() else None for row, on in zip(right.T, applies.T)]
    return {"all": (right | ~applies).all(1).float().mean().item(), **dict(zip(LABELS, own))}


def captions(args):
    if min(args.n, args.steps, args.batch) < 1:
        raise ValueError("--n, --steps and --batch must be at least 1")
    device, out = pick_device(args.device), Path(args.out or f"runs/evaluate-{Path(args.ckpt).stem}")
    sd = load_checkpoint(args.ckpt, device)
    objective = sd.metadata.get("objective", "diff2flow")
    if args.lora is not None:
        objective = lora.load(args.lora, sd.unet).get("objective", objective)
        lora.merge(sd.unet)
    if objective not in OBJECTIVES:
        raise ValueError(f"{args.lora or args.ckpt}: its objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    flow = OBJECTIVES[objective](sd.unet, *sd_schedule(), sd.prediction).to(device)
    settings = vars(args) | {"out": str(out), "device": str(device), "objective": objective,
                             "prediction": sd.prediction}
    print(json.dumps(settings))
    classifier = load_classifier(args.style, device)
    world = Scenes(max(args.n, REAL_SCENES), SIZE, SIZE, args.style, HELD_OUT_SEED + args.seed)
    scenes = [world.scene(i) for i in range(len(world))]
    images, labels = draw(scenes)
    shares = {"real": score(predict(classifier, images.to(device)), labels)}
    if shares["real"]["all"] < REQUIRED:
        raise ValueError(f"the classifier is right about only {shares['real']['all']:.1%} of real scenes, not "
                         f"{REQUIRED:.0%}: delete runs/classifier-{args.style}.safetensors, and it is trained again")
    decoded = torch.cat([sd.decode(sd.encode(some.to(device))).clamp(-1, 1) for some in images.split(args.batch)])
    shares["decoded"] = score(predict(classifier, decoded), labels)

    texts, side, samples = [scene.caption for scene in scenes[:args.n]], SIZE // sd.factor, []
    shape = (args.n, sd.config.latent_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    for i in tqdm(range(0, args.n, args.batch), "samples", dynamic_ncols=True):
        x0, context = noise[i:i + args.batch], sd.encode_text(texts[i:i + args.batch])
        uncond = sd.encode_text([""]).expand_as(context)
        samples.append(sd.decode(flow.sample(x0, context, args.steps, uncond, args.cfg)).clamp(-1, 1))
    shares["samples"] = score(predict(classifier, torch.cat(samples)), labels[:args.n])
    save_grid(out / "samples.png", torch.cat(samples)[:32], 8, captions=texts[:32])

    print(f"{out}/samples.png\nright in    {len(world)} real scenes, the same encoded and decoded, {args.n} samples")
    for head in shares["real"]:
        print(f"{head:10}", *("   none" if of[head] is None else f"{of[head]:7.1%}" for of in shares.values()))
    print(json.dumps({**settings, "real_scenes": len(world), "shares": shares}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("captions", help="caption accuracy of samples of the procedural scenes").add_argument
    add("--ckpt", default=str(TINY_PRIOR), help="Stable Diffusion 1.x or 2.x file (default: the bundled small one)")
    add("--lora", help="LoRA file made for it (default: none)")
    for name, default, what in (("--steps", 25, "Euler steps"), ("--cfg", 4.0, "guidance, 1 for none"),
                                ("--n", 512, "captions, one sample each"), ("--batch", 64, "samples at a time"),
                                ("--seed", 0, "of the scenes and the noise")):
        add(name, type=type(default), default=default, help=f"{what} (default: {default})")
    add("--style", choices=list(PLAIN), default="solid", help="of the scenes (default: solid)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", help="folder of the pictures (default: runs/evaluate- and the checkpoint's name)")
    args = parser.parse_args()
    {"captions": captions}[args.command](args)


if __name__ == "__main__":
    cli(main)
