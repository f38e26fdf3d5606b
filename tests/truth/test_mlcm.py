"""MLCM: states of the teacher's own trajectories, segments that halve, and the regression, against closed forms."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.consistency.mlcm import MLCM
from onestroke.sampling import FewStep
from truth import segment_checks as checks
from truth.checks import close, labels, make_path, parts
from truth.segment_checks import PATHS, SLOW, STUDENT, Exact, Line, flow, gauss, huber, moved, posterior
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", [*PATHS, "table0"])
DDIM = {"grid": 8, "scheme": "ddim", "segments": 4, "stage_steps": 1}


def by_hand(path, method, z):
    """The DDIM steps of a teacher N(M, S^2) from the student's first input, from the data to noise."""
    down = method.grid.flip(0)
    x, found = method.few.input(z), []
    for t, s in pairwise(down):
        t, s = t.expand(len(z)), s.expand(len(z))
        found.append(x)
        x = moved(path, x, t, s, posterior(path, x, t))
    return torch.stack([x, *found[::-1]])


def early(name):
    """The path cut short of infinite noise, where solvers begin at a ratio of 4096."""
    return make_path(name, "eps")


def trajectories(cls, path):
    """DDIM on the grid, from pure noise to the data end; no data are read."""
    method = checks.made(cls, path, Line(path, *STUDENT), **DDIM)
    z = checks.noise(5)
    got, want = method.states(Batch(z, labels(5), Draws(0, 0, 5))), by_hand(path, method, z)
    close(got, want, 1e-5, 1e-5 if path.ab(method.grid[-1])[0] > 1e-3 else 5e-4)
    assert len(got) == 9


@each
def test_the_states_are_the_teachers_own(name):
    trajectories(MLCM, early(name))
    trajectories(MLCM, make_path(name))


@pytest.mark.parametrize("name", PATHS)
def test_a_finer_grid_passes_through_the_flows_own_states(name):
    """dpm++2m, of second order, on a grid 4 times as fine: half-way at least 8 times nearer."""
    path, z, errors = early(name), checks.noise(5), []
    for grid in (16, 64):
        method = checks.made(MLCM, path, Line(path, *STUDENT), grid=grid)
        states = method.states(Batch(z, labels(5), Draws(0, 0, 5)))
        t = method.grid[grid // 2].expand(5)
        errors.append((states[grid // 2] - flow(path, states[-1], method.grid[-1].expand(5), t)).abs().max())
    assert errors[1] < errors[0] / 8


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_composed_gain_does_not_depend_on_the_segments(name, stage):
    """4, 2 and 1 segments: the product of the trajectory's own DDIM steps."""
    checks.composes(MLCM, early(name), lambda method: method.grid[:: 8 >> (2 - stage)], step=stage, **DDIM)


def regression(cls, path, stage=1):
    """Value and gradient typed by hand, on states typed by hand, in 2 segments."""
    student, slow = Line(path, *STUDENT), Line(path, *SLOW)
    method = checks.made(cls, path, student, slow=slow, **DDIM)
    (turn,), _, z = checks.play(method, step=stage)
    every, rows = by_hand(path, method, z), torch.arange(8)
    t, s = method.grid[1:], method.grid[:-1]
    end = method.grid[[0, 4]].repeat_interleave(4)
    loss, *_ = checks.hand_loss(path, every[rows + 1, rows], t, s, end, student, slow, distance=huber)
    checks.same_gradient(turn.terms["consistency"], loss.mean(), student, rtol=1e-5)
    assert turn.follow == {"slow": 0.95}


@pytest.mark.parametrize("name", PATHS)
def test_the_regression_is_the_typed_one(name):
    regression(MLCM, early(name))


@pytest.mark.parametrize("name", PATHS)
def test_the_exact_map_is_the_fixed_point_at_every_stage(name):
    path = early(name)
    for stage, width in ((0, 2), (1, 4), (2, 8), (9, 8)):
        student = Exact(path)
        method = checks.made(MLCM, path, student, **DDIM)
        method.teacher, student.edges = Exact(path, method.grid), method.grid[::width]
        assert checks.loss_of(method, step=stage) < 1e-12
        student.edges = method.grid[:: width // 2]
        assert checks.loss_of(method, step=stage) > 1e-7


def guided(cls):
    checks.guided_mean_is_scaled(cls, make_path("vp"), **DDIM)


def test_guidance_scales_the_mean():
    guided(MLCM)


def test_stages_end_at_the_students_steps():
    path = make_path("vp")
    given = replace(parts(path, gauss(path), Line(path, *STUDENT), None), rounds=90)
    method = MLCM(replace(given, few=FewStep(path, path.grid(2), renoise="implied")))
    assert (method.stages, method.stage_steps) == ([8, 4, 2], 30)
    assert set(path.grid(2)) <= set(method.grid.tolist())
    with pytest.raises(InputError, match="needs renoise=implied"):
        MLCM(replace(given, few=FewStep(path, path.grid(2))))
    with pytest.raises(InputError, match=r"segments=6 must be the student's 1 step\(s\) doubled some times"):
        MLCM(given, segments=6)
    with pytest.raises(InputError, match="a grid of 20 steps has no 8 equal segments; take a multiple of 8"):
        MLCM(given, grid=20)


def passed(module):
    for name in ("vp", "flow"):
        trajectories(module.MLCM, early(name))


def regressed(module):
    for name in ("vp", "edm"):
        regression(module.MLCM, early(name))


def scaled(module):
    guided(module.MLCM)


MUTANTS = [
    ("self.few.input(batch.noise)", "batch.noise * 1.1", passed),
    ("*reversed(x)]", "*x]", passed),
    ("self.grid[1:].flip", "self.grid[:-1].flip", passed),
    ("there = jump", "there = euler", regressed),
    ("jump(self.slow", "jump(self.student", regressed),
    ("states[i - 1, rows]", "states[i, rows]", regressed),
    ("step // self.stage_steps", "0 * step", regressed),
    ("states[i, rows], t, end", "states[i, rows], t, s", regressed),
    ("self.guide(self.teacher)", "self.teacher", scaled),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    source = "onestroke.methods.consistency.mlcm"
    check(broken(source, old, old))
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check(broken(source, old, new))
