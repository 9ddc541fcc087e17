"""toy/: judge measures what its documentation says, and the commands that made the bundled priors still make one."""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import lora
import train
from diff2flow import Diff2Flow, Diffusion, velocity_error
from model import TINY, StableDiffusion
from schedule import sd_schedule
from support.checkpoint import load_checkpoint, save_checkpoint
from support.files import save_tensors
from support.load import load_flow
from support.lora_file import save_lora
from support.validation import VALIDATION_SEED
from toy import judge, make_prior
from toy.scenes import LABELS, Scenes, render

ATTRIBUTES = list(LABELS)


def real_pictures(n):
    """-> images (n, 3, 64, 64), labels (n, 10)."""
    return judge.pictures_and_labels([Scenes(n, 64, 64, "solid", 3).scene(i) for i in range(n)])


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def random_lora(path, unet, **metadata):
    """Write a LoRA file with random weights -> its path."""
    torch.manual_seed(1)
    for parameter in lora.inject(unet, 2):
        torch.nn.init.normal_(parameter, std=0.1)
    path.parent.mkdir(parents=True)
    save_lora(unet, path, metadata)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The file of a random tiny v-network, whose metadata has objective fm."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "random.safetensors"
    save_checkpoint(StableDiffusion(TINY, "v"), path, objective="fm", resolution="64")
    return path


@pytest.fixture
def depth_lora(checkpoint, tmp_path):
    """A random depth LoRA on that checkpoint, in a folder as train.py writes it."""
    sd = StableDiffusion(TINY, "v")
    sd.add_image_input()
    path = random_lora(tmp_path / "depth/lora.safetensors", sd.unet, objective="diff2flow", task="depth")
    (path.parent / "result.json").write_text(json.dumps({"task": "depth", "ckpt": str(checkpoint)}))
    return path


@pytest.fixture
def seeds(monkeypatch):
    """The seeds of all scenes that judge or make_prior draw, in order."""
    drawn = []

    class SpiedScenes(Scenes):
        def __init__(self, n, height, width, style, seed):
            drawn.append(seed)
            super().__init__(n, height, width, style, seed)

    monkeypatch.setattr(judge, "Scenes", SpiedScenes)
    monkeypatch.setattr(make_prior, "Scenes", SpiedScenes)
    return drawn


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(words) runs `python -m toy.judge` in an empty folder, with a classifier of two training steps -> stdout."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"TRAIN_STEPS": 2, "TRAIN_BATCH": 8, "REAL_SCENES": 8, "REQUIRED": 0}.items():
        monkeypatch.setattr(judge, name, value)

    def run_command(*words):
        monkeypatch.setattr(sys, "argv", ["judge.py", *map(str, words), "--device", "cpu"])
        judge.main()
        return capsys.readouterr().out

    return run_command


SHORT = ("--n", 3, "--steps", 2, "--batch", 2)


# ------------------------------------------------------------------ the measures

def test_a_wrong_relation_makes_its_own_caption_wrong_alone():
    labels = real_pictures(200)[1]
    predicted, relation = torch.where(labels == -100, 1, labels), ATTRIBUTES.index("relation")
    assert set(judge.score(predicted, labels).values()) == {1.0}        # attributes that do not apply do not count
    row = (labels[:, relation] != -100).nonzero()[0, 0]
    name = LABELS["relation"][labels[row, relation]]
    related, same = (labels[:, relation] != -100).sum(), (labels[:, relation] == labels[row, relation]).sum()
    predicted[row, relation] = (labels[row, relation] + 1) % len(LABELS["relation"])
    shares = judge.score(predicted, labels)
    assert {name: share for name, share in shares.items() if share < 1} == {
        "all": pytest.approx(1 - 1 / 200), "relation": pytest.approx(1 - 1 / related.item()),
        f"all {name}": pytest.approx(1 - 1 / same.item())}


def test_two_wrong_attributes_make_one_wrong_caption_and_an_attribute_that_never_applies_has_no_share():
    labels = real_pictures(200)[1]
    single = labels[labels[:, ATTRIBUTES.index("count")] == LABELS["count"].index("one")]
    predicted = single.clone()
    predicted[7, [ATTRIBUTES.index("count"), ATTRIBUTES.index("background")]] += 1
    shares = judge.score(predicted, single)
    assert shares["all"] == shares["count"] == pytest.approx(1 - 1 / len(single))
    assert shares["relation"] is None and shares["shape2"] is None and shares["all above"] is None


def test_predictions_are_in_the_order_of_the_labels():
    images, labels = real_pictures(300)
    classes = labels.clamp(min=0)
    logits = torch.cat([F.one_hot(column, n) for column, n in zip(classes.T, judge.CLASSES)], 1).float()
    batches = iter(logits.split(256))
    assert torch.equal(judge.predict(lambda batch: next(batches), images), classes)


def test_the_frechet_distance_equals_scipys():
    from scipy.linalg import sqrtm
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(500, 6, generator=generator).double(), torch.randn(400, 6, generator=generator).double()
    b = b @ torch.randn(6, 6, generator=generator).double() + 1
    A, B = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(A + B - 2 * sqrtm(A @ B).real)
    assert judge.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert judge.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_straightness_is_0_for_a_straight_path_and_the_variance_of_the_velocity_for_a_bent_one():
    grid = torch.tensor([0.0, 0.25, 1.0])
    start, end = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert judge.straightness([start + t * (end - start) for t in grid], grid) == pytest.approx(0, abs=1e-12)
    bend = [torch.full((1, 4, 4, 4), value) for value in (0.0, 1.0, 1.0)]       # u is 4, then 0; its mean is 1
    assert judge.straightness(bend, grid) == pytest.approx(0.25 * 3**2 + 0.75 * 1**2)


def test_real_scenes_have_a_frechet_distance_of_0_to_themselves_and_right_is_per_scene():
    world = Scenes(40, 64, 64, "outline", judge.HELD_OUT_SEED)
    scenes = [world.scene(i) for i in range(40)]
    pictures, labels = judge.pictures_and_labels(scenes)
    classifier = judge.build_classifier().eval().requires_grad_(False)
    real = judge.RealScenes([scene.caption for scene in scenes], labels, {}, judge.features(classifier, pictures))
    result = judge.judge_pictures(pictures, real, classifier)
    assert result["frechet"] == pytest.approx(0, abs=1e-6)
    real.labels = judge.predict(classifier, pictures)
    real.labels[[3, 7], 0] += 1
    assert [i for i, right in enumerate(judge.judge_pictures(pictures, real, classifier)["scenes"]["all"])
            if not right] == [3, 7]


def test_black_has_brightness_0_white_has_1_and_tenths_are_quantiles_over_pictures():
    pictures = torch.linspace(-1, 1, 11).view(11, 1, 1, 1).expand(11, 3, 4, 4)
    assert judge.brightness(-torch.ones(5, 3, 4, 4)).tolist() == [0.0] * 5
    assert judge.brightness(torch.full((5, 3, 4, 4), 1.5)).tolist() == [1.0] * 5            # clamped as in a file
    assert judge.mean_and_tenths(judge.brightness(pictures)) == {
        "mean": pytest.approx(0.5), "darkest_tenth": pytest.approx(0.1), "lightest_tenth": pytest.approx(0.9)}


def test_shifted_ddim_evaluates_the_network_between_its_timesteps():
    timesteps = []

    def network(x_dm, t_dm, context):
        timesteps.append(t_dm[0].item())
        return x_dm

    flow, x0 = Diffusion(network, *sd_schedule()), torch.zeros(1, 4, 2, 2)
    flow.sample(x0, None, 4)
    judge.ShiftedDiffusion(flow, 0.5).sample(x0, None, 4)
    assert timesteps == pytest.approx([999, 749, 499, 249, 998.5, 748.5, 498.5, 248.5], abs=1e-3)


# ------------------------------------------------------------------ judge captions

def test_the_command_trains_a_classifier_once_and_ends_with_its_result_as_json(run, checkpoint):
    first = run("captions", checkpoint, *SHORT, "--out", "here")
    result = json.loads(first.splitlines()[-1])
    assert "training the classifier of solid scenes" in first and rows_of("here/captions.jsonl") == [result]
    assert result["model"] == str(checkpoint) and result["objective"] == "fm" and result["prediction"] == "v"
    assert (result["n"], result["steps"], result["cfg"], result["size"]) == (3, 2, 4, [64, 64])
    assert set(result["shares"]) == {"real", "decoded", "samples"} and Path("here/samples.png").is_file()
    names = ["all", *ATTRIBUTES, *(f"all {relation}" for relation in LABELS["relation"])]
    assert all(list(shares) == names for shares in result["shares"].values())
    assert all(any(line.startswith(name + " ") for line in first.splitlines()) for name in names)
    again = run("captions", checkpoint, *SHORT, "--out", "here")
    assert "training" not in again and json.loads(again.splitlines()[-1]) == result
    run("captions", checkpoint, *SHORT, "--style", "outline")
    assert {path.name for path in Path("runs").glob("*.safetensors")} == {
        "classifier-solid.safetensors", "classifier-outline.safetensors"}


def test_a_lora_is_sampled_on_its_base_by_its_own_objective_prediction_and_guidance(run, checkpoint, tmp_path):
    path = random_lora(tmp_path / "run/lora.safetensors", StableDiffusion(TINY, "v").unet,
                       objective="dm", prediction="eps", cfg="1.0", base_hash=load_checkpoint(checkpoint).unet_hash)
    result = {"task": "reflow", "ckpt": str(checkpoint), "objective": "dm", "steps": 70}
    (path.parent / "result.json").write_text(json.dumps(result))
    run("captions", checkpoint, path, "--n", 3, "--steps", 1, 3)
    rows = rows_of("runs/captions/captions.jsonl")
    assert [(row["model"], row["steps"], row["objective"], row["prediction"], row["cfg"], row["run"], row["step"])
            for row in rows] == [
        (str(checkpoint), 1, "fm", "v", 4, {}, None), (str(checkpoint), 3, "fm", "v", 4, {}, None),
        (str(path), 1, "dm", "eps", 1, result, 70), (str(path), 3, "dm", "eps", 1, result, 70)]
    assert rows[2]["straightness"] < 1e-9 < rows[3]["straightness"]             # a path of one step is straight


def test_paths_start_where_ddim_starts_and_each_picture_has_the_same_weight(run, checkpoint, monkeypatch):
    paths = []
    monkeypatch.setattr(judge, "straightness", lambda points, grid: paths.append(points) or float(len(points[0])))
    run("captions", checkpoint, *SHORT, "--objective", "dm", "--cfg", 1)
    x0 = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (level[-1].item() for level in sd_schedule())
    assert [len(points) for points in paths] == [3, 3]                  # two steps are three points; two batches
    assert torch.allclose(torch.cat([points[0] for points in paths]), x0 / (alpha + sigma), atol=1e-5)
    row, = rows_of("runs/captions/captions.jsonl")
    assert row["straightness"] == pytest.approx((2 * 2 + 1 * 1) / 3)


def test_samples_are_compared_with_other_scenes_and_neither_trains_the_classifier(run, checkpoint, seeds, monkeypatch):
    compared = []
    monkeypatch.setattr(judge, "frechet_distance", lambda *features: compared.extend(features) or 0.0)
    run("captions", checkpoint, *SHORT, "--seed", 7)
    held_out = judge.HELD_OUT_SEED + 7
    assert seeds == [judge.TRAIN_SEED, judge.TRAIN_SEED + 1, held_out]
    others = judge.pictures_and_labels([Scenes(11, 64, 64, "solid", held_out).scene(i) for i in range(3, 11)])[0]
    classifier = judge.load_classifier("solid", torch.device("cpu"))
    assert compared[0].shape == (3, 256) and torch.allclose(compared[1], classifier[:-1](others), atol=1e-5)


def test_samples_have_the_given_size_and_are_scaled_for_the_classifier(run, checkpoint, monkeypatch):
    latents, decode = [], StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda sd, x: latents.append(x.shape) or decode(sd, x))
    run("captions", checkpoint, *SHORT, "--size", 96, 128)
    row, = rows_of("runs/captions/captions.jsonl")
    assert row["size"] == [96, 128] and latents[-2:] == [(2, 4, 24, 32), (1, 4, 24, 32)]


def test_the_networks_sample_in_the_given_precision(run, checkpoint, monkeypatch):
    dtypes = []

    def sample(flow, x0, context, steps, uncond, cfg, callback):
        dtypes.append((flow.net.out[2].weight.dtype, context.dtype))
        callback(x0)
        return x0

    monkeypatch.setattr(Diff2Flow, "sample", sample)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        dtypes.clear()
        run("captions", checkpoint, "--n", 2, "--steps", 1, "--precision", precision)
        assert dtypes == [(dtype, dtype)]
        assert rows_of("runs/captions/captions.jsonl")[0]["precision"] == precision


def test_a_classifier_that_is_poor_or_from_another_version_is_refused_before_sampling(run, checkpoint, monkeypatch):
    monkeypatch.setattr(judge, "REQUIRED", 0.98)
    with pytest.raises(ValueError, match="right about only .* delete runs/classifier-solid"):
        run("captions", checkpoint, *SHORT)
    save_tensors("runs/classifier-solid.safetensors", {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="written by another version: delete it"):
        run("captions", checkpoint, *SHORT)
    assert not Path("runs/captions").exists()


def test_augmented_pictures_differ_a_little_from_the_originals():
    images = real_pictures(32)[0]
    change = (judge.soften(images) - images).abs().mean((1, 2, 3))
    assert change.min() > 0.005 and change.max() < 0.3


@pytest.mark.parametrize("words, message", [
    (("--n", 1), "--n 1"), (("--steps", 2, 0), "--steps 0"), (("--size", 65), "multiples of"),
    (("--t-shift", 0.5), "add --objective dm")])
def test_wrong_arguments_are_refused_before_anything_is_trained(run, checkpoint, words, message):
    with pytest.raises(ValueError, match=message):
        run("captions", checkpoint, *SHORT, *words)
    assert not Path("runs").exists()


def test_captions_refuse_a_depth_model_and_depth_refuses_a_text_to_image_model(run, checkpoint, depth_lora):
    for command, model in (("captions", depth_lora), ("depth", checkpoint)):
        with pytest.raises(ValueError, match="depth"):
            run(command, model, "--n", 2, "--steps", 1)
    assert not Path("runs").exists()


# ------------------------------------------------------------------ judge velocity, judge plain

def test_each_scenes_velocity_error_is_at_its_own_noise_and_time_for_any_batch_size(run, checkpoint, tmp_path):
    path = random_lora(tmp_path / "run/lora.safetensors", StableDiffusion(TINY, "v").unet, objective="fm")
    (path.parent / "result.json").write_text(json.dumps({"task": "text-to-image", "ckpt": str(checkpoint)}))
    run("velocity", path, "--n", 5, "--batch", 2, "--seed", 7, "--style", "outline")
    row, = rows_of("runs/velocity/velocity.jsonl")
    sd, flow = load_flow(loras=path, device=torch.device("cpu"), task="text-to-image", objective="fm")
    world = Scenes(5, 64, 64, "outline", judge.HELD_OUT_SEED + 7)
    noise = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    for i, found in enumerate(row["scenes"]["velocity_error"]):
        item, t_fm = world[i], torch.tensor([(i * 0.618034 + 0.5) % 1])
        with torch.no_grad():
            expected = velocity_error(flow, sd.encode(item["image"][None]), noise[i:i + 1], t_fm,
                                      sd.encode_text([item["caption"]]))
        assert found == pytest.approx(expected.item(), rel=2e-3)                    # results keep four digits
    assert row["velocity_error"] == pytest.approx(np.mean(row["scenes"]["velocity_error"]), rel=1e-3)


def test_plain_draws_n_black_and_n_white_pictures_and_notes_whose_sampler_was_used(run, checkpoint, monkeypatch):
    encoded, encode = [], StableDiffusion.encode_text
    monkeypatch.setattr(StableDiffusion, "encode_text", lambda sd, texts: encoded.extend(texts) or encode(sd, texts))
    run("plain", checkpoint, "--n", 3, "--steps", 1, 2, "--cfg", 1)
    rows = rows_of("runs/plain/plain.jsonl")
    assert encoded.count("a black image") == encoded.count("a white image") == 6
    assert [(row["steps"], row["own_sampler"]) for row in rows] == [(1, True), (2, True)]
    assert rows[0]["black"]["mean"] == pytest.approx(np.mean(rows[0]["scenes"]["black"]["mean"]), rel=1e-3)
    assert 0 <= rows[0]["black"]["darkest_tenth"] <= rows[0]["black"]["mean"] <= rows[0]["black"]["lightest_tenth"] <= 1
    assert Image.open("runs/plain/samples.png").height > 2 * 64, "a row of pictures per number of steps"
    run("plain", checkpoint, "--n", 3, "--steps", 1, "--objective", "dm")
    assert [row["own_sampler"] for row in rows_of("runs/plain/plain.jsonl")] == [False]


# ------------------------------------------------------------------ judge depth

def test_depth_is_measured_for_each_number_of_steps_and_each_ensemble(run, depth_lora):
    last = json.loads(run("depth", depth_lora, "--steps", 1, 2, "--ensemble", 1, 3, "--n", 2).splitlines()[-1])
    rows = rows_of("runs/depth-scenes/depth.jsonl")
    assert [(row["steps"], row["ensemble"]) for row in rows] == [(1, 1), (1, 3), (2, 1), (2, 3)] and rows[-1] == last
    assert len({row["absrel"] for row in rows}) == 4 and rows[0]["images"] == 2
    assert rows[0]["absrel"] == pytest.approx(np.mean(rows[0]["scenes"]["absrel"]), rel=1e-3)


def test_an_affine_map_of_log_depth_has_no_error_and_noise_has_some(run, depth_lora, monkeypatch):
    world = Scenes(3, 64, 64, "room", judge.HELD_OUT_SEED)
    log_depth = torch.stack([torch.from_numpy(render(world.scene(i), 64, 64)[1]) for i in range(3)]).log()[:, None]
    for noise, low, high in ((0.0, 0, 1e-5), (0.05, 1e-3, 0.5)):
        decoded = 0.4 * log_depth - 0.7 + noise * torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(StableDiffusion, "decode", lambda sd, latents, decoded=decoded: decoded)
        run("depth", depth_lora, "--steps", 1, "--n", 3)
        row, = rows_of("runs/depth-scenes/depth.jsonl")
        assert low <= row["absrel"] <= high and low <= row["decoded"] <= high


# ------------------------------------------------------------------ make_prior

def make(monkeypatch, *words):
    """Run `python -m toy.make_prior` on few pictures."""
    few = () if "--resume" in words else ("--batch", "2", "--scenes", "16", "--validation", "8", "--device", "cpu")
    monkeypatch.setitem(make_prior.FIXED, "previews", 2)
    monkeypatch.setattr(sys, "argv", ["make_prior.py", *words, *few])
    make_prior.main()


def changed_parts(before, after, depth):
    """-> the first `depth` parts of the names of all tensors that differ between two files."""
    before, after = load_file(before), load_file(after)
    assert before.keys() == after.keys()
    return {".".join(name.split(".")[:depth]) for name in before
            if not torch.equal(before[name].half(), after[name].half())}


def test_the_three_commands_make_a_prior_and_each_trains_its_own_part_alone(tmp_path, monkeypatch, seeds):
    monkeypatch.chdir(tmp_path)
    make(monkeypatch, "autoencoder", "--steps", "2", "--out", "autoencoder", "--preview-every", "2")
    images = torch.stack([Scenes(4, 64, 64, "solid", 5)[i]["image"] for i in range(4)])
    latents = load_checkpoint("autoencoder/model.safetensors").encode(images)
    assert latents.mean().abs() < 0.5 and 0.5 < latents.std() < 2
    assert Path("autoencoder/step_000002.png").is_file()
    files = [f"{task}/model.safetensors" for task in make_prior.RECIPES]
    make(monkeypatch, "prior", "--steps", "4", "--warmup", "0", "--ckpt", files[0], "--out", "prior")
    assert changed_parts(*files[:2], depth=1) == {"model", "cond_stage_model"}
    make(monkeypatch, "decoder", "--steps", "2", "--ckpt", files[1], "--out", "decoder")
    assert changed_parts(*files[1:], depth=2) == {"first_stage_model.decoder", "first_stage_model.post_quant_conv"}
    held_out = VALIDATION_SEED
    assert seeds == [held_out] * 2 + [0, 0] + [0, held_out] + [held_out] * 2 + [0, 0]       # 0 is trained on
    metadata = load_checkpoint("decoder/model.safetensors").metadata
    assert metadata["objective"] == "dm" and metadata["style"] == "solid" and metadata["resolution"] == "64"
    assert "cfg" not in metadata and json.loads(Path("prior/result.json").read_text())["task"] == "prior"


@pytest.mark.parametrize("changes", [{"batch": "x"}, {"batch": []}, {"steps": 0}, {"help": True}, {"unknown": 1}])
def test_a_state_with_settings_of_another_kind_is_refused(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"task": "decoder", "steps": 2, "batch": 2, "lr": 1e-3, "seed": 0, "style": "solid", **changes}
    Path("run").mkdir()
    save_file({"x": torch.ones(1)}, "run/state.safetensors", {"args": json.dumps(settings), "step": "1"})
    with pytest.raises(ValueError, match="run/state.safetensors: "):
        make(monkeypatch, "decoder", "--resume", "run")


@pytest.mark.parametrize("task", ["autoencoder", "prior"])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(task, tmp_path, monkeypatch, checkpoint, capsys):
    monkeypatch.chdir(tmp_path)
    start = ["--ckpt", str(checkpoint)] if task == "prior" else []
    words = [task, *start, "--steps", "3", "--save-every", "2", "--out"]
    make(monkeypatch, *words, "whole")
    learning_rate = train.learning_rate

    def killed(step, args):
        if step == 2:
            raise KeyboardInterrupt
        return learning_rate(step, args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learning_rate", killed)
        make(patch, *words, "killed")
    assert f"resume from the last save with: python -m toy.make_prior {task} --resume killed" in capsys.readouterr().out
    make(monkeypatch, task, "--resume", "killed")
    for name in "model.safetensors", "state.safetensors":
        whole, resumed = load_file(f"whole/{name}"), load_file(f"killed/{name}")
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    with pytest.raises(ValueError, match=f"a run of the task {task}, not decoder"):
        make(monkeypatch, "decoder", "--resume", "killed")


@pytest.mark.parametrize("change", [{"batch": "x"}, {"batch": None, "lr": -1}, {"scenes": [4]}, {"seed": 1.5},
                                    {"warmup": {}}, {"device": []}, {"precision": "x"}, {"new": 1}])
def test_settings_of_wrong_types_in_a_state_are_refused_by_its_name(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    args = {"task": "prior", "steps": 3, "batch": 2, "device": "cpu", **make_prior.FIXED, **change}
    save_tensors("run/state.safetensors", {}, {"args": json.dumps(args), "step": "2"})
    with pytest.raises(ValueError, match="run/state.safetensors: "):
        make(monkeypatch, "prior", "--resume", "run")


def test_the_autoencoders_pictures_are_both_styles_in_turn_and_every_eighth_is_grey_log_depth():
    pictures = make_prior.AutoencoderPictures(16, 3)
    solid, outline = Scenes(16, 64, 64, "solid", 3), Scenes(16, 64, 64, "outline", 3)
    for key in (0, 5, 16 + 2, 16 + 9):
        assert torch.equal(pictures[key]["image"], (outline if key % 2 else solid)[key % 16]["image"])
    for key in (7, 15, 16 + 7):
        grey, depth = pictures[key]["image"], outline[key % 16]["depth"]
        expected = 2 * (depth.log() - depth.log().min()) / (depth.log().max() - depth.log().min()) - 1
        assert grey.shape == (3, 64, 64) and torch.allclose(grey, expected.expand(3, -1, -1), atol=1e-5)


def test_the_autoencoders_loss_is_of_pixels_and_edges_and_a_little_kl():
    class Autoencoder:
        """Decodes a picture to itself plus `error`; its posterior has the same mean and std everywhere."""
        def __init__(self, error, mean, std):
            self.error, self.mean, self.std = error, mean, std

        def moments(self, images):
            return torch.full((2, 4, 2, 2), self.mean), torch.full((2, 4, 2, 2), self.std)

        def decode(self, latents):
            return images + self.error

    def loss(error, mean=0.0, std=1.0):
        return make_prior.autoencoder_loss(Autoencoder(error, mean, std), images).item()

    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    stripes = torch.tensor([1.0, -1.0] * 4).expand(2, 3, 8, 8)
    assert loss(0) == pytest.approx(0) and loss(0.5) == pytest.approx(0.25)
    assert loss(stripes) == pytest.approx(1 + 4)                        # differences of neighbours are wrong by 2
    assert loss(0, 3.0, 0.5) == pytest.approx(1e-4 * 0.5 * (3**2 + 0.5**2 - 1 - 2 * np.log(0.5)))


def test_a_standardised_autoencoder_has_latents_of_variance_1_and_decodes_to_the_same_pictures(checkpoint, tmp_path):
    sd = load_checkpoint(checkpoint)
    vae, images = sd.first_stage_model, torch.stack([Scenes(70, 32, 32, "solid", 0)[i]["image"] for i in range(70)])
    mean, std = vae.moments(images)
    decoded = vae.decode(mean[:4] + std[:4])
    make_prior.save_autoencoder(argparse.Namespace(task="autoencoder"), tmp_path, sd, images)
    assert torch.equal(vae.moments(images)[0], mean)                    # training continues unchanged
    latents = load_checkpoint(tmp_path / "model.safetensors").encode(images[::2])
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.02)
    make_prior.standardise(vae, images)
    latents = sd.encode(images)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    mean, std = vae.moments(images[:4])
    assert torch.allclose(vae.decode(mean + std), decoded, atol=1e-4)
