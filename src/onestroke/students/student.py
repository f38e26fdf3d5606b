"""A distilled student: written as an ordinary diffusers pipeline, read back, and called."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from onestroke.denoiser import Told, negated, plain
from onestroke.errors import InputError, read_json
from onestroke.paths import Cond
from onestroke.sampling import FewStep
from onestroke.students.guidance import GUIDANCE, read_guidance, save_guidance, side_of, told_in
from onestroke.students.lora import check_lora_base, check_lora_file, put_lora
from onestroke.teachers.branch import BRANCH, read_branch, save_branch
from onestroke.teachers.nasa import check_steerable
from onestroke.teachers.pipeline import PipelineTeacher, inspect_folder, no_bars
from onestroke.training.roles import adapters, merged

if TYPE_CHECKING:
    from onestroke.students.control import Controlled

CARD = "onestroke.json"
LORA = "lora"  # the folder of a student's adapters, in its own
ROUTER = "router.safetensors"  # of several students
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name


class SeededNoise:
    """Noise per picture: picture i of seed s comes from generator s + i, whatever the batch.

    The numbers are those of a diffusers pipeline of this `dtype` called with
    `generator=[Generator().manual_seed(s + i), ...]`.
    """

    def __init__(self, count: int, seed: int, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self.generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]

    def normal(self, like: Tensor | tuple[int, ...]) -> Tensor:
        """Standard normal like a tensor (B, *D), or of a shape (*D)."""
        shape = like if isinstance(like, tuple) else tuple(like.shape[1:])
        rows = torch.cat([torch.randn((1, *shape), generator=g, dtype=self.dtype) for g in self.generators])
        return rows if isinstance(like, tuple) else rows.to(like)


def fingerprint(net: nn.Module) -> str:
    """SHA-256 of the names, the shapes and the first values of a network's tensors: which weights it has."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_of(net: nn.Module) -> int:
    """The number of a network's weights."""
    return sum(p.numel() for p in net.parameters())


def save_student(
    teacher: PipelineTeacher,
    net: nn.Module,
    few: FewStep,
    out: Path,
    card: dict[str, Any],
    told: Told | None = None,
) -> None:
    """Write `out` as a diffusers pipeline whose scheduler carries the student's times, and `card` beside it.

    The adapters of a student that has some are merged there; `out`/lora keeps them as they were trained. What no
    ordinary network has stands beside it alone: a negative-prompt branch, and how a student that was `told` its
    guidance reads others than the run's.
    """
    whole = merged(plain(net)).to(torch.float32)
    pipeline = teacher.student_pipeline(whole, few)
    pipeline.save_pretrained(out, safe_serialization=True)
    save_branch(whole, out)
    save_guidance(net, told, out)
    if found := adapters(plain(net)):
        save_lora(found, out / LORA)
    how: dict[str, Any] = {"encoder": few.encoder} if few.ahead else {}
    how |= {} if few.gridded else {"times": few.times}
    how |= {"renoise": few.renoise, "size": teacher.size, "call": teacher.plain_call(few)}
    how |= {"guidance": told._asdict()} if told else {}
    how["weights"] = {"student": weights_of(whole), "teacher": weights_of(teacher.net)}
    card = {**card, "student_steps": len(few.times), **how, "teacher_fingerprint": fingerprint(teacher.net)}
    (out / CARD).write_text(json.dumps(card, indent=2) + "\n")


def save_lora(tensors: dict[str, Tensor], out: Path) -> None:
    """Write adapters named "unet.<layer>.lora_A.weight" (rank, in) and lora_B (out, rank), as diffusers does.

    The metadata says alpha = rank, a scale of one; readers that expect no metadata apply that scale too.
    """
    part = next(iter(tensors)).partition(".")[0]
    layers = sorted(k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight"))
    rank = len(tensors[f"{layers[0]}.lora_A.weight"])
    targets = [layer.removeprefix(f"{part}.") for layer in layers]
    about = {"r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    text = json.dumps({f"{part}.{k}": v for k, v in about.items()}, indent=2, sort_keys=True)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / LORA_FILE, metadata={"format": "pt", "lora_adapter_metadata": text})


class Student:
    """A distilled generator. Call it with prompts; it returns PIL images.

    Attributes: model, the pipeline as a denoiser; few, how it is called; card, what was written at training; folder,
    where it was read; told, which guidance scales it knows, where it knows more than one, and net, which reads them.
    """

    def __init__(
        self,
        model: PipelineTeacher,
        card: dict[str, Any],
        folder: Path | None = None,
        net: nn.Module | None = None,
    ):
        self.model, self.card, self.folder = model, card, folder
        self.net = model.net if net is None else net
        self.told = None if net is None else told_in(card)
        how = {"renoise": card.get("renoise", "fresh"), "encoder": card.get("encoder", "each")}
        times = tuple(card["times"]) if "times" in card else model.path.grid(card["student_steps"])
        self.few = FewStep(model.path, times, **how)

    def to(self, device: torch.device | str) -> Student:
        self.model.to(device)
        self.net.to(device)  # more than the pipeline's own, where several students are one or guidance is read
        return self

    def calls(self, steps: int | None = None) -> FewStep:
        """How it is called to draw in so many steps, by default in as many as it was trained for.

        Raises InputError for a number that its times do not go with.
        """
        if steps is None or steps == len(self.few.times):
            return self.few
        if "times" in self.card:
            raise InputError(f"this student draws in {len(self.few.times)} steps, at times of its own, not in {steps}.")
        if not 1 <= steps <= self.model.path.num_timesteps:
            raise InputError(f"a student draws in 1 to {self.model.path.num_timesteps} steps, not {steps}.")
        return replace(self.few, times=self.model.path.grid(steps))

    @torch.no_grad()
    def latents(self, cond: Cond, seed: int = 0, steps: int | None = None) -> Tensor:
        """x0 (B, C, H, W) by the sampler the student was trained with."""
        noise = SeededNoise(len(next(iter(cond.values()))), seed)
        return self.calls(steps).sample(self.net, noise.normal(self.model.shape).to(self.model.device), cond, noise)

    def side(self, guidance_scale: float) -> float:
        """What tells the student this guidance. Raises InputError where it knows none but its run's, or not this."""
        side = side_of(self.told, guidance_scale)
        if getattr(getattr(self.model.pipeline, self.model.part), "_compiled_call_impl", None) is not None:
            raise InputError("guidance_scale changes a layer of the network; load the student without compile.")
        return side

    def __call__(
        self,
        prompts: str | list[str],
        seed: int = 0,
        steps: int | None = None,
        batch_size: int = 64,
        negative_prompt: str = "",
        nasa_scale: float | None = None,
        guidance_scale: float | None = None,
    ) -> list[Image.Image]:
        """Draw one picture per prompt; picture i uses seed + i. `steps` defaults to the trained number.

        negative_prompt: what not to draw, as strongly as nasa_scale says (see `onestroke.teachers.nasa`), 0.2 by
        default; beyond 1 pictures degrade. A student with a branch for it (see `onestroke.teachers.branch`) reads it
        there, by default as strongly as trained; without one it reads the prompt that it learned to. guidance_scale:
        for a student that was told it in training, by default its run's (see `onestroke.students.guidance`). Raises
        InputError where the network cannot be steered, and for a guidance that the student does not know.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        steer, images = bool(negative_prompt) and nasa_scale != 0, []
        side = None if guidance_scale is None else self.side(guidance_scale)
        if steer:
            nets = [net for net in self.model.net.modules() if hasattr(net, "call")]
            for net in nets:
                check_steerable(getattr(net, self.model.part))
            if nasa_scale is None and any(getattr(net, "branch", None) is None for net in nets):
                nasa_scale = 0.2
        for i in range(0, len(prompts), batch_size):
            cond = self.model.encode(prompts[i : i + batch_size])
            if steer:
                cond = negated(cond, self.model.encode([negative_prompt]), nasa_scale)
            if side is not None:
                cond = {**cond, "s": torch.full((len(prompts[i : i + batch_size]),), side, device=self.model.device)}
            images += to_pil(self.model.decode(self.latents(cond, seed + i, steps)))
        return images

    def with_controlnet(self, control: str | Path | nn.Module) -> Controlled:
        """This student under a ControlNet of its teacher: a folder, a hub id or a loaded one. Call what it returns with
        prompts and a picture. Raises InputError for a ControlNet of another base, for several students, and for one
        with fewer layers than its teacher."""
        from onestroke.students.control import Controlled

        if self.card.get("students", 1) > 1:
            raise InputError("a ControlNet goes with one student; load one of these, student-0 for example.")
        check_whole(self.card, "a ControlNet")
        if self.few.ahead:
            raise InputError("a ControlNet steers the encoder in every step; this student's runs once.")
        return Controlled(self, control)


def read_card(folder: Path) -> dict[str, Any]:
    """What was written beside a student. Raises InputError for a folder that holds none."""
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}; give the --out of a finished `onestroke distill`.")
    if not (folder / CARD).exists():
        raise InputError(f"{folder} holds no {CARD}: it is no student, or its run has not finished.")
    card = read_json(folder / CARD)
    if "student_steps" not in card:
        raise InputError(f"{folder} is a teacher, not a student; use load_teacher.")
    if (kind := card.get("format", "diffusers")) != "diffusers":
        raise InputError(f"{folder} is a student exported to {kind}; give the student that it was exported from.")
    if (count := card.get("students", 1)) > 1:
        raise InputError(f"{folder} holds {count} students and a router; give one of them, {folder / 'student-0'}.")
    inspect_folder(folder)
    return card


def check_whole(card: dict[str, Any], what: str) -> None:
    """Refuse a student that lacks layers of its teacher, on which `what` acts. Raises InputError."""
    if (layers := card.get("layers", 1.0)) < 1:
        raise InputError(f"{what} goes with all layers of its base, and this student has layers={layers} of them.")


def load_student(
    folder: str | Path,
    *,
    compile: bool = False,
    channels_last: bool = False,
    tiny_decoder: str | Path | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
) -> Student:
    """Read a student written by `distill`, or exported to diffusers. Raises InputError for a folder that is none.

    For speed: compile, run the network through torch.compile (the first call of a batch size takes minutes);
    channels_last, keep convolution weights in that order; tiny_decoder, the folder or hub id of an AutoencoderTiny of
    the same latents (for Stable Diffusion, madebyollin/taesd), which draws in a fraction of the time and less finely.
    lora: a LoRA of the teacher, a safetensors file, that is added to the weights times lora_scale.
    """
    folder = Path(folder)
    if lora is not None:
        check_lora_file(lora)
    if (folder / ROUTER).is_file():
        from onestroke.several import load_several

        speed: dict[str, Any] = {"compile": compile, "channels_last": channels_last, "tiny_decoder": tiny_decoder}
        return load_several(folder, **speed, lora=lora, lora_scale=lora_scale)
    card = read_card(folder)
    if compile and card.get("encoder") == "once":
        raise InputError(f"the encoder of {folder} runs once, which compile does not know yet; leave compile out.")
    if compile and (folder / BRANCH).is_file():
        raise InputError(f"{BRANCH} changes the layers of the network; load this student without compile.")
    if lora is not None:
        check_whole(card, "a LoRA")
        check_lora_base(folder, lora)
    model = PipelineTeacher.load(folder, size=card.get("size"))
    if lora is not None:
        put_lora(model, lora, lora_scale)
    if (folder / BRANCH).is_file():
        model.net.branch = read_branch(folder / BRANCH, getattr(model.pipeline, model.part))
    if tiny_decoder is not None:
        model.pipeline.register_modules(vae=read_tiny_decoder(tiny_decoder, model.shape[0]).to(model.device))
    if channels_last:
        for part in (getattr(model.pipeline, model.part), model.pipeline.vae):
            part.to(memory_format=torch.channels_last)
    net = read_guidance(folder / GUIDANCE, model) if (folder / GUIDANCE).is_file() else None
    if compile:
        getattr(model.pipeline, model.part).compile()
    return Student(model, copy.deepcopy(card), folder, net)


def read_tiny_decoder(source: str | Path, channels: int) -> nn.Module:
    """An AutoencoderTiny of latents with so many channels. Raises InputError for anything else."""
    from diffusers import AutoencoderTiny

    try:
        with no_bars():
            found = AutoencoderTiny.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"tiny_decoder {str(source)!r} could not be read: {str(error).splitlines()[0]}") from None
    lost = [name for name, p in found.named_parameters() if p.is_meta]
    if lost or found.config.latent_channels != channels:
        wrong = f"lacks weights ({lost[0]!r})" if lost else f"decodes {found.config.latent_channels} channels"
        raise InputError(f"tiny_decoder {str(source)!r} {wrong}; give an AutoencoderTiny of {channels} channels.")
    return found.eval().requires_grad_(False)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1] -> PIL."""
    pixels = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]
