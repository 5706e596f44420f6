"""What every command shares: errors as one line, and the options that all have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from online_dpo.errors import OnlineDPOError, RunFolderError, one_line
from online_dpo.keys import without_keys

if TYPE_CHECKING:
    from online_dpo.config import Experiment

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

        print(f"online-dpo: {clean(without_keys(str(error)))}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


@contextmanager
def reading(*folders: Path) -> Iterator[None]:
    """Turns what breaks on the files in run `folders` into a `RunFolderError`.

    A folder may come from elsewhere: what its files can hold in place of what was written is without end.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        names = ", ".join(map(str, folders))
        raise RunFolderError(
            f"{names}: a file in it is not as online-dpo wrote it ({one_line(error)}); --debug shows where"
        ) from error


def tell_own_code(experiment: Experiment, folder: Path) -> None:
    """Say which judges and losses are the user's own code, before it is imported."""
    from online_dpo.display import clean, make_console
    from online_dpo.own_code import own_code

    for line in own_code(experiment, [folder]):
        make_console().print(clean(line), markup=False, soft_wrap=True)
