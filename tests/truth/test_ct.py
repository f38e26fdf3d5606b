"""Consistency training: its loss typed by hand, the optimum of distillation by DDIM, and its two schedules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.consistency.cd import CD
from onestroke.methods.consistency.ct import CT
from onestroke.paths import EDM
from onestroke.sampling import FewStep
from truth import consistency_checks as checks
from truth.checks import close, hand_ab, labels, make_path, parts
from truth.consistency_checks import FAMILY, Drawn, Levels, Line
from truth.test_mutants import broken


def by_hand(cls, name="vp", distance="l2"):
    """At round 0 one interval: the average keeps keep^2 of itself."""
    assert checks.loss_is_by_hand(cls, name, distance, move=None)["slow"] == pytest.approx(0.95**2)


@pytest.mark.parametrize("distance", ["l2", "huber"])
@pytest.mark.parametrize("name", checks.NAMES)
def test_the_loss_is_the_one_typed_by_hand(name, distance):
    by_hand(CT, name, distance)


@pytest.mark.parametrize("name", ["edm", "vp", "flow"])
def test_the_optimum_is_that_of_distillation_by_ddim(name):
    """Sheet 2: shared noise regresses x_s on x_t with DDIM's gain. Both optima, each by its own loss."""
    path, count = make_path(name), 12
    grid = checks.ladder(path, count)
    training = checks.made(CT, path, Levels(path, grid), 0.0, last=count - 1, growth=1)
    distilled = checks.made(CD, path, Levels(path, grid), 0.0, levels=count, scheme="euler")
    line = checks.solved(training, path, grid, step=1)
    close(line, checks.solved(distilled, path, grid), atol=1e-9)
    close(line[1:, 0], checks.gains(path, grid)[1:])


@pytest.mark.parametrize(("count", "ratio"), [(18, 0.8461), (40, 0.9297), (200, 0.98582)])
def test_the_gains_of_n_levels_are_the_published_ones(count, ratio):
    path = EDM()
    grid = checks.ladder(path, count)
    method = checks.made(CT, path, Levels(path, grid), 0.0, last=count - 1, growth=1)
    assert checks.ratio(path, checks.solved(method, path, grid, step=1)) == pytest.approx(ratio, abs=6e-5)


def schedules(cls, rounds=600_000):
    """Published: N - 1 = ceil(sqrt(k / K (151^2 - 4) + 4) - 1), mu = exp(2 log 0.95 / (N - 1)), by hand at some k."""
    path = EDM()
    given = replace(parts(path, None, Line(path, 1.0, 0.0), None), rounds=rounds, few=FewStep(path))
    method = cls(given)
    for k in (0, 1, 1000, rounds // 2, rounds - 1, rounds, 2 * rounds):
        part = min(k / rounds, 1)
        want = max(1, math.ceil(math.sqrt(part * (151**2 - 2**2) + 2**2) - 1))
        assert method.intervals(k) == want
        batch = Batch(torch.zeros(1, 1), labels(1), Drawn(torch.zeros(1)), torch.zeros(1, 1))
        (turn,) = method.step(batch, k)
        assert turn.follow["slow"] == pytest.approx(math.exp(2 * math.log(0.95) / want))
    assert (method.intervals(0), method.intervals(rounds)) == (1, 150)
    counts = [method.intervals(k) for k in range(0, rounds, rounds // 500)]
    assert counts == sorted(counts)


def test_the_published_schedules():
    schedules(CT)


def neighbours(cls):
    """The pair is one of the ramp's N at that round; s is below t."""
    path = EDM()
    method = checks.made(cls, path, Line(path, 0.7, 0.2), last=4, growth=1)
    seen = []
    method.student.forward = lambda x, t, cond: seen.append(t) or Line.forward(method.student, x, t, cond)
    method.slow.forward = lambda x, t, cond: seen.append(t) or Line.forward(method.slow, x, t, cond)
    e = torch.zeros(4, 1, dtype=torch.float64)
    list(method.step(Batch(e, labels(4), Drawn((torch.arange(4) + 0.5) / 4), e), 1))
    upper, lower = seen
    grid = checks.ladder(path, 5)
    assert upper.tolist() == grid[1:].tolist()
    assert lower.tolist() == grid[:-1].tolist()
    assert hand_ab("edm", upper[-1].item())[1] == pytest.approx(80)


def test_pairs_are_neighbours_on_the_ramp():
    neighbours(CT)


def narrowed(cls):
    checks.ramp_is_narrowed(checks.made(cls, EDM(), Line(EDM(), 0.7, 0.2), sigma_min=0.2, sigma_max=50.0))


def test_a_narrower_ramp():
    narrowed(CT)


@pytest.mark.parametrize("ends", [(3.0, 2.0), (100.0, 200.0), (1e-5, 1e-4)])
def test_a_ramp_that_the_path_does_not_cross(ends):
    with pytest.raises(InputError, match="no noise level of the teacher's path is between"):
        checks.made(CT, EDM(), Line(EDM(), 0.7, 0.2), sigma_min=ends[0], sigma_max=ends[1])


MUTANTS = [
    ("terms.endpoint(self.slow", "terms.endpoint(self.student", by_hand),
    ("self.path, lower, s, cond)", "self.path, lower, t, cond)", by_hand),
    ("for u in (t, s))", "for u in (s, t))", by_hand),
    ("keep: float = 0.95", "keep: float = 0.9", schedules),
    ("self.keep ** (self.first / count)", "self.keep ** (self.first / (count + 1))", schedules),
    ("first: int = 2", "first: int = 3", schedules),
    ("last: int = 150", "last: int = 200", schedules),
    ("math.sqrt(grown) - 1", "math.sqrt(grown)", schedules),
    ("growth or parts.rounds", "growth or 1", schedules),
    ("count + 1))", "count + 2))", neighbours),
    ("parts.path, sigma_min, sigma_max)", "parts.path, RAMP.sigma_min, sigma_max)", narrowed),
    ("sigma_max: float = RAMP.sigma_max", "sigma_max: float = 40.0", neighbours),
    ("sigma_min: float = RAMP.sigma_min", "sigma_min: float = 0.2", neighbours),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = f"{FAMILY}.ct"
    check(broken(module, old, old).CT)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(module, old, new).CT)
