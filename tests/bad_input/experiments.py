"""Experiments that are right but for what a case changes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tiny_models import kept, llama


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """`rows` as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def experiment(folder: Path, **changes: Any) -> dict[str, Any]:
    """Nine prompts of two rounds and a tiny model; `changes` replace whole sections. Writes the prompts."""
    write_rows(folder / "prompts.jsonl", [{"prompt": f"Tell me of number {i}."} for i in range(9)])
    return {
        "name": "tiny",
        "model": str(kept(llama)),
        "prompts": {"path": "prompts.jsonl", "per_round": 2, "held_out": 2, "max_tokens": 64},
        "sampling": {"n": 2, "max_tokens": 8},
        "judge": {"use": "judges.length:LengthJudge", "unit": "characters"},
        "dpo": {"batch_size": 2},
        "rounds": 1,
        "engine": {"kind": "transformers"},
        "output": "runs",
        **changes,
    }


def written(folder: Path, command: str = "check", **changes: Any) -> list[str]:
    """The experiment in a file, and `command` of it."""
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment(folder, **changes)), encoding="utf-8")
    return [command, file.name]
