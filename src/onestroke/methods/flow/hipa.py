"""HiPA: one-step adapters that regress the teacher's own pictures, their high frequencies once more."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn


def axes(x: Tensor) -> tuple[int, ...]:
    """The spatial ones of pictures (B, C, H, W); the only one of vectors (B, D)."""
    return tuple(range(2, x.ndim)) or (1,)


def high(x: Tensor, cut: float) -> Tensor:
    """x (B, *D) without the frequencies within `cut` of the highest, in any direction: an orthogonal projection."""
    near = torch.ones((), device=x.device)
    for axis in axes(x):
        one = 2 * torch.fft.fftfreq(x.shape[axis], device=x.device).abs() <= cut
        near = near * one.reshape(-1, *[1] * (x.ndim - 1 - axis))
    return torch.fft.ifftn(torch.fft.fftn(x, dim=axes(x)) * (1 - near), dim=axes(x)).real


def edges(x: Tensor) -> list[Tensor]:
    """The differences of neighbours along every axis."""
    return [x.diff(dim=axis) for axis in axes(x) if x.shape[axis] > 1]


class HiPA(Method):
    """Zhang and Hooi, "HiPA: Enabling One-Step Text-to-Image Diffusion Models via High-Frequency-Promoting Adaptation".

    One step lacks high frequencies above all. Adapters over the frozen teacher regress, from a noise, what the
    teacher's solver made of it: the picture (spatial), and `weight` times what is high in it, twice: past a Fourier
    filter, and by its edges.

    weight: of both high terms, 1. cut: of the filter's square, as a part of the highest frequency, 0.25; the paper's
    are not known to us. distance: "l2", "l1" or "huber" (see `terms.DISTANCES`).
    Ours: latents and an elementwise distance instead of pictures and a perceptual one; edges are plain differences,
    which are linear, instead of an edge detector's; the run's guidance, by default 7.5, is in the pairs.
    Published settings (SD 2.1): LoRA of 3.3 million weights, which is rank 16 in its attention.
    """

    players = ("student",)
    needs = frozenset({"pairs"})
    paper = "HiPA, arXiv 2311.18158"
    passes = {"student": 1}
    defaults = {"guidance_scale": 7.5, "lora_rank": {"student": 16}, "lr": {"*": 1e-4}}

    def __init__(self, parts: Parts, weight: float = 1.0, cut: float = 0.25, distance: str = "l2"):
        super().__init__(parts)
        if not 0 <= cut <= 1:
            raise InputError(f"cut={cut} is a part of the highest frequency: it must lie in [0, 1].")
        self.student, self.teacher, self.few = parts.student, parts.teacher, parts.few
        self.weight, self.cut, self.distance = weight, cut, terms.DISTANCES[terms.checked_distance(distance)]

    def step(self, batch: Batch, step: int):
        assert batch.pairs is not None
        noise, x0 = batch.pairs
        x = self.few.sample(self.student, noise, batch.cond)

        def far(one: Tensor, other: Tensor) -> Tensor:
            return self.distance(one - other).mean()

        fourier = far(high(x, self.cut), high(x0, self.cut))
        every = [far(one, other) for one, other in zip(edges(x), edges(x0), strict=True)]
        edge = sum(every, x.new_zeros(()))
        yield Turn("student", {"spatial": far(x, x0), "fourier": self.weight * fourier, "edge": self.weight * edge})
