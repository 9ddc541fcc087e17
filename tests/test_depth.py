"""depth.py and support/depth_files.py: data sets with depth, which of their pictures are held out, and predictions."""
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import depth
from data import noises
from model import TINY, StableDiffusion
from support.checkpoint import save_checkpoint
from support.depth_files import find_depth, read_depth
from toy.scenes import Scenes


def save_rgb(path, height=48, width=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_png16(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


def save_ramp(folder, height=60, width=80):
    """Write a.png, whose brightness rises from left to right, and a.npy with depth = exp(brightness)."""
    brightness = np.tile(np.linspace(1, 255, width).round(), (height, 1))
    Image.fromarray(np.stack([brightness] * 3, -1).astype(np.uint8)).save(folder / "a.png")
    np.save(folder / "a.npy", np.exp(brightness / 255))


def item_of(folder):
    return depth.DepthFolders([folder], None, 48, 64)[0]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(words) runs `python depth.py` -> the lines that it prints."""
    def run_command(*words):
        monkeypatch.setattr(sys, "argv", ["depth.py", *map(str, words)])
        depth.main()
        return capsys.readouterr().out.splitlines()

    return run_command


# ------------------------------------------------------------------ data sets with depth

def test_hypersims_distances_become_depth_along_the_viewing_axis_and_holes_are_invalid(tmp_path):
    import h5py
    x, y = np.arange(1024) - 511.5, np.arange(768) - 383.5
    distance = 5 * np.sqrt(1 + (x[None] ** 2 + y[:, None] ** 2) / 886.81**2)        # a wall 5 m in front of the camera
    distance[:200] = np.nan
    path = tmp_path / "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0007.depth_meters.hdf5"
    save_rgb(tmp_path / "ai_001_001/images/scene_cam_00_final_preview/frame.0007.tonemap.jpg", 768, 1024)
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["dataset"] = distance
    (_, _, layout), = find_depth(tmp_path)
    assert np.allclose(read_depth(path, layout.unit)[200:], 5)
    valid = item_of(tmp_path)["valid"][0]
    assert not valid[:12].any() and valid[13:].all()                        # 200 of 768 rows are 12.5 of 48


@pytest.mark.parametrize("name, picture, far, unit", [
    ("ai_001_001/depth_plane_cam_00_fr0000.png", "ai_001_001/rgb_cam_00_fr0000.png", 65_001, 1e-3),
    ("clone/frames/depth/Camera_0/depth_00000.png", "clone/frames/rgb/Camera_0/rgb_00000.jpg", 8_001, 1e-2),
], ids=["Hypersim as Marigold's PNGs", "Virtual KITTI 2"])
def test_published_pngs_are_read_in_their_units_with_missing_and_far_pixels_invalid(tmp_path, name, picture, far, unit):
    values = np.full((48, 64), 2000)
    values[:10], values[10:20], values[20:23] = far, 0, far - 2
    save_png16(tmp_path / name, values)
    save_rgb(tmp_path / picture)
    (found, path, layout), = find_depth(tmp_path)
    assert found == tmp_path / picture and read_depth(path, layout.unit)[30, 30] == pytest.approx(2000 * unit)
    valid = item_of(tmp_path)["valid"][0]
    assert not valid[:20].any() and valid[20:].all()


def test_a_plain_folder_has_a_npy_or_16_bit_png_beside_each_picture(tmp_path):
    save_rgb(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.full((48, 64), 3.0))
    save_rgb(tmp_path / "sub/b.jpg")
    save_png16(tmp_path / "sub/b.png", np.full((48, 64), 7))
    save_rgb(tmp_path / "lonely.jpg")
    found = {(picture.name, path.name) for picture, path, _ in find_depth(tmp_path)}
    assert found == {("a.png", "a.npy"), ("b.jpg", "b.png")}


def test_log_depth_has_its_quantiles_at_minus_1_and_1_in_any_unit_and_invalid_pixels_are_1():
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


def test_a_picture_of_constant_or_no_depth_has_finite_log_depth():
    wall, everywhere = torch.full((1, 8, 8), 3.0), torch.ones(1, 8, 8, dtype=torch.bool)
    assert depth.normalise_depth(wall, everywhere).isfinite().all()
    assert (depth.normalise_depth(wall, ~everywhere) == 1).all()


@pytest.mark.parametrize("size", [(32, 32), (24, 64)])
def test_picture_and_depth_are_cropped_and_flipped_together(tmp_path, size):
    save_ramp(tmp_path)
    folder, flips, crops = depth.DepthFolders([tmp_path], None, *size), set(), set()
    for key in range(8):
        item = folder[key]
        red, log_depth = item["image"][0].float(), item["depth"][0]
        assert np.corrcoef(red.flatten(), log_depth.flatten())[0, 1] > 0.999
        flips.add(bool(log_depth[0, 0] > log_depth[0, -1]))
        crops.add(round(red.mean().item(), 4))
    assert flips == {True, False}
    assert len(crops) > 4 or size == (24, 64)                               # a wide crop takes the whole width


@pytest.mark.parametrize("size", [(60, 40), (30, 80)])
def test_holes_are_cropped_and_flipped_with_the_picture(tmp_path, size):
    white_where_valid = np.full((60, 80), 255, np.uint8)
    white_where_valid[:30, :40] = 0
    Image.fromarray(white_where_valid).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.where(white_where_valid == 255, 3.0, np.nan))
    folder = depth.DepthFolders([tmp_path], None, *size)
    for item in (folder[key] for key in range(8)):
        assert (item["valid"][0] == (item["image"][0] > 127)).float().mean() > 0.96       # all except the edge


def test_an_item_depends_on_seed_and_key_alone(tmp_path):
    save_ramp(tmp_path)
    items = [depth.DepthFolders([tmp_path], None, 16, 16, seed)[key] for seed, key in ((1, 5), (1, 5), (1, 6), (2, 5))]
    same = [torch.equal(items[0]["image"], item["image"]) for item in items]
    assert same == [True, True, False, False]
    assert items[0]["caption"] == "" and items[0]["valid"].shape == items[0]["depth"].shape == (1, 16, 16)


@pytest.mark.parametrize("weights, share", [([90, 10], 0.1), (None, 0.75)])
def test_folders_are_drawn_by_their_weights_or_by_their_numbers_of_pictures(tmp_path, weights, share):
    for name, value, n in ("dark", 0, 1), ("bright", 255, 3):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / name / f"{i}.png")
            np.save(tmp_path / name / f"{i}.npy", np.ones((8, 8)))
    folders = depth.DepthFolders([tmp_path / "dark", tmp_path / "bright"], weights, 8, 8)
    assert len(folders) == 4
    assert np.mean([folders[key]["image"].max().item() > 0 for key in range(400)]) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("make, message", [
    (lambda folder: np.save(folder / "a.npy", np.ones((48, 63))), "64x48, its depth .* 63x48"),
    (lambda folder: np.save(folder / "a.npy", np.ones((48, 64, 3))), "one number per pixel"),
    (lambda folder: (folder / "a.npy").write_bytes(b"no depth"), "a.npy: not depth, or damaged"),
    (lambda folder: None, "no picture with a depth file"),
], ids=["another size", "colours", "damaged", "none"])
def test_depth_that_does_not_fit_its_picture_is_refused(tmp_path, make, message):
    save_rgb(tmp_path / "a.png")
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        item_of(tmp_path)


def test_a_picture_without_valid_depth_is_replaced_by_the_next_with_one_warning(tmp_path, capsys):
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
    with pytest.raises(ValueError, match="none of the 2 pictures with depth can be used, last: .*npy: no pixel has"):
        item_of(tmp_path)


@pytest.mark.parametrize("picture, path", [
    ("vkitti_2.0.3_rgb/Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg",
     "vkitti_2.0.3_depth/Scene01/clone/frames/depth/Camera_0/depth_00000.png"),
    ("rgb/00001.jpg", "depth/00001.png"), ("00019_indoors.png", "00019_indoors_depth.npy"), ("A.JPG", "A.npy")],
    ids=["Virtual KITTI 2 in two folders", "two folders", "DIODE", "upper case"])
def test_depth_files_of_other_layouts_are_found(tmp_path, picture, path, capsys):
    save_rgb(tmp_path / "x.png")
    for name in picture, path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / "x.png", tmp_path / picture)
    if path.endswith(".png"):
        save_png16(tmp_path / path, np.full((48, 64), 300))
    else:
        np.save(tmp_path / path, np.full((48, 64, 1), 3.0))
    (found, depth_file, layout), = find_depth(tmp_path)
    assert (found, depth_file) == (tmp_path / picture, tmp_path / path) and item_of(tmp_path)["valid"].all()
    assert layout.unit == (0.01 if "vkitti" in path else 1) and capsys.readouterr().err == ""


def test_pictures_without_depth_and_depth_without_a_picture_are_counted(tmp_path, capsys):
    for i in range(4):
        save_png16(tmp_path / f"clone/frames/depth/Camera_0/depth_0000{i}.png", np.full((48, 64), 300))
    for name in "clone/frames/rgb/Camera_0/rgb_00000.jpg", "a.jpg", "b.png":
        save_rgb(tmp_path / name)
    np.save(tmp_path / "c.npy", np.ones((48, 64)))
    (tmp_path / "d.heic").write_bytes(b"")
    assert len(find_depth(tmp_path)) == 1
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: 1 pictures with depth; 1 of other kinds: 1 .heic (first {tmp_path}/d.heic); 2 pictures "
        f"without depth (first {tmp_path}/a.jpg); 4 depth files without a picture (first {tmp_path}/c.npy)\n")
    for path in (tmp_path / "clone/frames/rgb/Camera_0").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="with a depth file: .*; 2 pictures without depth .*; 5 depth files"):
        find_depth(tmp_path)


@pytest.mark.parametrize("how", ["depth cut off", "another size", "picture cut off", "picture gone", "depth gone"])
def test_a_picture_or_depth_file_that_cannot_be_used_is_replaced_by_the_next_with_one_warning(tmp_path, how, capsys):
    save_pictures(tmp_path, range(30))
    chosen = sorted(levels_of(depth.DepthFolders([tmp_path], None, 8, 8).hold_out(3)[0]))[0]
    folders = depth.DepthFolders([tmp_path], None, 8, 8)
    for level in chosen, min(set(range(30)) - {chosen}):
        picture, path = tmp_path / f"{level}.png", tmp_path / f"{level}.npy"
        if how == "another size":
            np.save(path, np.ones((8, 15)))
        else:
            broken = path if how.startswith("depth") else picture
            broken.write_bytes(broken.read_bytes()[:50]) if how.endswith("off") else broken.unlink()
    items, words = folders.hold_out(3)
    assert words == "2 held-out pictures" and chosen not in levels_of(items)
    assert len(levels_of(folders[key] for key in range(300))) == 26
    assert capsys.readouterr().err.count("; using another picture\n") == 2


def test_without_h5py_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        read_depth(tmp_path / "x.hdf5")
    for name in "s_geometry_hdf5/frame.0007.depth_meters.hdf5", "s_final_preview/frame.0007.tonemap.jpg":
        save_rgb(tmp_path / "s.png")
        (tmp_path / name).parent.mkdir()
        shutil.move(tmp_path / "s.png", tmp_path / name)
    with pytest.raises(ValueError, match="pip install h5py"):           # at once, rather than a warning for each file
        find_depth(tmp_path)


@pytest.mark.parametrize("weights", [[1, 2], [0], [-1], [float("nan")], [float("inf")]])
def test_weights_other_than_one_positive_number_per_folder_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match="for 1 folders: one per folder, above 0"):
        depth.DepthFolders([tmp_path], weights, 8, 8)


def test_depth_scenes_have_the_items_of_folders():
    scenes, item = Scenes(9, 32, 48, "solid", 3), depth.DepthScenes(9, 32, 48, "solid", 3)[4]
    assert item["valid"].all() and item["valid"].shape == (1, 32, 48) and item["caption"] == ""
    assert torch.equal(item["image"], scenes[4]["image"])
    assert torch.equal(item["depth"], depth.normalise_depth(scenes[4]["depth"], item["valid"]))


# ------------------------------------------------------------------ held-out pictures

def save_pictures(folder, levels):
    """Write a picture with depth for each level: that level in red, and a ramp in green, which shows the crop."""
    folder.mkdir(parents=True, exist_ok=True)
    for level in levels:
        pixels = np.full((8, 16, 3), level, np.uint8)
        pixels[..., 1] = np.arange(0, 256, 16)
        Image.fromarray(pixels).save(folder / f"{level}.png")
        np.save(folder / f"{level}.npy", np.ones((8, 16)))


def levels_of(items):
    """-> the levels of items, each of which identifies a picture."""
    return {round(item["image"][0].float().mean().item()) for item in items}


@pytest.mark.parametrize("validation, count", [(16, 3), (2, 2)])
def test_a_tenth_of_each_folder_is_held_out_and_never_trained_on(tmp_path, validation, count):
    save_pictures(tmp_path / "many", range(35))
    save_pictures(tmp_path / "few", range(200, 209))
    folders = depth.DepthFolders([tmp_path / "many", tmp_path / "few"], None, 8, 8, seed=1)
    items, words = folders.hold_out(validation)
    held_out = levels_of(items)
    assert len(items) == validation and words == f"{count} held-out pictures"
    assert held_out <= set(range(35)) and len(held_out) == count        # none of the small folder
    assert len(folders) == 35 + 9 - count
    trained_on = levels_of(folders[key] for key in range(1500))
    assert len(trained_on) == len(folders) and not trained_on & held_out


def test_held_out_items_depend_on_the_pictures_names_alone_and_not_on_the_seed(tmp_path):
    save_pictures(tmp_path / "a", range(35))
    items, _ = depth.DepthFolders([tmp_path / "a"], None, 8, 8, seed=1).hold_out(40)
    assert len(levels_of(items)) == 3 and levels_of(items) != {0, 1, 10}        # not the first ones
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "a", tmp_path / "elsewhere/b")
    for level in sorted(set(range(35)) - levels_of(items))[:4]:         # 31 pictures are left
        (tmp_path / f"elsewhere/b/{level}.png").unlink()
    again, _ = depth.DepthFolders([tmp_path / "elsewhere/b"], None, 8, 8, seed=2).hold_out(40)
    assert all(torch.equal(item["image"], other["image"]) for item, other in zip(items, again))


def test_a_held_out_picture_without_valid_depth_is_skipped(tmp_path, capsys):
    save_pictures(tmp_path, range(35))
    first = depth.DepthFolders([tmp_path], None, 8, 8)
    picture = sorted(levels_of(first.hold_out(40)[0]))[0]
    np.save(tmp_path / f"{picture}.npy", np.zeros((8, 16)))
    items, words = depth.DepthFolders([tmp_path], None, 8, 8).hold_out(40)
    assert words == "2 held-out pictures" and picture not in levels_of(items) and len(items) == 40
    assert f"{picture}.npy: no pixel has a valid depth" in capsys.readouterr().err


def test_with_fewer_than_ten_pictures_none_is_held_out(tmp_path):
    save_pictures(tmp_path, range(9))
    folders = depth.DepthFolders([tmp_path], None, 8, 8)
    items, words = folders.hold_out(4)
    assert words == "training pictures, too few to hold any out" and len(items) == 4 and len(folders) == 9


# ------------------------------------------------------------------ prediction

class Identity:
    """A model for 32x48 pixels whose latents are the picture and whose depth is the picture plus a hundredth of the
    noise. `contexts` lists the latents of the pictures that it predicted from."""
    config, multiple, metadata, device = TINY, 8, {"resolution": "32 48"}, "cpu"

    def __init__(self):
        self.contexts = []

    def encode(self, images):
        return images

    decode = encode

    def sample(self, x0, context, steps):
        self.contexts.append(context)
        return context + x0 / 100


@pytest.fixture
def model():
    return Identity()


@pytest.mark.parametrize("height, width", [(50, 90), (90, 50)])
def test_a_prediction_has_its_pictures_size_and_orientation(model, height, width):
    dark_to_bright = np.linspace(20, 235, height)[:, None] + np.linspace(-20, 20, width)
    image = Image.fromarray(np.stack([dark_to_bright] * 3, -1).astype(np.uint8))
    prediction = depth.predict(model, model, image, steps=1)
    assert prediction.shape == (height, width)
    assert np.abs(prediction.numpy() - (dark_to_bright / 127.5 - 1)).max() < 0.1


def test_a_prediction_is_the_mean_over_channels_and_an_ensemble_with_noise_from_seed_and_number(model):
    image = Image.new("RGB", (48, 32), (255, 0, 0))                         # channels 1, -1, -1
    prediction = depth.predict(model, model, image, steps=1, ensemble=3, seed=5)
    noise = torch.stack([noises([i], (3, 32, 48), 5)[0] for i in range(3)])
    assert torch.allclose(prediction, -1 / 3 + noise.mean((0, 1)) / 100, atol=1e-6)
    assert len(model.contexts) == 3


def test_a_prediction_stays_between_minus_1_and_1(model):
    for colour, end in ("white", 1), ("black", -1):
        prediction = depth.predict(model, model, Image.new("RGB", (48, 32), colour), steps=1)
        assert prediction.abs().max() == 1 and (prediction == end).float().mean() > 0.3


@pytest.mark.parametrize("picture, size, scaled", [
    ((50, 333), None, (16, 104)),               # 1,536 pixels in that shape: 15.2x101.2, rounded to multiples of 8
    ((3, 999), None, (8, 712)),                 # and at least 8
    ((50, 333), [24, 40], (24, 40))])
def test_a_picture_is_scaled_to_as_many_pixels_as_in_training_or_to_the_given_size(model, picture, size, scaled):
    depth.predict(model, model, Image.new("RGB", picture[::-1]), steps=1, size=size)
    assert model.contexts[0].shape == (1, 3, *scaled)


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
    """The file of a random depth model, whose metadata has objective dm."""
    torch.manual_seed(0)
    sd = StableDiffusion(TINY, "v")
    sd.add_image_input()
    for parameter in sd.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_checkpoint(sd, path, torch.float16, resolution="32", task="depth", objective="dm")
    return path


def test_the_command_writes_depth_of_pictures_and_folders_at_the_pictures_sizes(run, depth_model, tmp_path):
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


def test_a_depth_model_trained_by_dm_is_sampled_by_algorithm_2(run, depth_model, tmp_path):
    save_rgb(tmp_path / "a.png", 32, 32)

    def predict(*words):
        run(tmp_path / "a.png", "--ckpt", depth_model, "--steps", 2, "--device", "cpu", "--out", tmp_path, *words)
        return np.load(tmp_path / "a.npy")

    plain = predict()
    assert np.array_equal(plain, predict("--objective", "diff2flow"))
    assert not np.allclose(plain, predict("--objective", "dm"), atol=1e-3)
    assert not np.allclose(plain, predict("--seed", 1), atol=1e-3)


def test_without_a_depth_model_the_error_says_what_to_train_or_pass(run, tmp_path, monkeypatch):
    save_rgb(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train.py --task depth.*--lora.*--ckpt"):
        run("a.png", "--device", "cpu")
    assert not Path("depth").exists()


@pytest.mark.parametrize("words, message", [
    (["none.png"], "none.png: no such file"), (["empty"], "empty has no picture"),
    (["a.png", "in"], "would be written to the same a.npy"), (["a.png", "--ensemble", 0], "--ensemble 0")])
def test_wrong_arguments_are_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(depth, "load_flow", lambda *_, **__: pytest.fail("loaded a model before it failed"))
    save_rgb(tmp_path / "a.png")
    save_rgb(tmp_path / "in/a.jpg")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=message):
        run(*words)


# ------------------------------------------------------------------ files that are not depth

def test_an_hdf5_whose_array_is_in_another_file_is_refused(tmp_path):
    import h5py
    (tmp_path / "secret").write_bytes(bytes(768 * 1024 * 4))
    with h5py.File(tmp_path / "whole.hdf5", "w") as file:
        file["dataset"] = np.ones((768, 1024), np.float32)
    with h5py.File(tmp_path / "link.hdf5", "w") as file:
        file["dataset"] = h5py.ExternalLink(str(tmp_path / "whole.hdf5"), "dataset")
    with h5py.File(tmp_path / "external.hdf5", "w") as file:
        file.create_dataset("dataset", (768, 1024), "f4", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])
    assert read_depth(tmp_path / "whole.hdf5").shape == (768, 1024)
    for name, message in ("link", "is a link or not an array"), ("external", "stored in other files"):
        with pytest.raises(ValueError, match=f"{name}.hdf5: not depth, or damaged .*{message}"):
            read_depth(tmp_path / f"{name}.hdf5")


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB"])
def test_a_png_without_16_bits_is_refused(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=f"x.png: not depth, or damaged .a picture of mode {mode}, where depth is"):
        read_depth(tmp_path / "x.png")


@pytest.mark.parametrize("numbers", [np.ones((3, 4), complex), np.ones((3, 4), bool), np.ones((3, 4), [("a", "f4")])],
                         ids=["complex", "bool", "record"])
def test_an_array_of_anything_but_real_numbers_is_refused(tmp_path, numbers):
    np.save(tmp_path / "x.npy", numbers)
    with pytest.raises(ValueError, match="x.npy holds .*: depth is a real number per pixel; save it as float32"):
        read_depth(tmp_path / "x.npy")
