"""Every arm by round, over all its seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from online_dpo.compare.comparison import CurvePoint
from online_dpo.compare.crossed import crossed
from online_dpo.compare.estimates import share, wins_of
from online_dpo.compare.grid import Column, Grid, Rounds, cells, complete
from online_dpo.compare.outcomes import Outcomes, Values
from online_dpo.measure import Interval


def curves(grid: Grid) -> tuple[CurvePoint, ...]:
    """One point for each arm and round, by arm."""
    return tuple(
        _point(label, index, [rounds for rounds in columns if index in rounds], grid.deciding)
        for label, columns in grid.arms.items()
        for index in sorted(set[int]().union(*columns))
    )


def _point(label: str, index: int, seeds: Sequence[Rounds], deciding: Column) -> CurvePoint:
    policies = [rounds[index] for rounds in seeds]
    return CurvePoint(
        arm=label,
        round=index,
        seeds=len(policies),
        reward=_level(policies, "reward"),
        gold=_where(policies, lambda one: one.gold, "gold"),
        win_rate=_won(policies, [rounds[0] for rounds in seeds], deciding),
        kl=_where(policies, lambda one: one.log_ratio, "log_ratio"),
        tokens=_level(policies, "tokens"),
        previous_win_rate=_against_previous(index, seeds, deciding),
    )


def _level(policies: Sequence[Outcomes], column: Column) -> Interval:
    (values,), _ = complete(cells(policies, column))
    return crossed(values).interval()


def _where(policies: Sequence[Outcomes], has: Callable[[Outcomes], Values | None], column: Column) -> Interval | None:
    """`_level` where all policies have the column."""
    return None if any(has(one) is None for one in policies) else _level(policies, column)


def _won(policies: Sequence[Outcomes], others: Sequence[Outcomes], column: Column) -> Interval:
    """The share of prompts on which `policies` beat `others` by the scores in `column`, seed by seed."""
    (ours, theirs), _ = complete(cells(policies, column), cells(others, column))
    if all(one is other for one, other in zip(policies, others, strict=True)):
        return Interval(0.5, 0.5, 0.5, ours.size)
    return share(wins_of(ours, theirs)).interval


def _against_previous(index: int, seeds: Sequence[Rounds], deciding: Column) -> Interval | None:
    there = [rounds for rounds in seeds if index - 1 in rounds]
    if not there:
        return None
    return _won([rounds[index] for rounds in there], [rounds[index - 1] for rounds in there], deciding)
