"""Answers without a rival are read from every form that has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from online_dpo.errors import DataError
from online_dpo.given_answers import load_given_answers


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


HELLO = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": " hello "}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "answer": "hello"},
        {"question": "hi", "response": " hello\n"},
        {"prompt": [HELLO], "completion": [SAID]},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"prompt": "hi", "chosen": "hello", "output": "not this one"},
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello"},
        {"messages": [HELLO, SAID]},
    ],
)
def test_every_form_becomes_the_same_answer(tmp_path: Path, row: dict[str, Any]) -> None:
    found = load_given_answers(write(tmp_path / "a.jsonl", row))
    [answer] = found.answers
    assert [(message.role, message.content) for message in answer.messages] == [("user", "hi")]
    assert answer.text == "hello"
    assert not any(found.dropped.values())


def test_the_chosen_summary_is_the_answer(tmp_path: Path) -> None:
    row = {"info": {"post": "long"}, "summaries": [{"text": "a"}, {"text": "b"}]}
    found = load_given_answers(write(tmp_path / "a.jsonl", row | {"choice": 1}, row | {"choice": None}))
    assert [answer.text for answer in found.answers] == ["b"]
    assert found.dropped == {"empty": 0, "no_question": 0, "undecided": 1}


def test_what_is_left_out_is_counted_and_the_limit_draws(tmp_path: Path) -> None:
    rows = [{"id": f"r{number}", "prompt": "hi", "answer": f"hello {number}"} for number in range(5)]
    odd = [{"id": "x", "prompt": " ", "answer": "b"}, {"id": "y", "prompt": "a", "answer": ""}]
    path = write(tmp_path / "a.jsonl", *rows, *odd)
    assert load_given_answers(path).dropped == {"empty": 2, "no_question": 0, "undecided": 0}
    some = [answer.id for answer in load_given_answers(path, limit=2).answers]
    assert len(some) == 2
    assert some == [answer.id for answer in load_given_answers(path, limit=2).answers]
    chat = write(tmp_path / "c.jsonl", {"messages": [SAID, SAID]}, {"messages": [HELLO, SAID]})
    assert load_given_answers(chat).dropped["no_question"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "reply": "b"}, r"no answers in columns prompt, reply; known forms: prompt\|question"),
        ({"answer": "b"}, "no answers in columns answer"),
        ({"prompt": "a", "answer": 3}, "row 1: column 'answer': text or a list"),
        ({"prompt": "a", "answer": ""}, r"no usable answer \(dropped: 1 empty\)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_given_answers(write(tmp_path / "a.jsonl", row))
