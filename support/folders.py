"""What a folder of pictures contains: its files, the captions of the pictures, and in one line what is left out."""
import csv
import heapq
import io
import os
import posixpath
import sys
import unicodedata
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from support.decode import SUFFIXES, kind_of
from support.files import SOFTWARE, from_json, read_text, reading

METADATA = ("metadata.jsonl", "metadata.csv")
HIDDEN = ("@eaDir", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN")     # thumbnails and deleted files; also .*
NO_PICTURES = (".txt", ".json", ".jsonl", ".csv", ".md", ".py", ".ipynb", ".log", ".yaml", ".toml", ".ini", ".db",
               ".npy", ".npz", ".hdf5", ".safetensors", ".ckpt", ".tar")    # kinds of files that nobody would miss


def progress(items, title, **options):
    """tqdm for what may take more than a second; the bar disappears at the end."""
    return tqdm(items, title, leave=False, dynamic_ncols=True, delay=1, **options)


def suffix_of(path):
    return os.path.splitext(path)[1].lower()


def is_hidden(name):
    return name.startswith(".") or name in HIDDEN


# ------------------------------------------------------------------ files

class LeftOut(dict):
    """{what: paths} of what is not read, for one line."""

    def add(self, what, *paths):
        if paths:
            self.setdefault(what, []).extend(paths)

    def add_other_kinds(self, paths):
        """Count files that may be pictures of a kind that is not read."""
        others = [path for path in paths if suffix_of(path) not in (*SUFFIXES, *NO_PICTURES)]
        kinds = Counter(map(suffix_of, others)).most_common(5)
        kinds = ", ".join(f"{count:,} {kind or 'without a suffix'}" for kind, count in kinds)
        self.add(f"of other kinds: {kinds}", *others)

    def __str__(self):
        return "; ".join(f"{len(paths):,} {what} (first {min(paths)})" for what, paths in self.items())

    def warn(self, words):
        """Print the line, if anything is left out. words: what is read."""
        if self:
            print(f"warning: {words}; {self}", file=sys.stderr)


def look_through(folder):
    """-> the sorted paths (str) of all files under `folder`, and LeftOut: hidden and half-written ones, pipes, folders
    that cannot be opened. Links are followed, but no folder is read twice."""
    found, left_out, folders, links, seen = [], LeftOut(), [os.fspath(folder)], [], set()
    with progress(None, f"listing {folder}", unit="file") as bar:
        while folders or links:                         # links last: a folder has its own name rather than a link's
            parent = folders.pop() if folders else heapq.heappop(links)
            real = os.path.realpath(parent)
            if real in seen:
                left_out.add("links to folders that are read already", parent)
                continue
            seen.add(real)
            try:
                with os.scandir(parent) as entries:     # no system call per file: 100,000 take half a second
                    entries = list(entries)
            except OSError:
                left_out.add("folders that cannot be opened", parent)
                continue
            for entry in entries:
                kind = kind_of_entry(entry)
                if kind == "link":
                    heapq.heappush(links, entry.path)
                elif kind == "folder":
                    folders.append(entry.path)
                elif kind == "file":
                    found.append(entry.path)
                elif kind:
                    left_out.add(kind, entry.path)
            bar.update(len(entries))
    return sorted(found, key=lambda path: path.replace(os.sep, "\0")), left_out     # as Paths: \0 sorts first


def kind_of_entry(entry):
    """-> "file", "folder" or "link" (to a folder) for what is read, else why not; "" for what nobody would miss."""
    try:
        is_folder = entry.is_dir()
        if is_hidden(entry.name):
            return "hidden or thumbnails" if is_folder or suffix_of(entry.name) in SUFFIXES else ""
        if is_folder:
            is_junction = getattr(entry, "is_junction", lambda: False)      # Windows
            return "link" if entry.is_symlink() or is_junction() else "folder"
        if entry.is_file():
            return "half-written" if ".partial." in entry.name else "file"
    except OSError:                                     # a link to itself
        pass
    return "links to nowhere" if entry.is_symlink() else "pipes or devices"


def files_in(folder):
    """-> the sorted paths (str) of all files under `folder` that are not hidden, not half-written."""
    return look_through(folder)[0] if os.path.isdir(folder) else []


def pictures_in(folder):
    """-> the paths of the pictures under `folder`, sorted. Prints in one warning what is left out."""
    if not os.path.isdir(folder):
        return []
    files, left_out = look_through(folder)
    left_out.add_other_kinds(files)
    pictures = [Path(path) for path in files if suffix_of(path) in SUFFIXES]
    left_out.warn(f"{folder}: {len(pictures):,} pictures")
    return pictures


# ------------------------------------------------------------------ captions

def cleaned(caption):
    """-> caption without surrounding spaces. JSON may contain lone surrogates, which no encoder accepts: they become
    question marks."""
    return caption.encode(errors="replace").decode().strip()


def parse_caption(text, suffix):
    """The text of NAME.txt, or of NAME.json with a "caption" -> caption; "" if there is none. ValueError for JSON that
    is no object."""
    if suffix == ".json":
        entry = from_json(text)
        if not isinstance(entry, dict):
            raise ValueError('it is not {"caption": "..."}')
        text = str(entry.get("caption") or "")
    return cleaned(text)


def read_caption(path):
    """-> the caption in NAME.txt or NAME.json. ValueError if it cannot be read."""
    with reading(path, "a caption in UTF-8"):
        return parse_caption(read_text(path), suffix_of(path))


def is_empty(path):
    """Whether NAME.txt has nothing but spaces; only the shortest files are read."""
    try:
        return os.path.getsize(path) <= 16 and not read_caption(path)
    except (ValueError, OSError):                       # whoever uses the caption prints why
        return False


def same_name(path):
    """-> a path as it is compared with others: with slashes, and composed (NFC), which macOS decomposes (NFD)."""
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


def stem_of(path):
    return same_name(os.path.splitext(path)[0])


def read_metadata(path):
    """metadata.jsonl with {"file_name": path relative to it, "text": caption} in each line, or metadata.csv with these
    columns -> [(absolute path as by same_name, caption)]. ValueError names a broken line."""
    text, found = read_text(path), []
    if path.endswith(".csv"):
        with reading(path, "a table with the columns file_name,text"):
            rows = csv.DictReader(io.StringIO(text), strict=True)
            lines = [(rows.line_num, row) for row in rows]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        try:
            entry = from_json(line) if isinstance(line, str) else line
            name, caption = entry["file_name"].replace("\\", "/"), cleaned(entry["text"])
        except (ValueError, KeyError, TypeError, AttributeError):
            wanted = "file_name,text" if path.endswith(".csv") else '{"file_name": "...", "text": "..."}'
            raise ValueError(f"{path}, line {number}: {str(line)[:80]!r} is not {wanted}") from None
        found.append((same_name(posixpath.normpath(posixpath.join(same_name(os.path.dirname(path)), name))), caption))
    return found


def captions_in(files, left_out):
    """Paths of files -> {picture, as by same_name: caption} from metadata.jsonl and .csv; counts what fits no file."""
    captions, twice = {}, []
    for path in files:
        if os.path.basename(path) in METADATA:
            for name, caption in read_metadata(path):
                twice += [name] if captions.get(name, caption) != caption else []
                captions[name] = caption
    if captions:
        names = set(map(same_name, files))
        left_out.add("lines of metadata that name no file", *(name for name in captions if name not in names))
    left_out.add("with two captions in metadata, of which the last is used", *twice)
    return captions


def captioned_pictures(folder, default=""):
    """-> [(path, NAME.txt beside it or None, else its caption)] of the pictures under `folder`: NAME.txt, else the line
    in metadata.jsonl or .csv, else NAME.json, else "". Reads the first bytes of each picture, and of the .txt files
    only the shortest. Prints in one warning what is left out; ValueError if that is everything. default: the caption
    of pictures that have none."""
    folder = os.path.abspath(folder)                    # names in metadata may be absolute
    files, left_out = look_through(folder)
    left_out.add_other_kinds(files)
    captions = captions_in(files, left_out)
    texts = {stem_of(path): path for path in files if suffix_of(path) == ".txt"}
    jsons = {stem_of(path): path for path in files if suffix_of(path) == ".json"}
    pictures, items = [path for path in files if suffix_of(path) in SUFFIXES], []
    skipped = {"ours": f"pictures that {SOFTWARE} wrote, skipped", "unreadable": "images unreadable and skipped"}
    instead = f", which get {default!r}" if default else ""
    for path in progress(pictures, "reading the first bytes of images", unit="image"):
        kind, stem = kind_of(path), stem_of(path)
        if kind != "picture":
            left_out.add(skipped[kind], path)
            continue
        text, caption = texts.get(stem), captions.get(same_name(path))
        if not text and not caption and stem in jsons:
            try:
                caption = read_caption(jsons[stem]) or caption
            except ValueError:
                left_out.add("captions in JSON that cannot be read", jsons[stem])
        if text and caption:
            left_out.add("images with two captions, of which the .txt file is used", path)
        elif text is None and caption is None:
            left_out.add(f"images without a caption{instead}", path)
        elif not caption and (text is None or is_empty(text)):
            left_out.add(f"images with an empty caption{instead}", path)
        items.append((path, text, caption or ""))
    stems = {stem_of(path) for path in files if suffix_of(path) not in (".txt", ".json")}
    left_out.add("captions without an image", *(path for stem, path in texts.items() if stem not in stems))
    if not items:
        tars = any(suffix_of(path) == ".tar" for path in files)
        raise ValueError(f"{folder} has no readable image{f': {left_out}' if left_out else ''}: pass a folder with "
                         f"{' '.join(SUFFIXES)} files{f', or its tars: {folder}/*.tar' if tars else ''}")
    left_out.warn(f"{folder}: {len(items):,} of {len(pictures):,} images read")
    return items
