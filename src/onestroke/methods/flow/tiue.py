"""TiUE: a few-step student that runs its encoder once and its decoder for all steps in parallel."""

from __future__ import annotations

from dataclasses import replace

import torch

from onestroke import terms, times
from onestroke.denoiser import Halves, dropped, no_halves
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.paths import like


class TiUE(Method):
    """Li et al., "One-Way Ticket: Time-Independent Unified Encoder for Distilling Text-to-Image Diffusion Models".

    The student's encoder sees the noise at the first time alone; its decoder reads what that found at every time, all
    at once, and the noises so predicted are taken off one after the other by DDIM steps. The picture at their end is
    trained by SwiftBrush's two turns. Each predicted noise is held near a standard normal one, whose numbers have mean
    0 and variance 1, by the Kullback-Leibler divergence. With one step it is SwiftBrush with that term.

    lo, hi: unit times of the student's turn, published 20 to 980 of 1000. null_rate: rounds in which the fake sees the
    null prompt, published 0.1. alpha_power: of alpha in the weight of the fake's eps error, published 2 (0: see
    SwiftBrush). kl_weight: of the divergences, summed over the steps; published 0.1 of their sum over the 8 pictures of
    a process, which is 0.8 of their mean. It takes a sample for many equal numbers, and biases one of few.
    Ours: the times are those of the run, and the last step ends at the data; without the clamped CLIP reward that the
    authors add (see SwiftBrush v2). On paths and predictions other than theirs, the decoder's outputs are what waits,
    and each is read as noise where its turn comes.
    Published settings (SD 2.1-base): four steps, guidance 4.5, Adam 1e-6 for the student and 1e-3 for the LoRA of rank
    64, clip 1.
    """

    players = ("student", "fake")
    needs = frozenset({"halves"})
    paper = "TiUE, arXiv 2505.21960"
    passes = {"student": 1, "teacher": 2, "fake": 3}
    max_steps = 8
    defaults = {
        "student_steps": 4,
        "renoise": "implied",
        "guidance_scale": 4.5,
        "lr": {"student": 1e-6, "fake": 1e-3},
        "lora_rank": {"fake": 64},
        "lora_alpha": {"fake": 108},
        "lora_targets": ["to_q", "to_v"],
        "clip": 1.0,
    }

    def __init__(
        self,
        parts: Parts,
        lo: float = 0.02,
        hi: float = 0.98,
        null_rate: float = 0.1,
        alpha_power: float = 2.0,
        kl_weight: float = 0.8,
    ):
        super().__init__(parts)
        if not isinstance(parts.student, Halves):
            raise no_halves(type(parts.student).__name__)
        if len(parts.few.times) > 1 and parts.few.renoise != "implied":
            raise InputError(f"tiue's steps are those of DDIM, not renoise={parts.few.renoise!r}; set renoise=implied.")
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path = replace(parts.few, encoder="once"), parts.path
        self.guide, self.null, self.kl_weight = parts.guide, parts.null, kl_weight
        self.lo, self.hi, self.null_rate, self.alpha_power = lo, hi, null_rate, alpha_power

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        est = self.few.estimates(self.student, batch.noise, cond)
        x = est.x0[:, -1]
        t = times.uniform(draw, self.path, self.lo, self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        with torch.no_grad():
            real, fake = self.guide(self.teacher)(xt, t, cond), self.guide(self.fake)(xt, t, cond)
        sigma = like(self.path.unit_ab(t)[1], x)
        vsd = terms.descend(x, sigma**2 * (real.eps - fake.eps))
        kl = torch.stack([terms.from_normal(eps).mean() for eps in est.eps.unbind(1)]).sum()
        yield Turn("student", {"vsd": vsd, "kl": self.kl_weight * kl})

        if draw.shared() < self.null_rate:
            cond = dropped(cond, self.null, torch.ones_like(t, dtype=torch.bool))
        t = times.uniform(draw, self.path)
        alpha = self.path.unit_ab(t)[0]
        yield Turn(
            "fake", {"dsm": terms.dsm(self.fake, self.path, x.detach(), cond, t, draw, weight=alpha**self.alpha_power)}
        )
