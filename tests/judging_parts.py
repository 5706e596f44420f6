"""What the tests of judging share: prompts, answers, and judges that say what a test tells them to."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from online_dpo.config import ComparingSpec, JudgeSpec
from online_dpo.judging import (
    AskedJudge,
    Asking,
    Item,
    PairwiseJudge,
    PointwiseJudge,
    Score,
    judge_name,
)
from online_dpo.types import Candidate, Message, Prompt


def prompt(name: str) -> Prompt:
    return Prompt(name, (Message("user", f"say {name}"),), (1, 2))


def answer(prompt_id: str, index: int, text: str = "x") -> Candidate:
    return Candidate(prompt_id, index, text, (3,) * (index + 1), (-0.5,) * (index + 1), "stop", index)


def item(name: str, n: int = 2) -> Item:
    """Prompt `name` with `n` different answers."""
    return prompt(name), [answer(name, index) for index in range(n)]


def spec(use: str, **params: Any) -> JudgeSpec:
    return JudgeSpec.model_validate({"use": use, **params})


PROMPTS = {name: prompt(name) for name in ("p", "q", "r")}


class Answers(PointwiseJudge):
    """Returns prepared answers by prompt id; an exception among them is raised."""

    def __init__(self, rows: dict[str, Any]) -> None:
        self.rows = rows

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
        row = self.rows[prompt.id]
        if isinstance(row, BaseException):
            raise row
        return row  # type: ignore[no-any-return]


class Table(PairwiseJudge):
    """prefer(first, second) from a table of index pairs."""

    def __init__(self, table: dict[tuple[int, int], Any]) -> None:
        self.table = table

    def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
        value = self.table[first.index, second.index]
        if isinstance(value, BaseException):
            raise value
        return value  # type: ignore[no-any-return]


class Batched(PointwiseJudge):
    """Scores each candidate by its index; a batch that holds `poison` raises."""

    batch_prompts: int | None = 2

    def __init__(self, poison: str = "") -> None:
        self.poison = poison
        self.calls: list[list[str]] = []

    def score_batch(self, items: Sequence[Item]) -> list[Sequence[Score]]:
        self.calls.append([prompt.id for prompt, _ in items])
        if self.poison in self.calls[-1]:
            raise RuntimeError("out of memory")
        return [[float(c.index) for c in candidates] for _, candidates in items]


def by_mean_win(judge: PairwiseJudge) -> AskedJudge:
    """`judge` with mean probabilities of winning as scores: what both orders give, to be had by hand."""
    return AskedJudge(judge, judge_name(judge), asking=Asking(comparing=ComparingSpec(rank_by="mean_win")))


@contextmanager
def forgotten_imports() -> Iterator[None]:
    """Whatever is imported or put on sys.path inside is gone after it."""
    modules, path = dict(sys.modules), list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - set(modules):
            del sys.modules[name]
        sys.modules.update(modules)


USER_MODULE = """
from online_dpo.judging import PointwiseJudge

class Vowels(PointwiseJudge):
    def __init__(self, weight, offset=0.0):
        self.weight = weight
        self.offset = offset
    def score(self, prompt, candidates):
        return [self.weight * sum(c.text.count(v) for v in "aeiou") + self.offset for c in candidates]

class Duck:
    def score(self, prompt, candidates):
        return [1.0 for _ in candidates]

class DuckPair:
    def prefer(self, prompt, first, second):
        return 0.75

class Both(Duck, DuckPair):
    pass

class Empty(PointwiseJudge):
    pass

class EmptyPair(__import__("online_dpo.judging").judging.PairwiseJudge):
    pass

class Neither:
    pass

class Angry(Duck):
    def __init__(self):
        raise RuntimeError("no\\nlicence")

def function(prompt, answer):
    return 1.0

number = 3
"""
"""A user's module of judges, good ones and others."""
