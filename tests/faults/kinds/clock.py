"""A clock that jumps: in every process of the run `time.time` is set back by an hour, and ahead by ten years, each few
seconds (`injected/sitecustomize.py`).

The run ends with the undisturbed run's bits; no stage took negative time or years, in its record or on the screen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from ground import Ground, Outcome, injected
from victim import Victim


def inject(ground: Ground) -> Iterator[Outcome]:
    """One."""
    reference = ground.reference()
    folder, root = ground.lay()
    environment = injected("CLOCK", "jumps")
    victim = Victim(folder, "run", "experiment.yaml", environment=environment)
    status = victim.end()
    difference = ground.same(root, reference) if status == 0 else f"ended with {status}: {victim.said()}"
    seconds = [json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in sorted(root.rglob("stages/*.json"))]
    wrong = [value for value in seconds if not 0.0 <= value < 3600.0]
    left, _ = victim.gone()
    fine = not difference and not wrong and not left and bool(seconds)
    trouble = difference or f"stages of {wrong[:3]} seconds; left {left}"
    seen = f"{len(seconds)} stages of {min(seconds, default=0):.2f} to {max(seconds, default=0):.2f} s"
    yield Outcome("a clock that is set back and ahead", fine, seen if fine else trouble)
