"""SpeedUpNet: adapters that stand for guidance away from a negative prompt, then make few steps end as many do."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.denoiser import Guided
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


class SpeedUpNet(Method):
    """Chai et al., "SpeedUpNet: A Plug-and-Play Adapter Network for Accelerating Text-to-Image Diffusion Models".

    Adapters over the frozen teacher, in two losses. Guidance: the student regresses negative + w (class - negative) of
    the teacher, in one call. Multi-step consistency: from a time t of one of the student's own steps, `hops` DDIM steps
    of the guided teacher lead down a part of that step; what the student says where it ends must be what it says from
    there, and at the step's end the state itself. So one call per step ends where the teacher's small ones do.

    guide_steps: rounds of guidance before those of consistency; 0, ours: half the run, and then a resumed run must keep
    its number of rounds. negative: the prompt that guidance leads away from; "" is the null condition. pieces: parts of
    a student's step, ours 10; hops: teacher's steps in each, ours 2; the paper's are not known to us.
    Ours: LoRA for the branch that each cross-attention gets, with the norm of the positive one, so that the student is
    an ordinary network: it learns one negative prompt, not to read any; the losses one after the other, since at large
    steps no one estimate fulfils both; truncated SNR weights; the target uses the current weights.
    Published settings (SD 1.5): 4 steps.
    """

    players = ("student",)
    needs = frozenset({"x0"})
    paper = "SpeedUpNet, arXiv 2312.08887"
    passes = {"student": 1, "teacher": 2}
    max_steps = 8
    defaults = {
        "student_steps": 4,
        "renoise": "implied",
        "guidance_scale": 7.5,
        "lora_rank": {"student": 64},
        "lr": {"*": 1e-4},
    }

    def __init__(self, parts: Parts, guide_steps: int = 0, negative: str = "", pieces: int = 10, hops: int = 2):
        super().__init__(parts)
        if min(pieces, hops) < 1:
            raise InputError(f"pieces={pieces} and hops={hops} must be at least 1.")
        if len(parts.few.times) > 1 and parts.few.renoise != "implied":
            raise InputError("a student of DDIM steps needs renoise=implied.")
        self.student, self.teacher, self.path = parts.student, parts.teacher, parts.path
        self.scale, self.null = parts.guidance_scale, parts.prompts([negative]) if negative else parts.null
        self.guide_steps = guide_steps or max(1, parts.rounds // 2)
        self.pieces, self.hops, steps = pieces, hops, len(parts.few.times)
        self.grid = times.cut(parts.path, (0.0, *reversed(parts.few.times)), steps * pieces * hops)

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        path, cond, draw, teacher = self.path, batch.cond, batch.draw, Guided(self.teacher, self.scale, self.null)
        if step < self.guide_steps:
            t = times.uniform(draw, path)
            x = path.mix(batch.x0, batch.noise, t)
            with torch.no_grad():
                want = teacher(x, t, cond)
            est = self.student(x, t, cond)
            yield Turn("student", {"guide": terms.truncated_snr(est, want.x0, want.eps)})
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
            own = self.student(y, grid[goal].clamp_min(path.t_min), cond)
            line = path.through(x, t, torch.where(last, y, path.mix(own.x0, own.eps, end)), end)
            x0 = torch.where(like(end, x) > 0, line.x0, torch.where(last, est.x0, own.x0))  # the data end is x0 itself
            eps = path.split(x, x0, t, "x0").eps
        yield Turn("student", {"consistency": terms.truncated_snr(self.student(x, t, cond), x0, eps)})
