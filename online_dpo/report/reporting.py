"""From run folders to the report's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from online_dpo.compare import compare, contrasts_of, open_runs, read_runs
from online_dpo.compare.selecting import Select
from online_dpo.report.answers import MOST
from online_dpo.report.build import build_report
from online_dpo.report.controlled import against_initial
from online_dpo.report.data import read_runs as read_reported
from online_dpo.report.write import write_report


def report_runs(
    folders: Sequence[Path], out: Path, select: Select | None = None, most_answers: int = MOST
) -> tuple[str, list[Path]]:
    """Compare the runs in `folders` and write their report into `out`; the verdict, and the files.

    Raises what `compare.open_runs`, `compare.read_runs` and `compare.compare` raise.
    """
    stores, chosen = open_runs(folders, select)
    outcomes = read_runs(stores)
    comparison = compare(outcomes, chosen, contrasts_of(stores))
    report = build_report(read_reported(stores), comparison, against_initial(outcomes, chosen), most_answers)
    return comparison.verdict, write_report(report, comparison, out)
