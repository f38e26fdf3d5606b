"""AGD: on the teacher's own guided way the student of mean w m is the guided teacher; adapters start as nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from contract.build import batch as small_batch
from contract.build import build as small
from contract.build import settings_of, small_net
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.guidance.agd import AGD
from onestroke.paths import Estimate
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.training.roles import make_role
from truth import pair_checks as checks
from truth.checks import F64, Given, close, hand_ab, make_path, tensor
from truth.pair_checks import PATHS, M, S, end_of
from truth.test_guided_distillation import Shifting
from truth.test_mutants import broken

SOURCE = "onestroke.methods.guidance.agd"
W, POINTS = 3.0, 5


class Shift(Given):
    """Draws whose uniform numbers are given."""

    def __init__(self, z):
        super().__init__(z)
        self.u = torch.linspace(0.001, 0.99, len(z), dtype=F64)

    def uniform(self, lo=0.0, hi=1.0):
        return self.u


class Seen(nn.Module):
    """A student that answers as N(mean, S^2), and remembers what it was asked."""

    def __init__(self, path, mean):
        super().__init__()
        self.path, self.mean = path, nn.Parameter(tensor(mean))

    def forward(self, x, t, cond):
        self.asked = x.detach(), t, cond["label"]
        found = GaussianMixture(self.path, tensor([0.0]), S)
        a, b = (c[:, None] for c in self.path.ab(t))
        est, shift = found(x, t, {"label": cond["label"] * 0}), b**2 / (a**2 * S**2 + b**2) * self.mean
        return Estimate(est.x0 + shift, est.eps - a * shift / b)


def build(cls, path, student, w=W):
    return cls(checks.parts(path, Shifting(path), student, None, w), points=POINTS)


def play(method, z):
    cond = {"label": torch.zeros(len(z), dtype=torch.int64)}
    return checks.losses(method, Batch(z, cond, Shift(z)))["guide"]


def mean_is_w_m(cls, name):
    """With equal deviations guidance w moves the mean m to w m: there the loss vanishes, and nowhere near."""
    path, z = make_path(name), checks.noise(seed=40)
    for mean, zero in ((W * M, True), (M, False), ((W + 1) * M, False)):
        assert (play(build(cls, path, Seen(path, mean)), z) < 1e-20) == zero


@pytest.mark.parametrize("name", PATHS)
def test_the_mean_is_w_m(name):
    mean_is_w_m(AGD, name)


def states_are_those_of_the_guided_way(cls, name):
    """DDIM steps of N(w m, S^2) from the noise, typed by hand, at times that every way shifts as a whole; the last is
    within a step of the data."""
    path, z = make_path(name), checks.noise(seed=40)
    student = Seen(path, M)
    play(build(cls, path, student), z)
    x, t, label = student.asked
    shift, size = Shift(z).u, len(z)
    assert x.shape == (POINTS * size, 1)
    assert (label == 0).all()
    for row in range(size):
        state, time = end_of(path)[2] * z[row].item(), path.t_max
        for k in range(POINTS):
            close(t[k * size + row], time)
            close(x[k * size + row], tensor(state), 1e-7, 1e-10)
            a, b = hand_ab(name, time)
            mean = W * M
            eps = b * (state - a * mean) / (a**2 * S**2 + b**2)
            x0 = mean + a * S**2 * (state - a * mean) / (a**2 * S**2 + b**2)
            time = path.t_max * (1 - (k + 1 - shift[row].item()) / (POINTS - 1))
            time = max(path.snap(tensor(time)).item(), path.t_min)
            c, d = hand_ab(name, time)
            state = c * x0 + d * eps


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "table"])
def test_the_states_are_those_of_the_guided_way(name):
    states_are_those_of_the_guided_way(AGD, name)


def gradient_is_that_of_the_mean(cls, name="vp"):
    """The student's x0 is off by b^2 / V (mu - w m), its eps by a b / V of it: the larger one, squared, by mu."""
    path, z = make_path(name), checks.noise(seed=40)
    student = Seen(path, M)
    loss = play(build(cls, path, student), z)
    a, b = path.ab(student.asked[1])
    off = torch.maximum(b**2, a * b) / (a**2 * S**2 + b**2)
    close(loss, (off**2).mean() * ((W - 1) * M) ** 2)
    loss.backward()
    close(student.mean.grad[0], -2 * (off**2).mean() * (W - 1) * M)


def test_the_gradient_is_that_of_the_mean():
    gradient_is_that_of_the_mean(AGD)


def test_adapters_start_as_nothing_and_are_all_that_is_trained():
    settings = settings_of(lora_rank={"*": 2}, lora_targets=["enter", "leave"])
    teacher = small_net(make_path("vp"), "v", "teacher").requires_grad_(False)
    student, data = make_role(teacher, "student", settings), small_batch()
    t = torch.full((8,), 0.4, dtype=F64)
    assert torch.equal(student(data.noise, t, data.cond).x0, teacher(data.noise, t, data.cond).x0)
    live = {name for name, p in student.named_parameters() if p.requires_grad}
    assert live
    assert all("lora_" in name for name in live)
    assert AGD.defaults["lora_rank"] == {"student": 16}


def test_without_guidance_there_is_nothing_to_learn():
    """A student that is the teacher has no loss at scale 1, and some at 2."""
    for scale, zero in ((1.0, True), (2.0, False)):
        method = small("agd", guidance=scale)
        method.student = method.teacher
        (turn,) = method.step(small_batch(), 0)
        assert (turn.terms["guide"] < 1e-20) == zero


def test_a_way_has_two_ends():
    with pytest.raises(InputError, match="points=1 must be at least 2"):
        small("agd", points=1)


def mean(module):
    mean_is_w_m(module.AGD, "vp")


def states(module):
    states_are_those_of_the_guided_way(module.AGD, "vp")


def gradient(module):
    gradient_is_that_of_the_mean(module.AGD)


MUTANTS = [
    ("self.guide(self.teacher)", "self.teacher", mean),
    ("path.mix(est.x0, est.eps, t)", "path.mix(est.x0, batch.noise, t)", states),
    ("(k + 1 - shift)", "(k + shift)", states),
    (".clamp_min(path.t_min)", "", states),
    ("est, x0, eps)", "est, eps, x0)", mean),
    ("torch.cat([v] * self.points)", "torch.cat([v - 1] * self.points)", states),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new))
