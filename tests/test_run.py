"""support/run.py, state.py, lock.py, processes.py: signals, errors, a run's folder, --resume, several processes."""
import errno
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train
from data import ImageFolder
from support import files, lock, run
from support.checkpoint import load_checkpoint, save_checkpoint
from support.files import save_tensors
from support.folders import pictures_in
from support.processes import StopSignal
from support.state import saved_settings
from tests import runs
from tests.runs import FEW, SHORT, call, metadata, refusal, rows_of, same, save_photos, save_shards, working_in, works

ROOT = Path(train.__file__).parent
tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
RUN = SHORT + "--lora 2 --preview-every 0 --ema 0.9 "


def at_step(step, action):
    """-> a patch of train.py that calls action() inside a step, counted from 0."""
    plain = train.learning_rate

    def learning_rate(s, args):
        if s == step:
            action()
        return plain(s, args)
    return "learning_rate", learning_rate


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a run of RUN that was not stopped. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    with working_in(folder, tiny):
        works(train, RUN + "--out run")
    return folder / "run"


# ------------------------------------------------------------------ signals

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_stops_a_run_after_its_step_and_it_resumes_to_the_same_result(whole, name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, *at_step(1, lambda: os.kill(os.getpid(), getattr(signal, name))))
        stopped = call(train, RUN + "--out run")
    assert stopped.code == 75 and f"{name}: the run saves after this step and stops" in stopped.err
    assert stopped.out.endswith("stopped and saved after step 2 of 4; resume with: python train.py --resume run\n")
    assert metadata("run/state.safetensors")["step"] == "2" and Path("run/lora.safetensors").exists()
    assert not Path("run/result.json").exists() and "Traceback" not in stopped.err
    works(train, "--resume run")
    assert same("run/state.safetensors", whole / "state.safetensors")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_fewer_steps_than_are_done_are_refused(whole):
    shutil.copytree(whole, "run")
    assert "--steps 3: run has done 4 steps already" in refusal(train, "--resume run --steps 3")
    assert same("run/lora.safetensors", whole / "lora.safetensors")


def test_a_second_ctrl_c_ends_the_run_without_saving(monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(train, *at_step(2, twice))
    stopped = call(train, RUN + "--save-every 1 --out run")
    assert stopped.code == 130 and stopped.err.splitlines()[-1] == "interrupted"
    assert "resume from the last save with: python train.py --resume run" in stopped.out
    assert metadata("run/state.safetensors")["step"] == "2"


def test_a_signal_before_the_first_step_ends_the_run_without_saving(monkeypatch):
    monkeypatch.setattr(train.Validation, "velocity_error", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    assert call(train, RUN + "--out run").code == 130 and not Path("run/state.safetensors").exists()


def test_a_signal_before_the_first_step_whose_interrupt_python_drops_ends_the_run_all_the_same(monkeypatch):
    plain = train.load_batches

    def load_batches(*args):
        try:                            # as in a hook of fork, which DataLoader's workers are started by
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            return plain(*args)
    monkeypatch.setattr(train, "load_batches", load_batches)
    assert call(train, RUN + "--out run").code == 130 and not Path("run/metrics.jsonl").exists()


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_process_whose_torchrun_was_killed_saves_and_stops_but_not_one_whose_shell_has_ended(whole, by_torchrun,
                                                                                               monkeypatch):
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(train, *at_step(1, lambda: monkeypatch.setattr(os, "getppid", lambda: 1)))
    stopped = call(train, RUN + "--out run")
    assert stopped.code == (75 if by_torchrun else 0)
    works(train, "--resume run")
    assert same("run/state.safetensors", whole / "state.safetensors")


def start_on_photographs(tiny, **options):
    """-> the process of a long run on photographs, with workers, in a process group of its own, after ten steps."""
    save_photos("photos")
    words = RUN + f"--ckpt {tiny} --data photos --steps 100000 --out run"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words.split()], start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    deadline = time.time() + 120
    while not Path("run/metrics.jsonl").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_the_whole_process_group_saves_a_run_with_workers(tiny, name):
    process = start_on_photographs(tiny, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    os.killpg(process.pid, getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and Path("run/state.safetensors").exists() and "Traceback" not in output, output


def test_a_run_whose_terminal_or_reader_has_gone_saves(tiny):
    process = start_on_photographs(tiny, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=60) == 75 and Path("run/state.safetensors").exists()


def test_a_signal_that_is_ignored_at_the_start_as_by_nohup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------ errors

def failing(step, error):
    """-> a patch of train.py that raises the error inside a step, counted from 0."""
    def fail():
        raise error
    return at_step(step, fail)


@pytest.mark.parametrize("error", [ValueError("a.png: gone"), OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_an_error_after_the_first_step_saves_the_steps_before_it_and_they_resume_to_the_same_result(whole, error,
                                                                                                    monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, *failing(3, error))
        stopped = call(train, RUN + "--out run")
    saved, line = stopped.err.splitlines()[-2:]
    assert stopped.code == 2 and line.startswith("error: ")
    assert saved == "an error after step 3 of 4, see below; step 3 is saved: resume with: python train.py --resume run"
    assert Path("run/lora.safetensors").exists()
    works(train, "--resume run")
    assert same("run/state.safetensors", whole / "state.safetensors")


def test_a_bug_keeps_its_traceback_and_the_steps_before_it_are_saved(monkeypatch):
    monkeypatch.setattr(train, *failing(2, AssertionError("a bug")))
    with pytest.raises(AssertionError, match="a bug"):
        call(train, RUN + "--out run")
    assert metadata("run/state.safetensors")["step"] == "2"


def test_an_error_in_a_preview_loses_no_step(whole, monkeypatch):
    with monkeypatch.context() as patch:
        def full(self, step):
            raise OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(train.Validation, "preview", full)
        stopped = call(train, RUN + "--preview-every 3 --out run")
    assert stopped.code == 2 and "No space left on device" in stopped.err
    works(train, "--resume run --preview-every 0")
    assert same("run/lora.safetensors", whole / "lora.safetensors")


def spoil(trained):
    next(iter(trained.values())).data.fill_(math.nan)


@pytest.mark.parametrize("where", ["half a step", "not finite"])
def test_an_error_in_the_middle_of_an_update_or_after_weights_became_nan_keeps_the_last_save(where, monkeypatch):
    plain = train.EMA.update

    def update(self, step, decay):
        if step == 3:                               # Adam has changed the parameters, their average is old
            raise OSError("now")
        plain(self, step, decay)
        if step == 2 and where == "not finite":
            spoil(self.trained)
    monkeypatch.setattr(train.EMA, "update", update)
    if where == "not finite":
        monkeypatch.setattr(train, *failing(3, OSError("now")))
    stopped = call(train, RUN + "--save-every 2 --out run")
    assert stopped.code == 2 and "step 2 is saved: resume with" in stopped.err
    assert metadata("run/state.safetensors")["step"] == "2"
    monkeypatch.undo()
    assert call(train, "--resume run").code == 0


def test_a_killed_worker_is_one_line_with_the_way_out_and_the_run_saves_and_resumes(tiny):
    process = start_on_photographs(tiny, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    line = output.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in output, output
    assert line.startswith("error: a process that reads pictures ahead was killed") and "--workers 0" in line
    step = int(metadata("run/state.safetensors")["step"])
    works(train, f"--resume run --workers 0 --steps {step + 1}")
    assert metadata("run/state.safetensors")["step"] == str(step + 1)


def test_an_error_in_a_worker_saves_and_ends_the_run_and_its_workers(tiny):
    """torch raises it with a reference to itself, by which the DataLoader lives on."""
    Path("spied.py").write_text(
        "import data, support.files, train\nplain, calls = data.random_crop, []\n"
        "def random_crop(image, height, width, rng):\n"
        "    calls.append(0)\n"
        "    if len(calls) > 8:                  # in this worker\n"
        "        raise OSError('a.jpg: gone')\n"
        "    return plain(image, height, width, rng)\n"
        "loading = train.load_batches\n"
        "def load_batches(*args):                # not for validation\n"
        "    data.random_crop = random_crop\n"
        "    return loading(*args)\n"
        "train.load_batches = load_batches\nsupport.files.cli(train.main)\n")
    save_photos("photos")
    words = RUN + f"--ckpt {tiny} --data photos --steps 1000 --out run"
    done = subprocess.run([sys.executable, "spied.py", *words.split()], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: a.jpg: gone"
    assert int(metadata("run/state.safetensors")["step"]) >= 4


@pytest.mark.parametrize("error", [
    RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "),
    RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: File exists (17)"),
    ConnectionResetError(104, "Connection reset by peer"), EOFError("while a batch was received")])
def test_a_lost_worker_or_too_little_shared_memory_is_one_line_with_the_way_out(error, monkeypatch):
    class Loader:
        def __iter__(self):
            raise error
            yield
    monkeypatch.setattr(train, "load_batches", lambda *args: Loader())
    line = refusal(train, RUN + "--out run")
    assert "--workers 0" in line and "--shm-size" in line and str(error).strip() in line


def limit_files(size):
    """Files of this process may have at most so many bytes: writing more is an OSError, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_cannot_hold_a_state_is_found_before_the_first_step(monkeypatch):
    monkeypatch.setattr(train, "learning_rate", None)
    limit_files(100_000)
    try:
        line = refusal(train, RUN + "--out run")
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert line.startswith("error: run/state.safetensors: cannot be written") and "free some space" in line
    assert sorted(os.listdir("run")) == ["validation.jsonl"]


def test_a_disk_that_can_hold_one_state_but_not_two_is_found_before_the_first_step(monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "run/state.safetensors: cannot be written" in refusal(train, RUN + "--out run")
    assert not list(Path("run").glob("*.partial.*"))


# ------------------------------------------------------------------ Windows, other file systems, and random streams

def test_a_file_system_without_locks_chmod_fsync_and_replace_gives_warnings_once_and_the_same_run(whole, monkeypatch):
    def fails(number):
        def operation(*args, **options):
            raise OSError(number, os.strerror(number))
        return operation
    plain = os.replace

    def replace(source, target):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists")
        plain(source, target)
    monkeypatch.setattr(lock.fcntl, "flock", fails(errno.ENOLCK))
    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))
    monkeypatch.setattr(os, "chmod", fails(errno.EPERM))
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "WARNED", set())
    result = call(train, RUN + "--save-every 1 --out run")
    assert result.code == 0 and same("run/state.safetensors", whole / "state.safetensors")
    for what in "has no locks", "does not support chmod", "does not support fsync", "cannot replace a file in one step":
        assert result.err.count(what) == 1, result.err
    assert not list(Path("run").glob("*.partial.*"))


def test_a_disk_that_reports_a_lost_write_at_fsync_is_an_error(monkeypatch):
    def fsync(number):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        save_tensors("a.safetensors", {})
    assert not os.listdir(".")


def test_where_fcntl_sighup_and_sigusr1_are_missing_as_on_windows_scripts_train_and_sample(tiny):
    Path("windows.py").write_text(f"""
import signal, sys
sys.modules["fcntl"] = None                     # importing it is an ImportError
del signal.SIGHUP, signal.SIGUSR1
import sample, train
sys.argv = "train.py {RUN} --ckpt {tiny} --steps 3 --out run".split()
train.main()
sys.argv = "sample.py {FEW} --lora run/lora.safetensors --ckpt {tiny} --n 1".split()
sample.main()
""")
    done = subprocess.run([sys.executable, "windows.py"], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert metadata("run/state.safetensors")["step"] == "3" and Path("samples.png").exists()


def test_torchs_cpu_generator_uses_the_low_32_bits_of_a_seed_alone():
    """So seed * 2**32 + i would give all seeds the same noise on a CPU."""
    def drawn(seed):
        return torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    assert drawn(5) == drawn(3 * 2**32 + 5) and len({tuple(drawn(seed)) for seed in (5, 6, 2**32 - 1)}) == 3


def test_the_random_streams_of_seeds_up_to_1000_do_not_meet():
    streams = 60_000 * 32                       # steps of Reflow, batches per step: the paper's longest run
    first = sorted(run.seed_of(seed, 0) for seed in range(1001))
    assert min(b - a for a, b in zip(first, [*first[1:], first[0] + 2**32])) > streams
    for seed in 0, 1, 1000, 2**32 - 1:          # a seed's streams are consecutive, and in the generator's 32 bits
        assert {(run.seed_of(seed, i) - run.seed_of(seed, 0) - i) % 2**32 for i in (0, 1, 10**6, streams - 1)} == {0}
        assert 0 <= run.seed_of(seed, streams - 1) < 2**32


# ------------------------------------------------------------------ the folder and its files

def test_a_folder_in_use_is_refused_with_the_id_of_its_process():
    with lock.owned(Path("run")):
        line = refusal(train, RUN + "--out run")
        assert f"run: process {os.getpid()} on " in line and "choose another --out" in line
    works(train, RUN + "--out run")
    assert not Path("run", lock.NAME).exists()


def test_a_worker_that_outlives_its_killed_run_does_not_hold_the_folder():
    Path("run").mkdir()
    with lock.lock_file(Path("run")) as file:
        assert lock.take(file, "run", lock.fcntl.LOCK_EX)
        context = multiprocessing.get_context("fork")
        started = context.Event()
        worker = context.Process(target=lambda: (started.set(), time.sleep(60)))
        worker.start()
        started.wait()
    try:
        with lock.owned(Path("run")):
            assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


def test_a_second_start_into_a_folder_that_got_a_run_meanwhile_is_refused(whole, monkeypatch):
    plain = train.load_trainable
    monkeypatch.setattr(train, "load_trainable", lambda *args: shutil.copytree(whole, "run") and plain(*args))
    assert "run has a run already: continue it with --resume run" in refusal(train, RUN + "--out run")
    assert same("run/lora.safetensors", whole / "lora.safetensors")


@pytest.mark.parametrize("name, text", [
    ("metrics.jsonl", '{"epoch": 1, "loss": 3}\n'), ("validation.jsonl", '{"acc": 1}\n'), ("metrics.png", "png"),
    ("result.json", '{"accuracy": 0.99}'), (".lock", ""), ("film.partial.mp4", "half"), ("state.partial.tmp", "half"),
    ("notes.partial.0123abcd.txt", "half"), ("lora.partial.safetensors", "half")])
def test_a_new_run_never_replaces_or_deletes_what_is_not_of_a_run(name, text):
    Path("out").mkdir()
    Path("out", name).write_text(text)
    assert f"out/{name}" in refusal(train, RUN + "--out out").replace("out: it contains ", "out/")
    assert os.listdir("out") == [name] and Path("out", name).read_text() == text


def test_a_run_that_was_killed_before_its_first_save_can_start_again(whole, monkeypatch):
    class Killed(BaseException):
        pass
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, *failing(3, Killed()))
        call(train, RUN + "--out run")
    Path("run", lock.NAME).write_text("1 on host")
    Path("run/metrics.jsonl").write_text("")
    Path("run/state.partial.0123abcd.safetensors").write_text("half")
    works(train, RUN + "--out run")
    assert same("run/state.safetensors", whole / "state.safetensors")
    assert not list(Path("run").glob("*.partial.*"))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_resumed_run_writes_through_no_link_that_its_folder_contains(whole, link):
    shutil.copytree(whole, "run")
    for name in "metrics.jsonl", "validation.jsonl", "metrics.png", "lora.safetensors", "result.json":
        Path("run", name).unlink()
        Path(f"mine-{name}").write_text("export PATH\n")
        link(os.path.abspath(f"mine-{name}"), f"run/{name}")
    works(train, "--resume run --steps 5")
    assert all(path.read_text() == "export PATH\n" for path in Path(".").glob("mine-*"))
    assert [row["step"] for row in rows_of("run/metrics.jsonl")] == [5]
    link(os.path.abspath("mine-metrics.jsonl"), f"run/{lock.NAME}")
    assert f"run/{lock.NAME} is a link, which is not followed" in refusal(train, "--resume run --steps 6")
    assert Path("mine-metrics.jsonl").read_text() == "export PATH\n"


def test_half_written_files_of_a_killed_run_are_removed_when_it_resumes_and_never_read_as_pictures(whole):
    shutil.copytree(whole, "run")
    save_photos("photos")
    for path in ("run/state.partial.0123abcd.safetensors", "run/step_000003.partial.89abcdef.png",
                 "run/film.partial.mp4", "photos/tree.partial.jpg"):
        shutil.copy(next(Path("photos").glob("*.jpg")), path)
    works(train, "--resume run")
    assert [path.name for path in Path("run").glob("*.partial.*")] == ["film.partial.mp4"]
    assert Path("photos/tree.partial.jpg") not in pictures_in("photos")
    assert len(ImageFolder("photos", 8, 8)) == 3


def test_trimming_a_log_removes_later_rows_and_a_half_written_one():
    path = Path("metrics.jsonl")
    for step in 1, 2, 3:
        run.append_log(path, {"step": step})
    whole_lines = path.read_bytes()
    for torn in b'{"step": 4, "lo', b'{"step": 4}', b"[]\n", b'{"step": 5}\n', b"\xff\n":
        path.write_bytes(whole_lines + torn)
        run.trim_log(path, 4)
        assert path.read_bytes() == whole_lines
    run.trim_log(path, 2)
    assert [row["step"] for row in rows_of(path)] == [1, 2]
    run.trim_log(Path("none.jsonl"), 2)


def test_a_run_with_a_half_written_row_in_its_log_resumes(whole):
    shutil.copytree(whole, "run")
    for name in "metrics", "validation":
        with open(f"run/{name}.jsonl", "a") as file:
            file.write('{"step": 4, "ve')
    works(train, "--resume run --steps 5")
    assert [row["step"] for row in rows_of("run/metrics.jsonl")] == [4, 5]
    assert [row["step"] for row in rows_of("run/validation.jsonl")] == [0, 4, 5]


def test_a_file_is_flushed_to_the_disk_before_it_gets_its_name(monkeypatch):
    done, plain = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or plain(*paths))
    save_tensors("a.safetensors", {"x": torch.ones(1)})
    assert re.fullmatch(rf"{os.getcwd()}/a.partial.\w+.safetensors", done[0]) and done[1:] == ["replace"]


def test_a_full_disk_is_an_error_of_one_line_and_the_last_save_stays(tiny):
    works(train, RUN + f"--ckpt {tiny} --out run")
    before = {path.name: path.read_bytes() for path in Path("run").glob("*.safetensors")}
    command = f"ulimit -f 100; exec {sys.executable} {ROOT}/train.py --resume run --steps 6"        # files of 100 kB
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith("error: ") and "Traceback" not in done.stderr
    assert "run/lora.safetensors: could not be written, and is unchanged" in line
    assert {path.name: path.read_bytes() for path in Path("run").glob("*.safetensors")} == before
    assert not list(Path("run").glob("*.partial.*"))


# ------------------------------------------------------------------ --resume

def test_a_resumed_run_prints_what_changes_in_its_steps_learning_rate_and_intervals(whole):
    shutil.copytree(whole, "run")
    out = works(train, "--resume run --steps 6 --lr 5e-4 --save-every 1 --preview-every 6 --device cpu")
    for line in "--steps 6 instead of 4", "--lr 0.0005 instead of 0.001", "--save-every 1 instead of 1000":
        assert line in out
    assert "--device" not in out and metadata("run/state.safetensors")["step"] == "6"
    assert rows_of("run/metrics.jsonl")[-1]["lr"] < 5e-4 and Path("run/step_000006.png").exists()
    assert saved_settings("run")["lr"] == 5e-4


@pytest.mark.parametrize("flag", ["--batch 2", "--objective dm", "--clip 1.0", "--seed 0", "--zero-snr"])
def test_any_other_flag_with_resume_is_refused_even_with_the_value_that_the_run_has(whole, flag):
    shutil.copytree(whole, "run")
    line = refusal(train, f"--resume run {flag}")
    assert f"{flag.split()[0]}: a resumed run keeps its settings; with --resume you can change --steps, --lr" in line


def test_a_run_resumes_from_another_working_directory_and_as_a_copy(whole, tiny, monkeypatch):
    save_photos("photos")
    shutil.copy(tiny, "base.safetensors")
    works(train, RUN + "--steps 2 --data photos --ckpt base.safetensors --out run")
    Path("elsewhere").mkdir()
    shutil.copytree("run", "elsewhere/copy")
    monkeypatch.chdir("elsewhere")
    for folder in "../run", "copy":
        works(train, f"--resume {folder} --steps 4")
    assert same("../run/state.safetensors", "copy/state.safetensors")
    os.rename("copy", "again")
    works(train, "--resume again --steps 5")


def test_resuming_on_another_base_is_refused_and_on_other_files_it_warns(tiny):
    save_photos("photos")
    shutil.copy(tiny, "base.safetensors")
    works(train, RUN + "--steps 2 --data photos --ckpt base.safetensors --out run")
    warning = "warning: files were added to --data or removed since the run began"
    assert warning not in works(train, "--resume run --steps 3")
    os.rename("photos/boat.jpg", "photos/ship.jpg")
    assert warning in works(train, "--resume run --steps 4")
    sd = load_checkpoint(tiny)
    sd.unet.out[2].bias += 1
    save_checkpoint(sd, "base.safetensors")
    line = refusal(train, "--resume run --steps 5")
    assert "state.safetensors: the run's base was another checkpoint (UNet " in line and "the file replaced?" in line


def test_a_run_whose_checkpoint_and_data_have_moved_names_the_flags_and_resumes_with_them_to_the_same_result(tiny):
    save_photos("old/photos")
    shutil.copy(tiny, "old/base.safetensors")
    words = RUN + "--decay constant --data old/photos --ckpt old/base.safetensors "
    works(train, words + "--steps 4 --out long")
    works(train, words + "--steps 2 --out short")
    os.rename("old", "new")
    ckpt, line = " --ckpt new/base.safetensors", refusal(train, "--resume short")
    assert "old/base.safetensors: no such file" in line and "pass --ckpt and --data with --resume" in line
    assert "old/photos: no such file or folder" in refusal(train, "--resume short" + ckpt)
    works(train, "--resume short --steps 4 --data new/photos" + ckpt)
    assert same("short/state.safetensors", "long/state.safetensors")
    assert saved_settings("short")["ckpt"] == os.path.abspath("new/base.safetensors")
    os.rename("new/photos/boat.jpg", "new/photos/ship.jpg")
    line = refusal(train, "--resume short --steps 5 --data new/photos")
    assert "--data: its files have other names than those of the run in short" in line


def test_a_run_resumes_in_another_folder_than_its_own_which_stays_as_it_is(whole, monkeypatch):
    shutil.copytree(whole, "run")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(train, *at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        stopped = call(train, "--resume run --steps 8 --out other")
    assert stopped.out.endswith("after step 6 of 8; resume with: python train.py --resume other\n")
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    works(train, "--resume other")
    works(train, "--resume run --steps 8")
    assert same("other/state.safetensors", "run/state.safetensors")
    assert [row["step"] for row in rows_of("other/validation.jsonl")] == [0, 4, 8]
    assert [row["step"] for row in rows_of("other/metrics.jsonl")] == [4, 6, 8]
    assert "other has a run already" in refusal(train, "--resume run --out other")


@pytest.mark.parametrize("args", ["", "[]", "{}", "5", '{"steps": 3}'])
def test_a_state_without_settings_is_refused(whole, args):
    shutil.copytree(whole, "run")
    save_file(load_file("run/state.safetensors"), "run/state.safetensors", {"args": args, "step": "4"})
    assert "run/state.safetensors: not written by train.py" in refusal(train, "--resume run")


def damage(change):
    """Change the tensors and the metadata of run/state.safetensors by `change`."""
    tensors, stored = load_file("run/state.safetensors"), metadata("run/state.safetensors")
    change(tensors, stored)
    save_file(tensors, "run/state.safetensors", stored)


def set_to(start, make):
    """Change the first tensor whose name begins with `start`."""
    def change(tensors, stored):
        name = min(name for name in tensors if name.startswith(start))
        tensors[name] = make(tensors[name])
    return change


def without(start):
    """Remove the tensors whose names begin with `start`."""
    def change(tensors, stored):
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]
    return change


def args_with(**changes):
    return lambda tensors, stored: stored.update(args=json.dumps({**json.loads(stored["args"]), **changes}))


@pytest.mark.parametrize("change", [
    set_to("parameter/", lambda x: x.flatten()[:1]), set_to("average/", lambda x: x * math.nan), without("average/"),
    set_to("adam/exp_avg/", lambda x: x[None]), set_to("adam/step/", lambda x: x * math.inf),
    without("adam/exp_avg"), without("adam/"), without("parameter/"), lambda tensors, stored: stored.pop("step"),
    lambda tensors, stored: stored.update(step="x"), lambda tensors, stored: stored.update(step="-1"),
    lambda tensors, stored: stored.update(args="[" * 100_000), args_with(batch="two"), args_with(task=[]),
    args_with(unknown=3), args_with(objective="x"), args_with(seed={}), args_with(batch=0),
    args_with(help=True), args_with(data=["x", "--help"]), args_with(st=7)])
def test_a_damaged_state_is_an_error_of_one_line_that_names_the_file(whole, change):
    shutil.copytree(whole, "run")
    damage(change)
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
    """Wait for a job that must succeed, or fail if `fails` -> what it printed."""
    out, _ = job.communicate(timeout=300)
    assert (job.returncode != 0) == fails, out[-3000:]
    return out


def difference(a, b, kind):
    """-> |a - b| / |b| of all parameters, or of their EMA, in two states."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    a, b = (torch.cat([x[name].double().flatten() for name in x if name.startswith(kind)]) for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


SHARED = ("--steps 20 --batch 1 --grad-accum 4 --lr 1e-3 --decay constant --warmup 0 --caption-dropout 0.1 --ema 0.9 "
          "--style outline --preview-every 0 --device cpu --precision fp32 ")


@pytest.mark.parametrize("words", ["--lora 2", "--lora none --lr 1e-5 --data photos",
                                   "--task depth --lora 2 --caption-dropout 0", "--task reflow --data pairs --lora 2"])
def test_two_processes_train_the_same_as_one_and_a_run_resumes_with_another_number(tiny, words):
    """All weights at the paper's learning rate, since Adam takes a full step where a gradient is rounding error."""
    save_photos("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.pairs.PAIRS_PER_FILE", 4)
        works(sample, FEW + "--pairs 7 --batch 4 --steps 1 --cfg 3 --out pairs")
    size = "" if "reflow" in words else "--size 32 --scenes 8 "
    words = f"{SHARED}{size}--validation 2 --previews 2 {words} --ckpt {tiny}"
    works(train, f"{words} --out one")
    out = printed_by(torchrun(f"{ROOT}/train.py {words} --steps 10 --preview-every 10 --out two"))
    assert out.count("weights: two/") == 1                              # rank 0 alone prints
    assert Path("two/step_000010.png").exists()                         # and draws, while the other process waits
    assert [row["step"] for row in rows_of("two/metrics.jsonl")] == [10]
    works(train, "--resume two --steps 20")
    for kind in "parameter/", "average/":
        assert difference("two/state.safetensors", "one/state.safetensors", kind) < 1e-5
    losses = [[row["loss"] for row in rows_of(f"{name}/metrics.jsonl")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_share_the_files_of_pairs_and_write_the_same_as_one(tiny):
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
        "    if share:                            # 0 in validation\n"
        "        open('seen' + os.environ['RANK'], 'a').write(captions[0] + '\\n')\n"
        "    return plain(captions, share)\n"
        "train.drop_captions = spied\ntrain.main()\n")
    words = RUN + f"--ckpt {tiny} --batch 1 --grad-accum 4 --steps 3 --data shards/{{00000..00003}}.tar --out run"
    printed_by(torchrun(f"spied.py {words}"))
    seen = [Path(f"seen{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == 6
    assert {*seen[0], *seen[1]} == {f"picture {i}" for i in range(12) if i != 9}        # 9 is held out


def test_two_processes_fill_a_cache_together_with_the_same_files_as_one(tiny):
    save_photos("photos")
    words = f"{SHARED} --size 32 --validation 2 --previews 2 --lora 2 --data photos --ckpt {tiny} --steps 4"
    works(train, f"{words} --cache one-cache --out one")
    printed_by(torchrun(f"{ROOT}/train.py {words} --cache two-cache --out two"))
    one, two = (sorted(Path(folder).rglob("*.safetensors")) for folder in ("one-cache", "two-cache"))
    assert len(one) == len(two) == 3 + 4                                # pictures; captions and the empty one
    assert all(a.name == b.name and same(a, b) for a, b in zip(one, two))
    assert difference("two/state.safetensors", "one/state.safetensors", "parameter/") < 1e-5


def test_two_processes_share_the_pictures_of_a_grid_and_draw_the_same_as_one(tiny):
    Path("prompts.txt").write_text("red\ngreen\nblue\nblack\nwhite\n")
    words = f"{FEW} --prompts prompts.txt --batch 2 --ckpt {tiny} --out"
    works(sample, f"{words} one.png")
    out = printed_by(torchrun(f"{ROOT}/sample.py {words} two.png --singles"))
    assert out.count("5 pictures of 32x32") == 1                        # rank 0 alone prints
    assert sorted(os.listdir("two")) == [f"000{i}.png" for i in range(5)]
    one, two = (np.asarray(Image.open(name)).astype(int) for name in ("one.png", "two.png"))
    assert one.shape == two.shape and abs(one - two).max() <= 1


@pytest.mark.parametrize("rank, count", [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "0"), ("0", ""), ("", "1")])
def test_ranks_that_make_no_sense_are_refused(rank, count, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    assert f"RANK={rank} and WORLD_SIZE={count} in the environment" in refusal(train, RUN)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "MASTER_ADDR or MASTER_PORT in the environment: not as torchrun" in refusal(train, RUN)


def test_a_step_that_processes_cannot_share_equally_is_refused(tiny):
    out = printed_by(torchrun(f"{ROOT}/train.py {RUN} --grad-accum 3 --ckpt {tiny} --out run"), fails=True)
    assert "error: --grad-accum 3: 2 processes share the batches of a step, so it must be a multiple" in out


def test_a_killed_process_ends_the_job_with_a_message_and_the_run_resumes(tiny):
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
