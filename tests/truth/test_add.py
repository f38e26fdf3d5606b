"""ADD against hand-typed gradients on exact Gaussians: the GAN, the distillation term and the penalty."""

from __future__ import annotations

import pytest
import torch

from onestroke.draws import Draws
from onestroke.method import Batch
from onestroke.methods.adversarial import add
from onestroke.methods.adversarial.add import ADD
from onestroke.paths import Flow
from truth import adversarial_checks as checks
from truth.checks import F64, Free, Given, T, close, hand_ab, labels, make_path, tensor, two_classes
from truth.score_checks import MU, REAL, TAU, M, S, at, guided_x0
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", ["vp", "edm", "flow"])


@each
def test_the_student_descends_the_logit_of_its_noised_sample(name):
    checks.student_descends_the_logit(ADD, make_path(name), *hand_ab(name))


@each
def test_the_heads_descend_the_hinge(name):
    checks.heads_descend_the_hinge(ADD, make_path(name), *hand_ab(name))


@each
@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_the_fixed_point_of_the_game_is_the_first_two_moments(name, loss):
    checks.fixed_point_is_the_first_two_moments(ADD, make_path(name), *hand_ab(name), loss)


def distillation(cls, path, a, b):
    """2.5 alpha mean (x - D_p(x_t))^2 and its gradient 5 alpha (x - D_p) / B, D_p being no function of x."""
    z, x0, normals = checks.samples()
    student = Free(MU + S * z)
    term = checks.play(checks.made(cls, path, student), z, x0, normals)["student"]["distill"]
    x, alpha = student.x.detach(), a / (a**2 + b**2) ** 0.5
    target = M + a * TAU**2 / (a**2 * TAU**2 + b**2) * (a * x + b * normals[0] - a * M)
    close(term, 2.5 * alpha * (x - target).square().mean())
    (got,) = checks.grads(term, student.x)
    close(got, 5 * alpha * (x - target) / len(z))


@each
def test_the_distillation_term_is_the_closed_form(name):
    distillation(ADD, make_path(name), *hand_ab(name))


def guided(cls, path, a, b, kappa=3.0):
    """The target is that of the guided teacher; the layers are those of the condition alone."""
    z, x0, normals = checks.samples()
    student = Free(0.4 + 0.8 * z)
    method = checks.made(cls, path, student, scale=kappa)
    method.teacher = checks.Seen(two_classes(path, *REAL))
    batch = Batch(z, labels(len(z), 0), Given(*normals), x0)
    with at(T):
        terms = next(method.step(batch, 0)).terms
    x, alpha = student.x.detach(), a / (a**2 + b**2) ** 0.5
    close(terms["distill"], 2.5 * alpha * (x - guided_x0(x, normals[0], a, b, REAL, kappa)).square().mean())
    close(terms["gan"], -checks.logit(a * x + b * normals[0]).mean())


@each
def test_the_guided_teacher_gives_the_target(name):
    guided(ADD, make_path(name), *hand_ab(name))


def penalty(cls, path, a, b):
    """Of the linear head w: E (w . n)^2 exactly, n the noise on the layer in units of the nudge; and its gradient."""
    z, x0, normals = checks.samples()
    method = checks.made(cls, path, Free(MU + S * z))
    term = checks.play(method, z, x0, normals)["heads"]["r1"]
    w, n = tensor(*checks.W), normals[3]  # one noise for both channels
    close(term, 1e-5 * (w.sum() * n).square().mean(), rtol=1e-7)
    (got,) = checks.grads(term, method.heads.w)
    close(got, 2e-5 * w.sum() * n.square().mean() * torch.ones(2, dtype=F64), rtol=1e-7)


def test_the_penalty_is_the_squared_gradient():
    penalty(ADD, make_path("vp"), *hand_ab("vp"))


class Curved(checks.Linear):
    """The logit sin(w . layer)."""

    def forward(self, features, *_):
        return super().forward(features).sin()


def test_the_penalty_is_the_squared_gradient_to_second_order():
    """Taylor: E (l(f + nudge n) - l(f))^2 / nudge^2 -> E (n . grad l)^2; n and -n together cancel the first order of
    the error, so that a nudge ten times smaller leaves a hundredth of it."""
    path, (a, b) = make_path("vp"), hand_ab("vp")
    z, x0, normals = checks.samples()
    normals = list(normals)
    z, x0 = z.repeat(2, 1), x0.repeat(2, 1)
    pairs = [torch.cat([n, n]) for n in normals]
    pairs[3] = torch.cat([normals[3], -normals[3]])
    xt, n = a * x0 + b * pairs[1], pairs[3]
    want = (checks.logit(xt).cos() * sum(checks.W) * n).square().mean()
    errors = []
    for nudge in (1e-1, 1e-2, 1e-3):
        method = checks.made(ADD, path, Free(MU + S * z), heads=Curved(), nudge=nudge, r1=1.0)
        errors.append((checks.play(method, z, x0, pairs)["heads"]["r1"] - want).abs().item())
    assert errors[0] > 1e-7
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)
    assert errors[2] == pytest.approx(errors[1] / 100, rel=0.1)


def levels(module):
    """Each of the four levels as likely, real samples noised to it: seen by the student's time."""
    seen = []

    class Student(Free):
        def forward(self, x, t, cond):
            seen.append(t)
            return super().forward(x, t, cond)

    zeros = torch.zeros(20_000, 1, dtype=F64)
    method = checks.made(module.ADD, Flow(), Student(zeros), steps=4)
    seen.clear()  # the call that counted channels
    next(method.step(Batch(zeros, labels(20_000), Draws(0, 0, 20_000), zeros), 0))
    found = [(seen[0] == t).double().mean().item() for t in method.few.times]
    assert found == pytest.approx([0.25] * 4, abs=5 * 0.433 / 20_000**0.5)


def test_the_levels_are_as_likely_each():
    levels(add)


# ---- do the checks notice? -----------------------------------------------------------------------------------------


def on(check, name="vp"):
    def named(module):
        check(module.ADD, make_path(name), *hand_ab(name))

    named.__name__ = check.__name__
    return named


student = on(checks.student_descends_the_logit)
heads = on(checks.heads_descend_the_hinge)
MUTANTS = [
    ("distill: float = 2.5", "distill: float = 1.0", on(distillation)),
    ("self.path.unit_ab(t)[0]", "self.path.unit_ab(t)[1]", on(distillation)),
    ("self.path.unit_ab(t)[0]", "self.path.ab(t)[0]", on(distillation, "flow")),
    ("est.x0.detach()", "est.x0", on(distillation)),
    ("self.guide(self.teacher)(", "self.teacher(", on(guided)),
    ("terms.gan_student(self", "-terms.gan_student(self", student),
    ("with frozen(self.teacher, self.heads)", "with frozen(self.teacher)", student),
    ("x.detach())\n", "x)\n", heads),
    ("gan_critic(logits, self.heads(fake)", "gan_critic(self.heads(fake), logits", heads),
    ("gan_critic(logits,", "gan_critic(nudged,", heads),
    ("/ self.nudge**2", "/ self.nudge", on(penalty)),
    ("r1: float = 1e-5", "r1: float = 1e-4", on(penalty)),
    ("* len(self.few.times)", "* 2", levels),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = "onestroke.methods.adversarial.add"
    check(broken(module, old, old))
    with pytest.raises(AssertionError):
        check(broken(module, old, new))
