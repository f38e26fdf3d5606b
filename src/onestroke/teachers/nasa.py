"""Negative prompts in one call: NASA, negative-away steer attention (SNOOPI, arXiv 2412.02687).

Guidance has no place in one call; instead every attention to the text is steered away from a second text:
Z = Z+ - scale Z-, before its output projection, whose bias and residual are added once. Z+ and Z- have the same queries
and weights.

Cross-attention (Stable Diffusion, SDXL, PixArt, SANA): Z- attends to the negative text alone; the network reads both
texts in one row, and the second costs next to nothing. Joint attention (SD3, FLUX, Qwen-Image): Z- is the part of the
text in what the picture attends to, with the negative text in the place of the other. That text needs a stream of its
own through the network, beside the same picture, which costs a second row. Published: cross-attention with scale 0.1
for SD 1.5, 0.2 for SD 2.1, 0.5 for PixArt-alpha; of joint attention that the image-to-text part is meant. Ours: how
that part is normalised (by both texts' pictures, as in the network), and FLUX's single-stream layers are left alone.

It works around whatever attention processor a network has, and needs no weights. Where there is a trained branch for
the negative text (`onestroke.teachers.branch`), Z- is what that says.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestroke.denoiser import PREFIX, SCALE, negated
from onestroke.errors import InputError
from onestroke.paths import Cond
from onestroke.teachers.branch import Branch, cross_attentions, joint, read_branch
from onestroke.teachers.calls import Call, flat, nested, padded


@contextmanager
def negative_prompt(
    pipeline: Any,
    prompt: str,
    scale: float | None = None,
    size: tuple[int, int] | None = None,
    branch: str | Path | None = None,
) -> Iterator[None]:
    """Steer what a plain diffusers pipeline, such as an exported student, draws in this block away from a prompt.

    size: (height, width) of the pictures in pixels, where they are not the pipeline's own. branch: the file of a
    negative-prompt branch (`onestroke.teachers.branch`) of this pipeline or of its base. scale: by default 0.2, or what
    the branch was trained with. The pipeline's network is frozen by this. Raises InputError for one without an
    attention that can be steered, and for a branch of another base.
    """
    from onestroke.teachers.pipeline import PipelineTeacher

    model = PipelineTeacher(pipeline, type(pipeline).__name__, size)
    network, cond = getattr(pipeline, model.part), model.encode([prompt])
    found = None if branch is None else read_branch(branch, network)
    scale = 0.2 if scale is None and found is None else scale
    with steered(network, model.call, negated(cond, cond, scale), found):
        yield


@contextmanager
def steered(network: nn.Module, call: Call, cond: Cond, branch: Branch | None = None) -> Iterator[None]:
    """NASA in the calls of a network in this block, if `cond` asks for it (see `onestroke.denoiser.negated`), or its
    branch, which has a text of its own where `cond` names none."""
    cond = cond if branch is None else branch.told(cond)
    if SCALE not in cond:
        yield
        return
    handles = Steering(network, call, cond, branch).install()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_steerable(network: nn.Module) -> None:
    """Raises InputError for a network without cross- or joint attention, or one that is compiled."""
    if not any(joint(m) for m in network.modules()) and not cross_attentions(network):
        raise InputError(
            f"{type(network).__name__} keeps text and picture in one stream: negative prompts need a network with "
            "cross-attention or joint attention."
        )
    if getattr(network, "_compiled_call_impl", None) is not None:
        raise InputError("negative prompts change the layers of the network; load the student without compile.")


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


class Steering:
    """What one call of a network is steered by. `away` holds, by layer, what is to be subtracted from its output."""

    def __init__(self, network: nn.Module, call: Call, cond: Cond, branch: Branch | None = None):
        check_steerable(network)
        self.network, self.call = network, call
        self.text, self.mask = cond[PREFIX + "text"], cond.get(PREFIX + "mask")
        self.scale = cond[SCALE].reshape(-1, 1, 1)
        self.layers: list[Any] = [m for m in network.modules() if joint(m)]
        self.doubles = bool(self.layers)
        self.layers = self.layers or list(cross_attentions(network).values())
        self.own = {} if branch is None else branch.of(network)
        self.rows = self.length = 0
        self.away: dict[int, Tensor] = {}
        self.heard: dict[int, Tensor] = {}
        self.probed: int | None = None

    def install(self) -> list[Any]:
        handles = [self.network.register_forward_pre_hook(self.enter, with_kwargs=True)]
        for layer in self.layers:
            probe = self.joint if self.doubles else self.cross
            handles.append(layer.register_forward_pre_hook(probe, with_kwargs=True))
            handles.append(layer.to_out[0].register_forward_pre_hook(self.leaving(layer)))
        if self.doubles:
            blocks = (m for m in self.network.modules() if any(joint(child) for child in m.children()))
            handles += [block.register_forward_pre_hook(self.same_picture, with_kwargs=True) for block in blocks]
            handles.append(self.network.register_forward_hook(lambda module, args, out: (out[0][: self.rows],)))
        return handles

    # ---- the network: both texts in one row, or in two ------------------------------------------------------------

    def enter(self, network: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        if torch.is_grad_enabled() and getattr(network, "is_gradient_checkpointing", False):
            raise InputError("negative prompts in training go without gradient_checkpointing; leave it out.")
        given = flat(_named(network, args, kwargs))
        keys = {name: key for key, name in self.call.rows.items()}
        text = given[keys["text"]]
        mask = given.get(keys.get("mask", ""))
        self.rows, self.length = len(text), text.shape[1]
        other = self.text.to(text).expand(self.rows, *self.text.shape[1:])
        masks = None
        if self.mask is not None:
            masks = [mask if mask is not None else self.mask.new_ones(text.shape[:2]).to(text.device)]
            masks.append(self.mask.to(masks[0]).expand(self.rows, -1))
        if self.doubles:
            given = self.twice(given)
            wide = max(self.length, other.shape[1])
            text, other = (padded(list(v), wide) for v in (text, other))
            masks = masks and [padded(list(v), wide) for v in masks]
        side = 0 if self.doubles else 1
        given[keys["text"]] = torch.cat([text, other], side)
        if masks:
            given[keys["mask"]] = torch.cat(masks, side)
        return (), nested(given)

    def twice(self, given: dict[str, Any]) -> dict[str, Any]:
        """Every argument that differs by row, once more for the second text."""
        found = dict(given)
        for key in (self.call.sample, self.call.time, *self.call.rows, *self.call.repeated):
            value = given.get(key)
            if isinstance(value, list):
                found[key] = value * 2
            elif isinstance(value, Tensor) and value.ndim:
                found[key] = torch.cat([value, value])
        return found

    def same_picture(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        """The second text goes beside the picture of the first."""
        given = _named(block, args, kwargs)
        picture = given["hidden_states"][: self.rows]
        return (), {**given, "hidden_states": torch.cat([picture, picture])}

    # ---- the layers ----------------------------------------------------------------------------------------------

    def cross(self, layer: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        given = _named(layer, args, kwargs)
        texts, mask = given["encoder_hidden_states"].tensor_split([self.length], 1), given.get("attention_mask")
        masks = (None, None) if mask is None else mask.tensor_split([self.length], -1)
        plus, minus = (
            {**given, "encoder_hidden_states": t, "attention_mask": m} for t, m in zip(texts, masks, strict=True)
        )
        self.away[id(layer)] = self.probe(layer, minus)
        return (), plus

    def joint(self, layer: Any, args: Any, kwargs: Any) -> None:
        """The first picture beside the second text; without the values of the picture, the part of the text is left."""
        given, rows = _named(layer, args, kwargs), self.rows
        minus = {**given, "hidden_states": given["hidden_states"][:rows]}
        for key in ("encoder_hidden_states", "encoder_hidden_states_mask", "attention_mask"):
            if isinstance(given.get(key), Tensor) and len(given[key]) == 2 * rows:
                minus[key] = given[key][rows:]
        silent = layer.to_v.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        try:
            self.away[id(layer)] = self.probe(layer, minus)
        finally:
            silent.remove()

    def probe(self, layer: Any, given: dict[str, Any]) -> Tensor:
        """What goes into the output projection of a layer, by the branch's keys and values where there is one."""
        self.probed, own = id(layer), self.own.get(id(layer))
        with nullcontext() if own is None else own.placed(layer):
            layer.forward(**given)
        self.probed = None
        return self.heard.pop(id(layer))

    def leaving(self, layer: Any) -> Any:
        """What the output projection of a layer does first."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            z = args[0]
            if self.probed == id(layer):
                self.heard[id(layer)] = z
                return None
            away, own = self.away.pop(id(layer)), self.own.get(id(layer))
            away = self.scale.to(z) * (away if own is None else own(away, z))
            if self.doubles:
                return (torch.cat([z[: self.rows] - away, z[self.rows :]]), *args[1:])
            return (z - away, *args[1:])

        return hook
