"""Truth checks of the methods that a reward pulls on: Gaussians and notation of score_checks, rewards typed here."""

from __future__ import annotations

from dataclasses import replace

import torch

from onestroke.draws import Draws
from onestroke.method import Batch
from onestroke.paths import EDM
from truth import score_checks
from truth.checks import F64, Affine, Free, close, fourfold, labels, parts, tensor
from truth.score_checks import MU, TAU, M, S, direction, gauss

C = 1.7
"""Where the quadratic reward is largest."""


def quadratic(x0, cond):
    """-(x - C)^2 / 2, summed over D."""
    return -(x0 - C).square().flatten(1).sum(1) / 2


def nothing(x0, cond):
    return 0 * x0.flatten(1).sum(1)


def with_reward(cls, reward=nothing, **changes):
    """The class as the other checks call it, on parts with this reward."""
    return lambda given, **options: cls(replace(given, reward=reward, **changes), **options)


def variances(a, b, s):
    """(P, Q) of teacher and student at x_t."""
    return a**2 * TAU**2 + b**2, a**2 * s**2 + b**2


def expected_direction(cls, path, mu: float, s: float, reward=quadratic, **options):
    """(E[g], E[g z]) of the student's turn at the student N(mu, s^2), the fake its exact law; the teacher N(M, TAU^2).

    Exact over z and eps for networks and rewards that are linear in them.
    """
    z, e = fourfold(1)
    student = Free(mu + s * z)
    given = parts(path, gauss(path, M, TAU), student, gauss(path, mu, s))
    g = direction(with_reward(cls, reward)(given, **options), student, z, e, labels(4))
    return g.mean(), (g * z).mean()


def rests_at(cls, path, optimum: tuple[float, float], rate: float, **options):
    """Nothing moves at the optimum; and descent, the fake always exact, goes there from elsewhere."""
    close(torch.stack(expected_direction(cls, path, *optimum, **options)) * rate, [0.0, 0.0], atol=1e-8)
    at = tensor(MU, S)
    for _ in range(150):
        at = at - rate * torch.stack(expected_direction(cls, path, *at.tolist(), **options))
    close(at, optimum, rtol=0, atol=1e-5)
    assert abs(optimum[0] - M) > 0.1 * abs(C - M)
    assert optimum[1] < 0.95 * TAU


def fake_turn(cls, path, a, b, **options):
    """The EDM weight on a fresh sample, never guided."""
    weight = (b**2 / a**2 + 0.25) / (0.5 * b / a) ** 2
    score_checks.fake_turn_is_the_closed_form(with_reward(cls), path, a, b, weight, "x0", run=3.0, **options)


def looks_at_log_normal_levels(cls):
    """log sigma of both turns: N(-1.2, 1.2^2)."""
    path, seen = EDM(), []
    fake = gauss(path, MU, S)
    fake.register_forward_pre_hook(lambda _, args: seen.append(-path.log_snr(args[1])))
    given = parts(path, gauss(path, M, TAU), Affine(path, tensor(MU), tensor(S)), fake)
    list(with_reward(cls)(given).step(Batch(torch.zeros(5000, 1, dtype=F64), labels(5000), Draws(0, 0, 5000)), 0))
    assert len(seen) == 2
    for level in seen:
        assert abs(level.mean().item() + 1.2) < 5 * 1.2 / 5000**0.5
        assert abs(level.std().item() - 1.2) < 5 * 1.2 / 10000**0.5
