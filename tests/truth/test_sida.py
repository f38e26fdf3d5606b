"""SiDA against the sheet's closed forms: SiD at alpha = 1, and the GAN on the channel mean of the fake's bottleneck."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from contract.build import batch as small_batch
from contract.build import build
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.score.sida import SiDA
from onestroke.paths import Estimate
from onestroke.run import plan_run
from truth import score_checks
from truth.checks import F64, Free, Given, T, close, hand_ab, labels, make_path
from truth.gan_checks import ExactCritic, gan_parts, log_ratio
from truth.score_checks import MU, TAU, M, S, at, gauss, posterior
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", score_checks.PATHS)


def channels(cls, name="vp"):
    """The logit of a place is the mean of its channels."""
    feature = torch.arange(24, dtype=F64).reshape(2, 3, 2, 2)
    method = build("sida", guidance=1.0)
    method.__class__ = cls
    got = method.logits(Estimate(torch.zeros(2, 1), torch.zeros(2, 1), (feature,)))
    close(got, [[4.0, 5.0, 6.0, 7.0], [16.0, 17.0, 18.0, 19.0]])


def game_of(cls, name, dim, step=0, **options):
    """(x, real images, noises, game, method, student) on Gaussians, with the exact log-ratio as the logit."""
    path = make_path(name)
    noises = torch.randn(4, 6, dim, generator=torch.Generator().manual_seed(41), dtype=F64)
    x0 = M + TAU * torch.randn(6, dim, generator=torch.Generator().manual_seed(42), dtype=F64)
    teacher, student = gauss(path, M, TAU, dim), Free(MU + S * noises[0])
    fake = ExactCritic(gauss(path, MU, S, dim), teacher)
    method = cls(gan_parts(path, teacher, student, fake), **{"prelude": 0, "gan_from": 0, **options})
    return student.x, x0, noises, method.step(Batch(noises[0], labels(6), Given(*noises[1:]), x0), step), method


def student(cls, name="vp"):
    """Half of 100 SiD and half of 0.01 D softplus(-logit) at the same x_t, both over omega, not differentiated;
    gradient flows through teacher, fake and logit into x alone."""
    (a, b), dim = hand_ab(name), 3
    x, _, noises, game, method = game_of(cls, name, dim)
    with at(T):
        turn = next(game)
        assert turn.player == "student"
        sid, gan = (torch.autograd.grad(turn.terms[k], x, retain_graph=True)[0] for k in ("sid", "gan"))
        assert all(p.grad is None and not p.requires_grad for p in method.fake.parameters())
    real, d_real, fake, d_fake = posterior(x.detach(), noises[1], a, b)
    gap, d_gap, omega = real - fake, d_real - d_fake, (x - real).abs().mean(1, keepdim=True)
    close(sid, 50 / 6 * (d_gap * (fake - x) + gap * (d_fake - 1)) / omega)
    logit, slope = log_ratio(a * x + b * noises[1], a, b)
    close(gan, -0.005 * dim / 6 * torch.sigmoid(-logit)[:, None] * a * slope / omega)


def fake(cls, name="vp"):
    """The EDM weight on the squared error of fresh samples, and half of it on both logits, under one noise."""
    (a, b), dim = hand_ab(name), 2
    x, x0, noises, game, method = game_of(cls, name, dim)
    with at(T):
        next(game)
        turn = next(game)
    assert turn.player == "fake"
    weight = (b**2 / a**2 + 0.25) / (0.5 * b / a) ** 2
    est = posterior(x.detach(), noises[3], a, b)[2]
    close(turn.terms["dsm"], weight * (est - x).square().sum(1).mean())
    real, mine = (log_ratio(a * y + b * noises[3], a, b)[0] for y in (x0, x.detach()))
    close(turn.terms["gan"], weight * 0.5 * (softplus(-real).mean() + softplus(mine).mean()))
    assert torch.autograd.grad(turn.terms["gan"], method.fake.gain)[0] != 0


def schedule(cls, name="vp"):
    """Nothing, then SiD whole, then both halves; the discriminator learns from the first round on."""
    played = {}
    for step in (0, 1, 2, 3, 4, 5):
        _, _, _, game, _ = game_of(cls, name, 2, step, prelude=2, gan_from=4)
        with at(T):
            turns = list(game)
        played[step] = [turn.player for turn in turns], turns[0].terms
        assert set(turns[-1].terms) == {"dsm", "gan"}
    assert [played[step][0] for step in (0, 1)] == [["fake"]] * 2
    assert [played[step][0] for step in (2, 3, 4, 5)] == [["student", "fake"]] * 4
    assert [set(played[step][1]) for step in (3, 4)] == [{"sid"}, {"sid", "gan"}]
    close(played[3][1]["sid"], 2 * played[4][1]["sid"])


@each
@pytest.mark.parametrize("check", [student, fake, schedule])
def test_the_turns_are_the_closed_forms(check, name):
    check(SiDA, name)


def test_logits_are_channel_means():
    channels(SiDA)


def test_without_its_gan_it_is_sid_at_alpha_one():
    """Bit for bit, in both turns; and then prompts are enough."""
    found = []
    for name, options in (("sida", {"gan_weight": 0.0}), ("sid", {"alpha": 1.0})):
        grads, method = [], build(name, **options)
        for turn in method.step(small_batch(), 0):
            sum(turn.terms.values()).backward()
            grads += [p.grad for p in getattr(method, turn.player).parameters()]
        found.append(grads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    plan_run("a", "sida", ["a cat"], {"gan_weight": 0.0})
    with pytest.raises(InputError, match="'sida' needs real images"):
        plan_run("a", "sida", ["a cat"], {})


SOURCE = "onestroke.methods.score.sida"
MUTANTS = [
    (".mean(1).reshape(", ".amax(1).reshape(", channels),
    ("alpha: float = 1.0", "alpha: float = 1.2", student),
    ("gan_weight: float = 0.01", "gan_weight: float = 0.02", student),
    ('{"sid": 0.5 * loss["sid"],', '{"sid": loss["sid"],', student),
    ("self.gan_weight * x[0].numel()", "self.gan_weight", student),
    ("clamp(-10, 10), weight=weight)", "clamp(-10, 10))", student),
    ("with frozen(self.teacher, self.fake)", "with frozen(self.teacher)", student),
    ("0.5 * self.critic_weight", "self.critic_weight", fake),
    ("critic_weight: float = 1.0", "critic_weight: float = 0.5", fake),
    ("self.logits(est), weight=weight)", "self.logits(est))", fake),
    ("mix(batch.x0, eps, t)", "mix(batch.x0, -eps, t)", fake),
    ("terms.gan_critic(real, self.logits(est)", "terms.gan_critic(self.logits(est), real", fake),
    ("step >= self.prelude", "step > self.prelude", schedule),
    ("step >= self.gan_from", "step > self.gan_from", schedule),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old).SiDA)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new).SiDA)
