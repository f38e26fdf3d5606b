"""AGD: guidance into adapters, on the teacher's own guided way: half the calls, the weights themselves untouched."""

from __future__ import annotations

from onestroke import terms
from onestroke.denoiser import TwoTimes, told_around
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.solvers import chord


class AGD(Method):
    """Jensen and Sadat, "Efficient Distillation of Classifier-Free Guidance using Adapters".

    The guided teacher's ways from noise to picture are stored in DDIM steps; at the states on them the student
    regresses what it said there, null + w (class - null), in one call instead of two. They are the states that sampling
    under guidance visits, which noised data are not. Every way has a guidance w of its own, which the student is told.
    Only adapters are trained: before training the student is the teacher.

    spread: the guidance less 1 is the run's times a number in 1 +- this; published w from 1 to 12 is guidance_scale 6.5
    and 1. With 0 all have the run's, and nothing is told.
    Ours: LoRA (the run's lora_rank) and w by the time embedding (see `lcm`), so that the student is an ordinary network
    under the run's guidance, instead of cross-attention to embeddings of w, time and prompt; ways of 100 steps, the
    run's solver_steps, instead of 1,000; the larger of the squared x0 and eps errors, max(SNR, 1), instead of eps
    alone, which says nothing where there is no signal. The student draws in many steps: it is a cheaper teacher, for
    the few-step methods too.
    Published settings: AdamW 1e-4, a tenth of the 5,000 rounds of 64 states to warm up, then cosine; 1 to 5 % of the
    weights.
    """

    players = ("student",)
    needs = frozenset({"ways", "sides"})
    needs_if = {"spread": "sides"}
    paper = "AGD, arXiv 2503.07274"
    passes = {"student": 1}
    max_steps = 64
    target = "guided steps"
    defaults = {
        "student_steps": 25,
        "renoise": "implied",
        "guidance_scale": 6.5,
        "solver": "ddim",
        "solver_steps": 100,
        "lora_rank": {"student": 16},
        "lr": {"*": 1e-4},
        "batch_size": 64,
        "warmup": 500,
        "steps": 5000,
        "decay": "cosine",
    }

    def __init__(self, parts: Parts, spread: float = 1.0):
        super().__init__(parts)
        self.guidance = told_around(parts.guidance_scale, spread)
        self.student = TwoTimes(parts.student, parts.shape, parts.null) if self.guidance else parts.student
        self.teacher = parts.teacher
        self.path, self.count = parts.path, parts.solver_steps

    def step(self, batch: Batch, step: int):
        assert batch.ways is not None
        assert batch.side is not None
        k = (batch.draw.uniform() * self.count).long()
        x, t, said = chord(self.path, batch.ways, k, k + 1)
        told = {**batch.cond, "s": batch.side} if self.guidance else batch.cond
        est = self.student(x, t, told)
        yield Turn("student", {"guide": terms.truncated_snr(est, said.x0, said.eps)})
