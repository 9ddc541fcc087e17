"""Checkpoints that exist in practice load, and are saved bit for bit; others are refused with a one-line error."""
import builtins
import json
import os
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import TINY, StableDiffusion
from support.checkpoint import load_checkpoint, open_checkpoint, read_config, save_checkpoint
from tests import checkpoints
from tests.checkpoints import CONFIGS, NARROW, PROMPTS, TEXT, UNET, VAE, hollow_checkpoint, manifest, relative, same

NORM1_BIAS = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # its spread separates v from eps


# ------------------------------------------------------------------ files that load

@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_the_architecture_is_read_from_the_tensors_shapes(files, name):
    assert read_config({key: shape for key, (shape, _) in manifest(name).items()}) == CONFIGS[name]
    assert load_checkpoint(files[name]).config == NARROW[name]


def test_a_model_of_another_architecture_is_the_same_after_saving_and_loading(tmp_path):
    sd = StableDiffusion(TINY, "v").requires_grad_(False)
    sd.unet.out[2].weight.normal_()                                 # zero at the start
    save_checkpoint(sd, tmp_path / "tiny.safetensors")
    read = load_checkpoint(tmp_path / "tiny.safetensors")
    assert read.config == TINY and read.prediction == "v" and same(read.state_dict(), sd.state_dict())
    x, t_dm, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), sd.encode_text(["a red ball"])
    assert torch.equal(read.encode_text(["a red ball"]), context)
    assert torch.equal(read.unet(x, t_dm, context), sd.unet(x, t_dm, context))


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_a_saved_file_has_the_same_tensors_bit_for_bit_and_the_same_metadata(files, tmp_path, name):
    before = load_file(files[name])
    save_file(before, tmp_path / "before.safetensors", metadata={"style": "outline", "step": "2", "prediction": "v"})
    sd = load_checkpoint(tmp_path / "before.safetensors")
    save_checkpoint(sd, tmp_path / "folder" / "after.safetensors", step="3")
    assert same(load_file(tmp_path / "folder" / "after.safetensors"), before)
    with safe_open(tmp_path / "folder" / "after.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "style": "outline", "step": "3", "prediction": "v",
                                   "software": "Diff2Flow"}


def test_a_float16_file_is_loaded_as_float32_and_can_be_saved_as_float16_again(files, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(files["sd21"]).items()}
    save_file(half, tmp_path / "half.safetensors")
    sd = load_checkpoint(tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in sd.parameters()} == {torch.float32}
    save_checkpoint(sd, tmp_path / "again.safetensors", dtype=torch.float16)
    assert same(load_file(tmp_path / "again.safetensors"), half)


def test_changing_the_weights_does_not_change_the_mapped_file_until_the_model_is_saved_there(files, tmp_path):
    before, path = load_file(files["sd15"]), tmp_path / "same.safetensors"
    save_file(before, path)
    sd = load_checkpoint(path)
    sd.unet.out[2].weight.add_(1)
    assert same(load_file(path), before)
    save_checkpoint(sd, path)
    before[UNET + "out.2.weight"] += 1
    assert same(load_file(path), before)


def test_a_non_pruned_file_loads_its_plain_weights_or_with_use_ema_its_ema_weights(files, tmp_path, capsys):
    tensors = load_file(files["sd15"])
    averaged = {"model_ema." + "".join(key.split(".")[1:]): value + 1   # the names as diffusers computes them
                for key, value in tensors.items() if key.startswith(UNET)}
    save_file({**tensors, **averaged}, tmp_path / "full.safetensors")
    plain = load_checkpoint(tmp_path / "full.safetensors")
    assert ", non-EMA weights" in capsys.readouterr().out
    save_checkpoint(plain, tmp_path / "plain.safetensors")
    assert same(load_file(tmp_path / "plain.safetensors"), tensors)
    ema = load_checkpoint(tmp_path / "full.safetensors", use_ema=True)
    assert ", EMA weights" in capsys.readouterr().out
    assert same(ema.state_dict(), {k: v + k.startswith(UNET) for k, v in plain.state_dict().items()})
    assert "no EMA weights" in refusal(files["sd15"], use_ema=True)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_lightning_ckpt_loads_without_lightning(files, tmp_path, monkeypatch, legacy):
    """Such files contain the callback's class, pickled by name, as a dictionary key, and numpy's numbers."""
    tensors, name = load_file(files["sd15"]), "pytorch_lightning.callbacks.model_checkpoint"
    path = tmp_path / "lightning.ckpt"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as context:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            context.setitem(sys.modules, parent, types.ModuleType(parent))
        sys.modules[name].ModelCheckpoint = callback
        scores = {"best_model_score": torch.tensor(0.5), "best": np.float64(0.1), "step": np.int32(3), "x": np.ones(2)}
        torch.save({"epoch": 0, "callbacks": {callback: scores}, "state_dict": tensors}, path,
                   _use_new_zipfile_serialization=not legacy)
    if legacy:                                                      # as written with numpy 1
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    save_checkpoint(load_checkpoint(path), tmp_path / "converted.safetensors")
    assert same(load_file(tmp_path / "converted.safetensors"), tensors)


def test_open_clip_is_imported_before_the_meta_device(files, monkeypatch):
    """Some versions compute while they are imported, which fails on the meta device."""
    devices, original = [], builtins.__import__

    def record(name, *args):
        if name.startswith("open_clip"):
            devices.append(torch.get_default_device().type)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", record)
    load_checkpoint(files["sd15"])
    assert devices[0] == "cpu"


# ------------------------------------------------------------------ v or eps

def test_prediction_is_the_arguments_else_the_metadatas_else_eps_for_sd1(files, tmp_path, capsys):
    path = tmp_path / "v1.safetensors"
    save_file(load_file(files["sd15"]), path, metadata={"prediction": "v"})
    assert load_checkpoint(path).prediction == "v" and "(from the file's prediction)" in capsys.readouterr().out
    assert load_checkpoint(path, prediction="eps").prediction == "eps" and "(as asked)" in capsys.readouterr().out
    assert load_checkpoint(files["sd15"]).prediction == "eps"
    assert "eps-prediction (SD 1.x usually is eps; if this one is not: --prediction v)" in capsys.readouterr().out


def test_prediction_is_read_from_modelspec_metadata(files, tmp_path):
    path = tmp_path / "spec.safetensors"
    save_file(load_file(files["sd21"]), path, metadata={"modelspec.prediction_type": "epsilon"})
    assert load_checkpoint(path).prediction == "eps"


@pytest.mark.parametrize("name, line, prediction", [
    ("sd15", 'parameterization: "v"', "v"), ("sd15", "parameterization: v  # 2023", "v"),
    ("sd21", "parameterization: 'eps'", "eps"), ("sd15", "# parameterization: v", "eps"), ("sd15", "\0\xff", "eps")])
def test_the_prediction_is_read_from_a_yaml_of_the_original_code_beside_the_file(
        files, tmp_path, capsys, name, line, prediction):
    shutil.copy(files[name], tmp_path / "mine.safetensors")
    (tmp_path / "mine.yaml").write_text(f"model:\n  params:\n    {line}\n", encoding="latin1")
    assert load_checkpoint(tmp_path / "mine.safetensors").prediction == prediction
    assert ("(from the parameterization in mine.yaml)" in capsys.readouterr().out) == line.startswith("param")


@pytest.mark.parametrize("std, prediction", [(0.0901, "v"), (0.0899, "eps")])
def test_prediction_of_sd2_is_guessed_from_the_std_of_one_norms_biases(files, tmp_path, capsys, std, prediction):
    tensors = load_file(files["sd21"])
    tensors[NORM1_BIAS] *= std / tensors[NORM1_BIAS].std()
    save_file(tensors, tmp_path / "guess.safetensors")
    assert load_checkpoint(tmp_path / "guess.safetensors").prediction == prediction
    assert "guessed from a norm's std, 0.090: v if above 0.09" in capsys.readouterr().out


def test_a_prediction_other_than_v_and_eps_is_refused(files, tmp_path):
    assert "''" in refusal(files["sd15"], prediction="")
    save_file(load_file(files["sd15"]), tmp_path / "odd.safetensors", metadata={"prediction": "velocity"})
    assert "'velocity'" in refusal(tmp_path / "odd.safetensors")
    assert load_checkpoint(tmp_path / "odd.safetensors", prediction="eps").prediction == "eps"


# ------------------------------------------------------------------ files that do not load

def refusal(path, **settings):
    """-> the one-line error, which begins with the path, of a file that does not load."""
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path, **settings)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    return message


def refusal_of(tensors, folder):
    torch.save(tensors, folder / "other.ckpt")
    return refusal(folder / "other.ckpt")


def test_a_missing_file_a_folder_and_another_suffix_are_refused(tmp_path):
    assert "no such checkpoint file" in refusal(tmp_path / "absent.safetensors")
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    assert ".safetensors or .ckpt" in refusal(tmp_path / "model.bin")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "before torch 1.6"])
def test_a_truncated_file_and_a_failed_download_are_refused(files, tmp_path, kind):
    intact, damaged = files["sd15"], tmp_path / ("damaged.safetensors" if kind == "safetensors" else "damaged.ckpt")
    if kind != "safetensors":
        intact = tmp_path / "intact.ckpt"
        torch.save({"state_dict": load_file(files["sd15"])}, intact, _use_new_zipfile_serialization=kind == "zip")
    content = intact.read_bytes()
    for damage in (b"", content[:100], content[:200_000], content[:-1], b"<!DOCTYPE html>\n<html>\n", bytes(1000)):
        damaged.write_bytes(damage)
        assert "truncated" in refusal(damaged)


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path):
    message = refusal_of({"state_dict": {}, "extra": Intruder(tmp_path / "made")}, tmp_path)
    assert "mkdir, which could run code" in message and not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 5}, {1: torch.ones(1)}], ids=str)
def test_a_pickle_without_named_tensors_is_refused(tmp_path, content):
    refusal_of(content, tmp_path)


@pytest.mark.parametrize("name, key", [
    ("sd21", UNET + "input_blocks.1.0.in_layers.0.weight"), ("sd15", UNET + "input_blocks.0.0.weight"),
    ("sd21", VAE + "encoder.down.3.block.0.conv1.weight"),
    ("sd15", TEXT + "transformer.text_model.encoder.layers.0.self_attn.q_proj.bias")])
def test_a_missing_tensor_is_named(tmp_path, name, key):
    tensors = hollow_checkpoint(name)
    del tensors[key]
    message = refusal_of(tensors, tmp_path)
    assert key in message and "alone" not in message


@pytest.mark.parametrize("key, shape, error", [
    (UNET + "input_blocks.4.0.in_layers.0.weight", (641,), r"in_layers.0.weight is (641,), expected (320,)"),
    (UNET + "middle_block.1.norm.weight", (), "is (), expected (1280,)"),
    (UNET + "input_blocks.4.0.in_layers.2.weight", (641, 320, 3, 3), "not a checkpoint of Stable Diffusion"),
    (VAE + "encoder.down.1.block.0.conv1.weight", (257, 128, 3, 3), "not a checkpoint of Stable Diffusion"),
    (VAE + "quant_conv.weight", (), "Stable Diffusion 1.x, 2.x or XL is needed"),
    (UNET + "input_blocks.0.0.weight", (320, 9, 3, 3), "takes 9 channels: an inpainting"),
    (TEXT + "transformer.text_model.embeddings.token_embedding.weight", (49000, 768), "49000 words"),
    (TEXT + "transformer.text_model.embeddings.token_embedding.weight", (49408, 769), "width 769")])
def test_a_tensor_of_a_wrong_shape_is_refused(tmp_path, key, shape, error):
    assert error in refusal_of({**hollow_checkpoint("sd15"), key: torch.ones(()).expand(shape)}, tmp_path)


OTHER_FILES = {
    "SDXL": ["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
             VAE + "encoder.conv_in.weight", UNET + "label_emb.0.0.weight", UNET + "input_blocks.0.0.weight"],
    "LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_mlp_fc1.alpha"],
    "diffusers": ["down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight", "conv_in.weight"],
    "a UNet alone": ["input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight", "out.2.weight"],
    "autoencoder": ["encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "quant_conv.weight"],
    "text encoder": ["text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"],
    "Stable Diffusion 3": [UNET + "joint_blocks.0.x_block.attn.qkv.weight", VAE + "encoder.conv_in.weight"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "ControlNet": ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
    "2 tensors": ["weight", "bias"],
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_another_kind_of_model_is_refused_by_its_name(tmp_path, what):
    save_file({key: torch.ones(1) for key in OTHER_FILES[what]}, tmp_path / "other.safetensors")
    assert what in refusal(tmp_path / "other.safetensors")


# ------------------------------------------------------------------ layouts that exist in practice

def write(tensors, folder, metadata=None):
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "layout.safetensors", metadata)
    return folder / "layout.safetensors"


def outputs(sd):
    """-> the outputs of all networks for fixed inputs."""
    x, context, images = (checkpoints.randn(*shape).float() for shape in ((1, 4, 8, 8), (1, 77, 128), (1, 3, 16, 16)))
    return sd.unet(x, torch.tensor([500.0]), context), sd.encode(images), sd.decode(x), sd.encode_text(PROMPTS[:3])


def equal(ours, theirs):
    """Whether two models compute the same. A tensor's alignment in memory can change the last bits: 1e-7."""
    return all(relative(a, b) < 2e-6 for a, b in zip(outputs(ours), outputs(theirs)))


EXTRA = {"embedding_manager.initial_embeddings": torch.ones(2), "first_stage_model.loss.logvar": torch.ones(1),
          "scale_factor": torch.tensor(0.18215), "control_model.out.weight": torch.ones(3),
          "cond_stage_model.transformer.text_projection.weight": torch.ones(2, 2)}


def test_extra_tensors_are_listed_in_one_line_and_kept_when_the_model_is_saved(files, tmp_path, capsys):
    tensors = load_file(files["sd15"]) | EXTRA
    sd = load_checkpoint(write(tensors, tmp_path))
    assert ("5 extra tensors are unused, and kept when the model is saved: "
            "cond_stage_model.transformer.text_projection.weight, control_model.out.weight, "
            "embedding_manager.initial_embeddings ...\n") in capsys.readouterr().out
    save_checkpoint(sd, tmp_path / "again.safetensors", torch.float16)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys() and same({name: again[name] for name in EXTRA}, EXTRA)
    load_checkpoint(files["sd15"])
    assert "extra tensors" not in capsys.readouterr().out


@pytest.mark.parametrize("unknown", [
    UNET + "input_blocks.1.0.unknown", VAE + "encoder.unknown", VAE + "decoder.unknown", VAE + "quant_conv.unknown",
    VAE + "post_quant_conv.unknown", TEXT + "transformer.text_model.encoder.layers.0.unknown",
    TEXT + "transformer.text_model.embeddings.unknown", TEXT + "transformer.text_model.final_layer_norm.unknown"])
def test_an_unknown_tensor_inside_a_network_is_refused(files, tmp_path, unknown):
    message = refusal(write(load_file(files["sd15"]) | {unknown: torch.ones(1)}, tmp_path))
    assert f"0 tensors missing; 1 unknown, first {unknown}" in message


def test_prediction_and_schedule_are_read_from_what_comfyui_writes_into_its_files(files, tmp_path, capsys):
    tensors = load_file(files["sd15"])
    sd = load_checkpoint(write(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path))
    assert sd.prediction == "v" and sd.zero_snr
    assert "v-prediction (from the file's tensor v_pred), zero terminal SNR" in capsys.readouterr().out
    save_checkpoint(sd, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() >= {"v_pred", "ztsnr"}
    assert load_checkpoint(write(tensors, tmp_path, {"modelspec.predict_key": "v"})).prediction == "v"
    sd = load_checkpoint(write(tensors, tmp_path, {"zero_snr": "true", "prediction": "v"}))
    assert sd.zero_snr and not load_checkpoint(files["sd15"]).zero_snr
    save_checkpoint(sd, tmp_path / "again.safetensors")
    assert load_checkpoint(tmp_path / "again.safetensors").zero_snr


@pytest.mark.parametrize("name, usual, other", [
    ("sd15", "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    ("sd21", "cond_stage_model.model.", "conditioner.embedders.0.model.")])
def test_the_text_encoder_may_have_either_of_its_names_and_keeps_it_when_saved(files, tmp_path, name, usual, other):
    tensors = {key.replace(usual, other): value for key, value in load_file(files[name]).items()}
    assert tensors.keys() != load_file(files[name]).keys()
    sd = load_checkpoint(write(tensors, tmp_path))
    assert equal(sd, load_checkpoint(files[name]))
    save_checkpoint(sd, tmp_path / "again.safetensors")
    assert same(load_file(tmp_path / "again.safetensors"), tensors)


@pytest.mark.parametrize("projection", [False, True])
def test_a_text_encoder_of_23_layers_from_diffusers_computes_the_same_as_one_of_24(files, tmp_path, projection):
    tensors = {key: value for key, value in load_file(files["sd21"]).items()
               if ".resblocks.23." not in key and (projection or "text_projection" not in key)}
    sd = load_checkpoint(write(tensors, tmp_path))
    assert sd.config.text_layers == 23 and equal(sd, load_checkpoint(files["sd21"]))
    save_checkpoint(sd, tmp_path / "again.safetensors")
    assert same(load_file(tmp_path / "again.safetensors"), tensors)


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float8_e4m3fn, 2**-3)])
def test_files_of_lower_precision_load_and_are_saved_in_that_precision(files, tmp_path, dtype, rounding):
    before = {key: value.to(dtype) if value.is_floating_point() else value
              for key, value in load_file(files["sd15"]).items()}
    sd, exact = load_checkpoint(write(before, tmp_path)), load_checkpoint(files["sd15"])
    assert all(relative(a, b) < rounding for a, b in zip(sd.parameters(), exact.parameters()))
    save_checkpoint(sd, tmp_path / "again.safetensors")
    after = load_file(tmp_path / "again.safetensors")
    assert all(value.dtype == after[key].dtype and torch.equal(value.float(), after[key].float())
               for key, value in before.items())


@pytest.mark.parametrize("prefixes, missing", [
    ((VAE,), "no autoencoder"), ((UNET,), "no UNet"), ((TEXT,), "no text encoder"),
    ((VAE, TEXT), "no autoencoder and no text encoder")])
def test_the_part_that_a_file_lacks_is_named(files, tmp_path, prefixes, missing):
    tensors = {key: value for key, value in load_file(files["sd21"]).items() if not key.startswith(prefixes)}
    assert f"it has {missing}; a whole checkpoint of Stable Diffusion 1.x, 2.x or XL is needed" in refusal(
        write(tensors, tmp_path))


@pytest.mark.parametrize("pattern", [r"encoder\.down\.", r"resblocks\.", r"input_blocks\.([1-9]|1\d)\."])
def test_a_file_without_the_blocks_of_a_network_is_refused(files, tmp_path, pattern):
    tensors = {key: value for key, value in load_file(files["sd21"]).items() if not re.search(pattern, key)}
    message = refusal(write(tensors, tmp_path))
    assert "a network has no blocks" in message or "incomplete checkpoint" in message


def test_a_tensor_of_a_type_that_torch_cannot_compute_with_is_refused(files, tmp_path):
    tensors = load_file(files["sd15"])
    name = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    rows, columns = tensors[name].shape
    tensors[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)     # two per byte
    assert "not a checkpoint of Stable Diffusion, or damaged (NotImplementedError" in refusal(
        write(tensors, tmp_path))


def test_a_unet_of_8_channels_is_a_depth_model_only_if_its_metadata_says_so(files, tmp_path):
    """Those of InstructPix2Pix say nothing. Depth models of ours from before their latents came last say task alone."""
    name, tensors = UNET + "input_blocks.0.0.weight", load_file(files["sd15"])
    tensors[name] = torch.randn(len(tensors[name]), 8, 3, 3)
    message = refusal(write(tensors, tmp_path))
    assert "takes 8 channels, and neither its metadata nor the layout of Marigold" in message
    assert "InstructPix2Pix" in message and "takes 8 channels" in refusal(write(tensors, tmp_path, {"task": "reflow"}))
    old = load_checkpoint(write(tensors, tmp_path, {"task": "depth"}))
    new = load_checkpoint(write(tensors, tmp_path, {"task": "depth", "image_input": "first"}))
    weights = [sd.unet.input_blocks[0][0].weight for sd in (old, new)]
    assert old.is_depth_model and torch.equal(weights[1], tensors[name])
    assert torch.equal(weights[0], torch.cat([tensors[name][:, 4:], tensors[name][:, :4]], 1))
    save_checkpoint(old, tmp_path / "again.safetensors")
    again = load_checkpoint(tmp_path / "again.safetensors")
    assert torch.equal(again.unet.input_blocks[0][0].weight, weights[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1])
def test_weights_that_are_not_floating_point_or_not_finite_are_refused_with_the_tensors_name(files, tmp_path, value):
    name, tensors = UNET + "out.2.bias", load_file(files["sd21"])
    tensors[name] = torch.full_like(tensors[name], value, dtype=torch.int32 if value == 1 else None)
    assert f"{name} is not floating point, or has NaN or infinity" in refusal_of(tensors, tmp_path)


def test_the_unet_of_sd2_with_the_text_encoder_of_sd1_is_refused(files, tmp_path):
    both = load_file(files["sd15"]), load_file(files["sd21"])
    tensors = {key: value for key, value in both[0].items() if key.startswith(TEXT)} | {
        key: value for key, value in both[1].items() if not key.startswith(TEXT)}
    assert "the UNet is an SD 2.x, the text encoder has the names of an SD 1.x" in refusal(write(tensors, tmp_path))


# ------------------------------------------------------------------ a diffusers folder

@pytest.fixture(scope="module", params=["sd15", "sd21"])
def folder(request, files, tmp_path_factory):
    """A narrow pipeline as diffusers saves it, named like the file with the same weights. Tests must not change it."""
    path = tmp_path_factory.mktemp("folder") / request.param
    prediction = {"sd15": "eps", "sd21": "v"}[request.param]
    checkpoints.full_pipeline(NARROW[request.param], load_file(files[request.param]), prediction).save_pretrained(path)
    return path


def change(folder, where, renames=None, variant="", shards=1, dtype=None):
    """Rewrite the weights file of one part: other names, another variant, several shards."""
    path, = (folder / where).glob("*.safetensors")
    tensors = {(renames or (lambda name: name))(name): value.to(dtype or value.dtype)
               for name, value in load_file(path).items()}
    path.unlink()
    for i in range(shards):
        part = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        shard = {name: tensors[name] for name in list(tensors)[i::shards]}
        save_file(shard, path.with_name(f"{path.stem}{variant}{part}.safetensors"))


def old_names(name):
    for new, old in ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"):
        name = name.replace(f"attentions.0.{new}", f"attentions.0.{old}")
    return name


def test_a_folder_computes_the_same_as_the_single_file_and_is_saved_as_one(folder, files, tmp_path, capsys):
    sd, single = load_checkpoint(folder), load_checkpoint(files[folder.name])
    assert equal(sd, single) and sd.unet_hash == single.unet_hash
    assert f"{sd.prediction}-prediction (from the file's prediction_type)" in capsys.readouterr().out
    assert sd.prediction == {"sd15": "eps", "sd21": "v"}[folder.name] and not sd.zero_snr
    save_checkpoint(sd, tmp_path / "one.safetensors")
    one, before = load_file(tmp_path / "one.safetensors"), load_file(files[folder.name])
    assert one.keys() <= before.keys() and all(torch.equal(one[key], before[key]) for key in one)
    again = load_checkpoint(tmp_path / "one.safetensors")
    assert equal(again, single) and again.prediction == sd.prediction


CHANGES = {
    "the old names of the autoencoder's attention": lambda folder: change(folder, "vae", old_names),
    "text_model. in the names": lambda folder: change(folder, "text_encoder", lambda name: "text_model." + name),
    "shards": lambda folder: [change(folder, part, shards=3) for part in ("unet", "text_encoder")],
    "an fp16 variant in shards": lambda folder: [
        change(folder, part, variant=".fp16", shards=2) for part in ("unet", "vae")],
    "a damaged variant beside the plain one": lambda folder: (
        folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_folder_loads_with(folder, files, tmp_path, what):
    shutil.copytree(folder, tmp_path / "folder")
    CHANGES[what](tmp_path / "folder")
    assert equal(load_checkpoint(tmp_path / "folder"), load_checkpoint(files[folder.name]))


def edit_json(folder, name, **changes):
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(content))


def test_prediction_and_zero_snr_are_read_from_a_folders_scheduler(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "folder")
    edit_json(tmp_path / "folder", "scheduler/scheduler_config.json", prediction_type="v_prediction",
              rescale_betas_zero_snr=True)
    sd = load_checkpoint(tmp_path / "folder")
    assert sd.prediction == "v" and sd.zero_snr
    assert load_checkpoint(tmp_path / "folder", prediction="eps").prediction == "eps"
    edit_json(tmp_path / "folder", "scheduler/scheduler_config.json", prediction_type="sample")
    assert "prediction 'sample'" in refusal(tmp_path / "folder")


def test_a_scheduler_without_prediction_type_as_in_sd_1_5s_official_folder_means_eps(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "folder")
    path = tmp_path / "folder/scheduler/scheduler_config.json"
    content = json.loads(path.read_text())
    del content["prediction_type"]
    path.write_text(json.dumps(content))
    assert load_checkpoint(tmp_path / "folder").prediction == "eps"


def widen(folder, channels):
    """Give the UNet of a folder more input channels."""
    path, = (folder / "unet").glob("*.safetensors")
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.randn(len(tensors["conv_in.weight"]), channels, 3, 3)
    save_file(tensors, path)


ODD_CONFIGS = [
    ("unet", {"down_block_types": ["CrossAttnDownBlock2D"]}), ("unet", {"block_out_channels": []}),
    ("unet", {"layers_per_block": 999_999}), ("unet", {"layers_per_block": [2, 2]}),
    ("vae", {"block_out_channels": []}), ("vae", {"layers_per_block": 500_000}),
    ("text_encoder", {"num_hidden_layers": 0}), ("text_encoder", {"num_hidden_layers": 999_999}),
    ("text_encoder", {"hidden_size": "x"})]


@pytest.mark.parametrize("part, changes", ODD_CONFIGS, ids=str)
def test_the_sizes_of_a_folder_are_those_of_its_tensors_whatever_its_config_json_says(folder, tmp_path, part, changes):
    (tmp_path / "folder").mkdir()
    for path in folder.iterdir():                                   # links: the tensors are only read
        (tmp_path / "folder" / path.name).symlink_to(path)
    (tmp_path / "folder" / part).unlink()
    shutil.copytree(folder / part, tmp_path / "folder" / part)
    edit_json(tmp_path / "folder", f"{part}/config.json", **changes)
    assert open_checkpoint(tmp_path / "folder").config == open_checkpoint(folder).config


DAMAGED_FOLDERS = {
    "a folder of StableDiffusion3Pipeline": lambda folder: edit_json(
        folder, "model_index.json", _class_name="StableDiffusion3Pipeline"),
    "text_encoder_2/ is missing": lambda folder: edit_json(
        folder, "model_index.json", _class_name="StableDiffusionXLPipeline"),
    "vae/ is missing or has no .safetensors file (.bin files are not read)": lambda folder: next(
        (folder / "vae").glob("*.safetensors")).rename(folder / "vae" / "diffusion_pytorch_model.bin"),
    "text_encoder/ is missing": lambda folder: shutil.rmtree(folder / "text_encoder"),
    "unet/config.json: not JSON as diffusers writes it": lambda folder: (folder / "unet/config.json").write_text("{"),
    "scheduler_config.json: not JSON as diffusers writes it, or damaged ([Errno 2]": lambda folder: shutil.rmtree(
        folder / "scheduler"),
    "unet/config.json: not JSON as diffusers writes it, or damaged (TypeError": lambda folder: (
        folder / "unet/config.json").write_text("5"),
    "its autoencoder scales latents by 0.13025": lambda folder: edit_json(
        folder, "vae/config.json", scaling_factor=0.13025),
    "noise schedule of its scheduler is ('linear', 0.00085, 0.012)": lambda folder: edit_json(
        folder, "scheduler/scheduler_config.json", beta_schedule="linear"),
    "[2, 4, 8, 8] attention heads": lambda folder: edit_json(
        folder, "unet/config.json", attention_head_dim=[2, 4, 8, 8]),
    "takes 9 channels: an inpainting": lambda folder: widen(folder, 9),
    "takes 8 channels, and neither its metadata nor the layout of Marigold": lambda folder: widen(folder, 8),
    "a folder of StableDiffusionInstructPix2PixPipeline": lambda folder: [widen(folder, 8), edit_json(
        folder, "model_index.json", _class_name="StableDiffusionInstructPix2PixPipeline")],
    "first unet/down_blocks.0.attentions.1": lambda folder: change(
        folder, "unet", lambda name: name.replace("down_blocks.0.attentions.1", "unknown")),
    "without model_index.json": lambda folder: (folder / "model_index.json").unlink(),
}


@pytest.mark.parametrize("error", DAMAGED_FOLDERS)
def test_a_folder_that_does_not_load_is_refused_with_a_one_line_error(folder, tmp_path, error):
    shutil.copytree(folder, tmp_path / "folder")
    DAMAGED_FOLDERS[error](tmp_path / "folder")
    with pytest.raises(ValueError, match=re.escape(error)) as caught:
        load_checkpoint(tmp_path / "folder")
    assert str(caught.value).startswith(str(tmp_path / "folder")) and "\n" not in str(caught.value)


def test_the_error_for_a_part_of_a_folder_or_a_name_on_the_hub_says_what_to_do(folder):
    assert "pass its parent folder" in refusal(folder / "unet")
    assert "hf download someone/model-2-1 --local-dir model-2-1; then --ckpt model-2-1" in refusal("someone/model-2-1")
    assert "hub" not in refusal("someone/model.safetensors")
