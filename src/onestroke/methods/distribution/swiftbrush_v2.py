"""SwiftBrush v2: SwiftBrush with a clamped reward of picture and prompt, from prompts and a reward."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.denoiser import dropped
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


class SwiftBrushV2(Method):
    """Dao et al., "SwiftBrush v2: Make Your One-step Diffusion Model Better Than Its Teacher", arXiv 2408.14176.

    SwiftBrush's two turns; the student also descends w max(0, threshold - R), R being the cosine of its picture and its
    prompt by CLIP. A picture that has reached the threshold feels nothing of it, and w falls to zero along the run.

    lo, hi: unit times of the student's turn, published 20 to 980 of 1000. null_rate: rounds in which the fake sees the
    null prompt, published 0.1. alpha_power: of alpha in the weight of the fake's eps error, published 2 (0: see
    SwiftBrush). reward_weight: w of the first round, published 0.1. threshold: published 0.35, for CLIP ViT-B/32; other
    rewards have other scales.
    Ours: w falls linearly (the paper does not say how).
    Published settings (SD-Turbo, learning from SD 2.1): a LoRA student of rank 256, a LoRA fake of rank 64, Adam 1e-6
    and 1e-3, guidance 4.5. The paper then merges this student half and half with one of SwiftBrush that was trained in
    full and without the reward: `onestroke.merge`.
    """

    players = ("student", "fake")
    needs = frozenset({"reward"})
    paper = "SwiftBrush v2, arXiv 2408.14176"
    passes = {"student": 1, "teacher": 2, "fake": 3}
    defaults = {
        "guidance_scale": 4.5,
        "lr": {"student": 1e-6, "fake": 1e-3},
        "lora_rank": {"student": 256, "fake": 64},
        "lora_alpha": {"student": 512, "fake": 128},
        "clip": 1.0,
    }

    def __init__(
        self,
        parts: Parts,
        lo: float = 0.02,
        hi: float = 0.98,
        null_rate: float = 0.1,
        alpha_power: float = 2.0,
        reward_weight: float = 0.1,
        threshold: float = 0.35,
    ):
        super().__init__(parts)
        assert parts.reward is not None, "needs a reward"
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide, self.null = parts.few, parts.path, parts.guide, parts.null
        self.lo, self.hi, self.null_rate, self.alpha_power = lo, hi, null_rate, alpha_power
        self.reward, self.reward_weight, self.threshold = parts.reward, reward_weight, threshold
        self.rounds = parts.rounds

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.uniform(draw, self.path, self.lo, self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        with torch.no_grad():
            real, fake = self.guide(self.teacher)(xt, t, cond), self.guide(self.fake)(xt, t, cond)
        sigma = like(self.path.unit_ab(t)[1], x)
        vsd = terms.descend(x, sigma**2 * (real.eps - fake.eps))
        weight = self.reward_weight * max(0.0, 1 - step / self.rounds)
        short = (self.threshold - self.reward(x, cond)).relu().mean()
        yield Turn("student", {"vsd": vsd, "reward": weight * short})

        if draw.shared() < self.null_rate:
            cond = dropped(cond, self.null, torch.ones_like(t, dtype=torch.bool))
        t = times.uniform(draw, self.path)
        alpha = self.path.unit_ab(t)[0]
        yield Turn(
            "fake", {"dsm": terms.dsm(self.fake, self.path, x.detach(), cond, t, draw, weight=alpha**self.alpha_power)}
        )
