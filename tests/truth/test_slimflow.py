"""SlimFlow: annealed noise, and distillation guided by two steps of the straightened flow."""

from __future__ import annotations

import pytest
import torch

from onestroke.errors import InputError
from onestroke.methods.flow.slimflow import SlimFlow
from onestroke.paths import Flow
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.truth import converge, ring
from truth import pair_checks as checks
from truth.checks import F64, Given, T, close, hand_ab, labels, make_path, tensor
from truth.pair_checks import PATHS, M, S
from truth.test_mutants import broken


def noise_is_annealed(cls, name, step, beta, anneal=8):
    """sqrt(1 - beta^2) z + beta e, beta = 1 - step / anneal: fresh noise alone at first, the pair's alone at last."""
    path, z, e = make_path(name), checks.noise(), checks.noise(seed=21)
    student, x0 = checks.Slope(path, 0.7, 0.9), M + S * z
    method = checks.build(cls, path, student, anneal=anneal, straighten=100)
    with checks.at(T):
        got = checks.losses(method, checks.batch(z, draw=Given(e)), step)
    mixed = (1 - beta**2) ** 0.5 * z + beta * e
    assert got.keys() == {"flow"}
    close(got["flow"], checks.velocity_error(path, name, student, mixed, x0, T))


STEPS = [(0, 1.0), (2, 0.75), (6, 0.25), (8, 0.0), (50, 0.0)]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("step", "beta"), STEPS)
def test_noise_is_annealed(name, step, beta):
    noise_is_annealed(SlimFlow, name, step, beta)


class Drawn(Given):
    """Draws whose uniform number is given."""

    def __init__(self, z, u):
        super().__init__(z)
        self.u = u

    def uniform(self, lo=0.0, hi=1.0):
        assert (lo, hi) == (0.2, 0.8)
        return torch.full((self.size,), self.u, dtype=F64)


def guided_by_two_steps(cls, first, u=0.3):
    """On the straight path, sheet 5.3: x_m = e - u v(e, 1), picture x_m - (1 - u) v_phi(x_m, 1 - u), v = eps - x0."""
    path, z, e = make_path("flow"), checks.noise(), checks.noise(seed=22)
    curved = GaussianMixture(path, tensor([M]), S)
    student = checks.Slope(path, 0.7, 0.9)
    method = checks.build(cls, path, student, straighten=1, first=first)
    method.straight = curved  # what it would have become is another
    terms = checks.losses(method, checks.batch(z, fresh=e, draw=Drawn(z, u)), step=2)

    def velocity(net, x, t):
        est = net(x, torch.full((8,), t, dtype=F64), labels(8))
        return est.eps - est.x0

    middle = e - u * velocity(curved if first == "straight" else student, e, 1.0)
    picture = middle - (1 - u) * velocity(curved, middle, 1 - u)
    close(terms["guided"], (velocity(student, e, 1.0) - (e - picture)).square().mean())
    close(terms["pair"], (velocity(student, z, 1.0) - (z - M - S * z)).square().mean())


@pytest.mark.parametrize("first", ["straight", "student"])
def test_guided_by_two_steps_of_the_straightened_flow(first):
    guided_by_two_steps(SlimFlow, first)


def two_steps_share_the_straight_time(cls, name):
    """Where the part u of b / (a + b) at the noise end has gone by, 1 - u of it is left."""
    path, u = make_path(name), 0.3
    (a, b, _), method = checks.end_of(path), checks.build(cls, path, checks.Slope(path))
    c, d = hand_ab(name, method.part(tensor(path.t_max), tensor(u)).item())
    assert d / (c + d) == pytest.approx((1 - u) * b / (a + b), rel=1e-6)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "trig", "trig half"])
def test_two_steps_share_the_straight_time(name):
    two_steps_share_the_straight_time(SlimFlow, name)


def straightens(cls):
    """Six tenths of the run, and noise is annealed over three quarters of them."""
    assert checks.straightens(cls, 600).anneal == 450


def test_what_a_run_is_divided_into():
    straightens(SlimFlow)


def nothing_moves_when_straight(cls, name):
    """The straightened student of a Gaussian is already its own two steps, on every path."""
    path, z = make_path(name), checks.noise()
    student = checks.Slope(path)
    method = checks.build(cls, path, checks.Slope(path, 0.0, 1.0), straighten=5)
    method.student = student
    terms = checks.losses(method, checks.batch(z, fresh=checks.noise(seed=23)), step=5)
    assert all(v < 1e-20 for v in terms.values())
    assert method.straight.mu == student.mu  # it followed
    sum(terms.values()).backward()
    assert method.straight.mu.grad is None


@pytest.mark.parametrize("name", PATHS)
def test_nothing_moves_when_straight(name):
    nothing_moves_when_straight(SlimFlow, name)


def test_the_first_step_has_two_owners():
    with pytest.raises(InputError, match="first='own' must be one of straight, student"):
        checks.build(SlimFlow, make_path("vp"), checks.Slope(make_path("vp")), first="own")


def test_a_smaller_student_finds_the_truth():
    """With one layer of three, which is no flow at the start: a third of the fitted net's distance is left at most."""
    short = dict(steps=600, straighten=400, anneal=200, batch_size=256, seconds=600, lr=3e-3)
    result = converge("slimflow", ring(Flow(), 4, std=0.3), prediction="flow", layers=0.34, **short)
    assert result.rounds == 600
    assert result.sliced_w2 < result.start / 3
    assert result.worst_mode > 0.5


def anneals(module):
    for step, beta in STEPS:
        noise_is_annealed(module.SlimFlow, "vp", step, beta)


def guides(module):
    for first in ("straight", "student"):
        guided_by_two_steps(module.SlimFlow, first)


def shares(module):
    two_steps_share_the_straight_time(module.SlimFlow, "vp")


def parts_of_a_run(module):
    straightens(module.SlimFlow)


def still(module):
    nothing_moves_when_straight(module.SlimFlow, "vp")


SOURCE = "onestroke.methods.flow.slimflow"
MUTANTS = [
    ("(1 - beta**2) ** 0.5", "(1 - beta)", anneals),
    ("1 - step / self.anneal", "step / self.anneal", anneals),
    ("follow(self.straight, self.student)", "pass", still),
    ("step == self.straighten", "step != self.straighten", still),
    ("(1 - u) * torch.sigmoid", "u * torch.sigmoid", guides),
    ("(1 - u) * torch.sigmoid(-self.path.log_snr(end))", "1 - u", shares),
    ("6 * parts.rounds // 10", "7 * parts.rounds // 10", parts_of_a_run),
    ("3 * self.straighten // 4", "self.straighten // 2", parts_of_a_run),
    ("lo=0.001", "lo=0.01", parts_of_a_run),
    ("two = self.straight(", "two = self.student(", guides),
    ('if self.first == "straight" else', 'if self.first != "straight" else', guides),
    ("self.error(batch.noise, two", "self.error(noise, two", guides),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new))
