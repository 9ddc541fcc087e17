"""tools/kernels.py: what a pass of the UNet asks a GPU to do, beside diffusers and peft."""
import pytest
import torch

from tests.checkpoints import CONFIGS
from tools.kernels import Kernels, count, ours, theirs

GOALS = {"sampling": 0.95, "LoRA base": 0.80, "LoRA small": 0.80, "all weights": 1.0}


@pytest.mark.parametrize("name, way", [*(("sd21", way) for way in GOALS), ("sdxl", "sampling")])
def test_ours_starts_fewer_kernels_and_touches_fewer_bytes_than_diffusers_and_peft(name, way):
    mine, peer = (count(CONFIGS[name], way, side) for side in (ours, theirs))
    assert 500 < mine.kernels < GOALS[way] * peer.kernels and 1e10 < mine.bytes < GOALS[way] * peer.bytes
    for name in "aten::native_group_norm", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::silu":
        assert mine.count[name] == peer.count[name] > 0                   # the same networks


def test_a_step_casts_each_matrix_of_a_lora_once_and_its_gradient_once():
    from lora import inject
    from model import UNet
    mine = count(CONFIGS["sd21"], "LoRA base", ours)
    matrices = len(inject(UNet(CONFIGS["sd21"]), "base")) + 2             # two are a fixed identity, without gradient
    assert abs(mine.casts - 2 * matrices) <= 12                           # and latents, context, times, velocities


def test_kernels_counts_neither_views_nor_allocations():
    x = torch.ones(4, 6)
    with Kernels() as kernels:
        y = x.t().unflatten(0, (2, 3))[0]
        torch.empty(3)
        y = y.double()
        y + y
    assert (kernels.kernels, kernels.casts, kernels.bytes) == (2, 1, 12 * 4 + 12 * 8 + 3 * 12 * 8)
