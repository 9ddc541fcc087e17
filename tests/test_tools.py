"""Other tools read what we write, and we read what they write: these tests run diffusers' own code."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import lora
from support.checkpoint import load_checkpoint, modelspec
from support.load import load_flow
from support.lora_file import load_lora, save_lora
from tests.checkpoints import NARROW, full_pipeline, randn, relative, same
from tests.runs import metadata, refusal, works
from tools import merge

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/other_tools.md").read_text(), re.MULTILINE | re.DOTALL)
RECIPE, = (code for code in BLOCKS if "sigmas" in code and "load_lora_weights" in code)
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


@pytest.mark.parametrize("words, error", [
    ("{}/none.safetensors --ckpt {}/base.safetensors --out {}/x.safetensors", "none.safetensors: no such file"),
    ("{}/base.safetensors --ckpt {}/base.safetensors --out {}/x.safetensors", "not a LoRA with kohya's keys"),
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


# ------------------------------------------------------------------ adapters of other kinds, merged by diffusers

def peft_state(unet):
    """-> PEFT's state of random adapters of diffusers' UNet, which has none afterwards."""
    from peft import LoraConfig, get_peft_model_state_dict
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))
    torch.manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    state = {key: value.clone() for key, value in get_peft_model_state_dict(unet).items()}
    unet.unload_lora()
    return state


def peft_file(state):
    return {f"unet.{key}": value for key, value in state.items()}


def older_file(state):
    """The names that diffusers wrote until 0.21: unet.PATH.processor.to_q_lora.down.weight."""
    sides = {"A": "down", "B": "up"}
    return {"unet." + re.sub(r"\.(to_\w)\.lora_([AB])", lambda m: f".processor.{m[1]}_lora.{sides[m[2]]}", key): value
            for key, value in state.items()}


@pytest.mark.parametrize("kind, write", [
    ("a LoRA with PEFT's names", peft_file), ("a LoRA with the names of older diffusers", older_file)])
def test_the_error_for_another_kind_of_adapter_names_a_conversion_that_works(files, tmp_path, kind, write):
    pipe = full_pipeline(NARROW["sd15"], load_file(files["sd15"]))
    file = tmp_path / "other.safetensors"
    save_file(write(peft_state(pipe.unet)), file)
    message = refusal_of_lora(file, files["sd15"])
    assert f": {kind}, which is not supported; diffusers merges it: " in message
    steps = re.search(r"pipe\.load.*\(FOLDER\)", message)[0].split(", ")
    names = {"pipe": pipe, "FILE": str(file), "FOLDER": str(tmp_path / "folder")}
    plain = load_checkpoint(files["sd15"])
    eval(steps[0], names)
    context = torch.randn(1, 77, 128)
    x, t_dm = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        theirs = pipe.unet(x, t_dm, context).sample
    for step in steps[1:]:
        eval(step, names)
    ours = load_checkpoint(tmp_path / "folder")
    assert relative(ours.unet(x, t_dm, context), theirs) < 1e-4 < 0.01 < relative(plain.unet(x, t_dm, context), theirs)


def refusal_of_lora(file, base):
    with pytest.raises(ValueError) as caught:
        load_lora(file, load_checkpoint(base).unet)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key, kind", [
    ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "a LoRA that includes the text encoder"),
    ("lora_unet_conv_in.dora_scale", "a DoRA"), ("lora_unet_conv_in.hada_w1_a", "a LoHa"),
    ("lora_unet_conv_in.lokr_w1", "a LoKr"),
    ("lora_unet_conv_in.lora_mid.weight", "a LoRA with a third matrix, lora_mid"),
    ("lora_unet_input_blocks_1_1_proj_in.lora_up.weight", "a LoRA with CompVis' names of the layers")])
def test_the_error_for_an_adapter_that_comfyui_reads_names_its_kind_and_comfyui(files, tmp_path, key, kind):
    file = tmp_path / "other.safetensors"
    save_file({key: torch.ones(4, 4, 1, 1)}, file)
    assert f": {kind}, which is not supported; ComfyUI merges it: its nodes Load LoRA" in refusal_of_lora(
        file, files["sd15"])


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
