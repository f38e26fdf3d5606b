"""MLCM: consistency within ever fewer segments of the teacher's own trajectories, from prompts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.solvers import euler, jump, trajectory


class MLCM(Method):
    """Xie et al., "MLCM: Multistep Consistency Distillation of Latent Diffusion Model"; its fifth version is TLCM.

    The guided teacher's solver goes from noise to data in `grid` steps: the states on its way are the training data.
    From two neighbours of them the student jumps to the end of their segment, and its jump from the first must land
    where that from the second does, which at the end of the segment is the state itself. The segments halve in number,
    from `segments` to the student's own steps, so that the last stage is trained until the run ends.

    segments: of the first stage, published 8; the student's steps doubled some times. grid: steps of the solver, a
    multiple of `segments`, ours 16. scheme: the solver (see `solvers.SOLVERS`), ours dpm++2m (published: DDIM
    or DPM-Solver). stage_steps: rounds of a stage; 0, ours: the run in equal parts, and then a resumed run must keep
    its number of rounds. keep: of the average per round by which the second jump is, ours 0.95; 0 is the student
    itself. distance: ours huber; l2 or l1 (see `terms.DISTANCES`).
    Ours: every row takes a pair of neighbours from a trajectory of its own; a student of one step is one more halving;
    the optional reward, GAN and distribution matching are left out; states are scaled to the variance-preserving path
    before they are compared; guidance_scale is 7.5 by default.
    Published settings: LoRA.
    """

    players = ("student",)
    targets = ("slow",)
    paper = "MLCM, arXiv 2406.05768"
    passes = {"student": 1, "slow": 1, "teacher": 32}
    max_steps = 8
    defaults = {"guidance_scale": 7.5, "renoise": "implied"}

    def __init__(
        self,
        parts: Parts,
        segments: int = 8,
        grid: int = 16,
        scheme: str = "dpm++2m",
        stage_steps: int = 0,
        keep: float = 0.95,
        distance: str = "huber",
    ):
        super().__init__(parts)
        few = parts.few
        parts.check_implied()
        self.stages = times.halvings(len(few.times), segments=segments)
        edges = times.cut(few.path, (0.0, *reversed(few.times)), segments)
        self.grid = times.cut(few.path, edges.tolist(), grid)
        self.student, self.slow, self.teacher = parts.student, parts.target(), parts.teacher
        self.guide, self.few, self.keep = parts.guide, few, keep
        self.stage_steps = stage_steps or max(1, parts.rounds // len(self.stages))
        self.scheme, self.distance = scheme, terms.checked_distance(distance)

    def states(self, batch: Batch) -> Tensor:
        """What the teacher passes through at every time of the grid, (grid + 1, B, *D), from the data to noise."""
        net, path, down = self.guide(self.teacher), self.few.path, self.grid[1:].flip(0).tolist()
        x = trajectory(net, path, self.few.input(batch.noise), down, batch.cond, self.scheme)
        t = torch.full((len(x[0]),), down[-1], dtype=torch.float64, device=x[0].device)
        return torch.stack([euler(net, path, x[-1], t, torch.zeros_like(t), batch.cond), *reversed(x)])

    def step(self, batch: Batch, step: int):
        path, cond, grid = self.few.path, batch.cond, self.grid.to(batch.noise.device)
        segments = self.stages[min(step // self.stage_steps, len(self.stages) - 1)]
        i = 1 + (batch.draw.uniform() * (len(grid) - 1)).long()
        t, s = grid[i], grid[i - 1]
        end, _ = times.segment(grid[:: (len(grid) - 1) // segments], t)
        with torch.no_grad():
            states, rows = self.states(batch), torch.arange(len(t), device=t.device)
            there = jump(self.slow, path, states[i - 1, rows], s, end, cond)
        here = euler(self.student, path, states[i, rows], t, end, cond)
        loss = terms.apart(here, there, path, end, self.distance).mean()
        yield Turn("student", {"consistency": loss}, follow={"slow": self.keep})
