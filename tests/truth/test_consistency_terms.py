"""The pieces of discrete consistency: grids and pairs of times, distances, endpoints and single solver steps."""

from __future__ import annotations

import math

import pytest
import torch

from onestroke import solvers, terms, times
from onestroke.denoiser import Guided
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Turn, play
from onestroke.paths import EDM, Flow
from truth.checks import F64, close, hand_ab, labels, make_path, tensor, two_classes
from truth.score_checks import TAU, M, gauss
from truth.test_mutants import broken

NAMES = ("vp", "table", "table0", "edm", "flow", "trig")


def grid_of(name, count):
    return times.ladder(make_path(name), count)


# ---- times ---------------------------------------------------------------------------------------------------


def karras_by_hand(module, name="edm", count=18):
    """sigma_i = (80^(1/7) + i / (N - 1) (0.002^(1/7) - 80^(1/7)))^7, from the largest; the sheet's 4.1."""
    path = make_path(name)
    a, b = path.ab(module.ladder(path, count).flip(0))
    want = [(80 ** (1 / 7) + i / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(count)]
    close(b / a, tensor(*want), 1e-9)


def test_the_ladder_is_that_of_karras():
    karras_by_hand(times)


@pytest.mark.parametrize("name", NAMES)
def test_the_ladder_goes_from_end_to_end_of_any_path(name):
    path, grid = make_path(name), grid_of(name, 40)
    assert len(grid) == 40
    assert (grid.diff() > 0).all()
    assert (grid[0], grid[-1]) == (path.t_min, path.t_max)
    a, b = path.ab(grid)
    assert (b[:-1] / a[:-1] < 80).all()
    root = (b / a)[1:-1] ** (1 / 7)
    close(root.diff(), root.diff().mean().expand(37), 1e-6)


def test_strides_are_the_grid_of_latent_consistency():
    """k 20 - 1 of a thousand, k = 1 .. 50, and the table's first entry."""
    want = torch.tensor([0, *(20 * k - 1 for k in range(1, 51))], dtype=F64) / 999
    close(times.strides(make_path("table"), 50), want)
    with pytest.raises(InputError, match="a grid of 12 steps leaves the noise end out"):
        times.strides(make_path("table"), 12)  # 995 of 999
    assert times.strides(Flow(terminal=0.1), 50)[-1] == 1  # which does not draw in one step


def test_neighbours_are_uniform():
    grid, count = tensor(0.0, 0.1, 0.3, 0.6, 1.0), 4000
    t, s = times.neighbours(Draws(0, 0, count), grid)
    for i in range(1, 5):
        assert (s[t == grid[i]] == grid[i - 1]).all()
        assert abs((t == grid[i]).double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / count)
    t, s = times.neighbours(Draws(0, 0, count), grid, skip=2)
    assert (s == grid[(torch.searchsorted(grid, t) - 2).clamp_min(0)]).all()


def normal_pairs(module, count=20_000):
    """P(i) ~ erf((ln sigma_{i+1} - P) / (sqrt 2 S)) - erf((ln sigma_i - P) / (sqrt 2 S)), P = -1.1, S = 2."""
    path, n = make_path("edm"), 11
    grid = times.ladder(path, n)
    sigma = [(0.002 ** (1 / 7) + i / (n - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(n)]
    edge = [math.erf((math.log(v) + 1.1) / (math.sqrt(2) * 2)) for v in sigma]
    p = [(edge[i + 1] - edge[i]) / (edge[-1] - edge[0]) for i in range(n - 1)]
    assert sum(p) == pytest.approx(1)
    t, s = module.normal_neighbours(Draws(0, 0, count), path, grid, -1.1, 2.0)
    for i in range(n - 1):
        assert (s[t == grid[i + 1]] == grid[i]).all()
        found = (t == grid[i + 1]).double().mean()
        assert abs(found - p[i]) < 5 * math.sqrt(p[i] * (1 - p[i]) / count)


def test_pairs_are_as_likely_as_published():
    normal_pairs(times)


@pytest.mark.parametrize("name", NAMES)
def test_nearer_is_a_share_of_the_noise_level(name):
    path = make_path(name)
    t, share = tensor(0.3, 0.7, 0.5), tensor(0.5, 0.9, 0.0)
    s = times.nearer(path, t, share)
    (a, b), (c, d) = path.ab(t), path.ab(s)
    close((d / c)[:2], (b / a * share)[:2], 1e-6)
    assert s[2] == 0


# ---- distances and ends --------------------------------------------------------------------------------------


def hubers(module):
    error = tensor([3.0, -4.0], [0.0, 0.0])
    close(module.pseudo_huber(error, 0.0), tensor(5.0, 0.0))
    close(module.pseudo_huber(error, 12.0), tensor(1.0, 0.0))
    each = [math.sqrt(9 + 1e-6) - 1e-3, math.sqrt(16 + 1e-6) - 1e-3]
    close(module.pseudo_huber(error, 1e-3, "element"), tensor(sum(each) / 2, 0.0))
    close(module.pseudo_huber(1e-3 * error[:1], 10.0), tensor(0.005**2 / 20), 1e-6)  # quadratic far below c


def test_pseudo_huber():
    hubers(terms)
    zero = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    terms.pseudo_huber(zero, 0.0).sum().backward()
    assert (zero.grad == 0).all()


def test_distances():
    error = tensor([3.0, -4.0])
    close(terms.DISTANCES["l2"](error), tensor(12.5))
    close(terms.DISTANCES["l1"](error), tensor(3.5))
    close(terms.DISTANCES["huber"](error), terms.pseudo_huber(error, 1e-3, "element"))
    with pytest.raises(InputError, match=r"unknown distance 'l3'"):
        terms.checked_distance("l3")


def at_the_data_end(module):
    """There the endpoint is the state over its signal; elsewhere the net's x0. No gradient."""
    for name in NAMES:
        path = make_path(name)
        net, x = gauss(path, M, TAU), tensor([0.4], [0.7], [1.1]).requires_grad_(True)
        s = tensor(0.0, path.t_min, 0.5)
        got = module.endpoint(net, path, x, s, labels(3))
        a = path.ab(s[:2])[0]
        close(got[:2], x.detach()[:2] / a[:, None])
        close(got[2:], net(x[2:], s[2:], labels(1)).x0.detach())
        assert not got.requires_grad


def test_the_endpoint_at_the_data_end_is_the_state():
    at_the_data_end(terms)


# ---- single steps --------------------------------------------------------------------------------------------


def kappa(name, t, s):
    """The DDIM gain between two times on N(0, TAU^2): (a c TAU^2 + b d) / (a^2 TAU^2 + b^2), sheet 2."""
    (a, b), (c, d) = hand_ab(name, t), hand_ab(name, s)
    return (a * c * TAU**2 + b * d) / (a**2 * TAU**2 + b**2)


@pytest.mark.parametrize("name", NAMES)
def test_euler_is_ddim(name):
    path, x = make_path(name), tensor([0.8], [-1.3])
    got = solvers.euler(gauss(path, 0.0, TAU), path, x, tensor(0.8, 0.8), tensor(0.4, 0.7), labels(2))
    close(got, torch.stack([kappa(name, 0.8, 0.4) * x[0], kappa(name, 0.8, 0.7) * x[1]]))


def heun_by_hand(module):
    """y += (rho_s - rho_t) (eps_t + eps_s) / 2 with y = x / a and eps = b y / (a (TAU^2 + rho^2)) = rho y / V."""
    for name in ("vp", "edm", "flow"):
        path, x = make_path(name), tensor([0.8])
        (a, b), (c, d) = hand_ab(name, 0.8), hand_ab(name, 0.6)
        rho, low, y = b / a, d / c, x / a
        first = rho * y / (TAU**2 + rho**2)
        there = y + (low - rho) * first
        want = c * (y + (low - rho) * (first + low * there / (TAU**2 + low**2)) / 2)
        close(module.heun(gauss(path, 0.0, TAU), path, x, tensor(0.8), tensor(0.6), labels(1)), want)


def test_heun_is_the_trapezoid_rule():
    heun_by_hand(solvers)


@pytest.mark.parametrize("name", ["flow", "trig", "table0"])
def test_heun_from_no_signal_is_euler(name):
    path, x = make_path(name), tensor([0.8])
    args = gauss(path, M, TAU), path, x, tensor(1.0), tensor(0.9), labels(1)
    close(solvers.heun(*args), solvers.euler(*args))


@pytest.mark.parametrize(("step", "count", "ratio"), [("euler", 18, 0.8461), ("euler", 40, 0.9297),
                                                      ("heun", 18, 1.05528), ("heun", 40, 1.00978)])  # fmt: skip
def test_the_published_ramp_has_its_gains(step, count, ratio):
    """Sheet 2: a student of N neighbours ends at the product of the steps' gains, here over sqrt(V_0.002 / V_80)."""
    path, s = EDM(), 0.5
    grid, x = times.ladder(path, count), tensor([1.0])
    for t, lower in zip(grid.flip(0)[:-1], grid.flip(0)[1:], strict=True):
        x = solvers.STEPS[step](gauss(path, 0.0, s), path, x, t[None], lower[None], labels(1))
    assert (x / (math.hypot(s, 0.002) / math.hypot(s, 80))).item() == pytest.approx(
        ratio, abs=6e-5 if step == "euler" else 6e-6
    )


# ---- the kernel --------------------------------------------------------------------------------------------------


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.slow = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def step(self, batch, step):
        yield Turn("student", {"x": self.student.weight.sum()}, follow={"slow": 0.75})


def test_a_target_follows_once_per_round():
    """After the update, however many micro-batches there are."""
    net = Pair()
    old = net.slow.weight.detach().clone()

    def update(player):
        net.student.weight.data += 1

    play(net, [None, None], 0, update)
    torch.testing.assert_close(net.slow.weight.data, 0.75 * old + 0.25 * net.student.weight.data)


def test_every_row_may_be_guided_by_a_scale_of_its_own():
    """Rows of a scale (B,) are those of a call with that scale; a network that reads its guidance is told it."""
    net, x = two_classes(make_path("vp"), 0.9, 0.5), tensor([0.3], [0.8], [-0.4])
    scale, t, cond = tensor(1.0, 4.5, 0.0), tensor(0.4, 0.6, 0.8), labels(3, 1)
    got = Guided(net, scale, net.null)(x, t, cond)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in cond.items()}
        want = Guided(net, scale[i].item(), net.null)(x[i : i + 1], t[i : i + 1], one)
        close(got.x0[i], want.x0[0])
        close(got.eps[i], want.eps[0])
    told = Guided(lambda x, t, cond: cond["guidance"], scale, net.null)(x, t, {**cond, "guidance": torch.ones(3)})
    assert told.tolist() == scale.tolist()


# ---- do the checks notice? -----------------------------------------------------------------------------------

MUTANTS = [
    ("onestroke.times", "last, count, dtype", "last, count + 1, dtype", karras_by_hand),
    ("onestroke.times", "torch.searchsorted(level, mean + std", "torch.searchsorted(level, mean - std", normal_pairs),
    ("onestroke.times", "return grid[i], grid[i - 1]", "return grid[i - 1], grid[i]", normal_pairs),
    ("onestroke.terms", "(square + c**2)", "(square + c)", hubers),
    ("onestroke.terms", 'if per == "row"', 'if per != "row"', hubers),
    ("onestroke.terms", "torch.where(at_data, x / like(path.ab(s)[0], x), there)", "there", at_the_data_end),
    ("onestroke.terms", "x / like(path.ab(s)[0], x), there", "x, there", at_the_data_end),
    ("onestroke.solvers", "like(a * gap / 2, x)", "like(gap / 2, x)", heun_by_hand),
    ("onestroke.solvers", "(net(end, s, cond).eps - est.eps)", "net(end, s, cond).eps", heun_by_hand),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(module, old, new, check):
    check(broken(module, old, old))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(module, old, new))
