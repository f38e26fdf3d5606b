"""A diffusers network with fewer layers, over the weights of those that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from onestroke.denoiser import clone_sharing, kept_of, spaced
from onestroke.errors import InputError

DEPTHS = (
    "num_layers",
    "num_single_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
    "n_layers",
    "depth",
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
)
"""Entries of a network's config that count its layers, in one number or one per block. Refiners of a text are none."""
NUMBERED = "dual_attention_layers"  # the entry that numbers layers: those of SD3.5 that attend twice


def shallower(network: Any, layers: float) -> dict[str, Any]:
    """The entries of a network's config that change where it keeps this part of its layers. Raises InputError for none.

    In every stack the part is rounded, and one layer stays.
    """
    config: Mapping[str, Any] = network.config

    def fewer(count: Any) -> Any:
        return kept_of(count, layers) if isinstance(count, int) else type(count)(fewer(c) for c in count)

    found = {k: fewer(config[k]) for k in DEPTHS if config.get(k)}
    changed = {k: v for k, v in found.items() if v != config[k]}
    if not changed:
        counts = ", ".join(f"{k}={config[k]}" for k in found) or "no count of layers in its config"
        raise InputError(
            f"a {type(network).__name__} with {counts} has no layer to leave out; leave layers={layers} out."
        )
    if numbered := config.get(NUMBERED):
        kept = spaced(changed["num_layers"], config["num_layers"])
        changed[NUMBERED] = [j for j, i in enumerate(kept) if i in numbered]
    return changed


def prune(network: nn.Module, like: nn.Module) -> None:
    """Leave as many layers in every stack of a network as `like` has in its own, evenly spaced."""
    for name, child in network.named_children():
        other = getattr(like, name, None)
        if isinstance(child, nn.ModuleList) and isinstance(other, nn.ModuleList) and len(other) < len(child):
            child = nn.ModuleList(child[i] for i in spaced(len(other), len(child)))
            setattr(network, name, child)
        if other is not None:
            prune(child, other)


def with_fewer_layers(network: Any, layers: float) -> Any:
    """A diffusers network over the same weights that keeps this part of the layers, as its config then says.

    Of a transformer they are its blocks; of a UNet the residual layers of every block and the layers of its
    transformers, as in BK-SDM (arXiv 2305.15798): the first of the way down, the first and the last of the way up, so
    that all channels fit. Raises InputError where there is none to leave out, or diffusers builds another network from
    that config.
    """
    changed = shallower(network, layers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = type(network).from_config({**network.config, **changed})
    small = clone_sharing(network)
    prune(small, like)
    small.register_to_config(**changed)
    shapes = [{k: tuple(v.shape) for k, v in net.state_dict().items()} for net in (small, like)]
    if shapes[0] != shapes[1]:
        said = ", ".join(f"{k}={v}" for k, v in changed.items())
        raise InputError(
            f"a {type(network).__name__} with {said} has other layers than its teacher; keep more than layers={layers}."
        )
    return small
