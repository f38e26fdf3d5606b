"""Truths of the methods on pairs: a Gaussian teacher N(M, S^2), whose map from noise is M + S z, and a 1-D mixture."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from onestroke.method import Batch, Pairs
from onestroke.paths import Estimate, like
from onestroke.sampling import FewStep
from onestroke.teachers.gaussian import GaussianMixture
from truth.checks import F64, Given, T, close, hand_ab, labels, make_path, parts, tensor

M, S = 0.3, 0.5
PATHS = ("vp", "edm", "flow", "trig", "trig half", "table", "table0")


def at(t=T, **law):
    """Every time that a method draws is t; `law`, where it is given, is what it asks of them by name."""

    def fixed(draw, *args, **kwargs):
        assert law in ({}, kwargs)
        return torch.as_tensor(t, dtype=F64).expand(draw.size)

    return mock.patch.multiple("onestroke.times", uniform=fixed, straight=fixed)


def end_of(path):
    """(a, b, hypot) at the noise end, typed where a path has it exactly."""
    a, b = (c.item() for c in path.ab(tensor(path.t_max)))
    return a, b, (a**2 + b**2) ** 0.5


def implied(path, z, x0):
    """The eps with which x0 mixes to the student's first input hypot(a, b) z at the noise end."""
    a, b, norm = end_of(path)
    return (norm * z - a * x0) / b


class Slope(nn.Module):
    """A student whose x0 is mu + s z wherever it is called on the straight line from that to its input from z.

    At mu = M, s = S it is what reflow of the Gaussian coupling converges to.
    """

    def __init__(self, path, mu=M, s=S):
        super().__init__()
        self.path, self.mu, self.s = path, nn.Parameter(tensor(mu)), nn.Parameter(tensor(s))

    def forward(self, x, t, cond):
        a1, b1, norm = end_of(self.path)
        a, b = (like(c, x) for c in self.path.ab(t))
        rest = a - b * a1 / b1
        z = (x - rest * self.mu) / (rest * self.s + b * norm / b1)
        x0 = self.mu + self.s * z
        return Estimate(x0, (x - a * x0) / b)


class Shifted(nn.Module):
    """A student that answers x0 = `x0` + shift whatever it sees, and remembers it."""

    def __init__(self, path, shift):
        super().__init__()
        self.path, self.shift, self.x0 = path, nn.Parameter(tensor(shift)), None

    def forward(self, x, t, cond):
        self.seen = x, t
        x0 = self.x0 + self.shift
        return self.path.split(x, x0, t, "x0")


class Monotone(nn.Module):
    """As Slope, for any increasing map from noise to data: z is found by bisection."""

    def __init__(self, path, curve):
        super().__init__()
        self.path, self.curve = path, curve

    def forward(self, x, t, cond):
        a, b = (like(c, x) for c in self.path.ab(t))
        lo, hi = torch.full_like(x, -12), torch.full_like(x, 12)
        for _ in range(60):
            z = (lo + hi) / 2
            small = a * self.curve(z) + b * implied(self.path, z, self.curve(z)) < x
            lo, hi = torch.where(small, z, lo), torch.where(small, hi, z)
        x0 = self.curve(lo)
        return Estimate(x0, (x - a * x0) / b)


def quantiles(z):
    """F^-1 of the equal mixture N(-1, 0.3^2), N(1, 0.3^2) at the normal's CDF of z: the flow's map in 1-D."""
    u, (lo, hi) = torch.special.ndtr(z), (torch.full_like(z, -6), torch.full_like(z, 6))
    for _ in range(60):
        x = (lo + hi) / 2
        below = (torch.special.ndtr((x + 1) / 0.3) + torch.special.ndtr((x - 1) / 0.3)) / 2 < u
        lo, hi = torch.where(below, x, lo), torch.where(below, hi, x)
    return lo


def two_modes(path):
    return GaussianMixture(path, tensor([-1.0], [1.0]), 0.3)


def noise(rows=8, dim=1, seed=20):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=F64)


def batch(z, x0=None, fresh=None, draw=None):
    """A batch of pairs (z, x0), M + S z where x0 is absent, with fresh noise and draws."""
    x0 = M + S * z if x0 is None else x0
    return Batch(z if fresh is None else fresh, labels(len(z)), draw or Given(z), x0, Pairs(z, x0))


def losses(method, batch, step=0):
    (turn,) = method.step(batch, step)
    assert turn.player == "student"
    return turn.terms


def build(cls, path, student, teacher=None, scale=1.0, **options):
    """The method; `teacher` only has to be there."""
    return cls(parts(path, teacher or GaussianMixture(path, tensor([M]), S), student, None, scale), **options)


def straightens(cls, rounds):
    """Of a run of 1000, so many rounds are reflow, whose times are 0.001 or more; then it distils."""
    path, z = make_path("vp"), noise()
    method = build(cls, path, Slope(path))
    for step, reflow in ((rounds - 1, True), (rounds, False)):
        with at(T, lo=0.001):
            assert ("flow" in losses(method, batch(z), step)) == reflow
    return method


def reflow_is_exact_on_a_gaussian(cls, path, **options):
    """Straightness 0 at every time, and the one call is the teacher's map."""
    student, z = Slope(path), noise()
    method = build(cls, path, student, **options)
    for t in (0.05, T, 0.9):
        with at(t):
            loss = sum(losses(method, batch(z)).values())
        assert loss < 1e-20
    close(FewStep(path, path.grid(1)).sample(student, z, labels(8)), M + S * z)


def reflow_is_exact_in_one_dimension(cls, path):
    """Maps of 1-D flows increase, so the straight lines do not cross: the loss vanishes at the straightened flow."""
    student, z = Monotone(path, quantiles), torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    method = build(cls, path, student, two_modes(path))
    for t in (0.1, T, 0.9):
        with at(t):
            assert sum(losses(method, batch(z, quantiles(z))).values()) < 1e-16
    close(FewStep(path, path.grid(1)).sample(student, z, labels(9)), quantiles(z), 1e-9)


def velocity_error(path, name, student, z, x0, t):
    """mean ((eps - x0) of the student at t - (eps - x0) of the pair)^2, with (a, b) typed by hand."""
    a, b = hand_ab(name, t)
    eps = implied(path, z, x0)
    est = student(a * x0 + b * eps, torch.full((len(z),), t, dtype=F64), labels(len(z)))
    return ((est.eps - est.x0) - (eps - x0)).square().mean()


def loss_is_the_velocity_error(cls, path, name, t=T, key="flow", **options):
    """Off the truth, value and gradient."""
    student, z = Slope(path, 0.7, 0.9), noise()
    x0 = M + S * z + 0.2 * z.sin()
    method = build(cls, path, student, **options)
    with at(t):
        got = losses(method, batch(z, x0))[key]
    want = velocity_error(path, name, student, z, x0, t)
    close(got, want)
    wanted = torch.autograd.grad(want, [student.mu, student.s])
    for one, other in zip(torch.autograd.grad(got, [student.mu, student.s]), wanted, strict=True):
        close(one, other)
        assert one.abs() > 1e-3
