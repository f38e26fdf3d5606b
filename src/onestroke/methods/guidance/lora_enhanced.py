"""LoRA-enhanced distillation: guidance into adapters over the teacher's own weights, one call instead of two."""

from __future__ import annotations

from onestroke.method import Batch, Method, Parts
from onestroke.methods.guidance.guided_distillation import regress


class LoRAEnhanced(Method):
    """Golnari, "LoRA-Enhanced Distillation on Guided Diffusion Models".

    Stage one of `guided-distillation` at one guidance, the run's: at a random time of noised data the student regresses
    the guided teacher, null + w (class - null), under max(SNR, 1). The student is the frozen teacher with LoRA, so that
    teacher and student are one network in memory, and before training they say the same. It is a cheaper teacher, which
    draws in as many steps as the teacher does.

    Ours: it has no options but the run's lora_rank, 64, and guidance_scale, 7.5; the paper's are not known to us.
    Without a lora_rank every weight is trained, under the same loss.
    """

    players = ("student",)
    needs = frozenset({"x0"})
    paper = "LoRA-enhanced distillation, arXiv 2312.06899"
    passes = {"student": 1, "teacher": 2}
    max_steps = 64
    target = "guided steps"
    defaults = {
        "student_steps": 25,
        "renoise": "implied",
        "guidance_scale": 7.5,
        "lora_rank": {"student": 64},
        "lr": {"*": 1e-4},
    }

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.student, self.teacher = parts.student, parts.teacher
        self.path, self.guide = parts.path, parts.guide

    def step(self, batch: Batch, step: int):
        yield regress(self.student, self.guide(self.teacher), self.path, batch, batch.cond)
