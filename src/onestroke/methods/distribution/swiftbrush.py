"""SwiftBrush: variational score distillation of a one-step generator, from prompts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.denoiser import dropped
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


class SwiftBrush(Method):
    """Nguyen and Tran, "SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
    arXiv 2312.05239.

    Algorithm 1. The student moves along sigma^2 (eps_teacher - eps_fake) at its own noised sample, both under the same
    classifier-free guidance; the fake score, a LoRA on the teacher's shared weights, learns to denoise the same sample
    by alpha^2-weighted eps error; one round in ten it sees the null prompt. alpha and sigma are those of the
    variance-preserving point of the same signal-to-noise ratio, so that the rule is the same on every path.

    lo, hi: unit times of the student's turn (published: 20 to 980 of 1000). null_rate: published 0.1. alpha_power: of
    alpha in the weight of the fake's eps error (published: 2). Ours: 0, the plain eps error, as in DMD2, teaches the
    fake the noisy half of the path as well; on exact teachers it brings the student twice as near to the truth.
    sigma_power: of sigma in the weight of the student's direction (published: 2). Ours: less weighs the clean half of
    the path more, and flat grounds become clean in fewer rounds; the law at which it vanishes is the same.
    guide_fake: whether the fake is guided too (published). The direction then vanishes at the teacher's unguided law,
    whatever the scale. Ours: False, the fake as it is, as in VSD and DMD2: the student learns the guided teacher.
    Published settings (SD 2.1-base): guidance 4.5, Adam 1e-6 for the student and 1e-3 for the LoRA of rank 64, clip 1.
    """

    players = ("student", "fake")
    paper = "SwiftBrush, arXiv 2312.05239"
    passes = {"student": 1, "teacher": 2, "fake": 3}
    defaults = {
        "guidance_scale": 4.5,
        "lr": {"student": 1e-6, "fake": 1e-3},
        "lora_rank": {"fake": 64},
        "lora_alpha": {"fake": 108},
        "lora_targets": ["to_q", "to_v"],
        "clip": 1.0,
    }

    def __init__(
        self,
        parts: Parts,
        lo: float = 0.02,
        hi: float = 0.98,
        null_rate: float = 0.1,
        alpha_power: float = 2.0,
        sigma_power: float = 2.0,
        guide_fake: bool = True,
    ):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide, self.null = parts.few, parts.path, parts.guide, parts.null
        self.lo, self.hi, self.null_rate = lo, hi, null_rate
        self.alpha_power, self.sigma_power = alpha_power, sigma_power
        self.guide_fake = guide_fake

    def step(self, batch: Batch, step: int):
        x = self.few.sample(self.student, batch.noise, batch.cond)
        yield Turn("student", {"vsd": self.vsd(x, batch)})
        yield Turn("fake", {"dsm": self.dsm(x.detach(), batch)})

    def vsd(self, x: Tensor, batch: Batch) -> Tensor:
        """The loss () whose gradient is the student's direction at its samples (B, ...)."""
        cond, draw = batch.cond, batch.draw
        t = times.uniform(draw, self.path, self.lo, self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        with torch.no_grad():
            fake = self.guide(self.fake) if self.guide_fake else self.fake
            real, fake = self.guide(self.teacher)(xt, t, cond), fake(xt, t, cond)
        sigma = like(self.path.unit_ab(t)[1], x)
        return terms.descend(x, sigma**self.sigma_power * (real.eps - fake.eps))

    def dsm(self, x: Tensor, batch: Batch) -> Tensor:
        """The loss () of the fake on samples (B, ...) of the student."""
        cond, draw = batch.cond, batch.draw
        if draw.shared() < self.null_rate:
            cond = dropped(cond, self.null, torch.ones(len(x), dtype=torch.bool, device=x.device))
        t = times.uniform(draw, self.path)
        alpha = self.path.unit_ab(t)[0]
        return terms.dsm(self.fake, self.path, x, cond, t, draw, weight=alpha**self.alpha_power)
