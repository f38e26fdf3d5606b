"""`plan`: the memory a run will need, before anything is loaded.

The run's own first two rounds, its last, and those at which the method begins something else (its `phases`) are played
on tensors without storage (`FakeTensorMode`: shapes and types alone), with every allocation watched. Nothing is
estimated: a network, a method or a setting needs no line here.
"""

from __future__ import annotations

import importlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from onestroke.denoiser import fused_attention, sides
from onestroke.draws import Draws
from onestroke.errors import InputError, read_json, unknown
from onestroke.images import Pictures
from onestroke.method import Batch, Method, Pairs, play
from onestroke.methods import get_method
from onestroke.methods import options as option_defaults
from onestroke.rewards import KEY, check_reward, load_reward
from onestroke.run import parts_of, plan_run
from onestroke.settings import Settings
from onestroke.teachers import locate
from onestroke.teachers.pipeline import PipelineTeacher, inspect_folder, no_bars
from onestroke.training.optim import state_8bit
from onestroke.training.train import Data, Trainer, live

UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
NO_PICTURES = Pictures([], [], "")  # what a plan is made with: of pictures it needs the shape alone


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive: `now`, and the largest it was, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.counting = True

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes() if self.counting else 0
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def aside(self, tensor: Tensor) -> Tensor:
        """A copy in another memory than the one that is counted."""
        self.counting = False
        try:
            return tensor.detach().clone()
        finally:
            self.counting = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.see(value)
        return out


@contextmanager
def watched() -> Iterator[Memory]:
    """Count the tensors made in this block; copying tensors without storage warns, which is no news here."""
    with warnings.catch_warnings(), Memory() as memory:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield memory


def nbytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def hollow(method: Method) -> Method:
    """Keep a method without storage where it is: there is nothing to move to a device."""
    method.to = lambda *args, **kwargs: method  # type: ignore[method-assign, assignment]
    return method


class Hollow8bit(torch.optim.Optimizer):
    """What `adamw8bit` holds, without its kernels, which work in place."""

    def __init__(self, params: list[nn.Parameter], lr: float, **more: Any):
        super().__init__(params, {"lr": lr})

    def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        self.state[p] = state_8bit(p)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class HollowTrainer(Trainer):
    """A trainer of tensors without storage, whose main memory is not counted."""

    def __init__(self, memory: Memory, *args: Any, **kwargs: Any):
        self.counted = memory
        super().__init__(*args, **kwargs)

    def home(self, device: torch.device) -> Callable[[Tensor], Tensor] | None:
        return self.counted.aside

    def optimizer(self, params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        if self.settings.optimizer == "adamw8bit":
            return Hollow8bit(params, **options)
        return super().optimizer(params, **options)

    def clip(self, params: list[nn.Parameter]) -> None:
        """Gradients without storage have no norm; clipping works in place."""


@dataclass(frozen=True)
class Plan:
    """Bytes. `roles`: what each player holds all the time, its own weights, optimiser state and average; with offload,
    what lies in main memory is not of it."""

    peak: int
    frozen: int  # weights that no player trains: the teacher, shared with LoRA roles, encoders and decoder
    roles: dict[str, int]

    @property
    def working(self) -> int:
        """Gradients, activations and everything else that comes and goes."""
        return self.peak - self.frozen - sum(self.roles.values())

    def rows(self) -> list[tuple[str, int]]:
        """What `onestroke plan` prints, in bytes."""
        own = [(f"{role}: trained weights, optimiser, average", size) for role, size in self.roles.items()]
        shared = [("frozen weights, shared", self.frozen), *own]
        return [*shared, ("gradients, activations, passing values", self.working), ("peak", self.peak)]

    def as_dict(self) -> dict[str, Any]:
        return {"peak": self.peak, "frozen": self.frozen, "roles": self.roles, "working": self.working}


def rounds(method: Method, steps: int) -> list[int]:
    """The rounds of a run of `steps` that are played: what any other does, one of them does too."""
    return sorted({step for step in (0, 1, *method.phases, steps - 1) if step < steps})


def played(trainer: Trainer, batches: int, size: int, memory: Memory) -> Plan:
    """The plan of a trainer built inside `watched`, from its `rounds`."""
    if trainer.offload.home is not None:  # the roles were made in main memory
        memory.peak = memory.now
    frozen = memory.now - sum(holds(trainer, p) for p in trainer.method.players)
    trainer.factor = 1.0
    data = trainer.data
    for step in rounds(trainer.method, trainer.settings.steps):
        micro = []
        for k in range(batches):
            draw = Draws(0, step, size, k * size, batches * size)
            ways = cast(Tensor | None, data.ways)
            side = None if data.pairs is None else sides(torch.arange(size))
            micro.append(Batch(draw.normal(data.shape), data.cond, draw, data.x0, data.pairs, ways, side))
        kernel = (trainer.update, trainer.backward, trainer.advance, trainer.renew, trainer.share)
        play(trainer.method, micro, step, *kernel)
    return Plan(memory.peak, frozen, {p: holds(trainer, p) for p in trainer.method.players})


def holds(trainer: Trainer, player: str) -> int:
    """Bytes that a player holds between its turns."""
    own = list(live(trainer.bare(player)).values()) + [
        v for state in trainer.optimisers[player].state.values() for v in state.values() if isinstance(v, Tensor)
    ]
    if trainer.average and player == trainer.method.players[0]:
        own += list(trainer.average.values.values())
    return nbytes([t for t in own if not trainer.offload.idle(t)])


def shallow(config: Any) -> Any:
    """An encoder's config with two layers: its conditions have the same shapes, and are quickly made."""
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))):
        for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "depth"):
            if isinstance(getattr(part, key, None), int):
                setattr(part, key, min(2, getattr(part, key)))
    return config


class HollowTeacher(PipelineTeacher):
    """A teacher whose networks are made in `mode`, without storage. Its text encoders leave memory for good."""

    def __init__(self, mode: FakeTensorMode, *args: Any):
        self.mode = mode
        super().__init__(*args)

    def park(self) -> None:
        self.pipeline.register_modules(**dict.fromkeys(self.encoders))

    def clip(self, source: str) -> nn.Module:
        """The CLIP model of a folder or a hub id, of which the config alone is read."""
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig.from_pretrained(source)
        with self.mode:
            return CLIPModel(config)


def hollow_teacher(folder: Path, size: tuple[int, int] | None = None, towers: bool = False) -> HollowTeacher:
    """The teacher of a pipeline folder, its networks of the right shapes without storage; reads its small files alone.

    The text encoders, which leave memory before training, are stood in for by shallow ones of random weights. towers:
    its image tower too, which pairs with them. Raises InputError for a folder that cannot be read, or not in this size
    (height, width) in pixels.
    """
    inspect_folder(folder)
    index, mode = read_json(folder / "model_index.json"), FakeTensorMode(allow_non_fake_inputs=True)
    parts: dict[str, Any] = {}
    left = ("safety_checker", *(() if towers else ("image_encoder", "feature_extractor")))
    with no_bars():
        for name, (library, kind) in ((k, v) for k, v in index.items() if isinstance(v, list)):
            cls = getattr(importlib.import_module(library), kind) if library else None
            if cls is None or name in left:
                parts[name] = None
            elif not issubclass(cls, nn.Module):
                parts[name] = cls.from_pretrained(folder, subfolder=name)
            elif name == "image_encoder":
                with mode:
                    parts[name] = cls(cls.config_class.from_pretrained(folder / name))
            elif library == "transformers":
                parts[name] = cls(shallow(cls.config_class.from_pretrained(folder / name)))
            else:
                with mode:
                    parts[name] = cls.from_config(cls.load_config(folder / name))
        options = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)}
        pipeline = getattr(diffusers, index["_class_name"])(**parts, **options)
    return HollowTeacher(mode, pipeline, str(folder), size)


def plan(teacher: str | Path, method: str, *, device: str | None = None, prompts: int = 1, **settings: Any) -> Plan:
    """The memory that `distill(teacher, method=method, **settings)` will need.

    teacher: a built-in name or a pipeline folder. device: "cpu" or "cuda", by default what this machine has; on a GPU
    attention keeps no matrix of all its weights. prompts: their number, whose conditions stay in memory; the pictures
    pairs or ways that a method needs besides are those of a batch. Raises InputError as `distill` does, and for a
    reward that is a function: there is nothing to tell its memory by.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise unknown("device", device, ("cpu", "cuda"))
    source = locate(teacher)
    if not isinstance(source, Path):
        raise InputError(f"{source} is not a folder; download the pipeline to plan with it.")
    cls = get_method(method)
    if callable(settings.get("reward")):
        raise InputError("the memory of a reward that is a function cannot be planned; give reward=clip:<folder>.")
    _, run, chosen = plan_run(str(teacher), method, ["prompt"] * prompts, settings, NO_PICTURES)
    judged = "reward" in cls.needs_of({**option_defaults(cls), **chosen})
    if judged:
        check_reward(run.reward, source)
    run = replace(run, log_with="none", offload=run.offload and device != "cpu")  # nowhere to go from main memory
    with fused_attention() if device == "cuda" else nullcontext():
        towers = judged and not run.reward
        return play_plan(lambda: hollow_teacher(source, run.size, towers), cls, run, chosen, prompts, judged)


def play_plan(
    load: Callable[[], Any],
    method: type[Method],
    run: Settings,
    options: dict[str, Any],
    prompts: int = 1,
    judged: bool = False,
) -> Plan:
    """The plan of a method on the teacher that `load` makes without storage. judged: by the run's reward."""
    with watched() as memory:
        teacher = load()
        null, judge = teacher.null, None
        if judged:
            judge = load_reward(run.reward, teacher, teacher.clip)
            null = {**null, KEY: judge.encode([""])}
        teacher.park()
        parts = parts_of(teacher, run, null, judge)
        playing = method(replace(parts, encode=lambda texts: null), **options)  # one prompt's shapes are those of any
        rows = max(prompts, run.batch_size * run.accumulate)
        cond = {k: v.expand(rows, *v.shape[1:]).clone() for k, v in null.items()}
        size = run.batch_size
        trainer = HollowTrainer(memory, hollow(playing), Data(teacher.shape, cond), run)
        x0, ways = torch.zeros(size, *teacher.shape), None
        if "ways" in method.needs_of({**option_defaults(method), **options}):
            ways = x0.new_zeros(size, run.solver_steps + 1, *teacher.shape)
        trainer.data = Data(teacher.shape, {k: v[:size] for k, v in cond.items()}, x0, Pairs(x0, x0), ways)
        return played(trainer, run.accumulate, size, memory)


SWITCHES: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "precision=bf16": lambda run: {} if run.precision == "bf16" else {"precision": "bf16"},
    "gradient_checkpointing=true": lambda run: {} if run.gradient_checkpointing else {"gradient_checkpointing": True},
    "half the batch, twice accumulated": lambda run: (
        {} if run.batch_size % 2 else {"batch_size": run.batch_size // 2, "accumulate": 2 * run.accumulate}
    ),
    "optimizer=adamw8bit": lambda run: {} if run.optimizer != "adamw" or run.shard else {"optimizer": "adamw8bit"},
    "offload=true": lambda run: {} if run.offload or run.shard else {"offload": True},
    "lora_rank=64": lambda run: {} if run.lora_rank.get("*") else {"lora_rank": {"*": 64}},
}
"""What makes a run smaller, from the cheapest to what changes most: the first costs no time, the second a third more,
the third keeps the gradient but fills the machine less, the fourth rounds the optimiser's state, the fifth waits for
main memory in every turn, the last trains adapters alone."""


def goes(teacher: str | Path, method: str, settings: dict[str, Any]) -> bool:
    """Whether a run with these settings is one."""
    try:
        plan_run(str(teacher), method, ["prompt"], settings, NO_PICTURES)
    except InputError:
        return False
    return True


def switches(
    teacher: str | Path, method: str, memory: int, *, device: str | None = None, **settings: Any
) -> tuple[list[str], Plan] | None:
    """The cheapest of SWITCHES with which the run fits into `memory` bytes, and its plan; None where none suffices.

    Cheaper means: without the dearest switch of the other set. All of them are played first, and then the set without
    each in turn, the dearest first: what is not needed is left out.
    """
    _, run, _ = plan_run(str(teacher), method, ["prompt"], settings, NO_PICTURES)
    changes = {name: change(run) for name, change in SWITCHES.items() if change(run)}
    changes = {name: change for name, change in changes.items() if goes(teacher, method, {**settings, **change})}

    def played(chosen: list[str]) -> Plan:
        more = {k: v for name in chosen for k, v in changes[name].items()}
        return plan(teacher, method, device=device, **{**settings, **more})

    chosen = list(changes)
    if (found := played(chosen)).peak > memory:
        return None
    for name in reversed(changes):
        fewer = [other for other in chosen if other != name]
        if (tried := played(fewer)).peak <= memory:
            chosen, found = fewer, tried
    return chosen, found


def parse_bytes(text: str) -> int:
    """'24GiB' -> bytes. Raises InputError for anything else."""
    number = text.strip().rstrip("bBiIkKmMgG")
    unit = text.strip()[len(number) :].upper() or "B"
    try:
        return round(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise InputError(f"memory {text!r} is not a size; write for example 24GiB or 800MiB.") from None
