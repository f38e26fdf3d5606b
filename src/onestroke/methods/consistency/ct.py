"""Consistency training: a consistency model of the data, by a teacher's weights alone."""

from __future__ import annotations

import math

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.times import RAMP


class CT(Method):
    """Song et al., "Consistency Models", arXiv 2303.01469.

    Algorithm 3. Data noised to a level of the ramp of Karras et al. and the same data under the same noise at the level
    below: the student's x0 at the first must be what its average says at the second. No teacher is asked; on Gaussians
    the optimum is that of `cd` with the DDIM step. The N levels of the ramp grow with the rounds k, N = 1 + ceil(sqrt(k
    / K ((last + 1)^2 - first^2) + first^2) - 1), and the average keeps keep^(first / (N - 1)) of itself.

    first, last: published 2 and 150 (ImageNet: 200). keep: published 0.95 (CIFAR-10: 0.9). growth: K, the rounds
    of the growth; 0 (published): all of the run, and then a resumed run must keep its number of rounds. distance: l2,
    l1 or huber (see `terms.DISTANCES`). sigma_min, sigma_max: the ends of the ramp, published 0.002 and 80; the path's
    own stand for them, so that from the lowest level the pair goes to the data.
    Ours: it starts from the teacher's weights; l2 in place of LPIPS; the run's guidance is not used. Published settings
    (LSUN, by the code): batch 256, RAdam 5e-5 (here AdamW), average of 0.9999.
    """

    players = ("student",)
    targets = ("slow",)
    needs = frozenset({"x0"})
    paper = "Consistency models, arXiv 2303.01469"
    passes = {"student": 1, "slow": 1}
    max_steps = 8
    defaults = {"lr": {"student": 5e-5}, "batch_size": 256, "ema": 0.9999}

    def __init__(
        self,
        parts: Parts,
        first: int = 2,
        last: int = 150,
        keep: float = 0.95,
        growth: int = 0,
        distance: str = "l2",
        sigma_min: float = RAMP.sigma_min,
        sigma_max: float = RAMP.sigma_max,
    ):
        super().__init__(parts)
        self.student, self.slow, self.teacher, self.path = parts.student, parts.target(), parts.teacher, parts.path
        self.first, self.last, self.keep, self.growth = first, last, keep, growth or parts.rounds
        self.distance = terms.DISTANCES[terms.checked_distance(distance)]
        self.levels = times.ramp(parts.path, sigma_min, sigma_max)

    def intervals(self, step: int) -> int:
        """N - 1 in this round."""
        grown = min(step / self.growth, 1.0) * ((self.last + 1) ** 2 - self.first**2) + self.first**2
        return max(1, math.ceil(math.sqrt(grown) - 1))

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        cond, count = batch.cond, self.intervals(step)
        t, s = times.neighbours(batch.draw, self.levels(count + 1))
        x, lower = (self.path.mix(batch.x0, batch.noise, u) for u in (t, s))
        error = self.student(x, t, cond).x0 - terms.endpoint(self.slow, self.path, lower, s, cond)
        keep = self.keep ** (self.first / count)
        yield Turn("student", {"consistency": self.distance(error).mean()}, follow={"slow": keep})
