"""load_checkpoint reads the files that people have, writes them back bit for bit, and refuses others in one line."""
import builtins
import os
import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import TINY, StableDiffusion, load_checkpoint, read_config
from tests.checkpoints import CONFIGS, NARROW, TEXT, UNET, VAE, hollow_checkpoint, manifest, same

NORM1_BIAS = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # tells v from eps


# ------------------------------------------------------------------ files that load

@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_the_architecture_is_read_from_the_shapes(files, name):
    assert read_config({key: shape for key, (shape, _) in manifest(name).items()}) == CONFIGS[name]
    assert load_checkpoint(files[name]).config == NARROW[name]


def test_a_model_with_other_depths_and_attention_is_read_from_its_own_file_and_is_the_same(tmp_path):
    sd = StableDiffusion(TINY, "v").requires_grad_(False)
    sd.unet.out[2].weight.normal_()                                 # it is zero at the start
    sd.save(tmp_path / "tiny.safetensors")
    read = load_checkpoint(tmp_path / "tiny.safetensors")
    assert read.config == TINY and read.prediction == "v" and same(read.state_dict(), sd.state_dict())
    x, t_dm, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), sd.encode_text(["a red ball"])
    assert torch.equal(read.encode_text(["a red ball"]), context)
    assert torch.equal(read.unet(x, t_dm, context), sd.unet(x, t_dm, context))


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_a_saved_file_has_the_same_tensors_bit_for_bit_and_the_metadata(files, tmp_path, name):
    before = load_file(files[name])
    save_file(before, tmp_path / "before.safetensors", metadata={"style": "outline", "step": "2", "prediction": "v"})
    load_checkpoint(tmp_path / "before.safetensors").save(tmp_path / "folder" / "after.safetensors", step="3")
    assert same(load_file(tmp_path / "folder" / "after.safetensors"), before)
    with safe_open(tmp_path / "folder" / "after.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "style": "outline", "step": "3", "prediction": "v"}


def test_a_float16_file_loads_as_float32_and_saves_as_float16_again(files, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(files["sd21"]).items()}
    save_file(half, tmp_path / "half.safetensors")
    sd = load_checkpoint(tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in sd.parameters()} == {torch.float32}
    sd.save(tmp_path / "again.safetensors", dtype=torch.float16)
    assert same(load_file(tmp_path / "again.safetensors"), half)


def test_training_leaves_the_file_alone_until_the_model_is_saved_over_it(files, tmp_path):
    before, path = load_file(files["sd15"]), tmp_path / "same.safetensors"
    save_file(before, path)
    sd = load_checkpoint(path)
    sd.unet.out[2].weight.add_(1)
    assert same(load_file(path), before)
    sd.save(path)
    before[UNET + "out.2.weight"] += 1
    assert same(load_file(path), before)


def test_a_non_pruned_file_gives_its_plain_weights_or_when_asked_the_averaged_ones(files, tmp_path, capsys):
    tensors = load_file(files["sd15"])
    averaged = {"model_ema." + "".join(key.split(".")[1:]): value + 1   # as diffusers writes the rule for the names
                for key, value in tensors.items() if key.startswith(UNET)}
    save_file({**tensors, **averaged}, tmp_path / "full.safetensors")
    plain = load_checkpoint(tmp_path / "full.safetensors")
    assert ", non-EMA weights" in capsys.readouterr().out
    plain.save(tmp_path / "plain.safetensors")
    assert same(load_file(tmp_path / "plain.safetensors"), tensors)
    ema = load_checkpoint(tmp_path / "full.safetensors", use_ema=True)
    assert ", EMA weights" in capsys.readouterr().out
    assert same(ema.state_dict(), {k: v + k.startswith(UNET) for k, v in plain.state_dict().items()})
    assert "no EMA weights" in refusal(files["sd15"], use_ema=True)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_lightning_ckpt_loads_though_lightning_is_not_installed(files, tmp_path, monkeypatch, legacy):
    """As Lightning wrote them: the callback's class, pickled by name, is a dictionary key."""
    tensors, name = load_file(files["sd15"]), "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as context:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            context.setitem(sys.modules, parent, types.ModuleType(parent))
        sys.modules[name].ModelCheckpoint = callback
        torch.save({"epoch": 0, "callbacks": {callback: {"best_model_score": torch.tensor(0.5)}},
                    "state_dict": tensors}, tmp_path / "lightning.ckpt", _use_new_zipfile_serialization=not legacy)
    load_checkpoint(tmp_path / "lightning.ckpt").save(tmp_path / "converted.safetensors")
    assert same(load_file(tmp_path / "converted.safetensors"), tensors)


def test_open_clip_is_imported_before_the_meta_device(files, monkeypatch):
    """Under it some versions fail: they compute with numbers while they are imported."""
    devices, original = [], builtins.__import__

    def record(name, *args):
        if name.startswith("open_clip"):
            devices.append(torch.get_default_device().type)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", record)
    load_checkpoint(files["sd15"])
    assert devices[0] == "cpu"


# ------------------------------------------------------------------ v or eps

def test_the_callers_word_wins_then_the_metadata_then_sd1_is_eps(files, tmp_path, capsys):
    path = tmp_path / "v1.safetensors"
    save_file(load_file(files["sd15"]), path, metadata={"prediction": "v"})
    assert load_checkpoint(path).prediction == "v" and "(from the file's prediction)" in capsys.readouterr().out
    assert load_checkpoint(path, prediction="eps").prediction == "eps" and "(as asked)" in capsys.readouterr().out
    assert load_checkpoint(files["sd15"]).prediction == "eps" and "eps-prediction (SD 1.x" in capsys.readouterr().out


def test_the_metadata_may_be_in_the_words_of_the_modelspec_standard(files, tmp_path):
    path = tmp_path / "spec.safetensors"
    save_file(load_file(files["sd21"]), path, metadata={"modelspec.prediction_type": "epsilon"})
    assert load_checkpoint(path).prediction == "eps"


@pytest.mark.parametrize("std, prediction", [(0.0901, "v"), (0.0899, "eps")])
def test_sd2_is_v_or_eps_by_the_spread_of_one_norms_biases(files, tmp_path, capsys, std, prediction):
    tensors = load_file(files["sd21"])
    tensors[NORM1_BIAS] *= std / tensors[NORM1_BIAS].std()
    save_file(tensors, tmp_path / "guess.safetensors")
    assert load_checkpoint(tmp_path / "guess.safetensors").prediction == prediction
    assert "guessed from a norm's std of 0.090" in capsys.readouterr().out


def test_a_prediction_that_does_not_exist_is_refused(files, tmp_path):
    assert "''" in refusal(files["sd15"], prediction="")
    save_file(load_file(files["sd15"]), tmp_path / "odd.safetensors", metadata={"prediction": "velocity"})
    assert "'velocity'" in refusal(tmp_path / "odd.safetensors")
    assert load_checkpoint(tmp_path / "odd.safetensors", prediction="eps").prediction == "eps"


# ------------------------------------------------------------------ files that do not load

def refusal(path, **settings):
    """-> the one line, with the path, that says why the file does not load."""
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
    whole, damaged = files["sd15"], tmp_path / ("damaged.safetensors" if kind == "safetensors" else "damaged.ckpt")
    if kind != "safetensors":
        whole = tmp_path / "whole.ckpt"
        torch.save({"state_dict": load_file(files["sd15"])}, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    for damage in (b"", content[:100], content[:200_000], content[:-1], b"<!DOCTYPE html>\n<html>\n", bytes(1000)):
        damaged.write_bytes(damage)
        assert "truncated" in refusal(damaged)


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_names_another_class_is_refused_and_runs_nothing(tmp_path):
    message = refusal_of({"state_dict": {}, "extra": Intruder(tmp_path / "made")}, tmp_path)
    assert "mkdir, which could run code" in message and not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 5}, {1: torch.ones(1)}], ids=str)
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
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


def test_an_unknown_tensor_is_named(tmp_path):
    novelty = UNET + "input_blocks.1.0.novelty"
    assert novelty in refusal_of({**hollow_checkpoint("sd21"), novelty: torch.ones(1)}, tmp_path)


@pytest.mark.parametrize("key, shape, says", [
    (UNET + "input_blocks.4.0.in_layers.0.weight", (641,), r"in_layers.0.weight is (641,), expected (320,)"),
    (UNET + "middle_block.1.norm.weight", (), "is (), expected (1280,)"),
    (UNET + "input_blocks.4.0.in_layers.2.weight", (641, 320, 3, 3), "make no model"),
    (VAE + "encoder.down.1.block.0.conv1.weight", (257, 128, 3, 3), "make no model"),
    (VAE + "quant_conv.weight", (), "Stable Diffusion 1.x or 2.x is needed"),
    (UNET + "input_blocks.0.0.weight", (320, 9, 3, 3), "takes 9 channels: an inpainting"),
    (TEXT + "transformer.text_model.embeddings.token_embedding.weight", (49000, 768), "49000 words"),
    (TEXT + "transformer.text_model.embeddings.token_embedding.weight", (49408, 769), "width 769")])
def test_a_tensor_of_a_wrong_shape_is_refused(tmp_path, key, shape, says):
    assert says in refusal_of({**hollow_checkpoint("sd15"), key: torch.ones(()).expand(shape)}, tmp_path)


OTHER_FILES = {
    "SDXL": ["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
             VAE + "encoder.conv_in.weight", UNET + "label_emb.0.0.weight", UNET + "input_blocks.0.0.weight"],
    "LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_mlp_fc1.alpha"],
    "diffusers": ["down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight", "conv_in.weight"],
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
