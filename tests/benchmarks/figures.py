"""One figure as one JSON line, and all of them as a Markdown table. Imports nothing heavy."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Better = Literal["less", "more"]
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Figure:
    """Medians of `runs` runs. `ratio` says how many times better ours is (above 1: better); None: not measured."""

    figure: str
    ours: float | None
    theirs: float | None
    ratio: float | None
    unit: str
    runs: int

    def line(self) -> str:
        """The figure as JSON, on one line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def row(self) -> str:
        """The figure as a row of `Report.table`."""
        cells = [NOT_MEASURED if value is None else f"{value:g}" for value in (self.ours, self.theirs, self.ratio)]
        return f"| {self.figure} | {cells[0]} | {cells[1]} | {cells[2]} | {self.unit} | {self.runs} |"


def compare(figure: str, ours: Sequence[float], theirs: Sequence[float], unit: str, better: Better) -> Figure:
    """The medians of both sides and their ratio; an empty side was not measured.

    Raises `ValueError` where neither side was.
    """
    if not ours and not theirs:
        raise ValueError(f"{figure}: nothing was measured")
    mine, other = (statistics.median(values) if values else None for values in (ours, theirs))
    ratio = None
    if mine is not None and other is not None and mine > 0 and other > 0:
        ratio = _short(mine / other if better == "more" else other / mine)
    runs = min(len(values) for values in (ours, theirs) if values)
    return Figure(
        figure, None if mine is None else _short(mine), None if other is None else _short(other), ratio, unit, runs
    )


class Report:
    """Prints each figure when it is known, and keeps it for the table."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def add(self, figure: str, ours: Sequence[float], theirs: Sequence[float], unit: str, better: Better) -> Figure:
        """See `compare`."""
        found = compare(figure, ours, theirs, unit, better)
        self.figures.append(found)
        print(found.line(), flush=True)
        return found

    def table(self) -> str:
        """All figures, in the order in which they were added."""
        head = ["| figure | ours | theirs | times better | unit | runs |", "| --- | --- | --- | --- | --- | --- |"]
        return "\n".join([*head, *(figure.row() for figure in self.figures)])


def _short(value: float) -> float:
    return float(f"{value:.4g}")
