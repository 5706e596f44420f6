"""Judges an answer by its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from online_dpo.errors import JudgeError, nearest
from online_dpo.judging import PointwiseJudge
from online_dpo.types import Candidate, Prompt

Unit = Literal["tokens", "words", "characters"]


class LengthJudge(PointwiseJudge):
    """Longer is better; with a `target`, nearer to it is better; within `tolerance` of it all are equally good.

    score = length, or −max(0, |length − target| − tolerance). Scores are in `unit`: sampled tokens (the end token
    included), words between white space, or characters.
    """

    cached: ClassVar[bool] = False

    def __init__(self, target: int | None = None, unit: Unit = "tokens", tolerance: int = 0) -> None:
        check_unit("LengthJudge", unit)
        for key, value in (("target", target), ("tolerance", tolerance)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise JudgeError(f"LengthJudge: {key} must be a whole number from 0, found {value!r}")
        if tolerance and target is None:
            raise JudgeError("LengthJudge: tolerance needs a target")
        self.target = target
        self.unit = unit
        self.tolerance = tolerance

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
        """One score per candidate, in `unit`."""
        lengths = [length_of(candidate, self.unit) for candidate in candidates]
        if self.target is None:
            return [float(length) for length in lengths]
        return [-float(max(0, abs(length - self.target) - self.tolerance)) for length in lengths]


def check_unit(judge: str, unit: object) -> None:
    """`JudgeError` when `unit` is none of `Unit`."""
    if unit not in get_args(Unit):
        raise JudgeError(f"{judge}: no unit '{unit}'{nearest(str(unit), get_args(Unit))}")


def length_of(candidate: Candidate, unit: Unit) -> int:
    """The answer's length in `unit`."""
    if unit == "tokens":
        return len(candidate.token_ids)
    return len(candidate.text.split()) if unit == "words" else len(candidate.text)
