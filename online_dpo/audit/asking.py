"""Asking a judge about pairs of answers for an audit: who is better, in which order, in how many seconds."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from online_dpo.audit.intervals import Floats
from online_dpo.judging import Abstention, Answer, AskedJudge, Compared, Item
from online_dpo.judging.ranking import Place, strengths

Advance = Callable[[int], None]
Row = TypeVar("Row")
Scores = list[list[float | None]]
CALLS_AT_ONCE = 8
"""Calls that each of the judge's threads makes between two steps of the progress bar."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What asking took. `ledger`: what the judge spent and what was asked of it and of its cache.

    `first_seconds`: the first question's, which may hold the loading of a model. `seconds_per_pair`: of the others, a
    pair in both orders where both are asked, answers from the cache not counted. None where nothing was asked.
    """

    seconds: float
    first_seconds: float
    seconds_per_pair: float | None
    ledger: dict[str, float]


@dataclass(frozen=True, slots=True)
class Said:
    """What one judge said of pairs of answers, one row a pair (shape (n,)), NaN where there is nothing.

    `difference`: score of first − second; of a judge that compares, P(first is better) − ½.
    `swapped`: 1 where the verdict went with the place and not with the answer; `to_first`: of these, 1 where it went
    to the first place. `scores`: one list an item, in its candidates' order (None: abstained).
    """

    difference: Floats
    swapped: Floats
    to_first: Floats
    reasons: dict[str, int]
    scores: Scores
    cost: Cost

    @property
    def judged(self) -> NDArray[np.bool_]:
        """Which pairs have a verdict."""
        return ~np.isnan(self.difference)

    @property
    def verdicts(self) -> NDArray[np.int64]:
        """0: the first is better; 1: a tie; 2: the second is better. Only where `judged`."""
        return (1 - np.sign(np.nan_to_num(self.difference))).astype(np.int64)


def pairs_of(items: Sequence[Item]) -> list[tuple[int, int, int]]:
    """(item, first, second) of all pairs of each item's candidates."""
    return [
        (number, i, j)
        for number, (_, candidates) in enumerate(items)
        for i, j in itertools.combinations(range(len(candidates)), 2)
    ]


def ask(asked: AskedJudge, items: Sequence[Item], advance: Advance | None = None) -> Said:
    """What the judge says of all pairs of each item's candidates; `advance` gets the number of pairs just done.

    A judge that compares is asked for every pair, whatever its schedule in a run.
    """
    return _compare(asked, items, advance) if asked.pairwise else _score(asked, items, advance)


def _score(asked: AskedJudge, items: Sequence[Item], advance: Advance | None) -> Said:
    rows, cost = _timed(asked, items, asked.scores, advance)
    both = [(rows[number][i], rows[number][j]) for number, i, j in pairs_of(items)]
    nothing = np.full(len(both), math.nan)
    return Said(
        np.array([_difference(first, second) for first, second in both], dtype=np.float64),
        nothing,
        nothing,
        _counted(first if isinstance(first, Abstention) else second for first, second in both),
        [[None if isinstance(answer, Abstention) else answer.value for answer in row] for row in rows],
        cost,
    )


def _compare(asked: AskedJudge, items: Sequence[Item], advance: Advance | None) -> Said:
    """Each pair is an item of two candidates: of two there is one comparison, in every schedule."""
    pairs = pairs_of(items)
    couples: list[Item] = [(items[number][0], [items[number][1][i], items[number][1][j]]) for number, i, j in pairs]
    rows, cost = _timed(asked, couples, asked.comparisons, advance)
    compared = [row[0] for row in rows]
    outcomes = [asked.outcome(row) for row in compared]
    swapped = [row.swapped() for row in compared]
    found: list[dict[Place, float | None]] = [{} for _ in items]
    for (number, i, j), outcome in zip(pairs, outcomes, strict=True):
        found[number][i, j] = None if isinstance(outcome, Abstention) else outcome
    return Said(
        np.array([math.nan if isinstance(p, Abstention) else p - 0.5 for p in outcomes], dtype=np.float64),
        np.array([math.nan if flip is None else float(flip) for flip in swapped], dtype=np.float64),
        np.array([_to_first(row) if flip else math.nan for row, flip in zip(compared, swapped, strict=True)]),
        _counted(outcomes),
        [
            strengths(len(candidates), row, asked.asking.comparing)
            for (_, candidates), row in zip(items, found, strict=True)
        ],
        cost,
    )


def _timed(
    asked: AskedJudge, items: Sequence[Item], call: Callable[[Sequence[Item]], list[Row]], advance: Advance | None
) -> tuple[list[Row], Cost]:
    """`call` on all items, the first one alone, and what it took."""
    rows: list[Row] = []
    clock: list[float] = []
    spent: list[Counter[str]] = []
    asked.take_ledger()  # what was spent before is not the audit's
    for chunk in _chunks(items, asked):
        began = time.perf_counter()
        rows += call(chunk)
        clock.append(time.perf_counter() - began)
        spent.append(Counter(asked.take_ledger()))
        if advance is not None:
            advance(len(pairs_of(chunk)))
    ledger = sum(spent, Counter[str]())
    later = sum(spent[1:], Counter[str]())
    fresh, stored = later["asked"], later["cached"]
    pairs = len(pairs_of(items[1:])) * fresh / (fresh + stored) if fresh else 0.0
    return rows, Cost(sum(clock), sum(clock[:1]), sum(clock[1:]) / pairs if pairs else None, dict(ledger))


def _chunks(items: Sequence[Item], asked: AskedJudge) -> Iterator[Sequence[Item]]:
    """The first item alone, then as many at once as keep the judge busy; all at once for a judge that wants all."""
    if asked.batch is None:
        yield items
        return
    if items:
        yield items[:1]
    step = asked.batch * asked.concurrent * CALLS_AT_ONCE
    for start in range(1, len(items), step):
        yield items[start : start + step]


def _difference(first: Answer, second: Answer) -> float:
    if isinstance(first, Abstention) or isinstance(second, Abstention):
        return math.nan
    return first.value - second.value


def _to_first(compared: Compared) -> float:
    """1 where the judge prefers whatever stands first, 0 where it prefers whatever stands second."""
    return math.nan if isinstance(compared.there, Abstention) else float(compared.there.value > 0.5)


def _counted(answers: Iterator[Answer] | Sequence[float | Abstention]) -> dict[str, int]:
    """How many abstained for each reason, the most frequent first."""
    return dict(Counter(answer.reason for answer in answers if isinstance(answer, Abstention)).most_common())
