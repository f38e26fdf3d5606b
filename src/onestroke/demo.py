"""`onestroke demo`: distil the built-in teacher, draw the sheet, measure and report."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from onestroke import metrics
from onestroke.errors import InputError
from onestroke.run import distill, read_prompts
from onestroke.students.model_card import write_card
from onestroke.students.student import SeededNoise, Student, load_student, to_pil
from onestroke.teachers import BUILT_IN, load_teacher
from onestroke.teachers.pipeline import PipelineTeacher

TEACHER, METHOD, TEACHER_STEPS = "emoji64", "swiftbrush", 25
SHEET_SEED, SCORE_SEED = 11, 1000


def batches(prompts: list[str], size: int = 100):
    return ((i, prompts[i : i + size]) for i in range(0, len(prompts), size))


def draw_all(draw, prompts: list[str]) -> tuple[Tensor, float]:
    """Images (N, 3, H, W) of all prompts, drawn on the CPU in mixed bfloat16, and seconds per image."""
    began = time.monotonic()
    with torch.autocast("cpu", torch.bfloat16):
        images = torch.cat([draw(part, SCORE_SEED + i) for i, part in batches(prompts)]).float()
    return images, (time.monotonic() - began) / len(prompts)


def samplers(teacher: PipelineTeacher, student: Student, guidance_scale: float) -> dict[str, Any]:
    """The three columns of the sheet: (prompts, seed) -> images (N, 3, H, W), from the same noise."""

    return {
        f"teacher, {TEACHER_STEPS} steps": from_teacher(teacher, TEACHER_STEPS, guidance_scale),
        "teacher, 1 step": from_teacher(teacher, 1, 1.0),
        "student, 1 step": from_student(student),
    }


def from_teacher(teacher: PipelineTeacher, steps: int, scale: float):
    """(prompts, seed) -> images (N, 3, H, W), in so many of the teacher's own steps under guidance."""
    return lambda prompts, seed: teacher.draw(
        SeededNoise(len(prompts), seed).normal(teacher.shape), prompts, steps, scale
    )


def from_student(student: Student, steps: int | None = None):
    """(prompts, seed) -> images (N, 3, H, W), in the student's own number of steps or another."""
    return lambda prompts, seed: student.model.decode(student.latents(student.model.encode(prompts), seed, steps))


def sheet(columns: dict[str, Tensor], prompts: list[str], scale: int = 2) -> Image.Image:
    """Blocks side by side, one per sampler, the same prompt at the same place of each, under a title."""
    across, blocks = 4, []
    for title, images in columns.items():
        tiles = [i.resize((i.width * scale, i.height * scale), Image.Resampling.LANCZOS) for i in to_pil(images)]
        side, down = tiles[0].width, -(-len(tiles) // across)
        block = Image.new("RGB", (across * side, down * side + 24), "white")
        ImageDraw.Draw(block).text((6, 5), title, fill="black", font_size=14)
        for k, tile in enumerate(tiles):
            block.paste(tile, (k % across * side, 24 + k // across * side))
        blocks.append(block)
    page = Image.new("RGB", (sum(b.width + 16 for b in blocks) - 16, blocks[0].height), "white")
    for k, block in enumerate(blocks):
        page.paste(block, (k * (block.width + 16), 0))
    return page


def measure(teacher: PipelineTeacher, student: Student, folder: Path, count: int, guidance_scale: float) -> dict:
    """KID, retrieval and seconds per image of the three samplers on `count` prompts of the teacher's own file."""
    prompts = read_prompts(folder / "prompts.txt")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(SCORE_SEED))[:count]
    chosen = [prompts[i] for i in order]
    extract = metrics.LiteFeatures()
    reference, digest = metrics.reference_features(TEACHER)
    half = reference[torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))].chunk(2)
    report: dict[str, Any] = {"prompts": count, "reference_sha256": digest, "kid_floor": metrics.kid(*half)}
    for name, draw in samplers(teacher, student, guidance_scale).items():
        images, seconds = draw_all(draw, chosen)
        report[name] = {
            "kid": metrics.kid(extract.of(images), reference),
            "retrieval": metrics.retrieval(teacher.pipeline, images, chosen),
            "seconds_per_image": seconds,
        }
    return report


def report_on(out: Path, count: int = 300, **more: Any) -> dict[str, Any]:
    """Draw the sheet of the student of emoji64 in `out` and measure it on `count` prompts; returns the report.

    Writes samples.png and report.json, with `more` in it, there, and the figures into its model card.
    """
    student, teacher, folder = load_student(out), load_teacher(TEACHER), BUILT_IN / TEACHER
    guidance_scale = json.loads((folder / "onestroke.json").read_text())["guidance_scale"]
    prompts = read_prompts(folder / "sheet.txt")
    columns = {k: draw(prompts, SHEET_SEED) for k, draw in samplers(teacher, student, guidance_scale).items()}
    sheet(columns, prompts).save(out / "samples.png")
    modules = {k: m for k, m in teacher.components.items() if isinstance(m, torch.nn.Module)}
    report = {
        "teacher": TEACHER,
        "method": student.card["method"],
        "rounds": student.card["rounds"],
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        **measure(teacher, student, folder, count, guidance_scale),
        "sheet_prompts": prompts,
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        **more,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    write_card(out)  # again, with the figures
    return report


def demo(out: str | Path = "runs/demo", count: int = 300, **settings: Any) -> dict[str, Any]:
    """Distil emoji64 with SwiftBrush into `out`; write samples.png and report.json there; return the report.

    Raises InputError when `out` is not empty.
    """
    out, began = Path(out), time.monotonic()
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; choose another --out, or remove it.")
    distill(TEACHER, method=METHOD, prompts=BUILT_IN / TEACHER / "prompts.txt", out=out, **settings)
    distilled = time.monotonic() - began
    report = report_on(out, count, seconds_distilling=distilled)
    report["seconds_total"] = time.monotonic() - began
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report
