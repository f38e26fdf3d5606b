"""`merge`: the weighted mean of students' weights is a student (SwiftBrush v2, arXiv 2408.14176, section 4.3)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestroke.errors import InputError, read_json
from onestroke.run import check_empty
from onestroke.students.guidance import save_guidance
from onestroke.students.student import CARD, Student, load_student, read_card
from onestroke.teachers.branch import BRANCH, save_branch

SAME = ("student_steps", "times", "renoise", "encoder", "size", "guidance")  # of the cards


def blended(states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The sum of weight x tensor over the states, name by name, in float64; tensors of integers are the first's."""
    found: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for state, weight in zip(states, weights, strict=True):
        for name, value in state.items():
            if name not in found:
                kinds[name] = value.dtype
                found[name] = value.detach().double() * weight if value.is_floating_point() else value
            elif value.is_floating_point():
                found[name] += value.detach().double() * weight
    return {name: value.to(kinds[name]) for name, value in found.items()}


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of `count` students, equal ones where absent. Raises InputError unless they sum to 1."""
    found = [1 / count] * count if weights is None else [float(w) for w in weights]
    if len(found) != count:
        raise InputError(f"{count} students and {len(found)} weights; give one weight per student, or none.")
    if not math.isclose(math.fsum(found), 1, abs_tol=1e-6):
        raise InputError(f"the weights {', '.join(f'{w:g}' for w in found)} must sum to 1.")
    return found


def _shape(folder: Path) -> dict[str, Any]:
    """What two students must share to be merged: the kind of pipeline, its network and its scheduler, as configured."""
    declared = read_json(folder / "model_index.json")
    network = "unet" if "unet" in declared else "transformer"
    files = {"pipeline": {"_class_name": declared.get("_class_name")}}
    files[network] = read_json(folder / network / "config.json")
    files["branch"] = {"file": (folder / BRANCH).is_file()}
    files["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    return {
        part: {k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}
        for part, config in files.items()
    }


def merge(students: Sequence[str | Path], weights: Sequence[float] | None = None, *, out: str | Path) -> Student:
    """Write the weighted mean of the networks of `students`, folders written by `distill`, to `out` as a student.

    weights: one per student, summing to 1; equal by default. The rest is the first student's. Students of one teacher
    that started from its weights can be merged; of others the mean draws nothing. Returns the loaded student.

    Raises InputError, before anything is loaded, for fewer than two students, students of different networks, steps or
    sizes, wrong weights or an `out` that is not empty; ExportError when the written pipeline draws something else.
    """
    folders, out = [Path(s) for s in students], Path(out)
    if len(folders) < 2:
        raise InputError("give at least two students to merge.")
    parts = shares(weights, len(folders))
    cards, shapes = [read_card(f) for f in folders], [_shape(f) for f in folders]
    for folder, card, shape in zip(folders[1:], cards[1:], shapes[1:], strict=True):
        differing = [k for k in SAME if card.get(k) != cards[0].get(k)] + [k for k in shape if shape[k] != shapes[0][k]]
        if differing:
            raise InputError(f"{folder} cannot be merged with {folders[0]}: their {differing[0]} differs.")
    check_empty(out)

    from onestroke.students.model_card import write_card
    from onestroke.students.parity import check_pipeline, open_plain

    student = load_student(folders[0])
    net = student.net
    later = (load_student(f).net.state_dict() for f in folders[1:])
    net.load_state_dict(blended((s for group in ([net.state_dict()], later) for s in group), parts))
    student.model.pipeline.save_pretrained(out, safe_serialization=True)
    save_branch(student.model.net, out)
    save_guidance(net, student.told, out)
    known = {k: " + ".join(dict.fromkeys(str(c.get(k)) for c in cards)) for k in ("method", "teacher")}
    card = {k: v for k, v in cards[0].items() if k not in ("rounds", "seconds")}
    card |= known | {"merged": {"students": [str(f) for f in folders], "weights": parts}}
    (out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    check_pipeline(out, open_plain(out), student.model, student.model.net, student.few, "diffusers")
    write_card(out)
    return load_student(out)
