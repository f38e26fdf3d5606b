"""What a student has learned of other guidance scales than its run's, beside its pipeline.

Methods that tell the student its guidance (LCM, SANA-Sprint, guided distillation, AGD) train a few weights more, which
shift the time embedding and are silent at the run's own guidance_scale: there the pipeline is the student, as
everywhere. No diffusers pipeline has a place for them in every family; `Student(..., guidance_scale=)` reads them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from onestroke.denoiser import Told, TwoTimes
from onestroke.errors import InputError
from onestroke.teachers.pipeline import PipelineTeacher

GUIDANCE = "guidance.safetensors"  # beside a student's pipeline


def save_guidance(net: nn.Module, told: Told | None, folder: Path) -> None:
    """Write as `folder`/guidance.safetensors what a student `net` was told and how it reads that; of others nothing."""
    if told is not None and isinstance(net, TwoTimes):
        about = {k: torch.tensor(v, dtype=torch.float64) for k, v in told._asdict().items()}
        save_file({"shift": net.shift.weight.detach().cpu().float().contiguous(), **about}, folder / GUIDANCE)


def side_of(told: Told | None, guidance_scale: float) -> float:
    """What tells a student this guidance. Raises InputError where it knows none but its run's, or not this."""
    if told is None:
        raise InputError("this student has one guidance scale, in its weights; leave guidance_scale out.")
    return told.side(guidance_scale)


def read_guidance(file: Path, model: PipelineTeacher) -> tuple[TwoTimes, Told]:
    """The student's network as it reads its guidance, and what it was told. Raises InputError for another's file."""
    try:
        found = load_file(file)
        told = Told(*(found[k].item() for k in Told._fields))
        net = TwoTimes(model.net, model.shape, model.null)
        with torch.no_grad():
            net.shift.weight.copy_(found["shift"])
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise InputError(f"{file} is not what this student has learned of guidance ({error}).") from None
    net.shift.requires_grad_(False)
    return net, told
