"""Ctrl-C, Ctrl-C twice, and SIGTERM from a scheduler.

Each ends the run with its own exit status (130, 143), one line that says how to go on, no trace, and nothing left
behind; then the run is resumed and compared, bit for bit. SIGTERM while a policy is trained keeps the learner's state
at its next step, without `learner.save_every`: the resumed round does the steps after it alone.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ground import Ground, Outcome, at_kill
from victim import Victim

LONG: dict[str, Any] = {"dpo": {"lr": 1.0e-3, "batch_size": 2, "epochs": 60}, "arms": {"on_policy": {}}}
"""A round with enough steps that a signal falls between two of them."""
GO_ON = "stopped; go on with: online-dpo resume "


@dataclass(frozen=True)
class Told:
    """What is sent in the first stage whose label ends in `stage`, and the exit status that it asks for."""

    what: str
    stage: str
    number: signal.Signals
    status: int
    twice: bool = False


CASES = (
    Told("Ctrl-C while it samples", "round 1 sample", signal.SIGINT, 130),
    Told("Ctrl-C while it trains", "round 1 train", signal.SIGINT, 130),
    Told("Ctrl-C twice while it judges", "round 1 judge", signal.SIGINT, 130, twice=True),
    Told("Ctrl-C twice while it trains", "round 2 train", signal.SIGINT, 130, twice=True),
    Told("SIGTERM while it samples", "round 2 sample", signal.SIGTERM, 143),
    Told("SIGTERM while it trains", "round 1 train", signal.SIGTERM, 143),
)


def inject(ground: Ground) -> Iterator[Outcome]:
    """One a case."""
    for case in CASES:
        if ground.options.only in case.what:
            yield _injected(ground, case)


def _injected(ground: Ground, case: Told) -> Outcome:
    reference = ground.reference("long rounds", LONG)
    folder, root = ground.lay(LONG)
    victim = Victim(folder, "run", "experiment.yaml")
    if not victim.until(lambda: _under_way(victim, root, case.stage)):
        return Outcome(case.what, False, f"was never at {case.stage}: {victim.said()}")
    victim.note()
    began = time.monotonic()
    # A terminal tells all processes of its group, a scheduler the driver.
    victim.interrupt() if case.number == signal.SIGINT else victim.process.send_signal(case.number)
    if case.twice:
        victim.until(lambda: time.monotonic() > began + 0.3)
        victim.interrupt()
    status, took = victim.end(120), time.monotonic() - began
    left, gone = victim.gone()
    trouble = _trouble(victim, case, status, left)
    if trouble:
        return Outcome(case.what, False, trouble)
    kills = [at_kill(root)]
    resumed = Victim(folder, "resume", str(root), "--quiet")
    difference = ground.same(root, reference, kills) if resumed.end() == 0 else resumed.said()
    steps = _kept_steps(victim)
    how = f"left with {status} after {took:.1f} s{steps}, nothing of it {gone:.1f} s later; resumed"
    return Outcome(case.what, not difference, difference or how)


def _under_way(victim: Victim, root: Path, stage: str) -> bool:
    """In the stage, and with something done where it trains."""
    if not victim.label(root).endswith(stage):
        return False
    record = json.loads((root / "progress.json").read_text(encoding="utf-8"))
    return not stage.endswith("train") or record["stage"]["done"] > 0


def _trouble(victim: Victim, case: Told, status: int, left: list[str]) -> str:
    """What was not as it should be when it left; empty: nothing."""
    said = victim.out.read_text(encoding="utf-8") + victim.err.read_text(encoding="utf-8", errors="replace")
    if status != case.status:
        return f"ended with {status}, not {case.status}: {victim.said()}"
    if "Traceback" in said or said.count(GO_ON) != 1:
        return f"said more, or less, than one line: {said[-500:]}"
    if case.status == 143 and case.stage.endswith("train") and "training is kept after" not in said:
        return f"kept no state: {said[-300:]}"
    return f"left {left}" if left else ""


def _kept_steps(victim: Victim) -> str:
    said = victim.out.read_text(encoding="utf-8")
    return f" ({said[said.index('training is kept') :].partition(';')[0]})" if "training is kept" in said else ""
