"""Train the bundled prior from scratch: its autoencoder, then UNet and text encoder, then the decoder once more.

    python -m toy.make_prior autoencoder --out runs/autoencoder
    python -m toy.make_prior prior --ckpt runs/autoencoder/model.safetensors --out runs/prior
    python -m toy.make_prior decoder --ckpt runs/prior/model.safetensors --seed 1 --out runs/decoder
    python -m toy.make_prior prior --resume runs/prior          resume a run that was stopped, to the same result

Each command writes a checkpoint, OUT/model.safetensors, in Stable Diffusion's layout:
    autoencoder    trained on two styles of scenes and on grey depth maps; its latents get mean 0 and variance 1
    prior          UNet and text encoder, trained by the diffusion loss (objective dm) on solid scenes with captions
    decoder        the decoder alone, trained further; the latents stay the same, so the prior stays valid
A run is a folder like those of train.py. toy/README.md lists the commands that made the bundled files, and their times.
"""
import argparse
import copy
import shlex
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import train
from data import Keys, progress
from depth import normalise_depth
from model import TINY, StableDiffusion
from support import state
from support.checkpoint import load_checkpoint, save_checkpoint
from support.files import check_range, cli, parse
from support.load import BUNDLED_PRIOR, compute_in_bf16, make_flow, pick_device, pick_precision, picture_size
from support.pictures import save_grid
from support.processes import Ranks
from support.run import open_run, run_folder, save_weights
from support.validation import VALIDATION_SEED, Validation, finish, measure, measure_before
from toy.scenes import Scenes

RECIPES = {
    "autoencoder": dict(steps=1600, batch=16, lr=1.5e-3, warmup=100, scenes=48_000, validation=512),
    "prior": dict(steps=16_000, batch=32, lr=1e-3, warmup=200, scenes=20_000, validation=64),
    "decoder": dict(steps=1000, batch=16, lr=1e-3, warmup=100, scenes=48_000, validation=512),
}
FIXED = dict(  # settings of train.py that are the same for all three
    decay="cosine", grad_accum=1, clip=1.0, ema=0.999, caption_dropout=0.1, objective="dm", style="solid", lora="none",
    keep=False, data=None, use_ema=False, previews=16, prompt=None)


# ------------------------------------------------------------------ settings

def arguments():
    parser = argparse.ArgumentParser(prog="python -m toy.make_prior", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    def default(name):
        return "(default: " + ", ".join(f"{task} {recipe[name]}" for task, recipe in RECIPES.items()) + ")"

    add("task", choices=list(RECIPES), help="what to train")
    add("--ckpt", help="checkpoint to start from (default: the bundled v-prior; the autoencoder: random weights)")
    add("--prediction", choices=["v", "eps"], help="what the prior learns to predict (default: from its checkpoint)")
    add("--steps", type=int, help=f"optimizer steps {default('steps')}")
    add("--batch", type=int, help=f"pictures per step {default('batch')}")
    add("--lr", type=float, help=f"learning rate of Adam {default('lr')}")
    add("--warmup", type=int, help=f"steps of linear learning-rate warm-up {default('warmup')}")
    add("--scenes", type=int, help=f"number of different scenes {default('scenes')}")
    add("--validation", type=int, help=f"number of held-out pictures {default('validation')}")
    add("--preview-every", type=int, default=1000, help="steps between previews, 0 for none (default: 1000)")
    add("--save-every", type=int, default=1000, help="save every N steps, and on Ctrl-C or SIGTERM (default: 1000)")
    add("--precision", choices=["bf16", "fp32"],
        help="of forward passes (default: bf16 where the device has it, else fp32)")
    add("--seed", type=int, default=0, help="seed of the scenes, their order, the noise and the times (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", help="folder of the run (default: runs/, the task and the time)")
    add("--resume", help="folder of a run to resume with its own settings")
    args = parse(parser)
    if args.resume:
        task = state.saved_settings(args.resume)["task"]
        if task != args.task:
            raise ValueError(f"--resume {args.resume}: a run of the task {task}, not {args.task}")
        saved = state.resumed_settings(args.resume, state.given_flags(parser, args), (*state.STEERABLE, "out"))
        own = {name: value for name, value in saved.items() if name not in ("task", *FIXED)}
        args = state.parsed_again(parser, own, vars(args), state.state_file(args.resume), [args.task])
    for name, value in RECIPES[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    with state.named(args.resume):
        check_range(args, 1, 1e9, "steps", "batch", "scenes", "validation", "save_every")
        check_range(args, 0, 1e9, "preview_every", "warmup")
        check_range(args, 0, 2**32 - 1, "seed")
        check_range(args, 1e-12, 1, "lr")
    if args.prediction and args.task != "prior":
        raise ValueError(f"--prediction {args.prediction}: only the prior predicts v or eps")
    return argparse.Namespace(**vars(args), **FIXED)


# ------------------------------------------------------------------ the autoencoder

class AutoencoderPictures(Dataset):
    """Training pictures of the autoencoder: solid scenes and outlines in turn; every eighth is a grey depth map."""

    def __init__(self, n, seed):
        self.solid, self.outline = (Scenes(n, 64, 64, style, seed) for style in ("solid", "outline"))

    def __len__(self):
        return len(self.solid)

    def __getitem__(self, key):
        item = self.solid[key] if key % 2 == 0 else self.outline[key]
        if key % 8 == 7:
            depth = normalise_depth(item["depth"], torch.ones_like(item["depth"], dtype=torch.bool))
            item["image"] = depth.expand(3, -1, -1)
        return item


def autoencoder_loss(vae, images):
    """The squared error of pixels and of their differences to their neighbours (edges), and a little KL divergence."""
    mean, std = vae.moments(images)
    output = vae.decode(mean + std * torch.randn_like(std)).float()
    edges = sum(F.mse_loss(output.diff(dim=d), images.diff(dim=d)) for d in (-2, -1))
    mean, std = mean.float(), std.float()
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    return F.mse_loss(output, images) + edges + 1e-4 * kl


@torch.no_grad()
def standardise(vae, images):
    """Give the scaled latents of `images` (N, 3, H, W) mean 0 and variance 1 in each channel, as noise has.

    A shift and a scale are folded into the encoder's last conv, and their inverse into the decoder's first, so decoded
    pictures stay the same.
    """
    mean = torch.cat([vae.moments(batch)[0] for batch in images.split(64)])
    shift, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3)) * TINY.latent_scale
    z, encoder_end, decoder_start = len(shift), vae.quant_conv, vae.post_quant_conv
    encoder_end.bias[:z] = (encoder_end.bias[:z] - shift) / scale
    encoder_end.weight[:z] /= scale.view(-1, 1, 1, 1)
    encoder_end.bias[z:] -= 2 * scale.log()                         # the other outputs are log variances
    decoder_start.bias += decoder_start.weight.flatten(1) @ shift
    decoder_start.weight *= scale.view(1, -1, 1, 1)


def load_autoencoder(args, device):
    """-> sd, {name: parameter} to train: the autoencoder, or its decoder alone."""
    if args.task == "autoencoder" and args.ckpt is None:
        sd = StableDiffusion(TINY, "v").to(device)
        log_variance = sd.first_stage_model.quant_conv.bias.data[sd.config.latent_channels:]
        log_variance -= 6                                           # almost no noise at first
    else:
        sd = load_checkpoint(args.ckpt or BUNDLED_PRIOR, device)
    vae = sd.first_stage_model.to(memory_format=torch.channels_last)
    parts = ("decoder", "post_quant_conv") if args.task == "decoder" else ("",)
    return sd, {name: p.requires_grad_() for name, p in vae.named_parameters() if name.startswith(parts)}


def save_autoencoder(args, out, sd, pictures):
    """Write the checkpoint. An autoencoder is standardised in the file only; its training continues unchanged."""
    vae = sd.first_stage_model
    before = copy.deepcopy(vae.state_dict())
    if args.task == "autoencoder":
        standardise(vae, pictures[::2])                             # those of solid scenes
    save_checkpoint(sd, out / "model.safetensors", torch.float16, resolution="64")
    vae.load_state_dict(before)


@torch.no_grad()
def preview_autoencoder(out, vae, pictures, step):
    """Write a grid: held-out pictures, and below them the same after encoding and decoding."""
    shown, path = pictures[:16], out / f"step_{step:06d}.png"
    decoded = vae.decode(vae.moments(shown)[0]).float()
    making = f"{out}, step {step}: pictures, encoded and decoded"
    save_grid(path, torch.cat([shown, decoded]), len(shown), making, ["picture", "decoded"])
    tqdm.write(f"step {step}: squared error {F.mse_loss(decoded, shown):.4f} on held-out pictures, {path}")


def train_autoencoder(args, run, sd, trained):
    """The loop of train.py with autoencoder_loss."""
    vae, dataset = sd.first_stage_model, AutoencoderPictures(args.scenes, args.seed)
    optimizer, ema = torch.optim.Adam(trained.values(), lr=args.lr, fused=True), train.EMA(trained)
    keys = Keys(len(dataset), args.seed, run.start * args.batch, args.steps * args.batch)
    for step, batches in run.steps(DataLoader(dataset, args.batch, sampler=keys), optimizer, ema):
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, args)
        for batch in batches:
            with torch.autocast(sd.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                images = batch["image"].to(sd.device, memory_format=torch.channels_last)
                loss = autoencoder_loss(vae, images)
            loss.backward()
            run.log(loss=loss)
        run.log(norm=torch.nn.utils.clip_grad_norm_(trained.values(), args.clip))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step, args.ema)


def make_autoencoder(args, out, device):
    sd, trained = load_autoencoder(args, device)
    held_out = AutoencoderPictures(args.validation, VALIDATION_SEED)
    pictures = torch.stack([held_out[i]["image"] for i in range(args.validation)]).to(device)
    print(f"{args.task}: {sum(p.numel() for p in trained.values()):,} trainable parameters\n{describe(args, out)}")
    with open_run(args, out, Ranks(device), resume_command(args, out)) as run:
        run.save_weights = lambda step: save_autoencoder(args, out, sd, pictures)
        run.preview = lambda step: preview_autoencoder(out, sd.first_stage_model, pictures, step)
        train_autoencoder(args, run, sd, trained)
    weights = str(out / "model.safetensors")
    command = ["python", "sample.py"] if args.task == "decoder" else ["python", "-m", "toy.make_prior", "prior"]
    print(f"weights: {weights}\nnext: {shlex.join([*command, '--ckpt', weights])}")


# ------------------------------------------------------------------ the prior

def load_prior(args, device):
    """-> sd, {name: parameter} to train: the UNet, and all parameters of the text encoder that it uses."""
    sd = load_checkpoint(args.ckpt or BUNDLED_PRIOR, device, prediction=args.prediction)
    sd.unet.to(memory_format=torch.channels_last).train()
    trained = dict(sd.unet.requires_grad_().named_parameters())
    for name, parameter in sd.text_encoders[0].named_parameters():
        if name != "text_projection":       # for the pooled output, which Stable Diffusion does not use
            trained[f"text.{name}"] = parameter.requires_grad_()
    if args.precision == "bf16":
        compute_in_bf16(sd)
    return sd, trained


def make_prior(args, out, device):
    """Train all weights of the UNet on scenes with captions, as train.py does, and the text encoder with them."""
    sd, trained = load_prior(args, device)
    flow, size = make_flow(sd, args.objective), list(picture_size(sd))
    dataset = Scenes(args.scenes, *size, args.style, args.seed)
    held_out = Scenes(args.validation, *size, args.style, VALIDATION_SEED)
    items = [held_out[i] for i in range(args.validation)]
    metadata = {"objective": args.objective, "style": args.style, "prediction": sd.prediction, "task": args.task,
                "schedule": "scaled_linear", "preset": "none", "base": Path(args.ckpt or BUNDLED_PRIOR).name,
                "resolution": " ".join(map(str, size))}
    print(f"prior: {sum(p.numel() for p in trained.values()):,} trainable parameters, {sd.prediction}-prediction\n"
          f"{describe(args, out)}")
    with open_run(args, out, Ranks(device), resume_command(args, out), sd.unet_hash) as run:
        latents = [train.encode_item(sd, item) for item in progress(items, "encoding held-out items")]
        validation = Validation(args, out, sd, flow, train.text_to_image, latents, "other scenes")
        before = measure_before(validation)
        run.preview, run.save_weights = validation.preview, partial(save_weights, args, out, sd, metadata)
        loader = train.load_batches(args, sd, dataset, run)
        ema = train.train(args, run, sd, flow, trained, loader, train.text_to_image)
        with ema.in_place():
            after = measure(validation)
        finish(validation, items, size, before, after)


# ------------------------------------------------------------------ the command line

def describe(args, out):
    return (f"{args.steps:,} steps of {args.batch} of {args.scenes:,} scenes, lr {args.lr:g}, {args.precision}, "
            f"seed {args.seed}, into {out}/")


def resume_command(args, out):
    return shlex.join(["python", "-m", "toy.make_prior", args.task, "--resume", str(out)])


def main():
    args = arguments()
    device = pick_device(args.device)
    args.precision, _ = pick_precision(args.precision, device)
    out = run_folder(args)
    torch.manual_seed(args.seed)
    (make_prior if args.task == "prior" else make_autoencoder)(args, out, device)


if __name__ == "__main__":
    cli(main)
