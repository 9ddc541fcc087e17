"""train.py --cache FOLDER: latents of pictures and text embeddings of captions, each encoded once for all steps and
runs."""
import contextlib
import hashlib
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from data import Size, centre_crop, crop_box, crop_sizes, progress, to_floats
from support.checkpoint import hash_of
from support.decode import upright_size
from support.files import open_tensors, save_tensors
from support.lock import shared


def checksum(tensor):
    """-> CRC of a tensor's bytes (str)."""
    return str(zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy()))


class TensorFiles(NamedTuple):
    """A folder of tensors of one shape, a file each. A file is named by a hash of everything its tensor depends on, so
    that changed inputs are encoded again, and several runs share what is equal."""
    folder: Path
    network: str        # cache key of the network, its precision and its settings
    shape: tuple

    def path(self, source):
        """source: cache key of the network's input."""
        name = hashlib.sha256(f"{self.network}\n{source}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"       # 256 folders: a million files are slow in one

    def write(self, source, tensor):
        save_tensors(self.path(source), {"tensor": tensor}, {"checksum": checksum(tensor)})

    def read(self, source):
        path = self.path(source)
        try:
            with open_tensors(path) as file:
                tensor, expected = file.get_tensor("tensor"), (file.metadata() or {}).get("checksum")
            if tuple(tensor.shape) != self.shape or checksum(tensor) != expected:
                raise ValueError(f"{path}: the shape {tuple(tensor.shape)} or the checksum is wrong")
            return tensor
        except ValueError as error:
            raise ValueError(f"{error}; the next start of a run with this --cache encodes it again") from error

    def lacks(self, source):
        """Whether a tensor is missing or corrupt (prints a warning)."""
        if not self.path(source).exists():
            return True
        try:
            self.read(source)
            return False
        except ValueError as error:
            print(f"warning: {error}", file=sys.stderr)
            return True


class EncodedFolder(Dataset):
    """An ImageFolder after encoding: x1, the latents of a picture's centre crop; caption; context, the caption's text
    embedding; empty, that of the empty prompt. Call `fill` first."""

    def __init__(self, images, latents, embeddings):
        self.images, self.latents, self.embeddings, self.items = images, latents, embeddings, []
        for i in progress(range(len(images)), "reading pictures and captions", unit="image"):
            try:
                source = hashlib.sha256(Path(images.items[i][0]).read_bytes()).hexdigest()
                picture, shape = Size(*upright_size(images.items[i][0])), (images.height, images.width)
                sizes = crop_sizes(picture, crop_box(picture, *shape, 0.5, 0.5), *shape)
            except (OSError, ValueError):
                source = sizes = images.decode(i) and None      # None, with a warning
            self.items.append((source, images.caption(i), sizes))

    def fill(self, encode, encode_text, ranks, only_read=False):
        """Encode this rank's share of what is not cached yet, and wait for the other ranks. encode: uint8 (3, H, W) ->
        latents; encode_text: caption -> text embedding. only_read: a ValueError if anything is to be encoded."""
        pictures = range(ranks.rank, len(self.items), ranks.count)
        pictures = [i for i in progress(pictures, "looking for latents")
                    if self.items[i][0] is not None and self.latents.lacks(self.items[i][0])]
        captions = sorted({"", *(caption for _, caption, _ in self.items)})[ranks.rank::ranks.count]
        captions = [text for text in progress(captions, "looking for text embeddings") if self.embeddings.lacks(text)]
        if only_read and pictures + captions:
            raise ValueError(f"{self.latents.folder}: {len(pictures):,} pictures and {len(captions):,} captions are "
                             "not in it, and it is only read, unless --cache is passed again with --resume")
        print(f"{self.latents.folder}: encoding {len(pictures):,} of {len(self.items):,} pictures (centre crops, never "
              f"flipped) and {len(captions):,} captions"
              + (f" in the first of {ranks.count} processes" if ranks.count > 1 else ""))
        for i in progress(pictures, "encoding pictures", unit="image"):
            image = self.images.decode(i)
            if image is not None:
                self.latents.write(self.items[i][0], encode(centre_crop(image, self.images.height, self.images.width)))
        for caption in progress(captions, "encoding captions", unit="caption"):
            self.embeddings.write(caption, encode_text(caption))
        ranks.wait()
        self.empty = self.embeddings.read("")
        self.items = [item for item in self.items                                   # without damaged pictures
                      if item[0] is not None and self.latents.path(item[0]).exists()]
        if not self.items:
            raise ValueError(f"none of the {len(self.images)} images can be decoded")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        source, caption, sizes = self.items[key % len(self.items)]
        return {"x1": self.latents.read(source).float(), "caption": caption, "context": self.embeddings.read(caption),
                "empty": self.empty, "sizes": sizes}


@torch.no_grad()
def fill_cache(args, sd, images, ranks):
    """-> EncodedFolder of the ImageFolder `images`, after encoding what the cache lacks. A cache that only the state of
    a resumed run names is not written to: the run may be somebody else's."""
    folder, precision = Path(args.cache), args.precision
    only_read = args.resume is not None and "cache" not in args.given
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32        # as computed in a training step
    size, made = (images.height, images.width), f"{precision}, version 1"   # raise the version if encoding changes
    latents = TensorFiles(folder, f"latents {size} {hash_of(sd.first_stage_model)} {made}",
                          sd.latent_shape(size))
    hashes = " ".join(map(hash_of, sd.text_encoders))
    embeddings = TensorFiles(folder, f"text {hashes} {made}", (77 + sd.config.is_xl, sd.config.context_width))

    def encode(image):
        return sd.encode(to_floats(image[None].to(sd.device)))[0].to(dtype)

    def encode_text(caption):
        return sd.encode_text([caption])[0].to(dtype)

    encoded = EncodedFolder(images, latents, embeddings)
    with contextlib.nullcontext() if only_read else shared(folder, "*.safetensors"):
        encoded.fill(encode, encode_text, ranks, only_read)
    return encoded
