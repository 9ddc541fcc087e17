"""storage.py: tars of pictures, and --cache, which encodes each picture and caption once."""
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import storage
import torch
from safetensors.torch import save_file
from storage import Tars
from torch.utils.data import DataLoader

import data
import train
from data import ImageFolder
from model import StableDiffusion, load_checkpoint
from tests import runs
from tests.runs import (
    SHORT,
    call,
    picture_bytes,
    refusal,
    rows_of,
    same,
    save_photo,
    save_photos,
    save_shards,
    save_tar,
    works,
)

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")


# ------------------------------------------------------------------ tars

def shards(folder, **options):
    return Tars([f"{folder}/{{00000..00004}}.tar"], 8, 12, **options)


def captions(items, n):
    return [item["caption"] for item in islice(items, n)]


ALL = {f"picture {i}" for i in range(20)}


def test_tars_give_each_picture_with_its_caption_in_the_range_of_photographs(tmp_path):
    save_shards(tmp_path)
    tars = shards(tmp_path)
    assert captions(tars.first(3), 9) == ["picture 0", "picture 1", "picture 2"] and len(tars.tars) == 5
    for item in islice(tars, 20):
        number = int(item["caption"].split()[1])
        assert item["image"].shape == (3, 8, 12) and torch.allclose(item["image"], torch.tensor(2 * number / 127.5 - 1))


def test_a_pass_over_tars_has_every_picture_once_in_an_order_by_seed_start_and_pass(tmp_path):
    save_shards(tmp_path)
    passes = captions(shards(tmp_path), 60)
    passes = [passes[:20], passes[20:40], passes[40:]]
    assert all(set(one) == ALL for one in passes) and passes[0] == captions(shards(tmp_path), 20)
    late = shards(tmp_path)
    late.start = 7
    orders = [*passes, captions(late, 20), captions(shards(tmp_path, seed=1), 20)]
    assert len({tuple(order) for order in orders}) == 5 and set(orders[3]) == ALL


@pytest.mark.parametrize("ranks, workers", [(1, 2), (2, 0), (2, 2), (4, 0)])
def test_processes_and_their_workers_share_a_pass_over_tars_without_overlap(tmp_path, ranks, workers):
    save_shards(tmp_path, tars=4)
    seen = []
    for rank in range(ranks):
        tars = Tars([f"{tmp_path}/{{00000..00003}}.tar"], 8, 12, rank=rank, ranks=ranks)
        batches = DataLoader(tars, 1, num_workers=workers)          # a picture of each worker in turn
        seen += [batch["caption"][0] for batch in islice(batches, 16 // ranks)]
    assert sorted(seen) == sorted(f"picture {i}" for i in range(16))


def test_pictures_of_tars_are_cropped_and_flipped_at_random(tmp_path):
    save_photo(tmp_path / "a.jpg", 48, 96)
    save_tar(tmp_path / "a.tar", {"a.jpg": (tmp_path / "a.jpg").read_bytes()})
    crops = [item["image"] for item in islice(Tars([str(tmp_path / "a.tar")], 32, 32), 20)]
    assert not any(torch.equal(crops[0], crop) for crop in crops[1:])


def test_tars_hold_jpg_png_and_webp_with_captions_in_json_too_and_nothing_else_is_opened(tmp_path, capsys):
    save_tar(tmp_path / "a.tar", {
        "0.jpg": picture_bytes(9, "JPEG"), "0.json": b'{"caption": " a boat "}', "0.pyd": b"a pickle", "0.pth": b"too",
        "1.PNG": picture_bytes(9), "1.json": b'{"caption": null}',
        "deep/2.webp": picture_bytes(9, "WEBP"), "deep/2.txt": "Blüte\n".encode()})
    assert captions(Tars([str(tmp_path / "a.tar")], 8, 8).first(9), 9) == ["a boat", "", "Blüte"]
    assert capsys.readouterr().err == f"warning: 1 of the first 3 pictures in {tmp_path}/a.tar are without a caption\n"


def test_what_is_damaged_in_a_tar_is_left_out_and_said_once(tmp_path, capsys):
    save_tar(tmp_path / "a.tar", {"0.png": picture_bytes(0)[:40], "1.png": picture_bytes(1), "1.txt": b"good",
                                  "2.png": picture_bytes(2), "2.txt": b"\xff", "3.png": picture_bytes(3),
                                  "3.json": b"[1]", "4.txt": b"alone"})
    save_tar(tmp_path / "b.tar", {"5.png": picture_bytes(5), "5.txt": b"too", "6.png": picture_bytes(6), "6.PNG": b""})
    tars = Tars([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], 8, 8)
    assert set(captions(tars, 6)) == {"good", "too"}
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == [
        *(f"{tmp_path}/a.tar, {key}" for key in "0234"), f"{tmp_path}/b.tar"]
    assert "0.png: cannot be read as a picture" in "".join(lines) and "4: no picture, is left out" in "".join(lines)


def test_a_tar_that_is_missing_empty_truncated_or_without_a_picture_is_named(tmp_path):
    save_shards(tmp_path)
    whole = (tmp_path / "00003.tar").read_bytes()
    for content in b"", b"no tar", bytes(10240), whole[:3000], whole[:1536]:
        (tmp_path / "00003.tar").write_bytes(content)
        with pytest.raises(ValueError, match="00003.tar: empty, truncated, or no tar"):
            shards(tmp_path)
    (tmp_path / "00003.tar").unlink()
    with pytest.raises(ValueError, match="00003.tar: no such file"):
        shards(tmp_path)
    save_tar(tmp_path / "a.tar", {"0.txt": b"alone"})
    with pytest.raises(ValueError, match="a.tar: no picture in 1 tars"):
        Tars([str(tmp_path / "a.tar")], 8, 8).first(1)
    with pytest.raises(ValueError, match="1 tars for 2 processes"):
        Tars([str(tmp_path / "a.tar")], 8, 8, ranks=2)
    with pytest.raises(ValueError, match=r"or its tars: .*\*.tar"):
        ImageFolder(tmp_path, 8, 8)


def test_tars_without_webdataset_say_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match="reading tars takes webdataset: pip install webdataset"):
        shards(tmp_path)


def test_tars_are_trained_on_with_their_first_pictures_held_out_and_a_resumed_run_says_what_repeats():
    save_shards("shards")
    words = SHORT + "--steps 2 --lora 2 --caption-dropout 0 --data 'shards/{00000..00004}.tar' --out run"
    with pytest.MonkeyPatch.context() as patch:
        prompts, plain = [], StableDiffusion.encode_text
        patch.setattr(StableDiffusion, "encode_text", lambda sd, words: prompts.append(words) or plain(sd, words))
        out = works(train, words)
    trained = [prompt for batch in prompts for prompt in batch if prompt not in ("", "picture 0", "picture 1")]
    assert ["picture 0", "picture 1"] in prompts and trained and set(trained) < {f"picture {i}" for i in range(20)}
    assert f"data: 5 tars, first {Path.cwd()}/shards/00000.tar, 32x32" in out
    again = works(train, "--resume run --steps 4")
    assert "after --resume, pictures come in another order, some of them again before" in again
    assert "warning" not in again
    works(train, words.replace("'shards/{00000..00004}.tar' --out run", "shards/00000.tar shards/00003.tar --out two"))


# ------------------------------------------------------------------ --cache

CACHED = SHORT + "--caption-dropout 0.5 --lora 2 --data photos "


def made(words):
    """Train -> how many pictures and captions went through the networks one by one, as those for --cache do."""
    counts = []
    plain = storage.Store.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.Store, "write",
                      lambda store, *what: counts.append(len(store.shape)) or plain(store, *what))
        works(train, words)
    return counts.count(3), counts.count(2)


@pytest.mark.parametrize("words", ["--precision fp32", "--precision bf16", "--precision bf16 --lora none"])
def test_a_run_with_a_cache_equals_one_that_encodes_the_centre_of_the_pictures_in_each_step(words, monkeypatch):
    def one_by_one(plain):
        return lambda sd, batch: torch.cat([plain(sd, batch[i:i + 1]) for i in range(len(batch))])
    save_photos("photos")
    with monkeypatch.context() as patch:                # the last bits of a result depend on the batch
        patch.setattr(data, "random_crop", lambda image, height, width, rng: data.centre_crop(image, height, width))
        patch.setattr(StableDiffusion, "encode", one_by_one(StableDiffusion.encode))
        patch.setattr(StableDiffusion, "encode_text", one_by_one(StableDiffusion.encode_text))
        works(train, f"{CACHED} {words} --out live")
    assert made(f"{CACHED} {words} --cache cache --out cached") == (3, 4)
    assert same("live/state.safetensors", "cached/state.safetensors")
    assert rows_of("live/validation.jsonl") == rows_of("cached/validation.jsonl")


def test_a_second_run_with_a_cache_reads_all_and_makes_what_has_changed(tiny, monkeypatch):
    save_photos("photos")
    works(train, CACHED + "--cache cache --out 0")
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "encode", lambda sd, images: pytest.fail("encoded"))
        works(train, CACHED + "--cache cache --seed 1 --objective fm --out 1")
        works(train, "--resume 1 --steps 5")
    Path("photos/boat.txt").write_text("a blue boat")
    assert made(CACHED + "--cache cache --out 2") == (0, 1)
    shutil.copy("photos/tree.jpg", "photos/copy.jpg")
    save_photo("photos/roof.jpg", seed=9)
    assert made(CACHED + "--cache cache --out 3") == (1, 0)         # the copy has no caption, the empty one is there
    assert made(CACHED + "--cache cache --size 32 48 --out 4") == (4, 0)
    assert made(CACHED + "--cache cache --precision bf16 --out 5") == (4, 4)
    for name, weight in ("vae", "first_stage_model.encoder.conv_in.bias"), ("text", "token_embedding.weight"):
        sd = load_checkpoint(tiny)
        next(value for key, value in sd.state_dict().items() if key.endswith(weight))[0] += 1
        sd.save(f"{name}.safetensors")
    assert made(CACHED + "--cache cache --ckpt vae.safetensors --out 6") == (4, 0)
    assert made(CACHED + "--cache cache --ckpt text.safetensors --out 7") == (0, 4)


def test_a_damaged_file_of_the_cache_is_said_and_made_again():
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
    assert f"{second}: a tensor of (3,), where (" in result.err and f"{third}: a tensor of (" in result.err
    assert len(paths) == 3 + 4 and all(same(path, Path("whole", *path.parts[1:])) for path in paths)


def test_a_picture_that_cannot_be_encoded_is_left_out_of_the_cache():
    save_photos("photos")
    Path("photos/tree.jpg").write_bytes(Path("photos/tree.jpg").read_bytes()[:700])
    result = call(train, CACHED + "--cache cache --out 0")
    assert result.code == 0 and "tree.jpg: cannot be read as a picture" in result.err
    for name in "boat", "roof":
        Path(f"photos/{name}.jpg").write_bytes(Path("photos/tree.jpg").read_bytes())
    assert "none of the 3 images can be decoded" in refusal(train, CACHED + "--cache cache --out 1")
