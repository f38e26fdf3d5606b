"""Easy consistency tuning: its loss typed by hand, from denoising at the first stage to the limit r = t."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from onestroke import times
from onestroke.draws import Draws
from onestroke.method import Batch
from onestroke.methods.consistency.ect import ECT
from truth.checks import F64, Given, close, fourfold, hand_ab, labels, make_path, parts, tensor
from truth.consistency_checks import FAMILY, Exact, Line, M, S
from truth.test_mutants import broken


def made(cls, path, student, rounds=800, **options):
    return cls(replace(parts(path, None, student, None), rounds=rounds), **options)


def at(t):
    return mock.patch("onestroke.times.log_normal", lambda draw, *args: torch.full((draw.size,), t, dtype=F64))


def played(method, t, x0, e, step=0):
    with at(t):
        (turn,) = method.step(Batch(e, labels(len(e)), Given(e), x0), step)
    return turn.terms["consistency"]


def by_hand(cls, name="vp"):
    """mean |f(x_t) - sg f(x_r)| / (t - r) in levels, r = t max(0, 1 - (1 + 8 sigmoid(-t)) / 2^stage), data at r = 0."""
    path, z = make_path(name), torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(46), dtype=F64)
    x0, e = M + S * z[0], z[1]
    for t in (0.35, 0.8):
        a, b = hand_ab(name, t)
        for stage, step in ((1, 99), (2, 100), (5, 450), (8, 900)):
            student = Line(path, 0.7, 0.2)
            share = max(0.0, 1 - (1 + 8 / (1 + math.exp(b / a))) / 2**stage)
            s = times.nearer(path, tensor(t), tensor(share)).item()
            x, target = a * x0 + b * e, x0
            if s > path.t_min:
                c, d = hand_ab(name, s)
                assert d / c == pytest.approx(share * b / a, rel=1e-6)
                target = 0.7 * (c * x0 + d * e) + 0.2 * s
            else:
                share = 0.0
            got = played(made(cls, path, student), t, x0, e, step)
            want = ((0.7 * x + student.shift * t - target) ** 2).sum(1).sqrt().mean() / (b / a * (1 - share))
            close(got, want, 1e-7)
            (one, other) = (torch.autograd.grad(v, student.shift)[0] for v in (got, want))
            close(one, other, 1e-7)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "trig", "table"])
def test_the_loss_is_the_one_typed_by_hand(name):
    by_hand(ECT, name)


def denoising(cls):
    """At q = 2 every level below log 7 has r = 0, and just above it an r below the least level, 0.002, which is 0 as
    well: the norm of the error of x0 over the level."""
    path = make_path("edm")
    z, e = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(47), dtype=F64)
    for level in (0.1, 1.0, 1.94, 1.947):
        t = path.time_of(-tensor(level).log()).item()
        student = Line(path, 0.7, 0.2)
        want = (0.7 * (z + level * e) + 0.2 * t - z).norm(dim=1).mean() / level
        close(played(made(cls, path, student), t, z, e), want)


def test_the_first_stage_is_denoising():
    denoising(ECT)
    path = make_path("edm")
    method = made(ECT, path, Line(path, 0.7, 0.2))
    level = tensor(1.0, 1.94, 1.96, 80.0)
    assert (method.share(level, 0) > 0).tolist() == [False, False, True, True]
    close(method.share(level, 0)[3:], [0.5])
    constant = made(ECT, path, Line(path, 0.7, 0.2), k=0.0, q=256.0)
    close(constant.share(level, 0), torch.full((4,), 255 / 256))


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_the_limit_is_the_exact_function(name):
    """The slope of the loss at the exact function goes to 0 with t - r: it halves from stage to stage."""
    path, (z, e) = make_path(name), fourfold(1)
    student = Exact(path)
    found = []
    for stage in range(9, 13):
        method = made(ECT, path, student, c=1e5, stages=stage, stage_steps=1)
        loss = played(method, 0.7, M + S * z, e, stage)
        found.append(torch.autograd.grad(loss, [student.gain, student.mean]))
    for (one, middle), (other, _) in itertools.pairwise(found):
        assert (other / one).item() == pytest.approx(0.5, rel=0.02)
        assert abs(middle) < 1e-6 * abs(one)
    away = Exact(path)
    away.gain.data += 0.1
    loss = played(made(ECT, path, away, c=1e5, stages=12, stage_steps=1), 0.7, M + S * z, e, 12)
    assert abs(torch.autograd.grad(loss, away.gain)[0]) > 0  # elsewhere it does not vanish: the target is its own


def levels(cls, count=20_000):
    """log t is normal(-1.1, 2), cut off at the path's ends."""
    path, seen = make_path("edm"), []
    method = made(cls, path, Line(path, 0.7, 0.2))
    method.share = lambda level, step: seen.append(level) or level * 0
    e = torch.zeros(count, 1, dtype=F64)
    list(method.step(Batch(e, labels(count), Draws(0, 0, count), e), 0))
    ends = [(math.log(v) + 1.1) / 2 for v in (0.002, 80)]
    first, last = (torch.special.ndtr(tensor(v)) for v in ends)
    u = (torch.special.ndtr((seen[0].log() + 1.1) / 2) - first) / (last - first)
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    assert abs(u.square().mean() - 1 / 3) < 5 * (4 / 45 / count) ** 0.5


def test_levels_are_log_normal():
    levels(ECT)


def stages(cls):
    """The run in eight equal parts, or stages of given length; the last one goes on."""
    path = make_path("edm")
    method, level = made(cls, path, Line(path, 0.7, 0.2)), tensor(1e9)
    for step, power in ((0, 1), (99, 1), (100, 2), (799, 8), (10**6, 8)):
        close(method.share(level, step), [1 - 2.0**-power])
    method = made(cls, path, Line(path, 0.7, 0.2), stage_steps=3, stages=2)
    close(torch.cat([method.share(level, k) for k in (2, 3, 6, 60)]), [0.5, 0.75, 0.75, 0.75])


def test_stages_follow_one_another():
    stages(ECT)


def on_a_table(cls):
    by_hand(cls, "table")  # whose first time is not free of noise


MUTANTS = [
    ("torch.where(apart, share, 0.0)", "share", denoising),
    ("terms.endpoint(self.student, path, lower, s, cond)", "self.student(lower, s, cond).x0", by_hand),
    ("like(apart, batch.noise) * batch.noise", "batch.noise", on_a_table),
    ("torch.sigmoid(-self.b", "torch.sigmoid(self.b", by_hand),
    ("k: float = 8.0", "k: float = 4.0", by_hand),
    ("q: float = 2.0", "q: float = 4.0", by_hand),
    ("c: float = 0.0", "c: float = 0.1", by_hand),
    ("level * (1 - torch.where(apart, share, 0.0))", "level", by_hand),
    ("1 + min(step", "min(step", stages),
    ("self.stages - 1)", "self.stages)", stages),
    ("mean: float = -1.1", "mean: float = -1.2", levels),
    ("std: float = 2.0", "std: float = 1.7", levels),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = f"{FAMILY}.ect"
    check(broken(module, old, old).ECT)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(module, old, new).ECT)
