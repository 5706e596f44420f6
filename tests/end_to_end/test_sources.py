"""Sources that use what was saved before, and forks, as real runs of a real, tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stories import NAMES, THINGS, Outcome, Started, run

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


def test_a_real_mixture_of_fresh_streamed_older_and_given_pairs(tmp_path: Path, stories: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        {
            "prompt": f"Once upon a time, {name} had {thing}.",
            "chosen": " It was nice.",
            "rejected": " It was it was it.",
        }
        for name in NAMES
        for thing in THINGS
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    sources = [
        "current",
        {"stream": "on_policy", "order": "shuffled"},
        {"history": 2, "decay": 0.5},
        {"dataset": "pairs.jsonl"},
    ]
    mixture = [{"share": 0.25, "source": source} for source in sources]
    arms = {"mixed": {"source": {"mixture": mixture}}, "on_policy": {}}
    prompts = {"path": "prompts.jsonl", "per_round": 8, "held_out": 8}
    done = run(folder, stories, "mixture", arms=arms, prompts=prompts, audit={"prompts": 2})
    assert done.status == 0, done.stderr
    for index in (1, 2):
        figures = done.metrics("mixed", index)
        assert figures["train"]["steps"] == 4 * -(-figures["pairs"]["kept"] // 2)
        assert set(figures["pairs"]["by_part"]) == {"part_1", "part_2", "part_3", "part_4"}
        assert figures["pairs"]["by_part"]["part_4"] == 2
        assert figures["train"]["loss_first"] > 0
        assert figures["source"] is None


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


def test_the_fork_command_judges_saved_answers_anew_and_goes_on(tmp_path: Path, stories: Path) -> None:
    """Round 2's answers are linked, its verdicts new; the fork is resumed as any run, and forked at once again."""
    done = run(tmp_path, stories, "first", arms={"on_policy": {}}, audit={"prompts": 0})
    assert done.status == 0, done.stderr
    fork = ["fork", str(done.root), "--arm", "on_policy", "--round", "2", "--name", "by_words", "--quiet"]
    started = Started(tmp_path, *fork, "--set", "judge.use=judges.length:LengthJudge", "--set", "judge.unit=words")
    assert started.end() == 0, started.err.read_text(encoding="utf-8")
    assert started.outlived(15) == []
    forked = Outcome(done.root.with_name("by_words"), "", "", 0)
    for name in ("candidates.parquet", "verdicts.parquet", "pairs.parquet"):
        ours, theirs = (one.folder("on_policy", 2) / name for one in (forked, done))
        assert (ours.stat().st_ino == theirs.stat().st_ino) == (name == "candidates.parquet")
    assert forked.metrics("on_policy", 1) == done.metrics("on_policy", 1)
    assert forked.metrics("on_policy", 2)["reused"] == ["sample"]
    assert forked.metrics("on_policy", 2)["policy"]["digest"] != done.metrics("on_policy", 2)["policy"]["digest"]
    again = Started(tmp_path, "resume", str(forked.root))
    assert again.end() == 0
    assert "this run is finished" in again.out.read_text(encoding="utf-8")
    twice = Started(tmp_path, *fork, "--set", "dpo.beta=0.3")
    assert twice.end() == 2
    message = twice.err.read_text(encoding="utf-8")
    assert "is there already" in message
    assert message.count("\n") == 1
