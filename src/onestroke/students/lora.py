"""The teacher's LoRAs on a student: put on, and `check_lora`: how much of their effect is left there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onestroke.errors import InputError, read_json
from onestroke.run import read_prompts
from onestroke.teachers.pipeline import (
    PipelineTeacher,
    class_of,
    declared_in,
    hollow_network,
    network_of,
    shapes_in,
)

if TYPE_CHECKING:
    from onestroke.students.student import Student

PROMPTS = ["a red apple", "a cat on a mat", "an old house by a river", "a bunch of flowers"]


def check_lora_file(file: str | Path) -> Path:
    """Refuse what is no safetensors file of LoRA weights, from its head alone. Raises InputError."""
    file = Path(file)
    if not file.is_file():
        raise InputError(f"no such file: {file}; give a LoRA as a .safetensors file.")
    try:
        with safe_open(file, framework="pt") as found:
            keys = list(found.keys())
    except (SafetensorError, OSError):
        raise InputError(f"{file} is not a safetensors file; pickles can run code and are never read.") from None
    if not any("lora" in key for key in keys):
        raise InputError(f"{file} holds no LoRA: none of its {len(keys)} tensors is named so.")
    return file


def layers_of(cls: Any, part: str, config: Any, file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes (out, in, ...) of the layers that a LoRA changes in the network of a pipeline class, by name.

    Raises InputError for none.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    if not hasattr(cls, "lora_state_dict"):
        raise InputError(f"diffusers puts no LoRA weights on a {cls.__name__}.")
    blocks = {"unet_config": config} if part == "unet" else {}  # of which some files number the layers
    try:
        read = cls.lora_state_dict(str(file.parent), weight_name=file.name, local_files_only=True, **blocks)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{file} is LoRA in a form that diffusers does not read: {error}") from None
    state: Mapping[str, Tensor] = read[0] if isinstance(read, tuple) else read
    own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
    if own and not any("lora_A" in k for k in own):
        own = convert_unet_state_dict_to_peft(own)
    found = {}
    for key, down in own.items():
        name, sign, rest = key.partition(".lora_A")
        if sign and (up := own.get(f"{name}.lora_B{rest}")) is not None:
            found[name] = (len(up), *down.shape[1:])
    if not found:
        raise InputError(f"{file} holds no LoRA of a {part}.")
    return found


def check_fits(cls: Any, part: str, config: Any, shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Refuse a LoRA that changes other layers than a network of these shapes has. Raises InputError."""
    for name, shape in layers_of(cls, part, config, file).items():
        there = shapes.get(f"{name}.weight")
        if there is None or there[:2] != shape[:2]:
            here = f"has there {there[:2]}" if there else "has no such layer"
            changed = f"{name!r} of shape {shape[:2]}"
            raise InputError(f"{file} is LoRA of another base: it changes {changed}, and this {part} {here}.")


def check_lora_base(source: str | Path, file: str | Path) -> None:
    """Refuse a LoRA of another base than the pipeline in a folder, a Path, or of a hub id. Raises InputError.

    No pipeline is loaded for it, and of a hub id nothing but two small files is fetched.
    """
    cls, (part, _) = class_of(declared_in(source).get("_class_name"), source), network_of(source)
    if isinstance(source, Path):
        config, shapes = FrozenDict(read_json(source / part / "config.json")), shapes_in(source / part)
    else:
        network = hollow_network(source)
        config, shapes = network.config, {name: tuple(v.shape) for name, v in network.state_dict().items()}
    check_fits(cls, part, config, shapes, Path(file))


def put_lora(model: PipelineTeacher, file: str | Path, scale: float = 1.0) -> None:
    """Add a LoRA, times `scale`, to the weights of a pipeline, for good.

    Raises InputError for what is no LoRA in safetensors, or one of another base: before any weight is changed.
    """
    file = check_lora_file(file)
    network = getattr(model.pipeline, model.part)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    check_fits(type(model.pipeline), model.part, network.config, shapes, file)
    model.restore()
    pipeline = model.pipeline
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="given")
        pipeline.fuse_lora(lora_scale=scale)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{file} is LoRA of another base: {str(error).splitlines()[0]}") from None
    pipeline.unload_lora_weights()
    network.requires_grad_(False)


# ---- how much of it is left ------------------------------------------------------------------------------------------


def measures(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> dict[str, float | None]:
    """What a LoRA does to pictures (N, ...) of the teacher and of the student; see `check_lora`."""
    rows = [tuple(v.flatten(1).double() for v in pair) for pair in (teacher, student)]
    changes = [after - before for before, after in rows]
    spreads = [(before - before.mean(1, keepdim=True)).norm() for before, _ in rows]
    found: dict[str, float | None] = {
        name: (change.norm() / spread.clamp_min(1e-12)).item()
        for name, change, spread in zip(("teacher_change", "student_change"), changes, spreads, strict=True)
    }
    (one, two), (mean, other) = changes, [change.mean(0) for change in changes]
    if not mean.norm() or not other.norm():
        return {**found, "cosine": None, "mean_cosine": None, "kept": None if not mean.norm() else 0.0}
    found["cosine"] = torch.cosine_similarity(one, two).mean().item()
    found["mean_cosine"] = torch.cosine_similarity(mean, other, dim=0).item()
    found["kept"] = ((mean @ other) / (mean @ mean)).item()
    return found


def check_lora(
    student: str | Path | Student,
    lora: str | Path,
    *,
    teacher: str | None = None,
    prompts: str | Path | list[str] | None = None,
    scale: float = 1.0,
    count: int = 2,
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 3.0,
) -> dict[str, Any]:
    """How much of what a LoRA does on the teacher it does on the student. No download and no judge is needed.

    Both draw `count` pictures of every prompt, from the same noise, without the LoRA and with it; the teacher by its
    own sampler in `steps` steps under `guidance_scale`. Of the pictures, in [0, 1], and of the two networks' x0 at the
    student's own first input ("network"), where both see exactly the same:

    teacher_change, student_change: the norm of the change over that of the picture's contrast. cosine: between the two
    changes of a picture, on average. mean_cosine: between the changes averaged over all pictures: what the LoRA does
    to each, its style. kept: the part of the teacher's average change that the student's has, its projection; 1 is all
    of it, 0 none, more than 1 too much. None where the LoRA changes nothing.

    teacher: where it is, if not where it was. Raises InputError: before anything heavy is loaded for what is no student
    and no LoRA, a LoRA of another base, or a student with fewer layers; and for a teacher of another base.
    """
    from onestroke.students.exports import base_of, find_base
    from onestroke.students.student import SeededNoise, Student, check_whole, load_student, read_card

    file, asked = check_lora_file(lora), PROMPTS if prompts is None else read_prompts(prompts)
    if min(count, steps) < 1 or scale == 0:
        raise InputError(f"count={count} and steps={steps} must be at least 1, and scale={scale} not 0.")
    card = student.card if isinstance(student, Student) else read_card(Path(student))
    check_whole(card, "a LoRA")
    if not isinstance(student, Student):
        find_base(card, teacher)
        check_lora_base(Path(student), file)
        student = load_student(student)
    model, base = student.model, base_of(student, teacher)
    every = [p for p in asked for _ in range(count)]
    noise = SeededNoise(len(every), seed).normal(model.shape)

    @torch.no_grad()
    def drawn() -> dict[str, tuple[Tensor, Tensor]]:
        cond, t = model.encode(every), student.few.time(0, noise)
        first = student.few.input(noise)
        pictures = base.draw(noise, every, steps, guidance_scale), model.decode(student.latents(cond, seed))
        network = base.net(first, t, base.encode(every)).x0, model.net(first, t, cond).x0
        return {"pictures": pictures, "network": network}

    before = drawn()
    for side in (base, model):
        put_lora(side, file, scale)
    after = drawn()
    found = {k: measures((before[k][0], after[k][0]), (before[k][1], after[k][1])) for k in before}
    about = {"lora": str(file), "scale": scale, "student": str(student.folder), "teacher": base.name}
    how = {"prompts": asked, "count": count, "seed": seed, "steps": steps, "guidance_scale": guidance_scale}
    return {**about, **found, **how}
