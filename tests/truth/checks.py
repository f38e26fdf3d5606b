"""Truth checks as plain functions of the class they check, so that test_mutants can run them on a broken copy.

Coefficients and closed forms are typed here from the literature, never taken from the library.
"""

from __future__ import annotations

import math
from functools import lru_cache
from unittest import mock

import mpmath
import numpy as np
import torch
from torch import nn

from onestroke import paths
from onestroke.draws import Draws
from onestroke.method import Batch, Mean, Parts, Turn, advance
from onestroke.paths import PREDICTIONS, Estimate
from onestroke.sampling import FewStep
from onestroke.teachers.gaussian import GaussianMixture

F64 = torch.float64
INDEX = 400
T = INDEX / 999
"""The time of the closed forms: a whole index of a table of a thousand."""


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


# ---- schedules, typed by hand --------------------------------------------------------------------------------


@lru_cache
def sd_table(zero_snr: bool = False) -> tuple[float, ...]:
    """alphas_cumprod of Stable Diffusion's "scaled linear" schedule; rescaled as arXiv 2305.08891, algorithm 1."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    if zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return tuple((root**2).tolist())


def hand(name: str, t):
    """(a, b) at t of the path called `name`: sheet 0.1, in mpmath."""
    if name == "vp":
        lo, hi = mpmath.sqrt(mpmath.mpf("0.85")), mpmath.sqrt(12)
        area = mpmath.quad(lambda u: (lo + u * (hi - lo)) ** 2, [0, t])
        return mpmath.exp(-area / 2), mpmath.sqrt(1 - mpmath.exp(-area))
    if name in ("table", "table0"):
        table = sd_table(name == "table0")
        index = t * 999
        low = min(int(mpmath.floor(index)), 998)
        one, two = (mpmath.acos(mpmath.sqrt(mpmath.mpf(table[i]))) for i in (low, low + 1))
        angle = one + (index - low) * (two - one)
        return mpmath.cos(angle), mpmath.sin(angle)
    if name == "edm":
        lo, hi = mpmath.mpf("0.002") ** (mpmath.mpf(1) / 7), mpmath.mpf(80) ** (mpmath.mpf(1) / 7)
        return mpmath.mpf(1), (lo + t * (hi - lo)) ** 7
    if name == "flow":
        return 1 - t, t
    return mpmath.cos(mpmath.pi * t / 2), mpmath.sin(mpmath.pi * t / 2) * {"trig": 1, "trig half": 0.5}[name]


def hand_ab(name: str, t: float = T) -> tuple[float, float]:
    a, b = hand(name, mpmath.mpf(t))
    return float(a), float(b)


NAMES = ("vp", "table", "table0", "edm", "flow", "trig", "trig half")


def make_path(name: str, prediction: str = "x0", module=paths):
    """The path called `name`, cut short of its end where this prediction is singular there."""
    short = {"t_max": 0.999} if prediction == "eps" else {}
    if name == "vp":
        return module.VP()
    if name == "edm":
        return module.EDM()
    if name == "flow":
        return module.Flow(**short)
    if name == "trig":
        return module.Trig(**short)
    if name == "trig half":
        return module.Trig(sigma_data=0.5, **short)
    if name == "table":
        return module.Table(alphas_cumprod=sd_table())
    return module.Table(alphas_cumprod=sd_table(True), **({"t_max": 998 / 999} if short else {}))


EVERY = [(name, prediction) for name in NAMES for prediction in PREDICTIONS]


# ---- students, draws and parts -------------------------------------------------------------------------------


class Affine(nn.Module):
    """A one-step student of known law N(mu, s^2): it maps its first input, hypot(a, b) z, to mu + s z."""

    def __init__(self, path, mu, s):
        super().__init__()
        self.path, self.mu, self.s = path, nn.Parameter(mu.clone()), nn.Parameter(s.clone())

    def forward(self, x, t, cond):
        a, b = (c[:, None] for c in self.path.ab(t))
        x0 = self.mu + self.s * x / torch.hypot(a, b)
        return Estimate(x0, (x - a * x0) / b)


class Free(nn.Module):
    """A student that returns its parameter whatever it is given: its gradient is the direction at each sample."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self, x, t, cond):
        return Estimate(self.x, x)


class Given(Draws):
    """Draws whose normal numbers are given, and whose shared number is near 1 unless said otherwise."""

    def __init__(self, *normals, shared: float = 0.999):
        super().__init__(0, 0, len(normals[0]))
        self.normals, self.share = list(normals), shared

    def normal(self, like):
        return self.normals.pop(0)

    def shared(self):
        return self.share


def at(t):
    """Every time that a method draws is t."""

    def fixed(draw, path, lo=0.0, hi=1.0):
        return torch.as_tensor(t, dtype=F64).expand(draw.size)

    return mock.patch("onestroke.times.uniform", fixed)


def fourfold(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, e) (4, dim) with the exact first and second moments of independent standard normals.

    The batch mean of anything bilinear in them is its expectation, so closed forms hold to rounding.
    """
    z, e = tensor(1, 1, -1, -1), tensor(1, -1, 1, -1)
    return z[:, None].expand(4, dim).clone(), e[:, None].expand(4, dim).clone()


def parts(path, teacher, student, fake, scale: float = 1.0) -> Parts:
    null = {"label": torch.tensor([-1])}
    return Parts(teacher, student, lambda role: fake, FewStep(path, path.grid(1)), null, scale, (1,))


def labels(count: int, label: int = -1) -> dict[str, torch.Tensor]:
    return {"label": torch.full((count,), label)}


def close(got, want, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=rtol, atol=atol)


def turns_of(method, batch, step: int = 0):
    """The turns of one micro-batch that is the whole batch: its means are its own. No weight moves in between."""
    game, answer = method.step(batch, step), None
    while (found := advance(game, answer)) is not None:
        answer = found.value.detach() if isinstance(found, Mean) else None
        if isinstance(found, Turn):
            yield found


# ---- SwiftBrush ----------------------------------------------------------------------------------------------

MU, S = tensor(0.7, -1.1), tensor(0.4, 1.7)
M, TAU = tensor(-0.3, 0.5), tensor(1.2, 0.6)


def vsd_is_the_closed_form(swiftbrush, path, prediction, a, b, **options):
    """Sheet 4, item 7, per dimension and for any (a, b): with w = sigma^2 = b^2 / (a^2 + b^2), P = a^2 tau^2 + b^2 and
    Q = a^2 s^2 + b^2, E[g] = w a b (mu - m) / P and E[g z] = w a b s (1/P - 1/Q); both over D."""
    teacher = GaussianMixture(path, M[None], TAU[None], prediction=prediction)
    fake = GaussianMixture(path, MU[None], S[None], prediction=prediction)
    student = Affine(path, MU, S)
    z, e = fourfold(2)
    method = swiftbrush(parts(path, teacher, student, fake), **options)
    with at(T):
        turn = next(method.step(Batch(z, labels(4), Given(e)), 0))
    assert turn.player == "student"
    sum(turn.terms.values()).backward()
    w = (b**2 / (a**2 + b**2)) ** (options.get("sigma_power", 2) / 2)
    big_p, big_q = a**2 * TAU**2 + b**2, a**2 * S**2 + b**2
    close(student.mu.grad, w * a * b * (MU - M) / big_p / 2)
    close(student.s.grad, w * a * b * S * (1 / big_p - 1 / big_q) / 2)


def two_class_eps(x, a, b, shift, std, label: int):
    """E[eps | x_t] of N(+-shift, std^2) with equal weights: of class 0 (+), 1 (-) or, for -1, of both."""
    p = a**2 * std**2 + b**2
    middle = {0: shift, 1: -shift, -1: shift * torch.tanh(a * shift * x / p)}[label]
    return b * (x - a * middle) / p


def two_classes(path, shift, std):
    return GaussianMixture(path, tensor([shift], [-shift]), std, labels=[0, 1])


def guided_vsd_is_the_closed_form(swiftbrush, path, a, b, kappa: float = 4.5, **options):
    """Fixture CFG of sheet 2: null + kappa (class - null) in eps, on teacher *and* fake, sample by sample; on the
    teacher alone under guide_fake=False."""
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(3), dtype=F64)
    x = 0.4 + 0.8 * z
    student = Free(x)
    nets = parts(path, two_classes(path, 0.9, 0.5), student, two_classes(path, 0.6, 0.8), kappa)
    method = swiftbrush(nets, **options)
    with at(T):
        turn = next(method.step(Batch(z, labels(6, 0), Given(e)), 0))
    sum(turn.terms.values()).backward()
    xt = a * x + b * e
    real, fake = (
        (1 - scale) * two_class_eps(xt, a, b, *law, -1) + scale * two_class_eps(xt, a, b, *law, 0)
        for scale, law in ((kappa, (0.9, 0.5)), (kappa if options.get("guide_fake", True) else 1.0, (0.6, 0.8)))
    )
    close(student.x.grad, b**2 / (a**2 + b**2) * (real - fake) / 6)


def fake_loss_is_the_closed_form(swiftbrush, path, a, b, null: bool = False):
    """alpha^2 (eps_fake - eps)^2 of the plain class (no guidance), or of the null prompt in a null round."""
    z, e, e2 = torch.randn(3, 6, 1, generator=torch.Generator().manual_seed(4), dtype=F64)
    student, teacher = Affine(path, tensor(0.4), tensor(0.8)), two_classes(path, 0.9, 0.5)
    method = swiftbrush(parts(path, teacher, student, two_classes(path, 0.6, 0.8), 4.5))
    with at(T):
        game = method.step(Batch(z, labels(6, 0), Given(e, e2, shared=0.0999 if null else 0.1)), 0)
        next(game)
        turn = next(game)
    assert turn.player == "fake"
    xt = a * (0.4 + 0.8 * z) + b * e2
    error = two_class_eps(xt, a, b, 0.6, 0.8, -1 if null else 0) - e2
    close(sum(turn.terms.values()), (a**2 / (a**2 + b**2) * error**2).mean())


class Gain(nn.Module):
    """A mixture with a trainable gain, so that gradient has somewhere to go."""

    def __init__(self, net):
        super().__init__()
        self.net, self.gain = net, nn.Parameter(tensor(1.0))

    def forward(self, x, t, cond):
        x0, eps, _ = self.net(x, t, cond)
        return Estimate(x0 * self.gain, eps * self.gain)


def each_turn_trains_its_own_player(swiftbrush, path):
    z, e = fourfold(2)
    student = Affine(path, MU, S)
    teacher, fake = (Gain(GaussianMixture(path, *law)) for law in ((M[None], TAU[None]), (MU[None], S[None])))
    method = swiftbrush(parts(path, teacher, student, fake, 2.0))
    with at(T):
        game = method.step(Batch(z, labels(4), Given(e, e.flip(0))), 0)
        sum(next(game).terms.values()).backward(retain_graph=True)
        assert teacher.gain.grad is None
        assert fake.gain.grad is None
        assert (student.mu.grad != 0).all()
        student.zero_grad()
        sum(next(game).terms.values()).backward()
    assert teacher.gain.grad is None
    assert student.mu.grad is None
    assert student.s.grad is None
    assert fake.gain.grad != 0
    assert next(game, None) is None


# ---- paths, wrappers, terms ----------------------------------------------------------------------------------


def velocity_is_that_of_diffusers(module, zero_snr: bool = False):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr
    )
    table = module.Table(alphas_cumprod=tuple(scheduler.alphas_cumprod.double().tolist()))
    x0, eps = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    index = torch.tensor([0, 100, 400, 998, 999])
    want = scheduler.get_velocity(x0, eps, index)
    close(table.join(x0, eps, index.double() / 999, "v"), want, rtol=1e-7, atol=1e-7)


def flow_is_that_of_diffusers(module):
    """The prediction, followed by FlowMatchEulerDiscreteScheduler, goes from pure noise to the data."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    path = module.Flow()
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=F64)
    x = eps.clone()
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        t = torch.full((3,), sigma.item(), dtype=F64)
        close(path.mix(x0, eps, t), x, rtol=1e-6, atol=1e-6)  # the scheduler's sigmas are float32
        x = scheduler.step(path.join(x0, eps, t, "flow"), timestep, x).prev_sample
    close(x, x0, rtol=1e-6, atol=1e-6)


def guidance_runs_from_null_to_class(guided, path):
    net = two_classes(path, 0.9, 0.5)
    x = torch.randn(7, 1, generator=torch.Generator().manual_seed(5), dtype=F64)
    t, cond = torch.full((7,), T, dtype=F64), labels(7, 1)
    class_, null = net(x, t, cond), net(x, t, labels(7))
    for scale in (0.0, 1.0, 4.5, -1.0):
        got = guided(net, scale, net.null)(x, t, cond)
        close(got.x0, null.x0 + scale * (class_.x0 - null.x0))
        close(got.eps, null.eps + scale * (class_.eps - null.eps))
    assert (class_.x0 - null.x0).abs().max() > 0.1


def reading_on_another_path_is_exact(on_path, src, dst):
    """The same mixture built on `dst` is the truth for the one built on `src` and read on `dst`."""
    means, std = tensor([0.9, -0.2], [-0.5, 0.4], [0.1, 1.5]), tensor([0.3, 0.5], [0.4, 0.2], [0.6, 0.3])
    generator = torch.Generator().manual_seed(6)
    t = torch.rand(16, generator=generator, dtype=F64) * 0.96 + 0.02
    cond = {"label": torch.arange(16) % 3 - 1}
    read, want = (GaussianMixture(p, means, std, labels=[0, 1, 1]) for p in (src, dst))
    x = dst.mix(want.sample(cond["label"], generator), torch.randn(16, 2, generator=generator, dtype=F64), t)
    got, exact = on_path(read, src, dst)(x, t, cond), want(x, t, cond)
    close(got.x0, exact.x0, rtol=1e-8, atol=1e-9)
    close(got.eps, exact.eps, rtol=1e-8, atol=1e-9)


def descend_has_its_gradient(terms):
    """Sheet 0.7: g / (B D) under "mean", g / B under "sum"."""
    for reduce, scale in (("mean", 3 * 20), ("sum", 3)):
        x, g = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(7), dtype=F64)
        x.requires_grad_(True)
        g.requires_grad_(True)
        terms.descend(x, g, reduce).backward()
        close(x.grad, g.detach() / scale, rtol=1e-12)
        assert g.grad is None


def reduced_has_its_scale(terms):
    rows = tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    close(terms.reduced(rows, "mean"), 24 / 12)
    close(terms.reduced(rows, "sum"), 24 / 2)


def rows_do_not_depend_on_the_split(draws):
    whole = draws(5, 3, 64)
    halves = [draws(5, 3, 32, offset, 64) for offset in (0, 32)]
    for call in (
        lambda d: d.normal((2, 3)),
        lambda d: d.uniform(-1, 2),
        lambda d: d.normal((1,)),
        lambda d: d.index(70),
    ):
        assert torch.equal(call(whole), torch.cat([call(half) for half in halves]))
    assert whole.shared() == halves[0].shared() == halves[1].shared()


def score_is_the_gradient_of_log_prob(mixture, path, dim: int = 8):
    generator = torch.Generator().manual_seed(8)
    means = torch.randn(5, dim, generator=generator, dtype=F64)
    std = 0.2 + torch.rand(5, dim, generator=generator, dtype=F64)
    net = mixture(path, means, std, weights=[1, 2, 3, 4, 5], labels=[0, 0, 1, 1, 2])
    t = torch.linspace(0.02, 0.95, 12, dtype=F64)
    cond = {"label": torch.arange(12) % 4 - 1}
    x = net.sample(cond["label"], generator)
    x = path.mix(x, torch.randn(x.shape, generator=generator, dtype=F64), t).requires_grad_(True)
    (want,) = torch.autograd.grad(net.log_prob(x, t, cond).sum(), x)
    close(net.score(x, t, cond).detach(), want, rtol=1e-8, atol=1e-9)
    est, (a, b) = net(x, t, cond), path.ab(t)
    close(est.eps.detach(), -b[:, None] * want, rtol=1e-8, atol=1e-8)
    close((a[:, None] * est.x0 + b[:, None] * est.eps).detach(), x.detach(), rtol=1e-9, atol=1e-10)


def log_prob_is_that_of_torch(mixture, path, name):
    """torch.distributions of the noised mixture, with (a, b) typed by hand, as the outside authority."""
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    means, std, weights = tensor([0.9, -0.2], [-0.5, 0.4], [0.1, 1.5]), tensor(0.3, 0.4, 0.6), tensor(1.0, 2.0, 5.0)
    net = mixture(path, means, std, weights, [0, 1, 1])
    a, b = hand_ab(name)
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(9), dtype=F64)
    for label, keep in ((-1, [0, 1, 2]), (0, [0]), (1, [1, 2])):
        spread = (a**2 * std[keep] ** 2 + b**2).sqrt()[:, None].expand(-1, 2)
        law = MixtureSameFamily(Categorical(weights[keep]), Independent(Normal(a * means[keep], spread), 1))
        close(net.log_prob(x, torch.full((9,), T, dtype=F64), labels(9, label)), law.log_prob(x), rtol=1e-9, atol=1e-9)


def unit_point_is_normal(path, name):
    a, b = hand_ab(name)
    got = path.unit_ab(tensor(T))
    close(torch.cat(got), [a / math.hypot(a, b), b / math.hypot(a, b)])
