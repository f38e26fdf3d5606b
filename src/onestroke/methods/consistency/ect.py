"""Easy consistency tuning: from diffusion to consistency, as the second time is drawn towards the first."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


class ECT(Method):
    """Geng et al., "Consistency Models Made Easy", arXiv 2406.14548.

    Data under the same noise at the levels t, log-normal, and r = t max(0, 1 - n(t) / q^stage), n(t) = 1 + k
    sigmoid(-b t): the student's x0 at t must be its own at r, without gradient, and the data where r = 0. The loss is
    the norm of the difference over t - r. In the first stage of q = 2 small t have r = 0, which is diffusion, what the
    weights come from; stage by stage r goes to t.

    q: published 2. stages: how many there are, published 8 (CIFAR-10). stage_steps: rounds of each; 0: the run in equal
    parts, and then a resumed run must keep its number of rounds. k, b: of n, published 8 and 1; k = 0 leaves 1. c: of
    the pseudo-Huber norm, published 0. mean, std: of log t, published -1.1 and 2.
    Ours: any path, whose b / a is the level; an r below the path's least level is 0; the run's guidance is not used.
    Published settings (CIFAR-10): batch 128, RAdam 1e-4 (here AdamW), no clipping, average of 0.9993, dropout 0.2
    (ours: none).
    """

    players = ("student",)
    needs = frozenset({"x0"})
    paper = "ECT, arXiv 2406.14548"
    passes = {"student": 2}
    max_steps = 8
    defaults = {"lr": {"student": 1e-4}, "batch_size": 128, "ema": 0.9993, "clip": 0.0}

    def __init__(
        self,
        parts: Parts,
        q: float = 2.0,
        stage_steps: int = 0,
        stages: int = 8,
        k: float = 8.0,
        b: float = 1.0,
        c: float = 0.0,
        mean: float = -1.1,
        std: float = 2.0,
    ):
        super().__init__(parts)
        self.student, self.teacher, self.path = parts.student, parts.teacher, parts.path
        self.q, self.k, self.b, self.c, self.mean, self.std, self.stages = q, k, b, c, mean, std, stages
        self.stage_steps = stage_steps or max(1, parts.rounds // stages)

    def share(self, level: torch.Tensor, step: int) -> torch.Tensor:
        """r / t (B,) at the levels t (B,) in this round."""
        stage = 1 + min(step // self.stage_steps, self.stages - 1)
        return (1 - (1 + self.k * torch.sigmoid(-self.b * level)) / self.q**stage).clamp_min(0.0)

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        path, cond = self.path, batch.cond
        t = times.log_normal(batch.draw, path, self.mean, self.std)
        level = (-path.log_snr(t)).exp()
        share = self.share(level, step)
        s = times.nearer(path, t, share)
        apart = s > path.t_min
        x, lower = path.mix(batch.x0, batch.noise, t), path.mix(batch.x0, like(apart, batch.noise) * batch.noise, s)
        target = terms.endpoint(self.student, path, lower, s, cond)
        distance = terms.pseudo_huber(self.student(x, t, cond).x0 - target, self.c)
        gap = level * (1 - torch.where(apart, share, 0.0))
        yield Turn("student", {"consistency": (distance / gap.to(distance)).mean()})
