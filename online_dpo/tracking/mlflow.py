"""MLflow: a run of theirs is an arm and a seed; the server is the one that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from online_dpo.config import Experiment
from online_dpo.files import digest_json
from online_dpo.tracking.figures import TrackedRound

AT_ONCE = 1000
"""Figures that one request may hold."""


class MLflowTracker:
    """Writes to MLflow's experiment `name_there`. A run is found again by its tag `online_dpo.run`, so that a resumed
    run goes on there. Its artifact experiment.json is the resolved experiment; of the process nothing is written."""

    name = "mlflow"

    def __init__(self, name_there: str, experiment: Experiment, root: Path) -> None:
        self.name_there = name_there
        self.experiment = experiment
        self.root = root
        self._runs: dict[tuple[str, int], str] = {}

    def write(self, tracked: TrackedRound) -> None:
        """Step: the round; of "curve/…": the arm's optimiser step."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, tracked.index) for name, value in tracked.figures.items()]
        for step, values in tracked.curve:
            metrics += [Metric(f"curve/{name}", value, now, step) for name, value in values.items()]
        client = MlflowClient()
        run = self._run_of(client, tracked.arm, tracked.seed)
        for start in range(0, len(metrics), AT_ONCE):
            client.log_batch(run, metrics=metrics[start : start + AT_ONCE])

    def close(self) -> None:
        """Mark the runs as ended; nothing of them is in memory."""
        from mlflow import MlflowClient

        for run in self._runs.values():
            MlflowClient().set_terminated(run)

    def _run_of(self, client: Any, arm: str, seed: int) -> str:
        """The id of the run of `arm` and `seed`, which is made where there is none."""
        if (arm, seed) not in self._runs:
            known = client.get_experiment_by_name(self.name_there)
            there = client.create_experiment(self.name_there) if known is None else known.experiment_id
            mark = digest_json([str(self.root.resolve()), arm, seed])
            found = client.search_runs([there], f"tags.`online_dpo.run` = '{mark}'")
            self._runs[arm, seed] = found[0].info.run_id if found else self._make(client, there, mark, arm, seed)
        return self._runs[arm, seed]

    def _make(self, client: Any, there: str, mark: str, arm: str, seed: int) -> str:
        tags = {"online_dpo.run": mark, "online_dpo.arm": arm, "online_dpo.seed": str(seed)}
        made = client.create_run(there, run_name=f"{self.experiment.name} {arm} seed {seed}", tags=tags)
        run: str = made.info.run_id
        client.log_dict(run, self.experiment.model_dump(mode="json"), "experiment.json")
        return run
