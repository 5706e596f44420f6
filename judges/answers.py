"""Reference answers: a file's rows by prompt."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from online_dpo.errors import DataError, nearest, one_line
from online_dpo.types import Prompt

PROMPT_COLUMNS = ("prompt", "question")
KINDS = (".jsonl", ".ndjson", ".json", ".csv")


class Answers:
    """The reference answer of each prompt of a file: JSON lines, a JSON list of rows, or CSV with a header.

    Rows are found by `id_column` (the prompt's id) where it is given; else by `prompt_column`, the prompt's last
    message, white space apart; without a name it is the column `prompt` or `question`. What `answer_column` holds is
    kept as text: JSON's 18 and "18" are one answer.
    """

    def __init__(
        self,
        path: str,
        *,
        answer_column: str = "answer",
        prompt_column: str | None = None,
        id_column: str | None = None,
    ) -> None:
        """Raises `DataError`: no such file or column, a row without an answer, two answers for one prompt."""
        self.path = path
        self.by_id = id_column is not None
        self.rows: dict[str, tuple[int, str]] = {}
        for number, row in rows_of(Path(path).expanduser()):
            where = f"{path}: row {number}"
            column = id_column or prompt_column or next((name for name in PROMPT_COLUMNS if name in row), "prompt")
            key = self._key(_cell(row, column, where))
            answer = _cell(row, answer_column, where)
            known = self.rows.setdefault(key, (number, answer))
            if known[1] != answer:
                raise DataError(f"{where}: another answer than row {known[0]} has for the same prompt")
        if not self.rows:
            raise DataError(f"{path}: no rows")

    def find(self, prompt: Prompt) -> str | None:
        """The reference answer of `prompt`; None where the file has none."""
        found = self.rows.get(self._key(prompt.id if self.by_id else prompt.text))
        return None if found is None else found[1]

    def _key(self, text: str) -> str:
        return text.strip() if self.by_id else " ".join(text.split())


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file, numbered from 1; `DataError` when it cannot be read as what its name says."""
    if path.suffix.lower() not in KINDS:
        raise DataError(f"{path}: answers are read from {', '.join(KINDS)}, not from '{path.suffix}'")
    try:
        # utf-8-sig: spreadsheets begin a CSV with a mark that would become part of the first column's name.
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
        elif path.suffix.lower() == ".json":
            rows = json.loads(text)
        else:  # not splitlines(): JSON text may hold U+2028
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list of rows is needed, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}: row {number}: columns and values are needed, found {type(row).__name__}")
        yield number, {str(name): value for name, value in row.items()}


def _cell(row: Mapping[str, Any], column: str, where: str) -> str:
    """What stands in `column`, as text."""
    if column not in row:
        raise DataError(f"{where}: no column '{column}'{nearest(column, row)}; columns: {', '.join(row)}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(f"{where}: column '{column}': a text or a number is needed, found {value!r:.60}")
    return str(value)
