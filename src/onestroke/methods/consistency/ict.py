"""Improved consistency training: robust distance, no average for the target, levels that double."""

from __future__ import annotations

import math

from torch import Tensor

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.times import RAMP


class ICT(Method):
    """Song and Dhariwal, "Improved Techniques for Training Consistency Models", arXiv 2310.14189.

    As `ct`, data under the same noise at two neighbouring levels of the ramp of Karras et al., but the target is the
    student itself, without gradient; the distance is the pseudo-Huber norm of a sample, with c = scale sqrt(D), over
    the distance of the levels; a pair is as likely as a normal log level falls in between; and the intervals, from
    `first`, double until `last`.

    first, last: published 10 and 1280. scale: of c, published 0.00054. mean, std: of the log level, published -1.1 and
    2. stage_steps: rounds until the intervals double; 0 (published): the run in equal parts, and then a resumed run
    must keep its number of rounds. sigma_min, sigma_max: the ends of the ramp, as in `ct`.
    Ours: it starts from the teacher's weights; noise beyond the ramp counts as sigma_max in the weight; the run's
    guidance is not used. Published settings (CIFAR-10): batch 1024, RAdam 1e-4 (here AdamW), no clipping, average of
    0.99993, dropout 0.3 (ours: none).
    """

    players = ("student",)
    needs = frozenset({"x0"})
    paper = "Improved consistency training, arXiv 2310.14189"
    passes = {"student": 2}
    max_steps = 8
    defaults = {"lr": {"student": 1e-4}, "batch_size": 1024, "ema": 0.99993, "clip": 0.0}

    def __init__(
        self,
        parts: Parts,
        first: int = 10,
        last: int = 1280,
        scale: float = 0.00054,
        mean: float = -1.1,
        std: float = 2.0,
        stage_steps: int = 0,
        sigma_min: float = RAMP.sigma_min,
        sigma_max: float = RAMP.sigma_max,
    ):
        super().__init__(parts)
        self.student, self.teacher, self.path = parts.student, parts.teacher, parts.path
        self.first, self.last, self.mean, self.std = first, last, mean, std
        self.c = scale * math.prod(parts.shape) ** 0.5
        self.stage_steps = stage_steps or max(1, int(parts.rounds // (math.log2(last // first) + 1)))
        self.levels, self.sigma_max = times.ramp(parts.path, sigma_min, sigma_max), sigma_max

    def intervals(self, step: int) -> int:
        """How many in this round."""
        return int(min(self.first * 2 ** (step // self.stage_steps), self.last))

    def gap(self, t: Tensor, s: Tensor) -> Tensor:
        """(B,): the noise level b / a at t less that at s."""
        high, low = ((-self.path.log_snr(u)).exp() for u in (t, s))
        return high.clamp_max(self.sigma_max) - low

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        path, cond = self.path, batch.cond
        grid = self.levels(self.intervals(step) + 1)
        t, s = times.normal_neighbours(batch.draw, path, grid, self.mean, self.std)
        x, lower = (path.mix(batch.x0, batch.noise, u) for u in (t, s))
        target = terms.endpoint(self.student, path, lower, s, cond)
        distance = terms.pseudo_huber(self.student(x, t, cond).x0 - target, self.c)
        yield Turn("student", {"consistency": (distance / self.gap(t, s).to(distance)).mean()})
