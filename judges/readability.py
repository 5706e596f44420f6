"""Judges an answer by how easy its English is to read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from judges.syllables import syllables
from online_dpo.errors import JudgeError, nearest
from online_dpo.judging import Abstention, PointwiseJudge, Score
from online_dpo.types import Candidate, Prompt

Formula = Literal["ease", "grade"]
NO_WORDS = Abstention("an answer without words")
# A sentence's end is looked for at the first of its signs alone: a long row of dots would take quadratic time.
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|\n\s*\n")


class ReadabilityJudge(PointwiseJudge):
    """Easier English is better; with a `target`, nearer to it is better (score = −|value − target|).

    formula: ease — Flesch's reading ease, 206.835 − 1.015·W/S − 84.6·Y/W (Flesch, Journal of Applied Psychology
    1948), about 0 (hard) to 100 (easy). formula: grade — the US school grade 0.39·W/S + 11.8·Y/W − 15.59 (Kincaid et
    al. 1975); without a target the score is its negative. W words of letters, S sentences, Y syllables
    (`judges.syllables`). For English alone; an answer without a word abstains.
    """

    cached: ClassVar[bool] = False

    def __init__(self, formula: Formula = "ease", target: float | None = None) -> None:
        if formula not in get_args(Formula):
            raise JudgeError(f"ReadabilityJudge: no formula '{formula}'{nearest(formula, get_args(Formula))}")
        if target is not None and (
            isinstance(target, bool) or not isinstance(target, int | float) or not math.isfinite(target)
        ):
            raise JudgeError(f"ReadabilityJudge: target must be a number, found {target!r}")
        self.formula = formula
        self.target = target

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        """One score per candidate, in points of reading ease or in school grades."""
        return [self._score(candidate.text) for candidate in candidates]

    def _score(self, text: str) -> Score:
        words = WORD.findall(text)
        if not words:
            return NO_WORDS
        value = formula_value(self.formula, len(words), sentences(text), sum(map(syllables, words)))
        if self.target is not None:
            return -abs(value - self.target)
        return value if self.formula == "ease" else -value


def formula_value(formula: Formula, words: int, sentences: int, syllables: int) -> float:
    """Reading ease or school grade of a text with these counts, all at least 1."""
    if formula == "ease":
        return 206.835 - 1.015 * words / sentences - 84.6 * syllables / words
    return 0.39 * words / sentences + 11.8 * syllables / words - 15.59


def sentences(text: str) -> int:
    """How many stretches of `text` with a word in them end at . ! ? … or an empty line, or at its end; at least 1."""
    return max(1, sum(WORD.search(part) is not None for part in SENTENCE_END.split(text)))
