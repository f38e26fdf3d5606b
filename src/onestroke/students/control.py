"""A ControlNet of the teacher with a student, through diffusers' own pipeline for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import nn

from onestroke.errors import InputError, read_json
from onestroke.teachers.nasa import steered
from onestroke.teachers.pipeline import check_weights, network_of

if TYPE_CHECKING:
    from onestroke.students.student import Student

SHARED = (  # what a ControlNet has in common with the network that it was made from
    "in_channels",
    "block_out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
)


def unreadable(source: str | Path, error: Exception) -> InputError:
    return InputError(f"ControlNet {str(source)!r} could not be read: {str(error).splitlines()[0]}")


def check_control(source: str | Path, student: Path | None = None) -> None:
    """Refuse what is no ControlNet in safetensors, from the small files of a folder or hub id. Raises InputError.

    student: a student's folder; then a ControlNet of another base is refused too.
    """
    if Path(source).exists() or str(source).count("/") != 1:
        folder = Path(source)
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}; give a ControlNet's folder or hub id.")
        config = read_json(folder / "config.json")
    else:
        try:
            config = ControlNetModel.load_config(source)
        except (OSError, ValueError) as error:
            raise unreadable(source, error) from None
    name = str(config.get("_class_name"))
    if "ControlNet" not in name:
        raise InputError(f"{source} is a {name}, not a ControlNet.")
    if Path(source).is_dir():
        check_weights(Path(source))
    if student is not None:
        part, _ = network_of(student)
        check_same_base(config, read_json(student / part / "config.json"), part)


def check_same_base(config: Mapping[str, Any], network: Mapping[str, Any], part: str) -> None:
    """Refuse the config of a ControlNet that was not made from a network of this config. Raises InputError."""
    for key in SHARED:
        if key in config and key in network and _listed(config[key]) != _listed(network[key]):
            raise InputError(
                f"this is a ControlNet of another base: its {key} is {config[key]}, and the student's {part} has "
                f"{network[key]}."
            )


def read_control(source: str | Path | nn.Module) -> Any:
    """The ControlNet in a folder or of a hub id, in float32. Raises InputError."""
    if isinstance(source, nn.Module):
        return source
    check_control(source)
    try:
        name = ControlNetModel.load_config(source)["_class_name"]
        return getattr(diffusers, name).from_pretrained(source, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise unreadable(source, error) from None


def read_picture(file: str | Path) -> Image.Image:
    """A picture for a ControlNet. Raises InputError."""
    try:
        with Image.open(file) as found:
            return found.convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"control picture {str(file)!r} cannot be read ({error}).") from None


class Controlled:
    """A student under a ControlNet of its teacher. Call it with prompts and pictures; it returns PIL images.

    pipeline: diffusers' own, over the student's components. Raises InputError for a ControlNet of another base, and
    where diffusers has no such pipeline.
    """

    def __init__(self, student: Student, control: str | Path | nn.Module):
        from diffusers import AutoPipelineForText2Image

        net = read_control(control)
        check_same_base(net.config, getattr(student.model.pipeline, student.model.part).config, student.model.part)
        student.model.restore()
        try:
            self.pipeline: Any = AutoPipelineForText2Image.from_pipe(student.model.pipeline, controlnet=net)
        except (ValueError, TypeError, AttributeError) as error:
            kind = type(student.model.pipeline).__name__
            raise InputError(f"diffusers has no ControlNet pipeline for a {kind}: {error}") from None
        self.pipeline.to(student.model.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.student = student

    def __call__(
        self,
        prompts: str | list[str],
        image: Image.Image | Sequence[Image.Image],
        seed: int = 0,
        steps: int | None = None,
        batch_size: int = 64,
        scale: float = 1.0,
    ) -> list[Image.Image]:
        """Draw one picture per prompt after `image`, one for all or one for each; picture i uses seed + i.

        scale: of the ControlNet; 0 is the student alone.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        pictures = [image] * len(prompts) if isinstance(image, Image.Image) else list(image)
        if len(pictures) != len(prompts):
            raise InputError(f"{len(prompts)} prompts and {len(pictures)} control pictures; give one, or one for each.")
        model = self.student.model
        network, branch = getattr(model.pipeline, model.part), getattr(model.net, "branch", None)
        height, width = model.size
        call = model.plain_call(self.student.calls(steps))
        call |= {"height": height, "width": width, "controlnet_conditioning_scale": float(scale)}
        drawn: list[Image.Image] = []
        for i in range(0, len(prompts), batch_size):
            part = prompts[i : i + batch_size]
            shown = [p.convert("RGB").resize((width, height)) for p in pictures[i : i + batch_size]]
            generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
            with torch.no_grad(), steered(network, model.call, {}, branch):
                drawn += self.pipeline(part, image=shown, generator=generators, **call).images
        return drawn


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
