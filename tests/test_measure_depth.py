"""tools/measure_depth.py: errors equal those of an independent computation, and data sets are read as published."""
import json
import sys

import numpy as np
import pytest

from tests.test_depth import save_png16, save_rgb
from tools import measure_depth
from tools.measure_depth import PROTOCOLS, depth_errors, read_mask, read_truth

NAMES = ("a", "b", "sub/c")
SPACES = {"log": (np.log, np.exp), "depth": (lambda d: d, lambda d: d), "disparity": (lambda d: 1 / d, lambda d: 1 / d)}


@pytest.fixture
def measured(tmp_path):
    """truth/ has three pictures with partly invalid depth, pred/ noisy predictions that are affine in log depth."""
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
def measure(monkeypatch, capsys):
    """measure(folder, words) runs the command -> its results, from the JSON line at the end."""
    def run_command(folder, *words):
        words = [folder / "pred", "--truth", folder / "truth", *words]
        monkeypatch.setattr(sys, "argv", ["measure_depth.py", *map(str, words)])
        measure_depth.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_command


# ------------------------------------------------------------------ the fit and the errors

@pytest.mark.parametrize("space", SPACES)
def test_errors_equal_those_of_an_independent_fit_and_are_means_over_pixels_then_over_pictures(
        measured, measure, space):
    (forward, back), expected = SPACES[space], []
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


@pytest.mark.parametrize("space", SPACES)
def test_a_prediction_that_is_affine_in_a_space_has_no_error_if_aligned_in_it_and_some_in_the_others(
        measured, measure, space):
    for name in NAMES:
        truth = np.nan_to_num(np.load(measured / f"truth/{name}.npy"), posinf=1)
        np.save(measured / f"pred/{name}.npy", 2 - 0.3 * SPACES[space][0](np.maximum(truth, 0.1)))
    for other in SPACES:
        result = measure(measured, "--align", other)
        if other == space:
            assert result["absrel"] < 1e-6 and result["delta1"] == 1
        else:
            assert result["absrel"] > 0.05, other


def test_the_default_is_log_depth_and_the_help_names_marigolds_fit(measured, measure, capsys):
    assert measure(measured) == measure(measured, "--align", "log") != measure(measured, "--align", "depth")
    with pytest.raises(SystemExit):
        measure(measured, "--help")
    usage = " ".join(capsys.readouterr().out.split())
    assert "`depth` is what Marigold fits for its own models (--alignment least_square)" in usage
    assert "Which of the two is behind the paper's Table 2 is unknown" in usage
    assert "space of the least-squares fit (default: log)" in usage


def test_a_prediction_of_another_size_is_scaled_to_the_truth(measured, measure):
    y, x = np.mgrid[0:1:48j, 0:1:64j]
    for name in NAMES:
        np.save(measured / f"truth/{name}.npy", np.exp(1 + x - y))
        np.save(measured / f"pred/{name}.npy", np.kron(x - y, np.ones((3, 2))))
    assert measure(measured)["absrel"] < 2e-3                               # only from resampling


def test_the_unit_of_the_truth_can_be_given(measured, measure):
    assert measure(measured, "--scale", 10)["rmse"] == pytest.approx(10 * measure(measured)["rmse"], rel=1e-3)


def test_an_aligned_prediction_is_clipped_to_the_data_sets_range():
    aligned, truth, valid = np.array([[99.0, -5.0, 4.0]]), np.array([[8.0, 2.0, 4.0]]), np.array([[True, True, True]])
    errors = depth_errors(aligned, truth, valid, near=1, far=10)
    assert errors["absrel"] == pytest.approx((2 / 8 + 1 / 2 + 0) / 3) and errors["delta1"] == pytest.approx(1 / 3)


# ------------------------------------------------------------------ data sets

@pytest.mark.parametrize("dataset, unit, shape, truth_shape, top, bottom, left, right", [
    ("nyu", 1000, (480, 640), (480, 640), 45, 471, 41, 601), ("scannet", 1000, (480, 640), (480, 640), 0, 480, 0, 640),
    ("kitti", 256, (375, 1242), (352, 1216), 117, 321, 43, 1172)])
def test_each_data_set_has_its_unit_and_its_crop(tmp_path, dataset, unit, shape, truth_shape, top, bottom, left, right):
    values = np.random.default_rng(0).integers(2 * unit, 8 * unit, shape)
    save_png16(tmp_path / "x.png", values)
    metres, valid = read_truth(tmp_path, dataset, "x.png")
    inside = np.zeros(truth_shape, bool)
    inside[top:bottom, left:right] = True
    assert np.array_equal(valid, inside)
    if dataset == "kitti":
        values = values[375 - 352:, 13:13 + 1216]     # the benchmark's crop: lowest rows, middle columns
    assert np.allclose(metres[valid], values[valid] / unit, rtol=1e-6)


@pytest.mark.parametrize("dataset, near, far", [
    ("nyu", 0.001, 10), ("scannet", 0.001, 10), ("kitti", 1e-5, 80), ("diode", 0.6, 350), ("plain", 1e-5, np.inf)])
def test_depth_outside_a_data_sets_range_is_invalid(tmp_path, dataset, near, far):
    metres = np.full(PROTOCOLS[dataset].shape or (375, 1242), 5, np.float32)
    metres[250, 500:504] = 0.99 * near, 1.01 * near, min(0.99 * far, 1e6), 1.01 * far
    np.save(tmp_path / "x.npy", metres)
    valid = read_truth(tmp_path, dataset, "x.npy", unit=1)[1]
    row, column = (250, 500) if dataset != "kitti" else (250 - 23, 500 - 13)
    assert valid[row, column - 1:column + 5].tolist() == [True, False, True, True, False, True]


def test_a_kitti_prediction_for_the_full_picture_is_cropped_like_the_truth_and_a_smaller_one_refused(measure, tmp_path):
    values = np.random.default_rng(0).integers(512, 2048, (375, 1242))
    save_png16(tmp_path / "truth/x.png", values)
    (tmp_path / "pred").mkdir()
    (tmp_path / "list.txt").write_text("x.jpg x.png\ny.jpg None\n")
    words = "--dataset", "kitti", "--list", tmp_path / "list.txt"
    for prediction in np.log(values), np.log(values)[23:, 13:1229]:
        np.save(tmp_path / "pred/x.npy", prediction)
        result = measure(tmp_path, *words)
        assert result["absrel"] < 1e-6 and result["images"] == 1            # y.jpg has no depth
    np.save(tmp_path / "pred/x.npy", np.log(values)[::2, ::2])
    with pytest.raises(ValueError, match="188x621 pixels are fewer than KITTI's 352x1216"):
        measure(tmp_path, *words)


def test_diodes_mask_is_the_third_entry_of_a_line(measure, tmp_path):
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


def test_eth3d_is_raw_float32_with_infinite_holes(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_depth, "ETH3D_SHAPE", (6, 8))
    metres = np.random.default_rng(0).uniform(1, 50, (6, 8)).astype(np.float32)
    metres[0] = np.inf
    metres.tofile(tmp_path / "x")
    found, valid = read_truth(tmp_path, "eth3d", "x")
    assert not valid[0].any() and valid[1:].all() and np.array_equal(found[1:], metres[1:])
    metres[:5].tofile(tmp_path / "x")
    with pytest.raises(ValueError, match="40 numbers, not ETH3D's 6x8"):
        read_truth(tmp_path, "eth3d", "x")


# ------------------------------------------------------------------ what is refused

def test_a_missing_prediction_and_a_line_without_depth_are_refused(measured, measure):
    (measured / "pred/b.npy").unlink()
    with pytest.raises(ValueError, match="pred/b.npy"):
        measure(measured)
    (measured / "list.txt").write_text("a.jpg a.npy\nb.jpg\n")
    with pytest.raises(ValueError, match="list.txt.*'b.jpg' alone"):
        measure(measured, "--list", measured / "list.txt")


def test_wrong_shapes_units_and_predictions_are_refused(measured, measure):
    for dataset, shape in ("nyu", "480x640"), ("diode", "768x1024"), ("kitti", "352x1216"):
        with pytest.raises(ValueError, match=f"48x64.*{shape}"):
            measure(measured, "--dataset", dataset)
    for scale in "0", "-1", "nan", "inf":
        with pytest.raises(ValueError, match=f"--scale {scale}: it must be"):
            measure(measured, f"--scale={scale}")
    np.save(measured / "pred/a.npy", np.full((48, 64), np.nan))
    with pytest.raises(ValueError, match="pred/a.npy has NaN or infinity"):
        measure(measured)


@pytest.mark.parametrize("make, message", [
    (lambda path: np.save(path, np.ones((3, 4))), r"shape \(3, 4\) for a depth of"),
    (lambda path: path.write_bytes(b""), "cannot be read as a mask")])
def test_a_mask_that_does_not_fit_is_refused(tmp_path, make, message):
    make(tmp_path / "mask.npy")
    with pytest.raises(ValueError, match=f"mask.npy.* {message}"):
        read_mask(tmp_path / "mask.npy", (768, 1024))
