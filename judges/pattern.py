"""Judges an answer by regular expressions that it should, or should not, match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from judges.expressions import Expression
from online_dpo.errors import JudgeError
from online_dpo.judging import Abstention, PointwiseJudge, Score
from online_dpo.types import Candidate, Prompt


class PatternJudge(PointwiseJudge):
    """The share, in [0, 1], of the conditions that hold: each of `require` found, each of `forbid` not found.

    The expressions are Python's, searched anywhere in the answer; write flags inside, such as (?i). An answer on
    which one of them takes longer than a second abstains.
    """

    cached: ClassVar[bool] = False

    def __init__(self, require: Sequence[str] = (), forbid: Sequence[str] = ()) -> None:
        self.require = _compiled("require", require)
        self.forbid = _compiled("forbid", forbid)
        if not self.require and not self.forbid:
            raise JudgeError("PatternJudge: give at least one pattern in require or forbid")

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        """One score per candidate, in [0, 1]."""
        return [self._share(candidate.text) for candidate in candidates]

    def _share(self, text: str) -> Score:
        held = 0
        wanted = [(one, True) for one in self.require] + [(one, False) for one in self.forbid]
        for expression, should in wanted:
            found = expression.found(text)
            if isinstance(found, Abstention):
                return found
            held += found is should
        return held / len(wanted)


def _compiled(key: str, patterns: Sequence[str]) -> list[Expression]:
    # A lone string is a sequence too: it would be taken letter by letter.
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise JudgeError(f"PatternJudge: {key} must be a list of regular expressions, found {patterns!r:.60}")
    return [Expression(pattern, f"PatternJudge: {key}") for pattern in patterns]
