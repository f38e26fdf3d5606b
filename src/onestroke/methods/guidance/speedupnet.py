"""SpeedUpNet: a branch that stands for guidance away from negative prompts, then makes few steps end as many do."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.denoiser import Guided, dropped, negated
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.methods.guidance.guided_distillation import regress
from onestroke.paths import like
from onestroke.teachers.branch import branched


class SpeedUpNet(Method):
    """Chai et al., "SpeedUpNet: A Plug-and-Play Adapter Network for Accelerating Text-to-Image Diffusion Models".

    The teacher stays as it is; every cross-attention gets a branch that reads a negative prompt
    (`onestroke.teachers.branch`). It is trained in two losses. Guidance: the student regresses negative + w (class -
    negative) of the teacher, in one call. Multi-step consistency: from a time t of one of the student's own steps,
    `hops` DDIM steps of the guided teacher lead down a part of that step; what the student says where it ends must be
    what it says from there, and at the step's end the state itself. So one call per step ends where the teacher's small
    ones do. The student draws away from any negative prompt, and plain diffusers draws the teacher with it unless it is
    given the branch.

    guide_steps: rounds of guidance before those of consistency; 0, ours: half the run, and then a resumed run must keep
    its number of rounds. negative: the prompt that the student draws away from where it is told no other; "" is the
    null condition. others: the part of the rows that another prompt of the run is negative in, ours half. pieces: parts
    of a student's step, ours 10; hops: teacher's steps in each, ours 2; the paper's are not known to us. branch: false
    trains what the run's lora_rank asks for instead, and so do networks without cross-attention (SD3, FLUX, Lumina 2):
    an ordinary network, which has learned to draw away from one negative prompt and reads no other.
    Ours: the losses one after the other, since at large steps no one estimate fulfils both; truncated SNR weights; the
    target uses the current weights; no second branch for the prompt. Gradient checkpointing does not go with a branch.
    Published settings (SD 1.5): 4 steps.
    """

    players = ("student",)
    needs = frozenset({"x0", "branch"})
    needs_if = {"branch": "branch"}
    paper = "SpeedUpNet, arXiv 2312.08887"
    passes = {"student": 2, "teacher": 4}
    max_steps = 8
    target = "guided"
    defaults = {
        "student_steps": 4,
        "renoise": "implied",
        "guidance_scale": 7.5,
        "lora_rank": {"student": 64},
        "lr": {"*": 1e-4},
    }

    def __init__(
        self,
        parts: Parts,
        guide_steps: int = 0,
        negative: str = "",
        others: float = 0.5,
        pieces: int = 10,
        hops: int = 2,
        branch: bool = True,
    ):
        super().__init__(parts)
        if min(pieces, hops) < 1:
            raise InputError(f"pieces={pieces} and hops={hops} must be at least 1.")
        if not 0 <= others <= 1:
            raise InputError(f"others={others} is a part of the rows: it must lie in [0, 1].")
        parts.check_implied()
        self.teacher, self.path, self.scale = parts.teacher, parts.path, parts.guidance_scale
        self.null = parts.prompts([negative]) if negative else parts.null
        made = branched(parts.teacher, self.null, self.scale) if branch else None
        self.student = parts.student if made is None else made
        self.every, self.others = None if made is None else parts.conditions, others
        self.guide_steps = guide_steps or max(1, parts.rounds // 2)
        self.phases = (self.guide_steps,)
        self.pieces, self.hops, steps = pieces, hops, len(parts.few.times)
        self.grid = times.cut(parts.path, (0.0, *reversed(parts.few.times)), steps * pieces * hops)

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        path, cond, told, draw, null = self.path, batch.cond, batch.cond, batch.draw, self.null
        if self.every is not None:
            rows = (draw.uniform() * len(self.every["text"])).long()
            other = {k: v[rows.to(v.device)].to(cond[k].device) for k, v in self.every.items()}
            null = dropped(other, null, draw.uniform() >= self.others)
            told = negated(cond, null, None)
        teacher = Guided(self.teacher, self.scale, null)
        if step < self.guide_steps:
            yield regress(self.student, teacher, path, batch, told)
            return

        grid, hops = self.grid.to(batch.noise.device), self.hops
        piece = (draw.uniform() * ((len(grid) - 1) // hops)).long()  # from the data on
        step_of, goal = piece // self.pieces * self.pieces * hops, piece * hops
        t, end, last = grid[goal + hops], grid[step_of], like(goal == step_of, batch.noise) > 0
        y = x = path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            for hop in range(hops, 0, -1):
                est = teacher(y, grid[goal + hop], cond)
                y = path.mix(est.x0, est.eps, grid[goal + hop - 1])
            own = self.student(y, grid[goal].clamp_min(path.t_min), told)
            line = path.through(x, t, torch.where(last, y, path.mix(own.x0, own.eps, end)), end)
            x0 = torch.where(like(end, x) > 0, line.x0, torch.where(last, est.x0, own.x0))  # the data end is x0 itself
            eps = path.split(x, x0, t, "x0").eps
        yield Turn("student", {"consistency": terms.truncated_snr(self.student(x, t, told), x0, eps)})
