"""Improved consistency training: its loss typed by hand, the doubling schedule, and the gains of N levels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from onestroke.draws import Draws
from onestroke.method import Batch
from onestroke.methods.consistency.ict import ICT
from onestroke.paths import EDM
from truth import consistency_checks as checks
from truth.checks import F64, Given, close, hand_ab, labels, make_path, parts
from truth.consistency_checks import FAMILY, Drawn, Levels, Line, S
from truth.test_mutants import broken


def made(cls, path, student, rounds=1000, dim=4, **options):
    return cls(replace(parts(path, None, student, None), rounds=rounds, shape=(dim,)), **options)


def by_hand(cls, name="vp"):
    """mean (sqrt(|e|^2 + c^2) - c) / (rho_t - rho_s), c = 0.00054 sqrt(4), the target being the student's own."""
    path = make_path(name)
    for t, s in ((0.7, 0.6), (0.05, 0.0)):
        t, s = (path.snap(torch.tensor(v, dtype=F64)).item() for v in (t, s))
        student = Line(path, 0.7, 0.2)
        method = made(cls, path, student)
        z, e = 1e-3 * torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(41), dtype=F64)
        with checks.pair(t, s):
            (turn,) = method.step(Batch(e, labels(6), Given(e), z), 0)
        assert not turn.follow
        (a, b), (c, d) = hand_ab(name, t), hand_ab(name, s)
        x, lower = a * z + b * e, c * z + d * e
        target = lower / c if s <= path.t_min else 0.7 * lower + 0.2 * s
        error = ((student.gain * x + student.shift * t - target) ** 2).sum(1)
        huber = (error + 4 * 0.00054**2).sqrt() - 2 * 0.00054
        want = (huber / (b / a - d / c)).mean()
        got = turn.terms["consistency"]
        close(got, want)
        for one, other in zip(*(torch.autograd.grad(v, list(student.parameters())) for v in (got, want)), strict=True):
            close(one, other)


@pytest.mark.parametrize("name", checks.NAMES)
def test_the_loss_is_the_one_typed_by_hand(name):
    by_hand(ICT, name)


def beyond(cls):
    path = make_path("flow")
    t, s = torch.tensor([1.0, 0.9], dtype=F64), torch.tensor([0.9, 0.8], dtype=F64)
    close(made(cls, path, Line(path, 0.7, 0.2)).gap(t, s), [80 - 9, 9 - 4], 1e-12)
    close(made(cls, path, Line(path, 0.7, 0.2), sigma_max=30.0).gap(t, s), [30 - 9, 9 - 4], 1e-12)


def test_noise_beyond_the_ramp_counts_as_its_end():
    beyond(ICT)


def narrowed(cls):
    checks.ramp_is_narrowed(made(cls, EDM(), Line(EDM(), 0.7, 0.2), sigma_min=0.2, sigma_max=50.0))


def test_a_narrower_ramp():
    narrowed(ICT)


def doubling(cls):
    """K' = floor(K / (log2(floor(1280 / 10)) + 1)) = K / 8; N = min(10 2^floor(k / K'), 1280) + 1, at the borders."""
    method = made(cls, EDM(), Line(EDM(), 1.0, 0.0), rounds=800_003)
    assert method.stage_steps == 100_000
    for stage in range(8):
        assert method.intervals(100_000 * stage) == 10 * 2**stage
        assert method.intervals(100_000 * (stage + 1) - 1) == 10 * 2**stage
    assert method.intervals(800_002) == method.intervals(10**7) == 1280
    seen = []
    method.student.forward = lambda x, t, cond: seen.append(t) or Line.forward(method.student, x, t, cond)
    e = torch.zeros(7, 4, dtype=F64)
    list(method.step(Batch(e, labels(7), Drawn((torch.arange(7) + 0.5) / 7), e), 0))
    grid = checks.ladder(EDM(), 11)
    assert set(seen[0].tolist()) <= set(grid[:-1].tolist())
    assert [grid.tolist().index(v) for v in seen[0]] == [grid.tolist().index(v) - 1 for v in seen[1]]


def test_the_published_schedule():
    doubling(ICT)


def likely(cls):
    """Of the first round's ten pairs, each is as frequent as N(-1.1, 2^2) has log sigma in between: 5 deviations."""
    path, count, seen = EDM(), 100_000, []
    method = made(cls, path, Line(path, 1.0, 0.0))
    method.student.forward = lambda x, t, cond: seen.append(t) or Line.forward(method.student, x, t, cond)
    e = torch.zeros(count, 4, dtype=F64)
    list(method.step(Batch(e, labels(count), Draws(0, 0, count), e), 0))
    lo, hi = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = [(lo + i / 10 * (hi - lo)) ** 7 for i in range(11)]
    below = [math.erf((math.log(v) + 1.1) / (2 * math.sqrt(2))) for v in sigma]
    noisier = path.ab(seen[1])[1]
    for i in range(10):
        p = (below[i + 1] - below[i]) / (below[-1] - below[0])
        found = (noisier - sigma[i + 1]).abs().lt(1e-6 * sigma[i + 1]).double().mean()
        assert abs(found - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_its_pairs_are_as_likely_as_published():
    likely(ICT)


@pytest.mark.parametrize(("count", "ratio"), [(11, None), (1281, 0.99778)])
def test_the_gains_of_the_first_and_the_last_stage(count, ratio):
    """Sheet 2, of the wide quadratic bottom of the distance; the optimum of any c is the same, residuals being
    independent of x_t. At 1281 levels DDIM's bias is 0.2 %."""
    path = EDM()
    grid = checks.ladder(path, count)
    method = made(ICT, path, Levels(path, grid), dim=1, first=count - 1, last=count - 1, scale=1e5)
    line = checks.solved(method, path, grid)
    close(line[1:, 0], checks.gains(path, grid)[1:], 1e-6)
    if ratio:
        assert checks.ratio(path, line) == pytest.approx(ratio, abs=2e-5)


def test_the_optimum_does_not_depend_on_c():
    """At DDIM's gain the mean gradient of the distance vanishes for every c: 5 standard errors of 100 000 samples."""
    path, (t, s) = make_path("edm"), (0.5, 0.4)
    z, e = torch.randn(2, 100_000, 1, generator=torch.Generator().manual_seed(45), dtype=F64)
    k = checks.kappa(path, *(torch.tensor(v, dtype=F64) for v in (t, s)))
    low = 0.8
    student = Line(path, low * k.item(), 0.0)
    for scale in (0.0, 0.05, 1.0):
        method = made(ICT, path, student, dim=1, scale=scale)
        method.student.forward = lambda x, u, cond: Line.forward(student, x, u, cond)._replace(
            x0=(student.gain if u[0] > 0.45 else low) * x
        )
        with checks.pair(t, s):
            (turn,) = method.step(Batch(e, labels(len(e)), Given(e), S * z), 0)
        (slope,) = torch.autograd.grad(turn.terms["consistency"], student.gain)
        (a, b), (_, d) = hand_ab("edm", t), hand_ab("edm", s)
        spread = ((a * S * z + b * e).std() / (b - d) / len(e) ** 0.5).item()
        assert abs(slope.item()) < 5 * spread


MUTANTS = [
    (
        "target = terms.endpoint(self.student, path, lower, s, cond)",
        "target = self.student(lower, s, cond).x0",
        by_hand,
    ),
    ("lower, s, cond)", "lower, t, cond)", by_hand),
    ("scale: float = 0.00054", "scale: float = 0.0006", by_hand),
    ("math.prod(parts.shape) ** 0.5", "math.prod(parts.shape)", by_hand),
    ("- low\n", "\n", by_hand),
    ("(distance / self.gap", "(distance * self.gap", by_hand),
    ("clamp_max(self.sigma_max)", "clamp_max(RAMP.sigma_max)", beyond),
    ("parts.path, sigma_min, sigma_max)", "parts.path, RAMP.sigma_min, sigma_max)", narrowed),
    ("sigma_min: float = RAMP.sigma_min", "sigma_min: float = 0.2", likely),
    ("self.intervals(step) + 1)", "self.intervals(step))", doubling),
    ("last // first) + 1)", "last // first))", doubling),
    ("first: int = 10", "first: int = 5", doubling),
    ("last: int = 1280", "last: int = 640", doubling),
    ("normal_neighbours(batch.draw, path, grid, self.mean, self.std)", "neighbours(batch.draw, grid)", likely),
    ("mean: float = -1.1", "mean: float = 0.8", likely),
    ("std: float = 2.0", "std: float = 0.5", likely),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = f"{FAMILY}.ict"
    check(broken(module, old, old).ICT)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(module, old, new).ICT)
