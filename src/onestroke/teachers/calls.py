"""How a pipeline calls its network, learned by listening to the pipeline itself.

A pipeline knows what its network reads: prompts through its own `encode_prompt`, pooled text, size ids, masks,
embedded guidance, packed latents, times that count to 1000 or to 1, forward or backward. Here a listener stands in for
the network while the pipeline draws, and writes down what it is given. Nothing is typed by hand for a model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn

from onestroke.errors import InputError
from onestroke.paths import Cond, Flow, Table

NAMES = {  # of the field, for the arguments of networks; other arguments keep their own
    "encoder_hidden_states": "text",
    "cap_feats": "text",
    "pooled_projections": "pooled",
    "text_embeds": "pooled",
    "encoder_attention_mask": "mask",
    "encoder_hidden_states_mask": "mask",
    "guidance": "guidance",
}
PROBES = ["", "a red cat"]  # of different lengths, so that a mask shows


class Listener(nn.Module):
    """Stands in a pipeline for its network: writes down its arguments by name, and answers with ones."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.__dict__["net"] = net  # not a submodule: this is no part of it
        self.calls: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["net"], name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any]:
        given = dict(inspect.signature(self.net.forward).bind(*args, **kwargs).arguments)
        self.calls.append(given)
        x = next(iter(given.values()))
        if isinstance(x, Tensor):
            return (torch.ones_like(x).repeat(1, learned_variance(self.net), *[1] * (x.ndim - 2)),)
        return ([torch.ones_like(row) for row in x],)


class Witness(FlowMatchEulerDiscreteScheduler):
    """The scheduler under which we listen to a flow. seeded: whether it is given the caller's generators."""

    seeded = False

    def step(self, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
        self.seeded = generator is not None
        return FlowMatchEulerDiscreteScheduler.step(self, *args, generator=generator, **kwargs)


def learned_variance(net: nn.Module) -> int:
    """2 for a network whose output also holds a variance, in its second half of channels; else 1."""
    config = dict(getattr(net, "config", {}))
    return 2 if config.get("out_channels") == 2 * config.get("in_channels", 0) else 1


def flat(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"added": {"ids": x}} -> {"added.ids": x}."""
    found: dict[str, Any] = {}
    for key, value in arguments.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def nested(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    found: dict[str, Any] = {}
    for key, value in arguments.items():
        *outer, last = key.split(".")
        place = found
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = value
    return found


def padded(rows: list[Tensor], length: int | None = None) -> Tensor:
    """Rows (L_i, ...) of different lengths as one tensor (B, L, ...), zeros at the end."""
    if rows[0].ndim == 0:
        return torch.stack(rows)
    length = max(len(row) for row in rows) if length is None else length
    out = rows[0].new_zeros((len(rows), length, *rows[0].shape[1:]))
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


@dataclass
class Call:
    """How a network is called. The defaults are those of a UNet with one text encoder.

    sample, time: names of its first two arguments. The time argument is scale x (the scheduler's time) + offset.
    rows: argument -> name in the condition, for what differs by picture; a name in `ragged` is passed as a list of the
    rows, without the padding that the condition's mask shows. constants: what does not. row: the shape of one sample as
    it is passed, in a list where `listed`; order: which entry of a flattened latent stands where in it, where it is
    packed. sign: of the output. silent: tokens at the end of an SD3's text that are zeros whatever the prompt.
    """

    sample: str = "sample"
    time: str = "timestep"
    scale: float = 1.0
    offset: float = 0.0
    sign: float = 1.0
    rows: dict[str, str] = field(default_factory=lambda: {"encoder_hidden_states": "text"})
    ragged: frozenset[str] = frozenset()
    constants: dict[str, Any] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()  # constants given once per picture
    row: tuple[int, ...] | None = None
    listed: bool = False
    order: Tensor | None = None
    silent: int = 0

    @cached_property
    def places(self) -> Tensor:
        """The inverse of `order`."""
        assert self.order is not None
        return self.order.argsort()

    def arguments(self, x: Tensor, time: Tensor, cond: Cond, dtype: torch.dtype) -> dict[str, Any]:
        """x (B, C, H, W), the scheduler's time (B,) and the condition -> keyword arguments of the network's forward."""

        def cast(v: Any) -> Any:
            return v.to(x.device, dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v

        given = {k: [v] * len(x) if k in self.repeated else cast(v) for k, v in self.constants.items()}
        for key, name in self.rows.items():
            value = cast(cond[name])
            if name in self.ragged:
                mask = cond.get(f"{name}_mask")
                lengths = None if mask is None else mask.sum(1).tolist()
                value = list(value if lengths is None else (v[:n] for v, n in zip(value, lengths, strict=True)))
            given[key] = value
        packed = self.pack(x.to(dtype))
        given[self.sample] = list(packed) if self.listed else packed
        given[self.time] = (self.scale * time + self.offset).to(torch.float32)
        return nested(given)

    def pack(self, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) as they are passed."""
        if self.order is not None:
            x = x.flatten(1)[:, self.order.to(x.device)]
        return x if self.row is None else x.reshape(-1, *self.row)

    def latents(self, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `pack`: (B, *shape)."""
        if self.order is not None:
            packed = packed.flatten(1)[:, self.places.to(packed.device)]
        return packed.reshape(-1, *shape)  # not len(packed): a traced graph would keep the number

    def answer(self, out: Tensor | list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """What the network returned as latents (B, *shape), in the scheduler's sign and without its variance."""
        out = torch.stack(out) if isinstance(out, list) else out
        if self.order is None and out.ndim == 4 and out.shape[1] == 2 * shape[0]:
            out = out.chunk(2, 1)[0]
        return self.sign * self.latents(out, shape)

    def condition(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """The condition in the arguments of one call, by name. A mask left out is one of ones."""
        found: dict[str, Tensor] = {}
        missing = []
        for key, name in self.rows.items():
            value = given[key]
            if value is None:
                missing.append(name)
            elif name in self.ragged:
                found[name] = padded(value)
                ones = [torch.ones(len(v), dtype=torch.bool, device=v.device) for v in value]
                found[f"{name}_mask"] = padded(ones)
            else:
                found[name] = value
        for name in missing:  # a pipeline may pass no mask where there is no padding
            found[name] = torch.ones(found["text"].shape[:2], dtype=torch.int64, device=found["text"].device)
        return {k: v.detach() for k, v in found.items()}


def clock(path: Table | Flow, t: Tensor) -> Tensor:
    """Unit times (B,) as diffusers' scheduler on this path counts them: 0 to 999 on a table, to 1000 on a flow."""
    return t * (path.num_timesteps - isinstance(path, Table))


class Heard(NamedTuple):
    """What was heard while a pipeline drew: the calls of its network (flat), its scheduler, and the latents it made."""

    calls: list[dict[str, Any]]
    scheduler: Any
    latents: Tensor


class Caller:
    """A pipeline of one size, called without its network.

    size: (height, width) of the pictures in pixels, None for the pipeline's own. Raises InputError for a size that the
    pipeline refuses, and for a pipeline whose calls cannot be read.
    """

    def __init__(self, pipeline: Any, part: str, flow: bool, size: Sequence[int] | None = None):
        self.pipeline, self.part, self.flow, self.size = pipeline, part, flow, size
        self.embedded = False  # whether the network reads the guidance scale
        self.options = set(inspect.signature(pipeline.__call__).parameters)
        self.unguided = {"true_cfg_scale": 1.0} if "true_cfg_scale" in self.options else {"guidance_scale": 1.0}
        self.two = self.listen(PROBES, steps=2, **UNSHIFTED)
        if len(next(iter(self.two.calls[0].values()))) > len(PROBES):
            self.unguided = {"guidance_scale": 0.0}  # guidance is written as the distance beyond the condition
            self.two = self.listen(PROBES, steps=2, **UNSHIFTED)

    def keywords(self, guidance_scale: float = 1.0, count: int = 0) -> dict[str, Any]:
        """What the pipeline is called with to draw in this size under this guidance; 1 is none.

        count: of the prompts, for pipelines that are guided only when they are given negative ones.
        """
        found: dict[str, Any] = {k: v + guidance_scale - 1 for k, v in self.unguided.items()}
        if self.embedded and guidance_scale != 1:
            found = {**self.unguided, "guidance_scale": guidance_scale}
        elif "true_cfg_scale" in found and guidance_scale != 1:
            found["negative_prompt"] = [""] * count
        if self.size:
            found |= {"height": self.size[0], "width": self.size[1]}
        if "use_resolution_binning" in self.options:
            found["use_resolution_binning"] = False
        return found

    @torch.no_grad()
    def listen(self, prompts: list[str], steps: int = 1, guidance_scale: float = 1.0, **scheduler: Any) -> Heard:
        """Let the pipeline draw with a listener for its network. scheduler: changes of a flow scheduler's config."""
        twin, listener = copy.copy(self.pipeline), Listener(getattr(self.pipeline, self.part))
        config = self.pipeline.scheduler.config
        if self.flow:
            kept = {k: v for k, v in config.items() if k in FLOW_KEYS}
            made: Any = Witness(**{**kept, **scheduler})
        else:
            made = DDIMScheduler.from_config(config, timestep_spacing="trailing")
        twin.register_modules(**{self.part: listener, "scheduler": made})
        twin.set_progress_bar_config(disable=True)
        try:
            out = twin(
                list(prompts),
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                return_dict=False,
                **self.keywords(guidance_scale, len(prompts)),
            )[0]
        except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
            name, line = type(self.pipeline).__name__, str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{name} cannot be called with prompts{self._sized()}: {line[0]}") from error
        return Heard([flat(call) for call in listener.calls], made, out)

    def _sized(self) -> str:
        return f" for pictures of {self.size[0]}x{self.size[1]} pixels" if self.size else ""

    # ---- what is learned --------------------------------------------------------------------------------------

    def learn(self) -> tuple[Call, tuple[int, ...], dict[str, Tensor]]:
        """The call, the shape (C, H, W) of one latent, and the unconditional condition with leading dimension 1."""
        two, four = self.two, self.listen(2 * PROBES)
        one, other = two.calls[:2]
        sample = next(iter(one))
        time = [k for k, v in one.items() if k != sample and not _same(v, other[k])]
        if len(time) != 1:
            raise InputError(f"{type(self.pipeline).__name__} changes {time} from step to step: it cannot be read yet.")
        call = Call(sample, time[0], rows={})
        call.scale, call.offset = _line(two.scheduler.timesteps[:2], [one[time[0]], other[time[0]]])
        for key, value in one.items():
            if key not in (sample, time[0]):
                self._sort(call, key, value, four.calls[0][key])
        x = one[sample]
        call.listed, x = isinstance(x, list), torch.stack(x) if isinstance(x, list) else x
        shape = self._shape(call, x)
        if self.flow:  # the network answered with ones
            moved = (call.pack(x) if x.ndim == 4 and call.order is None else x).flatten() - two.latents.flatten()
            call.sign = float(moved.mean().sign())
        self.seeded = getattr(two.scheduler, "seeded", True)  # schedulers with betas are, by every pipeline
        null = self._null(call)
        self.embedded = "guidance" in call.rows.values()
        if isinstance(getattr(self.pipeline, self.part), SD3Transformer2DModel):
            said = torch.cat([call.condition(two.calls[0])["text"], null["text"]]).ne(0).any(-1).any(0)
            call.silent = int(said.flip(0).cumsum(0).eq(0).sum())
        return call, shape, null

    def _sort(self, call: Call, key: str, two: Any, four: Any) -> None:
        """Put one argument, heard with two prompts and with four, among the rows or the constants of the call."""
        name = NAMES.get(key.rpartition(".")[2], key.rpartition(".")[2])
        if isinstance(two, Tensor) and two.ndim and (len(two), len(four)) == (2, 4):
            call.rows[key] = name
        elif isinstance(two, list) and len(two) == 2 and isinstance(two[0], Tensor):
            call.rows[key] = name
            call.ragged |= {name}
        elif isinstance(two, list) and (len(two), len(four)) == (2, 4) and all(v == two[0] for v in four):
            call.constants[key] = two[0]
            call.repeated |= {key}
        elif _same(two, four):
            call.constants[key] = two
        else:
            raise InputError(f"{type(self.pipeline).__name__} passes {key!r} in a way that cannot be read yet.")

    def _shape(self, call: Call, x: Tensor) -> tuple[int, ...]:
        """The shape (C, H, W) of one latent, from a batch as it is passed; notes in `call` how it is packed."""
        per = int(self.pipeline.vae_scale_factor)
        if hasattr(self.pipeline, "_pack_latents"):
            if self.size:
                height, width = (n // per for n in self.size)
            else:
                height = width = 2 * round(x.shape[1] ** 0.5)
            shape: tuple[int, ...] = (x.shape[1] * x.shape[2] // (height * width), height, width)
            if height % 2 or width % 2 or shape[0] * height * width != x[0].numel():
                raise InputError(f"{self.size} pixels: height and width must be multiples of {2 * per}.")
            index = torch.arange(x[0].numel(), device=x.device).reshape(1, *shape)
            call.order = self.pipeline._pack_latents(index, 1, *shape).flatten()
        else:
            shape = tuple(x.shape[1:]) if x.ndim == 4 else (x.shape[1], *x.shape[3:])
        call.row = tuple(x.shape[1:])
        if self.size and (shape[1] * per, shape[2] * per) != tuple(self.size):
            raise InputError(
                f"the pictures of a {type(self.pipeline).__name__} of {self.size[0]}x{self.size[1]} pixels become "
                f"{shape[1] * per}x{shape[2] * per}: give multiples of {per}."
            )
        return shape

    def _null(self, call: Call) -> dict[str, Tensor]:
        """What the pipeline itself sets against the condition when it is guided; the empty prompt where it never is."""
        cond, halves = call.condition(self.two.calls[0]), []
        for given in self.listen(PROBES, guidance_scale=2.0).calls:
            both = call.condition(given)
            halves += [{k: v[i : i + 2] for k, v in both.items()} for i in range(0, len(next(iter(both.values()))), 2)]
        other = [half for half in halves if any(not _same(v, cond[k]) for k, v in half.items())]
        return {k: v[:1] for k, v in (other[0] if other else cond).items()}

    def encode(self, call: Call, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts -> what the pipeline gives its network for them, (B, ...) each."""
        return call.condition(self.listen(prompts).calls[0])

    def shift(self) -> tuple[float, bool]:
        """Of a flow: the shift of its times in this size, and whether the pipeline leaves their spacing to the
        scheduler, which then counts from 1 to its smallest time."""
        config = self.pipeline.scheduler.config
        second = self.two.scheduler.sigmas[1].item()
        shift = float(config.get("flow_shift") or config.get("shift") or 1.0)
        if config.get("use_dynamic_shifting"):
            moved = self.listen(PROBES[:1], steps=2).scheduler.sigmas[1].item()
            shift = moved / (1 - moved) / (second / (1 - second))
        return shift, second < 0.25


UNSHIFTED = {"shift": 1.0, "use_dynamic_shifting": False}
FLOW_KEYS = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)
"""The config of a flow scheduler as far as we listen under it: its shift, and nothing that bends its spacing."""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other


def _line(times: Tensor, given: list[Any]) -> tuple[float, float]:
    """(scale, offset) of the straight line from the scheduler's two times to what the network was given."""
    x = [float(t) for t in times]
    y = [float(torch.as_tensor(v).flatten()[0]) for v in given]
    scale = (y[0] - y[1]) / (x[0] - x[1])
    scale = round(scale, 9)
    return scale, round(y[0] - scale * x[0], 6)
