"""What the stages of the trained rounds did: pairs, training, speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group

from online_dpo.display.figures import ABSENT, finite, get, number, share
from online_dpo.display.tables import Column, Rows, figure_table, spaced
from online_dpo.display.text import clean

STAGES = ("reference", "sample", "judge", "audit", "pair", "train", "off_policy", "evaluate", "human_pairs")
PART_OF = {"judge": ("audit",), "train": ("reference",), "evaluate": ("off_policy", "human_pairs")}
"""Stages whose seconds are shown with another's: columns for them would be more than fit."""


def stage_table(metrics: Rows) -> Group:
    """Tables of the trained rounds: pairs, training (by pairs, by RLOO), and speed with the seconds of every stage."""
    trained = [row for row in metrics if get(row, "round") != 0]
    pairs: list[Column] = [
        ("answers", lambda row: number(get(row, "sample", "candidates"))),
        ("abstained", lambda row: number(get(row, "judge", "abstained"))),
        ("pairs", lambda row: number(get(row, "pairs", "kept"))),
        ("margin", lambda row: number(get(row, "pairs", "margin"))),
        ("dropped", lambda row: _counts(get(row, "pairs", "dropped"))),
    ]
    training: list[Column] = [
        ("steps", lambda row: number(get(row, "train", "steps"))),
        ("loss", _losses),
        ("accuracy", lambda row: share(get(row, "train", "accuracy_last"))),
        ("chosen", lambda row: number(get(row, "train", "chosen_logp_change"), places=2, sign=True)),
        ("rejected", lambda row: number(get(row, "train", "rejected_logp_change"), places=2, sign=True)),
        ("reference", lambda row: clean(get(row, "train", "reference_from") or ABSENT)),
        ("engine gap", lambda row: _scientific(get(row, "train", "engine_gap_token"))),
    ]
    gradient: list[Column] = [
        *training[:2],
        ("reward", lambda row: number(get(row, "train", "reward_last"), places=3)),
        ("KL to reference", lambda row: number(get(row, "train", "kl_last"), places=3)),
        *training[-2:],
    ]
    by_groups = [row for row in trained if get(row, "train", "trained") == "groups"]
    by_pairs = [row for row in trained if row not in by_groups]
    gap = "engine gap: largest difference between engine and learner, nats a token"
    tables = {
        "Training (last step: accuracy, change of the log-probs of chosen and rejected)": (by_pairs, training),
        "Training by RLOO (last step: the judge's mean score, KL of the policy)": (by_groups, gradient),
    }
    parts = [part for own in PART_OF.values() for part in own]
    speed: list[Column] = [
        ("sampling", lambda row: number(get(row, "sample", "tokens_per_second"), places=0)),
        ("training", lambda row: number(get(row, "train", "tokens_per_second"), places=0)),
        *((f"{stage} s", _seconds_of(stage)) for stage in STAGES if stage not in parts),
    ]
    reused = any(row.get("reused") for row in metrics)
    return spaced(
        figure_table("Pairs", trained, pairs),
        *(figure_table(title, rows, columns, gap) for title, (rows, columns) in tables.items() if rows),
        figure_table(
            "Speed (sampling and training in tokens/s)",
            metrics,
            speed,
            "* taken over from an identical stage of another arm" if reused else None,
        ),
    )


def _counts(value: object) -> str:
    """`3 ties, 2 margin`: the counts by reason, largest first; zero counts are left out."""
    if not isinstance(value, Mapping):
        return ABSENT
    found = [(reason, n) for reason, n in value.items() if isinstance(n, int) and n > 0]
    return ", ".join(f"{clean(reason)} {n}" for reason, n in sorted(found, key=lambda item: -item[1])) or "0"


def _losses(row: Mapping[str, Any]) -> str:
    first, last = (number(get(row, "train", key), places=3) for key in ("loss_first", "loss_last"))
    return ABSENT if ABSENT == first == last else f"{first} → {last}"


def _scientific(value: object) -> str:
    found = finite(value)
    return ABSENT if found is None else f"{found:.1e}"


def _seconds_of(stage: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        parts = [finite(get(row, "seconds", part)) or 0.0 for part in PART_OF.get(stage, ())]
        text = number(_add(get(row, "seconds", stage), sum(parts)), places=1)
        return text + "*" if text != ABSENT and stage in (row.get("reused") or ()) else text

    return cell


def _add(value: object, more: float) -> object:
    found = finite(value)
    return value if found is None else found + more
