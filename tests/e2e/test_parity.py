"""Plain diffusers draws what onestroke draws: from the written folder, with one generator per picture."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import PROMPTS, tiny_pipeline
from onestroke.sampling import FewStep
from onestroke.students.student import Student, load_student, save_student
from onestroke.teachers.pipeline import PipelineTeacher

SEED = 40
KINDS = {  # diffusers' name of the prediction: zero terminal SNR or not
    "v_prediction": True,
    "epsilon": False,
    "sample": True,
}


def write_student(folder, prediction_type: str, zero_snr: bool, steps: int = 1, renoise: str = "fresh") -> None:
    """A student as `distill` writes it, with weights that are not its teacher's."""
    teacher = PipelineTeacher(tiny_pipeline(prediction_type, zero_snr), prediction_type)
    net, generator = copy.deepcopy(teacher.net), torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    few = FewStep(teacher.path, teacher.path.grid(steps), renoise=renoise)
    save_student(teacher, net, few, folder, {"method": "none", "teacher": prediction_type})


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / request.param
    write_student(out, request.param, KINDS[request.param])
    return out


@pytest.fixture(scope="module")
def student(folder) -> Student:
    return load_student(folder)


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    return plain


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(SEED + i) for i in range(count)]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_diffusers_draws_what_onestroke_draws(student, pipeline, steps):
    prompts = PROMPTS[:3]
    latents = student.latents(student.model.encode(prompts), SEED, steps)
    ours = student.model.decode(latents)
    calls = {"num_inference_steps": steps, "guidance_scale": 1.0}
    theirs = pipeline(prompts, generator=generators(3), output_type="pt", **calls).images
    assert ours.shape == theirs.shape == (3, 3, 16, 16)
    assert ours.std() > 0.01, "a blank picture proves nothing"
    assert (ours - theirs).abs().max() <= 1e-4
    raw = pipeline(prompts, generator=generators(3), output_type="latent", **calls).images
    assert (latents - raw).abs().max() <= 1e-4 * latents.abs().max().clamp(min=1)
    if steps > 1:
        once = student.latents(student.model.encode(prompts), SEED, 1)
        assert (once - latents).abs().max() > 1e-2, "more steps change nothing"


@pytest.mark.parametrize("steps", [1, 4])
def test_a_picture_depends_on_its_own_seed_alone(student, steps):
    cond = student.model.encode(PROMPTS)
    together = student.latents(cond, SEED, steps)
    for i in range(len(PROMPTS)):
        alone = student.latents({k: v[i : i + 1] for k, v in cond.items()}, SEED + i, steps)
        assert (alone[0] - together[i]).abs().max() <= 1e-5 * together.abs().max().clamp(min=1)
    assert (student.latents(cond, SEED + 1, steps) - together).abs().max() > 1e-2


def test_pil_images_do_not_depend_on_the_batch_size(student):
    together, alone = (student(PROMPTS, seed=SEED, batch_size=size) for size in (6, 1))
    for one, other in zip(together, alone, strict=True):
        difference = torch.tensor(list(one.tobytes())) - torch.tensor(list(other.tobytes()))
        assert difference.abs().max() <= 1
    assert len({image.tobytes() for image in together}) == len(PROMPTS)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_student_of_several_steps_takes_them_by_itself(tmp_path, steps):
    write_student(tmp_path / "student", "v_prediction", True, steps)
    student = load_student(tmp_path / "student")
    assert len(student.few.times) == steps
    cond = student.model.encode(PROMPTS[:2])
    assert torch.equal(student.latents(cond, SEED), student.latents(cond, SEED, steps))
    assert student.few.times == tuple((1000 - 1000 // steps * i - 1) / 999 for i in range(steps))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_student_that_keeps_its_own_noise_is_a_ddim_pipeline(tmp_path, kind, steps):
    from diffusers import DiffusionPipeline

    write_student(tmp_path / "student", kind, KINDS[kind], steps, "implied")
    student, plain = load_student(tmp_path / "student"), DiffusionPipeline.from_pretrained(tmp_path / "student")
    plain.set_progress_bar_config(disable=True)
    assert student.few.renoise == "implied"
    latents = student.latents(student.model.encode(PROMPTS[:3]), SEED)
    calls = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    raw = plain(PROMPTS[:3], generator=generators(3), **calls).images
    assert (latents - raw).abs().max() <= 1e-4 * latents.abs().max().clamp(min=1)


def test_the_scheduler_starts_where_the_student_was_trained(pipeline):
    for steps, first in ((1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])):
        pipeline.scheduler.set_timesteps(steps)
        assert pipeline.scheduler.timesteps.tolist() == first
