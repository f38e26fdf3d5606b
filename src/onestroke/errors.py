"""What onestroke raises when the user can mend it.

OnestrokeError
    InputError      a name, file, setting or folder is wrong; raised before anything heavy is loaded
    DivergedError   a loss is no longer finite
    ExportError     the written pipeline does not draw what the training sampler draws
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnestrokeError(Exception):
    """The base of all errors a user can mend; the command line prints it in one line and exits with 2."""


class InputError(OnestrokeError, ValueError):
    """Something the user gave is wrong."""


class DivergedError(OnestrokeError):
    """Training produced a value that is not finite."""


class ExportError(OnestrokeError):
    """A written artefact does not reproduce the training sampler."""


def unknown(what: str, given: str, known: Iterable[str]) -> InputError:
    """'unknown method 'swiftbrsh'. Did you mean 'swiftbrush'? Known: ...'."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {what} {given!r}.{hint} Known: {', '.join(known)}.")
