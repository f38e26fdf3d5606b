"""KD: regression of a one-step student onto the teacher's own pictures of the same noise."""

from __future__ import annotations

from onestroke import terms
from onestroke.method import Batch, Method, Parts, Turn


class KD(Method):
    """Luhman and Luhman, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed".

    Half the squared error, averaged over the latent, between the student's one call on a noise and what the teacher's
    deterministic solver made of the same noise under the same prompt. Plain regression averages what it cannot tell
    apart: pictures blur where the student is small or the pairs are few.

    Ours: latents instead of pixels; the run's guidance is in the pairs; solver and number of steps are settings of the
    run (published: DDIM).
    """

    players = ("student",)
    needs = frozenset({"pairs"})
    paper = "KD, arXiv 2101.02388"
    passes = {"student": 1}

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.student, self.teacher, self.few = parts.student, parts.teacher, parts.few

    def step(self, batch: Batch, step: int):
        assert batch.pairs is not None
        noise, x0 = batch.pairs
        x = self.few.sample(self.student, noise, batch.cond)
        yield Turn("student", {"kd": 0.5 * terms.reduced((x - x0).square(), "mean")})
