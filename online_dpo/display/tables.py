"""What the tables of rounds share: rows are metrics.json of closed rounds, a column is a header and a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from online_dpo.display.figures import ABSENT, number
from online_dpo.display.text import clean

Column = tuple[str, Callable[[Mapping[str, Any]], str]]
Rows = Sequence[Mapping[str, Any]]


def spaced(*tables: Table) -> Group:
    """Tables with an empty line after each."""
    return Group(*(part for table in tables for part in (table, Text())))


def figure_table(
    title: str, rows: Rows, columns: Sequence[Column], caption: str | None = None, *, round_column: bool = True
) -> Table:
    """`rows` under `columns`, after the arm, the seed (where there are several) and the round."""
    names: list[Column] = []
    if len({row.get("seed") for row in rows}) > 1:
        names.append(("seed", lambda row: number(row.get("seed"))))
    if round_column:
        names.append(("round", lambda row: number(row.get("round"))))
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption) if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", overflow="fold", min_width=10, max_width=16)
    for header, _ in [*names, *columns]:
        if header == "dropped":
            table.add_column(header, overflow="fold", min_width=12, max_width=40)
        else:
            # On a terminal narrower than the table an interval wraps; nothing is ever cut off.
            table.add_column(header, justify="right", overflow="fold", min_width=min(5, len(header)))
    for row in rows:
        cells = [str(row.get("arm") or ABSENT), *(cell(row) for _, cell in [*names, *columns])]
        table.add_row(*(Text(clean(cell)) for cell in cells))
    return table


def mean(value: object) -> object:
    """A figure that may be a bare number or a `{mean, low, high}` mapping."""
    return value.get("mean") if isinstance(value, Mapping) else value
