"""BOSS: the best times for few steps by dynamic programming, then the teacher's way between them made straight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.errors import InputError
from onestroke.method import Batch, Mean, Method, Parts, Turn
from onestroke.paths import Estimate, like
from onestroke.sampling import FewStep

KNOTS = ("grid", "best")


def cheapest(cost: Tensor, steps: int) -> list[int]:
    """The `steps` + 1 points from the first to the last whose jumps cost least; cost[i, j] of the one from i to j > i.

    J_1(i) = cost[i, last], J_k(i) = min over j of cost[i, j] + J_{k-1}(j).
    """
    cost = cost.masked_fill(torch.ones_like(cost).tril() > 0, torch.inf)
    best, choices = cost[:, -1], list[Tensor]()
    for _ in range(steps - 1):
        best, choice = (cost + best).min(1)
        choices.insert(0, choice)
    found = [0]
    for choice in choices:
        found.append(int(choice[found[-1]]))
    return [*found, len(cost) - 1]


class Boss(Method):
    """Nguyen, Nguyen and Nguyen, "Bellman Optimal Stepsize Straightening of Flow-Matching Models".

    The teacher goes from noise to picture in `fine` small steps. The cost of a jump from one of its states to a later
    one is the squared distance of a single step's end from that state; dynamic programming finds the few knots whose
    jumps cost least. Then the student's velocity eps - x0 at the state of a knot regresses that of the chord to the
    next knot's state: sampled at the knots, it ends where the small steps do.

    fine: of the teacher's steps, each a call in every round; ours 24 (published 100, of ways stored beforehand). knots:
    "grid" (ours), the times that the student has, the only ones that a plain pipeline's scheduler carries; "best" (the
    paper), those that the first round finds, which the student is then sampled at.
    Ours: any path, by DDIM steps, which are Euler's on the straight one, where the published flows live and whose
    scale the cost has; ways of fresh noise instead of 5,000 stored ones. The run's guidance guides the teacher.
    Published settings: costs of 100 noises, 12,000 rounds of 15, LoRA as an option.
    """

    players = ("student",)
    paper = "BOSS, arXiv 2312.16414"
    passes = {"student": 1, "teacher": 48}
    max_steps = 8
    defaults = {"renoise": "implied", "batch_size": 15}

    marks: Tensor

    def __init__(self, parts: Parts, fine: int = 24, knots: str = "grid"):
        super().__init__(parts)
        count = len(parts.few.times)
        if knots not in KNOTS:
            raise InputError(f"knots={knots!r} must be one of {', '.join(KNOTS)}.")
        if count > 1 and parts.few.renoise != "implied":
            raise InputError("a student of DDIM steps needs renoise=implied.")
        self.student, self.teacher, self.start = parts.student, parts.teacher, parts.few
        self.path, self.guide, self.search = parts.path, parts.guide, knots == "best"
        self.times = times.cut(parts.path, (0.0, *reversed(parts.few.times)), fine).flip(0)[:-1].tolist()
        self.register_buffer("marks", torch.arange(0, fine + 1, fine // count))

    @classmethod
    def needs_of(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"times"} if options["knots"] == "best" else ())

    @property
    def few(self) -> FewStep:
        """How the student is called: at its knots."""
        return replace(self.start, times=tuple(self.times[i] for i in self.marks[:-1].tolist()))

    @torch.no_grad()
    def way(self, batch: Batch) -> tuple[list[Tensor], list[Estimate]]:
        """The teacher's states, of which the last is the picture, and what it believes at all but that."""
        x, teacher, states, beliefs = self.start.input(batch.noise), self.guide(self.teacher), [], []
        for k, time in enumerate(self.times):
            t = torch.full((len(x),), time, dtype=torch.float64, device=x.device)
            est = teacher(x, t, batch.cond)
            states.append(x)
            beliefs.append(est)
            x = self.path.mix(est.x0, est.eps, 0 * t + self.times[k + 1]) if k + 1 < len(self.times) else est.x0
        return [*states, x], beliefs

    def costs(self, states: list[Tensor], beliefs: list[Estimate]) -> Tensor:
        """(K + 1, K + 1): the mean squared distance of one step's end from the state there, where a + b = 1."""
        a, b = self.path.ab(torch.tensor(self.times, dtype=torch.float64, device=states[0].device))
        cost = torch.zeros(len(states), len(states), dtype=torch.float64, device=states[0].device)
        for i, est in enumerate(beliefs):
            for j in range(i + 1, len(beliefs)):
                off = (a[j].to(est.x0) * est.x0 + b[j].to(est.x0) * est.eps - states[j]) / (a[j] + b[j]).to(est.x0)
                cost[i, j] = off.square().mean()
            cost[i, -1] = (est.x0 - states[-1]).square().mean()
        return cost

    def step(self, batch: Batch, step: int):
        states, beliefs = self.way(batch)
        if self.search and step == 0:
            cost = yield Mean(self.costs(states, beliefs))
            self.marks.copy_(torch.tensor(cheapest(cost, len(self.marks) - 1)))

        k = (batch.draw.uniform() * (len(self.marks) - 1)).long()
        rows = torch.arange(len(k), device=k.device)
        grid = torch.tensor((*self.times, 0.0), dtype=torch.float64, device=k.device)
        way, (i, j) = torch.stack(states), (self.marks[k], self.marks[k + 1])
        x, y, t, s = way[i, rows], way[j, rows], grid[i], grid[j]
        line = self.path.through(x, t, y, s)
        x0 = torch.where(like(j < len(self.times), x) > 0, line.x0, y)  # whatever noise the path has at the data end
        eps = self.path.split(x, x0, t, "x0").eps
        yield Turn("student", {"chord": terms.straight(self.student, self.path, x0, eps, batch.cond, t)})
