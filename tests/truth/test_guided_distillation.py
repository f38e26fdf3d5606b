"""Distillation of guided diffusion: the student of stage one has mean w m, then it is halved."""

from __future__ import annotations

import pytest
import torch

from contract.build import batch as small_batch
from contract.build import build as small
from contract.build import data, settings_of, state
from onestroke.methods.guidance.guided_distillation import GuidedDistillation
from onestroke.paths import Estimate
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.training.train import Trainer
from truth import pair_checks as checks
from truth.checks import T, close, hand_ab, make_path, tensor
from truth.pair_checks import PATHS, M, S, Shifted
from truth.test_mutants import broken


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


def mean_is_w_m(cls, name, w=3.0):
    """The loss vanishes at N(w M, S^2) and nowhere near, at every time."""
    path, z = make_path(name), checks.noise(seed=30)
    for mean, zero in ((w * M, True), (M, False), ((w + 1) * M, False)):
        student = GaussianMixture(path, tensor([mean]), S)
        method = cls(checks.parts(path, Shifting(path), student, None, w))
        for t in (0.05, T, 0.95):
            with checks.at(t):
                assert (checks.losses(method, batch(z))["guide"] < 1e-20) == zero


@pytest.mark.parametrize("name", PATHS)
def test_the_mean_is_w_m(name):
    mean_is_w_m(GuidedDistillation, name)


def weight_is_truncated_snr(cls, name, t, shift=0.01):
    path, z = make_path(name), checks.noise(seed=30)
    student = Shifted(path, 0.0)
    method = cls(checks.parts(path, Shifting(path), student, None, 1.0))
    found = batch(z)
    a, b = hand_ab(name, t)
    with checks.at(t):
        x = a * found.x0 + b * z
        student.x0 = method.teacher(x, torch.full((8,), t, dtype=x.dtype), found.cond).x0 + shift
        close(checks.losses(method, found)["guide"], max(1, a**2 / b**2) * shift**2, 1e-7)


@pytest.mark.parametrize("t", [0.1, T, 0.9])
def test_the_weight_is_truncated_snr(t):
    weight_is_truncated_snr(GuidedDistillation, "vp", t)


def then_it_is_halved(cls):
    """Guidance for three rounds, then 4, 4, 2, 2, 1, 1, 1 steps, always of what the student was, never guided again."""
    path = make_path("vp")
    student = Shifted(path, 0.0)
    student.x0 = torch.zeros(8, 1, dtype=torch.float64)
    options = {"guide_steps": 3, "start": 4, "stage_steps": 2}
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


def test_stage_one_alone_with_adapters_is_lora_enhanced_distillation():
    """Adapters of nothing over the teacher's own frozen weights, which do not move; every round is of guidance, for a
    student of 16 steps."""
    changes = {"lora_rank": {"*": 2}, "lora_targets": ["enter", "leave"], "student_steps": 16, "renoise": "implied"}
    trainer = Trainer(
        small("guided-distillation", settings=settings_of(**changes), guide_steps=4, start=16),
        data(),
        settings_of(**changes, steps=4),
    )
    method = trainer.method
    assert all("lora_" in name for name, p in method.student.named_parameters() if p.requires_grad)
    found = small_batch()
    t = torch.full((8,), 0.4, dtype=torch.float64)
    assert torch.equal(method.student(found.noise, t, found.cond).x0, method.teacher(found.noise, t, found.cond).x0)
    before = state(method.teacher)
    seen = [set(trainer.one_round(0.0)) for _ in range(4)]
    assert seen == [{"student/guide"}] * 4
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert (method.student(found.noise, t, found.cond).x0 != method.teacher(found.noise, t, found.cond).x0).all()
    assert GuidedDistillation.max_steps >= 16


def guides(module):
    mean_is_w_m(module.GuidedDistillation, "vp")


def weighs(module):
    for t in (0.1, 0.9):
        weight_is_truncated_snr(module.GuidedDistillation, "vp", t)


def halves(module):
    then_it_is_halved(module.GuidedDistillation)


MUTANTS = [
    ("self.guide(self.teacher)(x", "self.teacher(x", guides),
    ("est, want.x0, want.eps", "est, want.eps, want.x0", guides),
    ("batch.x0, batch.noise, t", "batch.x0, 0 * batch.noise, t", weighs),
    ("step < self.guide_steps", "step <= self.guide_steps", halves),
    ("if not gone and", "if", halves),
    ("stage < len(self.stages)", "stage < 1", halves),
    ("min(stage, len(self.stages) - 1)", "0", halves),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    source = "onestroke.methods.guidance.guided_distillation"
    check(broken(source, old, old))
    with pytest.raises(AssertionError):
        check(broken(source, old, new))
