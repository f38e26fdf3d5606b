"""SLAM: latent consistency from every point of the sub-path between two neighbouring states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like
from onestroke.solvers import NOISIEST, euler


class SLAM(Method):
    """Xu et al., "Accelerating Image Generation with Sub-path Linear Approximation Model", arXiv 2404.13903.

    As `lcm`, under one guidance, but the student starts anywhere on the chord between the two states: at x_g / a = g
    x_t / a_t + (1 - g) x_s / a_s, g uniform in [0, 1]. Both ends of a DDIM step have one noise, so that the level rho =
    b / a there is g rho_t + (1 - g) rho_s, and the student is asked at the time of that level. At g = 1 it is `lcm`.

    grid: DDIM times, published 50, of 20 times of a thousand each. keep: of the average per round, published 0.95.
    distance: huber (per element, c = 0.001), l2 or l1. Published guidance_scale: 9.
    Ours: the published student is asked for eps at t, is told g, and its x0 is x_g / a_t - rho_g eps with rho_g^2 =
    rho_s^2 + g^2 (rho_t^2 - rho_s^2), the level where the noises of the step are independent: the same at both ends.
    Asked at the time of its level it is exact from the start, whatever it predicts, and needs no g; at the time of the
    published one it would learn a wrong speed. Where b / a is beyond 4096, as where a path has no signal, g is 1.
    Published settings (SD 1.5): AdamW 8e-6.
    """

    players = ("student",)
    targets = ("slow",)
    needs = frozenset({"x0"})
    paper = "SLAM, arXiv 2404.13903"
    passes = {"student": 1, "slow": 1, "teacher": 2}
    max_steps = 8
    defaults = {"guidance_scale": 9.0, "lr": {"student": 8e-6}}

    def __init__(self, parts: Parts, grid: int = 50, keep: float = 0.95, distance: str = "huber"):
        super().__init__(parts)
        self.student, self.slow, self.teacher = parts.student, parts.target(), parts.teacher
        self.path, self.guide = parts.path, parts.guide
        self.grid, self.keep = times.strides(parts.path, grid), keep
        self.distance = terms.DISTANCES[terms.checked_distance(distance)]

    def between(self, x: Tensor, t: Tensor, lower: Tensor, s: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """x_g (B, *D) between the states x at t and `lower` at s, on the path, and its time (B,)."""
        high, low = ((-self.path.log_snr(u)).exp() for u in (t, s))
        now = torch.where(g == 1, t, self.path.time_of(-low.lerp(high, g).log()))
        a, at_t, at_s = (self.path.ab(u)[0] for u in (now, t, s))
        return like(torch.where(g == 1, 1.0, g * a / at_t), x) * x + like((1 - g) * a / at_s, x) * lower, now

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        cond = batch.cond
        t, s = times.neighbours(batch.draw, self.grid)
        g = torch.where(-self.path.log_snr(t) <= math.log(NOISIEST), batch.draw.uniform(), 1.0)
        x = self.path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            lower = euler(self.guide(self.teacher), self.path, x, t, s, cond)
            target = terms.endpoint(self.slow, self.path, lower, s, cond)
        x, now = self.between(x, t, lower, s, g)
        error = self.student(x, now.clamp_min(self.path.t_min), cond).x0 - target
        yield Turn("student", {"consistency": self.distance(error).mean()}, follow={"slow": self.keep})
