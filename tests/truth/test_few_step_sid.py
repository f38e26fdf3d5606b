"""Few-step SiD: SiD on a uniform mixture over the student's steps; its guidance; the noise between the steps."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from onestroke import truth
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch, Parts
from onestroke.methods.score.few_step_sid import FewStepSiD
from onestroke.methods.score.sid import SiD
from onestroke.paths import EDM, Flow
from onestroke.sampling import FewStep
from onestroke.settings import Settings
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.terms import TIME_WEIGHTS
from onestroke.training.train import Data, Trainer
from truth import score_checks as checks
from truth.checks import F64, close, hand_ab, labels, make_path, tensor
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", checks.PATHS)


def weights(a, b):
    """By hand, of the straight path's sigma (sheet 7.3)."""
    s = b / (a + b)
    snr = ((1 - s) / s) ** 2
    table = {"one": 1.0, "1-sigma": 1 - s, "(1-sigma)^2": (1 - s) ** 2, "1/sigma": 1 / s, "1/sigma^2": s**-2}
    return {**table, "snr": snr, "sqrt-snr": math.sqrt(snr)}


# ---- one step ------------------------------------------------------------------------------------------------


def one_step_is_sid(cls, name):
    """The same bits as SiD's student turn, where the options say what SiD does."""
    path, found = make_path(name), []
    z, e = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    for method in (partial(cls, weight="gap", alpha=1.2, scale=100.0), SiD):
        student, teacher = checks.Free(checks.MU + checks.S * z), checks.gauss(path, checks.M, checks.TAU, 3)
        given = checks.parts(path, teacher, student, checks.gauss(path, checks.MU, checks.S, 3))
        found.append(checks.direction(method(given), student, z, e, labels(6)))
    assert torch.equal(*found)
    assert (found[0] != 0).all()


@each
def test_one_step_is_sid(name):
    one_step_is_sid(FewStepSiD, name)


@each
@pytest.mark.parametrize("scheme", TIME_WEIGHTS)
def test_the_expected_gradient_is_the_closed_form_under_every_weight(name, scheme):
    a, b = hand_ab(name)
    for alpha in checks.ALPHAS:
        cls = partial(FewStepSiD, weight=scheme)
        checks.sid_is_the_closed_form(cls, make_path(name), a, b, alpha, weight=weights(a, b)[scheme])


@each
def test_gradient_flows_through_teacher_and_fake(name):
    checks.gradient_flows_through_teacher_and_fake(FewStepSiD, make_path(name))


def fake(cls, name):
    """The squared error of the velocity eps - x0, summed over D; x0-error^2 / sigma^2 on the straight path."""
    a, b = hand_ab(name)
    at = (make_path(name), a, b, ((a + b) / b) ** 2, "x0")
    for guidance, kappa in (("long-short", 3.0), ("zero", 0.0), ("anti", 1.0)):
        checks.fake_turn_is_the_closed_form(cls, *at, run=3.0, kappa=kappa, guidance=guidance, null_rate=0.0)
        checks.fake_turn_is_the_closed_form(cls, *at, run=3.0, null=True, guidance=guidance, null_rate=1.0)


@each
def test_the_fake_learns_the_velocity_through_its_guidance(name):
    fake(FewStepSiD, name)


# ---- guidance ------------------------------------------------------------------------------------------------


def guided(cls, name):
    """kappa of teacher and fake; weight, alpha and scale are the published ones."""
    a, b = hand_ab(name)
    loss = checks.sid_loss(1.0, 1.0, a / (a + b))
    for guidance, kappas in (("long-short", (3.0, 3.0)), ("zero", (1.0, 0.0)), ("anti", (1.0, -1.0))):
        at = (make_path(name), a, b, loss, 3.0, kappas)
        checks.student_turn_is_the_finite_difference(cls, *at, guidance=guidance)


@each
def test_the_gradient_is_the_finite_difference_under_every_guidance(name):
    guided(FewStepSiD, name)


@each
@pytest.mark.parametrize(("guidance", "push"), [("zero", 1.0), ("anti", 2.0)])
def test_zero_and_anti_add_the_students_own_guidance(name, guidance, push):
    """Sheet 7.3, item 7: D_p(c) - D_psi^kappa = [D_p(c) - D_psi(c)] + (1 - kappa) [D_psi(c) - D_psi(null)]; at
    q = p the second part alone is left, times 1 (zero) and 2 (anti): no fixed point. Long-short rests there."""
    a, b = hand_ab(name)
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(2), dtype=F64)
    x, path = 0.4 + 0.8 * z, make_path(name)

    def loss(x, real, fake):
        own = fake - checks.guided_x0(x, e, a, b, checks.REAL, 0.0)
        gap = (real - fake) + push * own
        return gap * (real - x - gap) * a / (a + b)

    def value(x):
        law = checks.guided_x0(x, e, a, b, checks.REAL, 1.0)
        return loss(x, law, law)

    student, nets = checks.Free(x), [checks.two_classes(path, *checks.REAL) for _ in range(2)]
    method = FewStepSiD(checks.parts(path, nets[0], student, nets[1], 3.0), guidance=guidance)
    g = checks.direction(method, student, z, e, labels(6, 0))
    close(g, (value(x + 1e-5) - value(x - 1e-5)) / 2e-5, rtol=1e-6, atol=1e-7)
    assert (g.abs() > 1e-6).all()


@each
@pytest.mark.parametrize("kappa", [1.0, 4.5])
def test_nothing_moves_when_the_fake_is_the_teacher_under_one_guidance(name, kappa):
    checks.zero_at_the_truth(FewStepSiD, make_path(name), kappa)
    checks.zero_at_the_truth(FewStepSiD, make_path(name), kappa, shift=-0.2)


def test_unknown_names_are_refused():
    given = checks.parts(EDM(), checks.gauss(EDM(), 0, 1), torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(InputError, match=r"unknown guidance 'zer'\. Did you mean 'zero'"):
        FewStepSiD(given, guidance="zer")
    with pytest.raises(InputError, match=r"unknown weight 'gaps'\. Did you mean 'gap'"):
        FewStepSiD(given, weight="gaps")


# ---- steps ---------------------------------------------------------------------------------------------------


def mixture(cls, steps=3, rounds=300):
    """Every step k is drawn a third of the time, by the shared number, and is the same in both turns; the calls
    before the last record no gradient."""
    path = make_path("flow")
    student, depth, count = checks.Affine(path, tensor(0.4), tensor(0.8)), [], []
    student.register_forward_hook(lambda _, args, out: depth.append((args[1][0].item(), out.x0.requires_grad)))
    given = checks.parts(path, checks.gauss(path, 0.3, 1.1), student, checks.gauss(path, 0.9, 0.8))
    method = cls(replace(given, few=FewStep(path, path.grid(steps))))
    for step in range(rounds):
        depth.clear()
        game = method.step(Batch(torch.zeros(1, 1, dtype=F64), labels(1), Draws(0, step, 1)), step)
        next(game)
        first = len(depth)
        next(game)
        assert [t for t, _ in depth] == [*path.grid(steps)[:first]] * 2
        assert [grad for _, grad in depth] == [False] * (first - 1) + [True] + [False] * first
        count.append(first)
    for k in range(1, steps + 1):
        assert count.count(k) / rounds == pytest.approx(1 / steps, abs=4 * (2 / 9 / rounds) ** 0.5)


def test_every_round_trains_one_step_of_the_mixture():
    mixture(FewStepSiD)


def apart(cls, steps=3, rounds=12):
    """The fake reads k over the number of steps in both turns, and the teacher does not; of one step, it reads none."""
    path, met = make_path("flow"), set()
    for step in range(rounds):
        student = checks.Affine(path, tensor(0.4), tensor(0.8))
        given = checks.parts(path, Spy(checks.gauss(path, 0.3, 1.1)), student, checks.gauss(path, 0.9, 0.8))
        method = cls(replace(given, few=FewStep(path, path.grid(steps))), apart=True)
        list(method.step(Batch(torch.zeros(1, 1, dtype=F64), labels(1), Draws(0, step, 1)), step))
        read = [round(steps * cond["s"].item(), 6) for cond in method.fake.told]
        assert read == [read[0]] * 2
        assert method.teacher.told == [False]
        met.add(read[0])
    assert met == set(range(steps))
    assert not cls(replace(given, few=FewStep(path, path.grid(1))), apart=True).apart


class Spy(torch.nn.Module):
    """A network that keeps whether it was told a second time."""

    def __init__(self, net):
        super().__init__()
        self.net, self.told = net, []

    def forward(self, x, t, cond):
        self.told.append("s" in cond)
        return self.net(x, t, cond)


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """Broken copies of the source import it anew."""
    monkeypatch.setattr("onestroke.methods.score.few_step_sid.TwoTimes", checks.Told)
    monkeypatch.setattr("onestroke.denoiser.TwoTimes", checks.Told)


def test_steps_apart_are_told_to_the_fake():
    apart(FewStepSiD)


def test_the_implied_noise_is_the_euler_step_of_the_flow():
    """x_s = (1 - s) D + s eps_hat = x_t + (s - t) u with u = (x_t - D) / t; "fixed" takes the first noise."""
    path, times = Flow(), (0.99, 0.7, 0.4, 0.1)
    net = checks.two_classes(path, 0.9, 0.5)
    z = torch.randn(7, 1, generator=torch.Generator().manual_seed(3), dtype=F64)
    xs = FewStep(path, times, renoise="implied").inputs(net, z, labels(7, 0))
    fixed = FewStep(path, times, renoise="fixed").inputs(net, z, labels(7, 0))
    for k, (t, s) in enumerate(pairwise(times)):
        now = torch.full((7,), t, dtype=F64)
        velocity = (xs[k] - net(xs[k], now, labels(7, 0)).x0) / t
        close(xs[k + 1], xs[k] + (s - t) * velocity)
        close(fixed[k + 1], (1 - s) * net(fixed[k], now, labels(7, 0)).x0 + s * z)


def test_its_error_falls_as_one_over_the_steps():
    """On N(0, tau^2) the flow ends at tau z: twice the steps, half the error."""
    path, tau = Flow(), 0.6
    net, z = GaussianMixture(path, tensor([0.0]), tau), tensor([1.3])
    errors = [
        (FewStep(path, path.grid(k), renoise="implied").sample(net, z, labels(1)) - tau * z).abs().item()
        for k in (64, 128, 256)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.05)


@pytest.fixture(scope="module")
def fitted():
    teacher = truth.ring(EDM(), 4, std=0.3)
    return teacher, truth.fit(teacher, "x0", 600, steps=200)


@pytest.mark.parametrize("renoise", ["fresh", "implied"])
def test_the_mixture_of_two_steps_approaches_the_ring(fitted, renoise):
    """200 rounds of 256: what is matched is the mixture over the steps, so that is what is measured."""
    teacher, net = fitted
    few = FewStep(teacher.path, teacher.path.grid(2), renoise=renoise)
    run = {"steps": 200, "batch_size": 256, "lr": {"*": 1e-3}, "betas": {"student": [0.9, 0.99], "fake": [0.0, 0.99]}}
    parts = Parts(teacher, copy.deepcopy(net), lambda role: copy.deepcopy(net), few, teacher.null)
    label = torch.arange(8000) % 4
    trainer = Trainer(FewStepSiD(parts), Data((2,), {"label": label}), Settings(**{**truth.DEFAULTS, **run}))

    def distance(model):
        generator = torch.Generator().manual_seed(4)
        noise, cond = torch.randn(8000, 2, generator=generator), {"label": label}
        with torch.no_grad():
            xs = few.inputs(model, noise, cond, Draws(5, 0, 8000))
            x = torch.cat([model(x, few.time(k, x), cond).x0[k * 4000 :][:4000] for k, x in enumerate(xs)])
        return truth.sliced_w2(x, teacher.sample(label, generator))

    before = distance(net)
    trainer.run()
    assert distance(trainer.finish()) < 0.6 * before


# ---- do the checks notice? -----------------------------------------------------------------------------------

MUTANTS = [
    ("draw.shared() * len(self.few.times)", "draw.shared() * (len(self.few.times) - 1)", mixture),
    ("x = self.few.sample(self.student, draw.normal(batch.noise), cond, draw, upto=k)",
     "x = self.few.sample(self.student, draw.normal(batch.noise), cond, draw, upto=0)", mixture),
    ('"zero": (1.0, 0.0, 0.0)', '"zero": (None, 0.0, 0.0)', guided),
    ('"anti": (1.0, -1.0, 1.0)', '"anti": (1.0, 0.0, 1.0)', guided),
    ('weight: str = "1-sigma"', 'weight: str = "one"', guided),
    ("self.guide(self.fake, self.of_fake)", "self.guide(self.fake, self.in_training)", guided),
    ("self.guide(self.fake, self.in_training)", "self.fake", fake),
    ('time_weight("1/sigma^2"', 'time_weight("1/sigma"', fake),
    ("self.alpha, weight)", "1.0, weight)", one_step_is_sid),
    ("self.path, x, told, t", "self.path, x, cond, t", apart),
    ("(xt, t, self.told(cond, k)).x0", "(xt, t, cond).x0", apart),
    ("k / len(self.few.times), device", "1 - k / len(self.few.times), device", apart),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    given = () if check in (mixture, apart) else ("vp",)
    check(broken("onestroke.methods.score.few_step_sid", old, old).FewStepSiD, *given)
    with pytest.raises((AssertionError, KeyError)):
        check(broken("onestroke.methods.score.few_step_sid", old, new).FewStepSiD, *given)
