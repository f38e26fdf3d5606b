"""TCD: jumps to any earlier time against typed closed forms, and its sampler's variance."""

from __future__ import annotations

import pytest
import torch

from onestroke import times
from onestroke.methods.consistency.tcd import TCD
from onestroke.sampling import FewStep
from truth import segment_checks as checks
from truth.checks import Given, close, fourfold, labels, make_path
from truth.segment_checks import PATHS, SLOW, STUDENT, Exact, Line, gauss, variance
from truth.test_mutants import broken
from truth.test_paths import SD

each = pytest.mark.parametrize("name", PATHS)
U = 0.6
ANY = {"grid": 8}
WHOLE = {"grid": 8, "whole": 1.0}


@each
def test_the_exact_map_to_the_data_is_the_fixed_point(name):
    checks.rests_at_the_exact_map(TCD, make_path(name), edges=lambda method: torch.zeros(1), **WHOLE)


@each
def test_where_one_call_is_exact_for_every_end_all_of_them_agree(name):
    """Data at one point: a jump by the posterior mean is the flow's, to any time."""
    path = make_path(name)
    point = gauss(path, std=1e-9)
    method = checks.made(TCD, path, point, point, **ANY)
    for u in (0.1, U, 0.9):
        assert checks.loss_of(method, [u]) < 1e-14


@each
def test_the_composed_gain_is_the_product_of_the_steps(name):
    path = make_path(name)
    checks.composes(TCD, path, lambda method: method.grid[[0, -1]], **WHOLE)


def regression(cls, path, name):
    """Value and gradient typed by hand: one end U s for both, the second jump by the average."""
    student, slow = Line(path, *STUDENT), Line(path, *SLOW)
    method = checks.made(cls, path, student, slow=slow, **ANY)
    (turn,), x0, z = checks.play(method, [U])
    xt, t, s = checks.states(method, path, x0, z)
    loss, *_ = checks.hand_loss(path, xt, t, s, path.snap(U * s), student, slow)
    checks.same_gradient(turn.terms["consistency"], loss.mean(), student)
    assert slow.mu.grad is None
    assert turn.follow == {"slow": 0.95}


@each
def test_the_regression_is_the_typed_one(name):
    regression(TCD, make_path(name), name)


def guided(cls):
    checks.guided_mean_is_scaled(cls, make_path("vp"), **ANY)


def test_guidance_scales_the_mean():
    guided(TCD)


def rows_jump_the_whole_way(cls):
    path = make_path("vp")
    student = Line(path, *STUDENT)
    """A row draws 0.5: below 0.4 it does not jump the whole way, below 0.6 it does."""
    found = [
        checks.loss_of(checks.made(cls, path, student, slow=Line(path, *SLOW), grid=8, whole=w), [0.5, U])
        for w in (0.0, 0.4, 0.6, 1.0)
    ]
    assert found[0] == found[1] != found[2] == found[3]
    there = checks.made(cls, path, student, slow=Line(path, *SLOW), grid=8, whole=1.0)
    assert checks.loss_of(there, [0.5, 0.1]) == found[3]


def test_a_part_of_the_rows_jumps_the_whole_way():
    rows_jump_the_whole_way(TCD)


@pytest.mark.parametrize(("whole", "want"), [(0.0, 0.056), (0.9, 0.088), (1.0, 0.091)])
def test_the_narrowness_of_the_docstring(whole, want):
    """The best gains k_i of x0 = k_i x on EDM's grid of 50, each by least squares over its ends, of N(0, 0.1^2)."""
    path, std, k = make_path("edm"), 0.1, 1.0
    grid, share = path.ab(times.strides(path, 50))[1], torch.arange(400, dtype=torch.float64) / 400
    weight = torch.full((400,), (1 - whole) / 400, dtype=torch.float64)
    weight[0] += whole
    for i in range(1, 51):
        s, t = grid[i - 1], grid[i]
        end = path.ab(share * (i - 1) / 50)[1]
        there = (k + end * (1 - k) / s if i > 1 else 1) * (std**2 + s * t) / (std**2 + t**2)
        slope, w = 1 - end / t, weight / (1 + end**2)
        k = (w * slope * (there - end / t)).sum() / (w * slope**2).sum()
    assert (k * (std**2 + t**2).sqrt()).item() == pytest.approx(want, abs=5e-4)


# ---- its sampler -------------------------------------------------------------------------------------------------


def keeps_the_variance(module, name):
    """At exact jumps to (1 - eta) t the next input has the law of x_t, whatever eta: mean and variance of a linear map
    of two standard normals, over all four of their signs."""
    path = make_path(name)
    t, e = path.grid(3), fourfold(1)
    for eta in (0.0, 0.3, 0.7):
        few = module.FewStep(path, t, eta=eta)
        ends = sorted({path.floor(torch.tensor((1 - eta) * v, dtype=torch.float64)).item() for v in t[1:]} | {0.0})
        first = few.time(0, e[0])
        scale = (variance(path, first) / (torch.hypot(*path.ab(first))) ** 2).sqrt()[:, None]
        mean = path.ab(first)[0][:, None] * checks.M / torch.hypot(*path.ab(first))[:, None]
        x = few.inputs(Exact(path, ends), mean + scale * e[0], labels(4), Given(e[1], e[1]), 1)[1]
        a, _ = path.ab(few.time(1, e[0]))
        close(x.mean(), a[0] * checks.M)
        close(x.var(unbiased=False), variance(path, few.time(1, e[0]))[0])


@each
def test_the_sampler_keeps_the_variance_for_any_eta(name):
    from onestroke import sampling

    keeps_the_variance(sampling, name)


def test_no_eta_is_ddim_and_a_whole_one_fresh_noise():
    path, (z, e) = make_path("vp"), fourfold(1)
    net = Exact(path)

    def second(**options):
        return FewStep(path, path.grid(2), **options).inputs(net, z, labels(4), Given(e), 1)[1]

    close(second(eta=0.0), second(renoise="implied"))
    assert torch.equal(second(eta=1.0), second())


def as_diffusers(module, steps=8, eta=0.3):
    """To the index: (1 - eta) of it is cut off, not rounded."""
    from diffusers import TCDScheduler

    scheduler = TCDScheduler(1000, **SD, original_inference_steps=8, prediction_type="sample")
    scheduler.set_timesteps(steps)
    path, one, two = make_path("table"), *(torch.Generator().manual_seed(5) for _ in range(2))

    class Noise:
        def normal(self, like):
            return torch.randn(like.shape, generator=one, dtype=like.dtype)

    def net(x, t, cond):
        return path.split(x, x.tanh(), t, "x0")

    xs = module.FewStep(path, path.grid(steps), eta=eta).inputs(net, fourfold(1)[0], labels(4), Noise())
    x = xs[0]
    for t, want in zip(scheduler.timesteps, xs[1:], strict=False):
        x = scheduler.step(x.tanh(), t, x, eta, generator=two).prev_sample
        close(x, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("steps", "eta"), [(4, 0.0), (4, 0.3), (8, 0.3), (2, 0.5), (8, 0.7)])
def test_diffusers_scheduler_takes_the_same_steps(steps, eta):
    from onestroke import sampling

    as_diffusers(sampling, steps, eta)


@each
def test_noise_is_carried_on(name):
    """diffuse: a / c of the state, and noise of variance b^2 in all; to its own time it is the state."""
    path, (z, e) = make_path(name), fourfold(1)
    s, t = (path.snap(torch.full((4,), v, dtype=torch.float64)) for v in (0.3, 0.8))
    x = path.mix(0 * z + 0.7, z, s)
    y = path.diffuse(x, s, e, t)
    (a, b), (c, d) = path.ab(t), path.ab(s)
    close(y.mean(), 0.7 * a[0])
    close(y.var(unbiased=False), b[0] ** 2)
    close((y * z).mean(), (a * d / c)[0])
    close(path.diffuse(x, s, e, s), x)


# ---- do the checks notice? -----------------------------------------------------------------------------------------


def regressed(module):
    for name in ("vp", "edm"):
        regression(module.TCD, make_path(name), name)


def scaled(module):
    guided(module.TCD)


def mixed(module):
    rows_jump_the_whole_way(module.TCD)


def sampled(module):
    keeps_the_variance(module, "edm")


TEACHER, SAMPLER = "onestroke.methods.consistency.tcd", "onestroke.sampling"
MUTANTS = [
    (TEACHER, "jump(self.slow", "jump(self.student", regressed),
    (TEACHER, "there = jump", "there = euler", regressed),
    (TEACHER, "draw.uniform() * s)", "draw.uniform() * t)", regressed),
    (TEACHER, "xt, t, s, cond)\n", "xt, t, end, cond)\n", regressed),
    (TEACHER, "terms.apart(here, there, path, end", "terms.apart(here, there, path, s", regressed),
    (TEACHER, "keep: float = 0.95", "keep: float = 0.9", regressed),
    (TEACHER, "self.guide(self.teacher)", "self.teacher", scaled),
    (TEACHER, "draw.uniform() < self.whole", "draw.uniform() > self.whole", mixed),
    (SAMPLER, "(1 - self.eta) * t", "self.eta * t", sampled),
    (SAMPLER, "self.path.floor(", "self.path.snap(", as_diffusers),
    (SAMPLER, "self.path.diffuse(self.path.mix(est.x0, est.eps, s), s,", "self.path.diffuse(est.x0, s,", sampled),
]  # fmt: skip


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(module, old, new, check):
    check(broken(module, old, old))
    with pytest.raises(AssertionError):
        check(broken(module, old, new))
