"""support/cache.py: --cache encodes each picture and each caption once, for all steps and runs."""
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import data
import train
from data import ImageFolder
from model import StableDiffusion
from support import cache, lock
from support.checkpoint import load_checkpoint, save_checkpoint
from tests import runs
from tests.runs import SHORT, call, refusal, rows_of, same, save_photo, save_photos, works

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
CACHED = SHORT + "--caption-dropout 0.5 --lora 2 --data photos "


def encoded(words):
    """Train -> how many pictures and how many captions were encoded for the cache."""
    counts, plain = [], cache.TensorFiles.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.TensorFiles, "write",
                      lambda files, *args: counts.append(len(files.shape)) or plain(files, *args))
        works(train, words)
    return counts.count(3), counts.count(2)


@pytest.mark.parametrize("words", ["--precision fp32", "--precision bf16", "--precision bf16 --lora none"])
def test_a_run_with_a_cache_equals_one_that_encodes_centre_crops_in_each_step(words, monkeypatch):
    def one_by_one(plain):
        return lambda sd, batch: torch.cat([plain(sd, batch[i:i + 1]) for i in range(len(batch))])
    save_photos("photos")
    plain = ImageFolder.hold_out
    for name in "encode", "encode_text":                # batched encoding differs in the last bits
        monkeypatch.setattr(StableDiffusion, name, one_by_one(getattr(StableDiffusion, name)))
    with monkeypatch.context() as patch:
        def then_centre_crops(images, n):               # the validation pictures keep their crops
            held_out = plain(images, n)
            patch.setattr(data, "random_crop", lambda image, *size_and_rng: (
                data.centre_crop(image, *size_and_rng[:2]), torch.zeros(6)))
            return held_out
        patch.setattr(ImageFolder, "hold_out", then_centre_crops)
        works(train, f"{CACHED} {words} --out live")
    assert encoded(f"{CACHED} {words} --cache cache --out cached") == (3, 4)
    assert same("live/state.safetensors", "cached/state.safetensors")
    assert rows_of("live/validation.jsonl") == rows_of("cached/validation.jsonl")


def test_a_second_run_reads_the_cache_and_encodes_only_what_has_changed(tiny, monkeypatch):
    save_photos("photos")
    works(train, CACHED + "--cache cache --out 0")
    images, plain = [], StableDiffusion.encode
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "encode", lambda sd, batch: images.extend(batch) or plain(sd, batch))
        assert encoded(CACHED + "--cache cache --seed 1 --objective fm --out 1") == (0, 0)
        assert encoded("--resume 1 --steps 5") == (0, 0)
    assert len(images) == 2 * 2                                     # the validation pictures of both
    Path("photos/boat.txt").write_text("a blue boat")
    assert encoded(CACHED + "--cache cache --out 2") == (0, 1)
    shutil.copy("photos/tree.jpg", "photos/copy.jpg")
    save_photo("photos/roof.jpg", seed=9)
    assert encoded(CACHED + "--cache cache --out 3") == (1, 0)         # the copy has the empty caption, which is cached
    assert encoded(CACHED + "--cache cache --size 32 48 --out 4") == (4, 0)
    assert encoded(CACHED + "--cache cache --precision bf16 --out 5") == (4, 4)
    for name, weight in ("vae", "first_stage_model.encoder.conv_in.bias"), ("text", "token_embedding.weight"):
        sd = load_checkpoint(tiny)
        next(value for key, value in sd.state_dict().items() if key.endswith(weight))[0] += 1
        save_checkpoint(sd, f"{name}.safetensors")
    assert encoded(CACHED + "--cache cache --ckpt vae.safetensors --out 6") == (4, 0)
    assert encoded(CACHED + "--cache cache --ckpt text.safetensors --out 7") == (0, 4)


def test_a_cache_that_only_a_resumed_runs_state_names_is_read_but_not_written_to():
    save_photos("photos")
    works(train, CACHED + "--cache cache --out run")
    save_photo("photos/more.jpg", seed=9)
    before = sorted(Path("cache").rglob("*"))
    line = refusal(train, "--resume run --steps 5")
    assert "cache: 1 pictures and 0 captions are not in it, and it is only read, unless --cache is passed again" in line
    assert sorted(Path("cache").rglob("*")) == before
    assert encoded("--resume run --steps 5 --cache cache") == (1, 0)
    Path("cache").rename("moved")
    assert "cache: no such file or folder; if the files of the run have" in refusal(train, "--resume run --steps 6")
    assert encoded("--resume run --steps 6 --cache moved") == (0, 0)


def test_half_written_files_of_a_killed_process_are_removed_from_the_cache_unless_another_one_uses_it():
    save_photos("photos")
    works(train, CACHED + "--cache cache --out 0")
    half = next(Path("cache").glob("*/*")).with_name(f"{'0' * 64}.partial.0123abcd.safetensors")
    for path in half, Path("cache/film.partial.mp4"):
        path.write_text("half")
    with lock.shared(Path("cache")):
        works(train, CACHED + "--cache cache --out 1")
        assert half.exists()
    works(train, CACHED + "--cache cache --out 2")
    assert not half.exists() and Path("cache/film.partial.mp4").exists()


def test_a_damaged_file_of_the_cache_is_encoded_again_with_a_warning():
    save_photos("photos")
    works(train, CACHED + "--cache cache --out 0")
    shutil.copytree("cache", "whole")
    paths = sorted(Path("cache").rglob("*.safetensors"))
    first, second, third, *_ = paths
    first.write_bytes(first.read_bytes()[:100])
    third.write_bytes(third.read_bytes()[:-1] + b"\x99")
    save_file({"tensor": torch.ones(3)}, second)
    result = call(train, CACHED + "--cache cache --out 1")
    assert result.code == 0 and f"{first}: cannot be read; truncated" in result.err
    assert f"{second}: the shape (3,) or the checksum is wrong" in result.err and f"{third}: the shape (" in result.err
    assert len(paths) == 3 + 4 and all(same(path, Path("whole", *path.parts[1:])) for path in paths)


def test_a_damaged_picture_is_left_out_of_the_cache():
    save_photos("photos")
    Path("photos/tree.jpg").write_bytes(Path("photos/tree.jpg").read_bytes()[:700])
    result = call(train, CACHED + "--cache cache --out 0")
    assert result.code == 0 and "tree.jpg: not a picture, or damaged" in result.err
    for name in "boat", "roof":
        Path(f"photos/{name}.jpg").write_bytes(Path("photos/tree.jpg").read_bytes())
    assert "none of the 3 images can be decoded" in refusal(train, CACHED + "--cache cache --out 1")
