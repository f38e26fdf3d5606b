"""SlimFlow: reflow that starts from fresh noise, then one-step distillation guided by the straightened flow."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn, follow

FIRST = ("straight", "student")


class SlimFlow(Method):
    """Zhu et al., "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow", arXiv 2407.12718.

    Annealing reflow, `straighten` rounds: flow matching on pairs whose noise is sqrt(1 - beta^2) eps + beta eps', eps'
    fresh and beta falling from 1 to 0 over `anneal` rounds; so a student that never saw pairs starts from plain flow
    matching. Then distillation, two terms of equal weight: the velocity error at the noise end of the pairs, and of
    fresh noise, whose picture is two steps of the straightened student, the second from time 1 - u, u in [lo, hi].
    So the student may be smaller than its teacher, and the run's `layers` says how small: at layers = 0.5 it has half
    of them, and is no flow before it has trained.

    straighten: 0, ours: six tenths of the run. anneal: published 300,000; 0, ours: three quarters of `straighten`. With
    either a resumed run must keep its number of rounds. lo, hi: published 0.2 and 0.8.
    first: whose first of the two steps, "straight" (the paper) or "student" (the released code).
    Ours: squared error (published: LPIPS at 64 pixels for the distillation); one run on one set of pairs, where the
    published distillation has pairs of the straightened student; no mirrored pictures; a smaller student keeps the
    weights of every layer that it has (published: smaller networks of their own, begun at random).
    Published settings: batch 128, Adam 2e-4, average 0.999999.
    """

    players = ("student",)
    targets = ("straight",)
    needs = frozenset({"pairs"})
    paper = "SlimFlow, arXiv 2407.12718"
    passes = {"student": 2, "straight": 2}
    defaults = {"lr": {"student": 2e-4}, "batch_size": 128}

    def __init__(
        self,
        parts: Parts,
        anneal: int = 0,
        straighten: int = 0,
        lo: float = 0.2,
        hi: float = 0.8,
        first: str = "straight",
    ):
        super().__init__(parts)
        if first not in FIRST:
            raise InputError(f"first={first!r} must be one of {', '.join(FIRST)}.")
        self.student, self.straight, self.teacher = parts.student, parts.target(), parts.teacher
        self.few, self.path = parts.few, parts.path
        self.straighten = straighten or max(1, 6 * parts.rounds // 10)
        self.anneal = anneal or max(1, 3 * self.straighten // 4)
        self.lo, self.hi, self.first = lo, hi, first
        self.phases = (self.straighten,)

    def step(self, batch: Batch, step: int):
        assert batch.pairs is not None
        cond, draw, (noise, x0) = batch.cond, batch.draw, batch.pairs
        if step < self.straighten:
            beta = max(0.0, 1 - step / self.anneal)
            noise = (1 - beta**2) ** 0.5 * noise + beta * draw.normal(noise)
            t = times.straight(draw, self.path, lo=0.001)
            yield Turn("student", {"flow": self.error(noise, x0, cond, t)})
            return

        if step == self.straighten:
            follow(self.straight, self.student)
        end = self.few.time(0, noise)
        with torch.no_grad():
            x = self.few.input(batch.noise)
            est = (self.straight if self.first == "straight" else self.student)(x, end, cond)
            t = self.part(end, draw.uniform(self.lo, self.hi))
            two = self.straight(self.path.mix(est.x0, est.eps, t), t, cond).x0
        pair, guided = self.error(noise, x0, cond, end), self.error(batch.noise, two, cond, end)
        yield Turn("student", {"pair": pair, "guided": guided})

    def error(self, noise, x0, cond, t):
        """The student's velocity error at t on the straight line from x0 to its first input from noise."""
        return terms.straight(self.student, self.path, x0, self.few.eps(noise, x0), cond, t)

    def part(self, end, u):
        """The time at which the part u of the straight path's time at `end` has gone by."""
        left = (1 - u) * torch.sigmoid(-self.path.log_snr(end))
        return self.path.snap(self.path.time_of(torch.logit(1 - left)))
