"""Flips at a known rate: what is flipped, how often, and that nothing else changes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.noisy import NoisyJudge, flips
from online_dpo.config import ComparingSpec, JudgeSpec
from online_dpo.errors import JudgeError
from online_dpo.judging import (
    Abstention,
    AskedJudge,
    Asking,
    Opinion,
    PairwiseJudge,
    PointwiseJudge,
    Score,
    judge_against,
    judge_all,
    mean_details,
    open_judge,
)
from online_dpo.types import Candidate, Message, Prompt, Verdict


def prompt(number: int) -> Prompt:
    return Prompt(f"p{number}", (Message("user", f"question {number}"),), (1,))


def answer(number: int, index: int, text: str) -> Candidate:
    return Candidate(f"p{number}", index, text, (1, 2), (-1.0, -1.0), "stop", index)


class Worth(PointwiseJudge):
    """The number that the answer is; an answer that is none abstains."""

    batch_prompts = None

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        return [Abstention("no number") if c.text == "?" else float(c.text) for c in candidates]


class Softly(PairwiseJudge):
    """σ(a − b), with a liking for the first place."""

    def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
        if "?" in (first.text, second.text):
            return None
        p = 1.0 / (1.0 + math.exp(float(second.text) - float(first.text)))
        return Opinion(min(1.0, p + 0.1), {"asked": 1.0})


def asked(judge: Any, **comparing: Any) -> AskedJudge:
    asking = Asking(comparing=ComparingSpec(**comparing))
    inner = (judge.judge,) if isinstance(judge, NoisyJudge) else ()
    return AskedJudge(judge, "test", asking=asking, inner=inner)


def noisy(inner: Any, rate: float, seed: int = 0, **comparing: Any) -> AskedJudge:
    return asked(NoisyJudge(asked(inner), rate, seed), **comparing)


def test_of_two_answers_the_pair_is_flipped_at_the_rate() -> None:
    """2000 prompts, rate 0.2: 400 flips, standard deviation √(2000·0.2·0.8) = 17.9; four of them either side."""
    items = [(prompt(n), (answer(n, 0, "1"), answer(n, 1, "2"))) for n in range(2000)]
    rows = noisy(Worth(), 0.2).scores(items)
    wrong = sum(
        row[0].value > row[1].value for row in rows if isinstance(row[0], Opinion) and isinstance(row[1], Opinion)
    )
    assert 328 <= wrong <= 472
    assert wrong == sum(row[0].details["flipped"] == 1.0 for row in rows if isinstance(row[0], Opinion))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5])
def test_comparisons_flip_independently_at_the_rate(rate: float) -> None:
    """All 15 pairs of 6 answers to 200 prompts. The number of flips in a prompt has the binomial's variance
    15·rate·(1 − rate) where flips are independent; 200 prompts put its estimate within 0.6 to 1.5 of that."""
    counts = []
    for n in range(200):
        six = [answer(n, i, str(i)) for i in range(6)]
        counts.append(sum(flips(rate, 3, prompt(n), a, b) for a, b in itertools.combinations(six, 2)))
    spread = 15 * rate * (1 - rate)
    mean = sum(counts) / 200
    assert abs(mean - 15 * rate) < 4 * math.sqrt(spread / 200)
    assert 0.6 < sum((count - mean) ** 2 for count in counts) / 199 / spread < 1.5


def test_both_orders_agree_and_seeds_differ() -> None:
    pairs = [(prompt(n), answer(n, 0, "1"), answer(n, 1, "2")) for n in range(200)]
    first = [flips(0.5, 1, p, a, b) for p, a, b in pairs]
    assert first == [flips(0.5, 1, p, b, a) for p, a, b in pairs]
    other = [flips(0.5, 2, p, a, b) for p, a, b in pairs]
    assert 60 < sum(a != b for a, b in zip(first, other, strict=True)) < 140
    judge = NoisyJudge(asked(Worth()), 0.5, 1)
    there = judge.prefer_batch(pairs)
    back = judge.prefer_batch([(p, b, a) for p, a, b in pairs])
    for one, two in zip(there, back, strict=True):
        assert isinstance(one, Opinion)
        assert isinstance(two, Opinion)
        assert one.value + two.value == 1.0


def test_flips_do_not_depend_on_what_else_is_asked() -> None:
    """Neither on the other comparisons nor on their order: a run that goes on after a break sees the same."""
    pairs = [(prompt(n), answer(n, 0, "1"), answer(n, 1, "2")) for n in range(50)]
    judge = NoisyJudge(asked(Worth()), 0.4)
    together = judge.prefer_batch(pairs)
    random.Random(0).shuffle(order := list(range(50)))
    assert [judge.prefer_batch([pairs[i]])[0] for i in order] == [together[i] for i in order]


VALUES = st.lists(st.integers(-9, 9), min_size=2, max_size=6)


@given(VALUES)
def test_without_noise_the_ranking_is_the_inner_judges(values: list[int]) -> None:
    row = noisy(Worth(), 0.0).scores([(prompt(0), [answer(0, i, str(v)) for i, v in enumerate(values)])])[0]
    said = [opinion.value for opinion in row if isinstance(opinion, Opinion)]
    for i, j in itertools.combinations(range(len(values)), 2):
        assert (said[i] > said[j] + 1e-9) == (values[i] > values[j])
        assert (said[j] > said[i] + 1e-9) == (values[j] > values[i])


@given(VALUES)
def test_a_comparing_judge_without_noise_keeps_its_strengths_and_at_rate_one_turns_them(values: list[int]) -> None:
    items = [(prompt(0), [answer(0, i, str(v)) for i, v in enumerate(values)])]
    plain, same, turned = (
        [opinion.value for opinion in judge.scores(items)[0] if isinstance(opinion, Opinion)]
        for judge in (asked(Softly()), noisy(Softly(), 0.0), noisy(Softly(), 1.0))
    )
    assert same == pytest.approx(plain, abs=1e-9)
    assert turned == pytest.approx([-value for value in plain], abs=1e-6)


def test_ties_and_abstentions_stay() -> None:
    judge = NoisyJudge(asked(Worth()), 1.0)
    one, other, none = answer(0, 0, "1"), answer(0, 1, "1.0"), answer(0, 2, "?")
    assert judge.prefer(prompt(0), one, other) == Opinion(0.5, {"flipped": True})
    assert judge.prefer(prompt(0), one, none) == Abstention("no number")
    assert NoisyJudge(asked(Softly()), 1.0).prefer(prompt(0), one, none) == Abstention("judge declined")


def test_verdicts_carry_the_share_of_flipped_comparisons() -> None:
    """Of candidates 0, 1, 2 each is in two comparisons; its detail is the share of those that are flipped."""
    three = [answer(7, i, str(i)) for i in range(3)]
    verdicts = judge_all(noisy(Worth(), 0.5, 5), {"p7": prompt(7)}, three, max_abstain=0)
    for i, verdict in enumerate(verdicts):
        assert isinstance(verdict, Verdict)
        others = [one for one in three if one.index != i]
        assert verdict.details == {"flipped": sum(flips(0.5, 5, prompt(7), three[i], one) for one in others) / 2}
    assert mean_details(verdicts)["flipped"] == sum(v.details["flipped"] for v in verdicts) / 3  # type: ignore[union-attr,misc]


def test_an_answer_can_be_held_against_one_of_the_same_number() -> None:
    """As an evaluation does: two policies' answers to a prompt both have index 0."""
    judge = noisy(Worth(), 0.0)
    prompts = {f"p{n}": prompt(n) for n in range(2)}
    ours, theirs = [answer(n, 0, "2") for n in range(2)], [answer(0, 0, "1"), answer(1, 0, "3")]
    said = judge_against(judge, prompts, ours, theirs, max_abstain=0)
    assert [verdict.score for verdict in said if isinstance(verdict, Verdict)] == [1.0, 0.0]


def test_an_experiment_names_it() -> None:
    spec = {"use": "judges.noisy:NoisyJudge", "judge": "judges.length:LengthJudge", "rate": 0.25, "seed": 4}
    judge = open_judge(JudgeSpec.model_validate(spec), []).judge
    assert isinstance(judge, NoisyJudge)
    assert (judge.rate, judge.seed, judge.judge.name) == (0.25, 4, "judges.length:LengthJudge")


@pytest.mark.parametrize(
    ("params", "message"),
    [({"rate": 1.5}, "from 0 to 1"), ({"rate": True}, "from 0 to 1"), ({"rate": 0.1, "seed": 0.5}, "seed")],
)
def test_wrong_keys_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        NoisyJudge(asked(Worth()), **params)
    with pytest.raises(JudgeError, match="must be one judge"):
        NoisyJudge([asked(Worth())], 0.1)  # type: ignore[arg-type]
