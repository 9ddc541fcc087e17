"""Draw the idea of Diff2Flow: the same sampling paths in the diffusion model's variables and in flow matching's.

    python -m claims.idea

The data are three narrow Gaussians on a line, so the best possible v-network has a closed form and nothing is trained.
"""
import torch
from matplotlib.figure import Figure

from diff2flow import Diff2Flow, alpha_sigma
from schedule import sd_schedule
from support.files import cli, replacing

MODES = torch.tensor([-1.5, 0.1, 1.4])      # the data: one of these three numbers,
WIDTH = 0.06                                # plus Gaussian noise of this standard deviation
NOISE, DATA = 2.2, -1.5                     # one noise and one data point, whose mixtures are drawn
STEPS = 400
MOMENTS = torch.tensor([999.0, 800, 600, 400, 200, 0])  # timesteps marked in all three panels
COLOURS = ["#d1495b", "#e09f1f", "#00798c"]             # one for each of the MODES
T_DM, T_FM = r"t_\mathrm{dm}", r"t_\mathrm{fm}"
X_DM, X_FM = r"x_\mathrm{dm}", r"x_\mathrm{fm}"
OUT = "claims/idea.png"


class ExactNetwork:
    """The v-network with the smallest possible error on the data: x_dm (B, 1, 1, 1), t_dm (B,) -> v (B, 1, 1, 1)."""

    def __init__(self, f_t):
        self.f_t = f_t

    def __call__(self, x_dm, t_dm, context):
        alpha, sigma = alpha_sigma(self.f_t(t_dm).view(-1, 1, 1, 1))
        variance = (alpha * WIDTH) ** 2 + sigma**2                      # of x_dm around alpha times a mode
        distance = x_dm - alpha * MODES                                 # (B, 1, 1, 3)
        chances = (-distance**2 / (2 * variance)).softmax(-1)           # of each mode, given x_dm
        x1 = (chances * (MODES + alpha * WIDTH**2 / variance * distance)).sum(-1, keepdim=True)     # E[x1 | x_dm]
        x0 = (x_dm - alpha * x1) / sigma
        return alpha * x0 - sigma * x1


def sample_paths(flow):
    """Algorithm 2 in many small steps, from evenly spread noise -> t_fm (N + 1,), x_fm (N + 1, B)."""
    x0 = torch.special.ndtri(torch.linspace(0.04, 0.96, 16)).view(-1, 1, 1, 1)
    points = [x0]
    flow.sample(x0, None, STEPS, callback=points.append)
    return torch.linspace(0, 1, STEPS + 1), torch.stack(points).flatten(1)


def draw_paths(axis, times, paths, pair, formula):
    """Draw paths (N, B) over times (N,), each in the colour of the mode where it ends, and a pair's mixtures (N,)."""
    for path in paths.T:
        axis.plot(times, path, color=COLOURS[(path[-1] - MODES).abs().argmin()], linewidth=1.3)
    axis.plot(times, pair, "--", color="black", linewidth=1.8)
    axis.set_ylim(-2.6, 3.2)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}       # hides lines behind text
    axis.text(0.97, 0.96, formula, transform=axis.transAxes, ha="right", va="top", bbox=white)
    axis.text(0.03, 0.03, "noise", transform=axis.transAxes, ha="left", bbox=white)
    axis.text(0.97, 0.03, "data", transform=axis.transAxes, ha="right", bbox=white)


def draw():
    levels = sd_schedule()
    flow = Diff2Flow(ExactNetwork(Diff2Flow(None, *levels).f_t), *levels)
    t_fm, x_fm = sample_paths(flow)
    first, last = flow.f_table[-1].item(), flow.f_table[0].item()       # the trained range of t_fm
    trained = (first <= t_fm) & (t_fm <= last)
    alpha, sigma = (x[trained] for x in alpha_sigma(t_fm))

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.1, 1.1, 0.8])
    x_dm = (alpha + sigma)[:, None] * x_fm[trained]                     # Eq. 13
    draw_paths(left, flow.f_t_inv(t_fm[trained]), x_dm, alpha * DATA + sigma * NOISE,
               "noise mixed with data, dashed:\n$\\alpha\\,x_1 + \\sigma\\,x_0$")
    draw_paths(middle, t_fm, x_fm, t_fm * DATA + (1 - t_fm) * NOISE,
               f"the same mixture, now straight:\n${T_FM}\\,x_1 + (1 - {T_FM})\\,x_0$")
    left.set(title="What a diffusion model sees", xlabel=f"timestep ${T_DM}$", ylabel=f"point ${X_DM}$")
    middle.set(title="What straight-line flow sees", xlabel=f"time ${T_FM}$", ylabel=f"point ${X_FM}$", xlim=(0, 1))

    t_dm = torch.arange(1000.0)
    right.axhspan(first, last, color="#00798c", alpha=0.12, linewidth=0)
    right.plot(t_dm, flow.f_t(t_dm), color="black", linewidth=1.8)
    right.plot(MOMENTS, flow.f_t(MOMENTS), "o", color="black", markersize=4, clip_on=False)
    right.text(20, 0.09, f"trained range:\n{first:.3f} to {last:.3f}", ha="right")
    right.set(title="The two clocks", xlabel=f"timestep ${T_DM}$", ylabel=f"time ${T_FM} = f_t({T_DM})$", ylim=(0, 1))
    for axis in (left, right):
        axis.set(xlim=(999, 0), xticks=MOMENTS.tolist())
    for moment in MOMENTS:
        left.axvline(moment, color="black", linewidth=0.5, alpha=0.4)
        middle.axvline(flow.f_t(moment[None]).item(), color="black", linewidth=0.5, alpha=0.4)
    return figure


def main():
    with replacing(OUT) as temporary:
        draw().savefig(temporary, dpi=200)
    print(OUT)


if __name__ == "__main__":
    cli(main)
