"""A ControlNet of the teacher with a student: nothing at its start, and what diffusers' pipeline draws after that."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image

from families import FAMILIES
from onestroke.errors import InputError
from onestroke.sampling import FewStep
from onestroke.students.control import check_control
from onestroke.students.student import load_student, save_student
from onestroke.teachers.pipeline import PipelineTeacher

PROMPTS = ["a red square", "rain"]


def control_of(teacher, trained: bool) -> ControlNetModel:
    """A ControlNet as it is begun from a UNet: its last layers are zero; or with numbers in them."""
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(teacher.pipeline.unet, conditioning_embedding_out_channels=(4, 8))
    if trained:
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return net


@pytest.fixture(scope="module")
def students(teachers, tmp_path_factory):
    root = tmp_path_factory.mktemp("control")

    def of(name):
        if not (root / name).exists():
            teacher = teachers[name]
            save_student(teacher, teacher.net, FewStep(teacher.path, teacher.path.grid(1)), root / name, {})
        return root / name

    return of


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "edges.png"
    Image.linear_gradient("L").resize((40, 40)).save(file)
    return file


def gap(one, other):
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x.tobytes(), y.tobytes(), strict=True))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_new_controlnet_is_the_identity(name, teachers, students, picture):
    student, shown = load_student(students(name)), Image.open(picture)
    plain = student(PROMPTS, 5)
    assert plain[0].size == (FAMILIES[name].size or (16, 16))[::-1]
    assert gap(student.with_controlnet(control_of(teachers[name], False))(PROMPTS, shown, 5), plain) <= 1
    controlled = student.with_controlnet(control_of(teachers[name], True))
    moved = controlled(PROMPTS, shown, 5)
    assert gap(moved, plain) > 1
    assert gap(controlled(PROMPTS, shown, 5, scale=0.0), plain) <= 1
    assert gap(controlled(PROMPTS, [shown, shown], 5, batch_size=1), moved) <= 1
    assert gap(student(PROMPTS, 5), plain) == 0


def test_on_the_command_line(teachers, students, picture, onestroke, tmp_path):
    control_of(teachers["sd15"], True).save_pretrained(tmp_path / "control")
    words = ("sample", students("sd15"), "rain")
    how = ("--controlnet", tmp_path / "control", "--control-image", picture)
    assert onestroke(*words, "--out", tmp_path / "plain.png").code == 0
    said = onestroke(*words, *how, "--out", tmp_path / "steered.png")
    assert said.code == 0, said
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "steered.png").read_bytes()


def test_what_is_refused(teachers, students, picture, pipeline_folder, onestroke, tmp_path, monkeypatch):
    good, wide, pickled = (tmp_path / name for name in ("good", "wide", "pickled"))
    control_of(teachers["sd15"], False).save_pretrained(good)
    wider = UNet2DConditionModel.from_config({**teachers["sd15"].pipeline.unet.config, "cross_attention_dim": 24})
    ControlNetModel.from_unet(wider, conditioning_embedding_out_channels=(4, 8)).save_pretrained(wide)
    control_of(teachers["sd15"], False).save_pretrained(pickled, safe_serialization=False)
    text = tmp_path / "text.png"
    text.write_text("none")
    words, other = ("sample", students("sd15"), "rain"), ("sample", students("sana"), "rain")
    monkeypatch.setattr(PipelineTeacher, "load", lambda *args, **more: pytest.fail("a pipeline was loaded"))
    for more, says in (
        ((*words, "--controlnet", good), "go together"),
        ((*words, "--controlnet", tmp_path / "nowhere", "--control-image", picture), "no such folder"),
        ((*words, "--controlnet", pipeline_folder / "unet", "--control-image", picture), "not a ControlNet"),
        ((*words, "--controlnet", pickled, "--control-image", picture), "a pickle"),
        ((*words, "--controlnet", wide, "--control-image", picture), "ControlNet of another base"),
        ((*other, "--controlnet", good, "--control-image", picture), "ControlNet of another base"),
        ((*words, "--controlnet", "nobody/nothing", "--control-image", picture), "could not be read"),
        ((*words, "--controlnet", good, "--control-image", text), "cannot be read"),
        (("sample", pipeline_folder, "rain", "--controlnet", good, "--control-image", picture), "is a teacher"),
    ):
        said = onestroke(*more, "--out", tmp_path / "out.png")
        assert (said.code, said.err.count("\n")) == (2, 1), said
        assert says in said.err
        assert not (tmp_path / "out.png").exists()


def test_one_of_another_base_on_the_hub_is_refused_by_its_config(teachers, students, on_hub):
    """Which alone is there: nothing else could be fetched."""
    control_of(teachers["sd15"], False).save_config(on_hub("control"))
    check_control("org/control", students("sd15"))
    with pytest.raises(InputError, match="ControlNet of another base"):
        check_control("org/control", students("sdxl"))


def test_a_pipeline_that_has_none(teachers, students):
    student, control = load_student(students("sana")), control_of(teachers["sd15"], False)
    with pytest.raises(InputError, match=r"no ControlNet pipeline|another base"):
        student.with_controlnet(control)
