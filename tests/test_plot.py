"""support/plot.py: the picture of a run's loss and velocity error."""
import json

import numpy as np
import pytest
from PIL import Image

from support.files import SOFTWARE, maker_of
from support.plot import HEIGHT, LEFT, LINE, RIGHT, WIDTH, save_plot, ticks


def write_logs(folder, losses, errors):
    """losses, errors: {step: value}."""
    for name, key, values in ("metrics", "loss", losses), ("validation", "velocity_error", errors):
        rows = [json.dumps({"step": step, key: value}) + "\n" for step, value in values.items()]
        (folder / f"{name}.jsonl").write_text("".join(rows))


def heights_of_line(path, panel):
    """-> the mean height in pixels, from the bottom, of the line in the first and in the last tenth of a panel."""
    pixels = np.asarray(Image.open(path)).astype(int)[panel * HEIGHT:(panel + 1) * HEIGHT]
    is_line = abs(pixels - LINE).sum(-1) < 60
    tenth = (WIDTH - LEFT - RIGHT) // 10
    return [HEIGHT - np.nonzero(is_line[:, columns])[0].mean()
            for columns in (slice(LEFT + 1, LEFT + tenth), slice(WIDTH - RIGHT - tenth, WIDTH - RIGHT))]


def test_the_plot_has_a_panel_for_the_loss_and_one_for_the_velocity_error_and_is_replaced_as_ours(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.02, 101)
    write_logs(tmp_path, {10 * i: 0.9 - 0.005 * i + noise[i] for i in range(1, 101)}, {0: 0.2, 500: 0.3, 1000: 0.4})
    save_plot(tmp_path)
    path = tmp_path / "metrics.png"
    assert Image.open(path).size == (WIDTH, 2 * HEIGHT) and maker_of(path) == SOFTWARE
    (first, last), (before, after) = heights_of_line(path, 0), heights_of_line(path, 1)
    assert first > last + HEIGHT / 4 and after > before + HEIGHT / 4        # one falls, one rises


@pytest.mark.parametrize("losses, errors, panels", [
    ({10: 0.5}, {}, 1), ({}, {0: 0.5, 3: 0.5}, 1), ({10: 0.0, 20: 0.0}, {0: 1e-9}, 2), ({}, {0: float("nan")}, 0),
    ({10: 1e20, 20: -1e20}, {0: None, 5: "x"}, 1)])
def test_few_equal_tiny_huge_or_missing_values_are_no_error(losses, errors, panels, tmp_path):
    write_logs(tmp_path, losses, errors)
    save_plot(tmp_path)
    if panels:
        assert Image.open(tmp_path / "metrics.png").height == panels * HEIGHT
    assert (tmp_path / "metrics.png").exists() == (panels > 0)


def test_ticks_are_round_numbers_that_span_the_values():
    assert list(ticks(0.21, 0.58, 5).values()) == ["0.2", "0.3", "0.4", "0.5", "0.6"]
    assert list(ticks(0, 20_000, 8).values()) == ["0", "5,000", "10,000", "15,000", "20,000"]
