"""Truths of the methods that jump between times: a Gaussian N(M, S^2), whose flow takes x at t to
a_s M + sqrt(V_s / V_t) (x - a_t M) at s, V = a^2 S^2 + b^2. Coefficients are the path's own, tested for themselves."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from onestroke.method import Batch, Parts
from onestroke.paths import Estimate, like
from onestroke.sampling import FewStep
from onestroke.teachers.gaussian import GaussianMixture
from truth.adversarial_checks import Linear, Seen
from truth.checks import F64, Given, close, labels, tensor

M, S = 0.3, 0.5
PATHS = ("vp", "edm", "flow", "table")
STUDENT, SLOW = (0.2, 0.7), (-0.1, 0.4)


class Drawn(Given):
    """Draws whose uniform and normal numbers are given, the last of each for good."""

    def __init__(self, uniforms, normals):
        super().__init__(*normals)
        self.size, self.uniforms = len(normals[0]), list(uniforms)

    def normal(self, like):
        return self.normals[0] if len(self.normals) == 1 else self.normals.pop(0)

    def uniform(self, lo=0.0, hi=1.0):
        u = self.uniforms[0] if len(self.uniforms) == 1 else self.uniforms.pop(0)
        return lo + (hi - lo) * torch.as_tensor(u, dtype=F64).expand(self.size)


def variance(path, t, std=S):
    a, b = path.ab(t)
    return a**2 * std**2 + b**2


def flow(path, x, t, s, mean=M, std=S):
    """Where the flow of N(mean, std^2) takes x from t to s."""
    (a, _), (c, _) = path.ab(t), path.ab(s)
    ratio = (variance(path, s, std) / variance(path, t, std)).sqrt()
    return like(c, x) * mean + like(ratio, x) * (x - like(a, x) * mean)


def posterior(path, x, t, mean=M, std=S):
    """E[x0 | x_t]."""
    a, _ = path.ab(t)
    return mean + like(a * std**2 / variance(path, t, std), x) * (x - like(a, x) * mean)


def moved(path, x, t, s, x0):
    """a x0 + b eps at s, eps what x0 leaves of x at t; x itself where t = s."""
    (a, b), (c, d) = ([like(v, x) for v in path.ab(u)] for u in (t, s))
    return torch.where(like(t - s, x) > 0, c * x0 + d * (x - a * x0) / b, x)


class Exact(nn.Module):
    """The network whose jump is the flow's: to cond["s"], or to the last of the edges below t; plus a shift of x0."""

    def __init__(self, path, edges=(0.0,)):
        super().__init__()
        self.path, self.edges, self.shift = path, torch.as_tensor(edges, dtype=F64), nn.Parameter(tensor(0.0))

    def forward(self, x, t, cond):
        s = cond["s"] if "s" in cond else self.edges[torch.searchsorted(self.edges.contiguous(), t.contiguous()) - 1]
        far = torch.where(t > s, s, t - 1e-2)
        x0 = self.path.through(x, t, flow(self.path, x, t, far), far).x0
        x0 = torch.where(like(t - s, x) > 0, x0, posterior(self.path, x, t)) + self.shift
        a, b = (like(c, x) for c in self.path.ab(t))
        return Estimate(x0, (x - a * x0) / b)


class Line(nn.Module):
    """x0 = mu + (k + c s) x, s the second time, 0 where it has none."""

    def __init__(self, path, mu, k, c=0.0):
        super().__init__()
        self.path, self.mu, self.k, self.c = path, *(nn.Parameter(tensor(v)) for v in (mu, k, c))

    def forward(self, x, t, cond):
        a, b = (like(v, x) for v in self.path.ab(t))
        x0 = self.mu + self.k * x + (self.c * like(cond["s"], x) * x if "s" in cond else 0)
        return Estimate(x0, (x - a * x0) / b)


class Classes(nn.Module):
    """Class 0 is N(m, S^2), the null condition N(0, S^2): guided by w, exactly N(w m, S^2)."""

    def __init__(self, path, m=M):
        super().__init__()
        self.path, self.m = path, m

    def forward(self, x, t, cond):
        mean = self.m * like(cond["label"] >= 0, x)
        x0 = mean + posterior(self.path, x - like(self.path.ab(t)[0], x) * mean, t, 0.0)
        a, b = (like(v, x) for v in self.path.ab(t))
        return Estimate(x0, (x - a * x0) / b)


def gauss(path, mean=M, std=S):
    return GaussianMixture(path, tensor([mean]), std)


def made(cls, path, student, teacher=None, slow=None, scale=1.0, calls=1, reward=None, fake=None, **options):
    """The method, for a student of so many calls; its target, if it has one, is `slow`, or the student itself."""
    few, null = FewStep(path, path.grid(calls), renoise="implied"), {"label": torch.tensor([-1])}
    teacher = gauss(path) if teacher is None else teacher
    seen = Seen(teacher) if options.get("gan_weight") else teacher
    method = cls(Parts(seen, student, lambda role: fake, few, null, scale, (1,), reward), **options)
    if "slow" in cls.targets:
        method.slow = student if slow is None else slow
    if options.get("gan_weight"):
        method.heads = Linear()
    return method


def rows(method, count=None):
    """One uniform number for each step of the grid, which chooses that step."""
    count = len(method.grid) - 1 if count is None else count
    return (torch.arange(count, dtype=F64) + 0.5) / count


def noise(count, seed=40):
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=F64)


def play(method, uniforms=(), step=0, label=0, normals=None):
    """The turns of a batch with one row in each step of the grid, and its (x0, noise)."""
    u = rows(method)
    x0, z = M + S * noise(len(u), 41), noise(len(u), 42)
    normals = [noise(len(u), 43)] if normals is None else normals
    draw = Drawn([u, *(uniforms or (0.5,))], normals)
    turns = list(method.step(Batch(z, labels(len(u), label), draw, x0), step))
    return turns, x0, z


def loss_of(method, *args, key="consistency", **options):
    turns, *_ = play(method, *args, **options)
    return turns[0].terms[key]


def states(method, path, x0, z):
    """(x_t, t, s) of the rows, by hand: the grid's steps from the data on."""
    t, s = method.grid[1:], method.grid[:-1]
    a, b = (like(v, x0) for v in path.ab(t))
    return a * x0 + b * z, t, s


def rests_at_the_exact_map(cls, path, step=0, edges=None, uniforms=(), **options):
    """A teacher whose steps are the flow's teaches the flow's jumps: no loss at them; an x0 off by 0.1 has one."""
    student = Exact(path)
    method = made(cls, path, student, **options)
    student.edges = method.edges if edges is None else edges(method)
    method.teacher = Exact(path, method.grid)
    assert loss_of(method, uniforms, step) < 1e-20
    student.shift.data += 0.1
    assert loss_of(method, uniforms, step) > 1e-7


class Gains(nn.Module):
    """x0 = gain(t) x."""

    def __init__(self, path):
        super().__init__()
        self.path, self.table, self.seen, self.dummy = path, {}, None, nn.Parameter(tensor(0.0))

    def forward(self, x, t, cond):
        self.seen = x, t
        gain = torch.stack([torch.as_tensor(self.table.get(round(v, 9), 0.0), dtype=F64) for v in t.tolist()])
        a, b = (like(v, x) for v in self.path.ab(t))
        x0 = like(gain, x) * x + self.dummy
        return Estimate(x0, (x - a * x0) / b)


def gain_of(cls, path, edges, step=0, uniforms=(), **options):
    """What the trained student, sampled over the edges, makes of its input: every step learns what it is taught.

    From the data on, so that each target is final when it is used.
    """
    student = Gains(path)
    method = made(cls, path, student, gauss(path, 0.0), **options)
    taught = {}

    def spy(here, there, path, end, *_):
        taught["end"], taught["there"] = end, there
        return (here - there).flatten(1).mean(1)

    with mock.patch("onestroke.terms.apart", spy):
        for i in range(1, len(method.grid)):
            play(method, uniforms, step)
            x, t = student.seen
            want = path.through(x, t, taught["there"], taught["end"]).x0 / x
            student.table[round(t[i - 1].item(), 9)] = want[i - 1, 0].item()
    x = tensor([1.0])
    for t, s in zip(*(lambda e: (e.flip(0)[:-1], e.flip(0)[1:]))(edges(method)), strict=True):
        est = student(x, t[None], {})
        x = path.mix(est.x0, est.eps, s[None])
    return x.item(), method.grid


def composes(cls, path, edges, **options):
    """The gain is the product of the DDIM steps kappa = (a a' S^2 + b b') / V of the grid, wherever it is cut."""
    got, grid = gain_of(cls, path, edges, **options)
    (a, b), (c, d) = path.ab(grid[1:]), path.ab(grid[:-1])
    close(tensor(got), ((a * c * S**2 + b * d) / variance(path, grid[1:])).prod()[None], 1e-8)


def guided_mean_is_scaled(cls, path, w=3.0, key="consistency", **options):
    """Guidance of equal variances teaches N(w m, S^2): the same loss as that teacher's alone, and not the class's."""

    def found(teacher, scale):
        return loss_of(made(cls, path, Line(path, *STUDENT), teacher, Line(path, *SLOW), scale, **options), key=key)

    close(found(Classes(path), w), found(Classes(path, w * M), 1.0))
    assert (found(Classes(path), w) - found(Classes(path), 1.0)).abs() > 1e-5


def hand_loss(path, x, t, s, end, student, target, teacher_mean=M, distance=torch.square):
    """Typed: x_s by DDIM of the teacher; both jumps to the end, the second without gradient; over sqrt(a^2 + b^2)."""
    xs = moved(path, x, t, s, posterior(path, x, t, teacher_mean))
    with torch.no_grad():
        there = moved(path, xs, s.clamp_min(path.t_min), end, target.mu + target.k * xs)
        there = torch.where(like(s - end, x) > 0, there, xs)
    here = moved(path, x, t, end, student.mu + student.k * x)
    norm = like(torch.hypot(*path.ab(end)), x)
    return distance((here - there) / norm), here, there


def same_gradient(got, want, net, names=("mu", "k"), rtol=1e-9):
    """Of two scalars, with respect to the parameters of a net: equal, and not nothing."""
    close(got, want, rtol)
    params = [getattr(net, n) for n in names]
    one, two = (torch.autograd.grad(v, params, retain_graph=True) for v in (got, want))
    for g, h in zip(one, two, strict=True):
        close(g, h, rtol)
        assert h.abs() > 1e-6


def huber(error):
    return (error**2 + 1e-6).sqrt() - 1e-3
