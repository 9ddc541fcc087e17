"""train.py --data "laion/{00000..00099}.tar": pictures with captions in WebDataset tars."""
import io
import itertools
import math
import os
import random
import re
import sys
import tarfile
from typing import NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from data import Keys, hash_of_name, random_crop
from support.decode import SUFFIXES, open_rgb
from support.files import reading
from support.folders import LeftOut, is_hidden, parse_caption, progress, same_name, suffix_of
from support.processes import rank_and_count

MOST_TARS = 10**6


# ------------------------------------------------------------------ names of tars

def choices(piece):
    """A part of a path -> what it stands for: {a,b} and {00..99} for several strings, any other for itself."""
    if match := re.fullmatch(r"\{(\d{1,9})\.\.(\d{1,9})\}", piece):
        first, last = map(int, match.groups())
        width = max(map(len, match.groups())) if any(text.startswith("0") for text in match.groups()) else 0
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return [f"{number:0{width}d}" for number in numbers[:MOST_TARS + 1]]
    return piece[1:-1].split(",") if piece.startswith("{") and "," in piece else [piece]


def expand(pattern):
    """A path, perhaps with braces as in FOLDER/{00000..00099}.tar -> all paths that it stands for, as in a shell."""
    options = [choices(piece) for piece in re.split(r"(\{[^{}]*\})", pattern)]
    if math.prod(map(len, options)) > MOST_TARS:
        raise ValueError(f"--data {pattern[:80]}: its braces stand for more than {MOST_TARS:,} tars")
    return [pattern] if os.path.exists(pattern) else list(map("".join, itertools.product(*options)))


def find_tars(patterns):
    """Paths with braces -> the paths of all tars. ValueError for a missing or truncated tar."""
    tars = [path for pattern in patterns for path in expand(pattern)]
    for path in progress(tars, "looking at both ends of tars", unit="tar"):
        check_tar(path)
    return tars


def check_tar(path):
    """ValueError for a tar that is missing, empty or truncated: a complete one ends with 1024 zeros."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; tars are given as 'FOLDER/{{00000..00099}}.tar'")
    with open(path, "rb") as file:
        has_content = any(file.read(512))
        file.seek(-min(1024, os.path.getsize(path)), os.SEEK_END)
        if not has_content or any(file.read()):
            raise ValueError(f"{path}: empty, truncated, or not a tar: download it again, or leave it out")


# ------------------------------------------------------------------ what a tar contains

class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""
    name: str
    start: int
    size: int


class Sample(NamedTuple):
    """A picture in a tar, and its caption: KEY.jpg with KEY.txt, else KEY.json, else None."""
    tar: str
    key: str
    picture: Member
    caption: Member | None

    @property
    def name(self):
        return f"{self.tar}, {self.picture.name}"


class Headers(io.FileIO):
    """A file for tarfile, which reads as much at a time as a header asks for, be it petabytes: here at most 1 MiB."""

    def read(self, size=-1):
        return super().read(size if 0 <= size <= 2**20 else 2**20)


def members_of(tar):
    """Yield the Members of a tar. ValueError or OSError where it is damaged."""
    with Headers(tar) as file, reading(tar, "a tar"):
        with tarfile.open(fileobj=file, mode="r:") as members:
            size, end = os.path.getsize(tar), 0
            while (member := members.next()) is not None:
                members.members = []                    # tarfile would keep them all
                if member.offset_data <= end or member.offset_data + member.size > size:
                    raise ValueError(f"{member.name} ends outside of it")
                end = member.offset_data
                if member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
            file.seek(members.offset)
            if file.read(512) != bytes(512):            # tarfile takes a damaged header for the end
                raise ValueError(f"no file's header at byte {members.offset:,}")


def samples_in(tar):
    """-> the Samples of a tar in the order of the pictures, and LeftOut. The caption may be anywhere in the tar; a key
    ends at the last dot of a name."""
    pictures, captions, others, left_out = [], {}, [], LeftOut()
    try:
        for member in members_of(tar):
            suffix = suffix_of(member.name)
            if any(map(is_hidden, member.name.removeprefix("./").split("/"))):
                left_out.add("hidden or thumbnails", *[member.name] * (suffix in SUFFIXES))
            elif suffix in SUFFIXES:
                pictures.append(member)
            elif suffix in (".txt", ".json"):
                captions[same_name(os.path.splitext(member.name)[0]), suffix] = member
            else:
                others.append(member.name)
    except (ValueError, OSError) as error:
        left_out.add("damaged part, at which reading stops", str(error))
    samples = []
    for picture in pictures:
        key = os.path.splitext(picture.name)[0]
        found = [captions.get((same_name(key), suffix)) for suffix in (".txt", ".json")]
        samples.append(Sample(tar, key, picture, found[0] or found[1]))
    keys = {same_name(sample.key) for sample in samples}
    left_out.add_other_kinds(others)
    left_out.add("captions without an image", *(caption.name for (key, suffix), caption in captions.items()
                                                if suffix == ".txt" and key not in keys))
    return samples, left_out


def read_sample(sample):
    """-> RGB image and caption of a Sample. ValueError or OSError if either cannot be read."""
    def content(member):
        file.seek(member.start)
        return file.read(member.size)

    with open(sample.tar, "rb") as file:
        image, caption = open_rgb(sample.name, content(sample.picture)), ""
        if sample.caption is not None:
            caption = parse_caption(content(sample.caption).decode("utf-8-sig"), suffix_of(sample.caption.name))
    return image, caption


def mixed(samples, size, rng):
    """Yield the samples in a random order, by a buffer of `size` of them."""
    buffer = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) > size:
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


# ------------------------------------------------------------------ the data set

class Tars(IterableDataset):
    """Pictures in tars as img2dataset writes them: KEY.jpg with KEY.txt, or with a "caption" in KEY.json. Items like
    those of ImageFolder. No other files in the tars are read.

    Every pass shuffles the tars, shares them among processes and DataLoader workers, and mixes the pictures of each
    share. The order depends on the seed, the step `start` at which the run starts or resumes, and the numbers of
    processes and workers.
    """
    BUFFER = 500    # pictures in the shuffle buffer

    def __init__(self, patterns, height, width, seed=0, default=""):
        self.tars, self.height, self.width, self.seed = find_tars(patterns), height, width, seed
        self.default, self.start, self.reported, self.held_out = default, 0, set(), set()
        self.rank, self.ranks = rank_and_count()
        if len(self.tars) < self.ranks:
            raise ValueError(f"{patterns[0]}: {len(self.tars)} tars for {self.ranks} processes: each needs one")

    @property
    def words(self):
        first = self.tars[0]
        return (f"{len(self.tars):,} tars, first {first} with {len(self.samples(first)):,} pictures (in another order "
                "after --resume)")

    def hold_out(self, n):
        """Take up to n pictures out: at most a tenth of the first 30 n, chosen by a hash of their keys -> n items of
        them, and words for what they are. If that is none, the items are training pictures."""
        def first():
            return itertools.islice((sample for tar in self.tars for sample in self.samples(tar)), 30 * n)

        seen, chosen = 0, []
        for sample in first():
            seen += 1
            if len(chosen) < n and int(hash_of_name(sample.key), 16) % 10 == 0:
                chosen.append(sample)
        chosen = chosen[:seen // 10]
        items, self.held_out = self.read_items(chosen, n), {(sample.tar, sample.key) for sample in chosen}
        words = f"{len(items)} held-out pictures"
        if not items:
            items, words = self.read_items(first(), n), "training pictures, too few to hold any out"
        if not items:
            raise ValueError(f"{self.tars[0]}: no picture in {len(self.tars)} tars: they need KEY.jpg with KEY.txt, or "
                             "with a caption in KEY.json")
        uncaptioned = [item for item in items if not item["caption"]]
        if uncaptioned:
            print(f"warning: {len(uncaptioned)} of {len(items)} validation pictures (tars from {self.tars[0]} on) are "
                  "without a caption", file=sys.stderr)
        return [items[i % len(items)] for i in range(n)], words

    def read_items(self, samples, n):
        """-> up to n items of the samples, with the same crops in every run."""
        return list(itertools.islice(self.items(samples, random.Random(0)), n))

    def __iter__(self):
        worker, n = get_worker_info(), len(self.tars)
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.rank * workers + number, self.ranks * workers
        rng = random.Random(f"{self.seed} {self.start} {reader}")
        keys = Keys(n, self.seed, self.start * n, sys.maxsize, 1, reader, readers)
        without = set()                                 # tars read since the last picture
        for _, keys_of_pass in itertools.groupby(keys, lambda key: key // n):
            tars, count = [self.tars[key % n] for key in keys_of_pass], 0
            samples = (sample for tar in tars for sample in self.samples(tar)
                       if (sample.tar, sample.key) not in self.held_out)
            for item in self.items(mixed(samples, self.BUFFER, rng), rng):
                yield item
                count += 1
            without = set() if count else without | set(tars)
            if without == set(self.tars):
                raise ValueError(f"{self.tars[0]}: no picture in {n} tars can be read any more: were they moved, or "
                                 "emptied?")

    def samples(self, tar):
        """-> the Samples of a tar; prints in one warning what is left out."""
        samples, left_out = samples_in(tar)
        if left_out and tar not in self.reported:
            self.reported.add(tar)
            left_out.warn(f"{tar}: {len(samples):,} pictures")
        return samples

    def items(self, samples, rng):
        """Yield an item for each sample that can be read."""
        for sample in samples:
            try:
                image, caption = read_sample(sample)
            except (ValueError, OSError) as error:
                if sample.name not in self.reported:
                    self.reported.add(sample.name)
                    print(f"warning: {sample.name}: skipped ({error})", file=sys.stderr)
                continue
            image, sizes = random_crop(image, self.height, self.width, rng)
            yield {"image": image, "caption": caption or self.default, "sizes": sizes}
