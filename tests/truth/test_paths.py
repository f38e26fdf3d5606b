"""Paths, predictions, wrappers and the exact mixture, against formulas typed by hand and against diffusers."""

from __future__ import annotations

from itertools import pairwise

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onestroke import paths
from onestroke.denoiser import Guided, OnPath, clone_sharing
from onestroke.errors import InputError
from onestroke.paths import EDM, PREDICTIONS, VP, Flow, Table, Trig
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.teachers.pipeline import table_of
from truth import checks
from truth.checks import EVERY, F64, NAMES, close, hand, labels, make_path, sd_table, tensor

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
few = settings(max_examples=20, deadline=None)
every = pytest.mark.parametrize(("name", "prediction"), EVERY)
each = pytest.mark.parametrize("name", NAMES)


def noised(name, t, seed, prediction="x0"):
    path = make_path(name, prediction)
    x0, eps = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)
    t = torch.full((3,), path.t_min + t * (path.t_max - path.t_min), dtype=F64)
    return path, x0, eps, t


# ---- the two formulas of each path ---------------------------------------------------------------------------


@each
@few
@given(t=st.floats(0, 1))
def test_coefficients_are_those_typed_by_hand(name, t):
    path = make_path(name)
    t = path.t_min + t * (path.t_max - path.t_min)
    a, b = path.ab(tensor(t))
    want = checks.hand_ab(name, t)
    close(torch.cat([a, b]), want, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", ["vp", "table", "edm", "flow", "trig half"])
@pytest.mark.parametrize("t", [0.05, 0.33, 0.7123, 0.95])
def test_rates_are_the_derivatives(name, t):
    want = [mpmath.diff(lambda u, i=i: hand(name, u)[i], t, h=mpmath.mpf("1e-6")) for i in (0, 1)]
    close(torch.cat(make_path(name).rates(tensor(t))), [float(w) for w in want], rtol=1e-8, atol=1e-8)


@each
@few
@given(t=st.floats(0, 1))
def test_time_of_inverts_log_snr(name, t):
    """Within 1e-9 of unit time: float64 loses the more the flatter log_snr is in t."""
    path, _, _, t = noised(name, t, 0)
    close(path.time_of(path.log_snr(t)), t, rtol=0, atol=1e-9)


@each
def test_log_snr_decreases_and_unit_ab_keeps_it(name):
    path = make_path(name)
    t = torch.linspace(path.t_min, path.t_max, 301, dtype=F64)
    assert (path.log_snr(t).diff() < 0).all()
    checks.unit_point_is_normal(path, name)


def test_ends():
    assert [c.item() for c in VP().ab(tensor(0.0))] == [1, 0]
    a, b = VP().ab(tensor(1.0))
    assert (b / a).item() == pytest.approx(14.5, abs=0.05)
    assert EDM().ab(tensor(0.0, 1.0))[1].tolist() == pytest.approx([0.002, 80.0], rel=1e-12)
    for u, sigma, digit in ((0.02, 0.0032, 1e-4), (0.5, 2.52, 0.01), (0.8, 24.4, 0.1), (0.98, 71.7, 0.1)):
        assert EDM().ab(tensor(u))[1].item() == pytest.approx(sigma, abs=digit / 2)  # sheet 0.1, as rounded there
    assert Trig(sigma_data=0.5).ab(tensor(1.0))[1].item() == 0.5


def test_table_has_the_published_values():
    """Sheet 0.1: alphas_cumprod at 249, 399, 499, 625, 749 and 999 of Stable Diffusion."""
    index = tensor(249, 399, 499, 625, 749, 999)
    a = make_path("table").ab(index / 999)[0]
    assert a.square().tolist() == pytest.approx([0.6754, 0.4261, 0.2777, 0.1378, 0.0566, 0.00466], abs=5.1e-5)
    a, b = make_path("table0").ab(tensor(1.0))
    assert a.item() == pytest.approx(0, abs=1e-15)
    assert b.item() == 1


@each
@few
@given(t=st.floats(0, 1))
def test_snap_gives_the_times_of_the_teacher(name, t):
    path = make_path(name)
    snapped = path.snap(tensor(t))
    if isinstance(path, Table):
        index = snapped * 999
        close(index, index.round(), rtol=0, atol=1e-9)
        assert (snapped - t).abs() <= 0.5 / 999 + 1e-12
    else:
        assert snapped.item() == t


# ---- predictions ---------------------------------------------------------------------------------------------


@every
@few
@given(t=st.floats(0, 1), seed=st.integers(0, 99))
def test_split_inverts_join_and_explains_its_input(name, prediction, t, seed):
    """Over the whole usable range. Solving loses what the determinant and the coefficients' ratio cost: about 1e-9
    at the worst allowed end, (a or b) / det = 1e3, of float64's 1e-16."""
    path, x0, eps, t = noised(name, t, seed, prediction)
    x = path.mix(x0, eps, t)
    back = path.split(x, path.join(x0, eps, t, prediction), t, prediction)
    close(back.x0, x0, rtol=0, atol=1e-9)
    close(back.eps, eps, rtol=0, atol=1e-9)
    close(path.mix(back.x0, back.eps, t), x, rtol=1e-11, atol=1e-11)


@every
@few
@given(t=st.floats(0.001, 1), seed=st.integers(0, 99))
def test_any_output_explains_its_input(name, prediction, t, seed):
    """The invariant of Estimate does not need a good network: a x0 + b eps == x_t for every output."""
    path, x, out, t = noised(name, t, seed, prediction)
    est = path.split(x, out, t, prediction)
    a, b = (paths.like(c, x) for c in path.ab(t))
    size = (a * est.x0).abs() + (b * est.eps).abs() + 1
    assert ((a * est.x0 + b * est.eps - x).abs() / size).max() < 1e-11


HANDMADE = {  # sheet 0.2, with a' and b' the rates
    "x0": lambda x, o, a, b, da, db: (o, (x - a * o) / b),
    "eps": lambda x, o, a, b, da, db: ((x - b * o) / a, o),
    "v": lambda x, o, a, b, da, db: ((a * x - b * o) / (a * a + b * b), (b * x + a * o) / (a * a + b * b)),
    "flow": lambda x, o, a, b, da, db: ((db * x - b * o) / (a * db - b * da), (a * o - da * x) / (a * db - b * da)),
}


def rates_by_hand(name, t):
    return (mpmath.diff(lambda u, i=i: hand(name, u)[i], t, h=mpmath.mpf("1e-9")) for i in (0, 1))


@every
@pytest.mark.parametrize("where", ["noise end", "data end"])
def test_float32_is_exact_where_one_coefficient_is_tiny(name, prediction, where):
    """Both outputs are sums of two products p x + q out. Float32 rounds p, q, each product and the sum: 3 roundings of
    at most 2^-24 each on either term, so the error is at most 3 x 2^-24 (|p x| + |q out|), whatever cancels."""
    path = make_path(name, prediction)
    t = {"noise end": path.t_max, "data end": path.t_min}[where]
    if name.startswith("table") and prediction == "flow":
        t += {"noise end": -1, "data end": 1}[where] * 0.5 / 999  # a table has no derivative at its entries
    if name == "vp" and where == "noise end" and prediction == "flow":
        t -= 1e-6
    x, out = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1))
    est = path.split(x, out, tensor(t), prediction)
    assert est.x0.dtype == est.eps.dtype == torch.float32
    with mpmath.workdps(40):
        a, b = hand(name, mpmath.mpf(t))
        da, db = rates_by_hand(name, mpmath.mpf(t)) if prediction == "flow" else (0, 0)
        formula = HANDMADE[prediction]
        columns = [[float(c) for c in formula(1, 0, a, b, da, db)], [float(c) for c in formula(0, 1, a, b, da, db)]]
        wants = [
            formula(mpmath.mpf(x_), mpmath.mpf(o_), a, b, da, db)
            for x_, o_ in zip(x[0].tolist(), out[0].tolist(), strict=True)
        ]
    for i, got in enumerate((est.x0, est.eps)):
        want = tensor(*(float(w[i]) for w in wants))
        bound = 3 * 2**-24 * ((columns[0][i] * x[0].double()).abs() + (columns[1][i] * out[0].double()).abs())
        assert ((got[0].double() - want).abs() <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_it_is_solved(dtype):
    """At b/a = 14.6, a bfloat16 solve would lose everything; the inputs themselves are exact in float32."""
    path = make_path("table")
    x, out = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = path.split(x, out, tensor(1.0), "eps")
    want = path.split(x.float(), out.float(), tensor(1.0), "eps")
    assert got.x0.dtype == torch.float32
    assert torch.equal(got.x0, want.x0)


@pytest.mark.parametrize(
    ("path", "prediction", "time"),
    [
        (Flow(), "eps", "t=1:"),
        (Trig(), "eps", "t=1:"),
        (make_path("table0"), "eps", "t=1:"),
        (Flow(t_min=0.0), "x0", "t=0:"),
        (VP(t_min=0.0), "x0", "t=0:"),
        (VP(t_min=0.0), "flow", "t=0:"),
        (Trig(t_min=0.0), "x0", "t=0:"),
        (VP(beta_max=80.0), "eps", "t=1:"),
    ],
    ids=repr,
)
def test_singular_combinations_are_refused_by_name(path, prediction, time):
    with pytest.raises(ValueError, match=f"'{prediction}' prediction is singular on {type(path).__name__}.* at {time}"):
        GaussianMixture(path, [[0.0]], 1.0, prediction=prediction)


@every
def test_regular_combinations_are_accepted(name, prediction):
    make_path(name, prediction).check(prediction)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="unknown prediction type 'epsilon'; expected one of x0, eps, v, flow"):
        VP().check("epsilon")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_errors_of_predictions_are_related_as_the_sheet_says(prediction):
    """Sheet 30, traps 16 and 17: on VP eps-error = a v-error; on RF x0-error = t u-error, eps-error = (1 - t) u-error;
    everywhere eps-error = -(a / b) x0-error."""
    x, one, two = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=F64)
    t = torch.full((4,), 0.3, dtype=F64)
    for path, factor in ((VP(), {"v": VP().ab(t[:1])[0].item()}), (Flow(), {"flow": 0.7})):
        a, b = (c[0].item() for c in path.ab(t))
        factor = {"eps": 1.0, "x0": -a / b, **factor}.get(prediction)
        if factor is None:
            continue
        gap = path.split(x, one, t, prediction).eps - path.split(x, two, t, prediction).eps
        close(gap, factor * (one - two))


# ---- outside authorities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_is_the_velocity_of_diffusers(zero_snr):
    checks.velocity_is_that_of_diffusers(paths, zero_snr)


def test_flow_is_that_of_diffusers():
    checks.flow_is_that_of_diffusers(paths)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler", "EulerDiscreteScheduler"])
def test_tables_are_those_of_diffusers(scheduler, zero_snr):
    """Ours, typed by hand in float64, and what table_of reads, against the scheduler's own float32 product of a
    thousand factors, each rounded by at most 2^-24: relative error below 1000 x 2^-23."""
    import diffusers

    made = getattr(diffusers, scheduler)(1000, **SD, rescale_betas_zero_snr=zero_snr)
    want = made.alphas_cumprod.double()
    index = torch.arange(1000 - zero_snr, dtype=F64)  # Euler puts 2^-24 for the zero at the end
    for path in (table_of(dict(made.config)), make_path("table0" if zero_snr else "table")):
        a, b = path.ab(index / 999)
        close(a.square(), want[: len(index)], rtol=1000 * 2**-23, atol=1e-6 if zero_snr else 0)
        close(a.square() + b.square(), torch.ones_like(a), rtol=1e-14)
        if zero_snr:
            assert path.ab(tensor(1.0))[0].item() < 1e-12
    close(table_of(dict(made.config)).ab(index / 999)[0].square(), want[: len(index)], rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_grid_is_that_of_the_lcm_scheduler(steps):
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(1000, **SD)
    scheduler.set_timesteps(steps, original_inference_steps=8)
    indices = tensor(*make_path("table").grid(steps)) * 999
    close(indices, scheduler.timesteps.double(), rtol=0, atol=1e-9)


@each
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_grids_run_from_noise_to_data_inside_the_path(name, prediction, steps):
    path = make_path(name, prediction)
    grid = path.grid(steps)
    assert len(grid) == steps
    assert grid[0] == path.t_max
    assert all(path.t_min < t <= path.t_max for t in grid)
    assert all(later < earlier for earlier, later in pairwise(grid))


def test_grids_of_continuous_paths_are_equally_spaced():
    assert EDM().grid(4) == (1.0, 0.75, 0.5, 0.25)
    assert Flow(t_max=0.999).grid(2) == (0.999, 0.5)


# ---- wrappers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("src", NAMES)
@pytest.mark.parametrize("dst", NAMES)
def test_reading_on_another_path_is_exact(src, dst):
    checks.reading_on_another_path_is_exact(OnPath, make_path(src), make_path(dst))


@each
def test_guidance_runs_from_null_to_class(name):
    checks.guidance_runs_from_null_to_class(Guided, make_path(name))


def test_guidance_is_one_call_of_twice_the_batch():
    path = VP()
    net, calls = GaussianMixture(path, tensor([1.0], [-1.0]), 0.5, labels=[0, 1]), []
    net.register_forward_pre_hook(lambda module, args: calls.append((len(args[0]), args[2]["label"].tolist())))
    x, t = torch.zeros(2, 1, dtype=F64), torch.full((2,), 0.5, dtype=F64)
    Guided(net, 4.5, net.null)(x, t, labels(2, 1))
    Guided(net, 1.0, net.null)(x, t, labels(2, 1))
    assert calls == [(4, [1, 1, -1, -1]), (2, [1, 1])]


@every
@pytest.mark.parametrize("wrap", ["plain", "guided", "on path", "guided on path"])
def test_every_denoiser_explains_its_input(name, prediction, wrap):
    path = make_path(name, prediction)
    net = GaussianMixture(path, torch.eye(3, 2, dtype=F64), 0.5, labels=[0, 1, 2], prediction=prediction)
    null = net.null
    if "on path" in wrap:
        net, path = OnPath(net, path, EDM(sigma_min=0.1, sigma_max=5.0)), EDM(sigma_min=0.1, sigma_max=5.0)
    if "guided" in wrap:
        net = Guided(net, 7.5, null)
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(4), dtype=F64)
    t = torch.linspace(0.1, 0.9, 9, dtype=F64)
    est = net(x, t, {"label": torch.arange(9) % 3})
    close(path.mix(est.x0, est.eps, t), x, rtol=1e-9, atol=1e-9)


def test_a_sharing_clone_owns_nothing():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    twin = clone_sharing(net)
    assert twin[0] is not net[0]
    assert all(a is b for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert all(a is b for a, b in zip(net.buffers(), twin.buffers(), strict=True))
    twin[0] = torch.nn.Identity()
    assert isinstance(net[0], torch.nn.Linear)


# ---- the exact mixture ---------------------------------------------------------------------------------------


@each
def test_score_is_the_gradient_of_log_prob(name):
    checks.score_is_the_gradient_of_log_prob(GaussianMixture, make_path(name))


@each
def test_log_prob_is_that_of_torch(name):
    checks.log_prob_is_that_of_torch(GaussianMixture, make_path(name), name)


@every
def test_prediction_type_does_not_change_the_mixture(name, prediction):
    path = make_path(name, prediction)
    means, std = torch.eye(3, 2, dtype=F64), tensor([0.3, 0.5], [0.4, 0.2], [0.6, 0.3])
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(5), dtype=F64), torch.full((5,), 0.4, dtype=F64)
    got = GaussianMixture(path, means, std, prediction=prediction)(x, t, labels(5))
    want = GaussianMixture(path, means, std).exact(x, t, labels(5))
    close(got.x0, want.x0, rtol=1e-9)
    close(got.eps, want.eps, rtol=1e-9)


def test_posterior_mean_is_the_integral():
    """Monte-Carlo-free: E[x0 | x_t] of a 1-D mixture by quadrature of Bayes' rule."""
    path, t = VP(), 0.3
    a, b = checks.hand_ab("vp", t)
    net = GaussianMixture(path, tensor([1.0], [-0.5]), tensor(0.3, 0.7), weights=tensor(1.0, 3.0))
    grid = torch.linspace(-8, 8, 16001, dtype=F64)

    def normal(mean, std):
        return torch.distributions.Normal(torch.as_tensor(mean, dtype=F64), torch.tensor(std, dtype=F64))

    prior = 0.25 * normal(1.0, 0.3).log_prob(grid).exp() + 0.75 * normal(-0.5, 0.7).log_prob(grid).exp()
    for x in (-1.3, 0.1, 0.8):
        weight = prior * normal(a * grid, b).log_prob(tensor(x)).exp()
        got = net(tensor([x]), tensor(t), labels(1))
        close(got.x0[0, 0], (grid * weight).sum() / weight.sum(), rtol=1e-8)


def test_label_masks_choose_components():
    means, std = tensor([3.0], [-3.0], [0.5]), tensor(0.3, 0.4, 0.2)
    net = GaussianMixture(VP(), means, std, tensor(1.0, 2.0, 4.0), [0, 0, 5])
    x, t = torch.randn(6, 1, generator=torch.Generator().manual_seed(6), dtype=F64), torch.full((6,), 0.6, dtype=F64)
    assert net.classes.tolist() == [0, 5]
    for label, keep in ((0, [0, 1]), (5, [2]), (-1, [0, 1, 2])):
        alone = GaussianMixture(VP(), means[keep], std[keep], tensor(1.0, 2.0, 4.0)[keep])
        close(net(x, t, labels(6, label)).x0, alone(x, t, labels(6)).x0)
        close(net.log_prob(x, t, labels(6, label)), alone.log_prob(x, t, labels(6)))
    mixed = net(x, t, {"label": torch.tensor([0, 5, -1, 0, 5, -1])}).x0
    close(mixed[1::3], net(x, t, labels(6, 5)).x0[1::3])
    assert net.null["label"].tolist() == [-1]
    assert net.nearest(tensor([2.9], [-2.5], [0.4])).tolist() == [0, 1, 2]


def test_sample_moments():
    """200 000 samples: means within 5 standard errors, variances within 5 of theirs (var sqrt(2/n) for a Gaussian)."""
    means, std = tensor([1.0, -2.0, 0.5], [-1.0, 0.5, 4.0]), tensor([0.2, 1.0, 3.0], [0.7, 0.1, 0.4])
    net = GaussianMixture(VP(), means, std, labels=[0, 1], weights=[3, 1])
    count = 200_000
    for label in (0, 1):
        x = net.sample(torch.full((count,), label), torch.Generator().manual_seed(label))
        assert ((x.mean(0) - means[label]).abs() < 5 * std[label] / count**0.5).all()
        assert ((x.var(0) / std[label] ** 2 - 1).abs() < 5 * (2 / count) ** 0.5).all()
    x = net.sample(torch.full((count,), -1), torch.Generator().manual_seed(2))
    share = (net.nearest(x) == 0).double().mean().item()
    assert share == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / count) ** 0.5 + 1e-3)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"means": [0.0, 1.0], "std": 1.0}, r"means must have shape \(K, D\)"),
        ({"means": [[0.0], [1.0]], "std": [1.0, 1.0, 1.0]}, "std must be a scalar"),
        ({"means": [[0.0, 1.0]], "std": [[1.0], [1.0]]}, "std must be a scalar"),
        ({"means": [[0.0], [1.0]], "std": 1.0, "weights": [1.0]}, r"weights and labels must have shape \(2,\)"),
        ({"means": [[0.0], [1.0]], "std": 1.0, "labels": [0, 1, 2]}, r"weights and labels must have shape \(2,\)"),
        ({"means": [[0.0], [1.0]], "std": [1.0, 0.0]}, "must be positive"),
        ({"means": [[0.0], [1.0]], "std": -1.0}, "must be positive"),
        ({"means": [[0.0], [1.0]], "std": float("nan")}, "must be positive"),
        ({"means": [[0.0], [1.0]], "std": 1.0, "weights": [1.0, 0.0]}, "must be positive"),
    ],
)
def test_bad_shapes_are_refused(kwargs, said):
    with pytest.raises(InputError, match=said):
        GaussianMixture(VP(), **kwargs)


def test_integer_means_and_per_component_std():
    net = GaussianMixture(VP(), [[0, 1], [2, 3]], [1, 2])
    assert net.means.dtype == torch.float32
    assert net.std.tolist() == [[1, 1], [2, 2]]
    assert net.weights.tolist() == [0.5, 0.5]
    assert len(sd_table()) == 1000
