"""TwinFlow: one network that is flow, shortcut and its own fake score, from prompts alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onestroke import times
from onestroke.denoiser import OnPath, TwoTimes
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import Cond, Flow, like


def robust(est: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """(B,): mean_D (est - target)^2 / sqrt(that + c^2), the root without gradient (Barron's loss at alpha = 1)."""
    error = (est - target).square().flatten(1).mean(1)
    return error / (error.detach() + c**2).sqrt()


class TwinFlow(Method):
    """Cheng et al., "TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows"; its base is
    RCGM, recursive consistent velocities.

    On the straight path the student is a velocity F(x_t, t, s) that reads a second time s: at s = t it is the flow, at
    0 <= s < t the average velocity from t to s, at s = 0 one jump to the data, and at s = -t the flow of its own
    samples, the twin that stands for a fake score. Without s it is the jump: the student that is kept. The base teaches
    rows of three kinds (from t = 1 to 0, to any s, to an s just below t): (t - s) F = the teacher's velocity over a
    step `gap` and what the student itself says of the rest, in `order` jumps. A fourth kind teaches the twin. The
    rectifier moves the jump by the difference of twin and flow at its own noised sample.

    rectify: weight of the rectifier, published 0.5 (0.75 on OpenUni). order: published 2. gap: published 0.01. near:
    how far below t the third kind goes, as a part of t, published 0.05. limit: of every correction, published 1.
    This is the image-free form: samples of the student are noised, and the frozen teacher under the run's
    guidance_scale (published 4) is the velocity. Ours: each row draws its kind; the rectifier sees every row; targets
    use the current weights, as for Qwen-Image, not an average; s enters by the time embedding, and -s stands for
    negative t.
    Published settings: Adam 1e-5 with betas 0.9 and 0.99 (SD 3.5 medium), clip 1.
    """

    players = ("student",)
    paper = "TwinFlow, arXiv 2512.05150"
    passes = {"student": 6, "teacher": 2}
    defaults = {"guidance_scale": 4.0, "lr": {"*": 1e-5}, "betas": {"*": [0.9, 0.99]}, "clip": 1.0}

    def __init__(
        self,
        parts: Parts,
        rectify: float = 0.5,
        order: int = 2,
        gap: float = 0.01,
        near: float = 0.05,
        limit: float = 1.0,
    ):
        super().__init__(parts)
        self.student, self.teacher = TwoTimes(parts.student, parts.shape, parts.null), parts.teacher
        self.few, self.path, self.guide, self.flow = parts.few, parts.path, parts.guide, Flow()
        self.rectify, self.order, self.gap, self.near, self.limit = rectify, order, gap, near, limit

    def velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """F (B, *D) of the student at x (B, *D) of the straight path."""
        est = OnPath(self.student, self.path, self.flow)(x, t, {**cond, "s": s})
        return est.eps - est.x0

    def leap(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """The integral of F from t to s (B, *D), in `order` jumps."""
        start = x
        for i in range(self.order):
            now, then = (t.lerp(s, j / self.order) for j in (i, i + 1))
            x = x - like(now - then, x) * self.velocity(x, now, then, cond)
        return start - x

    def residual(self, x: Tensor, t: Tensor, s: Tensor, f: Tensor, v: Tensor, cond: Cond) -> Tensor:
        """What F(x, t, s) = f lacks, (B, *D): zero where (t - s) F is `gap` v and a leap over the rest."""
        rest = self.leap(x - self.gap * v, (t - self.gap).maximum(s), s, cond)
        far = like(t - s >= self.gap, x) > 0
        return torch.where(far, (like(t - s, x) * f - rest) / self.gap, f) - v

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        est = self.student(self.few.input(batch.noise), self.few.time(0, batch.noise), cond)
        jump, x = est.eps - est.x0, est.x0.detach()

        kind, u = (4 * draw.uniform()).long(), draw.uniform()
        t = self.flow.time_of(self.path.log_snr(times.straight(draw, self.path)))
        top = self.flow.time_of(self.path.log_snr(self.few.time(0, x)))
        t = torch.where(kind == 0, top, t)
        s = torch.stack([0 * t, u * t, t - self.near * u * t, -t]).gather(0, kind[None])[0]
        z = draw.normal(x)
        xt = self.flow.mix(x, z, t)
        f = self.velocity(xt, t, s, cond)
        with torch.no_grad():
            real = OnPath(self.guide(self.teacher), self.path, self.flow)(xt, t, cond)
            wrong = self.residual(xt, t, s.maximum(0 * s), f, real.eps - real.x0, cond)
            target = torch.where(like(kind == 3, x) > 0, z - x, f - wrong.clamp(-self.limit, self.limit))
        weight = torch.where(kind == 3, 1.0, torch.tan((1 - (t - s)) * (math.pi / 2.5)) + 1)
        base = (weight.to(x) * robust(f, target)).mean()

        with torch.no_grad():
            t = self.flow.time_of(self.path.log_snr(times.straight(draw, self.path)))
            xt = self.flow.mix(x, draw.normal(x), t)
            gap = self.velocity(xt, t, -t, cond) - self.velocity(xt, t, t, cond)
        twin = robust(jump, (jump - gap.clamp(-self.limit, self.limit)).detach()).mean()
        yield Turn("student", {"base": base, "rectifier": self.rectify * twin})
