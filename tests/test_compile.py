"""--compile of train.py and sample.py: the same results, and one line where nothing can be compiled."""
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train
from tests import runs
from tests.checkpoints import relative
from tests.runs import FEW, SHORT, metadata, refusal, works

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: g++")


@pytest.fixture
def compilations():
    """Start without compiled code -> torch's counts of what it compiles: "unique_graphs"."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def weights(folder):
    tensors = load_file(f"{folder}/lora.safetensors")
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


@NEEDS_COMPILER
def test_a_picture_sampled_by_a_compiled_network_is_that_without(compilations):
    pixels = []
    for more in "", "--compile":
        out = works(sample, f"{FEW} --n 2 --batch 1 {more} --out picture.png")
        pixels.append(torch.tensor(list(Image.open("picture.png").convert("RGB").tobytes())).int())
    assert "takes up to minutes" in out and compilations["unique_graphs"] == 1
    assert (pixels[0] - pixels[1]).abs().max() <= 1 and pixels[0].float().std() > 10


@NEEDS_COMPILER
def test_a_compiled_run_trains_the_weights_of_one_that_is_not(compilations):
    """It is compiled for training and for sampling, not again for each batch of a step."""
    for folder in "plain", "compiled":
        works(train, f"{SHORT} --grad-accum 3 --batch 1 --lora 2 --preview-every 0 --validation 1 --previews 1 "
                     f"--out {folder}" + " --compile" * (folder == "compiled"))
    assert relative(weights("compiled"), weights("plain")) < 1e-4
    assert 0 < compilations["unique_graphs"] <= 3


def test_a_run_from_before_compile_existed_resumes():
    works(train, f"{SHORT} --lora 2 --preview-every 0 --out run")
    about, tensors = metadata("run/state.safetensors"), load_file("run/state.safetensors")
    settings = json.loads(about["args"])
    assert settings.pop("compile") is False
    save_file(tensors, "run/state.safetensors", {**about, "args": json.dumps(settings)})
    works(train, "--resume run --steps 5")
    assert metadata("run/state.safetensors")["step"] == "5"


def test_a_failing_compilation_is_one_line_that_says_to_leave_compile_out(monkeypatch, compilations):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    assert "torch.compile failed" in refusal(sample, f"{FEW} --n 1 --compile")
