"""A long round's state between steps: weights, optimiser and what was reported, so that a killed round goes on.

A folder with `state.json` and `tensors.safetensors`, written aside and renamed; the one before stays until the new one
is in its place, so from the first on there is always a whole one. It belongs to one piece of work, named by a digest;
another's is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from online_dpo.errors import TrainingError, one_line
from online_dpo.protocols import TrainStep

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of each parameter."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What was reported up to a checkpoint, and the running mean of `bco_pair` with the pairs it is over."""

    steps: tuple[TrainStep, ...] = ()
    delta: float = 0.0
    seen: int = 0


class RoundCheckpoint:
    """The checkpoint in `folder` of the work that `key` names."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key
        self._before = folder.with_name(folder.name + ".before")

    def save(self, progress: Progress, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        """Put this state in the place of the one before."""
        aside = self.folder.with_name(self.folder.name + ".new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(_tensors(parameters, optimiser), aside / "tensors.safetensors")
        record = {"key": self.key, **asdict(progress)}
        (aside / "state.json").write_text(json.dumps(record), encoding="utf-8")
        for file in aside.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if self.folder.exists():
            shutil.rmtree(self._before, ignore_errors=True)
            self.folder.rename(self._before)
        aside.rename(self.folder)
        shutil.rmtree(self._before, ignore_errors=True)

    def load(self, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> Progress:
        """Take the saved state; an empty `Progress`, and nothing changed, when there is none of this work.

        Raises `TrainingError` when the state is this work's and cannot be read.
        """
        if not self.folder.exists() and self._before.exists():
            self._before.rename(self.folder)
        progress = self._progress()
        if not progress.steps:
            return progress
        try:
            saved = load_file(self.folder / "tensors.safetensors")
            _restore(saved, parameters, optimiser)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{self.folder} is damaged ({one_line(error)}); delete it to train anew") from error
        return progress

    def discard(self) -> None:
        """The round is trained: its checkpoint is of no more use."""
        for folder in (self.folder, self._before, self.folder.with_name(self.folder.name + ".new")):
            shutil.rmtree(folder, ignore_errors=True)

    def _progress(self) -> Progress:
        file = self.folder / "state.json"
        if not file.exists():
            return Progress()
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["key"] != self.key:
                return Progress()
            return Progress(tuple(TrainStep(**step) for step in record["steps"]), record["delta"], record["seen"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{file} is damaged ({one_line(error)}); delete it to train anew") from error


def _tensors(parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"{i}.weight": p.detach().contiguous() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        tensors |= {f"{i}.{name}": optimiser.state[p][name].contiguous() for name in MOMENTS}
    return tensors


def _restore(saved: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(saved[f"{i}.weight"])
            optimiser.state[p] = {
                name: saved[f"{i}.{name}"].to(p.device if name != "step" else "cpu") for name in MOMENTS
            }
