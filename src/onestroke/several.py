"""Several students, each on its share of the prompts, and the router between them: multi-student distillation.

Song et al., "Multi-Student Diffusion Distillation for Better One-step Generators", arXiv 2410.23274. Any method will
do: every share is a run of its own, written to a folder of its own as an ordinary pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onestroke.denoiser import PREFIX, Routed
from onestroke.errors import InputError, read_json
from onestroke.paths import Cond
from onestroke.run import Recipe
from onestroke.settings import Settings
from onestroke.students.student import CARD, ROUTER, Student, load_student
from onestroke.teachers.pipeline import PipelineTeacher


def folder_of(out: Path, number: int) -> Path:
    """Where student `number` is written."""
    return out / f"student-{number}"


def summary(cond: Cond) -> Tensor:
    """(N, E): what conditions (N, ...) say, in one row each; the mean over tokens, those that pad left out."""
    rows = []
    for key in sorted(cond):
        value = cond[key]
        if value.is_floating_point() and value.ndim > 1 and not key.startswith(PREFIX):
            tokens = value.flatten(1, -2) if value.ndim > 2 else value[:, None]
            there = (tokens != 0).any(-1, keepdim=True)
            rows.append((tokens * there).sum(1) / there.sum(1).clamp_min(1))
    return torch.cat([row.float() for row in rows], 1)


class Router(nn.Module):
    """Which student (B,) a condition goes to: the owner (A,) of the nearest anchor (A, E) of its summary."""

    anchors: Tensor
    owners: Tensor

    def __init__(self, anchors: Tensor, owners: Tensor):
        super().__init__()
        self.register_buffer("anchors", anchors)
        self.register_buffer("owners", owners)

    def forward(self, cond: Cond) -> Tensor:
        rows = summary(cond).to(self.anchors).split(4096)
        return torch.cat([self.owners[torch.cdist(part, self.anchors).argmin(1)] for part in rows])


def cluster(rows: Tensor, count: int, seed: int = 0, most: int = 100) -> Tensor:
    """The centroids (count, E) of k-means on rows (N, E), started as k-means++; none of them is without rows."""
    generator = torch.Generator().manual_seed(seed)
    far, found = torch.ones(len(rows)), rows[:0]
    for _ in range(count):
        found = torch.cat([found, rows[torch.multinomial(far, 1, generator=generator)]])
        far = torch.cdist(rows, found).amin(1).square().double() + 1e-30
    for _ in range(most):
        distance = torch.cdist(rows, found)
        owner = distance.argmin(1)
        sums = torch.zeros_like(found).index_add(0, owner, rows)
        sizes = owner.bincount(minlength=count)
        moved = sums / sizes[:, None].clamp_min(1)
        for k in (sizes == 0).nonzero().flatten().tolist():  # an empty one starts anew where the rows are worst served
            moved[k] = rows[distance.amin(1).argmax()]
        if torch.equal(moved, found):
            break
        found = moved
    return found


def route(cond: Cond, owners: Sequence[int] | None, count: int, seed: int = 0) -> Router:
    """A router between `count` students over the known conditions (N, ...).

    owners: the student (N,) of each; the nearest known condition decides then, so that each of these goes to its own.
    Where absent, the conditions are clustered, and the nearest centroid decides.
    """
    rows = summary(cond)
    if owners is None:
        return Router(cluster(rows, count, seed), torch.arange(count))
    return Router(rows, torch.tensor(owners))


def distill_several(
    teacher: PipelineTeacher,
    prompts: list[str],
    owners: Sequence[int] | None,
    run: Settings,
    recipe: Recipe,
    out: Path,
    resume: bool,
    one: Callable[..., Any],
) -> Student:
    """`one`, which is `distill`, once for each student on its share of the prompts; then the router and the card."""
    from accelerate import PartialState

    known = list(dict.fromkeys(prompts))
    router = route(teacher.conditions(known), owners, run.students, run.seed)
    share = dict(zip(known, router(teacher.conditions(known)).tolist(), strict=True))
    counts = [sum(share[p] == k for p in prompts) for k in range(run.students)]
    if not all(counts):
        raise InputError(f"the prompts are too much alike for students={run.students}; give fewer.")
    if PartialState().is_main_process:
        recipe.save(out)
    for k in range(run.students):
        mine, folder = [p for p in prompts if share[p] == k], folder_of(out, k)
        one(teacher, prompts=mine, out=folder, resume=resume and (folder / "recipe.json").is_file())
    if PartialState().is_main_process:
        save_file({"anchors": router.anchors.contiguous(), "owners": router.owners}, out / ROUTER)
        card = read_json(folder_of(out, 0) / CARD) | {"students": run.students, "prompts": counts}
        (out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    PartialState().wait_for_everyone()
    return load_several(out)


def load_several(folder: Path, **speed: Any) -> Student:
    """The students of a folder as one, which asks for each prompt the student that the router names.

    speed: as in `load_student`, its lora too. Raises InputError for a part that is missing or does not fit.
    """
    card, file = read_json(folder / CARD), folder / ROUTER
    try:
        found = load_file(file)
        router, last = Router(found["anchors"], found["owners"]), int(found["owners"].max())
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise InputError(f"{file} is not the router of several students ({error}).") from None
    if last >= card["students"]:
        raise InputError(f"{file} names student {last}, and {folder / CARD} knows {card['students']}.")
    parts = [load_student(folder_of(folder, k), **speed) for k in range(card["students"])]
    model = parts[0].model
    model.net = cast(Any, Routed([part.net for part in parts], router))
    return Student(model, card, folder, model.net)
