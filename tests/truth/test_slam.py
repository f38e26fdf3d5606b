"""SLAM: the points of the sub-path and their noise, and latent consistency at its noisy end."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from contract.build import batch, build
from onestroke.denoiser import TwoTimes
from onestroke.method import Batch
from onestroke.methods.consistency.lcm import LCM
from onestroke.methods.consistency.slam import SLAM
from truth import consistency_checks as checks
from truth.checks import F64, close, hand_ab, labels, make_path, tensor
from truth.consistency_checks import FAMILY, Drawn, Exact, Line, M, S
from truth.test_mutants import broken

T, U = 0.7, 0.6


def made(cls, path, student, **options):
    """The method whose student is not told g."""
    with mock.patch.dict(cls.__init__.__globals__, TwoTimes=lambda net, *_: net):
        return checks.made(cls, path, student, **options)


def samples(rows=4):
    z, e = torch.randn(2, rows, 1, generator=torch.Generator().manual_seed(49), dtype=F64)
    return M + S * z, e


def published_noise(cls, name="vp"):
    """sigma_g^2 = (sigma_s alpha_t / alpha_s)^2 + g^2 (1 - (alpha_t / alpha_s)^2) on a path of a^2 + b^2 = 1, at x_g =
    g x_t + (1 - g) (alpha_t / alpha_s) x_s: sheet 4.9. Here the same point at the time of that level."""
    path, (x, lower) = make_path(name), samples()
    g, t, s = tensor(0.0, 0.3, 0.8, 1.0), tensor(T).expand(4), tensor(U).expand(4)
    got, now = made(cls, path, Line(path, 0.7, 0.2)).between(x, t, lower, s, g)
    (a, b), (c, d) = hand_ab(name, T), hand_ab(name, U)
    sigma = ((d * a / c) ** 2 + g**2 * (1 - (a / c) ** 2)).sqrt()
    close(sigma[[0, -1]], [d * a / c, b])
    for i in range(4):
        at_now = hand_ab(name, now[i].item())
        assert at_now[1] / at_now[0] == pytest.approx((sigma[i] / a).item(), rel=1e-6)
        close(got[i], (g[i] * x[i] + (1 - g[i]) * a / c * lower[i]) * at_now[0] / a, 1e-6)
    close(now[[0, -1]], [U, T], 1e-7)


@pytest.mark.parametrize("name", ["vp", "table", "trig"])
def test_the_noise_between_is_the_published_one(name):
    published_noise(SLAM, name)


@pytest.mark.parametrize("name", checks.NAMES)
def test_the_ends_of_the_sub_path_are_its_states(name):
    path, (x, lower) = make_path(name), samples()
    for t in (path.t_max, 0.3):
        t, s = (path.snap(tensor(v)).expand(4) for v in (t, 0.2))
        method = made(SLAM, path, Line(path, 0.7, 0.2))
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
    for t, s in ((T, U), (0.05, 0.0)):
        student = Line(path, 0.7, 0.2)
        method = made(cls, path, student)
        method.slow.gain.data.fill_(0.4)
        with checks.pair(t, s):
            (turn,) = method.step(Batch(e, labels(6), Drawn(tensor(g).expand(6), e), x0), 0)
        (_, b), (_, d) = hand_ab("edm", t), hand_ab("edm", s)
        x = x0 + b * e
        lower = checks.ddim("edm", t, s, x)
        rho = (d**2 + g**2 * (b**2 - d**2)) ** 0.5
        now = (rho ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
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
    grid = LCM.__init__.__defaults__[0]
    for cls, options in ((SLAM, {}), (LCM, {"embed": False, "spread": 0.0})):
        student = Line(path, 0.7, 0.2)
        build_it = made if cls is SLAM else checks.made
        method = build_it(cls, path, student, grid=grid, **options)
        with checks.pair(path.snap(tensor(T)).item(), path.snap(tensor(U)).item()):
            (turn,) = method.step(Batch(e, labels(6), Drawn(torch.ones(6), e), x0), 0)
        found.append((turn.terms["consistency"], *torch.autograd.grad(turn.terms["consistency"], student.gain)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", checks.NAMES)
def test_the_exact_function_is_a_fixed_point_at_both_ends(name):
    """In between, the published level is that of independent noises, and the function is off by less than the step."""
    path, (x0, e) = make_path(name), samples(6)

    def exact(net, path, x, t, s, cond):
        (a, b), (c, d) = (path.ab(u[:1]) for u in (t, s))
        return c * M + ((c**2 * S**2 + d**2) / (a**2 * S**2 + b**2)).sqrt() * (x - a * M)

    def loss(g):
        method = made(SLAM, path, Exact(path), distance="l2")
        with checks.pair(0.5, 0.45), mock.patch(f"{FAMILY}.slam.euler", exact):
            (turn,) = method.step(Batch(e, labels(6), Drawn(tensor(g).expand(6), e), x0), 0)
        return turn.terms["consistency"].item()

    assert loss(1.0) < 1e-20
    assert loss(0.0) < 1e-9
    assert loss(0.5) < 1e-2


def told(cls):
    """The student is told 1 - g, its average nothing; at g = 1 that is nothing as well: the student that is kept."""
    method = build("slam")
    method.__class__ = cls
    assert isinstance(method.student, TwoTimes)
    torch.nn.init.normal_(method.student.shift.weight)
    seen = []
    for net in (method.student, method.slow):
        net.register_forward_pre_hook(lambda _, args: seen.append(args[2].get("s")))
    with mock.patch.object(cls, "between", lambda self, x, t, lower, s, g: seen.append(g) or (x, t)):
        list(method.step(batch(), 0))
    assert seen[0] is None
    close(seen[2], 1 - seen[1])


def test_the_student_is_told_where_it_starts():
    told(SLAM)


MUTANTS = [
    ("(low + g**2 * (high - low))", "(low + g * (high - low))", published_noise),
    ("g * a / at_t), x)", "g), x)", published_noise),
    ("like((1 - g) * a / at_s, x)", "like((1 - g) * a / at_t, x)", published_noise),
    ("self.path, x, t, s, cond)", "self.path, x, s, t, cond)", by_hand),
    ("self.slow, self.path, lower, s,", "self.student, self.path, lower, s,", by_hand),
    ("self.student(x, now,", "self.student(x, t,", by_hand),
    ('"s": 1 - g', '"s": g', told),
    ("keep: float = 0.95", "keep: float = 0.9", by_hand),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = f"{FAMILY}.slam"
    check(broken(module, old, old).SLAM)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(module, old, new).SLAM)
