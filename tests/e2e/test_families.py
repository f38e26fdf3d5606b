"""Every family of pipelines: read from disk as a user does, taught from, and written as what plain diffusers draws."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from families import FAMILIES, pipeline_of
from onestroke.denoiser import Guided, fused_attention, tap
from onestroke.paths import Flow
from onestroke.sampling import FewStep
from onestroke.students.student import SeededNoise, Student, load_student, save_student
from onestroke.teachers.dit import block_names
from onestroke.teachers.pipeline import PipelineTeacher

SEED = 40
PROMPTS = ["a red square", "rain"]
every = pytest.mark.parametrize("name", FAMILIES)


class PlainNoise(SeededNoise):
    """The noise of a pipeline that gives its scheduler no generator: after the first, torch's own, as it is packed."""

    def __init__(self, teacher: PipelineTeacher):
        super().__init__(len(PROMPTS), SEED)
        self.call, self.shape = teacher.call, teacher.shape

    def normal(self, like):
        if isinstance(like, tuple):
            return super().normal(like)
        packed = like if self.call.order is None else self.call.pack(like)
        return self.call.latents(torch.randn(packed.shape), self.shape)


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
    x0, call = ours(model, net, few, seeded), model.plain_call(few)
    images = model.decode(x0)
    assert images.shape == (2, 3, *model.size)
    assert images.std() > 0.01, "a blank picture proves nothing"
    assert (images[0] - images[1]).abs().max() > 0.01
    latents = theirs(pipeline, call, "latent")
    latents = latents if model.call.order is None else model.call.latents(latents, model.shape)
    assert (latents - x0).abs().max() <= 1e-4 * x0.abs().max().clamp(min=1)
    assert (theirs(pipeline, call, "pt") - images).abs().max() <= 1e-4


@every
def test_a_student_on_disk_is_a_plain_pipeline_that_draws_the_same(name, teachers, tmp_path):
    """One step, and more than it was made for."""
    teacher, seeded = teachers[name], teachers[name].caller.seeded
    few = FewStep(teacher.path, teacher.path.grid(1))
    save_student(teacher, moved(teacher), few, tmp_path / "student", {"method": "none"})
    student, plain = load_student(tmp_path / "student"), DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert student.model.size == teacher.size
    assert student.card["call"] == json.loads(json.dumps(teacher.plain_call(few)))
    for steps in (1, 2, 4):
        few = FewStep(student.model.path, student.model.path.grid(steps))
        check_parity(student.model, student.model.net, few, plain, seeded)


@every
@pytest.mark.parametrize("steps", [2, 4])
def test_a_student_of_several_steps_takes_its_own_times(name, steps, teachers):
    """The exported scheduler's times are those of training, and read again they stay so."""
    teacher, seeded = teachers[name], teachers[name].caller.seeded
    net, few = moved(teacher), FewStep(teacher.path, teacher.path.grid(steps))
    plain = teacher.student_pipeline(net, few)
    check_parity(teacher, net, few, plain, seeded)
    read = PipelineTeacher(plain, name, FAMILIES[name].size)
    assert read.path.grid(steps) == pytest.approx(few.times, abs=1e-6)
    assert Student(read, {"student_steps": steps}).few.renoise == "fresh"
    if isinstance(teacher.path, Flow):
        euler = FewStep(teacher.path, few.times, renoise="implied")
        check_parity(teacher, net, euler, teacher.student_pipeline(net, euler), True)


@every
def test_guidance_is_the_pipelines_own(name, teachers):
    """One step of the plain pipeline under guidance is one step of the guided teacher: its null condition is theirs.

    Lumina 2 and Qwen-Image scale the guided flow to the norm of the plain one: the one is asked not to, the other's
    scale is undone.
    """
    teacher, scale = teachers[name], 3.0
    few = FewStep(teacher.path, teacher.path.grid(1))
    plain, noise = teacher.student_pipeline(teacher.net, few), SeededNoise(len(PROMPTS), SEED).normal(teacher.shape)
    plain.set_progress_bar_config(disable=True)
    cond = teacher.encode(PROMPTS)
    with torch.no_grad():
        guided = few.sample(Guided(teacher.net, scale, teacher.null), noise, cond)
        unguided = few.sample(teacher.net, noise, cond)
    call = {"num_inference_steps": 1, **teacher.caller.keywords(scale, len(PROMPTS))}
    if name == "lumina2":
        call["cfg_normalization"] = False
    found = theirs(plain, call, "latent")
    if name == "qwen-image":
        packed = [teacher.call.pack(v) for v in (noise, unguided, guided)]
        velocity = packed[0] - packed[2]
        norm = (packed[0] - packed[1]).norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True)
        guided = teacher.call.answer(packed[0] - velocity * norm, teacher.shape)
    found = found if teacher.call.order is None else teacher.call.answer(found, teacher.shape)
    assert (found - guided).abs().max() <= 1e-4 * guided.abs().max().clamp(min=1)
    assert (guided - unguided).abs().max() > 1e-3, "guidance changes nothing"


@every
def test_features_are_those_of_the_picture(name, teachers):
    """Channels first; of a transformer one feature per quarter, with a place per patch where text is kept apart."""
    teacher = teachers[name]
    net = copy.deepcopy(teacher.net)
    net.tapping = False
    with torch.no_grad():
        x = torch.randn(2, *teacher.shape)
        given = x, torch.full((2,), 0.5, dtype=torch.float64), teacher.encode(PROMPTS)
        assert net(*given).features == (), "nobody asked for them"
        est = tap(net)(*given)
    assert len(est.features) == len(teacher.net.taps)
    middle = est.features[teacher.net.bottleneck]
    if teacher.part == "unet":
        assert middle.flatten(2).shape[2] == min(f.flatten(2).shape[2] for f in est.features)
        return
    depth = len(block_names(teacher.net.transformer))
    assert len(est.features) == min(depth, 4)
    places = teacher.shape[1] * teacher.shape[2] // (1 if name == "sana" else 4)
    joint = name in ("lumina2", "z-image")
    for feature in est.features:
        assert feature.shape[:2] == middle.shape[:2]
        assert (feature.shape[2] > places) if joint else (feature.shape[2] == places)


@pytest.mark.parametrize("name", ["sd3", "flux-guided", "z-image", "qwen-image"])
def test_a_picture_depends_on_its_own_prompt_alone(name, teachers):
    """Whatever stands beside it in the batch, and however long that is."""
    teacher = teachers[name]
    prompts = ["rain", "a very long prompt indeed of many words", ""]
    noise, t = SeededNoise(3, 0).normal(teacher.shape), torch.full((1,), 0.7, dtype=torch.float64)
    cond = teacher.encode(prompts)
    with torch.no_grad():
        together = teacher.net(noise, t.expand(3), cond).x0
        for i in range(3):
            alone = teacher.net(noise[i : i + 1], t, teacher.encode([prompts[i]])).x0
            assert (together[i] - alone[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("forward", [False, True])
def test_the_zeros_of_an_sd3_without_its_third_encoder_count_as_one_token(forward):
    """Output, features and gradients (or the derivative along x and t) are those of all the tokens."""
    pipeline = pipeline_of("sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    teacher = PipelineTeacher(pipeline, "silent")
    net, cond = tap(teacher.net.requires_grad_()), {k: v.clone() for k, v in teacher.encode(PROMPTS).items()}
    x, t = torch.randn(2, *teacher.shape), torch.tensor([0.3, 0.8], dtype=torch.float64)
    lengths = []
    net.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )

    def found() -> list[Tensor]:
        if forward:
            given = (x, t), (torch.ones_like(x), torch.ones_like(t))
            return list(torch.func.jvp(lambda x, t: net(x, t, cond).x0, *given))
        net.zero_grad(set_to_none=True)
        y = x.clone().requires_grad_()
        est = net(y, t, cond)
        (est.x0**3).sum().backward()
        return [est.x0, *est.features, y.grad, *(p.grad for p in net.parameters() if p.grad is not None)]

    with fused_attention():
        whole = found()
    short = found()
    assert lengths[0] - lengths[1] == 255 == net.call.silent - 1
    assert len(whole) == len(short) > 1
    for one, other in zip(short, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * (1 + other.abs().max().item()))
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, cond).x0, short[0], rtol=1e-4, atol=1e-5)
        net.call.silent -= 100
        cond["text"] = cond["text"][:, :-100]
        assert (net(x, t, cond).x0 - short[0]).abs().max() > 1e-3, "how many there are matters"


def test_an_sd3_with_its_third_encoder_has_no_zeros(teachers):
    assert teachers["sd3"].net.call.silent == 0
