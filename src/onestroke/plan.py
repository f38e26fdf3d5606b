"""`plan`: the memory a run will need, before anything is loaded.

The run's own first rounds are played on tensors without storage (`FakeTensorMode`: shapes and types alone), with every
allocation watched. Nothing is estimated: a network, a method or a setting needs no line here.
"""

from __future__ import annotations

import importlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from onestroke.draws import Draws
from onestroke.errors import InputError, read_json
from onestroke.method import Batch, Method, play
from onestroke.methods import get_method
from onestroke.run import made, plan_run
from onestroke.settings import Settings
from onestroke.teachers import locate
from onestroke.teachers.pipeline import PipelineTeacher, inspect_folder, no_bars
from onestroke.train import Data, Trainer, live

UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive: `now`, and the largest it was, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

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


@dataclass(frozen=True)
class Plan:
    """Bytes. `roles`: what each player holds all the time, its own weights, optimiser state and average."""

    peak: int
    frozen: int  # weights that no player trains: the teacher, shared with LoRA roles, encoders and decoder
    roles: dict[str, int]

    @property
    def working(self) -> int:
        """Gradients, activations and everything else that comes and goes."""
        return self.peak - self.frozen - sum(self.roles.values())


def played(trainer: Trainer, batches: int, size: int, memory: Memory, rounds: int = 2) -> Plan:
    """The plan of a trainer built inside `watched`, from its first rounds."""
    frozen = memory.now - sum(holds(trainer, p) for p in trainer.method.players)
    trainer.factor = 1.0
    data = trainer.data
    for step in range(rounds):
        micro = []
        for k in range(batches):
            draw = Draws(0, step, size, k * size, batches * size)
            micro.append(Batch(draw.normal(data.shape), data.cond, draw, data.x0, data.pairs))
        play(trainer.method, micro, step, trainer.update, trainer.accelerator.backward, trainer.advance)
    return Plan(memory.peak, frozen, {p: holds(trainer, p) for p in trainer.method.players})


def holds(trainer: Trainer, player: str) -> int:
    """Bytes that a player holds between its turns."""
    own = list(live(trainer.bare(player)).values()) + [
        v for state in trainer.optimisers[player].state.values() for v in state.values() if isinstance(v, Tensor)
    ]
    if trainer.average and player == trainer.method.players[0]:
        own += list(trainer.average.values.values())
    return nbytes(own)


def hollow_teacher(folder: Path, resolution: int | None = None) -> PipelineTeacher:
    """The teacher of a pipeline folder with weights of the right shapes and no storage; reads its small files alone.

    Raises InputError for a folder that cannot be read, and for a resolution that the VAE does not divide.
    """
    inspect_folder(folder)
    index = read_json(folder / "model_index.json")
    parts: dict[str, Any] = {}
    with no_bars():
        for name, entry in index.items():
            if not isinstance(entry, list):
                continue
            if entry[0] is None or name in ("safety_checker", "image_encoder", "feature_extractor"):
                parts[name] = None
                continue
            cls = getattr(importlib.import_module(entry[0]), entry[1])
            if not issubclass(cls, nn.Module):
                parts[name] = cls.from_pretrained(folder, subfolder=name)
            else:
                with FakeTensorMode(allow_non_fake_inputs=True):
                    config = folder / name
                    parts[name] = (
                        cls.from_config(cls.load_config(config))
                        if hasattr(cls, "load_config")
                        else cls(cls.config_class.from_pretrained(config))
                    )
        pipeline = getattr(diffusers, index["_class_name"])(**parts)
    pipeline.unet.set_attn_processor(AttnProcessor())
    teacher = PipelineTeacher(pipeline, str(folder))
    if resolution is not None:
        factor = pipeline.vae_scale_factor
        if resolution % factor:
            raise InputError(f"resolution {resolution} is not a multiple of {factor}, the reduction of this VAE.")
        teacher.shape = (teacher.shape[0], resolution // factor, resolution // factor)
    return teacher


def plan(teacher: str | Path, method: str, *, resolution: int | None = None, prompts: int = 1, **settings: Any) -> Plan:
    """The memory that `distill(teacher, method=method, **settings)` will need.

    teacher: a built-in name or a pipeline folder. resolution: pixels, the teacher's own where absent. prompts: their
    number, whose conditions stay in memory. Raises InputError as `distill` does.
    """
    source = locate(teacher)
    if not isinstance(source, Path):
        raise InputError(f"{source} is not a folder; download the pipeline to plan with it.")
    cls = get_method(method)
    _, run, chosen = plan_run(str(teacher), method, ["prompt"] * prompts, settings)
    run = replace(run, log_with="none")
    return play_plan(lambda: hollow_teacher(source, resolution), cls, run, chosen, prompts)


def play_plan(load: Callable[[], Any], method: type[Method], run: Settings, options: dict[str, Any], prompts: int = 1):
    """The plan of a method on the teacher that `load` makes without storage."""
    with watched() as memory:
        teacher = load()
        playing, _ = made(teacher, method, run, options)
        rows = max(prompts, run.batch_size * run.accumulate)
        cond = {k: v.expand(rows, *v.shape[1:]).clone() for k, v in teacher.null.items()}
        size = run.batch_size
        trainer = Trainer(hollow(playing), Data(teacher.shape, cond), run)
        trainer.data = Data(teacher.shape, {k: v[:size] for k, v in cond.items()})
        return played(trainer, run.accumulate, size, memory)


def parse_bytes(text: str) -> int:
    """'24GiB' -> bytes. Raises InputError for anything else."""
    number = text.strip().rstrip("bBiIkKmMgG")
    unit = text.strip()[len(number) :].upper() or "B"
    try:
        return round(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise InputError(f"memory {text!r} is not a size; write for example 24GiB or 800MiB.") from None
