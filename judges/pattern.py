"""Judges an answer by regular expressions that it should, or should not, match."""

from __future__ import annotations

import re
from collections.abc import Sequence

from online_dpo.errors import JudgeError
from online_dpo.judging import PointwiseJudge
from online_dpo.types import Candidate, Prompt


class PatternJudge(PointwiseJudge):
    """The share, in [0, 1], of the conditions that hold: each of `require` found, each of `forbid` not found.

    The expressions are Python's, searched anywhere in the answer; write flags inside, such as (?i).
    """

    def __init__(self, require: Sequence[str] = (), forbid: Sequence[str] = ()) -> None:
        self.require = _compiled("require", require)
        self.forbid = _compiled("forbid", forbid)
        if not self.require and not self.forbid:
            raise JudgeError("PatternJudge: give at least one pattern in require or forbid")

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
        """One score per candidate, in [0, 1]."""
        return [self._share(candidate.text) for candidate in candidates]

    def _share(self, text: str) -> float:
        held = sum(pattern.search(text) is not None for pattern in self.require)
        held += sum(pattern.search(text) is None for pattern in self.forbid)
        return held / (len(self.require) + len(self.forbid))


def _compiled(key: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    # A lone string is a sequence too: it would be taken letter by letter.
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise JudgeError(f"PatternJudge: {key} must be a list of regular expressions, found {patterns!r:.60}")
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise JudgeError(f"PatternJudge: {key}: '{pattern}' is not a regular expression: {error}") from error
    return compiled
