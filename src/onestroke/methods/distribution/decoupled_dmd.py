"""Decoupled DMD: distribution matching and guidance as two terms with a schedule each, from prompts alone."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


class DecoupledDMD(Method):
    """Liu et al., "Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield".

    Every round draws one of the student's steps and runs the student up to it; only that call records gradient. Two
    noised copies of the sample x give its direction: distribution matching, D_fake - D_teacher, at any level; and CFG
    augmentation, (guidance_scale - 1) (D_null - D_teacher) of the teacher alone, at levels cleaner than the input of
    the step. At equal levels their sum is DMD's direction under guidance. The fake learns to denoise x by x0 error at
    any level; one round in `ttur`, and before the fake plays, the student plays too. The fake is not told the step: of
    several steps it is the mixture of their samples whose law becomes the teacher's, not each step's.

    ttur: rounds per turn of the student, 5 as in DMD2.
    Ours: each term is divided by mean |x - D_teacher| at its own level (the paper leaves it open), with the teacher
    unguided, so that equal schedules keep the terms in DMD's proportion; no GAN.
    Published settings (SDXL): those of DMD2.
    """

    players = ("student", "fake")
    paper = "Decoupled DMD, arXiv 2511.22677"
    passes = {"student": 1, "teacher": 3, "fake": 2}
    max_steps = 8
    defaults = {
        "guidance_scale": 8.0,
        "lr": {"*": 5e-7},
        "weight_decay": 0.01,
        "clip": 10.0,
        "warmup": 500,
        "ema": 0.0,
    }

    def __init__(self, parts: Parts, ttur: int = 5):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide, self.scale = parts.few, parts.path, parts.guide, parts.guidance_scale
        self.ttur = ttur

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        k, moves = int(draw.shared() * len(self.few.times)), step % self.ttur == 0
        with torch.set_grad_enabled(moves):
            x = self.few.sample(self.student, batch.noise, cond, draw, k)
        if moves:
            t = times.uniform(draw, self.path)
            xt = self.path.mix(x, draw.normal(x), t)
            with torch.no_grad():
                real, fake = self.teacher(xt, t, cond).x0, self.fake(xt, t, cond).x0
            matching = like(terms.gap_weight(x, real), x) * (fake - real)

            t = times.uniform(draw, self.path, hi=self.few.times[k])
            xt = self.path.mix(x, draw.normal(x), t)
            with torch.no_grad():
                real, null = self.teacher(xt, t, cond).x0, self.guide(self.teacher, 0)(xt, t, cond).x0
            augmentation = (self.scale - 1) * like(terms.gap_weight(x, real), x) * (null - real)
            yield Turn("student", {"dm": terms.descend(x, matching), "ca": terms.descend(x, augmentation)})

        t = times.uniform(draw, self.path)
        yield Turn("fake", {"dsm": terms.dsm(self.fake, self.path, x.detach(), cond, t, draw, space="x0")})
