"""Records survive the disk: any text, log-probs bit for bit, empty lists; damage is told by the file's name."""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_dpo.errors import RunFolderError
from online_dpo.records import (
    CANDIDATES,
    VERDICTS,
    HeldOutAnswer,
    read_candidates,
    read_held_out,
    read_pairs,
    read_prompts,
    read_verdicts,
    write_candidates,
    write_held_out,
    write_pairs,
    write_prompts,
    write_verdicts,
)
from online_dpo.tables import read_rows
from online_dpo.types import Abstain, Candidate, Message, Pair, Prompt, Split, Verdict

T = TypeVar("T")

SLOW_DISK = settings(deadline=None)
TEXT = st.text(max_size=40)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
LOGPROBS = st.lists(st.floats(max_value=0.0, width=32, allow_nan=False), max_size=5).map(tuple)
CANDIDATE = st.builds(
    Candidate,
    prompt_id=TEXT,
    index=st.integers(0, 2**31 - 1),
    text=TEXT,
    token_ids=TOKENS,
    logprobs=LOGPROBS,
    finish_reason=st.sampled_from(["stop", "length"]),
    seed=st.integers(0, 2**62 - 1),
)
SCORES = st.floats(allow_nan=False, allow_infinity=False)
PROMPT = st.builds(
    Prompt,
    id=TEXT,
    messages=st.lists(st.builds(Message, role=TEXT, content=TEXT), min_size=1, max_size=3).map(tuple),
    token_ids=TOKENS,
)


def there_and_back(write: Callable[[Path, T], None], read: Callable[[Path], Any], value: T) -> Any:
    """`value` after a visit to the disk."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.parquet"
        write(file, value)
        return read(file)


def bits(values: tuple[float, ...]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


@SLOW_DISK
@given(st.lists(CANDIDATE, max_size=4))
def test_candidates(candidates: list[Candidate]) -> None:
    found = there_and_back(write_candidates, read_candidates, candidates)
    assert found == candidates
    # Equality takes -0.0 for 0.0; the bits do not.
    assert [bits(candidate.logprobs) for candidate in found] == [bits(candidate.logprobs) for candidate in candidates]


def test_log_probs_keep_every_bit() -> None:
    """The least subnormal float32, the one next below 0.1's, −0, the largest, and minus infinity (a masked token)."""
    values = (-(2.0**-149), struct.unpack("<f", b"\xcc\xcc\xcc\xbd")[0], -0.0, -3.4028234663852886e38, -math.inf)
    candidate = Candidate("p", 0, "", (1, 2, 3, 4, 5), values, "stop", 2**62 - 1)
    (found,) = there_and_back(write_candidates, read_candidates, [candidate])
    assert bits(found.logprobs) == bits(values)
    assert all(type(value) is float for value in found.logprobs)
    assert all(type(token) is int for token in found.token_ids)


@SLOW_DISK
@given(
    st.lists(st.builds(Verdict, TEXT, st.integers(0, 99), SCORES) | st.builds(Abstain, TEXT, st.integers(0, 99), TEXT))
)
def test_verdicts_and_abstentions(verdicts: list[Verdict | Abstain]) -> None:
    found = there_and_back(write_verdicts, read_verdicts, verdicts)
    assert found == verdicts
    assert [type(verdict) for verdict in found] == [type(verdict) for verdict in verdicts]


def test_a_score_of_zero_is_no_abstention_and_an_empty_reason_still_one() -> None:
    verdicts: list[Verdict | Abstain] = [Verdict("p", 0, 0.0), Abstain("p", 1, "")]
    assert there_and_back(write_verdicts, read_verdicts, verdicts) == verdicts


@SLOW_DISK
@given(st.lists(PROMPT, max_size=3), st.lists(PROMPT, max_size=3))
def test_prompts(train: list[Prompt], held_out: list[Prompt]) -> None:
    groups: dict[Split, list[Prompt]] = {"train": train, "held_out": held_out}
    found = there_and_back(write_prompts, read_prompts, groups)
    assert found == {"train": tuple(train), "held_out": tuple(held_out)}


@SLOW_DISK
@given(
    st.lists(
        st.builds(
            HeldOutAnswer,
            CANDIDATE,
            SCORES | st.none(),
            TEXT | st.none(),
            LOGPROBS,
            LOGPROBS | st.none(),
            SCORES | st.none(),
            TEXT | st.none(),
        ),
        max_size=3,
    )
)
def test_held_out_answers(answers: list[HeldOutAnswer]) -> None:
    found = there_and_back(write_held_out, read_held_out, answers)
    assert found == answers
    assert [bits(a.initial_logprobs) for a in found] == [bits(a.initial_logprobs) for a in answers]


def test_pairs_keep_the_very_tokens(tmp_path: Path) -> None:
    """Two answers may read the same and differ in tokens: the pair has those that were sampled."""
    prompt = Prompt("p", (Message("system", "Be brief."), Message("user", "Hé\n<|im_end|>")), (5, 6))
    answers = [
        Candidate("p", 0, "ab", (1, 2), (-0.1, -0.2), "length", 7),
        Candidate("p", 1, "ab", (3,), (-0.3,), "stop", 8),
        Candidate("p", 2, "c", (4,), (-0.4,), "stop", 9),
    ]
    other = Candidate("q", 1, "ab", (9,), (-9.0,), "stop", 9)
    pairs = [Pair(prompt, answers[1], answers[2], 0.1, -0.2), Pair(prompt, answers[0], answers[2], 1 / 3, -0.2)]
    write_pairs(tmp_path / "pairs.parquet", pairs)
    found = read_pairs(tmp_path / "pairs.parquet", {"p": prompt}, [other, *reversed(answers)])
    assert found == pairs
    assert found[0].chosen.token_ids == (3,)
    assert found[1].chosen is answers[0]
    assert found[1].chosen_score == 1 / 3  # float64, not rounded to float32


def test_empty_files(tmp_path: Path) -> None:
    assert there_and_back(write_candidates, read_candidates, []) == []
    assert there_and_back(write_verdicts, read_verdicts, []) == []
    assert there_and_back(write_held_out, read_held_out, []) == []
    write_pairs(tmp_path / "pairs.parquet", [])
    assert read_pairs(tmp_path / "pairs.parquet", {}, []) == []


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    """Digests are over files: a stage that is done again must write what it wrote before."""
    candidates = [Candidate("p", i, "t" * i, (i,), (-1.0,), "stop", i) for i in range(100)]
    write_candidates(tmp_path / "a", candidates)
    write_candidates(tmp_path / "b", candidates)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- damage ---


def fault(file: Path) -> str:
    """The one line that says what is wrong with a candidates file."""
    with pytest.raises(RunFolderError) as caught:
        read_candidates(file)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    return message


def test_missing(tmp_path: Path) -> None:
    assert "is missing or damaged" in fault(tmp_path / "candidates.parquet")


@pytest.mark.parametrize("length", [0, 3, 100, -1])
def test_truncated(tmp_path: Path, length: int) -> None:
    file = tmp_path / "candidates.parquet"
    write_candidates(file, [Candidate("p", 0, "text", (1,), (-1.0,), "stop", 0)])
    file.write_bytes(file.read_bytes()[:length])
    assert "is missing or damaged" in fault(file)


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "candidates.parquet").mkdir()
    fault(tmp_path / "candidates.parquet")


def test_another_files_columns(tmp_path: Path) -> None:
    file = tmp_path / "candidates.parquet"
    write_verdicts(file, [Verdict("p", 0, 1.0)])
    found = "has columns ['prompt_id', 'index', 'score', 'abstain_reason', 'details'], expected ['prompt_id'"
    assert found in fault(file)
    row = {"prompt_id": "p", "index": 0, "score": 1.0, "abstain_reason": None, "details": None}
    assert read_rows(file, VERDICTS) == [row]


def test_details_come_back_and_a_reason_of_broken_text_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.parquet"
    told = Verdict("p", 0, 1.0, {"flipped": True, "raw": 0.25, "why": "é\u2028", "none": None})
    write_verdicts(file, [told, Abstain("p", 1, "half \ud83d")])
    assert read_verdicts(file) == [told, Abstain("p", 1, "half ?")]


def test_a_wrong_type_is_refused_when_written(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError, OSError)):
        write_candidates(tmp_path / "c", [Candidate("p", 2**31, "", (), (), "stop", 0)])
    assert CANDIDATES.field("token_ids").type.value_type.bit_width == 32
