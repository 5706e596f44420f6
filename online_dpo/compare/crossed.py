"""The mean of cells [prompts, seeds]: both are random and every seed met every prompt, so neither may be ignored.

x_ps = μ + α_p + β_s + ε_ps: the two-way random-effects model with one value a cell (Searle, Casella and McCulloch,
Variance Components, 1992, chapter 4; in generalisability theory a p × s design, Brennan 2001). With P prompts, S seeds
and the mean squares MS_p, MS_s of rows and columns and MS_ps of what they leave,

    Var(mean) = σ²_p/P + σ²_s/S + σ²_ps/(PS), estimated by (MS_p + MS_s − MS_ps)/(PS).

A bootstrap that draws rows and columns (Owen, The pigeonhole bootstrap, Ann. Appl. Stat. 2007) estimates the same
thing, but from three seeds it is far too narrow, which no number of resamples mends; so t distributions are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from online_dpo.compare.outcomes import Values
from online_dpo.measure import Interval

LEVEL = 0.95
LEAST_P = 1e-15
"""Smaller p-values are given as this one: nothing that is measured here can tell them apart."""


@dataclass(frozen=True, slots=True)
class Components:
    """σ² of prompts, of seeds, and of what is left in a cell. With one seed, `prompts` holds all that varies."""

    prompts: float
    seeds: float
    cells: float


@dataclass(frozen=True, slots=True)
class Crossed:
    """A mean over `prompts` × `seeds` cells and its mean squares. With one seed, those of seeds and cells are 0."""

    mean: float
    prompts: int
    seeds: int
    ms_prompts: float
    ms_seeds: float
    ms_cells: float

    def half_width(self, alpha: float = 1 - LEVEL) -> float:
        """Of the interval with coverage 1 − α; NaN with fewer than two prompts."""
        if self.prompts < 2:
            return math.nan
        return float(half_width(self.ms_prompts, self.ms_seeds, self.ms_cells, self.prompts, self.seeds, alpha))

    def interval(self, alpha: float = 1 - LEVEL) -> Interval:
        """The mean with its interval; `n` counts cells."""
        half = self.half_width(alpha)
        return Interval(self.mean, self.mean - half, self.mean + half, self.prompts * self.seeds)

    def p_value(self, distance: float | None = None) -> float:
        """Two-sided p of a mean that lies `distance` from what is supposed (default: the mean from 0).

        The smallest α whose interval leaves it out. Where no cell differs from another there is no spread to hold it
        against: then that of the sign test over prompts, 2^(1 − P). With fewer than two prompts 1.
        """
        far = abs(self.mean if distance is None else distance)
        if self.prompts < 2 or far == 0:
            return 1.0
        if self.half_width() == 0:
            return max(LEAST_P, 2.0 ** (1 - self.prompts))
        return smallest_alpha(lambda alpha: far - self.half_width(alpha))

    @property
    def components(self) -> Components:
        """The variances that the mean squares estimate, none below 0."""
        if self.seeds < 2:
            return Components(self.ms_prompts, 0.0, 0.0)
        return Components(
            max(0.0, self.ms_prompts - self.ms_cells) / self.seeds,
            max(0.0, self.ms_seeds - self.ms_cells) / self.prompts,
            self.ms_cells,
        )


def crossed(cells: Values) -> Crossed:
    """Mean and mean squares of `cells` (shape (P, S)); all cells must be finite."""
    prompts, seeds = cells.shape
    if not prompts or not seeds:
        return Crossed(math.nan, prompts, seeds, math.nan, math.nan, math.nan)
    # Of what is left without the first cell: equal cells then have a spread of exactly 0, whatever their size.
    shifted = cells - cells[0, 0]
    mean = float(shifted.mean())
    rows, columns = shifted.mean(axis=1), shifted.mean(axis=0)
    left = shifted - rows[:, None] - columns[None, :] + mean
    return Crossed(
        mean + float(cells[0, 0]),
        prompts,
        seeds,
        seeds * _mean_square(rows - mean, prompts - 1),
        prompts * _mean_square(columns - mean, seeds - 1),
        _mean_square(left, (prompts - 1) * (seeds - 1)),
    )


def half_width(ms_p: Any, ms_s: Any, ms_ps: Any, prompts: int, seeds: int, alpha: float) -> Any:
    """Half the width of the interval with coverage 1 − α, for mean squares as arrays of one shape.

    One seed: t over prompts. Several: √max(A, B)/√(PS) with

        A = t²_{S−1} MS_s + t²_{P−1} max(0, MS_p − MS_ps)
        B = t²_{P−1} (max(MS_p, MS_ps) + max(MS_s, MS_ps) − MS_ps)

    (P and S change places in A where there are more seeds than prompts). A gives each of two estimates of variance its
    own t, squared, which covers at least as often as it says where they are independent (Banerjee, Sankhyā 22, 1960).
    B, the variance with components truncated at 0, stops seeds that agree by chance from making it narrow. In
    simulations (tests/test_compare_crossed.py) Satterthwaite's degrees of freedom for the sum cover as little as 0.82
    of the time at 2 seeds and 0.87 at 3; this covers 0.94 or more throughout, and pays with width where seeds do not
    matter.
    """
    many, few = t_quantile(max(prompts, seeds) - 1, alpha), t_quantile(min(prompts, seeds) - 1, alpha)
    if seeds == 1:
        return t_quantile(prompts - 1, alpha) * np.sqrt(ms_p / prompts)
    ms_many, ms_few = (ms_p, ms_s) if prompts >= seeds else (ms_s, ms_p)
    both = few**2 * ms_few + many**2 * np.maximum(0.0, ms_many - ms_ps)
    truncated = many**2 * (np.maximum(ms_p, ms_ps) + np.maximum(ms_s, ms_ps) - ms_ps)
    return np.sqrt(np.maximum(both, truncated) / (prompts * seeds))


def t_quantile(freedom: int, alpha: float) -> float:
    """The (1 − α/2) quantile of Student's t; NaN without a degree of freedom."""
    from scipy.special import stdtrit

    return -float(stdtrit(freedom, alpha / 2)) if freedom > 0 else math.nan


def smallest_alpha(excess: Callable[[float], float]) -> float:
    """The α at which `excess`, how far something lies outside the interval of coverage 1 − α, is 0."""
    from scipy.optimize import brentq

    if excess(LEAST_P) >= 0:
        return LEAST_P
    if excess(1.0) <= 0:
        return 1.0
    return math.exp(brentq(lambda log_alpha: excess(math.exp(log_alpha)), math.log(LEAST_P), 0.0, xtol=1e-9))


def _mean_square(values: Values, freedom: int) -> float:
    return float(np.square(values).sum()) / freedom if freedom > 0 else 0.0
