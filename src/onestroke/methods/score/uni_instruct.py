"""Uni-Instruct: score identity distillation of any f-divergence, by the ratio that the fake's discriminator learns."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from onestroke import terms
from onestroke.method import Batch, Mean, Parts, Turn
from onestroke.methods.score.sida import SiDA
from onestroke.paths import like


class UniInstruct(SiDA):
    """Wang et al., "Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction".

    Diffusion expands an f-divergence of the data into that over all times of E_q h(r) |s_p - s_q|^2, r = p_t / q_t, h =
    r^2 f''(r). Its gradient is that of [(h - r h') |D_p - D_psi|^2 / 2 + h (D_p - D_psi) . (D_psi - x)] / omega, which
    is SiD's loss at alpha = (1 + r h' / h) / 2, times h; it flows through x_t everywhere, in r by its own rule, r times
    the difference of the scores. The ratio is exp of the fake's logit, clipped and divided by its mean in each tenth of
    unit time, and h by its batch mean, as in f-distill. All else, the GAN too, is SiDA.

    divergence: rkl (h = 1, alpha 1/2: the Fisher divergence), fkl (r, alpha 1; published default), jeffreys (1 + r), js
    (r / (1 + r)), hellinger (sqrt r), soft-rkl (1 / (1 + r)), neyman (1 / r) or pearson (r^2). All but rkl need the
    discriminator. limit: of every element of eps_p - eps_psi in the slope of r, which an imperfect fake makes too large
    where there is little noise. gan_from: the first round of the divergence, too; before it the student plays SiD.
    gan_weight, critic_weight, prelude, alpha, scale, hi, mean, std, sigma_data: as in SiDA; alpha before gan_from.
    Ours: as in SiDA; limit; the loss is derived, and its ratio that of f-distill, where the released code takes it from
    the discriminator's loss.
    Published settings (CIFAR-10): those of SiD.
    """

    paper = "Uni-Instruct, arXiv 2505.20755"
    passes = {"student": 3, "teacher": 2, "fake": 4}

    def __init__(
        self,
        parts: Parts,
        divergence: str = "fkl",
        limit: float = 1.0,
        alpha: float = 1.0,
        scale: float = 100.0,
        gan_weight: float = 0.01,
        critic_weight: float = 1.0,
        prelude: int = 390,
        gan_from: int = 780,
        hi: float = 0.8,
        mean: float = -1.2,
        std: float = 1.2,
        sigma_data: float = 0.5,
    ):
        super().__init__(parts, alpha, scale, gan_weight, critic_weight, prelude, gan_from, hi, mean, std, sigma_data)
        self.divergence, self.limit = terms.checked_divergence(divergence), limit
        self.judged = self.judged or divergence != "rkl"

    @classmethod
    def needs_of(cls, options: Mapping[str, Any]) -> frozenset[str]:
        divergence = terms.checked_divergence(options["divergence"])
        return super().needs_of(options) if divergence == "rkl" else cls.needs

    def student_turn(self, batch: Batch, t: Tensor, eps: Tensor, joined: bool) -> Generator[Turn | Mean, Tensor, None]:
        if not joined:
            return (yield from super().student_turn(batch, t, eps, joined))
        if self.divergence == "rkl":
            return (yield from self.descend(batch, t, eps, joined, lambda xt, gap: (0.5, 1.0)))
        weigh = terms.DIVERGENCES[self.divergence]
        with torch.no_grad():
            x = self.few.sample(self.student, batch.noise, batch.cond)  # and again below, as in f-distill
            ratio = terms.ratio(self.logits(self.fake(self.path.mix(x, eps, t), t, batch.cond)))
        ratio = yield from terms.level(ratio, t)
        mean = yield Mean(weigh(ratio).mean())

        def rule(xt: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self.path.ab(t)
            slope = (like(a / b, gap) * gap.detach()).clamp(-self.limit, self.limit) / like(b, gap)
            r = ratio * (1 + ((xt - xt.detach()) * slope).flatten(1).sum(1))
            h, change = torch.func.jvp(weigh, (r,), (r,))[:2]  # change: r h'(r)
            return (1 + change / h) / 2, h / mean

        yield from self.descend(batch, t, eps, joined, rule)
