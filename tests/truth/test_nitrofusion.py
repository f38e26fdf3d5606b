"""NitroFusion: hand-typed GAN gradients on exact Gaussians, and the pool: who judges, who rests, who begins anew."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from contract.build import build, data, settings_of
from onestroke.draws import Draws
from onestroke.heads import Head, Pool
from onestroke.method import Parts
from onestroke.methods.adversarial import nitrofusion
from onestroke.methods.adversarial.nitrofusion import NitroFusion
from onestroke.training.train import Trainer
from truth import adversarial_checks as checks
from truth.checks import T, hand_ab, make_path
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", ["vp", "edm", "flow"])


def at_one_level(cls):
    return partial(cls, levels=(T,), copies=1)


@each
def test_the_student_descends_the_logit_of_its_noised_sample(name):
    checks.student_descends_the_logit(at_one_level(NitroFusion), make_path(name), *hand_ab(name))


@each
def test_the_heads_descend_the_hinge(name):
    checks.heads_descend_the_hinge(at_one_level(NitroFusion), make_path(name), *hand_ab(name))


@each
@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_the_fixed_point_is_the_first_two_moments(name, loss):
    checks.fixed_point_is_the_first_two_moments(at_one_level(NitroFusion), make_path(name), *hand_ab(name), loss)


# ---- who judges ----------------------------------------------------------------------------------------------------


def test_a_call_uses_the_named_head_of_each_layer():
    pool = Pool([3, 5], 4)
    assert (pool.layers, len(pool)) == (2, 8)
    features = torch.randn(2, 3, 6), torch.randn(2, 5, 2, 2)
    want = torch.cat([pool.heads[2](features[0]), pool.heads[7](features[1])], 1)
    assert torch.equal(pool(features, [1, 3]), want)
    pool(features, [1, 3]).sum().backward()
    assert {int(k.split(".")[1]) for k, p in pool.named_parameters() if p.grad is not None} == {2, 7}


def traced(module, **options):
    """The method on small nets; rows of every call of the pool, times of every call of the teacher."""
    small, null = build("nitrofusion"), {"label": torch.tensor([-1])}
    parts = Parts(small.teacher, small.student, lambda role: None, small.few, null, 1.0, (2,))
    method, rows, times = module.NitroFusion(parts, **options), [], []
    method.heads.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[1])))
    method.teacher.register_forward_pre_hook(lambda _, args: times.append(set(args[1].tolist())))
    return method, rows, times


def everyone_judges(module):
    """One level a round, the same in all its calls; one of the level's twelve heads; all of them as often."""
    method, rows, times = traced(module)
    count = Counter()
    for step in range(240):
        del rows[:], times[:]
        list(method.step(data().batch(Draws(0, step, 2), torch.device("cpu")), step))
        assert len(set(rows)) == 1
        assert len(rows) == 3
        (time,) = times[0]
        assert times == [{time}] * 3
        ((row,),) = set(rows)
        assert time == (0.01, 0.25, 0.5, 0.75)[row // 12]
        count[row] += 1
    expected = 240 / 48  # 82.7: the chi-square of 47 degrees of freedom is above it once in a thousand
    assert sum((n - expected) ** 2 / expected for n in (count[k] for k in range(48))) < 82.7


def test_every_head_judges_as_often_at_its_level():
    everyone_judges(nitrofusion)


# ---- who begins anew -----------------------------------------------------------------------------------------------


def one_in_a_hundred(module):
    """0.48 of 48 heads a round on average: none or one; every one as often. Five deviations of 1500 rounds."""
    method, count, sizes = traced(module)[0], Counter(), Counter()
    for step in range(1500):
        fresh = method.renewed(Draws(0, step, 2))
        heads = {int(name.split(".")[1]) for name in fresh}
        sizes[len(heads)] += 1
        count.update(heads)
    assert set(sizes) == {0, 1}
    assert sizes[1] / 1500 == pytest.approx(0.48, abs=5 * (0.48 * 0.52 / 1500) ** 0.5)
    assert set(count) == set(range(48))
    expected = sizes[1] / 48
    assert sum((n - expected) ** 2 / expected for n in count.values()) < 82.7


def test_one_head_in_a_hundred_begins_anew():
    one_in_a_hundred(nitrofusion)


def test_a_fresh_head_is_a_new_head():
    """By the numbers of its own share, whatever the global generator, which stays where it was."""
    pool = Pool([3, 5], 2)
    before = torch.get_rng_state()
    one = pool.fresh(3, 0.25)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2**30)
    new = Head(5).state_dict()
    assert {k.removeprefix("heads.3."): v for k, v in one.items()}.keys() == new.keys()
    assert all(torch.equal(one[f"heads.3.{k}"], v) for k, v in new.items())
    assert not torch.equal(pool.fresh(3, 0.75)["heads.3.body.0.weight"], one["heads.3.body.0.weight"])


def state_of(trainer):
    """Weights and optimiser state per head."""
    found: dict[int, dict] = {}
    weights = {k: v.detach().clone() for k, v in trainer.bare("heads").named_parameters()}
    for key, value in {**weights, **{k: v.clone() for k, v in trainer.moments("heads").items()}}.items():
        found.setdefault(int(key.split(".")[1]), {})[key] = value
    return found


def assert_same(one, two):
    return all(torch.equal(v, two[k]) for k, v in one.items())


def the_others_rest(module, accumulate=1):
    """Under AdamW with weight decay and momentum: bitwise. Fresh heads hold their new values and no memory."""
    settings = settings_of(batch_size=4, accumulate=accumulate)
    method, rows, _ = traced(module, copies=2, refresh=0.15)
    turns, step = [], method.step

    def watched(batch, number):
        for turn in step(batch, number):
            turns.append(turn)
            yield turn

    method.step = watched
    trainer, renewed, trained = Trainer(method, data(), settings), set(), set()
    for _ in range(12):
        before = state_of(trainer)
        del rows[:], turns[:]
        trainer.one_round(0.0)
        after, (row,) = state_of(trainer), rows[0]
        fresh = turns[-1].fresh
        began = {int(name.split(".")[1]) for name in fresh}
        assert {k for k in after if not assert_same(before[k], after[k])} == {row} | began
        for name, value in fresh.items():
            assert torch.equal(after[int(name.split(".")[1])][name], value.double())
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                assert not after[int(name.split(".")[1])][f"{name}.{kind}"].any()
        renewed |= began & trained
        trained |= {row}
    assert renewed, "no head that had learnt began anew: the check saw nothing"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_others_rest_to_the_bit(accumulate):
    the_others_rest(nitrofusion, accumulate)


# ---- do the checks notice? -----------------------------------------------------------------------------------------


def student(module):
    checks.student_descends_the_logit(at_one_level(module.NitroFusion), make_path("vp"), *hand_ab("vp"))


def heads(module):
    checks.heads_descend_the_hinge(at_one_level(module.NitroFusion), make_path("vp"), *hand_ab("vp"))


MUTANTS = [
    ("terms.gan_student(self", "-terms.gan_student(self", student),
    ("with frozen(self.teacher, self.heads)", "with frozen(self.teacher)", student),
    ("self.judge(x.detach(),", "self.judge(x,", heads),
    ('loss: str = "hinge"', 'loss: str = "softplus"', heads),
    ("copies: int = 12", "copies: int = 10", everyone_judges),
    ("(0.01, 0.25, 0.5, 0.75)", "(0.01, 0.25, 0.5, 0.7)", everyone_judges),
    ("level * self.copies + int", "level + int", everyone_judges),
    ("refresh: float = 0.01", "refresh: float = 0.02", one_in_a_hundred),
    ("self.size + draw.shared())", "self.size)", one_in_a_hundred),
    (".sample(range(self.size), count)", ".sample(range(12), count)", one_in_a_hundred),
    (", self.renewed(draw))", ")", the_others_rest),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(nitrofusion.__name__, old, old))
    with pytest.raises(AssertionError):
        check(broken(nitrofusion.__name__, old, new))
