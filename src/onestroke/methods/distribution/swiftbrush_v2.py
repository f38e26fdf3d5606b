"""SwiftBrush v2: SwiftBrush with a clamped reward of picture and prompt, from prompts and a reward."""

from __future__ import annotations

from onestroke.method import Batch, Parts, Turn
from onestroke.methods.distribution.swiftbrush import SwiftBrush


class SwiftBrushV2(SwiftBrush):
    """Dao et al., "SwiftBrush v2: Make Your One-step Diffusion Model Better Than Its Teacher", arXiv 2408.14176.

    SwiftBrush's two turns; the student also descends w max(0, threshold - R), R being the cosine of its picture and its
    prompt by CLIP. A picture that has reached the threshold feels nothing of it, and w falls to zero along the run.

    lo, hi, null_rate, alpha_power, sigma_power, guide_fake: those of SwiftBrush. reward_weight: w of the first round,
    published 0.1. threshold: published 0.35, for CLIP ViT-B/32; other rewards have other scales.
    Ours: w falls linearly (the paper does not say how), and a resumed run must keep its number of rounds.
    Published settings (SD-Turbo, learning from SD 2.1): a LoRA student of rank 256, a LoRA fake of rank 64, Adam 1e-6
    and 1e-3, guidance 4.5. The paper then merges this student half and half with one of SwiftBrush that was trained in
    full and without the reward: `onestroke.merge`.
    """

    needs = frozenset({"reward"})
    paper = "SwiftBrush v2, arXiv 2408.14176"
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
        sigma_power: float = 2.0,
        guide_fake: bool = True,
        reward_weight: float = 0.1,
        threshold: float = 0.35,
    ):
        super().__init__(parts, lo, hi, null_rate, alpha_power, sigma_power, guide_fake)
        assert parts.reward is not None, "needs a reward"
        self.reward, self.reward_weight, self.threshold = parts.reward, reward_weight, threshold
        self.rounds = parts.rounds

    def step(self, batch: Batch, step: int):
        x = self.few.sample(self.student, batch.noise, batch.cond)
        weight = self.reward_weight * max(0.0, 1 - step / self.rounds)
        short = (self.threshold - self.reward(x, batch.cond)).relu().mean()
        yield Turn("student", {"vsd": self.vsd(x, batch), "reward": weight * short})
        yield Turn("fake", {"dsm": self.dsm(x.detach(), batch)})
