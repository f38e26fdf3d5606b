"""ADM: a discriminator between one step of the teacher and one of the fake score takes the place of the divergence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.paths import Cond


class ADM(Method):
    """Lu et al., "Adversarial Distribution Matching for Diffusion Distillation Towards Efficient Image and Video
    Synthesis".

    The student's sample is noised to t. From there the guided teacher and the fake score each take one step of their
    probability-flow ODE to t - gap. Heads on the frozen teacher's layers, which read the ends of the steps, learn to
    tell the teacher's from the fake's; the student moves so that the fake's passes for the teacher's, through the
    fake and its step; the fake learns to denoise the same samples.

    gap: length of the step in unit time. The paper's value was not found; ours. lo, hi: unit times t of the steps,
    those of DMD (20 to 980 of 1000). loss: of the GAN, published hinge; softplus is the other.
    Ours: heads learn from the features of the student's turn; one turn of the fake per round (the paper finds little
    gain in more). Left out: the adversarial pretraining on pairs of the teacher's solver with a second discriminator of
    pixels, which the paper starts a one-step student from (DMDX).
    """

    players = ("student", "heads", "fake")
    needs = frozenset({"features"})
    paper = "ADM, arXiv 2507.18569"
    passes = {"student": 1, "teacher": 4, "fake": 2}

    def __init__(self, parts: Parts, gap: float = 0.1, lo: float = 0.02, hi: float = 0.98, loss: str = "hinge"):
        super().__init__(parts)
        self.student, self.heads, self.fake, self.teacher = (
            parts.student,
            parts.heads(),
            parts.copy("fake"),
            parts.teacher,
        )
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.gap, self.lo, self.hi, self.loss = gap, lo, hi, terms.checked_gan(loss)

    def ends(self, net: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """The frozen teacher's features where one step of the ODE of `net` ends."""
        s = self.path.snap((t - self.gap).clamp_min(self.path.t_min))
        est = net(xt, t, cond)
        return self.teacher(self.path.mix(est.x0, est.eps, s), s, cond).features

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.uniform(draw, self.path, self.lo, self.hi)
        xt = self.path.mix(x, draw.normal(x), t)
        with frozen(self.teacher, self.fake, self.heads):
            fake = self.ends(self.fake, xt, t, cond)
            yield Turn("student", {"gan": terms.gan_student(self.heads(fake), self.loss)})

        with torch.no_grad():
            real = self.ends(self.guide(self.teacher), xt, t, cond)
        logits = self.heads(real), self.heads([f.detach() for f in fake])
        yield Turn("heads", {"gan": terms.gan_critic(*logits, self.loss)})

        t = times.uniform(draw, self.path)
        yield Turn("fake", {"dsm": terms.dsm(self.fake, self.path, x.detach(), cond, t, draw)})
