"""VSD: variational score distillation of a one-step generator, from prompts alone."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


class VSD(Method):
    """Wang et al., "ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score
    Distillation", with a one-step generator in place of the particles.

    Algorithm 1. The student moves along sigma^2 (eps_teacher - eps_fake) at its own noised sample, the teacher guided
    and the fake not; after `anneal` rounds at the less noisy times only. The fake learns to denoise the same samples
    by v error at all times. alpha and sigma are those of the variance-preserving point of the same signal-to-noise
    ratio. The fake is a LoRA over the teacher's weights, or a full copy at lora_rank 0.

    lo, hi: unit times of the student's turn, published 0.02 and 0.98. anneal, annealed_hi: the round from which, and
    the noisiest time to which it is restricted, published 5000 and 0.5.
    Ours: a time per sample, not per batch; no camera condition, and so none to drop.
    Published settings: guidance 7.5, AdamW 1e-4 for the LoRA, of diffusers' rank 4.
    """

    players = ("student", "fake")
    paper = "ProlificDreamer, arXiv 2305.16213"
    passes = {"student": 1, "teacher": 2, "fake": 2}
    defaults = {"guidance_scale": 7.5, "lr": {"*": 1e-5, "fake": 1e-4}, "lora_rank": {"fake": 4}}

    def __init__(self, parts: Parts, lo: float = 0.02, hi: float = 0.98, anneal: int = 5000, annealed_hi: float = 0.5):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.lo, self.hi, self.anneal, self.annealed_hi = lo, hi, anneal, annealed_hi

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.uniform(draw, self.path, self.lo, self.hi if step < self.anneal else self.annealed_hi)
        xt = self.path.mix(x, draw.normal(x), t)
        with torch.no_grad():
            real, fake = self.guide(self.teacher)(xt, t, cond), self.fake(xt, t, cond)
        sigma = like(self.path.unit_ab(t)[1], x)
        yield Turn("student", {"vsd": terms.descend(x, sigma**2 * (real.eps - fake.eps), "sum")})

        t = times.uniform(draw, self.path)
        weight = self.path.unit_ab(t)[1] ** -2  # makes of the x0 error that of v on the variance-preserving path
        dsm = terms.dsm(self.fake, self.path, x.detach(), cond, t, draw, space="x0", weight=weight)
        yield Turn("fake", {"dsm": dsm})
