"""Merge a LoRA into its base checkpoint, for tools that do not read the LoRA.

    python -m tools.merge runs/NAME/lora.safetensors --ckpt sd21.safetensors --out merged.safetensors --dtype fp16

The merged file has the base checkpoint's key names and extra tensors.
"""
import argparse
import os
from pathlib import Path

import torch

from support.checkpoint import modelspec, save_checkpoint
from support.files import check_replaceable, cli, parse
from support.load import load_flow, picture_size


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.merge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("lora", help="LoRA file to merge")
    add("--ckpt", required=True, help="the checkpoint that the LoRA was trained on")
    add("--out", required=True, help="the .safetensors file to write")
    add("--dtype", choices=["fp16", "bf16", "fp32"], help="of the networks (default: as in the checkpoint)")
    args = parse(parser)
    if not args.out.endswith(".safetensors"):
        raise ValueError(f"--out {args.out}: it must end in .safetensors")
    for name, path in ("--ckpt", args.ckpt), ("the LoRA", args.lora):
        if os.path.realpath(args.out) == os.path.realpath(path):
            raise ValueError(f"--out {args.out}: that is {name}, which is never overwritten: choose another name")
    check_replaceable(args.out)
    sd, _ = load_flow(args.ckpt, args.lora, task=None)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(args.dtype)
    save_checkpoint(sd, args.out, dtype, **modelspec(sd, Path(args.out).stem, picture_size(sd)))
    print(f"{args.out}: {args.lora} merged into {args.ckpt}")


if __name__ == "__main__":
    cli(main)
