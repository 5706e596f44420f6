"""TensorBoard event files: a run of TensorBoard's is an arm and a seed."""

from __future__ import annotations

from pathlib import Path

from online_dpo.tracking.figures import TrackedRound


class TensorBoardTracker:
    """Writes into `folder`/ARM/seed_S. Step: the round; of "curve/…": the arm's optimiser step."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, tracked: TrackedRound) -> None:
        """A round's figures, in an event file of their own, which is closed again."""
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder / tracked.arm / f"seed_{tracked.seed}")) as writer:
            for name, value in tracked.figures.items():
                writer.add_scalar(name, value, tracked.index)
            for step, values in tracked.curve:
                for name, value in values.items():
                    writer.add_scalar(f"curve/{name}", value, step)

    def close(self) -> None:
        """Nothing is open."""
