"""A run as `watch` shows it: what is done, what goes on, what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from online_dpo.display.figures import get, interval, number, share
from online_dpo.display.progress import clock_time
from online_dpo.display.tables import Column, figure_table
from online_dpo.display.text import clean
from online_dpo.watching import Snapshot, StageProgress, WatchedRound

MARKS = {"done": "●", "running": "◐", "waiting": "·"}
BESIDES = 14
"""Lines of a screen that are not rows of the two tables."""

FIGURES: tuple[Column, ...] = (
    ("reward", lambda row: interval(get(row, "held_out", "reward"))),
    ("win rate", lambda row: share(get(row, "held_out", "win_rate"))),
    ("KL to initial", lambda row: interval(get(row, "held_out", "kl_initial"))),
)


def watched(run: Snapshot, now: float, height: int | None = None) -> Group:
    """The run at the time `now` (seconds since 1970); with `height`, no more lines than a terminal of it has."""
    closed = [one.metrics for one in run.rounds if one.metrics is not None]
    arms = _arms(run.rounds)
    shown = len(closed) if height is None else max(1, height - BESIDES - len(arms))
    parts: list[RenderableType] = [_state(run, now)]
    if run.stage is not None:
        parts.append(Text(_stage(run.stage)))
    parts += [Text(_stage(one)) for one in run.beside]
    if run.said:
        parts.append(Text(clean(run.said), no_wrap=True, overflow="ellipsis"))
    if arms:
        parts += [Text(), _rounds(arms)]
    if closed:
        hidden = f" (the last {shown} of {len(closed)})" if shown < len(closed) else ""
        parts += [Text(), figure_table(f"Closed rounds{hidden}", closed[-shown:], FIGURES)]
    if run.spent:
        amounts = ", ".join(f"{item.replace('_', ' ')} {amount:g}" for item, amount in sorted(run.spent.items()))
        parts += [Text(), Text(clean(f"judges spent: {amounts}"))]
    return Group(*parts)


def _state(run: Snapshot, now: float) -> Text:
    done = sum(one.state == "done" for one in run.rounds)
    if run.finished:
        state = "finished"
    elif run.working:
        state = "at work"
    else:
        state = "no process works on it"
    rounds = f"{done} of {len(run.rounds)} rounds closed" if run.rounds else "its folder is being laid out"
    ago = clock_time(max(0.0, now - run.changed))
    return Text.assemble((clean(run.name), "bold"), f": {state}, {rounds}, last change {ago} ago")


def _stage(stage: StageProgress) -> str:
    parts = [f"{stage.done} of {stage.total} {stage.unit}"]
    if stage.rate is not None:
        parts.append(f"{number(stage.rate, places=1 if stage.rate >= 1 else 3)}/s")
    if stage.left is not None:
        parts.append(f"{clock_time(stage.left)} left")
    if stage.note:
        parts.append(stage.note)
    return clean(f"{stage.label}: {', '.join(parts)}{' (done)' if stage.ended else ''}")


def _arms(rounds: Sequence[WatchedRound]) -> dict[tuple[str, int], list[WatchedRound]]:
    arms: dict[tuple[str, int], list[WatchedRound]] = {}
    for one in rounds:
        arms.setdefault((one.arm, one.seed), []).append(one)
    return arms


def _rounds(arms: Mapping[tuple[str, int], Sequence[WatchedRound]]) -> Table:
    """A row an arm and seed: a mark a round, and what goes on."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    legend = ", ".join(f"{mark} {state}" for state, mark in MARKS.items())
    for header in ("arm", "seed", f"rounds from 0 ({legend})", "now"):
        table.add_column(header, justify="right" if header == "seed" else "left", overflow="fold")
    for (arm, seed), rounds in arms.items():
        marks = "".join(MARKS[one.state] for one in rounds)
        table.add_row(*(Text(clean(cell)) for cell in (arm, str(seed), marks, _now(rounds))))
    return table


def _now(rounds: Sequence[WatchedRound]) -> str:
    running = next((one for one in rounds if one.state == "running"), None)
    if running is not None:
        return f"round {running.index}: {running.stage}"
    return "done" if all(one.state == "done" for one in rounds) else "waiting"
