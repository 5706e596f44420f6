"""`check --predict`, `--like` and `--hardware` by the command line, with an engine and a learner that are fakes."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest
from fakes import FakeEngine
from test_cli import Desk, desk, one_line
from test_planner import LLAMA_7B

from online_dpo.config import load_experiment
from online_dpo.planner.observed import observe
from online_dpo.planner.processes import peaks
from online_dpo.planner.rehearsal import Size, sizes
from online_dpo.store import RunStore
from online_dpo.types import Policy

__all__ = ["desk"]


def test_a_rehearsal_predicts_and_leaves_nothing(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 prompts a round: the larger round has all of them, the smaller ones 1. The fakes' prediction has their tokens:
    4 held-out and 9 sampled answers a round, of at most 8 tokens each."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    result = desk("check", desk.file, "--predict")
    assert result.exit_code == 0, result.stderr
    assert "rehearsing: 2 rounds of 1 prompts, 2 of 3; 2 and 4 held out" in result.stderr
    for part in ("Predicted seconds of a round", "Predicted tokens and disk", "Predicted peak memory", "driver"):
        assert part in result.stdout
    assert "rehearsed here, with arm on_policy" in result.stdout
    assert "2 arm(s) x 1 seed(s), all rounds" in result.stdout
    assert not list(place.glob("online-dpo*"))
    assert not desk.root.exists()
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100


def test_told_to_leave_a_rehearsal_takes_its_folder_along(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM from a scheduler while the engine samples."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders: list[int] = []

    class Told(FakeEngine):
        def load(self, policy: Policy) -> float:
            folders.append(len(list(tmp_path.glob("online-dpo-rehearsal-*"))))
            os.kill(os.getpid(), signal.SIGTERM)
            return super().load(policy)

    desk.engine = Told
    assert desk("check", desk.file, "--predict").exit_code == 143
    assert folders == [1]
    assert not list(tmp_path.glob("online-dpo-rehearsal-*"))


def test_a_finished_run_predicts(desk: Desk) -> None:
    """What was observed of the run: as many rounds as two arms of two had that were not taken over."""
    desk("run", desk.file, "--quiet")
    result = desk("check", desk.file, "--like", desk.root, "--set", "name=next")
    assert result.exit_code == 0, result.stderr
    assert f"by what {desk.root} took" in result.stdout.replace("\n", "")
    assert "Predicted seconds of a round" in result.stdout
    found = observe(RunStore.open(desk.root))
    metrics = [json.loads(file.read_text()) for file in desk.root.glob("arms/*/*/*/metrics.json")]
    own = [row for row in metrics if row["round"] and "train" not in row["reused"]]
    assert sorted(seconds for _, seconds in found.points["train"]) == sorted(row["seconds"]["train"] for row in own)
    kept = [row["train"]["tokens"] for row in own if row["train"]["reference_from"] != "learner"]
    assert {3.0 * tokens for tokens in kept} <= {units for units, _ in found.points["train"]}


def test_a_run_of_another_model_or_none_is_one_line(desk: Desk, tmp_path: Path) -> None:
    assert "no run" in one_line(desk("check", desk.file, "--like", tmp_path / "nowhere"))
    desk("run", desk.file, "--quiet")
    manifest = desk.root / "manifest.json"
    data = json.loads(manifest.read_text())
    data["model"] |= {"digest": "0" * 64, "name": "other"}
    manifest.write_text(json.dumps(data))
    assert "its model is other, not" in one_line(desk("check", desk.file, "--like", desk.root))


def test_on_paper_a_config_is_enough(desk: Desk, tmp_path: Path) -> None:
    """No weights, no tokenizer, no prompts. 16·P = 108 GB and more do not fit one H100."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_7B), encoding="utf-8")
    file = desk.write(model=str(folder), prompts={"path": "nowhere.jsonl", "per_round": 64, "held_out": 8})
    result = desk("check", file, "--hardware", "h100:2")
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "on paper: 2 x h100, 6.74 billion parameters" in said
    assert "assumed: 60% of the bandwidth while decoding" in said
    assert "warning: memory: the learner worker needs" in said
    assert desk.calls == []
    assert "did you mean 'h200'" in one_line(desk("check", file, "--hardware", "h20:8"))


def test_two_ways_to_predict_are_one_too_many(desk: Desk) -> None:
    line = one_line(desk("check", desk.file, "--predict", "--hardware", "h100:8"))
    assert "--predict, --like and --hardware" in line


def test_how_much_is_rehearsed(desk: Desk) -> None:
    """Batches of 32 rows: 10 prompts of 3 answers, and at most three times as many where there are so many prompts;
    vLLM fills up as answers end: 4 and 12."""
    desk.spec["prompts"] |= {"per_round": 100}
    spec = load_experiment(desk.write())
    assert sizes(spec, "on_policy", "transformers", 500, 200) == (Size(10, 32, 2), Size(30, 96, 2))
    assert sizes(spec, "on_policy", "transformers", 500, 40) == (Size(10, 20, 2), Size(30, 40, 2))
    assert sizes(spec, "on_policy", "vllm", 500, 200) == (Size(4, 4, 2), Size(12, 12, 2))
    assert sizes(spec, "on_policy", "vllm", 1, 1) == (Size(1, 1, 2), Size(1, 1, 2))


def test_the_driver_is_among_the_processes() -> None:
    """Of this very process the highest memory is known, and it is more than a few megabytes."""
    assert peaks()["driver"] > 5e6
