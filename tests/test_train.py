"""train.py: the files of a run, killed and resumed runs, its steps, validation, the recipes, and refused settings."""
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import depth
import sample
import train
from diff2flow import Diff2Flow
from model import StableDiffusion
from support import run
from support.checkpoint import load_checkpoint, modelspec, save_checkpoint
from support.files import replacing
from support.load import load_flow
from support.pairs import read_pairs
from support.pictures import to_pil
from support.prompts import CaptionWatch
from support.validation import VALIDATION_SEED, Validation, warn_if_slow
from tests import runs
from tests.runs import (
    FEW,
    SHORT,
    call,
    metadata,
    refusal,
    rows_of,
    same,
    save_photo,
    save_photos,
    trained_captions,
    working_in,
    works,
)
from toy.scenes import Scenes

ROOT = Path(train.__file__).parent
tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
RESUMABLE = SHORT + "--grad-accum 2 --save-every 2 --ema 0.9 --caption-dropout 0.5 "
WHOLE = RESUMABLE + "--preview-every 3 --keep --out "


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """-> the folder of a run of WHOLE that was not interrupted, and its stdout. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    with working_in(folder, tiny):
        out = works(train, WHOLE + "run")
    return folder / "run", out


class Killed(BaseException):
    pass


def kill(words, step, error=Killed):
    """Train until an error at the beginning of step `step`."""
    plain = train.learning_rate

    def killing(s, args):
        if s == step:
            raise error
        return plain(s, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", killing)
        if error is not Killed:
            return call(train, words)
        with pytest.raises(Killed):
            call(train, words)


def settings(words):
    """-> train.py's arguments for a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *shlex.split(words)])
        return train.arguments()


def loss_calls(words):
    """Train -> for each training batch, the loss's arguments, a random number drawn there, and the context's dtype."""
    plain, calls = Diff2Flow.loss, []

    def spied(self, x1, context, x0=None, t_fm=None, mask=None):
        with torch.random.fork_rng():
            drawn = torch.rand(()).item()
        calls.append(SimpleNamespace(x1=x1, context=context, x0=x0, t_fm=t_fm, mask=mask, drawn=drawn,
                                     dtype=context.dtype))
        return plain(self, x1, context, x0, t_fm, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diff2Flow, "loss", spied)
        works(train, words)
    return calls


def encoded(words):
    """Train -> the pictures that training batches encode, and all prompts of the run."""
    images, prompts, plain, plain_text = [], set(), StableDiffusion.encode, StableDiffusion.encode_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "encode", lambda sd, x: images.extend(x) or plain(sd, x))
        patch.setattr(StableDiffusion, "encode_text", lambda sd, words: prompts.update(words) or plain_text(sd, words))
        works(train, words)
    return images[2:], prompts                          # the first two are validation pictures


def make_pairs():
    """Make pairs/, seven pairs in files of four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.pairs.PAIRS_PER_FILE", 4)
        works(sample, FEW + "--pairs 7 --batch 4 --steps 1 --cfg 3 --out pairs")


def save_depth_photos(folder):
    """Write three pictures with depth. Their left part, a few pixels more than two latents, has none."""
    for i in range(3):
        save_photo(f"{folder}/{i}.png", 32, 48, seed=i)
        values = np.random.default_rng(i).uniform(1, 9, (32, 48))
        values[:, :9] = [np.nan, np.inf, 0][i]
        np.save(f"{folder}/{i}.npy", values)


# ------------------------------------------------------------------ the files of a run

def test_training_without_flags_writes_the_files_of_a_run_and_prints_the_next_command():
    out = works(train, "--steps 10 --batch 2 --validation 2 --previews 2 --scenes 8 --size 32")
    folder, = Path("runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "lora.safetensors", "state.safetensors", "metrics.jsonl", "validation.jsonl", "metrics.png", "before_after.png",
        "result.json"}
    row, = rows_of(folder / "metrics.jsonl")
    assert list(row) == ["step", "loss", "grad", "lr", "img_s", "waiting", "mem_gb", "software"] and row["step"] == 10
    assert row.pop("software") == "Diff2Flow" and all(math.isfinite(value) for value in row.values())
    result = json.loads((folder / "result.json").read_text())
    assert f"{result['velocity_error_before']:.4f} before, {result['velocity_error_after']:.4f} after" in out
    assert f"{folder}/before_after.png" in out and f"weights: {folder}/lora.safetensors" in out
    assert out.endswith(f"next: python sample.py --lora {folder}/lora.safetensors\n")


def test_in_processes_of_their_own_training_and_its_next_command_work(tiny):
    def command(words):
        done = subprocess.run([sys.executable, *shlex.split(words)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout
    out = command(f"{ROOT}/train.py --ckpt {tiny} --out 'my run' --lora none {SHORT} --grad-accum 1 --steps 2")
    out = command(out.split("next: python ")[1].replace("sample.py", f"{ROOT}/sample.py", 1))
    assert Path("samples.png").exists() and "my run/model.safetensors" in out


def test_previews_velocity_errors_and_saves_are_written_at_their_intervals(whole):
    folder, out = whole                                 # 4 steps, a preview every 3, a save every 2
    assert {path.name for path in folder.glob("step_*")} == {"step_000003.png"}
    assert metadata(folder / "state.safetensors")["step"] == "4" and f"{folder.name}/step_000003.png" in out
    assert [row["step"] for row in rows_of(folder / "metrics.jsonl")] == [2, 4]
    rows, result = rows_of(folder / "validation.jsonl"), json.loads((folder / "result.json").read_text())
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert [rows[0]["velocity_error"], rows[2]["velocity_error"]] == [
        result["velocity_error_before"], result["velocity_error_after"]]


def test_keep_writes_the_weights_of_each_save_to_a_file_named_by_step(whole):
    kept = {path.name for path in whole[0].glob("lora*")}
    assert kept == {"lora.safetensors", *(f"lora-{step:06d}.safetensors" for step in (2, 4))}
    assert same(whole[0] / "lora.safetensors", whole[0] / "lora-000004.safetensors")
    assert not same(whole[0] / "lora.safetensors", whole[0] / "lora-000002.safetensors")


def test_all_weights_are_saved_as_the_ema_in_a_checkpoint_where_only_the_unet_changed(tiny):
    works(train, SHORT + "--lora none --objective fm --ema 0.9 --out run")
    before, after, state = (load_file(path) for path in (tiny, "run/model.safetensors", "run/state.safetensors"))
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.diffusion_model.") for name in changed)
    name = "input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(after["model.diffusion_model." + name], state["average/" + name].half())
    assert not torch.equal(state["average/" + name].half(), state["parameter/" + name].half())
    assert load_checkpoint("run/model.safetensors").metadata["objective"] == "fm"


def test_a_loras_metadata_says_how_it_was_trained(whole, tiny):
    stored, base = metadata(whole[0] / "lora.safetensors"), load_checkpoint(tiny)
    spec = modelspec(base, whole[0].name, [32, 32], "/lora") | {"modelspec.date": stored["modelspec.date"]}
    assert stored == spec | {
        "format": "pt", "objective": "diff2flow", "style": "outline", "prediction": "v", "preset": "small",
        "task": "text-to-image", "schedule": "scaled_linear", "base": tiny.name, "base_hash": base.unet_hash,
        "resolution": "32 32", "cfg": "2.0", "ss_base_model_version": "sd_v2_v", "ss_v2": "True",
        "ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", "software": "Diff2Flow"}


def test_zero_snr_is_in_the_metadata_and_sampling_uses_it(tiny):
    works(train, SHORT + "--steps 1 --zero-snr --lora 2 --preview-every 0 --out adapted")
    works(train, SHORT + "--steps 1 --zero-snr --lora none --preview-every 0 --out full")
    assert metadata("adapted/lora.safetensors")["zero_snr"] == metadata("full/model.safetensors")["zero_snr"] == "true"
    for files in (tiny, "adapted/lora.safetensors"), ("full/model.safetensors", None):
        assert load_flow(*files)[1].f_table[-1] == 0
    assert load_flow(tiny)[1].f_table[-1] > 0.06 and load_flow(tiny, zero_snr=True)[1].f_table[-1] == 0
    assert "eps determines no x1 where alpha is 0" in refusal(train, SHORT + "--zero-snr --prediction eps")


def test_a_trained_checkpoint_has_the_metadata_of_modelspec_and_none_of_a_lora(tiny):
    works(train, SHORT + "--steps 1 --lora none --preview-every 0 --out full")
    stored = metadata("full/model.safetensors")
    assert stored["modelspec.architecture"] == "stable-diffusion-v2-768-v" and stored["modelspec.title"] == "full"
    assert stored["base_hash"] == load_checkpoint(tiny).unet_hash and not any(name.startswith("ss_") for name in stored)


def test_a_new_run_in_the_folder_of_an_old_one_is_refused(whole):
    assert f"--resume {whole[0]}" in refusal(train, f"{SHORT} --out {whole[0]}")


# ------------------------------------------------------------------ killed and resumed

def test_a_killed_and_resumed_run_writes_the_same_files_as_one_that_was_not_killed(whole):
    kill(WHOLE + "run", 3)
    assert metadata("run/state.safetensors")["step"] == "2"
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 3}\n')                     # as longer runs do between two saves
    works(train, "--resume run")
    for path in whole[0].iterdir():
        if path.suffix == ".safetensors":
            assert same(path, f"run/{path.name}"), path.name
        elif path.name == "metrics.jsonl":
            here, there = ([{**row, "img_s": 0, "waiting": 0} for row in rows_of(folder / path.name)]
                           for folder in (whole[0], Path("run")))
            assert here == there
        else:
            assert path.read_bytes() == Path("run", path.name).read_bytes(), path.name


@pytest.mark.parametrize("words", ["--lora none --data photos", "--task reflow --data pairs",
                                   "--task depth --caption-dropout 0"])
def test_every_kind_of_run_resumes_to_the_same_weights_bit_for_bit(words):
    save_photos("photos")
    words = RESUMABLE + words + " --out "
    if "reflow" in words:
        make_pairs()
        words = words.replace("--size 32", "")
    works(train, words + "whole")
    kill(words + "killed", 3)
    works(train, "--resume killed")
    name = "lora.safetensors" if "reflow" in words else "model.safetensors"
    assert same("whole/state.safetensors", "killed/state.safetensors") and same(f"whole/{name}", f"killed/{name}")
    assert Path("whole/result.json").read_text() == Path("killed/result.json").read_text()


def test_a_run_killed_while_it_saves_its_last_weights_writes_them_when_it_resumes(whole, monkeypatch):
    plain = train.save_weights

    def killing(args, out, sd, metadata, step):
        if step == 4:
            raise Killed
        plain(args, out, sd, metadata, step)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_weights", killing)
        call(train, WHOLE + "run")
    works(train, "--resume run")
    assert same(whole[0] / "lora.safetensors", "run/lora.safetensors")


def test_resuming_a_finished_run_changes_nothing(whole):
    shutil.copytree(whole[0], "run")
    works(train, "--resume run")
    assert all(path.read_bytes() == Path("run", path.name).read_bytes() for path in whole[0].iterdir())


def test_the_state_of_another_model_is_refused(whole):
    shutil.copytree(whole[0], "run")
    state, stored = load_file("run/state.safetensors"), metadata("run/state.safetensors")
    del state[next(name for name in state if name.startswith("parameter/"))]
    save_file(state, "run/state.safetensors", stored)
    assert "the state of another model" in refusal(train, "--resume run")


def test_an_interrupted_run_prints_the_command_that_resumes_it():
    result = kill(SHORT + "--save-every 1 --out 'my run'", 3, KeyboardInterrupt)
    assert result.code == 130 and result.err.splitlines()[-1] == "interrupted" and "Traceback" not in result.err
    python, script, *words = shlex.split(result.out.split("resume from the last save with: ")[1])
    assert (python, script) == ("python", "train.py")
    works(train, shlex.join(words))
    assert metadata("my run/state.safetensors")["step"] == "4"


# ------------------------------------------------------------------ a step

def test_the_learning_rate_warms_up_and_then_stays_or_falls_by_half_a_cosine_to_a_hundredth():
    args = Namespace(lr=2.0, warmup=4, steps=24, decay="cosine")
    rates = {step: train.learning_rate(step, args) for step in (0, 3, 4, 14, 24)}
    assert rates == pytest.approx({0: 0.5, 3: 2.0, 4: 2.0, 14: 1.01, 24: 0.02})
    args.decay = "constant"
    assert [train.learning_rate(step, args) for step in (0, 4, 24)] == [0.5, 2.0, 2.0]


def test_a_step_is_adams_with_the_clipped_gradient_and_the_learning_rate_of_that_step():
    works(train, SHORT + "--steps 1 --warmup 4 --clip 0.01 --lora 2 --out run")
    state = load_file("run/state.safetensors")
    gradient = torch.cat([state[name].flatten() / 0.1 for name in state if name.startswith("adam/exp_avg/")])
    assert gradient.norm().item() == pytest.approx(0.01, rel=1e-4)
    assert rows_of("run/metrics.jsonl")[0]["grad"] > 0.1
    change = max(state[name].abs().max().item() for name in state                   # up is 0 before the first step
                 if re.fullmatch(r"parameter/middle_block.*\.up", name))
    assert change == pytest.approx(1e-3 / 4, rel=1e-2)


def test_two_accumulated_half_batches_are_one_batch(monkeypatch):
    plain = Diff2Flow.loss
    monkeypatch.setattr(Diff2Flow, "loss", lambda self, x1, context, x0=None, t_fm=None, mask=None: plain(
        self, x1, context, -x1.roll(1, -1), torch.full((len(x1),), 0.5)))
    for name, split in ("one", "--batch 4"), ("two", "--batch 2 --grad-accum 2"):
        works(train, f"{SHORT} --steps 1 --lora 2 --clip 1e6 --caption-dropout 0 {split} --out {name}")
    one, two = load_file("one/state.safetensors"), load_file("two/state.safetensors")
    names = [name for name in one if name.startswith("adam/exp_avg/")]
    assert names and all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-6) for name in names)
    assert rows_of("one/metrics.jsonl")[0]["loss"] == pytest.approx(rows_of("two/metrics.jsonl")[0]["loss"], rel=1e-4)


def test_the_ema_uses_a_smaller_decay_in_the_first_steps():
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = train.EMA({"weight": weight})
    weight.data += 1
    averages = []
    for step, decay in (0, 0.999), (8, 0.999), (10**6, 0.99), (0, 0.0):             # decays 0.1, 0.5, 0.99, 0
        ema.update(step, decay)
        averages.append(ema.average["weight"][0].item())
        weight.data += 1
    assert averages == pytest.approx([0.9, 0.5 * 0.9 + 0.5 * 2, 0.99 * 1.45 + 0.01 * 3, 4])


def test_the_parameters_hold_the_ema_inside_with_and_are_restored_after_an_error():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = train.EMA({"weight": weight})
    weight.data += 1
    with pytest.raises(Killed), ema.in_place():
        assert weight.item() == 0 and ema.average["weight"].item() == 1
        raise Killed
    assert weight.item() == 1 and ema.average["weight"].item() == 0


def test_the_given_share_of_captions_becomes_empty():
    torch.manual_seed(0)
    captions = [f"caption {i}" for i in range(4000)]
    dropped = train.drop_captions(captions, 0.1)
    assert all(new in ("", old) for new, old in zip(dropped, captions)) and 320 < dropped.count("") < 480
    assert train.drop_captions(captions, 0.0) == captions and set(train.drop_captions(captions, 1.0)) == {""}


def test_the_loss_gets_the_given_captions_and_precision_and_other_random_numbers_in_each_batch(tiny):
    words = SHORT + "--steps 2 --lora 2 --validation 1 --previews 1 --grad-accum 2 "
    calls = loss_calls(words + "--caption-dropout 1 --precision bf16 --out run")
    empty = load_checkpoint(tiny).encode_text(["", ""])
    assert len(calls) == 4 and all(torch.allclose(call.context.float(), empty, atol=0.1) for call in calls)
    assert len({call.drawn for call in calls}) == 4 and all(call.t_fm is None for call in calls)
    assert all(call.dtype == torch.bfloat16 for call in calls)
    assert all(math.isfinite(row["loss"]) for row in rows_of("run/metrics.jsonl"))
    call = loss_calls(words + "--caption-dropout 0 --out other")[0]
    assert call.dtype == torch.float32 and not torch.allclose(call.context, empty, atol=0.5)


def test_each_scene_is_encoded_once():
    images, _ = encoded(SHORT + "--steps 6 --batch 3 --lora 2 --out run")
    scenes = [Scenes(8, 32, 32, "outline", 0)[i]["image"] for i in range(8)]
    assert len(images) == 8 and all(any(torch.equal(image, scene) for image in images) for scene in scenes)


def test_scenes_are_encoded_in_the_precision_of_the_run(tiny):
    words = SHORT + "--steps 1 --lora none --precision bf16 --out run"
    latents = torch.cat([call.x1 for call in loss_calls(words)])
    sd = load_checkpoint(tiny)
    scenes = torch.stack([Scenes(8, 32, 32, "outline", 0)[i]["image"] for i in range(8)])
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([sd.encode(scene[None]).float() for scene in scenes])
    assert all(any(torch.equal(x1, scene) for scene in expected) for x1 in latents)


def test_photographs_are_encoded_again_with_new_crops_and_trained_with_their_captions():
    save_photos("photos")
    images, prompts = encoded(SHORT + "--steps 6 --size 32 48 --caption-dropout 0 --lora 2 --data photos --out run")
    assert len(images) == 12 and images[0].shape == (3, 32, 48)
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    assert prompts >= {"a red boat", "a tall tree", "a roof"}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_last_save(monkeypatch):
    plain, calls = Diff2Flow.loss, count(1)
    monkeypatch.setattr(Diff2Flow, "loss",
                        lambda *args, **mask: plain(*args, **mask) * (math.nan if next(calls) == 3 else 1))
    line = refusal(train, SHORT + "--save-every 2 --lora 2 --out run")
    assert re.search(r"the loss is nan and the gradient's norm nan at step 3 \(network timesteps "
                     r"[\d.]+ to [\d.]+, learning rate 0\.\d+\): stopped, and the step is not saved", line)
    assert metadata("run/state.safetensors")["step"] == "2"
    assert all(tensor.isfinite().all() for tensor in load_file("run/lora.safetensors").values())
    way_out = line.split("resume from the last save: python train.py ")[1]
    assert way_out == "--resume run --lr 0.0003" and "--lr 0.0003 instead of 0.001" in works(train, way_out)
    assert metadata("run/state.safetensors")["step"] == "4"


def test_with_bf16_the_frozen_base_of_a_lora_is_bf16_and_what_is_trained_is_float32():
    args = settings(SHORT + "--checkpointing --precision bf16 --lora 2")
    sd, _, trained = train.load_trainable(args, torch.device("cpu"))
    assert sd.unet.checkpointing and sd.unet.out[2].base.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    args = settings(SHORT + "--precision bf16 --lora none")
    sd, _, trained = train.load_trainable(args, torch.device("cpu"))
    assert not sd.unet.checkpointing and {parameter.dtype for parameter in trained.values()} == {torch.float32}
    x1, context = sd.encode(torch.zeros(1, 3, 32, 32)), sd.encode_text(["x"])
    output = sd.unet(x1, torch.tensor([5.0]), context)
    assert {x1.dtype, output.dtype, sd.decode(x1).dtype} == {torch.bfloat16}        # they compute in it


# ------------------------------------------------------------------ validation

def open_validation(words):
    """-> arguments, sd, flow, held-out items, [height, width], Validation."""
    args = settings(words)
    sd, flow, _ = train.load_trainable(args, torch.device("cpu"))
    _, items, size, _, source = train.open_data(args, sd)
    latents = [train.encode_item(sd, item) for item in items]
    return args, sd, flow, items, size, Validation(args, Path("run"), sd, flow, train.EXAMPLES[args.task], latents,
                                                   source)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_velocity_error_is_the_mean_over_held_out_scenes_for_every_batch_size_and_seed(seed):
    args, sd, flow, items, _, validation = open_validation(SHORT + f"--validation 3 --seed {seed}")
    scenes = Scenes(3, 32, 32, "outline", VALIDATION_SEED)
    assert [item["caption"] for item in items] == [scenes[i]["caption"] for i in range(3)]
    errors = []
    for args.batch in 3, 2:
        errors.append(validation.velocity_error())
    with torch.no_grad():
        x1 = sd.encode(torch.stack([item["image"] for item in items]))
        x0 = torch.randn(len(validation.noise), 4, 8, 8, generator=torch.Generator().manual_seed(VALIDATION_SEED))
        x0, t_fm = x0[:3], torch.tensor([0.5, 0.118034, 0.736068]).view(3, 1, 1, 1)
        context = sd.encode_text([item["caption"] for item in items])
        u = flow(t_fm * x1 + (1 - t_fm) * x0, t_fm.flatten(), context)
        expected = (u - (x1 - x0)).square().mean().item()
    assert errors == pytest.approx([expected, expected], rel=1e-4)


@pytest.mark.parametrize("cache", ["", "--cache cache"])
def test_held_out_photographs_are_measured_and_never_trained_on(cache):
    for i in range(30):
        save_photo(f"photos/{i}.png", 32, 32, seed=i)
        Path(f"photos/{i}.txt").write_text(f"picture {i}")
    words = f"--steps 15 --batch 4 --validation 4 --lora 2 --data photos {cache} --save-every 8 --out run"
    out, seen = trained_captions(SHORT + words)
    held_out = json.loads(Path("run/result.json").read_text())["captions"]
    assert len(held_out) == 3 and len(set(seen)) == 27 and set(seen).isdisjoint(held_out)
    assert f"data: 27 pictures in {Path.cwd()}/photos, 32x32; validation: 3 held-out pictures\n" in out
    assert "velocity error |u - (x1 - x0)|^2 of 3 held-out pictures: " in out
    _, seen = trained_captions("--resume run --steps 24")
    assert set(seen).isdisjoint(held_out)


def test_buckets_train_on_each_picture_in_about_its_own_shape_and_resume_to_the_same_weights():
    for i in range(12):
        save_photo(f"photos/{i}.png", *[(32, 32), (30, 60), (60, 30)][i % 3], seed=i)
    words = SHORT.replace("--size 32", "--size 64") + "--steps 8 --lora 2 --decay constant --data photos --buckets "
    shapes, plain = [], train.encode_batch

    def spied(sd, batch):
        shapes.append(batch["image"].shape[2:])
        return plain(sd, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "encode_batch", spied)
        works(train, words + "--out whole")
    assert set(shapes[2:]) == {(64, 64), (48, 80), (80, 48)} and set(shapes[:2]) == {(64, 64)}      # held-out ones
    works(train, words + "--steps 3 --out part")
    works(train, "--resume part --steps 8")
    assert same("whole/lora.safetensors", "part/lora.safetensors")


def test_the_output_of_a_run_on_fewer_than_ten_photographs_says_training_pictures():
    save_photos("photos")
    out = works(train, SHORT + "--steps 1 --lora 2 --data photos --out run")
    assert f"data: 3 pictures in {Path.cwd()}/photos, 32x32; validation: training pictures, " in out
    assert "before training: velocity error of training pictures, " in out and "held-out pictures" not in out
    assert "velocity error |u - (x1 - x0)|^2 of training pictures, " in out


@pytest.mark.parametrize("words, rows", [
    ("", ["before, 25 steps", "after 2 steps of training, 25 steps", "after, 4 steps"]),
    ("--task reflow --data pairs", ["before, 4 steps", "after 2 steps of training, 4 steps"]),
    ("--task depth", ["picture", "log depth", "before, 4 steps", "after 2 steps of training, 4 steps"])])
def test_before_after_has_a_row_of_pictures_for_each_number_of_steps(words, rows, monkeypatch):
    make_pairs()
    steps, drawn, grids, sampled, decode = [], [], [], Diff2Flow.sample, StableDiffusion.decode
    monkeypatch.setattr(Diff2Flow, "sample", lambda flow, x0, context, n, *rest: (
        steps.append(n) or sampled(flow, x0, context, n, *rest)))
    monkeypatch.setattr(StableDiffusion, "decode", lambda sd, x1: drawn.append(decode(sd, x1)) or drawn[-1])
    monkeypatch.setattr("support.validation.save_grid", lambda path, images, *rest: grids.append((images, *rest)))
    size = "" if "reflow" in words else "--size 32"
    works(train, f"{SHORT.replace('--size 32', size)} --steps 2 --lora 2 {words} --out run")
    (images, columns, making, labels, captions), = grids
    assert labels == rows and columns == 2 and len(images) == len(captions) == 2 * len(rows)
    assert making == "run, before training and after 2 steps, from the same noise"
    assert steps == ([25, 25, 4] if not words else [4, 4])              # before training, then after it
    before, *after = drawn
    assert torch.equal(images[-2 * len(after) - 2:], torch.cat([before, *after])) and not torch.equal(before, after[0])


@pytest.mark.parametrize("words", ["", "--data photos --cache cache", "--task reflow --data pairs"])
def test_previews_also_draw_the_users_prompts_from_the_noise_of_sample_py(words, monkeypatch):
    save_photos("photos")
    make_pairs()
    grids = {}
    monkeypatch.setattr("support.validation.save_grid", lambda path, images, columns, *rest, captions=None: (
        grids.setdefault(path.name, (images, columns, captions or rest[-1]))))
    short = SHORT.replace("--size 32", "") if "reflow" in words else SHORT
    prompts = "--prompt 'a red boat' --prompt=-x "
    works(train, f"{short} {words} {prompts} --steps 2 --lora 2 --preview-every 2 --batch 1 --out run")
    images, columns, captions = grids["before_after.png"]
    assert columns == 4 and captions[2:4] == captions[-2:] == ["a red boat", "-x"] and len(captions) == len(images)
    preview, _, captions = grids["step_000002.png"]
    assert captions[2:] == ["a red boat", "-x"] and len(preview) == 4
    works(sample, f"--device cpu --precision fp32 --lora run/lora.safetensors {prompts} --singles")
    for i, picture in enumerate(preview[2:]):
        drawn = np.asarray(Image.open(f"samples/{i:04d}.png")).astype(int)
        assert abs(np.asarray(to_pil(picture)) - drawn).max() <= 1
    assert "-x" not in json.loads(Path("run/result.json").read_text()).get("captions", [])
    works(train, "--resume run --steps 3")


def test_captions_that_are_too_long_get_one_warning_with_their_number_so_far():
    save_photos("photos")
    Path("photos/boat.txt").write_text("tag, " * 37 + "tag a red boat")
    words = SHORT + "--data photos --lora 2 --preview-every 0 --save-every 1 --caption-dropout 0 "
    for more in "--cache cache", "":
        warnings = [line for line in call(train, words + f"{more} --out run{len(more)}").err.splitlines()
                    if line.startswith("warning")]
        assert warnings in [[f"warning: 1 of {n} captions so far have more than 75 tokens, which is all that the text "
                             "encoder reads; cut off from the first: 'a red boat'"] for n in (2, 4)]


def test_the_warning_of_long_captions_waits_for_enough_of_them(capsys):
    watch = CaptionWatch()
    for i in range(100):
        watch.look(["東" * 80, *["x"] * 9])
        watch.report(now=False)
        assert (len(capsys.readouterr().err) > 0) == (i == 25), i       # 26 batches of 10: the first 256 and a few
    watch.report(now=True)
    assert capsys.readouterr().err == ""


def test_a_run_that_would_take_days_prints_a_warning_with_its_time(monkeypatch, capsys, whole):
    paper = Namespace(batch=4, grad_accum=16, steps=20_000)                         # 3 x 64 forward passes per step
    warn_if_slow(paper, 0.1)
    assert capsys.readouterr().out == "" and "warning" not in whole[1]
    warn_if_slow(paper, 1.0)
    assert "a step takes about 3 minutes and 20,000 steps about 44 days" in capsys.readouterr().out
    warn_if_slow(Namespace(batch=1, grad_accum=1, steps=1), 300.0)
    assert "a step takes about 15 minutes and 1 steps about 0 days" in capsys.readouterr().out
    clock = count(0, 1000)                                                          # seconds; 2 held-out scenes
    monkeypatch.setattr("support.validation.time", SimpleNamespace(time=lambda: next(clock)))
    out = works(train, SHORT + "--steps 1 --lora 2 --out run")
    assert out.index("before training: ") < out.index("a step takes about 50 minutes") < out.index("weights: ")


# ------------------------------------------------------------------ Reflow, depth, and the layout of Stable Diffusion

def test_reflow_trains_on_each_pairs_own_noise_and_is_sampled_without_guidance():
    make_pairs()
    pairs = [read_pairs(f"pairs/pairs-00000{i}.safetensors") for i in (0, 1)]
    noise, latent = (torch.cat([file[name] for file in pairs]).float() for name in ("noise", "latent"))
    words = SHORT.replace("--size 32", "") + "--task reflow --data pairs --steps 5 --out run"
    seen = []
    for batch in loss_calls(words):
        for x1, x0 in zip(batch.x1, batch.x0):
            number = (noise == x0).all((1, 2, 3)).nonzero().item()
            assert torch.equal(latent[number], x1)
            seen.append(number)
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]                  # pairs 5 and 6 are held out
    assert metadata("run/lora.safetensors")["cfg"] == "1.0"
    assert "cfg 1," in works(sample, FEW + "--n 1 --lora run/lora.safetensors")


def test_the_velocity_error_of_reflow_uses_the_noise_of_the_held_out_pairs():
    make_pairs()
    *_, size, validation = open_validation(SHORT.replace("--size 32", "") + "--task reflow --data pairs")
    pairs = read_pairs("pairs/pairs-000001.safetensors")
    assert torch.equal(validation.noise, pairs["noise"][1:].float()) and size == [32, 32]
    assert torch.equal(validation.latents["x1"], pairs["latent"][1:].float())


def test_the_loss_counts_a_latent_only_if_all_its_pixels_have_depth():
    fake = SimpleNamespace(device=torch.device("cpu"), factor=4, encode=lambda images: images[:, :1, ::4, ::4])
    torch.manual_seed(0)
    depth_values, valid = torch.randn(1, 1, 16, 24), torch.ones(1, 1, 16, 24, dtype=torch.bool)
    valid[0, 0, 7, 8] = False                           # the lower left corner of latent (1, 2)
    batch = {"image": torch.randn(1, 3, 16, 24), "depth": depth_values, "valid": valid, "caption": [""]}
    x1, x0, context, mask = train.EXAMPLES["depth"](fake, train.encode_batch(fake, batch))
    assert (mask == 0).nonzero().tolist() == [[0, 0, 1, 2]] and mask.sum() == 23 and x0 is None
    assert torch.equal(x1, depth_values[:, :, ::4, ::4]) and torch.equal(context, batch["image"][:, :1, ::4, ::4])
    flow = Diff2Flow(lambda x_dm, t_dm, context: 0 * x_dm, torch.tensor([0.9, 0.1]), torch.tensor([0.4359, 0.9950]))

    def loss(x1):
        return flow.loss(x1, context, torch.zeros_like(x1), torch.tensor([0.4]), mask).item()
    outside, inside = x1.clone(), x1.clone()
    outside[0, 0, 1, 2], inside[0, 0, 1, 3] = 100, 100
    assert loss(outside) == loss(x1) and loss(inside) > 10 * loss(x1)


def test_depth_trains_on_weighted_folders_with_holes_and_its_lora_predicts_depth():
    save_depth_photos("a")
    save_depth_photos("b")
    words = SHORT.replace("--size 32", "--size 32 48") + "--lora 2 --task depth --data a b --weights 9 1 --out run"
    for batch in loss_calls(words):
        assert (batch.mask[:, 0].sum(2) == 9).all() and batch.context.shape == batch.x1.shape == (2, 4, 8, 12)
    assert metadata("run/lora.safetensors")["task"] == "depth"
    shutil.copy("a/0.png", "photo.jpg")
    works(depth, "photo.jpg --steps 1 --lora run/lora.safetensors --device cpu")
    assert np.load("depth/photo.npy").shape == (32, 48)


def test_a_lora_of_a_file_in_stable_diffusions_layout_trains_on_photographs_and_its_next_command_works(files):
    save_photos("photos")
    Path("photos/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a picture")
    result = call(train, f"--ckpt {files['sd21']} --data photos --size 64 --steps 2 --batch 2 --grad-accum 1 "
                         "--validation 2 --previews 1 --device cpu --out run")
    photos = f"{Path.cwd()}/photos"
    assert result.code == 0 and f"warning: {photos}/broken.jpg: not a picture, or damaged" in result.err
    assert "(LoRA base)" in result.out and f"4 pictures in {photos}, 64x64" in result.out
    assert load_file("run/lora.safetensors").keys() > {"lora_unet_conv_in.lora_up.weight"}
    words = result.out.split("next: python sample.py ")[1].strip()
    assert str(files["sd21"]) in words
    works(sample, f"{words} --steps 1 --n 1 --size 64 --device cpu")


# ------------------------------------------------------------------ waiting for data

def test_a_clock_that_stands_still_ends_no_run(monkeypatch):
    for module in "support.run", "support.validation":
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(time=lambda: 5.0))
    works(train, SHORT + "--steps 1 --lora 2 --preview-every 1 --out run")
    assert rows_of("run/metrics.jsonl")[0]["waiting"] == 0


def test_the_share_of_time_spent_waiting_for_data_is_logged(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: now[0]))

    def pass_time(seconds):
        now[0] += seconds
        return seconds
    metrics = run.Metrics(Namespace(batch=2, grad_accum=1), Path("."), 0)
    bar, one = SimpleNamespace(set_postfix_str=lambda text: None), torch.ones(())
    for step, _ in zip(count(1), metrics.timed(map(pass_time, [1.0, 2.0, 0.0, 0.0]))):
        now[0] += 3
        metrics.add(step, one, one, 1.0, bar, now=step % 2 == 0)
        with metrics.paused():
            now[0] += 100
    assert [(row["waiting"], row["img_s"]) for row in rows_of("metrics.jsonl")] == [(0.333, 0.44), (0.0, 0.67)]


def test_a_clock_that_stands_still_or_goes_back_is_no_error(monkeypatch):
    now = iter([5.0, 5.0, 5.0, 3.0, 3.0])
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: next(now)))
    metrics = run.Metrics(Namespace(batch=2, grad_accum=1), Path("."), 0)
    bar, one = SimpleNamespace(set_postfix_str=lambda text: None), torch.ones(())
    for step in 1, 2:
        metrics.add(step, one, one, 1.0, bar, now=True)
    assert len(rows_of("metrics.jsonl")) == 2


# ------------------------------------------------------------------ recipes

PAPER = {  # Appendix A: flags -> defaults
    "": dict(lora="base", steps=20_000, grad_accum=16, lr=1e-5, decay="constant", caption_dropout=0.02, size=None),
    "--task reflow --data pairs": dict(lora="small", steps=60_000, grad_accum=32, lr=2e-5, caption_dropout=0.0),
    "--task depth": dict(lora="base", steps=20_000, batch=4, grad_accum=8, lr=3e-5, decay="cosine", size=[384, 512])}


@pytest.mark.parametrize("words", PAPER)
def test_the_defaults_for_a_users_checkpoint_are_the_papers_with_a_lora(words):
    args = vars(settings(f"--ckpt sd21.safetensors {words}"))
    assert {name: args[name] for name in PAPER[words]} == PAPER[words]


def test_a_bundled_prior_has_defaults_of_its_own_and_every_flag_overrides_them_even_with_zero(tiny):
    for words in "", f"--ckpt {tiny.parent}/other.safetensors":
        args = settings(words)
        assert (args.steps, args.batch, args.grad_accum, args.lora, args.style) == (540, 16, 1, "small", "outline")
    assert settings("--task depth").lora == "none" and settings("--task depth").style == "room"
    args = settings("--warmup 0 --caption-dropout 0 --lora none --steps 7")
    assert (args.warmup, args.caption_dropout, args.lora, args.steps, args.batch) == (0, 0, "none", 7, 16)


def test_the_help_names_the_default_of_each_flag_for_each_task(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")               # else lines break within words
    text = " ".join(call(train, "--help").out.split())

    def in_words(recipes, name):
        return [f"{task} {recipe[name]}" for task, recipe in recipes.items() if recipe[name] is not None]
    for name in train.PAPER["text-to-image"].keys() - {"size"}:
        shown = re.search(rf"--{name.replace('_', '-')} [^()]*\(default: ([^)]*)\)", text)[1]
        paper, _, bundled = shown.partition("; on a bundled prior: ")
        assert paper.split(", ") == in_words(train.PAPER, name)
        assert (bundled or paper).split(", ") == in_words(train.BUNDLED, name)
    assert re.search(r"--size [^()]*\(default: 512, as in the paper, or the size in the checkpoint's metadata; depth: "
                     r"384 512\)", text)


def test_the_help_groups_the_flags_under_data_model_optimizer_and_output():
    lines = call(train, "--help").out.splitlines()
    headings = {title: lines.index(f"{title}:") for title in ("data", "model", "optimizer", "output")}
    assert list(headings.values()) == sorted(headings.values())
    for title, flags in ("data", "--data --size --cache"), ("model", "--ckpt --lora --init-lora"), (
            "optimizer", "--steps --lr --seed"), ("output", "--out --resume --validation"):
        later = [line for line in headings.values() if line > headings[title]]
        group = lines[headings[title]:min(later, default=len(lines))]
        assert all(any(line.startswith(f"  {flag} ") for line in group) for flag in flags.split())


# ------------------------------------------------------------------ what is refused

@pytest.fixture(scope="module")
def bad(tiny, tmp_path_factory):
    """A folder of files that train.py refuses."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "truncated.safetensors").write_bytes(tiny.read_bytes()[:100_000])
    for name, content in ("truncated", tiny.read_bytes()[:1000]), ("zeros", bytes(100)):
        with replacing(folder / name / "state.safetensors") as temporary:
            temporary.write_bytes(content)
    (folder / "foreign").mkdir()
    save_file({"weight": torch.ones(2)}, folder / "foreign/state.safetensors")
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    (folder / "file.tar").write_text("")
    sd = load_checkpoint(tiny)
    sd.add_image_input()
    save_checkpoint(sd, folder / "depth.safetensors", torch.float16)
    return folder


REFUSED = {
    "--ckpt {}/none.safetensors": "no such checkpoint file", "--ckpt {}/truncated.safetensors": "truncated",
    "--ckpt {}/depth.safetensors": "only --task depth trains", "--use-ema": "no EMA weights",
    "--size 65": "65x65", "--size 64 64 64": "3 numbers", "--steps 0": "--steps 0", "--grad-accum 0": "--grad-accum 0",
    "--lr nan": "--lr nan", "--caption-dropout 2": "--caption-dropout 2", "--seed -1": "--seed -1",
    "--lora foo": "--lora foo", "--lora 0": "--lora 0", "--weights 1": "--weights", "--data a b": "one folder",
    "--data a b.tar": "no folders beside them", "--task depth --data a.tar": "only --task text-to-image reads tars",
    "--data 'a{{0..9.tar'": "a{0..9.tar: no such file; tars are given as", "--caption x": "--caption is for",
    "--buckets": "--buckets is for", "--buckets --data a --cache c": "--buckets is for",
    "--buckets --data a.tar": "--buckets is for", "--task depth --data a --caption x": "--caption is for",
    "--data {}/none.tar": "none.tar: no such file", "--data {}/file.tar": "file.tar: empty, truncated, or not a tar",
    "--cache c": "--cache is for", "--cache c --data a.tar": "--cache is for",
    "--cache c --task depth --data a": "--cache is for", "--data {}/none": "none is missing",
    "--data {}/empty": "no readable image",
    "--task depth --caption-dropout 0.1": "--caption-dropout: --task depth uses no captions",
    "--task depth --prompt x": "--prompt: --task depth uses no captions",
    "--task reflow": "--pairs N", "--task reflow --data {}/empty --objective dm": "velocity field",
    "--task reflow --data {}/empty": "no pairs-", "--task depth --data {}/empty": "no picture with a depth file",
    "--task depth --data {}/empty --weights 1 2": "--weights 1.0 2.0 for 1 folders",
    "--resume {}/none": "no such file", "--resume {}/truncated": "truncated", "--resume {}/zeros": "zeros/state",
    "--resume {}/foreign": "not written by train.py", "--device nonsense": "--device nonsense",
    "--out {}/file": "file", "--out {}/file/run": "file",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_refused_setting_is_one_line_before_anything_is_measured_or_written(bad, words, monkeypatch, tmp_path):
    monkeypatch.setattr(train.Validation, "velocity_error", lambda _: pytest.fail("measured before it failed"))
    before = sorted(bad.rglob("*"))
    line = refusal(train, words.format(bad))
    assert REFUSED[words] in line and sorted(bad.rglob("*")) == before and not list(tmp_path.iterdir())
