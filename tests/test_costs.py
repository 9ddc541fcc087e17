"""tests/costs.py counts right: on fake tensors what real ones take, and the operations that diffusers' UNet needs."""
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import SD21, TINY
from tests import costs
from tests.checkpoints import diffusers_unet


@pytest.mark.parametrize("preset, parameters", [("base", 207_458_688), ("none", 865_910_724)])
def test_a_trained_parameter_takes_four_bytes_four_times_beside_its_weight(preset, parameters):
    mode = FakeTensorMode()
    sd, flow, trained = costs.build(SD21, preset, mode)
    with mode:
        stays, _ = costs.fill_memory(sd, flow, trained)
    counters = 4 * len(trained)                                             # Adam counts its steps for each tensor
    assert (stays["gradients"], stays["Adam"], stays["EMA"]) == (
        4 * parameters, 8 * parameters + counters, 4 * parameters)
    frozen = {parameter.dtype for parameter in sd.first_stage_model.parameters()}
    assert frozen == {torch.float32 if preset == "none" else torch.bfloat16}


@pytest.mark.parametrize("preset, checkpointing", [("base", False), ("none", True)])
def test_fake_tensors_take_the_memory_and_operations_of_real_ones(preset, checkpointing):
    fake, real = (costs.one_batch(TINY, preset, 64, checkpointing, batch=2, mode=mode)
                  for mode in (FakeTensorMode(), nullcontext()))
    assert fake == real and fake.peak > fake.kept > 0


def test_what_autograd_saves_is_what_the_forward_pass_leaves():
    """An independent count, by autograd's own hooks, on real tensors: all but the latents, the text, the velocities."""
    kept = {}
    sd, flow, trained = costs.build(TINY, "base", nullcontext())
    own = {parameter.untyped_storage().data_ptr() for parameter in sd.parameters()}

    def save(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with costs.as_on_cuda(nullcontext()), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        images = {"image": torch.zeros(2, 3, 64, 64), "caption": ["a red boat"] * 2}
        costs.one_pass(sd, flow, torch.autocast("cpu", torch.bfloat16), images, lambda: None)
    saved = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    expected = costs.one_batch(TINY, "base", 64, batch=2).kept
    assert abs(saved / expected - 1) < 0.01, (saved, expected)


def test_the_unet_needs_the_operations_of_diffusers_unet():
    """0.8 10^12 at 512 px: 0.4 10^12 multiplications with an addition each."""
    mode, counts = FakeTensorMode(), []
    sd, flow, trained = costs.build(SD21, "none", mode)
    with torch.no_grad(), costs.as_on_cuda(mode):
        for net in (sd.unet, diffusers_unet(SD21)):
            with costs.count_flops() as counter:
                net(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 1024))
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] and 0.75e12 < counts[0] < 0.85e12
