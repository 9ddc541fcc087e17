"""Prompts of the command line, and a warning for those that are longer than the text encoder reads: 75 tokens."""
import sys

from tqdm import tqdm

from data import ImageFolder, progress
from model import tokenizer
from support.files import read_text

TOKENS, LONGEST = 75, 5000      # of a prompt, and its characters: as model.tokenize cuts it
CHECKED = 10_000                # prompts are checked before sampling, in a second or two
ENOUGH = 256                    # captions of training, after which the warning says how many were too long


def read_prompts(args):
    """-> the prompts of --prompt, --prompts and --data, in this order; [] if there is none."""
    prompts = list(args.prompt or [])
    if args.prompts:
        prompts += [line.strip() for line in read_text(args.prompts).splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts {args.prompts}: no prompt in it")
    if args.data:
        images = ImageFolder(args.data, 1, 1)
        prompts += [images.caption(i) for i in progress(range(len(images)), "reading captions", unit="caption")]
    return prompts


def cut_off(text):
    """-> the end of a prompt that the text encoder does not read, or ""."""
    if len(text) <= TOKENS and text.isascii():          # a token has at least one byte
        return ""
    tokens = tokenizer().encode(text[:LONGEST])
    if len(tokens) <= TOKENS:
        return text[LONGEST:].strip()
    kept = len("".join(tokenizer().decode(tokens[:TOKENS]).split()))    # the tokenizer changes case and white space
    letters = [i for i, letter in enumerate(text) if not letter.isspace()]
    return text[letters[min(kept, len(letters) - 1)]:].strip()


def warn_of_cut(ends, n, what):
    """ends: what is cut off from those of n prompts or captions that are too long."""
    shown = ends[0] if len(ends[0]) <= 60 else f"{ends[0][:60]} ..."
    tqdm.write(f"warning: {len(ends)} of {n:,} {what} have more than {TOKENS} tokens, which is all that the text "
               f"encoder reads; cut off from the first: {shown!r}", file=sys.stderr)


def check_length(prompts, negative=""):
    """A warning if some of the prompts are too long."""
    prompts = [*prompts[:CHECKED], *filter(None, [negative])]
    ends = [end for prompt in prompts if (end := cut_off(prompt))]
    if ends:
        warn_of_cut(ends, len(prompts), "prompts")


class CaptionWatch:
    """Warns once if captions of a training run are too long, with their number so far."""

    def __init__(self):
        self.n, self.ends, self.warned = 0, [], False

    def look(self, captions):
        if not self.warned:
            self.n += len(captions)
            self.ends += filter(None, map(cut_off, captions))

    def report(self, now):
        """Called after each step. now: do not wait for more captions."""
        if self.ends and not self.warned and (now or self.n >= ENOUGH):
            warn_of_cut(self.ends, self.n, "captions so far")
            self.warned = True
