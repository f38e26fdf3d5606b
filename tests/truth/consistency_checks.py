"""Truth checks of discrete consistency methods on Gaussian data N(M, S^2), with coefficients typed by hand.

With V = a^2 S^2 + b^2 the DDIM step from t to u has the gain (a a' S^2 + b b') / V, and so has the regression of x_u on
x_t under shared noise; the exact map to the data is M + S / sqrt(V) (x - a M).
"""

from __future__ import annotations

import itertools
from unittest import mock

import torch
from torch import nn

from onestroke import times
from onestroke.method import Batch
from onestroke.paths import Estimate, like
from truth.checks import F64, Given, close, fourfold, hand_ab, labels, make_path, parts, tensor
from truth.score_checks import gauss
from truth.segment_checks import Classes

M, S = 0.3, 0.5
NAMES = ("vp", "edm", "flow", "trig", "table", "table0")
FAMILY = "onestroke.methods.consistency"


class Drawn(Given):
    """Draws whose uniform numbers are u in [0, 1) for every row."""

    def __init__(self, u, *normals):
        super().__init__(*(normals or (torch.zeros(len(u), 1, dtype=F64),)))
        self.size, self.u = len(u), u

    def uniform(self, lo=0.0, hi=1.0):
        return lo + (hi - lo) * self.u


def pair(t, s):
    """Every pair of times that a method draws is (t, s)."""

    def fixed(draw, *args, **kwargs):
        return tuple(torch.as_tensor(v, dtype=F64).expand(draw.size) for v in (t, s))

    return mock.patch.multiple("onestroke.times", neighbours=fixed, normal_neighbours=fixed)


class Line(nn.Module):
    """x0 = gain x + shift t: it tells times and states apart, and a student from its average."""

    def __init__(self, path, gain, shift):
        super().__init__()
        self.path, self.gain, self.shift = path, nn.Parameter(tensor(gain)), nn.Parameter(tensor(shift))

    def forward(self, x, t, cond):
        return self.path.split(x, self.gain * x + self.shift * like(t, x), t, "x0")


class Exact(nn.Module):
    """The consistency function of N(M, S^2), where its parameters are what they start as."""

    def __init__(self, path):
        super().__init__()
        self.path, self.mean, self.gain = path, nn.Parameter(tensor(M)), nn.Parameter(tensor(1.0))

    def forward(self, x, t, cond):
        a, b = (like(c, x) for c in self.path.ab(t))
        x0 = self.mean + self.gain * S * (x - a * self.mean) / (a**2 * S**2 + b**2).sqrt()
        return Estimate(x0, (x - a * x0) / b)


class Levels(nn.Module):
    """x0 = gain x + shift with numbers of their own at every time of a grid."""

    def __init__(self, path, grid):
        super().__init__()
        self.path, self.grid = path, grid
        self.line = nn.Parameter(torch.zeros(len(grid), 2, dtype=F64))

    def forward(self, x, t, cond):
        gain, shift = self.line[torch.searchsorted(self.grid, t - 1e-9)].T
        x0 = like(gain, x) * x + like(shift, x)
        return Estimate(x0, x)


def made(cls, path, student, mean=M, std=S, scale=1.0, teacher=None, **options):
    """The method with an exact teacher."""
    given = parts(path, teacher or gauss(path, mean, std), student, None, scale)
    return cls(given, **options)


def ramp_is_narrowed(method):
    """From 0.2 to 50 on EDM's path, by hand: the inner levels are its own, the outer ones the ends of the path."""
    low, high = (v ** (1 / 7) for v in (0.2, 50.0))
    want = [(low + i / 4 * (high - low)) ** 7 for i in (1, 2, 3)]
    close(method.path.ab(method.levels(5))[1], [0.002, *want, 80.0])


def solved(method, path, grid, x0=None, step=0):
    """The student's (gain, shift) at every time of the grid (N, 2), at the optimum of the method's own loss.

    Level by level from the data: z and eps have the exact moments of independent normals, so that a loss quadratic in
    the two numbers is its expectation, and one Newton step on them is its minimum.
    """
    z, e = fourfold(1)
    x0 = S * z if x0 is None else x0
    line = method.student.line
    for i in range(1, len(grid)):
        with pair(grid[i], grid[i - 1]):
            turn = next(method.step(Batch(e, labels(4, 0), Drawn(torch.ones(4, dtype=F64), e, e), x0), step))
        (slope,) = torch.autograd.grad(sum(turn.terms.values()), line, create_graph=True)
        curve = torch.stack([torch.autograd.grad(v, line, retain_graph=True)[0][i] for v in slope[i]])
        with torch.no_grad():
            line[i] -= torch.linalg.solve(curve, slope[i])
            if "slow" in dict(method.named_children()):
                method.slow.line.copy_(line)
    return line.detach()


def guided_mean_is_w_m(cls, make=made, w=3.0, **options):
    """Sheet 2: N(M, S^2) against N(0, S^2) under guidance w teaches the mean w M, up to the gain at the end.

    On EDM that factor is 1 to 1 %.
    """
    path, (z, _) = make_path("edm"), fourfold(1)
    grid = tensor(0.0, *reversed(path.grid(50)))
    method = make(cls, path, Levels(path, grid), scale=w, teacher=Classes(path, M), distance="l2", **options)
    line = solved(method, path, grid, x0=M + S * z)
    gain = gains(path, grid)[-1]
    close(line[-1, 0], gain)
    close(line[-1, 1], w * M * (1 - gain))
    assert abs(line[-1, 1].item() / (w * M) - 1) < 0.01


def kappa(path, t, s, std=S):
    """The DDIM gain from t to s on N(0, std^2), from the path's own coefficients."""
    (a, b), (c, d) = path.ab(t), path.ab(s)
    return (a * c * std**2 + b * d) / (a**2 * std**2 + b**2)


def gains(path, grid, std=S):
    """(N,): what a chain of DDIM steps down the grid, and the division by the last signal, make of x."""
    steps = [1 / path.ab(grid[0])[0], *(kappa(path, t, s, std) for s, t in itertools.pairwise(grid))]
    return torch.stack(steps).cumprod(0)


def ratio(path, line):
    """The gain at the noise end over that of the exact map to the first level, as the sheet gives it."""
    (a, b), (c, d) = (path.ab(tensor(t)) for t in (path.t_max, path.t_min))
    exact = ((c**2 * S**2 + d**2) / (a**2 * S**2 + b**2)).sqrt()
    return (line[-1, 0] / exact).item()


def ddim(name, t, s, x, mean=M, std=S):
    """One DDIM step on N(mean, std^2), typed by hand."""
    (a, b), (c, d) = hand_ab(name, t), hand_ab(name, s)
    v = a**2 * std**2 + b**2
    return c * (mean + a * std**2 / v * (x - a * mean)) + d * b * (x - a * mean) / v


DISTANCES = {
    "l2": lambda e: e**2,
    "l1": abs,
    "huber": lambda e: (e**2 + 1e-6).sqrt() - 1e-3,
}


def loss_is_by_hand(cls, name, distance, move=ddim, told=True, **options):
    """Value, gradient and what follows: on two pairs of times, the lower of which is inside and at the data end.

    told: give the distance as an option, and not leave it to the default.
    """
    options |= {"distance": distance} if told else {}
    path = make_path(name)
    for t, s in ((0.7, 0.6), (0.05, 0.0)):
        t, s = (path.snap(tensor(v)).item() for v in (t, s))
        student = Line(path, 0.7, 0.2)
        method = made(cls, path, student, **options)
        method.slow.gain.data.fill_(0.4)
        z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(41), dtype=F64)
        x0 = M + S * z
        with pair(t, s):
            (turn,) = method.step(Batch(e, labels(6), Given(e), x0), 0)
        assert turn.player == "student"
        (a, b), c = hand_ab(name, t), hand_ab(name, s)[0]
        x = a * x0 + b * e
        lower = move(name, t, s, x) if move else hand_ab(name, s)[0] * x0 + hand_ab(name, s)[1] * e
        target = lower / c if s <= path.t_min else 0.4 * lower + 0.2 * s
        want = DISTANCES[distance](student.gain * x + student.shift * t - target).mean()
        got = sum(turn.terms.values())
        close(got, want)
        for one, other in zip(*(torch.autograd.grad(v, list(student.parameters())) for v in (got, want)), strict=True):
            close(one, other)
        assert not any(p.requires_grad for p in method.slow.parameters())
    return turn.follow


def exact_is_a_fixed_point(cls, name, moves, **options):
    """With the exact map in place of the solver's step the loss of the exact function vanishes, at any pair."""
    path = make_path(name)
    student = Exact(path)
    method = made(cls, path, student, **options)

    def exact(net, path, x, t, s, cond):
        (a, b), (c, d) = path.ab(t), path.ab(s)
        return like(c, x) * M + like(((c**2 * S**2 + d**2) / (a**2 * S**2 + b**2)).sqrt(), x) * (x - like(a, x) * M)

    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(42), dtype=F64)
    with moves(method, exact):
        for t, s in ((0.3, 0.2), (0.99, 0.5), (0.8, 0.79)):
            with pair(t, s):
                (turn,) = method.step(Batch(e, labels(6), Given(e), M + S * z), 0)
            assert sum(turn.terms.values()) < 1e-20
            student.mean.data += 0.1
            with pair(t, s):
                (turn,) = method.step(Batch(e, labels(6), Given(e), M + S * z), 0)
            assert sum(turn.terms.values()) > 1e-8
            student.mean.data -= 0.1


def pairs_are_neighbours(cls, make=made, **options):
    """Of four intervals each is drawn: the teacher begins at its upper time, the average is asked at its lower one."""
    path, e, seen = make_path("edm"), torch.zeros(4, 1, dtype=F64), {"teacher": [], "slow": []}
    method = make(cls, path, Line(path, 0.7, 0.2), **options)
    for role, found in seen.items():
        getattr(method, role).register_forward_pre_hook(lambda _, args, found=found: found.append(args[1]))
    next(method.step(Batch(e, labels(4), Drawn(tensor(0.125, 0.375, 0.625, 0.875), *[e] * 3), e), 0))
    close(seen["teacher"][0], tensor(0.25, 0.5, 0.75, 1.0))
    close(seen["slow"][0], tensor(0.0, 0.25, 0.5, 0.75))


def ladder(path, count):
    return times.ladder(path, count)
