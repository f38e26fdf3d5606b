"""Score forgetting: distil a one-step generator that has forgotten a concept, from prompts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.denoiser import dropped
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.paths import Cond


class ScoreForgetting(Method):
    """Chen et al., "Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion
    Models".

    Two losses of SiD-LSG. On the run's prompts, which should not name what is to be forgotten, the student keeps the
    teacher's law. Under a forgotten prompt it draws, the fake learns its samples under that prompt, and the teacher
    speaks for the prompt that overrides it: at rest, q(x | forgotten) = p(x | override).

    forget: prompts to forget, separated by ";". override: one prompt for all of them, or one for each. Both are "" by
    default, the empty prompt, which overrides itself: nothing is forgotten. keep_weight, forget_weight: of the two
    losses in both turns, published 1 and 1 for Stable Diffusion, 1 and 0.01 on CIFAR-10. delay: rounds before the
    second loss, published 0; the two-stage variant distils first. alpha: published 1.0 on Stable Diffusion, 1.2 on
    CIFAR-10. scale: of the student's losses. lo, hi: unit times (published: 20 to 979 of 1000). null_rate: of the
    fake's kept prompts, 0.1 as in SiD-LSG, none without guidance.
    Ours: both turns see one batch of prompts; the student plays first; the first input is the run's, not timestep 625.
    Published settings (SD 1.5, from a student of SiD-LSG): guidance 4.5, Adam 1e-6 and for the fake 3e-6, batch 8.
    """

    players = ("student", "fake")
    paper = "SFD, arXiv 2409.11219"
    passes = {"student": 4, "teacher": 4, "fake": 8}
    defaults = {"guidance_scale": 4.5, "lr": {"student": 1e-6, "fake": 3e-6}, "betas": {"*": [0.0, 0.999]}, "clip": 1.0}

    def __init__(
        self,
        parts: Parts,
        forget: str = "",
        override: str = "",
        keep_weight: float = 1.0,
        forget_weight: float = 1.0,
        delay: int = 0,
        alpha: float = 1.0,
        scale: float = 1.0,
        lo: float = 0.02,
        hi: float = 0.979,
        null_rate: float = 0.1,
    ):
        super().__init__(parts)
        gone, instead = ([text.strip() for text in texts.split(";")] for texts in (forget, override))
        if len(instead) not in (1, len(gone)):
            raise InputError(f"override holds {len(instead)} prompts for {len(gone)} to forget; give one, or as many.")
        self.count, self.forget, self.override = len(gone), parts.prompts(gone), parts.prompts(instead)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide, self.null = parts.few, parts.path, parts.guide, parts.null
        self.keep_weight, self.forget_weight, self.delay = keep_weight, forget_weight, delay
        self.alpha, self.scale, self.lo, self.hi = alpha, scale, lo, hi
        self.null_rate = 0.0 if parts.guidance_scale == 1 else null_rate

    def identity(self, noise: Tensor, draw: Draws, cond: Cond, told: Cond) -> Tensor:
        """SiD's loss of samples under `cond`, where the teacher is told `told`."""
        x = self.few.sample(self.student, noise, cond)
        t = times.uniform(draw, self.path, self.lo, self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        real, fake = self.guide(self.teacher)(xt, t, told).x0, self.guide(self.fake)(xt, t, cond).x0
        return terms.sid(x, real, fake, self.alpha, terms.gap_weight(x, real))

    def regression(self, noise: Tensor, draw: Draws, cond: Cond) -> Tensor:
        """The fake's eps error on samples under `cond`, through its guidance."""
        with torch.no_grad():
            x = self.few.sample(self.student, noise, cond)
        t = times.uniform(draw, self.path, self.lo, self.hi)
        return terms.dsm(self.guide(self.fake), self.path, x, cond, t, draw, reduce="sum")

    def step(self, batch: Batch, step: int):
        cond, draw, noise = batch.cond, batch.draw, batch.noise
        weight = 0.0 if step < self.delay else self.forget_weight
        row = (draw.uniform() * self.count).long()
        forget = {k: v.to(noise.device)[row] for k, v in self.forget.items()}
        override = {k: v.to(noise.device)[row % len(v)] for k, v in self.override.items()}
        with frozen(self.teacher, self.fake):
            keep = self.keep_weight * self.identity(noise, draw, cond, cond)
            gone = weight * self.identity(draw.normal(noise), draw, forget, override)
            yield Turn("student", {"keep": self.scale * keep, "forget": self.scale * gone})

        cond = dropped(cond, self.null, draw.uniform() < self.null_rate)
        keep = self.keep_weight * self.regression(draw.normal(noise), draw, cond)
        gone = weight * self.regression(draw.normal(noise), draw, forget)
        yield Turn("fake", {"keep": keep, "forget": gone})
