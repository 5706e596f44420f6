"""What judges said, on disk: kept once, shared by processes, refused where it is damaged."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging_parts import answer, prompt

from online_dpo.errors import RunFolderError
from online_dpo.judging import Abstention, Answer, Opinion, VerdictCache
from online_dpo.judging.cache import LOOKED_UP_AT_ONCE, answer_key
from online_dpo.types import Candidate, Message, Prompt

ROOT = Path(__file__).resolve().parents[1]
KEY = b"k" * 32


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[VerdictCache]:
    with VerdictCache(tmp_path / "verdicts.sqlite") as found:
        yield found


# --- answers ---

text = st.text(st.characters(codec=None), max_size=20)
details = st.dictionaries(text, st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False), text), max_size=3)
answers = st.one_of(
    st.builds(Opinion, st.floats(allow_nan=False, allow_infinity=False), details), st.builds(Abstention, text)
)


@settings(max_examples=50, deadline=None)
@given(rows=st.dictionaries(st.binary(min_size=32, max_size=32), st.lists(answers, max_size=4), max_size=5))
def test_what_was_kept_is_found_again_bit_by_bit(
    rows: dict[bytes, list[Answer]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cache") / "deep" / "verdicts.sqlite"
    with VerdictCache(path) as cache:
        cache.keep(rows.items(), "judge", {})
    with VerdictCache(path) as cache:
        assert cache.find([*rows, b"unknown"]) == rows
        assert len(cache) == len(rows)


def test_more_keys_than_one_query_takes(cache: VerdictCache) -> None:
    keys = [number.to_bytes(32, "big") for number in range(2 * LOOKED_UP_AT_ONCE + 1)]
    cache.keep([(key, [Opinion(float(n))]) for n, key in enumerate(keys)], "judge", {})
    assert cache.find(keys) == {key: [Opinion(float(n))] for n, key in enumerate(keys)}
    assert cache.find([]) == {}


def test_passing_abstentions_are_left_out_with_all_of_their_row(cache: VerdictCache) -> None:
    cache.keep(
        [
            (b"1", [Opinion(1.0), Abstention("time limit", passing=True)]),
            (b"2", [Opinion(2.0), Abstention("off topic")]),
        ],
        "judge",
        {"calls": 2},
    )
    assert cache.find([b"1", b"2"]) == {b"2": [Opinion(2.0), Abstention("off topic")]}
    assert cache.spent() == {"calls": 2.0}


def test_an_answer_once_kept_never_changes(cache: VerdictCache) -> None:
    cache.keep([(KEY, [Opinion(1.0)])], "judge", {})
    cache.keep([(KEY, [Opinion(2.0)])], "judge", {})
    assert cache.find([KEY]) == {KEY: [Opinion(1.0)]}


def test_the_ledger_adds_up_by_judge_and_over_all(tmp_path: Path) -> None:
    for judge, cost in (("a", 0.5), ("b", 0.25), ("a", 0.125)):
        with VerdictCache(tmp_path / "v.sqlite") as cache:
            cache.keep([], judge, {"cost": cost, "calls": 1})
    with VerdictCache(tmp_path / "v.sqlite") as cache:
        assert cache.spent("a") == {"cost": 0.625, "calls": 2.0}
        assert cache.spent() == {"cost": 0.875, "calls": 3.0}
        assert cache.spent("nobody") == {}


# --- keys ---

messages = st.lists(st.builds(Message, text, text), min_size=1, max_size=3).map(tuple)
prompts = st.builds(Prompt, text, messages, st.just(()))
candidates = st.lists(
    st.builds(
        Candidate,
        st.just("p"),
        st.just(0),
        text,
        st.lists(st.integers(0, 300_000), max_size=3).map(tuple),
        st.just(()),
        st.sampled_from(["stop", "length"]),
        st.just(0),
    ),
    max_size=3,
)
question = st.tuples(text, prompts, candidates)
Question = tuple[str, Prompt, list[Candidate]]


def parts(asked: Question) -> object:
    judge, prompt, row = asked
    return judge, prompt.id, prompt.messages, [(c.text, c.token_ids, c.finish_reason) for c in row]


@settings(max_examples=200, deadline=None)
@given(question, question)
def test_different_questions_have_different_keys(one: Question, other: Question) -> None:
    assert (answer_key(*one) == answer_key(*other)) == (parts(one) == parts(other))


@settings(max_examples=100, deadline=None)
@given(st.lists(text, min_size=4, max_size=4), st.integers(0, 2), st.integers(0, 20))
def test_text_that_moves_over_a_border_is_another_question(texts: list[str], which: int, by: int) -> None:
    """("ab", "c") and ("a", "bc"): the same letters in a row, cut elsewhere."""
    which = which % (len(texts) - 1)
    left, right = texts[which], texts[which + 1]
    cut = len(left) - min(by, len(left))
    moved = [*texts[:which], left[:cut], left[cut:] + right, *texts[which + 2 :]]

    def key(row: list[str]) -> bytes:
        judge, name, role, content = row
        return answer_key(judge, Prompt(name, (Message(role, content),), ()), [])

    assert (key(texts) == key(moved)) == (texts == moved)


def test_each_thing_that_a_judge_may_go_by_is_part_of_the_key() -> None:
    p, one, two = prompt("p"), answer("p", 0, "a"), answer("p", 1, "b")
    keys = {
        answer_key("judge", p, [one, two]),
        answer_key("judge", p, [two, one]),
        answer_key("other judge", p, [one, two]),
        answer_key("judge", replace(p, id="q"), [one, two]),
        answer_key("judge", replace(p, messages=(Message("system", "say p"),)), [one, two]),
        answer_key("judge", p, [one]),
        answer_key("judge", p, [replace(one, text="c"), two]),
        answer_key("judge", p, [replace(one, token_ids=(4,)), two]),
        answer_key("judge", p, [replace(one, finish_reason="length"), two]),
    }
    assert len(keys) == 9
    same = [replace(one, logprobs=(-9.0,), index=5, seed=7), two]
    assert answer_key("judge", p, same) in keys, "the same answer sampled again is asked once"


def test_a_prompts_answers_lie_side_by_side_whoever_else_is_asked() -> None:
    """Keys in their order: no other prompt's, and no other judge's, between two of one prompt's."""
    asked = [(judge, name) for judge in ("judge", "other judge") for name in map(str, range(50))]
    keys = sorted(
        (answer_key(judge, prompt(name), [answer(name, index, f"answer {index}")]), judge, name)
        for judge, name in asked
        for index in range(4)
    )
    met = [(judge, name) for _, judge, name in keys]
    assert sum(one != other for one, other in pairwise(met)) == len(asked) - 1


# --- the file ---


def test_a_file_that_is_no_cache_is_named_in_one_line(tmp_path: Path) -> None:
    path, content = tmp_path / "verdicts.sqlite", b"not a database" * 100
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"verdicts\.sqlite cannot be opened: DatabaseError") as caught:
        VerdictCache(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_cache_damaged_in_the_middle_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    rows = [(n.to_bytes(32, "big"), [Opinion(float(n), {"why": "x" * 50})]) for n in range(2000)]
    with VerdictCache(path) as cache:
        cache.keep(rows, "judge", {})
    data = bytearray(path.read_bytes())
    data[8192:] = b"\xff" * (len(data) - 8192)
    path.write_bytes(bytes(data))
    with pytest.raises(RunFolderError, match=r"verdicts\.sqlite") as caught, VerdictCache(path) as cache:
        cache.find([key for key, _ in rows])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["", "{", "7", "[7]", "[{}]", '[{"value": "much"}]', '{"value": 1}', "[null]"])
def test_an_answer_that_cannot_be_read_is_named_in_one_line(cache: VerdictCache, said: str) -> None:
    cache.connection.execute("INSERT INTO answers VALUES (?, ?)", (KEY, said))
    with pytest.raises(RunFolderError, match=r"verdicts\.sqlite is damaged"):
        cache.find([KEY])


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(RunFolderError, match="has cache format 99, this version reads format 2"):
        VerdictCache(path)


def test_where_no_file_can_be_made_it_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot be opened"):
        VerdictCache(tmp_path / "file" / "verdicts.sqlite")
    with pytest.raises(RunFolderError, match="cannot be opened"):
        VerdictCache(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that even root cannot write to (/proc)")
def test_a_read_only_folder_is_said_in_one_line() -> None:
    with pytest.raises(RunFolderError, match=r"/proc/verdicts\.sqlite cannot be opened"):
        VerdictCache(Path("/proc/verdicts.sqlite"))


def test_a_cache_that_turns_read_only_is_said_in_one_line(cache: VerdictCache) -> None:
    cache.connection.execute("PRAGMA query_only=1")
    with pytest.raises(RunFolderError, match="cannot be written"):
        cache.keep([(KEY, [Opinion(1.0)])], "judge", {})


def test_a_row_and_its_cost_are_written_together_or_not_at_all(cache: VerdictCache) -> None:
    cache.connection.execute("CREATE TRIGGER no BEFORE INSERT ON ledger BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(RunFolderError, match="disk full"):
        cache.keep([(KEY, [Opinion(1.0)])], "judge", {"calls": 1})
    assert cache.find([KEY]) == {}


WRITER = """
import sys
from pathlib import Path
from online_dpo.judging.cache import VerdictCache
from online_dpo.judging import Opinion
own = int(sys.argv[2])
with VerdictCache(Path(sys.argv[1])) as cache:
    for n in range(100):
        cache.keep([(bytes([own]) + n.to_bytes(31, "big"), [Opinion(float(n))])], "judge", {"calls": 1})
        shared = n.to_bytes(32, "big")
        if shared not in cache.find([shared]):
            cache.keep([(shared, [Opinion(float(own))])], "judge", {})
"""


def test_many_processes_share_a_file_from_its_first_moment(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    started = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(own)], cwd=ROOT, stderr=subprocess.PIPE)
        for own in range(1, 6)
    ]
    for process in started:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
    with VerdictCache(path) as cache:
        assert len(cache) == 5 * 100 + 100
        assert cache.spent() == {"calls": 500.0}
