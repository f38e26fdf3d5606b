"""rCM: sCM for large models, by the plain sum of squares; here its forward half, which learns the trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke.errors import InputError, unknown
from onestroke.method import Batch, Parts, Turn
from onestroke.methods.consistency.scm import RADIAN, SCM
from onestroke.paths import like
from onestroke.tangent import Field


class RCM(SCM):
    """Zheng et al., "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency".

    sCM (see `scm`) with g = -cos(tau) sqrt(1 - r^2 sin(tau)^2) (F - teacher) - cos(tau) sin(tau) (r x + dF/dtau), where
    r is warmed up, and the loss scale * sum (F - F^- - g / (|g| + norm))^2 without a weight. A sample with a number
    that is not finite counts as zero. The reverse half of the paper is DMD (see `dmd2`) on the student's samples.

    mean, std: of log tan(tau), published -0.8 and 1.6. sigma_data: as in `scm`, published 1. ramp: rounds of the
    warm-up, published 1,000, of 14B 300. warm: what it warms up beside the teacher's part: "x" alone, as released now,
    where at r = 0 the teacher is not at rest, or "all", r dF/dtau too, as first released. norm: published 0.1. scale:
    published 100. difference: as in `scm`. semi: 0; or the step in radians, published 1e-4, of the semi-continuous
    derivative: that in x as it was, that in time as (cos(h) F(x, tau) - F(x, tau - h)) / sin(h), one more call, for
    networks whose times are not made for derivatives. In bfloat16 take 0.01: at 1e-4 the rounding is ten times the
    derivative.
    Ours: the student keeps its own path and prediction type; near the data the step of time is at most half of it.
    Published settings: guidance 5 (the first release: F + 5 (F - null), which is 6), synthetic data of the teacher,
    AdamW 2e-6 with betas 0 and 0.999, decay 0.01, no clipping, bfloat16.
    """

    players = ("student",)
    paper = "rCM, arXiv 2510.08431"
    defaults = {
        "guidance_scale": 5.0,
        "lr": {"*": 2e-6},
        "betas": {"*": [0.0, 0.999]},
        "weight_decay": 0.01,
        "clip": 0.0,
    }

    def __init__(
        self,
        parts: Parts,
        mean: float = -0.8,
        std: float = 1.6,
        sigma_data: float = 1.0,
        ramp: int = 1_000,
        warm: str = "x",
        norm: float = 0.1,
        scale: float = 100.0,
        difference: float = 0.0,
        semi: float = 0.0,
    ):
        super().__init__(parts, mean, std, sigma_data, ramp, norm, difference=difference)
        if not 0 <= semi < 0.5:
            raise InputError(f"semi={semi} must lie in [0, 0.5), in radians; 0 is the derivative itself.")
        if warm not in ("x", "all"):
            raise unknown("warm", warm, ("x", "all"))
        self.scale, self.semi, self.warm = scale, semi, warm

    @torch.no_grad()
    def derivative(self, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        if not self.semi:
            return super().derivative(field, x, t, dx, dt)
        f, df = self.tangent(field, x, t, dx, 0 * dt)
        h = (t / RADIAN / 2).clamp(max=self.semi)
        before = field(x, t - h * RADIAN)
        return f, df + like(dt / RADIAN, x) * (like(h.cos(), x) * f - before) / like(h.sin(), x)

    def shares(self, cos: Tensor, sin: Tensor, ramp: float) -> tuple[Tensor, float]:
        return (1 - (ramp * sin) ** 2).sqrt(), ramp if self.warm == "all" else 1.0

    def step(self, batch: Batch, step: int):
        error, _ = self.error(batch, batch.cond, step, self.guide(self.teacher))
        error = error.where(error.isfinite(), 0)  # one such number is in the norm of the whole sample
        yield Turn("student", {"change": self.scale * error.square().flatten(1).sum(1).mean()})
