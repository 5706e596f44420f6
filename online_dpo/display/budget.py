"""What each arm spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group

from online_dpo.display.figures import finite, get, number
from online_dpo.display.stages import STAGES
from online_dpo.display.tables import Column, Rows, figure_table, spaced
from online_dpo.display.text import clean


def budget_table(metrics: Rows) -> Group:
    """What each arm spent over all its rounds: arms that differ here differ in more than what is studied."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in metrics:
        groups.setdefault((row.get("arm", ""), row.get("seed", 0)), []).append(row)
    sums = [
        {
            "arm": arm,
            "seed": seed,
            "rounds": sum(row.get("round") != 0 for row in rows),
            "answers": _total(rows, ("sample", "candidates")),
            "sampled": _total(rows, ("sample", "tokens")),
            "judged": _total(rows, ("judge", "verdicts"), ("judge", "abstained")),
            "pairs": _total([row for row in rows if get(row, "train", "trained") != "groups"], ("pairs", "kept")),
            "learned": _total(rows, ("train", "answers")),
            "steps": _total(rows, ("train", "steps")),
            "trained": _total(rows, ("train", "tokens")),
            "seconds": _total(rows, *(("seconds", stage) for stage in STAGES)),
        }
        for (arm, seed), rows in groups.items()
    ]
    columns: list[Column] = [
        ("rounds", lambda row: number(row["rounds"])),
        ("answers", lambda row: number(row["answers"], places=0)),
        ("tokens", lambda row: number(row["sampled"], places=0)),
        ("judged", lambda row: number(row["judged"], places=0)),
        ("pairs", lambda row: number(row["pairs"], places=0)),
        ("steps", lambda row: number(row["steps"], places=0)),
        ("trained", lambda row: number(row["learned"], places=0)),
        ("tokens trained", lambda row: number(row["trained"], places=0)),
        ("seconds", lambda row: number(row["seconds"], places=0)),
    ]
    notes = [
        "answers, tokens: sampled; trained: answers that steps took, each as often as it was taken",
        _objectives(metrics),
    ]
    caption = "\n".join(note for note in notes if note)
    return spaced(figure_table("Budget (all rounds)", sums, columns, caption, round_column=False))


def _objectives(metrics: Rows) -> str | None:
    """Each loss that was minimised, with summed or averaged log-probs and every modifier, and the arms it was of."""
    arms: dict[str, list[str]] = {}
    for row in metrics:
        loss = get(row, "train", "loss")
        if loss is not None and row.get("arm") not in arms.setdefault(loss, []):
            arms[loss].append(row["arm"])
    if len(arms) < 2:
        return next((f"loss: {clean(loss)}" for loss in arms), None)
    return "\n".join(clean(f"loss of {', '.join(names)}: {loss}") for loss, names in arms.items())


def _total(rows: Iterable[Mapping[str, Any]], *paths: tuple[str, str]) -> float | None:
    """The sum of the figures at `paths` that are there; None when none is."""
    values = [found for row in rows for path in paths if (found := finite(get(row, *path))) is not None]
    return sum(values) if values else None
