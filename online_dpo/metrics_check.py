"""metrics.json of a round, held against its form: a run folder may come from elsewhere, or have been edited by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from online_dpo.errors import RunFolderError

SECTIONS = (
    "policy", "source", "reference", "held_out", "off_policy", "refresh", "sample", "judge", "audit", "pairs", "train",
    "seconds",
)  # fmt: skip
"""Keys that hold a mapping, or nothing."""
IDENTITY: Mapping[str, type] = {"arm": str, "seed": int, "round": int}


def checked_metrics(metrics: dict[str, Any], file: Path) -> dict[str, Any]:
    """`metrics` of `file` as they are; `RunFolderError` where a section or what says which round it is has no such
    form. Single figures are not looked at: what shows them takes what is no number for absent."""
    for key, kind in IDENTITY.items():
        if key in metrics and (not isinstance(metrics[key], kind) or isinstance(metrics[key], bool)):
            raise RunFolderError(f"{file} is damaged: '{key}' is no {'text' if kind is str else 'whole number'}")
    for key in SECTIONS:
        if not isinstance(metrics.get(key), Mapping | None):
            raise RunFolderError(f"{file} is damaged: '{key}' is no mapping")
    reused = metrics.get("reused", [])
    if not isinstance(reused, list) or not all(isinstance(stage, str) for stage in reused):
        raise RunFolderError(f"{file} is damaged: 'reused' is no list of stages")
    return metrics
