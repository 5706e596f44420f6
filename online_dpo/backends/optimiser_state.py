"""What AdamW has learned of each weight, as tensors of a safetensors file; on its own, for the next part of a round.

A folder with `tensors.safetensors` (moments and counts, whole whatever the number of workers) and `state.json` (the
running mean of `bco_pair` and the pairs that it is over).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from online_dpo.backends.distributed import rank_and_world
from online_dpo.backends.sharding import read, whole
from online_dpo.errors import RunFolderError, one_line

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of each parameter."""


def moments(parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer, *, keep: bool) -> dict[str, Tensor]:
    """The optimiser's tensors by place and name; workers that hold shares gather them together.

    Empty at workers that do not `keep` them.
    """
    tensors: dict[str, Tensor] = {}
    for i, p in enumerate(parameters):
        for name in MOMENTS:
            found = whole(optimiser.state[p][name])
            if keep:
                tensors[f"{i}.{name}"] = found
    return tensors


def take_moments(saved: Any, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    """Give the optimiser the tensors of an open safetensors file."""
    for i, p in enumerate(parameters):
        # The fused AdamW keeps its count of steps as a number beside the weight, on the same device.
        state = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p)}
        state["exp_avg_sq"] = torch.zeros_like(p)
        for name in MOMENTS:
            read(state[name], saved, f"{i}.{name}")
        optimiser.state[p] = state


def save_state(
    folder: Path, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer, delta: float, seen: int
) -> None:
    """Write the state into `folder`, which is made. Worker 0 writes; workers that hold shares must all call it."""
    writes = rank_and_world()[0] == 0
    tensors = moments(parameters, optimiser, keep=writes)
    if writes:
        folder.mkdir(parents=True)
        save_file(tensors, folder / "tensors.safetensors")
        (folder / "state.json").write_text(json.dumps({"delta": delta, "seen": seen}), encoding="utf-8")


def load_state(folder: Path, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> tuple[float, int]:
    """Give the optimiser the state in `folder`; returns δ and the pairs it is over.

    Raises `RunFolderError` when it is damaged or of another model.
    """
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        delta, seen = float(record["delta"]), int(record["seen"])
        with safe_open(folder / "tensors.safetensors", framework="pt") as saved:
            take_moments(saved, parameters, optimiser)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunFolderError(f"the optimiser's state in {folder} is missing or damaged ({one_line(error)})") from error
    return delta, seen
