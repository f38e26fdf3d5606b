"""SANA students as diffusers' SanaSprintPipeline: from disk, it draws in 1 to 4 steps what ours draws at its times."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import DiffusionPipeline, SanaSprintPipeline

import onestroke
from e2e.test_exports import usage
from e2e.test_families import PROMPTS, SEED, moved, theirs
from families import FAMILIES
from onestroke.errors import InputError
from onestroke.sampling import FewStep
from onestroke.students.sprint import sana_sprint, sprint_call, sprint_few, sprint_times
from onestroke.students.student import SeededNoise, Student
from onestroke.teachers.pipeline import PipelineTeacher

ANGLES = {
    1: [1.5708],
    2: [1.5708, 1.3],
    3: [1.5708, 1.0472, 0.5236],
    4: [1.5708, 1.1781, 0.7854, 0.3927],
}
"""Sheet 3.1 (f), the last two in equal steps."""


def student_of(teacher: PipelineTeacher, steps: int = 1) -> Student:
    """Not its teacher: all weights are moved."""
    pipeline = teacher.student_pipeline(moved(teacher), FewStep(teacher.path, teacher.path.grid(steps)))
    read = PipelineTeacher(pipeline, "student", teacher.size)
    return Student(read, {"student_steps": steps})


@pytest.mark.parametrize("steps", ANGLES)
def test_the_times_are_the_published_angles(steps):
    for t, tau in zip(sprint_times(steps).tolist(), ANGLES[steps], strict=True):
        assert t == pytest.approx(math.tan(tau) / (math.tan(tau) + 1), abs=1e-5)


@pytest.mark.parametrize("steps", ANGLES)
def test_diffusers_draws_what_the_student_draws(steps, teachers, tmp_path):
    student = student_of(teachers["sana"])
    sana_sprint(student, steps).save_pretrained(tmp_path / "sprint")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "sprint")
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is SanaSprintPipeline
    assert type(plain.scheduler).__name__ == "SCMScheduler"
    model, noise = student.model, SeededNoise(len(PROMPTS), SEED)
    with torch.no_grad():
        cond, first = model.encode(PROMPTS), noise.normal(model.shape)
        x0 = sprint_few(student, steps).sample(model.net, first, cond, noise)
        if steps > 1:
            assert (x0 - FewStep(model.path).sample(model.net, first, cond)).abs().max() > 1e-2
    size = {"height": FAMILIES["sana"].size[0], "width": FAMILIES["sana"].size[1], "use_resolution_binning": False}
    for guidance in (4.5, 1.0):
        call = {**sprint_call(steps), **size, "guidance_scale": guidance}
        latents, images = theirs(plain, call, "latent"), theirs(plain, call, "pt")
        assert (latents - x0).abs().max() <= 1e-4 * x0.abs().max().clamp(min=1)
        assert (images - model.decode(x0)).abs().max() <= 1e-4
        assert images.std() > 0.01, "a blank picture proves nothing"


def test_by_default_it_takes_the_students_steps(teachers):
    """And its times alone: the layer that reads them was made for no others."""
    student = student_of(teachers["sana"], 2)
    layers = [sana_sprint(student, *n).transformer.time_embed.timestep_embedder.linear_1 for n in ((), (2,), (1,))]
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert not torch.allclose(layers[0].weight, layers[2].weight)


def test_export_writes_it(teachers, tmp_path):
    """A whole run's folder to the pipeline, its parity with the sampler of training, and a card that draws."""
    prompts = ["a red apple", "a cat on a mat"]
    (height, width), small = FAMILIES["sana"].size, {"steps": 1, "batch_size": 2, "log_with": "none"}
    settings = {"height": height, "width": width, "student_steps": 2, "renoise": "implied", **small}
    teachers["sana"].pipeline.save_pretrained(tmp_path / "teacher")
    made = onestroke.distill(str(tmp_path / "teacher"), method="tdm", out=tmp_path / "run", prompts=prompts, **settings)
    out = onestroke.export(made, to="sprint", out=tmp_path / "out")
    parity = json.loads((out / "parity.json").read_text())
    assert (parity["passed"], parity["format"], parity["steps"]) == (True, "sprint", 2)
    assert max(parity["max_abs_difference"].values()) <= 1e-4
    text = (out / "README.md").read_text()
    assert "This folder is a SanaSprintPipeline of diffusers." in text
    space: dict = {}
    exec(usage(out), space)
    assert space["image"].size == (width, height)
    with pytest.raises(InputError, match="exported to sprint"):
        onestroke.load_student(out)


def test_others_are_refused(teachers):
    with pytest.raises(InputError, match="a StableDiffusion3Pipeline is no SanaPipeline"):
        sana_sprint(student_of(teachers["sd3"]))
    for steps in (5, -1):
        with pytest.raises(InputError, match=f"1 to 4 steps, not {steps}"):
            sana_sprint(student_of(teachers["sana"]), steps)
