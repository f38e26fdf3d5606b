"""Truth checks of the methods that a reward pulls on: Gaussians and notation of score_checks, rewards typed here."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from truth.checks import F64, Free, close, fourfold, labels, parts
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


def expected_direction(cls, path, mu: float, s: float, reward=quadratic, **options):
    """(E[g], E[g z]) of the student's turn at the student N(mu, s^2), the fake its exact law; the teacher N(M, TAU^2).

    Exact over z and eps for networks and rewards that are linear in them.
    """
    z, e = fourfold(1)
    student = Free(mu + s * z)
    given = parts(path, gauss(path, M, TAU), student, gauss(path, mu, s))
    g = direction(with_reward(cls, reward)(given, **options), student, z, e, labels(4))
    return g.mean(), (g * z).mean()


def variances(a, b, s):
    """(P, Q) of teacher and student at x_t."""
    return a**2 * TAU**2 + b**2, a**2 * s**2 + b**2


def kl_optimum(a, b, w: float) -> tuple[float, float]:
    """Mean and deviation where b^2 grad KL(q_t || p_t) / a^2 balances w grad (x - C)^2 / 2."""
    p, _ = variances(a, b, 1)
    q = 1 / (1 / p + w / b**2)
    return (M * b**2 / p + C * w) / (b**2 / p + w), math.sqrt(q - b**2) / a


def kl_plus_reward_is_the_closed_form(cls, path, a, b):
    """E[g] = b^2 (mu - m) / P + w (mu - C), E[g z] = b^2 s (1/P - 1/Q) + w s."""
    p, q = variances(a, b, S)
    for w in (0.0, 0.05, 3.0):
        mean, scale = expected_direction(cls, path, MU, S, reward_weight=w)
        close(mean, b**2 * (MU - M) / p + w * (MU - C))
        close(scale, b**2 * S * (1 / p - 1 / q) + w * S)


def kl_rests_at_the_tilted_law(cls, path, a, b):
    """Nothing moves at the optimum; and descent, the fake always exact, goes there from elsewhere."""
    w = 0.4 * a**2 * TAU**2 / variances(a, b, 1)[0]  # from w = a^2 TAU^2 / P on the optimum is a point
    mu, s = kl_optimum(a, b, w)
    close(torch.stack(expected_direction(cls, path, mu, s, reward_weight=w)), [0.0, 0.0], atol=1e-9)
    at = torch.tensor([MU, S], dtype=F64)
    for _ in range(150):
        at = at - 0.5 * torch.stack(expected_direction(cls, path, *at.tolist(), reward_weight=w)) / w
    close(at, [mu, s], rtol=0, atol=1e-5)
    assert abs(mu - M) > 0.1 * abs(C - M)
    assert s < 0.95 * TAU
