"""Consistency distillation: its loss typed by hand, the exact function at rest, and the gains of N levels."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.consistency.cd import CD
from onestroke.paths import EDM
from truth import consistency_checks as checks
from truth.checks import Given, close, labels, make_path, two_class_eps, two_classes
from truth.consistency_checks import FAMILY, Drawn, Levels, Line, S
from truth.test_mutants import broken


def by_hand(cls, name="vp", distance="l2"):
    assert checks.loss_is_by_hand(cls, name, distance, scheme="euler") == {"slow": 0.95}


@pytest.mark.parametrize("distance", ["l2", "l1", "huber"])
@pytest.mark.parametrize("name", checks.NAMES)
def test_the_loss_is_the_one_typed_by_hand(name, distance):
    by_hand(CD, name, distance)


def moved(method, exact):
    return mock.patch.object(method, "move", exact)


def rests(cls, name="vp"):
    checks.exact_is_a_fixed_point(cls, name, moved)


@pytest.mark.parametrize("name", checks.NAMES)
def test_the_exact_function_is_a_fixed_point(name):
    rests(CD, name)


def published_gains(cls, scheme="heun", count=18, ratio=1.05528):
    """The optimum of the method's loss on the published grid, over the exact map: sheet 2."""
    path = EDM()
    grid = checks.ladder(path, count)
    method = checks.made(cls, path, Levels(path, grid), 0.0, levels=count, scheme=scheme)
    line = checks.solved(method, path, grid)
    assert checks.ratio(path, line) == pytest.approx(ratio, abs=6e-5 if scheme == "euler" else 6e-6)
    if scheme == "euler":
        close(line[1:, 0], checks.gains(path, grid)[1:])
    close(line[:, 1], torch.zeros(count), atol=1e-9)
    return method


@pytest.mark.parametrize(
    ("scheme", "count", "ratio"),
    [
        ("euler", 18, 0.8461),
        ("euler", 40, 0.9297),
        ("heun", 18, 1.05528),
        ("heun", 40, 1.00978),
        ("heun", 200, 1.00036),
    ],
)
def test_the_gains_of_n_levels_are_the_published_ones(scheme, count, ratio):
    method = published_gains(CD, scheme, count, ratio)
    assert len(method.grid) == count


def test_more_levels_come_nearer_to_the_truth():
    """The loss of the exact function is that of the solver's error alone: of Heun's second order, 16-fold in the step's
    third power."""
    path, e = EDM(), torch.randn(400, 1, generator=torch.Generator().manual_seed(43), dtype=torch.float64)
    found = []
    for count in (100, 400):
        method = checks.made(CD, path, checks.Exact(path), levels=count)
        draw = Drawn((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
        (turn,) = method.step(Batch(e, labels(400), draw, checks.M + S * e.flip(0)), 0)
        found.append(sum(turn.terms.values()).item() ** 0.5)
    assert found[1] < found[0] / 16
    assert found[1] < 1e-4


def guided(cls):
    """The teacher moves under guidance, the student and its average are asked for the class alone."""
    path, t, s, scale = make_path("vp"), 0.7, 0.6, 4.5
    method = checks.made(cls, path, Line(path, 0.7, 0.2), scale=scale, teacher=two_classes(path, 0.9, 0.5),
                         scheme="euler")  # fmt: skip
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(44), dtype=torch.float64)
    with checks.pair(t, s):
        (turn,) = method.step(Batch(e, labels(6, 0), Given(e), z), 0)
    (a, b), (c, d) = checks.hand_ab("vp", t), checks.hand_ab("vp", s)
    x = a * z + b * e
    null, cond = (two_class_eps(x, a, b, 0.9, 0.5, label) for label in (-1, 0))
    eps = null + scale * (cond - null)
    lower = c * (x - b * eps) / a + d * eps
    close(turn.terms["consistency"], ((0.7 * x + 0.2 * t - 0.7 * lower - 0.2 * s) ** 2).mean())


def test_the_teacher_is_guided():
    guided(CD)


def test_a_table_holds_fewer_levels():
    """Near the data the ramp is finer than a table: every time once, from end to end."""
    method = checks.made(CD, make_path("table"), Line(make_path("table"), 0.7, 0.2), levels=200)
    assert 100 < len(method.grid) < 200
    close(method.grid, (method.grid * 999).round() / 999)
    assert (method.grid.diff() > 0.5 / 999).all()
    assert (method.grid[0], method.grid[-1]) == (0, 1)


def test_what_does_not_exist_is_refused():
    path = make_path("vp")
    with pytest.raises(InputError, match="unknown scheme 'huen'"):
        checks.made(CD, path, Line(path, 1.0, 0.0), scheme="huen")
    with pytest.raises(InputError, match="unknown distance 'lpips'"):
        checks.made(CD, path, Line(path, 1.0, 0.0), distance="lpips")


def neighbours(cls):
    checks.pairs_are_neighbours(cls, levels=5)


def test_pairs_are_neighbours_on_the_ramp():
    neighbours(CD)


def published_default(cls):
    assert checks.made(cls, EDM(), Line(EDM(), 0.7, 0.2)).move.__name__ == "heun"
    assert len(checks.made(cls, EDM(), Line(EDM(), 0.7, 0.2)).grid) == 40


MUTANTS = [
    ("x, t, s, cond)\n", "x, s, t, cond)\n", by_hand),
    ("lower, s, cond)", "lower, t, cond)", by_hand),
    ("terms.endpoint(self.slow", "terms.endpoint(self.student", by_hand),
    ("self.student(x, t, cond).x0 - target", "self.student(x, s, cond).x0 - target", by_hand),
    ("self.path.mix(batch.x0, batch.noise, t)", "self.path.mix(batch.noise, batch.x0, t)", by_hand),
    ("keep: float = 0.95", "keep: float = 0.99", by_hand),
    ('follow={"slow": self.keep}', "follow={}", by_hand),
    ("self.guide(self.teacher)", "self.teacher", guided),
    ('scheme: str = "heun"', 'scheme: str = "euler"', published_default),
    ("batch.draw, self.grid)", "batch.draw, self.grid[1:])", neighbours),
    ("batch.draw, self.grid)", "batch.draw, self.grid, 2)", neighbours),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = f"{FAMILY}.cd"
    check(broken(module, old, old).CD)
    with pytest.raises(AssertionError):
        check(broken(module, old, new).CD)
