"""Say for each claim what is ahead of what, by one rule.

    python -m claims.verdicts           a line for each claim, for the README
    python -m claims.verdicts all       a line for each measure, also with fewer steps and with guidance
    python -m claims.verdicts weights   the same for other weights of Diff2Flow's loss (claims/weighted.py), min-snr, rf

A difference between two objectives has a 95 % interval over at least three seeds and over the scenes (claims/report.py;
over the scenes alone for claims about a model that is not trained). Then

    ahead, behind   the interval excludes 0
    level           it includes 0, and lies within a margin on both sides: 3 points of captions right, 5 % of an error
                    or a distance, 0.01 of brightness
    not decided     neither; also with fewer than three seeds

**Bold** verdicts also hold after Holm's correction for all comparisons of the same claim: the chance that any of them
is wrong is then at most 5 %.
"""
import argparse
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from claims.report import by_seed, estimate, group, look_up, number, paired_values, print_line, read_all, select
from support.files import cli, parse

RESULTS = "claims/results"


@dataclass
class Measure:
    """What is compared."""
    heading: str
    better: int                             # 1 if more is better, -1 if less is
    margin: float                           # of "level", in the unit of the difference
    relative: bool                          # the difference is a share of the other's mean
    percent: bool = False                   # the values are shares

    def show(self, value):
        return f"{100 * value:.0f} %" if self.percent else number(value)

    def difference(self, mean, half):
        """-> a mean difference and its interval in words, in points, per cent or as it is."""
        def signed(x):
            return f"{100 * x:+.1f}" if self.relative or self.percent else f"{x:+.4f}"

        text = signed(mean) + (" %" if self.relative else "")
        return text if half is None else f"{text} ({signed(mean - half)} to {signed(mean + half)})"


MEASURES = {
    "all": Measure("captions right", 1, 0.03, False, percent=True),
    "shares.samples.all in front of": Measure("one in front of another", 1, 0.03, False, percent=True),
    "frechet": Measure("Fréchet distance", -1, 0.05, True),
    "velocity_error": Measure("velocity error", -1, 0.05, True),
    "black.mean": Measure("black", -1, 0.01, False),
    "white.mean": Measure("white", 1, 0.01, False),
    "absrel": Measure("AbsRel", -1, 0.05, True),
}


@dataclass
class Setting:
    """One line of the README's table: where the results are, what is measured, and who is compared with whom."""
    claim: int
    words: str
    folder: str
    where: dict
    measures: tuple = ("all", "frechet", "velocity_error")
    summary: bool = True                    # is it in the README?
    others: tuple = ("dm", "fm", "fm-flip")
    ours: str = "diff2flow"
    compare: str = "run.objective"
    trained: bool = True


def settings():
    """-> all Settings, in the order of the claims."""
    found = [Setting(1, f"a velocity field before any training, {p}-prior", "priors",
                     {"prediction": p, "t_shift": "0.0", "n": "512"}, ("all",), compare="objective", trained=False)
             for p in ("v", "eps")]

    def style(claim, words, prediction, lora):
        own = {"prediction": prediction, "run.lora": lora, "own_sampler": "True", "n": "512"}
        found.append(Setting(claim, words, "style", {**own, "steps": "25|None", "cfg": "1.0|None"}))
        samples = "all", "frechet"
        for steps in "10", "4":
            found.append(Setting(claim, f"{words}, {steps} steps", "style", {**own, "steps": steps, "cfg": "1.0"},
                                 samples, summary=False))
        found.append(Setting(claim, f"{words}, guidance 3", "style", {**own, "cfg": "3.0"}, samples, summary=False))

    style(2, "finetuning all weights, v-prior", "v", "none")
    style(3, "finetuning by LoRA, v-prior", "v", "base")
    for size in "96", "128":
        for lora, words in ("base", "LoRA"), ("none", "all weights"):
            found.append(Setting(4, f"{size}x{size} pixels, {words}, v-prior", "size",
                                 {"size.0": size, "run.lora": lora, "own_sampler": "True", "n": "128"},
                                 summary=lora == "base"))
    found += [Setting(5, f"timesteps between the trained ones, {p}-prior", "priors",
                      {"prediction": p, "objective": "dm", "n": "512"}, ("all",), others=("0.0",), ours="0.5",
                      compare="t_shift", trained=False, summary=p == "v") for p in ("v", "eps")]
    for prediction in "eps", "v":
        for lora, words in ("base", "LoRA"), ("none", "all weights"):
            found.append(Setting(6, f"true black and white, {words}, {prediction}-prior", "style",
                                 {"prediction": prediction, "run.lora": lora, "own_sampler": "True", "n": "64"},
                                 ("black.mean", "white.mean"), summary=lora == "base"))
    style(7, "an eps-network, all weights", "eps", "none")
    style(7, "an eps-network, LoRA", "eps", "base")
    for steps in "1", "2", "4", "25":
        found.append(Setting(8, f"Reflow, {steps} step{'s' * (steps != '1')}, v-prior", "reflow",
                             {"steps": steps, "n": "512"}, ("all", "frechet"), others=("prior",), ours="cfg4",
                             compare="file", summary=steps in ("2", "4")))
    for prediction in "eps", "v":
        for steps in "2", "1", "4", "10":
            found.append(Setting(9, f"depth, {steps} step{'s' * (steps != '1')}, {prediction}-prior", "depth",
                                 {"prediction": prediction, "steps": steps, "ensemble": "4"}, ("absrel",),
                                 summary=steps == "2"))
    return found


WEIGHTED = "diff2flow", "p1", "p2", "c5", "c20", "min-snr", "rf"
BASELINES = "dm", "fm-flip", "diff2flow"


def weights_settings():
    """-> Settings that compare each objective with dm, fm-flip and the paper's loss in the results of
    `run.sh weights`."""
    found = []

    def add(words, folder, files, where, measures, ours):
        if any(Path(RESULTS, folder).glob(files)):
            others = tuple(name for name in BASELINES if name != ours)
            found.append(Setting(0, f"{ours}, {words}", folder, where, measures, others=others, ours=ours))

    pictures = tuple(name for name in MEASURES if name != "absrel")
    for (lora, trained), prediction, ours in itertools.product(
            (("base", "LoRA"), ("none", "all weights")), ("eps", "v"), WEIGHTED):
        words, files = f"{trained}, {prediction}-prior", f"{prediction}-{lora}-{ours}-*.jsonl"
        where = {"prediction": prediction, "run.lora": lora}
        add(words, "weights", files, {**where, "steps": "10|None"}, pictures, ours)
        add(f"{words}, 4 steps", "weights", files, {**where, "steps": "4"}, ("all", "frechet"), ours)
    for prediction, ours, steps in itertools.product(("eps", "v"), WEIGHTED, ("2", "10")):
        add(f"depth, {prediction}-prior, {steps} steps", "weights-depth", f"{prediction}-{ours}-*.jsonl",
            {"prediction": prediction, "steps": steps}, ("absrel",), ours)
    return found


@dataclass
class Comparison:
    """Ours against another: the verdict, the difference in words, and the p-value, None where it cannot be had."""
    verdict: str
    difference: str
    p: float
    holds: bool = False                     # also after Holm's correction


def verdict(mean, half, measure):
    """The rule: a mean difference and half the width of its interval, None for none -> ahead, behind, level or not
    decided."""
    if half is None:
        return "not decided"
    if abs(mean) > half:
        return "ahead" if mean * measure.better > 0 else "behind"
    return "level" if abs(mean) + half <= measure.margin else "not decided"


def compare(ours, theirs, name, measure, trained):
    """{seed: row} twice -> Comparison, or None where no seed has both."""
    seeds, a, b = paired_values(ours, theirs, name)
    if not seeds:
        return None
    mean, half, p = estimate((a - b) / (b.mean() if measure.relative else 1), trained)
    return Comparison(verdict(mean, half, measure), measure.difference(mean, half), p)


def holm(comparisons, level=0.05):
    """Mark the comparisons that Holm's correction keeps: the k-th smallest of m p-values, from 0, is at most
    level / (m - k), and so are all smaller ones."""
    decided = sorted((one for one in comparisons if one.p is not None), key=lambda one: one.p)
    for k, one in enumerate(decided):
        if one.p > level / (len(decided) - k):
            break
        one.holds = one.verdict in ("ahead", "behind")


@dataclass
class Line:
    setting: Setting
    name: str                               # of the measure
    values: dict = field(default_factory=dict)          # {objective: mean, in words}
    comparisons: dict = field(default_factory=dict)     # {other objective: Comparison}


def lines(of_settings):
    """-> a Line for each measure of each Setting."""
    found = []
    folders = {name: read_all([f"{RESULTS}/{name}"]) for name in {setting.folder for setting in of_settings}}
    for setting in of_settings:
        rows = select(folders[setting.folder], setting.where.items(), [f"{RESULTS}/{setting.folder}"])
        for name in setting.measures:
            measure, line = MEASURES[name], Line(setting, name)
            members = [row for row in rows if look_up(row, name) is not None]
            runs = {str(key): by_seed(of_it, key) for (key,), of_it in group(members, [setting.compare])}
            for objective in (*setting.others, setting.ours):
                if objective in runs:
                    line.values[objective] = measure.show(fmean(look_up(row, name) for row in runs[objective].values()))
            for other in setting.others:
                found_one = other in runs and compare(runs[setting.ours], runs[other], name, measure, setting.trained)
                if found_one:
                    line.comparisons[other] = found_one
            found.append(line)
    for claim in {line.setting.claim for line in found}:
        holm([one for line in found if line.setting.claim == claim for one in line.comparisons.values()])
    return found


OBJECTIVES = "dm", "fm", "fm-flip", "diff2flow"


def in_words(comparison):
    """-> the verdict, bold if it holds after the correction."""
    return f"**{comparison.verdict}**" if comparison.holds else comparison.verdict


def all_comparisons(line):
    """-> each comparison of a Line in words."""
    return "; ".join(f"{display(other)}: {in_words(one)}, {one.difference}" for other, one in line.comparisons.items())


def print_all(found):
    """A line for each measure: the values, and the difference from each other objective."""
    print_line(["claim", "setting", "measure", *OBJECTIVES, "diff2flow is"])
    print("|" + "---|" * (4 + len(OBJECTIVES)))
    for line in found:
        print_line([str(line.setting.claim), line.setting.words, MEASURES[line.name].heading, *columns(line),
                    all_comparisons(line)])


def print_weights(found):
    """A line for each measure of each objective: its value, those of BASELINES, and what it is against them."""
    print_line(["objective", "measure", *BASELINES, "it", "it is"])
    print("|" + "---|" * (4 + len(BASELINES)))
    for line in found:
        print_line([line.setting.words, MEASURES[line.name].heading, *(line.values.get(name, "") for name in BASELINES),
                    line.values[line.setting.ours], all_comparisons(line)])


def display(other):
    return {"prior": "the prior", "0.0": "the trained ones"}.get(other, other)


def columns(line):
    """-> the values in the columns of OBJECTIVES. Claims that compare a model with itself have both in the last one."""
    if line.setting.ours == OBJECTIVES[-1]:
        return [line.values.get(name, "") for name in OBJECTIVES]
    (other,) = line.setting.others
    return ["", "", "", f"{line.values[other]} before, {line.values[line.setting.ours]} after"]


def listed(names):
    """["dm", "fm", "fm-flip"] -> "dm, fm and fm-flip"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def sentence(own):
    """The lines of a Setting -> what is ahead of what: "**ahead** of fm; level with dm in captions right". A measure
    that is not named is not decided."""
    grouped = {}                                        # others with the same verdicts
    for other in own[0].setting.others:
        found = {line.name: line.comparisons[other] for line in own if other in line.comparisons}
        if found:
            key = tuple((name, in_words(one)) for name, one in found.items())
            grouped.setdefault(key, []).append(display(other))
    parts = []
    for key, others in grouped.items():
        phrases = []
        for kind in "ahead", "behind", "level":
            which = [(name, words) for name, words in key if kind in words]
            if which:
                bold = all("**" in words for _, words in which)
                words = f"**{kind}**" if bold else kind
                if not phrases:
                    words += {"ahead": " of ", "behind": " ", "level": " with "}[kind] + listed(others)
                if len(which) < len(key):
                    words += " in " + listed([MEASURES[name].heading for name, _ in which])
                phrases.append(words)
        parts.append(", ".join(phrases) or f"{listed(others)}: not decided")
    return "; ".join(parts)


def print_summary(found):
    """A line for each Setting of the README: the values of its measures, and what is ahead of what."""
    print_line(["", "claim", "measured", *OBJECTIVES, "diff2flow is"])
    print("|" + "---|" * (4 + len(OBJECTIVES)))
    shown = [line for line in found if line.setting.summary]
    for setting, own in itertools.groupby(shown, lambda line: line.setting):
        own = list(own)
        values = zip(*map(columns, own))
        print_line([str(setting.claim), setting.words, ", ".join(MEASURES[line.name].heading for line in own),
                    *("; ".join(filter(None, of_column)) for of_column in values), sentence(own)])


def arguments():
    parser = argparse.ArgumentParser(prog="python -m claims.verdicts", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=list(TABLES), default="summary",
                        help="a line for each claim, for each measure, or for each other weight (default: summary)")
    return parse(parser)


TABLES = {"summary": (print_summary, settings), "all": (print_all, settings),
          "weights": (print_weights, weights_settings)}


def main():
    table, of_settings = TABLES[arguments().which]
    table(lines(of_settings()))


if __name__ == "__main__":
    cli(main)
