"""A round is sampled while the one before trains (`source: {lag: k}`) or is evaluated: nothing comes of it but time."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeLearner
from test_loop import World, experiment, results

from online_dpo.ahead import may_run_ahead, may_sample_ahead
from online_dpo.arms import Arm
from online_dpo.config import Experiment, SamplingSpec
from online_dpo.errors import EngineError
from online_dpo.loop import run_experiment
from online_dpo.protocols import SampleRequest, TrainJob, TrainStart, TrainStep
from online_dpo.types import Candidate, Policy, Prompt

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of these tests' time would be the disk's; what it is for is tested in test_files.py."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def lagging(k: int = 1, **changes: Any) -> Experiment:
    return experiment(**{"arms": {"late": {"source": {"lag": k}}}, "rounds": 4} | changes)


def in_sequence(root: Path, spec: Experiment) -> World:
    """The same experiment where engine and learner share a GPU: one after the other."""
    data = spec.model_dump(mode="json") | {"engine": {"share_gpu": True}}
    return World(root, Experiment.model_validate(data))


def engine_at_work(calls: Sequence[tuple[Any, ...]]) -> list[str]:
    """What is sampled and trained, in order: "round 2", "held out", "train 1"."""
    named = []
    for call in calls:
        if call[0] == "sample":
            named.append("held out" if call[1][0][0].startswith("held") else f"{len(call[1])} prompts")
        elif call[0] == "train":
            named.append(f"train {int(call[1][-2:])}")
    return named


class Waiting(FakeLearner):
    """Ends the training of a round only once the next round's pairs are on disk: in sequence that would be never."""

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        yield from list(super().train(job))[:-1]
        index = int(job.policy_id[-2:])
        pair = job.out.parents[2] / f"round_{index + 1:02d}" / "stages" / "pair.json"
        if index < 4:
            waiting = threading.Event()
            for _ in range(int(PATIENCE_S / 0.02)):
                if pair.exists():
                    break
                waiting.wait(0.02)
            assert pair.exists(), f"round {index + 1} was not made while round {index} trained"
        yield list(super().train(job))[-1]


def test_a_round_is_sampled_judged_and_paired_while_the_one_before_trains(tmp_path: Path) -> None:
    """Rounds 2, 3 and 4 are; round 1 has nothing before it. And what comes of it is what comes in sequence."""
    spec = lagging()
    beside = World(tmp_path / "beside", spec, learner=Waiting).go()
    after = in_sequence(tmp_path / "after", spec).go()
    assert results(beside.root) == results(after.root)
    assert len(beside.progress.others) == 3
    assert [label for other in beside.progress.others for label, _ in other.stages] == [
        f"late · seed 0 · round {index} {stage}" for index in (2, 3, 4) for stage in ("sample", "judge", "pair")
    ]


def test_each_round_is_sampled_by_the_policy_that_is_k_rounds_late(tmp_path: Path) -> None:
    """Two rounds late: rounds 1 to 3 by the initial policy, round 4 by that of round 1. The reference is the prior."""
    world = World(tmp_path / "run", lagging(2)).go()
    initial = world.run.initial.digest
    trained = {index: world.metrics()["late", index]["policy"]["digest"] for index in range(1, 5)}
    assert [world.metrics()["late", index]["source"]["digest"] for index in range(1, 5)] == [initial] * 3 + [trained[1]]
    assert [world.metrics()["late", index]["reference"]["digest"] for index in range(1, 5)] == [
        initial, trained[1], trained[2], trained[3],
    ]  # fmt: skip


def test_a_lag_of_none_is_the_current_policy(tmp_path: Path) -> None:
    """The same work as `source: current`, which the store finds out by itself."""
    world = World(tmp_path / "run", experiment(arms={"on_policy": {}, "none": {"source": {"lag": 0}}})).go()
    for index in (1, 2):
        assert world.metrics()["none", index]["reused"] == ["sample", "judge", "pair", "train", "evaluate"]


def test_staleness_is_measured_in_steps(tmp_path: Path) -> None:
    """Three pairs a round in batches of one are three steps: none in round 1, three in each later one (lag 1), and with
    lag 2 six from round 3 on."""
    spec = lagging(evaluation={"off_policy": 2}, arms={f"late_{k}": {"source": {"lag": k}} for k in (1, 2)})
    world = World(tmp_path / "run", spec).go()
    steps = [world.metrics()["late_1", index]["train"]["steps"] for index in range(1, 5)]
    assert set(steps) == {3}
    found = {
        k: [world.metrics()[f"late_{k}", index]["off_policy"]["staleness"] for index in range(1, 5)] for k in (1, 2)
    }
    assert found == {1: [0, 3, 3, 3], 2: [0, 3, 6, 6]}


def test_only_the_policies_that_later_rounds_need_stay_on_disk(tmp_path: Path) -> None:
    """keep: last. Round 4, the last, was sampled by the policy of round 2, which goes when it is closed."""
    world = World(tmp_path / "run", lagging(keep="last")).go()
    assert [index for index in range(1, 5) if (world.folder("late", index).path / "policy").exists()] == [4]


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [
        ({}, [2, 3, 4]),
        ({"source": {"lag": 0}}, []),
        ({"source": {"lag": 2}}, [2, 3, 4]),
        ({"source": "current"}, []),
        ({"source": "initial"}, []),
        ({"engine": {"share_gpu": True}}, []),
    ],
)
def test_which_rounds_may_be_made_ahead(tmp_path: Path, changes: dict[str, Any], rounds: list[int]) -> None:
    """Round 5 is none; rounds of other sources, and those of an engine that must leave its GPU, wait for their turn."""
    source = {"source": changes.pop("source", {"lag": 1})}
    world = World(tmp_path / "run", experiment(rounds=4, arms={"late": source}, **changes))
    arm = Arm(world.run, "late", 0, world.run.experiment.arm("late"))
    assert [index for index in range(1, 6) if may_run_ahead(arm, index)] == rounds


class Failing(FakeEngine):
    """Fails as it samples the training prompts of a policy that is not the first one: in round 3, by lag 1."""

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        assert self.policy is not None
        if self.policy.id != "initial" and not requests[0].prompt.id.startswith("held"):
            raise EngineError("the engine is out of memory")
        yield from super().sample(requests, sampling)


def test_what_fails_ahead_ends_the_run_in_the_same_line_once_the_round_is_trained(tmp_path: Path) -> None:
    world = World(tmp_path / "run", lagging(), engine=Failing)
    with pytest.raises(EngineError, match=r"^the engine is out of memory$"):
        run_experiment(world.run)
    assert world.folder("late", 2).done("train") is not None
    assert not world.folder("late", 3).path.joinpath("candidates.parquet").exists()
    world.parts.pop("engine")
    resumed = world.reopen().go()
    assert results(resumed.root) == results(in_sequence(tmp_path / "after", lagging()).go().root)


@pytest.mark.slow
def test_an_arm_that_training_stops_leaves_nothing_of_the_round_ahead(tmp_path: Path) -> None:
    """Training fails in round 2, while round 3 is sampled; the next arm goes on with the same engine."""
    spec = lagging(arms={"late": {"source": {"lag": 1}}, "later": {"source": {"lag": 1}, "dpo": {"beta": 0.2}}})

    def stops(policy_id: str) -> bool:
        return policy_id == "late/seed_0/round_02"

    roots = []
    for name, share in (("beside", False), ("after", True)):
        data = spec.model_dump(mode="json") | {"engine": {"share_gpu": share}}
        world = World(
            tmp_path / name, Experiment.model_validate(data), learner=lambda calls: FakeLearner(calls, stop=stops)
        )
        assert run_experiment(world.run) == {"late · seed 0": "loss nan"}
        assert not world.folder("late", 3).path.exists()
        assert world.folder("later", 4).closed
        roots.append(world.root)
    assert results(roots[0]) == results(roots[1])


class Dying(FakeLearner):
    """The process's death in the midst of a training, whatever the thread beside it does."""

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        yield from list(super().train(job))[:-1]
        if job.policy_id.endswith("round_02"):
            raise KeyboardInterrupt
        yield list(super().train(job))[-1]


class Slow(FakeEngine):
    """Would sample round 3 for ever."""

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        assert self.policy is not None
        for group in super().sample(requests, sampling):
            while self.policy.id != "initial" and not requests[0].prompt.id.startswith("held"):
                yield group
            yield group


def test_an_interrupt_stops_both_and_the_resumed_run_ends_the_same(tmp_path: Path) -> None:
    world = World(tmp_path / "run", lagging(), engine=Slow, learner=Dying)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run_experiment(world.run)
    assert threading.active_count() == before
    assert world.folder("late", 3).done("sample") is None
    for part in ("engine", "learner"):
        world.parts.pop(part)
    resumed = world.reopen().go()
    assert results(resumed.root) == results(in_sequence(tmp_path / "after", lagging()).go().root)


@pytest.mark.slow
def test_killed_at_any_stage_ahead_it_is_resumed_to_the_same_end(tmp_path: Path) -> None:
    """The folder as a kill would leave it: round 3 ahead with none, some or all of its stages, one half laid out."""
    spec = lagging(rounds=3)
    whole = World(tmp_path / "whole", spec).go()
    for done in ((), ("sample",), ("sample", "judge"), ("sample", "judge", "pair")):
        root = tmp_path / f"killed_{len(done)}"
        shutil.copytree(whole.root, root)
        arm = root / "arms" / "late" / "seed_0"
        for stage in ("train", "evaluate"):
            (arm / "round_02" / "stages" / f"{stage}.json").unlink()
        for gone in (
            arm / "round_02" / "metrics.json",
            arm / "round_03" / "round.json",
            arm / "round_03" / "metrics.json",
        ):
            gone.unlink()
        shutil.rmtree(arm / "round_03" / "policy")
        (arm / "round_03" / "held_out.parquet").unlink()
        for record in (arm / "round_03" / "stages").iterdir():
            if record.stem not in done:
                record.unlink()
        half = arm / "round_03" / f".{('sample', 'judge', 'pair', 'train')[len(done)]}.tmp"
        half.mkdir()
        (half / "verdicts.parquet").write_bytes(b"half")
        resumed = World(root, spec).go()
        assert results(resumed.root) == results(whole.root)


# --- while the round before is evaluated ---


def evaluated_beside(wanted: bool | None = True, **changes: Any) -> Experiment:
    return experiment(**{"arms": {"on": {}}, "rounds": 3, "cluster": {"sample_while_evaluating": wanted}} | changes)


class WaitingToScore(FakeLearner):
    """Scores the held-out answers of a round only once the next round's answers are on disk."""

    root: Path

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        trained = [call[1] for call in self.calls if call[0] == "train"]
        if trained and (index := int(trained[-1][-2:])) < 3:
            sample = self.root / "arms" / "on" / "seed_0" / f"round_{index + 1:02d}" / "stages" / "sample.json"
            waiting = threading.Event()
            for _ in range(int(PATIENCE_S / 0.02)):
                if sample.exists():
                    break
                waiting.wait(0.02)
            assert sample.exists(), f"round {index + 1} was not sampled while round {index} was evaluated"
        return super().score(policy, items)


def test_a_round_is_sampled_while_the_one_before_is_scored(tmp_path: Path) -> None:
    """Rounds 2 and 3 are; and what comes of it is what comes of one after the other."""
    learner = type("Here", (WaitingToScore,), {"root": tmp_path / "beside"})
    beside = World(tmp_path / "beside", evaluated_beside(), learner=learner).go()
    after = World(tmp_path / "after", evaluated_beside(False)).go()
    assert results(beside.root) == results(after.root)
    assert [label for other in beside.progress.others for label, _ in other.stages] == [
        f"on · seed 0 · round {index} sample" for index in (2, 3)
    ]
    assert after.progress.others == []


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [
        ({}, [1, 2, 3]),
        ({"source": "initial"}, [1, 2, 3]),
        ({"source": {"every": 2}}, [1, 2, 3]),
        ({"source": {"lag": 1}}, []),
        ({"source": {"every_steps": 2}}, []),
        ({"engine": {"share_gpu": True}}, []),
        ({"cluster": {"sample_while_evaluating": False}}, []),
        ({"cluster": {"sample_while_evaluating": None}}, []),
    ],
)
def test_which_rounds_may_be_sampled_beside_an_evaluation(
    tmp_path: Path, changes: dict[str, Any], rounds: list[int]
) -> None:
    """Round 4 is none. By default only where engine and learner have a GPU each."""
    spec = evaluated_beside(**{"arms": {"on": {"source": changes.pop("source", "current")}}} | changes)
    world = World(tmp_path / "run", spec)
    arm = Arm(world.run, "on", 0, spec.arm("on"))
    assert [index for index in range(1, 5) if may_sample_ahead(arm, index)] == rounds
    world.run.apart = True
    by_itself = spec.cluster.sample_while_evaluating is None
    assert [index for index in range(1, 5) if may_sample_ahead(arm, index)] == ([1, 2, 3] if by_itself else rounds)


def test_what_fails_beside_an_evaluation_ends_the_run_once_it_is_evaluated(tmp_path: Path) -> None:
    world = World(tmp_path / "run", evaluated_beside(), engine=Failing)
    with pytest.raises(EngineError, match=r"^the engine is out of memory$"):
        run_experiment(world.run)
    assert world.folder("on", 1).done("evaluate") is not None
    assert not world.folder("on", 2).path.joinpath("candidates.parquet").exists()
    world.parts.pop("engine")
    resumed = world.reopen().go()
    assert results(resumed.root) == results(World(tmp_path / "after", evaluated_beside(False)).go().root)
