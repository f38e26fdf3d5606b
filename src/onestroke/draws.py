"""Random numbers that do not depend on how a batch is split."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    state = np.random.SeedSequence([seed, epoch, count]).generate_state(1)[0]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(state)))


class Draws:
    """The random numbers of one micro-batch: its rows of the global batch's numbers.

    Every number derives from (seed, step, number of the call, row in the global batch), so that two micro-batches of
    32, two processes of 32 and one batch of 64 see the same noise, and a resumed run continues with the draws it would
    have made. All ranks and micro-batches must make the same calls in the same order.
    """

    def __init__(self, seed: int, step: int, size: int, offset: int = 0, total: int | None = None, device="cpu"):
        self.seed, self.step, self.size, self.offset = seed, step, size, offset
        self.total, self.device, self.calls = total or size, torch.device(device), 0

    def generator(self) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, self.step, self.calls]).generate_state(1, np.uint64)[0]
        self.calls += 1
        return torch.Generator(self.device).manual_seed(int(state >> 1))

    def normal(self, like: Tensor | tuple[int, ...]) -> Tensor:
        """Standard normal of the shape and type of `like` (B, *D), or of a shape (*D) of float32 rows."""
        shape, dtype = (like, torch.float32) if isinstance(like, tuple) else (like.shape[1:], like.dtype)
        rows = torch.randn((self.total, *shape), generator=self.generator(), device=self.device, dtype=dtype)
        return rows[self.offset : self.offset + self.size]

    def uniform(self, lo: float | Tensor = 0.0, hi: float | Tensor = 1.0) -> Tensor:
        """(B,) float64, uniform in [lo, hi), one or (B,) each."""
        rows = torch.rand(self.total, generator=self.generator(), device=self.device, dtype=torch.float64)
        return lo + (hi - lo) * rows[self.offset : self.offset + self.size]

    def shared(self) -> float:
        """One uniform number in [0, 1), the same on every rank and micro-batch: what control flow may depend on."""
        return torch.rand((), generator=self.generator(), device=self.device, dtype=torch.float64).item()

    def index(self, count: int) -> Tensor:
        """(B,) int64: the rows of a dataset of `count` for this step; every epoch is a fresh permutation."""
        position = self.step * self.total + self.offset + torch.arange(self.size)
        rows = torch.empty(self.size, dtype=torch.int64)
        for epoch in (position // count).unique().tolist():
            mask = position // count == epoch
            rows[mask] = _permutation(self.seed, epoch, count)[position[mask] % count]
        return rows
