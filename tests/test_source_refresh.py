"""Answers sampled anew only when those of before are too off-policy."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeLearner
from sources import World, experiment, pairs_of, tokens_of
from test_loop import Killed, results, with_death

from online_dpo.config import Experiment
from online_dpo.types import Candidate, Policy, Prompt


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def limited(rounds: int = 4, **limits: Any) -> Experiment:
    return experiment(arms={"a": {"source": {"refresh_when": limits}}}, rounds=rounds)


class Drifting(FakeLearner):
    """Every round of training moves the log-prob of every token by −0.1: after r rounds, −0.1·r from the sampler's."""

    DRIFT = 0.1

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        if any(candidate.prompt_id.startswith("held") for _, candidate in items):
            return super().score(policy, items)
        self.calls.append(("refresh score", policy.id, len(items)))
        after = int(policy.id[-2:])
        return [
            [value - self.DRIFT * self.age(after, candidate) for value in candidate.logprobs] for _, candidate in items
        ]

    def age(self, after: int, candidate: Candidate) -> int:
        """How many rounds ago the answer was sampled: its round is known by its seed alone, so it is told."""
        return after - self.sampled_after

    sampled_after = 0


class Telling(FakeEngine):
    """Tells the learner after which round the training answers were sampled last."""

    learner: Drifting

    def load(self, policy: Policy) -> float:
        self.after = 0 if policy.id == "initial" else int(policy.id[-2:])
        return super().load(policy)

    def sample(self, requests: Any, sampling: Any) -> Any:
        if requests[0].prompt.id.startswith("train"):
            self.learner.sampled_after = self.after
        return super().sample(requests, sampling)


def drifting(root: Path, spec: Experiment) -> World:
    world = World(root, spec, engine=Telling, learner=Drifting)
    assert isinstance(world.run.engine, Telling)
    assert isinstance(world.run.learner, Drifting)
    world.run.engine.learner = world.run.learner
    return world


def decisions(world: World) -> list[dict[str, Any]]:
    rounds = world.run.experiment.arm("a").rounds
    return [world.metrics()["a", index]["refresh"] for index in range(1, rounds + 1)]


def k3(drift: float) -> float:
    """KL(μ‖π) a token by ρ − 1 − ln ρ with ρ = e^−drift for every token."""
    return math.exp(-drift) - 1 + drift


def test_kl_decides_by_hand(tmp_path: Path) -> None:
    """Rounds after the sampling: drifts 0.1, 0.2, 0.3, k3 .00484, .01873, .04082. With a limit of .03, round 1's
    answers serve rounds 1 to 3, round 4's rounds 4 to 6. All tokens drift alike, so longer answers by more."""
    world = drifting(tmp_path / "run", limited(rounds=6, kl_above=0.03)).go()
    found = decisions(world)
    assert [one["sampled_in_round"] for one in found] == [1, 1, 1, 4, 4, 4]
    assert [one["refreshed"] for one in found] == [True, False, False, True, False, False]
    assert found[0]["kl_token"] is found[0]["ess"] is None
    expected = [k3(drift) for drift in (0.1, 0.2, 0.3, 0.1, 0.2)]
    assert [one["kl_token"] for one in found[1:]] == pytest.approx(expected, rel=1e-5)
    for one, drift in zip(found[1:], (0.1, 0.2, 0.3, 0.1, 0.2), strict=True):
        index = found.index(one) + 1
        trained = pairs_of(world, "a", 1 if index <= 4 else 4)
        weights = [math.exp(-drift * len(c.token_ids)) for pair in trained for c in (pair.chosen, pair.rejected)]
        ess = sum(weights) ** 2 / (len(weights) * sum(weight**2 for weight in weights))
        assert one["ess"] == pytest.approx(ess, rel=1e-5)
    assert len([call for call in world.asked("sample") if call[0][0][0].startswith("train")]) == 2


def test_a_round_that_does_not_sample_trains_on_the_same_pairs_again(tmp_path: Path) -> None:
    world = drifting(tmp_path / "run", limited(rounds=3, kl_above=0.03)).go()
    rows = world.metrics()
    for index in (2, 3):
        for name in ("candidates.parquet", "verdicts.parquet", "pairs.parquet"):
            ours, first = world.folder("a", index).path / name, world.folder("a", 1).path / name
            assert ours.stat().st_ino == first.stat().st_ino
        assert tokens_of(pairs_of(world, "a", index)) == tokens_of(pairs_of(world, "a", 1))
        assert world.folder("a", index).pinned["prompts"] == world.folder("a", 1).pinned["prompts"]
        assert rows["a", index]["source"]["digest"] == world.run.initial.digest
        assert rows["a", index]["sample"] == {"candidates": 9, "tokens": 0, "from": "a/seed_0/round_01"}
        assert rows["a", index]["reference"]["digest"] == rows["a", index - 1]["policy"]["digest"]
    assert len({rows["a", index]["policy"]["digest"] for index in (1, 2, 3)}) == 3


def test_the_policy_at_the_rounds_start_is_measured_on_the_trained_answers(tmp_path: Path) -> None:
    world = drifting(tmp_path / "run", limited(rounds=3, kl_above=0.03)).go()
    assert world.asked("refresh score") == [("a/seed_0/round_01", 6), ("a/seed_0/round_02", 6)]


def test_at_most_64_answers_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from online_dpo.sources import refresh

    assert refresh.MEASURED == 32
    monkeypatch.setattr(refresh, "MEASURED", 2)
    world = drifting(tmp_path / "run", limited(rounds=2, kl_above=0.03)).go()
    assert world.asked("refresh score") == [("a/seed_0/round_01", 4)]


@pytest.mark.parametrize(
    ("limits", "sampled_in"),
    [
        ({"kl_above": 1e9}, [1, 1, 1]),
        ({"kl_above": 1e-9}, [1, 2, 3]),
        ({"kl_above": 1e9, "most_rounds": 2}, [1, 1, 3]),
        ({"kl_above": 1e9, "most_rounds": 1}, [1, 2, 3]),
        ({"ess_below": 0.0}, [1, 1, 1]),
        ({"ess_below": 1.0}, [1, 2, 3]),
        ({"ess_below": 0.0, "kl_above": 1e-9}, [1, 2, 3]),
    ],
)
def test_limits(tmp_path: Path, limits: dict[str, Any], sampled_in: list[int]) -> None:
    world = drifting(tmp_path / "run", limited(rounds=3, **limits)).go()
    assert [one["sampled_in_round"] for one in decisions(world)] == sampled_in


class Lost(Drifting):
    """Gives its last round's answers no chance at all: there is no effective sample size, and no finite KL."""

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        scored = super().score(policy, items)
        held_out = any(candidate.prompt_id.startswith("held") for _, candidate in items)
        return scored if held_out else [[-math.inf] * len(row) for row in scored]


def test_figures_without_bound_refresh(tmp_path: Path) -> None:
    world = World(tmp_path / "run", limited(rounds=2, ess_below=0.1), learner=Lost).go()
    assert decisions(world)[1] == {"refreshed": True, "ess": None, "kl_token": None, "sampled_in_round": 2}


def test_an_arm_without_limits_has_no_such_figures(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms={"a": {}}, rounds=1)).go()
    assert world.metrics()["a", 1]["refresh"] is None
    assert "refresh" not in world.metrics()["a", 1]["seconds"]


def test_a_policy_that_sampled_is_kept_while_its_answers_are_trained_on(tmp_path: Path) -> None:
    """keep: last. Round 4 samples by policy 3; rounds 5 and 6 train on its answers, and the learner needs it."""

    class Asking(Drifting):
        def train(self, job: Any) -> Any:
            assert job.source is not None
            assert (job.source.path / "model.safetensors").exists(), job.policy_id
            return super().train(job)

    spec = limited(rounds=6, kl_above=0.03).model_copy(update={"keep": "last"})
    world = World(tmp_path / "run", spec, engine=Telling, learner=Asking)
    assert isinstance(world.run.engine, Telling)
    assert isinstance(world.run.learner, Drifting)
    world.run.engine.learner = world.run.learner
    world.go()
    assert [(world.folder("a", index).path / "policy").exists() for index in range(1, 7)] == [False] * 5 + [True]


# --- decided once ---


def test_a_decision_is_never_taken_again(tmp_path: Path) -> None:
    """Killed after the decision; resumed by a learner that would decide otherwise."""
    spec = limited(rounds=2, kl_above=0.03)
    world = drifting(tmp_path / "run", spec)
    with pytest.raises(Killed):
        with_death(world, "a", 2, "sample", "before")
    record = world.folder("a", 2).done("refresh")
    assert record is not None
    assert record.info["refreshed"] is False
    again = World(tmp_path / "run", spec, engine=Telling, learner=Lost)
    assert isinstance(again.run.engine, Telling)
    assert isinstance(again.run.learner, Drifting)
    again.run.engine.learner = again.run.learner
    again.go()
    assert again.metrics()["a", 2]["refresh"] == record.info
    assert json.loads((again.folder("a", 2).path / "round.json").read_text())["source"]["after_round"] == 0


class Remembering(Drifting):
    """As `Drifting`, but what it is told is on disk: a new process knows it too."""

    def age(self, after: int, candidate: Candidate) -> int:
        return 1 + after % 3


def test_resuming_again_and_again_gives_what_an_uninterrupted_run_gives(tmp_path: Path) -> None:
    spec = limited(rounds=4, kl_above=0.03).model_copy(update={"keep": "last"})
    whole = World(tmp_path / "whole" / "run", spec, learner=Remembering).go()
    world = World(tmp_path / "run", spec, learner=Remembering)
    for index, stage, moment in (
        (3, "refresh", "within"),
        (3, "refresh", "after"),
        (3, "sample", "within"),
        (4, "refresh", "before"),
        (4, "sample", "before"),
        (4, "pair", "within"),
        (4, "train", "within"),
    ):
        with pytest.raises(Killed):
            with_death(world.reopen(), "a", index, stage, moment)
    assert results(world.reopen().go().root) == results(whole.root)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["refresh", "sample", "judge", "pair", "train", "evaluate", "close"])
@pytest.mark.parametrize("index", [3, 4])
def test_resuming_after_any_death(tmp_path: Path, stage: str, index: int) -> None:
    """Ages 1 + (t − 1) mod 3: round 2 has drift .2, round 3 .3 (samples), round 4 .1 (trains on round 3's again)."""
    spec = limited(rounds=4, kl_above=0.03).model_copy(update={"keep": "last"})
    whole = World(tmp_path / "whole" / "run", spec, learner=Remembering).go()
    assert [one["sampled_in_round"] for one in decisions(whole)] == [1, 1, 3, 3]
    for moment in ("before", "within", "after"):
        world = World(tmp_path / moment / "run", spec, learner=Remembering)
        with pytest.raises(Killed):
            with_death(world, "a", index, stage, moment)
        assert results(world.reopen().go().root) == results(whole.root)
