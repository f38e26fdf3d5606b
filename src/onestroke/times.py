"""Time samplers: where on the path a method looks. One function each; every one snaps to the teacher's own times."""

from __future__ import annotations

from torch import Tensor

from onestroke.draws import Draws
from onestroke.paths import Path


def uniform(draw: Draws, path: Path, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """(B,) float64, uniform in [lo, hi] of unit time, inside the path's own range."""
    return path.snap(draw.uniform(max(lo, path.t_min), min(hi, path.t_max)))
