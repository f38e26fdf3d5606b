"""SIM: score implicit matching of a one-step generator, from prompts alone."""

from __future__ import annotations

import torch

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn, frozen


class SIM(Method):
    """Luo et al., "One-Step Diffusion Distillation through Score Implicit Matching".

    Algorithm 1 with the pseudo-Huber distance d(y) = sqrt(|y|^2 + c^2) - c between the scores of teacher and fake at
    the student's noised sample. In x0, with y = D_psi - D_p, the student descends - d'(y) . (D_psi - x), whose gradient
    flows through the inputs of teacher and fake and through d' itself; it is that of d with the sampling law frozen.
    The fake learns to denoise fresh samples under the EDM weight.

    c: in units of x0 and of sqrt(D); the paper's value was not found, 0.00054 is that of improved consistency training.
    As c grows the direction nears that of SiD at alpha = 1, over c. weight: of the student's loss in time, which the
    paper leaves open: one, 1-sigma, (1-sigma)^2, 1/sigma, 1/sigma^2, snr or sqrt-snr of the straight path. mean, std:
    of the log sigma of both turns, published -1.2 and 1.2. sigma_data: of the fake's weight, published 0.5.
    Ours: the run's guidance_scale guides the teacher; the student plays first; noise levels end where the path does;
    the first input is the run's, not sigma = 2.5.
    """

    players = ("student", "fake")
    paper = "SIM, arXiv 2410.16794"
    passes = {"student": 2, "teacher": 2, "fake": 2}
    defaults = {"lr": {"*": 1e-5}, "betas": {"*": [0.0, 0.999]}, "clip": 0.0}

    def __init__(
        self,
        parts: Parts,
        c: float = 0.00054,
        weight: str = "one",
        mean: float = -1.2,
        std: float = 1.2,
        sigma_data: float = 0.5,
    ):
        super().__init__(parts)
        self.student, self.fake, self.teacher = parts.student, parts.copy("fake"), parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.c, self.weight = c, terms.checked_weight(weight)
        self.mean, self.std, self.sigma_data = mean, std, sigma_data

    def step(self, batch: Batch, step: int):
        cond, draw = batch.cond, batch.draw
        x = self.few.sample(self.student, batch.noise, cond)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        xt = self.path.mix(x, draw.normal(x), t)
        with frozen(self.teacher, self.fake):
            real, fake = self.guide(self.teacher)(xt, t, cond).x0, self.fake(xt, t, cond).x0
            weight = terms.time_weight(self.weight, self.path, t)
            yield Turn("student", {"sim": terms.sim(x, real, fake, self.c, weight)})

        with torch.no_grad():
            x = self.few.sample(self.student, draw.normal(batch.noise), cond)
        t = times.log_normal(draw, self.path, self.mean, self.std)
        weight = terms.edm_weight(self.path, t, self.sigma_data)
        dsm = terms.dsm(self.fake, self.path, x, cond, t, draw, space="x0", weight=weight, reduce="sum")
        yield Turn("fake", {"dsm": dsm})
