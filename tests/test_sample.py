"""sample.py and support/load.py: what a picture depends on, which files make a model, how it is sampled, what is
refused; and the bundled priors."""
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import depth
import lora
import sample
import train
from data import noises
from diff2flow import OBJECTIVES, Diff2Flow, Diffusion, NaiveFM, NaiveFMFlip, velocity_error
from model import TINY, StableDiffusion
from support import load
from support.checkpoint import load_checkpoint, save_checkpoint
from support.load import find_files, load_flow, make_flow, picture_size
from support.lora_file import merge_lora, save_lora
from support.prompts import cut_off, read_prompts
from tests import runs
from tests.checkpoints import NARROW, PROMPTS, clip_tokenizer, full_pipeline, relative
from tests.runs import FEW, SHORT, call, python_blocks, refusal, save_photos, works
from toy.scenes import Scenes

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
TOY = Path(sample.__file__).parent / "toy"


def pictures(words):
    """-> the single pictures that sample.py writes with these arguments, as integers."""
    works(sample, FEW + "--singles --out s.png " + words)
    found = [np.asarray(Image.open(path)).astype(int) for path in sorted(Path("s").iterdir())]
    shutil.rmtree("s")
    return found


def near(some, others):
    """Whether pictures differ by at most one level: batching changes the last bits."""
    return len(some) == len(others) and all(abs(a - b).max() <= 1 for a, b in zip(some, others))


def write_lora(path, tiny, depth=False, **metadata):
    """Write a random LoRA with this metadata -> its path."""
    sd = load_checkpoint(tiny)
    if depth:
        sd.add_image_input()
    torch.manual_seed(1)
    for parameter in lora.inject(sd.unet, 2):
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(sd.unet, path, metadata)
    return path


def write_run(name, file, task="text-to-image", **result):
    """Write a finished run of train.py in runs/, newer than those there -> its file of weights."""
    Path("runs", name).mkdir(parents=True)
    weights = Path("runs", name, "lora.safetensors" if "lora" in str(file) else "model.safetensors")
    shutil.copy(file, weights)
    os.utime(weights, (len(os.listdir("runs")),) * 2)
    weights.with_name("result.json").write_text(json.dumps({"task": task, **result}))
    return weights


# ------------------------------------------------------------------ what a picture depends on

def test_the_same_seed_draws_the_same_picture_and_another_seed_does_not():
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        works(sample, f"{FEW} --n 1 --seed {seed} --out {name}.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_the_noise_of_picture_i_depends_on_the_seed_and_i_alone():
    shape, five = (4, 8, 8), noises(range(5), (4, 8, 8), 3)
    assert torch.equal(noises([4, 1], shape, 3), five[[4, 1]]) and 0.9 < five.std() < 1.1
    assert len({image.sum().item() for image in [*five, *noises(range(5), shape, 4)]}) == 10


def test_in_float32_a_picture_depends_on_batch_size_and_number_of_pictures_by_one_level_at_most():
    four = pictures("--n 4 --batch 1 --prompt x --prompt y")
    assert near(four, pictures("--n 4 --batch 3 --prompt x --prompt y"))
    assert near(four[:2], pictures("--prompt x --prompt y"))


@pytest.mark.parametrize("words", ["--prompt x --prompt y", ""])
def test_one_picture_of_a_series_is_drawn_again_by_its_number(words):
    all_five, last = pictures(f"--n 5 {words}"), pictures(f"--n 1 --first 4 {words}")
    assert near(all_five[4:], last) and not near(all_five[3:4], last)
    assert "--first is for pictures" in refusal(sample, FEW + "--first 1 --pairs 2")


def test_the_lines_for_one_picture_in_diffusers_draw_the_same_one(files):
    """The code of docs/other_tools.md, with a random checkpoint and pictures of 64 pixels."""
    words = f"--ckpt {files['sd21']} --steps 4 --cfg 4 --size 64 --prompt 'a red boat' --device cpu --precision fp32 "
    works(sample, words + "--first 5 --n 1 --singles --out s.png")
    code, = (block for block in python_blocks("docs/other_tools.md") if "noises(" in block)
    pipe = full_pipeline(NARROW["sd21"], load_file(files["sd21"]), "v")
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    pipe.set_progress_bar_config(disable=True)
    names = {"pipe": pipe}
    exec(code.replace("(4, 64, 64)", "(4, 8, 8)"), names)
    ours, theirs = (np.asarray(image).astype(int) for image in (Image.open("s/0005.png"), names["image"]))
    assert ours.shape == theirs.shape and ours.std() > 20 and abs(ours - theirs).max() <= 3, abs(ours - theirs).max()


LONG = "tag, " * 37 + "tag"         # 75 tokens


def test_what_is_cut_off_a_prompt_is_what_lies_beyond_75_tokens_or_5000_characters():
    """Counted by transformers' tokenizer."""
    for prompt in [*PROMPTS, LONG, LONG + " boat", "東" * 80, "𓀀" * 40]:
        assert bool(cut_off(prompt)) == (len(clip_tokenizer()(prompt).input_ids) > 77), prompt
    assert cut_off(LONG + ", No. 12:  a Red boat ") == ", No. 12:  a Red boat"
    assert cut_off(" " * 5000 + "boat") == "boat"


def test_prompts_that_are_too_long_get_one_warning_with_their_number_and_what_is_cut_off():
    words = FEW + f"--steps 1 --prompt '{LONG}' --prompt x --prompt '{LONG} boat' --negative '{LONG} blur'"
    warning, = [line for line in call(sample, words).err.splitlines() if line.startswith("warning")]
    assert warning == ("warning: 2 of 4 prompts have more than 75 tokens, which is all that the text encoder reads; "
                       "cut off from the first: 'boat'")
    assert "warning" not in call(sample, FEW + f"--steps 1 --prompt '{LONG}'").err


def test_prompts_are_those_of_the_command_line_then_a_file_then_captions():
    Path("prompts.txt").write_text("a red boat\n\na tall tree\n")
    save_photos("photos")
    args = Namespace(prompt=["x"], prompts="prompts.txt", data="photos")
    assert read_prompts(args) == ["x", "a red boat", "a tall tree", "a red boat", "a roof", "a tall tree"]
    a, b = pictures("--prompts prompts.txt")
    (first,), (second, other) = pictures("--prompt 'a red boat'"), pictures("--prompt 'a red boat' --n 2")
    assert near([a, a], [first, second]) and not near([b], [other])


def test_without_prompts_a_model_trained_on_pictures_draws_their_captions(tiny):
    save_photos("photos")
    out = works(train, SHORT + "--data photos --steps 1 --lora 2 --preview-every 0 --out runs/mine")
    captions = json.loads(Path("runs/mine/result.json").read_text())["captions"]
    assert len(captions) == 2 and set(captions) < {"a red boat", "a tall tree", "a roof"}
    command = out.splitlines()[-1].removeprefix("next: python sample.py ")
    for words in command, f"--ckpt {tiny} --lora runs/mine/lora.safetensors", "":   # without files: the newest run
        works(sample, f"{FEW} {words} --n 3 --out s.png")
        drawn = Image.open("s.png").info["parameters"].splitlines()
        assert drawn[:3] == [*captions, captions[0]]
    works(sample, FEW + "--n 1 --prompt 'a dog' --out s.png")
    assert Image.open("s.png").info["parameters"].startswith("a dog\n")


def test_guidance_and_its_negative_prompt_change_the_picture_and_without_guidance_the_negative_prompt_does_not():
    guided, negative = pictures("--prompt x --cfg 6"), pictures("--prompt x --cfg 6 --negative 'a red circle'")
    plain, also_plain = pictures("--prompt x --cfg 1"), pictures("--prompt x --cfg 1 --negative 'a red circle'")
    assert not near(guided, negative) and not near(guided, plain) and near(plain, also_plain)


def test_with_singles_the_grid_shows_the_first_pictures_alone(monkeypatch):
    monkeypatch.setattr(sample, "PICTURES_IN_GRID", 3)
    five = pictures("--n 5 --batch 2 --prompt x")
    assert len(five) == 5 and Image.open("s.png").size == (3 * 132 + 4, 132 + 14 + 4)   # three with captions


def test_a_picture_has_the_given_size_or_that_of_the_checkpoints_metadata():
    assert pictures("--n 1 --size 32 48")[0].shape == (32, 48, 3)
    works(sample, "--steps 1 --n 1 --singles --device cpu")
    assert Image.open("samples/0000.png").size == (64, 64)


def test_a_plain_stable_diffusion_file_is_sampled_at_512_pixels_and_768_can_be_chosen(files, monkeypatch):
    monkeypatch.setattr(Diff2Flow, "sample", lambda flow, x0, *args, **options: x0)
    monkeypatch.setattr(StableDiffusion, "decode", lambda sd, x: x.new_zeros(1, 3, 8 * x.shape[2], 8 * x.shape[3]))
    for words, size in ("", 512), ("--size 768", 768):
        out = works(sample, f"--ckpt {files['sd21']} --n 1 --prompt x --device cpu --singles --out {size}.png {words}")
        assert f"1 pictures of {size}x{size}" in out and Image.open(f"{size}/0000.png").size == (size, size)
    usage = " ".join(call(sample, "--help").out.split())
    assert "(default: 512, or the size that the model's metadata names; SD 2.1 was trained at 768; SDXL 1024)" in usage


def test_print_sigmas_prints_the_documented_sigmas_and_draws_nothing():
    out = works(sample, "--steps 4 --print-sigmas --device cpu")
    assert out.splitlines()[-2:] == ["ComfyUI, ManualSigmas: 14.6146, 2.3553, 0.8796, 0.3055, 0.0000",
                                     "diffusers: sigmas=[14.6146, 2.3553, 0.8796, 0.3055, 0.0000]"]
    assert not Path("samples.png").exists()
    out = works(sample, "--steps 2 --print-sigmas --device cpu --zero-snr")         # its first level is infinite
    *_, sigmas, hint = out.splitlines()
    assert sigmas == "diffusers: sigmas=[4096.0000, 0.9995, 0.0000]" and hint == (
        "zero terminal SNR: ModelSamplingDiscrete with zsnr in ComfyUI, rescale_betas_zero_snr=True in diffusers' "
        "scheduler")


def test_with_zero_snr_the_printed_sigmas_need_diffusers_rescaled_betas(tiny):
    """diffusers finds the network's timestep of a sigma by its own schedule."""
    from diffusers import EulerDiscreteScheduler
    sd, flow = load_flow(tiny, zero_snr=True)
    x0, context, errors = noises([0, 1], (4, 8, 8), 0), sd.encode_text(["x", "y"]), {}
    with torch.no_grad():
        ours = flow.sample(x0, context, 10)
        for rescaled in True, False:
            scheduler = EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                timestep_spacing="leading", rescale_betas_zero_snr=rescaled)
            scheduler.set_timesteps(sigmas=sample.sigma_grid(flow, 10))
            x = x0 * scheduler.init_noise_sigma
            for t_dm in scheduler.timesteps:
                output = sd.unet(scheduler.scale_model_input(x, t_dm), t_dm.expand(2), context)
                x = scheduler.step(output, t_dm, x).prev_sample
            errors[rescaled] = relative(x, ours)
    assert errors[True] < 5e-3 and errors[False] > 4 * errors[True], errors


@pytest.mark.parametrize("objective", ["fm", "fm-flip", "rf"])
def test_print_sigmas_refuses_models_of_naive_flow_matching(tiny, objective):
    """Their network takes t_fm and returns u, which no k-diffusion sampler can use."""
    save_checkpoint(load_checkpoint(tiny), "model.safetensors", objective=objective)
    assert f"--print-sigmas: other tools cannot sample a model trained by {objective}" in refusal(
        sample, "--print-sigmas --device cpu --ckpt model.safetensors")
    assert "ManualSigmas" in works(sample, "--print-sigmas --device cpu --ckpt model.safetensors --objective dm")


# ------------------------------------------------------------------ which model, and how it is sampled

def test_the_bundled_prior_was_trained_by_dm_and_is_sampled_by_algorithm_2():
    sd, flow = load_flow(TOY / "tiny-v.safetensors")
    assert sd.metadata["objective"] == "dm" and type(flow) is Diff2Flow
    _, flow = load_flow(TOY / "tiny-v.safetensors", objective="dm")
    assert type(flow) is Diffusion


@pytest.mark.parametrize("trained_by, kind", [("dm", Diff2Flow), ("fm", NaiveFM), ("fm-flip", NaiveFMFlip)])
def test_only_models_of_fm_and_fm_flip_are_sampled_by_their_own_objective(tiny, trained_by, kind):
    save_checkpoint(load_checkpoint(tiny), "model.safetensors", objective=trained_by)
    assert type(load_flow("model.safetensors")[1]) is kind
    save_checkpoint(load_checkpoint(tiny), "base.safetensors", objective="fm")      # the LoRA's objective counts
    write_lora("lora.safetensors", tiny, objective=trained_by)
    assert type(load_flow("base.safetensors", "lora.safetensors")[1]) is kind
    assert type(load_flow("base.safetensors", "lora.safetensors", objective="dm")[1]) is Diffusion


def test_the_objective_of_sampling_is_printed_and_can_be_chosen():
    assert "objective diff2flow, " in works(sample, FEW + "--n 1 --out a.png")
    assert "objective dm, " in works(sample, FEW + "--n 1 --out b.png --objective dm")
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()


def test_a_lora_is_merged_into_its_base_and_sets_the_guidance(tiny):
    write_lora("lora.safetensors", tiny, cfg="1.0")
    plain, (sd, _) = load_checkpoint(tiny), load_flow(tiny, "lora.safetensors")
    merged = load_checkpoint(tiny)
    merge_lora("lora.safetensors", merged)
    weights, expected = sd.unet.state_dict(), merged.unet.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not torch.equal(weights["out.2.weight"], plain.unet.state_dict()["out.2.weight"])
    assert "cfg 1," in works(sample, f"{FEW} --n 1 --ckpt {tiny} --lora lora.safetensors")
    assert "cfg 4," in works(sample, f"{FEW} --n 1 --ckpt {tiny}")
    assert "cfg 1," in works(sample, f"{FEW} --pairs 1 --ckpt {tiny} --lora lora.safetensors --out again")
    assert "cfg 7.5," in works(sample, f"{FEW} --pairs 1 --ckpt {tiny} --out pairs")


def test_a_loras_metadata_gives_the_prediction(tiny):
    save_file(load_file(tiny), "plain.safetensors")                                 # without metadata: guessed as v
    assert load_flow("plain.safetensors")[1].prediction == "v"
    write_lora("lora.safetensors", tiny, prediction="eps", base_hash=load_checkpoint(tiny).unet_hash)
    sd, flow = load_flow("plain.safetensors", "lora.safetensors")
    assert sd.prediction == flow.prediction == "eps"
    assert load_flow("plain.safetensors", "lora.safetensors", prediction="v")[1].prediction == "v"
    write_lora("foreign.safetensors", tiny)                                         # of another tool, no metadata
    save_checkpoint(load_checkpoint(tiny), "base.safetensors", prediction="epsilon")
    assert load_flow("base.safetensors", "foreign.safetensors")[1].prediction == "eps"


def test_without_files_the_newest_finished_run_of_the_task_is_used_with_its_base(tiny):
    adapter = write_lora("lora.safetensors", tiny)
    for base in "sd.safetensors", "other.safetensors":
        shutil.copy(tiny, base)
    assert find_files(None, None, False, "text-to-image") == (tiny, [], False)
    full = write_run("full", tiny)
    depth = write_run("depth", adapter, "depth", ckpt="sd.safetensors")
    reflow = write_run("reflow", adapter, "reflow", ckpt="other.safetensors", use_ema=True)
    unfinished = write_run("unfinished", tiny)
    unfinished.with_name("result.json").unlink()
    assert find_files(None, None, False, "text-to-image") == (Path("other.safetensors"), [reflow], True)
    assert find_files(None, None, False, "depth") == (Path("sd.safetensors"), [depth], False)
    os.utime(full)
    assert find_files(None, None, False, "text-to-image") == (full, [], False)
    assert f"{full}: Stable" in works(sample, FEW + "--n 1")


def test_given_files_are_used_and_a_lora_alone_is_put_on_its_own_base(tiny):
    adapter = write_run("lora", write_lora("lora.safetensors", tiny), ckpt=None)
    moved = write_run("moved", "lora.safetensors", ckpt="other.safetensors", use_ema=True)
    write_run("full", tiny)
    with pytest.raises(ValueError, match="moved/.*names its base other.safetensors, which does not exist: pass --ckpt"):
        find_files(None, moved, False, "text-to-image")
    shutil.copy(tiny, "other.safetensors")
    assert find_files(None, adapter, False, "text-to-image") == (tiny, [adapter], False)
    assert find_files(None, moved, False, "text-to-image") == (Path("other.safetensors"), [moved], True)
    assert find_files("own.safetensors", moved, False, "text-to-image") == (Path("own.safetensors"), [moved], False)
    assert find_files("own.safetensors", None, True, "text-to-image") == (Path("own.safetensors"), [], True)


def test_a_lora_without_result_json_finds_its_base_by_metadata_and_fits_no_other(tiny, monkeypatch, capsys):
    for name in "v", "eps":
        sd = load_checkpoint(tiny)
        sd.unet.out[2].bias += 1 + (name == "eps")
        sd.prediction = name
        save_checkpoint(sd, f"toy/tiny-{name}.safetensors")
    monkeypatch.setattr(load, "BUNDLED_PRIOR", Path("toy/tiny-v.safetensors"))
    hashes = {name: load_checkpoint(f"toy/tiny-{name}.safetensors").unet_hash for name in ("v", "eps")}
    eps = write_lora("lora.safetensors", tiny, base="tiny-eps.safetensors", base_hash=hashes["eps"], prediction="eps")
    capsys.readouterr()
    sd, _ = load_flow(loras=eps)
    assert sd.prediction == "eps" and "toy/tiny-eps.safetensors: Stable" in (out := capsys.readouterr().out)
    assert "warning" not in out
    with pytest.raises(ValueError, match="made with tiny-eps.safetensors, whose UNet predicts eps; "
                                         "toy/tiny-v.safetensors predicts v: pass the right"):
        load_flow("toy/tiny-v.safetensors", eps)
    assert load_flow("toy/tiny-v.safetensors", eps, prediction="eps")[0].prediction == "eps"
    capsys.readouterr()
    v = write_lora("lora.safetensors", tiny, base="sd21.safetensors", base_hash="0123456789abcdef", prediction="v")
    load_flow("toy/tiny-v.safetensors", v)
    warning = capsys.readouterr().out
    assert "warning: lora.safetensors was made with sd21.safetensors (UNet 0123456789); toy/tiny-v" in warning
    assert f"has another UNet ({hashes['v'][:10]})" in warning
    assert "trained on sd21.safetensors: pass it as --ckpt" in refusal(sample, f"{FEW} --lora {v}")
    foreign = write_lora("lora.safetensors", tiny)
    assert "a checkpoint that it does not name: pass it as --ckpt" in refusal(sample, f"{FEW} --lora {foreign}")


def test_the_hash_of_a_base_depends_on_its_unet_alone_and_not_on_the_precision_of_file_or_memory(tiny):
    sd = load_checkpoint(tiny)
    sd.unet.out[2].bias += 1 / 3                                                    # not a float16 number
    for name, dtype in ("float32", torch.float32), ("float16", torch.float16):
        save_checkpoint(sd, f"{name}.safetensors", dtype)
    sd.first_stage_model.quant_conv.bias += 1
    save_checkpoint(sd, "other-vae.safetensors", torch.float32)
    files = "float32.safetensors", "float16.safetensors", "other-vae.safetensors"
    assert len({load_checkpoint(file, dtype=dtype).unet_hash
                for file in files for dtype in (torch.float32, torch.bfloat16)}) == 1
    sd.unet.out[2].bias[0] += 0.1
    save_checkpoint(sd, "other.safetensors")
    assert load_checkpoint("other.safetensors").unet_hash != load_checkpoint("float32.safetensors").unet_hash


def test_zero_snr_comes_from_a_loras_metadata_or_the_command_line(tiny):
    assert load_flow(tiny, write_lora("lora.safetensors", tiny, zero_snr="true"))[1].f_table[-1] == 0
    assert load_flow(tiny, write_lora("lora.safetensors", tiny))[1].f_table[-1] > 0.06
    assert load_flow(tiny, zero_snr=True)[1].f_table[-1] == 0


def test_a_depth_model_is_refused_for_pictures_and_a_text_to_image_model_for_depth(tiny):
    adapter = write_lora("lora.safetensors", tiny, depth=True, task="depth")
    sd, flow = load_flow(tiny, adapter, task="depth")
    assert sd.is_depth_model and load_flow(tiny, adapter, task=None)[0].is_depth_model
    x0, image_latents = noises([0, 1], (4, 8, 8), 0)[:, None]
    drawn = sd.decode(flow.sample(x0, image_latents, 1))
    assert drawn.shape == (1, 3, 32, 32) and drawn.dtype == torch.float32
    assert f"{adapter}: trained for depth; use depth.py for it" in refusal(
        sample, f"{FEW} --ckpt {tiny} --lora {adapter}")
    with pytest.raises(ValueError, match="not trained for depth; use sample.py for it"):
        load_flow(tiny, task="depth")


@pytest.mark.parametrize("words", ["", "--lora 2"])
def test_a_depth_model_from_before_the_image_came_first_computes_the_same(tiny, words):
    """The metadata of such a file has no image_input; its halves of the first conv are the other way round."""
    works(train, f"{SHORT} --task depth --preview-every 0 --out run --lora {'2' if words else 'none'}")
    path, conv = next(Path("run").glob("[lm]o*.safetensors")), "model.diffusion_model.input_blocks.0.0.weight"
    tensors, about = load_file(path), runs.metadata(path)
    assert about.pop("image_input") == "first"
    for name in {conv, "lora_unet_conv_in.lora_down.weight"} & tensors.keys():
        tensors[name] = tensors[name].roll(4, 1)
    save_file(tensors, "old.safetensors", about)
    new, old = (load_flow(*((tiny, file) if words else (file,)), task="depth")[0].state_dict()
                for file in (path, "old.safetensors"))
    assert all(torch.allclose(new[name], old[name], atol=1e-7) for name in new)
    assert not torch.allclose(new[conv][:, :4], new[conv][:, 4:], atol=1e-5)


@pytest.mark.parametrize("module, words", [
    (sample, "--n 2 --size 32 --singles --out a.png"), (sample, "--size 32 --pairs 2 --prompt x --out p"),
    (depth, "photo.jpg --size 32 --out d")])
@pytest.mark.parametrize("factor", [1e10, 1e36])
def test_a_model_that_draws_numbers_that_are_too_large_is_refused_and_nothing_is_written(tiny, module, words, factor):
    sd = load_checkpoint(tiny)
    if module is depth:
        sd.add_image_input()
    sd.unet.out[2].weight *= factor
    save_checkpoint(sd, "big.safetensors", torch.float32)
    runs.save_photo("photo.jpg")
    line = refusal(module, f"{words} --steps 2 --device cpu --precision fp32 --ckpt big.safetensors")
    assert line.startswith("error: big.safetensors: it draws NaN, infinity or numbers above 65504")
    assert {path.name for path in Path().rglob("*") if path.is_file()} == {"big.safetensors", "photo.jpg"}


def test_without_a_depth_run_the_error_says_what_to_train_or_pass(tiny):
    write_run("pictures", tiny)
    with pytest.raises(ValueError, match="no depth model in runs/: train one by python train.py --task depth"):
        load_flow(task="depth")


# ------------------------------------------------------------------ what is refused

REFUSED = {
    "--ckpt {}/none.safetensors": "no such checkpoint file", "--lora {}/none.safetensors": "none.safetensors",
    "--lora {}/cut.safetensors": "cut.safetensors", "--lora {}/model.safetensors": "does not name",
    "--ckpt {0}/model.safetensors --lora {0}/model.safetensors": "not a LoRA",
    "--size 65": "65x65", "--size 64 64 64": "3 numbers", "--steps 0": "--steps 0", "--batch 0": "--batch 0",
    "--n 0": "--n 0", "--pairs 0": "--pairs 0", "--seed -1": "--seed -1", "--cfg nan": "--cfg nan",
    "--pairs 2 --out {}/file": "file",
    "--prompts {}/none.txt": "none.txt", "--prompts {}/file": "no prompt", "--prompts {}/model.safetensors": "UTF-8",
    "--data {}/empty": "no readable image", "--out {}/empty": "--out", "--out grid.txt": "--out grid.txt",
    "--out {}/file/x.png": "file", "--singles --out {}/file.png": "file", "--device cuda:7": "no such device",
}


@pytest.mark.parametrize("capabilities, precision", [
    ({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"avx512_f": True, "amx_bf16": True}, "bf16")])
def test_a_cpu_uses_bf16_where_it_has_it_and_the_precision_can_be_chosen(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    words = "--steps 1 --n 1 --size 32 --device cpu "
    assert f"{precision} on cpu" in works(sample, words)
    assert "fp32 on cpu" in works(sample, words + "--precision fp32")


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("capability, precision", [
    ((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_without_bf16_uses_float32_with_a_note(monkeypatch, capsys, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    device = torch.device("cuda")
    assert load.pick_precision(None, device)[0] == precision
    note = "Tesla T4 has no bf16: float32 (--precision bf16 overrides it)\n"
    assert capsys.readouterr().out == (note if precision == "fp32" else "")
    assert load.pick_precision("bf16", device)[0] == "bf16" and load.pick_precision("fp32", device)[0] == "fp32"


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_arguments_are_one_line_of_error_and_write_nothing(tiny, words, monkeypatch, tmp_path_factory):
    bad = tmp_path_factory.mktemp("bad")
    (bad / "empty").mkdir()
    (bad / "file").write_text("\n \n")
    (bad / "cut.safetensors").write_bytes(tiny.read_bytes()[:1000])
    shutil.copy(tiny, bad / "model.safetensors")
    monkeypatch.setattr(Diff2Flow, "sample", lambda *_: pytest.fail("sampled before it failed"))
    before = sorted(bad.rglob("*"))
    assert REFUSED[words] in refusal(sample, words.format(bad))
    assert sorted(bad.rglob("*")) == before and not os.listdir()


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null", "{}", "[" * 100_000, '{"task": 5}', '{"ckpt": null}',
                                     '{"task": "depth", "ckpt": [1]}', '{"task": "reflow", "captions": 5}',
                                     '{"task": "reflow", "captions": [5]}', '{"task": "reflow", "captions": "a cat"}',
                                     "a folder"])
def test_a_damaged_result_json_is_ignored_with_a_warning(tiny, content):
    write_run("older", tiny)
    path = write_run("newer", tiny).with_name("result.json")
    if content == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(content)
    done = call(sample, FEW + "--n 1 --steps 1")
    assert done.code == 0 and "runs/older/model.safetensors: " in done.out and "Traceback" not in done.err
    assert content in ("[]", "null", "{}") or "warning: runs/newer/result.json is ignored" in done.err


WRONG_METADATA = [  # a LoRA's metadata, the error, and the flag that overrides the metadata
    ({"cfg": "much"}, "its metadata has cfg 'much'", "--cfg 2"),
    ({"cfg": "nan"}, "its metadata has cfg 'nan'", "--cfg 2"),
    ({"resolution": "64 by 64"}, "resolution '64 by 64' in its metadata is not a size", "--size 32"),
    ({"resolution": ""}, "resolution '' in its metadata is not a size", "--size 32"),
    ({"prediction": "x0"}, "prediction 'x0' is neither", "--prediction v"), ({"base": "../x"}, "", "--steps 1")]


@pytest.mark.parametrize("metadata, message, flag", WRONG_METADATA)
def test_wrong_metadata_is_refused_by_the_files_name_and_can_be_overridden(tiny, metadata, message, flag):
    write_lora("odd.safetensors", tiny, base_hash=load_checkpoint(tiny).unet_hash, **metadata)
    words = f"--n 1 --steps 1 --device cpu --lora odd.safetensors --ckpt {tiny} "
    assert not message or f"odd.safetensors: {message}" in refusal(sample, words)
    works(sample, words + flag)


# ------------------------------------------------------------------ the bundled priors

both = pytest.mark.parametrize("prediction", ["v", "eps"])


@both
def test_a_bundled_prior_is_an_ordinary_checkpoint_of_at_most_10_megabytes(prediction):
    path = TOY / f"tiny-{prediction}.safetensors"
    sd = load_checkpoint(path)
    assert path.stat().st_size <= 10_000_000 and sd.config == TINY
    assert sd.prediction == prediction and picture_size(sd) == (64, 64)
    assert {name.split(".")[0] for name in load_file(path)} == {"model", "first_stage_model", "cond_stage_model"}


@both
def test_a_bundled_prior_is_a_velocity_field_before_any_training_and_naive_fm_is_not(prediction):
    sd, scenes = load_checkpoint(TOY / f"tiny-{prediction}.safetensors"), Scenes(64, 64, 64, "solid", 123)
    items = [scenes[i] for i in range(64)]
    with torch.no_grad():
        x1 = sd.encode(torch.stack([item["image"] for item in items]))
        context = sd.encode_text([item["caption"] for item in items])
        x0, t_fm = noises(range(64), x1.shape[1:], 0), (torch.arange(64) + 0.5) / 64
        error = {name: velocity_error(make_flow(sd, name), x1, x0, t_fm, context).item() for name in OBJECTIVES}
    assert error["diff2flow"] < 0.15 and error["fm-flip"] > 1 and error["fm"] > 5, error


def test_the_bundled_priors_have_the_same_autoencoder():
    v, eps = (load_file(TOY / f"tiny-{prediction}.safetensors") for prediction in ("v", "eps"))
    names = [name for name in v if name.startswith("first_stage_model.")]
    assert names and all(torch.equal(v[name], eps[name]) for name in names)
