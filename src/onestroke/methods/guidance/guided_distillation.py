"""Distillation of guided diffusion: classifier-free guidance into one network, then progressive distillation."""

from __future__ import annotations

import torch
from torch import nn

from onestroke import terms, times
from onestroke.denoiser import TwoTimes, guidances, told_around
from onestroke.method import Batch, Parts, Turn, follow
from onestroke.methods.flow.progressive import Progressive
from onestroke.paths import Cond, Path


def regress(student: nn.Module, teacher: nn.Module, path: Path, batch: Batch, told: Cond) -> Turn:
    """The student's turn of stage one: under `told`, in one call, what the guided `teacher` says in two."""
    assert batch.x0 is not None
    t = times.uniform(batch.draw, path)
    x = path.mix(batch.x0, batch.noise, t)
    with torch.no_grad():
        want = teacher(x, t, batch.cond)
    return Turn("student", {"guide": terms.truncated_snr(student(x, t, told), want.x0, want.eps)})


class GuidedDistillation(Progressive):
    """Meng et al., "On Distillation of Guided Diffusion Models", arXiv 2210.03142.

    Stage one, `guide_steps` rounds: at a random time of noised data the student regresses the guided teacher, null + w
    (class - null), under max(SNR, 1): one call instead of two. Stage two: progressive distillation of that student (see
    `progressive`). In both the guidance w is drawn for every row, and the student is told it.

    guide_steps: 0, ours: as long as a stage. start, stage_steps: as in `progressive`, but that 0 counts the stage of
    guidance too. spread: the guidance less 1, the paper's w, is the run's times a number in 1 +- this: published 2 to
    14 (Stable Diffusion) is guidance_scale 9 and 0.75. embed: tell it to the student, by its time embedding (see
    `lcm`). Stage one alone, of one guidance and over the frozen teacher, is `lora-enhanced`.
    Ours: the distance of w from the run's is embedded, not w itself; the deterministic sampler.
    """

    paper = "Guided distillation, arXiv 2210.03142"
    passes = {"student": 1, "teacher": 2}
    max_steps = 64
    target = "guided"
    defaults = {**Progressive.defaults, "guidance_scale": 9.0}

    def __init__(
        self,
        parts: Parts,
        guide_steps: int = 0,
        start: int = 128,
        stage_steps: int = 0,
        spread: float = 0.75,
        embed: bool = True,
    ):
        super().__init__(parts, start, stage_steps)
        told = told_around(parts.guidance_scale, spread)
        if embed:
            self.student = TwoTimes(parts.student, parts.shape, parts.null)
            self.last, self.guidance = parts.target(self.student), told
        self.scale, self.spread, self.embed = parts.guidance_scale, spread, embed
        self.stage_steps = stage_steps or max(1, parts.rounds // (len(self.stages) + 1))
        self.guide_steps = guide_steps or self.stage_steps
        self.phases = (self.guide_steps, self.guide_steps + self.stage_steps * (len(self.stages) - 1))

    def step(self, batch: Batch, step: int):
        side, scale = guidances(batch.draw, self.scale, self.spread)
        told = {**batch.cond, "s": side} if self.embed else batch.cond
        if step < self.guide_steps:
            yield regress(self.student, self.guide(self.teacher, scale), self.path, batch, told)
            return

        stage, gone = divmod(step - self.guide_steps, self.stage_steps)
        if not gone and stage < len(self.stages):
            follow(self.last, self.student)
        yield self.halve(batch._replace(cond=told), self.stages[min(stage, len(self.stages) - 1)], self.last)
