"""What a run is doing, read from its folder alone while another process works on it. Nothing is written or locked.

Any file may be missing, half laid out or of this very moment: what cannot be read yet counts as not there yet.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from online_dpo.config import Experiment, validate_experiment
from online_dpo.display.progress_file import NAME
from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.files import read_json
from online_dpo.judging.cache import read_spent
from online_dpo.links import refuse_links
from online_dpo.metrics_check import checked_metrics
from online_dpo.run_hint import no_run, run_hint
from online_dpo.run_lock import NAME as LOCK
from online_dpo.yaml_file import read_yaml

RoundState = Literal["done", "running", "waiting"]


@dataclass(frozen=True, slots=True)
class WatchedRound:
    """One round of one arm and seed; `stage` is what it is at (running), `metrics` its figures (done)."""

    arm: str
    seed: int
    index: int
    state: RoundState
    stage: str = ""
    metrics: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StageProgress:
    """The stage under way. `rate` is units a second, `left` seconds; None where nothing is known yet."""

    label: str
    done: int
    total: int
    unit: str
    note: str
    ended: bool
    rate: float | None
    left: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment. `working`: whether its process is alive. `changed`: when a file last changed, seconds since
    1970. `spent`: what the judges' ledgers come to."""

    name: str
    rounds: tuple[WatchedRound, ...]
    working: bool
    stage: StageProgress | None
    said: str
    changed: float
    spent: dict[str, float]
    beside: tuple[StageProgress, ...] = ()
    """Stages that go on at the same time as `stage`: of other lanes, or of the next round."""

    @property
    def finished(self) -> bool:
        """Whether every round is closed."""
        return bool(self.rounds) and all(one.state == "done" for one in self.rounds)


def read_snapshot(root: Path) -> Snapshot:
    """The run in folder `root` as it is now; `RunFolderError` when there is no such folder."""
    if not root.is_dir():
        raise RunFolderError(f"no run folder at {root}{run_hint(root)}")
    if not _may_be_a_run(root):
        raise no_run(root)
    refuse_links(root)
    experiment = _experiment(root)
    progress = _read(root / NAME) or {}
    working = _alive(progress)
    stage = progress.get("stage") if working else None
    beside = progress.get("beside", []) if working else []
    labels = [str(one["label"]) for one in (stage, *beside) if one is not None]
    return Snapshot(
        name=root.name if experiment is None else experiment.name,
        rounds=() if experiment is None else tuple(_rounds(root, experiment, labels)),
        working=working,
        stage=None if stage is None else _stage(stage, progress["time"]),
        said=str(progress.get("said", "")) if working else "",
        changed=max(_times(root)),
        spent={} if experiment is None else read_spent(Path(experiment.judge_cache or root / "verdicts.sqlite")),
        beside=tuple(_stage(one, progress["time"]) for one in beside),
    )


def _may_be_a_run(root: Path) -> bool:
    """Whether anything of a run lies in folder `root`, or nothing at all yet."""
    there = set(os.listdir(root))
    return not there or bool(there & {"experiment.yaml", "manifest.json", "prompts.parquet", "arms", LOCK, NAME})


def _experiment(root: Path) -> Experiment | None:
    """The resolved experiment; None while it is not there yet."""
    file = root / "experiment.yaml"
    if not file.exists():
        return None
    try:
        return validate_experiment(read_yaml(file), str(file))
    except ConfigError as error:
        raise RunFolderError(f"{file} cannot be read by this version: {error}") from error


def _rounds(root: Path, experiment: Experiment, labels: Sequence[str]) -> Iterator[WatchedRound]:
    for seed in experiment.seeds:
        for arm in experiment.arms:
            for index in range(experiment.arm(arm).rounds + 1):
                folder = root / "arms" / arm / f"seed_{seed}" / f"round_{index:02d}"
                metrics = _read(folder / "metrics.json")
                if metrics is not None:
                    metrics = checked_metrics(metrics, folder / "metrics.json")
                    yield WatchedRound(arm, seed, index, "done", metrics=metrics)
                    continue
                before = f"{arm} · seed {seed} · round {index} "
                shown = [label.removeprefix(before) for label in labels if label.startswith(before)]
                now = shown[0] if shown else _begun(folder)
                yield WatchedRound(arm, seed, index, "running" if now else "waiting", now)


def _begun(folder: Path) -> str:
    """The stage that a round has begun, by what lies in its folder; empty for a round that was not begun."""
    aside = sorted(path.name[1 : -len(".tmp")] for path in folder.glob(".*.tmp") if path.is_dir())
    if aside:
        return aside[0]
    done = [(_changed(path), path.stem) for path in (folder / "stages").glob("*.json")]
    if done:
        return f"after {max(done)[1]}"
    return "begun" if (folder / "round.json").exists() else ""


def _stage(stage: dict[str, Any], now: float) -> StageProgress:
    done, total = int(stage["done"]), int(stage["total"])
    seconds = (stage["ended"] or now) - stage["began"]
    rate = done / seconds if done and seconds > 0 else None
    return StageProgress(
        label=str(stage["label"]),
        done=done,
        total=total,
        unit=str(stage["unit"]),
        note=str(stage["note"]),
        ended=stage["ended"] is not None,
        rate=rate,
        left=None if rate is None or stage["ended"] else max(0, total - done) / rate,
    )


def _alive(progress: dict[str, Any]) -> bool:
    """Whether the process that wrote `progress` still is; one of another machine is taken to be, while its file is."""
    pid = progress.get("pid")
    if not isinstance(pid, int):
        return False
    if progress.get("host") != platform.node():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _times(root: Path) -> Iterator[float]:
    """When the run's files last changed, as far down as stages are written."""
    for pattern in ("*", "arms/*/seed_*/round_*", "arms/*/seed_*/round_*/*", "arms/*/seed_*/round_*/.*"):
        yield from (_changed(path) for path in root.glob(pattern))
    yield _changed(root)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # renamed or removed since it was listed
        return 0.0


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON mapping; None where there is none (yet)."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
