"""Judges an answer by its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from online_dpo.errors import JudgeError, nearest
from online_dpo.judging import PointwiseJudge
from online_dpo.types import Candidate, Prompt

Unit = Literal["tokens", "words", "characters"]


class LengthJudge(PointwiseJudge):
    """Longer is better; with a `target`, nearer to it is better (score = -|length - target|).

    Scores are in `unit`: sampled tokens (the end token included), words between white space, or characters.
    """

    def __init__(self, target: int | None = None, unit: Unit = "tokens") -> None:
        if unit not in get_args(Unit):
            raise JudgeError(f"LengthJudge: no unit '{unit}'{nearest(unit, get_args(Unit))}")
        if target is not None and (isinstance(target, bool) or not isinstance(target, int) or target < 0):
            raise JudgeError(f"LengthJudge: target must be a whole number from 0, found {target!r}")
        self.target = target
        self.unit = unit

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
        """One score per candidate, in `unit`."""
        lengths = [self._length(candidate) for candidate in candidates]
        if self.target is None:
            return [float(length) for length in lengths]
        return [-float(abs(length - self.target)) for length in lengths]

    def _length(self, candidate: Candidate) -> int:
        if self.unit == "tokens":
            return len(candidate.token_ids)
        return len(candidate.text.split()) if self.unit == "words" else len(candidate.text)
