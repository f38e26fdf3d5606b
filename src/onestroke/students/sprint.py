"""A student of a SANA teacher as diffusers' own SanaSprintPipeline, whose scheduler counts in angles."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from torch import Tensor

from onestroke.denoiser import Told, TwoTimes
from onestroke.errors import InputError
from onestroke.sampling import FewStep
from onestroke.students.student import Student
from onestroke.teachers.calls import clock

MAX_STEPS = 4


def check_sprint(pipeline: str, steps: int) -> None:
    """Refuse a student of another pipeline's class than SANA's, or other numbers of steps. Raises InputError."""
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"a SanaSprintPipeline of a student draws in 1 to {MAX_STEPS} steps, not {steps}.")
    if pipeline != SanaPipeline.__name__:
        raise InputError(f"a {pipeline} is no SanaPipeline, whose students alone a SanaSprintPipeline draws.")


def sprint_call(steps: int) -> dict[str, Any]:
    """The keyword arguments with which a SanaSprintPipeline draws in `steps` calls: its own, but for 2 steps it takes
    an angle between and for others none."""
    return {"num_inference_steps": steps, "intermediate_timesteps": 1.3 if steps == 2 else None}


def sprint_times(steps: int) -> Tensor:
    """The times (steps,) of the flow that a SanaSprintPipeline tells its network, float32: sin / (sin + cos) of the
    angles 1.5708 and 1.3, or of equal steps from 1.5708 to 0. The first is 4e-6 beyond 1."""
    scheduler: Any = SCMScheduler()
    call = sprint_call(steps)
    scheduler.set_timesteps(steps, intermediate_timesteps=call["intermediate_timesteps"])
    angle = scheduler.timesteps[:-1]
    return angle.sin() / (angle.sin() + angle.cos())


def sprint_few(student: Student, steps: int) -> FewStep:
    """How a student is called to draw what `sana_sprint` draws: at those times, with fresh noise."""
    return FewStep(student.model.path, tuple(sprint_times(steps).double().clamp(max=student.model.path.t_max).tolist()))


def read_as(net: TwoTimes, told: Told, embed: Any, scale: float) -> None:
    """Let a pipeline's embedding of guidance, which is given guidance_scale times `scale`, add to that of time what
    `net` does, over the range that it was `told`.

    That embedding is sinusoids and two layers. The first becomes steps along the range and a little beyond, the second
    the least squares of what `net` adds on them: to 1e-5 of it.
    """
    first, last = embed.guidance_embedder.linear_1, embed.guidance_embedder.linear_2
    guidance = torch.linspace(told.scale - told.reach, told.scale + told.reach, 257, dtype=torch.float64)
    seen = embed.guidance_condition_proj((guidance * scale).to(first.weight))
    rows = torch.cat([seen.double().cpu(), torch.ones(257, 1)], 1)
    *line, start = torch.linalg.pinv(rows, rtol=1e-4) @ torch.linspace(-1, 1, 257, dtype=torch.float64)
    first.weight.copy_(4 * torch.stack(line).expand(len(first.weight), -1))
    first.bias.copy_(4 * (start - torch.linspace(-1.6, 1.6, len(first.bias), dtype=torch.float64)))
    rows = torch.cat([F.silu(first(seen)).double().cpu(), torch.ones(257, 1)], 1)
    wanted = net.added((guidance - told.scale) / told.slope).double().cpu()
    *weight, bias = torch.linalg.pinv(rows, rtol=1e-7) @ wanted
    last.weight.copy_(torch.stack(weight).T)
    last.bias.copy_(bias)


@torch.no_grad()
def sana_sprint(student: Student, steps: int | None = None) -> Any:
    """A SanaSprintPipeline with SCMScheduler that draws in `steps` calls what the student draws at `sprint_times`.

    steps: 1 to 4, by default the student's. Call it with `sprint_call(steps)`, the pictures' height and width, and
    use_resolution_binning=False; write it by its save_pretrained. Both take the flow through the same points, so that
    the network stays as it is but for two embeddings. Guidance: of a student that was told it, the pipeline reads its
    guidance_scale in the range of training (see `read_as`); of others, what would be added for it is zero, whatever is
    given. Time: the pipeline tells it as a number to 1, a teacher
    reads it to 1000; the first layer after the sinusoids is the smallest that answers the same at these times, and
    does not at others. That of four steps has weights of hundreds: it needs float32.
    Raises InputError for a student of another pipeline, and for other numbers of steps.
    """
    model, steps = student.model, len(student.few.times) if steps is None else steps
    check_sprint(type(model.pipeline).__name__, steps)
    net: Any = getattr(model.net, model.part)
    twin: Any = SanaTransformer2DModel.from_config({**net.config, "guidance_embeds": True})
    twin.to(net.device, net.dtype)
    old = "time_embed.emb.timestep_embedder."
    twin.load_state_dict(
        {k.replace(old, "time_embed.timestep_embedder."): v for k, v in net.state_dict().items()}, strict=False
    )
    embed = twin.time_embed
    for p in embed.guidance_embedder.linear_2.parameters():
        p.zero_()
    if student.told is not None:
        read_as(cast(TwoTimes, student.net), student.told, embed, net.config.guidance_embeds_scale)
    told, t = sprint_times(steps).to(net.device), sprint_few(student, steps).times
    time = clock(model.path, torch.tensor(t, dtype=torch.float64, device=net.device))
    seen, read = (embed.time_proj(v.float()).double() for v in (told, model.call.scale * time + model.call.offset))
    layer = embed.timestep_embedder.linear_1
    layer.weight.copy_((torch.linalg.pinv(seen, rtol=1e-12) @ read @ layer.weight.double().T).T)
    parts = {k: getattr(model.pipeline, k) for k in ("tokenizer", "text_encoder", "vae")}
    pipeline: Any = SanaSprintPipeline(**parts, transformer=twin.eval(), scheduler=SCMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
