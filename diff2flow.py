"""Diff2Flow (arXiv 2506.02221): a pre-trained diffusion network is a flow-matching velocity field. Sec. 3.2, Eqs. 9-16.

    x1, x0       data, Gaussian noise                 alpha, sigma   x_dm = alpha x1 + sigma x0 (Eq. 8)
    x_fm, t_fm   t_fm in [0, 1]: 0 noise, 1 data      eps            the network's prediction of x0
    x_dm, t_dm   t_dm in [0, T-1]: 0 least noisy      v              the network's prediction of alpha x0 - sigma x1
                                                      u              the velocity x1 - x0

One change of variables. With r = alpha + sigma:  t_fm = alpha / r (Eq. 11),  x_dm = r x_fm (Eq. 13),  alpha = r t_fm,
sigma = r (1 - t_fm), and alpha^2 + sigma^2 = 1 fixes r = 1 / sqrt(t_fm^2 + (1 - t_fm)^2). So r, alpha and sigma are
closed-form in t_fm on all of [0, 1]; only t_dm, the timestep that the network is given, needs the table (Eq. 12).

Erratum. Eq. 15's second line and Eq. 16's last line are wrong as printed. From x_dm = alpha x1 + sigma x0 and v:
    x1 = alpha x_dm - sigma v,    x0 = sigma x_dm + alpha v,    u = x1 - x0 = (alpha - sigma) x_dm - (alpha + sigma) v
"""
import torch


def interpolate(x1, x0, t_fm):
    """Eq. 9: x1, x0 (B, C, H, W), t_fm (B,) -> x_fm (B, C, H, W)."""
    t_fm = t_fm.view(-1, 1, 1, 1)
    return t_fm * x1 + (1 - t_fm) * x0


def alpha_sigma(t_fm):
    """alpha and sigma of the noise level with f_t = t_fm, in closed form: t_fm -> alpha, sigma of the same shape."""
    r = (t_fm**2 + (1 - t_fm) ** 2).rsqrt()
    return r * t_fm, r * (1 - t_fm)


def masked_mean(x, mask=None):
    """x (B, C, H, W), mask (B, 1, H, W) or None -> mean of x where mask is 1."""
    return x.mean() if mask is None else (x * mask).sum() / mask.expand_as(x).sum().clamp(min=1)


def velocity_error(flow, x1, x0, t_fm, context, mask=None):
    """Eq. 5 at given noise and times: mean |u - (x1 - x0)|^2. Shapes as in `loss`; flow is one of the OBJECTIVES."""
    u = flow(interpolate(x1, x0, t_fm), t_fm, context)
    return masked_mean((u - (x1 - x0)).square(), mask)


class Diff2Flow:
    """A network(x_dm, t_dm, context) -> v or eps, with its schedule alpha (T,), sigma (T,), as a velocity field u.

    prediction is "v" or "eps". Times and algebra are float32 (the table float64) whatever the network's dtype.
    """

    def __init__(self, net, alpha, sigma, prediction="v"):
        if prediction not in ("v", "eps"):
            raise ValueError(f"prediction is {prediction!r}; it must be 'v' or 'eps'")
        if prediction == "eps" and alpha[-1] == 0:
            raise ValueError("eps determines no x1 where alpha is 0: use the schedule without zero_snr")
        self.net, self.prediction, self.T = net, prediction, len(alpha)
        self.f_table = (alpha / (alpha + sigma)).double()                   # f_t at t_dm = 0 .. T-1

    def f_t(self, t_dm):
        """Eq. 11, linear between integer timesteps: t_dm (B,) in [0, T-1] -> t_fm (B,)."""
        self.f_table = self.f_table.to(t_dm.device)
        low = t_dm.long().clamp(0, self.T - 2)
        return torch.lerp(self.f_table[low], self.f_table[low + 1], t_dm.double() - low).float()

    def f_t_inv(self, t_fm):
        """Eq. 12: t_fm (B,) -> t_dm (B,), clamped to the trained [0, T-1] where t_fm is outside f_t's range."""
        self.f_table = self.f_table.to(t_fm.device)
        t_fm = t_fm.double().clamp(self.f_table[-1], self.f_table[0])
        low = torch.searchsorted(-self.f_table, -t_fm).clamp(min=1) - 1     # f_t falls; searchsorted wants it rising
        f_low, f_high = self.f_table[low], self.f_table[low + 1]
        return (low + (t_fm - f_low) / (f_high - f_low)).float()

    def __call__(self, x_fm, t_fm, context):
        """Lines 2-4 of both algorithms: x_fm (B, C, H, W), t_fm (B,), context (B, L, D) -> u (B, C, H, W)."""
        x_fm, t_fm = x_fm.float(), t_fm.float()
        t_dm = self.f_t_inv(t_fm)                                           # Eq. 12
        alpha, sigma = alpha_sigma(t_fm.view(-1, 1, 1, 1))
        x_dm = (alpha + sigma) * x_fm                                       # f_x^-1, Eq. 13
        v = self.net(x_dm, t_dm, context).float()                           # Eq. 14
        if self.prediction == "eps":  # v at the level of t_dm, which is clamped, so alpha is never 0
            alpha_dm, sigma_dm = alpha_sigma(self.f_t(t_dm).view(-1, 1, 1, 1))
            v = (v - sigma_dm * x_dm) / alpha_dm
        return (alpha - sigma) * x_dm - (alpha + sigma) * v                 # Eqs. 15, 16, corrected

    def loss(self, x1, context, x0=None, t_fm=None, mask=None):
        """Algorithm 1: x1 (B, C, H, W), context (B, L, D) -> scalar. Noise x0 (as x1; given for Reflow's pairs) and
        t_fm (B,) are drawn if None. With a mask (B, 1, H, W), the mean is over latents where it is 1 (depth has holes).
        """
        x1 = x1.float()
        x0 = torch.randn_like(x1) if x0 is None else x0
        t_fm = torch.rand(len(x1), device=x1.device) if t_fm is None else t_fm
        return velocity_error(self, x1, x0, t_fm, context, mask)

    def grid(self, steps):
        """The N + 1 times of an N-step sampler, t_fm = 0 .. 1."""
        return torch.linspace(0, 1, steps + 1, device=self.f_table.device)

    @torch.no_grad()
    def sample(self, x0, context, steps, uncond=None, cfg=1.0, callback=lambda x_fm: None):
        """Algorithm 2: Euler from noise x0 to x1 (B, C, H, W). callback(x_fm) is called after each step.

        Guidance (cfg != 1) extrapolates u from uncond (1 or B, L, D) to context (B, L, D). u is affine in v and eps, so
        guiding u is the same as guiding v or eps.
        """
        if cfg != 1 and uncond is None:
            raise ValueError(f"guidance of scale {cfg:g} needs uncond, the text embedding of the empty prompt")
        x_fm, grid = x0.float(), self.grid(steps).to(x0.device)
        for i in range(steps):
            t_fm = grid[i].expand(len(x0))
            if cfg == 1:
                u = self(x_fm, t_fm, context)
            else:
                both = torch.cat([context, uncond.expand_as(context)])
                u, u_uncond = self(x_fm.repeat(2, 1, 1, 1), t_fm.repeat(2), both).chunk(2)
                u = u_uncond + cfg * (u - u_uncond)
            x_fm = x_fm + (grid[i + 1] - grid[i]) * u                       # Eq. 6
            callback(x_fm)
        return x_fm


class Diffusion(Diff2Flow):
    """Baseline "dm": the network's own diffusion loss at integer t_dm; sampled by DDIM (eta = 0): Euler on another
    grid.
    """

    def loss(self, x1, context, x0=None, t_fm=None, mask=None):
        """MSE on eps (Eq. 2) or v (Eq. 3) at integer timesteps, uniform or nearest to t_fm. Shapes as in Diff2Flow."""
        x1 = x1.float()
        x0 = torch.randn_like(x1) if x0 is None else x0
        t_dm = torch.randint(self.T, (len(x1),), device=x1.device) if t_fm is None else self.f_t_inv(t_fm).round()
        alpha, sigma = alpha_sigma(self.f_t(t_dm).view(-1, 1, 1, 1))
        target = x0 if self.prediction == "eps" else alpha * x0 - sigma * x1
        output = self.net(alpha * x1 + sigma * x0, t_dm.float(), context).float()
        return masked_mean((output - target).square(), mask)

    def grid(self, steps):
        """Every (T / N)-th timestep from T - 1 down ("trailing" spacing), then clean data."""
        t_dm = (self.T - self.T / steps * torch.arange(steps, device=self.f_table.device)).round() - 1
        return torch.cat([self.f_t(t_dm), torch.ones_like(t_dm[:1])])

    def sample(self, x0, context, steps, uncond=None, cfg=1.0, callback=lambda x_fm: None):
        """DDIM starts with x_dm = x0 at its first level, so x_fm = x0 / (alpha + sigma) there (Eq. 13)."""
        alpha, sigma = alpha_sigma(self.grid(steps)[0])
        return super().sample(x0.float() / (alpha + sigma), context, steps, uncond, cfg, callback)


class NaiveFM(Diff2Flow):
    """Baseline "fm", naive flow matching as in DepthFM: the network gets x_fm and t_fm, and its raw output is u."""

    def __call__(self, x_fm, t_fm, context):
        """x_fm (B, C, H, W), t_fm (B,), context (B, L, D) -> u (B, C, H, W)."""
        return self.net(x_fm.float(), t_fm.float(), context).float()


class NaiveFMFlip(NaiveFM):
    """Baseline "fm-flip": as "fm" with u = -output, since v points against the velocity. Not in the paper."""

    def __call__(self, x_fm, t_fm, context):
        return -super().__call__(x_fm, t_fm, context)


class RectifiedFlow(NaiveFMFlip):
    """Baseline "rf": as "fm-flip" with the times that the network knows, as others' rectified-flow finetunes of SD 1.5
    and SDXL work: net(x_fm, 1000 (1 - t_fm)) = x0 - x1. Not in the paper."""

    def __call__(self, x_fm, t_fm, context):
        return super().__call__(x_fm, 1000 * (1 - t_fm), context)


OBJECTIVES = {"diff2flow": Diff2Flow, "dm": Diffusion, "fm": NaiveFM, "fm-flip": NaiveFMFlip, "rf": RectifiedFlow}
NAIVE = "fm", "fm-flip", "rf"   # their networks are no diffusion models any more
