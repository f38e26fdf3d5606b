"""Distillation of guided diffusion: the student of stage one has mean w m for every w told, then it is halved."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from contract.build import batch as small_batch
from contract.build import build as small
from onestroke.denoiser import plain
from onestroke.methods.guidance.guided_distillation import GuidedDistillation
from onestroke.paths import Estimate
from onestroke.teachers.gaussian import GaussianMixture
from truth import pair_checks as checks
from truth.checks import T, close, hand_ab, make_path, tensor
from truth.consistency_checks import Drawn
from truth.pair_checks import PATHS, M, S, Shifted
from truth.test_mutants import broken
from truth.test_progressive import fine


class Shifting(torch.nn.Module):
    """Of equal deviations: N(M, S^2) under a class, N(0, S^2) under none."""

    def __init__(self, path):
        super().__init__()
        self.yes, self.no = (GaussianMixture(path, tensor([m]), S) for m in (M, 0.0))

    def forward(self, x, t, cond):
        all_ = {"label": torch.zeros_like(cond["label"])}
        yes, no = self.yes(x, t, all_), self.no(x, t, all_)
        chosen = cond["label"][:, None] >= 0
        return Estimate(torch.where(chosen, yes.x0, no.x0), torch.where(chosen, yes.eps, no.eps))


def batch(z):
    found = checks.batch(z, M + S * checks.noise(seed=31))
    return found._replace(cond={"label": torch.zeros(len(z), dtype=torch.int64)})


ALONE = {"spread": 0.0, "embed": False}
"""One guidance, of which nothing is told: for students without a time embedding."""


def mean_is_w_m(cls, name, w=3.0, **options):
    """The loss vanishes at N(w M, S^2) and nowhere near, at every time."""
    path, z = make_path(name), checks.noise(seed=30)
    for mean, zero in ((w * M, True), (M, False), ((w + 1) * M, False)):
        student = GaussianMixture(path, tensor([mean]), S)
        method = cls(checks.parts(path, Shifting(path), student, None, w), **options)
        for t in (0.05, T, 0.95):
            with checks.at(t):
                assert (checks.losses(method, batch(z))["guide"] < 1e-20) == zero


@pytest.mark.parametrize("name", PATHS)
def test_the_mean_is_w_m(name):
    mean_is_w_m(GuidedDistillation, name, **ALONE)


W, SPREAD = 3.0, 0.75


class Told(torch.nn.Module):
    """The posterior of N((w + off) M, S^2), linear in the guidance w = 1 + (W - 1) (1 + 3 / 4 side) that it is told."""

    def __init__(self, path, name, off=0.0):
        super().__init__()
        self.path, self.name, self.off = path, name, off

    def mean(self, cond):
        return ((W + self.off) + (W - 1) * SPREAD * cond["s"])[:, None] * M

    def forward(self, x, t, cond):
        a, b = (tensor(*v)[:, None] for v in zip(*(hand_ab(self.name, v) for v in t.tolist()), strict=True))
        gain = a * S**2 / (a**2 * S**2 + b**2)
        return self.path.split(x, gain * x + (1 - a * gain) * self.mean(cond), t, "x0")


def told_batch(z):
    """As `batch`, with all of the range of guidance, and every step of a grid of as many, among the rows."""
    return batch(z)._replace(draw=Drawn((torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z)))


def every_guidance(cls, name="vp"):
    """One student is exact for every w of the range that it is told; with w - 1 or w + 1 in its place it is not."""
    path, z = make_path(name), checks.noise(seed=30)
    for off, zero in ((0.0, True), (-1.0, False), (1.0, False)):
        method = cls(checks.parts(path, Shifting(path), Told(path, name, off), None, W), embed=False)
        method.embed = True
        for t in (0.05, T, 0.95):
            with checks.at(t):
                assert (checks.losses(method, told_batch(z))["guide"] < 1e-20) == zero


@pytest.mark.parametrize("name", PATHS)
def test_it_is_exact_for_every_guidance_told(name):
    every_guidance(GuidedDistillation, name)


class Halved(Told):
    """Of every row, the x0 whose one DDIM step ends where two DDIM steps on N(w M, S^2) do, for the w told."""

    def forward(self, x, t, cond):
        grid, mean, rows = fine(self.path, 2 * len(x)), self.mean(cond), []
        for i, (row, mu) in enumerate(zip(x, mean, strict=True)):
            (a, b), (c, d), (e, f) = (hand_ab(self.name, v) for v in grid[2 * i : 2 * i + 3])
            middle = c * mu + (a * c * S**2 + b * d) / (a**2 * S**2 + b**2) * (row - a * mu)
            x0 = mu + c * S**2 / (c**2 * S**2 + d**2) * (middle - c * mu)
            end = e * x0 + f * (middle - c * x0) / d
            rows.append(x0 if grid[2 * i + 2] == 0 else (end - f / b * row) / (e - f / b * a))
        return self.path.split(x, torch.stack(rows), t, "x0")


def told_in_halves(cls, name="vp"):
    """In stage two the student, and what it was, are told it too."""
    path, z = make_path(name), checks.noise(seed=30)
    for off, zero in ((0.0, True), (1.0, False)):
        options = {"guide_steps": 1, "start": 8, "stage_steps": 9, "embed": False}
        method = cls(checks.parts(path, Shifting(path), Halved(path, name, off), None, W), **options)
        method.embed, method.last = True, Told(path, name)
        assert (checks.losses(method, told_batch(z), 2)["halve"] < 1e-20) == zero


@pytest.mark.parametrize("name", PATHS)
def test_it_is_halved_for_every_guidance_told(name):
    told_in_halves(GuidedDistillation, name)


def test_what_is_kept_is_the_student_of_the_runs_guidance():
    """As of LCM: told nothing, it is the student told the middle of the range; what halves it is told as it is."""
    method = small("guided-distillation", guidance=W)
    found, t = small_batch(), torch.full((8,), 0.5, dtype=torch.float64)
    for net in (method.student, method.last):
        torch.nn.init.normal_(net.shift.weight)
        untold = net(found.noise, t, found.cond).x0
        assert torch.equal(plain(net)(found.noise, t, found.cond).x0, untold)
        assert torch.equal(net(found.noise, t, {**found.cond, "s": 0 * t}).x0, untold)
        assert (net(found.noise, t, {**found.cond, "s": 1 + 0 * t}).x0 - untold).abs().min() > 1e-4


def test_without_guidance_none_is_drawn():
    method, calls = small("guided-distillation", guidance=1.0), []
    method.teacher.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    list(method.step(small_batch(), 0))
    assert calls == [8]


def weight_is_truncated_snr(cls, name, t, shift=0.01, **options):
    path, z = make_path(name), checks.noise(seed=30)
    student = Shifted(path, 0.0)
    method = cls(checks.parts(path, Shifting(path), student, None, 1.0), **options)
    found = batch(z)
    a, b = hand_ab(name, t)
    with checks.at(t):
        x = a * found.x0 + b * z
        student.x0 = method.teacher(x, torch.full((8,), t, dtype=x.dtype), found.cond).x0 + shift
        close(checks.losses(method, found)["guide"], max(1, a**2 / b**2) * shift**2, 1e-7)


@pytest.mark.parametrize("t", [0.1, T, 0.9])
def test_the_weight_is_truncated_snr(t):
    weight_is_truncated_snr(GuidedDistillation, "vp", t, **ALONE)


def then_it_is_halved(cls):
    """Guidance for three rounds, then 4, 4, 2, 2, 1, 1, 1 steps, always of what the student was, never guided again."""
    path = make_path("vp")
    student = Shifted(path, 0.0)
    student.x0 = torch.zeros(8, 1, dtype=torch.float64)
    options = {"guide_steps": 3, "start": 4, "stage_steps": 2, **ALONE}
    method, seen = cls(checks.parts(path, Shifting(path), student, None, 2.0), **options), []
    method.halve = lambda batch, steps, teacher: seen.append((steps, teacher)) or "turn"
    for step in range(10):
        student.shift.data = tensor(step * 1.0)
        with checks.at(T):
            list(method.step(batch(checks.noise()), step))
        assert method.last.shift == (0, 0, 0, 3, 3, 5, 5, 7, 7, 7)[step]
    assert seen == [(n, method.last) for n in (4, 4, 2, 2, 1, 1, 1)]


def test_then_it_is_halved():
    then_it_is_halved(GuidedDistillation)


def guides(module):
    mean_is_w_m(module.GuidedDistillation, "vp", **ALONE)


def tells(module):
    every_guidance(module.GuidedDistillation)


def tells_halves(module):
    told_in_halves(module.GuidedDistillation)


def weighs(module):
    for t in (0.1, 0.9):
        weight_is_truncated_snr(module.GuidedDistillation, "vp", t, **ALONE)


def halves(module):
    then_it_is_halved(module.GuidedDistillation)


SOURCE = "onestroke.methods.guidance.guided_distillation"
MUTANTS = [
    ("self.guide(self.teacher, scale)", "self.teacher", guides),
    ("self.guide(self.teacher, scale)", "self.guide(self.teacher)", tells),
    ('{**batch.cond, "s": side} if', '{**batch.cond, "s": 0 * side} if', tells),
    ("spread: float = 0.75", "spread: float = 0.5", tells),
    ("student(x, t, told)", "student(x, t, batch.cond)", tells),
    ("batch._replace(cond=told)", "batch", tells_halves),
    ("want.x0, want.eps)", "want.eps, want.x0)", guides),
    ("batch.x0, batch.noise, t", "batch.x0, 0 * batch.noise, t", weighs),
    ("step < self.guide_steps", "step <= self.guide_steps", halves),
    ("if not gone and", "if", halves),
    ("stage < len(self.stages)", "stage < 1", halves),
    ("min(stage, len(self.stages) - 1)", "0", halves),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises((AssertionError, KeyError)):
        check(broken(SOURCE, old, new))


@pytest.mark.parametrize(
    "new",
    ["(scale - 1) * (1 + spread * side)", "1 + scale * (1 + spread * side)", "scale * (1 + spread * side)"],
)
def test_the_guidance_told_is_the_drawn_one(new):
    """A w that is off by one, in either convention, or multiplied whole."""
    old = "1 + (scale - 1) * (1 + spread * side)"
    with mock.patch(f"{SOURCE}.guidances", broken("onestroke.denoiser", old, new).guidances):
        with pytest.raises(AssertionError):
            every_guidance(GuidedDistillation)
