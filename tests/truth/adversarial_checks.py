"""Truth checks of the adversarial methods: exact Gaussians whose layers are typed by hand, heads that are linear.

The layer that `Seen` shows is (x_t, x_t^2), so that a linear head compares the first two moments of what it is shown.
"""

from __future__ import annotations

import torch
from torch import nn

from onestroke.method import Batch, Parts
from onestroke.sampling import FewStep
from truth.checks import F64, Affine, Free, Given, T, close, fourfold, labels, tensor
from truth.score_checks import MU, TAU, M, S, at, gauss

W, C = (0.3, -0.2), 0.1
"""Of the linear head: logits within the margins of the hinge on most samples, beyond them on some."""


class Seen(nn.Module):
    """An exact network with the layer (x_t, x_t^2), (B, 2), times a gain that nothing may move."""

    def __init__(self, net):
        super().__init__()
        self.net, self.gain = net, nn.Parameter(tensor(1.0))

    def forward(self, x, t, cond):
        layer = torch.cat([x, x**2], 1) * self.gain
        return self.net(x, t, cond)._replace(features=(layer,))


class Linear(nn.Module):
    """Logit (B, 1): w . layer + c; what else it is called with is ignored."""

    layers = 1

    def __init__(self, w=W, c=C):
        super().__init__()
        self.w, self.c = nn.Parameter(tensor(*w)), nn.Parameter(torch.tensor(c, dtype=F64))

    def forward(self, features, *_):
        return (features[0] @ self.w + self.c)[:, None]


def made(cls, path, student, fake=None, heads=None, steps: int = 1, scale: float = 1.0, **options):
    """The method with an exact teacher N(M, TAU^2) and the linear head in place of its own."""
    null = {"label": torch.tensor([-1])}
    few = FewStep(path, path.grid(steps))
    teacher = Seen(gauss(path, M, TAU))
    method = cls(Parts(teacher, student, lambda role: fake, few, null, scale, (1,)), **options)
    method.heads = heads or Linear()
    return method


def samples(count: int = 8):
    """(z, x0, normals): inputs, real samples and as many noises as a round may draw."""
    normals = torch.randn(9, count, 1, generator=torch.Generator().manual_seed(31), dtype=F64)
    return normals[0], M + TAU * normals[1], normals[2:]


def play(method, z, x0, normals):
    """The terms of every turn of one round, by player, all times being T; no weight moves."""
    with at(T):
        return {
            turn.player: turn.terms
            for turn in method.step(Batch(z, labels(len(z)), Given(*normals, shared=0.0), x0), 0)
        }


def grads(total, *wrt):
    return torch.autograd.grad(total, wrt, retain_graph=True, allow_unused=True)


def logit(xt, w=W, c=C):
    return w[0] * xt + w[1] * xt**2 + c


def slope(xt, w=W):
    return w[0] + 2 * w[1] * xt


def student_descends_the_logit(cls, path, a, b, term: str = "gan", **options):
    """Hinge: -d/dx mean logit(a x + b e) = -a (w1 + 2 w2 x_t) / B; the heads and the teacher get nothing."""
    z, x0, normals = samples()
    student = Free(MU + S * z)
    method = made(cls, path, student, **options)
    with at(T):
        game = method.step(Batch(z, labels(len(z)), Given(*normals, shared=0.0), x0), 0)
        turn = next(game)
        assert turn.player == "student"
        (got,) = grads(turn.terms[term], student.x)
        sum(turn.terms.values()).backward()
        assert all(p.grad is None for p in (*method.heads.parameters(), *method.teacher.parameters()))
        list(game)
    assert all(p.requires_grad for p in method.heads.parameters())
    xt = a * student.x.detach() + b * normals[0]
    close(got, -a * slope(xt) / len(z))


def heads_descend_the_hinge(cls, path, a, b, noises=(1, 2), term: str = "gan", **options):
    """mean max(0, 1 - logit(real)) + mean max(0, 1 + logit(fake)), and its gradient, typed by hand."""
    z, x0, normals = samples()
    x0, student = 5 * x0, Free(MU + 5 * S * z)  # some beyond the margins
    method = made(cls, path, student, **options)
    terms = play(method, z, x0, normals)["heads"]
    real, fake = (a * y + b * normals[k] for y, k in zip((x0, student.x.detach()), noises, strict=True))
    on, off = (1 - logit(real) > 0).to(F64), (1 + logit(fake) > 0).to(F64)
    assert 0 < on.mean() < 1 or 0 < off.mean() < 1
    close(terms[term], ((1 - logit(real)) * on).mean() + ((1 + logit(fake)) * off).mean())
    w, c, x, gain = grads(terms[term], method.heads.w, method.heads.c, student.x, method.teacher.gain)
    close(c, (off - on).mean())
    close(w, [(off * fake - on * real).mean(), (off * fake**2 - on * real**2).mean()])
    assert x is None
    assert gain is None


def fixed_point_is_the_first_two_moments(cls, path, a, b, loss: str, term: str = "gan", **options):
    """From heads of zero, with the batch's moments exact: the heads move along E_fake - E_real of (x_t, x_t^2), by 1
    (hinge) or 1/2 (softplus); so student and heads rest together where mean and deviation are the data's, there alone.
    """
    z, e = fourfold(1)
    x0, factor = M + TAU * z, {"hinge": 1.0, "softplus": 0.5}[loss]
    for mean, std in ((M, TAU), (MU, TAU), (M, S), (MU, S)):
        student = Affine(path, tensor(mean), tensor(std))
        method = made(cls, path, student, heads=Linear((0.0, 0.0), 0.0), loss=loss, **options)
        terms = play(method, z, x0, [e] * 7)
        (w,) = grads(terms["heads"][term], method.heads.w)
        first = a * (mean - M)
        second = a**2 * (mean**2 + std**2 - M**2 - TAU**2)
        close(w, [factor * first, factor * second])
        assert (w.abs().max() < 1e-12) == ((mean, std) == (M, TAU))
