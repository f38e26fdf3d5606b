"""Score forgetting: what is kept is SiD-LSG's, what is forgotten takes the law of what overrides it."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch

from onestroke import truth
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch, Parts
from onestroke.methods.score.score_forgetting import ScoreForgetting
from onestroke.methods.score.sid_lsg import SiDLSG
from onestroke.paths import EDM, Estimate
from onestroke.sampling import FewStep
from onestroke.settings import Settings
from onestroke.training.train import Data, Trainer
from truth import score_checks as checks
from truth.checks import F64, Given, T, close, hand_ab, labels, make_path, tensor
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", checks.PATHS)


def numbers(prompts):
    """The prompt "1" is label 1."""
    return {"label": torch.tensor([int(p) for p in prompts])}


def method_on(cls, path, student, fake, run, **options):
    given = checks.parts(path, checks.two_classes(path, *checks.REAL), student, fake, run)
    return cls(replace(given, encode=numbers), **options)


def noises(count):
    return torch.randn(count, 6, 1, generator=torch.Generator().manual_seed(1), dtype=F64)


class Rows(torch.nn.Module):
    """A student whose samples under class 0, and under class 1, are free parameters."""

    def __init__(self, x0, x1):
        super().__init__()
        self.x = torch.nn.ParameterList([torch.nn.Parameter(x.clone()) for x in (x0, x1)])

    def forward(self, x, t, cond):
        out = self.x[int(cond["label"][0])]
        return Estimate(out, out)


def student_turn(cls, name, run=3.0, step=0, **options):
    """The gradients at samples under the kept class 1 and the forgotten class 0, which class 1 overrides."""
    z0, z1, e0, e1 = noises(4)
    path, student = make_path(name), Rows(0.4 + 0.8 * z0, 0.3 - 0.9 * z1)
    method = method_on(cls, path, student, checks.two_classes(path, *checks.FAKE), run, **options)
    with checks.at(T):
        turn = next(method.step(Batch(z1, labels(6, 1), Given(e1, z0, e0)), step))
    sum(turn.terms.values()).backward()
    assert not [p for net in (method.teacher, method.fake) for p in net.parameters() if p.grad is not None]
    return student.x[1].grad * 6, student.x[0].grad * 6, turn.terms


def x0_of(x, e, a, b, law, label, kappa):
    xt = a * x + b * e
    eps = (1 - kappa) * checks.class_eps(xt, a, b, *law, -1) + kappa * checks.class_eps(xt, a, b, *law, label)
    return (xt - b * eps) / a


def told(cls, name="vp"):
    """Finite differences of SiD's loss by hand: kept, D_p and D_psi of class 1; forgotten, D_p of 1, D_psi of 0."""
    (z0, z1, e0, e1), (a, b) = noises(4), hand_ab(name)
    for run, options, weights in ((3.0, {}, (1, 1)), (1.0, {"keep_weight": 0.5, "forget_weight": 0.01}, (0.5, 0.01))):
        found = student_turn(cls, name, run, forget="0", override="1", **options)
        cases = ((0.3 - 0.9 * z1, e1, 1), (0.4 + 0.8 * z0, e0, 0))
        for g, (x, e, label), weight in zip(found, cases, weights, strict=False):
            omega = (x - x0_of(x, e, a, b, checks.REAL, 1, run)).abs()

            def value(x, e=e, label=label, omega=omega, run=run):
                real = x0_of(x, e, a, b, checks.REAL, 1, run)
                fake = x0_of(x, e, a, b, checks.FAKE, label, run)
                return checks.sid_loss(1.0, 1.0)(x, real, fake, omega)

            close(g, weight * (value(x + 1e-5) - value(x - 1e-5)) / 2e-5, rtol=1e-6, atol=1e-7)
            assert (g.abs() > 1e-6).all()


@each
def test_the_teacher_speaks_for_the_prompt_that_overrides(name):
    told(ScoreForgetting, name)


@each
def test_the_kept_prompts_are_sid_lsgs(name):
    z0, z1, _, e1 = noises(4)
    kept, _, terms = student_turn(ScoreForgetting, name, forget="0", override="1")
    path, student = make_path(name), Rows(0.4 + 0.8 * z0, 0.3 - 0.9 * z1)
    method = method_on(SiDLSG, path, student, checks.two_classes(path, *checks.FAKE), 3.0)
    with checks.at(T):
        turn = next(method.step(Batch(z1, labels(6, 1), Given(e1)), 0))
    turn.terms["sid"].backward()
    close(student.x[1].grad * 6, kept)
    close(turn.terms["sid"], terms["keep"])


@each
def test_at_rest_the_forgotten_has_the_law_of_what_overrides_it(name):
    """q(x | 0) = p(x | 1) and q(x | 1) = p(x | 1): a fake that answers 1 to both. A fake that answers 0 to 0 pulls."""
    path, z = make_path(name), noises(4)

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = checks.two_classes(path, *checks.REAL)

        def forward(self, x, t, cond):
            return self.net(x, t, {"label": torch.where(cond["label"] < 0, -1, 1)})

    for fake, pulls in ((One(), False), (checks.two_classes(path, *checks.REAL), True)):
        student = Rows(0.4 + 0.8 * z[0], 0.3 - 0.9 * z[1])
        method = method_on(ScoreForgetting, path, student, fake, 3.0, forget="0", override="1")
        with checks.at(T):
            sum(next(method.step(Batch(z[1], labels(6, 1), Given(*z[1:])), 0)).terms.values()).backward()
        assert (student.x[1].grad.abs() < 1e-12).all()
        assert ((student.x[0].grad.abs() > 1e-6) == pulls).all()


def regression(cls, name="vp", weight=0.25):
    """keep + weight x forget: eps errors summed over D, through guidance, on fresh samples under their own prompts."""
    (z0, z1, e0, e1), (a, b) = noises(4), hand_ab(name)
    path = make_path(name)
    student = Rows(0.4 + 0.8 * z0, 0.3 - 0.9 * z1)
    options = {"forget": "0", "override": "1", "forget_weight": weight, "null_rate": 0.0}
    method = method_on(cls, path, student, checks.two_classes(path, *checks.FAKE), 3.0, **options)
    with checks.at(T):
        game = method.step(Batch(z1, labels(6, 1), Given(e1, z0, e0, z1, e1, z0, e0)), 0)
        next(game)
        turn = next(game)
    assert turn.player == "fake"
    for name_, x, e, label, w in (("keep", student.x[1], e1, 1, 1.0), ("forget", student.x[0], e0, 0, weight)):
        xt = a * x.detach() + b * e
        eps = [checks.class_eps(xt, a, b, *checks.FAKE, k) for k in (-1, label)]
        close(turn.terms[name_], w * (eps[0] + 3.0 * (eps[1] - eps[0]) - e).square().mean())


@each
def test_the_fake_learns_both(name):
    regression(ScoreForgetting, name)


def delayed(cls):
    """Until `delay` the second loss has no weight, in either turn."""
    for step in (0, 4, 5):
        _, gone, terms = student_turn(cls, "vp", step=step, forget="0", override="1", delay=5)
        assert ((gone != 0) == (step >= 5)).all()
        assert (terms["forget"] != 0) == (step >= 5)


def test_forgetting_waits_for_its_round():
    delayed(ScoreForgetting)


def pairs(cls):
    """Several prompts: each drawn as often, each with its own override."""
    path, seen = make_path("vp"), []
    net = checks.two_classes(path, *checks.REAL)
    student = checks.Affine(path, tensor(0.4), tensor(0.8))
    given = replace(checks.parts(path, net, student, checks.two_classes(path, *checks.FAKE), 1.0), encode=numbers)
    method = cls(given, forget="0; 1;-1", override="1;0; -1")
    method.identity = mock.Mock(side_effect=lambda noise, draw, cond, told: seen.append((cond, told)) or student.mu)
    next(method.step(Batch(torch.zeros(3000, 1, dtype=F64), labels(3000, 1), Draws(0, 0, 3000)), 0))
    (cond, own), (forget, override) = [(c["label"], t["label"]) for c, t in seen]
    assert torch.equal(cond, own)
    swap = torch.tensor([1, 0, -1])
    assert torch.equal(override, swap[forget])
    for label in (0, 1, -1):
        assert (forget == label).double().mean().item() == pytest.approx(1 / 3, abs=5 * (2 / 9 / 3000) ** 0.5)


def test_several_prompts_have_their_own_overrides():
    pairs(ScoreForgetting)


def test_what_cannot_be_forgotten_is_refused():
    path = make_path("vp")
    net = checks.two_classes(path, *checks.REAL)
    given = checks.parts(path, net, net, net)
    with pytest.raises(InputError, match="override holds 2 prompts for 3 to forget"):
        ScoreForgetting(replace(given, encode=numbers), forget="0;1;1", override="0;1")
    with pytest.raises(InputError, match="this teacher reads no prompts"):
        ScoreForgetting(given, forget="0")
    with pytest.raises(InputError, match="the prompt 'long' is longer than all prompts of the run"):
        ScoreForgetting(replace(given, encode=lambda p: {"label": torch.zeros(1, 2)}), forget="long")


def test_a_class_of_the_ring_is_forgotten_and_the_others_stay():
    """200 rounds of 256: class 0 is drawn as class 1; the kept classes come nearer to the teacher's than they began."""
    teacher = truth.ring(EDM(), 4, std=0.3)
    net = truth.fit(teacher, "x0", 600, steps=200)
    few = FewStep(teacher.path, teacher.path.grid(1))
    run = {"steps": 200, "batch_size": 256, "lr": {"*": 1e-3}, "betas": {"student": [0.9, 0.99], "fake": [0.0, 0.99]}}
    parts = Parts(teacher, copy.deepcopy(net), lambda role: copy.deepcopy(net), few, teacher.null, encode=numbers)
    kept = Data((2,), {"label": torch.arange(6000) % 3 + 1})
    method = ScoreForgetting(parts, forget="0", override="1")
    trainer = Trainer(method, kept, Settings(**{**truth.DEFAULTS, **run}))

    def distance(model, label, to):
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            x = few.sample(model, torch.randn(4000, 2, generator=generator), labels(4000, label))
        return truth.sliced_w2(x, teacher.sample(torch.full((4000,), to), generator))

    before = [distance(net, label, label) for label in range(4)]
    assert distance(net, 0, 1) > 0.8
    trainer.run()
    student = trainer.finish()
    assert distance(student, 0, 1) < 0.6 * before[1]
    assert distance(student, 0, 0) > 0.8
    assert all(distance(student, label, label) < 0.6 * before[label] for label in (1, 2, 3))


# ---- do the checks notice? -----------------------------------------------------------------------------------

MUTANTS = [
    ("self.guide(self.teacher)(xt, t, told)", "self.guide(self.teacher)(xt, t, cond)", told),
    ("self.guide(self.fake)(xt, t, cond).x0", "self.guide(self.fake)(xt, t, told).x0", told),
    ("draw.normal(noise), draw, forget, override)", "draw.normal(noise), draw, override, override)", told),
    ("draw.normal(noise), draw, forget)", "draw.normal(noise), draw, cond)", regression),
    ("gone = weight * self.regression", "gone = self.regression", regression),
    ("dsm(self.guide(self.fake)", "dsm(self.fake", regression),
    ("step < self.delay", "step <= self.delay", delayed),
    ("(draw.uniform() * self.count)", "(0 * draw.uniform() * self.count)", pairs),
    ("[row % len(v)]", "[0 * row]", pairs),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken("onestroke.methods.score.score_forgetting", old, old).ScoreForgetting)
    with pytest.raises((AssertionError, TypeError)):  # TypeError: no gradient at all
        check(broken("onestroke.methods.score.score_forgetting", old, new).ScoreForgetting)
