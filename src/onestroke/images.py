"""Real pictures with captions as the input of a run: found and checked at once, encoded once."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onestroke.errors import InputError, read_text

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
INDEX = "metadata.jsonl"
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for a bad file


class Pictures(NamedTuple):
    """The files of an image folder in the order of their names, their captions, and a digest of both."""

    files: list[Path]
    captions: list[str]
    sha256: str


def read_images(folder: str | Path) -> Pictures:
    """Pictures with captions: Hugging Face's imagefolder (metadata.jsonl with file_name and text), or a .txt each.

    Pictures may lie in sub-folders; a caption is made one line. Raises InputError for none, and for a picture that is
    missing, no picture or without caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no such image folder: {folder}; give a folder of pictures with captions.")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if (folder / INDEX).is_file():
        texts = _index(folder)
        if lost := sorted(texts.keys() - set(files)):
            raise InputError(f"{folder / INDEX} names {lost[0].name}, which is no picture in {folder}.")
    else:
        texts = {p: _line(read_text(p.with_suffix(".txt"))) for p in files if p.with_suffix(".txt").is_file()}
    digest = hashlib.sha256()
    for file in files:
        if not texts.get(file):
            raise InputError(f"{file} has no caption; name it in {INDEX} (file_name, text) or write one beside it.")
        try:
            content = file.read_bytes()
            with Image.open(io.BytesIO(content)) as picture:
                picture.verify()
        except UNREADABLE as error:
            raise InputError(f"{file} cannot be read as a picture ({type(error).__name__}).") from None
        digest.update(hashlib.sha256(content).digest() + texts[file].encode() + b"\n")
    if not files:
        raise InputError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return Pictures(files, [texts[file] for file in files], digest.hexdigest())


def _line(text: str) -> str:
    return " ".join(text.split())


def _index(folder: Path) -> dict[Path, str]:
    """The captions of metadata.jsonl, by file."""
    found = {}
    for number, line in enumerate(read_text(folder / INDEX).splitlines(), start=1):
        try:
            row = json.loads(line or "null")
            if row is not None:
                found[folder / row["file_name"]] = _line(row["text"])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f'{folder / INDEX}, line {number}: expected {{"file_name": ..., "text": ...}}.') from None
    return found


def open_image(file: Path, size: tuple[int, int]) -> Tensor:
    """(3, H, W) in [0, 1]: transparency over white, the middle of the picture scaled to (H, W). Raises InputError."""
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except UNREADABLE as error:
        raise InputError(f"{file} cannot be read as a picture ({type(error).__name__}).") from None
    white = Image.new("RGBA", picture.size, "white")
    fitted = ImageOps.fit(Image.alpha_composite(white, picture).convert("RGB"), size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 255


def encoded(teacher: Any, pictures: Pictures, cache: Path) -> Tensor:
    """Latents (N, C, H, W) of the pictures by the teacher's autoencoder: encoded once, then read from `cache`.

    Of several processes the first encodes. Raises InputError for a picture that breaks off.
    """
    from accelerate import PartialState

    state = PartialState()
    with state.main_process_first():
        return _cached(teacher, pictures, cache, state.device)


def _cached(teacher: Any, pictures: Pictures, cache: Path, device: torch.device, batch_size: int = 16) -> Tensor:
    about = {"images_sha256": pictures.sha256, "teacher": teacher.name}
    if cache.is_file():
        try:
            with safe_open(cache, framework="pt") as kept:
                if kept.metadata() == about:
                    return kept.get_tensor("x0")
        except SafetensorError:  # cut off: made again
            pass
    vae, parts = teacher.pipeline.vae, []
    home = vae.device
    vae.to(device)
    for i in range(0, len(pictures.files), batch_size):
        images = torch.stack([open_image(f, teacher.size) for f in pictures.files[i : i + batch_size]])
        parts.append(teacher.encode_images(images).cpu())
    vae.to(home)
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    save_file({"x0": torch.cat(parts)}, partial, metadata=about)
    os.replace(partial, cache)
    return torch.cat(parts)
