"""SLAM: the points of the sub-path and their noise, and latent consistency at its noisy end."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from onestroke.method import Batch
from onestroke.methods.consistency.lcm import LCM
from onestroke.methods.consistency.slam import SLAM
from truth import consistency_checks as checks
from truth.checks import F64, close, hand_ab, labels, make_path, tensor
from truth.consistency_checks import FAMILY, Drawn, Exact, Line, M, S
from truth.test_mutants import broken

T, U = 0.7, 0.6


def samples(rows=4):
    z, e = torch.randn(2, rows, 1, generator=torch.Generator().manual_seed(49), dtype=F64)
    return M + S * z, e


def chord(cls, name="vp"):
    """Of a x0 + b e at both ends the point between is a' x0 + b' e at its own time, to rounding, whatever x0 and e."""
    path, (x0, e) = make_path(name), samples()
    g, t, s = tensor(0.0, 0.3, 0.8, 1.0), tensor(T).expand(4), tensor(U).expand(4)
    (a, b), (c, d) = hand_ab(name, T), hand_ab(name, U)
    got, now = checks.made(cls, path, Line(path, 0.7, 0.2)).between(a * x0 + b * e, t, c * x0 + d * e, s, g)
    for i in range(4):
        at_now = hand_ab(name, now[i].item())
        assert at_now[1] / at_now[0] == pytest.approx(g[i].item() * b / a + (1 - g[i].item()) * d / c, rel=1e-6)
        close(got[i], at_now[0] * x0[i] + at_now[1] * e[i], 1e-6)


@pytest.mark.parametrize("name", ["vp", "table", "trig", "edm", "flow"])
def test_the_points_between_are_on_the_path(name):
    chord(SLAM, name)


def test_the_level_is_the_published_one_at_both_ends():
    """sigma_g^2 = (sigma_s alpha_t / alpha_s)^2 + g^2 (1 - (alpha_t / alpha_s)^2), sheet 4.9, over alpha_t."""
    path = make_path("table")
    (a, _), (c, d) = (path.ab(tensor(v)) for v in (T, U))
    for g in (0.0, 1.0):
        x, ones = torch.ones(1, 1, dtype=F64), tensor(g)
        now = checks.made(SLAM, path, Line(path, 0.7, 0.2)).between(x, tensor(T), x, tensor(U), ones)[1]
        sigma = ((d * a / c) ** 2 + g**2 * (1 - (a / c) ** 2)).sqrt()
        close((-path.log_snr(now)).exp(), sigma / a, 1e-7)


@pytest.mark.parametrize("name", checks.NAMES)
def test_the_ends_of_the_sub_path_are_its_states(name):
    path, (x, lower) = make_path(name), samples()
    for t in (path.t_max, 0.3):
        t, s = (path.snap(tensor(v)).expand(4) for v in (t, 0.2))
        method = checks.made(SLAM, path, Line(path, 0.7, 0.2))
        got, now = method.between(x, t, lower, s, tensor(1.0).expand(4))
        assert torch.equal(got, x)
        assert torch.equal(now, t)
        if path.ab(t[:1])[0] > 1e-9:
            got, now = method.between(x, t, lower, s, tensor(0.0).expand(4))
            close(got, lower, 1e-6)
            close(now, s, 1e-6)


def by_hand(cls, g=0.3):
    """huber of f(x_g, t_g) - what the average says of x_s, which at the data end is x_s / a_s; EDM, all typed."""
    path, (x0, e) = make_path("edm"), samples(6)
    for t, s, first in ((T, U, 0.0), (0.05, 0.0, 0.0), (0.05, 0.0, 0.04)):
        path = replace(path, t_min=first)  # the student is not asked before it
        student = Line(path, 0.7, 0.2)
        method = checks.made(cls, path, student)
        method.slow.gain.data.fill_(0.4)
        with checks.pair(t, s):
            (turn,) = method.step(Batch(e, labels(6), Drawn(tensor(g).expand(6), e), x0), 0)
        (_, b), (_, d) = hand_ab("edm", t), hand_ab("edm", s)
        x = x0 + b * e
        lower = checks.ddim("edm", t, s, x)
        rho = g * b + (1 - g) * d
        now = (rho ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
        now = max(now, first)
        target = lower if s == 0 else 0.4 * lower + 0.2 * s
        error = 0.7 * (g * x + (1 - g) * lower) + 0.2 * now - target
        close(turn.terms["consistency"], ((error**2 + 1e-6).sqrt() - 1e-3).mean())
        assert turn.follow == {"slow": 0.95}


def test_the_loss_is_the_one_typed_by_hand():
    by_hand(SLAM)


@pytest.mark.parametrize("name", checks.NAMES)
def test_at_the_noisy_end_it_is_latent_consistency(name):
    """g = 1: the loss and its gradient are those of LCM under one guidance, to the bit."""
    path, (x0, e), found = make_path(name), samples(6), []
    for cls, options in ((SLAM, {}), (LCM, {"embed": False, "spread": 0.0})):
        student = Line(path, 0.7, 0.2)
        method = checks.made(cls, path, student, **options)
        with checks.pair(path.snap(tensor(T)).item(), path.snap(tensor(U)).item()):
            (turn,) = method.step(Batch(e, labels(6), Drawn(torch.ones(6, dtype=F64), e), x0), 0)
        found.append((turn.terms["consistency"], *torch.autograd.grad(turn.terms["consistency"], student.gain)))
    assert found[0] == found[1]


def neighbours(cls):
    checks.pairs_are_neighbours(cls, grid=4)


def test_pairs_are_neighbours_on_the_grid():
    neighbours(SLAM)


def guided_mean(cls):
    """At g = 1, where a student of a grid of times can say everything."""
    checks.guided_mean_is_w_m(cls)


def test_a_guided_student_has_the_guided_mean():
    guided_mean(SLAM)


def without_signal(cls):
    """From the noise end of a path that has no signal there, or rounding alone, g is 1, whatever is drawn."""
    for name in ("flow", "trig", "table0"):
        path, (x0, e), found = make_path(name), samples(6), []
        for g in (0.3, 1.0):
            method = checks.made(cls, path, Line(path, 0.7, 0.2))
            with checks.pair(path.t_max, path.snap(tensor(U)).item()):
                (turn,) = method.step(Batch(e, labels(6), Drawn(tensor(g).expand(6), e), x0), 0)
            found.append(turn.terms["consistency"])
        assert found[0] == found[1]


def test_where_there_is_no_signal_it_starts_at_the_noisy_end():
    without_signal(SLAM)


@pytest.mark.parametrize("name", checks.NAMES)
def test_the_exact_function_is_a_fixed_point(name):
    """At both ends of an exact step to rounding; between, up to the bend of the trajectory: the third power of a half
    step against its own length."""
    path, (x0, e) = make_path(name), samples(6)

    def exact(net, path, x, t, s, cond):
        (a, b), (c, d) = (path.ab(u[:1]) for u in (t, s))
        return c * M + ((c**2 * S**2 + d**2) / (a**2 * S**2 + b**2)).sqrt() * (x - a * M)

    def loss(g, step):
        method = checks.made(SLAM, path, Exact(path), distance="l2")
        with checks.pair(0.5, 0.5 - step), mock.patch(f"{FAMILY}.slam.euler", exact):
            (turn,) = method.step(Batch(e, labels(6), Drawn(tensor(g).expand(6), e), x0), 0)
        return turn.terms["consistency"].item() ** 0.5

    assert loss(1.0, 0.05) < 1e-10
    assert loss(0.0, 0.05) < 1e-7  # at a time that was found by inverting the path
    for g in (0.3, 0.5, 0.8):
        assert loss(g, 0.01) < loss(g, 0.04) / 10


MUTANTS = [
    ("low.lerp(high, g)", "high.lerp(low, g)", chord),
    ("g * a / at_t), x)", "g), x)", chord),
    ("like((1 - g) * a / at_s, x)", "like((1 - g) * a / at_t, x)", chord),
    ("self.path, x, t, s, cond)", "self.path, x, s, t, cond)", by_hand),
    ("self.slow, self.path, lower, s,", "self.student, self.path, lower, s,", by_hand),
    ("self.student(x, now.clamp_min(self.path.t_min),", "self.student(x, t,", by_hand),
    ("now.clamp_min(self.path.t_min)", "now", by_hand),
    ("keep: float = 0.95", "keep: float = 0.9", by_hand),
    ("batch.draw, self.grid)", "batch.draw, self.grid[1:])", neighbours),
    ("batch.draw, self.grid)", "batch.draw, self.grid, 2)", neighbours),
    ("-self.path.log_snr(t) <= math.log(NOISIEST)", "self.path.ab(t)[0] > 0", without_signal),
    ("self.guide(self.teacher)", "self.teacher", guided_mean),
    ("self.guide(self.teacher)", "self.guide(self.teacher, 4.0)", guided_mean),
    ("self.guide(self.teacher)", "self.guide(self.teacher, 2.0)", guided_mean),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = f"{FAMILY}.slam"
    check(broken(module, old, old).SLAM)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(module, old, new).SLAM)
