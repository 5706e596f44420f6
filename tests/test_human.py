"""What people said becomes a judge; and their answers on disk, whole or cut off by a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.human import HumanJudge, shares_beaten
from online_dpo.config import JudgeSpec
from online_dpo.errors import DataError, JudgeError
from online_dpo.judging import judge_all, judge_digest, load_judge
from online_dpo.judging.people import (
    PersonAnswer,
    Ranking,
    answer_line,
    question_id,
    read_people,
    undo_line,
    whole_lines,
)
from online_dpo.types import Abstain, Candidate, Message, Prompt, Verdict

WHEN = "2026-11-22T12:00:00+00:00"
QUESTION = (Message("user", "Why?"),)


def said(texts: Sequence[str], ranking: Ranking | None, messages: tuple[Message, ...] = QUESTION) -> PersonAnswer:
    return PersonAnswer("p0", messages, tuple(texts), ranking, "" if ranking else "no idea", 1.5, WHEN)


def write(path: Path, *answers: PersonAnswer) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(map(answer_line, answers)))
    return path


def judged(judge: HumanJudge, texts: Sequence[str], messages: tuple[Message, ...] = QUESTION) -> list[Any]:
    """What the framework makes of the judge's scores: the score, or the reason of the abstention."""
    prompt = Prompt("other-id", messages, (1,))
    candidates = [Candidate("other-id", i, text, (5, 6), (-0.1, -0.1), "stop", i) for i, text in enumerate(texts)]
    verdicts = judge_all(judge, {"other-id": prompt}, candidates, max_abstain=1.0)
    return [v.reason if isinstance(v, Abstain) else v.score for v in verdicts]


# --- scores ---


@pytest.mark.parametrize(
    ("ranking", "shares"),
    [
        (((1,), (0,)), [0.0, 1.0]),
        (((0, 1),), [0.5, 0.5]),
        # b > a = c > d: b beats 3 of 3; a and c beat d and tie with each other, 1.5 of 3; d beats none.
        (((1,), (0, 2), (3,)), [0.5, 1.0, 0.5, 0.0]),
        # Ranks 1, 2.5, 2.5, 2.5 … of five: (5 − r)/4.
        (((4,), (0, 1, 2, 3)), [0.375, 0.375, 0.375, 0.375, 1.0]),
    ],
)
def test_the_share_of_the_others_that_is_beaten(ranking: Ranking, shares: list[float]) -> None:
    assert shares_beaten(ranking) == shares


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=8))
def test_shares_are_what_counting_pairs_gives(levels: list[int]) -> None:
    """`levels` are how good each text is; the mean share is ½, for every comparison gives 1 in sum."""
    groups = tuple(tuple(i for i, one in enumerate(levels) if one == level) for level in range(4, -1, -1))
    shares = shares_beaten(tuple(group for group in groups if group))
    for i, share in enumerate(shares):
        others = [(levels[i] > one) + (levels[i] == one) / 2 for j, one in enumerate(levels) if j != i]
        assert share == pytest.approx(sum(others) / len(others), abs=1e-12)
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=1e-12)


def test_answers_are_known_by_prompt_and_text_wherever_they_stand(tmp_path: Path) -> None:
    file = write(tmp_path / "ann.jsonl", said(["one", "two", "three"], ((2,), (0,), (1,))))
    judge = HumanJudge(str(file))
    assert judged(judge, ["two", "new", "three", "one"]) == [0.0, "no person ranked it", 1.0, 0.5]
    assert judged(judge, ["three"], (Message("user", "Why not?"),)) == ["no person ranked it"]
    assert judged(judge, ["three"], (Message("system", "Be kind."), *QUESTION)) == ["no person ranked it"]


def test_people_are_averaged_and_their_disagreement_is_told(tmp_path: Path) -> None:
    """Ann: two > one > three. Bob: one > two, in another question. One: ½ and 1; two: 1 and 0; three: Ann's 0."""
    write(tmp_path / "human" / "ann.jsonl", said(["one", "two", "three"], ((1,), (0,), (2,))))
    write(tmp_path / "human" / "bob.jsonl", said(["one", "two"], ((0,), (1,))))
    judge = HumanJudge(str(tmp_path / "human"))
    prompt = Prompt("p", QUESTION, (1,))
    candidates = [Candidate("p", i, text, (), (), "stop", 0) for i, text in enumerate(["one", "two", "three"])]
    verdicts = judge_all(judge, {"p": prompt}, candidates, max_abstain=0.0)
    assert verdicts == [
        Verdict("p", 0, 0.75, {"people": 2, "disagreement": 0.5}),
        Verdict("p", 1, 0.5, {"people": 2, "disagreement": 1.0}),
        Verdict("p", 2, 0.0, {"people": 1}),
    ]


def test_one_person_counts_once_however_often_asked(tmp_path: Path) -> None:
    """Ann ranked "one" in two questions, 1 and 0: ½. Bob ranked it once, 1. The mean of the two people is ¾."""
    ann = write(tmp_path / "ann.jsonl", said(["one", "two"], ((0,), (1,))))
    again = write(tmp_path / "other" / "ann.jsonl", said(["one", "three"], ((1,), (0,))))
    bob = write(tmp_path / "bob.jsonl", said(["one", "two"], ((0,), (1,))))
    assert judged(HumanJudge([str(ann), str(again), str(bob), str(bob)]), ["one"]) == [0.75]


def test_skipped_answers_abstain_unless_somebody_ranked_them(tmp_path: Path) -> None:
    write(tmp_path / "human" / "ann.jsonl", said(["one", "two"], None))
    assert judged(HumanJudge(str(tmp_path / "human")), ["one", "two"]) == ["skipped by those who saw it"] * 2
    write(tmp_path / "human" / "bob.jsonl", said(["one", "three"], ((0,), (1,))))
    assert judged(HumanJudge(str(tmp_path / "human")), ["one", "two"]) == [1.0, "skipped by those who saw it"]


# --- loading ---


def test_an_experiment_names_one_file_a_list_or_a_folder(tmp_path: Path) -> None:
    answer = said(["one", "two"], ((0,), (1,)))
    write(tmp_path / "human" / "ann.jsonl", answer)
    for answers in ("human/ann.jsonl", ["human/ann.jsonl"], "human", str(tmp_path / "human")):
        judge = load_judge(JudgeSpec(use="judges.human:HumanJudge", answers=answers), [tmp_path])
        assert isinstance(judge, HumanJudge)
        assert judged(judge, ["one", "two"]) == [1.0, 0.0]


@pytest.mark.parametrize("answers", ["human/ann.jsonl", ["human/ann.jsonl"], "human"])
def test_more_answers_are_another_judge(tmp_path: Path, answers: str | list[str]) -> None:
    spec = JudgeSpec(use="judges.human:HumanJudge", answers=answers)
    first = said(["one", "two"], ((0,), (1,)))
    write(tmp_path / "human" / "ann.jsonl", first)
    before = judge_digest(spec, [tmp_path])
    assert judge_digest(spec, [tmp_path]) == before
    write(tmp_path / "human" / "ann.jsonl", first, said(["one", "three"], ((0,), (1,))))
    assert judge_digest(spec, [tmp_path]) != before


def test_what_is_no_file_of_answers_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"chosen": "x"}\n', encoding="utf-8")
    bad: list[tuple[Any, str]] = [
        (str(tmp_path / "absent.jsonl"), "no answers at"),
        (str(tmp_path / "empty"), "no answers"),
        (str(tmp_path / "bad.jsonl"), "line 1 is no answer of a person"),
        ([], "must be a file or a list"),
        (3, "must be a file or a list"),
        ([["a"]], "must be a file or a list"),
    ]
    for answers, message in bad:
        with pytest.raises(JudgeError, match=message) as caught:
            HumanJudge(answers)
        assert "\n" not in str(caught.value)


# --- the file ---


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    nasty = ["\x1b[2J\u202e", 'quote " and \\ and \u2028 line', "日本\n\n", ""]
    answers = [said(nasty, ((3,), (1, 0), (2,))), said(["one", "two"], None)]
    found = read_people(write(tmp_path / "ann.jsonl", *answers))
    assert list(found.values()) == answers
    assert list(found) == [answer.id for answer in answers]


def test_the_question_is_the_same_in_every_order_and_only_for_the_same_texts() -> None:
    first = question_id(QUESTION, ["one", "two"])
    assert first == question_id(QUESTION, ["two", "one"])
    others = [
        question_id(QUESTION, ["one", "tow"]),
        question_id(QUESTION, ["onetwo", ""]),
        question_id((Message("system", "Why?"),), ["one", "two"]),
        question_id((*QUESTION, Message("user", "")), ["one", "two"]),
    ]
    assert len({first, *others}) == 5


def test_the_last_line_of_a_question_counts_and_may_take_it_back(tmp_path: Path) -> None:
    first, second = said(["one", "two"], ((0,), (1,))), said(["one", "three"], ((0, 1),))
    changed = said(["two", "one"], ((0,), (1,)))
    file = write(tmp_path / "ann.jsonl", first, second, changed)
    assert list(read_people(file).values()) == [second, changed]
    with file.open("ab") as handle:
        handle.write(undo_line(first.id, WHEN))
    assert list(read_people(file).values()) == [second]


def test_a_half_written_last_line_is_left_out_wherever_it_was_cut(tmp_path: Path) -> None:
    first, second = said(["one", "two"], ((0,), (1,))), said(["é", "three"], ((0, 1),))
    whole, line = answer_line(first), answer_line(second)
    file = tmp_path / "ann.jsonl"
    for cut in range(len(line)):
        file.write_bytes(whole + line[:cut])
        assert list(read_people(file).values()) == [first]
        assert whole_lines(whole + line[:cut]) == whole
    file.write_bytes(whole + line)
    assert list(read_people(file).values()) == [first, second]


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "format 2; this version reads format 1"),
    ({"id": "0" * 64}, "its id is not that of its prompt and texts"),
    ({"texts": ["one", "three"]}, "its id is not"),
    ({"ranking": [[0]]}, "does not hold every text once"),
    ({"ranking": [[0], [0, 1]]}, "does not hold every text once"),
    ({"ranking": [[0], [], [1]]}, "does not hold every text once"),
    ({"ranking": [[1e999], [1]]}, "OverflowError"),
    ({"texts": ["one"], "ranking": [[0]], "id": question_id(QUESTION, ["one"])}, "two texts or more"),
    ({"texts": ["one", "one"], "id": question_id(QUESTION, ["one", "one"])}, "all different"),
    ({"texts": ["\ud800", "one"]}, "UnicodeEncodeError"),
    ({"messages": None}, "TypeError"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_changed_line_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    answer = said(["one", "two"], ((0,), (1,)))
    row = {"format": 1, "id": answer.id, **asdict(answer), **change}
    file = tmp_path / "ann.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_people(file)


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=40), st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.sampled_from(["format", "id", "undone", "messages", "texts", "ranking", "reason", "seconds", "when"]),
        inner, max_size=9)),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_any_line_is_an_answer_or_one_clear_error(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "wild.jsonl"
    file.write_bytes(line + b"\n")
    try:
        assert read_people(file) == {}
    except DataError as error:
        assert str(error).startswith(f"{file}, line ")
        assert "\n" not in str(error)
