"""The ways to verify an answer. Each check says whether one answer is right, or abstains with the reason."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol

from judges.expressions import Expression
from judges.final_answer import Number, final_number, final_text
from online_dpo.errors import DataError, JudgeError, one_line
from online_dpo.judging import Abstention

BLOCK = re.compile(r"^ {0,3}```[^\n`]*\n(.*?)^ {0,3}```\s*?$", re.MULTILINE | re.DOTALL)
NO_VERDICT = Abstention("the function returned neither true nor false")


class Check(Protocol):
    """Whether an answer to the prompt is right, given the reference answer (None where the check needs none)."""

    def __call__(self, prompt_text: str, answer: str, reference: str | None) -> bool | Abstention: ...

    def check_reference(self, reference: str) -> None:
        """`DataError`, or `JudgeError`, when no answer could be held against `reference`."""


class Exact:
    """The same text as the reference's, each cut down to its result (`final_text`).

    White space and emphasis around are never compared, case and a trailing period only where asked.
    """

    def __init__(self, match_case: bool = False, match_period: bool = False) -> None:
        self.match_case = match_case
        self.match_period = match_period

    def __call__(self, prompt_text: str, answer: str, reference: str | None) -> bool | Abstention:
        return self._plain(answer) == self._plain(reference or "")

    def check_reference(self, reference: str) -> None:
        if not self._plain(reference):
            raise DataError("nothing is left of the answer but signs")

    def _plain(self, text: str) -> str:
        text = " ".join(unicodedata.normalize("NFC", final_text(text)).split())
        text = text if self.match_case else text.casefold()
        return text.strip("*_`: ") if self.match_period else text.strip("*_`: ").rstrip(".*_` ")


class Numeric:
    """The same number as the reference's (`final_number` of each), but for `tolerance` in the answer's own units."""

    def __init__(self, tolerance: float = 0.0) -> None:
        self.tolerance = Fraction(str(tolerance))

    def __call__(self, prompt_text: str, answer: str, reference: str | None) -> bool | Abstention:
        found = final_number(answer)
        return found is not None and found.equals(self._wanted(reference or ""), self.tolerance)

    def check_reference(self, reference: str) -> None:
        self._wanted(reference)

    def _wanted(self, reference: str) -> Number:
        wanted = final_number(reference)
        if wanted is None:
            raise DataError(f"no number in the answer '{one_line_of(reference)}'")
        return wanted


class Matches:
    """A regular expression, the same for all prompts or each prompt's reference, found in the answer, or all of it."""

    def __init__(self, pattern: str | None = None, whole: bool = False) -> None:
        self.pattern = None if pattern is None else Expression(pattern, "VerifierJudge: pattern")
        self.whole = whole

    def __call__(self, prompt_text: str, answer: str, reference: str | None) -> bool | Abstention:
        expression = self.pattern or Expression(reference or "", "VerifierJudge: answers")
        return expression.found(answer, whole=self.whole)

    def check_reference(self, reference: str) -> None:
        Expression(reference, "the answer")


class Schema:
    """JSON that is valid by a JSON Schema: the whole answer, else its first block between ``` fences.

    NaN and Infinity are no JSON. References to other documents are not followed. A `pattern` in the schema is
    searched without a limit of time: write none that may take for ever.
    """

    def __init__(self, schema: Any) -> None:
        """Raises `JudgeError` when `schema` is no JSON Schema."""
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry

        try:
            kind = validator_for(schema)
            kind.check_schema(schema)
        except SchemaError as error:
            raise JudgeError(f"VerifierJudge: not a JSON Schema: {one_line_of(error.message)}") from error
        registry: Any = Registry()  # an empty one: the default would fetch what a "$ref" names
        self.validator = kind(schema, registry=registry)

    def __call__(self, prompt_text: str, answer: str, reference: str | None) -> bool | Abstention:
        from referencing.exceptions import Unresolvable

        try:
            return bool(self.validator.is_valid(_json(answer)))
        except (ValueError, RecursionError):  # no JSON, or nested beyond any use
            return False
        except Unresolvable as error:
            raise JudgeError(f"VerifierJudge: the schema refers to what it does not hold: {one_line(error)}") from error

    def check_reference(self, reference: str) -> None:
        """A schema needs none."""


class ByFunction:
    """A function of (prompt_text, answer), or of (prompt_text, answer, reference) where there are references."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, prompt_text: str, answer: str, reference: str | None) -> bool | Abstention:
        try:
            given = (prompt_text, answer) if reference is None else (prompt_text, answer, reference)
            verdict = self.function(*given)
        except Exception as error:  # this answer's fault alone
            return Abstention(one_line(error))
        if isinstance(verdict, Abstention):
            return verdict
        item = getattr(verdict, "item", None)  # a truth value of numpy or torch
        value = item() if callable(item) else verdict
        return value if isinstance(value, bool) else NO_VERDICT

    def check_reference(self, reference: str) -> None:
        """What it can use is the function's own affair."""


def one_line_of(text: str) -> str:
    """`text` on one line, cut short, for a message."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"


def _json(answer: str) -> Any:
    """The answer as JSON, else its first fenced block; `ValueError` where neither is."""
    try:
        return json.loads(answer, parse_constant=_no_constant)
    except ValueError:
        block = BLOCK.search(answer)
        if block is None:
            raise
        return json.loads(block[1], parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
