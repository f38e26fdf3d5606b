"""Flash-DMD: every step of the student has one of DMD2's two losses, and it is DMD2's."""

from __future__ import annotations

import pytest
import torch

from contract.build import batch as small_batch
from contract.build import build
from contract.build import reward as small_reward
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.distribution.dmd2 import DMD2
from onestroke.methods.distribution.flash_dmd import FlashDMD
from onestroke.run import plan_run
from truth import gan_checks, score_checks, vector_checks
from truth.checks import F64, Free, Given, close, hand_ab, labels, make_path
from truth.score_checks import MU, TAU, M, S, at, gauss
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)
OLD = {"gan_weight": 0.1, "critic_weight": 0.1, "ttur": 2}
"""The defaults, as options of DMD2."""


def turn_of(cls, name, k, **options):
    """The student's terms and their gradients at each sample, of call number k of four."""
    path = make_path(name)
    z, *noises = torch.randn(7, 6, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    student, teacher = Free(MU + S * z), gauss(path, M, TAU, 2)
    method = cls(gan_checks.gan_parts(path, teacher, student, gauss(path, MU, S, 2), steps=4), **options)
    method.reward = small_reward
    with at(score_checks.T):
        turn = next(method.step(Batch(z, labels(6), Given(*noises, shared=(k + 0.5) / 4), z), 0))
        grads = {key: torch.autograd.grad(v, student.x, retain_graph=True)[0] for key, v in turn.terms.items()}
    return turn.terms, grads, student.x.detach(), noises


def closed(cls, name="edm"):
    vector_checks.is_the_closed_form(without_gan(cls), make_path(name), *hand_ab(name))


def split(cls, name="vp"):
    """Times 1, 3/4, 1/2 and 1/4: the first two match, the others play; and as DMD2 does it with that part alone."""
    for k in range(4):
        found, grads, *_ = turn_of(cls, name, k)
        (key,) = found
        assert key == ("dm" if k < 2 else "gan")
        if key == "dm":
            _, old, *_ = turn_of(DMD2, name, k, **{**OLD, "gan_weight": 0.0})
            close(grads["dm"], old["dm"])
        assert (grads[key] != 0).all()


def game(cls, name="vp"):
    """At the last step, d/dx of 0.1 mean softplus(-log r), by hand."""
    a, b = hand_ab(name)
    _, grads, x, noises = turn_of(cls, name, 3)
    logit, slope = gan_checks.log_ratio(a * x + b * noises[3], a, b)
    close(grads["gan"], -0.1 / 6 * torch.sigmoid(-logit)[:, None] * a * slope)


def rewarded(cls, name="vp"):
    """A second stage adds minus the reward in every step, and changes nothing else."""
    for k in (0, 3):
        found, grads, x, _ = turn_of(cls, name, k, reward_weight=0.3)
        _, plain, *_ = turn_of(cls, name, k)
        (key,) = plain
        close(grads[key], plain[key])
        to = torch.stack([torch.tensor(-1).cos(), torch.tensor(-1).sin()])[None]
        close(found["reward"], 0.3 * ((x - to).square().sum(1) / 2).mean())
        close(grads["reward"], 0.3 / 6 * (x - to))


@each
@pytest.mark.parametrize("check", [closed, split, game, rewarded])
def test_the_turns_are_the_closed_forms(check, name):
    check(FlashDMD, name)


@each
def test_nothing_moves_when_the_fake_has_the_teachers_law(name):
    for shift in (0.0, -0.2):
        score_checks.zero_at_the_truth(without_gan(FlashDMD), make_path(name), 1.0, shift)


def without_gan(cls):
    """One step has no GAN in the student's turn; here it has no head either, since exact networks have no layers."""
    return lambda parts, **options: cls(parts, gan_weight=0.0, **options)


def test_one_step_is_dmd2_without_a_gan_bit_for_bit():
    """With its own head to train, which the student does not see."""
    found = []
    for name, options in (("flash-dmd", {}), ("dmd2", {**OLD, "gan_weight": 0.0})):
        method = build(name, **options)
        sum(next(method.step(small_batch(), 0)).terms.values()).backward()
        found.append([p.grad for p in method.student.parameters()])
    assert all(torch.equal(one, two) and one.any() for one, two in zip(*found, strict=True))


def test_what_it_needs():
    with pytest.raises(InputError, match="the GAN alone; set gan_weight above 0"):
        plan_run("a", "flash-dmd", ["a cat"], {"gan_weight": 0.0})
    assert FlashDMD.needs_of({"gan_weight": 0.1, "reward_weight": 1.0}) == {"x0", "reward"}
    assert FlashDMD.needs_of({"gan_weight": 0.1, "reward_weight": 0.0}) == {"x0"}


SOURCE = "onestroke.methods.distribution.flash_dmd"
MUTANTS = [
    ("> self.threshold", ">= self.threshold", split),
    ("> self.threshold", "< self.threshold", split),
    ("threshold: float = 0.5", "threshold: float = 0.2", split),
    ("gan_weight: float = 0.1", "gan_weight: float = 0.2", game),
    ("terms.gan_student(self", "terms.gan_student(-self", game),
    ("-self.reward_weight", "self.reward_weight", rewarded),
    ('loss["reward"] = ', 'loss = {**loss, "dm": 0 * x.sum()}; loss["reward"] = ', rewarded),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).FlashDMD)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new).FlashDMD)
