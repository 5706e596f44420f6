"""Two arms at the same distance from the policy that they began with: which gains more for its KL.

An arm's rounds are points on a path from (0, score of the initial policy) through (√KL_t, score of round t); between
two rounds the path is a straight line in √KL, the axis on which reward is nearly straight (Gao, Schulman and Hilton,
Scaling Laws for Reward Model Overoptimization, 2023, section 3). Arms are compared where the shorter of their paths
ends, at the lowest over seeds: nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from online_dpo.compare.grid import Column, Grid, Rounds, cells
from online_dpo.compare.outcomes import Outcomes, Values


def common_kl(grid: Grid, a: str, b: str) -> float | None:
    """The largest KL(π‖π₀), nats a sequence, that both arms reach at every seed; None where it was not measured or an
    arm did not move."""
    paths = [rounds for label in (a, b) for rounds in grid.arms[label]]
    if any(one.log_ratio is None for rounds in paths for one in rounds.values()):
        return None
    kl = min(max(_kl(one) for one in rounds.values()) for rounds in paths)
    return kl if kl > 0 else None


def cells_at(paths: Sequence[Rounds], kl: float, column: Column) -> Values:
    """The score of each path (one a seed) where it first reaches `kl`, as (P, S).

    A KL is itself a mean over prompts, so the place on the path is not exact: a prompt's cell is its interpolated
    score less what its own log-ratio moves that place by (the first order of the delta method). Cells keep the
    interpolated mean, and their spread holds both errors.
    """
    return np.stack([_at(rounds, kl, column) for rounds in paths], axis=1)


def _at(rounds: Rounds, kl: float, column: Column) -> Values:
    """One path, shape (P,)."""
    order = [rounds[index] for index in sorted(rounds)]
    last = next(place for place, one in enumerate(order) if _kl(one) >= kl)
    if not last:
        return _scores(order[0], column)
    ends = order[last - 1], order[last]
    x = [math.sqrt(max(0.0, _kl(one))) for one in ends]
    share = (math.sqrt(kl) - x[0]) / (x[1] - x[0])
    before, after = (_scores(one, column) for one in ends)
    slope = float(np.nanmean(after - before)) / (x[1] - x[0])
    found: Values = (1 - share) * (before - slope * _moved(ends[0], x[0])) + share * (
        after - slope * _moved(ends[1], x[1])
    )
    return found


def _moved(one: Outcomes, x: float) -> Values:
    """How far each prompt's log-ratio moves √KL, mean 0: (l − KL) d√KL/dKL. At KL 0 the log-ratios are all 0."""
    away: Values = _scores(one, "log_ratio") - _kl(one)
    return away / (2 * x) if x > 0 else np.zeros_like(away)


def _scores(one: Outcomes, column: Column) -> Values:
    values: Values = cells([one], column)[:, 0]
    return values


def _kl(one: Outcomes) -> float:
    return float(_scores(one, "log_ratio").mean())
