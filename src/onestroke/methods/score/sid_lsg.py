"""SiD-LSG: score identity distillation under long and short guidance, from prompts alone."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.denoiser import dropped
from onestroke.method import Batch, Method, Parts, Turn, frozen


class SiDLSG(Method):
    """Zhou et al., "Long and Short Guidance in Score identity Distillation for One-Step Text-to-Image Generation".

    The student's loss is that of SiD with both networks under classifier-free guidance: D_p with kappa4, D_psi with
    kappa2 (the paper's kappa3, its second occurrence, has always the same value). The fake learns the eps of fresh
    samples *through* its guidance of scale kappa1, so that its guided estimate is the score of the student's law: with
    kappa1 = kappa2, the student is at rest when that law is the guided teacher's.

    kappa1, kappa2, kappa4: guidance scales, each the run's guidance_scale where it is None (published: all equal, 1.5
    for the best FID up to 4.5 for the best CLIP score; kappa1 > 1 with kappa2 = 1 is "long", kappa4 alone the usual
    guided teacher). alpha: published 1.0. scale: of the student's loss, published 1. lo, hi: unit times of both turns
    (published: 20 to 979 of 1000). null_rate: of the fake's prompts, published 0.1 unless kappa1 = kappa2 = 1.
    Ours: both turns see one batch of prompts; the student plays first; the first input is the run's, not timestep 625.
    Published settings (SD 1.5 and 2.1-base): Adam 1e-6 with betas 0 and 0.999, batch 512.
    """

    players = ("student", "fake")
    paper = "SiD-LSG, arXiv 2406.01561"
    passes = {"student": 2, "teacher": 2, "fake": 4}
    defaults = {"guidance_scale": 1.5, "lr": {"*": 1e-6}, "betas": {"*": [0.0, 0.999]}, "clip": 0.0}

    def __init__(
        self,
        parts: Parts,
        kappa1: float | None = None,
        kappa2: float | None = None,
        kappa4: float | None = None,
        alpha: float = 1.0,
        scale: float = 1.0,
        lo: float = 0.02,
        hi: float = 0.979,
        null_rate: float = 0.1,
    ):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide, self.null = parts.few, parts.path, parts.guide, parts.null
        self.kappa1, self.kappa2, self.kappa4 = (
            parts.guidance_scale if kappa is None else kappa for kappa in (kappa1, kappa2, kappa4)
        )
        self.alpha, self.scale, self.lo, self.hi = alpha, scale, lo, hi
        self.null_rate = 0.0 if self.kappa1 == self.kappa2 == 1 else null_rate

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.uniform(draw, self.path, self.lo, self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        with frozen(self.teacher, self.fake):
            real = self.guide(self.teacher, self.kappa4)(xt, t, cond).x0
            fake = self.guide(self.fake, self.kappa2)(xt, t, cond).x0
            loss = terms.sid(x, real, fake, self.alpha, terms.gap_weight(x, real))
            yield Turn("student", {"sid": self.scale * loss})

        cond = dropped(cond, self.null, draw.uniform() < self.null_rate)
        with torch.no_grad():
            x = self.few.sample(self.student, draw.normal(batch.noise), cond)
        t = times.uniform(draw, self.path, self.lo, self.hi)
        fake = self.guide(self.fake, self.kappa1)
        yield Turn("fake", {"dsm": terms.dsm(fake, self.path, x, cond, t, draw, reduce="sum")})
