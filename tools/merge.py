"""Merge LoRAs into their base checkpoint, for tools that do not read them.

    python -m tools.merge runs/NAME/lora.safetensors --ckpt sd21.safetensors --out merged.safetensors --dtype fp16

The merged file has the base checkpoint's key names and extra tensors.
"""
import argparse
import os
from pathlib import Path

import torch

from support.checkpoint import modelspec, save_checkpoint
from support.files import check_replaceable, cli, parse
from support.load import load_model, picture_size, split_strength


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.merge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("lora", nargs="+", metavar="FILE[:STRENGTH]", help="LoRA files to merge, each with a strength (default: 1)")
    add("--ckpt", required=True, help="the checkpoint that the LoRAs were trained on")
    add("--use-ema", action="store_true", help="merge into the EMA weights of a non-pruned file")
    add("--prediction", choices=["v", "eps"], help="what the network predicts (default: from the files)")
    add("--zero-snr", action="store_true",
        help="the network was trained with zero terminal SNR (default: as the files say)")
    add("--out", required=True, help="the .safetensors file to write")
    add("--dtype", choices=["fp16", "bf16", "fp32"], help="of the networks (default: as in the checkpoint)")
    args = parse(parser)
    if not args.out.endswith(".safetensors"):
        raise ValueError(f"--out {args.out}: it must end in .safetensors")
    for name, path in ("--ckpt", args.ckpt), *(("the LoRA", split_strength(lora)[0]) for lora in args.lora):
        if os.path.realpath(args.out) == os.path.realpath(path):
            raise ValueError(f"--out {args.out}: that is {name}, which is never overwritten: choose another name")
    check_replaceable(args.out)
    sd = load_model(args.ckpt, args.lora, prediction=args.prediction, use_ema=args.use_ema, zero_snr=args.zero_snr)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(args.dtype)
    save_checkpoint(sd, args.out, dtype, **modelspec(sd, Path(args.out).stem, picture_size(sd)))
    print(f"{args.out}: {', '.join(args.lora)} merged into {args.ckpt}")


if __name__ == "__main__":
    cli(main)
