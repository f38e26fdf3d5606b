"""sCM: the consistency function is its fixed point, F moves along g, and each part of g is the published one."""

from __future__ import annotations

import math

import pytest
import torch

from onestroke import terms
from onestroke.denoiser import OnPath
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.consistency.scm import SCM
from onestroke.paths import EDM, Estimate, Flow, Trig, like
from truth import tangent_checks as checks
from truth.checks import F64, close, labels, make_path, tensor
from truth.tangent_checks import PATHS, TIMES, Consistent, at, made
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", PATHS)
LATE = 10_000


def pull(method, student, t=0.4, step=LATE, batch=None):
    with at(t, method.path):
        return checks.pull(next(method.step(batch or checks.batch(), step)), student)


@each
@pytest.mark.parametrize("difference", [0.0, 1e-6])
def test_the_consistency_function_is_a_fixed_point(name, difference):
    path = make_path(name)
    for t in TIMES:
        student = Consistent(path)
        method = made(SCM, path, student, difference=difference, norm=1.0)
        limit = 1e-6 if difference else 1e-9
        weight = 1 / path.ab(tensor(t))[1].item() ** 2  # of x0 in F, and the published one
        assert pull(method, student, t).abs().max() < limit * max(1, weight)


@each
def test_guided_the_mean_is_w_m(name):
    checks.guided_mean_is_w_m(SCM, make_path(name), pull)


class Slope(Consistent):
    """x0 = p(tau) x of the path of angles, with p = 0.3 + 0.2 sin(tau)."""

    def forward(self, x, t, cond):
        a, b = (like(c, x) for c in self.path.ab(t))
        tau = torch.atan2(b, a)
        x0 = (0.3 + 0.2 * tau.sin()) * x / torch.hypot(a, b) + self.shift
        return Estimate(x0, (x - a * x0) / b)


def moves_along_g(cls, name="vp", t=0.4, step=LATE, **options):
    """By hand on N(M, S^2): dL/dF = -2 g / (|g| + 0.2) / (tan(tau) B D), and F = (cos x - x0) / sin."""
    path, found = make_path(name), checks.batch()
    student = Slope(path)
    got = pull(made(cls, path, student, **options), student, t, step, found)
    a, b = (c.item() for c in path.ab(tensor(t)))
    cos, sin = a / math.hypot(a, b), b / math.hypot(a, b)
    x = cos * found.x0 + sin * found.noise
    d = checks.M + cos * checks.S**2 / (cos**2 * checks.S**2 + sin**2) * (x - cos * checks.M)
    dx = cos * (x - cos * d) / sin - sin * d
    p, dp = 0.3 + 0.2 * sin, 0.2 * cos
    f, df = (cos - p) / sin * x, None
    # d/dtau (cos - p) / sin, by hand, and along dx
    df = ((-sin - dp) * sin - (cos - p) * cos) / sin**2 * x + (cos - p) / sin * dx
    ramp = min(1, step / options.get("ramp", 10_000))
    g = -(cos**2) * (f - dx) - ramp * sin * cos * (x + df)
    if ramp == 1:
        close(g, cos * (dp * x + p * dx))  # cos df/dtau of f = p x
    g = g / (g.norm(dim=1, keepdim=True) + 0.2)
    close(got, 2 * g / (sin / cos) / 8 / sin)


@each
def test_f_moves_along_g(name):
    moves_along_g(SCM, name)


@pytest.mark.parametrize("step", [0, 1, 5000, 20_000])
def test_the_tangent_is_warmed_up(step):
    moves_along_g(SCM, step=step)


def test_at_the_start_the_teacher_itself_is_the_fixed_point():
    path = make_path("vp")

    class Teacher(Consistent):
        def forward(self, x, t, cond):
            x0 = checks.gauss(path)(x, t, cond).x0 + self.shift
            return path.split(x, x0, t, "x0")

    student = Teacher(path)
    assert pull(made(SCM, path, student), student, step=0).abs().max() < 1e-12
    assert pull(made(SCM, path, student), student).abs().max() > 1e-3


def half_angle(cls, sigma=0.5):
    """Data N(0, sigma_data^2): F = - tan(tau / 2) x / sigma_data, and from both sides F moves towards it."""
    path = Trig(sigma_data=sigma)
    teacher = checks.gauss(path, 0.0, sigma)

    class Half(Consistent):
        gain = 1.0

        def forward(self, x, t, cond):
            tau = like(t * (math.pi / 2), x)
            x0 = tau.cos() * x + tau.sin() * self.gain * (tau / 2).tan() * x + self.shift
            return Estimate(x0, (x - tau.cos() * x0) / (sigma * tau.sin()))

    for t in TIMES:
        student = Half(path)
        method, found = made(cls, path, student, teacher, sigma_data=sigma), checks.batch()
        assert pull(method, student, t, LATE, found).abs().max() < 1e-9
        student.gain = 1.1
        x = math.cos(t * math.pi / 2) * found.x0 + sigma * math.sin(t * math.pi / 2) * found.noise
        got = pull(method, student, t, LATE, found)
        assert ((got * x).sum(1) > 0).all(), "x0 is too far out"
        tau = t * math.pi / 2  # the flow stands still: g = cos(tau) x d/dtau (cos(tau) + 1.1 sin(tau) tan(tau / 2))
        rate = -math.sin(tau) + 1.1 * (math.cos(tau) * math.tan(tau / 2) + math.sin(tau) / 2 / math.cos(tau / 2) ** 2)
        g = math.cos(tau) * rate * x
        g = g / (g.norm(dim=1, keepdim=True) + 0.1 * sigma / 0.5)
        close(got, 2 * g / (sigma * math.tan(tau)) / 8 / (sigma * math.sin(tau)))


def test_of_unit_data_the_network_is_half_the_angle():
    half_angle(SCM)


class Gain(torch.nn.Module):
    """F = gain(tau) x / sigma_data, a polynomial of five powers, zero at the start."""

    def __init__(self, path):
        super().__init__()
        self.path, self.powers = path, torch.nn.Parameter(torch.zeros(5, dtype=F64))

    def gain(self, tau):
        return (tau[:, None] / 1.5) ** torch.arange(1, 6) @ self.powers

    def forward(self, x, t, cond):
        tau = t * (math.pi / 2)
        cos, sin = like(tau.cos(), x), like(tau.sin(), x)
        x0 = cos * x - sin * like(self.gain(tau), x) * x
        return Estimate(x0, (x - cos * x0) / (self.path.sigma_data * sin))


def learns_half_the_angle(cls, sigma=0.5, rounds=100):
    """Sheet 3.1, T3: from F = 0, which is the teacher's, to - tan(tau / 2) x / sigma_data on all angles."""
    path = Trig(sigma_data=sigma)
    student = Gain(path)
    method = made(cls, path, student, checks.gauss(path, 0.0, sigma), sigma_data=sigma, ramp=rounds // 10)
    players = {
        "student": torch.optim.Adam(student.parameters(), lr=0.05, betas=(0.9, 0.9)),
        "weight": torch.optim.Adam(method.weight.parameters(), lr=0.01),
    }
    for step in range(rounds):
        players["student"].param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * step / rounds))
        draw = Draws(0, step, 64)
        noise, x0 = (draw.normal(torch.empty(64, 2, dtype=F64)) for _ in range(2))
        for turn in method.step(Batch(noise, labels(64), draw, sigma * x0), step):
            players[turn.player].zero_grad()
            sum(turn.terms.values()).backward()
            players[turn.player].step()
    tau = torch.linspace(0, math.pi / 2, 50, dtype=F64)
    assert (student.gain(tau) + (tau / 2).tan()).abs().max() <= 1e-2


def test_training_finds_half_the_angle():
    learns_half_the_angle(SCM)


def without_a_teacher(cls):
    """sCT: g is linear in the velocity, whose mean at a point is the flow's: opposite deviations cancel there."""
    path, t = Trig(), 0.4
    student, tau = Consistent(path), 0.4 * math.pi / 2
    found = checks.batch()
    x = math.cos(tau) * found.x0 + math.sin(tau) * found.noise
    est = checks.gauss(path)(x, torch.full((4,), t, dtype=F64), found.cond)
    found_g = []
    for off in (0.7, -0.7):
        here = found._replace(x0=est.x0 + off * math.sin(tau), noise=est.eps - off * math.cos(tau))
        method = made(cls, path, student, torch.nn.Identity(), 3.0, velocity="data")
        dx = math.cos(tau) * here.noise - math.sin(tau) * here.x0
        g = method.change(x, torch.full((4,), t, dtype=F64), dx, found.cond, 1.0)[1]
        found_g.append(g)
        g = g / (g.norm(dim=1, keepdim=True) + 0.2)
        close(pull(method, student, t, LATE, here), 2 * g / math.tan(tau) / 8 / math.sin(tau))
    assert found_g[0].abs().min() > 1e-2
    assert (found_g[0] + found_g[1]).abs().max() < 1e-9


def test_without_a_teacher_the_velocity_is_that_of_the_data():
    without_a_teacher(SCM)
    with pytest.raises(InputError, match=r"unknown velocity 'datum'\. Did you mean 'data'"):
        made(SCM, Trig(), Consistent(Trig()), velocity="datum")
    with pytest.raises(InputError, match="unknown weight 'uno'"):
        made(SCM, Trig(), Consistent(Trig()), weight="uno")


# ---- levels and their weight ---------------------------------------------------------------------------------------


def levels(cls):
    """tau = atan(e^n / 0.5) with n of N(-1, 1.4^2), of latents scaled to 0.5 and so of those of deviation one; of data
    of deviation 0.5 the noise is e^n itself. tan(tau) has the median 2 / e = 0.7358; the tolerance is five deviations
    of the moments of 4000."""
    for sigma_data in (1.0, 0.5):
        path, student = EDM(), Consistent(EDM(), rows=4000)
        method = made(cls, path, student, sigma_data=sigma_data)
        with torch.no_grad():
            t = method.loss(checks.batch(4000, draw=Draws(0, 0, 4000)), {}, LATE, student)[1]
        tan = (t * (math.pi / 2)).tan()
        assert tan.log().mean().item() == pytest.approx(math.log(0.7358), abs=5 * 1.4 / 4000**0.5)
        assert tan.log().std().item() == pytest.approx(1.4, abs=5 * 1.4 / 8000**0.5)
        (noise,) = (b / a for a, b in [method.angles.ab(t)])
        close(noise, sigma_data * tan)


def test_levels_are_the_published_ones_and_inside_the_angles():
    levels(SCM)
    for name in PATHS:
        path = make_path(name)
        method = made(SCM, path, Consistent(path), std=30.0)
        t = method.level(Draws(0, 0, 4000), method.angles, method.mean, method.std)
        own = path.time_of(Trig().log_snr(t))
        assert path.t_min <= own.min() < own.max() <= path.t_max
        assert 1e-4 <= t.min() < t.max() <= 1 - 1e-4


def weight(cls):
    """The weight's turn is e^-v loss + v, whose minimum v = log(loss) is; the student's is e^-v loss; both apart."""
    path = make_path("vp")
    student = Consistent(path, 1.0)
    method = made(cls, path, student)
    with at(0.4, path):
        plain = next(method.step(checks.batch(), LATE)).terms["change"].item()
        method.weight.series.data[:2] = tensor(0.3, 0.2)
        angle = torch.atan2(*path.ab(tensor(0.4))[::-1])
        v = (0.3 + 0.2 * (2 * angle).cos()).item()
        game = method.step(checks.batch(), LATE)
        first = next(game)
        close(first.terms["change"], math.exp(-v) * plain)
        sum(first.terms.values()).backward()
        assert method.weight.series.grad is None
        second = next(game)
        assert second.player == "weight"
        close(second.terms["variance"], math.exp(-v) * plain + v)
        student.zero_grad()
        second.terms["variance"].backward()
        assert student.shift.grad is None
        close(method.weight.series.grad[0], 1 - math.exp(-v) * plain)
    for scheme, ratio in (("tan", 1.0), ("one", angle.tan().item())):
        fixed = made(cls, path, student, weight=scheme)
        with at(0.4, path):
            turn, *more = fixed.step(checks.batch(), LATE)
        assert fixed.players == (turn.player,) == ("student",)
        assert not more
        close(turn.terms["change"], ratio * plain)


def warms_up(cls):
    """Over `ramp` rounds, and at once where there are none."""
    path = make_path("vp")
    for ramp, step, want in ((4, 0, 0.0), (4, 1, 0.25), (4, 4, 1.0), (4, 9, 1.0), (0, 0, 1.0), (0, 1, 1.0)):
        method, seen = made(cls, path, Consistent(path), ramp=ramp), []
        change = method.change
        method.change = lambda *args, change=change, seen=seen: seen.append(args[-1]) or change(*args)
        list(method.step(checks.batch(), step))
        assert seen == [want]


def test_the_warm_up_takes_its_rounds():
    warms_up(SCM)


def of_norm_one(log_variance):
    """At the start it is the loss of a change of norm one, at every level."""
    start = log_variance(torch.nn.Linear(1, 1, dtype=F64), 1024)(Flow(), tensor(0.1, 1.0))
    close(start, [math.log(torch.full((4, 32, 8), 1024**-0.5, dtype=F64).square().mean())] * 2)


def test_the_weight_learns_the_loss_of_a_level():
    weight(SCM)
    of_norm_one(terms.LogVariance)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_a_flow_is_read_on_the_path_of_angles_without_loss(sigma):
    """Sheet 3.1 (a), the wrapper of SANA-Sprint, to 1e-12: latents y0 of unit deviation, data sigma y0."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).double()

    class Velocity(torch.nn.Module):
        def forward(self, y, s, cond):
            return Flow().split(y, net(torch.cat([y, s[:, None]], 1)), s, "flow")

    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(6), dtype=F64)
    t = torch.linspace(0.001, 0.999, 64, dtype=F64)
    tau = (t * (math.pi / 2))[:, None]
    s = tau.sin() / (tau.sin() + tau.cos())
    norm = (s**2 + (1 - s) ** 2).sqrt()
    y = x * norm
    want = ((1 - 2 * s) * y + (1 - 2 * s + 2 * s**2) * net(torch.cat([y, s], 1))) / norm
    got = OnPath(Velocity(), Flow(), Trig()).velocity(x, t, {}) * (2 / math.pi)
    assert (got - want).abs().max() < 1e-12 * want.abs().max()


# ---- do the checks notice? -----------------------------------------------------------------------------------------


def along(module):
    moves_along_g(module.SCM)
    moves_along_g(module.SCM, step=5000)


def fixed(module):
    checks.guided_mean_is_w_m(module.SCM, make_path("vp"), pull)


def data(module):
    without_a_teacher(module.SCM)


def half(module):
    half_angle(module.SCM)


def learns(module):
    learns_half_the_angle(module.SCM)


def weighs(module):
    weight(module.SCM)


def begins(module):
    of_norm_one(module.LogVariance)


def warms(module):
    warms_up(module.SCM)


def drawn(module):
    levels(module.SCM)


MUTANTS = [
    ("-cos * held", "cos * held", along),
    ("return cos, ramp", "return cos**2, ramp", along),
    ("- ramp * cos", "+ ramp * cos", along),
    ("- turned * df", "", along),
    ("cos * sin * x - turned", "cos * x - turned", along),
    ("cos * sin * dx, (cos * sin).reshape(-1) * RADIAN", "sin * dx, (cos * sin).reshape(-1) * RADIAN", along),
    (".reshape(-1) * RADIAN", ".reshape(-1)", along),
    ("min(1.0, step / self.ramp)", "1.0", along),
    ("ramp: int = 10_000", "ramp: int = 5_000", along),
    ("norm: float = 0.2", "norm: float = 0.1", along),
    ("- old - g /", "- old + g /", along),
    ("- old - g /", "- old + g /", learns),
    ("- ramp * cos", "+ ramp * cos", learns),
    ("else a / b", "else b / a", along),
    ("RADIAN * OnPath", "OnPath", along),
    ("cond) / self.sigma_data - old", "cond) - old", half),
    ("(v / self.sigma_data for v in", "(v for v in", half),
    ("self.guide(self.teacher)", "self.teacher", fixed),
    ('self.angles.join(batch.x0, batch.noise, t, "flow")', 'self.angles.join(batch.noise, batch.x0, t, "flow")', data),
    ("loss.detach()", "loss", weighs),
    ("(-known).exp() * loss + known", "(-known).exp() * loss - known", weighs),
    ("((-known).exp() * loss).mean(), **more", "(known.exp() * loss).mean(), **more", weighs),
    ('if "weight" in self.players else', 'if "weight" not in self.players else', weighs),
    ('or weight == "learned"', 'or weight != "one"', weighs),
    ('if self.scheme == "one" else', 'if self.scheme != "one" else', weighs),
    ("-math.log(elements)", "0.0", begins),
    ("step / self.ramp", "(step + 1) / self.ramp", warms),
    ("if self.ramp else 1.0", "if self.ramp else 0.0", warms),
    ("self.series[:1]", "self.series", begins),
    ("mean: float = -0.307", "mean: float = -1.0", drawn),
    ("mean + math.log(self.sigma_data)", "mean", drawn),
    ("self.level(batch.draw, self.angles", "times.log_normal(batch.draw, self.angles", drawn),
    ("std: float = 1.4", "std: float = 1.6", drawn),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    source = "onestroke.terms" if check is begins else "onestroke.methods.consistency.scm"
    check(broken(source, old, old))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(source, old, new))
