"""Noising paths: x_t = a(t) x0 + b(t) eps with unit time t in [0, 1]; 0 is data, 1 is noise, for every path.

Two formulas define a path, `ab` and `time_of`; everything else is derived here and nowhere else. Coefficients are
float64 of shape (B,) and are cast once, when they multiply a tensor of shape (B, *D).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from onestroke.errors import InputError

Prediction = Literal["x0", "eps", "v", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
Cond = Mapping[str, Tensor]
"""Everything a network reads beside (x, t); every tensor has leading dimension B."""


def like(c: Tensor, x: Tensor) -> Tensor:
    """Coefficients (B,) as (B, 1, ..., 1) in the type of x (B, *D), ready to multiply it."""
    return c.reshape(-1, *[1] * (x.ndim - 1)).to(x)


class Estimate(NamedTuple):
    """What a denoiser believes about x_t. Invariant: a(t) x0 + b(t) eps == x_t."""

    x0: Tensor  # (B, *D)
    eps: Tensor  # (B, *D)
    features: tuple[Tensor, ...] = ()  # of the tapped layers


@dataclass(frozen=True)
class Path(ABC):
    """A schedule (a, b) over unit time, usable on [t_min, t_max]."""

    t_min: float = 1e-3
    t_max: float = 1.0

    @abstractmethod
    def ab(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at t (B,), each (B,)."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """The t (B,) at which log(a / b) equals log_snr (B,)."""

    def snap(self, t: Tensor) -> Tensor:
        """The nearest times that a teacher on this path was trained at; the identity for continuous paths."""
        return t

    def floor(self, t: Tensor) -> Tensor:
        """The last such times that are not after t."""
        return t

    def grid(self, steps: int) -> tuple[float, ...]:
        """The times of a student's `steps` calls, from noise to data, equally spaced."""
        return tuple(min(1 - i / steps, self.t_max) for i in range(steps))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(da/dt, db/dt) at t, by forward-mode differentiation of `ab`."""
        return torch.func.jvp(self.ab, (t.contiguous(),), (torch.ones_like(t),))[1]

    def log_snr(self, t: Tensor) -> Tensor:
        """log(a / b) at t."""
        a, b = self.ab(t)
        return a.log() - b.log()

    def unit_ab(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) / sqrt(a^2 + b^2): the variance-preserving point of the same signal-to-noise ratio."""
        a, b = self.ab(t)
        norm = torch.hypot(a, b)
        return a / norm, b / norm

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B, *D)."""
        a, b = self.ab(t)
        return like(a, x0) * x0 + like(b, x0) * eps

    def basis(
        self, t: Tensor, prediction: Prediction, ab: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(p, q) such that a network of this prediction type outputs p x0 + q eps. The only place that knows.

        ab: (a, b) at t, where they are at hand.
        """
        if prediction == "x0":
            return torch.ones_like(t), torch.zeros_like(t)
        if prediction == "eps":
            return torch.zeros_like(t), torch.ones_like(t)
        if prediction == "v":
            a, b = ab or self.ab(t)
            return -b, a
        return self.rates(t)

    def split(self, x: Tensor, out: Tensor, t: Tensor, prediction: Prediction) -> Estimate:
        """Network output -> (x0, eps), by solving [[a, b], [p, q]] [x0, eps] = [x_t, out]."""
        a, b = self.ab(t)
        p, q = self.basis(t, prediction, (a, b))
        det = a * q - b * p
        wide = torch.promote_types(x.dtype, torch.float32)
        x, out = x.to(wide), out.to(wide)
        x0 = like(q / det, x) * x - like(b / det, x) * out
        return Estimate(x0, like(a / det, x) * out - like(p / det, x) * x)

    def diffuse(self, x: Tensor, s: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The state at t (B,) of x (B, *D) at s <= t, the rest of the noise by eps (B, *D): its law is that of x_t."""
        (a, b), (c, d) = self.ab(t), self.ab(s)
        return like(a / c, x) * x + like((b**2 - (a * d / c) ** 2).clamp_min(0).sqrt(), x) * eps

    def through(self, x: Tensor, t: Tensor, y: Tensor, s: Tensor) -> Estimate:
        """The (x0, eps) that mix to x (B, *D) at t and to y at s: what one DDIM step from x to y implies."""
        (a, b), (p, q) = self.ab(t), self.ab(s)
        det = a * q - b * p
        return Estimate(like(q / det, x) * x - like(b / det, x) * y, like(a / det, x) * y - like(p / det, x) * x)

    def join(self, x0: Tensor, eps: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """(x0, eps) -> what a network of this prediction type should output (the inverse of split)."""
        p, q = self.basis(t, prediction)
        return like(p, x0) * x0 + like(q, x0) * eps

    def check(self, prediction: Prediction) -> None:
        """Raise ValueError where (x0, eps) cannot be recovered from x_t and the output at an end of the path."""
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction type {prediction!r}; expected one of {', '.join(PREDICTIONS)}.")
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64)
        (a, b), (p, q) = self.ab(ends), self.basis(ends, prediction)
        for t, det in zip(ends.tolist(), (a * q - b * p).tolist(), strict=True):
            if not 1e-5 <= abs(det) < math.inf:
                raise ValueError(
                    f"{prediction!r} prediction is singular on {self!r} at t={t:g}: x0 and eps cannot be recovered. "
                    "Move t_min or t_max inside (0, 1), or use another prediction type."
                )


@dataclass(frozen=True)
class VP(Path):
    """Variance preserving, sqrt(beta) linear in t (Stable Diffusion's "scaled linear" schedule, continuous).

    beta(t) = (sqrt(beta_min) + t (sqrt(beta_max) - sqrt(beta_min)))^2; a = exp(-1/2 integral of beta). At t=1 the
    defaults give b/a = 14.5, as Stable Diffusion's table does (arXiv 2112.10752).
    """

    beta_min: float = 0.85
    beta_max: float = 12.0

    def ab(self, t):
        lo, hi = math.sqrt(self.beta_min), math.sqrt(self.beta_max)
        integral = t * lo**2 + t**2 * lo * (hi - lo) + t**3 * (hi - lo) ** 2 / 3
        return (-0.5 * integral).exp(), (-torch.expm1(-integral)).sqrt()

    def time_of(self, log_snr):
        lo, hi = math.sqrt(self.beta_min), math.sqrt(self.beta_max)
        integral = torch.nn.functional.softplus(-2 * log_snr)
        return ((lo**3 + 3 * (hi - lo) * integral).pow(1 / 3) - lo) / (hi - lo)


@dataclass(frozen=True)
class Table(Path):
    """Variance preserving on a table of alphas_cumprod (N,), t = index / (N - 1); zero terminal SNR included.

    Between entries the angle atan2(b, a) is linear, so a^2 + b^2 == 1 holds everywhere. `snap` gives whole indices.
    """

    t_min: float = 0.0
    alphas_cumprod: tuple[float, ...] = field(default=(), repr=False)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def _angles(self) -> np.ndarray:
        table = np.array(self.alphas_cumprod)
        return np.arctan2(np.sqrt((1 - table).clip(0)), np.sqrt(table))

    def angles(self, device: torch.device) -> Tensor:
        """atan2(b, a) of every entry, increasing, float64 (N,)."""
        return torch.from_numpy(self._angles).to(device)

    def ab(self, t):
        angles = self.angles(t.device)
        index = t * (self.num_timesteps - 1)
        low = index.detach().floor().clamp(0, self.num_timesteps - 2).long()
        angle = torch.lerp(angles[low].to(t), angles[low + 1].to(t), index - low)
        return angle.cos(), angle.sin()

    def time_of(self, log_snr):
        angles = self.angles(log_snr.device)
        angle = torch.atan((-log_snr).exp())
        high = torch.searchsorted(angles, angle.detach().to(angles)).clamp(1, self.num_timesteps - 1)
        lo, hi = angles[high - 1].to(angle), angles[high].to(angle)
        return ((angle - lo) / (hi - lo) + high - 1) / (self.num_timesteps - 1)

    def grid(self, steps):
        """The grid of diffusers' LCMScheduler: 999, 749, 499, 249 for four steps of a thousand."""
        stride = self.num_timesteps // steps
        return tuple(min((stride * (steps - i) - 1) / (self.num_timesteps - 1), self.t_max) for i in range(steps))

    def snap(self, t):
        last = self.num_timesteps - 1
        return (t * last).round() / last

    def floor(self, t):
        last = self.num_timesteps - 1
        return (t * last + 1e-6).floor() / last


@dataclass(frozen=True)
class EDM(Path):
    """Variance exploding, a = 1, b = sigma on the ramp of Karras et al. (arXiv 2206.00364, equation 5)."""

    t_min: float = 0.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def ab(self, t):
        lo, hi = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (lo + t * (hi - lo)) ** self.rho

    def time_of(self, log_snr):
        lo, hi = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((-log_snr / self.rho).exp() - lo) / (hi - lo)


@dataclass(frozen=True)
class Flow(Path):
    """Rectified flow: a = 1 - t, b = t (arXiv 2209.03003); flow prediction is eps - x0.

    shift: of the times of `grid`, which the points 1 - i / steps become: s t / (1 + (s - 1) t) (arXiv 2403.03206,
    equation 23). terminal: None, or the last time of a scheduler that spaces its times by itself, from 1 to
    1 / num_timesteps, shifts them and stretches them to end there; 0 leaves them.
    """

    shift: float = 1.0
    terminal: float | None = None
    num_timesteps: int = 1000

    def ab(self, t):
        return 1 - t, t

    def rates(self, t):
        return -torch.ones_like(t), torch.ones_like(t)

    def time_of(self, log_snr):
        return torch.sigmoid(-log_snr)

    def shifted(self, t: float) -> float:
        """The time that the time t of an unshifted flow becomes."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def grid(self, steps):
        if self.terminal is None:
            return tuple(min(self.shifted(1 - i / steps), self.t_max) for i in range(steps))
        last = self.shifted(1 / self.num_timesteps)
        times = [self.shifted(1 + (last - 1) * i / max(steps - 1, 1)) for i in range(steps)]
        if self.terminal and steps == 1:
            raise InputError("this scheduler ends its times at a point of its own: it draws in 2 steps or more.")
        stretch = (1 - self.terminal) / (1 - times[-1]) if self.terminal else 1
        return tuple(min(1 - (1 - t) * stretch, self.t_max) for t in times)


@dataclass(frozen=True)
class Trig(Path):
    """TrigFlow: a = cos(pi t / 2), b = sigma_data sin(pi t / 2) (arXiv 2410.11081, section 3)."""

    sigma_data: float = 1.0

    def ab(self, t):
        angle = t * (math.pi / 2)
        return angle.cos(), self.sigma_data * angle.sin()

    def time_of(self, log_snr):
        return torch.atan((-log_snr).exp() / self.sigma_data) * (2 / math.pi)


def coarse(path: Path) -> Tensor:
    """a and b of a path to six decimals (2, 64), int64: what tells it from others on every machine."""
    ab = path.ab(torch.linspace(path.t_min, path.t_max, 64, dtype=torch.float64))
    return (torch.stack(ab) * 1e6).round().to(torch.int64)
