"""Reward, gold reward, win rate, KL and length, round by round."""

from __future__ import annotations

from collections.abc import Callable

from online_dpo.compare import CurvePoint
from online_dpo.compare.sentences import NAMES
from online_dpo.measure import Interval
from online_dpo.report.charts import Line, line_chart
from online_dpo.report.document import Cell, Plot, Section, Table, bounds, count, percent, words
from online_dpo.report.subject import Subject

Value = Callable[[CurvePoint], Interval | None]


def curves(subject: Subject) -> Section:
    """One chart a figure, and all points as a table."""
    charts: list[tuple[str, str, str, Value, float | None]] = [
        ("reward", "Reward, held-out judge", "reward", lambda point: point.reward, None),
        ("gold", "Reward, gold judge", "gold reward", lambda point: point.gold, None),
        ("win_rate", "Wins against the initial policy", "win rate, %", _win_rate, 50.0),
        ("kl", "KL to the initial policy", "nats an answer", lambda point: point.kl, 0.0),
        ("tokens", "Length of answers", "tokens", lambda point: point.tokens, None),
    ]
    found = (_chart(subject, *chart) for chart in charts)
    rows = tuple(_row(point) for points in subject.curves.values() for point in points)
    columns = ("arm", "round", "seeds", "reward", "gold reward", "wins", "KL", "tokens")
    by = NAMES[subject.comparison.measure]
    note = (
        "brackets: 95 % intervals over prompts and, where there are several, seeds; wins: against the initial policy, "
        f"by {by}"
    )
    table = Table("curves", "All figures by round", columns, rows, note, folded=True)
    text = ("Bands: 95 % intervals over prompts and, where there are several, seeds.",)
    return Section("curves", "Curves by round", text, plots=tuple(plot for plot in found if plot), tables=(table,))


def _chart(subject: Subject, name: str, title: str, axis: str, value: Value, level: float | None) -> Plot | None:
    lines = [
        Line(arm, arm, [(point.round, found) for point in points if (found := value(point)) is not None])
        for arm, points in subject.curves.items()
    ]
    return line_chart(f"curve_{name}", title, axis, lines, subject.look, level)


def _win_rate(point: CurvePoint) -> Interval:
    return in_per_cent(point.win_rate)


def in_per_cent(share: Interval) -> Interval:
    """A share as per cent."""
    return Interval(100 * share.mean, 100 * share.low, 100 * share.high, share.n)


def _row(point: CurvePoint) -> tuple[Cell, ...]:
    return (
        words(point.arm),
        count(point.round),
        count(point.seeds),
        bounds(point.reward),
        bounds(point.gold),
        percent(point.win_rate),
        bounds(point.kl),
        bounds(point.tokens),
    )
