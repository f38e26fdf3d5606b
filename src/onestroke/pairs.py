"""Pairs of noise and what the teacher's solver makes of it, or its whole ways: made once, kept on disk, read by every
method."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from onestroke.denoiser import guidance_at, sides
from onestroke.errors import InputError, read_json
from onestroke.guidance import AdaptiveGuided, fit_linear
from onestroke.method import Pairs, Parts
from onestroke.paths import Cond, coarse
from onestroke.settings import Settings
from onestroke.solvers import solve, way
from onestroke.training.progress import Progress

INDEX = "pairs.json"
FILES = "files_sha256"
"""In it, of the teacher's files, where there are any: what is known before they are loaded."""
SHARD = 1024
"""Pairs per file."""
WAYS = 64
"""Ways per file."""
UNSAID = {"spread": 0.0, "guide": "full"}
"""What pairs.json leaves out where it is so, as it does `ways`."""
FITTED = 200
"""Pairs that LinearAG's weights are fitted to, as published."""


class Stack:
    """The rows of tensors (n, ...) that lie one after the other, all but the last of one length; read as they are asked
    for: tensors of files stay there."""

    def __init__(self, parts: list[Tensor]):
        self.parts = parts

    def __getitem__(self, rows: Tensor) -> Tensor:
        size = len(self.parts[0])
        return torch.stack([self.parts[i // size][i % size] for i in rows.tolist()])


def about_pairs(prompts_sha256: str, run: Settings, ways: bool = False, spread: float = 0.0) -> dict[str, Any]:
    """What pairs, or ways, depend on beside the teacher. pairs.json keeps it, and the hash of it all seeds their
    noise. spread: of the guidances of ways that have one of their own each (see `denoiser.sides`)."""
    asked = {k: getattr(run, k) for k in ("guidance_scale", "solver", "solver_steps", "seed")}
    chosen = {"ways": ways, "spread": spread, "guide": run.guide}
    more = {k: v for k, v in chosen.items() if v != UNSAID.get(k, False)}
    return {"prompts_sha256": prompts_sha256, **asked, **more}


def check_pairs(folder: Path, about: Mapping[str, Any], files: str = "") -> None:
    """Refuse a folder whose pairs were made otherwise, by another teacher, or without their ways where these are asked
    for; one without pairs will do. files: what `files_sha256` says of the teacher. Raises InputError."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; give a folder of pairs, or a new one for them.")
    if not (folder / INDEX).is_file():
        return
    found = read_json(folder / INDEX)
    if about.get("ways") and not found.get("ways"):
        raise InputError(f"{folder} holds pairs without the states between; give another --pairs.")
    for key, value in {**UNSAID, **about}.items():
        if (theirs := found.get(key, UNSAID.get(key))) != value:
            raise InputError(
                f"{folder} holds other pairs: their {key} is {theirs!r}, not {value!r}. "
                "Set it to theirs, or give another --pairs."
            )
    if files and found.get(FILES, files) != files:
        raise other_teacher(folder)


def other_teacher(folder: Path) -> InputError:
    return InputError(f"{folder} holds the pairs of another teacher; give another --pairs.")


def fingerprint(parts: Parts) -> str:
    """sha256 of the teacher: its weights, its path and its unconditional condition, which stands for the encoder.

    What is computed, and differs in its last bits from machine to machine, is read coarsely: the path to 6 decimals, of
    the condition its shapes and the first digits of its norms.
    """
    null = {k: [list(v.shape), f"{v.double().norm():.2e}"] for k, v in sorted(parts.null.items())}
    digest = hashlib.sha256(json.dumps(null).encode())
    for name, tensor in {"schedule": coarse(parts.path), **parts.teacher.state_dict()}.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def make_pairs(
    parts: Parts,
    cond: Cond,
    about: Mapping[str, Any],
    folder: Path,
    count: int = 0,
    batch_size: int = 64,
    files: str = "",
) -> tuple[Pairs, Stack | None]:
    """`count` pairs (default: one per condition) of the guided teacher; pair i is of condition i modulo their number.
    With their ways (count, K + 1, *D), in a folder that holds them, as one does that is made for them.

    files: as in `check_pairs`. What `folder` lacks is made and kept there, each process its part, so that a run that
    was cut off continues. Raises InputError for a folder of other pairs, of another teacher's, or with a broken file.
    """
    from accelerate import PartialState

    check_pairs(folder, about, files)
    made, teacher = {"teacher_sha256": fingerprint(parts), **about}, "teacher_sha256"
    if (folder / INDEX).is_file():
        found = read_json(folder / INDEX)
        if found.get(teacher) != made[teacher]:
            raise other_teacher(folder)
        made = {k: v for k, v in found.items() if k != FILES}  # its ways are kept on, whoever asks for pairs alone
    state, count, size = PartialState(), count or _length(cond), WAYS if made.get("ways") else SHARD
    shards = [range(i, min(i + size, count)) for i in range(0, count, size)]
    missing = [i for i, rows in enumerate(shards) if _rows(folder, i) < len(rows)]
    state.wait_for_everyone()  # all have looked
    if state.is_main_process and not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).write_text(json.dumps({**made, FILES: files} if files else made, indent=1) + "\n")
    state.wait_for_everyone()
    parts.teacher.to(state.device)
    key = int(hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12], 16)
    mine = missing[state.process_index :: state.num_processes]
    task = "making ways" if made.get("ways") else "making pairs"

    def given(rows: Sequence[int]) -> tuple[Tensor, Cond]:
        """The noise (B, *D) and the conditions of the pairs with these numbers."""
        noise = [torch.randn(parts.shape, generator=torch.Generator().manual_seed(key + row)) for row in rows]
        these = torch.tensor(rows) % _length(cond)
        chosen = {k: v[these.to(v.device)].to(state.device) for k, v in cond.items()}
        return torch.stack(noise).to(state.device), chosen

    @cache
    def guided() -> Callable[[Tensor], nn.Module]:
        return _guided(parts, made, *given(range(FITTED)), batch_size)

    with Progress(sum(len(shards[i]) for i in mine), 1, not mine or not state.is_main_process, task) as bar:
        for i in mine:
            solved: list[dict[str, Tensor]] = []
            for start in range(0, len(shards[i]), batch_size):
                rows = shards[i][start : start + batch_size]
                noise, chosen = given(rows)
                found = _solved(guided()(torch.tensor(rows)), parts, noise, chosen, made)
                solved.append({"noise": noise.cpu(), **found})
                bar.show(sum(len(shards[j]) for j in mine if j < i) + start + len(rows), {})
            _write(_file(folder, i), {k: torch.cat([s[k] for s in solved]) for k in solved[0]})
    state.wait_for_everyone()
    shapes = {"noise": parts.shape, "x0": parts.shape}
    if made.get("ways"):
        shapes["states"] = (made["solver_steps"] + 1, *parts.shape)
    read = [_read(_file(folder, i), len(rows), shapes) for i, rows in enumerate(shards)]
    pairs = Pairs(*(torch.cat([part[k] for part in read]) for k in Pairs._fields))
    return pairs, Stack([part["states"] for part in read]) if made.get("ways") else None


def _length(cond: Cond) -> int:
    return len(next(iter(cond.values())))


def _guided(
    parts: Parts, made: Mapping[str, Any], noise: Tensor, cond: Cond, batch_size: int
) -> Callable[[Tensor], nn.Module]:
    """The numbers (B,) of pairs -> the teacher as it is guided there. noise, cond: of the pairs to fit weights to."""
    guide, given = made.get("guide", "full"), (parts.teacher, parts.guidance_scale, parts.null)
    if guide == "full":
        return lambda rows: spread_guide(parts, rows, made.get("spread", 0.0))
    if guide == "adaptive":
        adaptive = AdaptiveGuided(*given, space="x0")
        return lambda rows: adaptive
    with torch.no_grad():
        linear = fit_linear(*given, noise, cond, made["solver_steps"], made["solver"], batch_size=batch_size)
    return lambda rows: linear


def _solved(net: nn.Module, parts: Parts, noise: Tensor, cond: Cond, made: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `net` makes of noise (B, *D), on the CPU: x0 (B, *D), and its states where they are kept."""
    if not made.get("ways"):
        return {"x0": solve(net, parts.path, noise, cond, made["solver_steps"], made["solver"]).cpu()}
    states = way(net, parts.path, noise, cond, made["solver_steps"]).cpu()
    return {"x0": states[:, -1].contiguous(), "states": states}


def spread_guide(parts: Parts, rows: Tensor, spread: float) -> nn.Module:
    """The guided teacher of the pairs number `rows` (B,), each under a guidance of its own unless spread is 0."""
    scale = guidance_at(sides(rows), parts.guidance_scale, spread) if spread else None
    return parts.guide(parts.teacher, scale)


def _file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def _rows(folder: Path, shard: int) -> int:
    """How many pairs a file holds; 0 if there is none."""
    if not _file(folder, shard).is_file():
        return 0
    try:
        with safe_open(_file(folder, shard), framework="pt") as kept:
            return kept.get_slice("noise").get_shape()[0]
    except SafetensorError as error:
        raise InputError(f"{_file(folder, shard)} is broken ({error}); delete it, and it is made again.") from None


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    partial = file.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, file)


def _read(file: Path, count: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The first `count` rows of a file's tensors, of these shapes by name."""
    try:
        with safe_open(file, framework="pt") as kept:
            found = {name: kept.get_tensor(name)[:count] for name in shapes}
    except SafetensorError as error:
        raise InputError(f"{file} is broken ({error}); delete it, and it is made again.") from None
    for name, shape in shapes.items():
        if found[name].shape != (count, *shape):
            raise InputError(f"{file} holds pairs of shape {tuple(found[name].shape[1:])}, not {shape}; delete it.")
    return found
