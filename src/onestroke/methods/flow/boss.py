"""BOSS: the best times for few steps by dynamic programming, then the teacher's way between them made straight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from onestroke import terms
from onestroke.errors import InputError
from onestroke.method import Batch, Mean, Method, Parts, Turn
from onestroke.sampling import FewStep
from onestroke.solvers import chord, stops

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

    The teacher's ways from noise to picture are stored in many small steps. The cost of a jump from one state to a
    later one is the squared distance of a single step's end from that state; dynamic programming finds the few knots
    whose jumps cost least. Then the student's velocity eps - x0 at the state of a knot regresses that of the chord to
    the next knot's state: sampled at the knots, it ends where the small steps do.

    knots: "best" (the paper), those of the mean cost, which the student is then sampled at: its pipeline is called with
    them; "grid", those of a plain scheduler, for pipelines that take no times. search: rounds whose ways the mean is
    of, each of which finds the knots anew; 7 of 15 are the published 100.
    Ours: any path, by DDIM steps, which are Euler's on the straight one, where the published flows live and whose
    scale the cost has. The run's guidance is in the ways; their number and that of their steps are its settings.
    Published settings: ways of 100 steps, costs of 100 of them, before training, then 5,000 (pair_count); 12,000 rounds
    of 15, LoRA as an option.
    """

    players = ("student",)
    needs = frozenset({"ways"})
    paper = "BOSS, arXiv 2312.16414"
    passes = {"student": 1}
    max_steps = 8
    defaults = {"renoise": "implied", "batch_size": 15, "solver": "ddim", "solver_steps": 100}

    marks: Tensor
    cost: Tensor

    def __init__(self, parts: Parts, knots: str = "best", search: int = 7):
        super().__init__(parts)
        if knots not in KNOTS:
            raise InputError(f"knots={knots!r} must be one of {', '.join(KNOTS)}.")
        parts.check_implied()
        self.student, self.teacher, self.start = parts.student, parts.teacher, parts.few
        if search < 1:
            raise InputError(f"search={search} rounds must be at least 1; set knots=grid for none.")
        self.path, self.times = parts.path, stops(parts.path, parts.solver_steps)
        self.search = search if knots == "best" else 0
        self.phases = (self.search,) if self.search else ()
        grid = torch.tensor((*parts.few.times, 0.0), dtype=torch.float64)
        near = (grid[:, None] - self.times).abs().min(1)
        if (near.values > 1e-9).any():
            raise InputError(f"the student's times {parts.few.times} are not among those of the teacher's ways.")
        self.register_buffer("marks", near.indices)
        size = len(self.times) if self.search else 0
        self.register_buffer("cost", torch.zeros(size, size, dtype=torch.float64))

    @classmethod
    def needs_of(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return cls.needs | ({"times"} if options["knots"] == "best" else set())

    @property
    def few(self) -> FewStep:
        """How the student is called: at its knots."""
        return replace(self.start, times=tuple(self.times[self.marks[:-1].cpu()].tolist()))

    def costs(self, states: Tensor) -> Tensor:
        """(K + 1, K + 1) of ways (B, K + 1, *D): the mean squared distance of one step's end from the state there,
        where a + b = 1."""
        ways, last = states.unbind(1), states.shape[1] - 1
        a, b = self.path.ab(self.times.to(states.device))
        cost = torch.zeros(last + 1, last + 1, dtype=torch.float64, device=states.device)
        for i in range(last):
            here = torch.full((len(states),), i, device=states.device)
            _, _, est = chord(self.path, states, here, here + 1)
            for j in range(i + 1, last):
                off = (a[j].to(est.x0) * est.x0 + b[j].to(est.x0) * est.eps - ways[j]) / (a[j] + b[j]).to(est.x0)
                cost[i, j] = off.square().mean()
            cost[i, -1] = (est.x0 - ways[-1]).square().mean()
        return cost

    def step(self, batch: Batch, step: int):
        assert batch.ways is not None
        if step < self.search:
            before = self.cost.clone()  # micro-batches are answered one after the other
            cost = yield Mean(self.costs(batch.ways))
            self.cost.copy_(before.lerp(cost, 1 / (step + 1)))
            self.marks.copy_(torch.tensor(cheapest(self.cost, len(self.marks) - 1)))

        k = (batch.draw.uniform() * (len(self.marks) - 1)).long()
        _, t, line = chord(self.path, batch.ways, self.marks[k], self.marks[k + 1])
        loss = terms.straight(self.student, self.path, line.x0, line.eps, batch.cond, t)
        yield Turn("student", {"chord": loss})
