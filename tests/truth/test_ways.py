"""Ways: the states of DDIM steps on a guided Gaussian, typed by hand, and what the teacher said at them read back."""

from __future__ import annotations

import pytest
import torch

from onestroke import solvers
from onestroke.errors import InputError
from onestroke.method import Parts
from onestroke.paths import Table
from onestroke.sampling import FewStep
from onestroke.solvers import chord, stops, way
from onestroke.teachers.gaussian import GaussianMixture
from truth import pair_checks as checks
from truth.checks import close, hand_ab, labels, make_path, tensor
from truth.pair_checks import PATHS, M, S, end_of
from truth.test_guided_distillation import Shifting
from truth.test_mutants import broken

SOURCE = "onestroke.solvers"
W, K = 3.0, 8


def by_hand(name, path, z, steps=K, mean=W * M):
    """(times, states (B, steps + 1, 1), (x0, eps) (B, steps, 1) said at all but the last) of N(mean, S^2): a teacher
    with a table goes by whole indices, 999, 874, ... for 8."""
    if name.startswith("table"):
        times = [(1000 // steps * (steps - k) - 1) / 999 for k in range(steps)]
    else:
        times = [min(1 - k / steps, path.t_max) for k in range(steps)]
    states, said = [end_of(path)[2] * z], []
    for k, time in enumerate(times):
        (a, b), x = hand_ab(name, time), states[-1]
        variance = a**2 * S**2 + b**2
        x0, eps = mean + a * S**2 * (x - a * mean) / variance, b * (x - a * mean) / variance
        said.append((x0, eps))
        c, d = hand_ab(name, times[k + 1]) if k + 1 < steps else (1.0, 0.0)
        states.append(c * x0 + d * eps)
    return times, torch.stack(states, 1), [torch.stack(part, 1) for part in zip(*said, strict=True)]


def guided(path, w=W):
    return Parts(None, None, None, FewStep(path), {"label": torch.tensor([-1])}, w).guide(Shifting(path))


def states_are_those_of_ddim(module, name):
    path, z = make_path(name), checks.noise(seed=40)
    times, states, _ = by_hand(name, path, z)
    close(module.stops(path, K), tensor(*times, 0.0))
    found = module.way(guided(path), path, z, labels(8, 0), K)
    assert found.shape == (8, K + 1, 1)
    close(found, states, 1e-7, 1e-9)


def what_was_said_is_read_back(module, name):
    """Between neighbours of exact states; and of any chord, the DDIM step from its beginning ends where it does."""
    path, z = make_path(name), checks.noise(seed=40)
    times, states, said = by_hand(name, path, z)
    for k in range(K):
        i = torch.full((8,), k)
        x, t, est = module.chord(path, states, i, i + 1)
        close(x, states[:, k])
        close(t, tensor(times[k]).expand(8))
        close(est.x0, said[0][:, k], 1e-6, 1e-8)
        close(est.eps, said[1][:, k], 1e-6, 1e-8)
    i, j = torch.arange(8) % 4, torch.tensor([4, 5, 6, 8, 7, 3, 5, 8])
    x, t, est = module.chord(path, states, i, j)
    rows = torch.arange(8)
    close(x, states[rows, i])
    for row in range(8):
        (a, b), (c, d) = (hand_ab(name, times[k]) if k < K else (1.0, 0.0) for k in (i[row], j[row]))
        close(a * est.x0[row] + b * est.eps[row], states[row, i[row]], 1e-7, 1e-9)
        close(c * est.x0[row] + d * est.eps[row], states[row, j[row]], 1e-6, 1e-8)


@pytest.mark.parametrize("name", PATHS)
def test_the_states_are_those_of_ddim(name):
    states_are_those_of_ddim(solvers, name)


@pytest.mark.parametrize("name", PATHS)
def test_what_was_said_is_read_back(name):
    what_was_said_is_read_back(solvers, name)


@pytest.mark.parametrize("name", PATHS)
def test_float32_suffices(name):
    """Of a hundred steps the differences are small numbers of large ones; what is read back is true to 1e-3."""
    path, z = make_path(name), checks.noise(seed=40).float()
    net = GaussianMixture(path, tensor([M]), S).float()
    states = way(net, path, z, labels(8), 100)
    assert states.dtype == torch.float32
    for k in range(100):
        i = torch.full((8,), k)
        x, t, est = chord(path, states, i, i + 1)
        want = net(x, t, labels(8))
        close(est.x0, want.x0, 1e-3, 1e-3)
        close(est.eps, want.eps, 1e-3, 1e-3)


@pytest.mark.parametrize(("steps", "few"), [(100, 4), (8, 1), (40, 8)])
def test_a_student_is_called_at_states_of_a_way(steps, few):
    for name in PATHS:
        path = make_path(name)
        times = stops(path, steps)
        assert (times.diff() < 0).all()
        for t in path.grid(few):
            assert (times - t).abs().min() < 1e-12
        close(way(guided(path), path, tensor([1.0]), labels(1, 0), steps)[:, 0], FewStep(path).input(tensor([1.0])))


def test_a_table_has_ways_of_its_divisors_alone():
    path = make_path("table")
    assert isinstance(path, Table)
    assert (stops(path, 125)[:-1] * 999).tolist() == pytest.approx([8 * k - 1 for k in range(125, 0, -1)])
    with pytest.raises(InputError, match="take a divisor of the teacher's times"):
        stops(path, 24)


def states(module):
    states_are_those_of_ddim(module, "vp")


def beliefs(module):
    for name in ("vp", "table"):
        what_was_said_is_read_back(module, name)


MUTANTS = [
    ("strides(path, steps).flip(0)", "strides(path, steps)", states),
    ("if s > 0 else est.x0)", "if s > 0 else states[-1])", states),
    ("path.mix(est.x0, est.eps, s.expand(len(noise)))", "path.mix(est.x0, noise, s.expand(len(noise)))", states),
    ("noise * like(torch.hypot(a, b), noise)", "noise * like(a + b, noise)", states),
    ("path.through(x, t, y, s).x0, y)", "path.through(x, t, y, s).x0, x)", beliefs),
    ("like(s > 0, x) > 0, path", "like(s >= 0, x) > 0, path", beliefs),
    ("path.through(x, t, y, s)", "path.through(y, t, x, s)", beliefs),
    ("states[rows, i], states[rows, j], times[i]", "states[rows, i], states[rows, i + 1], times[i]", beliefs),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new))
