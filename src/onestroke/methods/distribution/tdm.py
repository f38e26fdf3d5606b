"""TDM: distribution matching along the trajectory of a few-step student, one interval of times per step."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.denoiser import TwoTimes
from onestroke.draws import Draws
from onestroke.errors import unknown
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import Cond, like
from onestroke.sampling import FewStep

LOSSES = ("huber", "mse")


class Landed(NamedTuple):
    """A sample of one call, taken to where its step ends and noised from there."""

    x0: Tensor  # (B, *D), of the call
    xt: Tensor  # (B, *D)
    t: Tensor  # (B,)
    weight: Tensor  # (B,): how much likelier xt is from x0 by plain noising


class TDM(Method):
    """Luo et al., "Learning Few-Step Diffusion Models by Trajectory Distribution Matching".

    The student's steps are those of a deterministic sampler. Each sample is one of them, drawn anew: the step ends
    where the next begins (the last at the data), and from there it is noised to a time between its own start and end,
    so that each step has an interval of times to itself, and one fake score serves all. There the student moves its x0
    along D_teacher - D_fake, guided, under a pseudo-Huber loss over mean |x - D_teacher|. The fake learns the x0 of
    such samples, weighed by min(SNR, 5) and by how much likelier plain noising of x0 is to give that noise.

    loss: huber (published), or mse, with which one step is DMD2's student without its GAN. c: of the Huber loss,
    published 1e-3. lo: the least unit time, published 20 of 1000. margin: kept below the start of a step, published 10
    of 1000. snr: the cap, published 5. unify: the student serves fewer steps as well. Each round then draws a number of
    steps that divides the run's, with every so many of its times, and the fake reads that number, so that each number
    has a law of its own.
    Ours: the student plays first; the fake reads the number of steps as a second time, and the student does not, so
    that what is kept is the plain network. The loss was made for the noise levels of VP paths: far beyond them, as at
    the start of an EDM path, x0 and D_teacher all but agree, and their difference is no measure any more.
    Published settings (PixArt): four steps, guidance 4.5, AdamW 4e-6 and for the fake 2e-5 with decay 0.01, clip 1.
    """

    players = ("student", "fake")
    paper = "TDM, arXiv 2503.06674"
    passes = {"student": 2, "teacher": 2, "fake": 2}
    max_steps = 8
    defaults = {
        "renoise": "implied",
        "guidance_scale": 4.5,
        "lr": {"student": 4e-6, "fake": 2e-5},
        "weight_decay": 0.01,
        "warmup": 50,
        "clip": 1.0,
    }

    def __init__(
        self,
        parts: Parts,
        loss: str = "huber",
        c: float = 1e-3,
        lo: float = 0.02,
        margin: float = 0.01,
        snr: float = 5.0,
        unify: bool = False,
    ):
        super().__init__(parts)
        if loss not in LOSSES:
            raise unknown("loss", loss, LOSSES)
        parts.check_implied()
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        if unify:
            self.fake = TwoTimes(self.fake, parts.shape, parts.null)
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.loss, self.c, self.lo, self.margin, self.snr, self.unify = loss, c, lo, margin, snr, unify

    def steps(self, draw: Draws) -> FewStep:
        """The student's steps of this round."""
        if not self.unify:
            return self.few
        most = len(self.few.times)
        strides = [n for n in range(1, most + 1) if most % n == 0]
        return replace(self.few, times=self.few.times[:: strides[int(draw.shared() * len(strides))]])

    def land(self, few: FewStep, xs: Tensor, cond: Cond, draw: Draws) -> Landed:
        """One call of every sample, at one of the inputs xs (K, B, *D) of its steps."""
        k = (draw.uniform() * len(xs)).long()
        start = torch.tensor(few.times, dtype=torch.float64, device=k.device)
        end, level = start.roll(-1), self.path.log_snr(start.roll(-1))
        end[-1], level[-1] = 0.0, torch.inf
        est = self.student(xs.transpose(0, 1)[torch.arange(len(k), device=k.device), k], start[k], cond)

        hi = (start[k] - self.margin).clamp_min(self.lo)
        t = times.uniform(draw, self.path, end[k].clamp_min(self.lo), hi)
        kept = (self.path.log_snr(t) - level[k]).exp().clamp_max(1)  # of the estimate's noise, in that of time t
        fresh = draw.normal(est.x0)
        eps = like(kept, fresh) * est.eps.detach() + like((1 - kept**2).sqrt(), fresh) * fresh
        weight = (fresh.square() - eps.square()).flatten(1).mean(1).div(2).exp()
        return Landed(est.x0, self.path.mix(est.x0.detach(), eps, t), t, weight)

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        few = self.steps(draw)
        with torch.no_grad():
            xs = torch.stack(few.inputs(self.student, batch.noise, cond))
        told: Cond = cond
        if self.unify:
            told = {**cond, "s": torch.full((len(batch.noise),), 1 - len(xs) / len(self.few.times)).to(xs)}

        x, xt, t, _ = self.land(few, xs, cond, draw)
        with torch.no_grad():
            real, fake = self.guide(self.teacher)(xt, t, cond).x0, self.fake(xt, t, told).x0
        slope = fake - real
        if self.loss == "huber":
            slope = slope / (slope.square() + self.c**2).sqrt()
        yield Turn("student", {"dm": terms.descend(x, like(terms.gap_weight(x, real), x) * slope)})

        with torch.no_grad():
            x, xt, t, weight = self.land(few, xs, cond, draw)
        weight = weight * (2 * self.path.log_snr(t)).exp().clamp_max(self.snr).to(weight)
        error = (self.fake(xt, t, told).x0 - x).square()
        yield Turn("fake", {"dsm": terms.reduced(like(weight, error) * error, "mean")})
