"""Kill runs at random moments, resume them, and check that nothing is lost.

    python -m tests.kills                      24 kills of train.py, and 24 of sample.py --pairs
    python -m tests.kills --n 4 --seed 1       4 of each, at other times

A process gets a random signal after a random time; half of the signals are SIGKILL. After that none of its files may be
damaged. Then it is resumed, until it ends; its result must equal that of a run that was never killed, bit for bit. The
exit code is 1 if a check fails.
"""
import argparse
import collections
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
COMMANDS = {  # name: the first command, the command if a state file exists, that file, the files of the result
    "train": ("train.py --steps 40 --batch 2 --size 32 --scenes 16 --validation 2 --previews 2 --lora 2 --save-every 3 "
              "--preview-every 7 --warmup 0 --device cpu --out train", "train.py --resume train",
              "train/state.safetensors",
              ["state.safetensors", "lora.safetensors", "validation.jsonl", "before_after.png"]),
    "pairs": ("sample.py --pairs 300 --steps 4 --cfg 1 --batch 16 --size 32 --device cpu --out pairs", None, None,
              ["pairs-000000.safetensors", "pairs-000001.safetensors"]),
}
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def start(name, folder):
    """Start or resume the run `name` in `folder` -> the process."""
    begin, resume, state, _ = COMMANDS[name]
    script, *words = shlex.split(resume if state and (folder / state).exists() else begin)
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen([sys.executable, ROOT / script, *words], cwd=folder, stdout=log, stderr=log)


def damaged(folder):
    """-> descriptions of the damaged files under `folder`. The last line of a log may be half-written."""
    found = []
    for path in folder.rglob("*"):
        try:
            if ".partial." in path.name:
                continue                        # the next start removes it
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix in (".json", ".jsonl"):
                lines = path.read_text().split("\n")
                for line in lines[:-1]:
                    json.loads(line)
        except Exception as error:              # any error means that the file is damaged
            found.append(f"{path}: {error}")
    return found


def contents(path):
    """-> a file's content for comparison, independent of the order of its tensors."""
    if path.suffix == ".safetensors":
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    return path.read_bytes()


def finish(name, folder):
    assert start(name, folder).wait() == 0, (folder / "log.txt").read_text()[-2000:]


def kill_often(name, n, rng, base):
    """Kill runs of `name` n times in all -> Counter of signals and exit codes, list of faults."""
    whole, counts, faults, run = base / "whole", collections.Counter(), [], 0
    whole.mkdir(parents=True)
    begin = time.time()
    finish(name, whole)
    seconds, kills, bar = time.time() - begin, 0, tqdm(total=n, desc=name, unit="kill")
    while kills < n:
        folder, alive, run = base / f"run{run}", True, run + 1
        folder.mkdir()
        while alive and kills < n:
            process, number = start(name, folder), rng.choice(SIGNALS)
            try:
                process.wait(rng.uniform(0.1, 1.1) * seconds)
                alive = False                   # it ended before the signal
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                counts[f"{number.name}, exit code {process.wait()}"] += 1
                kills += 1
                bar.update()
            faults += [f"{folder}: {fault}" for fault in damaged(folder)]
        finish(name, folder)
        for file in COMMANDS[name][3]:
            if contents(folder / name / file) != contents(whole / name / file):
                faults.append(f"{folder / name / file} differs from a run that was never killed")
        if not faults:
            shutil.rmtree(folder)
    return counts, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=24, help="kills per command (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and the signals (default: 0)")
    args = parser.parse_args()
    base, faults = Path(tempfile.mkdtemp(prefix="kills-")), []
    for name in COMMANDS:
        counts, found = kill_often(name, args.n, random.Random(args.seed), base / name)
        faults += found
        print(f"{name}: {args.n} kills, {len(found)} faults; " + ", ".join(f"{n} x {what}" for what, n in
                                                                          sorted(counts.items())))
    print("\n".join(faults))
    if faults:
        sys.exit(f"{len(faults)} faults, kept in {base}")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
