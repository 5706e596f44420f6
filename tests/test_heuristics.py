"""Repetition, readability, keywords, form and length: scores that are known by hand."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges import expressions
from judges.format import CHECKS, FormatJudge, without_code
from judges.keyword import KeywordJudge
from judges.length import LengthJudge
from judges.pattern import PatternJudge
from judges.readability import ReadabilityJudge, sentences
from judges.repetition import RepetitionJudge, repeated
from judges.sentiment import SentimentJudge
from judges.syllables import syllables
from online_dpo.config import JudgeSpec
from online_dpo.errors import JudgeError
from online_dpo.judging import Abstention, Opinion, PointwiseJudge, load_judge
from online_dpo.types import Candidate, Message, Prompt

PROMPT = Prompt("p", (Message("user", "Tell me a story."),), (1,))
HELPFUL = Path(__file__).resolve().parents[2] / "shared" / "data" / "pairs" / "helpful-base.test.jsonl.gz"


def answers(*texts: str, reason: Any = "stop") -> list[Candidate]:
    return [Candidate("p", i, text, (1,) * len(text), (-1.0,) * len(text), reason, i) for i, text in enumerate(texts)]


def scores(judge: PointwiseJudge, *texts: str) -> list[Any]:
    return list(judge.score(PROMPT, answers(*texts)))


def test_cheap_judges_are_not_cached() -> None:
    kinds = (FormatJudge, KeywordJudge, LengthJudge, PatternJudge, ReadabilityJudge, RepetitionJudge, SentimentJudge)
    assert not any(kind.cached for kind in kinds)


# --- length and patterns -------------------------------------------------------------------------------------


def test_within_the_tolerance_all_lengths_are_equally_good() -> None:
    """Words 1, 3, 5, 8 against 4 ± 1: 2 short, inside, inside, 3 too long."""
    judge = LengthJudge(target=4, unit="words", tolerance=1)
    assert scores(judge, "a", "a b c", "a b c d e", "a b c d e f g h") == [-2.0, 0.0, 0.0, -3.0]


@pytest.mark.parametrize(("params", "message"), [({"tolerance": 2}, "needs a target"), ({"tolerance": -1}, "whole")])
def test_length_refuses_a_tolerance(params: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        LengthJudge(**params)


def test_a_pattern_that_would_not_end_abstains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "LIMIT_S", 0.05)
    slow, sound = scores(PatternJudge(require=["a"], forbid=["(a|aa)+$"]), "a" * 80 + "b", "ab")
    assert isinstance(slow, Abstention)
    assert sound == 1.0


# --- repetition ----------------------------------------------------------------------------------------------


def test_repetition_is_the_share_of_n_grams_seen_before() -> None:
    """ "a b a b a b" has bigrams ab ba ab ba ab: 2 different of 5, rep-2 = 3/5; its 4-grams abab baba abab: 1/3."""
    assert scores(RepetitionJudge(n=2), "a b A b\na b", "a b c d", "a", "") == pytest.approx([-0.6, 0.0, 0.0, 0.0])
    assert scores(RepetitionJudge(), "a b a b a b") == pytest.approx([-1 / 3])


@given(st.lists(st.sampled_from("ab"), max_size=30), st.integers(1, 5))
def test_repetition_counts_what_a_set_counts(words: list[str], n: int) -> None:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    expected = (len(grams) - len(set(grams))) / len(grams) if grams else 0.0
    assert repeated(" ".join(words), n) == pytest.approx(expected)


# --- readability ---------------------------------------------------------------------------------------------


def test_reading_ease_and_grade_by_hand() -> None:
    """ "The cat sat. It was happy!" has 6 words, 2 sentences, 7 syllables: ease 206.835 − 1.015·3 − 84.6·7/6 =
    105.09, grade 0.39·3 + 11.8·7/6 − 15.59 = −0.6533."""
    text = "The cat sat. It was happy!"
    assert scores(ReadabilityJudge(), text) == pytest.approx([105.09])
    assert scores(ReadabilityJudge("grade"), text) == pytest.approx([0.6533], abs=1e-4)
    assert scores(ReadabilityJudge(target=100), text) == pytest.approx([-5.09])
    assert scores(ReadabilityJudge("grade", target=-1), text) == pytest.approx([-0.3467], abs=1e-4)


def test_hard_words_and_long_sentences_are_harder() -> None:
    easy, hard = scores(
        ReadabilityJudge(),
        "We ran home. It was dark.",
        "Notwithstanding considerable uncertainty, institutional stakeholders anticipate incremental improvement.",
    )
    assert easy > 90.0
    assert hard < 0.0


def test_an_answer_without_a_word_has_no_readability() -> None:
    assert scores(ReadabilityJudge(), "", "42 !!") == [Abstention("an answer without words")] * 2


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("It costs 3.50 dollars", 1),
        ('He said "No." Then he left', 2),
        ("A list\n\nand more", 2),
        ("Wait... what?!", 2),
        ("no end", 1),
        ("One.\n\n...", 1),
    ],
)
def test_sentences_are_counted(text: str, count: int) -> None:
    assert sentences(text) == count


def test_a_row_of_dots_takes_linear_time() -> None:
    """In quadratic time this would run into the time limit of tests."""
    assert sentences("." * 300_000 + "x") == 1


@pytest.mark.parametrize(
    ("word", "count"),
    [("cat", 1), ("table", 2), ("make", 1), ("makes", 1), ("places", 2), ("asked", 1), ("wanted", 2), ("idea", 3),
     ("something", 2), ("Doesn't", 2), ("don’t", 1), ("going", 2), ("nation", 2), ("hopeful", 2), ("b", 1),
     ("information", 4), ("quiet", 1)],
)  # fmt: skip
def test_syllables_of_words(word: str, count: int) -> None:
    """As spoken, but for "quiet": by its spelling the rules see one syllable where two are spoken."""
    assert syllables(word) == count


# --- keywords ------------------------------------------------------------------------------------------------


def test_keywords_are_whole_words_in_any_case() -> None:
    """Of wanted {cat, C++, as an AI}: 1/3, 1/3, 1/3, 0; unwanted {dog} takes 1 away."""
    judge = KeywordJudge(wanted=["cat", "C++", "as an AI"], unwanted=["dog"])
    texts = ("The CAT.", "c++!", "As  an\nai", "cats and scat", "dogs", "dog cat")
    assert scores(judge, *texts) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0, 0.0, 1 / 3 - 1])


def test_keyword_rate_is_per_hundred_words() -> None:
    """Five words with "so" twice and "um" once: 100·(2 − 1)/5 = 20."""
    judge = KeywordJudge(wanted=["so"], unwanted=["um"], count="rate")
    assert scores(judge, "So it is so, um", "nothing", " ") == [20.0, 0.0, Abstention("an answer without words")]


# --- form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ("sentence_start", ["Yes.", "12 of us", '"Go"', "- An item", "日本"], ["yes.", "- an item", "... and"]),
        ("sentence_end", ["Yes.", 'He said "no."', "Really?!", "**Done.**", "X:\n```\ny\n```", "はい。"],
         ["Yes", "and then,", "X:\n```\ny", "a list:", "He (really"]),
        ("fences_closed", ["none", "```py\nx\n```", "~~~\n```\n~~~", "````\n```\n````", "a ``` b"],
         ["```\nx", "~~~\nx\n```", "````\nx\n```", "```\nx\n``` y"]),
        ("bold_closed", ["**a** b", "```\n2**3\n```", "x"], ["**a", "**a** **b"]),
        ("list", ["- a", "x\n2. b", "  * c"], ["-a", "```\n- a\n```", "1.5 is"]),
        ("no_list", ["-a", "text"], ["- a"]),
        ("heading", ["# A", "x\n### B"], ["#A", "####### c"]),
        ("no_heading", ["#A"], ["# A"]),
        ("clean", ["a\tb\nc é 日"], ["a\x00", "\ufffd", "\x1b[31m"]),
    ],
)  # fmt: skip
def test_checks_of_form(check: str, good: list[str], bad: list[str]) -> None:
    judge = FormatJudge([check])
    assert scores(judge, *good) == [Opinion(1.0, {check: True})] * len(good)
    assert scores(judge, *bad) == [Opinion(0.0, {check: False})] * len(bad)


def test_a_cut_answer_is_not_finished() -> None:
    judge = FormatJudge(["finished", "sentence_end"])
    assert judge.score(PROMPT, answers("It is", reason="length"))[0].value == 0.0
    assert judge.score(PROMPT, answers("It is.", reason="length"))[0] == Opinion(
        0.5, {"finished": False, "sentence_end": True}
    )


def test_an_empty_answer_has_no_form() -> None:
    judge = FormatJudge(list(CHECKS))
    assert [opinion.value for opinion in judge.score(PROMPT, answers("", " \n"))] == [0.0, 0.0]


@given(st.text(alphabet="`~ ab*\n#-.", max_size=60))
def test_no_text_breaks_the_form_judge(text: str) -> None:
    [opinion] = FormatJudge(list(CHECKS)).score(PROMPT, answers(text))
    assert 0.0 <= opinion.value <= 1.0
    outside = without_code(text)[0].splitlines()
    assert all(line in text.splitlines() for line in outside)


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "params", "message"),
    [
        ("judges.repetition:RepetitionJudge", {"n": 0}, "n must be a whole number from 1"),
        ("judges.readability:ReadabilityJudge", {"formula": "grad"}, "did you mean 'grade'"),
        ("judges.readability:ReadabilityJudge", {"target": "easy"}, "target must be a number"),
        ("judges.keyword:KeywordJudge", {}, "at least one word"),
        ("judges.keyword:KeywordJudge", {"wanted": "cat"}, "wanted must be a list"),
        ("judges.keyword:KeywordJudge", {"unwanted": [" "]}, "unwanted must be a list"),
        ("judges.keyword:KeywordJudge", {"wanted": ["a"], "count": "presense"}, "did you mean 'presence'"),
        ("judges.format:FormatJudge", {"checks": ["sentence_ends"]}, "did you mean 'sentence_end'"),
        ("judges.format:FormatJudge", {"checks": "list"}, "checks must be a list"),
        ("judges.format:FormatJudge", {"checks": []}, "checks must be a list"),
    ],
)
def test_wrong_keys_are_refused(use: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        load_judge(JudgeSpec.model_validate({"use": use, **params}), [])


# --- real answers --------------------------------------------------------------------------------------------


def test_every_heuristic_scores_real_answers() -> None:
    """Of 300 HH-RLHF answers nearly all are English sentences: most are easier than 40 and harder than 120."""
    if not HELPFUL.is_file():
        pytest.skip("the HH-RLHF answers (../shared/data/pairs) are not on this machine")
    with gzip.open(HELPFUL, "rt", encoding="utf-8") as file:
        dialogues = [json.loads(line)["chosen"] for line, _ in zip(file, range(300), strict=False)]
    texts = [text for text in (re.split(r"\n\nAssistant:", dialogue)[-1].strip() for dialogue in dialogues) if text]
    ease = [value for value in scores(ReadabilityJudge(), *texts) if isinstance(value, float)]
    assert len(ease) > 0.95 * len(texts)
    assert sum(40 < value < 120 for value in ease) > 0.8 * len(ease)
    assert all(-1 < value <= 0 for value in scores(RepetitionJudge(), *texts))
    assert all(math.isfinite(opinion.value) for opinion in scores(FormatJudge(list(CHECKS)), *texts))
