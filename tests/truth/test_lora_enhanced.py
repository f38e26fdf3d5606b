"""LoRA-enhanced distillation: the student has mean w m, in adapters over the teacher's own weights."""

from __future__ import annotations

import pytest
import torch

from contract.build import batch as small_batch
from contract.build import build as small
from contract.build import data, settings_of, state
from onestroke.methods.guidance.lora_enhanced import LoRAEnhanced
from onestroke.training.train import Trainer
from truth.pair_checks import PATHS
from truth.test_guided_distillation import mean_is_w_m, weight_is_truncated_snr
from truth.test_mutants import broken


@pytest.mark.parametrize("name", PATHS)
def test_the_mean_is_w_m(name):
    mean_is_w_m(LoRAEnhanced, name)


@pytest.mark.parametrize("t", [0.1, 0.9])
def test_the_weight_is_truncated_snr(t):
    weight_is_truncated_snr(LoRAEnhanced, "vp", t)


def test_adapters_alone_are_trained_over_the_teachers_own_weights():
    """Every frozen weight of the student is the teacher's, in its very storage; before training both say the same;
    every round is of guidance, and none moves the teacher."""
    assert LoRAEnhanced.defaults["lora_rank"] == {"student": 64}
    changes = {"lora_rank": {"*": 2}, "lora_targets": ["enter", "leave"], "student_steps": 16, "renoise": "implied"}
    method = small("lora-enhanced", settings=settings_of(**changes))
    trainer = Trainer(method, data(), settings_of(**changes))
    weights = dict(method.student.named_parameters())
    frozen = {k.replace(".base_layer", ""): p for k, p in weights.items() if not p.requires_grad}
    assert all("lora_" in k for k, p in weights.items() if p.requires_grad)
    assert frozen.keys() == dict(method.teacher.named_parameters()).keys()
    assert all(p.data_ptr() == frozen[k].data_ptr() for k, p in method.teacher.named_parameters())
    found, t = small_batch(), torch.full((8,), 0.4, dtype=torch.float64)
    assert torch.equal(method.student(found.noise, t, found.cond).x0, method.teacher(found.noise, t, found.cond).x0)
    before = state(method.teacher)
    assert [set(trainer.one_round(0.0)) for _ in range(4)] == [{"student/guide"}] * 4
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert (method.student(found.noise, t, found.cond).x0 != method.teacher(found.noise, t, found.cond).x0).all()


def guides(module):
    mean_is_w_m(module.LoRAEnhanced, "vp")


MUTANTS = [
    ("self.guide(self.teacher)", "self.teacher", guides),
    ("self.guide(self.teacher)", "self.guide(self.student)", guides),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    source = "onestroke.methods.guidance.lora_enhanced"
    check(broken(source, old, old))
    with pytest.raises(AssertionError):
        check(broken(source, old, new))
