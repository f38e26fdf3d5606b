"""Shortcut models: the student learns a step of its flow as two of half the length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onestroke.denoiser import OnPath, TwoTimes
from onestroke.errors import InputError, unknown
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import Cond, Flow, like
from onestroke.tangent import overlap
from onestroke.terms import reduced


class Shortcut(Method):
    """Frans et al., "One Step Diffusion via Shortcut Models".

    On the straight path the student reads a second time s < t and says the velocity of one step from t to s. Steps are
    the 128th, ..., half or all of the way from noise to data. The shortest regress the velocity of the flow; one twice
    as long the mean of two steps of its averaged weights, the second from where the first ends. Mean squared error.

    grid: the number of the shortest steps, published 128. share: of the rows that learn the longer ones, published 1/8.
    keep: of the averaged weights, published 0.999. limit: of that mean and of where the first step ends, published 4.
    velocity: of the guided "teacher", or of the "data", eps - x0 (published; guidance of that by the network's own is
    not here), for which neither the teacher nor the run's guidance_scale is asked.
    Ours: the way begins at one of the student's own calls, each as likely, so that a step from every one of them to the
    data is learned: without s, the student that is kept. s enters by the time embedding; each row draws its length.
    Samples of several steps are steps to the data, noised anew in between (published: steps of a half or a quarter).
    Published settings: AdamW 1e-4, weight decay 0.1, average 0.999.
    """

    players = ("student",)
    targets = ("slow",)
    needs = frozenset({"x0"})
    paper = "Shortcut models, arXiv 2410.12557"
    passes = {"student": 1, "slow": 2, "teacher": 2}
    max_steps = 4
    defaults = {"lr": {"*": 1e-4}, "weight_decay": 0.1}

    def __init__(
        self,
        parts: Parts,
        grid: int = 128,
        share: float = 0.125,
        keep: float = 0.999,
        limit: float = 4.0,
        velocity: str = "teacher",
    ):
        super().__init__(parts)
        if velocity not in ("teacher", "data"):
            raise unknown("velocity", velocity, ("teacher", "data"))
        if grid < 2 or grid & (grid - 1):
            raise InputError(f"grid={grid} must be 2 doubled some times, for a step to be two of half the length.")
        self.student, self.teacher = TwoTimes(parts.student, parts.shape, parts.null), parts.teacher
        self.slow = parts.target(self.student)
        self.path, self.guide, self.flow = parts.path, parts.guide, overlap(Flow(), parts.path)
        self.calls = self.flow.time_of(self.path.log_snr(torch.tensor(parts.few.times, dtype=torch.float64)))
        self.grid, self.share, self.keep, self.limit, self.velocity = grid, share, keep, limit, velocity

    def says(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity (B, *D) of a network at x (B, *D) of the straight path, read where its own path has begun."""
        return OnPath(net, self.path, self.flow).velocity(x, t.clamp_min(self.flow.t_min), cond)

    def step(self, batch: Batch, step: int):
        cond, draw, x0 = batch.cond, batch.draw, batch.x0
        assert x0 is not None
        longer = draw.uniform() < self.share
        count = torch.where(longer, 2 ** (draw.uniform() * (self.grid.bit_length() - 1)).floor(), self.grid)
        calls = self.calls.to(count)
        length = calls[(draw.uniform() * len(calls)).long()] / count
        t = length * (1 + (draw.uniform() * count).floor())
        half, s = t - length / 2, t - length
        x = self.flow.mix(x0, batch.noise, t)
        with torch.no_grad():
            one = self.says(self.slow, x, t, {**cond, "s": half})
            y = (x - like(length / 2, x) * one).clamp(-self.limit, self.limit)
            two = self.says(self.slow, y, half, {**cond, "s": s})
            v = batch.noise - x0
            if self.velocity == "teacher":
                v = self.says(self.guide(self.teacher), x, t, cond)
            want = torch.where(like(longer, x) > 0, ((one + two) / 2).clamp(-self.limit, self.limit), v)
        error = self.says(self.student, x, t, {**cond, "s": s}) - want
        yield Turn("student", {"shortcut": reduced(error.square(), "mean")}, follow={"slow": self.keep})
