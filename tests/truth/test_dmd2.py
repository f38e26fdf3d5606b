"""DMD2 against the sheet's closed forms: its direction, its GAN, its two time scales and its backward simulation."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch

from contract.build import batch as small_batch
from contract.build import build
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.distribution.dmd2 import DMD2
from onestroke.paths import EDM, Estimate
from onestroke.run import plan_run
from truth import gan_checks, score_checks, vector_checks
from truth.checks import F64, Free, Given, close, hand_ab, labels, make_path, tensor
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)


def closed(cls, name="edm"):
    vector_checks.is_the_closed_form(cls, make_path(name), *hand_ab(name), gan_weight=0.0)


def reduction(cls, name="vp"):
    vector_checks.has_its_reduction(cls, make_path(name), *hand_ab(name), None, "mean", gan_weight=0.0)


def normaliser(cls, name="vp"):
    """It is of the guided teacher; the fake is not guided."""
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)  # as the check draws them
    for run in (1.0, 3.0):
        x = 0.4 + 0.8 * z
        weight = 1 / (x - score_checks.guided_x0(x, e, *hand_ab(name), score_checks.REAL, run)).abs()
        vector_checks.is_the_hand_typed_direction(
            cls, make_path(name), *hand_ab(name), weight, run, (run, 1.0), gan_weight=0.0
        )


def fake(cls, name="vp"):
    score_checks.fake_turn_is_the_closed_form(
        cls, make_path(name), *hand_ab(name), 1.0, "eps", run=3.0, fresh=False, gan_weight=0.0
    )


def student_gan(cls, name="edm"):
    gan_checks.student_gan_is_softplus(cls, make_path(name), *hand_ab(name), 5e-3)


def fake_gan(cls, name="edm"):
    gan_checks.fake_gan_is_softplus(cls, make_path(name), *hand_ab(name), 1e-2)


def laws(cls):
    """The matching looks from 0.02 to 0.98, the fake everywhere."""
    _, teacher, fake = vector_checks.seen(cls, EDM(), gan_weight=0.0)
    (t,), (again, everywhere) = teacher.times, fake.times
    assert torch.equal(t, again)
    vector_checks.is_uniform(t, 0.02, 0.98)
    vector_checks.is_uniform(everywhere, 0.0, 1.0)


def two_time_scales(cls):
    """Sheet 6.3, item 7f: the fake plays every round, the student one in five, first."""
    method, played = build_with(cls), Counter()
    for step in range(15):
        turns = [turn.player for turn in method.step(small_batch(step=step), step)]
        assert turns == (["student", "fake"] if step % 5 == 0 else ["fake"])
        played.update(turns)
    assert played["fake"] == 5 * played["student"]


def build_with(cls, **options):
    """The small instance of the contract tests, of this class."""
    method = build("dmd2", **options)
    method.__class__ = cls
    return method


class Recorder(torch.nn.Module):
    """A student that answers with half its input, and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.gain, self.inputs, self.times = torch.nn.Parameter(tensor(0.5)), [], []

    def forward(self, x, t, cond):
        self.inputs.append(x)
        self.times.append(t[0].item())
        return Estimate(self.gain * x, x)


def back_simulation(cls, count: int = 20_000):
    """Sheet 6.3, item 7d: at step k the input has variance a^2 Var(x0) + b^2; the gradient is the last call's alone."""
    path, variance = make_path("flow"), 1.0
    for k, (a, b) in enumerate(((0, 1), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25))):
        variance = a**2 * variance / 4 + b**2
        student, law = Recorder(), score_checks.gauss
        z, *noises = torch.randn(6, count, 1, generator=torch.Generator().manual_seed(k), dtype=F64)
        method = cls(
            gan_checks.gan_parts(path, law(path, 0.3, 1.1), student, law(path, 0.0, 1.0), steps=4), gan_weight=0.0
        )
        turn = next(method.step(Batch(z, labels(count), Given(*noises, shared=(k + 0.5) / 4)), 0))
        assert student.times == pytest.approx([1.0, 0.75, 0.5, 0.25][: k + 1])
        assert student.inputs[-1].var().item() == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)
        assert all(x.grad_fn is None for x in student.inputs)
        assert torch.autograd.grad(sum(turn.terms.values()), student.gain)[0] != 0


def ranks_agree(cls):
    """All ranks run the student up to the same step, and every step is met."""
    steps = Counter()
    for step in range(40):
        times = []
        for offset in (0, 2):
            student, gauss = Recorder(), score_checks.gauss(EDM(), 0.0, 1.0)
            method = cls(gan_checks.gan_parts(EDM(), gauss, student, gauss, steps=4), gan_weight=0.0)
            draw = Draws(0, step, 2, offset, 4)
            next(method.step(Batch(draw.normal((1,)).double(), labels(2), draw), 1))
            times.append(student.times)
        assert times[0] == times[1]
        steps[len(times[0])] += 1
    assert set(steps) == {1, 2, 3, 4}


@each
@pytest.mark.parametrize("check", [closed, reduction, normaliser, fake, student_gan, fake_gan])
def test_the_turns_are_the_closed_forms(check, name):
    check(DMD2, name)


@pytest.mark.parametrize("check", [laws, two_time_scales, back_simulation, ranks_agree])
def test_the_schedule_is_the_published_one(check):
    check(DMD2)


@each
def test_nothing_moves_when_the_fake_has_the_teachers_law(name):
    for shift in (0.0, -0.2):
        score_checks.zero_at_the_truth(DMD2, make_path(name), 1.0, shift, gan_weight=0.0)


def test_the_direction_does_not_depend_on_the_units():
    """Sheet 6.3, item 7a: x, D_p and D_fake times c leave g as it is."""
    found = []
    for c in (1.0, 7.0):
        z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(3), dtype=F64)
        student = Free(c * (0.4 + 0.8 * z))
        path = EDM()
        made = gan_checks.parts(path, Scaled(c, 0.3, 1.1), student, Scaled(c, 0.9, 0.8))
        found.append(score_checks.direction(DMD2(made, gan_weight=0.0), student, z, e, labels(6)))
    close(found[0], found[1])
    assert (found[0].abs() > 1e-6).all()


class Scaled(torch.nn.Module):
    """A network of the noiseless sample it is shown, in units of c: c (m + k sin(x_t))."""

    def __init__(self, c, m, k):
        super().__init__()
        self.c, self.m, self.k = c, m, k

    def forward(self, x, t, cond):
        return Estimate(self.c * (self.m + self.k * torch.linspace(-1, 1, len(x), dtype=F64)[:, None]), x)


def test_the_head_trains_the_encoder_of_the_fake():
    method = build("dmd2")
    game = method.step(small_batch(), 0)
    sum(next(game).terms.values()).backward()
    assert all(p.grad is None for p in method.fake.parameters())
    next(game).terms["gan"].backward()
    assert (method.fake.head.body[0].weight.grad != 0).any()
    assert (method.fake.net.enter.weight.grad != 0).any()


def test_without_a_gan_prompts_are_enough():
    assert not hasattr(build("dmd2", gan_weight=0.0).fake, "head")
    plan_run("a", "dmd2", ["a cat"], {"gan_weight": 0.0})
    with pytest.raises(InputError, match="'dmd2' needs real images"):
        plan_run("a", "dmd2", ["a cat"], {})


def test_two_steps_are_nearer_to_the_truth_than_one():
    gan_checks.steps_help("dmd2")


# ---- do the checks notice? -----------------------------------------------------------------------------------

SOURCE = "onestroke.methods.distribution.dmd2"
MUTANTS = [
    ("teacher = self.guide(self.teacher)", "teacher = self.teacher", normaliser),
    ("matching(teacher, self.fake", "matching(teacher, self.guide(self.fake)", normaliser),
    ("terms.gan_student(self.logits(x, batch))", "terms.gan_student(-self.logits(x, batch))", student_gan),
    ("self.gan_weight * terms", "terms", student_gan),
    ("with frozen(self.fake)", "with frozen(self.teacher)", student_gan),
    ("gan_critic(self.logits(batch.x0, batch), self.logits(x, batch))",
     "gan_critic(self.logits(x, batch), self.logits(batch.x0, batch))", fake_gan),
    ("return x.detach()", "return sample().detach() + 1", fake),
    ("step % self.ttur == 0", "True", two_time_scales),
    ("times.uniform(batch.draw, self.path), batch.draw)", 
     "times.uniform(batch.draw, self.path, 0.02), batch.draw)", laws),
    ("batch.cond, batch.draw, k)", "batch.cond, batch.draw)", back_simulation),
    ("with torch.no_grad():\n            xk", "if True:\n            xk", back_simulation),
    ("batch.draw.shared()", "batch.draw.uniform()[0].item()", ranks_agree),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).DMD2)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(broken(SOURCE, old, new).DMD2)


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("like(gap_weight(x, real), x) * (est", "like(gap_weight(x, est.x0), x) * (est", normaliser),
        ("* (est.x0 - real), est", "* (real - est.x0), est", closed),
    ],
)
def test_the_check_fails_on_the_mutant_of_the_term(old, new, check):
    with mock.patch(f"{SOURCE}.terms", broken("onestroke.terms", old, old)):
        check(DMD2)
    with mock.patch(f"{SOURCE}.terms", broken("onestroke.terms", old, new)), pytest.raises(AssertionError):
        check(DMD2)
