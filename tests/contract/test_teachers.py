"""Every method on a network of every family of pipelines: two rounds, or its phases in four, on tiny ones."""

from __future__ import annotations

import copy
import zlib

import pytest
import torch
from torch import nn

from contract.build import PHASES, at_once
from families import FAMILIES
from onestroke.denoiser import Halves
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.method import Pairs, Parts, play
from onestroke.methods import METHODS, get_method
from onestroke.sampling import FewStep
from onestroke.settings import Settings
from onestroke.training.train import Data

PROMPTS = ["a red square", "rain"]


def role_of(teacher, role: str) -> nn.Module:
    """A trainable copy of the teacher's network, moved a little its own way."""
    net, generator = (
        copy.deepcopy(teacher.net).requires_grad_(True),
        torch.Generator().manual_seed(zlib.crc32(role.encode())),
    )
    for p in net.parameters():
        p.data += 0.01 * torch.randn(p.shape, generator=generator)
    return net


def data_of(teacher) -> Data:
    """All that any method needs of it."""
    noise, x0 = torch.randn(2, 2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    steps = Settings().solver_steps
    ways = torch.randn(2, steps + 1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    return Data(teacher.shape, teacher.encode(PROMPTS), x0, Pairs(noise, x0), ways)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, teachers):
    """A teacher and its data."""
    return teachers[request.param], data_of(teachers[request.param])


@pytest.mark.parametrize("name", METHODS)
def test_every_player_learns(name, family):
    teacher, data = family
    few = FewStep(teacher.path, teacher.path.grid(1))
    parts = Parts(
        teacher.net,
        role_of(teacher, "student"),
        lambda role: role_of(teacher, role),
        few,
        teacher.null,
        2.0,
        teacher.shape,
        lambda x0, cond: x0.flatten(1).mean(1),
    )
    chosen = {**at_once(name), **PHASES.get(name, {})}
    if "halves" in get_method(name).needs and not isinstance(teacher.net, Halves):
        with pytest.raises(InputError, match=f"and {type(teacher.net).__name__} has none; take a teacher with a UNet"):
            get_method(name)(parts, **chosen)
        return
    method = get_method(name)(parts, **chosen)
    # Adam, as the trainer: a plain step follows the arbitrary scale of a loss
    adam = {p: torch.optim.Adam(getattr(method, p).parameters(), 1e-4) for p in method.players}
    moved = dict.fromkeys(method.players, 0)

    def update(player: str) -> None:
        grads = [p.grad for p in getattr(method, player).parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in grads)
        assert all(p.grad is None for p in teacher.net.parameters())
        moved[player] += any((g != 0).any() for g in grads)
        adam[player].step()
        method.zero_grad(set_to_none=True)

    for step in range(4 if name in PHASES else 2):
        log = play(method, [data.batch(Draws(0, step, 1), torch.device("cpu"))], step, update)
        assert all(torch.isfinite(v) for v in log.values())
    assert all(moved.values())
