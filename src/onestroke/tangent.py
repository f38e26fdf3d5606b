"""How what a network says changes along a direction: the value and the derivative that continuous-time methods read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from onestroke.errors import InputError, Notice
from onestroke.paths import Path, like

Field = Callable[[Tensor, Tensor], Tensor]
"""x (B, *D), t (B,) float64 -> (B, *D), row by row."""

STEPS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Of the difference, in unit time, by the type the network computes in. A thousandth of it would be the best for what
is smooth in unit time, but networks on a thousand times are not (rCM, arXiv 2510.08431, takes 1e-4 as well)."""


def overlap(view: Path, path: Path) -> Path:
    """The path `view` where `path` goes, to be read by `OnPath`, short of its ends, at which a ratio has no derivative.

    Times drawn on it do not snap to those of a table: between them derivatives exist, and at them they jump.
    """
    first, last = view.time_of(path.log_snr(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))).tolist()
    return replace(view, t_min=max(first, 1e-4), t_max=min(last, 1 - 1e-4))


class Tangent:
    """A field and its derivative along (dx, dt), by forward-mode differentiation, without gradient.

    A network that cannot be differentiated so (a fused kernel, a function of its own without such a rule) is met at its
    first call; from then on differences stand in, and a Notice says so once. Call the player itself inside the field,
    wrapped as it is: every process then makes the same calls.

    path: whose times t are. step: of differences, in unit time, which are then taken from the start; 0: the derivative.
    A long one sees past the wiggles of a network that reads a thousand times. Raises InputError for one outside
    [0, 0.5).
    """

    def __init__(self, path: Path, step: float = 0.0):
        if not 0 <= step < 0.5:
            raise InputError(f"difference={step} must lie in [0, 0.5), in unit time; 0 is the derivative itself.")
        self.path, self.step, self.forward = path, step, not step

    @torch.no_grad()
    def __call__(self, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """At x (B, *D) and t (B,) of the path, along dx (B, *D) and dt (B,) of at most 1: (B, *D) each."""
        if self.forward:
            try:
                found = torch.func.jvp(field, (x, t.contiguous()), (dx.to(x), dt.to(t).contiguous()))
                return found[0], found[1]
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.forward, why = False, str(error).partition("\n")[0]
                warnings.warn(f"no forward-mode derivative ({why}): differences stand in.", Notice, stacklevel=2)
        return difference(self.path, field, x, t, dx, dt, self.step or None)


@torch.no_grad()
def difference(
    path: Path, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, step: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `Tangent`, of second order: from a step to both sides, a shorter one within it of the path's ends; where that
    is less than a quarter, from one and two whole steps away from the end, which then lose fewer digits. Beyond its
    ends no network was trained, and at one of them a student of one step is called."""
    if step is None:
        half = torch.is_autocast_enabled(x.device.type)
        step = STEPS[torch.get_autocast_dtype(x.device.type) if half else x.dtype]
    rate = dt.abs().clamp_min(torch.finfo(dt.dtype).tiny)
    h = ((path.t_max - path.t_min) / 3 / rate).clamp(max=step)
    room = torch.stack([t - path.t_min, path.t_max - t]).clamp_min(0) / rate
    before, after = torch.where(dt < 0, room.flip(0), room)
    both = room.amin(0) >= h / 4
    one = torch.where(both, room.amin(0).minimum(h), torch.where(after < before, -h, h))
    two = torch.where(both, -one, 2 * one)
    here, near, far = (field(x + like(d, x) * dx, t + d * dt) for d in (0 * h, one, two))
    nearer, farther = two / one / (two - one), one / two / (one - two)
    return here, like(nearer, near) * (near - here) + like(farther, far) * (far - here)
