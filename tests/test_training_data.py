"""What arms train on, through the loop with a fake engine and learner."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_loop import World, experiment

from online_dpo.config import ArmSettings, Experiment, RlooSpec
from online_dpo.display import budget_table, make_console, stage_table
from online_dpo.errors import ConfigError
from online_dpo.loop import collect_metrics, run_experiment
from online_dpo.plan import differences
from online_dpo.records import read_pairs
from online_dpo.training_data import TrainingData
from online_dpo.types import Group, Pair

ARMS = {"dpo": {}, "rloo": {"algorithm": "rloo"}, "best": {"dpo": {"loss": "sft"}}}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def trained(world: World) -> dict[str, Any]:
    """What the learner was given in each arm's first round."""
    return {call[0].split("/")[0]: call[4] for call in world.asked("train") if call[0].endswith("01")}


def test_each_arm_trains_on_its_own_units_of_the_same_answers(tmp_path: Path) -> None:
    """Three prompts of three answers: pairs, groups of all judged answers, and pairs of which the chosen ones count.
    Candidates and verdicts are sampled and judged once; the pairs of the arm that trains on groups are written too."""
    world = World(tmp_path / "run", experiment(arms=ARMS, rounds=1)).go()
    given = trained(world)
    assert all(isinstance(unit, Pair) for unit in given["dpo"]) and given["dpo"] == given["best"]
    assert all(isinstance(unit, Group) for unit in given["rloo"])
    assert [len(group.candidates) for group in given["rloo"]] == [3, 3, 3]
    assert len({len(world.asked("sample"))}) == 1
    rows = world.metrics()
    found = {arm: rows[arm, 1]["train"] for arm in ARMS}
    pairs = len(given["dpo"])
    assert [(found[arm]["trained"], found[arm]["answers"]) for arm in ARMS] == [
        ("pairs", 2 * pairs), ("groups", 9), ("chosen", pairs),
    ]  # fmt: skip
    assert found["rloo"]["loss"] == "rloo, kl 0.05, summed log-probs, clip 10"
    assert found["best"]["loss"] == "sft on the chosen answers, averaged log-probs"
    folder = world.folder("rloo", 1)
    prompts = {group.prompt.id: group.prompt for group in given["rloo"]}
    candidates = [one for group in given["rloo"] for one in group.candidates]
    assert [p.chosen.text for p in read_pairs(folder.path / "pairs.parquet", prompts, candidates)] == [
        pair.chosen.text for pair in given["dpo"]
    ]
    assert {"sample", "judge", "pair"} <= set(rows["rloo", 1]["reused"]) | set(rows["dpo", 1]["reused"])


def test_what_its_training_stage_reads(tmp_path: Path) -> None:
    """Groups are made of verdicts: other pairing settings make no other policy, another penalty does."""
    arms = {
        "one": {"algorithm": "rloo"},
        "other_pairs": {"algorithm": "rloo", "pairing": {"rule": "all_pairs"}},
        "other_penalty": {"algorithm": "rloo", "rloo": {"kl": 0.5}},
    }
    world = World(tmp_path / "run", experiment(arms=arms, rounds=1)).go()
    rows = world.metrics()
    digests = {arm: rows[arm, 1]["policy"]["digest"] for arm in arms}
    assert digests["one"] == digests["other_pairs"] != digests["other_penalty"]
    assert sum("train" in rows[arm, 1]["reused"] for arm in arms) == 1


def test_a_resumed_round_of_groups_is_read_not_done_again(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms={"rloo": ARMS["rloo"]}, rounds=1)).go()
    (world.folder("rloo", 1).path / "metrics.json").unlink()
    before = world.metrics().get(("rloo", 1))
    again = world.reopen().go()
    assert before is None
    assert again.asked("train") == []
    assert again.metrics()["rloo", 1]["train"]["trained"] == "groups"


def test_a_round_without_two_judged_answers_stops_its_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("online_dpo.training_data.make_groups", lambda *_: ())
    world = World(tmp_path / "run", experiment(arms={"rloo": ARMS["rloo"]}, rounds=1))
    assert run_experiment(world.run) == {"rloo · seed 0": "round 1 has no prompt with two judged answers to train on"}


def test_tables_show_what_was_trained_on(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms=ARMS, rounds=1)).go()
    console = make_console()
    with console.capture() as capture:
        rows = collect_metrics(world.run.store, world.run.experiment)
        console.print(stage_table(rows))
        console.print(budget_table(rows))
    text = capture.get()
    training, rest = text.split("Training by RLOO")
    assert "rloo" not in training.split("Training (")[1]
    gradient, budget = rest.split("Speed")[0], rest.split("Budget")[1]
    assert "KL to reference" in gradient and "best" not in gradient
    [line] = [line for line in budget.splitlines() if line.startswith("rloo")]
    # arm, rounds, answers, tokens sampled, judged, pairs, steps, answers trained, ...
    cells = line.split()
    assert (cells[5], cells[6], cells[7]) == ("–", "3", "9")


@pytest.mark.parametrize(
    ("data", "units", "unit", "answers"),
    [
        (TrainingData("pairs", pairs=(None,) * 3), 3, "pairs", 6),  # type: ignore[arg-type]
        (TrainingData("chosen", pairs=(None,) * 3), 3, "answers", 3),  # type: ignore[arg-type]
    ],
)
def test_counts_of_pairs(data: TrainingData, units: int, unit: str, answers: int) -> None:
    assert (data.units, data.unit, data.answers) == (units, unit, answers)


# --- settings ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling": {"n": 1}}, "sampling.n of 2 or more"),
        ({"source": {"dataset": "x.jsonl"}}, "source current, initial or every"),
        ({"sampling": {"n": 2, "temperature": 0.7}}, "rloo.clip weighs by the probability"),
        ({"sampling": {"n": 2, "top_p": 0.9}}, "rloo.clip: null weighs all answers 1"),
        ({"rloo": {"kl": -1}}, "rloo.kl: Input should be greater than or equal to 0"),
        ({"rloo": {"clipp": 2}}, "unknown key 'rloo.clipp' (did you mean 'clip'?)"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(arms={"a": {}}, **{"algorithm": "rloo", "sampling": {"n": 2}, **changes})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_answers_drawn_in_another_way_are_not_weighed() -> None:
    settings = ArmSettings.model_validate(
        {"algorithm": "rloo", "judge": "a:B", "sampling": {"n": 2, "temperature": 0.7}, "rloo": {"clip": None}}
    )
    assert settings.describe_objective() == "rloo, kl 0.05, summed log-probs, answers not weighed"
    with pytest.raises(ValidationError, match="clip weighs"):
        ArmSettings.model_validate({**settings.model_dump(), "rloo": RlooSpec().model_dump()})


def test_the_objective_in_one_line_tells_arms_apart() -> None:
    spec: Experiment = experiment(arms={**ARMS, "scaled": {"algorithm": "rloo", "rloo": {"standardise": True}}})
    lines = [spec.arm(name).describe_objective() for name in spec.arms]
    assert len(set(lines)) == 4
    assert lines[3] == "rloo, kl 0.05, summed log-probs, clip 10, standardised scores"
    assert differences(spec)["algorithm"]["rloo"] == "rloo"
