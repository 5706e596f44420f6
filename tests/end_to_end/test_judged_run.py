"""A real run in which every arm has a judge of another kind: in the driver, in an actor, made of judges, the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stories import Outcome, run

from online_dpo.judging import VerdictCache

LENGTH = {"use": "judges.length:LengthJudge", "unit": "characters"}
TEMPLATE = """=== user ===
{prompt}
{answer}

=== verdict ===
{criteria} Once upon a time, from {low} to {high}, it was number
"""
ARMS: dict[str, dict[str, Any]] = {
    "panel": {
        "use": "judges.panel:PanelJudge",
        "judges": [LENGTH, {"use": "judges.repetition:RepetitionJudge", "n": 2}],
        "weights": [1.0, 2.0],
    },
    "noisy": {"use": "judges.noisy:NoisyJudge", "judge": LENGTH, "rate": 0.3},
    "length_controlled": {
        "use": "judges.length_controlled:LengthControlledJudge",
        "judge": {"use": "judges.sentiment:SentimentJudge"},
    },
    "reward_model": {"use": "judges.reward_model:RewardModelJudge", "model": "reward"},
    "self": {"use": "judges.self_judge:SelfScoreJudge", "template": "grade.txt", "min_mass": 0.0},
}


@pytest.fixture(scope="module")
def outcome(small_model: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Outcome:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    reward = AutoModelForSequenceClassification.from_pretrained(small_model, num_labels=1)
    reward.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(small_model).save_pretrained(folder / "reward")
    (folder / "grade.txt").write_text(TEMPLATE, encoding="utf-8")
    arms = {name: {"judge": judge} for name, judge in ARMS.items()}
    arms["self"]["comparing"] = {"schedule": "swiss"}
    return run(folder, small_model, "judges", arms=arms, rounds=1, evaluation={"judge": LENGTH})


def judged(outcome: Outcome, arm: str) -> dict[str, Any]:
    found: dict[str, Any] = outcome.metrics(arm, 1)["judge"]
    return found


pytestmark = pytest.mark.slow


def test_every_arm_is_judged_and_audited(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.stderr
    for arm in ARMS:
        assert judged(outcome, arm)["verdicts"] == 18
        assert judged(outcome, arm)["abstained"] == 0
        audit = json.loads((outcome.folder(arm, 1) / "audit.json").read_text(encoding="utf-8"))
        assert (audit["prompts"], audit["pairs"]) == (6, 18)
        assert outcome.metrics(arm, 1)["pairs"]["kept"] > 0
    assert "The judge" in outcome.stdout


def test_details_of_judges_made_of_judges(outcome: Outcome) -> None:
    assert set(judged(outcome, "panel")["details"]) == {"judge_0", "judge_1", "disagreement"}
    assert 0 < judged(outcome, "noisy")["details"]["flipped"] < 1
    assert {"raw", "slope", "r2"} <= set(judged(outcome, "length_controlled")["details"])
    assert 0 < judged(outcome, "self")["details"]["mass"] <= 1


def test_what_the_reward_model_and_the_policy_said_is_on_disk(outcome: Outcome) -> None:
    """18 candidates each, one key a candidate; the audit finds them there."""
    with VerdictCache(outcome.root / "verdicts.sqlite") as cache:
        assert len(cache) == 36
    for arm in ("reward_model", "self"):
        assert judged(outcome, arm)["ledger"] == {"asked": 18, "cached": 0}
        assert outcome.metrics(arm, 1)["audit"]["ledger"].get("asked", 0) == 0
    sources = outcome.metrics("self", 1)["source"]["digest"]
    stage = json.loads((outcome.folder("self", 1) / "stages" / "judge.json").read_text(encoding="utf-8"))
    assert stage["inputs"]["policy"] == sources
