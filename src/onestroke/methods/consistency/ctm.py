"""CTM: one network that jumps from any time of the trajectory to any earlier one, and is a denoiser besides."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.denoiser import TwoTimes
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.paths import Cond
from onestroke.solvers import euler, heun, jump


class CTM(Method):
    """Kim et al., "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion",
    arXiv 2310.02279.

    The student g(x_t, t, s) reads a second time s, and G = a_s g + b_s eps, eps what g leaves of x_t, jumps to s: on
    the path of EDM s / t x_t + (1 - s / t) g. The teacher moves data noised to t by k Heun steps to u; from t and
    from u the student jumps to one s <= u, and its average sends both landings on to the data, where they are
    compared. The gradient runs through that frozen last jump. At s = t, g learns to denoise. The landing of the student
    must also pass for real: heads on the layers of the frozen teacher tell it from the data, both noised. Without s, g
    is the jump to the data, the student that is kept.

    levels: of the ramp of Karras et al., published 18 (CIFAR-10) and 40 (ImageNet). hops: the largest k, as likely as
    it is long, published all levels but one; ours 3, since every Heun step is two guided calls. keep: of the average
    per round, published 0.999. dsm: weight of the denoising term under EDM's weight, ours 1. mean, std: of its log
    sigma and of that at which the heads judge, ours -1.2 and 1.2. sigma_data: of its weight, published 0.5. distance:
    l2, l1 or huber (published: LPIPS). gan_weight: of the adversarial term, ours 0.1; 0, as in SoundCTM (arXiv
    2405.18503), builds no heads. gan_from: its first round, published a stage of its own, ours 0. loss: of the GAN,
    published hinge; softplus is the other.
    Ours: weights that are fixed, where the published make the gradients of the terms at the network's last layer
    equally long: every micro-batch would have to wait for their mean with its graph, and with adapters that layer is
    not trained; latents and heads on the teacher, where the published are pixels and a discriminator on classifiers of
    pictures. CTM's sampler, whose later calls jump to other times than the data, is left out.
    Published settings (ImageNet-64): batch 4224, Adam 8e-6 and 2e-3 for the discriminator, average 0.999, a teacher
    without guidance.
    """

    players: tuple[str, ...] = ("student", "heads")
    targets = ("slow",)
    needs = frozenset({"x0", "features"})
    needs_if = {"gan_weight": "features"}
    paper = "CTM, arXiv 2310.02279"
    passes = {"student": 3, "slow": 2, "teacher": 15}
    max_steps = 8
    defaults = {"lr": {"student": 8e-6, "heads": 2e-3}, "ema": 0.999}

    def __init__(
        self,
        parts: Parts,
        levels: int = 18,
        hops: int = 3,
        keep: float = 0.999,
        dsm: float = 1.0,
        mean: float = -1.2,
        std: float = 1.2,
        sigma_data: float = 0.5,
        distance: str = "l2",
        gan_weight: float = 0.1,
        gan_from: int = 0,
        loss: str = "hinge",
    ):
        super().__init__(parts)
        self.student, self.teacher = TwoTimes(parts.student, parts.shape, parts.null), parts.teacher
        self.slow, self.path, self.guide = parts.target(self.student), parts.path, parts.guide
        self.grid = parts.path.snap(times.ladder(parts.path, levels)).unique()
        if not 1 <= hops < len(self.grid):
            raise InputError(f"hops={hops} must be from 1 to {len(self.grid) - 1}, one less than there are levels.")
        self.hops, self.keep, self.dsm, self.mean, self.std = hops, keep, dsm, mean, std
        self.sigma_data, self.distance = sigma_data, terms.checked_distance(distance)
        self.gan_weight, self.gan_from, self.loss = gan_weight, gan_from, terms.checked_gan(loss)
        if gan_weight:
            self.heads, self.phases = parts.heads(), (gan_from,)
        else:
            self.players = ("student",)

    def at_data(self, x: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Where the average sends states x (B, *D) at s (B,); gradient flows through."""
        return jump(self.slow, self.path, x, s, torch.zeros_like(s), {**cond, "s": torch.zeros_like(s)})

    def judge(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The heads' logits (B, N) of states x (B, *D) at t."""
        return self.heads(self.teacher(x, t, cond).features)

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        path, cond, draw, grid = self.path, batch.cond, batch.draw, self.grid.to(batch.noise.device)
        k = ((1 + 4 * draw.uniform() * self.hops * (self.hops + 1)).sqrt() / 2 - 0.5).ceil().long().clamp_min(1)
        i = k + (draw.uniform() * (len(grid) - k)).long()
        s = grid[(draw.uniform() * (i - k + 1)).long()]
        t, there = grid[i], {**cond, "s": s}
        xt = path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            xu = xt
            for hop in range(self.hops):
                now, then = (grid[i - k.clamp_max(h)] for h in (hop, hop + 1))
                xu = heun(self.guide(self.teacher), path, xu, now, then, cond)
            target = self.at_data(jump(self.student, path, xu, grid[i - k], s, there), s, cond)
        ahead = self.at_data(euler(self.student, path, xt, t, s, there), s, cond)
        loss = {"ctm": terms.apart(ahead, target, path, torch.zeros_like(t), self.distance).mean()}

        t = times.log_normal(draw, path, self.mean, self.std)
        weight = terms.edm_weight(path, t, self.sigma_data)
        loss["dsm"] = self.dsm * terms.dsm(self.student, path, batch.x0, {**cond, "s": t}, t, draw, "x0", weight)
        if not self.gan_weight or step < self.gan_from:
            yield Turn("student", loss, follow={"slow": self.keep})
            return

        t, zero = times.log_normal(draw, path, self.mean, self.std), torch.zeros_like(t)
        with frozen(self.teacher, self.heads):
            logits = self.judge(path.diffuse(ahead, zero, draw.normal(ahead), t), t, cond)
            gan = self.gan_weight * terms.gan_student(logits, self.loss)
            yield Turn("student", {**loss, "gan": gan}, follow={"slow": self.keep})

        with frozen(self.teacher):
            real = self.judge(path.mix(batch.x0, draw.normal(ahead), t), t, cond)
            fake = self.judge(path.diffuse(ahead.detach(), zero, draw.normal(ahead), t), t, cond)
            yield Turn("heads", {"gan": terms.gan_critic(real, fake, self.loss)})
