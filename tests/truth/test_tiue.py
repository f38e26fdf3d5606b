"""TiUE: an encoder that runs once, the noises that are taken off in turn, their law, and SwiftBrush with one step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from contract.build import PATHS, batch, build, settings_of, snapshot, trained
from onestroke import denoiser, terms
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.flow.tiue import TiUE
from onestroke.paths import PREDICTIONS
from onestroke.sampling import FewStep
from truth.checks import (
    F64,
    Affine,
    Given,
    T,
    at,
    close,
    hand_ab,
    labels,
    make_path,
    parts,
    tensor,
    turns_of,
    two_class_eps,
    two_classes,
)
from truth.test_mutants import broken

FOUR = {"student_steps": 4, "renoise": "implied"}


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---- the halves ------------------------------------------------------------------------------------------------------


def in_halves(module, name="flow", prediction="eps"):
    """Encoded at the first time alone, decoded at each, and each output read where the steps before it lead."""

    class Two(module.Halves):
        def encode(self, x, t, cond):
            return x, x * (1 + t[:, None])

        def decode(self, found, t, cond):
            return found[1] * (2 + t[:, None]) + cond["label"][:, None], ()

    times, x, label = (0.9, 0.5, 0.2), randn(5, 2), torch.arange(5)
    est = Two(make_path(name, prediction), prediction)(x, tensor(*times).expand(5, 3), {"label": label})
    state = x
    for k, t in enumerate(times):
        (a, b), out = hand_ab(name, t), x * (1 + times[0]) * (2 + t) + label[:, None]
        eps = out if prediction == "eps" else b * state + a * out  # of v
        x0 = (state - b * eps) / a
        close(est.eps[:, k], eps)
        close(est.x0[:, k], x0)
        c, d = hand_ab(name, times[k + 1]) if k + 1 < len(times) else (1.0, 0.0)
        state = c * x0 + d * eps


def test_one_encoder_serves_all_times():
    in_halves(denoiser)
    in_halves(denoiser, "vp", "v")


@pytest.mark.parametrize(("path", "prediction"), [(p, o) for p in PATHS for o in PREDICTIONS])
def test_one_time_is_the_whole_network(path, prediction):
    """Bit for bit."""
    net = build("tiue", path, prediction).student
    few, x, cond = FewStep(net.path, net.path.grid(1)), randn(6, 2), {"label": torch.arange(6) % 3}
    est, whole = few.estimates(net, x, cond), net(few.input(x), few.time(0, x), cond)
    assert torch.equal(est.x0[:, 0], whole.x0)
    assert torch.equal(est.eps[:, 0], whole.eps)
    assert torch.equal(replace(few, encoder="once").sample(net, x, cond), few.sample(net, x, cond))


# ---- the law of the noises -------------------------------------------------------------------------------------------


def noise_law(module):
    """The divergence of torch's own normal laws, zero for mean 0 and variance 1 alone, and its gradient."""
    x = (3 * randn(4, 2, 5, 3) + tensor(0.0, 1.0, -2.0, 0.1)[:, None, None, None]).requires_grad_(True)
    rows = x.detach().flatten(1)
    found, mean, std = module.from_normal(x), rows.mean(1), rows.std(1)
    close(found, kl_divergence(Normal(mean, std), Normal(tensor(0.0), tensor(1.0))))
    found.sum().backward()
    mean, var = mean[:, None], std[:, None] ** 2
    close(x.grad.flatten(1), mean / 30 + (rows - mean) * (1 - 1 / var) / 29)
    unit = (rows - mean) / std[:, None]
    close(module.from_normal(unit), torch.zeros(4))
    assert (module.from_normal(1.01 * unit) > 1e-5).all()
    assert (module.from_normal(unit + 0.01) > 1e-5).all()


def test_the_law_of_the_noises():
    noise_law(terms)


# ---- the student's turn ----------------------------------------------------------------------------------------------


class Noises(denoiser.Halves):
    """A student that predicts its parameter (B, K, D), whatever it is given."""

    def __init__(self, path, eps):
        super().__init__(path, "eps")
        self.eps = torch.nn.Parameter(eps.clone())

    def encode(self, x, t, cond):
        return (x,)

    def decode(self, found, t, cond):
        return self.eps.flatten(0, 1), ()


LAWS = (0.9, 0.5), (0.6, 0.8)
"""Shift and deviation of the two classes, of the teacher and of the fake."""


def closed(cls, name="vp", kappa=3.0):
    """With r = b / a and r = 0 at the data, x0 = x_T / a_T - sum of (r_k - r_k+1) eps_k; so the gradient of each noise
    is -(r_k - r_k+1) b^2 (eps_p - eps_q) / B D, both guided, and that of its law."""
    path, count = make_path(name, "eps"), 6
    z, e, noises = randn(count, 2, seed=2), randn(count, 2, seed=3), 0.3 + 1.5 * randn(count, 3, 2, seed=4)
    teacher, fake = (Each(two_classes(path, *law)) for law in LAWS)
    few = FewStep(path, path.grid(3), renoise="implied")
    method = cls(replace(parts(path, teacher, Noises(path, noises), fake, kappa), few=few))
    with at(T):
        turn = next(method.step(Batch(z, labels(count, 0), Given(e)), 0))
    sum(turn.terms.values()).backward()

    a, b = zip(*(hand_ab(name, t) for t in few.times), strict=True)
    drop = [b[k] / a[k] - (b[k + 1] / a[k + 1] if k < 2 else 0.0) for k in range(3)]
    x0 = z * (a[0] ** 2 + b[0] ** 2) ** 0.5 / a[0] - sum(d * noises[:, k] for k, d in enumerate(drop))
    a, b = hand_ab(name)
    xt = a * x0 + b * e
    real, fake = (
        (1 - kappa) * two_class_eps(xt, a, b, *law, -1) + kappa * two_class_eps(xt, a, b, *law, 0) for law in LAWS
    )
    slope = b**2 / (a**2 + b**2) * (real - fake) / (count * 2)
    mean, var = noises.mean(2, keepdim=True), noises.var(2, keepdim=True)
    law = 0.8 / count * (mean / 2 + (noises - mean) * (1 - 1 / var))
    close(method.student.eps.grad, law - torch.stack([d * slope for d in drop], 1), rtol=1e-8)


class Each(torch.nn.Module):
    """A denoiser of one dimension, in each of several: a sample of one number has no variance."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, cond):
        sides = [self.net(x[:, i : i + 1], t, cond) for i in range(x.shape[1])]
        return sides[0]._replace(x0=torch.cat([s.x0 for s in sides], 1), eps=torch.cat([s.eps for s in sides], 1))


def test_the_gradient_of_each_noise():
    closed(TiUE)
    closed(TiUE, "flow")


def one_step_is_swiftbrush(cls, name="vp"):
    """Bit for bit in both turns, but for the law of its noise."""
    theirs = build("swiftbrush", name)
    ours = cls(parts(theirs.path, theirs.teacher, theirs.student, theirs.fake, 2.0))
    for step in range(12):  # among them a null round
        for one, other in zip(*(turns_of(m, batch(name, step=step), step) for m in (ours, theirs)), strict=True):
            assert one.player == other.player
            assert all(torch.equal(one.terms[k], v) for k, v in other.terms.items())
            if one.player == "student":
                z, cond = batch(name, step=step).noise, batch(name, step=step).cond
                eps = ours.student(ours.few.input(z), ours.few.time(0, z), cond).eps
                close(one.terms["kl"], 0.8 * terms.from_normal(eps).mean())


def test_one_step_is_swiftbrush():
    for name in ("vp", "edm", "flow"):
        one_step_is_swiftbrush(TiUE, name)


def test_accumulation_is_exact_with_four_steps():
    sizes = {"batch_size": 32}, {"batch_size": 8, "accumulate": 4}
    whole, split = (snapshot(trained("tiue", rounds=3, **FOUR, **size)) for size in sizes)
    assert all(torch.allclose(split[k], v, rtol=1e-10, atol=1e-10) for k, v in whole.items())


def test_fake_at_the_teacher_is_no_direction():
    """Where the scores agree, the law of the noises alone is left."""
    method = build("tiue", settings=settings_of(**FOUR))
    method.fake = method.teacher
    turn = next(turns_of(method, batch()))
    assert turn.terms["vsd"] == 0
    assert turn.terms["kl"] > 0


def test_what_has_no_encoder_or_other_steps_is_refused():
    path = make_path("vp")
    student = build("tiue").student
    made = parts(path, student, Affine(path, tensor(0.0), tensor(1.0)), student)
    with pytest.raises(InputError, match="and Affine has none; take a teacher with a UNet"):
        TiUE(made)
    with pytest.raises(InputError, match="needs renoise=implied, not 'fresh'"):
        TiUE(replace(made, student=student, few=FewStep(path, path.grid(2))))


# ---- mutants ---------------------------------------------------------------------------------------------------------

MUTANTS = [
    ("TIUE", "est.x0[:, -1]", "est.x0[:, 0]", closed),
    ("TIUE", "self.vsd(x, batch)", "-self.vsd(x, batch)", closed),
    ("TIUE", "sigma_power: float = 2.0", "sigma_power: float = 1.0", closed),
    ("TIUE", "guide_fake: bool = True", "guide_fake: bool = False", closed),
    ("TIUE", "est.eps.unbind(1)", "est.x0.unbind(1)", closed),
    ("TIUE", "est.eps.unbind(1)", "est.eps.detach().unbind(1)", closed),
    ("TIUE", "kl_weight: float = 0.8", "kl_weight: float = 0.1", closed),
    ("TIUE", "x.detach(), batch", "x.detach() * 2, batch", one_step_is_swiftbrush),
    ("TIUE", "null_rate: float = 0.1", "null_rate: float = 1.0", one_step_is_swiftbrush),
    ("TIUE", "alpha_power: float = 2.0", "alpha_power: float = 1.0", one_step_is_swiftbrush),
    ("onestroke.denoiser", "self.encode(x, t[:, 0], cond)", "self.encode(x, t[:, -1], cond)", in_halves),
    ("onestroke.denoiser", "v.repeat_interleave(count, 0) for v in", "v.repeat(count, 1) for v in", in_halves),
    ("onestroke.denoiser", "ests[-1].eps, t[:, k])", "ests[0].eps, t[:, k])", in_halves),
    ("onestroke.denoiser", "ests[-1].eps, t[:, k])", "ests[-1].eps, t[:, k - 1])", in_halves),
    ("onestroke.terms", "rows.var(1)", "rows.var(1, correction=0)", noise_law),
    ("onestroke.terms", "+ var - 1 - var.log()", "+ var - 1 - 2 * var.log()", noise_law),
    ("onestroke.terms", "mean.square() + var", "mean + var", noise_law),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS)
def test_mutants_are_killed(module, old, new, check):
    def run(text):
        found = broken(TiUE.__module__ if module == "TIUE" else module, old, text)
        check(found.TiUE if module == "TIUE" else found)

    run(old)
    with pytest.raises(AssertionError):
        run(new)
