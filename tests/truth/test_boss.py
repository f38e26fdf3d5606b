"""BOSS: the knots are the cheapest of all, and a student straightened between them ends where the small steps do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from onestroke.errors import InputError
from onestroke.method import Batch, Mean, play
from onestroke.methods.flow.boss import Boss, cheapest
from onestroke.paths import Estimate, like
from onestroke.run import plan_run
from onestroke.sampling import FewStep
from onestroke.solvers import way
from onestroke.teachers.gaussian import GaussianMixture
from truth import pair_checks as checks
from truth.checks import F64, close, hand_ab, labels, make_path, tensor
from truth.pair_checks import PATHS, S
from truth.test_mutants import broken
from truth.test_ways import by_hand

SOURCE = "onestroke.methods.flow.boss"


def build(cls, path, student, steps=1, fine=8, **options):
    few = FewStep(path, path.grid(steps), renoise="implied")
    return cls(replace(checks.parts(path, None, student, None), few=few, solver_steps=fine), **options)


def batch(path, z, u, fine=8):
    """A batch of the ways of N(0, S^2) from z; its own noise is another."""
    ways = way(GaussianMixture(path, tensor([0.0]), S), path, z, labels(len(z)), fine)
    return Batch(z.flip(0), labels(len(z)), At(z, u), ways=ways)


class At(checks.Given):
    """Draws whose uniform numbers are given."""

    def __init__(self, z, u):
        super().__init__(z)
        self.u = torch.as_tensor(u, dtype=F64).expand(len(z))

    def uniform(self, lo=0.0, hi=1.0):
        return self.u


# ---- dynamic programming -------------------------------------------------------------------------------------


def programming_equals_brute_force(cheapest):
    """Against every choice of the inner knots, at costs that are no distances."""
    for seed, steps in itertools.product(range(4), (1, 2, 3, 5, 9)):
        cost = torch.rand(10, 10, generator=torch.Generator().manual_seed(seed), dtype=F64)

        def total(knots, cost=cost):
            return sum(cost[i, j].item() for i, j in itertools.pairwise(knots))

        every = [(0, *inner, 9) for inner in itertools.combinations(range(1, 9), steps - 1)]
        found = cheapest(cost, steps)
        assert tuple(found) in every
        assert total(found) == pytest.approx(min(map(total, every)), abs=1e-12)


def test_programming_equals_brute_force():
    programming_equals_brute_force(cheapest)


def gain(knots, kappa):
    """What the steps between the knots make of unit noise."""
    return math.prod(kappa(t, s) for t, s in itertools.pairwise(knots))


def first_round(cls, steps, fine=100):
    """The method after its first question is answered by itself, on a Gaussian of mean 0 and deviation 1 / 2."""
    path = make_path("flow")
    method = build(cls, path, checks.Slope(path), steps, fine, knots="best", search=1)
    game = method.step(batch(path, noise_of_one(), 0.0, fine), 0)
    question = next(game)
    assert isinstance(question, Mean)
    game.send(question.value)
    return method, path


def noise_of_one():
    """Four numbers of mean square 1."""
    return tensor([1.0], [-1.0], [1.0], [-1.0])


def sheet_s_knots(cls):
    """Sheet 5.4, s = 1 / 2: knots {1, .32, 0} and {1, .57, .34, .17, 0}, whose untrained gains are .250 and .364 where
    equal steps have .200 and .341 and all hundred .4926."""

    def kappa(t, s):
        return ((1 - s) * (1 - t) * S**2 + s * t) / ((1 - t) ** 2 * S**2 + t**2)

    for steps, knots, best, even in (
        (2, (1, 0.32), 0.250, 0.200),
        (4, (1, 0.57, 0.34, 0.17), 0.364, 0.341),
    ):
        method, _ = first_round(cls, steps)
        assert method.few.times == pytest.approx(knots, abs=1e-9)
        assert method.few.renoise == "implied"
        assert gain((*knots, 0), kappa) == pytest.approx(best, abs=6e-4)
        assert gain([k / steps for k in range(steps, -1, -1)], kappa) == pytest.approx(even, abs=6e-4)
    assert gain([k / 100 for k in range(100, -1, -1)], kappa) == pytest.approx(0.4926, abs=6e-5)


def test_the_sheet_s_knots():
    sheet_s_knots(Boss)


def knots_of_the_mean_cost(cls):
    """Of all ways of the first rounds, in whatever micro-batches they come; later rounds change nothing."""
    path, size = make_path("flow"), (1.0, 3.0, 2.0, 9.0)
    method = build(cls, path, checks.Slope(path), 2, 20, knots="best", search=2)
    parts = [batch(path, scale * noise_of_one(), 0.0, 20) for scale in size]
    costs, wanted = [method.costs(part.ways) for part in parts], torch.zeros(21, 21, dtype=F64)
    for step, games in enumerate((parts[:2], parts[2:], parts[3:])):
        play(method, games, step, lambda player: method.zero_grad())
        if step < 2:
            wanted = (wanted * step + (costs[2 * step] + costs[2 * step + 1]) / 2) / (step + 1)
        close(method.cost, wanted, 1e-9, 1e-12)
        assert method.marks.tolist() == cheapest(wanted, 2)


def test_the_knots_are_of_the_mean_cost():
    knots_of_the_mean_cost(Boss)
    assert build(Boss, make_path("flow"), None, 2, 8, search=5).phases == (5,)
    assert build(Boss, make_path("flow"), None, 2, 8, knots="grid").phases == ()


def costs_by_hand(cls, name="vp"):
    """Of any states: where the chord of two neighbours leads, less the state there, in units of a + b."""
    path, ways = make_path(name), checks.noise(8 * 5, seed=24).reshape(8, 5, 1)
    points, want = [*(hand_ab(name, t) for t in (1.0, 0.75, 0.5, 0.25)), (1.0, 0.0)], torch.zeros(5, 5, dtype=F64)
    for i, ((a, b), (c, d)) in enumerate(itertools.pairwise(points)):
        x, y = ways[:, i], ways[:, i + 1]
        x0 = (y - d / b * x) / (c - d / b * a)
        for j in range(i + 1, 5):
            c, d = points[j]
            want[i, j] = ((c * x0 + d * (x - a * x0) / b - ways[:, j]) / (c + d)).square().mean()
    close(build(cls, path, checks.Slope(path), 1, 4).costs(ways), want, 1e-7)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "trig"])
def test_the_costs_are_those_typed_by_hand(name):
    costs_by_hand(Boss, name)


# ---- straightening -------------------------------------------------------------------------------------------


class Chords(nn.Module):
    """A student that knows, at the state of each knot, the (x0, eps) of the chord: on a Gaussian they are linear in x.

    off: what is added to the velocity."""

    def __init__(self, path, table, off=0.0):
        super().__init__()
        self.path, self.table, self.off = path, table, nn.Parameter(tensor(off))

    def forward(self, x, t, cond):
        gain = torch.stack([tensor(self.table[round(v, 9)]) for v in t.tolist()])
        x0 = like(gain, x) * x
        est = self.path.split(x, x0, t, "x0")
        return Estimate(est.x0, est.eps + self.off)


def straightened(name, steps, fine):
    """x0 / x of the chords of a Gaussian's DDIM way, and its end, typed by hand: x -> kappa x with
    kappa = (a c S^2 + b d) / (a^2 S^2 + b^2)."""
    path = make_path(name)
    few, part = path.grid(steps), fine // steps
    _, (states,), _ = by_hand(name, path, tensor([1.0]), fine, 0.0)
    *states, scale = states.flatten().tolist()
    table = {}
    for k in range(steps):
        (a, b), x = hand_ab(name, few[k]), states[k * part]
        if k + 1 < steps:
            (c, d), y = hand_ab(name, few[k + 1]), states[(k + 1) * part]
            table[round(few[k], 9)] = (y - d / b * x) / (c - d / b * a) / x
        else:
            table[round(few[k], 9)] = scale / x
    return path, table, scale


def straight_is_where_small_steps_end(cls, name, steps=4, fine=8):
    """The loss vanishes at the chords of every knot, is the velocity error off them, and the student's own few steps
    then end where the teacher's small ones do."""
    path, table, end = straightened(name, steps, fine)
    z = checks.noise()
    u = (torch.arange(8) % steps + 0.5) / steps  # every chord
    for off in (0.0, 0.3):
        student = Chords(path, table, off)
        method = build(cls, path, student, steps, fine, knots="grid")
        close(checks.losses(method, batch(path, z, u, fine))["chord"], tensor(off).square().sum(), 1e-6, 1e-12)
        if not off:
            close(method.few.sample(student, z, labels(8)), end * z, 1e-7)
            assert method.few.times == path.grid(steps)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("steps", [1, 4])
def test_straight_is_where_small_steps_end(name, steps):
    straight_is_where_small_steps_end(Boss, name, steps)


class Asked(nn.Module):
    """Remembers when it is called."""

    def forward(self, x, t, cond):
        self.t = t
        return Estimate(x, x)


def test_it_is_trained_at_its_knots_alone():
    method, path = first_round(Boss, 2)
    method.student = Asked()
    list(method.step(batch(path, noise_of_one(), tensor(0.0, 0.4, 0.6, 0.99), 100), 1))
    close(method.student.t, tensor(1.0, 1.0, 0.32, 0.32))


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"search": 0}, "search=0 rounds must be at least 1; set knots=grid for none"),
        ({"knots": "own"}, "knots='own' must be one of grid, best"),
        ({"fine": 5}, r"the student's times \(1.0, 0.4994\d+\) are not among those of the teacher's ways"),
        ({"fine": 24}, "a grid of 24 steps leaves the noise end out; take a divisor of the teacher's times"),
    ],
)
def test_bad_options(options, said):
    path = make_path("table")
    with pytest.raises(InputError, match=said):
        build(Boss, path, checks.Slope(path), 2, **options)


def test_several_students_have_one_sampler():
    two = {"students": 2, "student_steps": 2}
    with pytest.raises(InputError, match="several students draw at the same times"):
        plan_run("emoji64", "boss", ["a"], two)
    assert plan_run("emoji64", "boss", ["a"], {**two, "knots": "grid"})[1].students == 2
    assert plan_run("emoji64", "boss", ["a"], {"students": 2})[1].students == 2


# ---- do the checks notice? -----------------------------------------------------------------------------------


def brute(module):
    programming_equals_brute_force(module.cheapest)


def knots(module):
    sheet_s_knots(module.Boss)


def chords(module):
    for name in ("vp", "table"):
        straight_is_where_small_steps_end(module.Boss, name)


def costs(module):
    costs_by_hand(module.Boss)


def mean(module):
    knots_of_the_mean_cost(module.Boss)


MUTANTS = [
    ("before.lerp(cost, 1 / (step + 1))", "before.lerp(cost, 1.0)", mean),
    ("self.cost.copy_(before", "self.cost.copy_(self.cost", mean),
    ("if step < self.search", "if self.search", mean),
    ("tril() > 0", "tril(-1) > 0", brute),
    ("(cost + best).min(1)", "(cost + best).min(0)", brute),
    ("choices.insert(0, choice)", "choices.append(choice)", brute),
    ("(a[j] + b[j]).to(est.x0)", "a[j].to(est.x0)", knots),
    (" / (a[j] + b[j]).to(est.x0)", "", costs),
    ("- ways[j]", "- ways[i]", knots),
    ("- ways[-1]", "- ways[0]", knots),
    ("here, here + 1", "here, 0 * here + last", knots),
    ("self.marks[k], self.marks[k + 1]", "self.marks[k], self.marks[k] + 1", chords),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new))
