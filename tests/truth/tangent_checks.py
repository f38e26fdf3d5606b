"""Truths of the continuous-time methods: on N(M, S^2) the consistency function and the average velocity are known."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from onestroke.method import Batch
from onestroke.paths import Estimate, like
from onestroke.teachers.gaussian import GaussianMixture
from truth.checks import F64, Given, labels, parts

M, S = 0.3, 0.5
PATHS = ("vp", "edm", "flow", "trig", "trig half", "table", "table0")
TIMES = (0.05, 0.4, 0.93)


def at(t, own):
    """Every time that a method draws is that of the level of noise at t of the student's own path."""

    def fixed(draw, path, *args, **kwargs):
        return path.time_of(own.log_snr(torch.as_tensor(t, dtype=F64).expand(draw.size)))

    return mock.patch.multiple("onestroke.times", log_normal=fixed, uniform=fixed, straight=fixed)


class Consistent(nn.Module):
    """x0 = mean + (std / sqrt(V)) (x - a mean) with V = (a std)^2 + b^2: where the flow of N(mean, std^2) ends.

    Every x0 can be moved by a parameter (B, D), whose gradient is that of x0.
    """

    def __init__(self, path, mean=M, std=S, rows=4, dim=2):
        super().__init__()
        self.path, self.mean, self.std = path, mean, std
        self.shift = nn.Parameter(torch.zeros(rows, dim, dtype=F64))

    def forward(self, x, t, cond):
        a, b = (like(c, x) for c in self.path.ab(t))
        x0 = self.mean + self.std / ((a * self.std) ** 2 + b**2).sqrt() * (x - a * self.mean) + self.shift
        return Estimate(x0, (x - a * x0) / b)


class Shifting(nn.Module):
    """Of equal deviations: N(M, S^2) under a class, N(0, S^2) under none."""

    def __init__(self, path):
        super().__init__()
        self.yes, self.no = (GaussianMixture(path, torch.full((1, 2), m, dtype=F64), S) for m in (M, 0.0))

    def forward(self, x, t, cond):
        every = {"label": torch.zeros_like(cond["label"])}
        yes, no = self.yes(x, t, every), self.no(x, t, every)
        chosen = cond["label"][:, None] >= 0
        return Estimate(torch.where(chosen, yes.x0, no.x0), torch.where(chosen, yes.eps, no.eps))


def gauss(path, mean=M, std=S, dim=2):
    return GaussianMixture(path, torch.full((1, dim), mean, dtype=F64), std)


def batch(rows=4, dim=2, seed=5, draw=None, label=0):
    """Noised data: rows of N(M, S^2) with noise."""
    noise, z, *more = torch.randn(8, rows, dim, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return Batch(noise, labels(rows, label), draw or Given(*more), M + S * z)


def made(cls, path, student, teacher=None, scale=1.0, **options):
    return cls(parts(path, teacher or gauss(path), student, student, scale), **options)


def pull(turn, student):
    """The gradient (B, D) of the student's turn with respect to its x0."""
    assert turn.player == "student"
    (found,) = torch.autograd.grad(sum(turn.terms.values()), student.shift)
    return found


def guided_mean_is_w_m(cls, path, gradient, w=3.0, **options):
    """Of classes of equal deviation, guidance by w makes the mean w M: no pull there, and one anywhere else."""
    for mean, zero in ((w * M, True), (M, False), ((w + 1) * M, False)):
        student = Consistent(path, mean)
        method = made(cls, path, student, Shifting(path), w, **options)
        assert (gradient(method, student).abs().max() < 1e-9) == zero
