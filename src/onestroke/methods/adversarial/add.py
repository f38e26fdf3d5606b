"""ADD: adversarial distillation with a distillation term, both from one reading of the frozen teacher."""

from __future__ import annotations

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.paths import like


class ADD(Method):
    """Sauer et al., "Adversarial Diffusion Distillation".

    The student, called on real samples noised to one of its levels, each as likely (the first input is noise alone),
    must pass for real, and be what the guided teacher makes of it when it is noised again: hinge GAN plus
    distill x alpha |x - D_p(x_t)|^2, the target and alpha, of the variance-preserving point, without gradient.

    distill: weight of that term, published 2.5, here of the mean over elements. r1: weight of the penalty on the
    heads' gradient with respect to the features of real samples, published 1e-5. loss: of the GAN, published hinge;
    softplus is the other. nudge: deviation of the noise on the features by which that gradient is estimated, ours.
    Ours: published, the discriminator is a head on each layer of a DINOv2 that looks at decoded pixels, conditioned on
    the text and on an image; here the heads are on the layers of the teacher at the noised latents, and in the
    student's turn the call that gives the target gives them too. r1 is estimated without a second derivative.
    """

    players = ("student", "heads")
    needs = frozenset({"x0", "features"})
    paper = "ADD, arXiv 2311.17042"
    passes = {"student": 1, "teacher": 4}
    max_steps = 4

    def __init__(self, parts: Parts, distill: float = 2.5, r1: float = 1e-5, loss: str = "hinge", nudge: float = 0.01):
        super().__init__(parts)
        self.student, self.heads, self.teacher = parts.student, parts.heads(), parts.teacher
        self.few, self.path, self.guide = parts.few, parts.path, parts.guide
        self.distill, self.r1, self.loss, self.nudge = distill, r1, terms.checked_gan(loss), nudge

    def step(self, batch: Batch, step: int):
        cond, draw, real = batch.cond, batch.draw, batch.x0
        assert real is not None
        call = (draw.uniform() * len(self.few.times)).long()
        xt, t = self.few.noised(real, batch.noise, call)
        x = self.student(xt, t, cond).x0
        t = times.uniform(draw, self.path)
        with frozen(self.teacher, self.heads):
            est = self.guide(self.teacher)(self.path.mix(x, draw.normal(x), t), t, cond)
            error = like(self.path.unit_ab(t)[0], x) * (x - est.x0.detach()).square()
            gan = terms.gan_student(self.heads(est.features), self.loss)
            yield Turn("student", {"gan": gan, "distill": self.distill * terms.reduced(error, "mean")})

        t = times.uniform(draw, self.path)
        with frozen(self.teacher):
            true, fake = (
                self.teacher(self.path.mix(y, draw.normal(y), t), t, cond).features for y in (real, x.detach())
            )
            logits, nudged = self.heads(true), self.heads([f + self.nudge * draw.normal(f) for f in true])
            r1 = terms.approx_r1(logits, nudged) / self.nudge**2
            gan = terms.gan_critic(logits, self.heads(fake), self.loss)
            yield Turn("heads", {"gan": gan, "r1": self.r1 * r1})
