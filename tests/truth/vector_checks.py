"""Truth checks of the vector-type methods, whose student moves along w (D_fake - D_teacher), as plain functions.

Gaussians and notation of score_checks; w is the weight in x0-space, sheet 0.6.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from onestroke.draws import Draws
from onestroke.method import Batch
from truth.checks import F64, Affine, Free, fourfold, labels, parts, tensor, two_classes
from truth.checks import close as close
from truth.score_checks import FAKE, MU, REAL, TAU, M, S, direction, gauss, guided_x0, posterior


def is_the_closed_form(cls, path, a, b, weight=None, **options):
    """Sheet 2: E[g] = w b^2 (mu - m) / P and E[g z] = w b^2 s (1/P - 1/Q), (sigma / alpha)^2 times the KL gradient.

    weight: w; when absent it is 1 / mean |x - D_p|, which is undone by hand, sample by sample.
    """
    z, e = fourfold(1)
    x = MU + S * z
    student = Free(x)
    g = direction(
        cls(parts(path, gauss(path, M, TAU), student, gauss(path, MU, S)), **options), student, z, e, labels(4)
    )
    g = g * (x - posterior(x, e, a, b)[0]).abs() if weight is None else g / weight
    p, q = a**2 * TAU**2 + b**2, a**2 * S**2 + b**2
    close(g.mean(), b**2 * (MU - M) / p)
    close((g * z).mean(), b**2 * S * (1 / p - 1 / q))


def is_the_hand_typed_direction(
    cls, path, a, b, weight, run: float, kappas: tuple[float, float], shared: float = 0.999, **options
):
    """Sample by sample, on networks that are not linear: w (D_fake - D_teacher) and nothing through x_t.

    kappas: the guidance that teacher and fake must get when the run's is `run` and the shared number is `shared`.
    """
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)
    x = 0.4 + 0.8 * z
    student = Free(x)
    method = cls(parts(path, two_classes(path, *REAL), student, two_classes(path, *FAKE), run), **options)
    g = direction(method, student, z, e, labels(6, 0), shared=shared)
    real, fake = (guided_x0(x, e, a, b, law, kappa) for law, kappa in zip((REAL, FAKE), kappas, strict=True))
    close(g, weight * (fake - real))
    assert (g.abs() > 1e-6).all()


def has_its_reduction(cls, path, a, b, weight, reduce: str, **options):
    """In three dimensions the gradient at a sample is g, or g / D where the loss is the mean over D.

    weight: w, or None for 1 / mean_D |x - D_p|.
    """
    z, e = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(11), dtype=F64)
    x = MU + S * z
    student = Free(x)
    method = cls(parts(path, gauss(path, M, TAU, 3), student, gauss(path, MU, S, 3)), **options)
    g = direction(method, student, z, e, labels(6))
    real, _, fake, _ = posterior(x, e, a, b)
    if weight is None:
        weight = 1 / (x - real).abs().mean(1, keepdim=True)
    close(g, weight * (fake - real) / (3 if reduce == "mean" else 1))


class Spy(torch.nn.Module):
    """A network that remembers the times and labels it was asked for."""

    def __init__(self, net):
        super().__init__()
        self.net, self.times, self.labels = net, [], []

    def forward(self, x, t, cond):
        self.times.append(t)
        self.labels.append(cond["label"])
        return self.net(x, t, cond)


def seen(cls, path, step: int = 0, count: int = 4000, run: float = 1.0, few=None, **options) -> tuple[Spy, Spy, Spy]:
    """(student, teacher, fake) after one round of `count` samples of class 0, with the method's own draws."""
    student, teacher, fake = (
        Spy(net) for net in (Affine(path, tensor(MU), tensor(S)), gauss(path, M, TAU), gauss(path, MU, S))
    )
    made = parts(path, teacher, student, fake, run)
    made = made if few is None else replace(made, few=few)
    z = torch.zeros(count, 1, dtype=F64)
    list(cls(made, **options).step(Batch(z, labels(count, 0), Draws(0, step, count)), step))
    return student, teacher, fake


def is_uniform(t: torch.Tensor, lo: float, hi: float) -> None:
    """Ends and mean of a sample (N,) of the uniform law: five standard errors, and an end missed by a hundredth."""
    assert lo - 1e-3 < t.min() < lo + 0.01
    assert hi - 0.01 < t.max() < hi + 1e-3
    assert abs(t.mean().item() - (lo + hi) / 2) < 5 * (hi - lo) / (12 * len(t)) ** 0.5


def is_normal(level: torch.Tensor, mean: float, std: float) -> None:
    """Mean and deviation of a sample (N,) of the normal law, within five standard errors."""
    assert abs(level.mean().item() - mean) < 5 * std / len(level) ** 0.5
    assert abs(level.std().item() - std) < 5 * std / (2 * len(level)) ** 0.5
