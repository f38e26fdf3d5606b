"""Which divergence finds the modes that its student does not start with? Writes docs/narrow_start.md.

A ring of 8 Gaussians without labels is the teacher, exact; student and fake start as a small network fitted to one of
its modes alone. Every divergence of f-distill and Uni-Instruct then has as many rounds, and a mode is recovered where
it gets at least a quarter of its share of the student's samples. Under the exact ratio the order is forward KL,
Jensen-Shannon, reverse KL (tests/truth); here the ratio is learned, clipped and divided by its mean, as the methods do.

python -m benchmarks.narrow_start [--rounds 600] [--seeds 3] [--methods f-distill uni-instruct] [--divergences fkl ...]
"""

from __future__ import annotations

import argparse
import copy
import datetime
from pathlib import Path
from typing import Any

import torch

from onestroke import terms
from onestroke.method import Parts
from onestroke.methods import get_method, options
from onestroke.metrics import machine
from onestroke.paths import EDM
from onestroke.run import recipe_layers
from onestroke.sampling import FewStep
from onestroke.settings import resolve
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.training.train import Data, Trainer
from onestroke.truth import DEFAULTS, SAMPLES, fit, ring, sliced_w2

PAGE = Path("docs/narrow_start.md")
MODES = 8
RUN: dict[str, dict[str, Any]] = {
    "f-distill": {"hi": 0.25, "gan_weight": 1e-3, "critic_weight": 1.0},
    "uni-instruct": {"hi": 0.25, "gan_weight": 0.0, "critic_weight": 0.1, "lr": {"*": 3e-4}},
}
"""Little noise: under much of it, the ring is one mode to every divergence. Little or no GAN: it has one of its own."""


def recovered(method: str, divergence: str, rounds: int, seed: int) -> tuple[list[int], float]:
    """(modes that are recovered after every fourth of the rounds, sliced-W2 to the ring in the end)."""
    labelled = ring(EDM(), MODES)
    teacher = GaussianMixture(labelled.path, labelled.means, labelled.std)
    net = fit(GaussianMixture(labelled.path, labelled.means[:1], labelled.std[:1]), "x0", 600, seed, 200)
    cls = get_method(method)
    chosen = {"seed": seed, "steps": rounds, "batch_size": 256, "divergence": divergence, **RUN[method]}
    run, own = resolve(chosen, options(cls), cls.players, DEFAULTS, *recipe_layers("exact", method))
    few = FewStep(teacher.path, teacher.path.grid(1))
    null, shape = teacher.null, teacher.shape
    parts = Parts(teacher, copy.deepcopy(net), lambda role: copy.deepcopy(net), few, null, 1.0, shape, rounds=rounds)
    generator = torch.Generator().manual_seed(seed)
    label = torch.full((SAMPLES,), -1)
    trainer = Trainer(cls(parts, **own), Data(shape, {"label": label}, teacher.sample(label, generator)), run)
    truth, noise = teacher.sample(label, generator), torch.randn(SAMPLES, 2, generator=generator)
    modes, x = [], noise
    while trainer.round < rounds:
        trainer.one_round(trainer.round / rounds)
        if trainer.round % (rounds // 4) == 0:
            with torch.no_grad():
                x = few.sample(trainer.bare("student"), noise, {"label": label})
            share = torch.bincount(teacher.nearest(x), minlength=MODES) / SAMPLES
            modes.append(int((share >= 0.25 / MODES).sum()))
    return modes, sliced_w2(x, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=RUN, default=list(RUN))
    parser.add_argument("--divergences", nargs="+", choices=terms.DIVERGENCES, default=["fkl", "jeffreys", "js", "rkl"])
    asked = parser.parse_args()
    rows = [
        "| method | divergence | modes of 8 after each fourth; by seed | sliced-W2; by seed |",
        "|---|---|---|---|",
    ]
    for method in asked.methods:
        for divergence in asked.divergences:
            found = [recovered(method, divergence, asked.rounds, seed) for seed in range(asked.seeds)]
            modes = "; ".join(", ".join(str(n) for n in row) for row, _ in found)
            distances = "; ".join(f"{d:.3f}" for _, d in found)
            rows.append(f"| {method} | {divergence} | {modes} | {distances} |")
            print(rows[-1], flush=True)
    about = (__doc__ or "").split("\n\n")[1]
    made = f"{asked.rounds} rounds of 256; {datetime.date.today()}, {machine()}."
    PAGE.write_text(f"# From a narrow start\n\n{about}\n\n{made}\n\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
