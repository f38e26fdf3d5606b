"""SCott: consistency distillation along the teacher's stochastic solver, with a discriminator."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.draws import Draws
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.paths import Cond, Estimate, Path, like


def stochastic(path: Path, est: Estimate, t: Tensor, s: Tensor, eta: float, noise: Tensor) -> Tensor:
    """The state (B, *D) at s (B,) below t (B,): DDIM (arXiv 2010.02502) with eta, at 0 the DDIM step, at 1 ancestral.

    a D + sqrt(b^2 - v) eps + sqrt(v) noise with v = eta^2 b^2 (1 - (rho_s / rho_t)^2), rho = b / a.
    """
    a, b = path.ab(s)
    fresh = eta**2 * (1 - (2 * (path.log_snr(t) - path.log_snr(s))).exp())
    kept, fresh = b * (1 - fresh).clamp_min(0).sqrt(), b * fresh.clamp_min(0).sqrt()
    return like(a, noise) * est.x0 + like(kept, noise) * est.eps + like(fresh, noise) * noise


class SCott(Method):
    """Liu et al., "SCott: Accelerating Diffusion Models with Stochastic Consistency Distillation", arXiv 2403.01505.

    As `lcm`, under one guidance, but the teacher moves the state by `substeps` of a stochastic solver, and a hinge
    discriminator is asked to tell the student's x0 from the data. At eta = 0 and one sub-step the move is that of
    `lcm`; at eta > 0 the optimum is the mean over the solver's noise, which the discriminator sharpens.

    grid: DDIM times, ours 50. substeps: of the solver between two of them, ours 2. eta: its noise, from 0 to 1, ours
    0.1: from a noise level r on, the mean has the deviation of a Gaussian N(m, s^2) shrink by about (s / r)^(eta^2), to
    0.94 at r = 80 and s = 0.1. gan_weight: of the discriminator, ours 0.1; 0 builds none. loss: of the GAN, published
    hinge; softplus is the other. keep: of the average per round, published 0.95. distance: huber (per element, c =
    0.001), l2 or l1.
    Ours: the numbers above, of which the paper's are not at hand; eta is the same in all steps, where the published
    noise is reduced in later ones; the discriminator is a head on each tapped layer of the frozen teacher, at a noised
    x0, where the published one is a copy of the UNet with adapters.
    """

    players: tuple[str, ...] = ("student", "heads")
    targets = ("slow",)
    needs = frozenset({"x0", "features"})
    needs_if = {"gan_weight": "features"}
    paper = "SCott, arXiv 2403.01505"
    passes = {"student": 1, "slow": 1, "teacher": 7}
    max_steps = 8
    defaults = {"guidance_scale": 8.0}

    def __init__(
        self,
        parts: Parts,
        grid: int = 50,
        substeps: int = 2,
        eta: float = 0.1,
        gan_weight: float = 0.1,
        loss: str = "hinge",
        keep: float = 0.95,
        distance: str = "huber",
    ):
        super().__init__(parts)
        self.student, self.slow = parts.student, parts.target()
        self.teacher, self.path, self.guide = parts.teacher, parts.path, parts.guide
        self.grid, self.substeps, self.eta = times.strides(parts.path, grid), substeps, eta
        self.gan_weight, self.loss, self.keep = gan_weight, terms.checked_gan(loss), keep
        self.distance = terms.DISTANCES[terms.checked_distance(distance)]
        if gan_weight:
            self.heads = parts.heads()
        else:
            self.players = ("student",)

    def move(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond, draw: Draws) -> Tensor:
        """The state (B, *D) at s, from x at t by the guided teacher's stochastic solver."""
        stops = [t, *(self.path.snap(t.lerp(s, (i + 1) / self.substeps)) for i in range(self.substeps - 1)), s]
        for now, then in itertools.pairwise(stops):
            est = self.guide(self.teacher)(x, now, cond)
            x = stochastic(self.path, est, now, then, self.eta, draw.normal(x) if self.eta else est.eps)
        return x

    def judge(self, x: Tensor, cond: Cond, draw: Draws) -> Tensor:
        """The heads' logits (B, N) of samples x (B, *D), noised."""
        t = times.uniform(draw, self.path)
        return self.heads(self.teacher(self.path.mix(x, draw.normal(x), t), t, cond).features)

    def step(self, batch: Batch, step: int):
        cond, draw, real = batch.cond, batch.draw, batch.x0
        assert real is not None
        t, s = times.neighbours(draw, self.grid)
        xt = self.path.mix(real, batch.noise, t)
        with torch.no_grad():
            target = terms.endpoint(self.slow, self.path, self.move(xt, t, s, cond, draw), s, cond)
        x = self.student(xt, t, cond).x0
        near = {"consistency": self.distance(x - target).mean()}
        if not self.gan_weight:
            yield Turn("student", near, follow={"slow": self.keep})
            return

        with frozen(self.teacher, self.heads):
            gan = terms.gan_student(self.judge(x, cond, draw), self.loss)
            yield Turn("student", {**near, "gan": self.gan_weight * gan}, follow={"slow": self.keep})

        with frozen(self.teacher):
            logits = self.judge(real, cond, draw), self.judge(x.detach(), cond, draw)
            yield Turn("heads", {"gan": terms.gan_critic(*logits, self.loss)})
