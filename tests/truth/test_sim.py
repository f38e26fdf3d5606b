"""SIM against the divergence whose gradient it is."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch

from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.score import sim as source
from onestroke.methods.score.sim import SIM
from onestroke.paths import EDM
from truth import score_checks as checks
from truth.checks import F64, close, hand_ab, labels, make_path, tensor
from truth.score_checks import MU, TAU, M, S
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", checks.PATHS)


def hermite(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def frozen_divergence(a, b, c):
    """d/d(mu, s) of E_pi sqrt((s_q - s_p)^2 + c^2), the sampling law pi frozen at (MU, S), by quadrature."""
    nodes, w = hermite(200)
    p, q = a**2 * TAU**2 + b**2, a**2 * S**2 + b**2
    x = a * MU + math.sqrt(q) * nodes
    theta = tensor(MU, S).requires_grad_(True)
    y = (x - a * M) / p - (x - a * theta[0]) / (a**2 * theta[1] ** 2 + b**2)
    (w * (y**2 + c**2).sqrt()).sum().backward()
    return theta.grad


def expected_gradient(sim, path, a, b, c, t):
    """Of the student's turn over z and eps, by quadrature, brought from x0 to scores: y_x0 = (b^2 / a) y."""
    nodes, w = hermite(120)
    z, e = (n.reshape(-1, 1) for n in torch.meshgrid(nodes, nodes, indexing="ij"))
    weights = torch.outer(w, w).reshape(-1, 1)
    student = checks.Free(MU + S * z)
    given = checks.parts(path, checks.gauss(path, M, TAU), student, checks.gauss(path, MU, S))
    g = checks.direction(sim(given, c=c * b**2 / a), student, z, e, labels(len(z)), t)
    return torch.stack([(weights * g).sum(), (weights * g * z).sum()]) * a / b**2


def sim_is_the_frozen_divergence(sim, path, a, b, t=checks.T):
    for c in (0.37, 5.0):
        close(expected_gradient(sim, path, a, b, c, t), frozen_divergence(a, b, c), rtol=1e-6, atol=1e-7)


@each
def test_the_expected_gradient_is_the_frozen_divergences(name):
    sim_is_the_frozen_divergence(SIM, make_path(name), *hand_ab(name))


def test_the_expected_gradient_is_the_published_number():
    """Sheet 8, item 7: sigma = 0.7, c = 0.37."""
    path = EDM()
    t = path.time_of(-tensor(0.7).log()).item()
    close(expected_gradient(SIM, path, 1.0, 0.7, 0.37, t), [0.469493, -0.504124], rtol=0, atol=1e-6)


def direction_is_the_finite_difference(sim, path, a, b):
    """In three dimensions, coordinate by coordinate: one norm over the whole sample, c in units of sqrt(D)."""
    z, e = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(21), dtype=F64)
    x = MU + S * z
    student = checks.Free(x)
    method = sim(checks.parts(path, checks.gauss(path, M, TAU, 3), student, checks.gauss(path, MU, S, 3)), c=0.1)
    g = checks.direction(method, student, z, e, labels(6))

    def value(x):
        real, _, fake, _ = checks.posterior(x, e, a, b)
        y = fake - real
        return -(y * (fake - x)).sum(1) / (y.square().sum(1) + 3 * 0.1**2).sqrt()

    h = 1e-5 * torch.eye(3, dtype=F64)
    close(g, torch.stack([(value(x + h[i]) - value(x - h[i])) / 2e-5 for i in range(3)], 1), rtol=1e-6, atol=1e-7)


@each
def test_the_gradient_is_the_finite_difference(name):
    direction_is_the_finite_difference(SIM, make_path(name), *hand_ab(name))


def sim_loss(x, real, fake, omega, c=0.00054):
    return -(fake - real) * (fake - x) / ((fake - real) ** 2 + c**2).sqrt()


@each
@pytest.mark.parametrize("run", [1.0, 3.0])
def test_guidance_is_the_teachers(name, run):
    loss = lambda *at: sim_loss(*at, c=0.3)  # noqa: E731
    checks.student_turn_is_the_finite_difference(SIM, make_path(name), *hand_ab(name), loss, run, (run, 1.0), c=0.3)


@each
def test_a_large_c_is_sid_at_alpha_one(name):
    """Sheet 8, item 5: with gap << c, c times the gradient is SiD's without omega, to gap^2 / c^2."""
    c = 1e4
    loss = lambda *at: checks.sid_loss(1.0, 1 / c, 1.0)(*at)  # noqa: E731
    a, b = hand_ab(name)
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(22), dtype=F64)
    path, x = make_path(name), MU + S * z
    student = checks.Free(x)
    method = SIM(checks.parts(path, checks.gauss(path, M, TAU), student, checks.gauss(path, MU, S)), c=c)
    g = checks.direction(method, student, z, e, labels(6))

    def value(x):
        real, _, fake, _ = checks.posterior(x, e, a, b)
        return loss(x, real, fake, None)

    close(g * c, (value(x + 1e-4) - value(x - 1e-4)) / 2e-4 * c, rtol=1e-5, atol=1e-7)


@each
def test_nothing_moves_when_the_fake_has_the_teachers_law(name):
    checks.zero_at_the_truth(SIM, make_path(name), 1.0)
    checks.zero_at_the_truth(SIM, make_path(name), 1.0, shift=-0.2)


@each
def test_gradient_flows_through_teacher_and_fake(name):
    checks.gradient_flows_through_teacher_and_fake(SIM, make_path(name))


def edm_weight(a, b):
    return (b**2 / a**2 + 0.25) / (0.5 * b / a) ** 2


@each
def test_the_fake_learns_under_the_edm_weight(name):
    a, b = hand_ab(name)
    checks.fake_turn_is_the_closed_form(SIM, make_path(name), a, b, edm_weight(a, b), "x0", run=3.0)


def test_both_turns_look_at_log_normal_levels():
    path, seen = EDM(), []
    fake = checks.gauss(path, MU, S)
    fake.register_forward_pre_hook(lambda _, args: seen.append(-path.log_snr(args[1])))
    student = checks.Affine(path, tensor(MU), tensor(S))
    method = SIM(checks.parts(path, checks.gauss(path, M, TAU), student, fake))
    list(method.step(Batch(torch.zeros(5000, 1, dtype=F64), labels(5000), Draws(0, 0, 5000)), 0))
    assert len(seen) == 2
    for level in seen:
        assert level.mean().item() == pytest.approx(-1.2, abs=5 * 1.2 / 5000**0.5)
        assert level.std().item() == pytest.approx(1.2, abs=5 * 1.2 / 10000**0.5)


@each
def test_the_weight_in_time_multiplies_the_loss(name):
    a, b = hand_ab(name)
    sigma = b / (a + b)
    loss = lambda *at: (1 - sigma) ** 2 * sim_loss(*at, c=0.3)  # noqa: E731
    options = {"c": 0.3, "weight": "(1-sigma)^2"}
    checks.student_turn_is_the_finite_difference(SIM, make_path(name), a, b, loss, 1.0, (1.0, 1.0), **options)


def test_an_unknown_weight_is_refused():
    path = EDM()
    with pytest.raises(InputError, match=r"unknown weight '1-sigm'\. Did you mean '1-sigma'"):
        SIM(checks.parts(path, checks.gauss(path, M, TAU), torch.nn.Identity(), torch.nn.Identity()), weight="1-sigm")


# ---- do the checks notice? -----------------------------------------------------------------------------------


def closed(module):
    sim_is_the_frozen_divergence(module.SIM, make_path("edm"), *hand_ab("edm"))


def wide(module):
    direction_is_the_finite_difference(module.SIM, make_path("vp"), *hand_ab("vp"))


def flows(module):
    checks.gradient_flows_through_teacher_and_fake(module.SIM, make_path("vp"))


def fake(module):
    a, b = hand_ab("vp")
    checks.fake_turn_is_the_closed_form(module.SIM, make_path("vp"), a, b, edm_weight(a, b), "x0")


def with_terms(check):
    def on_terms(module):
        with mock.patch.object(source, "terms", module):
            check(source)

    return on_terms


SOURCE, TERMS = "onestroke.methods.score.sim", "onestroke.terms"
MUTANTS = [
    (TERMS, "y = (fake - real)", "y = (real - fake)", with_terms(closed)),
    (TERMS, "(slope * (fake - x)", "(slope * (real - x)", with_terms(closed)),
    (TERMS, "(slope * (fake - x)", "(slope.detach() * (fake - x)", with_terms(closed)),
    (TERMS, "keepdim=True) + c**2", "keepdim=True).detach() + c**2", with_terms(closed)),
    (TERMS, "y.square().sum(1, keepdim=True)", "y.square()", with_terms(wide)),
    (TERMS, "c**2 * y.shape[1]", "c**2", with_terms(wide)),
    (SOURCE, "real, fake, self.c", "fake, real, self.c", closed),
    (SOURCE, "with frozen(self.teacher, self.fake)", "with frozen(self.teacher)", flows),
    (SOURCE, "draw.normal(batch.noise), cond)", "0 * draw.normal(batch.noise) + batch.noise, cond)", fake),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(module, old, new, check):
    check(broken(module, old, old))
    with pytest.raises(AssertionError):
        check(broken(module, old, new))
