"""The GAN losses and the ratio they are read as, against the sheet."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from onestroke import terms
from onestroke.errors import InputError
from truth.checks import F64, close, hand_ab, tensor
from truth.score_checks import MU, TAU, M, S
from truth.test_mutants import broken


def optimal_logit(module, name="edm"):
    """Sheet 6.3, item 7e: the critic's loss over quadratic logits c0 + c1 x + c2 x^2 is least at log p_t - log q_t.

    Expectations by Gauss-Hermite; Newton's method, the loss being convex in the coefficients.
    """
    a, b = hand_ab(name)
    p, q = a**2 * TAU**2 + b**2, a**2 * S**2 + b**2
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(100))
    weights = weights / weights.sum()
    real, fake = a * M + math.sqrt(p) * nodes, a * MU + math.sqrt(q) * nodes

    def loss(c):
        logits = (c[0] + c[1] * v + c[2] * v**2 for v in (real, fake))
        return weights @ torch.func.vmap(module.gan_critic)(*logits)

    c = torch.zeros(3, dtype=F64)
    for _ in range(12):
        slope = torch.func.grad(loss)(c)
        c = c - torch.linalg.solve(torch.func.hessian(loss)(c), slope)
    want = [
        -((a * M) ** 2) / (2 * p) + (a * MU) ** 2 / (2 * q) + math.log(q / p) / 2,
        a * M / p - a * MU / q,
        1 / (2 * q) - 1 / (2 * p),
    ]
    close(c, want, rtol=1e-6, atol=1e-7)
    assert c.abs().min() > 1e-2


def typed(module):
    """Values by hand, and where each player goes."""
    real, fake = tensor([0.3, -2.0]), tensor([1.5, 0.0])
    soft = math.log1p(math.exp(-0.3)), math.log1p(math.exp(2.0)), math.log1p(math.exp(1.5)), math.log(2)
    close(module.gan_critic(real, fake), (soft[0] + soft[1]) / 2 + (soft[2] + soft[3]) / 2)
    close(module.gan_student(fake), (math.log1p(math.exp(-1.5)) + math.log(2)) / 2)
    close(module.gan_critic(real, fake, "hinge"), (0.7 + 3.0) / 2 + (2.5 + 1.0) / 2)
    close(module.gan_student(fake, "hinge"), -0.75)
    weight = tensor(2.0, 3.0)
    close(module.gan_critic(real.T, fake.T, weight=weight), soft[0] + 1.5 * soft[1] + soft[2] + 1.5 * soft[3])
    close(module.gan_student(fake.T, "hinge", weight), -1.5)


def penalty(module):
    """Of the logit w x at noise s n: w^2 s^2 E n^2, the squared gradient in units of the noise."""
    x, n = torch.randn(2, 9, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    close(module.approx_r1(3 * x, 3 * (x + 0.1 * n)), 9 * 0.01 * n.square().mean())


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_the_best_logit_is_the_log_ratio(name):
    optimal_logit(terms, name)


@pytest.mark.parametrize("check", [typed, penalty])
def test_the_losses_are_the_hand_typed_ones(check):
    check(terms)


def test_an_unknown_loss_is_refused():
    with pytest.raises(InputError, match=r"unknown GAN loss 'hing'\. Did you mean 'hinge'"):
        terms.checked_gan("hing")


MUTANTS = [
    ("_mean(cost(real), weight)", "_mean(cost(-real), weight)", optimal_logit),
    ("_mean(cost(-fake), weight)", "2 * _mean(cost(-fake), weight)", optimal_logit),
    ("(like(weight, cost) * cost)", "cost", typed),
    ("F.relu(1 - logit)", "F.relu(-logit)", typed),
    ("lambda logit: -logit)", "lambda logit: F.relu(1 - logit))", typed),
    ("(logits - nudged).square()", "(logits - nudged).abs()", penalty),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken("onestroke.terms", old, old))
    with pytest.raises(AssertionError):
        check(broken("onestroke.terms", old, new))
