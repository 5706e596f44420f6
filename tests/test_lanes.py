"""Arms and seeds side by side: in lanes of any speed the run ends with the bytes of one arm after the other."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeLearner
from test_loop import World, experiment, results, without_timings

from online_dpo.arms import Run
from online_dpo.config import Experiment, SamplingSpec
from online_dpo.errors import ConfigError, EngineError
from online_dpo.loop import run_experiment
from online_dpo.protocols import SampleRequest, TrainJob, TrainStart, TrainStep
from online_dpo.stopping import Stopped, Stopping
from online_dpo.store import changed_keys
from online_dpo.turns import ArmTurns, Work
from online_dpo.types import Candidate, Policy

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of these tests' time would be the disk's; what it is for is tested in test_files.py."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def in_lanes(count: int, **changes: Any) -> Experiment:
    return experiment(cluster={"lanes": count}, **changes)


class SlowEngine(FakeEngine):
    """The first lane's: left alone, the others would do what is its to do."""

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        time.sleep(0.03)
        yield from super().sample(requests, sampling)


class Lanes(World):
    """A run whose other lanes have a quick engine, and a learner of `parts`."""

    def __init__(self, root: Path, spec: Experiment, **parts: Any) -> None:
        super().__init__(root, spec, **{"engine": SlowEngine} | parts)
        self.opened = 0
        self.run.open_lane = self._open
        self.ended = threading.Event()
        self.run.end_lanes = self.ended.set

    @contextmanager
    def _open(self) -> Iterator[Run]:
        self.opened += 1
        learner: FakeLearner = self.parts.get("learner", FakeLearner)(self.calls)
        yield self.run.lane(FakeEngine(self.calls), learner)


def records(root: Path) -> dict[str, Any]:
    """`results`, and every stage's record but for what a clock says: also who took over whose files."""
    found = results(root)
    for file in sorted((root / "arms").rglob("stages/*.json")):
        found[file.relative_to(root).as_posix()] = without_timings(json.loads(file.read_text(encoding="utf-8")))
    return found


MANY: dict[str, dict[str, Any]] = {
    "on_policy": {},
    "softer": {"dpo": {"beta": 0.2}},
    "self_offline": {"source": "initial"},
    "softer_offline": {"source": "initial", "dpo": {"beta": 0.2}},
    "same_again": {},
    "late": {"source": {"lag": 1}},
    "drawn": {"source": {"history": 2}},
    "replayed": {"source": {"stream": "drawn"}},
    "in_blocks": {"source": {"every_steps": 1}},
    "averaged": {"reference": {"ema": 0.5}},
}


@pytest.mark.parametrize(
    ("keep", "arms"),
    [
        ("last", ["on_policy", "softer", "self_offline", "same_again"]),
        pytest.param("best", list(MANY)[:5], marks=pytest.mark.slow),
        pytest.param("all", list(MANY), marks=pytest.mark.slow),
    ],
)
def test_lanes_end_with_the_bytes_of_one_arm_after_the_other(tmp_path: Path, keep: str, arms: list[str]) -> None:
    """Arms of all kinds, which share what they have in common; names say whose work it was."""
    changes = {"arms": {name: MANY[name] for name in arms}, "keep": keep}
    one = World(tmp_path / "one", experiment(**changes)).go()
    several = Lanes(tmp_path / "several", in_lanes(3, **changes))
    several.go()
    found, expected = records(several.root), records(one.root)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert several.opened == 2
    assert len(several.asked("train")) == len(one.asked("train")), "equal work was done twice"
    assert len(several.asked("sample")) == len(one.asked("sample"))


def test_seeds_go_side_by_side(tmp_path: Path) -> None:
    """Two seeds, two lanes: neither ends its first training before the other has begun its own."""
    both = threading.Barrier(2, timeout=PATIENCE_S)

    class Meeting(FakeLearner):
        def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
            if job.policy_id.endswith("round_01"):
                both.wait()
            yield from super().train(job)

    changes = {"arms": {"a": {}}, "seeds": [0, 1]}
    several = Lanes(tmp_path / "several", in_lanes(2, **changes), learner=Meeting).go()
    assert records(several.root) == records(World(tmp_path / "one", experiment(**changes)).go().root)


def test_arms_go_side_by_side_from_where_they_differ(tmp_path: Path) -> None:
    """Two arms of one seed share round 1 up to the training; in round 2 each trains while the other does."""
    both = threading.Barrier(2, timeout=PATIENCE_S)

    class Meeting(FakeLearner):
        def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
            if job.policy_id.endswith("round_02"):
                both.wait()
            yield from super().train(job)

    Lanes(tmp_path / "run", in_lanes(2, arms={"a": {}, "b": {"dpo": {"beta": 0.2}}}), learner=Meeting).go()


@pytest.mark.slow
def test_an_arm_that_another_one_streams_is_finished_first(tmp_path: Path) -> None:
    """The free lane takes the arm after it meanwhile."""
    arms = {"replayed": {"source": {"stream": "made"}}, "made": {}, "other": {"dpo": {"beta": 0.2}}}
    world = Lanes(tmp_path / "run", in_lanes(2, arms=arms)).go()
    assert records(world.root) == records(World(tmp_path / "one", experiment(arms=arms)).go().root)


@pytest.mark.slow
def test_training_stops_an_arm_and_no_other(tmp_path: Path) -> None:
    def learner(calls: list[tuple[Any, ...]]) -> FakeLearner:
        return FakeLearner(calls, stop=lambda policy_id: policy_id == "b/seed_0/round_02")

    arms = {name: {"dpo": {"beta": beta}} for name, beta in (("a", 0.1), ("b", 0.2), ("c", 0.3))}
    one = World(tmp_path / "one", experiment(arms=arms), learner=learner)
    several = Lanes(tmp_path / "several", in_lanes(3, arms=arms), learner=learner)
    assert run_experiment(several.run) == run_experiment(one.run) == {"b · seed 0": "loss nan"}
    assert records(several.root) == records(one.root)


def failing(when: Callable[[str], bool]) -> Callable[[list[tuple[Any, ...]]], FakeLearner]:
    class Failing(FakeLearner):
        def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
            if when(job.policy_id):
                raise EngineError("a process ended")
            yield from super().train(job)

    return Failing


def test_any_other_fault_ends_all_lanes_in_its_own_line(tmp_path: Path) -> None:
    """Lane 2 fails while lane 1 would go on for long; both have ended when the error comes, and the run is resumed."""
    changes = {"arms": {"a": {}}, "seeds": [0, 1]}
    world = Lanes(tmp_path / "run", in_lanes(2, **changes), learner=failing(lambda name: name == "a/seed_1/round_01"))
    before = threading.active_count()
    with pytest.raises(EngineError, match=r"^a process ended$"):
        run_experiment(world.run)
    assert threading.active_count() == before
    assert world.ended.is_set(), "the lanes' processes were not ended"
    assert world.run.store.turns is None
    resumed = Lanes(world.root, in_lanes(2, **changes)).go()
    assert results(resumed.root) == results(World(tmp_path / "one", experiment(**changes)).go().root)


def test_a_lane_that_finds_no_room_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    def full() -> AbstractContextManager[Run]:
        raise ConfigError("no room on the cluster")

    changes = {"arms": {"a": {}}, "seeds": [0, 1]}
    world = Lanes(tmp_path / "run", in_lanes(3, **changes))
    world.run.open_lane = full
    world.go()
    assert world.progress.lines.count("lane 2 does not fit, the others go on without it: no room on the cluster") == 1
    assert results(world.root) == results(World(tmp_path / "one", experiment(**changes)).go().root)


def test_lanes_may_change_when_a_run_goes_on() -> None:
    assert changed_keys(experiment(), in_lanes(4)) == []


def waits(turns: ArmTurns, world: World, name: str, index: int, stage: str) -> bool:
    """Whether `turns` lets this stage wait."""

    def wait() -> None:
        with suppress(Stopped):
            turns.wait(world.folder(name, index), stage)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(0.3)
    return waiting.is_alive()


def undo(world: World, name: str, *indices: int) -> None:
    """As if these rounds had not been made yet."""
    for index in indices:
        shutil.rmtree(world.folder(name, index).path)


@pytest.mark.parametrize(
    ("reference", "done", "waited_for"),
    [
        # Round 2's reference is the initial policy, as it is in all rounds of the arm before: all of them come first.
        ("initial", 3, False),
        ("initial", 2, True),
        # Round 2's is the policy of round 1, which is another one in the other arm.
        ("prior", 1, False),
    ],
)
def test_log_probs_that_are_cached_are_computed_by_the_earlier_arm(
    tmp_path: Path, reference: str, done: int, waited_for: bool
) -> None:
    """Two arms on the same dataset: whose pass computes a reference's log-probs decides their last bits."""
    betas = {"a": {"dpo": {"beta": 0.1}}, "b": {"dpo": {"beta": 0.2}}}
    world = World(tmp_path / "run", experiment(arms=betas, rounds=3)).go()
    undo(world, "a", *range(done + 1, 4))
    spec = experiment(arms=betas, rounds=3, source={"dataset": "d.jsonl"}, reference=reference)
    stopping = Stopping()
    turns = ArmTurns(world.run.store, spec, [Work(0, "a"), Work(0, "b")], stopping)
    assert waits(turns, world, "b", 2, "train") is waited_for
    stopping.set()


def test_policies_that_once_differ_are_waited_for_no_more(tmp_path: Path) -> None:
    """After round 1 the two arms have other weights: the later one need not wait, though the earlier one stands still.
    Before that it must, until the earlier one has come so far or ended."""
    spec = experiment(arms={"a": {}, "b": {"dpo": {"beta": 0.2}}}, rounds=3)
    world = World(tmp_path / "run", spec).go()
    turns = ArmTurns(world.run.store, spec, [Work(0, "a"), Work(0, "b")], Stopping())
    undo(world, "a", 2, 3)
    assert not any(waits(turns, world, "b", 3, stage) for stage in ("sample", "train", "evaluate"))
    (world.folder("a", 1).path / "metrics.json").unlink()
    assert not waits(turns, world, "b", 1, "evaluate")
    undo(world, "a", 1)
    fresh = ArmTurns(world.run.store, spec, [Work(0, "a"), Work(0, "b")], Stopping())
    assert waits(fresh, world, "b", 1, "sample")
    fresh.end(Work(0, "a"))
    assert not waits(fresh, world, "b", 1, "sample")
