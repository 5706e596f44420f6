"""Judges how positive an answer sounds, by VADER's word list (Hutto and Gilbert, ICWSM 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from online_dpo.judging import PointwiseJudge
from online_dpo.types import Candidate, Prompt


class SentimentJudge(PointwiseJudge):
    """VADER's compound score of the answer, in [-1, 1]; its negative with `positive=False`.

    An answer without any word of the list scores 0: VADER's own verdict "neutral".
    """

    cached: ClassVar[bool] = False

    def __init__(self, positive: bool = True) -> None:
        self.sign = 1.0 if positive else -1.0
        self.analyzer = SentimentIntensityAnalyzer()

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
        """One score per candidate, in [-1, 1]."""
        return [self.sign * float(self.analyzer.polarity_scores(c.text)["compound"]) for c in candidates]
