"""Rectified flow: exact after one reflow in 1-D, and the velocity error it descends."""

from __future__ import annotations

import math

import pytest
import torch

from onestroke import times
from onestroke.draws import Draws
from onestroke.method import Pairs
from onestroke.methods.flow import rectified_flow
from onestroke.methods.flow.rectified_flow import RectifiedFlow
from onestroke.sampling import FewStep
from onestroke.solvers import solve
from truth import pair_checks as checks
from truth.checks import F64, close, labels, make_path, tensor
from truth.pair_checks import PATHS
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", PATHS)


@each
def test_one_step_is_exact_after_reflow_of_a_gaussian(name):
    checks.reflow_is_exact_on_a_gaussian(RectifiedFlow, make_path(name))


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_one_step_is_exact_after_reflow_in_one_dimension(name):
    checks.reflow_is_exact_in_one_dimension(RectifiedFlow, make_path(name))


@each
def test_the_loss_is_the_velocity_error(name):
    checks.loss_is_the_velocity_error(RectifiedFlow, make_path(name), name)


def test_on_the_straight_path_it_is_the_sheet_s_velocity():
    """Section 2: v_reflow(x, t) = (1 - s) x / ((1 - t) s + t) at mean 0, and t runs in [0.001, 1]."""
    path, x = make_path("flow"), checks.noise()
    for t in (0.1, 0.5, 0.9):
        est = checks.Slope(path, 0.0, 0.5)(x, torch.full((8,), t, dtype=F64), labels(8))
        close(est.eps - est.x0, 0.5 * x / ((1 - t) * 0.5 + t))


def test_the_pairs_of_the_solver_are_the_map():
    """What `solve` makes of noise in 1-D is F_data^-1(F_noise(z)), so the pairs are the coupling above."""
    path, z = make_path("flow"), torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    close(solve(checks.two_modes(path), path, z, labels(9), 200, "unipc"), checks.quantiles(z), 0, 1e-4)


@each
def test_eps_mixes_x0_to_the_first_input(name):
    path, z = make_path(name), checks.noise()
    few = FewStep(path, path.grid(1))
    x0 = 2 + z.cos()
    close(path.mix(x0, few.eps(z, x0), few.time(0, z)), few.input(z))
    close(few.eps(z, x0), checks.implied(path, z, x0))
    if name in ("flow", "table0"):
        close(few.eps(z, x0), z, 0, 1e-6)


@pytest.mark.parametrize(("lo", "hi", "ends"), [(0.0, 1.0, 0.0), (0.2, 0.7, 0.0), (0.0, 1.0, 4.0), (0.3, 1.0, 2.0)])
@pytest.mark.parametrize("name", ["vp", "edm", "flow", "trig half"])
def test_straight_times_have_their_law(name, lo, hi, ends):
    """Uniform in b / (a + b), or of the distribution function of cosh, cut at the ends of the path."""
    path, n = make_path(name), 4000
    a, b = path.ab(times.straight(Draws(5, 0, n), path, lo, hi, ends))
    u = (b / (a + b)).sort().values
    limits = [(b / (a + b)).clamp(lo, hi) for a, b in (path.ab(tensor(path.t_min)), path.ab(tensor(path.t_max)))]
    assert limits[0] - 1e-9 <= u[0]
    assert u[-1] <= limits[1] + 1e-9
    mass = (lambda v: v) if not ends else (lambda v: torch.sinh(ends * (2 * v - 1)))
    cdf = (mass(u) - mass(limits[0])) / (mass(limits[1]) - mass(limits[0]))
    assert (cdf - (torch.arange(n, dtype=F64) + 0.5) / n).abs().max() < 1.95 / n**0.5


def draws_its_times(module, count=20_000):
    """With v = 2 u - 1, E[v^2] is 1/3 of the uniform law and 1 + 2 / e^2 - 2 coth(e) / e of cosh(e v); u from 0.001."""
    path, z = make_path("flow"), checks.noise(20_000)
    for ends, want in ((0.0, 1 / 3), (4.0, 1 + 1 / 8 - 1 / 2 / math.tanh(4))):
        student = checks.Shifted(path, 0.0)
        student.x0 = z
        method = checks.build(module.RectifiedFlow, path, student, **({"ends": ends} if ends else {}))
        checks.losses(method, checks.batch(z, draw=Draws(0, 0, count)))
        u = student.seen[1]
        assert ((2 * u - 1).square().mean() - want).abs() < 0.003 + 5 * 0.35 / count**0.5
        assert 0.001 <= u.min() < 0.003
        assert u.max() > 0.998


def test_it_draws_the_times_it_is_told_to():
    draws_its_times(rectified_flow)


def loss(module):
    checks.loss_is_the_velocity_error(module.RectifiedFlow, make_path("vp"), "vp")


def exact(module):
    checks.reflow_is_exact_on_a_gaussian(module.RectifiedFlow, make_path("vp"))


def on_terms(module):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onestroke.methods.flow.rectified_flow.terms", module)
        checks.loss_is_the_velocity_error(RectifiedFlow, make_path("vp"), "vp")


def on_sampling(module):
    path, z = make_path("vp"), checks.noise()
    close(module.FewStep(path, path.grid(1)).eps(z, z.cos()), checks.implied(path, z, z.cos()))


SOURCE = "onestroke.methods.flow.rectified_flow"
MUTANTS = [
    (SOURCE, "self.few.eps(noise, x0)", "noise", exact),
    (SOURCE, "noise, x0 = batch.pairs", "noise, x0 = batch.noise.flip(0), batch.pairs.x0", exact),
    (SOURCE, "x0, eps, batch.cond", "eps, x0, batch.cond", loss),
    (SOURCE, "self.hi, self.ends)", "self.hi)", draws_its_times),
    (SOURCE, "ends: float = 0.0", "ends: float = 2.0", draws_its_times),
    (SOURCE, "lo: float = 0.001", "lo: float = 0.1", draws_its_times),
    (SOURCE, "hi: float = 1.0", "hi: float = 0.9", draws_its_times),
    ("onestroke.terms", "est.eps - est.x0 - eps + x0", "est.eps - eps", on_terms),
    ("onestroke.terms", "est.eps - est.x0 - eps + x0", "est.eps - est.x0 + eps - x0", on_terms),
    ("onestroke.sampling", "(self.input(noise) - like(a, x0) * x0)", "self.input(noise)", on_sampling),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(module, old, new, check):
    check(broken(module, old, old))
    with pytest.raises(AssertionError):
        check(broken(module, old, new))


def test_pairs_of_another_length_share_conditions():
    """Pair i is of condition i modulo their number."""
    from onestroke.training.train import Data

    z = torch.arange(10.0)[:, None]
    data = Data((1,), {"label": torch.arange(4)}, pairs=Pairs(z, -z))
    assert len(data) == 10
    got = data.batch(Draws(0, 0, 10), torch.device("cpu"))
    assert got.pairs is not None
    assert torch.equal(got.cond["label"], got.pairs.noise[:, 0].long() % 4)
    assert torch.equal(got.pairs.x0, -got.pairs.noise)
    assert sorted(got.pairs.noise[:, 0].tolist()) == list(range(10))
