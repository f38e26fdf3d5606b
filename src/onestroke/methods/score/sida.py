"""SiDA: score identity distillation joined by a GAN on real images, whose discriminator is the fake's own encoder."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.denoiser import tap
from onestroke.method import Batch, Mean, Parts, Turn, frozen
from onestroke.methods.score.sid import SiD
from onestroke.paths import Estimate, like

Rule = Callable[[Tensor, Tensor], tuple[float | Tensor, float | Tensor]]
"""x_t (B, *D) and D_p - D_psi -> alpha and the weight of SiD's loss, each one or (B,)."""


class SiDA(SiD):
    """Zhou et al., "Adversarial Score identity Distillation: Rapidly Surpassing the Teacher in One Step".

    SiD at alpha = 1. The mean over the channels of the fake's bottleneck, place by place, is a logit, without weights
    of its own. The student adds the softplus of minus that logit at the same x_t, times D over the same omega, and
    takes half of either; the fake adds half of the discriminator's loss, on real images and samples under one noise,
    with the weight of its regression.

    gan_weight: of the student's GAN loss beside that of SiD, published 0.01; 0 is SiD, and needs prompts alone.
    critic_weight: of the discriminator's loss beside the fake's, published 1. The latter is a sum over D and the former
    is not: for small latents it should be less.
    prelude: rounds in which the fake alone plays, and gan_from: the first round whose student sees the GAN; published
    100 thousand and 200 thousand images, in batches of 256. alpha, scale, hi, mean, std, sigma_data: as in SiD, but for
    alpha, published 1.
    Ours: as in SiD; omega divides each sample's own GAN loss, not that of the batch; no clipping by value.
    Published settings (CIFAR-10): those of SiD.
    """

    needs = frozenset({"x0"})
    needs_if = {"gan_weight": "x0"}
    paper = "SiDA, arXiv 2410.14919"
    passes = {"student": 2, "teacher": 2, "fake": 3}

    def __init__(
        self,
        parts: Parts,
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
        super().__init__(parts, alpha, scale, hi, mean, std, sigma_data)
        self.gan_weight, self.critic_weight = gan_weight, critic_weight
        self.prelude, self.gan_from = self.phases = prelude, gan_from
        self.judged, self.bottleneck = gan_weight > 0, parts.bottleneck
        if self.judged:
            tap(self.fake)

    def logits(self, est: Estimate) -> Tensor:
        """(B, N): one per place of the fake's bottleneck."""
        feature = est.features[self.bottleneck]
        return feature.mean(1).reshape(len(feature), -1)

    def step(self, batch: Batch, step: int):
        cond, draw, path = batch.cond, batch.draw, self.path
        if step >= self.prelude:
            t = times.karras(draw, path, hi=self.hi)
            yield from self.student_turn(batch, t, draw.normal(batch.noise), step >= self.gan_from)

        with torch.no_grad():
            x = self.few.sample(self.student, draw.normal(batch.noise), cond)
        t = times.log_normal(draw, path, self.mean, self.std)
        weight, eps = terms.edm_weight(path, t, self.sigma_data), draw.normal(x)
        est = self.fake(path.mix(x, eps, t), t, cond)
        loss = {"dsm": terms.reduced(like(weight, x) * (est.x0 - x).square(), "sum")}
        if self.judged:
            assert batch.x0 is not None
            real = self.logits(self.fake(path.mix(batch.x0, eps, t), t, cond))
            loss["gan"] = 0.5 * self.critic_weight * terms.gan_critic(real, self.logits(est), weight=weight)
        yield Turn("fake", loss)

    def student_turn(self, batch: Batch, t: Tensor, eps: Tensor, joined: bool) -> Generator[Turn | Mean, Tensor, None]:
        """On samples noised by eps (B, *D) to t (B,); joined: by the GAN."""
        yield from self.descend(batch, t, eps, joined, lambda xt, gap: (self.alpha, 1.0))

    def descend(self, batch: Batch, t: Tensor, eps: Tensor, joined: bool, rule: Rule) -> Generator[Turn, Tensor, None]:
        """SiD's loss by `rule`, and the GAN's."""
        x = self.few.sample(self.student, batch.noise, batch.cond)
        xt = self.path.mix(x, eps, t)
        with frozen(self.teacher, self.fake):
            real, est = self.guide(self.teacher)(xt, t, batch.cond).x0, self.fake(xt, t, batch.cond)
            weight, (alpha, h) = terms.gap_weight(x, real), rule(xt, real - est.x0)
            loss = {"sid": self.scale * terms.sid(x, real, est.x0, alpha, weight * h)}
            if joined and self.gan_weight:
                gan = terms.gan_student(self.logits(est).clamp(-10, 10), weight=weight)
                loss = {"sid": 0.5 * loss["sid"], "gan": 0.5 * self.gan_weight * x[0].numel() * gan}
            yield Turn("student", loss)
