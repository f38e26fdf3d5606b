"""Progressive distillation: where its steps land, how they are weighted, and how stages follow one another."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from contract.build import build as small
from contract.build import settings_of
from onestroke.errors import InputError
from onestroke.method import Batch, follow
from onestroke.methods.flow.progressive import Progressive
from onestroke.paths import Flow, like
from onestroke.sampling import FewStep
from onestroke.teachers.gaussian import GaussianMixture
from truth import pair_checks as checks
from truth.checks import F64, Given, close, hand_ab, labels, make_path, tensor, two_classes
from truth.pair_checks import PATHS, S, Shifted
from truth.test_mutants import broken

N = 8


class Drawn(Given):
    """Draws whose uniform numbers are given."""

    def __init__(self, u):
        super().__init__(u)
        self.u = u

    def uniform(self, lo=0.0, hi=1.0):
        return self.u


def every_step(path, student, teacher, cls=Progressive, scale=1.0, step=0, **options):
    """The method and a batch with one sample in each of the N steps."""
    method = checks.build(cls, path, student, teacher, start=N, **options)
    method.guide = lambda net: net if scale == 1 else checks.parts(path, net, student, None, scale).guide(net)
    x0, z = checks.noise(N, seed=24), checks.noise(N, seed=25)
    return method, Batch(z, labels(N), Drawn((torch.arange(N) + 0.5) / N), x0)


def fine(path, steps=2 * N):
    """The times of all half steps, decreasing from the student's call to 0, typed by hand."""
    return [path.snap(tensor(path.grid(1)[0] * k / steps)).item() for k in range(steps, -1, -1)]


def hand_target(name, teacher, x, t, half, s):
    """D of sheet 5.5 from two DDIM steps typed by hand; at the data end the second step's D. Also where they end."""
    (a, b), (a1, b1), (a2, b2) = (hand_ab(name, v) for v in (t, half, s))

    def net(x, t):
        est = teacher(x[None], tensor(t), labels(1))
        return est.x0[0], est.eps[0]

    x0, eps = net(x, t)
    middle = a1 * x0 + b1 * eps
    x0, eps = net(middle, half)
    end = a2 * x0 + b2 * eps
    return (x0 if s == 0 else (end - b2 / b * x) / (a2 - b2 / b * a)), end


def lands_where_two_steps_do(cls, name):
    """The loss vanishes at the typed target, and one DDIM step with it ends where the teacher's two do."""
    path = make_path(name)
    teacher, student = checks.two_modes(path), Shifted(path, 0.0)
    method, batch = every_step(path, student, teacher, cls)
    grid = fine(path)
    t = tensor(*grid[:-1:2])
    x = path.mix(batch.x0, batch.noise, t)
    found = [hand_target(name, teacher, x[i], *grid[2 * i : 2 * i + 3]) for i in range(N)]
    student.x0 = torch.stack([d for d, _ in found])
    assert checks.losses(method, batch)["halve"] < 1e-20
    close(student.seen[0], x)
    close(student.seen[1], t)
    est = student(x, t, {})
    for i in range(N - 1):
        a, b = hand_ab(name, grid[2 * i + 2])
        close(a * est.x0[i] + b * est.eps[i], found[i][1], 1e-9, 1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_it_lands_where_two_steps_do(name):
    lands_where_two_steps_do(Progressive, name)


def weight_is_truncated_snr(cls, name, shift=0.01):
    """An x0 that is off by d costs max(1, (a / b)^2) d^2, per sample."""
    path = make_path(name)
    student = Shifted(path, 0.0)
    method, batch = every_step(path, student, checks.two_modes(path), cls)
    grid = fine(path)
    x = path.mix(batch.x0, batch.noise, tensor(*grid[:-1:2]))
    found = [hand_target(name, method.teacher, x[i], *grid[2 * i : 2 * i + 3]) for i in range(N)]
    student.x0 = torch.stack([d for d, _ in found]) + shift
    snr = tensor(*(a**2 / b**2 for a, b in (hand_ab(name, t) for t in grid[:-1:2])))
    assert (snr > 1).any()
    assert (snr < 1).any()
    close(checks.losses(method, batch)["halve"], (snr.clamp_min(1) * shift**2).mean(), 1e-7)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "table"])
def test_the_weight_is_truncated_snr(name):
    weight_is_truncated_snr(Progressive, name)


class Gains(nn.Module):
    """x0 = gain(t) x: what a Gaussian of mean 0 asks for."""

    def __init__(self, path, table):
        super().__init__()
        self.path, self.table = path, table

    def forward(self, x, t, cond):
        gain = torch.stack([self.table[round(v, 9)] for v in t.tolist()])
        x0 = like(gain, x) * x
        return self.path.split(x, x0, t, "x0")


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "table", "shifted"])
def test_the_last_stage_composes_all_steps_of_the_first(name):
    """On a Gaussian every stage's target is linear; the one step of the end is the product of the DDIM steps
    kappa = (a a' s^2 + b b') / (a^2 s^2 + b^2) of the finest grid. No stage is asked at a time that it has not learned,
    on paths whose own times of N steps are not among those of 2 N as well."""
    path, name = (Flow(shift=3.0), "flow") if name == "shifted" else (make_path(name), name)
    teacher = GaussianMixture(path, tensor([0.0]), S)
    steps, net = N, teacher
    while steps:
        method, batch = every_step(path, Shifted(path, 0.0), teacher)
        batch = batch._replace(draw=Drawn((torch.arange(N) % steps + 0.5) / steps))
        with mock.patch("onestroke.terms.truncated_snr", lambda est, x0, eps: x0):
            method.student.x0 = torch.zeros(1, dtype=F64)
            x0 = method.halve(batch, steps, net).terms["halve"]
        x, t = method.student.seen
        net = Gains(path, {round(v, 9): g for v, g in zip(t.tolist(), (x0 / x)[:, 0], strict=True)})
        steps //= 2
    want = 1.0
    for t, s in itertools.pairwise(fine(path)):
        a, b = hand_ab(name, t)
        c, d = hand_ab(name, s) if s else (1.0, 0.0)
        want *= (a * c * S**2 + b * d) / (a**2 * S**2 + b**2)
    close(net(tensor([1.0]), tensor(path.grid(1)[0]), {}).x0, tensor([want]))


def stages_follow(cls):
    """8, 8, 4, 4, 2, 2, 1, 1, 1: the guided teacher teaches at first, then what the student was at the switch."""
    path = make_path("vp")
    student, teacher = Shifted(path, 0.0), two_classes(path, 0.9, 0.5)
    student.x0 = torch.zeros(1, dtype=F64)
    method, batch = every_step(path, student, teacher, cls, stage_steps=2)
    method.guide = lambda net: ("guided", net)
    seen = []
    method.halve = lambda batch, steps, teacher: seen.append((steps, teacher)) or "turn"
    for step in range(9):
        student.shift.data = tensor(step * 1.0)
        assert list(method.step(batch, step)) == ["turn"]
        assert method.last.shift == (0.0, 0.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0)[step]
    assert [s for s, _ in seen] == [8, 8, 4, 4, 2, 2, 1, 1, 1]
    assert [t for _, t in seen] == [("guided", teacher)] * 2 + [method.last] * 7


def test_stages_follow_one_another():
    stages_follow(Progressive)


def test_a_target_shares_what_is_not_trained():
    """With LoRA it has adapters of its own over the student's, and the teacher's, frozen weights."""
    settings = settings_of(lora_rank={"*": 2}, lora_targets=["enter", "leave"])
    method = small("progressive", settings=settings, start=4)
    trained, last = (dict(m.named_parameters()) for m in (method.student, method.last))
    for name, weight in trained.items():
        assert (last[name] is weight) == (not weight.requires_grad)
        assert not last[name].requires_grad
    follow(method.last, Scaled(method.student), keep=0.75)
    for name, weight in trained.items():
        close(last[name], weight if not weight.requires_grad else 1.25 * weight)


class Scaled(nn.Module):
    """The same network with its trained weights doubled, as something else that distributes it might hold them."""

    def __init__(self, net):
        super().__init__()
        self.weights = nn.ParameterList(2 * p.detach() if p.requires_grad else p for p in net.parameters())


def test_bad_starts():
    with pytest.raises(InputError, match=r"start=6 must be the student's 1 step\(s\) doubled some times"):
        checks.build(Progressive, make_path("vp"), checks.Slope(make_path("vp")), start=6)
    with pytest.raises(InputError, match="a grid of 2048 steps has more of them than the teacher has times"):
        checks.build(Progressive, make_path("table"), checks.Slope(make_path("table")), start=1024)


def test_a_student_of_ddim_steps():
    """Its stages end at its own number of steps, it is sampled by DDIM alone, and 0 cuts the run in equal parts."""
    path = make_path("vp")
    few = FewStep(path, path.grid(2), renoise="implied")
    parts = replace(checks.parts(path, checks.two_modes(path), checks.Slope(path), None), few=few, rounds=90)
    method = Progressive(parts, start=8)
    assert (method.stages, method.stage_steps) == ([8, 4, 2], 30)
    with pytest.raises(InputError, match="needs renoise=implied"):
        Progressive(replace(parts, few=FewStep(path, path.grid(2))), start=8)
    with pytest.raises(InputError, match=r"must be the student's 2 step\(s\) doubled"):
        Progressive(parts, start=1)


def lands(module):
    for name in ("vp", "edm"):
        lands_where_two_steps_do(module.Progressive, name)


def weighs(module):
    weight_is_truncated_snr(module.Progressive, "vp")


def follows(module):
    stages_follow(module.Progressive)


def through(module):
    path, x, y = make_path("flow", module=module), tensor([1.0], [2.0]), tensor([0.5], [-1.0])
    t, s = tensor(0.7, 0.9), tensor(0.2, 0.0)
    est = path.through(x, t, y, s)
    close(path.mix(*est[:2], t), x)
    close(path.mix(*est[:2], s), y)


SOURCE = "onestroke.methods.flow.progressive"
MUTANTS = [
    (SOURCE, "like(s, x) > 0, line, two.x0", "like(s, x) >= 0, line, two.x0", lands),
    (SOURCE, "two = teacher(path.mix(one.x0, one.eps, half)", "two = teacher(path.mix(one.x0, x, half)", lands),
    (SOURCE, "grid[k - part], grid", "grid[k], grid", lands),
    (SOURCE, "(2 * steps)", "(4 * steps)", lands),
    (SOURCE, "path.mix(two.x0, two.eps, s), s).x0", "path.mix(two.x0, two.eps, s), half).x0", lands),
    (SOURCE, "step == stage * self.stage_steps", "step == stage", follows),
    (SOURCE, "self.last if stage else", "self.last if not stage else", follows),
    (SOURCE, "follow(self.last, self.student)", "pass", follows),
    ("onestroke.paths", "like(q / det, x) * x - like(b / det, x) * y", "like(q / det, x) * x", through),
    ("onestroke.paths", "like(a / det, x) * y - like(p / det, x) * x", "like(a / det, x) * y", through),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(module, old, new, check):
    check(broken(module, old, old))
    with pytest.raises(AssertionError):
        check(broken(module, old, new))


def test_the_weight_check_fails_on_its_mutant():
    for new in ("torch.minimum(*error)", "error[0]"):
        with mock.patch(
            "onestroke.methods.flow.progressive.terms", broken("onestroke.terms", "torch.maximum(*error)", new)
        ):
            with pytest.raises(AssertionError):
                weight_is_truncated_snr(Progressive, "vp")
