"""SiD: score identity distillation of a one-step generator, from prompts alone."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn, frozen


class SiD(Method):
    """Zhou et al., "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models".

    Algorithm 1. At its own noised sample x_t the student descends
    (D_p - D_psi) . ((D_p - x) - alpha (D_p - D_psi)) / omega, omega = max(mean |x - D_p|, 1e-5) without gradient, which
    flows through the inputs of teacher and fake; the fake learns to denoise fresh samples under the EDM weight.

    alpha: published 1.2 (1.0 on AFHQ); 1/2 is the Fisher gradient, which fails on pictures. scale: of the student's
    loss, published 100. hi: the noisiest level of the student's turn on the Karras ramp, published 0.8. mean, std: of
    the fake's log sigma, published -1.2 and 1.2. sigma_data: of the fake's weight, published 0.5.
    Ours: a guidance_scale other than 1 guides the teacher (published without); both turns see one batch of prompts; the
    student plays first; noise levels end where the path does; the first input is the run's, not sigma = 2.5; no
    augmentation of the fake; a loss that is not finite stops the run, and no sample is dropped.
    Published settings (CIFAR-10): Adam 1e-5 with betas 0 and 0.999, no clipping.
    """

    players = ("student", "fake")
    paper = "SiD, arXiv 2404.04057"
    passes = {"student": 2, "teacher": 2, "fake": 2}
    defaults = {"lr": {"*": 1e-5}, "betas": {"*": [0.0, 0.999]}, "clip": 0.0}

    def __init__(
        self,
        parts: Parts,
        alpha: float = 1.2,
        scale: float = 100.0,
        hi: float = 0.8,
        mean: float = -1.2,
        std: float = 1.2,
        sigma_data: float = 0.5,
    ):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.alpha, self.scale, self.hi = alpha, scale, hi
        self.mean, self.std, self.sigma_data = mean, std, sigma_data

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.karras(draw, self.path, hi=self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        with frozen(self.teacher, self.fake):
            real, fake = self.guide(self.teacher)(xt, t, cond).x0, self.fake(xt, t, cond).x0
            loss = terms.sid(x, real, fake, self.alpha, terms.gap_weight(x, real))
            yield Turn("student", {"sid": self.scale * loss})

        with torch.no_grad():
            x = self.few.sample(self.student, draw.normal(batch.noise), cond)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        weight = terms.edm_weight(self.path, t, self.sigma_data)
        dsm = terms.dsm(self.fake, self.path, x, cond, t, draw, space="x0", weight=weight, reduce="sum")
        yield Turn("fake", {"dsm": dsm})
