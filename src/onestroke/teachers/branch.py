"""SpeedUpNet's negative-prompt branch (arXiv 2312.08887): guidance away from any second text, in one call.

Every cross-attention gets keys and values of its own for that text, of which what follows is subtracted before the
output projection:

    h = A(q, K, V) - g [a N(A(q, K_n, V_n)) + b],    g = (w - 1) / w

K_n and V_n start as the layer's own K and V, a (per channel) as ones, b as zeros; N rescales to the norm of the first
term. The network stays as it was, so that a branch goes with fine-tunes of its base as well. Ours: the norms are those
of each picture, not of the whole batch, so that a picture does not depend on its neighbours; no second branch for the
prompt itself. Of a text of zeros, which SDXL takes for the empty one, b alone is left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onestroke.denoiser import PREFIX, SCALE, clone_sharing
from onestroke.errors import InputError
from onestroke.paths import Cond

BRANCH = "branch.safetensors"  # beside a student's pipeline


def joint(module: nn.Module) -> bool:
    """Whether a layer is an attention in which text and picture attend to each other."""
    return getattr(module, "added_kv_proj_dim", None) is not None


def cross_attentions(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that attend to the text alone, by name; none beside joint attention."""
    if any(joint(m) for m in network.modules()):
        return {}
    return {name: m for name, m in network.named_modules() if getattr(m, "is_cross_attention", False)}


class Away(nn.Module):
    """The branch of one cross-attention."""

    def __init__(self, layer: Any):
        super().__init__()
        self.to_k, self.to_v = copy.deepcopy(layer.to_k), copy.deepcopy(layer.to_v)
        like, width = layer.to_out[0].weight, layer.to_out[0].in_features
        self.a, self.b = nn.Parameter(like.new_ones(width)), nn.Parameter(like.new_zeros(width))
        self.requires_grad_(True)

    @contextmanager
    def placed(self, layer: Any) -> Iterator[None]:
        """Let the layer attend by these keys and values in this block."""
        own = layer.to_k, layer.to_v
        layer.to_k, layer.to_v = self.to_k, self.to_v
        try:
            yield
        finally:
            layer.to_k, layer.to_v = own

    def forward(self, away: Tensor, z: Tensor) -> Tensor:
        """a N(away) + b (B, L, C) for what attention says of the second text and of the first, z, alike."""
        kind = torch.promote_types(away.dtype, torch.float32)
        goal = torch.linalg.vector_norm(z, dim=(1, 2), keepdim=True, dtype=kind)
        size = torch.linalg.vector_norm(away, dim=(1, 2), keepdim=True, dtype=kind).clamp_min(1e-6)
        return (self.a * (away * (goal / size)) + self.b).to(z)


class Branch(nn.Module):
    """The branch of a network: by layer, and the text (1, L, E) and scale g that it is called with by default.

    Raises InputError for a network without cross-attention.
    """

    text: Tensor
    mask: Tensor | None
    scale: Tensor

    def __init__(self, network: nn.Module, negative: Cond, scale: float):
        super().__init__()
        if not (layers := cross_attentions(network)):
            raise InputError(f"a {type(network).__name__} has no cross-attention for a negative-prompt branch.")
        like = next(network.parameters())
        self.layers = nn.ModuleDict({name.replace(".", "/"): Away(layer) for name, layer in layers.items()})
        self.register_buffer("text", negative["text"].detach().clone().to(like))
        self.register_buffer("mask", negative["mask"].clone().to(like.device) if "mask" in negative else None)
        self.register_buffer("scale", like.new_tensor([scale]))

    def of(self, network: nn.Module) -> dict[int, Any]:
        """The parts of the branch by the ids of the network's layers."""
        return {id(network.get_submodule(name.replace("/", "."))): part for name, part in self.layers.items()}

    def told(self, cond: Cond) -> Cond:
        """`cond` with the branch's own text and scale where it names none."""
        mask = {} if self.mask is None else {PREFIX + "mask": self.mask}
        return {PREFIX + "text": self.text, **mask, SCALE: self.scale, **cond}


def branched(net: nn.Module, negative: Cond, guidance_scale: float) -> nn.Module | None:
    """A denoiser over the frozen weights of `net` with a branch to train; None where there is no cross-attention.

    Raises InputError for a scale that is no guidance.
    """
    network = next((getattr(net, part) for part in ("unet", "transformer") if hasattr(net, part)), None)
    if network is None or not cross_attentions(network):
        return None
    if guidance_scale <= 1:
        raise InputError(f"guidance_scale={guidance_scale} is none; a negative-prompt branch needs one above 1.")
    found: Any = clone_sharing(net)
    found.branch = Branch(network, negative, (guidance_scale - 1) / guidance_scale)
    return found


def save_branch(net: nn.Module, folder: Path) -> None:
    """Write the branch of a denoiser, where it has one, as `folder`/branch.safetensors."""
    if (branch := getattr(net, "branch", None)) is not None:
        state = {k.replace("/", "."): v.detach().cpu().contiguous() for k, v in branch.state_dict().items()}
        save_file(state, folder / BRANCH, metadata={"format": "pt"})


def read_branch(file: str | Path, network: nn.Module) -> Branch:
    """A written branch, frozen, for this network: its base, or a fine-tune of it. Raises InputError for others."""
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a safetensors file ({error}); give a student's {BRANCH}.") from None
    if not {"text", "scale"} <= found.keys():
        raise InputError(f"{file} holds no negative-prompt branch; give a student's {BRANCH}.")
    branch = Branch(network, {k: found[k] for k in ("text", "mask") if k in found}, 0.0)
    own = {k.replace("/", "."): v for k, v in branch.state_dict(keep_vars=True).items()}
    shapes, given = ({k: v.shape for k, v in state.items()} for state in (own, found))
    if wrong := sorted(k for k in own.keys() | found.keys() if shapes.get(k) != given.get(k)):
        raise InputError(f"{file} is the branch of another base: {wrong[0]!r} differs from this network's.")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(found[name])
    return branch.requires_grad_(False).eval()
