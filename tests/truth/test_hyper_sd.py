"""Hyper-SD: segments that halve, jumps within them, the adversary's share, the reward and the scores, against closed
forms."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from contract.build import build, data, settings_of, snapshot
from contract.test_methods import assert_same
from onestroke.errors import InputError
from onestroke.methods.consistency.hyper_sd import HyperSD
from onestroke.paths import EDM
from onestroke.training.train import Trainer
from onestroke.truth import distil, measure, ring
from truth import segment_checks as checks
from truth.adversarial_checks import C, W
from truth.checks import close, make_path
from truth.segment_checks import PATHS, SLOW, STUDENT, Line, M, S, gauss, posterior
from truth.test_mutants import broken

each = pytest.mark.parametrize("name", PATHS)
PLAIN = {"gan_weight": 0.0, "grid": 8, "segments": 4, "stage_steps": 1}
WHOLE = {**PLAIN, "whole": 1.0}
U = 0.6


@each
def test_the_exact_map_to_the_end_of_each_segment_is_the_fixed_point(name):
    for stage, width in ((0, 2), (1, 4), (2, 8), (9, 8)):
        edges = lambda method, width=width: method.grid[::width]  # noqa: E731
        checks.rests_at_the_exact_map(HyperSD, make_path(name), stage, edges, **WHOLE)


@each
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_composed_gain_does_not_depend_on_the_segments(name, stage):
    checks.composes(HyperSD, make_path(name), lambda method: method.grid[:: 2 << stage], step=stage, **WHOLE)


def hand(path, method, student, slow, x0, z, width=4):
    """Ends the part U from the segment's end to the lower state, and what there is by hand."""
    xt, t, s = checks.states(method, path, x0, z)
    low, high = (method.grid[i::width][: 8 // width].repeat_interleave(width) for i in (0, width))
    end = path.snap(low + U * (s - low))
    return xt, end, (t - end) / (high - low), checks.hand_loss(path, xt, t, s, end, student, slow)


def regression(cls, path, weight=0.0):
    """Value and gradient typed by hand, in the second of three stages: 2 segments."""
    student, slow = Line(path, *STUDENT), Line(path, *SLOW)
    method = checks.made(cls, path, student, slow=slow, **{**PLAIN, "gan_weight": weight})
    turns, x0, z = checks.play(method, [0.5, U], step=1)
    _, _, far, (loss, *_) = hand(path, method, student, slow, x0, z)
    checks.same_gradient(turns[0].terms["consistency"], ((1 - weight * far) * loss[:, 0]).mean(), student)
    assert turns[0].follow == {"slow": 0.95}
    assert [turn.player for turn in turns] == ["student", "heads"][: 1 + bool(weight)]


@each
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_regression_is_the_typed_one(name, weight):
    regression(HyperSD, make_path(name), weight)


def adversary(cls, path, u=0.25):
    """By the part of its segment that it crosses, a jump must pass for real at a level between its two ends."""
    student, slow = Line(path, *STUDENT), Line(path, *SLOW)
    method = checks.made(cls, path, student, slow=slow, **{**PLAIN, "gan_weight": 0.5})
    normals = [checks.noise(8, seed) for seed in (1, 2, 3)]
    turns, x0, z = checks.play(method, [0.5, U, u], step=1, normals=list(normals))
    _, end, far, (_, here, _) = hand(path, method, student, slow, x0, z)
    at = path.snap(end + u * (method.grid[1:] - end)).clamp_min(path.t_min)
    (a, b), (c, d) = ([v[:, None] for v in path.ab(r)] for r in (at, end))

    def logit(x):
        return W[0] * x + W[1] * x**2 + C

    def fake(e):
        return logit(a / c * here + (b**2 - (a * d / c) ** 2).sqrt() * e)

    first, second = turns
    checks.same_gradient(first.terms["gan"], -(0.5 * far[:, None] * fake(normals[0])).mean(), student)
    real = logit(a * x0 + b * normals[1])
    close(second.terms["gan"], (torch.relu(1 - real).mean() + torch.relu(1 + fake(normals[2])).mean()).detach())
    second.terms["gan"].backward()
    assert method.teacher.gain.grad is None
    assert student.mu.grad is None


@each
def test_the_adversary_is_the_typed_one(name):
    adversary(HyperSD, make_path(name))


def feedback(cls):
    """A reward of the student's x0 is maximised, at its weight."""
    path = make_path("vp")
    student = Line(path, *STUDENT)
    method = checks.made(
        cls, path, student, reward=lambda x0, cond: -((x0 - 1) ** 2).sum(1) / 2, reward_weight=3.0, **PLAIN
    )
    turns, x0, z = checks.play(method)
    xt, *_ = checks.states(method, path, x0, z)
    want = 1.5 * ((student.mu + student.k * xt - 1) ** 2).mean()
    checks.same_gradient(turns[0].terms["reward"], want, student)


def test_the_feedback_is_the_typed_one():
    feedback(HyperSD)


LAW = M + 0.4, 1.3 * S
"""Of the fake."""
LAST = {**PLAIN, "segments": 1, "score_weight": 1.0}


def levels(*levels):
    """The times that are drawn from an interval, one after the other, and the intervals."""
    left, found = list(levels), []

    def drawn(draw, path, lo=0.0, hi=1.0):
        found.append((lo, hi))
        return torch.full((draw.size,), left.pop(0), dtype=torch.float64)

    return mock.patch("onestroke.times.uniform", drawn), found


def scores(cls, path):
    """The x0 of noisy states descends w (D_fake - D_teacher) / mean |x0 - D_teacher| at a level of its own; the fake
    learns to denoise it; in the last stage alone, and nothing else changes."""
    student, slow, fake = Line(path, *STUDENT), Line(path, *SLOW), gauss(path, *LAW)
    options = {**PLAIN, "score_weight": 3.0}
    method = checks.made(cls, path, student, slow=slow, fake=fake, **options)
    plain = checks.play(checks.made(cls, path, student, slow=slow, **PLAIN), [0.5, U], step=2)[0]
    times, normals = [path.snap(torch.tensor(v, dtype=torch.float64)).item() for v in (0.9, 0.5, 0.3)], []
    at, asked = levels(*times)
    normals = [checks.noise(8, seed) for seed in (1, 2, 3)]
    with at:
        turns, x0, _ = checks.play(method, [0.5, U], step=2, normals=list(normals))
    assert asked == [(0.8, path.grid(1)[0]), (0.02, 0.98), (0.0, 1.0)]
    assert [turn.player for turn in turns] == ["student", "fake"]

    def noised(x, k):
        t = torch.full((8,), times[k], dtype=torch.float64)
        a, b = (v[:, None] for v in path.ab(t))
        return a * x + b * normals[k], t

    x = student.mu + student.k * noised(x0, 0)[0]
    xt, t = noised(x.detach(), 1)
    real, other = posterior(path, xt, t), posterior(path, xt, t, *LAW)
    slope = (other - real) / (x.detach() - real).abs()
    params = student.mu, student.k
    got, want = (
        torch.autograd.grad(v, params, retain_graph=True) for v in (turns[0].terms["dm"], (3 * slope * x).mean())
    )
    close(torch.stack(got), torch.stack(want).detach(), 1e-8)
    assert (torch.stack(want).abs() > 1e-6).all()
    close(turns[0].terms["consistency"], plain[0].terms["consistency"].item())

    xt, t = noised(x.detach(), 2)
    a, b = (v[:, None] for v in path.ab(t))
    close(turns[1].terms["dsm"], (((xt - a * posterior(path, xt, t, *LAW)) / b - normals[2]) ** 2).mean())
    assert not turns[1].terms["dsm"].requires_grad
    assert len(checks.play(method, [0.5, U], step=1)[0]) == 1


@each
def test_the_score_distillation_is_the_typed_one(name):
    scores(HyperSD, make_path(name))


@each
def test_the_scores_rest_where_the_fake_has_the_teachers_law(name):
    path = make_path(name)
    for law, rests in ((M, S), True), ((M + 0.01, S), False):
        student = Line(path, *STUDENT)
        method = checks.made(HyperSD, path, student, fake=gauss(path, *law), **LAST)
        grads = torch.autograd.grad(checks.loss_of(method, key="dm"), (student.mu, student.k))
        assert ((torch.stack(grads).abs() < 1e-13) == rests).all()


def test_players_follow_the_weights():
    def players(gan, score):
        return checks.made(
            HyperSD, path, Line(path, *STUDENT), **{**LAST, "gan_weight": gan, "score_weight": score}
        ).players

    path = make_path("vp")
    assert players(0.0, 0.0) == ("student",)
    assert players(0.5, 0.0) == ("student", "heads")
    assert players(0.0, 1.0) == ("student", "fake")
    assert players(0.5, 1.0) == HyperSD.players == ("student", "heads", "fake")


def run(folder, stop, batch_size=8, accumulate=1):
    """A run of all three players that is played and saved to `stop` of its six rounds, the last four of one segment."""
    settings = settings_of(steps=6, batch_size=batch_size, accumulate=accumulate)
    method = build("hyper-sd", settings=settings, segments=2, stage_steps=2, score_weight=1.0)
    trainer = Trainer(method, data(), settings, folder)
    if trainer.latest():
        trainer.resume()
    while trainer.round < stop:
        trainer.one_round(trainer.round / 6)
    trainer.save()
    return trainer


def test_with_scores_a_run_can_be_split_and_resumed(tmp_path):
    straight = snapshot(run(tmp_path / "straight", 6))
    for stop in (1, 4, 6):
        stopped = run(tmp_path / "stopped", stop)
    assert_same(snapshot(stopped), straight)
    assert_same(snapshot(run(tmp_path / "split", 6, 4, 2)), straight, 1e-10)


def guided(cls):
    checks.guided_mean_is_scaled(cls, make_path("vp"), **PLAIN)
    checks.guided_mean_is_scaled(cls, make_path("vp"), key="dm", fake=gauss(make_path("vp")), **LAST)


def test_guidance_scales_the_mean():
    guided(HyperSD)


def test_one_set_of_adapters_draws_in_every_number_of_steps():
    """Trained once, on a ring without labels, which one call cannot cut apart: many calls of it come nearer than one,
    and every number of them takes two thirds off the distance of the fitted network in as many."""
    student = distil("hyper-sd", ring(EDM(), 4, std=0.3, labelled=False), steps=240, batch_size=256, seconds=600,
                     grid=16, keep=0.5, stage_steps=30)  # fmt: skip
    live = [name for name, p in student.student.named_parameters() if p.requires_grad]
    assert live
    assert all("lora_" in name for name in live)
    found = {k: measure(student, k) for k in (1, 2, 4, 8)}
    assert {k: each.student_steps for k, each in found.items()} == {1: 1, 2: 2, 4: 4, 8: 8}
    assert all(each.sliced_w2 < each.start / 3 for each in found.values())
    assert max(found[4].sliced_w2, found[8].sliced_w2) < 0.9 * found[1].sliced_w2
    with pytest.raises(InputError, match="'hyper-sd' trains at most 8 steps, not 16"):
        measure(student, 16)


def test_what_it_needs_follows_its_options():
    def needs(gan, reward):
        return HyperSD.needs_of({"gan_weight": gan, "reward_weight": reward})

    assert needs(0.5, 0.0) == HyperSD.needs == {"x0", "features"}
    assert needs(0.0, 0.0) == {"x0"}
    assert needs(0.5, 1.0) == {"x0", "features", "reward"}


def test_what_does_not_fit_is_refused():
    path, student = make_path("vp"), Line(make_path("vp"), *STUDENT)
    with pytest.raises(InputError, match=r"segments=6 must be the student's 1 step\(s\) doubled some times"):
        checks.made(HyperSD, path, student, segments=6)
    with pytest.raises(InputError, match="a grid of 50 steps has no 8 equal segments; take a multiple of 8"):
        checks.made(HyperSD, path, student, grid=50)


def regressed(module):
    for name in ("vp", "edm"):
        regression(module.HyperSD, make_path(name), 0.5)


def judged(module):
    for name in ("vp", "edm"):
        adversary(module.HyperSD, make_path(name))


def scored(module):
    for name in ("vp", "edm"):
        scores(module.HyperSD, make_path(name))


def rewarded(module):
    feedback(module.HyperSD)


def scaled(module):
    guided(module.HyperSD)


MUTANTS = [
    ("jump(self.slow", "jump(self.student", regressed),
    ("low.lerp(s, draw", "low.lerp(t, draw", regressed),
    ("step // self.stage_steps", "0 * step", regressed),
    ("((1 - far)", "((1 + far)", regressed),
    ("* (t - end) / (high - low)", "* (t - end) / high", regressed),
    ("xt, t, s, cond)\n", "xt, t, end, cond)\n", regressed),
    ("self.guide(self.teacher), path", "self.teacher, path", scaled),
    ("matching(self.guide(self.teacher)", "matching(self.teacher", scaled),
    ("descend(x, slope)", "descend(x, -slope)", scored),
    ("self.fake, path, x, cond", "self.slow, path, x, cond", scored),
    ("(draw, path, self.lo, self.hi)", "(draw, path)", scored),
    ("(score_from, parts", "(0.0, parts", scored),
    ("and segments == 1", "and segments <= 2", scored),
    ('loss["dm"] = self.score_weight *', 'loss["dm"] =', scored),
    ("path.mix(batch.x0, draw.normal(here), t1), t1", "path.mix(batch.x0, batch.noise, t1), t1", scored),
    ("x.detach(), cond, t, draw)", "batch.x0, cond, t, draw)", scored),
    ("path, x.detach()", "path, x", scored),
    ("-self.reward_weight *", "self.reward_weight *", rewarded),
    ("self.reward(est.x0", "self.reward(xt", rewarded),
    ("end.lerp(t, draw", "end.lerp(high, draw", judged),
    ("path.diffuse(here, end", "path.diffuse(here, low", judged),
    ("self.loss, weight=far)", "self.loss)", judged),
    ("path.mix(batch.x0, draw.normal(here), u)", "path.mix(here.detach(), draw.normal(here), u)", judged),
    ("path.diffuse(here.detach()", "path.diffuse(here", judged),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    source = "onestroke.methods.consistency.hyper_sd"
    check(broken(source, old, old))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(source, old, new))
