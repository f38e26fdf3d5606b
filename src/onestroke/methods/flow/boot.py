"""BOOT: one network learns the teacher's whole way from a noise by bootstrapping, from prompts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms
from onestroke.denoiser import TwoTimes
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import Cond, like


class Boot(Method):
    """Gu et al., "BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping".

    The student sees the noise alone and a time s, and says the signal y_s = (x_s - b eps) / a of the teacher's own
    deterministic way from that noise. In these variables the teacher's ODE is dy / d(b / a) = (y - x0) / (b / a), so a
    DDIM step from t to an s = t - delta below it leads from the student's y_t to x0 + (a_t b_s) / (a_s b_t) (y_t - x0)
    with the teacher's x0 at a_t y_t + b_t eps; y_s regresses that, squared error over delta^2. A boundary loss keeps y
    at the noise end at the teacher's x0 there. y_0 is the picture: the student without s, which is what is kept.

    delta: of unit time, ours 0.04; the paper's is not known to us. beta: weight of the boundary loss; ours 1.
    Ours: s is uniform and t = s + delta, but at most the noise end, so that every s is taught; eps is the teacher's own
    at the student's input, which is the noise where that has no signal: y is exact on every path; weight one at every
    time; s enters by the time embedding, in functions that vanish at s = 0. The run's guidance guides the teacher.
    Published settings: no average of weights in the targets.
    """

    players = ("student",)
    paper = "BOOT, arXiv 2306.05544"
    passes = {"student": 3, "teacher": 4}

    def __init__(self, parts: Parts, delta: float = 0.04, beta: float = 1.0):
        super().__init__(parts)
        if not 0 < delta <= 1:
            raise InputError(f"delta={delta} is a part of unit time: it must lie in (0, 1].")
        self.student, self.teacher = TwoTimes(parts.student, parts.shape, parts.null), parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.delta, self.beta = delta, beta

    def signal(self, noise: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """The student's y_s (B, *D) of the way from `noise`."""
        return self.student(self.few.input(noise), self.few.time(0, noise), {**cond, "s": s}).x0

    def step(self, batch: Batch, step: int):
        noise, cond, path, teacher = batch.noise, batch.cond, self.path, self.guide(self.teacher)
        end = self.few.time(0, noise)
        s = batch.draw.uniform(0, self.few.times[0])
        t = path.snap((s + self.delta).minimum(end))
        with torch.no_grad():
            first = teacher(self.few.input(noise), end, cond)
            y = self.signal(noise, t, cond)
            x0 = teacher(path.mix(y, first.eps, t), t, cond).x0
            (a, b), (c, d) = path.ab(t), path.ab(s)
            target = x0 + like(a * d / (c * b), x0) * (y - x0)
        bootstrap = terms.reduced((self.signal(noise, s, cond) - target).square(), "mean") / self.delta**2
        boundary = terms.reduced((self.signal(noise, end, cond) - first.x0).square(), "mean")
        yield Turn("student", {"bootstrap": bootstrap, "boundary": self.beta * boundary})
