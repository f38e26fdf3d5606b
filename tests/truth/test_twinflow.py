"""TwinFlow: the second time, the recursive base, the twin's regression and the rectifier, against closed forms."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from conftest import PROMPTS, tiny_pipeline
from contract.build import build, small_net
from onestroke import distill
from onestroke.denoiser import OnPath, TwoTimes, plain
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.distribution.twinflow import TwinFlow
from onestroke.paths import Estimate, Flow
from onestroke.teachers.pipeline import PipelineTeacher
from truth import checks
from truth.checks import F64, T, close, hand_ab, labels, make_path, tensor
from truth.score_checks import MU, TAU, M, S, gauss, posterior
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", ["vp", "edm", "flow", "table0"])


class Given(checks.Given):
    """Draws whose uniform numbers are given as well: of the kind, then of s."""

    def __init__(self, *normals, uniforms=()):
        super().__init__(*normals)
        self.uniforms = list(uniforms)

    def uniform(self, lo=0.0, hi=1.0):
        return torch.full((self.size,), self.uniforms.pop(0), dtype=F64)


class Branches(torch.nn.Module):
    """The jump gives free samples; the flow (s >= 0) is the teacher's law, the twin (s < 0) the student's."""

    def __init__(self, path, x, real, fake):
        super().__init__()
        self.free, self.real, self.fake = checks.Free(x), real, fake

    def forward(self, x, t, cond):
        if "s" not in cond:
            return self.free(x, t, cond)
        twin = (cond["s"] < 0)[:, None]
        return Estimate(*(torch.where(twin, f, r) for f, r in zip(self.fake(x, t, cond)[:2], self.real(x, t, cond)[:2],
                                                                 strict=True)))  # fmt: skip


def game(cls, name, kind, x, z, e, e2, fake=(MU, S), **options):
    """The only turn, and the student, of rows of one kind at T; the teacher is the law of the flow branch."""
    path = make_path(name)
    given = checks.parts(path, gauss(path, M, TAU), small_net(path, "x0", "student"), None)
    method = cls(replace(given, shape=(2,)), **options)
    method.student = Branches(path, x, gauss(path, M, TAU), gauss(path, *fake))
    with mock.patch("onestroke.times.straight", lambda draw, path: torch.full((draw.size,), T, dtype=F64)):
        draw = Given(e, e2, uniforms=[(kind + 0.5) / 4, 0.5])
        (turn,) = method.step(Batch(z, labels(len(z)), draw), 0)
    return turn, method.student


def rectifier(cls, name, fake=(MU, S)):
    """By hand: 0.5 / B times 2 gap / sqrt(gap^2 + c^2), gap = F_twin - F_flow clamped to +-1, on the jump eps - x0."""
    z, e, e2 = torch.randn(3, 8, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    x = MU + S * z
    turn, student = game(cls, name, 1, x, z, e, e2, fake)
    turn.terms["rectifier"].backward()
    a, b = hand_ab(name)
    xt = a * x + b * e2
    d_p = posterior(x, e2, a, b)[0]
    d_q = fake[0] + a * fake[1] ** 2 / (a**2 * fake[1] ** 2 + b**2) * (xt - a * fake[0])
    gap = (((xt - a * d_q) / b - d_q) - ((xt - a * d_p) / b - d_p)).clamp(-1, 1)
    close(student.free.x.grad, -0.5 * 2 * gap / (gap**2 + 1e-6).sqrt() / 8)
    close(turn.terms["rectifier"], 0.5 * (gap**2 / (gap**2 + 1e-6).sqrt()).mean())
    return student.free.x.grad, gap


@each
def test_the_rectifier_is_the_clamped_difference_of_twin_and_flow(name):
    grad, gap = rectifier(TwinFlow, name)
    assert (gap.abs() < 1).any()
    a, b = hand_ab(name)
    p, q = (a * s**2 / (a**2 * s**2 + b**2) for s in (TAU, S))
    assert grad.sum() * (MU - M) > 0, "on the whole the samples move towards the teacher's mean"
    assert ((1 - a * q) * MU - (1 - a * p) * M) * grad.sum() > 0


@each
def test_nothing_is_rectified_when_the_branches_agree(name):
    z, e, e2 = torch.randn(3, 8, 1, generator=torch.Generator().manual_seed(2), dtype=F64)
    turn, student = game(TwinFlow, name, 1, MU + S * z, z, e, e2, fake=(M, TAU))
    turn.terms["rectifier"].backward()
    assert turn.terms["rectifier"] == 0
    assert (student.free.x.grad == 0).all()


def twin(cls, name):
    """The twin learns the velocity e - x of the student's own noised samples, at weight one and without a clamp."""
    z, e, e2 = torch.randn(3, 8, 1, generator=torch.Generator().manual_seed(3), dtype=F64)
    x = MU + S * z
    turn, _ = game(cls, name, 3, x, z, e, e2)
    a, b = hand_ab(name)
    _, _, d_q, _ = posterior(x, e, a, b)
    error = ((a * x + b * e - a * d_q) / b - d_q - (e - x)) ** 2
    close(turn.terms["base"], (error / (error + 1e-6).sqrt()).mean())


@each
def test_the_twin_learns_the_students_own_flow(name):
    twin(TwinFlow, name)


class Jumps(torch.nn.Module):
    """The exact average velocity of the flow of N(0, tau^2): F(x, t, s) = x (1 - std(s) / std(t)) / (t - s)."""

    def __init__(self, tau=0.6):
        super().__init__()
        self.tau = tau

    def std(self, t):
        return ((1 - t) ** 2 * self.tau**2 + t**2).sqrt()

    def velocity(self, x, t, s):
        slope = (t - (1 - t) * self.tau**2) / self.std(t) ** 2
        return x * torch.where(t == s, slope, (1 - self.std(s) / self.std(t)) / torch.where(t == s, 1.0, t - s))

    def forward(self, x, t, cond):
        f = self.velocity(x, t[:, None], cond["s"][:, None])
        return Estimate(x - t[:, None] * f, x + (1 - t[:, None]) * f)


def base(cls, **options):
    """Sheet 17, item 7: of the exact F the residual is O(gap), -0.0036 at t = 0.8, s = 0.2, tau = 0.6, x = 1.3."""
    path = Flow()
    method = build("twinflow", "flow", "flow")
    method.student, method.path = Jumps(), path
    method.__class__ = cls
    for key, value in options.items():
        setattr(method, key, value)
    x, t, s = tensor([1.3]), tensor(0.8), tensor(0.2)
    f, v = (method.student.velocity(x, t, end) for end in (s, t))
    return method.residual(x, t, s, f, v, {}).item(), method, v


def published_residual(cls):
    assert base(cls)[0] == pytest.approx(-0.0036, abs=5e-5)


def test_the_exact_velocity_solves_the_base():
    published_residual(TwinFlow)
    assert base(TwinFlow, gap=0.001)[0] == pytest.approx(-0.00036, abs=1e-5)
    for order in (1, 2, 5):  # exact jumps compose exactly: the order does not matter at the truth
        assert base(TwinFlow, order=order)[0] == pytest.approx(-0.0036, abs=5e-5)


def test_near_the_diagonal_the_base_is_the_velocity():
    """Less than a gap away, F is asked for the teacher's velocity itself."""
    _, method, v = base(TwinFlow)
    x, t, f = tensor([1.3]), tensor(0.8), tensor([0.25])
    close(method.residual(x, t, t - 0.009, f, v, {}), f - v)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_kinds_and_weights(kind):
    """Rows from the top to 0, to any s and just below t: weight tan((1 - (t - s)) pi / 2.5) + 1 on a known error."""
    z, e, e2 = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(4), dtype=F64)
    asked = []
    with mock.patch.object(TwinFlow, "residual", lambda self, x, t, s, f, v, cond: asked.append((t, s)) or 0 * f + 0.3):
        turn, _ = game(TwinFlow, "flow", kind, MU + S * z, z, e, e2)
    t, s = asked[0]
    want = [(1.0, 0.0), (T, 0.5 * T), (T, T * (1 - 0.05 * 0.5))][kind]
    close(torch.stack([t[0], s[0]]), want)
    weight = torch.tan((1 - (t - s)) * (torch.pi / 2.5)) + 1
    close(turn.terms["base"], (weight * 0.09 / (0.09 + 1e-6) ** 0.5).mean())


# ---- the second time -----------------------------------------------------------------------------------------


def wrapped():
    path = make_path("vp")
    net = small_net(path, "v", "student")
    return net, TwoTimes(net, (2,), {"label": torch.tensor([-1])})


def test_the_second_time_starts_as_nothing_and_stays_nothing_at_zero():
    net, two = wrapped()
    x, t, cond = torch.randn(5, 2, dtype=F64), torch.rand(5, dtype=F64), {"label": torch.arange(5) % 3}

    def call(s=None):
        return two(x, t, cond if s is None else {**cond, "s": s}).x0

    want = net(x, t, cond).x0
    assert torch.equal(call(), want)
    assert torch.equal(call(t), want)
    torch.nn.init.normal_(two.shift.weight)
    assert torch.equal(call(), want)
    assert torch.equal(call(0 * t), want)
    seen = [want, call(t), call(-t), call(t / 2)]
    for i in range(4):
        for j in range(i):
            assert (seen[i] - seen[j]).abs().min() > 1e-3
    assert torch.equal(net(x, t, cond).x0, want), "no hook is left"
    assert plain(two) is net
    assert plain(net) is net


def test_a_unet_reads_it_and_an_exact_teacher_cannot():
    net = PipelineTeacher(tiny_pipeline(), "tiny").net
    null = {"text": torch.zeros(1, 16, 16)}
    two = TwoTimes(net, (4, 4, 4), null)
    torch.nn.init.normal_(two.shift.weight)
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([0.5], dtype=F64)
    assert torch.equal(two(x, t, {**null, "s": 0 * t}).x0, net(x, t, null).x0)
    assert (two(x, t, {**null, "s": t}).x0 - net(x, t, null).x0).abs().max() > 1e-3
    with pytest.raises(InputError, match="Gain has no time embedding that could take a second time"):
        TwoTimes(gauss(make_path("vp"), 0.0, 1.0), (1,), {})


def test_what_is_kept_is_an_ordinary_pipeline(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "teacher")
    run = {"steps": 2, "batch_size": 2, "log_with": "none", "ema": 0.0, "lr": 1e-2}
    student = distill(str(tmp_path / "teacher"), method="twinflow", prompts=PROMPTS, out=tmp_path / "out", **run)
    assert not [name for name in student.model.net.state_dict() if "shift" in name]
    before = PipelineTeacher.load(tmp_path / "teacher").net.state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in student.model.net.state_dict().items())


def test_the_straight_path_is_read_to_its_very_end():
    """At a = 0 the ratio of the signals is 0 / 0; that of a + b is not."""
    path = make_path("table0")
    net = gauss(path, M, TAU)
    x = torch.randn(3, 1, dtype=F64)
    got = OnPath(net, path, Flow())(x, torch.ones(3, dtype=F64), labels(3))
    close(got.x0, torch.full((3, 1), M, dtype=F64))
    close(got.eps, x)


# ---- do the checks notice? -----------------------------------------------------------------------------------


def rectified(cls):
    rectifier(cls, "vp")


def twinned(cls):
    twin(cls, "vp")


SOURCE = "onestroke.methods.distribution.twinflow"
MUTANTS = [
    ("self.velocity(xt, t, -t, cond) - self.velocity(xt, t, t, cond)",
     "self.velocity(xt, t, t, cond) - self.velocity(xt, t, -t, cond)", rectified),
    ("gap.clamp(-self.limit, self.limit)", "gap", rectified),
    ("rectify: float = 0.5", "rectify: float = 1.0", rectified),
    ("(jump - gap.clamp(-self.limit, self.limit)).detach()", "jump - gap.clamp(-self.limit, self.limit)", rectified),
    ("(error.detach() + c**2)", "(error + c**2)", rectified),
    ("z - x, f - wrong", "x - z, f - wrong", twinned),
    ("u * t, -t])", "u * t, t])", twinned),
    ("torch.where(kind == 3, 1.0,", "torch.where(kind == 4, 1.0,", twinned),
    ("x - self.gap * v", "x + self.gap * v", published_residual),
    ("return start - x", "return x - start", published_residual),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).TwinFlow)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new).TwinFlow)
