"""Answers against other answers to the same prompts: how a judge that only compares can measure a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from online_dpo.judging.answers import Answer
from online_dpo.judging.asked import AskedJudge
from online_dpo.judging.interface import Abstention, Item
from online_dpo.judging.verdicts import Abstained, chunk_size
from online_dpo.types import Abstain, Candidate, Prompt, Verdict

EQUAL = 0.5


def judge_against(
    asked: AskedJudge,
    prompts: Mapping[str, Prompt],
    answers: Sequence[Candidate],
    others: Sequence[Candidate],
    *,
    max_abstain: float,
) -> list[Verdict | Abstain]:
    """For each of `answers`: the probability, in [0, 1], that it is better than the one of `others` in its place.

    A judge that compares is asked in both orders; of one that scores, the higher score wins (1, 0, or ½ when equal).
    An answer against itself (the same text) is ½ and nobody is asked.
    Raises `JudgeError` when the judge abstains on more than the share `max_abstain`.
    """
    pairs = [(one, replace(other, index=one.index + 1)) for one, other in zip(answers, others, strict=True)]
    differ = [place for place, (one, other) in enumerate(pairs) if one.text != other.text]
    items: list[Item] = [(prompts[pairs[place][0].prompt_id], pairs[place]) for place in differ]
    results: list[Verdict | Abstain] = [Verdict(one.prompt_id, one.index, EQUAL) for one in answers]
    abstained = Abstained()
    step = max(1, chunk_size(asked, 2) or len(items))
    for start in range(0, len(items), step):
        some = slice(start, start + step)
        for place, outcome in zip(differ[some], _outcomes(asked, items[some]), strict=True):
            one = answers[place]
            if isinstance(outcome, Abstention):
                abstained.add(one.prompt_id, outcome.reason)
                results[place] = Abstain(one.prompt_id, one.index, outcome.reason)
            else:
                results[place] = Verdict(one.prompt_id, one.index, outcome)
        abstained.check(asked, min(start + step, len(items)), len(results), max_abstain)
    return results


def _outcomes(asked: AskedJudge, items: Sequence[Item]) -> list[float | Abstention]:
    """The probability that the first of each item's two is better."""
    if asked.pairwise:
        return [asked.outcome(compared[0]) for compared in asked.comparisons(items)]
    return [_higher(*row) for row in asked.scores(items)]


def _higher(one: Answer, other: Answer) -> float | Abstention:
    if isinstance(one, Abstention):
        return one
    if isinstance(other, Abstention):
        return other
    return 0.5 if one.value == other.value else float(one.value > other.value)
