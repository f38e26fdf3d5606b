"""Latent consistency models: consistency distillation of the guided teacher, over long DDIM steps."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.denoiser import TwoTimes, guidances, told_around
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.solvers import euler


class LCM(Method):
    """Luo et al., "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference".

    Data noised to one of the DDIM times is moved to the time below by one DDIM step of the teacher under a guidance
    drawn for it; the student's x0 at the first state must be what its average says at the second, which at the data end
    is that state itself. The student is told the guidance.

    grid: DDIM times, published 50, of 20 times of a thousand each. spread: the guidance less 1, the paper's w, is the
    run's times a number in 1 +- this: published 5 to 15 is guidance_scale 11 and 0.5. embed: tell it to the student, by
    its time embedding. Its pipeline draws under the run's own guidance_scale; what it has learned of the others is kept
    beside it (see `onestroke.students.guidance`). keep: of the average per round, published 0.95. distance: huber (per
    element, c = 0.001), l2 or l1.
    Ours: f(x, 0) = x holds by the states, not by a parameterisation, which at the published times is 1 to 1e-3; the
    guidance enters by functions that vanish at the run's own (published: sinusoids of 1000 w).
    Published are the settings of diffusers' script (SD 1.5), with AdamW 1e-6 and clip 1. As LoRA it is `lcm-lora`.
    """

    players = ("student",)
    targets = ("slow",)
    needs = frozenset({"x0"})
    paper = "Latent consistency models, arXiv 2310.04378"
    passes = {"student": 1, "slow": 1, "teacher": 2}
    max_steps = 8
    defaults = {"guidance_scale": 11.0, "lr": {"student": 1e-6}, "clip": 1.0}

    def __init__(
        self,
        parts: Parts,
        grid: int = 50,
        spread: float = 0.5,
        embed: bool = True,
        keep: float = 0.95,
        distance: str = "huber",
    ):
        super().__init__(parts)
        self.student = TwoTimes(parts.student, parts.shape, parts.null) if embed else parts.student
        told = told_around(parts.guidance_scale, spread)
        self.guidance = told if embed else None
        self.slow, self.teacher = parts.target(self.student), parts.teacher
        self.path, self.guide, self.scale = parts.path, parts.guide, parts.guidance_scale
        self.grid, self.spread, self.embed, self.keep = times.strides(parts.path, grid), spread, embed, keep
        self.distance = terms.DISTANCES[terms.checked_distance(distance)]

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        t, s = times.neighbours(batch.draw, self.grid)
        side, scale = guidances(batch.draw, self.scale, self.spread)
        cond = {**batch.cond, "s": side} if self.embed else batch.cond
        x = self.path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            lower = euler(self.guide(self.teacher, scale), self.path, x, t, s, batch.cond)
            target = terms.endpoint(self.slow, self.path, lower, s, cond)
        error = self.student(x, t, cond).x0 - target
        yield Turn("student", {"consistency": self.distance(error).mean()}, follow={"slow": self.keep})
