"""depth.py: data sets with depth are read as they are meant, predictions are what they should be, and so are errors."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import depth
from model import TINY, StableDiffusion
from sample import noises
from toy.scenes import Scenes


def save_rgb(path, height=48, width=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_png16(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


def save_ramp(folder, height=60, width=80):
    """a.png, whose brightness rises from left to right, and a.npy with depth = exp(brightness)."""
    brightness = np.tile(np.linspace(1, 255, width).round(), (height, 1))
    Image.fromarray(np.stack([brightness] * 3, -1).astype(np.uint8)).save(folder / "a.png")
    np.save(folder / "a.npy", np.exp(brightness / 255))


def item_of(folder):
    return depth.DepthFolders([folder], None, 48, 64)[0]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(words) of `python depth.py` -> the lines that it printed."""
    def run_command(*words):
        monkeypatch.setattr(sys, "argv", ["depth.py", *map(str, words)])
        depth.main()
        return capsys.readouterr().out.splitlines()

    return run_command


# ------------------------------------------------------------------ data sets with depth

def test_hypersims_distances_become_depths_along_the_cameras_axis_and_its_holes_are_invalid(tmp_path):
    import h5py
    x, y = np.arange(1024) - 511.5, np.arange(768) - 383.5
    distance = 5 * np.sqrt(1 + (x[None] ** 2 + y[:, None] ** 2) / 886.81**2)        # a wall 5 m before the camera
    distance[:200] = np.nan
    path = tmp_path / "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0007.depth_meters.hdf5"
    save_rgb(tmp_path / "ai_001_001/images/scene_cam_00_final_preview/frame.0007.tonemap.jpg", 768, 1024)
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["dataset"] = distance
    (_, _, layout), = depth.find_depth(tmp_path)
    assert np.allclose(depth.read_depth(path, layout.unit)[200:], 5)
    valid = item_of(tmp_path)["valid"][0]
    assert not valid[:12].any() and valid[13:].all()                        # 200 of 768 rows are 12.5 of 48


@pytest.mark.parametrize("name, picture, far, unit", [
    ("ai_001_001/depth_plane_cam_00_fr0000.png", "ai_001_001/rgb_cam_00_fr0000.png", 65_001, 1e-3),
    ("clone/frames/depth/Camera_0/depth_00000.png", "clone/frames/rgb/Camera_0/rgb_00000.jpg", 8_001, 1e-2),
], ids=["Hypersim as Marigold's PNGs", "Virtual KITTI 2"])
def test_published_pngs_have_units_and_their_missing_and_far_pixels_are_invalid(tmp_path, name, picture, far, unit):
    values = np.full((48, 64), 2000)
    values[:10], values[10:20], values[20:23] = far, 0, far - 2
    save_png16(tmp_path / name, values)
    save_rgb(tmp_path / picture)
    (found, path, layout), = depth.find_depth(tmp_path)
    assert found == tmp_path / picture and depth.read_depth(path, layout.unit)[30, 30] == pytest.approx(2000 * unit)
    valid = item_of(tmp_path)["valid"][0]
    assert not valid[:20].any() and valid[20:].all()


def test_a_plain_folder_has_npy_or_16_bit_png_beside_each_picture(tmp_path):
    save_rgb(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.full((48, 64), 3.0))
    save_rgb(tmp_path / "sub/b.jpg")
    save_png16(tmp_path / "sub/b.png", np.full((48, 64), 7))
    save_rgb(tmp_path / "lonely.jpg")
    found = {(picture.name, path.name) for picture, path, _ in depth.find_depth(tmp_path)}
    assert found == {("a.png", "a.npy"), ("b.jpg", "b.png")}


def test_log_depth_has_its_quantiles_at_minus_one_and_one_whatever_the_unit_and_invalid_pixels_are_one():
    generator = torch.Generator().manual_seed(0)
    metres = torch.rand(1, 64, 64, generator=generator) * 9 + 1
    valid = torch.rand(1, 64, 64, generator=generator) > 0.2
    metres[~valid] = 1e9
    result = depth.normalise_depth(metres, valid)
    logs = metres[valid].double().log().numpy()
    low, high = np.quantile(logs, 0.01), np.quantile(logs, 0.99)
    expected = np.clip((logs - low) / (high - low), 0, 1) * 2 - 1
    assert np.allclose(result[valid].numpy(), expected, atol=1e-5) and (result[~valid] == 1).all()
    assert torch.allclose(result, depth.normalise_depth(metres * 1000, valid), atol=1e-5)


def test_a_picture_of_one_depth_or_of_none_has_finite_log_depth():
    wall, everywhere = torch.full((1, 8, 8), 3.0), torch.ones(1, 8, 8, dtype=torch.bool)
    assert depth.normalise_depth(wall, everywhere).isfinite().all()
    assert (depth.normalise_depth(wall, ~everywhere) == 1).all()


@pytest.mark.parametrize("size", [(32, 32), (24, 64)])
def test_picture_and_depth_are_cropped_and_flipped_together(tmp_path, size):
    save_ramp(tmp_path)
    folder, flips, crops = depth.DepthFolders([tmp_path], None, *size), set(), set()
    for key in range(8):
        item = folder[key]
        red, log_depth = item["image"][0], item["depth"][0]
        assert np.corrcoef(red.flatten(), log_depth.flatten())[0, 1] > 0.999
        flips.add(bool(log_depth[0, 0] > log_depth[0, -1]))
        crops.add(round(red.mean().item(), 4))
    assert flips == {True, False}
    assert len(crops) > 4 or size == (24, 64)                               # a wider crop has the whole width


@pytest.mark.parametrize("size", [(60, 40), (30, 80)])
def test_holes_are_where_they_were_in_the_picture_after_crop_and_flip(tmp_path, size):
    white_where_valid = np.full((60, 80), 255, np.uint8)
    white_where_valid[:30, :40] = 0
    Image.fromarray(white_where_valid).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.where(white_where_valid == 255, 3.0, np.nan))
    folder = depth.DepthFolders([tmp_path], None, *size)
    for item in (folder[key] for key in range(8)):
        assert (item["valid"][0] == (item["image"][0] > 0)).float().mean() > 0.96       # all but the edge


def test_an_item_depends_on_seed_and_key_alone(tmp_path):
    save_ramp(tmp_path)
    items = [depth.DepthFolders([tmp_path], None, 16, 16, seed)[key] for seed, key in ((1, 5), (1, 5), (1, 6), (2, 5))]
    same = [torch.equal(items[0]["image"], item["image"]) for item in items]
    assert same == [True, True, False, False]
    assert items[0]["caption"] == "" and items[0]["valid"].shape == items[0]["depth"].shape == (1, 16, 16)


@pytest.mark.parametrize("weights, share", [([90, 10], 0.1), (None, 0.75)])
def test_folders_are_drawn_from_by_their_weights_or_else_by_their_numbers_of_pictures(tmp_path, weights, share):
    for name, value, n in ("dark", 0, 1), ("bright", 255, 3):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / name / f"{i}.png")
            np.save(tmp_path / name / f"{i}.npy", np.ones((8, 8)))
    folders = depth.DepthFolders([tmp_path / "dark", tmp_path / "bright"], weights, 8, 8)
    assert len(folders) == 4
    assert np.mean([folders[key]["image"].mean().item() > 0 for key in range(400)]) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("make, says", [
    (lambda folder: np.save(folder / "a.npy", np.ones((48, 63))), "64x48, its depth .* 63x48"),
    (lambda folder: np.save(folder / "a.npy", np.ones((48, 64, 3))), "one number a pixel"),
    (lambda folder: (folder / "a.npy").write_bytes(b"no depth"), "cannot be read as depth"),
    (lambda folder: None, "no picture with a depth file"),
], ids=["another size", "colours", "damaged", "none"])
def test_depth_that_does_not_fit_its_picture_is_named(tmp_path, make, says):
    save_rgb(tmp_path / "a.png")
    make(tmp_path)
    with pytest.raises(ValueError, match=says):
        item_of(tmp_path)


def test_a_picture_without_a_valid_depth_gives_way_to_the_next_and_is_said_once(tmp_path, capsys):
    for name, metres in ("a", np.nan), ("b", 3.0), ("c", 0.0):
        save_rgb(tmp_path / f"{name}.png")
        np.save(tmp_path / f"{name}.npy", np.full((48, 64), metres))
    for seed in range(2):
        items = depth.DepthFolders([tmp_path], None, 48, 64, seed)
        assert len(items) == 3 and all(items[key]["valid"].all() for key in range(9))
        error = capsys.readouterr().err
        assert error.count(f"{tmp_path}/a.npy: no pixel has a valid depth") == error.count("c.npy: no pixel has") == 1
        assert torch.equal(depth.DepthFolders([tmp_path], None, 48, 64, seed)[7]["image"], items[7]["image"])
        capsys.readouterr()
    (tmp_path / "b.npy").unlink()
    with pytest.raises(ValueError, match="none of the 2 depth files has a valid pixel, last .*npy"):
        item_of(tmp_path)


def test_without_h5py_its_name_and_use_are_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        depth.read_depth(tmp_path / "x.hdf5")


@pytest.mark.parametrize("weights", [[1, 2], [0], [-1], [float("nan")], [float("inf")]])
def test_weights_are_one_for_each_folder_and_above_0(tmp_path, weights):
    with pytest.raises(ValueError, match="for 1 folders: one for each, above 0"):
        depth.DepthFolders([tmp_path], weights, 8, 8)


def test_scenes_have_items_like_those_of_folders():
    scenes, item = Scenes(9, 32, 48, "solid", 3), depth.DepthScenes(9, 32, 48, "solid", 3)[4]
    assert item["valid"].all() and item["valid"].shape == (1, 32, 48) and item["caption"] == ""
    assert torch.equal(item["image"], scenes[4]["image"])
    assert torch.equal(item["depth"], depth.normalise_depth(scenes[4]["depth"], item["valid"]))


# ------------------------------------------------------------------ prediction

class Glass:
    """Stands for a model of 32x48 pixels whose latents are the picture: see `through_glass`."""
    multiple = 8

    def picture_size(self, size):
        return (32, 48) if size is None else (size[0], size[-1])

    def encode(self, images):
        return images


@pytest.fixture
def through_glass(monkeypatch):
    """Predictions that are the picture plus a hundredth of the noise -> list of the latents that were sampled from."""
    def draw(sd, flow, x0, latents, steps):
        seen.append(latents)
        return latents + x0 / 100

    seen = []
    monkeypatch.setattr(depth, "draw", draw)
    return seen


@pytest.mark.parametrize("height, width", [(50, 90), (90, 50)])
def test_a_prediction_has_its_pictures_own_size_and_direction(through_glass, height, width):
    dark_to_bright = np.linspace(20, 235, height)[:, None] + np.linspace(-20, 20, width)
    image = Image.fromarray(np.stack([dark_to_bright] * 3, -1).astype(np.uint8))
    prediction = depth.predict(Glass(), None, image, steps=1)
    assert prediction.shape == (height, width)
    assert np.abs(prediction.numpy() - (dark_to_bright / 127.5 - 1)).max() < 0.1


def test_a_prediction_is_the_mean_over_channels_and_over_an_ensemble_each_from_seed_and_number(through_glass):
    image = Image.new("RGB", (48, 32), (255, 0, 0))                         # channels 1, -1, -1
    prediction = depth.predict(Glass(), None, image, steps=1, ensemble=3, seed=5)
    noise = torch.stack([noises([i], (3, 32, 48), 5)[0] for i in range(3)])
    assert torch.allclose(prediction, -1 / 3 + noise.mean((0, 1)) / 100, atol=1e-6)
    assert len(through_glass) == 3


def test_a_prediction_stays_within_minus_one_and_one(through_glass):
    for colour, end in ("white", 1), ("black", -1):
        prediction = depth.predict(Glass(), None, Image.new("RGB", (48, 32), colour), steps=1)
        assert prediction.abs().max() == 1 and (prediction == end).float().mean() > 0.3


@pytest.mark.parametrize("picture, size, seen", [
    ((50, 333), None, (16, 104)),               # 1,536 pixels in that shape would be 15.2x101.2: the nearest eights
    ((3, 999), None, (8, 712)),                 # and at least eight
    ((50, 333), [24, 40], (24, 40))])
def test_the_network_sees_as_many_pixels_as_in_training_or_the_size_asked_for(through_glass, picture, size, seen):
    depth.predict(Glass(), None, Image.new("RGB", picture[::-1]), steps=1, size=size)
    assert through_glass[0].shape == (1, 3, *seen)


def test_saved_depth_is_0_near_and_65535_far_in_16_bits_and_yellow_near_and_black_far_in_colour(tmp_path):
    ramp = np.linspace(-1, 1, 11, dtype=np.float32)[None].repeat(2, 0)
    depth.save_depth(tmp_path / "sub/a.b", ramp, "a test")
    assert np.array_equal(np.load(tmp_path / "sub/a.b.npy"), ramp)
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["a.b.npy", "a.b_16bit.png", "a.b_colour.png"]
    levels = np.asarray(Image.open(tmp_path / "sub/a.b_16bit.png"))
    assert levels[0, 0] == 0 and levels[0, -1] == 65535 and np.allclose(levels / 32767.5 - 1, ramp, atol=2e-5)
    colour = np.asarray(Image.open(tmp_path / "sub/a.b_colour.png"))
    assert colour[0, [0, 2, 10]].tolist() == [[252, 253, 191], [254, 159, 109], [0, 0, 4]]     # at -1, -0.6 and 1


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory):
    """The file of a random depth model that says of itself that it was trained with dm."""
    torch.manual_seed(0)
    sd = StableDiffusion(TINY, "v")
    sd.add_picture_input()
    for parameter in sd.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    sd.save(path, torch.float16, resolution="32", task="depth", objective="dm")
    return path


def test_the_command_writes_depth_for_pictures_and_folders_at_their_own_sizes(run, depth_model, tmp_path):
    save_rgb(tmp_path / "in/wide.jpg", 50, 133)
    save_rgb(tmp_path / "in/sub/tall.png", 97, 41)
    Image.new("RGBA", (60, 40), (200, 30, 30, 100)).save(tmp_path / "alpha.png")
    run(tmp_path / "in", tmp_path / "alpha.png", "--steps", 2, "--ensemble", 2, "--ckpt", depth_model,
        "--device", "cpu", "--out", tmp_path / "out")
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 9
    for name, shape in ("wide", (50, 133)), ("sub/tall", (97, 41)), ("alpha", (40, 60)):
        prediction = np.load(tmp_path / f"out/{name}.npy")
        assert prediction.shape == shape and prediction.dtype == np.float32
        assert abs(prediction).max() <= 1 and prediction.std() > 0.001


def test_a_depth_model_is_sampled_by_algorithm_2_whatever_it_was_trained_with(run, depth_model, tmp_path):
    save_rgb(tmp_path / "a.png", 32, 32)

    def predict(*words):
        run(tmp_path / "a.png", "--ckpt", depth_model, "--steps", 2, "--device", "cpu", "--out", tmp_path, *words)
        return np.load(tmp_path / "a.npy")

    plain = predict()
    assert np.array_equal(plain, predict("--objective", "diff2flow"))
    assert not np.allclose(plain, predict("--objective", "dm"), atol=1e-3)
    assert not np.allclose(plain, predict("--seed", 1), atol=1e-3)


def test_without_a_depth_model_the_error_says_what_to_train_or_name(run, tmp_path, monkeypatch):
    save_rgb(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train.py --task depth.*--lora.*--ckpt"):
        run("a.png", "--device", "cpu")
    assert not Path("depth").exists()


@pytest.mark.parametrize("words, says", [
    (["none.png"], "none.png: no such file"), (["empty"], "empty has no picture"),
    (["a.png", "in"], "would be written to the same a.npy"), (["a.png", "--ensemble", 0], "--ensemble 0"),
    (["a.png", "--list", "list.txt"], "--truth"), (["a.png", "in", "--truth", "in"], "one folder of predictions")])
def test_words_that_make_no_sense_are_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(depth, "load_flow", lambda *_, **__: pytest.fail("loaded a model before it failed"))
    save_rgb(tmp_path / "a.png")
    save_rgb(tmp_path / "in/a.jpg")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=says):
        run(*words)


# ------------------------------------------------------------------ errors of predictions

NAMES = ("a", "b", "sub/c")


@pytest.fixture
def measured(tmp_path):
    """truth/: three pictures with depth, some of it invalid; pred/: noisy predictions, affine in log depth."""
    rng = np.random.default_rng(0)
    (tmp_path / "pred/sub").mkdir(parents=True)
    for name, holes in zip(NAMES, (0.1, 0.5, 0.8)):
        save_rgb(tmp_path / f"truth/{name}.jpg")
        truth = rng.uniform(1, 9, (48, 64))
        np.save(tmp_path / f"pred/{name}.npy", 0.7 * np.log(truth) - 0.4 + rng.normal(0, 0.1, truth.shape))
        truth[rng.random(truth.shape) < holes] = rng.choice([np.nan, np.inf, 0, -1])
        np.save(tmp_path / f"truth/{name}.npy", truth)
    return tmp_path


@pytest.fixture
def measure(run):
    """measure(folder, words) -> the results, from the JSON line at the end."""
    return lambda folder, *words: json.loads(run(folder / "pred", "--truth", folder / "truth", *words)[-1])


@pytest.mark.parametrize("space, forward, back", [
    ("log", np.log, np.exp), ("depth", lambda d: d, lambda d: d), ("disparity", lambda d: 1 / d, lambda d: 1 / d)])
def test_errors_equal_those_of_an_independent_fit_and_are_means_over_pixels_then_over_pictures(
        measured, measure, space, forward, back):
    expected = []
    for name in NAMES:
        d, p = np.load(measured / f"truth/{name}.npy"), np.load(measured / f"pred/{name}.npy")
        valid = np.isfinite(d) & (d > 1e-5)
        d, p = d[valid], p[valid]
        slope, shift = np.polyfit(p, forward(d), 1)
        fitted = slope * p + shift
        q = np.clip(back(np.maximum(fitted, 1e-3) if space == "disparity" else fitted), 1e-5, None)
        ratio = np.maximum(q / d, d / q)
        expected.append((np.mean(abs(q - d) / d), np.mean(ratio < 1.25), np.mean((q - d) ** 2) ** 0.5))
    result = measure(measured, "--align", space)
    assert (result["absrel"], result["delta1"], result["rmse"]) == pytest.approx(tuple(np.mean(expected, 0)), rel=1e-6)
    assert result["images"] == 3 and result["align"] == space


def test_a_prediction_affine_in_log_depth_is_perfect_when_aligned_in_log_depth_which_is_the_default(measured, measure):
    for name in NAMES:
        truth = np.nan_to_num(np.load(measured / f"truth/{name}.npy"), posinf=1)
        np.save(measured / f"pred/{name}.npy", 2 - 0.3 * np.log(np.maximum(truth, 0.1)))
    result = measure(measured)
    assert result["absrel"] < 1e-6 and result["delta1"] == 1
    assert measure(measured, "--align", "depth")["absrel"] > 0.05 < measure(measured, "--align", "disparity")["absrel"]


def test_a_prediction_of_another_size_is_scaled_to_the_truth(measured, measure):
    y, x = np.mgrid[0:1:48j, 0:1:64j]
    for name in NAMES:
        np.save(measured / f"truth/{name}.npy", np.exp(1 + x - y))
        np.save(measured / f"pred/{name}.npy", np.kron(x - y, np.ones((3, 2))))
    assert measure(measured)["absrel"] < 2e-3                               # of the resampling alone


def test_the_unit_of_the_truth_can_be_given(measured, measure):
    assert measure(measured, "--scale", 10)["rmse"] == pytest.approx(10 * measure(measured)["rmse"], rel=1e-3)


def test_an_aligned_prediction_is_clipped_to_the_data_sets_range():
    aligned, truth, valid = np.array([[99.0, -5.0, 4.0]]), np.array([[8.0, 2.0, 4.0]]), np.array([[True, True, True]])
    errors = depth.depth_errors(aligned, truth, valid, near=1, far=10)
    assert errors["absrel"] == pytest.approx((2 / 8 + 1 / 2 + 0) / 3) and errors["delta1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("dataset, unit, shape, truth_shape, top, bottom, left, right", [
    ("nyu", 1000, (480, 640), (480, 640), 45, 471, 41, 601), ("scannet", 1000, (480, 640), (480, 640), 0, 480, 0, 640),
    ("kitti", 256, (375, 1242), (352, 1216), 117, 321, 43, 1172)])
def test_each_data_set_has_its_unit_and_its_crop(tmp_path, dataset, unit, shape, truth_shape, top, bottom, left, right):
    values = np.random.default_rng(0).integers(2 * unit, 8 * unit, shape)
    save_png16(tmp_path / "x.png", values)
    metres, valid = depth.read_truth(tmp_path, dataset, "x.png")
    inside = np.zeros(truth_shape, bool)
    inside[top:bottom, left:right] = True
    assert np.array_equal(valid, inside)
    if dataset == "kitti":
        values = values[375 - 352:, 13:13 + 1216]                           # the benchmark's crop: below, in the middle
    assert np.allclose(metres[valid], values[valid] / unit, rtol=1e-6)


@pytest.mark.parametrize("dataset, near, far", [
    ("nyu", 0.001, 10), ("scannet", 0.001, 10), ("kitti", 1e-5, 80), ("diode", 0.6, 350), ("plain", 1e-5, np.inf)])
def test_depth_outside_a_data_sets_range_is_invalid(tmp_path, dataset, near, far):
    metres = np.full(depth.PROTOCOLS[dataset].shape or (375, 1242), 5, np.float32)
    metres[250, 500:504] = 0.99 * near, 1.01 * near, min(0.99 * far, 1e6), 1.01 * far
    np.save(tmp_path / "x.npy", metres)
    valid = depth.read_truth(tmp_path, dataset, "x.npy", unit=1)[1]
    row, column = (250, 500) if dataset != "kitti" else (250 - 23, 500 - 13)
    assert valid[row, column - 1:column + 5].tolist() == [True, False, True, True, False, True]


def test_a_kitti_prediction_of_a_full_picture_is_cropped_like_the_truth_and_a_smaller_one_refused(measure, tmp_path):
    values = np.random.default_rng(0).integers(512, 2048, (375, 1242))
    save_png16(tmp_path / "truth/x.png", values)
    (tmp_path / "pred").mkdir()
    (tmp_path / "list.txt").write_text("x.jpg x.png\ny.jpg None\n")
    words = "--dataset", "kitti", "--list", tmp_path / "list.txt"
    for prediction in np.log(values), np.log(values)[23:, 13:1229]:
        np.save(tmp_path / "pred/x.npy", prediction)
        result = measure(tmp_path, *words)
        assert result["absrel"] < 1e-6 and result["images"] == 1            # y.jpg has no truth
    np.save(tmp_path / "pred/x.npy", np.log(values)[::2, ::2])
    with pytest.raises(ValueError, match="188x621 pixels are fewer than KITTI's 352x1216"):
        measure(tmp_path, *words)


def test_diodes_mask_is_the_third_word_of_a_line(measure, tmp_path):
    values = np.random.default_rng(0).uniform(1, 9, (768, 1024))
    mask = np.arange(768) >= 320
    for folder in "truth", "pred":
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "truth/x.npy", values[..., None])
    np.save(tmp_path / "truth/mask.npy", np.tile(mask[:, None], 1024).astype(np.float32))
    np.save(tmp_path / "pred/x.npy", np.where(mask[:, None], np.log(values), 0))
    results = []
    for line in "x.png x.npy mask.npy", "x.png x.npy":
        (tmp_path / "list.txt").write_text(line + "\n")
        results.append(measure(tmp_path, "--dataset", "diode", "--list", tmp_path / "list.txt")["absrel"])
    assert results[0] < 1e-6 and results[1] > 0.1


def test_eth3d_is_raw_float32_whose_holes_are_infinite(tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "ETH3D_SHAPE", (6, 8))
    metres = np.random.default_rng(0).uniform(1, 50, (6, 8)).astype(np.float32)
    metres[0] = np.inf
    metres.tofile(tmp_path / "x")
    found, valid = depth.read_truth(tmp_path, "eth3d", "x")
    assert not valid[0].any() and valid[1:].all() and np.array_equal(found[1:], metres[1:])
    metres[:5].tofile(tmp_path / "x")
    with pytest.raises(ValueError, match="40 numbers, not ETH3D's 6x8"):
        depth.read_truth(tmp_path, "eth3d", "x")


def test_a_missing_prediction_and_a_line_without_depth_are_named(measured, measure):
    (measured / "pred/b.npy").unlink()
    with pytest.raises(ValueError, match="pred/b.npy"):
        measure(measured)
    (measured / "list.txt").write_text("a.jpg a.npy\nb.jpg\n")
    with pytest.raises(ValueError, match="list.txt.*'b.jpg' alone"):
        measure(measured, "--list", measured / "list.txt")


def test_what_cannot_be_measured_is_named(measured, measure):
    for dataset, shape in ("nyu", "480x640"), ("diode", "768x1024"), ("kitti", "352x1216"):
        with pytest.raises(ValueError, match=f"48x64.*{shape}"):
            measure(measured, "--dataset", dataset)
    for scale in "0", "-1", "nan", "inf":
        with pytest.raises(ValueError, match=f"--scale {scale}: it must be"):
            measure(measured, f"--scale={scale}")
    np.save(measured / "pred/a.npy", np.full((48, 64), np.nan))
    with pytest.raises(ValueError, match="pred/a.npy holds NaN or infinity"):
        measure(measured)


@pytest.mark.parametrize("make, says", [(lambda path: np.save(path, np.ones((3, 4))), r"shape \(3, 4\) for a depth of"),
                                        (lambda path: path.write_bytes(b""), "cannot be read as a mask")])
def test_a_mask_that_does_not_fit_is_named(tmp_path, make, says):
    make(tmp_path / "mask.npy")
    with pytest.raises(ValueError, match=f"mask.npy.* {says}"):
        depth.read_mask(tmp_path / "mask.npy", (768, 1024))


# ------------------------------------------------------------------ files that are no depth

def test_an_hdf5_that_leads_to_other_files_is_refused(tmp_path):
    import h5py
    (tmp_path / "secret").write_bytes(bytes(768 * 1024 * 4))
    with h5py.File(tmp_path / "whole.hdf5", "w") as file:
        file["dataset"] = np.ones((768, 1024), np.float32)
    with h5py.File(tmp_path / "link.hdf5", "w") as file:
        file["dataset"] = h5py.ExternalLink(str(tmp_path / "whole.hdf5"), "dataset")
    with h5py.File(tmp_path / "external.hdf5", "w") as file:
        file.create_dataset("dataset", (768, 1024), "f4", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])
    assert depth.read_depth(tmp_path / "whole.hdf5").shape == (768, 1024)
    for name, says in ("link", "is a link, to another file perhaps"), ("external", "stored in other files"):
        with pytest.raises(ValueError, match=f"{name}.hdf5 cannot be read as depth: .*{says}"):
            depth.read_depth(tmp_path / f"{name}.hdf5")


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB"])
def test_a_png_of_other_than_16_bits_is_no_depth(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=f"x.png cannot be read as depth: a picture of mode {mode}, where depth is"):
        depth.read_depth(tmp_path / "x.png")


@pytest.mark.parametrize("numbers", [np.ones((3, 4), complex), np.ones((3, 4), bool), np.ones((3, 4), [("a", "f4")])],
                         ids=["complex", "bool", "record"])
def test_an_array_of_other_than_real_numbers_is_no_depth(tmp_path, numbers):
    np.save(tmp_path / "x.npy", numbers)
    with pytest.raises(ValueError, match="x.npy holds .*: depth is a real number a pixel; save it as float32"):
        depth.read_depth(tmp_path / "x.npy")
