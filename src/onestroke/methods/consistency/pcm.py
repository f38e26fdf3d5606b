"""PCM: consistency within phases of the trajectory, each of which the student crosses in one DDIM step."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.methods.consistency.lcm_lora import LCMLoRA
from onestroke.paths import Cond
from onestroke.solvers import euler, jump


class PCM(Method):
    """Wang et al., "Phased Consistency Models", arXiv 2405.18407.

    The times of the student's steps cut the trajectory in phases. Data noised to a time of the grid is moved to the
    time below by a DDIM step of the guided teacher; from both states the student jumps to the end of the phase, and its
    jump from the first must land where that from the second does, which at the end of the phase is the state itself.
    Heads on the layers of the frozen teacher tell the two landings apart, both noised on to one time of the phase; the
    student must pass for the second. It is sampled by DDIM over the phases, without any other noise.

    grid: DDIM times, a multiple of the student's steps; published 50 (100 for SD3), ours 48, which more numbers divide.
    gan_weight: of the adversarial term, published 0.1; 0 builds no heads. keep: the second jump is by an average of the
    student, which keeps this much per round, published 0, the student itself (0.9 steadies large learning rates).
    distance: published huber; l2 or l1 (see `terms.DISTANCES`). loss: of the GAN, published hinge; softplus is
    the other.
    Ours: both turns in every round (published: in turns); the student's hinge is -D (published max(0, 1 - D), which
    rests where it passes) of one head of two 1x1 layers on each tapped layer (published: four of two convolutions);
    states are scaled to the variance-preserving path before they are compared; one guidance scale per run (published 5
    to 6, drawn per row), without empty prompts.
    Published settings (SD 1.5): batch 20, Adam 5e-6 and, with betas 0 and 0.999, 1e-5, LoRA of rank 64 and alpha 8 on
    the layers of `lcm-lora`.
    """

    players: tuple[str, ...] = ("student", "heads")
    targets = ("slow",)
    needs = frozenset({"x0", "features"})
    needs_if = {"gan_weight": "features"}
    paper = "PCM, arXiv 2405.18407"
    passes = {"student": 1, "slow": 1, "teacher": 5}
    max_steps = 16
    defaults = {
        "guidance_scale": 5.5,
        "renoise": "implied",
        "lr": {"student": 5e-6, "heads": 1e-5},
        "weight_decay": 1e-3,
        "betas": {"*": [0.9, 0.999], "heads": [0.0, 0.999]},
        "lora_rank": {"student": 64},
        "lora_alpha": {"student": 8},
        "lora_targets": LCMLoRA.defaults["lora_targets"],
    }

    def __init__(
        self,
        parts: Parts,
        grid: int = 48,
        gan_weight: float = 0.1,
        keep: float = 0.0,
        distance: str = "huber",
        loss: str = "hinge",
    ):
        super().__init__(parts)
        few = parts.few
        parts.check_implied()
        self.grid = times.cut(few.path, (0.0, *reversed(few.times)), grid)
        self.edges = self.grid[:: grid // len(few.times)]
        self.student, self.slow, self.teacher = parts.student, parts.target(), parts.teacher
        self.path, self.guide, self.keep = parts.path, parts.guide, keep
        self.gan_weight, self.distance, self.loss = (
            gan_weight,
            terms.checked_distance(distance),
            terms.checked_gan(loss),
        )
        if gan_weight:
            self.heads = parts.heads()
        else:
            self.players = ("student",)

    def judge(self, x: Tensor, end: Tensor, t: Tensor, cond: Cond, noise: Tensor) -> Tensor:
        """The heads' logits (B, N) of states x (B, *D) at `end`, noised on to t."""
        return self.heads(self.teacher(self.path.diffuse(x, end, noise, t), t, cond).features)

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        path, cond, draw = self.path, batch.cond, batch.draw
        t, s = times.neighbours(draw, self.grid)
        end, start = times.segment(self.edges, t)
        xt = path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            xs = euler(self.guide(self.teacher), path, xt, t, s, cond)
            there = jump(self.slow, path, xs, s, end, cond)
        here = euler(self.student, path, xt, t, end, cond)
        near = {"consistency": terms.apart(here, there, path, end, self.distance).mean()}
        if not self.gan_weight:
            yield Turn("student", near, follow={"slow": self.keep})
            return

        u = path.snap(end.lerp(start, draw.uniform())).clamp_min(path.t_min)
        noise = draw.normal(here)
        with frozen(self.teacher, self.heads):
            gan = terms.gan_student(self.judge(here, end, u, cond, noise), self.loss)
            yield Turn("student", {**near, "gan": self.gan_weight * gan}, follow={"slow": self.keep})

        with frozen(self.teacher):
            real = self.judge(there, end, u, cond, draw.normal(here))
            fake = self.judge(here.detach(), end, u, cond, draw.normal(here))
            yield Turn("heads", {"gan": terms.gan_critic(real, fake, self.loss)})
