"""DMD2: distribution matching with two time scales, a GAN on real images and backward simulation of several steps."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.method import Batch, Mean, Method, Parts, Turn, frozen
from onestroke.paths import Estimate


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
    needs_if = {"gan_weight": "x0"}
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

    def step(self, batch: Batch, step: int):
        k = int(batch.draw.shared() * len(self.few.times))
        with torch.no_grad():
            xk = self.few.inputs(self.student, batch.noise, batch.cond, batch.draw, k)[-1]

        def sample() -> Tensor:
            return self.student(xk, self.few.time(k, xk), batch.cond).x0

        if step % self.ttur == 0:
            x = yield from self.student_turn(sample, batch, k)
        else:
            with torch.no_grad():
                x = sample()
        loss = {"dsm": terms.dsm(self.fake, self.path, x, batch.cond, times.uniform(batch.draw, self.path), batch.draw)}
        if self.gan_weight:
            assert batch.x0 is not None
            loss["gan"] = self.critic_weight * terms.gan_critic(self.logits(batch.x0, batch), self.logits(x, batch))
        yield Turn("fake", loss)

    def student_turn(
        self, sample: Callable[[], Tensor], batch: Batch, k: int
    ) -> Generator[Turn | Mean, Tensor, Tensor]:
        """Match a sample of call number k; returns it."""
        x = sample()
        yield from self.descend(x, self.direction(x.detach(), batch)[0], batch)
        return x.detach()

    def direction(self, x: Tensor, batch: Batch) -> tuple[Tensor, Estimate, Tensor]:
        """The normalised score difference (B, *D) at x noised anew; what the fake says there, and the time (B,)."""
        t = times.uniform(batch.draw, self.path, self.lo, self.hi)
        teacher = self.guide(self.teacher)
        return *terms.matching(teacher, self.fake, self.path, x, batch.cond, t, batch.draw), t

    def descend(self, x: Tensor, direction: Tensor, batch: Batch) -> Iterator[Turn]:
        """The student's turn on x (B, *D), with the GAN."""
        loss = {"dm": terms.descend(x, direction)}
        with frozen(self.fake):
            if self.gan_weight:
                loss["gan"] = self.gan_weight * terms.gan_student(self.logits(x, batch))
            yield Turn("student", loss)

    def logits(self, x: Tensor, batch: Batch) -> Tensor:
        """Of the head, at x (B, *D) noised anew to a level from the whole path."""
        t = times.uniform(batch.draw, self.path)
        return self.fake(self.path.mix(x, batch.draw.normal(x), t), t, batch.cond).features[0]
