"""kill -9 of one process of a run: the engine, a learner worker (of one and of two), a judge's actor, the raylet.

The run notices, says so in one line, starts all of its processes anew, once, and goes on by itself. Compared with the
undisturbed run of the same variant, bit for bit (with two learner workers that is one with two: another order of
addition rounds otherwise). A second death in the same run ends it in one line, and the next `run` goes on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ground import Ground, Outcome, at_kill
from victim import Victim

ANEW = "all processes are started anew, once"


@dataclass(frozen=True)
class Death:
    """Process `name` (part of its command line) dies `times` times in the first stage whose label ends in `stage`."""

    what: str
    name: str
    stage: str
    variant: str = "plain"
    changes: dict[str, Any] = field(default_factory=dict)
    times: int = 1


TWO = {"learner": {"threads": 1, "workers": 2}}
ACTOR = {"judge": {"use": "counting:CountingJudge", "actor": {"threads": 1}}}
DEATHS = (
    Death("the engine while it samples", "ray::EngineActor", "round 1 sample"),
    Death("the engine while it evaluates", "ray::EngineActor", "evaluate"),
    Death("a learner worker", "ray::LearnerActor", "round 1 train"),
    Death("one of two learner workers", "ray::LearnerActor", "round 1 train", "two workers", TWO),
    Death("a judge's actor", "ray::JudgeActor", "judge", "judge in an actor", ACTOR),
    Death("the raylet while the engine samples", "raylet/raylet", "round 1 sample"),
    Death("the raylet while the learner trains", "raylet/raylet", "round 1 train"),
    Death("the engine twice", "ray::EngineActor", "sample", times=2),
)


def inject(ground: Ground) -> Iterator[Outcome]:
    """One a death."""
    for death in DEATHS:
        if ground.options.only in death.what:
            yield _injected(ground, death)


def _injected(ground: Ground, death: Death) -> Outcome:
    reference = ground.reference(death.variant, death.changes)
    folder, root = ground.lay(death.changes)
    victim = Victim(folder, "run", "experiment.yaml")
    kills = []
    for _ in range(death.times):
        if not victim.until(lambda: victim.label(root).endswith(death.stage)):
            return Outcome(death.what, False, f"was never at {death.stage}: {victim.said()}")
        victim.note()
        kills.append(_kill_one(victim, root, death.name))
    return _held(ground, death, victim, (folder, root), kills, reference)


def _kill_one(victim: Victim, root: Path, name: str) -> tuple[int, int]:
    """Kill the youngest process of that name, and wait until another is in its place, or the run has ended."""
    process = victim.find(name)[-1]
    os.kill(process, signal.SIGKILL)
    counts = at_kill(root)
    victim.until(lambda: process not in victim.processes() and bool(victim.find(name)))
    return counts


def _held(
    ground: Ground, death: Death, victim: Victim, place: tuple[Path, Path], kills: list[tuple[int, int]], reference: Any
) -> Outcome:
    folder, root = place
    status = victim.end()
    text = victim.err.read_text(encoding="utf-8", errors="replace")
    if death.times == 1 and (status != 0 or text.count(ANEW) != 1):
        return Outcome(death.what, False, f"ended with {status}: {victim.said()}")
    how = "went on by itself"
    if death.times > 1:
        if not victim.error() or status != 1:
            return Outcome(death.what, False, f"ended with {status}, not in one line: {victim.said()}")
        how = f"the second death ended it in one line ({victim.error()[:90]}…), and it was resumed"
        victim = Victim(folder, "resume", str(root), "--quiet")
        if victim.end() != 0:
            return Outcome(death.what, False, f"not resumed: {victim.said()}")
    difference = ground.same(root, reference, kills)
    left, _ = victim.gone()
    return Outcome(death.what, not difference and not left, difference or str(left or how))
