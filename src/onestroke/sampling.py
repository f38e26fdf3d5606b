"""How a few-step student is called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from onestroke.paths import Cond, Estimate, Path, like


class Noise(Protocol):
    """A source of fresh standard-normal noise in the shape of a tensor (B, *D)."""

    def normal(self, like: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FewStep:
    """Call the student at `times`, re-noising its x0 in between.

    start: what multiplies the first standard-normal noise. "unit" gives it the standard deviation of noised
    unit-variance data, sqrt(a^2 + b^2): 1 on VP, as every diffusers pipeline feeds it (SwiftBrush, DMD2). "noise"
    gives it b(t), zero signal (SiD, SiD-LSG).
    renoise: the noise of the later calls. "fresh": drawn anew (DMD2, LCM); "fixed": the first one; "implied": the
    student's own estimate, a DDIM step (TDM). The names are those of few-step SiD (arXiv 2505.12674).
    eta: how far fresh noise reaches back. The call leads to the time (1 - eta) t before the next one, t, and noise goes
    on from there: 1 from the data, 0 as "implied" (TCD's strategic stochastic sampling, arXiv 2402.19159).
    encoder: how often that half of the student runs in a draw. "once": at the first time, and its decoder then at all
    times in parallel (see `onestroke.denoiser.Halves`); its steps are those of "implied" noise.
    """

    path: Path
    times: tuple[float, ...] = (1.0,)
    start: Literal["unit", "noise"] = "unit"
    renoise: Literal["fresh", "fixed", "implied"] = "fresh"
    eta: float = 1.0
    encoder: Literal["each", "once"] = "each"

    @property
    def ahead(self) -> bool:
        """Whether one run of the encoder serves several times."""
        return self.encoder == "once" and len(self.times) > 1

    @cached_property
    def gridded(self) -> bool:
        """Whether its times are those of the path's grid, which a scheduler finds by itself; else they are its own."""
        grid = self.path.grid(len(self.times))
        return max(abs(t - s) for t, s in zip(self.times, grid, strict=True)) < 1e-9

    @cached_property
    def first(self) -> float:
        """What multiplies the first noise, as `start` says."""
        a, b = self.path.ab(torch.tensor([self.times[0]], dtype=torch.float64))
        return (torch.hypot(a, b) if self.start == "unit" else b).item()

    def input(self, noise: Tensor) -> Tensor:
        """The student's first input (B, *D) from standard-normal noise (B, *D)."""
        return noise * self.first

    def eps(self, noise: Tensor, x0: Tensor) -> Tensor:
        """The eps (B, *D) with which x0 mixes to the first input from `noise`; where that has no signal, the noise."""
        a, b = self.path.ab(self.time(0, noise))
        return (self.input(noise) - like(a, x0) * x0) / like(b, x0)

    def time(self, k: int, noise: Tensor) -> Tensor:
        """The unit time (B,) of call number k, float64."""
        return torch.full((len(noise),), self.times[k], dtype=torch.float64, device=noise.device)

    def noised(self, x0: Tensor, noise: Tensor, call: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs x_t (B, *D) and times (B,) of the calls numbered `call` (B,), from clean samples x0 (B, *D).

        The first call sees noise alone, as in sampling; the others see x0 noised to their times.
        """
        t = torch.tensor(self.times, dtype=torch.float64, device=noise.device)[call]
        first = (call == 0).reshape(-1, *[1] * (x0.ndim - 1))
        return torch.where(first, self.input(noise), self.path.mix(x0, noise, t)), t

    def inputs(self, net: nn.Module, noise: Tensor, cond: Cond, draw: Noise | None = None, upto: int | None = None):
        """The inputs x_t (B, *D) of calls 0 .. upto (default: the last), each from the x0 of the one before.

        The student is called `upto` times. `draw` gives the fresh noise; renoise="fresh" needs it beyond one call.
        """
        xs = [self.input(noise)]
        for k in range(len(self.times) - 1 if upto is None else upto):
            est, fresh = net(xs[-1], self.time(k, noise), cond), noise
            if self.renoise == "implied":
                fresh = est.eps
            elif self.renoise == "fresh":
                if draw is None:
                    raise ValueError("sampling in more than one step needs `draw`, the source of the fresh noise.")
                fresh = draw.normal(est.x0)
            t = self.time(k + 1, noise)
            x = self.path.mix(est.x0, fresh, t)
            if self.renoise == "fresh" and self.eta < 1:
                s = self.path.floor((1 - self.eta) * t)
                x = self.path.diffuse(self.path.mix(est.x0, est.eps, s), s, fresh, t)
            xs.append(x)
        return xs

    def estimates(self, net: nn.Module, noise: Tensor, cond: Cond) -> Estimate:
        """x0 and eps (B, K, *D) at all K times of a student whose encoder runs once."""
        t = torch.tensor(self.times, dtype=torch.float64, device=noise.device)
        return net(self.input(noise), t.expand(len(noise), -1), cond)

    def sample(self, net: nn.Module, noise: Tensor, cond: Cond, draw: Noise | None = None, upto: int | None = None):
        """x0 (B, *D) after call number `upto` (default: the last).

        With `upto`, only that call records gradient (backward simulation, DMD2 section 4.5).
        """
        last = len(self.times) - 1 if upto is None else upto
        if self.ahead:
            return self.estimates(net, noise, cond).x0[:, last]
        with torch.set_grad_enabled(torch.is_grad_enabled() and upto is None):
            x = self.inputs(net, noise, cond, draw, last)[-1]
        return net(x, self.time(last, noise), cond).x0
