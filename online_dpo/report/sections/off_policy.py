"""How far the policy under training was from the policy that its pairs came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from online_dpo.display.figures import get
from online_dpo.measure import Interval
from online_dpo.report.charts import Line, line_chart
from online_dpo.report.data import mean_of, over_seeds
from online_dpo.report.document import Cell, Plot, Section, Table, bounds, count, figure, percent, words
from online_dpo.report.seeds import spread
from online_dpo.report.subject import Subject

Chart = tuple[str, str, str, tuple[str, ...], float, float | None]
"""Name, title, axis, where it stands in `off_policy`, what it is multiplied by, a level to compare with."""

CHARTS: tuple[Chart, ...] = (
    ("kl_token", "KL(source‖policy) at the round's end", "nats a token", ("end", "kl_token_k3"), 1.0, 0.0),
    ("ess", "Effective sample size at the round's end", "% of the answers", ("end", "ess"), 100.0, 100.0),
    ("coverage", "Answers in the policy's lowest 5 %", "% of the answers", ("end", "coverage"), 100.0, 5.0),
    ("staleness", "Staleness", "optimiser steps", ("staleness",), 1.0, None),
)
FIGURES = ("kl_token", "kl_token_k3", "ess", "ess_token", "coverage")
SHARES = ("ess", "ess_token", "coverage")


def off_policy(subject: Subject) -> Section:
    """Charts of the end of each round, and a table of its start and end."""
    plots = tuple(plot for chart in CHARTS if (plot := _chart(subject, chart)) is not None)
    table = _table(subject)
    text: tuple[str, ...] = (
        "Measured on the pairs that each round trained on, before its first step and after its last. Effective sample "
        "size: (Σw)²/(nΣw²) with w = π/μ of whole answers; 100 % is on-policy. Coverage: the share of answers whose "
        "mean log-prob lies below the 5th percentile of the policy's own answers; 5 % is on-policy. Bands: the lowest "
        "and the highest seed.",
    )
    if not table.rows:
        text = ("Not measured: evaluation.off_policy is 0, or no round is closed.",)
    return Section("off_policy", "Off-policyness by round", text, plots=plots, tables=(table,) if table.rows else ())


def _chart(subject: Subject, chart: Chart) -> Plot | None:
    name, title, axis, path, scale, level = chart
    found = over_seeds(subject.runs, "off_policy", *path)
    lines = [Line(arm, arm, curve(found.get(arm, {}), scale)) for arm in subject.arms]
    return line_chart(f"off_policy_{name}", title, axis, lines, subject.look, level)


def curve(rounds: dict[int, list[Any]], scale: float = 1.0) -> list[tuple[int, Interval]]:
    """Round -> values of the seeds, as a curve with the seeds' spread as its band."""
    pairs = ((number, spread(values, scale)) for number, values in sorted(rounds.items()))
    return [(number, found) for number, found in pairs if found is not None]


def _table(subject: Subject) -> Table:
    measured = over_seeds(subject.runs, "off_policy")
    rows = [
        _row(arm, number, values) for arm in subject.arms for number, values in sorted(measured.get(arm, {}).items())
    ]
    heads = [f"{name}, {when}" for name in ("KL a token", "KL (k3)", "ESS", "ESS a token", "coverage") for when in WHEN]
    columns = ("arm", "round", "seeds", "answers", "staleness", *heads, "engine gap", "accuracy")
    note = (
        "means over seeds, with the lowest and the highest seed (of one seed, its 95 % interval over prompts); start, "
        "end: before the round's first step and after its last; engine gap: KL (k3) between engine and learner at the "
        "same weights, the zero point; accuracy: share of pairs whose chosen answer gained more than the rejected one"
    )
    return Table("off_policy", "Off-policyness by round", columns, tuple(rows), note, folded=True)


WHEN = ("start", "end")


def _row(arm: str, number: int, values: Sequence[Any]) -> tuple[Cell, ...]:
    def over(*path: str) -> Interval | None:
        return spread([found for value in values if (found := get(value, *path)) is not None])

    cells = [
        percent(over(when, name)) if name in SHARES else bounds(over(when, name)) for name in FIGURES for when in WHEN
    ]
    return (
        words(arm),
        count(number),
        count(len(values)),
        count(mean_of(get(value, "answers") for value in values)),
        figure(mean_of(get(value, "staleness") for value in values)),
        *cells,
        bounds(over("engine_gap", "kl_token_k3")),
        percent(over("implicit_accuracy")),
    )
