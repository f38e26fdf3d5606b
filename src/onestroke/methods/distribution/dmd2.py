"""DMD2: distribution matching with two time scales, a GAN on real images and backward simulation of several steps."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.method import Batch, Mean, Method, Parts, Turn, frozen
from onestroke.paths import Estimate, like


class DMD2(Method):
    """Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis".

    Every round draws one of the student's steps and runs the student up to it; only that call records gradient. The
    fake score learns to denoise the sample; a head on its bottleneck tells noised real images from noised samples, and
    both train it. One round in `ttur`, and before the fake plays, the student descends (D_fake - D_teacher) / mean
    |x - D_teacher| at its noised sample, with the guided teacher, plus softplus of minus the head's logit on a sample
    noised anew.

    ttur: rounds per turn of the student, published 5 (10 for SD1.5). gan_weight: of the student's GAN loss beside the
    mean-reduced matching loss, published 5e-3 (SDXL), 3e-3 (ImageNet-64), 1e-3 (SD1.5, in a second stage); 0 builds no
    head and needs prompts alone. critic_weight: of the head's loss beside the fake's, published 1e-2. lo, hi: unit
    times of the matching, published 20 to 980 of 1000.
    Ours: the head is onestroke's small one; the fake learns by eps error on every path (published with EDM's weight on
    pixels); a loss that is not finite stops the run.
    Published settings (SDXL): guidance 8, AdamW 5e-7 with decay 0.01, clip 10, warm-up over 500 rounds, no average.
    """

    players = ("student", "fake")
    needs = frozenset({"x0"})
    paper = "DMD2, arXiv 2405.14867"
    passes = {"student": 1, "teacher": 2, "fake": 5}
    max_steps = 8
    defaults = {
        "guidance_scale": 8.0,
        "lr": {"*": 5e-7},
        "weight_decay": 0.01,
        "clip": 10.0,
        "warmup": 500,
        "ema": 0.0,
    }

    def __init__(
        self,
        parts: Parts,
        ttur: int = 5,
        gan_weight: float = 5e-3,
        critic_weight: float = 1e-2,
        lo: float = 0.02,
        hi: float = 0.98,
    ):
        super().__init__(parts)
        self.fake = parts.critic("fake") if gan_weight else parts.copy("fake")
        self.student, self.teacher = parts.student, parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.ttur, self.gan_weight, self.critic_weight, self.lo, self.hi = ttur, gan_weight, critic_weight, lo, hi

    @classmethod
    def needs_of(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return cls.needs if options["gan_weight"] else frozenset()

    def logits(self, x: Tensor, batch: Batch) -> Tensor:
        """Of the head, at x (B, *D) noised anew to a level from the whole path."""
        t = times.uniform(batch.draw, self.path)
        return self.fake(self.path.mix(x, batch.draw.normal(x), t), t, batch.cond).features[0]

    def weight(self, x: Tensor, real: Estimate, fake: Estimate, t: Tensor) -> Generator[Mean, Tensor, Tensor]:
        """(B,) of the score difference at t (B,): a generator, for divergences that must know of the whole batch."""
        yield from ()
        return terms.gap_weight(x, real.x0)

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        k, moves = int(draw.shared() * len(self.few.times)), step % self.ttur == 0
        with torch.set_grad_enabled(moves):
            x = self.few.sample(self.student, batch.noise, cond, draw, k)
        if moves:
            t = times.uniform(draw, self.path, self.lo, self.hi)
            xt = self.path.mix(x, draw.normal(x), t)
            with torch.no_grad():
                real, fake = self.guide(self.teacher)(xt, t, cond), self.fake(xt, t, cond)
            weight = yield from self.weight(x, real, fake, t)
            loss = {"dm": terms.descend(x, like(weight, x) * (fake.x0 - real.x0))}
            with frozen(self.fake):
                if self.gan_weight:
                    loss["gan"] = self.gan_weight * terms.gan_student(self.logits(x, batch))
                yield Turn("student", loss)

        x = x.detach()
        loss = {"dsm": terms.dsm(self.fake, self.path, x, cond, times.uniform(draw, self.path), draw)}
        if self.gan_weight:
            assert batch.x0 is not None
            loss["gan"] = self.critic_weight * terms.gan_critic(self.logits(batch.x0, batch), self.logits(x, batch))
        yield Turn("fake", loss)
