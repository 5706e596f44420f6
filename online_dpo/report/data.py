"""What the run folders hold, read once: figures of closed rounds under the label that the report gives each arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from online_dpo.compare import INITIAL
from online_dpo.config import Experiment
from online_dpo.display.figures import finite, get
from online_dpo.loop import collect_metrics
from online_dpo.store import RoundFolder, RunStore

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ReportedRun:
    """One run. `labels`: how the comparison, and so the report, calls each of its arms."""

    store: RunStore
    experiment: Experiment
    manifest: Mapping[str, Any]
    rows: tuple[Row, ...]
    """metrics.json of every closed round, by seed, arm and round."""
    labels: Mapping[str, str]

    def named(self, arm: str) -> str:
        """How the report calls `arm`."""
        return self.labels[arm]

    def folder(self, row: Row) -> RoundFolder:
        """The folder of a closed round."""
        return self.store.round(row["arm"], row["seed"], row["round"])

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.store.root.resolve().name

    @property
    def arms(self) -> list[str]:
        """The arms, as the report calls them."""
        return [self.named(arm) for arm in self.experiment.arms]

    def unfinished(self) -> list[str]:
        """A sentence for each arm and seed that has rounds to come."""
        found = []
        for arm in self.experiment.arms:
            rounds = self.experiment.arm(arm).rounds
            for seed in self.experiment.seeds:
                done = sum(row["arm"] == arm and row["seed"] == seed and row["round"] > 0 for row in self.rows)
                if done < rounds:
                    found.append(f"{self.named(arm)}, seed {seed}: {done} of {rounds} rounds are closed")
        return found


def read_runs(stores: Sequence[RunStore]) -> list[ReportedRun]:
    """The runs with the labels of `compare.grid`: an arm's name, with its run's where that is needed to tell it."""
    names = Counter(arm for store in stores for arm in store.experiment.arms)
    found = []
    for store in stores:
        experiment, run = store.experiment, store.root.resolve().name
        labels = {arm: arm if names[arm] == 1 and arm != INITIAL else f"{run}/{arm}" for arm in experiment.arms}
        rows = tuple(collect_metrics(store, experiment))
        found.append(ReportedRun(store, experiment, store.manifest, rows, labels))
    return found


def labelled(runs: Iterable[ReportedRun]) -> Iterator[tuple[str, Row]]:
    """Every closed round with its arm's label."""
    for run in runs:
        for row in run.rows:
            yield run.named(row["arm"]), row


def mean_of(values: Iterable[object]) -> float | None:
    """The mean of the numbers among `values`; None where there is none."""
    found = [number for value in values if (number := finite(value)) is not None]
    return sum(found) / len(found) if found else None


def over_seeds(runs: Sequence[ReportedRun], *path: str) -> dict[str, dict[int, list[Any]]]:
    """Label -> round -> the value at `path` of each seed's metrics, where it is there."""
    table: dict[str, dict[int, list[Any]]] = {}
    for label, row in labelled(runs):
        value = get(row, *path)
        if value is not None:
            table.setdefault(label, {}).setdefault(row["round"], []).append(value)
    return table
