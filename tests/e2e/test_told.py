"""A student that is told its guidance: an ordinary pipeline at the run's, and through onestroke at every other."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import onestroke as library
from contract.build import settings_of
from e2e.test_families import PROMPTS, SEED, theirs
from families import FAMILIES
from onestroke.denoiser import Told, told_around
from onestroke.errors import InputError
from onestroke.methods import get_method
from onestroke.run import parts_of
from onestroke.several import load_several
from onestroke.students.guidance import GUIDANCE
from onestroke.students.sprint import sana_sprint, sprint_call, sprint_few
from onestroke.students.student import ROUTER, SeededNoise, load_student, save_student
from onestroke.training.train import Data, Trainer

METHODS = {"lcm": (2.0, 5.0, 8.0), "guided-distillation": (2.0, 5.0, 8.0), "sana-sprint": (4.5, 5.0, 5.5)}
"""The lowest guidance of a run's 5, the run's, and the highest."""


def played(name, teacher, folder=None):
    """A trained student of a method, whose weights have moved, with what it was told, and how it is called."""
    run = settings_of(guidance_scale=5.0, steps=3, batch_size=4)
    options = {"lcm": {"spread": 0.75}, "sana-sprint": {"difference": 0.1}}.get(name, {"start": 2})
    cond = teacher.conditions(PROMPTS)
    method = get_method(name)(parts_of(teacher, run, None, None, cond), **options)
    x0 = torch.randn(len(PROMPTS), *teacher.shape, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(method, Data(teacher.shape, cond, x0), run, None)
    trainer.run()
    net = trainer.finish()
    torch.manual_seed(1)
    torch.nn.init.normal_(net.shift.weight, std=0.3)  # more than three rounds do
    if folder is not None:
        save_student(teacher, net, method.few if hasattr(method, "few") else parts_of(teacher, run).few, folder,
                     {"method": name, "teacher": "t"}, method.guidance)  # fmt: skip
    return net, method


@pytest.fixture(scope="module")
def folder(teachers, tmp_path_factory):
    out = tmp_path_factory.mktemp("told") / "student"
    played("lcm", teachers["sd15"], out)
    return out


def same(a, b):
    return np.array_equal(np.stack([np.asarray(v) for v in a]), np.stack([np.asarray(v) for v in b]))


@pytest.mark.parametrize("family", ["sd15", "sd3", "sana", "flux", "pixart-alpha"])
@pytest.mark.parametrize("name", METHODS)
def test_what_was_told_in_training_is_told_when_drawing(name, family, teachers, tmp_path):
    """At the ends of the range it says what the trained network does there, at the run's what the pipeline does."""
    teacher = teachers[family]
    net, _ = played(name, teacher, tmp_path / "s")
    student, draw = load_student(tmp_path / "s"), SeededNoise(2, SEED)
    noise, (low, middle, high) = draw.normal(teacher.shape), METHODS[name]
    cond, t = teacher.encode(PROMPTS[:2]), torch.full((2,), student.few.times[0], dtype=torch.float64)
    edge = 0.05 if name == "sana-sprint" else 1.0
    with torch.no_grad():
        plain = student.model.net(noise, t, cond).x0
        for scale, s in ((low, -edge), (middle, 0.0), (high, edge)):
            assert student.side(scale) == pytest.approx(s, abs=1e-12)
            told = torch.full((2,), s)
            got = student.net(noise, t, {**cond, "s": torch.full((2,), student.side(scale))}).x0
            assert torch.allclose(got, net(noise, t, {**cond, "s": told}).x0, atol=1e-4)
            assert torch.equal(got, plain) == (scale == middle)


def test_a_call_draws_under_it(folder):
    student = load_student(folder)
    usual = student(PROMPTS, seed=SEED)
    assert same(student(PROMPTS, seed=SEED, guidance_scale=5.0), usual)
    low, high = (student(PROMPTS, seed=SEED, guidance_scale=scale) for scale in (2.0, 8.0))
    assert not same(low, usual)
    assert not same(low, high)
    assert same(student(PROMPTS, seed=SEED, guidance_scale=2.0, batch_size=2), low)
    assert not same(student(PROMPTS, seed=SEED, guidance_scale=2.0, negative_prompt="an oak"), low)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert same(theirs(pipeline, student.card["call"], "pil"), usual)


@pytest.mark.parametrize(
    ("scale", "says"), [(8.8, "knows guidance scales from 2 to 8, not 8.8"), (0.0, "from 2 to 8, not 0")]
)
def test_other_guidance_is_refused(scale, says, folder, onestroke, tmp_path):
    with pytest.raises(InputError, match=says):
        load_student(folder)("rain", guidance_scale=scale)
    said = onestroke("sample", folder, "rain", "--guidance-scale", scale, "--out", tmp_path / "p.png")
    assert (said.code, says in said.err) == (2, True)
    assert not (tmp_path / "p.png").exists()


def test_a_student_of_one_guidance_is_told_none(folder, onestroke, tmp_path):
    shutil.copytree(folder, tmp_path / "one")
    (tmp_path / "one" / GUIDANCE).unlink()
    card = json.loads((tmp_path / "one" / "onestroke.json").read_text())
    (tmp_path / "one" / "onestroke.json").write_text(json.dumps({k: v for k, v in card.items() if k != "guidance"}))
    with pytest.raises(InputError, match="has one guidance scale, in its weights"):
        load_student(tmp_path / "one")("rain", guidance_scale=5.0)
    said = onestroke("sample", tmp_path / "one", "rain", "--guidance-scale", 5, "--out", tmp_path / "p.png")
    assert (said.code, "has one guidance scale" in said.err) == (2, True)


def test_anothers_file_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    found = load_file(folder / GUIDANCE)
    for wrong in ({"shift": found["shift"][1:]}, {"other": found["shift"]}):
        save_file(wrong, tmp_path / "other" / GUIDANCE)
        with pytest.raises(InputError, match="is not what this student has learned of guidance"):
            load_student(tmp_path / "other")


def test_a_run_says_it(tmp_path, pipeline_folder, onestroke):
    """From the command to the pictures; the card tells how."""
    (tmp_path / "images").mkdir()
    for k in range(2):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (16, 16, 3), np.uint8)).save(
            tmp_path / "images" / f"{k}.png"
        )
        (tmp_path / "images" / f"{k}.txt").write_text(PROMPTS[k])
    how = [
        "--set",
        "steps=2",
        "--set",
        "batch_size=2",
        "--set",
        "log_with=none",
        "--set",
        "lr.student=1e-2",
        "--set",
        "lora_rank.student=2",
    ]
    out = tmp_path / "run"
    said = onestroke("distill", pipeline_folder, "--method", "lcm", "--images", tmp_path / "images", "--out", out, *how)
    assert said.code == 0, said
    assert "from 6 to 16, is in `guidance.safetensors`" in " ".join((out / "README.md").read_text().split())
    for scale in (6, 16):
        said = onestroke("sample", out, "rain", "--guidance-scale", scale, "--out", tmp_path / f"{scale}.png")
        assert said.code == 0, said
    assert (tmp_path / "6.png").read_bytes() != (tmp_path / "16.png").read_bytes()


def test_it_goes_along(folder, teachers, tmp_path):
    """Into an export to diffusers, and into a mean of students; as LoRA and as graphs it is the run's student."""
    exported = library.export(folder, to="diffusers", out=tmp_path / "exported")
    student, wanted = load_student(folder), load_file(folder / GUIDANCE)
    assert same(load_student(exported)("rain", guidance_scale=2.0), student("rain", guidance_scale=2.0))
    shutil.copytree(folder, tmp_path / "b")
    save_file({**wanted, "shift": -wanted["shift"]}, tmp_path / "b" / GUIDANCE)
    merged = library.merge([folder, tmp_path / "b"], [0.75, 0.25], out=tmp_path / "m")
    assert torch.allclose(load_file(tmp_path / "m" / GUIDANCE)["shift"], wanted["shift"] / 2)
    assert merged.told == student.told
    card = json.loads((tmp_path / "b" / "onestroke.json").read_text())
    card["guidance"]["scale"] = 4.0
    (tmp_path / "b" / "onestroke.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="their guidance differs"):
        library.merge([folder, tmp_path / "b"], out=tmp_path / "n")


def test_of_several_students_each_is_told(folder, tmp_path):
    for k in range(2):
        shutil.copytree(folder, tmp_path / "two" / f"student-{k}")
    found = load_file(folder / GUIDANCE)
    save_file({**found, "shift": -found["shift"]}, tmp_path / "two" / "student-1" / GUIDANCE)
    card = json.loads((folder / "onestroke.json").read_text()) | {"students": 2}
    (tmp_path / "two" / "onestroke.json").write_text(json.dumps(card))
    one = load_student(folder)
    from onestroke.several import summary

    rows = summary(one.model.encode(PROMPTS[:2]))
    save_file({"anchors": rows.contiguous(), "owners": torch.tensor([0, 1])}, tmp_path / "two" / ROUTER)
    several = load_several(tmp_path / "two")
    first, second = several(PROMPTS[:2], seed=SEED, guidance_scale=2.0)
    assert same([first], one(PROMPTS[:1], seed=SEED, guidance_scale=2.0))
    assert not same([second], one(PROMPTS[1:2], seed=SEED + 1, guidance_scale=2.0))
    parts = load_student(tmp_path / "two" / "student-1")
    assert same([second], parts(PROMPTS[1:2], seed=SEED + 1, guidance_scale=2.0))


@pytest.mark.parametrize("name", ["lcm", "sana-sprint"])
def test_a_sana_sprint_pipeline_reads_it(name, teachers, tmp_path):
    teacher = teachers["sana"]
    played(name, teacher, tmp_path / "s")
    student = load_student(tmp_path / "s")
    sprint = sana_sprint(student, 1)
    size = {"height": FAMILIES["sana"].size[0], "width": FAMILIES["sana"].size[1], "use_resolution_binning": False}
    noise, seen = SeededNoise(len(PROMPTS), SEED), []
    with torch.no_grad():
        cond, first = student.model.encode(PROMPTS), noise.normal(student.model.shape)
        for scale in METHODS[name]:
            side = torch.full((len(PROMPTS),), student.side(scale))
            x0 = sprint_few(student, 1).sample(student.net, first, {**cond, "s": side}, noise)
            got = theirs(sprint, {**sprint_call(1), **size, "guidance_scale": scale}, "latent")
            seen.append(got)
            assert (got - x0).abs().max() <= 1e-4 * x0.abs().max().clamp(min=1)
    assert (seen[0] - seen[1]).abs().max() > 1e-2
    out = library.export(tmp_path / "s", to="sprint", out=tmp_path / "out")
    assert "guidance_scale=5.0" in (out / "README.md").read_text()


def test_sides():
    assert told_around(5.0, 0.5) == Told(5.0, 2.0, 2.0)
    assert told_around(1.0, 0.5) is None
    assert told_around(5.0, 0.0) is None
    assert Told(5.0, 2.0, 2.0).side(4.0) == -0.5
    assert Told(0.5, -0.25, 0.25).side(0.75) == -1.0
