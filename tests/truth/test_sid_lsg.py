"""SiD-LSG: SiD's loss with guidance in both networks, and through the fake in its training."""

from __future__ import annotations

import pytest
import torch

from onestroke.draws import Draws
from onestroke.methods.score.sid_lsg import SiDLSG
from onestroke.paths import Estimate
from truth import score_checks as checks
from truth.checks import F64, close, hand_ab, labels, make_path, tensor
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", checks.PATHS)
KAPPAS = {"kappa1": 3.0, "kappa2": 0.5, "kappa4": 2.0}


@each
@pytest.mark.parametrize("alpha", checks.ALPHAS)
def test_without_guidance_the_expected_gradient_is_sids(name, alpha):
    checks.sid_is_the_closed_form(SiDLSG, make_path(name), *hand_ab(name), alpha)


def guided(cls, name):
    """The run's scale on both, and scales of their own; alpha and scale are the published ones."""
    loss, at = checks.sid_loss(1.0, 1.0), (make_path(name), *hand_ab(name))
    checks.student_turn_is_the_finite_difference(cls, *at, loss, 3.0, (3.0, 3.0))
    checks.student_turn_is_the_finite_difference(cls, *at, loss, 3.0, (2.0, 0.5), **KAPPAS)


@each
def test_the_gradient_is_the_finite_difference(name):
    guided(SiDLSG, name)


@each
@pytest.mark.parametrize("kappa", [0.0, 1.0, 1.5, 4.5])
def test_nothing_moves_when_the_fake_is_the_teacher_under_one_guidance(name, kappa):
    """Sheet 7.2, item 7: zero for any kappa that all four share."""
    checks.zero_at_the_truth(SiDLSG, make_path(name), kappa)
    checks.zero_at_the_truth(SiDLSG, make_path(name), kappa, shift=-0.2)


@each
def test_gradient_flows_through_teacher_and_fake(name):
    checks.gradient_flows_through_teacher_and_fake(SiDLSG, make_path(name))


def fake(cls, name):
    """(eps^kappa1 - eps)^2 summed over D; in null rounds every guidance is the null prompt's."""
    at = (make_path(name), *hand_ab(name))
    checks.fake_turn_is_the_closed_form(cls, *at, 1.0, "eps", run=3.0, kappa=3.0, null_rate=0.0)
    checks.fake_turn_is_the_closed_form(cls, *at, 1.0, "eps", run=1.5, kappa=3.0, null_rate=0.0, **KAPPAS)
    checks.fake_turn_is_the_closed_form(cls, *at, 1.0, "eps", run=3.0, null=True, null_rate=1.0)


@each
def test_the_fake_learns_through_its_guidance(name):
    fake(SiDLSG, name)


def seen(cls, run, n=5000, **options):
    """(t, share of null prompts) of the fake's call in training, over n rows of class 0, and the student's share."""
    path, calls = make_path("vp"), []
    net = checks.two_classes(path, *checks.FAKE).requires_grad_(True)
    student = checks.Affine(path, tensor(0.4), tensor(0.8))
    for module in (net, student):
        module.register_forward_pre_hook(lambda module, args: calls.append((module, args[1], args[2]["label"])))
    method = cls(checks.parts(path, checks.two_classes(path, *checks.REAL), student, net, run), **options)
    list(method.step(checks.Batch(torch.zeros(n, 1, dtype=F64), labels(n, 0), Draws(0, 0, n)), 0))
    (_, _, drawn), (_, t, label) = calls[-2:]
    return t[:n], (label[:n] == -1).double().mean().item(), (drawn == -1).double().mean().item()


def published(cls):
    """A tenth of the fake's prompts is null, and its samples are drawn so; times of 20 to 979 of 1000."""
    t, share, drawn = seen(cls, 1.5)
    assert share == drawn == pytest.approx(0.1, abs=5 * 0.3 / 5000**0.5)
    assert 0.02 <= t.min() < 0.022
    assert 0.977 < t.max() <= 0.979
    assert seen(cls, 1.0)[1] == 0
    assert seen(cls, 1.0, kappa2=2.0)[1] > 0


def test_a_tenth_of_the_fakes_prompts_is_null_unless_nothing_guides_it():
    published(SiDLSG)


def test_a_fake_trained_through_its_guidance_makes_the_guided_teacher_the_target():
    """With the student at the law q and its fake at the least loss, D_psi^kappa = D_q: here q is one Gaussian and the
    fake a pair of nets that is right for it. The gradient is that of an unguided fake D_q against D_p^kappa."""
    kappa, path = 3.0, make_path("vp")
    q, null = (checks.gauss(path, *law) for law in ((0.4, 0.8), (0.1, 0.9)))

    class Best(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.null = q, null

        def forward(self, x, t, cond):
            yes, no = self.q(x, t, cond), self.null(x, t, cond)
            row = (cond["label"] < 0)[:, None]
            return Estimate(*(torch.where(row, n, n + (y - n) / kappa) for y, n in zip(yes[:2], no[:2], strict=True)))

    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(3), dtype=F64)
    found = []
    for net, options in ((Best(), {}), (q, {"kappa2": 1.0})):
        student = checks.Free(0.4 + 0.8 * z)
        given = checks.parts(path, checks.two_classes(path, *checks.REAL), student, net, kappa)
        found.append(checks.direction(SiDLSG(given, **options), student, z, e, labels(6, 0)))
    close(*found)
    assert (found[0].abs() > 1e-3).all()


# ---- do the checks notice? -----------------------------------------------------------------------------------

MUTANTS = [
    ("self.guide(self.teacher, self.kappa4)", "self.guide(self.teacher, self.kappa2)", guided),
    ("self.guide(self.fake, self.kappa2)", "self.guide(self.fake, self.kappa1)", guided),
    ("self.guide(self.fake, self.kappa1)", "self.guide(self.fake, self.kappa2)", fake),
    ("alpha: float = 1.0", "alpha: float = 1.2", guided),
    ("scale: float = 1.0", "scale: float = 100.0", guided),
    ('draw, reduce="sum")', 'draw, space="x0", reduce="sum")', fake),
    ("hi: float = 0.979", "hi: float = 0.98", published),
    ("null_rate: float = 0.1", "null_rate: float = 0.2", published),
    ("self.kappa1 == self.kappa2 == 1", "self.kappa1 == 1", published),
    ("cond = dropped(", "_ = dropped(", published),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    given = () if check is published else ("vp",)
    check(broken("onestroke.methods.score.sid_lsg", old, old).SiDLSG, *given)
    with pytest.raises(AssertionError):
        check(broken("onestroke.methods.score.sid_lsg", old, new).SiDLSG, *given)
