"""Diff-Instruct++ against closed forms: where a quadratic reward takes a Gaussian, and by how much."""

from __future__ import annotations

import math

import pytest
import torch

from onestroke.methods.alignment.diff_instruct_pp import DiffInstructPP
from onestroke.paths import EDM
from truth import reward_checks, score_checks
from truth.checks import F64, Free, close, hand_ab, labels, make_path, parts, tensor, two_classes
from truth.reward_checks import C, quadratic, variances, with_reward
from truth.score_checks import FAKE, MU, REAL, TAU, M, S
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)


def kl_optimum(a, b, w: float) -> tuple[float, float]:
    """Mean and deviation where (b / a)^2 grad KL(q_t || p_t) balances the gradient of w (x - C)^2 / 2."""
    p, _ = variances(a, b, 1)
    q = 1 / (1 / p + w / b**2)
    return (M * b**2 / p + C * w) / (b**2 / p + w), math.sqrt(q - b**2) / a


def closed(cls, name="edm"):
    """E[g] = b^2 (mu - m) / P + w (mu - C), E[g z] = b^2 s (1/P - 1/Q) + w s."""
    path, (a, b) = make_path(name), hand_ab(name)
    p, q = variances(a, b, S)
    for w in (0.0, 0.05, 3.0):
        mean, scale = reward_checks.expected_direction(cls, path, MU, S, reward_weight=w)
        close(mean, b**2 * (MU - M) / p + w * (MU - C))
        close(scale, b**2 * S * (1 / p - 1 / q) + w * S)


def optimum(cls, name="vp"):
    """From w = a^2 TAU^2 / P on the optimum is a point."""
    a, b = hand_ab(name)
    w = 0.4 * a**2 * TAU**2 / variances(a, b, 1)[0]
    reward_checks.rests_at(cls, make_path(name), kl_optimum(a, b, w), 0.5 / w, reward_weight=w)


def typed(cls, name="vp"):
    """Sample by sample, on two classes: a guided teacher, a plain fake, the published weight."""
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)
    path, (a, b), x = make_path(name), hand_ab(name), 0.4 + 0.8 * z
    for run in (1.0, 3.0):
        student = Free(x)
        given = parts(path, two_classes(path, *REAL), student, two_classes(path, *FAKE), run)
        g = score_checks.direction(with_reward(cls, quadratic)(given), student, z, e, labels(6, 0))
        real, fake = (score_checks.guided_x0(x, e, a, b, law, k) for law, k in ((REAL, run), (FAKE, 1.0)))
        close(g, fake - real + 100 * (x - C))


def summed(cls, name="vp"):
    """In three dimensions the divergence is summed over D, so that its weight against the reward is per sample."""
    z, e = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(11), dtype=F64)
    path, x = make_path(name), MU + S * z
    student = Free(x)
    given = parts(path, score_checks.gauss(path, M, TAU, 3), student, score_checks.gauss(path, MU, S, 3))
    g = score_checks.direction(with_reward(cls, quadratic)(given, reward_weight=0.5), student, z, e, labels(6))
    real, _, fake, _ = score_checks.posterior(x, e, *hand_ab(name))
    close(g, fake - real + 0.5 * (x - C))


def fake(cls, name="vp"):
    reward_checks.fake_turn(cls, make_path(name), *hand_ab(name))


@each
@pytest.mark.parametrize("check", [closed, optimum, typed, summed, fake])
def test_the_turns_are_the_closed_forms(check, name):
    check(DiffInstructPP, name)


def test_times_are_the_published_ones():
    reward_checks.looks_at_log_normal_levels(DiffInstructPP)


@each
def test_without_a_reward_the_truth_is_at_rest(name):
    score_checks.zero_at_the_truth(with_reward(DiffInstructPP), make_path(name), 1.0)
    score_checks.zero_at_the_truth(with_reward(DiffInstructPP), make_path(name), 1.0, shift=-0.2)


def test_at_the_data_the_optimum_is_the_product_of_two_gaussians():
    """Sheet 10.2, item 7: p exp(kappa R) = N((m/tau^2 + kappa C) V, V), V = 1/(1/tau^2 + kappa), as t goes to 0."""
    path, b, kappa = EDM(), 2e-3, 0.7
    t = path.time_of(-tensor(b).log()).item()
    v = 1 / (1 / TAU**2 + kappa)
    mu, s = (M / TAU**2 + kappa * C) * v, v**0.5
    with score_checks.at(t):
        assert kl_optimum(1.0, b, kappa * b**2) == pytest.approx((mu, s), rel=1e-5)


SOURCE = "onestroke.methods.alignment.diff_instruct_pp"
MUTANTS = [
    ("fake - real", "real - fake", closed),
    ('"reward": -self.reward_weight', '"reward": self.reward_weight', closed),
    ('"reward": -self.reward_weight', '"reward": self.reward_weight', optimum),
    ("self.reward(x, cond)", "self.reward(xt, cond)", typed),
    ("self.reward(x, cond).mean()", "self.reward(x, cond).sum()", closed),
    ("self.reward(x, cond)", "self.reward(x.detach(), cond)", closed),
    ("reward_weight: float = 100.0", "reward_weight: float = 10.0", typed),
    ("self.guide(self.teacher)(xt", "self.teacher(xt", typed),
    ("self.fake(xt, t, cond).x0", "self.guide(self.fake)(xt, t, cond).x0", typed),
    ("xt = self.path.mix(x, draw.normal(x), t)", "xt = self.path.mix(x, 0 * draw.normal(x), t)", typed),
    ('fake - real, "sum")', "fake - real)", summed),
    ("draw.normal(batch.noise), cond)", "0 * draw.normal(batch.noise) + batch.noise, cond)", fake),
    ('space="x0"', 'space="eps"', fake),
    ("sigma_data: float = 0.5", "sigma_data: float = 1.0", fake),
    ("mean: float = -1.2", "mean: float = -1.0", reward_checks.looks_at_log_normal_levels),
    ("std: float = 1.2", "std: float = 1.0", reward_checks.looks_at_log_normal_levels),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).DiffInstructPP)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new).DiffInstructPP)
