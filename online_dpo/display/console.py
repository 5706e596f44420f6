"""The console of the command line."""

from __future__ import annotations

import io
import sys

from rich.console import Console

WIDTH = 100
"""Columns of output that is no terminal; all tables fit."""


def make_console(*, stderr: bool = False) -> Console:
    """The console of the command line: 100 columns where it is no terminal, and no crash on a narrow encoding."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=WIDTH)
    return console
