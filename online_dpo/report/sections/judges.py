"""What was measured of the judges themselves, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from online_dpo.display.figures import get
from online_dpo.measure import Interval
from online_dpo.report.charts import Line, line_chart
from online_dpo.report.data import labelled, mean_of, over_seeds
from online_dpo.report.document import Cell, Section, Table, bounds, count, percent, words
from online_dpo.report.sections.off_policy import curve
from online_dpo.report.seeds import spread
from online_dpo.report.subject import Subject


def judges(subject: Subject) -> Section:
    """The audits of the rounds (all of each is in the round's audit.json), and what judges declined."""
    audits = over_seeds(subject.runs, "audit")
    rows = [_row(arm, number, found) for arm in subject.arms for number, found in sorted(audits.get(arm, {}).items())]
    correlation = over_seeds(subject.runs, "audit", "length_correlation")
    lines = [Line(arm, arm, curve(correlation.get(arm, {}))) for arm in subject.arms]
    plot = line_chart(
        "judge_length", "Does length sway the judge?", "rank correlation of score and length", lines, subject.look, 0.0
    )
    columns = ("arm", "round", "prompts", "ties", "flips", "cycles", "with length", "longest first", "by chance", "κ")
    note = (
        "means over seeds, with the lowest and the highest seed (of one seed, its 95 % interval over prompts); flips: "
        "verdicts that went with the place; with length: rank correlation of score and length within prompts; κ: "
        "agreement with the second judge"
    )
    tables = [
        Table(
            "audit",
            "The training judge, audited on a sample of each round's prompts",
            columns,
            tuple(rows),
            note,
            folded=plot is not None,
        )
    ]
    abstained = _abstentions(subject)
    if abstained:
        heads = ("arm", "judge", "reason", "answers")
        tables.append(Table("abstained", "Why judges abstained, over all rounds and seeds", heads, abstained))
    text = () if rows else ("The judge was not audited: audit.prompts is 0, or no round is closed.",)
    plots = () if plot is None else (plot,)
    return Section("judges", "The judge, audited", text, plots=plots, tables=tuple(one for one in tables if one.rows))


def _row(arm: str, number: int, audits: Sequence[Any]) -> tuple[Cell, ...]:
    def over(*path: str) -> Interval | None:
        return spread([value for audit in audits if (value := get(audit, *path)) is not None])

    return (
        words(arm),
        count(number),
        count(mean_of(get(audit, "prompts") for audit in audits)),
        percent(over("ties")),
        percent(over("flips")),
        percent(over("intransitive")),
        bounds(over("length_correlation"), places=2),
        percent(over("longest_first")),
        percent(mean_of(get(audit, "longest_first_by_chance") for audit in audits)),
        bounds(over("kappa"), places=2),
    )


SHOWN = 10
"""Reasons an arm and judge: a judge may word each one anew."""


def _abstentions(subject: Subject) -> tuple[tuple[Cell, ...], ...]:
    counts: dict[str, dict[str, int]] = {}
    held_out: dict[str, int] = {}
    for label, row in labelled(subject.runs):
        for reason, number in (get(row, "judge", "reasons") or {}).items():
            own = counts.setdefault(label, {})
            own[reason] = own.get(reason, 0) + number
        held_out[label] = held_out.get(label, 0) + (get(row, "held_out", "abstained") or 0)
    rows = []
    for label in subject.arms:
        reasons = sorted(counts.get(label, {}).items(), key=lambda item: -item[1])
        rows += [(words(label), words("training"), words(reason), count(n)) for reason, n in reasons[:SHOWN]]
        rest = sum(number for _, number in reasons[SHOWN:])
        if rest:
            rows.append((words(label), words("training"), words("other reasons"), count(rest)))
        if held_out.get(label):
            rows.append((words(label), words("held-out"), words("see the answers below"), count(held_out[label])))
    return tuple(rows)
