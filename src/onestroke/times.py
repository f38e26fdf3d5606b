"""Time samplers: where on the path a method looks. One function each; those of one time snap to the teacher's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.paths import EDM, Path

RAMP = EDM()
"""The ramp of noise levels that `karras` is uniform on: sigma from 0.002 to 80, rho = 7."""


def uniform(draw: Draws, path: Path, lo: float | Tensor = 0.0, hi: float | Tensor = 1.0) -> Tensor:
    """(B,) float64, uniform in [lo, hi] of unit time, one or (B,) each, inside the path's own range."""
    first, last = (torch.as_tensor(v, dtype=torch.float64) for v in (lo, hi))
    return path.snap(draw.uniform(first.clamp_min(path.t_min), last.clamp_max(path.t_max)))


def straight(draw: Draws, path: Path, lo: float = 0.0, hi: float = 1.0, ends: float = 0.0) -> Tensor:
    """(B,) float64: the straight path's time u = b / (a + b) in [lo, hi], as far as the path goes.

    Uniform, or of density cosh(ends (2 u - 1)), which prefers both ends (2-RF++, arXiv 2405.20320).
    """
    first, last = torch.sigmoid(-_ends(path)).clamp(lo, hi)
    u = draw.uniform()
    if ends:
        low, high = torch.sinh(ends * (2 * first - 1)), torch.sinh(ends * (2 * last - 1))
        u = (torch.asinh(low + u * (high - low)) / ends + 1) / 2
    else:
        u = first + u * (last - first)
    return path.snap(path.time_of(torch.logit(1 - u)).clamp(path.t_min, path.t_max))


def karras(draw: Draws, path: Path, lo: float = 0.0, hi: float = 0.8) -> Tensor:
    """(B,) float64: b / a uniform on the part [lo, hi] of the ramp of Karras et al., as far as the path goes."""
    first, last = RAMP.time_of(_ends(path)).tolist()
    u = draw.uniform(max(lo, first), min(hi, last))
    return path.snap(path.time_of(RAMP.log_snr(u)).clamp(path.t_min, path.t_max))


def log_normal(draw: Draws, path: Path, mean: float, std: float) -> Tensor:
    """(B,) float64: log(b / a) normal, cut off at the ends of the path.

    The log-normal sigma of EDM (-1.2, 1.2) and the logit-normal time of flows are this one law.
    """
    first, last = torch.special.ndtr((-_ends(path) - mean) / std).tolist()
    level = mean + std * torch.special.ndtri(draw.uniform(first, last))
    return path.snap(path.time_of(-level).clamp(path.t_min, path.t_max))


def ladder(path: Path, count: int, sigma_min: float = 0.0, sigma_max: float = RAMP.sigma_max) -> Tensor:
    """`count` times, increasing float64, at which b / a is equally spaced on the ramp of Karras et al.

    From end to end of the path, whose ends stand for the levels `sigma_min` and `sigma_max` where they lie beyond; no
    other is. Not snapped. Raises InputError where no level of the path is between these.
    """
    low, high = RAMP.time_of(-torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log()).tolist()
    first, last = RAMP.time_of(_ends(path)).clamp(low, high).tolist()
    if not first < last:
        raise InputError(f"no noise level of the teacher's path is between {sigma_min} and {sigma_max}; take others.")
    inner = path.time_of(RAMP.log_snr(torch.linspace(first, last, count, dtype=torch.float64)))[1:-1]
    return torch.cat([inner.new_tensor([path.t_min]), inner, inner.new_tensor([path.t_max])])


def ramp(path: Path, sigma_min: float, sigma_max: float) -> Callable[[int], Tensor]:
    """`ladder` between these levels, a function of the count. Raises InputError where no level of the path is."""
    levels = partial(ladder, path, sigma_min=sigma_min, sigma_max=sigma_max)
    levels(2)
    return levels


def strides(path: Path, count: int) -> Tensor:
    """The times of `count` DDIM steps (count + 1,), increasing float64, from the data at 0: LCM's grid of 50.

    Raises InputError where they begin after the student's own first call, which would then never be trained.
    """
    found = torch.tensor((0.0, *reversed(path.grid(count))), dtype=torch.float64)
    if found[-1] < path.t_max:
        raise InputError(f"a grid of {count} steps leaves the noise end out; take a divisor of the teacher's times.")
    return found


def neighbours(draw: Draws, grid: Tensor, skip: int = 1) -> tuple[Tensor, Tensor]:
    """(t, s), (B,) each: a time of the grid (N,), increasing, drawn uniformly but for the first, and `skip` below."""
    grid = grid.to(draw.device)
    i = 1 + (draw.uniform() * (len(grid) - 1)).long()
    return grid[i], grid[(i - skip).clamp_min(0)]


def normal_neighbours(draw: Draws, path: Path, grid: Tensor, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """As `neighbours`, each pair as likely as a normal log(b / a) falls between its two (iCT, arXiv 2310.14189)."""
    grid = grid.to(draw.device)
    level = -path.log_snr(grid)
    first, last = torch.special.ndtr((level[[0, -1]] - mean) / std).tolist()
    i = torch.searchsorted(level, mean + std * torch.special.ndtri(draw.uniform(first, last)))
    i = i.clamp(1, len(grid) - 1)
    return grid[i], grid[i - 1]


def cut(path: Path, edges: Sequence[float], count: int) -> Tensor:
    """`count` + 1 times, increasing float64: the spans between `edges` (increasing) in as many parts each.

    Raises InputError where there are not as many in each, or a teacher has fewer times.
    """
    spans = len(edges) - 1
    if count < 1 or count % spans:
        raise InputError(f"a grid of {count} steps has no {spans} equal segments; take a multiple of {spans}.")
    corners = torch.tensor(edges, dtype=torch.float64)
    share = torch.arange(count, dtype=torch.float64) / (count // spans)
    low = share.long()
    grid = path.snap(torch.cat([corners[low].lerp(corners[low + 1], share - low), corners[-1:]]))
    if len(grid.unique()) <= count:
        raise InputError(f"a grid of {count} steps has more of them than the teacher has times.")
    return grid


def halvings(last: int, **first: int) -> list[int]:
    """The one number given by name, halved down to `last`. Raises InputError where it is not `last` doubled."""
    ((name, start),) = first.items()
    found = [last << k for k in range(max(start, 1).bit_length()) if last << k <= start]
    if not found or found[-1] != start:
        raise InputError(f"{name}={start} must be the student's {last} step(s) doubled some times.")
    return found[::-1]


def segment(edges: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of increasing `edges` (M + 1,) the last below t (B,), and the first that is not."""
    edges = edges.to(t.device).contiguous()
    i = torch.searchsorted(edges, t.contiguous())
    return edges[i - 1], edges[i]


def nearer(path: Path, t: Tensor, share: Tensor) -> Tensor:
    """The times (B,) at which b / a is `share` (B,) of what it is at t (B,); 0 where that lies before the path."""
    return path.time_of(path.log_snr(t) - share.log()).clamp_min(0.0)


def _ends(path: Path) -> Tensor:
    """log(a / b) at the data end and at the noise end of the path, (2,)."""
    return path.log_snr(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
