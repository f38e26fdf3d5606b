"""Decoupled DMD against the sheet's closed forms: DMD's direction in two terms, each at its own level."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from onestroke.draws import Draws
from onestroke.method import Batch
from onestroke.methods.distribution.decoupled_dmd import DecoupledDMD
from onestroke.paths import VP
from onestroke.sampling import FewStep
from truth import score_checks, vector_checks
from truth.checks import F64, Free, Given, close, hand_ab, labels, make_path, parts, two_classes
from truth.score_checks import FAKE, REAL, direction, guided_x0
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)


def closed(cls, name="flow"):
    """Without guidance: DMD's."""
    vector_checks.is_the_closed_form(cls, make_path(name), *hand_ab(name))


def reduction(cls, name="vp"):
    vector_checks.has_its_reduction(cls, make_path(name), *hand_ab(name), None, "mean")


def fixture(cls, name, run, fake=FAKE, x=None):
    """(method, student, x, z, e) on the two classes."""
    path, (z, e) = make_path(name), torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)
    x = 0.4 + 0.8 * z if x is None else x
    student = Free(x)
    return cls(parts(path, two_classes(path, *REAL), student, two_classes(path, *fake), run)), student, x, z, e


def coupled(cls, name="edm"):
    """Equal levels and noise: (D_fake - D_guided teacher) / mean |x - D_teacher|, DMD's numerator exactly."""
    (a, b), (method, student, x, z, e) = hand_ab(name), fixture(cls, name, 3.5)
    g = direction(method, student, z, e, labels(6, 0))
    guided, plain, fake = (guided_x0(x, e, a, b, *law) for law in ((REAL, 3.5), (REAL, 1.0), (FAKE, 1.0)))
    close(g, (fake - guided) / (x - plain).abs())


def decoupled(cls, name="flow"):
    """Two levels and two noises: each term reads its own."""
    (method, student, x, z, e), levels = fixture(cls, name, 3.5), [0.6, 0.3]

    def uniform(draw, path, lo=0.0, hi=1.0):
        return torch.full((draw.size,), levels.pop(0), dtype=F64)

    with mock.patch("onestroke.times.uniform", uniform):
        turn = next(method.step(Batch(z, labels(6, 0), Given(e, 0.5 * e)), 0))
        sum(turn.terms.values()).backward()
    assert set(turn.terms) == {"dm", "ca"}
    real, fake = (guided_x0(x, e, *hand_ab(name, 0.6), law, 1.0) for law in (REAL, FAKE))
    yes, no = (guided_x0(x, 0.5 * e, *hand_ab(name, 0.3), REAL, kappa) for kappa in (1.0, 0.0))
    close(student.x.grad * 6, (fake - real) / (x - real).abs() + 2.5 * (no - yes) / (x - yes).abs())


def levels(cls):
    """Of four steps: matching anywhere, augmentation below the level of the step's input, by the null at last."""
    path, found = VP(), set()
    for step in range(8):
        k = int(Draws(0, step, 4000).shared() * 4)
        few = FewStep(path, path.grid(4))
        student, teacher, fake = vector_checks.seen(cls, path, step, run=3.5, few=few, ttur=1)
        matching, augmentation, again = teacher.times
        vector_checks.is_uniform(matching, 0.001, 1.0)
        vector_checks.is_uniform(augmentation, 0.001, few.times[k])
        vector_checks.is_uniform(fake.times[1], 0.001, 1.0)
        assert torch.equal(augmentation, again)
        assert [t[0].item() for t in student.times] == list(few.times[: k + 1])
        assert torch.equal(matching, fake.times[0])
        assert [c.unique().tolist() for c in teacher.labels] == [[0], [0], [-1]]
        found.add(k)
    assert len(found) > 2


def fake(cls, name="edm"):
    a, b = hand_ab(name)
    score_checks.fake_turn_is_the_closed_form(cls, make_path(name), a, b, 1.0, "x0", run=3.5, fresh=False, normals=2)


def schedule(cls):
    """The student plays in rounds 0, 5, 10 and records gradient in no other."""
    method, _, _, z, _ = fixture(cls, "vp", 1.0)
    played = [[t.player for t in method.step(Batch(z, labels(6, 0), Draws(0, i, 6)), i)] for i in range(11)]
    assert played == [["student", "fake"] if i % 5 == 0 else ["fake"] for i in range(11)]


@each
@pytest.mark.parametrize("check", [closed, reduction, coupled, decoupled, fake])
def test_the_turns_are_the_closed_forms(check, name):
    check(DecoupledDMD, name)


@pytest.mark.parametrize("check", [levels, schedule])
def test_levels_and_schedule_are_the_published_ones(check):
    check(DecoupledDMD)


@each
def test_matching_vanishes_when_the_fake_has_the_teachers_law(name):
    score_checks.zero_at_the_truth(DecoupledDMD, make_path(name), 1.0)
    score_checks.zero_at_the_truth(DecoupledDMD, make_path(name), 1.0, shift=-0.2)


@each
def test_augmentation_alone_has_no_end(name):
    """Sheet 16, item 7: with the fake at the teacher's law only it is left, and it moves every sample of the right
    class further right, however far it is."""
    x = torch.tensor([-2.0, -0.5, 0.0, 0.9, 2.0, 4.0], dtype=F64)[:, None]
    method, student, _, z, e = fixture(DecoupledDMD, name, 3.5, REAL, x)
    assert (direction(method, student, z, e, labels(6, 0)) < 0).all()


SOURCE = "onestroke.methods.distribution.decoupled_dmd"
MUTANTS = [
    ("* (fake - real)", "* (real - fake)", closed),
    ("* (null - real)", "* (real - null)", coupled),
    ("(self.scale - 1)", "self.scale", coupled),
    ("x) * (fake - real)", "x) * 3 * (fake - real)", reduction),
    ("self.teacher(xt, t, cond).x0, self.fake(xt", "self.guide(self.teacher)(xt, t, cond).x0, self.fake(xt", coupled),
    ("self.guide(self.teacher, 0)", "self.guide(self.teacher)", coupled),
    ("hi=self.few.times[k]", "hi=1.0", levels),
    ("hi=self.few.times[k]", "lo=self.few.times[k]", levels),
    ("cond, draw, k)", "cond, draw)", levels),
    ('space="x0"', 'space="eps"', fake),
    ("step % self.ttur == 0", "step % self.ttur == 1", schedule),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).DecoupledDMD)
    with pytest.raises((AssertionError, ValueError, StopIteration)):
        check(broken(SOURCE, old, new).DecoupledDMD)
