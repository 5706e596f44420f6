"""Figures of several seeds as one, where only each seed's own figure is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from online_dpo.display.figures import finite
from online_dpo.measure import Interval


def spread(values: Sequence[Any], scale: float = 1.0) -> Interval | None:
    """The mean of the seeds' figures (numbers, or {mean, low, high}), from the lowest to the highest of them.

    One seed alone: its own interval, where it has one. None without a figure.
    """
    means = [
        number
        for value in values
        if (number := finite(value["mean"] if isinstance(value, Mapping) else value)) is not None
    ]
    if not means:
        return None
    low, high = min(means), max(means)
    if len(means) == 1 and isinstance(values[0], Mapping):
        low, high = (_bound(values[0], key, means[0]) for key in ("low", "high"))
    return Interval(scale * sum(means) / len(means), scale * low, scale * high, len(means))


def _bound(value: Mapping[str, Any], key: str, mean: float) -> float:
    found = finite(value.get(key))
    return mean if found is None else found
