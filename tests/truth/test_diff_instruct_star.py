"""Diff-Instruct* against SIM, whose divergence it has, and where a quadratic reward takes a Gaussian."""

from __future__ import annotations

import math

import pytest
import torch

from onestroke.errors import InputError
from onestroke.methods.alignment.diff_instruct_star import DiffInstructStar
from onestroke.methods.score.sim import SIM
from onestroke.paths import EDM
from truth import reward_checks, score_checks
from truth.checks import F64, Free, close, hand_ab, labels, make_path, parts, two_classes
from truth.reward_checks import C, quadratic, variances, with_reward
from truth.score_checks import FAKE, MU, REAL, M, S
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)
LARGE = 1e4
"""c, beside which the gap of the denoisers is nothing: the divergence is then half the squared one over c."""


def optimum_of(a, b, w: float) -> tuple[float, float]:
    """Mean and deviation where b^4 / c times SiD's gradient at alpha = 1 balances the gradient of w (x - C)^2 / 2."""
    p, _ = variances(a, b, 1)
    inverse = (1 / p + math.sqrt(1 / p**2 + 2 * w * LARGE / b**4)) / 2
    k = b**4 / (LARGE * p) * inverse
    return (M * k + C * w) / (k + w), math.sqrt(1 / inverse - b**2) / a


def closed(cls, name="edm"):
    """E[g] = b^4 (mu - m) / (c P Q) + w (mu - C), E[g z] = 2 b^4 s (1/P - 1/Q) / (c Q) + w s, to (gap / c)^2."""
    path, (a, b) = make_path(name), hand_ab(name)
    p, q = variances(a, b, S)
    for w in (0.0, 0.3 / LARGE, 2.0 / LARGE):
        mean, scale = reward_checks.expected_direction(cls, path, MU, S, reward_weight=w, c=LARGE)
        close(mean * LARGE, b**4 * (MU - M) / (p * q) + w * LARGE * (MU - C), rtol=1e-6)
        close(scale * LARGE, 2 * b**4 * S * (1 / p - 1 / q) / q + w * LARGE * S, rtol=1e-6)


def optimum(cls, name="vp"):
    a, b = hand_ab(name)
    p, _ = variances(a, b, 1)
    w = 0.4 * 2 * b**4 / LARGE * (1 / b**2 - 1 / p) / b**2  # at 1 instead of 0.4 the optimum is a point
    reward_checks.rests_at(cls, make_path(name), optimum_of(a, b, w), 0.3 / w, reward_weight=w, c=LARGE)


def beside_sim(cls, name="vp"):
    """Sample by sample, guided and not: SIM's own gradient, plus the published weight times the reward's."""
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)
    path, x, found = make_path(name), 0.4 + 0.8 * z, []
    for run in (1.0, 3.0):
        for method in (SIM, with_reward(cls, quadratic), with_reward(cls)):
            student = Free(x)
            made = method(parts(path, two_classes(path, *REAL), student, two_classes(path, *FAKE), run))
            found.append(score_checks.direction(made, student, z, e, labels(6, 0)))
        sim, star, without = found[-3:]
        close(star - sim, 100 * (x - C))
        assert torch.equal(without, sim)
    assert not torch.equal(found[0], found[3])


def weighted(cls, name="vp"):
    """The weight in time is on the divergence alone."""
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)
    path, x, (a, b), found = make_path(name), 0.4 + 0.8 * z, hand_ab(name), []
    for method, weight in ((SIM, "one"), (with_reward(cls, quadratic), "snr")):
        student = Free(x)
        made = method(parts(path, two_classes(path, *REAL), student, two_classes(path, *FAKE)), weight=weight)
        found.append(score_checks.direction(made, student, z, e, labels(6, 0)))
    close(found[1], (a / b) ** 2 * found[0] + 100 * (x - C))


def fake(cls, name="vp"):
    reward_checks.fake_turn(cls, make_path(name), *hand_ab(name))


def flows(cls, name="vp"):
    score_checks.gradient_flows_through_teacher_and_fake(with_reward(cls), make_path(name))


@each
@pytest.mark.parametrize("check", [closed, optimum, beside_sim, weighted, fake, flows])
def test_the_turns_are_the_closed_forms(check, name):
    check(DiffInstructStar, name)


def test_times_are_those_of_sim():
    reward_checks.looks_at_log_normal_levels(DiffInstructStar)


def test_an_unknown_weight_is_refused():
    given = parts(EDM(), torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(InputError, match=r"unknown weight 'snrr'\. Did you mean 'snr'"):
        with_reward(DiffInstructStar)(given, weight="snrr")


SOURCE = "onestroke.methods.alignment.diff_instruct_star"
MUTANTS = [
    ("real, fake, self.c", "fake, real, self.c", closed),
    ('"reward": -self.reward_weight', '"reward": self.reward_weight', optimum),
    ("self.reward(x, cond)", "self.reward(xt, cond)", beside_sim),
    ("self.reward(x, cond).mean()", "self.reward(x, cond).sum()", closed),
    ("self.reward(x, cond)", "self.reward(x.detach(), cond)", closed),
    ("reward_weight: float = 100.0", "reward_weight: float = 10.0", beside_sim),
    ("c: float = 0.00054", "c: float = 0.001", beside_sim),
    ("terms.time_weight(self.weight, self.path, t)", 'terms.time_weight("one", self.path, t)', weighted),
    ("self.guide(self.teacher)(xt", "self.teacher(xt", beside_sim),
    ("self.fake(xt, t, cond).x0", "self.guide(self.fake)(xt, t, cond).x0", beside_sim),
    ("with frozen(self.teacher, self.fake)", "with frozen(self.teacher)", flows),
    ("draw.normal(batch.noise), cond)", "0 * draw.normal(batch.noise) + batch.noise, cond)", fake),
    ("sigma_data: float = 0.5", "sigma_data: float = 1.0", fake),
    ("mean: float = -1.2", "mean: float = -1.0", reward_checks.looks_at_log_normal_levels),
    ("std: float = 1.2", "std: float = 1.0", reward_checks.looks_at_log_normal_levels),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).DiffInstructStar)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new).DiffInstructStar)
