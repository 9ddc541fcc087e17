"""Reflow's pairs: what sample.py --pairs writes, how it resumes, and which model is trained on them."""
import json
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from data import noises
from diff2flow import Diff2Flow
from support import pairs
from support.checkpoint import averaged_name, load_checkpoint, save_checkpoint
from support.load import load_flow
from support.names import UNET
from support.pairs import Pairs, read_pairs
from tests import runs
from tests.runs import FEW, call, metadata, refusal, same, works
from tests.test_sample import write_lora, write_run
from tools import merge
from toy.scenes import Scenes

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
PAIRS = FEW + "--pairs 7 --batch 2 --cfg 3 --prompt 'a red circle' --prompt 'a blue star' --out pairs "
TRAIN = "--steps 1 --batch 2 --grad-accum 1 --validation 2 --previews 1 --device cpu --precision fp32 --out run "


@pytest.fixture
def small_files(monkeypatch):
    """A file has four pairs."""
    monkeypatch.setattr(pairs, "PAIRS_PER_FILE", 4)


def make_pairs(words="", folder="pairs", n=4):
    """Make pairs of one step without guidance -> stdout. So u(x0, 0) = x1 - x0 for the model that made them."""
    return works(sample, f"{FEW} --pairs {n} --steps 1 --cfg 1 --prompt x --out {folder} {words}")


def start_processes(monkeypatch, rank, count):
    """sample.py runs as process `rank` of `count`, without torchrun."""
    monkeypatch.setattr(sample, "Ranks", lambda device: SimpleNamespace(
        rank=rank, count=count, is_main=rank == 0, wait=lambda: None))


# ------------------------------------------------------------------ making

def test_a_pair_is_noise_and_the_latents_that_the_bundled_prior_samples_from_it(tiny, small_files):
    write_run("newer", tiny)                            # not the newest run: pairs are made before Reflow
    out = works(sample, PAIRS + "--seed 5")
    assert "7 pairs of 1,024 bytes" in out and "next: python train.py --task reflow --data pairs\n" in out
    assert sorted(os.listdir("pairs")) == ["pairs-000000.safetensors", "pairs-000001.safetensors"]
    files = [read_pairs(f"pairs/pairs-00000{i}.safetensors") for i in (0, 1)]
    noise, latent = (torch.cat([file[name] for file in files]) for name in ("noise", "latent"))
    prompts = files[0]["prompts"] + files[1]["prompts"]
    assert noise.dtype == latent.dtype == torch.float16 and torch.equal(noise, noises(range(7), (4, 8, 8), 5).half())
    assert prompts == ["a red circle", "a blue star"] * 3 + ["a red circle"]
    assert files[0]["settings"]["ckpt"] == tiny.name and files[0]["settings"]["size"] == [32, 32]
    sd, flow = load_flow(tiny)
    with torch.no_grad():
        expected = flow.sample(noise.float(), sd.encode_text(prompts), 2, sd.encode_text([""] * 7), 3.0)
    assert torch.allclose(latent.float(), expected, rtol=2e-3, atol=2e-3)           # float16 has 11 bits


def test_pairs_of_different_seeds_have_different_noise():
    """Also where seed * 1,000,003 + i would be equal."""
    make_pairs("--seed 0", "zero")
    make_pairs("--seed 1", "one")
    noise = torch.cat([read_pairs(f"{folder}/pairs-000000.safetensors")["noise"] for folder in ("zero", "one")])
    assert len(noise.flatten(1).unique(dim=0)) == 8
    for seed in 0, 1, 2**32 - 2:
        assert not torch.equal(noises([1_000_003 + 5], (4, 8, 8), seed), noises([5], (4, 8, 8), seed + 1))
        assert not torch.equal(noises([2**32 - 1], (4, 8, 8), seed), noises([0], (4, 8, 8), seed + 1))


def test_interrupted_pairs_resume_after_the_last_batch_and_none_is_made_twice(small_files, monkeypatch):
    works(sample, PAIRS.replace("--out pairs", "--out whole"))
    plain, made = Diff2Flow.sample, []

    def spied(flow, x0, *args, **options):
        if len(made) == 3:
            made.append(None)
            raise KeyboardInterrupt
        made.append(x0.float().sum().item())
        return plain(flow, x0, *args, **options)
    monkeypatch.setattr(Diff2Flow, "sample", spied)
    assert call(sample, PAIRS).code == 130
    for _ in range(2):
        works(sample, PAIRS)
    assert len(made) == len(set(made)) == 5             # four batches and the interrupt; then nothing is left to do
    for name in os.listdir("whole"):
        assert same(f"whole/{name}", f"pairs/{name}") and metadata(f"whole/{name}") == metadata(f"pairs/{name}")


def test_each_pair_is_written_twice_for_any_number_of_batches_per_file(monkeypatch):
    written, plain = [], pairs.save_tensors

    def spied(path, tensors, metadata):
        plain(path, tensors, metadata)
        written.append((path.name, len(tensors["noise"])))
    monkeypatch.setattr(pairs, "save_tensors", spied)
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


def test_a_process_makes_captions_of_scenes_for_its_own_pairs_alone(small_files, monkeypatch):
    made, plain = [], Scenes.scene
    monkeypatch.setattr(Scenes, "scene", lambda scenes, i: made.append(i) or plain(scenes, i))
    start_processes(monkeypatch, 2, 450_000)
    works(sample, FEW + "--pairs 1800000 --steps 1 --out pairs")
    assert os.listdir("pairs") == ["pairs-000002.safetensors"] and made == [8, 9, 10, 11]
    prompts = read_pairs("pairs/pairs-000002.safetensors")["prompts"]
    assert prompts == [Scenes(12, 8, 8, "solid", 1)[i]["caption"] for i in range(8, 12)]


def test_processes_of_torchrun_share_the_files_and_more_pairs_can_be_made_later(small_files, monkeypatch):
    works(sample, PAIRS.replace("7", "6"))
    works(sample, PAIRS)
    for rank in 0, 1:
        start_processes(monkeypatch, rank, 2)
        works(sample, PAIRS.replace("--out pairs", "--out shared"))
        assert len(os.listdir("shared")) == rank + 1
    assert sorted(os.listdir("pairs")) == sorted(os.listdir("shared"))
    assert all(same(f"pairs/{name}", f"shared/{name}") for name in os.listdir("pairs"))


def test_pairs_of_other_settings_are_not_mixed(small_files):
    works(sample, PAIRS + "--steps 1")
    for words, difference in ("--cfg 2", "cfg"), ("--zero-snr", "zero_snr"), ("--seed 1", "seed"):
        assert f"other settings; choose another --out (different: {difference})" in refusal(
            sample, f"{PAIRS} --steps 1 {words}")


def test_pairs_of_another_model_or_other_prompts_are_not_mixed_even_under_the_same_names(tiny, small_files):
    base, error = Path("base.safetensors"), "pairs-000000.safetensors: its pairs were made with other settings"
    adapter, words = write_lora("lora.safetensors", tiny), PAIRS + "--ckpt base.safetensors --lora lora.safetensors "
    shutil.copy(tiny, base)
    works(sample, words)
    works(sample, words)
    for another in "--prompt 'a cat'", "--prompts prompts.txt":
        Path("prompts.txt").write_text("a tree\n")
        assert f"{error}; choose another --out (different: prompts_hash)" in refusal(sample, words + another)
    tensors, about = load_file(adapter), metadata(adapter)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, adapter, about)
    assert f"{error}; choose another --out (different: lora_hash)" in refusal(sample, words)
    save_file(tensors, adapter, about)
    sd = load_checkpoint(tiny)
    sd.unet.out[2].bias += 1
    save_checkpoint(sd, base)
    line = refusal(sample, words)
    assert error in line and "unet_hash" in line


def change_pairs(about=None, prompts=None, shape=None):
    """Change the settings, the prompts or the shape of the tensors in pairs/pairs-000000.safetensors."""
    path = Path("pairs/pairs-000000.safetensors")
    tensors, written = load_file(path), metadata(path)
    written["about"] = json.dumps({**json.loads(written["about"]), **(about or {})})
    if prompts is not None:
        written["prompts"] = json.dumps(prompts)
    if shape is not None:
        tensors = {name: torch.zeros(shape).half() for name in tensors}
    save_file(tensors, path, written)


@pytest.mark.parametrize("change", [
    {"about": {"ckpt": [1]}}, {"about": {"unet_hash": [1]}}, {"about": {"prediction": [1]}}, {"about": {"cfg": "x"}},
    {"about": {"cfg": 10**400}}, {"about": {"cfg": float("nan")}}, {"about": {"size": [32.5, 32]}},
    {"about": {"size": [True, 32]}}, {"about": {"size": [10**30, 32]}}, {"about": {"size": [-32, 32]}},
    {"about": {"size": [33, 32]}}, {"about": {"size": [32]}}, {"about": {"size": [64, 32]}},
    {"prompts": {str(i): "x" for i in range(4)}}, {"prompts": "abcd"}, {"prompts": ["x", "y", "z", 1]},
    {"shape": (4, 3, 8, 8)}, {"shape": (4, 4, 0, 0)}, {"shape": (4, 4, 7, 7)}, {"shape": (0, 4, 8, 8), "prompts": []}],
    ids=str)
def test_pairs_that_sample_py_did_not_make_so_are_refused_by_name(tiny, change):
    make_pairs()
    change_pairs(**change)
    line = refusal(train, TRAIN + "--task reflow --data pairs")
    assert "pairs-000000.safetensors" in line and not Path("run").exists()
    assert "pairs-000000" in refusal(sample, f"{FEW} --pairs 4 --steps 1 --cfg 1 --prompt x --out pairs")


# ------------------------------------------------------------------ training the model that made them

@pytest.fixture
def checkpoints(tiny):
    """v.safetensors, and another UNet in eps.safetensors and other-v.safetensors."""
    shutil.copy(tiny, "v.safetensors")
    sd = load_checkpoint(tiny)
    sd.unet.out[2].bias += 1
    save_checkpoint(sd, "other-v.safetensors")
    sd.prediction = "eps"
    save_checkpoint(sd, "eps.safetensors")


def test_pairs_of_a_network_with_another_prediction_are_refused(checkpoints):
    make_pairs("--ckpt eps.safetensors")
    words = TRAIN + "--task reflow --data pairs "
    line = refusal(train, words + "--ckpt v.safetensors")
    assert "pairs: made with eps.safetensors, whose UNet predicts eps; " in line
    assert line.endswith("v.safetensors predicts v: pass the right --ckpt (or --prediction, if that is wrong)")
    assert not Path("run").exists()
    assert "warning" not in works(train, words + "--ckpt eps.safetensors --lora 2")


def test_pairs_sampled_by_another_prediction_of_the_same_unet_are_refused(checkpoints):
    make_pairs("--ckpt other-v.safetensors --prediction eps")
    words = TRAIN + "--task reflow --data pairs --ckpt other-v.safetensors --lora 2 "
    assert "whose UNet predicts eps; " in refusal(train, words)
    works(train, words + "--prediction eps")


def test_pairs_of_another_unet_are_warned_about(checkpoints):
    make_pairs("--ckpt v.safetensors")
    v, other = (load_checkpoint(f"{name}.safetensors").unet_hash for name in ("v", "other-v"))
    words = TRAIN + "--task reflow --data pairs --lora 2 "
    out = works(train, words + "--ckpt other-v.safetensors")
    assert f"pairs was made with v.safetensors (UNet {v[:10]}); " in out and f"has another UNet ({other[:10]})" in out
    assert "warning" not in works(train, words.replace("--out run", "--out again") + "--ckpt v.safetensors")


def test_pairs_of_another_checkpoint_than_the_bundled_prior_are_refused_without_ckpt(checkpoints):
    make_pairs("--ckpt other-v.safetensors")
    for change in {}, {"shape": (4, 4, 4, 4)}:                     # also if its autoencoder is another one
        change_pairs(**change)
        line = refusal(train, TRAIN + "--task reflow --data pairs")
        assert line.endswith("pairs: its pairs were made with other-v.safetensors: pass it as --ckpt")
        assert not Path("run").exists()


@pytest.fixture
def trained_model(monkeypatch):
    """Makes train.train a function that notes the model instead of training it -> namespace with sd and flow."""
    noted = SimpleNamespace()

    def note(args, run, sd, flow, trained, *_):
        noted.sd, noted.flow = sd, flow
        return train.EMA(trained)
    monkeypatch.setattr(train, "train", note)
    return noted


def check_that_model_made(noted, folder):
    """The model has u(x0, 0) = x1 - x0 for pairs of one step."""
    made = read_pairs(f"{folder}/pairs-000000.safetensors")
    x0, x1 = made["noise"].float(), made["latent"].float()
    with torch.no_grad():
        u = noted.flow(x0, torch.zeros(len(x0)), noted.sd.encode_text(made["prompts"]))
    assert torch.allclose(x0 + u, x1, rtol=2e-3, atol=2e-3)             # float16 has 11 bits


def test_the_printed_command_trains_the_model_that_made_the_pairs(tiny, trained_model):
    """With a LoRA, EMA weights, another prediction than in the file, and zero terminal SNR."""
    write_lora("my lora.safetensors", tiny)
    tensors = load_file(tiny)
    tensors |= {averaged_name(name): tensor * 1.1 for name, tensor in tensors.items() if name.startswith(UNET)}
    save_file(tensors, "ema.safetensors", {"prediction": "eps"})
    command = make_pairs("--ckpt ema.safetensors --lora 'my lora.safetensors' --use-ema --prediction v --zero-snr",
                         "'my pairs'").splitlines()[-1].removeprefix("next: ")
    assert command == ("python train.py --task reflow --data 'my pairs' --ckpt ema.safetensors --init-lora "
                       "'my lora.safetensors' --prediction v --use-ema --zero-snr")
    _, script, *words = shlex.split(command)
    out = works(train, f"{shlex.join(words)} {TRAIN}")
    assert script == "train.py" and "warning" not in out
    assert trained_model.flow.f_table[-1] == 0 and trained_model.flow.prediction == "v"
    check_that_model_made(trained_model, "my pairs")


def test_the_printed_commands_merge_several_loras_and_train_the_model_that_made_the_pairs(tiny, trained_model):
    for name in "a b", "c":
        write_lora(f"{name}.safetensors", tiny)
    tensors = load_file(tiny)
    tensors |= {averaged_name(name): tensor * 1.1 for name, tensor in tensors.items() if name.startswith(UNET)}
    save_file(tensors, "ema.safetensors", {"prediction": "eps"})
    options = "--prediction v --use-ema --zero-snr"
    command = make_pairs(f"--ckpt ema.safetensors --lora 'a b.safetensors:0.5' --lora c.safetensors {options}")
    command = command.splitlines()[-1].removeprefix("next: ")
    assert command == ("python -m tools.merge 'a b.safetensors:0.5' c.safetensors --ckpt ema.safetensors --out "
                       f"merged.safetensors {options} && "
                       "python train.py --task reflow --data pairs --ckpt merged.safetensors")
    merging, training = command.split(" && ")
    works(merge, merging.removeprefix("python -m tools.merge ") + " --dtype fp32")
    out = works(train, f"{training.removeprefix('python train.py ')} {TRAIN} --lora 2")
    assert "--init-lora" not in out and trained_model.flow.prediction == "v" and trained_model.flow.f_table[-1] == 0
    check_that_model_made(trained_model, "pairs")


def test_the_printed_command_names_the_base_that_was_found_for_a_lora(tiny, trained_model):
    shutil.copy(tiny, "base.safetensors")
    write_lora("lora.safetensors", tiny, prediction="eps", base_hash=load_checkpoint(tiny).unet_hash)
    adapter = write_run("first", "lora.safetensors", ckpt="base.safetensors")
    command = make_pairs(f"--lora {adapter}").splitlines()[-1].removeprefix("next: python train.py ")
    assert command == f"--task reflow --data pairs --ckpt base.safetensors --init-lora {adapter}"
    assert "warning" not in works(train, f"{command} {TRAIN}")
    assert trained_model.flow.prediction == "eps"
    check_that_model_made(trained_model, "pairs")


def test_the_printed_command_runs_for_the_bundled_prior(tiny):
    command = make_pairs().splitlines()[-1].removeprefix("next: python train.py ")
    assert command == "--task reflow --data pairs"
    out = works(train, f"{command} {TRAIN} --lora 2")
    assert "warning" not in out and Path("run/lora.safetensors").exists()
