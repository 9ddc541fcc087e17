"""Tests of the method: schedule.py and diff2flow.py against algebra, closed-form networks and diffusers.

    python -m pytest test_diff2flow.py

Every network here is synthetic, so that the truth is known. The schedule that these networks use is computed by numpy
(`level`, `timestep`), never by diff2flow.py. Unless a line says otherwise, a tolerance is a few float32 roundings
(2^-24 = 6e-8 each), times 1/alpha = 15.6 for an eps-network's worst level. Everything else is tested in tests/.
"""
import numpy as np
import pytest
import torch
from torch import nn

from diff2flow import OBJECTIVES, Diff2Flow, Diffusion, NaiveFM, alpha_sigma, interpolate, velocity_error
from schedule import sd_schedule

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


def timestep(t_fm, f=F_T):
    """t_dm in float64: an independent Eq. 12. numpy's interpolation clamps at the ends, as ours does."""
    return torch.from_numpy(np.interp(torch.as_tensor(t_fm).double().numpy(), f[::-1], np.arange(T)[::-1].copy()))


def output(prediction, x1, x0, alpha, sigma):
    return x0 if prediction == "eps" else alpha * x0 - sigma * x1


def exact(prediction, x1, x0, f=F_T):
    """A network with the exact output for the pair x1, x0."""
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
    """Two Gaussians in the whole image space: each pixel's output depends on all pixels."""
    var = (a**2 * MODE_STD**2 + s**2)[None]
    miss = x[None] - a[None] * MODES[:, None]                                            # (2, B, C, H, W)
    logit = WEIGHTS.log()[:, None] - (miss**2 / (2 * var)).sum((2, 3, 4))                # (2, B)
    mean = MODES[:, None] + a[None] * MODE_STD**2 / var * miss
    return (logit.softmax(0)[..., None, None, None] * mean).sum(0)


class Arbitrary(nn.Module):
    """Not optimal, nonlinear, mixes pixels and channels, and uses all of its inputs. Sensitive to t_dm: a step of 1
    changes the output by up to 0.14; the 3e-5 by which float32 rounds t_dm, by 4e-6."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.4 * rand(3, 3, 3, 3, seed=7).double())

    def forward(self, x_dm, t_dm, context):
        h = nn.functional.conv2d(x_dm.double(), self.weight, padding=1)
        t_dm = t_dm.double().view(-1, 1, 1, 1)
        return torch.sin(h + context.double().mean((1, 2)).view(-1, 1, 1, 1) + t_dm / 7) + 0.3 * x_dm.double().flip(3)


class Spy(nn.Module):
    """Records its calls."""

    def __init__(self, net=lambda x_dm, t_dm, context: torch.zeros_like(x_dm)):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x_dm, t_dm, context):
        self.calls.append((x_dm, t_dm, context))
        return self.net(x_dm, t_dm, context)


def wrap(net, prediction="v", kind=Diff2Flow, **schedule):
    return kind(net, *sd_schedule(**schedule), prediction=prediction)


class FromTrainedLevel(Diff2Flow):
    """Diff2Flow on the grid of other tools, which starts at the noisiest trained level instead of t_fm = 0."""

    def grid(self, steps):
        return torch.linspace(F_T[-1], 1, steps + 1)

    def sample(self, x0, context, steps):                           # x0 is x_dm at that level
        return super().sample(x0 / (ALPHA[-1] + SIGMA[-1]).float(), context, steps)


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


@pytest.mark.parametrize("zero_snr", [False, True])
def test_f_t_at_an_integer_is_that_row_of_the_schedule(zero_snr):
    alpha, sigma = sd_schedule(zero_snr=zero_snr)
    ours = wrap(None, zero_snr=zero_snr).f_t(torch.arange(T))
    assert torch.allclose(ours.double(), alpha / (alpha + sigma), atol=1e-7, rtol=0)


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
    assert (t_dm - timestep(t_fm)).abs().max() < 2e-4                # as above
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
        assert rel_diff(velocity(ours, x_fm, t_fm), truth) < 1e-5  # the goal is 1e-4; a timestep off by one gives 3e-3


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
def test_the_network_gets_trained_timesteps_and_the_unclamped_image(prediction):
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
def test_outside_the_trained_range_the_networks_output_is_kept_as_v(prediction):
    """The rule for the ends, written out: v at the clamped level, alpha and sigma at t_fm."""
    for t_fm in (0.0, 0.02, 0.05, 0.98, 1.0):
        r = 1 / np.hypot(t_fm, 1 - t_fm)
        alpha, sigma, x_dm = r * t_fm, r * (1 - t_fm), (r * X1.double())
        t_dm = timestep([t_fm] * 5)
        v = Arbitrary()(x_dm, t_dm, CONTEXT)
        if prediction == "eps":
            alpha_dm, sigma_dm = level(t_dm)
            v = (v - sigma_dm * x_dm) / alpha_dm
        truth = (alpha - sigma) * x_dm - (alpha + sigma) * v
        assert torch.allclose(velocity(wrap(Arbitrary(), prediction), X1, t_fm).double(), truth, atol=1e-4)


def test_an_optimal_eps_network_and_an_optimal_v_network_agree_everywhere_the_ends_included():
    for t_fm in (0.0, 0.03, 0.0641, 0.5, 0.9716, 0.99, 1.0):
        u_v, u_eps = (velocity(wrap(optimal(p, gaussian), p), X0, t_fm) for p in ("v", "eps"))
        assert rel_diff(u_eps, u_v) < 1e-5


@both_predictions
def test_the_first_step_of_a_pretrained_network_is_not_wasted(prediction):
    """At t_fm = 0 the truth is mu - x0. The network takes pure noise for its own last level, which has
    alpha = 0.068 of signal, so it is off by that much; a conversion at t_fm itself would give 0 here."""
    u = velocity(wrap(optimal(prediction, gaussian), prediction), X0, 0.0)
    assert rel_diff(u, MU - X0) < 0.07


# ---- Algorithm 2 is DDIM is Euler on sigma

def ddim(net, prediction, x_dm, t_fm_grid):
    """DDIM (eta = 0) in float64, from its definition: predict x1 and x0, move to the next alpha and sigma."""
    for now, then in zip(t_fm_grid[:-1], t_fm_grid[1:]):
        t_dm = timestep([float(now)] * len(x_dm))
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
    """diffusers' own sampler, started from x_ve = x1 + sigma x0; the network gets Eq. 12's t_dm (diffusers'
    own interpolation of log sigma differs from it by up to 0.03)."""
    from diffusers import EulerDiscreteScheduler
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       prediction_type={"v": "v_prediction", "eps": "epsilon"}[prediction])
    scheduler.set_timesteps(sigmas=[(1 - t_fm) / t_fm for t_fm in t_fm_grid])
    for t_fm, t_dm in zip(t_fm_grid, scheduler.timesteps):
        assert abs(t_dm - timestep([t_fm]).item()) < 0.03
        out = net(scheduler.scale_model_input(x_ve, t_dm), timestep([t_fm] * len(x_ve)), CONTEXT)
        x_ve = scheduler.step(out, t_dm, x_ve).prev_sample
    return x_ve


@both_predictions
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_n_euler_steps_are_n_steps_of_diffusers_euler_sampler_on_the_sigma_grid(prediction, steps):
    ours = wrap(Arbitrary(), prediction, FromTrainedLevel).sample(X0, CONTEXT, steps)
    theirs = euler_discrete(Arbitrary(), prediction, X0.double() / ALPHA[-1], np.linspace(F_T[-1], 1, steps + 1))
    assert torch.allclose(ours.double(), theirs.double(), atol=2e-4)   # theirs is float32 at sigma = 14.6


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
def test_one_step_from_pure_noise_misses_a_one_image_data_set_by_the_schedules_last_alpha(prediction):
    """SD never saw pure noise: at t_dm = 999 it takes x0 for alpha x1 + sigma x0, and 0.068 of x0 remains."""
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


def test_one_unconditional_embedding_serves_a_whole_batch():
    flow = Diff2Flow(Arbitrary(), ALPHA, SIGMA)
    uncond = rand(1, *CONTEXT.shape[1:], seed=9)
    one = flow.sample(X0, CONTEXT, 2, uncond, 3.0)
    assert torch.equal(one, flow.sample(X0, CONTEXT, 2, uncond.expand_as(CONTEXT), 3.0))


def test_guidance_without_an_unconditional_embedding_is_refused():
    with pytest.raises(ValueError, match="guidance of scale 4 needs uncond"):
        Diff2Flow(Arbitrary(), ALPHA, SIGMA).sample(X0, CONTEXT, 2, cfg=4)


def test_guidance_costs_one_call_of_two_batches_a_step_and_none_costs_one_call_of_one():
    spy = Spy()
    wrap(spy).sample(X0, CONTEXT, 3)
    assert [len(x_dm) for x_dm, _, _ in spy.calls] == [5] * 3
    spy = Spy()
    wrap(spy).sample(X0, CONTEXT, 3, uncond=UNCOND, cfg=2.0)
    assert [(len(x_dm), len(t_dm), len(context)) for x_dm, t_dm, context in spy.calls] == [(10, 10, 10)] * 3


def test_sampling_passes_each_point_of_the_path_to_the_callback_and_keeps_no_graph():
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
def test_inside_the_trained_range_the_loss_is_the_diffusion_loss_with_another_weight_per_level(prediction):
    """Squared errors of v count (alpha + sigma)^2 times, of eps ((alpha + sigma) / alpha)^2 times; times are uniform in
    t_fm. This network has a known error at each level, and both integrals are sums."""
    def wrong(x1, x0):
        def net(x_dm, t_dm, context):
            return exact(prediction, x1, x0)(x_dm, t_dm, context) + 0.1 + 0.05 * (t_dm / 90).sin().view(-1, 1, 1, 1)
        return net
    f_t = torch.from_numpy(F_T.copy())
    t_fm = torch.linspace(F_T[-1], F_T[0], 4001).unfold(0, 2, 1).mean(1)                # the middles of 4000 pieces
    x1, x0 = rand(4000, 1, 1, 1), rand(4000, 1, 1, 1, seed=1)
    loss = wrap(wrong(x1, x0), prediction).loss(x1, None, x0, t_fm)
    dm = wrap(wrong(x1[:1], x0[:1]), prediction, Diffusion)
    own = torch.stack([dm.loss(x1[:1], None, x0[:1], t_fm=f_t[[t_dm]]) for t_dm in range(T)])
    weight = (ALPHA + SIGMA) ** 2 if prediction == "v" else ((ALPHA + SIGMA) / ALPHA) ** 2
    expected = torch.trapezoid(weight * own, -f_t) / (f_t[0] - f_t[-1])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)                      # of the sums over 1000 levels
    assert abs(own.mean() / expected - 1) > 0.2                                         # as drawn and weighed by dm


@both_predictions
def test_the_loss_is_the_mean_squared_velocity_error_of_the_given_pair(prediction):
    t_fm = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    ours = wrap(Arbitrary(), prediction)
    u = ours(interpolate(X1, X0, t_fm), t_fm, CONTEXT)
    truth = ((u - (X1 - X0)) ** 2).sum().item() / X1.numel()
    assert ours.loss(X1, CONTEXT, X0, t_fm).item() == pytest.approx(truth, rel=1e-5)
    assert velocity_error(ours, X1, X0, t_fm, CONTEXT).item() == pytest.approx(truth, rel=1e-5)
    assert truth > 0.1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_masked_loss_is_the_mean_over_the_masked_latents_and_its_gradient_reaches_the_network(name):
    net, mask, t_fm = Arbitrary(), torch.zeros(SHAPE[0], 1, *SHAPE[2:]), torch.full((SHAPE[0],), 0.4)
    ours = OBJECTIVES[name](net, ALPHA, SIGMA)
    mask[1, :, 2:, :3] = 1
    loss = ours.loss(X1, CONTEXT, X0, t_fm, mask)
    cropped = ours.loss(X1[1:2], CONTEXT[1:2], X0[1:2], t_fm[1:2], mask[1:2])
    assert loss.item() == pytest.approx(cropped.item(), rel=1e-6)
    unmasked = ours.loss(X1, CONTEXT, X0, t_fm).item()
    assert abs(loss.item() / unmasked - 1) > 0.01
    assert ours.loss(X1, CONTEXT, X0, t_fm, torch.ones_like(mask)).item() == pytest.approx(unmasked, rel=1e-6)
    assert ours.loss(X1, CONTEXT, X0, t_fm, 0 * mask).item() == 0               # not 0 / 0
    loss.backward()
    assert net.weight.grad.isfinite().all() and net.weight.grad.abs().max() > 0


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


def test_a_bfloat16_network_gets_float32_times_and_u_is_float32():
    spy = Spy(lambda x_dm, t_dm, context: x_dm.bfloat16())
    ours = wrap(spy)
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
def test_bfloat16_latents_lose_no_further_precision_in_the_loss(name):
    x1, x0, t_fm = X1.bfloat16(), X0.bfloat16(), torch.full((5,), 0.5)
    ours = OBJECTIVES[name](exact("v", x1, x0), ALPHA, SIGMA)
    loss = ours.loss(x1, CONTEXT, x0, t_fm)
    assert loss.dtype == torch.float32 and loss < 1e-9            # x1 - x0 in bfloat16 would leave 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sampling_from_bfloat16_noise_loses_no_further_precision(name):
    ours = OBJECTIVES[name](Arbitrary(), ALPHA, SIGMA)
    assert torch.equal(ours.sample(X0.bfloat16(), CONTEXT, 2), ours.sample(X0.bfloat16().float(), CONTEXT, 2))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'x0'"):
        wrap(None, "x0")


def test_an_eps_network_without_a_signal_at_its_last_level_is_refused():
    with pytest.raises(ValueError, match="zero_snr"):
        wrap(None, "eps", zero_snr=True)


def test_a_zero_snr_v_network_is_exact_down_to_pure_noise():
    alpha, sigma = sd_schedule(zero_snr=True)
    ours = wrap(exact("v", X1, X0, f=(alpha / (alpha + sigma)).numpy()), zero_snr=True)
    for t_fm in (0.0, 1e-4, 0.03, 0.5):
        u = velocity(ours, interpolate(X1, X0, torch.tensor(t_fm).expand(5)), t_fm)
        assert (u - (X1 - X0)).abs().max() < 1e-5


@both_predictions
def test_dm_trains_on_the_networks_own_loss(prediction):
    t_dm = torch.tensor([0, 1, 500, 998, 999])
    alpha, sigma = (a[t_dm].view(-1, 1, 1, 1) for a in (ALPHA, SIGMA))
    out = Arbitrary()(alpha * X1 + sigma * X0, t_dm, CONTEXT)
    truth = (out - output(prediction, X1, X0, alpha, sigma)).square().mean().item()
    ours = wrap(Arbitrary(), prediction, Diffusion).loss(X1, CONTEXT, X0, torch.from_numpy(F_T[t_dm]))
    assert ours.item() == pytest.approx(truth, rel=1e-5)
    assert wrap(exact(prediction, X1, X0), prediction, Diffusion).loss(X1, CONTEXT, X0) < 1e-9


def test_dm_draws_integer_timesteps_uniformly_with_both_ends():
    torch.manual_seed(0)
    spy, n = Spy(), 20000                                         # the chance to miss an end is e^-20
    wrap(spy, "eps", Diffusion).loss(torch.full((n, 1, 1, 1), 3.0), None)
    (x_dm, t_dm, _), = spy.calls
    assert t_dm.dtype == torch.float32 and torch.equal(t_dm, t_dm.round())
    assert t_dm.min() == 0 and t_dm.max() == 999
    assert (torch.histc(t_dm, 10, 0, 1000) - n / 10).abs().max() < 5 * (n / 10) ** 0.5
    x0 = (x_dm[:, 0, 0, 0] - 3 * ALPHA[t_dm.long()]) / SIGMA[t_dm.long()]
    assert abs(x0.mean()) < 0.04 and abs(x0.std() - 1) < 0.04     # 5 standard errors


def test_dm_at_a_given_time_uses_the_nearest_integer_timestep():
    spy = Spy()
    wrap(spy, kind=Diffusion).loss(X1, CONTEXT, X0, torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0]))
    assert spy.calls[0][1].tolist() == timestep([0.0, 0.3, 0.5, 0.9, 1.0]).round().tolist()


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


NAIVE_WAYS = ("fm", 1, lambda t_fm: t_fm), ("fm-flip", -1, lambda t_fm: t_fm), (
    "rf", -1, lambda t_fm: 1000 * (1 - t_fm))


@both_predictions
@pytest.mark.parametrize("name, sign, time", NAIVE_WAYS)
def test_naive_fm_takes_the_raw_output_as_the_velocity_at_x_fm_and_its_time(name, sign, time, prediction):
    t_fm = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    ours = OBJECTIVES[name](Arbitrary(), ALPHA, SIGMA, prediction=prediction)
    x_fm = interpolate(X1, X0, t_fm)
    out = Arbitrary()(x_fm, time(t_fm), CONTEXT)
    assert torch.allclose(ours(x_fm, t_fm, CONTEXT).double(), sign * out, atol=1e-6)
    truth = (sign * out - (X1 - X0)).square().mean().item()
    assert ours.loss(X1, CONTEXT, X0, t_fm).item() == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("name, sign, time", NAIVE_WAYS)
def test_naive_fm_samples_by_plain_euler_on_the_raw_output(name, sign, time):
    x_fm = X0.double()
    for i in range(6):
        x_fm = x_fm + sign / 6 * Arbitrary()(x_fm, time(torch.full((5,), i / 6)), CONTEXT)
    ours = OBJECTIVES[name](Arbitrary(), ALPHA, SIGMA).sample(X0, CONTEXT, 6)
    assert torch.allclose(ours.double(), x_fm, atol=1e-5)


def test_rf_is_diffusers_flow_matching():
    """Its Euler scheduler for flow matching, at sigma 1 to 0 and times 1000 sigma, of a network of x0 - x1."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler, x = FlowMatchEulerDiscreteScheduler(shift=1.0), X0
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    for t in scheduler.timesteps:
        x = scheduler.step(Arbitrary()(x.double(), t.expand(len(x)), CONTEXT).float(), t, x).prev_sample
    ours = OBJECTIVES["rf"](Arbitrary(), ALPHA, SIGMA).sample(X0, CONTEXT, 4)
    assert torch.allclose(ours, x, atol=1e-5)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_schedule_follows_the_data_to_its_device(name):
    """The schedule is made on the CPU; everything else is on the meta device, which refuses to mix the two."""
    def flow():
        return OBJECTIVES[name](lambda x_dm, t_dm, context: x_dm * t_dm.view(-1, 1, 1, 1), ALPHA, SIGMA)

    x, context = torch.zeros(SHAPE, device="meta"), torch.zeros(SHAPE[0], 2, 3, device="meta")
    assert flow().loss(x, context).device.type == "meta"
    assert flow().sample(x, context, 2, context[:1], 3.0).device.type == "meta"
