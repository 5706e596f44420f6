"""How a judge is asked: both orders, batches, threads, cache, abstentions, ledger and budget."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from judging_parts import PROMPTS, Answers, Batched, Table, answer, by_mean_win, item, prompt

from online_dpo.errors import JudgeError
from online_dpo.judging import (
    Abstention,
    AskedJudge,
    Asking,
    Comparison,
    Disagreement,
    Item,
    LiveModel,
    Opinion,
    PairwiseJudge,
    PointwiseJudge,
    Score,
    VerdictCache,
    judge_all,
)
from online_dpo.types import Abstain, Candidate, Prompt, Verdict

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"p{number}" for number in range(8)]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[VerdictCache]:
    with VerdictCache(tmp_path / "verdicts.sqlite") as found:
        yield found


def asked_with(judge: Any, cache: VerdictCache | None = None, **asking: Any) -> AskedJudge:
    return AskedJudge(judge, "the judge", digest="d" if cache is not None else "", asking=Asking(cache=cache, **asking))


class Counting(PointwiseJudge):
    """Scores by the length of the text, counts what it was asked for, and charges 1 a call."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.due = 0

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
        self.seen += [(prompt.id, candidate.index) for candidate in candidates]
        self.due += 1
        return [Opinion(float(candidate.index), {"length": len(candidate.text)}) for candidate in candidates]

    def ledger(self) -> dict[str, float]:
        due, self.due = self.due, 0
        return {"calls": float(due)} if due else {}


class Alone(Counting):
    each_alone: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "judge declined"),
        (Abstention("off topic"), "off topic"),
        (float("nan"), "returned nan"),
        (float("-inf"), "returned -inf"),
        (np.float32("nan"), "returned nan"),
        ("5", "returned str, not a number"),
        ([5.0], "returned list, not a number"),
        (1 + 2j, "returned complex, not a number"),
        (10**400, "returned a number too large for a float"),
    ],
)
def test_what_is_no_finite_number_abstains_alone(value: object, reason: str) -> None:
    results = judge_all(Answers({"p": [value, 2.0]}), PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=0.5)
    assert results == [Abstain("p", 0, reason), Verdict("p", 1, 2.0)]


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), np.array(2.0)])
def test_numbers_of_any_library_are_scores(value: object) -> None:
    (result,) = judge_all(Answers({"p": [value]}), PROMPTS, [answer("p", 0)], max_abstain=0)
    assert result == Verdict("p", 0, 2.0)
    assert type(result.score) is float


@pytest.mark.parametrize("value", [True, np.bool_(True)])
def test_a_truth_value_is_one_or_zero(value: object) -> None:
    assert judge_all(Answers({"p": [value]}), PROMPTS, [answer("p", 0)], max_abstain=0) == [Verdict("p", 0, 1.0)]


def test_a_raising_judge_abstains_for_that_prompt_with_the_error() -> None:
    judge = Answers({"p": ValueError("bad\n answer"), "q": [1.0], "r": KeyError()})
    results = judge_all(judge, PROMPTS, [answer("p", 0), answer("q", 0), answer("r", 0)], max_abstain=1)
    assert results == [Abstain("p", 0, "ValueError: bad answer"), Verdict("q", 0, 1.0), Abstain("r", 0, "KeyError")]


def test_a_long_reason_is_cut() -> None:
    (result,) = judge_all(Answers({"p": ValueError("x" * 999)}), PROMPTS, [answer("p", 0)], max_abstain=1)
    assert isinstance(result, Abstain)
    assert len(result.reason) == 200


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_never_swallowed(stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        judge_all(Answers({"p": stop()}), PROMPTS, [answer("p", 0)], max_abstain=1)
    with pytest.raises(stop):
        table = Table({(0, 1): stop()})
        judge_all(table, PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=1)


def test_a_judge_error_ends_the_run() -> None:
    with pytest.raises(JudgeError, match="wrong key"):
        judge_all(Answers({"p": JudgeError("wrong key")}), PROMPTS, [answer("p", 0)], max_abstain=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0], "returned 1 scores instead of 2"),
        ([1.0, 2.0, 3.0], "returned 3 scores instead of 2"),
        (None, "returned NoneType instead of 2 scores"),
        (0.5, "returned float instead of 2 scores"),
        ("ab", "returned str instead of 2 scores"),
        ({"a": 1, "b": 2}, "returned dict instead of 2 scores"),
    ],
)
def test_the_wrong_number_of_scores_breaks_the_contract(row: object, message: str) -> None:
    with pytest.raises(JudgeError, match=message) as caught:
        judge_all(Answers({"p": row}), PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=1)
    assert "judging_parts:Answers" in str(caught.value)
    assert "prompt 'p'" in str(caught.value)


def test_a_batched_judge_gets_batch_prompts_at_once() -> None:
    judge = Batched()
    candidates = [answer(name, i) for name in PROMPTS for i in range(2)]
    results = judge_all(judge, PROMPTS, candidates, max_abstain=0)
    assert judge.calls == [["p", "q"], ["r"]]
    assert results == [Verdict(c.prompt_id, c.index, float(c.index)) for c in candidates]
    assert judge.score(PROMPTS["p"], candidates[:2]) == [0.0, 1.0]


def test_one_bad_prompt_of_a_batch_abstains_alone() -> None:
    judge = Batched(poison="q")
    results = judge_all(judge, PROMPTS, [answer(name, 0) for name in PROMPTS], max_abstain=0.5)
    assert judge.calls == [["p", "q"], ["p"], ["q"], ["r"]]
    assert results == [Verdict("p", 0, 0.0), Abstain("q", 0, "RuntimeError: out of memory"), Verdict("r", 0, 0.0)]


def test_the_wrong_number_of_rows_breaks_the_contract() -> None:
    class Short(Batched):
        def score_batch(self, items: Sequence[Item]) -> list[Sequence[Score]]:
            return super().score_batch(items)[:1]

    with pytest.raises(JudgeError, match="returned 1 lists of scores instead of 2"):
        judge_all(Short(), PROMPTS, [answer("p", 0), answer("q", 0)], max_abstain=1)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2"])
def test_a_wrong_batch_size_is_named(size: Any) -> None:
    judge = Batched()
    judge.batch_prompts = size
    with pytest.raises(JudgeError, match="batch_prompts"):
        judge_all(judge, PROMPTS, [answer("p", 0)], max_abstain=1)


def test_borda_scores_average_both_orders() -> None:
    """A judge that likes the first place: the averaged wins are 0 over 1: (.9+1-.3)/2 = .8; 0 over 2:
    (.8+1-.4)/2 = .7; 1 over 2: (.7+1-.5)/2 = .6. Means over the two others: 0: (.8+.7)/2 = .75;
    1: (.2+.6)/2 = .4; 2: (.3+.4)/2 = .35. They sum to n/2 = 1.5.
    """
    table = Table({(0, 1): 0.9, (1, 0): 0.3, (0, 2): 0.8, (2, 0): 0.4, (1, 2): 0.7, (2, 1): 0.5})
    results = judge_all(by_mean_win(table), PROMPTS, [answer("p", i) for i in range(3)], max_abstain=0)
    assert [v.score for v in results if isinstance(v, Verdict)] == pytest.approx([0.75, 0.4, 0.35])


@pytest.mark.parametrize("value", [1.0, 0.9, 0.1, 1 / 3])
def test_a_judge_that_only_sees_the_place_finds_all_equal(value: float) -> None:
    """prefer = p always: (p + 1 - p)/2 = 0.5 for every pair, to the last bit, and a strength of 0."""
    table = Table({(i, j): value for i in range(3) for j in range(3)})
    results = judge_all(by_mean_win(table), PROMPTS, [answer("p", i) for i in range(3)], max_abstain=0)
    assert [v.score for v in results if isinstance(v, Verdict)] == [0.5, 0.5, 0.5]
    results = judge_all(table, PROMPTS, [answer("p", i) for i in range(3)], max_abstain=0)
    assert [v.score for v in results if isinstance(v, Verdict)] == [0.0, 0.0, 0.0]


def test_a_comparison_needs_both_orders() -> None:
    """(0,2) has one order only and (1,2) fails: candidate 2 has no comparison and abstains with the first fault;
    0 and 1 keep 0 over 1 = (.9+1-.3)/2 = .8, and .2.
    """
    table = Table({(0, 1): 0.9, (1, 0): 0.3, (0, 2): 0.8, (2, 0): None, (1, 2): ValueError("no"), (2, 1): 0.5})
    results = judge_all(by_mean_win(table), PROMPTS, [answer("p", i) for i in range(3)], max_abstain=0.5)
    assert results[2] == Abstain("p", 2, "judge declined")
    assert [v.score for v in results[:2] if isinstance(v, Verdict)] == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1.5, "returned a number outside [0, 1]"),
        (-0.1, "returned a number outside [0, 1]"),
        (float("nan"), "returned nan"),
        (ValueError("x"), "ValueError: x"),
    ],
)
def test_what_is_no_probability_abstains(value: object, reason: str) -> None:
    table = Table({(0, 1): value, (1, 0): 0.5})
    results = judge_all(table, PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=1)
    assert results == [Abstain("p", 0, reason), Abstain("p", 1, reason)]


def test_a_lone_candidate_cannot_be_compared() -> None:
    results = judge_all(Table({}), PROMPTS, [answer("p", 0)], max_abstain=1)
    assert results == [Abstain("p", 0, "no other candidate to compare with")]


@pytest.mark.parametrize(
    ("rule", "scores"), [("average", [0.6, 0.4]), ("tie", [0.5, 0.5]), ("abstain", ["the two orders disagree"] * 2)]
)
def test_orders_that_disagree_go_by_the_judges_own_rule(rule: Disagreement, scores: list[Any]) -> None:
    """0.9 for the first place in one order, 0.7 in the other: (0.9 + 1 − 0.7)/2 = 0.6."""
    table = Table({(0, 1): 0.9, (1, 0): 0.7})
    table.disagreement = rule
    results = judge_all(by_mean_win(table), PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=1)
    found = [v.score if isinstance(v, Verdict) else v.reason for v in results]
    assert found == [pytest.approx(score) if isinstance(score, float) else score for score in scores]


@pytest.mark.parametrize(("there", "back"), [(0.9, 0.1), (0.5, 0.9), (0.5, 0.5)])
def test_orders_that_agree_or_are_even_go_by_the_mean_whatever_the_rule(there: float, back: float) -> None:
    table = Table({(0, 1): there, (1, 0): back})
    table.disagreement = "abstain"
    results = judge_all(by_mean_win(table), PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=0)
    assert isinstance(results[0], Verdict)
    assert results[0].score == pytest.approx((there + 1 - back) / 2)


def test_a_judge_that_is_the_same_in_both_orders_is_asked_once() -> None:
    class Fair(Table):
        both_orders: ClassVar[bool] = False

    results = judge_all(by_mean_win(Fair({(0, 1): 0.9})), PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=0)
    assert [v.score for v in results if isinstance(v, Verdict)] == pytest.approx([0.9, 0.1])


def test_what_was_said_of_two_tells_whether_it_went_with_the_place() -> None:
    table = Table({(0, 1): 0.9, (1, 0): 0.7, (0, 2): 0.9, (2, 0): 0.2, (1, 2): None, (2, 1): 0.5})
    rows = AskedJudge(table, "x").comparisons([item("p", 3)])[0]
    assert {(row.first, row.second): row.swapped() for row in rows} == {(0, 1): True, (0, 2): False, (1, 2): None}


def test_a_judge_that_scores_cannot_compare() -> None:
    for ask in (AskedJudge(Batched(), "x").comparisons, AskedJudge(Batched(), "x").prefer):
        with pytest.raises(JudgeError, match="judge 'x' scores, it does not compare"):
            ask([])


# --- details ---


def test_details_stand_beside_the_score_and_come_back_from_the_cache(cache: VerdictCache) -> None:
    told: dict[str, Any] = {
        "sure": True,
        "why": "short",
        "share": np.float32(0.5),
        "count": 3,
        "none": None,
        "odd": float("nan"),
    }
    kept = {"sure": True, "why": "short", "share": 0.5, "count": 3.0, "none": None, "odd": None}
    for judge in (Answers({"p": [Opinion(1.0, told)]}), Answers({})):  # the second has nothing to say
        (result,) = judge_all(asked_with(judge, cache), PROMPTS, [answer("p", 0)], max_abstain=0)
        assert isinstance(result, Verdict)
        assert dict(result.details) == kept
        assert [type(value) for value in result.details.values()] == [type(value) for value in kept.values()]


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ({"rows": [1, 2]}, "returned detail 'rows' that is neither number, text nor truth value"),
        (["x"], "returned details that are list, not a mapping"),
    ],
)
def test_details_that_cannot_be_kept_abstain_with_the_key(cache: VerdictCache, details: Any, reason: str) -> None:
    judge = Answers({"p": [Opinion(1.0, details)]})
    assert judge_all(asked_with(judge, cache), PROMPTS, [answer("p", 0)], max_abstain=1) == [Abstain("p", 0, reason)]


@pytest.mark.parametrize(
    ("reason", "shown"), [("two\n lines", "two lines"), (ValueError("x"), "x"), ("y" * 999, "y" * 200)]
)
def test_a_reason_is_one_short_line(cache: VerdictCache, reason: Any, shown: str) -> None:
    judge = Answers({"p": [Abstention(reason)]})
    for _ in range(2):
        assert judge_all(asked_with(judge, cache), PROMPTS, [answer("p", 0)], max_abstain=1) == [Abstain("p", 0, shown)]


# --- cache ---


def test_a_second_time_nobody_is_asked(cache: VerdictCache) -> None:
    judge = Counting()
    asked = asked_with(judge, cache)
    first = asked.scores([item("p", 3), item("q", 2)])
    assert asked.take_ledger() == {"asked": 5, "cached": 0, "calls": 2.0}
    assert asked.scores([item("q", 2), item("p", 3)]) == first[::-1]
    assert asked.take_ledger() == {"asked": 0, "cached": 5}
    assert len(judge.seen) == 5


def test_a_judge_that_sees_each_alone_is_asked_for_what_is_missing_only(cache: VerdictCache) -> None:
    judge = Alone()
    asked_with(judge, cache).scores([item("p", 2)])
    judge.seen.clear()
    prompt_p, answers = item("p", 4)
    found = asked_with(judge, cache).scores([(prompt_p, [answers[3], answers[0], answers[2]])])[0]
    assert judge.seen == [("p", 3), ("p", 2)]
    assert [row.value for row in found if isinstance(row, Opinion)] == [3.0, 0.0, 2.0]


def test_a_judge_that_sees_all_together_is_asked_again_when_one_changes(cache: VerdictCache) -> None:
    judge = Counting()
    asked_with(judge, cache).scores([item("p", 2)])
    asked_with(judge, cache).scores([item("p", 3)])
    assert judge.seen == [("p", 0), ("p", 1), ("p", 0), ("p", 1), ("p", 2)]


def test_the_same_answer_twice_is_asked_for_once_so_that_a_second_run_says_the_same(cache: VerdictCache) -> None:
    """A judge of moods: were both orders of two equal answers asked, the cache could keep one answer only."""
    moods = iter([0.9, 0.3, 0.8])

    class Moody(PairwiseJudge):
        def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
            return next(moods)

    same = (prompt("p"), [answer("p", 0), answer("p", 0)])
    first = asked_with(Moody(), cache).comparisons([same, same])
    assert first == asked_with(Moody(), cache).comparisons([same, same])
    assert first[0][0].outcome("average") == 0.5
    assert next(moods) == 0.3
    prompt_p, answers = same
    alone = Alone()
    assert [len(row) for row in asked_with(alone, cache).scores([(prompt_p, answers)] * 2)] == [2, 2]
    assert alone.seen == [("p", 0)]


def test_without_a_cache_no_two_questions_are_taken_for_the_same() -> None:
    judge = Alone()
    asked_with(judge).scores([item("p", 2), item("p", 2)])
    assert len(judge.seen) == 4


def test_passing_abstentions_are_asked_again_and_lasting_ones_are_not(cache: VerdictCache) -> None:
    rows: dict[str, Any] = {"p": [Abstention("time limit", passing=True)], "q": [None], "r": ValueError("x")}
    items = [item(name, 1) for name in rows]
    first = asked_with(Answers(rows), cache).scores(items)
    assert first == [
        [Abstention("time limit", passing=True)],
        [Abstention("judge declined")],
        [Abstention("ValueError: x", passing=True)],
    ]
    second = asked_with(Answers({name: [1.0] for name in rows}), cache).scores(items)
    assert second == [[Opinion(1.0)], [Abstention("judge declined")], [Opinion(1.0)]]


def test_another_digest_or_policy_is_another_judge(cache: VerdictCache) -> None:
    judge = Counting()
    for digest in ("a", "b", "a"):
        AskedJudge(judge, "x", digest=digest, asking=Asking(cache=cache)).scores([item("p", 1)])
    assert len(judge.seen) == 2


def test_a_judge_that_wants_no_cache_has_none_but_what_it_spends_is_on_the_books(cache: VerdictCache) -> None:
    class Fresh(Counting):
        cached: ClassVar[bool] = False

    judge = Fresh()
    for _ in range(2):
        asked_with(judge, cache).scores([item("p", 1)])
    assert len(judge.seen) == 2
    assert len(cache) == 0
    assert cache.spent() == {"calls": 2.0}


class Living:
    """A `LiveModel` that is never really asked."""

    def generate(self, chats: Any, *, max_tokens: int, temperature: float, seeds: Any) -> list[str | None]:
        raise AssertionError

    def score(self, chats: Any, continuations: Any) -> list[list[float] | None]:
        raise AssertionError


class OfPolicy(Counting):
    uses_policy: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.models: list[LiveModel] = []

    def attach(self, model: LiveModel) -> None:
        self.models.append(model)


class MadeOf(PointwiseJudge):
    """The mean of its judges; asked from here alone."""

    def __init__(self, *judges: AskedJudge) -> None:
        self.judges = judges
        self.concurrent = 4
        self.threads: set[threading.Thread] = set()

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
        self.threads.add(threading.current_thread())
        rows = [judge.scores([(prompt, candidates)])[0] for judge in self.judges]
        return [
            next((one for one in column if isinstance(one, Abstention)), None)
            or sum(one.value for one in column if isinstance(one, Opinion)) / len(column)
            for column in zip(*rows, strict=True)
        ]


def test_the_policy_is_part_of_what_is_asked_also_for_judges_made_of_judges(cache: VerdictCache) -> None:
    inner = OfPolicy()
    held = asked_with(inner, cache)
    outer = AskedJudge(MadeOf(held), "outer", digest="o", asking=Asking(cache=cache), inner=[held])
    assert outer.uses_policy
    with pytest.raises(JudgeError, match="'outer' asks the round's source policy, and was given none"):
        outer.scores([item("p", 1)])
    for policy, times in (("one", 1), ("one", 1), ("two", 2), ("one", 2)):
        model = Living()
        outer.attach(model, policy)
        assert inner.models[-1] is model
        outer.scores([item("p", 1)])
        assert len(inner.seen) == times


def test_a_judge_made_of_judges_is_asked_in_this_thread_and_its_ledger_holds_theirs(cache: VerdictCache) -> None:
    held = [asked_with(Counting(), cache), AskedJudge(Counting(), "b", digest="b", asking=Asking(cache=cache))]
    outer = MadeOf(*held)
    asked = AskedJudge(outer, "outer", digest="o", asking=Asking(cache=cache, limit_s=30.0), inner=held)
    found = asked.scores([item(name, 2) for name in NAMES])
    assert [[one.value for one in row if isinstance(one, Opinion)] for row in found] == [[0.0, 1.0]] * len(NAMES)
    assert outer.threads == {threading.current_thread()}
    assert asked.take_ledger() == {"asked": 3 * 16, "cached": 0, "calls": 16.0}
    assert cache.spent("d") == cache.spent("b") == {"calls": 8.0}


def test_an_inner_judge_that_breaks_its_contract_ends_the_run(cache: VerdictCache) -> None:
    held = asked_with(Answers({"p": [1.0, 2.0]}), cache)
    outer = AskedJudge(MadeOf(held), "outer", inner=[held])
    with pytest.raises(JudgeError, match="'the judge' at prompt 'p': returned 2 scores instead of 1"):
        outer.scores([item("p", 1)])


# --- batches ---


def test_after_a_stop_between_batches_the_same_batches_follow(cache: VerdictCache) -> None:
    """What a judge sees together may sway it: a resumed run must ask as an uninterrupted one does."""
    items = [item(name, 2) for name in NAMES]
    whole = Batched()
    AskedJudge(whole, "x").scores(items)

    class Stopping(Batched):
        def score_batch(self, items: Sequence[Item]) -> list[Sequence[Score]]:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().score_batch(items)

    first, second = Stopping(), Batched()
    with pytest.raises(KeyboardInterrupt):
        asked_with(first, cache).scores(items)
    asked_with(second, cache).scores(items)
    assert first.calls + second.calls == whole.calls
    assert first.calls and second.calls


def test_comparisons_come_in_batches_over_prompts() -> None:
    class Pairs(PairwiseJudge):
        batch_comparisons = 3
        calls: ClassVar[list[list[str]]] = []

        def prefer_batch(self, comparisons: Sequence[Comparison]) -> Sequence[Score]:
            self.calls.append([f"{prompt.id}{a.index}{b.index}" for prompt, a, b in comparisons])
            return [0.5] * len(comparisons)

    AskedJudge(Pairs(), "x").comparisons([item("p", 2), item("q", 2)])
    assert Pairs.calls == [["p01", "p10", "q01"], ["q10"]]


@pytest.mark.parametrize("answers", [[0.5], [0.5] * 3, {0.5, 0.6}, "ab", None])
def test_the_wrong_number_of_probabilities_names_judge_and_prompt(answers: Any) -> None:
    class Wrong(PairwiseJudge):
        batch_comparisons = None

        def prefer_batch(self, comparisons: Sequence[Comparison]) -> Sequence[Score]:
            return answers  # type: ignore[no-any-return]

    with pytest.raises(JudgeError, match=r"^judge 'x' at prompt 'p': returned .* instead of 2( probabilities)?$"):
        AskedJudge(Wrong(), "x").comparisons([item("p", 2)])


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2", None])
def test_a_wrong_number_of_calls_at_once_is_named(number: Any) -> None:
    judge = Counting()
    judge.concurrent = number
    with pytest.raises(JudgeError, match="concurrent must be a whole number from 1"):
        AskedJudge(judge, "x").scores([item("p", 1)])


# --- threads, limits, budget ---


class Slow(Counting):
    """Later prompts answer sooner; `stuck` never does."""

    concurrent = 4

    def __init__(self, stuck: str = "") -> None:
        super().__init__()
        self.stuck = stuck
        self.never = threading.Event()

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
        if prompt.id == self.stuck:
            self.never.wait(60)
        time.sleep(0.02 * (4 - int(prompt.id[1:]) % 4))
        return super().score(prompt, candidates)


def test_answers_that_come_out_of_order_stand_in_order(cache: VerdictCache) -> None:
    found = asked_with(Slow(), cache).scores([item(name, number % 3 + 1) for number, name in enumerate(NAMES)])
    assert [len(row) for row in found] == [number % 3 + 1 for number in range(len(NAMES))]
    assert all(row == [Opinion(float(i), {"length": 1.0}) for i in range(len(row))] for row in found)


def test_a_judge_that_hangs_is_named_with_its_prompt_and_the_others_answers_are_kept(cache: VerdictCache) -> None:
    judge = Slow(stuck="p1")
    items = [item(name, 1) for name in NAMES[:4]]
    with pytest.raises(JudgeError, match=r"^judge 'the judge' at prompt 'p1' has not answered for 0\.5 s$"):
        asked_with(judge, cache, limit_s=0.5).scores(items)
    assert len(cache) == 3
    judge.never.set()
    again = Counting()
    asked_with(again, cache).scores(items)
    assert again.seen == [("p1", 0)]


@pytest.mark.parametrize("concurrent", [1, 3])
def test_the_budget_stops_before_it_is_passed_by_more_than_what_runs(cache: VerdictCache, concurrent: int) -> None:
    """Budget 4 at 1 a call: the calls under way when the fourth was paid for may still end, and are kept."""
    judge = Slow()
    judge.concurrent = concurrent
    items = [item(name, 1) for name in NAMES]
    asked = asked_with(judge, cache, budget={"calls": 4})
    with pytest.raises(JudgeError, match=r"the budget is used up: calls \d of 4; .* raise judge_budget.calls"):
        asked.scores(items)
    spent = cache.spent()["calls"]
    assert 4 <= spent <= 4 + concurrent - 1
    assert len(cache) == len(judge.seen) == spent, "all that was paid for is kept"
    # Another process finds the budget used up; what is kept costs nothing; a higher one finishes the rest.
    with pytest.raises(JudgeError, match="the budget is used up"):
        asked_with(Counting(), cache, budget={"calls": 4}).scores(items)
    rest = Counting()
    done = [item(name, 1) for name, _ in judge.seen]
    assert asked_with(rest, cache, budget={"calls": 4}).scores(done) and not rest.seen
    asked_with(rest, cache, budget={"calls": 100}).scores(items)
    assert Counter(judge.seen + rest.seen) == Counter((name, 0) for name in NAMES)
    assert cache.spent() == {"calls": float(len(NAMES))}


def test_a_budget_that_just_lasts_ends_nothing(cache: VerdictCache) -> None:
    items = [item(name, 1) for name in NAMES]
    assert len(asked_with(Counting(), cache, budget={"calls": len(NAMES)}).scores(items)) == len(NAMES)


def test_a_budget_holds_without_a_cache_whoever_reads_the_ledger() -> None:
    asked = asked_with(Counting(), budget={"calls": 2})
    for _ in range(2):
        asked.scores([item("p", 1)])
        asked.take_ledger()
    with pytest.raises(JudgeError, match="the budget is used up"):
        asked.scores([item("p", 1)])


def test_what_a_failed_call_has_cost_is_on_the_books(cache: VerdictCache) -> None:
    class Dear(Counting):
        def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
            super().score(prompt, candidates)
            raise JudgeError("wrong key")

    with pytest.raises(JudgeError, match="wrong key"):
        asked_with(Dear(), cache).scores([item("p", 1)])
    assert cache.spent() == {"calls": 1.0}


def test_a_ledger_that_cannot_be_read_is_the_judges_fault(cache: VerdictCache) -> None:
    class Vague(Counting):
        def ledger(self) -> dict[str, float]:
            return {"cost": "much"}  # type: ignore[dict-item]

    with pytest.raises(JudgeError, match="judge 'the judge': its ledger cannot be read: ValueError"):
        asked_with(Vague(), cache).scores([item("p", 1)])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through_threads_too(stop: type[BaseException]) -> None:
    class Interrupted(PointwiseJudge):
        concurrent = 2

        def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
            raise stop

    with pytest.raises(stop):
        asked_with(Interrupted(), limit_s=30.0).scores([item(name, 1) for name in NAMES])


# --- processes ---

PROGRAM = """
import sys, time
from pathlib import Path
from judging_parts import item
from online_dpo.judging import AskedJudge, Asking, PointwiseJudge, VerdictCache, judge_all

folder, hang = Path(sys.argv[1]), sys.argv[2] == "hang"

class Judge(PointwiseJudge):
    concurrent = int(sys.argv[3])
    due = 0
    def score(self, prompt, candidates):
        if hang and prompt.id == "p20":
            time.sleep(3600)
        with (folder / "calls.log").open("a") as log:
            log.write(prompt.id + "\\n")
        self.due += 1
        return [float(len(prompt.id))] * len(candidates)
    def ledger(self):
        due, self.due = self.due, 0
        return {"calls": float(due)}

with VerdictCache(folder / "verdicts.sqlite") as cache:
    asked = AskedJudge(Judge(), "slow", digest="d", asking=Asking(cache=cache))
    items = [item(f"p{n}", 2) for n in range(60)]
    prompts = {prompt.id: prompt for prompt, _ in items}
    judge_all(asked, prompts, [answer for _, row in items for answer in row], max_abstain=0)
print("done")
"""


@pytest.mark.parametrize("concurrent", [1, 4])
def test_killed_in_the_middle_and_started_again_nothing_is_answered_twice(tmp_path: Path, concurrent: int) -> None:
    """The process is killed (SIGKILL) while p20 is under way: only that is lost, and it was never answered."""

    def start(how: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), how, str(concurrent)],
            cwd=ROOT / "tests",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def kept() -> int:
        if not (tmp_path / "verdicts.sqlite").exists():
            return 0
        with VerdictCache(tmp_path / "verdicts.sqlite") as cache:
            return len(cache)

    first = start("hang")
    # With four at once the chunk of 32 prompts that holds p20 goes on around it.
    wanted = 20 if concurrent == 1 else 31
    deadline = time.monotonic() + 120
    while kept() < wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL
    assert kept() == wanted
    second = start("run")
    assert second.communicate(timeout=120)[0] == "done\n"
    calls = (tmp_path / "calls.log").read_text().split()
    assert Counter(calls) == Counter(f"p{n}" for n in range(60)), "each once"
    with VerdictCache(tmp_path / "verdicts.sqlite") as cache:
        assert cache.spent() == {"calls": 60.0}


def test_with_threads_each_candidate_is_a_call_of_its_own(tmp_path: Path) -> None:
    """Two prompts of three candidates: six calls of one; the fourth candidate's failure ends the run, and the answers
    of all calls that ended are on disk."""
    sizes: list[int] = []

    class Alone(PointwiseJudge):
        each_alone = True
        concurrent = 2

        def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
            sizes.append(len(candidates))
            if (prompt.id, candidates[0].index) == ("q", 0):
                raise JudgeError("no more")
            return [float(candidate.index) for candidate in candidates]

    items = [(PROMPTS[name], [answer(name, index, f"{name}{index}") for index in range(3)]) for name in ("p", "q")]
    with VerdictCache(tmp_path / "cache.sqlite") as cache:
        asked = AskedJudge(Alone(), "alone", digest="d", asking=Asking(cache=cache))
        with pytest.raises(JudgeError, match="no more"):
            asked.scores(items)
        assert set(sizes) == {1}
        assert len(cache) == len(sizes) - 1
