"""Clipping, and the optimiser of 8 bits: what it needs, holds and writes. Its steps are tested where bitsandbytes is
installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from contract.build import data, snapshot, trained
from onestroke.errors import InputError
from onestroke.method import Pairs
from onestroke.training import optim
from onestroke.training.optim import begin, eight_bit, make_optimizer, state_8bit
from onestroke.training.train import Data, Trainer


@pytest.fixture
def absent(monkeypatch):
    find = optim.find_spec
    monkeypatch.setattr(optim, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))


def test_without_the_extra(absent, onestroke, pipeline_folder, prompt_file, tmp_path):
    words = ("distill", pipeline_folder, "--method", "swiftbrush", "--prompts", prompt_file)
    said = onestroke(*words, "--out", tmp_path / "run", "--set", "optimizer=adamw8bit")
    assert said.code == 2
    assert said.err == "error: optimizer=adamw8bit needs bitsandbytes: pip install 'onestroke[8bit]'.\n"
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="needs bitsandbytes"):
        make_optimizer("adamw8bit", [])


def test_an_unknown_optimiser(onestroke, pipeline_folder):
    said = onestroke("plan", pipeline_folder, "--method", "swiftbrush", "--set", "optimizer=adam")
    assert said.code == 2
    assert "must be one of adamw, adamw8bit" in said.err


def test_what_is_held():
    """Two bytes per number and two scales per 256 of them; small tensors as before."""
    large = state_8bit(torch.zeros(100, 100))
    assert {k: (v.dtype, v.numel()) for k, v in large.items() if k != "step"} == {
        "state1": (torch.uint8, 10_000),
        "state2": (torch.uint8, 10_000),
        "absmax1": (torch.float32, 40),
        "absmax2": (torch.float32, 40),
    }
    assert {v.dtype for v in state_8bit(torch.zeros(10)).values()} == {torch.float32}


def test_its_state_is_that_of_bitsandbytes():
    adamw = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    for size in (10, 4096, 10_001):
        p = torch.nn.Parameter(torch.zeros(size))
        theirs = adamw([p])
        theirs.init_state(theirs.param_groups[0], p, 0, 0)
        kept = {k: v for k, v in theirs.state[p].items() if k[:4] not in ("step", "qmap")}
        ours = {k: v for k, v in state_8bit(p).items() if k != "step"}
        assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {k: (v.dtype, v.shape) for k, v in kept.items()}


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_gradients_are_clipped_as_torch_does(limit):
    """To the bit, and those of a small norm are left alone."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 7)] for _ in range(2))
    for one, two in zip(ours, theirs, strict=True):
        one.grad = torch.randn_like(one)
        two.grad = one.grad.clone()
    still = torch.nn.Parameter(torch.zeros(2))  # without a gradient
    before = [p.grad.clone() for p in ours]
    Trainer.clip(SimpleNamespace(settings=SimpleNamespace(clip=limit)), [*ours, still])
    torch.nn.utils.clip_grad_norm_(theirs, limit)
    for one, two, old in zip(ours, theirs, before, strict=True):
        assert torch.equal(one.grad, two.grad)
        assert torch.equal(one.grad, old) == (limit == 100.0)
    assert still.grad is None


def test_its_steps_are_those_of_bitsandbytes():
    adamw = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    torch.manual_seed(0)
    one, two = (torch.nn.Parameter(torch.ones(80, 80)) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours, theirs = eight_bit()([one], **options), adamw([two], **options)
    begin(ours, torch.device("cpu"))
    for _ in range(5):
        one.grad = torch.randn(80, 80)
        two.grad = one.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.ones(80, 80))
    assert ours.state[one]["step"] == 5
    assert all(isinstance(v, torch.Tensor) for v in ours.state[one].values())


@pytest.mark.parametrize("changes", [{}, {"offload": True}])
def test_a_run_is_resumed(changes, tmp_path, monkeypatch):
    """With parameters large enough for 8 bits, and beginning anew what a method asks for."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("contract.build.small_net", wide_net)
    known = data()
    narrow = Data((2,), known.cond, known.x0.float(), Pairs(*(v.float() for v in known.pairs)))
    monkeypatch.setattr("contract.build.data", lambda: narrow)
    straight = trained("nitrofusion", optimizer="adamw8bit", **changes)
    assert any(v.dtype == torch.uint8 for v in snapshot(straight).values())
    trained("nitrofusion", tmp_path, rounds=2, optimizer="adamw8bit", **changes)
    resumed = snapshot(trained("nitrofusion", tmp_path, resume=True, optimizer="adamw8bit", **changes))
    for key, value in snapshot(straight).items():
        assert torch.equal(value, resumed[key]), key


def wide_net(path, prediction, role):
    from onestroke.truth import Net

    torch.manual_seed(len(role))
    return Net(path, prediction, 2, 3, 1.0, width=80)
