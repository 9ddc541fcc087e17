"""Train by Diff2Flow's loss with other weights, or by the diffusion loss with min-SNR weights: train.py with more
objectives.

    python -m claims.weighted --objective p2 --ckpt toy/tiny-eps.safetensors --lora base

    p1, p2     squared errors of u times w(t_fm) = t_fm^p, where t_fm = alpha / (alpha + sigma)
    c5, c20    w(t_fm) = min(1, c t_fm^2)
    min-snr    the diffusion loss of an eps-network times min(1, 5 / SNR), SNR = (alpha / sigma)^2

A squared error of u is 1 / t_fm^2 of that of eps (claims/weights.py). So p = 2 weights the errors of eps by how often
their level is drawn and by nothing else, and c is the largest weight of an error of eps. min-SNR: arXiv 2303.09556. A
model trained by any of these stays a diffusion network; it is sampled by diff2flow, after min-snr by dm.
"""
import torch

import train
from diff2flow import OBJECTIVES, Diff2Flow, Diffusion, alpha_sigma, interpolate, masked_mean
from support.files import cli

WEIGHTS = {                     # of squared errors of u, at t_fm
    "p1": lambda t_fm: t_fm,
    "p2": lambda t_fm: t_fm**2,
    "c5": lambda t_fm: (5 * t_fm**2).clamp(max=1),
    "c20": lambda t_fm: (20 * t_fm**2).clamp(max=1),
}


def min_snr(t_fm):
    """-> the weight of an error of eps, min(1, 5 / SNR): alpha / sigma = t_fm / (1 - t_fm)."""
    return (5 * ((1 - t_fm) / t_fm) ** 2).clamp(max=1)


class Weighted(Diff2Flow):
    """Diff2Flow whose loss is multiplied by weight(t_fm)."""

    def loss(self, x1, context, x0=None, t_fm=None, mask=None):
        """As Diff2Flow.loss, with the same noise and times."""
        x1 = x1.float()
        x0 = torch.randn_like(x1) if x0 is None else x0
        t_fm = torch.rand(len(x1), device=x1.device) if t_fm is None else t_fm
        u = self(interpolate(x1, x0, t_fm), t_fm, context)
        return masked_mean(self.weight(t_fm).view(-1, 1, 1, 1) * (u - (x1 - x0)).square(), mask)


class MinSNR(Diffusion):
    """The diffusion loss of an eps-network, at levels of much signal weighted by 5 / SNR."""

    def loss(self, x1, context, x0=None, t_fm=None, mask=None):
        """As Diffusion.loss, with the same noise and times."""
        x1 = x1.float()
        x0 = torch.randn_like(x1) if x0 is None else x0
        t_dm = torch.randint(self.T, (len(x1),), device=x1.device) if t_fm is None else self.f_t_inv(t_fm).round()
        t_fm = self.f_t(t_dm).view(-1, 1, 1, 1)
        alpha, sigma = alpha_sigma(t_fm)
        eps = self.net(alpha * x1 + sigma * x0, t_dm.float(), context).float()
        return masked_mean(min_snr(t_fm) * (eps - x0).square(), mask)


MORE = {"min-snr": MinSNR,
        **{name: type(name, (Weighted,), {"weight": staticmethod(weight)}) for name, weight in WEIGHTS.items()}}


def main():
    OBJECTIVES.update(MORE)
    train.main()


if __name__ == "__main__":
    cli(main)
