"""Running what is left of a run, and its tables: what `run`, `resume` and `fork` end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from online_dpo.errors import LeftTraining
from online_dpo.leaving import INTERRUPTED, LEAVING, leave_at_once

if TYPE_CHECKING:
    from rich.console import Console

    from online_dpo.config import Experiment
    from online_dpo.dataset_rows import DatasetRows
    from online_dpo.models import ResolvedModel
    from online_dpo.store import RunStore


def go(store: RunStore, model: ResolvedModel, quiet: bool, datasets: dict[str, DatasetRows] | None = None) -> None:
    """Run what is left, print the tables, and exit with 1 when training stopped an arm."""
    from online_dpo.display import clean, make_console
    from online_dpo.runs import finished

    console = make_console()
    stopped: dict[str, str] = {}
    if finished(store):
        console.print("this run is finished; nothing to do", markup=False)
    else:
        stopped = _until_told(store, model, quiet, datasets)
    print_tables(store, store.experiment, console)
    for arm, reason in stopped.items():
        console.print(clean(f"{arm} stopped early: {reason}"), markup=False, soft_wrap=True)
    if stopped:
        raise typer.Exit(1)


def _until_told(
    store: RunStore, model: ResolvedModel, quiet: bool, datasets: dict[str, DatasetRows] | None
) -> dict[str, str]:
    """`runs.execute`, that a signal ends with one line and the exit status that shells give it."""
    from online_dpo.disk_full import told_when_full
    from online_dpo.display import clean, make_console, make_progress
    from online_dpo.display.progress_file import RecordedProgress
    from online_dpo.runs import execute

    line = clean(f"stopped; go on with: online-dpo resume {store.root}")
    with LEAVING.heeded(lambda status: leave_at_once(line, status)):
        try:
            shown = make_progress(quiet, make_console(stderr=True))
            with told_when_full(store.root), RecordedProgress(shown, store.root) as progress:
                return execute(store, model, progress, datasets)
        except (KeyboardInterrupt, Exception) as error:
            # What breaks while everything is taken down belongs to the leaving.
            if LEAVING.status is None and not isinstance(error, KeyboardInterrupt):
                raise
            kept = f"{error}; " if isinstance(error, LeftTraining) else ""
            make_console().print(clean(f"{kept}{line}"), markup=False, soft_wrap=True)
            raise typer.Exit(LEAVING.status or INTERRUPTED) from None


def print_tables(store: RunStore, experiment: Experiment, console: Console) -> None:
    """The tables of a run, finished or not."""
    from online_dpo.display import (
        budget_table,
        clean,
        judge_table,
        off_policy_table,
        round_table,
        sample_answers,
        stage_table,
    )
    from online_dpo.loop import collect_metrics
    from online_dpo.runs import spent_by_judges
    from online_dpo.showcase import before_and_after

    metrics = collect_metrics(store, experiment)
    if metrics:
        for table in (round_table, stage_table, off_policy_table, judge_table, budget_table):
            console.print(table(metrics))
        console.print(sample_answers(before_and_after(store, experiment)))
    spent = spent_by_judges(store)
    if spent:
        amounts = ", ".join(f"{item.replace('_', ' ')} {amount:g}" for item, amount in sorted(spent.items()))
        console.print(clean(f"judges spent: {amounts}"), markup=False, soft_wrap=True)
    _print_verdict(store, console)
    console.print(clean(f"run folder: {store.root}"), markup=False, soft_wrap=True)


def _print_verdict(store: RunStore, console: Console) -> None:
    """Which arm is better, where there are several, and what confounds that."""
    if len(store.experiment.arms) < 2:
        return
    from online_dpo.compare import closing_lines
    from online_dpo.confounding import confounded_settings
    from online_dpo.display import clean
    from online_dpo.plan_display import warning_lines

    lines = closing_lines(store)
    for line in lines:
        console.print(clean(line), markup=False)
    if lines and (warnings := confounded_settings(store.experiment)):
        console.print(warning_lines(warnings))
