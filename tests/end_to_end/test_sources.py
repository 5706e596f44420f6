"""Sources that use what was saved before, and forks, as real runs of a real, tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stories import run

pytestmark = pytest.mark.slow


def test_a_real_learner_trains_the_same_policies_from_another_runs_pairs(tmp_path: Path, stories: Path) -> None:
    """A run of its own, so that nothing is shared: sampled by the engine there, trained twice by the learner."""
    first = run(tmp_path / "first", stories, "first", arms={"on_policy": {}}, audit={"prompts": 0})
    assert first.status == 0, first.stderr
    replay = {"source": {"stream": f"{first.root}:on_policy"}}
    shuffled = {"source": {"stream": f"{first.root}:on_policy", "order": "shuffled"}}
    second = run(
        tmp_path / "second", stories, "second", arms={"replay": replay, "shuffled": shuffled}, audit={"prompts": 0}
    )
    assert second.status == 0, second.stderr
    for index in (1, 2):
        theirs = (first.folder("on_policy", index) / "policy" / "model.safetensors").read_bytes()
        ours = second.folder("replay", index) / "policy" / "model.safetensors"
        assert ours.read_bytes() == theirs
        assert (second.folder("shuffled", index) / "policy" / "model.safetensors").read_bytes() != theirs
        record = json.loads((second.folder("replay", index) / "stages" / "train.json").read_text(encoding="utf-8"))
        assert record["reused_from"] is None
        assert record["info"]["engine_gap_token"] == first.metrics("on_policy", index)["train"]["engine_gap_token"]


def test_a_real_mixture_of_fresh_streamed_and_older_pairs(tmp_path: Path, stories: Path) -> None:
    mixture = [
        {"share": 0.34, "source": "current"},
        {"share": 0.33, "source": {"stream": "on_policy", "order": "shuffled"}},
        {"share": 0.33, "source": {"history": 2, "decay": 0.5}},
    ]
    arms = {"mixed": {"source": {"mixture": mixture}}, "on_policy": {}}
    done = run(tmp_path / "run", stories, "mixture", arms=arms, audit={"prompts": 2})
    assert done.status == 0, done.stderr
    for index in (1, 2):
        figures = done.metrics("mixed", index)
        assert figures["pairs"]["kept"] == figures["train"]["steps"] // 4 * 2
        assert set(figures["pairs"]["by_part"]) == {"part_1", "part_2", "part_3"}
        assert figures["train"]["loss_first"] > 0


def test_a_real_policy_samples_again_when_it_has_moved(tmp_path: Path, stories: Path) -> None:
    """Large steps: the first round's answers are far from the policy after it. A limit that nothing reaches, and one
    that everything does, frame it."""
    arms = {
        "never": {"source": {"refresh_when": {"kl_above": 1000.0}}},
        "always": {"source": {"refresh_when": {"kl_above": 1.0e-9}}},
        "on_policy": {},
    }
    done = run(tmp_path / "run", stories, "refresh", arms=arms, audit={"prompts": 0})
    assert done.status == 0, done.stderr
    never, always = done.metrics("never", 2), done.metrics("always", 2)
    assert [never["refresh"]["sampled_in_round"], always["refresh"]["sampled_in_round"]] == [1, 2]
    # The same policy and answers were measured in both.
    assert never["refresh"]["kl_token"] == always["refresh"]["kl_token"] > 0
    assert 0 < never["refresh"]["ess"] <= 1
    assert always["policy"]["digest"] == done.metrics("on_policy", 2)["policy"]["digest"]
    assert never["sample"]["tokens"] == 0
