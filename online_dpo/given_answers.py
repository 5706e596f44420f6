"""Answers that people, or another model, gave to prompts, with nothing beside them: what is imitated or surpassed.

Read from preference data (the chosen answer); from a prompt column (`prompt`, `question` or `instruction`) with one of
`ANSWER_COLUMNS`, text or a list of {role, content}; from a column `messages` of whole chats that end with the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.config import PromptsSpec
from online_dpo.errors import DataError
from online_dpo.preferences import (
    PROMPT_COLUMNS,
    SUMMARY_COLUMNS,
    Answered,
    drawn,
    prompt_column,
    row_ids,
    split_answer,
    summaries,
)
from online_dpo.prompts import read_rows
from online_dpo.types import Message

ANSWER_COLUMNS = ("chosen", "answer", "response", "completion", "output")
FORMS = f"{'|'.join(PROMPT_COLUMNS)} + {'|'.join(ANSWER_COLUMNS)}, messages, or any form of preference pairs"


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """One answer to one prompt. `messages` end with the user's turn."""

    id: str
    messages: tuple[Message, ...]
    text: str


@dataclass(frozen=True)
class GivenAnswers:
    """Answers in the order of their source, with distinct ids.

    `dropped` counts the rows left out: `empty` (the answer or the prompt), `no_question` (the prompt does not end with
    the user's turn), `undecided` (no choice). `source` is the path or dataset id as it was given.
    """

    answers: tuple[GivenAnswer, ...]
    dropped: dict[str, int]
    source: str


def load_given_answers(
    path: str,
    *,
    folders: Sequence[Path] = (),
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    name: str | None = None,
) -> GivenAnswers:
    """The answers of `path`; arguments as of `preferences.load_preferences`.

    Raises `DataError`: nothing there, unknown columns, a row that holds no answer in a known form, no usable answer.
    """
    rows = read_rows(PromptsSpec(path=path, split=split, name=name), [*folders, Path.cwd()], "answers")
    _check_columns(rows.column_names, path)
    dropped: Counter[str] = Counter(empty=0, no_question=0, undecided=0)
    answers = []
    for number, (row_id, row) in enumerate(zip(row_ids(rows), rows, strict=True), start=1):
        answered = _answered(row, f"{path}: row {number}")
        reason = "undecided" if answered is None else _fault(*answered)
        if answered is not None and reason is None:
            answers.append(GivenAnswer(row_id, *answered))
        elif reason is not None:
            dropped[reason] += 1
    if not answers:
        lost = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
        raise DataError(f"{path}: no usable answer" + (f" (dropped: {lost})" if lost else ""))
    return GivenAnswers(drawn(answers, limit, seed), dict(dropped), path)


def _check_columns(columns: Sequence[str], path: str) -> None:
    answer = next((column for column in ANSWER_COLUMNS if column in columns), None)
    asked = answer == "chosen" or any(column in columns for column in PROMPT_COLUMNS)
    if not ("messages" in columns or set(columns) >= SUMMARY_COLUMNS or (answer is not None and asked)):
        raise DataError(f"{path}: no answers in columns {', '.join(columns)}; known forms: {FORMS}")


def _answered(row: Mapping[str, Any], where: str) -> Answered | None:
    """The row's prompt and answer; None where a choice was left open."""
    if set(row) >= SUMMARY_COLUMNS:
        both = summaries(row, where)
        return None if both is None else both[0]
    column = next((column for column in ANSWER_COLUMNS if column in row), "messages")
    if column == "messages":
        return split_answer(None, row[column], f"{where}: column 'messages'")
    return split_answer(prompt_column(row, where), row[column], f"{where}: column '{column}'")


def _fault(messages: tuple[Message, ...], answer: str) -> str | None:
    """Why the row is left out; None when it is not."""
    if not answer or not messages or not messages[-1].content.strip():
        return "empty"
    return None if messages[-1].role == "user" else "no_question"
