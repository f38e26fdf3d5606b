"""What a student has learned of other guidance scales than its run's, beside its pipeline.

Methods that tell the student its guidance (LCM, SANA-Sprint, guided distillation, AGD) train a few weights more, which
shift the time embedding and are silent at the run's own guidance_scale: there the pipeline is the student, as
everywhere. No diffusers pipeline has a place for them in every family; `Student(..., guidance_scale=)` reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from onestroke.denoiser import Told, TwoTimes
from onestroke.errors import InputError
from onestroke.teachers.pipeline import PipelineTeacher

GUIDANCE = "guidance.safetensors"  # beside a student's pipeline


def save_guidance(net: nn.Module, told: Told | None, folder: Path) -> None:
    """Write how a student `net` that was `told` its guidance reads it as `folder`/guidance.safetensors; of others
    nothing. What it was told stands in its card."""
    if told is not None and isinstance(net, TwoTimes):
        save_file({"shift": net.shift.weight.detach().cpu().float().contiguous()}, folder / GUIDANCE)


def told_in(card: dict[str, Any]) -> Told | None:
    """Which guidance a student was told, by its card."""
    return Told(**card["guidance"]) if "guidance" in card else None


def side_of(told: Told | None, guidance_scale: float) -> float:
    """What tells a student this guidance. Raises InputError where it knows none but its run's, or not this."""
    if told is None:
        raise InputError("this student has one guidance scale, in its weights; leave guidance_scale out.")
    return told.side(guidance_scale)


def read_guidance(file: Path, model: PipelineTeacher) -> TwoTimes:
    """The student's network as it reads its guidance. Raises InputError for another's file."""
    net = TwoTimes(model.net, model.shape, model.null)
    try:
        net.shift.load_state_dict({"weight": load_file(file)["shift"]})
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise InputError(f"{file} is not what this student has learned of guidance ({error}).") from None
    net.shift.requires_grad_(False)
    return net
