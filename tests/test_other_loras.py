"""LoRA files of other tools: their names and alphas, adapters of the text encoder, several LoRAs with strengths. What we
merge computes what diffusers and PEFT compute with the same file."""
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import lora
from support.checkpoint import load_checkpoint
from support.load import load_flow, split_strength
from support.lora_file import kohya_names, load_lora, merge_lora, save_lora
from tests.checkpoints import NARROW, clip_ids, full_pipeline, randn, relative, same
from tests.runs import metadata

RANK, ALPHA = 4, 2
PROMPTS = ["a cat", ""]
LAYERS = {"unet": ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_out"],
          "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
SIDES = {"A": "down", "B": "up"}


def adapt(network, layers):
    """Add random adapters to a network of a pipeline -> PEFT's state of them."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers), network)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return {name: value.clone() for name, value in get_peft_model_state_dict(network).items()}


@torch.no_grad()
def outputs(sd):
    """-> the outputs of our UNet and text encoder for fixed inputs."""
    x, context = randn(2, 4, 8, 8).float(), randn(2, 77, 128, seed=2).float()
    return sd.unet(x, torch.tensor([500.0, 9.0]), context), sd.encode_text(PROMPTS)


@torch.no_grad()
def outputs_of_pipeline(pipe, pad_token):
    x, context = randn(2, 4, 8, 8).float(), randn(2, 77, 128, seed=2).float()
    return (pipe.unet(x, torch.tensor([500.0, 9.0]), context).sample,
            pipe.text_encoder(clip_ids(PROMPTS, pad_token)).last_hidden_state)


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def made(request, files):
    """A LoRA of the UNet and the text encoder, made in diffusers: its PEFT .states by network, the .plain outputs of
    the base in .file, and the .adapted ones, by diffusers."""
    torch.manual_seed(0)
    pipe = full_pipeline(NARROW[request.param], load_file(files[request.param]))
    pad_token = 0 if request.param == "sd21" else 49407
    plain = outputs_of_pipeline(pipe, pad_token)
    states = {network: adapt(getattr(pipe, network), layers) for network, layers in LAYERS.items()}
    return SimpleNamespace(states=states, plain=plain, adapted=outputs_of_pipeline(pipe, pad_token), pipe=pipe,
                           file=files[request.param])


def renamed(made, pattern, replacement, factor=1.0):
    """-> the tensors of the LoRA by other names, with up times `factor`. replacement: of (network, layer, side)."""
    tensors = {}
    for network, state in made.states.items():
        for key, value in state.items():
            layer, side = re.fullmatch(r"(.*)\.lora_(A|B)\.weight", key).groups()
            tensors[replacement(network, layer, SIDES[side])] = value * (factor if side == "B" else 1)
    return tensors


def by_diffusers(made, folder):
    """As diffusers' training scripts save, with alpha in the metadata."""
    about = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {}, "target_modules": []}
    StableDiffusionPipeline.save_lora_weights(
        folder, made.states["unet"], made.states["text_encoder"], unet_lora_adapter_metadata=dict(about),
        text_encoder_lora_adapter_metadata=dict(about))
    return folder / "pytorch_lora_weights.safetensors"


def by_diffusers_without_metadata(made, folder):
    halved = {network: {key: value * (ALPHA / RANK if "lora_B" in key else 1) for key, value in state.items()}
              for network, state in made.states.items()}
    StableDiffusionPipeline.save_lora_weights(folder, halved["unet"], halved["text_encoder"])
    return folder / "pytorch_lora_weights.safetensors"


def by_kohya(made, folder):
    """Linears are stored as 1x1 convs, as kohya's scripts do for proj_in of SD 2.x."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}

    def name(network, layer, side):
        return f"{prefixes[network]}{layer.removeprefix('text_model.').replace('.', '_')}.lora_{side}.weight"

    tensors = renamed(made, None, name)
    tensors = {key: value[..., None, None].clone() if "proj_in" in key and value.ndim == 2 else value
               for key, value in tensors.items()}
    alphas = {key.replace("lora_up.weight", "alpha"): torch.tensor(float(ALPHA)) for key in tensors if ".lora_up" in key}
    save_file(tensors | alphas, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def by_older_diffusers(made, folder):
    """The names until 0.21: unet.PATH.processor.to_q_lora.down.weight, PATH.q_proj.lora_linear_layer.down.weight."""
    def name(network, layer, side):
        if re.search(r"attn\d\.to_", layer):
            return f"unet.{re.sub(r'[.](to_[a-z]+)([.]0)?$', '.processor.' + chr(92) + '1_lora', layer)}.{side}.weight"
        middle = "lora" if network == "unet" else "lora_linear_layer"
        return f"{network}.{layer}.{middle}.{side}.weight"

    save_file(renamed(made, None, name, ALPHA / RANK), folder / "older.safetensors")
    return folder / "older.safetensors"


@pytest.mark.parametrize("write", [by_diffusers, by_diffusers_without_metadata, by_kohya, by_older_diffusers])
def test_a_lora_of_unet_and_text_encoder_computes_what_it_computes_in_diffusers(made, tmp_path, write):
    sd = load_checkpoint(made.file)
    merge_lora(write(made, tmp_path), sd)
    for ours, theirs, plain in zip(outputs(sd), made.adapted, made.plain):
        assert relative(ours, theirs) < 1e-4 < 0.05 < relative(plain, theirs)
