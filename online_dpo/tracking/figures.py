"""The figures of a round as trackers take them: one flat mapping of names to numbers, and the curves of training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

IDENTITY = ("arm", "seed", "round")
"""Keys of metrics.json that say which round it is."""
LONGEST_NAME = 200
"""Characters; MLflow takes 250. Names may come from a judge (reasons, details)."""


@dataclass(frozen=True, slots=True)
class TrackedRound:
    """What a tracker is given of one closed round.

    `figures`: "held_out/reward/mean" -> number. `curve`: (optimiser step of the whole arm, from 1; "loss" -> number).
    """

    arm: str
    seed: int
    index: int
    figures: Mapping[str, float]
    curve: tuple[tuple[int, Mapping[str, float]], ...] = field(default=())


class Tracker(Protocol):
    """One service. Every method may raise whatever its client raises."""

    name: str

    def write(self, tracked: TrackedRound) -> None:
        """Write a round's figures, and have them out of this process's memory when it returns."""

    def close(self) -> None:
        """Nothing more is written."""


def tracked_round(metrics: Mapping[str, Any], steps_before: int) -> TrackedRound:
    """The round of `metrics` (its metrics.json); `steps_before`: optimiser steps of the arm's earlier rounds."""
    curve = (metrics.get("train") or {}).get("curve") or []
    figures = {name: value for name, value in _numbers(metrics, "") if name not in IDENTITY}
    steps = tuple((steps_before + place, dict(_numbers(step, ""))) for place, step in enumerate(curve, start=1))
    return TrackedRound(metrics["arm"], metrics["seed"], metrics["round"], figures, steps)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every finite number in nested mappings, by its path; lists (curves) are none."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{_plain(key)}" if name else _plain(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)


def _plain(key: object) -> str:
    """A part of a name in the characters that all services take."""
    return re.sub(r"[^A-Za-z0-9_. -]", "_", str(key))[:LONGEST_NAME]
