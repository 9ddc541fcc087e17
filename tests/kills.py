"""Kill runs at random moments, let them go on, and see whether anything is lost.

    python -m tests.kills                      24 kills of train.py, and 24 of sample.py --pairs
    python -m tests.kills --n 4 --seed 1       4 of each, at other moments

A process is started, and gets a random signal after a random time: SIGKILL as often as all others together. Whatever
happened, each of its files must be whole. Then the same command goes on, until it is finished; its result must be that
of a process that was never killed, bit for bit. Ends with exit code 1 if it is not.
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
COMMANDS = {  # a run's name: how it begins, how it goes on if the file exists, and the files that are its result
    "train": ("train.py --steps 40 --batch 2 --size 32 --scenes 16 --validation 2 --previews 2 --lora 2 --save-every 3 "
              "--preview-every 7 --warmup 0 --device cpu --out train", "train.py --resume train",
              "train/state.safetensors",
              ["state.safetensors", "lora.safetensors", "validation.jsonl", "before_after.png"]),
    "pairs": ("sample.py --pairs 300 --steps 4 --cfg 1 --batch 16 --size 32 --device cpu --out pairs", None, None,
              ["pairs-000000.safetensors", "pairs-000001.safetensors"]),
}
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def start(name, folder):
    """Begin the run `name` in `folder`, or go on with it -> the process."""
    begin, go_on, state, _ = COMMANDS[name]
    script, *words = shlex.split(go_on if state and (folder / state).exists() else begin)
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen([sys.executable, ROOT / script, *words], cwd=folder, stdout=log, stderr=log)


def damaged(folder):
    """-> the files below `folder` that are not whole. A log may have one torn line, its last."""
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
        except Exception as error:              # whatever it is, the file could not be read
            found.append(f"{path}: {error}")
    return found


def contents(path):
    """What must be the same in both results: numbers, and not the order in which a file lists its tensors."""
    if path.suffix == ".safetensors":
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    return path.read_bytes()


def finish(name, folder):
    assert start(name, folder).wait() == 0, (folder / "log.txt").read_text()[-2000:]


def kill_often(name, n, rng, base):
    """Kill the run `name` n times, in as many runs as it takes -> Counter of signals and exit codes, list of faults."""
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
                alive = False                   # it was faster, and has finished
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
    parser.add_argument("--n", type=int, default=24, help="kills of each command (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals (default: 0)")
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
