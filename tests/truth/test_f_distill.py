"""f-distill: every divergence against its own finite difference, its two normalisations, and what it covers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from contract.build import batch as small_batch
from contract.build import build, data
from onestroke import terms
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch, play
from onestroke.methods.distribution.f_distill import FDistill
from onestroke.run import plan_run
from truth import gan_checks
from truth.checks import F64, Free, Given, T, close, hand_ab, labels, make_path, tensor, turns_of
from truth.gan_checks import gan_parts, log_ratio
from truth.score_checks import MU, TAU, M, S, at, gauss, posterior
from truth.test_mutants import broken

F = {
    "rkl": lambda r: -torch.log(r),
    "fkl": lambda r: r * torch.log(r),
    "jeffreys": lambda r: (r - 1) * torch.log(r),
    "js": lambda r: r * torch.log(r) - (r + 1) * torch.log((r + 1) / 2),
    "hellinger": lambda r: (1 - r.sqrt()) ** 2,
    "soft-rkl": lambda r: (r + 1) * torch.log((r + 1) / r),
    "neyman": lambda r: (1 - r) ** 2 / r,
    "pearson": lambda r: (r - 1) ** 2,
}
"""f(r) of the divergences, sheet 9."""
divergences = pytest.mark.parametrize("divergence", F)


def identity(module, divergence):
    """Identity I1: d/d(mu, s) of E_q f(p_t / q_t) is - E h(r) (s_p - s_q) d x_t / d(mu, s), by Gauss-Hermite.

    A teacher narrower than the student keeps every expectation finite but Neyman's, for which they trade places.
    """
    a, b, m, mu = 1.0, 0.7, 0.3, 0.5
    tau, s = (1.0, 0.9) if divergence == "neyman" else (0.9, 1.0)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(120))
    weights = weights / weights.sum()

    def log_normal(x, mean, variance):
        return -((x - mean) ** 2) / (2 * variance) - 0.5 * torch.log(torch.as_tensor(variance, dtype=F64))

    def value(mu, s):
        p, q = a**2 * tau**2 + b**2, a**2 * s**2 + b**2
        x = a * mu + math.sqrt(q) * nodes
        return (weights * F[divergence]((log_normal(x, a * m, p) - log_normal(x, a * mu, q)).exp())).sum()

    step = 1e-5
    want = [
        (value(mu + step, s) - value(mu - step, s)) / (2 * step),
        (value(mu, s + step) - value(mu, s - step)) / (2 * step),
    ]
    p, q = a**2 * tau**2 + b**2, a**2 * s**2 + b**2
    x = a * mu + math.sqrt(q) * nodes
    ratio = (log_normal(x, a * m, p) - log_normal(x, a * mu, q)).exp()
    force = -module.DIVERGENCES[divergence](ratio) * (-(x - a * m) / p + (x - a * mu) / q)
    z = a * s * (x - a * mu) / q  # E[z | x_t]
    close((weights * force * a).sum(), want[0], rtol=1e-6, atol=1e-9)
    close((weights * force * a * z).sum(), want[1], rtol=1e-6, atol=1e-9)


def direction_of(cls, divergence, name="edm", **options):
    """(g, g by hand but for h, r by hand) of the student's turn at one time, in two dimensions."""
    path, (a, b) = make_path(name), hand_ab(name)
    z, e = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(5), dtype=F64)
    x = MU + S * z
    student = Free(x)
    method = cls(
        gan_parts(path, gauss(path, M, TAU, 2), student, gauss(path, MU, S, 2)), divergence=divergence, **options
    )
    with at(T):
        turn = next(turns_of(method, Batch(z, labels(6), Given(e, e, e, e, e), x)))
    (g,) = torch.autograd.grad(turn.terms["dm"], student.x)
    real, _, fake, _ = posterior(x, e, a, b)
    plain = (fake - real) / (x - real).abs().mean(1, keepdim=True) / (6 * 2)
    return g, plain, log_ratio(a * x + b * e, a, b)[0].exp().clamp(0.1, 20)


def weighed(cls, divergence="js", name="edm"):
    """h at the ratio over its mean (all samples are of one time), over the mean of h."""
    g, plain, ratio = direction_of(cls, divergence, name)
    h = terms.DIVERGENCES[divergence](ratio / ratio.mean())
    close(g, (h / h.mean())[:, None] * plain)


def both_means(module):
    """The bins have mean 1 over the whole batch, whose parts answer together; a bin without samples breaks nothing."""
    ratio, t = 0.1 + torch.arange(8, dtype=F64), tensor(0.0, 0.05, 0.31, 0.33, 0.38, 0.99, 1.0, 1.0)
    parts = [module.level(ratio[::2], t[::2]), module.level(ratio[1::2], t[1::2])]
    answer = torch.stack([next(game).value for game in parts]).mean(0)
    found = torch.zeros(8, dtype=F64)
    for i, game in enumerate(parts):
        with pytest.raises(StopIteration) as end:
            game.send(answer)
        found[i::2] = end.value.value
    want = [ratio[:2], ratio[2:5], ratio[5:]]
    close(found, torch.cat([r / r.mean() for r in want]))


def clipped(module):
    close(module.ratio(tensor([0.0, 0.2], [9.0, 90.0], [-9.0, -5.0])), tensor(math.exp(0.1), 20.0, 0.1))


@divergences
def test_the_weights_are_those_of_the_divergence(divergence):
    identity(terms, divergence)


@divergences
def test_samples_are_weighed_by_their_ratio(divergence):
    for name in ("vp", "edm", "flow"):
        weighed(FDistill, divergence, name)


def test_the_normalisations():
    both_means(terms)
    clipped(terms)


def test_the_weight_asks_the_whole_batch():
    """Two micro-batches are weighed as one: the gradients of a round are those of the one batch."""
    grads = []
    for size, count in ((8, 1), (4, 2)):
        method = build("f-distill", divergence="fkl", guidance=1.0)
        rows = [Draws(0, 0, size, i * size, 8) for i in range(count)]
        play(method, [data().batch(draw, torch.device("cpu")) for draw in rows], 0, lambda player: None)
        grads.append([p.grad for p in method.student.parameters()])
    for one, two in zip(*grads, strict=True):
        close(one, two, rtol=1e-10)


def test_rkl_is_dmd2_bit_for_bit():
    same = {"ttur": 2, "gan_weight": 5e-3}
    found = []
    for name, options in (("dmd2", same), ("f-distill", {**same, "divergence": "rkl"})):
        method = build(name, **options)
        optimisers = {p: torch.optim.Adam(getattr(method, p).parameters(), 1e-2) for p in method.players}

        def update(player, optimisers=optimisers):
            optimisers[player].step()
            optimisers[player].zero_grad()

        for step in range(4):
            play(method, [small_batch(step=step)], step, update)
        found.append([p for player in method.players for p in getattr(method, player).parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_divergence_without_its_discriminator_is_refused_at_once():
    for name in set(F) - {"rkl"}:
        with pytest.raises(InputError, match=f"divergence='{name}' needs the discriminator; set gan_weight above 0"):
            plan_run("a", "f-distill", ["a cat"], {"gan_weight": 0.0, "divergence": name})
    plan_run("a", "f-distill", ["a cat"], {"gan_weight": 0.0, "divergence": "rkl"})
    with pytest.raises(InputError, match=r"unknown divergence 'jz'\. Did you mean 'js'"):
        plan_run("a", "f-distill", ["a cat"], {"divergence": "jz"})


# ---- what a divergence covers --------------------------------------------------------------------------------


def test_from_a_narrow_start_fkl_covers_more_modes_than_js_and_js_more_than_rkl():
    """Fixture GMM-2D of the sheet."""
    covered = [gan_checks.covered(FDistill, "dm", d, ttur=1, gan_weight=1.0, hi=0.3) for d in ("fkl", "js", "rkl")]
    assert covered[0] > covered[1] > covered[2] >= 1
    assert covered[0] == 8


# ---- do the checks notice? -----------------------------------------------------------------------------------


def with_source(check):
    return lambda module: check(module.FDistill)


def rows(divergence):
    return lambda module: identity(module, divergence)


SOURCE, TERMS = "onestroke.methods.distribution.f_distill", "onestroke.terms"
MUTANTS = [
    (SOURCE, "h / (yield Mean(h.mean()))", "h", with_source(weighed)),
    (SOURCE, "x) * direction\n", "x)\n", with_source(weighed)),
    (SOURCE, "yield from terms.level(terms.ratio(fake.features[0]), t)", "terms.ratio(fake.features[0])",
     with_source(weighed)),
    (SOURCE, "DIVERGENCES[self.divergence](ratio)", "DIVERGENCES[self.divergence](1 / ratio)", with_source(weighed)),
    (TERMS, "lambda r: r / (1 + r)", "lambda r: 1 / (1 + r)", rows("js")),
    (TERMS, '"jeffreys": lambda r: 1 + r', '"jeffreys": lambda r: 1 + 2 * r', rows("jeffreys")),
    (TERMS, "r.sqrt() / 2", "r.sqrt()", rows("hellinger")),
    (TERMS, "2 / r,", "1 / r,", rows("neyman")),
    (TERMS, "2 * r**2", "r**2", rows("pearson")),
    (TERMS, ".exp().clamp(0.1, 20)", ".exp()", clipped),
    (TERMS, "wide).mean(1)", "wide).sum(1)", clipped),
    (TERMS, "(t * bins).long()", "(t * bins).round().long()", both_means),
    (TERMS, "slot.sum(0)])", "slot.mean(0)])", both_means),
]  # fmt: skip


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(module, old, new, check):
    check(broken(module, old, old))
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        check(broken(module, old, new))
