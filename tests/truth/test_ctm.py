"""CTM: jumps between any two times, what the gradient flows through, the denoising term and the adversary, against
closed forms."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from contract.build import small_net
from onestroke.errors import InputError
from onestroke.method import Batch
from onestroke.methods.consistency.ctm import CTM
from truth import segment_checks as checks
from truth.adversarial_checks import Linear, Seen, logit
from truth.checks import close, labels, make_path, parts, tensor
from truth.segment_checks import PATHS, SLOW, STUDENT, Drawn, Exact, Line, M, S, flow, gauss, moved
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", PATHS)
ROWS, LEVEL = 16, 0.45
SOURCE = "onestroke.methods.consistency.ctm"


def made(cls, path, teacher=None, scale=1.0, **options):
    """The method with an exact teacher and, where it has any, the linear head."""
    net = gauss(path) if teacher is None else teacher
    given = replace(parts(path, Seen(net), small_net(path, "x0", "student"), None, scale), shape=(2,))
    with mock.patch("onestroke.method.Parts.heads", return_value=Linear()):
        return cls(given, **{"levels": 10, "gan_weight": 0.0, **options})


def play(cls, path, student, slow=None, teacher=None, scale=1.0, exact=False, label=0, normals=(), **options):
    """The turns, the method and what was drawn: k, i and s over all that they can be; the other terms at LEVEL."""
    method = made(cls, path, teacher, scale, **options)
    method.student, method.slow = student, student if slow is None else slow
    u = (torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS
    drawn = [u, (u * 3) % 1, (u * 5) % 1]
    x0, z, e = M + S * checks.noise(ROWS, 41), checks.noise(ROWS, 42), checks.noise(ROWS, 43)

    def level(draw, path, mean, std):
        assert (mean, std) == (-1.2, 1.2)
        return path.snap(tensor(LEVEL).expand(ROWS))

    at = mock.patch("onestroke.times.log_normal", level)
    steps = cls.step.__globals__
    with at, mock.patch.dict(steps, {"heun": lambda net, path, x, t, s, cond: flow(path, x, t, s)} if exact else {}):
        turns = list(method.step(Batch(z, labels(ROWS, label), Drawn(drawn, [e, *normals]), x0), 1))
    return turns, method, drawn, x0, z, e


def chosen(method, drawn):
    """k of 1, 2, 3, as likely as 1 : 2 : 3; i from k on; s from the data to i - k; by hand."""
    k = torch.bucketize(drawn[0], tensor(1 / 6, 3 / 6), right=False) + 1
    i = k + (drawn[1] * (len(method.grid) - k)).floor().long()
    j = (drawn[2] * (i - k + 1)).floor().long()
    return k, i, j


@each
def test_the_exact_map_between_any_two_times_is_the_fixed_point(name):
    path = make_path(name)
    student = Exact(path)
    (turn,), method, drawn, *_ = play(CTM, path, student, exact=True)
    assert turn.terms["ctm"] < 1e-18
    k, i, j = chosen(method, drawn)
    assert {1, 2, 3} == set(k.tolist())
    assert (j == i - k).any()
    assert (j == 0).any()
    student.shift.data += 0.1
    assert play(CTM, path, student, exact=True)[0][0].terms["ctm"] > 1e-5


def test_the_inner_network_of_an_exact_jump_is_the_published_one():
    """On EDM with m = 0, g*(x, t, s) = x t (sqrt((s^2 + c^2) / (t^2 + c^2)) - s / t) / (t - s), D at s -> t; and G is
    s / t x + (1 - s / t) g."""
    path = make_path("edm")
    x, t, s = tensor([1.0], [-0.4], [2.0]), tensor(0.9, 0.7, 0.5), tensor(0.2, 0.6, 0.4999999)
    (_, bt), (_, bs) = path.ab(t), path.ab(s)
    bt, bs = bt[:, None], bs[:, None]
    with mock.patch.object(checks, "flow", lambda path, x, t, s: flow(path, x, t, s, 0.0)):
        est = Exact(path)(x, t, {"s": s})
    close(est.x0, x * bt * (((bs**2 + S**2) / (bt**2 + S**2)).sqrt() - bs / bt) / (bt - bs), 1e-6)
    close(est.x0[2], checks.posterior(path, x, t, 0.0)[2], 1e-4)
    close(path.mix(est.x0, est.eps, s), bs / bt * x + (1 - bs / bt) * est.x0)


def jumped(path, net, x, t, s):
    """By hand: a x0 + b eps at s of x0 = mu + (k + c s) x; x itself where t = s."""
    return torch.where(
        (t > s)[:, None], moved(path, x, t.clamp_min(path.t_min), s, net.mu + net.k * x + net.c * s[:, None] * x), x
    )


def hops_by_hand(path, method, x, k, i):
    """Heun steps over b / a between neighbours of the grid, from i to i - k: 1, 2 or 3 of them, row by row."""
    teacher, rows = gauss(path), []
    for row in range(ROWS):
        y, now = x[row : row + 1], int(i[row])
        for low in range(now - 1, now - int(k[row]) - 1, -1):
            t, s = method.grid[low + 1][None], method.grid[low][None]
            (a, b), (c, d) = ([v.item() for v in path.ab(r)] for r in (t, s))
            one = teacher(y, t, labels(1))
            end = c * one.x0 + d * one.eps
            if a > 0 and b / a <= 80.01:
                end = end + c * (d / c - b / a) / 2 * (teacher(end, s, labels(1)).eps - one.eps)
            y = end
        rows.append(y)
    return torch.cat(rows)


def trajectory_term(cls, path, **options):
    """Value and gradient typed by hand; the gradient runs through the frozen last jump."""
    student, slow = Line(path, *STUDENT, 0.5), Line(path, *SLOW, -0.3)
    (turn,), method, drawn, x0, z, _ = play(cls, path, student, slow, **options)
    k, i, j = chosen(method, drawn)
    t, u, s = (method.grid[v] for v in (i, i - k, j))
    a, b = (v[:, None] for v in path.ab(t))
    xt = a * x0 + b * z
    zero = 0 * s
    with torch.no_grad():
        xu = hops_by_hand(path, method, xt, k, i)
        target = jumped(path, slow, jumped(path, student, xu, u, s), s, zero)
    ahead = jumped(path, slow, jumped(path, student, xt, t, s), s, zero)
    norm = torch.hypot(*path.ab(zero))[:, None]
    checks.same_gradient(turn.terms["ctm"], (((ahead - target) / norm) ** 2).mean(), student, ("mu", "k", "c"), 1e-8)
    assert turn.follow == {"slow": 0.999}
    assert student.c.grad is None


@each
def test_the_trajectory_term_is_the_typed_one(name):
    trajectory_term(CTM, make_path(name))


def denoising_term(cls, path, name="vp"):
    """(b^2 / a^2 + 1/4) / (b / 2 a)^2 times the squared error of x0 at s = t."""
    student = Line(path, *STUDENT, 0.5)
    (turn,), _, _, x0, _, e = play(cls, path, student, dsm=2.0)
    t = path.snap(tensor(LEVEL))
    a, b = (v[:, None] for v in path.ab(t))
    error = student.mu + (student.k + student.c * t[:, None]) * (a * x0 + b * e) - x0
    weight = ((b / a) ** 2 + 0.25) / (0.5 * b / a) ** 2
    checks.same_gradient(turn.terms["dsm"], 2 * (weight * error**2).mean(), student, ("mu", "k", "c"))


@each
def test_the_denoising_term_is_the_typed_one(name):
    denoising_term(CTM, make_path(name))


def guided(cls):
    path = make_path("vp")

    def found(teacher, scale):
        student, slow = Line(path, *STUDENT, 0.5), Line(path, *SLOW, -0.3)
        return play(cls, path, student, slow, teacher, scale)[0][0].terms["ctm"]

    close(found(checks.Classes(path), 3.0), found(checks.Classes(path, 3 * M), 1.0))
    assert (found(checks.Classes(path), 3.0) - found(checks.Classes(path), 1.0)).abs() > 1e-5


def test_guidance_scales_the_mean():
    guided(CTM)


def test_too_many_hops_are_refused():
    path = make_path("vp")
    with pytest.raises(InputError, match="hops=10 must be from 1 to 9"):
        made(CTM, path, hops=10)


def adversary(cls, path):
    """Where the average sends the student's landing must pass for real, under noise of LEVEL; the other terms stay."""
    student, slow = Line(path, *STUDENT, 0.5), Line(path, *SLOW, -0.3)
    normals = [checks.noise(ROWS, seed) for seed in (1, 2, 3)]
    plain = play(cls, path, student, slow)[0][0].terms
    turns, method, drawn, x0, z, _ = play(cls, path, student, slow, normals=list(normals), gan_weight=0.3, gan_from=1)
    _, i, j = chosen(method, drawn)
    t, s, zero = method.grid[i], method.grid[j], torch.zeros(ROWS, dtype=torch.float64)
    xt = sum(v[:, None] * y for v, y in zip(path.ab(t), (x0, z), strict=True))
    ahead = jumped(path, slow, jumped(path, student, xt, t, s), s, zero)
    (a, b), (c, d) = ([v[:, None] for v in path.ab(r)] for r in (path.snap(zero + LEVEL), zero))

    def fake(e):
        return logit(a / c * ahead + (b**2 - (a * d / c) ** 2).sqrt() * e)

    assert [turn.player for turn in turns] == ["student", "heads"]
    first, second = turns
    assert first.follow == {"slow": 0.999}
    checks.same_gradient(first.terms["gan"], -0.3 * fake(normals[0]).mean(), student, ("mu", "k", "c"))
    assert {k: v.item() for k, v in first.terms.items() if k != "gan"} == {k: v.item() for k, v in plain.items()}
    real = logit(a * x0 + b * normals[1])
    close(second.terms["gan"], (torch.relu(1 - real).mean() + torch.relu(1 + fake(normals[2])).mean()).detach())
    second.terms["gan"].backward()
    assert method.teacher.gain.grad is None
    assert student.mu.grad is None
    assert len(play(cls, path, student, slow, gan_weight=0.3, gan_from=2)[0]) == 1


@each
def test_the_adversary_is_the_typed_one(name):
    adversary(CTM, make_path(name))


def test_without_an_adversary_there_are_no_heads():
    method = made(CTM, make_path("vp"))
    assert method.players == ("student",)
    assert not hasattr(method, "heads")
    assert CTM.needs_of({"gan_weight": 0.0}) == {"x0"}
    assert CTM.needs_of({"gan_weight": 0.1}) == CTM.needs == {"x0", "features"}


def stepped(module):
    for name in ("vp", "edm"):
        trajectory_term(module.CTM, make_path(name))


def denoised(module):
    denoising_term(module.CTM, make_path("vp"))


def scaled(module):
    guided(module.CTM)


def judged(module):
    for name in ("vp", "edm"):
        adversary(module.CTM, make_path(name))


MUTANTS = [
    ("return jump(self.slow", "return jump(self.student", stepped),
    ("euler(self.student, path, xt", "euler(self.slow, path, xt", stepped),
    ("torch.zeros_like(s), {**cond", "torch.zeros_like(s), {**cond, 's': s} or {**cond", stepped),
    ("xt, t, s, there), s, cond)", "xt, t, s, there).detach(), s, cond)", stepped),
    ("jump(self.student, path, xu", "jump(self.slow, path, xu", stepped),
    ("there = grid[i], {**cond, \"s\": s}", "there = grid[i], {**cond, \"s\": 0 * s}", stepped),
    ("(hop, hop + 1)", "(hop, hop)", stepped),
    ("draw.uniform() * (i - k + 1)", "draw.uniform() * (i + 1)", stepped),
    ("self.hops * (self.hops + 1)", "self.hops * self.hops", stepped),
    ("keep: float = 0.999", "keep: float = 0.99", stepped),
    ("{**cond, \"s\": t}, t", "cond, t", denoised),
    ("self.dsm * terms", "terms", denoised),
    ("sigma_data: float = 0.5", "sigma_data: float = 1.0", denoised),
    ("self.mean, self.std)\n", "self.std, self.mean)\n", denoised),
    ("mean: float = -1.2", "mean: float = 0.0", denoised),
    ("std: float = 1.2", "std: float = 1.0", denoised),
    ("self.guide(self.teacher)", "self.teacher", scaled),
    ("self.mean, self.std), torch", "self.std, self.mean), torch", judged),
    ("self.judge(path.diffuse(ahead,", "self.judge(path.diffuse(target,", judged),
    ("gan = self.gan_weight *", "gan =", judged),
    ("gan_student(logits", "gan_student(-logits", judged),
    ("path.mix(batch.x0, draw.normal(ahead), t)", "path.mix(target, draw.normal(ahead), t)", judged),
    ("path.diffuse(ahead.detach()", "path.diffuse(ahead", judged),
    ("with frozen(self.teacher):", "if True:", judged),
    ("step < self.gan_from", "step <= self.gan_from", judged),
    ('{**loss, "gan": gan}', '{"ctm": loss["ctm"], "gan": gan}', judged),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new))
