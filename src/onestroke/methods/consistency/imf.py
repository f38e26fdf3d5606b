"""Improved MeanFlow: the average velocity by a loss on the velocity, whose input is the network's own."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke.method import Parts
from onestroke.methods.consistency.meanflow import MeanFlow
from onestroke.paths import Cond, like


class IMF(MeanFlow):
    """Geng et al., "Improved Mean Flows: On the Challenges of Fastforward Generative Models".

    MeanFlow (see `meanflow`) as a regression of the velocity: u + (t - s) du/dt regresses v, with the derivative,
    without gradient, along the student's own velocity u(x_t, t, t), which regresses v as well. What the network reads
    then tells it nothing of the target, and its error has less variance.

    equal: share of the rows with s = t, published 0.5. c: published 0.01. mean, std, end_mean, end_std, jump, power,
    velocity, difference: as in `meanflow`.
    Ours: v is the guided teacher's; published is training from data, with v + (1 - 1 / w) (the student's velocity under
    the class - under none), of a network that reads w and the interval in which it is guided, and whose own velocity
    may have a head of its own. Published settings: Adam 1e-4 with betas 0.9 and 0.95, batch 1024.
    """

    paper = "Improved MeanFlow, arXiv 2512.02012"
    passes = {"student": 3, "teacher": 2}
    defaults = {**MeanFlow.defaults, "batch_size": 1024}

    def __init__(
        self,
        parts: Parts,
        mean: float = -0.4,
        std: float = 1.0,
        end_mean: float = -4.0,
        end_std: float = 0.0,
        equal: float = 0.5,
        jump: float = 0.0,
        power: float = 1.0,
        c: float = 0.01,
        velocity: str = "teacher",
        difference: float = 0.0,
    ):
        super().__init__(parts, mean, std, end_mean, end_std, equal, jump, power, c, velocity, difference)

    def losses(self, x: Tensor, t: Tensor, s: Tensor, v: Tensor, cond: Cond) -> dict[str, Tensor]:
        own = self.average(x, t, t, cond)
        _, du = self.tangent(lambda x, t: self.average(x, t, s, cond), x, t, own.detach(), torch.ones_like(t))
        error = self.average(x, t, s, cond) + like(t - s, x) * du - v
        return {"average": self.adaptive(error), "velocity": self.adaptive(own - v)}
