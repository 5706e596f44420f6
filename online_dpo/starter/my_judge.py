"""A judge of your own. Change what it likes, and the policy will learn something else.

The experiment names it as "my_judge:PlainWords"; its constructor's keys stand beside `use`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from online_dpo.judging import Abstention, PointwiseJudge, Score
from online_dpo.types import Candidate, Prompt


class PlainWords(PointwiseJudge):
    """Likes short English words, and no pair of words twice.

    The score is the share of words with at most `letters` letters (an apostrophe is one), minus the share of word
    pairs (neighbours) that the answer has used before: 1 at most.
    """

    def __init__(self, letters: int = 6) -> None:
        self.letters = letters

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        """One score for each candidate, in their order; higher is better."""
        # All candidates answer the same prompt, whose last message is `prompt.text`: a judge may use that, too.
        return [self._score(candidate.text) for candidate in candidates]

    def _score(self, text: str) -> Score:
        words = [word for part in text.lower().split() if (word := part.strip(".,;:!?\"'()*#-"))]
        if len(words) < 5:
            # What cannot be judged gets no score. Abstentions are counted; too many of them end the run.
            return Abstention("fewer than 5 words")
        # A policy finds every gap in a judge. Without a-z here, it would learn to write in other scripts.
        plain = sum(re.fullmatch(f"[a-z'’]{{1,{self.letters}}}", word) is not None for word in words)
        pairs = list(pairwise(words))
        repeated = 1.0 - len(set(pairs)) / len(pairs)
        return plain / len(words) - repeated
