"""onestroke: distil any diffusion or flow text-to-image model into a generator that draws in one call."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onestroke.errors import DivergedError, ExportError, InputError, OnestrokeError
    from onestroke.exports import export
    from onestroke.lora import check_lora
    from onestroke.merging import merge
    from onestroke.nasa import negative_prompt
    from onestroke.run import distill
    from onestroke.student import load_student
    from onestroke.teachers import load_teacher

__version__ = metadata.version("onestroke")

_HOMES = {
    "DivergedError": "errors",
    "ExportError": "errors",
    "InputError": "errors",
    "OnestrokeError": "errors",
    "check_lora": "lora",
    "distill": "run",
    "export": "exports",
    "load_student": "student",
    "load_teacher": "teachers",
    "merge": "merging",
    "negative_prompt": "nasa",
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
