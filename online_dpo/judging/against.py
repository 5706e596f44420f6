"""Answers against other answers to the same prompts: how a judge that only compares can measure a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from online_dpo.errors import JudgeError
from online_dpo.judging.asked import AskedJudge
from online_dpo.judging.interface import Abstention, Item
from online_dpo.judging.verdicts import check_abstentions
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

    Both orders are asked. An answer against itself (the same text) is ½ and nobody is asked.
    Raises `JudgeError` when the judge scores instead of comparing, or abstains on more than `max_abstain`.
    """
    if not asked.pairwise:
        raise JudgeError(f"judge '{asked.name}' scores, it does not compare")
    pairs = list(zip(answers, others, strict=True))
    differ = [place for place, (one, other) in enumerate(pairs) if one.text != other.text]
    items: list[Item] = [(prompts[pairs[place][0].prompt_id], pairs[place]) for place in differ]
    results: list[Verdict | Abstain] = [Verdict(one.prompt_id, one.index, EQUAL) for one in answers]
    for place, compared in zip(differ, asked.comparisons(items), strict=True):
        outcome = asked.outcome(compared[0])
        one = answers[place]
        if isinstance(outcome, Abstention):
            results[place] = Abstain(one.prompt_id, one.index, outcome.reason)
        else:
            results[place] = Verdict(one.prompt_id, one.index, outcome)
    abstained = [result for result in results if isinstance(result, Abstain)]
    check_abstentions(asked, abstained, len(results), len(results), max_abstain)
    return results
