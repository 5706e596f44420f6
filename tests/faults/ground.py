"""Where faults are done: a small real experiment, the run of it that nobody disturbs, and how others are held to it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from victim import Victim

from online_dpo.files import digest

HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[2] / "shared" / "data" / "models" / "stories260k"
HOW = ("seconds", "tokens_per_second", "ledger", "reference_from")
"""What a record says of how its figures came about, which is not the same after a kill: seconds, what was asked in the
process that ended the stage, and whether the reference's log-probs were computed in it or found in the cache."""
BATCH = 4
"""Answers that a kill may lose between the judge and its cache: two candidates of a prompt, in two calls at once."""
SMALL: dict[str, Any] = {
    "seeds": [0],
    "prompts": {"path": "prompts.jsonl", "per_round": 4, "held_out": 4},
    "sampling": {"n": 2, "max_tokens": 8},
    "judge": {"use": "counting:CountingJudge"},
    "dpo": {"lr": 1.0e-3, "batch_size": 2, "epochs": 2},
    "rounds": 2,
    "engine": {"kind": "transformers", "threads": 1},
    "learner": {"threads": 1},
    "arms": {"on_policy": {}, "self_offline": {"source": "initial"}},
}
NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna")
THINGS = ("a red ball", "a big dog", "an old tree", "a blue hat")


def injected(name: str, value: object) -> dict[str, str]:
    """The environment of a process to which `injected/sitecustomize.py` does fault ONLINE_DPO_FAULTS_`name`."""
    path = [str(HERE / "injected"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), f"ONLINE_DPO_FAULTS_{name}": str(value)}


@dataclass(frozen=True)
class Outcome:
    """One injection: what was done, whether it was survived, and what was seen."""

    what: str
    survived: bool
    seen: str


@dataclass(frozen=True)
class Computed:
    """A stage of a round: the folder that it is computed in, below `arms`, and the seconds that it took."""

    folder: str
    seconds: float

    @property
    def name(self) -> str:
        """As in `.NAME.tmp`."""
        return self.folder.rpartition("/")[2][1 : -len(".tmp")]


@dataclass
class Reference:
    """The undisturbed run of a variant: what it computed, what its judge was asked, when it was at which stage."""

    root: Path
    results: dict[str, Any]
    asked: list[str]
    spent: float
    seconds: float
    computed: list[Computed]
    """Its stages in the order in which they ended, but for those that were taken over from another arm."""


class Ground:
    """A folder for all runs of one call of the script."""

    def __init__(self, work: Path, model: Path, options: argparse.Namespace) -> None:
        self.work = work
        self.model = model
        self.options = options
        self._references: dict[str, Reference] = {}
        self._number = 0

    def lay(self, changes: Mapping[str, Any] | None = None, folder: Path | None = None) -> tuple[Path, Path]:
        """An experiment in a fresh folder; that folder, and the run's."""
        self._number += 1
        folder = folder or self.work / f"run_{self._number:03d}"
        folder.mkdir(parents=True)
        shutil.copy(HERE / "counting.py", folder / "counting.py")
        rows = [json.dumps({"prompt": f"Once upon a time, {name} had {thing}."}) for name in NAMES for thing in THINGS]
        (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
        spec = {"name": "run", "model": str(self.model), **SMALL, "output": "runs", **(changes or {})}
        if getattr(self.options, "address", None):
            spec["cluster"] = {"address": self.options.address, "wait_s": 300}
        (folder / "experiment.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
        return folder, folder / "runs" / "run"

    def reference(self, variant: str = "plain", changes: Mapping[str, Any] | None = None) -> Reference:
        """The undisturbed run of `variant`, done once. Raises `RuntimeError` when it does not end well."""
        if variant not in self._references:
            folder, root = self.lay(changes)
            victim = Victim(folder, "run", "experiment.yaml", "--quiet")
            self._references[variant] = _undisturbed(victim, root)
        return self._references[variant]

    def same(self, root: Path, reference: Reference, kills: list[tuple[int, int]] | None = None) -> str:
        """What in the finished run `root` differs from `reference`; empty: nothing. Bit for bit, but for clocks."""
        found = results(root)
        other = [name for name in reference.results if found.get(name) != reference.results[name]]
        more = [name for name in found if name not in reference.results]
        if other or more:
            return f"differs in {', '.join([*other, *more][:5])}"
        return paid_twice(root, reference, kills or [])


def _undisturbed(victim: Victim, root: Path) -> Reference:
    if victim.end() != 0:
        raise RuntimeError(f"the run that nobody disturbed failed: {victim.said()}")
    seconds = time.monotonic() - victim.began
    left, _ = victim.gone()
    if left:
        raise RuntimeError(f"the run that nobody disturbed left {left}")
    return Reference(root, results(root), asked(root), spent(root), seconds, _computed(root / "arms"))


def _computed(arms: Path) -> list[Computed]:
    found = []
    for file in sorted(arms.rglob("stages/*.json"), key=lambda file: file.stat().st_mtime_ns):
        record = json.loads(file.read_text(encoding="utf-8"))
        if not record["reused_from"]:
            folder = file.parents[1].relative_to(arms).as_posix()
            found.append(Computed(f"{folder}/.{record['stage']}.tmp", record["seconds"]))
    return found


def under_way(root: Path) -> list[Computed]:
    """Stages that were being computed when the run was killed."""
    folders = sorted((root / "arms").glob("*/*/round_*/.*.tmp"))
    return [Computed(folder.relative_to(root / "arms").as_posix(), 0.0) for folder in folders if folder.is_dir()]


def results(root: Path) -> dict[str, Any]:
    """All that a run computed: digests of its tables and policies, pins, figures; nothing of how these came about."""
    arms = root / "arms"
    found: dict[str, Any] = {}
    for path in sorted([*arms.rglob("*.parquet"), *arms.rglob("*.safetensors"), *arms.rglob("policy.json")]):
        found[path.relative_to(arms).as_posix()] = digest(path)
    for path in sorted([*arms.rglob("round.json"), *arms.rglob("metrics.json")]):
        found[path.relative_to(arms).as_posix()] = _what_came_out(json.loads(path.read_text(encoding="utf-8")))
    return found


def _what_came_out(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _what_came_out(value) for key, value in data.items() if key not in HOW}
    return data


# --- what judges were asked, and what is kept of it ---


def asked(root: Path) -> list[str]:
    """Every answer that the counting judge was asked about, in order."""
    file = root.parents[1] / "calls.txt"
    return file.read_text(encoding="utf-8").split() if file.exists() else []


def kept(root: Path) -> int:
    """Answers in the verdict cache."""
    return int(_query(root, "SELECT COUNT(*) FROM answers"))


def spent(root: Path) -> float:
    """Calls that the ledger counts."""
    return _query(root, "SELECT SUM(amount) FROM ledger WHERE item = 'calls'")


def _query(root: Path, query: str) -> float:
    file = root / "verdicts.sqlite"
    if not file.exists():
        return 0.0
    with closing(sqlite3.connect(file, timeout=30)) as connection:
        try:
            return float(connection.execute(query).fetchone()[0] or 0)
        except sqlite3.OperationalError:  # killed before the table was made
            return 0.0


def at_kill(root: Path) -> tuple[int, int]:
    """How many answers the judge had been asked about, and how many of these are kept: to be read after a kill."""
    return len(asked(root)), kept(root)


def paid_twice(root: Path, reference: Reference, kills: list[tuple[int, int]]) -> str:
    """What was judged twice without need; empty: nothing.

    Whatever the cache holds is never asked again: after each kill at most those answers are asked a second time that
    the judge had been asked and that were not kept yet, and these are the one or two calls under way.
    """
    lines = asked(root)
    if set(lines) != set(reference.asked) or kept(root) != len(set(lines)):
        return f"{len(set(lines))} answers were judged and {kept(root)} kept, of {len(set(reference.asked))}"
    lost = 0
    for place, (count, cached) in enumerate(kills):
        under_way = len(set(lines[:count])) - cached
        if not 0 <= under_way <= BATCH:
            return f"kill {place + 1} lost {under_way} answers"
        lost += under_way
    again = len(lines) - len(set(lines))
    if again > lost:
        return f"{again} answers were asked again, {lost} were under way at kills"
    # A call under way may be in the ledger (it was paid for) without its answer being kept: its repetition is on top.
    more = spent(root) - reference.spent
    return "" if 0 <= more <= again else f"the ledger counts {more:g} calls more, {again} were asked again"
