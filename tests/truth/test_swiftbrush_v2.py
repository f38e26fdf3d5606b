"""SwiftBrush v2 against SwiftBrush, whose turns it has, and the closed form of the clamped reward."""

from __future__ import annotations

import pytest
import torch

from onestroke.method import Batch
from onestroke.methods.distribution.swiftbrush import SwiftBrush
from onestroke.methods.distribution.swiftbrush_v2 import SwiftBrushV2
from truth import checks
from truth.checks import F64, Free, Given, T, at, close, hand_ab, labels, make_path, parts, tensor, two_classes
from truth.reward_checks import with_reward
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", ["vp", "edm", "flow"])
C = tensor(1.0, 0.5)
X = tensor(-2.0, -1.2, -0.6, -0.094, 0.0, 0.4, 1.1, 1.9)[:, None]  # the fourth has a cosine of 0.362


def cosine(x0, cond):
    """Of (x, 1) and C: a reward in [-1, 1] whose slope is typed below."""
    return (C[0] * x0[:, 0] + C[1]) / ((x0[:, 0] ** 2 + 1).sqrt() * C.norm())


def slope(x):
    """d cosine / dx."""
    return (C[0] - C[1] * x) / ((x**2 + 1) ** 1.5 * C.norm())


def played(method, path, step: int, **options):
    """(the student's gradient at each sample, the fake's loss) of one round, guided by 4.5."""
    z, e, e2 = torch.randn(3, 8, 1, generator=torch.Generator().manual_seed(4), dtype=F64)
    student = Free(X)
    given = parts(path, two_classes(path, 0.9, 0.5), student, two_classes(path, 0.6, 0.8), 4.5)
    with at(T):
        game = method(given, **options).step(Batch(z, labels(8, 0), Given(e, e2, shared=0.5)), step)
        turn = next(game)
        assert turn.player == "student"
        sum(turn.terms.values()).backward()
        fake = sum(next(game).terms.values())
    return student.x.grad * len(z), fake


def beside_swiftbrush(cls, name="vp"):
    """SwiftBrush's own direction, plus - w_k cosine' where the cosine is below the threshold, and nothing above."""
    path = make_path(name)
    base, dsm = played(SwiftBrush, path, 0)
    below = cosine(X, None)[:, None] < 0.35
    assert below.sum() == 3
    assert (cosine(X, None) < 0.37).sum() == 4
    for step, weight in ((0, 0.1), (5, 0.075), (20, 0.0), (30, 0.0)):
        got, fake = played(with_reward(cls, cosine, rounds=20), path, step)
        close(got - base, torch.where(below, -weight * slope(X), 0.0))
        assert torch.equal(got[~below], base[~below])
        assert torch.equal(fake, dsm)


def clamp(cls, name="vp"):
    """At the threshold itself, and beyond it, the gradient is exactly zero; just below it is whole."""
    path, base = make_path(name), played(SwiftBrush, make_path(name), 0)[0]
    for level, moved in ((0.35, False), (0.36, False), (0.35 - 1e-9, True)):
        got, _ = played(with_reward(cls, lambda x0, cond, at=level: at + (x0 - x0.detach())[:, 0]), path, 0)
        close(got - base, torch.full_like(X, -0.1 if moved else 0.0))
        assert torch.equal(got, base) is not moved


@each
@pytest.mark.parametrize("check", [beside_swiftbrush, clamp])
def test_the_turns_are_the_closed_forms(check, name):
    check(SwiftBrushV2, name)


@each
def test_its_distribution_matching_is_that_of_swiftbrush(name):
    """The proofs of SwiftBrush's own turns, here."""
    path, (a, b), cls = make_path(name), hand_ab(name), with_reward(SwiftBrushV2)
    checks.vsd_is_the_closed_form(cls, path, "x0", a, b)
    checks.guided_vsd_is_the_closed_form(cls, path, a, b)
    checks.each_turn_trains_its_own_player(cls, path)
    for null in (False, True):
        checks.fake_loss_is_the_closed_form(cls, path, a, b, null)


def vsd(cls):
    checks.vsd_is_the_closed_form(with_reward(cls), make_path("flow"), "x0", *hand_ab("flow"))


def nulled(cls):
    checks.fake_loss_is_the_closed_form(with_reward(cls), make_path("vp"), *hand_ab("vp"), True)


def turns(cls):
    checks.each_turn_trains_its_own_player(with_reward(cls), make_path("vp"))


MUTANTS = [
    ("self.vsd(x, batch)", "-self.vsd(x, batch)", vsd),
    ("sigma_power: float = 2.0", "sigma_power: float = 1.0", vsd),
    ("guide_fake: bool = True", "guide_fake: bool = False", beside_swiftbrush),
    ("null_rate: float = 0.1", "null_rate: float = 0.05", nulled),
    ("alpha_power: float = 2.0", "alpha_power: float = 1.0", beside_swiftbrush),
    ("x.detach(), batch", "x, batch", turns),
    ("self.threshold - self.reward(x, batch.cond)", "self.reward(x, batch.cond) - self.threshold", beside_swiftbrush),
    ("self.reward(x, batch.cond)).relu()", "self.reward(x, batch.cond))", clamp),
    ("self.reward(x, batch.cond)).relu()", "self.reward(batch.noise, batch.cond)).relu()", beside_swiftbrush),
    ("self.reward(x, batch.cond)).relu()", "self.reward(x.detach(), batch.cond)).relu()", beside_swiftbrush),
    (").relu().mean()", ").relu().sum()", beside_swiftbrush),
    ("max(0.0, 1 - step / self.rounds)", "(1 - step / self.rounds)", beside_swiftbrush),
    ("1 - step / self.rounds", "1.0", beside_swiftbrush),
    ("reward_weight: float = 0.1", "reward_weight: float = 0.2", beside_swiftbrush),
    ("threshold: float = 0.35", "threshold: float = 0.37", beside_swiftbrush),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken("onestroke.methods.distribution.swiftbrush_v2", old, old).SwiftBrushV2)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken("onestroke.methods.distribution.swiftbrush_v2", old, new).SwiftBrushV2)
