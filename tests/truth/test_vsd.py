"""VSD and SDS, which differ by the fake score, against the sheet's closed forms."""

from __future__ import annotations

import pytest
import torch

from onestroke.methods.distribution.sds import SDS
from onestroke.methods.distribution.vsd import VSD
from onestroke.paths import VP
from truth import score_checks, vector_checks
from truth.checks import F64, Free, close, fourfold, hand_ab, labels, make_path, parts, two_classes
from truth.score_checks import MU, REAL, TAU, M, S, direction, gauss, guided_x0
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)


def weight(name):
    """Sheet 0.6: alpha sigma of the variance-preserving point."""
    a, b = hand_ab(name)
    return a * b / (a**2 + b**2)


# ---- VSD -----------------------------------------------------------------------------------------------------


def closed(cls, name="flow"):
    vector_checks.is_the_closed_form(cls, make_path(name), *hand_ab(name), weight(name))


def typed(cls, name="edm"):
    """A run's guidance guides the teacher alone."""
    for run in (1.0, 7.5):
        vector_checks.is_the_hand_typed_direction(cls, make_path(name), *hand_ab(name), weight(name), run, (run, 1.0))


def reduction(cls, name="vp"):
    vector_checks.has_its_reduction(cls, make_path(name), *hand_ab(name), weight(name), "sum")


def fake(cls, name="edm"):
    """The error of v = alpha eps - sigma x0 is 1 / sigma^2 of that of x0, on the student's own sample."""
    a, b = hand_ab(name)
    score_checks.fake_turn_is_the_closed_form(cls, make_path(name), a, b, (a**2 + b**2) / b**2, "x0", 7.5, fresh=False)


def laws(cls):
    """The student looks at [0.02, 0.98] and from round 5000 at [0.02, 0.5]; the fake learns everywhere."""
    for step, hi in ((0, 0.98), (4999, 0.98), (5000, 0.5)):
        _, teacher, fake = vector_checks.seen(cls, VP(), step)
        assert torch.equal(teacher.times[0], fake.times[0])
        vector_checks.is_uniform(teacher.times[0], 0.02, hi)
        vector_checks.is_uniform(fake.times[1], 0.001, 1.0)


@each
@pytest.mark.parametrize("check", [closed, typed, reduction, fake])
def test_the_turns_of_vsd_are_the_closed_forms(check, name):
    check(VSD, name)


@each
def test_nothing_moves_when_the_fake_has_the_teachers_law(name):
    score_checks.zero_at_the_truth(VSD, make_path(name), 1.0)
    score_checks.zero_at_the_truth(VSD, make_path(name), 1.0, shift=-0.2)


def test_times_of_vsd_are_the_published_ones():
    laws(VSD)


def test_vsd_error_on_the_variance_preserving_path_is_that_of_v():
    """The identity behind its fake's weight, by the path's own v."""
    path, t = VP(), torch.tensor([0.3, 0.7], dtype=F64)
    x0, eps, other = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    a, b = (c[:, None] for c in path.ab(t))
    error = path.join(x0, eps, t, "v") - path.join(other, (a * x0 + b * eps - a * other) / b, t, "v")
    close(error.square(), (x0 - other).square() / b**2)


# ---- SDS -----------------------------------------------------------------------------------------------------


def sds_closed(cls, name="vp"):
    """Sheet 3, item 7: E[g] = w b^2 (mu - m) / P, and E[g z] = w b^2 s / P > 0: any spread shrinks, whatever the
    teacher's; no fake, no limit."""
    (a, b), (z, e), path = hand_ab(name), fourfold(1), make_path(name)
    student = Free(MU + S * z)
    g = direction(cls(parts(path, gauss(path, M, TAU), student, None)), student, z, e, labels(4)) / weight(name)
    p = a**2 * TAU**2 + b**2
    close(g.mean(), b**2 * (MU - M) / p)
    close((g * z).mean(), b**2 * S / p)


def sds_typed(cls, name="edm"):
    """VSD's direction with the fake a Dirac at the sample itself, D_fake = x, under guidance."""
    (a, b), path = hand_ab(name), make_path(name)
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)
    student = Free(0.4 + 0.8 * z)
    method = cls(parts(path, two_classes(path, *REAL), student, None, 100.0))
    x = student.x.detach()
    g = direction(method, student, z, e, labels(6, 0))
    close(g, weight(name) * (x - guided_x0(x, e, a, b, REAL, 100.0)))


def sds_reduction(cls, name="vp"):
    """The sum over D; zero only where the sample is its own posterior mean, the mode."""
    z, e = fourfold(3)
    (a, b), path, student = hand_ab(name), make_path(name), Free(MU + S * z)
    g = direction(cls(parts(path, gauss(path, M, TAU, 3), student, None)), student, z, e, labels(4))
    close(g.mean(0), [weight(name) * b**2 * (MU - M) / (a**2 * TAU**2 + b**2)] * 3)
    student = Free(torch.full_like(z, M))
    g = direction(cls(parts(path, gauss(path, M, TAU, 3), student, None)), student, z, e, labels(4))
    close(g.mean(0), [0.0] * 3)


def sds_laws(cls):
    _, teacher, _ = vector_checks.seen(cls, VP())
    vector_checks.is_uniform(teacher.times[0], 0.02, 0.98)


@each
@pytest.mark.parametrize("check", [sds_closed, sds_typed, sds_reduction])
def test_the_turn_of_sds_is_the_closed_form(check, name):
    check(SDS, name)


def test_times_of_sds_are_the_published_ones():
    sds_laws(SDS)


# ---- do the checks notice? -----------------------------------------------------------------------------------

FOLDER = "onestroke.methods.distribution."
MUTANTS = [
    ("VSD", "real.eps - fake.eps", "fake.eps - real.eps", closed),
    ("VSD", "sigma**2 *", "sigma *", closed),
    ("VSD", "sigma = like(self.path.unit_ab(t)[1], x)", "sigma = like(self.path.ab(t)[1], x)", closed),
    ("VSD", "self.guide(self.teacher)(xt", "self.teacher(xt", typed),
    ("VSD", "self.fake(xt, t, cond)", "self.guide(self.fake)(xt, t, cond)", typed),
    ("VSD", '(real.eps - fake.eps), "sum")', "(real.eps - fake.eps))", reduction),
    ("VSD", "self.path.unit_ab(t)[1] ** -2", "self.path.unit_ab(t)[0] ** -2", fake),
    ("VSD", "self.path.unit_ab(t)[1] ** -2", "self.path.ab(t)[1] ** -2", fake),
    ("VSD", "annealed_hi: float = 0.5", "annealed_hi: float = 0.6", laws),
    ("VSD", "step < self.anneal", "step <= self.anneal", laws),
    ("SDS", "(real.eps - eps)", "(eps - real.eps)", sds_closed),
    ("SDS", "sigma**2 *", "sigma *", sds_closed),
    ("SDS", "self.guide(self.teacher)(", "self.teacher(", sds_typed),
    ("SDS", '(real.eps - eps), "sum")', "(real.eps - eps))", sds_reduction),
    ("SDS", "hi: float = 0.98", "hi: float = 1.0", sds_laws),
]


@pytest.mark.parametrize(("cls", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(cls, old, new, check):
    source = FOLDER + cls.lower()
    check(getattr(broken(source, old, old), cls))
    with pytest.raises(AssertionError):
        check(getattr(broken(source, old, new), cls))
