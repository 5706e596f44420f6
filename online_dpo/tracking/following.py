"""Trackers that follow a run: each closed round is written once to each, and none of them can stop the run."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from online_dpo.config import Experiment, TrackingSpec
from online_dpo.errors import ConfigError, RunFolderError, one_line
from online_dpo.files import write_json
from online_dpo.tracking.figures import TrackedRound, Tracker, tracked_round

FILE = "tracked.json"
"""In the run folder: service -> rounds ("ARM/seed_S/round_RR") that it has."""
MOST_FAILURES = 3
"""In a row, after which a service is left alone until the run is resumed."""


def missing_clients(tracking: TrackingSpec) -> None:
    """Raise `ConfigError` where a client that the experiment asks for is not installed."""
    for key in _wanted(tracking):
        if importlib.util.find_spec(key) is None:
            raise ConfigError(f"tracking.{key}: its client is not installed: pip install 'online-dpo[{key}]'")


def open_tracking(experiment: Experiment, root: Path, say: Callable[[str], None]) -> Tracking | None:
    """The trackers that the experiment asks for; None where it asks for none. Raises as `missing_clients` does."""
    spec = experiment.tracking
    missing_clients(spec)
    trackers: list[Tracker] = []
    if spec.tensorboard:
        from online_dpo.tracking.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker(root / "tensorboard"))
    if spec.wandb is not None:
        from online_dpo.tracking.wandb import WandbTracker

        trackers.append(WandbTracker(spec.wandb, experiment, root))
    if spec.mlflow is not None:
        from online_dpo.tracking.mlflow import MLflowTracker

        trackers.append(MLflowTracker(spec.mlflow, experiment, root))
    return Tracking(trackers, root / FILE, say) if trackers else None


def _wanted(tracking: TrackingSpec) -> list[str]:
    return [key for key in TrackingSpec.model_fields if getattr(tracking, key)]


class Tracking:
    """Writes closed rounds to `trackers`; which have been written stands in `file`.

    A round that could not be written is said once a service, counted, and written when the run is resumed.
    """

    def __init__(self, trackers: Iterable[Tracker], file: Path, say: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._file = file
        self._say = say
        self._written: dict[str, list[str]] = _read(file)
        self._turn = threading.Lock()
        self._failed: dict[str, int] = {}
        self._in_a_row: dict[str, int] = {}

    def closed(self, rounds: Iterable[dict[str, Any]]) -> None:
        """Write the last of `rounds` (metrics.json of an arm and seed, from round 0), and any before it that a service
        does not have yet. Several threads may call it; one is heard at a time."""
        with self._turn:
            self._closed(rounds)

    def _closed(self, rounds: Iterable[dict[str, Any]]) -> None:
        before = 0
        for metrics in rounds:
            name = f"{metrics['arm']}/seed_{metrics['seed']}/round_{metrics['round']:02d}"
            tracked = None
            for tracker in self._trackers:
                if name not in self._written.get(tracker.name, []) and self._heeds(tracker):
                    tracked = tracked or tracked_round(metrics, before)
                    self._write(tracker, name, tracked)
            before += (metrics.get("train") or {}).get("steps", 0)

    def close(self) -> None:
        """Let go of the services; a line says what they have missed."""
        for tracker in self._trackers:
            self._attempt(tracker, tracker.close)
        for name, count in self._failed.items():
            self._say(f"tracking: {count} writes to {name} failed; the run folder has all figures")

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heeds(self, tracker: Tracker) -> bool:
        return self._in_a_row.get(tracker.name, 0) < MOST_FAILURES

    def _write(self, tracker: Tracker, name: str, tracked: TrackedRound) -> None:
        if self._attempt(tracker, lambda: tracker.write(tracked)):
            # After the writing: a kill between the two writes the round again, with the same step and figures.
            self._written.setdefault(tracker.name, []).append(name)
            write_json(self._file, self._written)

    def _attempt(self, tracker: Tracker, action: Callable[[], None]) -> bool:
        """Whether `action` of `tracker` went well; the first that does not is said."""
        try:
            action()
        except Exception as error:
            if tracker.name not in self._failed:
                self._say(f"tracking: {tracker.name} failed, training goes on: {one_line(error)}")
            self._failed[tracker.name] = self._failed.get(tracker.name, 0) + 1
            self._in_a_row[tracker.name] = self._in_a_row.get(tracker.name, 0) + 1
            return False
        self._in_a_row[tracker.name] = 0
        return True


def _read(file: Path) -> dict[str, list[str]]:
    if not file.exists():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} is damaged: {one_line(error)}; delete it to write all rounds again") from error
    return {str(name): list(rounds) for name, rounds in data.items()}
