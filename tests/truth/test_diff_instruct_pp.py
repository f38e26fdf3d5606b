"""Diff-Instruct++ against closed forms: where a quadratic reward takes a Gaussian, and by how much."""

from __future__ import annotations

import pytest
import torch

from onestroke.draws import Draws
from onestroke.method import Batch
from onestroke.methods.alignment.diff_instruct_pp import DiffInstructPP
from onestroke.paths import EDM
from truth import reward_checks, score_checks
from truth.checks import F64, Affine, Free, close, hand_ab, labels, make_path, parts, tensor, two_classes
from truth.reward_checks import C, quadratic, with_reward
from truth.score_checks import FAKE, MU, REAL, TAU, M, S
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)


def closed(cls, name="edm"):
    reward_checks.kl_plus_reward_is_the_closed_form(cls, make_path(name), *hand_ab(name))


def optimum(cls, name="vp"):
    reward_checks.kl_rests_at_the_tilted_law(cls, make_path(name), *hand_ab(name))


def typed(cls, name="vp"):
    """Sample by sample in two dimensions' worth of classes: a guided teacher, a plain fake, the published weight."""
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
    a, b = hand_ab(name)
    weight = (b**2 / a**2 + 0.25) / (0.5 * b / a) ** 2
    score_checks.fake_turn_is_the_closed_form(with_reward(cls), make_path(name), a, b, weight, "x0", run=3.0)


def laws(cls):
    """log sigma of both turns: N(-1.2, 1.2^2)."""
    path, seen = EDM(), []
    critic = score_checks.gauss(path, MU, S)
    critic.register_forward_pre_hook(lambda _, args: seen.append(-path.log_snr(args[1])))
    given = parts(path, score_checks.gauss(path, M, TAU), Affine(path, tensor(MU), tensor(S)), critic)
    list(with_reward(cls)(given).step(Batch(torch.zeros(5000, 1, dtype=F64), labels(5000), Draws(0, 0, 5000)), 0))
    assert len(seen) == 2
    for level in seen:
        assert abs(level.mean().item() + 1.2) < 5 * 1.2 / 5000**0.5
        assert abs(level.std().item() - 1.2) < 5 * 1.2 / 10000**0.5


@each
@pytest.mark.parametrize("check", [closed, optimum, typed, summed, fake])
def test_the_turns_are_the_closed_forms(check, name):
    check(DiffInstructPP, name)


def test_times_are_the_published_ones():
    laws(DiffInstructPP)


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
        assert reward_checks.kl_optimum(1.0, b, kappa * b**2) == pytest.approx((mu, s), rel=1e-5)


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
    ("mean: float = -1.2", "mean: float = -1.0", laws),
    ("std: float = 1.2", "std: float = 1.0", laws),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).DiffInstructPP)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new).DiffInstructPP)
