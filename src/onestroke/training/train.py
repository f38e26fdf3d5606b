"""The training loop on accelerate: optimisers, clipping, averaging, checkpoints by player name, resume, logging."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from onestroke.denoiser import Denoiser, checkpointed, sides
from onestroke.draws import Draws
from onestroke.errors import DivergedError, InputError, read_json
from onestroke.method import Batch, Game, Mean, Method, Pairs, Turn, advance, play
from onestroke.pairs import Stack
from onestroke.paths import Cond
from onestroke.settings import Settings
from onestroke.training.offload import Offload, main_memory
from onestroke.training.optim import begin, make_optimizer
from onestroke.training.progress import Progress


@dataclass(frozen=True)
class Data:
    """What batches are made of: rows of conditions, and of real latents, pairs or ways where a method needs them."""

    shape: tuple[int, ...]  # of one latent
    cond: Cond  # (N, ...)
    x0: Tensor | None = None  # (N, *shape)
    pairs: Pairs | None = None  # (M, *shape) each; pair i is of condition i modulo N
    ways: Tensor | Stack | None = None  # (M, K + 1, *shape), of the pairs

    def __len__(self) -> int:
        return len(next(iter(self.cond.values())) if self.pairs is None else self.pairs.noise)

    def batch(self, draw: Draws, device: torch.device) -> Batch:
        rows = draw.index(len(self))
        noise = draw.normal(self.shape)
        pairs = None if self.pairs is None else Pairs(*(v[rows].to(device) for v in self.pairs))
        ways = None if self.ways is None else self.ways[rows].to(device)
        side = None if self.pairs is None else sides(rows).to(device)
        rows = rows % len(next(iter(self.cond.values())))
        cond = {k: v[rows].to(device) for k, v in self.cond.items()}
        x0 = None if self.x0 is None else self.x0[rows].to(device)
        return Batch(noise, cond, draw, x0, pairs, ways, side)


def live(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of a module, by name."""
    return {k: p for k, p in module.named_parameters() if p.requires_grad}


def learned(module: nn.Module) -> dict[str, Tensor]:
    """What training changes in a module, by name: its trained parameters and its buffers."""
    return {**live(module), **dict(module.named_buffers())}


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory, each whole: every process takes part where they are sharded."""
    full = ((k, v.full_tensor() if isinstance(v, DTensor) else v) for k, v in tensors.items())
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in full}


@torch.no_grad()
def assign(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy whole values into tensors of the same names, sharding them where these are."""
    for k, v in tensors.items():
        value = values[k].to(v.device)
        v.copy_(distribute_tensor(value, v.device_mesh, v.placements) if isinstance(v, DTensor) else value)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all numbers together. A CPU reads them faster for a scalar product than for a norm."""
    if any(isinstance(v, DTensor) or v.device.type != "cpu" for v in tensors):
        norm = get_total_norm(tensors)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    return torch.stack([torch.dot(v, v) for v in map(torch.flatten, tensors)]).sum().sqrt()


def shell(module: nn.Module) -> nn.Module:
    """A copy that shares the frozen tensors and has no memory for the trained ones until they are loaded."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in live(module).values()}
    return copy.deepcopy(module, {**{id(p): p for p in module.parameters() if not p.requires_grad}, **empty})


def set_modes(method: Method) -> None:
    """Train mode for the players, eval mode for all else and for every network, the players' own included.

    What a network does in train mode alone is noise: dropout, and labels that are dropped. A teacher has none of it,
    and the passes of a student that must share their noise (CT, ECT: identical dropout in both) share all of it. What
    players have around their network, as a discriminator with spectral norm, learns as it does anywhere.
    """
    method.eval()
    for player in method.players:
        getattr(method, player).train()
    for module in method.modules():
        if isinstance(module, Denoiser):
            module.eval()


class Average:
    """The exponential moving average of a module's trained parameters; warms up as (1 + k) / (10 + k)."""

    def __init__(self, module: nn.Module, decay: float):
        self.live, self.decay, self.count = live(module), decay, 0
        self.values = {k: p.detach().clone() for k, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.values.values()), list(self.live.values()), weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the live weights; twice is the identity."""
        for k, p in self.live.items():
            held = p.detach().clone()
            p.copy_(self.values[k])
            self.values[k].copy_(held)


class Trainer:
    """Plays a method. Construct it, then `run`; with `folder`, checkpoints are written there and can be resumed.

    One `prepare` per player (accelerate takes one model per call under FSDP2); the frozen teacher is only moved. All
    networks are in eval mode, so that there is no dropout in a run (see `set_modes`).
    """

    def home(self, device: torch.device) -> Callable[[Tensor], Tensor] | None:
        """What makes the copies of idle tensors, if there is another memory than the device's own."""
        return None if device.type == "cpu" else main_memory

    def optimizer(self, params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        """The optimiser of one player."""
        return make_optimizer(self.settings.optimizer, params, **options)

    def __init__(self, method: Method, data: Data, settings: Settings, folder: Path | None = None):
        self.method, self.data, self.settings, self.folder = method, data, settings, folder
        tracker = None if folder is None or settings.log_with == "none" else settings.log_with
        if (shared := AcceleratorState._shared_state) and shared.get("_mixed_precision") != settings.precision:
            AcceleratorState._reset_state()  # it keeps the precision of the first run of a process
        try:
            self.accelerator = Accelerator(
                mixed_precision=settings.precision,
                # an older torch gives the next call the cast of a weight from one without gradient
                kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
                log_with=tracker,
                project_dir=None if folder is None else str(folder / "log"),
            )
        except ValueError as error:  # an unknown tracker, or a precision this device cannot do
            raise InputError(f"log_with={settings.log_with!r}, precision={settings.precision!r}: {error}") from None
        self.device, self.round, self.seen = self.accelerator.device, 0, 0.0
        self.offload = Offload(self.device, self.home(self.device) if settings.offload else None)
        if self.offload.home is None:
            method.to(self.device)
        elif self.accelerator.num_processes > 1:
            raise InputError("offload=true is for one process; use shard=true for several.")
        set_modes(method)
        self.optimisers: dict[str, Any] = {}
        self.shell = shell(getattr(method, method.players[0])) if settings.shard else None
        for player in method.players:
            module = getattr(method, player)
            if settings.gradient_checkpointing:
                for child in module.modules():
                    if hasattr(child, "enable_gradient_checkpointing"):
                        child.enable_gradient_checkpointing(checkpointed)
            sparse = getattr(module, "sparse", False)  # a call uses some of its parameters
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=sparse)
            prepare = self.accelerator.prepare_model
            wrapped = sharded(module) if settings.shard else prepare(module, device_placement=False)  # it is there
            setattr(method, player, wrapped)
            params = [p for p in wrapped.parameters() if p.requires_grad]
            rates = {"lr": settings.of("lr", player, 1e-5), "betas": tuple(settings.of("betas", player, (0.9, 0.999)))}
            made = self.optimizer(params, weight_decay=settings.weight_decay, **rates)
            begin(made, self.device)
            if self.accelerator.scaler:  # else accelerate's adds nothing but a search for packages in every step
                made = self.accelerator.prepare_optimizer(made, device_placement=False)
            self.optimisers[player] = made
        self.average = Average(self.bare(method.players[0]), settings.ema) if settings.ema else None
        if self.offload.home is not None:
            self.send_home()

    def send_home(self) -> None:
        """Let all roles, the optimisers' states and the average lie in main memory until they are needed."""
        method = self.method
        for name, role in method.named_children():
            self.offload.watch(name, role, trained=name in method.players)
        for player in method.players:
            states = self.optimisers[player].state.values()
            self.offload.add(f"{player}.optim", (v for s in states for k, v in s.items() if k != "step"))
        if self.average:
            self.offload.add("average", self.average.values.values())
        for name, value in self.memory().items():
            setattr(method, name, value.to(self.device))

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of this process in round `step`: its rows of one global batch."""
        s, world, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        total = s.batch_size * s.accumulate * world
        offsets = [(i * world + rank) * s.batch_size for i in range(s.accumulate)]
        draws = (Draws(s.seed, step, s.batch_size, offset, total, self.device) for offset in offsets)
        return [self.data.batch(draw, self.device) for draw in draws]

    def rate(self, progress: float) -> float:
        """The learning-rate factor at this round and part of the run."""
        warm = min(1.0, (self.round + 1) / self.settings.warmup) if self.settings.warmup else 1.0
        if self.settings.decay == "cosine":
            warm *= 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return warm

    def clip(self, params: list[nn.Parameter]) -> None:
        """Scale the gradients down where their norm is larger than `settings.clip`. A CPU reads them twice only then;
        a GPU always does, which is cheaper than to wait for the norm."""
        norm = total_norm([p.grad for p in params if p.grad is not None])
        if norm.device.type != "cpu" or norm > self.settings.clip:
            clip_grads_with_norm_(params, self.settings.clip, norm)

    def update(self, player: str) -> None:
        """One optimiser step of one player, and of the average after the first player's."""
        first = player == self.method.players[0]
        optimiser = self.optimisers[player]
        with self.offload.here(player, f"{player}.optim", *(["average"] if first else [])):
            if self.settings.clip:
                self.accelerator.unscale_gradients(optimiser)
                self.clip([p for group in optimiser.param_groups for p in group["params"]])
            for group in optimiser.param_groups:
                group["lr"] = self.settings.of("lr", player, 1e-5) * self.factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if self.average and first:
                self.average.update()
        self.offload.turn_ends()

    def renew(self, player: str, fresh: Mapping[str, Tensor]) -> None:
        """Begin parameters of a player anew: these values, and nothing of them in the optimiser's memory."""
        module = live(self.bare(player))
        assign({name: module[name] for name in fresh}, dict(fresh))
        for key, value in self.moments(player).items():
            if key.rpartition(".")[0] in fresh:
                value.zero_()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def advance(self, game: Game, answer: Tensor | None) -> Turn | Mean | None:
        with self.accelerator.autocast():
            return advance(game, answer)

    def share(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "mean")

    def one_round(self, progress: float) -> dict[str, float]:
        self.factor = self.rate(progress)
        kernel = (self.update, self.backward, self.advance, self.renew, self.share)
        log = play(self.method, self.batches(self.round), self.round, *kernel)
        values = {k: float(v) for k, v in log.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                last = f" Last checkpoint: {self.latest()}." if self.latest() else ""
                raise DivergedError(
                    f"{name} is {value} at round {self.round}.{last} "
                    f"Lower lr.{name.split('/')[0]}, or use precision=bf16 or no instead of fp16."
                )
        self.round += 1
        return values

    def run(self, seconds: float | None = None) -> None:
        """Play until `settings.steps` rounds or for `seconds`, whichever ends first; the schedule follows that one."""
        s, began = self.settings, time.monotonic() - self.seen
        images = s.batch_size * s.accumulate * self.accelerator.num_processes
        quiet = self.folder is None or not self.accelerator.is_main_process
        if self.accelerator.log_with and not self.accelerator.trackers:  # not before: a refused resume writes nothing
            self.accelerator.init_trackers("run")
        with Progress(s.steps, images, quiet) as progress:
            while self.round < s.steps:
                done = max(self.round / s.steps, (time.monotonic() - began) / seconds if seconds else 0.0)
                if done >= 1:
                    break
                log = self.one_round(done)
                self.seen = time.monotonic() - began
                progress.show(self.round, log)
                if self.folder is None:
                    continue
                self.accelerator.log(log | {"seconds": self.seen}, step=self.round)
                if self.round % s.save_every == 0 or self.round == s.steps:
                    self.save()

    # ---- checkpoints: safetensors by player name, so that adding a player never shifts a meaning ---------------

    def latest(self) -> Path | None:
        """The newest complete checkpoint of the run folder."""
        if self.folder is None:
            return None
        found = sorted((self.folder / "checkpoints").glob("[0-9]*"), key=lambda p: p.name)
        return found[-1] if found else None

    def bare(self, player: str) -> nn.Module:
        """A player without what distributes it."""
        return self.accelerator.unwrap_model(getattr(self.method, player))

    def own(self, target: str) -> dict[str, Tensor]:
        """What a target does not share with the player it follows."""
        shared = {id(p) for p in self.bare(self.method.players[0]).parameters()}
        named = getattr(self.method, target).state_dict(keep_vars=True)
        return {k: v for k, v in named.items() if id(v) not in shared}

    def moments(self, player: str) -> dict[str, Tensor]:
        """The optimiser's state of a player, as "<parameter>.<kind>"."""
        state = self.optimisers[player].state
        return {f"{k}.{kind}": v for k, p in live(self.bare(player)).items() for kind, v in state[p].items()}

    def memory(self) -> dict[str, Tensor]:
        """What the method itself remembers: its own buffers."""
        return dict(self.method.named_buffers(recurse=False))

    def save(self) -> None:
        """Write checkpoints/<round>: per player its weights and optimiser, the method's own buffers, the student's
        average, and the round."""
        assert self.folder is not None, "saving needs a folder"
        tensors = {}
        for player in self.method.players:
            tensors[player] = gathered(learned(self.bare(player)))
            tensors[f"{player}.optim"] = gathered(self.moments(player))
        if own := self.memory():
            tensors["method"] = gathered(own)
        tensors |= {target: gathered(self.own(target)) for target in self.method.targets}
        if self.average:
            self.average.swap()
            tensors["average"] = gathered(learned(self.bare(self.method.players[0])))
            self.average.swap()
        if self.accelerator.is_main_process:
            target = self.folder / "checkpoints" / f"{self.round:08d}"
            partial = target.with_name("partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, state in tensors.items():
                save_file(state, partial / f"{name}.safetensors")
            about = {"round": self.round, "seconds": self.seen, "average": self.average.count if self.average else 0}
            (partial / "trainer.json").write_text(json.dumps(about, indent=1) + "\n")
            os.replace(partial, target)
            for old in sorted(target.parent.glob("[0-9]*"))[:-1]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Load the newest checkpoint. Raises InputError for missing files, pickles or wrong keys."""
        folder = self.latest()
        if folder is None:
            raise InputError(f"{self.folder} holds no checkpoint to resume; start again with another --out.")
        about = read_json(folder / "trainer.json")
        if missing := {"round", "seconds", "average"} - about.keys():
            raise InputError(f"{folder} was cut off: its trainer.json lacks {', '.join(sorted(missing))}.")
        for player in self.method.players:
            weights, moments = learned(self.bare(player)), self.moments(player)
            if self.average and player == self.method.players[0]:
                assign(weights, read_tensors(folder / "average.safetensors", weights))
                assign(self.average.values, weights)
                self.average.count = about["average"]
            assign(weights, read_tensors(folder / f"{player}.safetensors", weights))
            assign(moments, read_tensors(folder / f"{player}.optim.safetensors", moments))
        if own := self.memory():
            assign(own, read_tensors(folder / "method.safetensors", own))
        for target in self.method.targets:
            assign(self.own(target), read_tensors(folder / f"{target}.safetensors", self.own(target)))
        self.round, self.seen = about["round"], about["seconds"]

    def finish(self) -> nn.Module:
        """The trained student, unwrapped and in full precision, with the averaged weights in it."""
        self.offload.end(self.method.players[0])
        if self.average:
            self.average.swap()
        if self.folder is not None:
            self.accelerator.end_training()
        student = getattr(self.method, self.method.players[0])
        student = self.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
        if self.shell is not None:
            self.shell.load_state_dict(gathered(learned(student)), strict=False, assign=True)
            student = self.shell.to(self.device)
        return student.eval()


def sharded(module: nn.Module) -> nn.Module:
    """FSDP2: shard the trained parameters over the processes; frozen ones, which roles share, stay whole."""
    from torch.distributed.fsdp import fully_shard

    still = {p for p in module.parameters() if not p.requires_grad}
    kept: dict[str, Any] = {"ignored_params": still} if still else {}
    # left whole after a call without gradient, it would show other parameters than its optimiser holds
    fully_shard(module, reshard_after_forward=True, **kept)
    return module


def read_tensors(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A safetensors file that must hold exactly the keys and shapes of `like`. Raises InputError otherwise."""
    if not path.exists():
        raise InputError(f"{path} is missing: the checkpoint is not of this method, or was cut off.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file ({error}); pickles are never read.") from None
    if wrong := sorted(found.keys() ^ like.keys()):
        raise InputError(
            f"{path} does not fit this run: {len(wrong)} keys differ, for example {wrong[0]!r}. "
            "Resume with the method and settings that wrote it."
        )
    for key, value in found.items():
        if value.shape != like[key].shape:
            raise InputError(f"{path}: {key!r} has shape {tuple(value.shape)}, expected {tuple(like[key].shape)}.")
    return found
