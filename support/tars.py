"""train.py --data "laion/{00000..00099}.tar": pictures with captions in WebDataset tars."""
import itertools
import os
import random
import sys
import tarfile

from torch.utils.data import IterableDataset, get_worker_info

from data import SUFFIXES, Keys, hash_of_name, open_rgb, progress, random_crop
from support.files import from_json
from support.processes import rank_and_count


def find_tars(patterns):
    """Paths with braces, as in {00000..00099} -> the paths of all tars. ValueError for a missing or truncated tar."""
    try:
        import webdataset  # noqa: F401  needed by Tars
        from braceexpand import braceexpand
        tars = [path for pattern in patterns for path in braceexpand(pattern)]
    except ImportError:
        raise ValueError(f"{patterns[0]}: reading tars takes webdataset: pip install webdataset") from None
    except ValueError as error:         # unbalanced braces
        raise ValueError(f"{error}; tars are given as 'FOLDER/{{00000..00099}}.tar'") from None
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


def read_sample(sample):
    """{suffix: bytes} of one name in a tar -> RGB image, and the caption from .txt, else from .json, else ""."""
    suffix = next((suffix for suffix in SUFFIXES if suffix[1:] in sample), None)
    if suffix is None:
        raise ValueError("no picture")
    image = open_rgb(sample["__key__"] + suffix, sample[suffix[1:]])
    if "txt" in sample:
        return image, sample["txt"].decode().strip()
    return image, str(from_json(sample.get("json", "{}")).get("caption") or "").strip()


def name_of(sample):
    """-> tar and key of a sample, in words."""
    return f"{sample['__url__']}, {sample['__key__']}"


class Tars(IterableDataset):
    """Pictures in tars as img2dataset writes them: KEY.jpg with KEY.txt, or with a "caption" in KEY.json. Items like
    those of ImageFolder. No other files in the tars are read.

    Every pass shuffles the tars, shares them among processes and DataLoader workers, and mixes the pictures of each
    share. The order depends on the seed, the step `start` at which the run starts or resumes, and the numbers of
    processes and workers.
    """
    BUFFER = 500    # pictures in the shuffle buffer

    def __init__(self, patterns, height, width, seed=0):
        self.tars, self.height, self.width, self.seed = find_tars(patterns), height, width, seed
        self.start, self.reported, self.held_out = 0, set(), set()
        self.rank, self.ranks = rank_and_count()
        if len(self.tars) < self.ranks:
            raise ValueError(f"{patterns[0]}: {len(self.tars)} tars for {self.ranks} processes: each needs one")
        self.words = f"{len(self.tars):,} tars, first {self.tars[0]} (in another order after --resume)"

    def hold_out(self, n):
        """Take up to n pictures out: at most a tenth of the first 30 n, chosen by a hash of their keys -> n items of
        them, and words for what they are. If that is none, the items are training pictures."""
        def first():
            return itertools.islice((sample for tar in self.tars for sample in self.samples(tar)), 30 * n)

        seen, chosen = 0, []
        for sample in first():
            seen += 1
            if len(chosen) < n and int(hash_of_name(sample["__key__"]), 16) % 10 == 0:
                chosen.append(sample)
        chosen = chosen[:seen // 10]
        items, self.held_out = self.read_items(chosen, n), {name_of(sample) for sample in chosen}
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
        from webdataset import shuffle
        worker, n = get_worker_info(), len(self.tars)
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.rank * workers + number, self.ranks * workers
        rng = random.Random(f"{self.seed} {self.start} {reader}")
        keys = Keys(n, self.seed, self.start * n, sys.maxsize, 1, reader, readers)
        for _, keys_of_pass in itertools.groupby(keys, lambda key: key // n):
            samples = (sample for key in keys_of_pass for sample in self.samples(self.tars[key % n]))
            samples = (sample for sample in samples if name_of(sample) not in self.held_out)
            yield from self.items(shuffle(self.BUFFER, rng=rng)(samples), rng)

    def samples(self, tar):
        """Yield {suffix: bytes} of each name in a tar, reading pictures and captions alone."""
        from webdataset import tarfile_samples
        try:
            yield from tarfile_samples([{"url": tar}], select_files=lambda name: name.lower().endswith(
                (*SUFFIXES, ".txt", ".json")))
        except (tarfile.TarError, ValueError):
            self.warn_once(tar, "damaged, the rest of it")

    def items(self, samples, rng):
        """Yield an item for each sample that can be read."""
        for sample in samples:
            try:
                image, caption = read_sample(sample)
            except (ValueError, AttributeError) as error:       # AttributeError: a .json that is no {"caption": ...}
                self.warn_once(name_of(sample), f"{error},")
                continue
            yield {"image": random_crop(image, self.height, self.width, rng), "caption": caption}

    def warn_once(self, what, why):
        if what not in self.reported:
            print(f"warning: {what}: {why} is skipped", file=sys.stderr)
        self.reported.add(what)
