"""Do the truth checks notice? Break one line of the source at a time; the check that guards it must fail."""

from __future__ import annotations

import importlib
import inspect
import sys
import types

import pytest

from truth import checks
from truth.checks import hand_ab, make_path

SWIFT = "onestroke.methods.distribution.swiftbrush"


def broken(module: str, old: str, new: str) -> types.ModuleType:
    """The module with `old`, which must occur exactly once, replaced by `new`; executed as a module of its own."""
    source = inspect.getsource(importlib.import_module(module))
    if source.count(old) != 1:  # no AssertionError, which the tests of mutants take for a noticed one
        raise LookupError(f"{module} holds {old!r} {source.count(old)} times")
    fresh = types.ModuleType(f"{module}_broken")
    sys.modules[fresh.__name__] = fresh  # dataclasses look their module up
    try:
        exec(compile(source.replace(old, new), f"<{fresh.__name__}>", "exec"), vars(fresh))
    finally:
        del sys.modules[fresh.__name__]
    return fresh


def vsd(module):
    for name in ("vp", "flow"):
        checks.vsd_is_the_closed_form(module.SwiftBrush, make_path(name), "x0", *hand_ab(name))


def guided(module):
    for guide_fake in ({}, {"guide_fake": False}):
        checks.guided_vsd_is_the_closed_form(module.SwiftBrush, make_path("vp"), *hand_ab("vp"), **guide_fake)


def fake_loss(module):
    for null in (False, True):
        checks.fake_loss_is_the_closed_form(module.SwiftBrush, make_path("vp"), *hand_ab("vp"), null)


def turns(module):
    checks.each_turn_trains_its_own_player(module.SwiftBrush, make_path("vp"))


def wrapped(module):
    checks.guidance_runs_from_null_to_class(module.Guided, make_path("vp"))


def on_path(module):
    checks.reading_on_another_path_is_exact(module.OnPath, make_path("flow"), make_path("edm"))


def velocity(module):
    checks.velocity_is_that_of_diffusers(module)


def flow(module):
    checks.flow_is_that_of_diffusers(module)


def unit(module):
    for name in ("edm", "flow"):
        checks.unit_point_is_normal(make_path(name, module=module), name)


def direction(module):
    checks.descend_has_its_gradient(module)


def scale(module):
    checks.reduced_has_its_scale(module)


def rows(module):
    checks.rows_do_not_depend_on_the_split(module.Draws)


def score(module):
    checks.score_is_the_gradient_of_log_prob(module.GaussianMixture, make_path("vp"))


def log_prob(module):
    checks.log_prob_is_that_of_torch(module.GaussianMixture, make_path("vp"), "vp")


NETS = "real, fake = self.guide(self.teacher)(xt, t, cond), fake(xt, t, cond)"
MUTANTS = [
    # the student's turn
    (SWIFT, "real.eps - fake.eps", "fake.eps - real.eps", vsd),
    (SWIFT, "real.eps - fake.eps", "real.x0 - fake.x0", vsd),
    (SWIFT, "sigma**self.sigma_power *", "sigma *", vsd),
    (SWIFT, "sigma_power: float = 2.0", "sigma_power: float = 1.0", vsd),
    (SWIFT, "self.path.unit_ab(t)[1], x)", "self.path.ab(t)[1] * 1.01, x)", vsd),
    (SWIFT, "self.path.mix(x, draw.normal(x), t)", "self.path.mix(x, 0 * draw.normal(x), t)", guided),
    (SWIFT, NETS, NETS.replace("real, fake =", "fake, real ="), vsd),
    (SWIFT, "self.guide(self.fake) if self.guide_fake else self.fake", "self.guide(self.fake)", guided),
    (SWIFT, "guide_fake: bool = True", "guide_fake: bool = False", guided),
    (SWIFT, "self.guide(self.teacher)(xt", "self.teacher(xt", guided),
    # the fake's turn
    (SWIFT, "alpha = self.path.unit_ab(t)[0]", "alpha = self.path.unit_ab(t)[1]", fake_loss),
    (SWIFT, "weight=alpha**self.alpha_power", "weight=alpha", fake_loss),
    (SWIFT, "terms.dsm(self.fake,", "terms.dsm(self.guide(self.fake),", fake_loss),
    (SWIFT, "terms.dsm(self.fake,", "terms.dsm(self.teacher,", fake_loss),
    (SWIFT, "draw.shared() < self.null_rate", "draw.shared() > self.null_rate", fake_loss),
    (SWIFT, "null_rate: float = 0.1", "null_rate: float = 0.05", fake_loss),
    (SWIFT, "x.detach(), batch", "x, batch", turns),
    # terms
    ("onestroke.terms", "(x - (x - direction).detach())", "(x - (x - direction))", direction),
    ("onestroke.terms", "(x - (x - direction).detach())", "(x - (x + direction).detach())", direction),
    ("onestroke.terms", "return 0.5 * reduced", "return reduced", direction),
    ("onestroke.terms", 'reduce == "mean" else', 'reduce != "mean" else', scale),
    # paths and wrappers
    ("onestroke.paths", "return -b, a", "return b, -a", velocity),
    ("onestroke.paths", "return -b, a", "return -a, b", velocity),
    ("onestroke.paths", "return self.rates(t)", "return tuple(-r for r in self.rates(t))", flow),
    ("onestroke.paths", "return a / norm, b / norm", "return a, b", unit),
    ("onestroke.denoiser", "no.lerp(yes, scale)", "yes.lerp(no, scale)", wrapped),
    ("onestroke.denoiser", "no_eps.lerp(yes_eps, scale)", "no_eps.lerp(yes_eps, scale + 1)", wrapped),
    ("onestroke.denoiser", "like((c + d) / (a + b), x)", "like((a + b) / (c + d), x)", on_path),
    ("onestroke.denoiser", "self.src.time_of(self.path.log_snr(t))", "t", on_path),
    # draws and the exact mixture
    ("onestroke.draws", "[self.seed, self.step, self.calls]", "[self.seed, self.step, self.calls, self.offset]", rows),
    ("onestroke.draws", "self.step * self.total + self.offset", "self.step * self.total", rows),
    ("onestroke.teachers.gaussian", "a * self.std**2 / variance * centred", "a * self.std / variance * centred", score),
    ("onestroke.teachers.gaussian", "(2 * torch.pi * variance).log()", "(2 * torch.pi) * variance.log()", log_prob),
    ("onestroke.teachers.gaussian", "-self.exact(x, t, cond).eps", "self.exact(x, t, cond).eps", score),
    ("onestroke.teachers.gaussian", "(label >= 0) & (label != self.labels)", "label != self.labels", log_prob),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(module, old, new, check):
    check(broken(module, old, old))  # the same surgery without the fault passes
    with pytest.raises(AssertionError):
        check(broken(module, old, new))
