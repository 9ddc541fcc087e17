"""What needs a CUDA device: the same results as on the CPU, no waiting of the host, compiled and resumed runs.

    python -m pytest -m gpu
"""
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lora
import sample
from support.checkpoint import load_checkpoint
from support.load import make_flow
from support.packed import pack
from tests import runs
from tests.checkpoints import relative
from tests.runs import FEW, SHORT, works

ROOT, DEVICE = Path(__file__).parent.parent, "cuda"
tiny, at_work = runs.tiny, runs.at_work
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("at_work"),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 convolutions, not TF32. Products are float32 already."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def inputs(sd, n=2, size=32):
    """-> latents (n, z, h, w), text embeddings (n, 77, D), and that of the empty prompt, the same on every device."""
    x = torch.randn(n, *sd.latent_shape([size, size]), generator=torch.Generator().manual_seed(1)).to(sd.device)
    return x, sd.encode_text(["a red boat"] * n), sd.encode_text([""])


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_the_velocity_and_a_sample_in_float32_are_the_cpus(files, name):
    results = []
    for device in "cpu", DEVICE:
        sd = load_checkpoint(files[name], device)
        flow, (x, context, uncond) = make_flow(sd, "diff2flow"), inputs(sd, size=64)
        with torch.no_grad():
            u = flow(x, torch.tensor([0.2, 0.7]).to(device), context)
        results.append([y.cpu() for y in (u, flow.sample(x, context, 3, uncond, 4.0), sd.decode(x), context)])
    assert all(relative(ours, exact) < 1e-4 for exact, ours in zip(*results))


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_unet_equals_the_plain_one(files, name, dtype):
    sd, outputs = load_checkpoint(files[name], DEVICE, dtype), []
    x, context, _ = inputs(sd, size=64)
    for packing in False, True:
        if packing:
            pack(sd)
        with torch.no_grad():
            outputs.append(sd.unet(x, torch.tensor([3.5, 900.0]).to(DEVICE), context))
    assert relative(*outputs) < (1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("preset", ["base", 2])
def test_a_lora_step_in_bf16_never_makes_the_host_wait(tiny, preset):
    from train import EMA
    sd = load_checkpoint(tiny, DEVICE, torch.bfloat16)
    trained = dict(enumerate(lora.inject(sd.unet, preset)))
    flow, optimizer, ema = make_flow(sd, "diff2flow"), torch.optim.Adam(trained.values(), fused=True), EMA(trained)
    images = torch.zeros(2, 3, 32, 32).pin_memory()
    for mode in "default", "error":         # the first step makes Adam's averages
        torch.cuda.set_sync_debug_mode(mode)
        try:
            x1 = sd.encode(images.to(DEVICE, non_blocking=True)).float()
            flow.loss(x1, sd.encode_text(["a red boat", ""])).backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(1000, 0.999)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def run(words):
    """Start train.py in a process of its own on the device."""
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words.split()])


def weights(folder):
    tensors = load_file(f"{folder}/lora.safetensors")
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


def test_a_killed_and_resumed_run_is_as_near_to_an_undisturbed_one_as_a_second_one_is(tiny):
    """Bit for bit, where the GPU's kernels are."""
    words = f"{SHORT} --ckpt {tiny} --device {DEVICE} --steps 30 --save-every 5 --preview-every 0 --out "
    for folder in "whole", "again":
        assert run(words + folder).wait() == 0
    process = run(words + "killed")
    while process.poll() is None and not Path("killed/state.safetensors").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert run("--resume killed").wait() == 0
    whole, again, killed = map(weights, ("whole", "again", "killed"))
    assert relative(killed, whole) <= 3 * relative(again, whole)


@pytest.mark.parametrize("words", ["--precision fp32", "--precision fp32 --cfg 1 --batch 3"])
def test_a_picture_sampled_with_cuda_graphs_is_that_without(tiny, words):
    pixels = []
    for more in "", "--compile":
        works(sample, f"{FEW} --ckpt {tiny} --n 5 --device {DEVICE} {words} {more} --out picture.png")
        pixels.append(torch.tensor(list(Image.open("picture.png").convert("RGB").tobytes())).int())
    assert (pixels[0] - pixels[1]).abs().max() <= 1


def test_a_compiled_run_trains_the_weights_of_one_that_is_not(tiny):
    for folder in "plain", "compiled":
        words = f"{SHORT} --ckpt {tiny} --device {DEVICE} --grad-accum 2 --lora 2 --preview-every 0 --out {folder}"
        assert run(words + " --compile" * (folder == "compiled")).wait() == 0
    assert relative(weights("compiled"), weights("plain")) < 1e-3
