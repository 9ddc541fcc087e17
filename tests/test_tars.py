"""support/tars.py: pictures with captions in tars."""
import hashlib
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import train
from data import ImageFolder
from support.tars import Tars, expand, samples_in
from tests import runs
from tests.runs import SHORT, picture_bytes, save_photo, save_shards, save_tar, trained_captions, works

tiny, at_work = runs.tiny, runs.at_work
pytestmark = pytest.mark.usefixtures("at_work")
ALL = {f"picture {i}" for i in range(20)}


def shards(folder, **options):
    return Tars([f"{folder}/{{00000..00004}}.tar"], 8, 12, **options)


def captions(items, n):
    return [item["caption"] for item in islice(items, n)]


def test_tars_give_each_picture_with_its_caption(tmp_path):
    save_shards(tmp_path)
    tars = shards(tmp_path)
    assert len(tars.tars) == 5
    for item in islice(tars, 20):
        number = int(item["caption"].split()[1])
        assert item["image"].shape == (3, 8, 12) and (item["image"] == 2 * number).all()


def test_tars_hold_what_webdataset_reads_in_them(tmp_path):
    import webdataset
    save_shards(tmp_path, tars=2)
    with webdataset.TarWriter(f"{tmp_path}/00002.tar", encoder=False) as writer:
        writer.write({"__key__": "deep/a", "png": picture_bytes(99), "txt": b"picture 99"})
    theirs = {(sample["__key__"], sample["png"], sample["txt"])
              for sample in webdataset.WebDataset(f"{tmp_path}/{{00000..00002}}.tar", shardshuffle=False)}
    ours = set()
    for sample in (sample for i in range(3) for sample in samples_in(f"{tmp_path}/0000{i}.tar")[0]):
        content = Path(sample.tar).read_bytes()
        ours.add((sample.key, *(content[member.start:member.start + member.size]
                                for member in (sample.picture, sample.caption))))
    assert ours == theirs and len(ours) == 9


def test_a_pass_has_every_picture_once_in_an_order_that_depends_on_seed_start_and_pass(tmp_path):
    save_shards(tmp_path)
    passes = captions(shards(tmp_path), 60)
    passes = [passes[:20], passes[20:40], passes[40:]]
    assert all(set(one) == ALL for one in passes) and passes[0] == captions(shards(tmp_path), 20)
    late = shards(tmp_path)
    late.start = 7
    orders = [*passes, captions(late, 20), captions(shards(tmp_path, seed=1), 20)]
    assert len({tuple(order) for order in orders}) == 5 and set(orders[3]) == ALL


@pytest.mark.parametrize("ranks, workers", [(1, 2), (2, 0), (2, 2), (4, 0)])
def test_processes_and_their_workers_share_a_pass_without_overlap(tmp_path, ranks, workers, monkeypatch):
    save_shards(tmp_path, tars=4)
    seen = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))                       # as torchrun does
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        tars = Tars([f"{tmp_path}/{{00000..00003}}.tar"], 8, 12)
        batches = DataLoader(tars, 1, num_workers=workers)          # one picture from each worker in turn
        seen += [batch["caption"][0] for batch in islice(batches, 16 // ranks)]
    assert sorted(seen) == sorted(f"picture {i}" for i in range(16))


def test_pictures_of_tars_are_cropped_and_flipped_at_random(tmp_path):
    save_photo(tmp_path / "a.jpg", 48, 96)
    save_tar(tmp_path / "a.tar", {"a.jpg": (tmp_path / "a.jpg").read_bytes()})
    crops = [item["image"] for item in islice(Tars([str(tmp_path / "a.tar")], 32, 32), 20)]
    assert not any(torch.equal(crops[0], crop) for crop in crops[1:])


def test_tars_may_have_jpg_png_and_webp_with_captions_in_json_and_no_other_file_is_read(tmp_path, capsys):
    save_tar(tmp_path / "a.tar", {
        "0.jpg": picture_bytes(9, "JPEG"), "0.json": b'{"caption": " a boat "}', "0.pyd": b"a pickle", "0.pth": b"too",
        "1.PNG": picture_bytes(9), "1.json": b'{"caption": null}',
        "deep/2.webp": picture_bytes(9, "WEBP"), "deep/2.txt": "\ufeffBlüte\n".encode()})
    assert captions(Tars([str(tmp_path / "a.tar")], 8, 8).hold_out(3)[0], 3) == ["a boat", "", "Blüte"]
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/a.tar: 3 pictures; 2 of other kinds: 1 .pyd, 1 .pth (first 0.pth)\n"
        f"warning: 1 of 3 validation pictures (tars from {tmp_path}/a.tar on) are without a caption\n")
    tars = Tars([str(tmp_path / "a.tar")], 8, 8, default="a cat")
    assert captions(tars.hold_out(3)[0], 3) == ["a boat", "a cat", "Blüte"]
    assert f"first {tmp_path}/a.tar with 3 pictures" in tars.words


@pytest.mark.parametrize("order", [
    ["2024.01.05.png", "2024.01.05.txt", "2024.01.06.png", "2024.01.06.txt", "a.png", "a.txt"],
    ["2024.01.05.png", "2024.01.06.png", "a.png", "a.txt", "2024.01.06.txt", "2024.01.05.txt"],
    ["a.txt", "2024.01.06.txt", "2024.01.05.txt", "2024.01.05.png", "2024.01.06.png", "a.png"]],
    ids=["dots", "captions last", "captions first"])
def test_a_key_ends_at_the_last_dot_and_a_caption_may_be_anywhere_in_the_tar(tmp_path, order, capsys):
    contents = {name: Path(name).stem.encode() if name.endswith("txt") else picture_bytes(9) for name in order}
    save_tar(tmp_path / "a.tar", contents)
    assert sorted(captions(Tars([str(tmp_path / "a.tar")], 8, 8), 3)) == ["2024.01.05", "2024.01.06", "a"]
    assert capsys.readouterr().err == ""


def test_damaged_pictures_and_the_rest_of_a_damaged_tar_are_skipped_with_one_warning_each(tmp_path, capsys):
    save_tar(tmp_path / "a.tar", {"0.png": picture_bytes(0)[:40], "1.png": picture_bytes(1), "1.txt": b"good",
                                  "2.png": picture_bytes(2), "2.txt": b"\xff", "3.png": picture_bytes(3),
                                  "3.json": b"[1]", "4.txt": b"alone", "__MACOSX/._1.png": b"", "5.gif": b"GIF89a"})
    save_tar(tmp_path / "b.tar", {"6.png": picture_bytes(6), "6.txt": b"too", "7.png": picture_bytes(7)})
    content = bytearray((tmp_path / "b.tar").read_bytes())
    content[content.index(b"7.png") + 148] = 0xff                       # in its header's checksum
    (tmp_path / "b.tar").write_bytes(content)
    tars = Tars([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], 8, 8)
    assert set(captions(tars, 6)) == {"good", "too"}
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == [
        f"{tmp_path}/a.tar", *(f"{tmp_path}/a.tar, {name}" for name in ("0.png", "2.png", "3.png", "5.gif")),
        f"{tmp_path}/b.tar"]
    error = "".join(lines)
    assert "0.png: not a picture, or damaged" in error and "1 captions without an image (first 4.txt)" in error
    assert "1 hidden or thumbnails (first __MACOSX/._1.png)" in error
    assert "b.tar: 1 pictures; 1 damaged part, at which reading stops" in error


def test_a_header_of_a_huge_length_is_a_damaged_part(tmp_path, capsys):
    save_shards(tmp_path, tars=1)
    content = (tmp_path / "00000.tar").read_bytes()
    for kind in b"x", b"L", b"g":
        header = tarfile.TarInfo("a").tobuf()
        header = header[:124] + b"\x80" + (2**62).to_bytes(11, "big") + header[136:156] + kind + header[157:]
        header = header[:148] + b"        " + header[156:]
        header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
        (tmp_path / "huge.tar").write_bytes(content[:512 * 6] + header + content[512 * 6:])
        samples, left_out = samples_in(str(tmp_path / "huge.tar"))
        assert len(samples) == 1 and "1 damaged part" in str(left_out)


def test_tars_that_are_emptied_while_a_run_reads_them_are_an_error(tmp_path):
    save_shards(tmp_path)
    items = iter(shards(tmp_path))
    assert captions(items, 20)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="00000.tar: no picture in 5 tars can be read any more"):
        next(items)


@pytest.mark.parametrize("pattern, paths", [
    ("a/{08..11}.tar", ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]), ("{9..8}{a,b}", ["9a", "9b", "8a", "8b"]),
    ("a{1..", ["a{1.."]), ("{}.tar", ["{}.tar"])])
def test_braces_stand_for_the_paths_that_a_shell_makes_of_them(pattern, paths):
    assert expand(pattern) == paths


@pytest.mark.parametrize("pattern", ["{0..1}" * 1000, "{0..999999999}", "{a,b}" * 40])
def test_a_pattern_of_too_many_tars_is_refused_at_once(pattern):
    with pytest.raises(ValueError, match="its braces stand for more than 1,000,000 tars"):
        expand(pattern + ".tar")


def test_an_error_names_a_tar_that_is_missing_empty_truncated_or_without_a_picture(tmp_path, monkeypatch):
    save_shards(tmp_path)
    whole = (tmp_path / "00003.tar").read_bytes()
    for content in b"", b"no tar", bytes(10240), whole[:3000], whole[:1536]:
        (tmp_path / "00003.tar").write_bytes(content)
        with pytest.raises(ValueError, match="00003.tar: empty, truncated, or not a tar"):
            shards(tmp_path)
    (tmp_path / "00003.tar").unlink()
    with pytest.raises(ValueError, match="00003.tar: no such file"):
        shards(tmp_path)
    save_tar(tmp_path / "a.tar", {"0.txt": b"alone"})
    with pytest.raises(ValueError, match="a.tar: no picture in 1 tars"):
        Tars([str(tmp_path / "a.tar")], 8, 8).hold_out(1)
    with pytest.raises(ValueError, match=r"or its tars: .*\*.tar"):
        ImageFolder(tmp_path, 8, 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="1 tars for 2 processes"):
        Tars([str(tmp_path / "a.tar")], 8, 8)


# ------------------------------------------------------------------ held-out pictures

def is_chosen(number):
    """Whether the hash of a picture's key puts it into the tenth that may be held out."""
    return int(hashlib.sha256(f"{number:09d}".encode()).hexdigest(), 16) % 10 == 0


def test_held_out_pictures_are_chosen_by_a_hash_of_their_keys_and_never_trained_on(tmp_path):
    save_shards(tmp_path, tars=5, pictures=12)
    chosen = [i for i in range(60) if is_chosen(i)]
    assert len(chosen) == 6
    for n, count in (1, 1), (4, 4), (16, 6):
        tars = shards(tmp_path)
        items, words = tars.hold_out(n)
        held_out = [f"picture {i}" for i in chosen[:count]]
        assert words == f"{count} held-out pictures" and [item["caption"] for item in items] == (16 * held_out)[:n]
        assert sorted(captions(tars, 60 - count)) == sorted({f"picture {i}" for i in range(60)} - set(held_out))


def test_held_out_pictures_of_tars_have_the_same_crops_for_every_seed(tmp_path):
    save_photo(tmp_path / "a.png", 16, 32)
    save_tar(tmp_path / "a.tar", {f"{i:09d}.png": (tmp_path / "a.png").read_bytes() for i in range(20)})
    one, two = (Tars([str(tmp_path / "a.tar")], 8, 8, seed).hold_out(2)[0] for seed in (0, 1))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, two)) and len(one) == 2


def test_a_new_tar_does_not_change_whether_another_tars_picture_may_be_held_out(tmp_path):
    save_shards(tmp_path, tars=5, pictures=12)
    before = {item["caption"] for item in Tars([f"{tmp_path}/0000{i}.tar" for i in (0, 2, 4)], 8, 8).hold_out(16)[0]}
    after = {item["caption"] for item in shards(tmp_path).hold_out(16)[0]}
    chosen = [f"picture {i}" for i in range(60) if is_chosen(i) and i // 12 in (0, 2, 4)]
    assert len(chosen) == 4 and before == set(chosen[:3]) and before < after        # a tenth of 36 is 3


def test_opening_tars_reads_at_most_30_pictures_for_each_held_out_one(tmp_path):
    save_shards(tmp_path, tars=5, pictures=12)
    tars, read = shards(tmp_path), []
    plain = tars.samples
    tars.samples = lambda tar: (read.append(sample.key) or sample for sample in plain(tar))
    assert tars.hold_out(1)[0][0]["caption"] == "picture 9" and len(read) == 30


def test_with_fewer_than_ten_pictures_in_tars_none_is_held_out_and_the_words_say_so(tmp_path):
    save_shards(tmp_path, tars=5, pictures=1)
    tars = shards(tmp_path)
    items, words = tars.hold_out(7)
    assert words.startswith("training pictures") and [item["caption"][-1] for item in items] == list("0123401")
    assert sorted(captions(tars, 5)) == [f"picture {i}" for i in range(5)]


def test_training_on_tars_leaves_held_out_pictures_out_before_and_after_a_resume():
    save_shards("shards")
    words = SHORT + "--steps 12 --lora 2 --data 'shards/{00000..00004}.tar' --save-every 6 --out run"
    out, seen = trained_captions(words)
    assert seen and set(seen) <= ALL - {"picture 9", "picture 19"}
    assert (f"data: 5 tars, first {Path.cwd()}/shards/00000.tar with 4 pictures (in another order after --resume), "
            "32x32; ") in out
    assert "validation: 2 held-out pictures\n" in out
    again, seen = trained_captions("--resume run --steps 24")
    assert len(seen) == 24 and set(seen) <= ALL - {"picture 9", "picture 19"} and "warning" not in again
    words = words.replace("'shards/{00000..00004}.tar'", "shards/00000.tar shards/00003.tar")
    works(train, words.replace("--out run", "--out two"))
