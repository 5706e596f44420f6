"""Reward against KL: what each arm gains for how far it goes."""

from __future__ import annotations

from typing import Literal

from online_dpo.compare import CurvePoint
from online_dpo.measure import Interval
from online_dpo.report.charts import Spot, frontier_chart
from online_dpo.report.document import Cell, Plot, Section, Table, bounds, count, words
from online_dpo.report.subject import Subject

Judged = Literal["reward", "gold"]


def frontier(subject: Subject) -> Section:
    """One frontier a judge, and the points as a table."""
    proxy = _chart(subject, "reward", "Held-out judge", "reward")
    gold = _chart(subject, "gold", "Gold judge", "gold reward")
    plots = tuple(plot for plot in (proxy, gold) if plot is not None)
    text: tuple[str, ...] = (
        "Each point is an arm after a round, the last one numbered. An arm whose points lie above another's at the "
        "same KL gains more for the same distance.",
    )
    if not plots:
        text = ("No KL was measured: answers are samples of the policy itself only at temperature 1 and top_p 1.",)
    elif gold is None:
        text = (*text, "There is no gold judge: only the held-out judge's reward can be shown.")
    return Section("frontier", "Reward–KL frontier", text, plots=plots, tables=(_table(subject),))


def _chart(subject: Subject, judged: Judged, title: str, axis: str) -> Plot | None:
    paths = {
        arm: [
            Spot(point.kl or NO_MOVE, value, str(point.round))
            for point in points
            if (value := getattr(point, judged)) is not None and (point.kl is not None or point.round == 0)
        ]
        for arm, points in subject.curves.items()
    }
    moved = {arm: spots for arm, spots in paths.items() if any(spot.x is not NO_MOVE for spot in spots)}
    return frontier_chart(f"frontier_{judged}", title, axis, moved, subject.look)


NO_MOVE = Interval(0.0, 0.0, 0.0, 0)
"""The initial policy's KL to itself."""


def _table(subject: Subject) -> Table:
    rows = tuple(_row(point) for points in subject.curves.values() for point in points)
    columns = ("arm", "round", "seeds", "KL", "reward", "gold reward")
    note = "KL: KL(π‖π₀) of fresh answers, nats an answer; brackets: 95 % intervals over prompts and seeds"
    return Table("frontier", "Reward and KL by round", columns, rows, note, folded=True)


def _row(point: CurvePoint) -> tuple[Cell, ...]:
    return (
        words(point.arm),
        count(point.round),
        count(point.seeds),
        bounds(point.kl),
        bounds(point.reward),
        bounds(point.gold),
    )
