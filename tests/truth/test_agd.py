"""AGD: on the teacher's own guided way the student of mean w m is the guided teacher; adapters start as nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from contract.build import batch as small_batch
from contract.build import settings_of, small_net
from onestroke.method import Batch
from onestroke.methods.guidance.agd import AGD
from onestroke.paths import Estimate
from onestroke.solvers import way
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.training.roles import make_role
from truth import pair_checks as checks
from truth.checks import F64, Given, close, make_path, tensor
from truth.pair_checks import PATHS, M, S
from truth.test_guided_distillation import Shifting
from truth.test_mutants import broken
from truth.test_ways import by_hand

SOURCE = "onestroke.methods.guidance.agd"
W, STEPS = 3.0, 5


class Rows(Given):
    """Draws whose uniform numbers are given: every state of a way in turn."""

    def uniform(self, lo=0.0, hi=1.0):
        return (torch.arange(self.size, dtype=F64) % STEPS + 0.5) / STEPS


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


def play(cls, path, student, w=W):
    """The loss of a student on the guided teacher's ways, each at a state of its own; the batch's noise is another."""
    made, z = checks.parts(path, Shifting(path), student, None, w), checks.noise(seed=40)
    cond = {"label": torch.zeros(len(z), dtype=torch.int64)}
    ways = way(made.guide(made.teacher), path, z, cond, STEPS)
    method = cls(replace(made, solver_steps=STEPS))
    return checks.losses(method, Batch(z.flip(0), cond, Rows(z), ways=ways))["guide"]


def mean_is_w_m(cls, name):
    """With equal deviations guidance w moves the mean m to w m: there the loss vanishes, and nowhere near."""
    path = make_path(name)
    for mean, zero in ((W * M, True), (M, False), ((W + 1) * M, False)):
        assert (play(cls, path, Seen(path, mean)) < 1e-20) == zero


@pytest.mark.parametrize("name", PATHS)
def test_the_mean_is_w_m(name):
    mean_is_w_m(AGD, name)


def asked_at_the_states_of_its_way(cls, name):
    """Row r of eight is asked at state r of its own way, whose states are those typed by hand."""
    path, z, student = make_path(name), checks.noise(seed=40), Seen(make_path(name), M)
    play(cls, path, student)
    times, states, _ = by_hand(name, path, z, STEPS, W * M)
    x, t, label = student.asked
    row = torch.arange(8)
    close(t, tensor(*times)[row % STEPS])
    close(x, states[row, row % STEPS], 1e-7, 1e-9)
    assert (label == 0).all()


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "table"])
def test_it_is_asked_at_the_states_of_its_way(name):
    asked_at_the_states_of_its_way(AGD, name)


def gradient_is_that_of_the_mean(cls, name="vp"):
    """The student's x0 is off by b^2 / V (mu - w m), its eps by a b / V of it: the larger one, squared, by mu."""
    path = make_path(name)
    student = Seen(path, M)
    loss = play(cls, path, student)
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
    path = make_path("vp")
    for scale, zero in ((1.0, True), (2.0, False)):
        assert (play(AGD, path, Shifting(path), scale) < 1e-20) == zero


def mean(module):
    mean_is_w_m(module.AGD, "vp")


def states(module):
    asked_at_the_states_of_its_way(module.AGD, "vp")


def gradient(module):
    gradient_is_that_of_the_mean(module.AGD)


MUTANTS = [
    ("self.count).long()", "self.count).long() * 0", states),
    ("k, k + 1)", "k, 0 * k + self.count)", mean),
    ("said.x0, said.eps", "said.eps, said.x0", mean),
    ("terms.truncated_snr(est, said.x0, said.eps)", "(est.eps - said.eps).square().mean()", gradient),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new))
