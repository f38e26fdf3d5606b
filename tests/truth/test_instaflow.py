"""InstaFlow: reflow first, then the same error at the noise end alone."""

from __future__ import annotations

import pytest
import torch

from onestroke.methods.flow.instaflow import InstaFlow
from truth import pair_checks as checks
from truth.checks import close, make_path
from truth.pair_checks import PATHS, M, S
from truth.test_mutants import broken


def reflow_first(cls, name):
    checks.loss_is_the_velocity_error(cls, make_path(name), name)
    checks.reflow_is_exact_on_a_gaussian(cls, make_path(name))


def then_the_noise_end(cls, name):
    """There the velocity error is (a + b) / b times that of x0, wherever times are drawn."""
    path, z = make_path(name), checks.noise()
    a, b, norm = checks.end_of(path)
    student, x0 = checks.Slope(path, 0.7, 0.9), M + S * z.sin()
    terms = checks.losses(checks.build(cls, path, student, straighten=3), checks.batch(z, x0), step=3)
    out = student(norm * z, torch.full((8,), path.t_max, dtype=z.dtype), {}).x0
    assert terms.keys() == {"distill"}
    close(terms["distill"], (((a + b) / b) ** 2 * (out - x0).square()).mean())


@pytest.mark.parametrize("name", PATHS)
def test_reflow_then_the_noise_end(name):
    reflow_first(InstaFlow, name)
    then_the_noise_end(InstaFlow, name)


def straightens(cls):
    """Seven tenths of the run."""
    checks.straightens(cls, 700)


def test_what_a_run_is_divided_into():
    straightens(InstaFlow)


def first(module):
    reflow_first(module.InstaFlow, "vp")


def second(module):
    then_the_noise_end(module.InstaFlow, "vp")


def parts_of_a_run(module):
    straightens(module.InstaFlow)


SOURCE = "onestroke.methods.flow.instaflow"
MUTANTS = [
    ("step < self.straighten", "step <= self.straighten", second),
    ("step < self.straighten", "step > self.straighten", first),
    ("7 * parts.rounds // 10", "6 * parts.rounds // 10", parts_of_a_run),
    ("lo=0.001", "lo=0.01", parts_of_a_run),
    ("self.few.eps(noise, x0)", "noise", first),
    ("self.few.time(0, noise)", "0.5 * self.few.time(0, noise)", second),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises((AssertionError, KeyError)):
        check(broken(SOURCE, old, new))
