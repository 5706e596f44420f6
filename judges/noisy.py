"""A judge whose verdicts are flipped at a known rate: for studies of label noise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

from online_dpo.errors import JudgeError
from online_dpo.judging import Abstention, AskedJudge, Comparison, Item, Opinion, PairwiseJudge, Score
from online_dpo.types import Candidate, Prompt

Preference: TypeAlias = float | Abstention


class NoisyJudge(PairwiseJudge):
    """The comparisons of `judge`, each turned round with probability `rate`, 0 to 1.

    A flip, defined: let p be the probability that a is better than b. For a judge that compares, p is its own answer
    (both orders, where it is asked for both); for one that scores, p is 1, ½ or 0 as a's score is higher than, equal
    to or lower than b's. A flipped comparison has 1 − p. Each unordered pair of different answers to a prompt is
    flipped or not independently of all others, by a hash of `seed`, the prompt and the two texts: both orders agree,
    and a run that is resumed or repeated sees the same flips. A tie stays a tie; abstentions stay.

    What follows. E[p'] = (1 − rate)·p + rate·(1 − p) = rate + (1 − 2·rate)·p: all preferences shrink towards ½ by
    1 − 2·rate, and at rate < ½ the expected order is the inner judge's. With two candidates a prompt, their pair is
    turned round with probability `rate` exactly (the random flips of Chowdhury et al., Provably robust DPO, ICML
    2024). With n > 2 a candidate's rank rests on n − 1 comparisons, so that of the pairs of best and worst fewer are
    turned round. At rate 0 the ranking is the inner judge's, in the unit that comparisons give.

    Details: `flipped`.
    """

    cached: ClassVar[bool] = False
    both_orders: ClassVar[bool] = False
    judge_params: ClassVar[tuple[str, ...]] = ("judge",)
    # A judge that scores must see a prompt's candidates together.
    batch_comparisons = None

    def __init__(self, judge: AskedJudge, rate: float, seed: int = 0) -> None:
        if not isinstance(judge, AskedJudge):
            raise JudgeError("NoisyJudge: judge must be one judge")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
            raise JudgeError(f"NoisyJudge: rate must be a number from 0 to 1, found {rate!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise JudgeError(f"NoisyJudge: seed must be a whole number, found {seed!r}")
        self.judge = judge
        self.rate = rate
        self.seed = seed

    def prefer_batch(self, comparisons: Sequence[Comparison]) -> list[Score]:
        """One probability per comparison, with whether it was flipped."""
        inner = self._compared(comparisons) if self.judge.pairwise else self._scored(comparisons)
        return [
            _turned(p, flips(self.rate, self.seed, *comparison))
            for p, comparison in zip(inner, comparisons, strict=True)
        ]

    def _compared(self, comparisons: Sequence[Comparison]) -> list[Preference]:
        """The inner judge's own preferences."""
        items: list[Item] = [(prompt, (first, second)) for prompt, first, second in comparisons]
        return [self.judge.outcome(row[0]) for row in self.judge.comparisons(items)]

    def _scored(self, comparisons: Sequence[Comparison]) -> list[Preference]:
        """The preferences that the inner judge's scores imply."""
        prompts: dict[str, Prompt] = {}
        together: dict[str, dict[Candidate, None]] = {}
        for prompt, first, second in comparisons:
            prompts[prompt.id] = prompt
            together.setdefault(prompt.id, {}).update({first: None, second: None})
        items: list[Item] = [(prompts[name], list(candidates)) for name, candidates in together.items()]
        said = {
            candidate: answer
            for (_, candidates), row in zip(items, self.judge.scores(items), strict=True)
            for candidate, answer in zip(candidates, row, strict=True)
        }
        return [_higher(said[first], said[second]) for _, first, second in comparisons]


def flips(rate: float, seed: int, prompt: Prompt, first: Candidate, second: Candidate) -> bool:
    """Whether these two answers' comparison is flipped; the same for (second, first)."""
    messages = [[message.role, message.content] for message in prompt.messages]
    # JSON, so that no two inputs run together; it escapes what UTF-8 cannot write.
    named = json.dumps([seed, messages, sorted((first.text, second.text))])
    draw = int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "big")
    return draw < rate * 2**64


def _higher(first: Opinion | Abstention, second: Opinion | Abstention) -> Preference:
    if isinstance(first, Abstention):
        return first
    if isinstance(second, Abstention):
        return second
    return 0.5 + 0.5 * (first.value > second.value) - 0.5 * (first.value < second.value)


def _turned(p: Preference, flipped: bool) -> Score:
    if isinstance(p, Abstention):
        return p
    return Opinion(1.0 - p if flipped else p, {"flipped": flipped})
