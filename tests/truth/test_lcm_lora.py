"""LCM-LoRA: LCM's loss with w drawn but not told, against the student itself, in adapters alone."""

from __future__ import annotations

import pytest
import torch

from contract.build import build, settings_of, trained
from onestroke.method import Batch
from onestroke.methods.consistency.lcm_lora import LCMLoRA
from truth import consistency_checks as checks
from truth.checks import F64, close, labels, make_path, tensor
from truth.consistency_checks import FAMILY, M, S
from truth.segment_checks import Classes
from truth.test_lcm import guided_mean
from truth.test_mutants import broken

LORA = {"lora_rank": {"*": 2}, "lora_targets": ["enter", "leave"]}


def by_hand(cls, name="vp"):
    """The target is the average, which keeps nothing of itself: the current weights, without gradient."""
    assert checks.loss_is_by_hand(cls, name, "huber", told=False) == {"slow": 0.0}


@pytest.mark.parametrize("name", checks.NAMES)
def test_the_loss_is_the_one_typed_by_hand(name):
    by_hand(LCMLoRA, name)


class Untold(torch.nn.Module):
    """x0 = gain x, of a network that could be told a second number."""

    clock = "time"

    def __init__(self, path):
        super().__init__()
        self.path, self.gain = path, torch.nn.Parameter(tensor(0.7))
        self.time = torch.nn.Linear(1, 2).double()

    def forward(self, x, t, cond):
        assert set(cond) == {"label"}
        self.time(t[:, None])
        return self.path.split(x, self.gain * x, t, "x0")


def drawn_but_not_told(cls):
    """The paper's w_hat is uniform in [5, 15], the guidance 1 + w_hat, and the student reads nothing of it."""
    path, t, s = make_path("vp"), 0.7, 0.6
    student = Untold(path)
    method = cls(checks.parts(path, Classes(path, M), student, None, cls.defaults["guidance_scale"]), distance="l2")
    assert method.student is student
    u = tensor(0.0, 0.2, 0.5, 0.9)
    z, e = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(48), dtype=F64)
    x0, w_hat = M + S * z, (5 + 10 * u)[:, None]
    with checks.pair(t, s):
        (turn,) = method.step(Batch(e, labels(4, 0), checks.Drawn(u, e), x0), 0)
    a, b = checks.hand_ab("vp", t)
    x = a * x0 + b * e
    lower = checks.ddim("vp", t, s, x, mean=(1 + w_hat) * M)
    close(turn.terms["consistency"], (0.7 * (x - lower)).square().mean())


def test_the_guidance_is_drawn_but_not_told():
    drawn_but_not_told(LCMLoRA)


def test_its_student_has_the_mean_of_one_plus_w_hat():
    guided_mean(LCMLoRA)


def test_adapters_alone_are_trained_and_are_their_own_target():
    assert LCMLoRA.defaults["lora_rank"] == {"student": 64}
    made = build("lcm-lora", settings=settings_of(**LORA))
    live = [k for k, p in made.student.named_parameters() if p.requires_grad]
    assert live
    assert all("lora_" in k for k in live)
    trainer = trained("lcm-lora", rounds=2, **LORA)
    student, slow = (dict(m.named_parameters()) for m in (trainer.bare("student"), trainer.method.slow))
    assert all(torch.equal(p, slow[k]) for k, p in student.items())
    assert all(p is slow[k] for k, p in student.items() if "lora_" not in k)
    assert any((p != 0).any() for k, p in student.items() if "lora_B" in k)


MUTANTS = [
    ("embed=False", "embed=True", drawn_but_not_told),
    ("keep=0.0", "keep=0.95", by_hand),
    ("spread: float = 0.5", "spread: float = 0.6", drawn_but_not_told),
    ("parts, grid, spread,", "parts, grid, 0.0,", drawn_but_not_told),
    ('distance: str = "huber"', 'distance: str = "l2"', by_hand),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    module = f"{FAMILY}.lcm_lora"
    check(broken(module, old, old).LCMLoRA)
    with pytest.raises(AssertionError):
        check(broken(module, old, new).LCMLoRA)
