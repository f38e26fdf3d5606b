"""UNets in two halves, and the students whose encoder runs once."""

from __future__ import annotations

import copy
import json
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from PIL import Image
from torch import nn

import onestroke as library
from conftest import PROMPTS, tiny_pipeline
from onestroke.denoiser import plain_attention
from onestroke.errors import InputError
from onestroke.sampling import FewStep
from onestroke.settings import Settings
from onestroke.students.model_card import text_of
from onestroke.students.parity import by_diffusers, by_training_sampler, gap, open_plain
from onestroke.students.sample import sample
from onestroke.students.student import SeededNoise
from onestroke.teachers.pipeline import PipelineTeacher, UNetDenoiser
from onestroke.training.roles import make_role

UNETS = ("sd15", "sd21", "sdxl")
SMALL = {"method": "tiue", "steps": 2, "batch_size": 2, "log_with": "none", "lr": 1e-2, "ema": 0.0}
LORA = Settings(lora_rank={"student": 4}, lora_targets=["to_q", "to_v", "conv1"])


def whole_and_halved(net, x, cond):
    """The same call of the network itself and of its halves: the estimate, then the gradient of all that is trained."""
    t = torch.full((len(x),), 0.7, dtype=torch.float64)
    for time in (t, t[:, None]):
        est = net(x, time, cond)
        loss = est.x0.square().mean() + est.eps.sin().mean()
        net.zero_grad()
        with plain_attention(loss):
            loss.backward()
        yield est.x0.flatten(), est.eps.flatten(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)


def assert_halves(net, x, cond):
    """The estimate bit for bit, and the gradient to rounding: that of the time's embedding comes from both halves."""
    whole, halved = whole_and_halved(copy.deepcopy(net).double(), x.double(), cond)
    assert len(whole) > 3
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], halved[:2], strict=True))
    for a, b in zip(whole, halved, strict=True):
        assert (a - b).abs().max() <= 1e-10 * a.abs().max()


@pytest.mark.parametrize("kind", ["full", "lora", "checkpointing"])
@pytest.mark.parametrize("name", UNETS)
def test_the_halves_make_the_whole(name, kind, teachers):
    """With adapters and with gradient checkpointing too."""
    teacher = teachers[name]
    torch.manual_seed(0)
    net = make_role(teacher.net, "student", LORA if kind == "lora" else Settings())
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    if kind == "checkpointing":
        net.unet.enable_gradient_checkpointing()
        net.train()
    cond = teacher.encode(["a red square", "rain"])
    assert_halves(net, SeededNoise(2, 0).normal(teacher.shape), cond)


def test_an_uneven_picture_is_no_matter(pipeline_folder):
    teacher = PipelineTeacher.load(pipeline_folder)
    net = UNetDenoiser(teacher.net.unet, teacher.path, "v").requires_grad_(True)
    assert_halves(net, torch.randn(2, 4, 5, 7), teacher.encode(PROMPTS[:2]))


def replaying(unet):
    """From its second call on, the UNet's encoder answers as it did in the first."""
    known, stack = {}, ExitStack()
    for part in (unet.conv_in, *unet.down_blocks, unet.mid_block):
        handle = part.register_forward_hook(lambda module, args, out: known.setdefault(module, out))
        stack.callback(handle.remove)
    return stack


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_parallel_decoder_draws_as_diffusers_step_by_step(prediction):
    """Against diffusers' own sampler, with an encoder that repeats what it said in the first step."""
    teacher = PipelineTeacher(tiny_pipeline(prediction, prediction != "epsilon"), "tiny")
    few = FewStep(teacher.path, teacher.path.grid(4), renoise="implied", encoder="once")
    ours, plain = by_training_sampler(teacher, teacher.net, few), teacher.student_pipeline(teacher.net, few)
    call = teacher.plain_call(few)
    with replaying(plain.unet):
        frozen = by_diffusers(plain, teacher, call)
    assert gap(ours, frozen)["latents"] <= 1e-5
    assert gap(by_diffusers(plain, teacher, call), frozen)["latents"] > 1e-3, "the encoder says the same in every step"


# ---- students --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pipeline_folder, tmp_path_factory):
    """A student of four steps."""
    out = tmp_path_factory.mktemp("halves") / "student"
    library.distill(str(pipeline_folder), prompts=PROMPTS, out=out, **SMALL)
    return out


def test_a_student_draws_with_one_run_of_its_encoder(folder, tmp_path):
    student, seen = library.load_student(folder), Counter()
    for name in ("conv_in", "down_blocks.0", "mid_block", "up_blocks.0", "conv_out"):
        part = student.model.net.unet.get_submodule(name)
        part.register_forward_hook(lambda m, args, out, n=name: seen.update({n: 1, f"{n} rows": len(_first(out))}))
    found = student.latents(student.model.encode(PROMPTS[:2]), 5)
    assert seen == {
        **dict.fromkeys(("conv_in", "down_blocks.0", "mid_block", "up_blocks.0", "conv_out"), 1),
        **dict.fromkeys(("conv_in rows", "down_blocks.0 rows", "mid_block rows"), 2),
        **dict.fromkeys(("up_blocks.0 rows", "conv_out rows"), 8),
    }
    few = FewStep(student.model.path, student.model.path.grid(4), renoise="implied", encoder="once")
    noise = SeededNoise(2, 5).normal(student.model.shape)
    with torch.no_grad():
        est = few.estimates(student.model.net, noise, student.model.encode(PROMPTS[:2]))
    assert est.eps.shape == (2, 4, *student.model.shape)
    assert torch.equal(found, est.x0[:, -1])
    sample(str(folder), PROMPTS[:1], seed=5, out=tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as page:
        assert page.tobytes() == student(PROMPTS[:1], seed=5)[0].tobytes()


def _first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def test_what_is_written_says_so(folder):
    """The folder is a plain pipeline, whose own sampler draws something else: the card says that, and how to draw."""
    card, parity = (json.loads((folder / f"{name}.json").read_text()) for name in ("onestroke", "parity"))
    assert (card["encoder"], card["renoise"], card["student_steps"]) == ("once", "implied", 4)
    assert (parity["passed"], parity["sampler"]) == (True, "onestroke")
    assert parity["timesteps"] == [999, 749, 499, 249]
    text = text_of(folder)
    assert "1 of the encoder, 4 of the decoder" in text
    assert "from onestroke import load_student" in text
    assert "DiffusionPipeline.from_pretrained" not in text
    assert "runs the encoder in every step: it draws other pictures" in text
    student = library.load_student(folder)
    plain = by_diffusers(open_plain(folder), student.model, student.card["call"])
    assert gap(by_training_sampler(student.model, student.model.net, student.few), plain)["latents"] > 1e-3
    library.export(folder, to="diffusers", out=folder.parent / "exported")
    assert json.loads((folder.parent / "exported" / "parity.json").read_text())["sampler"] == "onestroke"


def test_with_one_step_it_is_an_ordinary_student(pipeline_folder, tmp_path):
    library.distill(str(pipeline_folder), prompts=PROMPTS, out=tmp_path / "one", student_steps=1, **SMALL)
    card, parity = (json.loads((tmp_path / "one" / f"{name}.json").read_text()) for name in ("onestroke", "parity"))
    assert parity["passed"]
    assert "sampler" not in parity
    assert "encoder" not in card
    assert "DiffusionPipeline.from_pretrained" in text_of(tmp_path / "one")
    assert library.load_student(tmp_path / "one")(PROMPTS[:1], negative_prompt="rain")


def test_of_several_students_each_runs_its_encoder_once(pipeline_folder, tmp_path):
    several = library.distill(str(pipeline_folder), prompts=PROMPTS, out=tmp_path, students=2, lora_rank=2, **SMALL)
    cond = several.model.encode(PROMPTS)
    owner, found = several.model.net.router(cond), several.latents(cond, 3)
    for k in range(2):
        alone = library.load_student(tmp_path / f"student-{k}")
        assert alone.few == several.few
        assert alone.few.ahead
        rows = (owner == k).nonzero().flatten()
        assert len(rows)
        assert (alone.latents(cond, 3)[rows] - found[rows]).abs().max() <= 1e-5


def test_what_needs_the_whole_network_is_refused(folder, tmp_path):
    student = library.load_student(folder)
    with pytest.raises(InputError, match="negative prompts do not go with an encoder that runs once"):
        student("rain", negative_prompt="snow")
    with pytest.raises(InputError, match="a ControlNet steers the encoder in every step"):
        student.with_controlnet(nn.Identity())
    with pytest.raises(InputError, match="leave compile out"):
        library.load_student(folder, compile=True)
    with pytest.raises(InputError, match="export to diffusers"):
        library.export(folder, to="lora", out=tmp_path / "lora")
    with pytest.raises(InputError, match="no graph of one step; export to diffusers"):
        library.export(folder, to="onnx", out=tmp_path / "onnx")


def test_a_transformer_is_refused_before_it_is_loaded(teachers, tmp_path, monkeypatch):
    assert teachers["sd3"]
    monkeypatch.setattr("onestroke.teachers.load_teacher", lambda *args: pytest.fail("loaded"))
    with pytest.raises(InputError, match="and SD3Transformer2DModel has none; take a teacher with a UNet"):
        library.distill(str(teachers.root / "sd3"), prompts=PROMPTS, out=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
