"""Seconds of a stage as a straight line in its work, fitted to what stages took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from online_dpo.planner.work import RoundWork, stage_units

APART = 1.5
"""A line has a start of its own where the largest work is so many times the smallest; else it goes through zero."""

Point = tuple[float, float]
"""Units of work, seconds."""


@dataclass(frozen=True, slots=True)
class Line:
    """`fixed` + `each` · units."""

    fixed: float
    each: float

    def at(self, units: float) -> float:
        """Seconds of so many units."""
        return self.fixed + self.each * units


def fit(points: Sequence[Point]) -> Line:
    """The line through `points` by least squares, neither part negative.

    Of equal work the median counts: a machine that does something else besides gives values that are far too large.
    Where all work is nearly the same, its seconds say nothing of a start, and the line goes through zero.
    """
    by_units: dict[float, list[float]] = {}
    for units, seconds in points:
        by_units.setdefault(units, []).append(seconds)
    some = [(units, median(values)) for units, values in by_units.items() if units]
    if not some:
        return Line(0.0, 0.0)
    if max(x for x, _ in some) < APART * min(x for x, _ in some):
        return Line(0.0, median(y / x for x, y in some))
    x0, y0 = mean(x for x, _ in some), mean(y for _, y in some)
    each = sum((x - x0) * (y - y0) for x, y in some) / sum((x - x0) ** 2 for x, _ in some)
    if each <= 0:
        return Line(y0, 0.0)
    if y0 < each * x0:
        return Line(0.0, sum(x * y for x, y in some) / sum(x * x for x, _ in some))
    return Line(y0 - each * x0, each)


@dataclass(frozen=True)
class MeasuredSpeeds:
    """A line for each stage that was measured, the initial policy's evaluation among them. `passes`: what a trained
    token costs, in forwards."""

    lines: Mapping[str, Line]
    passes: int

    def seconds(self, stage: str, work: RoundWork) -> float | None:
        """Of `stage` in a round like `work`; 0 where it has nothing to do, None where no such stage was measured."""
        units = stage_units(work, self.passes)[stage]
        if not units:
            return 0.0
        line = self.lines.get(stage)
        return None if line is None else line.at(units)


def fit_all(points: Mapping[str, Sequence[Point]]) -> dict[str, Line]:
    """A line for each stage that has points."""
    return {stage: fit(some) for stage, some in points.items() if some}
