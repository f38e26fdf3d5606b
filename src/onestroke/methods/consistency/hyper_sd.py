"""Hyper-SD: trajectory consistency within ever fewer segments, adversarial where the jump is long; then scores."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke import terms, times
from onestroke.method import Batch, Method, Parts, Turn, frozen
from onestroke.paths import Cond
from onestroke.solvers import euler, jump


class HyperSD(Method):
    """Ren et al., "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis", arXiv 2404.13686.

    Data noised to a time of the grid is moved to the time below by a DDIM step of the guided teacher. From both states
    a jump leads to one time of the segment, uniform below both, by the student from the first and by its average from
    the second. The two must land at the same place, and by the part of the segment that it crosses the jump must pass
    for real instead: heads on the layers of the frozen teacher tell it from real samples, noised on alike. The segments
    halve in number from `segments` to one. A reward of the student's x0 is its feedback. In the last stage, for the
    draw in one step, the student's x0 of noisy states matches the teacher's law besides, as in `dmd2`: it descends
    D_fake - D_teacher, and a fake score learns to denoise it.

    segments: of the first stage, published 8. grid: DDIM times, a multiple of it, ours 48. whole: the part of the rows
    that jump to the end of the segment, published 0 (see `TCD`). gan_weight: what a jump across the whole segment has
    of its weight in the adversarial term, ours 0.5; 0 builds no heads. reward_weight: published as a LoRA of its own,
    here 0 unless asked. score_weight: of the score distillation, ours 0 unless asked, since the fake is one more
    network in memory; 1 is the weight of `dmd2`. score_from: the least unit time of the states, published 800 of 1000.
    lo, hi: unit times of the matching, ours 20 to 980 of 1000. keep: of the average per round, ours 0.95. stage_steps:
    rounds of a stage; 0, ours: the run in equal parts, and then a resumed run must keep its number of rounds. loss: of
    the GAN, ours hinge; softplus is the other.
    Ours: states are scaled to the variance-preserving path before they are compared; one net for every number of steps,
    re-noised in between; beside the scores the last stage goes on as it was, where the published regresses on the
    teacher's output; the fake plays as often as the student; guidance_scale is 7.5 by default; no noise is added to the
    moved states; one step is taken from the noise end, where the published is taken from 800 of 1000.
    The last stage goes over all times, and its jumps end at any below: its one student draws in 1, 2, 4 and 8 steps.
    Published settings: LoRA, one for all numbers of steps.
    """

    players: tuple[str, ...] = ("student", "heads", "fake")
    targets = ("slow",)
    needs = frozenset({"x0", "features"})
    needs_if = {"gan_weight": "features", "reward_weight": "reward"}
    paper = "Hyper-SD, arXiv 2404.13686"
    passes = {"student": 1, "slow": 1, "teacher": 5}
    max_steps = 8
    defaults = {"guidance_scale": 7.5, "lora_rank": {"student": 64}}

    def __init__(
        self,
        parts: Parts,
        segments: int = 8,
        grid: int = 48,
        whole: float = 0.0,
        gan_weight: float = 0.5,
        reward_weight: float = 0.0,
        score_weight: float = 0.0,
        score_from: float = 0.8,
        lo: float = 0.02,
        hi: float = 0.98,
        keep: float = 0.95,
        stage_steps: int = 0,
        loss: str = "hinge",
    ):
        super().__init__(parts)
        self.stages = times.halvings(1, segments=segments)
        edges = times.cut(parts.path, (0.0, parts.few.times[0]), segments)
        self.grid = times.cut(parts.path, edges.tolist(), grid)
        self.student, self.slow, self.teacher = parts.student, parts.target(), parts.teacher
        self.path, self.guide, self.reward = parts.path, parts.guide, parts.reward
        self.whole, self.gan_weight, self.reward_weight = whole, gan_weight, reward_weight
        self.score_weight, self.noisy, self.lo, self.hi = score_weight, (score_from, parts.few.times[0]), lo, hi
        self.keep, self.loss, self.players = keep, terms.checked_gan(loss), ("student",)
        self.stage_steps = stage_steps or max(1, parts.rounds // len(self.stages))
        if gan_weight:
            self.heads, self.players = parts.heads(), (*self.players, "heads")
        if score_weight:
            self.fake, self.players = parts.copy("fake"), (*self.players, "fake")
            self.phases = (self.stage_steps * (len(self.stages) - 1),)

    def judge(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The heads' logits (B, N) of states x (B, *D) at t."""
        return self.heads(self.teacher(x, t, cond).features)

    def step(self, batch: Batch, step: int):
        assert batch.x0 is not None
        path, cond, draw = self.path, batch.cond, batch.draw
        segments = self.stages[min(step // self.stage_steps, len(self.stages) - 1)]
        t, s = times.neighbours(draw, self.grid)
        low, high = times.segment(self.grid[:: (len(self.grid) - 1) // segments], t)
        end = torch.where(draw.uniform() < self.whole, low, path.snap(low.lerp(s, draw.uniform())))
        xt = path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            xs = euler(self.guide(self.teacher), path, xt, t, s, cond)
            there = jump(self.slow, path, xs, s, end, cond)
        est = self.student(xt, t, cond)
        here, far = path.mix(est.x0, est.eps, end), self.gan_weight * (t - end) / (high - low)
        loss = {"consistency": ((1 - far).to(here) * terms.apart(here, there, path, end)).mean()}
        if self.reward_weight:
            assert self.reward is not None
            loss["reward"] = -self.reward_weight * self.reward(est.x0, cond).mean()
        if scored := bool(self.score_weight) and segments == 1:
            t1 = times.uniform(draw, path, *self.noisy)
            x = self.student(path.mix(batch.x0, draw.normal(here), t1), t1, cond).x0
            t2 = times.uniform(draw, path, self.lo, self.hi)
            slope, _ = terms.matching(self.guide(self.teacher), self.fake, path, x, cond, t2, draw)
            loss["dm"] = self.score_weight * terms.descend(x, slope)

        if self.gan_weight:
            u = path.snap(end.lerp(t, draw.uniform())).clamp_min(path.t_min)
            with frozen(self.teacher, self.heads):
                logits = self.judge(path.diffuse(here, end, draw.normal(here), u), u, cond)
                loss["gan"] = terms.gan_student(logits, self.loss, weight=far)
                yield Turn("student", loss, follow={"slow": self.keep})

            with frozen(self.teacher):
                real = self.judge(path.mix(batch.x0, draw.normal(here), u), u, cond)
                fake = self.judge(path.diffuse(here.detach(), end, draw.normal(here), u), u, cond)
                yield Turn("heads", {"gan": terms.gan_critic(real, fake, self.loss)})
        else:
            yield Turn("student", loss, follow={"slow": self.keep})

        if scored:
            t = times.uniform(draw, path)
            yield Turn("fake", {"dsm": terms.dsm(self.fake, path, x.detach(), cond, t, draw)})
