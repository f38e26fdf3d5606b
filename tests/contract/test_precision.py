"""Every method trains in bfloat16 what it trains in float32."""

from __future__ import annotations

import pytest
import torch

from contract.build import at_once, build, data, settings_of
from onestroke.methods import METHODS
from onestroke.training.train import Data, Trainer, live


def narrow(value):
    """A batch's tensors, or the rows of one, in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    return value if value is None else type(value)(*map(narrow, value))


class NarrowData(Data):
    """Data of float32, which autocast casts."""

    def batch(self, draw, device):
        found = super().batch(draw, device)
        return found._replace(x0=narrow(found.x0), pairs=narrow(found.pairs), ways=narrow(found.ways))


def moved(name: str, precision: str) -> tuple[set[str], list[bool]]:
    """The parameters that one round moves, and of each call of the student whether casts are kept between calls."""
    settings = settings_of(precision=precision, weight_decay=0.0, warmup=0)
    wide = data("flow")
    method = build(name, "flow", "flow", settings=settings, **at_once(name))
    for net in method.children():
        net.float()
    trainer = Trainer(method, NarrowData(wide.shape, wide.cond, wide.x0, wide.pairs, wide.ways), settings)
    before = {f"{p}/{k}": v.clone() for p in method.players for k, v in live(trainer.bare(p)).items()}
    kept: list[bool] = []
    trainer.bare(method.players[0]).register_forward_pre_hook(
        lambda *_: kept.append(torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
    )
    trainer.one_round(0.0)
    after = {f"{p}/{k}": v for p in method.players for k, v in live(trainer.bare(p)).items()}
    return {k for k, v in after.items() if not torch.equal(v, before[k])}, kept


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_trains_the_same_weights(name):
    """Casts are not kept: an older torch takes one from a call without gradient for the next call, whose weights then
    have none."""
    half, kept = moved(name, "bf16")
    assert half == moved(name, "no")[0] != set()
    assert not any(kept)
