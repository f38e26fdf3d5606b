"""MeanFlow: the student is the average velocity of the teacher's flow between any two times."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import times
from onestroke.denoiser import OnPath, TwoTimes
from onestroke.draws import Draws
from onestroke.errors import unknown
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import Cond, Flow, like
from onestroke.tangent import Tangent, overlap


class MeanFlow(Method):
    """Geng et al., "Mean Flows for One-step Generative Modeling".

    On the straight path the student reads a second time s <= t and says u(x_t, t, s), the velocity averaged from t to
    s, so that u(x_t, t, 0) is one jump to the data: without s, the student that is kept. At noised data it regresses
    v - (t - s) du/dt, where v is the velocity and the derivative is taken along it; error / (error + c)^power, the
    divisor without gradient, of the squared error summed over a sample.

    mean, std: of the log noise-to-signal ratio of both times, the later of which is t, published -0.4 and 1. end_mean,
    end_std: of s, where it has a law of its own (published -4 and 1.6 on CIFAR-10, beside -0.6 and 1.6); a deviation of
    0, published elsewhere: it has not. equal: share of the rows with s = t, published 0.75. jump: share of the others
    with s = 0, ours, published 0. power, c: published 1 and 0.01, as released (CIFAR-10: 0.75 and 1e-3). velocity: of
    the guided "teacher", or of the "data", eps - x0, for which neither the teacher nor the run's guidance_scale is
    asked. difference: 0, derivatives in forward mode; or the step in unit time of differences, two more calls.
    Ours: published is training from data, with guidance by the network's own velocity; here v is the guided teacher's.
    s enters by the time embedding; each row draws whether s = t. Samples of several steps are noised anew.
    Published settings: Adam 1e-4 with betas 0.9 and 0.95, batch 256, average 0.9999.
    """

    players = ("student",)
    needs = frozenset({"x0"})
    paper = "MeanFlow, arXiv 2505.13447"
    passes = {"student": 2, "teacher": 2}
    max_steps = 4
    defaults = {"lr": {"*": 1e-4}, "betas": {"*": [0.9, 0.95]}, "batch_size": 256, "ema": 0.9999}

    def __init__(
        self,
        parts: Parts,
        mean: float = -0.4,
        std: float = 1.0,
        end_mean: float = -4.0,
        end_std: float = 0.0,
        equal: float = 0.75,
        jump: float = 0.0,
        power: float = 1.0,
        c: float = 0.01,
        velocity: str = "teacher",
        difference: float = 0.0,
    ):
        super().__init__(parts)
        if velocity not in ("teacher", "data"):
            raise unknown("velocity", velocity, ("teacher", "data"))
        self.student, self.teacher = TwoTimes(parts.student, parts.shape, parts.null), parts.teacher
        self.path, self.guide, self.flow = parts.path, parts.guide, overlap(Flow(), parts.path)
        self.levels = (mean, std), (end_mean, end_std) if end_std else (mean, std)
        self.equal, self.jump, self.power, self.c = equal, jump, power, c
        self.velocity, self.tangent = velocity, Tangent(self.flow, difference)

    def average(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """u (B, *D) of the student at x (B, *D) of the straight path, from t (B,) to s (B,)."""
        return OnPath(self.student, self.path, self.flow).velocity(x, t, {**cond, "s": s})

    def times(self, draw: Draws) -> tuple[Tensor, Tensor]:
        """t and s <= t (B,) of the straight path."""
        one, two = (times.log_normal(draw, self.flow, *level) for level in self.levels)
        t, s, u = one.maximum(two), one.minimum(two), draw.uniform()
        far = torch.where(u < self.equal + (1 - self.equal) * self.jump, 0.0, s)
        return t, torch.where(u < self.equal, t, far)

    def losses(self, x: Tensor, t: Tensor, s: Tensor, v: Tensor, cond: Cond) -> dict[str, Tensor]:
        """The terms of the student's turn at x (B, *D), through which the flow goes with velocity v."""
        _, du = self.tangent(lambda x, t: self.average(x, t, s, cond), x, t, v, torch.ones_like(t))
        return {"average": self.adaptive(self.average(x, t, s, cond) + like(t - s, x) * du - v)}

    def adaptive(self, error: Tensor) -> Tensor:
        """The mean over B of |error|^2 / (|error|^2 + c)^power."""
        square = error.square().flatten(1).sum(1)
        return (square / (square.detach() + self.c) ** self.power).mean()

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        t, s = self.times(batch.draw)
        x = self.flow.mix(batch.x0, batch.noise, t)
        v = batch.noise - batch.x0
        if self.velocity == "teacher":
            with torch.no_grad():
                v = OnPath(self.guide(self.teacher), self.path, self.flow).velocity(x, t, batch.cond)
        yield Turn("student", self.losses(x, t, s, v, batch.cond))
