"""`onestroke sample`: pictures of prompts, one row each, from a student or a teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from onestroke.errors import InputError, read_json
from onestroke.student import CARD, SeededNoise, load_student, to_pil
from onestroke.teachers import load_teacher, locate


def is_student(model: str | Path) -> bool:
    """Whether a folder was written by `distill`: its card says how many steps the student takes."""
    card = Path(model) / CARD
    return card.is_file() and "student_steps" in read_json(card)


def sample(
    model: str | Path,
    prompts: list[str],
    *,
    steps: int | None = None,
    count: int = 1,
    seed: int = 0,
    guidance_scale: float = 3.0,
    out: str | Path | None = None,
) -> list[Image.Image]:
    """Draw `count` pictures of every prompt; write them to `out`, a PNG with one row per prompt, if given.

    Picture j of prompt i uses seed + i count + j. Raises InputError for a model that is neither, or an existing `out`.
    """
    if out is not None and Path(out).exists():
        raise InputError(f"{out} exists; choose another --out.")
    if steps is not None and steps < 1:
        raise InputError(f"--steps {steps} must be at least 1.")
    every = [p for p in prompts for _ in range(count)]
    if is_student(model):
        images = load_student(model)(every, seed, steps)
    else:
        locate(model)
        teacher, images = load_teacher(model), []
        for i in range(0, len(every), 64):
            part = every[i : i + 64]
            noise = SeededNoise(len(part), seed + i).normal(teacher.shape)
            with torch.no_grad():
                images += to_pil(teacher.draw(noise, part, steps or 25, guidance_scale))
    if out is not None:
        side = images[0].size
        page = Image.new("RGB", (count * side[0], len(prompts) * side[1]), "white")
        for k, image in enumerate(images):
            page.paste(image, (k % count * side[0], k // count * side[1]))
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        page.save(out, format="PNG")
    return images
