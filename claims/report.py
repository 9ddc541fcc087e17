"""Turn the results of many runs into a table or a plot: means over the seeds, with the lowest and the highest value.

    python -m claims.report table runs/*/result.json --by objective lora --of velocity_error_after="velocity error"
    python -m claims.report plot runs/*/validation.jsonl --out plot.png

The files hold JSON lines, one result a line. A value is called by its name in the line: "all" is line["all"], and
"plain.black" is line["plain"]["black"]. "run.objective" is the objective in "run", which is what train.py wrote into
result.json. A line without a "run" takes it from the result.json beside its file. NAME="HEADING" gives a name a
heading in words.
"""
import argparse
import json
import math
from collections import defaultdict, namedtuple
from pathlib import Path
from statistics import fmean

from files import SOFTWARE, check_replaceable, cli, read_text, replacing
from sample import read_result

Column = namedtuple("Column", "name heading")


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
    """"plain.black" -> row["plain"]["black"], or None where the row has no such value."""
    value = row
    for part in name.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def read_rows(paths, conditions):
    """Files of JSON lines -> the rows that meet every condition (name, value); each row has a "run"."""
    rows = []
    for path in map(Path, paths):
        run = read_result(path)
        for line in read_text(path).splitlines():
            row = {"run": run, **json.loads(line)}
            if all(str(look_up(row, name)) == value for name, value in conditions):
                rows.append(row)
    if not rows:
        wanted = "".join(f" {name}={value}" for name, value in conditions)
        where = " where" + wanted if conditions else ""
        raise ValueError(f"no row{where} in {' '.join(map(str, paths))}")
    return rows


def sort_key(values):
    """Sort numbers by size and before all words: 2, 8, 16, base."""
    keys = []
    for text in map(str, values):
        try:
            keys.append((0, float(text), ""))
        except ValueError:
            keys.append((1, 0.0, text))
    return keys


def group(rows, names):
    """Rows -> sorted list of (values, rows): the rows that have these values of `names`."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(look_up(row, name) for name in names)].append(row)
    return sorted(groups.items(), key=lambda item: sort_key(item[0]))


def in_words(value, words):
    """A value of --by or --panel as it is printed: as --words says, else as it is."""
    return words.get(str(value), str(value))


# ------------------------------------------------------------------ tables

def number(value):
    """Three digits, or all that stand before the point: 0.0280, 2.55, 776, 3172."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def mean_and_span(values, percent):
    """[0.25, 0.35] -> "0.300 (0.250 to 0.350)", or as percentages "30.0 % (25.0 to 35.0 %)"; "" for no values."""
    if not values:
        return ""
    figures = fmean(values), min(values), max(values)
    if percent:
        return "{:.1f} % ({:.1f} to {:.1f} %)".format(*(100 * figure for figure in figures))
    return "{} ({} to {})".format(*map(number, figures))


def print_line(cells):
    print(f"| {' | '.join(cells)} |")


def table(args):
    """Print a Markdown table: a line for each different --by, and of each --of the mean and the span."""
    rows, names = read_rows(args.files, args.where), [of.name for of in args.of]
    for name in names:
        if all(look_up(row, name) is None for row in rows):
            raise ValueError(f"--of {name}: no row has it")
    for name in args.percent:
        if name not in names:
            raise ValueError(f"--percent {name}: it must be one of --of, which are {' '.join(names)}")
    print_line([*(by.heading for by in args.by), "results", *(of.heading for of in args.of)])
    print("|" + "---|" * (len(args.by) + 1 + len(args.of)))
    for key, members in group(rows, [by.name for by in args.by]):
        cells = [in_words(value, args.words) for value in key] + [str(len(members))]
        for name in names:
            values = [look_up(row, name) for row in members]
            cells.append(mean_and_span([x for x in values if x is not None], name in args.percent))
        print_line(cells)


# ------------------------------------------------------------------ plots

def draw_lines(axis, rows, args):
    """A line for each different --by: the mean of --y over --x, and the span between lowest and highest shaded."""
    for (label,), members in group(rows, [args.by.name]):
        xs, means, lows, highs = [], [], [], []
        for (x,), points in group(members, [args.x.name]):
            ys = [look_up(row, args.y.name) for row in points]
            xs.append(x)
            means.append(fmean(ys))
            lows.append(min(ys))
            highs.append(max(ys))
        axis.plot(xs, means, marker=".", label=in_words(label, args.words))
        axis.fill_between(xs, lows, highs, alpha=0.2)
    axis.set_xlabel(args.x.heading)
    axis.legend(fontsize="small")


def draw(rows, args):
    """-> a figure with a panel for each different --panel."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install matplotlib") from None
    for row in rows:
        for name in (args.x.name, args.y.name, args.by.name):
            if look_up(row, name) is None:
                raise ValueError(f"a row lacks {name}: {json.dumps(row)[:200]}")
    panels = group(rows, [panel.name for panel in args.panel])
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines), layout="tight")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter("")
    for axis, (key, members) in zip(axes.flat, panels):
        draw_lines(axis, members, args)
        titles = [f"{panel.heading}: {in_words(value, args.words)}" for panel, value in zip(args.panel, key)]
        axis.set_title(", ".join(titles))
    for axis in axes[:, 0]:
        axis.set_ylabel(args.y.heading)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    return figure


def plot(args):
    check_replaceable(args.out)
    figure = draw(read_rows(args.files, args.where), args)
    with replacing(args.out) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": SOFTWARE})
    print(args.out)


# ------------------------------------------------------------------ the command line

def add_common_arguments(parser):
    parser.add_argument("files", nargs="+", help="files of JSON lines, such as result.json or validation.jsonl of "
                                                 "train.py, or captions.jsonl of toy.judge")
    parser.add_argument("--where", type=equation, nargs="+", default=[], metavar="NAME=VALUE",
                        help="use only the results that have these values, such as ensemble=4 (default: all results)")
    parser.add_argument("--words", type=equation, nargs="+", default=[], metavar="VALUE=WORDS",
                        help='print these words in place of a value of --by or --panel, such as fm="naive matching"')


def arguments():
    parser = argparse.ArgumentParser(prog="python -m claims.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    of_table = commands.add_parser("table", help="print a Markdown table")
    add_common_arguments(of_table)
    of_table.add_argument("--by", type=column, nargs="+", required=True, metavar="NAME",
                          help="results with the same values of these names share a line of the table, such as "
                               'run.objective="trained by"')
    of_table.add_argument("--of", type=column, nargs="+", required=True, metavar="NAME",
                          help='print the mean and the span of these values, such as all="captions right"')
    of_table.add_argument("--percent", nargs="+", default=[], metavar="NAME",
                          help="print these values of --of as percentages; they are shares from 0 to 1")

    of_plot = commands.add_parser("plot", help="draw a plot: the mean as a line, the span shaded")
    add_common_arguments(of_plot)
    of_plot.add_argument("--x", type=column, default="step=training step", metavar="NAME",
                         help="value on the horizontal axis (default: step)")
    of_plot.add_argument("--y", type=column, default="velocity_error=velocity error", metavar="NAME",
                         help="value on the vertical axis, which is logarithmic (default: velocity_error)")
    of_plot.add_argument("--by", type=column, default="run.objective", metavar="NAME",
                         help="draw one line for each different value of this name (default: run.objective)")
    of_plot.add_argument("--panel", type=column, nargs="+", default=[column("run.lora=LoRA")], metavar="NAME",
                         help="draw one panel for each different combination of these values (default: run.lora)")
    of_plot.add_argument("--out", default="plot.png", help="picture that is written (default: plot.png)")

    args = parser.parse_args()
    args.words = dict(args.words)
    return args


def main():
    args = arguments()
    if args.command == "table":
        table(args)
    else:
        plot(args)


if __name__ == "__main__":
    cli(main)
