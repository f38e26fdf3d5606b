"""HiPA: the filter is a projection, constants have no high frequencies, and the teacher's map costs nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from onestroke.errors import InputError
from onestroke.method import Batch, Pairs
from onestroke.methods.flow.hipa import HiPA, edges, high
from onestroke.paths import Estimate
from truth import pair_checks as checks
from truth.checks import F64, Given, close, labels, make_path, tensor
from truth.pair_checks import M
from truth.test_mutants import broken

SOURCE = "onestroke.methods.flow.hipa"
SHAPES = [(2, 3, 8, 8), (2, 3, 7, 12), (2, 5), (2, 1, 9)]


def pictures(shape=SHAPES[0], seed=50):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def filter_is_a_projection(high):
    """Idempotent, linear, orthogonal to what it leaves, and nothing of it for constants."""
    for shape in SHAPES:
        x, y = pictures(shape), pictures(shape, 51)
        up = high(x, 0.25)
        close(high(up, 0.25), up)
        close(high(x - up, 0.25), 0 * x)
        close(high(2 * x - y, 0.25), 2 * up - high(y, 0.25))
        close((up * (y - high(y, 0.25))).sum(), tensor(0.0).sum(), 0, 1e-9)
        close(high(torch.ones_like(x), 0.0), 0 * x)
        close(high(x, 1.0), 0 * x)


def test_the_filter_is_a_projection():
    filter_is_a_projection(high)


def waves(k, m, size=16):
    i, j = torch.meshgrid(torch.arange(size, dtype=F64), torch.arange(size, dtype=F64), indexing="ij")
    return torch.cos(2 * math.pi * (k * i + m * j) / size)[None, None]


def filter_is_a_square(high):
    """Waves of 16 pixels: those of at most 2 (a quarter of 8) in both directions are low, all others high."""
    for k, m, kept in ((0, 0, 0), (2, 2, 0), (2, -2, 0), (3, 0, 1), (0, 3, 1), (2, 3, 1), (8, 8, 1)):
        close(high(waves(k, m), 0.25), kept * waves(k, m))


def test_the_filter_is_a_square():
    filter_is_a_square(high)


def test_edges_are_differences_of_neighbours():
    x = pictures((1, 2, 3, 4))
    down, across = edges(x)
    close(down, x[:, :, 1:] - x[:, :, :-1])
    close(across, x[..., 1:] - x[..., :-1])
    (only,) = edges(tensor([1.0, 4.0, 2.0]))
    close(only, tensor([3.0, -2.0]))
    assert edges(tensor([1.0])) == []


class Free(nn.Module):
    """A student that says its parameter."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self, x, t, cond):
        return Estimate(self.x, x)


def play(cls, x, x0, **options):
    z = pictures(tuple(x.shape), 52)
    path, student = make_path("vp"), Free(x)
    method = cls(checks.parts(path, checks.two_modes(path), student, None), **options)
    return checks.losses(method, Batch(z, labels(len(z)), Given(z), None, Pairs(z, x0))), student.x


def terms_are_typed_by_hand(cls, high):
    """Three terms in both distances, their weight, and the closed gradient of the squared one: 2 d of the spatial
    term, 2 high(d) of the Fourier term, minus twice the Laplacian of the edges."""
    x, x0 = pictures(), pictures(seed=53)
    d = x - x0
    parts = d, high(d, 0.4), d[:, :, 1:] - d[:, :, :-1], d[..., 1:] - d[..., :-1]
    for distance, size in (("l2", torch.square), ("l1", torch.abs)):
        got, _ = play(cls, x, x0, weight=0.7, cut=0.4, distance=distance)
        spatial, fourier, down, across = (size(p).mean() for p in parts)
        assert list(got) == ["spatial", "fourier", "edge"]
        close(torch.stack(list(got.values())), torch.stack([spatial, 0.7 * fourier, 0.7 * (down + across)]))
    got, leaf = play(cls, x, x0, weight=1.0, cut=0.4)
    for key, want in (("spatial", 2 * d / d.numel()), ("fourier", 2 * parts[1] / d.numel())):
        close(torch.autograd.grad(got[key], leaf, retain_graph=True)[0], want)
    pad = torch.nn.functional.pad(parts[2], (0, 0, 1, 1)), torch.nn.functional.pad(parts[3], (1, 1, 0, 0))
    want = 2 * (pad[0][:, :, :-1] - pad[0][:, :, 1:]) / parts[2].numel()
    want = want + 2 * (pad[1][..., :-1] - pad[1][..., 1:]) / parts[3].numel()
    close(torch.autograd.grad(got["edge"], leaf)[0], want)


def test_the_terms():
    terms_are_typed_by_hand(HiPA, high)


def constants_have_no_detail(cls):
    """A shift of every pixel costs in space alone; gradients are finite at zero distance too."""
    x0 = pictures()
    got, _ = play(cls, x0 + 0.3, x0)
    close(torch.stack(list(got.values())), tensor(0.09, 0.0, 0.0))
    for distance in ("l2", "l1"):
        got, leaf = play(cls, x0, x0, distance=distance)
        assert sum(got.values()) == 0
        assert torch.isfinite(torch.autograd.grad(sum(got.values()), leaf)[0]).all()


def test_constants_have_no_detail():
    constants_have_no_detail(HiPA)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "table0"])
def test_the_teacher_s_map_costs_nothing(name):
    """On a Gaussian that is M + S z, and nothing else is."""
    path, z = make_path(name), checks.noise(8, 4)
    for mu, zero in ((M, True), (M + 0.1, False)):
        method = checks.build(HiPA, path, checks.Slope(path, mu))
        assert (sum(checks.losses(method, checks.batch(z)).values()) < 1e-20) == zero


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distance": "lpips"}, "unknown distance 'lpips'"),
        ({"cut": 2}, r"cut=2 is a part of the highest frequency: it must lie in \[0, 1\]"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(InputError, match=said):
        play(HiPA, pictures(), pictures(), **options)


def projects(module):
    filter_is_a_projection(module.high)


def squares(module):
    filter_is_a_square(module.high)


def terms(module):
    terms_are_typed_by_hand(module.HiPA, high)


def constants(module):
    constants_have_no_detail(module.HiPA)


MUTANTS = [
    ("abs() <= cut", "abs() < cut", squares),
    ("(1 - near)", "near", constants),
    ("near = near * one", "near = near + one", projects),
    ("(x.ndim - 1 - axis)", "(x.ndim - 2 - axis)", projects),
    ("x.diff(dim=axis)", "x.roll(1, axis)", constants),
    ("self.weight * edge", "edge", terms),
    ("self.weight * fourier", "self.weight * edge", terms),
]


@pytest.mark.parametrize(("old", "new", "check"), MUTANTS, ids=lambda v: getattr(v, "__name__", None))
def test_the_check_fails_on_the_mutant(old, new, check):
    check(broken(SOURCE, old, old))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken(SOURCE, old, new))
