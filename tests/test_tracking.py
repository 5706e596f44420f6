"""What trackers are given of a run, once, and that they cannot stop it. The clients are the real ones."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeLearner
from test_loop import Killed, World, experiment

from online_dpo.config import Experiment
from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.loop import run_experiment
from online_dpo.store import changed_keys
from online_dpo.tracking import Tracking, missing_clients, open_tracking
from online_dpo.tracking.figures import TrackedRound, Tracker, tracked_round


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Kept:
    """A tracker that keeps what it is given, but for rounds that `fails` wants to fail."""

    name = "kept"

    def __init__(self, fails: Callable[[TrackedRound], bool] = lambda tracked: False) -> None:
        self.rounds: list[TrackedRound] = []
        self.fails = fails
        self.asked = 0
        self.closed = False

    def write(self, tracked: TrackedRound) -> None:
        self.asked += 1
        if self.fails(tracked):
            raise ConnectionError("no route to host")
        self.rounds.append(tracked)

    def close(self) -> None:
        self.closed = True


def names(kept: Kept) -> list[tuple[str, int]]:
    return [(tracked.arm, tracked.index) for tracked in kept.rounds]


class Dying(FakeLearner):
    """The process is killed as round 2 of the first arm trains."""

    def train(self, job: Any) -> Any:
        if job.policy_id == "on_policy/seed_0/round_02":
            raise Killed
        yield from super().train(job)


def go(root: Path, tracker: Tracker, **parts: Any) -> World:
    """Run what is left of the run in `root`, followed by `tracker`."""
    world = World(root, experiment(), **parts)
    with Tracking([tracker], root / "tracked.json", world.progress.say) as tracking:
        world.run.tracking = tracking
        assert run_experiment(world.run) == {}
    return world


# --- figures ---


def test_every_number_of_a_round_by_its_path() -> None:
    """Flags, text, absent and non-finite figures are no numbers; the curve goes over the arm's steps."""
    metrics = {
        "arm": "a",
        "seed": 3,
        "round": 2,
        "policy": {"id": "x", "digest": "y"},
        "held_out": {"reward": {"mean": 0.5, "low": 0.25, "high": None}, "n": 8, "win_rate": None, "odd": float("nan")},
        "pairs": {"dropped": {"ties": 2}},
        "judge": {"reasons": {"timed out: 5 s / [b]": 1}},
        "train": {"steps": 2, "curve": [{"loss": 0.75, "margin": 0.0}, {"loss": 0.5, "margin": None}]},
        "reused": [],
        "flag": True,
    }
    found = tracked_round(metrics, steps_before=10)
    assert (found.arm, found.seed, found.index) == ("a", 3, 2)
    assert found.figures == {
        "held_out/reward/mean": 0.5,
        "held_out/reward/low": 0.25,
        "held_out/n": 8.0,
        "pairs/dropped/ties": 2.0,
        "judge/reasons/timed out_ 5 s _ _b_": 1.0,
        "train/steps": 2.0,
    }
    assert found.curve == ((11, {"loss": 0.75, "margin": 0.0}), (12, {"loss": 0.5}))


def test_the_initial_policy_has_no_curve() -> None:
    found = tracked_round({"arm": "a", "seed": 0, "round": 0, "held_out": {"n": 1}, "train": None}, 0)
    assert (found.figures, found.curve) == ({"held_out/n": 1.0}, ())


# --- once ---


def test_every_closed_round_is_written_once_in_order(tmp_path: Path) -> None:
    kept = Kept()
    world = go(tmp_path / "run", kept)
    assert names(kept) == [(arm, index) for arm in ("on_policy", "self_offline") for index in range(3)]
    assert kept.closed
    steps = [step for tracked in kept.rounds if tracked.arm == "on_policy" for step, _ in tracked.curve]
    assert steps == list(range(1, len(steps) + 1))
    reward = world.metrics()["on_policy", 2]["held_out"]["reward"]["mean"]
    assert kept.rounds[2].figures["held_out/reward/mean"] == reward


def test_a_resumed_run_writes_only_what_is_new(tmp_path: Path) -> None:
    first, second, third = Kept(), Kept(), Kept()
    with pytest.raises(Killed):
        go(tmp_path / "run", first, learner=Dying)
    assert names(first) == [("on_policy", 0), ("on_policy", 1)]
    go(tmp_path / "run", second)
    assert names(second) == [("on_policy", 2), *(("self_offline", index) for index in range(3))]
    go(tmp_path / "run", third)
    assert third.rounds == []


def test_a_tracker_that_comes_late_gets_all_rounds_with_their_steps(tmp_path: Path) -> None:
    on_time, late = Kept(), Kept()
    late.name = "late"
    go(tmp_path / "run", on_time)
    go(tmp_path / "run", late)
    assert late.rounds == on_time.rounds


def test_tracking_may_be_switched_on_when_a_run_is_resumed() -> None:
    tracked = experiment(tracking={"tensorboard": True, "wandb": "p", "mlflow": "e"})
    assert changed_keys(experiment(), tracked) == []


# --- failures ---


def test_a_tracker_that_fails_is_said_once_and_counted_and_stops_nothing(tmp_path: Path) -> None:
    kept = Kept(lambda tracked: tracked.index == 1)
    world = go(tmp_path / "run", kept)
    assert world.metrics().keys() == {(arm, index) for arm in ("on_policy", "self_offline") for index in range(3)}
    assert [line for line in world.progress.lines if line.startswith("tracking")] == [
        "tracking: kept failed, training goes on: ConnectionError: no route to host",
        # Round 1 of an arm is tried after it is closed and again with round 2.
        "tracking: 4 writes to kept failed; the run folder has all figures",
    ]


def test_what_a_tracker_missed_it_gets_when_the_run_goes_on(tmp_path: Path) -> None:
    go(tmp_path / "run", Kept(lambda tracked: tracked.index == 1))
    again = Kept()
    go(tmp_path / "run", again)
    assert names(again) == [("on_policy", 1), ("self_offline", 1)]


def test_a_tracker_that_always_fails_is_left_alone(tmp_path: Path) -> None:
    kept = Kept(lambda tracked: True)
    world = go(tmp_path / "run", kept)
    assert kept.asked == 3
    assert len([line for line in world.progress.lines if line.startswith("tracking")]) == 2


def test_a_damaged_list_of_tracked_rounds_is_said(tmp_path: Path) -> None:
    (tmp_path / "tracked.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match="delete it to write all rounds again"):
        Tracking([], tmp_path / "tracked.json", print)


@pytest.mark.parametrize(("key", "value"), [("tensorboard", True), ("wandb", "project"), ("mlflow", "experiment")])
def test_a_client_that_is_not_installed_is_named_with_its_extra(
    key: str, value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = experiment(tracking={key: value})
    with pytest.raises(ConfigError, match=rf"tracking\.{key}: its client is not installed: .*online-dpo\[{key}\]"):
        missing_clients(spec.tracking)
    with pytest.raises(ConfigError):
        open_tracking(spec, tmp_path, print)


def test_nothing_is_tracked_unless_asked(tmp_path: Path) -> None:
    assert open_tracking(experiment(), tmp_path, print) is None


# --- the real clients ---


def follow(root: Path, spec: Experiment) -> World:
    """Run what is left, tracked as `spec` asks."""
    world = World(root, spec)
    tracking = open_tracking(spec, root, world.progress.say)
    assert tracking is not None
    with tracking:
        world.run.tracking = tracking
        assert run_experiment(world.run) == {}
    assert [line for line in world.progress.lines if line.startswith("tracking")] == []
    return world


def test_tensorboard_reads_the_rounds_back(tmp_path: Path) -> None:
    """Of a run that was resumed: each round and each optimiser step stands there once."""
    pytest.importorskip("tensorboard", reason="pip install 'online-dpo[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = experiment(tracking={"tensorboard": True})
    root = tmp_path / "run"
    follow(root, spec)
    world = follow(root, spec)
    for arm in ("on_policy", "self_offline"):
        events = EventAccumulator(str(root / "tensorboard" / arm / "seed_0"))
        events.Reload()
        means = [world.metrics()[arm, index]["held_out"]["reward"]["mean"] for index in range(3)]
        rewards = events.Scalars("held_out/reward/mean")
        assert [event.step for event in rewards] == [0, 1, 2]
        assert [event.value for event in rewards] == pytest.approx(means)
        steps = [world.metrics()[arm, index]["train"]["steps"] for index in (1, 2)]
        assert [event.step for event in events.Scalars("curve/loss")] == list(range(1, sum(steps) + 1))
        first = world.metrics()[arm, 1]["train"]["loss_first"]
        assert events.Scalars("curve/loss")[0].value == pytest.approx(first)


@pytest.mark.slow
def test_mlflow_has_a_run_an_arm_and_the_resolved_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'online-dpo[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder in the place of a server
    spec = experiment(tracking={"mlflow": "study"})
    root = tmp_path / "run"
    follow(root, spec)
    world = follow(root, spec)
    client = mlflow.MlflowClient()
    there = client.get_experiment_by_name("study")
    runs = {run.data.tags["online_dpo.arm"]: run.info.run_id for run in client.search_runs([there.experiment_id])}
    assert runs.keys() == {"on_policy", "self_offline"}
    history = client.get_metric_history(runs["on_policy"], "held_out/reward/mean")
    means = {index: world.metrics()["on_policy", index]["held_out"]["reward"]["mean"] for index in range(3)}
    assert {metric.step: metric.value for metric in history} == means
    assert len(history) == 3
    assert client.get_metric_history(runs["on_policy"], "curve/loss")[0].step == 1
    file = client.download_artifacts(runs["on_policy"], "experiment.json", str(tmp_path))
    assert json.loads(Path(file).read_text(encoding="utf-8")) == spec.model_dump(mode="json")


@pytest.mark.slow
def test_wandb_offline_holds_the_figures_and_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="pip install 'online-dpo[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    root = tmp_path / "run"
    follow(root, experiment(tracking={"wandb": "project"}))
    records = sorted((root / "wandb").glob("offline-run-*/*.wandb"))
    assert len(records) == 2  # an arm each
    for file in records:
        content = file.read_bytes()
        assert b"held_out/reward/mean" in content and b"curve/loss" in content
        assert b"k" * 40 not in content
        assert str(tmp_path).encode() not in content
        assert list((file.parent / "files").iterdir()) == []  # neither packages nor code nor what was printed
