"""MeanFlow and its improved loss: the exact average velocity is their fixed point; off it the loss is typed by hand."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from contract.build import small_net
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.methods.consistency.imf import IMF
from onestroke.methods.consistency.meanflow import MeanFlow
from onestroke.paths import EDM, Estimate, Flow, like
from onestroke.sampling import FewStep
from truth import tangent_checks as checks
from truth.checks import F64, close, labels, make_path, parts, tensor
from truth.tangent_checks import PATHS, M, S
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", PATHS)
both = pytest.mark.parametrize("cls", [MeanFlow, IMF])
PAIRS = (tensor(0.9, 0.5, 0.3, 0.999), tensor(0.0, 0.2, 0.3, 0.001))


class Straight(nn.Module):
    """A network whose velocity on the straight path is u(x, t, s), whatever its own path; without s, s = 0."""

    def __init__(self, path, rows=4, dim=2):
        super().__init__()
        self.path, self.shift = path, nn.Parameter(torch.zeros(rows, dim, dtype=F64))

    def forward(self, x, t, cond):
        a, b = (like(c, x) for c in self.path.ab(t))
        s = like(cond["s"], x) if "s" in cond else 0 * b
        t, x = b / (a + b), x / (a + b)
        u = self.u(x, t, s) + self.shift
        return Estimate(x - t * u, x + (1 - t) * u)


class Exact(Straight):
    """(x - the point of the flow of N(mean, S^2) at s) / (t - s); where t = s, its velocity."""

    mean = M

    def u(self, x, t, s):
        now, then = (((1 - u) * S) ** 2 + u**2 for u in (t, s))
        off, same = x - (1 - t) * self.mean, (t - s).abs() < 1e-9
        jump = (x - (1 - s) * self.mean - (then / now).sqrt() * off) / torch.where(same, 1.0, t - s)
        return torch.where(same, (t - (1 - t) * S**2) / now * off - self.mean, jump)


class Slope(Straight):
    """u = p x with p = 0.5 + 0.3 t - 0.2 s."""

    def u(self, x, t, s):
        return (0.5 + 0.3 * t - 0.2 * s) * x


def made(cls, path, student, teacher=None, scale=1.0, **options):
    net = small_net(path, "x0", "student")
    given = parts(path, teacher or checks.gauss(path), net, net, scale)
    method = cls(replace(given, shape=(2,)), **options)
    method.student = student
    return method


def pull(method, student, pair=PAIRS, batch=None):
    with mock.patch.object(type(method), "times", return_value=pair):
        (turn,) = method.step(batch or checks.batch(), 0)
    return checks.pull(turn, student)


@each
@both
@pytest.mark.parametrize("difference", [0.0, 1e-6])
def test_the_average_velocity_is_a_fixed_point(cls, name, difference):
    path = make_path(name)
    student = Exact(path)
    got = pull(made(cls, path, student, difference=difference, c=1.0), student)
    assert got.abs().max() < (1e-6 if difference else 1e-9)


@each
@both
def test_guided_the_mean_is_w_m(cls, name):
    path, w = make_path(name), 3.0
    for mean, zero in ((w * M, True), (M, False), ((w + 1) * M, False)):
        student = Exact(path)
        student.mean = mean
        got = pull(made(cls, path, student, checks.Shifting(path), w), student)
        assert (got.abs().max() < 1e-9) == zero


@each
def test_the_student_that_is_kept_jumps_to_the_data(name):
    """Without s, from the student's first input, and again from that noised anew."""
    path, noise = make_path(name), checks.batch().noise
    few = FewStep(path, path.grid(1))
    a, b = path.ab(few.time(0, noise))
    x, norm = few.input(noise), ((a * S) ** 2 + b**2).sqrt()
    close(few.sample(Exact(path), noise, labels(4)).detach(), M + S / norm[:, None] * (x - a[:, None] * M))


def loss_by_hand(cls, velocity="teacher", power=1.0, **options):
    path, found = Flow(), checks.batch()
    student, (t, s) = Slope(path), PAIRS
    got = pull(made(cls, path, student, velocity=velocity, power=power, **options), student, batch=found)
    t, s = t[:, None], s[:, None]
    x = (1 - t) * found.x0 + t * found.noise
    d = M + (1 - t) * S**2 / (((1 - t) * S) ** 2 + t**2) * (x - (1 - t) * M)
    v = found.noise - found.x0 if velocity == "data" else (x - (1 - t) * d) / t - d
    p = 0.5 + 0.3 * t - 0.2 * s
    own = (0.5 + 0.1 * t) * x
    improved = issubclass(cls, IMF) or cls.__name__ == "IMF"
    du = 0.3 * x + p * (own if improved else v)
    c = options.get("c", 0.01)
    want = 0
    for error in [p * x + (t - s) * du - v, own - v][: 2 if improved else 1]:
        want = want + 2 * error / (error.square().sum(1, keepdim=True) + c) ** power / 4
    close(got, want)


@both
@pytest.mark.parametrize("options", [{}, {"velocity": "data"}, {"power": 0.75, "c": 0.1}])
def test_the_loss_is_the_published_one(cls, options):
    loss_by_hand(cls, **options)


def test_an_unknown_velocity_is_refused():
    with pytest.raises(InputError, match=r"unknown velocity 'datum'\. Did you mean 'data'"):
        made(MeanFlow, Flow(), Slope(Flow()), velocity="datum")


# ---- times ---------------------------------------------------------------------------------------------------------


def times(cls, equal=0.75, rows=8000, **options):
    """The shares of s = t and of s = 0, and the moments of both logits; within five deviations."""
    method = made(cls, EDM(), Slope(EDM()), **options)
    t, s = method.times(Draws(0, 0, rows))
    assert (t >= s).all()
    assert (s == t).double().mean().item() == pytest.approx(equal, abs=2.5 / rows**0.5)
    jump = (1 - equal) * options.get("jump", 0.0)
    assert (s == 0).double().mean().item() == pytest.approx(jump, abs=2.5 / rows**0.5)
    method.equal = method.jump = 0.0
    both = torch.logit(torch.cat(method.times(Draws(0, 0, rows))))
    low, high = -0.4, -0.4
    if options.get("end_std"):
        low = options["end_mean"]
    assert both.mean().item() == pytest.approx((low + high) / 2, abs=5 / rows**0.5)
    if low == high:
        assert both.std().item() == pytest.approx(1, abs=5 / rows**0.5)


@pytest.mark.parametrize("options", [{}, {"jump": 0.5}, {"end_mean": -2.0, "end_std": 1.0}])
def test_the_times_are_the_published_ones(options):
    times(MeanFlow, **options)
    times(IMF, 0.5, **options)


# ---- do the checks notice? -----------------------------------------------------------------------------------------


def by_hand(cls):
    loss_by_hand(cls)
    loss_by_hand(cls, velocity="data")


def drawn(cls):
    times(cls, 0.5 if cls.__name__ == "IMF" else 0.75, jump=0.5)


def guided(cls):
    test_guided_the_mean_is_w_m(cls, "vp")


MUTANTS = [
    ("meanflow", "+ like(t - s, x) * du - v", "- like(t - s, x) * du - v", by_hand),
    ("meanflow", "+ like(t - s, x) * du - v", "+ du - v", by_hand),
    ("meanflow", "x, t, v, torch.ones_like(t)", "x, t, 0 * v, torch.ones_like(t)", by_hand),
    ("meanflow", "x, t, v, torch.ones_like(t)", "x, t, v, 0 * t", by_hand),
    ("meanflow", "square.detach() + self.c", "square + self.c", by_hand),
    ("meanflow", "square().flatten(1).sum(1)", "square().flatten(1).mean(1)", by_hand),
    ("meanflow", "c: float = 0.01", "c: float = 0.001", by_hand),
    ("meanflow", "v = batch.noise - batch.x0", "v = batch.x0 - batch.noise", by_hand),
    ("meanflow", "self.guide(self.teacher)", "self.teacher", guided),
    ("meanflow", "mean: float = -0.4", "mean: float = 0.0", drawn),
    ("meanflow", "equal: float = 0.75", "equal: float = 0.5", drawn),
    ("meanflow", "one.maximum(two), one.minimum(two)", "one, two", drawn),
    ("meanflow", "u < self.equal, t, far", "u < self.equal, t, s", drawn),
    ("imf", "own.detach(), torch", "v, torch", by_hand),
    ("imf", "own.detach(), torch", "own.detach(), 0 * torch", by_hand),
    ("imf", "self.adaptive(own - v)", "0 * self.adaptive(own - v)", by_hand),
    ("imf", "self.average(x, t, t, cond)", "self.average(x, t, s, cond)", by_hand),
    ("imf", "c: float = 0.01", "c: float = 0.001", by_hand),
    ("imf", "equal: float = 0.5", "equal: float = 0.75", drawn),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(name, old, new, check):
    source, cls = f"onestroke.methods.consistency.{name}", {"meanflow": "MeanFlow", "imf": "IMF"}[name]
    check(getattr(broken(source, old, old), cls))
    with pytest.raises((AssertionError, RuntimeError)):
        check(getattr(broken(source, old, new), cls))
