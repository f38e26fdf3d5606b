"""Guidance for fewer calls: equal to the full one, or to none, where it must be; and weights that are found exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from onestroke.denoiser import Denoiser, Guided
from onestroke.errors import InputError
from onestroke.guidance import AdaptiveGuided, LinearGuided, alternate, fit_linear, least_squares
from onestroke.paths import Estimate
from onestroke.solvers import levels, solve
from onestroke.teachers.gaussian import GaussianMixture
from truth.checks import F64, close, labels, make_path, tensor, two_classes
from truth.pair_checks import PATHS, noise
from truth.test_mutants import broken

SOURCE = "onestroke.guidance"
W, STEPS = 3.0, 8


class Counting(Denoiser):
    """A mixture as a network that predicts this, and counts the rows it is asked."""

    def __init__(self, net, prediction="eps"):
        super().__init__(net.path, prediction)
        self.net, self.rows, self.null = net, [], {"label": torch.tensor([-1])}

    def predict(self, x, t, cond):
        self.rows.append(len(x))
        est = self.net(x, t, cond)
        return self.path.join(est.x0, est.eps, t, self.prediction), ()


def net_on(name, prediction="eps"):
    path = make_path(name, prediction)
    return Counting(two_classes(path, 0.9, 0.5), prediction)


def drawn(net, path, solver="dpm++2m", rows=8, label=0):
    return solve(net, path, noise(rows, seed=60), labels(rows, label), STEPS, solver)


# ---- Adaptive Guidance ---------------------------------------------------------------------------------------


def ends_are_guidance_and_none(cls, name="vp", solver="dpm++2m", prediction="eps", space="eps"):
    """Above every cosine it is classifier-free guidance, below every one the condition alone."""
    net = net_on(name, prediction)
    for threshold, scale in ((1.01, W), (-1.0, 1.0)):
        got = drawn(cls(net, W, net.null, threshold, space), net.path, solver)
        close(got, drawn(Guided(net, scale, net.null), net.path, solver))
    assert (got - drawn(Guided(net, W, net.null), net.path, solver)).abs().max() > 0.1


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", ["dpm++2m", "heun", "ddim"])
def test_the_ends_are_guidance_and_none(name, solver):
    ends_are_guidance_and_none(AdaptiveGuided, name, solver)


@pytest.mark.parametrize("prediction", ["v", "flow", "x0"])
def test_the_ends_whatever_it_predicts(prediction):
    ends_are_guidance_and_none(AdaptiveGuided, "vp", prediction=prediction, space="x0")


def each_row_is_left_for_itself(cls, threshold=0.0):
    """In one dimension the cosine is a sign. Row by row and call by call against DDIM typed by hand; a row that was
    left is not asked again, though its signs may differ once more, but on the next way."""
    net, rows, times = net_on("vp"), 16, [0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    path, cond, adaptive = net.path, labels(rows, 0), cls(net, W, net.null, threshold)
    for _ in range(2):
        x, live = torch.linspace(-0.8, 1.2, rows, dtype=F64)[:, None], torch.ones(rows, dtype=torch.bool)
        asked, rejoined = [], 0
        net.rows.clear()
        for time, then in itertools.pairwise([*times, 0.1]):
            t = tensor(time).expand(rows)
            yes, no = net.net(x, t, cond), net.net(x, t, labels(rows))
            asked.append(rows + int(live.sum()))
            differ = (yes.eps * no.eps)[:, 0] < 0
            rejoined += int((differ & ~live).sum())
            live = live & differ
            scale = torch.where(live, W, 1.0)[:, None]
            x0, eps = (n + scale * (y - n) for y, n in ((yes.x0, no.x0), (yes.eps, no.eps)))
            got = adaptive(x, t, cond)
            close(got.x0, x0)
            close(got.eps, eps)
            x = path.mix(x0, eps, tensor(then).expand(rows))
        assert net.rows == asked
        assert asked[0] == 2 * rows > asked[1] > asked[-1]
        assert rejoined


def test_each_row_is_left_for_itself():
    each_row_is_left_for_itself(AdaptiveGuided)


def test_it_is_cheaper():
    """At the published threshold, on pictures of 64 numbers, by x0: fewer rows, and close to what guidance draws."""
    path = make_path("vp")
    means = torch.randn(4, 64, generator=torch.Generator().manual_seed(2), dtype=F64)
    net = Counting(GaussianMixture(path, means, 0.5, labels=[0, 1, 2, 3]))
    z = torch.randn(8, 64, generator=torch.Generator().manual_seed(3), dtype=F64)
    want = solve(Guided(net, W, net.null), path, z, labels(8, 1), 20)
    full, _ = sum(net.rows), net.rows.clear()
    got = solve(AdaptiveGuided(net, W, net.null, space="x0"), path, z, labels(8, 1), 20)
    plain = solve(net, path, z, labels(8, 1), 20)
    assert sum(net.rows[:20]) < 0.9 * full
    assert (got - want).norm() < 0.5 * (plain - want).norm()


# ---- LinearAG ------------------------------------------------------------------------------------------------


def weights_are_found(least_squares):
    known = torch.randn(7, 200, generator=torch.Generator().manual_seed(4), dtype=F64)
    want = tensor(0.5, -1.0, 2.0, 0.0, 0.25, -0.125, 3.0)
    close(least_squares(known @ known.T, known @ (want @ known)), want, 1e-9)
    twice = torch.cat([known, known])  # several are: the smallest
    close(least_squares(twice @ twice.T, twice @ (want @ known)), torch.cat([want, want]) / 2, 1e-7, 1e-9)


def test_weights_are_found():
    weights_are_found(least_squares)


class Linear(Denoiser):
    """Under the null condition it says 0.3 c_k + 0.5 c_{k-1} - 0.2 n_{k-1} of its own past sayings, where c are random
    numbers, the same on every way."""

    def __init__(self, path, size):
        super().__init__(path, "eps")
        self.numbers = torch.randn(STEPS, size, 1, generator=torch.Generator().manual_seed(5), dtype=F64)
        no = [self.numbers[0].flip(0)]
        for k in range(1, STEPS):
            no.append(0.3 * self.numbers[k] + 0.5 * self.numbers[k - 1] - 0.2 * no[-1])
        self.answers, self.times = torch.stack(no), levels(path, STEPS)

    def predict(self, x, t, cond):
        k, yes = self.times.index(t[0].item()), cond["label"] >= 0
        size = int(yes.sum())
        return torch.cat([self.numbers[k], self.answers[k]])[: len(x)] if size < len(x) else self.numbers[k], ()


def linear_is_exact(fit_linear, alternate=alternate):
    """Of a network whose null condition is linear in the past, its weights are found and every draw is the guided
    one's, with a third of the null calls or less."""
    path = make_path("vp", "eps")
    net, null = Linear(path, 50), {"label": torch.tensor([-1])}
    z, cond = noise(50, seed=62), labels(50, 0)
    fitted = fit_linear(net, W, null, z, cond, STEPS, "ddim")
    assert [w is None for w in fitted.weights] == [True, False, True, False, False, False, False, False]
    close(fitted.weights[1], tensor(0.5, 0.3, -0.2), 1e-7)
    close(solve(fitted, path, z, cond, STEPS, "ddim"), solve(Guided(net, W, null), path, z, cond, STEPS, "ddim"), 1e-6)


def test_linear_is_exact():
    linear_is_exact(fit_linear)


def fitted_in_parts_is_fitted_at_once(fit_linear):
    """Draws, not weights: of one number per row these are far from determined."""
    net = net_on("vp")
    given = (net, W, net.null, noise(30, seed=64), labels(30, 0), STEPS, "ddim")
    at_once, in_parts = (drawn(fit_linear(*given, batch_size=n), net.path, "ddim") for n in (30, 8))
    close(in_parts, at_once, 1e-5, 1e-5)


def test_fitted_in_parts_is_fitted_at_once():
    fitted_in_parts_is_fitted_at_once(fit_linear)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_linear_guidance_of_gaussians_is_exact(solver, prediction):
    """Zero means of two deviations: both sayings are multiples of x_t, so the null one is a multiple of the other."""

    class Two(nn.Module):
        def __init__(self, path):
            super().__init__()
            self.path = path
            self.nets = [GaussianMixture(path, tensor([0.0]), s) for s in (0.4, 0.9)]

        def forward(self, x, t, cond):
            one, other = (net(x, t, {"label": 0 * cond["label"]}) for net in self.nets)
            chosen = cond["label"][:, None] >= 0
            return Estimate(torch.where(chosen, one.x0, other.x0), torch.where(chosen, one.eps, other.eps))

    path = make_path("vp", prediction)
    net = Counting(Two(path), prediction)
    fitted = fit_linear(net, W, net.null, noise(32, seed=63), labels(32, 0), STEPS, solver)
    want = drawn(Guided(net, W, net.null), path, solver)
    net.rows.clear()
    close(drawn(fitted, path, solver), want, 1e-6)
    assert sum(net.rows) < 1.5 * 8 * len(net.rows)


def test_alternate():
    assert alternate(8) == [True, False, True, False, False, False, False, False]
    assert alternate(5) == [True, False, True, False, False]
    assert alternate(1) == [True]


def test_what_is_refused():
    net, null = net_on("vp"), {"label": torch.tensor([-1])}
    path = net.path
    with pytest.raises(InputError, match="these weights are of a way of 4 calls"):
        drawn(LinearGuided(net, W, null, [None] * 4), path)
    with pytest.raises(InputError, match="asked has 1 entries and must begin with true; ddim makes 3 calls"):
        fit_linear(net, W, null, noise(), labels(8, 0), 3, "ddim", [True])
    told = {**labels(8, 0), "guidance": torch.ones(8)}
    with pytest.raises(InputError, match="this network reads its guidance"):
        solve(AdaptiveGuided(net, W, null), path, noise(), told, 3)


# ---- do the checks notice? -----------------------------------------------------------------------------------


def ends(module):
    for prediction in ("eps", "v"):
        ends_are_guidance_and_none(module.AdaptiveGuided, prediction=prediction)


def rows_alone(module):
    each_row_is_left_for_itself(module.AdaptiveGuided)


def found(module):
    weights_are_found(module.least_squares)


def exact(module):
    linear_is_exact(module.fit_linear)


def in_parts(module):
    fitted_in_parts_is_fitted_at_once(module.fit_linear)


MUTANTS = [
    ("no.x0.lerp(yes.x0, self.weight)", "yes.x0.lerp(no.x0, self.weight)", ends),
    (") < self.threshold", ") > self.threshold", ends),
    ("self.open[rows] = differ", "self.open[rows] = True", rows_alone),
    ("(t < self.first).all()", "True", rows_alone),
    ("x[rows]])", "x[: len(rows)]])", rows_alone),
    ("g[differ]", "g[: int(differ.sum())]", rows_alone),
    ("hermitian=True) @ cross", "hermitian=True) @ cross.flip(0)", found),
    ("range(calls, calls + k)]", "range(calls, calls)]", exact),
    ("gram.to(said) + said", "said", in_parts),
    ("2 * k < calls", "k < calls", exact),
    ("[*self.yes, *self.no]", "[*self.no, *self.yes]", exact),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises((AssertionError, InputError)):
        check(broken(SOURCE, old, new))
