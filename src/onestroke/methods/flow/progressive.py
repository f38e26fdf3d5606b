"""Progressive distillation: the student learns two of its teacher's steps as one, again and again."""

from __future__ import annotations

import torch
from torch import nn

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn, follow
from onestroke.paths import like


class Progressive(Method):
    """Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv 2202.00512.

    Algorithm 2. At a time t of N, two DDIM steps of the teacher, each half as long, end at the next time; the student
    regresses the x0 and eps with which one DDIM step ends there, under max(SNR, 1), the larger of both errors. After
    `stage_steps` rounds the student becomes the teacher and N halves, down to the student's own number of steps, which
    is trained until the run ends. The times of all stages are those of one grid, equally spaced between the student's
    own calls: each is a time that the stage before has learned, whatever the teacher's own are.

    start: the N of the first stage; ours 128 (published 4,096, of a teacher of 8,192 steps on a continuous path; a
    table of 1,000 times allows 256). stage_steps: published 50,000; 0, ours: the run in equal parts, and then a
    resumed run must keep its number of rounds.
    Ours: the run's guidance guides the first teacher and is built in from then on; optimiser and learning rate go on
    from stage to stage (published: both start anew), and so does the average (published: none).
    Published settings (CIFAR-10): batch 128, Adam 5e-5, clip 1, a network that predicts x0 or v.
    """

    players = ("student",)
    targets = ("last",)
    needs = frozenset({"x0"})
    paper = "Progressive distillation, arXiv 2202.00512"
    passes = {"student": 1, "teacher": 4}
    max_steps = 8
    defaults = {"renoise": "implied", "lr": {"student": 5e-5}, "batch_size": 128, "clip": 1.0, "ema": 0.0}

    def __init__(self, parts: Parts, start: int = 128, stage_steps: int = 0):
        super().__init__(parts)
        self.student: nn.Module = parts.student
        self.last, self.teacher = parts.target(), parts.teacher
        self.path, self.guide = parts.path, parts.guide
        parts.check_implied()
        self.stages = times.halvings(len(parts.few.times), start=start)
        self.stage_steps = stage_steps or max(1, parts.rounds // len(self.stages))
        begins = self.stage_steps * (len(self.stages) - 1)
        self.phases = (self.stage_steps, begins) if begins else ()
        self.grid = times.cut(parts.path, (0.0, *reversed(parts.few.times)), 2 * start)

    def step(self, batch: Batch, step: int):
        stage = min(step // self.stage_steps, len(self.stages) - 1)
        if stage and step == stage * self.stage_steps:
            follow(self.last, self.student)
        yield self.halve(batch, self.stages[stage], self.last if stage else self.guide(self.teacher))

    def halve(self, batch: Batch, steps: int, teacher: nn.Module) -> Turn:
        """The student's turn with this number of steps, two of `teacher`'s for each."""
        assert batch.x0 is not None
        path, cond = self.path, batch.cond
        grid, part = self.grid.to(batch.noise.device), (len(self.grid) - 1) // (2 * steps)
        k = 2 * part * (steps - (batch.draw.uniform() * steps).long())
        t, half, s = grid[k], grid[k - part], grid[k - 2 * part]
        x = path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            one = teacher(x, t, cond)
            two = teacher(path.mix(one.x0, one.eps, half), half, cond)
            line = path.through(x, t, path.mix(two.x0, two.eps, s), s).x0
            x0 = torch.where(like(s, x) > 0, line, two.x0)  # the data end is x0 itself, whatever noise the path has
            eps = path.split(x, x0, t, "x0").eps
        return Turn("student", {"halve": terms.truncated_snr(self.student(x, t, cond), x0, eps)})
