"""The derivative of a network along a direction: forward mode is the difference, on every family of networks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from contract.build import small_net
from families import FAMILIES
from onestroke import tangent as source
from onestroke.denoiser import OnPath, TwoTimes, tapped
from onestroke.errors import InputError, Notice
from onestroke.paths import Flow
from onestroke.tangent import STEPS, Tangent, difference
from truth.checks import F64, close, make_path, tensor
from truth.test_mutants import broken

T, STEP = 0.5, 2**-12
"""Times this far apart are exact in float32, in which networks read them."""


def rectified(net: nn.Module) -> dict[str, nn.Linear]:
    """The layers of which linear attention reads the positive part alone, by name."""
    attention = {k: m for k, m in net.named_modules() if "Linear" in type(getattr(m, "processor", None)).__name__}
    return {f"{k}.{part}": getattr(m, part) for k, m in attention.items() for part in ("to_q", "to_k")}


def moved(net: nn.Module) -> nn.Module:
    """A copy in float64 of which nothing is zero. SANA's queries and keys are lifted: away from where its linear
    attention has a kink in every one of them, and jumps where all of a head's rectifiers close."""
    net, generator = copy.deepcopy(net).double(), torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    for layer in rectified(net).values():
        layer.bias = nn.Parameter(torch.full((layer.out_features,), 4.0, dtype=F64))
    return net.requires_grad_(True)


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_mode_is_the_difference_on_every_family(name, teachers):
    """Attention included, and a second time read beside the first. What is left of the difference, extrapolated to no
    step, is that networks embed their times in float32. The backward pass knows the same derivative."""
    teacher = teachers[name]
    net = TwoTimes(moved(teacher.net), teacher.shape, teacher.null)
    nn.init.normal_(net.shift.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    cond = teacher.encode(["a red square", "rain"])
    x, dx, w = torch.randn(3, 2, *teacher.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    t, dt = torch.full((2,), T, dtype=F64), tensor(1.0, -0.5)

    def field(x, t):
        est = net(x, t, {**cond, "s": t / 3})
        return est.eps - est.x0

    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        value, slope = Tangent(Flow())(field, x, t, dx, dt)
        parts = [Tangent(Flow())(field, x, t, *along)[1] for along in ((dx, 0 * dt), (0 * dx, dt))]
    close(value, field(x, t).detach())
    assert not slope.requires_grad
    assert (slope - sum(parts)).abs().max() < 1e-4 * slope.abs().max()
    assert min(part.abs().max() for part in parts) > 1e-3, "it reads both"
    x.requires_grad_(True)
    t.requires_grad_(True)
    gx, gt = torch.autograd.grad((w * field(x, t)).sum(), [x, t])
    assert abs((gx * dx).sum() + (gt * dt).sum() - (w * slope).sum()) < 1e-4 * (w * slope).norm()
    with tapped(net, rectified(net)) as found:
        one, two = (difference(Flow(), field, x, t, dx, dt, step)[1] for step in (STEP, STEP / 2))
    assert bool(found) == (name == "sana")
    assert all((v > 0).all() for v in found)
    assert ((4 * two - one) / 3 - slope).abs().max() < 1e-3 * slope.abs().max()


# ---- the twin of differences ---------------------------------------------------------------------------------------


class Fused(nn.Module):
    """A denoiser whose attention is a fused kernel, which has no forward-mode derivative."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x, t, cond):
        self.calls += 1
        tokens = torch.stack([x, x.sin()], 1)[:, None]
        seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.net(seen[:, 0, 0], t, cond)


def case(kind=lambda net: net, rows=5):
    """(field, x, t, dx, dt, net): a small network on a straight path, float64."""
    net = kind(small_net(make_path("vp"), "v", "student"))
    view = OnPath(net, make_path("vp"), Flow())
    x, dx = torch.randn(2, rows, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    t, cond = torch.linspace(0.05, 0.9, rows, dtype=F64), {"label": torch.arange(rows) % 3}
    return (lambda x, t: view.velocity(x, t, cond)), x, t, dx, torch.linspace(-1, 1, rows, dtype=F64), net


def test_a_network_without_forward_mode_is_differenced_and_it_is_said_once():
    *call, net = case(Fused)
    tangent = Tangent(Flow())
    with pytest.warns(Notice, match="no forward-mode derivative .*scaled_dot_product.*: differences stand in"):
        value, slope = tangent(*call)
    assert not tangent.forward
    assert net.calls == 1 + 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        again = tangent(*call)
    assert net.calls == 1 + 3 + 3, "forward mode is not tried again"
    assert torch.equal(again[1], slope)
    assert not value.requires_grad
    h = 1e-5  # typed by hand
    field, x, t, dx, dt = call
    want = (field(x + h * dx, t + h * dt) - field(x - h * dx, t - h * dt)) / (2 * h)
    assert (want - slope).abs().max() < 1e-6 * want.abs().max()


def both_ways_agree(module):
    *call, _ = case()
    (value, slope), (same, other) = module.Tangent(Flow())(*call), module.Tangent(Flow(), 1e-6)(*call)
    assert torch.equal(value, same)
    assert (slope - other).abs().max() < 1e-8 * slope.abs().max()


def stays_on_the_path(module):
    """A step to both sides, as much as there is room for down to a quarter of it, or else two away from an end of the
    path; whichever way it goes, exact for a parabola."""
    path, step = Flow(t_min=0.05, t_max=0.9), 0.2
    t = tensor(0.05, 0.08, 0.12, 0.5, 0.75, 0.82, 0.89, 0.9)
    for rate in (1.0, -1.0, 0.5, 0.0):
        seen = []

        def field(x, t, seen=seen):
            seen.append(t)
            return x**2 + t[:, None] ** 2

        x, dt = torch.ones(8, 1, dtype=F64), torch.full((8,), rate, dtype=F64)
        value, slope = module.difference(path, field, x, t, 3 * x, dt, step)
        close(value[:, 0], 1 + t**2)
        close(slope[:, 0], 6 + 2 * t * rate, rtol=1e-9)
        far, room = step * abs(rate), torch.minimum(t - 0.05, 0.9 - t)
        both, toward = room >= far / 4, far * (0.5 - t).sign()
        near = torch.where(both, room.clamp(max=far) * (1 if rate > 0 else -1), toward)
        close(torch.stack(seen) - t, torch.stack([0 * t, near, torch.where(both, -near, 2 * near)]), rtol=1e-9)


def takes_a_third_of_a_short_path(module):
    """From an end of which two steps, and from its middle one to both sides, would lead beyond it."""
    path, x, t = Flow(t_min=0.1, t_max=0.4), torch.ones(3, 1, dtype=F64), tensor(0.1, 0.25, 0.4)
    for rate in (1.0, 0.5):
        seen = []
        field = lambda x, t, seen=seen: seen.append(t) or x  # noqa: E731
        module.difference(path, field, x, t, x, torch.full_like(t, rate), 0.45)
        close(torch.stack(seen[1:]), torch.stack([tensor(0.2, 0.35, 0.3), tensor(0.3, 0.15, 0.2)]), rtol=1e-9)


def takes_the_step_of_the_precision(module):
    *call, _ = case()
    for dtype, step in STEPS.items():
        seen = []
        field = lambda x, t, seen=seen: seen.append(t) or x  # noqa: E731
        x, t = call[1].to(F64 if dtype == F64 else torch.float32), torch.full((5,), 0.5, dtype=F64)
        with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            module.difference(Flow(), field, x, t, 0 * x, torch.ones_like(t))
        close(torch.stack(seen[1:]) - t, step * tensor(1.0, -1.0)[:, None].expand(2, 5), rtol=1e-6)


def test_other_errors_are_not_swallowed():
    def field(x, t):
        return x @ x

    with pytest.warns(Notice), pytest.raises(RuntimeError, match="mat1 and mat2"):
        Tangent(Flow())(field, torch.ones(2, 3), tensor(0.5, 0.5), torch.ones(2, 3), tensor(1.0, 1.0))


def overlaps(module):
    """The view's times are those at which the path has noise levels, and never its own ends."""
    for path in (make_path("vp"), make_path("table"), Flow(t_min=1e-6)):
        view = module.overlap(Flow(), path)
        last = path.log_snr(tensor(path.t_max)).item()
        assert view.t_max == pytest.approx(min(1 - 1e-4, torch.sigmoid(tensor(-last)).item()), abs=1e-9)
        first = path.log_snr(tensor(path.t_min)).item()
        assert view.t_min == pytest.approx(max(1e-4, torch.sigmoid(tensor(-first)).item()), abs=1e-9)


CHECKS = (both_ways_agree, stays_on_the_path, takes_a_third_of_a_short_path, takes_the_step_of_the_precision, overlaps)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_the_checks_hold(check):
    check(source)


MUTANTS = [
    ("two / one / (two - one)", "two / one / two", both_ways_agree),
    ("one / two / (one - two)", "one / two / one", stays_on_the_path),
    ("x + like(d, x) * dx", "x", both_ways_agree),
    ("t + d * dt", "t + d", both_ways_agree),
    ("(0 * h, one, two)", "(h, one, two)", both_ways_agree),
    ("dt.to(t).contiguous()", "0 * dt.to(t).contiguous()", both_ways_agree),
    ("return here, like(nearer", "return near, like(nearer", both_ways_agree),
    ("h / 4", "h / 2", stays_on_the_path),
    ("room.amin(0).minimum(h)", "h", stays_on_the_path),
    ("torch.where(after < before, -h, h)", "h", stays_on_the_path),
    ("-one, 2 * one", "-one, -one", stays_on_the_path),
    ("torch.where(dt < 0, room.flip(0), room)", "room", stays_on_the_path),
    (" / 3 / rate", " / 3 * torch.ones_like(rate)", takes_a_third_of_a_short_path),
    ("dt.abs().clamp_min(torch.finfo(dt.dtype).tiny)", "torch.ones_like(dt)", stays_on_the_path),
    (" / 3 / rate", " / 2 / rate", takes_a_third_of_a_short_path),
    (".clamp(max=step)", ".clamp(max=step / 2)", takes_the_step_of_the_precision),
    ("torch.bfloat16: 1e-2", "torch.bfloat16: 1e-3", takes_the_step_of_the_precision),
    ("if half else x.dtype", "if not half else x.dtype", takes_the_step_of_the_precision),
    ("min(last, 1 - 1e-4)", "last", overlaps),
    ("max(first, 1e-4)", "first", overlaps),
    ("[path.t_min, path.t_max]", "[path.t_max, path.t_min]", overlaps),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken("onestroke.tangent", old, old))
    with pytest.raises((AssertionError, RuntimeError, KeyError)):
        check(broken("onestroke.tangent", old, new))


def test_a_long_difference_sees_past_wiggles():
    """sin(t) with a fast small wave on it: the derivative is the wave's, the difference over its length is not."""
    x, t = torch.zeros(1, 1, dtype=F64), tensor(0.4)
    call = (lambda x, t: x + t.sin()[:, None] + 0.01 * (200 * torch.pi * t).cos()[:, None], x, t, x, tensor(1.0))
    assert abs(Tangent(Flow(), 0.05)(*call)[1] - t.cos()) < 1e-3
    assert abs(Tangent(Flow(), 0.0)(*call)[1] - t.cos()) < 1e-3  # at the wave's crest
    off = (*call[:2], tensor(0.4025), *call[3:])
    assert abs(Tangent(Flow(), 0.05)(*off)[1] - tensor(0.4025).cos()) < 1e-3
    assert abs(Tangent(Flow(), 0.0)(*off)[1] - tensor(0.4025).cos()) > 1
    with pytest.raises(InputError, match=r"difference=0.5 must lie in \[0, 0.5\)"):
        Tangent(Flow(), 0.5)
