"""From what a judge returned to an answer: a finite number with its details, or an abstention with its reason."""

from __future__ import annotations

import itertools
import math
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias

from online_dpo.errors import JudgeError, one_line
from online_dpo.judging.interface import Abstention, Opinion

Answer: TypeAlias = Opinion | Abstention
DECLINED = Abstention("judge declined")
LONGEST_REASON = 200
"""Characters."""
SCALE = 64
"""Sums are of 2^-64 of each number: 2^64 of the largest floats have a finite sum."""


def read_list(answer: Any, wanted: int, noun: str, asked: str) -> list[Any]:
    """`answer` as a list of `wanted` things; `JudgeError`, beginning with `asked`, where it is not that many."""
    if isinstance(answer, str | bytes | Mapping | AbstractSet) or not hasattr(answer, "__iter__"):
        raise JudgeError(f"{asked}: returned {type(answer).__name__} instead of {wanted} {noun}")
    counted = hasattr(answer, "__len__")
    values = list(answer if counted else itertools.islice(answer, wanted + 1))  # an iterator may have no end
    if len(values) != wanted:
        found = str(len(values)) if counted or len(values) < wanted else f"more than {wanted}"
        raise JudgeError(f"{asked}: returned {found} {noun} instead of {wanted}")
    return values


def read_score(value: Any) -> Answer:
    """`value` as a finite number with its details, or why it is none. Numbers of numpy and torch count; text never."""
    if value is None:
        return DECLINED
    if isinstance(value, Abstention):
        # One line, and short: reasons are counted and printed.
        return Abstention(" ".join(str(value.reason).split())[:LONGEST_REASON], value.passing)
    details: Mapping[str, Any] = {}
    if isinstance(value, Opinion):
        value, details = value.value, value.details
    number = _number(value)
    if isinstance(number, Abstention):
        return number
    if not math.isfinite(number):
        return Abstention(f"returned {number}")
    return _with_details(number, details) if details else Opinion(number)


def read_probability(value: Any) -> Answer:
    """`read_score` of a number in [0, 1]; any other number is an abstention."""
    answer = read_score(value)
    if isinstance(answer, Opinion) and not 0.0 <= answer.value <= 1.0:
        return Abstention("returned a number outside [0, 1]")
    return answer


class Means:
    """The mean of each numeric detail (true is 1) over the rows that have it, exact but for one rounding: the sums are
    kept as parts that do not overlap (Shewchuk 1997, as `math.fsum` does), so what is held does not grow with the rows.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[float]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row."""
        for key, value in row.items():
            if isinstance(value, int | float):
                self._counts[key] += 1
                _add_exactly(self._parts.setdefault(key, []), math.ldexp(float(value), -SCALE))

    def as_dict(self) -> dict[str, float]:
        """The means by key, in the order of first appearance."""
        return {key: math.ldexp(math.fsum(parts) / self._counts[key], SCALE) for key, parts in self._parts.items()}


def mean_numbers(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each numeric detail (true is 1) over the rows that have it."""
    means = Means()
    for row in rows:
        means.add(row)
    return means.as_dict()


def _add_exactly(parts: list[float], value: float) -> None:
    """Add `value` to the sum that `parts` are, smallest first."""
    kept = 0
    for part in parts:
        large, small = (value, part) if abs(value) >= abs(part) else (part, value)
        total = large + small
        rest = small - (total - large)
        if rest:
            parts[kept] = rest
            kept += 1
        value = total
    parts[kept:] = [value]


def _number(value: Any) -> float | Abstention:
    kind = type(value).__name__
    try:
        if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0:
            value = value.item()  # a numpy or torch scalar
        if not isinstance(value, numbers.Real):
            return Abstention(f"returned {kind}, not a number")
        return float(value)
    except OverflowError:
        return Abstention("returned a number too large for a float")
    except Exception as error:  # an object of the user's own may raise anything
        return Abstention(f"returned {kind}, which cannot be read: {one_line(error)}"[:LONGEST_REASON])


def _with_details(number: float, details: Any) -> Answer:
    """The details as JSON has them: what is read back from the cache is what was said. None for NaN and infinity."""
    if not isinstance(details, Mapping):
        return Abstention(f"returned details that are {type(details).__name__}, not a mapping")
    kept: dict[str, float | str | bool | None] = {}
    for key, value in details.items():
        if value is None or isinstance(value, str | bool):
            kept[str(key)] = value
            continue
        amount = _number(value)
        if isinstance(amount, Abstention):
            return Abstention(f"returned detail '{key}' that is neither number, text nor truth value"[:LONGEST_REASON])
        kept[str(key)] = amount if math.isfinite(amount) else None
    return Opinion(number, kept)
