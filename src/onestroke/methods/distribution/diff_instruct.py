"""Diff-Instruct: the integral KL divergence of a one-step generator, from prompts alone."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn


class DiffInstruct(Method):
    """Luo et al., "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models".

    Algorithm 1. At its own noised sample x_t the student moves along D_psi - D_p, summed over D: the gradient of the KL
    divergence of the noised laws, integrated over the path with the weight (sigma / alpha)^2. The fake learns to
    denoise fresh samples under the EDM weight.

    mean, std: of the log sigma of both turns, published -1.2 and 1.2. sigma_data: of the fake's weight, published 0.5.
    Ours: a guidance_scale other than 1 guides the teacher (published without); both turns see one batch of prompts; the
    student plays first; noise levels end where the path does; the first input is the run's, not sigma = 1; no
    augmentation of the fake, and no dropout, whose random numbers teacher and fake share as published.
    Published settings (CIFAR-10): Adam 1e-5 with betas 0 and 0.999, no clipping.
    """

    players = ("student", "fake")
    paper = "Diff-Instruct, arXiv 2305.18455"
    passes = {"student": 2, "teacher": 2, "fake": 2}
    defaults = {"lr": {"*": 1e-5}, "betas": {"*": [0.0, 0.999]}, "clip": 0.0}

    def __init__(self, parts: Parts, mean: float = -1.2, std: float = 1.2, sigma_data: float = 0.5):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.mean, self.std, self.sigma_data = mean, std, sigma_data

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        xt = self.path.mix(x, draw.normal(x), t)
        with torch.no_grad():
            real, fake = self.guide(self.teacher)(xt, t, cond).x0, self.fake(xt, t, cond).x0
        yield Turn("student", {"ikl": terms.descend(x, fake - real, "sum")})

        with torch.no_grad():
            x = self.few.sample(self.student, draw.normal(batch.noise), cond)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        weight = terms.edm_weight(self.path, t, self.sigma_data)
        dsm = terms.dsm(self.fake, self.path, x, cond, t, draw, space="x0", weight=weight, reduce="sum")
        yield Turn("fake", {"dsm": dsm})
