"""What each arm spent: pairs, steps, tokens, judge calls, seconds, money.

A stage that an arm took over from an identical one of another arm counts with what the other spent on it: a budget says
what the arm costs by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath

from online_dpo.display.figures import finite, get
from online_dpo.report.data import ReportedRun, Row, mean_of
from online_dpo.store import RoundFolder


@dataclass(frozen=True, slots=True)
class Cost:
    """Sums over rounds of one arm and seed, or their means over seeds. `money`: in the currency of judges' prices."""

    pairs: float | None
    steps: float | None
    sampled: float | None
    """Tokens of candidates; those of the held-out answers are not in it."""
    trained: float | None
    judge_calls: float | None
    """Answers or pairs that the judges were asked about, from the cache or not."""
    seconds: float | None
    money: float | None


def costs(run: ReportedRun, arm: str, seed: int, until: int | None = None) -> Cost:
    """What `arm` spent at `seed`, over its closed rounds up to `until` (None: all)."""
    own = [row for row in run.rows if (row["arm"], row["seed"]) == (arm, seed)]
    rows = [row for row in own if until is None or row["round"] <= until]
    return Cost(
        pairs=_sum(rows, ("pairs", "kept")),
        steps=_sum(rows, ("train", "steps")),
        sampled=_sum(rows, ("sample", "tokens")),
        trained=_sum(rows, ("train", "tokens")),
        judge_calls=_ledger(run, rows, "asked"),
        seconds=sum(stage_seconds(run, row) for row in rows) if rows else None,
        money=_ledger(run, rows, "cost"),
    )


def mean_cost(found: Sequence[Cost]) -> Cost:
    """The mean over seeds, figure by figure."""
    return Cost(**{field.name: mean_of(getattr(one, field.name) for one in found) for field in fields(Cost)})


def stage_seconds(run: ReportedRun, row: Row) -> float:
    """Seconds of all stages of a closed round; those taken over count as they took where they were done."""
    folder = run.folder(row)
    return sum(
        _own_seconds(run, folder, stage, seconds)
        for stage, value in row["seconds"].items()
        if (seconds := finite(value)) is not None
    )


def _own_seconds(run: ReportedRun, folder: RoundFolder, stage: str, seconds: float) -> float:
    record = folder.done(stage)
    while record is not None and record.reused_from is not None:
        folder = _at(run, record.reused_from)
        record = folder.done(stage)
        seconds = seconds if record is None else record.seconds
    return seconds


def _at(run: ReportedRun, relative: str) -> RoundFolder:
    """The round folder at a path as the run's files name it."""
    return RoundFolder(run.store, run.store.root / PurePosixPath(relative), -1)


def _sum(rows: Sequence[Row], path: tuple[str, str]) -> float | None:
    values = [value for row in rows if (value := finite(get(row, *path))) is not None]
    return sum(values) if values else None


def _ledger(run: ReportedRun, rows: Sequence[Row], item: str) -> float | None:
    """The sum of `item` over the ledgers of the stages that ask a judge."""
    records = [run.folder(row).done(stage) for row in rows for stage in ("judge", "audit", "evaluate")]
    found = [finite(get(record.info, "ledger", item)) for record in records if record is not None]
    values = [value for value in found if value is not None]
    return sum(values) if values else None
