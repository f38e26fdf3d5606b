"""The command line, called in the test's own process."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from onestroke import cli


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def onestroke(monkeypatch, capsys):
    """Call the command line in this process: onestroke("methods", "--json") -> Said.

    What cli.quiet does by environment variables before these libraries are imported is done to them here.
    """
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["onestroke", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capsys.readouterr())

    yield call
    for library, (shown, verbosity) in zip(libraries, before, strict=True):
        library.set_verbosity(verbosity)
        if shown:
            library.enable_progress_bar()
