"""Other tools read what we write, and we read what they write: these tests run diffusers' own code."""
import re
import subprocess
import sys
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, MarigoldDepthPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import depth
import lora
from data import noises
from support.checkpoint import load_checkpoint, modelspec, save_checkpoint
from support.load import load_flow, picture_size
from support.lora_file import load_lora, save_lora
from tests.checkpoints import NARROW, full_pipeline, randn, relative, same
from tests.runs import metadata, refusal, works
from tools import merge

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/other_tools.md").read_text(), re.MULTILINE | re.DOTALL)
RECIPE, = (code for code in BLOCKS if "sigmas" in code and "load_lora_weights" in code)
MARIGOLD, = (code for code in BLOCKS if "Marigold" in code)
PREDICTIONS = pytest.mark.parametrize("name, prediction", [("sd15", "eps"), ("sd21", "v"), ("sd21", "eps")])


@pytest.fixture
def base(files, tmp_path, request):
    """-> the file of a narrow model, with the prediction in its metadata."""
    name, prediction = request.getfixturevalue("name"), request.getfixturevalue("prediction")
    save_file(load_file(files[name]), tmp_path / "base.safetensors", {"prediction": prediction})
    return tmp_path / "base.safetensors"


def write_lora(path, base, **more):
    """Write a LoRA with random weights for the checkpoint `base` -> its path. more: extra metadata."""
    sd = load_checkpoint(base)
    torch.manual_seed(7)
    for parameter in lora.inject(sd.unet, 4):
        parameter.data += 0.03 * torch.randn_like(parameter)
    save_lora(sd.unet, path, {"base": base.name, "base_hash": sd.unet_hash, "prediction": sd.prediction, **more})
    return path


@torch.no_grad()
def euler(sd, flow, sigmas, x_dm, prompt, cfg):
    """Euler steps on our velocity field at the times of these sigmas, from x_dm at the first one -> latents."""
    times = [1 / (1 + sigma) for sigma in sigmas]
    context, empty = sd.encode_text([prompt]), sd.encode_text([""])
    x_fm = x_dm * (times[0] ** 2 + (1 - times[0]) ** 2) ** 0.5                  # divided by alpha + sigma, Eq. 13
    for now, later in zip(times, times[1:]):
        t_fm = torch.tensor([now])
        uncond = flow(x_fm, t_fm, empty)
        x_fm = x_fm + (later - now) * (uncond + cfg * (flow(x_fm, t_fm, context) - uncond))
    return x_fm


def run_recipe(pipeline, lora_file, noise, monkeypatch, guidance=None):
    """Run the code on docs/other_tools.md, as printed or with another guidance scale -> the latents that it ends with,
    and its sigmas, prompt and guidance scale."""
    called, original = {}, StableDiffusionPipeline.__call__

    def call(self, prompt, **options):
        called.update(options, prompt=prompt)
        return original(self, prompt, **options, latents=noise, output_type="latent")

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", lambda path: pipeline)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    code, names = RECIPE.replace("runs/NAME/lora.safetensors", str(lora_file)), {}
    if guidance is not None:
        code = re.sub(r"guidance_scale=[\d.]+", f"guidance_scale={guidance}", code)
    if lora_file is None:
        code = "\n".join(line for line in code.splitlines() if "load_lora_weights" not in line)
    exec(code, names)
    return names["image"][None], called


# ------------------------------------------------------------------ our models in diffusers

@PREDICTIONS
@pytest.mark.parametrize("adapted, guidance", [(False, 4.0), (True, None)],
                         ids=["plain, guidance 4", "LoRA, as printed"])
def test_the_code_in_the_docs_gives_our_latents_in_diffusers(
        base, name, prediction, adapted, guidance, monkeypatch):
    adapter = write_lora(base.with_name("lora.safetensors"), base) if adapted else None
    pipeline = full_pipeline(NARROW[name], load_file(base), prediction)
    noise = randn(1, 4, 8, 8).float()
    theirs, called = run_recipe(pipeline, adapter, noise, monkeypatch, guidance)
    sd, flow = load_flow(base, adapter)
    ours = euler(sd, flow, called["sigmas"], noise, called["prompt"], called["guidance_scale"])
    assert relative(theirs, ours) < 1e-4                            # both use the printed sigmas, rounded to 1e-4
    without_last = euler(sd, flow, called["sigmas"][:-1], noise, called["prompt"], called["guidance_scale"])
    assert relative(without_last, ours) > 0.02


LAYOUTS = {  # bases with another precision, other names, extra tensors
    "sd15": lambda tensors: {key: value.half() if value.is_floating_point() else value
                             for key, value in tensors.items()},
    "sd21": lambda tensors: tensors | {"v_pred": torch.zeros(0), "first_stage_model.loss.logvar": torch.ones(1)},
    "old": lambda tensors: {key.replace("text_model.", ""): value for key, value in tensors.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_file_has_the_bases_key_names_precision_and_extra_tensors_and_the_weights_of_base_and_lora(
        files, tmp_path, layout):
    base, merged = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save_file(before := LAYOUTS[layout](load_file(files["sd21" if layout == "sd21" else "sd15"])), base)
    adapter = write_lora(tmp_path / "lora.safetensors", base)
    works(merge, f"{adapter} --ckpt {base} --out {merged}")
    after = load_file(merged)
    assert {key: (value.shape, value.dtype) for key, value in after.items()} == {
        key: (value.shape, value.dtype) for key, value in before.items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("model.diffusion_model.") for key in changed)
    both, one = load_flow(base, adapter)[0], load_checkpoint(merged)
    tolerance = 1e-3 if layout == "sd15" else 0                     # float16 rounds a weight by 5e-4
    assert all(relative(a, b) <= tolerance for a, b in zip(one.parameters(), both.parameters()))
    assert one.prediction == both.prediction and load_flow(merged)[0].metadata["base"] == "base.safetensors"
    works(merge, f"{adapter} --ckpt {base} --out {merged} --dtype bf16")
    assert load_file(merged)["model.diffusion_model.out.2.weight"].dtype == torch.bfloat16


@PREDICTIONS
def test_diffusers_opens_a_merged_file_and_computes_the_same_as_our_base_and_lora(base, name, prediction, monkeypatch):
    adapter = write_lora(base.with_name("lora.safetensors"), base)
    works(merge, f"{adapter} --ckpt {base} --out {base.with_name('merged.safetensors')}")
    folder = base.with_name("config")                               # for real models from the hub
    full_pipeline(NARROW[name], load_file(base), prediction).save_pretrained(folder)
    pipeline = StableDiffusionPipeline.from_single_file(
        str(base.with_name("merged.safetensors")), config=str(folder), local_files_only=True)
    noise = randn(1, 4, 8, 8).float()
    theirs, called = run_recipe(pipeline, None, noise, monkeypatch)
    sd, flow = load_flow(base, adapter)
    ours = euler(sd, flow, called["sigmas"], noise, called["prompt"], called["guidance_scale"])
    plain, flow = load_flow(base)
    unadapted = euler(plain, flow, called["sigmas"], noise, called["prompt"], called["guidance_scale"])
    assert relative(theirs, ours) < 1e-4 and relative(unadapted, ours) > 0.05


@PREDICTIONS
def test_a_depth_model_gives_its_depth_in_marigolds_pipeline_by_the_code_in_the_docs(
        base, name, prediction, tmp_path, monkeypatch):
    sd = load_checkpoint(base)
    sd.add_image_input()
    sd.unet.input_blocks[0][0].weight.copy_(randn(32, 8, 3, 3) / 8)                 # halves that differ
    save_checkpoint(sd, tmp_path / "depth.safetensors", task="depth", resolution="64")
    full_pipeline(NARROW[name], load_file(base), prediction).save_pretrained(tmp_path / "config")
    for kind, more in (UNet2DConditionModel, {"subfolder": "unet"}), (StableDiffusionPipeline, {}):
        plain = partial(kind.from_single_file, config=str(tmp_path / "config"), local_files_only=True, **more)
        monkeypatch.setattr(kind, "from_single_file", plain)
    monkeypatch.setattr(MarigoldDepthPipeline, "__call__", partialmethod(
        MarigoldDepthPipeline.__call__, latents=noises([0], (4, 8, 8), 3)))
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    names = {"image": Image.fromarray(pixels)}
    code = MARIGOLD.replace("processing_resolution=512", "processing_resolution=64")
    exec(code if prediction == "v" else code.replace('"v_prediction"', '"epsilon"'), names)
    theirs = torch.from_numpy(names["depth"][0, :, :, 0]) * 2 - 1
    sd, flow = load_flow("depth.safetensors", task="depth", objective="dm")
    ours = depth.predict(sd, flow, names["image"], 10, seed=3)
    assert (ours - theirs).abs().max() < 1e-3 and relative(ours, theirs) < 1e-4 and ours.std() > 0.01


def test_a_folder_of_marigold_is_a_depth_model_with_the_depth_of_its_pipeline(files, tmp_path):
    plain = full_pipeline(NARROW["sd21"], load_file(files["sd21"]))
    unet = UNet2DConditionModel.from_config(plain.unet.config, in_channels=8)
    unet.load_state_dict(plain.unet.state_dict() | {"conv_in.weight": randn(32, 8, 3, 3).float() / 8})
    scheduler = DDIMScheduler.from_config(plain.scheduler.config, prediction_type="v_prediction", clip_sample=False,
                                          timestep_spacing="trailing", rescale_betas_zero_snr=True)
    theirs = MarigoldDepthPipeline(unet, plain.vae, scheduler, plain.text_encoder, plain.tokenizer, "depth", True, True)
    theirs.save_pretrained(tmp_path / "marigold")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    expected = theirs(image, 4, processing_resolution=64, latents=noises([0], (4, 8, 8), 3)).prediction[0, :, :, 0]
    sd, flow = load_flow(tmp_path / "marigold", task="depth", objective="dm")
    ours = depth.predict(sd, flow, image, 4, seed=3, size=[64])
    assert sd.prediction == "v" and sd.zero_snr and picture_size(sd) == (576, 768)
    assert relative(ours, torch.from_numpy(expected) * 2 - 1) < 1e-4 and ours.std() > 0.01


@pytest.mark.parametrize("words, error", [
    ("{}/none.safetensors --ckpt {}/base.safetensors --out {}/x.safetensors", "none.safetensors: no such file"),
    ("{}/base.safetensors --ckpt {}/base.safetensors --out {}/x.safetensors", "not a LoRA"),
    ("{}/base.safetensors --ckpt {}/base.safetensors --out {}/x.ckpt", "it must end in .safetensors")])
def test_files_that_cannot_be_merged_give_a_one_line_error_and_nothing_is_written(files, tmp_path, words, error):
    save_file(load_file(files["sd15"]), tmp_path / "base.safetensors")
    assert error in refusal(merge, words.format(*[tmp_path] * 3))
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("name, prediction, depth, architecture", [
    ("sd15", "eps", False, "stable-diffusion-v1"), ("sd21", "v", False, "stable-diffusion-v2-768-v"),
    ("sd21", "eps", False, "stable-diffusion-v2-512"), ("sd21", "v", True, "stable-diffusion-v2-768-v-depth")])
def test_modelspec_metadata_has_architecture_prediction_and_width_by_height(
        files, name, prediction, depth, architecture):
    sd = load_checkpoint(files[name], prediction=prediction)
    if depth:
        sd.add_image_input()
    spec = modelspec(sd, "mine", [384, 512], "/lora")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", spec.pop("modelspec.date"))
    assert spec == {
        "modelspec.sai_model_spec": "1.0.0", "modelspec.title": "mine",
        "modelspec.architecture": architecture + "/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "512x384", "modelspec.prediction_type": {"v": "v", "eps": "epsilon"}[prediction]}


def test_the_metadata_of_a_merged_file_is_that_of_a_checkpoint_not_of_a_lora(files, tmp_path):
    base, merged = files["sd21"], tmp_path / "merged.safetensors"
    sd = load_checkpoint(base)
    adapter = write_lora(tmp_path / "lora.safetensors", base, resolution="384 512", objective="diff2flow",
                         **modelspec(sd, "a LoRA", [384, 512], "/lora"))
    works(merge, f"{adapter} --ckpt {base} --out {merged}")
    written = metadata(merged)
    assert written["modelspec.architecture"] == "stable-diffusion-v2-768-v" and written["modelspec.title"] == "merged"
    assert written["modelspec.resolution"] == "512x384" and written["objective"] == "diff2flow"
    assert not any(name.startswith("ss_") for name in written)
    written = metadata(adapter)
    assert written["ss_network_module"] == "networks.lora" and written["ss_network_dim"] == "Dynamic"


# ------------------------------------------------------------------ LoRA files that do not load

def refusal_of_lora(file, base):
    with pytest.raises(ValueError) as caught:
        load_lora(file, load_checkpoint(base).unet)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_error_for_a_pickled_lora_has_a_command_that_converts_it(files, tmp_path):
    adapter = write_lora(tmp_path / "lora.safetensors", files["sd15"])
    torch.save(load_file(adapter), tmp_path / "lora.pt")
    command = refusal_of_lora(tmp_path / "lora.pt", files["sd15"]).split("convert it to .safetensors: ")[1]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert same(load_file(tmp_path / "lora.pt.safetensors"), load_file(adapter))
    load_lora(tmp_path / "lora.pt.safetensors", load_checkpoint(files["sd15"]).unet)


@pytest.mark.parametrize("damage, error", [
    (lambda down: torch.zeros(0, *down.shape[1:]), "not a floating-point matrix"),
    (lambda down: torch.tensor(1.0), "not a floating-point matrix"),
    (lambda down: down * float("nan"), "has NaN or infinity"), (lambda down: down / 0, "has NaN or infinity")],
    ids=["rank 0", "a number", "NaN", "infinite"])
def test_a_lora_with_a_damaged_tensor_is_refused_with_its_name(files, tmp_path, damage, error):
    adapter = write_lora(tmp_path / "lora.safetensors", files["sd15"])
    key = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    save_file({**(tensors := load_file(adapter)), key: damage(tensors[key])}, adapter)
    message = refusal_of_lora(adapter, files["sd15"])
    assert key in message and error in message
