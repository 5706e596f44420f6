"""kill -9 of the driver, again and again, then the run goes on to its end.

Half of the moments are drawn uniformly over the seconds that the undisturbed run takes; half lie in a stage that is
drawn uniformly over all its stages, as the run folder's progress.json tells them. Some runs are killed several times
(`--chain`), each time in what goes on from the kill before. Compared, bit for bit: candidates, verdicts, pairs,
policies, and figures but for how they came about (`ground.HOW`). The judge is asked nothing that its cache holds
(`ground.paid_twice`). After each kill nothing of the run is left: no process, no shared memory, no port.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ground import Ground, Outcome, Reference, at_kill
from victim import Victim


@dataclass(frozen=True)
class Moment:
    """When to kill: in stage `label`, after this share of its seconds; of the whole run where there is no label."""

    share: float
    label: str = ""


def inject(ground: Ground) -> Iterator[Outcome]:
    """`--kills` of them."""
    reference = ground.reference()
    rng = random.Random(ground.options.seed)
    hit: Counter[str] = Counter()
    done = 0
    while done < ground.options.kills:
        chain = min(ground.options.chain, ground.options.kills - done)
        for outcome in _chain(ground, reference, [_moment(rng, reference) for _ in range(chain)], hit):
            done += 1
            yield outcome
    print("killed in: " + ", ".join(f"{stage} {count}" for stage, count in hit.most_common()), flush=True)


def _moment(rng: random.Random, reference: Reference) -> Moment:
    if rng.random() < 0.5:
        return Moment(rng.random())
    return Moment(rng.random(), rng.choice(list(reference.stages)))


def _chain(ground: Ground, reference: Reference, moments: list[Moment], hit: Counter[str]) -> Iterator[Outcome]:
    """Kill one run at `moments`, those that it reaches, let it end, and compare."""
    folder, root = ground.lay()
    order = {label: place for place, label in enumerate(reference.stages)}
    kills: list[tuple[int, int]] = []
    seen: list[tuple[str, str, list[str]]] = []
    for moment in sorted(moments, key=lambda moment: order.get(moment.label, 0)):
        victim = Victim(folder, "run", "experiment.yaml", "--quiet")
        place = _kill(victim, root, moment, reference)
        if place is None:  # it had ended, or was past that stage
            break
        left, took = victim.gone()
        kills.append(at_kill(root))
        hit["between two stages" if place.startswith("between") else place.rpartition(" ")[2]] += 1
        seen.append((f"killed in {place}", f"all of it gone after {took:.1f} s", left))
    last = Victim(folder, "run", "experiment.yaml", "--quiet")
    status = last.end()
    difference = ground.same(root, reference, kills) if status == 0 else f"ended with {status}: {last.said()}"
    left, _ = last.gone()
    for what, how, remains in seen:
        trouble = "; ".join([*([difference] if difference else []), *(f"left: {one}" for one in [*remains, *left])])
        yield Outcome(what, not trouble, trouble or how)


def _kill(victim: Victim, root: Path, moment: Moment, reference: Reference) -> str | None:
    """Kill `victim` at `moment`; where it was. None where it ended before."""
    if moment.label:
        passed = set(list(reference.stages)[list(reference.stages).index(moment.label) + 1 :])
        there = victim.until(lambda: victim.label(root) in {moment.label, *passed})
        wait = moment.share * reference.stages[moment.label]
    else:
        there, wait = True, moment.share * reference.seconds
    victim.note()
    limit = time.monotonic() + wait
    if not there or not victim.until(lambda: time.monotonic() >= limit):
        return None
    place = victim.label(root) or "between two stages"
    victim.note()
    victim.kill()
    return place
