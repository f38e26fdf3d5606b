"""The vocabulary of the methods' losses: pure functions of tensors and denoisers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from onestroke.draws import Draws
from onestroke.paths import Cond, Path, Prediction, like

Reduce = Literal["mean", "sum"]


def reduced(per_element: Tensor, reduce: Reduce) -> Tensor:
    """(B, *D) -> scalar: the mean over B of the mean or the sum over D (methods differ: sheet 0.7)."""
    rows = per_element.flatten(1)
    return (rows.mean(1) if reduce == "mean" else rows.sum(1)).mean()


def descend(x: Tensor, direction: Tensor, reduce: Reduce = "mean") -> Tensor:
    """1/2 ||x - sg(x - g)||^2: the scalar whose gradient with respect to x is `direction` (over B, and D if "mean").

    How a score difference enters autograd (DMD, arXiv 2311.18828, equation 7).
    """
    return 0.5 * reduced((x - (x - direction).detach()).square(), reduce)


def dsm(
    net: nn.Module,
    path: Path,
    x0: Tensor,
    cond: Cond,
    t: Tensor,
    draw: Draws,
    space: Prediction = "eps",
    weight: Tensor | None = None,
    reduce: Reduce = "mean",
) -> Tensor:
    """Denoising score matching on clean samples x0 (B, *D) at times t (B,): weight (B,) x squared error in `space`."""
    eps = draw.normal(x0)
    est = net(path.mix(x0, eps, t), t, cond)
    error = path.join(est.x0, est.eps, t, space) - path.join(x0, eps, t, space)
    return reduced(error.square() if weight is None else like(weight, error) * error.square(), reduce)
