"""PCM: phases, their composed gain on a Gaussian, the regression and the adversary against typed closed forms."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from onestroke import times
from onestroke.errors import InputError
from onestroke.methods.consistency import pcm
from onestroke.methods.consistency.pcm import PCM
from onestroke.sampling import FewStep
from truth import segment_checks as checks
from truth.adversarial_checks import C, W
from truth.checks import close, make_path, parts, tensor
from truth.segment_checks import PATHS, SLOW, STUDENT, Line, gauss, huber
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", PATHS)
PLAIN = {"gan_weight": 0.0, "grid": 8}


@each
@pytest.mark.parametrize("phases", [1, 2, 4])
def test_the_exact_map_to_the_end_of_each_phase_is_the_fixed_point(name, phases):
    checks.rests_at_the_exact_map(PCM, make_path(name), calls=phases, **PLAIN)


@each
def test_the_composed_gain_does_not_depend_on_the_phases(name):
    """The product of all DDIM steps of the grid, for 1, 2, 4 and 8 phases."""
    for phases in (1, 2, 4, 8):
        checks.composes(PCM, make_path(name), lambda method: method.edges, calls=phases, **PLAIN)


def regression(cls, path, phases=2):
    """Value and gradient typed by hand; at the end of a phase the target is the solver's state itself."""
    student, slow = Line(path, *STUDENT), Line(path, *SLOW)
    method = checks.made(cls, path, student, slow=slow, calls=phases, **PLAIN)
    turns, x0, z = checks.play(method)
    xt, t, s = checks.states(method, path, x0, z)
    end = torch.stack([max(e for e in method.edges if e < v) for v in t])
    assert (s == end).sum() == phases
    loss, *_ = checks.hand_loss(path, xt, t, s, end, student, slow, distance=huber)
    checks.same_gradient(turns[0].terms["consistency"], loss.mean(), student)
    assert [turn.player for turn in turns] == ["student"]
    assert turns[0].follow == {"slow": 0.0}


@each
def test_the_regression_is_the_typed_one(name):
    regression(PCM, make_path(name))


def adversary(cls, path, u=0.25):
    """Both landings, noised on from the end of the phase by the rest of the noise, through a linear head."""
    student = Line(path, *STUDENT)
    method = checks.made(cls, path, student, calls=2, grid=8, gan_weight=0.1)
    normals = [checks.noise(8, seed) for seed in (1, 2, 3)]
    turns, x0, z = checks.play(method, [u], normals=list(normals))
    xt, t, s = checks.states(method, path, x0, z)
    low, high = method.edges[:2].repeat_interleave(4), method.edges[1:].repeat_interleave(4)
    _, here, there = checks.hand_loss(path, xt, t, s, low, student, student)
    at = path.snap(low + u * (high - low)).clamp_min(path.t_min)

    def logit(x, e):
        (a, b), (c, d) = ([v[:, None] for v in path.ab(r)] for r in (at, low))
        x = a / c * x + (b**2 - (a * d / c) ** 2).sqrt() * e
        return W[0] * x + W[1] * x**2 + C

    first, second = turns
    assert (first.player, second.player) == ("student", "heads")
    checks.same_gradient(first.terms["gan"], -0.1 * logit(here, normals[0]).mean(), student)
    hinge = torch.relu(1 - logit(there, normals[1])).mean() + torch.relu(1 + logit(here, normals[2])).mean()
    close(second.terms["gan"], hinge.detach())
    second.terms["gan"].backward()
    assert method.teacher.gain.grad is None
    assert student.mu.grad is None


@each
def test_the_adversary_is_the_typed_one(name):
    adversary(PCM, make_path(name))


def guided(cls):
    checks.guided_mean_is_scaled(cls, make_path("vp"), **PLAIN)


def test_guidance_scales_the_mean():
    guided(PCM)


def test_what_does_not_fit_is_refused():
    path, student = make_path("vp"), Line(make_path("vp"), *STUDENT)
    with pytest.raises(InputError, match="a grid of 50 steps has no 4 equal segments; take a multiple of 4"):
        checks.made(PCM, path, student, calls=4, grid=50, gan_weight=0.0)
    with pytest.raises(InputError, match="needs renoise=implied"):
        PCM(replace(parts(path, gauss(path), student, None), few=FewStep(path, path.grid(4))), gan_weight=0.0)
    with pytest.raises(InputError, match="more of them than the teacher has times"):
        checks.made(PCM, make_path("table"), student, grid=1500, gan_weight=0.0)


def test_grids_and_segments():
    path, table = make_path("vp"), make_path("table")
    close(times.cut(path, (0.0, 0.4, 1.0), 4), [0.0, 0.2, 0.4, 0.7, 1.0])
    close(times.cut(table, (0.0, 499 / 999, 1.0), 4) * 999, [0.0, 250.0, 499.0, 749.0, 999.0])
    low, high = times.segment(tensor(0.0, 0.4, 1.0), tensor(0.1, 0.4, 0.41, 1.0))
    close(low, [0.0, 0.0, 0.4, 0.4])
    close(high, [0.4, 0.4, 1.0, 1.0])
    assert times.halvings(2, segments=8) == [8, 4, 2]
    assert times.halvings(3, segments=3) == [3]
    for wrong in (0, 1, 6, 12):
        with pytest.raises(InputError, match="must be the student's 4"):
            times.halvings(4, segments=wrong)


def test_without_an_adversary_it_needs_no_layers():
    assert PCM.needs_of({"gan_weight": 0.0}) == {"x0"}
    assert PCM.needs_of({"gan_weight": 0.1}) == PCM.needs
    path = make_path("vp")
    assert checks.made(PCM, path, Line(path, *SLOW), **PLAIN).players == ("student",)


def regressed(module):
    for name in ("vp", "edm"):
        regression(module.PCM, make_path(name))


def judged(module):
    for name in ("vp", "edm"):
        adversary(module.PCM, make_path(name))


def scaled(module):
    guided(module.PCM)


MUTANTS = [
    ("there = jump(self.slow", "there = euler(self.slow", regressed),
    ("there = jump(self.slow", "there = jump(self.student", regressed),
    ("keep: float = 0.0", "keep: float = 0.9", regressed),
    ("euler(self.student, path, xt, t, end, cond)", "euler(self.student, path, xt, t, s, cond)", regressed),
    ("xt, t, s, cond)\n", "xt, t, end, cond)\n", regressed),
    ("[:: grid // len(few.times)]", "[:: grid]", regressed),
    ("self.guide(self.teacher)", "self.teacher", scaled),
    ("self.path.diffuse(x, end, noise, t)", "self.path.mix(x, noise, t)", judged),
    ("self.judge(here, end, u", "self.judge(here.detach() + 0 * here, end, u", judged),
    ("end.lerp(start", "end.lerp(t", judged),
    ("gan_weight * gan}", "gan_weight * -gan}", judged),
    ("real = self.judge(there", "real = self.judge(here.detach()", judged),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    source = "onestroke.methods.consistency.pcm"
    check(broken(source, old, old))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(source, old, new))


SHARED = [
    ("times", "onestroke.times", "corners[low].lerp(corners[low + 1], share - low)", "corners[low]", InputError),
    ("times", "onestroke.times", "return edges[i - 1], edges[i]", "return edges[i], edges[i]", AssertionError),
    ("terms", "onestroke.terms", "(x - y) / like(torch.hypot(*path.ab(t)), x)", "(x - y)", AssertionError),
    ("jump", "onestroke.solvers", "like(t - s, x) > 0, there, x", "like(t - s, x) >= 0, there, x", AssertionError),
]


@pytest.mark.parametrize(("name", "module", "old", "new", "error"), SHARED)
def test_the_check_fails_on_the_mutant_of_what_is_shared(name, module, old, new, error):
    for line in (old, new):
        part = broken(module, old, line)
        with mock.patch(f"onestroke.methods.consistency.pcm.{name}", getattr(part, name, part)):
            if line == old:
                regressed(pcm)
            else:
                with pytest.raises(error):
                    regressed(pcm)


@pytest.mark.parametrize("new", ["b**2 - (a * d) ** 2", "b**2 - (d / c) ** 2"])
def test_the_check_fails_on_the_mutant_of_the_noise(new):
    paths = broken("onestroke.paths", "b**2 - (a * d / c) ** 2", new)
    with pytest.raises(AssertionError):
        adversary(PCM, make_path("flow", module=paths))
