"""What every method promises. A later method joins this table by existing."""

from __future__ import annotations

import inspect
import re
from collections import Counter

import pytest
import torch

from contract.build import (
    PATHS,
    Layered,
    at_once,
    batch,
    build,
    data,
    mixture,
    settings_of,
    small_net,
    snapshot,
    state,
    trained,
)
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import NEEDS, Method, Parts, frozen, play
from onestroke.methods import METHODS, describe, get_method, options
from onestroke.paths import PREDICTIONS
from onestroke.sampling import FewStep
from onestroke.settings import Settings
from onestroke.training.train import Trainer
from onestroke.truth import Net, inside
from truth.checks import turns_of

every = pytest.mark.parametrize("name", METHODS)
table = pytest.mark.parametrize(
    ("name", "path", "prediction"), [(m, p, o) for m in METHODS for p in PATHS for o in PREDICTIONS]
)


def roles(method: Method) -> dict[str, torch.nn.Module]:
    return dict(method.named_children())


# ---- turns ---------------------------------------------------------------------------------------------------


@table
def test_every_turn_moves_the_player_it_names_and_no_other(name, path, prediction):
    method = build(name, path, prediction)
    before, played = state(method.teacher), Counter()
    for turn in turns_of(method, batch(path)):
        total = sum(turn.terms.values())
        assert total.shape == ()
        assert torch.isfinite(total)
        total.backward()
        for role, module in roles(method).items():
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            assert all(torch.isfinite(g).all() for g in grads)
            assert any((g != 0).any() for g in grads) == (role == turn.player), f"{role} in the turn of {turn.player}"
        method.zero_grad(set_to_none=True)
        played[turn.player] += 1
    assert set(played) == set(method.players)
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert all(p.requires_grad for player in method.players for p in getattr(method, player).parameters())


@table
def test_the_exact_teacher_will_do(name, path, prediction):
    """Any denoiser of the path can teach, whatever it predicts, if it has what the method needs; a round with updates
    stays finite."""
    from truth.checks import make_path

    on = make_path(path, prediction)
    teacher, layers = mixture(on, prediction), small_net(on, prediction, "teacher").requires_grad_(False)
    parts = Parts(
        Layered(teacher, layers) if "features" in get_method(name).needs else teacher,
        small_net(on, prediction, "student"),
        lambda role: small_net(on, prediction, role),
        FewStep(on, on.grid(1)),
        teacher.null,
        2.0,
        teacher.shape,
        inside(teacher),
    )
    method = get_method(name)(parts, **at_once(name))
    # Adam, as the trainer: a plain step follows the arbitrary scale of a loss (SiD: 100 x a sum) to infinity
    optimisers = {p: torch.optim.Adam(getattr(method, p).parameters(), 1e-3) for p in method.players}

    def update(player):
        optimisers[player].step()
        optimisers[player].zero_grad()

    before, played = state(method), set()
    for step in range(2):
        log = play(method, [batch(path, step=step)], step, update)
        assert all(torch.isfinite(v) for v in log.values())
        played |= {key.split("/")[0] for key in log}
    assert played == set(method.players)
    for player in method.players:
        after = getattr(method, player).state_dict()
        assert any(not torch.equal(v, before[f"{player}.{k}"]) for k, v in after.items())


@every
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_passes_are_true(name, guidance):
    """Network calls in units of batch rows, of the phase that has the most. `passes` counts them with guidance on;
    without it there are fewer."""
    method, calls, size = build(name, guidance=guidance), Counter(), 8
    rounds = []

    def count(role, x, *_):
        if isinstance(x, torch.Tensor):  # heads take features: they are no network call
            calls.update({role: len(x)})

    for role, module in roles(method).items():
        module.register_forward_pre_hook(lambda _, args, role=role: count(role, *args))
    for step in (0, *method.phases):
        calls.clear()
        list(turns_of(method, batch(size=size), step))
        rounds.append({role: rows / size for role, rows in calls.items()})
    if guidance > 1:
        assert max(rounds, key=lambda calls: sum(calls.values())) == dict(method.passes)
    else:
        (counted, *_) = (calls for calls in rounds if set(calls) == set(method.passes))
        assert all(counted[role] <= method.passes[role] for role in counted)


# ---- claims --------------------------------------------------------------------------------------------------


@every
def test_claims_are_complete(name):
    cls = get_method(name)
    about = describe(name)
    assert re.search(r"arXiv \d{4}\.\d{5}", cls.paper)
    assert len(inspect.getdoc(cls).splitlines()) > 1
    assert cls.__doc__ != Method.__doc__
    assert about["summary"].endswith(".")
    assert about["players"] == list(cls.players) != []
    assert len(set(cls.players)) == len(cls.players)
    assert cls.players[0] in ("student", "generator")
    assert {*cls.players, *cls.targets, "teacher"} >= set(cls.passes)
    assert "average" not in (*cls.players, *cls.targets), "checkpoints keep the student's average under this name"
    assert all(isinstance(n, int) and n > 0 for n in cls.passes.values())
    assert cls.needs <= NEEDS.keys()
    assert cls.max_steps >= 1
    assert inspect.Parameter.empty not in options(cls).values()
    assert not options(cls).keys() & vars(Settings()).keys(), "a setting of the run hides the option"
    for option in options(cls):
        assert re.search(rf"\b{option}\b", cls.__doc__ or ""), f"the docstring does not tell what {option} is"


@every
def test_default_settings_resolve(name):
    from onestroke.settings import resolve

    cls = get_method(name)
    settings, chosen = resolve({}, options(cls), cls.players, cls.defaults)
    assert chosen == {}
    assert all(settings.of("lr", player) > 0 for player in cls.players)


def test_methods_are_their_files():
    assert METHODS["swiftbrush"] == "onestroke.methods.distribution.swiftbrush"
    with pytest.raises(InputError, match=r"unknown method 'swiftbrus'\. Did you mean 'swiftbrush'"):
        get_method("swiftbrus")


# ---- training ------------------------------------------------------------------------------------------------


def assert_same(one, two, tolerance=0.0):
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@every
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_exact(name, accumulate):
    """Rounds of AdamW on k micro-batches equal those of one large batch: float64 sums in another order, through
    Adam's division by the root of the second moment."""
    whole = trained(name, batch_size=32, rounds=3)
    split = trained(name, batch_size=32 // accumulate, accumulate=accumulate, rounds=3)
    assert_same(snapshot(split), snapshot(whole), 1e-10)


@every
@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2}, {"lora_rank": {"*": 2}, "lora_targets": ["enter", "leave"]}]
)
def test_stop_and_resume_is_bit_equal(name, changes, tmp_path):
    """2 rounds, a save, a new process's worth of objects, 2 more rounds: the same bits as 4 rounds without a stop."""
    straight = trained(name, tmp_path / "straight", **changes)
    trained(name, tmp_path / "stopped", rounds=2, **changes)
    resumed = trained(name, tmp_path / "stopped", resume=True, **changes)
    assert resumed.round == straight.round == 4
    assert resumed.average.count == straight.average.count > 0
    assert_same(snapshot(resumed), snapshot(straight))
    assert_same(state(resumed.finish()), state(straight.finish()))
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["00000004"]


@every
def test_the_average_is_what_is_returned(name):
    """By hand: average <- average + w (live - average), w = 1 - min(decay, (1 + k) / (10 + k)), k from 1."""
    settings = settings_of(ema=0.3)
    trainer = Trainer(build(name, settings=settings), data(), settings)
    first, update, updates = trainer.method.players[0], trainer.update, [state(trainer.bare(trainer.method.players[0]))]

    def watched(player):
        update(player)
        if player == first:
            updates.append(state(trainer.bare(first)))

    trainer.update = watched
    for _ in range(3):
        trainer.one_round(0.0)
    want = updates[0]
    for k, live in enumerate(updates[1:], start=1):
        w = 1 - min(0.3, (1 + k) / (10 + k))
        want = {key: value + w * (live[key] - value) for key, value in want.items()}
    assert len(updates) > 1
    assert_same(state(trainer.finish()), want, 1e-13)


@every
def test_a_round_reads_only_its_own_draws(name):
    """Rule 4: the global generator is neither read nor moved."""
    torch.manual_seed(1)
    method = build(name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = [sum(turn.terms.values()).item() for turn in turns_of(method, batch())]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert [sum(turn.terms.values()).item() for turn in turns_of(method, batch())] == one


def noisy(name):
    """A trainer whose networks have dropout."""
    method = build(name, settings=settings_of())
    for net in list(method.modules()):
        if isinstance(net, Net):
            net.enter = torch.nn.Sequential(net.enter, torch.nn.Dropout(0.5))
    return Trainer(method, data(), settings_of())


@every
def test_networks_have_no_noise_of_their_own_in_training(name):
    """Sheet 10, trap 6: calls of a network with dropout agree, the teacher's, the targets' and the players', and so do
    rounds under other states of the global generator, which they do not move."""
    one, two = noisy(name), noisy(name)
    x, t, cond = torch.randn(8, 2).double(), torch.full((8,), 0.4).double(), batch().cond
    nets = [net for net in one.method.modules() if isinstance(net, Net)]
    assert one.method.teacher in nets
    assert all(torch.equal(net(x, t, cond).x0, net(x, t, cond).x0) for net in nets)
    torch.manual_seed(1)
    before, log = torch.get_rng_state(), one.one_round(0.0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert two.one_round(0.0) == log


def test_what_is_trained_beside_the_networks_is_in_train_mode():
    """Of the heads' spectral norm the power iteration goes on; what is not trained is in eval mode."""
    method = build("ladd")
    head = next(m for m in method.heads.modules() if isinstance(m, torch.nn.Linear))
    norm = torch.nn.utils.parametrizations.spectral_norm(head).parametrizations.weight[0]
    trainer, before = Trainer(method, data(), settings_of()), norm._u.clone()
    trainer.one_round(0.0)
    assert not torch.equal(norm._u, before)
    assert not any(m.training for m in method.teacher.modules())


@every
def test_all_ranks_make_the_same_draws(name):
    """Rule 4: the number of calls of the draws must not depend on the rows."""
    for step in range(12):
        counts = set()
        for offset in (0, 8):
            draw = Draws(0, step, 8, offset, 16)
            micro = data().batch(draw, torch.device("cpu"))
            turns = [turn.player for turn in turns_of(build(name), micro, step)]
            counts.add((draw.calls, tuple(turns)))
        assert len(counts) == 1


# ---- the kernel that plays them ------------------------------------------------------------------------------


def test_frozen_blocks_nest_and_restore():
    net = torch.nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    one, two = frozen(net), frozen(net)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert not net.weight.requires_grad
    two.__exit__(None, None, None)
    assert net.weight.requires_grad
    assert not net.bias.requires_grad
    with pytest.raises(RuntimeError), frozen(net):
        raise RuntimeError
    assert net.weight.requires_grad


def test_frozen_lets_gradient_through_to_the_input():
    net, x = torch.nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    with frozen(net):
        net(x).sum().backward()
    assert torch.equal(x.grad, net.weight)
    assert net.weight.grad is None


@every
def test_play_updates_once_per_turn_after_all_micro_batches(name):
    method, order = build(name), []
    log = play(method, [batch(step=0), batch(step=1)], 0, order.append, lambda loss: order.append("backward"))
    turns = [turn.player for turn in turns_of(method, batch())]
    assert order == [entry for player in turns for entry in ("backward", "backward", player)]
    assert all(value.grad_fn is None for value in log.values())
