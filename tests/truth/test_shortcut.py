"""Shortcut models: steps composed of the shortest are the fixed point, and off it the loss is typed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from contract.build import small_net
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.methods.consistency.shortcut import Shortcut
from onestroke.paths import Estimate, Flow
from onestroke.sampling import FewStep
from truth import tangent_checks as checks
from truth.checks import F64, close, make_path, parts
from truth.tangent_checks import M, S
from truth.test_mutants import broken


class Given(Draws):
    """Draws whose uniform numbers are given: longer, count, call, t."""

    def __init__(self, *uniforms, rows=4):
        super().__init__(0, 0, rows)
        self.uniforms = list(uniforms)

    def uniform(self, lo=0.0, hi=1.0):
        return torch.full((self.size,), self.uniforms.pop(0), dtype=F64)


class Linear(nn.Module):
    """On the straight path: a velocity u = p(t, s) x; without s, s = 0. Its shift moves every u."""

    def __init__(self, p, rows=4):
        super().__init__()
        self.p, self.shift = p, nn.Parameter(torch.zeros(rows, 2, dtype=F64))

    def forward(self, x, t, cond):
        t, s = t[:, None], (cond["s"] if "s" in cond else 0 * t)[:, None]
        u = self.p(t, s) * x + self.shift
        return Estimate(x - t * u, x + (1 - t) * u)


def composed(steps):
    """The factor of one step from t to s made of `steps`-ths of the way by Euler, on N(0, S^2): table of products."""
    t = torch.arange(1, steps + 1, dtype=F64) / steps
    factors = 1 - (t - (1 - t) * S**2) / (((1 - t) * S) ** 2 + t**2) / steps
    return torch.cat([torch.ones(1, dtype=F64), factors.cumprod(0)])


def made(cls, student, teacher=None, scale=1.0, steps_of_student=1, **options):
    path = Flow()
    net = small_net(path, "x0", "student")
    given = parts(path, teacher or checks.gauss(path), net, net, scale)
    few = FewStep(path, path.grid(steps_of_student))
    method = cls(replace(given, shape=(2,), few=few), **options)
    method.student = method.slow = student
    return method


@pytest.mark.parametrize("steps", [64, 128, 256])
def test_steps_composed_of_the_shortest_are_the_fixed_point_and_their_gain_is_true_to_one_of_them(steps):
    table = composed(steps)

    def p(t, s):
        i, j = ((u * steps).round().long() for u in (t, s))
        return (1 - table[i] / table[j]) / (t - s)

    student = Linear(p, rows=64)
    method = made(Shortcut, student, checks.gauss(Flow(), 0.0), grid=steps, share=0.5)
    for step in range(4):
        (turn,) = method.step(checks.batch(64, draw=Draws(0, step, 64)), 0)
        assert checks.pull(turn, student).abs().max() < 1e-9
    assert 0.1 < (table[-1] - S).abs() * steps < 2, "the gain of one step misses S by a step's order"


def by_hand(cls, longer=True, velocity="teacher", limit=4.0, call=0.0, **options):
    found = checks.batch(draw=Given(0.12 if longer else 0.13, 0.5, call, 0.6))
    student, average = Linear(lambda t, s: 0.5 + 0.3 * t - 0.2 * s), Linear(lambda t, s: 0.4 + 0.2 * t + 0.1 * s)
    method = made(cls, student, velocity=velocity, limit=limit, steps_of_student=2, **options)
    method.slow = average
    top = 0.5 if call > 0.5 else 1.0
    count, place = (8, 5) if longer else (128, 77)  # 2^floor(0.5 x 7), 1 + floor(0.6 x count)
    t, s, d = top * place / count, top * (place - 1) / count, top / count
    x = (1 - t) * found.x0 + t * found.noise
    one = (0.4 + 0.2 * t + 0.1 * (t - d / 2)) * x
    y = (x - d / 2 * one).clamp(-limit, limit)
    two = (0.4 + 0.2 * (t - d / 2) + 0.1 * s) * y
    want = ((one + two) / 2).clamp(-limit, limit)
    if not longer:
        mean = M + (1 - t) * S**2 / (((1 - t) * S) ** 2 + t**2) * (x - (1 - t) * M)
        want = (x - (1 - t) * mean) / t - mean if velocity == "teacher" else found.noise - found.x0
    (turn,) = method.step(found, 0)
    close(checks.pull(turn, student), 2 * ((0.5 + 0.3 * t - 0.2 * s) * x - want) / 8)
    assert turn.follow == {"slow": 0.999}


def every_part(cls):
    for call in (0.0, 0.7):
        by_hand(cls, call=call)
        by_hand(cls, longer=False, call=call)
        by_hand(cls, limit=0.2, call=call)
    by_hand(cls, longer=False, velocity="data")


def test_the_loss_is_the_published_one():
    every_part(Shortcut)


def guided_mean_is_w_m(cls, w=3.0):
    """Of the shortest steps: the velocity of N(w M, S^2)."""
    teacher, path = checks.Shifting(Flow()), Flow()
    for mean, zero in ((w * M, True), (M, False)):
        exact = checks.gauss(path, mean)
        student = Linear(None)
        student.forward = lambda x, t, cond, exact=exact, student=student: path.split(
            x, exact.path.join(*exact(x, t, cond)[:2], t, "flow") + student.shift, t, "flow"
        )
        method = made(cls, student, teacher, w)
        (turn,) = method.step(checks.batch(draw=Given(0.5, 0.5, 0.0, 0.6)), 0)
        assert (checks.pull(turn, student).abs().max() < 1e-9) == zero


def test_guided_the_mean_is_w_m():
    guided_mean_is_w_m(Shortcut)


def lengths(cls):
    """An eighth of the rows learn 1, 2, ..., 64 steps, each as likely, at whole steps; the others the 128th."""
    student = Linear(lambda t, s: 0 * t, rows=60_000)
    seen = []
    student.forward = lambda x, t, cond: seen.append((t, cond["s"])) or Estimate(x + student.shift, x)
    method = made(cls, student)
    list(method.step(checks.batch(60_000, draw=Draws(0, 0, 60_000)), 0))
    t, s = seen[-1]
    count = (1 / (t - s)).round()
    for n in (1, 2, 4, 8, 16, 32, 64):
        assert (count == n).double().mean().item() == pytest.approx(1 / 56, abs=5 * (1 / 56 / 60_000) ** 0.5)
    assert (count == 128).double().mean().item() == pytest.approx(7 / 8, abs=5 * (7 / 64 / 60_000) ** 0.5)
    places = t * count
    close(places, places.round())
    assert places.min() == 1
    assert (places == count).any()


def test_the_lengths_are_the_published_ones():
    lengths(Shortcut)


def begins_with_the_path(cls):
    path = make_path("vp")
    net = small_net(path, "x0", "student")
    method = cls(replace(parts(path, checks.gauss(path), net, net), shape=(2,)))
    a, b = (c.item() for c in path.ab(torch.tensor(path.t_min, dtype=F64)))
    assert method.flow.t_min == pytest.approx(b / (a + b))
    seen = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    list(method.step(checks.batch(draw=Given(0.5, 0.5, 0.0, 0.0)), 0))
    assert min(t.min() for t in seen) >= path.t_min - 1e-12


def test_before_the_path_begins_the_student_is_read_where_it_does():
    begins_with_the_path(Shortcut)


def test_the_number_of_steps_must_halve():
    with pytest.raises(InputError, match="grid=100 must be 2 doubled some times"):
        made(Shortcut, Linear(None), grid=100)
    with pytest.raises(InputError, match="unknown velocity 'datum'"):
        made(Shortcut, Linear(None), velocity="datum")


# ---- do the checks notice? -----------------------------------------------------------------------------------------

MUTANTS = [
    ("x - like(length / 2, x) * one", "x + like(length / 2, x) * one", every_part),
    ("x - like(length / 2, x) * one", "x - like(length, x) * one", every_part),
    (
        'self.says(self.slow, x, t, {**cond, "s": half})',
        'self.says(self.student, x, t, {**cond, "s": half})',
        every_part,
    ),
    (
        'self.says(self.slow, x, t, {**cond, "s": half})',
        'self.says(self.slow, x, t, {**cond, "s": s})',
        every_part,
    ),
    (
        'self.says(self.slow, y, half, {**cond, "s": s})',
        'self.says(self.slow, x, half, {**cond, "s": s})',
        every_part,
    ),
    (
        'self.says(self.slow, y, half, {**cond, "s": s})',
        'self.says(self.slow, y, t, {**cond, "s": s})',
        every_part,
    ),
    ("one).clamp(-self.limit, self.limit)", "one)", every_part),
    ("((one + two) / 2).clamp(-self.limit, self.limit)", "((one + two) / 2)", every_part),
    ("((one + two) / 2)", "(two)", every_part),
    ("v = batch.noise - x0", "v = x0 - batch.noise", every_part),
    ("share: float = 0.125", "share: float = 0.25", lengths),
    ("keep: float = 0.999", "keep: float = 0.99", every_part),
    ("self.grid.bit_length() - 1)", "self.grid.bit_length())", lengths),
    ("1 + (draw.uniform() * count).floor()", "(draw.uniform() * count).floor()", lengths),
    ("self.guide(self.teacher)", "self.teacher", guided_mean_is_w_m),
    (".clamp_min(self.flow.t_min)", "", begins_with_the_path),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    source = "onestroke.methods.consistency.shortcut"
    check(broken(source, old, old).Shortcut)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(source, old, new).Shortcut)
