"""Judges an answer by how much it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from online_dpo.errors import JudgeError
from online_dpo.judging import PointwiseJudge
from online_dpo.measure import distinct_n
from online_dpo.types import Candidate, Prompt


class RepetitionJudge(PointwiseJudge):
    """−rep-n: minus the share, in [0, 1), of the answer's word n-grams that stood in it before.

    rep-n = 1 − |different n-grams| / |n-grams| (seq-rep-n of Welleck et al., Neural text generation with unlikelihood
    training, ICLR 2020, equation 10; theirs has n = 4 and counts tokens). Words are what white space separates, in
    lower case. An answer of fewer than n words repeats nothing: 0, the best score; weigh it against another judge.
    """

    cached: ClassVar[bool] = False

    def __init__(self, n: int = 4) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise JudgeError(f"RepetitionJudge: n must be a whole number from 1, found {n!r}")
        self.n = n

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
        """One score per candidate, in (−1, 0]."""
        return [-repeated(candidate.text, self.n) for candidate in candidates]


def repeated(text: str, n: int) -> float:
    """rep-n of one text, in [0, 1); 0 for a text of fewer than n words."""
    return 1.0 - distinct_n([text], n) if len(text.split()) >= n else 0.0
