"""TiUE: a few-step student that runs its encoder once and its decoder for all steps in parallel."""

from __future__ import annotations

from dataclasses import replace

import torch

from onestroke import terms
from onestroke.denoiser import Halves, no_halves
from onestroke.method import Batch, Parts, Turn
from onestroke.methods.distribution.swiftbrush import SwiftBrush


class TiUE(SwiftBrush):
    """Li et al., "One-Way Ticket: Time-Independent Unified Encoder for Distilling Text-to-Image Diffusion Models".

    The student's encoder sees the noise at the first time alone; its decoder reads what that found at every time, all
    at once, and the noises so predicted are taken off one after the other by DDIM steps. The picture at their end is
    trained by SwiftBrush's two turns. Each predicted noise is held near a standard normal one, whose numbers have mean
    0 and variance 1, by the Kullback-Leibler divergence. With one step it is SwiftBrush with that term.

    lo, hi, null_rate, alpha_power, sigma_power, guide_fake: those of SwiftBrush. kl_weight: of the divergences, summed
    over the steps; published 0.1 of their sum over the 8 pictures of a process, which is 0.8 of their mean. It takes a
    sample for many equal numbers, and biases one of few.
    Ours: the times are those of the run, and the last step ends at the data; without the clamped CLIP reward that the
    authors add (see SwiftBrush v2). On paths and predictions other than theirs, the decoder's outputs are what waits,
    and each is read as noise where its turn comes.
    Published settings (SD 2.1-base): four steps, guidance 4.5, Adam 1e-6 for the student and 1e-3 for the LoRA of rank
    64, clip 1.
    """

    needs = frozenset({"halves"})
    paper = "TiUE, arXiv 2505.21960"
    max_steps = 8
    defaults = {**SwiftBrush.defaults, "student_steps": 4, "renoise": "implied"}

    def __init__(
        self,
        parts: Parts,
        lo: float = 0.02,
        hi: float = 0.98,
        null_rate: float = 0.1,
        alpha_power: float = 2.0,
        sigma_power: float = 2.0,
        guide_fake: bool = True,
        kl_weight: float = 0.8,
    ):
        super().__init__(parts, lo, hi, null_rate, alpha_power, sigma_power, guide_fake)
        if not isinstance(parts.student, Halves):
            raise no_halves(type(parts.student).__name__)
        parts.check_implied()
        self.few, self.kl_weight = replace(parts.few, encoder="once"), kl_weight

    def step(self, batch: Batch, step: int):
        est = self.few.estimates(self.student, batch.noise, batch.cond)
        x = est.x0[:, -1]
        kl = torch.stack([terms.from_normal(eps).mean() for eps in est.eps.unbind(1)]).sum()
        yield Turn("student", {"vsd": self.vsd(x, batch), "kl": self.kl_weight * kl})
        yield Turn("fake", {"dsm": self.dsm(x.detach(), batch)})
