"""Time samplers: where on the path a method looks. One function each; every one snaps to the teacher's own times."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke.draws import Draws
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


def _ends(path: Path) -> Tensor:
    """log(a / b) at the data end and at the noise end of the path, (2,)."""
    return path.log_snr(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
