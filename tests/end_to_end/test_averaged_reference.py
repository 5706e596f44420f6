"""Real runs whose reference is an average of policies: killed around the making of it, they end with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from stories import Outcome, Started, results, run, write_experiment
from torch import Tensor

pytestmark = pytest.mark.slow

SPEC: dict[str, Any] = {
    "arms": {"averaged": {}},
    "reference": {"ema": 0.5},
    "rounds": 3,
    "audit": {"prompts": 0},
}
LORA: dict[str, Any] = {"lora": {"rank": 4, "alpha": 8.0}, "dpo": {"lr": 5e-3, "batch_size": 2}}


@pytest.fixture(scope="module", params=[{}, LORA], ids=["full", "lora"])
def changes(request: pytest.FixtureRequest) -> dict[str, Any]:
    changed: dict[str, Any] = SPEC | request.param
    return changed


@pytest.fixture(scope="module")
def outcome(changes: dict[str, Any], small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Three rounds that nobody stops."""
    done = run(tmp_path_factory.mktemp("averaged"), small_model, "tiny", **changes)
    assert done.status == 0, done.stderr
    return done


def test_what_is_on_disk(outcome: Outcome, changes: dict[str, Any]) -> None:
    """Round 1 refers to the initial policy, 2 and 3 to averages; the learner scores under them, and the policy is
    another than its reference; nothing but safetensors and JSON."""
    assert not (outcome.folder("averaged", 1) / "reference").exists()
    for index in (2, 3):
        folder = outcome.folder("averaged", index) / "reference"
        row = outcome.metrics("averaged", index)
        assert row["reference"]["id"] == f"averaged/seed_0/reference_{index:02d}"
        assert row["reference"]["digest"] == json.loads((folder / "policy.json").read_text())["digest"]
        assert row["train"]["reference_from"] == "learner"
        assert row["seconds"]["reference"] < 60
        for name in ("kl_initial", "kl_reference"):
            assert row["held_out"][name]["mean"] is not None
        assert row["held_out"]["kl_reference"] != row["held_out"]["kl_initial"]
        assert not [file for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    assert outcome.metrics("averaged", 1)["train"]["reference_from"] == "engine"
    if "lora" in changes:
        config = json.loads((outcome.folder("averaged", 3) / "reference" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (8, 16.0)
    else:
        assert averages_by_formula(outcome)


def averages_by_formula(outcome: Outcome) -> bool:
    """ref₃ = ½·W₂ + ½·ref₂ to float32's rounding."""

    def weights(index: int, name: str) -> dict[str, Tensor]:
        return load_file(outcome.folder("averaged", index) / name / "model.safetensors")

    policy, before, after = weights(2, "policy"), weights(2, "reference"), weights(3, "reference")
    return all(
        float((after[name].double() - (policy[name].double() + before[name].double()) / 2).abs().max()) < 1e-6
        for name in after
    )


def test_killed_around_the_average_it_ends_with_the_same_bytes(
    outcome: Outcome, changes: dict[str, Any], small_model: Path, tmp_path: Path
) -> None:
    """kill -9 once round 2's average is there and before it trains; again while round 3's is made or just after."""
    if "lora" not in changes:
        pytest.skip("the store's work is the same: stacked adapters stand for both")
    root = write_experiment(tmp_path, small_model, "tiny", **changes)
    second, third = (root / "arms" / "averaged" / "seed_0" / f"round_{index:02d}" for index in (2, 3))

    killed = Started(tmp_path, "run", "experiment.yaml")
    killed.wait_for((second / "stages" / "reference.json").exists)
    killed.kill()
    assert not (second / "stages" / "train.json").exists()
    made = (second / "reference" / "policy.json").stat().st_mtime_ns

    again = Started(tmp_path, "resume", str(root))
    again.wait_for(lambda: (third / ".reference.tmp").exists() or (third / "reference").exists())
    again.kill()
    assert (second / "reference" / "policy.json").stat().st_mtime_ns == made, "an average was made again"
    assert not (third / "stages" / "train.json").exists()

    resumed = Started(tmp_path, "resume", str(root))
    assert resumed.end() == 0, resumed.err.read_text(encoding="utf-8")
    found, expected = results(root), results(outcome.root)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert any("/reference/" in name for name in expected)
    assert resumed.outlived(15) == []
