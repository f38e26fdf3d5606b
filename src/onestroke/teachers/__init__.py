"""Teachers: built in, a folder, or a hub id; all become the same object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onestroke.errors import InputError, unknown
from onestroke.teachers.gaussian import GaussianMixture

if TYPE_CHECKING:
    from onestroke.teachers.pipeline import PipelineTeacher

BUILT_IN = Path(__file__).parent / "built_in"

__all__ = ["BUILT_IN", "GaussianMixture", "built_in", "fetched", "load_teacher", "locate"]


def built_in() -> dict[str, dict[str, Any]]:
    """What `onestroke teachers` prints: the shipped pipelines, from the card of each."""
    cards = sorted(BUILT_IN.glob("*/onestroke.json"))
    return {card.parent.name: {"name": card.parent.name, **json.loads(card.read_text())} for card in cards}


def locate(name_or_path: str | Path) -> str | Path:
    """A built-in name or a folder -> its folder; a hub id (org/name) as it is. Reads nothing heavy.

    Raises InputError when it is none of them, naming the nearest built-in teacher.
    """
    name = str(name_or_path)
    if name in built_in():
        return BUILT_IN / name
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise InputError(f"teacher {name!r} is a file; give a diffusers pipeline folder, a hub id or a built-in name.")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
        return name
    raise unknown("teacher (no such folder, hub id or built-in teacher)", name, built_in())


def fetched(source: str | Path) -> Path:
    """The folder of a teacher's files; those of a hub id are downloaded, once, as they are to be loaded.

    Raises InputError for a hub id that cannot be read.
    """
    if isinstance(source, Path):
        return source
    from diffusers import DiffusionPipeline

    from onestroke.teachers.pipeline import unreadable

    try:
        return Path(DiffusionPipeline.download(source, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise unreadable(source, error) from None


def load_teacher(name_or_path: str | Path, size: tuple[int, int] | None = None) -> PipelineTeacher:
    """Load a teacher: a built-in name, a diffusers pipeline folder, or a hub id.

    size: (height, width) of its pictures in pixels; None: what it draws by itself. Only safetensors are read and no
    remote code is run. Raises InputError, before any weight is loaded, for a folder that is no pipeline, a pipeline
    class that draws from more than prompts, a missing component or pickled weights; and for a prediction type that is
    singular on the schedule, or a size that the pipeline cannot draw.
    """
    from onestroke.teachers.pipeline import PipelineTeacher

    return PipelineTeacher.load(locate(name_or_path), name=str(name_or_path), size=size)
