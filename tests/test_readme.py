"""What README.md and docs/ print is true: lines of equations, code, commands and their flags, links."""
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sample
import train
from diff2flow import Diff2Flow
from schedule import sd_schedule
from tests import runs
from tests.checkpoints import random_checkpoint
from tests.mutations import MUTATIONS
from tests.runs import call, python_blocks, save_photo, save_shards, working_in

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *(ROOT / folder / "README.md" for folder in ("toy", "claims", "tests")),
         ROOT / "claims/tables.md"]
tiny = runs.tiny


def text_of(name):
    return (ROOT / name).read_text()


def commands(page):
    """-> the commands that a page shows, each as the words after "python"; comments and continued lines are joined."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (?:.*&& )?python ((?:-m )?[\w./]+(?: .*)?)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def module_of(words):
    return words[1] if words[0] == "-m" else words[0].removesuffix(".py")


def test_each_equation_stands_on_the_line_that_the_readme_names():
    code = text_of("diff2flow.py").splitlines()
    rows = re.findall(r"^\| (Eqs?\. .+?): .*\(diff2flow\.py#L(\d+)\)", text_of("README.md"), re.MULTILINE)
    assert len(rows) == 10
    for equations, line in rows:
        where = code[int(line) - 1]
        numbers = re.findall(r"\d+", equations.split(" and ")[-1])
        assert "Eq" in where or "Algorithm" in where, (equations, where)
        assert all(number in where for number in numbers), (equations, where)


def test_the_dozen_lines_run_as_printed_and_diffusers_unet_gives_the_velocity_that_its_own_output_means(tmp_path):
    from diffusers import UNet2DConditionModel
    ours, theirs = python_blocks("README.md")[0], python_blocks("docs/method.md")[1]
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    names = {"images": images, "captions": ["a red image", "a blue image"], "folder": tmp_path}
    exec(ours, names)
    assert 0 < names["loss"].item() < 10 and names["pictures"].shape == (2, 3, 64, 64)

    UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(tmp_path)
    exec(theirs, names)
    x_fm, t_fm, context = torch.randn(2, 4, 16, 16), torch.tensor([0.2, 0.7]), torch.randn(2, 77, 32)
    alpha, sigma = sd_schedule()
    t_dm = torch.from_numpy(np.interp(-t_fm.double(), -alpha / (alpha + sigma), torch.arange(1000)))
    r = (t_fm**2 + (1 - t_fm) ** 2).rsqrt().view(-1, 1, 1, 1)
    alpha, sigma = r * t_fm.view(-1, 1, 1, 1), r * (1 - t_fm).view(-1, 1, 1, 1)
    x_dm = (alpha + sigma) * x_fm
    with torch.no_grad():
        eps = names["unet"](x_dm, t_dm.float(), context).sample
        u = names["flow"](x_fm, t_fm, context)
    x1 = (x_dm - sigma * eps) / alpha
    assert torch.allclose(u, x1 - eps, atol=1e-3)               # the table is linear between timesteps: 3e-5 of alpha


@pytest.mark.parametrize("prediction, factor", [("v", "(alpha + sigma)"), ("eps", "((alpha + sigma) / alpha)")])
def test_the_two_lines_for_another_trainer_give_the_gradients_of_our_loss(prediction, factor):
    draw, weigh = python_blocks("docs/method.md")[0].splitlines()
    assert "`(alpha + sigma) / alpha`" in text_of("docs/method.md") and weigh.count("(alpha + sigma)") == 1
    torch.manual_seed(0)
    alpha, sigma = sd_schedule()
    f_t = alpha / (alpha + sigma)
    names = {"torch": torch, "alpha": alpha, "sigma": sigma, "x1": torch.randn(64, 1, 4, 4)}
    exec(draw, names)
    net, x0, t_dm = torch.nn.Conv2d(1, 1, 3, padding=1), torch.randn(64, 1, 4, 4), names["t_dm"]
    a, s = (level[t_dm].view(-1, 1, 1, 1).float() for level in (alpha, sigma))
    names["output"] = net(a * names["x1"] + s * x0)
    names["target"] = x0 if prediction == "eps" else a * x0 - s * names["x1"]
    exec(weigh.replace("(alpha + sigma)", factor), names)
    theirs = torch.autograd.grad(names["loss"], net.weight)[0]

    flow = Diff2Flow(lambda x_dm, t_dm, context: net(x_dm), alpha, sigma, prediction)
    ours = torch.autograd.grad(flow.loss(names["x1"], None, x0, f_t[t_dm]), net.weight)[0]
    assert torch.allclose(ours, theirs, rtol=1e-4)                  # float32's roundings, times 1 / alpha = 15.6

    names["x1"] = torch.empty(100_000, 1, 1, 1)
    exec(draw, names)
    drawn = f_t[names["t_dm"]].sort().values                        # uniform, but for what lies outside f_t's range
    uniform = torch.linspace(0, 1, 100_000).clamp(f_t[-1], f_t[0])
    assert (drawn - uniform).abs().max() < 0.01                     # the spread of 100,000 draws is 0.003


def test_the_method_needs_two_files_and_torch_alone(tmp_path):
    for name in ("diff2flow.py", "schedule.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = """
import sys, torch
before = set(sys.modules)
from diff2flow import Diff2Flow
from schedule import sd_schedule
Diff2Flow(lambda x_dm, t_dm, context: x_dm, *sd_schedule()).sample(torch.zeros(1, 1, 2, 2), None, 1)
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - {"torch"} - set(sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["diff2flow", "schedule"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_command_has_the_flags_that_it_is_shown_with(page, monkeypatch, capsys):
    """A script's own --help must know each flag that a page uses with it."""
    for words in commands(page):
        module = module_of(words)
        if module == "pytest":
            continue
        has_commands = module in ("toy.judge", "toy.make_prior", "claims.report")
        monkeypatch.setattr(sys, "argv", [module, *(words[2:3] if has_commands else []), "--help"])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(module).main()
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        flags = {word for word in words if word.startswith("--")}
        assert stop.value.code == 0 and flags <= known, (words, flags - known)


def test_the_pages_show_commands():
    """The test above would pass if `commands` found nothing."""
    assert len(commands(ROOT / "README.md")) > 8 and sum(len(commands(page)) for page in DOCS) > 12


@pytest.fixture
def stand_ins(tmp_path, tiny, monkeypatch):
    """A working folder with small stand-ins for all files that the commands name; training takes two steps of two."""
    with working_in(tmp_path, tiny):
        for name in ("sd15", "sd21"):
            tensors = {key: value.half() if value.is_floating_point() else value
                       for key, value in random_checkpoint(name).items()}
            save_file(tensors, f"{name}.safetensors", metadata={"format": "pt", "resolution": "64"})
        for i in range(12):
            save_photo(f"photos/{i}.jpg", seed=i)
            Path(f"photos/{i}.txt").write_text(f"a boat, number {i}")
            for folder in "hypersim", "vkitti":
                save_photo(f"{folder}/{i}.jpg", seed=i)
                np.save(f"{folder}/{i}.npy", np.linspace(1, 5, 48)[:, None] * np.ones(64))
        save_photo("a.jpg")
        save_shards("laion", tars=100, pictures=1)
        Path("captions.txt").write_text("a red boat\na blue boat\n")
        few = {"steps": 2, "batch": 2, "grad_accum": 1, "validation": 2, "previews": 1, "scenes": 4}
        for recipes in train.PAPER, train.BUNDLED:
            for task, recipe in recipes.items():
                monkeypatch.setitem(recipes, task, recipe | few | ({"size": [64, 64]} if task == "depth" else {}))
        yield tmp_path


def shortened(words):
    """The same command with fewer steps, pairs, samples and predictions."""
    few = {"--steps": "2", "--pairs": "4", "--ensemble": "1", "--batch": "4"}
    return [few.get(before, word) for before, word in zip(["", *words], words)]


def run_here(page):
    """-> the commands of a page that take no minutes or gigabytes; the parts of the others have tests of their own."""
    elsewhere = ("tests.", "claims.", "tools.costs", "tools.full_size", "tools.gpu", "tools.kernels", "pytest")
    return [words for words in commands(page) if not module_of(words).startswith(elsewhere)]


@pytest.mark.parametrize("page", [page for page in [ROOT / "README.md", *DOCS] if run_here(page)],
                         ids=lambda page: page.stem)
def test_every_command_of_the_manual_runs_in_its_order(page, stand_ins):
    """As printed, but for the numbers in `shortened`. runs/NAME is the newest run, at first a LoRA on sd21."""
    def run(words):
        result = call(importlib.import_module(module_of(words)), shlex.join(words[2 if words[0] == "-m" else 1:]))
        assert result.code == 0, (words, result.err)
        newest = max(Path("runs").glob("*/state.safetensors"), key=lambda path: path.stat().st_mtime).parent
        if newest.name != "NAME":
            shutil.copytree(newest, "runs/NAME", dirs_exist_ok=True)

    run(["train.py", "--ckpt", "sd21.safetensors", "--data", "photos/", "--lora", "4", "--out", "runs/first"])
    shutil.copy("runs/first/lora.safetensors", "style.safetensors")
    for words in run_here(page):
        run(shortened(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_printed_sigmas_are_those_of_four_steps():
    sigmas = [f"{sigma:.4f}" for sigma in sample.sigma_grid(Diff2Flow(None, *sd_schedule()), 4)]
    page = text_of("docs/other_tools.md")
    assert f"    ComfyUI, ManualSigmas: {', '.join(sigmas)}\n" in page
    assert f"    diffusers: sigmas=[{', '.join(sigmas)}]\n" in page
    assert f"sigmas=[{', '.join(sigmas[:-1])}, 0.0], guidance_scale" in page


def test_the_line_for_coco_takes_the_first_caption_of_each_picture(tmp_path):
    """The file lists annotations in no order of pictures, with spaces and line ends in some captions."""
    page = text_of("claims/README.md")
    command = re.search(r"^    python (-c .*) > captions.txt$", page, re.MULTILINE)[1]
    annotations = [{"image_id": i, "id": n, "caption": caption} for n, (i, caption) in enumerate(
        [(9, "a dog "), (2, "two\nboats"), (9, "a second"), (40, "a red bus"), (2, "x")])]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_val2017.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines() == ["two boats", "a dog", "a red bus"]


def test_the_text_that_a_mutation_replaces_is_there_once():
    """Otherwise `python -m tests.mutations` stops before the first one."""
    assert [name for name, file, old, *_ in MUTATIONS if (ROOT / file).read_text().count(old) != 1] == []


def test_ruff_finds_nothing():
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    done = subprocess.run(ruff, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
