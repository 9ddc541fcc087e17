"""Make the bundled prior from nothing: its autoencoder, then the prior itself, then its decoder once more.

    python -m toy.make_prior autoencoder --out runs/autoencoder
    python -m toy.make_prior prior --ckpt runs/autoencoder/model.safetensors --out runs/prior
    python -m toy.make_prior decoder --ckpt runs/prior/model.safetensors --seed 1 --out runs/decoder
    python -m toy.make_prior prior --resume runs/prior          go on with a run that was stopped, to the same result

Each command writes a checkpoint, OUT/model.safetensors, in Stable Diffusion's layout:
    autoencoder    learns to encode and decode both styles of scenes, and depth maps in grey; the latents get variance 1
    prior          UNet and text encoder learn the diffusion loss (objective dm) on solid scenes with captions
    decoder        the decoder learns on alone: the latents stay as they are, and so does the prior
A run is a folder as train.py's are. toy/README.md has the commands and the times of the bundled files.
"""
import argparse
import copy
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import run
import train
from data import Keys, save_grid, seed_of
from depth import normalise_depth
from files import check_range, cli
from model import LATENT_SCALE, TINY, StableDiffusion, load_checkpoint
from sample import BUNDLED_PRIOR, make_flow, pick_device, pick_precision
from toy.scenes import Scenes

TASKS = ("autoencoder", "prior", "decoder")
RECIPES = {  # each setting by task
    #              autoencoder  prior    decoder
    "steps":       (1600,       16_000,  1000),
    "batch":       (16,         32,      16),
    "lr":          (1.5e-3,     1e-3,    1e-3),
    "warmup":      (100,        200,     100),
    "scenes":      (48_000,     20_000,  48_000),
    "validation":  (512,        64,      512),
}
FIXED = {  # settings of train.py that are the same for all three
    "decay": "cosine", "grad_accum": 1, "clip": 1.0, "ema": 0.999, "caption_dropout": 0.1, "t_sampling": "uniform",
    "objective": "dm", "style": "solid", "lora": "none", "keep": False, "data": None, "use_ema": False, "previews": 16,
}


# ------------------------------------------------------------------ settings

def arguments():
    parser = argparse.ArgumentParser(prog="python -m toy.make_prior", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    def default(name):
        return "(default: " + ", ".join(f"{value} {task}" for value, task in zip(RECIPES[name], TASKS)) + ")"

    add("task", choices=TASKS, help="what to train")
    add("--ckpt", help="checkpoint to start from (default: the bundled v-prior; the autoencoder starts from nothing)")
    add("--prediction", choices=["v", "eps"], help="what the prior learns to predict (default: as its checkpoint says)")
    add("--steps", type=int, help=f"optimizer steps {default('steps')}")
    add("--batch", type=int, help=f"pictures in a step {default('batch')}")
    add("--lr", type=float, help=f"learning rate of Adam {default('lr')}")
    add("--warmup", type=int, help=f"steps in which the learning rate rises {default('warmup')}")
    add("--scenes", type=int, help=f"number of different scenes {default('scenes')}")
    add("--validation", type=int, help=f"number of held-out pictures {default('validation')}")
    add("--preview-every", type=int, default=1000, help="steps between previews, 0 for none (default: 1000)")
    add("--save-every", type=int, default=1000, help="steps between saves (default: 1000)")
    add("--precision", choices=["bf16", "fp32"],
        help="of the forward pass (default: bf16 where the device computes it, else fp32)")
    add("--seed", type=int, default=0, help="seed of the scenes, their order, the noise and the times (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", help="folder of the run (default: runs/, the task and the time)")
    add("--resume", help="folder of a run to go on with; its own settings apply")
    args = parser.parse_args()
    if args.resume:
        saved = run.saved_settings(args.resume)
        if saved["task"] != args.task:
            raise ValueError(f"--resume {args.resume}: a run of the task {saved['task']}, not {args.task}")
        return argparse.Namespace(**run.resumed_settings(args.resume, run.given_flags(parser, args)))
    for name, row in RECIPES.items():
        if getattr(args, name) is None:
            setattr(args, name, row[TASKS.index(args.task)])
    check_range(args, 1, 1e9, "steps", "batch", "scenes", "validation", "save_every")
    check_range(args, 0, 1e9, "preview_every", "warmup")
    check_range(args, 0, 2**32, "seed")
    check_range(args, 1e-12, 1, "lr")
    if args.prediction and args.task != "prior":
        raise ValueError(f"--prediction {args.prediction}: only the prior predicts v or eps")
    return argparse.Namespace(**vars(args), **FIXED)


# ------------------------------------------------------------------ the autoencoder

class AutoencoderPictures(Dataset):
    """What the autoencoder learns: solid scenes and outlines in turn; every eighth picture is a depth map in grey."""

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
    """Make the scaled latents of `images` (N, 3, H, W) have mean 0 and variance 1 in each channel, as the noise has.

    A shift and a scale go into the last conv of the encoder, and their inverse into the first one of the decoder: what
    is decoded stays the same.
    """
    mean = torch.cat([vae.moments(batch)[0] for batch in images.split(64)])
    shift, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3)) * LATENT_SCALE
    z, encoder_end, decoder_start = len(shift), vae.quant_conv, vae.post_quant_conv
    encoder_end.bias[:z] = (encoder_end.bias[:z] - shift) / scale
    encoder_end.weight[:z] /= scale.view(-1, 1, 1, 1)
    encoder_end.bias[z:] -= 2 * scale.log()                         # the other outputs are log variances
    decoder_start.bias += decoder_start.weight.flatten(1) @ shift
    decoder_start.weight *= scale.view(1, -1, 1, 1)


def load_autoencoder(args, device):
    """-> sd, {name: parameter} of what is trained: the autoencoder, or its decoder alone."""
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
    """Write the checkpoint. A new autoencoder is standardised in the file alone, and goes on learning as it is."""
    vae = sd.first_stage_model
    before = copy.deepcopy(vae.state_dict())
    if args.task == "autoencoder":
        standardise(vae, pictures[::2])                             # the solid ones
    sd.save(out / "model.safetensors", torch.float16, resolution="64")
    vae.load_state_dict(before)


@torch.no_grad()
def preview_autoencoder(out, vae, pictures, step):
    """Write the first held-out pictures, and below each what is decoded from its latents."""
    shown, path = pictures[:16], out / f"step_{step:06d}.png"
    decoded = vae.decode(vae.moments(shown)[0]).float()
    making = f"{out}, step {step}: pictures, encoded and decoded"
    save_grid(path, torch.cat([shown, decoded]), len(shown), making, ["picture", "decoded"])
    tqdm.write(f"step {step}: squared error {F.mse_loss(decoded, shown):.4f} on held-out pictures, {path}")


def train_autoencoder(args, job, amp, sd, trained, pictures):
    """The loop of train.py with another loss. pictures (N, 3, 64, 64) are held out."""
    out, vae, dataset = job.out, sd.first_stage_model, AutoencoderPictures(args.scenes, args.seed)
    optimizer, ema = torch.optim.Adam(trained.values(), lr=args.lr, fused=True), train.EMA(trained)
    start = run.restore(run.state_file(args.resume), ema, optimizer) if args.resume else 0
    keys = Keys(len(dataset), args.seed, start * args.batch, args.steps * args.batch)
    metrics = run.Metrics(args, out, start)
    batches = metrics.timed(iter(DataLoader(dataset, args.batch, sampler=keys)))
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", dynamic_ncols=True)
    job.stop.waits = True
    for step in bar:
        torch.manual_seed(seed_of(args.seed, step))
        optimizer.param_groups[0]["lr"] = lr = train.learning_rate(step, args)
        images = next(batches)["image"].to(sd.device, memory_format=torch.channels_last)
        with amp:
            loss = autoencoder_loss(vae, images)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step, args.ema)

        done = step + 1
        saving = done % args.save_every == 0 or done == args.steps or job.stop.came
        metrics.add(done, loss.detach(), norm, lr, bar, now=saving)
        with ema.in_place():
            if saving:
                save_autoencoder(args, out, sd, pictures)
            if args.preview_every and done % args.preview_every == 0:
                with amp:
                    preview_autoencoder(out, vae, pictures, done)
        if saving:  # the state comes last: a run killed before it is there makes the other files again
            run.save_state(out, args, done, ema, optimizer)
        if job.stop.came and done < args.steps:
            raise run.Stopped(done, args.steps)
    job.stop.waits = False


def make_autoencoder(args, device, amp, job):
    sd, trained = load_autoencoder(args, device)
    held_out = AutoencoderPictures(args.validation, train.HELD_OUT_SEED)
    pictures = torch.stack([held_out[i]["image"] for i in range(args.validation)]).to(device)
    print(f"{args.task}: {sum(p.numel() for p in trained.values()):,} trainable parameters\n{describe(args, job.out)}")
    train_autoencoder(args, job, amp, sd, trained, pictures)
    weights = str(job.out / "model.safetensors")
    command = ["python", "sample.py"] if args.task == "decoder" else ["python", "-m", "toy.make_prior", "prior"]
    print(f"weights: {weights}\nnext: {shlex.join([*command, '--ckpt', weights])}")


# ------------------------------------------------------------------ the prior

def load_prior(args, device):
    """-> sd, {name: parameter} of what is trained: all of the UNet, and of the text encoder what the UNet sees."""
    sd = load_checkpoint(args.ckpt or BUNDLED_PRIOR, device, prediction=args.prediction)
    sd.unet.to(memory_format=torch.channels_last).train()
    trained = dict(sd.unet.requires_grad_().named_parameters())
    for name, parameter in sd.text_encoder.named_parameters():
        if name != "text_projection":       # it is of the pooled output, which Stable Diffusion leaves aside
            trained[f"text.{name}"] = parameter.requires_grad_()
    return sd, trained


def make_prior(args, device, amp, job):
    """As train.py trains all weights on scenes with captions, and the text encoder with them."""
    out, (sd, trained) = job.out, load_prior(args, device)
    flow, size = make_flow(sd, args.objective), list(sd.picture_size())
    dataset = Scenes(args.scenes, *size, args.style, args.seed)
    held_out = Scenes(args.validation, *size, args.style, train.HELD_OUT_SEED)
    items = [held_out[i] for i in range(args.validation)]
    metadata = {"objective": args.objective, "style": args.style, "prediction": sd.prediction, "task": args.task,
                "schedule": "scaled_linear", "preset": "none", "base": Path(args.ckpt or BUNDLED_PRIOR).name,
                "resolution": " ".join(map(str, size))}
    print(f"prior: {sum(p.numel() for p in trained.values()):,} trainable parameters, {sd.prediction}-network\n"
          f"{describe(args, out)}")
    with amp:
        validation = train.Validation(args, out, sd, flow, train.text_to_image, items)
        before = train.look_before(args, validation, dataset)
    ema = train.train(args, job, amp, sd, flow, train.text_to_image, trained, dataset, validation, metadata)
    with ema.in_place(), amp:
        after = validation.velocity_error(), validation.draw(4, validation.cfg_few)
    train.finish(args, out, validation, items, size, before, after)


# ------------------------------------------------------------------ the command line

def describe(args, out):
    return (f"{args.steps:,} steps of {args.batch} of {args.scenes:,} scenes, lr {args.lr:g}, {args.precision}, "
            f"seed {args.seed}, into {out}/")


def main():
    args = arguments()
    device = pick_device(args.device)
    args.precision, amp = pick_precision(args.precision, device)
    out = train.run_folder(args)
    command = ["python", "-m", "toy.make_prior", args.task, "--resume", str(out)]
    with run.job(out, run.Ranks(device), shlex.join(command)) as job:
        torch.manual_seed(args.seed)
        (make_prior if args.task == "prior" else make_autoencoder)(args, device, amp, job)


if __name__ == "__main__":
    cli(main)
