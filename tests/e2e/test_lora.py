"""The teacher's LoRAs on a student: what they change, what is measured of it, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import onestroke as library
from families import FAMILIES
from onestroke.errors import InputError
from onestroke.sampling import FewStep
from onestroke.students.lora import check_lora, check_lora_base, measures, put_lora
from onestroke.students.sample import sample
from onestroke.students.student import LORA_FILE, load_student, save_lora, save_student
from onestroke.teachers.pipeline import PipelineTeacher, hollow_network, network_of, shapes_in

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture(scope="module")
def folder(pipeline_folder, tmp_path_factory):
    """A student whose network is its teacher's own."""
    out = tmp_path_factory.mktemp("lora") / "student"
    teacher = PipelineTeacher.load(pipeline_folder)
    save_student(teacher, teacher.net, FewStep(teacher.path), out, {"teacher": str(pipeline_folder), "method": "none"})
    return out


@pytest.fixture(scope="module")
def lora(folder):
    """A LoRA of two ranks on one layer."""
    weight = PipelineTeacher.load(folder).net.get_parameter(f"{LAYER}.weight")
    torch.manual_seed(3)
    tensors = {f"{LAYER}.lora_A.weight": torch.randn(2, weight.shape[1])}
    tensors[f"{LAYER}.lora_B.weight"] = torch.randn(len(weight), 2)
    save_lora(tensors, folder.parent / "lora")
    return folder.parent / "lora" / LORA_FILE


def test_the_weights_are_those_of_the_product(folder, lora):
    model, before = PipelineTeacher.load(folder), PipelineTeacher.load(folder).net.state_dict()
    tensors = load_file(lora)
    put_lora(model, lora, 0.8)
    after = model.net.state_dict()
    assert after.keys() == before.keys(), "no adapters are left"
    change = 0.8 * tensors[f"{LAYER}.lora_B.weight"] @ tensors[f"{LAYER}.lora_A.weight"]
    for name, value in after.items():
        want = before[name] + (change if name == f"{LAYER}.weight" else 0)
        assert torch.allclose(value, want, atol=1e-6), name
    assert not any(p.requires_grad for p in model.net.parameters())


def test_a_student_draws_as_the_plain_pipeline_with_the_lora(folder, lora):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    theirs = pipeline(["rain", "a cat"], generator=generators, num_inference_steps=1, guidance_scale=1.0).images
    ours, plain = load_student(folder, lora=lora)(["rain", "a cat"]), load_student(folder)(["rain", "a cat"])
    for one, other, bare in zip(ours, theirs, plain, strict=True):
        assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1
        assert one.tobytes() != bare.tobytes()


def test_the_measures():
    """By hand: a student that has half the teacher's change along it, and one that has another."""
    before, change = torch.rand(4, 3, 5, 5), torch.rand(3, 5, 5)
    found = measures((before, before + change), (before, before + 0.5 * change))
    spread = (before.flatten(1) - before.flatten(1).mean(1, keepdim=True)).norm()
    assert found["teacher_change"] == pytest.approx((2 * change.norm() / spread).item(), rel=1e-5)
    assert found["student_change"] == pytest.approx(found["teacher_change"] / 2, rel=1e-5)
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["mean_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["kept"] == pytest.approx(0.5, rel=1e-4)
    other = torch.zeros_like(change)
    other[0], other[1] = change[1], -change[0]
    aside = measures((before, before + change), (before, before + other))
    assert aside["kept"] == pytest.approx(0, abs=1e-5)
    assert measures((before, before + change), (before, before))["kept"] == 0
    assert measures((before, before), (before, before))["kept"] is None


def test_the_report(folder, lora, onestroke, tmp_path):
    """A student with its teacher's weights keeps all that the LoRA does to the network."""
    said = onestroke("check-lora", folder, lora, "-n", 1, "--out", tmp_path / "report.json")
    assert said.code == 0, said
    assert "kept" in said.out
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["network"]["kept"] == pytest.approx(1, abs=1e-4)
    assert found["network"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert found["network"]["teacher_change"] == pytest.approx(found["network"]["student_change"], rel=1e-4)
    assert found["network"]["teacher_change"] > 0.001
    assert found["pictures"].keys() == found["network"].keys()
    assert len(found["prompts"]) == 4
    assert library.check_lora is check_lora


def test_on_the_command_line(folder, lora, pipeline_folder, onestroke, tmp_path):
    pictures = []
    for name, more in (("plain", ()), ("lora", ("--lora", lora)), ("zero", ("--lora", lora, "--lora-scale", 0))):
        said = onestroke("sample", folder, "rain", *more, "--out", tmp_path / f"{name}.png")
        assert said.code == 0, said
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[2] != pictures[1]
    how = ("--steps", 2, "--lora", lora, "--out", tmp_path / "teacher.png")
    assert onestroke("sample", pipeline_folder, "rain", *how).code == 0


def changed(lora, file, change):
    save_file({new: value for k, v in load_file(lora).items() for new, value in [change(k, v)]}, file)
    return file


@pytest.mark.parametrize("name", FAMILIES)
def test_the_heads_of_the_files_tell_the_shapes(name, teachers):
    teacher = teachers[name]
    network, (part, cls) = getattr(teacher.pipeline, teacher.part), network_of(teacher.source)
    assert (part, cls) == (teacher.part, type(network))
    assert shapes_in(teacher.source / part) == {k: tuple(v.shape) for k, v in network.state_dict().items()}
    assert {k: v.shape for k, v in hollow_network(teacher.source).state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }


def test_layers_that_are_numbered_as_in_the_original_of_sdxl(teachers, tmp_path):
    """As trainers of another lineage write them; diffusers needs the network's config to name them."""
    teacher, file = teachers["sdxl"], tmp_path / "numbered.safetensors"
    layer = LAYER.removeprefix("unet.")
    weight = teacher.pipeline.unet.get_parameter(f"{layer}.weight")
    down, up, numbered = torch.ones(2, weight.shape[1]), torch.ones(len(weight), 2), "lora_unet_input_blocks_1_1_"
    written = {".lora_down.weight": down, ".lora_up.weight": up, ".alpha": torch.tensor(2.0)}
    save_file({f"{numbered}transformer_blocks_0_attn2_to_v{k}": v for k, v in written.items()}, file)
    check_lora_base(teacher.source, file)
    model = PipelineTeacher.load(teacher.source)
    put_lora(model, file)
    assert torch.allclose(model.pipeline.unet.get_parameter(f"{layer}.weight"), weight + 2, atol=1e-5)


def test_what_is_refused(folder, lora, pipeline_folder, onestroke, tmp_path, monkeypatch):
    """Before any pipeline is loaded."""
    monkeypatch.setattr(PipelineTeacher, "load", lambda *args, **more: pytest.fail("a pipeline was loaded"))
    pickle, text = tmp_path / "a.bin", tmp_path / "b.safetensors"
    torch.save({}, pickle)
    text.write_text("nothing")
    wide = changed(lora, tmp_path / "wide.safetensors", lambda k, v: (k, v.repeat(1, 2) if "lora_A" in k else v))
    other = changed(lora, tmp_path / "other.safetensors", lambda k, v: (k.replace("down_blocks.0", "down_blocks.7"), v))
    wordy = changed(lora, tmp_path / "wordy.safetensors", lambda k, v: (k.replace("unet", "text_encoder"), v))
    named = changed(lora, tmp_path / "named.safetensors", lambda k, v: (k.replace("lora", "none"), v))
    for file, says in (
        (tmp_path / "nowhere", "no such file"),
        (pickle, "pickles can run code"),
        (text, "is not a safetensors file"),
        (named, "holds no LoRA"),
        (wide, "is LoRA of another base"),
        (other, "has no such layer"),
        (wordy, "holds no LoRA of a unet"),
    ):
        drawn = [("sample", model, "rain", "--lora", file) for model in (folder, pipeline_folder)]
        for words in (("check-lora", folder, file), *drawn):
            said = onestroke(*words, "--out", tmp_path / "out")
            assert (said.code, said.err.count("\n")) == (2, 1), said
            assert says in said.err
            assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(pipeline_folder, on_hub):
    """What the hub's cache holds of the tiny teacher, org/tiny: its two small files; nothing more can be had."""
    folder = on_hub("tiny")
    for name in ("model_index.json", "unet/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pipeline_folder / name, folder / name)
    return folder


def test_of_a_teacher_on_the_hub_only_small_files_are_fetched(hub, lora, onestroke, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("onestroke.students.sample.load_teacher", lambda name: loaded.append(name) or 1 / 0)
    wide = changed(lora, tmp_path / "wide.safetensors", lambda k, v: (k, v.repeat(1, 2) if "lora_A" in k else v))
    other = changed(lora, tmp_path / "other.safetensors", lambda k, v: (k.replace("down_blocks.0", "down_blocks.7"), v))
    for model, file, says in (
        ("org/tiny", wide, "is LoRA of another base"),
        ("org/tiny", other, "has no such layer"),
        ("org/none", lora, "teacher 'org/none' could not be read"),
    ):
        said = onestroke("sample", model, "rain", "--lora", file, "--out", tmp_path / "out")
        assert (said.code, said.err.count("\n")) == (2, 1), said
        assert says in said.err
    assert not loaded
    with pytest.raises(ZeroDivisionError):
        sample("org/tiny", ["rain"], lora=lora)
    assert loaded == ["org/tiny"], "one that fits is loaded"
    (hub / "unet" / "config.json").unlink()
    with pytest.raises(InputError, match="teacher 'org/tiny' could not be read"):
        check_lora_base("org/tiny", lora)
    declared = json.loads((hub / "model_index.json").read_text())
    for change, says in (({"unet": ["mine", "Net"]}, "is never run"), ({"_class_name": "Mine"}, "does not know")):
        (hub / "model_index.json").write_text(json.dumps(declared | change))
        with pytest.raises(InputError, match=says):
            check_lora_base("org/tiny", lora)


def test_a_teacher_of_another_base(folder, lora, tmp_path):
    from conftest import tiny_pipeline

    tiny_pipeline(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="is another base"):
        check_lora(folder, lora, teacher=str(tmp_path / "other"))
