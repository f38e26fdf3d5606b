"""Offload: idle roles lie elsewhere, and the run is the same to the bit. On a CPU a second home stands in."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contract.build import PHASES, build, data, settings_of, snapshot, trained
from onestroke.errors import InputError
from onestroke.methods import METHODS
from onestroke.training.offload import Offload
from onestroke.training.train import Trainer

LORA = {"lora_rank": {"*": 2}, "lora_targets": ["enter", "leave"], "accumulate": 2}


class Devices(TorchDispatchMode):
    """Refuses to compute with tensors at home and on the device together, as a GPU does. Copying is between them, and
    `follow` (by lerp) brings the one to the other first."""

    def __init__(self, offload: Offload):
        super().__init__()
        self.home = {t.untyped_storage()._cdata for t in offload.homes.values()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor) and t.ndim]
        away = [t.untyped_storage()._cdata in self.home for t in given]
        moves = any(name in str(function) for name in ("copy", "lerp_"))
        if any(away) and not all(away) and not moves:
            raise AssertionError(f"{function} of tensors at home and on the device")
        return function(*args, **(kwargs or {}))


class TwoHomes(Trainer):
    """A trainer whose main memory is not its device's."""

    def home(self, device):
        return torch.clone

    def one_round(self, progress):
        with Devices(self.offload):
            return super().one_round(progress)


@pytest.fixture
def two_homes(monkeypatch):
    monkeypatch.setattr("contract.build.Trainer", TwoHomes)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_the_run_is_the_same(name, changes, two_homes):
    run = trained(name, offload=True, rounds=3, **changes)
    assert run.offload.moves > 0
    assert all(run.offload.idle(p) for p in run.method.parameters())
    assert_same(snapshot(run), snapshot(trained(name, rounds=3, **changes)))
    student = run.finish()
    assert not any(run.offload.idle(p) for p in student.parameters())
    assert_same(student.state_dict(), trained(name, rounds=3, **changes).finish().state_dict())


@pytest.mark.parametrize("name", ["swiftbrush", *PHASES])
def test_it_is_resumed(name, two_homes, tmp_path):
    straight = trained(name, offload=True)
    trained(name, tmp_path, rounds=2, offload=True)
    assert_same(snapshot(trained(name, tmp_path, resume=True, offload=True)), snapshot(straight))


def test_who_is_there_when(monkeypatch):
    """SwiftBrush: in the student's backward pass the student alone, in the fake's the fake alone, and no optimiser."""
    settings, seen = settings_of(offload=True), []
    trainer = TwoHomes(build("swiftbrush", settings=settings), data(), settings)

    def there() -> set[str]:
        groups = trainer.offload.groups.items()
        return {name for name, tensors in groups if not all(trainer.offload.idle(t) for t in tensors)}

    backward = trainer.backward
    trainer.backward = lambda loss: (seen.append(there()), backward(loss))
    step = trainer.optimisers["student"].step
    trainer.optimisers["student"].step = lambda: (seen.append(there()), step())
    trainer.one_round(0.0)
    assert seen == [{"student"}, {"student", "student.optim", "average"}, {"fake"}]
    assert there() == set()


def test_shared_weights_are_there_once():
    """Two groups over one tensor: it comes with the first and leaves with the last, and what was written stays."""
    shared, own = torch.zeros(3), torch.zeros(2)
    offload = Offload(torch.device("cpu"), torch.clone)
    offload.add("teacher", [shared], trained=False)
    offload.add("fake", [shared, own])
    home = shared.data_ptr()
    with offload.here("teacher"):
        there = shared.data_ptr()
        with offload.here("fake"):
            assert shared.data_ptr() == there != home
            own += 1
        assert offload.idle(own)
        assert not offload.idle(shared)
    assert shared.data_ptr() == home
    assert (offload.moves, own.tolist(), shared.tolist()) == (2, [1.0, 1.0], [0.0, 0.0, 0.0])


def test_the_stand_in_tells_devices_apart():
    offload = Offload(torch.device("cpu"), torch.clone)
    offload.add("role", [weight := torch.ones(2)])
    with Devices(offload):
        with pytest.raises(AssertionError, match="at home and on the device"):
            weight + torch.ones(2)
        with offload.here("role"):
            weight + torch.ones(2)


def test_a_role_may_be_called_inside_a_transform():
    layer = torch.nn.Linear(3, 3)
    offload = Offload(torch.device("cpu"), torch.clone)
    x, v = torch.randn(2, 4, 3)
    want = torch.func.jvp(layer, (x,), (v,))[1]
    offload.watch("role", layer, trained=True)
    assert torch.equal(torch.func.jvp(layer, (x,), (v,))[1], want)
    offload.turn_ends()
    assert offload.idle(layer.weight)


def test_without_another_memory_nothing_moves():
    run = trained("swiftbrush", offload=True, rounds=1)
    assert run.offload.moves == 0
    assert run.offload.groups == {}


@pytest.mark.parametrize("other", [{"offload": True}, {"optimizer": "adamw8bit"}])
def test_not_with_sharding(other):
    with pytest.raises(InputError, match="do not go together"):
        settings_of(shard=True, **other)


def test_not_with_several_processes(monkeypatch):
    from onestroke.run import check_machine

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        check_machine(settings_of(offload=True))
