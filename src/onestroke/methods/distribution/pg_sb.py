"""PG-SB: SwiftBrush under guidance of a random scale (SNOOPI), from prompts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onestroke import terms, times
from onestroke.denoiser import Guided, dropped, negated
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


def listed(negatives: str) -> list[str]:
    """The prompts in the option."""
    return [text.strip() for text in negatives.split(";") if text.strip()]


class PGSB(Method):
    """Nguyen et al., "SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance": its training part.

    SwiftBrush whose guidance scale, the same for teacher and fake, is drawn anew in every round, uniform between
    min_scale and max_scale. The direction is linear in the scale: its mean is SwiftBrush's at the mean scale, and the
    law at which it vanishes for every scale is the teacher's. The run's guidance_scale is not read.

    min_scale, max_scale: published 0.5 and 4 for Stable Diffusion 1.5 and 2.1, 0.5 and 3 for PixArt-alpha. lo, hi,
    null_rate, alpha_power: as in SwiftBrush. negatives: prompts separated by ";", published ten thousand, by default
    none. With them it is NASA-T: the student draws away from one of them, as strongly as a number drawn in every round
    from 0 to 1 says (see `onestroke.teachers.nasa`), and it takes the place of the empty prompt in the guidance of the
    teacher alone. Ours: without SwiftBrush v2's CLIP reward.
    Published settings: AdamW 1e-6 for the student and 1e-3 for the LoRA of rank 64.
    """

    players = ("student", "fake")
    paper = "SNOOPI, arXiv 2412.02687"
    passes = {"student": 1, "teacher": 2, "fake": 3}
    defaults = {
        "lr": {"student": 1e-6, "fake": 1e-3},
        "lora_rank": {"fake": 64},
        "lora_alpha": {"fake": 128},
        "clip": 1.0,
    }

    def __init__(
        self,
        parts: Parts,
        min_scale: float = 0.5,
        max_scale: float = 4.0,
        lo: float = 0.02,
        hi: float = 0.98,
        null_rate: float = 0.1,
        alpha_power: float = 2.0,
        negatives: str = "",
    ):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.null = parts.few, parts.path, parts.null
        self.min_scale, self.max_scale = min_scale, max_scale
        self.lo, self.hi, self.null_rate, self.alpha_power = lo, hi, null_rate, alpha_power

        texts = listed(negatives)
        self.count, self.negatives = len(texts), parts.prompts(texts) if texts else parts.null

    @classmethod
    def needs_of(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"steering"} if listed(options["negatives"]) else ())

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        told, away = cond, self.null
        if self.count:
            rows = (draw.uniform() * self.count).long()
            away = {k: v[rows.to(v.device)] for k, v in self.negatives.items()}
            told = negated(cond, away, draw.shared())
        x = self.few.sample(self.student, batch.noise, told)
        t = times.uniform(draw, self.path, self.lo, self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        scale = self.min_scale + (self.max_scale - self.min_scale) * draw.shared()
        with torch.no_grad():
            nets = ((self.teacher, away), (self.fake, self.null))
            real, fake = (Guided(net, scale, null)(xt, t, cond) for net, null in nets)
        sigma = like(self.path.unit_ab(t)[1], x)
        yield Turn("student", {"vsd": terms.descend(x, sigma**2 * (real.eps - fake.eps))})

        if draw.shared() < self.null_rate:
            cond = dropped(cond, self.null, torch.ones_like(t, dtype=torch.bool))
        t = times.uniform(draw, self.path)
        weight = self.path.unit_ab(t)[0] ** self.alpha_power
        yield Turn("fake", {"dsm": terms.dsm(self.fake, self.path, x.detach(), cond, t, draw, weight=weight)})
