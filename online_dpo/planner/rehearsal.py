"""A short real run on this machine: the experiment's own engine, learner and judge, few prompts, two sizes."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from online_dpo.arms import Run
from online_dpo.config import Experiment, validate_experiment
from online_dpo.loop import run_experiment
from online_dpo.planner.measured import Point
from online_dpo.planner.observed import Observed, observe
from online_dpo.planner.processes import peaks
from online_dpo.planner.work import INITIAL
from online_dpo.protocols import Progress
from online_dpo.runs import Resolved, live_run, open_cache, open_or_create
from online_dpo.store import RunStore

BASE_PROMPTS = 4
"""Prompts of the smaller rounds where vLLM samples, which fills up as answers end; the transformers engine has whole
batches."""
TIMES = 3
"""The larger round has at most so many times the prompts."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of a rehearsed run: prompts of a round, held-out ones, rounds."""

    prompts: int
    held_out: int
    rounds: int


@dataclass(frozen=True)
class Rehearsed:
    """What was observed; (units, seconds) of each stage of the very first round, which loads what later ones have;
    seconds to start and to end the processes; bytes of memory at their highest, by process; and pairs a step had."""

    observed: Observed
    first: dict[str, Point]
    start_s: float
    peaks: dict[str, int]
    batch: int


def sizes(experiment: Experiment, name: str, engine: str, train: int, held_out: int) -> tuple[Size, Size]:
    """The smaller run and the larger one; the second round of each counts.

    `train` and `held_out`: prompts that there are.
    """
    rows = experiment.engine.batch_size
    n = experiment.arm(name).sampling.n
    prompts, replies = (max(1, rows // n), rows) if engine == "transformers" else (BASE_PROMPTS, BASE_PROMPTS)
    most = min(experiment.prompts.per_round, train)
    larger = min(most, TIMES * prompts), min(held_out, TIMES * replies)
    smaller = min(prompts, max(1, larger[0] // 2)), min(replies, max(1, larger[1] // 2))
    return Size(*smaller, rounds=2), Size(*larger, rounds=2)


def described(resolved: Resolved, engine: str) -> str:
    """One line: what will be done."""
    prompts = resolved.prompts
    name = resolved.experiment.run_order()[0]
    small, large = sizes(resolved.experiment, name, engine, len(prompts.train), len(prompts.held_out))
    return (
        f"rehearsing: {small.rounds} rounds of {small.prompts} prompts, {large.rounds} of {large.prompts}; "
        f"{small.held_out} and {large.held_out} held out; judges are really asked; "
        "seconds for a small model, minutes for a large one"
    )


def rehearse(resolved: Resolved, engine: str, progress: Progress) -> Rehearsed:
    """Run both sizes in a folder that goes afterwards, with one start of engine and learner.

    Raises what a run raises: what stops the rehearsal would stop the run.
    """
    name = resolved.experiment.run_order()[0]
    prompts = resolved.prompts
    small, large = sizes(resolved.experiment, name, engine, len(prompts.train), len(prompts.held_out))
    batch = min(resolved.experiment.arm(name).dpo.batch_size, small.prompts)
    with tempfile.TemporaryDirectory(prefix="online-dpo-rehearsal-") as place:
        parts = [_part(resolved, name, size, batch, Path(place)) for size in (small, large)]
        stores = [open_or_create(part) for part in parts]
        began = time.perf_counter()
        few = parts[1].prompts
        with live_run(stores[1], resolved.model, few.train, few.held_out, {}, progress) as run:
            start_s = time.perf_counter() - began
            for store, part in zip(stores, parts, strict=True):
                _run_part(run, store, part)
            held, ended = peaks(), time.perf_counter()
        start_s += time.perf_counter() - ended
        # First rounds load what later ones have, and score fewer policies: they count as a start alone.
        first = {stage: points[0] for stage, points in observe(stores[0]).points.items() if points}
        found = observe(stores[0], first_round=2)
        found.points[INITIAL].clear()
        found.add(observe(stores[1], first_round=2))
        return Rehearsed(found, first, start_s, held, batch)


def _run_part(run: Run, store: RunStore, part: Resolved) -> None:
    """`part` by the processes of `run`, with a store and a cache of its own."""
    with open_cache(store) as cache:
        own = run.lane(run.engine, run.learner, cache, run.live_model)
        run_experiment(
            replace(
                own,
                store=store,
                experiment=part.experiment,
                train_prompts=part.prompts.train,
                held_out=part.prompts.held_out,
            )
        )


def _part(resolved: Resolved, name: str, size: Size, batch: int, place: Path) -> Resolved:
    """Arm `name` alone, sampling from its current policy, on few prompts; nothing of it is kept or tracked."""
    experiment = resolved.experiment
    data = experiment.model_dump(mode="json") | experiment.arm(name).model_dump(mode="json")
    data |= {"name": f"rounds-of-{size.prompts}", "output": str(place), "arms": {"rehearsal": {}}, "seeds": [0]}
    data |= {"source": "current", "rounds": size.rounds, "sft": None, "contrasts": None, "judge_cache": None}
    data |= {"tracking": {}, "keep": "all", "select": "last"}
    data["prompts"] |= {"per_round": size.prompts, "held_out": size.held_out}
    data["dpo"] |= {"batch_size": batch}
    data["cluster"] |= {"lanes": 1}
    data["evaluation"] |= {"pairs": None}
    prompts = resolved.prompts
    # Both rounds have prompts of their own, where there are so many.
    train = prompts.train[: size.rounds * size.prompts]
    few = replace(prompts, train=train, held_out=prompts.held_out[: size.held_out])
    spec = validate_experiment(data, "the rehearsal")
    return Resolved(spec, resolved.folder, resolved.model, few, resolved.judges)
