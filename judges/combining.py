"""Several judges' scores of one prompt's candidates: brought to one unit, compared, counted.

A table is (judges, candidates), float64, NaN where there is no score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Table: TypeAlias = NDArray[np.float64]
"""Also of one row (candidates,) where a function says so."""


def ranks(table: Table) -> Table:
    """For each judge: the share of a candidate's rivals that it beats, equals counting one half, in [0, 1].

    Rivals are the other candidates with a score; NaN where there are none.
    """
    return np.stack([_mean_of((row + 1.0) / 2.0) for row in _signs(table)])


def round_units(tables: Sequence[Table]) -> list[Table]:
    """Each judge's scores less its mean on the prompt, over its standard deviation within prompts, pooled.

    s² = Σ (score − prompt mean)² / Σ (k − 1) over all prompts, k the number of scores on each; zeros where s is 0.
    """
    centred = [table - _mean_of(table)[:, None] for table in tables]
    units = _pooled_deviations(centred)[:, None]
    return [np.where(units > 0.0, table / np.where(units > 0.0, units, 1.0), table * 0.0) for table in centred]


def majorities(table: Table, weights: Table) -> Table:
    """Each candidate's wins less its defeats over its comparisons, (candidates,); NaN where it has none.

    Of two candidates that one wins which judges of more weight prefer, among those that scored both.
    """
    signs = _signs(table)
    compared = ~np.isnan(signs)
    votes = (weights[:, None, None] * np.where(compared, signs, 0.0)).sum(axis=0)
    # Equal weights may differ in their last digit after adding: that is no majority.
    votes = np.where(np.abs(votes) > 1e-9 * weights.sum(), np.sign(votes), 0.0)
    return _mean_of(np.where(compared.any(axis=0), votes, math.nan))


def disagreements(table: Table) -> Table:
    """For each candidate, the share of rivals over which some judges prefer it and some do not, (candidates,)."""
    signs = _signs(table)
    divided = (signs > 0.0).any(axis=0) & (signs < 0.0).any(axis=0)
    return _mean_of(np.where((~np.isnan(signs)).any(axis=0), divided.astype(np.float64), math.nan))


def _signs(table: Table) -> Table:
    """(judges, n, n): 1, 0 or −1 as the judge scores the first candidate higher, equal or lower; NaN if it cannot."""
    mine, other = table[:, :, None], table[:, None, :]
    signs = (mine > other).astype(np.float64) - (mine < other)
    unknown = np.isnan(mine) | np.isnan(other) | np.eye(table.shape[1], dtype=bool)
    return np.where(unknown, math.nan, signs)


def _mean_of(rows: Table) -> Table:
    """The mean of each row's known entries, over the last axis; NaN where none is known."""
    known = ~np.isnan(rows)
    count = known.sum(axis=-1)
    total = np.where(known, rows, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def _pooled_deviations(centred: Sequence[Table]) -> Table:
    """Each judge's standard deviation over all tables together, (judges,)."""
    together = np.concatenate(list(centred), axis=1)
    known = ~np.isnan(together)
    # In units of the largest: squares of extreme scores would overflow.
    largest = np.where(known, np.abs(together), 0.0).max(axis=1, initial=0.0)
    squares = np.where(known, together / np.where(largest > 0.0, largest, 1.0)[:, None], 0.0) ** 2
    freedom = sum(np.maximum((~np.isnan(table)).sum(axis=1) - 1, 0) for table in centred)
    deviations: Table = largest * np.sqrt(squares.sum(axis=1) / np.maximum(freedom, 1))
    return deviations
