"""Print and plot the results of many runs.

    python -m claims.report table runs/*/result.json --by objective lora --of velocity_error_after="velocity error"
    python -m claims.report paired claims/results/style --against dm --of velocity_error --by prediction run.lora
    python -m claims.report plot runs/*/validation.jsonl --out plot.png
    python -m claims.report best claims/results/rates --of velocity_error_after --by lr

table and plot: means over seeds, with the lowest and the highest value. best: the value of --by with the lowest mean of
--of. paired: the difference between runs of two objectives with the same seed, on the same scenes, and its 95 %
interval; an effect is significant if the interval excludes 0. With d_si the difference for seed s and scene i, S seeds
and N scenes, the half width is

    t(n) sqrt(A + B)        A = var_s(mean_i d_si) / S        B = var_i(mean_s d_si) / N
    t(n) the 97.5 % point of Student's t        n = (A + B)^2 / (A^2 / (S - 1) + B^2 / (N - 1))

A is the variance of the mean over seeds, B over scenes; n is the Welch-Satterthwaite number of degrees of freedom. A
measure without values per scene has B = 0; without training, A = 0. With fewer than three training seeds A is too
uncertain, and there is no interval. A model before training has no seed, and is compared with every seed of the models
trained from it.

Files (or the files of a folder) contain JSON lines. NAME is a path in a line: "all" is line["all"], "black.mean" is
line["black"]["mean"], "size.0" is line["size"][0]. "run.objective" is the objective in "run", which is train.py's
result.json; a line without "run" gets it from the result.json beside its file. "file" is the file's name without the
seed. NAME="HEADING" prints HEADING in place of NAME.
"""
import argparse
import contextlib
import json
import math
import re
from collections import defaultdict, namedtuple
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy import stats

from support.files import SOFTWARE, check_replaceable, cli, from_json, parse, read_text, reading, replacing
from support.load import read_result

Column = namedtuple("Column", "name heading")
COLOURS = {"diff2flow": "#00798c", "dm": "#d1495b", "fm": "#8d96a3", "fm-flip": "#e09f1f"}
FEW = 5                     # at most so many values on a horizontal axis are each labelled, on a logarithmic scale


def column(text):
    """NAME or NAME=HEADING -> Column."""
    name, _, heading = text.partition("=")
    return Column(name, heading or name)


def equation(text):
    """NAME=VALUE -> (name, value)."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def look_up(row, name):
    """"plain.black" -> row["plain"]["black"], "size.0" -> row["size"][0], or None where the row has no such value."""
    value = row
    for part in name.split("."):
        if isinstance(value, list):
            value = {str(i): entry for i, entry in enumerate(value)}
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def read_rows(paths, conditions):
    """Files of JSON lines -> the rows that meet every condition (name, "value" or "value|other"), each with "run" and
    "file"."""
    return select(read_all(paths), conditions, paths)


def read_all(paths):
    """Files of JSON lines -> all rows, each with "run" and "file"."""
    rows = []
    files = [file for path in map(Path, paths) for file in sorted(path.glob("*.jsonl")) or [path]]
    for path in files:
        about = {"run": read_result(path), "file": re.sub(r"-\d+$", "", path.stem)}
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            with reading(f"{path}, line {number}", "a JSON object"):
                rows.append({**about, **from_json(line)})
    return rows


def select(rows, conditions, paths):
    """-> the rows of the files that meet every condition. ValueError if none does."""
    rows = [row for row in rows if all(str(look_up(row, name)) in value.split("|") for name, value in conditions)]
    if not rows:
        wanted = "".join(f" {name}={value}" for name, value in conditions)
        where = " where" + wanted if conditions else ""
        raise ValueError(f"no row{where} in {' '.join(map(str, paths))}")
    return rows


@contextlib.contextmanager
def values_of_one_kind(files):
    """Inside `with`, words where numbers are needed, and the like, are a ValueError that names the files."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{' '.join(files)}: a row has a value of another kind than expected ({error})") from error


def sort_key(values):
    """-> keys that sort numbers by size and before all words: 2, 8, 16, base."""
    keys = []
    for text in map(str, values):
        try:
            keys.append((0, float(text), ""))
        except ValueError:
            keys.append((1, 0.0, text))
    return keys


def group(rows, names):
    """Rows -> sorted list of (values, rows), grouped by their values of `names`."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(look_up(row, name) for name in names)].append(row)
    return sorted(groups.items(), key=lambda item: sort_key(item[0]))


def display(value, words):
    """-> a value of --by or --panel as it is printed, which --words may replace."""
    return words.get(str(value), str(value))


# ------------------------------------------------------------------ tables

def number(value):
    """-> three significant digits, or all before the decimal point: 0.0280, 2.55, 776, 3172."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def mean_and_span(values, percent):
    """[0.25, 0.35] -> "0.300 (0.250 to 0.350)", or as percentages "30.0 % (25.0 to 35.0 %)"; one value has no span; no
    values are ""."""
    if not values:
        return ""
    mean, low, high = (f"{100 * x:.1f}" if percent else number(x) for x in (fmean(values), min(values), max(values)))
    unit = " %" if percent else ""
    return f"{mean}{unit}" if len(values) == 1 else f"{mean}{unit} ({low} to {high}{unit})"


def print_line(cells):
    print(f"| {' | '.join(cells)} |")


def check_names(args, *flags):
    """ValueError for a flag with a name that is not in --of."""
    names = [of.name for of in args.of]
    for flag in flags:
        for name in getattr(args, flag):
            if name not in names:
                raise ValueError(f"--{flag} {name}: it must be one of --of, which are {' '.join(names)}")


def table(args):
    """Print a Markdown table: a line per value of --by, with mean and span of each --of."""
    rows, names = read_rows(args.files, args.where), [of.name for of in args.of]
    for name in names:
        if all(look_up(row, name) is None for row in rows):
            raise ValueError(f"--of {name}: no row has it")
    check_names(args, "percent")
    print_line([*(by.heading for by in args.by), "results", *(of.heading for of in args.of)])
    print("|" + "---|" * (len(args.by) + 1 + len(args.of)))
    for key, members in group(rows, [by.name for by in args.by]):
        values = {name: [x for row in members if (x := look_up(row, name)) is not None] for name in names}
        print_line([*(display(value, args.words) for value in key), str(max(map(len, values.values()))),
                    *(mean_and_span(of_it, name in args.percent) for name, of_it in values.items())])


def best(args):
    """Print the value of --by with the lowest mean of --of."""
    by, of = args.by, args.of
    groups = group([row for row in read_rows(args.files, args.where) if look_up(row, of.name) is not None], [by.name])
    if not groups:
        raise ValueError(f"--of {of.name}: no row has it")
    print(min(groups, key=lambda item: fmean(look_up(row, of.name) for row in item[1]))[0][0])


# ------------------------------------------------------------------ pairs

def estimate(differences, trained=True):
    """Differences (S seeds, N scenes) -> mean, half the width of its 95 % interval by the formula above, its p-value.

    The last two are None if the variance cannot be estimated: fewer than three training seeds, or a single difference.
    """
    seeds, scenes = differences.shape
    if seeds * scenes == 1 or (trained and seeds < 3):
        return differences.mean(), None, None
    parts = []                                                          # A and B, each with its degrees of freedom
    for means in differences.mean(1), differences.mean(0):
        if len(means) > 1:
            parts.append((means.var(ddof=1) / len(means), len(means) - 1))
    mean, variance = differences.mean(), sum(part for part, _ in parts)
    if variance == 0:
        return mean, 0.0, float(mean == 0)
    freedom, error = variance**2 / sum(part**2 / own for part, own in parts), math.sqrt(variance)
    return mean, stats.t.ppf(0.975, freedom) * error, 2 * stats.t.sf(abs(mean) / error, freedom)


def interval(differences, trained=True):
    """estimate() without the p-value."""
    return estimate(differences, trained)[:2]


def values_of(row, name):
    """A measure of a row -> its values per scene if there are any, else its one value."""
    with reading(f"{name} of {row['file']}", "numbers"):
        return np.atleast_1d(look_up(row, f"scenes.{name}") or look_up(row, name)).astype(float)


def by_seed(rows, names):
    """-> {seed: row}. ValueError for two rows of one seed."""
    found = {look_up(row, "run.seed"): row for row in rows}
    if len(found) < len(rows):
        raise ValueError(f"more than one row of {names} with the same seed: add to --by or --where")
    return found


def paired_values(ours, theirs, name):
    """{seed: row} twice -> the seeds that both have, and our and their values of a measure, each (seeds, scenes).

    If theirs was not trained, its only seed is None, and its row is compared with each of ours.
    """
    if theirs.keys() == {None}:
        theirs = dict.fromkeys(ours, theirs[None])
    seeds = sorted(ours.keys() & theirs.keys(), key=str)
    return seeds, *(np.array([values_of(rows[seed], name) for seed in seeds]) for rows in (ours, theirs))


def differences(args):
    """-> {heading of --of: [(values of --by and --compare, number of seeds, mean, half width), ...]}."""
    rows, found = read_rows(args.files, args.where), {}
    names = [by.name for by in args.by]
    for of in args.of:
        found[of.heading] = []
        for values, members in group([row for row in rows if look_up(row, of.name) is not None], names):
            compared = group(members, [args.compare.name])
            runs = {str(name): by_seed(of_it, (*values, name)) for (name,), of_it in compared}
            for name in runs.keys() - {args.against}:
                seeds, ours, theirs = paired_values(runs[name], runs.get(args.against, {}), of.name)
                if seeds:
                    pairs = (ours - theirs) / (theirs.mean() if of.name in args.relative else 1)
                    found[of.heading].append(((*values, name), len(seeds), *interval(pairs, trained=seeds != [None])))
        found[of.heading].sort(key=lambda row: sort_key(row[0]))
        if not found[of.heading]:
            raise ValueError(f"--of {of.name}: no two results of another {args.compare.name} and of {args.against}")
    return found


def paired(args):
    """Print a table of the differences, a line per value of --by and --compare; with --out also draw them."""
    check_names(args, "percent", "relative")
    found, against = differences(args), display(args.against, args.words)
    print_line([*(by.heading for by in args.by), args.compare.heading, "pairs",
                *(f"{of.heading}, difference from {against}{unit(of.name, args)}" for of in args.of)])
    print("|" + "---|" * (len(args.by) + 2 + len(found)))
    lines = defaultdict(dict)
    for heading, rows in found.items():
        for values, pairs, mean, half in rows:
            lines[values, pairs][heading] = mean, half
    for values, pairs in sorted(lines, key=lambda line: sort_key(line[0])):
        cells = [display(value, args.words) for value in values]
        for of in args.of:
            mean, half = lines[values, pairs].get(of.heading, (None, None))
            cells.append("" if mean is None else format_difference(mean, half, unit(of.name, args) != ""))
        print_line([*cells[:len(values)], str(pairs), *cells[len(values):]])
    if args.out:
        check_replaceable(args.out)
        save_figure(draw_differences(found, args), args.out)


def unit(name, args):
    """-> the unit of a difference, for a heading; "" for none."""
    return " (%)" if name in args.relative else " (points)" if name in args.percent else ""


def marked(text, mean, half):
    """-> the text of a mean, in bold if its interval excludes 0; half may be None."""
    return f"**{text}**" if half is not None and abs(mean) > half else text


def format_difference(mean, half, percent):
    """-0.01 and 0.004 -> "**-0.010** (-0.014 to -0.0060)", in bold if the interval excludes 0; half may be None."""
    def signed(x):
        if percent:
            return f"{100 * x:+.1f}"
        return f"{x:+#.2g}" if abs(x) < 10 else f"{x:+.0f}"

    if half is None:
        return signed(mean)
    return f"{marked(signed(mean), mean, half)} ({signed(mean - half)} to {signed(mean + half)})"


APART = "fm"                # what differs so much from the others that it is drawn with horizontal axes of its own


def draw_differences(found, args):
    """-> a figure with a panel per measure: a point per mean, a bar for its interval, a line at 0. Lines of fm have
    panels of their own, below."""
    figure_class = matplotlib_figure()
    lines = sorted({values for rows in found.values() for values, *_ in rows}, key=sort_key, reverse=True)
    parts = [[line for line in lines if (line[-1] == APART) == is_apart] for is_apart in (False, True)]
    parts = [part for part in parts if part]
    figure = figure_class(figsize=(2 + 3.2 * len(found), 0.9 * len(parts) + 0.3 * len(lines) + 0.3),
                          layout="constrained")
    grid = figure.subplots(len(parts), len(found), squeeze=False, sharey="row",
                           height_ratios=[len(part) + 0.3 for part in parts])
    for axes, part in zip(grid, parts):
        for axis, of in zip(axes, args.of):
            scale = 100 if unit(of.name, args) else 1
            axis.axvline(0, color="black", linewidth=1)
            for values, _, mean, half in found[of.heading]:
                if values in part:
                    axis.errorbar(scale * mean, part.index(values), xerr=None if half is None else scale * half,
                                  fmt="o", capsize=3, color=COLOURS.get(values[-1], "black"))
            axis.set(yticks=range(len(part)), ylim=(-0.6, len(part) - 0.4),
                     yticklabels=[", ".join(display(value, args.words) for value in values) for values in part])
            axis.grid(axis="x", alpha=0.3)
    for above, below, of in zip(grid[0], grid[-1], args.of):
        above.set(title=of.heading)
        below.set(xlabel=f"difference from {display(args.against, args.words)}{unit(of.name, args)}")
    return figure


# ------------------------------------------------------------------ plots

def matplotlib_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install matplotlib") from None
    return Figure


def save_figure(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": SOFTWARE})
    print(path)


def draw_lines(axis, rows, args):
    """Draw a line per value of --by: the mean of --y over --x, and the span from lowest to highest shaded."""
    for (label,), members in group(rows, [args.by.name]):
        xs, means, lows, highs = [], [], [], []
        for (x,), points in group(members, [args.x.name]):
            ys = [look_up(row, args.y.name) for row in points]
            xs.append(x)
            means.append(fmean(ys))
            lows.append(min(ys))
            highs.append(max(ys))
        line, = axis.plot(xs, means, marker=".", label=display(label, args.words), color=COLOURS.get(label))
        axis.fill_between(xs, lows, highs, alpha=0.2, color=line.get_color())
    values = sorted({look_up(row, args.x.name) for row in rows})
    if len(values) <= FEW and values[0] > 0:
        axis.set_xscale("log")
        axis.set_xticks(values, values)
        axis.minorticks_off()
    axis.set_xlabel(args.x.heading)
    axis.legend(fontsize="small")


def as_ratios(rows, args):
    """Rows -> the same with --y divided by the mean of --against over its rows in the same panel at the same --x."""
    names, found = [panel.name for panel in args.panel] + [args.x.name], []
    for values, members in group(rows, names):
        of_other = [look_up(row, args.y.name) for row in members if str(look_up(row, args.by.name)) == args.against]
        if not of_other:
            raise ValueError(f"--against {args.against}: no row with {args.x.name} {values[-1]}")
        found += [{**row, args.y.name: look_up(row, args.y.name) / fmean(of_other)} for row in members]
    return found


def draw(rows, args):
    """-> a figure with a panel per value of --panel."""
    figure_class = matplotlib_figure()
    from matplotlib.ticker import LogLocator
    for row in rows:
        for name in (args.x.name, args.y.name, args.by.name):
            if look_up(row, name) is None:
                raise ValueError(f"a row lacks {name}: {json.dumps(row)[:200]}")
    if args.against:
        rows = as_ratios(rows, args)
    panels = group(rows, [panel.name for panel in args.panel])
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = figure_class(figsize=(4.2 * columns, 3.6 * lines), layout="tight")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    if not (args.linear or args.against):
        axes[0, 0].set_yscale("log")
        axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes[0, 0].yaxis.set_major_formatter("{x:g}")
        axes[0, 0].yaxis.set_minor_formatter("")
    for axis, (key, members) in zip(axes.flat, panels):
        draw_lines(axis, members, args)
        titles = [f"{panel.heading}: {display(value, args.words)}" for panel, value in zip(args.panel, key)]
        axis.set_title(", ".join(titles))
    if args.linear:
        axes[0, 0].set_ylim(bottom=0)                   # of all panels, which share it
    for axis in axes[:, 0]:
        axis.set_ylabel(args.y.heading)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    return figure


def plot(args):
    check_replaceable(args.out)
    save_figure(draw(read_rows(args.files, args.where), args), args.out)


# ------------------------------------------------------------------ the command line

def add_common_arguments(parser):
    parser.add_argument("files", nargs="+", help="files of JSON lines, such as result.json or validation.jsonl of "
                                                 "train.py, or captions.jsonl of toy.judge")
    parser.add_argument("--where", type=equation, nargs="+", default=[], metavar="NAME=VALUE",
                        help='use only results with these values, such as ensemble=4 or objective="dm|diff2flow" '
                             '(default: all results)')
    parser.add_argument("--words", type=equation, nargs="+", default=[], metavar="VALUE=WORDS",
                        help='print WORDS in place of a VALUE of --by or --panel, such as fm="naive matching"')


def add_table_arguments(parser):
    parser.add_argument("--by", type=column, nargs="+", required=True, metavar="NAME",
                        help="results with equal values of these names share a line of the table, such as "
                             'run.objective="trained by"')
    parser.add_argument("--of", type=column, nargs="+", required=True, metavar="NAME",
                        help='what is measured, such as all="captions right"')
    parser.add_argument("--percent", nargs="+", default=[], metavar="NAME",
                        help="print these values of --of as percentages; they are shares from 0 to 1")


def arguments():
    parser = argparse.ArgumentParser(prog="python -m claims.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    of_table = commands.add_parser("table", help="print a Markdown table")
    add_common_arguments(of_table)
    add_table_arguments(of_table)

    of_paired = commands.add_parser("paired", help="print and draw the differences between objectives")
    add_common_arguments(of_paired)
    add_table_arguments(of_paired)
    of_paired.add_argument("--compare", type=column, default="run.objective=objective", metavar="NAME",
                           help="what differs within a pair (default: run.objective)")
    of_paired.add_argument("--against", default="dm", help="value of --compare to compare with (default: dm)")
    of_paired.add_argument("--relative", nargs="+", default=[], metavar="NAME",
                           help="print the differences of these values of --of as percentages of the mean of --against")
    of_paired.add_argument("--out", help="file for a figure of the differences (default: none)")

    of_best = commands.add_parser("best", help="print the value of --by with the best results")
    add_common_arguments(of_best)
    of_best.add_argument("--by", type=column, required=True, metavar="NAME", help="what is chosen, such as lr")
    of_best.add_argument("--of", type=column, required=True, metavar="NAME", help="what is measured; lower is better")

    of_plot = commands.add_parser("plot", help="draw a plot: the mean as a line, the span shaded")
    add_common_arguments(of_plot)
    of_plot.add_argument("--x", type=column, default="step=training step", metavar="NAME",
                         help="value on the horizontal axis (default: step)")
    of_plot.add_argument("--y", type=column, default="velocity_error=velocity error", metavar="NAME",
                         help="value on the vertical axis (default: velocity_error)")
    of_plot.add_argument("--linear", action="store_true",
                         help="make the vertical axis linear, from 0 (default: logarithmic)")
    of_plot.add_argument("--by", type=column, default="run.objective", metavar="NAME",
                         help="draw a line per value of this name (default: run.objective)")
    of_plot.add_argument("--panel", type=column, nargs="*", default=[column("run.lora=LoRA")], metavar="NAME",
                         help="draw a panel per combination of values of these names; without a NAME, a single panel "
                              "(default: run.lora)")
    of_plot.add_argument("--against", help="divide by the mean of this value of --by (default: nothing)")
    of_plot.add_argument("--out", default="plot.png", help="file for the figure (default: plot.png)")

    args = parse(parser)
    args.words = dict(args.words)
    return args


COMMANDS = {"table": table, "paired": paired, "plot": plot, "best": best}


def main():
    args = arguments()
    with values_of_one_kind(args.files):
        COMMANDS[args.command](args)


if __name__ == "__main__":
    cli(main)
