"""Weights & Biases: a run of theirs is an arm and a seed, all of one experiment in one group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from online_dpo.config import Experiment
from online_dpo.files import digest_json
from online_dpo.tracking.figures import TrackedRound

LONGEST_WAIT = 30.0
"""Seconds that the service has to answer."""


class WandbTracker:
    """Writes to `project`. Their id follows from the run folder, arm and seed, so that a resumed run goes on there.

    Of the machine, the process and the code nothing is sent: only the resolved experiment and the figures.
    """

    name = "wandb"

    def __init__(self, project: str, experiment: Experiment, root: Path) -> None:
        self.project = project
        self.experiment = experiment
        self.root = root
        self._open: tuple[str, int] | None = None
        self._run: Any = None

    def write(self, tracked: TrackedRound) -> None:
        """Figures over the axis "round", curves over the axis "step"."""
        run = self._run_of(tracked.arm, tracked.seed)
        run.log({**tracked.figures, "round": tracked.index})
        for step, values in tracked.curve:
            run.log({**{f"curve/{name}": value for name, value in values.items()}, "step": step})

    def close(self) -> None:
        """End the run that is open, and wait for the client's own process to have written all."""
        if self._run is not None:
            import wandb

            self._finish()
            wandb.teardown()

    def _finish(self) -> None:
        if self._run is not None:
            run, self._run, self._open = self._run, None, None
            run.finish()

    def _run_of(self, arm: str, seed: int) -> Any:
        """Arms come one after another: one run is open at a time."""
        import wandb

        if self._open != (arm, seed):
            self._finish()
            self._run = wandb.init(
                project=self.project,
                group=self.experiment.name,
                name=f"{arm} seed {seed}",
                id=digest_json([str(self.root.resolve()), arm, seed])[:16],
                resume="allow",
                dir=str(self.root),
                config={"arm": arm, "seed": seed, "experiment": self.experiment.model_dump(mode="json")},
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    init_timeout=LONGEST_WAIT,
                    save_code=False,
                    silent=True,
                    x_disable_machine_info=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_save_requirements=False,
                ),
            )
            self._open = (arm, seed)
            self._run.define_metric("*", step_metric="round")
            self._run.define_metric("curve/*", step_metric="step")
        return self._run
