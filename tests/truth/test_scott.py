"""SCott: the stochastic step, latent consistency without its noise, and the discriminator's two turns."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from onestroke import times
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.consistency import scott
from onestroke.methods.consistency.lcm import LCM
from onestroke.methods.consistency.scott import SCott
from onestroke.paths import VP, Estimate
from truth import adversarial_checks
from truth import consistency_checks as checks
from truth.checks import F64, Free, Given, close, hand_ab, labels, make_path, tensor
from truth.consistency_checks import FAMILY, Line, M, S
from truth.test_mutants import broken

T, U = 0.7, 0.5


def step_by_hand(module, name="vp", eta=0.4):
    """a D + sqrt(b^2 - v) eps + sqrt(v) noise, v = eta^2 (b'^2 / b^2) (1 - a^2 / a'^2) where a^2 + b^2 = 1 (DDIM's
    own formula), with ' of the lower time; sheet 4.10."""
    path = make_path(name)
    x0, eps, noise = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(50), dtype=F64)
    t, s = tensor(T).expand(5), tensor(U).expand(5)
    got = module.stochastic(path, Estimate(x0, eps), t, s, eta, noise)
    (a, b), (c, d) = hand_ab(name, T), hand_ab(name, U)
    fresh = eta**2 * (d / b) ** 2 * (1 - (a / c) ** 2)
    if name not in ("vp", "table", "trig"):
        fresh = eta**2 * d**2 * (1 - (d * a / (c * b)) ** 2)
    close(got, c * x0 + (d**2 - fresh) ** 0.5 * eps + fresh**0.5 * noise, 1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["vp", "table", "trig", "edm", "flow"])
def test_the_stochastic_step(name, eta):
    step_by_hand(scott, name, eta)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "table0"])
def test_at_eta_1_it_is_ancestral(name):
    """q(x_s | x_t, x0) has the mean coefficient (rho_s / rho_t)^2 of the noise's state, so that with noise of its own
    the state at s is a D + b n with the covariance b_s^2 rho_s / rho_t with the state at t."""
    path = make_path(name)
    t, s = tensor(path.t_max), tensor(U)
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    kept = scott.stochastic(path, Estimate(zero, one), t, s, 1.0, zero)
    fresh = scott.stochastic(path, Estimate(zero, zero), t, s, 1.0, one)
    (a, b), (c, d) = path.ab(t), path.ab(s)
    close(kept[0] ** 2 + fresh[0] ** 2, d**2)
    close(kept[0], d * (d / c) * (a / b), atol=1e-12)


@pytest.mark.parametrize("name", checks.NAMES)
def test_without_noise_it_is_latent_consistency(name):
    """eta = 0, one sub-step: the consistency term and its gradient are those of LCM under one guidance, to the bit."""
    path, found = make_path(name), []
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(51), dtype=F64)
    for make, cls, options in ((seen, SCott, {"eta": 0.0, "substeps": 1}),
                               (checks.made, LCM, {"embed": False, "spread": 0.0})):  # fmt: skip
        student = Line(path, 0.7, 0.2)
        method = make(cls, path, student, **options)
        with checks.pair(path.snap(tensor(T)).item(), path.snap(tensor(U)).item()):
            turn = next(method.step(Batch(e, labels(6), Given(e, e, e), M + S * z), 0))
        loss = turn.terms["consistency"]
        found.append((loss, *torch.autograd.grad(loss, student.gain)))
        assert turn.follow == {"slow": 0.95}
    close(found[0][0], found[1][0], 1e-12)
    close(found[0][1], found[1][1], 1e-12)


def seen(cls, path, student, teacher=None, **options):
    """The method with a teacher, N(M, S^2), whose layer is typed by hand, and the linear head in place of its own."""
    teacher = adversarial_checks.Seen(teacher or checks.gauss(path, M, S))
    method = checks.made(cls, path, student, teacher=teacher, **options)
    method.heads = adversarial_checks.Linear()
    return method


def moved(cls):
    """Two sub-steps under noises of their own: each a stochastic step from the guided teacher's estimate."""
    path = make_path("edm")
    x, n1, n2 = torch.randn(3, 5, 1, generator=torch.Generator().manual_seed(52), dtype=F64)
    t, s = tensor(T).expand(5), tensor(U).expand(5)
    method = seen(cls, path, Line(path, 0.7, 0.2), eta=0.4)
    got = method.move(x, t, s, labels(5), Given(n1, n2))
    for now, then, noise in ((T, (T + U) / 2, n1), ((T + U) / 2, U, n2)):
        b, d = hand_ab("edm", now)[1], hand_ab("edm", then)[1]
        x0 = M + S**2 / (S**2 + b**2) * (x - M)
        fresh = 0.16 * d**2 * (1 - (d / b) ** 2)
        x = x0 + (d**2 - fresh) ** 0.5 * (x - x0) / b + fresh**0.5 * noise
    close(got, x)


def test_the_solver_takes_its_sub_steps():
    moved(SCott)


def test_noise_shrinks_the_optimum():
    """Sheet 4.10: on a Gaussian the gain of a noisy chain is the product of smaller regressions. 5 standard errors."""
    path, count = make_path("edm"), 200_000
    z, e = torch.randn(2, count, 1, generator=torch.Generator().manual_seed(53), dtype=F64)
    t, s = tensor(T).expand(count), tensor(U).expand(count)
    (_, b), (_, d) = hand_ab("edm", T), hand_ab("edm", U)
    x, found = S * z + b * e, []
    for eta in (0.0, 1.0):
        method = seen(SCott, path, Line(path, 0.7, 0.2), eta=eta, substeps=1)
        method.teacher = adversarial_checks.Seen(checks.gauss(path, 0.0, S))
        lower = method.move(x, t, s, labels(count), Draws(0, 0, count))
        found.append(((lower * x).mean() / x.square().mean()).item())
    variance = S**2 + b**2
    kept = [d, d * d / b]  # of the estimated noise, at eta = 0 and 1
    for got, c in zip(found, kept, strict=True):
        want = (S**2 + c * b) / variance
        assert abs(got - want) < 5 * d / (variance * count) ** 0.5
    assert found[1] < found[0]


def test_the_shrinkage_that_the_docstring_tells():
    """The chain of these regressions over 2 000 levels, over that of DDIM: (s / 80)^(eta^2) to 1 %."""
    path, s = make_path("edm"), 0.1
    t, u = times.ladder(path, 2000)[1:], times.ladder(path, 2000)[:-1]
    (_, b), (_, d) = path.ab(t), path.ab(u)
    zero, one = torch.zeros(1999, 1, dtype=F64), torch.ones(1999, 1, dtype=F64)
    for eta in (0.1, 0.3):
        kept = scott.stochastic(path, Estimate(zero, one), t, u, eta, zero)[:, 0]
        shrunk = ((s**2 + kept * b) / (s**2 + d * b)).prod().item()
        assert shrunk == pytest.approx((s / 80) ** eta**2, rel=0.03 * eta)


ALONE = {"eta": 0.0, "substeps": 1}


def student_turn(cls):
    adversarial_checks.student_descends_the_logit(cls, make_path("vp"), *hand_ab("vp"), gan_weight=1.0, **ALONE)


def heads_turn(cls):
    adversarial_checks.heads_descend_the_hinge(cls, make_path("vp"), *hand_ab("vp"), **ALONE)


def test_the_student_descends_the_logit_of_its_noised_sample():
    student_turn(SCott)


def test_the_heads_descend_the_hinge():
    heads_turn(SCott)


def neighbours(cls):
    checks.pairs_are_neighbours(cls, seen, grid=4, **ALONE)


def test_pairs_are_neighbours_on_the_grid():
    neighbours(SCott)


def guided_mean(cls):
    checks.guided_mean_is_w_m(cls, seen, gan_weight=0.0, **ALONE)


def test_a_guided_student_has_the_guided_mean():
    guided_mean(SCott)


def weighted(cls):
    """The share of the discriminator is 0.1 of it."""
    path, found = VP(), []
    e = torch.randn(4, 1, generator=torch.Generator().manual_seed(54), dtype=F64)
    for options in ({}, {"gan_weight": 1.0}):
        method = seen(cls, path, Free(0.5 + 0.1 * e), **ALONE, **options)
        with adversarial_checks.at(0.4), checks.pair(T, U):
            found.append(next(method.step(Batch(e, labels(4), Given(e, e, e), e), 0)).terms["gan"])
    close(found[0], 0.1 * found[1])


def test_the_weight_of_the_discriminator():
    weighted(SCott)


def test_unknown_losses_are_refused():
    with pytest.raises(InputError, match=r"unknown GAN loss 'hing'"):
        checks.made(SCott, VP(), Free(torch.zeros(1, 1)), loss="hing")


def step_of(cls):
    step_by_hand(mock.Mock(stochastic=cls.move.__globals__["stochastic"]))


MUTANTS = [
    ("eta**2 * (1 - (2", "eta * (1 - (2", step_of),
    ("(1 - fresh).clamp_min(0).sqrt()", "(1 - fresh).clamp_min(0)", step_of),
    ("like(kept, noise) * est.eps", "like(b, noise) * est.eps", step_of),
    ("path.log_snr(t) - path.log_snr(s)", "path.log_snr(s) - path.log_snr(t)", step_of),
    ("(i + 1) / self.substeps", "(i + 2) / (self.substeps + 1)", moved),
    ("est, now, then, self.eta", "est, t, s, self.eta", moved),
    ("self.gan_weight * gan}", "-self.gan_weight * gan}", student_turn),
    ("with frozen(self.teacher, self.heads)", "with frozen(self.teacher)", student_turn),
    ("self.judge(real, cond, draw), self.judge(x.detach(), cond, draw)",
     "self.judge(x.detach(), cond, draw), self.judge(real, cond, draw)", heads_turn),
    ('loss: str = "hinge"', 'loss: str = "softplus"', heads_turn),
    ("gan_weight: float = 0.1", "gan_weight: float = 0.2", weighted),
    ("(draw, self.grid)", "(draw, self.grid[1:])", neighbours),
    ("(draw, self.grid)", "(draw, self.grid, 2)", neighbours),
    ("self.guide(self.teacher)", "self.teacher", guided_mean),
    ("self.guide(self.teacher)", "self.guide(self.teacher, 4.0)", guided_mean),
    ("self.guide(self.teacher)", "self.guide(self.teacher, 2.0)", guided_mean),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = f"{FAMILY}.scott"
    check(broken(module, old, old).SCott)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(module, old, new).SCott)
