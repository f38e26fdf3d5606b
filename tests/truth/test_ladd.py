"""LADD against hand-typed GAN gradients on exact Gaussians, and its levels."""

from __future__ import annotations

import math

import pytest
import torch

from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.adversarial.ladd import LADD
from onestroke.paths import Flow
from onestroke.sampling import FewStep
from truth import adversarial_checks as checks
from truth.checks import F64, Free, close, hand_ab, labels, make_path
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", ["vp", "edm", "flow"])
losses = pytest.mark.parametrize("loss", ["hinge", "softplus"])


@each
def test_the_student_descends_the_logit_of_its_noised_sample(name):
    checks.student_descends_the_logit(LADD, make_path(name), *hand_ab(name))


@each
def test_the_heads_descend_the_hinge(name):
    checks.heads_descend_the_hinge(LADD, make_path(name), *hand_ab(name))


@each
@losses
def test_the_fixed_point_is_the_first_two_moments(name, loss):
    checks.fixed_point_is_the_first_two_moments(LADD, make_path(name), *hand_ab(name), loss)


def test_beyond_the_margins_the_heads_rest():
    """Real logits above 1 and fake ones below -1 leave no gradient at all."""
    z, _, normals = checks.samples()
    path, (a, b) = make_path("vp"), hand_ab("vp")
    heads = checks.Linear((1.0, 0.0), 0.0)
    method = checks.made(LADD, path, Free(-20 + 0 * z), heads=heads)
    terms = checks.play(method, z, 20 + 0 * z, normals)
    assert a * 20 - b * normals.abs().max() > 1
    assert terms["heads"]["gan"] == 0
    w, c = checks.grads(terms["heads"]["gan"], heads.w, heads.c)
    assert (w == 0).all()
    assert c == 0


# ---- levels --------------------------------------------------------------------------------------------------------


def levels(cls, step, count=4, size=40_000):
    method = checks.made(cls, Flow(), Free(torch.zeros(1, 1)), steps=count)
    found = torch.bincount(method.call(Draws(0, step, size), step), minlength=count) / size
    return found.tolist()


def published_levels(module):
    """(0, 0, 1/2, 1/2) for 500 rounds, then (.7, .1, .1, .1); five deviations of a count are 0.0125 at most."""
    for step, want in ((0, (0, 0, 0.5, 0.5)), (499, (0, 0, 0.5, 0.5)), (500, (0.7, 0.1, 0.1, 0.1))):
        assert levels(module.LADD, step) == pytest.approx(want, abs=0.0125)
        assert [w > 0 for w in levels(module.LADD, step)] == [w > 0 for w in want]


def test_the_levels_are_the_published_ones():
    from onestroke.methods.adversarial import ladd

    published_levels(ladd)
    for step in (0, 600):
        assert levels(LADD, step, count=1) == [1.0]
    assert levels(LADD, 600, count=2) == pytest.approx([0.7, 0.3], abs=0.0125)


@each
def test_the_input_of_a_call_is_noised_data_and_of_the_first_noise(name):
    path = make_path(name)
    few = FewStep(path, path.grid(4))
    x0, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    x, t = few.noised(x0, noise, torch.arange(4))
    close(t, few.times)
    for k in range(4):
        a, b = hand_ab(name, few.times[k])
        close(x[k], math.hypot(a, b) * noise[k] if k == 0 else a * x0[k] + b * noise[k], rtol=1e-7)


def noised_as_published(module):
    """log(b / a) of the time the teacher reads at: N(1, 1); five deviations of the moments of 4000."""
    seen = []

    class Spy(checks.Seen):
        def forward(self, x, t, cond):
            seen.append(t)
            return super().forward(x, t, cond)

    path = make_path("edm")
    method = checks.made(module.LADD, path, Free(torch.zeros(4000, 1, dtype=F64)))
    method.teacher = Spy(method.teacher.net)
    z = torch.zeros(4000, 1, dtype=F64)
    list(method.step(Batch(z, labels(4000), Draws(0, 0, 4000), z), 0))
    student, real, fake = seen
    assert torch.equal(real, fake)
    assert not torch.equal(student, real)
    for t in (student, real):
        level = -path.log_snr(t)
        assert level.mean().item() == pytest.approx(1, abs=5 / 4000**0.5)
        assert level.std().item() == pytest.approx(1, abs=5 / 8000**0.5)


def test_the_noising_is_the_published_one():
    from onestroke.methods.adversarial import ladd

    noised_as_published(ladd)


def test_an_unknown_loss_is_refused():
    with pytest.raises(InputError, match="unknown GAN loss 'hing'"):
        checks.made(LADD, Flow(), Free(torch.zeros(1, 1)), loss="hing")


# ---- do the checks notice? -----------------------------------------------------------------------------------------


def student(module):
    checks.student_descends_the_logit(module.LADD, make_path("vp"), *hand_ab("vp"))


def heads(module):
    checks.heads_descend_the_hinge(module.LADD, make_path("vp"), *hand_ab("vp"))


MUTANTS = [
    ("self.mix(x, draw.normal(x), t)".replace("self.", "self.path."), "x", student),
    ("terms.gan_student(self", "-terms.gan_student(self", student),
    ("with frozen(self.teacher, self.heads)", "with frozen(self.teacher)", student),
    ("with frozen(self.teacher, self.heads)", "with frozen(self.heads)", student),
    (
        "self.judge(real, cond, t, draw), self.judge(x.detach(), cond, t, draw)",
        "self.judge(x.detach(), cond, t, draw), self.judge(real, cond, t, draw)",
        heads,
    ),
    ("self.judge(x.detach(),", "self.judge(x,", heads),
    ('loss: str = "hinge"', 'loss: str = "softplus"', heads),
    ("mean: float = 1.0", "mean: float = 0.0", noised_as_published),
    ("std: float = 1.0", "std: float = 1.2", noised_as_published),
    ("first: float = 0.7", "first: float = 0.6", published_levels),
    ("easy: int = 500", "easy: int = 499", published_levels),
    ("count // 2 + (u", "(u", published_levels),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = "onestroke.methods.adversarial.ladd"
    check(broken(module, old, old))
    with pytest.raises(AssertionError):
        check(broken(module, old, new))
