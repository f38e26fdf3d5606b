"""The training loop on accelerate: optimisers, clipping, averaging, checkpoints by player name, resume, logging."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from onestroke.draws import Draws
from onestroke.errors import DivergedError, InputError
from onestroke.method import Batch, Method, play
from onestroke.paths import Cond
from onestroke.progress import Progress
from onestroke.settings import Settings


@dataclass(frozen=True)
class Data:
    """What batches are made of: rows of conditions, and of real latents where a method needs them."""

    shape: tuple[int, ...]  # of one latent
    cond: Cond  # (N, ...)
    x0: Tensor | None = None  # (N, *shape)

    def __len__(self) -> int:
        return len(next(iter(self.cond.values())))

    def batch(self, draw: Draws, device: torch.device) -> Batch:
        rows = draw.index(len(self))
        noise = draw.normal(self.shape)
        cond = {k: v[rows].to(device) for k, v in self.cond.items()}
        return Batch(noise, cond, draw, None if self.x0 is None else self.x0[rows].to(device))


class Average:
    """The exponential moving average of a module's trained parameters; warms up as (1 + k) / (10 + k)."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.count = module, decay, 0
        self.values = {k: p.detach().clone() for k, p in self.live().items()}

    def live(self) -> dict[str, nn.Parameter]:
        return {k: p for k, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.values.values()), list(self.live().values()), weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the live weights; twice is the identity."""
        for k, p in self.live().items():
            held = p.detach().clone()
            p.copy_(self.values[k])
            self.values[k] = held


class Trainer:
    """Plays a method. Construct it, then `run`; with `folder`, checkpoints are written there and can be resumed.

    One `prepare` per player (accelerate takes one model per call under FSDP2); the frozen teacher is only moved.
    """

    def __init__(self, method: Method, data: Data, settings: Settings, folder: Path | None = None):
        self.method, self.data, self.settings, self.folder = method, data, settings, folder
        tracker = None if folder is None or settings.log_with == "none" else settings.log_with
        self.accelerator = Accelerator(
            mixed_precision=settings.precision,
            log_with=tracker,
            project_dir=None if folder is None else str(folder / "log"),
        )
        self.device, self.round, self.seen = self.accelerator.device, 0, 0.0
        method.to(self.device).train()
        self.optimisers: dict[str, Any] = {}
        for player in method.players:
            module = getattr(method, player)
            if settings.gradient_checkpointing:
                for child in module.modules():
                    if hasattr(child, "enable_gradient_checkpointing"):
                        child.enable_gradient_checkpointing()
            wrapped = sharded(module) if settings.shard else self.accelerator.prepare_model(module)
            setattr(method, player, wrapped)
            params = [p for p in wrapped.parameters() if p.requires_grad]
            self.optimisers[player] = self.accelerator.prepare_optimizer(
                torch.optim.AdamW(
                    params,
                    lr=settings.of("lr", player, 1e-5),
                    betas=tuple(settings.of("betas", player)),
                    weight_decay=settings.weight_decay,
                    foreach=True,
                )
            )
        self.average = Average(getattr(method, method.players[0]), settings.ema) if settings.ema else None
        if tracker:
            self.accelerator.init_trackers("run")

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

    def update(self, player: str) -> None:
        """One optimiser step of one player, and of the average after the first player's."""
        optimiser, module = self.optimisers[player], getattr(self.method, player)
        if self.settings.clip:
            self.accelerator.unscale_gradients(optimiser)
            torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], self.settings.clip)
        for group in optimiser.param_groups:
            group["lr"] = self.settings.of("lr", player, 1e-5) * self.factor
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if self.average and player == self.method.players[0]:
            self.average.update()

    def advance(self, game: Iterator) -> Any:
        with self.accelerator.autocast():
            return next(game, None)

    def one_round(self, progress: float) -> dict[str, float]:
        self.factor = self.rate(progress)
        log = play(
            self.method, self.batches(self.round), self.round, self.update, self.accelerator.backward, self.advance
        )
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
        """Play until `settings.steps` rounds, or for `seconds` (the schedule then follows the clock)."""
        s, began = self.settings, time.monotonic() - self.seen
        images = s.batch_size * s.accumulate * self.accelerator.num_processes
        quiet = self.folder is None or not self.accelerator.is_main_process
        with Progress(s.steps, images, quiet) as progress:
            while self.round < s.steps:
                done = self.round / s.steps if seconds is None else (time.monotonic() - began) / seconds
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

    def _state(self, player: str) -> tuple[dict[str, Any], dict[str, Any]]:
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, flatten_optimizer_state_dict=True
        )
        return get_state_dict(getattr(self.method, player), self.optimisers[player].optimizer, options=options)

    def save(self) -> None:
        """Write checkpoints/<round>: per player its weights and optimiser, the student's average, and the round."""
        assert self.folder is not None, "saving needs a folder"
        tensors, scalars = {}, {}
        for player in self.method.players:
            weights, optim = self._state(player)
            tensors[player] = {k: v.contiguous() for k, v in weights.items()}
            tensors[f"{player}.optim"] = {k: v.contiguous() for k, v in optim.items() if isinstance(v, Tensor)}
            scalars[player] = {k: v for k, v in optim.items() if not isinstance(v, Tensor)}
        count = 0
        if self.average:
            self.average.swap()
            tensors["average"] = {k: v.contiguous() for k, v in self._state(self.method.players[0])[0].items()}
            self.average.swap()
            count = self.average.count
        if self.accelerator.is_main_process:
            target = self.folder / "checkpoints" / f"{self.round:08d}"
            partial = target.with_name("partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, state in tensors.items():
                save_file(state, partial / f"{name}.safetensors")
            about = {"round": self.round, "seconds": self.seen, "average": count, "optim": scalars}
            (partial / "trainer.json").write_text(json.dumps(about, indent=1) + "\n")
            os.replace(partial, target)
            for old in sorted(target.parent.glob("[0-9]*"))[:-1]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Load the newest checkpoint. Raises InputError for missing files, pickles or wrong keys."""
        folder = self.latest()
        if folder is None:
            raise InputError(f"{self.folder} holds no checkpoint to resume; start without --resume.")
        about = json.loads((folder / "trainer.json").read_text())
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, flatten_optimizer_state_dict=True
        )
        for player in self.method.players:
            weights, optim = self._state(player)
            loaded = read_tensors(folder / f"{player}.safetensors", weights)
            state = read_tensors(
                folder / f"{player}.optim.safetensors", {k: v for k, v in optim.items() if isinstance(v, Tensor)}
            )
            if self.average and player == self.method.players[0]:
                averaged = read_tensors(folder / "average.safetensors", weights)
                self._load(player, averaged, state | about["optim"][player], options)
                self.average = Average(getattr(self.method, player), self.settings.ema)
                self.average.count = about["average"]
            self._load(player, loaded, state | about["optim"][player], options)
        self.round, self.seen = about["round"], about["seconds"]

    def _load(self, player: str, weights: dict, optim: dict, options: StateDictOptions) -> None:
        set_state_dict(
            getattr(self.method, player),
            self.optimisers[player].optimizer,
            model_state_dict=weights,
            optim_state_dict=optim,
            options=StateDictOptions(**{**asdict(options), "strict": False}),
        )

    def finish(self) -> nn.Module:
        """The trained student, unwrapped, with the averaged weights in it."""
        if self.average:
            self.average.swap()
        if self.folder is not None:
            self.accelerator.end_training()
        return self.accelerator.unwrap_model(getattr(self.method, self.method.players[0])).eval()


def sharded(module: nn.Module) -> nn.Module:
    """FSDP2: shard the trained parameters over the processes; frozen ones, which roles share, stay whole."""
    from torch.distributed.fsdp import fully_shard

    still = {p for p in module.parameters() if not p.requires_grad}
    if still:
        fully_shard(module, ignored_params=still)
    else:
        fully_shard(module)
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
