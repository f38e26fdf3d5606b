"""onestroke: distil any diffusion or flow text-to-image model into a generator that draws in one call."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onestroke.errors import DivergedError, ExportError, InputError, OnestrokeError
    from onestroke.run import distill
    from onestroke.students.exports import export
    from onestroke.students.lora import check_lora
    from onestroke.students.merging import merge
    from onestroke.students.student import load_student
    from onestroke.teachers import load_teacher
    from onestroke.teachers.nasa import negative_prompt

__version__ = metadata.version("onestroke")

_HOMES = {
    "DivergedError": "errors",
    "ExportError": "errors",
    "InputError": "errors",
    "OnestrokeError": "errors",
    "check_lora": "students.lora",
    "distill": "run",
    "export": "students.exports",
    "load_student": "students.student",
    "load_teacher": "teachers",
    "merge": "students.merging",
    "negative_prompt": "teachers.nasa",
}
_MODULES = {"methods", "paths", "teachers", "truth"}

__all__ = [
    "DivergedError",
    "ExportError",
    "InputError",
    "OnestrokeError",
    "check_lora",
    "distill",
    "export",
    "load_student",
    "load_teacher",
    "merge",
    "negative_prompt",
]


def __getattr__(name: str) -> Any:
    """Public names are loaded at first use: importing onestroke does not import diffusers."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"onestroke.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"onestroke.{name}")
    raise AttributeError(f"module 'onestroke' has no attribute {name!r}")
