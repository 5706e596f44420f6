"""What a point of win rate cost each arm."""

from __future__ import annotations

import math

from online_dpo.display import ABSENT
from online_dpo.measure import Interval
from online_dpo.report.charts import Spot, plane_chart
from online_dpo.report.costs import Cost, costs, mean_cost
from online_dpo.report.document import Cell, Section, Table, bounds, words
from online_dpo.report.sections.curves import in_per_cent
from online_dpo.report.subject import Subject

COLUMNS = ("arm", "round", "points", "seconds", "sampled tokens", "judge calls", "money")
NOTE = (
    "points: percentage points of win rate above 50 % against the initial policy at the arm's selected round; the "
    "other columns: spent up to that round for one point, mean over seeds; brackets: by the win rate's interval alone; "
    "no bound: the interval reaches down to no gain"
)


def prices(subject: Subject) -> Section:
    """Points of win rate above the initial policy's 50 %, and what one of them cost up to the round that has them."""
    rows, spots = [], {}
    for run in subject.runs:
        for arm in run.experiment.arms:
            label = run.named(arm)
            rate = subject.against_initial(label)
            if rate is None:
                continue
            cost = mean_cost([costs(run, arm, seed, until) for seed, until in subject.selected_rounds(label)])
            rows.append(_row(label, subject.selected(label), rate, cost))
            if cost.seconds:
                minutes = Interval(cost.seconds / 60, math.nan, math.nan, 1)
                spots[label] = [Spot(minutes, in_per_cent(rate))]
    names = ("minutes for one seed", "win rate, %")
    plot = plane_chart("cost", "Win rate and time", names, spots, subject.look, 50.0)
    table = Table("prices", "What one point of win rate cost", COLUMNS, tuple(rows), NOTE)
    plots = () if plot is None else (plot,)
    return Section("prices", "Cost per point of win rate", plots=plots, tables=(table,) if rows else ())


def _row(arm: str, selected: str, rate: Interval, cost: Cost) -> tuple[Cell, ...]:
    points = Interval(100 * (rate.mean - 0.5), 100 * (rate.low - 0.5), 100 * (rate.high - 0.5), rate.n)
    each = (cost.seconds, cost.sampled, cost.judge_calls, cost.money)
    prices = (_price(amount, points) for amount in each)
    return (words(arm), words(selected), bounds(points, places=1, sign=True), *prices)


def _price(amount: float | None, points: Interval) -> Cell:
    """`amount` for each of `points`; there is no price where nothing was gained."""
    if amount is None:
        return Cell(ABSENT, None, figure=True)
    if not points.mean > 0:
        return Cell("no gain", None, figure=True)
    mean = amount / points.mean
    if not math.isfinite(points.high):
        return Cell(_short(mean), {"mean": mean, "low": None, "high": None}, figure=True)
    low, high = amount / points.high, amount / points.low if points.low > 0 else None
    upper = "no bound" if high is None else _short(high)
    return Cell(f"{_short(mean)} [{_short(low)}, {upper}]", {"mean": mean, "low": low, "high": high}, figure=True)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
