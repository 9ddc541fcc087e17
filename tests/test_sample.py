"""sample.py: what a picture depends on, which model is taken and how it is sampled, pairs, refusals, bundled priors."""
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

import lora
import sample
from data import Pairs, read_pairs
from diff2flow import OBJECTIVES, Diff2Flow, Diffusion, NaiveFM, NaiveFMFlip, velocity_error
from model import TINY, load_checkpoint
from sample import find_files, load_flow, make_flow, noises
from tests import runs
from tests.runs import FEW, call, metadata, refusal, same, save_photos, works
from toy.scenes import Scenes

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
TOY = Path(sample.__file__).parent / "toy"
PAIRS = FEW + "--pairs 7 --batch 2 --cfg 3 --prompt 'a red circle' --prompt 'a blue star' --out pairs "


def pictures(words):
    """-> the pictures that sample.py writes one by one, as integers."""
    works(sample, FEW + "--singles --out s.png " + words)
    found = [np.asarray(Image.open(path)).astype(int) for path in sorted(Path("s").iterdir())]
    shutil.rmtree("s")
    return found


def near(some, others):
    """Whether pictures are equal but for a level of rounding: sums depend on the batch in their last bits."""
    return len(some) == len(others) and all(abs(a - b).max() <= 1 for a, b in zip(some, others))


def write_lora(path, tiny, depth=False, **told):
    """The file of a random LoRA that says what is `told` of itself."""
    sd = load_checkpoint(tiny)
    if depth:
        sd.add_picture_input()
    torch.manual_seed(1)
    for parameter in lora.inject(sd.unet, 2):
        torch.nn.init.normal_(parameter, std=0.1)
    lora.save(sd.unet, path, told)
    return path


def write_run(name, file, task="text-to-image", **result):
    """A finished run of train.py in runs/, with a file of weights; the latest one is the newest."""
    Path("runs", name).mkdir(parents=True)
    weights = Path("runs", name, "lora.safetensors" if "lora" in str(file) else "model.safetensors")
    shutil.copy(file, weights)
    os.utime(weights, (len(os.listdir("runs")),) * 2)
    weights.with_name("result.json").write_text(json.dumps({"task": task, **result}))
    return weights


# ------------------------------------------------------------------ what a picture depends on

def test_the_same_seed_is_the_same_picture_and_another_is_not():
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        works(sample, f"{FEW} --n 1 --seed {seed} --out {name}.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_the_noise_of_picture_i_comes_from_the_seed_and_i_alone():
    shape, five = (4, 8, 8), noises(range(5), (4, 8, 8), 3)
    assert torch.equal(noises([4, 1], shape, 3), five[[4, 1]]) and 0.9 < five.std() < 1.1
    assert len({image.sum().item() for image in [*five, *noises(range(5), shape, 4)]}) == 10


def test_a_picture_does_not_depend_on_the_batch_size_nor_on_how_many_there_are():
    four = pictures("--n 4 --batch 1 --prompt x --prompt y")
    assert near(four, pictures("--n 4 --batch 3 --prompt x --prompt y"))
    assert near(four[:2], pictures("--prompt x --prompt y"))


def test_prompts_come_from_the_command_line_a_file_or_captions_in_their_order():
    Path("prompts.txt").write_text("a red boat\n\na tall tree\n")
    save_photos("photos")
    args = Namespace(prompt=["x"], prompts="prompts.txt", data="photos")
    assert sample.read_prompts(args) == ["x", "a red boat", "a tall tree", "a red boat", "a roof", "a tall tree"]
    a, b = pictures("--prompts prompts.txt")
    (first,), (second, other) = pictures("--prompt 'a red boat'"), pictures("--prompt 'a red boat' --n 2")
    assert near([a, a], [first, second]) and not near([b], [other])


def test_guidance_and_its_negative_prompt_change_the_picture_but_without_guidance_the_latter_does_not():
    guided, negative = pictures("--prompt x --cfg 6"), pictures("--prompt x --cfg 6 --negative 'a red circle'")
    plain, also_plain = pictures("--prompt x --cfg 1"), pictures("--prompt x --cfg 1 --negative 'a red circle'")
    assert not near(guided, negative) and not near(guided, plain) and near(plain, also_plain)


def test_with_singles_the_grid_holds_the_first_pictures_only(monkeypatch):
    monkeypatch.setattr(sample, "PICTURES_IN_GRID", 3)
    five = pictures("--n 5 --batch 2 --prompt x")
    assert len(five) == 5 and Image.open("s.png").size == (3 * 132 + 4, 132 + 14 + 4)   # three, with a line below


def test_a_picture_has_the_size_asked_for_and_else_the_checkpoints():
    assert pictures("--n 1 --size 32 48")[0].shape == (32, 48, 3)
    works(sample, "--steps 1 --n 1 --singles --device cpu")
    assert Image.open("samples/0000.png").size == (64, 64)


def test_the_sigmas_for_other_tools_are_the_documented_ones():
    out = works(sample, "--steps 4 --print-sigmas --device cpu")
    assert out.splitlines()[-2:] == ["ComfyUI, ManualSigmas: 14.6146, 2.3553, 0.8796, 0.3055, 0.0000",
                                     "diffusers: sigmas=[14.6146, 2.3553, 0.8796, 0.3055, 0.0000]"]
    assert not Path("samples.png").exists()
    out = works(sample, "--steps 2 --print-sigmas --device cpu --zero-snr")         # its first level is infinite
    assert out.splitlines()[-1] == "diffusers: sigmas=[4096.0000, 0.9995, 0.0000]"


# ------------------------------------------------------------------ which model, and how it is sampled

def test_the_bundled_prior_was_trained_as_a_diffusion_model_and_is_sampled_by_algorithm_2():
    sd, flow = load_flow(TOY / "tiny-v.safetensors")
    assert sd.metadata["objective"] == "dm" and type(flow) is Diff2Flow
    _, flow = load_flow(TOY / "tiny-v.safetensors", objective="dm")
    assert type(flow) is Diffusion


@pytest.mark.parametrize("trained_by, kind", [("dm", Diff2Flow), ("fm", NaiveFM), ("fm-flip", NaiveFMFlip)])
def test_models_of_fm_and_fm_flip_alone_are_sampled_as_they_were_trained(tiny, trained_by, kind):
    load_checkpoint(tiny).save("model.safetensors", objective=trained_by)
    assert type(load_flow("model.safetensors")[1]) is kind
    load_checkpoint(tiny).save("base.safetensors", objective="fm")                  # the LoRA's word counts, not this
    write_lora("lora.safetensors", tiny, objective=trained_by)
    assert type(load_flow("base.safetensors", "lora.safetensors")[1]) is kind
    assert type(load_flow("base.safetensors", "lora.safetensors", objective="dm")[1]) is Diffusion


def test_how_it_is_sampled_is_said_and_can_be_asked_for():
    assert "objective diff2flow, " in works(sample, FEW + "--n 1 --out a.png")
    assert "objective dm, " in works(sample, FEW + "--n 1 --out b.png --objective dm")
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()


def test_a_lora_is_its_merged_model_and_brings_its_guidance(tiny):
    write_lora("lora.safetensors", tiny, cfg="1.0")
    plain, (sd, _) = load_checkpoint(tiny), load_flow(tiny, "lora.safetensors")
    merged = load_checkpoint(tiny)
    lora.load("lora.safetensors", merged.unet)
    lora.merge(merged.unet)
    weights, expected = sd.unet.state_dict(), merged.unet.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not torch.equal(weights["out.2.weight"], plain.unet.state_dict()["out.2.weight"])
    assert "cfg 1," in works(sample, f"{FEW} --n 1 --ckpt {tiny} --lora lora.safetensors")
    assert "cfg 4," in works(sample, f"{FEW} --n 1 --ckpt {tiny}")
    assert "cfg 1," in works(sample, f"{FEW} --pairs 1 --ckpt {tiny} --lora lora.safetensors --out again")
    assert "cfg 7.5," in works(sample, f"{FEW} --pairs 1 --ckpt {tiny} --out pairs")


def test_a_lora_remembers_the_prediction_that_it_was_trained_with(tiny):
    save_file(load_file(tiny), "silent.safetensors")                                # guessed as v
    assert load_flow("silent.safetensors")[1].prediction == "v"
    write_lora("lora.safetensors", tiny, prediction="eps", base_hash=load_checkpoint(tiny).unet_hash)
    sd, flow = load_flow("silent.safetensors", "lora.safetensors")
    assert sd.prediction == flow.prediction == "eps"
    assert load_flow("silent.safetensors", "lora.safetensors", prediction="v")[1].prediction == "v"
    write_lora("foreign.safetensors", tiny)                                         # of another tool: the base's
    load_checkpoint(tiny).save("base.safetensors", prediction="epsilon")
    assert load_flow("base.safetensors", "foreign.safetensors")[1].prediction == "eps"


def test_the_newest_finished_run_of_the_task_is_taken_with_the_base_that_its_lora_was_trained_from(tiny):
    adapter = write_lora("lora.safetensors", tiny)
    for base in "sd.safetensors", "other.safetensors":
        shutil.copy(tiny, base)
    assert find_files(None, None, False, "text-to-image") == (tiny, None, False)
    full = write_run("full", tiny)
    depth = write_run("depth", adapter, "depth", ckpt="sd.safetensors")
    reflow = write_run("reflow", adapter, "reflow", ckpt="other.safetensors", use_ema=True)
    unfinished = write_run("unfinished", tiny)
    unfinished.with_name("result.json").unlink()
    assert find_files(None, None, False, "text-to-image") == (Path("other.safetensors"), reflow, True)
    assert find_files(None, None, False, "depth") == (Path("sd.safetensors"), depth, False)
    os.utime(full)
    assert find_files(None, None, False, "text-to-image") == (full, None, False)
    assert f"{full}: Stable" in works(sample, FEW + "--n 1")


def test_what_is_named_is_taken_and_a_lora_alone_is_on_its_own_base(tiny):
    adapter = write_run("lora", write_lora("lora.safetensors", tiny), ckpt=None)
    moved = write_run("moved", "lora.safetensors", ckpt="other.safetensors", use_ema=True)
    write_run("full", tiny)
    with pytest.raises(ValueError, match="moved/.*trained on other.safetensors, which is not there: give --ckpt"):
        find_files(None, moved, False, "text-to-image")
    shutil.copy(tiny, "other.safetensors")
    assert find_files(None, adapter, False, "text-to-image") == (tiny, adapter, False)
    assert find_files(None, moved, False, "text-to-image") == (Path("other.safetensors"), moved, True)
    assert find_files("own.safetensors", moved, False, "text-to-image") == (Path("own.safetensors"), moved, False)
    assert find_files("own.safetensors", None, True, "text-to-image") == (Path("own.safetensors"), None, True)


def test_a_lora_without_its_run_names_its_base_and_is_put_on_no_other(tiny, monkeypatch, capsys):
    for name in "v", "eps":
        sd = load_checkpoint(tiny)
        sd.unet.out[2].bias += 1 + (name == "eps")
        sd.prediction = name
        sd.save(f"toy/tiny-{name}.safetensors")
    monkeypatch.setattr(sample, "BUNDLED_PRIOR", Path("toy/tiny-v.safetensors"))
    hashes = {name: load_checkpoint(f"toy/tiny-{name}.safetensors").unet_hash for name in ("v", "eps")}
    eps = write_lora("lora.safetensors", tiny, base="tiny-eps.safetensors", base_hash=hashes["eps"], prediction="eps")
    capsys.readouterr()
    sd, _ = load_flow(lora_file=eps)
    assert sd.prediction == "eps" and "toy/tiny-eps.safetensors: Stable" in (out := capsys.readouterr().out)
    assert "warning" not in out
    says = "trained on tiny-eps.safetensors, whose UNet predicts eps; toy/tiny-v.safetensors predicts v: give the right"
    with pytest.raises(ValueError, match=says):
        load_flow("toy/tiny-v.safetensors", eps)
    assert load_flow("toy/tiny-v.safetensors", eps, prediction="eps")[0].prediction == "eps"
    capsys.readouterr()
    v = write_lora("lora.safetensors", tiny, base="sd21.safetensors", base_hash="0123456789abcdef", prediction="v")
    load_flow("toy/tiny-v.safetensors", v)
    warning = capsys.readouterr().out
    assert "warning: lora.safetensors was trained on sd21.safetensors (UNet 0123456789); toy/tiny-v" in warning
    assert f"has another UNet ({hashes['v'][:10]})" in warning
    assert "trained on sd21.safetensors: give it by --ckpt" in refusal(sample, f"{FEW} --lora {v}")
    foreign = write_lora("lora.safetensors", tiny)
    assert "a checkpoint that it does not name: give it by --ckpt" in refusal(sample, f"{FEW} --lora {foreign}")


def test_the_hash_of_a_base_is_of_the_unet_alone_whatever_the_precision_of_the_file_or_in_memory(tiny):
    sd = load_checkpoint(tiny)
    sd.unet.out[2].bias += 1 / 3                                                    # no float16
    for name, dtype in ("float32", torch.float32), ("float16", torch.float16):
        sd.save(f"{name}.safetensors", dtype)
    sd.first_stage_model.quant_conv.bias += 1
    sd.save("other-vae.safetensors", torch.float32)
    files = "float32.safetensors", "float16.safetensors", "other-vae.safetensors"
    assert len({load_checkpoint(file, dtype=dtype).unet_hash
                for file in files for dtype in (torch.float32, torch.bfloat16)}) == 1
    sd.unet.out[2].bias[0] += 0.1
    sd.save("other.safetensors")
    assert load_checkpoint("other.safetensors").unet_hash != load_checkpoint("float32.safetensors").unet_hash


def test_the_zero_snr_schedule_of_a_lora_or_of_the_command_line_is_sampled_with(tiny):
    assert load_flow(tiny, write_lora("lora.safetensors", tiny, zero_snr="true"))[1].f_table[-1] == 0
    assert load_flow(tiny, write_lora("lora.safetensors", tiny))[1].f_table[-1] > 0.06
    assert load_flow(tiny, zero_snr=True)[1].f_table[-1] == 0


def test_a_depth_model_and_a_picture_model_are_not_taken_for_each_other(tiny):
    adapter = write_lora("lora.safetensors", tiny, depth=True, task="depth")
    sd, flow = load_flow(tiny, adapter, task="depth")
    assert sd.is_depth_model and load_flow(tiny, adapter, task=None)[0].is_depth_model
    x0, picture = noises([0, 1], (4, 8, 8), 0)[:, None]
    drawn = sample.draw(sd, flow, x0, picture, 1)
    assert drawn.shape == (1, 3, 32, 32) and drawn.dtype == torch.float32
    assert f"{adapter}: trained for depth; depth.py samples it" in refusal(
        sample, f"{FEW} --ckpt {tiny} --lora {adapter}")
    with pytest.raises(ValueError, match="not trained for depth; sample.py samples it"):
        load_flow(tiny, task="depth")


def test_without_a_depth_run_it_is_said_what_to_train_or_to_name(tiny):
    write_run("pictures", tiny)
    with pytest.raises(ValueError, match="no depth model in runs/: train one by python train.py --task depth"):
        load_flow(task="depth")


# ------------------------------------------------------------------ pairs for Reflow

@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(sample, "PAIRS_A_FILE", 4)


def test_a_pair_is_a_noise_and_what_the_model_makes_of_it_in_files_of_so_many(tiny, small_files):
    write_run("newer", tiny)                            # pairs are of the bundled prior all the same
    out = works(sample, PAIRS + "--seed 5")
    assert "7 pairs of 1,024 bytes" in out and "next: python train.py --task reflow --data pairs\n" in out
    assert sorted(os.listdir("pairs")) == ["pairs-000000.safetensors", "pairs-000001.safetensors"]
    pairs = [read_pairs(f"pairs/pairs-00000{i}.safetensors") for i in (0, 1)]
    noise, latent = (torch.cat([file[name] for file in pairs]) for name in ("noise", "latent"))
    prompts = pairs[0]["prompts"] + pairs[1]["prompts"]
    assert noise.dtype == latent.dtype == torch.float16 and torch.equal(noise, noises(range(7), (4, 8, 8), 5).half())
    assert prompts == ["a red circle", "a blue star"] * 3 + ["a red circle"]
    assert pairs[0]["settings"]["ckpt"] == tiny.name and pairs[0]["settings"]["size"] == [32, 32]
    sd, flow = load_flow(tiny)
    with torch.no_grad():
        expected = flow.sample(noise.float(), sd.encode_text(prompts), 2, sd.encode_text([""] * 7), 3.0)
    assert torch.allclose(latent.float(), expected, rtol=2e-3, atol=2e-3)           # float16 keeps 11 bits


def test_interrupted_pairs_go_on_where_they_stopped_and_none_is_made_twice(small_files, monkeypatch):
    works(sample, PAIRS.replace("--out pairs", "--out whole"))
    plain, made = sample.draw_latents, []

    def spied(sd, flow, x0, context, steps, **options):
        if len(made) == 3:
            made.append(None)
            raise KeyboardInterrupt
        made.append(x0.float().sum().item())
        return plain(sd, flow, x0, context, steps, **options)
    monkeypatch.setattr(sample, "draw_latents", spied)
    assert call(sample, PAIRS).code == 130
    for _ in range(2):
        works(sample, PAIRS)
    assert len(made) == len(set(made)) == 5             # four batches, and the interrupt; then nothing is left to do
    for name in os.listdir("whole"):
        assert same(f"whole/{name}", f"pairs/{name}") and metadata(f"whole/{name}") == metadata(f"pairs/{name}")


def test_each_pair_is_written_twice_however_many_batches_make_a_file(monkeypatch):
    written, plain = [], sample.save_tensors

    def spied(path, tensors, metadata):
        plain(path, tensors, metadata)
        written.append((path.name, len(tensors["noise"])))
    monkeypatch.setattr(sample, "save_tensors", spied)
    works(sample, PAIRS + "--batch 1 --steps 1")
    assert written == [*((f"pairs-000000.from-{i:05d}.safetensors", 1) for i in range(7)),
                       ("pairs-000000.safetensors", 7)]
    assert os.listdir("pairs") == ["pairs-000000.safetensors"]


def test_a_process_killed_while_it_joins_batches_leaves_every_pair_once(small_files, monkeypatch):
    plain = Path.unlink

    def deadly(path, **options):
        if ".from-00002" in path.name and "partial" not in path.name:
            raise KeyboardInterrupt
        plain(path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", deadly)
        assert call(sample, PAIRS).code == 130
    assert {"pairs-000000.safetensors", "pairs-000000.from-00002.safetensors"} <= set(os.listdir("pairs"))
    assert len(Pairs("pairs", 1)) == 3
    works(sample, PAIRS)
    works(sample, PAIRS.replace("--out pairs", "--out whole"))
    assert sorted(os.listdir("pairs")) == sorted(os.listdir("whole")) and len(os.listdir("pairs")) == 2
    assert all(same(f"whole/{name}", f"pairs/{name}") for name in os.listdir("whole"))


def test_captions_of_scenes_are_made_for_the_pairs_of_this_process_alone(small_files, monkeypatch):
    made, plain = [], Scenes.scene
    monkeypatch.setattr(Scenes, "scene", lambda scenes, i: made.append(i) or plain(scenes, i))
    works(sample, FEW + "--pairs 1800000 --shards 2 3 --steps 1 --out pairs")
    assert made == [8, 9, 10, 11]
    prompts = read_pairs("pairs/pairs-000002.safetensors")["prompts"]
    assert prompts == [Scenes(12, 8, 8, "solid", 1)[i]["caption"] for i in range(8, 12)]


def test_processes_share_the_files_by_shards_and_more_pairs_can_be_asked_for_later(small_files):
    works(sample, PAIRS.replace("7", "6"))
    works(sample, PAIRS)
    for shard in "0 1", "1 2":
        works(sample, PAIRS.replace("--out pairs", "--out shared") + f"--shards {shard}")
    assert len(os.listdir("pairs")) == 2
    assert all(same(f"pairs/{name}", f"shared/{name}") for name in os.listdir("pairs"))


def test_pairs_of_other_settings_are_not_mixed(small_files):
    works(sample, PAIRS + "--steps 1")
    assert "other settings; choose another --out" in refusal(sample, PAIRS + "--steps 1 --cfg 2")


def test_pairs_of_another_model_or_prompts_are_not_mixed_though_the_names_are_the_same(tiny, small_files):
    base, told = Path("base.safetensors"), "pairs-000000.safetensors: its pairs were made with other settings"
    adapter, words = write_lora("lora.safetensors", tiny), PAIRS + "--ckpt base.safetensors --lora lora.safetensors "
    shutil.copy(tiny, base)
    works(sample, words)
    works(sample, words)
    for another in "--prompt 'a cat'", "--prompts prompts.txt":
        Path("prompts.txt").write_text("a tree\n")
        assert f"{told}; choose another --out (what differs: prompts_hash)" in refusal(sample, words + another)
    tensors, about = load_file(adapter), metadata(adapter)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, adapter, about)
    assert f"{told}; choose another --out (what differs: lora_hash)" in refusal(sample, words)
    save_file(tensors, adapter, about)
    sd = load_checkpoint(tiny)
    sd.unet.out[2].bias += 1
    sd.save(base)
    line = refusal(sample, words)
    assert told in line and "unet_hash" in line


# ------------------------------------------------------------------ what is refused

REFUSED = {
    "--ckpt {}/none.safetensors": "no such checkpoint file", "--lora {}/none.safetensors": "none.safetensors",
    "--lora {}/cut.safetensors": "cut.safetensors", "--lora {}/model.safetensors": "does not name",
    "--ckpt {0}/model.safetensors --lora {0}/model.safetensors": "not a LoRA",
    "--size 65": "65x65", "--size 64 64 64": "3 numbers", "--steps 0": "--steps 0", "--batch 0": "--batch 0",
    "--n 0": "--n 0", "--pairs 0": "--pairs 0", "--seed -1": "--seed -1", "--cfg nan": "--cfg nan",
    "--shards 0 1": "--shards 0 1", "--pairs 300 --shards 1 3": "--shards 1 3", "--pairs 2 --out {}/file": "file",
    "--prompts {}/none.txt": "none.txt", "--prompts {}/file": "no prompt", "--prompts {}/model.safetensors": "UTF-8",
    "--data {}/empty": "no readable image", "--out {}/empty": "--out", "--out grid.txt": "--out grid.txt",
    "--out {}/file/x.png": "file", "--singles --out {}/file.png": "file", "--device cuda:7": "no such device",
}


@pytest.mark.parametrize("capabilities, precision", [
    ({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"avx512_f": True, "amx_bf16": True}, "bf16")])
def test_a_cpu_takes_bf16_where_it_computes_it_unless_told_and_that_is_said(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    words = "--steps 1 --n 1 --size 32 --device cpu "
    assert f"{precision} on cpu" in works(sample, words)
    assert "fp32 on cpu" in works(sample, words + "--precision fp32")


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_sampled_is_one_line_and_leaves_nothing_behind(tiny, words, monkeypatch, tmp_path_factory):
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
                                     '{"task": "depth", "ckpt": [1]}', "a folder"])
def test_a_result_of_any_content_stops_no_sampling_and_is_named(tiny, content):
    write_run("older", tiny)
    path = write_run("newer", tiny).with_name("result.json")
    if content == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(content)
    done = call(sample, FEW + "--n 1 --steps 1")
    assert done.code == 0 and "runs/older/model.safetensors: " in done.out and "Traceback" not in done.err
    assert content in ("[]", "null", "{}") or "warning: runs/newer/result.json is not as train.py wrote it" in done.err


ODD_WORDS_OF_A_FILE = [  # what a LoRA's metadata says, and how a number on the command line gets around it
    ({"cfg": "much"}, "says cfg 'much'", "--cfg 2"), ({"cfg": "nan"}, "says cfg 'nan'", "--cfg 2"),
    ({"resolution": "64 by 64"}, "says resolution '64 by 64'", "--size 32"),
    ({"resolution": ""}, "says resolution ''", "--size 32"),
    ({"prediction": "x0"}, "prediction 'x0' is neither", "--prediction v"), ({"base": "../x"}, "", "--steps 1")]


@pytest.mark.parametrize("told, says, way_out", ODD_WORDS_OF_A_FILE)
def test_what_a_file_says_of_itself_is_refused_by_its_name_where_it_makes_no_sense(tiny, told, says, way_out):
    write_lora("odd.safetensors", tiny, base_hash=load_checkpoint(tiny).unet_hash, **told)
    words = f"--n 1 --steps 1 --device cpu --lora odd.safetensors --ckpt {tiny} "
    line = refusal(sample, words) if says else ""
    assert not says or f"odd.safetensors: {'its metadata ' if 'says' in says else ''}{says}" in line
    works(sample, words + way_out)


# ------------------------------------------------------------------ the bundled priors

both = pytest.mark.parametrize("prediction", ["v", "eps"])


@both
def test_a_bundled_prior_is_an_ordinary_checkpoint_of_at_most_10_megabytes(prediction):
    path = TOY / f"tiny-{prediction}.safetensors"
    sd = load_checkpoint(path)
    assert path.stat().st_size <= 10_000_000 and sd.config == TINY
    assert sd.prediction == prediction and sd.picture_size() == (64, 64)
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


def test_the_bundled_priors_share_their_autoencoder():
    v, eps = (load_file(TOY / f"tiny-{prediction}.safetensors") for prediction in ("v", "eps"))
    names = [name for name in v if name.startswith("first_stage_model.")]
    assert names and all(torch.equal(v[name], eps[name]) for name in names)
