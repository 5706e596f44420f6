"""What was measured of the judge itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group

from online_dpo.display.figures import ABSENT, get, interval, number, share
from online_dpo.display.tables import Column, Rows, figure_table, spaced


def judge_table(metrics: Rows) -> Group:
    """What was measured of the judge itself in each round, on a sample of its prompts; empty where nothing was."""
    audited = [row for row in metrics if get(row, "audit") is not None]
    if not audited:
        return Group()
    columns: list[Column] = [
        ("prompts", lambda row: number(get(row, "audit", "prompts"))),
        ("ties", lambda row: share(get(row, "audit", "ties", "mean"))),
        ("flips", lambda row: share(get(row, "audit", "flips"))),
        ("cycles", lambda row: share(get(row, "audit", "intransitive", "mean"))),
        ("with length", lambda row: interval(get(row, "audit", "length_correlation"), places=2)),
        ("longest first", _longest_first),
        ("κ", lambda row: number(get(row, "audit", "kappa", "mean"), places=2)),
    ]
    note = (
        "flips: verdicts that went with the place; with length: rank correlation of score and length within prompts; "
        "longest first: how often, and by chance"
    )
    return spaced(figure_table("The judge", audited, columns, note))


def _longest_first(row: Mapping[str, Any]) -> str:
    found = share(get(row, "audit", "longest_first", "mean"))
    chance = share(get(row, "audit", "longest_first_by_chance"))
    return found if found == ABSENT else f"{found} ({chance})"
