"""f-distill: DMD2 under any f-divergence, by weighing each sample with the ratio its discriminator has learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onestroke import terms
from onestroke.errors import InputError
from onestroke.method import Mean, Parts
from onestroke.methods.distribution.dmd2 import DMD2
from onestroke.paths import like


class FDistill(DMD2):
    """Xu et al., "One-step Diffusion Models with f-Divergence Distribution Matching".

    DMD2, whose direction at the noised sample x_t is weighed by h(r) = r^2 f''(r), r = p_t / q_t. The ratio is exp of
    the logit of the fake's head at x_t, clipped to [0.1, 20], over its batch mean in each tenth of unit time; h is
    taken over its batch mean. The more h grows with r, the more of the teacher's modes the student covers, and the
    noisier the direction is.

    divergence: rkl (h = 1, DMD2 itself), fkl (r), jeffreys (1 + r), js (r / (1 + r)), hellinger (sqrt r), soft-rkl
    (1 / (1 + r)), neyman (1 / r), or pearson (r^2, which the paper leaves out); published js, and fkl on CIFAR-10. All
    but rkl need the discriminator. ttur: rounds per turn of the student, published 10 (5 for SDXL). gan_weight: of the
    student's GAN loss, published 1e-3 (SD1.5), 3e-3 (ImageNet-64). critic_weight: of the head's loss beside the
    fake's. lo, hi: unit times of the matching, published 20 to 980 of 1000.
    Ours: as DMD2, whose head on the fake gives the logit at x_t at no extra call (published: a discriminator on the
    frozen teacher, a loss of weight 1, the GAN at the same x_t); no average of the time bins over rounds (published 0.5
    on ImageNet-64).
    Published settings (SD1.5): guidance 1.75, AdamW 1e-5 with decay 0.01.
    """

    paper = "f-distill, arXiv 2502.15681"
    passes = {**DMD2.passes, "student": 2}
    defaults = {**DMD2.defaults, "guidance_scale": 1.75, "lr": {"*": 1e-5}}

    def __init__(
        self,
        parts: Parts,
        divergence: str = "js",
        ttur: int = 10,
        gan_weight: float = 1e-3,
        critic_weight: float = 1e-2,
        lo: float = 0.02,
        hi: float = 0.98,
    ):
        super().__init__(parts, ttur, gan_weight, critic_weight, lo, hi)
        self.divergence = terms.checked_divergence(divergence)

    @classmethod
    def needs_of(cls, options: Mapping[str, Any]) -> frozenset[str]:
        divergence = terms.checked_divergence(options["divergence"])
        if divergence != "rkl" and not options["gan_weight"]:
            raise InputError(
                f"divergence={divergence!r} needs the discriminator; set gan_weight above 0, or divergence=rkl."
            )
        return super().needs_of(options)

    def student_turn(self, sample, batch, k):
        if self.divergence == "rkl":
            return (yield from super().student_turn(sample, batch, k))
        with torch.no_grad():
            x = sample()  # and again below: no graph may wait for the means of the whole batch
        direction, fake, t = self.direction(x, batch)
        ratio = yield from terms.level(terms.ratio(fake.features[0]), t)
        h = terms.DIVERGENCES[self.divergence](ratio)
        direction = like(h / (yield Mean(h.mean())), x) * direction
        yield from self.descend(sample(), direction, batch)
        return x
