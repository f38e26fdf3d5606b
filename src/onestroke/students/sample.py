"""`onestroke sample`: pictures of prompts, one row each, from a student or a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from onestroke.denoiser import Guided
from onestroke.errors import InputError, read_json, unknown
from onestroke.guidance import AdaptiveGuided, check_asks_twice
from onestroke.solvers import SOLVERS, solve
from onestroke.students.control import check_control, read_picture
from onestroke.students.guidance import side_of, told_in
from onestroke.students.lora import check_lora_base, check_lora_file, put_lora
from onestroke.students.student import CARD, SeededNoise, check_whole, load_student, read_card, to_pil
from onestroke.teachers import load_teacher, locate
from onestroke.teachers.pipeline import PipelineTeacher, inspect_folder


def is_student(model: str | Path) -> bool:
    """Whether a folder was written by `distill`: its card says how many steps the student takes."""
    card = Path(model) / CARD
    return card.is_file() and "student_steps" in read_json(card)


@torch.no_grad()
def solved(
    teacher: PipelineTeacher, noise: Tensor, prompts: list[str], steps: int, scale: float, solver: str, adaptive: bool
) -> Tensor:
    """As the teacher's `draw`, by `onestroke.solvers.solve` instead of its pipeline."""
    cond = teacher.encode(prompts)
    given = (teacher.net, scale, teacher.null)  # as wide as what was encoded
    net = AdaptiveGuided(*given, space="x0") if adaptive else Guided(*given)
    return teacher.decode(solve(net, teacher.path, noise, cond, steps, solver))


def sample(
    model: str | Path,
    prompts: list[str],
    *,
    steps: int | None = None,
    count: int = 1,
    seed: int = 0,
    guidance_scale: float | None = None,
    solver: str | None = None,
    adaptive: bool = False,
    negative: str = "",
    nasa_scale: float | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    controlnet: str | Path | None = None,
    control_image: str | Path | None = None,
    control_scale: float = 1.0,
    out: str | Path | None = None,
) -> list[Image.Image]:
    """Draw `count` pictures of every prompt; write them to `out`, a PNG with one row per prompt, if given.

    Picture j of prompt i uses seed + i count + j. negative, nasa_scale: what a student is to stay away from, and how
    much (see `onestroke.teachers.nasa`). guidance_scale: of a teacher, by default 3; of a student that was told it in
    training, by default its run's. solver, adaptive: of a teacher, instead of its pipeline's own sampler one of
    `onestroke.solvers.SOLVERS` (by default dpm++2m), and guidance that ends where both conditions say the same. lora,
    lora_scale: a LoRA of the teacher, on it or on its student. controlnet, control_image, control_scale: a ControlNet
    of the teacher with a student, and the picture it reads. Raises InputError for a model that is neither, or an
    existing `out`.
    """
    if out is not None and Path(out).exists():
        raise InputError(f"{out} exists; choose another --out.")
    if steps is not None and steps < 1:
        raise InputError(f"--steps {steps} must be at least 1.")
    if lora is not None:
        check_lora_file(lora)
    if (controlnet is None) != (control_image is None):
        raise InputError("--controlnet and --control-image go together.")
    if negative and controlnet:
        raise InputError("--negative and --controlnet do not go together yet; leave one out.")
    if guidance_scale is not None and controlnet:
        raise InputError("--guidance-scale and --controlnet do not go together yet; leave one out.")
    if solver is not None and solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    every = [p for p in prompts for _ in range(count)]
    if is_student(model):
        if solver is not None or adaptive:
            raise InputError(f"--solver and --adaptive go with a teacher; {model} is a student.")
        if controlnet is not None and control_image is not None:
            check_whole(read_card(Path(model)), "a ControlNet")
            check_control(controlnet, Path(model))
            picture = read_picture(control_image)
        if guidance_scale is not None:
            side_of(told_in(read_json(Path(model) / CARD)), guidance_scale)
        student = load_student(model, lora=lora, lora_scale=lora_scale)
        if controlnet is not None:
            images = student.with_controlnet(controlnet)(every, picture, seed, steps, scale=control_scale)
        else:
            more: dict[str, Any] = {"nasa_scale": nasa_scale, "guidance_scale": guidance_scale}
            images = student(every, seed, steps, negative_prompt=negative, **more)
    else:
        source = locate(model)
        for name, value in (("--negative", negative), ("--controlnet", controlnet)):
            if value:
                raise InputError(f"{name} goes with a student; {model} is a teacher.")
        if isinstance(source, Path):
            inspect_folder(source)
        if adaptive:
            check_asks_twice(source)
        if lora is not None:
            check_lora_base(source, lora)
        teacher, images, scale = load_teacher(model), [], 3.0 if guidance_scale is None else guidance_scale
        if lora is not None:
            put_lora(teacher, lora, lora_scale)
        for i in range(0, len(every), 64):
            part = every[i : i + 64]
            noise = SeededNoise(len(part), seed + i).normal(teacher.shape)
            asked = (noise, part, steps or 25, scale)
            own = solver is None and not adaptive
            drawn = teacher.draw(*asked) if own else solved(teacher, *asked, solver or "dpm++2m", adaptive)
            images += to_pil(drawn)
    if out is not None:
        side = images[0].size
        page = Image.new("RGB", (count * side[0], len(prompts) * side[1]), "white")
        for k, image in enumerate(images):
            page.paste(image, (k % count * side[0], k // count * side[1]))
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        page.save(out, format="PNG")
    return images
