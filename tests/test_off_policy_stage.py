"""The stage off_policy in a round: who scores what, figures by hand, what is left out, any death of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeLearner, logprobs_of
from test_loop import HELD_OUT, Killed, TwoAnswers, World, experiment, results, with_death

from online_dpo.config import Experiment
from online_dpo.off_policy_stage import drawn_exactly
from online_dpo.records import read_candidates, read_held_out, read_pairs
from online_dpo.scored_records import ScoredAnswer, read_off_policy, write_off_policy
from online_dpo.types import Candidate, Policy, Prompt

SLOW = pytest.mark.slow
FIGURES = {"kl_token", "kl_token_k3", "ess", "ess_token", "coverage"}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def measured(pairs: int = 32, **changes: Any) -> Experiment:
    """`experiment` with so many pairs of each round measured."""
    evaluation = changes.pop("evaluation", {})
    return experiment(evaluation={"off_policy": pairs} | evaluation, **changes)


def rows(world: World, arm: str, index: int) -> list[ScoredAnswer]:
    return read_off_policy(world.folder(arm, index).path / "off_policy.parquet")


# --- by hand ---


LEVELS = {"initial": (-1.25, -1.25), "round_01": (-0.75, -2.25), "round_02": (-1.0, -3.0)}


class ByHand(FakeLearner):
    """The answers of `TwoAnswers` (one token each, −1 to the engine) have these log-probs: under π₀ −1.25; under what
    round 1 trained the longest answer, which is chosen, −0.75, and the others −2.25; under what round 2 trained −1 and
    −3."""

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        high, low = LEVELS[policy.id.rpartition("/")[2]]
        return [[high if answer.token_ids[-1] == 2 else low] * len(answer.token_ids) for _, answer in items]


def by_hand(root: Path, **changes: Any) -> World:
    """Two prompts a round and two held out, as `TwoAnswers` answers them."""
    spec = measured(prompts={"path": "p", "per_round": 2, "held_out": 2}, **changes)
    world = World(root, spec, engine=TwoAnswers, learner=ByHand)
    world.run.held_out = HELD_OUT[:2]
    return world.go()


def test_an_on_policy_round_by_hand(tmp_path: Path) -> None:
    """Two prompts, chosen and rejected of one token, −1 each when sampled by π₀.

    - start, π₀ by the learner: d = −¼ throughout, all of it the engine gap: KL ¼, k3 e^(−¼) − 1 + ¼, weights equal: 1.
      Held-out answers of π₀ have mean −1, so all four answers, at −1.25, lie below their fifth percentile.
    - end: d = ¼ and −1.25: KL ½; weights e^¼ and e^(−1.25); the rejected ones, at −2.25, lie below −1.
    - displacement +½ and −1, the same for both prompts; the margin is 1½ > 0 twice: 1, Wilson 1/(1 + z²/2) to 1.
    """
    world = by_hand(tmp_path / "run", arms={"a": {}}, rounds=1)
    found = world.metrics()["a", 1]["off_policy"]
    start, end = found["start"], found["end"]
    assert (found["answers"], found["with_behaviour"], found["exact"], found["staleness"]) == (4, 4, True, 0)
    assert start["kl_token"] == pytest.approx(0.25)
    assert start["kl_token_k3"] == pytest.approx(math.exp(-0.25) - 0.75)
    assert (start["ess"], start["ess_token"], start["coverage"]) == (pytest.approx(1), pytest.approx(1), 1.0)
    assert {name: found["engine_gap"][name] for name in FIGURES - {"coverage"}} == {
        name: start[name] for name in FIGURES - {"coverage"}
    }
    w, v = math.exp(0.25), math.exp(-1.25)
    assert end["kl_token"] == pytest.approx(0.5)
    assert end["kl_token_k3"] == pytest.approx((w - 1 - 0.25 + v - 1 + 1.25) / 2)
    assert end["ess"] == end["ess_token"] == pytest.approx((w + v) ** 2 / (2 * (w * w + v * v)))
    assert end["coverage"] == 0.5
    assert end["intervals"]["kl_token"] == {"mean": 0.5, "low": 0.5, "high": 0.5}  # both prompts alike
    assert found["displacement"] == {
        "chosen": {"mean": 0.5, "low": 0.5, "high": 0.5},
        "rejected": {"mean": -1.0, "low": -1.0, "high": -1.0},
    }
    accuracy = found["implicit_accuracy"]
    assert (accuracy["mean"], accuracy["high"]) == (1.0, 1.0)
    assert accuracy["low"] == pytest.approx(1 / (1 + 1.959964**2 / 2), abs=1e-6)


def test_an_offline_round_by_hand(tmp_path: Path) -> None:
    """Round 2, sampled by π₀: at its start d = ¼ and −1.25, at its end 0 and −2. Round 1 took two steps. Its reference
    is what it began with: chosen −¼, rejected −¾, so the margin is ½."""
    world = by_hand(tmp_path / "run", arms={"a": {"source": "initial"}})
    found = world.metrics()["a", 2]["off_policy"]
    assert found["staleness"] == world.metrics()["a", 1]["train"]["steps"] == 2
    assert found["start"]["kl_token"] == pytest.approx(0.5)
    assert found["end"]["kl_token"] == pytest.approx(1.0)
    assert found["end"]["ess"] == pytest.approx((1 + math.exp(-2)) ** 2 / (2 * (1 + math.exp(-4))))
    assert found["displacement"]["chosen"]["mean"] == -0.25
    assert found["displacement"]["rejected"]["mean"] == -0.75
    assert found["implicit_accuracy"]["mean"] == 1.0
    assert found["engine_gap"] is None  # nothing was scored under π₀


def test_the_engine_gap_is_known_wherever_the_sampler_was_scored(tmp_path: Path) -> None:
    """Sampled by π₀ and held against π₀: the reference's pass is the sampler's."""
    world = by_hand(tmp_path / "run", arms={"a": {"source": "initial", "reference": "initial"}})
    assert world.metrics()["a", 2]["off_policy"]["engine_gap"]["kl_token"] == pytest.approx(0.25)
    assert world.metrics()["a", 2]["off_policy"]["start"]["kl_token"] == pytest.approx(0.5)
    assert world.metrics()["a", 2]["off_policy"]["implicit_accuracy"]["mean"] == 1.0


# --- who scores what ---


def test_each_policy_scores_once_and_the_file_says_under_which(tmp_path: Path) -> None:
    """Three prompts, six answers. Reference π₀ in round 2: start, end and reference are three policies."""
    world = World(tmp_path / "run", measured(arms={"a": {"reference": "initial"}})).go()
    digests = [world.run.initial.digest, *(world.metrics()["a", index]["policy"]["digest"] for index in (1, 2))]
    six = [policy for policy, ids in world.asked("score") if len(ids) == 6]
    assert six == [digests[1], digests[0], digests[2], digests[1], digests[0]]
    for index in (1, 2):
        folder = world.folder("a", index)
        candidates = read_candidates(folder.path / "candidates.parquet")
        prompts = {prompt.id: prompt for prompt in world.run.train_prompts}
        pairs = read_pairs(folder.path / "pairs.parquet", prompts, candidates)
        expected = [
            ScoredAnswer(
                answer.prompt_id,
                answer.index,
                "chosen" if answer is pair.chosen else "rejected",
                answer.logprobs,
                *(logprobs_of(digest, answer.token_ids) for digest in (digests[index - 1], digests[index], digests[0])),
            )
            for pair in pairs
            for answer in (pair.chosen, pair.rejected)
        ]
        assert rows(world, "a", index) == expected


def test_implicit_accuracy_is_of_the_rounds_end_against_its_reference(tmp_path: Path) -> None:
    """π_t against π₀, not against π_(t−1), which the round began with, nor alone: by rounds these are other shares."""
    arms = {"a": {"reference": "initial", "pairing": {"rule": "all_pairs"}}}
    world = World(tmp_path / "run", measured(arms=arms, rounds=4)).go()

    def accuracy(index: int, other: str | None) -> float:
        levels = [
            sum(row.end_logprobs) - (0.0 if other is None else sum(getattr(row, f"{other}_logprobs")))
            for row in rows(world, "a", index)
        ]
        differences = [chosen - rejected for chosen, rejected in zip(levels[::2], levels[1::2], strict=True)]
        return float(sum(one > 0 for one in differences) / len(differences))

    by_reference, by_start, alone = ([accuracy(i, other) for i in (2, 3, 4)] for other in ("reference", "start", None))
    found = [world.metrics()["a", index]["off_policy"]["implicit_accuracy"]["mean"] for index in (2, 3, 4)]
    assert found == pytest.approx(by_reference)
    assert by_start != by_reference != alone


def test_an_answer_in_several_pairs_is_scored_once(tmp_path: Path) -> None:
    """All pairs of three answers are three a prompt: each answer stands in two, and has one row for each."""
    world = World(tmp_path / "run", measured(arms={"a": {"pairing": {"rule": "all_pairs"}}}, rounds=1)).go()
    found = rows(world, "a", 1)
    kept = world.metrics()["a", 1]["pairs"]["kept"]
    assert len(found) == 2 * kept > 6
    asked = [ids for _, ids in world.asked("score") if len(ids) > 3]
    assert [len(ids) for ids in asked] == [len({(row.prompt_id, row.index) for row in found})] * 2
    assert [row.role for row in found] == ["chosen", "rejected"] * kept


def test_so_many_pairs_as_the_experiment_says_drawn_by_the_seed(tmp_path: Path) -> None:
    spec = measured(2, arms={"a": {"source": "initial"}}, rounds=2, seeds=[0, 1, 2])
    world = World(tmp_path / "run", spec).go()
    drawn = []
    for seed in (0, 1, 2):
        for index in (1, 2):
            folder = world.run.store.round("a", seed, index)
            found = read_off_policy(folder.path / "off_policy.parquet")
            order = json.loads((folder.path / "round.json").read_text(encoding="utf-8"))["prompts"]
            assert len(found) == folder.metrics["off_policy"]["answers"] == 4
            places = [order.index(row.prompt_id) for row in found]
            assert places == sorted(places)
            drawn.append(tuple(sorted(set(places))))
    assert len(set(drawn)) > 1


def test_none_where_none_is_wanted(tmp_path: Path) -> None:
    world = World(tmp_path / "run", measured(0, arms={"a": {}}, rounds=1)).go()
    assert world.metrics()["a", 1]["off_policy"] is None
    assert not (world.folder("a", 1).path / "off_policy.parquet").exists()
    assert "off_policy" not in world.metrics()["a", 1]["seconds"]


def test_arms_with_the_same_round_share_the_measuring(tmp_path: Path) -> None:
    world = World(tmp_path / "run", measured()).go()
    assert "off_policy" in world.metrics()["self_offline", 1]["reused"]
    assert "off_policy" not in world.metrics()["self_offline", 2]["reused"]
    assert world.metrics()["self_offline", 1]["off_policy"] == world.metrics()["on_policy", 1]["off_policy"]
    assert set(world.metrics()["on_policy", 1]["seconds"]) > {"train", "off_policy", "evaluate"}


# --- what the figures are made of ---


def test_staleness_counts_the_steps_of_the_rounds_between(tmp_path: Path) -> None:
    """Three steps a round. Refreshed every second round: rounds 2 and 4 train on what an older policy wrote."""
    arms = {"on": {}, "semi": {"source": {"every": 2}}, "off": {"source": "initial"}}
    world = World(tmp_path / "run", measured(arms=arms, rounds=4)).go()
    stale = {arm: [world.metrics()[arm, i]["off_policy"]["staleness"] for i in (1, 2, 3, 4)] for arm in arms}
    assert stale == {"on": [0, 0, 0, 0], "semi": [0, 3, 0, 3], "off": [0, 3, 6, 9]}


def test_coverage_is_held_against_held_out_answers_of_the_same_policy(tmp_path: Path) -> None:
    """At the start those of the round before, at the end the round's own."""
    world = World(tmp_path / "run", measured(arms={"a": {"source": "initial"}})).go()
    found = world.metrics()["a", 2]["off_policy"]
    for name, index in (("start", 1), ("end", 2)):
        answers = read_held_out(world.folder("a", index).path / "held_out.parquet")
        fresh = [answer.candidate.logprobs for answer in answers]
        means = sorted(sum(row) / len(row) for row in fresh)
        limit = means[0] + 0.1 * (means[1] - means[0])  # of three values 5 % is a tenth of the way to the second
        batch = [getattr(row, f"{name}_logprobs") for row in rows(world, "a", 2)]
        below = [sum(row) / len(row) < limit for row in batch]
        assert found[name]["coverage"] == pytest.approx(sum(below) / len(below))


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_answers_of_another_distribution_have_no_kl_and_no_weights(tmp_path: Path, sampling: dict[str, float]) -> None:
    """Their log-probs are the policy's own, but they were not drawn by them. What needs no sampler stays."""
    world = World(tmp_path / "run", measured(arms={"a": {}}, rounds=1, sampling={"n": 3, **sampling})).go()
    found = world.metrics()["a", 1]["off_policy"]
    assert found["exact"] is False
    assert [found["end"][name] for name in ("kl_token", "kl_token_k3", "ess", "ess_token")] == [None] * 4
    assert found["end"]["coverage"] is not None
    assert found["displacement"]["chosen"]["mean"] is not None
    assert found["engine_gap"]["kl_token"] == 0.0  # the fake learner agrees with the fake engine


def test_no_coverage_where_held_out_answers_are_not_the_policys_own(tmp_path: Path) -> None:
    spec = measured(arms={"a": {}}, rounds=1, evaluation={"temperature": 0.5})
    found = World(tmp_path / "run", spec).go().metrics()["a", 1]["off_policy"]
    assert found["start"]["coverage"] is found["end"]["coverage"] is None
    assert found["end"]["kl_token"] is not None


# --- any death ---


@pytest.mark.parametrize("moment", ["within", pytest.param("before", marks=SLOW), pytest.param("after", marks=SLOW)])
def test_resuming_around_the_measuring_gives_what_an_uninterrupted_run_gives(tmp_path: Path, moment: str) -> None:
    spec = measured(2, keep="last")
    whole = results(World(tmp_path / "whole" / "run", spec).go().root)
    assert any(name.endswith("off_policy.parquet") for name in whole)
    world = World(tmp_path / "run", spec)
    for arm, index in (("on_policy", 1), ("self_offline", 2)):
        with pytest.raises(Killed):
            with_death(world.reopen(), arm, index, "off_policy", moment)
    assert results(world.reopen().go().root) == whole


def test_scored_answers_keep_every_bit(tmp_path: Path) -> None:
    answers = [
        ScoredAnswer("p", 0, "chosen", (-0.5, -1.25), (-0.75, -2.0), (-1.0, -2.0), (-3.0, -0.0)),
        ScoredAnswer("p\n🌳", 3, "rejected", None, (-1.0,), (-2.0,), (-(2.0**-149),)),
    ]
    write_off_policy(tmp_path / "f.parquet", answers)
    found = read_off_policy(tmp_path / "f.parquet")
    assert found == answers
    assert math.copysign(1, found[0].reference_logprobs[1]) == -1


# --- how answers were drawn ---


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        ({}, True),
        ({"sampling": {"n": 3, "top_p": 0.5}}, False),
        ({"source": {"stream": "hot"}}, False),
        ({"source": {"stream": "cool"}, "sampling": {"n": 3, "temperature": 0.5}}, True),
        ({"source": {"dataset": "pairs.jsonl"}, "sampling": {"n": 3, "temperature": 0.5}}, True),
        (
            {"source": {"mixture": [{"share": 0.5, "source": "initial"}, {"share": 0.5, "source": {"stream": "hot"}}]}},
            False,
        ),
    ],
)
def test_answers_are_drawn_as_the_arm_that_made_them_says(change: dict[str, Any], exact: bool) -> None:
    arms = {"cool": {}, "hot": {"sampling": {"n": 3, "temperature": 0.7}}, "a": change}
    assert drawn_exactly(experiment(arms=arms), "a", 0, ()) is exact


def test_a_stream_of_a_stream_is_followed_to_its_beginning() -> None:
    arms = {"hot": {"sampling": {"n": 3, "temperature": 0.7}}, "b": {"source": {"stream": "hot"}}}
    spec = experiment(arms=arms | {"a": {"source": {"stream": "b"}}})
    assert drawn_exactly(spec, "a", 0, ()) is False
