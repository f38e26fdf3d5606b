"""The user-facing question "does this method find the truth?", on budgets of a few seconds."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from onestroke.denoiser import Guided
from onestroke.errors import InputError
from onestroke.paths import EDM, VP, Estimate, Flow
from onestroke.sampling import FewStep
from onestroke.solvers import solve
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.truth import Distilled, converge, fit, inside, measure, ring, sliced_w2
from truth.checks import tensor


@pytest.mark.parametrize(("path", "prediction"), [(VP(), "v"), (Flow(t_max=0.999), "flow")], ids=["vp", "flow"])
def test_swiftbrush_improves_on_the_fitted_net(path, prediction):
    """400 rounds of 256 take at least a third off the distance, at the rates of a short run."""
    short = dict(steps=400, batch_size=256, seconds=600, lr={"student": 1e-3, "fake": 1e-3})
    result = converge("swiftbrush", ring(path, 4, std=0.3), prediction=prediction, **short)
    assert result.sliced_w2 < 0.67 * result.start
    assert result.floor < 0.02  # two samples of 20 000; below any result by far
    assert result.floor < result.sliced_w2
    assert set(result.per_label) == {0, 1, 2, 3}
    assert all(result.floor / 2 < d < 2 * result.start for d in result.per_label.values())
    assert result.true_weights == [0.25] * 4
    assert sum(result.mode_weights) == pytest.approx(1, abs=1e-3)
    assert all(found > true / 2 for found, true in zip(result.mode_weights, result.true_weights, strict=True))
    assert result.rounds == 400
    assert result.seconds > 0
    assert json.loads(json.dumps(result.as_dict()))["rounds"] == result.rounds


class Drawn(nn.Module):
    """In one call what a teacher draws in 64 steps under a guidance."""

    def __init__(self, teacher, scale):
        super().__init__()
        self.net, self.path = Guided(teacher, scale, teacher.null), teacher.path

    def forward(self, x, t, cond):
        x0 = solve(self.net, self.path, x / FewStep(self.path).first, cond, 64)
        return Estimate(x0, x0)


@pytest.mark.parametrize(("method", "near"), [("speedupnet", 2.0), ("guided-distillation", 2.0), ("kd", 1.0)])
def test_what_distils_guidance_is_measured_against_the_guided_teacher(method, near, monkeypatch):
    """Away from it are one who draws without guidance, and of any other method one who draws under it."""
    monkeypatch.setattr("onestroke.truth.SAMPLES", 5_000)
    teacher = ring(EDM(), 4, std=0.3).float()
    one, other = Drawn(teacher, near), Drawn(teacher, 3.0 - near)
    few, guided = FewStep(teacher.path), Guided(teacher, 2.0, teacher.null)
    found = measure(Distilled(method, teacher, one, other, guided, few, few, 0, 1, 0.0))
    assert found.sliced_w2 < 2 * found.floor
    assert found.start > 4 * found.floor


def test_uneven_float64_teacher_and_options():
    """Arrays of float64, one label of two components, an option of the method and a per-player setting."""
    means, std = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0], [-1.0, -2.0, 1.0]], dtype=torch.float64), [0.3] * 3
    teacher = GaussianMixture(VP(), means, std, weights=[2, 1, 1], labels=[0, 3, 3])
    result = converge("swiftbrush", teacher, seconds=1, batch_size=64, lr={"fake": 1e-3, "*": 1e-4}, null_rate=0.2)
    assert set(result.per_label) == {0, 3}
    assert result.true_weights == [0.5, 0.25, 0.25]
    assert math.isfinite(result.sliced_w2)
    assert teacher.means.dtype == torch.float64


def test_a_fitted_net_is_close_to_the_teacher():
    """What converge starts from: the net explains a good part of what the labels' mean leaves."""
    teacher = ring(VP(), 4, std=0.3)
    net = fit(teacher, "x0", 1.5)
    label = torch.arange(400) % 4
    generator = torch.Generator().manual_seed(0)
    t = torch.full((400,), 0.5, dtype=torch.float64)
    x = VP().mix(teacher.sample(label, generator), torch.randn(400, 2, generator=generator), t)
    with torch.no_grad():
        got, want = net(x, t, {"label": label}).x0, teacher(x, t, {"label": label}).x0
    assert (got - want).square().mean() < 0.1 * want.square().mean()


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("swiftbrsh", {}, "unknown method 'swiftbrsh'. Did you mean 'swiftbrush'"),
        ("swiftbrush", {"guidance_scal": 2.0}, "unknown setting 'guidance_scal'. Did you mean 'guidance_scale'"),
        ("swiftbrush", {"lr": {"teacher": 1.0}}, "unknown player in setting 'lr' 'teacher'"),
        ("swiftbrush", {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ("swiftbrush", {"student_steps": 4}, "'swiftbrush' trains at most 1 steps, not 4"),
    ],
)
def test_what_cannot_run_is_refused_at_once(method, settings, said):
    with pytest.raises(InputError) as error:
        converge(method, ring(VP()), seconds=1000, **settings)
    assert said in str(error.value)


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_the_reward_is_constant_on_the_truth(dim):
    """One sample in ten thousand at most has another; outside it is half the squared distance, and pulls back."""
    means, generator = 5 * torch.eye(dim + 1, dim, dtype=torch.float64), torch.Generator().manual_seed(0)
    teacher = GaussianMixture(VP(), means, 0.3, labels=torch.arange(dim + 1) // 2)
    reward, label = inside(teacher), torch.randint(0, dim // 2 + 1, (200_000,), generator=generator)
    assert (reward(teacher.sample(label, generator), {"label": label}) != 0).double().mean() < 1e-4
    radius, way = 0.3 * (dim**0.5 + 3), torch.zeros(dim, dtype=torch.float64)
    way[-1] = -1.0
    x = (means[0] + way * (radius + tensor(-0.1, 0.0, 0.2, 0.5))[:, None]).requires_grad_(True)
    got = reward(x, {"label": torch.zeros(4, dtype=torch.int64)})
    torch.testing.assert_close(got, -tensor(0.0, 0.0, 0.2, 0.5).square() / 2)
    got.sum().backward()
    torch.testing.assert_close(x.grad, -way * tensor(0.0, 0.0, 0.2, 0.5)[:, None])
    other = {"label": torch.full((1,), int(teacher.labels.max()))}
    if dim > 1:
        assert reward(means[:1], other) < 0 == reward(means[:1], {"label": torch.tensor([-1])})


# ---- the distance --------------------------------------------------------------------------------------------


def test_sliced_w2_of_gaussians_in_one_dimension():
    """W2 of N(m1, s1^2) and N(m2, s2^2) is hypot(m1 - m2, s1 - s2): the same quantiles, so exact to rounding."""
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    x, y = (3 + 2 * quantiles)[:, None], (-1 + 0.5 * quantiles)[:, None]
    spread = quantiles.square().mean()  # 1 but for the truncated tails
    assert sliced_w2(x, y) == pytest.approx(math.sqrt(16 + 1.5**2 * spread), rel=1e-9)
    assert sliced_w2(x, y) == pytest.approx(math.hypot(4, 1.5), rel=1e-3)


@pytest.mark.parametrize("dim", [2, 8])
def test_sliced_w2_of_gaussians_in_more(dim):
    """Isotropic: sqrt(|m1 - m2|^2 / D + (s1 - s2)^2). The mean of 128 squared cosines is off by at most
    5 sqrt(2/128) / 2 < 32 % of the first term, and the samples by 1 %."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 20_000, dim, generator=generator)
    shift = torch.zeros(dim)
    shift[0] = 1.0
    got = sliced_w2(3 * x, y + shift)
    assert math.sqrt(4 + 0.68 / dim) * 0.99 < got < math.sqrt(4 + 1.32 / dim) * 1.01
    assert sliced_w2(x, y) < 0.03


def test_sliced_w2_is_a_distance():
    x, y = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert sliced_w2(x, x[torch.randperm(500, generator=torch.Generator().manual_seed(3))]) == 0
    assert sliced_w2(x, y) == sliced_w2(y, x) > 0
    assert sliced_w2(2 * x, 2 * y) == pytest.approx(2 * sliced_w2(x, y), rel=1e-12)


def test_sliced_w2_refuses_samples_of_two_sizes():
    with pytest.raises(ValueError, match="samples of one size, got 3 and 4"):
        sliced_w2(torch.zeros(3, 2), torch.zeros(4, 2))
