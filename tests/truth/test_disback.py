"""DisBack: what it records, what it leads back along, and that everything else is the method it leads."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from contract.build import build, data, mixture, settings_of, small_net, snapshot
from contract.test_methods import assert_same
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Batch, play
from onestroke.methods import get_method
from onestroke.methods.score.disback import DisBack
from onestroke.paths import EDM, Estimate
from onestroke.training.train import Trainer
from truth import checks
from truth.checks import F64, labels, tensor
from truth.score_checks import MU, TAU, M, S
from truth.test_mutants import broken


class Law(torch.nn.Module):
    """The exact denoiser of N(m, s^2), whose m and log s are trained: a degraded teacher is again a Gaussian."""

    def __init__(self, path, m, s):
        super().__init__()
        self.path, self.m, self.log = path, torch.nn.Parameter(tensor(m)), torch.nn.Parameter(tensor(s).log())

    def forward(self, x, t, cond):
        a, b = (c[:, None] for c in self.path.ab(t))
        s = self.log.exp()
        x0 = self.m + a * s**2 / (a**2 * s**2 + b**2) * (x - a * self.m)
        return Estimate(x0, (x - a * x0) / b)


PRELUDE, RECORD, INTERVAL = 60, 15, 2


def game(cls, base="swiftbrush", rounds=PRELUDE):
    """A student N(MU, S^2), a teacher N(M, TAU^2) and a fake that starts as the teacher, after `rounds`."""
    path = EDM()
    student, teacher = checks.Affine(path, tensor(MU), tensor(S)), Law(path, M, TAU).requires_grad_(False)
    parts = checks.parts(path, teacher, student, Law(path, M, TAU))
    method = cls(parts, prelude=PRELUDE, record=RECORD, interval=INTERVAL, base=base)
    optimisers = {p: torch.optim.Adam(getattr(method, p).parameters(), 0.008, (0.5, 0.99)) for p in method.players}
    laws = []

    def update(player):
        optimisers[player].step()
        method.zero_grad()
        laws.append((player, [p.item() for p in method.fake.parameters()]))

    for step in range(rounds):
        play(method, [one_batch(step)], step, update)
    return method, laws


def one_batch(step, size=64):
    z = torch.randn(size, 1, generator=torch.Generator().manual_seed(step), dtype=F64)
    return Batch(z, labels(size), Draws(0, step, size))


def recording(cls):
    """The student does not move; every RECORD rounds the fake is kept as it is after its update."""
    method, laws = game(cls)
    assert [player for player, _ in laws] == ["fake"] * PRELUDE
    assert method.student.mu.item() == MU
    assert method.student.s.item() == S
    assert method.trail.tolist() == [law for _, law in laws[RECORD - 1 :: RECORD]]


def test_the_prelude_records_the_fake_and_leaves_the_student():
    recording(DisBack)


@pytest.mark.parametrize("base", ["swiftbrush", "sid", "sim", "sid-lsg"])
def test_the_records_lead_from_the_teacher_to_the_student(base):
    """Sheet 20, item 7: the path's Gaussians move from the teacher to the student, and the last is nearer to the fake
    than the teacher is, for every method that is led."""
    method, _ = game(DisBack, base)
    means, stds = [M, *method.trail[:, 0].tolist()], [TAU, *method.trail[:, 1].exp().tolist()]
    assert all(two > one for one, two in pairwise(means))
    assert stds[-1] < TAU
    x, t = torch.linspace(-2, 3, 50, dtype=F64)[:, None], torch.full((50,), 0.5, dtype=F64)
    fake = method.fake(x, t, labels(50)).eps
    gaps = [(method.teacher_at(PRELUDE + i * INTERVAL)(x, t, labels(50)).eps - fake).norm().item() for i in range(5)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 0.5 * gaps[-1]


def backtracking(cls):
    """Each record in turn, from the last, then the teacher: the student's turn is the base's against that network."""
    method, _ = game(cls)
    fake = [p.detach().clone() for p in method.fake.parameters()]
    for step in range(PRELUDE, PRELUDE + 10):
        number = 3 - (step - PRELUDE) // INTERVAL
        m, log = method.trail[number].tolist() if number >= 0 else (M, tensor(TAU).log().item())
        path, found = EDM(), []
        real = Law(path, m, tensor(log).exp().item()).requires_grad_(False)
        student, same_fake = checks.Affine(path, tensor(MU), tensor(S)), Law(path, M, TAU)
        for p, value in zip(same_fake.parameters(), fake, strict=True):
            p.data.copy_(value)
        base = get_method("swiftbrush")(checks.parts(path, real, student, same_fake))
        for one in (method, base):
            one.zero_grad()
            turns = one.step(one_batch(step), step)
            sum(next(turns).terms.values()).backward()
            found.append(torch.cat([one.student.mu.grad, one.student.s.grad]))
        checks.close(*found)
        assert ((found[0] == 0) == (number == 3)).all()  # the last record is the fake itself


def test_the_way_back_is_the_base_method_against_each_record():
    backtracking(DisBack)


def test_without_records_it_is_the_method_it_leads():
    """The same bits, round by round, for every base of a student and a fake."""
    for base in ("swiftbrush", "sid", "sim"):
        found = []
        for name, options in (("disback", {"base": base}), (base, {})):
            settings = settings_of()
            trainer = Trainer(build(name, settings=settings, **options), data(), settings)
            for _ in range(3):
                trainer.one_round(0.0)
            found.append(snapshot(trainer))
        assert_same(*found)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"lora_rank": {"*": 2}, "lora_targets": ["enter"]}])
def test_stop_and_resume_on_the_way_is_bit_equal(changes, tmp_path):
    """Stopped while recording and while going back; adapters alone are recorded where the fake has them."""
    settings = settings_of(steps=8, **changes)

    def trainer(stop):
        method = build("disback", settings=settings, prelude=4, record=2, interval=1)
        one = Trainer(method, data(), settings, tmp_path / "run")
        if one.latest():
            one.resume()
        while one.round < stop:
            one.one_round(one.round / 8)
        return one

    for stop in (3, 5, 8):
        stopped = trainer(stop)
        stopped.save()
    (tmp_path / "run").rename(tmp_path / "done")
    straight = trainer(8)
    assert_same(snapshot(stopped), snapshot(straight))
    assert torch.equal(stopped.method.trail, straight.method.trail)
    assert len(straight.method.trail) == 2
    assert not torch.equal(*straight.method.trail)
    live = sum(p.numel() for p in straight.method.fake.parameters() if p.requires_grad)
    assert straight.method.trail.shape[1] == live


def test_only_a_student_and_a_fake_can_be_led():
    path = EDM()
    parts = checks.parts(path, mixture(path), small_net(path, "x0", "s"), small_net(path, "x0", "f"))
    with pytest.raises(InputError, match="disback cannot lead 'disback'"):
        DisBack(parts, base="disback")


MUTANTS = [
    ("(step + 1) % self.record == 0", "step % self.record == 0", recording),
    ('found.player == "student"', 'found.player == "fake"', recording),
    ("len(self.trail) - 1 - max(step", "max(step", backtracking),
    ("max(step - self.prelude, 0) // self.interval", "max(step, 0) // self.interval", backtracking),
    ("self.teacher_at(step)\n", "self.teacher\n", backtracking),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken("onestroke.methods.score.disback", old, old).DisBack)
    with pytest.raises(AssertionError):
        check(broken("onestroke.methods.score.disback", old, new).DisBack)
