"""Sample by Euler, midpoint and Heun steps with as many network calls, before and after Reflow.

    python -m claims.solvers toy/tiny-v.safetensors runs/claims/solvers/reflow-1/lora.safetensors

The velocity field u(x_fm, t_fm) is an ODE, dx/dt = u, which any solver can integrate. From t to t + h:

    euler      x + h u(x, t)                                        one call
    midpoint   x + h u(x + h/2 u(x, t), t + h/2)                    two calls
    heun       x + h/2 (u(x, t) + u(x + h u(x, t), t + h))          two calls

With guidance a call is two passes of the network. Writes captions.jsonl, as toy.judge captions does.
"""
import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from support.files import cli, parse
from support.load import guidance, unconditional
from toy import judge

CALLS = 1, 2, 4, 8, 16


def euler(u, x, t, h):
    return x + h * u(x, t)


def midpoint(u, x, t, h):
    return x + h * u(x + h / 2 * u(x, t), t + h / 2)


def heun(u, x, t, h):
    first = u(x, t)
    return x + h / 2 * (first + u(x + h * first, t + h))


SOLVERS = {euler: 1, midpoint: 2, heun: 2}              # calls per step


def guided(flow, context, uncond, cfg):
    """-> u(x_fm, t_fm): x_fm (B, C, H, W), t_fm a number -> velocity, guided as by Diff2Flow.sample."""
    def u(x_fm, t_fm):
        times = torch.full((len(x_fm),), t_fm, device=x_fm.device)
        if cfg == 1:
            return flow(x_fm, times, context)
        both = torch.cat([context, uncond.expand_as(context)])
        with_text, without = flow(x_fm.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return without + cfg * (with_text - without)
    return u


def integrate(solver, u, x, calls):
    """x at t_fm = 0 -> x at t_fm = 1, with so many calls of u."""
    steps = calls // SOLVERS[solver]
    for i in range(steps):
        x = solver(u, x, i / steps, 1 / steps)
    return x


@torch.no_grad()
def sample_pictures(sd, flow, captions, noise, solver, calls, cfg, batch):
    """-> pictures (N, 3, H, W) in [-1, 1]."""
    pictures = []
    for start in tqdm(range(0, len(captions), batch), f"{solver.__name__}, {calls} calls", dynamic_ncols=True):
        context = sd.encode_text(captions[start:start + batch])
        u = guided(flow, context, unconditional(sd, cfg), cfg)
        x1 = integrate(solver, u, noise[start:start + batch].to(sd.device), calls)
        pictures.append(sd.decode(x1).float().clamp(-1, 1))
    return torch.cat(pictures)


def arguments():
    parser = argparse.ArgumentParser(prog="python -m claims.solvers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    judge.add_model_arguments(parser)
    judge.add_common_arguments(parser, 512, None, "runs/solvers")
    return parse(parser)


def main():
    args = arguments()
    device, dtype = judge.begin(args, "captions.jsonl")
    args.style, rows, real = "solid", [], None
    classifier = judge.load_classifier(args.style, device)
    for path in args.models:
        sd, flow, origin = judge.load_model(path, device, dtype, "text-to-image", args.objective)
        real = real or judge.real_scenes(args, classifier, sd, device)
        cfg, noise = guidance(sd), judge.seeded_noise(args, sd.latent_shape((judge.SIZE, judge.SIZE)))
        for solver, calls_per_step in SOLVERS.items():
            for calls in CALLS:
                if calls % calls_per_step == 0:
                    pictures = sample_pictures(sd, flow, real.captions, noise, solver, calls, cfg, args.batch)
                    row = {**origin, "n": args.n, "seed": args.seed, "precision": args.precision, "cfg": cfg,
                           "solver": solver.__name__, "calls": calls,
                           **judge.judge_pictures(pictures, real, classifier)}
                    print(f"{path}, {solver.__name__}, {calls} calls: {row['all']:.1%} of the captions right")
                    rows.append(row)
    judge.write_results(Path(args.out) / "captions.jsonl", rows)


if __name__ == "__main__":
    cli(main)
