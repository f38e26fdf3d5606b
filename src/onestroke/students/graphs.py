"""Networks as ONNX graphs: what torch needs to be told to write them, and to have them opened."""

from __future__ import annotations

import io
import logging
import operator
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from onestroke.errors import ExportError, InputError
from onestroke.teachers.pipeline import PipelineTeacher

BEHIND = ("Lumina2Transformer2DModel", "ZImageTransformer2DModel")
"""Networks that lay the picture behind the text, at places that follow its length: rows do not share a graph."""


class X0(nn.Module):
    """The student's x0 (B, C, H, W) from x, unit times t (B,) float64 and the condition, as tensors in order."""

    def __init__(self, net: nn.Module, names: list[str]):
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        return self.net(x, t, dict(zip(self.names, cond, strict=True))).x0


class Row(nn.Module):
    """As X0 of one row, whose text (1, L, E) of any length L is not padded."""

    def __init__(self, net: nn.Module, masked: bool):
        super().__init__()
        self.net, self.masked = net, masked

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        mask = {"mask": torch.ones(text.shape[:2], dtype=torch.int64)} if self.masked else {}
        with Alone(text.shape[1]):
            return self.net(x, t, {"text": text, **mask}).x0


class Decoder(nn.Module):
    """x0 (B, C, H, W) -> images (B, 3, H', W') in [0, 1]."""

    def __init__(self, model: PipelineTeacher):
        super().__init__()
        self.decode, self.vae = model.decode, model.components["vae"]

    def forward(self, x0: Tensor) -> Tensor:
        return self.decode(x0)


class TextEncoder(nn.Module):
    """Token ids (B, L) -> text (B, L, E)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids)[0]


@contextmanager
def hushed() -> Iterator[None]:
    """Keep what the tracers warn of, log and print, also from C++, off the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, nowhere = {1: os.dup(1), 2: os.dup(2)}, os.open(os.devnull, os.O_WRONLY)
    for stream in kept:
        os.dup2(nowhere, stream)
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        for stream, saved in kept.items():
            os.dup2(saved, stream)
            os.close(saved)
        os.close(nowhere)


class Turned:
    """Complex numbers as (..., 2) real ones, for which ONNX has a type: what rotary embeddings turn, by a constant or
    by what was found in `real_tables`."""

    def __init__(self, pairs: Tensor):
        self.pairs = pairs

    def turn(self, by: Tensor) -> Turned:
        if by.is_complex():
            c, d = (torch.from_numpy(part.numpy().copy()).to(self.pairs) for part in (by.real, by.imag))
        else:
            c, d = by.reshape(*by.shape[:-1], -1, 2).unbind(-1)
        a, b = self.pairs.unbind(-1)
        return Turned(torch.stack([a * c - b * d, a * d + b * c], -1))

    __mul__ = __rmul__ = turn

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.view_as_real:
            return args[0].pairs
        return args[0].turn(args[1]) if func is operator.mul else NotImplemented


@contextmanager
def real_tables(net: nn.Module) -> Iterator[None]:
    """The tables in which rotary embeddings look up complex numbers hold (real, imaginary, ...) in this block."""
    tables: list[Any] = [m.rope_embedder for m in net.modules() if hasattr(m, "rope_embedder")]
    kept = [table.freqs_cis for table in tables]
    for table in tables:
        table.freqs_cis = [torch.view_as_real(v).flatten(-2) for v in table.freqs_cis]
    try:
        yield
    finally:
        for table, values in zip(tables, kept, strict=True):
            table.freqs_cis = values


class Length(torch.SymInt):
    """A length that a graph leaves open, and that a set may hold: networks ask so whether all rows are as long."""

    def __hash__(self) -> int:
        return 0

    def __add__(self, more: Any) -> Length:
        return Length((torch.SymInt(self.node) + more).node)


class Alone(TorchFunctionMode):
    """Calls as torch.export can write them, of a row that is alone: the only number that is read out of a tensor is how
    long its text is. Complex numbers are pairs, an index is of 64 bits, and what Dynamo cannot open is not opened."""

    def __init__(self, length: Any):
        super().__init__()
        self.length = length

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.view_as_complex:
            return Turned(args[0])
        if func in (torch.Tensor.__getitem__, operator.getitem) and isinstance(args[1], Tensor):
            return args[0][args[1].long()]
        if func is torch.Tensor.unflatten and args[1] == -1:
            return args[0].reshape(*args[0].shape[:-1], *args[2])
        if func is torch.Tensor.tolist:
            return [self.length]
        if func is torch.Tensor.item and isinstance(self.length, torch.SymInt):
            return Length(self.length.node)
        return func(*args, **(kwargs or {}))


class Settled(TorchFunctionMode):
    """Calls as a tracer can write them: complex numbers as pairs, whose making out of a last dimension names no other,
    and squeezes only where there is something to squeeze (a tracer writes both ways else, and one has no type)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = (*args, *(kwargs or {}).values())
        if func is torch.view_as_complex:
            return Turned(*given)
        if func is torch.Tensor.reshape and given[1:] == (*given[0].shape[:-1], -1, 2):
            return given[0].unflatten(-1, (-1, 2))
        if func in (torch.squeeze, torch.Tensor.squeeze) and len(given) == 2 and isinstance(given[1], int):
            x, dim = given
            return x.select(dim, 0) if int(x.shape[dim]) == 1 else x
        return func(*args, **(kwargs or {}))


def write_onnx(module: nn.Module, inputs: dict[str, Tensor], output: str, file: Path) -> None:
    """One graph, which onnxruntime can open, with a dynamic batch, or of a Row with any length of its text. Raises
    ExportError where there is none.

    By tracing, which is quick and writes one file; where that fails, and of a Row, by torch.export.
    """
    module, values, said = module.eval(), tuple(inputs.values()), ""
    named: dict[str, Any] = {"input_names": list(inputs), "output_names": [output], "opset_version": 18}

    def trace() -> None:
        axes = {name: {0: "batch"} for name in (*inputs, output)}
        with Settled():
            torch.onnx.export(module, values, str(file), dynamo=False, dynamic_axes=axes, **named)

    def capture(strict: bool = False) -> None:
        free: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
        shapes: Any = (free,) * len(values)
        if isinstance(module, X0):
            shapes = (free, free, (free,) * (len(values) - 2))
        elif isinstance(module, Row):
            shapes = ({}, {}, {1: torch.export.Dim.DYNAMIC})
        program = torch.export.export(module, values, dynamic_shapes=shapes, strict=strict)
        torch.onnx.export(program, (), str(file), dynamo=True, verbose=False, **named)

    for way in (partial(capture, strict=True), capture) if isinstance(module, Row) else (trace, capture):
        try:
            with hushed(), torch.no_grad():
                way()
            open_onnx(file)
            return
        except Exception as error:  # the errors of tracers and of onnxruntime have no base of their own
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            for written in file.parent.glob(f"{file.name}*"):
                written.unlink()
    raise ExportError(f"torch cannot write this {file.stem} as ONNX: {said}")


def open_onnx(file: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """An onnxruntime session that says nothing but errors."""
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    return runtime.InferenceSession(file, options, providers=list(providers))


def onnx_runtime() -> Any:
    """onnxruntime. Raises InputError when the extra is not installed."""
    if lost := [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]:
        raise InputError(f"ONNX needs {', '.join(lost)}: pip install 'onestroke[onnx]'.")
    import onnxruntime

    return onnxruntime
