"""Diff-Instruct++: Diff-Instruct of a one-step generator that a reward pulls on, from prompts and a reward."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn


class DiffInstructPP(Method):
    """Luo, "Diff-Instruct++: Training One-step Text-to-image Generator Model to Align with Human Preferences".

    The student maximises the reward of its sample, reward_weight times, against the integral KL divergence to the
    guided teacher: it moves along D_psi - D_p at its noised sample, summed over D, minus reward_weight times the
    reward's gradient. The fake, which is never guided, learns to denoise fresh samples under the EDM weight.

    The law that it finds is the teacher's tilted by the reward. On Gaussians, with P and Q the variances of teacher and
    student at x_t = a x + b eps, the reward -(x - c)^2 / 2 and w = reward_weight, the fixed point at a time t is
    1 / Q = 1 / P + w / b^2 at the mean (m b^2 / P + c w) / (b^2 / P + w), and from w = 1 - b^2 / P on a point.

    reward_weight: published 100, for a human-preference reward of pictures. mean, std: of the log sigma of both turns,
    published -1.2 and 1.2. sigma_data: of the fake's weight, published 0.5.
    Ours: both turns see one batch of prompts; the student plays first; noise levels end where the path does; the first
    input is the run's.
    Published settings (SDXL): guidance 8.5; the learning rates are Diff-Instruct's.
    """

    players = ("student", "fake")
    needs = frozenset({"reward"})
    paper = "Diff-Instruct++, arXiv 2410.18881"
    passes = {"student": 2, "teacher": 2, "fake": 2}
    defaults = {"guidance_scale": 8.5, "lr": {"*": 1e-5}, "betas": {"*": [0.0, 0.999]}, "clip": 0.0}

    def __init__(
        self,
        parts: Parts,
        reward_weight: float = 100.0,
        mean: float = -1.2,
        std: float = 1.2,
        sigma_data: float = 0.5,
    ):
        super().__init__(parts)
        assert parts.reward is not None, "needs a reward"
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide, self.reward = parts.few, parts.path, parts.guide, parts.reward
        self.reward_weight, self.mean, self.std, self.sigma_data = reward_weight, mean, std, sigma_data

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        xt = self.path.mix(x, draw.normal(x), t)
        with torch.no_grad():
            real, fake = self.guide(self.teacher)(xt, t, cond).x0, self.fake(xt, t, cond).x0
        ikl = terms.descend(x, fake - real, "sum")
        yield Turn("student", {"ikl": ikl, "reward": -self.reward_weight * self.reward(x, cond).mean()})

        with torch.no_grad():
            x = self.few.sample(self.student, draw.normal(batch.noise), cond)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        weight = terms.edm_weight(self.path, t, self.sigma_data)
        dsm = terms.dsm(self.fake, self.path, x, cond, t, draw, space="x0", weight=weight, reduce="sum")
        yield Turn("fake", {"dsm": dsm})
