"""Distillation of guided diffusion: classifier-free guidance into one network, then progressive distillation."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Parts, Turn, follow
from onestroke.methods.flow.progressive import Progressive


class GuidedDistillation(Progressive):
    """Meng et al., "On Distillation of Guided Diffusion Models", arXiv 2210.03142.

    Stage one, `guide_steps` rounds: at a random time of noised data the student regresses the guided teacher, null + w
    (class - null), under max(SNR, 1): one call instead of two. Stage two: progressive distillation of that student (see
    `progressive`).

    guide_steps: 0, ours: as long as a stage. start, stage_steps: as in `progressive`, but that 0 counts the stage of
    guidance too. With guide_steps the run's steps, stage one is all: a student of many steps without guidance; that
    with a lora_rank, so that adapters over the frozen teacher are all that is trained, is LoRA-enhanced distillation
    (Golnari, arXiv 2312.06899).
    Ours: one guidance scale, the run's, where the published student is told a scale drawn from a range (w - 1 in
    [2, 14] for Stable Diffusion); the deterministic sampler.
    """

    paper = "Guided distillation, arXiv 2210.03142"
    passes = {"student": 1, "teacher": 2}
    max_steps = 64

    def __init__(self, parts: Parts, guide_steps: int = 0, start: int = 128, stage_steps: int = 0):
        super().__init__(parts, start, stage_steps)
        self.stage_steps = stage_steps or max(1, parts.rounds // (len(self.stages) + 1))
        self.guide_steps = guide_steps or self.stage_steps
        self.phases = (self.guide_steps,)

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        if step < self.guide_steps:
            t = times.uniform(batch.draw, self.path)
            x = self.path.mix(batch.x0, batch.noise, t)
            with torch.no_grad():
                want = self.guide(self.teacher)(x, t, batch.cond)
            est = self.student(x, t, batch.cond)
            yield Turn("student", {"guide": terms.truncated_snr(est, want.x0, want.eps)})
            return

        stage, gone = divmod(step - self.guide_steps, self.stage_steps)
        if not gone and stage < len(self.stages):
            follow(self.last, self.student)
        yield self.halve(batch, self.stages[min(stage, len(self.stages) - 1)], self.last)
