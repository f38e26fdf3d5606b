"""Latent consistency models: the loss typed by hand, guidance in its own convention, the gains of the grid of 50."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch

from contract.build import batch, build
from onestroke.denoiser import TwoTimes
from onestroke.method import Batch
from onestroke.methods.consistency.lcm import LCM
from truth import consistency_checks as checks
from truth.checks import F64, close, labels, make_path, tensor
from truth.consistency_checks import FAMILY, Levels, M, S
from truth.segment_checks import Classes
from truth.test_mutants import broken

W = 3.0


def by_hand(cls, name="vp"):
    assert checks.loss_is_by_hand(cls, name, "huber", told=False, embed=False) == {"slow": 0.95}


@pytest.mark.parametrize("name", checks.NAMES)
def test_the_loss_is_the_one_typed_by_hand(name):
    by_hand(LCM, name)


@pytest.mark.parametrize("name", checks.NAMES)
def test_the_exact_function_is_a_fixed_point(name):
    moves = lambda method, exact: mock.patch(f"{FAMILY}.lcm.euler", exact)  # noqa: E731
    checks.exact_is_a_fixed_point(LCM, name, moves, embed=False, distance="l2")


@pytest.mark.parametrize("name", ["table", "vp", "edm", "flow"])
def test_the_gain_is_that_of_50_steps(name):
    """Sheet 4.4: the product of DDIM's gains from the state at the data end, whose signal the table keeps below 1."""
    path = make_path(name)
    method = checks.made(LCM, path, Levels(path, path.snap(tensor(0.0, *reversed(path.grid(50))))), 0.0, embed=False,
                         distance="l2")  # fmt: skip
    assert len(method.grid) == 51
    close(checks.solved(method, path, method.grid)[1:, 0], checks.gains(path, method.grid)[1:])


def neighbours(cls):
    checks.pairs_are_neighbours(cls, grid=4, embed=False)


def test_pairs_are_neighbours_on_the_grid():
    neighbours(LCM)


def guided_mean(cls, **options):
    checks.guided_mean_is_w_m(cls, w=W, spread=0.0, **options)


def test_a_guided_student_has_the_guided_mean():
    guided_mean(LCM, embed=False)


class Told(torch.nn.Module):
    """x0 = gain x + side: a student that says what guidance it is told."""

    def __init__(self, path):
        super().__init__()
        self.path, self.gain = path, torch.nn.Parameter(tensor(0.7))

    def forward(self, x, t, cond):
        return self.path.split(x, self.gain * x + cond["s"][:, None], t, "x0")


def told(cls):
    """Of side = 2 u - 1 the teacher's guidance is 1 + (W - 1) (1 + side / 2); student and average are told the side."""
    path, t, s = make_path("vp"), 0.7, 0.6
    method = checks.made(cls, path, Told(path), scale=W, teacher=Classes(path, M), embed=False, distance="l2")
    method.embed = True
    method.slow.gain.data.fill_(0.4)
    u = tensor(0.0, 0.2, 0.5, 0.9)
    z, e = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(48), dtype=F64)
    x0, side = M + S * z, (2 * u - 1)[:, None]
    with checks.pair(t, s):
        (turn,) = method.step(Batch(e, labels(4, 0), checks.Drawn(u, e), x0), 0)
    a, b = checks.hand_ab("vp", t)
    x = a * x0 + b * e
    lower = checks.ddim("vp", t, s, x, mean=(1 + (W - 1) * (1 + 0.5 * side)) * M)
    close(turn.terms["consistency"], ((0.7 * x + side - 0.4 * lower - side) ** 2).mean())


def test_the_student_is_told_the_guidance():
    told(LCM)


def test_what_is_kept_is_the_student_of_the_runs_guidance():
    """In the middle of the range nothing is told; at its ends the time embedding is another."""
    method = build("lcm", guidance=W)
    assert isinstance(method.student, TwoTimes)
    torch.nn.init.normal_(method.student.shift.weight)
    b, t = batch(), torch.full((8,), 0.5, dtype=F64)
    plain = method.student(b.noise, t, b.cond).x0
    assert torch.equal(method.student(b.noise, t, {**b.cond, "s": 0 * t}).x0, plain)
    for side in (-1.0, 1.0):
        assert (method.student(b.noise, t, {**b.cond, "s": side + 0 * t}).x0 - plain).abs().min() > 1e-4


def test_without_guidance_none_is_drawn():
    """At guidance_scale 1 the teacher is called once per row, whatever the spread."""
    method, calls = build("lcm", guidance=1.0), []
    method.teacher.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    list(method.step(batch(), 0))
    assert calls == [8]


MUTANTS = [
    ("self.guide(self.teacher, scale)", "self.guide(self.teacher)", told),
    ("spread: float = 0.5", "spread: float = 0.6", told),
    ("terms.endpoint(self.slow, self.path, lower, s, cond)", "self.slow(lower, s, cond).x0", by_hand),
    ("terms.endpoint(self.slow", "terms.endpoint(self.student", by_hand),
    ("self.path, x, t, s, batch.cond", "self.path, x, s, t, batch.cond", by_hand),
    ('distance: str = "huber"', 'distance: str = "l2"', by_hand),
    ("keep: float = 0.95", "keep: float = 0.9", by_hand),
    ("batch.draw, self.grid)", "batch.draw, self.grid[1:])", neighbours),
    ("batch.draw, self.grid)", "batch.draw, self.grid, 2)", neighbours),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = f"{FAMILY}.lcm"
    check(broken(module, old, old).LCM)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(module, old, new).LCM)


@pytest.mark.parametrize(
    ("new", "check"),
    [("scale * (1 + spread * side)", told), ("1 + scale * (1 + spread * side)", partial(guided_mean, embed=False))],
    ids=["told", "mean"],
)
def test_the_check_fails_on_another_guidance(new, check):
    old = "1 + (scale - 1) * (1 + spread * side)"
    with mock.patch(f"{FAMILY}.lcm.guidances", broken("onestroke.denoiser", old, new).guidances):
        with pytest.raises(AssertionError):
            check(LCM)
