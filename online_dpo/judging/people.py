"""What people answered, on disk: a file a person, one JSON object a line, only ever appended to.

Lines of one question share its `id`; the last one counts. A line without its line break was being written when the
process was killed: it was never confirmed to the person, so it is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from online_dpo.errors import DataError, one_line
from online_dpo.files import digest_json
from online_dpo.types import Message

FORMAT = 1
Ranking: TypeAlias = tuple[tuple[int, ...], ...]
"""Groups of equally good texts, the best group first; the numbers are places in `texts`."""


@dataclass(frozen=True, slots=True)
class PersonAnswer:
    """What a person said of `texts`, which all answer `messages`; `texts` stand in the order they were shown in.

    `ranking` holds every text once; None: the person skipped the question, for `reason`. `seconds`: time taken.
    `when`: UTC, ISO 8601.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    texts: tuple[str, ...]
    ranking: Ranking | None
    reason: str
    seconds: float
    when: str

    @property
    def id(self) -> str:
        """The question's: the same in every order of the texts."""
        return question_id(self.messages, self.texts)


def question_id(messages: Sequence[Message], texts: Sequence[str]) -> str:
    """SHA-256 (hex) of a prompt's messages and the texts that are to be ranked, whatever their order."""
    return digest_json([[asdict(message) for message in messages], sorted(texts)])


def answer_line(answer: PersonAnswer) -> bytes:
    """`answer` as a line of the file."""
    return _line({"format": FORMAT, "id": answer.id, **asdict(answer)})


def undo_line(question: str, when: str) -> bytes:
    """The line that takes back what was said of `question`."""
    return _line({"format": FORMAT, "id": question, "undone": True, "when": when})


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def whole_lines(data: bytes) -> bytes:
    """`data` without a half-written last line."""
    return data[: data.rfind(b"\n") + 1]


def read_people(path: Path) -> dict[str, PersonAnswer]:
    """The answers in file `path` by question, the latest answer last.

    Raises `DataError` when the file cannot be read, or a line is not one that `answer_line` or `undo_line` wrote.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"people's answers {path} cannot be read: {one_line(error)}") from error
    answers: dict[str, PersonAnswer] = {}
    for number, line in enumerate(whole_lines(data).split(b"\n")[:-1], start=1):
        question, answer = _parse(line, f"{path}, line {number}")
        answers.pop(question, None)
        if answer is not None:
            answers[question] = answer
    return answers


def _parse(line: bytes, where: str) -> tuple[str, PersonAnswer | None]:
    """The question and its answer; no answer where it was taken back."""
    try:
        row = json.loads(line)
        if row["format"] != FORMAT:
            raise DataError(f"{where}: format {row['format']!r}; this version reads format {FORMAT}")
        if row.get("undone"):
            return str(row["id"]), None
        answer = _answer(row)
        if answer.id != row["id"]:
            raise ValueError("its id is not that of its prompt and texts")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{where} is no answer of a person: {one_line(error)}") from error
    return answer.id, answer


def _answer(row: dict[str, Any]) -> PersonAnswer:
    messages = tuple(Message(str(message["role"]), str(message["content"])) for message in row["messages"])
    texts = tuple(str(text) for text in row["texts"])
    ranking = None
    if row["ranking"] is not None:
        ranking = tuple(tuple(int(place) for place in group) for group in row["ranking"])
        if sorted(place for group in ranking for place in group) != list(range(len(texts))) or () in ranking:
            raise ValueError("the ranking does not hold every text once")
    if len(texts) < 2 or len(set(texts)) != len(texts):
        raise ValueError("two texts or more are needed, all different")
    return PersonAnswer(
        str(row["prompt_id"]),
        messages,
        texts,
        ranking,
        str(row["reason"]),
        float(row["seconds"]),
        str(row["when"]),
    )
