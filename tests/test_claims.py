"""claims/: tables, intervals and plots are computed rightly, the scripts accept the commands of run.sh, and
README.md and claims/tables.md show what their commands print."""
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from scipy import stats

import sample
import train
from claims import idea, levels, page, report, solvers, verdicts, weighted
from claims.page import COMMAND, PAGES, words_of
from diff2flow import OBJECTIVES, Diff2Flow, velocity_error
from schedule import sd_schedule
from toy import judge

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "claims/README.md").read_text()
COMMANDS = [(words_of(command), table) for path in PAGES
            for command, table in COMMAND.findall((ROOT / path).read_text())]


@pytest.fixture
def claims_report(monkeypatch, capsys):
    """claims_report(words) runs `python -m claims.report` -> stdout."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["claims/report.py", *map(str, words)])
        report.main()
        return capsys.readouterr().out
    return run


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def results(tmp_path):
    """Results of two objectives with the seeds 0, 1 and 2; only those of dm have plain.black."""
    return [write_lines(tmp_path / f"{seed}.jsonl", [
        {"run": {"objective": "fm", "seed": seed}, "frechet": 2 * frechet, "all": 0.5, "plain": {}},
        {"run": {"objective": "dm", "seed": seed}, "frechet": frechet, "all": share, "plain": {"black": 0.02 * share}}])
        for seed, frechet, share in ((0, 1.0, 0.1), (1, 2.0, 0.2), (2, 600.4, 0.9))]


# ------------------------------------------------------------------ tables

def test_rows_are_sorted_with_numbers_by_size_before_words():
    rows = [{"lora": lora, "steps": steps} for lora, steps in
            (("small", 4), ("2", None), ("base", 25), ("16", 0.5), ("base", 4), ("16", 0.0))]
    assert [values for values, _ in report.group(rows, ["lora", "steps"])] == [
        ("2", None), ("16", 0.0), ("16", 0.5), ("base", 4), ("base", 25), ("small", 4)]


def test_a_table_has_mean_and_span_over_the_seeds(results, claims_report):
    assert claims_report("table", *results, "--by", "run.objective", "--of", "frechet", "plain.black").splitlines() == [
        "| run.objective | results | frechet | plain.black |",
        "|---|---|---|---|",
        "| dm | 3 | 201 (1.00 to 600) | 0.00800 (0.00200 to 0.0180) |",
        "| fm | 3 | 402 (2.00 to 1201) |  |"]


def test_headings_and_values_can_be_replaced_and_shares_be_percentages(results, claims_report):
    printed = claims_report("table", *results, "--by", "run.objective=trained by", "--of", "all=captions right",
                            "--percent", "all", "--words", "fm=naive flow matching")
    assert printed.splitlines() == [
        "| trained by | results | captions right |",
        "|---|---|---|",
        "| dm | 3 | 40.0 % (10.0 to 90.0 %) |",
        "| naive flow matching | 3 | 50.0 % (50.0 to 50.0 %) |"]


def test_a_table_uses_the_results_that_meet_every_condition(results, claims_report):
    words = ["table", *results, "--by", "run.objective", "--of", "frechet", "--where", "run.objective=fm"]
    assert claims_report(*words, "run.seed=1").splitlines()[2:] == ["| fm | 1 | 4.00 |"]
    assert len(claims_report(*words[:-1], "run.objective=fm|dm", "run.seed=0|2").splitlines()) == 4
    with pytest.raises(ValueError, match="no row where run.objective=fm run.seed=7 in "):
        claims_report(*words, "run.seed=7")


def test_a_name_is_a_path_into_objects_and_lists_and_file_is_the_name_without_the_seed(tmp_path):
    file = write_lines(tmp_path / "cfg4-12.jsonl", [{"size": [96, 128], "black": {"mean": 0.5}}])
    row, = report.read_rows([file], [("size.1", "128")])
    names = "file", "size.0", "black.mean", "size.2", "file.0"
    assert [report.look_up(row, name) for name in names] == ["cfg4", 96, 0.5, None, None]


def test_a_name_that_no_result_has_is_refused(results, claims_report):
    with pytest.raises(ValueError, match="--of frechte: no row has it"):
        claims_report("table", *results, "--by", "run.objective", "--of", "frechte")
    with pytest.raises(ValueError, match="--percent al: it must be one of --of, which are all"):
        claims_report("table", *results, "--by", "run.objective", "--of", "all", "--percent", "al")
    with pytest.raises(ValueError, match="a row lacks step"):
        claims_report("plot", *results, "--y", "frechet")


# ------------------------------------------------------------------ pairs

def save_runs(folder, ours, theirs):
    """Write results of diff2flow and dm: errors (S, N) of S seeds on N scenes -> their folder."""
    rows = [{"run": {"objective": objective, "seed": seed}, "prediction": "v", "error": float(np.mean(errors)),
             "scenes": {"error": list(errors)}}
            for objective, runs in (("diff2flow", ours), ("dm", theirs)) for seed, errors in enumerate(runs)]
    return write_lines(folder / "runs/all.jsonl", rows).parent


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
def test_an_interval_contains_the_true_difference_in_about_95_of_100_experiments(seeds, spread):
    """Differences are 1 plus a random number per seed, per scene and per pair of both. The mean over scenes has a
    standard deviation of 0.1."""
    rng, contained = np.random.default_rng(0), 0
    for _ in range(1000):
        of_seeds, of_scenes, of_pairs = (rng.normal(size=shape) for shape in ((seeds, 1), (1, 100), (seeds, 100)))
        mean, half = report.interval(1 + spread * of_seeds + of_scenes + of_pairs)
        contained += abs(mean - 1) < half
    assert 0.94 < contained / 1000 < 0.985                  # standard deviation of the share: 0.007


def test_an_interval_over_seeds_alone_is_students_t_interval():
    from scipy.stats import ttest_1samp
    differences = np.array([0.3, 0.5, 0.1, 0.4])
    mean, half = report.interval(differences[:, None])
    expected = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx(tuple(expected))


def test_differences_are_paired_by_seed_and_scene(tmp_path, claims_report):
    """Large variation that both objectives share cancels: each difference is about -0.1."""
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(4, 1)) + 10 * rng.normal(size=(1, 50))
    ours = theirs - 0.1 + 0.001 * rng.normal(size=(4, 50))
    folder = save_runs(tmp_path, ours[::-1].tolist(), theirs[::-1].tolist())
    line = claims_report("paired", folder, "--by", "prediction=prior", "--of", "error=wrong", "--out",
                         tmp_path / "pairs.png").splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["v", "diff2flow", "4"] and cells[3].startswith("**-0.10** (-0.10 to -0.10")
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")
    unpaired = save_runs(tmp_path, rng.permutation(ours).tolist(), theirs.tolist())
    assert "**" not in claims_report("paired", unpaired, "--by", "prediction", "--of", "error").splitlines()[2]


def test_two_training_seeds_have_no_interval_and_differences_can_be_relative(tmp_path, claims_report):
    folder = save_runs(tmp_path, [[3.0, 4.0], [3.0, 4.0]], [[4.0, 6.0], [4.0, 6.0]])
    words = ["paired", folder, "--by", "prediction", "--of", "error", "--out", tmp_path / "pairs.png"]
    assert claims_report(*words).splitlines()[2] == "| v | diff2flow | 2 | -1.5 |"
    assert claims_report(*words, "--relative", "error").splitlines()[:3:2] == [
        "| prediction | objective | pairs | error, difference from dm (%) |", "| v | diff2flow | 2 | -30.0 |"]
    with pytest.raises(ValueError, match="--relative eror: it must be one of --of, which are error"):
        claims_report(*words, "--relative", "eror")


def test_without_training_the_interval_covers_scenes_alone(tmp_path, claims_report):
    rows = [{"prediction": "v", "t_shift": shift, "all": sum(right) / 4, "scenes": {"all": right}}
            for shift, right in ((0.0, [1, 1, 0, 1]), (0.5, [1, 0, 0, 1]))]
    printed = claims_report("paired", write_lines(tmp_path / "rows.jsonl", rows), "--compare", "t_shift=lowered by",
                            "--against", "0.0", "--by", "prediction", "--of", "all=right", "--percent", "all")
    half = 3.18245 * 0.5 / 2                                # Student's t for 3, times the standard error of -1, 0, 0, 0
    assert printed.splitlines()[2] == f"| v | 0.5 | 1 | -25.0 ({-25 - 100 * half:+.1f} to {-25 + 100 * half:+.1f}) |"


def test_a_model_before_training_is_compared_with_every_seed_of_the_trained_ones(tmp_path, claims_report):
    before = {"run": {}, "model": "prior", "right": 0.5, "scenes": {"right": [0.0, 1.0]}}
    after = [{"run": {"seed": seed}, "model": "after", "right": fmean(right), "scenes": {"right": right}}
             for seed, right in enumerate([[0.7, 1.6], [0.9, 1.8], [0.8, 1.7]])]
    printed = claims_report("paired", write_lines(tmp_path / "rows.jsonl", [before, *after]), "--compare", "model",
                            "--against", "prior", "--by", "run.lora=LoRA", "--of", "right")
    seeds, scenes = 0.1**2 / 3, 0.1**2 / 2 / 2              # A from the means 0.65, 0.85, 0.75; B from 0.8, 0.7
    half = stats.t.ppf(0.975, (seeds + scenes)**2 / (seeds**2 / 2 + scenes**2)) * math.sqrt(seeds + scenes)
    assert printed.splitlines()[2] == f"| None | after | 3 | **+0.75** ({0.75 - half:+#.2g} to {0.75 + half:+#.2g}) |"


def test_a_difference_is_bold_if_its_interval_excludes_0():
    shown = {(mean, half): report.format_difference(mean, half, False)[:2] == "**"
             for mean, half in ((0.1, 0.09), (-0.1, 0.09), (0.1, 0.11), (-0.1, 0.11), (0.0, 0.0))}
    assert list(shown.values()) == [True, True, False, False, False]


def test_ambiguous_or_missing_pairs_are_refused(tmp_path, claims_report):
    folder = save_runs(tmp_path, [[1.0]], [])
    with pytest.raises(ValueError, match="no two results of another run.objective and of dm"):
        claims_report("paired", folder, "--by", "prediction", "--of", "error")
    save_runs(tmp_path, [[1.0]], [[1.0]])
    write_lines(tmp_path / "runs/more.jsonl", [{"run": {"objective": "dm", "seed": 0}, "prediction": "v", "error": 1}])
    with pytest.raises(ValueError, match="more than one row"):
        claims_report("paired", folder, "--by", "prediction", "--of", "error")


def test_the_best_value_is_the_one_with_the_lowest_mean(tmp_path, claims_report):
    rows = [{"lr": lr, "error": error} for lr, error in ((1e-3, 2.0), (1e-3, 0.1), (2e-3, 1.0), (5e-4, 1.5))]
    path = write_lines(tmp_path / "rates.jsonl", rows)
    assert claims_report("best", path, "--by", "lr", "--of", "error") == "0.002\n"
    with pytest.raises(ValueError, match="no row has it"):
        claims_report("best", path, "--by", "lr", "--of", "eror")


@pytest.mark.parametrize("line, message", [
    ("[]", "x.jsonl, line 2: not a JSON object"), ("[" * 90_000, "x.jsonl, line 2: not a JSON object"),
    ("{", "x.jsonl, line 2: not a JSON object"), ('{"lr": 1, "error": "x"}', "a value of another kind"),
    ('{"lr": 1, "error": [1]}', "a value of another kind"), ('{"lr": {}, "error": null}', None)])
def test_a_line_that_is_no_result_is_an_error_that_names_it(line, message, tmp_path, claims_report):
    path = write_lines(tmp_path / "x.jsonl", [{"lr": 1, "error": 0.5}])
    path.write_text(path.read_text() + line + "\n")
    if message is None:
        assert claims_report("best", path, "--by", "lr", "--of", "error") == "1\n"
        return
    for words in (["best", path, "--by", "lr", "--of", "error"], ["table", path, "--by", "lr", "--of", "error"]):
        with pytest.raises(ValueError, match="x.jsonl") as raised:
            claims_report(*words)
        assert message in str(raised.value)


def test_levels_names_the_file_of_a_line_that_is_no_result(tmp_path, monkeypatch):
    rows = [{"run": {"objective": name, "seed": seed, "lora": "none"}, "prediction": "eps",
             "scenes": {"velocity_error": ["x", 1.0]}} for name in ("dm", "diff2flow") for seed in (0, {})]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    for text, message in (path.read_text(), "a value of another kind"), ("[]\n", "rows.jsonl, line 1: not a JSON"):
        path.write_text(text)
        monkeypatch.setattr(sys, "argv", ["claims/levels.py", str(path)])
        with pytest.raises(ValueError, match=message):
            levels.main()


# ------------------------------------------------------------------ plots

@pytest.fixture
def validation(tmp_path):
    """validation.jsonl of runs with two presets of LoRA, two objectives and two seeds, each with its result.json."""
    files = []
    for lora, factor in (("base", 1), ("8", 10)):
        for objective in ("dm", "diff2flow"):
            for seed in (0, 1):
                run = tmp_path / f"{lora}-{objective}-{seed}"
                rows = [{"step": step, "velocity_error": factor * (1 + seed) / (1 + step)} for step in (10, 0)]
                files.append(write_lines(run / "validation.jsonl", rows))
                result = {"task": "text-to-image", "lora": lora, "objective": objective}
                (run / "result.json").write_text(json.dumps(result))
    return files


def test_a_plot_has_a_panel_per_lora_and_a_line_of_means_per_objective(validation, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["claims/report.py", "plot", *map(str, validation)])
    args = report.arguments()
    panels = report.draw(report.read_rows(args.files, args.where), args).axes
    assert [panel.get_title() for panel in panels] == ["LoRA: 8", "LoRA: base"]
    assert (panels[0].get_xlabel(), panels[0].get_ylabel()) == ("training step", "velocity error")
    for panel, factor in zip(panels, (10, 1)):
        assert [line.get_label() for line in panel.lines] == ["diff2flow", "dm"]
        for line, shade in zip(panel.lines, panel.collections):
            assert list(line.get_xdata()) == [0, 10]
            assert list(line.get_ydata()) == pytest.approx([1.5 * factor, 1.5 * factor / 11])
            heights = shade.get_paths()[0].vertices[:, 1]
            assert (heights.min(), heights.max()) == pytest.approx((factor / 11, 2 * factor))


def test_a_plot_without_panel_names_has_one_panel_and_few_values_of_x_are_each_labelled(tmp_path, monkeypatch):
    rows = [{"steps": steps, "model": "prior", "all": steps / 25} for steps in (25, 4, 1, 2)]
    monkeypatch.setattr(sys, "argv", ["claims/report.py", "plot", str(write_lines(tmp_path / "rows.jsonl", rows)),
                                      "--x", "steps", "--y", "all", "--by", "model", "--panel", "--linear"])
    args = report.arguments()
    axis, = report.draw(report.read_rows(args.files, args.where), args).axes
    assert axis.get_title() == "" and axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "4", "25"]


def test_a_plot_is_written(validation, claims_report, tmp_path):
    claims_report("plot", *validation, "--out", tmp_path / "plots/plot.png")
    assert (tmp_path / "plots/plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_linear_axis_starts_at_0(validation, monkeypatch):
    for words, scale, from_0 in ((["--linear"], "linear", True), ([], "log", False)):
        monkeypatch.setattr(sys, "argv", ["claims/report.py", "plot", *map(str, validation), *words])
        args = report.arguments()
        axis = report.draw(report.read_rows(args.files, args.where), args).axes[0]
        assert axis.get_yscale() == scale and (axis.get_ylim()[0] == 0) == from_0


def test_a_plot_against_an_objective_is_in_units_of_its_mean(validation, monkeypatch):
    """At every step the values of both seeds are 1 and 2 times a number, whose mean is 1.5 times it."""
    monkeypatch.setattr(sys, "argv", ["claims/report.py", "plot", *map(str, validation), "--against", "dm"])
    args = report.arguments()
    for panel in report.draw(report.read_rows(args.files, args.where), args).axes:
        assert panel.get_yscale() == "linear"
        for line, shade in zip(panel.lines, panel.collections):
            assert list(line.get_ydata()) == pytest.approx([1, 1])
            heights = shade.get_paths()[0].vertices[:, 1]
            assert (heights.min(), heights.max()) == pytest.approx((2 / 3, 4 / 3))
    monkeypatch.setattr(sys, "argv", ["claims/report.py", "plot", *map(str, validation), "--against", "fm"])
    with pytest.raises(ValueError, match="--against fm: no row with step 0"):
        report.main()


def test_fm_has_axes_of_its_own_in_a_figure_of_differences(tmp_path, monkeypatch):
    rows = [{"run": {"objective": name, "seed": seed}, "prediction": "v", "error": error * seed}
            for name, error in (("dm", 1.0), ("diff2flow", 0.9), ("fm", 4.0)) for seed in (1, 2, 3)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["claims/report.py", "paired", str(path), "--by", "prediction", "--of", "error"])
    args = report.arguments()
    axes = report.draw_differences(report.differences(args), args).axes
    assert [[label.get_text() for label in axis.get_yticklabels()] for axis in axes] == [["v, diff2flow"], ["v, fm"]]
    assert axes[0].get_xlim()[1] < 1 < axes[1].get_xlim()[1]


# ------------------------------------------------------------------ verdicts

@pytest.mark.parametrize("mean, half, name, expected", [
    (0.05, 0.04, "all", "ahead"), (-0.05, 0.04, "all", "behind"), (0.01, 0.005, "all", "ahead"),
    (0.01, 0.019, "all", "level"), (-0.01, 0.021, "all", "not decided"), (0.05, None, "all", "not decided"),
    (0.0, 0.0, "all", "level"), (-0.05, 0.04, "frechet", "ahead"), (0.05, 0.04, "velocity_error", "behind"),
    (0.0, 0.049, "absrel", "level"), (0.0, 0.051, "absrel", "not decided"), (0.0, 0.009, "white.mean", "level"),
    (0.0, 0.011, "black.mean", "not decided"), (-0.02, 0.01, "black.mean", "ahead")])
def test_a_verdict_follows_by_the_rule(mean, half, name, expected):
    assert verdicts.verdict(mean, half, verdicts.MEASURES[name]) == expected


def test_a_p_value_is_students_and_that_of_the_interval():
    from scipy.stats import ttest_1samp
    theirs = {seed: {"file": "x", "all": 0.5} for seed in range(4)}
    ours = {seed: {"file": "x", "all": 0.5 + d} for seed, d in enumerate([0.3, 0.5, 0.1, 0.4])}
    one = verdicts.compare(ours, theirs, "all", verdicts.MEASURES["all"], True)
    assert one.p == pytest.approx(ttest_1samp([0.3, 0.5, 0.1, 0.4], 0).pvalue) and one.verdict == "ahead"
    assert one.difference == "+32.5 (+5.3 to +59.7)"
    two = {seed: ours[seed] for seed in (0, 1)}
    assert verdicts.compare(two, theirs, "all", verdicts.MEASURES["all"], True).verdict == "not decided"
    assert verdicts.compare(ours, {7: theirs[0]}, "all", verdicts.MEASURES["all"], True) is None


def test_holms_correction_stops_at_the_first_p_value_that_is_too_large():
    """0.005 <= 0.05 / 4 and 0.015 <= 0.05 / 3, but 0.03 > 0.05 / 2; 0.04 would pass alone."""
    found = [verdicts.Comparison("ahead", "", p) for p in (0.015, 0.04, 0.03, 0.005)]
    undecided = verdicts.Comparison("not decided", "", None)
    verdicts.holm([*found, undecided])
    assert [one.holds for one in (*found, undecided)] == [True, False, False, True, False]


def test_the_summary_names_each_verdict_once():
    setting = verdicts.Setting(1, "", "", {}, ("all", "frechet"))

    def said(dm, fm, flip):
        lines = [verdicts.Line(setting, name, {}, {other: verdicts.Comparison(kind, "", 0.01, holds)
                                                   for other, (kind, holds) in zip(setting.others, ones)})
                 for name, *ones in zip(setting.measures, dm, fm, flip)]
        return verdicts.sentence(lines)

    ahead, behind, level, undecided = ("ahead", True), ("behind", False), ("level", False), ("not decided", False)
    assert said([ahead, behind], [ahead, ahead], [ahead, ahead]) == (
        "**ahead** of dm in captions right, behind in Fréchet distance; **ahead** of fm and fm-flip")
    assert said([undecided] * 2, [level, undecided], [("ahead", False), ahead]) == (
        "dm: not decided; level with fm in captions right; ahead of fm-flip")


def test_the_page_counts_the_comparisons(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [one for line in verdicts.lines(verdicts.settings()) for one in line.comparisons.values()]
    found = [one for one in found if one.p is not None]
    excluding = [one for one in found if one.verdict in ("ahead", "behind")]
    text = " ".join(PAGE.split())
    assert f"{len(found)} comparisons have an interval. If nothing differed, about {len(found) / 20:.0f} of" in text
    assert f"by chance; {len(excluding)} do. **Bold** are the {sum(one.holds for one in found)} that" in text


def test_the_readme_says_where_else_diff2flow_is_behind_dm_or_further_ahead(monkeypatch):
    """The table has 25 steps without guidance; the text below it, all other settings with such a verdict."""
    monkeypatch.chdir(ROOT)
    text = " ".join((ROOT / "README.md").read_text().split())
    text = text[text.index("diff2flow is behind dm in Fréchet distance in more cases"):]
    phrases = {("finetuning by LoRA, v-prior, 10 steps", "frechet"): "from v by LoRA with 10 and 4 steps by {:.0f} and",
               ("finetuning by LoRA, v-prior, 4 steps", "frechet"): "steps by 11 and {:.0f} %",
               ("finetuning all weights, v-prior, 4 steps", "frechet"): "with all weights and 4 steps by {:.0f} %;",
               ("an eps-network, LoRA, guidance 3", "frechet"): "from eps by LoRA with guidance 3 by {:.0f} %.",
               ("an eps-network, all weights, 4 steps", "all"): "all weights and 4 steps: by {:.0f} points",
               ("an eps-network, all weights, 4 steps", "frechet"): "and {:.0f} % of the distance."}
    found = {(line.setting.words, line.name): line.comparisons["dm"] for line in verdicts.lines(verdicts.settings())
             if line.setting.claim in (2, 3, 7) and not line.setting.summary}
    behind = {key for key, one in found.items() if one.verdict == "behind"}
    assert behind == set(list(phrases)[:4])
    for key, phrase in phrases.items():
        assert phrase.format(abs(float(found[key].difference.split()[0]))) in text, key


def test_what_the_pages_say_of_rf_and_c20_follows_by_the_rule(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = {(line.setting.words, line.name): line for line in verdicts.lines(verdicts.weights_settings())}

    def against_diff2flow(words, *names):
        return [found[words, name].comparisons["diff2flow"].verdict for name in names]
    drawn = []
    for trained in "LoRA", "all weights":
        rf = f"rf, {trained}, eps-prior"
        assert set(against_diff2flow(rf, *(name for words, name in found if words == rf))) == {"ahead"}
        assert against_diff2flow(f"{rf}, 4 steps", "all", "frechet") == ["ahead"] * 2
        c20 = f"c20, {trained}, eps-prior"
        assert against_diff2flow(c20, "all", "frechet", "velocity_error", "white.mean") == ["ahead"] * 3 + ["behind"]
        drawn += [found[rf, "all"].values[name].split()[0] for name in ("rf", "diff2flow")]
    assert against_diff2flow("c20, LoRA, eps-prior", "black.mean") == ["behind"]
    assert against_diff2flow("rf, depth, eps-prior, 2 steps", "absrel") == ["ahead"]
    assert against_diff2flow("c20, depth, eps-prior, 2 steps", "absrel") == ["level"]
    drawn += [found["rf, LoRA, v-prior", "all"].values[name].split()[0] for name in ("rf", "diff2flow", "fm-flip")]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert ("in everything ({} and {} % of captions right by LoRA, {} and {} % with all weights); from v it draws {} % "
            "right, diff2flow {} %, and fm-flip {} %.").format(*drawn) in readme


# ------------------------------------------------------------------ other weights

LEVELS = sd_schedule()


def test_a_weighted_loss_is_the_velocity_error_times_its_weight():
    def net(x_dm, t_dm, context):
        return 0.3 * x_dm
    x1, x0 = torch.randn(2, 1, 4, 6, 6)
    for name, at in ("p1", {0.1: 0.1, 0.8: 0.8}), ("p2", {0.1: 0.01, 0.8: 0.64}), ("c5", {0.1: 0.05, 0.8: 1}), (
            "c20", {0.1: 0.2, 0.3: 1}):
        for t, weight in at.items():
            t_fm = torch.tensor([t])
            flow = weighted.MORE[name](net, *LEVELS, "eps")
            expected = weight * velocity_error(Diff2Flow(net, *LEVELS, "eps"), x1, x0, t_fm, None)
            assert flow.loss(x1, None, x0, t_fm).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_weighted_loss_draws_the_noise_and_times_of_diff2flow(monkeypatch):
    monkeypatch.setattr(weighted.Weighted, "weight", staticmethod(torch.ones_like), raising=False)
    losses = []
    for kind in Diff2Flow, weighted.Weighted:
        torch.manual_seed(0)
        losses.append(kind(lambda x_dm, t_dm, context: x_dm, *LEVELS, "eps").loss(torch.ones(4, 4, 6, 6), None).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_min_snr_has_the_weights_of_its_paper():
    """Diffusers computes the SNR; min(SNR, 5) / SNR is the weight of an error of eps (arXiv 2303.09556, Sec. 3.4)."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    flow = weighted.MinSNR(lambda x_dm, t_dm, context: torch.zeros_like(x_dm), *LEVELS, "eps")
    x1, x0 = torch.randn(2, 1, 4, 6, 6)
    for t_dm in (0, 150, 300, 999):
        snr = compute_snr(scheduler, torch.tensor([t_dm])).double()
        expected = (snr.clamp(max=5) / snr * x0.square().mean()).item()
        t_fm = flow.f_t(torch.tensor([t_dm]))
        assert flow.loss(x1, None, x0, t_fm).item() == pytest.approx(expected, rel=1e-3)    # float32 times


# ------------------------------------------------------------------ solvers

@pytest.mark.parametrize("solver, order", [(solvers.euler, 1), (solvers.midpoint, 2), (solvers.heun, 2)])
def test_a_solver_has_its_order_and_its_number_of_calls(solver, order):
    """dx/dt = t x from 0 to 1 has the solution x(0) exp(1/2)."""
    calls = []

    def u(x, t):
        calls.append(t)
        return t * x
    errors = []
    for n in 32, 64:
        calls.clear()
        x = solvers.integrate(solver, u, torch.ones(1, dtype=torch.float64), n)
        assert len(calls) == n and 0 <= min(calls) and max(calls) <= 1
        errors.append(abs(x.item() - math.exp(0.5)))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_euler_steps_with_guidance_are_those_of_algorithm_2():
    def net(x_dm, t_dm, context):
        return 0.3 * x_dm + context.mean((1, 2)).view(-1, 1, 1, 1)
    flow, x0 = Diff2Flow(net, *LEVELS), torch.randn(2, 4, 6, 6)
    context, uncond = torch.randn(2, 3, 5), torch.randn(1, 3, 5)
    for cfg in 1, 4:
        ours = solvers.integrate(solvers.euler, solvers.guided(flow, context, uncond, cfg), x0, 5)
        torch.testing.assert_close(ours, flow.sample(x0, context, 5, uncond, cfg))


# ------------------------------------------------------------------ the levels

def test_a_scene_belongs_to_the_level_of_its_own_time(tmp_path, monkeypatch, capsys):
    """diff2flow is worse by 1 % in the first eighth of the times, by 2 % in the second, and so on; fm-flip better."""
    eighth = np.array([int(8 * ((i * 0.618034 + 0.5) % 1)) for i in range(512)])
    rng = np.random.default_rng(0)
    rows = []
    for seed in 0, 1, 2:
        theirs = 10.0**-eighth * rng.uniform(0.9, 1.1)
        for objective, sign in ("dm", 0), ("diff2flow", 1), ("fm-flip", -1):
            errors = theirs * (1 + sign * 0.01 * (1 + eighth))
            rows.append({"run": {"objective": objective, "seed": seed, "lora": "none"}, "prediction": "eps",
                         "velocity_error": errors.mean(), "scenes": {"velocity_error": errors.tolist()}})
    path = write_lines(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["claims/levels.py", str(path), "--out", str(tmp_path / "levels.png")])
    levels.main()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    for cells, objective, sign in (lines[2], "diff2flow", 1), (lines[3], "fm-flip", -1):
        assert cells[:3] == ["eps", "all weights", objective]
        assert cells[4:] == [f"**{sign * n:+.1f}**" for n in range(1, 9)]
    weight = levels.predicted_weights("eps")
    assert float(lines[2][3]) < -0.5, "the weight is highest near noise, where the difference is lowest"
    assert 23 < weight[0] == weight.max() < 89 and 2.38 < weight[4] < 3.82  # METHOD.md: t_fm 0.16, 0.06; 0.64, 0.46


def test_the_weights_of_other_losses_are_the_papers_times_theirs():
    """From weights.png: 55 near noise, 6.6 near data; t_fm there is 0.06 to 0.125, and 0.875 to 0.97."""
    papers = levels.predicted_weights("eps")
    ratios = {name: levels.predicted_weights("eps", name) / papers for name in ("p1", "p2", "c5", "c20")}
    assert 0.06 < ratios["p1"][0] < 0.125 and 0.875 < ratios["p1"][-1] < 0.97
    assert 0.06**2 < ratios["p2"][0] < 0.125**2 and 5 * 0.06**2 < ratios["c5"][0] < 5 * 0.125**2
    assert 20 * 0.06**2 < ratios["c20"][0] < 20 * 0.125**2 and ratios["c20"][-1] == ratios["c5"][-1] == 1
    min_snr = levels.predicted_weights("eps", "min-snr")                # SNR 5 is at t_fm = 0.69
    assert (min_snr[:5] == 1).all() and 5 * (0.03 / 0.97)**2 < min_snr[-1] < 5 * (0.125 / 0.875)**2


def test_more_than_two_objectives_have_a_panel_each(tmp_path, monkeypatch, capsys):
    rows = [{"run": {"objective": name, "seed": 1, "lora": "base"}, "prediction": "eps", "velocity_error": 1.0,
             "scenes": {"velocity_error": [1.0 + (name != "dm") * (i / 512 * 0.618 % 1) for i in range(512)]}}
            for name in ("dm", "p1", "c5", "rf")]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    words = f"{path} --prior eps --objectives rf c5 p1 --out {tmp_path / 'levels.png'}".split()
    monkeypatch.setattr(sys, "argv", ["claims/levels.py", *words])
    shown = []
    monkeypatch.setattr(levels, "draw", lambda panels: shown.append(panels))
    monkeypatch.setattr(levels, "save_figure", lambda figure, out: None)
    levels.main()
    assert list(shown[0]) == ["eps-prior, rf", "eps-prior, c5", "eps-prior, p1"]
    weight, series = shown[0]["eps-prior, c5"]
    assert (weight == levels.predicted_weights("eps", "c5")).all() and list(series) == ["LoRA base"]


# ------------------------------------------------------------------ run.sh

STAND_IN = r"""#!/usr/bin/env bash
# Replaces python: writes down the command, and creates the files that run.sh expects from it.
script=$1 module=$2 command=$3 style=solid weights=lora out= names=
(IFS=$'\t'; echo "$*" >> commands)
if [ "$module $command" = "claims.report best" ]; then echo 0.001; fi
while [ $# -gt 0 ]; do
    case $1 in --out) out=$2 ;; --style) style=$2 ;; none) weights=model ;; esac
    shift
done
if [ $script = train.py ] || [ $module = claims.weighted ]; then
    names="$weights.safetensors result.json validation.jsonl before_after.png"
elif [ $module = toy.judge ]; then
    names="$command.jsonl samples.png"
    if [ $command = captions ]; then touch runs/classifier-$style.safetensors; fi
elif [ $module = claims.solvers ]; then
    names=captions.jsonl
fi
if [ -n "$names" ]; then mkdir -p "$out" && cd "$out" && touch $names; fi
"""


@pytest.fixture(scope="module")
def run_loop(tmp_path_factory):
    """run_loop(words) -> the python commands of `bash claims/run.sh` with the seeds 1 and 3."""
    folder = tmp_path_factory.mktemp("loop")
    (folder / "claims").mkdir()
    shutil.copy(ROOT / "claims/run.sh", folder / "claims")
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    shell = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SEEDS": "1 3"}

    def run(*words):
        (folder / "commands").write_text("")
        subprocess.run(["bash", "claims/run.sh", *words], cwd=folder, env=shell, check=True)
        return [line.split("\t") for line in (folder / "commands").read_text().splitlines()]
    return run


@pytest.fixture(scope="module")
def whole_loop(run_loop):
    """-> the commands for the rates, then for the styles, then for everything that is left."""
    return run_loop("rates"), run_loop("style"), run_loop()


def test_the_scripts_accept_every_command_of_run_sh(whole_loop, monkeypatch):
    scripts = {"sample.py": sample, "train.py": train, "toy.judge": judge, "claims.report": report,
               "claims.weighted": train, "claims.solvers": solvers}
    seeds = set()
    monkeypatch.chdir(ROOT)                         # where toy/tiny-eps.safetensors is a bundled prior
    for name, kind in weighted.MORE.items():
        monkeypatch.setitem(OBJECTIVES, name, kind)
    seen = set()
    for words in itertools.chain(*whole_loop):
        script, *options = words[1:] if words[0] == "-m" else words
        if script in ("claims.weights", "claims.page"):
            continue
        monkeypatch.setattr(sys, "argv", [script, *options])
        args = scripts[script].arguments()
        seen.add(script)
        if script in ("sample.py", "train.py"):
            seeds.add(args.seed)
        if scripts[script] == train:
            assert args.batch in (16, 32) and args.decay == "cosine", "not the defaults for bundled priors"
    assert seen == set(scripts) and seeds == {0, 1, 2, 3}                                   # 0: the rates


def test_run_sh_measures_every_model_that_it_trains(whole_loop):
    commands = list(itertools.chain(*whole_loop))
    trained = {words[words.index("--out") + 1] for words in commands
               if words[0] == "train.py" or words[1] == "claims.weighted"}
    trained = {run for run in trained if "/rates/" not in run}
    judged = {str(Path(word).parent) for words in commands if words[1] in ("toy.judge", "claims.solvers")
              for word in words if word.startswith("runs/") and word.endswith(".safetensors")}
    assert judged == trained


def test_run_sh_resumes_and_repeats_nothing(whole_loop, run_loop):
    rates, styles, rest = whole_loop
    assert {words[0] for words in rates} == {"train.py"}
    assert not any("/rates/" in word for words in styles + rest for word in words)      # these exist already
    assert {words[1] for words in run_loop()} == {"claims.weights", "claims.page"}      # all results exist


# ------------------------------------------------------------------ the page and the figure

@pytest.mark.parametrize("words, table", COMMANDS)
def test_each_table_of_the_page_is_what_its_command_prints(words, table, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [])            # restores what page.run sets
    if "--out" in words:                            # the figure is drawn elsewhere
        words = [*words[:words.index("--out")], "--out", str(tmp_path / "figure.png")]
    assert table in ("", page.run(words))


def test_the_page_shows_every_figure_and_the_tables_use_every_result():
    used = {word for words, _ in COMMANDS for word in words if word.startswith("claims/results/")}
    used |= {f"{verdicts.RESULTS}/{setting.folder}" for setting in verdicts.settings()}
    pictures = {f"claims/{path}" for path in re.findall(r"^!\[.+\]\((results/.+)\)$", PAGE, re.MULTILINE)}
    files = {f"claims/results/{path.name}" for path in (ROOT / "claims/results").iterdir()}
    assert pictures == {file for file in files if file.endswith(".png")} and files - pictures <= used


def test_page_py_updates_the_tables_by_their_commands(tmp_path, results, monkeypatch):
    command = f"    python -m claims.report table {tmp_path} \\\n        --by run.objective=by --of all=right"
    table = ("| by | results | right |\n|---|---|---|\n| dm | 3 | {} (0.100 to 0.900) |\n"
             "| fm | 3 | 0.500 (0.500 to 0.500) |")
    text = f"# Claims\n\nBefore:\n\n{command}\n\n{{}}\n\nafter.\n"
    path = tmp_path / "README.md"
    monkeypatch.setattr(page, "PAGES", [path])
    path.write_text(text.format(table.format("0.399")))
    monkeypatch.setattr(sys, "argv", ["claims/page.py"])
    page.main()
    assert path.read_text() == text.format(table.format("0.400"))
    path.write_text(text.format(table).replace("all=right", "al=right"))
    with pytest.raises(ValueError, match="--of al: no row has it"):
        page.main()


def test_the_network_of_the_figure_is_exact():
    """Its v is the mean of alpha x0 - sigma x1 over all pairs that mix to x_dm, here a sum over a grid of x1."""
    levels = sd_schedule()
    network, (alpha, sigma) = idea.ExactNetwork(Diff2Flow(None, *levels).f_t), levels
    x1 = torch.linspace(-3, 3, 100_001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((x1[:, None] - idea.MODES) / idea.WIDTH) ** 2).sum(1)
    for t_dm in (100, 500, 900):
        for x_dm in (-1.2, 0.3, 2.0):
            x0 = (x_dm - alpha[t_dm] * x1) / sigma[t_dm]
            weights = density * torch.exp(-0.5 * x0**2)
            expected = (weights * (alpha[t_dm] * x0 - sigma[t_dm] * x1)).sum() / weights.sum()
            v = network(torch.full((1, 1, 1, 1), x_dm), torch.tensor([float(t_dm)]), None)
            assert v.item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_paths_of_the_figure_end_in_the_data():
    levels = sd_schedule()
    _, x_fm = idea.sample_paths(Diff2Flow(idea.ExactNetwork(Diff2Flow(None, *levels).f_t), *levels))
    nearest = (x_fm[-1, :, None] - idea.MODES).abs()
    assert nearest.amin(1).max() < 3 * idea.WIDTH
    assert set(nearest.argmin(1).tolist()) == {0, 1, 2}
