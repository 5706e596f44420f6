"""What is estimated of two policies, each with an interval, a p-value and the spread that both come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from online_dpo.compare.crossed import LEVEL, Crossed, crossed
from online_dpo.compare.outcomes import Values
from online_dpo.measure import Interval, wilson

NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Estimate:
    """An interval, the two-sided p of "no difference", and `spread`: cells whose mean is 0 where there is none."""

    interval: Interval
    p: float
    spread: Crossed


def mean_difference(cells: Values) -> Estimate:
    """The mean of differences (shape (P, S))."""
    spread = crossed(cells)
    return Estimate(spread.interval(), spread.p_value(), spread)


def share(wins: Values) -> Estimate:
    """The mean of shares in [0, 1] (shape (P, S); a tie is ½), held against ½.

    Wilson's interval in which z stands for the larger of z and half(α)/√(p(1 − p)/n): n cells that are worth fewer
    because they share prompts and seeds, never more. One seed: Wilson's own (`measure.win_rate`). Where all cells are
    alike there is no telling what they share: n is the number of prompts. The p-value belongs to the same interval.
    """
    spread = crossed(wins - 0.5)
    prompts, seeds = wins.shape
    if not wins.size:
        return Estimate(Interval(math.nan, math.nan, math.nan, 0), 1.0, spread)
    p = spread.mean + 0.5
    n = prompts if np.ptp(wins) == 0 else wins.size
    error = math.sqrt(max(0.0, p * (1 - p)) / n)
    z = critical(spread, error, seeds)
    found = wilson(p, n, z=z)
    score = abs(p - 0.5) * 2 * math.sqrt(n)
    return Estimate(Interval(p, found.low, found.high, wins.size), p_of_score(spread, error, seeds, score), spread)


def critical(spread: Crossed, error: float, seeds: int) -> float:
    """How many standard errors of independent cells (`error`) the 95 % interval reaches: z, or more."""
    z = NORMAL.inv_cdf((1 + LEVEL) / 2)
    half = spread.half_width() if seeds > 1 and error > 0 else math.nan
    return z if math.isnan(half) else max(z, half / error)


def p_of_score(spread: Crossed, error: float, seeds: int, score: float) -> float:
    """The p of a score that counts standard errors of independent cells, as `critical` reads them."""
    alone = 2 * NORMAL.cdf(-score)
    return alone if seeds < 2 or error <= 0 else max(alone, spread.p_value(score * error))


def wins_of(a: Values, b: Values) -> Values:
    """1 where `a` is larger than `b`, ½ where equal, 0 where smaller; NaN where either is."""
    return np.where(np.isnan(a) | np.isnan(b), np.nan, np.heaviside(a - b, 0.5))
