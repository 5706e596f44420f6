"""A long round's state between steps: weights, optimiser and what was reported, so that a killed round goes on.

A folder with `state.json` and `tensors.safetensors`, written aside and renamed; the one before stays until the new one
is in its place, so from the first on there is always a whole one. It belongs to one piece of work, named by a digest;
another's is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from online_dpo.backends.distributed import from_first, rank_and_world
from online_dpo.backends.optimiser_state import moments, take_moments
from online_dpo.backends.sharding import read, whole
from online_dpo.errors import RunFolderError, one_line
from online_dpo.leaving import ask_file
from online_dpo.protocols import TrainStep


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

    def leave_asked(self) -> bool:
        """Whether the training is to be left as soon as its state is kept."""
        return ask_file(self.folder).exists()

    def save(self, progress: Progress, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        """Put this state in the place of the one before.

        Worker 0 writes. Workers that hold shares must all call it: they gather the tensors, so that the file is the
        same however many workers there are.
        """
        writes = rank_and_world()[0] == 0
        tensors = _tensors(parameters, optimiser, keep=writes)
        if writes:
            self._write(progress, tensors)

    def _write(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        aside = self.folder.with_name(self.folder.name + ".new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(tensors, aside / "tensors.safetensors")
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

        Raises `RunFolderError` when the state is this work's and cannot be read.
        """
        if rank_and_world()[0] == 0 and not self.folder.exists() and self._before.exists():
            self._before.rename(self.folder)
        # The others look when it is in its place.
        from_first(None)
        progress = self._progress()
        if not progress.steps:
            return progress
        try:
            with safe_open(self.folder / "tensors.safetensors", framework="pt") as saved:
                _restore(saved, parameters, optimiser)
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise RunFolderError(f"{self.folder} is damaged ({one_line(error)}); delete it to train anew") from error
        return progress

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
            raise RunFolderError(f"{file} is damaged ({one_line(error)}); delete it to train anew") from error


def _tensors(parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer, *, keep: bool) -> dict[str, Tensor]:
    tensors = moments(parameters, optimiser, keep=keep)
    for i, p in enumerate(parameters):
        found = whole(p)
        if keep:
            tensors[f"{i}.weight"] = found
    return tensors


def _restore(saved: Any, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    for i, p in enumerate(parameters):
        read(p, saved, f"{i}.weight")
    take_moments(saved, parameters, optimiser)
