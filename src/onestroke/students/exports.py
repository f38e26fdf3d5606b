"""`export`: a student as a diffusers pipeline, as LoRA weights or as ONNX, each compared with it after writing."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from onestroke.denoiser import as_wide
from onestroke.errors import InputError, read_json, unknown
from onestroke.paths import Cond, Table
from onestroke.run import check_empty
from onestroke.sampling import FewStep
from onestroke.students.graphs import (
    BEHIND,
    X0,
    Decoder,
    Row,
    TextEncoder,
    onnx_runtime,
    open_onnx,
    real_tables,
    write_onnx,
)
from onestroke.students.guidance import GUIDANCE
from onestroke.students.model_card import write_card
from onestroke.students.parity import (
    DTYPES,
    GRIDS,
    PROMPTS,
    Drawn,
    by_diffusers,
    by_training_sampler,
    check,
    check_pipeline,
    closest,
    gap,
    open_plain,
    same_luck,
)
from onestroke.students.sprint import check_sprint, sana_sprint, sprint_call, sprint_few
from onestroke.students.student import (
    CARD,
    LORA,
    LORA_FILE,
    SeededNoise,
    Student,
    check_whole,
    fingerprint,
    load_student,
    read_card,
    save_lora,
    to_pil,
)
from onestroke.teachers import load_teacher, locate
from onestroke.teachers.branch import BRANCH
from onestroke.teachers.pipeline import PipelineTeacher

TARGETS = ("diffusers", "lora", "onnx", "sprint")
RECORDS = (CARD, "recipe.json", "report.json")  # what is known of a student; an export carries it along
RANK = 64


# ---- the formats -----------------------------------------------------------------------------------------------


def to_diffusers(student: Student, out: Path, dtype: str) -> None:
    """An ordinary pipeline in `dtype`."""
    assert student.folder is not None
    open_plain(student.folder, DTYPES[dtype]).save_pretrained(out, safe_serialization=True)
    if (student.folder / LORA).is_dir():
        shutil.copytree(student.folder / LORA, out / LORA)
    for beside in (BRANCH, GUIDANCE):
        if (student.folder / beside).is_file():
            shutil.copy(student.folder / beside, out / beside)
    carry(student, out, "diffusers")
    pipeline = open_plain(out, DTYPES[dtype])
    check_pipeline(out, pipeline, student.model, student.model.net, student.few, "diffusers", dtype=dtype)


def to_lora(student: Student, out: Path, rank: int | None, base: str | None) -> None:
    """LoRA weights for the teacher's pipeline, and the scheduler to use beside them.

    Those of a student trained as LoRA, exactly; else, or with `rank`, the best of that rank for each layer, and then
    parity.json says what is lost.
    """
    model, few = student.model, student.few
    if few.ahead:
        raise InputError("a plain pipeline runs the encoder of a LoRA's student in every step; export to diffusers.")
    if not hasattr(model.pipeline, "load_lora_weights"):
        raise InputError(f"diffusers puts no LoRA weights on a {type(model.pipeline).__name__}; export to diffusers.")
    teacher, kept = base_of(student, base), student.folder and student.folder / LORA / LORA_FILE
    net: nn.Module = model.net
    more: dict[str, Any] = {}
    if kept and kept.is_file() and rank is None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, out / LORA_FILE)
    else:
        tensors, share = extract(model.net, teacher.net, rank or RANK)
        save_lora(tensors, out)
        net = with_adapters(teacher.net, tensors)
        near, whole = by_training_sampler(model, net, few), by_training_sampler(model, model.net, few)
        error = (near.images - whole.images).square().mean().sqrt().item()
        lost = {"rank": rank or RANK, "squared_change": share, **gap(whole, near), "images_rms": error}
        more["lost_by_rank"] = lost
    model.pipeline.scheduler.save_pretrained(out / "scheduler")
    carry(student, out, "lora", teacher=teacher.name)
    pipeline = open_plain(locate(teacher.name))
    pipeline.load_lora_weights(out, weight_name=LORA_FILE)
    pipeline.scheduler = type(model.pipeline.scheduler).from_pretrained(out / "scheduler")
    check_pipeline(out, pipeline, model, net, few, "lora", **more)


def base_of(student: Student, base: str | None) -> PipelineTeacher:
    """The student's teacher, from where its card says or from `base`. Raises InputError when its weights are others."""
    teacher = load_teacher(find_base(student.card, base), student.model.size)
    same = student.card.get("teacher_fingerprint")
    tensors = [net.state_dict().items() for net in (teacher.net, student.model.net)]
    shapes = [{k: v.shape for k, v in found if not k.startswith("branch.")} for found in tensors]
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


def to_onnx(student: Student, out: Path) -> None:
    """denoiser.onnx, decoder.onnx and, of a Stable Diffusion pipeline, text_encoder.onnx and the tokenizer.

    Raises ExportError for a network that torch cannot trace.
    """
    model, few = student.model, student.few
    if few.ahead:
        raise InputError(
            "a student whose encoder runs once for all steps is no graph of one step; export to diffusers."
        )
    reference = by_training_sampler(model, model.net, few)  # which also fills every cache before tracing
    out.mkdir(parents=True, exist_ok=True)
    count = 3  # of no other size in the graph, lest a tracer take it for the batch
    cond, x, t = model.encode([PROMPTS[0]] * count), torch.randn(count, *model.shape), torch.ones(count).double()
    module: nn.Module
    if alone := type(getattr(model.pipeline, model.part)).__name__ in BEHIND:
        module, cond = Row(model.net, "mask" in cond), {"text": bare_text(cond, 0)}
        inputs = {"x": x[:1], "t": t[:1], **cond}
    else:
        cond = as_long(cond, text_length(model))
        module, inputs = X0(model.net, list(cond)), {"x": x, "t": t, **cond}
    graphs: dict[str, tuple[nn.Module, dict[str, Tensor], str]] = {
        "denoiser": (module, inputs, "x0"),
        "decoder": (Decoder(model), {"x0": x}, "images"),
    }
    about: dict[str, Any] = {
        "shape": list(model.shape),
        "inputs": list(cond),
        "text": max(text_length(model), cond["text"].shape[1]),
        "alone": alone,
        "renoise": few.renoise,
        **schedule(few),
    }
    if type(model.pipeline).__name__ == "StableDiffusionPipeline":
        tokenizer, about["tokens"] = model.components["tokenizer"], cond["text"].shape[1]
        ids = tokenizer([""] * count, padding="max_length", max_length=about["tokens"], return_tensors="pt").input_ids
        graphs["text_encoder"] = (TextEncoder(model.components["text_encoder"]), {"ids": ids}, "text")
        tokenizer.save_pretrained(out / "tokenizer")
    with real_tables(model.net) if alone else nullcontext():
        for name, (part, given, output) in graphs.items():
            write_onnx(part, given, output, out / f"{name}.onnx")
    carry(student, out, "onnx", onnx=about)
    drawer = OnnxStudent(out)
    x0 = drawer.latents(drawer.encode(PROMPTS) or model.encode(PROMPTS), SeededNoise(len(PROMPTS), 0))
    check(out, reference, Drawn(x0, drawer.decode(x0)), few, "onnx")


def to_sprint(student: Student, out: Path) -> None:
    """A SanaSprintPipeline, whose scheduler counts in angles (see `onestroke.students.sprint`)."""
    model, steps = student.model, len(student.few.times)
    sana_sprint(student, steps).save_pretrained(out, safe_serialization=True)
    few, (height, width) = sprint_few(student, steps), model.size
    call = {**sprint_call(steps), "height": height, "width": width, "use_resolution_binning": False}
    call |= {"guidance_scale": student.told.scale} if student.told else {}
    carry(student, out, "sprint", call=call)
    with same_luck():
        drawn = by_diffusers(open_plain(out), model, call)
        reference = closest(drawn, model, model.net, few, "float32")
    check(out, reference, drawn, few, "sprint", times=few.times)


def text_length(model: PipelineTeacher) -> int:
    """How long texts may be: what the pipeline itself allows by default, or 0 where it says nothing."""
    allowed = inspect.signature(type(model.pipeline).__call__).parameters.get("max_sequence_length")
    return 0 if allowed is None else int(allowed.default)


def as_long(cond: Cond, length: int) -> Cond:
    """`cond` with its text (B, L, E) and the mask of that at least `length` long, where a mask says where it ends."""
    return as_wide(cond, dict.fromkeys(("text", "mask"), torch.empty(0, length))) if "mask" in cond else cond


def bare_text(cond: Cond, row: int) -> Tensor:
    """The text (1, L, E) of one row without its padding."""
    (mask,) = (v for k, v in cond.items() if k.endswith("mask"))
    return cond["text"][row, mask[row].bool()][None]


def schedule(few: FewStep) -> dict[str, dict[str, Any]]:
    """Per number of steps: what multiplies the first noise, and (t, a, b) of every call, of input a x0 + b eps."""
    start, table, trained = {}, {}, len(few.times)
    for steps in sorted({trained, *GRIDS} if isinstance(few.path, Table) and few.gridded else {trained}):
        times = few.times if steps == trained else few.path.grid(steps)
        t = torch.tensor(times, dtype=torch.float64)
        start[str(steps)] = FewStep(few.path, times, few.start).first
        table[str(steps)] = torch.stack([t, *few.path.ab(t)], 1).tolist()
    return {"start": start, "steps": table}


class OnnxStudent:
    """A student exported to ONNX: call it with prompts, as `onestroke.load_student`'s. Raises InputError for others.

    providers: of onnxruntime, such as "CUDAExecutionProvider".
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)):
        from transformers import AutoTokenizer

        self.folder = Path(folder)
        self.card = read_json(self.folder / CARD)
        if self.card.get("format") != "onnx":
            raise InputError(f"{folder} is no student exported to ONNX.")
        self.about, self.tokenizer = self.card["onnx"], None
        if "tokens" in self.about:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        self.sessions = {file.stem: open_onnx(file, providers) for file in self.folder.glob("*.onnx")}

    def run(self, name: str, **inputs: Any) -> Tensor:
        return torch.from_numpy(self.sessions[name].run(None, {k: v.cpu().numpy() for k, v in inputs.items()})[0])

    def encode(self, prompts: list[str]) -> Cond:
        """Prompts -> what the denoiser reads of them; empty for an export without a text encoder."""
        if self.tokenizer is None:
            return {}
        tokens = {"padding": "max_length", "truncation": True, "max_length": self.about["tokens"]}
        return {"text": self.run("text_encoder", ids=self.tokenizer(prompts, return_tensors="pt", **tokens).input_ids)}

    def latents(self, cond: Cond, noise: SeededNoise, steps: int | None = None) -> Tensor:
        """x0 (B, C, H, W) of conditions (B, ...), named as `onnx.inputs` in the card."""
        steps, table = steps or self.card["student_steps"], self.about["steps"]
        if str(steps) not in table:
            raise InputError(f"this export draws in {', '.join(table)} steps, not {steps}.")
        cond = cond if self.about["alone"] else as_long(cond, self.about["text"])
        if (length := cond["text"].shape[1]) > self.about["text"]:
            raise InputError(f"a text of {length} tokens is longer than the {self.about['text']} of this export.")
        (t, a, b), *later = table[str(steps)]
        x = self.about["start"][str(steps)] * noise.normal(torch.empty(len(cond["text"]), *self.about["shape"]))
        x0 = self.denoised(x, t, cond)
        for t_next, a_next, b_next in later:
            eps = noise.normal(x0) if self.about["renoise"] == "fresh" else (x - a * x0) / b
            t, a, b = t_next, a_next, b_next
            x = a * x0 + b * eps
            x0 = self.denoised(x, t, cond)
        return x0

    def denoised(self, x: Tensor, t: float, cond: Cond) -> Tensor:
        """x0 (B, C, H, W) of x at unit time t."""
        times = torch.full((len(x),), t, dtype=torch.float64)
        if not self.about["alone"]:
            return self.run("denoiser", x=x, t=times, **cond)
        rows = ({"x": x[i : i + 1], "t": times[:1], "text": bare_text(cond, i)} for i in range(len(x)))
        return torch.cat([self.run("denoiser", **row) for row in rows])

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, C, H, W) -> images (B, 3, H', W') in [0, 1]."""
        return self.run("decoder", x0=x0)

    def __call__(self, prompts: str | list[str], seed: int = 0, steps: int | None = None) -> list[Image.Image]:
        """Draw one PIL picture per prompt; picture i uses seed + i."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not (cond := self.encode(prompts)):
            raise InputError(
                f"{self.folder} holds no text encoder; give conditions to `latents`, and that to `decode`."
            )
        return to_pil(self.decode(self.latents(cond, SeededNoise(len(prompts), seed), steps)))


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
    as LoRA; base: where the teacher is, if not where it was); "onnx", graphs with a dynamic batch for onnxruntime;
    "sprint", of a SANA teacher's student, diffusers' SanaSprintPipeline with its SCMScheduler, at that one's times.
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
    if to != "diffusers" and (folder / BRANCH).is_file():
        raise InputError(f"{folder} has a negative-prompt branch, which {to} cannot hold; export it to diffusers.")
    check_empty(out)
    if to == "lora":
        check_whole(card, "a LoRA")
        find_base(card, base)
    if to == "onnx":
        onnx_runtime()
    if to == "sprint":
        check_sprint(str(read_json(folder / "model_index.json").get("_class_name")), card["student_steps"])
    student = load_student(folder)
    if to == "diffusers":
        to_diffusers(student, out, dtype or "float32")
    elif to == "lora":
        to_lora(student, out, rank, base)
    elif to == "sprint":
        to_sprint(student, out)
    else:
        to_onnx(student, out)
    write_card(out)
    return out
