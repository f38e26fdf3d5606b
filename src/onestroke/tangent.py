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
    first call; from then on two more calls, the central difference, stand in, and a Notice says so once. Call the
    player itself inside the field, wrapped as it is: every process then makes the same calls.

    step: of the difference, in unit time, which is then taken from the start; 0: the derivative. A long one sees past
    the wiggles of a network that reads a thousand times. Raises InputError for one outside [0, 0.5).
    """

    def __init__(self, step: float = 0.0):
        if not 0 <= step < 0.5:
            raise InputError(f"difference={step} must lie in [0, 0.5), in unit time; 0 is the derivative itself.")
        self.step, self.forward = step, not step

    @torch.no_grad()
    def __call__(self, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """At x (B, *D) and t (B,) inside (0, 1), along dx (B, *D) and dt (B,) of at most 1: (B, *D) each."""
        if self.forward:
            try:
                found = torch.func.jvp(field, (x, t.contiguous()), (dx.to(x), dt.to(t).contiguous()))
                return found[0], found[1]
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.forward, why = False, str(error).partition("\n")[0]
                warnings.warn(f"no forward-mode derivative ({why}): differences stand in.", Notice, stacklevel=2)
        return field(x, t), difference(field, x, t, dx, dt, self.step or None)


@torch.no_grad()
def difference(field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, step: float | None = None) -> Tensor:
    """The derivative (B, *D) of a field along (dx, dt) from two calls, a step to both sides inside (0, 1)."""
    if step is None:
        half = torch.is_autocast_enabled(x.device.type)
        step = STEPS[torch.get_autocast_dtype(x.device.type) if half else x.dtype]
    h = torch.minimum(t, 1 - t).clamp(max=2 * step) / 2
    after, before = (field(x + like(s * h, x) * dx, t + s * h * dt) for s in (1, -1))
    return (after - before) / like(2 * h, after)
