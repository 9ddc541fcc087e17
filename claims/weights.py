"""Draw how the objectives weight noise levels: how often each is drawn, and the weight of its errors.

    python -m claims.weights

At a given level the errors of u, v and eps differ only by a factor, since x_dm is the same (Eqs. 15 and 16):

    u - u* = -(alpha + sigma) (v - v*) = -((alpha + sigma) / alpha) (eps - eps*)

So within the trained range Diff2Flow's loss is the diffusion loss with other per-timestep weights: (alpha + sigma)^2
for squared v-errors, (alpha + sigma)^2 / alpha^2 for squared eps-errors. Its times are uniform in t_fm, so their
density over t_dm is |df_t / dt_dm|. test_diff2flow.py checks this.
"""
import torch
from matplotlib.figure import Figure

from schedule import sd_schedule
from support.files import cli, replacing

OUT = "claims/weights.png"
LEVELS = [0, 50, 100, 200, 400, 600, 800, 900, 999]     # timesteps in the printed table


def weights():
    """-> t_fm, density of times, weight of v-errors, weight of eps-errors: each (1000,), one for each t_dm.

    A density of 1 is that of diffusion training; the weights include the density.
    """
    alpha, sigma = sd_schedule()
    t_fm = alpha / (alpha + sigma)
    density = -torch.gradient(t_fm)[0] * len(t_fm)
    return t_fm, density, density * (alpha + sigma) ** 2, density * ((alpha + sigma) / alpha) ** 2


def draw():
    t_fm, density, of_v, of_eps = weights()
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis in (left, right):
        axis.axhline(1, color="#d1495b", linewidth=2, label="diffusion loss (dm)")
        axis.set(xlim=(999, 0), yscale="log", ylim=(0.2, 150), xlabel=r"timestep $t_\mathrm{dm}$, from noise to data")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    left.plot(density, color="#00798c", linewidth=2, label="Diff2Flow, v- or eps-prediction")
    left.set(title="How often a level is drawn", ylabel="relative to the diffusion loss")
    right.plot(of_v, color="#00798c", linewidth=2, label="Diff2Flow, v-prediction")
    right.plot(of_eps, color="#e09f1f", linewidth=2, label="Diff2Flow, eps-prediction")
    right.set(title="Weight of a level's squared errors")
    for axis in (left, right):
        axis.legend(fontsize="small")
    return figure


def main():
    names = "t_fm", "density of times", "weight of v-errors", "weight of eps-errors"
    print("| t_dm |", " | ".join(map(str, LEVELS)), "|\n" + "|---" * (len(LEVELS) + 1) + "|")
    for name, values in zip(names, weights()):
        print(f"| {name} |", " | ".join(f"{values[level]:.3g}" for level in LEVELS), "|")
    with replacing(OUT) as temporary:
        draw().savefig(temporary, dpi=150)
    print(OUT)


if __name__ == "__main__":
    cli(main)
