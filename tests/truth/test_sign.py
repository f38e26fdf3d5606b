"""SIGN: its matching against the closed form, its regressions against hand-typed ones, and where it is at rest."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from onestroke.method import Batch
from onestroke.methods.distribution.sign import SIGN
from onestroke.paths import Estimate
from onestroke.teachers.gaussian import GaussianMixture
from truth import checks
from truth.checks import F64, Given, close, hand_ab, labels, make_path, tensor
from truth.score_checks import MU, PATHS, TAU, Free, M, S, gauss, posterior
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", PATHS)
GAP, EARLY = 0.04, 0.05
NONE = {"idempotence": 0.0, "reconstruct": 0.0, "flow": 0.0, "denoise": 0.0}


def at(t):
    """The matching and the fake look at t, the flow at t too, and denoising at EARLY."""

    def fixed(draw, path, lo=0.0, hi=1.0):
        return torch.full((draw.size,), EARLY if hi == 0.1 else t, dtype=F64)

    return mock.patch("onestroke.times.uniform", fixed)


def noises(count, dim):
    return torch.randn(count, 6, dim, generator=torch.Generator().manual_seed(1), dtype=F64)


def matching(cls, name="vp"):
    """(D_q - D_p) / mean |x - D_p|, over B D, sample by sample; the other terms stand still."""
    z, e, real, e1, e2 = noises(5, 3)
    path, (a, b) = make_path(name), hand_ab(name)
    x = MU + S * z
    student = Free(x)
    method = cls(checks.parts(path, gauss(path, M, TAU, 3), student, gauss(path, MU, S, 3)), **NONE)
    with at(checks.T):
        turn = next(method.step(Batch(z, labels(6), Given(e, e1, e2), real), 0))
    assert turn.player == "student"
    sum(turn.terms.values()).backward()
    p, _, q, _ = posterior(x, e, a, b)
    close(student.x.grad, (q - p) / (x - p).abs().mean(1, keepdim=True) / 18)
    assert [p.grad for net in (method.teacher, method.fake) for p in net.parameters()] == [None, None]


@each
def test_the_matching_is_the_closed_form(name):
    matching(SIGN, name)


class Scale(torch.nn.Module):
    """f(y) = k y for y of unit variance: first inputs come back as k times what they were made of."""

    def __init__(self, path, k):
        super().__init__()
        self.path, self.k = path, torch.nn.Parameter(tensor(*k))

    def forward(self, x, t, cond):
        a, b = (c[:, None] for c in self.path.ab(t))
        x0 = self.k * x / torch.hypot(a, b)
        return Estimate(x0, x0)


def terms_of(cls, name, k, teacher, real, dim, t=checks.T):
    path = make_path(name)
    z, e, e1, e2 = noises(4, dim)
    student = Scale(path, k)
    weights = dict.fromkeys(NONE, 1.0)
    method = cls(checks.parts(path, teacher(path), student, teacher(path)), gap=GAP, **weights)
    with at(t):
        turn = next(method.step(Batch(z, labels(6), Given(e, e1, e2), real), 0))
    return turn.terms, student, (z, e1, e2)


def regressions(cls, name="flow", k=0.7):
    """By hand, of f(y) = k y: points come to unit variance; x_s the teacher's Euler step; targets stand still."""
    real = 0.2 + 0.5 * noises(1, 2)[0].flip(0)
    found, student, (z, e1, e2) = terms_of(cls, name, (k,), lambda path: gauss(path, M, TAU, 2), real, 2)
    (a, b), (c, d), (g, h) = (hand_ab(name, t) for t in (checks.T, checks.T - GAP, EARLY))
    xt = a * real + b * e1
    x0 = M + a * TAU**2 / (a**2 * TAU**2 + b**2) * (xt - a * M)
    xs = c * x0 + d * (xt - a * x0) / b
    unit_t, unit_s, unit_early = xt / (a**2 + b**2) ** 0.5, xs / (c**2 + d**2) ** 0.5, g * real + h * e2
    unit_early = unit_early / (g**2 + h**2) ** 0.5
    want = {
        "idempotence": ((k * k * z - k * z) ** 2, 2 * (k * k * z - k * z) * k * z),
        "reconstruct": ((k * real - real) ** 2, 2 * (k * real - real) * real),
        "flow": ((k * unit_t - k * unit_s) ** 2, 2 * (k * unit_t - k * unit_s) * unit_t),
        "denoise": ((k * unit_early - real) ** 2, 2 * (k * unit_early - real) * unit_early),
    }
    for term, (value, slope) in want.items():
        close(found[term], value.mean())
        (grad,) = torch.autograd.grad(found[term], student.k, retain_graph=True)
        close(grad[0], slope.mean())


@each
def test_the_regressions_are_the_hand_typed_ones(name):
    regressions(SIGN, name)


def test_on_a_subspace_the_projection_is_at_rest():
    """Pictures N(0, 1) x {0} on a variance-preserving path: the flow moves only what leaves the line."""
    real = noises(1, 2)[0].clone()
    real[:, 1] = 0

    def line(path):
        return checks.Gain(GaussianMixture(path, torch.zeros(1, 2, dtype=F64), tensor([1.0, 1e-9])))

    found, student, _ = terms_of(SIGN, "table", (1.0, 0.0), line, real, 2)
    for term in ("dm", "idempotence", "reconstruct", "flow"):
        (grad,) = torch.autograd.grad(found[term], student.k, retain_graph=True)
        rest = 2 * GAP**2 if term == "flow" else 1e-9  # an Euler step shortens the line by the square of its angle
        assert grad.abs().max() < rest, term
    table = hand_ab("table", EARLY)
    (grad,) = torch.autograd.grad(found["denoise"], student.k)
    assert grad.abs().max() < 5 * table[1], "denoise pulls by no more than its noise"


MUTANTS = [
    ("* (q - p))", "* (p - q))", matching),
    ("terms.gap_weight(x, p)", "terms.gap_weight(x, q)", matching),
    ("x = x.detach()\n", "pass\n", regressions),
    ("self.path.mix(est.x0, est.eps, down), cond, down)", "self.path.mix(est.x0, est.eps, t), cond, t)", regressions),
    ("self.f(xt, cond, t), target", "self.f(xt, cond), target", regressions),
    ("self.f(noised, cond, early), real", "self.f(noised, cond, early), x", regressions),
    ("self.f(x, cond), x)", "self.f(real, cond), x)", regressions),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken("onestroke.methods.distribution.sign", old, old).SIGN)
    with pytest.raises(AssertionError):
        check(broken("onestroke.methods.distribution.sign", old, new).SIGN)
