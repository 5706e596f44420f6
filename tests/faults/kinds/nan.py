"""A loss that is not finite, really: a learning rate of 1e30.

The arm stops with its last good policy and one line, the other arm goes on to its end with the undisturbed run's bits,
and the run ends with status 1; resumed, it says the same and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from ground import Ground, Outcome, results
from victim import Victim

ARMS = {"self_offline": {"source": "initial"}, "wild": {"dpo": {"lr": 1.0e30, "batch_size": 2, "epochs": 2}}}


def inject(ground: Ground) -> Iterator[Outcome]:
    """One."""
    reference = ground.reference()
    folder, root = ground.lay({"arms": ARMS})
    victim = Victim(folder, "run", "experiment.yaml", "--quiet")
    status, said = victim.end(), victim.out.read_text(encoding="utf-8")
    left, _ = victim.gone()
    if status != 1 or "wild · seed 0 stopped early: " not in said or "Traceback" in said + victim.said() or left:
        yield Outcome("a loss that is not finite", False, f"ended with {status}: {said[-300:]} {victim.said()} {left}")
        return
    found = results(root)
    files = [name for name in reference.results if name.startswith("self_offline/") and not name.endswith(".json")]
    other = [name for name in files if found.get(name) != reference.results[name]]
    unsaved = [name for name in found if name.startswith("wild/") and name.endswith(".safetensors")]
    again = Victim(folder, "resume", str(root), "--quiet")
    same = again.end() == 1 and results(root) == found
    line = said[said.index("wild · seed 0 stopped early") :].splitlines()[0]
    fine = not other and not unsaved and same and bool(files)
    seen = f"{line}; {len(files)} files of the other arm are the same"
    yield Outcome("a loss that is not finite", fine, seen if fine else f"{other[:3]} {unsaved[:3]} {again.said()}")
