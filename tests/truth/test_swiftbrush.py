"""SwiftBrush and the terms it is made of, against the sheet's closed forms."""

from __future__ import annotations

import pytest
import torch

from onestroke import terms, times
from onestroke.denoiser import Denoiser
from onestroke.draws import Draws
from onestroke.method import Batch
from onestroke.methods.distribution.swiftbrush import SwiftBrush
from onestroke.paths import EDM, VP, Estimate, Flow
from onestroke.teachers.gaussian import GaussianMixture
from truth import checks
from truth.checks import EVERY, F64, NAMES, Affine, Given, at, close, fourfold, hand_ab, labels, make_path, tensor

each = pytest.mark.parametrize("name", NAMES)


# ---- the student's turn --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prediction"), EVERY)
def test_vsd_is_the_closed_form(name, prediction):
    checks.vsd_is_the_closed_form(SwiftBrush, make_path(name, prediction), prediction, *hand_ab(name))


@each
@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0])
def test_vsd_under_another_weight_is_the_closed_form(name, power):
    checks.vsd_is_the_closed_form(SwiftBrush, make_path(name), "x0", *hand_ab(name), sigma_power=power)


@each
@pytest.mark.parametrize("guide_fake", [True, False])
def test_vsd_is_the_closed_form_under_guidance(name, guide_fake):
    checks.guided_vsd_is_the_closed_form(SwiftBrush, make_path(name), *hand_ab(name), guide_fake=guide_fake)


def gradient(path, teacher, fake, scale, count=32):
    """The direction at each sample, with the method's own draws."""
    z = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    student = checks.Free(z)
    method = SwiftBrush(checks.parts(path, teacher, student, fake, scale))
    turn = next(method.step(Batch(z, labels(count, 1), Draws(0, 0, count)), 0))
    sum(turn.terms.values()).backward()
    return student.x.grad


@each
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_nothing_moves_when_the_fake_has_the_teachers_law(name, scale):
    path = make_path(name)
    same = checks.two_classes(path, 0.9, 0.5)
    assert (gradient(path, same, checks.two_classes(path, 0.9, 0.5), scale) == 0).all()
    assert (gradient(path, same, checks.two_classes(path, 0.6, 0.5), scale) != 0).all()


def test_student_moves_towards_the_teacher():
    """Sheet 30, trap 1. A student right of the teacher must move left, and one too narrow must widen."""
    path = VP()
    teacher = GaussianMixture(path, tensor([0.0]), 1.0)
    student, (z, e) = Affine(path, tensor(0.5), tensor(0.3)), fourfold(1)
    method = SwiftBrush(checks.parts(path, teacher, student, GaussianMixture(path, tensor([0.5]), 0.3)))
    with at(0.5):
        turn = next(method.step(Batch(z, labels(4), Given(e)), 0))
    sum(turn.terms.values()).backward()
    assert student.mu.grad > 0
    assert student.s.grad < 0


class Steep(torch.nn.Module):
    """A denoiser whose eps depends strongly on its input, to show whether gradient flows through x_t."""

    def forward(self, x, t, cond):
        return Estimate(x, x.sin() * 3)


def test_gradient_does_not_flow_through_the_noised_sample():
    """The pseudo-target form of the same direction: x moves along g / (B D) only, though g depends on x."""
    z, e = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    path, student = EDM(), checks.Free(z)
    teacher = GaussianMixture(path, torch.zeros(1, 3, dtype=F64), 1.0)
    method = SwiftBrush(checks.parts(path, teacher, student, Steep()))
    with at(checks.T):
        turn = next(method.step(Batch(z, labels(5), Given(e)), 0))
    sum(turn.terms.values()).backward()
    _, b = hand_ab("edm")
    xt = z + b * e
    g = b**2 / (1 + b**2) * (b * xt / (1 + b**2) - 3 * xt.sin())
    close(student.x.grad, g / 15)


@each
def test_each_turn_trains_its_own_player(name):
    checks.each_turn_trains_its_own_player(SwiftBrush, make_path(name))


class Recorder(torch.nn.Module):
    """A network that is exact and remembers the times and labels it was asked for."""

    def __init__(self, path, seen):
        super().__init__()
        self.net, self.seen = GaussianMixture(path, tensor([0.0]), 1.0), seen

    def forward(self, x, t, cond):
        self.seen.append((t, cond["label"]))
        return self.net(x, t, cond)


def record(path, rounds, **options):
    """((times of the student's turn), (times of the fake's), (labels of the fake's turn)) over rounds."""
    teacher, fake = [], []
    method = SwiftBrush(
        checks.parts(path, Recorder(path, teacher), checks.Free(torch.zeros(4, 1, dtype=F64)), Recorder(path, fake)),
        **options,
    )
    for step in range(rounds):
        list(method.step(Batch(torch.zeros(4, 1, dtype=F64), labels(4, 0), Draws(1, step, 4)), step))
    return torch.cat([t for t, _ in teacher]), torch.cat([t for t, _ in fake[1::2]]), [c for _, c in fake[1::2]]


@pytest.mark.parametrize("name", ["vp", "table", "edm", "flow"])
def test_times_are_the_published_ones(name):
    """The student looks at [0.02, 0.98]; the fake learns everywhere; on a table, at whole indices."""
    path = make_path(name)
    student, fake, _ = record(path, 500)
    for t, lo, hi in ((student, 0.02, 0.98), (fake, path.t_min, path.t_max)):
        assert lo - 1e-3 < t.min() < lo + 0.01
        assert hi - 0.01 < t.max() < hi + 1e-3
        assert t.mean().item() == pytest.approx((lo + hi) / 2, abs=5 * (hi - lo) / (12 * 2000) ** 0.5)
        if name == "table":
            close(t * 999, (t * 999).round(), rtol=0, atol=1e-9)
    assert path.t_min <= student.min()


def test_uniform_times_stay_inside_the_path():
    draw, path = Draws(0, 0, 1000), Flow(t_min=0.1, t_max=0.6)
    t = times.uniform(draw, path)
    assert t.dtype == F64
    assert 0.1 <= t.min() < 0.11
    assert 0.59 < t.max() <= 0.6
    assert times.uniform(draw, path, 0.3, 0.4).min() >= 0.3


# ---- the fake's turn -----------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("null", [False, True])
def test_fake_loss_is_the_closed_form(name, null):
    checks.fake_loss_is_the_closed_form(SwiftBrush, make_path(name), *hand_ab(name), null)


def test_the_null_prompt_is_seen_in_a_tenth_of_the_rounds():
    """1000 rounds of a coin of 0.1: 100 +- 5 standard deviations of 9.5, and always the whole batch."""
    seen = record(VP(), 1000)[2]
    assert all(len(c.unique()) == 1 for c in seen)
    assert 52 < sum((c == -1).all().item() for c in seen) < 148
    assert not any((c == -1).any() for c in record(VP(), 50, null_rate=0.0)[2])
    assert all((c == -1).all() for c in record(VP(), 50, null_rate=1.0)[2])


def test_the_null_prompt_takes_the_type_and_device_of_the_prompts():
    seen = []
    path = VP()
    method = SwiftBrush(
        checks.parts(path, Recorder(path, []), checks.Free(torch.zeros(2, 1, dtype=F64)), Recorder(path, seen)),
        null_rate=1.0,
    )
    cond = {"label": torch.zeros(2, dtype=torch.int32)}
    list(method.step(Batch(torch.zeros(2, 1, dtype=F64), cond, Draws(0, 0, 2)), 0))
    assert seen[-1][1].dtype == torch.int32
    assert seen[-1][1].tolist() == [-1, -1]


class Linear(Denoiser):
    """eps = w x_t + c, with its own (w, c) at each of the given times."""

    def __init__(self, path, times_, values):
        super().__init__(path, "eps")
        self.times, self.values = times_, values  # values (2, times)

    def predict(self, x, t, cond):
        index = (t[:, None] == self.times).double().argmax(1)
        w, c = self.values[:, index]
        return w[:, None] * x + c[:, None], ()


@pytest.mark.parametrize("name", ["vp", "table", "edm", "flow", "trig half"])
@pytest.mark.parametrize("weight", ["alpha^2", "one", "sigma^2"])
def test_the_best_linear_fake_is_the_analytic_one_whatever_the_weight(name, weight):
    """Sheet 4, item 7. The loss is quadratic in (w, c): one Newton step from anywhere finds its minimum, which must be
    eps = b (x_t - a mu) / (a^2 s^2 + b^2) at every time."""
    path, mu, s = make_path(name, "eps"), 0.7, 0.4
    where = torch.tensor([200, 400, 700], dtype=F64) / 999
    z, e = (n.repeat(3, 1) for n in fourfold(1))
    t = where.repeat_interleave(4)
    a, b = path.ab(t)
    w = {"alpha^2": a**2 / (a**2 + b**2), "one": None, "sigma^2": b**2 / (a**2 + b**2)}[weight]

    def loss(values):
        net = Linear(path, where, values)
        return terms.dsm(net, path, mu + s * z, labels(12), t, Given(e), weight=w)

    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    slope = torch.autograd.functional.jacobian(loss, start).flatten()
    curve = torch.autograd.functional.hessian(loss, start).reshape(6, 6)
    found = start - torch.linalg.solve(curve, slope).reshape(2, 3)
    a, b = tensor(*(hand_ab(name, u) for u in where.tolist())).unbind(1)
    q = a**2 * s**2 + b**2
    close(found, torch.stack([b / q, -a * b * mu / q]), rtol=1e-8, atol=1e-10)
    assert torch.linalg.eigvalsh(curve).min() > 0


def test_swiftbrush_trains_its_fake_to_the_same_optimum():
    """The same through the method: its fake's gradient vanishes at the analytic fake, and only there."""
    path, mu, s = VP(), 0.7, 0.4
    a, b = hand_ab("vp")
    q = a**2 * s**2 + b**2
    z, e = fourfold(1)
    for shift in (0.0, 0.1):
        values = torch.nn.Parameter(tensor([b / q + shift], [-a * b * mu / q]))
        fake = Linear(path, tensor(checks.T), values)
        fake.values = values
        teacher = GaussianMixture(path, tensor([0.0]), 1.0)
        method = SwiftBrush(checks.parts(path, teacher, Affine(path, tensor(mu), tensor(s)), fake))
        with at(checks.T):
            *_, turn = method.step(Batch(z, labels(4), Given(e, e)), 0)
        sum(turn.terms.values()).backward()
        # d/dw of a^2 (w x_t + c - e)^2 is 2 a^2 shift E[x_t^2]
        close(values.grad, tensor([2 * a**2 * shift * (a**2 * mu**2 + q)], [2 * a**2 * shift * a * mu]), atol=1e-14)


# ---- terms ---------------------------------------------------------------------------------------------------


def test_descend_has_its_gradient():
    checks.descend_has_its_gradient(terms)


def test_reduced_has_its_scale():
    checks.reduced_has_its_scale(terms)


@pytest.mark.parametrize(("reduce", "scale"), [("mean", 1 / 3), ("sum", 1.0)])
def test_dsm_reduces_and_weights_rows(reduce, scale):
    """A network that is wrong by exactly 1 in eps has weighted loss mean(weight) times D or 1."""
    path = VP()

    class Wrong(torch.nn.Module):
        def forward(self, x, t, cond):
            a, b = (c[:, None] for c in path.ab(t))
            return Estimate((x - b * (e + 1)) / a, e + 1)

    x0, e = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(3), dtype=F64)
    t, weight = torch.full((4,), 0.4, dtype=F64), tensor(1.0, 2.0, 3.0, 10.0)
    close(terms.dsm(Wrong(), path, x0, {}, t, Given(e), weight=weight, reduce=reduce), 4.0 * 3 * scale)
    close(terms.dsm(Wrong(), path, x0, {}, t, Given(e), reduce=reduce), 3 * scale)


@pytest.mark.parametrize("space", ["x0", "v", "flow"])
def test_dsm_spaces_differ_by_the_known_factor(space):
    """Sheet 30, traps 16 and 17: x0-error is (b/a)^2 eps-error, v-error on VP 1/a^2, u-error on RF 1/(1-t)^2."""
    path = Flow(t_max=0.999) if space == "flow" else VP()
    net = GaussianMixture(path, tensor([0.5]), 0.3)
    x0, e = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(4), dtype=F64)
    t = torch.full((6,), 0.3, dtype=F64)
    a, b = hand_ab("flow" if space == "flow" else "vp", 0.3)
    factor = {"x0": (b / a) ** 2, "v": 1 / a**2, "flow": 1 / (1 - 0.3) ** 2}[space]
    got, eps = (terms.dsm(net, path, x0, labels(6), t, Given(e), space=s) for s in (space, "eps"))
    close(got, factor * eps)


def test_dsm_noises_at_the_given_times():
    path, seen = EDM(), []

    class Spy(torch.nn.Module):
        def forward(self, x, t, cond):
            seen.append((x, t, cond))
            return Estimate(x, x)

    x0, e = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(5), dtype=F64)
    t = tensor(0.0, 0.5, 1.0)
    terms.dsm(Spy(), path, x0, labels(3, 7), t, Given(e))
    ((x, at_t, cond),) = seen
    sigma = tensor(*(hand_ab("edm", u)[1] for u in (0.0, 0.5, 1.0)))
    close(x, x0 + sigma[:, None] * e)
    assert torch.equal(at_t, t)
    assert cond["label"].tolist() == [7, 7, 7]
