"""What each kind of source may spend, counted by hand: 3 rounds of 10 prompts, 4 answers, 6 held-out prompts."""

from __future__ import annotations

from typing import Any

import pytest

from online_dpo.budget import Budget, arm_budget
from online_dpo.config import validate_experiment

HELD_OUT = 4 * 6
"""Held-out answers: of the initial policy and of three rounds."""


def budget(arm: dict[str, Any], **changes: Any) -> Budget:
    """Of an arm beside one whose answers are all fresh."""
    data = {
        "name": "t",
        "model": "m",
        "prompts": {"path": "p", "per_round": 10, "held_out": 6},
        "sampling": {"n": 4, "max_tokens": 20},
        "judge": {"use": "a:B"},
        "dpo": {"batch_size": 4, "epochs": 2},
        "rounds": 3,
        "arms": {"fresh": {}, "studied": arm},
    }
    return arm_budget(validate_experiment(data | changes, "test"), "studied", 6)


FRESH = Budget(
    candidates=3 * 40, judged=3 * 40 + HELD_OUT, pairs=3 * 10, steps=3 * 6, sampled_tokens=20 * (3 * 40 + HELD_OUT)
)
"""Two epochs of ⌈10/4⌉ steps a round."""


@pytest.mark.parametrize(
    "source",
    [
        "current",
        "initial",
        {"every": 2},
        {"history": 2},
        {"refresh_when": {"ess_below": 0.5}},
    ],
)
def test_sources_that_sample_all_answers_cost_the_same(source: Any) -> None:
    assert budget({"source": source}) == FRESH


def test_fully_online_rounds_sample_as_much() -> None:
    found = budget({"source": {"every_steps": 1}}, dpo={"batch_size": 4, "epochs": 1})
    assert (found.candidates, found.judged, found.pairs) == (FRESH.candidates, FRESH.judged, FRESH.pairs)


@pytest.mark.parametrize(
    ("source", "sampled", "judged", "pairs"),
    [
        ({"dataset": "d.jsonl"}, 0, 0, 10),
        ({"dataset": "d.jsonl", "relabel": True}, 0, 20, 10),
        # The dataset's answer against the first sample: the others tie with it.
        ({"spin": "d.jsonl"}, 40, 0, 10),
        ({"stream": "fresh"}, 0, 0, 10),
        ({"stream": "fresh", "take": "candidates"}, 0, 40, 10),
        ({"stream": "other_run:a"}, 0, 0, 10),
        # Three prompts of ten from the dataset, seven sampled.
        ({"mixture": [{"share": 0.3, "source": {"dataset": "d"}}, {"share": 0.7, "source": "current"}]}, 28, 28, 10),
    ],
)
def test_what_is_given_costs_nothing(source: Any, sampled: int, judged: int, pairs: int) -> None:
    found = budget({"source": source})
    assert found.candidates == 3 * sampled
    assert found.judged == 3 * judged + HELD_OUT
    assert found.pairs == 3 * pairs
    assert found.steps == FRESH.steps
    assert found.sampled_tokens == 20 * (3 * sampled + HELD_OUT)


@pytest.mark.parametrize(
    ("source", "pairs"),
    [
        ("current", 60),  # of 4 answers
        ({"dataset": "d"}, 10),  # of 2
        ({"spin": "d"}, 40),  # the answer against each of 4 samples
        ({"stream": "fresh"}, 60),
        ({"mixture": [{"share": 0.5, "source": {"dataset": "d"}}, {"share": 0.5, "source": "current"}]}, 35),
    ],
)
def test_all_pairs_of_what_there_is(source: Any, pairs: int) -> None:
    assert budget({"source": source}, pairing={"rule": "all_pairs"}).pairs == 3 * pairs


@pytest.mark.parametrize(
    "source",
    [
        "current",
        {"dataset": "d"},
        {"spin": "d"},
        {"stream": "fresh"},
        {"mixture": [{"share": 0.5, "source": {"dataset": "d"}}, {"share": 0.5, "source": "current"}]},
    ],
)
def test_the_most_pairs_hold_for_every_source(source: Any) -> None:
    assert budget({"source": source}, pairing={"max_pairs": 7}).pairs == 3 * 7


def test_steps_of_rloo_count_prompts() -> None:
    """⌈10/4⌉ steps an epoch whatever pairing would make of the answers."""
    found = budget({"algorithm": "rloo", "pairing": {"rule": "all_pairs"}})
    assert found.steps == FRESH.steps


def test_a_gold_judge_is_asked_of_every_held_out_answer() -> None:
    found = budget({}, evaluation={"gold": {"use": "c:D"}})
    assert found.judged == FRESH.judged + HELD_OUT
