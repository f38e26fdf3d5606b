"""What `export` writes is drawn with by others, and draws what the student draws."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import onestroke
from conftest import PROMPTS, tiny_pipeline
from e2e.test_cli import UNET, assert_refusal, digest
from families import FAMILIES, pipeline_of
from onestroke.denoiser import fused_attention, plain_attention
from onestroke.sampling import FewStep
from onestroke.students import graphs, model_card
from onestroke.students.exports import OnnxStudent, extract, with_adapters
from onestroke.students.parity import by_diffusers, by_training_sampler, check_pipeline, gap, open_plain
from onestroke.students.student import LORA_FILE, SeededNoise, load_student, save_student
from onestroke.teachers import BUILT_IN, load_teacher
from onestroke.training.roles import adapters

QUICK = dict(method="swiftbrush", batch_size=2, log_with="none", lr=1e-3)


@pytest.fixture
def command(onestroke):
    """The command line, called in this process, beside the module of the same name."""
    return onestroke


@pytest.fixture(scope="module")
def full(pipeline_folder, tmp_path_factory) -> Path:
    """A student of the tiny teacher, trained whole."""
    out = tmp_path_factory.mktemp("exports") / "full"
    onestroke.distill(str(pipeline_folder), prompts=PROMPTS, out=out, steps=2, **QUICK)
    return out


@pytest.fixture(scope="module")
def adapted(pipeline_folder, tmp_path_factory) -> Path:
    """A student of the tiny teacher, trained as LoRA with a scale of 1.5."""
    out, lora = tmp_path_factory.mktemp("exports") / "adapted", dict(lora_rank={"student": 4}, lora_alpha=6)
    onestroke.distill(str(pipeline_folder), prompts=PROMPTS, out=out, steps=2, **QUICK, **lora)
    return out


def several(student: Path, out: Path, steps: int, renoise: str = "fresh") -> Path:
    """The same student, said to take this many steps with this noise between them."""
    shutil.copytree(student, out)
    edit(out / "onestroke.json", student_steps=steps, renoise=renoise)
    return out


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def parity(folder: Path) -> dict:
    return json.loads((folder / "parity.json").read_text())


def plain(folder: Path, dtype=torch.float32):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, dtype=dtype)


def usage(folder: Path) -> str:
    """The Python of the model card, with this folder, and its last line as `image`."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    *lines, last = code.replace(f"path/to/{folder.name}", str(folder)).rstrip().splitlines()
    assert len([line for line in lines if line]) <= 5
    return "\n".join([*lines, f"image = {last}"])


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_diffusers_takes_the_timesteps_of_training(full, tmp_path, steps):
    out = onestroke.export(several(full, tmp_path / "student", steps), to="diffusers", out=tmp_path / "out")
    pipeline, seen = plain(out), []
    pipeline(
        PROMPTS[0], num_inference_steps=steps, callback_on_step_end=lambda p, i, t, kept: seen.append(int(t)) or kept
    )
    assert seen == [1000 - 1000 // steps * i - 1 for i in range(steps)] == parity(out)["timesteps"]
    assert {4: [999, 749, 499, 249]}.get(steps, seen) == seen
    assert parity(out)["passed"]
    assert max(parity(out)["max_abs_difference"].values()) <= parity(out)["tolerance"] == 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_diffusers_in_half_precision(full, tmp_path, dtype):
    out = onestroke.export(full, to="diffusers", out=tmp_path / "out", dtype=dtype)
    assert {str(v.dtype) for v in load_file(out / UNET).values()} == {f"torch.{dtype}"}
    found = parity(out)
    assert found["dtype"] == dtype
    assert 1e-5 < found["max_abs_difference"]["latents"] <= found["tolerance"]
    again = load_student(out)(["rain"], seed=3)[0]
    assert again.size == (16, 16)


@pytest.mark.parametrize("steps", [1, 4])
def test_lora_of_a_student_trained_as_lora_is_exact(adapted, pipeline_folder, tmp_path, steps):
    student = several(adapted, tmp_path / "student", steps)
    out = onestroke.export(student, to="lora", out=tmp_path / "out")
    assert "lost_by_rank" not in parity(out)
    pipeline, loaded = plain(pipeline_folder), load_student(student)
    call = loaded.model.plain_call(loaded.few)
    before = by_diffusers(pipeline, loaded.model, {**call, "num_inference_steps": 1})
    pipeline.load_lora_weights(out, weight_name=LORA_FILE)
    pipeline.scheduler = loaded.model.pipeline.scheduler
    drawn, wanted = (
        by_diffusers(pipeline, loaded.model, call),
        by_training_sampler(loaded.model, loaded.model.net, loaded.few),
    )
    assert max(gap(wanted, drawn).values()) <= 1e-4
    assert (drawn.latents - before.latents).abs().max() > 1e-3, "the adapters change nothing"


def test_lora_keys_are_those_of_diffusers(adapted, pipeline_folder):
    file = adapted / "lora" / LORA_FILE
    kept, before, after = load_file(file), load_file(pipeline_folder / UNET), load_file(adapted / UNET)
    assert all(re.fullmatch(r"unet\..+\.(to_q|to_k|to_v|to_out\.0)\.lora_[AB]\.weight", key) for key in kept)
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 4)
    layers = {key.removesuffix(".lora_A.weight") for key in kept if key.endswith("A.weight")}
    assert {f"unet.{name}" for name in config["unet.target_modules"]} == layers
    assert len(kept) == 2 * len(layers)
    for layer in layers:
        name = layer.removeprefix("unet.") + ".weight"
        product = kept[f"{layer}.lora_B.weight"] @ kept[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(after[name] - before[name], product, rtol=0, atol=1e-6)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {f"unet.{n.removesuffix('.weight')}" for n in changed} <= layers


def test_lora_of_a_student_trained_whole_says_what_is_lost(full, adapted, tmp_path):
    few, many = (onestroke.export(full, to="lora", out=tmp_path / str(rank), rank=rank) for rank in (1, 64))
    losses = [parity(out)["lost_by_rank"] for out in (few, many)]
    assert [loss["rank"] for loss in losses] == [1, 64]
    assert 1 > losses[0]["squared_change"] > losses[1]["squared_change"] > 0
    assert losses[0]["images_rms"] > losses[1]["images_rms"]
    assert f"{losses[0]['squared_change']:.1%} of the squared" in (few / "README.md").read_text()
    exact = onestroke.export(adapted, to="lora", out=tmp_path / "again", rank=4)
    assert parity(exact)["lost_by_rank"]["squared_change"] < 1e-8, "adapters of rank 4 are found again"


def test_extract_and_apply_are_inverse_at_full_rank():
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1, bias=False), nn.Flatten(), nn.Linear(16, 5))

    base, after = net(), net()
    tensors, lost = extract(after, base, 16)
    assert {tuple(v.shape) for k, v in tensors.items() if k.startswith("0.")} == {(16, 3, 3, 3), (8, 16, 1, 1)}
    restored, wanted = dict(with_adapters(base, tensors).named_parameters()), dict(after.named_parameters())
    for name, value in wanted.items():
        if name.endswith("weight"):
            torch.testing.assert_close(restored[name], value)
    deltas = [(v - dict(base.named_parameters())[k]).square().sum() for k, v in wanted.items()]
    biases = [(v - dict(base.named_parameters())[k]).square().sum() for k, v in wanted.items() if k.endswith("bias")]
    assert lost == pytest.approx((sum(biases) / sum(deltas)).item(), rel=1e-4)


def test_a_full_copy_has_no_adapters(full, pipeline_folder):
    assert adapters(load_teacher(pipeline_folder).net) == {}
    assert not (full / "lora").exists()


@pytest.mark.parametrize(("steps", "renoise"), [(1, "fresh"), (4, "fresh"), (4, "implied")])
def test_onnx_draws_what_the_student_draws(full, tmp_path, steps, renoise):
    pytest.importorskip("onnxruntime")
    student = several(full, tmp_path / "student", steps, renoise)
    out = onestroke.export(student, to="onnx", out=tmp_path / "out")
    assert max(parity(out)["max_abs_difference"].values()) <= 1e-4
    assert "onnxruntime" in parity(out)["versions"]
    drawn, wanted = OnnxStudent(out)(PROMPTS[:5], seed=7), load_student(student)(PROMPTS[:5], seed=7)
    for one, other in zip(drawn, wanted, strict=True):
        assert (torch.tensor(list(one.tobytes())) - torch.tensor(list(other.tobytes()))).abs().max() <= 1
    with pytest.raises(onestroke.InputError, match="draws in 1, 2, 4, 8 steps, not 3"):
        OnnxStudent(out)("rain", steps=3)


@pytest.fixture
def any_precision():
    """accelerate keeps one precision per process; forget it before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_built_in_teacher_from_end_to_end(any_precision, tmp_path):
    """By its own recipe, in mixed precision: what is compared is float32. (Its first round moves the fake alone.)"""
    prompts = (BUILT_IN / "emoji64" / "prompts.txt").read_text().splitlines()[:4]
    onestroke.distill("emoji64", prompts=prompts, out=tmp_path / "student", steps=2, **QUICK)
    assert parity(tmp_path / "student")["passed"]
    assert "Apache-2.0; artwork MIT, Apache-2.0, CC-BY-4.0" in (tmp_path / "student" / "README.md").read_text()
    formats = ["diffusers", "lora"]
    if graphs.find_spec("onnxruntime"):
        formats.append("onnx")
    for to in formats:
        out = onestroke.export(tmp_path / "student", to=to, out=tmp_path / to)
        assert max(parity(out)["max_abs_difference"].values()) <= 1e-4, to


# ---- every kind of pipeline ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sdxl", "sana", "flux-guided", "lumina2", "qwen-image"])
def family(request, tmp_path_factory) -> Path:
    """A student of four steps of another kind of pipeline: its times, packing and source of noise are its own."""
    folder, size = tmp_path_factory.mktemp(request.param), FAMILIES[request.param].size
    pipeline_of(request.param).save_pretrained(folder / "teacher")
    teacher = load_teacher(folder / "teacher", size)
    net, few = copy.deepcopy(teacher.net), FewStep(teacher.path, teacher.path.grid(4))
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    card = {"method": "none", "teacher": str(folder / "teacher")}
    save_student(teacher, net, few, folder / "student", card)
    check_pipeline(folder / "student", open_plain(folder / "student"), teacher, net, few, "diffusers")
    return folder / "student"


def test_other_pipelines_are_compared_by_their_own_calls(family, tmp_path):
    assert max(parity(family)["max_abs_difference"].values()) <= 1e-4
    assert len(parity(family)["timesteps"]) == 4
    lora = parity(onestroke.export(family, to="lora", out=tmp_path / "lora", rank=3))
    assert max(lora["max_abs_difference"].values()) <= 1e-4
    half = parity(onestroke.export(family, to="diffusers", out=tmp_path / "half", dtype="bfloat16"))
    assert 1e-4 < max(half["max_abs_difference"].values()) <= half["tolerance"]


def test_other_noise_is_another_picture(family):
    """The source of noise may be the pipeline's choice, but it must be one of those that pipelines have."""
    student = load_student(family)
    wrong = by_training_sampler(student.model, student.model.net, student.few, SeededNoise(2, 7))
    pipeline = open_plain(family)
    torch.manual_seed(0)
    drawn = by_diffusers(pipeline, student.model, student.card["call"])
    assert max(gap(wrong, drawn).values()) > 0.05


@pytest.mark.parametrize("renoise", ["fresh", "implied"])
def test_distill_of_several_steps_on_a_flow(renoise, tmp_path):
    pipeline_of("sd3").save_pretrained(tmp_path / "teacher")
    run = dict(method="dmd2", gan_weight=0, student_steps=2, renoise=renoise, steps=1, batch_size=2, log_with="none")
    onestroke.distill(str(tmp_path / "teacher"), prompts=PROMPTS, out=tmp_path / "run", **run)
    assert parity(tmp_path / "run")["timesteps"] == [1000, 750]
    assert parity(tmp_path / "run")["passed"]


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "flux-guided", "qwen-image", "lumina2", "z-image"])
def test_onnx_without_a_text_encoder(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pipeline_of(name).save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher", FAMILIES[name].size)
    few = FewStep(teacher.path, teacher.path.grid(1))
    save_student(teacher, teacher.net, few, tmp_path / "student", {"method": "none", "teacher": "x"})
    out = onestroke.export(tmp_path / "student", to="onnx", out=tmp_path / "out")
    assert max(parity(out)["max_abs_difference"].values()) <= 1e-4
    student = load_student(tmp_path / "student")
    cond = student.model.encode(["", "rain", "rain " * 40])  # of other lengths than the graph was written with
    drawn = OnnxStudent(out).latents(cond, SeededNoise(3, 0))
    assert (drawn - student.latents(cond)).abs().max() <= 1e-4
    with pytest.raises(onestroke.InputError, match="holds no text encoder"):
        OnnxStudent(out)("rain")
    length = json.loads((out / "onestroke.json").read_text())["onnx"]["text"]
    with pytest.raises(onestroke.InputError, match=f"{length + 1} tokens is longer than the {length}"):
        OnnxStudent(out).latents({"text": torch.zeros(1, length + 1, 1)}, SeededNoise(1, 0))
    space: dict = {}
    exec(usage(out).replace("path/to/student", str(tmp_path / "student")), space)
    assert space["image"].size == student("rain")[0].size


def test_onnx_of_what_torch_cannot_write(command, full, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")

    def fail(*args, **kwargs):
        print("a graph of ten thousand lines")
        raise RuntimeError("no such operator\nhow to go on")

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr(torch.export, "export", fail)
    said = command("export", full, "--to", "onnx", "--out", tmp_path / "out")
    assert_refusal(said, "torch cannot write this denoiser as ONNX: no such operator\n")
    assert said.out == ""


def test_lora_for_a_pipeline_that_takes_none(command, tmp_path):
    pipeline_of("pixart-sigma").save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher")
    few = FewStep(teacher.path, teacher.path.grid(1))
    card = {"method": "none", "teacher": str(tmp_path / "teacher")}
    save_student(teacher, teacher.net, few, tmp_path / "student", card)
    said = command("export", tmp_path / "student", "--to", "lora", "--out", tmp_path / "out")
    assert_refusal(said, "diffusers puts no LoRA weights on a PixArtSigmaPipeline; export to diffusers")
    assert not (tmp_path / "out").exists()


# ---- faster drawing --------------------------------------------------------------------------------------------------


def test_channels_last_and_compile_draw_the_same(full, monkeypatch):
    seen, ordinary = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net: seen.append(net) or ordinary(net, backend="eager"))
    fast, slow = load_student(full, compile=True, channels_last=True), load_student(full)
    assert seen == [fast.model.net.unet]
    assert fast.model.net.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    cond = slow.model.encode(PROMPTS)
    for steps in (1, 4):
        torch.testing.assert_close(fast.latents(cond, 3, steps), slow.latents(cond, 3, steps), rtol=0, atol=1e-4)


def test_attention_that_is_differentiated_on_a_cpu_is_in_float32():
    """The kernels of bfloat16 are many times slower backward there, and quicker forward."""
    q, k, v = torch.randn(3, 1, 2, 30, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    attend = torch.nn.functional.scaled_dot_product_attention
    wide, plain = attend(q.float(), k.float(), v.float()).bfloat16(), attend(q, k, v)
    assert not torch.equal(wide, plain)
    with plain_attention(q):
        assert torch.equal(attend(q, key=k, value=v), wide)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attend(q.float(), k.float(), v), wide)
    with fused_attention(), plain_attention(q):
        assert torch.equal(attend(q, k, v), plain)
    with torch.no_grad(), plain_attention(q):
        assert torch.equal(attend(q, k, v), plain)


def test_a_tiny_decoder_takes_the_place_of_the_decoder(full, tmp_path):
    other = tiny_pipeline(seed=5).vae
    other.save_pretrained(tmp_path / "tiny")
    student, usual = load_student(full, tiny_decoder=tmp_path / "tiny"), load_student(full)
    latents = usual.latents(usual.model.encode(PROMPTS), 1)
    expected = other.decode(latents, return_dict=False)[0].div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(student.model.decode(latents), expected)
    assert (student.model.decode(latents) - usual.model.decode(latents)).abs().max() > 1e-3
    with pytest.raises(onestroke.InputError, match="decodes 16 channels; give an AutoencoderTiny of 4 channels"):
        load_student(full, tiny_decoder=BUILT_IN / "emoji64" / "vae")
    for wrong in (tmp_path / "none", full, full / "unet"):
        with pytest.raises(onestroke.InputError, match=r"tiny_decoder .*(could not be read|lacks weights)"):
            load_student(full, tiny_decoder=wrong)


# ---- what stands beside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["diffusers", "lora", "onnx"])
def test_the_model_card_says_how_to_draw(full, pipeline_folder, tmp_path, to):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    (shutil.copytree(full, tmp_path / "student") / "report.json").write_text(
        json.dumps({"student, 1 step": {"kid": 0.25, "retrieval": 0.5}, "prompts": 3})
    )
    out, space = onestroke.export(tmp_path / "student", to=to, out=tmp_path / "out"), {}
    exec(usage(out).replace('"tiny"', f'"{pipeline_folder}"'), space)
    assert space["image"].size == (16, 16)
    text = (out / "README.md").read_text()
    for part in ("arXiv 2312.05239", "6 prompts; no real images", "| student, 1 step | 0.25 | 0.5 |"):
        assert part in text
    assert str(pipeline_folder.parent) not in text, "a card names no folder of its author's"


def test_the_head_of_the_card_is_valid_for_the_hub(full):
    from huggingface_hub import ModelCard

    head = ModelCard.load(full / "README.md").data
    assert (head.library_name, head.pipeline_tag, head.license) == ("diffusers", "text-to-image", "unknown")
    card = {"teacher": "org/name", "method": "swiftbrush", "teacher_licence": {"license": "openrail++"}}
    text = model_card.front_matter(card, "lora")
    head = ModelCard(text).data
    assert (head.base_model, head.license, head["base_model_relation"]) == ("org/name", "openrail++", "adapter")


def test_the_data_use_of_a_method_with_images():
    assert model_card.data_use("dmd2", {"prompts": 9}) == "9 prompts, real images, whose captions are the prompts"
    assert model_card.data_use("swiftbrush", {}) == "prompts; no real images"
    assert model_card.data_use("a method of old", {}) == "unknown"


def test_the_licence_of_a_teacher(tmp_path, pipeline_folder):
    assert model_card.licence_of("emoji64") == {
        "license": "other",
        "words": "Apache-2.0; artwork MIT, Apache-2.0, CC-BY-4.0",
    }
    assert model_card.licence_of(str(pipeline_folder)) == model_card.licence_of("no such thing") == {}
    (tmp_path / "README.md").write_text('---\nlicense: other\nlicense_name: "my-own"\ntags:\n- x\n---\nlicense: no\n')
    assert model_card.licence_of(tmp_path) == {"license": "other", "license_name": "my-own"}


def test_distill_fails_when_its_pipeline_draws_something_else(
    command, pipeline_folder, prompt_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("onestroke.students.student.merged", lambda net: load_teacher(pipeline_folder).net)
    words = ["--prompts", prompt_file, "--steps", "2", "--batch-size", "2", "--set", "lr=0.1", "--set", "log_with=none"]
    said = command("distill", pipeline_folder, "--method", "swiftbrush", "--out", tmp_path / "run", *words)
    assert said.code == 2
    assert re.fullmatch(r"error: .*run does not draw what the student draws: latents differ by .*\n", said.err), (
        said.err
    )
    assert parity(tmp_path / "run")["passed"] is False


def test_export_fails_when_the_scheduler_takes_other_times(command, full, tmp_path):
    student = several(full, tmp_path / "student", 4)
    edit(student / "scheduler" / "scheduler_config.json", original_inference_steps=50)
    said = command("export", student, "--to", "diffusers", "--out", tmp_path / "out")
    assert_refusal(said, "takes the timesteps 999,", "trained at 999, 749, 499, 249.")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def assert_refused(command, tmp_path):
    def call(*words, says: tuple[str, ...]) -> None:
        before = digest(tmp_path)
        assert_refusal(command("export", *words), *says)
        assert digest(tmp_path) == before

    return call


def test_export_writes_one_line(command, full, tmp_path):
    said = command("export", full, "--to", "diffusers", "--out", tmp_path / "new" / "out")
    assert (said.code, said.out, said.err) == (0, f"diffusers: {tmp_path / 'new' / 'out'}\n", "")


def test_export_of_what_is_no_student(assert_refused, full, pipeline_folder, tmp_path):
    out = ("--to", "diffusers", "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "none", *out, says=("no such folder",))
    assert_refused(tmp_path / "empty", *out, says=("is no student",))
    assert_refused(pipeline_folder, *out, says=("is no student",))
    assert_refused(BUILT_IN / "emoji64", *out, says=("is a teacher, not a student",))
    adapter = onestroke.export(full, to="lora", out=tmp_path / "lora", rank=2)
    assert_refused(adapter, *out, says=("is a student exported to lora",))
    with pytest.raises(onestroke.InputError, match="exported to lora"):
        load_student(adapter)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--to", "lroa"), ("unknown export format 'lroa'", "Did you mean 'lora'?")),
        (("--to", "diffusers", "--dtype", "float61"), ("unknown dtype 'float61'", "Did you mean 'float16'?")),
        (("--to", "onnx", "--dtype", "float16"), ("--dtype goes with --to diffusers, not --to onnx",)),
        (("--to", "diffusers", "--rank", "4"), ("--rank goes with --to lora",)),
        (("--to", "lora", "--rank", "0"), ("--rank 0 must be at least 1",)),
        (("--to", "sprint"), ("a StableDiffusionPipeline is no SanaPipeline",)),
        (("--to", "lora", "--base", "emojy64"), ("unknown teacher", "Did you mean 'emoji64'?")),
        (("--to", "lora", "--base", "emoji64"), ("'emoji64' is another base", "--base")),
    ],
)
def test_export_words(assert_refused, full, tmp_path, words, says):
    assert_refused(full, *words, "--out", tmp_path / "out", says=says)


def test_export_into_a_folder_with_files(assert_refused, full, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert_refused(full, "--to", "lora", "--out", tmp_path / "out", says=("is not empty; choose another --out",))
    assert_refused(full, "--to", "lora", "--out", tmp_path / "out" / "mine.txt", says=("is not empty",))
    assert_refused(full, "--to", "lora", "--out", tmp_path / "out" / "mine.txt" / "x", says=("is a file",))


def test_another_base_of_the_same_shape(assert_refused, adapted, tmp_path):
    other = tmp_path / "other"
    tiny_pipeline(seed=1).save_pretrained(other)
    assert_refused(
        adapted, "--to", "lora", "--base", other, "--out", tmp_path / "out", says=("is another base", "--base")
    )
    edit(shutil.copytree(adapted, tmp_path / "moved") / "onestroke.json", teacher=str(tmp_path / "gone"))
    assert_refused(
        tmp_path / "moved",
        "--to",
        "lora",
        "--out",
        tmp_path / "out",
        says=("is not there any more; give it with --base",),
    )


def test_onnx_without_the_extra(assert_refused, full, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    assert_refused(full, "--to", "onnx", "--out", tmp_path / "out", says=("pip install 'onestroke[onnx]'",))
