"""Truth checks of methods with a discriminator, whose stand-in says the exact log-ratio of teacher to fake.

On Gaussians (score_checks) log r(x_t) = -(x_t - a M)^2 / 2P + (x_t - a mu)^2 / 2Q + log(Q / P) / 2: the optimal logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from onestroke.draws import Draws
from onestroke.method import Batch, Parts
from onestroke.paths import EDM, Estimate, Path
from onestroke.sampling import FewStep
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.truth import converge, ring
from truth.checks import F64, Affine, Free, Given, T, close, labels, parts, tensor
from truth.checks import turns_of as every_turn
from truth.score_checks import MU, TAU, M, S, at, gauss


class ExactCritic(torch.nn.Module):
    """The fake with the logit log p_t - log q_t (B, 1), times a gain that only its own turn may move."""

    def __init__(self, fake, teacher):
        super().__init__()
        self.fake, self.teacher, self.gain = fake, teacher, torch.nn.Parameter(tensor(1.0))

    def forward(self, x, t, cond):
        est = self.fake(x, t, cond)
        logit = self.teacher.net.log_prob(x, t, cond) - self.fake.net.log_prob(x, t, cond)
        return Estimate(est.x0, est.eps, (self.gain * logit[:, None],))


@dataclass(frozen=True)
class WithCritic(Parts):
    """Parts whose critic is the stand-in, whose logit is its one feature."""

    @property
    def bottleneck(self):
        return -1

    def critic(self, role):
        return ExactCritic(self.copy(role), self.teacher)


def gan_parts(path, teacher, student, fake, scale: float = 1.0, steps: int = 1) -> WithCritic:
    made = vars(parts(path, teacher, student, fake, scale))
    return WithCritic(**{**made, "few": FewStep(path, path.grid(steps))})


def log_ratio(xt, a, b):
    """(log r, its slope) per sample, summed over D, typed by hand."""
    p, q = a**2 * TAU**2 + b**2, a**2 * S**2 + b**2
    up, uq = xt - a * M, xt - a * MU
    p, q = torch.as_tensor(p, dtype=F64), torch.as_tensor(q, dtype=F64)
    return (-(up**2) / (2 * p) + uq**2 / (2 * q) + (q / p).log() / 2).sum(1), -up / p + uq / q


def turns_of(cls, path, count: int = 6, dim: int = 1, steps: int = 1, **options):
    """Both turns of one round with the student's law as the fake's: (terms and student's gradient, fake's, draws)."""
    noises = torch.randn(6, count, dim, generator=torch.Generator().manual_seed(21), dtype=F64)
    z, x0 = noises[0], M + TAU * torch.randn(count, dim, generator=torch.Generator().manual_seed(22), dtype=F64)
    student = Free(MU + S * z)
    method = cls(gan_parts(path, gauss(path, M, TAU, dim), student, gauss(path, MU, S, dim)), **options)
    with at(T):
        game = method.step(Batch(z, labels(count), Given(*noises[1:]), x0), 0)
        first = next(game)
        assert first.player == "student"
        grads = {}
        for name, term in first.terms.items():
            (grads[name],) = torch.autograd.grad(term, student.x, retain_graph=True)
        assert all(p.grad is None for p in method.fake.parameters())
        assert not any(p.requires_grad for p in method.fake.parameters())
        second = next(game)
    assert second.player == "fake"
    return student.x.detach(), x0, noises[1:], grads, second.terms, method


def student_gan_is_softplus(cls, path, a, b, weight: float, **options):
    """d/dx weight mean softplus(-log r(a x + b e)) = - weight sigmoid(-log r) a slope / B, on the second noise."""
    x, _, noises, grads, _, _ = turns_of(cls, path, dim=2, **options)
    logit, slope = log_ratio(a * x + b * noises[1], a, b)
    close(grads["gan"], -weight * torch.sigmoid(-logit)[:, None] * a * slope / len(x))


def fake_gan_is_softplus(cls, path, a, b, weight: float, **options):
    """weight (mean softplus(-log r(real)) + mean softplus(log r(fake))), each under noise of its own."""
    x, x0, noises, _, terms, method = turns_of(cls, path, dim=2, **options)
    real, fake = (log_ratio(a * y + b * e, a, b)[0] for y, e in ((x0, noises[3]), (x, noises[4])))
    close(terms["gan"], weight * (softplus(-real).mean() + softplus(fake).mean()))
    (gain,) = torch.autograd.grad(terms["gan"], method.fake.gain)
    close(gain[0], weight * ((fake * torch.sigmoid(fake)).mean() - (real * torch.sigmoid(-real)).mean()))


def steps_help(method: str, path: Path | None = None, rounds: int = 150, **settings) -> None:
    """On a ring without labels, which one step cannot cut apart, two steps end nearer to the truth than one does.

    rounds: for each step to learn.
    """
    teacher = ring(path or EDM(), labelled=False)
    settings = {"batch_size": 256, "seconds": 600, **settings}
    one, two = (converge(method, teacher, student_steps=k, steps=rounds * k, **settings) for k in (1, 2))
    assert two.sliced_w2 < 0.8 * one.sliced_w2
    assert two.sliced_w2 < 0.3 * two.start


# ---- what a divergence covers --------------------------------------------------------------------------------


class Following(torch.nn.Module):
    """The exact fake and discriminator of an Affine student as it now stands."""

    def __init__(self, student, teacher):
        super().__init__()
        self.laws, self.gain = [student, teacher], torch.nn.Parameter(tensor(1.0))

    def forward(self, x, t, cond):
        student, teacher = self.laws
        law = GaussianMixture(student.path, student.mu.detach()[None], student.s.detach().abs()[None])
        logit = teacher.log_prob(x, t, cond) - law.log_prob(x, t, cond)
        est = law(x, t, cond)
        return Estimate(self.gain * est.x0, est.eps, (logit[:, None],))


class Exact(WithCritic):
    def critic(self, role):
        return self.copy(role)


def covered(cls, term: str, divergence: str, rounds: int = 200, **options) -> int:
    """How many of a ring's eight modes a Gaussian on one of them comes to cover; a mode is covered by 2 % of it.

    term: of the student's turn, which alone it descends. Noise up to the ring's radius: under more of it, the ring is
    one mode to every divergence.
    """
    labelled = ring(EDM()).double()
    teacher = GaussianMixture(EDM(), labelled.means, labelled.std)
    student = Affine(EDM(), tensor(1.0, 0.0), tensor(0.1, 0.1))
    made = Exact(**vars(gan_parts(EDM(), teacher, student, Following(student, teacher))))
    method = cls(made, divergence=divergence, **options)
    optimiser = torch.optim.Adam(student.parameters(), 2e-2)
    for step in range(rounds):
        draw = Draws(0, step, 128)
        game = every_turn(method, Batch(draw.normal((2,)).double(), labels(128), draw), step)
        turn = next(game)
        optimiser.zero_grad()
        turn.terms[term].backward()
        optimiser.step()
    x = student.mu + student.s * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    return int((torch.bincount(teacher.nearest(x.detach()), minlength=8) > 400).sum())
