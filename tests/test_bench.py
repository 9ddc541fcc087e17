"""tools/bench.py: both sides compute the same, and the table has what was measured."""
import itertools
import json
import sys

import numpy as np
import pytest
import torch

from tests.checkpoints import NARROW
from tests.runs import call
from tools import bench
from tools.bench import Case


@pytest.fixture(autouse=True)
def narrow(tmp_path, monkeypatch):
    """Use networks of a tenth of the width, in an empty folder."""
    monkeypatch.setattr(bench, "ARCHITECTURES", {
        "sd15": (NARROW["sd15"], "eps"), "sd21": (NARROW["sd21"], "v"), "sdxl": (NARROW["sdxl"], "eps")})
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arch", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("what, tolerance", [("unet", 1e-4), ("sample", 0.2)])     # the samplers' first levels differ
def test_both_sides_compute_the_same_result(what, arch, tolerance):
    ours, theirs = (side(Case(what, arch, 64, 2, steps=3))() for side in bench.SIDES[what])
    assert ours.shape == theirs.shape and (ours - theirs).norm() < tolerance * theirs.norm() and theirs.std() > 0.01


@pytest.mark.parametrize("what", ["unet", "sample"])
def test_both_sides_compute_in_bf16(what):
    ours, theirs = (side(Case(what, "sd21", 64, 2, "bf16", steps=3))() for side in bench.SIDES[what])
    assert ours.shape == theirs.shape and (ours - theirs).norm() < 0.3 * theirs.norm()


@pytest.mark.parametrize("weights, dtype", [
    *itertools.product(("base", "small"), ("fp32", "autocast", "bf16")), ("none", "fp32"), ("none", "autocast")])
def test_both_sides_train_the_same_number_of_parameters(weights, dtype, monkeypatch):
    trained, plain = [], bench.torch.nn.utils.clip_grad_norm_

    def clip(parameters, norm):
        parameters = list(parameters)
        trained.append(sum(parameter.numel() for parameter in parameters if parameter.grad is not None))
        return plain(parameters, norm)
    monkeypatch.setattr(bench.torch.nn.utils, "clip_grad_norm_", clip)
    for side in bench.SIDES["train"]:
        side(Case("train", "sd21", 64, 1, dtype, weights))()
    ours, theirs = trained
    assert 0 < ours <= theirs < 1.2 * ours          # peft trains both matrices of the first and the last conv


@pytest.mark.parametrize("what", ["load", "data", "open"])
def test_both_sides_read_the_files(what):
    for side in bench.SIDES[what]:
        assert side(Case(what, "sd15", 64, 16, "fp16"))() is None


def test_the_time_of_a_step_is_split_by_kind_of_operation():
    """In this step, a convolution takes nearly all of it."""
    x, conv = torch.randn(8, 64, 64, 64), torch.nn.Conv2d(64, 64, 3)
    seconds = bench.seconds_by_kind(lambda: torch.nn.functional.silu(conv(x)))
    assert list(seconds) == list(bench.KINDS) and seconds["convolutions"] > 0.5 * sum(seconds.values())
    assert seconds["SiLU and GELU"] > 0 == seconds["attention"]
    row = {"what": "unet", "arch": "sd21", "dtype": "fp32", "size": 64,
           "where_ms": {kind: (1000 * value, 7) for kind, value in seconds.items()}}
    assert "| attention | 0 | 7 |" in bench.where_table(row).splitlines()


def test_a_row_has_medians_the_range_of_the_ratio_and_the_difference_of_the_results(monkeypatch, tmp_path):
    turns = iter([(1.0, 2.0), (3.0, 4.0), (5.0, 4.0)])

    def in_a_process(case, side, now=[]):           # noqa: B006  the rest of a turn
        now[:] = now or next(turns)
        return {"seconds": now.pop(0), "warm_up": 9.0, "memory": 2**30 * (side + 1), "operations": None, "rate": None,
                "result": np.full(4, 1.0 + side, np.float32)}
    monkeypatch.setattr(bench, "in_a_process", in_a_process)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    result = call(bench, "unet --arch sd15 --size 64 --batch 2 --device cpu --json rows.jsonl")
    assert result.code == 0, result.err
    assert "| unet sd15 fp32 | 2 x 64 px | 3000 | 4000 | **0.75** (0.50 to 1.25) | 0.67 | 1.00 | 2.00 | 5e-01 |  |" in (
        result.out)
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["ratio"] == 0.75 and row["difference"] == 0.5 and row["rounds"] == 3
