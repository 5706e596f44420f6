"""A comparison as tables for a terminal; all fit 100 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from online_dpo.compare.comparison import Comparison, CurvePoint, Difference, Measure, OverOptimisation
from online_dpo.compare.grid import INITIAL
from online_dpo.compare.sentences import NAMES, UNITS, p_value, percent, ways
from online_dpo.display import ABSENT, clean, interval, number
from online_dpo.measure import Interval

ACROSS = 5
"""Columns of the win matrix that stand side by side; more arms go on below."""


def comparison_tables(found: Comparison) -> Group:
    """The verdict, the differences it comes from, who beats whom, the rounds, the league, and what to be wary of."""
    parts: list[RenderableType] = [
        _line(f"verdict: {found.verdict}", "bold"),
        Text(),
        *(_differences(found, measure) for measure in dict.fromkeys(one.measure for one in found.differences)),
        *_win_matrix(found),
        _curves(found),
        _league(found),
        _selected(found),
        *(_line(f"over-optimised: {_flag(one)}", "bold") for one in found.over_optimised),
        *(_line(f"note: {warning}") for warning in found.warnings),
    ]
    return Group(*(row for part in parts for row in ((part, Text()) if isinstance(part, Table) else (part,))))


def _differences(found: Comparison, measure: Measure) -> Table:
    rows = [one for one in found.differences if one.measure == measure]
    corrected = "Holm p" if rows[0].family > 1 else "p"
    table = _table(
        f"Difference of {NAMES[measure]}" if measure in UNITS else f"{NAMES[measure].capitalize()} of the first",
        f"95 % intervals over {rows[0].prompts} prompts" + (f" × {rows[0].seeds} seeds" if rows[0].seeds > 1 else ""),
    )
    for header in ("arm", "against"):
        table.add_column(header, overflow="fold", max_width=16)
    if measure == "equal_kl":
        table.add_column("KL", justify="right")
    for header in ("a − b" if measure in UNITS else "a wins", corrected, "verdict"):
        table.add_column(header, justify="left" if header == "verdict" else "right", overflow="fold")
    table.add_column("would decide it", overflow="fold")
    for one in rows:
        table.add_row(*(Text(clean(cell)) for cell in _difference_cells(one)))
    return table


def _difference_cells(one: Difference) -> tuple[str, ...]:
    shown = interval(one.interval.as_dict(), sign=True) if one.measure in UNITS else percent(one.interval)
    return (
        one.a,
        one.b,
        *(() if one.kl is None else (number(one.kl, places=2),)),
        shown,
        p_value(one.p_corrected).removeprefix("= "),
        one.verdict,
        " or ".join(ways(one)) or ABSENT,
    )


def _win_matrix(found: Comparison) -> Iterator[Table]:
    """In blocks of `ACROSS` columns."""
    labels = list(found.win_matrix)
    for start in range(0, len(labels), ACROSS):
        across = labels[start : start + ACROSS]
        table = _table(
            "Win rate of the row against the column, in per cent",
            f"by {NAMES[found.measure]}, ties half" if not start else "",
        )
        table.add_column("arm", overflow="fold", max_width=16)
        for label in across:
            table.add_column(Text(clean(label)), justify="right", overflow="fold", max_width=16)
        for row in labels:
            cells = [_bare_percent(found.win_matrix[row].get(column)) for column in across]
            table.add_row(Text(clean(row)), *(Text(cell) for cell in cells))
        yield table


def _bare_percent(one: Interval | None) -> str:
    return ABSENT if one is None else percent(one).replace(" %", "")


def _curves(found: Comparison) -> Table:
    gold = any(point.gold is not None for point in found.curves)
    table = _table(
        "Rounds, over all seeds",
        f"win rate against the initial policy and the round before, in per cent, by {NAMES[found.measure]}",
    )
    table.add_column("arm", overflow="fold", max_width=16)
    table.add_column("round", justify="right")
    for header in ("reward", *(("gold",) if gold else ()), "win rate", "before", "KL"):
        table.add_column(header, justify="right", overflow="fold")
    for point in found.curves:
        table.add_row(*(Text(clean(cell)) for cell in _curve_cells(point, gold)))
    return table


def _curve_cells(point: CurvePoint, gold: bool) -> tuple[str, ...]:
    golden = (ABSENT if point.gold is None else interval(point.gold.as_dict()),) if gold else ()
    return (
        point.arm,
        number(point.round),
        interval(point.reward.as_dict()),
        *golden,
        _bare_percent(point.win_rate if point.round else None),
        _bare_percent(point.previous_win_rate),
        ABSENT if point.kl is None else number(point.kl.mean, places=2),
    )


def _league(found: Comparison) -> Table:
    table = _table(
        "League: strength in Elo points, the initial policy at 0",
        f"each round against each other, by {NAMES[found.measure]}",
    )
    table.add_column("arm", overflow="fold", max_width=24)
    table.add_column("round", justify="right")
    table.add_column("strength", justify="right")
    for one in found.league:
        strength = "0" if one.arm == INITIAL else interval(one.strength.as_dict(), sign=True, places=0)
        table.add_row(Text(clean(one.arm)), number(one.round), strength)
    return table


def _selected(found: Comparison) -> Text:
    """The rounds that stand for the arms, where these are not simply the last."""
    if found.select == "last":
        return Text()
    chosen = ", ".join(f"{one.arm} seed {one.seed}: round {one.round}" for one in found.selected)
    return _line(f"chosen rounds: {chosen}")


def _flag(one: OverOptimisation) -> str:
    fall, rise = (interval(change.as_dict()) for change in (one.gold_fall, one.proxy_rise))
    return (
        f"{one.arm}, seed {one.seed}: from round {one.peak} to round {one.last} the gold reward fell by {fall} while "
        f"the reward rose by {rise}"
    )


def _line(text: str, style: str = "") -> Text:
    return Text(clean(text), style=style)


def _table(title: str, caption: str = "") -> Table:
    return Table(
        title=Text(title, style="bold"),
        caption=Text(caption) if caption else None,
        title_justify="left",
        caption_justify="left",
        min_width=max(len(title), len(caption)),
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
