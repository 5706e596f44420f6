"""Each way in which a comparison is confounded is said, once, with what is wrong; a clean one is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from online_dpo.config import Experiment, JudgeSpec, load_experiment, validate_experiment
from online_dpo.confounding import confounded, differing_things, gold_in_training

ROOT = Path(__file__).resolve().parents[1]
BASE: dict[str, Any] = {
    "name": "t",
    "model": "m",
    "seeds": [0, 1, 2],
    "prompts": {"path": "p", "per_round": 10, "held_out": 6},
    "sampling": {"n": 4, "max_tokens": 20},
    "judge": {"use": "judges.length:LengthJudge"},
    "dpo": {"batch_size": 4, "epochs": 2},
    "rounds": 3,
    "arms": {"on_policy": {}, "self_offline": {"source": "initial"}},
}
SENTIMENT = {"use": "judges.sentiment:SentimentJudge"}


def experiment(**changes: Any) -> Experiment:
    return validate_experiment(BASE | changes, "test")


def only(lines: list[str]) -> str:
    [line] = lines
    return line


def test_a_clean_experiment_has_no_warning() -> None:
    assert confounded(experiment()) == []
    assert confounded(experiment(arms={"on_policy": {}})) == []


def test_the_quickstart_is_told_of_its_single_seed_alone() -> None:
    line = only(confounded(load_experiment(ROOT / "experiments" / "quickstart.yaml")))
    assert line.startswith("one seed: intervals are over prompts only")


def test_one_arm_of_one_seed_compares_nothing() -> None:
    assert confounded(experiment(seeds=[0], arms={"on_policy": {}})) == []


# --- what the arms differ in ---


def test_arms_that_differ_in_two_things_are_told_which() -> None:
    both = {"source": {"every": 2}, "dpo": {"beta": 0.5}}
    line = only(confounded(experiment(arms={"on_policy": {}, "bold": both})))
    assert line == "on_policy and bold differ in source and dpo.beta: a difference of results may come of either"


def test_a_grid_of_two_keys_compares_cleanly() -> None:
    """Every cell has a neighbour that differs in one key."""
    grid = {
        f"{source}_{beta}": {"source": source, "dpo": {"beta": beta}}
        for source in ("current", "initial")
        for beta in (0.1, 0.5)
    }
    assert confounded(experiment(arms=grid)) == []


def test_keys_of_one_choice_are_one_thing() -> None:
    spec = experiment(
        arms={
            "a": {},
            "source": {"source": {"every": 2}},
            "judge": {"judge": SENTIMENT | {"batch": 3}, "comparing": {"schedule": "swiss"}},
            "loss": {"dpo": {"loss": "robust", "label_smoothing": 0.1}},
            "learner": {"algorithm": "rloo", "rloo": {"kl": 0.1}},
            "pairing": {"pairing": {"rule": "top_k", "k": 1}},
            "patient": {"max_abstain": 0.5},
        }
    )
    found = {name: differing_things(spec, "a", name) for name in spec.arms}
    assert found == {
        "a": [],
        "source": ["source"],
        "judge": ["judge"],
        "loss": ["dpo.loss"],
        "learner": ["algorithm"],
        "pairing": ["pairing"],
        "patient": [],
    }


# --- budgets ---


def test_budgets_that_differ_are_told_with_the_arms_that_have_them() -> None:
    """3 rounds of 10 prompts: 4 or 8 answers each, and 4·6 held-out ones; 20 tokens an answer."""
    lines = confounded(experiment(arms={"a": {}, "b": {"source": "initial"}, "wide": {"sampling": {"n": 8}}}))
    assert lines == [
        "the arms' budgets differ in sampled tokens: wide 5,280; a and b 2,880",
        "the arms' budgets differ in judge calls: wide 264; a and b 144",
    ]


def test_steps_and_pairs_are_part_of_the_budget() -> None:
    """top_k of 4 answers makes 2 pairs a prompt, best_vs_worst one; 2 epochs of ⌈20/4⌉ and ⌈10/4⌉ steps."""
    lines = confounded(experiment(arms={"a": {}, "b": {"pairing": {"rule": "top_k"}}}))
    assert lines == [
        "the arms' budgets differ in pairs: b 60; a 30",
        "the arms' budgets differ in steps: b 30; a 18",
    ]


@pytest.mark.parametrize(("most", "said"), [(96, False), (94, True)])
def test_rounding_is_no_difference(most: int, said: bool) -> None:
    """Of 100 pairs a round: 96 are within a twentieth, 94 are not."""
    spec = experiment(
        prompts={"path": "p", "per_round": 100, "held_out": 6},
        dpo={"batch_size": 100},
        arms={"a": {}, "b": {"pairing": {"max_pairs": most}}},
    )
    assert bool(confounded(spec)) == said


# --- judges ---


def test_arms_measured_by_their_own_judges_are_told_of_a_common_one() -> None:
    arms = {"a": {}, "b": {"judge": SENTIMENT}}
    line = only(confounded(experiment(arms=arms)))
    assert "each arm is measured by its own judge (a judges.length:LengthJudge, b judges.sentiment:Sent" in line
    assert confounded(experiment(arms=arms, evaluation={"judge": SENTIMENT})) == []


def test_a_gold_judge_that_trains_is_told_by_its_digest() -> None:
    def digest(judge: JudgeSpec) -> str:
        return judge.use  # a key that leaves the verdicts as they are

    spec = experiment(evaluation={"gold": BASE["judge"] | {"unit": "words"}})
    said = "evaluation.gold is the judge that on_policy and self_offline are trained on"
    assert said in only(gold_in_training(spec, digest))
    assert said in only(confounded(spec, digest))
    assert gold_in_training(experiment(evaluation={"gold": SENTIMENT}), digest) == []
    assert gold_in_training(experiment(), digest) == []


def test_only_the_arms_that_train_on_the_gold_judge_are_named() -> None:
    arms = {"a": {}, "b": {"judge": SENTIMENT}}
    spec = experiment(arms=arms, evaluation={"gold": SENTIMENT, "judge": SENTIMENT})
    assert "is the judge that b is trained on" in only(confounded(spec))


# --- how is measured ---


@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_held_out_answers_of_another_distribution_have_no_divergence(changes: dict[str, float]) -> None:
    assert "so KL is not measured" in only(confounded(experiment(evaluation=changes)))


def test_answers_of_different_lengths_are_measured_at_one_length() -> None:
    arms = {"a": {}, "short": {"sampling": {"max_tokens": 10}}}
    lines = confounded(experiment(arms=arms))
    assert "held-out answers end at different lengths (a 20, short 10 tokens): evaluation.max_tokens" in lines[-1]
    assert not any("lengths" in line for line in confounded(experiment(arms=arms, evaluation={"max_tokens": 20})))


def test_a_dataset_that_is_gone_through_by_rows_has_prompts_of_its_own() -> None:
    def spec(**match: str) -> Experiment:
        offline = {"source": {"dataset": "d.jsonl", **match}}
        return experiment(arms={"on_policy": {}, "offline": offline})

    said = "offline trains on the dataset's own prompts, on_policy on the experiment's"
    assert said in confounded(spec(match="rows"))
    assert said not in confounded(spec(match="prompts"))
    assert said in confounded(spec(), own_prompts=["offline"])
    assert said not in confounded(spec(match="rows"), own_prompts=[])
