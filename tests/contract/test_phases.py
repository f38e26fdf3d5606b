"""Every method tells of its phases: between them, what a round needs of memory is the same in all rounds of a run.

`onestroke plan` plays the rounds that a method names, and takes the rest for like them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contract.build import at_once, build, data, settings_of
from onestroke.draws import Draws
from onestroke.method import Batch, Method, play
from onestroke.methods import METHODS, get_method, options
from onestroke.plan import rounds, watched
from onestroke.training.train import Trainer

ROWS = 2048  # so that what a few numbers take, such as the levels of a grid, is nothing beside what the rows do
LONG = 100_000
AMONG = (1, 200, 500, 1500, 7000, 15_000, 55_000, 75_000)
"""Rounds among which every published number of rounds and every part of a run falls."""
PHASED: dict[str, dict[str, Any]] = {
    "ctm": {"gan_from": 4},
    "hyper-sd": {"score_weight": 1.0},
}
"""Options of methods that have no phases by default."""


class Untold:
    """A round that nobody may ask for: whoever compares it or counts with it gets a TypeError."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("of an Untold")

    __hash__ = None  # type: ignore[assignment]


def batch(rows: int) -> Batch:
    return data("flow", rows).batch(Draws(0, 0, rows), torch.device("cpu"))


def made(name: str, **changes: Any) -> Method:
    defaults = {option: options(get_method(name))[option] for option in at_once(name)}
    return build(name, "flow", "flow", settings=settings_of(**changes), **defaults | PHASED.get(name, {}))


def reads_the_round(name: str) -> bool:
    """Whether anything in a round depends on its number; the random numbers, which do, aside."""
    method = made(name)
    try:
        play(method, [batch(8)], Untold(), lambda player: method.zero_grad())  # type: ignore[arg-type]
    except TypeError as error:
        if "Untold" in str(error):
            return True
        raise
    return False


def peaks(name: str, steps: int, among: tuple[int, ...]) -> tuple[list[int], dict[int, int]]:
    """The rounds that a plan of `steps` plays, and the largest memory of these and those `among` the run, by round.

    All rounds have the same random numbers.
    """
    found: dict[int, int] = {}
    with watched() as memory:
        run = settings_of(steps=steps, batch_size=ROWS)
        trainer = Trainer(made(name, steps=steps), data("flow", ROWS), run)
        trainer.factor = 1.0
        kernel = (trainer.update, trainer.backward, trainer.advance, trainer.renew, trainer.share)
        told, like = rounds(trainer.method, steps), batch(ROWS)
        for step in sorted({*told, *among}):
            memory.peak = memory.now
            play(trainer.method, [like._replace(draw=Draws(0, 0, ROWS))], step, *kernel)
            found[step] = memory.peak
    return told, found


@pytest.mark.parametrize("name", METHODS)
def test_every_round_is_like_one_that_is_planned(name):
    """Not later than itself; and the last, which is planned whatever a method says, is no excuse."""
    if not reads_the_round(name):
        assert made(name).phases == ()
        return
    for steps, among in ((8, tuple(range(8))), (LONG, AMONG)):
        told, found = peaks(name, steps, among)
        for step, size in found.items():
            like = [found[other] for other in told if other <= step and other < steps - 1]
            assert size == pytest.approx(min(like, key=lambda other: abs(other - size)), rel=0.01), (
                f"round {step} of {steps}: {name} does not say in `phases` where it begins what it does there"
            )
        assert max(found.values()) <= 1.01 * max(found[step] for step in told)
