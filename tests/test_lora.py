"""LoRA: arithmetic, the paper's presets, and the files, which diffusers reads and writes too."""
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from model import SD15, SD21, TINY, Config, UNet
from support.lora_file import is_lora_file, kohya_names, load_lora, save_lora
from tests.checkpoints import diffusers_copy, diffusers_pipeline, diffusers_unet, random_tensor, relative, same

SMALL_SD1 = Config(unet_widths=(32, 64), transformer_depth=(1, 0), context_width=768, linear_projection=False)
SMALL_SD2 = Config(unet_widths=(32, 128), transformer_depth=(1, 1), context_width=1024, unet_res_blocks=1)


def random_unet(config):
    """-> a UNet with random parameters without zeros."""
    torch.manual_seed(0)
    unet = UNet(config).requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.copy_(random_tensor(name, parameter.shape, parameter.dtype))
    return unet


def meta_unet(config):
    with torch.device("meta"):
        return UNet(config)


def train_a_bit(parameters):
    """Change every trainable parameter at random, as training would."""
    torch.manual_seed(7)
    for parameter in parameters:
        parameter.data += 0.03 * torch.randn_like(parameter)


def adapted_unet(config, preset):
    unet = random_unet(config)
    train_a_bit(lora.inject(unet, preset))
    return unet


@torch.no_grad()
def output(unet, config, dtype=torch.float32):
    """-> the output of a UNet, diffusers' or ours, for a fixed input that is not square."""
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 4, 8, generator=noise).to(dtype)
    context = torch.randn(2, 7, config.context_width, generator=noise).to(dtype)
    out = unet(x, torch.tensor([10.0, 700.0]), context)
    return out if isinstance(out, torch.Tensor) else out.sample


# ------------------------------------------------------------------ arithmetic

@pytest.mark.parametrize("preset", ["base", "small", 3])
def test_an_untrained_lora_changes_no_output(preset):
    unet = random_unet(TINY)
    before = output(unet, TINY)
    lora.inject(unet, preset)
    assert torch.equal(output(unet, TINY), before)


@pytest.mark.parametrize("layer, x", [
    (nn.Linear(6, 5), torch.randn(2, 6)), (nn.Conv2d(6, 5, 1), torch.randn(2, 6, 8, 8)),
    (nn.Conv2d(6, 5, 3, stride=2, padding=1), torch.randn(2, 6, 8, 8))], ids=["linear", "1x1", "3x3, stride 2"])
def test_an_adapter_adds_up_times_down_to_the_layers_weight_and_leaves_its_bias(layer, x):
    adapted = lora.LoRA(layer.double(), 3).double()
    nn.init.normal_(adapted.up)
    y, layer.weight.data = adapted(x.double()), layer.weight + torch.einsum(
        "or,r...->o...", adapted.up.flatten(1), adapted.down)
    assert torch.allclose(y, layer(x.double()), rtol=0, atol=1e-12)


def test_only_the_adapters_are_trainable_and_each_gets_a_gradient():
    unet = random_unet(TINY).requires_grad_(True)
    parameters = lora.inject(unet, "small")
    train_a_bit(parameters)
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    unet(torch.randn(1, 4, 4, 4), torch.tensor([5.0]), torch.randn(1, 7, TINY.context_width)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in parameters)


def test_adapters_of_a_bfloat16_network_are_float32_and_cast_themselves():
    unet = random_unet(TINY).bfloat16()
    parameters = lora.inject(unet, 4)
    train_a_bit(parameters)
    assert {p.dtype for p in parameters} == {torch.float32}
    plain = output(unet, TINY, torch.bfloat16)
    assert plain.dtype == torch.bfloat16 and relative(plain, output(unet.float(), TINY)) < 0.03


# ------------------------------------------------------------------ presets

@pytest.mark.parametrize("config, preset, count", [
    (SD21, "base", 207_458_688), (SD21, "small", 64_707_072),           # the paper's 207.5 M and 64.7 M
    (SD15, "base", 214_262_016), (SD15, "small", 64_182_784)])
def test_presets_train_as_many_parameters_as_in_the_paper(config, preset, count):
    assert sum(parameter.numel() for parameter in lora.inject(meta_unet(config), preset)) == count


def test_the_rank_of_preset_base_is_a_fifth_of_the_larger_side_rounded_up():
    unet = meta_unet(TINY)
    lora.inject(unet, "base")
    assert len(unet.input_blocks[1][0].in_layers[2].down) == 20     # 96 -> 96: 19.2
    assert len(unet.output_blocks[0][0].in_layers[2].down) == 26    # 64 + 64 -> 64: 25.6


@pytest.mark.parametrize("preset", ["base", 2])
def test_the_first_and_last_conv_are_trained_in_full_with_the_smaller_matrix_fixed_to_the_identity(preset):
    unet = random_unet(TINY)
    lora.inject(unet, preset)
    first, last = unet.input_blocks[0][0], unet.out[2]
    assert torch.equal(first.down.flatten(1), torch.eye(36)) and torch.equal(last.up.flatten(1), torch.eye(4))
    trained = [p.numel() for layer in (first, last) for p in (layer.down, layer.up) if p.requires_grad]
    assert trained == [first.weight.numel(), last.weight.numel()]


def test_the_rank_is_at_most_the_layers_full_rank():
    unet = meta_unet(TINY)
    lora.inject(unet, 10_000)
    for path, layer in lora.adapters(unet).items():
        assert len(layer.down) == min(layer.weight.shape[0], layer.weight[0].numel()), path


@pytest.mark.parametrize("preset", ["large", "64", 0, 2.5])
def test_an_unknown_preset_is_refused_with_a_one_line_error(preset):
    with pytest.raises(ValueError, match="base, small or a rank") as error:
        lora.inject(meta_unet(TINY), preset)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ merging

@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_layer_with_its_adapter_merged_computes_what_both_compute(strength):
    unet, plain = adapted_unet(SMALL_SD2, "small").double(), random_unet(SMALL_SD2)
    for path, adapter in lora.adapters(unet).items():
        lora.merge(plain.double().get_submodule(path).weight, adapter.down, adapter.up, strength)
        adapter.up.data *= strength
    adapted = output(unet, SMALL_SD2, torch.float64)
    assert relative(output(plain, SMALL_SD2, torch.float64), adapted) < 1e-12   # a sum in another order


def test_merging_keeps_the_weights_dtype():
    weight, down, up = torch.full((8, 8), 256.0, dtype=torch.bfloat16), torch.full((2, 8), 0.5), torch.ones(8, 2)
    lora.merge(weight, down, up, 1.5)
    assert weight.dtype == torch.bfloat16 and (weight == 258).all()     # 257.5, rounded


def test_a_second_lora_on_one_network_is_refused(tmp_path):
    unet, path = adapted_unet(TINY, 2), tmp_path / "a.safetensors"
    save_lora(unet, path, {})
    for add in (lambda: lora.inject(unet, 2), lambda: load_lora(path, unet)):
        with pytest.raises(ValueError, match="has a LoRA already"):
            add()


# ------------------------------------------------------------------ files

@pytest.mark.parametrize("config, preset", [(SMALL_SD1, "base"), (SMALL_SD2, "small"), (TINY, 3)])
def test_saving_and_loading_keeps_the_adapters_bit_for_bit_and_the_metadata(tmp_path, config, preset):
    unet, path = adapted_unet(config, preset), tmp_path / "adapter.safetensors"
    save_lora(unet, path, {"preset": str(preset), "prediction": "v"})
    again = random_unet(config)
    metadata = load_lora(path, again)
    assert is_lora_file(path) and metadata["preset"] == str(preset) and metadata["prediction"] == "v"
    assert same(again.state_dict(), unet.state_dict())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in unet.parameters()]


@pytest.mark.parametrize("config", [
    SD15, SD21, TINY, SMALL_SD1, Config(unet_widths=(64,), transformer_depth=(1,), unet_res_blocks=3),
    Config(unet_widths=(32, 64, 64, 64), transformer_depth=(0, 1, 0, 1), unet_res_blocks=1)])
def test_every_layer_gets_its_name_in_diffusers(config):
    ours = meta_unet(config)
    with torch.device("meta"):
        theirs = diffusers_unet(config)
    names = kohya_names(ours, layers := lora.plain_layers(ours))
    expected = {"lora_unet_" + path.replace(".", "_"): layer.weight.shape
                for path, layer in lora.plain_layers(theirs).items()}
    assert {name: layers[path].weight.shape for path, name in names.items()} == expected


@pytest.mark.parametrize("config, preset", [(SMALL_SD1, "small"), (SMALL_SD2, "base")])
def test_diffusers_loads_our_lora_file_and_computes_the_same_output(tmp_path, config, preset):
    theirs = diffusers_copy(random_unet(config), config)
    before, ours = output(theirs, config), adapted_unet(config, preset)
    save_lora(ours, tmp_path / "adapter.safetensors", {"prediction": "v"})
    diffusers_pipeline(theirs).load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    expected = output(ours, config)
    assert relative(output(theirs, config), expected) < 1e-4 < 0.05 < relative(before, expected)


def test_alpha_over_rank_is_folded_into_the_weights_of_the_layer(tmp_path):
    unet, path = adapted_unet(TINY, 6), tmp_path / "a.safetensors"
    save_lora(unet, path, {})
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({**load_file(path), f"{name}.alpha": torch.tensor(1.5, dtype=torch.float16)}, path)
    load_lora(path, again := random_unet(TINY))
    for layer, adapter in lora.adapters(again).items():
        scale = 0.25 if layer == "input_blocks.3.1.transformer_blocks.0.attn1.to_q" else 1.0
        assert torch.equal(adapter.up, unet.get_submodule(layer).up * scale)


@pytest.mark.parametrize("config", [SMALL_SD1, SMALL_SD2])
def test_projections_load_as_matrices_and_as_1x1_convs_whatever_the_base_has(tmp_path, config):
    """kohya's scripts write (r, in, 1, 1) for the Linears of SD 2.x; others write matrices for the convs of SD 1.x."""
    unet, path = adapted_unet(config, 6), tmp_path / "a.safetensors"
    save_lora(unet, path, {})

    def other(tensor):
        return tensor[..., None, None] if tensor.ndim == 2 else tensor.flatten(1)

    save_file({key: other(value) if "proj_" in key else value for key, value in load_file(path).items()}, path)
    load_lora(path, again := random_unet(config))
    assert same(again.state_dict(), unet.state_dict())


def test_a_rank_above_the_layers_full_rank_loads(tmp_path):
    unet, path = random_unet(TINY), tmp_path / "a.safetensors"
    down, up = torch.randn(50, 4, 3, 3), torch.randn(TINY.unet_widths[0], 50, 1, 1)
    save_file({"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}, path)
    load_lora(path, unet)
    assert torch.equal(unet.input_blocks[0][0].down, down) and torch.equal(unet.input_blocks[0][0].up, up)


FIRST = "lora_unet_conv_in.lora_down.weight"
MISFITS = {  # case: (what is added to a fitting LoRA file, or with None removed; pattern of the error)
    "half an adapter": ({FIRST: None}, "incomplete.* 1 unknown keys, first 'lora_unet_conv_in.lora_up.weight'"),
    "unknown layer": ({"lora_unet_double_blocks_0.lora_up.weight": torch.zeros(1, 1)},
                      "1 unknown keys, first 'lora_unet_double_blocks_0.lora_up"),
    "SDXL": ({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, 2048)},
             r"made for another base \(SDXL\)"),
    "wrong shape": ({FIRST: torch.zeros(4, 3, 3, 3)},
                    r"base \(SD 2.x\): .*conv_in adapts \[32, 3, 3, 3\], this model's layer is \[32, 4, 3, 3\]"),
}


def refusal(path, unet):
    """-> the one-line error, with the path, of a file that does not fit. The network must be unchanged."""
    with pytest.raises(ValueError) as error:
        load_lora(path, unet)
    assert not lora.adapters(unet) and str(path) in str(error.value) and "\n" not in str(error.value)
    return error


@pytest.mark.parametrize("case", MISFITS)
def test_a_lora_file_that_does_not_fit_is_refused_with_a_one_line_error_and_changes_nothing(tmp_path, case):
    changes, expected = MISFITS[case]
    unet, path = UNet(SMALL_SD2), tmp_path / "bad.safetensors"
    lora.inject(unet, 4)
    save_lora(unet, path, {})
    save_file({key: value for key, value in {**load_file(path), **changes}.items() if value is not None}, path)
    assert refusal(path, meta_unet(SMALL_SD2)).match(f".*{expected}")


@pytest.mark.parametrize("alpha", [math.nan, math.inf, [1.0, 1.0], [], 4j])
def test_an_alpha_that_is_not_one_finite_real_number_is_refused(tmp_path, alpha):
    path, name = tmp_path / "bad.safetensors", "lora_unet_conv_in.alpha"
    save_lora(adapted_unet(SMALL_SD1, 4), path, {})
    save_file(load_file(path) | {name: torch.tensor(alpha)}, path)
    assert refusal(path, meta_unet(SMALL_SD1)).match(f".*{name} (is torch|has NaN or infinity)")


def test_a_file_for_another_base_a_damaged_file_and_one_without_adapters_are_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    save_lora(adapted_unet(SMALL_SD1, 4), path, {})
    assert refusal(path, meta_unet(SMALL_SD2)).match(r".*made for another base \(SD 1.x\)")
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path, meta_unet(SMALL_SD1)).match(".*cannot be read")
    save_file({}, path)
    assert refusal(path, meta_unet(SMALL_SD1)).match(".*not a LoRA")
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, path)
    assert refusal(path, meta_unet(SMALL_SD1)).match(".*not a LoRA.*model.diffusion_model.out.2.bias")
    assert not is_lora_file(path)
