"""Arms that went on pleasing the judge they are measured by while a judge that training never sees turned away."""

from __future__ import annotations

import numpy as np

from online_dpo.compare.comparison import OverOptimisation
from online_dpo.compare.crossed import LEVEL, crossed
from online_dpo.compare.grid import Column, Grid, Rounds, cells, complete
from online_dpo.measure import Interval


def over_optimised(grid: Grid) -> tuple[OverOptimisation, ...]:
    """The arms and seeds whose gold reward fell from its highest round to the last while the reward rose between them.

    Both differences are paired over prompts and neither 95 % interval may hold 0. The highest round is found by
    looking, which makes any fall after it look larger: with k rounds before the last, each of which could have been it,
    the fall's interval has coverage 1 − 0.05/k (Bonferroni).
    """
    if not grid.has_gold:
        return ()
    found = (
        _of_seed(label, seed, rounds)
        for label, columns in grid.arms.items()
        for seed, rounds in zip(grid.seeds[label], columns, strict=True)
    )
    return tuple(one for one in found if one is not None)


def _of_seed(label: str, seed: int, rounds: Rounds) -> OverOptimisation | None:
    order = sorted(rounds)
    last = order[-1]
    (gold,), _ = complete(cells([rounds[index] for index in order], "gold"))
    if not gold.size:
        return None
    peak = order[int(np.argmax(gold.mean(axis=0)))]
    if peak == last:
        return None
    fall = _change(rounds, last, peak, "gold", (1 - LEVEL) / (len(order) - 1))
    rise = _change(rounds, peak, last, "reward", 1 - LEVEL)
    if not (fall.low > 0 and rise.low > 0):
        return None
    return OverOptimisation(arm=label, seed=seed, peak=peak, last=last, proxy_rise=rise, gold_fall=fall)


def _change(rounds: Rounds, before: int, after: int, column: Column, alpha: float) -> Interval:
    """Mean of `after` less `before`, over prompts."""
    (later, earlier), _ = complete(cells([rounds[after]], column), cells([rounds[before]], column))
    return crossed(later - earlier).interval(alpha)
