"""Random numbers do not depend on how a batch is split, and a resumed run continues with those it would have made."""

from __future__ import annotations

import pytest
import torch

from onestroke.draws import Draws
from onestroke.training.train import Data
from truth import checks


def calls(draw: Draws) -> list[torch.Tensor]:
    """Every kind of draw, in one order."""
    like = torch.empty(draw.size, 2, dtype=torch.float64)
    return [draw.normal((3,)), draw.normal(like), draw.uniform(), draw.uniform(2, 5), draw.index(37)]


def test_rows_do_not_depend_on_the_split():
    checks.rows_do_not_depend_on_the_split(Draws)


@pytest.mark.parametrize(("world", "accumulate", "size"), [(1, 1, 64), (1, 2, 32), (2, 1, 32), (2, 2, 16), (4, 2, 8)])
def test_ranks_and_micro_batches_are_rows_of_one_batch(world, accumulate, size):
    """In the trainer's layout: micro-batch i of rank r has rows (i world + r) size of the global batch."""
    splits = [
        calls(Draws(7, 11, size, (i * world + rank) * size, 64)) for i in range(accumulate) for rank in range(world)
    ]
    for whole, *parts in zip(calls(Draws(7, 11, 64)), *splits, strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_draws_resume():
    """Round 5 gives the same numbers whether rounds 0 to 4 were drawn before or not."""
    for step in range(5):
        calls(Draws(1, step, 8))
    torch.manual_seed(123)
    assert all(torch.equal(x, y) for x, y in zip(calls(Draws(1, 5, 8)), calls(Draws(1, 5, 8)), strict=True))
    assert torch.equal(Draws(1, 5, 8).normal((2,)), Draws(1, 5, 8).normal((2,)))


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    calls(Draws(1, 5, 8))
    Draws(1, 5, 8).shared()
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_steps_and_calls_are_independent():
    """No two of the 27 streams agree in a single number, and one call's numbers do not follow from another's."""
    streams = []
    for seed in (0, 1, 2):
        for step in (0, 1, 2):
            draw = Draws(seed, step, 16)
            streams += [draw.normal((4,)).flatten() for _ in range(3)]
    rows = torch.stack(streams)
    assert len(rows.flatten().unique()) == rows.numel()
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 5 / 64**0.5


def test_laws():
    """20 000 numbers each: means within 5 standard errors, and the right range, type and shape."""
    draw, count = Draws(3, 0, 20_000), 20_000
    normal = draw.normal((1,))
    assert normal.shape == (count, 1)
    assert normal.dtype == torch.float32
    assert abs(normal.mean().item()) < 5 / count**0.5
    assert normal.var().item() == pytest.approx(1, abs=5 * (2 / count) ** 0.5)
    uniform = draw.uniform(2, 5)
    assert uniform.dtype == torch.float64
    assert 2 <= uniform.min() < 2.01
    assert 4.99 < uniform.max() < 5
    assert uniform.mean().item() == pytest.approx(3.5, abs=5 * 3 / (12 * count) ** 0.5)
    shared = torch.tensor([Draws(3, step, 1).shared() for step in range(2000)])
    assert shared.mean().item() == pytest.approx(0.5, abs=5 / (12 * 2000) ** 0.5)


def test_normal_takes_the_type_of_a_tensor():
    like = torch.empty(4, 3, 2, dtype=torch.float64)
    assert Draws(0, 0, 4).normal(like).dtype == torch.float64
    assert Draws(0, 0, 4).normal(like).shape == (4, 3, 2)


def test_shared_is_the_same_on_all_ranks():
    everywhere = {Draws(9, 4, 8, offset, 64).shared() for offset in range(0, 64, 8)} | {Draws(9, 4, 64).shared()}
    assert len(everywhere) == 1
    assert len({Draws(9, step, 8).shared() for step in range(50)}) == 50


@pytest.mark.parametrize("count", [10, 24, 64, 7])
def test_index_is_a_permutation_per_epoch(count):
    """Batches of 8 over `count` rows, more than one epoch per batch at 7: each epoch holds every row once."""
    rows = torch.cat([Draws(2, step, 8).index(count) for step in range(3 * count)])
    epochs = rows[: len(rows) // count * count].reshape(-1, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > len(epochs) / 2
    assert rows.dtype == torch.int64
    again = torch.cat([Draws(3, step, 8).index(count) for step in range(3 * count)])
    assert not torch.equal(rows, again)


def test_index_does_not_use_up_a_call():
    """The rows of a dataset follow from the step alone, so that reading data does not shift the noise."""
    plain, reading = Draws(0, 0, 4), Draws(0, 0, 4)
    reading.index(10)
    assert torch.equal(plain.normal((2,)), reading.normal((2,)))


def test_a_batch_has_the_rows_of_its_draws():
    data = Data((2,), {"label": torch.arange(10)}, torch.arange(10.0)[:, None].expand(-1, 2))
    batch = data.batch(Draws(0, 3, 4), torch.device("cpu"))
    assert len(data) == 10
    assert batch.cond["label"].tolist() == Draws(0, 3, 4).index(10).tolist()
    assert torch.equal(batch.x0[:, 0].long(), batch.cond["label"])
    assert torch.equal(batch.noise, Draws(0, 3, 4).normal((2,)))
    assert Data((2,), data.cond).batch(Draws(0, 3, 4), torch.device("cpu")).x0 is None
