"""run.py: a run ends when it is told to and goes on to the same result, owns its folder, and is shared by processes."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import files
import numpy as np
import pytest
import run
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train
from data import pictures_in
from model import load_checkpoint
from tests import runs
from tests.runs import FEW, SHORT, call, metadata, refusal, rows_of, same, save_photos, save_shards, working_in, works

ROOT = Path(train.__file__).parent
tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
RUN = SHORT + "--lora 2 --preview-every 0 --ema 0.9 "


def at_step(step, action):
    """Patch train.py so that `action` happens in the middle of a step, counted from 0."""
    plain = train.draw_times

    def draw_times(n, t_sampling, device):
        if at_step.count == step:
            action()
        at_step.count += 1
        return plain(n, t_sampling, device)
    at_step.count = 0
    return "draw_times", draw_times


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a run of RUN that was not stopped. To be read only."""
    folder = tmp_path_factory.mktemp("whole")
    with working_in(folder, tiny):
        works(train, RUN + "--out run")
    return folder / "run"


# ------------------------------------------------------------------ told to stop

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on_to_the_same_result(whole, name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, *at_step(1, lambda: os.kill(os.getpid(), getattr(signal, name))))
        stopped = call(train, RUN + "--out run")
    assert stopped.code == 75 and f"{name}: the run saves after this step, and ends" in stopped.err
    assert stopped.out.endswith("stopped and saved after step 2 of 4; go on with: python train.py --resume run\n")
    assert metadata("run/state.safetensors")["step"] == "2" and Path("run/lora.safetensors").exists()
    assert not Path("run/result.json").exists() and "Traceback" not in stopped.err
    works(train, "--resume run")
    assert same("run/state.safetensors", whole / "state.safetensors")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_ctrl_c_leaves_at_once(monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(train, *at_step(2, twice))
    stopped = call(train, RUN + "--save-every 1 --out run")
    assert stopped.code == 130 and stopped.err.splitlines()[-1] == "interrupted"
    assert "go on from the last save with: python train.py --resume run" in stopped.out
    assert metadata("run/state.safetensors")["step"] == "2"


def test_a_signal_before_the_first_step_leaves_at_once(monkeypatch):
    monkeypatch.setattr(train.Validation, "velocity_error", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    assert call(train, RUN + "--out run").code == 130 and not Path("run/state.safetensors").exists()


# ------------------------------------------------------------------ the folder and its files

def test_a_folder_in_which_a_process_runs_is_refused_with_its_number():
    with run.owned(Path("run")):
        line = refusal(train, RUN + "--out run")
        assert f"run: process {os.getpid()} on " in line and "choose another --out" in line
    works(train, RUN + "--out run")
    assert not Path("run/.lock").exists()


def test_what_a_killed_writer_left_is_removed_at_the_next_start_and_is_no_picture(whole):
    shutil.copytree(whole, "run")
    save_photos("photos")
    for path in "run/state.partial.safetensors", "run/step_000003.partial.png", "photos/tree.partial.jpg":
        shutil.copy(next(Path("photos").glob("*.jpg")), path)
    works(train, "--resume run")
    assert not list(Path("run").glob("*.partial.*"))
    assert Path("photos/tree.partial.jpg") not in pictures_in("photos")
    assert len(train.ImageFolder("photos", 8, 8)) == 3


def test_a_log_is_only_appended_to_and_a_torn_last_line_is_dropped():
    path = Path("metrics.jsonl")
    for step in 1, 2, 3:
        run.append_log(path, {"step": step})
    node, whole_lines = path.stat().st_ino, path.read_bytes()
    for torn in b'{"step": 4, "lo', b'{"step": 4}', b"[]\n", b'{"step": 5}\n', b"\xff\n":
        path.write_bytes(whole_lines + torn)
        run.trim_log(path, 4)
        assert path.read_bytes() == whole_lines
    run.trim_log(path, 2)
    assert [row["step"] for row in rows_of(path)] == [1, 2] and path.stat().st_ino == node
    run.trim_log(Path("none.jsonl"), 2)


def test_a_run_whose_log_is_torn_resumes(whole):
    shutil.copytree(whole, "run")
    for name in "metrics", "validation":
        with open(f"run/{name}.jsonl", "a") as file:
            file.write('{"step": 4, "ve')
    works(train, "--resume run --steps 5")
    assert [row["step"] for row in rows_of("run/metrics.jsonl")] == [4, 5]
    assert [row["step"] for row in rows_of("run/validation.jsonl")] == [0, 4, 5]


def test_a_file_reaches_the_disk_before_it_takes_its_name(monkeypatch):
    done, plain = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or plain(*paths))
    files.save_tensors("a.safetensors", {"x": torch.ones(1)})
    assert re.fullmatch(rf"{os.getcwd()}/a.partial.\w+.safetensors", done[0]) and done[1:] == ["replace"]


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(tiny):
    works(train, RUN + f"--ckpt {tiny} --out run")
    before = {path.name: path.read_bytes() for path in Path("run").glob("*.safetensors")}
    command = f"ulimit -f 100; exec {sys.executable} {ROOT}/train.py --resume run --steps 6"        # files of 100 kB
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith("error: ") and "Traceback" not in done.stderr
    assert "run/lora.safetensors: could not be written, and is as it was" in line
    assert {path.name: path.read_bytes() for path in Path("run").glob("*.safetensors")} == before
    assert not list(Path("run").glob("*.partial.*"))


# ------------------------------------------------------------------ what --resume takes, and what it checks

def test_a_resumed_run_may_have_more_steps_another_rate_and_other_intervals_which_are_said(whole):
    shutil.copytree(whole, "run")
    out = works(train, "--resume run --steps 6 --lr 5e-4 --save-every 1 --preview-every 6 --device cpu")
    for said in "--steps 6 instead of 4", "--lr 0.0005 instead of 0.001", "--save-every 1 instead of 1000":
        assert said in out
    assert "--device" not in out and metadata("run/state.safetensors")["step"] == "6"
    assert rows_of("run/metrics.jsonl")[-1]["lr"] < 5e-4 and Path("run/step_000006.png").exists()
    assert run.saved_settings("run")["lr"] == 5e-4


@pytest.mark.parametrize("flag", ["--batch 2", "--objective dm", "--clip 1.0", "--seed 0", "--zero-snr", "--out other"])
def test_any_other_flag_beside_resume_is_refused_even_with_the_value_that_it_has(whole, flag):
    shutil.copytree(whole, "run")
    assert f"{flag.split()[0]}: a resumed run keeps its settings; beside --resume it takes --steps, --lr" in refusal(
        train, f"--resume run {flag}")


def test_a_run_resumes_from_another_folder_and_after_it_was_copied(whole, tiny, monkeypatch):
    save_photos("photos")
    shutil.copy(tiny, "base.safetensors")
    works(train, RUN + "--steps 2 --data photos --ckpt base.safetensors --out run")
    Path("elsewhere").mkdir()
    shutil.copytree("run", "elsewhere/copy")
    monkeypatch.chdir("elsewhere")
    for folder in "../run", "copy":
        works(train, f"--resume {folder} --steps 4")
    assert same("../run/state.safetensors", "copy/state.safetensors")


def test_another_base_is_refused_and_other_data_are_said(tiny):
    save_photos("photos")
    shutil.copy(tiny, "base.safetensors")
    works(train, RUN + "--steps 2 --data photos --ckpt base.safetensors --out run")
    assert "warning: the files of --data" not in works(train, "--resume run --steps 3")
    os.rename("photos/boat.jpg", "photos/ship.jpg")
    assert "warning: the files of --data are not those that the run began" in works(train, "--resume run --steps 4")
    sd = load_checkpoint(tiny)
    sd.unet.out[2].bias += 1
    sd.save("base.safetensors")
    line = refusal(train, "--resume run --steps 5")
    assert "state.safetensors: the run's base was another checkpoint (UNet " in line and "the file replaced?" in line


@pytest.mark.parametrize("args", ["", "[]", "{}", "5", '{"steps": 3}'])
def test_a_state_without_settings_is_refused(whole, args):
    shutil.copytree(whole, "run")
    save_file(load_file("run/state.safetensors"), "run/state.safetensors", {"args": args, "step": "4"})
    assert "run/state.safetensors: not written by train.py" in refusal(train, "--resume run")


def damaged(change):
    """Change the tensors and the metadata of run/state.safetensors by `change`."""
    tensors, told = load_file("run/state.safetensors"), metadata("run/state.safetensors")
    change(tensors, told)
    save_file(tensors, "run/state.safetensors", told)


def set_to(start, make):
    """Change the first tensor whose name begins with `start`."""
    def change(tensors, told):
        name = min(name for name in tensors if name.startswith(start))
        tensors[name] = make(tensors[name])
    return change


def without(start):
    """Leave out the tensors whose names begin with `start`."""
    def change(tensors, told):
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]
    return change


def args_with(**changes):
    return lambda tensors, told: told.update(args=json.dumps({**json.loads(told["args"]), **changes}))


@pytest.mark.parametrize("change", [
    set_to("parameter/", lambda x: x.flatten()[:1]), set_to("average/", lambda x: x * math.nan), without("average/"),
    set_to("adam/exp_avg/", lambda x: x[None]), set_to("adam/step/", lambda x: x * math.inf),
    without("adam/exp_avg"), without("adam/"), without("parameter/"), lambda tensors, told: told.pop("step"),
    lambda tensors, told: told.update(step="x"), lambda tensors, told: told.update(step="-1"),
    lambda tensors, told: told.update(args="[" * 100_000), args_with(batch="two"), args_with(task=[]),
    args_with(unknown=3), args_with(objective="x"), args_with(seed={}), args_with(batch=0)])
def test_a_damaged_state_is_one_line_that_names_it(whole, change):
    shutil.copytree(whole, "run")
    damaged(change)
    assert "run/state.safetensors: " in refusal(train, "--resume run --steps 5")
    assert not rows_of("run/metrics.jsonl")[-1]["step"] > 4


# ------------------------------------------------------------------ several processes

def torchrun(words):
    """Start a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", *words.split()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def printed_by(job, fails=False):
    """Wait for a job, which must fail or not -> what it printed."""
    out, _ = job.communicate(timeout=300)
    assert (job.returncode != 0) == fails, out[-3000:]
    return out


def close(a, b, kind):
    """|a - b| / |b| of all parameters, or averages, in two states."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    a, b = (torch.cat([x[name].double().flatten() for name in x if name.startswith(kind)]) for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


SHARED = ("--steps 20 --batch 1 --grad-accum 4 --lr 1e-3 --decay constant --warmup 0 --caption-dropout 0.1 --ema 0.9 "
          "--style outline --preview-every 0 --device cpu --precision fp32 ")


@pytest.mark.parametrize("words", ["--lora 2", "--lora none --lr 1e-5 --data photos", "--task depth --lora 2",
                                   "--task reflow --data pairs --lora 2"])
def test_two_processes_train_what_one_does_and_a_run_goes_on_with_another_number(tiny, words):
    """All weights at the paper's rate: where a gradient is all rounding, Adam takes a full step either way."""
    save_photos("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "PAIRS_A_FILE", 4)
        works(sample, FEW + "--pairs 7 --batch 4 --steps 1 --cfg 3 --out pairs")
    size = "" if "reflow" in words else "--size 32 --scenes 8 "
    words = f"{SHARED}{size}--validation 2 --previews 2 {words} --ckpt {tiny}"
    works(train, f"{words} --out one")
    out = printed_by(torchrun(f"{ROOT}/train.py {words} --steps 10 --out two"))
    assert out.count("weights: two/") == 1                              # rank 0 alone prints
    assert [row["step"] for row in rows_of("two/metrics.jsonl")] == [10]
    works(train, "--resume two --steps 20")
    for kind in "parameter/", "average/":
        assert close("two/state.safetensors", "one/state.safetensors", kind) < 1e-5
    losses = [[row["loss"] for row in rows_of(f"{name}/metrics.jsonl")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_share_the_files_of_pairs_and_make_what_one_makes(tiny):
    words = f"{FEW} --pairs 260 --batch 64 --steps 1 --cfg 1 --ckpt {tiny}"
    works(sample, f"{words} --out one")
    printed_by(torchrun(f"{ROOT}/sample.py {words} --out two"))
    names = ["pairs-000000.safetensors", "pairs-000001.safetensors"]
    assert sorted(os.listdir("one")) == sorted(os.listdir("two")) == names
    for name in names:
        one, two = load_file(f"one/{name}"), load_file(f"two/{name}")
        assert torch.equal(one["noise"], two["noise"]) and torch.allclose(one["latent"], two["latent"], atol=2e-3)


def test_two_processes_share_a_pass_over_tars(tiny):
    save_shards("shards", tars=4, pictures=3)
    Path("spied.py").write_text(
        "import os, train\nplain = train.drop_captions\n"
        "def spied(captions, share):\n"
        "    open('seen' + os.environ['RANK'], 'a').write(captions[0] + '\\n')\n"
        "    return plain(captions, share)\n"
        "train.drop_captions = spied\ntrain.main()\n")
    words = RUN + f"--ckpt {tiny} --batch 1 --grad-accum 4 --steps 3 --data shards/{{00000..00003}}.tar --out run"
    printed_by(torchrun(f"spied.py {words}"))
    seen = [Path(f"seen{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == 6 and {*seen[0], *seen[1]} == {f"picture {i}" for i in range(12)}


def test_two_processes_fill_a_cache_together_with_what_one_puts_there(tiny):
    save_photos("photos")
    words = f"{SHARED} --size 32 --validation 2 --previews 2 --lora 2 --data photos --ckpt {tiny} --steps 4"
    works(train, f"{words} --cache one-cache --out one")
    printed_by(torchrun(f"{ROOT}/train.py {words} --cache two-cache --out two"))
    one, two = (sorted(Path(folder).rglob("*.safetensors")) for folder in ("one-cache", "two-cache"))
    assert len(one) == len(two) == 3 + 4                                # pictures, captions with the empty one
    assert all(a.name == b.name and same(a, b) for a, b in zip(one, two))
    assert close("two/state.safetensors", "one/state.safetensors", "parameter/") < 1e-5


def test_two_processes_share_pictures_and_draw_the_grid_that_one_draws(tiny):
    Path("prompts.txt").write_text("red\ngreen\nblue\nblack\nwhite\n")
    words = f"{FEW} --prompts prompts.txt --batch 2 --ckpt {tiny} --out"
    works(sample, f"{words} one.png")
    out = printed_by(torchrun(f"{ROOT}/sample.py {words} two.png --singles"))
    assert out.count("5 pictures of 32x32") == 1                        # rank 0 alone prints
    assert sorted(os.listdir("two")) == [f"000{i}.png" for i in range(5)]
    one, two = (np.asarray(Image.open(name)).astype(int) for name in ("one.png", "two.png"))
    assert one.shape == two.shape and abs(one - two).max() <= 1


def test_a_step_that_cannot_be_shared_is_refused(tiny):
    out = printed_by(torchrun(f"{ROOT}/train.py {RUN} --grad-accum 3 --ckpt {tiny} --out run"), fails=True)
    assert "error: --grad-accum 3: 2 processes share the batches of a step, so it must be a multiple" in out


def test_a_killed_worker_ends_the_job_with_a_message_and_the_next_start_resumes(tiny):
    job = torchrun(f"{ROOT}/train.py {RUN} --steps 4000 --save-every 1 --grad-accum 2 --ckpt {tiny} --out run")
    deadline = time.time() + 120
    while not Path("run/state.safetensors").exists() and time.time() < deadline:
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert "Signal 9 (SIGKILL)" in printed_by(job, fails=True)
    step = int(metadata("run/state.safetensors")["step"])
    works(train, f"--resume run --steps {step + 1}")
    assert metadata("run/state.safetensors")["step"] == str(step + 1)
