"""Judges an answer as right or wrong: by a reference answer, a pattern, a schema, or a function."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from judges.answers import Answers
from judges.checks import ByFunction, Check, Exact, Matches, Numeric, Schema
from online_dpo.errors import JudgeError, OnlineDPOError, nearest, one_line
from online_dpo.judging import Abstention, PointwiseJudge, Score, import_object
from online_dpo.types import Candidate, Prompt

Kind = Literal["exact", "numeric", "regex", "json_schema", "function"]
KEYS: dict[str, tuple[str, ...]] = {
    "exact": ("answers", "match_case", "match_period"),
    "numeric": ("answers", "tolerance"),
    "regex": ("answers", "pattern", "whole"),
    "json_schema": ("schema", "schema_file"),
    "function": ("answers", "function"),
}
COLUMNS = ("answer_column", "prompt_column", "id_column")
NO_REFERENCE = Abstention("no reference answer")


class VerifierJudge(PointwiseJudge):
    """1 for an answer that is right, 0 for one that is wrong. All right or all wrong: pairing drops a tie.

    kind: exact — the text of the reference answer (`match_case`, `match_period`: whether these count).
    kind: numeric — its number (`judges.final_answer`), but for `tolerance` in its own units.
    kind: regex — `pattern`, else the prompt's reference answer as a pattern, found in the answer (`whole`: all of it).
    kind: json_schema — valid JSON by `schema`, or by that in `schema_file`.
    kind: function — `function`, "module:name", of (prompt_text, answer), or (prompt_text, answer, reference) with
    `answers`, says true, false, or None for neither. It is asked again each time; `FunctionJudge` keeps its answers.

    `answers` names a file of reference answers (`judges.answers.Answers`: found by `id_column`, else by the prompt's
    text). A prompt without one abstains. Raises `JudgeError`, or `DataError`, when a key does not belong to the kind,
    or a reference answer can match nothing.
    """

    cached: ClassVar[bool] = False
    code_params: ClassVar[tuple[str, ...]] = ("function",)
    file_params: ClassVar[tuple[str, ...]] = ("answers", "schema_file")

    def __init__(
        self,
        kind: Kind,
        answers: str | None = None,
        *,
        answer_column: str = "answer",
        prompt_column: str | None = None,
        id_column: str | None = None,
        match_case: bool = False,
        match_period: bool = False,
        tolerance: float = 0.0,
        pattern: str | None = None,
        whole: bool = False,
        schema: Any = None,
        schema_file: str | None = None,
        function: str | None = None,
    ) -> None:
        if kind not in KEYS:
            raise JudgeError(f"VerifierJudge: no kind '{kind}'{nearest(kind, get_args(Kind))}")
        given = {
            "answers": answers, "match_case": match_case, "match_period": match_period, "tolerance": tolerance,
            "pattern": pattern, "whole": whole, "schema": schema, "schema_file": schema_file, "function": function,
        }  # fmt: skip
        columns = {"answer_column": answer_column, "prompt_column": prompt_column, "id_column": id_column}
        _check_keys(kind, given, columns)
        self.check = _check(kind, given)
        self.answers = None if answers is None else _answers(answers, columns, self.check)

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        """1.0 or 0.0 per candidate, or an `Abstention`."""
        reference = None
        if self.answers is not None:
            reference = self.answers.find(prompt)
            if reference is None:
                return [NO_REFERENCE] * len(candidates)
        return [_score(self.check(prompt.text, candidate.text, reference)) for candidate in candidates]


def _score(said: bool | Abstention) -> Score:
    return said if isinstance(said, Abstention) else float(said)


def _check_keys(kind: str, given: dict[str, Any], columns: dict[str, str | None]) -> None:
    """`JudgeError` for what another kind takes, for what is missing, and for a wrong type."""
    for key, value in given.items():
        if value not in (None, False) and key not in KEYS[kind]:
            raise JudgeError(f"VerifierJudge: kind {kind} takes no '{key}' (it takes {', '.join(KEYS[kind])})")
    for key in ("match_case", "match_period", "whole"):
        if not isinstance(given[key], bool):
            raise JudgeError(f"VerifierJudge: {key} must be true or false, found {given[key]!r}")
    for key in ("answers", "pattern", "schema_file", "function"):
        if given[key] is not None and not isinstance(given[key], str):
            raise JudgeError(f"VerifierJudge: {key} must be a text, found {given[key]!r:.60}")
    if columns["prompt_column"] is not None and columns["id_column"] is not None:
        raise JudgeError("VerifierJudge: give prompt_column or id_column, not both")
    one_of = {"exact": ("answers",), "numeric": ("answers",), "regex": ("pattern", "answers"),
              "json_schema": ("schema", "schema_file"), "function": ("function",)}[kind]  # fmt: skip
    there = [key for key in one_of if given[key] is not None]
    if len(there) != 1:
        raise JudgeError(f"VerifierJudge: kind {kind} needs {' or '.join(one_of)}" + (", not both" if there else ""))
    if given["answers"] is None and (stray := [key for key in COLUMNS if columns[key] not in (None, "answer")]):
        raise JudgeError(f"VerifierJudge: {stray[0]} needs answers")


def _check(kind: str, given: dict[str, Any]) -> Check:
    if kind == "exact":
        return Exact(given["match_case"], given["match_period"])
    if kind == "numeric":
        tolerance = given["tolerance"]
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
            raise JudgeError(f"VerifierJudge: tolerance must be a number from 0, found {tolerance!r}")
        return Numeric(tolerance)
    if kind == "regex":
        return Matches(given["pattern"], given["whole"])
    if kind == "json_schema":
        return Schema(given["schema"] if given["schema_file"] is None else _read_json(given["schema_file"]))
    function = import_object(given["function"], what="function")
    if not callable(function):
        raise JudgeError(f"VerifierJudge: '{given['function']}' is a {type(function).__name__}, not a function")
    return ByFunction(function)


def _answers(path: str, columns: dict[str, str | None], check: Check) -> Answers:
    answers = Answers(
        path,
        answer_column=columns["answer_column"] or "answer",
        prompt_column=columns["prompt_column"],
        id_column=columns["id_column"],
    )
    for number, reference in answers.rows.values():
        try:
            check.check_reference(reference)
        except OnlineDPOError as error:
            raise type(error)(f"{path}: row {number}: {error}") from error
    return answers


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JudgeError(f"VerifierJudge: schema_file '{path}' cannot be read: {one_line(error)}") from error
