"""LADD: adversarial distillation in latent space, against the features of the frozen teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.draws import Draws
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.paths import Cond


class LADD(Method):
    """Sauer et al., "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation".

    The student, called on real latents noised to one of its levels (the first input is noise alone), must pass for
    real: its sample and a real one are noised again, the frozen teacher reads both, and a head on each of its tapped
    layers judges the features, at every place of them. No regression and no second score.

    mean, std: of the log noise-to-signal ratio of that noising, published 1 and 1 (logit-normal time of the straight
    path), which favours the layout of the picture. loss: of the GAN, published hinge; softplus is the other. first: the
    probability of a few-step student's first level, published 0.7; the others share the rest. easy: rounds at the start
    that train the cleaner half of the levels alone, published 500.
    Ours: published are pictures that the teacher drew under guidance, here any that the run is given, so that the run's
    guidance_scale is not read; heads read the features alone, neither time nor pooled text, and two 1x1 layers judge
    each place by itself, where published are convolutions over its neighbours with spectral and virtual batch norm.
    """

    players = ("student", "heads")
    needs = frozenset({"x0", "features"})
    paper = "LADD, arXiv 2403.12015"
    passes = {"student": 1, "teacher": 3}
    max_steps = 4

    def __init__(
        self,
        parts: Parts,
        mean: float = 1.0,
        std: float = 1.0,
        loss: str = "hinge",
        first: float = 0.7,
        easy: int = 500,
    ):
        super().__init__(parts)
        self.student, self.heads, self.teacher = parts.student, parts.heads(), parts.teacher
        self.few, self.path = parts.few, parts.path
        self.mean, self.std, self.loss, self.first, self.easy = mean, std, terms.checked_gan(loss), first, easy

    def call(self, draw: Draws, step: int) -> Tensor:
        """Which of the student's calls each row trains, (B,)."""
        count, u = len(self.few.times), draw.uniform()
        if count > 1 and step < self.easy:
            return count // 2 + (u * (count - count // 2)).long()
        rest = 1 + ((u - self.first) / (1 - self.first) * (count - 1)).long()
        return torch.where(u < self.first, 0, rest).clamp_max(count - 1)

    def judge(self, x: Tensor, cond: Cond, t: Tensor, draw: Draws) -> Tensor:
        """The heads' logits (B, N) of samples x (B, *D), noised to t."""
        return self.heads(self.teacher(self.path.mix(x, draw.normal(x), t), t, cond).features)

    def step(self, batch: Batch, step: int):
        cond, draw, real = batch.cond, batch.draw, batch.x0
        assert real is not None
        xt, t = self.few.noised(real, batch.noise, self.call(draw, step))
        x = self.student(xt, t, cond).x0
        t = times.log_normal(draw, self.path, self.mean, self.std)
        with frozen(self.teacher, self.heads):
            yield Turn("student", {"gan": terms.gan_student(self.judge(x, cond, t, draw), self.loss)})

        t = times.log_normal(draw, self.path, self.mean, self.std)
        with frozen(self.teacher):
            logits = self.judge(real, cond, t, draw), self.judge(x.detach(), cond, t, draw)
            yield Turn("heads", {"gan": terms.gan_critic(*logits, self.loss)})
