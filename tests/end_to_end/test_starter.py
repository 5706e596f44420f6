"""What `online-dpo init` writes, run by the real command to its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stories import Started

from online_dpo.commands.init import write_starter


@pytest.mark.slow
def test_it_runs_to_its_end(tmp_path: Path, stories: Path) -> None:
    """The real command on the tiny model; what is smaller is how much, not what is done."""
    write_starter(tmp_path / "first", str(stories))
    small = [
        "prompts.per_round=6",
        "prompts.held_out=8",
        "sampling={n: 4, max_tokens: 24}",
        "engine={kind: transformers, threads: 1}",
        "learner={threads: 1}",
    ]
    sets = [part for one in small for part in ("--set", one)]
    started = Started(tmp_path, "run", "first/experiment.yaml", *sets)
    assert started.end(400) == 0, started.err.read_text(encoding="utf-8")[-2000:]
    metrics = json.loads((tmp_path / "runs/first/arms/on_policy/seed_0/round_02/metrics.json").read_text("utf-8"))
    assert metrics["train"]["steps"] >= 1
    assert metrics["held_out"]["n"] == 8
    assert metrics["held_out"]["reward"]["mean"] is not None
