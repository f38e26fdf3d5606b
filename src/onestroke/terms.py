"""The vocabulary of the methods' losses: pure functions of tensors and denoisers, and the weight that is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestroke.draws import Draws
from onestroke.errors import unknown
from onestroke.method import Mean
from onestroke.paths import Cond, Estimate, Path, Prediction, like

Reduce = Literal["mean", "sum"]


def reduced(per_element: Tensor, reduce: Reduce) -> Tensor:
    """(B, *D) -> scalar: the mean over B of the mean or the sum over D (methods differ: sheet 0.7)."""
    rows = per_element.flatten(1)
    return (rows.mean(1) if reduce == "mean" else rows.sum(1)).mean()


def descend(x: Tensor, direction: Tensor, reduce: Reduce = "mean") -> Tensor:
    """1/2 ||x - sg(x - g)||^2: the scalar whose gradient with respect to x is `direction` (over B, and D if "mean").

    How a score difference enters autograd (DMD, arXiv 2311.18828, equation 7).
    """
    return 0.5 * reduced((x - (x - direction).detach()).square(), reduce)


def dsm(
    net: nn.Module,
    path: Path,
    x0: Tensor,
    cond: Cond,
    t: Tensor,
    draw: Draws,
    space: Prediction = "eps",
    weight: Tensor | None = None,
    reduce: Reduce = "mean",
) -> Tensor:
    """Denoising score matching on clean samples x0 (B, *D) at times t (B,): weight (B,) x squared error in `space`."""
    eps = draw.normal(x0)
    est = net(path.mix(x0, eps, t), t, cond)
    error = path.join(est.x0, est.eps, t, space) - path.join(x0, eps, t, space)
    return reduced(error.square() if weight is None else like(weight, error) * error.square(), reduce)


def straight(net: nn.Module, path: Path, x0: Tensor, eps: Tensor, cond: Cond, t: Tensor) -> Tensor:
    """Mean squared error of the straight path's velocity eps - x0 at x_t = a x0 + b eps (flow matching, 2209.03003).

    On any path: where a trajectory is straight in signal and noise, x0 and eps do not change along it.
    """
    est = net(path.mix(x0, eps, t), t, cond)
    return reduced((est.eps - est.x0 - eps + x0).square(), "mean")


def truncated_snr(est: Estimate, x0: Tensor, eps: Tensor) -> Tensor:
    """The error of x0 under max(SNR, 1): per sample the larger of the squared x0 and eps errors (arXiv 2202.00512)."""
    error = [(e - y).square().flatten(1).mean(1) for e, y in ((est.x0, x0), (est.eps, eps))]
    return torch.maximum(*error).mean()


def edm_weight(path: Path, t: Tensor, sigma_data: float) -> Tensor:
    """(B,): (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 at sigma = b / a (arXiv 2206.00364, table 1)."""
    return sigma_data**-2 + (2 * path.log_snr(t)).exp()


TIME_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "1-sigma": lambda sigma: 1 - sigma,
    "(1-sigma)^2": lambda sigma: (1 - sigma) ** 2,
    "1/sigma": lambda sigma: 1 / sigma,
    "1/sigma^2": lambda sigma: 1 / sigma**2,
    "snr": lambda sigma: (1 / sigma - 1) ** 2,
    "sqrt-snr": lambda sigma: 1 / sigma - 1,
}
"""Weights of an x0-space loss by the straight path's sigma; its snr is ((1 - sigma) / sigma)^2."""


def time_weight(scheme: str, path: Path, t: Tensor) -> Tensor:
    """(B,): one of TIME_WEIGHTS at sigma = b / (a + b), the straight path's time of the same signal-to-noise ratio."""
    return TIME_WEIGHTS[scheme](torch.sigmoid(-path.log_snr(t)))


def checked_weight(name: str, *more: str) -> str:
    """`name`, which must be in TIME_WEIGHTS or `more`. Raises InputError otherwise."""
    if name not in (*TIME_WEIGHTS, *more):
        raise unknown("weight", name, (*TIME_WEIGHTS, *more))
    return name


def pseudo_huber(error: Tensor, c: float, per: Literal["row", "element"] = "row") -> Tensor:
    """(B,): sqrt(|error|^2 + c^2) - c of the rows (B, *D) (iCT, arXiv 2310.14189), or its mean over their elements.

    Quadratic below c and linear above; the root's slope is 0 where both are 0.
    """
    rows = error.flatten(1)
    square = rows.square().sum(1, keepdim=True) if per == "row" else rows.square()
    root = (square + c**2).clamp_min(torch.finfo(rows.dtype).tiny).sqrt()
    return (square / (root + c)).mean(1)  # root - c, without the loss of digits below c


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda error: error.square().flatten(1).mean(1),
    "l1": lambda error: error.abs().flatten(1).mean(1),
    "huber": lambda error: pseudo_huber(error, 1e-3, "element"),
}
"""How far two samples are apart, (B,), by their difference (B, *D): a mean over elements. "huber" is latent consistency
models' (arXiv 2310.04378)."""


def checked_distance(name: str) -> str:
    """`name`, which must be in DISTANCES. Raises InputError otherwise."""
    if name not in DISTANCES:
        raise unknown("distance", name, DISTANCES)
    return name


def apart(x: Tensor, y: Tensor, path: Path, t: Tensor, distance: str = "l2") -> Tensor:
    """(B,): one of DISTANCES between states x and y (B, *D) at t, scaled to the variance-preserving path."""
    return DISTANCES[distance]((x - y) / like(torch.hypot(*path.ab(t)), x))


@torch.no_grad()
def endpoint(net: nn.Module, path: Path, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """Where a consistency function says the trajectory through x (B, *D) at s (B,) ends: its x0, without gradient.

    At the data end of the path (s <= t_min) it is the state itself, x / a, whatever `net` says.
    """
    there = net(x, s.clamp_min(path.t_min), cond).x0
    at_data = (s <= path.t_min).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(at_data, x / like(path.ab(s)[0], x), there)


def from_normal(x: Tensor) -> Tensor:
    """(B,): how far the numbers of each sample (B, *D) are from standard normal ones, by their mean and variance alone.

    The Kullback-Leibler divergence (mean^2 + variance - 1 - log variance) / 2 of two normal laws.
    """
    rows = x.flatten(1)
    mean, var = rows.mean(1), rows.var(1)
    return (mean.square() + var - 1 - var.log()) / 2


def gap_weight(x: Tensor, real: Tensor) -> Tensor:
    """(B,): 1 / max(mean_D |x - D_p|, 1e-5), without gradient (SiD's omega, arXiv 2404.04057)."""
    return (x - real).detach().abs().flatten(1).mean(1).clamp_min(1e-5).reciprocal()


@torch.no_grad()
def matching(
    teacher: nn.Module, fake: nn.Module, path: Path, x: Tensor, cond: Cond, t: Tensor, draw: Draws
) -> tuple[Tensor, Estimate]:
    """(D_fake - D_teacher) / mean |x - D_teacher| of samples x (B, *D) noised to t (B,), and what the fake says there.

    What x descends so that its law becomes the teacher's (DMD2, arXiv 2405.14867).
    """
    xt = path.mix(x, draw.normal(x), t)
    real, est = teacher(xt, t, cond).x0, fake(xt, t, cond)
    return like(gap_weight(x, real), x) * (est.x0 - real), est


def sid(x: Tensor, real: Tensor, fake: Tensor, alpha: float | Tensor, weight: Tensor) -> Tensor:
    """(D_p - D_psi) . ((D_p - x) - alpha (D_p - D_psi)), summed over D, weighted (B,), mean over B.

    Score identity distillation (arXiv 2404.04057): gradient must flow through x, real and fake (B, *D) alike. Twice
    the gradient at alpha = 1/2 is that of the Fisher divergence. alpha: one, or (B,).
    """
    gap, alpha = real - fake, like(alpha, x) if isinstance(alpha, Tensor) else alpha
    return reduced(like(weight, x) * gap * ((real - x) - alpha * gap), "sum")


GAN_LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softplus": (lambda logit: F.softplus(-logit), lambda logit: F.softplus(-logit)),
    "hinge": (lambda logit: F.relu(1 - logit), lambda logit: -logit),
}
"""What a logit costs: the critic where it should be large, and the student. "softplus" is the non-saturating loss of
Goodfellow et al. (arXiv 1406.2661), whose best logit is log(real / fake); "hinge" that of Lim and Ye (1705.02894)."""


def gan_critic(real: Tensor, fake: Tensor, loss: str = "softplus", weight: Tensor | None = None) -> Tensor:
    """What the critic descends on its logits (B, N) of real and of the student's samples: a sum of two means.

    weight: (B,), of the samples of both.
    """
    cost = GAN_LOSSES[loss][0]
    return _mean(cost(real), weight) + _mean(cost(-fake), weight)


def gan_student(fake: Tensor, loss: str = "softplus", weight: Tensor | None = None) -> Tensor:
    """What the student descends on the critic's logits (B, N) of its samples, of weight (B,)."""
    return _mean(GAN_LOSSES[loss][1](fake), weight)


def _mean(cost: Tensor, weight: Tensor | None) -> Tensor:
    """(B, N) -> scalar."""
    return (cost if weight is None else (like(weight, cost) * cost)).mean()


def approx_r1(logits: Tensor, nudged: Tensor) -> Tensor:
    """Mean squared change of the logits (B, N) of real samples under a little noise, for the critic to descend.

    |gradient|^2 times the variance of the noise, without a second derivative (arXiv 2501.08316, equation 3).
    """
    return (logits - nudged).square().mean()


def checked_gan(name: str) -> str:
    """`name`, which must be in GAN_LOSSES. Raises InputError otherwise."""
    if name not in GAN_LOSSES:
        raise unknown("GAN loss", name, GAN_LOSSES)
    return name


def sim(x: Tensor, real: Tensor, fake: Tensor, c: float, weight: Tensor) -> Tensor:
    """- d'(y) . (D_psi - x) of y = D_psi - D_p and d(y) = sqrt(|y|^2 + c^2 D), weighted (B,), mean over B.

    Score implicit matching (arXiv 2410.16794): gradient must flow through x, real and fake (B, *D) alike. It is that of
    d between the scores with the sampling law frozen.
    """
    y = (fake - real).flatten(1)
    slope = y / (y.square().sum(1, keepdim=True) + c**2 * y.shape[1]).sqrt()
    return -(weight.to(x) * (slope * (fake - x).flatten(1)).sum(1)).mean()


DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "fkl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "js": lambda r: r / (1 + r),
    "hellinger": lambda r: r.sqrt() / 2,
    "soft-rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 2 / r,
    "pearson": lambda r: 2 * r**2,
}
"""h(r) = r^2 f''(r) at the ratio r = p / q of teacher to student, for the divergence E_q f(r): what its gradient weighs
the score difference by (f-distill, arXiv 2502.15681). f: -log r, r log r, (r - 1) log r, r log r - (r + 1) log((r + 1)
/ 2), (1 - sqrt r)^2, (r + 1) log((r + 1) / r), (1 - r)^2 / r and (r - 1)^2."""


def checked_divergence(name: str) -> str:
    """`name`, which must be in DIVERGENCES. Raises InputError otherwise."""
    if name not in DIVERGENCES:
        raise unknown("divergence", name, DIVERGENCES)
    return name


def ratio(logits: Tensor) -> Tensor:
    """(B,) p / q as a critic's logits (B, N) say it, clipped to [0.1, 20]; without gradient."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.detach().to(wide).mean(1).exp().clamp(0.1, 20)


def level(ratio: Tensor, t: Tensor, bins: int = 10) -> Generator[Mean, Tensor, Tensor]:
    """The ratios (B,) over their mean in each tenth of unit time t (B,), of the whole batch."""
    slot = F.one_hot((t * bins).long().clamp(0, bins - 1), bins).to(ratio)
    total, count = yield Mean(torch.stack([ratio @ slot, slot.sum(0)]))
    return ratio / (slot @ (total / count.clamp_min(torch.finfo(count.dtype).tiny)))


class LogVariance(nn.Module):
    """(B,): the logarithm of the loss at each level of noise, for the adaptive weight.

    A cosine series of the angle atan2(b, a) (sCM, arXiv 2410.11081, which reads the time embedding). `net`: whose type
    it has. `elements`: of a sample; at the start the loss is taken for that of a change of norm one, their mean square
    1 / elements.
    """

    def __init__(self, net: nn.Module, elements: int):
        super().__init__()
        p = next(p for p in net.parameters() if p.is_floating_point())
        self.series = nn.Parameter(torch.zeros(8, dtype=p.dtype, device=p.device))
        nn.init.constant_(self.series[:1], -math.log(elements))

    def forward(self, path: Path, t: Tensor) -> Tensor:
        waves = 2 * torch.atan2(*path.ab(t)[::-1])[:, None] * torch.arange(8, device=t.device)
        return waves.cos().to(self.series) @ self.series
