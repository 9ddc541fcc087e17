"""Files that are written say how they were made, and do not replace other programs' files."""
import errno
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import piexif
import piexif.helper
import pytest
from PIL import Image

import depth
import sample
import train
from diff2flow import Diff2Flow
from support import files
from support.files import SOFTWARE, check_replaceable, maker_of, save_tensors
from support.pictures import save_picture
from tests import runs
from tests.runs import FEW, SHORT, call, metadata, refusal, save_photo, save_photos, works
from tests.test_sample import write_lora
from tools import merge

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")


def making(path):
    """-> the text that other tools show: "parameters" of a .png, else piexif's own reading of the Exif comment, which a
    .png has too."""
    with Image.open(path) as picture:
        exif, parameters = piexif.load(picture.info["exif"]), picture.info.get("parameters")
    comment = piexif.helper.UserComment.load(exif["Exif"][piexif.ExifIFD.UserComment])
    assert parameters in (None, comment)
    return comment


def as_a1111_reads(text):
    """-> prompt, negative prompt, {setting: value}: the settings are the last line, a value in quotes is JSON."""
    *above, last = text.strip().split("\n")
    number = next(i for i, line in enumerate(above) if line.startswith("Negative prompt:"))
    found = re.findall(r'([\w][\w /-]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)', last)
    settings = {name: json.loads(value) if value.startswith('"') else value for name, value in found}
    negative = "\n".join(above[number:]).removeprefix("Negative prompt:").strip()
    return "\n".join(above[:number]), negative, settings


def as_comfyui_reads(text):
    """-> prompt, negative prompt: without the last line that begins with "Negative prompt:", nothing is imported."""
    end = text.rindex("\nSteps:")
    middle = text.rindex("\nNegative prompt:", 0, end)
    return text[:middle].strip(), text[middle + 18:end].strip()


@pytest.mark.parametrize("end", ["png", "jpg", "webp"])
def test_a_pictures_file_has_its_prompt_its_settings_and_its_number(tiny, end):
    words = f"{FEW} --prompt 'a red café' --cfg 3 --seed 5 --n 2 --first 3 --singles --out s.{end} --negative "
    settings = {"Steps": "2", "Sampler": "Euler", "Seed": "5", "Model": "tiny", "Objective": "diff2flow",
                "CFG scale": "3", "Size": "32x32"}
    for negative in "grey", "":
        works(sample, f"{words} '{negative}'")
        for path, prompt, number in (f"s.{end}", "a red café\na red café", "3 to 4"), ("s/0004.png", "a red café", "4"):
            prompts, unwanted, found = as_a1111_reads(making(path))
            assert (prompts, unwanted) == as_comfyui_reads(making(path)) == (prompt, negative)
            assert len(found.pop("Model hash")) == 10 and found == settings | {"Picture": number}
    assert maker_of(f"s.{end}") == maker_of("s/0004.png") == SOFTWARE


@pytest.mark.parametrize("name", ["a, b", "Size: 1x1", 'the "best" v2', "a\nb", "plain-v1.5 (1)", "back\\slash, é"])
def test_a_models_name_with_the_separators_of_settings_is_read_back(tiny, name):
    shutil.copy(tiny, f"{name}.safetensors")
    works(sample, FEW + "--n 1 --prompt x --ckpt " + shlex.quote(f"{name}.safetensors"))
    *_, settings = as_a1111_reads(making("samples.png"))
    assert settings["Model"] == name and settings["Size"] == "32x32" and settings["Picture"] == "0"


def test_a_prompt_that_utf_8_cannot_encode_still_gives_a_picture():
    save_picture("a.png", Image.new("RGB", (8, 8)), "a \ud800 b")
    assert making("a.png") == "a ? b"


def test_only_files_whose_metadata_names_diff2flow_are_replaced():
    save_tensors("ours.safetensors", {})
    Path("ours.jsonl").write_text(json.dumps({"software": SOFTWARE}) + "\n{}\n")
    for name in "none.png", "ours.safetensors", "ours.jsonl":
        check_replaceable(name)
    save_photo("photo.png")
    Path("list.json").write_text("[1]\n")
    Path("half.png").write_bytes(b"\x89PNG\r\n")
    Path("folder.png").mkdir()
    Path("dangling.png").symlink_to("nothing")
    for name in "photo.png", "list.json", "half.png", "folder.png", "dangling.png":
        with pytest.raises(ValueError, match=f"{name} exists already, and was not written by Diff2Flow"):
            check_replaceable(name)


def files_and_bytes():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_samples_replace_diff2flows_pictures_and_no_others(tiny):
    words = FEW + "--n 2 --singles --out s.png "
    for taken in "s.png", "s/0001.png":
        save_photo(taken)
        before = files_and_bytes()
        assert f"{taken} exists already" in refusal(sample, words)
        assert files_and_bytes() == before
        os.unlink(taken)
    works(sample, words)
    before = files_and_bytes()
    works(sample, words + "--seed 1")
    assert all(before[path] != path.read_bytes() for path in before)


def test_single_pictures_are_refused_in_a_folder_with_other_pictures(tiny):
    works(sample, FEW + "--n 3 --singles --out s.png")
    before = files_and_bytes()
    assert "s has 1 pictures that this command does not write, first 0002.png" in refusal(
        sample, FEW + "--n 2 --singles --out s.png")
    assert files_and_bytes() == before


@pytest.mark.parametrize("script, words", [
    (sample, "--n 1 --out new/a.png"), (sample, "--n 1 --singles --out a.png"), (sample, "--pairs 2 --out pairs"),
    (depth, "photo.jpg --lora run/lora.safetensors --device cpu --out found")])
def test_a_disk_that_takes_no_file_is_found_before_the_first_picture(tiny, script, words, monkeypatch):
    if script is depth:
        save_photo("photo.jpg")
        works(train, SHORT + "--task depth --lora 2 --preview-every 0 --out run")
    else:
        words = FEW + words
    plain = files.replace

    def full(temporary, path):          # in the last of the folders that the command writes to
        if "--singles" not in words or path.parent.name == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(temporary, path)
    monkeypatch.setattr(files, "replace", full)
    monkeypatch.setattr(Diff2Flow, "sample", lambda *_, **__: pytest.fail("sampled before it failed"))
    line = refusal(script, words)
    assert "cannot be written" in line and "No space left on device" in line
    assert not list(Path().rglob("*.partial.*"))


def test_a_text_too_long_for_its_format_is_found_before_the_first_picture(monkeypatch):
    Path("prompts.txt").write_text("".join(f"{i} {'a lighthouse at dusk ' * 60}\n" for i in range(30)))
    monkeypatch.setattr(Diff2Flow, "sample", lambda *_, **__: pytest.fail("sampled before it failed"))
    line = refusal(sample, FEW + "--prompts prompts.txt --out grid.jpg")
    assert "grid.jpg: such a picture cannot be written (EXIF data is too long): choose another folder, or a .p" in line
    assert os.listdir() == ["prompts.txt"]


def test_half_written_single_pictures_of_a_killed_process_are_removed_and_no_others(tiny):
    Path("s").mkdir()
    for name in "s/0001.partial.0123abcd.png", "s/0007.partial.0123abcd.png", "s/film.partial.mp4":
        Path(name).write_text("half")
    works(sample, FEW + "--n 2 --singles --out s.png")
    assert sorted(os.listdir("s")) == ["0000.png", "0001.png", "0007.partial.0123abcd.png", "film.partial.mp4"]


def test_a_grid_too_large_for_its_format_is_refused_before_sampling(monkeypatch):
    monkeypatch.setattr(Diff2Flow, "sample", lambda *_, **__: pytest.fail("sampled before it failed"))
    assert re.search(r"big.webp: it would have \d+x\d{5} pixels, a .webp at most 16383 a side: write a .png",
                     refusal(sample, FEW + "--n 1200 --out big.webp"))
    assert "must be the name of a picture, which ends in .png .jpg" in refusal(sample, FEW + "--out grid.bmp")


def test_depth_replaces_neither_the_true_depth_nor_other_pictures(tiny):
    works(train, SHORT + "--task depth --lora 2 --preview-every 0 --out run")
    save_photo("in/a.jpg")
    words = "in/a.jpg --lora run/lora.safetensors --steps 1 --device cpu --out "
    np.save("in/a.npy", np.ones((48, 64)))
    for taken in "in/a.npy", "in/a_colour.png":
        if taken.endswith("png"):
            os.rename("in/a.npy", "a.npy")
            save_photo(taken)
        before = files_and_bytes()
        assert f"{taken} exists already" in refusal(depth, words + "in")
        assert files_and_bytes() == before
    works(depth, words + "out")
    first = np.load("out/a.npy")
    works(depth, words + "out --seed 1")
    assert not np.array_equal(first, np.load("out/a.npy"))
    assert "Steps: 1" in making("out/a_16bit.png") and "Ensemble: 1" in making("out/a_colour.png")


def test_a_merged_checkpoint_replaces_neither_its_inputs_nor_other_programs_files(tiny):
    write_lora("a.safetensors", tiny)
    shutil.copy(tiny, "base.safetensors")           # written by Diff2Flow
    shutil.copy(tiny, "other.ckpt")
    words = "a.safetensors --ckpt base.safetensors --out "
    before = files_and_bytes()
    assert "that is --ckpt, which is never overwritten" in refusal(merge, words + "./base.safetensors")
    assert "that is the LoRA, which is never overwritten" in refusal(merge, words + "a.safetensors")
    assert files_and_bytes() == before
    Path("other.safetensors").write_bytes(b"another program's")
    assert "other.safetensors exists already" in refusal(merge, words + "other.safetensors")
    works(merge, words + "new.safetensors")
    works(merge, words + "new.safetensors")
    assert metadata("new.safetensors")["software"] == SOFTWARE


def test_a_run_refuses_a_folder_of_other_files_and_takes_one_of_a_run_killed_before_its_first_save(tiny):
    save_photos("photos")
    words = SHORT + "--lora 2 --preview-every 1 --steps 1 --out "
    before = files_and_bytes()
    assert "--out photos: it contains boat.jpg, which is not a file of a run" in refusal(
        train, words + "photos --data photos")
    assert files_and_bytes() == before
    Path("run").mkdir()
    save_photo("run/step_000001.png")
    assert "step_000001.png exists already" in refusal(train, words + "run")
    os.unlink("run/step_000001.png")
    Path("run/.DS_Store").touch()                       # Finder has shown the folder
    works(train, words + "run")
    os.unlink("run/state.safetensors")
    works(train, words + "run")
    assert call(train, words + "run").code == 2         # it has saved
    assert "step 1: 25 Euler steps" in making("run/step_000001.png") and making("run/before_after.png")
