"""InstaFlow: make the teacher's paths straight first, then distil them into one step."""

from __future__ import annotations

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn


class InstaFlow(Method):
    """Liu et al., "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation".

    For `straighten` rounds reflow (see `rectified-flow`): the student's velocity regresses that of the pairs at random
    times. Then distillation: the same error at the noise end alone, where the one step is taken. Regression straight
    onto a curved teacher's pictures blurs them; on a straightened one it has little left to do.

    straighten: published 95,000 (70,000 of batch 64, 25,000 of batch 1024), then 39,500 of distillation; 0, ours: seven
    tenths of the run, and then a resumed run must keep its number of rounds.
    Ours: one run on one set of pairs. Published, distillation has pairs of its own, of the straightened student under
    guidance 1.5, and ends with LPIPS: run `rectified-flow`, then `kd` on its folder, whose distance is the square.
    """

    players = ("student",)
    needs = frozenset({"pairs"})
    paper = "InstaFlow, arXiv 2309.06380"
    passes = {"student": 1}
    defaults = {"guidance_scale": 6.0, "solver": "dpm++2m", "solver_steps": 25}

    def __init__(self, parts: Parts, straighten: int = 0):
        super().__init__(parts)
        self.student, self.teacher, self.few, self.path = parts.student, parts.teacher, parts.few, parts.path
        self.straighten = straighten or 7 * parts.rounds // 10
        self.phases = (self.straighten,)

    def step(self, batch: Batch, step: int):
        assert batch.pairs is not None
        noise, x0 = batch.pairs
        eps, t, name = self.few.eps(noise, x0), self.few.time(0, noise), "distill"
        if step < self.straighten:
            t, name = times.straight(batch.draw, self.path, lo=0.001), "flow"
        yield Turn("student", {name: terms.straight(self.student, self.path, x0, eps, batch.cond, t)})
