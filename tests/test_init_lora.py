"""train.py --init-lora: a run that starts from the LoRA of another run, and trains its adapters or all weights."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from support.checkpoint import load_checkpoint, save_checkpoint
from support.load import load_flow
from support.lora_file import save_lora
from tests import runs
from tests.checkpoints import same as same_tensors
from tests.runs import FEW, SHORT, metadata, refusal, same, working_in, works
from tests.test_sample import write_lora
from tests.test_train import kill, settings

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
RUN = SHORT + "--preview-every 0 --ema 0.5 --seed 3 "


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """The LoRA of a run with the preset small. Read only."""
    folder = tmp_path_factory.mktemp("first")
    with working_in(folder, tiny):
        works(train, SHORT + "--lora small --preview-every 0 --ema 0.5 --out run")
    return folder / "run/lora.safetensors"


def result(path):
    return json.loads(Path(path).with_name("result.json").read_text())


def trainable(words):
    """-> StableDiffusion before the first step, and {name: parameter} to train."""
    args = settings(words)
    args.precision = args.precision or "fp32"
    sd, _, trained = train.load_trainable(args, torch.device("cpu"))
    return sd, trained


@torch.no_grad()
def output(sd):
    """The UNet's output for a fixed input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return sd.unet.eval()(x, torch.tensor([10.0, 700.0]), sd.encode_text(["a red circle", ""]))


def test_the_adapters_start_as_they_are_in_the_file_on_the_plain_base(tiny, first):
    for precision in "fp32", "bf16":
        sd, trained = trainable(f"{RUN} --init-lora {first} --precision {precision}")
        save_lora(sd.unet, "start.safetensors", {})
        assert same("start.safetensors", first) and {p.dtype for p in trained.values()} == {torch.float32}
        plain = load_checkpoint(tiny, dtype=torch.float32 if precision == "fp32" else torch.bfloat16).unet.state_dict()
        base = {name.replace(".base.", "."): value for name, value in sd.unet.state_dict().items()
                if not name.endswith((".up", ".down"))}
        assert same_tensors(base, plain)
    _, expected = trainable(RUN + "--lora small")
    assert {name: p.shape for name, p in trained.items()} == {name: p.shape for name, p in expected.items()}


def test_a_run_starts_where_the_run_of_its_lora_ended_and_writes_a_lora_of_the_same_layers_and_ranks(tiny, first):
    sd, _ = load_flow(tiny, first)
    merged, start = output(sd), output(trainable(f"{RUN} --init-lora {first}")[0])
    assert (start - merged).norm() < 1e-5 * merged.norm() < 1e-2 * (output(load_checkpoint(tiny)) - merged).norm()
    works(train, f"{RUN} --init-lora {first} --out second")
    second = Path("second/lora.safetensors")
    assert result(second)["velocity_error_before"] == pytest.approx(result(first)["velocity_error_after"], rel=1e-6)
    assert result(second)["velocity_error_after"] != result(second)["velocity_error_before"]
    shapes = [{name: tensor.shape for name, tensor in load_file(path).items()} for path in (first, second)]
    assert shapes[0] == shapes[1] and not same(first, second)
    assert metadata(second)["base_hash"] == metadata(first)["base_hash"] == load_checkpoint(tiny).unet_hash
    sd, _ = load_flow(tiny, second)                                 # on the plain base: both runs' training is in it
    assert (output(sd) - merged).norm() > 1e-4 * merged.norm()


def test_with_lora_none_all_weights_are_trained_from_the_merged_ones(tiny, first):
    words = f"{RUN} --init-lora {first} --lora none"
    sd, trained = trainable(words)
    merged, _ = load_flow(tiny, first)
    assert same_tensors(sd.unet.state_dict(), merged.unet.state_dict())
    assert trained.keys() == dict(sd.unet.named_parameters()).keys()
    works(train, words + " --out full")
    error = result("full/model.safetensors")["velocity_error_before"]
    assert error == pytest.approx(result(first)["velocity_error_after"], rel=1e-4)
    assert load_file("full/model.safetensors").keys() == load_file(tiny).keys()


@pytest.mark.parametrize("words", ["", "--lora none"])
def test_a_killed_run_from_a_lora_resumes_to_the_same_result_in_another_working_directory(first, words, monkeypatch):
    shutil.copy(first, "first.safetensors")
    words = f"{RUN} --init-lora first.safetensors {words} --save-every 2 --out "
    works(train, words + "whole")
    kill(words + "killed", 3)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    works(train, "--resume ../killed")
    assert same("../whole/state.safetensors", "../killed/state.safetensors")
    assert Path("../whole/result.json").read_text() == Path("../killed/result.json").read_text()


def test_a_lora_of_another_task_is_refused(tiny, first):
    write_lora("depth.safetensors", tiny, depth=True, task="depth")
    for words in "--init-lora depth.safetensors", f"--task depth --init-lora {first}":
        assert "it was trained for another task than --task" in refusal(train, f"{RUN} {words} --out run")
    assert not Path("run").exists()


def test_a_lora_for_depth_starts_a_run_for_depth(tiny):
    words = RUN + "--task depth --lora 2 --out first"
    works(train, words)
    works(train, RUN + "--task depth --init-lora first/lora.safetensors --out second")
    errors = result("first/lora.safetensors"), result("second/lora.safetensors")
    assert errors[1]["velocity_error_before"] == pytest.approx(errors[0]["velocity_error_after"], rel=1e-6)
    assert metadata("second/lora.safetensors")["task"] == "depth"


def test_a_depth_run_of_an_earlier_version_is_not_resumed_and_a_run_from_its_lora_is(tiny):
    works(train, RUN + "--task depth --lora 2 --out first")
    path = Path("first/state.safetensors")
    save_file(load_file(path), path, metadata(path) | {"version": "1"})
    assert "whose UNet took its inputs in another order" in refusal(train, "--resume first --steps 6")
    works(train, RUN + "--task depth --steps 1 --init-lora first/lora.safetensors --out second")


@pytest.mark.parametrize("words, message", [
    ("--init-lora {} --lora base", "--lora base: --init-lora has its own layers and ranks: leave --lora out"),
    ("--init-lora {} --lora 4", "--lora 4: --init-lora has its own layers and ranks"),
    ("--lora init", "--lora init: it is base, small, none, or a rank such as 16"),
    ("--init-lora none.safetensors", "none.safetensors: no such file"),
    ("--init-lora tiny.safetensors", "not a LoRA")])
def test_an_init_lora_that_cannot_work_is_refused(tiny, first, words, message):
    shutil.copy(tiny, "tiny.safetensors")
    assert message in refusal(train, f"{RUN} --out run {words.format(first)}") and not Path("run").exists()


def test_a_lora_of_a_base_with_another_prediction_is_refused_and_one_of_another_base_warns(tiny, first):
    sd = load_checkpoint(tiny)
    sd.unet.out[2].bias += 1
    save_checkpoint(sd, "other.safetensors")
    save_checkpoint(sd, "eps.safetensors", prediction="eps")
    words = f"{RUN} --steps 1 --init-lora {first} --out run --ckpt "
    line = refusal(train, words + "eps.safetensors")
    assert f"{first}: made with {tiny.name}, whose UNet predicts v; " in line and "eps.safetensors predicts eps" in line
    assert f"warning: {first} was made with {tiny.name} (UNet " in works(train, words + "other.safetensors")


def test_pairs_that_a_lora_made_warn_if_reflow_starts_without_it(tiny, first):
    works(sample, f"{FEW} --pairs 4 --lora {first} --ckpt {tiny} --prompt x --out pairs")
    words = f"{RUN.replace('--size 32', '')} --steps 1 --task reflow --data pairs"
    warning = f"warning: {Path.cwd()}/pairs: made with the LoRA {first}: pass it as --init-lora"
    assert warning in works(train, f"{words} --lora 2 --out one")
    assert "warning" not in works(train, f"{words} --init-lora {first} --out two")


def test_a_run_from_a_model_of_naive_flow_matching_warns_about_another_objective(tiny):
    warning = "was trained by fm, which fits no other --objective"
    write_lora("fm.safetensors", tiny, objective="fm")
    assert warning in works(train, RUN + "--steps 1 --init-lora fm.safetensors --out one")
    assert warning not in works(train, RUN + "--steps 1 --init-lora fm.safetensors --objective fm --out two")
