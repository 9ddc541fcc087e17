"""What is written here is what other tools read, and what they write is read here: diffusers' own code runs."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import lora
from diff2flow import Diff2Flow
from model import load_checkpoint
from sample import load_flow, make_flow
from tests.checkpoints import NARROW, PROMPTS, full_pipeline, randn, relative, same
from tests.runs import metadata, refusal, works

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
RECIPE = next(code for code in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if "sigmas" in code)
PREDICTIONS = pytest.mark.parametrize("name, prediction", [("sd15", "eps"), ("sd21", "v"), ("sd21", "eps")])


@pytest.fixture
def base(files, tmp_path, request):
    """The file of a narrow model that says its prediction, in a folder that the test runs in."""
    name, prediction = request.getfixturevalue("name"), request.getfixturevalue("prediction")
    save_file(load_file(files[name]), tmp_path / "base.safetensors", {"prediction": prediction})
    return tmp_path / "base.safetensors"


def write_lora(path, base, **told):
    """A LoRA of random weights for the checkpoint `base` -> its path."""
    sd = load_checkpoint(base)
    torch.manual_seed(7)
    for parameter in lora.inject(sd.unet, 4):
        parameter.data += 0.03 * torch.randn_like(parameter)
    lora.save(sd.unet, path, {"base": base.name, "base_hash": sd.unet_hash, "prediction": sd.prediction, **told})
    return path


@torch.no_grad()
def euler(sd, flow, sigmas, x_dm, prompt, cfg):
    """Our Euler steps on a grid of sigmas, from x_dm at its first level -> latents."""
    times = [1 / (1 + sigma) for sigma in sigmas]
    context, empty = sd.encode_text([prompt]), sd.encode_text([""])
    x_fm = x_dm * (times[0] ** 2 + (1 - times[0]) ** 2) ** 0.5                  # over alpha + sigma, Eq. 13
    for now, later in zip(times, times[1:]):
        t_fm = torch.tensor([now])
        without = flow(x_fm, t_fm, empty)
        x_fm = x_fm + (later - now) * (without + cfg * (flow(x_fm, t_fm, context) - without))
    return x_fm


def run_recipe(pipeline, lora_file, noise, monkeypatch):
    """The README's lines, as printed -> the latents that they end with, and their sigmas, prompt and guidance."""
    called, original = {}, StableDiffusionPipeline.__call__

    def call(self, prompt, **options):
        called.update(options, prompt=prompt)
        return original(self, prompt, **options, latents=noise, output_type="latent")

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", lambda path: pipeline)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    code, names = RECIPE.replace("runs/NAME/lora.safetensors", str(lora_file)), {}
    if lora_file is None:
        code = "\n".join(line for line in code.splitlines() if "load_lora_weights" not in line)
    exec(code, names)
    return names["image"][None], called


# ------------------------------------------------------------------ out

@PREDICTIONS
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "LoRA"])
def test_diffusers_gives_our_latents_by_the_readmes_lines_as_printed(base, name, prediction, adapted, monkeypatch):
    adapter = write_lora(base.with_name("lora.safetensors"), base) if adapted else None
    pipeline = full_pipeline(NARROW[name], load_file(base), prediction)
    noise = randn(1, 4, 8, 8).float()
    theirs, called = run_recipe(pipeline, adapter, noise, monkeypatch)
    sd, flow = load_flow(base, adapter)
    ours = euler(sd, flow, called["sigmas"], noise, called["prompt"], called["guidance_scale"])
    assert relative(theirs, ours) < 1e-4                            # a printed sigma is rounded to 1e-4 for both
    without_last = euler(sd, flow, called["sigmas"][:-1], noise, called["prompt"], called["guidance_scale"])
    assert relative(without_last, ours) > 0.02
