"""SiD, its terms and its time samplers, against the sheet's closed forms."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch

from onestroke import terms, times
from onestroke.draws import Draws
from onestroke.methods.score import sid as source
from onestroke.methods.score.sid import SiD
from onestroke.paths import EDM, VP, Flow, Trig
from truth import score_checks as checks
from truth.checks import F64, close, hand_ab, make_path, tensor
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", checks.PATHS)
alphas = pytest.mark.parametrize("alpha", checks.ALPHAS)


@each
@alphas
def test_the_expected_gradient_is_the_closed_form(name, alpha):
    checks.sid_is_the_closed_form(SiD, make_path(name), *hand_ab(name), alpha)


@each
@alphas
def test_the_gradient_is_the_hand_typed_one(name, alpha):
    checks.sid_is_the_hand_typed_gradient(SiD, make_path(name), *hand_ab(name), alpha)


@each
@pytest.mark.parametrize("run", [1.0, 3.0])
def test_the_gradient_is_the_finite_difference(name, run):
    """A run's guidance guides the teacher alone; alpha and scale are the published ones."""
    loss = checks.sid_loss(1.2, 100.0)
    checks.student_turn_is_the_finite_difference(SiD, make_path(name), *hand_ab(name), loss, run, (run, 1.0))


def test_alpha_one_is_the_fisher_divergence_of_a_frozen_law():
    """Identity I2 with v = s_q - s_p: d/dtheta E_pi (s_q,theta - s_p)^2 / 2, pi frozen, by Gauss-Hermite, is the
    score-space closed form at alpha = 1 that the tests above hold the method to."""
    a, b = hand_ab("edm")
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    p, q = a**2 * checks.TAU**2 + b**2, a**2 * checks.S**2 + b**2
    x, w = checks.MU + math.sqrt(q) * torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    theta = tensor(checks.MU, checks.S).requires_grad_(True)
    s_q = -(x - theta[0]) / (theta[1] ** 2 + b**2)
    (w * (s_q + (x - checks.M) / p).square() / 2).sum().backward()
    close(theta.grad, [(checks.MU - checks.M) / (p * q), 2 * checks.S * (1 / p - 1 / q) / q])


@each
def test_nothing_moves_when_the_fake_has_the_teachers_law(name):
    for alpha in checks.ALPHAS:
        checks.zero_at_the_truth(SiD, make_path(name), 1.0, alpha=alpha)
        checks.zero_at_the_truth(SiD, make_path(name), 1.0, shift=-0.2, alpha=alpha)


@each
def test_gradient_flows_through_teacher_and_fake(name):
    checks.gradient_flows_through_teacher_and_fake(SiD, make_path(name))


@each
def test_the_fake_learns_under_the_edm_weight(name):
    a, b = hand_ab(name)
    weight = (b**2 / a**2 + 0.25) / (0.5 * b / a) ** 2
    checks.fake_turn_is_the_closed_form(SiD, make_path(name), a, b, weight, "x0", run=3.0)


def test_times_are_the_published_ones():
    """The student: the first eight tenths of the Karras ramp; the fake: log sigma of N(-1.2, 1.2^2)."""
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, t, cond):
            seen.append(t)
            return self.net(x, t, cond)

    path = EDM()
    fake = Spy(checks.gauss(path, checks.MU, checks.S))
    student = checks.Affine(path, tensor(checks.MU), tensor(checks.S))
    method = SiD(checks.parts(path, checks.gauss(path, checks.M, checks.TAU), student, fake))
    z = torch.zeros(5000, 1, dtype=F64)
    list(method.step(checks.Batch(z, checks.labels(5000), Draws(0, 0, 5000)), 0))
    student_t, fake_t = seen
    assert 0 <= student_t.min() < 0.002
    assert 0.798 < student_t.max() <= 0.8
    level = -path.log_snr(fake_t)
    assert level.mean().item() == pytest.approx(-1.2, abs=5 * 1.2 / 5000**0.5)
    assert level.std().item() == pytest.approx(1.2, abs=5 * 1.2 / 10000**0.5)


# ---- time samplers and weights -------------------------------------------------------------------------------


def distance(sample, cdf):
    """Kolmogorov-Smirnov: above 1.95 / sqrt(n) once in a thousand."""
    return (cdf(sample.sort().values) - (torch.arange(len(sample), dtype=F64) + 0.5) / len(sample)).abs().max()


LAWS = [EDM(), VP(), Flow(), Trig(), make_path("table"), make_path("table0")]


@pytest.mark.parametrize("path", LAWS, ids=lambda p: type(p).__name__)
def test_karras_is_uniform_on_the_ramp_as_far_as_the_path_goes(path):
    n = 4000
    t = times.karras(Draws(3, 0, n), path)
    assert t.dtype == F64
    assert (t >= path.t_min).all()
    assert (t <= path.t_max).all()
    a, b = path.ab(t)
    lo, hi = 0.002 ** (1 / 7), 80 ** (1 / 7)
    u = ((b / a) ** (1 / 7) - lo) / (hi - lo)
    ends = [((y / x) ** (1 / 7) - lo) / (hi - lo) for x, y in (hand_of(path, s) for s in (path.t_min, path.t_max))]
    first, last = max(0.0, ends[0]), min(0.8, ends[1])
    slack = 0.02 if isinstance(path, type(LAWS[-1])) else 0  # whole indices
    assert distance(u, lambda v: (v - first) / (last - first)) < 1.95 / n**0.5 + slack


def hand_of(path, t):
    return [max(c.item(), 1e-12) for c in path.ab(tensor(t))]


@pytest.mark.parametrize("path", LAWS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("law", [(-1.2, 1.2), (math.log(2), 1.6)])
def test_log_normal_is_cut_off_at_the_ends(path, law):
    n = 4000
    t = times.log_normal(Draws(4, 0, n), path, *law)
    assert t.dtype == F64
    assert (t >= path.t_min).all()
    assert (t <= path.t_max).all()
    phi = torch.distributions.Normal(tensor(law[0]), tensor(law[1])).cdf
    a, b = path.ab(t)
    first, last = (phi(tensor(y / x).log()).item() for x, y in (hand_of(path, s) for s in (path.t_min, path.t_max)))
    slack = 0.05 if isinstance(path, type(LAWS[-1])) else 0
    assert distance((b / a).log(), lambda v: (phi(v) - first) / (last - first)) < 1.95 / n**0.5 + slack


def test_on_the_straight_path_log_normal_is_logit_normal():
    t = times.log_normal(Draws(4, 0, 4000), Flow(t_min=0.0), 0.3, 0.5)
    phi = torch.distributions.Normal(tensor(0.3), tensor(0.5)).cdf
    assert distance(t, lambda v: phi((v / (1 - v)).log())) < 1.95 / 4000**0.5


def test_the_gap_weight_is_detached_and_has_a_floor():
    x = tensor([1.0, 2.0], [3.0, 5.0], [0.0, 1e-7]).requires_grad_(True)
    weight = terms.gap_weight(x, tensor([1.0, 2.0], [2.0, 8.0], [0.0, 0.0]))
    close(weight, [1e5, 1 / 2, 1e5])
    assert not weight.requires_grad


# ---- do the checks notice? -----------------------------------------------------------------------------------


def closed(module):
    for alpha in checks.ALPHAS:
        checks.sid_is_the_closed_form(module.SiD, make_path("edm"), *hand_ab("edm"), alpha)


def typed(module):
    checks.sid_is_the_hand_typed_gradient(module.SiD, make_path("vp"), *hand_ab("vp"), 1.2)


def published(module):
    loss = checks.sid_loss(1.2, 100.0)
    checks.student_turn_is_the_finite_difference(module.SiD, make_path("vp"), *hand_ab("vp"), loss, 3.0, (3.0, 1.0))


def flows(module):
    checks.gradient_flows_through_teacher_and_fake(module.SiD, make_path("vp"))


def fake(module):
    a, b = hand_ab("vp")
    weight = (b**2 / a**2 + 0.25) / (0.5 * b / a) ** 2
    checks.fake_turn_is_the_closed_form(module.SiD, make_path("vp"), a, b, weight, "x0")


def with_terms(check):
    def on_terms(module):
        with mock.patch.object(source, "terms", module):
            check(source)

    return on_terms


SOURCE, TERMS = "onestroke.methods.score.sid", "onestroke.terms"
MUTANTS = [
    (SOURCE, "alpha: float = 1.2", "alpha: float = 1.0", published),
    (SOURCE, "scale: float = 100.0", "scale: float = 1.0", published),
    (SOURCE, "self.guide(self.teacher)(xt, t, cond).x0", "self.teacher(xt, t, cond).x0", published),
    (SOURCE, "terms.gap_weight(x, real)", "terms.gap_weight(x, fake)", typed),
    (SOURCE, "with frozen(self.teacher, self.fake)", "with frozen(self.teacher)", flows),
    (SOURCE, "with frozen(self.teacher, self.fake)", "with torch.no_grad(), frozen(self.teacher)", flows),
    (SOURCE, "draw.normal(batch.noise), cond)", "0 * draw.normal(batch.noise) + batch.noise, cond)", fake),
    (SOURCE, "sigma_data: float = 0.5", "sigma_data: float = 1.0", fake),
    (TERMS, "((real - x) - alpha * gap)", "((real - x) + alpha * gap)", with_terms(closed)),
    (TERMS, "gap * ((real - x)", "gap * ((fake - x)", with_terms(closed)),
    (TERMS, "gap * ((real - x)", "gap.detach() * ((real - x)", with_terms(closed)),
    (TERMS, "gap * ((real - x)", "gap * ((real.detach() - x)", with_terms(closed)),
    (TERMS, "(x - real).detach().abs()", "(x - real).abs()", with_terms(typed)),
    (TERMS, "sigma_data**-2 + (2 *", "sigma_data**-2 + (-2 *", with_terms(fake)),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(module, old, new, check):
    check(broken(module, old, old))
    with pytest.raises((AssertionError, RuntimeError)):  # RuntimeError: nothing to differentiate
        check(broken(module, old, new))
