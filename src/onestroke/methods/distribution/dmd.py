"""DMD: distribution matching of a one-step student, held to the teacher's own pictures of the same noise."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


class DMD(Method):
    """Yin et al., "One-step Diffusion with Distribution Matching Distillation".

    At its own noised sample the student descends alpha (D_fake - D_teacher) / mean |x - D_teacher|, with the guided
    teacher: the difference of the scores under the paper's weight. Beside it, a regression on pairs of the teacher's
    solver keeps its modes: the distance of the student's answer to a noise from the solver's. The fake learns to
    denoise the sample; both play every round.

    reg_weight: of the regression, published 0.25; 0 needs prompts alone. c: of its distance, sqrt(mean (x - y)^2 + c^2)
    less c. lo, hi: unit times of the matching, published 20 to 980 of 1000.
    Ours: this distance between latents, of bounded gradient, in place of LPIPS between pictures; the fake learns by eps
    error on every path; solver and number of steps are settings of the run.
    Published settings (SD 1.5): guidance 3 (8 for the sharper model), AdamW 1e-5 with decay 0.01, clip 10.
    """

    players = ("student", "fake")
    needs = frozenset({"pairs"})
    needs_if = {"reg_weight": "pairs"}
    paper = "DMD, arXiv 2311.18828"
    passes = {"student": 2, "teacher": 2, "fake": 2}
    defaults = {"guidance_scale": 3.0, "lr": {"*": 1e-5}, "weight_decay": 0.01, "clip": 10.0, "ema": 0.0}

    def __init__(self, parts: Parts, reg_weight: float = 0.25, c: float = 0.00054, lo: float = 0.02, hi: float = 0.98):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.reg_weight, self.c, self.lo, self.hi = reg_weight, c, lo, hi

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.uniform(draw, self.path, self.lo, self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        with torch.no_grad():
            real, fake = self.guide(self.teacher)(xt, t, cond).x0, self.fake(xt, t, cond).x0
        weight = self.path.ab(t)[0].to(x) * terms.gap_weight(x, real)
        loss = {"dm": terms.descend(x, like(weight, x) * (fake - real))}
        if self.reg_weight:
            assert batch.pairs is not None
            gap = self.few.sample(self.student, batch.pairs.noise, cond) - batch.pairs.x0
            size = (gap.square().flatten(1).mean(1) + self.c**2).sqrt() - self.c
            loss["reg"] = self.reg_weight * size.mean()
        yield Turn("student", loss)

        t = times.uniform(draw, self.path)
        yield Turn("fake", {"dsm": terms.dsm(self.fake, self.path, x.detach(), cond, t, draw)})
