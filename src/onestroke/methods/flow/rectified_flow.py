"""Rectified flow: the student's paths from noise to picture are made straight (reflow)."""

from __future__ import annotations

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn


class RectifiedFlow(Method):
    """Liu et al., "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow".

    Reflow. A pair (eps, x0) of the teacher's solver is mixed at a random time; the student's velocity eps - x0 there
    regresses the pair's, mean squared error. Its trajectories no longer cross, so they straighten: one Euler step from
    the noise, which is the student's x0 at the first call, is exact where they are straight.

    lo, hi: of the straight path's time b / (a + b), ours 0.001 and 1 (published 0 and 0.999), since one step asks at 1.
    ends: how much the times prefer both ends, published 0, uniform; 2-RF++ (arXiv 2405.20320) draws them U-shaped (see
    `times.straight`), its exp(4 u) + exp(4 - 4 u) being ends = 2. Its pseudo-Huber and LPIPS distances are left out.
    Ours: the student stays on the teacher's path, where a straight trajectory is one whose x0 and eps do not change;
    eps is the one with which x0 mixes to the student's first input, the noise itself where that has no signal. The
    run's guidance is in the pairs. Published settings (CIFAR-10): Adam 2e-4, warm-up 5,000 (ours none), clip 1, average
    0.9999; InstaFlow's
    (SD 1.5): pairs of 25 steps of DPM-Solver under guidance 6, 70,000 rounds of 64 and 25,000 of 1024.
    """

    players = ("student",)
    needs = frozenset({"pairs"})
    paper = "Rectified flow, arXiv 2209.03003"
    passes = {"student": 1}
    max_steps = 8
    defaults = {"renoise": "implied", "lr": {"student": 2e-4}, "clip": 1.0, "ema": 0.9999}

    def __init__(self, parts: Parts, lo: float = 0.001, hi: float = 1.0, ends: float = 0.0):
        super().__init__(parts)
        parts.check_implied()
        self.student, self.teacher, self.few, self.path = parts.student, parts.teacher, parts.few, parts.path
        self.lo, self.hi, self.ends = lo, hi, ends

    def step(self, batch: Batch, step: int):
        assert batch.pairs is not None
        noise, x0 = batch.pairs
        eps = self.few.eps(noise, x0)
        t = times.straight(batch.draw, self.path, self.lo, self.hi, self.ends)
        yield Turn("student", {"flow": terms.straight(self.student, self.path, x0, eps, batch.cond, t)})
