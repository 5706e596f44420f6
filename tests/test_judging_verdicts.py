"""A round's candidates get their verdicts: order, limits on abstentions, progress, figures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from judging_parts import PROMPTS, Answers, Batched, Table, answer, item, prompt

from online_dpo.config import ComparingSpec
from online_dpo.errors import DataError, JudgeError
from online_dpo.judging import (
    AskedJudge,
    Asking,
    PointwiseJudge,
    Score,
    abstain_reasons,
    judge_all,
    mean_details,
)
from online_dpo.types import Abstain, Candidate, Prompt, Verdict


def test_results_stand_in_the_candidates_order() -> None:
    """Candidates of p and q interleaved: p scores (1, 2), q scores (3, 4), so p0 q0 q1 p1 gives 1 3 4 2."""
    order = [answer("p", 0), answer("q", 0), answer("q", 1), answer("p", 1)]
    results = judge_all(Answers({"p": [1, 2], "q": [3, 4]}), PROMPTS, order, max_abstain=0)
    assert results == [Verdict("p", 0, 1.0), Verdict("q", 0, 3.0), Verdict("q", 1, 4.0), Verdict("p", 1, 2.0)]


def test_too_many_abstentions_name_counts_reasons_and_first_prompt() -> None:
    """Four candidates, max_abstain 0.5 allows two. p (1) and q (1) abstain, then r's two: 4 of 4 > 2."""
    judge = Answers({"p": [None], "q": ValueError("x"), "r": [float("nan"), None]})
    candidates = [answer("p", 0), answer("q", 0), answer("r", 0), answer("r", 1)]
    with pytest.raises(JudgeError) as caught:
        judge_all(judge, PROMPTS, candidates, max_abstain=0.5)
    message = str(caught.value)
    assert "abstained on 4 of the 4 candidates" in message
    assert "judge declined (2); ValueError: x (1); returned nan (1)" in message
    assert "first at prompt 'p'" in message
    assert "\n" not in message


def test_exactly_max_abstain_is_allowed() -> None:
    results = judge_all(Answers({"p": [None, 1.0]}), PROMPTS, [answer("p", 0), answer("p", 1)], max_abstain=0.5)
    assert abstain_reasons(results) == {"judge declined": 1}


def test_a_hopeless_round_stops_early() -> None:
    """Ten candidates at max_abstain 0.1: the second abstention decides it, the other eight are not asked."""
    asked: list[int] = []

    class Broken(PointwiseJudge):
        def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
            asked.append(len(candidates))
            return [None]

    prompts = {str(i): prompt(str(i)) for i in range(10)}
    with pytest.raises(JudgeError, match="2 of the 2 candidates judged so far"):
        judge_all(Broken(), prompts, [answer(name, 0) for name in prompts], max_abstain=0.1)
    assert len(asked) == 2


def test_progress_adds_up_and_nothing_is_nothing() -> None:
    seen: list[int] = []
    candidates = [answer("p", 0), answer("p", 1), answer("q", 0)]
    judge = Answers({"p": [1, 2], "q": [3]})
    judge_all(judge, PROMPTS, candidates, max_abstain=0, on_progress=seen.append)
    assert seen == [2, 1]
    assert judge_all(judge, PROMPTS, [], max_abstain=0) == []


def test_an_unknown_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="unknown prompt 'z'"):
        judge_all(Answers({}), PROMPTS, [answer("z", 0)], max_abstain=1)


def test_reasons_are_counted_most_frequent_first() -> None:
    verdicts: list[Verdict | Abstain] = [
        Abstain("p", 0, "a"),
        Verdict("p", 1, 0.0),
        Abstain("p", 2, "b"),
        Abstain("p", 3, "b"),
    ]
    assert list(abstain_reasons(verdicts).items()) == [("b", 2), ("a", 1)]


@pytest.mark.parametrize(("share", "n", "allowed"), [(0.29, 100, 29), (0.07, 100, 7), (0.1, 30, 3), (0.0, 5, 0)])
def test_a_share_allows_as_many_as_it_says(share: float, n: int, allowed: int) -> None:
    """0.29 · 100 is 28.999999999999996 in floating point, and allows 29."""
    names = {str(i): prompt(str(i)) for i in range(n)}
    for abstain in (allowed, allowed + 1):
        judge = Answers({name: [None if int(name) < abstain else 1.0] for name in names})
        candidates = [answer(name, 0) for name in names]
        if abstain <= allowed:
            assert (
                sum(isinstance(v, Abstain) for v in judge_all(judge, names, candidates, max_abstain=share)) == abstain
            )
        else:
            with pytest.raises(JudgeError, match=f"abstained on {abstain} of"):
                judge_all(judge, names, candidates, max_abstain=share)


def test_calls_at_once_are_kept_busy_between_two_looks_at_the_abstentions() -> None:
    """4 threads of 1 prompt: progress comes in chunks of 32, and a hopeless judge is stopped after one of them."""
    names = {f"p{i}": prompt(f"p{i}") for i in range(70)}
    candidates = [answer(name, 0) for name in names]
    seen: list[int] = []
    judge = Batched()
    judge.batch_prompts, judge.concurrent = 1, 4
    judge_all(judge, names, candidates, max_abstain=0, on_progress=seen.append)
    assert seen == [32, 32, 6]
    broken = Batched(poison="p3")
    broken.batch_prompts, broken.concurrent = 1, 4
    with pytest.raises(JudgeError, match="1 of the 32 candidates judged so far"):
        judge_all(broken, names, candidates, max_abstain=0)
    assert len(broken.calls) == 32


def test_all_of_the_round_at_once_where_the_judge_says_so() -> None:
    judge, seen = Batched(), list[int]()
    judge.batch_prompts = None
    judge_all(judge, PROMPTS, [answer(name, 0) for name in PROMPTS], max_abstain=0, on_progress=seen.append)
    assert judge.calls == [["p", "q", "r"]]
    assert seen == [3]


@pytest.mark.parametrize("schedule", ["all_pairs", "swiss", "knock_out"])
def test_every_schedule_finds_the_best_of_each_prompt(schedule: str) -> None:
    table = Table({(i, j): float(i == 3 or (j != 3 and i < j)) for i in range(5) for j in range(5)})
    asking = Asking(comparing=ComparingSpec.model_validate({"schedule": schedule}))
    candidates = [candidate for name in PROMPTS for candidate in item(name, 5)[1]]
    results = judge_all(AskedJudge(table, "x", asking=asking), PROMPTS, candidates, max_abstain=0)
    for name in PROMPTS:
        own = [v for v in results if isinstance(v, Verdict) and v.prompt_id == name]
        assert max(own, key=lambda v: v.score).index == 3
        assert len(own) == 5


def test_details_are_averaged_over_the_verdicts_that_have_them() -> None:
    """length: (1 + 3)/2; sure: true and false are 1 and 0; text and None are no numbers."""
    verdicts: list[Verdict | Abstain] = [
        Verdict("p", 0, 1.0, {"length": 1.0, "sure": True, "why": "x", "odd": None}),
        Verdict("p", 1, 2.0, {"length": 3.0, "sure": False}),
        Verdict("p", 2, 2.0),
        Abstain("p", 3, "no"),
    ]
    assert mean_details(verdicts) == {"length": 2.0, "sure": 0.5}
    assert mean_details([]) == {}
