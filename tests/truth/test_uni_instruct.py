"""Uni-Instruct: the gradient of every row is that of E_q h(r) |s_p - s_q|^2, and the reverse KL is SiD at alpha 1/2."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch

from contract.build import batch as small_batch
from contract.build import build
from onestroke import terms
from onestroke.errors import InputError
from onestroke.method import Batch, play
from onestroke.methods.score.uni_instruct import UniInstruct
from onestroke.run import plan_run
from truth import gan_checks, score_checks
from truth.checks import F64, Free, Given, T, close, hand_ab, labels, make_path, turns_of
from truth.gan_checks import ExactCritic, gan_parts, log_ratio
from truth.score_checks import MU, TAU, M, S, at, gauss, posterior
from truth.test_mutants import broken

H = {
    "rkl": lambda r: np.ones_like(r),
    "fkl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "js": lambda r: r / (1 + r),
    "hellinger": lambda r: np.sqrt(r) / 2,
    "soft-rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 2 / r,
    "pearson": lambda r: 2 * r**2,
}
"""h(r) = r^2 f''(r), sheet 11."""
divergences = pytest.mark.parametrize("divergence", H)


def hermite(count):
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes, weights / weights.sum()


def value(divergence, mu, s, a, b):
    """E_q h(r) (s_p - s_q)^2 at one time, by Gauss-Hermite."""
    nodes, weights = hermite(150)
    p, q = a**2 * TAU**2 + b**2, a**2 * s**2 + b**2
    x = a * mu + math.sqrt(q) * nodes
    up, uq = x - a * M, x - a * mu
    r = np.exp(-(up**2) / (2 * p) + uq**2 / (2 * q) + math.log(q / p) / 2)
    return (weights * H[divergence](r) * (uq / q - up / p) ** 2).sum()


def turn_of(cls, divergence, path, z, e, dim=1, limit=math.inf):
    """The student's gradient at each sample, under the exact log-ratio as the logit."""
    teacher, student = gauss(path, M, TAU, dim), Free(MU + S * z)
    fake = ExactCritic(gauss(path, MU, S, dim), teacher)
    method = cls(
        gan_parts(path, teacher, student, fake), divergence=divergence, scale=1.0, prelude=0, gan_from=0, limit=limit
    )
    with at(T):
        game = turns_of(method, Batch(z, labels(len(z)), Given(e, e, e)))
        turn = next(game)
        assert turn.player == "student"
        (g,) = torch.autograd.grad(turn.terms["sid"], student.x)
        assert all(p.grad is None and not p.requires_grad for p in method.fake.parameters())
    return 2 * len(z) * g


def expanded(cls, divergence, name="edm"):
    """sigma^4 / alpha^2 times half the finite difference, once 1 / omega and the two normalisations are undone."""
    a, b = hand_ab(name)
    nodes, weights = (torch.from_numpy(v) for v in hermite(48))
    z, e = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    w = torch.outer(weights, weights).reshape(-1, 1)
    xt = a * (MU + S * z) + b * e
    with (
        mock.patch.object(terms, "ratio", lambda logits: logits.detach().mean(1).exp()),
        mock.patch.object(terms, "level", lambda ratio, t: (yield from ()) or ratio),
    ):
        g = turn_of(cls, divergence, make_path(name), z, e)
    real = posterior(MU + S * z, e, a, b)[0]
    ratio = log_ratio(xt, a, b)[0].exp().numpy()
    mean = 1.0 if divergence == "rkl" and not cls else H[divergence](ratio).mean()
    g = g * (MU + S * z - real).abs() * mean
    step = 1e-4
    for got, (dm, ds) in (((w * g).sum(), (step, 0)), ((w * g * z).sum(), (0, step))):
        slope = value(divergence, MU + dm, S + ds, a, b) - value(divergence, MU - dm, S - ds, a, b)
        close(got, b**4 / a**2 * 0.5 * slope / (2 * step), rtol=1e-5, atol=1e-7)


def levelled(cls, name="vp", limit=math.inf):
    """As it is run, r clipped and over its mean, h over its mean: by central differences through x in 2-D.

    limit: of the slope of log r, in units of the noise.
    """
    (a, b), divergence = hand_ab(name), "js"
    z, e = 1.5 * torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(51), dtype=F64)
    x = MU + S * z
    g = turn_of(cls, divergence, make_path(name), z, e, 2, limit)
    start, slope = log_ratio(a * x + b * e, a, b)
    at_x, slope = x, (b * slope).clamp(-limit, limit) / b
    ratio = start.exp().clamp(0.1, 20)
    mean = ratio.mean()
    omega = (x - posterior(x, e, a, b)[0]).abs().mean(1)
    h_mean = (ratio / mean / (1 + ratio / mean)).mean()

    def loss(x):
        real, _, fake, _ = posterior(x, e, a, b)
        r = ratio / mean * (1 + (a * (x - at_x) * slope).sum(1))
        h, rest = r / (1 + r), (r / (1 + r)) ** 2
        gap = real - fake
        return (rest * gap.square().sum(1) / 2 + h * (gap * (fake - x)).sum(1)) / omega / h_mean

    step = 1e-5
    for i in range(2):
        d = step * torch.eye(2, dtype=F64)[i]
        close(g[:, i], (loss(x + d) - loss(x - d)) / (2 * step), rtol=1e-6, atol=1e-8)


@divergences
@pytest.mark.parametrize("name", score_checks.PATHS)
def test_the_expected_gradient_is_that_of_the_expansion(divergence, name):
    expanded(UniInstruct, divergence, name)


def test_the_expansion_of_the_reverse_kl_is_the_kl():
    """Sheet 2: KL(q_0 | p_0) = 0.2316769 is the integral over sigma of sigma E_q (s_p - s_q)^2, for N(.3, 1.21) and
    N(.9, .64): the weight the check above takes per time is that of a divergence."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    u = (nodes + 1) / 2
    total = sum(
        w / 2 * value("rkl", MU, S, 1.0, x / (1 - x)) * x / (1 - x) ** 3 for x, w in zip(u, weights, strict=True)
    )
    kl = math.log(TAU / S) + (S**2 + (MU - M) ** 2) / (2 * TAU**2) - 0.5
    assert total == pytest.approx(kl, rel=1e-6)
    assert kl == pytest.approx(0.2316769, abs=1e-7)


@pytest.mark.parametrize("name", score_checks.PATHS)
def test_the_gradient_is_the_finite_difference(name):
    levelled(UniInstruct, name)
    levelled(UniInstruct, name, 0.1)


def trained_with(name, step=0, **options):
    method = build(name, **options)
    optimisers = {p: torch.optim.Adam(getattr(method, p).parameters(), 1e-2) for p in method.players}

    def update(player):
        optimisers[player].step()
        optimisers[player].zero_grad()

    for k in range(3):
        play(method, [small_batch(step=k)], step + k, update)
    return [p for player in method.players for p in getattr(method, player).parameters()]


def test_the_reverse_kl_is_sid_at_alpha_one_half_bit_for_bit():
    one, two = trained_with("uni-instruct", divergence="rkl", gan_weight=0.0), trained_with("sid", alpha=0.5)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def test_before_the_ratio_is_learned_it_is_sida():
    """And with it rkl's discriminator, which only its GAN needs."""
    one, two = (trained_with(name, gan_from=10) for name in ("uni-instruct", "sida"))
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    three = trained_with("uni-instruct")
    assert not all(torch.equal(p, q) for p, q in zip(one, three, strict=True))


def test_what_it_needs():
    plan_run("a", "uni-instruct", ["a cat"], {"gan_weight": 0.0, "divergence": "rkl"})
    for options in ({}, {"divergence": "rkl"}, {"gan_weight": 0.0}):
        with pytest.raises(InputError, match="'uni-instruct' needs real images"):
            plan_run("a", "uni-instruct", ["a cat"], options)
    with pytest.raises(InputError, match=r"unknown divergence 'fk'\. Did you mean 'fkl'"):
        plan_run("a", "uni-instruct", ["a cat"], {"divergence": "fk"})


def test_from_a_narrow_start_fkl_covers_more_modes_than_js_and_js_more_than_rkl():
    """Fixture GMM-2D of the sheet."""
    run = {"prelude": 0, "gan_from": 0, "hi": 0.3, "limit": math.inf}
    covered = [gan_checks.covered(UniInstruct, "sid", d, **run) for d in ("fkl", "js", "rkl")]
    assert covered[0] > covered[1] > covered[2] >= 1, covered


def limited(cls):
    levelled(cls, limit=0.1)


def rows(divergence):
    return lambda cls: expanded(cls, divergence)


SOURCE = "onestroke.methods.score.uni_instruct"
MUTANTS = [
    ("(1 + change / h) / 2", "(1 - change / h) / 2", rows("pearson")),
    ("(1 + change / h) / 2", "torch.ones_like(h)", rows("js")),
    ("like(a / b, gap)", "like(a**2 / b, gap)", levelled),
    ("like(a / b, gap)", "like(0 * a, gap)", rows("fkl")),
    (") * slope)", ") * -slope)", rows("fkl")),
    (".clamp(-self.limit, self.limit)", "", limited),
    ("/ 2, h / mean", "/ 2, 1 / mean", levelled),
    ("yield from terms.level(ratio, t)", "ratio", levelled),
    ("h / mean", "h", levelled),
    ("(0.5, 1.0)", "(1.0, 1.0)", rows("rkl")),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).UniInstruct)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new).UniInstruct)
