"""Whether an arm wins by writing more: win rates beside lengths, and what is left of them at equal length."""

from __future__ import annotations

import math
from dataclasses import replace

from online_dpo.compare import INITIAL
from online_dpo.measure import Interval
from online_dpo.report.charts import Spot, plane_chart
from online_dpo.report.document import Cell, Plot, Section, Table, bounds, figure, percent, words
from online_dpo.report.sections.curves import in_per_cent
from online_dpo.report.subject import Subject


def lengths(subject: Subject) -> Section:
    """Length against win rate, plain and length-controlled: against the initial policy, and arm against arm."""
    plot = _chart(subject)
    own = Table(
        "lengths",
        "Win rate against the initial policy and length of answers",
        ("arm", "round", "tokens, round 0", "tokens", "wins", "wins at equal length", "difference"),
        tuple(_row(subject, arm) for arm in subject.curves),
        "at the arm's selected round (length: at the last one); difference: percentage points that length accounts for",
    )
    tables = [own]
    pairs = _pairs(subject)
    if pairs:
        columns = ("a", "b", "a wins", "a wins at equal length", "difference")
        tables.append(Table("length_controlled", "Arm against arm, plain and at equal length", columns, pairs))
    text = (
        "Judges tend to prefer longer answers: a win rate that goes when length is held equal was bought by length. In "
        "the figure a filled mark is an arm's win rate, the hollow one below or above it what is left at equal length.",
    )
    plots = () if plot is None else (plot,)
    return Section("lengths", "Length and win rate", text, plots=plots, tables=tuple(tables))


def _chart(subject: Subject) -> Plot | None:
    spots = {}
    for arm, points in subject.curves.items():
        wins = [(subject.against_initial(arm), ""), (subject.controlled.get(arm), "at equal length")]
        # The two stand above each other: one bar of the length is enough.
        tokens = [points[-1].tokens, replace(points[-1].tokens, low=math.nan, high=math.nan)]
        spots[arm] = [
            Spot(x, in_per_cent(found), note)
            for x, (found, note) in zip(tokens, wins, strict=True)
            if found is not None
        ]
    names = ("tokens an answer", "win rate, %")
    return plane_chart("length_win_rate", "Length and win rate", names, spots, subject.look, 50.0)


def _row(subject: Subject, arm: str) -> tuple[Cell, ...]:
    first, last = subject.curves[arm][0], subject.curves[arm][-1]
    plain, controlled = subject.against_initial(arm), subject.controlled.get(arm)
    return (
        words(arm),
        words(subject.selected(arm)),
        bounds(first.tokens if first.round == 0 else None),
        bounds(last.tokens),
        percent(plain),
        percent(controlled),
        _gap(plain, controlled),
    )


def _gap(plain: Interval | None, controlled: Interval | None) -> Cell:
    """What length accounts for, in percentage points."""
    if plain is None or controlled is None or not math.isfinite(plain.mean - controlled.mean):
        return bounds(None)
    gap = 100 * (plain.mean - controlled.mean)
    return figure(gap, places=1, sign=True)


def _pairs(subject: Subject) -> tuple[tuple[Cell, ...], ...]:
    found = {(one.measure, one.a, one.b): one.interval for one in subject.comparison.differences if one.b != INITIAL}
    return tuple(
        (words(a), words(b), percent(plain), percent(controlled), _gap(plain, controlled))
        for (measure, a, b), controlled in found.items()
        if measure == "length_controlled" and (plain := found.get(("win_rate", a, b))) is not None
    )
