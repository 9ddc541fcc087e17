"""What is claimed of this repository, tested: python -m pytest. No downloads; a few minutes on two CPU cores."""
import contextlib
import copy
import dataclasses
import gzip
import inspect
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import types
import zlib
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import data
import evaluate
import lora
import model
import sample
import train
from data import cli, ImageFolder, LABELS, random_scene, render, save_grid, save_image, Scene, Scenes, Thing
from diff2flow import alpha_sigma, Diff2Flow, Diffusion, interpolate, NaiveFM, OBJECTIVES
from model import Config, load_checkpoint, read_config, SCALE, SD15, SD21, StableDiffusion, TINY, tokenize, UNet
from schedule import sd_schedule


# ==================== The method: schedule.py, diff2flow.py ====================
# The method's claims: schedule.py and diff2flow.py against algebra, closed-form posteriors and diffusers.
# Every network here is synthetic, so that the truth is known. What they know of the schedule comes from numpy
# (`level`, `asked`), never from diff2flow.py. Unless a line says otherwise a tolerance is float32's: the module computes
# in it (2^-24 = 6e-8 a rounding), times a handful of roundings, times 1/alpha = 15.6 for an eps-network's worst level.


T = 1000
ALPHA, SIGMA = sd_schedule()
F_T = (ALPHA / (ALPHA + SIGMA)).numpy()             # f_t at the integers: 0.9717 at t_dm = 0 down to 0.0640 at T - 1
SHAPE = (5, 3, 4, 6)                              # four different sizes: no two axes can be confused
both_predictions = pytest.mark.parametrize("prediction", ["v", "eps"])


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def level(t_dm, f=F_T):
    """alpha, sigma (B, 1, 1, 1) in float64 at a fractional t_dm (B,): f_t is linear between the integers."""
    t_fm = torch.from_numpy(np.interp(t_dm.double().numpy(), np.arange(T), f)).view(-1, 1, 1, 1)
    r = 1 / torch.hypot(t_fm, 1 - t_fm)
    return r * t_fm, r * (1 - t_fm)


def asked(t_fm, f=F_T):
    """t_dm in float64, an independent Eq. 12; numpy's interpolation holds the end values, as the rule for the ends."""
    return torch.from_numpy(np.interp(torch.as_tensor(t_fm).double().numpy(), f[::-1], np.arange(T)[::-1].copy()))


def output(prediction, x1, x0, alpha, sigma):
    return x0 if prediction == "eps" else alpha * x0 - sigma * x1


def exact(prediction, x1, x0, f=F_T):
    """A network that knows x1 and x0."""
    return lambda x_dm, t_dm, context: output(prediction, x1.double(), x0.double(), *level(t_dm, f))


def optimal(prediction, posterior, f=F_T):
    """The minimiser of the diffusion loss on data with posterior(x, a, s) = E[x1 | a x1 + s x0 = x]."""
    def net(x_dm, t_dm, context):
        alpha, sigma = level(t_dm, f)
        x1 = posterior(x_dm.double(), alpha, sigma)
        return output(prediction, x1, (x_dm.double() - alpha * x1) / sigma, alpha, sigma)
    return net


def optimal_velocity(posterior, x_fm, t_fm):
    """E[x1 - x0 | x_fm], straight from the flow's own interpolant: no alpha, no sigma, no timestep."""
    t_fm = t_fm.double().view(-1, 1, 1, 1)
    x1 = posterior(x_fm.double(), t_fm, 1 - t_fm)
    return x1 - (x_fm.double() - t_fm * x1) / (1 - t_fm)


MU, STD = 0.4, 0.5
MODES, WEIGHTS, MODE_STD = rand(2, *SHAPE[1:], seed=9).double(), torch.tensor([0.3, 0.7]).double(), 0.6


def gaussian(x, a, s):
    return MU + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MU)


def mixture(x, a, s):
    """Two Gaussians in the whole image space: each pixel's answer depends on all pixels."""
    var = (a**2 * MODE_STD**2 + s**2)[None]
    miss = x[None] - a[None] * MODES[:, None]                                            # (2, B, C, H, W)
    logit = WEIGHTS.log()[:, None] - (miss**2 / (2 * var)).sum((2, 3, 4))                # (2, B)
    mean = MODES[:, None] + a[None] * MODE_STD**2 / var * miss
    return (logit.softmax(0)[..., None, None, None] * mean).sum(0)


class Arbitrary(nn.Module):
    """Not optimal, nonlinear, mixes pixels and channels, and uses all of its inputs. Sensitive to t_dm: a step of 1
    moves it by up to 0.14, the 3e-5 by which float32 rounds t_dm by 4e-6."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.4 * rand(3, 3, 3, 3, seed=7).double())

    def forward(self, x_dm, t_dm, context):
        h = nn.functional.conv2d(x_dm.double(), self.weight, padding=1)
        t_dm = t_dm.double().view(-1, 1, 1, 1)
        return torch.sin(h + context.double().mean((1, 2)).view(-1, 1, 1, 1) + t_dm / 7) + 0.3 * x_dm.double().flip(3)


class Spy(nn.Module):
    """Keeps what it is called with."""

    def __init__(self, net=lambda x_dm, t_dm, context: torch.zeros_like(x_dm)):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x_dm, t_dm, context):
        self.calls.append((x_dm, t_dm, context))
        return self.net(x_dm, t_dm, context)


def wrap(net, prediction="v", kind=Diff2Flow, **schedule):
    return kind(net, *sd_schedule(**schedule), prediction=prediction)


class FromTrainedLevel(Diff2Flow):
    """Diff2Flow on the grid that other tools can use: from the noisiest trained level instead of t_fm = 0."""

    def grid(self, steps):
        return torch.linspace(F_T[-1], 1, steps + 1)


CONTEXT, UNCOND = rand(SHAPE[0], 7, 8, seed=3), rand(SHAPE[0], 7, 8, seed=4)
X1, X0 = rand(*SHAPE, seed=1), rand(*SHAPE, seed=2)
INSIDE = torch.linspace(0.0641, 0.9716, 301)


def velocity(diff2flow, x_fm, t_fm):
    return diff2flow(x_fm, torch.as_tensor(t_fm).float().expand(len(x_fm)), CONTEXT)


def rel_diff(a, b):
    return ((a - b).abs().mean() / b.abs().mean()).item()


# ---- schedule.py

def test_the_schedule_is_the_one_stable_diffusion_was_trained_with():
    from diffusers import DDPMScheduler, EulerDiscreteScheduler
    for scheduler in (DDPMScheduler, EulerDiscreteScheduler):
        theirs = scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
        # theirs is a float32 product of 1000 factors: 1e-6 relative
        assert torch.allclose(ALPHA**2, theirs.double(), rtol=3e-6, atol=0)


def test_zero_snr_is_the_published_rescaling():
    from diffusers import DDPMScheduler
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                           rescale_betas_zero_snr=True).alphas_cumprod.double()
    alpha, sigma = sd_schedule(zero_snr=True)
    assert torch.allclose(alpha**2, theirs, rtol=0, atol=2e-6)    # float32 again
    assert alpha[-1] == 0 and sigma[-1] == 1 and alpha[0] == ALPHA[0]


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_schedule_preserves_variance_in_float64(zero_snr):
    alpha, sigma = sd_schedule(zero_snr=zero_snr)
    assert alpha.dtype == sigma.dtype == torch.float64 and alpha.shape == sigma.shape == (T,)
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-15


def test_the_schedules_first_and_last_levels_are_the_known_ones():
    assert ALPHA[0].item() == pytest.approx((1 - 0.00085) ** 0.5, abs=1e-12)   # one factor: no clean level at t_dm = 0
    assert (round(F_T[0], 4), round(F_T[-1], 4)) == (0.9717, 0.0640)
    assert SIGMA[-1].item() / ALPHA[-1].item() == pytest.approx(14.6146, abs=5e-5)


# ---- Eqs. 9, 11, 12 and the closed form

def test_interpolate_is_noise_at_0_and_data_at_1():
    t_fm = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.9])
    x_fm = interpolate(X1, X0, t_fm)
    assert torch.equal(x_fm[0], X0[0]) and torch.equal(x_fm[1], X1[1])
    assert torch.allclose(x_fm[2], 0.25 * X1[2] + 0.75 * X0[2], atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_closed_form_alpha_and_sigma_equal_the_table_at_its_nodes(dtype, tolerance, zero_snr):
    alpha, sigma = sd_schedule(zero_snr=zero_snr)
    ours = alpha_sigma((alpha / (alpha + sigma)).to(dtype))
    assert ours[0].dtype == dtype
    assert max((ours[0] - alpha).abs().max(), (ours[1] - sigma).abs().max()) < tolerance


def test_alpha_and_sigma_are_exact_at_the_ends():
    alpha, sigma = alpha_sigma(torch.tensor([0.0, 1.0]))
    assert alpha.tolist() == [0, 1] and sigma.tolist() == [1, 0]


@pytest.mark.parametrize("zero_snr", [False, True])
def test_f_t_at_an_integer_is_that_row_of_the_schedule(zero_snr):
    alpha, sigma = sd_schedule(zero_snr=zero_snr)
    ours = wrap(None, zero_snr=zero_snr).f_t(torch.arange(T))
    assert torch.allclose(ours.double(), alpha / (alpha + sigma), atol=1e-7, rtol=0)


def test_f_t_is_linear_between_integers():
    t_dm = 999 * torch.rand(5000, generator=torch.Generator().manual_seed(0))
    truth = torch.from_numpy(np.interp(t_dm.numpy(), np.arange(T), F_T))
    assert torch.allclose(wrap(None).f_t(t_dm).double(), truth, atol=1e-7, rtol=0)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_f_t_inv_of_f_t_is_the_timestep_at_integers_and_between(zero_snr):
    ours = wrap(None, zero_snr=zero_snr)
    t_dm = torch.cat([torch.arange(T).double(),
                      999 * torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)])
    # float32 rounds a t_dm near 999 by 3e-5, and t_fm by 3e-8, which is 1e-4 of the narrowest step of 3.6e-4
    assert (ours.f_t_inv(ours.f_t(t_dm)).double() - t_dm).abs().max() < 2e-4


def test_f_t_inv_is_equation_12_and_decreasing_and_clamped_to_the_trained_timesteps():
    ours = wrap(None)
    t_fm = torch.linspace(0, 1, 20001)
    t_dm = ours.f_t_inv(t_fm)
    assert (t_dm - asked(t_fm)).abs().max() < 2e-4                # as above
    assert (t_dm.diff() <= 0).all() and (t_dm[1300:19400].diff() < 0).all()
    assert t_dm[0] == 999 and t_dm[-1] == 0


# ---- Eqs. 13-16: the velocity

@both_predictions
def test_an_exact_network_gives_the_exact_velocity_over_the_trained_range(prediction):
    ours = wrap(exact(prediction, X1, X0), prediction)
    for t_fm in INSIDE:
        u = velocity(ours, interpolate(X1, X0, t_fm.expand(5)), t_fm)
        assert (u - (X1 - X0)).abs().max() < 2e-5                 # float32 over alpha


@both_predictions
@pytest.mark.parametrize("posterior", [gaussian, mixture])
def test_the_optimal_network_gives_the_optimal_velocity_to_one_in_ten_thousand(prediction, posterior):
    ours = wrap(optimal(prediction, posterior), prediction)
    for t_fm in INSIDE:
        x_fm = interpolate(X1, X0, t_fm.expand(5))
        truth = optimal_velocity(posterior, x_fm, t_fm.expand(5))
        assert rel_diff(velocity(ours, x_fm, t_fm), truth) < 1e-5  # asked for: 1e-4; a timestep off by one: 3e-3


@both_predictions
def test_each_image_of_a_batch_has_its_own_time(prediction):
    t_fm = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    ours = wrap(Arbitrary(), prediction)
    together = ours(X1, t_fm, CONTEXT)
    for i in range(5):
        alone = ours(X1[i:i + 1], t_fm[i:i + 1], CONTEXT[i:i + 1])
        assert torch.allclose(together[i:i + 1], alone, atol=1e-6)


def test_the_velocity_as_printed_is_wrong_and_as_corrected_is_right():
    x1, x0 = torch.full((1, 1, 1, 1), 1.3), torch.full((1, 1, 1, 1), -0.7)
    printed = []
    for t_fm in (0.1, 0.5, 0.9):
        alpha, sigma = (a.item() for a in alpha_sigma(torch.tensor(t_fm).double()))
        x_dm, v = alpha * 1.3 + sigma * -0.7, alpha * -0.7 - sigma * 1.3
        printed.append(round((alpha - sigma) * (x_dm - v), 2))    # Eq. 16, last line
        u = wrap(exact("v", x1, x0))(interpolate(x1, x0, torch.tensor([t_fm])), torch.tensor([t_fm]), None)
        assert u.item() == pytest.approx(2, abs=1e-5)
    assert printed == [-0.72, 0.00, 1.81]


# ---- the ends

@both_predictions
def test_the_network_is_asked_inside_its_trained_timesteps_about_the_image_as_it_is(prediction):
    spy = Spy()
    t_fm = torch.tensor([0.0, 0.03, 0.5, 0.99, 1.0])
    wrap(spy, prediction)(X1, t_fm, CONTEXT)
    (x_dm, t_dm, context), = spy.calls
    r = 1 / torch.hypot(t_fm, 1 - t_fm).view(-1, 1, 1, 1)         # from t_fm, not from the clamped level
    assert torch.allclose(x_dm, r * X1, atol=1e-6) and context is CONTEXT
    assert t_dm[:2].tolist() == [999, 999] and 0 < t_dm[2] < 999 and t_dm[3:].tolist() == [0, 0]


@both_predictions
@pytest.mark.parametrize("t_fm", [0.0, 1.0])
def test_the_velocity_and_its_gradient_are_finite_at_the_ends(prediction, t_fm):
    net = Arbitrary()
    u = velocity(wrap(net, prediction), X0, t_fm)
    u.square().mean().backward()
    assert u.isfinite().all() and net.weight.grad.isfinite().all() and net.weight.grad.abs().max() > 0


@both_predictions
@pytest.mark.parametrize("seam", [F_T[0], F_T[-1]])
def test_the_velocity_is_continuous_at_both_seams(prediction, seam):
    ours, step = wrap(Arbitrary(), prediction), 1e-6
    jump = (velocity(ours, X1, seam + step) - velocity(ours, X1, seam - step)).abs().max()
    # this network's own slope is du/dt_fm = 2700 timesteps a unit / 7 / alpha = 6000 at the noisy seam
    assert jump < 6000 * 2 * step and jump < 1e-3 * velocity(ours, X1, seam).abs().max()


@both_predictions
def test_outside_the_trained_range_the_networks_answer_is_kept_as_v(prediction):
    """The rule for the ends, written out: v at the level that was asked about, alpha and sigma at t_fm."""
    for t_fm in (0.0, 0.02, 0.05, 0.98, 1.0):
        r = 1 / np.hypot(t_fm, 1 - t_fm)
        alpha, sigma, x_dm = r * t_fm, r * (1 - t_fm), (r * X1.double())
        t_dm = asked([t_fm] * 5)
        v = Arbitrary()(x_dm, t_dm, CONTEXT)
        if prediction == "eps":
            alpha_asked, sigma_asked = level(t_dm)
            v = (v - sigma_asked * x_dm) / alpha_asked
        truth = (alpha - sigma) * x_dm - (alpha + sigma) * v
        assert torch.allclose(velocity(wrap(Arbitrary(), prediction), X1, t_fm).double(), truth, atol=1e-4)


def test_an_optimal_eps_network_and_an_optimal_v_network_agree_everywhere_the_ends_included():
    for t_fm in (0.0, 0.03, 0.0641, 0.5, 0.9716, 0.99, 1.0):
        u_v, u_eps = (velocity(wrap(optimal(p, gaussian), p), X0, t_fm) for p in ("v", "eps"))
        assert rel_diff(u_eps, u_v) < 1e-5


@both_predictions
def test_the_first_step_of_a_pretrained_network_is_not_wasted(prediction):
    """At t_fm = 0 the truth is mu - x0. The network takes pure noise for its own last level, which holds
    alpha = 0.068 of signal, so it is that far off; a conversion at t_fm itself would give 0 here."""
    u = velocity(wrap(optimal(prediction, gaussian), prediction), X0, 0.0)
    assert rel_diff(u, MU - X0) < 0.07


@both_predictions
def test_the_last_moment_is_as_good_as_the_last_trained_level(prediction):
    u = velocity(wrap(optimal(prediction, gaussian), prediction), X1, 1.0)
    assert rel_diff(u, X1) < 0.12         # truth: x1. At sigma = 0.029 the optimal eps is 0.117 (x_dm - mu), not yet 0


# ---- Algorithm 2 is DDIM is Euler on sigma

def ddim(net, prediction, x_dm, t_fm_grid):
    """DDIM (eta = 0) in float64, from its definition: predict x1 and x0, move to the next alpha and sigma."""
    for now, then in zip(t_fm_grid[:-1], t_fm_grid[1:]):
        t_dm = asked([float(now)] * len(x_dm))
        alpha, sigma = level(t_dm)
        out = net(x_dm, t_dm, CONTEXT)
        if prediction == "v":
            x1, x0 = alpha * x_dm - sigma * out, sigma * x_dm + alpha * out
        else:
            x1, x0 = (x_dm - sigma * out) / alpha, out
        r = 1 / np.hypot(float(then), 1 - float(then))
        x_dm = r * float(then) * x1 + r * (1 - float(then)) * x0
    return x_dm


@both_predictions
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_n_euler_steps_are_n_ddim_steps_for_any_network(prediction, steps):
    ours = wrap(Arbitrary(), prediction, FromTrainedLevel).sample(X0, CONTEXT, steps)
    theirs = ddim(Arbitrary(), prediction, X0.double(), np.linspace(F_T[-1], 1, steps + 1))
    assert torch.allclose(ours.double(), theirs, atol=1e-4)       # float32 over alpha, then 25 steps of it


@both_predictions
def test_from_pure_noise_algorithm_2_is_one_step_by_hand_and_then_ddim(prediction):
    steps = 8
    net, x_dm = Arbitrary(), X0.double()
    v = net(x_dm, torch.full((5,), 999.0), CONTEXT)               # alpha = 0, sigma = 1 here: u = -x0 - v
    if prediction == "eps":
        v = (v - SIGMA[-1] * x_dm) / ALPHA[-1]
    x_fm = X0 + (-X0 - v) / steps
    x_dm = x_fm / np.hypot(1 / steps, 1 - 1 / steps)
    theirs = ddim(net, prediction, x_dm, np.linspace(0, 1, steps + 1)[1:])
    ours = wrap(net, prediction).sample(X0, CONTEXT, steps)
    assert torch.allclose(ours.double(), theirs, atol=1e-4)


def euler_discrete(net, prediction, x_ve, t_fm_grid):
    """diffusers' own sampler, started from x_ve = x1 + sigma x0; the network is asked with Eq. 12's t_dm (diffusers'
    own interpolation of log sigma differs from it by up to 0.03)."""
    from diffusers import EulerDiscreteScheduler
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       prediction_type={"v": "v_prediction", "eps": "epsilon"}[prediction])
    scheduler.set_timesteps(sigmas=[(1 - t_fm) / t_fm for t_fm in t_fm_grid])
    for t_fm, t_dm in zip(t_fm_grid, scheduler.timesteps):
        assert abs(t_dm - asked([t_fm]).item()) < 0.03
        out = net(scheduler.scale_model_input(x_ve, t_dm), asked([t_fm] * len(x_ve)), CONTEXT)
        x_ve = scheduler.step(out, t_dm, x_ve).prev_sample
    return x_ve


@both_predictions
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_n_euler_steps_are_n_steps_of_diffusers_euler_sampler_on_the_sigma_grid(prediction, steps):
    ours = wrap(Arbitrary(), prediction, FromTrainedLevel).sample(X0, CONTEXT, steps)
    theirs = euler_discrete(Arbitrary(), prediction, X0.double() / ALPHA[-1], np.linspace(F_T[-1], 1, steps + 1))
    assert torch.allclose(ours.double(), theirs.double(), atol=2e-4)   # theirs is float32 at sigma = 14.6


@both_predictions
def test_after_the_first_step_from_pure_noise_the_rest_is_diffusers_euler_sampler(prediction):
    steps, net = 8, Arbitrary()
    ours = wrap(net, prediction)
    x_fm = X0 + velocity(ours, X0, 0.0).detach() / steps          # sigma is infinite there: by hand
    theirs = euler_discrete(net, prediction, x_fm.double() * steps, np.linspace(0, 1, steps + 1)[1:])
    assert torch.allclose(ours.sample(X0, CONTEXT, steps).double(), theirs.double(), atol=2e-4)


def test_the_sigma_grid_for_other_tools_has_the_documented_numbers():
    grid = wrap(None, kind=FromTrainedLevel).grid(4).double()
    assert [round(s, 4) for s in ((1 - grid) / grid).tolist()] == [14.6146, 2.3553, 0.8796, 0.3055, 0]


# ---- Algorithm 2

def test_algorithm_2_is_euler_from_0_to_1_in_equal_steps():
    steps, net = 5, Arbitrary()
    ours, x_fm = wrap(net), X0
    for i in range(steps):
        x_fm = x_fm + velocity(ours, x_fm, i / steps).detach() / steps
    assert torch.allclose(ours.sample(X0, CONTEXT, steps), x_fm, atol=1e-5)


@both_predictions
def test_a_one_image_data_set_is_hit_in_one_step_from_the_first_trained_level(prediction):
    image = rand(1, *SHAPE[1:], seed=5)
    net = optimal(prediction, lambda x, a, s: image.double().expand_as(x))
    ours = wrap(net, prediction, FromTrainedLevel).sample(X0, CONTEXT, 1)
    assert torch.allclose(ours, image.expand_as(X0), atol=1e-5)


@both_predictions
def test_a_one_image_data_set_is_hit_from_pure_noise_in_two_steps(prediction):
    image = rand(1, *SHAPE[1:], seed=5)
    net = optimal(prediction, lambda x, a, s: image.double().expand_as(x))
    assert torch.allclose(wrap(net, prediction).sample(X0, CONTEXT, 2), image.expand_as(X0), atol=1e-5)


@both_predictions
def test_one_step_from_pure_noise_misses_a_one_image_data_set_by_the_schedules_last_alpha(prediction):
    """SD never saw pure noise: at t_dm = 999 it takes x0 for alpha x1 + sigma x0, and 0.068 of x0 stays."""
    image = rand(1, *SHAPE[1:], seed=5)
    net = optimal(prediction, lambda x, a, s: image.double().expand_as(x))
    ours = wrap(net, prediction).sample(X0, CONTEXT, 1)
    assert torch.allclose(ours, (image - ALPHA[-1].float() * X0) / SIGMA[-1].float(), atol=1e-5)


def test_with_zero_snr_a_one_image_data_set_is_hit_from_pure_noise_in_one_step():
    image = rand(1, *SHAPE[1:], seed=5)
    alpha, sigma = sd_schedule(zero_snr=True)
    net = optimal("v", lambda x, a, s: image.double().expand_as(x), f=(alpha / (alpha + sigma)).numpy())
    ours = wrap(net, zero_snr=True).sample(X0, CONTEXT, 1)
    assert torch.allclose(ours, image.expand_as(X0), atol=1e-5)


@both_predictions
@pytest.mark.parametrize("kind", [Diff2Flow, Diffusion])
def test_guidance_on_the_velocity_is_guidance_on_the_networks_output(prediction, kind):
    net, cfg = Arbitrary(), 3.0

    def guided(x_dm, t_dm, context):
        out, out_uncond = net(x_dm, t_dm, CONTEXT), net(x_dm, t_dm, UNCOND)
        return out_uncond + cfg * (out - out_uncond)

    ours = wrap(net, prediction, kind).sample(X0, CONTEXT, 4, uncond=UNCOND, cfg=cfg)
    theirs = wrap(guided, prediction, kind).sample(X0, CONTEXT, 4)
    assert torch.allclose(ours, theirs, atol=1e-3)                # |cfg| float32 over alpha, four steps of it
    assert not torch.allclose(ours, wrap(net, prediction, kind).sample(X0, CONTEXT, 4), atol=0.1)


def test_guidance_0_ignores_the_prompt():
    ours = wrap(Arbitrary())
    assert torch.allclose(ours.sample(X0, CONTEXT, 3, uncond=UNCOND, cfg=0.0), ours.sample(X0, UNCOND, 3), atol=1e-5)


def test_guidance_costs_one_call_of_two_batches_a_step_and_none_costs_one_call_of_one():
    spy = Spy()
    wrap(spy).sample(X0, CONTEXT, 3)
    assert [len(x_dm) for x_dm, _, _ in spy.calls] == [5] * 3
    spy = Spy()
    wrap(spy).sample(X0, CONTEXT, 3, uncond=UNCOND, cfg=2.0)
    assert [(len(x_dm), len(t_dm), len(context)) for x_dm, t_dm, context in spy.calls] == [(10, 10, 10)] * 3


def test_sampling_shows_each_point_of_its_path_and_keeps_no_graph():
    seen = []
    x1 = wrap(Arbitrary()).sample(X0, CONTEXT, 3, callback=seen.append)
    assert len(seen) == 3 and seen[-1] is x1 and not x1.requires_grad
    assert torch.allclose(seen[0], X0 + wrap(Arbitrary())(X0, torch.zeros(len(X0)), CONTEXT) / 3)


# ---- Algorithm 1

@both_predictions
def test_the_loss_of_an_exact_network_is_zero_and_of_a_perturbed_one_is_not(prediction):
    t_fm = torch.tensor([0.07, 0.2, 0.5, 0.8, 0.97])
    assert wrap(exact(prediction, X1, X0), prediction).loss(X1, CONTEXT, X0, t_fm) < 1e-9   # (2e-5)^2
    assert wrap(exact(prediction, X1, X0 + 0.1), prediction).loss(X1, CONTEXT, X0, t_fm) > 1e-3


@both_predictions
def test_the_loss_is_the_mean_squared_velocity_error(prediction):
    t_fm = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    ours = wrap(Arbitrary(), prediction)
    u = ours(interpolate(X1, X0, t_fm), t_fm, CONTEXT)
    truth = ((u - (X1 - X0)) ** 2).sum() / X1.numel()
    assert ours.loss(X1, CONTEXT, X0, t_fm).item() == pytest.approx(truth.item(), rel=1e-5)
    assert truth > 0.1


def test_the_loss_draws_standard_normal_noise_and_uniform_times():
    torch.manual_seed(0)
    spy, n = Spy(), 20000
    wrap(spy, kind=NaiveFM).loss(torch.full((n, 1, 2, 2), 3.0), None)        # the naive arm shows x_fm, t_fm as drawn
    (x_fm, t_fm, _), = spy.calls
    x0 = ((x_fm - 3 * t_fm.view(-1, 1, 1, 1)) / (1 - t_fm).view(-1, 1, 1, 1))[t_fm < 0.99]
    assert abs(x0.mean()) < 0.02 and abs(x0.std() - 1) < 0.02                 # 5 standard errors of 80,000 draws
    assert 0 <= t_fm.min() < 0.01 and 0.99 < t_fm.max() <= 1                  # the chance to miss an end is e^-200
    counts = torch.histc(t_fm, 10, 0, 1)
    assert (counts - n / 10).abs().max() < 5 * (n / 10) ** 0.5
    assert np.corrcoef(t_fm, x_fm[:, 0, 0, 0] - 3 * t_fm)[0, 1] == pytest.approx(0, abs=0.04)   # drawn apart


def test_nine_percent_of_uniform_times_fall_outside_the_trained_range():
    torch.manual_seed(0)
    spy = Spy()
    wrap(spy).loss(torch.zeros(20000, 1, 1, 1), None)
    t_dm = spy.calls[0][1]
    assert ((t_dm == 0) | (t_dm == 999)).float().mean().item() == pytest.approx(F_T[-1] + 1 - F_T[0], abs=0.01)


def test_given_noise_is_the_pair_that_is_trained_on():
    spy = Spy()
    wrap(spy).loss(X1, CONTEXT, X0, torch.full((5,), 0.5))
    assert torch.allclose(spy.calls[0][0], 2**0.5 * (X1 + X0) / 2, atol=1e-6) and spy.calls[0][2] is CONTEXT


@both_predictions
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_every_objective_reaches_the_network(name, prediction):
    net = Arbitrary()
    OBJECTIVES[name](net, ALPHA, SIGMA, prediction=prediction).loss(X1, CONTEXT).backward()
    assert net.weight.grad.isfinite().all() and net.weight.grad.abs().max() > 0


# ---- numerics

def test_casting_the_model_casts_the_network_and_not_its_table():
    ours = wrap(Arbitrary()).to(torch.bfloat16)
    assert ours.net.weight.dtype == torch.bfloat16
    assert ours.f_t_inv(ours.f_t(torch.tensor([998.5]))).item() == pytest.approx(998.5, abs=2e-4)
    assert ours.half().float().f_t(torch.arange(T)).numpy() == pytest.approx(F_T, abs=1e-7)


def test_a_copy_of_the_model_has_the_network_alone_in_its_state():
    ours = copy.deepcopy(wrap(Arbitrary()))
    assert list(ours.state_dict()) == ["net.weight"]
    assert ours.f_t_inv(torch.tensor([0.0])).item() == 999


def test_a_bfloat16_network_is_asked_with_float32_times_and_answers_in_float32():
    spy = Spy(lambda x_dm, t_dm, context: x_dm.bfloat16())
    ours = wrap(spy).to(torch.bfloat16)
    u = ours(X1.bfloat16(), torch.from_numpy(np.interp([998.5] * 5, np.arange(T), F_T)), CONTEXT)
    x_dm, t_dm, _ = spy.calls[0]
    assert x_dm.dtype == t_dm.dtype == u.dtype == torch.float32
    assert (t_dm - 998.5).abs().max() < 2e-4                      # bfloat16 would make it 1000


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_network_is_fed_float32_by_every_objective_though_the_images_are_float64(name):
    spy = Spy()
    ours = OBJECTIVES[name](spy, ALPHA, SIGMA)
    ours(X1.double(), torch.full((5,), 0.5).double(), CONTEXT)
    ours.loss(X1.double(), CONTEXT)
    ours.sample(X0.double(), CONTEXT, 1)
    assert len(spy.calls) == 3 and all(x.dtype == t.dtype == torch.float32 for x, t, _ in spy.calls)


@both_predictions
def test_under_autocast_the_algebra_stays_in_float32(prediction):
    t_fm = torch.tensor([0.07, 0.2, 0.5, 0.8, 0.97])
    with torch.autocast("cpu", torch.bfloat16):
        assert wrap(exact(prediction, X1, X0), prediction).loss(X1, CONTEXT, X0, t_fm) < 1e-9


@pytest.mark.parametrize("name", ["diff2flow", "dm"])
def test_bfloat16_latents_lose_nothing_more_in_the_loss(name):
    x1, x0, t_fm = X1.bfloat16(), X0.bfloat16(), torch.full((5,), 0.5)
    ours = OBJECTIVES[name](exact("v", x1, x0), ALPHA, SIGMA)
    loss = ours.loss(x1, CONTEXT, x0, t_fm)
    assert loss.dtype == torch.float32 and loss < 1e-9            # x1 - x0 in bfloat16 would leave 1e-5


@pytest.mark.parametrize("kind", [Diff2Flow, Diffusion])
def test_drawn_noise_is_float32_though_the_latents_are_bfloat16(kind):
    spy = Spy()
    wrap(spy, kind=kind).loss(torch.zeros(SHAPE).bfloat16(), None, t_fm=torch.zeros(5))
    x_dm = spy.calls[0][0]                                        # a multiple of x0 by 1 (diff2flow) or 0.998 (dm)
    x0 = x_dm / (SIGMA[-1].float() if kind is Diffusion else 1)
    assert (x0.bfloat16() - x0).abs().max() > 1e-3                # bfloat16 noise would be rounded to itself


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sampling_from_bfloat16_noise_loses_nothing_more(name):
    ours = OBJECTIVES[name](Arbitrary(), ALPHA, SIGMA)
    assert torch.equal(ours.sample(X0.bfloat16(), CONTEXT, 2), ours.sample(X0.bfloat16().float(), CONTEXT, 2))


def test_an_eps_network_without_a_signal_at_its_last_level_is_refused():
    with pytest.raises(ValueError, match="zero_snr"):
        wrap(None, "eps", zero_snr=True)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'x0'"):
        wrap(None, "x0")


def test_a_zero_snr_v_network_is_exact_down_to_pure_noise():
    alpha, sigma = sd_schedule(zero_snr=True)
    ours = wrap(exact("v", X1, X0, f=(alpha / (alpha + sigma)).numpy()), zero_snr=True)
    for t_fm in (0.0, 1e-4, 0.03, 0.5):
        u = velocity(ours, interpolate(X1, X0, torch.tensor(t_fm).expand(5)), t_fm)
        assert (u - (X1 - X0)).abs().max() < 1e-5


# ---- the baselines

def test_the_four_objectives_have_one_shape():
    assert list(OBJECTIVES) == ["diff2flow", "dm", "fm", "fm-flip"]
    assert OBJECTIVES["diff2flow"] is Diff2Flow and OBJECTIVES["dm"] is Diffusion and OBJECTIVES["fm"] is NaiveFM
    models = [make(Arbitrary(), ALPHA, SIGMA, prediction="eps") for make in OBJECTIVES.values()]
    assert {str(inspect.signature(m.loss)) for m in models} == {"(x1, context, x0=None, t_fm=None, mask=None)"}
    assert len({str(inspect.signature(m.sample)) for m in models}) == 1
    for m in models:
        assert m.loss(X1, CONTEXT, x0=X0, t_fm=torch.rand(5)).shape == ()
        assert m.sample(X0, CONTEXT, 2, uncond=UNCOND, cfg=2.0).shape == SHAPE


@both_predictions
def test_dm_trains_on_the_networks_own_loss(prediction):
    t_dm = torch.tensor([0, 1, 500, 998, 999])
    alpha, sigma = (a[t_dm].view(-1, 1, 1, 1) for a in (ALPHA, SIGMA))
    out = Arbitrary()(alpha * X1 + sigma * X0, t_dm, CONTEXT)
    truth = (out - output(prediction, X1, X0, alpha, sigma)).square().mean().item()
    ours = wrap(Arbitrary(), prediction, Diffusion).loss(X1, CONTEXT, X0, torch.from_numpy(F_T[t_dm]))
    assert ours.item() == pytest.approx(truth, rel=1e-5)
    assert wrap(exact(prediction, X1, X0), prediction, Diffusion).loss(X1, CONTEXT, X0) < 1e-9


def test_dm_asks_at_whole_timesteps_uniform_with_both_ends():
    torch.manual_seed(0)
    spy, n = Spy(), 20000                                         # the chance to miss an end is e^-20
    wrap(spy, "eps", Diffusion).loss(torch.full((n, 1, 1, 1), 3.0), None)
    (x_dm, t_dm, _), = spy.calls
    assert t_dm.dtype == torch.float32 and torch.equal(t_dm, t_dm.round())
    assert t_dm.min() == 0 and t_dm.max() == 999
    assert (torch.histc(t_dm, 10, 0, 1000) - n / 10).abs().max() < 5 * (n / 10) ** 0.5
    x0 = (x_dm[:, 0, 0, 0] - 3 * ALPHA[t_dm.long()]) / SIGMA[t_dm.long()]
    assert abs(x0.mean()) < 0.04 and abs(x0.std() - 1) < 0.04     # 5 standard errors


def test_dm_given_a_time_asks_at_the_nearest_whole_timestep():
    spy = Spy()
    wrap(spy, kind=Diffusion).loss(X1, CONTEXT, X0, torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0]))
    assert spy.calls[0][1].tolist() == asked([0.0, 0.3, 0.5, 0.9, 1.0]).round().tolist()


@both_predictions
@pytest.mark.parametrize("steps", [1, 4, 25])                     # divisors of 1000: diffusers steps by 1000 // N
def test_dm_samples_as_diffusers_ddim(prediction, steps):
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=True, timestep_spacing="trailing",
                              prediction_type={"v": "v_prediction", "eps": "epsilon"}[prediction])
    scheduler.set_timesteps(steps)
    x_dm = X0.double()
    for t_dm in scheduler.timesteps:
        x_dm = scheduler.step(Arbitrary()(x_dm, t_dm.expand(5), CONTEXT), t_dm, x_dm).prev_sample
    ours = wrap(Arbitrary(), prediction, Diffusion).sample(X0, CONTEXT, steps)
    assert torch.allclose(ours.double(), x_dm, atol=3e-4)         # theirs has a float32 alpha, divided by 0.068


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 30, 50, 999, 1000])
def test_dm_samples_at_the_trailing_timesteps(steps):
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    ours = wrap(None, kind=Diffusion)
    grid = ours.grid(steps)
    assert torch.allclose(ours.f_t_inv(grid[:-1]), scheduler.timesteps.float(), atol=2e-4) and grid[-1] == 1


@both_predictions
@pytest.mark.parametrize("name, sign", [("fm", 1), ("fm-flip", -1)])
def test_naive_fm_reads_the_raw_output_as_the_velocity_at_the_flows_own_image_and_time(name, sign, prediction):
    t_fm = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    ours = OBJECTIVES[name](Arbitrary(), ALPHA, SIGMA, prediction=prediction)
    x_fm = interpolate(X1, X0, t_fm)
    out = Arbitrary()(x_fm, t_fm, CONTEXT)
    assert torch.allclose(ours(x_fm, t_fm, CONTEXT).double(), sign * out, atol=1e-6)
    truth = (sign * out - (X1 - X0)).square().mean().item()
    assert ours.loss(X1, CONTEXT, X0, t_fm).item() == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("name, sign", [("fm", 1), ("fm-flip", -1)])
def test_naive_fm_samples_by_plain_euler_on_the_raw_output(name, sign):
    x_fm = X0.double()
    for i in range(6):
        x_fm = x_fm + sign / 6 * Arbitrary()(x_fm, torch.full((5,), i / 6), CONTEXT)
    ours = OBJECTIVES[name](Arbitrary(), ALPHA, SIGMA).sample(X0, CONTEXT, 6)
    assert torch.allclose(ours.double(), x_fm, atol=1e-5)


# ==================== The model: model.py ====================
# Claims about model.py: it computes what diffusers, transformers and open_clip compute, and it reads and writes
# the files people have. Random, nowhere-zero checkpoints with the real key sets (assets/*.json.gz), at a tenth of the width.


UNET = "model.diffusion_model."
NORM1_BIAS = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # tells v from eps
TOLERANCE = 1e-9  # in float64: equal but for summation order (1e-15); a wrong GroupNorm eps in one layer is 3e-9 or more
PROMPTS = [
    "", "a cat", "a red ball above a black box, " * 20, "x" * 200, "1234567890" * 9,  # the last three exceed 75 tokens
    "naïve café — 東京 in 日本, Ünïcödé e\u0301 Ζεύς Пушкин 한국어 שלום مرحبا STRASSE ß İstanbul ½ ²", "a 🦊 and a 🐻",
    "It's 3 o'clock (isn't it?) #1; a.b,c: 'x' [y] {z}/w\\ $5 100% ~ a_b-c--d... \"q\" we'll I'd they've DON'T",
    "  two   spaces\tand\na line\u00a0break  ", " \n"]


# ------------------------------------------------------------------ random checkpoints in the real layouts

def manifest(name):
    """The real file's key -> (shape, dtype); name is "sd15" (v1-5-pruned-emaonly) or "sd21" (v2-1_768-ema-pruned)."""
    with gzip.open(Path(model.__file__).parent / f"assets/{name}.json.gz") as file:
        return {key: (tuple(shape), getattr(torch, dtype)) for key, (shape, dtype) in json.load(file).items()}


def narrow(key, shape):
    """The UNet a tenth, the autoencoder a quarter as wide; the context and the text encoder 128."""
    if key.startswith(UNET):
        return tuple({768: 128, 1024: 128}.get(n, n // 10 if n % 320 == 0 else n) for n in shape)
    if key.startswith("first_stage_model."):
        return tuple(n // 4 if n >= 128 else n for n in shape)
    if key.startswith("cond_stage_model."):
        ratio = 8 if key.startswith("cond_stage_model.model.") else 6
        return tuple(n // ratio if n >= 768 and n != 49408 else n for n in shape)
    return shape


def random_tensor(key, shape, dtype):
    """Nowhere zero, and such that activations stay near 1."""
    if key.endswith("position_ids"):
        return torch.arange(77)[None]
    if not dtype.is_floating_point:
        return torch.full(shape, 875000, dtype=dtype)
    noise = torch.randn(shape)
    noise += noise == 0
    if len(shape) > 1:
        return noise * (0.5 if "embedding" in key else math.prod(shape[1:]) ** -0.5)
    return 0.2 * noise + (1 if key.endswith("weight") else 0)


def random_checkpoint(name, width=narrow):
    torch.manual_seed(0)
    tensors = {key: random_tensor(key, width(key, shape), dtype) for key, (shape, dtype) in manifest(name).items()}
    assert all(v.all() for k, v in tensors.items() if not k.endswith("position_ids"))
    return tensors


def hollow_checkpoint(name):
    """Every tensor of the real shape, at full size, over one stored number: a .ckpt of a few hundred kilobytes."""
    return {key: torch.ones((), dtype=dtype).expand(shape) for key, (shape, dtype) in manifest(name).items()}


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture(scope="module")
def files(folder):
    """name -> a narrow random checkpoint on disk."""
    paths = {name: folder / f"{name}.safetensors" for name in ("sd15", "sd21")}
    for name, path in paths.items():
        save_file(random_checkpoint(name), path, metadata={"format": "pt"})
    return paths


# ------------------------------------------------------------------ the same numbers as independent implementations

def references(name, tensors, divisor=10):
    """diffusers' UNet and autoencoder and transformers' text model, weights by diffusers' own conversion."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as convert
    from transformers import CLIPTextConfig, CLIPTextModel
    v2, full = name == "sd21", divisor == 1
    text_width = (1024 if v2 else 768) if full else 128
    unet = UNet2DConditionModel(
        block_out_channels=tuple(n // divisor for n in (320, 640, 1280, 1280)), layers_per_block=2,
        cross_attention_dim=text_width, use_linear_projection=v2,
        attention_head_dim=8 if not v2 else (5, 10, 20, 20) if full else (1, 1, 2, 2))  # diffusers means: heads
    unet.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config)))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        latent_channels=4, block_out_channels=tuple(n if full else n // 4 for n in (128, 256, 512, 512)))
    vae.load_state_dict(convert.convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config)))
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=text_width, intermediate_size=4 * text_width, max_position_embeddings=77,
        num_hidden_layers=23 if v2 else 12, num_attention_heads=(16 if v2 else 12) if full else 2,
        hidden_act="gelu" if v2 else "quick_gelu"))
    converted = (convert.convert_open_clip_checkpoint(text, tensors) if v2 else
                 convert.convert_ldm_clip_checkpoint(tensors))
    converted = {k.removeprefix("text_model."): v for k, v in converted.items()}
    if v2:  # diffusers leaves the last layer out by its full-size name only
        converted = {k: v for k, v in converted.items() if ".23." not in k and "text_projection" not in k}
    converted.pop("embeddings.position_ids", None)
    text.load_state_dict(converted)
    return types.SimpleNamespace(
        unet=lambda x, t_dm, context: unet(x, t_dm, context).sample, text=lambda ids: text(ids).last_hidden_state,
        encode=lambda images: vae.encode(images).latent_dist, decode=lambda z: vae.decode(z).sample,
        modules=[module.requires_grad_(False).eval() for module in (unet, vae, text)])


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def both(request, files):
    """Ours and theirs in float64, from one file."""
    theirs = references(request.param, load_file(files[request.param]))
    for module in theirs.modules:
        module.double()
    return load_checkpoint(files[request.param], dtype=torch.float64), theirs


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t_dm", [(0, 999), (0.25, 731.6)], ids=["integer", "fractional"])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=["square", "wide"])
def test_the_unet_equals_diffusers(both, size, t_dm):
    ours, theirs = both
    x, context, t_dm = randn(2, 4, *size), randn(2, 77, 128, seed=2), torch.tensor(t_dm, dtype=torch.float64)
    assert relative(ours.unet(x, t_dm, context), theirs.unet(x, t_dm, context)) < TOLERANCE


@pytest.mark.parametrize("size", [(32, 32), (48, 24)], ids=["square", "tall"])
def test_the_encoder_equals_diffusers(both, size):
    ours, theirs = both
    images = randn(2, 3, *size)
    posterior = theirs.encode(images)
    mean, std = ours.first_stage_model.moments(images)
    assert relative(mean, posterior.mean) < TOLERANCE and relative(std, posterior.std) < TOLERANCE
    assert relative(ours.encode(images), 0.18215 * posterior.mean) < TOLERANCE


def test_the_decoder_equals_diffusers(both):
    ours, theirs = both
    latents = randn(2, 4, 4, 6)
    assert relative(ours.decode(latents), theirs.decode(latents / 0.18215)) < TOLERANCE


def clip_tokenizer(**settings):
    """transformers' CLIP tokenizer, from the vocabulary that open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer
    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in own.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks), **settings)


def clip_ids(prompts, pad_token):
    ids = clip_tokenizer()(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    ended = (ids == 49407).cumsum(1) - (ids == 49407).int() > 0  # the places after the first end token
    return ids.masked_fill(ended, pad_token)


def test_text_embeddings_equal_transformers(both):
    ours, theirs = both
    ids = clip_ids(PROMPTS, 0 if ours.config.open_clip else 49407)
    assert relative(ours.encode_text(PROMPTS), theirs.text(ids)) < TOLERANCE


def test_sd2_text_embeddings_equal_open_clips_own_model_up_to_its_penultimate_layer(files):
    import open_clip
    from open_clip.model import CLIP
    config = open_clip.get_model_config("ViT-H-14")
    config["text_cfg"].update(width=128, heads=2)
    config["vision_cfg"].update(width=32, layers=1, head_width=32)
    theirs = CLIP(**{**config, "embed_dim": 128}).double().eval()
    prefix = "cond_stage_model.model."
    tensors = {k.removeprefix(prefix): v for k, v in load_file(files["sd21"]).items() if k.startswith(prefix)}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected and all(key.startswith("visual.") for key in missing)
    seen = {}
    theirs.transformer.resblocks[-2].register_forward_hook(lambda module, args, output: seen.update(x=output))
    theirs.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    ours = load_checkpoint(files["sd21"], dtype=torch.float64)
    assert relative(ours.encode_text(PROMPTS), theirs.ln_final(seen["x"])) < TOLERANCE


def test_the_text_towers_have_the_heads_and_activations_of_their_published_configurations():
    import open_clip
    from open_clip.transformer import QuickGELU
    for config, name in ((SD15, "ViT-L-14-quickgelu"), (SD21, "ViT-H-14")):
        published = open_clip.get_model_config(name)
        with torch.device("meta"):
            tower = model.text_tower(config)
        blocks = tower.transformer.resblocks
        sizes = tuple(published["text_cfg"][k] for k in ("width", "heads", "layers"))
        assert (tower.width, tower.heads, len(blocks)) == sizes
        assert blocks[0].attn.num_heads == tower.heads
        assert isinstance(blocks[0].mlp.gelu, QuickGELU) == published.get("quick_gelu", False)


def test_sd1_token_ids_equal_transformers_padded_with_the_end_token():
    settings = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    theirs = clip_tokenizer()(PROMPTS, **settings).input_ids
    assert torch.equal(tokenize(PROMPTS, pad_token=49407), theirs)


def test_sd2_token_ids_equal_transformers_and_open_clip_padded_with_zero():
    from open_clip import get_tokenizer
    ids = tokenize(PROMPTS, pad_token=0)
    assert torch.equal(ids, clip_ids(PROMPTS, 0)) and torch.equal(ids, get_tokenizer("ViT-H-14")(PROMPTS))


def test_an_exclamation_mark_is_a_word_and_no_padding():
    assert torch.equal(tokenize(["stop! now!!"], 49407), clip_ids(["stop! now!!"], 49407))
    assert tokenize(["stop! now!!"], 0)[0, :7].tolist() == [49406, 1691, 256, 692, 748, 49407, 0]


def test_typographic_characters_are_read_as_plain_ones_as_in_clips_training():
    """open_clip (like CLIP's own code) repairs text with ftfy; transformers 5 does not, and its ids differ here."""
    plain = ["it's a \"cat\" & a dog", "fine ABC"]
    fancy = ["it’s a “cat” &amp; a dog", "ﬁne ＡＢＣ"]
    assert torch.equal(tokenize(fancy, 0), tokenize(plain, 0)) and torch.equal(tokenize(plain, 0), clip_ids(plain, 0))
    assert not torch.equal(clip_ids(fancy, 0), clip_ids(plain, 0))


def test_an_encoding_can_be_a_posterior_sample(both):
    ours, theirs = both
    posterior = theirs.encode(randn(1, 3, 32, 32))
    torch.manual_seed(7)
    ours_sample = ours.encode(randn(1, 3, 32, 32), sample=True)
    torch.manual_seed(7)
    assert relative(ours_sample, SCALE * (posterior.mean + posterior.std * torch.randn_like(posterior.std))) < TOLERANCE


# ------------------------------------------------------------------ numerics in training

def test_sizes_that_do_not_divide_are_refused_in_one_line(files):
    sd = load_checkpoint(files["sd15"])
    for size in ((7, 8), (8, 12), (1, 1)):
        with pytest.raises(ValueError, match=f"^latents of {size[0]}x{size[1]}: .* 8$"):
            sd.unet(torch.zeros(1, 4, *size), torch.zeros(1), torch.zeros(1, 77, 128))
    assert sd.picture_size([64, 128]) == (64, 128) and sd.picture_size([128]) == (128, 128)
    assert sd.picture_size() == (512, 512)
    with pytest.raises(ValueError, match="^size 64x100: both sides must be multiples of 64"):
        sd.picture_size([64, 100])


@pytest.mark.parametrize("tokens", [64, 300])
def test_attention_in_bfloat16_on_a_cpu_is_attention(tokens):
    q, k, v = (rand(2, 8, n, 8, seed=n + i).bfloat16() for i, n in enumerate((tokens, 77, 77)))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative(model.attend(q, k, v), exact) < 8e-3                            # bfloat16 has 8 bits: 2^-8 = 4e-3


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_under_bf16_autocast_the_unet_stays_close_and_its_norms_and_time_embedding_are_float32(files, name, monkeypatch):
    sd = load_checkpoint(files[name])
    x, t_dm, context = randn(2, 4, 16, 16).float(), torch.tensor([3.3, 999.0]), randn(2, 77, 128, seed=2).float()
    exact = sd.unet(x, t_dm, context)
    dtypes = {}
    for norm in ("group_norm", "layer_norm"):
        def recorded(x, *args, original=getattr(torch.nn.functional, norm), norm=norm):
            dtypes.setdefault(norm, set()).add(x.dtype)
            return original(x, *args)
        monkeypatch.setattr(torch.nn.functional, norm, recorded)
    sd.unet.time_embed.register_forward_hook(lambda module, args, output: dtypes.update(time={args[0].dtype, output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        rough = sd.unet(x, t_dm, context)
    assert dtypes == dict.fromkeys(("group_norm", "layer_norm", "time"), {torch.float32})
    assert 1e-4 < relative(rough.float(), exact) < 2.5e-2


def test_a_model_read_as_bf16_stays_close_to_float32(files):
    x, t_dm, context = randn(2, 4, 16, 16).float(), torch.tensor([3.3, 999.0]), randn(2, 77, 128, seed=2).float()
    rough, exact = ((sd.unet(x, t_dm, context), sd.encode(randn(1, 3, 32, 32).float()), sd.decode(x), sd.encode_text(PROMPTS))
                    for sd in (load_checkpoint(files["sd21"], dtype=dtype) for dtype in (torch.bfloat16, torch.float32)))
    assert all(a.dtype == torch.bfloat16 and relative(a.float(), b) < 3e-2 for a, b in zip(rough, exact))


def test_times_are_not_rounded_in_a_bf16_network(files):
    sd = load_checkpoint(files["sd15"], dtype=torch.bfloat16)
    seen = []
    sd.unet.time_embed.register_forward_hook(lambda module, args, output: seen.append(args[0].float()))
    for t_dm in (998.0, 999.5):  # both would be 1000 in bfloat16
        sd.unet(torch.zeros(1, 4, 8, 8), torch.tensor([t_dm]), torch.zeros(1, 77, 128))
    assert relative(seen[0], seen[1]) > 0.1


def test_activation_checkpointing_recomputes_and_changes_no_gradient(files):
    sd = load_checkpoint(files["sd21"])
    unet = sd.unet.requires_grad_().train()
    x, t_dm, context = randn(2, 4, 8, 8).float(), torch.tensor([3.3, 900.0]), randn(2, 77, 128, seed=2).float()
    calls = []
    unet.input_blocks[1][0].in_layers[1].register_forward_hook(lambda *args: calls.append(1))
    gradients = []
    for unet.checkpointing in (False, True):
        unet.zero_grad()
        unet(x, t_dm, context).square().sum().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ------------------------------------------------------------------ files that load

@pytest.mark.parametrize("name, config", [("sd15", SD15), ("sd21", SD21)])
def test_the_architecture_is_read_from_the_shapes(files, name, config):
    assert read_config({key: shape for key, (shape, _) in manifest(name).items()}) == config
    narrow_config = replace(config, unet_widths=(32, 64, 128, 128), vae_widths=(32, 64, 128, 128), context_width=128, text_width=128)
    assert load_checkpoint(files[name]).config == narrow_config


def test_the_small_architecture_is_read_from_its_own_file(folder):
    torch.manual_seed(0)
    sd = StableDiffusion(TINY, "v")
    sd.save(folder / "tiny.safetensors")
    read = load_checkpoint(folder / "tiny.safetensors")
    assert read.config == TINY and read.prediction == "v"
    prompts, x, t_dm = ["a red ball"], torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    assert torch.equal(read.encode_text(prompts), sd.encode_text(prompts))
    assert torch.equal(read.unet(x, t_dm, read.encode_text(prompts)), sd.unet(x, t_dm, sd.encode_text(prompts)))


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_a_saved_file_has_the_same_tensors_bit_for_bit(files, folder, name):
    before = load_file(files[name])
    path = folder / "new folder" / "saved.safetensors"
    load_checkpoint(files[name]).save(path, step="3")
    after = load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    with safe_open(path, "pt") as file:
        assert file.metadata()["prediction"] in ("v", "eps")
        assert file.metadata()["step"] == "3"
    assert [p.name for p in path.parent.iterdir()] == ["saved.safetensors"]
    path.unlink()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(files, folder, monkeypatch):
    sd = load_checkpoint(files["sd15"])
    path = folder / "kept" / "model.safetensors"
    path.parent.mkdir()
    path.write_text("old")

    def full_disk(tensors, path, metadata):
        Path(path).write_text("half")
        raise OSError("no space left on device")
    monkeypatch.setattr(model, "save_file", full_disk)
    with pytest.raises(OSError):
        sd.save(path)
    assert path.read_text() == "old" and len(list(path.parent.iterdir())) == 1


def test_training_in_place_does_not_write_to_the_file_it_was_read_from(files):
    before = load_file(files["sd15"])
    sd = load_checkpoint(files["sd15"])
    with torch.no_grad():
        for parameter in sd.parameters():
            parameter.add_(1)
    after = load_file(files["sd15"])
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_model_can_be_saved_over_the_file_it_was_read_from(files, folder):
    before = load_file(files["sd15"])
    save_file(before, folder / "same.safetensors")
    load_checkpoint(folder / "same.safetensors").save(folder / "same.safetensors")
    after = load_file(folder / "same.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_float16_file_loads_and_saves_as_float16_again(files, folder):
    half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(files["sd21"]).items()}
    save_file(half, folder / "half.safetensors")
    sd = load_checkpoint(folder / "half.safetensors")
    assert {p.dtype for p in sd.parameters()} == {torch.float32}
    sd.save(folder / "half again.safetensors", dtype=torch.float16)
    again = load_file(folder / "half again.safetensors")
    assert all(torch.equal(half[k], again[k]) and half[k].dtype == again[k].dtype for k in half)


def with_ema(tensors, change=1):
    """A non-pruned file: an averaged copy of the UNet, under its names after "model." without dots."""
    return {**tensors, **{"model_ema." + "".join(k.split(".")[1:]): v + change  # as diffusers writes the rule
                          for k, v in tensors.items() if k.startswith(UNET)}}


def test_a_non_pruned_file_gives_its_plain_weights_or_when_asked_the_averaged_ones(files, folder, capsys):
    tensors = load_file(files["sd15"])
    save_file(with_ema(tensors), folder / "full.safetensors")
    key = UNET + "input_blocks.1.1.proj_in.weight"
    sd = load_checkpoint(folder / "full.safetensors")
    assert torch.equal(sd.state_dict()[key], tensors[key]) and ", non-EMA weights" in capsys.readouterr().out
    sd.save(folder / "without.safetensors")
    assert load_file(folder / "without.safetensors").keys() == tensors.keys()
    ema = load_checkpoint(folder / "full.safetensors", ema=True)
    assert ", EMA weights" in capsys.readouterr().out
    plain = sd.state_dict()
    assert all(torch.equal(v, plain[k] + k.startswith(UNET)) for k, v in ema.state_dict().items())
    assert "no EMA weights" in refusal(files["sd15"], ema=True)


def lightning_checkpoint(path, tensors, legacy=False):
    """As Lightning wrote them: the callback's class, pickled by name, is a dictionary key."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules[names[-1]].ModelCheckpoint = callback
    try:
        content = {"epoch": 0, "callbacks": {callback: {"monitor": "val/loss", "best_model_score": torch.tensor(0.5)}},
                   "state_dict": tensors}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    finally:
        for name in names:
            del sys.modules[name]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_lightning_ckpt_loads_though_lightning_is_not_installed(files, folder, legacy):
    tensors = load_file(files["sd15"])
    lightning_checkpoint(folder / "lightning.ckpt", tensors, legacy)
    ours, theirs = load_checkpoint(folder / "lightning.ckpt"), load_checkpoint(files["sd15"])
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    ours.save(folder / "converted.safetensors")
    assert load_file(folder / "converted.safetensors").keys() == tensors.keys()


# ------------------------------------------------------------------ v or eps

def test_the_callers_word_wins_then_the_metadata_then_sd1_is_eps(files, folder, capsys):
    path = folder / "v1.safetensors"
    save_file(load_file(files["sd15"]), path, metadata={"prediction": "v"})
    assert load_checkpoint(path).prediction == "v"
    assert "v-prediction (from the file's prediction)" in capsys.readouterr().out
    assert load_checkpoint(path, prediction="eps").prediction == "eps" and "(as asked)" in capsys.readouterr().out
    assert load_checkpoint(files["sd15"]).prediction == "eps" and "eps-prediction (SD 1.x" in capsys.readouterr().out


@pytest.mark.parametrize("written, prediction", [("epsilon", "eps"), ("v", "v")])
def test_the_metadata_may_be_in_the_words_of_the_modelspec_standard(files, folder, written, prediction):
    save_file(load_file(files["sd21"]), folder / "spec.safetensors", metadata={"modelspec.prediction_type": written})
    assert load_checkpoint(folder / "spec.safetensors").prediction == prediction


@pytest.mark.parametrize("std, prediction", [(0.0901, "v"), (0.0899, "eps")])
def test_sd2_is_v_or_eps_by_the_spread_of_one_norms_biases(files, folder, capsys, std, prediction):
    tensors = load_file(files["sd21"])
    tensors[NORM1_BIAS] *= std / tensors[NORM1_BIAS].std()
    save_file(tensors, folder / "guess.safetensors")
    assert load_checkpoint(folder / "guess.safetensors").prediction == prediction
    assert "guessed from a norm's std of 0.090" in capsys.readouterr().out


def test_a_prediction_that_does_not_exist_is_refused(files, folder):
    assert "'x0'" in refusal(files["sd15"], prediction="x0")
    assert "''" in refusal(files["sd15"], prediction="")
    save_file(load_file(files["sd15"]), folder / "odd.safetensors", metadata={"prediction": "velocity"})
    assert "'velocity'" in refusal(folder / "odd.safetensors")
    assert load_checkpoint(folder / "odd.safetensors", prediction="eps").prediction == "eps"


# ------------------------------------------------------------------ files that do not load: one line, with the path

def refusal(path, **settings):
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path, **settings)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    return message


def test_a_missing_file_a_folder_and_another_kind_of_file_are_refused(folder):
    assert "no such checkpoint file" in refusal(folder / "absent.safetensors")
    assert "a folder" in refusal(folder)
    (folder / "model.bin").write_bytes(b"x")
    assert ".safetensors or .ckpt" in refusal(folder / "model.bin")


@pytest.mark.parametrize("size", [0, 4, 100, 5_000, 200_000, 10_000_000, -1])
def test_a_truncated_safetensors_file_is_refused(files, folder, size):
    (folder / "cut.safetensors").write_bytes(files["sd15"].read_bytes()[:size])
    assert "truncated" in refusal(folder / "cut.safetensors")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("size", [0, 4, 100, 5_000, 200_000, 10_000_000, -1])
def test_a_truncated_ckpt_file_is_refused(files, folder, size, legacy):
    whole = folder / f"whole{legacy}.ckpt"
    if not whole.exists():
        torch.save({"state_dict": load_file(files["sd15"])}, whole, _use_new_zipfile_serialization=not legacy)
    (folder / "cut.ckpt").write_bytes(whole.read_bytes()[:size])
    assert "truncated" in refusal(folder / "cut.ckpt")


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("content", [
    b"<!DOCTYPE html>\n<html><body>Access denied\n</body></html>", b"\0" * 1000, b"\xff" * 1000,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n"], ids=["web page", "zeros", "ones", "git lfs"])
def test_a_failed_download_is_refused(folder, suffix, content):
    path = folder / f"download{suffix}"
    path.write_bytes(content)
    assert "truncated" in refusal(path)


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_names_another_class_is_refused_and_runs_nothing(folder):
    torch.save({"state_dict": {}, "extra": Intruder(folder / "made")}, folder / "intruder.ckpt")
    message = refusal(folder / "intruder.ckpt")
    assert "mkdir, which could run code" in message and not (folder / "made").exists()


@pytest.mark.parametrize("content", [[1, 2], 5, {}, {"state_dict": 5}, {1: torch.ones(1)}, torch.ones(3), {"a": "b"}], ids=str)
def test_a_pickle_of_something_else_is_refused(folder, content):
    torch.save(content, folder / "other.ckpt")
    refusal(folder / "other.ckpt")


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@pytest.mark.parametrize("key", [
    UNET + "input_blocks.1.0.in_layers.0.weight", UNET + "input_blocks.0.0.weight", UNET + "middle_block.1.proj_in.weight",
    "first_stage_model.quant_conv.weight", "first_stage_model.decoder.conv_in.bias", "first_stage_model.encoder.down.3.block.0.conv1.weight"])
def test_a_missing_tensor_is_named(folder, name, key):
    tensors = hollow_checkpoint(name)
    del tensors[key]
    torch.save(tensors, folder / "missing.ckpt")
    message = refusal(folder / "missing.ckpt")
    assert key in message and "alone" not in message


def test_an_unknown_tensor_is_named(folder):
    torch.save({**hollow_checkpoint("sd21"), UNET + "input_blocks.1.0.novelty": torch.ones(1)}, folder / "unknown.ckpt")
    assert UNET + "input_blocks.1.0.novelty" in refusal(folder / "unknown.ckpt")


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@pytest.mark.parametrize("key, shape", [
    (UNET + "input_blocks.4.0.in_layers.0.weight", (641,)), (UNET + "input_blocks.4.0.in_layers.2.weight", (641, 320, 3, 3)),
    (UNET + "out.2.weight", (4, 320)), (UNET + "middle_block.1.norm.weight", ()),
    ("first_stage_model.encoder.down.1.block.0.conv1.weight", (257, 128, 3, 3)), ("first_stage_model.quant_conv.weight", ())])
def test_a_tensor_of_a_wrong_shape_is_refused(folder, name, key, shape):
    torch.save({**hollow_checkpoint(name), key: torch.ones(()).expand(shape)}, folder / "shape.ckpt")
    refusal(folder / "shape.ckpt")


def test_a_text_encoder_that_does_not_fit_is_refused(folder):
    tensors, embedding = hollow_checkpoint("sd15"), "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    torch.save({**tensors, embedding: torch.ones(()).expand(49000, 768)}, folder / "vocabulary.ckpt")
    assert "49000" in refusal(folder / "vocabulary.ckpt")
    torch.save({**tensors, embedding: torch.ones(()).expand(49408, 769)}, folder / "width.ckpt")
    refusal(folder / "width.ckpt")
    other = {k: v for k, v in hollow_checkpoint("sd21").items() if not k.startswith("cond_stage_model.")}
    other.update((k, v) for k, v in tensors.items() if k.startswith("cond_stage_model."))
    torch.save(other, folder / "mixture.ckpt")
    message = refusal(folder / "mixture.ckpt")
    assert "1024" in message and "768" in message


def test_an_inpainting_checkpoint_is_refused_by_its_channels(folder):
    tensors = {**hollow_checkpoint("sd15"), UNET + "input_blocks.0.0.weight": torch.ones(()).expand(320, 9, 3, 3)}
    torch.save(tensors, folder / "inpainting.ckpt")
    message = refusal(folder / "inpainting.ckpt")
    assert "9 channels" in message and "inpainting" in message


OTHER_FILES = {
    "SDXL": ["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
             "first_stage_model.encoder.conv_in.weight", UNET + "label_emb.0.0.weight", UNET + "input_blocks.0.0.weight"],
    "LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"],
    "LoRA ": ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"],
    "diffusers": ["down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight", "conv_in.weight"],
    "diffusers ": ["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight", "quant_conv.weight"],
    "autoencoder": ["encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight", "quant_conv.weight"],
    "text encoder": ["text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.encoder.conv_in.weight"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "ControlNet": ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
    "2 tensors": ["weight", "bias"],
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_another_kind_of_model_is_refused_by_its_name(folder, what):
    save_file({key: torch.ones(1) for key in OTHER_FILES[what]}, folder / "other.safetensors")
    assert what.strip() in refusal(folder / "other.safetensors")


@pytest.mark.parametrize("name, what", [("unet", "diffusers"), ("vae", "diffusers"), ("text", "text encoder")])
def test_one_part_in_diffusers_own_layout_is_refused_by_its_name(both, folder, name, what):
    module = both[1].modules[["unet", "vae", "text"].index(name)]
    prefix = "text_model." if name == "text" else ""  # as published
    torch.save({prefix + k: torch.ones(()).expand(v.shape) for k, v in module.state_dict().items()}, folder / "part.ckpt")
    assert what in refusal(folder / "part.ckpt")


def test_an_autoencoder_alone_is_refused_by_its_name(folder):
    prefix = "first_stage_model."
    torch.save({"state_dict": {k.removeprefix(prefix): v for k, v in hollow_checkpoint("sd15").items() if k.startswith(prefix)}},
               folder / "vae.ckpt")
    assert "autoencoder" in refusal(folder / "vae.ckpt")


# ==================== LoRA: lora.py ====================
# lora.py: arithmetic, the paper's presets, and files shared with diffusers. python -m pytest test_lora.py


SMALL_SD1 = Config(unet_widths=(32, 64), attention=(True, False), context_width=768, linear_projection=False)
SMALL_SD2 = Config(unet_widths=(32, 128), attention=(True, True), context_width=1024, unet_res_blocks=1)


def random_unet(config, seed=0):
    """A UNet whose every parameter is random and nowhere zero, norms near the identity."""
    torch.manual_seed(seed)
    unet = UNet(config)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    return unet.requires_grad_(False)


def meta_unet(config):
    with torch.device("meta"):
        return UNet(config)


def train_a_bit(parameters):
    """Stands for training: move every trainable parameter."""
    torch.manual_seed(7)
    for parameter in parameters:
        parameter.data += 0.03 * torch.randn_like(parameter)


def adapted_unet(config, preset):
    unet = random_unet(config)
    train_a_bit(lora.inject(unet, preset))
    return unet


@torch.no_grad()
def answer(unet, config, dtype=torch.float32):
    """What the network says of a fixed non-square input; diffusers' or ours."""
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 4, 8, generator=noise).to(dtype)
    context = torch.randn(2, 7, config.context_width, generator=noise).to(dtype)
    out = unet(x, torch.tensor([10.0, 700.0]), context)
    return out if isinstance(out, torch.Tensor) else out.sample


def diffusers_unet(config):
    """diffusers' own UNet of the same architecture; `attention_head_dim` is its name for the number of heads."""
    from diffusers import UNet2DConditionModel
    blocks = ["CrossAttn" * attention for attention in config.attention]
    return UNet2DConditionModel(
        down_block_types=[f"{block}DownBlock2D" for block in blocks], block_out_channels=config.unet_widths,
        up_block_types=[f"{block}UpBlock2D" for block in blocks[::-1]], layers_per_block=config.unet_res_blocks,
        cross_attention_dim=config.context_width, use_linear_projection=config.linear_projection,
        attention_head_dim=[config.heads(width) for width in config.unet_widths])


def diffusers_copy(unet, config):
    """diffusers' UNet with our weights, through diffusers' own reading of the single-file layout."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    copy = diffusers_unet(config)
    state = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    copy.load_state_dict(convert_ldm_unet_checkpoint(state, dict(copy.config)))
    return copy.requires_grad_(False).eval()


def diffusers_pipeline(unet):
    """The pipeline that users call load_lora_weights on."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
    return StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=EulerDiscreteScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


# ------------------------------------------------------------------ arithmetic

@pytest.mark.parametrize("preset", ["base", "small", 3])
def test_a_lora_adds_nothing_at_the_start(preset):
    unet = random_unet(TINY)
    before = answer(unet, TINY)
    lora.inject(unet, preset)
    assert torch.equal(answer(unet, TINY), before)


def test_biases_of_adapted_layers_survive():
    for layer, x in ((nn.Linear(6, 5), torch.zeros(1, 6)), (nn.Conv2d(6, 5, 3, padding=1), torch.zeros(1, 6, 4, 4))):
        adapted = lora.LoRA(layer, 2)
        nn.init.normal_(adapted.up)
        assert torch.equal(adapted(x), layer(x)) and layer(x).abs().min() > 0


def test_the_adapter_of_a_layer_is_up_times_down_in_its_weight():
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(6, 5), torch.randn(2, 6)),
                     (nn.Conv2d(6, 5, 3, stride=2, padding=1), torch.randn(2, 6, 8, 8)),
                     (nn.Conv2d(6, 5, 1), torch.randn(2, 6, 8, 8))):
        adapted = lora.LoRA(layer.double(), 3).double()
        nn.init.normal_(adapted.up)
        change = torch.einsum("or,r...->o...", adapted.up.flatten(1), adapted.down)
        y = adapted(x.double())
        layer.weight.data += change
        assert torch.allclose(y, layer(x.double()), rtol=0, atol=1e-12)


def test_only_the_adapters_train_and_every_one_gets_a_gradient():
    unet = random_unet(TINY).requires_grad_(True)
    parameters = lora.inject(unet, "small")
    train_a_bit(parameters)
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    unet(torch.randn(1, 4, 4, 4), torch.tensor([5.0]), torch.randn(1, 7, TINY.context_width)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_the_rank_is_capped_at_the_layers_full_rank():
    unet = meta_unet(TINY)
    lora.inject(unet, 10_000)
    for path, layer in lora.adapters(unet).items():
        assert len(layer.down) == min(layer.weight.shape[0], layer.weight[0].numel()), path


def test_the_ratio_rule_rounds_up_and_takes_the_larger_side():
    unet = meta_unet(TINY)
    lora.inject(unet, "base")
    ranks = {path: len(layer.down) for path, layer in lora.adapters(unet).items()}
    assert ranks["input_blocks.1.0.in_layers.2"] == 20      # 96 -> 96: 19.2
    assert ranks["output_blocks.0.0.in_layers.2"] == 26     # 64 + 64 -> 64: 25.6


def test_a_layer_at_its_full_rank_is_trained_in_full_with_its_smaller_side_fixed_at_the_identity():
    unet = random_unet(TINY)
    lora.inject(unet, "base")
    first, last = unet.input_blocks[0][0], unet.out[2]
    assert first.down.shape == (36, 4, 3, 3) and torch.equal(first.down.flatten(1), torch.eye(36))
    assert last.up.shape == (4, 4, 1, 1) and torch.equal(last.up.flatten(1), torch.eye(4))
    trained = [p.numel() for layer in (first, last) for p in (layer.down, layer.up) if p.requires_grad]
    assert trained == [first.weight.numel(), last.weight.numel()]


@pytest.mark.parametrize("config, preset, count, paper", [
    (SD21, "base", 207_458_688, 207.5e6), (SD21, "small", 64_707_072, 64.7e6),
    (SD15, "base", 214_262_016, None), (SD15, "small", 64_182_784, None)])
def test_presets_train_as_many_parameters_as_the_papers_rules_give(config, preset, count, paper):
    trained = sum(parameter.numel() for parameter in lora.inject(meta_unet(config), preset))
    assert trained == count
    assert paper is None or abs(trained - paper) < 0.1e6


def test_the_base_preset_adapts_every_conv_and_attention_q_k_v_and_nothing_else():
    unet = meta_unet(SD21)
    plain = lora.plain_layers(unet)
    lora.inject(unet, "base")
    expected = {path for path, layer in plain.items() if isinstance(layer, nn.Conv2d) or path[-5:-1] == ".to_"}
    assert lora.adapters(unet).keys() == expected


def test_a_second_injection_is_an_error():
    unet = random_unet(TINY)
    lora.inject(unet, 2)
    with pytest.raises(ValueError, match="has a LoRA already"):
        lora.inject(unet, 2)
    lora.merge(unet)
    with pytest.raises(ValueError, match="has a LoRA already"):
        lora.inject(unet, 2)


@pytest.mark.parametrize("preset", ["large", "64", 0, -3, 2.5])
def test_an_unknown_preset_is_an_error_of_one_line(preset):
    with pytest.raises(ValueError, match="base, small or a rank") as error:
        lora.inject(meta_unet(TINY), preset)
    assert "\n" not in str(error.value)


def test_adapters_of_a_bfloat16_network_are_float32_and_run_with_and_without_autocast():
    unet = random_unet(TINY).bfloat16()
    parameters = lora.inject(unet, 4)
    train_a_bit(parameters)
    assert {p.dtype for p in parameters} == {torch.float32}
    plain = answer(unet, TINY, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = answer(unet, TINY)
    assert plain.dtype == torch.bfloat16 and relative(mixed, plain) < 0.03
    assert {p.dtype for p in parameters} == {torch.float32}


# ------------------------------------------------------------------ merge and unmerge

def test_merging_gives_what_the_adapters_give():
    unet = adapted_unet(SMALL_SD2, "small").double()
    adapted = answer(unet, SMALL_SD2, torch.float64)
    lora.merge(unet)
    # the same sum in another order: float64 rounding, but the time embedding is float32 in both
    assert relative(answer(unet, SMALL_SD2, torch.float64), adapted) < 1e-12


def test_a_merged_network_has_the_modules_and_the_names_of_the_plain_one():
    unet = adapted_unet(TINY, "small")
    lora.merge(unet)
    plain = random_unet(TINY)
    assert list(unet.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in unet.modules()] == [type(module) for module in plain.modules()]
    assert not torch.equal(unet.out[2].weight, plain.out[2].weight) and torch.equal(unet.out[2].bias, plain.out[2].bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_is_exact_to_the_bit(dtype):
    unet = random_unet(TINY).to(dtype)
    train_a_bit(parameters := lora.inject(unet, "small"))
    before, names = {k: v.clone() for k, v in unet.state_dict().items()}, list(unet.state_dict())
    adapted = answer(unet, TINY, dtype)
    lora.merge(unet)
    lora.unmerge(unet)
    assert list(unet.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert torch.equal(answer(unet, TINY, dtype), adapted)
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    lora.merge(unet)


# ------------------------------------------------------------------ files

@pytest.mark.parametrize("config, preset", [(SMALL_SD1, "base"), (SMALL_SD2, "small"), (TINY, 3)])
def test_saving_and_loading_is_exact_to_the_bit_and_keeps_the_metadata(tmp_path, config, preset):
    unet, path = adapted_unet(config, preset), tmp_path / "adapter.safetensors"
    lora.save(unet, path, {"preset": str(preset), "prediction": "v"})
    again = random_unet(config)
    assert lora.load(path, again) == {"preset": str(preset), "prediction": "v"}
    assert list(tmp_path.iterdir()) == [path]
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters(), strict=True))
    assert all(a.requires_grad == b.requires_grad for a, b in zip(unet.parameters(), again.parameters(), strict=True))
    assert torch.equal(answer(unet, config), answer(again, config))


def test_a_file_has_kohya_names_and_shapes_and_no_alpha(tmp_path):
    lora.save(adapted_unet(SMALL_SD1, 5), tmp_path / "a.safetensors", {})
    shapes = {key: tuple(value.shape) for key, value in load_file(tmp_path / "a.safetensors").items()}
    assert all(key.startswith("lora_unet_") and key.endswith(("lora_down.weight", "lora_up.weight")) for key in shapes)
    assert shapes["lora_unet_conv_in.lora_down.weight"] == (32, 4, 3, 3)
    assert shapes["lora_unet_conv_out.lora_up.weight"] == (4, 4, 1, 1)
    assert shapes["lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k.lora_down.weight"] == (5, 768)
    assert shapes["lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight"] == (5, 32, 3, 3)
    assert shapes["lora_unet_up_blocks_0_upsamplers_0_conv.lora_up.weight"] == (64, 5, 1, 1)


@pytest.mark.parametrize("config", [
    SD15, SD21, TINY, SMALL_SD1, Config(unet_widths=(64,), attention=(True,), unet_res_blocks=3),
    Config(unet_widths=(32, 64, 64, 64), attention=(False, True, False, True), unet_res_blocks=1)])
def test_every_layer_of_the_checkpoint_has_its_name_in_diffusers(config):
    ours = meta_unet(config)
    with torch.device("meta"):
        theirs = diffusers_unet(config)
    names = lora.kohya_names(ours, layers := lora.plain_layers(ours))
    expected = {"lora_unet_" + path.replace(".", "_"): layer.weight.shape
                for path, layer in lora.plain_layers(theirs).items()}
    assert {name: layers[path].weight.shape for path, name in names.items()} == expected


@pytest.mark.parametrize("config, preset", [
    (SMALL_SD1, "base"), (SMALL_SD1, "small"), (SMALL_SD2, "base"), (SMALL_SD2, 3)])
def test_diffusers_loads_our_file_and_gives_the_same_output(tmp_path, config, preset):
    theirs = diffusers_copy(random_unet(config), config)
    before = answer(theirs, config)
    ours = adapted_unet(config, preset)
    lora.save(ours, tmp_path / "adapter.safetensors", {"base": "sd", "prediction": "v", "preset": str(preset)})
    diffusers_pipeline(theirs).load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    expected = answer(ours, config)
    assert relative(answer(theirs, config), expected) < 1e-4 < 0.05 < relative(before, expected)


@pytest.mark.parametrize("config", [SMALL_SD1, SMALL_SD2])
def test_an_adapter_made_in_diffusers_adapts_our_network(tmp_path, config):
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model_state_dict
    ours = random_unet(config)
    theirs, before = diffusers_copy(ours, config), answer(ours, config)
    theirs.add_adapter(LoraConfig(r=8, lora_alpha=4, target_modules=[
        "to_q", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "time_emb_proj",
        "time_embedding.linear_1", "downsamplers.0.conv", "upsamplers.0.conv", "conv_out"]))
    train_a_bit([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(theirs).items()}
    file = {key.replace("unet.", "lora_unet_", 1) if key.startswith("unet.") else key: value
            for key, value in convert_state_dict_to_kohya(state).items()}
    file = {key: torch.tensor(4.0) if key.endswith(".alpha") else value.contiguous() for key, value in file.items()}
    save_file(file, tmp_path / "theirs.safetensors")
    assert lora.load(tmp_path / "theirs.safetensors", ours) == {}
    expected = answer(theirs, config)
    assert relative(answer(ours, config), expected) < 1e-4 < 0.05 < relative(before, expected)


def test_alpha_over_rank_is_folded_into_the_weights(tmp_path):
    unet, path = adapted_unet(TINY, 6), tmp_path / "a.safetensors"
    lora.save(unet, path, {})
    tensors = load_file(path)
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({**tensors, f"{name}.alpha": torch.tensor(1.5, dtype=torch.float16)}, path)
    again = random_unet(TINY)
    lora.load(path, again)
    to_q = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
    for layer, adapter in lora.adapters(again).items():
        scale = 0.25 if layer == to_q else 1.0
        assert torch.equal(adapter.up, unet.get_submodule(layer).up * scale)


def test_a_rank_above_the_layers_full_rank_loads(tmp_path):
    unet, path = random_unet(TINY), tmp_path / "a.safetensors"
    down, up = torch.randn(50, 4, 3, 3), torch.randn(TINY.unet_widths[0], 50, 1, 1)
    save_file({"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}, path)
    lora.load(path, unet)
    assert torch.equal(unet.input_blocks[0][0].down, down) and torch.equal(unet.input_blocks[0][0].up, up)


def broken_file(case, path):
    """One bad LoRA file of each kind, made from a good one for SMALL_SD2."""
    unet = UNet(SMALL_SD1 if case == "another base" else SMALL_SD2)
    lora.inject(unet, 4)
    lora.save(unet, path, {})
    good, first = load_file(path), "lora_unet_conv_in.lora_down.weight"
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif case == "no safetensors":
        path.write_bytes(b"\x80\x02}q\x00." * 20)
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "missing":
        path.unlink()
    elif case == "folder":
        path.unlink()
        path.mkdir()
    elif case == "text encoder":
        save_file({**good, "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(1)}, path)
    elif case == "half an adapter":
        save_file({key: value for key, value in good.items() if key != first}, path)
    elif case == "unknown layer":
        save_file({**good, "lora_unet_double_blocks_0.lora_up.weight": torch.zeros(1)}, path)
    elif case == "SDXL":
        name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
        save_file({f"{name}.lora_down.weight": torch.zeros(4, 2048)}, path)
    elif case == "DoRA":
        save_file({**good, "lora_unet_conv_in.dora_scale": torch.zeros(4)}, path)
    elif case == "checkpoint":
        save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, path)
    elif case == "no tensors":
        save_file({}, path)
    elif case == "wrong shape":
        save_file({**good, first: good[first][:, :3].contiguous()}, path)


@pytest.mark.parametrize("case, says", [
    ("truncated", "cannot be read as safetensors"), ("no safetensors", "cannot be read as safetensors"),
    ("empty", "cannot be read as safetensors"), ("missing", "cannot be read as safetensors"),
    ("folder", "cannot be read as safetensors"), ("another base", r"made for another base \(SD 1.x\)"),
    ("wrong shape", r"another base .*conv_in adapts \[32, 3, 3, 3\], this model's layer is \[32, 4, 3, 3\]"),
    ("text encoder", "carries text-encoder adapters, which are not supported"), ("SDXL", r"another base \(SDXL\)"),
    ("half an adapter", "incomplete.* 1 keys do not fit, the first is 'lora_unet_conv_in.lora_up.weight'"),
    ("unknown layer", "another base.*lora_unet_double_blocks_0"), ("DoRA", "not a .*LoRA.*dora_scale"),
    ("checkpoint", "not a .*LoRA.*model.diffusion_model.out.2.bias"), ("no tensors", "not a .*LoRA")])
def test_a_file_that_does_not_fit_is_an_error_of_one_line_and_changes_nothing(tmp_path, case, says):
    path = tmp_path / "bad.safetensors"
    broken_file(case, path)
    unet = meta_unet(SMALL_SD2)
    with pytest.raises(ValueError, match=says) as error:
        lora.load(path, unet)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not lora.adapters(unet)


def test_loading_twice_is_an_error(tmp_path):
    lora.save(adapted_unet(TINY, 2), tmp_path / "a.safetensors", {})
    unet = random_unet(TINY)
    lora.load(tmp_path / "a.safetensors", unet)
    with pytest.raises(ValueError, match="has a LoRA already"):
        lora.load(tmp_path / "a.safetensors", unet)


# ==================== Pictures: data.py ====================


PHOTOS = Path(sklearn.datasets.__file__).parent / "images"    # china.jpg and flower.jpg, 640 x 427


def many_scenes(style, n=300):
    return [random_scene(np.random.default_rng((7, i)), style) for i in range(n)]


def pair(relation, style="solid", swapped=False):
    front = Thing("circle", "red", "large", 0.40, -0.2, 0.0)
    behind = Thing("square", "blue", "small", 0.26, 0.25, 0.0)
    return Scene(style, "grey" if style == "solid" else "dark gradient", (front, behind), None, relation, swapped)


def photo_folder(tmp_path):
    for name in "china.jpg", "flower.jpg":
        shutil.copy(PHOTOS / name, tmp_path / name)
    return tmp_path


# ------------------------------------------------------------------------------------------------ procedural scenes

@pytest.mark.parametrize("style", ["solid", "outline"])
def test_an_item_depends_on_seed_and_index_only(style):
    first, second, other = Scenes(9, 32, 48, style, 3), Scenes(500, 32, 48, style, 3), Scenes(9, 32, 48, style, 4)
    for i in 8, 0, 5:
        a, b = first[i], second[i]
        assert a["caption"] == b["caption"]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["depth"], b["depth"])
    assert [first.scene(i) for i in range(9)] != [other.scene(i) for i in range(9)]


def test_scenes_with_objects_do_not_repeat():
    scenes = [scene for scene in map(Scenes(500, 8, 8, "solid", 0).scene, range(500)) if scene.things]
    assert len(set(scenes)) == len(scenes) > 450


def test_an_item_has_the_promised_shapes_and_ranges():
    item = Scenes(1, 32, 48, "solid", 0)[0]
    assert item["image"].shape == (3, 32, 48) and item["image"].dtype == torch.float32
    assert item["depth"].shape == (1, 32, 48) and item["depth"].dtype == torch.float32
    assert -1 <= item["image"].min() and item["image"].max() <= 1 and isinstance(item["caption"], str)


def test_scenes_come_round_again_after_the_last_one():
    scenes = Scenes(3, 8, 8, "solid", 0)
    assert len(scenes) == 3 and torch.equal(scenes[1]["image"], scenes[7]["image"])


@pytest.mark.parametrize("style", ["solid", "outline"])
def test_a_scene_is_the_same_picture_at_any_resolution(style):
    for scene in many_scenes(style, 40):
        fine, coarse = render(scene, 128, 128)[0].astype(float), render(scene, 64, 64)[0].astype(float)
        halved = fine.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(halved - coarse).mean() < 0.5 and np.abs(halved - coarse).max() < 70


@pytest.mark.parametrize("height, width", [(64, 96), (96, 64)])
def test_a_wide_or_tall_picture_shows_the_same_central_square(height, width):
    for scene in many_scenes("solid", 20):
        top, left = (height - 64) // 2, (width - 64) // 2
        square, depth = render(scene, 64, 64)
        image, deep = render(scene, height, width)
        assert np.array_equal(image[top:top + 64, left:left + 64], square)
        assert np.array_equal(deep[top:top + 64, left:left + 64], depth)


@pytest.mark.parametrize("style", ["solid", "outline"])
def test_the_front_object_is_nearer_larger_and_drawn_over(style):
    scenes = [scene for scene in many_scenes(style) if scene.relation == "in front of"]
    assert len(scenes) > 20
    for scene in scenes:
        front, behind = scene.things
        assert front.depth < behind.depth and front.radius > behind.radius
        depth = render(scene, 64, 64)[1]
        alone = [render(dataclasses.replace(scene, things=(thing,)), 64, 64)[1] == np.float32(thing.depth)
                 for thing in scene.things]
        assert (depth[alone[0]] == np.float32(front.depth)).all()           # nothing covers the front one
        assert 0.5 < (depth[alone[1]] == np.float32(behind.depth)).mean() < 0.95


def test_apparent_size_gives_depth_and_objects_stand_before_the_wall():
    for scene in many_scenes("solid"):
        depth = render(scene, 48, 48)[1]
        y = (np.arange(48) + 0.5) / 24 - 1
        wall = np.broadcast_to((20 / (3 + y))[:, None], (48, 48))
        for thing in scene.things:
            np.testing.assert_allclose(thing.depth * thing.radius, 1.15)
            assert thing.depth < wall.min()
        if scene.things:
            seen = ~np.isclose(depth, wall, rtol=1e-5)
            assert set(depth[seen]) == {np.float32(thing.depth) for thing in scene.things}


def test_the_wall_is_far_and_darker_at_the_top():
    image, depth = render(pair("left of"), 64, 64)
    assert 9.8 < depth[0, 0] < 10 and 5 < depth[-1, 0] < 5.1 and (np.diff(depth[:, 0]) < 0).all()
    assert image[0, 0].sum() < image[-1, 0].sum() - 30


def test_the_relation_and_the_place_hold_in_the_picture():
    for scene in many_scenes("solid", 1000) + many_scenes("outline", 1000):
        for thing in scene.things:
            assert max(abs(thing.x), abs(thing.y)) + thing.radius + data.LINE / 2 < 1
        if scene.place:
            (thing,), side = scene.things, data.PLACES[scene.place]
            along, across = (thing.x * side[0] + thing.y * side[1], thing.x * side[1] + thing.y * side[0])
            assert along > 0.4 and abs(across) < 0.15 if any(side) else max(abs(thing.x), abs(thing.y)) < 0.15
        elif scene.relation in ("left of", "above"):
            a, b = scene.things
            along, across = (b.x - a.x, b.y - a.y) if scene.relation == "left of" else (b.y - a.y, b.x - a.x)
            assert along > a.radius + b.radius + data.LINE and abs(across) < along / 2


def test_two_objects_differ_in_colour():
    for scene in many_scenes("solid"):
        assert len({thing.colour for thing in scene.things}) == len(scene.things)


@pytest.mark.parametrize("relation, converse", data.RELATIONS.items())
def test_labels_are_the_same_however_the_relation_is_put(relation, converse):
    one, other = pair(relation), pair(relation, swapped=True)
    assert one.caption == f"a large red circle {relation} a small blue square on a grey background"
    assert other.caption == f"a small blue square {converse} a large red circle on a grey background"
    assert one.labels() == other.labels()
    assert np.array_equal(render(one, 32, 32)[0], render(other, 32, 32)[0])


def test_captions_read_as_the_readme_says():
    thing = Thing("circle", "red", "small", 0.26, -0.5, 0.0)
    assert (Scene("solid", "grey", (thing,), place="left").caption
            == "a small red circle at the left on a grey background")
    assert (Scene("outline", "dark gradient", (thing,), place="left").caption
            == "an outline of a small red circle at the left on a dark gradient")
    assert Scene("solid", "grey", (thing,), place="centre").caption.startswith("a small red circle in the centre")
    assert Scene("solid", "orange").caption == "an orange image" and Scene("solid", "teal").caption == "a teal image"


@pytest.mark.parametrize("style", ["solid", "outline"])
def test_the_caption_determines_the_labels(style):
    found = {}
    for scene in many_scenes(style, 2000):
        assert found.setdefault(scene.caption, scene.labels()) == scene.labels()
        assert scene.labels().keys() == data.LABELS.keys()
        assert all(-100 == label or 0 <= label < len(data.LABELS[head]) for head, label in scene.labels().items())


def test_labels_that_do_not_apply_are_minus_100():
    plain = Scene("solid", "teal").labels()
    assert plain.pop("count") == 0 and plain.pop("background") == 2 and set(plain.values()) == {-100}
    two = pair("above").labels()
    assert two["place"] == -100 and -100 not in {two[head] for head in two if head != "place"}


@pytest.mark.parametrize("colour, value", [("black", 0), ("white", 255)])
def test_plain_black_and_white_are_exact(colour, value):
    image, depth = render(Scene("outline", colour), 40, 24)
    assert image.shape == (40, 24, 3) and (image == value).all() and np.ptp(depth) == 0


def test_the_share_of_plain_pictures_and_their_colours_follow_the_style():
    for style, share in ("solid", 0.04), ("outline", 0.10):
        scenes = many_scenes(style, 3000)
        plain = [scene for scene in scenes if not scene.things]
        assert abs(len(plain) / 3000 - share) < 0.02
        black_and_white = {"black", "white"} & {scene.background for scene in scenes}
        assert black_and_white == ({"black", "white"} if style == "outline" else set())


@pytest.mark.parametrize("shape", data.SHAPES)
def test_a_shape_stays_within_its_circle_and_its_distance_is_exact(shape):
    axis = np.linspace(-1, 1, 801)
    x, y = axis[None], axis[:, None]
    distance = data.signed_distance(Thing(shape, "red", "large", 0.4, 0.05, -0.1), x, y)
    inside = distance < 0
    assert np.hypot(x - 0.05, y + 0.1)[inside].max() <= 0.4 + 1e-6 and inside.mean() > 0.03
    slope = np.hypot(*np.gradient(distance, axis, axis))    # |grad d| = 1, but for differences taken across a ridge
    assert np.quantile(np.abs(slope - 1), 0.95) < 2e-3 and slope.max() < 1.1


def test_an_outline_is_dark_inside_and_bright_on_the_line():
    scene = Scene("outline", "dark gradient", (Thing("circle", "yellow", "large", 0.4, 0, 0),), place="centre")
    image = render(scene, 128, 128)[0].astype(int)
    line = 64 + round(0.88 * 0.4 * 64)
    assert image[64, 64].max() < 90 and image[64, line].max() > 200


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="'sketch'.*solid, outline"):
        Scenes(4, 8, 8, "sketch", 0)


# ------------------------------------------------------------------------------------------------ photographs

def test_captions_come_from_a_text_file_or_metadata_and_the_text_file_wins(tmp_path, capsys):
    folder = photo_folder(tmp_path)
    (folder / "deep" / "er").mkdir(parents=True)
    shutil.copy(PHOTOS / "flower.jpg", folder / "deep" / "er" / "again.JPG")
    (folder / "china.txt").write_text("\ufefftemples\n", encoding="utf-8")
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "china.jpg", "text": "not this"}) + "\r\n\n"
        + json.dumps({"file_name": "flower.jpg", "text": "Blüte"}) + "\n", encoding="utf-8")
    (folder / "deep" / "metadata.jsonl").write_text(json.dumps({"file_name": "er/again.JPG", "text": "again"}))
    images = ImageFolder(folder, 32, 48)
    assert [caption for _, caption in images.items] == ["temples", "again", "Blüte"]
    assert images[1]["caption"] == "again" and images[0]["image"].shape == (3, 32, 48)
    assert capsys.readouterr().err == ""


def test_missing_captions_are_empty_and_counted_once(tmp_path, capsys):
    images = ImageFolder(photo_folder(tmp_path), 16, 16)
    assert images[0]["caption"] == ""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2 of 2 images without a caption" in error and "china.jpg" in error


@pytest.mark.parametrize("line", ["{", "[1]", '{"file_name": "a.jpg"}', '{"file_name": "a.jpg", "text": 3}', '"a.jpg"'])
def test_a_broken_metadata_line_is_named(tmp_path, line):
    folder = photo_folder(tmp_path)
    (folder / "metadata.jsonl").write_text('{"file_name": "china.jpg", "text": "x"}\n' + line)
    with pytest.raises(ValueError, match="metadata.jsonl, line 2"):
        ImageFolder(folder, 16, 16)


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    (photo_folder(tmp_path) / "china.txt").write_bytes("Blüte".encode("latin-1"))
    with pytest.raises(ValueError, match="china.txt is not UTF-8"):
        ImageFolder(tmp_path, 16, 16)


def test_unreadable_images_are_skipped_with_their_count_and_the_first_name(tmp_path, capsys):
    folder = photo_folder(tmp_path)
    (folder / "a.jpg").write_bytes(b"")
    (folder / "b.png").write_text("no picture")
    (folder / "notes.md").write_text("not counted")
    assert len(ImageFolder(folder, 16, 16)) == 2
    error = capsys.readouterr().err
    assert "2 of 4 images unreadable and skipped" in error and "a.jpg" in error


def test_an_image_damaged_behind_its_header_gives_way_to_the_next(tmp_path, capsys):
    folder = photo_folder(tmp_path)
    (folder / "china.txt").write_text("temples")
    (folder / "flower.txt").write_text("flower")
    (folder / "china.jpg").write_bytes((PHOTOS / "china.jpg").read_bytes()[:20000])
    images = ImageFolder(folder, 16, 16)
    assert len(images) == 2 and images[0]["caption"] == "flower" and images[0]["image"].shape == (3, 16, 16)
    images[0]
    error = capsys.readouterr().err
    assert error.count("cannot decode") == 1 and "china.jpg" in error and "1 of 2 so far" in error


def test_a_folder_with_only_damaged_images_ends_in_an_error(tmp_path):
    (tmp_path / "china.jpg").write_bytes((PHOTOS / "china.jpg").read_bytes()[:20000])
    with pytest.raises(ValueError, match="none of the 1 images can be decoded"):
        ImageFolder(tmp_path, 16, 16)[0]


def test_a_folder_that_is_missing_a_file_or_empty_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, what in ("gone", "is not there"), ("file", "is a file"), ("empty", "has no readable image"):
        with pytest.raises(ValueError, match=f"{name} {what}"):
            ImageFolder(tmp_path / name, 16, 16)


def test_crop_and_flip_repeat_for_the_same_epoch_and_change_with_the_next(tmp_path):
    folder = photo_folder(tmp_path)
    first, resumed = ImageFolder(folder, 48, 32, seed=5), ImageFolder(folder, 48, 32, seed=5)
    first[3]
    assert torch.equal(first[4]["image"], resumed[4]["image"])             # key 4 of 2 pictures: picture 0, epoch 2
    assert not torch.equal(resumed[4]["image"], resumed[6]["image"])


def test_about_half_of_the_images_are_flipped_and_crops_reach_both_edges(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], (64, 256, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    images = ImageFolder(tmp_path, 64, 64)
    flips, means = 0, []
    for epoch in range(100):
        image = images[epoch]["image"]
        flips += bool(image[0, 0, 0] > image[0, 0, -1])
        means.append(float(image.mean()))
    assert 30 < flips < 70 and min(means) < -0.6 and max(means) > 0.6


def test_the_shorter_side_is_resized_to_cover_with_antialiasing(tmp_path):
    checks = (np.indices((128, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "checks.png")
    image = ImageFolder(tmp_path, 32, 32)[0]["image"][:, 2:-2, 2:-2]
    assert image.abs().max() < 0.15                                         # one-pixel checks average to grey


def test_any_size_of_photograph_fits_any_size_of_crop(tmp_path):
    for width, height in (1, 1), (1, 300), (999, 3), (333, 77), (77, 333), (101, 103):
        Image.new("RGB", (width, height), "red").save(tmp_path / f"{width}x{height}.png")
    for height, width in (8, 8), (49, 31), (33, 70), (1, 1):
        images = ImageFolder(tmp_path, height, width, seed=height)
        for i in range(len(images)):
            assert images[i]["image"].shape == (3, height, width) and (images[i]["image"][0] == 1).all()


def pixel(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return ((ImageFolder(tmp_path, 8, 8)[0]["image"][:, 4, 4] + 1) * 127.5).round().int().tolist()


def test_alpha_is_composited_on_white(tmp_path):
    assert pixel(tmp_path, Image.new("RGBA", (16, 16), (200, 0, 0, 0))) == [255, 255, 255]
    assert pixel(tmp_path, Image.new("RGBA", (16, 16), (255, 0, 0, 128))) == [255, 127, 127]
    assert pixel(tmp_path, Image.new("LA", (16, 16), (10, 0))) == [255, 255, 255]


def test_greyscale_palette_and_cmyk_become_rgb(tmp_path):
    assert pixel(tmp_path, Image.new("L", (16, 16), 77)) == [77, 77, 77]
    assert pixel(tmp_path, Image.new("RGB", (16, 16), (255, 0, 0)).convert("P")) == [255, 0, 0]
    assert pixel(tmp_path, Image.new("1", (16, 16), 1)) == [255, 255, 255]
    (tmp_path / "image.png").unlink()
    cyan = pixel(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "image.jpg", quality=95)
    assert cyan[0] < 10 and cyan[1] > 245 and cyan[2] > 245


def test_a_transparent_palette_colour_becomes_white(tmp_path):
    image = Image.new("P", (16, 16), 3)
    image.putpalette([200, 0, 0] * 4)
    assert pixel(tmp_path, image) == [200, 0, 0]
    assert pixel(tmp_path, image, transparency=3) == [255, 255, 255]


def test_a_16_bit_greyscale_image_keeps_its_tones(tmp_path):
    assert pixel(tmp_path, Image.fromarray(np.full((16, 16), 100 * 257, np.uint16))) == [100, 100, 100]


def test_a_16_bit_colour_image_keeps_its_tones(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    row = b"\0" + struct.pack(">3H", 10 * 257, 100 * 257, 200 * 257) * 16
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(row * 16)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    image = ImageFolder(tmp_path, 8, 8)[0]["image"][:, 4, 4]
    assert ((image + 1) * 127.5).round().int().tolist() == [10, 100, 200]


def test_the_exif_orientation_is_obeyed(tmp_path):
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))                        # white above; orientation 3 turns it by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    shown = ImageFolder(tmp_path, 32, 32)[0]["image"]
    assert shown[:, :12].max() < -0.8 and shown[:, 20:].min() > 0.8


def test_a_loader_with_workers_gives_the_same_batches(tmp_path):
    images = ImageFolder(photo_folder(tmp_path), 24, 24)
    here, there = (next(iter(torch.utils.data.DataLoader(images, 2, num_workers=n)))["image"] for n in (0, 1))
    assert torch.equal(here, there)


# ------------------------------------------------------------------------------------------------ depth

def save_rgb(path, height=48, width=64, seed=0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_png16(path, values):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


def item_of(folder, size=(48, 64)):
    return data.DepthFolders([folder], None, *size)[0]


def test_hypersims_distances_become_depths_along_the_axis_and_its_holes_are_masked(tmp_path):
    import h5py
    x, y = np.arange(1024) - 511.5, np.arange(768) - 383.5
    distance = 5 * np.sqrt(1 + (x[None] ** 2 + y[:, None] ** 2) / 886.81**2)        # a wall 5 m in front of the camera
    assert np.allclose(data.planar_depth(distance), 5, rtol=1e-12)
    distance[:100] = np.nan
    folder = tmp_path / "ai_001_001/images"
    (folder / "scene_cam_00_geometry_hdf5").mkdir(parents=True)
    with h5py.File(folder / "scene_cam_00_geometry_hdf5/frame.0007.depth_meters.hdf5", "w") as file:
        file["dataset"] = distance.astype(np.float16)
    save_rgb(folder / "scene_cam_00_final_preview/frame.0007.tonemap.jpg", 768, 1024)
    item = item_of(tmp_path)
    assert item["image"].shape == (3, 48, 64) and item["valid"].float().mean().item() == pytest.approx(668 / 768, abs=0.02)
    assert data.read_depth(next(tmp_path.rglob("*.hdf5")))[200, 300] == pytest.approx(5, rel=1e-3)     # float16 has 11 bits


def test_without_h5py_its_name_and_use_are_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        data.read_depth(tmp_path / "x.hdf5")


@pytest.mark.parametrize("depth, picture, far", [
    ("ai_001_001/depth_plane_cam_00_fr0000.png", "ai_001_001/rgb_cam_00_fr0000.png", 65_001),
    ("Scene01/clone/frames/depth/Camera_0/depth_00000.png", "Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg", 65_535),
], ids=["Marigold's Hypersim", "Virtual KITTI 2"])
def test_published_layouts_are_read_in_their_units_and_what_is_too_far_or_missing_is_masked(tmp_path, depth, picture, far):
    values = np.full((48, 64), 2000)
    values[:10], values[10:20] = far, 0
    save_png16(tmp_path / depth, values)
    save_rgb(tmp_path / picture)
    (found, path, scale, _), = data.find_depth(tmp_path)
    assert found == tmp_path / picture and data.read_depth(path, scale)[30, 30] == (2 if "plane" in depth else 20)
    assert item_of(tmp_path)["valid"].sum() == 28 * 64


def test_a_plain_folder_has_npy_or_16_bit_png_beside_each_picture(tmp_path):
    save_rgb(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.full((48, 64), 3.0))
    save_rgb(tmp_path / "sub/b.jpg")
    save_png16(tmp_path / "sub/b.png", np.full((48, 64), 7))
    save_rgb(tmp_path / "lonely.jpg")
    found = {(p.name, d.name) for p, d, *_ in data.find_depth(tmp_path)}
    assert found == {("a.png", "a.npy"), ("b.jpg", "b.png")}


def test_log_depth_has_its_quantiles_at_minus_one_and_one_whatever_the_unit_and_holes_are_far():
    torch.manual_seed(0)
    depth, valid = torch.rand(1, 64, 64) * 9 + 1, torch.rand(1, 64, 64) > 0.2
    depth[~valid] = 1e9
    result = data.normalise_depth(depth, valid)
    assert np.quantile(result[valid].numpy(), 0.01) == pytest.approx(-1, abs=1e-5)
    assert np.quantile(result[valid].numpy(), 0.99) == pytest.approx(1, abs=1e-5)
    assert (result[~valid] == 1).all() and result.min() == -1
    assert torch.allclose(result, data.normalise_depth(depth * 1000, valid), atol=1e-5)
    log = depth[valid].log()
    assert np.corrcoef(log.clamp(*np.quantile(log, [0.01, 0.99])), result[valid])[0, 1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (24, 64)])
def test_picture_and_depth_are_cropped_and_flipped_together(tmp_path, size):
    ramp = np.linspace(1, 255, 80)[None] + 0 * np.arange(60)[:, None]                    # depth can be read from red
    Image.fromarray(np.stack([ramp, ramp, ramp], -1).astype(np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.exp(ramp / 255))
    seen, dataset = set(), data.DepthFolders([tmp_path], None, *size)
    for key in range(8):
        item = dataset[key]
        red, depth = item["image"][0].flatten(), item["depth"].flatten()
        assert np.corrcoef(red, depth)[0, 1] > 0.999
        seen.add((bool(item["depth"][0, 0, 0] > item["depth"][0, 0, -1]), round(item["image"].mean().item(), 4)))
    assert len(seen) >= (8 if size == (32, 32) else 2) and {flipped for flipped, _ in seen} == {True, False}


def test_folders_are_drawn_from_by_their_weights(tmp_path):
    for name, value in ("a", 0), ("b", 255):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 48), (value,) * 3).save(tmp_path / name / "x.png")
        np.save(tmp_path / name / "x.npy", np.ones((48, 64)))
    dataset = data.DepthFolders([tmp_path / "a", tmp_path / "b"], [90, 10], 48, 64)
    share = np.mean([dataset[key]["image"].mean().item() > 0 for key in range(400)])
    assert share == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("make, says", [
    (lambda folder: np.save(folder / "a.npy", np.ones((48, 63))), "64x48, its depth"),
    (lambda folder: np.save(folder / "a.npy", np.ones((48, 64, 3))), "one number a pixel"),
    (lambda folder: (folder / "a.npy").write_bytes(b"no depth"), "cannot be read as depth"),
    (lambda folder: None, "no picture with a depth file"),
])
def test_depth_that_does_not_fit_its_picture_is_named(tmp_path, make, says):
    save_rgb(tmp_path / "a.png")
    make(tmp_path)
    with pytest.raises(ValueError, match=says):
        item_of(tmp_path)


# ------------------------------------------------------------------------------------------------ output

def test_a_saved_image_comes_back_exactly_and_leaves_no_partial_file(tmp_path):
    pixels = torch.arange(256).view(1, 16, 16).expand(3, -1, -1)
    save_image(tmp_path / "new" / "image.png", pixels / 127.5 - 1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "image.png"))[..., 0], pixels[0].numpy())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["image.png"]


def test_values_outside_the_range_are_clamped(tmp_path):
    save_image(tmp_path / "image.png", torch.tensor([-7.0, 0.0, 7.0]).view(3, 1, 1).bfloat16())
    assert Image.open(tmp_path / "image.png").getpixel((0, 0)) == (0, 128, 255)


def test_a_grid_places_image_i_at_row_and_column_and_enlarges_small_pictures(tmp_path):
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    save_grid(tmp_path / "grid.png", values.view(5, 1, 1, 1).expand(5, 3, 64, 64), columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[..., 0]
    assert grid.shape == (2 * 132 + 4, 3 * 132 + 4)
    centres = [grid[68 + 132 * (i // 3), 68 + 132 * (i % 3)] for i in range(5)]
    assert centres == [0, 64, 128, 191, 255]


def test_a_grid_has_room_for_labels_and_captions(tmp_path):
    images = torch.zeros(4, 3, 64, 64)
    save_grid(tmp_path / "bare.png", images, 2)
    save_grid(tmp_path / "full.png", images, 2, ["diff2flow", "naive fm"], ["a small red circle " * 9, "é", "", "x"])
    bare, full = (np.asarray(Image.open(tmp_path / f"{name}.png")).shape for name in ("bare", "full"))
    assert full[0] > bare[0] + 60 and full[1] > bare[1] + 30


@pytest.mark.parametrize("error, code, words", [
    (ValueError("steps is 0:\n  give 1 or more"), 2, "error: steps is 0: give 1 or more\n"),
    (FileNotFoundError(2, "No such file", "model.pt"), 2, "error: [Errno 2] No such file: 'model.pt'\n"),
    (KeyboardInterrupt(), 130, "interrupted\n")])
def test_what_a_user_can_mend_is_one_line_and_an_exit_code(capsys, error, code, words):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        cli(main)
    assert stop.value.code == code and capsys.readouterr().err == words


def test_an_error_of_ours_keeps_its_traceback():
    def main():
        assert False
    with pytest.raises(AssertionError):
        cli(main)


# ==================== Training and sampling: train.py, sample.py ====================
# Claims about train.py and sample.py, on a random model of the bundled one's shape: what a run leaves behind, that it
# can be killed, what sampling depends on, and the one line that a bad input gets.


HERE = Path(train.__file__).parent
SHORT = "--steps 4 --batch 2 --grad-accum 1 --lr 1e-3 --validation 2 --previews 2 --scenes 8 --size 32 --device cpu "
FEW = "--steps 2 --size 32 --device cpu "


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model of the bundled one's shape, with no layer at zero, so that prompts matter."""
    torch.manual_seed(0)
    sd = StableDiffusion(TINY, "v")
    for parameter in sd.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    sd.save(path, torch.float16, resolution="64")
    return path


@pytest.fixture(autouse=True)
def at_work(tiny, tmp_path, monkeypatch):
    """Each test in an empty folder of its own, with that model as the bundled one."""
    monkeypatch.setattr(train, "TINY_PRIOR", tiny)
    monkeypatch.setattr(sample, "TINY_PRIOR", tiny)
    monkeypatch.setattr(lora, "TINY_PRIOR", tiny)
    monkeypatch.chdir(tmp_path)


def call(module, words):
    """Run a script's main() as its command line would -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *shlex.split(words)])
        try:
            cli(module.main)
        except SystemExit as stop:
            code = stop.code
    return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def works(module, words):
    result = call(module, words)
    assert result.code == 0, result.err
    return result.out


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same(a, b):
    """Two .safetensors files hold the same tensors bit for bit."""
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def picture(path="samples.png"):
    return np.asarray(Image.open(path)).astype(int)


def singles(words):
    """The pictures that sample.py writes one by one."""
    works(sample, FEW + "--singles --out s.png " + words)
    pictures = [picture(path) for path in sorted(Path("s").iterdir())]
    shutil.rmtree("s")
    return pictures


# ------------------------------------------------------------------ what a run leaves behind

def test_train_alone_leaves_a_run_and_its_next_command_samples_from_it():
    out = works(train, "--steps 20 --batch 2 --validation 2 --previews 2 --scenes 8 --size 32")
    folder, = Path("runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "lora.safetensors", "state.safetensors", "metrics.jsonl", "before_after.png", "result.json",
        "validation.jsonl"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["step", "loss", "grad", "lr", "img_s", "mem_gb"]] * 2
    assert [row["step"] for row in rows] == [10, 20]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    result = json.loads((folder / "result.json").read_text())
    assert f"{result['velocity_error_before']:.4f} before, {result['velocity_error_after']:.4f} after" in out
    assert f"{folder}/before_after.png" in out and f"weights: {folder}/lora.safetensors" in out
    python, script, *words = shlex.split(out.split("next: ")[1])
    assert (python, script) == ("python", "sample.py")
    assert f"{folder}/lora.safetensors" in works(sample, shlex.join(words)) and Path("samples.png").exists()


def test_as_real_commands_training_and_the_next_command_that_it_prints_work(tiny):
    def command(words):
        return subprocess.run([sys.executable, *shlex.split(words)], capture_output=True, text=True, timeout=300)
    trained = command(f"{HERE}/train.py --ckpt {tiny} --out 'my run' --lora none " + SHORT)
    assert trained.returncode == 0, trained.stderr
    sampled = command(trained.stdout.split("next: python ")[1].replace("sample.py", f"{HERE}/sample.py", 1))
    assert sampled.returncode == 0, sampled.stderr
    assert Path("samples.png").exists() and "my run/model.safetensors" in sampled.stdout


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_trains_is_written_down_and_sampled_with(tiny, objective):
    works(train, f"{SHORT} --out run --objective {objective}")
    assert metadata("run/lora.safetensors")["objective"] == objective
    assert f"objective {objective}," in works(sample, f"{FEW} --n 1 --lora run/lora.safetensors --ckpt {tiny}")


def test_full_finetuning_saves_a_checkpoint_with_the_tensors_of_the_one_it_read(tiny):
    works(train, SHORT + "--out run --lora none --objective fm")
    before, after = load_file(tiny), load_file("run/model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    trained = {k for k in before if not torch.equal(before[k], after[k])}
    assert trained and all(k.startswith("model.diffusion_model.") for k in trained)
    assert load_checkpoint("run/model.safetensors").metadata["objective"] == "fm"


def test_what_is_saved_is_the_average_of_the_weights_and_without_averaging_the_last_ones():
    for decay in ("0", "0.9"):
        works(train, f"{SHORT} --out ema{decay} --lora none --ema {decay}")
        state, weights = load_file(f"ema{decay}/state.safetensors"), load_file(f"ema{decay}/model.safetensors")
        for name in ("out.2.weight", "input_blocks.1.0.in_layers.2.weight"):
            saved = weights["model.diffusion_model." + name]
            last, average = state["parameter/" + name].half(), state["average/" + name].half()
            assert torch.equal(saved, average) and torch.equal(saved, last) == (decay == "0")


def test_pictures_and_checkpoints_come_at_their_intervals():
    out = works(train, SHORT + "--out run --preview-every 2 --save-every 3")     # 4 steps
    assert {p.name for p in Path("run").glob("step_*")} == {"step_000002.png", "step_000004.png"}
    assert metadata("run/state.safetensors")["step"] == "4" and "run/step_000004.png" in out
    rows = [json.loads(line) for line in Path("run/validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[2]["velocity_error"] == json.loads(Path("run/result.json").read_text())["velocity_error_after"]
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 4]


def test_the_velocity_error_before_and_after_is_kept_without_previews_too():
    works(train, SHORT + "--out run --steps 1")
    result = json.loads(Path("run/result.json").read_text())
    assert [json.loads(line) for line in Path("run/validation.jsonl").read_text().splitlines()] == [
        {"step": 0, "velocity_error": result["velocity_error_before"]},
        {"step": 1, "velocity_error": result["velocity_error_after"]}]


def test_keep_leaves_the_weights_of_each_checkpoint_under_its_step():
    works(train, SHORT + "--out run --save-every 2 --keep")
    kept = {p.name: load_file(p) for p in Path("run").glob("lora*")}
    assert set(kept) == {"lora.safetensors", "lora-000002.safetensors", "lora-000004.safetensors"}
    half, last, own = (torch.cat([x.flatten() for _, x in sorted(kept[name].items())]) for name in sorted(kept))
    assert torch.equal(last, own) and not torch.equal(last, half)


def test_a_bundled_checkpoint_gets_the_recipe_of_the_demo_and_any_other_the_papers(monkeypatch, tmp_path):
    for folder, steps in ((train.TINY_PRIOR.parent, 300), (tmp_path / "elsewhere", 20000)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--ckpt", str(folder / "other.safetensors")])
        assert train.arguments().steps == steps


def test_a_new_run_does_not_mix_with_an_old_one_in_its_folder():
    works(train, SHORT + "--out run")
    refused = call(train, SHORT + "--out run")
    assert refused.code == 2 and refused.err.startswith("error: ") and "--resume run" in refused.err


# ------------------------------------------------------------------ killed and resumed

class Killed(BaseException):
    pass


def killed_run(words, step):
    """Train, but die in the middle of step `step`."""
    plain = train.learning_rate

    def deadly(s, args):
        if s == step:
            raise Killed
        return plain(s, args)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "learning_rate", deadly)
        call(train, words)


@pytest.mark.parametrize("kind", ["--lora base", "--lora none", "--task prior", "--task prior --data photos"])
def test_a_run_killed_after_a_checkpoint_and_resumed_ends_like_one_that_was_not(kind):
    if "photos" in kind:
        photographs()
    words = f"{SHORT} --steps 6 --grad-accum 2 --save-every 2 --ema 0.9 --caption-dropout 0.5 {kind} --out "
    works(train, words + "whole")
    killed_run(words + "killed", 3)
    assert metadata("killed/state.safetensors")["step"] == "2"
    with open("killed/metrics.jsonl", "a") as log:
        log.write('{"step": 3}\n')  # as longer runs do between two checkpoints
    works(train, "--resume killed")
    weights = "lora.safetensors" if "base" in kind else "model.safetensors"
    assert same(f"whole/{weights}", f"killed/{weights}") and same("whole/state.safetensors", "killed/state.safetensors")
    assert Path("whole/result.json").read_text() == Path("killed/result.json").read_text()
    steps = [json.loads(line)["step"] for line in Path("killed/metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_a_killed_and_resumed_autoencoder_ends_like_one_that_was_not():
    words = ("--task autoencoder --steps 3 --save-every 2 --batch 2 --scenes 16 --validation 8 --device cpu "
             "--preview-every 0 --out ")
    works(train, words + "whole")
    killed_run(words + "killed", 2)
    works(train, "--resume killed")
    assert same("whole/model.safetensors", "killed/model.safetensors")


def test_the_state_of_another_model_is_refused():
    works(train, SHORT + "--lora 2 --out run")
    state, about = load_file("run/state.safetensors"), metadata("run/state.safetensors")
    del state[next(key for key in state if key.startswith("parameter/"))]
    save_file(state, "run/state.safetensors", about)
    refused = call(train, "--resume run")
    assert refused.code == 2 and "another model" in refused.err.splitlines()[-1]


def test_a_run_killed_while_it_writes_its_last_checkpoint_still_gets_its_weights(monkeypatch):
    works(train, SHORT + "--save-every 2 --out whole")
    plain, calls = lora.save, []

    def deadly(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        plain(*args)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(lora, "save", deadly)
        call(train, SHORT + "--save-every 2 --out killed")
    works(train, "--resume killed")
    assert same("whole/lora.safetensors", "killed/lora.safetensors")


def test_resuming_a_finished_run_changes_nothing():
    works(train, SHORT + "--out run")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    works(train, "--resume run")
    assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}


def test_an_interrupt_says_how_to_go_on(monkeypatch):
    plain = Diff2Flow.loss
    losses = iter([plain] * 4)  # of the validation, and of three steps

    def interrupted(*args, **kwargs):
        try:
            return next(losses)(*args, **kwargs)
        except StopIteration:
            raise KeyboardInterrupt from None
    with monkeypatch.context() as patch:
        patch.setattr(Diff2Flow, "loss", interrupted)
        result = call(train, SHORT + "--save-every 1 --out 'my run'")
    assert result.code == 130 and result.err.splitlines()[-1] == "interrupted" and "Traceback" not in result.err
    python, script, *words = shlex.split(result.out.split("go on with: ")[1])
    assert (python, script) == ("python", "train.py")
    works(train, shlex.join(words))
    assert metadata("my run/state.safetensors")["step"] == "4"


# ------------------------------------------------------------------ the training itself

def losses(folder):
    return [json.loads(line)["loss"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_recomputed_activations_give_the_same_weights(monkeypatch):
    plain, calls = model.checkpoint, []
    monkeypatch.setattr(model, "checkpoint", lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs))
    works(train, SHORT + "--lora none --out plain")
    assert not calls
    works(train, SHORT + "--lora none --checkpointing --out checkpointed")
    assert calls
    a, b = load_file("plain/state.safetensors"), load_file("checkpointed/state.safetensors")
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-7) for k in a if k.startswith("parameter/"))


@pytest.mark.parametrize("kind", ["base", "none"])
def test_bf16_runs_on_a_cpu_and_stays_near_float32(kind):
    works(train, f"{SHORT} --lora {kind} --out fp32")
    works(train, f"{SHORT} --lora {kind} --precision bf16 --out bf16")
    assert losses("bf16") == pytest.approx(losses("fp32"), rel=0.05) and losses("bf16") != losses("fp32")


def test_two_accumulated_half_batches_are_one_batch(monkeypatch):
    plain = Diff2Flow.loss
    monkeypatch.setattr(Diff2Flow, "loss", lambda self, x1, context, x0=None, t_fm=None, mask=None: plain(
        self, x1, context, -x1.roll(1, -1), torch.full((len(x1),), 0.5)))  # drawn noise would differ
    for name, split in ("one", "--batch 4"), ("two", "--batch 2 --grad-accum 2"):
        works(train, f"{SHORT} --steps 1 --clip 1e6 --caption-dropout 0 {split} --out {name}")
    one, two = load_file("one/state.safetensors"), load_file("two/state.safetensors")
    gradients = [k for k in one if k.startswith("adam/exp_avg/")]
    assert gradients and all(torch.allclose(one[k], two[k], rtol=1e-3, atol=1e-6) for k in gradients)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(monkeypatch):
    plain, calls = Diff2Flow.loss, []

    def breaking(self, x1, *args, **kwargs):
        calls.append(x1)
        return plain(self, x1, *args, **kwargs) * (math.nan if len(calls) > 4 else 1)  # 1 validation, 3 steps
    monkeypatch.setattr(Diff2Flow, "loss", breaking)
    result = call(train, SHORT + "--save-every 2 --out run")
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("error: the loss is nan, its gradient nan at step 4: ")
    assert metadata("run/state.safetensors")["step"] == "2"
    assert all(t.isfinite().all() for t in load_file("run/lora.safetensors").values())


def test_dropping_every_caption_is_training_on_empty_captions():
    photographs()
    works(train, SHORT + "--data photos --caption-dropout 1 --out dropped")
    for path in (*Path("photos").glob("*.txt"), Path("photos/metadata.jsonl")):
        path.unlink()
    works(train, SHORT + "--data photos --caption-dropout 0 --out empty")
    assert same("dropped/lora.safetensors", "empty/lora.safetensors")


def test_logit_normal_times_crowd_the_middle_and_uniform_times_do_not(monkeypatch):
    seen = []

    def cheap(self, x1, context, x0=None, t_fm=None, mask=None):
        seen.append(torch.rand(len(x1)) if t_fm is None else t_fm)
        return next(p for p in self.parameters() if p.requires_grad).sum() * 0
    monkeypatch.setattr(Diff2Flow, "loss", cheap)
    middle = {}
    for kind in ("uniform", "logit-normal"):
        works(train, f"{SHORT} --batch 128 --lora 1 --t-sampling {kind} --out {kind}")
        times = torch.cat(seen[1:-1])
        assert len(times) == 512 and 0 < times.min() and times.max() < 1
        middle[kind] = ((times > 0.25) & (times < 0.75)).float().mean().item()
        seen.clear()
    assert middle["uniform"] == pytest.approx(0.5, abs=0.06)
    assert middle["logit-normal"] == pytest.approx(0.728, abs=0.06)


def encoded_images(monkeypatch, words):
    """-> the images that the training steps encode."""
    plain, seen = StableDiffusion.encode, []
    monkeypatch.setattr(StableDiffusion, "encode", lambda sd, images: seen.extend(images.cpu()) or plain(sd, images))
    works(train, SHORT + words)
    return seen[2:]  # without the validation pictures


def test_scenes_are_encoded_once_each(monkeypatch):
    images = encoded_images(monkeypatch, "--steps 12 --batch 3 --out run")
    scenes = [Scenes(8, 32, 32, "outline", 0)[i]["image"] for i in range(8)]
    assert len(images) == 8 and all(any(torch.equal(image, scene) for image in images) for scene in scenes)


def test_photographs_are_encoded_anew_with_new_crops(monkeypatch):
    photographs()
    images = encoded_images(monkeypatch, "--steps 6 --data photos --out run")
    assert len(images) == 12 and not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


# ------------------------------------------------------------------ photographs, and Stable Diffusion's own layouts

def photographs():
    """photos/: two with .txt captions, one with a caption in metadata.jsonl."""
    images = Path(sklearn.datasets.__file__).parent / "images"
    Path("photos").mkdir()
    for name, caption in ("china", "a temple by a lake"), ("flower", "a pink flower"):
        shutil.copy(images / f"{name}.jpg", "photos")
        Path(f"photos/{name}.txt").write_text(caption)
    with Image.open(images / "china.jpg") as image:
        image.crop((300, 100, 500, 400)).save("photos/roof.png")
    Path("photos/metadata.jsonl").write_text('{"file_name": "roof.png", "text": "a roof"}\n')


def test_a_folder_of_photographs_trains_and_a_broken_one_is_counted(monkeypatch):
    photographs()
    Path("photos/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a picture")
    plain, prompts = StableDiffusion.encode_text, set()
    monkeypatch.setattr(StableDiffusion, "encode_text", lambda sd, words: prompts.update(words) or plain(sd, words))
    result = call(train, SHORT + "--data photos --caption-dropout 0 --size 32 48 --out run")
    assert result.code == 0 and "warning: 1 of 4 images unreadable and skipped, first photos/broken.jpg" in result.err
    assert "3 pictures in photos, 32x48" in result.out and Path("run/lora.safetensors").exists()
    assert {"a temple by a lake", "a pink flower", "a roof"} <= prompts


def test_a_checkpoint_in_the_layout_of_stable_diffusion_1_trains_on_photographs_and_samples():
    photographs()
    save_file(random_checkpoint("sd15"), "sd15.safetensors", metadata={"format": "pt"})
    out = works(train, "--ckpt sd15.safetensors --data photos --size 64 --steps 2 --batch 2 --grad-accum 1 "
                "--validation 2 --previews 2 --lora small --device cpu --out run")
    assert "eps-network" in out and "weights: run/lora.safetensors" in out
    works(sample, f"{out.split('next: python sample.py ')[1].strip()} --n 2 --size 64 --device cpu")
    assert Path("samples.png").exists()


# ------------------------------------------------------------------ the chain that makes the bundled checkpoint

def test_the_chain_that_makes_the_bundled_checkpoint_works():
    works(train, "--task autoencoder --steps 2 --batch 2 --scenes 16 --validation 8 --device cpu --out ae")
    images = torch.stack([Scenes(4, 64, 64, "solid", 5)[i]["image"] for i in range(4)])
    with torch.no_grad():
        latents = load_checkpoint("ae/model.safetensors").encode(images)
    assert latents.mean().abs() < 0.5 and 0.5 < latents.std() < 2
    out = works(train, f"{SHORT} --task prior --ckpt ae/model.safetensors --out prior")
    assert "objective dm" in out and "style solid" in out
    before, after = load_file("ae/model.safetensors"), load_file("prior/model.safetensors")
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k].half(), after[k])}
    assert before.keys() == after.keys() and changed == {"model", "cond_stage_model"}
    works(train, "--task decoder --steps 2 --batch 2 --scenes 16 --validation 8 --device cpu "
          "--ckpt prior/model.safetensors --out decoder")
    assert metadata("decoder/model.safetensors")["objective"] == "dm"
    out = works(train, f"{SHORT} --ckpt decoder/model.safetensors --lora base --out style")
    assert "objective diff2flow" in out and "style outline" in out
    works(sample, FEW + "--n 1 --ckpt decoder/model.safetensors --lora style/lora.safetensors")
    assert Path("samples.png").exists()


def test_the_decoder_trains_alone_on_the_latents_as_they_are(tiny):
    out = works(train, "--task decoder --steps 2 --batch 2 --scenes 16 --validation 8 --device cpu --out run")
    assert "next: python sample.py --ckpt run/model.safetensors" in out
    before, after = load_file(tiny), load_file("run/model.safetensors")
    changed = {".".join(k.split(".")[:2]) for k in before if not torch.equal(before[k].float(), after[k].float())}
    assert before.keys() == after.keys()
    assert changed == {"first_stage_model.decoder", "first_stage_model.post_quant_conv"}


def test_the_standardised_autoencoder_has_unit_latents_and_decodes_as_before(tiny):
    sd = load_checkpoint(tiny)
    images = torch.stack([Scenes(70, 32, 32, "solid", 0)[i]["image"] for i in range(70)])
    vae = sd.first_stage_model
    mean, std = vae.moments(images)
    decoded = vae.decode(mean[:4] + std[:4])
    train.standardise(vae, images)
    latents = sd.encode(images)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    mean, std = vae.moments(images[:4])
    assert torch.allclose(vae.decode(mean + std), decoded, atol=1e-4)


# ------------------------------------------------------------------ sample.py

def test_the_same_seed_is_the_same_picture_and_another_is_not():
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        works(sample, f"{FEW} --n 2 --seed {seed} --out {name}.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_a_picture_does_not_depend_on_the_batch_size_or_on_how_many_there_are():
    ones, threes, fewer = singles("--n 4 --batch 1"), singles("--n 4 --batch 3"), singles("--n 2 --prompt x --prompt y")
    assert all(abs(a - b).max() <= 1 for a, b in zip(ones, threes))
    assert all(abs(a - b).max() <= 1 for a, b in zip(fewer, singles("--n 3 --prompt x --prompt y")))


def test_prompts_from_the_command_line_and_from_a_file_are_the_same_pictures_in_order():
    Path("prompts.txt").write_text("a red circle\n\na blue square on a grey background\n")
    a = singles("--prompt 'a red circle' --prompt 'a blue square on a grey background'")
    b = singles("--prompts prompts.txt")
    assert len(a) == len(b) == 2 and all(map(np.array_equal, a, b))
    c = singles("--prompt 'a red circle' --n 2")
    assert np.array_equal(a[0], c[0]) and not np.array_equal(a[1], c[1])


def test_guidance_and_the_negative_prompt_change_the_picture_and_without_guidance_the_latter_does_not():
    guided, negative = singles("--prompt x --cfg 6"), singles("--prompt x --cfg 6 --negative 'a red circle'")
    plain, also_plain = singles("--prompt x --cfg 1"), singles("--prompt x --cfg 1 --negative 'a red circle'")
    assert not np.array_equal(guided[0], negative[0]) and not np.array_equal(guided[0], plain[0])
    assert np.array_equal(plain[0], also_plain[0])


def test_with_singles_the_grid_holds_the_first_pictures_only(monkeypatch):
    monkeypatch.setattr(sample, "GRID", 3)
    five = singles("--n 5 --batch 2 --prompt x")
    grid = picture("s.png")
    works(sample, FEW + "--n 3 --batch 2 --prompt x --out s.png")
    assert len(five) == 5 and np.array_equal(grid, picture("s.png"))


def test_a_picture_has_the_size_asked_for_and_else_the_checkpoints():
    assert singles("--n 1 --size 32 48")[0].shape == (32, 48, 3)
    works(sample, "--steps 1 --n 1 --singles --device cpu")
    assert picture("samples/0000.png").shape == (64, 64, 3)


def test_a_lora_is_its_merged_model(tiny):
    works(train, SHORT + "--lora 4 --lr 0.01 --ema 0 --out run")
    sd = load_checkpoint(tiny)
    about = lora.load("run/lora.safetensors", sd.unet)
    lora.merge(sd.unet)
    sd.save("merged.safetensors", **about)
    adapted, = singles(f"--lora run/lora.safetensors --ckpt {tiny} --n 1")
    merged, = singles("--ckpt merged.safetensors --n 1")
    plain, = singles(f"--ckpt {tiny} --n 1")
    assert abs(adapted - merged).max() <= 1 and not np.array_equal(adapted, plain)


def test_the_sigmas_for_other_tools_are_the_documented_ones():
    out = works(sample, "--steps 4 --print-sigmas --device cpu")
    assert out.splitlines()[-1] == "14.6146 2.3553 0.8796 0.3055 0.0000" and not Path("samples.png").exists()


def test_without_a_run_the_bundled_model_is_sampled_and_said(tiny):
    Path("runs/unfinished").mkdir(parents=True)
    shutil.copy(tiny, "runs/unfinished/model.safetensors")
    assert works(sample, FEW + "--n 1").count(str(tiny)) == 1


def test_the_newest_finished_run_is_sampled_with_the_base_it_was_trained_from_and_said(tiny):
    shutil.copy(tiny, "other.safetensors")
    works(train, SHORT + "--lora none --out runs/full")
    assert "runs/full/model.safetensors" in works(sample, FEW + "--n 1")
    works(train, SHORT + "--lora 2 --ckpt other.safetensors --out runs/lora")
    out = works(sample, FEW + "--n 1")
    assert "other.safetensors: Stable" in out and "LoRA runs/lora/lora.safetensors" in out
    os.utime("runs/full/model.safetensors")
    assert "runs/full/model.safetensors" in works(sample, FEW + "--n 1")
    works(train, DEPTH + "--lora 2 --out runs/depth")
    assert "runs/full/model.safetensors" in works(sample, FEW + "--n 1")
    save_rgb("a.png")
    assert "depth of 1 pictures" in works(sample, "--task depth --image a.png --steps 1 --device cpu")


def test_a_lora_alone_is_sampled_on_its_own_base_whatever_the_newest_run_is(tiny):
    shutil.copy(tiny, "other.safetensors")
    works(train, SHORT + "--lora 2 --out lora")
    works(train, SHORT + "--lora 2 --ckpt other.safetensors --out moved")
    works(train, SHORT + "--lora none --out runs/full")
    assert f"{tiny}: Stable" in works(sample, FEW + "--n 1 --lora lora/lora.safetensors")
    assert "other.safetensors: Stable" in works(sample, FEW + "--n 1 --lora moved/lora.safetensors")


def test_the_averaged_weights_are_sampled_if_asked_and_are_the_base_of_a_lora_that_was_trained_on_them(tiny):
    save_file(with_ema(load_file(tiny), 0), "full.safetensors")
    out = works(train, SHORT + "--lora 2 --ckpt full.safetensors --use-ema --out run")
    assert out.strip().endswith("--ckpt full.safetensors --use-ema")
    assert ", EMA weights" in works(sample, FEW + "--n 1 --lora run/lora.safetensors")
    assert ", EMA weights" in works(sample, FEW + "--n 1 --ckpt full.safetensors --use-ema")
    assert ", non-EMA weights" in works(sample, FEW + "--n 1 --ckpt full.safetensors")


def test_a_lora_remembers_the_prediction_that_it_was_trained_with(tiny):
    works(train, SHORT + f"--lora 2 --prediction eps --ckpt {tiny} --out run")
    a = singles(f"--n 1 --ckpt {tiny} --lora run/lora.safetensors")
    b = singles(f"--n 1 --ckpt {tiny} --lora run/lora.safetensors --prediction eps")
    assert np.array_equal(a[0], b[0])


# ------------------------------------------------------------------ depth

DEPTH = SHORT.replace("--size 32", "--size 32 48") + "--task depth "


def test_the_widened_unet_is_the_old_one_where_both_inputs_agree(tiny):
    plain, wide = load_checkpoint(tiny), load_checkpoint(tiny)
    wide.widen()
    wide.widen()
    x, t_dm, context = rand(2, 4, 8, 8), torch.tensor([3.0, 700.0]), plain.encode_text(["", "a red circle"])
    expected = plain.unet(x, t_dm, context)
    assert torch.allclose(model.Conditioned(wide.unet)(x, t_dm, (context, x)), expected, atol=1e-5)
    assert not torch.allclose(model.Conditioned(wide.unet)(x, t_dm, (context, -x)), expected, atol=1e-2)
    wide.save("wide.safetensors")
    again = load_checkpoint("wide.safetensors")
    assert again.config.in_channels == 8
    assert torch.equal(again.unet.input_blocks[0][0].weight, wide.unet.input_blocks[0][0].weight)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_masked_loss_is_the_mean_over_the_masked_latents(objective):
    flow, mask = OBJECTIVES[objective](Arbitrary(), ALPHA, SIGMA), torch.zeros(SHAPE[0], 1, *SHAPE[2:])
    mask[1, :, 2:, :3] = 1
    t_fm = torch.full((SHAPE[0],), 0.4)
    whole = flow.loss(X1, CONTEXT, X0, t_fm, torch.ones_like(mask)).item()
    assert whole == pytest.approx(flow.loss(X1, CONTEXT, X0, t_fm).item(), rel=1e-6)
    alone = flow.loss(X1[1:2], CONTEXT[1:2], X0[1:2], t_fm[1:2], mask[1:2]).item()
    assert flow.loss(X1, CONTEXT, X0, t_fm, mask).item() == pytest.approx(alone, rel=1e-6) != pytest.approx(whole, rel=1e-3)
    assert flow.loss(X1, CONTEXT, X0, t_fm, 0 * mask).item() == 0


@pytest.mark.parametrize("words", ["--lora none", "--lora base --objective dm", "--lora 2 --objective fm"])
def test_depth_trains_on_scenes_and_samples_pictures_of_any_shape_at_their_own_size(tiny, words):
    out = works(train, DEPTH + words + " --out run")
    assert "python sample.py --steps 4 --task depth --image photo.jpg" in out
    Path("in/sub").mkdir(parents=True)
    save_rgb("in/wide.jpg", 50, 333)
    Image.new("L", (41, 97), 90).save("in/sub/grey.png")
    Image.new("RGBA", (60, 40), (200, 30, 30, 100)).save("alpha.png")
    weights = "--ckpt run/model.safetensors" if "none" in words else "--lora run/lora.safetensors"
    works(sample, f"--task depth --image in alpha.png --steps 2 --ensemble 2 --device cpu {weights} --out depth")
    for name, shape in ("wide", (50, 333)), ("sub/grey", (97, 41)), ("alpha", (40, 60)):
        depth = np.load(f"depth/{name}.npy")
        assert depth.shape == shape and depth.dtype == np.float32 and np.isfinite(depth).all() and abs(depth).max() <= 1
        with Image.open(f"depth/{name}_16bit.png") as png:
            assert np.allclose(np.asarray(png) / 32767.5 - 1, depth, atol=2e-5)
        assert picture(f"depth/{name}_colour.png").shape == (*shape, 3)
    assert not list(Path("depth").rglob("*partial*"))


def test_depth_trains_on_folders_with_holes_and_on_a_checkpoint_in_stable_diffusions_layout():
    for folder in "ab":
        for i in range(3):
            save_rgb(f"{folder}/{i}.jpg", 70, 90, seed=i)
            depth = np.random.default_rng(i).uniform(1, 9, (70, 90))
            depth[:30, :40] = [np.nan, np.inf, 0][i]
            np.save(f"{folder}/{i}.npy", depth)
    save_file(random_checkpoint("sd21"), "sd21.safetensors", metadata={"format": "pt"})
    words = ("--task depth --ckpt sd21.safetensors --data a b --weights 90 10 --size 64 128 --steps 2 --batch 2 "
             "--grad-accum 1 --validation 2 --previews 2 --lora small --device cpu --out run")
    out = works(train, words)
    assert "6 pictures with depth in a b, 64x128" in out and all(math.isfinite(loss) for loss in losses("run"))
    works(sample, "--task depth --image a/0.jpg --steps 1 --ckpt sd21.safetensors --lora run/lora.safetensors --device cpu")
    assert np.load("depth/0.npy").shape == (70, 90)


def test_only_latents_whose_pixels_all_have_depth_count(monkeypatch):
    save_rgb("d/a.png", 32, 48)
    depth = np.ones((32, 48)) + np.arange(48)
    depth[:, :9] = np.nan                           # two latents and a quarter of the third, of twelve
    np.save("d/a.npy", depth)
    plain, masks = Diff2Flow.loss, []
    monkeypatch.setattr(Diff2Flow, "loss", lambda *args: masks.append(args[-1]) or plain(*args))
    works(train, DEPTH + "--data d --out run")
    columns = torch.cat(masks)[:, 0].float()        # (N, 8, 12)
    assert (columns.sum(2) == 9).all() and ((columns[:, :, 0] == 0) ^ (columns[:, :, -1] == 0)).all()


def test_depth_killed_and_resumed_ends_like_one_that_was_not():
    words = DEPTH + "--save-every 2 --out "
    works(train, words + "whole")
    killed_run(words + "killed", 3)
    works(train, "--resume killed")
    assert same("whole/model.safetensors", "killed/model.safetensors")


def test_a_depth_model_and_a_picture_model_are_not_taken_for_each_other(tiny):
    works(train, DEPTH + "--lora none --out run")
    save_rgb("a.png")
    for script, words, says in (
            (sample, FEW + "--ckpt run/model.safetensors", "not trained for --task text-to-image"),
            (sample, f"--task depth --image a.png --ckpt {tiny}", "not trained for --task depth"),
            (train, SHORT + "--ckpt run/model.safetensors", "only --task depth trains")):
        refused = call(script, words)
        assert refused.code == 2 and says in refused.err.splitlines()[-1]


# ------------------------------------------------------------------ Reflow

PAIRS = FEW + "--pairs 7 --batch 2 --cfg 3 --out pairs "


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(sample, "SHARD", 4)


def test_a_pair_is_a_noise_and_what_the_model_makes_of_it_in_files_of_so_many(tiny, small_files):
    out = works(sample, PAIRS + "--prompt 'a red circle' --prompt 'a blue star' --seed 5")
    assert "7 pairs of 1,024 bytes" in out
    assert sorted(os.listdir("pairs")) == ["pairs-000000.safetensors", "pairs-000001.safetensors"]
    pairs = [data.read_pairs(f"pairs/pairs-00000{i}.safetensors") for i in (0, 1)]
    noise, latent = (torch.cat([p[name] for p in pairs]) for name in ("noise", "latent"))
    prompts = pairs[0]["prompts"] + pairs[1]["prompts"]
    assert noise.dtype == latent.dtype == torch.float16
    assert prompts == ["a red circle", "a blue star"] * 3 + ["a red circle"]
    assert 0.9 < noise.float().std() < 1.1 and len({row.sum().item() for row in noise}) == 7
    sd = load_checkpoint(tiny)
    flow = Diff2Flow(sd.unet, *sd_schedule(), sd.prediction)
    with torch.no_grad():
        expected = flow.sample(noise.float(), sd.encode_text(prompts), 2, sd.encode_text([""] * 7), 3.0)
    assert torch.allclose(latent.float(), expected, rtol=2e-3, atol=2e-3)  # float16 keeps 11 bits


def test_interrupted_pairs_go_on_where_they_stopped_and_none_is_made_twice(small_files, monkeypatch):
    works(sample, PAIRS.replace("--out pairs", "--out whole") + "--seed 1")
    plain, made = Diff2Flow.sample, []

    def deadly(self, x0, *args):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.extend([x0.sum().item()])
        return plain(self, x0, *args)
    with monkeypatch.context() as patch:
        patch.setattr(Diff2Flow, "sample", deadly)
        assert call(sample, PAIRS + "--seed 1").code == 130
    with monkeypatch.context() as patch:
        patch.setattr(Diff2Flow, "sample",
                      lambda self, x0, *args: made.append(x0.sum().item()) or plain(self, x0, *args))
        works(sample, PAIRS + "--seed 1")
        assert len(made) == len(set(made)) == 4  # 2 + 2 and 2 + 1 pairs
        works(sample, PAIRS + "--seed 1")
        assert len(made) == 4
    for name in os.listdir("whole"):
        assert same(f"whole/{name}", f"pairs/{name}") and metadata(f"whole/{name}") == metadata(f"pairs/{name}")


def test_two_processes_share_the_files_and_more_pairs_can_be_asked_for_later(small_files):
    works(sample, PAIRS.replace("7", "6"))
    works(sample, PAIRS)
    for shard in "0 1", "1 2":
        works(sample, PAIRS.replace("--out pairs", "--out shared") + f"--shards {shard}")
    assert len(os.listdir("pairs")) == 2
    for name in os.listdir("pairs"):
        assert same(f"pairs/{name}", f"shared/{name}")


def test_pairs_of_other_settings_are_not_mixed(small_files):
    works(sample, PAIRS)
    refused = call(sample, PAIRS + "--cfg 2")
    assert refused.code == 2 and "other settings" in refused.err.splitlines()[-1]
    works(sample, PAIRS.replace("--out pairs", "--out other") + "--cfg 2")
    shutil.move("other/pairs-000001.safetensors", "pairs/pairs-000002.safetensors")
    refused = call(train, SHORT.replace("--size 32", "") + "--task reflow --data pairs")
    assert refused.code == 2 and "other settings" in refused.err.splitlines()[-1]


def test_reflow_trains_on_the_given_pairs_and_its_lora_is_sampled_without_guidance(small_files, monkeypatch):
    works(sample, PAIRS)
    pairs = [data.read_pairs(f"pairs/pairs-00000{i}.safetensors") for i in (0, 1)]
    noise, latent = (torch.cat([p[name] for p in pairs]).float() for name in ("noise", "latent"))
    plain, seen = Diff2Flow.loss, []

    def spied(self, x1, context, x0=None, t_fm=None, mask=None):
        seen.extend((noise == n).all((1, 2, 3)).nonzero().item() for n in x0)
        assert all((latent[i] == l).all() for i, l in zip(seen[-len(x1):], x1))
        return plain(self, x1, context, x0, t_fm)
    with monkeypatch.context() as patch:
        patch.setattr(Diff2Flow, "loss", spied)
        out = works(train, SHORT.replace("--size 32", "") + "--task reflow --data pairs --steps 5 --out run")
    assert seen[:2] == seen[-2:] == [5, 6] and sorted(seen[2:7]) == [0, 1, 2, 3, 4] == sorted(seen[7:-2])
    assert "5 pairs in pairs, 32x32" in out and "LoRA small" in out
    assert metadata("run/lora.safetensors")["cfg"] == "1.0"
    assert "cfg 1," in works(sample, FEW + "--n 1 --lora run/lora.safetensors")


def test_reflow_killed_and_resumed_ends_like_one_that_was_not(small_files):
    works(sample, PAIRS)
    words = SHORT.replace("--size 32", "") + "--task reflow --data pairs --save-every 2 --out "
    works(train, words + "whole")
    killed_run(words + "killed", 3)
    works(train, "--resume killed")
    assert same("whole/lora.safetensors", "killed/lora.safetensors")


# ------------------------------------------------------------------ bad input: one line, exit code 2, nothing written

@pytest.fixture(scope="session")
def bad_files(tiny, tmp_path_factory):
    """Files that are not what they should be."""
    folder = tmp_path_factory.mktemp("bad")
    whole = tiny.read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[:len(whole) // 2])
    save_file({"weight": torch.ones(2)}, folder / "foreign.safetensors")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_{}.weight"
    adapter = {key.format("down"): torch.ones(2, 1024), key.format("up"): torch.ones(1280, 2)}
    save_file(adapter, folder / "lora.safetensors")
    save_file(load_file(tiny), folder / "odd.safetensors", {"prediction": "v", "objective": "bogus"})
    (folder / "empty").mkdir()
    (folder / "pairs").mkdir()
    (folder / "pairs/pairs-000000.safetensors").write_bytes(whole[:1000])
    (folder / "empty.txt").write_text("\n \n")
    (folder / "binary.txt").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "file").write_text("")
    for name, state in ("truncated", whole[:1000]), ("zeros", bytes(100)), ("foreign", None):
        (folder / name).mkdir()
        if state is None:
            shutil.copy(folder / "foreign.safetensors", folder / name / "state.safetensors")
        else:
            (folder / name / "state.safetensors").write_bytes(state)
    return folder


BAD = {
    "no checkpoint": ("train --ckpt {}/none.safetensors", "no such checkpoint file"),
    "a folder as checkpoint": ("train --ckpt {}/empty", "a folder"),
    "truncated checkpoint": ("train --ckpt {}/truncated.safetensors", "truncated"),
    "foreign checkpoint": ("train --ckpt {}/foreign.safetensors", "unknown file"),
    "LoRA as checkpoint": ("train --ckpt {}/lora.safetensors", "LoRA"),
    "size 65": ("train --size 65", "65x65"),
    "size 0": ("train --size 0", "0x0"),
    "three sizes": ("train --size 64 64 64", "3 numbers"),
    "steps 0": ("train --steps 0", "--steps 0"),
    "batch 0": ("train --batch 0", "--batch 0"),
    "grad accum 0": ("train --grad-accum 0", "--grad-accum 0"),
    "negative lr": ("train --lr=-1e-4", "--lr -0.0001"),
    "lr nan": ("train --lr nan", "--lr nan"),
    "caption dropout 2": ("train --caption-dropout 2", "--caption-dropout 2"),
    "negative seed": ("train --seed -1", "--seed -1"),
    "huge seed": ("train --seed 99999999999999999999", "--seed 1e+20"),
    "lora foo": ("train --lora foo", "--lora foo"),
    "lora 0": ("train --lora 0", "--lora 0"),
    "lora of a prior": ("train --task prior --lora base", "leave --lora out"),
    "data of an autoencoder": ("train --task autoencoder --data {}", "--data"),
    "no EMA weights": ("train --use-ema", "--use-ema"),
    "reflow without pairs": ("train --task reflow", "--pairs N"),
    "reflow of another objective": ("train --task reflow --data {} --objective dm", "velocity field"),
    "reflow in an empty folder": ("train --task reflow --data {}/empty", "no pairs-"),
    "reflow on truncated pairs": ("train --task reflow --data {}/pairs", "truncated"),
    "pairs 0": ("sample --pairs 0", "--pairs 0"),
    "shards without pairs": ("sample --shards 0 1", "--shards 0 1"),
    "shards beyond the pairs": ("sample --pairs 300 --shards 1 3", "--shards 1 3"),
    "pairs into a file": ("sample --pairs 2 --out {}/file", "file"),
    "captions of an empty folder": ("sample --data {}/empty", "no readable image"),
    "two folders of pictures": ("train --data a b", "one folder"),
    "weights without depth": ("train --weights 1", "--weights"),
    "weights of other folders": ("train --task depth --data {}/empty --weights 1 2", "2 weights for 1 folders"),
    "no depth": ("train --task depth --data {}/empty", "no picture with a depth file"),
    "depth without pictures": ("sample --task depth", "--image"),
    "pictures without depth": ("sample --image {}/file", "--task depth"),
    "depth of a missing picture": ("sample --task depth --image {}/none.jpg", "no such file"),
    "depth of no pictures": ("sample --task depth --image {}/empty", "no picture"),
    "ensemble 0": ("sample --task depth --image {}/file --ensemble 0", "--ensemble 0"),
    "no data folder": ("train --data {}/none", "not there"),
    "empty data folder": ("train --data {}/empty", "no readable image"),
    "data file": ("train --data {}/file", "a file"),
    "resume nothing": ("train --resume {}/none", "no such file"),
    "resume without state": ("train --resume {}/empty", "no such file"),
    "resume truncated": ("train --resume {}/truncated", "truncated"),
    "resume zeros": ("train --resume {}/zeros", "zeros/state.safetensors"),
    "resume foreign": ("train --resume {}/foreign", "foreign/state.safetensors"),
    "train on no device": ("train --device nonsense", "--device nonsense"),
    "out is a file": ("train --out {}/file", "file"),
    "out below a file": ("train --out {}/file/run", "file"),
    "sample no checkpoint": ("sample --ckpt {}/none.safetensors", "no such checkpoint file"),
    "sample truncated": ("sample --ckpt {}/truncated.safetensors", "truncated"),
    "sample no LoRA": ("sample --lora {}/none.safetensors", "none.safetensors"),
    "LoRA of another base": ("sample --lora {}/lora.safetensors", "another base (SD 2.x)"),
    "checkpoint as LoRA": ("sample --lora TINY", "not a LoRA"),
    "truncated LoRA": ("sample --lora {}/truncated.safetensors", "truncated.safetensors"),
    "sample size 65": ("sample --size 65", "65x65"),
    "sample three sizes": ("sample --size 64 64 64", "3 numbers"),
    "sample steps 0": ("sample --steps 0", "--steps 0"),
    "sample batch 0": ("sample --batch 0", "--batch 0"),
    "sample n 0": ("sample --n 0", "--n 0"),
    "sample negative seed": ("sample --seed -1", "--seed -1"),
    "sample cfg nan": ("sample --cfg nan", "--cfg nan"),
    "sample on no device": ("sample --device nonsense", "--device nonsense"),
    "an objective of the future": ("sample --ckpt {}/odd.safetensors", "'bogus' is unknown"),
    "no prompts": ("sample --prompts {}/none.txt", "none.txt"),
    "empty prompts": ("sample --prompts {}/empty.txt", "no prompt"),
    "binary prompts": ("sample --prompts {}/binary.txt", "not UTF-8"),
    "prompts folder": ("sample --prompts {}/empty", "empty"),
    "grid is a folder": ("sample --out {}/empty", "--out"),
    "grid is no picture": ("sample --out grid.txt", "--out grid.txt"),
    "grid below a file": ("sample --out {}/file/x.png", "file"),
    "singles over a file": ("sample --singles --out {}/file.png", "file"),
    "train style": ("train --style bogus", "invalid choice"),
    "train task": ("train --task bogus", "invalid choice"),
    "unknown option": ("train --bogus 1", "unrecognized"),
    "sample objective": ("sample --objective bogus", "invalid choice"),
    "sample steps x": ("sample --steps x", "invalid int"),
    "train cuda": ("train --device cuda", "no such device"),
    "sample cuda": ("sample --device cuda:0", "no such device"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_gets_one_line_and_leaves_nothing_behind(bad_files, tiny, tmp_path, monkeypatch, case):
    words, says = BAD[case]
    script, words = words.replace("{}", str(bad_files)).replace("TINY", str(tiny)).split(" ", 1)
    if "cuda" in words:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = sorted(bad_files.rglob("*"))
    rendered = []
    monkeypatch.setattr(Diff2Flow, "sample", lambda *_: rendered.append(1) or pytest.fail("sampled before it failed"))
    result = call({"train": train, "sample": sample}[script], words)
    lines = result.err.splitlines()
    assert result.code == 2 and says in lines[-1]
    assert lines[0].startswith("usage:") or (len(lines) == 1 and lines[0].startswith("error: "))
    assert sorted(bad_files.rglob("*")) == before and not list(tmp_path.iterdir())


# ==================== Caption accuracy: evaluate.py ====================
# Claims about evaluate.py: what its caption score counts, and that its command refuses a classifier that is not good.


HEADS = list(LABELS)


def real(n, style="solid"):
    return evaluate.draw([Scenes(n, 64, 64, style, 3).scene(i) for i in range(n)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random tiny checkpoint that says of itself that it was trained with naive flow matching."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "random.safetensors"
    StableDiffusion(TINY, "v").save(path, objective="fm", resolution="64")
    return path


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch, capsys):
    """run(*words) of `evaluate.py captions` in an empty folder, with a classifier of two steps -> what it printed."""
    monkeypatch.chdir(tmp_path)
    for name, value in dict(TRAIN_STEPS=2, TRAIN_BATCH=8, REAL_SCENES=8, REQUIRED=0).items():
        monkeypatch.setattr(evaluate, name, value)

    def run(*words, models=(checkpoint,)):
        short = *map(str, models), "--n", "3", "--steps", "2", "--batch", "2", "--device", "cpu"
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "captions", *short, *words])
        try:
            cli(evaluate.main)
        finally:
            run.printed = capsys.readouterr()
        return run.printed.out

    return run


# ------------------------------------------------------------------------------------------------ the score

@pytest.mark.parametrize("style", ["solid", "outline"])
def test_perfect_predictions_score_100_percent(style):
    labels = real(200, style)[1]
    assert set(evaluate.score(labels, labels).values()) == {1.0}


def test_a_wrong_relation_makes_the_caption_wrong_and_nothing_else():
    labels = real(200)[1]
    predicted, relation = labels.clone(), HEADS.index("relation")
    row = (labels[:, relation] != -100).nonzero()[0, 0]
    predicted[row, relation] = (labels[row, relation] + 1) % len(LABELS["relation"])
    score = evaluate.score(predicted, labels)
    related = (labels[:, relation] != -100).sum().item()
    assert score["all"] == pytest.approx(1 - 1 / 200) and score["relation"] == pytest.approx(1 - 1 / related)
    assert all(score[head] == 1 for head in HEADS if head != "relation")
    rows = labels[:, relation] == labels[row, relation]
    own = f"all {LABELS['relation'][labels[row, relation]]}"
    assert [name for name, share in score.items() if share < 1] == ["all", "relation", own]
    assert score[own] == pytest.approx(1 - 1 / rows.sum().item())


def test_two_wrong_attributes_make_one_wrong_caption():
    labels = real(50)[1]
    predicted = labels.clone()
    predicted[7, HEADS.index("count")] += 1
    predicted[7, HEADS.index("background")] += 1
    assert evaluate.score(predicted, labels)["all"] == pytest.approx(1 - 1 / 50)


def test_an_attribute_that_does_not_apply_is_ignored():
    labels = real(200)[1]
    predicted = torch.where(labels == -100, 1, labels)
    assert set(evaluate.score(predicted, labels).values()) == {1.0}


def test_an_attribute_that_never_applies_has_no_share():
    labels = real(200)[1]
    single = labels[labels[:, HEADS.index("count")] == LABELS["count"].index("one")]
    score = evaluate.score(single, single)
    assert score["relation"] is None and score["shape2"] is None and score["all"] == 1


def test_predictions_are_in_the_order_of_the_labels():
    images, labels = real(300)
    logits = torch.cat([F.one_hot(column.clamp(min=0), n) for column, n in zip(labels.T, evaluate.CLASSES)], 1).float()
    parts = iter(logits.split(256))
    assert torch.equal(evaluate.predict(lambda some: next(parts), images), labels.clamp(min=0))


# ------------------------------------------------------------------------------------------------ Frechet distance

def test_the_frechet_distance_equals_scipys():
    from scipy.linalg import sqrtm
    a, b = rand(500, 6, seed=1).double(), (rand(400, 6, seed=2) @ rand(6, 6, seed=3) + 1).double()
    A, B = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(A + B - 2 * sqrtm(A @ B).real)
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------ depth

def run_evaluate(capsys, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        try:
            cli(evaluate.main)
        except SystemExit:
            return capsys.readouterr().err.splitlines()[-1]
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def depths(tmp_path):
    """gt/: three pictures with depth, some of it invalid; pred/: noisy predictions, affine in log depth."""
    rng = np.random.default_rng(0)
    (tmp_path / "pred/sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        save_rgb(tmp_path / f"gt/{name}.jpg")
        truth = rng.uniform(1, 9, (48, 64))
        np.save(tmp_path / f"pred/{name}.npy", (0.7 * np.log(truth) - 0.4 + rng.normal(0, 0.1, truth.shape)))
        truth[rng.random(truth.shape) < 0.1] = rng.choice([np.nan, np.inf, 0, -1])
        np.save(tmp_path / f"gt/{name}.npy", truth)
    return tmp_path


@pytest.mark.parametrize("space, forward, backward", [
    ("log", np.log, np.exp), ("depth", lambda d: d, lambda d: d), ("disparity", lambda d: 1 / d, lambda d: 1 / d)])
def test_depth_errors_equal_an_independent_least_squares(depths, capsys, space, forward, backward):
    result = run_evaluate(capsys, "depth", depths / "pred", depths / "gt", "--align", space)
    expected = []
    for name in ("a", "b", "sub/c"):
        d, p = np.load(depths / f"gt/{name}.npy"), np.load(depths / f"pred/{name}.npy")
        ok = np.isfinite(d) & (d > 1e-5)
        d, p = d[ok], p[ok]
        slope, shift = np.polyfit(p, forward(d), 1)
        fitted = slope * p + shift
        q = np.clip(backward(np.maximum(fitted, 1e-3) if space == "disparity" else fitted), 1e-5, None)
        expected.append((np.mean(abs(q - d) / d), np.mean(np.maximum(q / d, d / q) < 1.25), np.mean((q - d) ** 2) ** 0.5))
    absrel, delta1, rmse = np.mean(expected, 0)
    assert result["absrel"] == pytest.approx(absrel, rel=1e-6) and result["delta1"] == pytest.approx(delta1, rel=1e-6)
    assert result["rmse"] == pytest.approx(rmse, rel=1e-6) and result["images"] == 3 and result["align"] == space


def test_a_prediction_affine_in_log_depth_is_perfect_in_log_space_and_not_in_the_others(depths, capsys):
    for path in (depths / "pred").rglob("*.npy"):
        truth = np.nan_to_num(np.load(depths / "gt" / path.relative_to(depths / "pred")), posinf=1)
        np.save(path, 2 - 0.3 * np.log(np.maximum(truth, 0.1)))
    found = {space: run_evaluate(capsys, "depth", depths / "pred", depths / "gt", "--align", space)
             for space in ("log", "depth", "disparity")}
    assert found["log"]["absrel"] < 1e-6 and found["log"]["delta1"] == 1
    assert found["depth"]["absrel"] > 0.05 < found["disparity"]["absrel"]


def test_a_prediction_of_another_size_is_scaled_to_the_truth(depths, capsys):
    y, x = np.mgrid[0:1:48j, 0:1:64j]
    for name in ("a", "b", "sub/c"):
        np.save(depths / f"gt/{name}.npy", np.exp(1 + x - y))
        np.save(depths / f"pred/{name}.npy", np.kron(x - y, np.ones((3, 2))))
    assert run_evaluate(capsys, "depth", depths / "pred", depths / "gt")["absrel"] < 2e-3   # of the resampling alone


@pytest.mark.parametrize("dataset, shape, inside, outside", [
    ("nyu", (480, 640), (45, 41), (44, 41)), ("kitti", (375, 1242), (375 - 352 + 117, 13 + 43), (375 - 352 + 116, 300)),
    ("scannet", (480, 640), (0, 0), None), ("diode", (768, 1024), (10, 10), (0, 0))])
def test_each_data_set_has_its_units_and_its_crop(tmp_path, capsys, dataset, shape, inside, outside):
    rng, unit = np.random.default_rng(0), {"nyu": 1000, "scannet": 1000, "kitti": 256, "diode": 1}[dataset]
    truth = np.round(rng.uniform(2, 8, shape) * unit)
    lines = "rgb/x.png depth/x.png\n" + ("rgb/y.png None\n" if dataset == "kitti" else "")
    prediction = np.log(truth / unit)
    (tmp_path / "pred/rgb").mkdir(parents=True)
    if dataset == "diode":
        (tmp_path / "gt/depth").mkdir(parents=True)
        np.save(tmp_path / "gt/depth/x.npy", truth[..., None])
        mask = np.ones(shape)
        mask[:5] = 0
        np.save(tmp_path / "gt/depth/mask.npy", mask)
        lines = "rgb/x.png depth/x.npy depth/mask.npy\n"
    else:
        save_png16(tmp_path / "gt/depth/x.png", truth)
    (tmp_path / "list.txt").write_text(lines)

    def error(at):
        changed = prediction.copy()
        if at:
            changed[at] += 3
        np.save(tmp_path / "pred/rgb/x.npy", changed)
        result = run_evaluate(capsys, "depth", tmp_path / "pred", tmp_path / "gt", "--dataset", dataset,
                              "--list", tmp_path / "list.txt")
        assert result["images"] == 1
        return result["absrel"]
    assert error(None) < 1e-6 and error(inside) > 1e-7
    if outside:
        assert error(outside) < 1e-10 or error(outside) == error(None)


def test_eth3d_is_raw_float32_with_infinite_holes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "ETH3D_SHAPE", (6, 8))
    truth = np.random.default_rng(0).uniform(1, 50, (6, 8)).astype(np.float32)
    (tmp_path / "pred").mkdir()
    np.save(tmp_path / "pred/x.npy", np.log(truth))
    truth[0] = np.inf
    truth.tofile(tmp_path / "x_depth")
    (tmp_path / "list.txt").write_text("x.JPG x_depth\n")
    words = "depth", tmp_path / "pred", tmp_path, "--dataset", "eth3d", "--list", tmp_path / "list.txt"
    assert run_evaluate(capsys, *words)["absrel"] < 1e-5
    truth[:5].tofile(tmp_path / "x_depth")
    assert "40 numbers, not ETH3D's 6x8" in run_evaluate(capsys, *words)


def test_a_missing_prediction_is_named(depths, capsys):
    (depths / "pred/b.npy").unlink()
    assert "pred/b.npy" in run_evaluate(capsys, "depth", depths / "pred", depths / "gt")


# ------------------------------------------------------------------------------------------------ pictures

@pytest.fixture
def folders(tmp_path):
    for name, base in ("samples", 0), ("real", 100):
        for i in range(12):
            save_rgb(tmp_path / name / f"{i:02d}.png", 40 + (name == "real") * i, 40, seed=base + i)
    return tmp_path


def test_fid_goes_through_torch_fidelitys_own_interface(folders, capsys, monkeypatch):
    import torch_fidelity

    class Small(torch_fidelity.FeatureExtractorBase):
        """Mean colours of the quadrants: no weights to download."""

        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("4",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "4"

        def forward(self, x):
            return F.adaptive_avg_pool2d(x.float(), 2).flatten(1)[:, :4],

    torch_fidelity.register_feature_extractor("small", Small)
    monkeypatch.setattr(evaluate, "FID_NETWORK", "small")
    found = run_evaluate(capsys, "images", folders / "samples", "--real", folders / "real", "--device", "cpu")
    features = [torch.stack([F.adaptive_avg_pool2d(x.float(), 2).flatten()[:4]
                             for x in evaluate.Fitted(folders / name, (40, 40))]) for name in ("samples", "real")]
    assert found["images"] == 12 and found["fid"] == pytest.approx(evaluate.frechet_distance(*features), rel=1e-4)
    same = run_evaluate(capsys, "images", folders / "samples", "--real", folders / "samples", "--device", "cpu")
    assert same["fid"] == pytest.approx(0, abs=1e-3)


def test_clip_score_and_aesthetics_are_the_means_of_open_clips_own_numbers(folders, capsys):
    import open_clip
    (folders / "configs").mkdir()
    (folders / "configs/small-clip.json").write_text(json.dumps({
        "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}))
    open_clip.add_model_config(folders / "configs")
    torch.manual_seed(0)
    network, _, transform = open_clip.create_model_and_transforms("small-clip")
    torch.save(network.state_dict(), folders / "clip.pt")
    torch.save({"layers.0.weight": rand(3, 16), "layers.0.bias": rand(3, seed=1),
                "layers.2.weight": rand(1, 3, seed=2), "layers.2.bias": rand(1, seed=3)}, folders / "head.pt")
    prompts = [f"picture {i}" for i in range(12)]
    (folders / "prompts.txt").write_text("\n".join(prompts) + "\n")
    found = run_evaluate(capsys, "images", folders / "samples", "--clip", "small-clip", folders / "clip.pt", "--batch", 5,
                         "--prompts", folders / "prompts.txt", "--aesthetics", folders / "head.pt", "--device", "cpu")
    with torch.no_grad():
        network.eval()
        seen = torch.cat([network.encode_image(transform(Image.open(folders / f"samples/{i:02d}.png"))[None], normalize=True)
                          for i in range(12)])
        said = network.encode_text(open_clip.tokenize(prompts), normalize=True)
        head = (seen @ rand(3, 16).T + rand(3, seed=1)) @ rand(1, 3, seed=2).T + rand(1, seed=3)
    assert found["clip"] == pytest.approx((seen * said).sum(1).mean().item(), abs=1e-5)
    assert found["aesthetics"] == pytest.approx(head.mean().item(), abs=1e-5) and found["images"] == 12


@pytest.mark.parametrize("words, says", [
    ((), "nothing to measure"), (("--real", "none"), "0 pictures"), (("--clip", "ViT-B-32", "none.pt"), "goes with"),
    (("--prompts", "x.txt"), "goes with"), (("--clip", "ViT-B-32", "none.pt", "--prompts", "x"), "no such file")])
def test_bad_input_of_images_is_one_line(folders, capsys, words, says):
    line = run_evaluate(capsys, "images", folders / "samples", "--device", "cpu", *words)
    assert line.startswith("error: ") and says in line


# ------------------------------------------------------------------------------------------------ the classifier

def test_the_classifier_has_logits_for_every_class_of_every_attribute():
    logits = evaluate.build_classifier()(real(4)[0])
    assert [part.shape[1] for part in logits.split(evaluate.CLASSES, 1)] == [len(classes) for classes in LABELS.values()]


def test_softened_pictures_are_other_pictures_but_not_very_other():
    images = real(32)[0]
    change = (evaluate.soften(images) - images).abs().mean((1, 2, 3))
    assert change.min() > 0.005 and change.max() < 0.3


def test_the_classifier_never_trains_on_scenes_it_is_measured_on():
    assert evaluate.TRAIN_SEED + evaluate.TRAIN_STEPS < evaluate.HELD_OUT_SEED


# ------------------------------------------------------------------------------------------------ the command

def test_the_command_trains_a_classifier_once_and_ends_with_one_line_of_json(command, checkpoint):
    first = command("--out", "here")
    assert "training the classifier of solid scenes" in first
    result = json.loads(first.splitlines()[-1])
    assert result["n"] == 3 and result["steps"] == 2 and result["cfg"] == 4 and result["seed"] == 0
    assert result["objective"] == "fm" and result["prediction"] == "v" and result["model"] == str(checkpoint)
    assert [json.loads(line) for line in Path("here/captions.jsonl").read_text().splitlines()] == [result]
    assert result["real_scenes"] == 8 and set(result["shares"]) == {"real", "decoded", "samples"}
    for share in result["shares"].values():
        related = [f"all {relation}" for relation in LABELS["relation"]]
        assert list(share) == ["all", *HEADS, *related] and all(x is None or 0 <= x <= 1 for x in share.values())
    assert all(any(line.startswith(head + " ") for line in first.splitlines()) for head in ["all", *HEADS, *related])
    with Image.open("here/samples.png") as grid:
        assert grid.width > 3 * 128
    again = command("--out", "here")
    assert "training" not in again and json.loads(again.splitlines()[-1]) == result


def random_lora(path, sd, **metadata):
    """The file of a LoRA with random weights for sd, which stays as it is."""
    torch.manual_seed(1)
    unet = copy.deepcopy(sd.unet)
    for parameter in lora.inject(unet, 2):
        torch.nn.init.normal_(parameter, std=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    lora.save(unet, path, metadata)
    return path


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_models_by_steps_are_one_table_and_a_lora_brings_its_base_objective_guidance_and_run(command, checkpoint,
                                                                                              tmp_path):
    run = {"ckpt": str(checkpoint), "objective": "dm", "lora": "2", "seed": 5}
    path = random_lora(tmp_path / "run/lora.safetensors", StableDiffusion(TINY, "v"), objective="dm", cfg="1.0")
    (tmp_path / "run/result.json").write_text(json.dumps(run))
    printed = command("--steps", "1", "3", models=(checkpoint, path))
    rows = rows_of("runs/captions/captions.jsonl")
    assert [(row["model"], row["steps"], row["objective"], row["cfg"], row["run"]) for row in rows] == [
        (str(checkpoint), 1, "fm", 4, {}), (str(checkpoint), 3, "fm", 4, {}),
        (str(path), 1, "dm", 1, run), (str(path), 3, "dm", 1, run)]
    assert len({row["frechet"] for row in rows}) > 1 and "all " in printed
    assert rows[2]["straightness"] < 1e-9 < rows[3]["straightness"]                           # one step is straight
    with Image.open("runs/captions/samples.png") as grid:
        assert grid.height > 4 * 128                                                          # a row each


def test_the_frechet_distance_is_to_other_scenes_than_those_sampled(command, monkeypatch):
    features = []
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *of: (features.extend(of), 0.0)[1])
    command("--seed", "7")
    world = Scenes(11, 64, 64, "solid", evaluate.HELD_OUT_SEED + 7)
    others = evaluate.draw([world.scene(i) for i in range(3, 11)])[0]
    net = evaluate.load_classifier("solid", torch.device("cpu"))
    assert features[0].shape == (3, 256) and torch.allclose(features[1], net[:-1](others), atol=1e-5)


def test_samples_of_another_size_are_scaled_to_the_classifiers(command, monkeypatch):
    sizes, predict = [], evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda net, images: (sizes.append(images.shape[2:]), predict(net, images))[1])
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, latents, original=StableDiffusion.decode: (
        sizes.append(latents.shape[2:]), original(self, latents))[1])
    command("--size", "96", "128")
    row, = rows_of("runs/captions/captions.jsonl")
    assert row["size"] == [96, 128] and sizes.count((96 // 4, 128 // 4)) == 2 and sizes[-1] == (64, 64)
    command()
    row, = rows_of("runs/captions/captions.jsonl")
    assert row["size"] == [64, 64]                                                  # the file's


def test_bf16_samples_are_close_to_float32_ones_but_not_the_same(command):
    rows = []
    for precision in ("fp32", "bf16"):
        command("--precision", precision, models=[model.TINY_PRIOR])
        rows += rows_of("runs/captions/captions.jsonl")
    assert [row["precision"] for row in rows] == ["fp32", "bf16"] and rows[0]["shares"]["real"] == rows[1]["shares"]["real"]
    assert rows[0]["straightness"] != rows[1]["straightness"] == pytest.approx(rows[0]["straightness"], rel=0.02)


def test_straightness_is_zero_on_a_line_and_the_variance_of_the_velocity_on_a_bend():
    grid = torch.tensor([0.0, 0.25, 1.0])
    line = [X0 + t * (X1 - X0) for t in grid]
    assert evaluate.straightness(line, grid) == pytest.approx(0, abs=1e-12)
    bend = [torch.zeros(SHAPE), torch.full(SHAPE, 1.0), torch.full(SHAPE, 1.0)]     # u = 4, then 0; its mean is 1
    assert evaluate.straightness(bend, grid) == pytest.approx(0.25 * 3**2 + 0.75 * 1**2)


def test_t_shift_asks_the_network_between_its_timesteps():
    spy = Spy(lambda x_dm, t_dm, context: x_dm)
    flow = wrap(spy, kind=Diffusion)
    flow.sample(X0, CONTEXT, 4)
    evaluate.shift_grid(flow, 0.5)
    flow.sample(X0, CONTEXT, 4)
    asked = torch.stack([t_dm[0] for _, t_dm, _ in spy.calls])
    assert asked.tolist() == pytest.approx([999, 749, 499, 249, 998.5, 748.5, 498.5, 248.5], abs=1e-3)


def test_plain_black_and_white_captions_have_their_mean(command, monkeypatch):
    world = Scenes(400, 64, 64, "outline", evaluate.HELD_OUT_SEED)
    assert {"a black image", "a white image"} <= {world.scene(i).caption for i in range(40)}
    command("--style", "outline", "--n", "40", "--steps", "1", "--batch", "40")
    row, = rows_of("runs/captions/captions.jsonl")
    assert set(row["plain"]) == {"black", "white"} and all(0 <= mean <= 1 for mean in row["plain"].values())


# ------------------------------------------------------------------------------------------------ depth of scenes

def test_depth_of_scenes_is_measured_by_steps_and_ensemble(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd = load_checkpoint(checkpoint)
    sd.widen()
    path = random_lora(tmp_path / "run/lora.safetensors", sd, objective="diff2flow", task="depth")
    (tmp_path / "run/result.json").write_text(json.dumps({"ckpt": str(checkpoint)}))
    last = run_evaluate(capsys, "depth-scenes", path, "--steps", 1, 2, "--ensemble", 1, 3, "--n", 2)
    rows = rows_of("runs/depth-scenes/depth.jsonl")
    assert [(row["steps"], row["ensemble"]) for row in rows] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert len({row["absrel"] for row in rows}) == 4 and all(0 <= row["delta1"] <= 1 for row in rows)
    assert rows[0]["images"] == 2 and rows[-1] == last
    assert "not trained by train.py --task depth" in run_evaluate(capsys, "depth-scenes", checkpoint)


def test_depth_of_scenes_is_perfect_when_the_network_is_the_truth(checkpoint, tmp_path, capsys, monkeypatch):
    """What is decoded is replaced by an affine map of the true log depth: no error is left, and noise adds some."""
    monkeypatch.chdir(tmp_path)
    world = Scenes(3, 64, 64, "solid", evaluate.HELD_OUT_SEED)
    truth = torch.stack([world[i]["depth"] for i in range(3)]).log()
    sd = load_checkpoint(checkpoint)
    sd.widen()
    path = random_lora(tmp_path / "run/lora.safetensors", sd, objective="diff2flow", task="depth")
    (tmp_path / "run/result.json").write_text(json.dumps({"ckpt": str(checkpoint)}))
    for noise, low, high in ((0.0, 0, 1e-5), (0.05, 1e-3, 0.5)):
        monkeypatch.setattr(StableDiffusion, "decode", lambda self, latents: 0.4 * truth - 0.7 + noise * rand(3, 1, 64, 64))
        run_evaluate(capsys, "depth-scenes", path, "--steps", 1, "--n", 3)
        row, = rows_of("runs/depth-scenes/depth.jsonl")
        assert low <= row["absrel"] <= high


# ------------------------------------------------------------------------------------------------ tables and plots

def test_the_rows_of_a_table_are_in_the_order_of_their_numbers_then_of_their_words():
    groups = [("small", "4"), ("2", "x"), ("base", "25"), ("16", "0.5"), ("base", "4"), ("16", "0.0")]
    assert sorted(groups, key=evaluate.numbers_first) == [
        ("2", "x"), ("16", "0.0"), ("16", "0.5"), ("base", "4"), ("base", "25"), ("small", "4")]


def test_a_table_has_a_row_a_group_with_the_mean_and_the_span_of_its_seeds(tmp_path, capsys, monkeypatch):
    for seed, x in ((0, 1.0), (1, 2.0), (2, 6.0)):
        rows = [{"run": {"objective": o, "seed": seed}, "all": x * k, "plain": {"black": x} if k == 1 else {}}
                for k, o in ((1, "dm"), (2, "fm"))]
        (tmp_path / f"{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "table", *map(str, sorted(tmp_path.glob("*.jsonl"))),
                                      "--by", "run.objective", "--of", "all", "plain.black"])
    evaluate.main()
    assert capsys.readouterr().out.splitlines() == [
        "| run.objective | n | all | plain.black |", "|---|---|---|---|",
        "| dm | 3 | 3 (1 to 6) | 3 (1 to 6) |", "| fm | 3 | 6 (2 to 12) |  |"]
    sys.argv += ["--where", "run.objective=fm", "run.seed=2"]
    evaluate.main()
    assert capsys.readouterr().out.splitlines()[2:] == ["| fm | 1 | 12 (12 to 12) |  |"]
    sys.argv[-1] = "run.seed=7"
    with pytest.raises(ValueError, match="no row where run.objective=fm run.seed=7 in "):
        evaluate.main()


def test_runs_of_several_seeds_and_objectives_are_plotted(tmp_path, capsys):
    for seed in (0, 1):
        for objective in ("dm", "diff2flow"):
            run = tmp_path / f"{objective}-{seed}"
            run.mkdir()
            (run / "result.json").write_text(json.dumps({"lora": "none", "objective": objective, "seed": seed}))
            rows = ({"step": step, "velocity_error": (1 + seed) / (step + 1)} for step in (0, 10, 20))
            (run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = sorted(str(path) for path in tmp_path.glob("*/validation.jsonl"))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", lambda self, x, y, original=Axes.plot, **more: (
            drawn.append((more["label"], list(x), list(y))), original(self, x, y, **more))[1])
        patch.setattr(sys, "argv", ["evaluate.py", "plot", *files, "--out", str(tmp_path / "plot.png")])
        evaluate.main()
    means = [1.5, 1.5 / 11, 1.5 / 21]
    assert drawn == [(name, [0, 10, 20], pytest.approx(means)) for name in ("diff2flow", "dm")]
    assert picture(tmp_path / "plot.png").std() > 0
    assert "a row lacks" in run_evaluate(capsys, "plot", *files, "--y", "absrel", "--out", tmp_path / "other.png")


def test_the_outline_style_has_a_classifier_of_its_own(command, tmp_path):
    command("--style", "outline")
    assert [path.name for path in (tmp_path / "runs").glob("*.safetensors")] == ["classifier-outline.safetensors"]


def test_a_classifier_below_98_percent_is_refused_before_sampling(command, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "REQUIRED", 0.98)
    with pytest.raises(SystemExit) as exit:
        command()
    assert exit.value.code == 2 and not (tmp_path / "runs/captions").exists()
    line = command.printed.err.splitlines()[-1]
    assert line.startswith("error: the classifier is right about only") and "delete runs/classifier-solid" in line


def test_a_classifier_of_another_version_is_refused(command, tmp_path):
    evaluate.save_tensors(tmp_path / "runs/classifier-solid.safetensors", {"weight": torch.zeros(3)}, {})
    with pytest.raises(SystemExit):
        command()
    assert "of another version: delete it" in command.printed.err.splitlines()[-1]


@pytest.mark.parametrize("words, models, says", [
    (("--n", "0"), None, "at least 1"), (("--steps", "0"), None, "at least 1"), (("--batch", "-2"), None, "at least 1"),
    (("--size", "65"), None, "must be multiples of"),
    ((), ["nowhere.safetensors"], "no such checkpoint file"),
])
def test_bad_input_is_one_line_before_anything_is_trained(command, checkpoint, tmp_path, words, models, says):
    with pytest.raises(SystemExit) as exit:
        command(*words, models=models or [checkpoint])
    errors = [line for line in command.printed.err.splitlines() if line.startswith("error:")]
    assert exit.value.code == 2 and len(errors) == 1 and says in errors[0] and not (tmp_path / "runs").exists()


# ==================== The bundled prior ====================

BUNDLED = {prediction: HERE / "assets" / f"tiny-{prediction}.safetensors" for prediction in ("v", "eps")}


def bundled_error(prediction, objective):
    """Mean squared error of u on 64 scenes of the prior's own style, t_fm evenly spread."""
    sd, scenes = load_checkpoint(BUNDLED[prediction]), Scenes(64, 64, 64, "solid", 123)
    items, flow = [scenes[i] for i in range(64)], OBJECTIVES[objective](sd.unet, *sd_schedule(), sd.prediction)
    with torch.no_grad():
        x1, context = sd.encode(torch.stack([item["image"] for item in items])), sd.encode_text([i["caption"] for i in items])
        return Diff2Flow.loss(flow, x1, context, rand(*x1.shape), (torch.arange(64) + 0.5) / 64).item()


@both_predictions
def test_a_bundled_prior_is_an_ordinary_checkpoint_of_at_most_10_MB(prediction):
    assert BUNDLED[prediction].stat().st_size <= 10_000_000
    sd = load_checkpoint(BUNDLED[prediction])
    assert sd.config == TINY and sd.prediction == prediction and sd.picture_size() == (64, 64)
    with safe_open(BUNDLED[prediction], "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"model", "first_stage_model", "cond_stage_model"}


@both_predictions
def test_a_bundled_prior_is_a_velocity_field_before_any_training_and_naive_fm_is_not(prediction):
    # measured, with this noise, by diff2flow, fm, fm-flip: v 0.091, 10.2, 1.8; eps 0.105, 12.0, 2.5
    error = {objective: bundled_error(prediction, objective) for objective in ("diff2flow", "fm", "fm-flip")}
    assert error["diff2flow"] < 0.5 * error["fm-flip"] and error["diff2flow"] < 0.2 * error["fm"], error


def test_the_bundled_priors_share_their_autoencoder():
    v, eps = (load_checkpoint(path).first_stage_model.state_dict() for path in BUNDLED.values())
    assert all(torch.equal(v[name], eps[name]) for name in v)


# ==================== claims.sh ====================

STAND_IN = """#!{python}
import sys
from pathlib import Path
with open("commands", "a") as file:
    file.write("\\t".join(sys.argv[1:]) + "\\n")
script, *words = sys.argv[1:]
out = Path(words[words.index("--out") + 1] if "--out" in words else words[words.index("--resume") + 1])
if script == "train.py":
    out.mkdir(parents=True)
    whole = "--lora" in words and words[words.index("--lora") + 1] == "none"
    for name in ("", "-000050") if "--keep" in words else ("",):
        (out / f"{{'model' if whole else 'lora'}}{{name}}.safetensors").touch()
    for name in ("result.json", "validation.jsonl", "before_after.png"):
        (out / name).write_text("{{}}\\n")
elif words[0] in ("captions", "depth-scenes"):
    out.mkdir(parents=True)
    for name in ("figures.jsonl", "samples.png"):
        (out / name).write_text("{{}}\\n")
"""


def test_the_claims_loop_runs_each_command_once_in_two_processes_and_all_of_them_parse(tmp_path, monkeypatch):
    shutil.copy(HERE / "claims.sh", tmp_path)
    (tmp_path / "python").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    shell = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEDS": "3 4"}
    both = [subprocess.Popen(["bash", str(tmp_path / "claims.sh"), "train"], env=shell) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    commands = [line.split("\t") for line in (tmp_path / "commands").read_text().splitlines()]
    outs = [words[words.index("--out") + 1] for words in commands]
    # a seed: 12 of style, 9 of depth, 4 of eps, 4 of size, 2 of rank, Reflow and its pairs
    assert len(outs) == len(set(outs)) == 2 * (12 + 9 + 4 + 4 + 2 + 2)
    for _ in range(2):
        subprocess.run(["bash", str(tmp_path / "claims.sh")], env=shell, check=True)    # all of it: only measures
    later = [line.split("\t") for line in (tmp_path / "commands").read_text().splitlines()][len(commands):]
    measured = [words for words in later if words[1] != "plot"]
    outs = [words[words.index("--out") + 1] for words in measured]
    assert {words[0] for words in later} == {"evaluate.py"} and len(outs) == len(set(outs)) == 2 * 9 + 1
    for words in measured:
        assert not [word for word in words if "*" in word] and any(word.endswith(".safetensors") for word in words)
        count = len([word for word in words if word.startswith("runs/") and word.endswith(".safetensors")])
        name = outs[measured.index(words)].split("/")[-1].split("-")[0]
        assert count == dict(style=18, reflow=1, size=4, zero=0, ddim=0, depth=9, plain=4)[name]

    called = []
    for name in ("captions", "depth_scenes", "plot"):
        monkeypatch.setattr(evaluate, name, called.append)
    for script, *words in commands + later:
        monkeypatch.setattr(sys, "argv", [script, *words])
        if script == "evaluate.py":
            evaluate.main()
        else:
            args = {"train.py": train.arguments, "sample.py": sample.arguments}[script]()
            assert args.seed in (3, 4)
    assert len(called) == len(later)


# ==================== README.md ====================


def test_each_equation_stands_on_the_line_that_the_readme_names():
    code = (HERE / "diff2flow.py").read_text().splitlines()
    rows = re.findall(r"^\| (.+?): .*\(diff2flow\.py#L(\d+)\)", (HERE / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 10
    for equations, line in rows:
        where = code[int(line) - 1]
        assert "Eq" in where or "Algorithm" in where
        assert all(number in where for number in re.findall(r"\d+", equations.split(" and ")[-1])), (equations, where)


def test_the_readmes_line_for_coco_takes_the_first_caption_of_each_picture(tmp_path):
    """The file lists annotations in no order of pictures, with spaces and line ends in some captions."""
    command = re.search(r"^    python (-c .*) > captions.txt$", (HERE / "README.md").read_text(), re.MULTILINE)[1]
    annotations = [{"image_id": i, "id": n, "caption": caption} for n, (i, caption) in enumerate(
        [(9, "a dog "), (2, "two\nboats"), (9, "a second"), (40, "a red bus"), (2, "x")])]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_val2017.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["two boats", "a dog", "a red bus"]


README_TABLES = re.findall(r"^    python (evaluate\.py table .*assets/results/.*)\n\n((?:\|.*\n)+)",
                           (HERE / "README.md").read_text(), re.MULTILINE)


def test_the_readme_has_a_table_for_each_file_of_results():
    shown = {command.split()[2] for command, _ in README_TABLES}
    files = {f"assets/results/{path.name}" for path in (HERE / "assets/results").glob("*.jsonl")}
    assert len(files) == 7 and files - shown == {"assets/results/training.jsonl"}     # its figures are in the others too


@pytest.mark.parametrize("command, shown", README_TABLES)
def test_the_readmes_tables_are_what_their_commands_print(command, shown, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    evaluate.main()
    assert capsys.readouterr().out == shown


# ==================== Full size, run by hand ====================
# python test_diff2flow.py sd15 sd21            read full-size files: peak memory, seconds, float32 parity
# python test_diff2flow.py --train sd15 sd21    train two steps on photographs, load the LoRA in diffusers
# Each file is random, in the real layout, written for the purpose (5 GB in the temporary folder), and deleted.
# Peak memory is VmHWM after loading less VmHWM after the imports. float32 weights stay views of the mapped file, so every
# weight is read once before the figure is taken.


def write_random_checkpoint(name, path):
    """A .safetensors file written tensor by tensor, so that the whole is never in memory."""
    names = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64"}
    header, offset = {}, 0
    for key, (shape, dtype) in manifest(name).items():
        size = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    torch.manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for key, (shape, dtype) in manifest(name).items():
            random_tensor(key, shape, dtype).numpy().tofile(file)


def peak():
    """Highest resident memory of this process so far, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def measure_reading(path, dtype):
    import open_clip  # noqa: F401  (load_checkpoint imports it late; the baseline is after imports)
    before, start = peak(), time.time()
    sd = load_checkpoint(path, dtype=dtype)
    for parameter in sd.parameters():
        parameter.max()
    weights = sum(p.numel() * p.element_size() for p in sd.parameters()) / 2**20
    bound = 1.25 * weights + 512
    print(f"  {dtype}: weights {weights:.0f} MiB, peak {peak() - before:.0f} MiB, bound {bound:.0f} MiB: "
          f"{'ok' if peak() - before <= bound else 'EXCEEDED'}; {time.time() - start:.1f} s")


@torch.inference_mode()
def compare_full_size(name, path):
    ours, theirs = load_checkpoint(path), references(name, load_file(path), divisor=1)
    torch.manual_seed(1)
    x, context, images, latents = (torch.randn(*shape) for shape in (
        (2, 4, 32, 32), (2, 77, ours.config.context_width), (1, 3, 128, 128), (1, 4, 16, 16)))
    t_dm = torch.tensor([3.3, 900.0])
    posterior, (mean, std) = theirs.encode(images), ours.first_stage_model.moments(images)
    ids = clip_ids(PROMPTS, 0 if ours.config.open_clip else 49407)
    results = {
        "UNet": relative(ours.unet(x, t_dm, context), theirs.unet(x, t_dm, context)),
        "encoder mean": relative(mean, posterior.mean), "encoder std": relative(std, posterior.std),
        "decoder": relative(ours.decode(latents), theirs.decode(latents / SCALE)),
        "text": relative(ours.encode_text(PROMPTS), theirs.text(ids)),
    }
    print("  relative difference in float32: " + ", ".join(f"{what} {value:.1e}" for what, value in results.items())
          + f"; bound 2e-05: {'ok' if max(results.values()) <= 2e-5 else 'EXCEEDED'}")


@torch.no_grad()
def compare_lora(path, adapter):
    sd = load_checkpoint(path)
    torch.manual_seed(1)
    x, context, t_dm = torch.randn(1, 4, 32, 32), torch.randn(1, 77, sd.config.context_width), torch.tensor([500.0])
    plain, theirs = sd.unet(x, t_dm, context), diffusers_copy(sd.unet, sd.config)
    lora.load(adapter, sd.unet)
    ours = sd.unet(x, t_dm, context)
    diffusers_pipeline(theirs).load_lora_weights(adapter)
    print(f"  diffusers with the LoRA against ours: {relative(theirs(x, t_dm, context).sample, ours):.1e}; "
          f"the LoRA's own change: {relative(plain, ours):.2f}")


def run_full_size(name, folder, training):
    path = Path(folder) / f"{name}.safetensors"
    write_random_checkpoint(name, path)
    print(f"{name}: {path.stat().st_size / 2**20:.0f} MiB in {len(manifest(name))} tensors", flush=True)

    def step(*words):
        subprocess.run([sys.executable, __file__, "--step", *map(str, words)], check=True)

    if not training:
        for what in ("compare", "float32", "bfloat16", "pickle"):
            step(what, name, path)
        path.unlink()
        for what in ("float32", "bfloat16"):
            step(what, name, path.with_suffix(".ckpt"))
        return
    photos = Path(folder) / "photos"
    photos.mkdir(exist_ok=True)
    for source in (PHOTOS / "china.jpg", PHOTOS / "flower.jpg",
                   Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"):
        shutil.copy(source, photos)
        (photos / source.name).with_suffix(".txt").write_text(source.stem.replace("_", " "))
        with Image.open(source) as image:   # any smooth depth: what is measured is that the machinery runs
            np.save(photos / f"{source.stem}.npy", np.linspace(2, 9, image.height)[:, None] * np.ones(image.width))

    def script(what, name, words):
        start = time.time()
        subprocess.run([sys.executable, str(HERE / name), "--ckpt", str(path), *words.split()], check=True)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"  {what}: {time.time() - start:.0f} s, peak memory so far {memory:.1f} GiB", flush=True)

    few = "--steps 2 --batch 1 --grad-accum 1 --validation 2 --previews 2 --lr 1e-3 --ema 0 "
    for preset in ("base", "small"):
        out = Path(folder) / f"{name}-{preset}"
        script(f"LoRA {preset}", "train.py", f"{few} --data {photos} --size 256 --lora {preset} --out {out}")
        step("lora", path, out / "lora.safetensors")
    pairs, reflow, depth = (Path(folder) / f"{name}-{what}" for what in ("pairs", "reflow", "depth"))
    script("Reflow's pairs", "sample.py", f"--pairs 4 --steps 2 --batch 1 --size 256 --data {photos} --out {pairs}")
    script("Reflow", "train.py", f"{few} --task reflow --data {pairs} --out {reflow}")
    step("lora", path, reflow / "lora.safetensors")
    script("depth", "train.py", f"{few} --task depth --data {photos} --size 192 256 --lora small --out {depth}")
    script("a photograph's depth", "sample.py", f"--task depth --image {photos}/china.jpg --steps 2 --ensemble 2 "
           f"--lora {depth}/lora.safetensors --out {depth}")
    found = np.load(depth / "china.npy")
    print(f"  depth {found.shape}, from {found.min():.2f} to {found.max():.2f}", flush=True)


def main():
    import argparse
    parser = argparse.ArgumentParser(description="Full-size checks; see the comment in this file.")
    parser.add_argument("names", nargs="*", help="sd15, sd21, or both")
    parser.add_argument("--train", action="store_true", help="train instead of read")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    args = parser.parse_args()
    if args.step:
        what, name, path = args.step
        if what == "pickle":
            torch.save({"state_dict": load_file(path)}, Path(path).with_suffix(".ckpt"))
        elif what == "lora":
            compare_lora(name, path)
        elif what == "compare":
            compare_full_size(name, path)
        else:
            measure_reading(path, getattr(torch, what))
        return
    for name in args.names:
        with tempfile.TemporaryDirectory() as folder:
            run_full_size(name, folder, args.train)


if __name__ == "__main__":
    main()
