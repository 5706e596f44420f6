"""Outcomes read from run folders: closed rounds alone, their files held against their records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from online_dpo.compare.outcomes import Outcomes, Values
from online_dpo.config import Experiment
from online_dpo.errors import RunFolderError, one_line
from online_dpo.store import RoundFolder, RunStore

COLUMNS = ("prompt_id", "score", "gold_score", "logprobs", "initial_logprobs")
"""What is read of held_out.parquet."""


def read_runs(stores: Sequence[RunStore]) -> list[Outcomes]:
    """The outcomes of several runs, all in the first one's order of prompts.

    Raises `RunFolderError`: a run without a closed round, two runs of one name, or held-out prompts that differ.
    """
    names = [store.root.resolve().name for store in stores]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RunFolderError(f"two of the runs are called '{twice}': their arms could not be told apart")
    found: list[Outcomes] = []
    for store in stores:
        outcomes = read_outcomes(store)
        if not outcomes:
            raise RunFolderError(f"{store.root} has no closed round yet: there is nothing to compare")
        first = (found or outcomes)[0]
        found += [_in_order_of(one, first, store.root) for one in outcomes]
    return found


def read_outcomes(store: RunStore) -> list[Outcomes]:
    """One for each closed round, round 0 included, by seed, arm and round.

    Raises `RunFolderError` when a file is missing, damaged, or was changed since it was written.
    """
    experiment, model = store.experiment, str(store.manifest.get("model", {}).get("digest", ""))
    found = []
    for seed in experiment.seeds:
        for arm in experiment.arms:
            for index in range(experiment.arm(arm).rounds + 1):
                folder = store.round(arm, seed, index)
                if folder.closed:
                    found.append(read_round(experiment, folder, arm, seed, model))
    return found


def read_round(experiment: Experiment, folder: RoundFolder, arm: str, seed: int, model: str = "") -> Outcomes:
    """The outcomes of one round whose stage `evaluate` is done."""
    folder.trust("evaluate")
    record = folder.done("evaluate")
    inputs = {} if record is None else record.inputs
    table = _table(folder.path / "held_out.parquet")
    evaluation = experiment.evaluation
    exact = (evaluation.temperature, evaluation.top_p) == (1.0, 1.0)
    own, tokens = _sums(table["logprobs"])
    return Outcomes(
        run=folder.run.root.resolve().name,
        arm=arm,
        seed=seed,
        round=folder.index,
        prompt_ids=tuple(table["prompt_id"].to_pylist()),
        reward=_floats(table["score"]),
        gold=None if evaluation.gold is None else _floats(table["gold_score"]),
        tokens=tokens,
        log_ratio=own - _sums(table["initial_logprobs"])[0] if exact else None,
        judge=inputs.get("judge", ""),
        sampling=inputs.get("sampling", ""),
        model=model,
    )


def _table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(f"{path} is missing or damaged: {one_line(error)}") from error


def _floats(column: Any) -> Values:
    """A column of scores; NaN where there is none."""
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _sums(column: Any) -> tuple[Values, Values]:
    """Sum and length of each row's list."""
    lists = column.combine_chunks()
    values = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.float64)
    lengths = np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
    rows = np.repeat(np.arange(lengths.size), lengths)
    sums: Values = np.bincount(rows, weights=values, minlength=lengths.size).astype(np.float64)
    return sums, lengths.astype(np.float64)


def _in_order_of(one: Outcomes, first: Outcomes, root: Path) -> Outcomes:
    """`one` with its prompts in the order of `first`'s."""
    if one.prompt_ids == first.prompt_ids:
        return one
    missing = len(set(first.prompt_ids) - set(one.prompt_ids))
    extra = len(set(one.prompt_ids) - set(first.prompt_ids))
    if missing or extra:
        raise RunFolderError(
            f"{root}: its held-out prompts are not those of run '{first.run}' ({missing} of these are missing, {extra} "
            "are others): runs are compared on the same prompts (same prompts.path, prompts.held_out and ids)"
        )
    return one.reordered(first.prompt_ids)
