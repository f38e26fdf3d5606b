"""AGD: guidance into adapters, on the teacher's own guided way: half the calls, the weights themselves untouched."""

from __future__ import annotations

import torch

from onestroke import terms
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn


class AGD(Method):
    """Jensen and Sadat, "Efficient Distillation of Classifier-Free Guidance using Adapters".

    The guided teacher goes from noise to picture in DDIM steps; at every state on its way the student regresses what it
    said there, null + w (class - null), in one call instead of two. The states are those that sampling under guidance
    visits, which noised data are not. Only adapters are trained: before training the student is the teacher.

    points: states on a way, ours 16 (published: 1,000, of ways stored beforehand). The first is the noise; the others
    are equally spaced in time but for a shift that each way draws.
    Ours: LoRA (the run's lora_rank) instead of cross-attention to embeddings of w, time and prompt, so that the student
    is an ordinary network; one guidance scale, the run's, instead of w in [1, 12]; the larger of the squared x0 and eps
    errors, max(SNR, 1), instead of eps alone, which says nothing where there is no signal. The student draws in many
    steps: it is a cheaper teacher, for the few-step methods too.
    Published settings: AdamW 1e-4, a tenth of the 5,000 rounds of 64 states to warm up, then cosine; 1 to 5 % of the
    weights.
    """

    players = ("student",)
    paper = "AGD, arXiv 2503.07274"
    passes = {"student": 16, "teacher": 32}
    max_steps = 64
    target = "guided"
    defaults = {
        "student_steps": 25,
        "renoise": "implied",
        "guidance_scale": 7.5,
        "lora_rank": {"student": 16},
        "lr": {"*": 1e-4},
        "batch_size": 4,
        "warmup": 500,
        "steps": 5000,
        "decay": "cosine",
    }

    def __init__(self, parts: Parts, points: int = 16):
        super().__init__(parts)
        if points < 2:
            raise InputError(f"points={points} must be at least 2: a way has a beginning and an end.")
        self.student, self.teacher = parts.student, parts.teacher
        self.few, self.path, self.guide, self.points = parts.few, parts.path, parts.guide, points

    def step(self, batch: Batch, step: int):
        x, cond, path, teacher = self.few.input(batch.noise), batch.cond, self.path, self.guide(self.teacher)
        t, shift, seen = self.few.time(0, x), batch.draw.uniform(), []
        with torch.no_grad():
            for k in range(self.points):
                est = teacher(x, t, cond)
                seen.append((x, t, est.x0, est.eps))
                t = path.snap(self.few.times[0] * (1 - (k + 1 - shift) / (self.points - 1))).clamp_min(path.t_min)
                x = path.mix(est.x0, est.eps, t)
        x, t, x0, eps = (torch.cat(column) for column in zip(*seen, strict=True))
        est = self.student(x, t, {k: torch.cat([v] * self.points) for k, v in cond.items()})
        yield Turn("student", {"guide": terms.truncated_snr(est, x0, eps)})
