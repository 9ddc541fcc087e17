"""LoRA files of other tools: their names and alphas, adapters of the text encoder, several with strengths.
What we merge computes what diffusers and PEFT compute with the same file."""
import json
import re
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


def renamed(made, replacement, factor=1.0):
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

    tensors = renamed(made, name)
    tensors = {key: value[..., None, None].clone() if "proj_in" in key and value.ndim == 2 else value
               for key, value in tensors.items()}
    alphas = {key.replace("lora_up.weight", "alpha"): torch.tensor(float(ALPHA)) for key in tensors if "lora_up" in key}
    save_file(tensors | alphas, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def by_older_diffusers(made, folder):
    """The names until 0.21: unet.PATH.processor.to_q_lora.down.weight, PATH.q_proj.lora_linear_layer.down.weight."""
    def name(network, layer, side):
        if re.search(r"attn\d\.to_", layer):
            return f"unet.{re.sub(r'[.](to_[a-z]+)([.]0)?$', '.processor.' + chr(92) + '1_lora', layer)}.{side}.weight"
        middle = "lora" if network == "unet" else "lora_linear_layer"
        return f"{network}.{layer}.{middle}.{side}.weight"

    save_file(renamed(made, name, ALPHA / RANK), folder / "older.safetensors")
    return folder / "older.safetensors"


@pytest.mark.parametrize("write", [by_diffusers, by_diffusers_without_metadata, by_kohya, by_older_diffusers])
def test_a_lora_of_unet_and_text_encoder_computes_what_it_computes_in_diffusers(made, tmp_path, write):
    sd = load_checkpoint(made.file)
    merge_lora(write(made, tmp_path), sd)
    for ours, theirs, plain in zip(outputs(sd), made.adapted, made.plain):
        assert relative(ours, theirs) < 1e-4 < 0.05 < relative(plain, theirs)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn1.to_q": 7}}], ids=str)
def test_a_folder_that_peft_saves_loads_with_the_alphas_in_its_adapter_config(made, tmp_path, settings):
    from peft import LoraConfig, get_peft_model
    base = full_pipeline(NARROW["sd21" if "sd21" in made.file.name else "sd15"], load_file(made.file)).unet
    theirs = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS["unet"], **settings))
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    x, t_dm, context = randn(2, 4, 8, 8).float(), torch.tensor([500.0, 9.0]), randn(2, 77, 128, seed=2).float()
    with torch.no_grad():
        expected = theirs(x, t_dm, context).sample
    load_lora(tmp_path / "adapter_model.safetensors", (sd := load_checkpoint(made.file)).unet)
    assert relative(outputs(sd)[0], expected) < 1e-4 < 0.05 < relative(made.plain[0], expected)


def test_a_peft_file_without_its_adapter_config_warns_that_alpha_is_taken_to_be_the_rank(made, tmp_path, capsys):
    path, tensors = tmp_path / "adapter_model.safetensors", made.states["unet"]
    save_file({f"base_model.model.{key}": value for key, value in tensors.items()}, path)
    merge_lora(path, sd := load_checkpoint(made.file), ALPHA / RANK)
    assert f"warning: {path}: adapter_config.json is not beside it" in capsys.readouterr().err
    assert relative(outputs(sd)[0], made.adapted[0]) < 1e-4


def test_compvis_names_of_the_layers_load(made, tmp_path):
    sd = load_checkpoint(made.file)
    save_lora_with(sd, tmp_path / "ours.safetensors")
    names = {name: "lora_unet_" + path.replace(".", "_")
             for path, name in kohya_names(sd.unet, lora.plain_layers(sd.unet)).items()}
    save_file({names[key.partition(".")[0]] + "." + key.partition(".")[2]: value
               for key, value in load_file(tmp_path / "ours.safetensors").items()}, tmp_path / "compvis.safetensors")
    one, other = load_checkpoint(made.file), load_checkpoint(made.file)
    merge_lora(tmp_path / "ours.safetensors", one)
    merge_lora(tmp_path / "compvis.safetensors", other)
    assert same(one.state_dict(), other.state_dict()) and not same(one.state_dict(), sd.state_dict())


def save_lora_with(sd, path, seed=7, **written):
    """Write a random LoRA of ours for a model -> its path."""
    unet = load_checkpoint(sd.source.path).unet
    torch.manual_seed(seed)
    for parameter in lora.inject(unet, 4):
        parameter.data += 0.03 * torch.randn_like(parameter)
    save_lora(unet, path, written)
    return path


# ------------------------------------------------------------------ several, with strengths

def test_several_loras_add_up_with_their_strengths_in_both_networks(made, tmp_path):
    first, second = by_kohya(made, tmp_path), save_lora_with(load_checkpoint(made.file), tmp_path / "b.safetensors")
    plain = load_checkpoint(made.file).state_dict()
    each = []
    for file in first, second:
        merge_lora(file, sd := load_checkpoint(made.file))
        each.append(sd.state_dict())
    both, _ = load_flow(made.file, [f"{first}:0.5", f"{second}:-2"])
    for name, value in both.state_dict().items():
        expected = plain[name] + 0.5 * (each[0][name] - plain[name]) - 2 * (each[1][name] - plain[name])
        assert torch.allclose(value, expected, atol=1e-5), name
    assert any(not torch.equal(each[0][name], plain[name]) for name in plain if name.startswith("cond_stage_model."))


def test_a_strength_is_a_number_after_the_last_colon_unless_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_strength("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert split_strength("a:b.safetensors") == ("a:b.safetensors", 1.0)
    assert split_strength(r"C:\loras\a.safetensors") == (r"C:\loras\a.safetensors", 1.0)
    assert split_strength(r"C:\loras\a.safetensors:-1") == (r"C:\loras\a.safetensors", -1.0)
    (tmp_path / "a:1").write_bytes(b"")
    assert split_strength("a:1") == ("a:1", 1.0) and split_strength("a:1:2") == ("a:1", 2.0)
    for strength in "nan", "inf", "1e9":
        with pytest.raises(ValueError, match="the strength of a LoRA is a number between -1000 and 1000"):
            split_strength(f"a.safetensors:{strength}")


def test_the_first_loras_metadata_counts_and_others_that_differ_are_warned_about(made, tmp_path, capsys):
    sd = load_checkpoint(made.file)
    files = [save_lora_with(sd, tmp_path / f"{cfg}.safetensors", cfg=cfg, **more)
             for cfg, more in (("2", {"objective": "fm"}), ("3", {"resolution": "128"}))]
    sd, flow = load_flow(made.file, files)
    assert sd.metadata["cfg"] == "2" and sd.metadata["resolution"] == "128" and type(flow).__name__ == "NaiveFM"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "does not count" in line]
    assert warnings == [f"warning: {files[1]}: its cfg '3' does not count, since a LoRA before it has '2'"]
    for kind in "v", "eps":
        save_lora_with(sd := load_checkpoint(made.file), tmp_path / f"{kind}.safetensors", prediction=kind,
                       base_hash=sd.unet_hash)
    with pytest.raises(ValueError, match="eps.safetensors: made with another checkpoint, whose UNet predicts eps; "):
        load_flow(made.file, [tmp_path / "v.safetensors", tmp_path / "eps.safetensors"])


def test_a_lora_of_the_text_encoder_is_not_trained_further_and_the_error_says_how_to_merge_it(made, tmp_path):
    path = by_kohya(made, tmp_path)
    with pytest.raises(ValueError, match=f"python -m tools.merge {path} --ckpt BASE --out merged.safetensors"):
        load_lora(path, load_checkpoint(made.file).unet)


def test_merging_keeps_no_second_copy_of_the_weights(made, tmp_path):
    path, sd = by_kohya(made, tmp_path), load_checkpoint(made.file)
    before = {name: parameter.data_ptr() for name, parameter in sd.named_parameters()}
    merge_lora(path, sd)
    assert {name: parameter.data_ptr() for name, parameter in sd.named_parameters()} == before


# ------------------------------------------------------------------ what is refused

@pytest.mark.parametrize("key, kind", [
    ("lora_unet_conv_in.dora_scale", "a DoRA"), ("unet.conv_in.lora_magnitude_vector", "a DoRA"),
    ("lora_unet_conv_in.hada_w1_a", "a LoHa"), ("lora_unet_conv_in.lokr_w1", "a LoKr"),
    ("lora_unet_conv_in.lora_mid.weight", "a LoRA with a third matrix, lora_mid"),
    ("lora_unet_conv_in.diff", r"a file with whole differences of weights \(.diff\)"),
    ("lycoris_unet_conv_in.lora_up.weight", "a LyCORIS network")])
def test_the_error_for_an_adapter_that_comfyui_reads_names_its_kind_and_comfyui(made, tmp_path, key, kind):
    file = tmp_path / "other.safetensors"
    save_file({key: torch.ones(4, 4, 1, 1)}, file)
    with pytest.raises(ValueError, match=f"^{file}: {kind}, which is not supported; ComfyUI merges it: its nodes Load"):
        merge_lora(file, load_checkpoint(made.file))


@pytest.mark.parametrize("value", [1e20, 1e30])
def test_numbers_that_make_a_weight_infinite_are_refused_with_the_files_name(made, tmp_path, value):
    path = save_lora_with(load_checkpoint(made.file), tmp_path / "a.safetensors")
    save_file({key: torch.full_like(tensor, value) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=f"^{path}: its numbers are too large"):
        merge_lora(path, load_checkpoint(made.file))


def test_settings_of_peft_that_are_no_numbers_are_refused_with_a_one_line_error(made, tmp_path):
    path = by_diffusers(made, tmp_path)
    for alpha in "x", [1], float("nan"), None:
        about = metadata(path) | {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha})}
        save_file(load_file(path), tmp_path / "odd.safetensors", about)
        with pytest.raises(ValueError, match="odd.safetensors: not a LoRA, or damaged"):
            merge_lora(tmp_path / "odd.safetensors", load_checkpoint(made.file))
