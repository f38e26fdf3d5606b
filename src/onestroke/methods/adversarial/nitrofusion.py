"""NitroFusion: adversarial distillation against a large pool of heads, few of which judge and some begin anew."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from onestroke import terms
from onestroke.draws import Draws
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.paths import Cond


class NitroFusion(Method):
    """Chen et al., "NitroFusion: High-Fidelity Single-Step Diffusion through Dynamic Adversarial Training".

    Adversarial alone. Each round takes one of a few noise levels and, for every tapped layer of the frozen teacher, one
    of the heads that the pool keeps for that level. Only these are trained; then a few heads of the pool, wherever
    they are, begin anew, with fresh weights and an optimiser that remembers nothing of them.

    levels: unit times at which the teacher reads samples, published 10, 250, 500 and 750 of 1000. copies: heads per
    level and layer, published 12 (480 on ten layers of SDXL). refresh: part of the pool that begins anew in a round,
    published 0.01. loss: of the GAN, hinge (the condensed text available to us leaves it open); softplus is the other.
    Ours: published real samples are the teacher's own in several steps, here those of the run; published heads are a
    third each for the whole picture, for patches with prompt and for patches without, here all judge every place under
    the prompt. Left out: the training of further steps after the first.
    """

    players = ("student", "heads")
    needs = frozenset({"x0", "features"})
    paper = "NitroFusion, arXiv 2412.02030"
    passes = {"student": 1, "teacher": 3}

    def __init__(
        self,
        parts: Parts,
        levels: tuple[float, ...] = (0.01, 0.25, 0.5, 0.75),
        copies: int = 12,
        refresh: float = 0.01,
        loss: str = "hinge",
    ):
        super().__init__(parts)
        pool = parts.pool(len(levels) * copies)
        self.student, self.heads, self.teacher = parts.student, pool, parts.teacher
        self.few, self.path, self.fresh, self.layers, self.size = (
            parts.few,
            parts.path,
            pool.fresh,
            pool.layers,
            len(pool),
        )
        self.levels, self.copies, self.refresh, self.loss = tuple(levels), copies, refresh, terms.checked_gan(loss)

    def renewed(self, draw: Draws) -> dict[str, Tensor]:
        """Fresh values of the heads that begin anew this round."""
        count = int(self.refresh * self.size + draw.shared())
        chosen = random.Random(draw.shared()).sample(range(self.size), count)
        return {k: v for head in chosen for k, v in self.fresh(head, draw.shared()).items()}

    def judge(self, x: Tensor, t: Tensor, cond: Cond, draw: Draws, rows: list[int]) -> Tensor:
        """The logits (B, N) of the chosen heads on samples x (B, *D), noised to t."""
        return self.heads(self.teacher(self.path.mix(x, draw.normal(x), t), t, cond).features, rows)

    def step(self, batch: Batch, step: int):
        cond, draw, real = batch.cond, batch.draw, batch.x0
        assert real is not None
        level = int(draw.shared() * len(self.levels))
        rows = [level * self.copies + int(draw.shared() * self.copies) for _ in range(self.layers)]
        x = self.few.sample(self.student, batch.noise, cond)
        time = min(max(self.levels[level], self.path.t_min), self.path.t_max)
        t = self.path.snap(torch.full((len(x),), time, dtype=torch.float64, device=x.device))
        with frozen(self.teacher, self.heads):
            yield Turn("student", {"gan": terms.gan_student(self.judge(x, t, cond, draw, rows), self.loss)})

        with frozen(self.teacher):
            logits = self.judge(real, t, cond, draw, rows), self.judge(x.detach(), t, cond, draw, rows)
            yield Turn("heads", {"gan": terms.gan_critic(*logits, self.loss)}, self.renewed(draw))
