"""AGD: on the teacher's own guided way the student of mean w m is the guided teacher; adapters start as nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from contract.build import batch as small_batch
from contract.build import build, settings_of, small_net
from onestroke.denoiser import Guided, Told, TwoTimes, told_around
from onestroke.method import Batch
from onestroke.methods import options
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
    method = cls(replace(made, solver_steps=STEPS), spread=0.0)
    return checks.losses(method, Batch(z.flip(0), cond, Rows(z), ways=ways, side=tensor(0.0).expand(8)))["guide"]


class TwoTold(nn.Module):
    """A student that answers as N(w M, S^2) for the guidance w that it is told, and `off` beside."""

    def __init__(self, path, off=0.0):
        super().__init__()
        self.path, self.off = path, nn.Parameter(tensor(off))

    def forward(self, x, t, cond):
        w = 1 + (W - 1) * (1 + 0.5 * cond["s"])
        ests = [Seen(self.path, w_row * M + self.off.item())(x[i : i + 1], t[i : i + 1], {"label": cond["label"][:1]})
                for i, w_row in enumerate(w.tolist())]  # fmt: skip
        return Estimate(torch.cat([e.x0 for e in ests]), torch.cat([e.eps for e in ests]))


def every_way_is_told_its_guidance(cls, name="vp"):
    """Ways of w = 1 + (W - 1)(1 + s / 2): the loss vanishes at the means w m, each told by its s."""
    path, z = make_path(name), checks.noise(seed=40)
    made, side = checks.parts(path, Shifting(path), Seen(path, M), None, W), torch.linspace(-1, 1, 8, dtype=F64)
    cond = {"label": torch.zeros(len(z), dtype=torch.int64)}
    ways = way(Guided(made.teacher, 1 + (W - 1) * (1 + 0.5 * side), made.null), path, z, cond, STEPS)
    for off, zero in ((0.0, True), (0.5, False)):
        method = cls(replace(made, solver_steps=STEPS), spread=0.0)
        method.student, method.guidance = TwoTold(path, off), told_around(W, 0.5)
        found = checks.losses(method, Batch(z.flip(0), cond, Rows(z), ways=ways, side=side))["guide"]
        assert (found < 1e-20) == zero


@pytest.mark.parametrize("name", PATHS)
def test_every_way_is_told_its_guidance(name):
    every_way_is_told_its_guidance(AGD, name)


def test_published_guidance_is_from_1_to_12():
    assert told_around(AGD.defaults["guidance_scale"], options(AGD)["spread"]) == Told(6.5, 5.5, 5.5)
    assert isinstance(build("agd").student, TwoTimes)
    assert "sides" in AGD.needs_of({"spread": 1.0})
    assert "sides" not in AGD.needs_of({"spread": 0.0})


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


def told(module):
    every_way_is_told_its_guidance(module.AGD)


MUTANTS = [
    ('"s": batch.side}', '"s": -batch.side}', told),
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
