"""SDS: score distillation sampling of a one-step generator, from prompts alone; it seeks modes."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


class SDS(Method):
    """Poole et al., "DreamFusion: Text-to-3D using 2D Diffusion", applied to the samples of a one-step generator.

    Equation 3 with the weight sigma^2. The student moves along sigma^2 (eps_teacher - eps), where eps is the noise that
    was added: the direction of variational score distillation with the student's own sample in place of a fake's
    estimate. Every sample therefore moves to a mode of the teacher's law by itself, and nothing keeps them apart.
    alpha and sigma are those of the variance-preserving point of the same signal-to-noise ratio.

    lo, hi: unit times, published 0.02 and 0.98. Ours: a time per sample, not per batch.
    Published settings: guidance 100.
    """

    players = ("student",)
    target = "modes"
    paper = "DreamFusion, arXiv 2209.14988"
    passes = {"student": 1, "teacher": 2}
    defaults = {"guidance_scale": 100.0}

    def __init__(self, parts: Parts, lo: float = 0.02, hi: float = 0.98):
        super().__init__(parts)
        self.student, self.teacher = parts.student, parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.lo, self.hi = lo, hi

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t, eps = times.uniform(draw, self.path, self.lo, self.hi), draw.normal(x)
        with torch.no_grad():
            real = self.guide(self.teacher)(self.path.mix(x, eps, t), t, cond)
        sigma = like(self.path.unit_ab(t)[1], x)
        yield Turn("student", {"sds": terms.descend(x, sigma**2 * (real.eps - eps), "sum")})
