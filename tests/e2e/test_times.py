"""Times of a student's own: its pipeline is told them with the call, and draws what the sampler of training draws."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import onestroke
from conftest import PROMPTS, tiny_pipeline
from e2e.test_families import check_parity, every, moved
from onestroke.errors import InputError
from onestroke.paths import Table
from onestroke.sampling import FewStep
from onestroke.solvers import stops
from onestroke.students.exports import schedule
from onestroke.students.student import load_student, save_student
from onestroke.teachers.pipeline import PipelineTeacher

KINDS = {"v_prediction": True, "epsilon": False, "sample": True}


def knots(path) -> tuple[float, ...]:
    """Three times of a way of forty steps, not those of any scheduler."""
    return tuple(stops(path, 40)[[0, 21, 33]].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_draws_at_times_of_its_own(kind, tmp_path):
    """Predictions of every kind, with and without signal at the noise end."""
    teacher = PipelineTeacher(tiny_pipeline(kind, KINDS[kind]), kind)
    few, net = FewStep(teacher.path, knots(teacher.path), renoise="implied"), moved(teacher)
    assert not few.gridded
    assert teacher.plain_call(few)["timesteps"] == [999, 474, 174]
    save_student(teacher, net, few, tmp_path / "student", {"method": "none"})
    student, plain = load_student(tmp_path / "student"), DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert student.few.times == few.times
    check_parity(student.model, student.model.net, student.few, plain, True)
    check_parity(teacher, net, few, plain, True)
    table = torch.tensor(student.model.path.alphas_cumprod)
    assert (table - torch.tensor(teacher.path.alphas_cumprod)).abs().max() < 1e-6
    with pytest.raises(InputError, match="draws in 3 steps, at times of its own, not in 4"):
        student(PROMPTS[:1], steps=4)
    assert student(PROMPTS[:1], steps=3)[0].tobytes() == student(PROMPTS[:1])[0].tobytes()


def test_graphs_are_called_at_them_too():
    teacher = PipelineTeacher(tiny_pipeline(), "tiny")
    few = FewStep(teacher.path, knots(teacher.path), renoise="implied")
    (rows,) = schedule(few)["steps"].values()
    assert [t for t, _, _ in rows] == list(few.times)
    assert len(schedule(FewStep(teacher.path, teacher.path.grid(2)))["steps"]) == 4


@every
def test_every_family_draws_at_times_of_its_own(name, teachers):
    teacher = teachers[name]
    few, net = FewStep(teacher.path, knots(teacher.path), renoise="implied"), moved(teacher)
    check_parity(teacher, net, few, teacher.student_pipeline(net, few), True)
    call = teacher.plain_call(few)
    assert call["timesteps" if isinstance(teacher.path, Table) else "sigmas"][0] >= 1


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_knots_found_in_training_are_those_of_the_pipeline(name, steps, teachers, tmp_path):
    """Distilled by BOSS: parity has passed, and card, model card and a second reading agree with the checkpoint."""
    out, quick = tmp_path / "run", dict(steps=2, batch_size=2, log_with="none", lr=1e-2, solver_steps=20, search=1)
    student = onestroke.distill(
        str(teachers[name].source), method="boss", prompts=PROMPTS, out=out, student_steps=steps, **quick
    )
    card, parity = (json.loads((out / file).read_text()) for file in ("onestroke.json", "parity.json"))
    assert parity["passed"]
    assert len(parity["timesteps"]) == steps
    assert len(card["times"]) == steps
    assert load_student(out).few == student.few
    assert student.few.times == tuple(card["times"])
    assert student.few.renoise == "implied"
    allowed = stops(teachers[name].path, 20)
    assert all((allowed - t).abs().min() < 1e-9 for t in card["times"])
    keyword = "timesteps" if name == "sd15" else "sigmas"
    assert f"{keyword}={card['call'][keyword]!r}" in (out / "README.md").read_text()


def test_a_pipeline_that_takes_no_times_is_refused_before_it_is_loaded(pipeline_folder, monkeypatch, tmp_path):
    about = inspect.signature(StableDiffusionPipeline.__call__)
    fewer = about.replace(parameters=[p for k, p in about.parameters.items() if k != "timesteps"])
    monkeypatch.setattr(StableDiffusionPipeline.__call__, "__signature__", fewer, raising=False)
    monkeypatch.setattr("onestroke.teachers.load_teacher", None)
    made = dict(method="boss", prompts=PROMPTS, out=tmp_path / "run", student_steps=2)
    with pytest.raises(InputError, match="a StableDiffusionPipeline takes no timesteps; choose options"):
        onestroke.distill(str(pipeline_folder), **made)
    with pytest.raises(TypeError):  # it goes on to load the teacher
        onestroke.distill(str(pipeline_folder), knots="grid", **made)
    assert not (tmp_path / "run").exists()
