"""Judges an answer by words that it should, or should not, use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from online_dpo.errors import JudgeError, nearest
from online_dpo.judging import Abstention, PointwiseJudge, Score
from online_dpo.types import Candidate, Prompt

Count = Literal["presence", "rate"]
NO_WORDS = Abstention("an answer without words")


class KeywordJudge(PointwiseJudge):
    """Words of `wanted` count for an answer, words of `unwanted` against it; whole words, upper and lower case alike.

    count: presence — the share of `wanted` that stands in the answer minus the share of `unwanted` that does, in
    [−1, 1]. count: rate — occurrences of `wanted` minus those of `unwanted`, per 100 words of the answer; without a
    word it abstains. An entry may have several words ("as an AI"); any white space may part them.
    """

    cached: ClassVar[bool] = False

    def __init__(self, wanted: Sequence[str] = (), unwanted: Sequence[str] = (), count: Count = "presence") -> None:
        if count not in get_args(Count):
            raise JudgeError(f"KeywordJudge: no count '{count}'{nearest(count, get_args(Count))}")
        self.wanted = _compiled("wanted", wanted)
        self.unwanted = _compiled("unwanted", unwanted)
        if not self.wanted and not self.unwanted:
            raise JudgeError("KeywordJudge: give at least one word in wanted or unwanted")
        self.count = count

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        """One score per candidate: in [−1, 1], or per 100 words."""
        return [self._score(candidate.text.casefold()) for candidate in candidates]

    def _score(self, text: str) -> Score:
        if self.count == "presence":
            return _share(self.wanted, text) - _share(self.unwanted, text)
        words = len(text.split())
        if not words:
            return NO_WORDS
        return 100.0 * (_occurrences(self.wanted, text) - _occurrences(self.unwanted, text)) / words


def _share(words: Sequence[re.Pattern[str]], text: str) -> float:
    return sum(word.search(text) is not None for word in words) / len(words) if words else 0.0


def _occurrences(words: Sequence[re.Pattern[str]], text: str) -> int:
    return sum(1 for word in words for _ in word.finditer(text))


def _compiled(key: str, words: Sequence[str]) -> list[re.Pattern[str]]:
    # A lone string is a sequence too: it would be taken letter by letter.
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word.strip() for word in words):
        raise JudgeError(f"KeywordJudge: {key} must be a list of words, found {words!r:.60}")
    folded = list(dict.fromkeys(" ".join(word.casefold().split()) for word in words))
    # Not \b: an entry may end in a sign, as "C++" does.
    spaced = [r"\s+".join(map(re.escape, word.split())) for word in folded]
    return [re.compile(rf"(?<!\w){word}(?!\w)") for word in spaced]
