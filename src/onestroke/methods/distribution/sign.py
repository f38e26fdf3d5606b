"""SIGN: a one-step generator that leaves its own samples as they are, distilled without a discriminator."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import Cond, like


class SIGN(Method):
    """Zaman, Liu and Chiu, "Score-based Idempotent Distillation of Diffusion Models".

    The student is one map f of points of unit variance, noise and pictures alike, without a time. Distribution matching
    with a fake score brings f(z) to the teacher's law, in place of the adversarial loss of idempotent networks. Beside
    it f should leave f(z) and real pictures where they are, give one answer along the teacher's flow, and denoise.

    idempotence: weight of |f(sg f(z)) - sg f(z)|^2. reconstruct: of |f(x) - x|^2 on real pictures. flow: of
    |f(x_t) - sg f(x_s)|^2, x_s one Euler step of the teacher down from the noised picture x_t. denoise: of
    |f(x_t) - x|^2 at times up to `low`. gap: of the Euler step, in unit time. lo, hi: unit times of the matching.
    The paper's weights, times and schedules were not found: all values here are ours. The weights are small because,
    where pictures fill their space, no map but the identity is at rest under all terms. On a subspace the projection
    is, save for denoise, where it nearly is.
    """

    players = ("student", "fake")
    needs = frozenset({"x0"})
    paper = "SIGN, arXiv 2509.21470"
    passes = {"student": 6, "teacher": 4, "fake": 2}

    def __init__(
        self,
        parts: Parts,
        idempotence: float = 0.1,
        reconstruct: float = 0.1,
        flow: float = 0.1,
        denoise: float = 0.1,
        low: float = 0.1,
        gap: float = 0.04,
        lo: float = 0.02,
        hi: float = 0.98,
    ):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.idempotence, self.reconstruct, self.flow, self.denoise = idempotence, reconstruct, flow, denoise
        self.low, self.gap, self.lo, self.hi = low, gap, lo, hi

    def f(self, y: Tensor, cond: Cond, t: Tensor | None = None) -> Tensor:
        """The map (B, *D) at y of unit variance, or at a point of time t, brought to it."""
        return self.few.sample(self.student, y if t is None else y / like(torch.hypot(*self.path.ab(t)), y), cond)

    def step(self, batch: Batch, step: int):
        cond, draw, real = batch.cond, batch.draw, batch.x0
        assert real is not None
        x = self.f(batch.noise, cond)
        t = times.uniform(draw, self.path, self.lo, self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        with torch.no_grad():
            p, q = self.guide(self.teacher)(xt, t, cond).x0, self.fake(xt, t, cond).x0
        loss = {"dm": terms.descend(x, like(terms.gap_weight(x, p), x) * (q - p))}

        x = x.detach()
        t = times.uniform(draw, self.path, self.gap)
        xt, down = self.path.mix(real, draw.normal(real), t), (t - self.gap).clamp_min(self.path.t_min)
        with torch.no_grad():
            est = self.guide(self.teacher)(xt, t, cond)
            target = self.f(self.path.mix(est.x0, est.eps, down), cond, down)
        early = times.uniform(draw, self.path, hi=self.low)
        noised = self.path.mix(real, draw.normal(real), early)
        regressions = {
            "idempotence": (self.idempotence, self.f(x, cond), x),
            "reconstruct": (self.reconstruct, self.f(real, cond), real),
            "flow": (self.flow, self.f(xt, cond, t), target),
            "denoise": (self.denoise, self.f(noised, cond, early), real),
        }
        for name, (weight, y, to) in regressions.items():
            loss[name] = weight * terms.reduced((y - to).square(), "mean")
        yield Turn("student", loss)

        yield Turn("fake", {"dsm": terms.dsm(self.fake, self.path, x, cond, times.uniform(draw, self.path), draw)})
