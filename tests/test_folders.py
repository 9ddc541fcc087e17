"""support/folders.py, support/decode.py: what is read of a folder, what is left out, and how a picture is decoded."""
import contextlib
import io
import json
import os
import shutil
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import sample
import train
from data import ImageFolder
from support import decode, folders
from support.depth_files import read_depth
from support.files import Stream, maker_of
from support.pictures import save_grid
from tests import runs
from tests.runs import FEW, SHORT, call, refusal, save_photo, save_photos, trained_captions, works

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
QUICK = SHORT + "--lora 2 --preview-every 0 --out run "


def captions_of(folder, **options):
    """-> {picture's name: caption} of a folder."""
    images = ImageFolder(folder, 8, 8, **options)
    return {Path(images.items[i][0]).name: images.caption(i) for i in range(len(images))}


def left_out(capsys):
    """-> {what: (count, first)} of the one warning that was printed, and the words before it."""
    line, = capsys.readouterr().err.splitlines()
    words, *parts = line.removeprefix("warning: ").split("; ")
    return words, {part.split(" ", 1)[1].split(" (first ")[0]: int(part.split(" ", 1)[0]) for part in parts}, line


# ------------------------------------------------------------------ what is left out

def test_one_warning_counts_what_is_left_out_by_kind_and_names_the_first(capsys):
    save_photos("ph")
    for name in "scan.tif", "drawing.gif", "web.avif", "saved.jfif":
        shutil.copy("ph/roof.jpg", f"ph/{name}")
    for name in "IMG_1.HEIC", "a.mov", "b.mov", "without", "notes.md", ".DS_Store", "._boat.jpg", "boat.partial.jpg":
        Path(f"ph/{name}").write_bytes(b"\0\0\0\x18ftypheic")
    for name in "@eaDir/boat.jpg/SMALL.jpg", ".ipynb_checkpoints/boat-checkpoint.jpg", "__MACOSX/boat.jpg":
        save_photo(f"ph/{name}")
    save_grid("ph/runs/step_000001.png", torch.zeros(1, 3, 8, 8), 1, "a test")
    Path("ph/broken.jpg").write_bytes(b"")
    Path("ph/story.png").write_text("no picture")
    Path("ph/boat.txt").write_text("")
    Path("ph/tree.txt").write_text("\ufeff \n")
    Path("ph/lost.txt").write_text("a lost boat")
    Path("ph/web.txt").symlink_to("/nowhere")
    os.mkfifo("ph/camera.jpg")
    Path("ph/metadata.jsonl").write_text('{"file_name": "roof.jpg", "text": "a roof"}\n'
                                         '{"file_name": "gone.jpg", "text": "gone"}')
    ImageFolder("ph", 8, 8)
    words, found, line = left_out(capsys)
    assert words == f"{Path.cwd()}/ph: 7 of 10 images read" and f"(first {Path.cwd()}/ph/IMG_1.HEIC)" in line
    assert found == {
        "hidden or thumbnails": 4, "half-written": 1, "pipes or devices": 1, "links to nowhere": 1,
        "of other kinds: 2 .mov, 1 .heic, 1 without a suffix": 4, "lines of metadata that name no file": 1,
        "images unreadable and skipped": 2, "pictures that Diff2Flow wrote, skipped": 1,
        "images without a caption": 4, "images with an empty caption": 2, "captions without an image": 1}


def test_an_error_says_what_was_there_if_nothing_is_left():
    for name in "a.heic", "b.CR2", ".hidden.jpg":
        save_photo("ph/x.jpg")
        os.rename("ph/x.jpg", f"ph/{name}")
    line = refusal(train, QUICK + "--data ph")
    assert "ph has no readable image: 1 hidden or thumbnails" in line and "2 of other kinds: 1 .heic, 1 .cr2" in line


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_pictures_that_we_wrote_are_not_trained_on_but_those_of_other_programs_are(name, capsys):
    save_grid(f"ph/{name}", torch.zeros(64, 3, 8, 8), 8, "a long description " * 1000, captions=["a"] * 64)
    from PIL.PngImagePlugin import PngInfo
    text = PngInfo()
    text.add_itxt("parameters", "a boat\nSteps: 20")
    Image.new("RGB", (8, 8)).save("ph/theirs.png", pnginfo=text)
    save_photo("ph/diff.webp")
    assert maker_of(f"ph/{name}") == "Diff2Flow" and set(captions_of("ph")) == {"theirs.png", "diff.webp"}
    assert len(folders.pictures_in("ph")) == 3                          # to be measured by tools.evaluate


# ------------------------------------------------------------------ captions

@pytest.mark.parametrize("name, content", [
    ("metadata.csv", 'file_name,other,text\nboat.jpg,1,"a red, ""big"" boat"\nsub/tree.jpg,2,a tree\n'),
    ("metadata.csv", '\ufefffile_name,text\r\nboat.jpg,"a red, ""big"" boat"\r\nsub\\tree.jpg,a tree\r\n'),
    ("metadata.jsonl", '{"file_name": "./boat.jpg", "text": "a red, \\"big\\" boat"}\n'
                       '{"file_name": "sub\\\\tree.jpg", "text": "a tree"}'),
    ("metadata.jsonl", '{"file_name": "HERE/ph/boat.jpg", "text": "a red, \\"big\\" boat"}\n'
                       '{"file_name": "HERE/ph/x/../sub/tree.jpg", "text": "a tree"}'),
    ("boat.json", '{"caption": "a red, \\"big\\" boat", "sub": 1}')],
    ids=["csv", "csv by Windows", "jsonl", "absolute names", "json beside it"])
def test_captions_are_read_as_other_programs_write_them(name, content, capsys):
    for picture in "ph/boat.jpg", "ph/sub/tree.jpg":
        save_photo(picture)
    Path("ph/sub/tree.json").write_text('{"caption": " a tree "}')
    Path(f"ph/{name}").write_text(content.replace("HERE", str(Path.cwd())), newline="")
    expected = {"boat.jpg": 'a red, "big" boat', "tree.jpg": "a tree"}
    assert captions_of("ph") == captions_of(Path.cwd() / "ph") == expected and not capsys.readouterr().err


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("how", ["jsonl", "txt"])
def test_a_name_matches_whether_its_accents_are_composed_or_not(form, other, how):
    name = unicodedata.normalize(form, "café")
    save_photo(f"ph/{name}.jpg")
    if how == "txt":
        Path("ph", unicodedata.normalize(other, "café.txt")).write_text("a café")
    else:
        entry = {"file_name": unicodedata.normalize(other, "café.jpg"), "text": "a café"}
        Path("ph/metadata.jsonl").write_text(json.dumps(entry))
    assert captions_of("ph") == {f"{name}.jpg": "a café"}


def test_a_picture_with_two_captions_is_counted(capsys):
    save_photos("ph")
    Path("ph/metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": text}) for name, text in (
        ("roof.jpg", "a roof"), ("roof.jpg", "the roof"), ("boat.jpg", "another"))))
    assert captions_of("ph") == {"boat.jpg": "a red boat", "roof.jpg": "the roof", "tree.jpg": "a tall tree"}
    assert left_out(capsys)[1] == {"with two captions in metadata, of which the last is used": 1,
                                   "images with two captions, of which the .txt file is used": 1}


@pytest.mark.parametrize("content", ["file_name;text\nboat.jpg;a boat", "file_name,text\nboat.jpg", "name,text\na,b",
                                     'file_name,text\nboat.jpg,"a'])
def test_an_error_names_a_broken_metadata_csv(content):
    save_photos("ph")
    Path("ph/metadata.csv").write_text(content)
    assert "ph/metadata.csv" in refusal(train, QUICK + "--data ph")


def test_captions_that_vanish_or_cannot_be_read_become_the_default_with_one_warning_each(capsys):
    save_photos("ph")
    Path("ph/metadata.jsonl").unlink()
    images = ImageFolder("ph", 8, 8, default="a photo")
    assert left_out(capsys)[1] == {"images without a caption, which get 'a photo'": 1}
    Path("ph/boat.txt").unlink()
    Path("ph/tree.txt").unlink()
    Path("ph/tree.txt").symlink_to("/nowhere")
    assert [images[key]["caption"] for key in range(6)] == ["a photo"] * 6
    first, second = capsys.readouterr().err.splitlines()
    assert "boat.txt: not a caption in UTF-8" in first and "tree.txt: not a caption" in second


@pytest.mark.parametrize("cache", ["", "--cache cache"])
def test_pictures_without_a_caption_are_trained_with_that_of_the_flag_also_after_a_resume(cache):
    save_photos("ph")
    Path("ph/metadata.jsonl").unlink()
    words = QUICK + f"--data ph {cache} --caption 'a photo of sks dog' --save-every 2"
    assert set(trained_captions(words)[1]) == {"a red boat", "a tall tree", "a photo of sks dog"}
    assert set(trained_captions("--resume run --steps 8")[1]) == {"a red boat", "a tall tree", "a photo of sks dog"}


@pytest.mark.parametrize("cache", ["", "--cache cache"])
def test_a_caption_with_a_lone_surrogate_is_trained_on(cache):
    save_photos("ph")
    Path("ph/metadata.jsonl").write_text('{"file_name": "roof.jpg", "text": "a \\ud800 roof"}')
    assert "a ? roof" in trained_captions(QUICK + f"--data ph {cache}")[1]


# ------------------------------------------------------------------ names, pipes, pictures that vanish

def test_names_that_are_no_utf_8_are_printed_escaped_and_the_run_goes_on():
    save_photos("ph")
    os.rename(b"ph/boat.jpg", b"ph/caf\xe9.jpg")
    os.rename(b"ph/boat.txt", b"ph/caf\xe9.txt")
    Path("ph/tree.jpg").write_bytes(Path("ph/tree.jpg").read_bytes()[:700])
    Path("ph/roof.jpg").unlink()
    assert set(captions_of("ph")) == {"caf\udce9.jpg", "tree.jpg"}
    works(train, QUICK + "--steps 1 --data ph")
    works(train, "--resume run --steps 2")


def test_what_an_output_cannot_encode_is_written_escaped():
    content = io.BytesIO()
    stream = Stream(io.TextIOWrapper(content, encoding="ascii", errors="strict"))
    print("caf\udce9 Blüte", file=stream, flush=True)
    assert content.getvalue() == b"caf\\udce9 Bl\\xfcte\n"


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo("camera.jpg")
    with pytest.raises(ValueError, match="camera.jpg: not a picture, or damaged .a pipe or a device"):
        decode.open_rgb("camera.jpg")


def test_a_picture_that_vanishes_is_left_out_with_a_warning(monkeypatch, capsys):
    save_photos("ph")
    images, plain = ImageFolder("ph", 8, 8), train.open_data
    monkeypatch.setattr(train, "open_data", lambda *args: (plain(*args), os.remove("ph/boat.jpg"))[0])
    result = call(train, QUICK + "--data ph --cache cache")
    assert result.code == 0 and "boat.jpg: not a picture, or damaged ([Errno 2]" in result.err
    assert {images[key]["caption"] for key in range(6)} == {"a roof", "a tall tree"}
    assert capsys.readouterr().err.count("boat.jpg: not a picture, or damaged ([Errno 2]") == 1


def test_a_damaged_picture_is_not_held_out():
    for i in range(30):
        save_photo(f"ph/{i}.png", 16, 16, seed=i)
        Path(f"ph/{i}.txt").write_text(str(i))
    before = [item["caption"] for item in ImageFolder("ph", 8, 8).hold_out(3)[0]]
    Path(f"ph/{before[0]}.png").write_bytes(Path(f"ph/{before[0]}.png").read_bytes()[:100])
    images = ImageFolder("ph", 8, 8)
    items, words = images.hold_out(3)
    after = [item["caption"] for item in items]
    assert after[:2] == before[1:] and after[2] not in before and words == "3 held-out pictures" and len(images) == 27


# ------------------------------------------------------------------ pictures

@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A picture that is EPS, and a `gs` on the path that leaves a file where it is run."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nDiff2Flow showpage\n")
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)              # it is looked for again
    return tmp_path / "a.png"


def test_a_picture_never_runs_another_program(ghostscript, tmp_path):
    for read in (decode.open_rgb, lambda path: decode.open_rgb(path, path.read_bytes()), decode.upright_size,
                 read_depth):
        with pytest.raises(ValueError, match="a.png: not "):
            read(ghostscript)
    assert decode.kind_of(ghostscript) == "unreadable" and maker_of(ghostscript) is None
    assert not (tmp_path / "was-run").exists()
    with Image.open(ghostscript) as picture, contextlib.suppress(OSError):
        picture.load()
    assert (tmp_path / "was-run").exists()                              # so the checks above could have failed


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_as_by_pillow_and_so_is_its_size(kind, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).resize((48, 32), Image.NEAREST).save(f"a.{kind}", exif=exif)
    with Image.open(f"a.{kind}") as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    assert np.array_equal(decode.open_rgb(f"a.{kind}"), upright)
    assert decode.upright_size(f"a.{kind}") == upright.size == ((48, 32) if orientation < 5 else (32, 48))


def tiff(*entries):
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif, is_turned", [
    (tiff(struct.pack("<HHII", 0x112, 3, 1, 6), struct.pack("<HHII", 0x11a, 2, 4, 0x41414141)), True),
    (tiff(struct.pack("<HHII", 0x112, 3, 1, 6), struct.pack("<HHII", 0x100, 9, 1, 2**32 - 1)), True),
    (b"XX*\0\x08\0\0\0", False), (tiff(struct.pack("<HHII", 0x112, 3, 1, 77)), False), (b"II*\0", False)],
    ids=["resolution is text", "a negative width", "no TIFF header", "orientation 77", "truncated"])
def test_broken_exif_data_lose_at_most_the_orientation(exif, is_turned, kind):
    Image.new("RGB", (48, 32)).save(f"a.{kind}", exif=b"Exif\0\0" + exif)
    size = (32, 48) if is_turned else (48, 32)
    assert decode.open_rgb(f"a.{kind}").size == decode.upright_size(f"a.{kind}") == size


def test_a_huge_jpeg_is_scaled_while_it_is_decoded_and_the_limit_of_others_is_named(monkeypatch):
    save_photo("a.jpg", 90, 121)
    save_photo("a.png", 90, 121)
    plain = decode.open_rgb("a.jpg")
    monkeypatch.setattr(decode, "LARGE", 3000)
    monkeypatch.setattr(decode, "LARGEST", 6000)
    small = decode.open_rgb("a.jpg")
    assert small.size == (61, 45)
    assert np.abs(np.asarray(small).astype(int) - plain.resize((61, 45), Image.BOX)).mean() < 6
    with pytest.raises(ValueError, match="a.png: 121x90 pixels, of at most 0 million, which only a JPEG may exceed"):
        decode.open_rgb("a.png")


def test_photographs_of_200_megapixels_are_within_the_limits():
    assert decode.LARGEST >= 2e8 and Image.MAX_IMAGE_PIXELS >= 16320 * 12240


def test_a_picture_of_too_many_pixels_for_memory_is_an_error_that_names_it(tmp_path):
    header = struct.pack("<2sIIIIiiHH6I", b"BM", 54, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6)
    (tmp_path / "bomb.bmp").write_bytes(header)
    with pytest.raises(ValueError, match="bomb.bmp: not a picture, or damaged .*3600000000 pixels"):
        decode.open_rgb(tmp_path / "bomb.bmp")


def test_sample_draws_the_captions_of_a_folder_by_relative_and_absolute_names():
    save_photo("ph/boat.jpg")
    Path("ph/metadata.jsonl").write_text(json.dumps({"file_name": f"{Path.cwd()}/ph/boat.jpg", "text": "a red boat"}))
    result = call(sample, FEW + "--cfg 1 --data ph")
    assert result.code == 0 and "warning" not in result.err
    assert Image.open("samples.png").info["parameters"].startswith("a red boat\n")
