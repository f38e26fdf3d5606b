"""The one seam between methods and networks: a denoiser maps (x_t, t, cond) to an Estimate."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.paths import Cond, Estimate, Path, Prediction, like

Network = TypeVar("Network", bound=nn.Module)


class Denoiser(nn.Module, ABC):
    """A network on a path. A subclass writes `predict` and nothing else.

    Raises ValueError when the prediction type is singular at an end of the path. `taps` names the layers whose outputs
    are its features, which it gives where it is asked to (see `tap`). `bottleneck` is the place of the narrowest layer
    among them, `clock` the name of the submodule that embeds the time, as (B, E).
    """

    bottleneck: int = -1
    clock: str | None = None
    taps: tuple[str, ...] = ()
    tapping = False

    def __init__(self, path: Path, prediction: Prediction):
        super().__init__()
        path.check(prediction)
        self.path, self.prediction = path, prediction

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, *D), t (B,) float64 -> the raw network output (B, *D) and the tapped features."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        """x (B, *D), t (B,) in [t_min, t_max] -> Estimate, in float32 or wider."""
        out, features = self.predict(x, t, cond)
        return self.estimate(x, out, t)._replace(features=features)

    def estimate(self, x: Tensor, out: Tensor, t: Tensor) -> Estimate:
        """What the raw output (B, *D) says of x (B, *D) at t (B,)."""
        return self.path.split(x, out, t, self.prediction)

    def fewer(self, layers: float) -> Denoiser:
        """A copy that keeps this part of the layers, in (0, 1). Raises InputError where none can be left out."""
        raise InputError(f"a {type(self).__name__} has no layers to leave out; leave layers={layers} out.")


def kept_of(count: int, part: float) -> int:
    """How many of `count` layers a part in (0, 1] of them is: rounded, and one at least where there is any."""
    return min(count, max(1, round(part * count)))


def spaced(kept: int, count: int) -> list[int]:
    """Which of `count` layers are kept: evenly spaced, from the first to the last; of one, the first."""
    return [i * (count - 1) // max(kept - 1, 1) for i in range(kept)]


def tap(net: nn.Module) -> nn.Module:
    """`net`, whose estimates hold its features from now on. Nobody else pays for keeping them."""
    for module in net.modules():
        if isinstance(module, Denoiser):
            module.tapping = True
    return net


class Halves(Denoiser):
    """A denoiser in two halves, an encoder and a decoder with the time for itself: it can be asked for several at once.

    With t (B, K) the encoder runs once, at the first of them, and the decoder at all of them in parallel, on what the
    encoder found (Faster Diffusion, arXiv 2312.09608). Each output is then read at the state to which the ones before
    it lead by DDIM steps: x0 and eps are (B, K, *D), without features.
    """

    @abstractmethod
    def encode(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """x (B, *D), t (B,) -> what the decoder reads of them, (B, ...) each."""

    @abstractmethod
    def decode(self, found: tuple[Tensor, ...], t: Tensor, cond: Cond) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the encoder found and t (B,) -> as `predict`."""

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.decode(self.encode(x, t, cond), t, cond)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        """As of every denoiser; t may be (B, K), decreasing along K."""
        if t.ndim == 1:
            return super().forward(x, t, cond)
        count, found = t.shape[1], self.encode(x, t[:, 0], cond)
        rows = tuple(v.repeat_interleave(count, 0) for v in found)
        out, _ = self.decode(rows, t.flatten(), {k: v.repeat_interleave(count, 0) for k, v in cond.items()})
        ests: list[Estimate] = []
        for k, part in enumerate(out.unflatten(0, (-1, count)).unbind(1)):
            x = self.path.mix(ests[-1].x0, ests[-1].eps, t[:, k]) if ests else x
            ests.append(self.estimate(x, part, t[:, k]))
        return Estimate(torch.stack([e.x0 for e in ests], 1), torch.stack([e.eps for e in ests], 1))


def no_halves(name: str) -> InputError:
    """The refusal of a network, by its name, that has no encoder to run by itself."""
    return InputError(
        f"this method runs the encoder of a network by itself, and {name} has none; take a teacher with a UNet, such "
        "as Stable Diffusion."
    )


def first(outputs: Sequence[Tensor]) -> Tensor:
    """The first output of a layer."""
    return outputs[0]


@contextmanager
def tapped(
    net: nn.Module, names: Sequence[str], feature: Callable[[Sequence[Tensor]], Tensor] = first
) -> Iterator[list[Tensor]]:
    """The outputs (B, C, ...) of these submodules during one call of `net`, in the order they are called.

    Hooks live for this call only, so that copies and wrappers of the network never share them. `feature` makes one
    tensor of the outputs of a layer.
    """
    found: list[Tensor] = []

    def hook(module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        found.append(feature((out,) if isinstance(out, Tensor) else out))

    handles = [net.get_submodule(name).register_forward_hook(hook) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


_fused = False


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on a CPU as on a GPU, in the same types and to the whole text, so that it takes a GPU's memory."""
    global _fused
    before, _fused = _fused, True
    try:
        yield
    finally:
        _fused = before


class WideAttention(TorchFunctionMode):
    """Attention in float32 at least, whatever autocast says. Where it is to `keys` keys, the last of them stands for
    `count` equal ones: log count on its logit."""

    def __init__(self, keys: int = 0, count: int = 1):
        super().__init__()
        self.keys, self.count = keys, count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
        given |= kwargs or {}
        back = given["value"].dtype
        for name in ("query", "key", "value", "attn_mask"):
            if isinstance(x := given.get(name), Tensor) and x.dtype in (torch.bfloat16, torch.float16):
                given[name] = x.float()
        if given["key"].shape[-2] == self.keys:
            bias = given["key"].new_zeros(self.keys)
            bias[-1] = math.log(self.count)
            given["attn_mask"] = bias.expand(given["query"].shape[-2], -1)
        with torch.autocast("cpu", enabled=False):
            return func(**given).to(back)


@contextmanager
def plain_attention(x: Tensor, keys: int = 0, count: int = 1) -> Iterator[None]:
    """Attention to x by the kernels that are fast backward on a CPU, which those of bfloat16 are not, and by matrix
    products under forward-mode differentiation, for which there are no fused ones. keys, count: see WideAttention."""
    slow = x.device.type == "cpu" and torch.is_grad_enabled() and not _fused
    with ExitStack() as stack:
        if unpack_dual(x).tangent is not None:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if slow or count > 1:
            stack.enter_context(WideAttention(keys, count))
        yield


def checkpointed(block: Callable[..., Any], *args: Any) -> Any:
    """Gradient checkpointing of a block, which runs again under the attention of its first time."""
    x = next(a for a in args if isinstance(a, Tensor))
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), plain_attention(x)))


def on_cpu(x: Tensor) -> bool:
    """Whether a call on x is computed on a CPU, and neither written down as a graph nor measured for a GPU."""
    return x.device.type == "cpu" and not (_fused or torch.compiler.is_compiling() or torch.jit.is_tracing())


def as_wide(cond: Cond, other: Cond) -> dict[str, Tensor]:
    """`cond` with zeros appended along dimension 1 where `other` is wider: texts are as long as the longest that was
    encoded with them, and their masks say where they end."""
    found = dict(cond)
    for k, v in cond.items():
        if v.ndim > 1 and k in other and (more := other[k].shape[1] - v.shape[1]) > 0:
            found[k] = torch.cat([v, v.new_zeros(len(v), more, *v.shape[2:])], 1)
    return found


class Guided(nn.Module):
    """Classifier-free guidance as a denoiser: null + scale (cond - null); scale 1 is none (arXiv 2207.12598).

    Both halves go through the network in one call of twice the batch. Features are those of the conditional half.
    Scale 0 is the null condition alone, in one call; a negative scale guides away from the condition. A network that
    reads its guidance, as cond["guidance"] (B,), is given the scale, in one call (arXiv 2210.03142). scale: one, or one
    per row (B,), and then always of two calls, or given.
    """

    def __init__(self, net: nn.Module, scale: float | Tensor, null: Cond):
        super().__init__()
        self.net, self.scale, self.null = net, scale, null

    def sides(self, cond: Cond) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`cond` and, for as many rows, the null condition; both as wide as the wider."""
        cond, empty = as_wide(cond, self.null), as_wide(self.null, cond)
        return dict(cond), {k: empty[k].to(v).expand_as(v) if k in empty else v for k, v in cond.items()}

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        rows = self.scale if isinstance(self.scale, Tensor) else None
        if rows is None and self.scale == 1:
            return self.net(x, t, cond)
        if "guidance" in cond and (rows is not None or self.scale > 0):
            given = cond["guidance"]
            return self.net(x, t, {**cond, "guidance": given * 0 + (self.scale if rows is None else rows.to(given))})
        cond, null = self.sides(cond)
        if rows is None and self.scale == 0:
            return self.net(x, t, null)
        both = {k: torch.cat([v, null[k]]) for k, v in cond.items()}
        est = self.net(torch.cat([x, x]), torch.cat([t, t]), both)
        (yes, no), (yes_eps, no_eps) = est.x0.chunk(2), est.eps.chunk(2)
        features = tuple(f.chunk(2)[0] for f in est.features)
        scale = self.scale if rows is None else like(rows, no)
        return Estimate(no.lerp(yes, scale), no_eps.lerp(yes_eps, scale), features)


def dropped(cond: Cond, null: Cond, rows: Tensor) -> Cond:
    """`cond` with the null condition in the `rows` (B,) that are true."""
    cond, null = as_wide(cond, null), as_wide(null, cond)
    return {k: torch.where(rows.reshape(-1, *[1] * (v.ndim - 1)), null[k].to(v), v) for k, v in cond.items()}


PREFIX, SCALE = "negative.", "nasa_scale"


def negated(cond: Cond, negative: Cond, scale: float | None) -> Cond:
    """`cond` (B, ...) away from `negative`, (1, ...) or (B, ...): the denoiser of a pipeline reads both (see
    `onestroke.teachers.nasa`). Of the negative condition only the text and its mask are read; a scale of 0 is `cond`
    itself, and None that of the denoiser's branch."""
    if scale == 0:
        return cond
    like = next(iter(cond.values()))
    rows = {PREFIX + k: v.to(like.device) for k, v in negative.items() if k in ("text", "mask")}
    rows = {k: v.expand(len(like), *v.shape[1:]) for k, v in rows.items()}
    strength = {} if scale is None else {SCALE: torch.full((len(like),), float(scale), device=like.device)}
    return {**cond, **rows, **strength}


class Routed(nn.Module):
    """Several denoisers of one path as one: every row is asked of the one whose number (B,) `router` gives it.

    So that the parts of a condition space may each have a network of their own (arXiv 2410.23274).
    """

    def __init__(self, nets: Sequence[nn.Module], router: Callable[[Cond], Tensor]):
        super().__init__()
        self.nets, self.router, self.path = nn.ModuleList(nets), router, plain(nets[0]).path

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        owner = self.router(cond)
        rows = [(owner == k).nonzero().flatten() for k in range(len(self.nets))]
        asked = [
            net(x[i], t[i], {k: v[i] for k, v in cond.items()})
            for net, i in zip(self.nets, rows, strict=True)
            if len(i)
        ]
        back = torch.cat(rows).argsort()
        return Estimate(torch.cat([e.x0 for e in asked])[back], torch.cat([e.eps for e in asked])[back])


class TwoTimes(nn.Module):
    """A denoiser that also reads a second time, cond["s"] (B,) in [-1, 1], beside its own.

    What it says goes to the time embedding of the network, through a linear map of functions that vanish at s = 0 and
    that starts at zero: without cond["s"], at s = 0, and before training at every s, this is `net` itself. Raises
    InputError for a network without a time embedding.
    """

    def __init__(self, net: nn.Module, shape: tuple[int, ...], null: Cond):
        super().__init__()
        self.net, self.clock = net, clock_of(net)
        like = next(p for p in net.parameters() if p.is_floating_point())
        with torch.no_grad(), tapped(net, [self.clock]) as found:
            t = torch.full((1,), 0.5, dtype=torch.float64, device=like.device)
            net(like.new_zeros(1, *shape), t, {k: v.to(like.device) for k, v in null.items()})
        self.shift = nn.Linear(8, found[0].shape[-1], bias=False).to(like)
        nn.init.zeros_(self.shift.weight)

    def added(self, s: Tensor) -> Tensor:
        """What s (B,) adds to the time embedding, (B, E)."""
        angle = s[:, None] * (torch.pi / 2) * torch.arange(1, 5, device=s.device)
        return self.shift(torch.cat([angle.sin(), 1 - angle.cos()], 1).to(self.shift.weight))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        if "s" not in cond:
            return self.net(x, t, cond)
        shift, module = self.added(cond["s"]), self.net.get_submodule(self.clock)
        handle = module.register_forward_hook(lambda module, args, out: out + shift)
        try:
            return self.net(x, t, {k: v for k, v in cond.items() if k != "s"})
        finally:
            handle.remove()


class Told(NamedTuple):
    """Which guidance a student is told by cond["s"] (see `TwoTimes`): scale + slope s, within `reach` of `scale`."""

    scale: float
    slope: float
    reach: float

    def side(self, guidance_scale: float) -> float:
        """The s that stands for a guidance. Raises InputError for one that was not trained."""
        if abs(guidance_scale - self.scale) > self.reach + 1e-6:
            low, high = self.scale - self.reach, self.scale + self.reach
            raise InputError(f"this student knows guidance scales from {low:g} to {high:g}, not {guidance_scale:g}.")
        return (guidance_scale - self.scale) / self.slope


def told_around(scale: float, spread: float) -> Told | None:
    """What `guidances` of this scale and spread tell; None where they are all one.

    Raises InputError for a spread outside [0, 1]: guidance less 1 would change its sign.
    """
    if not 0 <= spread <= 1:
        raise InputError(f"spread={spread} must lie in [0, 1].")
    slope = (scale - 1) * spread
    return Told(scale, slope, abs(slope)) if slope else None


def guidances(draw: Draws, scale: float, spread: float) -> tuple[Tensor, Tensor | None]:
    """(side, guidance), (B,) float64 each: a guidance drawn for every row, and where it lies in its range, [-1, 1].

    The guidance is that of `guidance_at`, and side, uniform, is what a student can be told as cond["s"] (see
    `TwoTimes`): without it, it is one of `scale`. A scale of 1 is no guidance: None, whatever the side.
    """
    side = draw.uniform(-1.0, 1.0)
    return side, None if scale == 1 else guidance_at(side, scale, spread)


def guidance_at(side: Tensor, scale: float, spread: float) -> Tensor:
    """The guidance (B,) that lies at `side` (B,) in [-1, 1]: less 1, it is that of `scale` times 1 + spread side."""
    return 1 + (scale - 1) * (1 + spread * side)


def sides(rows: Tensor) -> Tensor:
    """Where the guidances of the stored ways number `rows` (B,) lie in their range: (B,) float64 in (-1, 1), any run of
    them evenly spread, by the golden ratio."""
    return 2 * ((rows.double() + 0.5) * (5**0.5 - 1) / 2).frac() - 1


def plain(net: nn.Module) -> nn.Module:
    """The network that a student's pipeline holds: without the second time."""
    return net.net if isinstance(net, TwoTimes) else net


def clock_of(net: nn.Module) -> str:
    """The name of the submodule that embeds the time: declared, or diffusers' own. Raises InputError for none."""
    kinds = ("TimestepEmbedding", "TimestepEmbedder")
    names = (name for name, m in net.named_modules() if type(m).__name__ in kinds)
    found = getattr(net, "clock", None) or next(names, None)
    if found is None:
        raise InputError(f"{type(net).__name__} has no time embedding that could take a second time.")
    return found


class OnPath(nn.Module):
    """A denoiser read at the points of another path, by matching the signal-to-noise ratio. Exact, to both ends."""

    def __init__(self, net: nn.Module, src: Path, dst: Path):
        super().__init__()
        self.net, self.src, self.path = net, src, dst

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        s = self.src.time_of(self.path.log_snr(t))
        (c, d), (a, b) = self.src.ab(s), self.path.ab(t)
        return self.net(x * like((c + d) / (a + b), x), s, cond)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """dx/dt (B, *D) of the probability flow through x (B, *D) at t (B,), in the unit time of this path."""
        est = self(x, t, cond)
        return self.path.join(est.x0, est.eps, t, "flow")


def numbers(net: nn.Module) -> Tensor:
    """A copy of the trained numbers of a network in one vector, whole where they are sharded."""
    live = (p.detach() for p in net.parameters() if p.requires_grad)
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).flatten() for p in live])


def clone_live(net: nn.Module) -> nn.Module:
    """A copy with trained parameters of its own over the *same* frozen parameters and buffers."""
    still = (*(p for p in net.parameters() if not p.requires_grad), *net.buffers())
    return copy.deepcopy(net, {id(t): t for t in still})


def clone_sharing(net: Network) -> Network:
    """A copy of the modules over the *same* parameters and buffers: one set of weights in memory.

    Adapters added to the clone leave the original as it was. (Switching one module's adapters instead loses
    gradients silently: peft clears `requires_grad` of the inactive ones.)
    """
    return copy.deepcopy(net, {id(t): t for t in (*net.parameters(), *net.buffers())})
