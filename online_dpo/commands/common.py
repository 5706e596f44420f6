"""What every command shares: errors as one line, and the options that all have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from online_dpo.errors import OnlineDPOError

Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]
Debug = Annotated[bool, typer.Option("--debug", help="show the trace of an error")]


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turns this project's errors into one line and the error's exit code."""
    try:
        yield
    except OnlineDPOError as error:
        if debug:
            raise
        from online_dpo.display import clean

        print(f"online-dpo: {clean(error)}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
