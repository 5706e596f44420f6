"""Judges of `word_model`'s answers: one that training can exploit, and one that it cannot as easily."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.judging import PointwiseJudge
from online_dpo.types import Candidate, Prompt

GOOD = frozenset({"wonderful", "happy", "bright", "kind", "lovely", "warm"})
BAD = frozenset({"sad", "dark", "awful", "broken", "lonely", "cold"})


class Cheerful(PointwiseJudge):
    """Good words less bad ones; abstains on an empty answer."""

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float | None]:
        return [_cheer(candidate.text.split()) for candidate in candidates]


class Plain(PointwiseJudge):
    """The same, but a word said twice is one too many."""

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float | None]:
        found: list[float | None] = []
        for candidate in candidates:
            words = candidate.text.split()
            cheer = _cheer(words)
            found.append(None if cheer is None else cheer - 0.5 * (len(words) - len(set(words))))
        return found


def _cheer(words: Sequence[str]) -> float | None:
    return float(sum(word in GOOD for word in words) - sum(word in BAD for word in words)) if words else None
