"""Diff-Instruct against the sheet's closed forms."""

from __future__ import annotations

import pytest

from onestroke.methods.distribution.diff_instruct import DiffInstruct
from onestroke.paths import EDM
from truth import score_checks, vector_checks
from truth.checks import hand_ab, make_path
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)


def closed(cls, name="edm"):
    vector_checks.is_the_closed_form(cls, make_path(name), *hand_ab(name), 1.0)


def typed(cls, name="vp"):
    """A run's guidance guides the teacher alone."""
    for run in (1.0, 3.0):
        vector_checks.is_the_hand_typed_direction(cls, make_path(name), *hand_ab(name), 1.0, run, (run, 1.0))


def reduction(cls, name="vp"):
    vector_checks.has_its_reduction(cls, make_path(name), *hand_ab(name), 1.0, "sum")


def fake(cls, name="vp"):
    a, b = hand_ab(name)
    weight = (b**2 / a**2 + 0.25) / (0.5 * b / a) ** 2
    score_checks.fake_turn_is_the_closed_form(cls, make_path(name), a, b, weight, "x0", run=3.0)


def laws(cls):
    """log sigma of both turns: N(-1.2, 1.2^2)."""
    path = EDM()
    _, teacher, fake = vector_checks.seen(cls, path)
    assert len(teacher.times) == 1
    assert len(fake.times) == 2
    for t in (*teacher.times, *fake.times):
        vector_checks.is_normal(-path.log_snr(t), -1.2, 1.2)


@each
@pytest.mark.parametrize("check", [closed, typed, reduction, fake])
def test_the_turns_are_the_closed_forms(check, name):
    check(DiffInstruct, name)


@each
def test_nothing_moves_when_the_fake_has_the_teachers_law(name):
    score_checks.zero_at_the_truth(DiffInstruct, make_path(name), 1.0)
    score_checks.zero_at_the_truth(DiffInstruct, make_path(name), 1.0, shift=-0.2)


def test_times_are_the_published_ones():
    laws(DiffInstruct)


SOURCE = "onestroke.methods.distribution.diff_instruct"
MUTANTS = [
    ("fake - real", "real - fake", closed),
    ("self.guide(self.teacher)(xt", "self.teacher(xt", typed),
    ("self.fake(xt, t, cond).x0", "self.guide(self.fake)(xt, t, cond).x0", typed),
    ("xt = self.path.mix(x, draw.normal(x), t)", "xt = self.path.mix(x, 0 * draw.normal(x), t)", typed),
    ('fake - real, "sum")', "fake - real)", reduction),
    ("draw.normal(batch.noise), cond)", "0 * draw.normal(batch.noise) + batch.noise, cond)", fake),
    ('space="x0"', 'space="eps"', fake),
    ("sigma_data: float = 0.5", "sigma_data: float = 1.0", fake),
    ("mean: float = -1.2", "mean: float = -1.0", laws),
    ("std: float = 1.2", "std: float = 1.0", laws),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).DiffInstruct)
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new).DiffInstruct)
