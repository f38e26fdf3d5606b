"""The exact teacher: a Gaussian mixture with labels, in any dimension, on any path."""

from __future__ import annotations

import torch
from torch import Tensor

from onestroke.denoiser import Denoiser
from onestroke.errors import InputError
from onestroke.paths import Cond, Estimate, Path, Prediction, like


class GaussianMixture(Denoiser):
    """The exact posterior mean of a mixture of axis-aligned Gaussians.

    means (K, D); std a scalar, (K,) or (K, D); weights (K,), uniform when absent; labels (K,) integers, the class of
    each component (all 0 when absent). cond["label"] (B,) chooses a class; -1 is every component. Raises InputError
    for shapes that do not fit, a std that is not positive or weights that are not.
    """

    means: Tensor
    std: Tensor
    weights: Tensor
    labels: Tensor

    def __init__(self, path: Path, means, std, weights=None, labels=None, prediction: Prediction = "x0"):
        super().__init__(path, prediction)
        means = torch.as_tensor(means)
        means = means if means.is_floating_point() else means.float()
        if means.ndim != 2:
            raise InputError(f"means must have shape (K, D), not {tuple(means.shape)}.")
        count = len(means)
        std = torch.as_tensor(std, dtype=means.dtype)
        if std.ndim == 1:
            std = std[:, None]
        if std.shape not in {(), (count, 1), tuple(means.shape)}:
            raise InputError(f"std must be a scalar, (K,) or (K, D) with means {tuple(means.shape)}.")
        weights = torch.ones(count) if weights is None else torch.as_tensor(weights)
        labels = torch.zeros(count, dtype=torch.int64) if labels is None else torch.as_tensor(labels).long()
        if weights.shape != (count,) or labels.shape != (count,):
            raise InputError(f"weights and labels must have shape ({count},), one per component.")
        if not (std > 0).all() or not (weights > 0).all():
            raise InputError("std and weights must be positive.")
        self.register_buffer("means", means)
        self.register_buffer("std", std.expand_as(means).clone())
        self.register_buffer("weights", (weights / weights.sum()).to(means))
        self.register_buffer("labels", labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.means.shape[1:])

    @property
    def null(self) -> Cond:
        """The unconditional condition."""
        return {"label": torch.tensor([-1], device=self.means.device)}

    @property
    def classes(self) -> Tensor:
        """The labels that occur, sorted."""
        return self.labels.unique()

    def _masked(self, label: Tensor) -> Tensor:
        """log weights (B, K), minus infinity outside the class."""
        label = label[:, None]
        return self.weights.log().masked_fill((label >= 0) & (label != self.labels), -torch.inf)

    def _components(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """a, b (B, 1, 1), centred x (B, K, D), variances (B, K, D) and joint log density (B, K)."""
        a, b = (c.to(x)[:, None, None] for c in self.path.ab(t))
        centred = x[:, None] - a * self.means
        variance = (a * self.std) ** 2 + b**2
        quadratic = (centred**2 / variance + (2 * torch.pi * variance).log()).sum(-1)
        return a, b, centred, variance, self._masked(cond["label"]) - quadratic / 2

    def exact(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        """E[x0 | x_t] and E[eps | x_t], (B, D) each."""
        a, b, centred, variance, joint = self._components(x, t, cond)
        share = joint.softmax(1)[:, :, None]
        x0 = (share * (self.means + a * self.std**2 / variance * centred)).sum(1)
        return Estimate(x0, (share * b * centred / variance).sum(1))

    def predict(self, x, t, cond):
        x0, eps, _ = self.exact(x, t, cond)
        return self.path.join(x0, eps, t, self.prediction), ()

    def score(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """grad log p_t(x_t) (B, D)."""
        return -self.exact(x, t, cond).eps / like(self.path.ab(t)[1], x)

    def log_prob(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """log p_t(x_t | class) (B,)."""
        return self._components(x, t, cond)[-1].logsumexp(1) - self._masked(cond["label"]).logsumexp(1)

    def sample(self, label: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples (B, D) of the classes `label` (B,)."""
        chosen = torch.multinomial(self._masked(label).exp(), 1, generator=generator).squeeze(1)
        noise = torch.randn((len(label), *self.shape), generator=generator, dtype=self.means.dtype)
        return self.means[chosen] + self.std[chosen] * noise.to(self.means.device)

    def nearest(self, x: Tensor) -> Tensor:
        """The component (B,) of largest posterior at clean points x (B, D)."""
        centred = x[:, None] - self.means
        quadratic = (centred**2 / self.std**2 + 2 * self.std.log()).sum(-1)
        return (self.weights.log() - quadratic / 2).argmax(1)
