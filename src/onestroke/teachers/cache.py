"""Encoded prompts on disk, found again by the content of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def cache_folder() -> Path:
    """Where encoded prompts are kept: $ONESTROKE_CACHE, or onestroke in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("ONESTROKE_CACHE") or Path(home) / "onestroke").expanduser()


def digest_of(parts: Mapping[str, Any], **more: Any) -> str:
    """SHA-256 of the content of a pipeline's parts (weights, configs, vocabularies) and of plain values."""
    digest = hashlib.sha256(json.dumps(more, sort_keys=True, default=str).encode())
    for name, part in sorted(parts.items()):
        digest.update(f"{name} {type(part).__name__}".encode())
        if isinstance(part, nn.Module):
            digest.update(str(getattr(part, "config", "")).encode())
            for key, value in sorted(part.state_dict().items()):
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif hasattr(part, "save_pretrained"):
            with tempfile.TemporaryDirectory() as folder:
                part.save_pretrained(folder)
                for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
                    digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def cached(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors kept under `key`; made and kept where there are none, or none that can be read."""
    file = cache_folder() / "prompts" / f"{key}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        pass
    found = {k: v.cpu().contiguous() for k, v in make().items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        save_file(found, partial)
        os.replace(partial, file)
    except OSError:  # a full or read-only disk: the prompts are encoded again next time
        pass
    return found
