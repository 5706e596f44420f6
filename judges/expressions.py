"""Regular expressions that cannot hang: an answer is hostile text, and some expressions take for ever on some texts."""

from __future__ import annotations

from typing import Any

import regex

from online_dpo.errors import JudgeError
from online_dpo.judging import Abstention

LIMIT_S = 1.0
"""The longest that one expression may search one answer; a sound one takes microseconds."""
TOO_SLOW = Abstention("the expression took too long on this answer", passing=True)


class Expression:
    """One compiled expression in Python's own syntax (package `regex`); write flags inside, such as (?i)."""

    def __init__(self, pattern: str, where: str) -> None:
        """Raises `JudgeError` beginning with `where` when `pattern` is no regular expression."""
        self.pattern = pattern
        try:
            self.compiled: Any = regex.compile(pattern)
        except regex.error as error:
            raise JudgeError(f"{where}: '{pattern}' is not a regular expression: {error}") from error

    def found(self, text: str, *, whole: bool = False) -> bool | Abstention:
        """Whether it matches anywhere in `text`, or all of it (`whole`); `TOO_SLOW` after `LIMIT_S` seconds."""
        try:
            match = self.compiled.fullmatch if whole else self.compiled.search
            return match(text, timeout=LIMIT_S) is not None
        except TimeoutError:
            return TOO_SLOW
