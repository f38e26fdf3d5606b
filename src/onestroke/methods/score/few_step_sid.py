"""Few-step SiD: score identity distillation of a uniform mixture over the student's steps, from prompts alone."""

from __future__ import annotations

import math

import torch

from onestroke import terms, times
from onestroke.denoiser import TwoTimes, dropped
from onestroke.errors import unknown
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.paths import Cond

GUIDANCE: dict[str, tuple[float | None, float | None, float | None]] = {
    "long-short": (None, None, None),
    "zero": (1.0, 0.0, 0.0),
    "anti": (1.0, -1.0, 1.0),
}
"""Guidance scales of the teacher, of the fake in the student's loss and of the fake in training; None: the run's."""


class FewStepSiD(Method):
    """Zhou et al., "Few-Step Diffusion via Score identity Distillation"; with the settings for flow models of
    "Score Distillation of Flow Matching Models", arXiv 2509.25127.

    Every round draws one step k of the student's K, shared by all processes, and matches the law of its output after k
    calls by the loss of SiD; only the last call is differentiated. The fake learns the velocity of samples after k
    calls. With one step, the student's turn is that of SiD. Of several, the mixture alone is driven to the teacher's
    law: each step's own law is free within it. The noise between the steps is the run's `renoise`: "fresh" (published
    default), "fixed", or "implied" (published as "ddim").

    guidance: "long-short", the run's guidance_scale on the teacher, on the fake and through the fake in training (as
    SiD-LSG); "zero", a teacher without guidance and a fake without prompts; "anti", a fake of negative guidance, -1 of
    our choice, trained plainly. Zero and anti push towards the prompt as guidance does, by 1 and 2 times
    D_psi(c) - D_psi(null): a student of the teacher's law is *not* at rest. They are published for use with a GAN loss
    on real images. weight: of the student's loss, 1-sigma (published default), one, (1-sigma)^2, 1/sigma, 1/sigma^2,
    snr or sqrt-snr of the straight path, or gap, SiD's 1 / mean |x - D_p|. alpha: published 1. scale: of the student's
    loss. mean, std: of log(sigma / (1 - sigma)) in both turns, published log 2 and 1.6. null_rate: of the fake's
    prompts, 0.1 as in SiD-LSG, none where no guidance is in use. apart: the fake reads k, as a second time, so that the
    law of each step becomes the teacher's, and the last is not spoilt in making up for the others.
    Ours: apart; both turns see one batch of prompts; the student plays first.
    Published settings (SANA 0.6B): guidance 4.5, four steps, Adam 5e-6 with betas 0 and 0.999, batch 256.
    """

    players = ("student", "fake")
    paper = "few-step SiD, arXiv 2505.12674"
    passes = {"student": 2, "teacher": 2, "fake": 4}
    max_steps = 8
    defaults = {"guidance_scale": 4.5, "lr": {"*": 5e-6}, "betas": {"*": [0.0, 0.999]}, "clip": 0.0}

    def __init__(
        self,
        parts: Parts,
        guidance: str = "long-short",
        weight: str = "1-sigma",
        alpha: float = 1.0,
        scale: float = 1.0,
        mean: float = math.log(2),
        std: float = 1.6,
        null_rate: float = 0.1,
        apart: bool = False,
    ):
        super().__init__(parts)
        if guidance not in GUIDANCE:
            raise unknown("guidance", guidance, GUIDANCE)
        scales = [parts.guidance_scale if kappa is None else kappa for kappa in GUIDANCE[guidance]]
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide, self.null = parts.few, parts.path, parts.guide, parts.null
        self.apart = apart and len(parts.few.times) > 1
        if self.apart:
            self.fake = TwoTimes(self.fake, parts.shape, parts.null)
        self.of_teacher, self.of_fake, self.in_training = scales
        self.weight, self.alpha, self.scale = terms.checked_weight(weight, "gap"), alpha, scale
        self.mean, self.std = mean, std
        self.null_rate = 0.0 if self.of_fake == self.in_training == 1 else null_rate

    def told(self, cond: Cond, k: int) -> Cond:
        """What the fake reads of samples after call number k."""
        if not self.apart:
            return cond
        v = next(iter(cond.values()))
        return {**cond, "s": torch.full((len(v),), k / len(self.few.times), device=v.device)}

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        k = int(draw.shared() * len(self.few.times))
        x = self.few.sample(self.student, batch.noise, cond, draw, upto=k)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        xt = self.path.mix(x, draw.normal(x), t)
        with frozen(self.teacher, self.fake):
            real = self.guide(self.teacher, self.of_teacher)(xt, t, cond).x0
            fake = self.guide(self.fake, self.of_fake)(xt, t, self.told(cond, k)).x0
            gap = self.weight == "gap"
            weight = terms.gap_weight(x, real) if gap else terms.time_weight(self.weight, self.path, t)
            yield Turn("student", {"sid": self.scale * terms.sid(x, real, fake, self.alpha, weight)})

        cond = dropped(cond, self.null, draw.uniform() < self.null_rate)
        with torch.no_grad():
            x = self.few.sample(self.student, draw.normal(batch.noise), cond, draw, upto=k)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        fake, velocity = self.guide(self.fake, self.in_training), terms.time_weight("1/sigma^2", self.path, t)
        told = self.told(cond, k)
        dsm = terms.dsm(fake, self.path, x, told, t, draw, space="x0", weight=velocity, reduce="sum")
        yield Turn("fake", {"dsm": dsm})
