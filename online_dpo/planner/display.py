"""A prediction as tables."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from online_dpo.display import clean
from online_dpo.planner.prediction import ArmPrediction, Prediction
from online_dpo.planner.work import INITIAL, STAGES


def prediction_tables(prediction: Prediction) -> Group:
    """Where the figures come from, seconds, tokens and disk, memory, what it all comes to, and what does not fit."""
    said = Text("\n".join(map(clean, prediction.said)))
    blank = Text()
    parts: list[Table | Text] = [said, blank, _seconds(prediction), blank, _amounts(prediction), blank]
    parts += [_memory(prediction), blank, _total(prediction)]
    lines = prediction.does_not_fit()
    if lines:
        parts.append(Text("\n".join(f"warning: {clean(line)}" for line in lines), style="yellow"))
    return Group(*parts)


def duration(seconds: float) -> str:
    """Three figures of seconds; minutes, hours and days where they are many."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def _seconds(prediction: Prediction) -> Table:
    table = _table("Predicted seconds of a round, one seed")
    names = [{"off_policy": "off-pol."}.get(stage, stage) for stage in STAGES]
    table.add_column("arm", overflow="fold", max_width=14)
    for header in (*names, "round", "before", "in all"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm in prediction.arms:
        cells = [_figure(arm.stages[stage]) for stage in STAGES]
        cells += [_figure(arm.round_seconds), _figure(arm.stages[INITIAL]), duration(arm.seconds)]
        table.add_row(Text(clean(arm.arm)), *cells)
    return table


def _amounts(prediction: Prediction) -> Table:
    table = _table("Predicted tokens and disk, one seed")
    table.add_column("arm", overflow="fold", max_width=14)
    for header in ("round: sampled", "trained", "disk", "in all: sampled", "trained", "disk", "at most"):
        table.add_column(header, justify="right")
    for arm in prediction.arms:
        table.add_row(Text(clean(arm.arm)), *_amounts_of(arm))
    return table


def _amounts_of(arm: ArmPrediction) -> list[str]:
    work, disk = arm.work, arm.disk
    return [
        f"{work.sampled_tokens:,.0f}",
        f"{work.trained_tokens:,.0f}",
        decimal(int(disk.round)),
        f"{arm.sampled_tokens:,.0f}",
        f"{arm.trained_tokens:,.0f}",
        decimal(int(disk.kept)),
        decimal(int(disk.most)),
    ]


def _memory(prediction: Prediction) -> Table:
    table = _table("Predicted peak memory" + (", of a GPU" if prediction.place.each else ""))
    for header in ("process", "each", "processes", "in all"):
        table.add_column(header, justify="left" if header == "process" else "right")
    for need in prediction.needs:
        amounts = (decimal(int(need.bytes)), str(need.count), decimal(int(need.bytes * need.count)))
        table.add_row(Text(clean(need.process)), *amounts)
    return table


def _total(prediction: Prediction) -> Text:
    arms, seeds = len(prediction.arms), prediction.seeds
    sampled = seeds * sum(arm.sampled_tokens for arm in prediction.arms)
    trained = seeds * sum(arm.trained_tokens for arm in prediction.arms)
    start = f", {duration(prediction.start_s)} to start and end in it" if prediction.start_s else ""
    return Text(
        f"{arms} arm(s) x {seeds} seed(s), all rounds: {duration(prediction.seconds)}{start}; {sampled:,.0f} tokens "
        f"sampled, {trained:,.0f} trained; {decimal(int(prediction.kept_bytes))} on disk. Stages that arms share are "
        "done once: arms that begin alike take less."
    )


def _figure(value: float | None) -> str:
    if value is None:
        return "?"
    if value < 0.1:
        return f"{value:.2f}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
