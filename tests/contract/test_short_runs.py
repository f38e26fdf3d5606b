"""Every method, a few hundred rounds long, comes nearer to an exact teacher."""

from __future__ import annotations

import copy

import pytest

from contract.build import SHORT
from onestroke.methods import METHODS
from onestroke.paths import EDM
from onestroke.truth import converge, fit, ring


@pytest.fixture(scope="module")
def fitted():
    """The net that every short run starts from."""
    return fit(ring(EDM(), 4, std=0.3), "x0", 120, steps=200)


@pytest.mark.parametrize("name", METHODS)
def test_a_short_run_approaches_the_truth(name, fitted, monkeypatch):
    """200 rounds of 256 from a net fitted in as many: at least two fifths off the one-step start's distance to the
    method's target, the teacher's law or its modes.

    Rounds, not seconds: the result is that of the method, not of the machine. `make truth` is the long run.
    """
    monkeypatch.setattr("onestroke.truth.fit", lambda *args: copy.deepcopy(fitted))
    monkeypatch.setattr("onestroke.truth.SAMPLES", 5_000)  # the start is 20 times what two true samples differ by
    found = converge(name, ring(EDM(), 4, std=0.3), steps=200, batch_size=256, seconds=600, **SHORT.get(name, {}))
    assert found.rounds == 200
    assert found.sliced_w2 < 0.6 * found.start
    assert min(w / true for w, true in zip(found.mode_weights, found.true_weights, strict=True)) > 0.5
