"""Every family of pipelines: read from disk as a user does, taught from, and written as what plain diffusers draws."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from families import FAMILIES, pipeline_of
from onestroke.paths import Flow
from onestroke.sampling import FewStep
from onestroke.student import SeededNoise, Student, load_student, save_student
from onestroke.teachers.pipeline import PipelineTeacher

SEED = 40
PROMPTS = ["a red square", "rain"]
every = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Where the tiny pipeline of each family is, once it was asked for."""
    return Folders(tmp_path_factory.mktemp("families"))


class Folders(dict):
    def __init__(self, root: Path):
        self.root = root

    def __missing__(self, name: str) -> Path:
        pipeline_of(name).save_pretrained(self.root / name)
        self[name] = self.root / name
        return self[name]


class Loaded(dict):
    def __init__(self, folders: dict[str, Path]):
        self.folders = folders

    def __missing__(self, name: str) -> PipelineTeacher:
        self[name] = PipelineTeacher.load(self.folders[name], size=FAMILIES[name].size)
        return self[name]


@pytest.fixture(scope="session")
def teachers(folders) -> dict[str, PipelineTeacher]:
    """The teacher of each family, loaded once it is asked for."""
    return Loaded(folders)


class PlainNoise(SeededNoise):
    """The noise of a pipeline that gives its scheduler no generator: after the first, torch's own, as it is packed."""

    def __init__(self, teacher: PipelineTeacher):
        super().__init__(len(PROMPTS), SEED)
        self.call, self.shape = teacher.call, teacher.shape

    def normal(self, like):
        if isinstance(like, tuple):
            return super().normal(like)
        packed = like if self.call.order is None else self.call.pack(like)
        return self.call.unpack(torch.randn(packed.shape), self.shape) * self.call.sign


def moved(teacher: PipelineTeacher) -> Any:
    """A student's network: not its teacher's."""
    net, generator = copy.deepcopy(teacher.net), torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return net


def ours(model: PipelineTeacher, net: Any, few: FewStep, seeded: bool) -> Tensor:
    noise = SeededNoise(len(PROMPTS), SEED) if seeded else PlainNoise(model)
    torch.manual_seed(SEED)
    with torch.no_grad():
        return few.sample(net, noise.normal(model.shape), model.encode(PROMPTS), noise)


def theirs(pipeline: Any, call: dict[str, Any], kind: str) -> Tensor:
    torch.manual_seed(SEED)
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(PROMPTS))]
    return pipeline(list(PROMPTS), generator=generators, output_type=kind, **call).images


def check_parity(model: PipelineTeacher, net: Any, few: FewStep, pipeline: Any, seeded: bool) -> None:
    pipeline.set_progress_bar_config(disable=True)
    x0, call = ours(model, net, few, seeded), model.plain_call(len(few.times))
    images = model.decode(x0)
    assert images.shape == (2, 3, *model.size)
    assert images.std() > 0.01, "a blank picture proves nothing"
    assert (images[0] - images[1]).abs().max() > 0.01
    latents = theirs(pipeline, call, "latent")
    latents = latents if model.call.order is None else model.call.unpack(latents, model.shape)
    assert (latents - x0).abs().max() <= 1e-4 * x0.abs().max().clamp(min=1)
    assert (theirs(pipeline, call, "pt") - images).abs().max() <= 1e-4


@every
def test_a_student_on_disk_is_a_plain_pipeline_that_draws_the_same(name, teachers, tmp_path):
    """One step, and more than it was made for."""
    teacher, seeded = teachers[name], FAMILIES[name].seeded
    few = FewStep(teacher.path, teacher.path.grid(1))
    save_student(teacher, moved(teacher), few, tmp_path / "student", {"method": "none"})
    student, plain = load_student(tmp_path / "student"), DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert student.model.size == teacher.size
    assert student.card["call"] == json.loads(json.dumps(teacher.plain_call(1)))
    for steps in (1, 2, 4):
        few = FewStep(student.model.path, student.model.path.grid(steps))
        check_parity(student.model, student.model.net, few, plain, seeded)


@every
@pytest.mark.parametrize("steps", [2, 4])
def test_a_student_of_several_steps_takes_its_own_times(name, steps, teachers):
    """The exported scheduler's times are those of training, and read again they stay so."""
    teacher, seeded = teachers[name], FAMILIES[name].seeded
    net, few = moved(teacher), FewStep(teacher.path, teacher.path.grid(steps))
    plain = teacher.student_pipeline(net, few)
    check_parity(teacher, net, few, plain, seeded)
    read = PipelineTeacher(plain, name, FAMILIES[name].size)
    assert read.path.grid(steps) == pytest.approx(few.times, abs=1e-6)
    assert Student(read, {"student_steps": steps}).few.renoise == "fresh"
    if isinstance(teacher.path, Flow):
        euler = FewStep(teacher.path, few.times, renoise="implied")
        check_parity(teacher, net, euler, teacher.student_pipeline(net, euler), True)
