"""PG-SB against the sheet's closed forms: SwiftBrush's direction at a random scale."""

from __future__ import annotations

import pytest
import torch

from onestroke.draws import Draws
from onestroke.method import Batch, Parts, play
from onestroke.methods.distribution.pg_sb import PGSB
from onestroke.methods.distribution.swiftbrush import SwiftBrush
from onestroke.paths import VP, Estimate
from onestroke.sampling import FewStep
from truth import checks, score_checks, vector_checks
from truth.checks import F64, Free, close, hand_ab, labels, make_path, parts, two_classes
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)


def weight(name):
    a, b = hand_ab(name)
    return a * b / (a**2 + b**2)


def closed(cls, name="flow"):
    """Without labels the scale does not matter."""
    vector_checks.is_the_closed_form(cls, make_path(name), *hand_ab(name), weight(name))


def typed(cls, name="edm"):
    """The scale is uniform in [0.5, 4], whatever the run's, and teacher and fake share it."""
    for shared, scale in ((0.0, 0.5), (0.25, 1.375), (1.0, 4.0)):
        vector_checks.is_the_hand_typed_direction(
            cls, make_path(name), *hand_ab(name), weight(name), 7.0, (scale, scale), shared
        )


def reduction(cls, name="vp"):
    vector_checks.has_its_reduction(cls, make_path(name), *hand_ab(name), weight(name), "mean")


def fake(cls, name="vp"):
    for null in (False, True):
        checks.fake_loss_is_the_closed_form(cls, make_path(name), *hand_ab(name), null)


def laws(cls):
    _, teacher, fake = vector_checks.seen(cls, VP(), null_rate=1.0)
    vector_checks.is_uniform(teacher.times[0], 0.02, 0.98)
    vector_checks.is_uniform(fake.times[1], 0.001, 1.0)
    assert (fake.labels[1] == -1).all()


class Recorder(torch.nn.Module):
    """A denoiser of texts that keeps what it is told."""

    def __init__(self, path):
        super().__init__()
        self.path, self.told = path, []
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        self.told.append(cond)
        return Estimate(self.weight * x, x)


def negatives(cls):
    """Sheet 12, NASA-T: the student is told both texts and a strength, the teacher's guidance the negative one in the
    place of the empty prompt, the fake's the empty prompt."""
    path, seen = VP(), []
    nets = {name: Recorder(path) for name in ("teacher", "student", "fake")}

    def encode(texts):
        return {"text": torch.tensor([[[float(len(text))]] for text in texts])}

    few, null = FewStep(path), {"text": torch.zeros(1, 1, 1)}
    given = Parts(nets["teacher"], nets["student"], nets.get, few, null, 1.0, (1,), encode=encode)
    method = cls(given, negatives="bad; ugly", null_rate=0.0)
    for step in range(8):
        for net in nets.values():
            net.told.clear()
        batch = Batch(torch.randn(6, 1), {"text": torch.ones(6, 1, 1)}, Draws(0, step, 6))
        play(method, [batch], step, lambda player: None)
        told, real, fake = (nets[name].told[0] for name in ("student", "teacher", "fake"))
        assert told.keys() == {"text", "negative.text", "nasa_scale"}
        away = told["negative.text"]
        assert set(away.flatten().tolist()) <= {3.0, 4.0}
        assert len(set(told["nasa_scale"].tolist())) == 1
        seen.append(told["nasa_scale"][0].item())
        assert torch.equal(real["text"], torch.cat([batch.cond["text"], away]))
        assert torch.equal(fake["text"], torch.cat([batch.cond["text"], torch.zeros(6, 1, 1)]))
        assert nets["fake"].told[1].keys() == {"text"}
    assert 0 <= min(seen) < 0.4 < 0.6 < max(seen) < 1


@each
@pytest.mark.parametrize("check", [closed, typed, reduction, fake])
def test_the_turns_are_the_closed_forms(check, name):
    check(PGSB, name)


@each
def test_nothing_moves_when_the_fake_has_the_teachers_law(name):
    score_checks.zero_at_the_truth(PGSB, make_path(name), 1.0)
    score_checks.zero_at_the_truth(PGSB, make_path(name), 1.0, shift=-0.2)


def test_the_mean_direction_is_that_of_swiftbrush_at_the_mean_scale():
    """Sheet 12: the direction is linear in the scale, so the midpoint rule over U(0.5, 4) is exact."""
    path = VP()
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)

    def direction(cls, scale, shared):
        student, nets = Free(z), (two_classes(path, *law) for law in (score_checks.REAL, score_checks.FAKE))
        method = cls(parts(path, next(nets), student, next(nets), scale))
        return score_checks.direction(method, student, z, e, labels(6, 0), shared=shared)

    shares = [(i + 0.5) / 10 for i in range(10)]
    mean = torch.stack([direction(PGSB, 1.0, share) for share in shares]).mean(0)
    close(mean, direction(SwiftBrush, 2.25, 1.0))


def test_times_are_the_published_ones():
    laws(PGSB)


def test_with_negative_prompts():
    negatives(PGSB)


SOURCE = "onestroke.methods.distribution.pg_sb"
NETS = "Guided(net, scale, null)(xt, t, cond) for net, null in nets"
MUTANTS = [
    ("real.eps - fake.eps", "fake.eps - real.eps", closed),
    ("sigma**2 *", "sigma *", closed),
    ("min_scale: float = 0.5", "min_scale: float = 1.0", typed),
    ("max_scale: float = 4.0", "max_scale: float = 4.5", typed),
    (NETS, NETS.replace("scale", "2 * scale"), typed),
    ("* draw.shared()\n        with", "* draw.uniform().mean().item()\n        with", typed),
    (
        "terms.descend(x, sigma**2 * (real.eps - fake.eps))",
        'terms.descend(x, sigma**2 * (real.eps - fake.eps), "sum")',
        reduction,
    ),
    ("self.path.unit_ab(t)[0] ** self", "self.path.unit_ab(t)[1] ** self", fake),
    ("draw.shared() < self.null_rate", "draw.shared() > self.null_rate", fake),
    ("hi: float = 0.98", "hi: float = 1.0", laws),
    ("(self.fake, self.null))", "(self.fake, away))", negatives),
    ("((self.teacher, away)", "((self.teacher, self.null)", negatives),
    ("negated(cond, away, draw.shared())", "negated(cond, away, 2 * draw.shared())", negatives),
    ("self.student, batch.noise, told", "self.student, batch.noise, cond", negatives),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).PGSB)
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new).PGSB)
