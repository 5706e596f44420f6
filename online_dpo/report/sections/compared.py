"""What was compared, in what the arms differ, and what each spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from online_dpo.config import flatten
from online_dpo.display import ABSENT
from online_dpo.report.costs import Cost, costs, mean_cost
from online_dpo.report.data import ReportedRun
from online_dpo.report.document import Cell, Section, Table, count, figure, setting, words
from online_dpo.report.subject import Subject

OWN_TO_A_RUN = ("name", "output", "arms", "judge_cache")
"""Keys in which two runs always differ, or that decide nothing."""
ONE_VALUE = ("source", "reference")
"""Keys whose forms are alternatives: they are shown whole."""


def compared(subject: Subject) -> Section:
    """The first section."""
    differing = differing_settings(subject.runs)
    text = [sentence(run) for run in subject.runs]
    if len(subject.arms) < 2:
        text.append("There is one arm: it is compared with the policy that it began from.")
    elif not differing:
        text.append("The arms differ in no setting.")
    tables = [_arms(subject)]
    if differing:
        tables.append(_differences(subject, differing))
    return Section("compared", "What was compared", tuple(text), tables=(*tables, _budgets(subject)))


def sentence(run: ReportedRun) -> str:
    """One run in a sentence."""
    experiment, manifest = run.experiment, run.manifest
    arms, seeds = len(experiment.arms), len(experiment.seeds)
    prompts = manifest.get("prompts", {}).get("held_out")
    numbers = ", ".join(map(str, experiment.seeds))
    found = f"Run {experiment.name}: {_many(arms, 'arm')}, {_many(seeds, 'seed')} ({numbers}), model {experiment.model}"
    return found + (f", measured on {prompts} held-out prompts after every round." if prompts else ".")


def differing_settings(runs: Sequence[ReportedRun]) -> dict[str, dict[str, Any]]:
    """Dotted key -> arm -> value, for every setting that is not the same in all arms of all runs."""
    settings: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        shared = run.experiment.model_dump(mode="json", exclude=set(OWN_TO_A_RUN))
        for arm in run.experiment.arms:
            own = shared | run.experiment.arm(arm).model_dump(mode="json")
            whole = {key: own.pop(key) for key in ONE_VALUE}
            settings[run.named(arm)] = whole | flatten(own)
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    table = {key: {arm: own.get(key) for arm, own in settings.items()} for key in keys}
    return {key: values for key, values in table.items() if len({repr(value) for value in values.values()}) > 1}


def _arms(subject: Subject) -> Table:
    rows = []
    for run in subject.runs:
        evaluation = run.experiment.evaluation
        for arm in run.experiment.arms:
            settings = run.experiment.arm(arm)
            dumped = settings.model_dump(mode="json")
            closed = {seed: _closed(run, arm, seed) for seed in run.experiment.seeds}
            rounds = sorted(set(closed.values()))
            rows.append(
                (
                    words(run.named(arm)),
                    setting(dumped["source"]),
                    words(settings.algorithm),
                    setting(dumped["reference"]),
                    words(settings.judge.use),
                    words(run.experiment.evaluation_judge(arm).use),
                    words(evaluation.gold.use if evaluation.gold else None),
                    Cell("–".join(str(one) for one in dict.fromkeys((rounds[0], rounds[-1]))), rounds, figure=True),
                )
            )
    columns = ("arm", "pairs from", "algorithm", "reference", "judge", "held-out judge", "gold judge", "rounds")
    return Table("arms", "The arms", columns, tuple(rows), "rounds: closed, fewest and most over the seeds")


def _closed(run: ReportedRun, arm: str, seed: int) -> int:
    return max((row["round"] for row in run.rows if (row["arm"], row["seed"]) == (arm, seed)), default=0)


def _differences(subject: Subject, differing: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = tuple(
        (words(key), *(setting(values[arm]) if values[arm] is not None else words(ABSENT) for arm in subject.arms))
        for key, values in differing.items()
    )
    return Table("differences", "The settings in which arms differ", ("key", *subject.arms), rows)


def _budgets(subject: Subject) -> Table:
    rows = []
    for run in subject.runs:
        for arm in run.experiment.arms:
            found = [costs(run, arm, seed) for seed in run.experiment.seeds]
            rows.append((words(run.named(arm)), *_cost_cells(mean_cost(found))))
    columns = ("arm", "pairs", "steps", "tokens sampled", "tokens trained", "judge calls", "seconds", "money")
    return Table(
        "budgets",
        "Budgets: what one seed of each arm spent over all its rounds (mean over seeds)",
        columns,
        tuple(rows),
        "work that an arm took over from an identical stage of another arm is counted in full; judge calls: answers or "
        "pairs asked about, those answered from the cache too; money: in the currency of the judges' prices",
    )


def _cost_cells(cost: Cost) -> tuple[Cell, ...]:
    counts = (cost.pairs, cost.steps, cost.sampled, cost.trained, cost.judge_calls)
    return (*(count(value) for value in counts), count(cost.seconds), figure(cost.money, places=2))


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
