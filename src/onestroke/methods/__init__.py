"""The methods: one file each, in a folder per family. A method is found by its file; nothing else names it."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from onestroke.errors import unknown
from onestroke.method import Method


def _files() -> dict[str, str]:
    """Method name (the file's) -> module; '_' in a file name reads '-'."""
    found = pkgutil.walk_packages(__path__, __name__ + ".")
    names = ((m.name.rsplit(".", 1)[1], m.name) for m in found if not m.ispkg)
    return {name.replace("_", "-"): module for name, module in names if not name.startswith("_")}


RESULTS = Path(__file__).parents[1] / "truth.json"
"""What `make truth` measured last, one row per method and exact teacher."""


def results() -> list[dict[str, Any]]:
    """The rows of RESULTS."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


METHODS: dict[str, str] = _files()


def get_method(name: str) -> type[Method]:
    """The method class of this name. Raises InputError, naming the nearest, when there is none."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    module = importlib.import_module(METHODS[name])
    (cls,) = (
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == module.__name__
    )
    return cls


def options(cls: type[Method]) -> dict[str, object]:
    """A method's options and their defaults: the keyword arguments of its constructor."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]
    return {p.name: p.default for p in parameters}


def _case(row: dict[str, Any]) -> str:
    return row["case"] if row["student_steps"] == 1 else f"{row['case']}, {row['student_steps']} steps"


def extra_memory(row: dict[str, Any]) -> str:
    """The networks that a described method holds beside teacher and student."""
    held = {"trained": row["players"][1:], "copied": row["targets"]}
    return "; ".join(f"{', '.join(names)} {how}" for how, names in held.items() if names) or "none"


def shown_needs(needs: Collection[str]) -> list[str]:
    """What a method or a run needs, of `onestroke.method.NEEDS`, in the words of the command line."""
    return [{"x0": "images"}.get(need, need) for need in sorted(needs)] or ["prompts"]


def describe(name: str) -> dict[str, Any]:
    """What `onestroke methods` prints of one method."""
    cls = get_method(name)
    return {
        "name": name,
        "family": METHODS[name].split(".")[-2],
        "summary": (inspect.getmodule(cls).__doc__ or "").strip().splitlines()[0],
        "paper": cls.paper,
        "needs": shown_needs(cls.needs),
        "max_steps": cls.max_steps,
        "players": list(cls.players),
        "targets": list(cls.targets),
        "passes": dict(cls.passes),
        "cost": sum(cls.passes.values()),
        "checked": {_case(r): round(r["sliced_w2"] / r["floor"], 2) for r in results() if r["method"] == name},
        "options": options(cls),
        "defaults": dict(cls.defaults),
    }
