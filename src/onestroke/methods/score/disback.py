"""DisBack: any score distillation, led back to the teacher along the path on which its fake left it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from onestroke.denoiser import clone_live, numbers
from onestroke.errors import InputError
from onestroke.method import Batch, Method, Parts, Turn, advance
from onestroke.methods import get_method


class DisBack(Method):
    """Zhang et al., "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation".

    Degradation recording: the fake, which starts as the teacher, learns the samples of the initial student, which does
    not move; it is recorded on the way. Distribution backtracking: the student is distilled by `base` with the last
    record as its teacher, then the one before it, and so on; in the end from the teacher itself. The fake goes on
    learning throughout.

    prelude: rounds of recording, published 1000. record: rounds between two records, published 100. interval: rounds
    for each record on the way back, published 1000. base: the method that plays, one of a student and a fake that needs
    prompts alone (published: DMD2 with a GAN loss on SDXL). base_options: of that method.
    Ours: the fake starts on the way back where the recording left it; a record holds what is trained of the fake, in
    memory, so that LoRA makes it small.
    Published settings (SDXL): guidance 8, 5e-7 for both.
    """

    players = ("student", "fake")
    paper = "DisBack, arXiv 2408.15991"
    passes = {"student": 1, "teacher": 2, "fake": 3}
    defaults = {"guidance_scale": 8.0, "lr": {"*": 5e-7}}

    trail: Tensor  # (records, trained numbers of the fake)

    def __init__(
        self,
        parts: Parts,
        prelude: int = 1000,
        record: int = 100,
        interval: int = 1000,
        base: str = "swiftbrush",
        base_options: Mapping[str, Any] | None = None,
    ):
        super().__init__(parts)
        cls = get_method(base)
        if cls.players != self.players or cls.needs or cls is DisBack:
            raise InputError(f"disback cannot lead {base!r}: only methods of a student and a fake, from prompts.")
        self.base = (cls(parts, **(base_options or {})),)  # in a tuple: its networks are ours, and listed once
        self.student, self.fake = (self.base[0].get_submodule(player) for player in self.players)
        self.teacher = parts.teacher
        self.prelude, self.record, self.interval = prelude, record, interval
        self.real = clone_live(self.fake)
        self.live = [p for p in self.real.parameters() if p.requires_grad]
        self.real.requires_grad_(False)
        self.register_buffer("trail", numbers(self.fake).repeat(prelude // record, 1))
        self.phases = (prelude, prelude + interval * len(self.trail), *self.base[0].phases)

    def teacher_at(self, step: int) -> nn.Module:
        """The teacher of this round: a record, from the last to the first, and then the true one."""
        left = len(self.trail) - 1 - max(step - self.prelude, 0) // self.interval
        if left < 0:
            return self.teacher
        vector_to_parameters(self.trail[left], self.live)
        return self.real

    def step(self, batch: Batch, step: int):
        (base,) = self.base
        base.student, base.fake, base.teacher = self.student, self.fake, self.teacher_at(step)
        recording, game, answer = step < self.prelude, base.step(batch, step), None
        while (found := advance(game, answer)) is not None:
            skipped = recording and isinstance(found, Turn) and found.player == "student"
            answer = None if skipped else (yield found)
        if recording and (step + 1) % self.record == 0:
            with torch.no_grad():
                self.trail[step // self.record].copy_(numbers(self.fake))
