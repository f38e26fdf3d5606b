"""Roles: full copies, and LoRA adapters over the teacher's own tensors; what merging and averaging do to them."""

from __future__ import annotations

import pytest
import torch

from contract.build import small_net
from onestroke.errors import InputError
from onestroke.paths import VP
from onestroke.settings import Settings
from onestroke.teachers.pipeline import PipelineTeacher
from onestroke.training.roles import make_role, merged
from onestroke.training.train import Average, gathered, learned, live, shell

LORA = Settings(lora_rank={"fake": 4}, lora_alpha={"fake": 6}, lora_targets=["to_q", "to_v"])


@pytest.fixture(scope="module")
def teacher(pipeline_folder):
    """A tiny UNet of the real classes, in float64."""
    return PipelineTeacher.load(pipeline_folder).net.double()


def call(net):
    generator = torch.Generator().manual_seed(0)
    x, text = (
        torch.randn(2, 4, 4, 4, generator=generator).double(),
        torch.randn(2, 16, 16, generator=generator).double(),
    )
    return net(x, torch.full((2,), 0.5, dtype=torch.float64), {"text": text})


def trained_lora(teacher):
    """A LoRA role after a step that moved it visibly."""
    role = make_role(teacher, "fake", LORA)
    optimiser = torch.optim.SGD([p for p in role.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        call(role).x0.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return role


def test_a_full_copy_shares_nothing(teacher):
    role = make_role(teacher, "student", LORA)
    theirs = {p.data_ptr() for p in teacher.parameters()}
    assert not theirs & {p.data_ptr() for p in role.parameters()}
    assert all(p.requires_grad for p in role.parameters())
    assert torch.equal(call(role).x0, call(teacher).x0)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_lora_shares_every_tensor_of_the_teacher(teacher):
    """One copy of the weights in memory: what the role adds is its adapters, of the rank asked for."""
    before = {k: v.data_ptr() for k, v in teacher.named_parameters()}
    role = make_role(teacher, "fake", LORA)
    theirs = set(before.values())
    own = {k: p for k, p in role.named_parameters() if p.data_ptr() not in theirs}
    assert theirs == {p.data_ptr() for p in role.parameters()} - {p.data_ptr() for p in own.values()}
    assert {k: v.data_ptr() for k, v in teacher.named_parameters()} == before
    assert own
    assert all(p.requires_grad == (k in own) for k, p in role.named_parameters())
    assert all("lora_" in k and "fake" in k and ("to_q" in k or "to_v" in k) for k in own)
    assert {min(p.shape) for p in own.values()} == {4}
    scales = {m.scaling["fake"] for m in role.modules() if hasattr(m, "scaling")}
    assert scales == {6 / 4}


def test_lora_starts_at_the_teacher_and_only_it_learns(teacher):
    role, before = make_role(teacher, "fake", LORA), call(teacher).x0
    assert torch.equal(call(role).x0, before)
    call(role).x0.square().mean().backward()
    grads = {k: p.grad for k, p in role.named_parameters() if p.grad is not None}
    assert all((g != 0).any() for k, g in grads.items() if "lora_B" in k)
    assert set(grads) == {k for k, p in role.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in teacher.parameters())

    moved = trained_lora(teacher)
    assert (call(moved).x0 - before).abs().max() > 1e-3
    assert torch.equal(call(teacher).x0, before)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_two_lora_roles_do_not_see_each_other(teacher):
    settings = Settings(lora_rank={"*": 2}, lora_targets=["to_q"])
    one, two = make_role(teacher, "student", settings), make_role(teacher, "fake", settings)
    (call(one).x0 - call(two).x0.detach() - 1).square().mean().backward()
    assert all(p.grad is None for p in two.parameters())
    assert any(p.grad is not None for p in one.parameters())


def test_merged_equals_the_adapted_net_and_leaves_shared_weights_alone(teacher):
    role = trained_lora(teacher)
    before, weights = call(role), {k: v.clone() for k, v in teacher.state_dict().items()}
    plain = merged(role)
    assert set(plain.state_dict()) == set(weights)
    torch.testing.assert_close(call(plain).x0, before.x0, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(v, weights[k]) for k, v in teacher.state_dict().items())
    assert torch.equal(call(role).x0, before.x0)
    changed = {k for k, v in plain.state_dict().items() if not torch.equal(v, weights[k])}
    assert changed == {k for k in weights if k.endswith(("to_q.weight", "to_v.weight"))}


def test_merging_without_adapters_is_a_copy(teacher):
    plain = merged(teacher)
    assert plain is not teacher
    assert torch.equal(call(plain).x0, call(teacher).x0)


@pytest.mark.parametrize("role", ["student", "fake"])
def test_a_shell_becomes_what_is_loaded_into_it(role, teacher):
    """How a sharded player is handed back whole: nothing trained is held before, nothing frozen is copied."""
    net = trained_lora(teacher) if role == "fake" else make_role(teacher, role, LORA)
    empty = shell(net)
    assert {k for k, p in empty.named_parameters() if p.is_meta} == set(live(net))
    empty.load_state_dict(gathered(learned(net)), strict=False, assign=True)
    assert torch.equal(call(empty).x0, call(net).x0)
    assert live(empty).keys() == live(net).keys()
    frozen = {k: p.data_ptr() for k, p in net.named_parameters() if not p.requires_grad}
    assert {k: p.data_ptr() for k, p in empty.named_parameters() if k in frozen} == frozen


def test_lora_of_no_layer_is_refused(teacher):
    with pytest.raises(InputError, match=r"none of the lora_targets \['qkv'\] is a layer"):
        make_role(teacher, "fake", Settings(lora_rank={"*": 2}, lora_targets=["qkv"]))


# ---- the average ---------------------------------------------------------------------------------------------


def values(net):
    return {k: v.clone() for k, v in net.named_parameters()}


def test_swap_twice_is_the_identity():
    net = small_net(VP(), "v", "student")
    average, before = Average(net, 0.9), values(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    live = values(net)
    average.swap()
    assert all(torch.equal(p, before[k]) for k, p in net.named_parameters())
    average.swap()
    assert all(torch.equal(p, live[k]) for k, p in net.named_parameters())
    assert all(torch.equal(v, before[k]) for k, v in average.values.items())


@pytest.mark.parametrize("decay", [0.999, 0.25])
def test_the_average_warms_up(decay):
    """min(decay, (1 + k) / (10 + k)) of the old is kept at update k: 2/11, 3/12, 4/13, ... until the decay."""
    net = torch.nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(0.0)
    average, want = Average(net, decay), 0.0
    for k, fraction in enumerate((2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15), start=1):
        net.weight.data.fill_(float(k))
        average.update()
        kept = min(decay, fraction)
        want = kept * want + (1 - kept) * k
        assert average.values["weight"].item() == pytest.approx(want, rel=1e-14)
    assert average.count == 5
    assert net.weight.item() == 5


def test_the_average_reaches_its_decay():
    net = torch.nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(0.0)
    average = Average(net, 0.5)
    average.count = 1000
    net.weight.data.fill_(1.0)
    average.update()
    assert average.values["weight"].item() == 0.5


def test_the_average_follows_trained_parameters_only(teacher):
    role = make_role(teacher, "fake", LORA)
    average = Average(role, 0.9)
    assert set(average.values) == {k for k, p in role.named_parameters() if p.requires_grad}
    assert len(average.values) < len(list(role.parameters()))
