"""The noise schedule of Stable Diffusion: alpha and sigma of x_dm = alpha x1 + sigma x0 (Eq. 8), alpha^2 + sigma^2 = 1.

    beta_t = (sqrt(beta_start) + (sqrt(beta_end) - sqrt(beta_start)) t / (T-1))^2,    t = 0 .. T-1
    alpha_t = sqrt(prod_{s <= t} (1 - beta_s))

Row t is the noise level at which the network was trained with the integer timestep t: table, coefficients and time
embedding share one index, and t = 0 is the least noisy level, not clean data.
"""
import torch


def sd_schedule(T=1000, beta_start=0.00085, beta_end=0.012, zero_snr=False, device="cpu"):
    """-> alpha (T,), sigma (T,) in float64 on `device`, indexed by the network's own timestep.

    zero_snr shifts and scales alpha so that the last level is pure noise (Lin et al., arXiv 2305.08891, Alg. 1). Only
    for checkpoints that were trained with it: for others it shifts the timestep that the network gets.
    """
    beta = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
    alpha = (1 - beta).cumprod(0).sqrt()
    if zero_snr:
        alpha = alpha[0] * (alpha - alpha[-1]) / (alpha[0] - alpha[-1])
    return alpha.to(device), (1 - alpha**2).sqrt().to(device)
