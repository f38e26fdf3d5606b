"""How a few-step student is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from onestroke.paths import Cond, Path, like


class Noise(Protocol):
    """A source of fresh standard-normal noise in the shape of a tensor (B, *D)."""

    def normal(self, like: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FewStep:
    """Call the student at `times`, re-noising its x0 in between with fresh noise.

    start: what multiplies the first standard-normal noise. "unit" gives it the standard deviation of noised
    unit-variance data, sqrt(a^2 + b^2): 1 on VP, as every diffusers pipeline feeds it (SwiftBrush, DMD2). "noise"
    gives it b(t), zero signal (SiD, SiD-LSG).
    """

    path: Path
    times: tuple[float, ...] = (1.0,)
    start: Literal["unit", "noise"] = "unit"

    def input(self, noise: Tensor) -> Tensor:
        """The student's first input (B, *D) from standard-normal noise (B, *D)."""
        a, b = self.path.ab(torch.tensor([self.times[0]], dtype=torch.float64, device=noise.device))
        return noise * like(torch.hypot(a, b) if self.start == "unit" else b, noise)

    def sample(self, net: nn.Module, noise: Tensor, cond: Cond, draw: Noise | None = None, upto: int | None = None):
        """x0 (B, *D) after call number `upto` (default: the last).

        With `upto`, only that call records gradient (backward simulation, DMD2 section 4.5). `draw` gives the fresh
        noise and is needed when more than one call is made.
        """
        times = self.times if upto is None else self.times[: upto + 1]
        x = x0 = self.input(noise)
        for i, time in enumerate(times):
            t = torch.full((len(noise),), time, dtype=torch.float64, device=noise.device)
            if i > 0:
                if draw is None:
                    raise ValueError("sampling in more than one step needs `draw`, the source of the fresh noise.")
                x = self.path.mix(x0, draw.normal(x0), t)
            with torch.set_grad_enabled(torch.is_grad_enabled() and upto in (None, i)):
                x0 = net(x, t, cond).x0
        return x0
