"""A real run is killed, or interrupted, and resumed; it ends with the bytes of a run that nobody stopped."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from stories import Outcome, Started, results, uninterrupted, write_experiment

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Two small helpers of Ray's that notice a killed driver only after a minute or so; they hold no model."""


@pytest.fixture(scope="session")
def outcome(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two rounds of two arms that nobody stops."""
    return uninterrupted(tmp_path_factory.getbasetemp() / "stories", small_model)


def test_killed_it_ends_with_the_same_bytes(outcome: Outcome, small_model: Path, tmp_path: Path) -> None:
    """kill -9 of the driver while round 2 trains, then `resume`."""
    assert outcome.status == 0, outcome.stderr
    root = write_experiment(tmp_path, small_model, "tiny")
    on_policy = root / "arms" / "on_policy" / "seed_0" / "round_02"

    killed = Started(tmp_path, "run", "experiment.yaml")
    killed.wait_for((on_policy / ".train.tmp").exists)
    killed.kill()
    assert (root / "arms" / "on_policy" / "seed_0" / "round_01" / "metrics.json").exists()
    assert {path.stem for path in (on_policy / "stages").iterdir()} == {"sample", "judge", "audit", "pair"}
    sampled = (on_policy / "candidates.parquet").stat().st_mtime_ns
    # Engine, learner and Ray's servers die with the driver.
    assert killed.outlived(20, AGENTS) == []

    resumed = Started(tmp_path, "resume", str(root))
    assert resumed.end() == 0, resumed.err.read_text(encoding="utf-8")
    assert "round 1 " not in resumed.err.read_text(encoding="utf-8").split("self_offline")[0], "done again"
    assert "round 2 sample" not in resumed.err.read_text(encoding="utf-8").split("self_offline")[0]
    assert (on_policy / "candidates.parquet").stat().st_mtime_ns == sampled, "a finished stage was done again"
    same_bytes(outcome, resumed, root)
    assert resumed.outlived(15) == []


@pytest.mark.slow
def test_interrupted_it_ends_with_the_same_bytes(outcome: Outcome, small_model: Path, tmp_path: Path) -> None:
    """Ctrl-C while the second arm samples, then `resume`; and nothing of a killed run is left after two minutes."""
    root = write_experiment(tmp_path, small_model, "tiny")
    offline = root / "arms" / "self_offline" / "seed_0" / "round_02"
    killed = Started(tmp_path, "run", "experiment.yaml")
    killed.wait_for((offline.parent / "round_01").exists)
    killed.kill()

    interrupted = Started(tmp_path, "resume", str(root))
    interrupted.wait_for((offline / "round.json").exists)
    began = time.monotonic()
    interrupted.interrupt()
    assert interrupted.end(60) == 130
    assert time.monotonic() - began < 30
    assert interrupted.out.read_text(encoding="utf-8") == f"stopped; go on with: online-dpo resume {root}\n"
    assert "Traceback" not in interrupted.err.read_text(encoding="utf-8")
    assert interrupted.outlived(10) == []

    resumed = Started(tmp_path, "resume", str(root))
    assert resumed.end() == 0, resumed.err.read_text(encoding="utf-8")
    same_bytes(outcome, resumed, root)
    assert killed.outlived(120) == []


def same_bytes(outcome: Outcome, resumed: Started, root: Path) -> None:
    """The resumed run ended as the one that nobody stopped: files, and what was printed."""
    found, expected = results(root), results(outcome.root)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert {Path(name).suffix for name in expected} == {".parquet", ".safetensors", ".json"}
    assert answers(resumed.out.read_text(encoding="utf-8")) == answers(outcome.stdout)


def answers(text: str) -> list[str]:
    """What the run printed but for figures of a clock: the tables before "Speed", the answers after "Budget"."""
    lines = text.splitlines()
    speed = next(i for i, line in enumerate(lines) if line.startswith("Speed"))
    prompts = next(i for i, line in enumerate(lines) if line.startswith("Prompt: "))
    return lines[:speed] + lines[prompts:-1]
