"""`export`: a student as a diffusers pipeline, as LoRA weights or as ONNX, each compared with it after writing."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onestroke.errors import ExportError, InputError, read_json, unknown
from onestroke.model_card import write_card
from onestroke.paths import Flow
from onestroke.run import check_empty
from onestroke.sampling import FewStep
from onestroke.student import (
    CARD,
    LORA,
    PlainNoise,
    SeededNoise,
    Student,
    fingerprint,
    load_student,
    read_card,
    save_lora,
    to_pil,
)
from onestroke.teachers import load_teacher, locate
from onestroke.teachers.pipeline import PipelineTeacher, no_bars

TARGETS = ("diffusers", "lora", "onnx")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Measured on emoji64, in 1 and 4 steps: 1e-6, 0.0057 and 0.12, the last two of single pixels.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}
LORA_FILE = "pytorch_lora_weights.safetensors"
RECORDS = (CARD, "recipe.json", "report.json")  # what is known of a student; an export carries it along
GRIDS = (1, 2, 4, 8)  # numbers of steps whose times every artefact is checked for
PROMPTS = ["a red apple", "a cat on a mat"]  # of the comparison; picture i has seed i
RANK = 64


class Drawn(NamedTuple):
    """What one sampler drew of PROMPTS, float32 on the CPU."""

    latents: Tensor  # (B, C, H, W)
    images: Tensor  # (B, 3, H', W') in [0, 1]


@contextmanager
def exact():
    """The same random numbers whenever it is entered, and no TF32: two orders of the same sum agree to rounding."""
    with torch.no_grad(), torch.random.fork_rng(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.manual_seed(0)
        yield


# ---- the comparison --------------------------------------------------------------------------------------------------


def by_training_sampler(
    teacher: PipelineTeacher, net: nn.Module, few: FewStep, dtype: torch.dtype = torch.float32
) -> Drawn:
    """What `few` draws with `net`, from noise of `dtype`; prompts and decoder are the teacher's."""
    device = next(net.parameters()).device
    noise = PlainNoise(teacher, len(PROMPTS), 0, dtype)
    with exact():
        cond = {k: v.to(device) for k, v in teacher.encode(PROMPTS).items()}
        first = noise.normal(torch.empty(len(PROMPTS), *teacher.shape, device=device))
        x0 = few.sample(net.eval(), first, cond, noise)
        images = teacher.decode(x0.to(next(teacher.components["vae"].parameters()).device))
    return Drawn(x0.float().cpu(), images.cpu())


def by_diffusers(pipeline: Any, model: PipelineTeacher, steps: int) -> Drawn:
    """What a plain diffusers pipeline, called as `model` is, draws in `steps` calls."""
    pipeline.set_progress_bar_config(disable=True)

    def call(kind: str) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        with exact():
            out = pipeline(list(PROMPTS), generator=generators, output_type=kind, **model.plain_call(steps)).images
        return out.float().cpu()

    return Drawn(model.call.latents(call("latent"), model.shape), call("pt"))


def timesteps(scheduler: Any, few: FewStep) -> list[float]:
    """The scheduler's timesteps for the student's steps. Raises ExportError where they are not those of training.

    Those of a flow depend on how its pipeline calls it: they are what it last drew with.
    """
    if isinstance(few.path, Flow):
        taken, wanted = scheduler.timesteps.tolist(), [t * few.path.num_timesteps for t in few.times]
        if len(taken) != len(wanted) or max(abs(a - b) for a, b in zip(taken, wanted, strict=True)) > 1e-2:
            raise ExportError(f"the scheduler takes the timesteps {taken}; the student was trained at {wanted}.")
        return taken
    last, found = scheduler.config.num_train_timesteps - 1, {}
    trained = len(few.times)
    most = scheduler.config.get("original_inference_steps") or scheduler.config.num_train_timesteps
    for steps in sorted({trained, *(k for k in GRIDS if most % k == 0)}):
        scheduler.set_timesteps(steps)
        found[steps] = scheduler.timesteps.tolist()
        wanted = [round(t * last) for t in few.path.grid(steps)]
        if found[steps] != wanted:
            raise ExportError(f"the scheduler takes the timesteps {found[steps]}; the student was trained at {wanted}.")
    return found[trained]


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
        return DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True)


def check_pipeline(out: Path, model: PipelineTeacher, reference: Drawn, few: FewStep, dtype: str, device: Any) -> None:
    """Open `out` with plain diffusers and compare what it draws."""
    pipeline = open_plain(out, DTYPES[dtype]).to(device)
    drawn = by_diffusers(pipeline, model, len(few.times))
    times = timesteps(pipeline.scheduler, few)
    check(out, reference, drawn, few, "diffusers", dtype, timesteps=times)


def finish_student(teacher: PipelineTeacher, net: nn.Module, few: FewStep, out: Path) -> None:
    """After `distill` has written `out`: compare it with the sampler of training, and write its model card.

    Raises ExportError when they differ; parity.json holds the figures then, too.
    """
    device = next(net.parameters()).device
    check_pipeline(out, teacher, by_training_sampler(teacher, net, few), few, "float32", device)
    write_card(out)


# ---- the three formats -----------------------------------------------------------------------------------------------


def to_diffusers(student: Student, out: Path, dtype: str) -> None:
    """An ordinary pipeline in `dtype`."""
    reference = by_training_sampler(student.model, student.model.net, student.few, DTYPES[dtype])
    student.model.pipeline.to(DTYPES[dtype]).save_pretrained(out, safe_serialization=True)
    if student.folder and (student.folder / LORA).is_dir():
        shutil.copytree(student.folder / LORA, out / LORA)
    carry(student, out, "diffusers")
    check_pipeline(out, student.model, reference, student.few, dtype, student.model.device)


def to_lora(student: Student, out: Path, rank: int | None, base: str | None) -> None:
    """LoRA weights for the teacher's pipeline, and the scheduler to use beside them.

    Those of a student trained as LoRA, exactly; else, or with `rank`, the best of that rank for each layer, and then
    parity.json says what is lost.
    """
    if not hasattr(student.model.pipeline, "save_lora_weights"):
        raise InputError(f"diffusers has no LoRA weights for a {type(student.model.pipeline).__name__}; use diffusers.")
    teacher, kept = base_of(student, base), student.folder and student.folder / LORA / LORA_FILE
    more: dict[str, Any] = {}
    reference = whole = by_training_sampler(student.model, student.model.net, student.few)
    if kept and kept.is_file() and rank is None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, out / LORA_FILE)
    else:
        tensors, share = extract(student.model.net, teacher.net, rank or RANK)
        save_lora(student.model.pipeline, tensors, out)
        near = with_adapters(teacher.net, tensors)
        reference = by_training_sampler(student.model, near, student.few)
        error = (reference.images - whole.images).square().mean().sqrt().item()
        lost = {"rank": rank or RANK, "squared_change": share, **gap(whole, reference), "images_rms": error}
        more["lost_by_rank"] = lost
    student.model.pipeline.scheduler.save_pretrained(out / "scheduler")
    carry(student, out, "lora", teacher=teacher.name)
    pipeline = open_plain(locate(teacher.name)).to(student.model.device)
    pipeline.load_lora_weights(out, weight_name=LORA_FILE)
    pipeline.scheduler = type(student.model.pipeline.scheduler).from_pretrained(out / "scheduler")
    drawn = by_diffusers(pipeline, student.model, len(student.few.times))
    more["timesteps"] = timesteps(pipeline.scheduler, student.few)
    check(out, reference, drawn, student.few, "lora", **more)


def base_of(student: Student, base: str | None) -> PipelineTeacher:
    """The student's teacher, from where its card says or from `base`. Raises InputError when its weights are others."""
    teacher = load_teacher(find_base(student.card, base))
    same = student.card.get("teacher_fingerprint")
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (teacher.net, student.model.net)]
    if shapes[0] != shapes[1] or (same and same != fingerprint(teacher.net)):
        raise InputError(
            f"{teacher.name!r} is another base: its weights are not those of the teacher that this student was "
            f"distilled from ({student.card.get('teacher')!r}); give that one with --base."
        )
    return teacher


def find_base(card: dict[str, Any], base: str | None) -> str:
    """The name of the student's teacher. Raises InputError when it is nowhere."""
    name = base or str(card.get("teacher"))
    try:
        locate(name)
    except InputError as error:
        if base:
            raise
        raise InputError(f"the student's teacher {name!r} is not there any more; give it with --base.") from error
    return name


def extract(net: nn.Module, base: nn.Module, rank: int) -> tuple[dict[str, Tensor], float]:
    """The difference of two networks as LoRA: per linear or convolution layer, its best approximation of `rank`.

    Returns the adapters, and which part of the squared difference of all parameters is lost (those of norms and biases
    are lost wholly). B and A share the singular values evenly; a layer of a smaller rank is filled with zeros.
    """
    found, whole, rest = {}, 0.0, 0.0
    before = dict(base.named_parameters())
    layers = {f"{n}.weight": m for n, m in net.named_modules() if is_lora_layer(m)}
    for name, after in net.named_parameters():
        delta = (after - before[name].to(after)).detach().float()
        left = delta
        if name in layers and delta.any():
            u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            root, kept = s[:rank].sqrt(), min(rank, len(s))
            up, down = delta.new_zeros(len(delta), rank), delta.new_zeros(rank, delta[0].numel())
            up[:, :kept], down[:kept] = u[:, :rank] * root, root[:, None] * v[:rank]
            left = delta - (up @ down).view_as(delta)
            extra = [1] * (delta.ndim - 2)
            stem = name.removesuffix(".weight")
            found[f"{stem}.lora_A.weight"] = down.view(rank, *delta.shape[1:]).cpu().contiguous()
            found[f"{stem}.lora_B.weight"] = up.view(len(delta), rank, *extra).cpu().contiguous()
        whole, rest = whole + delta.double().square().sum().item(), rest + left.double().square().sum().item()
    if not found:
        raise InputError("the student's weights are its teacher's: there is nothing to extract.")
    return found, rest / whole


def is_lora_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


@torch.no_grad()
def with_adapters(base: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of `base` with B A added to its weights."""
    net = copy.deepcopy(base)
    weights = dict(net.named_parameters())
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            weight = weights[f"{stem}.weight"]
            down, up = tensors[name].to(weight), tensors[f"{stem}.lora_B.weight"].to(weight)
            weight.add_((up.flatten(1) @ down.flatten(1)).view_as(weight))
    return net


class X0(nn.Module):
    """The student's x0 (B, C, H, W) from x, unit times t (B,) float64 and the condition, as tensors in order."""

    def __init__(self, net: nn.Module, names: list[str]):
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        return self.net(x, t, dict(zip(self.names, cond, strict=True))).x0


class Decoder(nn.Module):
    """x0 (B, C, H, W) -> images (B, 3, H', W') in [0, 1]."""

    def __init__(self, model: PipelineTeacher):
        super().__init__()
        self.decode, self.vae = model.decode, model.components["vae"]

    def forward(self, x0: Tensor) -> Tensor:
        return self.decode(x0)


class TextEncoder(nn.Module):
    """Token ids (B, L) -> text (B, L, E)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids)[0]


def write_onnx(module: nn.Module, inputs: dict[str, Tensor], output: str, file: Path) -> None:
    """One graph with a dynamic batch. Tracing, because it is quick, quiet and the same from torch 2.6 on."""
    torch.onnx.export(
        module.eval(),
        tuple(inputs.values()),
        str(file),
        input_names=list(inputs),
        output_names=[output],
        dynamic_axes={name: {0: "batch"} for name in (*inputs, output)},
        opset_version=18,
        dynamo=False,
    )


def onnx_runtime() -> Any:
    """onnxruntime. Raises InputError when the extra is not installed."""
    if lost := [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]:
        raise InputError(f"ONNX needs {', '.join(lost)}: pip install 'onestroke[onnx]'.")
    import onnxruntime

    return onnxruntime


def to_onnx(student: Student, out: Path) -> None:
    """denoiser.onnx, decoder.onnx, text_encoder.onnx and the tokenizer: all that a draw without torch needs."""
    model, few = student.model, student.few
    if set(model.call.rows.values()) != {"text"} or model.call.ragged:
        raise InputError(f"a {type(model.pipeline).__name__} reads more than one text; it is not exported to ONNX yet.")
    if few.renoise != "fresh":
        raise InputError(f"a student with {few.renoise!r} noise between its steps is not exported to ONNX yet.")
    reference = by_training_sampler(model, model.net, few)
    out.mkdir(parents=True, exist_ok=True)
    count = 3  # of no other size in the graph, lest a tracer take it for the batch
    cond = model.encode([PROMPTS[0]] * count)
    x, t = torch.randn(count, *model.shape), torch.ones(count, dtype=torch.float64)
    tokenizer, length = model.components["tokenizer"], cond["text"].shape[1]
    ids = tokenizer([PROMPTS[0]] * count, padding="max_length", max_length=length, return_tensors="pt").input_ids
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        write_onnx(X0(model.net, list(cond)), {"x": x, "t": t, **cond}, "x0", out / "denoiser.onnx")
        write_onnx(Decoder(model), {"x0": x}, "images", out / "decoder.onnx")
        write_onnx(TextEncoder(model.components["text_encoder"]), {"ids": ids}, "text", out / "text_encoder.onnx")
    tokenizer.save_pretrained(out / "tokenizer")
    carry(student, out, "onnx", onnx={"shape": list(model.shape), "tokens": length, "steps": schedule(few)})
    drawer = OnnxStudent(out)
    x0 = drawer.latents(PROMPTS, SeededNoise(len(PROMPTS), 0))
    check(out, reference, Drawn(x0, drawer.decode(x0)), few, "onnx")


def schedule(few: FewStep) -> dict[str, list[list[float]]]:
    """Per number of steps, of every call (t, a, b): its input is a x0 + b noise, with x0 = 0 before the first."""
    table = {}
    for steps in sorted({*GRIDS, len(few.times)}):
        times = few.path.grid(steps)
        a, b = few.path.ab(torch.tensor(times, dtype=torch.float64))
        a[0], b[0] = 0.0, FewStep(few.path, times, few.start).input(torch.ones(1, 1, dtype=torch.float64)).item()
        table[str(steps)] = torch.stack([torch.tensor(times, dtype=torch.float64), a, b], 1).tolist()
    return table


class OnnxStudent:
    """A student exported to ONNX: call it with prompts, as `onestroke.load_student`'s. Raises InputError for others.

    providers: of onnxruntime, such as "CUDAExecutionProvider".
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)):
        from transformers import AutoTokenizer

        runtime, folder = onnx_runtime(), Path(folder)
        self.card = read_json(folder / CARD)
        if self.card.get("format") != "onnx":
            raise InputError(f"{folder} is no student exported to ONNX.")
        self.about = self.card["onnx"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.sessions = {
            name: runtime.InferenceSession(folder / f"{name}.onnx", providers=list(providers))
            for name in ("denoiser", "decoder", "text_encoder")
        }

    def run(self, name: str, **inputs: Any) -> Tensor:
        return torch.from_numpy(self.sessions[name].run(None, {k: v.numpy() for k, v in inputs.items()})[0])

    def latents(self, prompts: list[str], noise: SeededNoise, steps: int | None = None) -> Tensor:
        """x0 (B, C, H, W)."""
        steps, table = steps or self.card["student_steps"], self.about["steps"]
        if str(steps) not in table:
            raise InputError(f"this export draws in {', '.join(table)} steps, not {steps}.")
        tokens = {"padding": "max_length", "truncation": True, "max_length": self.about["tokens"]}
        text = self.run("text_encoder", ids=self.tokenizer(prompts, return_tensors="pt", **tokens).input_ids)
        x0 = torch.zeros(len(prompts), *self.about["shape"])
        for t, a, b in table[str(steps)]:
            times = torch.full((len(prompts),), t, dtype=torch.float64)
            x0 = self.run("denoiser", x=a * x0 + b * noise.normal(x0), t=times, text=text)
        return x0

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, C, H, W) -> images (B, 3, H', W') in [0, 1]."""
        return self.run("decoder", x0=x0)

    def __call__(self, prompts: str | list[str], seed: int = 0, steps: int | None = None):
        """Draw one PIL picture per prompt; picture i uses seed + i."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return to_pil(self.decode(self.latents(prompts, SeededNoise(len(prompts), seed), steps)))


# ---- the call --------------------------------------------------------------------------------------------------------


def carry(student: Student, out: Path, kind: str, **more: Any) -> None:
    """Write the student's card and records into its export."""
    for name in RECORDS:
        if student.folder and (student.folder / name).is_file():
            shutil.copy(student.folder / name, out / name)
    (out / CARD).write_text(json.dumps({**student.card, "format": kind, **more}, indent=2) + "\n")


def export(
    model: str | Path | Student,
    *,
    to: str,
    out: str | Path,
    dtype: str | None = None,
    rank: int | None = None,
    base: str | None = None,
) -> Path:
    """Write a student in another form into `out`, an empty folder, and compare what that draws with the student.

    model: a student's folder, or what `load_student` or `distill` returned; what is written is what its folder holds.
    to: "diffusers", an ordinary pipeline (dtype: float32, float16 or bfloat16); "lora", weights for the teacher's
    pipeline and the scheduler to use with them (rank: extract that many dimensions even where the student was trained
    as LoRA; base: where the teacher is, if not where it was); "onnx", graphs with a dynamic batch for onnxruntime.
    Beside them stand parity.json, with the differences, and the model card README.md. Returns `out`.

    Raises InputError before anything heavy is loaded, ExportError when the differences are too large.
    """
    out, folder = Path(out), model.folder if isinstance(model, Student) else Path(model)
    if folder is None:
        raise InputError("this student was not read from a folder; give one that load_student returned.")
    card = read_card(folder)
    if to not in TARGETS:
        raise unknown("export format", to, TARGETS)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    for name, value, only in (("dtype", dtype, "diffusers"), ("rank", rank, "lora"), ("base", base, "lora")):
        if value is not None and to != only:
            raise InputError(f"--{name} goes with --to {only}, not --to {to}; leave it out.")
    if rank is not None and rank < 1:
        raise InputError(f"--rank {rank} must be at least 1.")
    check_empty(out)
    if to == "lora":
        find_base(card, base)
    if to == "onnx":
        onnx_runtime()
    student = load_student(folder)
    if to == "diffusers":
        to_diffusers(student, out, dtype or "float32")
    elif to == "lora":
        to_lora(student, out, rank, base)
    else:
        to_onnx(student, out)
    write_card(out)
    return out
