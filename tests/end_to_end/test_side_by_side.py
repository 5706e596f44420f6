"""Real runs: arms side by side, and rounds sampled ahead, end with the bytes of one after the other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from stories import results, run

pytestmark = pytest.mark.slow

SEEDS: dict[str, Any] = {"seeds": [0, 1, 2]}
"""Six arms: enough that some are left when the second lane has started its processes."""
LATE: dict[str, Any] = {"arms": {"late": {"source": {"lag": 1}}}, "rounds": 3}


def test_two_lanes_give_the_bytes_of_one(small_model: Path, tmp_path: Path) -> None:
    """Two arms at three seeds; each lane has an engine and a learner in processes of their own, of one thread each."""
    one = run(tmp_path / "one", small_model, "seeds", **SEEDS)
    assert one.status == 0, one.stderr
    two = run(tmp_path / "two", small_model, "seeds", cluster={"lanes": 2}, **SEEDS)
    assert two.status == 0, two.stderr
    found, expected = results(two.root), results(one.root)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    spans = sorted((min(times), max(times)) for times in map(_times, (two.root / "arms").glob("*/seed_*")))
    # The first ones are done by one lane, while the other starts its processes.
    assert any(after[0] < before[1] for before, after in pairwise(spans)), "nothing was side by side"


def _times(arm: Path) -> list[int]:
    """When the arm's rounds were closed."""
    return [path.stat().st_mtime_ns for path in arm.glob("round_*/metrics.json")]


def test_rounds_sampled_ahead_give_the_bytes_of_one_after_the_other(small_model: Path, tmp_path: Path) -> None:
    """An engine that shares its GPU with the learner waits for its turn, also where there is no GPU."""
    ahead = run(tmp_path / "ahead", small_model, "late", **LATE)
    assert ahead.status == 0, ahead.stderr
    shares = {"kind": "transformers", "threads": 1, "share_gpu": True}
    after = run(tmp_path / "after", small_model, "late", engine=shares, **LATE)
    assert after.status == 0, after.stderr
    assert results(ahead.root) == results(after.root)
    began = {path.parent.parent.name: path.stat().st_mtime_ns for path in ahead.root.rglob("stages/sample.json")}
    trained = {path.parent.parent.name: path.stat().st_mtime_ns for path in ahead.root.rglob("stages/train.json")}
    assert began["round_02"] < trained["round_01"] or began["round_03"] < trained["round_02"], "nothing ran ahead"
