"""Compare the velocity error at each noise level with the prediction from the loss weights.

    python -m claims.levels claims/results/style --out claims/results/levels.png
    python -m claims.levels claims/results/weights --prior eps --objectives diff2flow p1 p2 c5 c20 min-snr

Diff2Flow's loss weights the errors of some levels more than the diffusion loss does, and of others less
(claims/weights.py). So diff2flow should be ahead of dm most where its weight is highest. fm-flip and rf have the same
weights, since their loss is the same squared error of u at uniform t_fm; only the network's inputs and output differ.
p1, p2, c5, c20 and min-snr have others (claims/weighted.py). toy.judge measures each scene at its own time, so scenes
with times between two bounds measure the levels between them.
"""
import argparse

import numpy as np
from scipy.stats import spearmanr

from claims.report import (
    COLOURS,
    by_seed,
    group,
    interval,
    marked,
    matplotlib_figure,
    paired_values,
    read_rows,
    save_figure,
    values_of_one_kind,
)
from claims.weighted import WEIGHTS, min_snr
from claims.weights import weights
from support.files import check_replaceable, cli, parse
from support.validation import spread_times

BOUNDS = np.linspace(0, 1, 9)                       # of t_fm: eight bins
TICKS = [0.5, 1, 2, 5, 10, 20, 50]                  # of weights
NAMES = {"none": "all weights", "base": "LoRA base"}
SHIFT = 0.01                                        # between points in one panel, so that they do not hide each other


def predicted_weights(prediction, objective="diff2flow"):
    """-> for each bin the objective's weight of squared "v" or "eps" errors, averaged over t_fm; dm's is 1."""
    t_fm, density, of_v, of_eps = weights()
    weight, found = of_v if prediction == "v" else of_eps, []
    if objective in WEIGHTS:
        weight = weight * WEIGHTS[objective](t_fm)
    elif objective == "min-snr":
        weight = min_snr(t_fm)
    t_fm, density, weight = t_fm.numpy(), density.numpy(), weight.numpy()
    for low, high in zip(BOUNDS, BOUNDS[1:]):
        inside = (t_fm >= low) & (t_fm < high)
        found.append(np.average(weight[inside], weights=density[inside]))
    return np.array(found)


def by_level(runs, dm):
    """{seed: row} of an objective and of dm -> for each bin the relative difference of their errors, and half the width
    of its 95 % interval, None for fewer than three seeds."""
    _, ours, theirs = paired_values(runs, dm, "velocity_error")                         # each (seeds, scenes)
    bins = np.digitize(spread_times(ours.shape[1], "cpu").numpy(), BOUNDS) - 1
    found = []
    for number in range(len(BOUNDS) - 1):
        a, b = ours[:, bins == number], theirs[:, bins == number]
        found.append(interval((a - b) / b.mean()))
    return found


def draw(panels):
    """panels: {heading: (weights, {label: measured})} -> a figure with the weights above, the differences below."""
    figure = matplotlib_figure()(figsize=(1 + (3 if len(panels) < 5 else 2.2) * len(panels), 5), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
    middle = (BOUNDS[1:] + BOUNDS[:-1]) / 2
    for (above, below), (heading, (weight, series)) in zip(axes.T, panels.items()):
        above.bar(middle, weight, 0.11, color="#7d5ba6")
        above.axhline(1, color=COLOURS["dm"], linewidth=2)
        above.set(title=heading, yscale="log", yticks=TICKS, yticklabels=TICKS)
        above.minorticks_off()
        below.axhline(0, color=COLOURS["dm"], linewidth=2)
        for number, (name, measured) in enumerate(series.items()):
            means, halves = 100 * np.array(measured, float).T              # no interval: NaN, which draws no bar
            shift = SHIFT * (2 * number - len(series) + 1)
            below.errorbar(middle + shift, means, halves, fmt="o", capsize=3, color=COLOURS.get(name, "black"),
                           mfc="white" if name == NAMES["none"] else None, label=name)
        if len(series) > 1 and not figure.legends:
            figure.legend(*below.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize="small")
        below.set(xlabel=r"time $t_\mathrm{fm}$, from noise to data")
        below.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("weight of errors, dm's is 1")
    axes[1, 0].set_ylabel("velocity error,\ndifference from dm (%)")
    return figure


def arguments():
    parser = argparse.ArgumentParser(prog="python -m claims.levels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="results of toy.judge velocity, or a folder of them")
    parser.add_argument("--prior", default="v|eps", help="only models that predict this (default: v|eps)")
    parser.add_argument("--objectives", nargs="+", default=["diff2flow", "fm-flip"],
                        help="more than two have a panel each, with LoRA and all weights side by side "
                             "(default: diff2flow fm-flip)")
    parser.add_argument("--out", help="file for the figure (default: none)")
    return parse(parser)


def compare(args):
    """Print the table, and with --out draw the figure."""
    if args.out:
        check_replaceable(args.out)
    rows = read_rows(args.files, [("run.objective", "|".join(["dm", *args.objectives])), ("prediction", args.prior)])
    panels = {}
    rows = [row for row in rows if "velocity_error" in row.get("scenes", {})]
    print("| prior | trained | objective | rank correlation of weight and difference |",
          *(f"{a:.3g} to {b:.3g} |" for a, b in zip(BOUNDS, BOUNDS[1:])))
    print("|---" * (4 + len(BOUNDS) - 1) + "|")
    for (prediction, trained), members in group(rows, ["prediction", "run.lora"]):
        runs = {name: by_seed(of_it, name) for (name,), of_it in group(members, ["run.objective"])}
        dm = runs.pop("dm", None)
        if not dm or not runs:
            continue
        for name in filter(runs.get, args.objectives):
            weight, measured = predicted_weights(prediction, name), by_level(runs[name], dm)
            panel, label = NAMES.get(trained, trained), name
            if len(args.objectives) > 2:
                panel, label = label, panel
            panels.setdefault(f"{prediction}-prior, {panel}", (weight, {}))[1][label] = measured
            rank = spearmanr(weight, [mean for mean, _ in measured]).statistic
            print(f"| {prediction} | {NAMES.get(trained, trained)} | {name} | {rank:+.2f} |",
                  " | ".join(marked(f"{100 * mean:+.1f}", mean, half) for mean, half in measured), "|")
    if not panels:
        raise ValueError(f"no results of dm and of another objective in {' '.join(args.files)}")
    if args.out:
        save_figure(draw(panels), args.out)


def main():
    args = arguments()
    with values_of_one_kind(args.files):
        compare(args)


if __name__ == "__main__":
    cli(main)
