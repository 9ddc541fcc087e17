"""toy/: the judge measures what it says it measures, and the commands that made the bundled priors still make one."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lora
from diff2flow import Diffusion
from model import TINY, StableDiffusion
from schedule import sd_schedule
from toy import judge
from toy.scenes import LABELS, Scenes, render

ATTRIBUTES = list(LABELS)


def real_pictures(n, style="solid"):
    """-> images (n, 3, 64, 64), labels (n, 10)."""
    return judge.pictures_and_labels([Scenes(n, 64, 64, style, 3).scene(i) for i in range(n)])


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def random_lora(path, unet, **metadata):
    """The file of a LoRA with random weights."""
    torch.manual_seed(1)
    for parameter in lora.inject(unet, 2):
        torch.nn.init.normal_(parameter, std=0.1)
    path.parent.mkdir(parents=True)
    lora.save(unet, path, metadata)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random tiny v-network that says of itself that it was trained with naive flow matching."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "random.safetensors"
    StableDiffusion(TINY, "v").save(path, objective="fm", resolution="64")
    return path


@pytest.fixture
def depth_lora(checkpoint, tmp_path):
    """A random LoRA for depth on that checkpoint, as a run of train.py leaves it."""
    sd = StableDiffusion(TINY, "v")
    sd.add_picture_input()
    path = random_lora(tmp_path / "depth/lora.safetensors", sd.unet, objective="diff2flow", task="depth")
    (path.parent / "result.json").write_text(json.dumps({"task": "depth", "ckpt": str(checkpoint)}))
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(words) of `python -m toy.judge` in an empty folder, with a classifier of two steps -> what it printed."""
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

def test_a_wrong_relation_makes_its_caption_wrong_and_nothing_else():
    labels = real_pictures(200)[1]
    predicted, relation = torch.where(labels == -100, 1, labels), ATTRIBUTES.index("relation")
    assert set(judge.score(predicted, labels).values()) == {1.0}        # what does not apply is not asked for
    row = (labels[:, relation] != -100).nonzero()[0, 0]
    name = LABELS["relation"][labels[row, relation]]
    predicted[row, relation] = (labels[row, relation] + 1) % len(LABELS["relation"])
    shares = judge.score(predicted, labels)
    related, same = (labels[:, relation] != -100).sum().item(), (labels[:, relation] == labels[row, relation]).sum().item()
    assert {name: share for name, share in shares.items() if share < 1} == {
        "all": pytest.approx(1 - 1 / 200), "relation": pytest.approx(1 - 1 / related),
        f"all {name}": pytest.approx(1 - 1 / same)}


def test_two_wrong_attributes_make_one_wrong_caption_and_one_that_never_applies_has_no_share():
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


def test_straightness_is_0_on_a_line_and_the_variance_of_the_velocity_on_a_bend():
    grid = torch.tensor([0.0, 0.25, 1.0])
    start, end = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert judge.straightness([start + t * (end - start) for t in grid], grid) == pytest.approx(0, abs=1e-12)
    bend = [torch.full((1, 4, 4, 4), value) for value in (0.0, 1.0, 1.0)]       # u is 4, then 0; its mean is 1
    assert judge.straightness(bend, grid) == pytest.approx(0.25 * 3**2 + 0.75 * 1**2)


def test_a_black_image_has_brightness_0_and_a_white_one_1():
    world = Scenes(40, 64, 64, "outline", judge.HELD_OUT_SEED)
    scenes = [world.scene(i) for i in range(40)]
    pictures, labels = judge.pictures_and_labels(scenes)
    classifier = judge.build_classifier().eval().requires_grad_(False)
    real = judge.RealScenes([scene.caption for scene in scenes], labels, {}, judge.features(classifier, pictures))
    result = judge.judge_pictures(pictures, real, classifier)
    assert result["plain"] == {"black": pytest.approx(0), "white": pytest.approx(1)}
    assert result["frechet"] == pytest.approx(0, abs=1e-6)


def test_shifted_ddim_asks_the_network_between_its_timesteps():
    asked = []

    def network(x_dm, t_dm, context):
        asked.append(t_dm[0].item())
        return x_dm

    flow, x0 = Diffusion(network, *sd_schedule()), torch.zeros(1, 4, 2, 2)
    flow.sample(x0, None, 4)
    judge.ShiftedDiffusion(flow, 0.5).sample(x0, None, 4)
    assert asked == pytest.approx([999, 749, 499, 249, 998.5, 748.5, 498.5, 248.5], abs=1e-3)


# ------------------------------------------------------------------ judge captions

def test_the_command_trains_a_classifier_once_and_ends_with_one_line_of_json(run, checkpoint):
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


def test_a_lora_is_judged_on_its_base_by_its_own_objective_prediction_and_guidance(run, checkpoint, tmp_path):
    path = random_lora(tmp_path / "run/lora.safetensors", StableDiffusion(TINY, "v").unet,
                       objective="dm", prediction="eps", cfg="1.0")
    result = {"task": "reflow", "ckpt": str(checkpoint), "objective": "dm", "steps": 70}
    (path.parent / "result.json").write_text(json.dumps(result))
    run("captions", checkpoint, path, "--n", 3, "--steps", 1, 3)
    rows = rows_of("runs/captions/captions.jsonl")
    assert [(row["model"], row["steps"], row["objective"], row["prediction"], row["cfg"], row["run"], row["step"])
            for row in rows] == [
        (str(checkpoint), 1, "fm", "v", 4, {}, None), (str(checkpoint), 3, "fm", "v", 4, {}, None),
        (str(path), 1, "dm", "eps", 1, result, 70), (str(path), 3, "dm", "eps", 1, result, 70)]
    assert rows[2]["straightness"] < 1e-9 < rows[3]["straightness"]             # one step always is a line


def test_the_path_of_ddim_starts_at_the_point_from_which_it_is_sampled(run, checkpoint, monkeypatch):
    paths = []
    monkeypatch.setattr(judge, "straightness", lambda points, grid: paths.append((points, grid)) or 0.0)
    run("captions", checkpoint, "--n", 2, "--steps", 2, "--objective", "dm", "--cfg", 1)
    (points, grid), = paths
    x0 = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (level[-1].item() for level in sd_schedule())
    assert len(points) == len(grid) == 3 and torch.allclose(points[0], x0 / (alpha + sigma), atol=1e-5)


def test_samples_are_compared_with_other_scenes_and_the_classifier_learns_from_none_of_both(run, checkpoint, monkeypatch):
    worlds, compared = [], []

    class Spied(Scenes):
        def __init__(self, n, height, width, style, seed):
            worlds.append(seed)
            super().__init__(n, height, width, style, seed)

    monkeypatch.setattr(judge, "Scenes", Spied)
    monkeypatch.setattr(judge, "frechet_distance", lambda *features: compared.extend(features) or 0.0)
    run("captions", checkpoint, *SHORT, "--seed", 7)
    held_out = judge.HELD_OUT_SEED + 7
    assert worlds == [judge.TRAIN_SEED, judge.TRAIN_SEED + 1, held_out]
    others = judge.pictures_and_labels([Scenes(11, 64, 64, "solid", held_out).scene(i) for i in range(3, 11)])[0]
    classifier = judge.load_classifier("solid", torch.device("cpu"))
    assert compared[0].shape == (3, 256) and torch.allclose(compared[1], classifier[:-1](others), atol=1e-5)


def test_samples_have_the_size_asked_for_and_the_classifier_sees_them_at_its_own(run, checkpoint, monkeypatch):
    latents, decode = [], StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda sd, x: latents.append(x.shape) or decode(sd, x))
    run("captions", checkpoint, *SHORT, "--size", 96, 128)
    row, = rows_of("runs/captions/captions.jsonl")
    assert row["size"] == [96, 128] and latents[-2:] == [(2, 4, 24, 32), (1, 4, 24, 32)]


def test_bf16_samples_are_close_to_float32_ones_but_not_the_same(run, checkpoint):
    rows = []
    for precision in ("fp32", "bf16"):
        run("captions", judge.BUNDLED_PRIOR, *SHORT, "--precision", precision)
        rows += rows_of("runs/captions/captions.jsonl")
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert rows[0]["straightness"] != rows[1]["straightness"] == pytest.approx(rows[0]["straightness"], rel=0.02)


def test_a_classifier_that_is_poor_or_of_another_version_is_refused_before_sampling(run, checkpoint, monkeypatch):
    monkeypatch.setattr(judge, "REQUIRED", 0.98)
    with pytest.raises(ValueError, match="right about only .* delete runs/classifier-solid"):
        run("captions", checkpoint, *SHORT)
    judge.save_tensors("runs/classifier-solid.safetensors", {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="of another version: delete it"):
        run("captions", checkpoint, *SHORT)
    assert not Path("runs/captions").exists()


def test_softened_pictures_are_other_pictures_but_not_very_other():
    images = real_pictures(32)[0]
    change = (judge.soften(images) - images).abs().mean((1, 2, 3))
    assert change.min() > 0.005 and change.max() < 0.3


@pytest.mark.parametrize("words, says", [
    (("--n", 1), "--n 1"), (("--steps", 2, 0), "--steps 0"), (("--size", 65), "multiples of"),
    (("--t-shift", 0.5), "add --objective dm")])
def test_bad_input_is_refused_before_anything_is_trained(run, checkpoint, words, says):
    with pytest.raises(ValueError, match=says):
        run("captions", checkpoint, *SHORT, *words)
    assert not Path("runs").exists()


def test_a_depth_model_and_a_picture_model_are_not_taken_for_each_other(run, checkpoint, depth_lora):
    for command, model in (("captions", depth_lora), ("depth", checkpoint)):
        with pytest.raises(ValueError, match="depth"):
            run(command, model, "--n", 2, "--steps", 1)
    assert not Path("runs").exists()


# ------------------------------------------------------------------ judge depth

def test_depth_is_measured_by_steps_and_ensemble(run, depth_lora):
    last = json.loads(run("depth", depth_lora, "--steps", 1, 2, "--ensemble", 1, 3, "--n", 2).splitlines()[-1])
    rows = rows_of("runs/depth-scenes/depth.jsonl")
    assert [(row["steps"], row["ensemble"]) for row in rows] == [(1, 1), (1, 3), (2, 1), (2, 3)] and rows[-1] == last
    assert len({row["absrel"] for row in rows}) == 4 and rows[0]["images"] == 2


def test_depth_is_perfect_up_to_an_affine_map_of_log_depth_and_noise_shows(run, depth_lora, monkeypatch):
    world = Scenes(3, 64, 64, "solid", judge.HELD_OUT_SEED)
    log_depth = torch.stack([torch.from_numpy(render(world.scene(i), 64, 64)[1]) for i in range(3)]).log()[:, None]
    for noise, low, high in ((0.0, 0, 1e-5), (0.05, 1e-3, 0.5)):
        decoded = 0.4 * log_depth - 0.7 + noise * torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(StableDiffusion, "decode", lambda sd, latents, decoded=decoded: decoded)
        run("depth", depth_lora, "--steps", 1, "--n", 3)
        row, = rows_of("runs/depth-scenes/depth.jsonl")
        assert low <= row["absrel"] <= high
