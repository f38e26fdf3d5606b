"""Consistency distillation: two neighbours on a teacher's trajectory are sent to the same end of it."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.errors import unknown
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.solvers import STEPS


class CD(Method):
    """Song et al., "Consistency Models", arXiv 2303.01469.

    Algorithm 2. Data noised to a level of the ramp of Karras et al. is moved to the level below by one step of the
    guided teacher; the student's x0 at the first state must be what its average, an exponential one, says at the
    second, which at the last level is that state itself.

    levels: of the ramp, published 40 (ImageNet, LSUN) and 18 (CIFAR-10); a table of times may hold fewer near the data.
    scheme: of the teacher's step, published heun; euler, or DDIM, costs half. keep: of the average per round, published
    0.95. distance: l2, l1 or huber (see `terms.DISTANCES`).
    Ours: latents, so l2 in place of LPIPS, the published default; f(x, 0) = x holds as the path and the prediction give
    it, without a parameterisation of its own; no weight of levels, as by default there. Published settings (LSUN, by
    the code): batch 256, RAdam 1e-5 (here AdamW), average of 0.99994.
    """

    players = ("student",)
    targets = ("slow",)
    needs = frozenset({"x0"})
    paper = "Consistency models, arXiv 2303.01469"
    passes = {"student": 1, "slow": 1, "teacher": 4}
    max_steps = 8
    defaults = {"lr": {"student": 1e-5}, "batch_size": 256, "ema": 0.99994}

    def __init__(self, parts: Parts, levels: int = 40, scheme: str = "heun", keep: float = 0.95, distance: str = "l2"):
        super().__init__(parts)
        self.student, self.slow, self.teacher = parts.student, parts.target(), parts.teacher
        self.path, self.guide, self.keep = parts.path, parts.guide, keep
        self.grid = parts.path.snap(times.ladder(parts.path, levels)).unique()
        if scheme not in STEPS:
            raise unknown("scheme", scheme, STEPS)
        self.move, self.distance = STEPS[scheme], terms.DISTANCES[terms.checked_distance(distance)]

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        cond = batch.cond
        t, s = times.neighbours(batch.draw, self.grid)
        x = self.path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            lower = self.move(self.guide(self.teacher), self.path, x, t, s, cond)
            target = terms.endpoint(self.slow, self.path, lower, s, cond)
        error = self.student(x, t, cond).x0 - target
        yield Turn("student", {"consistency": self.distance(error).mean()}, follow={"slow": self.keep})
