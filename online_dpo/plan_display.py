"""The plan as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from online_dpo.display import clean
from online_dpo.plan import ArmPlan


def plan_tables(plans: Sequence[ArmPlan], differing: Mapping[str, Mapping[str, Any]], seeds: int) -> Group:
    """What each arm would do at most, and the settings in which the arms differ."""
    return Group(_budgets(plans, seeds), _losses(plans), Text(), _differences(plans, differing), Text())


def warning_lines(warnings: Sequence[str]) -> Text:
    """What confounds the comparison, a line each; empty where nothing does."""
    return Text("\n".join(f"warning: {clean(line)}" for line in warnings), style="yellow")


def _budgets(plans: Sequence[ArmPlan], seeds: int) -> Table:
    table = _table(f"Plan: at most, for each of {seeds} seed(s), over all rounds")
    for column in ("arm", "rounds", "answers", "judged", "pairs", "steps", "sampled tokens", "disk"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for plan in plans:
        counts = (plan.rounds, plan.candidates, plan.judged, plan.pairs, plan.steps, plan.sampled_tokens)
        table.add_row(Text(plan.arm), *(f"{count:,}" for count in counts), decimal(plan.disk))
    return table


def _losses(plans: Sequence[ArmPlan]) -> Text:
    """What each arm minimises: the same name with summed or with averaged log-probs is another loss."""
    if len({plan.loss for plan in plans}) == 1:
        return Text(f"loss: {clean(plans[0].loss)}")
    return Text("\n".join(f"loss of {plan.arm}: {clean(plan.loss)}" for plan in plans))


def _differences(plans: Sequence[ArmPlan], differing: Mapping[str, Mapping[str, Any]]) -> Table | Text:
    if len(plans) < 2:
        return Text("one arm: nothing is compared")
    if not differing:
        return Text("the arms do not differ in any setting")
    table = _table("The arms differ in")
    table.add_column("key")
    for plan in plans:
        table.add_column(plan.arm, overflow="fold")
    for key, values in differing.items():
        table.add_row(Text(key), *(Text(clean(values[plan.arm])) for plan in plans))
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
