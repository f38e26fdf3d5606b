"""SpeedUpNet: of guidance the student has mean w m; then each of its steps ends where the teacher's small ones do."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.guidance.speedupnet import SpeedUpNet
from onestroke.paths import Estimate, like
from onestroke.sampling import FewStep
from onestroke.teachers.gaussian import GaussianMixture
from truth import pair_checks as checks
from truth import segment_checks
from truth.checks import Given, close, hand_ab, labels, make_path, tensor
from truth.pair_checks import PATHS, M, S
from truth.test_guided_distillation import Shifting, mean_is_w_m
from truth.test_mutants import broken

SOURCE = "onestroke.methods.guidance.speedupnet"
STEPS, PIECES, HOPS = 2, 4, 2


class Drawn(Given):
    """Draws whose uniform numbers are given."""

    def __init__(self, u):
        super().__init__(u)
        self.u = u.double()

    def uniform(self, lo=0.0, hi=1.0):
        return self.u


def build(cls, path, student, teacher, steps=STEPS, **options):
    few = FewStep(path, path.grid(steps), renoise="implied")
    parts = replace(checks.parts(path, teacher, student, None), few=few, rounds=5)
    return cls(parts, **{"pieces": PIECES, "hops": HOPS, **options})


def every_piece():
    """A batch with one row in each piece of each step."""
    k, j = torch.arange(STEPS).repeat_interleave(PIECES), torch.arange(PIECES).repeat(STEPS)
    x0, z = checks.noise(STEPS * PIECES, seed=70), checks.noise(STEPS * PIECES, seed=71)
    u = ((STEPS - 1 - k) * PIECES + j + 0.5) / (STEPS * PIECES)
    return k, j, Batch(z, labels(len(z)), Drawn(u), x0)


@pytest.mark.parametrize("name", PATHS)
def test_the_mean_of_the_first_stage_is_w_m(name):
    mean_is_w_m(SpeedUpNet, name)


class Mean(nn.Module):
    """Answers as a mixture, its x0 moved by a parameter."""

    def __init__(self, net, off):
        super().__init__()
        self.net, self.off = net, nn.Parameter(tensor(off))

    def forward(self, x, t, cond):
        est = self.net(x, t, cond)
        return self.net.path.split(x, est.x0 + self.off, t, "x0")


def step_ends_where_small_ones_do(cls, name):
    """Every row against the sheet's multi-step consistency typed by hand: hops of the teacher, then the student's own
    jump to the step's end, which is the state itself in the last piece, and x0 at the data end; max(SNR, 1)."""
    path, teacher = make_path(name), checks.two_modes(make_path(name))
    student = Mean(GaussianMixture(path, tensor([M]), S), 0.1)
    k, j, batch = every_piece()
    loss = checks.losses(build(cls, path, student, teacher, guide_steps=1), batch, 1)["consistency"]
    ends, want, rows = [*path.grid(STEPS), 0.0], 0.0, len(k)

    def ask(net, x, t):
        est = net(x[None], tensor(t), labels(1))
        return est.x0[0], est.eps[0]

    def snap(t):
        return path.snap(tensor(t)).item()

    for row in range(rows):
        top, end = ends[k[row]], ends[k[row] + 1]
        spots = [snap(end + (top - end) * (j[row].item() * HOPS + i) / (PIECES * HOPS)) for i in range(HOPS, -1, -1)]
        t, goal = spots[0], spots[-1]
        a, b = hand_ab(name, t)
        x = a * batch.x0[row] + b * batch.noise[row]
        y = x
        for hop in range(HOPS):
            x0, eps = ask(teacher, y, spots[hop])
            c, d = hand_ab(name, spots[hop + 1])
            y = c * x0 + d * eps
        c, d = hand_ab(name, end)
        if j[row] > 0:
            x0, eps = ask(student, y, goal)
            y = c * x0 + d * eps
        if end > 0:
            x0 = (y - d / b * x) / (c - d / b * a)
        got, _ = ask(student, x, t)
        want = want + max(1, a**2 / b**2) * (got - x0.detach()).square().sum() / rows
    close(loss, want, 1e-7)
    close(torch.autograd.grad(loss, student.off)[0], torch.autograd.grad(want, student.off)[0], 1e-7)


@pytest.mark.parametrize("name", PATHS)
def test_a_step_ends_where_small_ones_do(name):
    step_ends_where_small_ones_do(SpeedUpNet, name)


class Jump(nn.Module):
    """The exact map of N(M, S^2) from t to the end of its step, M a' + sqrt(V' / V) (x - a M), as (x0, eps)."""

    def __init__(self, path, ends):
        super().__init__()
        self.path, self.ends, self.gain = path, tensor(*ends), nn.Parameter(tensor(1.0))

    def forward(self, x, t, cond):
        end = self.ends[(self.ends[None] < t[:, None] - 1e-9).double().argmax(1)]
        (a, b), (c, d) = ((like(v, x) for v in self.path.ab(w)) for w in (t, end))
        d = torch.where(like(end, x) > 0, d, 0 * d)
        c = torch.where(like(end, x) > 0, c, 0 * c + 1)
        y = c * M + ((c**2 * S**2 + d**2) / (a**2 * S**2 + b**2)).sqrt() * (x - a * M)
        x0 = (y * b - d * x) / (c * b - d * a)
        return Estimate(self.gain * x0, (x - a * x0) / b)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_the_exact_map_is_a_fixed_point(name):
    """Up to the error of the teacher's DDIM hops, whose square falls with the square of their number; half as large an
    x0 is far off."""
    path = make_path(name)
    teacher, student = GaussianMixture(path, tensor([M]), S), Jump(path, [*path.grid(STEPS), 0.0])
    found = [
        checks.losses(build(SpeedUpNet, path, student, teacher, hops=hops, guide_steps=1), every_piece()[2], 1)
        for hops in (64, 128)
    ]
    coarse, fine = (v["consistency"].item() for v in found)
    assert 3 < coarse / fine < 5
    student.gain.data.mul_(0.5)
    wrong = checks.losses(build(SpeedUpNet, path, student, teacher, guide_steps=1), every_piece()[2], 1)
    assert wrong["consistency"] > 100 * fine


def stages_follow(cls):
    """Guidance for three rounds, then consistency; half the run where nothing is said."""
    path = make_path("vp")
    method = build(cls, path, Mean(checks.two_modes(path), 0.0), checks.two_modes(path), guide_steps=3)
    seen = [list(checks.losses(method, every_piece()[2], step)) for step in range(5)]
    assert seen == [["guide"]] * 3 + [["consistency"]] * 2
    parts = replace(checks.parts(path, method.teacher, method.student, None), rounds=90)
    assert cls(parts).guide_steps == 45


def test_stages_follow_one_another():
    stages_follow(SpeedUpNet)


def negative_prompt_is_led_away_from(cls):
    """negative + w (class - negative): of means M for the class, 0 for none and -M for the negative prompt."""

    class Three(Shifting):
        def forward(self, x, t, cond):
            est, a = super().forward(x, t, cond), like(self.yes.path.ab(t)[0], x)
            shift = like((cond["label"] == 7).double(), x)
            low = GaussianMixture(self.yes.path, tensor([-M]), S)(x, t, {"label": 0 * cond["label"]})
            return Estimate(est.x0.lerp(low.x0, shift), est.eps.lerp(low.eps, shift * (a * 0 + 1)))

    path, z = make_path("vp"), checks.noise(seed=30)
    for negative, mean in (("", 3 * M), ("dull", -M + 3 * 2 * M)):
        parts = checks.parts(path, Three(path), GaussianMixture(path, tensor([mean]), S), None, 3.0)
        parts = replace(parts, encode=lambda texts: {"label": torch.full((len(texts),), 7)})
        found = checks.batch(z, M + S * checks.noise(seed=31))._replace(
            cond={"label": torch.zeros(8, dtype=torch.long)}
        )
        with checks.at(0.4):
            assert checks.losses(cls(parts, negative=negative), found)["guide"] < 1e-20


def test_a_negative_prompt_is_led_away_from():
    negative_prompt_is_led_away_from(SpeedUpNet)


class Texts(nn.Module):
    """x0 is the text; where a second one is read, it is led away from that by 3."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x, t, cond):
        self.away = cond.get("negative.text", cond["text"])
        return self.path.split(x, 3 * cond["text"] - 2 * self.away, t, "x0")


def rows_have_negatives_of_their_own(cls):
    """Half of them: where a row's second number is below one half, its first names a prompt of the run. The student
    reads what the teacher is led away from."""
    path, z = make_path("vp"), checks.noise(4)
    told = {"null": {"text": tensor([0.0])}, "conditions": {"text": tensor([1.0], [2.0], [3.0])}}
    student, draw = Texts(path), segment_checks.Drawn([tensor(0.4, 0.9, 0.1, 0.1), tensor(0.0, 0.49, 0.5, 0.9)], [z])
    with mock.patch.dict(cls.step.__globals__, branched=lambda net, null, scale: student):
        method = cls(replace(checks.parts(path, Texts(path), None, None, 3.0), **told))
    with checks.at(0.4):
        assert checks.losses(method, Batch(z, {"text": 0 * z + 7}, draw, z))["guide"] < 1e-20
    assert student.away.flatten().tolist() == [2, 3, 0, 0]


def test_rows_have_negatives_of_their_own():
    rows_have_negatives_of_their_own(SpeedUpNet)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hops": 0}, "pieces=4 and hops=0 must be at least 1"),
        ({"pieces": 600}, "a grid of 2400 steps has more of them than the teacher has times"),
    ],
)
def test_bad_options(options, said):
    path = make_path("table")
    with pytest.raises(InputError, match=said):
        build(SpeedUpNet, path, checks.Slope(path), checks.two_modes(path), **options)


def guides(module):
    mean_is_w_m(module.SpeedUpNet, "vp")


def ends(module):
    for name in ("vp", "table"):
        step_ends_where_small_ones_do(module.SpeedUpNet, name)


def stages(module):
    stages_follow(module.SpeedUpNet)


def negative(module):
    negative_prompt_is_led_away_from(module.SpeedUpNet)


def others(module):
    rows_have_negatives_of_their_own(module.SpeedUpNet)


MUTANTS = [
    ("Guided(self.teacher, self.scale, null)", "self.teacher", guides),
    ("parts.prompts([negative]) if negative else parts.null", "parts.null", negative),
    ("others: float = 0.5", "others: float = 0.4", others),
    (">= self.others", "< self.others", others),
    ('len(self.every["text"])', '(len(self.every["text"]) - 1)', others),
    ("self.scale, null)", "self.scale, self.null)", others),
    ("negated(cond, null, None)", "negated(cond, self.null, None)", others),
    ("step < self.guide_steps", "step <= self.guide_steps", stages),
    ("goal == step_of", "goal != step_of", ends),
    ("grid[goal + hop - 1]", "grid[goal]", ends),
    ("teacher(y, grid[goal + hop], cond)", "teacher(x, grid[goal + hop], cond)", ends),
    ("torch.where(last, y,", "torch.where(~last, y,", ends),
    ("torch.where(last, est.x0, own.x0)", "est.x0", ends),
    ("self.student(y, grid", "self.student(x, grid", ends),
    ("with torch.no_grad():\n            for", "if True:\n            for", ends),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises(AssertionError):
        check(broken(SOURCE, old, new))
