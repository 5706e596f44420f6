"""A judge whose scores are freed of what length alone explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from judges.length import Unit, check_unit, length_of
from online_dpo.errors import JudgeError
from online_dpo.judging import Abstention, AskedJudge, Item, Opinion, PointwiseJudge, Score

Answers = Sequence[Opinion | Abstention]


@dataclass(frozen=True, slots=True)
class Fit:
    """The within-prompt line of scores on lengths; `r2`: the share of the within-prompt spread that it explains."""

    slope: float
    r2: float


class LengthControlledJudge(PointwiseJudge):
    """The scores of `judge` minus slope · (length − the prompt's mean length); abstentions stay.

    The slope is that of least squares over all prompts of the round at once, lengths x and scores s centred in each
    prompt, slope = Σ x·s / Σ x². What is left does not correlate with length within prompts, over the round. Scores
    keep their unit and each prompt's mean. `log`: of ln(1 + length). Constant lengths: slope 0.

    Length-controlled AlpacaEval (Dubois et al. 2024) takes length out by a logistic model of one player's wins; this
    is the linear version for any scores. It takes out what longer answers earn by being better, too. The whole round
    is judged at once. Held-out answers are judged beside the initial policy's: one alone has no spread to fit.

    Details: `raw` (the score before), `slope` (a unit of length), `r2`.
    """

    cached: ClassVar[bool] = False
    relative: ClassVar[bool] = True
    judge_params: ClassVar[tuple[str, ...]] = ("judge",)
    batch_prompts = None

    def __init__(self, judge: AskedJudge, unit: Unit = "tokens", log: bool = False) -> None:
        if not isinstance(judge, AskedJudge):
            raise JudgeError("LengthControlledJudge: judge must be one judge")
        check_unit("LengthControlledJudge", unit)
        if not isinstance(log, bool):
            raise JudgeError(f"LengthControlledJudge: log must be true or false, found {log!r}")
        self.judge = judge
        self.unit = unit
        self.log = log

    def score_batch(self, items: Sequence[Item]) -> list[list[Score]]:
        """One controlled score per candidate of each item, in the inner judge's unit."""
        rows = self.judge.scores(items)
        centred = [
            _centred([self._length(length_of(c, self.unit)) for c in candidates], row)
            for (_, candidates), row in zip(items, rows, strict=True)
        ]
        fit = within_fit([pair for prompt in centred for pair in prompt.values()])
        return [
            [_controlled(answer, places.get(i), fit) for i, answer in enumerate(row)]
            for row, places in zip(rows, centred, strict=True)
        ]

    def _length(self, length: int) -> float:
        return math.log1p(length) if self.log else float(length)


def within_fit(centred: Sequence[tuple[float, float]]) -> Fit:
    """The line through (length, score), both centred within their prompts; slope 0 where either does not vary."""
    # In units of the largest: squares of extreme scores would overflow.
    unit = max((abs(s) for _, s in centred), default=0.0)
    if unit == 0.0:
        return Fit(0.0, 0.0)
    xx = math.fsum(x * x for x, _ in centred)
    xs = math.fsum(x * (s / unit) for x, s in centred)
    ss = math.fsum((s / unit) ** 2 for _, s in centred)
    return Fit(unit * xs / xx, xs * xs / (xx * ss)) if xx > 0.0 else Fit(0.0, 0.0)


def _centred(lengths: Sequence[float], answers: Answers) -> dict[int, tuple[float, float]]:
    """(length, score) of each candidate that has a score, less their means, by the candidate's place."""
    there = [(i, answer.value) for i, answer in enumerate(answers) if isinstance(answer, Opinion)]
    if not there:
        return {}
    mean_length = math.fsum(lengths[i] for i, _ in there) / len(there)
    mean_score = math.fsum(value for _, value in there) / len(there)
    return {i: (lengths[i] - mean_length, value - mean_score) for i, value in there}


def _controlled(answer: Opinion | Abstention, centred: tuple[float, float] | None, fit: Fit) -> Score:
    if isinstance(answer, Abstention) or centred is None:
        return answer
    details = {**answer.details, "raw": answer.value, "slope": fit.slope, "r2": fit.r2}
    return Opinion(answer.value - fit.slope * centred[0], details)
