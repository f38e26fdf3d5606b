"""The settings of a run, and how `--set key=value` and keyword arguments become them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from onestroke.errors import InputError, unknown
from onestroke.solvers import SOLVERS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the trainer reads. Dictionaries are keyed by player; a player without an entry takes the key "*"."""

    steps: int = 1000
    """Rounds of the method."""
    batch_size: int = 16
    """Samples per micro-batch and process."""
    accumulate: int = 1
    """Micro-batches per round."""
    seed: int = 0
    student_steps: int = 1
    """Calls of the student per picture."""
    renoise: Literal["fresh", "fixed", "implied"] = "fresh"
    """The noise of the student's later calls: drawn anew, the first one, or the student's own estimate (DDIM)."""
    height: int = 0
    """Of the pictures in pixels; 0: as the teacher draws by itself."""
    width: int = 0
    guidance_scale: float = 1.0
    """Classifier-free guidance of the teacher while distilling; 1 is none."""
    init: str = ""
    """The folder of a student of the same teacher to go on from; empty: the student begins as the teacher."""
    layers: float = 1.0
    """The part of the teacher's layers that the student keeps, in (0, 1]: below 1 it has fewer blocks, or of a UNet
    fewer residual and transformer layers in each; evenly spaced, and one of each kind at least. Their weights are the
    teacher's, but together they draw nothing at first: meant for slimflow, whose annealed reflow begins as plain flow
    matching. Any other method takes it; least fit are those whose student must draw from the first round on. Not with
    LoRA of the student."""
    students: int = 1
    """Students on as many clusters of the prompts, each a run of its own, and a router between them; a folder of prompt
    files gives every file a student."""
    reward: str = ""
    """Of the methods that need one: "clip:<folder or hub id>"; empty: the teacher's own pair of towers."""
    pair_count: int = 0
    """Pairs of the teacher's solver, or ways, for the methods that need them; 0: one per prompt."""
    solver: str = "dpm++2m"
    """What makes the pairs, one of `onestroke.solvers.SOLVERS`; ways are of ddim."""
    solver_steps: int = 25
    guide: Literal["full", "adaptive", "linear"] = "full"
    """How guidance is computed where the teacher makes pairs or ways: throughout; until both conditions say the same
    x0 (Adaptive Guidance); or, of pairs, with the null condition regressed at most calls, by weights that are fitted to
    the first 200 (LinearAG)."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps its state in 8 bits: a quarter of the memory, and it needs the extra `8bit`."""
    lr: dict[str, float] = field(default_factory=lambda: {"*": 1e-5})
    betas: dict[str, list[float]] = field(default_factory=lambda: {"*": [0.9, 0.999]})
    weight_decay: float = 0.0
    warmup: int = 0
    """Rounds of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    clip: float = 1.0
    """Largest gradient norm per player; 0 switches clipping off."""
    ema: float = 0.999
    """Decay of the student's average, which is what is saved; 0 switches it off."""
    lora_rank: dict[str, int] = field(default_factory=dict)
    """Rank of the LoRA adapters of a player over the teacher's shared frozen weights; absent or 0: a full copy."""
    lora_alpha: dict[str, int] = field(default_factory=dict)
    """LoRA scale times rank, per player; absent: the rank."""
    lora_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Names of the layers that get adapters."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the network passes; "no" is float32."""
    shard: bool = False
    """Shard players over the processes (FSDP2) instead of replicating them (DDP); with LoRA it needs torch 2.7."""
    gradient_checkpointing: bool = False
    offload: bool = False
    """Keep what is idle in main memory: a role comes to the device for its turn, an optimiser's state for its step."""
    save_every: int = 500
    """Rounds between checkpoints; the last round is always saved."""
    log_with: str = "tensorboard"
    """An accelerate tracker, or "none"."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "student_steps", "students", "solver_steps", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"setting {name}={getattr(self, name)} must be at least 1.")
        for name in ("seed", "pair_count", "warmup", "weight_decay", "clip", "guidance_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"setting {name}={getattr(self, name)} must be finite and not negative.")
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, SOLVERS)
        for player, value in self.lr.items():
            if not 0 <= value < math.inf:
                raise InputError(f"setting lr.{player}={value} must be finite and not negative.")
        for player, pair in self.betas.items():
            if len(pair) != 2 or not all(0 <= beta < 1 for beta in pair):
                raise InputError(f"setting betas.{player}={pair} must be two numbers in [0, 1).")
        if min(self.height, self.width) < 0 or (self.height == 0) != (self.width == 0):
            raise InputError(f"settings height={self.height}, width={self.width} go together: pixels, or 0 each.")
        if not 0 <= self.ema < 1:
            raise InputError(f"setting ema={self.ema} must lie in [0, 1).")
        if not 0 < self.layers <= 1:
            raise InputError(f"setting layers={self.layers} must lie in (0, 1].")
        if self.layers < 1 and self.of("lora_rank", "student", 0):
            raise InputError(
                f"a student with LoRA has all layers of its teacher; leave layers={self.layers} out, or set "
                "lora_rank.student=0."
            )
        if self.shard and (self.offload or self.optimizer == "adamw8bit"):
            other = "offload=true" if self.offload else "optimizer=adamw8bit"
            raise InputError(f"settings shard=true and {other} do not go together; leave one out.")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, where they are given."""
        return (self.height, self.width) if self.height else None

    def of(self, name: str, player: str, default: Any = None) -> Any:
        """The entry of a per-player setting."""
        table = getattr(self, name)
        return table.get(player, table.get("*", default))


HINTS = get_type_hints(Settings)
FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


def parse(pairs: list[str]) -> dict[str, Any]:
    """["lr.student=1e-5", "lo=0.1"] -> {"lr": {"student": 1e-5}, "lo": 0.1}. Values are JSON, or plain words."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise InputError(f"setting {pair!r} is not of the form key=value, for example --set lr.student=1e-5.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = {"True": True, "False": False}.get(text, text)
        head, dot, player = key.strip().partition(".")
        if dot:
            found.setdefault(head, {})[player] = value
        else:
            found[head] = value
    return found


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind` (int, float, bool, str, a Literal or dict[str, ...]), or InputError."""
    choices = get_args(kind)
    ok = value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        ok = float(value)
    if getattr(kind, "__origin__", None) is dict:
        table = value if isinstance(value, Mapping) else {"*": value}
        return {k: _typed(f"{name}.{k}", v, choices[1]) for k, v in table.items()}
    if getattr(kind, "__origin__", None) is list:
        if isinstance(value, (list, tuple)):
            return [_typed(name, v, choices[0]) for v in value]
        raise InputError(f"setting {name}={value!r} must be a list of {choices[0].__name__}.")
    if choices:
        if value in choices:
            return value
        raise InputError(f"setting {name}={value!r} must be one of {', '.join(map(str, choices))}.")
    if not isinstance(ok, kind) or (isinstance(ok, bool) and kind is not bool):
        raise InputError(f"setting {name}={value!r} must be of type {kind.__name__}.")
    return ok


def resolve(
    given: Mapping[str, Any], options: Mapping[str, Any], players: tuple[str, ...], *layers: Mapping[str, Any]
) -> tuple[Settings, dict[str, Any]]:
    """Split `given` into trainer settings and method options, over the default `layers` (later ones win).

    Raises InputError for a key that is neither (naming the nearest), a wrong type, or a player that does not exist.
    """
    run: dict[str, Any] = {}
    method: dict[str, Any] = {}
    for layer in (*layers, given):
        for key, value in layer.items():
            if key in FIELDS:
                value = _typed(key, value, HINTS[key])
                if isinstance(value, dict):
                    for player in value:
                        if player not in (*players, "*"):
                            raise unknown(f"player in setting {key!r}", player, (*players, "*"))
                    value = ({} if "*" in value else run.get(key, {})) | value
                run[key] = value
            elif key in options:
                default = options[key]
                method[key] = _typed(key, value, type(default)) if isinstance(default, (int, float, str)) else value
            else:
                raise unknown("setting", key, (*FIELDS, *options))
    return Settings(**run), method
