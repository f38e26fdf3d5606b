"""Guidance for fewer calls, without training (arXiv 2312.12487): denoisers to draw with, in `solvers.solve` or a loop.

The setting `guide` of a run takes them where the teacher draws pairs, `onestroke sample TEACHER --adaptive` pictures.
They remember the way that is being drawn: one way at a time, from noise to data. A call at the time of a way's first
call or above it, or with another number of rows, begins the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestroke.denoiser import Denoiser, Guided
from onestroke.errors import InputError
from onestroke.paths import Cond, Estimate
from onestroke.solvers import solve


def reads_guidance() -> InputError:
    """The refusal of a network that is guided in one call as it is."""
    return InputError("this network reads its guidance and needs no second call; draw with full guidance.")


def check_asks_twice(source: str | Path) -> None:
    """Refuse a teacher, in a folder or of a hub id, whose network reads its guidance, by its config. Raises
    InputError."""
    from onestroke.teachers.pipeline import hollow_network

    if hollow_network(source).config.get("guidance_embeds"):
        raise reads_guidance()


class Remembering(Guided):
    """Classifier-free guidance that remembers its way. net: a denoiser without guidance built in."""

    def __init__(self, net: nn.Module, scale: float, null: Cond):
        super().__init__(net, scale, null)
        self.weight, self.first = scale, torch.zeros(0)

    def begins(self, t: Tensor) -> bool:
        """Whether the call at t (B,) is the first of a way."""
        if len(self.first) == len(t) and (t < self.first).all():
            return False
        self.first = t
        return True

    def both(self, x: Tensor, t: Tensor, cond: Cond, rows: Tensor) -> tuple[Estimate, Estimate]:
        """The estimates under cond, and under the null condition for `rows` alone, in one call.

        Raises InputError for a network that reads its guidance.
        """
        if "guidance" in cond:
            raise reads_guidance()
        cond, null = self.sides(cond)
        both = {k: torch.cat([v, null[k][rows]]) for k, v in cond.items()}
        est, size = self.net(torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), both), len(x)
        features = tuple(f[:size] for f in est.features)
        return Estimate(est.x0[:size], est.eps[:size], features), Estimate(est.x0[size:], est.eps[size:])

    def mixed(self, yes: Estimate, no: Estimate) -> Estimate:
        """null + scale (cond - null)."""
        return Estimate(no.x0.lerp(yes.x0, self.weight), no.eps.lerp(yes.eps, self.weight), yes.features)


class AdaptiveGuided(Remembering):
    """Adaptive Guidance: guided until condition and null condition say the same, from then on the condition alone.

    The same: the cosine of both estimates is `threshold` (published 0.991) or more. space: of which estimate, "eps"
    (published) or, ours, "x0": where there is next to no signal eps is the input itself under every condition. Every
    row for itself, and what it no longer needs is not computed: one call, of 2 B rows at first and of B at last.
    """

    def __init__(
        self, net: nn.Module, scale: float, null: Cond, threshold: float = 0.991, space: Literal["eps", "x0"] = "eps"
    ):
        super().__init__(net, scale, null)
        self.threshold, self.space, self.open = threshold, space, torch.zeros(0, dtype=torch.bool)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        if self.begins(t):
            self.open = torch.ones(len(x), dtype=torch.bool, device=x.device)
        rows = self.open.nonzero().flatten()
        yes, no = self.both(x, t, cond, rows)
        if not len(rows):
            return yes
        mine = Estimate(yes.x0[rows], yes.eps[rows])
        differ = F.cosine_similarity(*(getattr(e, self.space).flatten(1) for e in (mine, no))) < self.threshold
        self.open[rows] = differ
        guided, live = self.mixed(mine, no), rows[differ]
        x0, eps = (y.index_copy(0, live, g[differ]) for y, g in ((yes.x0, guided.x0), (yes.eps, guided.eps)))
        return Estimate(x0, eps, yes.features)


class LinearGuided(Remembering):
    """LinearAG: at some calls of a way the null condition is not asked; what it would say is a weighted sum.

    weights: of every call of a way, None where the null condition is asked, else (2 k + 1,) at call number k: of what
    the network said under cond at calls 0 .. k, and under the null condition at calls 0 .. k - 1, asked or not. Raises
    InputError for a way of more calls. `fit_linear` makes them.
    """

    def __init__(self, net: Denoiser, scale: float, null: Cond, weights: Sequence[Tensor | None]):
        super().__init__(net, scale, null)
        self.weights, self.yes, self.no = list(weights), list[Tensor](), list[Tensor]()
        self.path, self.prediction = net.path, net.prediction

    def said(self, est: Estimate, t: Tensor) -> Tensor:
        """What the network itself said (B, *D)."""
        return self.path.join(est.x0, est.eps, t, self.prediction)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        if self.begins(t):
            self.yes, self.no = [], []
        if len(self.yes) == len(self.weights):
            raise InputError(f"these weights are of a way of {len(self.weights)} calls; draw with them in as many.")
        weight = self.weights[len(self.yes)]
        rows = torch.arange(len(x) if weight is None else 0, device=x.device)
        yes, no = self.both(x, t, cond, rows)
        self.yes.append(self.said(yes, t))
        if weight is None:
            self.no.append(self.said(no, t))
        else:
            known = torch.stack([*self.yes, *self.no])
            self.no.append(torch.tensordot(weight.to(known), known, 1))
            no = self.path.split(x, self.no[-1], t, self.prediction)
        return self.mixed(yes, no)


def alternate(calls: int) -> list[bool]:
    """At which calls of a way the null condition is asked: at every other one of the first half."""
    return [k % 2 == 0 and 2 * k < calls for k in range(calls)]


def least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """(P,): the weights whose sum of P vectors is nearest to another one, from the products (P, P) of the vectors with
    each other and (P,) with that one; the smallest weights where several are."""
    return torch.linalg.pinv(gram, rtol=1e-13, hermitian=True) @ cross


def fit_linear(
    net: Denoiser,
    scale: float,
    null: Cond,
    noise: Tensor,
    cond: Cond,
    steps: int = 25,
    solver: str = "dpm++2m",
    asked: Sequence[bool] | None = None,
    batch_size: int = 64,
) -> LinearGuided:
    """LinearAG for `solve` in these steps, its weights fitted to the guided ways from noise (B, *D) (published: 200).

    batch_size: ways that are drawn at once. asked: at which of its calls the null condition is, the first among them;
    by default `alternate`. Ours: after the first half it is never asked, and regressed still, which the condition alone
    is a case of.
    """
    full, gram = LinearGuided(net, scale, null, [None] * (2 * steps)), torch.zeros(())
    for i in range(0, len(noise), batch_size):
        rows = slice(i, i + batch_size)
        solve(full, net.path, noise[rows], {k: v[rows] for k, v in cond.items()}, steps, solver)
        said = torch.stack([*full.yes, *full.no]).flatten(1).double()
        gram = gram.to(said) + said @ said.T
    calls = len(full.yes)
    asked = alternate(calls) if asked is None else asked
    if len(asked) != calls or not asked[0]:
        raise InputError(f"asked has {len(asked)} entries and must begin with true; {solver} makes {calls} calls.")
    weights: list[Tensor | None] = []
    for k in range(calls):
        known = [*range(k + 1), *range(calls, calls + k)]
        weights.append(None if asked[k] else least_squares(gram[known][:, known], gram[known, calls + k]))
    return LinearGuided(net, scale, null, weights)
