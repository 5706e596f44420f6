"""The program as a whole: a wrong command, option or argument ends in one line, as every other error does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException


class Program(TyperGroup):
    """Commands whose usage errors are one line with the exit status 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As `TyperGroup.main`, which would draw a box around what was wrong."""
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except TyperException as error:
            if not standalone_mode:
                raise
            print(_line(error), end="", file=sys.stderr)
            sys.exit(error.exit_code)
        except Abort:
            if not standalone_mode:
                raise
            print("online-dpo: left", file=sys.stderr)
            sys.exit(1)
        if standalone_mode:
            sys.exit(status if isinstance(status, int) else 0)
        return status


def _line(error: TyperException) -> str:
    """What was wrong and where help is; empty for a call without arguments, to which the help itself was the answer."""
    from online_dpo.display import clean

    message = clean(error.format_message()).removesuffix(".").replace("Value error, ", "")
    if not message:
        return ""
    context = getattr(error, "ctx", None)
    help_of = f" (see {context.command_path} --help)" if context is not None else ""
    return f"online-dpo: {message}{help_of}\n"
