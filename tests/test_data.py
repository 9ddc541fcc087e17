"""data.py, support/pairs.py, support/pictures.py: the order of items, folders of pictures, Reflow's pairs, and pictures
that are written."""
import hashlib
import json
import math
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import BucketKeys, ImageFolder, Keys, Memoised, to_floats
from support import folders
from support.files import save_tensors
from support.pairs import Pairs, read_pairs
from support.pictures import GridPlan, save_grid, save_picture, to_pil
from tests.runs import save_photo, save_photos


@pytest.fixture
def photos(tmp_path):
    """A folder of boat.jpg and tree.jpg with captions in .txt files, and of roof.jpg with one in metadata.jsonl."""
    save_photos(tmp_path / "photos")
    return tmp_path / "photos"


def damage(path):
    """Truncate a picture after its header."""
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


# ------------------------------------------------------------------ the order of the items

def test_each_epoch_and_each_seed_has_another_permutation_of_the_items():
    keys = list(Keys(7, 3, 0, 21))
    epochs = [keys[:7], keys[7:14], keys[14:]]
    assert [sorted(epoch) for epoch in epochs] == [[*range(7)], [*range(7, 14)], [*range(14, 21)]]
    orders = {tuple(key % 7 for key in epoch) for epoch in epochs} | {tuple(Keys(7, 4, 0, 7)), tuple(range(7))}
    assert len(orders) == 5


def test_the_order_of_the_keys_is_the_same_from_any_start_and_for_any_number_of_processes():
    whole = list(Keys(5, 3, 0, 36))
    for start, batch, ranks in (0, 1, 1), (4, 1, 1), (13, 1, 1), (12, 2, 3), (6, 3, 2):
        shares = [Keys(5, 3, start, 36, batch, rank, ranks) for rank in range(ranks)]
        batches = [[list(keys)[i:i + batch] for i in range(0, len(keys), batch)] for keys in shares]
        in_turn = [batch for turn in zip(*batches) for batch in turn]
        assert sum(in_turn, []) == whole[start:]


SHAPES = [(64, 64)] * 5 + [(48, 80)] * 9 + [(80, 48)]


def batches_of(keys, batch):
    """-> [(shape, items, keys)] of each batch, whose keys must be of one shape."""
    keys, found = list(keys), []
    for part in (keys[i:i + batch] for i in range(0, len(keys), batch)):
        shape, = {shape for shape, _ in part}
        found.append((shape, [key % len(SHAPES) for _, key in part], [key for _, key in part]))
    return found


def test_in_each_epoch_of_buckets_every_item_is_in_a_batch_of_its_shape_and_shapes_are_filled_up_with_other_crops():
    batches = batches_of(BucketKeys(SHAPES, 3, 0, 3 * 6 * 4, 4), 4)      # 2 + 3 + 1 batches of four
    epochs = [batches[:6], batches[6:12], batches[12:]]
    for epoch in epochs:
        assert all(SHAPES[i] == shape for shape, items, _ in epoch for i in items)
        count = Counter(i for _, items, _ in epoch for i in items)
        assert sorted(count) == list(range(15)) and sum(count.values()) == 24 and count[14] == 4
        assert sorted(count[i] for i in range(5)) == [1, 1, 2, 2, 2]     # two batches of four have three to fill
    every = [key for batch in batches for key in batch[2]]
    assert len(set(every)) == len(every)
    assert len({tuple(map(tuple, (items for _, items, _ in epoch))) for epoch in epochs}) == 3
    assert len({shape for shape, *_ in epochs[0][:3]}) > 1 or len({shape for shape, *_ in epochs[1][:3]}) > 1


def test_batches_of_buckets_are_the_same_from_any_start_and_for_any_number_of_processes():
    whole = batches_of(BucketKeys(SHAPES, 3, 0, 4 * 20, 4), 4)
    for start, ranks in (0, 2), (3, 1), (7, 1), (6, 3):
        shares = [batches_of(BucketKeys(SHAPES, 3, 4 * start, 4 * 18, 4, rank, ranks), 4) for rank in range(ranks)]
        assert [batch for turn in zip(*shares) for batch in turn] == whole[start:18]


def test_shapes_have_about_the_same_area_in_multiples_that_the_unet_takes():
    assert data.shapes_around(512, 512, 64) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    for size in (512, 768), (768, 768), (64, 64):
        shapes = data.shapes_around(*size, 64 if max(size) > 64 else 8)
        assert size in shapes and len(shapes) > 2
        assert all(0.85 * size[0] * size[1] < h * w <= size[0] * size[1] and 0.5 <= h / w <= 2 for h, w in shapes)


def test_a_picture_gets_the_shape_that_is_nearest_to_its_own(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, (width, height) in {"a": (80, 79), "b": (120, 80), "c": (200, 50)}.items():
        Image.new("RGB", (width, height)).save(tmp_path / f"{name}.png")
    Image.new("RGB", (120, 80)).save(tmp_path / "d.jpg", exif=exif)
    images = ImageFolder(tmp_path, 64, 64)
    assert images.shapes(8) == [(64, 64), (48, 80), (48, 80), (80, 48)]
    assert images[(80, 48), 7]["image"].shape == (3, 80, 48) and images[7]["image"].shape == (3, 64, 64)


def test_a_memoised_item_is_prepared_once_for_all_epochs():
    prepared = []
    memoised = Memoised(["a", "b", "c"], lambda item: prepared.append(item) or item.upper())
    assert [memoised[key] for key in (2, 0, 5, 3, 1, 7)] == ["C", "A", "C", "A", "B", "B"]
    assert prepared == ["c", "a", "b"] and len(memoised) == 3


def test_a_loader_with_workers_gives_the_same_batches_as_one_without(photos):
    def batches(workers):
        return list(DataLoader(ImageFolder(photos, 24, 24), 2, sampler=Keys(3, 0, 1, 9), num_workers=workers))
    for here, there in zip(batches(0), batches(2)):
        assert torch.equal(here["image"], there["image"]) and here["caption"] == there["caption"]


def test_noise_depends_on_the_seed_and_the_pictures_number_alone():
    noise = data.noises(range(4), (4, 2, 3), seed=7)
    assert noise.dtype == torch.float32 and torch.equal(noise[2:], data.noises([2, 3], (4, 2, 3), seed=7))
    far = data.noises([1_000_008], (4, 2, 3), seed=0), data.noises([5], (4, 2, 3), seed=1)     # 1,000,003 + 5
    assert not torch.equal(*far) and not torch.equal(noise[0], data.noises([0], (4, 2, 3), seed=8)[0])
    many = data.noises(range(1000), (4, 2, 3), seed=0)
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


# ------------------------------------------------------------------ captions

def test_a_caption_is_read_from_its_text_file_else_from_metadata_jsonl(photos, capsys):
    (photos / "deep/er").mkdir(parents=True)
    shutil.copy(photos / "roof.jpg", photos / "deep/er/again.JPG")
    (photos / "tree.txt").write_text("\ufeffBlüte\r\n", encoding="utf-8")
    entries = {"file_name": "tree.jpg", "text": "not this"}, {"file_name": "roof.jpg", "text": " a roof "}
    (photos / "metadata.jsonl").write_text("\r\n\n".join(map(json.dumps, entries)))
    (photos / "deep/metadata.jsonl").write_text(json.dumps({"file_name": "er/again.JPG", "text": "again"}))
    images = ImageFolder(photos, 16, 24)
    assert [images.caption(i) for i in range(len(images))] == ["a red boat", "again", "a roof", "Blüte"]
    assert images[3]["caption"] == "Blüte" and images[3]["image"].shape == (3, 16, 24) and len(images) == 4
    assert images[3]["image"].dtype == torch.uint8      # from a DataLoader's workers: a quarter of the memory


@pytest.mark.parametrize("line", ["{", "[1]", '{"file_name": "a.jpg"}', "[" * 100_000])
def test_an_error_names_the_broken_line_of_metadata_jsonl(photos, line):
    with open(photos / "metadata.jsonl", "a") as file:
        file.write(line)
    with pytest.raises(ValueError, match="metadata.jsonl, line 2"):
        ImageFolder(photos, 16, 16)


def test_a_caption_that_is_not_utf_8_is_empty_with_one_warning(photos, capsys):
    (photos / "boat.txt").write_bytes("Blüte".encode("latin-1"))
    images = ImageFolder(photos, 16, 16)
    assert images[0]["caption"] == images[3]["caption"] == "" and images[1]["caption"] == "a roof"
    assert capsys.readouterr().err == (f"warning: {photos}/boat.txt is not UTF-8 text: save it again as UTF-8; until "
                                       "then its caption is ''\n")


# ------------------------------------------------------------------ lists of files

def test_opening_a_folder_reads_no_captions_and_only_the_first_bytes_of_images(photos, monkeypatch):
    for suffix in ".png", ".webp", ".bmp", ".gif", ".tif":
        save_photo(photos / f"more{suffix}")
    (photos / "metadata.jsonl").unlink()
    (photos / "boat.txt").write_text("a red and blue boat")
    (photos / "tree.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda path, **options: pytest.fail(f"{path} was opened"))
        patch.setattr(folders, "read_text", lambda path: pytest.fail(f"{path} was read"))
        images = ImageFolder(photos, 16, 16)
    assert len(images) == 8 and images[0]["caption"] == "a red and blue boat"


def test_an_image_whose_suffix_names_another_format_is_read(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    assert len(ImageFolder(tmp_path, 8, 8)) == 1


def test_files_are_listed_in_the_order_of_their_paths_and_links_are_followed_once(photos, tmp_path, capsys):
    for name in "a-b/1.jpg", "a/2.jpg", "a/deep/3.JPG", "a.b/4.png", "../other/5.jpg", "../other/deep/6.jpg":
        save_photo(photos / name)
    (photos / "a/file.jpg").symlink_to(photos / "boat.jpg")
    (photos / "0").symlink_to(photos / "a")                     # a folder has its own name rather than a link's
    (photos / "a/loop").symlink_to(photos)
    (photos / "z").symlink_to(tmp_path / "other")
    (tmp_path / "other/deep/loop").symlink_to(tmp_path / "other")
    names = ("a/2.jpg", "a/deep/3.JPG", "a/file.jpg", "a-b/1.jpg", "a.b/4.png", "boat.jpg", "roof.jpg", "tree.jpg",
             "z/5.jpg", "z/deep/6.jpg")
    assert folders.pictures_in(photos) == [photos / name for name in names] == sorted(photos / name for name in names)
    error = capsys.readouterr().err
    assert f"{photos}: 10 pictures; 3 links to folders that are read already (first {photos}/0)" in error


def test_a_progress_bar_shows_how_many_files_are_read(photos, monkeypatch, capsys):
    plain = folders.tqdm
    monkeypatch.setattr(folders, "tqdm", lambda *args, delay, **options: plain(*args, **options, mininterval=0))
    ImageFolder(photos, 16, 16)
    error = capsys.readouterr().err
    assert f"listing {photos}: 6file" in error and "reading the first bytes of images: 100%" in error


# ------------------------------------------------------------------ pictures

def test_a_picture_damaged_after_its_header_is_replaced_by_the_next_with_one_warning(photos, capsys):
    damage(photos / "boat.jpg")
    images = ImageFolder(photos, 16, 16)
    assert len(images) == 3 and images[0]["caption"] == images[3]["caption"] == "a roof"
    error = capsys.readouterr().err
    assert error.count("boat.jpg: not a picture, or damaged") == 1 and "1 of 3 so far" in error
    damage(photos / "tree.jpg")
    damage(photos / "roof.jpg")
    with pytest.raises(ValueError, match="none of the 3 images can be decoded"):
        images[0]


def test_a_folder_that_is_missing_a_file_or_empty_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, what in ("gone", "is missing"), ("file", "is a file"), ("empty", "has no readable image"):
        with pytest.raises(ValueError, match=f"{name} {what}"):
            ImageFolder(tmp_path / name, 16, 16)


def test_crop_and_flip_depend_on_the_seed_and_the_key_alone(photos):
    images, again = ImageFolder(photos, 48, 32, seed=5), ImageFolder(photos, 48, 32, seed=5)
    images[3]
    assert torch.equal(images[4]["image"], again[4]["image"])
    assert not torch.equal(again[4]["image"], again[7]["image"])                    # the same picture in the next epoch
    assert not torch.equal(again[4]["image"], ImageFolder(photos, 48, 32, seed=6)[4]["image"])


@pytest.mark.parametrize("height, width", [(64, 256), (256, 64)])
def test_about_half_of_the_pictures_are_flipped_and_crops_reach_both_edges(tmp_path, height, width):
    ramp = np.linspace(0, 255, 256)[None] if width == 256 else np.linspace(0, 255, 256)[:, None]
    pixels = (0.9 * np.broadcast_to(ramp, (height, width)) + 0.1 * np.linspace(0, 255, width)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ramp.png")
    images = ImageFolder(tmp_path, 64, 64)
    crops = [to_floats(images[epoch]["image"]) for epoch in range(100)]
    assert 30 < sum(bool(crop[0, 0, 0] > crop[0, 0, -1]) for crop in crops) < 70
    means = [crop.mean().item() for crop in crops]
    assert min(means) < -0.6 and max(means) > 0.5 and max(means) - min(means) > 1.2


def test_a_centre_crop_is_equally_far_from_both_edges():
    ramp = np.broadcast_to(np.linspace(0, 255, 256), (64, 256)).astype(np.uint8)
    for image in Image.fromarray(ramp).convert("RGB"), Image.fromarray(ramp.T.copy()).convert("RGB"):
        part = to_floats(data.centre_crop(image, 32, 32))
        assert part.shape == (3, 32, 32) and abs(part.mean()) < 0.01 and part.min() > -0.3 and part.max() < 0.3


def test_a_picture_is_scaled_down_with_antialiasing(tmp_path):
    checks = (np.indices((128, 256)).sum(0) % 2 * 255).astype(np.uint8)             # one-pixel checks average to grey
    Image.fromarray(checks).save(tmp_path / "checks.png")
    assert to_floats(ImageFolder(tmp_path, 32, 32)[0]["image"])[:, 2:-2, 2:-2].abs().max() < 0.15


def test_pictures_of_any_size_give_crops_of_any_size(tmp_path):
    for width, height in (1, 1), (1, 300), (999, 3), (333, 77), (101, 103):
        Image.new("RGB", (width, height), "red").save(tmp_path / f"{width}x{height}.png")
    for height, width in (8, 8), (49, 31), (33, 70), (1, 1):
        images = ImageFolder(tmp_path, height, width, seed=height)
        for i in range(len(images)):
            image = images[i]["image"]
            assert image.shape == (3, height, width) and (image[0] == 255).all() and (image[1:] == 0).all()


def pixel(folder, image, name="image.png", **options):
    """-> the colour of an image of one colour after saving and reading it."""
    image.save(folder / name, **options)
    colour = ImageFolder(folder, 8, 8)[0]["image"][:, 4, 4]
    (folder / name).unlink()
    return colour.tolist()


def test_transparent_pixels_become_white(tmp_path):
    assert pixel(tmp_path, Image.new("RGBA", (16, 16), (255, 0, 0, 128))) == [255, 127, 127]
    assert pixel(tmp_path, Image.new("LA", (16, 16), (10, 0))) == [255, 255, 255]
    palette = Image.new("P", (16, 16), 3)
    palette.putpalette([200, 0, 0] * 4)
    assert pixel(tmp_path, palette) == [200, 0, 0]
    assert pixel(tmp_path, palette, transparency=3) == [255, 255, 255]


def test_grey_16_bit_grey_and_cmyk_become_rgb_of_the_same_tones(tmp_path):
    assert pixel(tmp_path, Image.new("L", (16, 16), 77)) == [77, 77, 77]
    assert pixel(tmp_path, Image.fromarray(np.full((16, 16), 200 * 257, np.uint16))) == [200, 200, 200]
    cyan = pixel(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "image.jpg", quality=95)
    assert cyan[0] < 10 and cyan[1] > 245 and cyan[2] > 245


# ------------------------------------------------------------------ held-out pictures

def numbered_photos(folder, numbers):
    """Pictures a/0.png, b/1.png, a/2.png, ... whose captions are their numbers."""
    for i in numbers:
        save_photo(folder / "ab"[i % 2] / f"{i}.png", 16, 16, seed=i)
        (folder / "ab"[i % 2] / f"{i}.txt").write_text(str(i))


def held_out(folder, n, **options):
    """-> the captions of the different items that are held out, those of the rest, and in words what they are."""
    images = ImageFolder(folder, 8, 8, **options)
    items, words = images.hold_out(n)
    assert len(items) == n
    return {item["caption"] for item in items}, [images.caption(i) for i in range(len(images))], words


def test_a_tenth_of_the_pictures_is_held_out_by_a_hash_of_their_names(tmp_path):
    numbered_photos(tmp_path / "photos", range(30))
    by_hash = sorted(range(30), key=lambda i: hashlib.sha256(f"{'ab'[i % 2]}/{i}.png".encode()).hexdigest())
    for n, count in (16, 3), (3, 3), (2, 2), (1, 1):
        chosen, others, words = held_out(tmp_path / "photos", n)
        assert chosen == {str(i) for i in by_hash[:count]} and words == f"{count} held-out pictures"
        assert sorted(others) == sorted(str(i) for i in by_hash[count:])
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    assert held_out(tmp_path / "elsewhere", 16, seed=3)[0] == {str(i) for i in by_hash[:3]}


def test_a_new_picture_does_not_change_the_order_in_which_others_are_held_out(tmp_path):
    numbered_photos(tmp_path, range(30))
    before, _, _ = held_out(tmp_path, 16)
    for i in range(30, 39):
        numbered_photos(tmp_path, [i])
        after, _, _ = held_out(tmp_path, 16)
        assert len(after) == 3 and after - {str(i)} <= before
        before = after


def test_held_out_pictures_have_the_same_crops_for_every_seed(tmp_path):
    numbered_photos(tmp_path, range(30))
    one, two = (ImageFolder(tmp_path, 8, 8, seed).hold_out(5)[0] for seed in (0, 1))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, two))


def test_with_fewer_than_ten_pictures_none_is_held_out_and_the_words_say_so(tmp_path):
    numbered_photos(tmp_path, range(9))
    chosen, others, words = held_out(tmp_path, 4)
    assert words.startswith("training pictures") and chosen < set(others) == {str(i) for i in range(9)}
    numbered_photos(tmp_path, [9])
    chosen, others, words = held_out(tmp_path, 4)
    assert words == "1 held-out pictures" and len(chosen) == 1 and chosen.isdisjoint(others) and len(others) == 9


# ------------------------------------------------------------------ Reflow's pairs

def write_pairs(folder, number, n, settings):
    """Write a file of n pairs. All numbers of pair i's noise are i, and of its latent -i."""
    values = torch.arange(n).view(n, 1, 1, 1) + 4.0 * number
    tensors = {"noise": values.expand(n, 4, 2, 2).half(), "latent": -values.expand(n, 4, 2, 2).half()}
    prompts = [f"prompt {int(value)}" for value in values.flatten()]
    save_tensors(folder / f"pairs-{number:06d}.safetensors", tensors,
                 {"prompts": json.dumps(prompts), "about": json.dumps({"size": [16, 16], "cfg": 3} | settings)})


def test_pairs_are_numbered_across_files_and_the_last_ones_are_held_out(tmp_path):
    write_pairs(tmp_path, 0, 4, {})
    write_pairs(tmp_path, 1, 3, {})
    pairs = Pairs(tmp_path, validation=2)
    assert len(pairs) == 5 and pairs.settings == {"size": [16, 16], "cfg": 3}
    for key, i in (0, 0), (3, 3), (4, 4), (5, 0), (13, 3):
        pair = pairs[key]
        assert pair["caption"] == f"prompt {i}" and (pair["x0"] == i).all() and (pair["x1"] == -i).all()
    assert pairs.pair(6)["caption"] == "prompt 6" and pairs[0]["x0"].dtype == torch.float32
    with pytest.raises(ValueError, match="has 7 pairs, of which 7 are held out"):
        Pairs(tmp_path, validation=7)


def test_finished_batches_of_an_incomplete_file_are_read_and_no_pair_is_read_twice(tmp_path):
    for number, n, name in (0, 4, "000000.from-00000"), (1, 2, "000000.from-00004"), (2, 3, "000001"):
        write_pairs(tmp_path, number, n, {})
        (tmp_path / f"pairs-{number:06d}.safetensors").rename(tmp_path / f"pairs-{name}.safetensors")
    shutil.copy(tmp_path / "pairs-000001.safetensors", tmp_path / "pairs-000001.from-00002.safetensors")
    pairs = Pairs(tmp_path, validation=1)
    assert [pairs.pair(i)["x0"][0, 0, 0].item() for i in range(9)] == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert len(pairs) == 8


def test_a_file_whose_noise_latents_prompts_and_settings_do_not_match_is_an_error_that_names_it(tmp_path):
    path, about = tmp_path / "pairs-000000.safetensors", {"size": [16, 16], "cfg": 3}
    whole = {name: torch.zeros(2, 4, 2, 2).half() for name in ("noise", "latent")}
    broken = [(whole, ["a"], about), (whole, ["a", 5], about), (whole, ["a", "b"], {"size": [16, 16]}),
              (whole, ["a", "b"], []), (whole, ["a", "b"], about | {"size": ["16", 16]}),
              ({"noise": whole["noise"]}, ["a", "b"], about),
              (whole | {"latent": torch.zeros(1, 4, 2, 2).half()}, ["a", "b"], about),
              ({name: tensor.int() for name, tensor in whole.items()}, ["a", "b"], about)]
    for tensors, prompts, settings in broken:
        save_tensors(path, tensors, {"prompts": json.dumps(prompts), "about": json.dumps(settings)})
        with pytest.raises(ValueError, match="pairs-000000.safetensors: (not a complete file of pairs|cannot be read)"):
            Pairs(tmp_path, validation=1)
    whole["noise"] *= math.nan
    save_tensors(path, whole, {"prompts": '["a", "b"]', "about": json.dumps(about)})
    with pytest.raises(ValueError, match="pairs-000000.safetensors: pair 0 has NaN"):
        Pairs(tmp_path, validation=1)[0]


def test_pairs_of_different_settings_are_refused(tmp_path):
    write_pairs(tmp_path, 0, 4, {})
    write_pairs(tmp_path, 1, 4, {"cfg": 4})
    with pytest.raises(ValueError, match="pairs-000001.* other settings than those of .*pairs-000000"):
        Pairs(tmp_path, validation=1)


def test_a_truncated_or_foreign_file_of_pairs_is_an_error_that_names_it(tmp_path):
    write_pairs(tmp_path, 0, 4, {})
    path = tmp_path / "pairs-000000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="pairs-000000.safetensors: (not a complete file of pairs|cannot be read)"):
        read_pairs(path)
    save_tensors(path, {"weight": torch.ones(1)})
    with pytest.raises(ValueError, match="pairs-000000.safetensors: (not a complete file of pairs|cannot be read)"):
        Pairs(tmp_path, validation=1)
    with pytest.raises(ValueError, match="empty has no pairs-"):
        Pairs(tmp_path / "empty", validation=1)


# ------------------------------------------------------------------ pictures that are written

def test_a_saved_picture_is_read_back_exactly_and_values_are_clamped(tmp_path):
    pixels = torch.arange(256).view(1, 16, 16).expand(3, -1, -1)
    save_picture(tmp_path / "new/image.png", to_pil(pixels / 127.5 - 1), "a test")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new/image.png"))[..., 0], pixels[0].numpy())
    save_picture(tmp_path / "new/image.png", to_pil(torch.tensor([-7.0, 0.0, 7.0]).view(3, 1, 1).bfloat16()), "a test")
    assert Image.open(tmp_path / "new/image.png").getpixel((0, 0)) == (0, 128, 255)


def test_the_old_picture_stays_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    def half(picture, path, **about):
        path.write_text("half")
        raise OSError("disk full")
    save_photo(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError):
        save_picture(tmp_path / "a.png", to_pil(torch.zeros(3, 8, 8)), "a test")
    assert (tmp_path / "a.png").read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_a_grid_places_pictures_row_by_row_and_enlarges_small_ones(tmp_path):
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    save_grid(tmp_path / "grid.png", values.view(5, 1, 1, 1).expand(5, 3, 64, 64), 3, "a test")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[..., 0]
    assert grid.shape == (2 * 132 + 4, 3 * 132 + 4)
    assert [grid[68 + 132 * (i // 3), 68 + 132 * (i % 3)] for i in range(5)] == [0, 64, 128, 191, 255]


def test_a_grid_has_row_labels_at_the_left_and_captions_below_the_pictures(tmp_path):
    images = torch.ones(4, 3, 64, 64)
    save_grid(tmp_path / "bare.png", images, 2, "a test")
    save_grid(tmp_path / "full.png", images, 2, "a test", ["diff2flow", "fm"],
              ["a small red circle " * 9, "é", "", "x"])
    bare, full = (np.asarray(Image.open(tmp_path / f"{name}.png"))[..., 0] for name in ("bare", "full"))
    left, below = full.shape[1] - bare.shape[1], (full.shape[0] - bare.shape[0]) // 2
    assert left > 30 and below > 40
    row = 132 + below                                   # a picture of 128 pixels, its captions and a gap of 4
    assert (full[4:132, :left] < 100).any() and (full[4 + row:132 + row, :left] < 100).any()        # two labels
    assert (full[132:row, left:left + 132] < 100).any() and (full[132 + row:, left + 136:] < 100).any()     # "x"
    assert not (full[132 + row:, left:left + 132] < 100).any()                                      # the empty caption


@pytest.mark.parametrize("height, width", [(8, 8), (128, 16), (512, 8), (8, 512)])
def test_a_grid_of_narrow_pictures_has_readable_captions_that_do_not_overlap(tmp_path, height, width):
    captions = ["a small red circle " * 9, "x" * 500, "", "東京 " * 40]
    plan = GridPlan(4, height, width, 2, captions=captions)
    assert all(plan.font.getlength(line) <= plan.column + plan.gap for lines in plan.captions[:3] for line in lines)
    save_grid(tmp_path / "grid.png", torch.zeros(4, 3, height, width), 2, "a test", captions=captions)
    assert Image.open(tmp_path / "grid.png").size == plan.size
    xs, ys = zip(*map(plan.place, range(4)))
    assert xs[1] - xs[0] >= max(plan.width, 40) and ys[2] - ys[0] >= plan.height + 5 * plan.line
