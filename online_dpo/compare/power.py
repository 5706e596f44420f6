"""How many more prompts, or seeds, would decide a difference if it is what it seems."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import gammaincinv, nctdtr, ndtr

from online_dpo.compare.crossed import Components, Crossed, half_width, t_quantile
from online_dpo.compare.outcomes import Values

POWER = 0.8
MOST_PROMPTS = 1_000_000
MOST_SEEDS = 1_000
"""No experiment has more: what these would not decide, no number would."""
SLICES = (64, 8)
"""Equally likely values of the mean squares of the smaller and of the larger side, over which power is averaged."""


def power(difference: float, components: Components, prompts: int, seeds: int, alpha: float) -> float:
    """The chance that a true `difference` is found at level `alpha` with so many prompts and seeds.

    One seed: of the noncentral t over prompts. Several: the mean is normal with the variance of `components`, and the
    mean squares are independent of it and of each other, χ² of their degrees of freedom; that of cells, which has the
    most of these, is taken at its expectation. NaN with fewer than two prompts.
    """
    if prompts < 2:
        return math.nan
    error = math.sqrt(
        components.prompts / prompts + components.seeds / seeds + components.cells / (prompts * seeds),
    )
    if error == 0:
        return float(difference != 0)
    if seeds == 1:
        shift, bound = abs(difference) / error, t_quantile(prompts - 1, alpha)
        return float(1 - nctdtr(prompts - 1, shift, bound) + nctdtr(prompts - 1, shift, -bound))
    expected_p = components.cells + seeds * components.prompts
    expected_s = components.cells + prompts * components.seeds
    slices_p, slices_s = SLICES if prompts < seeds else SLICES[::-1]
    ms_p = expected_p * _slices(prompts - 1, slices_p)[:, None]
    ms_s = expected_s * _slices(seeds - 1, slices_s)[None, :]
    half = half_width(ms_p, ms_s, components.cells, prompts, seeds, alpha)
    found = ndtr((abs(difference) - half) / error) + ndtr((-abs(difference) - half) / error)
    return float(found.mean())


def more_prompts(spread: Crossed, alpha: float) -> int | None:
    """Prompts to add, at the seeds that there are, for `POWER` at level `alpha`; None where no number would do."""
    return _more(
        lambda prompts: power(spread.mean, spread.components, prompts, spread.seeds, alpha),
        spread.prompts,
        MOST_PROMPTS,
    )


def more_seeds(spread: Crossed, alpha: float) -> int | None:
    """Seeds to add, at the prompts that there are. None too from one seed: it says nothing of how seeds differ."""
    if spread.seeds < 2:
        return None
    return _more(
        lambda seeds: power(spread.mean, spread.components, spread.prompts, seeds, alpha), spread.seeds, MOST_SEEDS
    )


def _more(power_at: Callable[[int], float], have: int, most: int) -> int | None:
    """The smallest number above `have` with enough power, less `have`; by doubling and halving."""
    low, high = have, max(2, 2 * have)
    while not power_at(high) >= POWER:
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_at(middle) >= POWER else (middle, high)
    return high - have


def _slices(freedom: int, count: int) -> Values:
    """χ²/freedom at the middles of `count` equally likely slices."""
    middles = (np.arange(count) + 0.5) / count
    found: Values = gammaincinv(freedom / 2, middles) * 2 / freedom
    return found
