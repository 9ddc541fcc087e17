"""support/files.py: files are written atomically, and a user's error is one line."""
import math
import os
import stat
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import depth
import sample
import train
from support.files import (
    check_range,
    cli,
    from_json,
    open_tensors,
    parse,
    read_text,
    reading,
    remove_partial,
    replacing,
    save_tensors,
)
from tests.runs import refusal
from tools import evaluate, measure_depth, merge
from toy import make_prior


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_a_file_is_written_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "grid.png"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old" and temporary.suffix == ".png"
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["grid.png"]


def test_a_written_file_replaces_the_old_one_and_missing_folders_are_made(tmp_path):
    path = tmp_path / "new/er/grid.png"
    for text in "old", "new":
        with replacing(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "new" and os.listdir(path.parent) == ["grid.png"]


def test_saved_tensors_are_read_back_with_their_metadata_and_every_user_may_read_the_file(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3).T)
    save_tensors(tmp_path / "a.safetensors", {"weight": weight}, {"step": "3"})
    with open_tensors(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.get_tensor("weight"), weight) and file.metadata() == {
            "format": "pt", "step": "3", "software": "Diff2Flow"}
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_a_damaged_file_of_tensors_is_an_error_of_one_line_that_names_the_file(tmp_path):
    save_tensors(tmp_path / "whole", {"weight": torch.ones(100)})
    whole = (tmp_path / "whole").read_bytes()
    for name, content in {"empty": b"", "cut": whole[:200], "header": whole[:20], "text": b"text" * 20}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^.*{name}: cannot be read; trunc.*$"), open_tensors(tmp_path / name):
            pass
    with pytest.raises(ValueError, match="whole: cannot be read"), open_tensors(tmp_path / "whole") as file:
        file.get_tensor("bias")
    for name, message in ("none", "no such file$"), ("", "it is a folder"):
        with pytest.raises(ValueError, match=message), open_tensors(tmp_path / name):
            pass


@pytest.mark.parametrize("error, reason", [
    (KeyError("a"), "KeyError: 'a'"), (RecursionError("deep"), "RecursionError: deep"),
    (ValueError("b.json: c"), "b.json: c"), (FileNotFoundError(2, "gone"), "[Errno 2] gone")])
def test_any_error_in_a_parser_names_the_file_and_the_kind_that_was_expected(error, reason):
    with pytest.raises(ValueError) as raised, reading("a.json", "metadata"):
        raise error
    assert str(raised.value) == f"a.json: not metadata, or damaged ({reason})"


def test_an_error_that_names_the_file_already_passes_and_so_does_one_that_is_not_of_the_file():
    for error in ValueError("a.json: no caption"), MemoryError(), KeyboardInterrupt():
        with pytest.raises(type(error)) as raised, reading("a.json", "metadata"):
            raise error
        assert raised.value is error


def parsed(*words):
    parser = ArgumentParser()
    for name in "--out", "--ckpt", "--data-file", "--prompt", "--negative":
        parser.add_argument(name)
    parser.add_argument("--size", nargs="*")
    parser.add_argument("inputs", nargs="*")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *words])
        return parse(parser)


@pytest.mark.parametrize("words, message", [
    (["--out", ""], "--out '': the value is empty"), (["--data-file="], "--data-file '': the value is empty"),
    (["--size", "1", ""], "--size '': the value is empty"), ([""], "inputs '': the value is empty"),
    (["--out=--"], "--out=--: -- is not a value"), (["--size=--"], "--size=--: -- is not a value"),
    (["--out", "caf\udce9"], r"--out 'caf\udce9': the name is not UTF-8")])
def test_an_empty_value_a_lone_dash_or_a_name_that_is_not_utf8_is_refused(words, message):
    with pytest.raises(ValueError) as raised:
        parsed(*words)
    assert str(raised.value).startswith(message)


def test_a_flag_that_is_left_out_a_prompt_that_is_empty_and_a_folder_that_is_not_utf8_are_fine():
    args = parsed("--prompt", "", "--negative=", "--data-file", "caf\udce9", "--size", "1", "--", "--x")
    assert (args.prompt, args.negative, args.out, args.data_file, args.size, args.inputs) == (
        "", "", None, "caf\udce9", ["1"], ["--x"])


@pytest.mark.parametrize("module, words", [
    (train, "--data ''"), (train, "--ckpt ''"), (train, "--resume ''"), (train, "--out ''"), (sample, "--prompts ''"),
    (sample, "--out=--"), (depth, "a.jpg --lora ''"), (depth, "''"), (merge, "a --ckpt '' --out b.safetensors"),
    (make_prior, "prior --resume ''"), (evaluate, "a --prompts ''"), (measure_depth, "a --truth ''")])
def test_every_script_refuses_empty_values(module, words):
    line = refusal(module, words)
    assert "'': the value is empty" in line or "--: -- is not a value" in line


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ">&- 2>&-"])
def test_a_closed_or_full_stderr_is_no_error_and_its_number_goes_to_no_other_file(redirection, tmp_path):
    code = ("import os, sys, support.files as f\n"
            "def main():\n"
            "    print('text', file=sys.stderr)\n"
            "    assert open('files.txt', 'w').fileno() > 2\n"
            "    raise ValueError('one line')\n"
            "f.cli(main)")
    done = subprocess.run(["bash", "-c", f"exec {sys.executable} -c \"$0\" {redirection}", code], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parent)})
    assert done.returncode == 2


def test_half_written_files_are_removed_by_their_names_and_nothing_else(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "0001.png") as temporary:
        (tmp_path / temporary.name.replace("0001", "0002")).write_text("half")      # of a killed process
        temporary.write_text(1 / 0)
    names = ("0001.png", "film.partial.mp4", "0002.partial.png", "0003.partial.0123456789.png",
             "tree.partial.0123abcd.png")
    for name in names:
        (tmp_path / name).write_text("mine")
    remove_partial(tmp_path, "000*.png")
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_text_is_read_as_utf8_with_or_without_a_byte_order_mark(tmp_path):
    for name, content in ("plain", "Blüte".encode()), ("bom", "\ufeffBlüte".encode()):
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name) == "Blüte"
    (tmp_path / "latin").write_bytes("Blüte".encode("latin-1"))
    with pytest.raises(ValueError, match="latin is not UTF-8"):
        read_text(tmp_path / "latin")


def test_a_number_outside_its_range_is_an_error_that_names_its_flag_and_both_ends_are_inside():
    args = Namespace(grad_accum=0, ema=1.0, lr=math.nan, steps=None, steps_list=[1, 4, 0])
    check_range(args, 0, 1, "grad_accum", "ema", "steps")
    for name, message in ("grad_accum", "--grad-accum 0: "), ("steps_list", "--steps-list 0: "), ("lr", "--lr nan: "):
        with pytest.raises(ValueError, match=f"^{message}it must be between 1 and inf$"):
            check_range(args, 1, math.inf, name)
    with pytest.raises(ValueError, match="--ema 1: it must be between 0 and 0.5"):
        check_range(args, 0, 0.5, "ema")


class Damaged(list):
    def __getitem__(self, i):
        raise super().__getitem__(i) from KeyError("the cause")


def exit_of(action, capsys):
    """-> exit code and stderr of cli(action)."""
    with pytest.raises(SystemExit) as stop:
        cli(action)
    return stop.value.code, capsys.readouterr().err


def test_a_users_error_is_one_line_and_exit_code_2(capsys):
    def value_error():
        raise ValueError("steps is 0:\n  give 1 or more")
    assert exit_of(value_error, capsys) == (2, "error: steps is 0: give 1 or more\n")
    assert exit_of(lambda: open("none.pt"), capsys) == (2, "error: [Errno 2] No such file or directory: 'none.pt'\n")


def test_an_error_in_a_data_loader_worker_is_one_line_without_its_traceback(capsys):
    for error, message in ((ValueError("a.png cannot be read:\n it is damaged"), "a.png cannot be read: it is damaged"),
                        (FileNotFoundError(2, "No such file", "a.png"), "[Errno 2] No such file: 'a.png'")):
        loader = DataLoader(Damaged([error]), num_workers=1)
        assert exit_of(partial(list, loader), capsys) == (2, f"error: {message}\n")


def test_an_interrupt_is_one_word_and_exit_code_130_and_a_bug_keeps_its_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    def bug():
        raise AssertionError
    assert exit_of(interrupted, capsys) == (130, "interrupted\n")
    with pytest.raises(AssertionError):
        cli(bug)


def out_of_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 3 GiB.\nSee PYTORCH_ALLOC")


def too_long():
    raise ValueError("photo.png: " + "x" * 10_000 + ": give another")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: bytearray(2**50),
                                      out_of_cuda])
def test_out_of_memory_is_one_line_that_names_the_flags_to_lower(allocate, capsys):
    code, line = exit_of(allocate, capsys)
    assert code == 2 and line.startswith("error: out of memory: lower --batch or --size") and line.count("\n") == 1


def test_a_very_long_error_line_is_shortened_in_the_middle(capsys):
    _, line = exit_of(too_long, capsys)
    assert line.startswith("error: photo.png: x") and line.endswith("x: give another\n") and len(line) < 1500


def test_a_runtime_error_of_torch_is_a_bug_and_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cli(lambda: torch.ones(1, 2) @ torch.ones(3, 1))


def test_json_that_is_broken_or_too_deeply_nested_is_a_value_error():
    assert from_json('{"a": [1]}') == {"a": [1]}
    for text in "[" * 100_000, "{", "", "9" * 5000:
        with pytest.raises(ValueError):
            from_json(text)
