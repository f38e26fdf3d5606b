"""Truth checks of the score family (SiD, SiD-LSG, few-step SiD, SIM), as plain functions of the class they check.

Gaussians of the sheet's fixture GT-1D: teacher N(M, TAU^2), student MU + S z, fake the student's exact law. With
P = a^2 TAU^2 + b^2 and Q = a^2 S^2 + b^2 the denoisers are D_p = M + (a TAU^2 / P) (x_t - a M) and likewise D_q.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch

from onestroke.method import Batch
from onestroke.teachers.gaussian import GaussianMixture
from truth.checks import F64, Affine, Free, Gain, Given, T, close, fourfold, labels, parts, tensor, two_classes
from truth.checks import two_class_eps as class_eps

M, TAU, MU, S = 0.3, 1.1, 0.9, 0.8
ALPHAS = (0.0, 0.5, 1.0, 1.2)
PATHS = ("vp", "edm", "flow")


def at(t):
    """Every time that a method draws is t, whichever its law."""

    def fixed(draw, *args, **kwargs):
        return torch.as_tensor(t, dtype=F64).expand(draw.size)

    return mock.patch.multiple("onestroke.times", uniform=fixed, karras=fixed, log_normal=fixed)


def gauss(path, mean, std, dim: int = 1):
    """An exact network of one Gaussian, with a parameter that nothing but its own turn may move."""
    return Gain(GaussianMixture(path, torch.full((1, dim), mean, dtype=F64), std))


def direction(method, student, z, e, cond, t: float = T, shared: float = 0.999):
    """The gradient of the student's turn at each sample, (B, D); teacher and fake, if any, must not receive any."""
    with at(t):
        game = method.step(Batch(z, cond, Given(e, e, e, shared=shared)), 0)
        turn = next(game)
    assert turn.player == "student"
    sum(turn.terms.values()).backward()
    others = [module for role, module in method.named_children() if role != "student"]
    assert all(p.grad is None for module in others for p in module.parameters())
    return student.x.grad * len(z)


def posterior(x, e, a, b):
    """(D_p, dD_p / dx, D_q, dD_q / dx) at x_t = a x + b e."""
    xt = a * x + b * e
    k_p, k_q = (a * s**2 / (a**2 * s**2 + b**2) for s in (TAU, S))
    return M + k_p * (xt - a * M), a * k_p, MU + k_q * (xt - a * MU), a * k_q


def sid_is_the_closed_form(cls, path, a, b, alpha, weight=None, **options):
    """Sheet 2, SiD-alpha in score space times sigma^4 / alpha^2, in expectation over z and eps; at alpha = 1/2 twice
    the gradient is the Fisher divergence's. `weight`: of the loss, 1 / omega when absent, which is undone by hand."""
    z, e = fourfold(1)
    x = MU + S * z
    student = Free(x)
    method = cls(parts(path, gauss(path, M, TAU), student, gauss(path, MU, S)), alpha=alpha, scale=1.0, **options)
    g = direction(method, student, z, e, labels(4))
    g = g / weight if weight else g * (x - posterior(x, e, a, b)[0]).abs()
    p, q = a**2 * TAU**2 + b**2, a**2 * S**2 + b**2
    close(g.mean(), b**4 * (MU - M) * (2 * (1 - alpha) / p * (1 / p - 1 / q) + 1 / (p * q)))
    close((g * z).mean(), b**4 * 2 * S * ((1 - alpha) * (1 / p - 1 / q) ** 2 + (1 / p - 1 / q) / q))
    if alpha == 0.5:
        close(2 * g.mean(), b**4 * 2 * (MU - M) / p**2)
        close(2 * (g * z).mean(), b**4 * 2 * S * (1 / p**2 - 1 / q**2))


def sid_is_the_hand_typed_gradient(cls, path, a, b, alpha, **options):
    """Sample by sample in three dimensions: sum over D, mean over B, omega the detached mean of |x - D_p| over D."""
    z, e = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(11), dtype=F64)
    x = MU + S * z
    student = Free(x)
    method = cls(parts(path, gauss(path, M, TAU, 3), student, gauss(path, MU, S, 3)), alpha=alpha, scale=7.0, **options)
    g = direction(method, student, z, e, labels(6))
    real, d_real, fake, d_fake = posterior(x, e, a, b)
    gap, d_gap = real - fake, d_real - d_fake
    omega = (x - real).abs().mean(1, keepdim=True)
    close(g, 7 * (d_gap * (real - x - alpha * gap) + gap * (d_real - 1 - alpha * d_gap)) / omega)


REAL, FAKE = (0.9, 0.5), (0.6, 0.8)
"""(shift, std) of the two classes of the teacher and of the fake."""


def guided_x0(x, e, a, b, law, kappa):
    """null + kappa (class 0 - null), in x0, typed by hand from the two-class posterior."""
    xt = a * x + b * e
    eps = (1 - kappa) * class_eps(xt, a, b, *law, -1) + kappa * class_eps(xt, a, b, *law, 0)
    return (xt - b * eps) / a


def student_turn_is_the_finite_difference(
    cls, path, a, b, loss: Callable, run: float, kappas: tuple[float, float], t: float = T, **options
):
    """Central differences of loss(x, real, fake, frozen) through x_t(x), on networks that are not linear.

    kappas: the guidance that teacher and fake must get when the run's is `run`. frozen: |x - real| at the point.
    """
    z, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(12), dtype=F64)
    x = 0.4 + 0.8 * z
    student = Free(x)
    method = cls(parts(path, two_classes(path, *REAL), student, two_classes(path, *FAKE), run), **options)
    g = direction(method, student, z, e, labels(6, 0), t)
    omega = (x - guided_x0(x, e, a, b, REAL, kappas[0])).abs()

    def value(x):
        return loss(x, *(guided_x0(x, e, a, b, law, k) for law, k in zip((REAL, FAKE), kappas, strict=True)), omega)

    h = 1e-5
    close(g, (value(x + h) - value(x - h)) / (2 * h), rtol=1e-6, atol=1e-7)
    assert (g.abs() > 1e-6).all()


def sid_loss(alpha, scale: float, weight: float | None = None):
    """SiD's loss per sample, typed by hand."""

    def loss(x, real, fake, omega):
        return scale * (real - fake) * (real - x - alpha * (real - fake)) * (weight or 1 / omega)

    return loss


class Probe(torch.nn.Module):
    """A network that keeps the gradient of its input."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x, t, cond):
        if x.requires_grad:
            x = x.clone()
            x.retain_grad()
            self.seen.append(x)
        return self.net(x, t, cond)


class Told(torch.nn.Module):
    """A stand-in for the network that reads a second time: it keeps what it is told."""

    def __init__(self, net, shape, null):
        super().__init__()
        self.net, self.told = net, []

    def forward(self, x, t, cond):
        self.told.append(cond)
        return self.net(x, t, {"label": cond["label"]})


def gradient_flows_through_teacher_and_fake(cls, path, **options):
    """Into the inputs of both, not into their parameters; their parameters are trainable again afterwards."""
    z, e = fourfold(2)
    student, teacher, fake = Affine(path, tensor(MU), tensor(S)), Probe(gauss(path, M, TAU, 2)), None
    fake = Probe(gauss(path, MU + 0.1, S, 2))
    method = cls(parts(path, teacher, student, fake, 2.0), **options)
    with at(T):
        game = method.step(Batch(z, labels(4), Given(e, z.flip(0), e.flip(1))), 0)
        sum(next(game).terms.values()).backward()
        assert len(teacher.seen) == len(fake.seen) == 1
        assert (teacher.seen[0].grad != 0).all()
        assert (fake.seen[0].grad != 0).all()
        assert teacher.net.gain.grad is None
        assert fake.net.gain.grad is None
        assert (student.mu.grad != 0).all()
        assert (student.s.grad != 0).all()
        student.zero_grad()
        turn = next(game)
        assert turn.player == "fake"
        sum(turn.terms.values()).backward()
    assert teacher.net.gain.grad is None
    assert student.mu.grad is None
    assert student.s.grad is None
    assert fake.net.gain.grad != 0
    assert next(game, None) is None
    assert teacher.net.gain.requires_grad


def zero_at_the_truth(cls, path, run: float, shift: float = 0.0, **options):
    """A fake of the teacher's law moves nothing, whatever the guidance; `shift` shifts the fake off it."""
    z, e = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(13), dtype=F64)
    student = Free(0.4 + 0.8 * z)
    fake = two_classes(path, REAL[0] + shift, REAL[1])
    g = direction(
        cls(parts(path, two_classes(path, *REAL), student, fake, run), **options), student, z, e, labels(8, 0)
    )
    assert ((g.abs() < 1e-13) == (shift == 0)).all(), g  # to rounding: autograd sums the two networks in its own order


def fake_turn_is_the_closed_form(
    cls, path, a, b, weight, space, run=1.0, kappa=1.0, null=False, fresh=True, normals=1, **options
):
    """weight x squared error in x0 or eps under kappa, on a fresh sample or the same: summed over D, mean over B.

    normals: how many times the student's turn draws noise.
    """
    z, e, z2, e2 = torch.randn(4, 6, 1, generator=torch.Generator().manual_seed(14), dtype=F64)
    student = Affine(path, tensor(0.4), tensor(0.8))
    method = cls(parts(path, two_classes(path, *REAL), student, two_classes(path, *FAKE), run), **options)
    with at(T):
        game = method.step(Batch(z, labels(6, 0), Given(*[e] * normals, *([z2] if fresh else []), e2)), 0)
        next(game)
        turn = next(game)
    assert turn.player == "fake"
    x = 0.4 + 0.8 * (z2 if fresh else z)
    xt = a * x + b * e2
    eps = (1 - kappa) * class_eps(xt, a, b, *FAKE, -1) + kappa * class_eps(xt, a, b, *FAKE, -1 if null else 0)
    error = eps - e2 if space == "eps" else (xt - b * eps) / a - x
    close(sum(turn.terms.values()), weight * error.square().mean())
