"""kill -9 of the driver, again and again, then the run goes on to its end.

Half of the moments are drawn uniformly over the seconds that the undisturbed run takes, its start included; half lie in
a stage that is drawn uniformly over the names of stages, then over those of that name: the driver stops itself as the
stage's folder is made, goes on for a drawn share of the seconds that the stage takes, and is killed. Some runs are
killed several times (`--chain`), each time in what goes on from the kill before. Compared, bit for bit: candidates,
verdicts, pairs, policies, and figures but for how they came about (`ground.HOW`). The judge is asked nothing that its
cache holds (`ground.paid_twice`). After each kill nothing of the run is left: no process, no shared memory, no port.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ground import Computed, Ground, Outcome, Reference, at_kill, injected, under_way
from victim import Victim


@dataclass(frozen=True)
class Moment:
    """When to kill: this share of the seconds of `stage`, or of the whole run's where there is none."""

    share: float
    stage: Computed | None = None


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
    name = rng.choice(sorted({stage.name for stage in reference.computed}))
    return Moment(rng.random(), rng.choice([stage for stage in reference.computed if stage.name == name]))


def _chain(ground: Ground, reference: Reference, moments: list[Moment], hit: Counter[str]) -> Iterator[Outcome]:
    """Kill one run at `moments`, those that it reaches, let it end, and compare."""
    folder, root = ground.lay()
    order = {stage: place for place, stage in enumerate(reference.computed)}
    kills: list[tuple[int, int]] = []
    seen: list[tuple[str, str, list[str]]] = []
    for moment in sorted(moments, key=lambda moment: order[moment.stage] if moment.stage else -1):
        stop = injected("STOP", moment.stage.folder) if moment.stage else {}
        victim = Victim(folder, "run", "experiment.yaml", "--quiet", environment=stop)
        if not _killed(victim, moment, reference):  # it had ended, or was past that stage
            break
        left, took = victim.gone()
        kills.append(at_kill(root))
        places = under_way(root)
        hit[places[0].name if places else "starting, or between two stages"] += 1
        where = f"in {places[0].folder}" if places else "while starting, or between two stages"
        seen.append((f"killed {where}", f"all of it gone after {took:.1f} s", left))
    last = Victim(folder, "run", "experiment.yaml", "--quiet")
    status = last.end()
    difference = ground.same(root, reference, kills) if status == 0 else f"ended with {status}: {last.said()}"
    left, _ = last.gone()
    for what, how, remains in seen:
        trouble = "; ".join([*([difference] if difference else []), *(f"left: {one}" for one in [*remains, *left])])
        yield Outcome(what, not trouble, trouble or how)


def _killed(victim: Victim, moment: Moment, reference: Reference) -> bool:
    """Kill `victim` at `moment`; false where it ended before."""
    if moment.stage:
        there = victim.until(lambda: victim.stands_still)
        wait = moment.share * moment.stage.seconds
    else:
        there, wait = True, moment.share * reference.seconds
    victim.note()
    limit = time.monotonic() + wait
    if moment.stage and there:
        victim.go_on()
    if not there or not victim.until(lambda: time.monotonic() >= limit):
        return False
    victim.note()
    victim.kill()
    return True
