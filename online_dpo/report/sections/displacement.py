"""What a round did to the log-probs of its own chosen and rejected answers."""

from __future__ import annotations

from online_dpo.report.charts import Line, line_chart
from online_dpo.report.data import over_seeds
from online_dpo.report.document import Section, Table, bounds, count, words
from online_dpo.report.sections.off_policy import curve
from online_dpo.report.subject import Subject

SIDES = ("chosen", "rejected")


def displacement(subject: Subject) -> Section:
    """One chart with both sides, and the figures as a table."""
    found = {side: over_seeds(subject.runs, "off_policy", "displacement", side) for side in SIDES}
    curves = {(arm, side): curve(found[side].get(arm, {})) for arm in subject.arms for side in SIDES}
    charts = []
    for side in SIDES:
        lines = [Line(arm, arm, curves[arm, side], faint=side == "rejected") for arm in subject.arms]
        title = f"Log-probs of {side} answers"
        charts.append(line_chart(f"displacement_{side}", title, "change, nats an answer", lines, subject.look, 0.0))
    rows = [
        (
            words(arm),
            count(number),
            bounds(value, sign=True),
            bounds(dict(curves[arm, "rejected"]).get(number), sign=True),
        )
        for arm in subject.arms
        for number, value in curves[arm, "chosen"]
    ]
    text: tuple[str, ...] = (
        "Mean change of log π from the round's first step to its last. Chosen answers that fall are a sign of offline "
        "pairs: the policy moves its weight to answers that nobody ranked. Bands: the lowest and the highest seed; "
        "of one seed, 95 % intervals over pairs.",
    )
    if not rows:
        return Section("displacement", "Displacement of chosen and rejected", ("Not measured.",))
    table = Table(
        "displacement", "Displacement by round", ("arm", "round", "chosen", "rejected"), tuple(rows), folded=True
    )
    plots = tuple(chart for chart in charts if chart is not None)
    return Section("displacement", "Displacement of chosen and rejected", text, plots=plots, tables=(table,))
