"""A run folder that is opened twice, begun twice at once, left locked by a dead process, or moved.

Who comes second is told in one line and changes nothing; what a dead process left locks nothing, even where its id is
another process's by now; a folder that was moved together with its experiment goes on at its new place. All are run to
their end and compared, bit for bit.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator

from ground import Ground, Outcome, at_kill
from victim import Victim


def inject(ground: Ground) -> Iterator[Outcome]:
    """Four."""
    for what, fault in (
        ("a second process on a run at work", _opened_twice),
        ("two first runs at once", _begun_twice),
        ("the lock of a dead process whose id lives on", _stale_lock),
        ("the run and its experiment at another path", _moved),
    ):
        if ground.options.only in what:
            trouble = fault(ground)
            yield Outcome(what, not trouble, trouble or "the same in the end")


def _opened_twice(ground: Ground) -> str:
    folder, root = ground.lay()
    first = Victim(folder, "run", "experiment.yaml", "--quiet")
    first.until(lambda: bool(first.label(root)))
    first.stand_still()  # it would have ended before the second has started
    seconds = [Victim(folder, *arguments) for arguments in (("resume", str(root)), ("run", "experiment.yaml"))]
    statuses = [second.end() for second in seconds]
    first.go_on()
    for status, second in zip(statuses, seconds, strict=True):
        if status != 2 or "is in use by another process (process " not in second.error():
            return f"the second was not told: {second.said()}"
    return ground.same(root, ground.reference()) if first.end() == 0 else first.said()


def _begun_twice(ground: Ground) -> str:
    folder, root = ground.lay()
    both = [Victim(folder, "run", "experiment.yaml", "--quiet") for _ in range(2)]
    ends = [(victim.end(), victim) for victim in both]
    statuses = sorted(status for status, _ in ends)
    second = next((victim for status, victim in ends if status == 2), None)
    if statuses != [0, 2] or second is None or "is in use by another process" not in second.error():
        return f"ended with {statuses}: {both[0].said()} / {both[1].said()}"
    return ground.same(root, ground.reference())


def _stale_lock(ground: Ground) -> str:
    folder, root = ground.lay()
    first = Victim(folder, "run", "experiment.yaml", "--quiet")
    first.until(lambda: first.label(root).endswith("train"))
    first.kill()
    first.gone()
    kills = [at_kill(root)]
    if not (root / ".lock").exists():
        return "there is no lock file"
    # As if the dead one's id were this very process's by now.
    record = json.loads((root / "progress.json").read_text(encoding="utf-8"))
    record |= {"pid": os.getpid(), "host": platform.node()}
    (root / "progress.json").write_text(json.dumps(record), encoding="utf-8")
    second = Victim(folder, "resume", str(root), "--quiet")
    return ground.same(root, ground.reference(), kills) if second.end() == 0 else second.said()


def _moved(ground: Ground) -> str:
    folder, root = ground.lay()
    first = Victim(folder, "run", "experiment.yaml", "--quiet")
    first.until(lambda: first.label(root).endswith("round 2 train"))
    first.kill()
    first.gone()
    kills = [at_kill(root)]
    elsewhere = folder.with_name(f"{folder.name}_moved") / "deeper"
    elsewhere.parent.mkdir()
    shutil.move(folder, elsewhere)
    root = elsewhere / "runs" / "run"
    second = Victim(elsewhere, "resume", "runs/run", "--quiet")
    return ground.same(root, ground.reference(), kills) if second.end() == 0 else second.said()
