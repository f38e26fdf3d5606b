"""rCM: its g typed by hand along the warm-up, which ends as sCM's, its plain sum, and the derivative in two parts."""

from __future__ import annotations

import math

import pytest
import torch

from onestroke.denoiser import OnPath
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.methods.consistency.rcm import RCM
from onestroke.methods.consistency.scm import SCM
from onestroke.paths import EDM, Estimate, Trig
from truth import tangent_checks as checks
from truth.checks import F64, close, make_path, tensor
from truth.tangent_checks import PATHS, TIMES, Consistent, at, made
from truth.test_mutants import broken
from truth.test_scm import Slope

each = pytest.mark.parametrize("name", PATHS)
LATE = 1000


def pull(method, student, t=0.4, step=LATE, batch=None):
    with at(t, method.path):
        return checks.pull(next(method.step(batch or checks.batch(), step)), student)


@each
def test_the_consistency_function_is_a_fixed_point(name):
    path = make_path(name)
    for t in TIMES:
        student = Consistent(path)
        weight = 1 / path.ab(tensor(t))[1].item()  # of x0 in F
        assert pull(made(RCM, path, student), student, t).abs().max() < 1e-7 * max(1, weight)


@each
def test_guided_the_mean_is_w_m(name):
    checks.guided_mean_is_w_m(RCM, make_path(name), lambda method, student: pull(method, student) / 1000)


def moves_along_g(cls, name="vp", t=0.4, steps=(0, 1, 500, 1000, 3000), **options):
    """By hand on N(M, S^2): r = min(1, step / 1000), g = -cos sqrt(1 - r^2 sin^2) (F - teacher) - sin cos (r x +
    dF/dtau), where r may multiply dF/dtau too, and dL/dF = -2 * 100 g / (|g| + 0.1) / B, with F = (cos x - x0) / sin.
    """
    path, found = make_path(name), checks.batch()
    a, b = (c.item() for c in path.ab(tensor(t)))
    cos, sin = a / math.hypot(a, b), b / math.hypot(a, b)
    x = cos * found.x0 + sin * found.noise
    d = checks.M + cos * checks.S**2 / (cos**2 * checks.S**2 + sin**2) * (x - cos * checks.M)
    dx = cos * (x - cos * d) / sin - sin * d
    p, dp = 0.3 + 0.2 * sin, 0.2 * cos  # of Slope: x0 = p x
    f = (cos - p) / sin * x
    df = ((-sin - dp) * sin - (cos - p) * cos) / sin**2 * x + (cos - p) / sin * dx
    for step in steps:
        student = Slope(path)
        got = pull(made(cls, path, student, **options), student, t, step, found)
        r = min(1, step / 1000)
        later = r if options.get("warm") == "all" else 1
        g = -cos * math.sqrt(1 - r**2 * sin**2) * (f - dx) - sin * cos * (r * x + later * df)
        g = g / (g.square().sum(1, keepdim=True).sqrt() + 0.1)
        close(got, 200 * g / 4 / sin)


@each
@pytest.mark.parametrize("warm", ["x", "all"])
def test_f_moves_along_g(name, warm):
    moves_along_g(RCM, name, warm=warm)


@each
def test_after_the_warm_up_g_is_that_of_scm(name):
    """And before it is another; at its beginning the teacher is at rest, unless the derivative counts at once."""
    path, (x, dx) = make_path(name), torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    t = tensor(0.1, 0.3, 0.6, 0.9)
    one, other = (made(cls, path, Slope(path)) for cls in (RCM, SCM))
    for ramp in (1.0, 0.5):
        (f, g), (f_, g_) = (m.change(x, t, dx, {}, ramp) for m in (one, other))
        close(f, f_)
        assert ((g - g_).abs().max() < 1e-12) == (ramp == 1)
    cos, sin = (t * math.pi / 2).cos()[:, None], (t * math.pi / 2).sin()[:, None]
    first = made(RCM, path, Slope(path), warm="all")
    close(first.change(x, t, dx, {}, 0.0)[1], -cos * (f - dx))
    turned = -cos * cos * (f - dx) - other.change(x, t, dx, {}, 1.0)[1] - sin * cos * x  # sin cos dF/dtau
    close(one.change(x, t, dx, {}, 0.0)[1], -cos * (f - dx) - turned)


def each_row(batch):
    """(x0, noise) of the batch with one row in the place of all four, row by row."""
    return [(batch.x0[[i] * 4], batch.noise[[i] * 4]) for i in range(4)]


def broken_samples_count_as_zero(cls):
    """The teacher is infinite on one row and the student without a number on another: the rest is as it was, over 4."""

    class Holes(Consistent):
        hole = torch.zeros(4, 2, dtype=F64)

        def forward(self, x, t, cond):
            est = super().forward(x, t, cond)
            return Estimate(est.x0 + self.hole, est.eps - self.hole)

    path = make_path("vp")
    student, teacher = Consistent(path, 1.0), Holes(path)
    whole = pull(made(cls, path, student, teacher), student)
    assert (whole != 0).all()
    teacher.hole = tensor([0.0, 0.0], [math.inf, 0.0], [0.0, 0.0], [0.0, 0.0])
    got = pull(made(cls, path, student, teacher), student)
    assert (got[1] == 0).all()
    close(got[[0, 2, 3]], whole[[0, 2, 3]])
    student = Holes(path, 1.0)
    student.hole = tensor([0.0, 0.0], [0.0, 0.0], [0.0, math.nan], [0.0, 0.0])
    with at(0.4, path):
        loss = next(made(cls, path, student, checks.gauss(path)).step(checks.batch(), LATE)).terms["change"]
    assert loss.isfinite()
    student.hole = torch.zeros(4, 2, dtype=F64)
    method, found = made(cls, path, student, checks.gauss(path)), checks.batch()
    with at(0.4, path):
        rows = [next(method.step(found._replace(x0=r, noise=z), LATE)).terms["change"] for r, z in each_row(found)]
    close(loss, (sum(rows) - rows[2]) / 4)


def test_a_sample_that_is_not_finite_counts_as_zero():
    broken_samples_count_as_zero(RCM)


def the_loss_is_a_sum(cls):
    """At F = F^- it is 100 |g|^2 / (|g| + 0.1)^2, whatever the number of elements."""
    path = Trig()
    for dim in (2, 50):
        student, found = Slope(path, rows=4, dim=dim), checks.batch(dim=dim)
        method = made(cls, path, student, checks.gauss(path, dim=dim))
        t = torch.full((4,), 0.4, dtype=F64)
        x = path.mix(found.x0, found.noise, t)
        dx = OnPath(checks.gauss(path, dim=dim), path, path).velocity(x, t, found.cond) * (2 / math.pi)
        g = method.change(x, t, dx, found.cond, 1.0)[1].norm(dim=1)
        with at(0.4, path):
            turns = list(method.step(found, LATE))
        assert [turn.player for turn in turns] == ["student"] == list(method.players)
        close(turns[0].terms["change"], 100 * (g / (g + 0.1)).square().mean())


def test_the_loss_is_a_hundred_times_the_sum_of_squares():
    the_loss_is_a_sum(RCM)


def levels(cls):
    """tan(tau) = e^n with n of N(-0.8, 1.6^2), which is the odds of the straight path's time."""
    method = made(cls, EDM(), Consistent(EDM(), rows=4000))
    with torch.no_grad():
        t = method.error(checks.batch(4000, draw=Draws(0, 0, 4000)), {}, LATE, method.teacher)[1]
    level = (t * (math.pi / 2)).tan().log()
    assert level.mean().item() == pytest.approx(-0.8, abs=5 * 1.6 / 4000**0.5)
    assert level.std().item() == pytest.approx(1.6, abs=5 * 1.6 / 8000**0.5)


def test_levels_are_the_published_ones():
    levels(RCM)


# ---- the semi-continuous derivative --------------------------------------------------------------------------------


def in_two_parts(cls):
    """F = k(tau) x with k = (cos - 0.3) / sin - 0.2 (see Slope): sin cos (k dx + (cos(h) k(tau) - k(tau - h)) / sin(h)
    x), which goes to the derivative itself, k dx + k' x, as h does to 0; h is at most tau / 2."""
    path, t = Trig(), tensor(0.1, 0.3, 0.6, 0.9)
    x, dx = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    tau = (t * math.pi / 2)[:, None]

    def k(tau):
        return (tau.cos() - 0.3) / tau.sin() - 0.2

    def found(semi):
        """dF / dtau, from g = -cos^2 (F - dx) - sin cos (x + dF / dtau)."""
        f, g = made(cls, path, Slope(path), semi=semi).change(x, t, dx, {}, 1.0)
        return (-g - tau.cos() ** 2 * (f - dx)) / (tau.sin() * tau.cos()) - x

    exact = k(tau) * dx + (0.3 * tau.cos() - 1) / tau.sin() ** 2 * x
    close(found(0.0), exact)
    off = []
    for semi in (0.4, 0.01, 0.001, 1e-4):
        h = (tau / 2).clamp(max=semi)
        close(found(semi), k(tau) * dx + (h.cos() * k(tau) - k(tau - h)) / h.sin() * x)
        off.append((found(semi) - exact).abs().max().item())
    assert off[1] / off[2] == pytest.approx(10, rel=0.1)
    assert off[2] / off[3] == pytest.approx(10, rel=0.1)


def test_the_derivative_in_two_parts_goes_to_the_derivative():
    in_two_parts(RCM)


def the_fixed_point_stays(cls, name="vp"):
    """But for the step, with which the pull falls; times stay inside, however long it is."""
    path = make_path(name)
    for t in TIMES:
        student = Consistent(path)
        short, long = (pull(made(cls, path, student, norm=1e3, semi=h), student, t).abs().max() for h in (1e-5, 1e-4))
        assert 0 < short < 0.101 * long
        assert pull(made(cls, path, student, semi=0.4), student, t).isfinite().all()


@each
def test_in_two_parts_the_fixed_point_is_the_same(name):
    the_fixed_point_stays(RCM, name)


def test_a_long_step_is_refused():
    with pytest.raises(InputError, match=r"semi=0.5 must lie in \[0, 0.5\)"):
        made(RCM, Trig(), Consistent(Trig()), semi=0.5)
    with pytest.raises(InputError, match="unknown warm 'both'"):
        made(RCM, Trig(), Consistent(Trig()), warm="both")


# ---- do the checks notice? -----------------------------------------------------------------------------------------

MUTANTS = [
    ("1 - (ramp * sin) ** 2", "1 - sin**2", moves_along_g),
    ("1 - (ramp * sin) ** 2", "1 - ramp * sin**2", moves_along_g),
    ("(1 - (ramp * sin) ** 2).sqrt()", "1 - (ramp * sin) ** 2", moves_along_g),
    ('ramp if self.warm == "all" else 1.0', "ramp", moves_along_g),
    ('ramp if self.warm == "all" else 1.0', "1.0", lambda cls: moves_along_g(cls, warm="all")),
    ("ramp: int = 1_000", "ramp: int = 10_000", moves_along_g),
    ("norm: float = 0.1", "norm: float = 0.2", moves_along_g),
    ("scale: float = 100.0", "scale: float = 1.0", the_loss_is_a_sum),
    ("sum(1).mean()", "mean(1).mean()", the_loss_is_a_sum),
    ("sum(1).mean()", "sum(1).sum()", the_loss_is_a_sum),
    ('players = ("student",)', 'players = ("student", "weight")', the_loss_is_a_sum),
    ("error.isfinite()", "error.isfinite().all()", broken_samples_count_as_zero),
    ("error.isfinite()", "error == error + 1", broken_samples_count_as_zero),
    ("mean: float = -0.8", "mean: float = -1.5", levels),
    ("std: float = 1.6", "std: float = 1.4", levels),
    ("like(h.cos(), x) * f", "f", in_two_parts),
    ("t / RADIAN / 2", "t / RADIAN", in_two_parts),
    ("clamp(max=self.semi)", "clamp(max=1.0)", in_two_parts),
    ("t - h * RADIAN", "t - h", in_two_parts),
    ("t - h * RADIAN", "t + h * RADIAN", in_two_parts),
    ("like(dt / RADIAN, x)", "like(dt, x)", in_two_parts),
    ("dx, 0 * dt)", "dx, dt)", in_two_parts),
    ("@torch.no_grad()", "", the_fixed_point_stays),
    ("self.tangent(field, x, t, dx, 0", "self.tangent(field, x, t, 0 * dx, 0", in_two_parts),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    source = "onestroke.methods.consistency.rcm"
    check(broken(source, old, old).RCM)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(source, old, new).RCM)
