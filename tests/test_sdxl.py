"""SDXL: networks, files, LoRAs, sizes and sampling beside diffusers and transformers, on a narrow random checkpoint
with all 2515 names of sd_xl_base_1.0."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import depth
import lora
import sample
import train
from diff2flow import Diff2Flow, Diffusion
from model import SDXL, TOKENS, Config, StableDiffusion
from schedule import sd_schedule
from support.checkpoint import CheckpointFile, load_checkpoint, save_checkpoint
from support.load import load_flow, load_model
from support.lora_file import save_lora
from tests import runs
from tests.checkpoints import (
    NARROW,
    PROMPTS,
    XL_CLIP,
    clip_ids,
    full_pipeline,
    hollow_checkpoint,
    randn,
    references,
    relative,
    same,
)
from tests.runs import metadata, refusal, save_photos, works
from tools import merge

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
SIZES = torch.tensor([[1500, 1023, 12, 300, 1024, 768], [640, 480, 0, 7, 64, 128]])
RUN = ("--steps 2 --batch 1 --grad-accum 1 --lr 1e-3 --validation 1 --previews 1 --preview-every 0 --size 64 --ema 0.5 "
       "--device cpu --precision fp32 ")


@pytest.fixture(scope="module")
def sdxl(files):
    return load_checkpoint(files["sdxl"])


# ------------------------------------------------------------------ networks

@torch.no_grad()
def test_all_networks_equal_diffusers_and_transformers(files):
    """In float64: 1e-9, as in tests/test_model.py. The times are fractional."""
    sd = load_checkpoint(files["sdxl"], dtype=torch.float64)
    theirs = references(NARROW["sdxl"], load_file(files["sdxl"]))
    for network in vars(theirs).values():
        network.double()
    context, ids = sd.encode_text(PROMPTS), [clip_ids(PROMPTS, pad_token) for pad_token in (49407, 0)]
    first = theirs.text(ids[0], output_hidden_states=True).hidden_states[-2]
    second = theirs.text_2(ids[1], output_hidden_states=True)
    assert relative(context[:, :TOKENS], torch.cat([first, second.hidden_states[-2]], -1)) < 1e-9
    assert relative(context[:, TOKENS, :128], second.text_embeds) < 1e-9 and not context[:, TOKENS, 128:].any()
    x, t, images = randn(2, 4, 8, 16), torch.tensor([3.3, 608.463], dtype=torch.float64), randn(1, 3, 32, 64)
    uncropped = torch.tensor([[64, 128, 0, 0, 64, 128]] * 2)
    for ours, sizes in (sd.with_sizes(context[:2], SIZES), SIZES), (context[:2], uncropped):
        expected = theirs.unet(x, t, context[:2, :TOKENS], added_cond_kwargs={
            "text_embeds": second.text_embeds[:2], "time_ids": sizes}).sample
        assert relative(sd.unet(x, t, ours), expected) < 1e-9
        assert relative(sd.unet(x, t, sd.with_sizes(context[:2], sizes[:, [1, 0, 2, 3, 4, 5]])), expected) > 1e-4
    assert relative(sd.encode(images), theirs.vae.encode(images).latent_dist.mean * 0.13025) < 1e-9
    assert relative(sd.decode(x), theirs.vae.decode(x / 0.13025).sample) < 1e-9


def test_sizes_are_exact_in_bf16_and_other_models_take_none(sdxl, files):
    context = sdxl.encode_text(["a cat", "a dog"]).bfloat16()
    vectors = [sdxl.unet.vector(torch.zeros(2, 4, 8, 8), sdxl.with_sizes(kind, SIZES)[:, TOKENS])
               for kind in (context, context.float())]
    assert torch.equal(*(vector[:, 128:] for vector in vectors)) and vectors[0].dtype == torch.float32
    assert load_checkpoint(files["sd15"]).with_sizes(context, SIZES) is context


def test_pooled_text_and_sizes_are_learned():
    """Flat latents whose value the sizes and the pooled text decide, and which cross-attention cannot tell. After
    training, the right condition has a third of the error of a wrong one, height and width exchanged among these."""
    torch.manual_seed(0)
    config = Config(unet_widths=(32, 64), unet_res_blocks=1, transformer_depth=(0, 1), context_width=96,
                    open_clip=False, vae_widths=(32, 32, 32), vae_res_blocks=1, text_width=32, text_layers=2,
                    text_projection=False, pooled_width=64, pooled_layers=2)
    sd = StableDiffusion(config, "v")
    flow = Diff2Flow(sd.unet, *sd_schedule(), "v")
    texts = sd.encode_text(["a red circle", "a blue square"]).detach()
    texts[:, :TOKENS] = 0
    optimizer = torch.optim.Adam(sd.unet.parameters(), lr=2e-3)

    def batch(seed, n=32):
        generator = torch.Generator().manual_seed(seed)
        which, tall = torch.randint(2, (2, n), generator=generator)
        sizes = torch.tensor([512, 1024, 0, 0, 64, 64]).repeat(n, 1)
        sizes[tall == 1, :2] = torch.tensor([1024, 512])
        value = (2 * which - 1) * 0.5 + (2 * tall - 1) * 1.0
        return value.view(-1, 1, 1, 1).expand(-1, 4, 4, 4).float(), texts[which], sizes, texts[1 - which]
    for step in range(600):
        x1, context, sizes, _ = batch(step)
        flow.loss(x1, sd.with_sizes(context, sizes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    x1, context, sizes, other_text = batch(10**6, 256)
    with torch.no_grad():
        errors = []
        for kind in (sd.with_sizes(context, sizes), sd.with_sizes(context, sizes[:, [1, 0, 2, 3, 4, 5]]),
                     sd.with_sizes(other_text, sizes)):
            torch.manual_seed(1)
            errors.append(flow.loss(x1, kind).item())
    right, *wrong = errors
    assert all(right < error / 3 for error in wrong), errors


# ------------------------------------------------------------------ files

def test_the_real_shapes_are_read_as_sdxl(tmp_path):
    torch.save(hollow_checkpoint("sdxl"), tmp_path / "xl.ckpt")
    assert CheckpointFile(tmp_path / "xl.ckpt").config == SDXL
    with torch.device("meta"):
        sd = StableDiffusion(SDXL, "eps")
    assert sum(p.numel() for p in sd.unet.parameters()) == 2_567_463_684 and sd.multiple == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_file_is_saved_as_it_was_read(files, dtype):
    tensors = {name: value.to(dtype) if value.is_floating_point() else value
               for name, value in load_file(files["sdxl"]).items()}
    tensors |= {"denoiser.sigmas": torch.ones(1000), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, "xl.safetensors", {"modelspec.prediction_type": "epsilon"})
    sd = load_checkpoint("xl.safetensors")
    assert (sd.prediction, sd.zero_snr) == ("v", True)
    save_checkpoint(sd, "again.safetensors")
    assert same(load_file("again.safetensors"), tensors) and metadata("again.safetensors")["prediction"] == "v"


def test_a_v_model_of_a_folder_is_saved_with_the_tensors_that_comfyui_reads(files):
    pipe = full_pipeline(NARROW["sdxl"], load_file(files["sdxl"]), "v")
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    pipe.save_pretrained("folder", safe_serialization=True)
    sd, plain = load_checkpoint("folder"), load_checkpoint(files["sdxl"])
    assert (sd.prediction, sd.zero_snr) == ("v", True) and same(sd.state_dict(), plain.state_dict())
    save_checkpoint(sd, "xl.safetensors")
    tensors = load_file("xl.safetensors")
    assert {"v_pred", "ztsnr"} < tensors.keys() and load_checkpoint("xl.safetensors").prediction == "v"
    tensors = {name: value for name, value in tensors.items() if name not in ("v_pred", "ztsnr")}
    assert tensors.keys() == {name for name in load_file(files["sdxl"])
                              if not name.endswith(("position_ids", "logit_scale"))}


def without(prefix):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(prefix)}


def refiner(tensors):
    renamed = {name.replace(XL_CLIP[1], XL_CLIP[0]): value for name, value in tensors.items()
               if not name.startswith(XL_CLIP[0])}
    return renamed


OTHERS = {  # the message: how the tensors are changed
    "the SDXL refiner": refiner,
    "an SDXL without its second text encoder": without(XL_CLIP[1]),
    "Playground 2.5": lambda tensors: tensors | {"edm_mean": torch.ones(4), "edm_std": torch.ones(4)},
    "CosXL": lambda tensors: tensors | {"edm_vpred.sigma_max": torch.ones(1)},
    "takes 9 channels: an inpainting": lambda tensors: tensors | {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)},
    "it has no autoencoder": without("first_stage_model."),
    "tensors missing": without("model.diffusion_model.middle_block.1.transformer_blocks.9"),
    "incomplete": without("model.diffusion_model.middle_block.1"),
}


@pytest.mark.parametrize("message", OTHERS)
def test_relatives_of_sdxl_are_refused_by_name(files, message):
    save_file(OTHERS[message](load_file(files["sdxl"])), "other.safetensors")
    line = refusal(sample, "--device cpu --n 1 --size 64 --ckpt other.safetensors")
    assert message in line, line


@pytest.mark.parametrize("name", ["sd_xl_turbo_1.0", "sdxl_lightning_4step", "Hyper-SDXL", "dmd2_sdxl"])
def test_a_distilled_model_is_named_as_what_it_is(files, name, capsys):
    save_file(load_file(files["sdxl"]), f"{name}.safetensors")
    load_checkpoint(f"{name}.safetensors")
    assert "its name says that it is distilled to few steps" in capsys.readouterr().err


# ------------------------------------------------------------------ sampling

class OnGridOfSigmas(Diffusion):
    """Algorithm 2 on the grid that --print-sigmas prints, whose first level is trained, from noise of that level."""

    def grid(self, steps):
        return torch.tensor([1 / (1 + sigma) for sigma in sample.sigma_grid(self, steps)])


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("with_lora", [False, True])
def test_the_printed_sigmas_draw_the_same_latents_in_diffusers(files, prediction, cfg, with_lora):
    """As docs/other_tools.md has it. Sigmas with four decimals are 2e-5 (eps) and 2e-4 (v) away."""
    pipe = full_pipeline(NARROW["sdxl"], load_file(files["sdxl"]), prediction)
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    pipe.set_progress_bar_config(disable=True)
    if with_lora:
        made_lora(files["sdxl"])
        pipe.load_lora_weights("lora.safetensors")
    sd, flow = load_flow(files["sdxl"], ["lora.safetensors"] * with_lora, prediction=prediction)
    flow = OnGridOfSigmas(sd.unet, *sd_schedule(), prediction)
    x0, prompts = data.noises([0, 1], sd.latent_shape([64, 96]), 0), ["a red boat", "a tall tree"]
    ours = flow.sample(x0, sd.encode_text(prompts), 4, sd.encode_text([""]), cfg)
    theirs = pipe(prompts, height=64, width=96, negative_prompt=["", ""], guidance_scale=cfg, latents=x0,
                  sigmas=[float(f"{sigma:.4f}") for sigma in sample.sigma_grid(flow, 4)], output_type="latent").images
    assert relative(ours, theirs) < (4e-4 if prediction == "v" else 1e-4)


# ------------------------------------------------------------------ LoRA

def made_lora(sdxl_file, preset=4):
    """-> a model with random adapters, saved in lora.safetensors."""
    sd = load_checkpoint(sdxl_file)
    torch.manual_seed(0)
    lora.inject(sd.unet, preset)
    for adapter in lora.adapters(sd.unet).values():
        for side in (adapter.down, adapter.up):
            side.data = 0.1 * torch.randn_like(side)
    save_lora(sd.unet, "lora.safetensors", {"prediction": "eps"})
    return sd


@torch.no_grad()
def test_a_lora_has_the_single_files_names_and_diffusers_computes_the_same_with_it(files):
    sd = made_lora(files["sdxl"])
    names = {name.split(".")[0] for name in load_file("lora.safetensors")}
    assert len(names) == 773 and "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
    pipe = full_pipeline(NARROW["sdxl"], load_file(files["sdxl"]))
    pipe.load_lora_weights("lora.safetensors")
    x, t, context = randn(2, 4, 8, 8).float(), torch.tensor([3.3, 608.0]), sd.encode_text(["a cat", ""])
    ours = sd.unet(x, t, sd.with_sizes(context, SIZES))
    theirs = pipe.unet(x, t, context[:, :TOKENS], added_cond_kwargs={
        "text_embeds": context[:, TOKENS, :128], "time_ids": SIZES}).sample
    assert relative(ours, theirs) < 1e-5
    merged = load_model(files["sdxl"], "lora.safetensors").unet
    assert relative(merged(x, t, sd.with_sizes(context, SIZES)), ours) < 1e-5


@torch.no_grad()
def test_adapters_of_both_text_encoders_are_merged(files):
    """Named as kohya's and as diffusers' scripts name them."""
    plain, pairs = load_checkpoint(files["sdxl"]), {}
    for number, tower in enumerate(("lora_te1_", "lora_te2_")):
        layer = f"{tower}text_model_encoder_layers_{number}_mlp_fc1"
        pairs |= {f"{layer}.lora_down.weight": randn(2, 128).float(), f"{layer}.lora_up.weight": randn(512, 2).float(),
                  f"{layer}.alpha": torch.tensor(1.0)}
    save_file(pairs, "text.safetensors")
    peft = {}
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        theirs = f"lora_te{number + 1}_text_model_encoder_layers_{number}_mlp_fc1"
        layer = f"{name}.text_model.encoder.layers.{number}.mlp.fc1"
        peft |= {f"{layer}.lora_A.weight": pairs[f"{theirs}.lora_down.weight"],
                 f"{layer}.lora_B.weight": 0.5 * pairs[f"{theirs}.lora_up.weight"]}      # alpha / rank
    save_file(peft, "peft.safetensors")
    for file in "text.safetensors", "peft.safetensors":
        merged = load_model(files["sdxl"], file)
        for number, (before, after) in enumerate(zip(plain.text_encoders, merged.text_encoders)):
            path = f"transformer.resblocks.{number}.mlp.c_fc.weight"
            up, down = (pairs[f"lora_te{number + 1}_text_model_encoder_layers_{number}_mlp_fc1.lora_{side}.weight"]
                        for side in ("up", "down"))
            change = after.get_parameter(path) - before.get_parameter(path)
            assert relative(change, 0.5 * up @ down) < 1e-5


def test_a_lora_or_a_base_of_the_wrong_family_is_refused_by_name(files, tiny):
    made_lora(files["sdxl"])
    few = "--device cpu --n 1 --size 64 --steps 1 "
    assert "made for another base" in refusal(sample, few + f"--ckpt {files['sd15']} --lora lora.safetensors")
    works(train, runs.SHORT + "--steps 1 --lora 2 --previews 1 --preview-every 0 --out run")
    line = refusal(sample, few + f"--ckpt {files['sdxl']} --prediction v --lora run/lora.safetensors")
    assert "made for another base" in line
    wide = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(2, 2048),
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.ones(640, 2)}
    save_file(wide, "wide.safetensors")
    assert "made for another base (SDXL)" in refusal(sample, few + f"--ckpt {files['sd15']} --lora wide.safetensors")


# ------------------------------------------------------------------ the sizes of crops

def test_the_sizes_of_a_crop_are_those_of_the_picture_the_crop_in_scaled_pixels_and_the_result():
    """A picture of 200x100 pixels (width x height), scaled by 64/100: 128x64, of which 64x64 remain."""
    class Picture:
        width, height = 200, 100
    sizes = {right: data.crop_sizes(Picture, data.crop_box(Picture, 64, 64, right, 0.5), 64, 64).tolist()
             for right in (0, 0.5, 1)}
    assert sizes == {0: [100, 200, 0, 0, 64, 64], 0.5: [100, 200, 0, 32, 64, 64], 1: [100, 200, 0, 64, 64, 64]}
    mirrored = data.crop_sizes(Picture, data.crop_box(Picture, 64, 64, 0, 0.5), 64, 64, is_mirrored=True)
    assert mirrored.tolist() == [100, 200, 0, 64, 64, 64]


def test_a_pictures_pixels_are_where_its_sizes_say():
    """Pixels that hold their own place: the crop's first pixel is at top, left of the scaled (and mirrored) picture."""
    import numpy as np
    from PIL import Image
    y, x = np.mgrid[:120, :240]
    Path("photos").mkdir()
    Image.fromarray(np.stack([y, x, 0 * x], -1).astype(np.uint8)).save("photos/a.png")
    photos = data.ImageFolder("photos", 60, 60)
    for key in range(20):
        item = photos[key]
        height, width, top, left, *target = item["sizes"].tolist()
        rows, columns = item["image"][0].float(), item["image"][1].float()
        is_mirrored = columns[0, 0] > columns[0, -1]
        expected = 240 - 1 - 2 * (left + 0.5) if is_mirrored else 2 * (left + 0.5)
        assert (height, width, target) == (120, 240, [60, 60]) and abs(columns[0, 0] - expected) <= 2
        assert abs(rows[0, 0] - 2 * (top + 0.5)) <= 2


@pytest.mark.parametrize("words", ["", "--cache cache", "--buckets"])
def test_the_sizes_of_the_crops_reach_the_network(files, words, monkeypatch):
    """In this order: height and width of the picture, top and left, height and width of the crop."""
    save_photos("photos")                                           # 120 x 90 pixels (width x height)
    seen, plain = [], StableDiffusion.with_sizes

    def spied(sd, context, sizes):
        context = plain(sd, context, sizes)
        row = context[:, TOKENS, 128:140]
        seen.append((256 * row[:, :6] + row[:, 6:]).tolist())
        return context
    monkeypatch.setattr(StableDiffusion, "with_sizes", spied)
    works(train, RUN + f"--ckpt {files['sdxl']} --data photos --lora 2 --workers 0 {words} --out run")
    assert len(seen) >= 3 and (words != "--cache cache" or 11 in {left for (_, _, _, left, _, _), in seen})
    for (height, width, top, left, h, w), in seen:
        assert (height, width) == (90, 120) and top == 0 and 0 <= left <= 22
        assert (h, w) == (64, 64) if words != "--buckets" else h * w <= 64 * 64


# ------------------------------------------------------------------ commands

def test_it_trains_resumes_saves_merges_and_samples(files):
    """LoRA and all weights; a resumed run ends with the same weights, bit for bit."""
    save_photos("photos")
    words = RUN + f"--ckpt {files['sdxl']} --data photos --workers 0 "
    works(train, words + "--lora small --checkpointing --out whole")
    works(train, words + "--lora small --checkpointing --save-every 1 --steps 1 --out half")
    works(train, "--resume half --steps 2")
    whole, half = (load_file(f"{run}/lora.safetensors") for run in ("whole", "half"))
    assert same(whole, half)
    about = metadata("whole/lora.safetensors")
    assert (about["ss_base_model_version"], about["modelspec.architecture"], about["resolution"]) == (
        "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "64 64")
    works(merge, f"whole/lora.safetensors --ckpt {files['sdxl']} --out merged.safetensors")
    few = "--device cpu --precision fp32 --n 1 --steps 2 --prompt x "
    works(sample, few + "--lora whole/lora.safetensors --out a.png")
    works(sample, few + "--ckpt merged.safetensors --size 64 --out b.png")
    from PIL import Image, ImageChops
    assert max(high for _, high in ImageChops.difference(Image.open("a.png"), Image.open("b.png")).getextrema()) <= 2
    works(train, words + "--lora none --steps 1 --out full")
    assert load_file("full/model.safetensors").keys() == load_file(files["sdxl"]).keys()


def test_pairs_reflow_depth_and_sigmas_work(files):
    few = f"--device cpu --precision fp32 --ckpt {files['sdxl']} "
    works(sample, few + "--pairs 3 --steps 2 --size 64 --out pairs")
    run = RUN.replace("--size 64 ", "")
    works(train, run + f"--ckpt {files['sdxl']} --task reflow --data pairs --lora 2 --out reflow")
    assert "0.0000" in works(sample, few + "--print-sigmas --steps 4")
    works(train, RUN + f"--ckpt {files['sdxl']} --task depth --scenes 2 --lora 2 --out depth")
    runs.save_photo("photo.jpg", 90, 120)
    works(depth, "photo.jpg --device cpu --precision fp32 --steps 1 --size 64 --lora depth/lora.safetensors --out d")
    assert Path("d/photo.npy").exists()


def test_the_default_size_is_1024(files):
    sd = load_checkpoint(files["sdxl"])
    from support.load import picture_size
    assert picture_size(sd) == (1024, 1024) and json.dumps(sd.metadata) == "{}"
