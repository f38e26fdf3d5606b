"""ADM against hand-typed gradients on exact Gaussians: where the steps end, and what each player does there."""

from __future__ import annotations

import pytest
import torch

from onestroke.methods.adversarial import adm
from onestroke.methods.adversarial.adm import ADM
from onestroke.paths import Flow
from truth import adversarial_checks as checks
from truth.checks import F64, Free, Given, T, close, hand_ab, labels, make_path, two_classes
from truth.score_checks import FAKE, MU, REAL, TAU, M, S, at, class_eps, gauss
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", ["vp", "edm", "flow"])
GAP = 0.1


def made(cls, name, student, law=(MU, S), **options):
    path = make_path(name)
    return checks.made(cls, path, student, fake=gauss(path, *law), gap=GAP, **options)


def end(xt, name, mean, std):
    """(x_s, dx_s / dx_t) of one DDIM step from T to s = T - GAP under N(mean, std^2), eps and x0 kept."""
    (a, b), (c, d) = hand_ab(name), hand_ab(name, T - GAP)
    k = a * std**2 / (a**2 * std**2 + b**2)
    x0, eps = mean + k * (xt - a * mean), b * (xt - a * mean) / (a**2 * std**2 + b**2)
    return c * x0 + d * eps, c * k + d * b / (a**2 * std**2 + b**2)


def student_turn(cls, name):
    """-d/dx mean logit(x_s) through the fake and its step; fake, heads and teacher get nothing."""
    z, _, normals = checks.samples()
    student = Free(MU + S * z)
    method, (a, b) = made(cls, name, student), hand_ab(name)
    with at(T):
        game = method.step(checks.Batch(z, labels(len(z)), Given(*normals)), 0)
        turn = next(game)
        assert turn.player == "student"
        sum(turn.terms.values()).backward()
        others = (*method.heads.parameters(), *method.teacher.parameters(), *method.fake.parameters())
        assert all(p.grad is None for p in others)
        list(game)
    x = student.x.detach()
    xs, rate = end(a * x + b * normals[0], name, MU, S)
    close(student.x.grad, -a * rate * checks.slope(xs) / len(z))


@each
def test_the_student_descends_the_logit_through_the_fakes_step(name):
    student_turn(ADM, name)


def heads_turn(cls, name, spread=5.0):
    """Hinge between the ends of the teacher's and of the fake's step from one x_t, and its gradient."""
    z, x0, normals = checks.samples()
    student = Free(MU + spread * S * z)
    method, (a, b) = made(cls, name, student), hand_ab(name)
    term = checks.play(method, z, x0, normals)["heads"]["gan"]
    xt = a * student.x.detach() + b * normals[0]
    real, fake = end(xt, name, M, TAU)[0], end(xt, name, MU, S)[0]
    on, off = (1 - checks.logit(real) > 0).to(F64), (1 + checks.logit(fake) > 0).to(F64)
    assert 0 < on.mean() < 1 or 0 < off.mean() < 1
    close(term, ((1 - checks.logit(real)) * on).mean() + ((1 + checks.logit(fake)) * off).mean())
    w, c, x, gain = checks.grads(term, method.heads.w, method.heads.c, student.x, method.fake.gain)
    close(w, [(off * fake - on * real).mean(), (off * fake**2 - on * real**2).mean()])
    close(c, (off - on).mean())
    assert x is None
    assert gain is None


@each
def test_the_heads_descend_the_hinge_between_the_two_steps(name):
    heads_turn(ADM, name)


def guided(cls, name, kappa=3.0):
    """The real step is the guided teacher's; the fake's is plain."""
    z, _, normals = checks.samples()
    path, (a, b), (c, d) = make_path(name), hand_ab(name), hand_ab(name, T - GAP)
    student = Free(0.4 + 0.8 * z)
    method = checks.made(cls, path, student, fake=two_classes(path, *FAKE), scale=kappa, gap=GAP)
    method.teacher = checks.Seen(two_classes(path, *REAL))
    with at(T):
        turns = list(method.step(checks.Batch(z, labels(len(z), 0), Given(*normals)), 0))
    xt = a * student.x.detach() + b * normals[0]
    eps = [
        (1 - k) * class_eps(xt, a, b, *law, -1) + k * class_eps(xt, a, b, *law, 0)
        for law, k in ((REAL, kappa), (FAKE, 1))
    ]
    real, fake = (checks.logit(c * (xt - b * e) / a + d * e) for e in eps)
    close(turns[0].terms["gan"], -fake.mean())
    close(turns[1].terms["gan"], (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean())


@each
def test_the_guided_teacher_makes_the_real_step(name):
    guided(ADM, name)


@each
def test_nothing_is_learnt_where_the_fake_has_the_teachers_law(name):
    """The steps end at one point: within the margins the heads rest; heads that say nothing leave the student alone."""
    z, x0, normals = checks.samples()
    student = Free(M + TAU * z)
    method = made(ADM, name, student, law=(M, TAU))
    term = checks.play(method, z, x0, normals)["heads"]["gan"]
    w, c = checks.grads(term, method.heads.w, method.heads.c)
    assert w.abs().max() < 1e-15
    assert c.abs() < 1e-15
    flat = made(ADM, name, student, law=(M, TAU), heads=checks.Linear((0.0, 0.0), 0.3))
    (x,) = checks.grads(checks.play(flat, z, x0, normals)["student"]["gan"], student.x)
    assert (x == 0).all()


def fake_turn(cls, name):
    """The plain eps error of the same samples, under noise of its own."""
    z, x0, normals = checks.samples()
    student, (a, b) = Free(MU + S * z), hand_ab(name)
    term = checks.play(made(cls, name, student), z, x0, normals)["fake"]["dsm"]
    xt = a * student.x.detach() + b * normals[1]
    close(term, (b * (xt - a * MU) / (a**2 * S**2 + b**2) - normals[1]).square().mean())
    assert checks.grads(term, student.x) == (None,)


@each
def test_the_fake_learns_to_denoise(name):
    fake_turn(ADM, name)


def test_the_steps_stay_on_the_path():
    """Near the data the step ends at t_min; on a table it starts and ends at whole indices."""
    seen = []

    class Spy(checks.Seen):
        def forward(self, x, t, cond):
            seen.append(t)
            return super().forward(x, t, cond)

    z, _, normals = checks.samples()
    for path in (Flow(), make_path("table")):
        method = checks.made(ADM, path, Free(z), fake=gauss(path, MU, S))
        method.teacher = Spy(method.teacher.net)
        with at(0.05):
            list(method.step(checks.Batch(z, labels(len(z)), Given(*normals)), 0))
        assert {t for s in (seen[0], seen[2]) for t in s.tolist()} == {path.t_min}
        with at(400 / 999):
            list(method.step(checks.Batch(z, labels(len(z)), Given(*normals)), 0))
        assert torch.equal(path.snap(seen[3]), seen[3])
        seen.clear()


# ---- do the checks notice? -----------------------------------------------------------------------------------------


def on(check, name="vp"):
    def named(module):
        check(module.ADM, name)

    named.__name__ = check.__name__
    return named


MUTANTS = [
    ("terms.gan_student(self", "-terms.gan_student(self", on(student_turn)),
    ("with frozen(self.teacher, self.fake, self.heads)", "with frozen(self.teacher, self.heads)", on(student_turn)),
    ("with frozen(self.teacher, self.fake, self.heads)", "with frozen(self.teacher, self.fake)", on(student_turn)),
    ("fake = self.ends(self.fake,", "fake = self.ends(self.teacher,", on(student_turn)),
    ("(t - self.gap)", "(t + self.gap)", on(student_turn)),
    ("self.path.mix(x, draw.normal(x), t)", "self.path.mix(x.detach(), draw.normal(x), t)", on(student_turn)),
    ("self.guide(self.teacher)", "self.teacher", on(guided)),
    ("self.ends(self.fake, xt", "self.ends(self.guide(self.fake), xt", on(guided)),
    ("*logits", "*logits[::-1]", on(heads_turn)),
    ("f.detach() for f in fake", "f for f in fake", on(heads_turn)),
    ("x.detach(), cond, t, draw)", "x, cond, t, draw)", on(fake_turn)),
    ('loss: str = "hinge"', 'loss: str = "softplus"', on(heads_turn)),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(adm.__name__, old, old))
    with pytest.raises((AssertionError, RuntimeError)):  # RuntimeError: nothing to differentiate, or freed already
        check(broken(adm.__name__, old, new))
