"""DMD against the sheet's closed forms: the matching, and the regression on pairs."""

from __future__ import annotations

import pytest
import torch

from onestroke.errors import InputError
from onestroke.method import Batch, Pairs
from onestroke.methods.distribution.dmd import DMD
from onestroke.paths import EDM
from onestroke.run import plan_run
from truth import score_checks, vector_checks
from truth.checks import F64, Affine, Given, close, hand_ab, labels, make_path, parts, tensor
from truth.score_checks import MU, TAU, M, S, at, gauss
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)
PLAIN = {"reg_weight": 0.0}


def closed(cls, name="edm"):
    """alpha is 1 there."""
    vector_checks.is_the_closed_form(cls, make_path("edm"), *hand_ab("edm"), **PLAIN)
    vector_checks.has_its_reduction(cls, make_path("edm"), *hand_ab("edm"), None, "mean", **PLAIN)


def typed(cls, name="vp"):
    """alpha over the mean of |x - D_p| of the guided teacher; the fake is not guided."""
    a, b = hand_ab(name)
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)  # as the check draws them
    for run in (1.0, 3.0):
        x = 0.4 + 0.8 * z
        weight = a / (x - score_checks.guided_x0(x, e, a, b, score_checks.REAL, run)).abs()
        vector_checks.is_the_hand_typed_direction(cls, make_path(name), a, b, weight, run, (run, 1.0), **PLAIN)


def fake(cls, name="vp"):
    score_checks.fake_turn_is_the_closed_form(
        cls, make_path(name), *hand_ab(name), 1.0, "eps", run=3.0, fresh=False, **PLAIN
    )


def regression(cls, name="vp", c: float = 0.00054):
    """0.25 of the mean of sqrt(mean_D (mu + s z - y)^2 + c^2) - c, at the noise of the pairs."""
    path, dim = make_path(name), 3
    z, e, noise, y, e2 = torch.randn(5, 6, dim, generator=torch.Generator().manual_seed(31), dtype=F64)
    student = Affine(path, torch.full((dim,), MU, dtype=F64), torch.full((dim,), S, dtype=F64))
    method = cls(parts(path, gauss(path, M, TAU, dim), student, gauss(path, MU, S, dim)))
    with at(0.4):
        turn = next(method.step(Batch(z, labels(6), Given(e, e2), pairs=Pairs(noise, y)), 0))
    gap = MU + S * noise - y
    size = (gap.square().mean(1) + c**2).sqrt()
    close(turn.terms["reg"], 0.25 * (size - c).mean())
    (grad,) = torch.autograd.grad(turn.terms["reg"], student.mu)
    close(grad, (0.25 / 6) * (gap / size[:, None] / dim).sum(0))


def laws(cls):
    _, teacher, fake = vector_checks.seen(cls, EDM(), **PLAIN)
    (t,), (again, everywhere) = teacher.times, fake.times
    assert torch.equal(t, again)
    vector_checks.is_uniform(t, 0.02, 0.98)
    vector_checks.is_uniform(everywhere, 0.0, 1.0)


@each
@pytest.mark.parametrize("check", [closed, typed, fake, regression])
def test_the_turns_are_the_closed_forms(check, name):
    check(DMD, name)


def test_times_are_the_published_ones():
    laws(DMD)


@each
def test_nothing_moves_when_the_fake_has_the_teachers_law(name):
    for shift in (0.0, -0.2):
        score_checks.zero_at_the_truth(DMD, make_path(name), 1.0, shift, **PLAIN)


def test_pairs_that_fit_stop_the_regression():
    """A student that answers with the pairs' pictures is at rest: the distance is smooth at zero."""
    path, z = EDM(), torch.randn(4, 1, generator=torch.Generator().manual_seed(32), dtype=F64)
    student = Affine(path, tensor(MU), tensor(S))
    method = DMD(parts(path, gauss(path, M, TAU), student, gauss(path, MU, S)))
    turn = next(method.step(Batch(z, labels(4), Given(z, z), pairs=Pairs(z, MU + S * z)), 0))
    assert turn.terms["reg"].abs() < 1e-15
    assert torch.autograd.grad(turn.terms["reg"], student.mu)[0].abs() < 1e-9


def test_without_a_regression_prompts_are_enough():
    recipe, *_ = plan_run("a", "dmd", ["a cat"], PLAIN)
    assert recipe.options == PLAIN
    with pytest.raises(InputError, match="'dmd' needs no pairs"):
        plan_run("a", "dmd", ["a cat"], PLAIN, None, True)


SOURCE = "onestroke.methods.distribution.dmd"
MUTANTS = [
    ("terms.gap_weight(x, real)", "terms.gap_weight(x, fake)", typed),
    ("self.path.ab(t)[0].to(x) * terms", "terms", typed),
    ("(fake - real)", "(real - fake)", closed),
    ("self.guide(self.teacher)(xt, t, cond)", "self.teacher(xt, t, cond)", typed),
    ("self.fake(xt, t, cond)", "self.guide(self.fake)(xt, t, cond)", typed),
    ("reg_weight: float = 0.25", "reg_weight: float = 0.5", regression),
    ("batch.pairs.noise, cond)", "batch.noise, cond)", regression),
    ("c: float = 0.00054", "c: float = 0.1", regression),
    ("x.detach(), cond, t, draw", "x.detach() + 1, cond, t, draw", fake),
    ("draw, self.path, self.lo, self.hi)", "draw, self.path)", laws),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).DMD)
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new).DMD)
