"""sCM: the student is the consistency function of the teacher's flow, taught by its own derivative in time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from onestroke import terms, times
from onestroke.denoiser import OnPath
from onestroke.draws import Draws
from onestroke.errors import unknown
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import Cond, Path, Trig, like
from onestroke.tangent import Field, Tangent, overlap

RADIAN = 2 / math.pi
"""In unit time."""


class SCM(Method):
    """Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models".

    On the path of angles tau, x = cos(tau) x0 + sin(tau) z, the student's x0 is f = cos(tau) x - sin(tau) sigma_data F.
    Along a trajectory of the teacher it must not change: at noised data F is moved by g / (|g| + norm), where
    g = cos(tau) df/dtau by a derivative of the network along the teacher's velocity. The terms of g beyond
    cos(tau)^2 (teacher - student) are warmed up: the student starts as the teacher. Weight: 1 / (sigma_data tan(tau)),
    over the loss that is learned for each level of noise.

    sigma_data: deviation of the data as they come, 1 of latents; the levels and norm are in its units. mean, std: of
    log tan(tau). Published tau = atan(e^n / 0.5), n of mean -1 and deviation 1.4 (1.6 on ImageNet), of data scaled to
    0.5: a mean of -1 + log 2 = -0.307. norm: published 0.1 of such data, 0.1 / 0.5 = 0.2; |g| is the root of a sum, as
    in SANA-Sprint, where other code for this method has that of a mean. ramp: rounds of the warm-up, published 10,000.
    velocity: whose the trajectories are, the guided "teacher"'s (sCD), or of the "data" (sCT):
    cos(tau) z - sin(tau) x0, for which neither the teacher nor the run's guidance_scale is asked. weight: "learned",
    "tan" without what is learned, or "one". difference: 0, derivatives in forward mode; or the step in unit time of
    differences in their place, two more calls, for teachers that were not made smooth in time.
    Ours: the student keeps its own path and prediction type and is read on that of angles; the learned loss reads the
    angle alone, begins near its rest, so that in short runs other terms do not outweigh this one, and has a rate of its
    own: the eight numbers of its series are not moved by what moves a wide layer. Several steps are at the path's own
    times (published: the second at tau = 1.1).
    Published settings: Adam with betas 0.9 and 0.99, 7e-5 for XL, batch 2048, no clipping.
    """

    players: tuple[str, ...] = ("student", "weight")
    needs = frozenset({"x0"})
    paper = "sCM, arXiv 2410.11081"
    passes = {"student": 2, "teacher": 2}
    max_steps = 4
    defaults = {"lr": {"*": 7e-5, "weight": 1e-3}, "betas": {"*": [0.9, 0.99]}, "batch_size": 2048, "clip": 0.0}

    def __init__(
        self,
        parts: Parts,
        mean: float = -0.307,
        std: float = 1.4,
        sigma_data: float = 1.0,
        ramp: int = 10_000,
        norm: float = 0.2,
        velocity: str = "teacher",
        weight: str = "learned",
        difference: float = 0.0,
    ):
        super().__init__(parts)
        if velocity not in ("teacher", "data"):
            raise unknown("velocity", velocity, ("teacher", "data"))
        if weight not in ("learned", "tan", "one"):
            raise unknown("weight", weight, ("learned", "tan", "one"))
        self.student: nn.Module = parts.student
        self.teacher = parts.teacher
        self.players = tuple(player for player in self.players if player != "weight" or weight == "learned")
        if "weight" in self.players:
            self.weight = terms.LogVariance(parts.student, math.prod(parts.shape))
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.sigma_data, self.angles = sigma_data, overlap(Trig(sigma_data=sigma_data), parts.path)
        self.mean, self.std, self.ramp, self.norm = mean, std, ramp, norm
        self.velocity, self.scheme, self.tangent = velocity, weight, Tangent(self.angles, difference)

    def speed(self, net: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """sigma_data F = dx/dtau (B, *D) of a network's flow at x (B, *D) of the path of angles."""
        return RADIAN * OnPath(net, self.path, self.angles).velocity(x, t, cond)

    def level(self, draw: Draws, path: Path, mean: float, std: float) -> Tensor:
        """The times (B,) of a path at which the logarithm of noise over data, log tan(tau), is normal."""
        return times.log_normal(draw, path, mean + math.log(self.sigma_data), std)

    def derivative(self, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """A field at x (B, *D) and t (B,), and how it changes along (dx, dt)."""
        return self.tangent(field, x, t, dx, dt)

    def shares(self, cos: Tensor, sin: Tensor, ramp: float) -> tuple[Tensor, float]:
        """What g has of the teacher, beside cos(tau), and of the derivative."""
        return cos, ramp

    def change(self, x: Tensor, t: Tensor, dx: Tensor, cond: Cond, ramp: float) -> tuple[Tensor, Tensor]:
        """sigma_data F and g (B, *D) at x, where a trajectory goes through with dx/dtau."""
        cos, sin = (like(c, x) for c in Trig().ab(t))
        along = cos * sin * dx, (cos * sin).reshape(-1) * RADIAN
        f, df = self.derivative(lambda x, t: self.speed(self.student, x, t, cond), x, t, *along)
        held, turned = self.shares(cos, sin, ramp)
        return f, -cos * held * (f - dx) - ramp * cos * sin * x - turned * df

    def error(self, batch: Batch, cond: Cond, step: int, teacher: nn.Module) -> tuple[Tensor, Tensor]:
        """What F (B, *D) lacks of where g moves it, and the times (B,) of the path of angles."""
        assert batch.x0 is not None
        t = self.level(batch.draw, self.angles, self.mean, self.std)
        x = self.angles.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            if self.velocity == "data":
                dx = RADIAN * self.angles.join(batch.x0, batch.noise, t, "flow")
            else:
                dx = self.speed(teacher, x, t, batch.cond)
        ramp = min(1.0, step / self.ramp) if self.ramp else 1.0
        old, g = (v / self.sigma_data for v in self.change(x, t, dx, cond, ramp))
        length = g.double().flatten(1).norm(dim=1) + self.norm
        return self.speed(self.student, x, t, cond) / self.sigma_data - old - g / like(length, g), t

    def loss(self, batch: Batch, cond: Cond, step: int, teacher: nn.Module) -> tuple[Tensor, Tensor]:
        """(B,): the weighted square of the error, and its times."""
        error, t = self.error(batch, cond, step, teacher)
        a, b = self.angles.ab(t)
        weight = torch.ones_like(t) if self.scheme == "one" else a / b
        return error.square().flatten(1).mean(1) * weight.to(error), t

    def turns(self, loss: Tensor, t: Tensor, **more: Tensor):
        """The student's turn, `more` its other terms, and that of the learned weight."""
        with torch.no_grad():
            known = self.weight(self.angles, t) if "weight" in self.players else 0 * loss
        yield Turn("student", {"change": ((-known).exp() * loss).mean(), **more})
        if "weight" in self.players:
            known, loss = self.weight(self.angles, t), loss.detach()
            yield Turn("weight", {"variance": ((-known).exp() * loss + known).mean()})

    def step(self, batch: Batch, step: int):
        yield from self.turns(*self.loss(batch, batch.cond, step, self.guide(self.teacher)))
