"""Real rounds whose source is refreshed after every optimiser step, beside on-policy ones; killed, and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from stories import Outcome, Started, results, run, write_experiment

from online_dpo.files import digest
from online_dpo.policies import read_policy
from online_dpo.records import read_candidates

pytestmark = pytest.mark.slow

DPO = {"lr": 1.0e-3, "batch_size": 2, "epochs": 1}
"""Six pairs a round: three steps."""
ONLINE = {"online": {"source": {"every_steps": 1}}}
BLOCKS = ("block_001", "block_002", "block_003")


@pytest.fixture(scope="module")
def outcome(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two rounds of both."""
    folder = tmp_path_factory.mktemp("online")
    return run(folder, small_model, "tiny", dpo=DPO, arms={"current": {}, **ONLINE})


def record(block: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((block / "stages" / f"{stage}.json").read_text(encoding="utf-8"))
    return found


def test_it_spends_what_an_on_policy_round_spends(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.stderr
    for index in (1, 2):
        current, online = (outcome.metrics(arm, index) for arm in ("current", "online"))
        assert online["sample"]["candidates"] == current["sample"]["candidates"] == 18
        assert online["pairs"]["kept"] + sum(online["pairs"]["dropped"].values()) == 6
        assert online["train"]["steps"] == current["train"]["steps"] == 3
        assert online["policy"]["digest"] != current["policy"]["digest"]


def test_each_block_is_sampled_and_trained_at_one_policy(outcome: Outcome) -> None:
    """The engine's log-probs are the learner's at the weights that each block trains: they are those that it sampled
    from. And they are other weights than the block before had."""
    for index in (1, 2):
        folder = outcome.folder("online", index)
        sampled = []
        for name in BLOCKS:
            train = record(folder / name, "train")
            assert train["info"]["engine_gap_token"] < 1e-3
            assert (
                train["inputs"]["policy"]
                == train["inputs"]["source"]
                == record(folder / name, "sample")["inputs"]["source"]
            )
            assert train["inputs"]["reference"] == outcome.metrics("online", index)["reference"]["digest"]
            sampled.append(train["inputs"]["policy"])
        assert len(set(sampled)) == 3
    current, online = (outcome.folder(arm, 1) / "candidates.parquet" for arm in ("current", "online"))
    theirs, ours = read_candidates(current), read_candidates(online)
    assert [(c.prompt_id, c.seed) for c in ours] == [(c.prompt_id, c.seed) for c in theirs]
    # Two prompts of three answers come from the round's first policy still. (Beside other prompts in the engine's batch
    # their log-probs are rounded otherwise.)
    assert [c.token_ids for c in ours[:6]] == [c.token_ids for c in theirs[:6]]
    assert [c.token_ids for c in ours[6:]] != [c.token_ids for c in theirs[6:]]


def test_training_begins_at_the_reference_and_leaves_it(outcome: Outcome) -> None:
    """ln 2 in the round's first step alone; its log-probs came from the engine there, from the learner after it."""
    train = outcome.metrics("online", 1)["train"]
    assert train["loss_first"] == pytest.approx(math.log(2), abs=1e-3)
    assert [abs(point["margin"]) < 1e-3 for point in train["curve"]] == [True, False, False]
    assert train["reference_from"] == "engine, learner"


def test_the_rounds_policy_is_the_last_blocks(outcome: Outcome) -> None:
    policy = read_policy(outcome.folder("online", 1) / "policy")
    assert policy.id == "online/seed_0/round_01"
    assert sorted(path.name for path in policy.path.iterdir() if path.suffix == ".md") == ["README.md"]
    assert not list(outcome.root.rglob("optimiser"))
    assert not list(outcome.folder("online", 1).glob("block_*/policy"))


def test_one_block_is_an_on_policy_round(outcome: Outcome, small_model: Path, tmp_path: Path) -> None:
    """In a run of its own: the same bits as the arm `current` has."""
    alone = run(tmp_path, small_model, "alone", dpo=DPO, arms={"one": {"source": {"every_steps": 3}}})
    assert alone.status == 0, alone.stderr
    for index in (1, 2):
        ours, theirs = alone.folder("one", index), outcome.folder("current", index)
        for name in ("candidates.parquet", "verdicts.parquet", "pairs.parquet", "held_out.parquet"):
            assert digest(ours / name) == digest(theirs / name), name
        assert alone.metrics("one", index)["policy"]["digest"] == outcome.metrics("current", index)["policy"]["digest"]


def test_killed_in_the_middle_of_a_round(small_model: Path, tmp_path: Path) -> None:
    """kill -9 while the second block of round 1 trains, and while the third one is sampled; the same files."""
    lora = {"rank": 4, "alpha": 8}
    settings: dict[str, Any] = {"dpo": {**DPO, "lr": 1e-2}, "arms": ONLINE, "rounds": 1, "lora": lora}
    whole = run(tmp_path / "whole", small_model, "tiny", **settings)
    assert whole.status == 0, whole.stderr
    root = write_experiment(tmp_path / "killed", small_model, "tiny", **settings)
    folder = root / "arms" / "online" / "seed_0" / "round_01"
    started = Started(tmp_path / "killed", "run", "experiment.yaml")
    for block, stage in ((BLOCKS[1], "train"), (BLOCKS[2], "sample")):
        started.wait_for((folder / block / f".{stage}.tmp").exists)
        started.kill()
        started = Started(tmp_path / "killed", "resume", str(root))
    assert started.end() == 0, started.err.read_text(encoding="utf-8")
    found, expected = results(root), results(whole.root)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
