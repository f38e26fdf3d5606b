"""KD: the gradient on a Gaussian, and that it vanishes at the teacher's map."""

from __future__ import annotations

import pytest

from onestroke.methods.flow.kd import KD
from truth.checks import Affine, close, fourfold, make_path, tensor
from truth.pair_checks import PATHS, M, S, batch, build, losses
from truth.test_mutants import broken


def gradient_is_the_closed_form(cls, path, mu=0.8, s=1.2):
    """L = E |mu + s z - (M + S z)|^2 / 2: dL / dmu = mu - M, dL / ds = s - S, per dimension over D."""
    student = Affine(path, tensor(mu, mu), tensor(s, s))
    z, other = fourfold(2)
    pairs = batch(z)._replace(noise=other)  # the batch's own noise is another
    losses(build(cls, path, student), pairs)["kd"].backward()
    close(student.mu.grad, tensor(mu - M, mu - M) / 2)
    close(student.s.grad, tensor(s - S, s - S) / 2)


@pytest.mark.parametrize("name", PATHS)
def test_the_gradient_is_the_closed_form(name):
    gradient_is_the_closed_form(KD, make_path(name))
    gradient_is_the_closed_form(KD, make_path(name), M, S)


def check(module):
    gradient_is_the_closed_form(module.KD, make_path("vp"))


SOURCE = "onestroke.methods.flow.kd"
MUTANTS = [
    ("0.5 * terms", "terms"),
    ('"mean")', '"sum")'),
    ("noise, x0 = batch.pairs", "noise, x0 = batch.noise, batch.pairs.x0"),
    ("(x - x0)", "(x + x0)"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_the_check_fails_on_the_mutant(old, new):
    check(broken(SOURCE, old, old))
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new))
