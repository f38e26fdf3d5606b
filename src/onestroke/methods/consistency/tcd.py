"""TCD: consistency along the whole trajectory, of a network that reads where it is but not where it is going."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.solvers import euler, jump


class TCD(Method):
    """Zheng et al., "Trajectory Consistency Distillation", arXiv 2402.19159.

    Data noised to one of the DDIM times is moved to the time below by a DDIM step of the guided teacher. From both
    states a jump leads to one earlier time, uniform below both: a x0 + b eps of a single call there, by the student
    from the first and by its average from the second, and the two must land at the same place.

    grid: DDIM times, published 50. whole: the part of the rows that jump all the way to the data, published 0. A
    network that does not read where its jump ends cannot fit all ends at once, and from pure noise its x0 is too
    narrow: of a Gaussian of deviation 0.1 on EDM's path it has 0.056 at whole=0 and 0.088 at whole=0.9. keep: of the
    average per round, ours 0.95 (as in LCM). distance: l2, l1 or huber (see `terms.DISTANCES`).
    A run samples it with the noise that its `renoise` says, all of it. With part of it, `FewStep.eta`, published 0.3,
    the saved pipeline of a Stable Diffusion student takes these steps, but for the last, which leaves a trace of noise,
    with diffusers' `TCDScheduler.from_config(pipeline.scheduler.config)` as its scheduler, called with `eta`.
    Ours: states are scaled to the variance-preserving path before they are compared; one guidance scale per run, 8 by
    default.
    Published settings: LoRA of large teachers.
    """

    players = ("student",)
    targets = ("slow",)
    needs = frozenset({"x0"})
    paper = "TCD, arXiv 2402.19159"
    passes = {"student": 1, "slow": 1, "teacher": 2}
    max_steps = 8
    defaults = {"guidance_scale": 8.0}

    def __init__(self, parts: Parts, grid: int = 50, whole: float = 0.0, keep: float = 0.95, distance: str = "l2"):
        super().__init__(parts)
        self.student, self.slow, self.teacher = parts.student, parts.target(), parts.teacher
        self.path, self.guide = parts.path, parts.guide
        self.grid, self.whole, self.keep = times.strides(parts.path, grid), whole, keep
        self.distance = terms.checked_distance(distance)

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        path, cond, draw = self.path, batch.cond, batch.draw
        t, s = times.neighbours(draw, self.grid)
        end = torch.where(draw.uniform() < self.whole, 0.0, path.snap(draw.uniform() * s))
        xt = path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            xs = euler(self.guide(self.teacher), path, xt, t, s, cond)
            there = jump(self.slow, path, xs, s, end, cond)
        here = euler(self.student, path, xt, t, end, cond)
        loss = terms.apart(here, there, path, end, self.distance).mean()
        yield Turn("student", {"consistency": loss}, follow={"slow": self.keep})
