"""BOOT: its target is a DDIM step in the signal, its steps compose, and the exact way is where they lead."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from contract.build import batch as small_batch
from contract.build import build as small
from onestroke.denoiser import plain
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.flow.boot import Boot
from onestroke.paths import Estimate, Flow, like
from onestroke.teachers.gaussian import GaussianMixture
from truth import pair_checks as checks
from truth.checks import F64, Given, close, hand_ab, labels, make_path, tensor
from truth.pair_checks import PATHS, M, S, end_of
from truth.segment_checks import Classes
from truth.test_mutants import broken

SOURCE = "onestroke.methods.flow.boot"


class Said(nn.Module):
    """y_s = p + q s + r s^2 of any noise: where it is asked is remembered."""

    def __init__(self, path):
        super().__init__()
        self.path, self.asked = path, []
        self.p, self.q, self.r = (nn.Parameter(tensor(v)) for v in (0.4, -0.9, 0.3))

    def forward(self, x, t, cond):
        self.asked.append((x, t))
        s = cond["s"][:, None]
        x0 = (self.p + self.q * s + self.r * s**2).expand_as(x)
        return Estimate(x0, x)


class Drawn(Given):
    """Draws whose uniform number is given, as a part of the range."""

    def __init__(self, z, u):
        super().__init__(z)
        self.u = u

    def uniform(self, lo=0.0, hi=1.0):
        return lo + (hi - lo) * torch.full((self.size,), self.u, dtype=F64)


def build(cls, path, student, teacher, scale=1.0, **options):
    """The method on a student that reads the second time by itself."""
    with mock.patch.dict(cls.__init__.__globals__, TwoTimes=lambda net, *_: net):
        return checks.build(cls, path, student, teacher, scale, **options)


def play(method, z, u, label=-1):
    return checks.losses(method, Batch(z, labels(len(z), label), Drawn(z, u)))


def ddim(name, teacher, y, eps, t, s):
    """The signal at s after a DDIM step of the teacher from t, typed by hand: at the data end the teacher's x0."""
    (a, b), (c, d) = hand_ab(name, t), hand_ab(name, s)
    est = teacher(a * y + b * eps, torch.full((len(y),), t, dtype=F64), labels(len(y)))
    return (c * est.x0 + d * est.eps - d * eps) / c


def loss_is_the_ddim_step(cls, name, u=0.37, delta=0.05, beta=0.7, path=None):
    """Both terms, their gradient by the student at s and at the noise end alone, and where the student looks.

    path: the one called `name` where it ends early.
    """
    path, z = path or make_path(name), checks.noise()
    teacher, student = checks.two_modes(path), Said(path)
    s, top, norm = u * path.t_max, path.t_max, end_of(path)[2]
    t = path.snap(tensor(min(s + delta, top))).item()
    start = teacher(norm * z, torch.full((8,), top, dtype=F64), labels(8))
    got = play(build(cls, path, student, teacher, delta=delta, beta=beta), z, u)

    def y(s):
        return (student.p + student.q * s + student.r * s**2).expand_as(z)

    target = ddim(name, teacher, y(t).detach(), start.eps, t, s)
    want = {
        "bootstrap": (y(s) - target).square().mean() / delta**2,
        "boundary": beta * (y(top) - start.x0).square().mean(),
    }
    live = [student.p, student.q, student.r]
    for key in want:
        close(got[key], want[key], 1e-8)
        for one, other in zip(torch.autograd.grad(got[key], live), torch.autograd.grad(want[key], live), strict=True):
            close(one, other, 1e-8)
    for x, when in student.asked:
        close(x, norm * z)
        close(when, torch.full((8,), top, dtype=F64))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("u", [0.02, 0.37, 0.98])
def test_the_loss_is_the_ddim_step(name, u):
    loss_is_the_ddim_step(Boot, name, u)


def early(cls):
    loss_is_the_ddim_step(cls, "flow", path=Flow(t_max=0.9))


def test_its_way_begins_where_the_path_ends():
    early(Boot)


class Way(nn.Module):
    """y_s = (sqrt(V_s / V_T) (x_T - a_T m) - b_s eps) / a_s + m of N(m, S^2), V = a^2 S^2 + b^2: the exact way."""

    def __init__(self, path, mean):
        super().__init__()
        self.path, self.mean, self.teacher = path, mean, GaussianMixture(path, tensor([mean]), S)

    def forward(self, x, t, cond):
        first = self.teacher(x, t, cond)
        (a, b), (c, d) = ((like(v, x) for v in self.path.ab(w)) for w in (t, cond["s"]))
        moved = ((c**2 * S**2 + d**2) / (a**2 * S**2 + b**2)).sqrt() * (x - a * self.mean)
        y = self.mean + (moved - d * first.eps) / c if (c > 0).all() else first.x0
        return Estimate(y, first.eps)


def exact_way_is_a_fixed_point(cls, name, delta=1e-3, w=1.0):
    """Of the exact way the bootstrap is wrong by the O(delta^2) of a DDIM step: with delta it vanishes as delta^2
    once it is divided by delta^2; the boundary holds; and y_0 is the teacher's map of the noise.

    Guided by w, of N(M, S^2) against N(0, S^2), the way is that of N(w M, S^2).
    """
    path, z = make_path(name), checks.noise()
    way = Way(path, w * M)
    for u in (0.1, 0.5, 0.9):
        methods = (build(cls, path, way, Classes(path, M), w, delta=d) for d in (2 * delta, delta))
        coarse, fine = (play(method, z, u, label=0) for method in methods)
        assert fine["boundary"] < 1e-20
        assert 3.5 < coarse["bootstrap"] / fine["bootstrap"] < 4.5
    a, b, norm = end_of(path)
    end = way(norm * z, tensor(path.t_max).expand(8), {"s": torch.zeros(8, dtype=F64), **labels(8)}).x0
    c, d = (v.item() for v in path.ab(tensor(0.0)))
    want = w * M + S * (norm * z - a * w * M) / (a**2 * S**2 + b**2) ** 0.5
    close(end, want, 0, 3 * d / c + 1e-9)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "trig", "trig half"])
def test_the_exact_way_is_a_fixed_point(name):
    exact_way_is_a_fixed_point(Boot, name)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_a_guided_student_has_the_guided_mean(name):
    exact_way_is_a_fixed_point(Boot, name, w=3.0)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "table0"])
def test_its_steps_compose_to_the_teacher_s_ddim(name):
    """From the noise end down, each y the target of the one above: on a Gaussian of mean 0 the picture is the product
    of kappa = (a c S^2 + b d) / (a^2 S^2 + b^2), times the noise."""
    path, z, steps = make_path(name), checks.noise(), 20
    teacher, known = GaussianMixture(path, tensor([0.0]), S), {}
    a, b, norm = end_of(path)
    kappa, last, rest = norm, path.t_max, b * norm / (a**2 * S**2 + b**2)
    known[last] = a * S**2 / (a**2 * S**2 + b**2) * norm * z
    table = nn.Module()
    table.forward = lambda x, t, cond: Estimate(known[cond["s"][0].item()], x)
    for k in reversed(range(steps)):
        s = path.snap(tensor(k / steps)).item()
        method = build(Boot, path, table, teacher, delta=last - s)
        (c, d), (e, f) = hand_ab(name, last), hand_ab(name, s)
        kappa *= (c * e * S**2 + d * f) / (c**2 * S**2 + d**2)
        known[s] = (kappa - f * rest) / e * z
        t = path.snap(tensor(s + method.delta)).item()
        known.setdefault(t, known[last])  # where it rounds to
        with mock.patch.object(Drawn, "uniform", lambda *_, s=s: torch.full((8,), s, dtype=F64)):
            assert play(method, z, 0)["bootstrap"] < 1e-14
        last = s
    assert 0.2 < kappa < 0.52


def test_it_starts_as_the_teacher_at_the_noise_end():
    """Before training the student says at every s what its network says of the noise."""
    method, data = small("boot", guidance=1.0), small_batch()
    net = plain(method.student)
    assert net is not method.student
    want = net(method.few.input(data.noise), method.few.time(0, data.noise), data.cond).x0
    for s in (0.0, 0.3, 1.0):
        close(method.signal(data.noise, torch.full((8,), s, dtype=F64), data.cond), want)


def test_a_step_is_a_part_of_time():
    with pytest.raises(InputError, match=r"delta=0 is a part of unit time: it must lie in \(0, 1\]"):
        small("boot", delta=0)


def loss(module):
    for name in ("vp", "edm"):
        loss_is_the_ddim_step(module.Boot, name)
    loss_is_the_ddim_step(module.Boot, "vp", 0.98)


def begun(module):
    early(module.Boot)


def fixed(module):
    exact_way_is_a_fixed_point(module.Boot, "vp")


def guided(module):
    exact_way_is_a_fixed_point(module.Boot, "vp", w=3.0)


MUTANTS = [
    ("a * d / (c * b)", "c * b / (a * d)", loss),
    ("(y - x0)\n", "(x0 - y)\n", fixed),
    ("path.mix(y, first.eps, t)", "path.mix(y, noise, t)", loss),
    (".minimum(end)", "", loss),
    ("/ self.delta**2", "", loss),
    ("with torch.no_grad():", "if True:", loss),
    ("self.signal(noise, end, cond) - first.x0", "self.signal(noise, s, cond) - first.x0", loss),
    ('{**cond, "s": s}', '{**cond, "s": 0 * s}', loss),
    ("uniform(0, self.few.times[0])", "uniform(0, 1)", begun),
    ("self.guide(self.teacher)", "self.teacher", guided),
    ("self.guide(self.teacher)", "self.guide(self.teacher, 4.0)", guided),
    ("x0 = teacher(path.mix(", "x0 = self.teacher(path.mix(", guided),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new))
