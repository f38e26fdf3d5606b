"""The weighted mean of students' weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import onestroke as library
from onestroke.errors import InputError
from onestroke.students.merging import blended

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def students(pipeline_folder, prompt_file, tmp_path_factory):
    """Two students of one teacher, the second of them trained as LoRA, as SwiftBrush v2's are."""
    folder = tmp_path_factory.mktemp("students")
    common = {"prompts": prompt_file, "steps": 2, "batch_size": 2, "log_with": "none", "ema": 0.0}
    for name, given in (("a", {"lr": 1e-2}), ("b", {"lr": 1e-2, "seed": 1, "lora_rank": {"student": 2}})):
        library.distill(str(pipeline_folder), method="swiftbrush", out=folder / name, **common, **given)
    return folder / "a", folder / "b"


def test_a_merge_of_linear_students_interpolates_what_they_draw():
    generator = torch.Generator().manual_seed(0)
    nets = [nn.Linear(3, 4).double() for _ in range(3)]
    x, weights = torch.randn(5, 3, generator=generator, dtype=torch.float64), [0.2, 0.5, 0.3]
    one = nn.Linear(3, 4).double()
    one.load_state_dict(blended((n.state_dict() for n in nets), weights))
    want = sum(w * net(x) for w, net in zip(weights, nets, strict=True))
    torch.testing.assert_close(one(x), want, rtol=1e-14, atol=1e-14)


def test_buffers_of_integers_are_those_of_the_first():
    states = [{"w": torch.tensor([float(k)]), "count": torch.tensor([k])} for k in (1, 3)]
    found = blended(states, [0.5, 0.5])
    assert (found["w"].item(), found["count"].item()) == (2.0, 1)
    assert found["w"].dtype == torch.float32


def test_the_mean_is_written_as_a_student(students, onestroke, tmp_path):
    a, b = students
    said = onestroke("merge", a, b, "--weight", "0.25", "--weight", "0.75", "--out", tmp_path / "m")
    assert said.code == 0, said
    one, two, mean = (load_file(folder / UNET) for folder in (a, b, tmp_path / "m"))
    assert any(not torch.equal(one[k], two[k]) for k in one)
    for k in mean:
        torch.testing.assert_close(mean[k], 0.25 * one[k] + 0.75 * two[k], rtol=1e-6, atol=1e-7)
    student = library.load_student(tmp_path / "m")
    assert student.card["merged"] == {"students": [str(a), str(b)], "weights": [0.25, 0.75]}
    assert student.card["method"] == "swiftbrush"
    assert json.loads((tmp_path / "m" / "parity.json").read_text())["passed"]
    assert "swiftbrush" in (tmp_path / "m" / "README.md").read_text()
    assert student("rain")[0].size == (16, 16)
    assert not (tmp_path / "m" / "lora").exists()


def test_all_weight_on_one_student_is_that_student(students, tmp_path):
    a, b = students
    library.merge([a, b], [0.0, 1.0], out=tmp_path / "m")
    one, mean = load_file(b / UNET), load_file(tmp_path / "m" / UNET)
    assert all(torch.equal(one[k], mean[k]) for k in one)


def test_a_student_with_itself_is_itself_and_weights_are_equal_by_default(students, tmp_path):
    a, _ = students
    library.merge([a, a], out=tmp_path / "m")
    one, mean = load_file(a / UNET), load_file(tmp_path / "m" / UNET)
    assert all(torch.equal(one[k], mean[k]) for k in one)


@pytest.mark.parametrize(
    ("count", "weights", "says"),
    [
        (1, None, "give at least two students"),
        (2, [1.0], "2 students and 1 weights"),
        (2, [0.5, 0.6], "the weights 0.5, 0.6 must sum to 1"),
        (2, [float("nan"), 1.0], "must sum to 1"),
    ],
)
def test_wrong_numbers(students, tmp_path, count, weights, says):
    with pytest.raises(InputError, match=says):
        library.merge(students[:count], weights, out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def edited(folder, file, key, value):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.parametrize(
    ("file", "key", "value", "says"),
    [
        ("onestroke.json", "student_steps", 4, "their student_steps differs"),
        ("unet/config.json", "layers_per_block", 2, "their unet differs"),
        ("scheduler/scheduler_config.json", "prediction_type", "epsilon", "their scheduler differs"),
    ],
)
def test_students_of_different_kinds(students, tmp_path, file, key, value, says):
    a, b = students
    shutil.copytree(b, tmp_path / "other")
    edited(tmp_path / "other", file, key, value)
    with pytest.raises(InputError, match=says):
        library.merge([a, tmp_path / "other"], out=tmp_path / "m")


def test_into_a_folder_with_files_and_from_what_is_no_student(students, pipeline_folder, tmp_path):
    a, b = students
    (tmp_path / "here").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        library.merge([a, b], out=tmp_path)
    with pytest.raises(InputError, match="it is no student"):
        library.merge([a, pipeline_folder], out=tmp_path / "m")
