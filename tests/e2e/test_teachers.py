"""What happens to teachers of any family on the way: encoders, the cache, sizes, folders that cannot be read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import onestroke
from families import FAMILIES, pipeline_of
from onestroke.errors import InputError
from onestroke.settings import Settings
from onestroke.teachers.cache import cache_folder
from onestroke.teachers.pipeline import PipelineTeacher, inspect_folder

PROMPTS = ["a red square", "rain", "a red square"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONESTROKE_CACHE", str(tmp_path / "cache"))
    return lambda: list((tmp_path / "cache").rglob("*"))


def assert_same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("name", ["sdxl", "sd3", "z-image"])
def test_encoders_leave_memory_and_come_back(name, teachers, cache):
    teacher = PipelineTeacher.load(teachers[name].source, size=FAMILIES[name].size)
    before, null = teacher.conditions(PROMPTS), teacher.null
    assert assert_same(before, teacher.encode(PROMPTS))
    assert torch.equal(before["text"][0], before["text"][2])
    teacher.park()
    held = [p for encoder in teacher.encoders.values() for p in encoder.parameters()]
    assert held
    assert all(p.is_meta for p in held)
    assert assert_same(teacher.conditions(PROMPTS), before)
    assert teacher.parked, "what is kept on disk needs no encoder"
    assert assert_same(teacher.null, null)
    assert assert_same(teacher.encode(PROMPTS), before)
    assert not teacher.parked
    assert not any(p.is_meta for encoder in teacher.encoders.values() for p in encoder.parameters())


def test_encoded_prompts_are_found_by_content(cache, caplog):
    teacher = PipelineTeacher(pipeline_of("sd15"), "one")
    found = teacher.conditions(PROMPTS)
    (file,) = [p for p in cache() if p.is_file()]
    assert file.is_relative_to(cache_folder())
    assert load_file(file)["text"].shape[0] == 2, "every prompt once"
    again = PipelineTeacher(pipeline_of("sd15"), "two")
    again.caller.encode = None  # it must not be asked
    assert assert_same(again.conditions(PROMPTS), found)
    file.write_bytes(file.read_bytes()[:-9])
    assert assert_same(PipelineTeacher(pipeline_of("sd15"), "one").conditions(PROMPTS), found)
    other = PipelineTeacher(pipeline_of("sd15"), "one")
    next(other.pipeline.text_encoder.parameters()).data.view(-1)[-1] += 1
    assert other.identity != teacher.identity
    assert PipelineTeacher(pipeline_of("sd21"), "one").conditions(PROMPTS).keys() == found.keys()
    teacher.conditions(["rain"])
    assert len([p for p in cache() if p.is_file()]) >= 3


def test_a_cache_that_cannot_be_written_is_left(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONESTROKE_CACHE", str(tmp_path / "file"))
    assert PipelineTeacher(pipeline_of("sd15"), "one").conditions(PROMPTS)["text"].shape[0] == 3


@pytest.mark.parametrize(
    ("name", "method", "steps", "more"),
    [
        ("sdxl", "swiftbrush", 1, {"lora_rank": {"*": 2}}),
        ("pixart-sigma", "swiftbrush", 1, {"lora_rank": {"*": 2}}),
        ("sd3", "few-step-sid", 2, {"lora_rank": {"*": 2}}),
        ("sd15", "few-step-sid", 3, {"lora_rank": {"*": 2}}),
        ("flux", "few-step-sid", 2, {"renoise": "implied"}),
        ("z-image", "few-step-sid", 2, {}),
    ],
)
def test_distilling_in_another_size(name, method, steps, more, teachers, tmp_path):
    """Encoders out of memory meanwhile, all parts on disk again, and diffusers draws the same (or it would raise)."""
    source, out = teachers[name].source, tmp_path / "run"
    quick = dict(steps=2, batch_size=1, log_with="none", height=32, width=16, lr=1e-2, ema=0.0)
    student = onestroke.distill(
        str(source), method=method, prompts=PROMPTS, out=out, student_steps=steps, **quick, **more
    )
    assert student.model.size == (32, 16)
    assert student(["rain"])[0].size == (16, 32)
    card, parity = (json.loads((out / file).read_text()) for file in ("onestroke.json", "parity.json"))
    assert card["call"] == student.model.plain_call(student.few)
    assert parity["passed"]
    assert len(parity["timesteps"]) == steps
    assert (out / "lora").is_dir() == ("lora_rank" in more)
    assert f"num_inference_steps={steps}" in (out / "README.md").read_text()
    before, after = (load_file(f / teachers[name].part / WEIGHTS) for f in (source, out))
    assert any(not torch.equal(v, after[k]) for k, v in before.items())
    for encoder in teachers[name].encoders:
        assert assert_same(*(load_file(folder / encoder / "model.safetensors") for folder in (out, source)))


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_become_latents(name, teachers):
    teacher = teachers[name]
    pictures = torch.rand(2, 3, *teacher.size, generator=torch.Generator().manual_seed(0))
    x0 = teacher.encode_images(pictures)
    assert x0.shape == (2, *teacher.shape)
    factor, shift = teacher._scaling(x0)
    pixels = pictures * 2 - 1
    with torch.no_grad():
        found = teacher.pipeline.vae.encode(pixels[:, :, None] if name == "qwen-image" else pixels)
    z = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
    assert torch.allclose(x0 / factor + shift, z.view_as(x0), atol=1e-5)


# ---- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sana", "pixart-alpha", "flux", "lumina2", "z-image"])
def test_a_size_that_the_pipeline_cannot_draw(name):
    with pytest.raises(InputError, match=r"(divisible|multiples?|multiple of)") as error:
        PipelineTeacher(pipeline_of(name), name, (18, 17))
    assert "\n" not in str(error.value)
    assert "17" in str(error.value)


def test_a_teacher_loaded_in_another_size(teachers, tmp_path):
    settings = dict(method="swiftbrush", prompts=PROMPTS, out=tmp_path / "run", height=32, width=32)
    with pytest.raises(InputError, match=r"was loaded for pictures of \(16, 16\) pixels, not \(32, 32\)"):
        onestroke.distill(teachers["sd15"], **settings)
    with pytest.raises(InputError, match="height=32, width=0 go together"):
        Settings(height=32)


@pytest.mark.parametrize(
    ("name", "part"),
    [("sdxl", "text_encoder_2"), ("sd3", "transformer"), ("sana", "vae"), ("flux", "tokenizer_2")],
)
def test_a_missing_component(name, part, teachers, tmp_path):
    shutil.copytree(teachers[name].source, tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / part)
    with pytest.raises(InputError, match=f"lacks the component '{part}'"):
        inspect_folder(tmp_path / "teacher")


def test_a_component_that_is_declared_absent(teachers, tmp_path):
    """SD3 without its largest encoder is an SD3, and so is its student; without its transformer it is none."""
    folder = tmp_path / "teacher"
    shutil.copytree(teachers["sd3"].source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3"):
        index[part] = [None, None]
        shutil.rmtree(folder / part)
    (folder / "model_index.json").write_text(json.dumps(index))
    teacher = PipelineTeacher.load(folder)
    assert teacher.encode(["rain"])["text"].shape == teachers["sd3"].encode(["rain"])["text"].shape
    quick = {"steps": 1, "batch_size": 1, "log_with": "none", "lora_rank": {"*": 2}}
    onestroke.distill(teacher, method="swiftbrush", prompts=["rain"], out=tmp_path / "student", **quick)
    said = (tmp_path / "student" / "README.md").read_text()
    assert 'from_pretrained("path/to/student", text_encoder_3=None, tokenizer_3=None)' in said
    index["transformer"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lacks the component 'transformer', which a StableDiffusion3Pipeline needs"):
        inspect_folder(folder)


def test_a_component_with_code_of_its_own_is_never_run(teachers, tmp_path):
    folder, ran = tmp_path / "teacher", tmp_path / "ran"
    shutil.copytree(teachers["sd3"].source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["own", "Net"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for place in (folder, folder / "transformer"):
        (place / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Net: pass\n")
    with pytest.raises(InputError, match="'transformer' is a Net of own"):
        PipelineTeacher.load(folder)
    assert not ran.exists()


def test_weights_missing_from_an_encoder_beyond_the_first(teachers, tmp_path):
    from safetensors.torch import load, save_file

    folder = tmp_path / "teacher"
    shutil.copytree(teachers["sdxl"].source, folder)
    path = folder / "text_encoder_2" / "model.safetensors"
    tensors = load(path.read_bytes())
    del tensors["text_projection.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="'text_encoder_2' lacks weights"):
        PipelineTeacher.load(folder)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_prompts_that_are_cut_are_told_of_once(teachers, name, caplog):
    """The pipeline itself would print all that it cuts, from every batch."""

    def told() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name.startswith("diffusers") and "cut" in r.getMessage()]

    teachers[name].encode(["rain"])
    assert not told()
    teachers[name].encode([f"{'rain ' * 90}{k}" for k in range(3)], batch_size=1)
    assert told() == ["Some prompts are longer than the text encoder reads: their ends are cut."]
    assert not any("truncated" in r.getMessage() for r in caplog.records)
