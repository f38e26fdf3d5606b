"""What onestroke raises when the user can mend it.

OnestrokeError
    InputError      a name, file, setting or folder is wrong; raised before anything heavy is loaded
    DivergedError   a loss is no longer finite
    ExportError     the written pipeline does not draw what the training sampler draws
Notice              not an error: a warning that the command line shows
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class OnestrokeError(Exception):
    """The base of all errors a user can mend; the command line prints it in one line and exits with 2."""


class InputError(OnestrokeError, ValueError):
    """Something the user gave is wrong."""


class DivergedError(OnestrokeError):
    """Training produced a value that is not finite."""


class ExportError(OnestrokeError):
    """A written artefact does not reproduce the training sampler."""


class Notice(UserWarning):
    """Something goes another way than was planned."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with a byte-order mark or without. Raises InputError for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 text.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it is missing or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path} is missing or cannot be read.") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object.")
    return found


def unknown(what: str, given: str, known: Iterable[str]) -> InputError:
    """'unknown method 'swiftbrsh'. Did you mean 'swiftbrush'? Known: ...'."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {what} {given!r}.{hint} Known: {', '.join(known)}.")
