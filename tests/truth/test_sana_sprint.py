"""SANA-Sprint: the guided consistency function for every guidance told, and the adversarial term typed by hand."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from contract.build import build
from onestroke.draws import Draws
from onestroke.method import Batch
from onestroke.methods.consistency.sana_sprint import SanaSprint
from truth import adversarial_checks as gan
from truth import tangent_checks as checks
from truth.checks import Free, Given, close, hand_ab, labels, make_path
from truth.score_checks import MU, TAU, M, S, gauss
from truth.tangent_checks import Consistent, at
from truth.test_mutants import broken

T = 0.4
"""Between the entries of a table, where derivatives do not jump."""
LATE = 10_000
PATHS = ("vp", "edm", "flow", "trig", "table")


class Told(Consistent):
    """The consistency function of N(w M, S^2), with w what the student is told, times ten, beside 3."""

    def forward(self, x, t, cond):
        self.mean = (3.0 + 10 * cond["s"][:, None]) * checks.M
        return super().forward(x, t, cond)


def made(cls, name, student, teacher, scale=1.0, **options):
    """The method on small networks, and these in their place."""
    with mock.patch("contract.build.get_method", return_value=cls):
        method = build("sana-sprint", name, "x0", scale)
    for key, value in {"student": student, "teacher": teacher, "heads": gan.Linear(), **options}.items():
        setattr(method, key, value)
    return method


def every_guidance(cls, name="vp"):
    """Rows are told 3 - 1/2, 3 and 3 + 1/2, less 3 and divided by ten, and their teacher had just that."""
    path = make_path(name)
    student = Told(path, rows=32)
    method = made(cls, name, student, gan.Seen(checks.Shifting(path)), 3.0, heads=gan.Linear((0.1,) * 4), gan=0.0)
    student.seen = []
    student.register_forward_pre_hook(lambda _, args: student.seen.append(args[2]["s"]))
    with at(T, path):
        game = method.step(checks.batch(32, draw=Draws(0, 0, 32)), LATE)
        pull = checks.pull(next(game), student)
        list(game)
    assert pull.abs().max() < 1e-9
    told = student.seen[0]
    assert set((told * 100).round().int().tolist()) == {-5, 0, 5}
    assert all(torch.equal(told, s) for s in student.seen)


@pytest.mark.parametrize("name", PATHS)
def test_the_guidance_told_is_the_guidance_had(name):
    every_guidance(SanaSprint, name)


def test_without_guidance_there_is_one():
    path = make_path("vp")
    student = Told(path)
    method = made(SanaSprint, "vp", student, gan.Seen(checks.Shifting(path)), 1.0)
    assert method.spread == 0


def of_the_data(cls):
    """No guided teacher has had a part in the trajectories of the data: there is nothing to tell."""
    with mock.patch("contract.build.get_method", return_value=cls):
        told = build("sana-sprint", "vp", "x0", 3.0, velocity="teacher")
        plain = build("sana-sprint", "vp", "x0", 3.0, velocity="data")
    assert (told.spread, told.guidance.reach) == (0.5, 0.5)
    assert (plain.spread, plain.guidance, plain.misaligned) == (0.0, None, False)


def test_the_velocity_of_the_data_has_no_guidance():
    of_the_data(SanaSprint)


def adversarial(cls, name="vp", misaligned=False):
    """Student: -1/2 x a slope / B on the samples noised again; heads: half the hinge, each sample under new noise, and
    among the false ones, if asked, the data under the prompt of another row."""
    (a, b), path = hand_ab(name, T), make_path(name)
    normals = torch.randn(7, 8, 1, generator=torch.Generator().manual_seed(31), dtype=torch.float64)
    x0, student = 5 * (M + TAU * normals[0]), Free(MU + 5 * S * normals[1])
    method = made(cls, name, student, gan.Seen(gauss(path, M, TAU)), 1.0, misaligned=misaligned)
    with at(T, path):
        game = method.step(Batch(normals[1], labels(8), Given(*normals[2:]), x0), LATE)
        first = next(game)
        assert set(first.terms) == {"change", "gan"}
        (got,) = torch.autograd.grad(first.terms["gan"], student.x, retain_graph=True)
        x = student.x.detach()
        close(got, -0.5 * a * gan.slope(a * x + b * normals[3]) / 8)
        sum(first.terms.values()).backward()
        assert all(p.grad is None for p in (*method.heads.parameters(), *method.teacher.parameters()))
        assert next(game).player == "weight"
        last = next(game)
    assert last.player == "heads"
    real, fake = gan.logit(a * x0 + b * normals[4]), gan.logit(a * x + b * normals[5])
    if misaligned:
        fake = torch.cat([fake, gan.logit(a * torch.cat([x0[-1:], x0[:-1]]) + b * normals[6])])
    close(last.terms["gan"], 0.5 * ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()))
    student.x.grad = None
    last.terms["gan"].backward()
    assert student.x.grad is None
    assert method.heads.w.grad.abs().max() > 0
    assert next(game, None) is None


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_the_adversarial_turns_are_typed_by_hand(name):
    adversarial(SanaSprint, name)
    misaligned(SanaSprint, name)


def misaligned(cls, name="vp"):
    adversarial(cls, name, misaligned=True)


class Spy(Free):
    """Remembers what it was called with."""

    def forward(self, x, t, cond):
        self.seen = x, t
        return super().forward(x, t, cond)


def inputs(cls, name="edm"):
    """The first input is hypot(a, b) e, every other a x0 + b e at its own time."""
    found, e = checks.batch(8, 1), checks.batch(8, 1, seed=6).noise
    student = Spy(0 * e)
    method = made(cls, name, student, gan.Seen(gauss(make_path(name), M, TAU)))
    method.sample(found._replace(draw=Given(e)), {})
    x, t = student.seen
    assert 0 < (t == 1).sum() < 8
    for i in range(8):
        a, b = hand_ab(name, t[i].item())
        close(x[i], math.hypot(a, b) * e[i] if t[i] == 1 else a * found.x0[i] + b * e[i], 1e-7)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_the_inputs_are_typed_by_hand(name):
    inputs(SanaSprint, name)


def levels(cls):
    """Half of the samples begin at the first input, the others at data noised to a level of the student's law."""

    path, rows = make_path("edm"), 4000
    student = Spy(torch.zeros(rows, 1, dtype=torch.float64))
    method = made(cls, "edm", student, gan.Seen(gauss(path, M, TAU)), 1.0)
    batch = checks.batch(rows, 1, draw=Draws(0, 0, rows))
    method.sample(batch, {"s": torch.zeros(rows)})
    x, t = student.seen
    first = t == 1
    assert first.double().mean().item() == pytest.approx(0.5, abs=2.5 / rows**0.5)
    assert x[first].std() == pytest.approx((1 + 80**2) ** 0.5, rel=0.1)
    level = -path.log_snr(t[~first])  # log tan(tau) = n + log 2: tau = atan(e^n / 0.5), n of N(0.2, 1.6^2)
    assert level.mean().item() == pytest.approx(0.8931, abs=0.2)  # five deviations of 2000, cut off at 80
    assert level.std().item() == pytest.approx(1.6, abs=0.12)
    with mock.patch.object(method, "judge", lambda x, cond, t, draw: seen.append(t) or x):
        seen = []
        next(method.step(batch._replace(x0=torch.zeros(rows, 1, dtype=torch.float64)), LATE))
    judged = -path.log_snr(seen[0])  # n of N(-0.6, 1)
    assert judged.mean().item() == pytest.approx(0.0931, abs=5 / rows**0.5)
    assert judged.std().item() == pytest.approx(1, abs=5 / (2 * rows) ** 0.5)
    assert (method.ramp, method.norm) == (2000, 0.2)


def test_the_levels_are_the_published_ones():
    levels(SanaSprint)


# ---- do the checks notice? -----------------------------------------------------------------------------------------

MUTANTS = [
    ("0.1 * more", "-0.1 * more", every_guidance),
    ("self.scale + more if", "self.scale - more if", every_guidance),
    ("(3 * draw.uniform()).floor() - 1", "(2 * draw.uniform()).floor()", every_guidance),
    ("step, guided)", "step, self.guide(self.teacher))", every_guidance),
    ("self.gan * terms.gan_student", "terms.gan_student", adversarial),
    ("self.gan * terms.gan_student", "-self.gan * terms.gan_student", adversarial),
    ("self.path.mix(x, draw.normal(x), t)", "x", adversarial),
    ("with frozen(self.teacher, self.heads)", "with frozen(self.teacher)", adversarial),
    ("0.5 * terms.gan_critic", "terms.gan_critic", adversarial),
    ("real.roll(1, 0)", "real", misaligned),
    ("torch.cat([fake, self", "torch.cat([self", misaligned),
    ("misaligned: bool = False", "misaligned: bool = True", of_the_data),
    ('velocity == "teacher" and', "", of_the_data),
    ("self.judge(x.detach()", "self.judge(x", adversarial),
    ("like(first, real) > 0", "like(first, real) < 0", inputs),
    ("self.path.mix(real, noise, t)", "self.path.mix(noise, real, t)", inputs),
    ("self.few.input(noise), self", "noise, self", inputs),
    ("ramp: int = 2_000", "ramp: int = 4_000", levels),
    ("norm: float = 0.2", "norm: float = 0.1", levels),
    ("mean: float = 0.893", "mean: float = 0.2", levels),
    ("gan_mean: float = 0.093", "gan_mean: float = -0.6", levels),
    ("gan_std: float = 1.0", "gan_std: float = 1.2", levels),
    ("first, noise = draw.uniform() < self.top,", "first, noise = draw.uniform() < 0.6,", levels),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    source = "onestroke.methods.consistency.sana_sprint"
    check(broken(source, old, old).SanaSprint)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(source, old, new).SanaSprint)
