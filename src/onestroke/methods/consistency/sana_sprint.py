"""SANA-Sprint: a consistency function of the teacher's flow whose samples pass for real to the teacher's layers."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms
from onestroke.denoiser import Told, TwoTimes
from onestroke.draws import Draws
from onestroke.method import Batch, Parts, Turn, frozen
from onestroke.methods.consistency.scm import SCM
from onestroke.paths import Cond, like


class SanaSprint(SCM):
    """Chen et al., "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation".

    sCM (see `scm`) plus LADD (see `ladd`): at a second level, half of the time the first one of sampling, where the
    input is noise alone, the student's sample must pass for real to heads on the tapped layers of the frozen teacher.
    The student reads which guidance the teacher has had: a small range around the run's guidance_scale.

    mean, std: of the levels, as in `scm`; published 0.2 and 1.6 of data scaled to 0.5, a mean of 0.2 + log 2 = 0.893.
    gan: weight of the adversarial term, published 0.5. top: how often its level is the first, published 0.5. gan_mean,
    gan_std: of the noise its samples are judged at, published -0.6 (-0.6 + log 2 = 0.093) and 1. loss: of the GAN,
    published hinge. spread: half the range of guidance, published 0.5 around 4.5; there is none without guidance or
    with the velocity of the data. misaligned: whether real data under the prompt of another row is one more thing that
    the heads must tell from it, in batches of two or more; true in the released settings of 1.6B. ramp: rounds of the
    warm-up, published 4,000 batches, of which every other one trains the heads.
    sigma_data, norm, velocity, weight, difference: as in `scm`.
    Ours: the student reads the distance of that guidance from the run's, so that its pipeline draws under the run's
    (see `lcm`); the heads are those of `ladd`, of its two 1x1 layers (published: convolutions of 1, 9 and 1 places with
    spectral and virtual batch norm), judge the same samples and train in every round. A flow teacher is read on the
    path of angles without loss. Several steps are sampled at the path's own times with fresh noise, by LCM's or
    FlowMatchEuler's scheduler: the published sampler, but for its angles 1.5708 and 1.3. At those a SANA's student is
    drawn by diffusers' SanaSprintPipeline (`onestroke.students.sprint.sana_sprint`). Published: QK-norm and times in
    [0, 1] put into the teacher beforehand; CAME 2e-6 (here AdamW), warm-up 5,000, clip 0.1, no average.
    """

    players = ("student", "weight", "heads")
    needs = frozenset({"x0", "features"})
    paper = "SANA-Sprint, arXiv 2503.09641"
    passes = {"student": 3, "teacher": 5}
    defaults = {"guidance_scale": 4.5, "lr": {"*": 2e-6, "weight": 1e-3}, "warmup": 5000, "clip": 0.1}

    def __init__(
        self,
        parts: Parts,
        mean: float = 0.893,
        std: float = 1.6,
        sigma_data: float = 1.0,
        ramp: int = 2_000,
        norm: float = 0.2,
        velocity: str = "teacher",
        weight: str = "learned",
        difference: float = 0.0,
        gan: float = 0.5,
        top: float = 0.5,
        gan_mean: float = 0.093,
        gan_std: float = 1.0,
        loss: str = "hinge",
        spread: float = 0.5,
        misaligned: bool = False,
    ):
        super().__init__(parts, mean, std, sigma_data, ramp, norm, velocity, weight, difference)
        self.student, self.heads = TwoTimes(parts.student, parts.shape, parts.null), parts.heads()
        self.gan, self.top, self.gan_level, self.kind = gan, top, (gan_mean, gan_std), terms.checked_gan(loss)
        guided = velocity == "teacher" and parts.guidance_scale != 1
        self.scale, self.spread, self.misaligned = parts.guidance_scale, spread if guided else 0.0, misaligned
        self.guidance = Told(self.scale, 10.0, self.spread) if self.spread else None

    def judge(self, x: Tensor, cond: Cond, t: Tensor, draw: Draws) -> Tensor:
        """The heads' logits (B, N) of samples x (B, *D), noised to t."""
        return self.heads(self.teacher(self.path.mix(x, draw.normal(x), t), t, cond).features)

    def sample(self, batch: Batch, told: Cond) -> Tensor:
        """The student's x0 (B, *D), from its first input or from noised data."""
        draw, real = batch.draw, batch.x0
        assert real is not None
        first, noise = draw.uniform() < self.top, draw.normal(real)
        t = torch.where(first, self.few.time(0, noise), self.level(draw, self.path, self.mean, self.std))
        x = torch.where(like(first, real) > 0, self.few.input(noise), self.path.mix(real, noise, t))
        return self.student(x, t, told).x0

    def step(self, batch: Batch, step: int):
        cond, draw, real = batch.cond, batch.draw, batch.x0
        assert real is not None
        more = self.spread * ((3 * draw.uniform()).floor() - 1)
        told = {**cond, "s": 0.1 * more}
        guided = self.guide(self.teacher, self.scale + more if self.spread else None)
        loss, level = self.loss(batch, told, step, guided)
        x = self.sample(batch, told)
        t = self.level(draw, self.path, *self.gan_level)
        with frozen(self.teacher, self.heads):
            gan = self.gan * terms.gan_student(self.judge(x, cond, t, draw), self.kind)
            yield from self.turns(loss, level, gan=gan)

        t = self.level(draw, self.path, *self.gan_level)
        with frozen(self.teacher):
            true, fake = self.judge(real, cond, t, draw), self.judge(x.detach(), cond, t, draw)
            if self.misaligned and len(real) > 1:  # one row has no other's prompt
                t = self.level(draw, self.path, *self.gan_level)
                fake = torch.cat([fake, self.judge(real.roll(1, 0), cond, t, draw)])
            yield Turn("heads", {"gan": 0.5 * terms.gan_critic(true, fake, self.kind)})
