"""Diff-Instruct*: score implicit matching of a one-step generator that a reward pulls on, from prompts and a reward."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn, frozen


class DiffInstructStar(Method):
    """Luo et al., "Diff-Instruct*: Towards Human-Preferred One-step Text-to-image Generative Models".

    The student maximises the reward of its sample, reward_weight times, against the pseudo-Huber divergence of SIM
    between its scores and those of the guided teacher; the gradient of the latter flows through the inputs of both
    networks. The fake, which is never guided, learns to denoise fresh samples under the EDM weight.

    The law that it finds is not that of Diff-Instruct++. On Gaussians, with P and Q the variances of teacher and
    student at x_t = a x + b eps, the reward -(x - r)^2 / 2, w = reward_weight and a large c, the fixed point at a time
    t is 1 / Q = (1 / P + sqrt(1 / P^2 + 2 w c / b^4)) / 2 at the mean (m k + r w) / (k + w), k = b^4 / (c P Q).

    reward_weight: published 100, for a human-preference reward of pictures. c: in units of x0 and of sqrt(D); the
    paper's value was not found, 0.00054 is that of improved consistency training. weight: of the divergence in time,
    which the paper leaves open: one, 1-sigma, (1-sigma)^2, 1/sigma, 1/sigma^2, snr or sqrt-snr of the straight path.
    mean, std: of the log sigma of both turns, -1.2 and 1.2 as in SIM. sigma_data: of the fake's weight, 0.5.
    Ours: guidance enters through the teacher's score (the paper's default); the student plays first; noise levels end
    where the path does; the first input is the run's.
    Published settings (SDXL): guidance 8.5; the learning rates are SIM's.
    """

    players = ("student", "fake")
    needs = frozenset({"reward"})
    paper = "Diff-Instruct*, arXiv 2410.20898"
    passes = {"student": 2, "teacher": 2, "fake": 2}
    defaults = {"guidance_scale": 8.5, "lr": {"*": 1e-5}, "betas": {"*": [0.0, 0.999]}, "clip": 0.0}

    def __init__(
        self,
        parts: Parts,
        reward_weight: float = 100.0,
        c: float = 0.00054,
        weight: str = "one",
        mean: float = -1.2,
        std: float = 1.2,
        sigma_data: float = 0.5,
    ):
        super().__init__(parts)
        assert parts.reward is not None, "needs a reward"
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide, self.reward = parts.few, parts.path, parts.guide, parts.reward
        self.reward_weight, self.c, self.weight = reward_weight, c, terms.checked_weight(weight)
        self.mean, self.std, self.sigma_data = mean, std, sigma_data

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        xt = self.path.mix(x, draw.normal(x), t)
        with frozen(self.teacher, self.fake):
            real, fake = self.guide(self.teacher)(xt, t, cond).x0, self.fake(xt, t, cond).x0
            sim = terms.sim(x, real, fake, self.c, terms.time_weight(self.weight, self.path, t))
            yield Turn("student", {"sim": sim, "reward": -self.reward_weight * self.reward(x, cond).mean()})

        with torch.no_grad():
            x = self.few.sample(self.student, draw.normal(batch.noise), cond)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        weight = terms.edm_weight(self.path, t, self.sigma_data)
        dsm = terms.dsm(self.fake, self.path, x, cond, t, draw, space="x0", weight=weight, reduce="sum")
        yield Turn("fake", {"dsm": dsm})
