"""From a reply's tokens to a verdict: the numbers by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_double import said

from judges.llm_reply import Reply, parse_reply
from judges.llm_verdicts import MARKS, option_masses, read_ranking, read_verdict
from online_dpo.judging import Abstention, Opinion

AB = {"A": 1.0, "B": 0.0}
TEN = {str(grade): float(grade) for grade in range(1, 11)}


def reply(text: str | None, tops: Sequence[Mapping[str, float]] | None = None, stop: str = "stop") -> Reply:
    found = parse_reply(json.dumps(said(text, tops, stop=stop)))
    assert found is not None
    return found


def value(text: str | None, tops: Any, options: Mapping[str, float] = AB, min_mass: float = 0.5) -> float:
    opinion = read_verdict(reply(text, tops), options, logprobs=True, min_mass=min_mass)
    assert isinstance(opinion, Opinion), opinion
    return opinion.value


def reason(text: str | None, tops: Any, options: Mapping[str, float] = AB, stop: str = "stop") -> str:
    abstention = read_verdict(reply(text, tops, stop), options, logprobs=True, min_mass=0.5)
    assert isinstance(abstention, Abstention), abstention
    return abstention.reason


def test_the_probability_is_that_of_both_spellings_over_that_of_both_options() -> None:
    """P(A) = .4 + .2, P(B) = .1 + .1: .6 / .8 = .75."""
    tops = [{"A": 0.4, " A": 0.2, "B": 0.1, "▁B": 0.1, "The": 0.2}]
    assert value("A", tops) == pytest.approx(0.75)


def test_the_token_that_came_does_not_decide() -> None:
    """B came (at a temperature it may), and A is nine times as likely."""
    assert value("B", [{"B": 0.1, "A": 0.9}]) == pytest.approx(0.9)


def test_white_space_before_the_verdict_is_passed_over() -> None:
    assert value("\n A", [{"\n": 0.9, "A": 0.1}, {" A": 0.8, " B": 0.2}]) == pytest.approx(0.8)


def test_other_words_that_begin_like_an_option_do_not_count() -> None:
    """ "Answer" and "a" are not A: of A .3 and B .3 there is .6 in all."""
    assert value("A", [{"A": 0.3, "B": 0.3, "Answer": 0.2, "a": 0.1}]) == pytest.approx(0.5)


def test_little_mass_on_the_options_abstains() -> None:
    assert reason("I think", [{"I": 0.55, "A": 0.4, "B": 0.05}]) == "verdict not among the options"


def test_as_much_mass_as_is_asked_for_is_enough() -> None:
    assert value("A", [{"A": 0.3, "B": 0.1, "I": 0.6}], min_mass=0.4 - 1e-9) == pytest.approx(0.75)


def test_no_mass_at_all_abstains_whatever_is_asked_for() -> None:
    found = read_verdict(reply("I", [{"I": 1.0, "A": 0.0}]), AB, logprobs=True, min_mass=0.0)
    assert found == Abstention("verdict not among the options")


def test_mass_is_kept_beside_the_verdict() -> None:
    opinion = read_verdict(reply("A", [{"A": 0.6, "B": 0.2}]), AB, logprobs=True, min_mass=0.5)
    assert isinstance(opinion, Opinion)
    assert opinion.details["by"] == "logprobs"
    assert opinion.details["mass"] == pytest.approx(0.8)


@pytest.mark.parametrize("wrong", [math.nan, 0.5, math.inf])
def test_numbers_that_are_no_log_probabilities_abstain(wrong: float) -> None:
    """Also where A itself has a sound one: what a model with broken logits says is worth nothing."""
    body = said("A", [{"A": 0.9, "B": 0.1}])
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] = wrong
    found = parse_reply(json.dumps(body))
    assert found is not None
    assert read_verdict(found, AB, logprobs=True, min_mass=0.5) == Abstention("the log-probs are not log-probabilities")


def test_probabilities_that_add_up_to_more_than_one_abstain() -> None:
    assert reason("A", [{"A": 0.9, "B": 0.9}]) == "the log-probs are not log-probabilities"


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}, {"tokens": ["A"]}, "x"])
def test_log_probs_in_another_form_are_as_good_as_none(logprobs: Any) -> None:
    body = said("A")
    body["choices"][0]["logprobs"] = logprobs
    found = parse_reply(json.dumps(body))
    assert found is not None
    assert read_verdict(found, AB, logprobs=True, min_mass=0.5) == Opinion(1.0, {"by": "text"})


def test_the_log_prob_of_the_token_that_came_alone_is_no_distribution() -> None:
    """P(A) = .6 with nothing known of B is not "A for certain": the text's verdict is marked as such."""
    body = said("A", [{"A": 0.6}])
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = []
    found = parse_reply(json.dumps(body))
    assert found is not None
    assert read_verdict(found, AB, logprobs=True, min_mass=0.5) == Opinion(1.0, {"by": "text"})


# --- text ---


@pytest.mark.parametrize("text", ["A", " A\n", "A.", "**A**", '"A"', "[[A]]", "(A)"])
def test_a_text_that_is_the_verdict_counts(text: str) -> None:
    assert value(text, None) == 1.0


@pytest.mark.parametrize(
    "text", ["", None, "a", "AB", "A or B", "Answer A", "Verdict: A", "A\nB", "A is better", "Not B", "C", "A B", "А"]
)
def test_a_text_that_says_anything_else_abstains(text: str | None) -> None:
    """The last one is a Cyrillic letter."""
    assert reason(text, None) == "the answer is not a verdict"


def test_a_text_that_was_cut_off_abstains() -> None:
    """ "A" may be how "A terrible answer: B" begins."""
    assert reason("A", None, stop="length") == "the answer is not a verdict"


@pytest.mark.parametrize("stop", ["content_filter"])
def test_a_stopped_answer_abstains_whatever_its_tokens_are(stop: str) -> None:
    assert reason("A", [{"A": 0.9, "B": 0.1}], stop=stop) == "stopped by the server's content filter"


def test_a_refusal_abstains() -> None:
    body = said("A")
    body["choices"][0]["message"]["refusal"] = "I cannot help with that."
    found = parse_reply(json.dumps(body))
    assert found is not None
    assert read_verdict(found, AB, logprobs=True, min_mass=0.5) == Abstention("the model refused")


@given(st.text(max_size=40))
def test_text_is_a_verdict_only_where_nothing_but_marks_stands_around_a_letter(text: str) -> None:
    found = read_verdict(reply(text), AB, logprobs=True, min_mass=0.5)
    letters = [char for char in text if char not in MARKS]
    assert isinstance(found, Opinion) == (letters in (["A"], ["B"]))


# --- scales ---


def test_a_grade_is_the_expected_one() -> None:
    """(3·.5 + 4·.25) / .75 = 10/3."""
    assert value("3", [{"3": 0.5, "4": 0.25, "Three": 0.25}], TEN) == pytest.approx(10 / 3)


def test_ten_as_one_token_tells_it_from_one() -> None:
    """Where the tokenizer has a token 10, "1" is the grade 1: .5·10 + .3·9 + .2·1 = 7.9."""
    assert value("10", [{"10": 0.5, "9": 0.3, "1": 0.2}], TEN) == pytest.approx(7.9)


def test_ten_as_two_tokens_takes_the_second_tokens_probabilities() -> None:
    """ "1" has .5 and came; "0" follows with .8, the end with .2: 10 has .4, 1 has .1, 9 has .5: 4 + .1 + 4.5."""
    tops = [{"1": 0.5, "9": 0.5}, {"0": 0.8, "<end>": 0.2}]
    assert value("10", tops, TEN) == pytest.approx(8.6)


def test_one_that_did_not_come_and_is_not_told_from_ten_leaves_the_text() -> None:
    opinion = read_verdict(reply("9", [{"9": 0.6, "1": 0.4}]), TEN, logprobs=True, min_mass=0.5)
    assert opinion == Opinion(9.0, {"by": "text"})


def test_one_with_next_to_no_probability_need_not_be_told_from_ten() -> None:
    """.005 of unclear in .995 is below a hundredth: left out, 8 and 9 with .5 and .49 give 8.495 (to 3 digits)."""
    opinion = read_verdict(reply("8", [{"8": 0.5, "9": 0.49, "1": 0.005}]), TEN, logprobs=True, min_mass=0.5)
    assert isinstance(opinion, Opinion)
    assert opinion.details["by"] == "logprobs"
    assert opinion.value == pytest.approx((4.0 + 4.41) / 0.99)


def test_tokens_that_end_with_one_and_no_word_on_what_follows_leave_the_text() -> None:
    """Servers leave the end token out: then nobody knows how likely a 0 was. The text says 1."""
    opinion = read_verdict(reply("1", [{"1": 0.9, "7": 0.1}]), TEN, logprobs=True, min_mass=0.5)
    assert opinion == Opinion(1.0, {"by": "text"})


def test_longer_numbers_do_not_count_as_the_digits_that_they_begin_with() -> None:
    assert reason("100", [{"100": 0.6, "7": 0.4}], TEN) == "verdict not among the options"


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["1", "0", "10", "7", " 1", "A", "", "x", "100"]), st.floats(0, 1), min_size=1),
        min_size=1,
        max_size=3,
    )
)
def test_masses_are_never_more_than_everything(tops: list[dict[str, float]]) -> None:
    """Whatever distributions come: each mass is from 0 to 1, and all of them with the unclear rest at most 1."""
    for top in tops:
        total = sum(top.values()) or 1.0
        top.update({token: p / max(total, 1.0) for token, p in top.items()})
    tokens = reply("x", tops).tokens
    assert tokens is not None
    masses, unclear = option_masses(tokens, [*TEN, "A"])
    assert all(0.0 <= mass <= 1.0 + 1e-9 for mass in [*masses.values(), unclear])
    assert sum(masses.values()) + unclear <= 1.0 + 1e-6


# --- rankings ---


@pytest.mark.parametrize("text", ["C > A > B", "C, A, B", "C>A>B.", "C\nA\nB", "**C > A > B**"])
def test_a_ranking_gives_each_labels_place(text: str) -> None:
    assert read_ranking(reply(text), "ABC") == [1, 2, 0]


@pytest.mark.parametrize("text", ["", "C > A", "C > A > B > D", "A > A > B", "C A B", "CAB", "The order is C > A > B"])
def test_what_is_no_full_ranking_abstains(text: str) -> None:
    assert read_ranking(reply(text), "ABC") == Abstention("the answer is not a ranking")


# --- replies ---


@pytest.mark.parametrize(
    "body", ["", "{", "<html>", "[]", "{}", '{"choices": []}', '{"choices": [{}]}', '{"error": "x"}', "[" * 100_000]
)
def test_what_is_no_reply_is_none(body: str) -> None:
    assert parse_reply(body) is None


def test_negative_token_counts_are_no_reply() -> None:
    assert parse_reply(json.dumps(said("A", tokens=(-5, 1)))) is None
