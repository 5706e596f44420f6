"""The line at fault is found, in whatever way the file is compressed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online_dpo.errors import DataError
from online_dpo.line_faults import BLOCK, bad_json_line, opened, refuse_other_encodings

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": lambda content: content,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.bz2": bz2.compress,
    "a.jsonl.xz": lzma.compress,
}
GOOD = b'{"prompt": "one"}\n'


@pytest.mark.parametrize("name", PACKED)
def test_the_line_is_counted_in_what_is_compressed(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(PACKED[name](GOOD * 3 + b"[1]\n" + GOOD))
    assert bad_json_line(file) == 'line 4 is a list; each line is a mapping, as {"prompt": "…"}'
    with opened(file) as stream:
        assert stream.readline() == GOOD
    file.write_bytes(PACKED[name](GOOD * 2 + b'{"prompt": "caf\xe9"}\n'))
    with pytest.raises(DataError, match=r"^it is not UTF-8 \(line 3\): save it in that encoding$"):
        refuse_other_encodings(file, "it")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"words", "is no JSON (Expecting value, column 1)"),
        (b'{"a": 1', "is no JSON (Expecting ',' delimiter, column 8)"),
        (b'"words"', "is a text; each line"),
        (b"7", "is a number; each line"),
        (b"null", "is null; each line"),
        (b"true", "is true or false; each line"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "a number too long, or nested too deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a number too long, or nested too deep"),
        (b'{"a": "\\ud83d"}', "has half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, line: bytes, fault: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + line + b"\n")
    assert bad_json_line(file).startswith("line 3 ") and fault in bad_json_line(file)


def test_an_archive_that_is_none_is_left_to_who_reads_it(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"no archive")
        assert bad_json_line(tmp_path / name) == "", name


def test_a_character_over_two_blocks_is_a_character(tmp_path: Path) -> None:
    """é is two bytes: the last of one block and the first of the next."""
    file = tmp_path / "a.txt"
    file.write_bytes(b"\n" * (BLOCK - 1) + "é".encode() + b"\n\xff")
    with pytest.raises(DataError, match=rf"line {BLOCK + 1}\)"):
        refuse_other_encodings(file, "it")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.none()), min_size=1), min_size=1))
def test_right_lines_have_no_fault(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert bad_json_line(file) == ""
    refuse_other_encodings(file, "it")
