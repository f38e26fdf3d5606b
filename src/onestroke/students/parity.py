"""Whether what was written draws what the student draws: from the same noise, by libraries other than this one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onestroke.errors import ExportError
from onestroke.paths import Flow, Table
from onestroke.sampling import FewStep
from onestroke.students.student import SeededNoise
from onestroke.teachers.branch import BRANCH, read_branch
from onestroke.teachers.calls import clock
from onestroke.teachers.nasa import steered
from onestroke.teachers.pipeline import PipelineTeacher, absent, no_bars

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Measured on emoji64, in 1 and 4 steps: 1e-6, 0.0057 and 0.12, the last two of single pixels.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}
GRIDS = (1, 2, 4, 8)  # numbers of steps that one scheduler may serve
PROMPTS = ["a red apple", "a cat on a mat"]  # of the comparison; picture i has seed i


class Drawn(NamedTuple):
    """What one sampler drew of PROMPTS, float32 on the CPU."""

    latents: Tensor  # (B, C, H, W)
    images: Tensor  # (B, 3, H', W') in [0, 1]


@contextmanager
def exact():
    """Float32 products as such: no TF32, so that two orders of the same sum agree to rounding."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


class PlainNoise(SeededNoise):
    """The noise of a plain pipeline called with generators of seeds 0, 1, ...: the first is theirs, of type `dtype`.

    Later noise is of type `later`, and theirs too; or, of pipelines that keep their generators from their scheduler,
    torch's own (`own`), laid out as the latents are packed.
    """

    def __init__(self, model: PipelineTeacher, dtype: torch.dtype, later: torch.dtype, own: bool):
        super().__init__(len(PROMPTS), 0, dtype)
        self.model, self.later, self.own, self.first = model, later, own, True

    def normal(self, like: Tensor | tuple[int, ...]) -> Tensor:
        if self.first or isinstance(like, tuple) or not self.own:
            rows = super().normal(like)
            self.dtype, self.first = self.later, False
            return rows
        call = self.model.call
        packed = like if call.order is None else call.pack(like)
        rows = torch.randn(packed.shape, device=like.device, dtype=self.later).to(like)
        return call.latents(rows, self.model.shape)


def noises(model: PipelineTeacher, few: FewStep, dtype: torch.dtype) -> Iterator[PlainNoise]:
    """What a plain pipeline of this type may draw its noise as; which it is, is its own affair."""
    types = dict.fromkeys([dtype, torch.float32])
    fresh = len(few.times) > 1 and few.renoise == "fresh"
    for own in (False, True) if fresh else (False,):
        for first in types:
            yield from (PlainNoise(model, first, later, own) for later in (types if fresh else [first]))


def by_training_sampler(
    model: PipelineTeacher, net: nn.Module, few: FewStep, noise: SeededNoise | None = None
) -> Drawn:
    """What `few` draws with `net` from this noise; prompts and decoder are the model's."""
    device, noise = next(net.parameters()).device, noise or SeededNoise(len(PROMPTS), 0)
    with exact():
        cond = {k: v.to(device) for k, v in model.encode(PROMPTS).items()}
        first = noise.normal(torch.empty(len(PROMPTS), *model.shape, device=device))
        x0 = few.sample(net.eval(), first, cond, noise)
        images = model.decode(x0.to(next(model.components["vae"].parameters()).device))
    return Drawn(x0.float().cpu(), images.float().cpu())


def by_diffusers(pipeline: Any, model: PipelineTeacher, keywords: Mapping[str, Any]) -> Drawn:
    """What a plain diffusers pipeline draws, called with these keyword arguments; its latents are laid out as
    `model`'s."""
    pipeline.set_progress_bar_config(disable=True)

    def call(kind: str) -> Tensor:
        torch.manual_seed(0)
        generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        return pipeline(list(PROMPTS), generator=generators, output_type=kind, **keywords).images

    with exact():
        latents = call("latent")
        latents = latents if model.call.order is None else model.call.latents(latents, model.shape)
        return Drawn(latents.float().cpu(), call("pt").float().cpu())


def closest(drawn: Drawn, model: PipelineTeacher, net: nn.Module, few: FewStep, dtype: str) -> Drawn:
    """What `few` draws with `net` from the noise that the plain pipeline took."""
    found: list[tuple[float, Drawn]] = []
    for noise in noises(model, few, DTYPES[dtype]):
        torch.manual_seed(0)
        reference = by_training_sampler(model, net, few, noise)
        far = max(gap(reference, drawn).values())
        if far <= TOLERANCE[dtype]:
            return reference
        found.append((math.inf if math.isnan(far) else far, reference))
    return min(found, key=lambda pair: pair[0])[1]


def timesteps(scheduler: Any, path: Table | Flow, trained: tuple[float, ...]) -> list[float]:
    """The scheduler's timesteps after a draw. Raises ExportError where they are not those of the training."""

    def compare(times: tuple[float, ...]) -> None:
        wanted = clock(path, torch.tensor(times, dtype=torch.float64)).tolist()
        found = scheduler.timesteps.tolist()
        if len(found) != len(wanted) or any(abs(a - b) > 0.01 for a, b in zip(found, wanted, strict=True)):
            wrong, right = (", ".join(f"{t:g}" for t in line) for line in (found, wanted))
            raise ExportError(f"the scheduler takes the timesteps {wrong}; the student was trained at {right}.")

    compare(trained)
    taken = scheduler.timesteps.tolist()
    most = scheduler.config.get("original_inference_steps")
    if most and scheduler.config.num_train_timesteps % most == 0:  # it serves several numbers of steps
        for steps in (k for k in GRIDS if most % k == 0):
            scheduler.set_timesteps(steps)
            compare(path.grid(steps))
    return taken


def gap(reference: Drawn, drawn: Drawn) -> dict[str, float]:
    """The largest differences: of latents over the larger of 1 and their peak, and of images in [0, 1]."""
    if reference.latents.shape != drawn.latents.shape or reference.images.shape != drawn.images.shape:
        return {"latents": float("inf"), "images": float("inf")}
    peak = reference.latents.abs().max().clamp_min(1)
    return {
        "latents": ((drawn.latents - reference.latents).abs().max() / peak).item(),
        "images": (drawn.images - reference.images).abs().max().item(),
    }


def check(out: Path, reference: Drawn, drawn: Drawn, few: FewStep, kind: str, dtype: str = "float32", **more: Any):
    """Write `out`/parity.json. Raises ExportError when the two differ by more than the type's tolerance."""
    found, tolerance = gap(reference, drawn), TOLERANCE[dtype]
    passed = all(value <= tolerance for value in found.values())
    libraries = [
        "onestroke",
        "torch",
        "diffusers",
        "transformers",
        "peft",
        *(["onnxruntime"] if kind == "onnx" else []),
    ]
    about = {
        "passed": passed,
        "max_abs_difference": found,
        "tolerance": tolerance,
        "format": kind,
        "dtype": dtype,
        "steps": len(few.times),
        "prompts": PROMPTS,
        "seeds": list(range(len(PROMPTS))),
        **more,
        "versions": {name: metadata.version(name) for name in libraries},
    }
    (out / "parity.json").write_text(json.dumps(about, indent=2) + "\n")
    if not passed:
        raise ExportError(
            f"{out} does not draw what the student draws: latents differ by {found['latents']:.2g}, images by "
            f"{found['images']:.2g}, and {tolerance:g} is allowed; {out / 'parity.json'} holds the figures."
        )


def open_plain(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline as anyone opens it, without onestroke."""
    from diffusers import DiffusionPipeline

    with no_bars():
        missing = absent(DiffusionPipeline.load_config(folder))
        return DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, **missing)


@contextmanager
def same_luck() -> Iterator[None]:
    """Leave torch's own random numbers as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        yield


def check_pipeline(
    out: Path, pipeline: Any, model: PipelineTeacher, net: nn.Module, few: FewStep, kind: str, **more: Any
):
    """Compare what a plain pipeline draws with what `few` draws with `net`; see `check`.

    Where a negative-prompt branch is written in `out`, with that on it, and "without_branch" is what it makes out. Of a
    student whose encoder runs once, what `few` draws with the networks of that pipeline: its own sampler would run the
    encoder in every step.
    """
    dtype, network = more.get("dtype", "float32"), getattr(pipeline, model.part)
    with same_luck():
        pipeline = pipeline.to(next(net.parameters()).device)
        if few.ahead:
            pipeline.scheduler.set_timesteps(len(few.times))
            read = PipelineTeacher(pipeline, str(out), model.size)
            drawn, reference = (by_training_sampler(m, n, few) for m, n in ((read, read.net), (model, net)))
            more["sampler"] = "onestroke"
        else:
            call = model.plain_call(few)
            drawn = by_diffusers(pipeline, model, call)
            if (out / BRANCH).is_file():
                bare, branch = drawn, read_branch(out / BRANCH, network)
                with steered(network, model.call, {}, branch):
                    drawn = by_diffusers(pipeline, model, call)
                more["without_branch"] = gap(drawn, bare)
            reference = closest(drawn, model, net, few, dtype)
    check(
        out, reference, drawn, few, kind, **{"timesteps": timesteps(pipeline.scheduler, model.path, few.times), **more}
    )
